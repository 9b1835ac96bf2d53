"""The real programs, compiled by the real TPU and GPU compilers; no device is there.

`make test-aot` runs this in an environment with both compilers.
"""

import importlib.util
import json
import os
import re
from contextlib import contextmanager

import numpy as np
import pytest

from mgsr_jax.commands import parser
from mgsr_jax.objective import Objective
from mgsr_jax.planning import machines
from mgsr_jax.planning.plan import plan
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.training.config import DataConfig, MeshConfig, TrainConfig

VOCAB, WIDTH, LENGTH, BATCH, CHUNK = 1400, 256, 64, 128, 16
PADDED = 1408  # 11 x 128: the size of nothing else
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


@contextmanager
def said_to(file):
    """What the compiler, which is no Python, writes to the standard error."""
    kept = os.dup(2)
    with open(file, "w") as stream:
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
        objective=Objective(num_candidates=64),
        rollout=RolloutConfig("on"),
        mesh=MeshConfig(**mesh),
        # A kernel that the partitioner cannot split, where the mesh splits everything.
        attention="flash" if tpu else "xla",
    )


@pytest.fixture(scope="module", params=TARGETS, ids=lambda t: f"{t[0]}*{t[1]}")
def planned(request, tmp_path_factory):
    """The plan, and what the compiler said meanwhile."""
    name, slices, mesh, teacher_dtype = request.param
    if not installed(name):
        pytest.skip(f"no compiler for {name}; make test-aot brings it")
    folder = tmp_path_factory.mktemp("plan")
    machines.use_no_device()
    with said_to(folder / "stderr"):
        found = plan(
            settings(folder, not name.startswith("h"), teacher_dtype, mesh),
            machines.describe(name, slices=slices),
        )
    return found, (folder / "stderr").read_text()


def test_it_fits_and_says_where_memory_goes(planned):
    found, _ = planned
    assert found.failure is None and found.fits
    assert [program.name for program in found.programs] == ["rollout", "train step"]
    assert all(0 < program.peak < found.target.memory for program in found.programs)
    assert found.parts["optimizer"] >= 2 * found.parts["student, float32"]
    # At least what the compiler counts of them as arguments.
    step = found.programs[1]
    stays = ("student, float32", "optimizer", "clip network", "teacher, ")
    parts = [size for name, size in found.parts.items() if name.startswith(stays)]
    assert len(parts) == 4 and step.arguments >= sum(parts)


def test_the_state_is_updated_in_place(planned):
    found, _ = planned
    state = ("student, float32", "optimizer", "clip network")
    assert found.programs[1].aliased >= sum(found.parts[name] for name in state)


def test_no_array_of_tokens_times_vocabulary(planned):
    """Logits exist for a chunk on one device: its tokens and the overlap."""
    found, _ = planned
    columns = PADDED // found.mesh.shape["tensor"]
    for program in found.programs:
        for dimensions in re.findall(r"[a-z]+\d+\[([\d,]+)\]", program.text):
            sizes = [int(n) for n in dimensions.split(",")]
            if columns in sizes and WIDTH not in sizes:
                sizes.remove(columns)
                tokens = BATCH * LENGTH // found.mesh.size
                assert int(np.prod(sizes)) < tokens, (program.name, dimensions)


def test_nothing_goes_through_the_host(planned):
    found, _ = planned
    slices = len({getattr(d, "slice_index", 0) for d in found.mesh.devices.flat})
    for program in found.programs:
        assert "callback" not in program.text
        if slices == 1:  # two slices talk through their hosts
            assert "is_host_transfer=true" not in program.text


def test_the_partitioner_never_gives_up(planned):
    found, said = planned
    assert "Involuntary full rematerialization" not in said, said[-2000:]
    assert found.mesh.size == 1 or found.programs[1].collectives


def test_a_program_that_is_too_large_says_so_in_one_line(tmp_path, capsys):
    if not installed("v5e:1x1"):
        pytest.skip("no compiler for v5e; make test-aot brings it")
    large = SHAPE | {"hidden_size": 8192, "intermediate_size": 32768}
    (tmp_path / "large.json").write_text(json.dumps(large))
    status = parser.main(
        [
            "plan",
            "--target=v5e:1x1",
            f"--student={tmp_path / 'large.json'}",
            "--objective.token=0",
            "--objective.span=0",
            "--steps=9",
            "--batch_size=64",
            f"--data.max_length={LENGTH}",
            "--data.max_prompt_length=16",
        ]
    )
    out = capsys.readouterr().out.strip().splitlines()
    assert status == 2
    assert out[-1].startswith("does not fit: ") and "micro_batches" in out[-1]
