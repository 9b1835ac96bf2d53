"""What a run measures while it trains, and the checkpoint that is best by it."""

import dataclasses
import io
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf, state
from mgsr_jax.checkpoint.tokenizer import eos_ids
from mgsr_jax.commands.export import export_student
from mgsr_jax.data.prompts import load_prompts
from mgsr_jax.evaluation.evaluate import evaluate
from mgsr_jax.evaluation.responses import EvaluationConfig
from mgsr_jax.models.lora import LoraConfig
from mgsr_jax.objective import Objective
from mgsr_jax.training.config import DataConfig, TrainConfig
from mgsr_jax.training.measurement_config import PeriodicEvaluation
from mgsr_jax.training.optimizer import OptimizerConfig
from mgsr_jax.training.trainer import train

pytestmark = [
    pytest.mark.exhaustive,  # whole runs
    pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """Programs for two compile sooner than for eight."""
    two = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: two)
        yield


def settings(project, name, **changes):
    """Fine-tuning of six steps that is evaluated every two."""
    values = dict(
        student=str(project / "student"),
        output=str(project / name),
        steps=6,
        batch_size=8,
        data=DataConfig(
            train=str(project / "train.jsonl"),
            valid=str(project / "valid.jsonl"),
            max_prompt_length=40,
            max_length=56,
            cache_dir=str(project / "cache"),
        ),
        objective=Objective(token=0.0, span=0.0),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        evaluate_every=2,
        evaluate=PeriodicEvaluation(limit=5),
        keep_checkpoints=1,
        tensorboard=False,
    )
    return TrainConfig(**values | changes)


def run(config):
    console = Console(file=io.StringIO(), width=400)
    result = train(config, console=console)
    return result, console.file.getvalue()


def logged(config, name):
    """Step -> value of a metric."""
    text = pathlib.Path(config.output, "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def steps(config, best_metric=None):
    folder = f"{config.output}/checkpoints"
    with state.open_manager(folder, keep=9, best_metric=best_metric) as manager:
        return sorted(manager.all_steps())


@pytest.fixture(scope="module")
def plain(project):
    config = settings(project, "plain")
    return config, *run(config)


def test_the_curves_end_with_the_scores_of_the_exported_student(project, plain):
    config, result, printed = plain
    student = models.from_config(result.student)
    tokenizer = hf.load_tokenizer(result.student)
    encoding = config.data.encoding
    prompts, _ = load_prompts(config.data.valid, tokenizer, encoding)
    scores = evaluate(
        student,
        hf.load_params(result.student, student),
        tokenizer,
        prompts[:5],
        EvaluationConfig(seeds=(), max_prompt_length=40, max_length=56, batch_size=5),
        eos_ids=eos_ids(tokenizer, student),
    )
    for name, value in dataclasses.asdict(scores.greedy).items():
        curve = logged(config, f"eval/{name}")
        assert list(curve) == [0, 2, 4, 6]
        assert curve[6] == pytest.approx(value, rel=1e-6)
    loss = logged(config, "eval/loss")
    assert loss[6] == pytest.approx(scores.loss, rel=1e-5)
    assert loss[6] < loss[0] - 0.5
    assert "step 6: rouge_l" in printed and "on 5 prompts" in printed


def test_evaluation_does_not_change_the_run(project, plain):
    config, *_ = plain
    without = dataclasses.replace(
        config, output=str(project / "without"), evaluate_every=0
    )
    run(without)
    left, right = (
        hf.load_params(f"{c.output}/student", models.from_config(f"{c.output}/student"))
        for c in (config, without)
    )
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_adapters_are_evaluated_merged(project):
    config = settings(
        project,
        "lora",
        steps=2,
        lora=LoraConfig(rank=2),
        evaluate=PeriodicEvaluation(limit=3, batch_size=4, max_length=48),
    )
    result, _ = run(config)
    student = models.from_config(result.student)
    tokenizer = hf.load_tokenizer(result.student)
    encoding = dataclasses.replace(config.data.encoding, max_length=48)
    prompts, _ = load_prompts(config.data.valid, tokenizer, encoding)
    scores = evaluate(
        student,
        hf.load_params(result.student, student),
        tokenizer,
        prompts[:3],
        EvaluationConfig(seeds=(), max_prompt_length=40, max_length=48, batch_size=3),
        eos_ids=eos_ids(tokenizer, student),
    )
    assert logged(config, "eval/loss")[2] == pytest.approx(scores.loss, rel=1e-4)


def test_the_best_checkpoint_is_kept_and_exported(project, tmp_path):
    """The learning rate of the last steps spoils the student."""
    config = settings(
        project,
        "best",
        evaluate_every=0,
        validate_every=2,
        best_metric="valid/loss",
        optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=5, clip_norm=1e3),
    )
    run(config)
    curve = logged(config, "valid/loss")
    del curve[0]
    best = min(curve, key=curve.get)
    assert best != 6, curve
    assert steps(config, "valid/loss") == sorted({best, 6})
    assert state.best_step(f"{config.output}/checkpoints", "valid/loss") == best
    export_student(config.output, tmp_path / "best", step=best)
    student = models.from_config(tmp_path / "best")
    params = hf.load_params(tmp_path / "best", student)
    saved = state.restore_params(
        f"{config.output}/checkpoints",
        best,
        {"student": dataclasses.replace(student, vocab_rows=384).abstract_params()},
    )
    np.testing.assert_array_equal(
        params["final_norm"]["scale"], saved["student"]["final_norm"]["scale"]
    )


def test_a_resumed_run_still_has_the_best_checkpoint(project):
    config = settings(
        project, "halves", steps=2, validate_every=1, best_metric="valid/loss"
    )
    run(config)
    assert steps(config, "valid/loss") == [2]
    with pytest.raises(ValueError, match="best_metric changed"):
        run(dataclasses.replace(config, best_metric="eval/rouge_l", resume=True))
    result, printed = run(dataclasses.replace(config, resume=True))
    assert "resumed from step 2" in printed and "first batch" not in printed
    assert result.finished


def test_a_metric_that_is_not_measured_is_named(project):
    config = settings(project, "unknown", best_metric="eval/bleu")
    with pytest.raises(ValueError, match="'eval/bleu' is not measured; .*eval/rouge_l"):
        run(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "there is no evaluation set"),
        ({"evaluate": PeriodicEvaluation(max_length=400)}, "student's 128 positions"),
        ({"evaluate": PeriodicEvaluation(batch_size=3)}, "batch of 3 rows"),
        ({"evaluate": PeriodicEvaluation(data="nowhere.jsonl")}, "nowhere.jsonl"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(project, changes, message):
    config = settings(project, "refused")
    if "data" in changes:
        changes = {"data": dataclasses.replace(config.data, valid=None)}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(dataclasses.replace(config, **changes))
    assert not (project / "refused").exists()
