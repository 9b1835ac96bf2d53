"""Folders are files on disk: what is none is refused before it is made."""

import os


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
