"""Adapters: values and gradients equal those of merged kernels; dropout; sharding."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from tiny import GPT2, LLAMA, OPT

from mgsr_jax import models, sharding
from mgsr_jax.decoding.decode import Decoding, generate
from mgsr_jax.decoding.sampling import GREEDY
from mgsr_jax.models import lora
from mgsr_jax.models.lora import LORA, LoraConfig
from mgsr_jax.rows import from_lists

GPT2 = GPT2 | {"initializer_range": 0.3}
OPT = OPT | {"init_std": 0.3}
FAMILIES = {
    "gpt2": GPT2,
    "opt": OPT,
    "llama": LLAMA,
    "qwen3_window": LLAMA
    | {
        "model_type": "qwen3",
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 0,
    },
}
ALL = LoraConfig(rank=3, alpha=6.0, targets="")
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (8, 9)), jnp.int32)


@functools.cache
def built(family, config=ALL):
    """A model, its parameters, and adapters that change its hidden states."""
    model = dataclasses.replace(models.from_config(FAMILIES[family]), lora=config)
    params = jax.jit(model.init)(jax.random.key(0))
    adapters = jax.jit(lambda key: lora.init(key, model, config))(jax.random.key(1))

    def noise(i, leaf):
        key = jax.random.fold_in(jax.random.key(2), i)
        return leaf + 0.1 * jax.random.normal(key, leaf.shape)

    leaves, tree = jax.tree.flatten(adapters)
    return model, params, tree.unflatten([noise(*x) for x in enumerate(leaves)])


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens=TOKENS, **settings):
    return model.forward(params, tokens, **settings)[0]


# LLaMA's block is that of Qwen3, without the norms of heads.
@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3_window"])
def test_adapters_equal_merged_kernels(family):
    """Compare hidden states and gradients with respect to the adapters."""
    model, params, adapters = built(family)

    def loss(adapters, merge):
        combined = {**params, LORA: adapters}
        if merge:
            combined = lora.merged(combined, ALL)
        hidden = model.forward(combined, TOKENS)[0]
        return jnp.mean(jnp.square(hidden) * jnp.cos(hidden)), hidden

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    got, hidden = gradient(adapters, False)
    want, want_hidden = gradient(adapters, True)
    np.testing.assert_allclose(hidden, want_hidden, atol=3e-5)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.linalg.norm(b) > 0
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(b)
    _, without = gradient(jax.tree.map(jnp.zeros_like, adapters), True)
    assert np.abs(hidden - without).max() > 0.1


@pytest.mark.slow
def test_merging_changes_only_the_targeted_kernels():
    config = dataclasses.replace(ALL, targets="query|mlp/up$")
    _, params, adapters = built("llama", config)
    assert list(lora.by_path(adapters)) == ["attention/query", "mlp/up"]
    merged = lora.merge(params, adapters, config)
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), merged, params)
    assert [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, is_changed in jax.tree_util.tree_leaves_with_path(changed)
        if is_changed
    ] == ["layers/attention/query/kernel", "layers/mlp/up/kernel"]
    a, b = (np.float64(adapters["mlp"]["up"][name]) for name in "ab")
    want = np.float64(params["layers"]["mlp"]["up"]["kernel"]) + 2.0 * (a @ b)
    np.testing.assert_allclose(merged["layers"]["mlp"]["up"]["kernel"], want, atol=1e-6)


@pytest.mark.slow
def test_new_adapters_do_not_change_the_model():
    model, params, _ = built("llama")
    new = lora.init(jax.random.key(5), model, ALL)
    got = forward(model, {**params, LORA: new})
    np.testing.assert_array_equal(got, forward(model, params))
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, new, ALL), params)


def test_new_adapters_have_the_distribution_of_peft():
    """Kaiming's uniform with a = sqrt(5) over the inputs: variance 1 / (3 in)."""
    wide = dataclasses.replace(
        models.from_config(LLAMA | {"hidden_size": 64, "intermediate_size": 256}),
        lora=LoraConfig(rank=32),
    )
    config = dataclasses.replace(wide.lora, targets="mlp")
    adapters = lora.init(jax.random.key(0), wide, config)
    assert jax.tree.map(jnp.shape, adapters) == {
        "mlp": {
            "down": {"a": (2, 256, 32), "b": (2, 32, 64)},
            "gate": {"a": (2, 64, 32), "b": (2, 32, 256)},
            "up": {"a": (2, 64, 32), "b": (2, 32, 256)},
        }
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    for name, size in (("down", 256), ("up", 64)):
        a, b = adapters["mlp"][name]["a"], adapters["mlp"][name]["b"]
        assert not b.any() and np.abs(a).max() <= size**-0.5
        np.testing.assert_allclose(np.std(a), (3 * size) ** -0.5, rtol=0.03)
        assert np.abs(np.mean(a)) < 0.05 * size**-0.5
    assert (adapters["mlp"]["gate"]["a"] != adapters["mlp"]["up"]["a"]).mean() > 0.99
    other = lora.init(jax.random.key(1), wide, config)
    assert (adapters["mlp"]["up"]["a"] != other["mlp"]["up"]["a"]).mean() > 0.99


def test_the_error_for_an_unmatched_target_lists_all_kernels():
    config = dataclasses.replace(ALL, targets="q_proj")
    with pytest.raises(
        ValueError,
        match="lora.targets='q_proj' .*kernels are attention/key, .*mlp/down, mlp/up$",
    ):
        lora.init(jax.random.key(0), built("gpt2")[0], config)


def test_settings_are_checked():
    config = dataclasses.replace(ALL, targets="(query")
    with pytest.raises(ValueError, match=r"'\(query' is not a regular expression"):
        lora.init(jax.random.key(0), built("gpt2")[0], config)


@pytest.mark.slow
def test_adapters_without_settings_in_the_model_raise():
    model, params, adapters = built("llama")
    bare = dataclasses.replace(model, lora=LoraConfig())
    combined = {**params, LORA: adapters}
    with pytest.raises(ValueError, match="the model's lora.rank is 0"):
        bare.forward(combined, TOKENS)
    with pytest.raises(ValueError, match="the model's lora.rank is 0"):
        bare.decode_params(combined, jnp.float32)


def test_merging_parameters_without_adapters_changes_nothing():
    _, params, _ = built("llama")
    jax.tree.map(np.testing.assert_array_equal, lora.merged(params, ALL), params)


@pytest.mark.slow
def test_decode_params_hold_merged_kernels():
    model, params, adapters = built("llama")
    combined, merged = {**params, LORA: adapters}, lora.merge(params, adapters, ALL)
    copy = model.decode_params(combined, jnp.float32)
    want = model.decode_params(merged, jnp.float32)
    assert jax.tree.structure(copy) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), copy, want)
    half = model.decode_params(combined, jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    rows = from_lists([[5, 6, 7], [8]], [[], []], width=12, ground_truth=False)
    rows = jax.tree.map(jnp.asarray, rows)
    settings = dict(key=jax.random.key(3), decoding=Decoding(12, (0,), GREEDY))
    generated, expected = (
        generate(model, tree, rows, **settings) for tree in (combined, merged)
    )
    jax.tree.map(np.testing.assert_array_equal, generated, expected)


def test_bfloat16_params_with_float32_adapters_give_bfloat16_hidden_states():
    model, params, adapters = built("llama")
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    hidden = forward(model, {**half, LORA: adapters})
    assert hidden.dtype == jnp.bfloat16
    want = forward(model, {**params, LORA: adapters})
    np.testing.assert_allclose(hidden.astype(jnp.float32), want, atol=0.15)


def row_keys(seed, rows=8):
    return jax.random.split(jax.random.key(seed), rows)


WITH_DROPOUT = dataclasses.replace(ALL, dropout=0.5)


@pytest.mark.slow
def test_each_row_s_dropout_depends_only_on_its_own_key():
    model, params, adapters = built("llama", WITH_DROPOUT)
    combined = {**params, LORA: adapters}
    first = forward(model, combined, dropout_keys=row_keys(0))
    np.testing.assert_array_equal(
        first, forward(model, combined, dropout_keys=row_keys(0))
    )
    other = forward(model, combined, dropout_keys=row_keys(1))
    assert (np.abs(first - other).max(axis=(1, 2)) > 1e-3).all()
    part = forward(model, combined, TOKENS[2:5], dropout_keys=row_keys(0)[2:5])
    np.testing.assert_allclose(part, first[2:5], atol=1e-5)


def test_there_is_no_dropout_without_keys_or_rate():
    model, params, adapters = built("llama", WITH_DROPOUT)
    combined = {**params, LORA: adapters}
    without_dropout = dataclasses.replace(model, lora=ALL)
    want = forward(without_dropout, combined)
    np.testing.assert_array_equal(forward(model, combined), want)
    got = forward(without_dropout, combined, dropout_keys=row_keys(0))
    np.testing.assert_allclose(got, want, atol=1e-6)
    new = lora.init(jax.random.key(5), model, WITH_DROPOUT)
    dropped = forward(model, {**params, LORA: new}, dropout_keys=row_keys(0))
    np.testing.assert_array_equal(dropped, forward(model, params))


def test_dropout_drops_a_share_of_the_inputs_and_keeps_the_mean():
    """Only the adapter's inputs are dropped: the kernel reads all of them."""
    config = LoraConfig(rank=1, alpha=1.0, dropout=0.25)
    layer = SimpleNamespace(up=SimpleNamespace(dot_general=lax.dot_general))
    adapters = {"up": {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}}
    lora.attach(layer, adapters, config, row_keys(0, 4))
    x, kernel = jnp.full((4, 2000, 1), 3.0), jnp.full((1, 1), 10.0)
    added = layer.up.dot_general(x, kernel, (((2,), (0,)), ((), ()))) - 30.0
    values, counts = np.unique(added.round(4), return_counts=True)
    assert values.tolist() == [0.0, 4.0]
    np.testing.assert_allclose(counts / 8000, [0.25, 0.75], atol=0.02)
    rows = np.asarray(added[..., 0])
    assert (rows[0] != rows[1]).mean() > 0.3


def test_every_kernel_of_every_layer_has_its_own_dropout():
    config = LoraConfig(rank=1, alpha=1.0, dropout=0.5)

    def plain():
        return SimpleNamespace(dot_general=lax.dot_general)

    layer = SimpleNamespace(up=plain(), gate=plain())
    adapter = {"a": jnp.ones((1, 1)), "b": jnp.ones((1, 1))}
    lora.attach(layer, {"up": adapter, "gate": adapter}, config, row_keys(0, 2))
    x, dimensions = jnp.ones((2, 500, 1)), (((2,), (0,)), ((), ()))
    up, gate = (
        linear.dot_general(x, jnp.ones((1, 1)), dimensions)
        for linear in (layer.up, layer.gate)
    )
    assert 0.4 < (up != gate).mean() < 0.6

    # The keys of each layer, recorded in place of its adapters.
    recorded = []
    model, params, adapters = built("gpt2", WITH_DROPOUT)

    def record(block, adapters, config, keys):
        jax.debug.callback(recorded.append, jax.random.key_data(keys))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "attach", record)
        model.forward({**params, LORA: adapters}, TOKENS, dropout_keys=row_keys(0))
        jax.effects_barrier()
    assert len(np.unique(np.concatenate(recorded), axis=0)) == 2 * 8


def test_adapters_are_split_like_their_kernel_and_never_along_the_rank():
    model, _, adapters = built("llama")
    rules = lora.partition_rules(model.partition_rules, adapters)
    specs = sharding.partition_specs(rules, {"student": {LORA: adapters}})
    got = specs["student"][LORA]
    assert got["attention"]["query"] == {
        "a": P(None, "fsdp", None),
        "b": P(None, None, "tensor"),
    }
    assert got["mlp"]["down"] == {
        "a": P(None, "tensor", None),
        "b": P(None, None, "fsdp"),
    }
    with pytest.raises(ValueError, match="rule matches 'layers/attention/key/kernel'"):
        lora.partition_rules([("query", P())], adapters)


@pytest.mark.slow
def test_sharding_does_not_change_values_and_gradients():
    """The mesh splits data, fsdp and tensor; the adapters have dropout."""
    model, params, adapters = built("llama", WITH_DROPOUT)

    def loss(adapters, params, tokens, keys):
        combined = {**params, LORA: adapters}
        hidden, _ = model.forward(combined, tokens, dropout_keys=keys)
        return jnp.mean(hidden**2), hidden

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (want, want_hidden), want_grads = run(adapters, params, TOKENS, row_keys(0))
    mesh = sharding.make_mesh(2, 2, 2)
    rules = model.partition_rules
    places = sharding.shardings(mesh, rules, params)
    adapter_places = sharding.shardings(
        mesh, lora.partition_rules(rules, adapters), adapters
    )
    by_row = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        (got, hidden), grads = run(
            jax.device_put(adapters, adapter_places),
            jax.device_put(params, places),
            jax.device_put(TOKENS, by_row),
            jax.device_put(row_keys(0), by_row),
        )
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(hidden, want_hidden, atol=3e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4),
        grads,
        want_grads,
    )


def test_the_backward_pass_keeps_no_output_of_adapters():
    """It keeps the outputs [L, B, T, F] of the kernels gate and up, and no others."""
    model = dataclasses.replace(
        models.from_config(LLAMA | {"intermediate_size": 52}),
        lora=LoraConfig(rank=3, targets="mlp"),
    )
    params = model.abstract_params()
    adapters = jax.eval_shape(lambda: lora.init(jax.random.key(0), model, model.lora))

    def loss(adapters, params):
        return jnp.sum(model.forward({**params, LORA: adapters}, TOKENS)[0])

    program = jax.make_jaxpr(jax.grad(loss))(adapters, params)
    loops = [eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == "scan"]
    kept = [[var.aval.shape for var in loop.outvars] for loop in loops]
    assert len(kept) == 2 and kept[0].count((2, 8, 9, 52)) == 2
    assert kept[0].count((2, 8, 9, 3)) == 3
    # The backward pass computes gradients of adapters, and none of a kernel.
    assert (2, 3, 52) in kept[1] and not {(2, 16, 52), (2, 52, 16)} & {*kept[1]}
