"""Teacher and student on the first batch: numbers, meshes, and what is printed."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
import tiny

from mgsr_jax import sharding
from mgsr_jax.routed_teachers import RoutedTeachers
from mgsr_jax.rows import next_token_view
from mgsr_jax.training.first_batch import (
    compare_first_batch,
    describe,
    make_comparison,
)

ROWS = tiny.complete([(2, 5), (1, 9), (3, 1), (4, 6)] * 2, width=12)
STUDENT = tiny.llama(0, scale=2.0, vocab_size=32)
TEACHER = tiny.llama(1, scale=2.0, vocab_size=36)
VALUES = {
    "kl": 1.0,
    "teacher_loss": 2.0,
    "teacher_entropy": 1.5,
    "student_loss": 3.0,
    "student_entropy": 2.5,
}


def compare(student, teacher, rows=ROWS, *, mesh=None, chunk_size=64):
    """Means by name; `teacher` may be None."""
    model, params = student
    teacher_model, teacher_params = teacher or (None, None)
    comparison = make_comparison(
        model,
        teacher_model,
        vocab_size=tiny.VOCAB,
        dtype=jnp.float32,
        chunk_size=chunk_size,
    )
    if mesh is None:
        return compare_first_batch(
            comparison, {"student": params}, teacher_params, [rows]
        )
    with jax.set_mesh(mesh):
        places = [
            sharding.shardings(mesh, m.partition_rules, p)
            for m, p in ((model, params), (teacher_model, teacher_params))
        ]
        params, teacher_params = jax.device_put((params, teacher_params), tuple(places))
        batch = sharding.put_batch(mesh, jax.tree.map(np.asarray, rows))
        return compare_first_batch(
            comparison, {"student": params}, teacher_params, [batch]
        )


def reference(student, teacher):
    """The same in float64 numpy, over the whole vocabulary at once."""
    view = jax.tree.map(np.asarray, next_token_view(ROWS))
    log_probs = {}
    for name, (model, params) in (("student", student), ("teacher", teacher)):
        values = tiny.log_probs(model, params, view.inputs)[..., : tiny.VOCAB]
        log_probs[name] = values - np.log(np.exp(values).sum(-1, keepdims=True))
    means = {}
    for name, values in log_probs.items():
        labels = np.take_along_axis(values, view.labels[..., None], -1)[..., 0]
        means[f"{name}_loss"] = -labels[view.where].mean()
        entropy = -(np.exp(values) * values).sum(-1)
        means[f"{name}_entropy"] = entropy[view.where].mean()
    p, q = log_probs["teacher"], log_probs["student"]
    means["kl"] = (np.exp(p) * (p - q)).sum(-1)[view.where].mean()
    return means


@pytest.mark.parametrize("chunk_size", [64, 3])
def test_the_means_are_those_of_whole_distributions(chunk_size):
    found = compare(STUDENT, TEACHER, chunk_size=chunk_size)
    expected = reference(STUDENT, TEACHER)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4, 2, 1), (2, 2, 2)])
def test_a_mesh_does_not_change_the_means(sizes):
    """A tensor axis splits both vocabularies."""
    models = [
        tiny.llama(i, scale=2.0, vocab_size=32, num_key_value_heads=4) for i in (0, 1)
    ]
    one, many = compare(*models), compare(*models, mesh=sharding.make_mesh(*sizes))
    assert one.keys() == many.keys()
    for name, value in one.items():
        np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)


def test_a_student_that_is_its_teacher_has_no_kl():
    found = compare(STUDENT, STUDENT)
    assert abs(found["kl"]) < 1e-6
    assert found["teacher_loss"] == pytest.approx(found["student_loss"], rel=1e-6)


def test_without_a_teacher_only_the_student_is_read():
    found = compare(STUDENT, None)
    whole = compare(STUDENT, TEACHER)
    names = ("student_loss", "student_entropy")
    assert found == pytest.approx({name: whole[name] for name in names}, rel=1e-6)
    (line,) = describe(found, tiny.VOCAB)
    assert "student loss" in line and "teacher" not in line


def test_a_batch_without_references_says_so():
    prompts = tiny.prompts(width=12)
    found = compare(STUDENT, TEACHER, prompts)
    assert found == {}
    (line,) = describe(found, tiny.VOCAB)
    assert "it has no references" in line


def test_samples_are_compared_without_a_word_about_references():
    """A sample is more probable to the student that drew it than to its teacher."""
    (line,) = describe(VALUES | {"teacher_loss": 3.1}, 1000, sampled=True)
    assert line.startswith("first responses of the student, nats per token: KL")


def test_a_good_pair_has_one_line():
    (line,) = describe(VALUES, 1000)
    for part in ("KL(teacher || student) 1.0000", "teacher loss 2.0000", "2.5000"):
        assert part in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_loss": 3.1}, "reads the references of the first batch worse"),
        ({"kl": math.log(1000) - 1.4}, "above 5.4078, which a uniform distribution"),
    ],
)
def test_a_wrong_template_is_warned_of(changes, message):
    _, line = describe(VALUES | changes, 1000)
    assert line.startswith("warning: ") and message in line


def test_several_teachers_have_a_line_each_and_warnings_of_their_own():
    good = {"kl": 1.0, "teacher_loss": 2.0, "teacher_entropy": 2.0}
    good |= {"student_loss": 3.0, "student_entropy": 2.5}
    bad = good | {"teacher_loss": 4.0}
    values = good | {f"{n}/math": v for n, v in good.items()}
    values |= {f"{n}/code": v for n, v in bad.items()}
    whole, math_, code, warning = describe(values, 50)
    assert whole.startswith("first batch, nats per token: KL(teacher || student) 1.0")
    assert math_.startswith("first batch, rows of math, nats per token: KL")
    assert code.startswith("first batch, rows of code, nats per token: KL")
    assert "teacher code reads the references" in warning


@pytest.mark.slow
def test_the_rows_of_each_teacher_are_compared_with_it():
    """The means over the rows of one teacher are those of these rows alone."""
    route = np.arange(8) % 2
    student, first, second = tables.logits(0), tables.logits(1), tables.logits(4)
    table, rows = tables.Table(), tables.ROWS
    teacher = RoutedTeachers(("a", "b"), (table, tables.Table("other")), (0, 1))
    settings = dict(vocab_size=tables.VOCAB, dtype=jnp.float32, chunk_size=64)
    routed = dataclasses.replace(rows, teacher=jnp.asarray(route))
    params = {"student": student}
    several = compare_first_batch(
        make_comparison(table, teacher, **settings), params, (first, second), [routed]
    )
    for i, (name, logits) in enumerate((("a", first), ("b", second))):
        own = jax.tree.map(lambda x, i=i: x[route == i], rows)
        one = make_comparison(table, table, **settings)
        for key, value in compare_first_batch(one, params, logits, [own]).items():
            assert several[f"{key}/{name}"] == pytest.approx(value, rel=1e-6)
