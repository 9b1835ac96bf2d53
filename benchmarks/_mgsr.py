"""This project's side: checkpoints, rows, and a step as the trainer's loop makes it."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.models import LanguageModel
from mgsr_jax.objective import Objective
from mgsr_jax.rollout import RolloutConfig, make_rollout
from mgsr_jax.rows import Rows, from_lists
from mgsr_jax.train_step import init_state, make_train_step
from mgsr_jax.training.optimizer import OptimizerConfig, make_optimizer
from mgsr_jax.training.row_source import BatchLayout, RowSource, StepRows
from mgsr_jax.typing import Params

FORWARD_KL = Objective(sft=0.0, token=1.0, span=0.0, divergence="forward_kl")
STEPS = 1_000_000  # no benchmark comes to the end of a schedule


class Pair(NamedTuple):
    """Two models and their weights."""

    student: LanguageModel
    teacher: LanguageModel
    student_params: Params
    teacher_params: Params


def load(folder: Path) -> tuple[LanguageModel, Params]:
    """A checkpoint that the peer wrote."""
    model = models.from_config(folder)
    return model, hf.load_params(folder, model, mesh=sharding.make_mesh())


def load_pair(folder: Path) -> Pair:
    """Student and teacher."""
    student, student_params = load(folder / "student")
    teacher, teacher_params = load(folder / "teacher")
    return Pair(student, teacher, student_params, teacher_params)


def prompt_rows(prompts: np.ndarray, *, width: int) -> Rows:
    """Host rows to be written on."""
    empty = [[] for _ in prompts]
    return from_lists(prompts.tolist(), empty, width=width, ground_truth=False)


def constant_rate(learning_rate: float) -> OptimizerConfig:
    """AdamW as the peers have it: no schedule."""
    return OptimizerConfig(learning_rate, final_learning_rate=learning_rate)


class Training:
    """A run's state, and one turn of the trainer's loop after the other.

    Args:
      pair: the models.
      batches: host rows of `batch_size`, without end.
      rollouts: by a name of our own, where a step's rows may come from.
      eos_ids: tokens that end a row; none for rows of full length.
      add_spans: marks phrases in generated host rows.
    """

    def __init__(
        self,
        pair: Pair,
        batches: Iterator[Rows],
        rollouts: Mapping[str, RolloutConfig],
        *,
        batch_size: int,
        micro_batches: int,
        prompt_width: int,
        width: int,
        objective: Objective = FORWARD_KL,
        params: Params | None = None,
        eos_ids: tuple[int, ...] = (),
        add_spans: Callable[[Rows], Rows] = lambda rows: rows,
    ):
        optimizer = make_optimizer(constant_rate(1e-6), STEPS)
        two = (pair.student, pair.teacher)
        self._train_step = make_train_step(*two, optimizer, objective)
        self._teacher_params = pair.teacher_params
        mesh = sharding.make_mesh()
        self._mesh, self._step = mesh, 0
        self._state = jax.jit(
            lambda params: init_state(params, optimizer, seed=0),
            out_shardings=sharding.replicated(mesh),
        )({"student": pair.student_params} | (params or {}))
        self._sources = {
            name: RowSource(
                batches,
                config,
                make_rollout(*two, config, eos_ids=eos_ids, prefill_width=prompt_width),
                add_spans,
                layout=BatchLayout(mesh, batch_size, micro_batches, [width]),
                steps=STEPS,
                keep_ground_truth=objective.sft > 0,
            )
            for name, config in rollouts.items()
        }

    def step(self, name: str) -> tuple[StepRows, float]:
        """Rows by the rollout `name`, then the update; the loss is there at the end."""
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
