"""Tokenised data as batches of rows, in a fixed order.

Rows are padded to one of a few widths, the last of which holds every example. Where
there are several, a batch is made of examples of like length and is as wide as its
longest needs: less padding is computed, and each width is a program of its own.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence

import datasets
import grain
import numpy as np

from mgsr_jax.data.dataset import lengths
from mgsr_jax.data.prompts import Prompt
from mgsr_jax.rows import Rows, from_lists, narrowest

Share = slice | np.ndarray
"""Which rows of every batch a process takes."""
_WHOLE: Share = slice(None)
_FILLER = -1  # the example index of a row that only fills up the last batch
_WINDOW = 8
"""Batches whose examples are sorted by length together, and then shuffled again.

More would pad little less. Never more than half an epoch, or the same examples would be
together in all of them.
"""


def train_batches(
    dataset: datasets.Dataset,
    batch_size: int,
    *,
    widths: Sequence[int],
    seed: int,
    share: Share = _WHOLE,
    epochs: int | None = None,
) -> grain.DatasetIterator:
    """This process's `Rows` of every training batch, with an exact position.

    The order depends on `seed` and `batch_size`, with several `widths` on the examples'
    lengths too: each process takes its share of the same global batch, however many
    processes there are. Every epoch is shuffled anew and leaves out the examples that
    do not fill a batch. `rows.example` is the index in `dataset`. `get_state()` is
    plain JSON, `set_state()` goes on from it.

    Args:
      batch_size: rows of the global batch.
      widths: S of the rows may be one of these, ascending; the last is at least the
        data set's `max_length`.
      share: which rows of a batch this process takes.
      epochs: None: without end.

    Raises:
      ValueError: the data set is smaller than a batch.
    """
    if len(dataset) < batch_size:
        raise ValueError(
            f"{len(dataset)} examples do not fill a batch of {batch_size}; use a "
            "smaller batch or more data"
        )
    if len(widths) == 1:
        order = grain.MapDataset.range(len(dataset)).seed(seed).shuffle()
        batches = order.batch(batch_size, drop_remainder=True).repeat(epochs)
        sizes = np.full(len(dataset), widths[0])
    else:
        sizes = lengths(dataset)
        batches = _of_like_length(sizes, batch_size, seed, epochs)

    def rows(batch: np.ndarray) -> Rows:
        width = narrowest(widths, sizes[batch])
        return _dataset_rows(dataset, batch[share], width)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(batches.map(rows).to_iter_dataset(options))


def _of_like_length(
    sizes: np.ndarray, batch_size: int, seed: int, epochs: int | None
) -> grain.MapDataset:
    """Every batch's examples, by its number."""
    count = len(sizes) // batch_size

    @functools.lru_cache(maxsize=1)
    def epoch_of(number: int) -> list[np.ndarray]:
        rng = np.random.default_rng((seed, number))
        # Cut before it is sorted: what is left out is not always the longest.
        order = rng.permutation(len(sizes))[: count * batch_size]
        batches = []
        window = max(1, min(_WINDOW, count // 2)) * batch_size
        for start in range(0, len(order), window):
            examples = order[start : start + window]
            by_length = np.argsort(sizes[examples], kind="stable")
            # Not sorted within a batch: one device would have all the longest.
            batches += [
                examples[np.sort(places)]
                for places in by_length.reshape(-1, batch_size)
            ]
        return [batches[i] for i in rng.permutation(count)]

    def batch(number: int, _: int) -> np.ndarray:
        epoch, place = divmod(number, count)
        return epoch_of(epoch)[place]

    return grain.MapDataset.range(count).repeat(epochs).map_with_index(batch)


def eval_batches(
    dataset: datasets.Dataset,
    batch_size: int,
    *,
    widths: Sequence[int],
    share: Share = _WHOLE,
) -> Iterator[Rows]:
    """This process's `Rows` of the whole data set, once, in its order.

    Of several `widths` the shortest examples come first. The last batch is filled up
    with rows that have no response (`lengths == prompt_lengths`: everything is masked)
    and `example` -1.
    """
    sizes = lengths(dataset)
    order = np.arange(len(dataset))
    if len(widths) > 1:
        order = np.argsort(sizes, kind="stable")
    # Their last element is what fills up a batch.
    order, sizes = np.append(order, _FILLER), np.append(sizes, 1)
    for places in _filled(len(dataset), batch_size):
        batch = order[places]
        width = narrowest(widths, sizes[batch])
        yield _dataset_rows(dataset, batch[share], width)


def prompt_batches(
    prompts: Sequence[Prompt],
    batch_size: int,
    *,
    width: int,
    with_response: bool = False,
    share: Share = _WHOLE,
) -> Iterator[Rows]:
    """As `eval_batches`, for prompts: with the first reference, or no response."""
    for indices in _filled(len(prompts), batch_size):
        own = [prompts[i] if i != _FILLER else None for i in indices[share].tolist()]
        # A filler is as long as the row: generation finds it done and waits for none.
        yield from_lists(
            [list(p.tokens) if p else [0] * width for p in own],
            [list(p.response) if p and with_response else [] for p in own],
            width=width,
            examples=[p.example if p else _FILLER for p in own],
        )


def _filled(total: int, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, total, batch_size):
        indices = np.arange(start, start + batch_size)
        yield np.where(indices < total, indices, _FILLER)


def _dataset_rows(dataset: datasets.Dataset, indices: np.ndarray, width: int) -> Rows:
    examples = indices.tolist()
    found = iter(_columns(dataset, [i for i in examples if i != _FILLER]))
    filler = ([0], [], [])
    picked = [filler if i == _FILLER else next(found) for i in examples]
    prompts, responses, span_ids = zip(*picked, strict=True)
    return from_lists(
        prompts, responses, width=width, span_ids=span_ids, examples=examples
    )


def _columns(dataset: datasets.Dataset, indices: list[int]) -> Iterable[tuple]:
    if not indices:
        return []
    rows = dataset[indices]
    return zip(rows["prompt"], rows["response"], rows["span_ids"], strict=True)
