"""The division of tokens into overlapping chunks, and the gradients written back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgsr_jax.losses import chunked


@pytest.mark.parametrize("overlap", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 10])
def test_every_token_is_read_and_gets_its_gradient(tokens, overlap):
    """Products of tokens up to `overlap` apart, also with fewer tokens than that."""
    rng = np.random.default_rng(11)
    x = jnp.asarray(rng.normal(size=(tokens, 1)), jnp.float32)
    weights = jnp.asarray(rng.uniform(0.5, 1, (tokens,)), jnp.float32)
    sizes = range(2 * overlap, 2 * overlap + 3)

    @jax.jit
    def run(x):
        whole = jax.value_and_grad(_whole)(x, weights, overlap)
        fn = functools.partial(_products, overlap=overlap)

        def in_chunks(x, chunk_size):
            how = {"chunk_size": chunk_size, "overlap": overlap}
            return chunked(fn, (), x, weights, **how)[0]

        return whole, [jax.value_and_grad(in_chunks)(x, size) for size in sizes]

    (want, want_gradient), results = run(x)
    for value, gradient in results:
        np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(gradient, want_gradient, rtol=1e-6, atol=1e-7)


def _products(shared, x, weights, overlap):
    count = x.shape[0]
    padded = jnp.pad(x, ((0, overlap), (0, 0)))
    products = sum(x * padded[i : i + count] ** 2 for i in range(1, overlap + 1))
    own = jnp.arange(count) < count - overlap
    return jnp.sum(jnp.where(own, weights * products[:, 0], 0)), ()


def _whole(x, weights, overlap):
    pad = (0, overlap)
    return _products((), jnp.pad(x, (pad, (0, 0))), jnp.pad(weights, pad), overlap)[0]
