"""Qwen2, Qwen2.5 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388): LLaMA's block,
with biases on queries, keys and values, or with those normalised head by head."""

import dataclasses
from typing import Any

from mgsr_jax.models import llama
from mgsr_jax.models._attention import Rope
from mgsr_jax.models._hf_config import (
    HfConfig,
    TokenIds,
    require_supported,
    required,
    token_ids,
)

ARCHITECTURE = llama.ARCHITECTURE


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Sizes and settings; `windows` is the sliding window of every layer, if any."""

    vocab_size: int
    max_length: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "qwen2"
    norm_epsilon: float = 1e-6
    rope: Rope = Rope()
    tie_word_embeddings: bool = False
    qkv_bias: bool = True
    output_bias: bool = False
    windows: tuple[int | None, ...] | None = None
    initializer_range: float = 0.02
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None

    mlp_bias = False

    @property
    def head_norm_epsilon(self) -> float | None:
        return self.norm_epsilon if self.model_type == "qwen3" else None

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "QwenConfig":
        """From config.json of model_type qwen2 or qwen3.

        Raises:
          ValueError: a missing key, or a setting that is not implemented, by name.
        """
        require_supported(hf, hidden_act=("silu", "swish"))
        sizes = llama.decoder_sizes(hf, kv_heads=32)
        qwen3 = hf["model_type"] == "qwen3"
        if qwen3:
            sizes["head_dim"] = hf.get("head_dim") or 128
        bias = bool(hf.get("attention_bias", False))
        return cls(
            **sizes,
            max_length=hf.get("max_position_embeddings", 32768),
            qkv_bias=bias if qwen3 else True,
            output_bias=bias and qwen3,
            windows=_windows(hf),
            bos_token_id=token_ids(hf, "bos_token_id"),
            eos_token_id=token_ids(hf, "eos_token_id"),
            pad_token_id=token_ids(hf, "pad_token_id"),
        )

    def to_hf(self) -> dict[str, Any]:
        """config.json, for transformers."""
        window = next((w for w in self.windows or () if w is not None), None)
        own: dict[str, Any] = {
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "layer_types": [
                "full_attention" if w is None else "sliding_attention"
                for w in self.windows or (None,) * self.num_layers
            ],
        }
        if self.model_type == "qwen3":
            name, own["attention_bias"] = "Qwen3ForCausalLM", self.qkv_bias
        else:
            name = "Qwen2ForCausalLM"
        return {"architectures": [name], **llama.decoder_hf(self), **own}


def _windows(hf: HfConfig) -> tuple[int | None, ...] | None:
    """By `layer_types`; older files slide from `max_window_layers` on."""
    layers = required(hf, "num_hidden_layers")
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    if window is None:
        return None
    first = hf.get("max_window_layers", 28)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(layers)
    ]
    for kind in kinds:
        require_supported(
            {"model_type": hf["model_type"], "layer_types": kind},
            layer_types=("full_attention", "sliding_attention"),
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
