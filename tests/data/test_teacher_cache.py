"""What is read is what was written; all else is refused by name."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mgsr_jax import losses
from mgsr_jax.data import teacher_cache
from mgsr_jax.data.teacher_cache import CachedExample, Origin, Recipe, TeacherCache
from mgsr_jax.losses import TopKTeacher, top_k_teacher
from mgsr_jax.rows import Rows, next_token_view

ORIGIN = Origin(teacher="t", teacher_dtype="float32", tokenizer="k", data="d")
LENGTHS = ((2, 5), (1, 9), (3, 1), (4, 6), (2, 2))
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


def data(seed=0):
    """The rows of every example, and dense logits aligned with their next tokens."""
    rows = jax.tree.map(np.asarray, tiny.complete(LENGTHS, width=WIDTH, seed=seed))
    shape = (len(LENGTHS), WIDTH - 1, tiny.VOCAB)
    return rows, 3 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def examples(rows, logits, top_k):
    """Each as it is written, its scored positions cut out by hand."""
    for b, (prompt, response) in enumerate(LENGTHS):
        own = logits[b, prompt - 1 : prompt + response - 1]
        teacher = jax.tree.map(np.asarray, top_k_teacher(own, top_k))
        yield CachedExample(rows.tokens[b, : prompt + response], prompt, teacher)


def write(folder, made, seed=0, numbers=None):
    found = list(examples(*data(seed), made.top_k))
    missing = teacher_cache.begin(folder, made)
    for number in missing if numbers is None else numbers:
        own = [found[i] for i in made.shard_examples(number)]
        teacher_cache.write_shard(folder, made, number, own)
    return folder


def cache(folder, **changes):
    made = recipe(**changes)
    teacher_cache.finish(write(folder, made), made)
    return TeacherCache.open(folder, ORIGIN)


def wider(rows, width):
    """The same rows with more padding, and nonsense in it."""
    padding = np.full((len(rows.lengths), width - rows.tokens.shape[1]), 7, np.int32)
    tokens = np.concatenate([rows.tokens, padding], axis=1)
    spans = np.concatenate([rows.span_ids, padding], axis=1)
    return dataclasses.replace(rows, tokens=tokens, span_ids=spans)


def pick(rows, index):
    return jax.tree.map(lambda leaf: leaf[index], rows)


@pytest.mark.parametrize("top_k", [1, 6, tiny.VOCAB])
def test_what_is_looked_up_is_the_top_of_the_teacher_s_logits(tmp_path, top_k):
    """At the scored positions of `next_token_view`, in any order of the rows."""
    rows, logits = data()
    found = cache(tmp_path, top_k=top_k).lookup(rows)
    want = top_k_teacher(logits, top_k)
    where = np.asarray(next_token_view(rows).where)
    assert where.sum() == sum(response for _, response in LENGTHS)
    for ours, theirs in zip(found, want, strict=True):
        assert ours.shape == theirs.shape and not ours[~where].any()
        np.testing.assert_allclose(ours[where], theirs[where], rtol=2e-7)
    order = np.array([3, 0, 4, 0])
    shuffled = TeacherCache.open(tmp_path, ORIGIN).lookup(pick(wider(rows, 20), order))
    for ours, theirs in zip(shuffled, found, strict=True):
        np.testing.assert_array_equal(ours[:, : WIDTH - 1], theirs[order])
        assert not ours[:, WIDTH - 1 :].any()


def test_a_file_with_an_example_too_few_is_not_written(tmp_path):
    """The next one would be taken for it."""
    tokens, said = np.arange(3), TopKTeacher(np.zeros((2, 6)), np.ones((2, 6)), None)
    with pytest.raises(ValueError, match="1 examples for shard-00000.*; expected"):
        one = [CachedExample(tokens, 1, said)]
        teacher_cache.write_shard(tmp_path, recipe(), 0, one)
    assert not list(tmp_path.iterdir())


def test_losses_on_the_whole_vocabulary_are_the_dense_ones(tmp_path):
    rows, logits = data()
    student = jax.random.normal(jax.random.key(0), logits.shape)
    where = next_token_view(rows).where
    teacher = cache(tmp_path, top_k=tiny.VOCAB).lookup(rows)
    np.testing.assert_allclose(
        losses.forward_kl_top_k(student, teacher, where=where),
        losses.forward_kl(student, jnp.asarray(logits), where=where),
        rtol=1e-5,
        atol=1e-6,
    )
    clip = losses.init_clip_network(jax.random.key(1), num_candidates=8)
    ours = losses.dac_kl(clip, student, teacher, where=where)
    theirs = losses.dac_kl(clip, student, jnp.asarray(logits), where=where)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_part_of_the_vocabulary_bounds_forward_kl_from_below(tmp_path):
    """By no more than the divergence within the tail, in float64."""
    rows, logits = data()
    student = np.random.default_rng(5).normal(size=logits.shape)
    where = np.asarray(next_token_view(rows).where)
    teacher = cache(tmp_path).lookup(rows)
    ours = losses.forward_kl_top_k(jnp.float32(student), teacher, where=where)[where]
    log_p, log_q = (log_softmax(z[where]) for z in (logits, student))
    order = np.argsort(-log_p)
    log_p, log_q = (np.take_along_axis(z, order, -1) for z in (log_p, log_q))
    p, q = np.exp(log_p), np.exp(log_q)
    tail_p, tail_q = p[:, 6:], q[:, 6:]
    inside = np.sum(
        tail_p
        * (
            np.log(tail_p / tail_p.sum(-1, keepdims=True))
            - np.log(tail_q / tail_q.sum(-1, keepdims=True))
        ),
        axis=-1,
    )
    dense = np.sum(p * (log_p - log_q), axis=-1)
    assert inside.max() > 0.01
    np.testing.assert_allclose(ours, dense - inside, atol=2e-6)


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


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
    # The share of the tail moves with the total alone, not with the K's rounding.
    np.testing.assert_allclose(tails[1], tails[0], rtol=distance.max() / 2048)


def test_logits_that_float16_cannot_hold_stay_finite(tmp_path):
    made = recipe(examples=1, top_k=3, logits_dtype="float16")
    teacher = TopKTeacher(
        logits=np.float32([[0.0, -1e5, -np.inf]]),
        indices=np.int32([[4, 2, 9]]),
        logsumexp=np.float32([0.0]),
    )
    tokens = np.int32([5, 6])
    teacher_cache.begin(tmp_path, made)
    teacher_cache.write_shard(tmp_path, made, 0, [CachedExample(tokens, 1, teacher)])
    teacher_cache.finish(tmp_path, made)
    rows = Rows(
        tokens=tokens[None],
        prompt_lengths=np.int32([1]),
        lengths=np.int32([2]),
        span_ids=np.int32([[-1, -1]]),
        example=np.int32([0]),
        ground_truth=np.array([True]),
    )
    found = TeacherCache.open(tmp_path, ORIGIN).lookup(rows)
    assert np.isfinite(found.logits).all() and found.logsumexp == 0
    np.testing.assert_array_equal(losses.held_mass(found), [[1.0]])


def test_a_large_vocabulary_has_wide_columns(tmp_path):
    made = recipe(vocab_size=100_000, examples=1)
    rows, logits = data()
    example = next(iter(examples(rows, logits, 6)))
    far = example.teacher._replace(indices=example.teacher.indices + 99_000)
    teacher_cache.begin(tmp_path, made)
    teacher_cache.write_shard(tmp_path, made, 0, [example._replace(teacher=far)])
    teacher_cache.finish(tmp_path, made)
    found = TeacherCache.open(tmp_path, ORIGIN).lookup(pick(rows, [0]))
    np.testing.assert_array_equal(found.indices[0, 1:6], far.indices)


def test_the_manifest_says_how_much_is_held(tmp_path):
    manifest = cache(tmp_path).manifest
    rows, logits = data()
    where = np.asarray(next_token_view(rows).where)
    top = np.sort(np.exp(log_softmax(logits[where])))[:, -6:]
    assert manifest.positions == where.sum()
    assert manifest.held_mass == pytest.approx(top.sum(-1).mean(), rel=1e-6)


def test_rows_that_fill_a_batch_up_are_not_looked_up(tmp_path):
    rows, _ = data()
    filler = dataclasses.replace(
        rows, lengths=rows.prompt_lengths, example=np.full_like(rows.example, -1)
    )
    found = cache(tmp_path).lookup(filler)
    assert not any(part.any() for part in found)


def test_rows_that_the_teacher_did_not_read_are_refused(tmp_path):
    rows, _ = data()
    found = cache(tmp_path)
    token = rows.tokens.copy()
    token[3, 1] += 1  # of the prompt
    longer = rows.prompt_lengths.copy()
    longer[3] += 1
    for wrong in (
        dataclasses.replace(rows, tokens=token),
        dataclasses.replace(rows, prompt_lengths=longer),
        dataclasses.replace(rows, example=rows.example[[0, 1, 2, 4, 3]]),
    ):
        with pytest.raises(ValueError, match="example . is not the text .*its order"):
            found.lookup(wrong)
    beyond = dataclasses.replace(rows, example=rows.example + 1)
    with pytest.raises(ValueError, match="example"):
        found.lookup(beyond)
    with pytest.raises(ValueError, match="example 5 is not among the 5"):
        found.lookup(pick(beyond, [4]))
    written = dataclasses.replace(rows, ground_truth=rows.example != 2)
    with pytest.raises(ValueError, match="row 2 was written by a model"):
        found.lookup(written)


@pytest.mark.parametrize("field", ["teacher", "teacher_dtype", "tokenizer", "data"])
def test_a_cache_of_another_origin_is_refused_by_what_differs(tmp_path, field):
    cache(tmp_path)
    other = dataclasses.replace(ORIGIN, **{field: "other"})
    message = f"made from another {field} \\(expected other, got "
    with pytest.raises(ValueError, match=message) as error:
        TeacherCache.open(tmp_path, other)
    assert " and " not in str(error.value)


def test_all_that_differs_is_named(tmp_path):
    cache(tmp_path)
    other = dataclasses.replace(ORIGIN, teacher="other", data="other")
    with pytest.raises(ValueError, match="another teacher .* and another data "):
        TeacherCache.open(tmp_path, other)


def test_an_unfinished_cache_is_refused(tmp_path):
    made = recipe()
    write(tmp_path, made, numbers=[0, 1])
    with pytest.raises(FileNotFoundError, match="not finished"):
        TeacherCache.open(tmp_path, ORIGIN)
    with pytest.raises(ValueError, match=r"shard-00002.safetensors .* is damaged"):
        teacher_cache.finish(tmp_path, made)


@pytest.mark.parametrize("change", [dict(top_k=5), dict(vocab_size=30)])
def test_files_of_another_recipe_are_not_gone_on_from(tmp_path, change):
    write(tmp_path, recipe(), numbers=[0])
    [name] = change
    with pytest.raises(ValueError, match=f"made from another {name} \\("):
        teacher_cache.begin(tmp_path, recipe(**change))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.txt, which is no part"):
        teacher_cache.begin(tmp_path, recipe())
    with pytest.raises(FileExistsError, match="is a file"):
        teacher_cache.begin(tmp_path / "thesis.txt", recipe())


def test_a_stopped_writing_goes_on_to_the_same_bytes(tmp_path):
    made = recipe()
    cache(tmp_path / "whole")
    halves = write(tmp_path / "halves", made, numbers=[1])
    (halves / ".shard-00000.safetensors").write_bytes(b"cut off while it was written")
    assert teacher_cache.begin(halves, made) == [0, 2]
    write(halves, made)
    assert teacher_cache.begin(halves, made) == []
    teacher_cache.finish(halves, made)
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == ["manifest.json", *made.shards]
    for name in names:
        whole = (tmp_path / "whole" / name).read_bytes()
        assert (halves / name).read_bytes() == whole


def test_a_truncated_file_is_named(tmp_path):
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


def test_every_flipped_byte_is_found_and_the_file_is_named(tmp_path):
    """All bytes but the header, of which a sample; at their reading at the latest."""
    rows, _ = data()
    want = cache(tmp_path).lookup(rows)
    file = tmp_path / "shard-00001.safetensors"
    good = file.read_bytes()
    body = 8 + int.from_bytes(good[:8], "little")
    for at in [*range(0, body, 41), *range(body, len(good), 7)]:
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        try:
            found = TeacherCache.open(tmp_path, ORIGIN).lookup(rows)
        except ValueError as error:
            assert re.search(r"shard-00001\.safetensors .* is damaged", str(error))
        else:  # the header's words for a resumed writing
            assert at < body
            jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda text: json.dumps(json.loads(text) | {"format": 0}),
        lambda text: json.dumps(json.loads(text) | {"shard_digests": ["00"]}),
        lambda text: json.dumps({"format": 1}),
        lambda text: "[]",
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(tmp_path, change):
    cache(tmp_path)
    file = tmp_path / "manifest.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        TeacherCache.open(tmp_path, ORIGIN)


@pytest.mark.parametrize("top_k", [0, tiny.VOCAB + 1])
def test_more_classes_than_tokens_are_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k={top_k}; expected 1 to 29"):
        recipe(top_k=top_k)
