"""Metrics of a run: sums over steps, their means, and the files that hold them."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from mgsr_jax.interventions.outcome import InterventionInfo
from mgsr_jax.losses import Sum, TopKTeacher, masked_sum
from mgsr_jax.objective import LIMITS_START
from mgsr_jax.rows import Rows
from mgsr_jax.train_step import Metrics
from mgsr_jax.training.row_source import StepRows

_PEAK = "peak_bytes_in_use"
_WORK = "tokens/"


class Means:
    """Accumulates (sum, count) pairs of steps or batches and returns their means.

    Values with a count of 0 are left out. An `x_variance` is measured around the
    objective's LIMITS_START of x; it is returned as `x_deviation` around the mean of x.
    Values whose names begin with "tokens/" are work: they are returned as sums.

    >>> means = Means()
    >>> means.add({"kl": Sum(3.0, 2.0)})
    >>> means.add({"kl": Sum(1.0, 2.0)})
    >>> means.take()
    {'kl': 1.0}
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, Sum]) -> None:
        """Add the metrics of one step or batch."""
        for name, (total, count) in jax.device_get(dict(metrics)).items():
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (old[0] + float(total), old[1] + float(count))

    def count(self, name: str) -> float:
        """The accumulated count of `name`."""
        return self._sums.get(name, (0.0, 0.0))[1]

    def take(self) -> dict[str, float]:
        """Return the means and reset the sums."""
        means = {
            name: total if name.startswith(_WORK) else total / n
            for name, (total, n) in self._sums.items()
            if n
        }
        self._sums = {}
        for name in [name for name in means if name.endswith("_variance")]:
            base = name.removesuffix("_variance")
            shift = means[base] - LIMITS_START[base.rpartition("/")[-1]]
            variance = max(means.pop(name) - shift**2, 0.0)
            means[f"{base}_deviation"] = math.sqrt(variance)
        return means


def step_metrics(
    metrics: Metrics, rows: StepRows, *, needs_teacher: bool = True
) -> Metrics:
    """The train step's metrics, its rollout's, and the work of both models.

    Args:
      metrics: of the train step.
      rows: its rows.
      needs_teacher: whether the objective compares with a teacher.
    """
    named = {f"train/{name}": value for name, value in metrics.items()}
    named["rollout/student_share"] = Sum(float(rows.source != "data"), 1.0)
    if rows.horizon is not None:
        named["rollout/max_new_tokens"] = Sum(float(rows.horizon), 1.0)
    if rows.interventions:
        named |= _intervention_metrics(rows.generated, rows.interventions)
    return named | _work(rows, needs_teacher=needs_teacher)


@jax.jit
def _intervention_metrics(
    generated: tuple[Rows, ...], interventions: tuple[InterventionInfo, ...]
) -> Metrics:
    """Metrics of the teacher's tokens in the rows of one step."""
    rows, info = (
        jax.tree.map(lambda *parts: jnp.concatenate(parts), *micro_batches)
        for micro_batches in (generated, interventions)
    )
    changed = jnp.any(info.teacher_wrote, axis=1)
    start, end = rows.prompt_lengths[:, None], rows.lengths[:, None]
    share = (jnp.arange(rows.tokens.shape[1])[None] - start) / (end - start)
    count = jnp.float32(changed.size)
    return {
        "rollout/changed": Sum(jnp.sum(changed), count),
        "rollout/teacher_tokens": Sum(jnp.sum(info.teacher_wrote), count),
        "rollout/teacher_position": masked_sum(share, info.teacher_wrote),
        "rollout/kl": masked_sum(info.kl, changed),
    }


def _work(rows: StepRows, *, needs_teacher: bool) -> Metrics:
    """Tokens that the student decoded and the teacher read, in rollout and step.

    The step's teacher reads all tokens of a row but the last. It reads nothing where
    its output was stored or was computed by the rollout.
    """
    generated = [jnp.sum(info.student_generated) for info in rows.interventions]
    scored = [jnp.sum(info.teacher_scored) for info in rows.interventions]
    outputs = rows.teacher_outputs or (None,) * len(rows.micro_batches)
    for own, output in zip(rows.micro_batches, outputs, strict=True):
        read = output if isinstance(output, Rows) else own
        is_stored = isinstance(output, TopKTeacher | jax.Array)
        if needs_teacher and not is_stored:
            scored.append(jnp.sum(read.lengths - 1))
    return {
        f"{_WORK}student_generated": Sum(sum(generated, jnp.int32(0)), 1.0),
        f"{_WORK}teacher_scored": Sum(sum(scored, jnp.int32(0)), 1.0),
    }


def peak_memory() -> dict[str, float]:
    """Highest memory use of one of this process's devices since its start, in GiB.

    Empty on backends that do not count it, such as the CPU.
    """
    counted = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats[_PEAK] for stats in counted if _PEAK in stats]
    return {"device/peak_gib": max(peaks) / 2**30} if peaks else {}


class MetricsLog:
    """metrics.jsonl, one JSON object a line, and TensorBoard files next to it.

    A run that resumes at `step` drops the lines of later steps, which it repeats. It
    also drops a last line that a crash truncated.

    Args:
      folder: the run folder; None writes nothing.
      step: the step at which the run starts or resumes.
      tensorboard: whether to write TensorBoard files.

    Raises:
      ValueError: file and number of a line that is not a line of metrics.
    """

    def __init__(self, folder: Path | None, *, step: int = 0, tensorboard: bool = True):
        self._file = self._writer = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        if path.exists():
            _drop_later_steps(path, step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            from tensorboardX import SummaryWriter

            # TensorBoard purges from this step on, itself included.
            purge = step + 1 if step else 0
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Write one line; TensorBoard gets the numbers."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if self._writer is not None and isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._writer is not None:
            self._writer.close()


def _drop_later_steps(path: Path, step: int) -> None:
    """Keep the lines up to `step`; at step 0 keep none."""
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            line_step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number} is not a line of metrics; remove the line or the file"
            ) from error
        if step and line_step <= step:
            kept.append(line)
    # Write a second file first, so that a crash here does not lose the history.
    new = path.with_suffix(".jsonl.new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)
