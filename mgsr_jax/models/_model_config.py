"""The config that every family shares, and readers of a Hugging Face config.json.

config.json is read as plain JSON. A setting that changes what a model computes is
either implemented or refused by name; none is ignored.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

HfConfig = Mapping[str, Any]
"""Contents of a config.json."""

TokenIds = int | tuple[int, ...] | None
"""One id, several ids (end-of-sequence), or none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Sizes and settings that every family has.

    Attributes:
      vocab_size: tokens of the tokenizer that the model was trained with.
      max_length: largest number of positions in a row.
      width: size of a hidden state, D.
      mlp_width: inner size of the MLP, F.
      num_layers: number of layers, L.
      num_heads: query heads, N.
      num_kv_heads: key and value heads, K; divides `num_heads`.
      head_dim: size of one head, H.
      tie_word_embeddings: whether the head is the embedding.
      initializer_range: standard deviation of new kernels and embeddings.
      windows: sliding window of each layer (None: the layer sees the whole row); None
        if no layer has a window.
      bos_token_id, eos_token_id, pad_token_id: ids of the special tokens.
    """

    vocab_size: int
    max_length: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool
    initializer_range: float = 0.02
    windows: tuple[int | None, ...] | None = None
    bos_token_id: TokenIds = None
    eos_token_id: TokenIds = None
    pad_token_id: TokenIds = None

    @classmethod
    @abc.abstractmethod
    def from_hf(cls, hf: HfConfig) -> "ModelConfig":
        """Read the contents of a config.json.

        Raises:
          ValueError: a missing key, or a setting that is not implemented, by name.
        """

    @abc.abstractmethod
    def to_hf(self) -> dict[str, object]:
        """Contents of a config.json that transformers loads."""


def required(hf: HfConfig, key: str) -> int:
    """The number under a key that has no default.

    Raises:
      ValueError: the key is missing.
    """
    if hf.get(key) is None:
        raise ValueError(
            f"config.json of model_type {hf.get('model_type')!r} has no {key!r}; "
            "add it, or save the checkpoint again with transformers"
        )
    return hf[key]


def require_supported(hf: HfConfig, **supported: tuple[object, ...]) -> None:
    """Refuse settings that are not implemented.

    Args:
      hf: contents of a config.json.
      **supported: for each key the values that are implemented; the first one is the
        default of a missing key.

    Raises:
      ValueError: a setting with another value, by name.
    """
    for key, values in {"quantization_config": (None,), **supported}.items():
        value = hf.get(key, values[0])
        if value not in values:
            raise ValueError(
                f"config.json of model_type {hf.get('model_type')!r} has "
                f"{key} = {value!r}, which is not implemented; "
                f"expected {' or '.join(map(repr, values))}"
            )


def require_divides(
    hf: HfConfig, part: str, whole: str, parts: int, total: int
) -> None:
    """Refuse a config whose key `part` does not divide its key `whole`.

    Raises:
      ValueError: `parts` does not divide `total`.
    """
    if parts < 1 or total % parts:
        raise ValueError(
            f"config.json of model_type {hf.get('model_type')!r} has {part} = {parts}, "
            f"which does not divide {whole} = {total}; correct one of them"
        )


def token_ids(hf: HfConfig, key: str, default: TokenIds = None) -> TokenIds:
    """The ids under `key`; a list becomes a tuple, which is hashable."""
    value = hf.get(key, default)
    return tuple(value) if isinstance(value, list) else value


def special_ids(config: ModelConfig) -> dict[str, int | list[int] | None]:
    """The bos, eos and pad ids as config.json has them."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in ids.items()}
