"""Exposure bias: how much worse a student is on its own prefixes than on the teacher's.

The measure is ExAccErr of Arora et al. 2022, as MiniLLM (arXiv 2306.08543, section 3.3)
uses it.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float

from mgsr_jax.evaluation.teacher_forced import response_kl
from mgsr_jax.rows import Rows
from mgsr_jax.sharding import fetch_whole
from mgsr_jax.typing import Model, Params


def exposure_bias(
    student: Model,
    student_params: Params,
    teacher: Model,
    teacher_params: Params,
    student_samples: Iterable[Rows],
    teacher_samples: Iterable[Rows],
    *,
    vocab_size: int | None = None,
) -> float:
    """ExAccErr of the student in percent, from sampled responses to the same prompts.

    Args:
      student_samples: batches of rows whose responses the student sampled, all of one
        width. Rows without a response count for nothing.
      teacher_samples: the same of the teacher.
      vocab_size: columns of the logits at or beyond it are masked.

    Raises:
      ValueError: see `excess_accumulated_error`.
    """

    def kl_on(samples: Iterable[Rows]) -> tuple[np.ndarray, np.ndarray]:
        models = student, student_params, teacher, teacher_params
        batches = [
            fetch_whole(response_kl(*models, rows, vocab_size=vocab_size))
            for rows in samples
        ]
        kl, where = zip(*batches, strict=True)
        return np.concatenate(kl), np.concatenate(where)

    return excess_accumulated_error(*kl_on(student_samples), *kl_on(teacher_samples))


def excess_accumulated_error(
    student_kl: Float[np.ndarray, "B T"],
    student_where: Bool[np.ndarray, "B T"],
    teacher_kl: Float[np.ndarray, "C T"],
    teacher_where: Bool[np.ndarray, "C T"],
) -> float:
    """Exposure bias in percent; 0 means none.

    ExAccErr = 100 (sum_t e_t / sum_t r_t - 1). Here e_t is the mean KL(teacher ||
    student) at the t-th token of the responses that the student sampled, and r_t the
    same mean over the responses that the teacher sampled. Positions that only one of
    the two sets reaches are left out.

    Args:
      student_kl: KL(teacher || student) on the student's responses in nats; t counts
        from the first token of the response.
      student_where: which of them are positions of a response.
      teacher_kl: the same on responses that the teacher sampled.
      teacher_where: which of them are positions of a response.

    Raises:
      ValueError: no position exists in both sets, or the student equals the teacher on
        the teacher's responses.
    """
    common = student_where.any(0) & teacher_where.any(0)

    def accumulated(kl: np.ndarray, where: np.ndarray) -> float:
        sums = np.where(where, kl, 0.0).sum(0)
        return float((sums[common] / where.sum(0)[common]).sum())

    own_prefixes = accumulated(student_kl, student_where)
    teacher_prefixes = accumulated(teacher_kl, teacher_where)
    if not common.any() or teacher_prefixes <= 0.0:
        raise ValueError(
            "exposure bias is undefined: got no position that responses of both models "
            "reach, or a student that equals the teacher on the teacher's responses; "
            "give two models that differ and prompts that both respond to"
        )
    return 100.0 * (own_prefixes / teacher_prefixes - 1.0)
