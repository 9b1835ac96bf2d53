"""The data of a run, read and tokenised, and what the log says about it."""

import dataclasses

import datasets
from rich.console import Console

from mgsr_jax.data import dataset
from mgsr_jax.data.spans import resolve_chunker
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.typing import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunData:
    """Training and validation data of a run.

    Attributes:
      train: tokenised training data.
      valid: tokenised validation data, or None.
      rejected: one line for each record that is not used unchanged.
    """

    train: datasets.Dataset
    valid: datasets.Dataset | None
    rejected: tuple[str, ...]


def read_data(
    config: TrainConfig, tokenizer: Tokenizer, *, console: Console
) -> RunData:
    """Read the data of a run, and print the counts of its records.

    Raises:
      ValueError, FileNotFoundError: see `dataset.load`.
    """
    data = config.data
    train, report = _load_data(config, data.train, data.train_split, tokenizer)
    _print_report(data.train, report, console)
    valid, rejected = None, [*report.messages]
    if data.valid:
        valid, report = _load_data(config, data.valid, data.valid_split, tokenizer)
        _print_report(data.valid, report, console)
        rejected += report.messages
    return RunData(train, valid, tuple(rejected))


def _load_data(
    config: TrainConfig, path: str, split: str, tokenizer: Tokenizer
) -> tuple[datasets.Dataset, dataset.DataReport]:
    data = config.data
    return dataset.load(
        path,
        tokenizer,
        data.encoding,
        chunker=resolve_chunker(data.chunker) if config.objective.span else None,
        spacy_model=data.spacy_model,
        split=split,
        cache_dir=data.cache_dir,
        max_bad_fraction=data.max_bad_fraction,
    )


def _print_report(path: str, report: dataset.DataReport, console: Console) -> None:
    console.print(
        f"{path}: {report.kept} examples, {report.too_long} too long, "
        f"{report.empty} empty, {report.malformed} malformed"
    )
    for message in report.messages[:3]:
        console.print(f"  {message}", markup=False)
