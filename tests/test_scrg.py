"""SCRG against a Python loop that scores and re-generates every row from scratch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decode_reference import as_lists, draw, key_data, kl, logits_of, sampled, tiny_pair

from mgsr_jax import sharding
from mgsr_jax.decoding import scoring
from mgsr_jax.decoding.decode import Decoding
from mgsr_jax.decoding.sampling import (
    ANCESTRAL,
    GREEDY,
    POSITION_STREAM,
    STUDENT_STREAM,
    TEACHER_STREAM,
    Sampling,
    row_keys,
)
from mgsr_jax.interventions.positions import ARGMAX, Position, priorities
from mgsr_jax.scrg import locate_error, revise

WIDTH = 12
EOS = (1, 3)
LENGTHS = (1, 4, 2, 6, 11)


@pytest.fixture(scope="module")
def pair():
    return tiny_pair(3.0)


@pytest.fixture(scope="module", autouse=True)
def several_chunks_per_row():
    """Rows here are shorter than the chunks that are scored at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "SCORED_POSITIONS", 4)
        yield


def choose(found, searched, prompt, position, noise):
    """The rule's own words, for the disagreements (index, KL, token) of a round.

    `searched` has the KL of every searched token, `noise` its random number.
    """
    if position.rule == "first":
        if not found:
            return None
        least = np.quantile(searched, position.quantile, method="higher")
        return next((x for x in found if x[1] >= least), None)
    scores = {
        "argmax": lambda i, kl: kl,
        "early": lambda i, kl: kl * position.discount ** (i - prompt),
        "random": lambda i, kl: noise[i],
    }
    score = scores[position.rule]
    return max(found, key=lambda x: score(*x[:2]), default=None)


def reference(pair, rows, key, rounds, eos_ids, argmax=False, position=ARGMAX):
    """Per row: the tokens, (error position, KL) of every round, work of both models."""
    student, teacher = pair

    data = partial(key_data, key, rows)

    def extend(tokens, b, keys):
        while len(tokens) < WIDTH and not (
            len(tokens) > prompt and tokens[-1] in eos_ids
        ):
            logits = logits_of(student, tokens, WIDTH)[len(tokens) - 1]
            tokens = tokens + [draw(logits, keys, b, len(tokens))]
        return tokens

    def noise(keys, b):
        row_key = jax.random.wrap_key_data(keys[b])
        folded = (jax.random.fold_in(row_key, i) for i in range(WIDTH))
        return [float(jax.random.uniform(k)) for k in folded]

    results = []
    for b, prompt in enumerate(rows.prompt_lengths.tolist()):
        tokens = extend(rows.tokens[b, :prompt].tolist(), b, data(STUDENT_STREAM, 0))
        corrected_to, log = prompt - 1, []
        generated, scored = len(tokens) - prompt, len(tokens) - 1
        for round in range(1, rounds + 1):
            p, q = logits_of(teacher, tokens, WIDTH), logits_of(student, tokens, WIDTH)
            keys, searched, found = data(TEACHER_STREAM, round), [], []
            for i in range(corrected_to + 1, len(tokens)):
                before = p[i - 1]
                choice = int(before.argmax()) if argmax else draw(before, keys, b, i)
                searched.append(kl(before, q[i - 1]))
                if choice != tokens[i]:
                    found.append((i, searched[-1], choice))
            random = noise(data(POSITION_STREAM, round), b)
            worst = choose(found, searched, prompt, position, random)
            if worst is None:
                log.append((-1, 0.0))
                continue
            corrected_to, score, choice = worst
            tokens = tokens[:corrected_to] + [choice]
            kept = len(tokens)
            tokens = extend(tokens, b, data(STUDENT_STREAM, round))
            generated, scored = (x + len(tokens) - kept for x in (generated, scored))
            log.append((corrected_to, score))
        results.append((tokens, log, (generated, scored)))
    return results


@partial(jax.jit, static_argnames=("pair", "rounds", "teacher_sampling", "position"))
def rollout(pair, params, rows, key, decoding, **settings):
    models, state = sampled(pair, params, rows, key, decoding)
    return state, *revise(models, state, key=key, decoding=decoding, **settings)


def run(pair, rows, key, *, argmax=False, eos_ids=EOS, **changes):
    models, params = zip(*pair, strict=True)
    settings = dict(rounds=changes.pop("rounds", 1))
    settings["position"] = changes.pop("position", ARGMAX)
    settings["teacher_sampling"] = GREEDY if argmax else ANCESTRAL
    decoding = Decoding(WIDTH, eos_ids, **changes)
    return rollout(models, params, rows, key, decoding, **settings)


def assert_equals_the_loop(pair, got, want):
    """Rows, corrections, statistics and the teacher's hidden states of a revision."""
    outcome, info = got
    assert as_lists(outcome.rows) == [tokens for tokens, _, _ in want]
    record = outcome.info
    for b, (_, log, work) in enumerate(want):
        assert info.error_position[:, b].tolist() == [j for j, _ in log]
        np.testing.assert_allclose(info.kl[:, b], [v for _, v in log], rtol=1e-4)
        errors = [(j, v) for j, v in log if j >= 0]
        assert np.flatnonzero(record.teacher_wrote[b]).tolist() == [
            j for j, _ in errors
        ]
        np.testing.assert_allclose(record.kl[b], errors[0][1] if errors else 0, 1e-4)
        assert (record.student_generated[b], record.teacher_scored[b]) == work
    np.testing.assert_array_equal(info.corrected, info.error_position >= 0)
    teacher, params = pair[1]
    hidden, _ = jax.jit(teacher.forward)(params, outcome.rows.tokens)
    for b, length in enumerate(outcome.rows.lengths.tolist()):
        here = b, slice(length - 1)
        np.testing.assert_allclose(
            outcome.teacher_hidden[here], hidden[here], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(
    ("rounds", "argmax", "decode_rows"),
    [
        (1, True, None),
        pytest.param(3, False, None, marks=pytest.mark.exhaustive),
        pytest.param(3, False, 2, marks=pytest.mark.exhaustive),
        pytest.param(2, True, 3, marks=pytest.mark.exhaustive),
    ],
)
def test_revision_equals_regeneration_from_scratch(pair, rounds, argmax, decode_rows):
    """`decode_rows` below the number of rows makes them take turns in the decoder."""
    rows, key = tiny.prompts(LENGTHS, width=WIDTH), jax.random.key(4)
    settings = dict(rounds=rounds, argmax=argmax)
    _, *got = run(pair, rows, key, decode_rows=decode_rows, **settings)
    assert got[1].error_position.shape == (rounds, len(LENGTHS))
    assert np.asarray(got[1].corrected).any()
    assert_equals_the_loop(
        pair, got, reference(pair, rows, key, eos_ids=EOS, **settings)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("position", "rounds"),
    [
        (Position("first", quantile=0.5), 1),
        (Position("early", discount=0.6), 1),
        (Position("random"), 1),
        pytest.param(Position("first", 0.25), 3, marks=pytest.mark.exhaustive),
        pytest.param(Position("random"), 3, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_each_rule_equals_the_loop_and_chooses_other_positions(pair, position, rounds):
    rows, key = tiny.prompts(LENGTHS, width=WIDTH), jax.random.key(4)
    _, *got = run(pair, rows, key, rounds=rounds, position=position)
    want = reference(pair, rows, key, rounds, EOS, position=position)
    assert_equals_the_loop(pair, got, want)
    _, _, paper = run(pair, rows, key, rounds=rounds)
    assert (got[1].error_position != paper.error_position).any()
    if position.rule != "first":
        np.testing.assert_array_equal(got[1].corrected[0], paper.corrected[0])


@pytest.mark.exhaustive
def test_later_rounds_undo_no_correction(pair):
    rows, key = tiny.prompts((1, 4, 2, 6), width=WIDTH), jax.random.key(8)
    _, _, info = run(pair, rows, key, rounds=4, eos_ids=(99,))
    for b in range(4):
        positions = [j for j in info.error_position[:, b].tolist() if j >= 0]
        assert positions == sorted(set(positions))


@pytest.mark.slow
def test_a_teacher_that_agrees_corrects_nothing(pair):
    rows = tiny.prompts((1, 4, 2, 6), width=WIDTH)
    before, after, info = run(
        (pair[0], pair[0]),
        rows,
        jax.random.key(0),
        argmax=True,
        sampling=Sampling(0.0),
    )
    assert not np.asarray(info.corrected).any()
    assert info.error_position.tolist() == [[-1] * 4]
    assert as_lists(after.rows) == as_lists(before.rows)


@pytest.mark.exhaustive
def test_a_teachers_end_of_sequence_ends_the_row(pair):
    """The teacher's first correction becomes the only stop token."""
    student, teacher = pair
    rows, key = tiny.prompts((1, 4, 2, 6), width=WIDTH), jax.random.key(8)
    _, plain, info = run(pair, rows, key, eos_ids=(99,))

    def is_new(row):
        """Whether the teacher's token stands nowhere before it in the response."""
        position, prompt = info.error_position[0, row], rows.prompt_lengths[row]
        response = plain.rows.tokens[row, prompt : position + 1].tolist()
        return bool(info.corrected[0, row]) and response[-1] not in response[:-1]

    row = next(filter(is_new, range(4)))
    position = int(info.error_position[0, row])
    token = int(plain.rows.tokens[row, position])
    _, ended, info = run(pair, rows, key, eos_ids=(token,))
    assert int(info.error_position[0, row]) == position
    assert int(ended.rows.lengths[row]) == position + 1


def proposing(proposal):
    """A `propose` that reads the teacher's tokens from an array."""
    return lambda index: jnp.take_along_axis(proposal, index, axis=1)


def by_kl(rows, kl, after=None):
    """Priorities of the paper's rule for the tokens behind `after`."""
    after = rows.prompt_lengths - 1 if after is None else after
    index = jnp.arange(kl.shape[1])[None]
    searched = (index > after[:, None]) & (index < rows.lengths[:, None])
    return jnp.where(searched, kl, -jnp.inf)


def test_the_end_of_sequence_can_be_the_error_and_padding_cannot():
    rows = tiny.complete(((2, 3), (2, 3)), width=8)
    proposal = rows.tokens.at[0, 4].add(1).at[1, 5].add(1).at[1, 1].add(1)
    kl = jnp.arange(16.0).reshape(2, 8)
    error, token = locate_error(rows, kl, by_kl(rows, kl), proposing(proposal))
    assert token[0] == proposal[0, 4]
    assert error.error_position.tolist() == [4, -1]
    assert error.corrected.tolist() == [True, False]
    assert error.kl.tolist() == [4.0, 0.0]


def test_the_error_has_the_largest_kl_among_disagreements():
    rows = tiny.complete(((2, 5),), width=8)
    proposal = rows.tokens.at[0, 3].add(1).at[0, 6].add(1)
    kl = jnp.array([[9.0, 9, 9, 2, 9, 9, 3, 9]])

    def position(kl, corrected_to):
        priority = by_kl(rows, kl, jnp.array([corrected_to]))
        error, _ = locate_error(rows, kl, priority, proposing(proposal))
        return error.error_position.tolist()

    assert position(kl, 1) == [6]
    assert position(kl.at[0, 3].set(4.0), 1) == [3]
    assert position(kl.at[0, 3].set(4.0), 3) == [6]
    assert position(kl, 6) == [-1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("rule", ["argmax", "random"])
def test_mesh_changes_nothing(pair, rule):
    rows = tiny.prompts((1, 4, 2, 6, 3, 3, 5, 2), width=WIDTH)
    key, settings = jax.random.key(2), dict(rounds=2, position=Position(rule))
    _, want, _ = run(pair, rows, key, **settings)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    placed = [
        (model, jax.device_put(p, sharding.shardings(mesh, model.partition_rules, p)))
        for model, p in pair
    ]
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, jax.tree.map(np.asarray, rows))
        _, got, _ = run(placed, batch, key, **settings)
    assert as_lists(jax.device_get(got.rows)) == as_lists(jax.device_get(want.rows))
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), got.info, want.info
    )
    for b, length in enumerate(want.rows.lengths.tolist()):
        here = b, slice(length - 1)
        np.testing.assert_allclose(
            got.teacher_hidden[here], want.teacher_hidden[here], rtol=1e-5, atol=1e-5
        )


def test_teacher_tokens_are_drawn_until_one_differs():
    """The teacher agrees with the tokens of the ten largest KLs."""
    rows = tiny.complete(((1, 14), (1, 14)), width=16)
    kl = jnp.tile(jnp.arange(16.0), (2, 1))
    proposal = rows.tokens.at[0, 4].add(1).at[0, 2].add(1)
    error, token = locate_error(rows, kl, by_kl(rows, kl), proposing(proposal))
    assert error.error_position.tolist() == [4, -1]
    assert error.kl.tolist() == [4.0, 0.0] and token[0] == proposal[0, 4]


def test_a_random_position_is_uniform_over_the_disagreements():
    """Chi-square over 4,000 rows with five disagreements among nine tokens."""
    size, open_at = 4000, [3, 4, 6, 9, 10]
    one = tiny.complete(((2, 9),), width=13)
    rows = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), one)
    proposal = rows.tokens.at[:, jnp.array(open_at)].add(1)
    kl = jnp.tile(jnp.arange(13.0), (size, 1))
    keys = row_keys(jax.random.key(0), jnp.arange(size), POSITION_STREAM, 1)
    searched = by_kl(rows, kl) > -jnp.inf
    priority = priorities(Position("random"), rows, kl, searched, keys)
    error, _ = jax.jit(locate_error, static_argnums=3)(
        rows, kl, priority, proposing(proposal)
    )
    counts = np.bincount(error.error_position, minlength=13)
    assert set(np.flatnonzero(counts)) == set(open_at)
    expected = size / len(open_at)
    assert np.sum((counts[open_at] - expected) ** 2 / expected) < 18.5  # 0.1 %, 4 dof


def test_an_unknown_rule_is_an_error():
    rows, kl = tiny.complete(((2, 3),), width=8), jnp.zeros((1, 8))
    position = Position()
    object.__setattr__(position, "rule", "last")
    with pytest.raises(ValueError, match="rule='last'; expected one of"):
        priorities(position, rows, kl, kl > 0, jax.random.split(jax.random.key(0), 1))
