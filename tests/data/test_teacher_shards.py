"""Files of a teacher cache: precision, and detection of damage."""

import re

import jax
import numpy as np
import pytest
from cached_teacher import ORIGIN, cache, data, examples, pick, recipe

from mgsr_jax import losses
from mgsr_jax.data import teacher_cache
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.data.teacher_shards import CachedExample, write_shard
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.rows import Rows, next_token_view


def test_a_file_with_a_missing_example_is_not_written(tmp_path):
    """Otherwise the next example would take its place."""
    teacher = TopKTeacher(np.zeros((2, 6)), np.ones((2, 6)), None)
    with pytest.raises(ValueError, match="got 1 examples for shard-00000.*, expected"):
        one = [CachedExample(np.arange(3), 1, teacher)]
        write_shard(tmp_path, recipe(), 0, one)
    assert not list(tmp_path.iterdir())


def test_float16_rounds_a_logit_by_its_distance_and_keeps_the_tail(tmp_path):
    rows, _ = data()
    where = np.asarray(next_token_view(rows).where)
    exact = cache(tmp_path / "exact").lookup(rows)
    rounded = cache(tmp_path / "rounded", logits_dtype="float16").lookup(rows)
    assert rounded.logits.dtype == np.float16
    distance = -exact.logits[where].astype(np.float64)
    error = np.abs(rounded.logits[where] - exact.logits[where])
    assert (error <= distance / 2048 + 2.0**-25).all() and error.max() > 1e-4
    tails = [
        1 - np.exp(np.float64(t.logits[where]) - t.logsumexp[where][:, None]).sum(-1)
        for t in (exact, rounded)
    ]
    # The share of the tail changes only with the total, not with each rounded logit.
    np.testing.assert_allclose(tails[1], tails[0], rtol=distance.max() / 2048)


def test_logits_beyond_the_range_of_float16_stay_finite(tmp_path):
    settings = recipe(examples=1, top_k=3, logits_dtype="float16")
    teacher = TopKTeacher(
        logits=np.float32([[0.0, -1e5, -np.inf]]),
        indices=np.int32([[4, 2, 9]]),
        logsumexp=np.float32([0.0]),
    )
    tokens = np.int32([5, 6])
    teacher_cache.begin(tmp_path, settings)
    write_shard(tmp_path, settings, 0, [CachedExample(tokens, 1, teacher)])
    teacher_cache.finish(tmp_path, settings)
    rows = Rows(
        tokens=tokens[None],
        prompt_lengths=np.int32([1]),
        lengths=np.int32([2]),
        span_ids=np.int32([[-1, -1]]),
        example=np.int32([0]),
        ground_truth=np.array([True]),
        earlier_responses=np.zeros((1, 2), bool),
    )
    stored = TeacherCache.open(tmp_path, ORIGIN).lookup(rows)
    assert np.isfinite(stored.logits).all() and stored.logsumexp == 0
    np.testing.assert_array_equal(losses.held_mass(stored), [[1.0]])


def test_a_vocabulary_beyond_uint16_has_int32_indices(tmp_path):
    settings = recipe(vocab_size=100_000, examples=1)
    example = next(examples(6))
    far = example.teacher._replace(indices=example.teacher.indices + 99_000)
    teacher_cache.begin(tmp_path, settings)
    write_shard(tmp_path, settings, 0, [example._replace(teacher=far)])
    teacher_cache.finish(tmp_path, settings)
    rows, _ = data()
    stored = TeacherCache.open(tmp_path, ORIGIN).lookup(pick(rows, [0]))
    np.testing.assert_array_equal(stored.indices[0, 1:6], far.indices)


def test_a_truncated_or_missing_file_is_named(tmp_path):
    cache(tmp_path)
    file = tmp_path / "shard-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for read in (
        lambda: TeacherCache.open(tmp_path, ORIGIN),
        lambda: teacher_cache.begin(tmp_path, recipe()),
    ):
        with pytest.raises(ValueError, match=r"shard-00001.safetensors .* is damaged"):
            read()
    file.unlink()
    with pytest.raises(ValueError, match=r"shard-00001.safetensors .* is damaged"):
        TeacherCache.open(tmp_path, ORIGIN)
    assert teacher_cache.begin(tmp_path, recipe()) == [1]


def test_every_flipped_byte_is_detected_and_the_file_is_named(tmp_path):
    """Flips bytes of the body and of the header, one at a time."""
    rows, _ = data()
    expected = cache(tmp_path).lookup(rows)
    file = tmp_path / "shard-00001.safetensors"
    good = file.read_bytes()
    body = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, body, 41), *range(body, len(good), 7)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        try:
            stored = TeacherCache.open(tmp_path, ORIGIN).lookup(rows)
        except ValueError as error:
            assert re.search(r"shard-00001\.safetensors .* is damaged", str(error))
        else:  # a part of the header that only a resumed command reads
            assert at < body
            jax.tree.map(np.testing.assert_array_equal, stored, expected)
