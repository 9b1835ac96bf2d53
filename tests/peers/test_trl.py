"""Our divergences equal those of TRL, value and gradient: `make test-trl`.

TRL takes labels, -100 where nothing is scored, and returns one number. Its one function
has the KLs as special cases: beta 0 is KL(teacher || student), beta 1 is KL(student ||
teacher). In between beta weighs the teacher, as in `jensen_shannon`, which goes to 0 at
the ends instead.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="peers are compared by `make test-trl`")
pytest.importorskip("trl", reason="peers are compared by `make test-trl`")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs: experimental modules, deprecations
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.sdpo import loss_utils

from mgsr_jax import losses  # noqa: E402

B, T, V = 3, 7, 50
LENGTHS = np.array([7, 2, 0])  # ragged; one row where nothing is scored
WHERE = np.arange(T) < LENGTHS[:, None]


def normal(seed, scale=3.0):
    x = np.random.default_rng(seed).normal(0, scale, (B, T, V))
    return x.astype(np.float32)


def theirs(student, teacher, function):
    """TRL in float64, on the same float32 logits: (value, gradient)."""
    student = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    value = function(student, torch.tensor(teacher, dtype=torch.float64))
    value.backward()
    return value.item(), student.grad.numpy()


def ours(student, teacher, loss, **numbers):
    def mean(student):
        values = loss(student, teacher, where=jnp.asarray(WHERE), **numbers)
        return losses.masked_mean(values, jnp.asarray(WHERE))

    return jax.value_and_grad(mean)(jnp.asarray(student))


def check(got, expected):
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    # Of the largest one: float32 against float64, and an entry is a difference of terms
    # that may be far larger than itself, at beta 0.1 for all of them.
    scale = np.abs(expected[1]).max()
    assert scale > 1e-4
    np.testing.assert_allclose(got[1], expected[1], rtol=0, atol=5e-6 * scale)
    assert not np.asarray(got[1])[~WHERE].any() and not expected[1][~WHERE].any()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    "beta, loss, numbers",
    [
        (0, losses.forward_kl, {}),
        (1, losses.reverse_kl, {}),
        (0.1, losses.jensen_shannon, {"beta": 0.1}),
        (0.5, losses.jensen_shannon, {"beta": 0.5}),
        (0.9, losses.jensen_shannon, {"beta": 0.9}),
    ],
)
def test_gkd(beta, loss, numbers, temperature):
    student, teacher = normal(0), normal(1)
    labels = torch.tensor(np.where(WHERE, 5, -100))

    def function(student, teacher):
        return GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=labels, beta=beta, temperature=temperature
        )

    got = ours(student, jnp.asarray(teacher), loss, temperature=temperature, **numbers)
    check(got, theirs(student, teacher, function))


def test_gkd_divides_by_the_same_count():
    """Its reduction for accumulated micro-batches is our sum over the global count."""
    student, teacher = normal(0), normal(1)
    labels = torch.tensor(np.where(WHERE, 5, -100))
    expected = GKDTrainer.generalized_jsd_loss(
        torch.tensor(student, dtype=torch.float64),
        torch.tensor(teacher, dtype=torch.float64),
        labels=labels,
        num_items_in_batch=40,
    )
    where = jnp.asarray(WHERE)
    values = losses.jensen_shannon(*map(jnp.asarray, (student, teacher)), where=where)
    total, count = losses.masked_sum(values, where)
    np.testing.assert_allclose(total / 40, expected.item(), rtol=1e-6)
    assert count == LENGTHS.sum()


def test_top_k_with_a_tail():
    """The same classes and one for the rest; ours are the teacher's most probable."""
    student, teacher = normal(0), normal(1)
    held = losses.top_k_teacher(jnp.asarray(teacher), 8)
    indices = torch.tensor(np.asarray(held.indices), dtype=torch.int64)

    def function(student, teacher):
        log_q, log_p = (
            loss_utils.add_tail_bucket(
                torch.gather(torch.log_softmax(x, dim=-1), -1, indices)
            )
            for x in (student, teacher)
        )
        values = loss_utils.compute_divergence(log_q, log_p, alpha=0.0)
        return values[torch.tensor(WHERE)].mean()

    got = ours(student, held, losses.forward_kl_top_k)
    check(got, theirs(student, teacher, function))
