"""The device mesh, strict tables from parameter paths to shardings, batches onto it."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsr_jax.typing import BATCH_AXES

AXES = ("data", "fsdp", "tensor")
BATCH = P(BATCH_AXES)

Rules = Sequence[tuple[str, P]]
"""Ordered rows (regex searched in the '/'-joined path, spec); the first match wins."""


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, *, devices: Any = None
) -> Mesh:
    """A mesh with the axes data, fsdp and tensor; one size may be -1 (the rest).

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
    return jax.make_mesh(
        tuple(shape), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )


def partition_specs(rules: Rules, tree: Any) -> Any:
    """The spec of every leaf by the first rule that matches its path.

    Scalars are replicated.

    Raises:
      ValueError: a leaf that no rule matches, or a rule that matches no leaf.
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
    if unused := [pattern for pattern, _ in rules if pattern not in used]:
        raise ValueError(f"partition rules match no parameter: {unused}; remove them")
    return specs


def shardings(mesh: Mesh, rules: Rules, tree: Any) -> Any:
    """`partition_specs` on a mesh, checked: every sharded dimension must divide.

    Raises:
      ValueError: as `partition_specs`; or a dimension that does not divide, by name.
    """

    def place(path: Any, leaf: Any, spec: P) -> NamedSharding:
        sharding = NamedSharding(mesh, spec)
        try:
            sharding.shard_shape(leaf.shape)
        # IndexError where the spec has more axes than the array.
        except (ValueError, IndexError) as error:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(
                f"parameter {name!r} of shape {leaf.shape} cannot be split as {spec} "
                f"over the mesh {dict(mesh.shape)}; choose axis sizes that divide it"
            ) from error
        return sharding

    return jax.tree_util.tree_map_with_path(place, tree, partition_specs(rules, tree))


def batch_shards() -> int:
    """Parts that rows are split into on the context's mesh; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return int(np.prod([mesh.shape.get(axis, 1) for axis in BATCH_AXES]))


def batch_axes() -> tuple[str, ...]:
    """The axes of the context's mesh that rows are split over."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in BATCH_AXES if sizes.get(axis, 1) > 1)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over data and fsdp; every other axis whole."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, batch: Any) -> Any:
    """A host batch (this process's rows) as global arrays split over data and fsdp.

    Raises:
      ValueError: the number of rows does not divide over the mesh.
    """
    sharding = batch_sharding(mesh)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]

    def put(leaf: np.ndarray) -> jax.Array:
        rows = leaf.shape[0] * jax.process_count()
        if rows % parts:
            raise ValueError(
                f"a batch of {rows} rows does not divide over data={mesh.shape['data']}"
                f" x fsdp={mesh.shape['fsdp']}; use a multiple of {parts}"
            )
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree.map(put, batch)
