"""One token per row from logits, and the random keys that make a sample reproducible.

A token's key depends on (step, sample, example, stream, round, position), so a response
does not depend on the batch, the micro-batch, the host or the device it is drawn in.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.losses import threshold
from mgsr_jax.losses import top_k as largest
from mgsr_jax.rows import Rows
from mgsr_jax.sharding import constrain
from mgsr_jax.typing import BATCH_AXES, Leaf, PRNGKey, RowKeys

STUDENT_STREAM, TEACHER_STREAM, POSITION_STREAM = 0, 1, 2
"""Streams of random numbers: the student's tokens, the teacher's, and positions."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Under `jax.jit` the temperature is traced, the rest static.

    Attributes:
      temperature: 0 is greedy.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: then keep the fewest most probable tokens that hold this mass; 1 keeps all.
    """

    temperature: Leaf = 1.0
    top_k: int = dataclasses.field(default=0, metadata={"static": True})
    top_p: float = dataclasses.field(default=1.0, metadata={"static": True})


ANCESTRAL = Sampling()
"""Draws from the model's distribution as it is."""

GREEDY = Sampling(temperature=0.0)
"""Takes the most probable token."""


def sample_keys(key: PRNGKey, samples: int) -> RowKeys:
    """One key for each response to a prompt.

    The first is `key`, so the first responses do not depend on how many follow.
    """
    # No example has these numbers, which are folded in where examples are.
    numbers = jnp.uint32(2**32 - 1) - jnp.arange(samples - 1, dtype=jnp.uint32)
    others = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
    return jnp.concatenate([key[None], others])


def row_keys(
    key: PRNGKey | RowKeys,
    example: Int[Array, "B"],
    stream: int,
    round: Int[Array, ""] | int,
) -> RowKeys:
    """One key per row; the position is folded in where a token is drawn.

    Args:
      key: of the step, or of each row's response (see `sample_keys`).
      example: global index of each row's example.
      stream: one of the streams above.
      round: round of SCRG; 0 is the first response.
    """

    def fold(key: PRNGKey, example: Int[Array, ""]) -> PRNGKey:
        by_stream = jax.random.fold_in(jax.random.fold_in(key, example), stream)
        return jax.random.fold_in(by_stream, round)

    return jax.vmap(fold, (0 if key.ndim else None, 0))(key, example)


def sample(
    logits: Float[Array, "B V"], keys: RowKeys, sampling: Sampling = ANCESTRAL
) -> Int[Array, "B"]:
    """One token per row by the Gumbel-max rule.

      token = argmax_v (logits_v + temperature * noise_v),  noise_v ~ Gumbel(0, 1)

    Dividing by the temperature shows that this draws from softmax(logits /
    temperature); at temperature 0 it is the argmax. Top-k comes before top-p. All
    arithmetic is in float32.
    """
    logits = _filtered(logits.astype(jnp.float32), sampling)

    def draw() -> Float[Array, "B V"]:
        return jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)

    temperature = sampling.temperature
    noise = jax.lax.cond(temperature > 0, draw, lambda: jnp.zeros_like(logits))
    return _first_max(logits + temperature * noise)


def _filtered(logits: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Minus infinity at the tokens that top-k and top-p leave out."""
    if sampling.top_k or sampling.top_p < 1.0:
        # A filter compares all columns of a row. Over a sharded axis lax.top_k has
        # returned wrong values on GPUs (jax-ml/jax#19271).
        logits = constrain(logits, P(BATCH_AXES))
    if sampling.top_k:
        kth = largest(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits >= kth, logits, -jnp.inf)
    if sampling.top_p < 1.0:
        logits = jnp.where(_nucleus(logits, sampling), logits, -jnp.inf)
    return logits


def _nucleus(logits: Float[Array, "B V"], sampling: Sampling) -> Bool[Array, "B V"]:
    """The fewest most probable tokens that hold the mass `top_p`; at least one."""
    scale = jnp.where(sampling.temperature > 0, sampling.temperature, 1.0)
    probs = jax.nn.softmax(logits / scale, axis=-1)
    return logits >= threshold(logits, probs, sampling.top_p)


def _first_max(x: Float[Array, "B V"]) -> Int[Array, "B"]:
    """`argmax` as two plain reductions, which XLA vectorises on a CPU."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    is_max = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_max, index, x.shape[-1] - 1), axis=-1)


def repeats_ngram(rows: Rows, n: int, vocab: int) -> Bool[Array, "B V"]:
    """Tokens that would complete an n-gram which the row already contains."""

    def repeats(tokens: Int[Array, "S"], length: Int[Array, ""]) -> Bool[Array, "V"]:
        width = tokens.shape[0]
        tail = jax.lax.dynamic_slice(tokens, (length - (n - 1),), (n - 1,))
        starts = jnp.arange(width - n + 1)
        windows = tokens[starts[:, None] + jnp.arange(n)[None]]
        same = jnp.all(windows[:, :-1] == tail[None], axis=-1)
        is_complete = (starts + n <= length) & (length >= n)
        index = jnp.where(same & is_complete, windows[:, -1], vocab)
        return jnp.zeros(vocab, bool).at[index].set(True, mode="drop")

    return jax.vmap(repeats)(rows.tokens, rows.lengths)


def mask_vocab(
    logits: Float[Array, "B V"], vocab_size: int | None
) -> Float[Array, "B V"]:
    """Minus infinity in the columns at or beyond `vocab_size`."""
    if vocab_size is None:
        return logits
    columns = jnp.arange(logits.shape[-1])[None]
    return jnp.where(columns < vocab_size, logits, -jnp.inf)


def is_eos(token: Int[Array, "B"], eos_ids: tuple[int, ...]) -> Bool[Array, "B"]:
    """True where a token is one of the stop ids."""
    return jnp.isin(token, jnp.asarray(eos_ids, token.dtype))
