"""Whether a run fits a machine that is not attached, and how fast it can be at most.

The run's own programs, the rollout and the training step, are compiled for the machine
by its own compiler, which reports memory and collectives. Their work is added up from
their text. A plan contains no measured speed, no numbers and no fragmentation of
memory.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import PyTree

from mgsr_jax import sharding
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.models import LanguageModel
from mgsr_jax.planning import shapes
from mgsr_jax.planning.compiled import (
    CompiledProgram,
    compile_program,
    device_bytes,
    out_of_memory_line,
    with_shardings,
)
from mgsr_jax.planning.estimate import Estimate, estimate
from mgsr_jax.planning.machines import Machine
from mgsr_jax.routed_teachers import RoutedTeachers
from mgsr_jax.rows import Rows
from mgsr_jax.train_step import TrainState
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.programs import Programs, make_programs
from mgsr_jax.training.run_models import (
    Teachers,
    check_sizes,
    models_of,
    read_models,
)
from mgsr_jax.typing import CLIP_NETWORK, STUDENT

ROLLOUT, TRAIN_STEP = "rollout", "train step"

MARGIN = 0.92
"""Usable share of a device's memory; the rest is for fragments and the driver."""

_STEPS = 1000  # the learning rate's schedule does not change a program

TeacherOutput = TopKTeacher | jax.ShapeDtypeStruct

StepInputs = tuple[tuple[Rows, ...], tuple[TeacherOutput | Rows | None, ...]]
"""Micro-batches, and the teacher's outputs on each that exist before the step."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a machine.

    Attributes:
      machine: the machine.
      mesh: its devices as the run divides them.
      micro_batches: number of micro-batches per step.
      parts: name -> bytes per device of the arrays that stay in memory.
      programs: the compiled programs.
      estimates: the bounds of each program's time.
      failure: the compiler's reason why the next program does not fit; None if all
        programs fit.
    """

    machine: Machine
    mesh: Mesh
    micro_batches: int
    parts: dict[str, int]
    programs: tuple[CompiledProgram, ...]
    estimates: tuple[Estimate, ...] = ()
    failure: str | None = None

    @property
    def peak(self) -> int:
        """Largest number of bytes per device in any compiled program."""
        return max((program.peak for program in self.programs), default=0)

    @property
    def fits(self) -> bool:
        """Whether all programs leave the margin free."""
        return self.failure is None and self.peak <= MARGIN * self.machine.memory

    @property
    def floor(self) -> float:
        """Seconds that a step takes at least; one that generates, if some steps do."""
        floors = {estimate.program: estimate.floor for estimate in self.estimates}
        return floors.get(ROLLOUT, 0.0) + floors.get(TRAIN_STEP, 0.0)


def plan_run(config: TrainConfig, machine: Machine) -> Plan:
    """Compile the rollout and the training step of `config` for `machine`.

    Only the config.json files of checkpoints are read, and no data.

    Raises:
      ValueError: the settings do not work on this machine, or on any.
    """
    return _compile(_open(config, machine))


def search_mesh(
    config: TrainConfig, machine: Machine, report: Callable[[Plan], None]
) -> Plan | None:
    """The plan with the smallest floor among those that fit, or None.

    Every mesh.fsdp is tried with the fewest micro_batches that fit, because each
    micro-batch reads and gathers the weights again. mesh.tensor stays as it is. Sizes
    that do not divide are left out.

    Args:
      report: called with the plan of every trial.

    Raises:
      ValueError: see `plan_run`; no mesh divides the models and the batch.
    """
    shards = len(machine.devices) // max(1, config.mesh.tensor)
    opened, fitting = False, []
    error = ValueError(
        f"batch_size={config.batch_size} does not divide over {shards} devices; use a "
        "multiple"
    )
    for fsdp in _divisors(shards):
        for micro_batches in _divisors(config.batch_size):
            if config.batch_size // micro_batches % shards:
                continue
            sizes = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
            trial = dataclasses.replace(config, mesh=sizes, micro_batches=micro_batches)
            try:
                run = _open(trial, machine)
            except sharding.DoesNotDivide as does_not_divide:
                error = does_not_divide
                break
            opened = True
            if not _has_room(run):
                break
            plan = _compile(run)
            report(plan)
            if plan.fits:
                fitting.append(plan)
                break
    if not opened:
        raise error
    return min(fitting, key=lambda plan: plan.floor, default=None)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


@dataclasses.dataclass(frozen=True)
class _Run:
    """The programs of a run on a machine's mesh, and the shapes of their arguments."""

    config: TrainConfig
    machine: Machine
    mesh: Mesh
    student: LanguageModel
    vocab_size: int
    programs: Programs
    state: TrainState
    teacher: Teachers | None
    teacher_params: PyTree


def _open(config: TrainConfig, machine: Machine) -> _Run:
    config.check_programs()
    sizes = config.mesh
    mesh = sharding.make_mesh(
        sizes.data, sizes.fsdp, sizes.tensor, devices=machine.devices
    )
    sizes = dataclasses.replace(sizes, tensor=mesh.shape["tensor"])
    config = dataclasses.replace(config, mesh=sizes)
    student, teacher = read_models(config)
    check_sizes(config, student, teacher, mesh)
    vocab_size, teacher_params = student.config.vocab_size, None
    for _, model in models_of(teacher):
        vocab_size = min(vocab_size, model.config.vocab_size)
    if teacher is not None and config.runs_teacher:
        teacher_params = shapes.teachers_shapes(config, teacher, mesh)
    eos = student.config.eos_token_id
    steps = config.steps or _STEPS
    programs = make_programs(
        config,
        student,
        teacher,
        mesh=mesh,
        vocab_size=vocab_size,
        eos_ids=tuple(eos) if isinstance(eos, tuple | list) else (eos or 0,),
        steps=steps,
    )
    state = shapes.state_shapes(config, student, programs.optimizer, mesh, steps=steps)
    models = teacher, teacher_params
    return _Run(config, machine, mesh, student, vocab_size, programs, state, *models)


def _has_room(run: _Run) -> bool:
    """Whether the arrays that stay in memory leave room for a program."""
    return sum(_parts(run).values()) < MARGIN * run.machine.memory


def _compile(run: _Run) -> Plan:
    """Compile one program after the other, until one does not fit."""
    programs: list[tuple[CompiledProgram, int]] = []
    failure = None
    try:
        with jax.set_mesh(run.mesh):
            for program, micro_batches in _compiled_programs(run):
                programs.append((program, micro_batches))
    except RuntimeError as error:
        if "cuDNN" in str(error):
            raise ValueError(
                "attention='cudnn' compiles only where cuDNN is installed "
                f"({error}); plan with attention: xla, which needs at least as much "
                "memory"
            ) from error
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        failure = out_of_memory_line(str(error))
    return Plan(
        run.machine,
        run.mesh,
        run.config.micro_batches,
        _parts(run),
        tuple(program for program, _ in programs),
        tuple(_estimate(run, *program) for program in programs),
        failure,
    )


def _estimate(run: _Run, program: CompiledProgram, micro_batches: int) -> Estimate:
    return estimate(
        program,
        run.config,
        run.student,
        machine=run.machine,
        mesh=run.mesh,
        micro_batches=micro_batches,
    )


def _compiled_programs(run: _Run) -> Iterator[tuple[CompiledProgram, int]]:
    """The programs, and the micro-batches that each of them writes or scores."""
    options = run.machine.compiler_options
    rows = (shapes.row_shapes(run.config, run.mesh),) * run.config.micro_batches
    cached = shapes.cached_shapes(run.config, run.mesh, vocab_size=run.vocab_size)
    encoding = run.config.data.encoding
    if encoding.teacher_prompt is not None:
        cached = shapes.row_shapes(run.config, run.mesh, encoding.teacher_width)
    outputs = (cached,) * run.config.micro_batches
    steps = {TRAIN_STEP: (rows, outputs)}
    if run.programs.rollout is not None:
        key = jax.eval_shape(lambda: jax.random.key(0))
        has_horizon = run.config.rollout.max_new_tokens is not None
        horizon = jax.ShapeDtypeStruct((), jnp.int32) if has_horizon else None
        program, (samples, _, sample_outputs) = compile_program(
            ROLLOUT,
            run.programs.rollout,
            (run.state.all_params[STUDENT], run.teacher_params, rows, key, horizon),
            options=options,
            resident=device_bytes(run.state.opt_state),
        )
        yield program, len(samples)
        if encoding.teacher_prompt is not None:
            sample_outputs = (cached,) * len(samples)
        steps = _largest_steps(run.config, (rows, outputs), (samples, sample_outputs))
    for name, (rows, outputs) in steps.items():
        arguments = (run.state, run.teacher_params, rows, outputs)
        train_step = run.programs.train_step
        program, _ = compile_program(name, train_step, arguments, options=options)
        yield program, len(rows)


def _largest_steps(
    config: TrainConfig, data: StepInputs, samples: StepInputs
) -> dict[str, StepInputs]:
    """Inputs of the largest steps of a run whose student generates, by name."""
    if config.objective.needs_data:
        return {TRAIN_STEP: (data[0] + samples[0], data[1] + samples[1])}
    steps = {TRAIN_STEP: samples}
    if not config.rollout.always_generates:
        # Unlike the step on samples, this step runs the teacher itself.
        steps[f"{TRAIN_STEP} on the data"] = data
    return steps


def _parts(run: _Run) -> dict[str, int]:
    """Bytes per device of arrays that stay in memory, or do so during a rollout."""
    config, state = run.config, run.state
    trained = "adapters" if config.lora.rank else "student"
    parts = {
        f"{trained}, float32": device_bytes(state.params[STUDENT]),
        "optimizer": device_bytes(state.opt_state),
    }
    if state.frozen:
        parts[f"student, {config.dtype}"] = device_bytes(state.frozen)
    if CLIP_NETWORK in state.params:
        parts["clip network"] = device_bytes(state.params[CLIP_NETWORK])
    parts |= _teacher_bytes(run)
    if run.programs.rollout is not None:
        parts[f"decoder's copy, {config.dtype}"] = _decoder_copy_bytes(run)
        parts["cache of the student"] = _cache_bytes(run)
    return parts


def _teacher_bytes(run: _Run) -> dict[str, int]:
    """Bytes of each teacher's parameters; nothing if only its cache is read."""
    if run.teacher_params is None:
        return {}
    several = isinstance(run.teacher, RoutedTeachers)
    params = run.teacher_params if several else (run.teacher_params,)
    return {
        f"teacher {name}".strip() + f", {run.config.teacher_dtype}": device_bytes(own)
        for (name, _), own in zip(models_of(run.teacher), params, strict=True)
    }


def _decoder_copy_bytes(run: _Run) -> int:
    params = shapes.cast(run.student.abstract_params(), run.config.dtype)
    with jax.set_mesh(run.mesh):
        specs = run.student.decode_specs(params)
    places = sharding.placed(run.mesh, params, specs)
    return device_bytes(with_shardings(params, places))


def _cache_bytes(run: _Run) -> int:
    """Keys and values of the student for all rows of a step."""
    model, dtype = run.student, jnp.dtype(run.config.dtype)
    samples = run.config.rollout.samples
    rows = run.config.batch_size * samples // sharding.row_parts(run.mesh)
    width = run.config.data.max_length
    cache = jax.eval_shape(lambda: model.init_cache(rows, width, dtype))
    is_split = model.config.num_kv_heads % model.tensor == 0
    size = sum(math.prod(x.shape) * dtype.itemsize for x in jax.tree.leaves(cache))
    return size // (model.tensor if is_split else 1)
