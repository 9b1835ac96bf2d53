"""Rows of tokens: scored positions, shifted labels, padding, and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgsr_jax.rows import (
    NO_SPAN,
    UNTRAINED,
    blank_padding,
    from_lists,
    narrowest,
    next_token_view,
    prompts_only,
    with_width,
)


def device(rows):
    return jax.tree.map(jnp.asarray, rows)


@pytest.fixture(scope="module")
def ragged():
    """Rows of every prompt and response length that a width of 7 holds."""
    pairs = [(p, r) for p in range(1, 8) for r in range(8 - p)]
    rng = np.random.default_rng(0)
    return device(
        from_lists(
            [rng.integers(1, 50, p).tolist() for p, _ in pairs],
            [rng.integers(1, 50, r).tolist() for _, r in pairs],
            width=7,
            span_ids=[rng.integers(-1, 4, r).tolist() for _, r in pairs],
        )
    )


def test_a_position_is_scored_if_its_label_is_a_token_of_the_response(ragged):
    view = next_token_view(ragged)
    for b, (prompt, length) in enumerate(
        zip(ragged.prompt_lengths.tolist(), ragged.lengths.tolist(), strict=True)
    ):
        scored = [prompt - 1 <= t < length - 1 for t in range(6)]
        assert view.where[b].tolist() == scored
        tokens = ragged.tokens[b].tolist()
        labels = [label for label, s in zip(view.labels[b], scored, strict=True) if s]
        assert labels == tokens[prompt:length]
        inputs = [token for token, s in zip(view.inputs[b], scored, strict=True) if s]
        assert inputs == tokens[prompt - 1 : length - 1]


def test_the_number_of_scored_positions_is_the_length_of_the_response(ragged):
    count = next_token_view(ragged).where.sum(-1)
    np.testing.assert_array_equal(count, ragged.lengths - ragged.prompt_lengths)


def test_a_response_of_one_token_has_one_scored_position():
    """The first generated token is scored (compare trl#2058)."""
    view = next_token_view(device(from_lists([[5, 6, 7]], [[8]], width=6)))
    assert view.where.astype(int).tolist() == [[0, 0, 1, 0, 0]]
    assert view.inputs[0, 2] == 7 and view.labels[0, 2] == 8


def test_end_of_sequence_is_scored_even_if_padding_has_the_same_id():
    eos = 2
    rows = device(from_lists([[5]], [[7, eos]], width=6, pad_id=eos))
    assert rows.tokens.tolist() == [[5, 7, 2, 2, 2, 2]]
    view = next_token_view(rows)
    assert view.where.astype(int).tolist() == [[1, 1, 0, 0, 0]]
    assert view.labels[0, 1] == eos


def test_span_ids_are_shifted_with_the_labels(ragged):
    view = next_token_view(ragged)
    np.testing.assert_array_equal(view.span_ids, ragged.span_ids[:, 1:])
    rows = device(from_lists([[5, 6]], [[7, 8, 9]], width=6, span_ids=[[-1, 4, 4]]))
    view = next_token_view(rows)
    at = dict(zip(view.labels[0].tolist(), view.span_ids[0].tolist(), strict=True))
    assert at == {6: NO_SPAN, 7: NO_SPAN, 8: 4, 9: 4, 0: NO_SPAN}


def test_functions_accept_additional_leading_axes(ragged):
    stacked = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), ragged)
    for function in (next_token_view, prompts_only, blank_padding):
        flat, more = function(ragged), function(stacked)
        assert jax.tree.structure(flat) == jax.tree.structure(more)
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(b, jnp.stack([a, a[::-1]])),
            flat,
            more,
        )


def conversation():
    """A row with two trained responses: tokens 3 and 4, and tokens 6 and 7."""
    no, out = NO_SPAN, UNTRAINED
    return from_lists(
        [[1, 2, 3, 4, 5], [9]],
        [[6, 7], [8]],
        width=9,
        span_ids=[[0, 0], [no]],
        earlier_span_ids=[[out, out, no, 3, out], []],
    )


def test_earlier_responses_are_scored_like_the_last():
    rows = device(conversation())
    view = next_token_view(rows)
    scored = [view.labels[b][view.where[b]].tolist() for b in range(2)]
    assert scored == [[3, 4, 6, 7], [8]]
    no = NO_SPAN
    assert rows.span_ids[0].tolist() == [no, no, no, 3, no, 0, 0, no, no]
    assert view.span_ids[0].tolist() == rows.span_ids[0, 1:].tolist()
    np.testing.assert_array_equal(rows.lengths - rows.prompt_lengths, [2, 1])


def test_generation_starts_without_earlier_responses():
    cut = prompts_only(device(conversation()))
    assert not cut.earlier_responses.any() and (cut.span_ids == NO_SPAN).all()
    assert not next_token_view(cut).where.any()


def test_with_width_changes_only_the_padding():
    rows = from_lists([[5, 6], [7]], [[8], [9, 2]], width=4, span_ids=[[3], [4, 4]])
    wide = from_lists([[5, 6], [7]], [[8], [9, 2]], width=7, span_ids=[[3], [4, 4]])
    jax.tree.map(np.testing.assert_array_equal, with_width(rows, 7), wide)
    jax.tree.map(np.testing.assert_array_equal, with_width(wide, 4), rows)
    earlier = with_width(conversation(), 12).earlier_responses
    assert earlier.shape == (2, 12)
    assert np.argwhere(earlier).tolist() == [[0, 2], [0, 3]]
    assert narrowest((3, 4, 7), rows.lengths) == 3
    with pytest.raises(ValueError, match="a row of 3 tokens fits into no width"):
        with_width(rows, 2)


def test_from_lists_makes_left_aligned_rows():
    rows = from_lists(
        [[5, 6], [7]],
        [[8], []],
        width=4,
        examples=[30, 10],
        pad_id=9,
        ground_truth=False,
    )
    assert rows.tokens.tolist() == [[5, 6, 8, 9], [7, 9, 9, 9]]
    assert rows.prompt_lengths.tolist() == [2, 1]
    assert rows.lengths.tolist() == [3, 1]
    assert rows.span_ids.tolist() == [[NO_SPAN] * 4] * 2
    assert rows.example.tolist() == [30, 10]
    assert rows.ground_truth.tolist() == [False, False]
    leaves = jax.tree.leaves(rows)
    assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
    assert [leaf.dtype for leaf in leaves] == [np.int32] * 5 + [np.bool_] * 2


def test_by_default_rows_are_numbered_and_ground_truth():
    rows = from_lists([[5], [6]], [[7], [8]], width=2)
    assert rows.example.tolist() == [0, 1] and rows.ground_truth.all()


@pytest.mark.parametrize(
    ("prompts", "responses", "more", "message"),
    [
        ([[1], []], [[2], [3]], {}, "row 1: empty prompt"),
        ([[1, 2]], [[3, 4]], {}, r"row 0: 2 \+ 2 tokens do not fit a row of 3"),
        ([[1]], [[3, 4]], {"span_ids": [[7]]}, "row 0: 1 span ids for 2 tokens"),
        ([[1]], [[3, 4]], {"span_ids": [[]]}, "row 0: 0 span ids for 2 tokens"),
        ([[1]], [[3]], {"earlier_span_ids": [[0, 0]]}, "2 earlier span ids for 1 tok"),
        ([[1]], [[3]], {"earlier_span_ids": []}, "1 prompts, .*0 earlier_span_ids"),
        ([[1], [2]], [[3]], {}, "2 prompts, 1 responses"),
        ([[1]], [[3]], {"span_ids": []}, "1 prompts, .*0 span_ids"),
        ([[1]], [[3]], {"examples": [4, 5]}, "1 prompts, .*2 examples"),
    ],
)
def test_lists_that_do_not_fit_raise(prompts, responses, more, message):
    with pytest.raises(ValueError, match=message):
        from_lists(prompts, responses, width=3, **more)


def test_prompts_only_removes_all_of_the_response(ragged):
    cut = prompts_only(ragged)
    np.testing.assert_array_equal(cut.lengths, ragged.prompt_lengths)
    np.testing.assert_array_equal(cut.prompt_lengths, ragged.prompt_lengths)
    np.testing.assert_array_equal(cut.example, ragged.example)
    assert not cut.ground_truth.any() and (cut.span_ids == NO_SPAN).all()
    for b, prompt in enumerate(cut.prompt_lengths.tolist()):
        assert cut.tokens[b, :prompt].tolist() == ragged.tokens[b, :prompt].tolist()
        assert not cut.tokens[b, prompt:].any()


def test_blank_padding_changes_only_tokens_beyond_the_length():
    rows = device(from_lists([[5, 6], [7]], [[8], [9, 2]], width=5, pad_id=33))
    blank = blank_padding(rows)
    assert blank.tokens.tolist() == [[5, 6, 8, 0, 0], [7, 9, 2, 0, 0]]
    assert blank.lengths.tolist() == [3, 3]
