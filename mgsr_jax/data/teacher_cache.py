"""The teacher's most probable classes of every scored position, kept on disk.

A folder of safetensors files, some examples each, and manifest.json, which is written
last. Each file says in its header what it was made from, so a stopped run goes on where
it was and a file of another run is never taken for its own. What is read is found by
the example's index and checked against the example's tokens: a cache and the data
cannot drift apart unnoticed.

A file holds, for P scored positions of N examples: `logits` [P, K] relative to the
largest, `indices` [P, K], `logsumexp` [P]; and as its index `offsets` [N + 1] into P,
and of each example `tokens`, a digest of what the teacher read, and `contents`, a
checksum of what it said. The manifest has a digest of each file's index: no byte that
is read is unchecked.
"""

import dataclasses
import hashlib
import json
import math
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mgsr_jax.losses import TopKTeacher
from mgsr_jax.rows import Rows

FORMAT = 1
MANIFEST = "manifest.json"
LogitsDtype = Literal["float16", "float32"]
PathLike = str | os.PathLike[str]

_HEADER = "teacher_cache"  # one key: safetensors writes several in any order
_DIGEST = 16  # bytes
_INDEX = ("offsets", "tokens", "contents")
_AGAIN = "mgsr cache-teacher --config CONFIG --output"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a teacher's words on a data set depend on.

    Attributes:
      teacher: digest of its folder's config.json and weights.
      teacher_dtype: as in the settings of a run.
      tokenizer: digest of its map from id to token.
      data: digest of the tokenised data set, in its order.
    """

    teacher: str
    teacher_dtype: str
    tokenizer: str
    data: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a cache is made from and how; equal recipes make equal caches.

    Attributes:
      origin: what it is made from.
      examples: of the data set.
      vocab_size: real tokens; classes beyond it have probability 0.
      top_k: K, classes kept of each position.
      logits_dtype: of the K logits on disk. float16 moves the logit of a class that is
        d nats below the most probable one by at most d / 2048; what the K classes
        leave to the others stays exact.
      examples_per_shard: N; the last file may hold fewer.

    Raises:
      ValueError: `top_k` is not in 1..vocab_size.
    """

    origin: Origin
    examples: int
    vocab_size: int
    top_k: int = 512
    logits_dtype: LogitsDtype = "float16"
    examples_per_shard: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.vocab_size:
            raise ValueError(
                f"top_k={self.top_k}; expected 1 to {self.vocab_size}, the number of "
                "tokens"
            )

    @property
    def indices_dtype(self) -> str:
        """uint16 where the vocabulary permits."""
        return "uint16" if self.vocab_size <= 1 << 16 else "int32"

    @property
    def shards(self) -> tuple[str, ...]:
        """The files' names, in the order of the examples."""
        count = math.ceil(self.examples / self.examples_per_shard)
        return tuple(f"shard-{number:05d}.safetensors" for number in range(count))

    def shard_examples(self, number: int) -> range:
        """The examples that a file holds."""
        start = number * self.examples_per_shard
        return range(start, min(start + self.examples_per_shard, self.examples))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A finished cache.

    Attributes:
      recipe: what it was made from and how.
      shard_digests: of each file's index.
      positions: scored positions in all.
      held_mass: the share of the teacher's probability that the K classes hold, a mean
        over the positions.
    """

    recipe: Recipe
    shard_digests: tuple[str, ...]
    positions: int
    held_mass: float


class CachedExample(NamedTuple):
    """One example as it is written.

    Attributes:
      tokens: prompt and response. [length]
      prompt_length: tokens of the prompt.
      teacher: of its length - prompt_length scored positions, numpy. [R, K], [R]
    """

    tokens: np.ndarray
    prompt_length: int
    teacher: TopKTeacher


def begin(folder: PathLike, recipe: Recipe) -> list[int]:
    """Makes the folder; the numbers of the files that are still to be written.

    Raises:
      FileExistsError: the folder holds something else.
      ValueError: it holds files of another recipe (which part differs is named), or a
        damaged one.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; choose a folder's name")
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    held = sorted(name for name in names if name.startswith("shard-"))
    if foreign := sorted(names - {MANIFEST} - set(held)):
        raise FileExistsError(
            f"output {folder} holds {foreign[0]}, which is no part of a teacher cache; "
            "choose a new folder"
        )
    for name in held:
        _check_equal(folder, _header(folder / name)["recipe"], _flat(recipe))
    return [i for i, name in enumerate(recipe.shards) if name not in names]


def write_shard(
    folder: PathLike, recipe: Recipe, number: int, examples: Sequence[CachedExample]
) -> None:
    """Writes all of a file's examples or nothing: it is named when it is complete."""
    if len(examples) != (size := len(recipe.shard_examples(number))):
        file = recipe.shards[number]
        raise ValueError(f"{len(examples)} examples for {file}; expected {size}")
    found = [_stored(example.teacher, recipe) for example in examples]
    parts = [teacher for teacher, _ in found]
    counts = [len(teacher.logsumexp) for teacher in parts]
    tokens = [_tokens_digest(e.tokens, e.prompt_length) for e in examples]
    arrays = {
        name: np.concatenate([getattr(teacher, name) for teacher in parts])
        for name in TopKTeacher._fields
    }
    index = {
        "offsets": np.cumsum([0, *counts], dtype=np.int64),
        "tokens": np.frombuffer(b"".join(tokens), np.uint8).reshape(-1, _DIGEST),
        "contents": np.array([_checksum(teacher) for teacher in parts], np.uint32),
    }
    header = {
        "recipe": _flat(recipe),
        "positions": sum(counts),
        "held_mass": math.fsum(held for _, held in found),
        "index": _digest(*index.values()).hex(),
    }
    file = Path(folder) / recipe.shards[number]
    unfinished = file.with_name(f".{file.name}")
    save_file(arrays | index, unfinished, metadata={_HEADER: json.dumps(header)})
    unfinished.replace(file)


def finish(folder: PathLike, recipe: Recipe) -> Manifest:
    """Writes the manifest over the files that are there.

    Raises:
      ValueError: a file is missing or damaged.
    """
    folder = Path(folder)
    headers = [_header(folder / name) for name in recipe.shards]
    positions = sum(header["positions"] for header in headers)
    held = math.fsum(header["held_mass"] for header in headers)
    manifest = Manifest(
        recipe=recipe,
        shard_digests=tuple(header["index"] for header in headers),
        positions=positions,
        held_mass=held / max(positions, 1),
    )
    text = json.dumps({"format": FORMAT} | dataclasses.asdict(manifest), indent=2)
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(folder / MANIFEST)
    return manifest


class TeacherCache:
    """A finished cache, read example by example; the files stay on disk.

    Attributes:
      folder: where it lies.
      manifest: what it says of itself.
    """

    def __init__(self, folder: PathLike, manifest: Manifest):
        self.folder, self.manifest = Path(folder), manifest
        files = zip(manifest.recipe.shards, manifest.shard_digests, strict=True)
        self._shards = [_Shard.open(self.folder / name, own) for name, own in files]

    @classmethod
    def open(cls, folder: PathLike, origin: Origin) -> "TeacherCache":
        """The cache of exactly this teacher, tokenizer and data; no other.

        Raises:
          FileNotFoundError: there is no finished cache.
          ValueError: it was made from something else (what, is named), or a file is
            missing or damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        made_from = dataclasses.asdict(manifest.recipe.origin)
        _check_equal(folder, made_from, dataclasses.asdict(origin))
        return cls(folder, manifest)

    def lookup(self, rows: Rows) -> TopKTeacher:
        """What the teacher says at every scored position of host rows of the data set.

        Aligned with `next_token_view(rows)`; zeros where nothing is scored.

        Args:
          rows: ground-truth rows as `train_batches` and `eval_batches` give them,
            of any width. [B, S]

        Returns:
          numpy, in the dtypes on disk: logits and indices [B, S - 1, K], logsumexp
          [B, S - 1].

        Raises:
          ValueError: a row is not the example that the teacher read, or a file is
            damaged.
        """
        recipe, (size, width) = self.manifest.recipe, rows.tokens.shape
        shape = (size, width - 1, recipe.top_k)
        teacher = TopKTeacher(
            logits=np.zeros(shape, recipe.logits_dtype),
            indices=np.zeros(shape, recipe.indices_dtype),
            logsumexp=np.zeros(shape[:2], np.float32),
        )
        for b in range(size):
            start, end = int(rows.prompt_lengths[b]), int(rows.lengths[b])
            if start == end:  # fills up a batch: nothing is scored
                continue
            if not rows.ground_truth[b]:
                raise ValueError(
                    f"row {b} was written by a model; the teacher cache {self.folder} "
                    "knows the data's own text alone: run the teacher on this one"
                )
            tokens = np.asarray(rows.tokens[b, :end])
            found = self._example(int(rows.example[b]), tokens, start)
            for whole, part in zip(teacher, found, strict=True):
                whole[b, start - 1 : end - 1] = part
        return teacher

    def _example(
        self, example: int, tokens: np.ndarray, prompt_length: int
    ) -> TopKTeacher:
        recipe = self.manifest.recipe
        if not 0 <= example < recipe.examples:
            raise ValueError(
                f"example {example} is not among the {recipe.examples} of the teacher "
                f"cache {self.folder}; rebuild it: {_AGAIN} NEW_FOLDER"
            )
        number, row = divmod(example, recipe.examples_per_shard)
        shard = self._shards[number]
        if bytes(shard.tokens[row]) != _tokens_digest(tokens, prompt_length):
            raise ValueError(
                f"example {example} is not the text that the teacher cache "
                f"{self.folder} holds for it: the data changed, or its order; rebuild "
                f"the cache: {_AGAIN} NEW_FOLDER"
            )
        return shard.read(row)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A file that is open; only what is asked for is read."""

    path: Path
    file: Any
    offsets: np.ndarray
    tokens: np.ndarray
    contents: np.ndarray

    @classmethod
    def open(cls, path: Path, digest: str) -> "_Shard":
        file = _open(path)
        try:
            index = [file.get_tensor(name) for name in _INDEX]
        except SafetensorError as error:
            raise ValueError(_damaged(path, str(error))) from error
        if _digest(*index).hex() != digest:
            raise ValueError(_damaged(path, "its index changed"))
        return cls(path, file, *index)

    def read(self, row: int) -> TopKTeacher:
        where = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        try:
            found = TopKTeacher(
                *(self.file.get_slice(name)[where] for name in TopKTeacher._fields)
            )
        except SafetensorError as error:
            raise ValueError(_damaged(self.path, str(error))) from error
        if int(self.contents[row]) != _checksum(found):
            raise ValueError(_damaged(self.path, "its contents changed"))
        return found


def _stored(teacher: TopKTeacher, recipe: Recipe) -> tuple[TopKTeacher, float]:
    """As it is on disk, and the mass held of each position, summed.

    Rounded logits get the logsumexp that leaves the mass outside them what it was: the
    rounding of a large class is more than all of a small tail.
    """
    exact, logsumexp = (
        np.asarray(part).astype(np.float64)
        for part in (teacher.logits, teacher.logsumexp)
    )
    dtype = np.dtype(recipe.logits_dtype)
    logits = np.maximum(exact, np.finfo(dtype).min).astype(dtype)
    held, rounded = (np.exp(z.astype(np.float64)).sum(-1) for z in (exact, logits))
    tail = np.maximum(np.exp(logsumexp) - held, 0.0)
    stored = TopKTeacher(
        logits=logits,
        indices=np.asarray(teacher.indices).astype(recipe.indices_dtype),
        logsumexp=np.log(rounded + tail).astype(np.float32),
    )
    return stored, float((rounded / (rounded + tail)).sum())


def _checksum(teacher: TopKTeacher) -> int:
    """Of the bytes on disk: against damage, and at every reading, so a quick one."""
    checksum = 0
    for part in teacher:
        checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
    return checksum


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _tokens_digest(tokens: np.ndarray, prompt_length: int) -> bytes:
    """Of what the teacher read and from where on it is scored."""
    lengths = np.asarray([prompt_length, len(tokens)], "<i8")
    return _digest(lengths, np.asarray(tokens, "<i4"))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(_damaged(path, str(error))) from error


def _header(path: Path) -> dict[str, Any]:
    try:
        return json.loads((_open(path).metadata() or {})[_HEADER])
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(_damaged(path, "its header is no teacher cache's")) from error


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} of a teacher cache is damaged ({reason}); delete this file and have "
        f"it written again: {_AGAIN} {path.parent}"
    )


def read_manifest(folder: Path) -> Manifest:
    """What a finished cache says of itself; for what it raises, see `open`."""
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: it is no teacher cache, or one that is not "
            f"finished; write it: {_AGAIN} {folder}"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        recipe = found.pop("recipe")
        recipe = Recipe(**recipe | {"origin": Origin(**recipe["origin"])})
        digests = tuple(found.pop("shard_digests"))
        if len(digests) != len(recipe.shards):
            raise ValueError(f"it is not about {len(recipe.shards)} files")
        return Manifest(recipe, digests, **found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); delete this file and have it written "
            f"again: {_AGAIN} {folder}"
        ) from error


def _flat(recipe: Recipe) -> dict[str, Any]:
    """By the name under which a difference is told."""
    parts = dataclasses.asdict(recipe)
    return {"format": FORMAT} | parts.pop("origin") | parts


def _check_equal(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Names all that differs between the cache at hand and the one that is wanted."""
    differ = [
        f"{name} (expected {wanted[name]}, got {found.get(name)})"
        for name in wanted
        if found.get(name) != wanted[name]
    ]
    if differ:
        raise ValueError(
            f"the teacher cache {folder} was made from another "
            f"{' and another '.join(differ)}; make a new one: {_AGAIN} NEW_FOLDER"
        )
