"""Teacher-forced losses of given rows against float64 numpy."""

import numpy as np
import pytest
import tiny

from mgsr_jax.evaluation.teacher_forced import response_kl, response_loss


@pytest.fixture(scope="module")
def student():
    return tiny.llama(scale=3.0)


def test_response_loss_sums_the_cross_entropy_of_response_tokens(student):
    rows = tiny.complete()
    log_probs = tiny.log_probs(*student, rows.tokens)
    values = [
        -log_probs[b, t - 1, rows.tokens[b, t]]
        for b in range(4)
        for t in range(int(rows.prompt_lengths[b]), int(rows.lengths[b]))
    ]
    total, count = response_loss(*student, rows)
    assert count == len(values) == 21
    assert float(total) == pytest.approx(sum(values), rel=1e-5)


def test_response_kl_counts_from_the_first_token_of_the_response(student):
    teacher = tiny.llama(7, scale=3.0)
    rows = tiny.complete()
    kl, where = map(np.asarray, response_kl(*student, *teacher, rows))
    p, q = (tiny.log_probs(*model, rows.tokens) for model in (teacher, student))
    expected = (np.exp(p) * (p - q)).sum(-1)
    for b in range(4):
        start, end = int(rows.prompt_lengths[b]), int(rows.lengths[b])
        size = end - start
        assert where[b].tolist() == [True] * size + [False] * (13 - size)
        np.testing.assert_allclose(
            kl[b, :size], expected[b, start - 1 : end - 1], rtol=1e-3, atol=1e-5
        )
        assert not kl[b, size:].any()


def test_rows_longer_than_a_chunk_have_the_same_kl():
    """A chunk holds 64 positions; the second chunk here is partly filled."""
    options = dict(scale=3.0, num_hidden_layers=1, max_position_embeddings=128)
    models = *tiny.llama(0, **options), *tiny.llama(7, **options)
    kl, where = response_kl(*models, tiny.complete())
    wide_kl, wide_where = response_kl(*models, tiny.complete(width=64 + 6))
    np.testing.assert_allclose(wide_kl[:, :13], kl, rtol=1e-4, atol=1e-6)
    assert (wide_where[:, :13] == where).all()
    assert not wide_kl[:, 13:].any() and not wide_where[:, 13:].any()
