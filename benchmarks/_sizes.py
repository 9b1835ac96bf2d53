"""Sizes of the models and batches that the bounds are about."""

import argparse
from typing import NamedTuple

import numpy as np


class Size(NamedTuple):
    """Size of a GPT-2."""

    layers: int
    width: int
    heads: int


class Models(NamedTuple):
    """Sizes of a student, of its teacher and of their vocabulary."""

    student: Size
    teacher: Size
    vocabulary: int


class Batch(NamedTuple):
    """Rows of one step.

    Attributes:
      rows: rows of a micro-batch.
      prompt: tokens of a prompt.
      new: tokens that the student writes after each prompt.
      parts: micro-batches of a step.
    """

    rows: int
    prompt: int
    new: int
    parts: int = 1

    @property
    def size(self) -> int:
        """Rows of the whole step."""
        return self.rows * self.parts

    @property
    def width(self) -> int:
        """Tokens of a row."""
        return self.prompt + self.new


def models(options: argparse.Namespace) -> Models:
    """A student of 30 million parameters and a teacher of 124 million, or tiny ones."""
    if options.tiny:
        return Models(Size(1, 32, 2), Size(2, 64, 2), 1000)
    return Models(Size(6, 384, 6), Size(12, 768, 12), 50_257)


def random_tokens(options: argparse.Namespace, rows: int, length: int) -> np.ndarray:
    """Tokens that are equal on both sides, without padding and end-of-sequence ids."""
    vocabulary = models(options).vocabulary
    return np.random.default_rng(0).integers(2, vocabulary, (rows, length), np.int64)
