"""Properties of `LanguageModel` that need no comparison with transformers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgsr_jax import models, sharding
from mgsr_jax.typing import Model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 62,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 62,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "initializer_range": 0.2,
}
OPT_350M = {
    "model_type": "opt",
    "vocab_size": 62,
    "hidden_size": 24,
    "word_embed_proj_dim": 16,
    "do_layer_norm_before": False,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "init_std": 0.2,
}


CONFIGS = {"llama": LLAMA, "gpt2": GPT2, "opt_350m": OPT_350M}


@functools.cache
def built(family):
    """A model and its parameters, shared by all tests."""
    model = models.from_config(CONFIGS[family])
    return model, jax.jit(model.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def llama():
    return built("llama")


# The tests share its compiled programs.
forward = jax.jit(
    lambda model, params, *args, **kwargs: model.forward(params, *args, **kwargs),
    static_argnums=0,
)


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 62, (2, 9)), jnp.int32)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_model_is_hashable_and_equal_to_another_of_its_config(family):
    hf = CONFIGS[family]
    model = models.from_config(hf)
    assert isinstance(model, Model)
    assert hash(model) == hash(models.from_config(hf))
    assert model == models.from_config(hf)
    init = jax.eval_shape(model.init, jax.random.key(0))
    assert init == model.abstract_params()


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_a_hidden_state_depends_on_no_later_token(family):
    """By the gradient of hidden state 4 with respect to each token's embedding."""
    model, params = built(family)
    distinct = jnp.arange(9)[None]  # each position has its own row of the embedding
    embedding = params["embed"]["embedding"]
    weights = jnp.arange(1.0, 1 + embedding.shape[1])

    def hidden_state_4(embedding):
        changed = {**params, "embed": {"embedding": embedding}}
        return (model.forward(changed, distinct)[0][0, 4] * weights).sum()

    norms = jnp.abs(jax.jit(jax.grad(hidden_state_4))(embedding)).sum(-1)
    assert (norms[:5] > 0).all()
    assert (norms[5:] == 0).all()


def test_stacked_and_unstacked_layers_give_the_same_hidden_states(llama, tokens):
    model, params = llama
    scanned, none = forward(model, params, tokens)
    assert none is None
    decoding = model.decode_params(params, jnp.float32)
    assert isinstance(decoding["layers"], tuple) and len(decoding["layers"]) == 2
    unrolled, _ = forward(model, decoding, tokens)
    np.testing.assert_allclose(scanned, unrolled, atol=2e-6, rtol=0)
    cached, cache = forward(
        model, params, tokens, cache=model.init_cache(2, 9, jnp.float32)
    )
    np.testing.assert_allclose(scanned, cached, atol=2e-6, rtol=0)
    assert jax.tree.map(jnp.shape, cache) == (((2, 2, 9, 6),) * 2,) * 2


def test_hidden_states_follow_positions_not_the_order_in_the_row(llama, tokens):
    model, params = llama
    expected, _ = forward(model, params, tokens)
    order = np.array([[3, 0, 8, 1, 5, 2, 4, 7, 6], [8, 7, 6, 5, 4, 3, 2, 1, 0]])
    hidden, _ = forward(
        model,
        params,
        jnp.take_along_axis(tokens, jnp.asarray(order), axis=1),
        positions=jnp.asarray(order),
    )
    expected = np.take_along_axis(np.asarray(expected), order[..., None], axis=1)
    np.testing.assert_allclose(hidden, expected, atol=2e-6, rtol=0)


def test_positions_beyond_the_cache_write_nothing(llama, tokens):
    model, params = llama
    _, full = forward(
        model, params, tokens[:, :4], cache=model.init_cache(2, 4, jnp.float32)
    )
    positions = jnp.asarray([[4], [3]])
    hidden, cache = forward(
        model, params, tokens[:, 4:5], positions=positions, cache=full
    )
    for before, after in zip(
        jax.tree.leaves(full), jax.tree.leaves(cache), strict=True
    ):
        np.testing.assert_array_equal(before[0], after[0])
        np.testing.assert_array_equal(before[1, :, :3], after[1, :, :3])
        assert (before[1, :, 3] != after[1, :, 3]).all()
    assert jnp.isfinite(hidden).all()


@pytest.mark.parametrize("family", ["gpt2", "opt_350m"])
def test_a_position_beyond_the_table_gives_finite_hidden_states(family):
    model, params = built(family)
    cache = model.init_cache(1, 16, jnp.float32)
    tokens = jnp.ones((1, 1), jnp.int32)
    hidden, _ = forward(model, params, tokens, positions=16 * tokens, cache=cache)
    assert jnp.isfinite(hidden).all()


def test_a_row_longer_than_the_position_limit_raises(llama):
    model, params = llama
    with pytest.raises(ValueError, match="17 positions.*limit is 16"):
        model.forward(params, jnp.zeros((1, 17), jnp.int32))
    with pytest.raises(ValueError, match="17 positions.*limit is 16"):
        model.init_cache(1, 17, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_bfloat16_params_give_bfloat16_hidden_states_and_float32_logits(family, tokens):
    model, params = built(family)
    decoding = model.decode_params(params, jnp.bfloat16)
    cache = model.init_cache(2, 9, jnp.bfloat16)
    hidden, cache = forward(model, decoding, tokens, cache=cache)
    assert hidden.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(cache)} == {jnp.dtype(jnp.bfloat16)}
    assert forward(model, decoding, tokens)[0].dtype == jnp.bfloat16
    logits = model.unembed(model.head_params(decoding), hidden)
    assert logits.dtype == jnp.float32
    assert (logits != logits.astype(jnp.bfloat16).astype(jnp.float32)).any()
    expected, _ = forward(model, params, tokens)
    np.testing.assert_allclose(hidden.astype(jnp.float32), expected, atol=0.2, rtol=0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_decode_params_remain_valid_after_the_originals_are_deleted(llama, wrap):
    model, params = llama
    originals = jax.tree.map(jnp.copy, params)
    decoding = wrap(lambda p: model.decode_params(p, jnp.float32))(originals)
    jax.tree.map(lambda x: x.delete(), originals)
    assert jnp.isfinite(decoding["embed"]["embedding"]).all()
    np.testing.assert_array_equal(
        decoding["layers"][1]["mlp"]["up"]["kernel"],
        params["layers"]["mlp"]["up"]["kernel"][1].T,
    )


@pytest.mark.slow
def test_remat_does_not_change_gradients(llama, tokens):
    model, params = llama

    def gradient(model):
        def loss(params):
            return (model.forward(params, tokens)[0] ** 2).mean()

        return jax.jit(jax.grad(loss))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
        gradient(model),
        gradient(dataclasses.replace(model, remat=True)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_sharded_model_gives_the_same_logits(family):
    """The mesh splits data, fsdp and tensor; the logits stay split over the batch."""
    model, params = built(family)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 62, (8, 9)), jnp.int32)

    def logits(params, tokens):
        return model.unembed(
            model.head_params(params), model.forward(params, tokens)[0]
        )

    expected = jax.jit(logits)(params, tokens)
    mesh = sharding.make_mesh(2, 2, 2)
    places = sharding.shardings(mesh, model.partition_rules, params)
    with jax.set_mesh(mesh):
        got = jax.jit(logits)(
            jax.device_put(params, places),
            jax.device_put(tokens, sharding.batch_sharding(mesh)),
        )
    assert got.sharding.spec[0] == ("data", "fsdp")
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


def test_equal_models_compile_once(tokens):
    count = 0

    def forward(model, params, tokens):
        nonlocal count
        count += 1
        return model.forward(params, tokens)[0]

    compiled = jax.jit(forward, static_argnums=0)
    for seed in range(2):
        model = models.from_config(GPT2)
        compiled(model, jax.jit(model.init)(jax.random.key(seed)), tokens)
    assert count == 1
