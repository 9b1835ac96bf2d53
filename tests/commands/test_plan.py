"""`mgsr plan`: its settings, tables and verdict."""

import dataclasses
import io
import json
import re

import jax
import pytest
import tiny
from rich.console import Console

from mgsr_jax import sharding
from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.parser import main
from mgsr_jax.commands.plan_tables import print_plan, verdict
from mgsr_jax.planning import machines
from mgsr_jax.planning.compiled import CompiledProgram
from mgsr_jax.planning.estimate import Estimate
from mgsr_jax.planning.machines import GIB, Machine
from mgsr_jax.planning.plan import Plan
from mgsr_jax.planning.roofline import Cost, Loop, Roofline, Work
from mgsr_jax.planning.speeds import SPEEDS


@pytest.fixture
def machine(monkeypatch):
    """Two CPU devices stand for the target."""
    machine = Machine("v6e:1x2", tuple(jax.devices()[:2]), GIB, SPEEDS["v6e"])
    monkeypatch.setattr(machines, "describe", lambda name, slices: machine)
    monkeypatch.setattr(machines, "use_no_device", lambda: None)
    return machine


@pytest.fixture
def recipe(tmp_path):
    """A YAML file of train without output and data.train."""
    shape = tiny.LLAMA | {"num_hidden_layers": 1, "eos_token_id": 1}
    (tmp_path / "student.json").write_text(json.dumps(shape))
    settings = f"""
      student: {tmp_path / "student.json"}
      objective: {{token: 0.0, span: 0.0}}
      batch_size: 4
      data: {{max_length: 12, max_prompt_length: 4}}
      validate_every: 10
    """
    (tmp_path / "recipe.yaml").write_text(settings)
    return str(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_a_plan_needs_no_output_data_or_steps(machine, recipe, capsys):
    assert main(["plan", "--target=v6e:1x2", "--config", recipe]) == DONE
    out = capsys.readouterr().out
    assert "v6e:1x2: 2 devices as data 2 x fsdp 1 x tensor 1, 1 micro-batches" in out
    assert "train step" in out and "\nfits: " in out


@pytest.mark.slow
def test_a_search_prints_the_settings_of_the_step_with_the_least_time(
    machine, recipe, capsys
):
    command = ["plan", "--target=v6e:1x2", "--config", recipe, "--search=true"]
    assert main(command) == DONE
    out = capsys.readouterr().out
    found = re.findall(r"data (\d) x fsdp (\d) .*?at least (\S+) s", out, re.DOTALL)
    assert [shape for *shape, _ in found] == [["2", "1"], ["1", "2"]]
    data, fsdp, _ = min(found, key=lambda plan: float(plan[2]))
    settings = f"--mesh.data {data} --mesh.fsdp {fsdp} --mesh.tensor 1"
    assert out.splitlines()[-1] == f"{settings} --micro_batches 1"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--optimizer.rate=1", "optimizer.rate"),
        ("--data.max_length=wide", "max_length"),
        ("--batch_size=3", "micro-batch of 3 rows"),
        ("--objective.token=1", "set teacher"),
        ("--steps=0", "steps must be above 0"),
        ("--student=nowhere", "nowhere"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(
    machine, recipe, capsys, argument, message
):
    assert main(["plan", "--target=v6e:1x2", "--config", recipe, argument]) == MISTAKE
    error = capsys.readouterr().err.strip()
    assert message in error and error.startswith("mgsr: error: ")
    assert "\n" not in error


def test_only_the_student_and_the_target_are_required(capsys):
    assert main(["plan", "--target=v6e:1x2"]) == MISTAKE
    assert "settings that are missing: student\n" in capsys.readouterr().err
    assert main(["plan", "--student=s"]) == MISTAKE
    assert "settings that are missing: target\n" in capsys.readouterr().err
    assert main(["plan", "--help"]) == DONE
    options = capsys.readouterr().out.split("\n  --")
    required = [option.split()[0] for option in options if "[required]" in option]
    assert sorted(required) == ["student", "target"]


def plan_of(peak, failure=None):
    collectives = {"all-gather": (2, 3 * GIB)}
    program = CompiledProgram("train step", 1.5, peak, GIB, 0, collectives, "")
    machine, mesh = (
        Machine("v5e:2x4", (), 100 * GIB, SPEEDS["v5e"]),
        sharding.make_mesh(4, 2, devices=jax.local_devices()),
    )
    parts = {"optimizer": 2 * GIB}
    return Plan(machine, mesh, 2, parts, (program,), failure=failure)


def test_the_verdict_is_one_line():
    assert verdict(plan_of(50 * GIB)).startswith("fits: 50.00 of 100.00 GiB per device")
    tight = verdict(plan_of(95 * GIB))
    assert tight.startswith("does not fit: 95.00 of 100.00 GiB") and "fsdp" in tight
    failed = verdict(plan_of(0, failure="Used 20G of 15G hbm"))
    assert failed.startswith("does not fit: Used 20G") and "\n" not in failed


def test_tables_show_memory_programs_and_collectives():
    console = Console(file=io.StringIO(), width=100)
    print_plan(plan_of(50 * GIB), console)
    text = " ".join(console.file.getvalue().replace("│", " ").split())
    assert text.startswith("v5e:2x4: 8 devices as data 4 x fsdp 2 x tensor 1, 2 micro")
    assert "optimizer 2.00" in text and "train step 50.00 1.00 1.5" in text
    assert "train step all-gather 2 3.00" in text


def test_tables_show_work_bounds_and_trips():
    speed = SPEEDS["v5e"]
    cost = Cost({"bf16": 2 * speed.flops["bf16"]}, 3.0 * GIB, 1.0 * GIB, 2.0 * GIB)
    stated = Loop("while.1", "decode/while/body/extend/while", 256, stated=True)
    unknown = Loop("while.2", "while", None, stated=False)
    works = Work("decode/dot", (stated,), cost), Work("other", (unknown,), Cost())
    largest = (("decode/dot", 2.0),)
    bounds = Estimate(
        "train step", Roofline(works), 4000, cost.seconds(speed), 0.05, largest
    )
    console = Console(file=io.StringIO(), width=130)
    print_plan(dataclasses.replace(plan_of(50 * GIB), estimates=(bounds,)), console)
    text = " ".join(console.file.getvalue().replace("│", " ").split())
    assert "train step 394.0 3.0 1.0 2.0 0.0" in text
    # 4 GiB at 819 GB/s, 2 GiB at 200 GB/s; 8 chips.
    assert "train step 2 2 0.00524 0.0107 2,000 250 100% 5%" in text
    assert "train step decode/dot 2" in text
    assert "decode/extend 256, while.2 unknown (counted once)" in text
    assert "a step takes at least 2 s at full speed fits: 50.00" in text
