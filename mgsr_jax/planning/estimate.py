"""A lower bound of the time of a run's program, and what that allows at most."""

import dataclasses

from jax.sharding import Mesh

from mgsr_jax.models import LanguageModel
from mgsr_jax.planning.compiled import CompiledProgram
from mgsr_jax.planning.decoding_work import decoded_bytes, loop_trips, new_tokens
from mgsr_jax.planning.machines import Machine, domains, in_memory
from mgsr_jax.planning.roofline import Roofline, read_roofline, without_loops
from mgsr_jax.training.config import TrainConfig

DECODING = "decode/extend"
"""The loop over tokens; see `roofline.Trips`."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bounds of a program on a machine whose every device works at full speed.

    Attributes:
      program: its name.
      roofline: its work per device.
      tokens: tokens of responses that it writes or scores on all devices.
      seconds: compute, memory, links -> time of this part of the work.
      useful: the share of the bytes read in decoding that is needed: weights once per
        token of all rows, and the keys and values so far; None without decoding.
      largest: the operations with the largest floors, and these in seconds.
    """

    program: str
    roofline: Roofline
    tokens: int
    seconds: dict[str, float]
    useful: float | None
    largest: tuple[tuple[str, float], ...]

    @property
    def floor(self) -> float:
        """The program takes at least so many seconds."""
        return max(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Upper bound of the share of peak FLOP/s; what is computed again counts."""
        return self.seconds["compute"] / self.floor if self.floor else 0.0

    @property
    def assumed(self) -> tuple[tuple[str, int | None], ...]:
        """Loops whose trips data decide, by name, and the trips that are counted."""
        return tuple(
            (without_loops(loop.name) or loop.instruction, loop.trips)
            for loop in self.roofline.loops
            if loop.stated or loop.trips is None
        )


def estimate(
    program: CompiledProgram,
    config: TrainConfig,
    student: LanguageModel,
    *,
    machine: Machine,
    mesh: Mesh,
    micro_batches: int,
) -> Estimate:
    """The bounds of one of a run's programs.

    Args:
      micro_batches: micro-batches that the program writes or scores.
    """
    devices = tuple(mesh.devices.flat)
    roofline = read_roofline(
        program.text,
        trips=loop_trips(config, student, mesh),
        domains=domains(devices),
        in_memory=in_memory(devices[0]),
    )
    rows = micro_batches * config.batch_size // config.micro_batches
    read = roofline.in_loops(DECODING).read
    needed = decoded_bytes(config, student) / mesh.size
    return Estimate(
        program.name,
        roofline,
        tokens=rows * new_tokens(config),
        seconds=roofline.cost.seconds(machine.speed),
        useful=needed / read if read else None,
        largest=tuple(roofline.largest(machine.speed)),
    )
