"""Several tokenised sources as one data set."""

from collections.abc import Sequence

import datasets

_SEED = 0  # not the run's: a teacher cache then fits runs of every seed


def mixed(
    tables: Sequence[datasets.Dataset], weights: Sequence[float] | None = None
) -> datasets.Dataset:
    """Concatenate data sets, or draw from them in proportion to `weights`.

    Without weights every example is there once. With weights, the source of each
    example is drawn at random, source i with probability weights[i] / sum(weights), and
    its examples are taken in their order. This ends when every source has been used up
    at least once; a source that is used up earlier starts again from its beginning. An
    epoch is then as long as the source needs that is used up last, and examples of the
    other sources are in it several times. The draws are the same for every run.

    Args:
      tables: data sets with the same columns.
      weights: one number above 0 for each, or None.
    """
    if len(tables) == 1:
        return tables[0]
    if weights is None:
        return datasets.concatenate_datasets(list(tables))
    return datasets.interleave_datasets(
        list(tables),
        probabilities=[weight / sum(weights) for weight in weights],
        seed=_SEED,
        stopping_strategy="all_exhausted",
    )
