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

from mgsr_jax.data import spans
from mgsr_jax.data.encoding import (
    ALPACA,
    Encoding,
    cut_prompt,
    encode_prompt,
    encode_response,
    eos_id,
)
from mgsr_jax.data.forms import Form, recognise
from mgsr_jax.data.records import Example, Rejected, examples_of
from mgsr_jax.data.report import DataReport, check_report, data_report
from mgsr_jax.data.source_settings import Columns
from mgsr_jax.data.sources import OpenSource, open_source
from mgsr_jax.typing import Tokenizer

_COLUMNS = datasets.Features(
    {name: datasets.List(datasets.Value("int32")) for name in ("prompt", "response")}
    | {"span_ids": datasets.List(datasets.Value("int32"))}
    | {name: datasets.Value("string") for name in ("problem", "message")}
    | {"kept": datasets.Value("bool")}
    | {name: datasets.Value("int32") for name in ("prompt_length", "length")}
)
_KEYED_MODULES = (
    "conversations",
    "dataset",
    "encoding",
    "files",
    "forms",
    "records",
    "report",
    "source_settings",
    "sources",
    "spans",
)
"""Modules of this folder whose source is part of the cache key."""
_SLAB = 256  # records that are tokenised and chunked together
_BATCH = 10_000  # rows of the cached table that are in memory at a time


class _Row(TypedDict):
    """One row of the cached table: a record, used or not.

    `prompt_length` and `length`, of prompt and response, are those before any cut; 0 if
    the record was rejected.
    """

    prompt: list[int]
    response: list[int]
    span_ids: list[int] | np.ndarray
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

    The columns are `prompt`, `response` (ends with end-of-sequence unless it was cut;
    empty for prompts only) and `span_ids` (one id a token of the response). The cache
    key covers everything that they depend on: the content of the files, the names of
    columns, the tokenizer, the encoding, the chunker, and this code.

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
    source = open_source(path, split)
    form = recognise(source, columns)
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
    return table.select(kept).select_columns(["prompt", "response", "span_ids"]), report


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
    for module in _KEYED_MODULES:
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    chunked = chunker if isinstance(chunker, str | None) else Hasher.hash(chunker)
    special = sorted(tokenizer.special_tokens_map.items())
    template = getattr(tokenizer, "chat_template", None)
    backend = tokenizer.backend_tokenizer.to_str()
    versions = [_version(name) for name in ("tokenizers", "textblob", "spacy")]
    values = (source.digest(), form, encoding, chunked, spacy_model)
    versions = (_version(spacy_model), versions)
    digest.update(repr((values, versions, special, template, backend)).encode())
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
    examples = examples_of(source, form)
    while slab := list(itertools.islice(examples, _SLAB)):
        rows = [_encode(example, tokenizer, encoding) for example in slab]
        if chunker is not None:
            decoded = [spans.token_offsets(tokenizer, row["response"]) for row in rows]
            texts, offsets = zip(*decoded, strict=True)
            span_ids = spans.chunk(texts, offsets, chunker, spacy_model=spacy_model)
            for row, ids in zip(rows, span_ids, strict=True):
                row["span_ids"] = ids
        yield from rows


def _encode(
    example: Example | Rejected, tokenizer: Tokenizer, encoding: Encoding
) -> _Row:
    if isinstance(example, Rejected):
        return _row([], [], example.problem, example.message, kept=False)
    prompt = encode_prompt(
        tokenizer,
        example.instruction,
        example.input,
        template=encoding.template,
        add_special_tokens=encoding.add_special_tokens,
    )
    response = []
    if example.references:
        response = encode_response(tokenizer, example.references[0])
        response.append(eos_id(tokenizer))
    lengths = len(prompt), len(prompt) + len(response)
    limits = (
        ("prompt", lengths[0], encoding.max_prompt_length),
        ("prompt and response", lengths[1], encoding.max_length),
    )
    too_long = [
        f"{length} tokens of {name}, at most {limit}"
        for name, length, limit in limits
        if length > limit
    ]
    problem = "too_long" if too_long else ""
    message = f"{example.source}: {'; '.join(too_long)}" if too_long else ""
    if too_long and encoding.too_long == "drop":
        return _row([], [], problem, message, lengths, kept=False)
    prompt = cut_prompt(tokenizer, prompt, encoding.max_prompt_length)
    response = response[: encoding.max_length - len(prompt)]
    return _row(prompt, response, problem, message, lengths, kept=True)


def _row(
    prompt: list[int],
    response: list[int],
    problem: str,
    message: str,
    lengths: tuple[int, int] = (0, 0),
    *,
    kept: bool,
) -> _Row:
    return _Row(
        prompt=prompt,
        response=response,
        span_ids=[spans.NO_SPAN] * len(response),
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


def fingerprint(dataset: datasets.Dataset) -> str:
    """Digest of the tokens and spans of a data set, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for column in sorted(dataset.column_names):
        for row in dataset[column]:
            digest.update(np.asarray(row, np.int32).tobytes() + b";")
    return digest.hexdigest()
