"""The TPU kernel, interpreted on CPU, against XLA's attention."""

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


def draw_arrays(batch, length, heads, kv_heads):
    rng = np.random.default_rng(0)

    def draw(n):
        return jnp.asarray(rng.normal(size=(batch, length, n, 8)), jnp.float32)

    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads)


def assert_close(got, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        got,
        expected,
    )


@pytest.mark.slow
@pytest.mark.parametrize("length", [128, 200])
def test_flash_attention_equals_xla_attention(length):
    """One length is a multiple of a tile, one is not; query heads share key heads."""
    arrays = draw_arrays(2, length, 4, 2)
    expected = value_and_gradients("xla", *arrays)
    with pltpu.force_tpu_interpret_mode():
        assert_close(value_and_gradients("flash", *arrays), expected)


def test_on_a_mesh_each_device_computes_its_own_rows_and_heads(monkeypatch):
    """Uses another kernel: on eight devices the interpreter never returns."""
    shapes = []

    def plain(q, k, v):
        shapes.append(q.shape)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    arrays = draw_arrays(4, 20, 4, 2)
    expected = value_and_gradients("xla", *arrays)
    monkeypatch.setattr(_causal_attention, "_flash", plain)
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        assert_close(value_and_gradients("flash", *arrays), expected)
    assert shapes == [(1, 20, 2, 8)]


@pytest.mark.parametrize("config", [tiny.GPT2, tiny.LLAMA, tiny.OPT])
def test_every_family_calls_the_kernel_of_its_model(config):
    model = dataclasses.replace(models.from_config(config), attention="flash")
    params, tokens = model.abstract_params(), jnp.arange(14).reshape(2, 7)
    assert "pallas_call" in str(jax.make_jaxpr(model.forward)(params, tokens))


@pytest.mark.slow
def test_a_model_with_the_kernel_equals_the_model_without():
    model = models.from_config(tiny.LLAMA)
    flash = dataclasses.replace(model, attention="flash")
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = jnp.arange(14).reshape(2, 7)
    expected, _ = jax.jit(model.forward)(params, tokens)
    with pltpu.force_tpu_interpret_mode():
        got, _ = jax.jit(flash.forward)(params, tokens)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_a_kernel_that_is_not_available_raises():
    q, k, v, _ = draw_arrays(1, 4, 2, 2)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        causal_attention(q, k, v, "cudnn")
