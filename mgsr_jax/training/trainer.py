"""One run, act by act: check, load, resume, step, validate, save, export."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from jax.experimental import multihost_utils
from rich.console import Console

from mgsr_jax import sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint import state as checkpoint_state
from mgsr_jax.data.batches import eval_batches, train_batches
from mgsr_jax.losses import Sum, masked_sum
from mgsr_jax.models import lora
from mgsr_jax.objective import DIVERGENCES
from mgsr_jax.rows import Rows
from mgsr_jax.scrg import ScrgInfo
from mgsr_jax.train_step import Diverged, Metrics, TrainState
from mgsr_jax.training import distributed
from mgsr_jax.training.agreement import check_equal, check_shared, together
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.initial_state import load_state, load_teacher
from mgsr_jax.training.inputs import CONFIG_FILE, Setup, common_parts, prepare
from mgsr_jax.training.metrics import Means, MetricsLog, StepProgress, peak_memory
from mgsr_jax.training.optimizer import learning_rate_schedule
from mgsr_jax.training.programs import make_programs
from mgsr_jax.training.row_source import RowSource, StepRows, host_share, with_spans
from mgsr_jax.training.run_folder import STUDENT_FOLDER
from mgsr_jax.typing import STUDENT

CHECKPOINTS = "checkpoints"
REJECTED = "rejected.txt"


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
      output: the run folder.
      student: the exported checkpoint, a Hugging Face folder.
      step: steps made in all.
      validation: the last validation's means.
      finished: False where the run was stopped by a signal; it can be resumed.
    """

    output: Path
    student: Path
    step: int
    validation: dict[str, float]
    finished: bool


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Runs `config` to its end and exports the student.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a mistake in the settings, the
        data or a checkpoint folder, before anything is written.
      Diverged: a loss that is not finite; the last checkpoint is left as it is.
    """
    console = console or Console(stderr=True, quiet=not distributed.is_lead())
    setup = together(lambda: prepare(config, console=console))
    if jax.process_count() > 1:
        check_equal(common_parts(setup))
    check_shared(Path(config.output))
    with jax.set_mesh(setup.mesh):
        return _Run(setup, console).to_the_end()


class _Run:
    """The state of one run and its loop."""

    def __init__(self, setup: Setup, console: Console):
        config = setup.config
        self.setup, self.config, self.console = setup, config, console
        self.output = Path(config.output)
        # Not the state's, which is the same: the host need not wait for the device.
        self.key = jax.random.key(config.seed)
        if setup.teacher is not None and not config.runs_teacher:
            console.print(
                "the teacher is not loaded: every step reads the teacher cache, and "
                "validation measures the student's cross-entropy alone"
            )
        self.programs = make_programs(
            config,
            setup.student,
            setup.teacher,
            mesh=setup.mesh,
            vocab_size=setup.vocab_size,
            eos_ids=setup.eos_ids,
            steps=setup.steps,
            teacher_validates=config.runs_teacher,
        )
        self.learning_rate = learning_rate_schedule(config.optimizer, setup.steps)
        self.source = RowSource(
            _batches(setup),
            config.rollout,
            self.programs.rollout,
            self._add_spans,
            mesh=setup.mesh,
            batch_size=config.batch_size,
            widths=config.data.widths,
            micro_batches=config.micro_batches,
            steps=setup.steps,
            keep_ground_truth=config.objective.sft > 0,
            lookup=setup.teacher_cache.lookup if setup.teacher_cache else None,
        )

    def to_the_end(self) -> TrainResult:
        """Loads, trains, exports. Nothing is written before the weights are read."""
        setup, optimizer = self.setup, self.programs.optimizer
        self.state = together(lambda: load_state(setup, optimizer))
        self.teacher_params = None
        if self.config.runs_teacher:
            self.teacher_params = together(lambda: load_teacher(setup))
        with checkpoint_state.open_manager(
            self.output / CHECKPOINTS, keep=self.config.keep_checkpoints
        ) as self.manager:
            if self.config.resume:
                self.state = self._restored()
            start = int(self.state.step)
            self._write_config()
            with self._open_log(start) as log, stop_signals() as stopped:
                validation = self._loop(start, log, stopped)
        step = int(self.state.step)
        student = self.output / STUDENT_FOLDER
        if step == self.setup.steps:
            self._export(student)
        else:
            self.console.print(f"stopped after step {step}; go on with --resume true")
        return TrainResult(
            output=self.output,
            student=student,
            step=step,
            validation=validation,
            finished=step == self.setup.steps,
        )

    def _open_log(self, step: int) -> MetricsLog:
        # What is written on other hosts, which know the same, nobody reads.
        folder = self.output if distributed.is_lead() else None
        return MetricsLog(folder, step=step, tensorboard=self.config.tensorboard)

    def _loop(self, start: int, log: MetricsLog, stopped: Any) -> dict[str, float]:
        steps, config = self.setup.steps, self.config
        means, began, pending = Means(), time.monotonic(), None
        validation = self._validate(log) if start == 0 else {}
        title = "SFT" if self.setup.teacher is None else "distilling"
        with StepProgress(
            self.console, start=start, steps=steps, title=title
        ) as progress:
            for step in range(start, steps):
                rows = self.source.next(
                    step,
                    jax.random.fold_in(self.key, step),
                    self.state.all_params[STUDENT],
                    self.teacher_params,
                )
                self.state, metrics = self.programs.train_step(
                    self.state, self.teacher_params, rows.micro_batches, rows.cached
                )
                done = step + 1
                # A step's metrics are fetched when the next one is on its way, so that
                # the device does not wait for the host.
                self._settle(pending, means)
                pending = (done, step_metrics(metrics, rows))
                progress.advance(done)
                ends = stopped(done) or done == steps
                if ends or self._pauses(done):
                    self._settle(pending, means)
                    pending = None
                if ends or _due(done, config.log_every):
                    values = self._values(means, done, time.monotonic() - began)
                    began = time.monotonic()
                    log.write(done, values)
                    progress.show(done, values)
                paused = time.monotonic()
                if done == steps or _due(done, config.validate_every):
                    validation = self._validate(log) or validation
                if ends or _due(done, config.save_every):
                    self._save()
                began += time.monotonic() - paused  # not the training's time
                if ends:
                    break
        return validation

    def _restored(self) -> TrainState:
        """The latest checkpoint's state; the row source goes on from there too."""
        step = self.manager.latest_step()
        if step is None:
            self.console.print(f"no checkpoint in {self.output}; starting at step 0")
            return self.state
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=leaf.sharding
            ),
            self.state.checkpointed,
        )
        state, host, replay = checkpoint_state.restore(
            self.manager, step, state=like, replay=self.source.replay_rows
        )
        if host.get("data_fingerprint") != self.setup.train_fingerprint:
            raise ValueError(
                f"resume: the rows of {self.config.data.train} are not those that "
                f"checkpoint {step} of {self.output} was made from; a resumed run must "
                "see the same ones"
            )
        if host.get("student_digest") != self.setup.student_digest:
            raise ValueError(
                f"resume: the student at {self.config.student} is not the one that the "
                f"adapters of checkpoint {step} of {self.output} were trained on; put "
                "it back"
            )
        self.source.restore(host, replay)
        self.console.print(f"resumed from step {step}")
        return dataclasses.replace(self.state, **state)

    def _save(self) -> None:
        checkpoint_state.save(
            self.manager,
            int(self.state.step),
            state=self.state.checkpointed,
            host=self.source.host_state()
            | {
                "data_fingerprint": self.setup.train_fingerprint,
                "student_digest": self.setup.student_digest,
            },
            replay=self.source.replay_rows,
        )

    def _validate(self, log: MetricsLog) -> dict[str, float]:
        """Means over the validation data; the replay policy hears of the loss."""
        if self.setup.valid is None:
            return {}
        means, config = Means(), self.config
        for rows in eval_batches(
            self.setup.valid,
            config.batch_size // config.micro_batches,
            widths=config.data.widths,
            share=sharding.host_rows(
                self.setup.mesh, config.batch_size // config.micro_batches
            ),
        ):
            means.add(
                self.programs.validation_step(
                    self.state.all_params,
                    self.teacher_params,
                    sharding.put_batch(self.setup.mesh, rows),
                )
            )
        values = means.take()
        values["loss"] = values["sft"]
        if not math.isfinite(values["loss"]):
            raise Diverged(
                f"step {int(self.state.step)}: the validation loss is {values['loss']}"
            )
        self.source.validated(values["loss"])
        step = int(self.state.step)
        log.write(step, {f"valid/{name}": value for name, value in values.items()})
        teacher = values.get("teacher_sft")
        beside = "" if teacher is None else f" (teacher {teacher:.4f})"
        self.console.print(
            f"step {step}: validation loss {values['loss']:.4f}{beside} nats a token"
        )
        return values

    def _values(self, means: Means, step: int, seconds: float) -> dict[str, float]:
        scored = max(means.count(f"train/{name}") for name in _SCORED)
        values = means.take()
        del values["train/finite"]
        lower = values.get("train/lower")
        learned = self.config.objective.needs_clip_network
        if learned and lower is not None and not 0.002 <= lower <= 0.45:
            self.console.print(
                f"[yellow]step {step}: DAC-KL's lower limit ran to {lower:.4f}; the "
                "clip network no longer chooses (objective.prior_weight holds it)"
            )
        own = {
            "train/tokens_per_second": scored / seconds,
            "train/learning_rate": float(jnp.asarray(self.learning_rate(step - 1))),
        }
        return values | own | peak_memory()

    def _pauses(self, step: int) -> bool:
        config = self.config
        every = (config.log_every, config.validate_every, config.save_every)
        return any(_due(step, n) for n in every)

    def _settle(self, pending: tuple[int, Any] | None, means: Means) -> None:
        """Waits for a step's metrics and adds them; stops where they are not finite."""
        if pending is None:
            return
        step, metrics = pending
        metrics = jax.device_get(metrics)
        means.add(metrics)
        if metrics["train/finite"].total:
            return
        kept = self.manager.latest_step()
        raise Diverged(
            f"step {step}: the loss or its gradient is not finite; the update was not "
            f"made. Last checkpoint: {'none' if kept is None else f'step {kept}'}. Try "
            "a lower optimizer.learning_rate or look at this step's data"
        )

    def _add_spans(self, rows: Rows) -> Rows:
        if not self.config.objective.span:
            return rows
        spec = self.config.data
        return with_spans(
            rows,
            self.setup.tokenizer,
            self.setup.chunker,
            spacy_model=spec.spacy_model,
        )

    def _export(self, target: Path) -> None:
        hf.save_pretrained(
            target,
            self.setup.student,
            lora.merged(self.state.all_params[STUDENT], self.config.lora),
            tokenizer_from=self.config.student,
            overwrite=True,
        )
        self.console.print(f"student: {target}")

    def _write_config(self) -> None:
        if not distributed.is_lead():
            return
        text = yaml.safe_dump(dataclasses.asdict(self.config), sort_keys=False)
        # Whole or not at all: a run cannot be resumed without it.
        unfinished = self.output / f".{CONFIG_FILE}"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(self.output / CONFIG_FILE)
        if lines := self.setup.rejected:
            path = self.output / REJECTED
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            self.console.print(f"records not used as they stand: {path}")


_SCORED = ("sft", *DIVERGENCES)


def step_metrics(metrics: Metrics, rows: StepRows) -> Metrics:
    """The step's own, how often the student wrote the rows, what SCRG corrected."""
    named = {f"train/{name}": value for name, value in metrics.items()}
    named["rollout/student_share"] = Sum(float(rows.source != "data"), 1.0)
    if rows.corrections:
        infos = [jnp.concatenate(part) for part in zip(*rows.corrections, strict=True)]
        info = ScrgInfo(*infos)
        count = jnp.float32(info.corrected.size)
        named["rollout/corrected"] = Sum(jnp.sum(info.corrected), count)
        for name in ("error_position", "kl"):
            value = getattr(info, name).astype(jnp.float32)
            named[f"rollout/{name}"] = masked_sum(value, info.corrected)
    return named


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """SIGTERM or the first Ctrl-C ends the run after the step at hand, saved.

    Of several processes one SIGTERM, to any of them, ends all after the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    caught: list[int] = []

    def remember(number: int, frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    try:
        old = {s: signal.signal(s, remember) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # only the main thread may listen
        old = {}
    try:
        yield lambda step: bool(caught)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _batches(setup: Setup) -> Any:
    config = setup.config
    return train_batches(
        setup.train,
        config.batch_size,
        widths=config.data.widths,
        seed=config.seed,
        share=host_share(setup.mesh, config.batch_size, config.micro_batches),
    )
