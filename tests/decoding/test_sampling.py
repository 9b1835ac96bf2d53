"""One token per row: its distribution, its filters, its precision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax import sharding
from mgsr_jax.decoding.sampling import GREEDY, Sampling, _filtered, sample
from mgsr_jax.planning.compiled import collectives


def test_samples_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    many = jnp.broadcast_to(logits, (4000, 4))

    def shares(sampling):
        keys = jax.random.split(jax.random.key(0), 4000)
        return np.bincount(sample(many, keys, sampling), minlength=4) / 4000

    for sampling, want in (
        (Sampling(), [0.5, 0.3, 0.15, 0.05]),
        (Sampling(top_k=2), [0.625, 0.375, 0, 0]),
        (Sampling(top_p=0.81), [0.526, 0.316, 0.158, 0]),
    ):
        np.testing.assert_allclose(shares(sampling), want, atol=0.03)
    flat = np.array([0.5, 0.3, 0.15, 0.05]) ** 0.5
    want = flat / flat.sum()
    np.testing.assert_allclose(shares(Sampling(temperature=2.0)), want, atol=0.03)
    assert shares(GREEDY).tolist() == [1, 0, 0, 0]
    assert shares(Sampling(top_p=1e-6)).tolist() == [1, 0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [Sampling(top_k=5), Sampling(top_p=0.7)])
def test_filters_compare_all_columns_of_a_sharded_vocabulary(sampling):
    logits = 3 * jax.random.normal(jax.random.key(0), (8, 64))
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(1)))(jnp.arange(8))
    pick = jax.jit(partial(sample, sampling=sampling))
    want = pick(logits, keys)
    mesh = sharding.make_mesh(2, 2, 2)
    placement = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))
    with jax.set_mesh(mesh):
        logits = jax.device_put(logits, placement)
        keys = jax.device_put(keys, sharding.batch_sharding(mesh))
        got = pick(logits, keys)
        sent = collectives(pick.lower(logits, keys).compile().as_text())
    np.testing.assert_array_equal(got, want)
    # Rows keep their devices: two of eight per device, in float32.
    assert sent == {"all-gather": (1, 2 * 64 * 4)}


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95])
def test_the_nucleus_holds_the_fewest_tokens_of_its_mass(top_p):
    """Compared with a loop over the sorted tokens."""
    logits = 2 * jax.random.normal(jax.random.key(3), (6, 50))
    logits = logits.at[0, 10:].set(-jnp.inf).at[1].set(jnp.round(logits[1]))
    kept = _filtered(logits, Sampling(top_p=top_p, temperature=0.7)) > -jnp.inf
    for row, found in zip(np.asarray(logits, np.float64), kept, strict=True):
        probs = np.exp(row / 0.7) / np.exp(row / 0.7).sum()
        nucleus, mass = np.zeros(50, bool), 0.0
        for value in np.unique(row)[::-1]:  # equal tokens together
            if mass < top_p:
                nucleus |= row == value
            mass += probs[row == value].sum()
        np.testing.assert_array_equal(found, nucleus & (row > -np.inf))


def test_bfloat16_logits_are_sampled_in_float32():
    logits = jnp.full((64, 1000), -3.0, jnp.bfloat16)
    keys = jax.random.split(jax.random.key(0), 64)
    assert len(np.unique(sample(logits, keys))) > 50
