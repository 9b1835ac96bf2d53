"""`mgsr plan`: whether a run fits a machine that is not attached."""

from mgsr_jax.commands.exit_status import DONE, MISTAKE
from mgsr_jax.training.config import TrainConfig


def plan(
    config: TrainConfig, *, target: str, slices: int = 1, search: bool = False
) -> int:
    """Says whether a run fits a machine that is not here, and what it would send.

    Takes the YAML file and the settings of train, and compiles the rollout and the
    training step for the target with its own compiler (the plan-tpu or plan-gpu extra);
    no device is used. student and teacher may be folders or config.json files: weights,
    tokenizers and data are not read. output and data.train may be left out, though they
    are called required below; a teacher_cache that is not here is taken to hold 512
    classes a token. Exit status 2 where the run does not fit.

    Args:
      target: a TPU slice such as v5e:4x4, v5p:4x4x4 or v6e:16x16, or GPUs as
        SLICESxHOSTSxGPUS, such as h200:1x2x8.
      slices: TPU slices that work together; mesh.data is a multiple of it.
      search: try mesh.fsdp from 1 up, and of each the fewest micro_batches that fit.
    """
    from rich.console import Console

    from mgsr_jax.planning import machines, plan

    machines.use_no_device()
    console, machine = Console(), machines.describe(target, slices=slices)
    if not search:
        found = plan.plan(config, machine)
        plan.print_plan(found, console)
        return DONE if found.fits else MISTAKE
    found = plan.search(config, machine, lambda trial: plan.print_plan(trial, console))
    if found is None:
        console.print(f"no mesh.fsdp and micro_batches of this run fit {target}")
        return MISTAKE
    sizes = " ".join(f"--mesh.{axis} {n}" for axis, n in found.mesh.shape.items())
    console.print(f"{sizes} --micro_batches {found.micro_batches}", soft_wrap=True)
    return DONE
