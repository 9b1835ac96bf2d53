"""The TPU's kernel, interpreted, against XLA's attention; how the others are chosen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.experimental.pallas import tpu as pltpu

from mgsr_jax import models, sharding
from mgsr_jax.models import _causal_attention
from mgsr_jax.models._causal_attention import causal_attention


def value_and_gradients(kind, q, k, v, weights):
    def loss(q, k, v):
        out = causal_attention(q, k, v, kind)
        return jnp.sum(weights * out), out

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)


def problem(batch, length, heads, kv_heads):
    rng = np.random.default_rng(0)

    def draw(n):
        return jnp.asarray(rng.normal(size=(batch, length, n, 8)), jnp.float32)

    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        found,
        expected,
    )


@pytest.mark.parametrize("length", [5, 128, 200])
def test_flash_attention_is_attention(length):
    """Also of lengths that are no multiple of a tile, and of shared key heads."""
    arrays = problem(2, length, 4, 2)
    expected = value_and_gradients("xla", *arrays)
    with pltpu.force_tpu_interpret_mode():
        assert_close(value_and_gradients("flash", *arrays), expected)


def test_on_a_mesh_each_device_computes_its_rows_and_heads(monkeypatch):
    """With another kernel: the interpreter waits for ever for eight devices."""
    seen = []

    def plain(q, k, v):
        seen.append(q.shape)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    arrays = problem(4, 20, 4, 2)
    expected = value_and_gradients("xla", *arrays)
    monkeypatch.setattr(_causal_attention, "_flash", plain)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        assert_close(value_and_gradients("flash", *arrays), expected)
    assert seen == [(1, 20, 2, 8)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_a_model_asks_for_the_kernel_that_it_was_given(family):
    config = {"gpt2": tiny.GPT2, "llama": tiny.LLAMA, "opt": tiny.OPT}[family]
    model = models.from_config(config)
    flash = dataclasses.replace(model, attention="flash")
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.arange(14).reshape(2, 7)
    assert "pallas_call" in str(jax.make_jaxpr(flash.forward)(params, tokens))
    expected, _ = model.forward(params, tokens)
    with pltpu.force_tpu_interpret_mode():
        found, _ = flash.forward(params, tokens)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_a_kernel_that_is_not_there_is_an_error():
    q, k, v, _ = problem(1, 4, 2, 2)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        causal_attention(q, k, v, "cudnn")
