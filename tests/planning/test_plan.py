"""What `mgsr plan` makes of a compiler's answer; the compilers are in tests/aot."""

import dataclasses
import functools
import json

import jax
import pytest
import tiny

from mgsr_jax import sharding
from mgsr_jax.data import teacher_cache
from mgsr_jax.models.lora import LoraConfig
from mgsr_jax.objective import Objective
from mgsr_jax.planning import machines
from mgsr_jax.planning.compiled import Program, collectives
from mgsr_jax.planning.machines import GIB, Target
from mgsr_jax.planning.plan import Plan, plan, search, verdict
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.training.config import DataConfig, MeshConfig, TrainConfig

HERE = Target("here", tuple(jax.devices()), GIB)


@functools.cache
def planned(config):
    """Several tests compare with the same run."""
    return plan(config, HERE)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("shapes")
    for name, layers in (("student", 1), ("teacher", 2)):
        shape = tiny.LLAMA | {"num_hidden_layers": layers, "eos_token_id": 1}
        (tmp_path / f"{name}.json").write_text(json.dumps(shape))
    return TrainConfig(
        student=str(tmp_path / "student.json"),
        teacher=str(tmp_path / "teacher.json"),
        output="",
        data=DataConfig("", max_length=12, max_prompt_length=4),
        batch_size=16,
        micro_batches=2,
        steps=3,
        objective=Objective(num_candidates=8),
        rollout=RolloutConfig("on"),
        mesh=MeshConfig(fsdp=2, tensor=2),
    )


def test_the_parts_are_what_a_device_holds(config):
    found = planned(config)
    assert [program.name for program in found.programs] == ["rollout", "train step"]
    assert found.fits and verdict(found).startswith("fits: ")
    # 128 rows of the padded vocabulary, twice, over fsdp and tensor.
    tables = 2 * 128 * 16 * 4 // 4
    assert found.parts["student, float32"] > tables
    assert found.parts["optimizer"] >= 2 * found.parts["student, float32"]
    step = found.programs[1]
    names = ("student, float32", "optimizer", "clip network")
    assert step.aliased >= sum(found.parts[name] for name in names)
    assert step.collectives and step.peak > step.arguments


def test_with_adapters_the_students_weights_are_frozen(config):
    lora = LoraConfig(rank=2, alpha=4.0)
    found = planned(dataclasses.replace(config, lora=lora))
    whole = planned(config)
    assert found.parts["adapters, float32"] < whole.parts["student, float32"] / 4
    assert found.parts["student, float32"] == whole.parts["student, float32"]


def test_a_run_without_rollouts_has_one_program(config):
    found = planned(dataclasses.replace(config, rollout=RolloutConfig("off")))
    assert [program.name for program in found.programs] == ["train step"]


def test_a_teacher_that_no_step_asks_is_not_there(config):
    cached = dataclasses.replace(
        config,
        teacher_cache="cache",
        objective=Objective(num_candidates=8, span=0.0),
        rollout=RolloutConfig("off"),
    )
    found = planned(cached)
    assert found.fits and "teacher, float32" not in found.parts
    live = planned(dataclasses.replace(cached, teacher_cache=None))
    assert "teacher, float32" in live.parts


def test_what_a_cache_says_is_among_the_arguments(config, tmp_path):
    cached = dataclasses.replace(
        config,
        teacher_cache=str(tmp_path),
        objective=Objective(num_candidates=8, span=0.0),
        rollout=RolloutConfig("off"),
    )
    absent = planned(cached).programs[0].arguments
    origin = teacher_cache.Origin("", "", "", "")
    teacher_cache.finish(tmp_path, teacher_cache.Recipe(origin, 0, tiny.VOCAB, top_k=8))
    present = plan(cached, HERE).programs[0].arguments
    # Of 16 rows' 11 positions over data and fsdp, 2 bytes of a logit and an index.
    less = tiny.LLAMA["vocab_size"] - 8
    assert absent - present == 16 * 11 * less * (2 + 2) // 4


def test_a_teacher_in_int8_is_smaller_than_one_in_bfloat16(config):
    config = dataclasses.replace(config, rollout=RolloutConfig("off"))
    whole = planned(config).parts["teacher, float32"]
    found = planned(dataclasses.replace(config, teacher_dtype="int8"))
    assert found.fits
    # Tables of 128 rows, which stay in bfloat16, are most of this one.
    tables = 2 * 128 * 16 * 2 // 4
    halves = whole // 2 - tables
    assert 0.4 < (found.parts["teacher, int8"] - tables) / halves < 0.8


def made(peak, failure=None, memory=100 * GIB):
    program = Program("train step", 1.0, peak, 0, 0, {}, "")
    mesh = sharding.make_mesh()
    return Plan(Target("t", (), memory), mesh, 2, {}, (program,), failure)


def test_the_verdict_is_one_line():
    assert verdict(made(50 * GIB)).startswith("fits: 50.00 of 100.00 GiB")
    tight = verdict(made(95 * GIB))
    assert tight.startswith("does not fit: 95.00 of 100.00 GiB") and "fsdp" in tight
    failed = verdict(made(0, failure="Used 20G of 15G hbm"))
    assert failed.startswith("does not fit: Used 20G") and "\n" not in failed


def test_a_search_takes_the_smallest_mesh_and_the_fewest_micro_batches(config):
    trials = []
    config = dataclasses.replace(
        config, mesh=MeshConfig(), rollout=RolloutConfig("off"), micro_batches=1
    )
    needed = planned(config).peak
    roomy = dataclasses.replace(HERE, memory=4 * needed)
    found = search(config, roomy, trials.append)
    assert found is not None and found.mesh.shape["fsdp"] == 1
    assert found.micro_batches == 1 and trials == [found]
    assert search(config, dataclasses.replace(HERE, memory=1000), trials.append) is None
    assert trials == [found]  # what stays in memory was too much: nothing was compiled


def test_a_search_leaves_out_what_does_not_divide(config, monkeypatch):
    # 16 wide models on six devices: three parts are impossible, two have no room.
    six = dataclasses.replace(HERE, devices=HERE.devices[:6], memory=1000)
    even = dataclasses.replace(config, mesh=MeshConfig(), batch_size=12)
    assert search(even, six, print) is None
    with pytest.raises(ValueError, match="batch_size=10 does not divide over 6"):
        search(dataclasses.replace(even, batch_size=10), six, print)

    class Large:
        has_room = True

        def __init__(self, config, target):
            self.tried = config.mesh.fsdp, config.micro_batches

        def plan(self):
            tried.append(self.tried)
            return made(95 * GIB)

    tried = []
    monkeypatch.setattr("mgsr_jax.planning.plan._planner", Large)
    four = dataclasses.replace(HERE, devices=HERE.devices[:4])
    assert search(even, four, lambda trial: None) is None
    # Not two micro-batches, of six rows over four devices.
    assert tried == [(1, 1), (1, 3), (2, 1), (2, 3), (4, 1), (4, 3)]


def test_a_teacher_that_a_step_has_heard_already_is_still_in_memory(config):
    config = dataclasses.replace(
        config,
        objective=Objective(num_candidates=8, sft=0.0),
        rollout=RolloutConfig("on", probability=0.5),
    )
    found = planned(config)
    names = [program.name for program in found.programs]
    assert names == ["rollout", "train step", "train step on the data"]
    heard, runs = found.programs[1:]
    # Its layers are none of the first's arguments, but for what reads hidden states.
    assert heard.arguments < runs.arguments
    kept = [size for name, size in found.parts.items() if "cop" not in name]
    staying = sum(kept) - found.parts["cache of the student"]
    assert heard.peak > staying and runs.peak > staying


def test_a_kernel_of_another_platform_is_refused(config):
    with pytest.raises(ValueError, match="a kernel for a tpu, and these .* cpu"):
        plan(dataclasses.replace(config, attention="flash"), HERE)


def test_a_missing_cudnn_is_told(config, monkeypatch):
    def compile_program(*_, **__):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr("mgsr_jax.planning.plan.compile_program", compile_program)
    with pytest.raises(ValueError, match="plan with attention: xla"):
        plan(config, HERE)


def test_collectives_are_counted_with_what_comes_out():
    text = """
      %a = f32[4,8]{1,0} all-reduce(%x), to_apply=%add
      %b = (bf16[2,8], bf16[16,8]) all-gather-start(%y), dimensions={0}
      %c = bf16[16,8] all-gather-done(%b)
      %d = (f32[2], pred[3]) all-to-all(%u, %v)
    """
    assert collectives(text) == {
        "all-gather": (1, 256),
        "all-reduce": (1, 128),
        "all-to-all": (1, 11),
    }


@pytest.mark.parametrize(
    "name", ["v5p", "h200", "h200:8", "v9z:2x2", "V5P:2x2x1", "h200:1x8", ""]
)
def test_a_target_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match="expected KIND:SHAPE such as v5p:4x4x4"):
        machines.describe(name)
