"""Reductions over the vocabulary, whole on every device or split over a mesh axis.

A loss is written once, for the columns that a device holds, with the reductions of a
`Vocabulary`. `over_vocabulary` runs it: as it stands where V is whole, inside
`shard_map` over one mesh axis where V is split. No array of the size of V is gathered.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, reshard
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mgsr_jax.losses._top_k import top_k

Axis = str | tuple[str, ...] | None
"""The mesh axis that V is split over; None where every device holds all of it."""


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the losses ask of the last axis of logits.

    Attributes:
      axis: the mesh axis that it is split over, in equal consecutive parts.
      part: the number of this device's part; None reads it from `axis`.
      rows_by_xla: as in `top_k`.
    """

    axis: Axis = None
    part: Int[Array, ""] | None = None
    rows_by_xla: bool | None = None

    def width(self, x: Float[Array, "*B V"]) -> int:
        """The number of columns on all devices together."""
        return x.shape[-1] * (1 if self.axis is None else lax.axis_size(self.axis))

    def columns(self, x: Float[Array, "*B V"]) -> Int[Array, "*B V"]:
        """The number of every column, counted over all devices."""
        here = lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
        return here + self._first(x)

    def sum(self, x: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """Sum over the columns."""
        total = jnp.sum(x, axis=-1)
        return total if self.axis is None else lax.psum(total, self.axis)

    def max(self, x: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """The largest column; without gradient."""
        largest = lax.stop_gradient(jnp.max(x, axis=-1))
        return largest if self.axis is None else lax.pmax(largest, self.axis)

    def logsumexp(self, x: Float[Array, "*B V"]) -> Float[Array, "*B"]:
        """log sum_v exp(x_v); -inf, and no gradient, where every column is -inf."""
        largest = self.max(x)
        largest = jnp.where(largest > -jnp.inf, largest, 0.0)
        total = self.sum(jnp.exp(x - largest[..., None]))
        some = total > 0
        return jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + largest, -jnp.inf)

    def log_softmax(self, x: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
        """Log-probabilities; shifted first, so that large logits cost no precision."""
        shifted = x - self.max(x)[..., None]
        return shifted - jnp.log(self.sum(jnp.exp(shifted)))[..., None]

    def top_k(
        self, x: Float[Array, "*B V"], k: int
    ) -> tuple[Float[Array, "*B K"], Int[Array, "*B K"]]:
        """The `k` largest, descending, and their columns; of equals the first wins."""
        if self.axis is None:
            return top_k(x, k)
        largest = functools.partial(top_k, rows_by_xla=self.rows_by_xla)
        values, indices = largest(x, min(k, x.shape[-1]))
        last = x.ndim - 1
        values, indices = (
            lax.all_gather(part, self.axis, axis=last, tiled=True)
            for part in (values, indices + self._first(x))
        )
        values, places = largest(values, k)
        indices = jnp.take_along_axis(indices, places, axis=-1)
        # Equal on every device already; pmax is what tells the type system so.
        return lax.pmax(values, self.axis), lax.pmax(indices, self.axis)

    def take(
        self, x: Float[Array, "*B V"], indices: Int[Array, "*B K"]
    ) -> Float[Array, "*B K"]:
        """Some columns, by number; -inf for those that do not exist."""
        exists = (indices >= 0) & (indices < self.width(x))
        indices = indices - self._first(x)
        here = jnp.take_along_axis(x, indices, axis=-1, mode="clip")
        if self.axis is not None:
            held = (indices >= 0) & (indices < x.shape[-1])
            here = lax.psum(jnp.where(held, here, 0.0), self.axis)
        return jnp.where(exists, here, -jnp.inf)

    def without(
        self, x: Float[Array, "*B V"], indices: Int[Array, "*B K"]
    ) -> Float[Array, "*B V"]:
        """-inf in some columns, by number."""
        here = indices - self._first(x)
        here = jnp.where((here >= 0) & (here < x.shape[-1]), here, x.shape[-1])
        # By row: one scatter over all rows would gather the logits of a split batch.
        drop = jnp.vectorize(
            lambda x, here: x.at[here].set(-jnp.inf, mode="drop"),
            signature="(v),(k)->(v)",
        )
        return drop(x, here)

    def _first(self, x: Float[Array, "*B V"]) -> int | Int[Array, ""]:
        if self.axis is None:
            return 0
        part = lax.axis_index(self.axis) if self.part is None else self.part
        return part * x.shape[-1]


def over_vocabulary(
    local: Callable[..., Any],
    vocab_axis: Axis,
    logits: tuple[Float[Array, "..."], ...],
    *rest: Any,
) -> Any:
    """`local(vocabulary, *logits, *rest)`, with the last axis of `logits` split.

    On an Auto mesh `vocab_axis` names the axis. On an Explicit mesh the type of the
    first logits says how they are split, over V and over positions. Inside a shard_map
    over `vocab_axis` the logits are this device's columns already. What `rest` holds
    and what `local` returns has the positions' axes first, or none, and never V.

    Raises:
      ValueError: there is no such mesh axis, or V does not divide over it.
    """
    spec, mesh = _placement(logits[0])
    if any(spec):
        _check_named(vocab_axis, spec)
        return _over_explicit(local, spec, mesh, logits, rest)
    if vocab_axis is None:
        return local(Vocabulary(), *logits, *rest)
    axes = _axes(vocab_axis)
    if missing := [axis for axis in axes if axis not in mesh.axis_names]:
        raise ValueError(
            f"vocab_axis={vocab_axis!r}, but the mesh at hand has the axes "
            f"{mesh.axis_names}, not {missing[0]!r}; call inside jax.set_mesh(mesh), "
            "or pass None where every device holds the whole vocabulary"
        )
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if all(kinds[axis] == AxisType.Manual for axis in axes):
        return local(Vocabulary(vocab_axis), *logits, *rest)
    parts = _parts(mesh, axes, logits)
    split = tuple(P(*[None] * (x.ndim - 1), axes) for x in logits)
    specs = (P(axes), *split, *jax.tree.map(lambda _: P(), rest))
    place = functools.partial(jax.shard_map, mesh=mesh, axis_names=set(axes))
    nested = AxisType.Manual in mesh.axis_types
    function = _numbered(local, vocab_axis, rows_by_xla=not nested)
    if nested:
        return _differentiated_inside(function, place, specs)(parts, *logits, *rest)
    return place(function, in_specs=specs, out_specs=P())(parts, *logits, *rest)


def _numbered(
    local: Callable[..., Any], axis: Axis, *, rows_by_xla: bool
) -> Callable[..., Any]:
    """`local` on a device that is told its part's number before the logits.

    With `axis_index` some programs do not compile where other axes are Auto (XLA's
    partitioner in jax 0.10: "PartitionId instruction is not supported").
    """

    def run(part: Array, *args: Any) -> Any:
        return local(Vocabulary(axis, part[0], rows_by_xla), *args)

    return run


def _differentiated_inside(
    function: Callable[..., Any], place: Callable[..., Any], specs: Any
) -> Callable[..., Any]:
    """`place(function)` with the derivative taken within, from its arguments alone.

    Inside another shard_map jax 0.10 takes what a shard_map keeps for its backward pass
    for split over the outer axes, and fails (jax#26588). Here nothing is kept.
    """

    @jax.custom_vjp
    def run(*args: Any) -> Any:
        return place(function, in_specs=specs, out_specs=P())(*args)

    def forward(*args: Any) -> Any:
        return run(*args), args

    def backward(args: Any, cotangents: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        places = tree.flatten_up_to(specs)
        real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in leaves]

        def pull_back(leaves: list[Array], cotangents: Any) -> list[Array]:
            def of_real(values: list[Array]) -> Any:
                left = iter(values)
                pairs = zip(real, leaves, strict=True)
                return function(
                    *tree.unflatten(next(left) if r else x for r, x in pairs)
                )

            chosen = [x for r, x in zip(real, leaves, strict=True) if r]
            return jax.vjp(of_real, chosen)[1](cotangents)[0]

        outs = [spec for r, spec in zip(real, places, strict=True) if r]
        found = iter(
            place(pull_back, in_specs=(places, P()), out_specs=outs)(leaves, cotangents)
        )
        return tree.unflatten(next(found) if r else None for r in real)

    run.defvjp(forward, backward)
    return run


def _over_explicit(
    local: Callable[..., Any], spec: Any, mesh: Any, logits: Any, rest: Any
) -> Any:
    """Every axis of the type becomes manual: nothing is left for XLA to gather."""
    axes = _axes(spec[-1])
    parts = _parts(mesh, axes, logits)
    positions = P(*spec[:-1])
    shape = logits[0].shape[:-1]

    def place(x: Array | float) -> P:
        return positions if jnp.shape(x)[: len(shape)] == shape else P()

    specs = (P(axes or None), *(P(*spec) for _ in logits), *jax.tree.map(place, rest))
    arguments = jax.tree.map(
        lambda spec, part: jax.tree.map(lambda x: reshard(x, spec), part),
        specs,
        (parts, *logits, *rest),
        is_leaf=lambda x: isinstance(x, P),
    )
    return jax.shard_map(
        _numbered(local, spec[-1], rows_by_xla=False),
        mesh=mesh,
        in_specs=specs,
        out_specs=positions,
        axis_names={name for part in spec for name in _axes(part)},
    )(*arguments)


def _check_named(vocab_axis: Axis, spec: tuple[Any, ...]) -> None:
    if not set(_axes(vocab_axis)) <= set(_axes(spec[-1])):
        raise ValueError(
            f"vocab_axis={vocab_axis!r}, but the logits' type is split as {spec}; "
            "expected V split over it in the type too: make all axes of the mesh "
            "Explicit, or all Auto"
        )


def _placement(logits: Float[Array, "..."]) -> tuple[tuple[Any, ...], Any]:
    """How the type says that each axis is split (Auto axes: not at all), the mesh."""
    sharding = jax.typeof(logits).sharding
    mesh = sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    spec = tuple(sharding.spec)
    return spec + (None,) * (logits.ndim - len(spec)), mesh


def _axes(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis or ())


def _parts(
    mesh: Any, axes: tuple[str, ...], logits: tuple[Float[Array, "..."], ...]
) -> Int[Array, " parts"]:
    """The numbers of the parts that V is split into; checks that it divides."""
    parts = math.prod(mesh.shape[axis] for axis in axes)
    for x in logits:
        if x.shape[-1] % parts:
            raise ValueError(
                f"logits of {x.shape[-1]} columns do not divide over the {parts} "
                f"devices of vocab_axis={axes}; pad the head to a multiple of {parts} "
                "and pass vocab_size, the number of tokens"
            )
    return jnp.arange(parts, dtype=jnp.int32)
