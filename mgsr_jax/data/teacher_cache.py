"""The teacher's most probable classes at every scored position, stored on disk.

The cache is a folder of safetensors files, with some examples in each, and a
manifest.json, which is written last. Every file has the recipe in its header: a stopped
command continues with the missing files, and a file of another recipe is refused. An
example is found by its index, and its tokens are compared with those that the teacher
read, so a change of the data is always detected. The manifest has a digest of each
file's index, and the index has a checksum of each example: every byte that is read is
verified.
"""

import dataclasses
import math
from pathlib import Path

import numpy as np

from mgsr_jax.data.teacher_manifest import (
    MANIFEST,
    REBUILD,
    Manifest,
    Origin,
    PathLike,
    Recipe,
    check_equal,
    read_manifest,
    write_manifest,
)
from mgsr_jax.data.teacher_shards import Shard, read_header
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.rows import Rows


def begin(folder: PathLike, recipe: Recipe) -> list[int]:
    """Create the folder, and return the numbers of the files that are missing in it.

    Raises:
      FileExistsError: the folder has other files in it.
      ValueError: it has files of another recipe (the error names the difference), or a
        damaged file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output {folder} is a file; choose a folder's name")
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    shards = sorted(name for name in names if name.startswith("shard-"))
    if foreign := sorted(names - {MANIFEST} - set(shards)):
        raise FileExistsError(
            f"output {folder} contains {foreign[0]}, which is not part of a teacher "
            "cache; choose a new folder"
        )
    for name in shards:
        check_equal(folder, read_header(folder / name)["recipe"], recipe.fields())
    return [i for i, name in enumerate(recipe.shards) if name not in names]


def finish(folder: PathLike, recipe: Recipe) -> Manifest:
    """Write the manifest of a folder with all files.

    Raises:
      ValueError: a file is missing or damaged.
    """
    folder = Path(folder)
    headers = [read_header(folder / name) for name in recipe.shards]
    positions = sum(header["positions"] for header in headers)
    held_mass = math.fsum(header["held_mass"] for header in headers)
    manifest = Manifest(
        recipe=recipe,
        shard_digests=tuple(header["index"] for header in headers),
        positions=positions,
        held_mass=held_mass / max(positions, 1),
    )
    write_manifest(folder, manifest)
    return manifest


class TeacherCache:
    """A finished cache; the files stay on disk and are read example by example.

    Attributes:
      folder: folder of the files.
      manifest: recipe and digests.
    """

    def __init__(self, folder: PathLike, manifest: Manifest):
        self.folder, self.manifest = Path(folder), manifest
        files = zip(manifest.recipe.shards, manifest.shard_digests, strict=True)
        self._shards = [
            Shard.open(self.folder / name, digest) for name, digest in files
        ]

    @classmethod
    def open(cls, folder: PathLike, origin: Origin) -> "TeacherCache":
        """Open the cache of exactly this teacher, tokenizer and data set.

        Raises:
          FileNotFoundError: there is no finished cache.
          ValueError: the cache has another origin (the error names the difference), or
            a file is missing or damaged.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        actual = dataclasses.asdict(manifest.recipe.origin)
        check_equal(folder, actual, dataclasses.asdict(origin))
        return cls(folder, manifest)

    def lookup(self, rows: Rows) -> TopKTeacher:
        """Read the teacher's output at every scored position of rows of the data set.

        Aligned with `next_token_view(rows)`; zeros where no position is scored.

        Args:
          rows: ground-truth rows on the host, as `train_batches` and `eval_batches`
            return them, of any width. [B, S]

        Returns:
          numpy, in the dtypes on disk: logits and indices [B, S - 1, K], logsumexp
          [B, S - 1].

        Raises:
          ValueError: a row differs from the example that the teacher read, or a file is
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
            if start == end:  # a row that fills up a batch: no position is scored
                continue
            if not rows.ground_truth[b]:
                raise ValueError(
                    f"got row {b} with a response of a model; the teacher cache "
                    f"{self.folder} covers only the data's own responses: run the "
                    "teacher on this row"
                )
            tokens = np.asarray(rows.tokens[b, :end])
            example = self._example(int(rows.example[b]), tokens, start)
            for batch, one in zip(teacher, example, strict=True):
                batch[b, start - 1 : end - 1] = one
        return teacher

    def _example(
        self, example: int, tokens: np.ndarray, prompt_length: int
    ) -> TopKTeacher:
        recipe = self.manifest.recipe
        if not 0 <= example < recipe.examples:
            raise ValueError(
                f"example {example} is not among the {recipe.examples} of the teacher "
                f"cache {self.folder}; rebuild it: {REBUILD} NEW_FOLDER"
            )
        number, row = divmod(example, recipe.examples_per_shard)
        shard = self._shards[number]
        if not shard.has_tokens(row, tokens, prompt_length):
            raise ValueError(
                f"example {example} differs from the text that the teacher cache "
                f"{self.folder} has for it: the data or its order changed; rebuild the "
                f"cache: {REBUILD} NEW_FOLDER"
            )
        return shard.read(row)
