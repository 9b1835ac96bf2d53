"""The tables and modules that a family of models provides."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.models._attention import Attention
from mgsr_jax.models._cache import LayerCache, NewKeysAndValues


@dataclasses.dataclass(frozen=True)
class KeyRow:
    """One parameter of ours and its place in a Hugging Face file.

    Attributes:
      path: '/'-joined path in our params; under 'layers/' it is stacked over layers.
      name: tensor name without the base prefix; {} stands for the layer's number.
      transposed: the file stores [out, in].
      part, parts: ours is this part of the file's tensor, split along its last axis.
    """

    path: str
    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1


class EmbedAndNorm(Protocol):
    """What surrounds the layers: embeddings, the final norm, an untied head."""

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """Input of the first layer."""
        ...

    def apply_final_norm(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        """Final hidden states, which the head unembeds."""
        ...


class Block(Protocol):
    """One layer."""

    attention: Attention

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Bool[Array, "#B 1 T S"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], NewKeysAndValues]:
        """Hidden states after the layer, and the keys and values of its tokens."""
        ...


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family's modules and tables.

    Attributes:
      embed_and_norm: class of an `EmbedAndNorm` module, (config, *, rngs).
      block: class of a `Block` module, (config, *, rngs).
      key_rows: config -> rows between our params and a Hugging Face file.
      partition_rules: config -> ordered (regex, PartitionSpec) rows.
      prefixes: base prefixes of tensor names; files are written with the first one.
      ignored: regexes of buffers that are not parameters, searched in tensor names
        without prefix.
    """

    embed_and_norm: Callable[..., nnx.Module]
    block: Callable[..., nnx.Module]
    key_rows: Callable[..., tuple[KeyRow, ...]]
    partition_rules: Callable[..., tuple[tuple[str, P], ...]]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...]
