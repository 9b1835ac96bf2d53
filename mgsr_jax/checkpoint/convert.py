"""Pickled weights (pytorch_model.bin) to safetensors; needs the `convert` extra."""

import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mgsr_jax.checkpoint._layout import INDEX, WEIGHTS, PathLike
from mgsr_jax.checkpoint.folder import check_folder
from mgsr_jax.checkpoint.tokenizer import FILES

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def convert(source: PathLike, target: PathLike) -> None:
    """Writes the checkpoint at `source` to `target` with safetensors weights.

    Reads pytorch_model.bin, or pytorch_model.bin.index.json with its shards, without
    running anything that a pickle holds; names and dtypes stay. The configuration and
    the tokenizer are copied.

    Raises:
      FileExistsError: `target` exists and is not empty.
      FileNotFoundError: no config.json or no pickled weights in `source`.
      ImportError: torch is not installed.
      ValueError: a file that is not a plain dictionary of tensors.
    """
    check_folder("target", target)
    source, target = Path(source), Path(target).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder"
        )
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"no config.json in {source}")
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
    """Weight files, and the map from tensor to file where there is an index."""
    if (source / PICKLE).is_file():
        return [PICKLE], None
    index = source / PICKLE_INDEX
    if not index.is_file():
        raise FileNotFoundError(f"no {PICKLE} and no {PICKLE_INDEX} in {source}")
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
    if name == PICKLE:
        return WEIGHTS
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def _convert_file(file: Path, target: Path) -> None:
    torch, save_file = _torch()
    try:
        tensors: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"{file} cannot be read as plain weights ({reason}); download it again"
        ) from error
    if not isinstance(tensors, dict) or not all(
        isinstance(value, torch.Tensor) for value in tensors.values()
    ):
        raise ValueError(f"{file} is not a dictionary from names to tensors")
    # Tied tensors share memory there, which safetensors refuses: each gets its own.
    own = {name: value.contiguous().clone() for name, value in tensors.items()}
    save_file(own, target, metadata={"format": "pt"})


def _torch() -> tuple[Any, Any]:
    try:
        import torch
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(
            "converting pickled weights needs torch: pip install 'mgsr_jax[convert]'"
        ) from error
    return torch, save_file
