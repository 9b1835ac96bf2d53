"""Batches of rows from tokenised data, in a fixed order.

Rows are padded to one of a few widths; the last is wide enough for every example. With
several widths, a batch has examples of similar length and is as wide as its longest
example needs. That saves computation on padding, and costs one compiled program a
width.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import datasets
import grain
import numpy as np

from mgsr_jax.data.dataset import EARLIER, TEACHER, lengths, teachers_of
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.rows import Rows, from_lists, narrowest

Share = slice | np.ndarray
"""The rows of every batch that a process takes."""
_ALL: Share = slice(None)
_FILLER = -1  # example index of a row that only fills up the last batch
_NO_TEACHER = -1
_WINDOW = 8
"""Number of batches whose examples are sorted by length together.

A larger window saves little more padding. A window is at most half an epoch: otherwise
every epoch would put the same examples into one batch.
"""


def train_batches(
    dataset: datasets.Dataset,
    batch_size: int,
    *,
    widths: Sequence[int],
    seed: int,
    share: Share = _ALL,
    epochs: int | None = None,
) -> grain.DatasetIterator:
    """Iterate over this process's `Rows` of every training batch.

    The order depends on `seed` and `batch_size`, and with several `widths` also on the
    lengths of the examples. It does not depend on the number of processes: each takes
    its share of the same global batch. With several teachers the rows of a global batch
    are ordered by teacher, so that most micro-batches have rows of only one. Every
    epoch has a new order and leaves out the last examples that do not fill a batch.
    `rows.example` is the index in `dataset`. The position can be saved: `get_state()`
    returns plain JSON, and `set_state()` continues from it exactly.

    Args:
      dataset: from `dataset.load`.
      batch_size: number of rows of the global batch.
      widths: possible widths S of the rows, ascending; the last is at least the
        `max_length` of the data set.
      seed: seed of the order.
      share: rows of a batch that this process takes.
      epochs: number of epochs; None repeats forever.

    Raises:
      ValueError: the data set is smaller than a batch.
    """
    if len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} examples do not fill a batch of {batch_size}; use a "
            "smaller batch_size or more data"
        )
    if len(widths) == 1:
        order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle()
        batches = order.batch(batch_size, drop_remainder=True).repeat(epochs)
        sizes = np.full(len(dataset), widths[0])
    else:
        sizes = lengths(dataset)
        batches = _similar_length(sizes, batch_size, seed, epochs)

    teachers = teachers_of(dataset)

    def rows(batch: np.ndarray) -> Rows:
        if teachers is not None:
            batch = batch[np.argsort(teachers[batch], kind="stable")]
        width = narrowest(widths, sizes[batch])
        return _dataset_rows(dataset, batch[share], width)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.map(rows).to_iter_dataset(options))


def _similar_length(
    sizes: np.ndarray, batch_size: int, seed: int, epochs: int | None
) -> grain.MapDataset:
    """Indices of the examples of each batch, of similar length within a batch."""
    count = len(sizes) // batch_size

    @functools.lru_cache(maxsize=1)
    def epoch_of(number: int) -> list[np.ndarray]:
        rng = np.random.default_rng((seed, number))
        # Cut before sorting: otherwise the longest would always be left out.
        order = rng.permutation(len(sizes))[: count * batch_size]
        batches = []
        window = max(1, min(_WINDOW, count // 2)) * batch_size
        for start in range(0, len(order), window):
            examples = order[start : start + window]
            by_length = np.argsort(sizes[examples], kind="stable")
            # Within a batch the order is random: otherwise one device would get all the
            # longest examples.
            batches += [
                examples[np.sort(positions)]
                for positions in by_length.reshape(-1, batch_size)
            ]
        return [batches[i] for i in rng.permutation(count)]

    def batch(number: int, _: int) -> np.ndarray:
        epoch, position = divmod(number, count)
        return epoch_of(epoch)[position]

    return grain.MapDataset.range(count).repeat(epochs).map_with_index(batch)


def eval_batches(
    dataset: datasets.Dataset,
    batch_size: int,
    *,
    widths: Sequence[int],
    share: Share = _ALL,
) -> Iterator[Rows]:
    """Iterate once over this process's `Rows` of the whole data set, in its order.

    With several `widths` the shortest examples come first, with several teachers those
    of the first teacher. The last batch is filled up
    with rows that have no response (`lengths == prompt_lengths`, so every position is
    masked) and `example` -1.
    """
    sizes = lengths(dataset)
    order = np.arange(len(dataset))
    if len(widths) > 1:
        order = np.argsort(sizes, kind="stable")
    if (teachers := teachers_of(dataset)) is not None:
        order = order[np.argsort(teachers[order], kind="stable")]
    # The index -1 selects the last element, which is the filler.
    order, sizes = np.append(order, _FILLER), np.append(sizes, 1)
    for positions in _filled(len(dataset), batch_size):
        batch = order[positions]
        width = narrowest(widths, sizes[batch])
        yield _dataset_rows(dataset, batch[share], width)


def prompt_batches(
    prompts: Sequence[Prompt],
    batch_size: int,
    *,
    width: int,
    with_response: bool = False,
    share: Share = _ALL,
) -> Iterator[Rows]:
    """Iterate once over this process's `Rows` of prompts, in their order.

    Args:
      prompts: from `load_prompts`.
      batch_size: number of rows of the global batch.
      width: S of the rows.
      with_response: whether the rows have the first reference as their response.
      share: rows of a batch that this process takes.
    """
    for indices in _filled(len(prompts), batch_size):
        batch = [prompts[i] if i != _FILLER else None for i in indices[share].tolist()]
        # A filler's prompt is as long as the row, so generation does not extend it.
        yield from_lists(
            [list(p.tokens) if p else [0] * width for p in batch],
            [list(p.response) if p and with_response else [] for p in batch],
            width=width,
            examples=[p.example if p else _FILLER for p in batch],
        )


def _filled(total: int, batch_size: int) -> Iterator[np.ndarray]:
    """Indices of each batch; the last batch is filled up with -1."""
    for start in range(0, total, batch_size):
        indices = np.arange(start, start + batch_size)
        yield np.where(indices < total, indices, _FILLER)


def _dataset_rows(dataset: datasets.Dataset, indices: np.ndarray, width: int) -> Rows:
    examples = indices.tolist()
    records = iter(_columns(dataset, [i for i in examples if i != _FILLER]))
    filler = ([0], [], [], [], _NO_TEACHER)
    rows = [filler if i == _FILLER else next(records) for i in examples]
    prompts, responses, span_ids, earlier, teachers = zip(*rows, strict=True)
    return from_lists(
        prompts,
        responses,
        width=width,
        span_ids=span_ids,
        examples=examples,
        earlier_span_ids=earlier,
        teachers=teachers if TEACHER in dataset.column_names else None,
    )


def _columns(
    dataset: datasets.Dataset, indices: list[int]
) -> Iterable[tuple[list[int], list[int], list[int], list[int], int]]:
    """(prompt, response, span_ids, earlier_span_ids, teacher) of the examples."""
    if not indices:
        return []
    rows = dataset[indices]
    earlier = rows.get(EARLIER, [[]] * len(indices))
    teachers = rows.get(TEACHER, [0] * len(indices))
    columns = (rows["prompt"], rows["response"], rows["span_ids"], earlier, teachers)
    return zip(*columns, strict=True)
