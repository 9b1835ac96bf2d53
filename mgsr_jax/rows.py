"""The one layout of token sequences: left-aligned rows.

A row is prompt, response, padding, from index 0. Rows of the data set, generated,
replayed and corrected rows are the same record. Masks come from lengths, never from
token ids (padding may equal end-of-sequence). Labels are shifted here and nowhere else.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mgsr_jax.typing import Leaf

NO_SPAN = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of token sequences; leading axes may be added to every field alike.

    Attributes:
      tokens: prompt, response, padding. [B, S]
      prompt_lengths: tokens of the prompt. [B]
      lengths: tokens of prompt and response, the closing end-of-sequence included. [B]
      span_ids: the phrase that token i belongs to, -1 for none. [B, S]
      example: global index of the example; random keys are folded by it. [B]
      ground_truth: False for text that a model wrote. [B]
    """

    tokens: Leaf
    prompt_lengths: Leaf
    lengths: Leaf
    span_ids: Leaf
    example: Leaf
    ground_truth: Leaf


class NextTokenView(NamedTuple):
    """What a loss reads: index t of each field is about predicting labels[t]."""

    inputs: Int[Array, "*B T"]
    labels: Int[Array, "*B T"]
    where: Bool[Array, "*B T"]
    span_ids: Int[Array, "*B T"]


def next_token_view(rows: Rows) -> NextTokenView:
    """Shifts labels and span ids by one: T = S - 1.

    `where[b, t]` is True where the label is a token of the response, that is for
    `prompt_lengths[b] - 1 <= t < lengths[b] - 1`.

    >>> rows = from_lists([[5, 6]], [[7, 2]], width=6)
    >>> view = next_token_view(jax.tree.map(jnp.asarray, rows))
    >>> view.labels.tolist(), view.where.astype(int).tolist()
    ([[6, 7, 2, 0, 0]], [[0, 1, 1, 0, 0]])
    """
    first, end = rows.prompt_lengths[..., None] - 1, rows.lengths[..., None] - 1
    t = _positions(rows.tokens.shape[-1] - 1, end.ndim)
    where = (t >= first) & (t < end)
    return NextTokenView(
        rows.tokens[..., :-1], rows.tokens[..., 1:], where, rows.span_ids[..., 1:]
    )


def from_lists(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    width: int,
    span_ids: Sequence[Sequence[int]] | None = None,
    examples: Sequence[int] | None = None,
    pad_id: int = 0,
    ground_truth: bool = True,
) -> Rows:
    """Host rows (numpy) of the given width from lists of token ids.

    `span_ids`, where given, are those of the responses' tokens.

    Raises:
      ValueError: a row is longer than `width` or has an empty prompt; lists of
        different lengths.
    """
    size = len(prompts)
    _check_sizes(prompts, responses, span_ids, examples)
    rows = Rows(
        tokens=np.full((size, width), pad_id, np.int32),
        prompt_lengths=np.array([len(p) for p in prompts], np.int32).reshape(size),
        lengths=np.zeros(size, np.int32),
        span_ids=np.full((size, width), NO_SPAN, np.int32),
        example=np.arange(size, dtype=np.int32)
        if examples is None
        else np.asarray(examples, np.int32),
        ground_truth=np.full(size, ground_truth),
    )
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        if start == 0:
            raise ValueError(
                f"row {b}: empty prompt; a response needs a token to follow"
            )
        if end > width:
            raise ValueError(
                f"row {b}: {start} + {end - start} tokens do not fit a row of {width}"
            )
        rows.tokens[b, :end] = [*prompt, *response]
        rows.lengths[b] = end
        if span_ids is not None:
            if len(span_ids[b]) != len(response):
                raise ValueError(
                    f"row {b}: {len(span_ids[b])} span ids for {len(response)} tokens "
                    "of response; give one a token, -1 for none"
                )
            rows.span_ids[b, start:end] = span_ids[b]
    return rows


def _check_sizes(
    prompts: Sequence[Any],
    responses: Sequence[Any],
    span_ids: Sequence[Any] | None,
    examples: Sequence[int] | None,
) -> None:
    given = {"responses": responses, "span_ids": span_ids, "examples": examples}
    sizes = {name: len(part) for name, part in given.items() if part is not None}
    if any(size != len(prompts) for size in sizes.values()):
        listed = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ValueError(f"{len(prompts)} prompts, {listed}; give one of each a row")


def narrowest(widths: Sequence[int], lengths: np.ndarray) -> int:
    """The first of `widths`, which ascend, that rows of these lengths fit into.

    >>> narrowest((128, 256, 512), np.array([90, 130]))
    256

    Raises:
      ValueError: they fit into none.
    """
    longest = int(lengths.max())
    for width in widths:
        if longest <= width:
            return width
    raise ValueError(f"a row of {longest} tokens fits into no width of {widths}")


def with_width(rows: Rows, width: int) -> Rows:
    """Host rows, padded to another width, or cut to it where that is padding alone.

    Raises:
      ValueError: a row is longer.
    """
    narrowest([width], rows.lengths)

    def fit(leaf: np.ndarray, padding: int) -> np.ndarray:
        more = max(0, width - leaf.shape[1])
        return np.pad(leaf[:, :width], ((0, 0), (0, more)), constant_values=padding)

    return dataclasses.replace(
        rows, tokens=fit(rows.tokens, 0), span_ids=fit(rows.span_ids, NO_SPAN)
    )


def prompts_only(rows: Rows) -> Rows:
    """The rows cut back to their prompts, as a start for generation."""
    cut = dataclasses.replace(
        rows,
        lengths=rows.prompt_lengths,
        span_ids=jnp.full_like(rows.span_ids, NO_SPAN),
        ground_truth=jnp.zeros_like(rows.ground_truth),
    )
    return blank_padding(cut)


def blank_padding(rows: Rows) -> Rows:
    """Zeros in place of whatever stale tokens lie beyond each row's length."""
    end = rows.lengths[..., None]
    inside = _positions(rows.tokens.shape[-1], end.ndim) < end
    return dataclasses.replace(rows, tokens=jnp.where(inside, rows.tokens, 0))


def _positions(length: int, ndim: int) -> Int[Array, "..."]:
    """0, 1, ... along the last of `ndim` axes."""
    return jnp.arange(length).reshape((1,) * (ndim - 1) + (length,))
