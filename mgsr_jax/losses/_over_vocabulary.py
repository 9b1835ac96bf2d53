"""How a loss runs on logits whose vocabulary axis may be split over devices.

Directly where V is whole on every device; inside a `shard_map` over the mesh axis that
splits V otherwise.
"""

import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from mgsr_jax.losses._mesh_axes import Axis, axes_of_type, names
from mgsr_jax.losses._vocabulary import Vocabulary

T = TypeVar("T")
Logits = tuple[Float[Array, "..."], ...]

Place = Callable[..., Callable[..., PyTree]]
"""`jax.shard_map` with its mesh and axes bound."""


def over_vocabulary(
    local: Callable[..., T], vocab_axis: Axis, logits: Logits, *rest: PyTree
) -> T:
    """`local(vocabulary, *logits, *rest)`, with the last axis of `logits` split.

    On an Auto mesh `vocab_axis` names the axis. On an Explicit mesh the type of the
    first logits gives the split of V and of the positions. Inside a shard_map over
    `vocab_axis` the logits already are this device's columns. Arrays in `rest` and in
    the result of `local` have the positions as leading axes, or none of them, and they
    never have an axis of size V.

    Raises:
      ValueError: the mesh has no axis `vocab_axis`, or V does not divide over it.
    """
    split = axes_of_type(logits[0])
    mesh = _mesh_of(logits[0])
    if any(split):
        _check_in_type(vocab_axis, split)
        return _over_explicit(local, split, mesh, logits, rest)
    if vocab_axis is None:
        return local(Vocabulary(), *logits, *rest)
    axes = names([vocab_axis])
    _check_in_mesh(vocab_axis, mesh)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if all(kinds[axis] == AxisType.Manual for axis in axes):
        return local(Vocabulary(vocab_axis), *logits, *rest)
    parts = _parts(mesh, axes, logits)
    columns = tuple(P(*[None] * (x.ndim - 1), axes) for x in logits)
    specs = (P(axes), *columns, *jax.tree.map(lambda _: P(), rest))
    place = functools.partial(jax.shard_map, mesh=mesh, axis_names=set(axes))
    nested = AxisType.Manual in mesh.axis_types
    function = _numbered(local, vocab_axis, rows_by_xla=not nested)
    if nested:
        return _differentiated_inside(function, place, specs)(parts, *logits, *rest)
    return place(function, in_specs=specs, out_specs=P())(parts, *logits, *rest)


def _numbered(
    local: Callable[..., T], axis: Axis, *, rows_by_xla: bool
) -> Callable[..., T]:
    """`local` with the index of the device's part as an argument before the logits.

    With `axis_index` some programs do not compile where other axes are Auto (XLA's
    partitioner in jax 0.10: "PartitionId instruction is not supported").
    """

    def run(part: Array, *args: PyTree) -> T:
        return local(Vocabulary(axis, part[0], rows_by_xla), *args)

    return run


def _differentiated_inside(
    function: Callable[..., T], place: Place, specs: tuple[PyTree, ...]
) -> Callable[..., T]:
    """`place(function)`, differentiated inside the shard_map from its arguments.

    Inside another shard_map jax 0.10 assumes that the residuals of a shard_map are
    split over the outer axes, and fails (jax#26588). Here there are no residuals.
    """

    @jax.custom_vjp
    def run(*args: PyTree) -> T:
        return place(function, in_specs=specs, out_specs=P())(*args)

    def forward(*args: PyTree) -> tuple[T, PyTree]:
        return run(*args), args

    def backward(args: PyTree, cotangents: PyTree) -> PyTree:
        leaves, tree = jax.tree.flatten(args)
        leaf_specs = tree.flatten_up_to(specs)
        real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

        def pull_back(leaves: list[Array], cotangents: PyTree) -> list[Array]:
            def of_real(values: list[Array]) -> T:
                remaining = iter(values)
                pairs = zip(real, leaves, strict=True)
                return function(
                    *tree.unflatten(next(remaining) if r else x for r, x in pairs)
                )

            values = [x for r, x in zip(real, leaves, strict=True) if r]
            return jax.vjp(of_real, values)[1](cotangents)[0]

        outs = [spec for r, spec in zip(real, leaf_specs, strict=True) if r]
        gradients = iter(
            place(pull_back, in_specs=(leaf_specs, P()), out_specs=outs)(
                leaves, cotangents
            )
        )
        return tree.unflatten(next(gradients) if r else None for r in real)

    run.defvjp(forward, backward)
    return run


def _over_explicit(
    local: Callable[..., T],
    split: tuple[Axis, ...],
    mesh: Mesh | AbstractMesh,
    logits: Logits,
    rest: PyTree,
) -> T:
    """`over_vocabulary` where types carry the sharding.

    Every axis of the type becomes manual, so that XLA has nothing to gather.
    """
    axes = names(split[-1:])
    parts = _parts(mesh, axes, logits)
    positions = P(*split[:-1])
    shape = logits[0].shape[:-1]

    def spec_of(x: Array | float) -> P:
        return positions if jnp.shape(x)[: len(shape)] == shape else P()

    specs = (
        P(axes or None),
        *(P(*split) for _ in logits),
        *jax.tree.map(spec_of, rest),
    )
    arguments = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: reshard(x, spec), part),
        specs,
        (parts, *logits, *rest),
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.shard_map(
        _numbered(local, split[-1], rows_by_xla=False),
        mesh=mesh,
        in_specs=specs,
        out_specs=positions,
        axis_names=set(names(split)),
    )(*arguments)


def _mesh_of(x: Float[Array, "..."]) -> Mesh | AbstractMesh:
    """The mesh of the array's type, or else the ambient mesh."""
    mesh = jax.typeof(x).sharding.mesh
    return jax.sharding.get_abstract_mesh() if mesh.empty else mesh


def _check_in_type(vocab_axis: Axis, split: tuple[Axis, ...]) -> None:
    if not set(names([vocab_axis])) <= set(names(split[-1:])):
        raise ValueError(
            f"vocab_axis={vocab_axis!r}, but the logits' type is split as {split}; "
            "expected the type to split V over it too: make all axes of the mesh "
            "Explicit, or all Auto"
        )


def _check_in_mesh(vocab_axis: Axis, mesh: Mesh | AbstractMesh) -> None:
    missing = [axis for axis in names([vocab_axis]) if axis not in mesh.axis_names]
    if missing:
        raise ValueError(
            f"vocab_axis={vocab_axis!r}, but the ambient mesh has the axes "
            f"{mesh.axis_names}, not {missing[0]!r}; call inside jax.set_mesh(mesh), "
            "or pass None where every device holds the whole vocabulary"
        )


def _parts(
    mesh: Mesh | AbstractMesh, axes: tuple[str, ...], logits: Logits
) -> Int[Array, " parts"]:
    """The index of every part of V.

    Raises:
      ValueError: V does not divide over `axes`.
    """
    count = math.prod(mesh.shape[axis] for axis in axes)
    for x in logits:
        if x.shape[-1] % count:
            raise ValueError(
                f"logits of {x.shape[-1]} columns do not divide over the {count} "
                f"devices of vocab_axis={axes}; pad the head to a multiple of {count} "
                "and pass vocab_size, the number of tokens"
            )
    return jnp.arange(count, dtype=jnp.int32)
