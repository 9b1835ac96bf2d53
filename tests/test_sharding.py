"""The mesh, the strict partition rules, and batches on the mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from tiny import GPT2, OPT

from mgsr_jax import models, sharding
from mgsr_jax.losses import init_clip_network
from mgsr_jax.train_step import init_state
from mgsr_jax.training.optimizer import OptimizerConfig, make_optimizer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}
FAMILIES = {
    "gpt2": GPT2,
    "opt": OPT,
    "opt_350m": OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 8},
    "llama": LLAMA,
    "llama_tied": LLAMA | {"tie_word_embeddings": True},
    "llama_biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "mistral": LLAMA | {"model_type": "mistral"},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 4},
}


def shapes(**sizes):
    return {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in sizes.items()}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 0}, "mesh.fsdp=0; expected at least 1, or -1"),
        ({"tensor": -2}, "mesh.tensor=-2; expected"),
        ({"fsdp": -1}, "more than one -1"),
    ],
)
def test_sizes_that_fit_no_devices_are_refused(sizes, message):
    sharding.MeshConfig(data=1, fsdp=-1).check()
    with pytest.raises(ValueError, match=message):
        sharding.MeshConfig(**sizes).check()


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": 2, "fsdp": 4}, (2, 4, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4)),
    ],
)
def test_one_size_of_the_mesh_may_be_minus_one(sizes, shape):
    mesh = sharding.make_mesh(**sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(sharding.AXES, shape, strict=True))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 3},
        {"data": -1, "fsdp": 3},
        {"data": -1, "fsdp": -1},
        {"data": 0},
        {"data": -1, "fsdp": 0},
        {"data": -2, "fsdp": -4},
        {"data": 16},
    ],
)
def test_a_mesh_that_does_not_fill_the_devices_raises(sizes):
    with pytest.raises(ValueError, match=r"mesh data=.* does not fill the 8 devices"):
        sharding.make_mesh(**sizes)


def test_a_mesh_can_use_some_of_the_devices():
    devices = jax.devices()[2:6]
    mesh = sharding.make_mesh(fsdp=2, devices=devices)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert set(mesh.devices.flat) == set(devices)


def test_the_first_matching_rule_gives_the_spec():
    tree = {"a": shapes(kernel=(4, 4), bias=(4,)), "b": shapes(kernel=(4, 4), n=())}
    rules = [("^a/kernel$", P("fsdp")), ("kernel$", P(None, "tensor")), ("bias$", P())]
    assert sharding.partition_specs(rules, tree) == {
        "a": {"kernel": P("fsdp"), "bias": P()},
        "b": {"kernel": P(None, "tensor"), "n": P()},
    }


def test_the_error_for_a_parameter_without_a_rule_names_it():
    with pytest.raises(
        ValueError, match=r"no partition rule matches 'a/scale'.*\(3,\)"
    ):
        sharding.partition_specs([("kernel", P())], {"a": shapes(scale=(3,))})


def test_the_error_for_a_rule_without_a_parameter_names_it():
    """Also for a rule that an earlier rule always precedes."""
    tree = shapes(kernel=(4, 4))
    for unused in ("bias$", "ker"):
        with pytest.raises(ValueError, match=re.escape(f"parameter: ['{unused}']")):
            sharding.partition_specs([("kernel", P()), (unused, P())], tree)


@pytest.mark.parametrize(
    "spec", [P("fsdp"), P(None, ("data", "fsdp")), P(None, None, "fsdp")]
)
def test_the_error_for_a_dimension_that_does_not_divide_names_it(spec):
    mesh = sharding.make_mesh(2, 4)
    tree = {"embed": shapes(embedding=(6, 4))}
    with pytest.raises(
        ValueError, match=r"'embed/embedding' of shape \(6, 4\).*'fsdp'"
    ):
        sharding.shardings(mesh, [("embedding", spec)], tree)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rules_of_every_family_match_its_parameters_and_their_moments(family):
    """A leaf without a rule, or a rule without a leaf, would raise."""
    model = models.from_config(FAMILIES[family])
    mesh = sharding.make_mesh(2, 2, 2)
    params = model.abstract_params()
    places = sharding.shardings(mesh, model.partition_rules, params)
    split = [place.spec for place in jax.tree.leaves(places) if any(place.spec)]
    assert len(split) > 5
    state = jax.eval_shape(
        lambda params: init_state(params, make_optimizer(OptimizerConfig(), 3), seed=0),
        {
            "student": params,
            "clip_network": init_clip_network(jax.random.key(0), num_candidates=4),
        },
    )
    rules = (("clip_network/", P()), *model.partition_rules)
    got = sharding.shardings(mesh, rules, state)
    assert got.params["student"] == places
    # mu and nu of each parameter have the sharding of the parameter.
    moments = [
        jax.tree.leaves(tree["student"])
        for tree in _moments(got.opt_state.inner_states["student"])
    ]
    assert moments == [jax.tree.leaves(places)] * 2


def _moments(opt_state):
    def is_adam(node):
        return hasattr(node, "mu")

    (adam,) = filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam))
    return adam.mu, adam.nu


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(2, 4)
    rows = jax.tree.map(np.asarray, tiny.complete([(2, 3)] * 16))
    put = sharding.put_batch(mesh, rows)
    for leaf, host in zip(jax.tree.leaves(put), jax.tree.leaves(rows), strict=True):
        np.testing.assert_array_equal(leaf, host)
        assert leaf.sharding == sharding.batch_sharding(mesh)
        assert {s.data.shape[0] for s in leaf.addressable_shards} == {2}
        assert len({str(s.index) for s in leaf.addressable_shards}) == 8


def test_a_batch_that_does_not_divide_raises():
    mesh = sharding.make_mesh(2, 4)
    rows = jax.tree.map(np.asarray, tiny.complete([(2, 3)] * 12))
    with pytest.raises(
        ValueError, match=r"12 rows .* data=2 x fsdp=4; use a multiple of 8"
    ):
        sharding.put_batch(mesh, rows)


def test_a_replicated_array_is_whole_on_every_device():
    mesh = sharding.make_mesh(2, 4)
    array = jax.device_put(jnp.arange(3), sharding.replicated(mesh))
    assert [s.data.shape for s in array.addressable_shards] == [(3,)] * 8
