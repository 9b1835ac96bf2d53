"""The initial state of a run on its mesh, and the teacher's weights."""

import functools

import jax
import jax.numpy as jnp
import optax

from mgsr_jax import sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.models import quantized
from mgsr_jax.train_step import TrainState, init_state
from mgsr_jax.training.inputs import RunInputs
from mgsr_jax.training.programs import (
    init_trained,
    partition_rules,
    state_shardings,
)
from mgsr_jax.typing import STUDENT, Params


def load_state(
    inputs: RunInputs, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state at step 0: the student's weights, other trained parameters, optimizer.

    With adapters the student's weights are frozen, in the dtype of computation.
    """
    config, student = inputs.config, inputs.student
    has_adapters = config.lora.rank > 0
    dtype = jnp.dtype(config.dtype) if has_adapters else jnp.float32
    weights = hf.load_params(config.student, student, mesh=inputs.mesh, dtype=dtype)
    params, frozen = _init_trained(inputs), {}
    if has_adapters:
        frozen = {STUDENT: weights}
    else:
        params[STUDENT] = weights

    def init(params: Params, frozen: Params) -> TrainState:
        return init_state(params, optimizer, config.seed, frozen=frozen)

    abstract = jax.eval_shape(init, params, frozen)
    places = state_shardings(inputs.mesh, student, abstract)
    return jax.jit(init, out_shardings=places, donate_argnums=(0, 1))(params, frozen)


def load_teacher(inputs: RunInputs) -> Params:
    """The teacher's weights."""
    config = inputs.config
    assert inputs.teacher is not None and config.teacher is not None
    load = functools.partial(
        hf.load_params, config.teacher, inputs.teacher, mesh=inputs.mesh
    )
    if config.teacher_dtype == "int8":
        return load(dtype=jnp.bfloat16, transform=quantized.quantize)
    return load(dtype=jnp.dtype(config.teacher_dtype))


def _init_trained(inputs: RunInputs) -> Params:
    """Initial values of `init_trained`, computed on the devices that hold them."""
    init = functools.partial(init_trained, inputs.config, inputs.student, inputs.steps)
    abstract = jax.eval_shape(init)
    rules = partition_rules(inputs.student, abstract)
    specs = sharding.partition_specs(rules, abstract, strict=False)
    places = sharding.placed(inputs.mesh, abstract, specs)
    return jax.jit(init, out_shardings=places)()
