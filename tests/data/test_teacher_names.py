"""Records name their teacher: in a column, for a whole source, or by default."""

import jax
import numpy as np
import pytest
from instruction_data import LONG, TOKENIZER, write

from mgsr_jax.data import dataset
from mgsr_jax.data.batches import eval_batches, train_batches
from mgsr_jax.data.dataset import teachers_of
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.data.forms import recognise
from mgsr_jax.data.mixture import mixed
from mgsr_jax.data.sources import open_source
from mgsr_jax.data.teacher_names import TeacherNames
from mgsr_jax.rows import with_width

NAMES = ("math", "code")


def named(*teachers, column="teacher"):
    """A record for each teacher; None: it has no such column."""
    records = [{"instruction": f"Say {i}.", "output": "Hi."} for i in range(9)]
    pairs = zip(records, teachers, strict=False)
    return [r if name is None else r | {column: name} for r, name in pairs]


def load(tmp_path, records, columns=None, bad=1.0, **settings):
    encoding = Encoding(
        max_prompt_length=200, max_length=300, teachers=TeacherNames(NAMES, **settings)
    )
    return dataset.load(
        write(tmp_path, records),
        TOKENIZER,
        encoding,
        chunker=None,
        columns=columns,
        cache_dir=tmp_path,
        max_bad_fraction=bad,
    )


def test_a_column_names_each_record_s_teacher(tmp_path):
    table, report = load(tmp_path, named("code", "math", "code"))
    assert teachers_of(table).tolist() == [1, 0, 1]
    assert "teacher" in report.form.read and not report.form.unread
    assert dataset.fingerprint(table) != dataset.fingerprint(
        load(tmp_path, named("math", "math", "code"))[0]
    )


def test_the_column_may_have_another_name(tmp_path):
    records = named("code", "math", column="domain")
    table, report = load(tmp_path, records, {"teacher": "domain"}, default="math")
    assert teachers_of(table).tolist() == [1, 0] and "domain" in report.form.read
    with pytest.raises(ValueError, match="columns names 'topic' for teacher"):
        load(tmp_path, records, {"teacher": "topic"}, default="math")


def test_a_default_is_only_for_records_that_name_none(tmp_path):
    table, report = load(tmp_path, named("code", None, "", "math"), default="code")
    assert teachers_of(table).tolist() == [1, 1, 1, 0] and not report.malformed


def test_a_whole_source_may_have_one_teacher_whatever_its_column_holds(tmp_path):
    table, report = load(tmp_path, named("gpt", None, "math"), always="code")
    assert teachers_of(table).tolist() == [1, 1, 1]
    assert report.form.unread == ("teacher",)


def test_records_without_a_known_teacher_are_reported(tmp_path):
    records = named("code", "law", None, ["math"], 3)
    table, report = load(tmp_path, records)
    assert teachers_of(table).tolist() == [1] and report.malformed == 4
    law, none, *others = report.messages
    assert law == "some.jsonl:2: 'teacher' is 'law', expected one of math, code"
    assert none == (
        "some.jsonl:3: no 'teacher', expected one of math, code; name it, or set "
        "data.default_teacher"
    )
    assert ["is ['math']" in others[0], "is 3, expected" in others[1]] == [True, True]
    with pytest.raises(ValueError, match="4 of 5 records are malformed.*is 'law'"):
        load(tmp_path, records, bad=0.5)


def test_a_source_that_names_no_teacher_is_an_error_that_lists_them(tmp_path):
    source = open_source(write(tmp_path, named(None, None)))
    expected = "no column 'teacher', .*; name one of math, code in that column"
    with pytest.raises(ValueError, match=expected):
        recognise(source, teachers=TeacherNames(NAMES))
    for settings in ({"always": "code"}, {"default": "code"}):
        recognise(source, teachers=TeacherNames(NAMES, **settings))


def test_with_one_teacher_the_column_is_not_read(tmp_path):
    file = write(tmp_path, named("gpt-4", "gpt-4"))
    table, report = dataset.load(
        file, TOKENIZER, LONG, chunker=None, cache_dir=tmp_path
    )
    assert report.kept == 2 and report.form.unread == ("teacher",)
    assert "teacher" not in table.column_names and teachers_of(table) is None
    (rows,) = eval_batches(table, 2, widths=[300])
    assert rows.teacher is None and len(jax.tree.leaves(rows)) == 7


@pytest.fixture(scope="module")
def routed(tmp_path_factory):
    """Examples 0 ... 8, of two sources, with the teachers 1 0 0 1 1 0, then 0 0 0."""
    folder = tmp_path_factory.mktemp("routed")
    column = [NAMES[i] for i in (1, 0, 0, 1, 1, 0)]
    first, _ = load(folder, named(*column))
    second, _ = load(folder, named(None, None, None), always="math")
    return mixed([first, second])


def test_every_process_takes_its_share_of_rows_ordered_by_teacher(routed):
    """Two processes hold halves of two micro-batches of two rows."""
    options = dict(widths=[300], seed=3)
    whole = train_batches(routed, 4, **options)
    shares = [
        train_batches(routed, 4, share=np.array(own), **options)
        for own in ([0, 2], [1, 3])
    ]
    orders = set()
    for _ in range(6):
        rows = next(whole)
        parts = [next(share) for share in shares]
        assert (np.diff(rows.teacher) >= 0).all()
        np.testing.assert_array_equal(
            rows.teacher, teachers_of(routed)[rows.example.tolist()]
        )
        for part, own in zip(parts, ([0, 2], [1, 3]), strict=True):
            np.testing.assert_array_equal(part.teacher, rows.teacher[own])
            np.testing.assert_array_equal(part.example, rows.example[own])
        orders.add(tuple(rows.teacher.tolist()))
    assert len(orders) > 1


def test_the_order_by_teacher_holds_the_same_examples(routed):
    plain = routed.remove_columns("teacher")
    options = dict(widths=[300], seed=3)
    for ours, theirs in zip(
        train_batches(routed, 4, epochs=2, **options),
        train_batches(plain, 4, epochs=2, **options),
        strict=True,
    ):
        assert sorted(ours.example.tolist()) == sorted(theirs.example.tolist())


@pytest.mark.parametrize("widths", [(300,), (100, 300)])
def test_validation_reads_one_teacher_after_the_other(routed, widths):
    """Rows that fill up the last batch have none."""
    batches = list(eval_batches(routed, 4, widths=widths))
    teachers = np.concatenate([rows.teacher for rows in batches])
    assert teachers.tolist() == [0] * 6 + [1] * 3 + [-1] * 3
    examples = np.concatenate([rows.example for rows in batches])
    assert sorted(examples.tolist()) == [-1] * 3 + list(range(9))
    assert with_width(batches[0], 310).teacher.tolist() == [0] * 4
