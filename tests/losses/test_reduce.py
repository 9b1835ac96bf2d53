"""Sums over scored positions, and their mean."""

import jax
import jax.numpy as jnp

from mgsr_jax import losses


def test_sums_of_parts_add_up_to_the_sum_of_all():
    values, where = jnp.array([1.0, 2.0, jnp.nan, 5.0]), jnp.array([1, 1, 0, 1], bool)
    whole = losses.masked_sum(values, where)
    assert whole == (8.0, 3.0) and losses.masked_mean(values, where) == 8 / 3
    halves = [losses.masked_sum(values[i : i + 2], where[i : i + 2]) for i in (0, 2)]
    assert jax.tree.map(jnp.add, *halves) == whole


def test_half_precision_values_are_summed_in_float32():
    half = losses.masked_sum(jnp.full(2048, 1.001, jnp.bfloat16), jnp.ones(2048, bool))
    assert half.total.dtype == half.count.dtype == jnp.float32
    assert half.count == 2048  # bfloat16 would stop at 256


def test_masked_values_have_no_gradient():
    values, where = jnp.array([1.0, jnp.nan]), jnp.array([True, False])
    gradient = jax.grad(losses.masked_mean)(values, where)
    assert gradient.tolist() == [1.0, 0.0]
    nowhere = jnp.zeros(2, bool)
    assert losses.masked_mean(values, nowhere) == 0
    assert jax.grad(losses.masked_mean)(values, nowhere).tolist() == [0.0, 0.0]
