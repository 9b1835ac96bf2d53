"""OPT (arXiv 2205.01068).

The 350M model differs: LayerNorm follows each part, and embeddings are projected.
"""

import dataclasses

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
from mgsr_jax.models.gpt2 import ACTIVATIONS, Mlp, layer_norm

POSITION_OFFSET = 2
"""Position p reads row p + 2 of the table, as in fairseq, where padding has id 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptConfig(ModelConfig):
    """OPT's config.

    Attributes:
      embed_width: size of a vector in the embedding and the head, E.
      activation: activation of the MLP, as transformers names it.
      norm_before: LayerNorm comes before attention and MLP, not after.
      has_final_norm: whether a LayerNorm follows the last layer.
      bias: whether the linear layers have biases.
    """

    embed_width: int
    activation: str
    norm_before: bool
    has_final_norm: bool
    bias: bool

    @property
    def is_projected(self) -> bool:
        """Whether projections connect the embedding and the layers."""
        return self.embed_width != self.width

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "OptConfig":
        """Read a config.json of model_type opt.

        Raises:
          ValueError: a missing key, or a setting that is not implemented, by name.
        """
        require_supported(
            hf,
            activation_function=("relu", *ACTIVATIONS),
            layer_norm_elementwise_affine=(True,),
        )
        width, heads = required(hf, "hidden_size"), required(hf, "num_attention_heads")
        require_divides(hf, "num_attention_heads", "hidden_size", heads, width)
        norm_before = bool(hf.get("do_layer_norm_before", True))
        return cls(
            vocab_size=required(hf, "vocab_size"),
            max_length=required(hf, "max_position_embeddings"),
            width=width,
            embed_width=hf.get("word_embed_proj_dim") or width,
            mlp_width=required(hf, "ffn_dim"),
            num_layers=required(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            activation=hf.get("activation_function", "relu"),
            norm_before=norm_before,
            has_final_norm=norm_before
            and not hf.get("_remove_final_layer_norm", False),
            bias=bool(hf.get("enable_bias", True)),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)),
            initializer_range=hf.get("init_std", 0.02),
            bos_token_id=token_ids(hf, "bos_token_id", 2),
            eos_token_id=token_ids(hf, "eos_token_id", 2),
            pad_token_id=token_ids(hf, "pad_token_id", 1),
        )

    def to_hf(self) -> dict[str, object]:
        return {
            "architectures": ["OPTForCausalLM"],
            "model_type": "opt",
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_length,
            "hidden_size": self.width,
            "word_embed_proj_dim": self.embed_width,
            "ffn_dim": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "activation_function": self.activation,
            "do_layer_norm_before": self.norm_before,
            "_remove_final_layer_norm": self.norm_before and not self.has_final_norm,
            "enable_bias": self.bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "init_std": self.initializer_range,
            **special_ids(self),
        }


class Block(nnx.Module):
    """GPT-2's block; with `norm_before` False, norm(x + part(x)) for both parts."""

    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs):
        bias = config.bias
        self.norm_before = config.norm_before
        self.attention_norm = layer_norm(config.width, 1e-5, rngs)
        self.attention = Attention(config, qkv_bias=bias, output_bias=bias, rngs=rngs)
        self.mlp_norm = layer_norm(config.width, 1e-5, rngs)
        self.mlp = Mlp(config, activation=config.activation, bias=bias, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "#B T"],
        mask: Bool[Array, "#B 1 T S"] | None,
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], NewKeysAndValues]:
        if not self.norm_before:
            attended, new = self.attention(x_BTD, positions, mask, cache)
            x_BTD = self.attention_norm(x_BTD + attended)
            return self.mlp_norm(x_BTD + self.mlp(x_BTD)), new
        attended, new = self.attention(
            self.attention_norm(x_BTD), positions, mask, cache
        )
        x_BTD = x_BTD + attended
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), new


class EmbedAndNorm(nnx.Module):
    """Embeddings, their projections, and the final norm if the model has one."""

    def __init__(self, config: OptConfig, *, rngs: nnx.Rngs):
        stddev = config.initializer_range
        self.is_projected = config.is_projected
        self.has_final_norm = config.has_final_norm
        sizes = (config.vocab_size, config.embed_width)
        self.embed = Embed(*sizes, stddev=stddev, rngs=rngs)
        self.positions = Embed(
            config.max_length + POSITION_OFFSET, config.width, stddev=stddev, rngs=rngs
        )
        if config.is_projected:
            outer, inner = config.embed_width, config.width
            self.project_in = linear(outer, inner, bias=False, stddev=stddev, rngs=rngs)
            self.project_out = linear(
                inner, outer, bias=False, stddev=stddev, rngs=rngs
            )
        if config.has_final_norm:
            self.final_norm = layer_norm(config.width, 1e-5, rngs)
        if not config.tie_word_embeddings:
            self.head = Embed(*sizes, stddev=stddev, rngs=rngs)

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        x = self.embed(tokens)
        if self.is_projected:
            x = self.project_in(x)
        # A finished row's position may exceed the table; its output is discarded.
        return x + self.positions.clipped(positions + POSITION_OFFSET)

    def apply_final_norm(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T E"]:
        if self.has_final_norm:
            x_BTD = self.final_norm(x_BTD)
        return self.project_out(x_BTD) if self.is_projected else x_BTD


def key_rows(config: OptConfig) -> tuple[KeyRow, ...]:
    """Rows between our params and the tensors of a Hugging Face file."""
    rows = [
        KeyRow("embed/embedding", "embed_tokens.weight"),
        KeyRow("positions/embedding", "embed_positions.weight"),
    ]
    if config.is_projected:
        for name in ("project_in", "project_out"):
            rows.append(KeyRow(f"{name}/kernel", f"{name}.weight", transposed=True))
    if not config.tie_word_embeddings:
        rows.append(KeyRow("head/embedding", "lm_head.weight"))
    norms = [
        ("layers/attention_norm", "layers.{}.self_attn_layer_norm"),
        ("layers/mlp_norm", "layers.{}.final_layer_norm"),
    ]
    if config.has_final_norm:
        norms.append(("final_norm", "final_layer_norm"))
    for ours, theirs in norms:
        rows.append(KeyRow(f"{ours}/scale", f"{theirs}.weight"))
        rows.append(KeyRow(f"{ours}/bias", f"{theirs}.bias"))
    for ours, theirs in (
        ("attention/query", "self_attn.q_proj"),
        ("attention/key", "self_attn.k_proj"),
        ("attention/value", "self_attn.v_proj"),
        ("attention/output", "self_attn.out_proj"),
        ("mlp/up", "fc1"),
        ("mlp/down", "fc2"),
    ):
        path, name = f"layers/{ours}", f"layers.{{}}.{theirs}"
        rows.append(KeyRow(f"{path}/kernel", f"{name}.weight", transposed=True))
        if config.bias:
            rows.append(KeyRow(f"{path}/bias", f"{name}.bias"))
    return tuple(rows)


def partition_rules(config: OptConfig) -> tuple[tuple[str, P], ...]:
    """Matrices are split over fsdp along D, over tensor as in Megatron-LM."""
    rules = [
        (r"(embed|head)/embedding$", P("tensor", "fsdp")),
        (r"positions/embedding$", P(None, "fsdp")),
        (r"(attention/(query|key|value)|mlp/up)/kernel$", P(None, "fsdp", "tensor")),
        (r"(attention/output|mlp/down)/kernel$", P(None, "tensor", "fsdp")),
        (r"/(scale|bias)$", P()),
    ]
    if config.is_projected:
        rules.append((r"project_in/kernel$", P(None, "fsdp")))
        rules.append((r"project_out/kernel$", P("fsdp", None)))
    return tuple(rules)


ARCHITECTURE = Architecture(
    embed_and_norm=EmbedAndNorm,
    block=Block,
    key_rows=key_rows,
    partition_rules=partition_rules,
    prefixes=("model.decoder.", "decoder."),
    ignored=(r"^version$",),
)
