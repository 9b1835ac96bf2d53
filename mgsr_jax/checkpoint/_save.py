"""Writes params to a Hugging Face folder that transformers loads."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mgsr_jax.checkpoint._layout import (
    HEAD,
    INDEX,
    WEIGHTS,
    file_shape,
    flat_shapes,
    is_stacked,
    stored_shapes,
    tensor_names,
)
from mgsr_jax.checkpoint.folder import PathLike, check_folder
from mgsr_jax.checkpoint.response_format import ResponseFormat
from mgsr_jax.checkpoint.tokenizer import FILES as TOKENIZER_FILES
from mgsr_jax.checkpoint.tokenizer import copy_tokenizer
from mgsr_jax.models import KeyRow, LanguageModel
from mgsr_jax.sharding import path_name
from mgsr_jax.typing import Params

GENERATION = "generation_config.json"
METADATA = {"format": "pt", "producer": "mgsr_jax"}  # transformers needs a format


def save_pretrained(
    path: PathLike,
    model: LanguageModel,
    params: Params,
    *,
    tokenizer_from: PathLike | None = None,
    response_format: ResponseFormat | None = None,
    dtype: DTypeLike = jnp.float32,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a folder that transformers loads with equal logits.

    If the call fails, no folder is left behind. With several processes all of them must
    call this, and process 0 writes.

    Args:
      path: the folder to create.
      model: the model; its config is written.
      params: parameters as `load_params` or `model.init` return them, sharded or not.
      tokenizer_from: folder whose tokenizer files and generation_config.json are
        copied; None: no tokenizer.
      response_format: end ids and chat template of the training, where the folder of
        the tokenizer has others.
      dtype: dtype of the written weights.
      overwrite: replace what an earlier call wrote at `path`; nothing else is replaced.
      max_shard_bytes: larger weights are split into several files with an index.

    Raises:
      FileExistsError: `path` holds files that may not be replaced.
      FileNotFoundError: `tokenizer_from` has no tokenizer files.
      ValueError: `params` are not the parameters of the model.
    """
    check_folder("path", path)
    target = Path(path).absolute()
    _check_params(model, params)
    _check_target(target, overwrite)
    sizes = _file_sizes(model, np.dtype(dtype))
    tensors = _file_tensors(model, params, np.dtype(dtype))
    if jax.process_index() != 0:
        for _ in tensors:  # joins the all-gathers of arrays sharded over hosts
            pass
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as t:
        folder = Path(t) / target.name
        folder.mkdir()
        if tokenizer_from is not None:
            copy_tokenizer(Path(tokenizer_from), folder)
        _write_configs(folder, model, np.dtype(dtype).name, tokenizer_from)
        if response_format is not None:
            response_format.write(folder, model.config.eos_token_id)
        _write_weights(folder, tensors, sizes, max_shard_bytes)
        if target.exists():
            target.rename(Path(t) / "replaced")
        folder.rename(target)


def _check_params(model: LanguageModel, params: Params) -> None:
    expected = flat_shapes(model.abstract_params())
    got = flat_shapes(params)
    if wrong := [
        f"{name} {got.get(name, 'missing')}, expected {expected.get(name, 'none')}"
        for name in sorted(expected.keys() | got.keys())
        if got.get(name) != expected.get(name)
    ]:
        raise ValueError(
            f"params do not fit the model: {'; '.join(wrong)}; pass the parameters "
            "of this model"
        )


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse to replace what `save_pretrained` did not write, even with `overwrite`."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder"
        )
    if not (target.is_dir() and _is_ours(target)):
        raise FileExistsError(
            f"{target} was not written by mgsr_jax and is not replaced; "
            "choose another folder"
        )
    known = {"config.json", GENERATION, INDEX, *TOKENIZER_FILES}
    if others := sorted(
        file.name
        for file in target.iterdir()
        if file.name not in known and file.suffix != ".safetensors"
    ):
        raise FileExistsError(
            f"{target} is not replaced: besides an export it holds "
            f"{', '.join(others)}; move these files, or choose another folder"
        )


def _is_ours(folder: Path) -> bool:
    """Whether the metadata of every weight file names this package as producer."""
    weights = sorted(folder.glob("*.safetensors"))
    for file in weights:
        try:
            with safe_open(file, framework="numpy") as handle:
                producer = (handle.metadata() or {}).get("producer")
        except SafetensorError:
            return False
        if producer != METADATA["producer"]:
            return False
    return bool(weights)


def _write_configs(
    folder: Path, model: LanguageModel, dtype: str, source: PathLike | None
) -> None:
    # Both spellings: only transformers 5 reads `dtype`, others read `torch_dtype`.
    config = {**model.config.to_hf(), "dtype": dtype, "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if source is not None and (Path(source) / GENERATION).is_file():
        shutil.copyfile(Path(source) / GENERATION, folder / GENERATION)
        return
    ids = {key: config[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    ids = {f"{key}_token_id": id_ for key, id_ in ids.items() if id_ is not None}
    if ids:
        text = json.dumps({"_from_model_config": True, **ids}, indent=2) + "\n"
        (folder / GENERATION).write_text(text)


def _write_weights(
    folder: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    sizes: dict[str, int],
    max_shard_bytes: int,
) -> None:
    """Write the tensors, with those of one file at a time in memory."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        save_file(dict(tensors), folder / WEIGHTS, metadata=METADATA)
        return
    weight_map = {}
    for i, names in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        values = dict(next(tensors) for _ in names)
        save_file(values, folder / file, metadata=METADATA)
        weight_map.update(dict.fromkeys(names, file))
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": weight_map,
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _file_rows(model: LanguageModel) -> dict[str, list[KeyRow]]:
    """Rows by tensor name; the parts of one tensor share an entry.

    The name of a stacked tensor has {} for the layer's number.
    """
    rows: dict[str, list[KeyRow]] = {}
    for row in model.architecture.key_rows(model.config):
        rows.setdefault(row.name, []).append(row)
    return rows


def _full_names(row: KeyRow, model: LanguageModel) -> list[str]:
    """Tensor names as they are written."""
    prefix = "" if row.name == HEAD else model.architecture.prefixes[0]
    return [prefix + name for name in tensor_names(row, model)]


def _file_sizes(model: LanguageModel, dtype: np.dtype) -> dict[str, int]:
    """Bytes of each tensor, in the order of `_file_tensors`."""
    shapes = stored_shapes(model)
    sizes = {}
    for rows in _file_rows(model).values():
        shape = file_shape(rows[0], shapes[rows[0].path])
        for name in _full_names(rows[0], model):
            sizes[name] = int(np.prod(shape)) * dtype.itemsize
    return sizes


def _file_tensors(
    model: LanguageModel, params: Params, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor by name, without the rows that pad the vocabulary.

    Only one of our parameters is in host memory at a time.
    """
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    values = {path_name(key_path): leaf for key_path, leaf in leaves}
    shapes = stored_shapes(model)
    for rows in _file_rows(model).values():
        arrays = [to_host(values[row.path])[: shapes[row.path][0]] for row in rows]
        for i, name in enumerate(_full_names(rows[0], model)):
            parts = [array[i] if is_stacked(rows[0]) else array for array in arrays]
            value = np.concatenate(parts, axis=-1)
            value = value.T if rows[0].transposed else value
            yield name, np.ascontiguousarray(value.astype(dtype))


def to_host(value: jax.Array) -> np.ndarray:
    """The whole array in host memory; every process must call this."""
    if value.is_fully_addressable:
        return np.asarray(value)
    return np.asarray(multihost_utils.process_allgather(value, tiled=True))
