"""Hugging Face folders: safetensors to params on the mesh, and back."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding
from safetensors import SafetensorError, safe_open

from mgsr_jax import sharding
from mgsr_jax.checkpoint._layout import (
    HEAD,
    INDEX,
    WEIGHTS,
    PathLike,
    file_shape,
    flat_shapes,
    is_stacked,
    path_name,
    stored_shapes,
    tensor_names,
)
from mgsr_jax.checkpoint._save import save_pretrained
from mgsr_jax.checkpoint.tokenizer import load_tokenizer, tokenizer_fingerprint
from mgsr_jax.models import KeyRow, LanguageModel
from mgsr_jax.typing import Params

__all__ = [
    "load_params",
    "load_tokenizer",
    "save_pretrained",
    "tokenizer_fingerprint",
]

_DTYPES = ("F32", "BF16", "F16")


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor in an open file; nothing of it is read yet."""

    name: str
    file: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self) -> str:
        return self.file.get_slice(self.name).get_dtype()

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        return self.file.get_slice(self.name)[index]


@dataclasses.dataclass
class _Source:
    """One of our parameters as a window on the tensors of a checkpoint.

    Attributes:
      row: how it is kept there.
      shape: ours; with the leading layer axis if stacked.
      rows: of these the checkpoint has the first so many; the others are zero.
      tensors: one, or one a layer.
      non_finite: names of tensors whose values, as read, were not all finite.
    """

    row: KeyRow
    shape: tuple[int, ...]
    rows: int
    tensors: tuple[_Tensor, ...]
    non_finite: set[str]

    def read(self, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        """`parameter[index]`, reading no more of the file than that."""
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        if not is_stacked(self.row):
            (start, stop), *others = bounds
            held = min(start, self.rows), min(stop, self.rows)
            values = self._read(self.tensors[0], [held, *others], dtype)
            padding = [(0, stop - start - len(values))] + [(0, 0)] * len(others)
            return np.pad(values, padding) if any(padding[0]) else values
        out = np.empty([stop - start for start, stop in bounds], dtype)
        for i, tensor in enumerate(self.tensors[slice(*bounds[0])]):
            out[i] = self._read(tensor, bounds[1:], dtype)
        return out

    def _read(
        self, tensor: _Tensor, bounds: list[tuple[int, int]], dtype: np.dtype
    ) -> np.ndarray:
        index = [slice(*b) for b in bounds]
        if self.row.transposed:
            index.reverse()
        offset = self.row.part * self.shape[-1]
        index[-1] = slice(index[-1].start + offset, index[-1].stop + offset)
        values = tensor.read(tuple(index))
        # A value beyond a narrower dtype becomes inf, which is reported below.
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
    dtype: Any = jnp.float32,
    transform: Callable[[str, jax.Array], Any] = lambda path, parameter: parameter,
) -> Params:
    """Parameters of a Hugging Face folder, each shard read from the file by itself.

    Args:
      path: folder with model.safetensors, or model.safetensors.index.json and shards;
        float32, bfloat16 or float16.
      model: from `models.from_config(path)`; rows that pad its vocabulary are zero.
      mesh: the mesh to load onto by the model's partition rules; None: plain arrays
        on the default device.
      dtype: of every parameter.
      transform: from a parameter and its '/'-joined path to what takes its place, one
        after the other: the whole model is never there in `dtype`.

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
        tensors = _open(Path(path), stack)
        sources = _match(Path(path), model, tensors, flat_shapes(abstract), non_finite)

        def place(key_path: Any, target: Any) -> Any:
            name = path_name(key_path)
            return transform(name, _place(sources[name], target, dtype))

        if places is None:
            places = jax.tree.map(lambda _: None, abstract)
        params = jax.tree_util.tree_map_with_path(
            place, places, is_leaf=lambda target: target is None
        )
    if non_finite:
        raise ValueError(
            f"{path}: values that are not finite as {dtype.name} in "
            f"{', '.join(sorted(non_finite))}; the file is damaged, or too wide for it"
        )
    return params


def _place(source: _Source, target: Sharding | None, dtype: np.dtype) -> jax.Array:
    """Onto the default device, or each shard onto its own."""
    if target is None:
        return jnp.asarray(source.read((slice(None),) * len(source.shape), dtype))
    seen: dict[Any, np.ndarray] = {}  # replicas ask for the same index again

    def shard(index: Any) -> np.ndarray:
        key = tuple((s.start, s.stop) for s in index)
        if key not in seen:
            seen[key] = source.read(index, dtype)
        return seen[key]

    return jax.make_array_from_callback(source.shape, target, shard)


def _open(folder: Path, stack: contextlib.ExitStack) -> list[_Tensor]:
    """Every tensor of the folder's safetensors files."""
    tensors = []
    for file in _weight_files(folder):
        try:
            handle = stack.enter_context(safe_open(file, framework="numpy"))
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a whole safetensors file ({error}); download it again"
            ) from error
        tensors += [_Tensor(name, handle) for name in handle.keys()]
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = _shard_names(folder / INDEX)
        files = [folder / name for name in sorted(names)]
        if absent := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(
                f"{folder} lacks {', '.join(absent)} of its index; download them"
            )
        return files
    if pickles := sorted([*folder.glob("*.bin"), *folder.glob("*.pt")]):
        raise FileNotFoundError(
            f"{folder} holds {pickles[0].name} but no {WEIGHTS}; pickled weights are "
            f"not read: run `mgsr convert {folder} TARGET` and use TARGET"
        )
    raise FileNotFoundError(f"no {WEIGHTS} and no {INDEX} in {folder}")


def _shard_names(index: Path) -> set[str]:
    """Files that an index names; each must lie in the folder itself."""
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


def _match(
    folder: Path,
    model: LanguageModel,
    tensors: list[_Tensor],
    shapes: dict[str, tuple[int, ...]],
    non_finite: set[str],
) -> dict[str, _Source]:
    """Every parameter with its tensors; raises once, with all that does not fit."""
    found: dict[str, _Tensor] = {}
    duplicate, unmapped, missing, misshapen = [], [], [], []
    for tensor in tensors:
        bare = _bare(tensor.name, model)
        if any(re.search(regex, bare) for regex in model.architecture.ignored):
            continue
        if bare in found:
            duplicate.append(f"{tensor.name} (also {found[bare].name})")
        found[bare] = tensor
    head = found.pop(HEAD, None) if model.config.tie_word_embeddings else None
    sources, used, stored = {}, set(), stored_shapes(model)
    for row in model.architecture.key_rows(model.config):
        shape, names = shapes[row.path], tensor_names(row, model)
        used.update(names)
        missing += [name for name in names if name not in found]
        present = tuple(found[name] for name in names if name in found)
        expected = file_shape(row, stored[row.path])
        for tensor in present:
            if tensor.shape != expected:
                misshapen.append(f"{tensor.name} {tensor.shape}, expected {expected}")
            elif tensor.dtype not in _DTYPES:
                misshapen.append(f"{tensor.name} of dtype {tensor.dtype}")
        rows = stored[row.path][0]
        sources[row.path] = _Source(row, shape, rows, present, non_finite)
    unmapped = [tensor.name for bare, tensor in found.items() if bare not in used]
    _raise_misfits(
        folder,
        missing=missing,
        unmapped=unmapped,
        duplicate=duplicate,
        misshapen=misshapen,
    )
    if head is not None:
        _check_tied(folder, head, sources["embed/embedding"])
    return sources


def _raise_misfits(folder: Path, **problems: list[str]) -> None:
    """All that does not fit, in one error."""
    if text := "; ".join(
        f"{kind}: {', '.join(sorted(set(names)))}"
        for kind, names in problems.items()
        if names
    ):
        raise ValueError(f"the weights of {folder} do not fit its config.json: {text}")


def _check_tied(folder: Path, head: _Tensor, embedding: _Source) -> None:
    """A file may hold the tied head too; it must say the same."""
    (tensor,) = embedding.tensors
    size = tensor.shape[0]
    same = head.shape == tensor.shape
    for start in range(0, size if same else 0, 4096):
        rows = (slice(start, min(start + 4096, size)),)
        same = same and bool(np.array_equal(head.read(rows), tensor.read(rows)))
    if not same:
        raise ValueError(
            f"{folder}: {head.name} differs from {tensor.name} although config.json "
            "ties them; set tie_word_embeddings to false, or remove one of them"
        )


def _bare(name: str, model: LanguageModel) -> str:
    for prefix in model.architecture.prefixes:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name
