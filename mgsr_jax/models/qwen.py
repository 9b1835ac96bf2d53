"""Qwen2, Qwen2.5 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388).

Both use LLaMA's block. Qwen2 adds biases to queries, keys and values; Qwen3 normalises
each head of queries and keys.
"""

import dataclasses

from mgsr_jax.models import llama
from mgsr_jax.models._model_config import (
    HfConfig,
    require_supported,
    required,
    token_ids,
)

ARCHITECTURE = llama.ARCHITECTURE


@dataclasses.dataclass(frozen=True, kw_only=True)
class QwenConfig(llama.LlamaConfig):
    """Config of Qwen2, Qwen2.5 and Qwen3."""

    @property
    def head_norm_epsilon(self) -> float | None:
        return self.norm_epsilon if self.model_type == "qwen3" else None

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "QwenConfig":
        """Read a config.json of model_type qwen2 or qwen3.

        Raises:
          ValueError: a missing key, or a setting that is not implemented, by name.
        """
        require_supported(hf, hidden_act=("silu", "swish"))
        settings = llama.decoder_settings(hf, kv_heads=32)
        qwen3 = hf["model_type"] == "qwen3"
        if qwen3:
            settings["head_dim"] = hf.get("head_dim") or 128
        bias = bool(hf.get("attention_bias", False))
        return cls(
            **settings,
            max_length=hf.get("max_position_embeddings", 32768),
            qkv_bias=bias if qwen3 else True,
            output_bias=bias and qwen3,
            mlp_bias=False,
            windows=_windows(hf),
            bos_token_id=token_ids(hf, "bos_token_id"),
            eos_token_id=token_ids(hf, "eos_token_id"),
            pad_token_id=token_ids(hf, "pad_token_id"),
        )

    def to_hf(self) -> dict[str, object]:
        window = next((w for w in self.windows or () if w is not None), None)
        own: dict[str, object] = {
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
    """Window of each layer.

    `layer_types` names the layers with a window; in older files these are the layers
    from number `max_window_layers` on.
    """
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
