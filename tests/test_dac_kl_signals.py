"""The meta-gradient of examples/dac_kl_signals.py against differences."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.two_distributions import normal

from mgsr_jax import losses

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def signals():
    sys.path.insert(0, str(EXAMPLES))
    spec = importlib.util.spec_from_file_location(
        "dac_kl_signals", EXAMPLES / "dac_kl_signals.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(EXAMPLES))


def test_the_meta_gradient_is_the_change_of_the_held_out_loss_per_step(signals):
    """The student is one matrix; central differences are the reference."""
    features, held_features = normal((6, 3)), normal((5, 3), seed=1)
    teacher, held_teacher = normal((6, 12), seed=2), normal((5, 12), seed=3)
    student = normal((3, 12), seed=4, scale=0.3)
    network = losses.init_clip_network(jax.random.key(0), num_candidates=12, hidden=4)
    network["output"]["kernel"] += 0.3

    def loss(student, network):
        signal = losses.ClipPrior(0.0)
        logits = features @ student
        out = losses.dac_kl(network, logits, teacher, width=0.1, signal=signal)
        return jnp.mean(out.loss)

    def held_out(student):
        return jnp.mean(losses.forward_kl(held_features @ student, held_teacher))

    got = jax.jit(lambda s, n: signals.meta_gradient(loss, held_out, s, n))(
        student, network
    )
    of_student = jax.jit(jax.grad(loss))
    direction = np.asarray(jax.grad(held_out)(student), np.float64)
    rng = np.random.default_rng(0)
    for name in ("kernel", "bias"):
        # -d(v . g)/dphi in a random direction of phi, by central differences.
        change = jnp.asarray(rng.normal(0, 1, network["output"][name].shape), "f")
        ends = [
            {**network, "output": {**network["output"], name: moved}}
            for moved in (
                network["output"][name] + 0.02 * change,
                network["output"][name] - 0.02 * change,
            )
        ]
        up, down = (
            np.sum(direction * np.asarray(of_student(student, end), np.float64))
            for end in ends
        )
        want = -(up - down) / 0.04
        assert abs(want) > 1e-4
        np.testing.assert_allclose(
            float(jnp.sum(got["output"][name] * change)), want, rtol=2e-2
        )


def test_a_step_against_the_meta_gradient_helps_the_held_out_loss(signals):
    """The sign: with the moved network a step of the student lowers the loss more."""
    teacher, student = normal((6, 12), seed=2), normal((6, 12), seed=4, scale=0.3)
    network = losses.init_clip_network(jax.random.key(0), num_candidates=12, hidden=4)

    def loss(student, network):
        out = losses.dac_kl(
            network, student, teacher, width=0.1, signal=losses.ClipPrior(0.0)
        )
        return jnp.sum(out.loss)

    def held_out(student):
        return jnp.sum(losses.forward_kl(student, teacher))

    def after_a_step(network):
        return held_out(student - 0.1 * jax.grad(loss)(student, network))

    gradient = signals.meta_gradient(loss, held_out, student, network)
    moved = jax.tree.map(lambda x, g: x - 1.0 * g, network, gradient)
    assert after_a_step(moved) < after_a_step(network) - 1e-5


def test_a_limit_that_does_not_vary_has_no_correlation(signals):
    entropy = np.array([0.1, 0.5, 2.0])
    assert signals.correlation(np.full(3, 0.1), entropy) is None
    assert signals.correlation(2 * entropy + 1, entropy) == pytest.approx(1)
