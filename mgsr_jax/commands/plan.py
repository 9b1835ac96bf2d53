"""`mgsr plan`: whether a run fits a machine that is not attached."""

import dataclasses

from rich.console import Console

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.commands.plan_tables import print_plan
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.data_config import DataConfig, Sources


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
    """Report whether a run fits a machine that is not attached, and its least time.

    The rollout and the training step are compiled for the target by its own compiler
    (the plan-tpu or plan-gpu extra); no device is used. The work of these programs and
    the machine's published peaks give the least time that they can take. The YAML file
    and the settings are those of train. student and teacher are folders, config.json
    files or hub names. Weights, tokenizers and data are not read, and nothing is
    written, so output, data.train, data.valid, steps and epochs may be left out. A
    teacher_cache that does not exist yet is planned with 512 classes per token. The
    exit status is 2 if the run does not fit.

    Args:
      target: a TPU slice such as v5e:4x4, v5p:4x4x4 or v6e:16x16, or GPUs as
        SLICESxHOSTSxGPUS, such as h200:1x2x8.
      slices: number of TPU slices that work together; must divide mesh.data.
      search: find mesh.fsdp and micro_batches. Every mesh.fsdp is tried with the fewest
        micro_batches that fit, and the plan whose step takes the least time at full
        speed is chosen; the settings of mesh.data, mesh.fsdp and micro_batches are not
        read.
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
