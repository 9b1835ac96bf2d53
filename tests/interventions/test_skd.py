"""SKD in blocks against a Python loop over single tokens with full recompute."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from decode_reference import (
    as_lists,
    draw,
    generate,
    key_data,
    kl,
    logits_of,
    tiny_pair,
)

from mgsr_jax.decoding.decode import Decoding, start
from mgsr_jax.decoding.sampling import STUDENT_STREAM, TEACHER_STREAM
from mgsr_jax.interventions.outcome import Pair
from mgsr_jax.interventions.skd import Acceptance, write_together

WIDTH = 14
EOS = (1, 3)
LENGTHS = (1, 4, 2, 6, 11)


@pytest.fixture(scope="module")
def pair():
    return tiny_pair(2.0)


@partial(jax.jit, static_argnames=("models", "acceptance"))
def run_jitted(models, params, rows, key, decoding, acceptance):
    student, teacher = models
    copy = student.decode_params(params[0], jnp.float32)
    return write_together(
        Pair(student, copy, teacher, params[1]),
        start(student, params[0], rows, prefill_width=11),
        key=key,
        decoding=decoding,
        acceptance=acceptance,
        prefill_width=11,
    )


def run(pair, rows, key, acceptance, *, eos_ids=EOS, **changes):
    models, params = zip(*pair, strict=True)
    decoding = Decoding(rows.tokens.shape[1], eos_ids, **changes)
    return run_jitted(models, params, rows, key, decoding, acceptance)


def reference(pair, rows, key, top_k):
    """Per row: its tokens, the teacher's positions, KL at the first of them."""
    student, teacher = pair
    student_keys = key_data(key, rows, STUDENT_STREAM, 0)
    teacher_keys = key_data(key, rows, TEACHER_STREAM, 0)
    results = []
    for b, prompt in enumerate(rows.prompt_lengths.tolist()):
        tokens, wrote, first_kl = rows.tokens[b, :prompt].tolist(), [], 0.0
        while len(tokens) < WIDTH:
            i = len(tokens)
            q = logits_of(student, tokens, WIDTH)[i - 1]
            p = logits_of(teacher, tokens, WIDTH)[i - 1]
            token = draw(q, student_keys, b, i)
            if token not in np.argsort(-p)[:top_k]:
                token = draw(p, teacher_keys, b, i)
                first_kl = first_kl if wrote else kl(p, q)
                wrote.append(i)
            tokens.append(token)
            if token in EOS:
                break
        results.append((tokens, wrote, first_kl))
    return results


def drafted(pair, rows, key, b, tokens, wrote, block):
    """Tokens that the student drafts until row b is `tokens`, block by block."""
    keys, count = key_data(key, rows, STUDENT_STREAM, 0), 0
    position = int(rows.prompt_lengths[b])
    while position < len(tokens):
        draft = tokens[:position]
        for _ in range(block):
            logits = logits_of(pair[0], draft, WIDTH)[len(draft) - 1]
            draft = [*draft, draw(logits, keys, b, len(draft))]
            if draft[-1] in EOS or len(draft) == WIDTH:
                break
        count += len(draft) - position
        replaced = [i for i in wrote if position <= i < len(draft)]
        position = replaced[0] + 1 if replaced else len(draft)
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("top_k", "block", "decode_rows"),
    [
        (6, 4, 2),
        pytest.param(3, 1, None, marks=pytest.mark.exhaustive),
        pytest.param(2, 3, None, marks=pytest.mark.exhaustive),
    ],
)
def test_blocks_equal_a_loop_over_single_tokens(pair, top_k, block, decode_rows):
    rows, key = tiny.prompts(LENGTHS, width=WIDTH), jax.random.key(4)
    acceptance = Acceptance(top_k, block)
    got = jax.device_get(run(pair, rows, key, acceptance, decode_rows=decode_rows))
    want = reference(pair, rows, key, top_k)
    assert as_lists(got.rows) == [tokens for tokens, _, _ in want]
    teacher, params = pair[1]
    hidden, _ = jax.jit(teacher.forward)(params, got.rows.tokens)
    for b, (tokens, wrote, first_kl) in enumerate(want):
        assert np.flatnonzero(got.info.teacher_wrote[b]).tolist() == wrote
        np.testing.assert_allclose(got.info.kl[b], first_kl, rtol=1e-4)
        work = drafted(pair, rows, key, b, tokens, wrote, block)
        assert got.info.student_generated[b] == work
        assert got.info.teacher_scored[b] == work + rows.prompt_lengths[b] - 1
        here = b, slice(len(tokens) - 1)
        np.testing.assert_allclose(
            got.teacher_hidden[here], hidden[here], rtol=1e-5, atol=1e-5
        )
    written = sum(len(wrote) for _, wrote, _ in want)
    responses = sum(len(tokens) for tokens, _, _ in want) - sum(LENGTHS)
    assert 0 < written < responses
    # Some block had a rejected token and some had none.
    assert responses < got.info.student_generated.sum() or block == 1


@pytest.mark.exhaustive
def test_a_teacher_that_accepts_all_tokens_leaves_the_student_s_samples(pair):
    rows, key = tiny.prompts(LENGTHS, width=WIDTH), jax.random.key(4)
    got = run(pair, rows, key, Acceptance(tiny.VOCAB, 4))
    assert as_lists(got.rows) == generate(*pair[0], rows, key, Decoding(WIDTH, EOS))
    assert not got.info.teacher_wrote.any() and not got.info.kl.any()


@pytest.mark.slow
def test_tokens_have_the_law_of_the_algorithm(pair):
    """Chi-square of two tokens of 6,000 rows, over a vocabulary of four."""
    size, vocab, top_k = 6000, 4, 2
    one = tiny.prompts((2,), width=4)
    rows = jax.tree.map(lambda x: jnp.repeat(x, size, axis=0), one)
    rows = dataclasses.replace(rows, example=jnp.arange(size))
    got = run(
        pair,
        rows,
        jax.random.key(1),
        Acceptance(top_k, 2),
        eos_ids=(99,),
        vocab_size=vocab,
    )

    def law(prefix):
        """q where it is among the teacher's top K, the rest of its mass spread as p."""
        values = (logits_of(m, prefix, 4, vocab)[len(prefix) - 1] for m in pair)
        q, p = (np.exp(x[:vocab] - np.logaddexp.reduce(x[:vocab])) for x in values)
        kept = np.where(np.isin(np.arange(vocab), np.argsort(-p)[:top_k]), q, 0.0)
        return kept + (1 - kept.sum()) * p

    prompt = one.tokens[0, :2].tolist()
    first = law(prompt)
    joint = np.array([first[y] * law([*prompt, y]) for y in range(vocab)]).ravel()
    cells = got.rows.tokens[:, 2] * vocab + got.rows.tokens[:, 3]
    counts = np.bincount(cells, minlength=vocab**2)
    tested = joint * size >= 5
    assert tested.sum() >= 8
    chi = np.sum((counts - joint * size)[tested] ** 2 / (joint * size)[tested])
    assert chi < 37.7  # 0.1 % of 15 degrees of freedom
