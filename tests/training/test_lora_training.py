"""LoRA from the train step to the exports: what is trained and what stays."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import tiny
import torch
import transformers
import yaml
from jax.sharding import PartitionSpec as P
from rich.console import Console
from safetensors.numpy import load_file
from test_trainer import assert_same, changed, config, run, sft, stop_after
from tiny import LLAMA

from mgsr_jax import losses, models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.commands.export import export_student
from mgsr_jax.models import lora
from mgsr_jax.models.lora import LORA, LoraConfig
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.train_step import dropout_keys, init_state, make_train_step
from mgsr_jax.training.config import MeshConfig
from mgsr_jax.training.initial_state import load_state
from mgsr_jax.training.inputs import prepare
from mgsr_jax.training.optimizer import OptimizerConfig, decayed, make_optimizer
from mgsr_jax.training.programs import make_programs

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*forward-compatible:DeprecationWarning",
    # peft asks transformers by a name that is on its way out.
    "ignore:.*is_gradient_checkpointing",
)

CONFIG = LoraConfig(rank=2, alpha=4.0, dropout=0.3, targets="attention|mlp/up")
MODEL = dataclasses.replace(models.from_config(LLAMA), lora=CONFIG)
SFT = Objective(token=0.0, span=0.0)
ROWS = tiny.complete(width=12)
SETTINGS = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1)


@pytest.fixture(scope="module")
def base():
    return jax.device_get(jax.jit(MODEL.init)(jax.random.key(0)))


def fresh(base, optimizer, dtype=jnp.float32):
    """A state whose buffers the step may take; no adapter is zero."""
    adapters = lora.init(jax.random.key(1), MODEL, CONFIG)
    params = {"student": {LORA: jax.tree.map(lambda x: x + 0.02, adapters)}}
    frozen = {"student": jax.tree.map(lambda x: jnp.array(x, dtype), base)}
    return init_state(params, optimizer, 0, frozen=frozen)


def recorder():
    """An optimizer that moves nothing and keeps the gradient as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads),
    )


def gradient_of(base, micro_batches, *, dropout):
    step = make_train_step(MODEL, None, recorder(), SFT, dropout=dropout)
    state, metrics = step(fresh(base, recorder()), None, micro_batches)
    return jax.device_get((state.opt_state, metrics["loss"].total))


def addresses(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def test_a_step_moves_the_adapters_and_nothing_else(base):
    optimizer = make_optimizer(SETTINGS, 5)
    step = make_train_step(MODEL, None, optimizer, SFT, dropout=True)
    state = fresh(base, optimizer, jnp.bfloat16)
    # Copies: a view of a buffer would keep it from being donated.
    before, frozen = jax.tree.map(np.array, (state.params, state.frozen))
    old, places = jax.tree.leaves((state.params, state.frozen)), addresses(state.frozen)
    seen = []
    for _ in range(5):
        state, metrics = step(state, None, (ROWS,))
        seen.append(float(metrics["loss"].total))
    assert seen[-1] < seen[0]
    assert all(leaf.is_deleted() for leaf in old)
    assert addresses(state.frozen) == places  # not copied either
    assert_same(jax.device_get(state.frozen), frozen)
    assert {x.dtype for x in jax.tree.leaves(state.frozen)} == {jnp.dtype("bfloat16")}
    moved = jax.tree.map(lambda a, b: bool(np.all(a != b)), state.params, before)
    assert all(jax.tree.leaves(moved)) and set(state.params["student"]) == {LORA}
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    moments = jax.tree.leaves(optax.tree.get_all_with_path(state.opt_state, "mu"))
    sizes = sum(x.size for x in moments if isinstance(x, jax.Array))
    assert sizes == sum(x.size for x in jax.tree.leaves(state.params))
    assert set(state.all_params["student"]) == {*base, LORA}
    assert set(state.checkpointed) == {"step", "key", "params", "opt_state"}


def test_the_step_s_gradient_is_that_of_the_merged_student(base):
    got, loss = gradient_of(base, (ROWS,), dropout=False)
    plain = dataclasses.replace(MODEL, lora=LoraConfig())
    adapters = jax.device_get(fresh(base, recorder()).params["student"][LORA])
    merged = lora.merge(base, adapters, CONFIG)
    state = init_state({"student": jax.tree.map(jnp.array, merged)}, recorder(), 0)
    state, metrics = make_train_step(plain, None, recorder(), SFT)(state, None, (ROWS,))
    np.testing.assert_allclose(loss, metrics["loss"].total, rtol=1e-6)
    kernels = jax.device_get(state.opt_state)["student"]["layers"]
    for path, own in lora.by_path(got["student"][LORA]).items():
        kernel, adapter = kernels, adapters
        for name in path.split("/"):
            kernel, adapter = kernel[name], adapter[name]
        kernel = np.float64(kernel["kernel"]) * CONFIG.scale
        for name, want in (
            ("a", kernel @ np.swapaxes(adapter["b"], 1, 2)),
            ("b", np.swapaxes(adapter["a"], 1, 2) @ kernel),
        ):
            np.testing.assert_allclose(own[name], want, atol=1e-6, rtol=2e-4)


def test_micro_batches_do_not_change_what_is_left_out(base):
    four = tuple(jax.tree.map(lambda x, i=i: x[i : i + 1], ROWS) for i in range(4))
    whole, loss = gradient_of(base, (ROWS,), dropout=True)
    parts, loss_of_parts = gradient_of(base, four, dropout=True)
    np.testing.assert_allclose(loss, loss_of_parts, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4),
        whole,
        parts,
    )
    without, _ = gradient_of(base, (ROWS,), dropout=False)
    path = ("student", LORA, "mlp", "up", "b")
    for name in path:
        whole, without = whole[name], without[name]
    assert np.abs(whole - without).max() > 0.01 * np.abs(without).max()


def test_dropout_keys_are_by_example_and_author():
    key, rows = jax.random.key(0), ROWS
    own = dataclasses.replace(rows, ground_truth=~rows.ground_truth)
    data = [jax.random.key_data(dropout_keys(key, r)).tolist() for r in (rows, own)]
    assert len({tuple(k) for part in data for k in part}) == 8
    turned = jax.tree.map(lambda x: x[::-1], rows)
    again = jax.random.key_data(dropout_keys(key, turned)).tolist()
    assert again == data[0][::-1]


def test_two_steps_leave_out_something_else(base):
    """No parameter changes: only dropout makes the losses differ."""
    step = make_train_step(MODEL, None, recorder(), SFT, dropout=True)
    state, seen = fresh(base, recorder()), []
    for _ in range(2):
        state, metrics = step(state, None, (ROWS,))
        seen.append(float(metrics["loss"].total))
    assert abs(seen[0] - seen[1]) > 1e-4


def test_adapters_decay_as_matrices():
    adapters = lora.init(jax.random.key(1), MODEL, CONFIG)
    clip = losses.init_clip_network(jax.random.key(0), num_candidates=4)
    chosen = decayed({"student": {LORA: adapters}})
    assert all(jax.tree.leaves(chosen))
    optimizer = make_optimizer(SETTINGS, 5)
    params = {"student": {LORA: adapters}, "clip_network": clip}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    jax.tree.map(
        lambda u, p: np.testing.assert_allclose(u, -1e-3 * p, atol=1e-9),
        updates["student"][LORA],
        adapters,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


ADAPTERS = LoraConfig(rank=2, alpha=8.0, dropout=0.1)


@pytest.fixture(scope="module")
def straight(project):
    """Four steps of the whole method, with the student's own text among them."""
    settings = config(
        project,
        "straight",
        lora=ADAPTERS,
        rollout=RolloutConfig("on", probability=0.5),
        save_every=2,
    )
    return settings, run(settings)


def test_the_whole_method_trains_adapters(project, straight):
    settings, result = straight
    assert result.finished
    lines = (project / "straight" / "metrics.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    assert {line.get("rollout/student_share") for line in lines} >= {0.0, 1.0}
    valid = [line["valid/loss"] for line in lines if "valid/loss" in line]
    assert valid[-1] < valid[0]
    saved = tiny.checkpoint(project / "straight")["state"]["params"]["student"]
    assert set(saved) == {LORA}
    text = (project / "straight" / "config.yaml").read_text()
    assert yaml.safe_load(text)["lora"]["alpha"] == 8.0


def test_two_steps_a_restart_and_two_more_equal_four(project, straight):
    settings, _ = straight
    halves = dataclasses.replace(settings, output=str(project / "halves"))
    stop_after(2, halves)
    run(dataclasses.replace(halves, resume=True))
    assert_same(
        tiny.checkpoint(project / "halves"), tiny.checkpoint(project / "straight")
    )
    exports = (weights(project / name / "student") for name in ("halves", "straight"))
    assert_same(*exports)


def test_mesh_and_micro_batches_do_not_change_the_losses(project):
    seen = []
    for name, mesh, parts in (
        ("mesh", MeshConfig(4, 2), 1),
        ("parts", MeshConfig(2, 1), 4),
    ):
        devices = jax.devices()[: mesh.data * mesh.fsdp]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sharding.jax, "devices", lambda d=devices: d)
            settings = dict(steps=2, mesh=mesh, micro_batches=parts, lora=ADAPTERS)
            run(sft(project, name, **settings))
        lines = (project / name / "metrics.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in lines]
        seen.append([line["train/loss"] for line in lines if "train/loss" in line])
    np.testing.assert_allclose(*seen, rtol=1e-5)


def test_adapters_and_what_is_frozen_lie_as_the_rules_say(project):
    settings = config(
        project, "places", lora=ADAPTERS, mesh=MeshConfig(4, 2), dtype="bfloat16"
    )
    setup = prepare(settings, console=Console(file=io.StringIO()))
    with jax.set_mesh(setup.mesh):
        programs = make_programs(
            settings,
            setup.student,
            setup.teacher,
            mesh=setup.mesh,
            vocab_size=setup.vocab_size,
            eos_ids=setup.eos_ids,
            steps=setup.steps,
        )
        state = load_state(
            settings.student,
            setup.student,
            programs,
            mesh=setup.mesh,
            dtype=jnp.bfloat16,
            seed=0,
        )
    query = state.params["student"][LORA]["attention"]["query"]
    assert query["a"].sharding.spec == P(None, "fsdp", None)
    kernel = state.frozen["student"]["layers"]["attention"]["query"]["kernel"]
    assert kernel.dtype == jnp.bfloat16 and kernel.sharding.spec[1] == "fsdp"
    assert state.params["clip_network"] and "clip_network" not in state.frozen
    inner = state.opt_state.inner_states["student"]
    (adam,) = optax.tree.get_all_with_path(inner, "mu")
    moments = adam[1]["student"]
    assert moments[LORA]["attention"]["query"]["a"].sharding == query["a"].sharding


def weights(folder):
    return load_file(folder / "model.safetensors")


def logits_of(folder, ids):
    model = models.from_config(folder)
    params = hf.load_params(folder, model)
    hidden, _ = model.forward(params, ids)
    return model.unembed(model.head_params(params), hidden)


def test_the_exports_are_the_student(project, straight, tmp_path):
    """Merged at the end of the run and by export; adapters alone for peft."""
    settings, result = straight
    export_student(settings.output, tmp_path / "merged")
    export_student(settings.output, tmp_path / "adapter", adapter=True)
    assert_same(weights(tmp_path / "merged"), weights(result.student))
    ids = np.arange(3, 15)[None]
    model = dataclasses.replace(models.from_config(settings.student), lora=ADAPTERS)
    saved = tiny.checkpoint(project / "straight")["state"]["params"]["student"]
    saved = jax.tree.map(jnp.asarray, saved)
    own = hf.load_params(settings.student, model) | saved
    hidden, _ = model.forward(own, jnp.asarray(ids))
    want = model.unembed(model.head_params(own), hidden)
    student = np.asarray(logits_of(settings.student, jnp.asarray(ids)))
    assert np.abs(want - student).max() > 0.05

    def theirs(model):
        with torch.no_grad():
            return model.eval()(torch.tensor(ids)).logits.numpy()

    load = transformers.AutoModelForCausalLM.from_pretrained
    np.testing.assert_allclose(theirs(load(result.student)), want, atol=1e-4)
    adapted = peft.PeftModel.from_pretrained(
        load(settings.student), tmp_path / "adapter"
    )
    np.testing.assert_allclose(theirs(adapted), want, atol=1e-4)


def test_what_has_no_adapter_stays_as_it_was(project, straight):
    settings, result = straight
    model = models.from_config(settings.student)
    before, after = (
        hf.load_params(folder, model) for folder in (settings.student, result.student)
    )
    same = jax.tree.map(lambda a, b: bool(np.all(a == b)), before, after)
    assert not same["layers"]["attention"]["query"].pop("kernel")
    assert not same["layers"]["attention"]["value"].pop("kernel")
    assert all(jax.tree.leaves(same))


def test_plain_fine_tuning_of_adapters(project):
    """The student is in half precision, and is exported as it was trained."""
    half = dict(steps=2, lora=ADAPTERS, dtype="bfloat16")
    result = run(sft(project, "half", **half))
    export_student(project / "half", project / "half_again")
    assert_same(weights(project / "half_again"), weights(result.student))


def test_a_resumed_run_must_find_the_same_student(project, tmp_path):
    """Its weights are in no checkpoint."""
    folder = shutil.copytree(project / "student", tmp_path / "student")
    settings = sft(project, "moved", steps=2, lora=ADAPTERS, student=str(folder))
    stop_after(1, settings)
    model = models.from_config(folder)
    params = jax.tree.map(lambda x: x * 1.01, hf.load_params(folder, model))
    hf.save_pretrained(folder, model, params, tokenizer_from=folder, overwrite=True)
    with pytest.raises(ValueError, match="is not the one that the adapters of"):
        run(dataclasses.replace(settings, resume=True))


def test_mistakes_are_named_and_write_nothing(project, straight, tmp_path):
    settings, _ = straight
    wrong = changed(settings, lora={"targets": "q_proj"})
    wrong = dataclasses.replace(wrong, output=str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match="lora.targets='q_proj' matches no kernel"):
        run(wrong)
    assert not (tmp_path / "wrong").exists()
    other = changed(settings, lora={"rank": 3})
    with pytest.raises(ValueError, match="lora.rank was 2, is 3"):
        run(dataclasses.replace(other, resume=True))
    plain = sft(project, "plain", steps=1)
    run(plain)
    with pytest.raises(ValueError, match="has no adapter; leave --adapter out"):
        export_student(plain.output, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()
