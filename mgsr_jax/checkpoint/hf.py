"""Loads Hugging Face folders onto a mesh, and writes them."""

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from mgsr_jax import sharding
from mgsr_jax.checkpoint._layout import (
    HEAD,
    file_shape,
    flat_shapes,
    is_stacked,
    stored_shapes,
    tensor_names,
)
from mgsr_jax.checkpoint._save import save_pretrained
from mgsr_jax.checkpoint._tensors import Tensor, open_tensors
from mgsr_jax.checkpoint.folder import PathLike
from mgsr_jax.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint
from mgsr_jax.models import KeyRow, LanguageModel
from mgsr_jax.typing import Leaf, Params

__all__ = [
    "load_params",
    "load_tokenizer",
    "save_pretrained",
    "tokenizer_fingerprint",
]

_DTYPES = ("F32", "BF16", "F16")


@dataclasses.dataclass
class _Source:
    """One of our parameters as a view of tensors in a checkpoint.

    Attributes:
      row: where the checkpoint keeps the parameter.
      shape: shape of our parameter, with the leading layer axis if it is stacked.
      rows: number of leading rows that the checkpoint has; further rows are zero.
      tensors: one tensor, or one per layer.
      non_finite: receives the names of tensors that were read with non-finite values.
    """

    row: KeyRow
    shape: tuple[int, ...]
    rows: int
    tensors: tuple[Tensor, ...]
    non_finite: set[str]

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`parameter[index]`; no other values are read from the file."""
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        if not is_stacked(self.row):
            (start, stop), *others = bounds
            stored = min(start, self.rows), min(stop, self.rows)
            values = self._read(self.tensors[0], [stored, *others], dtype)
            padding = [(0, stop - start - len(values))] + [(0, 0)] * len(others)
            return np.pad(values, padding) if any(padding[0]) else values
        out = np.empty([stop - start for start, stop in bounds], dtype)
        for i, tensor in enumerate(self.tensors[slice(*bounds[0])]):
            out[i] = self._read(tensor, bounds[1:], dtype)
        return out

    def _read(
        self, tensor: Tensor, bounds: list[tuple[int, int]], dtype: np.dtype
    ) -> np.ndarray:
        index = [slice(*b) for b in bounds]
        if self.row.transposed:
            index.reverse()
        offset = self.row.part * self.shape[-1]
        index[-1] = slice(index[-1].start + offset, index[-1].stop + offset)
        values = tensor.read(tuple(index))
        # A value that overflows a narrower dtype becomes inf, which is reported below.
        with np.errstate(over="ignore", invalid="ignore"):
            values = values.astype(dtype)
        if not np.isfinite(values).all():
            self.non_finite.add(tensor.name)
        return values.T if self.row.transposed else values


def load_params(
    path: PathLike,
    model: LanguageModel,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.float32,
    transform: Callable[[str, jax.Array], Leaf] = lambda path, parameter: parameter,
) -> Params:
    """Parameters of a Hugging Face folder; each shard is read from the file separately.

    Args:
      path: folder with model.safetensors, or model.safetensors.index.json and its
        files, in float32, bfloat16 or float16.
      model: from `models.from_config(path)`; rows that pad its vocabulary are zero.
      mesh: mesh that the model's partition rules place parameters on; None: plain
        arrays on the default device.
      dtype: dtype of all parameters.
      transform: (the parameter's '/'-joined path, parameter) -> its replacement. It is
        applied to one parameter at a time, so that the whole model is never in memory
        in `dtype`.

    Raises:
      FileNotFoundError: no weights at `path`.
      ValueError: unmapped, missing, duplicate or misshapen tensors (all of them in one
        message), values that are not finite, or a damaged file.
    """
    dtype = np.dtype(dtype)
    abstract = model.abstract_params()
    places = mesh and sharding.shardings(mesh, model.partition_rules, abstract)
    non_finite: set[str] = set()
    with contextlib.ExitStack() as stack:
        tensors = open_tensors(Path(path), stack)
        sources = _match(Path(path), model, tensors, flat_shapes(abstract), non_finite)

        def load(key_path: KeyPath, place: Sharding | None) -> Leaf:
            name = sharding.path_name(key_path)
            return transform(name, _load(sources[name], place, dtype))

        if places is None:
            places = jax.tree.map(lambda _: None, abstract)
        params = jax.tree_util.tree_map_with_path(
            load, places, is_leaf=lambda place: place is None
        )
    if non_finite:
        raise ValueError(
            f"{path}: values that are not finite as {dtype.name} in "
            f"{', '.join(sorted(non_finite))}; download the file again, or load it as "
            "float32"
        )
    return params


def _load(source: _Source, place: Sharding | None, dtype: np.dtype) -> jax.Array:
    """Read a parameter onto the default device, or each shard onto its own device."""
    if place is None:
        return jnp.asarray(source.read((slice(None),) * len(source.shape), dtype))
    shards: dict[tuple[object, ...], np.ndarray] = {}  # replicas have equal indices

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        key = tuple((s.start, s.stop) for s in index)
        if key not in shards:
            shards[key] = source.read(index, dtype)
        return shards[key]

    return jax.make_array_from_callback(source.shape, place, read)


def _match(
    folder: Path,
    model: LanguageModel,
    tensors: list[Tensor],
    shapes: dict[str, tuple[int, ...]],
    non_finite: set[str],
) -> dict[str, _Source]:
    """Find the tensors of each parameter.

    Raises:
      ValueError: some tensors do not fit; the message names all of them.
    """
    by_name, duplicate = _by_name(model, tensors)
    head = by_name.pop(HEAD, None) if model.config.tie_word_embeddings else None
    missing, misshapen = [], []
    sources, used, stored = {}, set(), stored_shapes(model)
    for row in model.architecture.key_rows(model.config):
        names = tensor_names(row, model)
        used.update(names)
        missing += [name for name in names if name not in by_name]
        present = tuple(by_name[name] for name in names if name in by_name)
        misshapen += _misshapen(present, file_shape(row, stored[row.path]))
        rows = stored[row.path][0]
        sources[row.path] = _Source(row, shapes[row.path], rows, present, non_finite)
    _raise_misfits(
        folder,
        missing=missing,
        unmapped=[by_name[name].name for name in by_name if name not in used],
        duplicate=duplicate,
        misshapen=misshapen,
    )
    if head is not None:
        _check_tied(folder, head, sources["embed/embedding"])
    return sources


def _by_name(
    model: LanguageModel, tensors: list[Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by name without prefix, and descriptions of those that occur twice."""
    by_name: dict[str, Tensor] = {}
    duplicate = []
    for tensor in tensors:
        name = _without_prefix(tensor.name, model)
        if any(re.search(regex, name) for regex in model.architecture.ignored):
            continue
        if name in by_name:
            duplicate.append(f"{tensor.name} (also {by_name[name].name})")
        by_name[name] = tensor
    return by_name, duplicate


def _without_prefix(name: str, model: LanguageModel) -> str:
    for prefix in model.architecture.prefixes:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _misshapen(tensors: tuple[Tensor, ...], expected: tuple[int, ...]) -> list[str]:
    """Descriptions of tensors with another shape, or a dtype that is not read."""
    texts = []
    for tensor in tensors:
        if tensor.shape != expected:
            texts.append(f"{tensor.name} {tensor.shape}, expected {expected}")
        elif tensor.dtype not in _DTYPES:
            texts.append(f"{tensor.name} of dtype {tensor.dtype}")
    return texts


def _raise_misfits(folder: Path, **problems: list[str]) -> None:
    """Raise one error for all tensors that do not fit."""
    if text := "; ".join(
        f"{kind}: {', '.join(sorted(set(names)))}"
        for kind, names in problems.items()
        if names
    ):
        raise ValueError(f"the weights of {folder} do not fit its config.json: {text}")


def _check_tied(folder: Path, head: Tensor, embedding: _Source) -> None:
    """Check that a tied head, if the file has one, equals the embedding."""
    (tensor,) = embedding.tensors
    size = tensor.shape[0]
    same = head.shape == tensor.shape
    for start in range(0, size if same else 0, 4096):
        rows = (slice(start, min(start + 4096, size)),)
        same = same and bool(np.array_equal(head.read(rows), tensor.read(rows)))
    if not same:
        raise ValueError(
            f"{folder}: {head.name} differs from {tensor.name}, but config.json ties "
            "them; set tie_word_embeddings to false, or remove one of the tensors"
        )
