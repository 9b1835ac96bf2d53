"""GPT-2 as transformers builds it from a configuration."""

from pathlib import Path

import torch
from _sizes import Models, Size
from transformers import GPT2Config, GPT2LMHeadModel


def gpt2(size: Size, vocabulary: int, *, seed: int, folder: Path) -> GPT2LMHeadModel:
    """A model with random weights, without dropout and end of sequence.

    The model is also saved to `folder`.
    """
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
    model = GPT2LMHeadModel(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return model


def pair(sizes: Models, folder: Path) -> tuple[GPT2LMHeadModel, GPT2LMHeadModel]:
    """Student and teacher, saved to `folder`."""
    student = gpt2(sizes.student, sizes.vocabulary, seed=1, folder=folder / "student")
    teacher = gpt2(sizes.teacher, sizes.vocabulary, seed=2, folder=folder / "teacher")
    return student, teacher
