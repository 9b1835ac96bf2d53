"""What a run starts from, on its mesh: the state at step 0, and the teacher."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mgsr_jax import sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.models import quantized
from mgsr_jax.train_step import TrainState, init_state
from mgsr_jax.training.inputs import Setup
from mgsr_jax.training.programs import (
    init_trained,
    partition_rules,
    state_shardings,
)
from mgsr_jax.typing import STUDENT, Params


def load_state(setup: Setup, optimizer: optax.GradientTransformation) -> TrainState:
    """The student's weights, what else is trained, and the optimizer's state.

    With adapters the weights are frozen, and in the precision of computation.
    """
    config, student = setup.config, setup.student
    has_adapters = config.lora.rank > 0
    dtype = jnp.dtype(config.dtype) if has_adapters else jnp.float32
    weights = hf.load_params(config.student, student, mesh=setup.mesh, dtype=dtype)
    params, frozen = _init_trained(setup), {}
    if has_adapters:
        frozen = {STUDENT: weights}
    else:
        params[STUDENT] = weights

    def init(params: Params, frozen: Params) -> TrainState:
        return init_state(params, optimizer, config.seed, frozen=frozen)

    abstract = jax.eval_shape(init, params, frozen)
    places = state_shardings(setup.mesh, student, abstract)
    return jax.jit(init, out_shardings=places, donate_argnums=(0, 1))(params, frozen)


def load_teacher(setup: Setup) -> Params:
    """The teacher's weights."""
    config = setup.config
    assert setup.teacher is not None and config.teacher is not None
    settings: dict[str, Any] = {"dtype": jnp.dtype(config.teacher_dtype)}
    if config.teacher_dtype == "int8":
        settings = {"dtype": jnp.bfloat16, "transform": quantized.quantize}
    return hf.load_params(config.teacher, setup.teacher, mesh=setup.mesh, **settings)


def _init_trained(setup: Setup) -> Params:
    """Drawn where it lives."""
    init = functools.partial(init_trained, setup.config, setup.student, setup.steps)
    abstract = jax.eval_shape(init)
    rules = partition_rules(setup.student, abstract)
    specs = sharding.partition_specs(rules, abstract, strict=False)
    places = sharding.placed(setup.mesh, abstract, specs)
    return jax.jit(init, out_shardings=places)()
