"""Plans of tiny runs on the CPU; tests/aot has the TPU and GPU compilers."""

import dataclasses
import json
import pathlib

import jax
import pytest
import tiny

from mgsr_jax import sharding
from mgsr_jax.data import teacher_cache
from mgsr_jax.models.lora import LoraConfig
from mgsr_jax.objective import Objective
from mgsr_jax.planning.compiled import CompiledProgram
from mgsr_jax.planning.estimate import Estimate
from mgsr_jax.planning.machines import GIB, Machine
from mgsr_jax.planning.plan import Plan, plan_run, search_mesh
from mgsr_jax.planning.roofline import Roofline
from mgsr_jax.planning.speeds import SPEEDS
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import DataConfig, MeshConfig, TrainConfig

FOUR = Machine("four", tuple(jax.devices()[:4]), GIB, SPEEDS["v5e"])


PLANS: dict[str, Plan] = {}


def planned(config):
    """Several tests compare with the same run."""
    if (key := repr(config)) not in PLANS:
        PLANS[key] = plan_run(config, FOUR)
    return PLANS[key]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on rollouts, on a mesh of 1 x 2 x 2 devices."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, layers in (("student", 1), ("teacher", 2)):
        shape = tiny.LLAMA | {"num_hidden_layers": layers, "eos_token_id": 1}
        (folder / f"{name}.json").write_text(json.dumps(shape))
    return TrainConfig(
        student=str(folder / "student.json"),
        teacher=str(folder / "teacher.json"),
        output="",
        data=DataConfig("", max_length=12, max_prompt_length=4),
        batch_size=8,
        micro_batches=2,
        steps=3,
        objective=Objective(num_candidates=8),
        rollout=RolloutConfig("on"),
        mesh=MeshConfig(fsdp=2, tensor=2),
    )


@pytest.fixture(scope="module")
def on_data(config):
    """The same run on the data's rows: one program, which compiles in less time."""
    return dataclasses.replace(config, rollout=RolloutConfig("off"))


@pytest.mark.slow
def test_parts_are_the_bytes_of_one_device(config):
    plan = planned(config)
    assert [program.name for program in plan.programs] == ["rollout", "train step"]
    assert plan.fits
    # 128 rows of the padded vocabulary, twice, over fsdp and tensor.
    tables = 2 * 128 * 16 * 4 // 4
    assert plan.parts["student, float32"] > tables
    assert plan.parts["optimizer"] >= 2 * plan.parts["student, float32"]
    assert plan.parts["decoder's copy, float32"] == plan.parts["student, float32"]
    step = plan.programs[1]
    rollout, training = plan.estimates
    assert plan.floor == rollout.floor + training.floor
    names = ("student, float32", "optimizer", "clip network")
    assert step.aliased >= sum(plan.parts[name] for name in names)
    assert step.collectives and step.peak > step.arguments


@pytest.mark.slow
def test_every_loop_whose_trips_data_decide_has_them_stated(config):
    """Eight rows, four at a time; responses of 8 tokens, half written again."""
    four_rows = dataclasses.replace(config.rollout, decode_rows=4)
    rollout, step = planned(dataclasses.replace(config, rollout=four_rows)).estimates
    assert dict(rollout.assumed) == {
        "decode/exchange": 2,
        "decode/exchange/extend": 1,  # 8 tokens between two checks
        "read_whole/exchange": 2,
        "read_whole/exchange/extend": 1,
        "token_kl": 1,
        "locate_error": 1,
        "rewrite/decode/exchange": 2,
        "rewrite/decode/exchange/extend": 1,
        "read_on/exchange": 2,
        "read_on/exchange/extend": 1,
    }
    assert dict(step.assumed) == {"chunks": 1}
    assert rollout.tokens == 8 * 8 and step.tokens == 2 * 8 * 8
    assert rollout.useful is not None and 0 < rollout.useful < 1
    assert step.useful is None and 0 < step.mfu <= 1


@pytest.mark.exhaustive
def test_skd_has_its_trips_stated(config):
    skd = dataclasses.replace(config, rollout=RolloutConfig("on", intervention="skd"))
    trips = dict(plan_run(skd, FOUR).estimates[0].assumed)
    assert None not in trips.values()
    assert trips["write_together/extend"] == 1  # one draft of 8 tokens


@pytest.mark.slow
def test_with_adapters_the_students_weights_are_frozen(on_data):
    lora = LoraConfig(rank=2, alpha=4.0)
    adapted = planned(dataclasses.replace(on_data, lora=lora))
    full = planned(on_data)
    assert adapted.parts["adapters, float32"] < full.parts["student, float32"] / 4
    assert adapted.parts["student, float32"] == full.parts["student, float32"]


@pytest.mark.slow
def test_a_run_without_rollouts_has_one_program(on_data):
    assert [program.name for program in planned(on_data).programs] == ["train step"]


@pytest.fixture(scope="module")
def with_cache(on_data, tmp_path_factory):
    """A run that reads its teacher from a cache, which is not written yet."""
    return dataclasses.replace(
        on_data,
        teacher_cache=str(tmp_path_factory.mktemp("cache")),
        objective=Objective(num_candidates=8, span=0.0),
    )


@pytest.mark.slow
def test_a_teacher_that_no_step_runs_is_not_in_memory(with_cache, on_data):
    plan = planned(with_cache)
    assert plan.fits and "teacher, float32" not in plan.parts
    assert "teacher, float32" in planned(on_data).parts


@pytest.mark.slow
def test_a_teacher_cache_is_among_the_arguments(with_cache):
    default = planned(with_cache).programs[0].arguments
    folder = with_cache.teacher_cache
    origin = teacher_cache.Origin("", "", "", "")
    teacher_cache.finish(folder, teacher_cache.Recipe(origin, 0, tiny.VOCAB, top_k=8))
    written = plan_run(with_cache, FOUR).programs[0].arguments
    # 8 rows' 11 positions over data and fsdp, 2 bytes per logit and per index.
    classes = tiny.LLAMA["vocab_size"] - 8
    assert default - written == 8 * 11 * classes * (2 + 2) // 2


@pytest.mark.slow
def test_an_int8_teacher_is_smaller_than_a_bfloat16_one(on_data):
    full = planned(on_data).parts["teacher, float32"]
    plan = planned(dataclasses.replace(on_data, teacher_dtype="int8"))
    assert plan.fits
    # Most of this teacher is tables of 128 rows, which stay in bfloat16.
    tables = 2 * 128 * 16 * 2 // 4
    layers = full // 2 - tables
    assert 0.4 < (plan.parts["teacher, int8"] - tables) / layers < 0.8


def fake_plan(peak, memory=100 * GIB, *, run=None, floor=1.0):
    """A plan with one program, of the mesh and micro-batches of `run`."""
    program = CompiledProgram("train step", 1.0, peak, 0, 0, {}, "")
    bounds = Estimate("train step", Roofline(()), 0, {"memory": floor}, None, ())
    mesh = run.mesh if run else sharding.make_mesh()
    micro_batches = run.config.micro_batches if run else 2
    machine = Machine("t", (), memory, SPEEDS["v5e"])
    return Plan(machine, mesh, micro_batches, {}, (program,), (bounds,))


def test_a_search_takes_the_smallest_floor_among_the_plans_that_fit(
    config, monkeypatch
):
    floors = {1: 0.1, 2: 2.0, 4: 3.0}
    trials = []

    def compile_nothing(run):
        fsdp, micro_batches = run.mesh.shape["fsdp"], run.config.micro_batches
        # fsdp 1 fits with no number of micro-batches, 2 with three, 4 with one.
        fits = fsdp == 4 or (fsdp == 2 and micro_batches == 3)
        peak = (10 if fits else 95) * GIB
        return fake_plan(peak, run=run, floor=floors[fsdp] / micro_batches)

    monkeypatch.setattr("mgsr_jax.planning.plan._compile", compile_nothing)
    even = dataclasses.replace(config, mesh=MeshConfig(), batch_size=12)
    best = search_mesh(even, FOUR, trials.append)
    assert best is not None and best.floor == 2.0 / 3
    assert best.mesh.shape["fsdp"] == 2 and best.micro_batches == 3
    tried = [(plan.mesh.shape["fsdp"], plan.micro_batches) for plan in trials]
    # Two micro-batches of six rows do not divide over four devices.
    assert tried == [(1, 1), (1, 3), (2, 1), (2, 3), (4, 1)]


def test_a_search_compiles_nothing_where_the_arrays_that_stay_are_too_large(
    config, monkeypatch
):
    monkeypatch.setattr("mgsr_jax.planning.plan._compile", pytest.fail)
    even = dataclasses.replace(config, mesh=MeshConfig(), batch_size=12)
    small = dataclasses.replace(FOUR, memory=1000)
    assert search_mesh(even, small, pytest.fail) is None


def test_a_search_leaves_out_sizes_that_do_not_divide(config):
    # Models 16 wide do not divide by 3; with fsdp 1, 2 and 6 there is no room.
    six = dataclasses.replace(FOUR, devices=tuple(jax.devices()[:6]), memory=1000)
    even = dataclasses.replace(config, mesh=MeshConfig(), batch_size=12)
    assert search_mesh(even, six, print) is None
    with pytest.raises(ValueError, match="batch_size=10 does not divide over 6"):
        search_mesh(dataclasses.replace(even, batch_size=10), six, print)


@pytest.mark.slow
def test_a_teacher_whose_outputs_a_step_reads_stays_in_memory(config):
    config = dataclasses.replace(
        config,
        objective=Objective(num_candidates=8, sft=0.0),
        rollout=RolloutConfig("on", probability=0.5),
    )
    plan = planned(config)
    names = [program.name for program in plan.programs]
    assert names == ["rollout", "train step", "train step on the data"]
    reads_outputs, runs_teacher = plan.programs[1:]
    # The step on samples takes the teacher's head, but not its layers.
    assert reads_outputs.arguments < runs_teacher.arguments
    always = [size for name, size in plan.parts.items() if "cop" not in name]
    resident = sum(always) - plan.parts["cache of the student"]
    assert reads_outputs.peak > resident and runs_teacher.peak > resident


def test_a_kernel_of_another_platform_is_refused(config):
    with pytest.raises(ValueError, match="a kernel for a tpu, .* cpu"):
        plan_run(dataclasses.replace(config, attention="flash"), FOUR)


def test_a_missing_cudnn_is_named(config, monkeypatch):
    def compile_program(*_, **__):
        raise RuntimeError("cuDNN not found.")

    monkeypatch.setattr("mgsr_jax.planning.plan.compile_program", compile_program)
    with pytest.raises(ValueError, match="plan with attention: xla"):
        plan_run(config, FOUR)


def test_a_program_that_is_too_large_is_the_failure(config, monkeypatch):
    def compile_program(*_, **__):
        raise RuntimeError("RESOURCE_EXHAUSTED: Ran out.\nUsed 20.1G of 15.75G hbm.")

    monkeypatch.setattr("mgsr_jax.planning.plan.compile_program", compile_program)
    plan = plan_run(config, FOUR)
    assert plan.failure == "Used 20.1G of 15.75G hbm" and not plan.fits


@pytest.mark.slow
def test_samples_and_a_teacher_s_own_rows_are_planned(config):
    """Two samples a prompt, 8 tokens wide, need 16 / 12 of one of 12 tokens."""
    rollout = RolloutConfig("on", intervention="none", samples=2, max_new_tokens=4)
    data = dataclasses.replace(config.data, max_length=8, teacher_prompt="{prompt}!")
    plan = planned(dataclasses.replace(config, rollout=rollout, data=data))
    assert [program.name for program in plan.programs] == ["rollout", "train step"]
    cache, other = (p.parts["cache of the student"] for p in (plan, planned(config)))
    assert cache / (2 * 8) == other / 12


@pytest.mark.exhaustive
def test_a_plan_counts_every_teacher_once(config, on_data):
    """A third name shares the first folder; samples, as without SCRG."""
    wide = tiny.LLAMA | {"hidden_size": 32, "eos_token_id": 1}
    folder = pathlib.Path(config.teacher).parent
    (folder / "wide.json").write_text(json.dumps(wide))
    teacher = {
        "math": config.teacher,
        "code": str(folder / "wide.json"),
        "law": config.teacher,
    }
    rollout = RolloutConfig("on", intervention="none")
    several = dataclasses.replace(config, teacher=teacher, rollout=rollout)
    plan, one = planned(several), planned(on_data)
    assert [program.name for program in plan.programs] == ["rollout", "train step"]
    assert plan.parts["teacher math, law, float32"] == one.parts["teacher, float32"]
    assert plan.parts["teacher code, float32"] > one.parts["teacher, float32"]
    assert sum(name.startswith("teacher") for name in plan.parts) == 2
