"""How a divergence of two distributions is evaluated at every position.

A divergence here is a function of the log-probabilities of teacher and student over the
same columns. Only `jitted_per_token` is compiled: the public losses and `per_token` run
before it, where a Python number is not yet traced and can be checked.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from mgsr_jax.losses._logits import clean_pair, same_columns, zero_where_masked
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._vocabulary import Vocabulary

Divergence = Callable[..., Float[Array, "*B"]]
"""A function (vocabulary, log_p [..., V], log_q [..., V], *numbers) -> [...]."""


def per_token(
    divergence: Divergence,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    temperature: ScalarLike,
    vocab_size: int | None,
    vocab_axis: Axis,
    *numbers: ScalarLike,
) -> Float[Array, "*B"]:
    """`divergence(vocabulary, log_p, log_q, *numbers)` at every scored position.

    Raises:
      ValueError: `temperature` is a Python number that is not above 0.
    """
    check_temperature(temperature)
    return jitted_per_token(
        divergence,
        student_logits,
        teacher_logits,
        where,
        temperature,
        vocab_size,
        vocab_axis,
        *numbers,
    )


@jax.jit(static_argnames=("divergence", "vocab_size", "vocab_axis"))
def jitted_per_token(
    divergence: Divergence,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    temperature: ScalarLike,
    vocab_size: int | None,
    vocab_axis: Axis,
    *numbers: ScalarLike,
) -> Float[Array, "*B"]:
    """The compiled part of `per_token`."""

    def local(
        vocabulary: Vocabulary,
        student: Array,
        teacher: Array,
        where: Array | None,
        temperature: ScalarLike,
        *numbers: ScalarLike,
    ) -> Array:
        log_p, log_q = log_probs_of_both(
            vocabulary, student, teacher, where, temperature, vocab_size
        )
        values = (jnp.asarray(number, jnp.float32) for number in numbers)
        return divergence(vocabulary, log_p, log_q, *values)

    logits = (student_logits, teacher_logits)
    values = over_vocabulary(local, vocab_axis, logits, where, temperature, *numbers)
    return zero_where_masked(values, where)


def log_probs_of_both(
    vocabulary: Vocabulary,
    student_logits: Float[Array, "*B Vs"],
    teacher_logits: Float[Array, "*B Vt"],
    where: Bool[Array, "*B"] | None,
    temperature: ScalarLike,
    vocab_size: int | None,
) -> tuple[Float[Array, "*B V"], Float[Array, "*B V"]]:
    """(log p, log q) over the same columns; the teacher's p has no gradient."""
    logits = clean_pair(vocabulary, student_logits, teacher_logits, where, vocab_size)
    student, teacher = same_columns(vocabulary, *logits)
    log_p = vocabulary.log_softmax(teacher / temperature)
    return log_p, vocabulary.log_softmax(student / temperature)


def check_temperature(temperature: ScalarLike, name: str = "temperature") -> None:
    """Raise ValueError if a Python number is not above 0; traced values pass."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"{name}={temperature}; expected a number above 0")


def check_fraction(name: str, number: ScalarLike) -> None:
    """Raise ValueError if a Python number is not in 0..1; traced values pass."""
    if isinstance(number, int | float) and not 0 <= number <= 1:
        raise ValueError(f"{name}={number}; expected a number from 0 to 1")
