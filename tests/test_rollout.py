"""The policies, the replay buffer, the ratio, spans of generated text, a rollout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mgsr_jax import models
from mgsr_jax.decoding.decode import generate
from mgsr_jax.rollout import (
    AdaptiveRatio,
    ReplayBuffer,
    RolloutConfig,
    choose_source,
    make_rollout,
    with_spans,
)
from mgsr_jax.rows import NO_SPAN, Rows, from_lists

STEPS = 100
GRID = np.arange(200) / 200


@pytest.fixture
def shares(monkeypatch):
    """How often each source is chosen where r takes every value of a grid on [0, 1)."""

    def count(config, **state):
        settings = dict(step=0, steps=STEPS) | state
        chosen = []
        for r in GRID:
            monkeypatch.setattr(jax.random, "uniform", lambda key, r=r: r)
            chosen.append(choose_source(config, jax.random.key(0), **settings))
        monkeypatch.undo()
        return [chosen.count(name) / 200 for name in ("data", "generate", "replay")]

    return count


def test_off_is_always_the_data(shares):
    assert shares(RolloutConfig("off", probability=1.0), ratio=1.0) == [1, 0, 0]


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_on_generates_with_its_probability(shares, probability):
    """0 is never, also for r = 0; 1 is always."""
    assert shares(RolloutConfig("on", probability)) == [1 - probability, probability, 0]


@pytest.mark.parametrize(
    ("step", "ratio", "full", "want"),
    [
        (0, 0.0, True, [1, 0, 0]),
        (0, 0.0, False, [1, 0, 0]),
        (0, 1.0, True, [0, 1, 0]),
        (STEPS, 1.0, True, [0, 0, 1]),
        (STEPS, 1.0, False, [0, 1, 0]),
        (25, 0.5, True, [0.5, 0.375, 0.125]),  # 0.5 * (1 - 1/4) generated
        (75, 0.5, True, [0.5, 0.125, 0.375]),
        (75, 0.5, False, [0.5, 0.5, 0]),
    ],
)
def test_replay_takes_over_from_generation_as_the_run_goes_on(
    shares, step, ratio, full, want
):
    config = RolloutConfig("replay", probability=0.9)
    assert shares(config, step=step, ratio=ratio, buffer_full=full) == want


def test_the_choice_is_the_key_s():
    """Frequencies over real keys; the same keys choose the same."""
    config = RolloutConfig("on", 0.3)

    def choices():
        keys = jax.random.split(jax.random.key(3), 300)
        return [choose_source(config, key, step=0, steps=9) for key in keys]

    first = choices()
    # Within four standard deviations.
    assert abs(first.count("generate") / 300 - 0.3) < 4 * (0.21 / 300) ** 0.5
    assert choices() == first


def numbered(first, count, width=5):
    """Host rows whose every field says which one it is."""
    index = np.arange(first, first + count, dtype=np.int32)
    wide = np.broadcast_to(index[:, None], (count, width))
    return Rows(wide, index, index + 1, -wide, index, index % 2 == 1)


def test_the_buffer_keeps_the_latest_rows():
    buffer = ReplayBuffer.empty(5, 5)
    assert buffer.capacity == 5 and not buffer.full
    for first, held in ((0, {0, 1}), (2, {0, 1, 2, 3}), (4, {1, 2, 3, 4, 5})):
        buffer.push(numbered(first, 2))
        inside = buffer.rows.example[: min(buffer.pushed, 5)]
        assert set(inside.tolist()) == held and buffer.full == (len(held) == 5)
    buffer.push(numbered(6, 5))
    assert set(buffer.rows.example.tolist()) == set(range(6, 11))
    assert buffer.pushed == 11
    buffer.push(numbered(20, 13))  # more than fit
    assert set(buffer.rows.example.tolist()) == set(range(28, 33))
    for row, number in enumerate(buffer.rows.example):
        want = jax.tree.map(lambda leaf: leaf[0], numbered(number, 1))
        got = jax.tree.map(lambda leaf, row=row: leaf[row], buffer.rows)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_what_was_pushed_is_a_copy():
    buffer, rows = ReplayBuffer.empty(2, 5), numbered(1, 2)
    rows = jax.tree.map(np.array, rows)
    buffer.push(rows)
    rows.tokens[:] = 99
    assert buffer.rows.tokens.max() == 2
    drawn = buffer.sample(jax.random.key(0), 4)
    drawn.tokens[:] = 77
    assert buffer.rows.tokens.max() == 2


@pytest.mark.parametrize("pushed", [3, 4, 6])
def test_samples_are_uniform_over_what_is_held(pushed):
    buffer = ReplayBuffer.empty(4, 5)
    buffer.push(numbered(0, pushed))
    drawn = buffer.sample(jax.random.key(1), 4000)
    held = range(max(0, pushed - 4), pushed)
    numbers, counts = np.unique(drawn.example, return_counts=True)
    assert numbers.tolist() == list(held)
    share = 1 / len(held)
    spread = 4 * (share * (1 - share) / 4000) ** 0.5
    np.testing.assert_allclose(counts / 4000, share, atol=spread)
    np.testing.assert_array_equal(drawn.tokens[:, 2], drawn.example)
    again = buffer.sample(jax.random.key(1), 4000)
    np.testing.assert_array_equal(again.example, drawn.example)


def test_an_empty_buffer_has_nothing_to_draw():
    with pytest.raises(ValueError, match="nothing was pushed"):
        ReplayBuffer.empty(4, 5).sample(jax.random.key(0), 2)


def test_the_ratio_rises_where_validation_got_worse():
    ratio = AdaptiveRatio(0.85)
    seen = []
    for loss in (3.0, 2.0, 3.09, 3.1, 3.15, 3.25, 3.5, 1.0):
        ratio.update(loss, 0.1)
        seen.append((round(ratio.ratio, 3), ratio.reference))
    assert seen == [
        (0.85, 3.0),  # the first one is what later ones are compared with
        (0.85, 3.0),
        (0.85, 3.0),
        (0.95, 3.1),
        (0.95, 3.1),
        (1.0, 3.25),
        (1.0, 3.5),
        (1.0, 3.5),
    ]


class Letters:
    """A tokenizer of one character a token."""

    def decode(self, ids, **settings):
        return "".join(chr(i) for i in ids)


def test_spans_are_marked_in_the_response_alone(monkeypatch):
    words = "the cat sat"
    rows = from_lists(
        [[ord(c) for c in "the cat"], [ord("x")]],
        [[ord(c) for c in words], [ord("y")]],
        width=22,
    )
    rows.span_ids[:] = 9  # stale
    monkeypatch.setattr("mgsr_jax.rollout.token_offsets", offsets)
    marked = with_spans(rows, Letters(), find_cats, spacy_model="none")
    cat = words.index("cat")
    want = [NO_SPAN] * 22
    first = 7 + cat
    span = marked.span_ids[0, first]
    assert span >= 0
    want[first : first + 3] = [span] * 3
    assert marked.span_ids[0].tolist() == want
    assert marked.span_ids[1].tolist() == [NO_SPAN] * 22
    assert (rows.span_ids == 9).all()  # the rows that were given stay as they are
    for field in ("tokens", "lengths", "prompt_lengths", "example", "ground_truth"):
        assert getattr(marked, field) is getattr(rows, field)


def offsets(tokenizer, ids):
    return tokenizer.decode(ids), [(i, i + 1) for i in range(len(ids))]


def find_cats(text):
    start = text.find("cat")
    return [] if start < 0 else [(start, start + 3)]


EOS = 2
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


def roll(config, pair, rows=ROWS, seed=5):
    rollout = make_rollout(MODEL, MODEL, config, eos_ids=(EOS,), vocab_size=29)
    results = jax.device_get(rollout(*pair, (rows,), jax.random.key(seed)))
    (samples,), (info,), (heard,) = results
    assert (heard is None) == (config.rounds == 0)
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


def test_without_rounds_the_samples_are_the_student_s(pair):
    rows, info = roll(RolloutConfig("on", rounds=0), pair)
    assert_well_formed(rows)
    assert info.error_position.shape == (0, 5)
    want = generate(
        MODEL,
        pair[0],
        ROWS,
        key=jax.random.key(5),
        max_length=12,
        eos_ids=(EOS,),
        vocab_size=29,
    )
    np.testing.assert_array_equal(rows.lengths, want.lengths)
    for b, end in enumerate(rows.lengths):
        np.testing.assert_array_equal(rows.tokens[b, :end], want.tokens[b, :end])


def test_a_round_corrects_one_token_and_keeps_what_stands_before_it(pair):
    before, _ = roll(RolloutConfig("on", rounds=0), pair)
    rows, info = roll(RolloutConfig("on", rounds=1), pair)
    assert_well_formed(rows)
    assert info.corrected.shape == (1, 5) and info.corrected.sum() >= 3
    for b, j in enumerate(info.error_position[0]):
        if not info.corrected[0, b]:
            assert j == -1
            np.testing.assert_array_equal(rows.tokens[b], before.tokens[b])
            continue
        assert rows.prompt_lengths[b] <= j < before.lengths[b]
        np.testing.assert_array_equal(rows.tokens[b, :j], before.tokens[b, :j])
        assert rows.tokens[b, j] != before.tokens[b, j]


def test_a_teacher_that_is_the_student_agrees_with_its_greedy_choices(pair):
    """temperature 0 and argmax: nothing to correct."""
    config = RolloutConfig("on", rounds=1, temperature=0.0, teacher_token="argmax")
    rows, info = roll(config, (pair[0], pair[0]))
    assert_well_formed(rows)
    assert not info.corrected.any()


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


def test_micro_batches_that_share_the_slots_have_the_samples_of_one_batch(pair):
    rows = jax.tree.map(lambda x: np.concatenate([x, x, x[:2]]), ROWS)
    rows = dataclasses.replace(rows, example=np.arange(12, dtype=np.int32))
    config = RolloutConfig("on", rounds=2)
    want, want_info = roll(config, pair, rows=rows)
    rollout = make_rollout(MODEL, MODEL, config, eos_ids=(EOS,), vocab_size=29)
    parts = tuple(
        jax.tree.map(lambda x, i=i: x[3 * i : 3 * i + 3], rows) for i in range(4)
    )
    samples, infos, heard = jax.device_get(rollout(*pair, parts, jax.random.key(5)))
    for i in range(4):
        hidden, _ = MODEL.forward(pair[1], jnp.asarray(samples[i].tokens))
        for b, length in enumerate(samples[i].lengths.tolist()):
            np.testing.assert_allclose(
                heard[i][b, : length - 1], hidden[b, : length - 1], atol=1e-5
            )
        here = slice(3 * i, 3 * i + 3)
        jax.tree.map(
            np.testing.assert_array_equal,
            samples[i],
            jax.tree.map(lambda x, here=here: x[here], want),
        )
        np.testing.assert_array_equal(
            infos[i].error_position, want_info.error_position[:, here]
        )
