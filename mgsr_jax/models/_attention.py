"""Grouped-query attention with rotary embeddings, over whole rows or a cache.

Suffixes are the dimension letters of `mgsr_jax.typing`.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.models._cache import LayerCache, NewKeysAndValues, write_cache
from mgsr_jax.models._causal_attention import Kind, causal_attention
from mgsr_jax.models._linear import linear
from mgsr_jax.models._model_config import ModelConfig
from mgsr_jax.models._placement import Placement
from mgsr_jax.models._rope import Rope


def attend_to_cache(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask: Bool[Array, "#B 1 T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v, with the softmax in float32.

    Only the queries are transposed: the cache is read in the layout that it has.
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
    """Causal self-attention; each of K key/value heads serves N / K query heads."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        qkv_bias: bool,
        output_bias: bool,
        rope: Rope | None = None,
        head_norm_epsilon: float | None = None,
        rngs: nnx.Rngs,
    ):
        self.head_dim, self.rope = config.head_dim, rope
        self.kind: Kind = "xla"
        self.placement = Placement()
        query = config.num_heads * config.head_dim
        kv = config.num_kv_heads * config.head_dim

        def projection(size_in: int, size_out: int, bias: bool) -> nnx.Linear:
            stddev = config.initializer_range
            return linear(size_in, size_out, bias=bias, stddev=stddev, rngs=rngs)

        self.query = projection(config.width, query, qkv_bias)
        self.key = projection(config.width, kv, qkv_bias)
        self.value = projection(config.width, kv, qkv_bias)
        self.output = projection(query, config.width, output_bias)
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
    ) -> tuple[Float[Array, "B T D"], NewKeysAndValues]:
        heads = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTNH = self.query(x_BTD).reshape(heads)
        k_BTKH = self.key(x_BTD).reshape(heads)
        v_BTKH = self.value(x_BTD).reshape(heads)
        if cache is not None:
            q_BTNH, k_BTKH, v_BTKH = map(
                self.placement.place_heads, (q_BTNH, k_BTKH, v_BTKH)
            )
        if self.has_head_norm:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if self.rope is not None:
            q_BTNH = self.rope.rotate(q_BTNH, positions)
            k_BTKH = self.rope.rotate(k_BTKH, positions)
        new = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
        if cache is None and mask is None:
            out_BTNH = causal_attention(q_BTNH, k_BTKH, v_BTKH, self.kind)
        elif cache is None:  # a sliding window, or positions were given
            out_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask)
        else:
            assert mask is not None  # a query must not see the slots after its own
            out_BTNH = self._attend_to_cache(q_BTNH, new, cache, positions, mask)
        out_BTF = out_BTNH.reshape(*x_BTD.shape[:2], -1)
        if cache is not None:
            out_BTF = self.placement.place_columns(out_BTF)
        return self.output(out_BTF), new

    def _attend_to_cache(
        self,
        q_BTNH: Float[Array, "B T N H"],
        new: NewKeysAndValues,
        cache: LayerCache,
        positions: Int[Array, "#B T"],
        mask: Bool[Array, "#B 1 T S"],
    ) -> Float[Array, "B T N H"]:
        """Attention to a cache that has the new keys and values too."""
        k_BKSH, v_BKSH = (
            write_cache(old, values, positions, self.placement).astype(q_BTNH.dtype)
            for old, values in zip(cache, new, strict=True)
        )
        out_BTNH = attend_to_cache(q_BTNH, k_BKSH, v_BKSH, mask)
        return self.placement.place_cached(out_BTNH)
