"""The jitted programs of a run: `mgsr train` runs them, `mgsr plan` compiles them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import PyTree

from mgsr_jax import sharding
from mgsr_jax.losses import default_chunk_size, init_clip_network
from mgsr_jax.models import LanguageModel, lora
from mgsr_jax.models.lora import LORA
from mgsr_jax.rollout import Rollout, make_rollout
from mgsr_jax.routed_teachers import RoutedTeachers
from mgsr_jax.train_step import (
    Metrics,
    TrainState,
    TrainStep,
    make_train_step,
    make_validation_step,
)
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.first_batch import Comparison, make_comparison
from mgsr_jax.training.optimizer import make_optimizer
from mgsr_jax.typing import CLIP_NETWORK, STUDENT, Params


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted programs; each is compiled at its first call or when it is lowered.

    Attributes:
      optimizer: the optimizer of the train state.
      init_trained: returns the initial values of all trained parameters except the
        student's own weights.
      train_step: result of `make_train_step`.
      validation_step: result of `make_validation_step`.
      comparison: result of `make_comparison`.
      rollout: result of `make_rollout`; None if the student never generates.
    """

    optimizer: optax.GradientTransformation
    init_trained: Callable[[], Params]
    train_step: TrainStep
    validation_step: Callable[..., Metrics]
    comparison: Comparison
    rollout: Rollout | None


class _SharedArguments(TypedDict):
    """Arguments that every program with logits takes."""

    vocab_size: int
    dtype: DTypeLike
    chunk_size: int


def make_programs(
    config: TrainConfig,
    student: LanguageModel,
    teacher: LanguageModel | RoutedTeachers[LanguageModel] | None,
    *,
    mesh: Mesh,
    vocab_size: int,
    eos_ids: tuple[int, ...],
    steps: int,
    teacher_validates: bool = True,
) -> Programs:
    """Make the programs of a run of `steps` steps.

    Args:
      config: settings.
      student, teacher: the models.
      mesh: device mesh; its platform sets the default chunk size.
      vocab_size: columns of logits at or beyond it are padding.
      eos_ids: tokens that end a response.
      steps: length of the learning rate's schedule.
      teacher_validates: whether validation and the comparison of the first batch have
        the teacher's weights.
    """
    shared = _shared_arguments(config, student, mesh, vocab_size)
    optimizer = make_optimizer(config.optimizer, steps)
    validated = config.objective
    if teacher is not None and not teacher_validates:
        validated = dataclasses.replace(validated, token=0.0, span=0.0)
    dropout = config.lora.dropout > 0
    train_step = make_train_step(
        student, teacher, optimizer, config.objective, dropout=dropout, **shared
    )
    validation_step = make_validation_step(student, teacher, validated, **shared)
    # A teacher with prompts of its own is not compared on the student's.
    compares = teacher_validates and config.data.teacher_prompt is None
    comparison = make_comparison(student, teacher if compares else None, **shared)
    rollout = _rollout(config, student, teacher, eos_ids, vocab_size)
    init = functools.partial(init_trained, config, student, steps)
    return Programs(optimizer, init, train_step, validation_step, comparison, rollout)


def _rollout(
    config: TrainConfig,
    student: LanguageModel,
    teacher: LanguageModel | RoutedTeachers[LanguageModel] | None,
    eos_ids: tuple[int, ...],
    vocab_size: int,
) -> Rollout | None:
    if teacher is None or config.rollout.policy == "off":
        return None
    routed = isinstance(teacher, RoutedTeachers)
    rollout = make_rollout(
        student,
        teacher.models[0] if routed else teacher,
        config.rollout,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        prefill_width=config.data.encoding.prompt_limit,
        dtype=jnp.dtype(config.dtype),
    )
    return _without_teacher(rollout) if routed else rollout


def _without_teacher(rollout: Rollout) -> Rollout:
    """The rollout of several teachers, none of which it runs: it has no SCRG."""

    def sample(params: Params, teacher_params: PyTree, *arguments: Any) -> Any:
        return rollout(params, teacher_params[0], *arguments)

    return jax.jit(sample)


def _shared_arguments(
    config: TrainConfig, student: LanguageModel, mesh: Mesh, vocab_size: int
) -> _SharedArguments:
    return _SharedArguments(
        vocab_size=vocab_size,
        dtype=jnp.dtype(config.dtype),
        chunk_size=tokens_per_chunk(config, student, mesh),
    )


def tokens_per_chunk(config: TrainConfig, student: LanguageModel, mesh: Mesh) -> int:
    """Tokens whose logits are in a device's memory at once."""
    columns = (student.vocab_rows or student.config.vocab_size) // student.tensor
    platform = mesh.devices.flat[0].platform
    return config.chunk_size or default_chunk_size(columns, platform)


def init_trained(config: TrainConfig, student: LanguageModel, steps: int) -> Params:
    """Initial values of all trained parameters except the student's own weights.

    These are the adapters, under the student's key, and the clip network if its limits
    are learned. Their random keys are folded from numbers that no step has.
    """
    run, params = jax.random.key(config.seed), {}
    if config.lora.rank:
        key = jax.random.fold_in(run, steps + 1)
        params[STUDENT] = {LORA: lora.init(key, student, config.lora)}
    if config.objective.needs_clip_network:
        candidates = config.objective.num_candidates
        params[CLIP_NETWORK] = init_clip_network(
            jax.random.fold_in(run, steps), num_candidates=candidates
        )
    return params


def partition_rules(student: LanguageModel, trained: Params) -> sharding.Rules:
    """Sharding rules of a student and of the parameters from `init_trained`."""
    rules = student.partition_rules
    if LORA in trained.get(STUDENT, {}):
        rules = (*lora.partition_rules(rules, trained[STUDENT][LORA]), *rules)
    if CLIP_NETWORK in trained:
        rules = ((f"{CLIP_NETWORK}/", P()), *rules)
    return rules


def state_shardings(
    mesh: Mesh, student: LanguageModel, state: TrainState
) -> PyTree[NamedSharding]:
    """The sharding of every leaf of a train state, or of its shapes.

    The optimizer's moments are sharded as their parameters are.
    """
    return sharding.shardings(mesh, partition_rules(student, state.params), state)
