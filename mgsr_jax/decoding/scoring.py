"""The divergence of two models at every token of rows that both have read."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mgsr_jax.decoding.decode import Decoding
from mgsr_jax.losses import forward_kl
from mgsr_jax.rows import Rows
from mgsr_jax.sharding import BATCH, constrain

SCORED_POSITIONS = 16
"""Positions of the decoded rows whose logits exist at a time."""

Unembed = Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]]


def positions_at_a_time(rows: int, decode_rows: int | None) -> int:
    """Positions whose logits exist at a time.

    Scaled by the share of rows that are decoded together, so that a chunk holds the
    same number of tokens.
    """
    return max(1, SCORED_POSITIONS * (decode_rows or rows) // rows)


@jax.named_scope("token_kl")
def token_kl(
    unembed: tuple[Unembed, Unembed],
    hidden: tuple[Float[Array, "B S D"], Float[Array, "B S E"]],
    rows: Rows,
    after: Int[Array, "B"],
    decoding: Decoding,
) -> Float[Array, "B S"]:
    """KL(teacher || student) in nats for each token behind the index `after`.

    Logits exist for a few positions at a time. Values of tokens up to `after`, and
    beyond a row's length, have no meaning.

    Args:
      unembed: logits of hidden states, by the student and by the teacher.
      hidden: hidden states of both models; index t predicts token t + 1.
      rows: the rows that they are of.
      after: index of each row's last token that is not scored.
      decoding: `vocab_size`, and the rows that are decoded at a time.
    """
    batch, width = rows.tokens.shape
    # Decoding splits hidden states along D: they are exchanged once, not per chunk.
    hidden = constrain(hidden, BATCH)
    chunk = min(positions_at_a_time(batch, decoding.decode_rows), width - 1)

    def score(i: Int[Array, ""], kl: Float[Array, "B S"]) -> Float[Array, "B S"]:
        # The last chunk is shifted left to stay full; positions that overlap are
        # recomputed to the same value.
        start = jnp.minimum(i * chunk, width - 1 - chunk)
        student, teacher = (
            lax.dynamic_slice_in_dim(states, start, chunk, 1) for states in hidden
        )
        values = forward_kl(
            unembed[0](student), unembed[1](teacher), vocab_size=decoding.vocab_size
        )
        # The output at t predicts token t + 1.
        return lax.dynamic_update_slice_in_dim(kl, values, start + 1, axis=1)

    first = jnp.min(after) // chunk
    last = (jnp.max(rows.lengths) - 2) // chunk
    return lax.fori_loop(first, last + 1, score, jnp.zeros(rows.tokens.shape))
