"""Excess accumulated error."""

import numpy as np
import pytest
import tiny

from mgsr_jax.evaluation.exposure_bias import excess_accumulated_error, exposure_bias
from mgsr_jax.evaluation.teacher_forced import response_kl


def test_excess_accumulated_error_equals_the_value_by_hand():
    student_kl = np.array([[1.0, 2.0, 9.0], [3.0, 9.0, 9.0]], np.float32)
    student_where = np.array([[True, True, True], [True, False, False]])
    teacher_kl = np.array([[1.0, 1.0, 9.0]], np.float32)
    teacher_where = np.array([[True, True, False]])
    error = excess_accumulated_error(
        student_kl, student_where, teacher_kl, teacher_where
    )
    assert error == pytest.approx(100 * ((2 + 2) / (1 + 1) - 1))
    same = excess_accumulated_error(
        teacher_kl, teacher_where, teacher_kl, teacher_where
    )
    assert same == 0.0
    with pytest.raises(ValueError, match="exposure bias is undefined"):
        excess_accumulated_error(
            student_kl, student_where, teacher_kl * 0, teacher_where
        )


def test_exposure_bias_compares_all_batches_of_both_models():
    student, teacher = tiny.llama(scale=3.0), tiny.llama(7, scale=3.0)
    student_rows, teacher_rows = tiny.complete(seed=1), tiny.complete(seed=2)
    found = exposure_bias(
        *student,
        *teacher,
        [student_rows, teacher_rows],
        [teacher_rows],
        vocab_size=tiny.VOCAB - 3,
    )
    kl = {
        name: map(np.asarray, response_kl(*student, *teacher, rows, vocab_size=26))
        for name, rows in (("student", student_rows), ("teacher", teacher_rows))
    }
    student_kl, student_where = kl["student"]
    teacher_kl, teacher_where = kl["teacher"]
    expected = excess_accumulated_error(
        np.concatenate([student_kl, teacher_kl]),
        np.concatenate([student_where, teacher_where]),
        teacher_kl,
        teacher_where,
    )
    assert found == pytest.approx(expected) and abs(found) > 1.0
    assert exposure_bias(*student, *teacher, [teacher_rows], [teacher_rows]) == 0.0


def test_exposure_bias_of_a_student_that_equals_the_teacher_raises():
    model, rows = tiny.llama(scale=3.0), tiny.complete()
    with pytest.raises(ValueError, match="a student that equals the teacher"):
        exposure_bias(*model, *model, [rows], [rows])
