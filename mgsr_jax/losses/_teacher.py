"""A teacher that was cut to its most probable classes, as it is kept on disk."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mgsr_jax.losses._logits import clean
from mgsr_jax.typing import Leaf


class TopKTeacher(NamedTuple):
    """The K most probable classes of each position and what all classes sum to.

    log p_k = logits_k - logsumexp; the classes that are not listed share the rest,
    1 - sum_k p_k. Only differences to `logsumexp` count: a constant may be added to
    `logits` and `logsumexp` alike. There is no temperature other than 1.

    Attributes:
      logits: the teacher's, of the K classes, in any order; any float dtype. [..., K]
      indices: their columns in the vocabulary, all different. int [..., K]
      logsumexp: log of the sum of exp(logits) over the whole vocabulary. float [...]
    """

    logits: Leaf
    indices: Leaf
    logsumexp: Leaf


@jax.jit(static_argnames=("k", "vocab_size"))
def top_k_teacher(
    teacher_logits: Float[Array, "*B V"], k: int, *, vocab_size: int | None = None
) -> TopKTeacher:
    """The K most probable classes of dense logits.

    logits_k = z_k - z_1,  logsumexp = log sum_v exp(z_v - z_1),  z_1 >= z_2 >= ...

    Relative to the largest, so that large logits cost the tail no precision.

    Args:
      teacher_logits: any float dtype. [..., V]
      k: how many classes to keep; all of them where there are fewer.
      vocab_size: columns at or beyond it are padding, with probability 0.

    Returns:
      A `TopKTeacher` in descending order; logits float32, indices int32.

    Raises:
      ValueError: `k` is below 1; `vocab_size` is not in 1..V.

    >>> teacher = top_k_teacher(jnp.array([3.0, 9.0, 7.0, 7.5]), 2)
    >>> print(teacher.logits, teacher.indices, f"{teacher.logsumexp:.4f}")
    [ 0.  -1.5] [1 3] 0.3082
    """
    if k < 1:
        raise ValueError(f"k={k}; expected at least 1")
    logits = clean(lax.stop_gradient(teacher_logits), None, vocab_size)
    tokens = logits.shape[-1] if vocab_size is None else vocab_size
    top, indices = lax.top_k(logits, min(k, tokens))
    largest = top[..., :1]
    return TopKTeacher(
        logits=top - largest,
        indices=indices,
        logsumexp=jax.nn.logsumexp(logits - largest, axis=-1),
    )
