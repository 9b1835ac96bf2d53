"""Settings of several teachers: what does not work together is named first."""

import dataclasses

import pytest

from mgsr_jax.data.source_settings import DataSource
from mgsr_jax.data.teacher_names import TeacherNames
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import DataConfig, TrainConfig
from mgsr_jax.training.teacher_config import different_folders, names_for

TWO = {"math": "m", "code": "c"}


def make(teacher=None, data=None, **changes):
    return TrainConfig(
        student="student",
        output="run",
        teacher=TWO if teacher is None else teacher,
        steps=10,
        data=DataConfig(**{"train": "train.jsonl", "valid": "valid.jsonl"} | data)
        if data
        else DataConfig(train="train.jsonl", valid="valid.jsonl"),
        **changes,
    )


def test_several_teachers_work_with_data_and_with_samples():
    make().check()
    make(rollout=RolloutConfig("on", intervention="none")).check()
    make(rollout=RolloutConfig("off")).check()
    make(data=dict(default_teacher="code")).check()
    make(data=dict(train=[DataSource("a.jsonl", teacher="math")])).check()
    make(data=dict(teacher_prompt="{prompt}!")).check()
    assert make().teacher_names == ("math", "code")
    assert make(teacher="folder").teacher_names == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher={}), "teacher={} names no teacher; expected {NAME"),
        (dict(teacher={"a/b": "m"}), "the name 'a/b'; expected letters"),
        (dict(teacher={"a": "gs://m"}), "teacher.a='gs://m' is an address"),
        (
            dict(data=dict(default_teacher="law")),
            "data.default_teacher is 'law'; expected one of math, code",
        ),
        (
            dict(data=dict(train=[DataSource("a.jsonl", teacher="law")])),
            "teacher of the source 'a.jsonl' is 'law'; expected one of math, code",
        ),
        (
            dict(data=dict(valid=[DataSource("b.jsonl", teacher="law")])),
            "teacher of the source 'b.jsonl' is 'law'",
        ),
        (
            dict(teacher="m", data=dict(default_teacher="math")),
            "data.default_teacher is 'math', but there are not several teachers",
        ),
        (
            dict(rollout=RolloutConfig("on", rounds=2)),
            r"intervention='scrg', but one .* several \(math, code\); set it to 'none'",
        ),
        (
            dict(teacher_cache="cache", objective=Objective(span=0.0)),
            r"teacher_cache='cache' holds the output of one teacher.*\(math, code\)",
        ),
    ],
)
def test_what_does_not_work_is_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes).check()


def test_the_best_checkpoint_may_be_that_of_one_teacher():
    objective = Objective(span=0.0, divergence="forward_kl")
    settings = make(validate_every=2, objective=objective)
    named = dataclasses.replace(settings, best_metric="valid/forward_kl/code")
    named.check()
    with pytest.raises(ValueError, match="expected one of .*valid/forward_kl/math"):
        dataclasses.replace(settings, best_metric="valid/forward_kl/law").check()


def test_a_source_s_own_teacher_is_that_of_all_its_records():
    data = DataConfig(train="a.jsonl", default_teacher="code")
    source = DataSource("a.jsonl", teacher="math")
    names = names_for(TWO, data, source)
    assert names == TeacherNames(("math", "code"), always="math", default="code")
    assert names_for("folder", data, source) is None


def test_folders_are_compared_by_the_place_they_are_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    several = {"x": "a", "y": "b", "z": "link", "w": str(tmp_path / "b")}
    assert different_folders(several) == (["a", "b"], (0, 1, 0, 1))
    assert different_folders("a") == (["a"], (0,))
    assert different_folders(None) == ([], ())
