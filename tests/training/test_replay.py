"""The policies, the replay buffer and the ratio."""

import jax
import numpy as np
import pytest

from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import Rows
from mgsr_jax.training.replay import AdaptiveRatio, ReplayBuffer, choose_source

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
    """Host rows with their number in every field."""
    index = np.arange(first, first + count, dtype=np.int32)
    wide = np.broadcast_to(index[:, None], (count, width))
    return Rows(wide, index, index + 1, -wide, index, index % 2 == 1, wide % 3 == 0)


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
    with pytest.raises(ValueError, match="the replay buffer is empty"):
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
