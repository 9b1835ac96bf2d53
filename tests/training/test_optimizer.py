"""The schedule, what decays, and the clip network's own optimizer."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import GPT2, LLAMA, OPT

from mgsr_jax import losses, models
from mgsr_jax.training.optimizer import (
    OptimizerConfig,
    decayed,
    learning_rate_schedule,
    make_optimizer,
)

CONFIG = OptimizerConfig(
    learning_rate=1e-2, final_learning_rate=1e-4, weight_decay=0.1, clip_norm=0.5
)
STEPS = 5
K = 6

QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 4}
QWEN2 = LLAMA | {"model_type": "qwen2"}


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedule_warms_up_and_ends_at_the_final_rate(warmup):
    config = OptimizerConfig(2.0, final_learning_rate=0.5, warmup_steps=warmup)
    rate = learning_rate_schedule(config, 10)
    rates = [float(rate(i)) for i in range(12)]
    rising = [2.0 * i / 3 for i in range(warmup)]
    falling = [
        0.5 + 1.5 * (1 + math.cos(math.pi * (i - warmup) / (10 - warmup))) / 2
        for i in range(warmup, 10)
    ]
    np.testing.assert_allclose(rates, [*rising, *falling, 0.5, 0.5], rtol=1e-5)


@pytest.mark.parametrize("family", [LLAMA, GPT2, OPT, QWEN2, QWEN3])
def test_decay_is_for_matrices_also_in_a_stack_of_layers(family):
    """Of one layer's parameters the matrices decay; norms and biases do not."""
    params = models.from_config(family).abstract_params()
    chosen = jax.tree_util.tree_leaves_with_path(decayed(params))
    leaves = jax.tree.leaves(params)
    for (path, decays), leaf in zip(chosen, leaves, strict=True):
        stacked = path[0].key == "layers"
        assert decays == (leaf.ndim - stacked == 2), jax.tree_util.keystr(path)


@pytest.mark.slow
def test_norms_and_biases_do_not_decay():
    """Without a gradient, decay is all that moves a parameter."""
    model = models.from_config(GPT2)
    params = {
        "student": jax.tree.map(lambda x: jnp.ones(x.shape), model.abstract_params())
    }
    optimizer = make_optimizer(CONFIG, STEPS)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        want = -1e-3 if path[-1].key in ("kernel", "embedding") else 0.0
        np.testing.assert_allclose(update, want, rtol=1e-5, err_msg=str(path))


def test_the_clip_network_has_its_own_rate_and_neither_decay_nor_clipping():
    clip = losses.init_clip_network(jax.random.key(0), num_candidates=K, hidden=8)
    config = dataclasses.replace(CONFIG, clip_network_learning_rate=0.03)
    optimizer = make_optimizer(config, 1)  # the student's schedule is over at once
    params = {"student": {"kernel": jnp.ones((2, 2))}, "clip_network": clip}
    state = optimizer.init(params)
    big = jax.tree.map(lambda p: jnp.full(p.shape, 1e6), clip)
    zero = jax.tree.map(jnp.zeros_like, clip)
    small = {"kernel": jnp.full((2, 2), 1e-3)}
    for _ in range(4):
        updates, state = optimizer.update(
            {"student": small, "clip_network": big}, state, params
        )
        for leaf in jax.tree.leaves(updates["clip_network"]):
            np.testing.assert_allclose(leaf, -0.03, rtol=1e-4)
    # Huge gradients of the network do not shrink the student's.
    (adam,) = optax.tree.get_all_with_path(state.inner_states["student"], "mu")
    np.testing.assert_allclose(
        adam[1]["student"]["kernel"], 1e-3 * (1 - 0.9**4), rtol=1e-4
    )
    updates, _ = optimizer.update(
        {"student": small, "clip_network": zero}, optimizer.init(params), params
    )
    assert not any(jnp.any(u) for u in jax.tree.leaves(updates["clip_network"]))


def test_settings_are_checked():
    config = dataclasses.replace(CONFIG, clip_norm=0.0)
    with pytest.raises(ValueError, match="optimizer.clip_norm must be above 0"):
        make_optimizer(config, 1)
