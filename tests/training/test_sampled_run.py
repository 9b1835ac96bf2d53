"""Runs on the student's samples: divergences that read them, horizons, many samples."""

import dataclasses
import io
import json
import math
import shutil

import pytest
import tiny
from rich.console import Console

from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import MeshConfig
from mgsr_jax.training.trainer import train

pytestmark = [
    pytest.mark.exhaustive,  # whole runs
    pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


def config(project, name, objective, **changes):
    settings = dict(
        teacher=str(project / "teacher"),
        steps=3,
        objective=objective,
        rollout=RolloutConfig("on", intervention="none"),
        mesh=MeshConfig(2, 2, 2),
        log_every=1,
    )
    return tiny.train_config(project, name, **settings | changes)


def run(settings):
    """Run, and return the metrics of the steps."""
    train(settings, console=Console(file=io.StringIO()))
    path = f"{settings.output}/metrics.jsonl"
    with open(path, encoding="utf-8") as lines:
        return [line for line in map(json.loads, lines) if "train/loss" in line]


def test_a_run_on_samples_learns_on_a_mesh_of_three_axes(project):
    objective = Objective(
        sft=0.0,
        span=0.0,
        divergence="sampled_reverse_kl",
        token_weights="discrepancy",
    )
    steps = run(config(project, "weighted", objective))
    assert len(steps) == 3
    for line in steps:
        assert math.isfinite(line["train/loss"]) and line["train/gradient_norm"] > 0
        assert line["rollout/student_share"] == 1 and "train/sft" not in line
        # The first tokens of a row count up to half more.
        divergence = line["train/sampled_reverse_kl"]
        assert line["train/loss"] != pytest.approx(divergence, rel=1e-3)


@pytest.mark.parametrize("policy", ["off", "on"])
def test_a_student_learns_from_itself_with_the_reference_in_the_prompt(project, policy):
    """OPSD: without the hint teacher and student would be equal at the first step."""
    settings = config(
        project,
        f"hinted {policy}",
        Objective(sft=0.0, span=0.0, divergence="reverse_kl"),
        teacher=str(project / "student"),
        rollout=RolloutConfig(policy, intervention="none"),
    )
    data = dataclasses.replace(
        settings.data,
        teacher_prompt="{prompt} An answer: {reference} Yours:",
        max_teacher_prompt_length=72,
    )
    steps = run(dataclasses.replace(settings, data=data, validate_every=3))
    assert len(steps) == 3 and steps[0]["train/reverse_kl"] > 1e-3
    with open(f"{project}/hinted {policy}/metrics.jsonl", encoding="utf-8") as lines:
        valid = [
            line["valid/reverse_kl"]
            for line in map(json.loads, lines)
            if "valid/reverse_kl" in line
        ]
    assert valid[0] > 1e-3


def test_horizons_and_many_samples_resume_bit_for_bit(project):
    settings = config(
        project,
        "straight",
        Objective(sft=0.0, span=0.0, divergence="reverse_kl"),
        steps=6,
        micro_batches=2,
        rollout=RolloutConfig(
            "replay",
            initial_ratio=0.9,
            capacity=16,
            samples=2,
            max_new_tokens=((0.0, 4), (0.5, 8)),
        ),
        save_every=3,
    )
    straight = run(settings)
    generated = [line for line in straight if "rollout/max_new_tokens" in line]
    assert {line["rollout/max_new_tokens"] for line in generated} <= {4, 8}
    resumed = dataclasses.replace(
        settings, output=str(project / "resumed"), resume=True
    )
    shutil.copytree(settings.output, resumed.output)
    shutil.rmtree(f"{resumed.output}/checkpoints/6")
    again = run(resumed)
    assert len(again) == 6 and {line["rollout/student_share"] for line in again} >= {1}
    for one, other in zip(straight, again, strict=True):
        del one["train/tokens_per_second"], other["train/tokens_per_second"]
        assert one == other
