"""Reading a Hugging Face config.json as plain JSON: no remote code, no silent default.

A setting that changes what a model computes is understood or refused by name.
"""

from collections.abc import Mapping
from typing import Any

HfConfig = Mapping[str, Any]

TokenIds = int | tuple[int, ...] | None
"""One id, several (end-of-sequence), or none."""


def required(hf: HfConfig, key: str) -> Any:
    """The value of a key that has no default.

    Raises:
      ValueError: the key is missing.
    """
    if hf.get(key) is None:
        raise ValueError(
            f"config.json of model_type {hf.get('model_type')!r} has no {key!r}; "
            "add it, or save the checkpoint again with transformers"
        )
    return hf[key]


def require_supported(hf: HfConfig, **supported: tuple[Any, ...]) -> None:
    """Refuses settings that the model would silently compute otherwise.

    The first of the supported values is the default of a missing key.

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
    """Refuses a config whose key `part` does not divide its key `whole`.

    Raises:
      ValueError: it does not divide.
    """
    if parts < 1 or total % parts:
        raise ValueError(
            f"config.json of model_type {hf.get('model_type')!r} has {part} = {parts}, "
            f"which does not divide {whole} = {total}; correct one of them"
        )


def token_ids(hf: HfConfig, key: str, default: TokenIds = None) -> TokenIds:
    """The ids under `key`, hashable."""
    value = hf.get(key, default)
    return tuple(value) if isinstance(value, list) else value


def special_ids(config: Any) -> dict[str, Any]:
    """The bos, eos and pad ids of one of our configs as config.json has them."""
    ids = {
        key: getattr(config, key)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    return {k: list(v) if isinstance(v, tuple) else v for k, v in ids.items()}
