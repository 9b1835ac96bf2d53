"""Instruction data: records -> tokens, once and cached.

Nothing is cut or left out silently: every record that is not used as it stands is
counted and named.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import datasets.config
import numpy as np
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from mgsr_jax.data import records, spans
from mgsr_jax.data.encoding import (
    ALPACA,
    Encoding,
    cut_prompt,
    encode_prompt,
    encode_response,
    eos_id,
)
from mgsr_jax.data.records import Example, Rejected

_COLUMNS = datasets.Features(
    {name: datasets.List(datasets.Value("int32")) for name in ("prompt", "response")}
    | {"span_ids": datasets.List(datasets.Value("int32"))}
    | {name: datasets.Value("string") for name in ("problem", "message")}
    | {"kept": datasets.Value("bool")}
)
_SLAB = 256  # records that are tokenised and chunked together


@dataclasses.dataclass(frozen=True)
class DataReport:
    """What became of the records of a data set.

    Attributes:
      kept: examples that are used.
      malformed: no JSON, not UTF-8, keys missing or of a wrong type; left out.
      empty: no instruction or no output; left out.
      too_long: left out, or cut where `too_long="truncate"` (then also in `kept`).
      messages: one line "file:line: reason" for each of them, in the data's order.
    """

    kept: int
    malformed: int
    empty: int
    too_long: int
    messages: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One example of an evaluation set.

    Attributes:
      tokens: the prompt.
      response: the first reference and its end-of-sequence, cut at `max_length`.
      references: every reference, whole.
      example: its index among the prompts; random keys are folded by it.
      scored: whether the set's metrics count it.
      source: "file:line".
    """

    tokens: tuple[int, ...]
    response: tuple[int, ...]
    references: tuple[str, ...]
    example: int
    scored: bool
    source: str


def load(
    path: str | Path,
    tokenizer: Any,
    encoding: Encoding = ALPACA,
    *,
    chunker: spans.Chunker | None = "textblob",
    spacy_model: str = "en_core_web_sm",
    split: str = "train",
    cache_dir: str | os.PathLike | None = None,
    max_bad_fraction: float = 0.05,
) -> tuple[datasets.Dataset, DataReport]:
    """A data set for training or validation: tokens and spans, computed once.

    The columns are `prompt`, `response` (ends with end-of-sequence unless it was cut)
    and `span_ids` (of the response). The cache is keyed by everything that they depend
    on: the file's content, the tokenizer, the encoding, the chunker, this code.

    Args:
      chunker: as in `spans.chunk`; None for no spans.
      split: of a hub data set.
      cache_dir: default: that of `datasets` (HF_DATASETS_CACHE).
      max_bad_fraction: more malformed records than this share are an error.

    Raises:
      ValueError: no usable record, or too many malformed ones; the first few are named.
      FileNotFoundError: as `records.read_examples`.
    """
    eos_id(tokenizer)
    key = _cache_key(path, split, tokenizer, encoding, chunker, spacy_model)
    options = (path, split, tokenizer, encoding, chunker, spacy_model)
    try:
        table = datasets.Dataset.from_generator(
            lambda: _encoded(*options),
            features=_COLUMNS,
            cache_dir=os.fspath(cache_dir or datasets.config.HF_DATASETS_CACHE),
            fingerprint=key,
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    return _used(path, table, max_bad_fraction)


def _used(
    path: str | Path, table: datasets.Dataset, max_bad_fraction: float
) -> tuple[datasets.Dataset, DataReport]:
    kept = np.flatnonzero(table["kept"]).tolist()
    report = _report(len(kept), table["problem"], table["message"])
    _check_report(path, report, len(table), max_bad_fraction)
    return table.select(kept).select_columns(["prompt", "response", "span_ids"]), report


def _report(kept: int, problems: Iterable[str], messages: Iterable[str]) -> DataReport:
    count = collections.Counter(problems)
    return DataReport(
        kept=kept,
        malformed=count["malformed"],
        empty=count["empty"],
        too_long=count["too_long"],
        messages=tuple(message for message in messages if message),
    )


def _check_report(
    path: str | Path, report: DataReport, total: int, max_bad_fraction: float
) -> None:
    first = "; ".join(report.messages[:3])
    if report.malformed > max_bad_fraction * total:
        raise ValueError(
            f"data {str(path)!r}: {report.malformed} of {total} records are "
            f"malformed, more than max_bad_fraction={max_bad_fraction}; first: {first}"
        )
    if report.kept == 0:
        raise ValueError(
            f"data {str(path)!r} has no usable record among {total}; "
            + (f"first: {first}" if first else "it is empty")
        )


def _cache_key(*parts: Any) -> str:
    path, split, tokenizer, encoding, chunker, spacy_model = parts
    digest = hashlib.blake2b(digest_size=16)
    if records.is_local(path):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        source = Path(path).name
    else:
        source = f"{path} {split} {records.stored(path, split)._fingerprint}"
    for module in ("dataset", "encoding", "records", "spans"):
        digest.update(Path(__file__).with_name(f"{module}.py").read_bytes())
    chunked = chunker if isinstance(chunker, str | None) else Hasher.hash(chunker)
    special = sorted(tokenizer.special_tokens_map.items())
    template = getattr(tokenizer, "chat_template", None)
    backend = tokenizer.backend_tokenizer.to_str()
    versions = [_version(name) for name in ("tokenizers", "textblob", "spacy")]
    values = (source, encoding, chunked, spacy_model, _version(spacy_model), versions)
    digest.update(repr((values, special, template, backend)).encode())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "none"


def _encoded(
    path: str | Path,
    split: str,
    tokenizer: Any,
    encoding: Encoding,
    chunker: spans.Chunker | None,
    spacy_model: str,
) -> Iterator[dict[str, Any]]:
    """The table that is cached: one row a record, used or not."""
    examples = records.read_examples(path, split=split)
    first = next(examples, None)
    if first is None:  # `datasets` would say that the split corresponds to no data
        _check_report(path, _report(0, (), ()), 0, 0.0)
        return
    examples = itertools.chain([first], examples)
    while slab := list(itertools.islice(examples, _SLAB)):
        rows = [_encode(example, tokenizer, encoding) for example in slab]
        if chunker is not None:
            decoded = [spans.token_offsets(tokenizer, row["response"]) for row in rows]
            texts, offsets = zip(*decoded, strict=True)
            found = spans.chunk(texts, offsets, chunker, spacy_model=spacy_model)
            for row, span_ids in zip(rows, found, strict=True):
                row["span_ids"] = span_ids
        yield from rows


def _prompt(example: Example, tokenizer: Any, encoding: Encoding) -> list[int]:
    return encode_prompt(
        tokenizer,
        example.instruction,
        example.input,
        template=encoding.template,
        add_special_tokens=encoding.add_special_tokens,
    )


def _encode(
    example: Example | Rejected, tokenizer: Any, encoding: Encoding
) -> dict[str, Any]:
    row = {"prompt": [], "response": [], "span_ids": [], "kept": False}
    if isinstance(example, Rejected):
        return row | {"problem": example.problem, "message": example.message}
    prompt = _prompt(example, tokenizer, encoding)
    response = encode_response(tokenizer, example.references[0]) + [eos_id(tokenizer)]
    limits = (
        ("prompt", len(prompt), encoding.max_prompt_length),
        ("prompt and response", len(prompt) + len(response), encoding.max_length),
    )
    over = [
        f"{n} tokens of {name}, at most {most}" for name, n, most in limits if n > most
    ]
    row["kept"] = not over or encoding.too_long == "truncate"
    if row["kept"]:
        prompt = cut_prompt(tokenizer, prompt, encoding.max_prompt_length)
        response = response[: encoding.max_length - len(prompt)]
        span_ids = [spans.NO_SPAN] * len(response)
        row |= {"prompt": prompt, "response": response, "span_ids": span_ids}
    reason = f"{example.source}: {'; '.join(over)}" if over else ""
    return row | {"problem": "too_long" if over else "", "message": reason}


def load_prompts(
    path: str | Path,
    tokenizer: Any,
    encoding: Encoding = ALPACA,
    *,
    split: str = "train",
    max_bad_fraction: float = 0.05,
) -> tuple[list[Prompt], DataReport]:
    """An evaluation set. Only prompts can be too long: references are compared whole.

    Raises:
      ValueError: no usable record, or too many malformed ones; the first few are named.
      FileNotFoundError: as `records.read_examples`.
    """
    prompts: list[Prompt] = []
    problems, messages = [], []
    for example in records.read_examples(path, split=split):
        if isinstance(example, Rejected):
            problems.append(example.problem)
            messages.append(example.message)
            continue
        tokens = _prompt(example, tokenizer, encoding)
        limit = encoding.max_prompt_length
        over = len(tokens) > limit
        problems.append("too_long" if over else "")
        if over:
            messages.append(
                f"{example.source}: {len(tokens)} tokens of prompt, at most {limit}"
            )
        if over and encoding.too_long == "drop":
            continue
        tokens = cut_prompt(tokenizer, tokens, limit)
        response = encode_response(tokenizer, example.references[0])
        response = (response + [eos_id(tokenizer)])[: encoding.max_length - len(tokens)]
        prompts.append(
            Prompt(
                tuple(tokens),
                tuple(response),
                example.references,
                len(prompts),
                example.scored,
                example.source,
            )
        )
    report = _report(len(prompts), problems, messages)
    _check_report(path, report, len(problems), max_bad_fraction)
    return prompts, report


def lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Tokens of prompt and response of every example."""

    def of(column: Any) -> np.ndarray:
        return pc.call_function("list_value_length", [column]).to_numpy()

    columns = dataset.select_columns(["prompt", "response"]).with_format("arrow")
    tables: Any = columns.iter(batch_size=10_000)  # at once they may be gigabytes
    found = [of(table["prompt"]) + of(table["response"]) for table in tables]
    return np.concatenate([np.zeros(0, np.int32), *found])


def fingerprint(dataset: datasets.Dataset) -> str:
    """A digest of the tokens and spans themselves, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for column in sorted(dataset.column_names):
        for row in dataset[column]:
            digest.update(np.asarray(row, np.int32).tobytes() + b";")
    return digest.hexdigest()
