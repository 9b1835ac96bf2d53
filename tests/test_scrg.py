"""SCRG against a Python loop that scores and re-generates every row from scratch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decode_reference import as_lists, full_logits
from jaxtyping import TypeCheckError

from mgsr_jax import scrg, sharding
from mgsr_jax.decoding.decode import Decoding, decode, start
from mgsr_jax.decoding.sampling import (
    STUDENT_STREAM,
    TEACHER_STREAM,
    Sampling,
    row_keys,
    sample,
)
from mgsr_jax.scrg import locate_error, revise

WIDTH = 12
EOS = (1, 3)


@pytest.fixture(scope="module")
def pair():
    settings = dict(scale=3.0, num_hidden_layers=1)
    return tiny.llama(0, **settings), tiny.llama(1, width=24, **settings)


@pytest.fixture(scope="module", autouse=True)
def several_chunks_per_row():
    """Rows here are shorter than the chunks that are scored at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scrg, "SCORED_POSITIONS", 4)
        yield


def logits_of(named, tokens):
    padded = jnp.asarray(tokens + [0] * (WIDTH - len(tokens)))
    return np.asarray(full_logits(*named, padded), np.float64)


def draw(logits, keys, b, position, temperature=1.0):
    row_key = jax.random.wrap_key_data(keys[b])
    key = jax.random.fold_in(row_key, position)[None]
    return int(sample(jnp.asarray(logits, jnp.float32)[None], key)[0])


def kl(teacher, student):
    log_p = teacher - np.logaddexp.reduce(teacher)
    log_q = student - np.logaddexp.reduce(student)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def reference(student, teacher, rows, key, rounds, eos_ids, argmax):
    """Per row: the tokens, and (error position, KL) of every round."""

    def data(stream, round):
        keys = row_keys(key, rows.example, stream, round)
        return np.asarray(jax.random.key_data(keys))

    def extend(tokens, b, keys):
        while len(tokens) < WIDTH and not (
            len(tokens) > prompt and tokens[-1] in eos_ids
        ):
            logits = logits_of(student, tokens)[len(tokens) - 1]
            tokens = tokens + [draw(logits, keys, b, len(tokens))]
        return tokens

    results = []
    for b, prompt in enumerate(rows.prompt_lengths.tolist()):
        tokens = extend(rows.tokens[b, :prompt].tolist(), b, data(STUDENT_STREAM, 0))
        corrected_to, log = prompt - 1, []
        for round in range(1, rounds + 1):
            p, q = logits_of(teacher, tokens), logits_of(student, tokens)
            keys, worst = data(TEACHER_STREAM, round), None
            for i in range(corrected_to + 1, len(tokens)):
                before = p[i - 1]
                choice = int(before.argmax()) if argmax else draw(before, keys, b, i)
                score = kl(before, q[i - 1])
                if choice != tokens[i] and (worst is None or score > worst[1]):
                    worst = (i, score, choice)
            if worst is None:
                log.append((-1, 0.0))
                continue
            corrected_to, score, choice = worst
            tokens = tokens[:corrected_to] + [choice]
            tokens = extend(tokens, b, data(STUDENT_STREAM, round))
            log.append((corrected_to, score))
        results.append((tokens, log))
    return results


@partial(jax.jit, static_argnames=("pair", "rounds", "teacher_token"))
def rollout(pair, params, rows, key, decoding, *, rounds=1, teacher_token="sample"):
    student, teacher = pair
    copy = student.decode_params(params[0], jnp.float32)
    state = decode(
        student,
        copy,
        start(student, params[0], rows),
        keys=row_keys(key, rows.example, STUDENT_STREAM, 0),
        decoding=decoding,
    )
    return state, revise(
        student,
        copy,
        teacher,
        params[1],
        state,
        key=key,
        decoding=decoding,
        rounds=rounds,
        teacher_token=teacher_token,
    )


def run(pair, rows, key, *, rounds=1, teacher_token="sample", eos_ids=EOS, **changes):
    models, params = zip(*pair, strict=True)
    decoding = Decoding(WIDTH, eos_ids, **changes)
    settings = dict(rounds=rounds, teacher_token=teacher_token)
    return rollout(models, params, rows, key, decoding, **settings)


@pytest.mark.parametrize(
    ("rounds", "teacher_token", "decode_rows"),
    [
        (1, "argmax", None),
        pytest.param(0, "sample", None, marks=pytest.mark.exhaustive),
        pytest.param(3, "sample", None, marks=pytest.mark.exhaustive),
        pytest.param(3, "sample", 2, marks=pytest.mark.exhaustive),
        pytest.param(2, "argmax", 3, marks=pytest.mark.exhaustive),
    ],
)
def test_revision_equals_regeneration_from_scratch(
    pair, rounds, teacher_token, decode_rows
):
    """With `decode_rows` a row shares its place in the decoder with other rows."""
    lengths = (1, 4, 2, 6, 11)
    rows, key = tiny.prompts(lengths, width=WIDTH), jax.random.key(4)
    settings = dict(rounds=rounds, teacher_token=teacher_token, decode_rows=decode_rows)
    _, (state, info, teacher_hidden) = run(pair, rows, key, **settings)
    want = reference(*pair, rows, key, rounds, EOS, teacher_token == "argmax")
    assert as_lists(state.rows) == [tokens for tokens, _ in want]
    assert info.error_position.shape == (rounds, len(lengths))
    for b, (_, log) in enumerate(want):
        assert info.error_position[:, b].tolist() == [j for j, _ in log]
        np.testing.assert_allclose(info.kl[:, b], [v for _, v in log], rtol=1e-4)
    np.testing.assert_array_equal(info.corrected, info.error_position >= 0)
    assert rounds == 0 or np.asarray(info.corrected).any()
    teacher, params = pair[1]
    hidden, _ = jax.jit(teacher.forward)(params, state.rows.tokens)
    for b, length in enumerate(state.rows.lengths.tolist()):
        here = b, slice(length - 1)
        np.testing.assert_allclose(
            teacher_hidden[here], hidden[here], rtol=1e-5, atol=1e-5
        )


@pytest.mark.exhaustive
def test_later_rounds_undo_no_correction(pair):
    rows, key = tiny.prompts((1, 4, 2, 6), width=WIDTH), jax.random.key(8)
    _, (_, info, _) = run(pair, rows, key, rounds=4, eos_ids=(99,))
    for b in range(4):
        positions = [j for j in info.error_position[:, b].tolist() if j >= 0]
        assert positions == sorted(set(positions))


@pytest.mark.slow
def test_a_teacher_that_agrees_corrects_nothing(pair):
    rows = tiny.prompts((1, 4, 2, 6), width=WIDTH)
    before, (after, info, _) = run(
        (pair[0], pair[0]),
        rows,
        jax.random.key(0),
        teacher_token="argmax",
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
    _, (plain, info, _) = run(pair, rows, key, eos_ids=(99,))

    def is_new(row):
        """Whether the teacher's token stands nowhere before it in the response."""
        position, prompt = info.error_position[0, row], rows.prompt_lengths[row]
        response = plain.rows.tokens[row, prompt : position + 1].tolist()
        return bool(info.corrected[0, row]) and response[-1] not in response[:-1]

    row = next(filter(is_new, range(4)))
    position = int(info.error_position[0, row])
    token = int(plain.rows.tokens[row, position])
    _, (ended, info, _) = run(pair, rows, key, eos_ids=(token,))
    assert int(info.error_position[0, row]) == position
    assert int(ended.rows.lengths[row]) == position + 1


def proposing(proposal):
    """A `propose` that reads the teacher's tokens from an array."""
    return lambda index: jnp.take_along_axis(proposal, index, axis=1)


def test_the_end_of_sequence_can_be_the_error_and_padding_cannot():
    rows = tiny.complete(((2, 3), (2, 3)), width=8)
    proposal = rows.tokens.at[0, 4].add(1).at[1, 5].add(1).at[1, 1].add(1)
    kl = jnp.arange(16.0).reshape(2, 8)
    error, token = locate_error(rows, kl, rows.prompt_lengths - 1, proposing(proposal))
    assert token[0] == proposal[0, 4]
    assert error.error_position.tolist() == [4, -1]
    assert error.corrected.tolist() == [True, False]
    assert error.kl.tolist() == [4.0, 0.0]


def test_the_error_has_the_largest_kl_among_disagreements():
    rows = tiny.complete(((2, 5),), width=8)
    proposal = rows.tokens.at[0, 3].add(1).at[0, 6].add(1)
    kl = jnp.array([[9.0, 9, 9, 2, 9, 9, 3, 9]])

    def position(kl, corrected_to):
        error, _ = locate_error(
            rows, kl, jnp.array([corrected_to]), proposing(proposal)
        )
        return error.error_position.tolist()

    assert position(kl, 1) == [6]
    assert position(kl.at[0, 3].set(4.0), 1) == [3]
    assert position(kl.at[0, 3].set(4.0), 3) == [6]
    assert position(kl, 6) == [-1]


@pytest.mark.exhaustive
def test_mesh_changes_nothing(pair):
    rows = tiny.prompts((1, 4, 2, 6, 3, 3, 5, 2), width=WIDTH)
    key = jax.random.key(2)
    _, (want, want_info, want_hidden) = run(pair, rows, key, rounds=2)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    placed = [
        (model, jax.device_put(p, sharding.shardings(mesh, model.partition_rules, p)))
        for model, p in pair
    ]
    with jax.set_mesh(mesh):
        batch = sharding.put_batch(mesh, jax.tree.map(np.asarray, rows))
        _, (got, info, teacher_hidden) = run(placed, batch, key, rounds=2)
    assert as_lists(jax.device_get(got.rows)) == as_lists(jax.device_get(want.rows))
    np.testing.assert_array_equal(info.error_position, want_info.error_position)
    for b, length in enumerate(want.rows.lengths.tolist()):
        here = b, slice(length - 1)
        np.testing.assert_allclose(
            teacher_hidden[here], want_hidden[here], rtol=1e-5, atol=1e-5
        )


def test_teacher_tokens_are_drawn_until_one_differs():
    """The teacher agrees with the tokens of the ten largest KLs."""
    rows = tiny.complete(((1, 14), (1, 14)), width=16)
    kl = jnp.tile(jnp.arange(16.0), (2, 1))
    proposal = rows.tokens.at[0, 4].add(1).at[0, 2].add(1)
    error, token = locate_error(rows, kl, jnp.zeros(2, int), proposing(proposal))
    assert error.error_position.tolist() == [4, -1]
    assert error.kl.tolist() == [4.0, 0.0] and token[0] == proposal[0, 4]


def test_an_unknown_teacher_token_is_an_error(pair):
    rows = tiny.prompts((1,), width=WIDTH)
    with pytest.raises((ValueError, TypeCheckError), match="'beam'"):
        run(pair, rows, jax.random.key(0), teacher_token="beam")
