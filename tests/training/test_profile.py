"""Traces of a run's steps, and the names of its parts in them."""

import io
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from rich.console import Console

from mgsr_jax.objective import Objective
from mgsr_jax.train_step import init_state, make_train_step
from mgsr_jax.training.optimizer import OptimizerConfig, make_optimizer
from mgsr_jax.training.profile import PROFILE_FOLDER, ProfileConfig, StepTrace
from mgsr_jax.training.trainer import train


def files(folder):
    return sorted(path.name for path in (folder / PROFILE_FOLDER).rglob("*.xplane.pb"))


def test_a_trace_begins_and_ends_with_its_steps(tmp_path):
    trace = StepTrace(ProfileConfig(steps=2, start=3), tmp_path)
    ended = []
    for step in range(1, 7):
        trace.before(step)
        result = jnp.ones(()) + step
        if trace.after(step, result):
            ended.append(step)
            assert len(files(tmp_path)) == 1
        assert trace.is_open == (step == 3)
    assert ended == [4]


def test_a_run_that_ends_within_its_trace_writes_it(tmp_path):
    trace = StepTrace(ProfileConfig(steps=50, start=2), tmp_path)
    trace.before(2)
    assert trace.after(2, jnp.ones(()), last=True) and len(files(tmp_path)) == 1


def test_without_steps_nothing_is_traced(tmp_path):
    trace = StepTrace(ProfileConfig(), tmp_path)
    trace.before(10)
    assert not trace.is_open and not trace.after(10, jnp.ones(()))


@pytest.mark.parametrize("settings", [dict(steps=-1), dict(steps=1, start=0)])
def test_impossible_steps_are_refused(settings):
    with pytest.raises(ValueError, match=r"profile\.(steps|start) must be"):
        ProfileConfig(**settings).check()


def test_a_trace_beyond_the_run_s_end_is_refused():
    ProfileConfig(start=9).check_start(5)  # nothing is traced
    ProfileConfig(steps=3, start=5).check_start(5)
    with pytest.raises(ValueError, match="profile.start=6, but the run ends with s"):
        ProfileConfig(steps=3, start=6).check_start(5)


def test_the_parts_of_a_step_have_names():
    model, params = tiny.llama(0)
    teacher, teacher_params = tiny.llama(1)
    optimizer = make_optimizer(OptimizerConfig(), 5)
    step = make_train_step(
        model, teacher, optimizer, Objective(divergence="forward_kl")
    )
    state = init_state({"student": params}, optimizer, 0)
    rows = tiny.complete([(2, 5), (3, 4)], width=8)
    text = jax.jit(step).lower(state, teacher_params, (rows,)).compile().as_text()
    named = " ".join(re.findall(r'op_name="([^"]*)"', text))
    for name in ("student", "teacher", "loss"):  # forwards and backwards
        assert f"jvp({name})/" in named
    assert (
        "transpose(jvp(student))/" in named and "transpose(jvp(teacher))" not in named
    )
    assert "jit(_step)/update/" in named


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning")
def test_a_run_writes_the_trace_that_its_settings_name(tmp_path):
    project, output = tiny.project(tmp_path), io.StringIO()
    settings = tiny.train_config(
        project,
        "run",
        objective=Objective(token=0.0, span=0.0),
        steps=3,
        profile=ProfileConfig(steps=1, start=2),
    )
    train(settings, console=Console(file=output, width=500))
    folder = project / "run"
    assert f"trace: {folder / PROFILE_FOLDER}" in output.getvalue()
    assert len(files(folder)) == 1
