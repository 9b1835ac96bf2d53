"""AdaSwitch against a Python loop over single tokens with full recompute."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decode_reference import as_lists, draw, key_data, kl, logits_of, sampled, tiny_pair

from mgsr_jax.decoding.decode import Decoding
from mgsr_jax.decoding.sampling import STUDENT_STREAM, TEACHER_STREAM
from mgsr_jax.interventions.adaswitch import Switch, find_switch, hand_over

WIDTH = 14
EOS = (1, 3)
LENGTHS = (1, 4, 2, 6, 11)


@pytest.fixture(scope="module")
def pair():
    return tiny_pair(2.0)


@partial(jax.jit, static_argnames=("models", "switch"))
def run_jitted(models, params, rows, key, decoding, switch):
    pair, state = sampled(models, params, rows, key, decoding)
    return hand_over(pair, state, key=key, decoding=decoding, switch=switch)


def run(pair, rows, key, switch, *, eos_ids=EOS, **changes):
    models, params = zip(*pair, strict=True)
    decoding = Decoding(rows.tokens.shape[1], eos_ids, **changes)
    return run_jitted(models, params, rows, key, decoding, switch)


def reference(pair, rows, key, switch):
    """Per row: its tokens, the switch (None: never), KL there, work of both models."""
    student, teacher = pair
    student_keys = key_data(key, rows, STUDENT_STREAM, 0)
    teacher_keys = key_data(key, rows, TEACHER_STREAM, 0)

    def extend(tokens, model, keys, b, prompt):
        while len(tokens) < WIDTH and not (len(tokens) > prompt and tokens[-1] in EOS):
            logits = logits_of(model, tokens, WIDTH)[len(tokens) - 1]
            tokens = [*tokens, draw(logits, keys, b, len(tokens))]
        return tokens

    results = []
    for b, prompt in enumerate(rows.prompt_lengths.tolist()):
        tokens = rows.tokens[b, :prompt].tolist()
        tokens = extend(tokens, student, student_keys, b, prompt)
        generated, scored = len(tokens) - prompt, len(tokens) - 1
        p, q = (logits_of(m, tokens, WIDTH) for m in (teacher, student))
        d = {i: kl(p[i - 1], q[i - 1]) for i in range(prompt, len(tokens))}
        at = None
        for i in range(prompt + switch.window, len(tokens)):
            recent = [d[j] for j in range(i - switch.window, i)]
            if d[i] > switch.ratio * np.mean(recent):
                at = i
                break
        if at is not None:
            # Unlike a response of the student, the teacher's has at least one token.
            logits = logits_of(teacher, tokens[:at], WIDTH)[at - 1]
            tokens = [*tokens[:at], draw(logits, teacher_keys, b, at)]
            tokens = extend(tokens, teacher, teacher_keys, b, prompt)
            scored += len(tokens) - at
        results.append((tokens, at, 0.0 if at is None else d[at], (generated, scored)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("switch", "decode_rows"),
    [
        (Switch(ratio=1.2, window=2), 2),
        pytest.param(Switch(ratio=1.5, window=1), None, marks=pytest.mark.exhaustive),
        pytest.param(Switch(ratio=1.0, window=4), 3, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_switch_equals_a_loop_over_single_tokens(pair, switch, decode_rows):
    rows, key = tiny.prompts(LENGTHS, width=WIDTH), jax.random.key(4)
    got = jax.device_get(run(pair, rows, key, switch, decode_rows=decode_rows))
    want = reference(pair, rows, key, switch)
    assert as_lists(got.rows) == [tokens for tokens, _, _, _ in want]
    teacher, params = pair[1]
    hidden, _ = jax.jit(teacher.forward)(params, got.rows.tokens)
    for b, (tokens, at, value, work) in enumerate(want):
        wrote = [] if at is None else list(range(at, len(tokens)))
        assert np.flatnonzero(got.info.teacher_wrote[b]).tolist() == wrote
        np.testing.assert_allclose(got.info.kl[b], value, rtol=1e-4)
        info = got.info
        assert (info.student_generated[b], info.teacher_scored[b]) == work
        here = b, slice(len(tokens) - 1)
        np.testing.assert_allclose(
            got.teacher_hidden[here], hidden[here], rtol=1e-5, atol=1e-5
        )
    switched = [at is not None for _, at, _, _ in want]
    assert any(switched) and not all(switched)


def test_the_average_is_of_the_window_before_a_token():
    rows = tiny.complete(((2, 9), (2, 9), (4, 3), (2, 4)), width=12)
    kl = jnp.array(
        [
            # Prompts do not count: 9.0. At 7 it is 2.1 > 2 * 1; at 4 it is 3.9 < 2 * 2.
            [9.0, 9.0, 3.0, 1.0, 3.9, 0.1, 1.9, 2.1, 50.0, 1.0, 1.0, 1.0],
            [9.0, 9.0, 1.0, 9.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
            # No complete window before the first two tokens, nothing behind the end.
            [0.0, 0.0, 0.0, 0.0, 0.1, 9.0, 0.1, 99.0, 1.0, 1.0, 1.0, 1.0],
            [0.0, 0.0, 1e-3, 1e-3, 2.1e-3, 4.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        ]
    )
    kl = kl.at[3, 1].set(1e5)  # would swallow the small values in a running sum
    assert find_switch(rows, kl, Switch(2.0, 2)).tolist() == [7, 12, 12, 4]


@pytest.mark.slow
def test_tokens_before_the_switch_are_the_student_s_and_the_rest_the_teacher_s(pair):
    """Chi-square of two tokens of 6,000 rows, over four classes; all switch at once."""
    size, vocab = 6000, 4
    one = tiny.prompts((2,), width=4)
    rows = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), one)
    rows = dataclasses.replace(rows, example=jnp.arange(size))
    switch = Switch(ratio=1e-6, window=1)
    key, settings = jax.random.key(1), dict(eos_ids=(99,), vocab_size=vocab)
    got = run(pair, rows, key, switch, **settings)
    assert got.info.teacher_wrote.tolist() == [[False, False, False, True]] * size

    def law(model, prefix):
        logits = logits_of(model, prefix, 4, vocab)[len(prefix) - 1, :vocab]
        return np.exp(logits - np.logaddexp.reduce(logits))

    prompt = one.tokens[0, :2].tolist()
    first = law(pair[0], prompt)
    later = [law(pair[1], [*prompt, y]) for y in range(vocab)]
    joint = np.array([first[y] * later[y] for y in range(vocab)]).ravel()
    cells = got.rows.tokens[:, 2] * vocab + got.rows.tokens[:, 3]
    counts = np.bincount(cells, minlength=vocab**2)
    tested = joint * size >= 5
    assert tested.sum() >= 8
    chi = np.sum((counts - joint * size)[tested] ** 2 / (joint * size)[tested])
    assert chi < 37.7  # 0.1 % of 15 degrees of freedom
