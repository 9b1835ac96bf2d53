"""The one layout of token sequences: left-aligned rows.

A row is prompt, response, padding, from index 0. Rows of the data set and generated,
replayed and corrected rows are the same record. Masks come from lengths, never from
token ids: the id of padding may equal that of end-of-sequence. Only this file shifts
labels.

The prompt of a conversation ends before its last response. Earlier responses are part
of the prompt; where they are trained too, they have a mask.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mgsr_jax.typing import Leaf

NO_SPAN = -1
UNTRAINED = -2
"""In place of a span id: a token of a prompt that is part of no trained response."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A batch of token sequences; all fields may have the same additional leading axes.

    Attributes:
      tokens: prompt, response, padding. [B, S]
      prompt_lengths: number of tokens in the prompt. [B]
      lengths: number of tokens in prompt and response, with end-of-sequence. [B]
      span_ids: the phrase that a token belongs to, -1 for none. [B, S]
      example: global index of the example; random keys are folded by it. [B]
      ground_truth: whether the text is from the data set, not from a model. [B]
      earlier_responses: whether a token of the prompt is part of an earlier response
        that is trained too; False beyond the prompt. [B, S]
      teacher: index of the row's teacher, -1 for none; None: the run has one teacher,
        or none. [B]
    """

    tokens: Leaf
    prompt_lengths: Leaf
    lengths: Leaf
    span_ids: Leaf
    example: Leaf
    ground_truth: Leaf
    earlier_responses: Leaf
    teacher: Leaf = None


class NextTokenView(NamedTuple):
    """Arguments of a loss; in each field, index t belongs to the label at t."""

    inputs: Int[Array, "*B T"]
    labels: Int[Array, "*B T"]
    where: Bool[Array, "*B T"]
    span_ids: Int[Array, "*B T"]


def next_token_view(rows: Rows) -> NextTokenView:
    """Shift labels and span ids by one: T = S - 1.

    `where[b, t]` is True if the label is a token of the response, which means
    `prompt_lengths[b] - 1 <= t < lengths[b] - 1`, or of an earlier response that is
    trained too.

    >>> rows = from_lists([[5, 6]], [[7, 2]], width=6)
    >>> view = next_token_view(jax.tree.map(jnp.asarray, rows))
    >>> view.labels.tolist(), view.where.astype(int).tolist()
    ([[6, 7, 2, 0, 0]], [[0, 1, 1, 0, 0]])
    """
    first, end = rows.prompt_lengths[..., None] - 1, rows.lengths[..., None] - 1
    t = _positions(rows.tokens.shape[-1] - 1, end.ndim)
    where = (t >= first) & (t < end) | rows.earlier_responses[..., 1:]
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
    earlier_span_ids: Sequence[Sequence[int]] | None = None,
    teachers: Sequence[int] | None = None,
) -> Rows:
    """Host rows (numpy) from lists of token ids.

    Args:
      prompts: token ids of each prompt.
      responses: token ids of each response.
      width: width of the rows, S.
      span_ids: span ids of each response, one per token; None: no spans.
      examples: global index of each example; None: 0, 1, ...
      pad_id: id of padding.
      ground_truth: whether the responses are from the data set.
      earlier_span_ids: for each prompt with earlier responses that are trained too, one
        id per token: its span id, or UNTRAINED outside these responses. An empty list,
        or None: there are no such responses.
      teachers: index of each row's teacher; None: there is one teacher.

    Raises:
      ValueError: a row is longer than `width` or has an empty prompt; lists of
        different lengths.
    """
    size = len(prompts)
    _check_sizes(
        prompts,
        responses=responses,
        span_ids=span_ids,
        examples=examples,
        earlier_span_ids=earlier_span_ids,
        teachers=teachers,
    )
    rows = Rows(
        tokens=np.full((size, width), pad_id, np.int32),
        prompt_lengths=np.array([len(p) for p in prompts], np.int32).reshape(size),
        lengths=np.zeros(size, np.int32),
        span_ids=np.full((size, width), NO_SPAN, np.int32),
        example=np.arange(size, dtype=np.int32)
        if examples is None
        else np.asarray(examples, np.int32),
        ground_truth=np.full(size, ground_truth),
        earlier_responses=np.zeros((size, width), bool),
        teacher=None if teachers is None else np.asarray(teachers, np.int32),
    )
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        _fill(rows, b, prompt, response)
        if span_ids is not None:
            _fill_spans(rows, b, len(prompt), span_ids[b])
        if earlier_span_ids is not None and len(earlier_span_ids[b]):
            _fill_earlier(rows, b, earlier_span_ids[b])
    return rows


def _fill(rows: Rows, b: int, prompt: Sequence[int], response: Sequence[int]) -> None:
    """Write the tokens of one row in place."""
    width, start, end = rows.tokens.shape[1], len(prompt), len(prompt) + len(response)
    if start == 0:
        raise ValueError(f"row {b}: empty prompt; a response needs a token to follow")
    if end > width:
        raise ValueError(
            f"row {b}: {start} + {end - start} tokens do not fit a row of {width}"
        )
    rows.tokens[b, :end] = [*prompt, *response]
    rows.lengths[b] = end


def _fill_spans(rows: Rows, b: int, start: int, span_ids: Sequence[int]) -> None:
    """Write the span ids of one response in place."""
    end = int(rows.lengths[b])
    if len(span_ids) != end - start:
        raise ValueError(
            f"row {b}: {len(span_ids)} span ids for {end - start} tokens of "
            "response; give one span id per token, -1 for none"
        )
    rows.span_ids[b, start:end] = span_ids


def _fill_earlier(rows: Rows, b: int, ids: Sequence[int]) -> None:
    """Write the mask and the span ids of one row's earlier responses in place."""
    end = int(rows.prompt_lengths[b])
    if len(ids) != end:
        raise ValueError(
            f"row {b}: {len(ids)} earlier span ids for {end} tokens of prompt; give "
            f"one per token, {UNTRAINED} outside the earlier responses"
        )
    rows.earlier_responses[b, :end] = np.not_equal(ids, UNTRAINED)
    rows.span_ids[b, :end] = np.maximum(ids, NO_SPAN)


def _check_sizes(
    prompts: Sequence[Sequence[int]], **lists: Sequence[object] | None
) -> None:
    sizes = {name: len(part) for name, part in lists.items() if part is not None}
    if any(size != len(prompts) for size in sizes.values()):
        listed = ", ".join(f"{size} {name}" for name, size in sizes.items())
        raise ValueError(f"{len(prompts)} prompts, {listed}; give one of each per row")


def narrowest(widths: Sequence[int], lengths: np.ndarray) -> int:
    """The first of the ascending `widths` that rows of these lengths fit into.

    >>> narrowest((128, 256, 512), np.array([90, 130]))
    256

    Raises:
      ValueError: a row is longer than all widths.
    """
    longest = int(lengths.max())
    for width in widths:
        if longest <= width:
            return width
    raise ValueError(
        f"a row of {longest} tokens fits into no width of {widths}; add a larger one"
    )


def with_width(rows: Rows, width: int) -> Rows:
    """Host rows with more or less padding, so that they have the given width.

    Raises:
      ValueError: a row is longer than `width`.
    """
    narrowest([width], rows.lengths)

    def fit(leaf: np.ndarray, padding: int) -> np.ndarray:
        added = max(0, width - leaf.shape[1])
        return np.pad(leaf[:, :width], ((0, 0), (0, added)), constant_values=padding)

    return dataclasses.replace(
        rows,
        tokens=fit(rows.tokens, 0),
        span_ids=fit(rows.span_ids, NO_SPAN),
        earlier_responses=fit(rows.earlier_responses, False),
    )


def prompts_only(rows: Rows) -> Rows:
    """The rows without their responses, to start generation from."""
    cut = dataclasses.replace(
        rows,
        lengths=rows.prompt_lengths,
        span_ids=jnp.full_like(rows.span_ids, NO_SPAN),
        ground_truth=jnp.zeros_like(rows.ground_truth),
        earlier_responses=jnp.zeros_like(rows.earlier_responses),
    )
    return blank_padding(cut)


def blank_padding(rows: Rows) -> Rows:
    """The rows with zeros in place of stale tokens at and beyond each row's length."""
    end = rows.lengths[..., None]
    inside = _positions(rows.tokens.shape[-1], end.ndim) < end
    return dataclasses.replace(rows, tokens=jnp.where(inside, rows.tokens, 0))


def _positions(length: int, ndim: int) -> Int[Array, "..."]:
    """0, 1, ... along the last axis of `ndim` axes."""
    return jnp.arange(length).reshape((1,) * (ndim - 1) + (length,))
