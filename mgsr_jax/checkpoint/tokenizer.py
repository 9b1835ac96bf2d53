"""Loads tokenizers from Hugging Face folders, only by classes that are named here."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import tokenizers
import transformers

from mgsr_jax.checkpoint.chat_template import (
    ChatTemplate,
    RenderingError,
    own_template,
)
from mgsr_jax.checkpoint.folder import refuse_pointer
from mgsr_jax.models import LanguageModel

Json = dict[str, Any]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files of a tokenizer, all of which are copied with a model."""

_SETTINGS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "model_max_length",
    "padding_side",
)
_SPECIAL = ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
_CLASSES = {
    "GPT2Tokenizer": transformers.GPT2Tokenizer,
    "Qwen2Tokenizer": transformers.Qwen2Tokenizer,
    "LlamaTokenizer": transformers.LlamaTokenizer,
}


def load_tokenizer(
    path: str | os.PathLike[str],
) -> transformers.PreTrainedTokenizerFast:
    """The folder's tokenizer, with its special tokens and chat template.

    Reads tokenizer.json, or vocab.json with merges.txt, or tokenizer.model. Never runs
    code of the checkpoint: transformers' `Auto*` classes are not used.

    Raises:
      FileNotFoundError: the folder has none of these files.
      ValueError: a file cannot be read, or names a tokenizer class that is not
        supported.
    """
    folder = Path(path)
    for name in FILES:
        if (folder / name).is_file():
            refuse_pointer(folder / name)
    config = _read_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        return _from_tokenizer_json(folder, config)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        default = "GPT2Tokenizer"
    elif (folder / "tokenizer.model").is_file():
        default = "LlamaTokenizer"
    else:
        raise FileNotFoundError(
            f"no tokenizer in {folder}; expected tokenizer.json, or vocab.json with "
            "merges.txt, or tokenizer.model"
        )
    name = config.get("tokenizer_class", default).removesuffix("Fast")
    if name not in _CLASSES:
        raise ValueError(
            f"{folder} has tokenizer_class {name!r}; expected one of "
            f"{', '.join(_CLASSES)}, or a folder with tokenizer.json"
        )
    return _CLASSES[name].from_pretrained(folder, local_files_only=True)


def tokenizer_fingerprint(tokenizer: transformers.PreTrainedTokenizerFast) -> str:
    """SHA-256 of the map from ids to tokens, with added tokens.

    It differs for different vocabularies, even for those of the same size.
    """
    pairs = sorted((id_, token) for token, id_ in tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def eos_ids(
    tokenizer: transformers.PreTrainedTokenizerFast,
    model: LanguageModel,
    template: ChatTemplate | None = None,
) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's, the model's, the chat template's.

    `models.from_config` reads the model's from config.json and generation_config.json.

    Args:
      tokenizer: gives its end-of-sequence.
      model: gives the end ids of its checkpoint.
      template: the chat template in use, whose turns end with a token. None: the
        tokenizer's own, which the model may have been trained with.
    """
    of_model = model.config.eos_token_id
    of_model = of_model if isinstance(of_model, tuple | list) else (of_model,)
    ids = (tokenizer.eos_token_id, *of_model, _end_of_turn(tokenizer, template))
    return tuple(sorted({i for i in ids if isinstance(i, int)}))


def _end_of_turn(
    tokenizer: transformers.PreTrainedTokenizerFast, template: ChatTemplate | None
) -> int | None:
    if template is not None:
        return template.end_id
    source = own_template(tokenizer)
    try:
        return None if source is None else ChatTemplate(tokenizer, source).end_id
    except RenderingError:  # a template with a fault, which nothing here uses
        return None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of `source`.

    Raises:
      FileNotFoundError: `source` has none.
    """
    present = [name for name in FILES if (source / name).is_file()]
    if not present:
        raise FileNotFoundError(
            f"no tokenizer files in {source}; expected one of {', '.join(FILES)}"
        )
    for name in present:
        shutil.copyfile(source / name, target / name)


def _from_tokenizer_json(
    folder: Path, config: Json
) -> transformers.PreTrainedTokenizerFast:
    config = {**_read_json(folder / "special_tokens_map.json"), **config}
    settings = {key: config[key] for key in _SETTINGS if config.get(key) is not None}
    for kind in _SPECIAL:
        if token := _text(config.get(f"{kind}_token")):
            settings[f"{kind}_token"] = token
    settings |= _tokens_by_id(folder, config)
    extra = config.get("extra_special_tokens") or config.get(
        "additional_special_tokens"
    )
    if isinstance(extra, list) and extra:
        settings["extra_special_tokens"] = [_text(token) for token in extra]
    if template := _chat_template(folder, config):
        settings["chat_template"] = template
    file = folder / "tokenizer.json"
    if "model" not in _read_json(file):
        raise ValueError(
            f"{file} is not a tokenizer: it has no key 'model'; download it again"
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **settings)


def _tokens_by_id(folder: Path, config: Json) -> dict[str, str]:
    """The bos and eos that only config.json has, as ids.

    The hub's GPT-2 folders rely on defaults of transformers' class and name no token.
    """
    model = _read_json(folder / "config.json")
    ids = {
        f"{kind}_token": model.get(f"{kind}_token_id")
        for kind in ("bos", "eos")
        if f"{kind}_token" not in config
    }
    if not any(isinstance(id_, int) for id_ in ids.values()):
        return {}
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = {
        name: tokenizer.id_to_token(id_)
        for name, id_ in ids.items()
        if isinstance(id_, int)
    }
    return {name: token for name, token in tokens.items() if token is not None}


def _chat_template(folder: Path, config: Json) -> str | dict[str, str] | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several templates by name
        return {entry["name"]: entry["template"] for entry in template}
    return template


def _text(token: str | Json | None) -> str | None:
    """Text of a token, which is stored as text or as a record with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _read_json(file: Path) -> Json:
    """The JSON object in a file; {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{file} is not valid JSON ({error}); download it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{file} holds {type(value).__name__}, expected an object; download it "
            "again"
        )
    return value
