"""A run's programs, compiled by the TPU and GPU compilers; no device is attached.

`make test-aot` runs these tests in an environment with both compilers.
"""

import contextlib
import importlib.util
import json
import os
import re

import numpy as np
import pytest

from mgsr_jax.commands import parser
from mgsr_jax.decoding.decode import TOKENS_PER_CHECK
from mgsr_jax.objective import Objective
from mgsr_jax.planning import machines
from mgsr_jax.planning.plan import plan_run
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import DataConfig, MeshConfig, TrainConfig

VOCAB, WIDTH, LENGTH, BATCH, CHUNK = 1400, 256, 64, 128, 16
PADDED = 1408  # 11 x 128; no other dimension has this size
SHAPE = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": LENGTH,
    "eos_token_id": 2,
}
# Target, slices, mesh, the teacher's dtype.
TARGETS = [
    ("v4:2x2x1", 1, {"fsdp": 2}, "bfloat16"),
    ("v5e:2x4", 1, {"fsdp": 2, "tensor": 2}, "bfloat16"),
    ("v5p:2x2x2", 1, {"fsdp": 4}, "int8"),
    ("v6e:2x2", 1, {"fsdp": 4}, "bfloat16"),
    ("tpu7x:2x2x1", 1, {"fsdp": 4, "tensor": 2}, "bfloat16"),
    ("v5e:2x2", 2, {"data": 2, "fsdp": 4}, "bfloat16"),
    ("h100:1x1x8", 1, {"fsdp": 4, "tensor": 2}, "int8"),
    ("h200:1x2x4", 1, {"fsdp": 8}, "bfloat16"),
]


def installed(target):
    compiler = "jax_cuda12_plugin" if target.startswith("h") else "libtpu"
    return importlib.util.find_spec(compiler) is not None


@contextlib.contextmanager
def stderr_to(file):
    """Redirect the file descriptor: the compiler does not write through Python."""
    original = os.dup(2)
    with open(file, "w") as stream:
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def settings(folder, tpu, teacher_dtype, mesh):
    (folder / "teacher.json").write_text(json.dumps(SHAPE | {"num_hidden_layers": 3}))
    (folder / "student.json").write_text(json.dumps(SHAPE))
    return TrainConfig(
        student=str(folder / "student.json"),
        teacher=str(folder / "teacher.json"),
        output="",
        data=DataConfig(train="", max_length=LENGTH, max_prompt_length=16),
        batch_size=BATCH,
        micro_batches=2,
        steps=9,
        chunk_size=CHUNK,
        dtype="bfloat16",
        teacher_dtype=teacher_dtype,
        # More than any compiler's kernel for a top-k finds.
        objective=Objective(num_candidates=256),
        rollout=RolloutConfig("on", top_p=0.9),
        mesh=MeshConfig(**mesh),
        # The partitioner cannot split this kernel, on a mesh that splits everything.
        attention="flash" if tpu else "xla",
    )


@pytest.fixture(scope="module", params=TARGETS, ids=lambda t: f"{t[0]}*{t[1]}")
def planned(request, tmp_path_factory):
    """The plan, and the compiler's messages."""
    name, slices, mesh, teacher_dtype = request.param
    if not installed(name):
        pytest.skip(f"no compiler for {name}; make test-aot installs it")
    folder = tmp_path_factory.mktemp("plan")
    machines.use_no_device()
    with stderr_to(folder / "stderr"):
        plan = plan_run(
            settings(folder, not name.startswith("h"), teacher_dtype, mesh),
            machines.describe(name, slices=slices),
        )
    return plan, (folder / "stderr").read_text()


def test_the_run_fits_and_the_plan_names_the_parts_of_memory(planned):
    plan, _ = planned
    assert plan.failure is None and plan.fits
    assert [program.name for program in plan.programs] == ["rollout", "train step"]
    assert all(0 < program.peak < plan.machine.memory for program in plan.programs)
    assert plan.parts["optimizer"] >= 2 * plan.parts["student, float32"]
    # The compiler counts at least these parts as arguments.
    step = plan.programs[1]
    resident = ("student, float32", "optimizer", "clip network", "teacher, ")
    parts = [size for name, size in plan.parts.items() if name.startswith(resident)]
    assert len(parts) == 4 and step.arguments >= sum(parts)


def test_every_loop_has_its_trips(planned):
    """The compiler's, or those that the plan states for loops that data end."""
    plan, _ = planned
    for estimate in plan.estimates:
        assert all(loop.trips is not None for loop in estimate.roofline.loops)
    trips = dict(plan.estimates[0].assumed)
    assert trips["decode/extend"] == (LENGTH - 16) // TOKENS_PER_CHECK


def test_the_products_of_a_step_are_those_of_the_models(planned):
    """2 FLOPs per weight and token, and twice that backwards.

    A step has the data's rows and as many samples, whose teacher was run before. Rows
    are padded, and heads compute what is scored.
    """
    plan, _ = planned
    layer = WIDTH * (2 * WIDTH + 2 * WIDTH // 2 + 3 * 512)
    head, tokens = WIDTH * PADDED, BATCH * (LENGTH - 1)
    student, teacher = 2 * layer + head, 3 * layer + head
    expected = 2 * tokens * (2 * 3 * student + teacher)
    flops = plan.estimates[1].roofline.cost.total_flops * plan.mesh.size
    assert 0.8 < flops / expected < 1.6, flops / expected


def test_a_step_takes_time_and_decoding_reads_more_than_it_needs(planned):
    plan, _ = planned
    rollout, step = plan.estimates
    assert rollout.useful is not None and 0 < rollout.useful < 1
    for estimate in (rollout, step):
        assert 0 < estimate.floor < 1 and 0 < estimate.mfu <= 1
        assert len(estimate.largest) == 3
    across = any(e.roofline.cost.across for e in plan.estimates)
    assert across == (plan.machine.name in ("h200:1x2x4", "v5e:2x2"))


def test_the_state_is_updated_in_place(planned):
    plan, _ = planned
    state = ("student, float32", "optimizer", "clip network")
    assert plan.programs[1].aliased >= sum(plan.parts[name] for name in state)


def test_no_array_has_the_size_of_tokens_times_vocabulary(planned):
    """Logits exist for one chunk per device: its tokens and the overlap."""
    plan, _ = planned
    columns = PADDED // plan.mesh.shape["tensor"]
    for program in plan.programs:
        for dimensions in re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.text):
            sizes = [int(n) for n in dimensions.split(",")]
            if columns in sizes and WIDTH not in sizes:
                sizes.remove(columns)
                tokens = BATCH * LENGTH // plan.mesh.size
                assert int(np.prod(sizes)) < tokens, (program.name, dimensions)


def test_no_program_sorts_the_vocabulary(planned):
    plan, _ = planned
    columns = {PADDED, PADDED // plan.mesh.shape["tensor"], VOCAB}
    for program in plan.programs:
        for line in program.text.splitlines():
            if re.search(r" sort\(|cub\$DeviceRadixSort|SegmentedSort", line):
                sizes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", line)
                last = {int(dimensions.split(",")[-1]) for dimensions in sizes}
                assert not last & columns, (program.name, line)


def test_no_program_uses_the_host(planned):
    plan, _ = planned
    slices = len({getattr(d, "slice_index", 0) for d in plan.mesh.devices.flat})
    for program in plan.programs:
        assert "callback" not in program.text
        if slices == 1:  # two slices communicate through their hosts
            assert "is_host_transfer=true" not in program.text


def test_the_partitioner_finds_a_sharding_for_every_operation(planned):
    plan, messages = planned
    assert "Involuntary full rematerialization" not in messages, messages[-2000:]
    assert plan.mesh.size == 1 or plan.programs[1].collectives


def test_a_run_that_is_too_large_is_reported_in_one_line(tmp_path, capsys):
    if not installed("v5e:1x1"):
        pytest.skip("no compiler for v5e; make test-aot installs it")
    large = SHAPE | {"hidden_size": 8192, "intermediate_size": 32768}
    (tmp_path / "large.json").write_text(json.dumps(large))
    status = parser.main(
        [
            "plan",
            "--target=v5e:1x1",
            f"--student={tmp_path / 'large.json'}",
            "--objective.token=0",
            "--objective.span=0",
            "--batch_size=64",
            f"--data.max_length={LENGTH}",
            "--data.max_prompt_length=16",
        ]
    )
    out = capsys.readouterr().out.strip().splitlines()
    assert status == 2
    assert out[-1].startswith("does not fit: ") and "micro_batches" in out[-1]
