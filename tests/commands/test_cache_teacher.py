"""`mgsr cache-teacher`: the cache holds the teacher's outputs, computed once each."""

import dataclasses
import functools
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
from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.parser import main
from mgsr_jax.data import teacher_shards
from mgsr_jax.data.batches import eval_batches, train_batches
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.losses import top_k_teacher
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.rows import next_token_view
from mgsr_jax.training.config import DataConfig, MeshConfig, TrainConfig
from mgsr_jax.training.inputs import origin_of, prepare, read_inputs

TOP_K, WIDTH, EXAMPLES = 16, 128, 24


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """A program that one test compiles is used by the tests after it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "make_top_k_step", functools.cache(make_top_k_step))
        yield


@pytest.fixture(scope="module")
def ragged(project, tmp_path_factory):
    """The project with responses of 13, 25 and 37 tokens after prompts of 37."""
    folder = tmp_path_factory.mktemp("ragged")
    for name in ("student", "teacher"):
        (folder / name).symlink_to(project / name)
    lines = []
    for i, record in enumerate(tiny.records(EXAMPLES)):
        output = " ".join([record["output"]] * (1 + i % 3))
        lines.append(json.dumps(record | {"output": output}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config(folder, name="cache", **changes):
    settings = dict(
        student=str(folder / "student"),
        teacher=str(folder / "teacher"),
        output=str(folder / name),
        steps=1,
        batch_size=8,
        data=DataConfig(
            train=str(folder / "train.jsonl"),
            max_prompt_length=40,
            max_length=WIDTH,
            cache_dir=str(folder / "cache_dir"),
        ),
        objective=Objective(span=0.0, num_candidates=TOP_K),
        mesh=MeshConfig(data=1, fsdp=2),
    )
    return TrainConfig(**settings | changes)


def quiet():
    return Console(file=io.StringIO(), width=200)


def write(settings, console=None, **options):
    options = dict(top_k=TOP_K, logits_dtype="float32", examples_per_shard=10) | options
    return write_teacher_cache(settings, console=console or quiet(), **options)


def opened(settings):
    inputs = read_inputs(settings, console=quiet())
    return TeacherCache.open(settings.output, origin_of(inputs)), inputs


@pytest.fixture(scope="module")
def written(ragged):
    """The settings and the manifest of a cache."""
    settings = config(ragged)
    return settings, write(settings)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_the_command_writes_a_cache(ragged, written, capsys):
    settings, _ = written
    recipe = {"student": settings.student, "teacher": settings.teacher}
    recipe |= {"objective": {"span": 0.0, "num_candidates": TOP_K}}
    recipe |= {"data": dataclasses.asdict(settings.data) | {"buckets": []}}
    recipe |= {"steps": 1, "batch_size": 8, "mesh": {"data": 1, "fsdp": 2}}
    (ragged / "recipe.json").write_text(json.dumps(recipe))
    output = ragged / "by_command"
    arguments = ["cache-teacher", "--config", str(ragged / "recipe.json")]
    arguments += ["--output", str(output), "--top_k", str(TOP_K)]
    assert main([*arguments, "--logits_dtype", "float32"]) == DONE
    assert "16 classes hold" in capsys.readouterr().err
    recipe = json.loads((output / "manifest.json").read_text())["recipe"]
    assert recipe["top_k"] == TOP_K and recipe["logits_dtype"] == "float32"
    assert recipe["examples"] == EXAMPLES


@pytest.mark.slow
def test_the_cache_holds_what_the_teacher_computes(written):
    """All examples, in the training's order and over two epochs."""
    settings, manifest = written
    cache, inputs = opened(settings)
    teacher = models.from_config(settings.teacher)
    params = hf.load_params(settings.teacher, teacher)

    @jax.jit
    def reference(rows):
        hidden, _ = teacher.forward(params, next_token_view(rows).inputs)
        logits = teacher.unembed(teacher.head_params(params), hidden)
        return logits, top_k_teacher(logits, TOP_K, vocab_size=inputs.vocab_size)

    source = train_batches(inputs.train, 8, widths=[WIDTH], seed=3)
    seen, positions = [], 0
    for _ in range(2 * EXAMPLES // 8):
        rows = next(source)
        logits, want = reference(jax.tree.map(jnp.asarray, rows))
        outputs, where = cache.lookup(rows), np.asarray(next_token_view(rows).where)
        np.testing.assert_allclose(
            outputs.logits[where], want.logits[where], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            outputs.logsumexp[where], want.logsumexp[where], rtol=1e-5, atol=1e-6
        )
        # Classes are compared by their logits: two logits that are equal up to
        # rounding may come in either order.
        by_index = np.take_along_axis(
            np.asarray(logits - logits.max(-1, keepdims=True)),
            outputs.indices.astype(np.int32),
            axis=-1,
        )
        np.testing.assert_allclose(
            by_index[where], outputs.logits[where], rtol=1e-4, atol=1e-5
        )
        distinct = [len(set(classes)) for classes in outputs.indices[where].tolist()]
        assert set(distinct) == {TOP_K}
        seen += rows.example.tolist()
        positions += where.sum()
    assert sorted(seen) == sorted([*range(EXAMPLES)] * 2)
    assert positions == 2 * manifest.positions


def test_padding_of_the_vocabulary_has_no_probability(written):
    """The embedding has three rows more than the tokenizer has tokens."""
    cache, inputs = opened(written[0])
    assert inputs.teacher.config.vocab_size == inputs.vocab_size + 3
    rows = next(eval_batches(inputs.train, 8, widths=[WIDTH]))
    assert cache.lookup(rows).indices.max() < inputs.vocab_size


def test_short_examples_are_read_in_narrow_rows(written):
    """Each example once; filler rows have the index -1."""
    _, inputs = opened(written[0])
    widths, seen = [], []
    for rows in command._batches(inputs, range(4, EXAMPLES)):
        width = rows.tokens.shape[1]
        assert (rows.lengths <= width).all()
        assert width == 64 or (rows.lengths > 64).any()
        widths.append(width)
        seen += [i for i in rows.example.tolist() if i != -1]
    # 6 rows of 50 tokens, 7 of 62, 7 of 74, in batches of 8.
    assert widths == [64, 128, 128] and sorted(seen) == [*range(4, EXAMPLES)]


@pytest.mark.slow
def test_unscored_positions_are_neither_projected_nor_kept(monkeypatch):
    """The longest response decides how many chunks of `_CHUNK` tokens are projected."""
    monkeypatch.setattr(command, "_CHUNK", 8)
    mesh = sharding.make_mesh(1, 2)
    model, params = tiny.llama(num_hidden_layers=1)
    lengths = ((2, 5), (8, 3), (3, 1), (4, 6))
    rows = tiny.complete(lengths)
    projected = []

    class Counted(type(model)):
        def unembed(self, head, hidden):
            jax.debug.callback(lambda: projected.append(hidden.shape[:2]))
            return super().unembed(head, hidden)

    counted = Counted(model.config, model.architecture)
    step = make_top_k_step(counted, top_k=4, vocab_size=tiny.VOCAB, mesh=mesh)
    with jax.set_mesh(mesh):
        outputs = jax.device_get(step(params, rows))
    jax.effects_barrier()
    # Two rows per device: 6 of a row's 13 positions are read, in chunks of 4.
    assert projected == [(4, 4)] * 2

    @jax.jit
    def reference(params, rows):
        hidden, _ = model.forward(params, next_token_view(rows).inputs)
        logits = model.unembed(model.head_params(params), hidden)
        return top_k_teacher(logits, 4, vocab_size=tiny.VOCAB)

    want = reference(params, rows)
    for b, (prompt, response) in enumerate(lengths):
        for ours, theirs in zip(outputs, want, strict=True):
            np.testing.assert_allclose(
                ours[b, :response],
                theirs[b, prompt - 1 : prompt + response - 1],
                rtol=1e-4,
                atol=1e-5,
            )


def test_a_stopped_command_continues_to_the_same_bytes(ragged, written, monkeypatch):
    """The shards that exist are kept; only the others are computed."""
    settings = config(ragged, "stopped")
    write_shard, shards = teacher_shards.write_shard, []

    def stop_before_the_second(folder, recipe, number, examples):
        if shards and not resumed:
            raise KeyboardInterrupt
        shards.append((number, len(examples)))
        write_shard(folder, recipe, number, examples)

    monkeypatch.setattr(teacher_shards, "write_shard", stop_before_the_second)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        write(settings)
    assert sorted(files(ragged / "stopped")) == ["shard-00000.safetensors"]
    with pytest.raises(FileNotFoundError, match="not finished"):
        opened(settings)
    resumed, console = True, quiet()
    write(settings, console)
    assert shards == [(0, 10), (1, 10), (2, 4)]
    assert "10 of 24 examples are there" in console.file.getvalue()
    assert files(ragged / "stopped") == files(ragged / "cache")


def test_a_finished_cache_is_not_computed_again(written, monkeypatch):
    settings, manifest = written
    monkeypatch.setattr(hf, "load_params", None)
    assert write(settings) == manifest


def test_a_stopped_command_does_not_continue_with_other_settings(written):
    settings, _ = written
    with pytest.raises(ValueError, match=r"another top_k \(expected 17, got 16\)"):
        write(settings, top_k=17)
    other = dataclasses.replace(settings, teacher_dtype="bfloat16")
    with pytest.raises(ValueError, match="another teacher_dtype"):
        write(other)


def change_weight(folder):
    """Change one bit of the last tensor."""
    file = folder / "model.safetensors"
    weights = bytearray(file.read_bytes())
    weights[-1] ^= 1
    file.write_bytes(weights)


def swap_tokens(folder):
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    vocab = text["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
    file.write_text(json.dumps(text))


def change_record(file):
    lines = file.read_text().splitlines()
    lines[5] = lines[5].replace("the old", "the small")
    file.write_text("\n".join(lines) + "\n")


def reverse_records(file):
    file.write_text("\n".join(reversed(file.read_text().splitlines())) + "\n")


@pytest.mark.parametrize(
    ("change", "paths", "difference"),
    [
        (change_weight, ["teacher"], "another teacher "),
        # The rows differ too, because their token ids do.
        (swap_tokens, ["teacher", "student"], "another tokenizer "),
        (change_record, ["train.jsonl"], "another data "),
        (reverse_records, ["train.jsonl"], "another data "),
    ],
)
def test_training_refuses_a_cache_of_other_inputs(
    ragged, written, tmp_path, change, paths, difference
):
    """The error names the input, and nothing is written."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("teacher", "student"):
        shutil.copytree(ragged / name, copy / name)
    shutil.copy(ragged / "train.jsonl", copy)
    settings = config(copy, "run", teacher_cache=written[0].output)
    prepare(settings, console=quiet())  # the same files at another place
    for name in paths:
        change(copy / name)
    with pytest.raises(ValueError, match=f"was made from {difference}.*make a new one"):
        prepare(settings, console=quiet())
    assert not (copy / "run").exists()


def test_other_lengths_are_other_data(ragged, written):
    settings = config(ragged, "run", teacher_cache=written[0].output)
    shorter = dataclasses.replace(settings.data, max_length=60, too_long="truncate")
    with pytest.raises(ValueError, match="another data "):
        prepare(dataclasses.replace(settings, data=shorter), console=quiet())


def test_more_candidates_than_the_cache_has_classes_are_refused(ragged, written):
    objective = Objective(span=0.0, num_candidates=17)
    cache = written[0].output
    for divergence in ("dac_kl", "dac_kl_fixed"):
        wants_more = dataclasses.replace(objective, divergence=divergence)
        settings = config(ragged, "run", objective=wants_more)
        message = "num_candidates=17.* teacher cache .*16 classes.*--top_k 17"
        with pytest.raises(ValueError, match=message):
            write(settings)
        with pytest.raises(ValueError, match=message):
            prepare(dataclasses.replace(settings, teacher_cache=cache), console=quiet())
    forward_kl = dataclasses.replace(objective, divergence="forward_kl")
    settings = config(ragged, "run", objective=forward_kl, teacher_cache=cache)
    assert prepare(settings, console=quiet()).teacher_cache is not None
    assert not (ragged / "run").exists()


def test_the_teacher_runs_where_the_student_generates(ragged, written):
    for policy, runs in (("off", False), ("on", True)):
        settings = config(
            ragged,
            "run",
            teacher_cache=written[0].output,
            rollout=RolloutConfig(policy),
        )
        assert prepare(settings, console=quiet()).config.runs_teacher is runs
        without = dataclasses.replace(settings, teacher_cache=None)
        assert prepare(without, console=quiet()).config.runs_teacher


def test_the_mass_of_the_classes_is_printed_with_a_warning_if_small(ragged, written):
    settings, manifest = written
    console = quiet()
    write(settings, console)
    printed = console.file.getvalue().replace("\n", " ")
    assert f"16 classes hold {manifest.held_mass:.4f} of the teacher's pr" in printed
    assert manifest.held_mass < 0.95
    outside = 1 - manifest.held_mass
    assert f"{outside:.3f} of the teacher's probability is outside" in printed
    assert "raise --top_k" in printed


@pytest.mark.exhaustive
def test_all_classes_hold_all_of_the_mass(ragged, monkeypatch):
    monkeypatch.setattr(command, "_NARROWEST", WIDTH)  # one program to compile
    console = quiet()
    size = len(hf.load_tokenizer(ragged / "student"))
    manifest = write(config(ragged, "all_classes"), console, top_k=size)
    assert manifest.held_mass == pytest.approx(1.0, abs=1e-6)
    assert "hold 1.0000" in console.file.getvalue()
    assert "raise --top_k" not in console.file.getvalue()


def test_logits_that_are_not_finite_are_an_error(ragged, monkeypatch):
    load = hf.load_params
    monkeypatch.setattr(
        hf,
        "load_params",
        lambda *a, **k: jax.tree.map(lambda p: p * jnp.nan, load(*a, **k)),
    )
    with pytest.raises(ValueError, match="logits on example 0 are not finite"):
        write(config(ragged, "broken"), examples_per_shard=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(teacher=None), "compare with a teacher, and none is set"),
        (dict(teacher_cache="elsewhere"), "--output elsewhere"),
        (dict(objective=Objective()), "objective.span=1.0 compares whole"),
    ],
)
def test_a_cache_that_training_would_refuse_is_not_written(ragged, changes, message):
    with pytest.raises(ValueError, match=message):
        write(config(ragged, "refused", **changes))
    assert not (ragged / "refused").exists()
