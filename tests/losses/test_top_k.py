"""`top_k` and `threshold` on every platform, against sorts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax.losses import _top_k, threshold, top_k

DRAW = np.random.default_rng(0)
ROWS = {
    "normal": DRAW.normal(size=(5, 700)),
    "ties": DRAW.integers(-3, 3, (5, 700)),
    "equal": np.zeros((2, 700)),
    "few that can occur": np.where(DRAW.random((5, 700)) < 0.9, -np.inf, 1.0),
    "signed zeros": DRAW.choice([0.0, -0.0, -1.0], (5, 700)),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("k", [5, 129, 512, 700])
def test_no_platform_s_form_differs_from_a_sort(rows, dtype, k):
    rows = jnp.where(rows == 0, 0.0, rows).astype(dtype)
    values, indices = jax.lax.top_k(rows, k)
    for form in (_top_k._in_parts, _top_k._by_threshold):
        found = jax.jit(partial(form, k=k))(rows)
        assert found[0].dtype == values.dtype and found[1].dtype == indices.dtype
        np.testing.assert_array_equal(found[0], values)
        np.testing.assert_array_equal(found[1], indices)


@pytest.mark.parametrize(
    "spec", [P("data"), P(), P(None, "tensor"), P(("data", "tensor"))], ids=str
)
@pytest.mark.parametrize("k", [5, 40])
def test_rows_whose_types_are_split_keep_their_devices(spec, k):
    rows = jnp.asarray(DRAW.normal(size=(8, 64)), jnp.float32)
    values, indices = jax.lax.top_k(rows, k)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(partial(top_k, k=k))(jax.device_put(rows, spec))
    np.testing.assert_array_equal(found[0], values)
    np.testing.assert_array_equal(found[1], indices)
    kept = P(*spec[:1]) if spec != P(None, "tensor") else P()
    assert found[0].sharding.is_equivalent_to(NamedSharding(mesh, kept), 2)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("limit", [0.01, 3.0, 1e9])
def test_a_threshold_is_that_of_a_search_by_hand(rows, limit):
    weights = DRAW.random(rows.shape).astype(np.float32)
    found = threshold(jnp.asarray(rows, jnp.float32), jnp.asarray(weights), limit)
    for x, w, t in zip(rows, weights, np.asarray(found)[:, 0], strict=True):
        fits = [v for v in np.unique(x) if w[x > v].sum(dtype=np.float64) < limit]
        expected = -np.inf if limit > w.sum() else np.float32(min(fits))
        assert t == expected
