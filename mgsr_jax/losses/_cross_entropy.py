"""Cross-entropy on labels: supervised fine-tuning's loss."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.losses._logits import clean, zero_where_masked


@jax.jit(static_argnames=("vocab_size",))
def cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Int[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    vocab_size: int | None = None,
) -> Float[Array, "*B"]:
    """Negative log-probability of each label, in nats.

    CE_t = -log softmax(logits_t)[labels_t]

    Nothing is shifted here: logits at index t predict the label at index t.

    Args:
      logits: the student's, any float dtype. [..., V]
      labels: token ids. One that is no column below `vocab_size` has probability 0,
        so a loss of infinity; at masked positions any value will do. [...]
      where: the positions to score; None for all of them. [...]
      vocab_size: columns at or beyond it are padding, with probability 0.

    Returns:
      float32, exactly 0 and without gradient at masked positions. [...]

    Raises:
      ValueError: `vocab_size` is not in 1..V.

    >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> [f"{ce:.4f}" for ce in cross_entropy(logits, jnp.array([0, 1]))]
    ['0.2395', '1.0986']
    """
    log_probs = jax.nn.log_softmax(clean(logits, where, vocab_size), axis=-1)
    column = lax.broadcasted_iota(labels.dtype, log_probs.shape, log_probs.ndim - 1)
    is_label = column == labels[..., None]
    picked = jnp.sum(jnp.where(is_label, log_probs, 0.0), axis=-1)
    known = (labels >= 0) & (labels < logits.shape[-1])
    return zero_where_masked(-jnp.where(known, picked, -jnp.inf), where)
