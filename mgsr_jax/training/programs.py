"""The compiled programs of a run: what `mgsr train` runs and `mgsr plan` compiles."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mgsr_jax import sharding
from mgsr_jax.losses import default_chunk_size, init_clip_network
from mgsr_jax.models import LanguageModel, lora
from mgsr_jax.models.lora import LORA
from mgsr_jax.rollout import Rollout, make_rollout
from mgsr_jax.train_step import (
    Metrics,
    TrainState,
    TrainStep,
    make_train_step,
    make_validation_step,
)
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.optimizer import make_optimizer
from mgsr_jax.typing import CLIP_NETWORK, STUDENT, Params


@dataclasses.dataclass(frozen=True)
class Programs:
    """Jitted; they are compiled where they are first called, or lowered.

    Attributes:
      optimizer: of the train state.
      train_step: see `make_train_step`.
      validation_step: see `make_validation_step`.
      rollout: see `make_rollout`; None where the student never generates.
    """

    optimizer: optax.GradientTransformation
    train_step: TrainStep
    validation_step: Callable[..., Metrics]
    rollout: Rollout | None


def make_programs(
    config: TrainConfig,
    student: LanguageModel,
    teacher: LanguageModel | None,
    *,
    mesh: Mesh,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    steps: int,
    teacher_validates: bool = True,
) -> Programs:
    """The programs of `config` for a mesh of `steps` steps in all.

    `teacher_validates` says whether the teacher's weights are there at validations.
    """
    dtype, columns = jnp.dtype(config.dtype), _columns_per_device(student)
    platform = mesh.devices.flat[0].platform
    chunk_size = config.chunk_size or default_chunk_size(columns, platform)
    optimizer = make_optimizer(config.optimizer, steps)
    validated = config.objective
    if teacher is not None and not teacher_validates:
        validated = dataclasses.replace(validated, token=0.0, span=0.0)
    train_step = make_train_step(
        student,
        teacher,
        optimizer,
        config.objective,
        vocab_size=vocab_size,
        dtype=dtype,
        chunk_size=chunk_size,
        dropout=config.lora.dropout > 0,
    )
    validation_step = make_validation_step(
        student,
        teacher,
        validated,
        vocab_size=vocab_size,
        dtype=dtype,
        chunk_size=chunk_size,
    )
    rollout = _rollout(config, student, teacher, eos_ids, vocab_size)
    return Programs(optimizer, train_step, validation_step, rollout)


def _rollout(
    config: TrainConfig,
    student: LanguageModel,
    teacher: LanguageModel | None,
    eos_ids: tuple[int, ...],
    vocab_size: int,
) -> Rollout | None:
    if teacher is None or config.rollout.policy == "off":
        return None
    return make_rollout(
        student,
        teacher,
        config.rollout,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        prefill_width=config.data.max_prompt_length,
        dtype=jnp.dtype(config.dtype),
    )


def _columns_per_device(student: LanguageModel) -> int:
    return (student.vocab_rows or student.config.vocab_size) // student.tensor


def init_trained(config: TrainConfig, student: LanguageModel, steps: int) -> Params:
    """What is trained beside a student's own weights, or, with LoRA, in their place.

    The adapters under the student's name, and the clip network where limits are
    learned. Their keys are none of a step's.
    """
    run, found = jax.random.key(config.seed), {}
    if config.lora.rank:
        key = jax.random.fold_in(run, steps + 1)
        found[STUDENT] = {LORA: lora.init(key, student, config.lora)}
    if config.objective.needs_clip_network:
        candidates = config.objective.num_candidates
        found[CLIP_NETWORK] = init_clip_network(
            jax.random.fold_in(run, steps), num_candidates=candidates
        )
    return found


def partition_rules(student: LanguageModel, trained: Params) -> sharding.Rules:
    """Rows for a student, and for what `init_trained` gave."""
    rules = student.partition_rules
    if LORA in trained.get(STUDENT, {}):
        rules = (*lora.partition_rules(rules, trained[STUDENT][LORA]), *rules)
    if CLIP_NETWORK in trained:
        rules = ((f"{CLIP_NETWORK}/", P()), *rules)
    return rules


def state_shardings(mesh: Mesh, student: LanguageModel, state: TrainState) -> Any:
    """Where every leaf of a train state, or of its shapes, lives.

    Moments lie as their parameters do.
    """
    return sharding.shardings(mesh, partition_rules(student, state.params), state)
