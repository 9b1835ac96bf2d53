"""The files of a teacher cache: each has the top K classes of some examples.

A file has, for P scored positions of N examples: `logits` [P, K] relative to the
largest, `indices` [P, K] and `logsumexp` [P]. Its index consists of `offsets` [N + 1]
into P and, for each example, `tokens`, a digest of the teacher's input, and `contents`,
a checksum of the stored output. The header has the recipe and a digest of the index.
"""

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mgsr_jax.data.teacher_manifest import REBUILD, Fields, PathLike, Recipe
from mgsr_jax.losses import TopKTeacher

_HEADER = "teacher_cache"  # one key: safetensors writes several in any order
_DIGEST = 16  # bytes
_INDEX = ("offsets", "tokens", "contents")


class CachedExample(NamedTuple):
    """One example to be written.

    Attributes:
      tokens: prompt and response. [length]
      prompt_length: number of tokens of the prompt.
      teacher: numpy arrays for the R = length - prompt_length scored positions.
        [R, K], [R, K], [R]
    """

    tokens: np.ndarray
    prompt_length: int
    teacher: TopKTeacher


class ShardHeader(TypedDict):
    """Header of a file, as JSON.

    Attributes:
      recipe: settings of the cache, flat.
      positions: number of scored positions in the file.
      held_mass: teacher probability within the K classes, summed over the positions.
      index: digest of the index.
    """

    recipe: Fields
    positions: int
    held_mass: float
    index: str


def write_shard(
    folder: PathLike, recipe: Recipe, number: int, examples: Sequence[CachedExample]
) -> None:
    """Write all examples of a file; the file appears only when it is complete."""
    file = Path(folder) / recipe.shards[number]
    if len(examples) != (size := len(recipe.shard_examples(number))):
        raise ValueError(
            f"got {len(examples)} examples for {file.name}, expected {size}; give all "
            "examples of the file"
        )
    stored = [_to_disk(example.teacher, recipe) for example in examples]
    teachers = [teacher for teacher, _ in stored]
    counts = [len(teacher.logsumexp) for teacher in teachers]
    tokens = [tokens_digest(e.tokens, e.prompt_length) for e in examples]
    arrays = {
        name: np.concatenate([getattr(teacher, name) for teacher in teachers])
        for name in TopKTeacher._fields
    }
    index = {
        "offsets": np.cumsum([0, *counts], dtype=np.int64),
        "tokens": np.frombuffer(b"".join(tokens), np.uint8).reshape(-1, _DIGEST),
        "contents": np.array([_checksum(teacher) for teacher in teachers], np.uint32),
    }
    header = ShardHeader(
        recipe=recipe.fields(),
        positions=sum(counts),
        held_mass=math.fsum(held_mass for _, held_mass in stored),
        index=_digest(*index.values()).hex(),
    )
    unfinished = file.with_name(f".{file.name}")
    save_file(arrays | index, unfinished, metadata={_HEADER: json.dumps(header)})
    unfinished.replace(file)


def read_header(path: Path) -> ShardHeader:
    """Read the header of a file; a ValueError names a damaged file."""
    try:
        return json.loads((_open(path).metadata() or {})[_HEADER])
    except (KeyError, json.JSONDecodeError) as error:
        reason = "its header is not one of a teacher cache"
        raise ValueError(_damaged(path, reason)) from error


@dataclasses.dataclass(frozen=True)
class Shard:
    """An open file; only the examples that are asked for are read.

    Attributes:
      path: the file.
      file: handle of safetensors.
      offsets: first scored position of each example. [N + 1]
      tokens: digest of each example's tokens. [N, 16]
      contents: checksum of each example's stored output. [N]
    """

    path: Path
    file: safe_open
    offsets: np.ndarray
    tokens: np.ndarray
    contents: np.ndarray

    @classmethod
    def open(cls, path: Path, digest: str) -> "Shard":
        """Open a file whose index has the given digest.

        Raises:
          ValueError: the file is missing or damaged.
        """
        file = _open(path)
        try:
            index = [file.get_tensor(name) for name in _INDEX]
        except SafetensorError as error:
            raise ValueError(_damaged(path, str(error))) from error
        if _digest(*index).hex() != digest:
            raise ValueError(_damaged(path, "its index changed"))
        return cls(path, file, *index)

    def has_tokens(self, row: int, tokens: np.ndarray, prompt_length: int) -> bool:
        """Whether the teacher's input for an example was exactly these tokens."""
        return bytes(self.tokens[row]) == tokens_digest(tokens, prompt_length)

    def read(self, row: int) -> TopKTeacher:
        """Read the teacher's output for an example. [R, K], [R, K], [R]

        Raises:
          ValueError: the file is damaged.
        """
        where = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        try:
            teacher = TopKTeacher(
                *(self.file.get_slice(name)[where] for name in TopKTeacher._fields)
            )
        except SafetensorError as error:
            raise ValueError(_damaged(self.path, str(error))) from error
        if int(self.contents[row]) != _checksum(teacher):
            raise ValueError(_damaged(self.path, "its contents changed"))
        return teacher


def tokens_digest(tokens: np.ndarray, prompt_length: int) -> bytes:
    """Digest of the token ids and the prompt length."""
    lengths = np.asarray([prompt_length, len(tokens)], "<i8")
    return _digest(lengths, np.asarray(tokens, "<i4"))


def _to_disk(teacher: TopKTeacher, recipe: Recipe) -> tuple[TopKTeacher, float]:
    """The arrays in the dtypes on disk, and the sum of the K classes' probability.

    Rounding one large logit changes its probability by more than a small tail holds.
    So the logsumexp is computed anew: with the rounded logits it gives the classes
    outside the K the same probability as before.
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
    """CRC-32 of the bytes on disk; fast, because every read computes it."""
    checksum = 0
    for part in teacher:
        checksum = zlib.crc32(np.ascontiguousarray(part).data, checksum)
    return checksum


def _digest(*arrays: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.digest()


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(_damaged(path, str(error))) from error


def _damaged(path: Path, reason: str) -> str:
    return (
        f"{path} of a teacher cache is damaged ({reason}); delete this file and write "
        f"it again: {REBUILD} {path.parent}"
    )
