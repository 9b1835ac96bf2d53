"""Causal language models as pure functions; `from_config` makes one."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mgsr_jax.models import gpt2, llama, opt, qwen
from mgsr_jax.models._architecture import Architecture, KeyRow
from mgsr_jax.models._language_model import LanguageModel
from mgsr_jax.models._model_config import HfConfig, ModelConfig
from mgsr_jax.typing import LAYERS

__all__ = ["LAYERS", "KeyRow", "LanguageModel", "from_config"]

_LLAMA = (llama.LlamaConfig, llama.ARCHITECTURE)
_QWEN = (qwen.QwenConfig, qwen.ARCHITECTURE)
_FAMILIES: dict[str, tuple[type[ModelConfig], Architecture]] = {
    "gpt2": (gpt2.Gpt2Config, gpt2.ARCHITECTURE),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": (opt.OptConfig, opt.ARCHITECTURE),
    "qwen2": _QWEN,
    "qwen3": _QWEN,
}


def from_config(source: str | os.PathLike[str] | HfConfig) -> LanguageModel:
    """The model that a Hugging Face folder, a config.json or its contents describe.

    config.json is read as plain JSON. No code of a checkpoint is ever run. The ids that
    end a text are those of config.json and of the folder's generation_config.json.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: config.json is not valid JSON, lacks a key, or has a model_type or a
        setting that is not implemented, by name.
    """
    hf = source if isinstance(source, Mapping) else _read_folder(Path(source))
    model_type = hf.get("model_type")
    if model_type not in _FAMILIES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; "
            f"expected one of {', '.join(sorted(_FAMILIES))}"
        )
    config, architecture = _FAMILIES[model_type]
    return LanguageModel(config.from_hf(hf), architecture)


def _read_folder(path: Path) -> HfConfig:
    """Contents of config.json, with the end ids that only generation_config.json has.

    Chat models end a turn with a token that config.json often does not name.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no config.json at {path}; give the folder of a Hugging Face checkpoint"
        )
    hf = _read_json(file)
    generation = file.parent / "generation_config.json"
    if not generation.is_file():
        return hf
    ids = _as_list(hf.get("eos_token_id"))
    more = _as_list(_read_json(generation).get("eos_token_id"))
    if not set(more) - set(ids):
        return hf
    return {**hf, "eos_token_id": list(dict.fromkeys([*ids, *more]))}


def _as_list(ids: int | list[int] | None) -> list[int]:
    """The ids under a key that holds one id, several or none."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def _read_json(file: Path) -> dict[str, Any]:
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}); download it again"
        ) from error
    if not isinstance(hf, dict):
        raise ValueError(
            f"{file} holds {type(hf).__name__}, expected an object; download it again"
        )
    return hf
