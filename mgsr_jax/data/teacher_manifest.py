"""The recipe of a teacher cache, and its manifest.json.

Two caches are equal if their recipes are equal. Training checks the origin in the
manifest, so that a cache is never used with another teacher, tokenizer or data set.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Literal

FORMAT = 1
MANIFEST = "manifest.json"
REBUILD = "mgsr cache-teacher --config CONFIG --output"
"""The command in error messages; a folder follows."""
LogitsDtype = Literal["float16", "float32"]
PathLike = str | os.PathLike[str]
Fields = dict[str, str | int]
"""A recipe or an origin as flat JSON: name of a field -> value."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """Everything that the teacher's outputs on a data set depend on.

    Attributes:
      teacher: digest of config.json and weights of the teacher's folder.
      teacher_dtype: dtype of the teacher's computation, as in the settings of a run.
      tokenizer: digest of the map from id to token.
      data: digest of the tokenised data set, in its order.
    """

    teacher: str
    teacher_dtype: str
    tokenizer: str
    data: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Settings of a teacher cache.

    Attributes:
      origin: teacher, tokenizer and data set.
      examples: number of examples of the data set.
      vocab_size: number of real tokens; classes beyond it have probability 0.
      top_k: K, number of classes kept of each position.
      logits_dtype: dtype of the K logits on disk. float16 changes the logit of a class
        that is d nats below the most probable one by at most d / 2048. The total
        probability of the classes outside the K stays exact.
      examples_per_shard: number of examples a file; the last file may have fewer.

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
        """uint16 if the vocabulary is small enough, otherwise int32."""
        return "uint16" if self.vocab_size <= 1 << 16 else "int32"

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the files, in the order of the examples."""
        count = math.ceil(self.examples / self.examples_per_shard)
        return tuple(f"shard-{number:05d}.safetensors" for number in range(count))

    def shard_examples(self, number: int) -> range:
        """Indices of the examples in a file."""
        start = number * self.examples_per_shard
        return range(start, min(start + self.examples_per_shard, self.examples))

    def fields(self) -> Fields:
        """All settings as one flat dict, by the names used in error messages."""
        settings = dataclasses.asdict(self)
        return {"format": FORMAT} | settings.pop("origin") | settings


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Summary of a finished cache.

    Attributes:
      recipe: settings of the cache.
      shard_digests: digest of each file's index.
      positions: number of scored positions of all examples.
      held_mass: teacher probability within the K classes, averaged over the positions.
    """

    recipe: Recipe
    shard_digests: tuple[str, ...]
    positions: int
    held_mass: float


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json; the file appears only when it is complete."""
    text = json.dumps({"format": FORMAT} | dataclasses.asdict(manifest), indent=2)
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished cache.

    Raises:
      FileNotFoundError: there is no finished cache.
      ValueError: the file is damaged.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: it is not a teacher cache, or the cache is "
            f"not finished; write it: {REBUILD} {folder}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        recipe = content.pop("recipe")
        recipe = Recipe(**recipe | {"origin": Origin(**recipe["origin"])})
        digests = tuple(content.pop("shard_digests"))
        if len(digests) != len(recipe.shards):
            raise ValueError(
                f"it has {len(digests)} shard_digests, expected {len(recipe.shards)}"
            )
        return Manifest(recipe, digests, **content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); delete this file and write it again: "
            f"{REBUILD} {folder}"
        ) from error


def check_equal(folder: PathLike, actual: Fields, expected: Fields) -> None:
    """Raise a ValueError that names every field in which two recipes differ."""
    different = [
        f"{name} (expected {expected[name]}, got {actual.get(name)})"
        for name in expected
        if actual.get(name) != expected[name]
    ]
    if different:
        raise ValueError(
            f"the teacher cache {folder} was made from another "
            f"{' and another '.join(different)}; make a new one: {REBUILD} NEW_FOLDER"
        )
