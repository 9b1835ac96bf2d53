"""Mesh axes as JAX's types show them: what splits an array, what is already manual."""

from collections.abc import Iterable

import jax
from jax.sharding import AxisType
from jaxtyping import Array

Axis = str | tuple[str, ...] | None
"""The mesh axes that split one axis of an array; None where it is not split."""


def axes_of_type(x: Array) -> tuple[Axis, ...]:
    """The mesh axes that split each axis of `x`; Auto mesh axes do not show up."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def explicit_axes(x: Array) -> set[str]:
    """The mesh axes that the type of `x` can show."""
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}


def names(axes: Iterable[Axis]) -> tuple[str, ...]:
    """The names of all mesh axes in `axes`, in order."""
    flat = []
    for axis in axes:
        flat += [axis] if isinstance(axis, str) else list(axis or ())
    return tuple(flat)


def manual_axes() -> set[str]:
    """The mesh axes of the shard_map that surrounds the call."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Manual}


def split_by_xla() -> bool:
    """Whether XLA may split arrays over devices: a mesh axis is not manual."""
    mesh = jax.sharding.get_abstract_mesh()
    sizes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != AxisType.Manual and size > 1 for kind, size in sizes)
