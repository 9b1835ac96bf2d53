"""Teacher caches: lookup of the data set's rows, and refusal of anything else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cached_teacher import (
    LENGTHS,
    ORIGIN,
    WIDTH,
    cache,
    data,
    log_softmax,
    pick,
    recipe,
    write,
)

from mgsr_jax import losses
from mgsr_jax.data import teacher_cache
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.losses import top_k_teacher
from mgsr_jax.rows import next_token_view


def wider(rows, width):
    """The same rows with more padding, which has arbitrary values."""
    padding = np.full((len(rows.lengths), width - rows.tokens.shape[1]), 7, np.int32)
    tokens = np.concatenate([rows.tokens, padding], axis=1)
    spans = np.concatenate([rows.span_ids, padding], axis=1)
    return dataclasses.replace(rows, tokens=tokens, span_ids=spans)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 6, tiny.VOCAB])
def test_lookup_returns_the_top_k_of_the_teachers_logits(tmp_path, top_k):
    """At the scored positions of `next_token_view`, for any order of the rows."""
    rows, logits = data()
    teacher = cache(tmp_path, top_k=top_k).lookup(rows)
    expected = top_k_teacher(logits, top_k)
    where = np.asarray(next_token_view(rows).where)
    assert where.sum() == sum(response for _, response in LENGTHS)
    for ours, theirs in zip(teacher, expected, strict=True):
        assert ours.shape == theirs.shape and not ours[~where].any()
        np.testing.assert_allclose(ours[where], theirs[where], rtol=2e-7)
    order = np.array([3, 0, 4, 0])
    shuffled = TeacherCache.open(tmp_path, ORIGIN).lookup(pick(wider(rows, 20), order))
    for ours, theirs in zip(shuffled, teacher, strict=True):
        np.testing.assert_array_equal(ours[:, : WIDTH - 1], theirs[order])
        assert not ours[:, WIDTH - 1 :].any()


@pytest.mark.slow
def test_losses_with_all_classes_equal_the_dense_losses(tmp_path):
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


def test_top_k_forward_kl_is_less_by_the_divergence_within_the_tail(tmp_path):
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


def test_the_manifest_has_the_mass_of_the_kept_classes(tmp_path):
    manifest = cache(tmp_path).manifest
    rows, logits = data()
    where = np.asarray(next_token_view(rows).where)
    top = np.sort(np.exp(log_softmax(logits[where])))[:, -6:]
    assert manifest.positions == where.sum()
    assert manifest.held_mass == pytest.approx(top.sum(-1).mean(), rel=1e-6)


def test_rows_that_fill_up_a_batch_are_zeros(tmp_path):
    rows, _ = data()
    filler = dataclasses.replace(
        rows, lengths=rows.prompt_lengths, example=np.full_like(rows.example, -1)
    )
    teacher = cache(tmp_path).lookup(filler)
    assert not any(part.any() for part in teacher)


def test_rows_that_the_teacher_did_not_read_are_refused(tmp_path):
    rows, _ = data()
    opened = cache(tmp_path)
    token = rows.tokens.copy()
    token[3, 1] += 1  # in the prompt
    longer = rows.prompt_lengths.copy()
    longer[3] += 1
    for wrong in (
        dataclasses.replace(rows, tokens=token),
        dataclasses.replace(rows, prompt_lengths=longer),
        dataclasses.replace(rows, example=rows.example[[0, 1, 2, 4, 3]]),
    ):
        with pytest.raises(ValueError, match="example . differs from the text .*order"):
            opened.lookup(wrong)
    beyond = dataclasses.replace(rows, example=rows.example + 1)
    with pytest.raises(ValueError, match="example"):
        opened.lookup(beyond)
    with pytest.raises(ValueError, match="example 5 is not among the 5"):
        opened.lookup(pick(beyond, [4]))
    generated = dataclasses.replace(rows, ground_truth=rows.example != 2)
    with pytest.raises(ValueError, match="got row 2 with a response of a model"):
        opened.lookup(generated)


@pytest.mark.parametrize("field", ["teacher", "teacher_dtype", "tokenizer", "data"])
def test_the_error_for_another_origin_names_only_the_difference(tmp_path, field):
    cache(tmp_path)
    other = dataclasses.replace(ORIGIN, **{field: "other"})
    message = f"made from another {field} \\(expected other, got "
    with pytest.raises(ValueError, match=message) as error:
        TeacherCache.open(tmp_path, other)
    assert " and " not in str(error.value)


def test_the_error_for_another_origin_names_every_difference(tmp_path):
    cache(tmp_path)
    other = dataclasses.replace(ORIGIN, teacher="other", data="other")
    with pytest.raises(ValueError, match="another teacher .* and another data "):
        TeacherCache.open(tmp_path, other)


def test_an_unfinished_cache_is_refused(tmp_path):
    settings = recipe()
    write(tmp_path, settings, numbers=[0, 1])
    with pytest.raises(FileNotFoundError, match="not finished"):
        TeacherCache.open(tmp_path, ORIGIN)
    with pytest.raises(ValueError, match=r"shard-00002.safetensors .* is damaged"):
        teacher_cache.finish(tmp_path, settings)


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="thesis.txt, which is not part"):
        teacher_cache.begin(tmp_path, recipe())
    with pytest.raises(FileExistsError, match="is a file"):
        teacher_cache.begin(tmp_path / "thesis.txt", recipe())


def test_a_resumed_cache_has_the_same_bytes(tmp_path):
    settings = recipe()
    cache(tmp_path / "at_once")
    resumed = write(tmp_path / "resumed", settings, numbers=[1])
    (resumed / ".shard-00000.safetensors").write_bytes(b"an unfinished file")
    assert teacher_cache.begin(resumed, settings) == [0, 2]
    write(resumed, settings)
    assert teacher_cache.begin(resumed, settings) == []
    teacher_cache.finish(resumed, settings)
    names = sorted(path.name for path in (tmp_path / "at_once").iterdir())
    assert names == ["manifest.json", *settings.shards]
    for name in names:
        expected = (tmp_path / "at_once" / name).read_bytes()
        assert (resumed / name).read_bytes() == expected
