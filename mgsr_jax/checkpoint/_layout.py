"""Names and shapes of the weights in a Hugging Face folder."""

import jax

from mgsr_jax.models import LAYERS, KeyRow, LanguageModel
from mgsr_jax.sharding import path_name
from mgsr_jax.typing import Params

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "lm_head.weight"

_TOKEN_TABLES = {"embed/embedding", "head/embedding"}


def is_stacked(row: KeyRow) -> bool:
    """Whether our parameter has a leading axis of layers."""
    return row.path.startswith(f"{LAYERS}/")


def tensor_names(row: KeyRow, model: LanguageModel) -> list[str]:
    """Tensor names without prefix: one name, or one per layer."""
    if not is_stacked(row):
        return [row.name]
    return [row.name.format(layer) for layer in range(model.config.num_layers)]


def file_shape(row: KeyRow, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor in the file, from the shape of our parameter."""
    shape = shape[1:] if is_stacked(row) else shape
    shape = shape[::-1] if row.transposed else shape
    return (*shape[:-1], shape[-1] * row.parts)


def stored_shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    """Shapes of our parameters by path, without the rows that pad the vocabulary."""
    shapes = flat_shapes(model.abstract_params())
    vocab_size = model.config.vocab_size
    tables = {
        name: (vocab_size, *shapes[name][1:]) for name in _TOKEN_TABLES & set(shapes)
    }
    return shapes | tables


def flat_shapes(abstract: Params) -> dict[str, tuple[int, ...]]:
    """Shapes of parameters by path."""
    leaves = jax.tree_util.tree_flatten_with_path(abstract)[0]
    return {path_name(key_path): leaf.shape for key_path, leaf in leaves}
