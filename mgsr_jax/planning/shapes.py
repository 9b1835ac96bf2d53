"""Shapes and shardings of a run's arrays; nothing is allocated."""

import functools
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from mgsr_jax import sharding
from mgsr_jax.data.teacher_manifest import MANIFEST, Origin, Recipe, read_manifest
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.models import LanguageModel, quantized
from mgsr_jax.planning.compiled import with_shardings
from mgsr_jax.routed_teachers import RoutedTeachers
from mgsr_jax.rows import Rows
from mgsr_jax.train_step import TrainState, init_state
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.programs import init_trained, state_shardings
from mgsr_jax.typing import STUDENT, Leaf, Params

Tree = TypeVar("Tree")


def cast(shapes: Tree, dtype: DTypeLike) -> Tree:
    """The same shapes with another dtype."""
    return jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), shapes)


def state_shapes(
    config: TrainConfig,
    student: LanguageModel,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    steps: int,
) -> TrainState:
    """The train state at step 0."""
    weights, frozen = student.abstract_params(), {}
    params = jax.eval_shape(lambda: init_trained(config, student, steps))
    if config.lora.rank:
        frozen = {STUDENT: cast(weights, config.dtype)}
    else:
        params[STUDENT] = weights
    init = functools.partial(init_state, optimizer=optimizer, seed=config.seed)
    state = jax.eval_shape(
        lambda params, frozen: init(params, frozen=frozen), params, frozen
    )
    return with_shardings(state, state_shardings(mesh, student, state))


def teacher_shapes(config: TrainConfig, teacher: LanguageModel, mesh: Mesh) -> Params:
    """The teacher's parameters in `teacher_dtype`."""
    dtype, params = config.teacher_dtype, teacher.abstract_params()
    shardings = sharding.shardings(mesh, teacher.partition_rules, params)
    if dtype != "int8":
        return with_shardings(cast(params, dtype), shardings)
    halves = with_shardings(cast(params, jnp.bfloat16), shardings)

    def quantize(path: jax.tree_util.KeyPath, x: Leaf) -> Leaf:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return quantized.quantize(name, x)

    return jax.tree_util.tree_map_with_path(quantize, halves)


def teachers_shapes(
    config: TrainConfig,
    teacher: LanguageModel | RoutedTeachers[LanguageModel],
    mesh: Mesh,
) -> PyTree:
    """The parameters of the teacher; of several a tuple."""
    if isinstance(teacher, RoutedTeachers):
        return tuple(teacher_shapes(config, own, mesh) for own in teacher.models)
    return teacher_shapes(config, teacher, mesh)


def row_shapes(config: TrainConfig, mesh: Mesh, width: int | None = None) -> Rows:
    """A micro-batch of the data; by default as wide as the data's longest rows."""
    per_row = functools.partial(_per_row, config, mesh)
    width = width or config.data.max_length
    return Rows(
        tokens=per_row(jnp.int32, width),
        prompt_lengths=per_row(jnp.int32),
        lengths=per_row(jnp.int32),
        span_ids=per_row(jnp.int32, width),
        example=per_row(jnp.int32),
        ground_truth=per_row(jnp.bool),
        earlier_responses=per_row(jnp.bool, width),
        teacher=per_row(jnp.int32) if config.teacher_names else None,
    )


def cached_shapes(
    config: TrainConfig, mesh: Mesh, *, vocab_size: int
) -> TopKTeacher | None:
    """The teacher cache's outputs for a micro-batch; None without a cache."""
    if config.teacher_cache is None:
        return None
    recipe = _recipe(config, vocab_size)
    per_row = functools.partial(_per_row, config, mesh)
    positions = config.data.max_length - 1
    return TopKTeacher(
        logits=per_row(recipe.logits_dtype, positions, recipe.top_k),
        indices=per_row(recipe.indices_dtype, positions, recipe.top_k),
        logsumexp=per_row(jnp.float32, positions),
    )


def _per_row(
    config: TrainConfig, mesh: Mesh, dtype: DTypeLike, *shape: int
) -> jax.ShapeDtypeStruct:
    """An array with one entry of `shape` per row of a micro-batch."""
    rows = config.batch_size // config.micro_batches
    return jax.ShapeDtypeStruct(
        (rows, *shape), dtype, sharding=sharding.batch_sharding(mesh)
    )


def _recipe(config: TrainConfig, vocab_size: int) -> Recipe:
    """The cache's own recipe; if it does not exist yet, the default one."""
    assert config.teacher_cache is not None
    folder = Path(config.teacher_cache)
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).recipe
    top_k = max(Recipe.top_k, config.objective.num_candidates)
    nothing = Origin("", "", "", "")
    return Recipe(nothing, 0, vocab_size, min(top_k, vocab_size))
