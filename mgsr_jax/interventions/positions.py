"""Rules for the position at which SCRG corrects a response."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mgsr_jax.rows import Rows
from mgsr_jax.typing import Leaf, RowKeys

Rule = Literal["argmax", "first", "early", "random"]


@dataclasses.dataclass(frozen=True)
class Position:
    """The position of a correction, among those where student and teacher disagree.

    `KL_t` is KL(teacher || student) for token t, `i_t` its index in the response:

      argmax   argmax of KL_t                                     (the paper)
      early    argmax of discount^i_t KL_t
      first    the smallest t whose KL_t is at least the `quantile` of the row's KLs
      random   uniform: the control, with as many corrections as argmax

    All rules except argmax are ours.

    Attributes:
      rule: one of the four.
      quantile: of "first", in [0, 1]; 0 takes the first disagreement.
      discount: of "early", in (0, 1]; 1 is argmax.
    """

    rule: Rule = "argmax"
    quantile: Leaf = 0.9
    discount: Leaf = 0.99


ARGMAX = Position()
"""The paper's rule."""


def priorities(
    position: Position,
    rows: Rows,
    kl: Float[Array, "B S"],
    searched: Bool[Array, "B S"],
    keys: RowKeys,
) -> Float[Array, "B S"]:
    """Priority of each token: the error is the disagreement with the highest one.

    Args:
      position: the rule.
      rows: the student's rows.
      kl: KL(teacher || student) for the token of the same index, in nats.
      searched: tokens that may be the error; the others get minus infinity.
      keys: one per row, for "random". The position is folded in, so a priority does not
        depend on the width of the rows.

    Raises:
      ValueError: an unknown rule.
    """
    index = jnp.arange(rows.tokens.shape[1])
    if position.rule == "random":
        fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))
        values = jax.vmap(jax.vmap(jax.random.uniform))(fold(keys, index))
    elif position.rule == "early":
        offset = index[None] - rows.prompt_lengths[:, None]
        values = kl * jnp.float32(position.discount) ** offset
    elif position.rule == "first":
        reached = kl >= _quantile(kl, searched, position.quantile)[:, None]
        values = jnp.where(reached, -index[None].astype(jnp.float32), -jnp.inf)
    elif position.rule == "argmax":
        values = kl
    else:
        rules = get_args(Rule)
        raise ValueError(f"position rule={position.rule!r}; expected one of {rules}")
    return jnp.where(searched, values, -jnp.inf)


def _quantile(
    values: Float[Array, "B S"], where: Bool[Array, "B S"], quantile: Leaf
) -> Float[Array, "B"]:
    """The smallest value that is not below the quantile of a row's values.

    As `numpy.quantile` with the method "higher".
    """
    ordered = jnp.sort(jnp.where(where, values, jnp.inf), axis=1)
    last = jnp.maximum(jnp.sum(where, axis=1) - 1, 0)
    # Without the margin, 0.9 * 10 in float32 may be just above 9.
    index = jnp.ceil(jnp.float32(quantile) * last - 1e-4).astype(jnp.int32)
    return jnp.take_along_axis(ordered, jnp.maximum(index, 0)[:, None], axis=1)[:, 0]
