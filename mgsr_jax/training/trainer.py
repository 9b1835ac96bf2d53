"""One run: check, load, resume, then step, measure and save; export at the end."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from rich.console import Console

from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint.response_format import save_format
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.divergences import DIVERGENCES
from mgsr_jax.models import lora
from mgsr_jax.train_step import Diverged, Metrics, TrainState
from mgsr_jax.training.checkpoints import CheckpointInputs, open_checkpoints
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.description import describe_run
from mgsr_jax.training.distributed import (
    check_equal,
    check_shared,
    is_lead,
    on_all_processes,
)
from mgsr_jax.training.initial_state import load_state, load_teachers
from mgsr_jax.training.inputs import RunInputs, common_parts, prepare
from mgsr_jax.training.measurements import VALID, Measurements, due
from mgsr_jax.training.metrics import Means, MetricsLog, peak_memory, step_metrics
from mgsr_jax.training.optimizer import learning_rate_schedule
from mgsr_jax.training.periodic_evaluation import load_evaluation
from mgsr_jax.training.profile import StepTrace
from mgsr_jax.training.programs import make_programs
from mgsr_jax.training.progress import StepProgress, limit_warning
from mgsr_jax.training.run_folder import (
    CHECKPOINTS,
    RESPONSE_FORMAT_FILE,
    STUDENT_FOLDER,
    write_rejected,
    write_run_config,
)
from mgsr_jax.training.run_models import with_local_models
from mgsr_jax.training.run_rows import make_row_source
from mgsr_jax.training.signals import stop_signals
from mgsr_jax.training.teacher_config import different_folders
from mgsr_jax.typing import STUDENT


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
      output: the run folder.
      student: the exported checkpoint, a Hugging Face folder.
      step: total steps made.
      validation: means of the last validation.
      finished: False if a signal stopped the run; it can be resumed.
    """

    output: Path
    student: Path
    step: int
    validation: dict[str, float]
    finished: bool


def train(config: TrainConfig, *, console: Console | None = None) -> TrainResult:
    """Run `config` to its end and export the student.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a mistake in the settings, the
        data or a checkpoint folder; nothing has been written.
      Diverged: the loss is not finite; the last checkpoint is kept.
    """
    console = console or Console(stderr=True, quiet=not is_lead())
    on_all_processes(config.check)  # before a long download
    config = with_local_models(config)
    inputs = on_all_processes(lambda: prepare(config, console=console))
    if jax.process_count() > 1:
        check_equal(common_parts(inputs))
    config.profile.check_start(inputs.steps)
    prompts = on_all_processes(lambda: load_evaluation(inputs, console=console))
    check_shared(Path(config.output))
    with jax.set_mesh(inputs.mesh):
        return _Run(inputs, prompts, console).run()


class _Run:
    """The state of one run and its loop."""

    def __init__(self, inputs: RunInputs, prompts: Sequence[Prompt], console: Console):
        config = inputs.config
        self.inputs, self.config, self.console = inputs, config, console
        self.output = Path(config.output)
        # The state holds the same key; this copy saves waiting for the device.
        self.key = jax.random.key(config.seed)
        if inputs.teacher is not None and not config.runs_teacher:
            console.print(
                "the teacher is not loaded: every step reads the teacher cache, and "
                "validation measures only the student's cross-entropy"
            )
        self.programs = make_programs(
            config,
            inputs.student,
            inputs.teacher,
            mesh=inputs.mesh,
            vocab_size=inputs.vocab_size,
            eos_ids=inputs.eos_ids,
            steps=inputs.steps,
            teacher_validates=config.runs_teacher,
        )
        self.measurements = Measurements(inputs, self.programs, prompts, console)
        self.learning_rate = learning_rate_schedule(config.optimizer, inputs.steps)
        self.source = make_row_source(inputs, self.programs.rollout)
        self.means = Means()
        self.validation: dict[str, float] = {}
        self.pending: tuple[int, Metrics] | None = None
        self.compares_samples = False

    def run(self) -> TrainResult:
        """Load, train and export. Nothing is written before the weights are loaded."""
        inputs = self.inputs
        for line in describe_run(self.config, steps=inputs.steps):
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        self.state = on_all_processes(self._load_state)
        self.teacher_params = on_all_processes(self._load_teacher)
        with open_checkpoints(
            self.output / CHECKPOINTS,
            keep=self.config.keep_checkpoints,
            inputs=_checkpoint_inputs(inputs),
            best_metric=self.config.best_metric,
        ) as self.checkpoints:
            if self.config.resume:
                self.state = self._restored()
            start = int(self.state.step)
            self._write_settings()
            # Only the lead process writes logs; all processes hold the same metrics.
            folder = self.output if is_lead() else None
            tensorboard = self.config.tensorboard
            with (
                MetricsLog(folder, step=start, tensorboard=tensorboard) as self.log,
                stop_signals() as stop_requested,
            ):
                self._loop(start, stop_requested)
        step = int(self.state.step)
        student = self.output / STUDENT_FOLDER
        finished = step == inputs.steps
        if finished:
            self._export(student)
        else:
            self.console.print(f"stopped after step {step}; resume with --resume true")
        return TrainResult(self.output, student, step, self.validation, finished)

    def _load_state(self) -> TrainState:
        config, student, mesh = self.config, self.inputs.student, self.inputs.mesh
        dtype, seed = jnp.dtype(config.dtype), config.seed
        folder, programs = config.student, self.programs
        return load_state(folder, student, programs, mesh=mesh, dtype=dtype, seed=seed)

    def _load_teacher(self) -> PyTree:
        config, teacher, mesh = self.config, self.inputs.teacher, self.inputs.mesh
        if teacher is None or not config.runs_teacher:
            return None
        folders, _ = different_folders(config.teacher)
        return load_teachers(folders, teacher, mesh=mesh, dtype=config.teacher_dtype)

    def _restored(self) -> TrainState:
        step = self.checkpoints.latest_step
        if step is None:
            self.console.print(f"no checkpoint in {self.output}; starting at step 0")
            return self.state
        state = self.checkpoints.restore(step, self.state, self.source)
        self.console.print(f"resumed from step {step}")
        return state

    def _loop(self, start: int, stop_requested: Callable[[int], bool]) -> None:
        """Make the steps after `start`."""
        steps, config = self.inputs.steps, self.config
        if start == 0:
            models = self.state.all_params, self.teacher_params
            compared = self.measurements.first_batch(*models)
            self._log(0, compared)
            self.compares_samples = not compared
        timer = time.monotonic()
        if start == 0:
            self._measure(0)
        trace = StepTrace(config.profile, self.output)
        title = "SFT" if self.inputs.teacher is None else "distilling"
        with StepProgress(
            self.console, start=start, steps=steps, title=title
        ) as progress:
            for step in range(start + 1, steps + 1):
                trace.before(step)
                self._make_step(step)
                progress.advance(step)
                last = stop_requested(step) or step == steps
                if trace.after(step, self.state, last=last):
                    self.console.print(f"trace: {trace.folder}")
                if last or self._pauses(step):
                    self._settle()
                if last or due(step, config.log_every):
                    values = self._take_values(step, time.monotonic() - timer)
                    timer = time.monotonic()
                    self.log.write(step, values)
                    progress.show(step, values)
                paused = time.monotonic()
                measured = self._measure(step)
                ranked = config.best_metric in measured
                if last or ranked or due(step, config.save_every):
                    self.checkpoints.save(self.state, self.source, measured)
                timer += time.monotonic() - paused  # exclude it from training time
                if last:
                    break

    def _make_step(self, step: int) -> None:
        """Start the `step`-th update; keys and rows count steps from 0."""
        rows = self.source.next(
            step - 1,
            jax.random.fold_in(self.key, step - 1),
            self.state.all_params[STUDENT],
            self.teacher_params,
        )
        if self.compares_samples:  # of step 1, before its update
            models = self.state.all_params, self.teacher_params
            samples = rows.micro_batches
            self._log(0, self.measurements.first_batch(*models, samples))
            self.compares_samples = False
        self.state, metrics = self.programs.train_step(
            self.state, self.teacher_params, rows.micro_batches, rows.teacher_outputs
        )
        # Fetch a step's metrics once the next step has started, so that the device
        # does not wait for the host.
        self._settle()
        needs_teacher = self.config.objective.needs_teacher
        named = step_metrics(metrics, rows, needs_teacher=needs_teacher)
        self.pending = (step, named)

    def _settle(self) -> None:
        """Wait for the pending metrics and add them; stop if they are not finite."""
        if self.pending is None:
            return
        step, pending = self.pending
        self.pending, metrics = None, jax.device_get(pending)
        self.means.add(metrics)
        if metrics["train/finite"].total:
            return
        kept = self.checkpoints.latest_step
        raise Diverged(
            f"step {step}: the loss or its gradient is not finite; the update was not "
            f"made. Last checkpoint: {'none' if kept is None else f'step {kept}'}. Try "
            "a lower optimizer.learning_rate or look at this step's data"
        )

    def _take_values(self, step: int, seconds: float) -> dict[str, float]:
        """Mean metrics since the last call, speed, learning rate and memory."""
        tokens = max(self.means.count(f"train/{name}") for name in _SCORED)
        values = self.means.take()
        del values["train/finite"]
        learned = self.config.objective.needs_clip_network
        if learned and (warning := limit_warning(values)):
            self.console.print(f"[yellow]step {step}: {warning}")
        own = {
            "train/tokens": tokens,
            "train/tokens_per_second": tokens / seconds,
            "train/learning_rate": float(jnp.asarray(self.learning_rate(step - 1))),
        }
        return values | own | peak_memory()

    def _measure(self, step: int) -> dict[str, float]:
        """Metrics of the validation and evaluation that are due, by name.

        The replay policy gets the validation loss.
        """
        models = self.state.all_params, self.teacher_params
        measured = self.measurements.after(step, *models)
        self._log(step, measured)
        if f"{VALID}loss" in measured:
            names = [name for name in measured if name.startswith(VALID)]
            values = {name.removeprefix(VALID): measured[name] for name in names}
            self.validation = values
            self.source.validated(values["loss"])
        return measured

    def _log(self, step: int, values: dict[str, float]) -> None:
        if values:
            self.log.write(step, values)

    def _pauses(self, step: int) -> bool:
        """Whether logging, validation, evaluation or saving follows `step`."""
        config = self.config
        every = (
            config.log_every,
            config.validate_every,
            config.evaluate_every,
            config.save_every,
        )
        return any(due(step, n) for n in every)

    def _export(self, target: Path) -> None:
        hf.save_pretrained(
            target,
            self.inputs.student,
            lora.merged(self.state.all_params[STUDENT], self.config.lora),
            tokenizer_from=self.config.student,
            response_format=self.inputs.response_format,
            overwrite=True,
        )
        self.console.print(f"student: {target}")

    def _write_settings(self) -> None:
        if not is_lead():
            return
        write_run_config(self.output, dataclasses.asdict(self.config))
        save_format(self.output / RESPONSE_FORMAT_FILE, self.inputs.response_format)
        if self.inputs.rejected:
            path = write_rejected(self.output, self.inputs.rejected)
            self.console.print(f"records that are not used unchanged: {path}")


_SCORED = ("sft", *DIVERGENCES)


def _checkpoint_inputs(inputs: RunInputs) -> CheckpointInputs:
    return CheckpointInputs(
        data=", ".join(s.path for s in inputs.config.data.train_sources),
        data_fingerprint=inputs.train_fingerprint,
        student=inputs.config.student,
        student_digest=inputs.student_digest,
    )
