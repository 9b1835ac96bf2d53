"""The initial state of a run on its mesh, and the teacher's weights."""

import functools
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import PyTree

from mgsr_jax import sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.models import LanguageModel, quantized
from mgsr_jax.routed_teachers import RoutedTeachers
from mgsr_jax.train_step import TrainState, init_state
from mgsr_jax.training.programs import Programs, partition_rules, state_shardings
from mgsr_jax.typing import STUDENT, Params

Folder = str | os.PathLike[str]


def load_state(
    folder: Folder,
    student: LanguageModel,
    programs: Programs,
    *,
    mesh: Mesh,
    dtype: DTypeLike,
    seed: int,
) -> TrainState:
    """The state at step 0: the student's weights, other trained parameters, optimizer.

    Args:
      folder: the student's checkpoint.
      student: the student; with adapters its weights are frozen.
      programs: its optimizer, and the initial values of the other parameters.
      mesh: device mesh.
      dtype: of frozen weights; trained weights are float32.
      seed: seed of the run.
    """
    frozen_student = student.lora.rank > 0
    weights = hf.load_params(
        folder, student, mesh=mesh, dtype=dtype if frozen_student else jnp.float32
    )
    params, frozen = _on_devices(programs.init_trained, student, mesh), {}
    if frozen_student:
        frozen = {STUDENT: weights}
    else:
        params[STUDENT] = weights

    def init(params: Params, frozen: Params) -> TrainState:
        return init_state(params, programs.optimizer, seed, frozen=frozen)

    abstract = jax.eval_shape(init, params, frozen)
    places = state_shardings(mesh, student, abstract)
    return jax.jit(init, out_shardings=places, donate_argnums=(0, 1))(params, frozen)


def load_teacher(
    folder: Folder, teacher: LanguageModel, *, mesh: Mesh, dtype: str
) -> Params:
    """The teacher's weights in `dtype`, which may be "int8"."""
    load = functools.partial(hf.load_params, folder, teacher, mesh=mesh)
    if dtype == "int8":
        return load(dtype=jnp.bfloat16, transform=quantized.quantize)
    return load(dtype=jnp.dtype(dtype))


def load_teachers(
    folders: Sequence[Folder],
    teacher: LanguageModel | RoutedTeachers[LanguageModel],
    *,
    mesh: Mesh,
    dtype: str,
) -> PyTree:
    """The weights of the teacher; of several a tuple, one tree per folder."""
    load = functools.partial(load_teacher, mesh=mesh, dtype=dtype)
    if isinstance(teacher, RoutedTeachers):
        return tuple(map(load, folders, teacher.models))
    return load(folders[0], teacher)


def _on_devices(
    init_trained: Callable[[], Params], student: LanguageModel, mesh: Mesh
) -> Params:
    """Initial values, computed on the devices that hold them."""
    abstract = jax.eval_shape(init_trained)
    rules = partition_rules(student, abstract)
    specs = sharding.partition_specs(rules, abstract, strict=False)
    places = sharding.placed(mesh, abstract, specs)
    return jax.jit(init_trained, out_shardings=places)()
