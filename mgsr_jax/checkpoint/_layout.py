"""How a Hugging Face folder names its weights; shared by reading and writing."""

import os
from typing import Any

import jax

from mgsr_jax.models import LAYERS, KeyRow, LanguageModel
from mgsr_jax.typing import Params

PathLike = str | os.PathLike[str]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"

_BY_TOKEN = {"embed/embedding", "head/embedding"}  # a row for every token


def is_stacked(row: KeyRow) -> bool:
    return row.path.startswith(f"{LAYERS}/")


def tensor_names(row: KeyRow, model: LanguageModel) -> list[str]:
    """Tensor names without prefix: one, or one a layer."""
    if not is_stacked(row):
        return [row.name]
    return [row.name.format(layer) for layer in range(model.config.num_layers)]


def file_shape(row: KeyRow, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = shape[1:] if is_stacked(row) else shape
    shape = shape[::-1] if row.transposed else shape
    return (*shape[:-1], shape[-1] * row.parts)


def path_name(key_path: Any) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def stored_shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    """Our parameters' shapes without the rows that pad the vocabulary."""
    shapes = flat_shapes(model.abstract_params())
    vocab_size = model.config.vocab_size
    padded = {name: (vocab_size, *shapes[name][1:]) for name in _BY_TOKEN & set(shapes)}
    return shapes | padded


def flat_shapes(abstract: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    return {path_name(key_path): leaf.shape for key_path, leaf in leaves}
