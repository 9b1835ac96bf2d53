"""Tokenised instruction data, computed once and cached.

No record is cut or left out silently: the report counts and names each one.
"""

import hashlib
import importlib.metadata
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict, cast

import datasets
import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from mgsr_jax.checkpoint import chat_template
from mgsr_jax.checkpoint.chat_template import RenderingError
from mgsr_jax.data import records, spans
from mgsr_jax.data.encoding import (
    ALPACA,
    Encoder,
    Encoding,
    cut_prompt,
    eos_id,
    resolved,
)
from mgsr_jax.data.records import DataReport, Example, Rejected
from mgsr_jax.data.templates import Turns
from mgsr_jax.rows import UNTRAINED
from mgsr_jax.typing import Tokenizer

EARLIER = "earlier_span_ids"
"""Column that only data with train_on="all" has; see `rows.from_lists`."""
_TOKENS = ("prompt", "response", "span_ids")
_COLUMNS = datasets.Features(
    {name: datasets.List(datasets.Value("int32")) for name in (*_TOKENS, EARLIER)}
    | {name: datasets.Value("string") for name in ("problem", "message")}
    | {"kept": datasets.Value("bool")}
)
_KEYED_MODULES = (
    "dataset",
    "encoding",
    "plain_text",
    "records",
    "spans",
    "templates",
)
"""Modules of this folder whose source is part of the cache key."""
_SLAB = 256  # records that are tokenised and chunked together
_NOTHING = Turns([], [])


class _Row(TypedDict):
    """One row of the cached table: a record, used or not."""

    prompt: list[int]
    response: list[int]
    span_ids: list[int]
    earlier_span_ids: list[int]
    problem: str
    message: str
    kept: bool


def load(
    path: str | Path,
    tokenizer: Tokenizer,
    encoding: Encoding = ALPACA,
    *,
    chunker: spans.Chunker | None = "textblob",
    spacy_model: str = "en_core_web_sm",
    split: str = "train",
    cache_dir: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = 0.05,
) -> tuple[datasets.Dataset, DataReport]:
    """Load tokens and spans of a training or validation set from the cache, or fill it.

    The columns are `prompt`, `response` (ends with the token that ends a response
    unless it was cut) and `span_ids` (one id a token of the response); with train_on
    "all" also `earlier_span_ids` (see `rows.from_lists`). The cache key covers
    everything that they depend on: the content of the file, the tokenizer, the
    encoding, the chunker, and this code.

    Args:
      path: file or name of a hub data set.
      tokenizer: a fast tokenizer of transformers.
      encoding: template and lengths.
      chunker: see `spans.chunk`; None for no spans.
      spacy_model: pipeline for the chunker "spacy".
      split: split of a hub data set.
      cache_dir: folder of the cache; default: that of `datasets` (HF_DATASETS_CACHE).
      max_bad_fraction: largest share of malformed records that is accepted.

    Raises:
      ValueError: there is no usable record, or too many are malformed; the error names
        the first few.
      FileNotFoundError: see `records.read_examples`.
    """
    eos_id(tokenizer)
    encoding = resolved(encoding, tokenizer)
    options = (path, split, tokenizer, encoding, chunker, spacy_model)
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
    kept = np.flatnonzero(table["kept"]).tolist()
    report = records.data_report(len(kept), table["problem"], table["message"])
    records.check_report(path, report, len(table), max_bad_fraction)
    columns = [*_TOKENS, *([EARLIER] if encoding.train_on == "all" else [])]
    return table.select(kept).select_columns(columns), report


def _cache_key(
    path: str | Path,
    split: str,
    tokenizer: Tokenizer,
    encoding: Encoding,
    chunker: spans.Chunker | None,
    spacy_model: str,
) -> str:
    digest = hashlib.blake2b(digest_size=16)
    if records.is_local(path):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        source = Path(path).name
    else:
        source = f"{path} {split} {records.load_table(path, split)._fingerprint}"
    files = [Path(__file__).with_name(f"{module}.py") for module in _KEYED_MODULES]
    for file in (*files, Path(chat_template.__file__)):
        digest.update(file.read_bytes())
    chunked = chunker if isinstance(chunker, str | None) else Hasher.hash(chunker)
    special = sorted(tokenizer.special_tokens_map.items())
    backend = tokenizer.backend_tokenizer.to_str()
    packages = ("tokenizers", "transformers", "textblob", "spacy")
    versions = [_version(name) for name in packages]
    values = (source, encoding, chunked, spacy_model, _version(spacy_model), versions)
    digest.update(repr((values, special, backend)).encode())
    return digest.hexdigest()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return "none"


def _encoded(
    path: str | Path,
    split: str,
    tokenizer: Tokenizer,
    encoding: Encoding,
    chunker: spans.Chunker | None,
    spacy_model: str,
) -> Iterator[_Row]:
    """Rows of the cached table, one a record."""
    examples = records.read_examples(path, split=split)
    first = next(examples, None)
    if first is None:  # the error of `datasets` would not name the file
        records.check_report(path, records.data_report(0, (), ()), 0, 0.0)
        return
    examples = itertools.chain([first], examples)
    encoder = Encoder(tokenizer, encoding)
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
    if isinstance(example, Rejected):
        return _row(_NOTHING, example.problem, example.message, kept=False)
    try:
        turns = _turns(example, encoder)
    except RenderingError as error:
        message = f"{example.source}: {error}"
        return _row(_NOTHING, "malformed", message, kept=False)
    encoding, (prompt, response, _) = encoder.encoding, turns
    limits = (
        ("prompt", len(prompt), encoding.prompt_limit),
        ("prompt and response", len(prompt) + len(response), encoding.max_length),
    )
    too_long = [
        f"{length} tokens of {name}, at most {limit}"
        for name, length, limit in limits
        if length > limit
    ]
    problem = "too_long" if too_long else ""
    message = f"{example.source}: {'; '.join(too_long)}" if too_long else ""
    if too_long and encoding.too_long == "drop":
        return _row(_NOTHING, problem, message, kept=False)
    if too_long:  # only without a chat template, where no earlier response exists
        prompt = cut_prompt(encoder.tokenizer, prompt, encoding.prompt_limit)
        turns = Turns(prompt, response[: encoding.max_length - len(prompt)])
    return _row(turns, problem, message, kept=True)


def _turns(example: Example, encoder: Encoder) -> Turns:
    """Tokens of an example; prompts only have no response."""
    messages, input = example.messages, example.input
    if not example.references:
        return Turns(encoder.prompt(messages, input), [])
    return encoder.turns(messages, input, example.references[0])


def _row(turns: Turns, problem: str, message: str, *, kept: bool) -> _Row:
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
        problem=problem,
        message=message,
        kept=kept,
    )


def lengths(dataset: datasets.Dataset) -> np.ndarray:
    """Number of tokens of prompt and response of every example. [examples]"""

    def column_lengths(table: pa.Table, name: str) -> np.ndarray:
        return pc.call_function("list_value_length", [table[name]]).to_numpy()

    columns = dataset.select_columns(["prompt", "response"]).with_format("arrow")
    sizes = [np.zeros(0, np.int32)]
    # In batches: the whole table may take gigabytes.
    for batch in columns.iter(batch_size=10_000):
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
