"""Labels, masks and weights that the losses read together with logits."""

from typing import NamedTuple, TypedDict

from mgsr_jax import losses
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
    """

    labels: Leaf
    where: Leaf
    span_ids: Leaf
    scored: Leaf
    labelled: Leaf
    pairs: Leaf
    weights: Leaf


class VocabArguments(TypedDict, total=False):
    """Arguments that every loss takes about the columns of logits."""

    vocab_size: int | None
    vocab_axis: str | None


def make_targets(rows: Rows, weights: Weights, objective: Objective) -> Targets:
    """The targets of `rows`, whose positions have these weights."""
    view = next_token_view(rows)
    return Targets(
        labels=view.labels,
        where=view.where,
        span_ids=view.span_ids,
        scored=scored_positions(rows, objective),
        labelled=view.where & rows.ground_truth[..., None],
        pairs=losses.span_pairs(view.span_ids, view.where),
        weights=weights,
    )
