"""The key/value cache: what is written to it, and who sees what.

Suffixes are the dimension letters of `mgsr_jax.typing`.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.models._placement import Placement
from mgsr_jax.typing import Cache

LayerCache = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
"""Keys and values of one layer. A head's slots are contiguous, as attention reads them.
"""

NewKeysAndValues = tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]
"""One layer's keys and values of the tokens just read, not yet in the cache."""


@dataclasses.dataclass(frozen=True)
class Visibility:
    """Positions of queries and keys, which decide the mask of each layer.

    Attributes:
      positions: positions of the queries. [B, T]
      key_positions: positions of the keys; None: attention is plainly causal. [B, S]
      windows: sliding window of each layer; None: no layer has one. [L]
    """

    positions: Int[Array, "#B T"]
    key_positions: Int[Array, "#B S"] | None
    windows: Int[Array, "L"] | None

    @classmethod
    def of(
        cls,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None,
        slots: int | None,
        windows: tuple[int, ...] | None,
    ) -> "Visibility":
        """The visibility of `tokens` at `positions` (None: 0, 1, ... in every row).

        Args:
          tokens: token ids that are read.
          positions: their positions.
          slots: length of the cache; None: there is no cache.
          windows: sliding window of each layer; None: no layer has one.
        """
        keys = positions
        if positions is None:
            # One row for the whole batch: the mask is not copied per row.
            positions = jnp.arange(tokens.shape[1])[None]
        elif slots is not None:
            keys = jnp.arange(slots)[None]
        if windows is None:
            return cls(positions, keys, None)
        keys = positions if keys is None else keys
        return cls(positions, keys, jnp.asarray(windows))

    def mask(self, window: Int[Array, ""] | None) -> Bool[Array, "#B 1 T S"] | None:
        """Mask of a layer with this window; None: attention is plainly causal."""
        if self.key_positions is None:
            return None
        return attention_mask(self.positions, self.key_positions, window)


def attention_mask(
    positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    window: Int[Array, ""] | None = None,
) -> Bool[Array, "#B 1 T S"]:
    """True where a query sees a key: not later, less than `window` positions back."""
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def write_cache(
    cache: Float[Array, "B K S H"],
    values: Float[Array, "B K T H"],
    positions: Int[Array, "#B T"],
    placement: Placement,
) -> Float[Array, "B K S H"]:
    """Write the values of position p to slot p; positions beyond the cache are dropped.

    One scatter per row: a dynamic_update_slice would clamp its start and overwrite the
    last slot of a full row.
    """
    positions = jnp.broadcast_to(positions, (values.shape[0], values.shape[2]))
    written = jax.vmap(lambda c, i, x: c.at[:, i].set(x, mode="drop"))(
        cache, positions, values.astype(cache.dtype)
    )
    # Without this, XLA splits the cache like the queries and all-gathers it per token.
    return placement.place_cache(written)


def write_layers(
    cache: Cache,
    new: Iterable[NewKeysAndValues],
    positions: Int[Array, "B T"] | None,
    placement: Placement,
) -> Cache:
    """Write keys and values of all layers at `positions` (None: at the first slots)."""

    def write(old: Array, new: Array) -> Array:
        if positions is None:
            return old.at[:, :, : new.shape[2]].set(new.astype(old.dtype))
        return write_cache(old, new, positions, placement)

    return placement.place_cache(jax.tree.map(write, cache, tuple(new)))
