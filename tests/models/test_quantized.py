"""int8 weights: their values, the families that read them, and their sharding."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.models import quantized

KERNEL = "layers/mlp/up/kernel"
FAMILIES = {
    "llama": tiny.LLAMA,
    "gpt2": tiny.GPT2,
    "opt": tiny.OPT,
    "qwen3": tiny.LLAMA | {"model_type": "qwen3", "head_dim": 4},
}


def quantize(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: quantized.quantize(sharding.path_name(path), leaf), params
    )


def test_each_output_channel_of_each_layer_has_a_scale():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 6, 5)) * rng.uniform(0.01, 100, (2, 1, 5))
    weights[1, :, 2] = 0.0
    got = quantized.quantize(KERNEL, jnp.asarray(weights, jnp.float32))
    assert got.qvalue.dtype == jnp.int8 and got.scale.dtype == jnp.float32
    assert got.qvalue.shape == (2, 6, 5) and got.scale.shape == (2, 1, 5)
    scale = np.abs(weights).max(axis=1, keepdims=True) / 127.5
    back = np.asarray(quantized.dequantized({"kernel": got}, jnp.float32)["kernel"])
    # Rounding errs by up to half a step; the largest weight is clipped by half a step.
    assert (np.abs(back - weights) <= 0.501 * scale).all()
    assert (back[1, :, 2] == 0).all() and np.isfinite(back).all()


@pytest.mark.parametrize(
    "path", ["embed/embedding", "head/embedding", "layers/norm/scale", "layers/x/bias"]
)
def test_a_parameter_that_is_not_a_kernel_is_not_quantized(path):
    leaf = jnp.ones((2, 3))
    assert quantized.quantize(path, leaf) is leaf


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [*((f, "float32") for f in FAMILIES), ("llama", "bfloat16")]
)
def test_every_family_computes_with_the_dequantized_kernels(family, dtype):
    """With and without a cache."""
    model = models.from_config(FAMILIES[family])
    params = jax.tree.map(
        lambda p: p.astype(dtype) * (4 if p.ndim > 1 else 1),
        jax.jit(model.init)(jax.random.key(0)),
    )
    small = quantize(params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(small["layers"]))
    assert size < 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    floats = small | {"layers": quantized.dequantized(small["layers"], dtype)}
    tokens = jax.random.randint(jax.random.key(1), (3, 8), 0, 32)

    @jax.jit
    def logits(params, cache=None):
        hidden, _ = model.forward(params, tokens, cache=cache)
        assert hidden.dtype == dtype
        return model.unembed(model.head_params(params), hidden)

    got, expected = logits(small), logits(floats)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)
    cached = logits(small, model.init_cache(3, 8, dtype))
    np.testing.assert_allclose(cached, expected, rtol=1e-5, atol=1e-5)
    # The logits are also close to those of the original weights.
    correlation = np.corrcoef(np.ravel(expected), np.ravel(logits(params)))[0, 1]
    assert correlation > 0.995


def test_int8_weights_are_sharded_like_floats(tmp_path):
    config = tiny.LLAMA | {"num_key_value_heads": 4}
    model = models.from_config(config)
    hf.save_pretrained(tmp_path, model, jax.jit(model.init)(jax.random.key(0)))
    mesh = sharding.make_mesh(2, 2, 2)
    plain = hf.load_params(tmp_path, model, mesh=mesh)
    got = hf.load_params(tmp_path, model, mesh=mesh, transform=quantized.quantize)
    unsharded = hf.load_params(tmp_path, model, transform=quantized.quantize)
    jax.tree.map(np.testing.assert_array_equal, got, unsharded)
    for names, spec in (
        (("attention", "query"), P(None, "fsdp", "tensor")),
        (("attention", "output"), P(None, "tensor", "fsdp")),
    ):
        int8, floats = got["layers"], plain["layers"]
        for name in (*names, "kernel"):
            int8, floats = int8[name], floats[name]
        assert floats.sharding.spec == spec
        assert int8.qvalue.sharding == floats.sharding
        assert int8.scale.sharding == NamedSharding(mesh, P(None, None, spec[2]))


def test_quantizing_shapes_gives_the_shapes_of_quantized_arrays():
    mesh = sharding.make_mesh(2, 2, 2)
    place = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    weights = jax.device_put(jnp.ones((2, 8, 4), jnp.bfloat16), place)
    shape = jax.ShapeDtypeStruct(weights.shape, weights.dtype, sharding=place)
    shapes = quantized.quantize(KERNEL, shape)
    arrays = quantized.quantize(KERNEL, weights)
    for expected, leaf in zip(*map(jax.tree.leaves, (shapes, arrays)), strict=True):
        assert leaf.shape == expected.shape and leaf.dtype == expected.dtype
        assert leaf.sharding == expected.sharding


def test_without_qwix_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'mgsr_jax\[int8\]'"):
        quantized.check_installed()
