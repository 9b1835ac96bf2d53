"""The loss of one batch for other trainers: against numpy, and against ours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from losses import reference
from mgsr_reference import mgsr_means

from mgsr_jax import losses
from mgsr_jax.integrations import (
    Labels,
    Objective,
    cross_entropy_loss,
    mgsr_loss,
    next_token_labels,
)
from mgsr_jax.loss_targets import make_targets
from mgsr_jax.losses import init_clip_network, top_k_teacher
from mgsr_jax.objective import position_weights
from mgsr_jax.weighted_sum import weighted_sum

B, S, V, K = 3, 7, 9, 4
VOCAB_SIZE = 8
OBJECTIVE = Objective(sft=0.4, token=0.7, span=1.3)
RNG = np.random.default_rng(0)
STUDENT, TEACHER = jnp.array(RNG.normal(size=(2, B, S, V)) * 2, jnp.float32)
TOKENS = jnp.array(RNG.integers(0, VOCAB_SIZE, (B, S)), jnp.int32)
SPAN_IDS = jnp.array(
    [[0, 0, 0, 1, 1, -1, -1], [-1, 2, 2, 2, 2, 3, 3], [4, 4, -1, -1, -1, 4, 4]],
    jnp.int32,
)
# Prompt, response, padding. The last row has nothing to learn.
MASK = jnp.array(
    [[0, 0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], jnp.int32
)
SCORED, PAIRS = 10, 5  # tokens to learn; neighbours in one span, both to learn
UNSCORED = np.append(MASK[:, 1:] == 0, np.ones((B, 1), bool), axis=1)
CLIP = init_clip_network(jax.random.key(1), num_candidates=K, hidden=4)
CLIP["output"]["kernel"] += 0.3


def by_hand(student=STUDENT, clip_params=CLIP, **settings):
    """Logits at t are about the token at t + 1: slices, no padding."""
    cut = student[:, :-1], TEACHER[:, :-1]
    shifted = TOKENS[:, 1:], MASK[:, 1:], SPAN_IDS[:, 1:]
    return mgsr_means(clip_params, *cut, *shifted, **settings)


def weighted(means):
    return 0.7 * means["dac_kl"] + 0.4 * means["sft"] + 1.3 * means["span"]


LABELS = next_token_labels(TOKENS, MASK, SPAN_IDS)


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [None, VOCAB_SIZE])
def test_the_scalar_and_every_metric_equal_the_reference(vocab_size):
    want = by_hand(vocab_size=vocab_size, width=0.03, signal=("prior", 2.0))
    objective = dataclasses.replace(OBJECTIVE, width=0.03, prior_weight=2.0)
    loss, sums = mgsr_loss(
        CLIP, STUDENT, TEACHER, LABELS, objective, vocab_size=vocab_size
    )
    np.testing.assert_allclose(loss, weighted(want), rtol=1e-5)
    assert sums.keys() > want.keys()
    for name, value in want.items():
        mean = sums[name].total / sums[name].count
        np.testing.assert_allclose(mean, value, rtol=1e-5, err_msg=name)
    assert sums["dac_kl"].count == sums["sft"].count == SCORED
    assert sums["span"].count == PAIRS


@pytest.mark.slow
def test_the_gradient_equals_the_reference_and_is_zero_at_unscored_positions():
    # A network at its start has the same limits whatever it reads: the reference,
    # which differentiates through what it reads, is then to be compared.
    start = init_clip_network(jax.random.key(1), num_candidates=K, hidden=4)
    gradient = jax.grad(lambda x: mgsr_loss(start, x, TEACHER, LABELS, OBJECTIVE)[0])(
        STUDENT
    )
    for direction in np.random.default_rng(1).normal(size=(3, B, S, V)):

        def along(step, direction=direction):
            return weighted(by_hand(np.float64(STUDENT) + step * direction, start))

        want = reference.numeric_gradient(along, 0.0)
        np.testing.assert_allclose(np.sum(gradient * direction), want, rtol=1e-4)
    assert not np.any(gradient[UNSCORED])


def test_the_gradient_reaches_the_clip_network():
    def loss(clip_params):
        return mgsr_loss(clip_params, STUDENT, TEACHER, LABELS, OBJECTIVE)[0]

    got = jax.grad(loss)(CLIP)["output"]["bias"]

    def at(bias):
        clip_params = CLIP | {"output": CLIP["output"] | {"bias": bias}}
        return weighted(by_hand(clip_params=clip_params))

    want = reference.numeric_gradient(at, CLIP["output"]["bias"])
    np.testing.assert_allclose(got, want, rtol=1e-3)
    assert np.all(np.abs(want) > 1e-4)


def test_logits_at_unscored_positions_change_nothing():
    tokens = jnp.where(MASK > 0, TOKENS, (TOKENS + 3) % VOCAB_SIZE)
    spoilt = [jnp.where(UNSCORED[..., None], jnp.nan, x) for x in (STUDENT, TEACHER)]
    labels = next_token_labels(tokens, MASK, SPAN_IDS)
    one = mgsr_loss(CLIP, STUDENT, TEACHER, LABELS, OBJECTIVE)
    other = mgsr_loss(CLIP, *spoilt, labels, OBJECTIVE)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_batch_without_scored_positions_is_zero_and_has_no_gradient():
    labels = next_token_labels(TOKENS, jnp.zeros_like(MASK), SPAN_IDS)

    def loss(clip_params, student):
        return mgsr_loss(clip_params, student, TEACHER, labels, OBJECTIVE)[0]

    value, gradients = jax.value_and_grad(loss, (0, 1))(CLIP, STUDENT)
    assert value == 0
    assert not any(np.any(g) for g in jax.tree.leaves(gradients))


def test_labels_are_the_next_tokens():
    np.testing.assert_array_equal(LABELS.tokens[:, :-1], TOKENS[:, 1:])
    np.testing.assert_array_equal(LABELS.where[:, :-1], MASK[:, 1:] > 0)
    np.testing.assert_array_equal(LABELS.span_ids[:, :-1], SPAN_IDS[:, 1:])
    assert not np.any(LABELS.where[:, -1])
    assert np.all(np.asarray(LABELS.span_ids)[:, -1] == -1)
    assert next_token_labels(TOKENS, MASK).span_ids is None


def test_every_token_of_the_mask_is_scored_even_a_stop_token_with_the_padding_id():
    end = padding = 0
    tokens = np.array([[5, 6, end, padding, padding], [5, 6, 7, 8, end]])
    mask = np.array([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]])
    labels = next_token_labels(tokens, mask)
    want = [[1, 1, 0, 0, 0], [0, 0, 0, 1, 0]]
    np.testing.assert_array_equal(labels.where, np.array(want, bool))


def test_a_certain_and_correct_student_has_no_cross_entropy():
    objective = Objective(token=0.0, span=0.0)

    def loss(shift):
        logits = 50 * jax.nn.one_hot(jnp.roll(TOKENS, -shift, axis=1), V)
        return mgsr_loss(CLIP, logits, logits, LABELS, objective)[0]

    np.testing.assert_allclose(loss(1), 0, atol=1e-6)
    assert loss(0) > 10 and loss(2) > 10


def test_labels_that_are_shifted_already_need_no_helper():
    # As EasyDeL has it: unshifted logits and a mask of the tokens to learn.
    batch = dict(input_ids=TOKENS, completion_mask=MASK)
    labels = Labels(batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:] > 0)
    logits = STUDENT[:, :-1], TEACHER[:, :-1]
    loss, sums = mgsr_loss(CLIP, *logits, labels)
    want = by_hand()
    np.testing.assert_allclose(loss, want["dac_kl"] + want["sft"], rtol=1e-5)
    assert sums["sft"].count == SCORED
    # The mask applied to the logits of its own index is another loss.
    misplaced = Labels(TOKENS[:, 1:], MASK[:, :-1] > 0)
    assert abs(mgsr_loss(CLIP, *logits, misplaced)[0] - loss) > 1e-2


def test_with_counts_of_the_whole_step_micro_batches_add_up_exactly():
    whole, _ = mgsr_loss(CLIP, STUDENT, TEACHER, LABELS, OBJECTIVE)
    counts = np.tile(np.float32([SCORED, PAIRS]), (1, 1))
    total = 0.0
    for b in range(B):
        row = slice(b, b + 1)
        labels = next_token_labels(TOKENS[row], MASK[row], SPAN_IDS[row], counts)
        total += mgsr_loss(CLIP, STUDENT[row], TEACHER[row], labels, OBJECTIVE)[0]
    np.testing.assert_allclose(total, whole, rtol=1e-5)


def test_a_schedule_scales_the_weights_by_traced_numbers():
    @jax.jit
    def loss(step):
        scale = {"token": step / 10, "span": 0.5}
        return mgsr_loss(CLIP, STUDENT, TEACHER, LABELS, OBJECTIVE, scale=scale)[0]

    means = by_hand()
    for step in (0, 4):
        want = (
            0.7 * step / 10 * means["dac_kl"]
            + 0.4 * means["sft"]
            + 1.3 * 0.5 * means["span"]
        )
        np.testing.assert_allclose(loss(step), want, rtol=1e-5)
    assert loss._cache_size() == 1


def test_dac_kl_of_a_top_k_teacher_equals_the_dense_one():
    cut = top_k_teacher(TEACHER, K)
    dense, sums = mgsr_loss(CLIP, STUDENT, TEACHER, LABELS)
    loss, _ = mgsr_loss(CLIP, STUDENT, cut, LABELS)
    np.testing.assert_allclose(loss, dense, rtol=1e-5)
    assert sums.keys() >= {"dac_kl", "sft", "lower", "candidate_mass"}


def test_a_part_of_weight_zero_is_not_computed():
    _, sums = mgsr_loss(CLIP, STUDENT, TEACHER, LABELS, Objective(token=0.0, span=0.0))
    assert sums.keys() == {"sft"}
    _, sums = mgsr_loss(CLIP, STUDENT, TEACHER, LABELS, Objective(sft=0.0, span=0.0))
    assert "sft" not in sums and "span" not in sums


def test_evaluation_computes_the_cross_entropy():
    loss, sums = cross_entropy_loss(STUDENT, LABELS, vocab_size=VOCAB_SIZE)
    want = by_hand(vocab_size=VOCAB_SIZE)["sft"]
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert sums["sft"].count == SCORED


@pytest.mark.parametrize(
    "teacher, labels, scale, error",
    [
        (TEACHER, LABELS._replace(span_ids=None), None, "have no span_ids"),
        (top_k_teacher(TEACHER, K), LABELS, None, "expected dense logits"),
        (TEACHER, LABELS, {"spam": 1.0}, r"scale for \['spam'\]; expected names of"),
    ],
)
def test_impossible_combinations_are_errors(teacher, labels, scale, error):
    with pytest.raises(ValueError, match=error):
        mgsr_loss(CLIP, STUDENT, teacher, labels, OBJECTIVE, scale=scale)


def test_a_divergence_of_samples_is_an_error():
    paired = Objective(span=0.0, sample_divergence="reverse_kl")
    with pytest.raises(ValueError, match="counts as ground truth here"):
        mgsr_loss(CLIP, STUDENT, TEACHER, LABELS, paired)


def test_the_loss_of_a_batch_equals_the_trainers_objective():
    """The same rows through `mgsr train`'s sum, whole and in chunks."""
    lengths = ((2, 5), (1, 3), (4, 3))
    rows = tiny.complete(lengths, width=8)
    rows = dataclasses.replace(rows, tokens=rows.tokens % VOCAB_SIZE)
    logits = STUDENT, TEACHER
    mask = np.arange(8) < np.asarray(rows.lengths)[:, None]
    mask &= np.arange(8) >= np.asarray(rows.prompt_lengths)[:, None]
    labels = next_token_labels(rows.tokens, mask, rows.span_ids)
    labels = jax.tree.map(lambda x: x[:, :S], labels)
    loss, sums = mgsr_loss(CLIP, *logits, labels, OBJECTIVE, vocab_size=VOCAB_SIZE)
    assert sums["span"].count > 0
    targets = make_targets(rows, position_weights(rows, OBJECTIVE), OBJECTIVE)
    want, metrics = weighted_sum(
        CLIP, *logits, targets, OBJECTIVE, vocab_size=VOCAB_SIZE
    )
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert sums.keys() == metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-6, err_msg=name)


def test_weights_that_read_a_whole_row_multiply_the_divergence():
    objective = Objective(
        sft=0.0, span=0.0, divergence="forward_kl", token_weights="discrepancy"
    )
    loss, _ = mgsr_loss(CLIP, STUDENT, TEACHER, LABELS, objective)
    where = LABELS.where
    of_student, of_teacher = (
        losses.cross_entropy(x, LABELS.tokens, where=where) for x in (STUDENT, TEACHER)
    )
    gaps = jnp.abs(of_student - of_teacher)
    weights = losses.discrepancy_weights(gaps, where=where)
    want = jnp.sum(weights * losses.forward_kl(STUDENT, TEACHER, where=where)) / SCORED
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    with pytest.raises(ValueError, match="'discrepancy' needs the teacher's whole"):
        mgsr_loss(CLIP, STUDENT, top_k_teacher(TEACHER, K), LABELS, objective)
