"""Opens the tensors of a folder's safetensors files without reading their values."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from mgsr_jax.checkpoint._layout import INDEX, WEIGHTS
from mgsr_jax.checkpoint.folder import refuse_pointer


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in an open file.

    Attributes:
      name: its name in the file.
      file: the open file.
    """

    name: str
    file: safe_open

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        """Dtype as safetensors spells it, such as BF16."""
        return self.file.get_slice(self.name).get_dtype()

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """`tensor[index]`; no other values are read."""
        return self.file.get_slice(self.name)[index]


def open_tensors(folder: Path, stack: contextlib.ExitStack) -> list[Tensor]:
    """The tensors of the folder's safetensors files, open until `stack` closes.

    Raises:
      FileNotFoundError: no weights in the folder, or not all files of its index.
      ValueError: a damaged file or index.
    """
    tensors = []
    for file in _weight_files(folder):
        refuse_pointer(file)
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); download it again"
            ) from error
        tensors += [Tensor(name, handle) for name in handle.keys()]
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = _shard_names(folder / INDEX)
        files = [folder / name for name in sorted(names)]
        if absent := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(absent)}, which its index names; download "
                "the missing files"
            )
        return files
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
        raise FileNotFoundError(
            f"{folder} holds {pickles[0].name} but no {WEIGHTS}; pickled weights are "
            f"not read: run `mgsr convert {folder} TARGET` and use TARGET"
        )
    raise FileNotFoundError(
        f"no {WEIGHTS} and no {INDEX} in {folder}; give the folder of a Hugging Face "
        "checkpoint"
    )


def _shard_names(index: Path) -> set[str]:
    """Names of the files in an index; each file must be in the index's own folder."""
    try:
        names = set(
            json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} has no readable weight_map ({error!r}); download it again"
        ) from error
    for name in names:
        if not (
            isinstance(name, str)
            and name == os.path.basename(name)
            and name.endswith(".safetensors")
        ):
            raise ValueError(
                f"{index} names the shard {name!r}; expected the name of a "
                ".safetensors file in the same folder"
            )
    return names
