"""Positions, rotary embeddings, grouped-query attention over a functional cache.

Suffixes are the dimension letters of `mgsr_jax.typing`.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.models._causal_attention import Kind, causal_attention
from mgsr_jax.models._hf_config import HfConfig, require_supported
from mgsr_jax.models._linear import linear
from mgsr_jax.sharding import axis_size, constrain
from mgsr_jax.typing import BATCH_AXES

LayerCache = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]]
"""Keys and values of one layer; a head's lie together, as its products read them."""

NewKeys = tuple[Float[Array, "B K T H"], Float[Array, "B K T H"]]
"""Those of the tokens that were just read, to be written into the cache."""


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864), Llama 3's scaling too.

    Attributes:
      theta: base of the wavelengths.
      kind: "default", "linear" or "llama3".
      factor: by how much long wavelengths are stretched.
      low_freq_factor, high_freq_factor: llama3; between them the stretch is blended.
      original_length: llama3; the position limit before the stretch.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "Rope":
        """From `rope_parameters`, or the older `rope_theta` and `rope_scaling`.

        Raises:
          ValueError: another rope type, or one that rotates a part of the head.
        """
        values = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
        values = {"rope_theta": hf.get("rope_theta", 10000.0), **values}
        values["rope_type"] = values.get("rope_type", values.get("type", "default"))
        values.setdefault("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
        values["model_type"] = hf.get("model_type")
        require_supported(
            values,
            rope_type=("default", "linear", "llama3"),
            partial_rotary_factor=(1.0, None),
        )
        kind, theta = values["rope_type"], float(values["rope_theta"])
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, float(values["factor"]))
        return cls(
            theta,
            kind,
            float(values["factor"]),
            float(values["low_freq_factor"]),
            float(values["high_freq_factor"]),
            int(
                values.get("original_max_position_embeddings")
                or hf["max_position_embeddings"]
            ),
        )

    def to_hf(self) -> dict[str, Any]:
        """Both spellings: transformers 5 reads `rope_parameters`, others do not."""
        scaling: dict[str, Any] = {"rope_type": self.kind}
        if self.kind != "default":
            scaling["factor"] = self.factor
        if self.kind == "llama3":
            scaling["low_freq_factor"] = self.low_freq_factor
            scaling["high_freq_factor"] = self.high_freq_factor
            scaling["original_max_position_embeddings"] = self.original_length
        return {
            "rope_theta": self.theta,
            "rope_scaling": None if self.kind == "default" else scaling,
            "rope_parameters": {"rope_theta": self.theta, **scaling},
        }

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians a position, float32 [head_dim / 2]."""
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        inverse = (1.0 / np.float32(self.theta) ** exponents).astype(np.float32)
        if self.kind == "linear":
            return inverse / np.float32(self.factor)
        if self.kind == "llama3":
            wavelengths = 2 * math.pi / inverse
            turns = self.original_length / wavelengths
            low, high = self.low_freq_factor, self.high_freq_factor
            kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
            inverse = (1 - kept) * inverse / self.factor + kept * inverse
        return inverse.astype(np.float32)

    def rotate(
        self, x_BTNH: Float[Array, "B T N H"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T N H"]:
        """Turns the pairs (i, i + H/2) by position times frequency, in float32."""
        inverse = jnp.asarray(self.inverse_frequencies(x_BTNH.shape[-1]))
        angles = positions[..., None, None].astype(jnp.float32) * inverse.reshape(
            1, 1, 1, -1
        )
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, axis=-1).astype(x_BTNH.dtype)


def attention_mask(
    positions: Int[Array, "#B T"],
    key_positions: Int[Array, "#B S"],
    window: Int[Array, ""] | None = None,
) -> Bool[Array, "#B 1 T S"]:
    """True where a query sees a key: not later, and fewer than `window` back."""
    distance = positions[:, None, :, None] - key_positions[:, None, None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def write_cache(
    cache: Float[Array, "B K S H"],
    values: Float[Array, "B K T H"],
    positions: Int[Array, "#B T"],
) -> Float[Array, "B K S H"]:
    """Position p goes to slot p; what lies beyond the last slot is dropped.

    A scatter for each row: a dynamic_update_slice would clamp its start and overwrite
    the last slot of a full row.
    """
    positions = jnp.broadcast_to(positions, (values.shape[0], values.shape[2]))
    written = jax.vmap(lambda c, i, x: c.at[:, i].set(x, mode="drop"))(
        cache, positions, values.astype(cache.dtype)
    )
    # Else XLA splits it as the queries are, and puts it together for every token.
    return place_cache(written)


def place_cache(cache: Any) -> Any:
    """Splits rows over the mesh, and heads over its tensor axis where they divide."""

    def place(x: Float[Array, "B K S H"]) -> Float[Array, "B K S H"]:
        divides = x.shape[1] % axis_size("tensor") == 0
        return constrain(x, P(BATCH_AXES, "tensor" if divides else None))

    return jax.tree.map(place, cache)


def attend_to_cache(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask: Bool[Array, "#B 1 T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v in the cache's own layout, which is never transposed.

    The softmax is in float32.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BKSH.shape[1]
    q = q_BTNH.reshape(batch, length, kv_heads, -1, width)
    q = q.transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, width)
    scores = jnp.matmul(q, k_BKSH.mT, preferred_element_type=jnp.float32)
    grouped = scores.reshape(batch, kv_heads, -1, length, scores.shape[-1])
    seen = jnp.where(mask[:, :, None], grouped * width**-0.5, -jnp.inf)
    weights = jax.nn.softmax(seen, axis=-1).astype(v_BKSH.dtype).reshape(scores.shape)
    out = jnp.matmul(weights, v_BKSH).reshape(batch, kv_heads, -1, length, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


class Attention(nnx.Module):
    """Causal self-attention; K key/value heads serve N query heads.

    The config gives width, num_heads, num_kv_heads, head_dim and initializer_range.
    """

    def __init__(
        self,
        config: Any,
        *,
        qkv_bias: bool,
        output_bias: bool,
        rope: Rope | None = None,
        head_norm_epsilon: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.rope = config.head_dim, rope
        self.kind: Kind = "xla"
        query, kv = (
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
        )

        def to(size_in: int, size_out: int, bias: bool) -> nnx.Linear:
            stddev = config.initializer_range
            return linear(size_in, size_out, bias=bias, stddev=stddev, rngs=rngs)

        self.query = to(config.width, query, qkv_bias)
        self.key = to(config.width, kv, qkv_bias)
        self.value = to(config.width, kv, qkv_bias)
        self.output = to(query, config.width, output_bias)
        self.has_head_norm = head_norm_epsilon is not None
        if head_norm_epsilon is not None:
            self.query_norm = nnx.RMSNorm(
                config.head_dim, epsilon=head_norm_epsilon, rngs=rngs
            )
            self.key_norm = nnx.RMSNorm(
                config.head_dim, epsilon=head_norm_epsilon, rngs=rngs
            )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Bool[Array, "#B 1 T S"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], NewKeys]:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = self.query(x_BTD).reshape(heads)
        k_BTKH = self.key(x_BTD).reshape(heads)
        v_BTKH = self.value(x_BTD).reshape(heads)
        if self.has_head_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if self.rope is not None:
            q_BTNH = self.rope.rotate(q_BTNH, positions)
            k_BTKH = self.rope.rotate(k_BTKH, positions)
        new = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        if cache is None and mask is None:
            out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, self.kind)
        elif cache is None:  # a window
            out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask)
        else:
            assert mask is not None  # a cache's slots are more than what is seen
            k_BKSH, v_BKSH = (
                write_cache(*old_and_new, positions).astype(q_BTNH.dtype)
                for old_and_new in zip(cache, new, strict=True)
            )
            out_BTNH = attend_to_cache(q_BTNH, k_BKSH, v_BKSH, mask)
        return self.output(out_BTNH.reshape(*x_BTD.shape[:2], -1)), new
