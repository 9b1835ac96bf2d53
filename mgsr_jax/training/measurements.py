"""Measurements of a run: on its first batch, in validations and evaluations."""

import math
from collections.abc import Iterable, Sequence

from jaxtyping import PyTree
from rich.console import Console

from mgsr_jax.data.prompts import Prompt
from mgsr_jax.rows import Rows
from mgsr_jax.train_step import Diverged
from mgsr_jax.training.first_batch import compare_first_batch, describe
from mgsr_jax.training.inputs import RunInputs
from mgsr_jax.training.metrics import Means
from mgsr_jax.training.periodic_evaluation import evaluation_scores
from mgsr_jax.training.programs import Programs
from mgsr_jax.training.run_rows import first_micro_batches, validation_batches
from mgsr_jax.typing import STUDENT, Params

VALID = "valid/"
"""The beginning of the names of validation metrics."""


class Measurements:
    """Measures the models of a run, and prints what it finds.

    Args:
      inputs: of the run; its mesh is the current one.
      programs: of the run.
      prompts: from `load_evaluation`.
      console: where results are printed.
    """

    def __init__(
        self,
        inputs: RunInputs,
        programs: Programs,
        prompts: Sequence[Prompt],
        console: Console,
    ):
        self._inputs, self._config = inputs, inputs.config
        self._programs, self._prompts, self._console = programs, prompts, console

    def first_batch(
        self,
        params: Params,
        teacher_params: PyTree,
        samples: Iterable[Rows] | None = None,
    ) -> dict[str, float]:
        """How teacher and student read the first batch's references, by metric name.

        Where the data holds prompts only there is nothing to read, until step 1 has
        generated `samples`.
        """
        inputs, comparison = self._inputs, self._programs.comparison
        batches = first_micro_batches(inputs) if samples is None else samples
        values = compare_first_batch(comparison, params, teacher_params, batches)
        for line in describe(values, inputs.vocab_size, sampled=samples is not None):
            style = "yellow" if line.startswith("warning") else None
            self._console.print(line, style=style, soft_wrap=True)
        return {f"start/{name}": value for name, value in values.items()}

    def after(
        self, step: int, params: Params, teacher_params: PyTree
    ) -> dict[str, float]:
        """Validate and evaluate if it is due after `step`; the metrics by name.

        Both are due at the start, after the last step, and every so many steps.

        Raises:
          Diverged: the validation loss is not finite.
        """
        config, measured = self._config, dict[str, float]()
        validates, ends = self._inputs.valid is not None, (0, self._inputs.steps)
        if validates and (step in ends or due(step, config.validate_every)):
            measured |= self._validate(step, params, teacher_params)
        if self._prompts and (step in ends or due(step, config.evaluate_every)):
            measured |= self._evaluate(step, params)
        return measured

    def _validate(
        self, step: int, params: Params, teacher_params: PyTree
    ) -> dict[str, float]:
        """Means over the validation data."""
        means = Means()
        models = params, teacher_params
        for batch in validation_batches(self._inputs):
            means.add(self._programs.validation_step(*models, *batch))
        values = means.take()
        loss = values["loss"] = values["sft"]
        if not math.isfinite(loss):
            raise Diverged(f"step {step}: the validation loss is {loss}")
        teacher = values.get("teacher_sft")
        of_teacher = "" if teacher is None else f" (teacher {teacher:.4f})"
        self._console.print(
            f"step {step}: validation loss {loss:.4f}{of_teacher} nats per token"
        )
        return {f"{VALID}{name}": value for name, value in values.items()}

    def _evaluate(self, step: int, params: Params) -> dict[str, float]:
        """Scores of the student's greedy responses."""
        values = evaluation_scores(self._inputs, self._prompts, params[STUDENT])
        scores = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._console.print(
            f"step {step}: {scores} on {len(self._prompts)} prompts", soft_wrap=True
        )
        return {f"eval/{name}": value for name, value in values.items()}


def due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps follows `step`; 0: never."""
    return every > 0 and step % every == 0
