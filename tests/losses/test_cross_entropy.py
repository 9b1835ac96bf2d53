"""Cross-entropy on labels."""

import jax
import jax.numpy as jnp
import numpy as np
from losses.two_distributions import normal

from mgsr_jax import losses


def test_a_perfect_next_token_predictor_has_no_loss():
    labels = jnp.array([2, 0, 1])
    logits = 50.0 * jax.nn.one_hot(labels, 4)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), 0, atol=1e-6)
    # Scored against the token itself, one step earlier, it would have a large loss.
    assert losses.cross_entropy(logits, jnp.roll(labels, 1)).min() > 40


def test_a_label_that_is_no_token_has_infinite_loss_unless_masked():
    logits, labels = normal((4, 6)), jnp.array([-100, 6, 5, 2])
    values = losses.cross_entropy(logits, labels, vocab_size=5)
    assert jnp.isposinf(values).tolist() == [True, True, True, False]
    where = jnp.array([False, False, False, True])
    masked = losses.cross_entropy(logits, labels, vocab_size=5, where=where)
    np.testing.assert_array_equal(masked, jnp.where(where, values, 0))
