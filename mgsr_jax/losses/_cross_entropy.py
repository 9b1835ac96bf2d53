"""Cross-entropy on labels, the loss of supervised fine-tuning."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.losses._logits import clean, zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._vocabulary import Vocabulary


@jax.jit(static_argnames=("vocab_size", "vocab_axis"))
def cross_entropy(
    logits: Float[Array, "*B V"],
    labels: Int[Array, "*B"],
    *,
    where: Bool[Array, "*B"] | None = None,
    vocab_size: int | None = None,
    vocab_axis: Axis = None,
) -> Float[Array, "*B"]:
    """Negative log-probability of each label, in nats.

    CE_t = -log softmax(logits_t)[labels_t]

    Nothing is shifted here: logits at index t predict the label at index t.

    Maximum likelihood, the loss of supervised fine-tuning.

    Args:
      logits: the student's, any float dtype. [..., V]
      labels: token ids. An id that is no column below `vocab_size` has probability 0
        and infinite loss. Masked positions may hold any value. [...]
      where: the positions to score; None means all of them. [...]
      vocab_size: columns at or beyond it are padding, with probability 0.
      vocab_axis: mesh axis that V is split over; read from the type on Explicit axes.

    Returns:
      float32, exactly 0 and without gradient at masked positions. [...]

    Raises:
      ValueError: `vocab_size` is not in 1..V; V does not divide over `vocab_axis`.

    >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    >>> [f"{ce:.4f}" for ce in cross_entropy(logits, jnp.array([0, 1]))]
    ['0.2395', '1.0986']
    """

    def local(
        vocabulary: Vocabulary, logits: Array, labels: Array, where: Array | None
    ) -> Array:
        log_probs = vocabulary.log_softmax(clean(vocabulary, logits, where, vocab_size))
        is_label = vocabulary.columns(logits) == labels[..., None]
        picked = vocabulary.sum(jnp.where(is_label, log_probs, 0.0))
        is_column = (labels >= 0) & (labels < vocabulary.width(logits))
        return -jnp.where(is_column, picked, -jnp.inf)

    values = over_vocabulary(local, vocab_axis, (logits,), labels, where)
    return zero_where_masked(values, where)
