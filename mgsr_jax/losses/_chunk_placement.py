"""The sharding of a chunked loss's arrays, and its loop run on every device."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard
from jaxtyping import Array, Float, PyTree

from mgsr_jax.losses._chunk_loop import ChunkSums
from mgsr_jax.losses._mesh_axes import axes_of_type, manual_axes, names
from mgsr_jax.losses._projection import varying_as


class Placement(NamedTuple):
    """The sharding of the three arguments of a chunked loss.

    Attributes:
      batch: mesh axes that the first axis of `tokens` is split over.
      manual: mesh axes of the shard_map around the loop: all axes that split anything.
        It is empty where there is no shard_map.
      explicit: whether the sharding comes from the arrays' types.
      shared_varies: whether `shared` is typed as different on each device of the
        caller's shard_map; the transpose sums its gradient over them, once.
      shared, tokens, aux: a PartitionSpec for every leaf.
    """

    batch: tuple[str, ...]
    manual: frozenset[str]
    explicit: bool
    shared_varies: bool
    shared: PyTree
    tokens: P
    aux: PyTree

    def put(
        self, shared: PyTree, tokens: Float[Array, "*B D"], aux: PyTree
    ) -> tuple[PyTree, Float[Array, "*B D"], PyTree]:
        """The arguments with the types that `over_devices` expects."""
        if self.shared_varies:
            shared = jax.tree.map(lambda x: varying_as(x, tokens), shared)
        if not self.explicit:
            return shared, tokens, aux
        specs = self.shared, self.tokens, self.aux
        return jax.tree.map(reshard, (shared, tokens, aux), specs)

    def over_devices(
        self, local: Callable[..., ChunkSums], wanted: list[bool] | None
    ) -> Callable[..., ChunkSums]:
        """`local` on every device for its own tokens; the sums are reduced once.

        `wanted` are the leaves of `shared` that get a gradient; None means none.
        """
        if not self.manual:
            return local

        def on_device(shared: PyTree, tokens: Array, aux: PyTree) -> ChunkSums:
            # Varying, so that the gradient of `shared` stays the device's own in the
            # loop. Otherwise it would be summed over the devices in every chunk.
            shared = jax.tree.map(
                lambda x: lax.pcast(x, self.batch, to="varying"), shared
            )
            *sums, d_tokens = local(shared, tokens, aux)
            value, metrics, d_shared = lax.psum(sums, self.batch)
            return ChunkSums(value, metrics, d_shared, d_tokens)

        specs, tree = jax.tree.flatten(self.shared, is_leaf=_is_spec)
        wanted = [False] * len(specs) if wanted is None else wanted
        d_shared = [s if w else None for s, w in zip(specs, wanted, strict=True)]
        return jax.shard_map(
            on_device,
            in_specs=(self.shared, self.tokens, self.aux),
            out_specs=ChunkSums(P(), P(), tree.unflatten(d_shared), self.tokens),
            axis_names=set(self.manual),
        )


def placement(
    batch_axes: tuple[str, ...],
    shared_specs: PyTree,
    shared: PyTree,
    tokens: Float[Array, "*B D"],
    aux: PyTree,
) -> Placement:
    """The placement from the caller's arguments, or from Explicit types.

    Inside a shard_map over `batch_axes` the tokens already are the device's own.
    """
    leaves = jax.tree.leaves((shared, tokens, aux))
    explicit = any(any(axes_of_type(x)) for x in leaves)
    manual = manual_axes()
    shared_varies = bool(manual) and not batch_axes and not explicit
    if explicit:
        batch_axes = names(axes_of_type(tokens)[:1])
        shared_specs = jax.tree.map(lambda x: _without(batch_axes, x), shared)
    else:
        if manual.issuperset(batch_axes):
            batch_axes = ()
        shared_specs = jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: spec, part),
            P() if shared_specs is None else shared_specs,
            shared,
            is_leaf=_is_spec,
        )
    rows = P(batch_axes or None)
    specs = (shared_specs, rows, jax.tree.map(lambda _: rows, aux))
    split = [axis for spec in jax.tree.leaves(specs, is_leaf=_is_spec) for axis in spec]
    return Placement(
        batch_axes, frozenset(names(split)), explicit, shared_varies, *specs
    )


def _without(axes: tuple[str, ...], x: Array) -> P:
    """The sharding of the type of `x`, replicated over `axes`."""
    kept = (
        tuple(name for name in names([axis]) if name not in axes)
        for axis in axes_of_type(x)
    )
    return P(*(left or None for left in kept))


def _is_spec(x: PyTree) -> bool:
    return isinstance(x, P)
