"""A run on the student's samples, with a divergence that reads the sampled tokens."""

import io
import json
import math

import pytest
import tiny
from rich.console import Console

from mgsr_jax.objective import Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.training.config import DataConfig, MeshConfig, TrainConfig
from mgsr_jax.training.optimizer import OptimizerConfig
from mgsr_jax.training.trainer import train

pytestmark = [
    pytest.mark.exhaustive,  # whole runs
    pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning"),
]


def test_a_run_on_samples_learns_on_a_mesh_of_three_axes(tmp_path):
    project = tiny.project(tmp_path)
    settings = TrainConfig(
        student=str(project / "student"),
        teacher=str(project / "teacher"),
        output=str(project / "run"),
        steps=3,
        batch_size=8,
        data=DataConfig(
            train=str(project / "train.jsonl"),
            valid=str(project / "valid.jsonl"),
            max_prompt_length=40,
            max_length=56,
            cache_dir=str(project / "cache"),
        ),
        objective=Objective(
            sft=0.0,
            span=0.0,
            divergence="sampled_reverse_kl",
            token_weights="discrepancy",
        ),
        rollout=RolloutConfig("on", rounds=0),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        mesh=MeshConfig(2, 2, 2),
        log_every=1,
        tensorboard=False,
    )
    train(settings, console=Console(file=io.StringIO()))
    lines = (project / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "train/loss" in line]
    assert len(steps) == 3
    for line in steps:
        assert math.isfinite(line["train/loss"]) and line["train/gradient_norm"] > 0
        assert line["rollout/student_share"] == 1 and "train/sft" not in line
        # The first tokens of a row count up to half more.
        divergence = line["train/sampled_reverse_kl"]
        assert line["train/loss"] != pytest.approx(divergence, rel=1e-3)
