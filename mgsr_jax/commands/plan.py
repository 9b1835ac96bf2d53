"""`mgsr plan`: whether a run fits a machine that is not attached."""

import dataclasses
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.data_config import DataConfig, Sources

if TYPE_CHECKING:
    from mgsr_jax.planning.plan import Plan

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class PlannedData(DataConfig):
    """Instruction data, of which a plan reads only the lengths."""

    train: Sources = ""


@dataclasses.dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """The settings of train, none of which but student is required."""

    output: str = ""
    data: PlannedData = dataclasses.field(default_factory=PlannedData)


def plan(
    config: PlanConfig, *, target: str, slices: int = 1, search: bool = False
) -> int:
    """Report whether a run fits a machine that is not attached, and its communication.

    The rollout and the training step are compiled for the target by its own compiler
    (the plan-tpu or plan-gpu extra); no device is used. The YAML file and the settings
    are those of train. student and teacher are folders, config.json files or hub names.
    Weights, tokenizers and data are not read, and nothing is written, so output,
    data.train, data.valid, steps and epochs may be left out. A teacher_cache that does
    not exist yet is planned with 512 classes per token. The exit status is 2 if the run
    does not fit.

    Args:
      target: a TPU slice such as v5e:4x4, v5p:4x4x4 or v6e:16x16, or GPUs as
        SLICESxHOSTSxGPUS, such as h200:1x2x8.
      slices: number of TPU slices that work together; must divide mesh.data.
      search: find mesh.fsdp and micro_batches. mesh.fsdp is tried from 1 up, each with
        the fewest micro_batches first; the settings of mesh.data, mesh.fsdp and
        micro_batches are not read.
    """
    import jax

    from mgsr_jax.checkpoint.hub import local_folder
    from mgsr_jax.planning import machines
    from mgsr_jax.planning.plan import plan_run, search_mesh

    machines.use_no_device()
    student = local_folder(config.student, weights=None)
    teacher = jax.tree.map(lambda own: local_folder(own, weights=None), config.teacher)
    config = dataclasses.replace(config, student=student, teacher=teacher)
    console, machine = Console(), machines.describe(target, slices=slices)
    if not search:
        run = plan_run(config, machine)
        print_plan(run, console)
        return DONE if run.fits else MISTAKE
    best = search_mesh(config, machine, lambda trial: print_plan(trial, console))
    if best is None:
        console.print(f"no mesh.fsdp and micro_batches of this run fit {target}")
        return MISTAKE
    sizes = " ".join(f"--mesh.{axis} {n}" for axis, n in best.mesh.shape.items())
    console.print(f"{sizes} --micro_batches {best.micro_batches}", soft_wrap=True)
    return DONE


def print_plan(plan: "Plan", console: Console) -> None:
    """Print tables of memory, programs and collectives, and the verdict on one line."""
    shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    console.print(
        f"{plan.machine.name}: {plan.mesh.size} devices as {shape}, "
        f"{plan.micro_batches} micro-batches"
    )
    memory = Table("in each device's memory", "GiB")
    for name, size in plan.parts.items():
        memory.add_row(name, _gib(size))
    programs = Table("program", "peak GiB", "arguments GiB", "compile time s")
    traffic = Table("program", "collective", "number", "GiB (a loop's body once)")
    for program in plan.programs:
        programs.add_row(
            program.name,
            _gib(program.peak),
            _gib(program.arguments),
            f"{program.seconds:.1f}",
        )
        for kind, (count, size) in program.collectives.items():
            traffic.add_row(program.name, kind, str(count), _gib(size))
    for table in (memory, programs, traffic):
        if table.row_count:
            console.print(table)
    console.print(verdict(plan), soft_wrap=True)


def verdict(plan: "Plan") -> str:
    """One line: the run fits, or by how much it does not and which settings help."""
    from mgsr_jax.planning.plan import MARGIN

    room = f"{_gib(plan.machine.memory)} GiB per device"
    if plan.fits:
        share = plan.peak / plan.machine.memory
        return f"fits: {_gib(plan.peak)} of {room} at the peak ({share:.0%})"
    reason = plan.failure or (
        f"{_gib(plan.peak)} of {room} at the peak, more than {MARGIN:.0%}"
    )
    return (
        f"does not fit: {reason}; use more micro_batches, remat: true, fewer "
        "rollout.decode_rows, a larger mesh.fsdp or more devices"
    )


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
