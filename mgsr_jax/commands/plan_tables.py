"""The tables of `mgsr plan`: memory, communication and bounds of the time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mgsr_jax.planning.estimate import Estimate
    from mgsr_jax.planning.plan import Plan

_GIB = 2**30


def print_plan(plan: "Plan", console: Console) -> None:
    """Print the tables of a plan, and the verdict on one line."""
    shape = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    console.print(
        f"{plan.machine.name}: {plan.mesh.size} devices as {shape}, "
        f"{plan.micro_batches} micro-batches"
    )
    for table in (*_memory_tables(plan), *_time_tables(plan)):
        if table.row_count:
            console.print(table)
    for line in _assumptions(plan):
        console.print(line, soft_wrap=True)
    console.print(verdict(plan), soft_wrap=True)


def _memory_tables(plan: "Plan") -> Iterator[Table]:
    """Bytes of arrays, programs and collectives."""
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
    yield from (memory, programs, traffic)


def _time_tables(plan: "Plan") -> Iterator[Table]:
    """Work of a device, the time at full speed, and what costs most of it."""
    work = Table(
        "a device's work",
        "TFLOP",
        "GiB read",
        "GiB written",
        "GiB sent within",
        "and across",
    )
    bounds = Table(
        "at full speed",
        "at least s",
        "compute s",
        "memory s",
        "links s",
        "tokens/s",
        "a chip",
        "MFU up to",
        "decode reads needed",
    )
    largest = Table("program", "largest parts", "at least s")
    for estimate in plan.estimates:
        cost = estimate.roofline.cost
        sizes = cost.read, cost.written, cost.within, cost.across
        flops = f"{cost.total_flops / 1e12:,.1f}"
        gib = (f"{size / _GIB:,.1f}" for size in sizes)
        work.add_row(estimate.program, flops, *gib)
        bounds.add_row(estimate.program, *_bounds(plan, estimate))
        for name, seconds in estimate.largest:
            largest.add_row(estimate.program, name, _figure(seconds))
    yield from (work, bounds, largest)


def _bounds(plan: "Plan", estimate: "Estimate") -> Iterator[str]:
    yield _figure(estimate.floor)
    yield from (_figure(s) for s in estimate.seconds.values())
    rate = estimate.tokens / estimate.floor if estimate.floor else 0.0
    chips = plan.mesh.size / plan.machine.speed.devices_per_chip
    yield f"{rate:,.0f}"
    yield f"{rate / chips:,.0f}"
    yield f"{estimate.mfu:.0%}"
    yield "" if estimate.useful is None else f"{estimate.useful:.0%}"


def _assumptions(plan: "Plan") -> Iterator[str]:
    """Trips that the compiler does not know, and the bound of a step."""
    if not plan.estimates:
        return
    trips = dict(pair for estimate in plan.estimates for pair in estimate.assumed)
    stated = ", ".join(
        f"{name} {'unknown (counted once)' if number is None else number}"
        for name, number in trips.items()
    )
    yield f"trips of loops if all rows have the full length: {stated or 'all known'}"
    yield f"a step takes at least {_figure(plan.floor)} s at full speed"


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


def _figure(seconds: float) -> str:
    """Three significant digits."""
    return f"{seconds:.3g}"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
