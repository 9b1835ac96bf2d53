"""The compiled rollout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mgsr_jax import models
from mgsr_jax.decoding.decode import Decoding, generate
from mgsr_jax.decoding.sampling import sample_keys
from mgsr_jax.rollout import make_rollout
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import NO_SPAN, next_token_view
from mgsr_jax.sharding import make_mesh, put_batch

EOS = 2
INTERVENTIONS = {
    "none": {},
    "scrg": {},
    "skd": dict(accept_top_k=6, draft_tokens=3),
    "adaswitch": dict(switch_ratio=1.2, switch_window=2),
}
MODEL = models.from_config(
    {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 16,
        "initializer_range": 0.5,
    }
)
ROWS = tiny.complete([(2, 5), (1, 9), (3, 1), (4, 6), (10, 2)], width=12)


@pytest.fixture(scope="module")
def pair():
    init = jax.jit(MODEL.init)
    return init(jax.random.key(0)), init(jax.random.key(1))


def roll(config, pair, rows=ROWS, seed=5, horizon=None):
    rollout = make_rollout(MODEL, MODEL, config, eos_ids=(EOS,), vocab_size=29)
    results = jax.device_get(rollout(*pair, (rows,), jax.random.key(seed), horizon))
    (samples,), (info,), (teacher_hidden,) = results
    assert (teacher_hidden is None) == (config.intervention == "none")
    return samples, info


def assert_well_formed(rows):
    """Prompts untouched, a response each, nothing behind its end."""
    np.testing.assert_array_equal(rows.prompt_lengths, ROWS.prompt_lengths)
    np.testing.assert_array_equal(rows.example, ROWS.example)
    assert not rows.ground_truth.any() and (rows.span_ids == NO_SPAN).all()
    assert (rows.lengths > rows.prompt_lengths).all() and (rows.lengths <= 12).all()
    for b, (start, end) in enumerate(
        zip(rows.prompt_lengths, rows.lengths, strict=True)
    ):
        np.testing.assert_array_equal(rows.tokens[b, :start], ROWS.tokens[b, :start])
        response = rows.tokens[b, start:end].tolist()
        assert EOS not in response[:-1] and max(response) < 29
        assert end == 12 or response[-1] == EOS
        assert not rows.tokens[b, end:].any()


@pytest.mark.slow
def test_without_an_intervention_the_samples_are_the_student_s(pair):
    rows, info = roll(RolloutConfig("on", intervention="none"), pair)
    assert_well_formed(rows)
    assert not info.teacher_wrote.any() and not info.teacher_scored.any()
    written = rows.lengths - rows.prompt_lengths
    np.testing.assert_array_equal(info.student_generated, written)
    want = generate(
        MODEL,
        pair[0],
        ROWS,
        key=jax.random.key(5),
        decoding=Decoding(12, (EOS,), vocab_size=29),
    )
    np.testing.assert_array_equal(rows.lengths, want.lengths)
    for b, end in enumerate(rows.lengths):
        np.testing.assert_array_equal(rows.tokens[b, :end], want.tokens[b, :end])


@pytest.mark.slow
def test_a_round_corrects_one_token_and_keeps_what_stands_before_it(pair):
    before, _ = roll(RolloutConfig("on", intervention="none"), pair)
    rows, info = roll(RolloutConfig("on", rounds=1), pair)
    assert_well_formed(rows)
    assert info.teacher_wrote.any(axis=1).sum() >= 3
    assert (info.teacher_wrote.sum(axis=1) <= 1).all()
    for b, wrote in enumerate(info.teacher_wrote):
        j = np.argmax(wrote)
        if not wrote.any():
            np.testing.assert_array_equal(rows.tokens[b], before.tokens[b])
            continue
        assert rows.prompt_lengths[b] <= j < before.lengths[b]
        np.testing.assert_array_equal(rows.tokens[b, :j], before.tokens[b, :j])
        assert rows.tokens[b, j] != before.tokens[b, j]


@pytest.mark.slow
def test_a_teacher_that_is_the_student_agrees_with_its_greedy_choices(pair):
    """temperature 0 and argmax: nothing to correct."""
    config = RolloutConfig("on", rounds=1, temperature=0.0, teacher_token="argmax")
    rows, info = roll(config, (pair[0], pair[0]))
    assert_well_formed(rows)
    assert not info.teacher_wrote.any()


@pytest.mark.slow
def test_a_sample_is_its_example_s_wherever_the_row_stands(pair):
    config = RolloutConfig("on", rounds=1)
    rows, _ = roll(config, pair)
    order = np.array([3, 0, 4, 2, 1])
    shuffled = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], ROWS)
    moved, _ = roll(config, pair, rows=shuffled)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), moved, rows)
    other, _ = roll(config, pair, seed=6)
    assert (other.tokens != rows.tokens).any()
    renamed = dataclasses.replace(ROWS, example=ROWS.example + 100)
    assert (roll(config, pair, rows=renamed)[0].tokens != rows.tokens).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scrg", "skd", "adaswitch"])
def test_micro_batches_that_share_the_decoder_have_the_samples_of_one_batch(pair, name):
    rows = jax.tree.map(lambda x: np.concatenate([x, x, x[:2]]), ROWS)
    rows = dataclasses.replace(rows, example=np.arange(12, dtype=np.int32))
    settings = INTERVENTIONS[name] | (dict(rounds=2) if name == "scrg" else {})
    config = RolloutConfig("on", intervention=name, **settings)
    want, want_info = roll(config, pair, rows=rows)
    config = dataclasses.replace(config, decode_rows=3)
    rollout = make_rollout(MODEL, MODEL, config, eos_ids=(EOS,), vocab_size=29)
    parts = tuple(
        jax.tree.map(lambda x, i=i: x[3 * i : 3 * i + 3], rows) for i in range(4)
    )
    samples, infos, teacher_hidden = jax.device_get(
        rollout(*pair, parts, jax.random.key(5))
    )
    for i in range(4):
        hidden, _ = MODEL.forward(pair[1], jnp.asarray(samples[i].tokens))
        for b, length in enumerate(samples[i].lengths.tolist()):
            np.testing.assert_allclose(
                teacher_hidden[i][b, : length - 1], hidden[b, : length - 1], atol=1e-5
            )
        here = slice(3 * i, 3 * i + 3)
        jax.tree.map(
            np.testing.assert_array_equal,
            samples[i],
            jax.tree.map(lambda x, here=here: x[here], want),
        )
        for got, whole in zip(infos[i], want_info, strict=True):
            np.testing.assert_allclose(got, whole[here], rtol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "mesh", "micro_batches", "decode_rows"),
    [
        ("scrg", (1, 1), 4, None),
        ("scrg", (1, 1), 2, 5),
        ("scrg", (1, 8), 2, None),
        ("scrg", (2, 4), 1, 8),
        ("none", (2, 4), 1, 8),
        ("skd", (2, 4), 1, 8),
        ("adaswitch", (2, 4), 1, 8),
    ],
)
def test_samples_do_not_depend_on_how_a_step_is_divided(
    pair, name, mesh, micro_batches, decode_rows
):
    rows = jax.tree.map(lambda x: np.concatenate([x, x, x, x[:1]]), ROWS)
    rows = dataclasses.replace(rows, example=np.arange(16, dtype=np.int32))
    config = RolloutConfig("on", intervention=name, **INTERVENTIONS[name])
    want, want_info = roll(config, pair, rows=rows)
    config = dataclasses.replace(config, decode_rows=decode_rows)
    student = dataclasses.replace(MODEL, split_decoder=True)
    rollout = make_rollout(student, MODEL, config, eos_ids=(EOS,), vocab_size=29)
    parts = [
        jax.tree.map(lambda x, i=i: np.split(x, micro_batches)[i], rows)
        for i in range(micro_batches)
    ]
    devices = jax.devices()[: mesh[0] * mesh[1]]
    with jax.set_mesh(mesh := make_mesh(*mesh, devices=devices)):
        placed = tuple(put_batch(mesh, part) for part in parts)
        samples, infos, _ = jax.device_get(rollout(*pair, placed, jax.random.key(5)))
    got, info = (
        jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in (samples, infos)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    for field, want_field in zip(info, want_info, strict=True):
        np.testing.assert_allclose(field, want_field, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "name"),
    [
        ((1, 1), "scrg"),
        ((2, 2), "scrg"),
        pytest.param((2, 2), "skd", marks=pytest.mark.exhaustive),
        pytest.param((2, 2), "adaswitch", marks=pytest.mark.exhaustive),
    ],
)
def test_several_samples_are_rollouts_with_keys_of_their_own(pair, mesh, name):
    """All parts of the first sample, then of the second, on any mesh."""
    rows = jax.tree.map(lambda x: np.concatenate([x, x[:3]]), ROWS)
    rows = dataclasses.replace(rows, example=np.arange(8, dtype=np.int32))
    config = RolloutConfig("on", intervention=name, **INTERVENTIONS[name])
    one, three = (
        make_rollout(
            MODEL,
            MODEL,
            dataclasses.replace(config, samples=samples),
            eos_ids=(EOS,),
            vocab_size=29,
        )
        for samples in (1, 3)
    )
    parts = tuple(
        jax.tree.map(lambda x, i=i: x[4 * i : 4 * i + 4], rows) for i in range(2)
    )
    size = mesh[0] * mesh[1]
    with jax.set_mesh(mesh := make_mesh(*mesh, devices=jax.devices()[:size])):
        on_mesh = tuple(put_batch(mesh, part) for part in parts)
        got = jax.device_get(three(*pair, on_mesh, jax.random.key(5)))
    assert [len(field) for field in got] == [6, 6, 6]
    keys = [jax.random.key(5), *sample_keys(jax.random.key(5), 3)[1:]]
    for j in range(3):
        want = jax.device_get(one(*pair, parts, keys[j]))
        for i in range(2):
            samples, info, teacher_hidden = (field[2 * j + i] for field in got)
            want_samples, want_info, want_hidden = (field[i] for field in want)
            jax.tree.map(np.testing.assert_array_equal, samples, want_samples)
            for field, want_field in zip(info, want_info, strict=True):
                np.testing.assert_allclose(field, want_field, rtol=1e-4)
            for b, end in enumerate(samples.lengths):
                np.testing.assert_allclose(
                    teacher_hidden[b, : end - 1], want_hidden[b, : end - 1], atol=1e-5
                )
    texts = {tuple(field.tokens.ravel().tolist()) for field in got[0]}
    assert len(texts) == 6


@pytest.mark.slow
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_a_horizon_cuts_responses_without_an_end_of_sequence(pair, intervention):
    free, _ = roll(RolloutConfig("on", intervention="none"), pair)
    settings = INTERVENTIONS[intervention]
    config = RolloutConfig("on", intervention=intervention, **settings)
    rows, info = roll(config, pair, horizon=3)
    ends = np.minimum(rows.prompt_lengths + 3, 12)
    assert (rows.lengths <= ends).all()
    scored = np.asarray(next_token_view(rows).where).sum(axis=1)
    np.testing.assert_array_equal(scored, rows.lengths - rows.prompt_lengths)
    changed = info.teacher_wrote.any(axis=1)
    first_error = np.where(changed, info.teacher_wrote.argmax(axis=1), -1)
    assert (first_error < ends).all()
    for b, end in enumerate(rows.lengths.tolist()):
        response = rows.tokens[b, rows.prompt_lengths[b] : end].tolist()
        assert EOS not in response[:-1]
        assert end == ends[b] or response[-1] == EOS
        same = end if first_error[b] < 0 else first_error[b]
        np.testing.assert_array_equal(rows.tokens[b, :same], free.tokens[b, :same])
        if first_error[b] < 0:
            assert end == min(free.lengths[b], ends[b])
    cut = [row[end - 1] for row, end in zip(rows.tokens, rows.lengths, strict=True)]
    assert (np.array(cut) != EOS).any()


@pytest.mark.slow
def test_another_horizon_is_no_other_program(pair):
    rollout = make_rollout(MODEL, MODEL, RolloutConfig("on"), eos_ids=(EOS,))
    for horizon in (2, 5, 100):
        (rows,), _, _ = rollout(*pair, (ROWS,), jax.random.key(0), horizon)
        assert int((rows.lengths - rows.prompt_lengths).max()) <= horizon
    assert rollout._cache_size() == 1


def test_settings_are_checked():
    config = RolloutConfig("on")
    # Types are checked under pytest and nowhere else, so the typo is put there late.
    object.__setattr__(config, "teacher_token", "max")
    with pytest.raises(ValueError, match="rollout.teacher_token='max'; .*'argmax'"):
        make_rollout(MODEL, MODEL, config, eos_ids=(EOS,))
