"""Folders are files on disk: what is none is refused before it is made."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def check_folder(name: str, path: str | os.PathLike[str] | None) -> None:
    """A bucket's address would become a local folder of that name.

    >>> check_folder("output", "runs/mgsr")

    Raises:
      ValueError: `path` is an address such as gs://bucket/run.
    """
    if path is not None and "://" in os.fspath(path):
        raise ValueError(
            f"{name}={os.fspath(path)!r} is an address, and folders are read and "
            "written as files; mount the bucket (gcsfuse for gs://) and give its folder"
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
