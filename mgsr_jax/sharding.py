"""The device mesh, strict rules from parameter paths to shardings, batches on the mesh.

The axis "data" replicates the models, "fsdp" splits their parameters, and both split
the rows of a batch. "tensor" splits heads, MLPs and the vocabulary.

Functions without an argument `mesh` read the ambient mesh, which `jax.set_mesh` sets.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jaxtyping import PyTree

from mgsr_jax.typing import BATCH_AXES, Leaf

AXES = ("data", "fsdp", "tensor")
BATCH = P(BATCH_AXES)

Rules = Sequence[tuple[str, P]]
"""Ordered rows (regex searched in the '/'-joined path, spec); the first match wins."""

Axes = str | tuple[str, ...] | None
"""Mesh axes that split one dimension of an array."""

Tree = TypeVar("Tree")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; -1 fills the rest.

    Attributes:
      data: copies of the models, each of which processes different rows.
      fsdp: devices that share one copy's parameters (and process different rows too).
      tensor: devices that share one copy's heads, MLPs and vocabulary, and its rows;
        must divide the attention heads of both models.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def check(self) -> None:
        """Refuse sizes that no number of devices fits.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                raise ValueError(
                    f"mesh.{name}={size}; expected at least 1, or -1 for the rest of "
                    "the devices"
                )
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(
                f"mesh={sizes} has more than one -1; give all sizes but one"
            )


class DoesNotDivide(ValueError):
    """The mesh does not divide a size; another mesh might."""


def path_name(key_path: KeyPath) -> str:
    """The '/'-joined path of a leaf.

    >>> path_name((jax.tree_util.DictKey("mlp"), jax.tree_util.DictKey("up")))
    'mlp/up'
    """
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; one size may be -1 (the rest).

    Neighbours along fsdp and tensor are neighbours in a TPU's network. Several TPU
    slices follow one another along data.

    Raises:
      ValueError: the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or int(np.prod(shape)) != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fill the "
            f"{len(devices)} devices; let the sizes multiply to {len(devices)}, or "
            "set one of them to -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        slices = 1
    if shape[0] % slices:
        raise DoesNotDivide(
            f"mesh.data={shape[0]} does not divide over {slices} TPU slices; only the "
            f"data axis can span slices, so use a multiple of {slices}"
        )
    within = (shape[0] // slices, *shape[1:])
    if slices == 1:
        grid = mesh_utils.create_device_mesh(
            within, devices, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def partition_specs(rules: Rules, tree: PyTree, *, strict: bool = True) -> PyTree:
    """The spec of each leaf, from the first rule that matches its path.

    Scalars are replicated.

    Args:
      rules: the rules of a model.
      tree: the parameters, or their shapes.
      strict: raise for a rule that matches no leaf; False for a part of a model.

    Raises:
      ValueError: a leaf that no rule matches; if strict, a rule that matches no leaf.
    """
    used: set[str] = set()

    def first_match(path: KeyPath, leaf: Leaf) -> P:
        if leaf.ndim == 0:
            return P()
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                used.add(pattern)
                return spec
        raise ValueError(
            f"no partition rule matches {name!r} of shape {leaf.shape}; add one"
        )

    specs = jax.tree_util.tree_map_with_path(first_match, tree)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if strict and unused:
        raise ValueError(f"partition rules match no parameter: {unused}; remove them")
    return specs


def shardings(mesh: Mesh, rules: Rules, tree: PyTree) -> PyTree:
    """The sharding of each leaf on a mesh, by the rules of a model.

    Raises:
      ValueError: a leaf without a rule, a rule without a leaf, or a dimension that the
        mesh does not divide, by name.
    """
    return placed(mesh, tree, partition_specs(rules, tree))


def placed(mesh: Mesh, tree: PyTree, specs: PyTree) -> PyTree:
    """The sharding of each leaf on a mesh, by its spec.

    Raises:
      ValueError: a dimension that the mesh does not divide, by name.
    """

    def place(path: KeyPath, leaf: Leaf, spec: P) -> NamedSharding:
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        # IndexError: the spec has more axes than the array.
        except (ValueError, IndexError) as error:
            raise DoesNotDivide(
                f"parameter {path_name(path)!r} of shape {leaf.shape} cannot be split "
                f"as {spec} over the mesh {dict(mesh.shape)}; choose axis sizes that "
                "divide it"
            ) from error
        return sharding

    return jax.tree_util.tree_map_with_path(place, tree, specs)


def gathered(rules: Rules) -> Rules:
    """The same rules without fsdp: for parameters that are all-gathered over it."""

    def without_fsdp(axes: Axes) -> Axes:
        names = (axes,) if isinstance(axes, str) else tuple(axes or ())
        kept = tuple(name for name in names if name != "fsdp")
        return kept[0] if len(kept) == 1 else kept or None

    return tuple((pattern, P(*map(without_fsdp, spec))) for pattern, spec in rules)


def constrain(tree: Tree, specs: PyTree) -> Tree:
    """Constrain the sharding of `tree` on the ambient mesh.

    Returns `tree` unchanged without a mesh, and inside a shard_map, where each device
    already has its own part.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds.get(axis) != AxisType.Auto for axis in AXES):
        return tree
    return jax.lax.with_sharding_constraint(tree, specs)


def axis_size(axis: str) -> int:
    """Devices along an axis of the ambient mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def vocab_axis() -> str | None:
    """The axis of the ambient mesh that splits vocabularies; None: they are whole."""
    return "tensor" if axis_size("tensor") > 1 else None


def batch_axes() -> tuple[str, ...]:
    """The axes of the ambient mesh that rows are split over.

    An axis of size 1 is left out, unless the vocabulary is split: losses over a split
    vocabulary expect both axes.
    """
    return tuple(axis for axis in BATCH_AXES if vocab_axis() or axis_size(axis) > 1)


def batch_shards() -> int:
    """Number of parts that the ambient mesh splits rows into; 1 without a mesh."""
    return math.prod(axis_size(axis) for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split the first axis over data and fsdp; replicate over tensor."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Replicate the whole array on every device."""
    return NamedSharding(mesh, P())


def row_parts(mesh: Mesh) -> int:
    """Number of parts that a mesh splits the rows of a batch into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def host_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Indices of the rows of a batch that this process's devices hold, ascending.

    If the tensor axis spans several hosts, these hosts hold the same rows.

    Raises:
      ValueError: the mesh does not divide the number of rows, `size`.
    """
    parts = row_parts(mesh)
    if size % parts:
        raise ValueError(
            f"a batch of {size} rows does not divide over data={mesh.shape['data']}"
            f" x fsdp={mesh.shape['fsdp']}; use a multiple of {parts}"
        )
    held = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def put_batch(mesh: Mesh, batch: Tree) -> Tree:
    """Global arrays, split over data and fsdp, from this process's `host_rows`.

    Raises:
      ValueError: the mesh does not divide the number of rows.
    """
    place = batch_sharding(mesh)
    held = len(host_rows(mesh, row_parts(mesh)))

    def put(leaf: np.ndarray) -> jax.Array:
        size = leaf.shape[0] * row_parts(mesh) // held
        own = host_rows(mesh, size)

        def rows(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(own, start))
            return leaf[first : first + stop - start]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), place, rows)

    return jax.tree.map(put, batch)


def fetch_rows(batch: Tree) -> Tree:
    """The rows that this process's devices hold; the inverse of `put_batch`."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        # Replicas of a row are equal: keep one of them.
        shards = {_first_row(shard): shard for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(shards[i].data) for i in sorted(shards)])

    return jax.tree.map(fetch, batch)


def _first_row(shard: jax.Shard) -> int:
    return shard.index[0].start or 0


def fetch_whole(tree: Tree) -> Tree:
    """All-gather arrays from all hosts to every host; every process must call this."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def from_lead(values: np.ndarray) -> np.ndarray:
    """The lead process's array on every host, bit for bit; every process must call it.

    Args:
      values: of the same shape and dtype in every process; only the lead's is read.
    """
    if jax.process_count() == 1:
        return values
    # As bytes: without x64, JAX would round float64 to float32.
    data = np.ascontiguousarray(values).view(np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).view(values.dtype)
