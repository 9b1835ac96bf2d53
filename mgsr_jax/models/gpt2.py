"""GPT-2 (Radford et al., 2019): learned position embeddings, LayerNorm first."""

import dataclasses

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


def activation(name: str, x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Apply the activation that transformers calls `name`.

    Raises:
      ValueError: the activation is not implemented.
    """
    match name:
        case "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast":
            return jax.nn.gelu(x, approximate=True)
        case "gelu":
            return jax.nn.gelu(x, approximate=False)
        case "relu":
            return jax.nn.relu(x)
    raise ValueError(f"activation {name!r} is not implemented; expected {ACTIVATIONS}")


ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpt2Config(ModelConfig):
    """GPT-2's config.

    Attributes:
      activation: activation of the MLP, as transformers names it.
      norm_epsilon: added to the variance in LayerNorm.
    """

    activation: str
    norm_epsilon: float

    @classmethod
    def from_hf(cls, hf: HfConfig) -> "Gpt2Config":
        """Read a config.json of model_type gpt2.

        Raises:
          ValueError: a missing key, or a setting that is not implemented, by name.
        """
        require_supported(
            hf,
            activation_function=ACTIVATIONS,
            scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
            reorder_and_upcast_attn=(False,),
            add_cross_attention=(False,),
        )
        width, heads = required(hf, "n_embd"), required(hf, "n_head")
        require_divides(hf, "n_head", "n_embd", heads, width)
        return cls(
            vocab_size=required(hf, "vocab_size"),
            max_length=required(hf, "n_positions"),
            width=width,
            mlp_width=hf.get("n_inner") or 4 * width,
            num_layers=required(hf, "n_layer"),
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
            activation=hf.get("activation_function", "gelu_new"),
            norm_epsilon=hf.get("layer_norm_epsilon", 1e-5),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", True)),
            initializer_range=hf.get("initializer_range", 0.02),
            bos_token_id=token_ids(hf, "bos_token_id", 50256),
            eos_token_id=token_ids(hf, "eos_token_id", 50256),
            pad_token_id=token_ids(hf, "pad_token_id"),
        )

    def to_hf(self) -> dict[str, object]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": self.vocab_size,
            "n_positions": self.max_length,
            "n_ctx": self.max_length,
            "n_embd": self.width,
            "n_inner": self.mlp_width,
            "n_layer": self.num_layers,
            "n_head": self.num_heads,
            "activation_function": self.activation,
            "layer_norm_epsilon": self.norm_epsilon,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            **special_ids(self),
        }


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm whose variance is computed in a second pass.

    The faster E[x^2] - E[x]^2 loses all digits where the mean is far from zero.
    """
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class Mlp(nnx.Module):
    """down(activation(up(x)))."""

    def __init__(
        self, config: ModelConfig, *, activation: str, bias: bool, rngs: nnx.Rngs
    ):
        width, inner, stddev = config.width, config.mlp_width, config.initializer_range
        self.activation = activation
        self.up = linear(width, inner, bias=bias, stddev=stddev, rngs=rngs)
        self.down = linear(inner, width, bias=bias, stddev=stddev, rngs=rngs)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(activation(self.activation, self.up(x_BTD)))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        width, epsilon = config.width, config.norm_epsilon
        self.attention_norm = layer_norm(width, epsilon, rngs)
        self.attention = Attention(config, qkv_bias=True, output_bias=True, rngs=rngs)
        self.mlp_norm = layer_norm(width, epsilon, rngs)
        self.mlp = Mlp(config, activation=config.activation, bias=True, rngs=rngs)

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
    """Token and position embeddings, final norm, and an untied head's matrix."""

    def __init__(self, config: Gpt2Config, *, rngs: nnx.Rngs):
        stddev = config.initializer_range
        sizes = (config.vocab_size, config.width)
        self.embed = Embed(*sizes, stddev=stddev, rngs=rngs)
        self.positions = Embed(
            config.max_length, config.width, stddev=stddev, rngs=rngs
        )
        self.final_norm = layer_norm(config.width, config.norm_epsilon, rngs)
        if not config.tie_word_embeddings:
            self.head = Embed(*sizes, stddev=stddev, rngs=rngs)

    def embed_tokens(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        # A finished row's position may exceed the table; its output is discarded.
        return self.embed(tokens) + self.positions.clipped(positions)

    def apply_final_norm(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.final_norm(x_BTD)


def key_rows(config: Gpt2Config) -> tuple[KeyRow, ...]:
    """Rows between our params and a file's tensors; Conv1D stores [in, out]."""
    rows = [
        KeyRow("embed/embedding", "wte.weight"),
        KeyRow("positions/embedding", "wpe.weight"),
    ]
    if not config.tie_word_embeddings:
        rows.append(KeyRow("head/embedding", "lm_head.weight"))
    for ours, theirs in (
        ("final_norm", "ln_f"),
        ("layers/attention_norm", "h.{}.ln_1"),
        ("layers/mlp_norm", "h.{}.ln_2"),
    ):
        rows.append(KeyRow(f"{ours}/scale", f"{theirs}.weight"))
        rows.append(KeyRow(f"{ours}/bias", f"{theirs}.bias"))
    for ours, theirs, part, parts in (
        ("attention/query", "attn.c_attn", 0, 3),
        ("attention/key", "attn.c_attn", 1, 3),
        ("attention/value", "attn.c_attn", 2, 3),
        ("attention/output", "attn.c_proj", 0, 1),
        ("mlp/up", "mlp.c_fc", 0, 1),
        ("mlp/down", "mlp.c_proj", 0, 1),
    ):
        for leaf, tensor in (("kernel", "weight"), ("bias", "bias")):
            rows.append(
                KeyRow(
                    f"layers/{ours}/{leaf}",
                    f"h.{{}}.{theirs}.{tensor}",
                    part=part,
                    parts=parts,
                )
            )
    return tuple(rows)


def partition_rules(config: Gpt2Config) -> tuple[tuple[str, P], ...]:
    """Matrices are split over fsdp along D, over tensor as in Megatron-LM."""
    del config
    return (
        (r"(embed|head)/embedding$", P("tensor", "fsdp")),
        (r"positions/embedding$", P(None, "fsdp")),
        (r"(attention/(query|key|value)|mlp/up)/kernel$", P(None, "fsdp", "tensor")),
        (r"(attention/output|mlp/down)/kernel$", P(None, "tensor", "fsdp")),
        (r"/(scale|bias)$", P()),
    )


ARCHITECTURE = Architecture(
    embed_and_norm=EmbedAndNorm,
    block=Block,
    key_rows=key_rows,
    partition_rules=partition_rules,
    prefixes=("transformer.",),
    ignored=(r"^h\.\d+\.attn\.(masked_)?bias$",),
)
