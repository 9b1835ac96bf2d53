"""Writes adapters to a folder that peft loads onto their base model."""

import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from mgsr_jax.checkpoint._layout import tensor_names
from mgsr_jax.checkpoint._save import to_host
from mgsr_jax.checkpoint.folder import PathLike, check_folder
from mgsr_jax.checkpoint.hub import repo_and_commit
from mgsr_jax.models import LAYERS, KeyRow, LanguageModel
from mgsr_jax.models.lora import by_path
from mgsr_jax.typing import Params

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def save_adapter(
    path: PathLike,
    model: LanguageModel,
    adapters: Params,
    *,
    base_model: PathLike,
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Write a folder that `peft.PeftModel.from_pretrained` loads with equal logits.

    peft computes y = x W + lora_alpha / r * (x A^T) B^T. Some kernels share a tensor in
    a Hugging Face file, such as GPT-2's query, key and value. Their n adapters of rank
    r become one adapter of rank n r, whose B is block-diagonal.

    If the call fails, no folder is left behind. With several processes all of them must
    call this, and process 0 writes.

    Args:
      path: the folder to create.
      model: the model; its field `lora` has the settings of the adapters.
      adapters: adapters as `lora.init` returns them, sharded or not.
      base_model: the folder that `model` was read from; written to the config.
      dtype: dtype of the written weights.

    Raises:
      FileExistsError: `path` exists and is not an empty folder.
    """
    check_folder("path", path)
    target = Path(path).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and is not empty; choose another folder"
        )
    groups = _by_tensor(model, adapters)
    tensors = _tensors(model, adapters, groups, np.dtype(dtype))
    if jax.process_index() != 0:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as t:
        folder = Path(t) / target.name
        folder.mkdir()
        config = _config(model, groups, base_model)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        folder.rename(target)


def _by_tensor(model: LanguageModel, adapters: Params) -> dict[str, list[KeyRow]]:
    """Rows of the kernels with an adapter, grouped by their tensor in the file."""
    paths = {f"{LAYERS}/{path}/kernel" for path in by_path(adapters)}
    groups: dict[str, list[KeyRow]] = {}
    for row in model.architecture.key_rows(model.config):
        if row.path in paths:
            groups.setdefault(row.name, []).append(row)
    return groups


def _tensors(
    model: LanguageModel,
    adapters: Params,
    groups: dict[str, list[KeyRow]],
    dtype: np.dtype,
) -> dict[str, np.ndarray]:
    """A [r, in] and B [out, r] of each layer, by peft's names."""
    arrays = jax.tree.map(to_host, by_path(adapters))
    rank, prefix = model.lora.rank, model.architecture.prefixes[0]
    tensors = {}
    for rows in groups.values():
        group = [arrays[_kernel(row)] for row in rows]
        width = group[0]["b"].shape[-1]
        for layer, name in enumerate(tensor_names(rows[0], model)):
            b = np.zeros((rows[0].parts * width, len(rows) * rank), dtype)
            for i, (row, adapter) in enumerate(zip(rows, group, strict=True)):
                outputs = slice(row.part * width, (row.part + 1) * width)
                b[outputs, i * rank : (i + 1) * rank] = adapter["b"][layer].T
            a = np.concatenate([adapter["a"][layer].T for adapter in group])
            module = f"base_model.model.{prefix}{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.astype(dtype))
            tensors[f"{module}.lora_B.weight"] = b
    return tensors


def _kernel(row: KeyRow) -> str:
    """Path of a kernel as `lora.by_path` has it."""
    return row.path.removeprefix(f"{LAYERS}/").removesuffix("/kernel")


def _config(
    model: LanguageModel, groups: dict[str, list[KeyRow]], base_model: PathLike
) -> dict[str, object]:
    """peft's config: which modules have adapters, and how their output is scaled."""
    rank, alpha = model.lora.rank, model.lora.alpha
    base, revision = repo_and_commit(base_model)
    modules = {
        name.partition("{}.")[2].removesuffix(".weight"): rows
        for name, rows in groups.items()
    }
    joined = {name: len(rows) for name, rows in modules.items() if len(rows) > 1}
    (transposed,) = {row.transposed for rows in groups.values() for row in rows}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": model.lora.dropout,
        "target_modules": sorted(modules),
        # A joined adapter has a larger rank and alpha, so that alpha / r is the same.
        "rank_pattern": {name: count * rank for name, count in joined.items()},
        "alpha_pattern": {name: count * alpha for name, count in joined.items()},
        "fan_in_fan_out": not transposed,
        "bias": "none",
        "inference_mode": True,
    }
