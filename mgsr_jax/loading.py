"""What a run starts from, on its mesh: the state at step 0, and the teacher."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from mgsr_jax import sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.losses import init_clip_network
from mgsr_jax.models import lora
from mgsr_jax.models.lora import LORA
from mgsr_jax.setup import Setup
from mgsr_jax.train_step import TrainState, init_state
from mgsr_jax.typing import Params

STUDENT, CLIP_NETWORK = "student", "clip_network"


def load_state(setup: Setup, optimizer: optax.GradientTransformation) -> TrainState:
    """The student's weights, what else is trained, and the optimizer's state.

    With adapters the weights are frozen, and in the precision of computation.
    """
    config = setup.config
    has_adapters = config.lora.rank > 0
    params = {
        STUDENT: hf.load_params(
            config.student,
            setup.student,
            mesh=setup.mesh,
            dtype=jnp.dtype(config.dtype) if has_adapters else jnp.float32,
        )
    }
    frozen: Params = {}
    if has_adapters:
        params, frozen = {STUDENT: {LORA: _init_adapters(setup)}}, params
    if config.objective.needs_clip_network:
        key = jax.random.fold_in(jax.random.key(config.seed), setup.steps)
        params[CLIP_NETWORK] = jax.device_put(
            init_clip_network(key, num_candidates=config.objective.num_candidates),
            sharding.replicated(setup.mesh),
        )
    init = partial(_init_state, optimizer=optimizer, seed=config.seed)
    abstract = jax.eval_shape(init, params, frozen)
    return jax.jit(
        init, out_shardings=state_shardings(setup, abstract), donate_argnums=(0, 1)
    )(params, frozen)


def load_teacher(setup: Setup) -> Params | None:
    """The teacher's weights, where it is run."""
    config = setup.config
    if setup.teacher is None or config.teacher is None or not setup.runs_teacher:
        return None
    dtype = jnp.dtype(config.teacher_dtype)
    return hf.load_params(config.teacher, setup.teacher, mesh=setup.mesh, dtype=dtype)


def state_shardings(setup: Setup, state: TrainState) -> Any:
    """Where every leaf of a train state, or of its shapes, lives.

    Moments lie as their parameters do.
    """
    rules = setup.student.partition_rules
    student = state.params[STUDENT]
    if LORA in student:
        rules = (*lora.partition_rules(rules, student[LORA]), *rules)
    if CLIP_NETWORK in state.params:
        rules = ((f"{CLIP_NETWORK}/", P()), *rules)
    return sharding.shardings(setup.mesh, rules, state)


def _init_adapters(setup: Setup) -> Params:
    """Drawn where they live; no step has their key, nor has the clip network."""

    def init() -> Params:
        key = jax.random.key(setup.config.seed)
        key = jax.random.fold_in(key, setup.steps + 1)
        return lora.init(key, setup.student, setup.config.lora)

    abstract = jax.eval_shape(init)
    rules = lora.partition_rules(setup.student.partition_rules, abstract)
    places = sharding.shardings(setup.mesh, rules, abstract)
    return jax.jit(init, out_shardings=places)()


def _init_state(
    params: Params,
    frozen: Params,
    *,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> TrainState:
    return init_state(params, optimizer, seed, frozen=frozen)
