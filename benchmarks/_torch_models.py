"""The peers' GPT-2, as transformers builds it from a configuration."""

from pathlib import Path
from typing import Any

import torch
from _sizes import Models, Size
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2(size: Size, vocabulary: int, *, seed: int, folder: Path) -> Any:
    """Random weights, written to `folder` too; no dropout, no end of sequence."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return model


def pair(sizes: Models, folder: Path) -> tuple[Any, Any]:
    """Student and teacher."""
    student = gpt2(sizes.student, sizes.vocabulary, seed=1, folder=folder / "student")
    teacher = gpt2(sizes.teacher, sizes.vocabulary, seed=2, folder=folder / "teacher")
    return student, teacher
