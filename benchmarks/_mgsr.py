"""This project's side: checkpoints, rows, and steps as in the trainer's loop."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from _sizes import Batch

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.models import LanguageModel
from mgsr_jax.objective import Objective
from mgsr_jax.rollout import make_rollout
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import Rows, from_lists
from mgsr_jax.train_step import init_state, make_train_step
from mgsr_jax.training.optimizer import OptimizerConfig, make_optimizer
from mgsr_jax.training.row_source import BatchLayout, RowSource, StepRows
from mgsr_jax.typing import Params

FORWARD_KL = Objective(sft=0.0, token=1.0, span=0.0, divergence="forward_kl")
STEPS = 1_000_000  # no benchmark reaches the end of a schedule


class Pair(NamedTuple):
    """A student and a teacher with their weights."""

    student: LanguageModel
    teacher: LanguageModel
    student_params: Params
    teacher_params: Params


def load(folder: Path) -> tuple[LanguageModel, Params]:
    """Model and weights of a checkpoint that the other side saved."""
    model = models.from_config(folder)
    return model, hf.load_params(folder, model, mesh=sharding.make_mesh())


def load_pair(folder: Path) -> Pair:
    """Student and teacher that the other side saved."""
    student, student_params = load(folder / "student")
    teacher, teacher_params = load(folder / "teacher")
    return Pair(student, teacher, student_params, teacher_params)


def prompt_rows(prompts: np.ndarray, *, width: int) -> Rows:
    """Host rows with prompts and no responses yet."""
    empty = [[] for _ in prompts]
    return from_lists(prompts.tolist(), empty, width=width, ground_truth=False)


def constant_rate(learning_rate: float) -> OptimizerConfig:
    """AdamW without a schedule, as on the other side."""
    return OptimizerConfig(learning_rate, final_learning_rate=learning_rate)


class Training:
    """The state of a run; `step` makes one turn of the trainer's loop.

    Args:
      pair: the models.
      batches: endless iterator of host rows, `batch.size` at a time.
      rollouts: rollout settings by a name; `step` chooses one.
      batch: sizes of a step.
      params: trained parameters besides the student's.
      eos_ids: tokens that end a row; none for rows of full length.
      add_spans: marks the phrases of generated host rows.
    """

    def __init__(
        self,
        pair: Pair,
        batches: Iterator[Rows],
        rollouts: Mapping[str, RolloutConfig],
        batch: Batch,
        *,
        objective: Objective = FORWARD_KL,
        params: Params | None = None,
        eos_ids: tuple[int, ...] = (),
        add_spans: Callable[[Rows], Rows] = lambda rows: rows,
    ):
        optimizer = make_optimizer(constant_rate(1e-6), STEPS)
        both = (pair.student, pair.teacher)
        self._train_step = make_train_step(*both, optimizer, objective)
        self._teacher_params = pair.teacher_params
        self._mesh, self._step = sharding.make_mesh(), 0
        self._state = jax.jit(
            lambda params: init_state(params, optimizer, seed=0),
            out_shardings=sharding.replicated(self._mesh),
        )({"student": pair.student_params} | (params or {}))
        layout = BatchLayout(self._mesh, batch.size, batch.parts, [batch.width])
        prefill = batch.prompt
        self._sources = {
            name: RowSource(
                batches,
                config,
                make_rollout(*both, config, eos_ids=eos_ids, prefill_width=prefill),
                add_spans,
                layout=layout,
                steps=STEPS,
                keep_ground_truth=objective.needs_data,
            )
            for name, config in rollouts.items()
        }

    def step(self, name: str) -> tuple[StepRows, float]:
        """Make rows with the rollout `name`, update, wait, and return rows and loss."""
        with jax.set_mesh(self._mesh):
            rows = self._sources[name].next(
                self._step,
                jax.random.fold_in(self._state.key, self._step),
                self._state.params["student"],
                self._teacher_params,
            )
            self._state, metrics = self._train_step(
                self._state,
                self._teacher_params,
                rows.micro_batches,
                rows.teacher_outputs,
            )
        jax.block_until_ready(self._state)
        self._step += 1
        return rows, float(metrics["loss"].total)
