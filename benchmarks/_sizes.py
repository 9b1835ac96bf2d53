"""The models of the bounds: GPT-2 with random weights."""

import argparse
from typing import NamedTuple

import numpy as np


class Size(NamedTuple):
    """Of a GPT-2."""

    layers: int
    width: int
    heads: int


class Models(NamedTuple):
    """What is distilled into what."""

    student: Size
    teacher: Size
    vocabulary: int


def models(options: argparse.Namespace) -> Models:
    """30 million parameters from 124 million; or next to none."""
    if options.tiny:
        return Models(Size(1, 32, 2), Size(2, 64, 2), 1000)
    return Models(Size(6, 384, 6), Size(12, 768, 12), 50_257)


def random_tokens(options: argparse.Namespace, rows: int, length: int) -> np.ndarray:
    """The same on both sides; without the ids of padding and end of sequence."""
    vocabulary = models(options).vocabulary
    return np.random.default_rng(0).integers(2, vocabulary, (rows, length), np.int64)
