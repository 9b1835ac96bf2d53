"""Batches: one order for any number of hosts, and rows no wider than necessary."""

import json

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgsr_jax.data.batches import eval_batches, prompt_batches, train_batches
from mgsr_jax.data.dataset import EARLIER, lengths
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.rows import next_token_view

COUNT, BUCKETS = 22, (8, 16, 32)


def table(sizes):
    """One example per size: a prompt of one token and a response."""
    responses = [[i + 2] * (size - 1) for i, size in enumerate(sizes)]
    return datasets.Dataset.from_dict(
        {
            "prompt": [[1]] * len(responses),
            "response": responses,
            "span_ids": [[-1] * len(response) for response in responses],
        }
    )


@pytest.fixture(scope="module")
def dataset():
    sizes = np.random.default_rng(0).integers(3, 33, COUNT + 3)
    # A selection of a table, as `dataset.load` returns it.
    return table(sizes).select(range(3, COUNT + 3))


def share(process, processes):
    """Rows of a batch of 8 that one of several processes takes."""
    return np.arange(8).reshape(processes, -1)[process]


def global_batches(dataset, processes, count, *, widths=(32,), **options):
    """Example indices and widths of the first batches."""
    iterators = [
        train_batches(dataset, 8, widths=widths, share=share(p, processes), **options)
        for p in range(processes)
    ]
    batches = [[next(it) for it in iterators] for _ in range(count)]
    sizes = [{rows.tokens.shape[1] for rows in parts} for parts in batches]
    assert all(len(of_batch) == 1 for of_batch in sizes)
    examples = [np.concatenate([rows.example for rows in parts]) for parts in batches]
    return examples, [width for (width,) in sizes]


def test_lengths_are_those_of_the_selected_examples(dataset):
    expected = [1 + len(response) for response in dataset["response"]]
    assert lengths(dataset).tolist() == expected


@pytest.mark.parametrize("widths", [(32,), BUCKETS])
def test_order_does_not_depend_on_the_number_of_hosts(dataset, widths):
    expected = global_batches(dataset, 1, 5, seed=3, widths=widths)
    for processes in (2, 4):
        batches = global_batches(dataset, processes, 5, seed=3, widths=widths)
        np.testing.assert_array_equal(batches[0], expected[0])
        assert batches[1] == expected[1]
    other, _ = global_batches(dataset, 1, 5, seed=4, widths=widths)
    assert not np.array_equal(other, expected[0])


@pytest.mark.parametrize("widths", [(32,), BUCKETS])
def test_an_epoch_repeats_no_example_and_has_a_new_order(dataset, widths):
    batches, _ = global_batches(dataset, 1, 4, seed=0, epochs=2, widths=widths)
    for epoch in (batches[:2], batches[2:]):
        assert len(set(np.concatenate(epoch).tolist())) == 16
    assert set(np.concatenate(batches[:2])) != set(np.concatenate(batches[2:]))
    iterator = train_batches(dataset, 8, widths=widths, seed=0, epochs=2)
    assert len(list(iterator)) == 4


def test_a_batch_has_the_narrowest_width_that_fits():
    sizes = np.random.default_rng(1).integers(3, 33, 400)
    dataset = table(sizes)
    batches, widths = global_batches(dataset, 2, 50, seed=0, widths=BUCKETS)
    for examples, width in zip(batches, widths, strict=True):
        fitting = [w for w in BUCKETS if w >= sizes[examples].max()]
        assert width == fitting[0]
    # Half of the examples are longer than 16, so few random batches would be narrow.
    assert set(widths) == set(BUCKETS) and widths.count(32) <= 35
    # The batches of a window are not ordered by length.
    assert widths != sorted(widths)
    assert sorted(np.concatenate(batches).tolist()) == [*range(400)]


@pytest.mark.parametrize("batches", [2, 3, 8, 30])
def test_epochs_put_different_examples_into_a_batch(batches):
    sizes = np.random.default_rng(1).permutation(np.arange(8 * batches) % 30 + 3)
    examples, _ = global_batches(table(sizes), 1, 2 * batches, seed=0, widths=BUCKETS)
    first, second = (
        {frozenset(batch.tolist()) for batch in epoch}
        for epoch in (examples[:batches], examples[batches:])
    )
    assert len(first & second) <= batches // 4


def test_rows_of_a_batch_are_not_ordered_by_length():
    sizes = np.arange(8 * 40) % 30 + 3
    batches, _ = global_batches(table(sizes), 1, 40, seed=0, widths=BUCKETS)
    orders = [sizes[batch].tolist() for batch in batches]
    mixed = [order for order in orders if len(set(order)) > 2]
    assert len(mixed) > 20 and not any(order == sorted(order) for order in mixed)


def test_an_epoch_does_not_always_leave_out_the_longest_examples():
    dataset, left_out = table([*range(3, 15)]), set()
    for seed in range(10):
        batches, _ = global_batches(dataset, 1, 1, seed=seed, widths=BUCKETS)
        left_out |= {*range(12)} - set(batches[0].tolist())
    assert min(left_out) < 6


@pytest.mark.parametrize("widths", [(32,), BUCKETS])
def test_the_saved_position_is_json_and_resumes_exactly(dataset, widths):
    options = {"widths": widths, "seed": 1, "share": share(1, 2)}
    iterator = train_batches(dataset, 8, **options)
    for _ in range(3):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = [next(iterator) for _ in range(3)]
    resumed = train_batches(dataset, 8, **options)
    next(resumed)
    resumed.set_state(state)
    for rows in expected:
        jax.tree.map(np.testing.assert_array_equal, next(resumed), rows)


def test_too_large_batches_and_too_narrow_widths_raise(dataset):
    with pytest.raises(ValueError, match="22 examples do not fill a batch of 24"):
        train_batches(dataset, 24, widths=[32], seed=0)
    with pytest.raises(ValueError, match="fits into no width"):
        next(train_batches(dataset, 8, widths=[4, 6], seed=0))


@pytest.mark.parametrize("widths", [(32,), BUCKETS])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_validation_counts_every_example_once(dataset, processes, widths):
    shares = [
        list(eval_batches(dataset, 8, widths=widths, share=share(p, processes)))
        for p in range(processes)
    ]
    batches = [
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        for parts in zip(*shares, strict=True)
    ]
    assert [len(rows.tokens) for rows in batches] == [8, 8, 8]
    examples = np.concatenate([rows.example for rows in batches]).tolist()
    assert sorted(examples) == [-1, -1, *range(22)] and examples[-2:] == [-1, -1]
    if len(widths) == 1:
        assert examples[:22] == [*range(22)]
    else:
        sizes = lengths(dataset)[examples[:22]]
        assert sizes.tolist() == sorted(sizes)
        assert batches[0].tokens.shape[1] < batches[-1].tokens.shape[1] == 32
    scored = sum(
        int(next_token_view(jax.tree.map(jnp.asarray, rows)).where.sum())
        for rows in batches
    )
    assert scored == sum(len(response) for response in dataset["response"])


def test_prompt_batches_have_the_first_reference_or_no_response():
    prompts = [
        Prompt((1, 2), (3,) * (i + 1), ("three",), i, True, "some.jsonl:1")
        for i in range(5)
    ]
    first, second = prompt_batches(prompts, 3, width=30)
    np.testing.assert_array_equal(first.lengths, first.prompt_lengths)
    assert first.example.tolist() == [0, 1, 2] and second.example.tolist() == [3, 4, -1]
    _, second = prompt_batches(prompts, 3, width=30, with_response=True)
    assert (second.lengths - second.prompt_lengths).tolist() == [4, 5, 0]
    start, end = second.prompt_lengths[1], second.lengths[1]
    assert second.tokens[1, start:end].tolist() == [3] * 5


def test_rows_have_the_earlier_responses_of_their_examples():
    """Also behind rows that fill up the last batch, and in a selection of the table."""
    trained = [[-2, -1, 3, -2], [-2, -2], []]
    prompts = [[5, 6, 7, 8], [5, 6], [5]]
    columns = {
        "prompt": prompts,
        "response": [[9]] * 3,
        "span_ids": [[-1]] * 3,
        EARLIER: trained,
    }
    dataset = datasets.Dataset.from_dict(columns)
    (first, second) = eval_batches(dataset, 2, widths=[6])
    assert first.earlier_responses[0].tolist() == [False, True, True] + [False] * 3
    assert first.span_ids[0].tolist() == [-1, -1, 3, -1, -1, -1]
    assert not first.earlier_responses[1].any()
    assert not second.earlier_responses.any() and second.example.tolist() == [2, -1]
    batch = next(train_batches(dataset.select([2, 0]), 2, widths=[6], seed=0))
    assert sorted(batch.earlier_responses.sum(1).tolist()) == [0, 2]
