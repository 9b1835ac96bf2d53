"""Signals of DAC-KL's clip network: the loss itself and a term for its limits.

Every signal is a function of the mask w and of both distributions. The student's
gradient is that of the divergence to the clipped teacher, whatever the signal.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, ScalarLike

from mgsr_jax.losses._clip_network import LOWER_START, UPPER_START

Normalization = Literal["teacher", "none"]


class ClipPrior(NamedTuple):
    """The network minimises the student's loss and stays near its start.

    DAC-KL_t + weight ((lower - 0.1)^2 + (upper - 0.98)^2)

    Our choice; with weight 0 there is only the loss, as in the paper.

    Attributes:
      weight: strength of the pull on the limits towards their start values.
    """

    weight: ScalarLike = 10.0


class ClipFidelity(NamedTuple):
    """The network minimises the distance of the clipped teacher to both models.

    KL(p_hat || q) + weight KL(p_hat || p)

    For a hard mask the second divergence is -log of the kept mass. Without a network,
    over all distributions, the minimum is at p_hat = q^(1/(1+weight))
    p^(weight/(1+weight)), up to a constant factor. Our choice.

    Attributes:
      weight: beta. A larger one keeps more of the teacher.
    """

    weight: ScalarLike = 1.0


class ClipUnnormalised(NamedTuple):
    """The network minimises the unnormalised divergence, without a term for its limits.

    sum_k w_k p_k (log p_k - log q_k)

    MGSR, arXiv 2407.10068, as one referee reads it. A hard mask is best where it keeps
    only classes that the student overrates, p_k < q_k.
    """


ClipSignal = ClipPrior | ClipFidelity | ClipUnnormalised


def divergence(
    log_wp: Float[Array, "*B K"],
    log_p: Float[Array, "*B K"],
    log_q: Float[Array, "*B K"],
    normalization: Normalization,
) -> Float[Array, "*B"]:
    """KL(p_hat || q) of the clipped teacher p_hat = w p / sum w p, or sum w p log(p/q).

    Raises:
      ValueError: `normalization` is unknown.
    """
    if normalization == "teacher":
        log_weights = log_target = jax.nn.log_softmax(log_wp, axis=-1)
    elif normalization == "none":
        log_weights, log_target = log_wp, log_p
    else:
        raise ValueError(
            f"normalization={normalization!r}; expected 'teacher' (a true KL to the "
            "clipped teacher) or 'none'"
        )
    weights = jnp.exp(log_weights)
    # Selected before the product: the gradient of 0 * inf would be nan.
    ratio = jnp.where(weights > 0, log_target - log_q, 0.0)
    return jnp.sum(weights * ratio, axis=-1)


def with_signal(
    signal: ClipSignal,
    limits: tuple[Float[Array, "*B"], Float[Array, "*B"]],
    log_wp: Float[Array, "*B K"],
    log_p: Float[Array, "*B K"],
    log_q: Float[Array, "*B K"],
    normalization: Normalization,
) -> Float[Array, "*B"]:
    """The student's divergence, with the gradient of `signal` for the limits.

    Raises:
      ValueError: `normalization` is unknown, or "none" with `ClipFidelity`.
    """
    if isinstance(signal, ClipUnnormalised) and normalization == "teacher":
        # Two losses in one: the student's, and the network's with a value of 0.
        loss = divergence(lax.stop_gradient(log_wp), log_p, log_q, "teacher")
        network = divergence(log_wp, log_p, lax.stop_gradient(log_q), "none")
        finite = jnp.isfinite(network)
        return loss + jnp.where(finite, network - lax.stop_gradient(network), 0.0)
    loss = divergence(log_wp, log_p, log_q, normalization)
    if isinstance(signal, ClipFidelity):
        if normalization != "teacher":
            raise ValueError(
                f"normalization={normalization!r} with ClipFidelity, which compares "
                "the renormalised teacher; expected 'teacher'"
            )
        return loss + signal.weight * divergence(log_wp, log_p, log_p, "teacher")
    if isinstance(signal, ClipPrior):
        lower, upper = limits
        prior = jnp.square(lower - LOWER_START) + jnp.square(upper - UPPER_START)
        return loss + signal.weight * prior
    return loss
