"""The whole program on tiny models: runs, resumes bit for bit, exports, refuses."""

import dataclasses
import io
import json
import math
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import yaml
from rich.console import Console

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.commands.cache_teacher import write_teacher_cache
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import DataConfig, MeshConfig
from mgsr_jax.training.progress import StepProgress
from mgsr_jax.training.trainer import Diverged, train

pytestmark = [
    pytest.mark.exhaustive,  # whole runs
    pytest.mark.filterwarnings("ignore:.*forward-compatible:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


def config(project, name, **changes):
    settings = dict(
        teacher=str(project / "teacher"),
        steps=4,
        objective=Objective(num_candidates=16),
        rollout=RolloutConfig(policy="on"),
        mesh=MeshConfig(data=4, fsdp=2),
        log_every=1,
    )
    return tiny.train_config(project, name, **settings | changes)


def run(config):
    return train(config, console=Console(file=io.StringIO()))


def assert_same(left, right):
    """Bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def sft(project, name, **changes):
    """Plain fine-tuning: no teacher."""
    return config(
        project,
        name,
        teacher=None,
        objective=Objective(token=0.0, span=0.0),
        rollout=RolloutConfig("off"),
        **changes,
    )


def changed(base, **sections):
    """`base` with single fields of its sections replaced."""
    return dataclasses.replace(
        base,
        **{
            name: dataclasses.replace(getattr(base, name), **fields)
            for name, fields in sections.items()
        },
    )


@pytest.fixture(scope="module")
def straight(project):
    """Six steps of the whole method in one go, with the replay policy."""
    settings = config(
        project,
        "straight",
        steps=6,
        validate_every=2,
        rollout=RolloutConfig("replay", initial_ratio=0.7, epsilon=-9.0, capacity=8),
        save_every=3,
    )
    return settings, run(settings)


def test_the_whole_method_trains(project, straight):
    settings, result = straight
    assert result.finished and result.step == 6
    lines = tiny.metrics(project, "straight")
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5, 6]
    for name in (
        "sft",
        "dac_kl",
        "span",
        "lower",
        "upper",
        "kept_mass",
        "kept_classes",
    ):
        assert all(math.isfinite(line.get(f"train/{name}", 0)) for line in trained)
    assert {line["rollout/student_share"] for line in trained} == {0.0, 1.0}
    assert any("rollout/teacher_position" in line for line in trained)
    valid = [line["valid/loss"] for line in lines if "valid/loss" in line]
    assert len(valid) == 4 and valid[-1] < valid[0] - 0.5
    assert result.validation["loss"] == valid[-1]


def test_three_steps_a_restart_and_three_more_equal_six(project, straight):
    settings, _ = straight
    halves = dataclasses.replace(settings, output=str(project / "halves"))
    stop_after(3, halves)
    assert tiny.checkpoint(project / "halves")["state"]["step"] == 3
    result = run(dataclasses.replace(halves, resume=True))
    assert result.step == 6
    assert_same(
        tiny.checkpoint(project / "halves"), tiny.checkpoint(project / "straight")
    )
    drop = ("train/tokens_per_second",)
    for one, other in zip(
        tiny.metrics(project, "halves"), tiny.metrics(project, "straight"), strict=True
    ):
        assert {k: v for k, v in one.items() if k not in drop} == {
            k: v for k, v in other.items() if k not in drop
        }


def stop_after(step, settings):
    """Train, and stop the run by a signal after `step` steps."""

    class Teller(Console):
        def print(self, *args, **kwargs):
            pass

    original = StepProgress.advance

    def advance(self, done):
        original(self, done)
        if done == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepProgress, "advance", advance)
        result = train(settings, console=Teller(file=io.StringIO()))
    assert result.step == step and not result.finished
    assert not result.student.exists()


def test_the_export_is_the_student_for_transformers(project, straight):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    _, result = straight
    theirs = transformers.AutoModelForCausalLM.from_pretrained(result.student)
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.student)
    ids = tokenizer("the old dog sees")["input_ids"]
    ours = models.from_config(result.student)
    params = hf.load_params(result.student, ours)
    hidden, _ = ours.forward(params, jnp.asarray([ids]))
    logits = ours.unembed(ours.head_params(params), hidden)
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(logits, want, atol=1e-4)
    saved = tiny.checkpoint(project / "straight")["state"]["params"]["student"]
    rows = ours.config.vocab_size  # padded in training, with rows that stay zero
    table = saved["embed"]["embedding"]
    np.testing.assert_array_equal(params["embed"]["embedding"], table[:rows])
    assert len(table) % 128 == 0 and not np.any(table[rows:])


def test_the_run_folder_says_what_ran(project, straight):
    settings, _ = straight
    text = (project / "straight" / "config.yaml").read_text()
    assert yaml.safe_load(text)["rollout"]["policy"] == "replay"
    assert yaml.safe_load(text)["objective"]["prior_weight"] == 10.0


@pytest.mark.exhaustive
def test_mesh_and_micro_batches_do_not_change_the_losses(project):
    """Same rollouts, same losses: 4 x 2 devices, one, and four micro-batches on one."""
    losses = []
    for name, mesh, parts in (
        ("mesh", MeshConfig(4, 2), 1),
        ("parts", MeshConfig(2, 1), 4),
    ):
        devices = jax.devices()[: abs(mesh.data * mesh.fsdp)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding.jax, "devices", lambda d=devices: d)
            run(config(project, name, steps=2, mesh=mesh, micro_batches=parts))
        losses.append(
            [
                [line.get(f"train/{name}") for name in ("loss", "dac_kl", "span")]
                + [line.get("rollout/teacher_position")]
                for line in tiny.metrics(project, name)
                if "train/loss" in line
            ]
        )
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_sft_needs_no_teacher(project, monkeypatch):
    peak = {"device/peak_gib": 1.5}
    monkeypatch.setattr("mgsr_jax.training.trainer.peak_memory", lambda: peak)
    result = run(sft(project, "sft", steps=None, epochs=1.0))
    assert result.step == 6
    lines = [line for line in tiny.metrics(project, "sft") if "train/loss" in line]
    assert lines[-1]["train/sft"] < lines[0]["train/sft"]
    assert "train/dac_kl" not in lines[-1]
    assert all(line["device/peak_gib"] == 1.5 for line in lines)


@pytest.mark.exhaustive
def test_a_teacher_in_int8_says_nearly_the_same(project, two_devices):
    """SCRG asks it, and so do the losses and the validation."""
    first = []
    for dtype in ("bfloat16", "int8"):
        settings = config(
            project, dtype, teacher_dtype=dtype, steps=1, mesh=MeshConfig()
        )
        run(settings)
        found = tiny.metrics(project, dtype)
        assert any("train/loss" in line for line in found)
        (before, _) = [line for line in found if "valid/loss" in line]
        first.append([before[f"valid/{name}"] for name in ("teacher_sft", "dac_kl")])
    assert first[0] != first[1]
    np.testing.assert_allclose(*first, rtol=0.05)


def test_narrow_rows_are_validated_as_wide_ones_are(project, two_devices, monkeypatch):
    """All examples have 50 tokens; rows are 56 wide, or 50 with a bucket of that."""
    put, first, widths = sharding.put_batch, [], set()

    def watched(mesh, rows):
        widths.add(rows.tokens.shape[1])
        return put(mesh, rows)

    monkeypatch.setattr("mgsr_jax.training.row_source.put_batch", watched)  # training
    monkeypatch.setattr(sharding, "put_batch", watched)  # validation
    for name, buckets in (("wide", ()), ("narrow", (30, 50))):
        settings = sft(project, name, steps=2, mesh=MeshConfig())
        spec = dataclasses.replace(settings.data, buckets=buckets)
        run(dataclasses.replace(settings, data=spec))
        first.append(tiny.metrics(project, name)[1]["valid/loss"])
        assert widths == ({50} if buckets else {56})
        widths.clear()
    np.testing.assert_allclose(*first, rtol=1e-6)


@pytest.fixture
def two_devices(monkeypatch):
    """Programs for two compile sooner than for eight."""
    two = jax.devices()[:2]
    monkeypatch.setattr(sharding.jax, "devices", lambda: two)


@pytest.fixture(scope="module")
def cached(project):
    """A cache with all classes of every token in float32.

    Settings of runs on two devices; the cache is made on eight.
    """
    settings = config(
        project,
        "teacher_cache",
        objective=Objective(span=0.0, num_candidates=16),
        rollout=RolloutConfig("off"),
    )
    size = len(hf.load_tokenizer(settings.student))
    write_teacher_cache(
        settings,
        top_k=size,
        logits_dtype="float32",
        examples_per_shard=20,
        console=Console(file=io.StringIO()),
    )
    return dataclasses.replace(
        settings, teacher_cache=settings.output, mesh=MeshConfig(data=1, fsdp=2)
    )


def test_a_run_from_the_cache_is_the_run_with_the_teacher(project, cached, two_devices):
    """Over more than an epoch, some steps of the student's own text among them."""
    rollout = RolloutConfig("on", probability=0.5, intervention="none")
    settings = dataclasses.replace(cached, steps=7, rollout=rollout)
    settings = changed(
        settings, data={"valid": None}, objective={"divergence": "forward_kl"}
    )
    trained = []
    for name, cache in (("from_cache", cached.teacher_cache), ("from_teacher", None)):
        output = str(project / name)
        run(dataclasses.replace(settings, output=output, teacher_cache=cache))
        trained.append(tiny.checkpoint(project / name)["state"]["params"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), *trained)
    lines = [
        [line for line in tiny.metrics(project, name) if "train/loss" in line]
        for name in ("from_cache", "from_teacher")
    ]
    assert {line["rollout/student_share"] for line in lines[0]} == {0.0, 1.0}
    for one, other in zip(*lines, strict=True):
        for name in ("train/loss", "train/forward_kl", "train/sft"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_without_rollouts_the_cache_stands_for_the_teacher(
    project, cached, two_devices
):
    """Its weights are never loaded, and a resumed run is the straight one."""
    load, loaded = hf.load_params, []

    def remember(path, *args, **settings):
        loaded.append(path)
        return load(path, *args, **settings)

    straight = dataclasses.replace(cached, output=str(project / "offline"), steps=4)
    halves = dataclasses.replace(straight, output=str(project / "offline_halves"))
    console = Console(file=io.StringIO(), width=200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "load_params", remember)
        result = train(straight, console=console)
        stop_after(2, halves)
        run(dataclasses.replace(halves, resume=True))
    assert set(loaded) == {cached.student}
    told = console.file.getvalue()
    assert "the teacher is not loaded" in told and "1.0000 of its probability" in told
    assert_same(
        tiny.checkpoint(project / "offline_halves"),
        tiny.checkpoint(project / "offline"),
    )
    lines = [line for line in tiny.metrics(project, "offline") if "train/loss" in line]
    assert all(line["train/dac_kl"] > 0 for line in lines)
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert result.validation.keys() == {"loss", "sft"}


def test_the_cache_of_other_data_is_refused_and_writes_nothing(
    project, cached, two_devices
):
    other = changed(cached, data={"train": cached.data.valid, "valid": None})
    other = dataclasses.replace(other, output=str(project / "refused"))
    with pytest.raises(ValueError, match="was made from another data"):
        run(other)
    assert not (project / "refused").exists()


def test_a_loss_that_is_not_finite_stops_the_run(project):
    settings = sft(project, "diverged", save_every=1, steps=30)
    settings = changed(settings, optimizer={"learning_rate": 1e30, "clip_norm": 1e30})
    with pytest.raises(
        Diverged, match=r"step \d+: .*not finite.*Last checkpoint: step"
    ):
        run(settings)
    saved = tiny.checkpoint(project / "diverged")["state"]["params"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(student="nowhere"), "no config.json at nowhere"),
        (dict(steps=None), "exactly one of steps and epochs"),
        (dict(epochs=1.0), "exactly one of steps and epochs"),
        (dict(batch_size=12), "micro-batch of 12 rows .* 8 parts"),
        (dict(micro_batches=3), "batch_size=8 does not divide"),
        (
            dict(rollout=RolloutConfig("on", decode_rows=4)),
            "decode_rows=4 does not divide over the 8 parts .* use a multiple of 8",
        ),
        (dict(teacher=None), "compare with a teacher, and none is set"),
        (dict(mesh=MeshConfig(3, 1)), "does not fill the 8 devices"),
        (
            dict(objective=Objective(token=0.0, span=0.0)),
            "teacher is set, but .* never use it",
        ),
        (dict(rollout=RolloutConfig("on", probability=1.5)), "rollout.probability"),
        (
            dict(data=DataConfig("nothing.jsonl", max_prompt_length=20, max_length=40)),
            "nothing.jsonl",
        ),
    ],
)
def test_mistakes_are_named_and_write_nothing(project, changes, message):
    settings = config(project, "refused", **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(settings)
    assert not (project / "refused").exists()


def test_rows_longer_than_the_models_are_refused(project):
    settings = changed(config(project, "refused"), data={"max_length": 500})
    with pytest.raises(ValueError, match="beyond the student's 128 positions"):
        run(settings)


def test_other_tokenizers_are_refused(project, tmp_path):
    """Same size, two ids swapped."""
    other = shutil.copytree(project / "teacher", tmp_path / "other")
    path = other / "tokenizer.json"
    text = json.loads(path.read_text())
    vocab = text["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="different tokenizers"):
        run(config(project, "refused", teacher=str(other)))


def test_nothing_is_overwritten(project, straight):
    settings, _ = straight
    before = (project / "straight" / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="not empty.*resume: true"):
        run(settings)
    other = dataclasses.replace(settings, seed=5, resume=True)
    with pytest.raises(ValueError, match="seed was"):
        run(other)
    (project / "foreign").mkdir()
    (project / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        run(dataclasses.replace(settings, output=str(project / "foreign"), resume=True))
    assert (project / "straight" / "metrics.jsonl").read_text() == before
    assert (project / "foreign" / "thesis.txt").read_text() == "mine"


def test_a_damaged_checkpoint_is_refused_by_name(project, straight):
    settings, _ = straight
    copy = shutil.copytree(project / "straight", project / "damaged")
    for path in (copy / "checkpoints" / "6" / "state").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            path.write_bytes(path.read_bytes()[:100])
    broken = dataclasses.replace(settings, output=str(copy), resume=True)
    with pytest.raises(ValueError, match="checkpoint 6 in"):
        run(broken)


def test_a_run_goes_on_over_another_mesh_and_split(project):
    whole = sft(project, "whole", steps=4)
    run(whole)
    moved = dataclasses.replace(whole, output=str(project / "moved"))
    stop_after(2, moved)
    again = dataclasses.replace(
        moved, resume=True, mesh=MeshConfig(1, 2), micro_batches=2
    )
    two = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: two)
        assert run(again).step == 4
    losses = [
        [
            line["train/loss"]
            for line in tiny.metrics(project, name)
            if "train/loss" in line
        ]
        for name in ("whole", "moved")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_resumed_run_must_see_the_same_rows(project):
    settings = sft(project, "edited", steps=4)
    path = project / "edited.jsonl"
    path.write_text((project / "train.jsonl").read_text())
    settings = changed(settings, data={"train": str(path)})
    stop_after(2, settings)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(reversed(lines)) + "\n")
    with pytest.raises(ValueError, match="are not those"):
        run(dataclasses.replace(settings, resume=True))
