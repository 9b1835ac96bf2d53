"""Measurements of a run while it trains, and its best checkpoint."""

import dataclasses
import io
import json
import pathlib
import signal

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
from mgsr_jax.training.measurement_config import PeriodicEvaluation
from mgsr_jax.training.optimizer import OptimizerConfig
from mgsr_jax.training.periodic_evaluation import _sources
from mgsr_jax.training.progress import StepProgress
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
        steps=6,
        objective=Objective(token=0.0, span=0.0),
        evaluate_every=2,
        evaluate=PeriodicEvaluation(limit=5),
        keep_checkpoints=1,
    )
    return tiny.train_config(project, name, **values | changes)


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


def scores_of(folder, config, *, limit=None, max_length=56):
    """Greedy scores of an exported student on one device, by the evaluation itself."""
    student, tokenizer = models.from_config(folder), hf.load_tokenizer(folder)
    encoding = dataclasses.replace(config.data.encoding, max_length=max_length)
    prompts, _ = load_prompts(config.data.valid, tokenizer, encoding)
    return evaluate(
        student,
        hf.load_params(folder, student),
        tokenizer,
        prompts[:limit],
        EvaluationConfig(
            seeds=(), max_prompt_length=40, max_length=max_length, batch_size=4
        ),
        eos_ids=eos_ids(tokenizer, student),
    )


def test_the_curves_end_with_the_scores_of_the_exported_student(plain):
    config, result, printed = plain
    scores = scores_of(result.student, config, limit=5)
    expected = {
        "rouge_l": scores.greedy.metrics["rouge_l"].mean,
        "length": scores.greedy.length,
        "distinct_2": scores.greedy.distinct_2,
    }
    for name, value in expected.items():
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
    scores = scores_of(result.student, config, limit=3, max_length=48)
    assert logged(config, "eval/loss")[2] == pytest.approx(scores.loss, rel=1e-4)


def spoilt(project, name):
    """A run whose learning rate rises until the last steps spoil the student."""
    return settings(
        project,
        name,
        evaluate_every=0,
        validate_every=2,
        best_metric="valid/loss",
        optimizer=OptimizerConfig(learning_rate=0.5, warmup_steps=5, clip_norm=1e3),
    )


@pytest.fixture(scope="module")
def best(project):
    """The settings of such a run, and its best step, which is not the last."""
    config = spoilt(project, "best")
    run(config)
    curve = logged(config, "valid/loss")
    assert list(curve) == [0, 2, 4, 6]
    step = min((2, 4, 6), key=curve.get)
    assert step != 6, curve
    return config, step


def test_the_best_checkpoint_is_kept_and_exported(best, tmp_path):
    config, step = best
    assert steps(config, "valid/loss") == [step, 6]
    assert state.best_step(f"{config.output}/checkpoints", "valid/loss") == step
    export_student(config.output, tmp_path / "best", step=step)
    loss = scores_of(tmp_path / "best", config).loss
    assert loss == pytest.approx(logged(config, "valid/loss")[step], rel=1e-5)


def test_a_resumed_run_has_the_same_best_checkpoint(project, best):
    straight, step = best
    halves = spoilt(project, "halves")
    advance = StepProgress.advance

    def stop_after_3(self, done):
        advance(self, done)
        if done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepProgress, "advance", stop_after_3)
        result, _ = run(halves)
    assert not result.finished
    other = dataclasses.replace(halves, best_metric="valid/sft", resume=True)
    with pytest.raises(ValueError, match="best_metric was .*, is 'valid/sft'"):
        run(other)
    result, printed = run(dataclasses.replace(halves, resume=True))
    assert "resumed from step 3" in printed and "first batch" not in printed
    assert steps(halves, "valid/loss") == [step, 6]
    for name in ("valid/loss", "start/student_loss"):
        assert logged(halves, name) == logged(straight, name)


def test_a_metric_that_is_not_measured_is_named(project):
    config = settings(project, "unknown", best_metric="eval/bleu")
    with pytest.raises(ValueError, match="'eval/bleu' is not measured; .*eval/rouge_l"):
        run(config)
    assert not pathlib.Path(config.output).exists()


def test_an_evaluation_set_has_names_of_columns_of_its_own(project):
    config = settings(project, "columns")
    data = dataclasses.replace(config.data, columns={"instruction": "task"})
    own = PeriodicEvaluation(data="own.jsonl", columns={"prompt": "query"})
    for evaluation, columns in (
        (own, {"prompt": "query"}),
        (PeriodicEvaluation(data="own.jsonl"), {}),
        (PeriodicEvaluation(), {"instruction": "task"}),
    ):
        changed = dataclasses.replace(config, data=data, evaluate=evaluation)
        (source,) = _sources(changed)
        assert data.columns_of(source) == columns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "there is no evaluation set"),
        ({"evaluate": PeriodicEvaluation(columns={"promt": "x"})}, "name 'promt'"),
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
