"""The device mesh, strict tables from parameter paths to shardings, batches onto it.

Along "data" lie copies of the models, along "fsdp" parts of their parameters; both
split rows. "tensor" splits heads, MLPs and the vocabulary of every copy.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax.typing import BATCH_AXES

AXES = ("data", "fsdp", "tensor")
BATCH = P(BATCH_AXES)

Rules = Sequence[tuple[str, P]]
"""Ordered rows (regex searched in the '/'-joined path, spec); the first match wins."""


class DoesNotDivide(ValueError):
    """A size that another mesh might divide."""


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Any = None
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; one size may be -1 (the rest).

    Neighbours along fsdp and tensor are neighbours in a TPU's network; several TPU
    slices are put behind one another along data.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [data, fsdp, tensor]
    known = int(np.prod([size for size in shape if size != -1]))
    if shape.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if min(shape) < 1 or int(np.prod(shape)) != len(devices):
        raise ValueError(
            f"mesh data={data}, fsdp={fsdp}, tensor={tensor} does not fill the "
            f"{len(devices)} devices at hand; let the sizes multiply to "
            f"{len(devices)}, or give one of them as -1"
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform != "tpu":
        slices = 1
    if shape[0] % slices:
        raise DoesNotDivide(
            f"mesh.data={shape[0]} does not divide over {slices} TPU slices, between "
            "which only copies of the models can be placed; use a multiple"
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


def partition_specs(rules: Rules, tree: Any, *, strict: bool = True) -> Any:
    """The spec of every leaf by the first rule that matches its path.

    Scalars are replicated. `strict` is for a whole model; a part of it has not all.

    Raises:
      ValueError: a leaf that no rule matches; if strict, a rule that matches no leaf.
    """
    used: set[str] = set()

    def spec(path: Any, leaf: Any) -> P:
        if leaf.ndim == 0:
            return P()
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, found in rules:
            if re.search(pattern, name):
                used.add(pattern)
                return found
        raise ValueError(
            f"no partition rule matches {name!r} of shape {leaf.shape}; add one"
        )

    specs = jax.tree_util.tree_map_with_path(spec, tree)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if strict and unused:
        raise ValueError(f"partition rules match no parameter: {unused}; remove them")
    return specs


def shardings(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """`partition_specs` on a mesh, checked: every sharded dimension must divide.

    Raises:
      ValueError: as `partition_specs`; or a dimension that does not divide, by name.
    """
    return placed(mesh, tree, partition_specs(rules, tree))


def placed(mesh: Mesh, tree: Any, specs: Any) -> Any:
    """`specs` of the leaves of `tree` on a mesh, checked.

    Raises:
      ValueError: a dimension that does not divide, by name.
    """

    def place(path: Any, leaf: Any, spec: P) -> NamedSharding:
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        # IndexError where the spec has more axes than the array.
        except (ValueError, IndexError) as error:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise DoesNotDivide(
                f"parameter {name!r} of shape {leaf.shape} cannot be split as {spec} "
                f"over the mesh {dict(mesh.shape)}; choose axis sizes that divide it"
            ) from error
        return sharding

    return jax.tree_util.tree_map_with_path(place, tree, specs)


def gathered(rules: Rules) -> Rules:
    """The same rules without fsdp: for parameters that are used again and again."""

    def whole(part: Any) -> Any:
        names = (part,) if isinstance(part, str) else tuple(part or ())
        kept = tuple(name for name in names if name != "fsdp")
        return kept[0] if len(kept) == 1 else kept or None

    return tuple((pattern, P(*map(whole, spec))) for pattern, spec in rules)


def constrain(tree: Any, specs: Any) -> Any:
    """`tree` placed on the context's mesh; as it is where there is none.

    So too inside a shard_map: there everything is a device's own already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds.get(axis) != AxisType.Auto for axis in AXES):
        return tree
    return jax.lax.with_sharding_constraint(tree, specs)


def axis_size(axis: str) -> int:
    """Devices along an axis of the context's mesh; 1 where there is none."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def vocab_axis() -> str | None:
    """The axis that vocabularies are split over on the context's mesh, if any."""
    return "tensor" if axis_size("tensor") > 1 else None


def batch_axes() -> tuple[str, ...]:
    """The axes that rows are split over on the context's mesh.

    Those of one device are left out, but where the vocabulary is split: then a loss is
    written for all axes.
    """
    return tuple(axis for axis in BATCH_AXES if vocab_axis() or axis_size(axis) > 1)


def batch_shards() -> int:
    """Parts that rows are split into on the context's mesh; 1 where there is none."""
    return math.prod(axis_size(axis) for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over data and fsdp; every other axis whole."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def row_parts(mesh: Mesh) -> int:
    """Parts that the rows of a batch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def host_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of `size` this process's devices hold, ascending.

    Where the tensor axis spans several hosts, each of them holds the same ones.

    Raises:
      ValueError: the number of rows does not divide over the mesh.
    """
    parts = row_parts(mesh)
    if size % parts:
        raise ValueError(
            f"a batch of {size} rows does not divide over data={mesh.shape['data']}"
            f" x fsdp={mesh.shape['fsdp']}; use a multiple of {parts}"
        )
    held = batch_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held]))


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """Host rows, this process's `host_rows`, as global arrays over data and fsdp.

    Raises:
      ValueError: the number of rows does not divide over the mesh.
    """
    place = batch_sharding(mesh)
    held = len(host_rows(mesh, row_parts(mesh)))

    def put(leaf: np.ndarray) -> jax.Array:
        size = leaf.shape[0] * row_parts(mesh) // held
        own = host_rows(mesh, size)

        def rows(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            first = int(np.searchsorted(own, start))
            return leaf[first : first + stop - start]

        return jax.make_array_from_callback((size, *leaf.shape[1:]), place, rows)

    return jax.tree.map(put, batch)


def fetch_rows(batch: Any) -> Any:
    """The rows that this process's devices hold, as `put_batch` took them."""

    def fetch(leaf: jax.Array) -> np.ndarray:
        # Replicas of a row say the same.
        shards = {_first_row(shard): shard for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(shards[i].data) for i in sorted(shards)])

    return jax.tree.map(fetch, batch)


def _first_row(shard: Any) -> int:
    return shard.index[0].start or 0


def fetch_whole(tree: Any) -> Any:
    """Arrays of all hosts on every host; all of them call this together."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
