"""AdaSwitch: the student begins a response, the teacher may take over once.

  d_i = KL(p_i || q_i)                                 at the student's tokens
  m_i = (d_{i-L} + ... + d_{i-1}) / L                  a moving average
  s   = the first i with d_i > ratio * m_i;  the teacher writes y_s and all that follows

Source: Peng et al. (arXiv 2510.07842), as reviews of it say: one switch, the direction
of the KL, the window of length L, and the threshold as a multiple (K in the paper) of
the average before the token. We could not read the whole paper. Ours: the first L
tokens of a response never switch, since their average is not complete; the values of L
and of the ratio; the teacher draws at temperature 1.

The student's tokens before the switch do not depend on it, so the student writes the
whole response, the teacher reads it in one pass, and the row is cut back.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mgsr_jax.decoding.decode import DecodeState, Decoding, decode, take
from mgsr_jax.decoding.reading import read_whole
from mgsr_jax.decoding.sampling import ANCESTRAL, TEACHER_STREAM, Sampling, row_keys
from mgsr_jax.decoding.scoring import token_kl
from mgsr_jax.interventions.outcome import InterventionInfo, Outcome, Pair
from mgsr_jax.rows import Rows
from mgsr_jax.typing import Leaf, PRNGKey, RowKeys


@dataclasses.dataclass(frozen=True)
class Switch:
    """Settings of AdaSwitch.

    Attributes:
      ratio: multiple of the moving average above which the teacher takes over.
      window: tokens of the moving average, L.
      teacher_sampling: how the teacher draws a token.
    """

    ratio: Leaf = 3.0
    window: int = 10
    teacher_sampling: Sampling = ANCESTRAL


@jax.named_scope("hand_over")
def hand_over(
    pair: Pair,
    sampled: DecodeState,
    *,
    key: PRNGKey | RowKeys,
    decoding: Decoding,
    switch: Switch = Switch(),
) -> Outcome:
    """Cut responses back to their switch and let the teacher write the rest.

    Args:
      pair: the student that wrote `sampled`, and the teacher.
      sampled: finished rows, from `decode`.
      key: of the step, or one per row.
      decoding: when a row is finished; how many rows are decoded at a time.
      switch: settings of AdaSwitch.
    """
    rows, teacher = sampled.rows, pair.teacher
    read = read_whole(
        teacher, pair.teacher_params, rows, decode_rows=decoding.decode_rows
    )
    student_head, teacher_head = pair.heads()
    kl = token_kl(
        (
            partial(pair.student.unembed, student_head),
            partial(teacher.unembed, teacher_head),
        ),
        (sampled.hidden, read.hidden),
        rows,
        rows.prompt_lengths - 1,
        decoding,
    )
    position = find_switch(rows, kl, switch)
    kept = dataclasses.replace(rows, lengths=jnp.minimum(rows.lengths, position))
    written = decode(
        teacher,
        pair.teacher_params,
        dataclasses.replace(read, rows=kept, done=position >= rows.lengths),
        keys=row_keys(key, rows.example, TEACHER_STREAM, 0),
        decoding=dataclasses.replace(decoding, sampling=switch.teacher_sampling),
    )
    info = _statistics(rows, kl, position, written.rows)
    return Outcome(written.rows, info, written.hidden)


def find_switch(rows: Rows, kl: Float[Array, "B S"], switch: Switch) -> Int[Array, "B"]:
    """Index of the first token that the teacher writes; S where it writes none.

    Args:
      rows: the student's rows.
      kl: KL(teacher || student) in nats for the token of the same index.
      switch: settings of AdaSwitch.
    """
    width, window = rows.tokens.shape[1], switch.window
    index = jnp.arange(width)[None]
    start, end = rows.prompt_lengths[:, None], rows.lengths[:, None]
    # Not a difference of running sums: it would round small averages away.
    sums = lax.reduce_window(
        jnp.where(index >= start, kl, 0.0),
        0.0,
        lax.add,
        window_dimensions=(1, window),
        window_strides=(1, 1),
        padding=((0, 0), (window, 0)),
    )[:, :width]
    exceeds = kl > switch.ratio * sums / window
    switches = exceeds & (index >= start + window) & (index < end)
    first = jnp.argmax(switches, axis=1)
    return jnp.where(jnp.any(switches, axis=1), first, width)


def _statistics(
    samples: Rows, kl: Float[Array, "B S"], position: Int[Array, "B"], written: Rows
) -> InterventionInfo:
    index, width = jnp.arange(kl.shape[1])[None], kl.shape[1]
    behind = (index >= position[:, None]) & (index < written.lengths[:, None])
    at_switch = take(kl, jnp.minimum(position, width - 1))
    # The teacher reads a token for each one that it writes, from the one before it.
    decoded = jnp.sum(behind, axis=1)
    return InterventionInfo(
        teacher_wrote=behind,
        kl=jnp.where(position < width, at_switch, 0.0),
        student_generated=samples.lengths - samples.prompt_lengths,
        teacher_scored=samples.lengths - 1 + decoded,
    )
