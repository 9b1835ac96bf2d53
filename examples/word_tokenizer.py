"""A tokenizer for a small vocabulary: one token per word, bytes for everything else."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers


def write(
    folder: str | Path,
    pieces: Iterable[str],
    *,
    end: str,
    parts: Sequence[str] = (),
    special: Sequence[str] = (),
    chat_template: str | None = None,
) -> Path:
    """Write a tokenizer that transformers loads.

    It is byte-level BPE without merges. A word that is not in `pieces` falls back to
    its bytes, so decoding restores every text exactly.

    Args:
      folder: created if it is missing.
      pieces: words that are one token; Ġ in front stands for the space before a word.
      end: special token that ends a response; it is also the padding.
      parts: constant texts that are one token.
      special: further special tokens.
      chat_template: the tokenizer's chat template.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {piece: i for i, piece in enumerate(dict.fromkeys([*alphabet, *pieces]))}
    made = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(part, normalized=False) for part in parts])
    made.add_special_tokens([end, *special])
    made.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder
