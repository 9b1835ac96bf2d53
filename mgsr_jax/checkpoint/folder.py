"""Checks of paths and files, each of which ends in one clear line."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_POINTER = b"version https://git-lfs.github.com/spec/"

PathLike = str | os.PathLike[str]


def check_folder(name: str, path: PathLike | None) -> None:
    """Check that `path` is a path, not an address such as gs://bucket/run.

    Without the check, an address would become a local folder of that name.

    >>> check_folder("output", "runs/mgsr")

    Args:
      name: the setting, for the error.
      path: its value; None is accepted.

    Raises:
      ValueError: `path` is an address.
    """
    if path is not None and "://" in os.fspath(path):
        raise ValueError(
            f"{name}={os.fspath(path)!r} is an address, expected a local folder; mount "
            "the bucket (gcsfuse for gs://) and give the folder of the mount"
        )


def refuse_pointer(file: Path) -> None:
    """Refuse the few lines that a git clone without git-lfs leaves in place of a file.

    Raises:
      ValueError: `file` is such a pointer.
    """
    with open(file, "rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{file} is a git-lfs pointer, not the file itself; run `git lfs pull` "
                "in its folder, or download the file again"
            )


def weights_digest(folder: Path) -> str:
    """Digest of a checkpoint's config.json and every byte of its weights.

    Raises:
      FileNotFoundError: the folder has no weights.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(
            f"no .safetensors weights in {folder}; give the folder of a Hugging Face "
            "checkpoint"
        )

    def digest(file: Path) -> bytes:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, hashlib.blake2b).digest()

    files = [folder / "config.json", *weights]
    total = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:
        for file, own in zip(files, pool.map(digest, files), strict=True):
            total.update(file.name.encode() + own)
    return total.hexdigest()
