"""Tokenised instruction data, computed once and cached.

No record is cut or left out silently: the report counts and names each one.
"""

import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, cast

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from mgsr_jax.checkpoint import chat_template
from mgsr_jax.data import spans
from mgsr_jax.data.encoding import (
    ALPACA,
    Encoder,
    Encoding,
    cut_prompt,
    eos_id,
    resolved,
)
from mgsr_jax.data.forms import Form, recognise
from mgsr_jax.data.records import Example, Rejected, examples_of
from mgsr_jax.data.report import DataReport, check_report, data_report
from mgsr_jax.data.source_settings import Columns
from mgsr_jax.data.sources import OpenSource, open_source
from mgsr_jax.data.templates import Turns
from mgsr_jax.rows import UNTRAINED
from mgsr_jax.typing import Tokenizer

EARLIER = "earlier_span_ids"
"""Column that only data with train_on="all" has; see `rows.from_lists`."""
TEACHER_PROMPT = "teacher_prompt"
"""Column that only data with a prompt of the teacher's own has."""
TEACHER = "teacher"
"""Column that only data with several teachers has: the index of a row's teacher."""
_TOKENS = ("prompt", "response", "span_ids")
_COLUMNS = datasets.Features(
    {
        name: datasets.List(datasets.Value("int32"))
        for name in (*_TOKENS, EARLIER, TEACHER_PROMPT)
    }
    | {name: datasets.Value("string") for name in ("problem", "message")}
    | {"kept": datasets.Value("bool")}
    | {name: datasets.Value("int32") for name in (TEACHER, "prompt_length", "length")}
)
_KEYED_MODULES = (
    "conversations",
    "dataset",
    "encoding",
    "encoding_settings",
    "files",
    "forms",
    "plain_text",
    "records",
    "report",
    "source_settings",
    "sources",
    "spans",
    "teacher_names",
    "templates",
)
"""Modules of this folder whose source is part of the cache key."""
_SLAB = 256  # records that are tokenised and chunked together
_BATCH = 10_000  # rows of the cached table that are in memory at a time
_NOTHING = Turns([], [])


class _Row(TypedDict):
    """One row of the cached table: a record, used or not.

    `prompt_length` and `length`, of prompt and response, are those before any cut; 0 if
    the record was rejected.
    """

    prompt: list[int]
    response: list[int]
    span_ids: list[int]
    earlier_span_ids: list[int]
    teacher_prompt: list[int]
    teacher: int
    problem: str
    message: str
    kept: bool
    prompt_length: int
    length: int


def load(
    path: str | Path,
    tokenizer: Tokenizer,
    encoding: Encoding = ALPACA,
    *,
    chunker: spans.Chunker | None = "textblob",
    spacy_model: str = "en_core_web_sm",
    split: str = "train",
    columns: Columns | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.05,
) -> tuple[datasets.Dataset, DataReport]:
    """Load tokens and spans of a training or validation set from the cache, or fill it.

    The columns are `prompt`, `response` (ends with the token that ends a response
    unless it was cut; empty for prompts only) and `span_ids` (one id a token of the
    response); with train_on "all" also `earlier_span_ids` (see `rows.from_lists`), with
    a prompt of the teacher's own also `teacher_prompt`, and with several teachers also
    `teacher`, the index of the record's own. The cache key covers everything that they
    depend on: the content of the files, the names of columns, the tokenizer, the
    encoding, the chunker, and this code.

    Args:
      path: file, pattern, folder or hub data set; see `sources.open_source`.
      tokenizer: a fast tokenizer of transformers.
      encoding: template and lengths.
      chunker: see `spans.chunk`; None for no spans.
      spacy_model: pipeline for the chunker "spacy".
      split: split of a folder or hub data set.
      columns: the data's names of columns; see `forms.recognise`.
      cache_dir: folder of the cache; default: that of `datasets` (HF_DATASETS_CACHE).
      max_bad_fraction: largest share of malformed records that is accepted.

    Raises:
      ValueError: there is no usable record, too many are malformed (the error names the
        first few), or the columns fit no form.
      FileNotFoundError: see `sources.open_source`.
    """
    eos_id(tokenizer)
    encoding = resolved(encoding, tokenizer)
    source = open_source(path, split)
    form = recognise(source, columns, encoding.teachers)
    options = (source, form, tokenizer, encoding, chunker, spacy_model)
    try:
        table = datasets.Dataset.from_generator(
            lambda: _encoded(*options),
            features=_COLUMNS,
            cache_dir=os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE),
            fingerprint=_cache_key(*options),
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    assert isinstance(table, datasets.Dataset)
    kept = np.flatnonzero(np.fromiter(_column(table, "kept"), bool))
    report = _report(form, len(kept), table)
    check_report(path, report, len(table), max_bad_fraction)
    names = [*_TOKENS, *([EARLIER] if encoding.train_on == "all" else [])]
    if encoding.teacher_prompt is not None:
        names.append(TEACHER_PROMPT)
    if encoding.teachers is not None:
        names.append(TEACHER)
    return table.select(kept).select_columns(names), report


def _report(form: Form, kept: int, table: datasets.Dataset) -> DataReport:
    lengths = {
        name: (length for length in _column(table, name) if length)
        for name in ("prompt_length", "length")
    }
    return data_report(
        form,
        kept,
        _column(table, "problem"),
        _column(table, "message"),
        prompt_lengths=lengths["prompt_length"],
        lengths=lengths["length"],
    )


def _column(table: datasets.Dataset, name: str) -> Iterator[Any]:
    """The values of a column; it is never in memory as a whole."""
    rows = table.select_columns([name]).with_format("arrow")
    for batch in rows.iter(batch_size=_BATCH):
        yield from cast(pa.Table, batch)[name].to_pylist()


def _cache_key(
    source: OpenSource,
    form: Form,
    tokenizer: Tokenizer,
    encoding: Encoding,
    chunker: spans.Chunker | None,
    spacy_model: str,
) -> str:
    digest = hashlib.blake2b(digest_size=16)
    files = [Path(__file__).with_name(f"{module}.py") for module in _KEYED_MODULES]
    for file in (*files, Path(chat_template.__file__)):
        digest.update(file.read_bytes())
    chunked = chunker if isinstance(chunker, str | None) else Hasher.hash(chunker)
    special = sorted(tokenizer.special_tokens_map.items())
    backend = tokenizer.backend_tokenizer.to_str()
    packages = ("tokenizers", "transformers", "textblob", "spacy")
    versions = [_version(name) for name in packages]
    values = (source.digest(), form, encoding, chunked, spacy_model)
    versions = (_version(spacy_model), versions)
    digest.update(repr((values, versions, special, backend)).encode())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "none"


def _encoded(
    source: OpenSource,
    form: Form,
    tokenizer: Tokenizer,
    encoding: Encoding,
    chunker: spans.Chunker | None,
    spacy_model: str,
) -> Iterator[_Row]:
    """Rows of the cached table, one a record."""
    examples, encoder = examples_of(source, form), Encoder(tokenizer, encoding)
    while slab := list(itertools.islice(examples, _SLAB)):
        rows = [_encode(example, encoder) for example in slab]
        if chunker is not None:
            _mark_phrases(rows, tokenizer, chunker, spacy_model)
        yield from rows


def _mark_phrases(
    rows: list[_Row], tokenizer: Tokenizer, chunker: spans.Chunker, spacy_model: str
) -> None:
    """Fill in the span ids of every trained response; each is a text of its own."""
    responses = []  # tokens, the list for their span ids, its index of the first
    for row in rows:
        responses.append((row["response"], row["span_ids"], 0))
        ids = row["earlier_span_ids"]
        for start, end in _trained(ids):
            responses.append((row["prompt"][start:end], ids, start))
    decoded = [spans.token_offsets(tokenizer, tokens) for tokens, _, _ in responses]
    texts, offsets = zip(*decoded, strict=True)
    span_ids = spans.chunk(texts, offsets, chunker, spacy_model=spacy_model)
    for (_, ids, start), found in zip(responses, span_ids, strict=True):
        ids[start : start + len(found)] = found.tolist()


def _trained(earlier_span_ids: list[int]) -> Iterator[tuple[int, int]]:
    """(start, end) of each run of trained tokens."""
    trained = np.not_equal([UNTRAINED, *earlier_span_ids, UNTRAINED], UNTRAINED)
    edges = np.flatnonzero(trained[1:] != trained[:-1]).tolist()
    return zip(edges[::2], edges[1::2], strict=True)


def _encode(example: Example | Rejected, encoder: Encoder) -> _Row:
    turns = example if isinstance(example, Rejected) else encoder.encode(example)
    if isinstance(turns, Rejected):
        return _row(_NOTHING, turns.problem, turns.message, kept=False)
    assert isinstance(example, Example)
    encoding, prompt, response = encoder.encoding, turns.prompt, turns.response
    lengths = len(prompt), len(prompt) + len(response)
    limits = (
        ("prompt", lengths[0], encoding.prompt_limit),
        ("prompt and response", lengths[1], encoding.max_length),
        ("teacher_prompt", len(turns.teacher_prompt), encoding.teacher_limit),
    )
    too_long = [
        f"{length} tokens of {name}, at most {limit}"
        for name, length, limit in limits
        if length > limit
    ]
    problem = "too_long" if too_long else ""
    message = f"{example.source}: {'; '.join(too_long)}" if too_long else ""
    if too_long and encoding.too_long == "drop":
        return _row(_NOTHING, problem, message, lengths, kept=False)
    if too_long:  # only without a chat template, which trains no earlier response
        prompt = cut_prompt(encoder.tokenizer, prompt, encoding.prompt_limit)
        turns = Turns(prompt, response[: encoding.max_length - len(prompt)])
    return _row(turns, problem, message, lengths, example.teacher, kept=True)


def _row(
    turns: Turns,
    problem: str,
    message: str,
    lengths: tuple[int, int] = (0, 0),
    teacher: int = 0,
    *,
    kept: bool,
) -> _Row:
    earlier = []
    if turns.earlier:
        earlier = [UNTRAINED] * len(turns.prompt)
    for start, end in turns.earlier:
        earlier[start:end] = [spans.NO_SPAN] * (end - start)
    return _Row(
        prompt=turns.prompt,
        response=turns.response,
        span_ids=[spans.NO_SPAN] * len(turns.response),
        earlier_span_ids=earlier,
        teacher_prompt=list(turns.teacher_prompt),
        teacher=teacher,
        problem=problem,
        message=message,
        kept=kept,
        prompt_length=lengths[0],
        length=lengths[1],
    )


def lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Number of tokens of prompt and response of every example. [examples]"""

    def column_lengths(table: pa.Table, name: str) -> np.ndarray:
        return pc.call_function("list_value_length", [table[name]]).to_numpy()

    columns = dataset.select_columns(["prompt", "response"]).with_format("arrow")
    sizes = [np.zeros(0, np.int32)]
    # In batches: the whole table may take gigabytes.
    for batch in columns.iter(batch_size=_BATCH):
        table = cast(pa.Table, batch)
        parts = [column_lengths(table, name) for name in ("prompt", "response")]
        sizes.append(np.add(*parts))
    return np.concatenate(sizes)


def teachers_of(dataset: datasets.Dataset) -> np.ndarray | None:
    """Index of the teacher of every example; None without several. [examples]"""
    if TEACHER not in dataset.column_names:
        return None
    return np.fromiter(_column(dataset, TEACHER), np.int32, len(dataset))


def fingerprint(dataset: datasets.Dataset) -> str:
    """Digest of the tokens and spans of a data set, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for column in sorted(dataset.column_names):
        for row in dataset[column]:
            digest.update(np.asarray(row, np.int32).tobytes() + b";")
    return digest.hexdigest()
