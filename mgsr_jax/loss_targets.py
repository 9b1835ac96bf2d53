"""Labels, masks and weights that the losses read together with logits."""

from typing import NamedTuple, TypedDict

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax import losses
from mgsr_jax.losses import Sum, masked_sum
from mgsr_jax.objective import Objective, Weights, scored_positions
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.typing import Leaf


class Targets(NamedTuple):
    """All that the losses read in addition to logits; index t is about labels[t].

    Attributes:
      labels: the tokens to predict. [..., T]
      where: positions of a response. [..., T]
      span_ids: the phrase of each label, negative for none. [..., T]
      scored: positions where the divergence counts. [..., T]
      labelled: positions where the label counts: it is the data's own. [..., T]
      pairs: positions whose pair with the next position counts. [..., T]
      weights: of the three losses. [..., T] each
      teacher: index of the row's teacher; None: there is one. [..., T]
    """

    labels: Leaf
    where: Leaf
    span_ids: Leaf
    scored: Leaf
    labelled: Leaf
    pairs: Leaf
    weights: Leaf
    teacher: Leaf = None


class VocabArguments(TypedDict, total=False):
    """Arguments that every loss takes about the columns of logits."""

    vocab_size: int | None
    vocab_axis: str | None


def make_targets(rows: Rows, weights: Weights, objective: Objective) -> Targets:
    """The targets of `rows`, whose positions have these weights."""
    view, teacher = next_token_view(rows), rows.teacher
    if teacher is not None:
        teacher = jnp.broadcast_to(teacher[..., None], view.labels.shape)
    return Targets(
        labels=view.labels,
        where=view.where,
        span_ids=view.span_ids,
        scored=scored_positions(rows, objective),
        labelled=view.where & rows.ground_truth[..., None],
        pairs=losses.span_pairs(view.span_ids, view.where),
        weights=weights,
        teacher=teacher,
    )


def by_teacher(
    name: str,
    values: Float[Array, "*B"],
    where: Bool[Array, "*B"],
    targets: Targets,
    teachers: tuple[str, ...],
) -> dict[str, Sum]:
    """Sums of `values` over the positions of each teacher, as NAME/TEACHER."""
    return {
        f"{name}/{teacher}": masked_sum(values, where & (targets.teacher == i))
        for i, teacher in enumerate(teachers)
    }
