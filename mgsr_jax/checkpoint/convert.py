"""Converts pickled weights (pytorch_model.bin) to safetensors.

Needs the extra `convert`, which installs torch.
"""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from mgsr_jax.checkpoint._layout import INDEX, WEIGHTS
from mgsr_jax.checkpoint.folder import PathLike, check_folder, refuse_pointer
from mgsr_jax.checkpoint.tokenizer import FILES

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert(source: PathLike, target: PathLike) -> None:
    """Write the checkpoint at `source` to `target` with safetensors weights.

    Reads pytorch_model.bin, or pytorch_model.bin.index.json with its shards. Code in a
    pickle is never run. Names and dtypes of the tensors stay the same. The config and
    the tokenizer are copied.

    Raises:
      FileExistsError: `target` exists and is not empty.
      FileNotFoundError: `source` has no config.json or no pickled weights.
      ImportError: torch is not installed.
      ValueError: a file is not a plain dictionary of tensors.
    """
    check_folder("target", target)
    source, target = Path(source), Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder"
        )
    if not (source / "config.json").is_file():
        raise FileNotFoundError(
            f"no config.json in {source}; give the folder of a Hugging Face checkpoint"
        )
    pickles, weight_map = _pickles(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as t:
        folder = Path(t) / target.name
        folder.mkdir()
        for name in ("config.json", "generation_config.json", *FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for name in pickles:
            _convert_file(source / name, folder / _new_name(name))
        if weight_map is not None:
            index = {
                "metadata": {},
                "weight_map": {k: _new_name(v) for k, v in weight_map.items()},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        folder.rename(target)


def _pickles(source: Path) -> tuple[list[str], dict[str, str] | None]:
    """Weight files, and the map from tensor to file if there is an index."""
    if (source / PICKLE).is_file():
        return [PICKLE], None
    index = source / PICKLE_INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"no {PICKLE} and no {PICKLE_INDEX} in {source}; only these are converted"
        )
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{index} has no readable weight_map ({error!r}); download it again"
        ) from error
    for name in files:
        if name != os.path.basename(name) or not name.endswith(".bin"):
            raise ValueError(
                f"{index} names the shard {name!r}; expected the name of a .bin file "
                "in the same folder"
            )
    return files, weight_map


def _new_name(name: str) -> str:
    """Name of the safetensors file for a pickled file."""
    if name == PICKLE:
        return WEIGHTS
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def _convert_file(file: Path, target: Path) -> None:
    refuse_pointer(file)
    torch, save_file = _torch()
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{file} cannot be read as plain weights ({reason}); download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise ValueError(
            f"{file} is not a dictionary from names to tensors; only plain weights are "
            "converted"
        )
    # Tied tensors share memory, which safetensors refuses: copy each tensor.
    copies = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(copies, target, metadata={"format": "pt"})


def _torch() -> tuple[ModuleType, Callable[..., None]]:
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "converting pickled weights needs torch: pip install 'mgsr_jax[convert]'"
        ) from error
    return torch, save_file
