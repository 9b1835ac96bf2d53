"""int8 weights: what they are, that every family reads them, and where they lie."""

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
    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return quantized.quantize(name, leaf)

    return jax.tree_util.tree_map_with_path(one, params)


def test_a_scale_for_each_output_channel_of_each_layer():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(2, 6, 5)) * rng.uniform(0.01, 100, (2, 1, 5))
    weights[1, :, 2] = 0.0
    found = quantized.quantize(KERNEL, jnp.asarray(weights, jnp.float32))
    assert found.qvalue.dtype == jnp.int8 and found.scale.dtype == jnp.float32
    assert found.qvalue.shape == (2, 6, 5) and found.scale.shape == (2, 1, 5)
    scale = np.abs(weights).max(axis=1, keepdims=True) / 127.5
    back = np.asarray(quantized.dequantized({"kernel": found}, jnp.float32)["kernel"])
    # Half a step of rounding; the largest weight itself is cut by half a step.
    assert (np.abs(back - weights) <= 0.501 * scale).all()
    assert (back[1, :, 2] == 0).all() and np.isfinite(back).all()


@pytest.mark.parametrize(
    "path", ["embed/embedding", "head/embedding", "layers/norm/scale", "layers/x/bias"]
)
def test_what_is_no_kernel_of_a_layer_stays(path):
    leaf = jnp.ones((2, 3))
    assert quantized.quantize(path, leaf) is leaf


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_family_reads_them(family, dtype):
    """As it reads the floats that they stand for, with a cache too."""
    model = models.from_config(FAMILIES[family])
    params = jax.tree.map(
        lambda p: p.astype(dtype) * (4 if p.ndim > 1 else 1),
        model.init(jax.random.key(0)),
    )
    small = quantize(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(small["layers"]))
    assert held < 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(params["layers"]))
    whole = small | {"layers": quantized.dequantized(small["layers"], dtype)}
    tokens = jax.random.randint(jax.random.key(1), (3, 8), 0, 32)

    def logits(params):
        hidden, _ = model.forward(params, tokens)
        assert hidden.dtype == dtype
        return model.unembed(model.head_params(params), hidden)

    found, expected = logits(small), logits(whole)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    cache = model.init_cache(3, 8, dtype)
    hidden, _ = model.forward(small, tokens, cache=cache)
    cached = model.unembed(model.head_params(small), hidden)
    np.testing.assert_allclose(cached, expected, rtol=1e-5, atol=1e-5)
    # And close to what it was made from, which another model would not be.
    close = np.corrcoef(np.ravel(expected), np.ravel(logits(params)))[0, 1]
    assert close > 0.995


def test_loaded_onto_a_mesh_they_lie_as_the_floats_do(tmp_path):
    config = tiny.LLAMA | {"num_key_value_heads": 4}
    model = models.from_config(config)
    hf.save_pretrained(tmp_path, model, model.init(jax.random.key(0)))
    mesh = sharding.make_mesh(2, 2, 2)
    plain = hf.load_params(tmp_path, model, mesh=mesh)
    found = hf.load_params(tmp_path, model, mesh=mesh, transform=quantized.quantize)
    alone = hf.load_params(tmp_path, model, transform=quantized.quantize)
    jax.tree.map(np.testing.assert_array_equal, found, alone)
    for names, spec in (
        (("attention", "query"), P(None, "fsdp", "tensor")),
        (("attention", "output"), P(None, "tensor", "fsdp")),
    ):
        own, was = found["layers"], plain["layers"]
        for name in (*names, "kernel"):
            own, was = own[name], was[name]
        assert was.sharding.spec == spec
        assert own.qvalue.sharding == was.sharding
        assert own.scale.sharding == NamedSharding(mesh, P(None, None, spec[2]))


def test_shapes_are_those_of_the_arrays():
    mesh = sharding.make_mesh(2, 2, 2)
    place = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    weights = jax.device_put(jnp.ones((2, 8, 4), jnp.bfloat16), place)
    shape = jax.ShapeDtypeStruct(weights.shape, weights.dtype, sharding=place)
    planned = quantized.quantize(KERNEL, shape)
    made = quantized.quantize(KERNEL, weights)
    for expected, leaf in zip(*map(jax.tree.leaves, (planned, made)), strict=True):
        assert leaf.shape == expected.shape and leaf.dtype == expected.dtype
        assert leaf.sharding == expected.sharding


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'mgsr_jax\[int8\]'"):
        quantized.check_installed()
