"""LLaMA 1, 2 and 3, Mistral, SmolLM2, OpenLLaMA (arXiv 2302.13971, 2310.06825)."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from mgsr_jax.models._architecture import Architecture, KeyRow
from mgsr_jax.models._attention import Attention
from mgsr_jax.models._cache import LayerCache, NewKeysAndValues
from mgsr_jax.models._embed import Embed
from mgsr_jax.models._linear import linear
from mgsr_jax.models._model_config import (
    HfConfig,
    ModelConfig,
    require_divides,
    require_supported,
    required,
    special_ids,
    token_ids,
)
from mgsr_jax.models._rope import Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Config of LLaMA and Mistral; Qwen's extends it.

    Attributes:
      model_type: family, as config.json names it.
      norm_epsilon: added to the mean square in RMSNorm.
      rope: rotary position embedding.
      qkv_bias, output_bias, mlp_bias: which linear layers have biases.
    """

    model_type: str
    norm_epsilon: float
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool

    @property
    def head_norm_epsilon(self) -> float | None:
        """Epsilon of the norm of each query and key head; None: there is no norm."""
        return None

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "LlamaConfig":
        """Read a config.json of model_type llama or mistral.

        Raises:
          ValueError: a missing key, or a setting that is not implemented, by name.
        """
        require_supported(hf, hidden_act=("silu", "swish"))
        mistral = hf["model_type"] == "mistral"
        window = hf.get("sliding_window", 4096) if mistral else None
        bias = bool(hf.get("attention_bias", False))
        return cls(
            **decoder_settings(hf, kv_heads=8 if mistral else None),
            max_length=hf.get("max_position_embeddings", 131072 if mistral else 2048),
            qkv_bias=bias,
            output_bias=bias,
            mlp_bias=bool(hf.get("mlp_bias", False)),
            windows=window and (window,) * required(hf, "num_hidden_layers"),
            bos_token_id=token_ids(hf, "bos_token_id", 1),
            eos_token_id=token_ids(hf, "eos_token_id", 2),
            pad_token_id=token_ids(hf, "pad_token_id"),
        )

    def to_hf(self) -> dict[str, object]:
        if self.model_type == "mistral":
            name = "MistralForCausalLM"
            own = {"sliding_window": self.windows and self.windows[0]}
        else:
            name = "LlamaForCausalLM"
            own = {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        return {"architectures": [name], **decoder_hf(self), **own}


def decoder_settings(hf: HfConfig, *, kv_heads: int | None) -> dict[str, Any]:
    """Settings that LLaMA-like families share, as arguments of `LlamaConfig`."""
    heads = required(hf, "num_attention_heads")
    width = required(hf, "hidden_size")
    num_kv_heads = hf.get("num_key_value_heads", kv_heads) or heads
    require_divides(
        hf, "num_key_value_heads", "num_attention_heads", num_kv_heads, heads
    )
    return {
        "model_type": hf["model_type"],
        "vocab_size": required(hf, "vocab_size"),
        "width": width,
        "mlp_width": required(hf, "intermediate_size"),
        "num_layers": required(hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": hf.get("head_dim") or width // heads,
        "norm_epsilon": hf.get("rms_norm_eps", 1e-6),
        "rope": Rope.from_hf(hf),
        "tie_word_embeddings": bool(hf.get("tie_word_embeddings", False)),
        "initializer_range": hf.get("initializer_range", 0.02),
    }


def decoder_hf(config: LlamaConfig) -> dict[str, object]:
    """Settings that LLaMA-like families share, as config.json has them."""
    return {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        **config.rope.to_hf(),
        **special_ids(config),
    }


class GatedMlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, inner = config.width, config.mlp_width
        bias, stddev = config.mlp_bias, config.initializer_range
        self.gate = linear(width, inner, bias=bias, stddev=stddev, rngs=rngs)
        self.up = linear(width, inner, bias=bias, stddev=stddev, rngs=rngs)
        self.down = linear(inner, width, bias=bias, stddev=stddev, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        width, epsilon = config.width, config.norm_epsilon
        self.attention_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.attention = Attention(
            config,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
            rope=config.rope,
            head_norm_epsilon=config.head_norm_epsilon,
            rngs=rngs,
        )
        self.mlp_norm = nnx.RMSNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = GatedMlp(config, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Bool[Array, "#B 1 T S"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], NewKeysAndValues]:
        attended, new = self.attention(
            self.attention_norm(x_BTD), positions, mask, cache
        )
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), new


class EmbedAndNorm(nnx.Module):
    """Token embedding, final norm, and an untied head's matrix."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        stddev = config.initializer_range
        sizes = (config.vocab_size, config.width)
        self.embed = Embed(*sizes, stddev=stddev, rngs=rngs)
        self.final_norm = nnx.RMSNorm(
            config.width, epsilon=config.norm_epsilon, rngs=rngs
        )
        if not config.tie_word_embeddings:
            # [V, D] like the embedding, so that `unembed` treats both the same.
            self.head = Embed(*sizes, stddev=stddev, rngs=rngs)

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        del positions  # the attention of each layer rotates by them
        return self.embed(tokens)

    def apply_final_norm(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.final_norm(x_BTD)


def key_rows(config: LlamaConfig) -> tuple[KeyRow, ...]:
    """Rows between our params and the tensors of a Hugging Face file."""
    rows = [
        KeyRow("embed/embedding", "embed_tokens.weight"),
        KeyRow("final_norm/scale", "norm.weight"),
        KeyRow("layers/attention_norm/scale", "layers.{}.input_layernorm.weight"),
        KeyRow("layers/mlp_norm/scale", "layers.{}.post_attention_layernorm.weight"),
    ]
    if not config.tie_word_embeddings:
        rows.append(KeyRow("head/embedding", "lm_head.weight"))
    for ours, theirs, bias in (
        ("attention/query", "self_attn.q_proj", config.qkv_bias),
        ("attention/key", "self_attn.k_proj", config.qkv_bias),
        ("attention/value", "self_attn.v_proj", config.qkv_bias),
        ("attention/output", "self_attn.o_proj", config.output_bias),
        ("mlp/gate", "mlp.gate_proj", config.mlp_bias),
        ("mlp/up", "mlp.up_proj", config.mlp_bias),
        ("mlp/down", "mlp.down_proj", config.mlp_bias),
    ):
        path, name = f"layers/{ours}", f"layers.{{}}.{theirs}"
        rows.append(KeyRow(f"{path}/kernel", f"{name}.weight", transposed=True))
        if bias:
            rows.append(KeyRow(f"{path}/bias", f"{name}.bias"))
    if config.head_norm_epsilon is not None:
        for ours, theirs in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
            path, name = f"layers/attention/{ours}", f"layers.{{}}.self_attn.{theirs}"
            rows.append(KeyRow(f"{path}/scale", f"{name}.weight"))
    return tuple(rows)


def partition_rules(config: LlamaConfig) -> tuple[tuple[str, P], ...]:
    """Matrices are split over fsdp along D, over tensor as in Megatron-LM."""
    rules = [
        (r"(embed|head)/embedding$", P("tensor", "fsdp")),
        (r"attention/(query|key|value)/kernel$", P(None, "fsdp", "tensor")),
        (r"mlp/(gate|up)/kernel$", P(None, "fsdp", "tensor")),
        (r"(attention/output|mlp/down)/kernel$", P(None, "tensor", "fsdp")),
        (r"norm/scale$", P()),
    ]
    if config.qkv_bias or config.output_bias or config.mlp_bias:
        rules.append((r"/bias$", P()))
    return tuple(rules)


ARCHITECTURE = Architecture(
    embed_and_norm=EmbedAndNorm,
    block=Block,
    key_rows=key_rows,
    partition_rules=partition_rules,
    prefixes=("model.",),
    ignored=(r"^(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq$",),
)
