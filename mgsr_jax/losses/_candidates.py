"""DAC-KL's candidates: the K most probable classes of the teacher.

`find_candidates` is the only part of DAC-KL that reads the whole vocabulary.

Logits of 16 bits make many classes of a position equally probable. Nothing here depends
on their order in the vocabulary: equally probable classes have one quantile level, and
where only some of them are among the K, these have the mean of the student's
log-probability over all of them. So a loss that sums log q is the mean over all choices
of the K.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mgsr_jax.losses._logits import clean, clean_pair, same_columns
from mgsr_jax.losses._mesh_axes import Axis
from mgsr_jax.losses._over_vocabulary import over_vocabulary
from mgsr_jax.losses._teacher import TopKTeacher, check_positions, top_k_log_probs
from mgsr_jax.losses._vocabulary import Vocabulary
from mgsr_jax.typing import Leaf


class Candidates(NamedTuple):
    """The teacher's K most probable classes, descending.

    "Equals" are classes with the same teacher logit. Only `student` has a gradient.

    Attributes:
      teacher: the teacher's log-probabilities; -inf for a class that cannot occur.
        [..., K]
      student: the student's, normalised over the whole vocabulary; for equals that are
        not all candidates, the mean over all of them. [..., K]
      student_mean: the student's probability, as the mean over equals; for those that
        are not all candidates the geometric mean. [..., K]
      level: teacher mass of the less probable classes plus half the mass of the equals,
        in units of the mass of all classes that are no targets. [..., K]
      is_target: True for the most probable class and its equals. [..., K]
    """

    teacher: Leaf
    student: Leaf
    student_mean: Leaf
    level: Leaf
    is_target: Leaf


class _Selection(NamedTuple):
    """The K classes of each position, and sums over the classes that equal the last.

    Attributes:
      key: what ties are read from: the teacher's logits, descending. [..., K]
      teacher: log p. [..., K]
      student: log q. [..., K]
      teacher_rest: log of the teacher's mass on classes that are no targets. [..., 1]
      last_equals: number of classes, candidates or not, that equal the last. [..., 1]
      last_log_q: mean of log q over these. [..., 1]
    """

    key: Leaf
    teacher: Leaf
    student: Leaf
    teacher_rest: Leaf
    last_equals: Leaf
    last_log_q: Leaf


def find_candidates(
    student_logits: Float[Array, "*B Vs"],
    teacher: Float[Array, "*B Vt"] | TopKTeacher,
    num_candidates: int,
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> Candidates:
    """The candidates at each position.

    K is `num_candidates`, or the number of classes where there are fewer. The equals of
    a class are those in the vocabulary; for a `TopKTeacher`, those among its classes.

    Raises:
      ValueError: as in `dac_kl`.
    """
    if isinstance(teacher, TopKTeacher):
        return _of_top_k_teacher(
            student_logits, teacher, num_candidates, where, vocab_size, vocab_axis
        )

    def local(
        vocabulary: Vocabulary, student: Array, teacher: Array, where: Array | None
    ) -> _Selection:
        logits = clean_pair(vocabulary, student, teacher, where, vocab_size)
        student, teacher = same_columns(vocabulary, *logits)
        classes = vocab_size or vocabulary.width(teacher)
        return _select(vocabulary, student, teacher, min(num_candidates, classes))

    return _with_levels(
        over_vocabulary(local, vocab_axis, (student_logits, teacher), where)
    )


def _select(
    vocabulary: Vocabulary,
    student: Float[Array, "*B V"],
    teacher: Float[Array, "*B V"],
    k: int,
) -> _Selection:
    """The `k` most probable classes, from logits of the columns of this device."""
    key, indices = vocabulary.top_k(teacher, k)
    largest, smallest = key[..., :1], key[..., -1:]
    is_last = teacher == smallest
    last_equals = vocabulary.sum(is_last.astype(jnp.float32))[..., None]
    # The rest as a sum over the others: 1 - p_1 would leave only rounding.
    others = jnp.where(teacher == largest, -jnp.inf, teacher - largest)
    rest = vocabulary.logsumexp(others)[..., None]
    targets = jnp.sum(key == largest, axis=-1, keepdims=True).astype(jnp.float32)
    targets = jnp.where(largest == smallest, last_equals, targets)
    total = jnp.logaddexp(jnp.log(targets), rest)
    shifted, log_total = _shifted(vocabulary, student)
    sum_of_last = vocabulary.sum(jnp.where(is_last, shifted, 0.0))[..., None]
    return _Selection(
        key=key,
        teacher=key - largest - total,
        student=vocabulary.take(shifted, indices) - log_total,
        teacher_rest=rest - total,
        last_equals=last_equals,
        last_log_q=sum_of_last / last_equals - log_total,
    )


def _shifted(
    vocabulary: Vocabulary, logits: Float[Array, "*B V"]
) -> tuple[Float[Array, "*B V"], Float[Array, "*B 1"]]:
    """Logits minus the largest, and the log of their total: log q is the difference.

    Taken apart, so that large logits cost no precision and sums no array of log q.
    """
    shifted = logits - vocabulary.max(logits)[..., None]
    return shifted, jnp.log(vocabulary.sum(jnp.exp(shifted)))[..., None]


def _of_top_k_teacher(
    student_logits: Float[Array, "*B V"],
    teacher: TopKTeacher,
    num_candidates: int,
    where: Bool[Array, "*B"] | None,
    vocab_size: int | None,
    vocab_axis: Axis,
) -> Candidates:
    """`find_candidates` for a teacher that is already cut to K classes and a tail."""
    check_positions(student_logits, teacher)
    log_p, log_tail, indices = top_k_log_probs(teacher, where)
    order = jnp.argsort(log_p, axis=-1, descending=True)
    log_p, indices = (jnp.take_along_axis(x, order, axis=-1) for x in (log_p, indices))

    def local(
        vocabulary: Vocabulary, student: Array, where: Array | None, indices: Array
    ) -> Array:
        student = clean(vocabulary, student, where, vocab_size)
        shifted, log_total = _shifted(vocabulary, student)
        return vocabulary.take(shifted, indices) - log_total

    log_q = over_vocabulary(local, vocab_axis, (student_logits,), where, indices)
    others = jnp.where(log_p == log_p[..., :1], -jnp.inf, log_p)
    others = jnp.concatenate([others, log_tail[..., None]], axis=-1)
    key = log_p[..., :num_candidates]
    last = log_p == key[..., -1:]
    count = jnp.sum(last, axis=-1, keepdims=True).astype(jnp.float32)
    sum_of_last = jnp.sum(jnp.where(last, log_q, 0.0), axis=-1, keepdims=True)
    selection = _Selection(
        key=key,
        teacher=key,
        student=log_q[..., :num_candidates],
        teacher_rest=Vocabulary().logsumexp(others)[..., None],
        last_equals=count,
        last_log_q=sum_of_last / count,
    )
    return _with_levels(selection)


def _with_levels(selection: _Selection) -> Candidates:
    """The candidates, from the K classes and the sums over the equals of the last."""
    key, log_p, log_q = selection.key, selection.teacher, selection.student
    is_target, is_last = key == key[..., :1], key == key[..., -1:]
    may_clip = (log_p > -jnp.inf) & ~is_target
    rest = jnp.where(may_clip, selection.teacher_rest, 0.0)
    share = jnp.where(may_clip, jnp.exp(log_p - rest), 0.0)
    q = jnp.exp(lax.stop_gradient(log_q))
    values = lax.stop_gradient(jnp.stack([share, q, jnp.ones_like(q)]))
    from_run, after_run = _tails_of_runs(key, values)
    above = from_run[0][..., :1] - from_run[0]
    mass, q_sum, count = from_run - after_run
    is_cut = is_last & (selection.last_equals > count)
    mass = jnp.where(is_cut, selection.last_equals * share, mass)
    # A difference of sums is not exact; without equals the class's own value is.
    mean = jnp.where(count > 1, q_sum / count, q)
    return Candidates(
        teacher=log_p,
        student=jnp.where(is_cut, selection.last_log_q, log_q),
        student_mean=jnp.where(is_cut, jnp.exp(selection.last_log_q), mean),
        level=1.0 - (above + mass / 2),
        is_target=is_target,
    )


def _tails_of_runs(
    key: Float[Array, "*B K"], values: Float[Array, "F *B K"]
) -> tuple[Float[Array, "F *B K"], Float[Array, "F *B K"]]:
    """Sums from the first class of a class's run to the end, and behind its last class.

    A run is a row of equal keys. The values are at least 0, so that the sums fall.
    """
    # The smallest classes are added first, so that their sums are precise.
    axis = key.ndim
    tails = lax.cumsum(values, axis=axis, reverse=True)
    differs = key[..., 1:] != key[..., :-1]
    # From `key`, not from a constant: on an Explicit mesh all need the same sharding.
    edge = key[..., :1] == key[..., :1]
    first = jnp.concatenate([edge, differs], axis=-1)
    last = jnp.concatenate([differs, edge], axis=-1)
    from_run = jnp.where(first, tails, jnp.inf)
    after_run = jnp.where(last, tails - values, 0.0)
    return (
        lax.cummin(from_run, axis=axis),
        lax.cummax(after_run, axis=axis, reverse=True),
    )
