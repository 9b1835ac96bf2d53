"""Read and tokenise the data of a run, and report on it in the log."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import datasets
import numpy as np
from rich.console import Console

from mgsr_jax.data import dataset
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.data.forms import Form, recognise
from mgsr_jax.data.mixture import mixed
from mgsr_jax.data.report import DataReport
from mgsr_jax.data.source_settings import DataSource
from mgsr_jax.data.sources import OpenSource, open_source
from mgsr_jax.data.spans import resolve_chunker
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.teacher_config import names_for
from mgsr_jax.typing import Tokenizer

_SHOWN = 500  # characters of the first example's prompt, and of its response


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
    """Read the data of a run; print each source's form, counts and first example.

    Raises:
      ValueError: the data cannot be used, or holds only prompts and the settings need
        responses.
      FileNotFoundError: a source does not exist.
    """
    data, rejected = config.data, []
    _check_sources(config)

    def tables(sources: Sequence[DataSource], split: str) -> list[datasets.Dataset]:
        found = []
        for source in sources:
            table, report = _load(config, source, split, tokenizer)
            _print_report(config, source.path, report, console)
            _print_example(table, tokenizer, console)
            rejected.extend(_rejected(source.path, report))
            found.append(table)
        return found

    train = tables(data.train_sources, data.train_split)
    weights = [s.weight for s in data.train_sources if s.weight is not None]
    mixture = mixed(train, weights or None)
    sizes = [len(table) for table in train]
    _print_mixture(data.train_sources, sizes, len(mixture), console)
    valid = tables(data.valid_sources, data.valid_split)
    validation = mixed(valid) if valid else None
    _print_teachers(config.teacher_names, mixture, validation, console)
    return RunData(mixture, validation, tuple(rejected))


def _check_sources(config: TrainConfig) -> None:
    """Refuse sources that do not fit the settings, before any is tokenised."""
    data = config.data
    trained: set[Path] = set()
    for source in data.train_sources:
        opened = open_source(source.path, source.split or data.train_split)
        names = names_for(config.teacher, data, source)
        form = recognise(opened, data.columns_of(source), names)
        if form.prompts_only:
            _check_prompts_only(config, source.path, form)
        trained |= _files(opened)
    for source in data.valid_sources:
        opened = open_source(source.path, source.split or data.valid_split)
        names = names_for(config.teacher, data, source)
        form = recognise(opened, data.columns_of(source), names)
        if form.prompts_only:
            raise ValueError(
                f"data.valid {source.path!r} holds prompts only "
                f"({', '.join(form.read)}), but a validation loss needs responses; "
                "give other data, or leave data.valid out"
            )
        if both := trained & _files(opened):
            raise ValueError(
                f"{min(both)} is in data.train and in data.valid; validate on data "
                "that is not trained on"
            )


def _files(source: OpenSource) -> set[Path]:
    files = source.content if isinstance(source.content, list) else []
    return {file.resolve() for file in files}


def _load(
    config: TrainConfig, source: DataSource, split: str, tokenizer: Tokenizer
) -> tuple[datasets.Dataset, DataReport]:
    data = config.data
    teachers = names_for(config.teacher, data, source)
    return dataset.load(
        source.path,
        tokenizer,
        dataclasses.replace(data.encoding, teachers=teachers),
        chunker=resolve_chunker(data.chunker) if config.objective.span else None,
        spacy_model=data.spacy_model,
        split=source.split or split,
        columns=data.columns_of(source),
        cache_dir=data.cache_dir,
        max_bad_fraction=data.max_bad_fraction,
    )


def _check_prompts_only(config: TrainConfig, path: str, form: Form) -> None:
    """Refuse data without responses where a step or a teacher cache needs them."""
    has = f"data.train {path!r} holds prompts only ({', '.join(form.read)})"
    if config.teacher_cache is not None:
        raise ValueError(
            f"{has}, and teacher_cache holds the teacher's output on responses of the "
            "data; leave teacher_cache out"
        )
    if "{reference}" in (config.data.teacher_prompt or ""):
        raise ValueError(
            f"{has}, and data.teacher_prompt reads a {{reference}}; name its column: "
            "data.columns: {completion: COLUMN}, or leave {reference} out"
        )
    rollout, sft = config.rollout, config.objective.sft
    if not rollout.always_generates or config.objective.needs_data:
        raise ValueError(
            f"{has}, so every response must be the student's own: set rollout.policy "
            'to "on", rollout.probability to 1 and objective.sft to 0, as the recipe '
            f"opd does (got {rollout.policy!r}, {rollout.probability}, {sft}), and "
            "leave objective.sample_divergence out; if a column has responses, name "
            "it: data.columns: {completion: COLUMN}"
        )


def _rejected(path: str, report: DataReport) -> Iterator[str]:
    yield from report.messages
    if report.unlisted:
        yield f"{path}: {report.unlisted} more records, which are not listed"


def _print_report(
    config: TrainConfig, path: str, report: DataReport, console: Console
) -> None:
    def write(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    form = report.form
    write(
        f"{path}: {form.name} ({', '.join(form.read)}): {report.kept} examples, "
        f"{report.too_long} too long, {report.empty} empty, {report.malformed} "
        "malformed"
    )
    if form.unread:
        write(f"  columns that are not read: {', '.join(form.unread)}")
    for message in report.messages[:3]:
        write(f"  {message}")
    if report.many_too_long and config.data.too_long == "drop":
        write(f"  {_too_long_warning(config.data.encoding, report)}")


def _too_long_warning(encoding: Encoding, report: DataReport) -> str:
    return (
        f"warning: {report.too_long} of {report.kept + report.too_long} records are "
        "left out as too long. 50 %, 90 %, 99 % and 100 % of all have at most "
        f"{_listed(report.prompt_lengths)} tokens of prompt "
        f"(data.max_prompt_length={encoding.prompt_limit}) and "
        f"{_listed(report.lengths)} tokens of prompt and response "
        f"(data.max_length={encoding.max_length}); raise these settings to keep more"
    )


def _listed(lengths: tuple[int, ...]) -> str:
    return ", ".join(map(str, lengths))


def _print_mixture(
    sources: tuple[DataSource, ...], sizes: list[int], total: int, console: Console
) -> None:
    if len(sources) == 1:
        return
    weights = [
        size if source.weight is None else source.weight
        for source, size in zip(sources, sizes, strict=True)
    ]
    shares = ", ".join(
        f"{weight / sum(weights):.1%} {source.path}"
        for source, weight in zip(sources, weights, strict=True)
    )
    line = f"data.train: {total} examples an epoch: {shares}"
    console.print(line, markup=False, soft_wrap=True)


def _print_teachers(
    names: tuple[str, ...],
    train: datasets.Dataset,
    valid: datasets.Dataset | None,
    console: Console,
) -> None:
    """Print how many rows go to each of several teachers."""
    for setting, table in (("data.train", train), ("data.valid", valid)):
        teachers = None if table is None else dataset.teachers_of(table)
        if teachers is None:
            continue
        counts = np.bincount(teachers, minlength=len(names)).tolist()
        parts = [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
        line = f"{setting}: rows by teacher: {', '.join(parts)}"
        console.print(line, markup=False, soft_wrap=True)
        if setting == "data.train" and not all(counts):
            unused = names[counts.index(0)]
            line = (
                f"warning: no row of data.train goes to the teacher {unused}, which "
                "takes memory for nothing; leave it out"
            )
            console.print(line, style="yellow", markup=False, soft_wrap=True)


def _print_example(
    table: datasets.Dataset, tokenizer: Tokenizer, console: Console
) -> None:
    """Print the first example as the models read it."""
    first = table[0]
    for part in ("prompt", "response"):
        text = repr(_shortened(str(tokenizer.decode(first[part]))))
        if not first[part]:
            text = "none; the student writes it"
        console.print(f"  first {part}: {text}", markup=False, soft_wrap=True)


def _shortened(text: str) -> str:
    """The beginning and the end of a long text."""
    if len(text) <= _SHOWN:
        return text
    half = _SHOWN // 2
    return f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
