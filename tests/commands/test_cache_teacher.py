"""`mgsr cache-teacher`: what it writes is what the teacher says, and no less often."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.commands import cache_teacher as command
from mgsr_jax.commands.cache_teacher import make_top_k_step, write_teacher_cache
from mgsr_jax.data import teacher_shards
from mgsr_jax.data.batches import eval_batches, train_batches
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.losses import top_k_teacher
from mgsr_jax.objective import Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.rows import next_token_view
from mgsr_jax.training.config import DataConfig, MeshConfig, TrainConfig
from mgsr_jax.training.inputs import origin_of, prepare, read_inputs

TOP_K, WIDTH = 16, 128


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    two = jax.devices()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding.jax, "devices", lambda: two)
        yield


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The data has responses of 14 to 38 tokens, so that rows are ragged."""
    folder = tiny.project(tmp_path_factory.mktemp("project"))
    lines = []
    for i, record in enumerate(tiny.records(48)):
        output = " ".join([record["output"]] * (1 + i % 3))
        lines.append(json.dumps(record | {"output": output}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(project, name="cache", **changes):
    settings = dict(
        student=str(project / "student"),
        teacher=str(project / "teacher"),
        output=str(project / name),
        steps=1,
        batch_size=8,
        data=DataConfig(
            train=str(project / "train.jsonl"),
            max_prompt_length=40,
            max_length=WIDTH,
            cache_dir=str(project / "cache_dir"),
        ),
        objective=Objective(span=0.0, num_candidates=TOP_K),
        mesh=MeshConfig(data=1, fsdp=2),
    )
    return TrainConfig(**settings | changes)


def quiet():
    return Console(file=io.StringIO(), width=200)


def make(settings, console=None, **options):
    options = dict(top_k=TOP_K, logits_dtype="float32", examples_per_shard=20) | options
    return write_teacher_cache(settings, console=console or quiet(), **options)


def opened(settings):
    setup = read_inputs(settings, console=quiet())
    return TeacherCache.open(settings.output, origin_of(setup)), setup


@pytest.fixture
def one_width(monkeypatch):
    """One program to compile in place of two."""
    monkeypatch.setattr(command, "_NARROWEST", WIDTH)


@pytest.fixture(scope="module")
def made(project):
    settings = config(project)
    return settings, make(settings)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_cache_is_what_the_teacher_says_when_it_is_run(made):
    """All examples, in the training's order and over two epochs."""
    settings, manifest = made
    cache, setup = opened(settings)
    teacher = models.from_config(settings.teacher)
    params = hf.load_params(settings.teacher, teacher)
    source = train_batches(setup.train, 8, widths=[WIDTH], seed=3)
    seen, positions = [], 0
    for _ in range(2 * 48 // 8):
        rows = next(source)
        view = next_token_view(jax.tree.map(jnp.asarray, rows))
        hidden, _ = teacher.forward(params, view.inputs)
        logits = teacher.unembed(teacher.head_params(params), hidden)
        want = top_k_teacher(logits, TOP_K, vocab_size=setup.vocab_size)
        found, where = cache.lookup(rows), np.asarray(view.where)
        np.testing.assert_allclose(
            found.logits[where], want.logits[where], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            found.logsumexp[where], want.logsumexp[where], rtol=1e-5, atol=1e-6
        )
        # By their logits, for of two that are equal to rounding either may come first.
        named = np.take_along_axis(
            np.asarray(logits - logits.max(-1, keepdims=True)),
            found.indices.astype(np.int32),
            axis=-1,
        )
        np.testing.assert_allclose(
            named[where], found.logits[where], rtol=1e-4, atol=1e-5
        )
        distinct = [len(set(classes)) for classes in found.indices[where].tolist()]
        assert set(distinct) == {TOP_K}
        seen += rows.example.tolist()
        positions += where.sum()
    assert sorted(seen) == sorted([*range(48)] * 2)
    assert positions == 2 * manifest.positions


def test_the_real_tokens_alone_have_probability(made):
    """The embeddings have three rows more than the tokenizer has tokens."""
    cache, setup = opened(made[0])
    assert setup.teacher.config.vocab_size == setup.vocab_size + 3
    rows = next(eval_batches(setup.train, 8, widths=[WIDTH]))
    assert cache.lookup(rows).indices.max() < setup.vocab_size


def test_short_examples_are_read_in_short_rows(made):
    """Each once; what fills a batch up is no example."""
    _, setup = opened(made[0])
    widths, seen = [], []
    for rows in command._batches(setup, range(20, 40)):
        width = rows.tokens.shape[1]
        assert (rows.lengths <= width).all()
        assert width == 64 or (rows.lengths > 64).any()
        widths.append(width)
        seen += [i for i in rows.example.tolist() if i != -1]
    assert widths == [64, 128, 128] and sorted(seen) == [*range(20, 40)]


def test_unscored_positions_are_neither_projected_nor_kept(monkeypatch):
    """One chunk of tokens for every `_CHUNK` of the longest response, and no more."""
    monkeypatch.setattr(command, "_CHUNK", 8)
    mesh = sharding.make_mesh(1, 2)
    model, params = tiny.llama(num_hidden_layers=1)
    rows = tiny.complete(((2, 5), (8, 3), (3, 1), (4, 6)))
    projected = []

    class Counted(type(model)):
        def unembed(self, head, hidden):
            jax.debug.callback(lambda: projected.append(hidden.shape[:2]))
            return super().unembed(head, hidden)

    counted = Counted(model.config, model.architecture)
    step = make_top_k_step(counted, top_k=4, vocab_size=tiny.VOCAB, mesh=mesh)
    with jax.set_mesh(mesh):
        found = jax.device_get(step(params, rows))
    jax.effects_barrier()
    # Two rows a device: 6 of a row's 13 positions are read, in chunks of 4.
    assert projected == [(4, 4)] * 2
    view = next_token_view(rows)
    hidden, _ = model.forward(params, view.inputs)
    logits = model.unembed(model.head_params(params), hidden)
    want = top_k_teacher(logits, 4, vocab_size=tiny.VOCAB)
    for b, (prompt, response) in enumerate(((2, 5), (8, 3), (3, 1), (4, 6))):
        for ours, theirs in zip(found, want, strict=True):
            np.testing.assert_allclose(
                ours[b, :response],
                theirs[b, prompt - 1 : prompt + response - 1],
                rtol=1e-4,
                atol=1e-5,
            )


def test_a_stopped_command_goes_on_to_the_same_bytes(project, made, monkeypatch):
    """Whatever ended it, what is written is kept; the second half alone is run."""
    settings = config(project, "stopped")
    write, written = teacher_shards.write_shard, []

    def stop_before_the_second(folder, recipe, number, examples):
        if written and not resumed:
            raise KeyboardInterrupt
        written.append((number, len(examples)))
        write(folder, recipe, number, examples)

    monkeypatch.setattr(teacher_shards, "write_shard", stop_before_the_second)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        make(settings)
    assert sorted(files(project / "stopped")) == ["shard-00000.safetensors"]
    with pytest.raises(FileNotFoundError, match="not finished"):
        opened(settings)
    resumed, console = True, quiet()
    make(settings, console)
    assert written == [(0, 20), (1, 20), (2, 8)]
    assert "20 of 48 examples are there" in console.file.getvalue()
    assert files(project / "stopped") == files(project / "cache")


def test_a_finished_cache_is_not_made_again(made, monkeypatch):
    settings, manifest = made
    monkeypatch.setattr(hf, "load_params", None)
    assert make(settings) == manifest


def test_a_stopped_command_does_not_go_on_with_other_settings(made):
    settings, _ = made
    with pytest.raises(ValueError, match=r"another top_k \(expected 17, got 16\)"):
        make(settings, top_k=17)
    other = dataclasses.replace(settings, teacher_dtype="bfloat16")
    with pytest.raises(ValueError, match="another teacher_dtype"):
        make(other)


def changed_weight(folder):
    """One value of the last tensor, by one bit."""
    file = folder / "model.safetensors"
    found = bytearray(file.read_bytes())
    found[-1] ^= 1
    file.write_bytes(found)


def swapped_tokens(folder):
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    file.write_text(json.dumps(text))


def changed_record(file):
    lines = file.read_text().splitlines()
    lines[5] = lines[5].replace("the old", "the small")
    file.write_text("\n".join(lines) + "\n")


def other_order(file):
    file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n")


@pytest.mark.parametrize(
    ("change", "where", "what"),
    [
        (changed_weight, ["teacher"], "another teacher "),
        # Tokenizer and rows, for the ids of both are others.
        (swapped_tokens, ["teacher", "student"], "another tokenizer "),
        (changed_record, ["train.jsonl"], "another data "),
        (other_order, ["train.jsonl"], "another data "),
    ],
)
def test_training_refuses_the_cache_of_something_else(
    project, made, tmp_path, change, where, what
):
    """By name, and with nothing written."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("teacher", "student"):
        shutil.copytree(project / name, copy / name)
    shutil.copy(project / "train.jsonl", copy)
    settings = config(copy, "run", teacher_cache=made[0].output)
    prepare(settings, console=quiet())  # moved, but the same
    for name in where:
        change(copy / name)
    with pytest.raises(ValueError, match=f"was made from {what}.* make a new one"):
        prepare(settings, console=quiet())
    assert not (copy / "run").exists()


def test_other_lengths_are_other_data(project, made):
    settings = config(project, "run", teacher_cache=made[0].output)
    shorter = dataclasses.replace(settings.data, max_length=60, too_long="truncate")
    with pytest.raises(ValueError, match="another data "):
        prepare(dataclasses.replace(settings, data=shorter), console=quiet())


def test_candidates_that_are_not_in_the_cache_are_refused(project, made):
    objective = Objective(span=0.0, num_candidates=17)
    for divergence in ("dac_kl", "dac_kl_fixed"):
        wants = dataclasses.replace(objective, divergence=divergence)
        settings = config(project, "run", objective=wants)
        message = "num_candidates=17, but the teacher cache has 16 classes.*--top_k 17"
        with pytest.raises(ValueError, match=message):
            make(settings)
        cached = dataclasses.replace(settings, teacher_cache=made[0].output)
        with pytest.raises(ValueError, match=message):
            prepare(cached, console=quiet())
    whole = dataclasses.replace(objective, divergence="forward_kl")
    settings = config(project, "run", objective=whole, teacher_cache=made[0].output)
    assert prepare(settings, console=quiet()).teacher_cache is not None
    assert not (project / "run").exists()


def test_the_teacher_is_needed_where_the_student_writes(project, made):
    for policy, runs in (("off", False), ("on", True)):
        settings = config(
            project,
            "run",
            teacher_cache=made[0].output,
            rollout=RolloutConfig(policy),
        )
        assert prepare(settings, console=quiet()).config.runs_teacher is runs
        without = dataclasses.replace(settings, teacher_cache=None)
        assert prepare(without, console=quiet()).config.runs_teacher


def test_what_is_held_is_told_and_little_is_warned_of(project, made, one_width):
    settings, manifest = made
    console = quiet()
    make(settings, console)
    told = console.file.getvalue().replace("\n", " ")
    assert f"16 classes hold {manifest.held_mass:.4f} of the teacher's pr" in told
    assert manifest.held_mass < 0.95
    outside = 1 - manifest.held_mass
    assert f"{outside:.3f} of the teacher's probability is outside" in told
    assert "raise --top_k" in told
    console = quiet()
    size = len(hf.load_tokenizer(settings.student))
    whole = make(config(project, "whole"), console, top_k=size)
    assert whole.held_mass == pytest.approx(1.0, abs=1e-6)
    assert "hold 1.0000" in console.file.getvalue()
    assert "raise --top_k" not in console.file.getvalue()


def test_logits_that_are_not_finite_are_named(project, one_width, monkeypatch):
    load = hf.load_params
    monkeypatch.setattr(
        hf,
        "load_params",
        lambda *a, **k: jax.tree.map(lambda p: p * jnp.nan, load(*a, **k)),
    )
    with pytest.raises(ValueError, match="logits on example 0 are not finite"):
        make(config(project, "broken"), examples_per_shard=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher=None), "compare with a teacher, and none is set"),
        (dict(teacher_cache="elsewhere"), "--output elsewhere"),
        (dict(objective=Objective()), "objective.span=1.0 compares whole"),
    ],
)
def test_what_cannot_be_trained_on_is_not_made(project, changes, message):
    with pytest.raises(ValueError, match=message):
        make(config(project, "refused", **changes))
    assert not (project / "refused").exists()
