"""A small teacher cache, and the rows and logits that it was made from."""

import jax
import numpy as np
import tiny

from mgsr_jax.data import teacher_cache
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.data.teacher_manifest import Origin, Recipe
from mgsr_jax.data.teacher_shards import CachedExample, write_shard
from mgsr_jax.losses import top_k_teacher

ORIGIN = Origin(teacher="t", teacher_dtype="float32", tokenizer="k", data="d")
LENGTHS = ((2, 5), (1, 9), (3, 1), (4, 6), (2, 2))
"""(prompt, response) of each example."""
WIDTH = 14


def recipe(**changes):
    settings = dict(
        origin=ORIGIN,
        examples=len(LENGTHS),
        vocab_size=tiny.VOCAB,
        top_k=6,
        logits_dtype="float32",
        examples_per_shard=2,
    )
    return Recipe(**settings | changes)


def data():
    """The rows of all examples, and dense logits aligned with their next tokens."""
    rows = jax.tree.map(np.asarray, tiny.complete(LENGTHS, width=WIDTH))
    shape = (len(LENGTHS), WIDTH - 1, tiny.VOCAB)
    return rows, 3 * np.random.default_rng(0).normal(size=shape).astype(np.float32)


def examples(top_k):
    """Examples to be written; their scored positions are sliced from the logits."""
    rows, logits = data()
    for b, (prompt, response) in enumerate(LENGTHS):
        scored = logits[b, prompt - 1 : prompt + response - 1]
        teacher = jax.tree.map(np.asarray, top_k_teacher(scored, top_k))
        yield CachedExample(rows.tokens[b, : prompt + response], prompt, teacher)


def write(folder, settings, numbers=None):
    """Write the missing files, or those with the given numbers."""
    every = list(examples(settings.top_k))
    missing = teacher_cache.begin(folder, settings)
    for number in missing if numbers is None else numbers:
        of_shard = [every[i] for i in settings.shard_examples(number)]
        write_shard(folder, settings, number, of_shard)
    return folder


def cache(folder, **changes):
    """Write all files and the manifest, and open the cache."""
    settings = recipe(**changes)
    teacher_cache.finish(write(folder, settings), settings)
    return TeacherCache.open(folder, ORIGIN)


def pick(rows, index):
    return jax.tree.map(lambda leaf: leaf[index], rows)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
