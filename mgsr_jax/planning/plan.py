"""`mgsr plan`: whether a run fits a machine that is not here, and what it would send.

The run's own programs, the rollout and the training step, are compiled for the target
by its own compiler; memory and collectives are read from what comes out. What that
cannot tell: speed, numbers, fragmentation.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from mgsr_jax import sharding
from mgsr_jax.checkpoint._layout import path_name
from mgsr_jax.data.teacher_cache import MANIFEST, Origin, Recipe, read_manifest
from mgsr_jax.losses import TopKTeacher
from mgsr_jax.models import LanguageModel, quantized
from mgsr_jax.planning.compiled import (
    Program,
    compile_program,
    device_bytes,
    in_short,
    with_places,
)
from mgsr_jax.planning.machines import GIB, Target
from mgsr_jax.rows import Rows
from mgsr_jax.train_step import init_state
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.config_checks import check_config
from mgsr_jax.training.model_pair import check_sizes, read_models
from mgsr_jax.training.programs import (
    init_trained,
    make_programs,
    state_shardings,
)
from mgsr_jax.typing import CLIP_NETWORK, STUDENT

MARGIN = 0.92
"""Of a device's memory; the rest is left to fragments and to what a driver keeps."""

_STEPS = 1000  # the learning rate's schedule does not change a program


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a machine.

    Attributes:
      target: the machine.
      mesh: its devices as the run divides them.
      micro_batches: that a step's batch is computed in.
      parts: name -> bytes of one device, of what stays in its memory.
      programs: those that were compiled.
      failure: why the next one does not fit, in the compiler's words; None if all do.
    """

    target: Target
    mesh: Mesh
    micro_batches: int
    parts: dict[str, int]
    programs: tuple[Program, ...]
    failure: str | None = None

    @property
    def peak(self) -> int:
        """Bytes of one device at the worst moment of those that were compiled."""
        return max((program.peak for program in self.programs), default=0)

    @property
    def fits(self) -> bool:
        """Whether that leaves the margin free."""
        return self.failure is None and self.peak <= MARGIN * self.target.memory


def plan(config: TrainConfig, target: Target) -> Plan:
    """Compiles the rollout and the training step of `config` for `target`.

    Of checkpoints config.json alone is read, and no data.

    Raises:
      ValueError: settings that cannot work, there or anywhere.
    """
    return _planner(config, target).plan()


def search(
    config: TrainConfig, target: Target, tell: Callable[[Plan], None]
) -> Plan | None:
    """The smallest mesh.fsdp and the fewest micro_batches that fit, or None.

    Each copy of the models on as few devices as can hold it, then micro-batches as
    large as fit beside it; mesh.tensor stays as it is, and sizes that do not divide are
    left out. `tell` hears of every trial.

    Raises:
      ValueError: as `plan`; or no mesh divides the models and the batch.
    """
    shared = len(target.devices) // max(1, config.mesh.tensor)
    refused: ValueError | None = ValueError(
        f"batch_size={config.batch_size} does not divide over {shared} devices; use a "
        "multiple"
    )
    for fsdp in _divisors(shared):
        for micro_batches in _divisors(config.batch_size):
            if config.batch_size // micro_batches % shared:
                continue
            sizes = dataclasses.replace(config.mesh, data=-1, fsdp=fsdp)
            trial = dataclasses.replace(config, mesh=sizes, micro_batches=micro_batches)
            try:
                planner = _planner(trial, target)
            except sharding.DoesNotDivide as error:
                refused = refused and error
                break
            refused = None
            if not planner.has_room:
                break  # what stays in memory is too much already
            found = planner.plan()
            tell(found)
            if found.fits:
                return found
    if refused:
        raise refused
    return None


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


def _planner(config: TrainConfig, target: Target) -> "_Planner":
    check_config(config)
    sizes = config.mesh
    mesh = sharding.make_mesh(
        sizes.data, sizes.fsdp, sizes.tensor, devices=target.devices
    )
    sizes = dataclasses.replace(sizes, tensor=mesh.shape["tensor"])
    config = dataclasses.replace(config, mesh=sizes)
    student, teacher = read_models(config)
    check_sizes(config, student, teacher, mesh)
    return _Planner(config, target, mesh, student, teacher)


class _Planner:
    """One plan in the making."""

    def __init__(
        self,
        config: TrainConfig,
        target: Target,
        mesh: Mesh,
        student: LanguageModel,
        teacher: LanguageModel | None,
    ):
        self.config, self.target, self.mesh = config, target, mesh
        self.student, self.teacher = student, teacher
        both = [model for model in (student, teacher) if model is not None]
        self.vocab_size = min(model.config.vocab_size for model in both)
        stop = student.config.eos_token_id
        stop = stop if isinstance(stop, tuple | list) else (stop or 0,)
        self.run = make_programs(
            config,
            student,
            teacher,
            mesh=mesh,
            vocab_size=self.vocab_size,
            eos_ids=tuple(stop),
            steps=config.steps or _STEPS,
        )
        self.state = self._state()
        self.teacher_params = self._teacher()

    @property
    def has_room(self) -> bool:
        """Whether what stays in memory leaves any for a program."""
        return sum(self._parts().values()) < MARGIN * self.target.memory

    def plan(self) -> Plan:
        """Compiles one program after the other, until one does not fit."""
        programs, failure = [], None
        try:
            with jax.set_mesh(self.mesh):
                rows = (self._rows(),) * self.config.micro_batches
                cached = (self._said(),) * self.config.micro_batches
                steps = {"train step": (rows, cached)}
                if self.run.rollout is not None:
                    program, outputs = self._rollout(rows)
                    programs.append(program)
                    steps = self._steps(rows, cached, outputs)
                programs.extend(
                    self._train_step(name, *arguments)
                    for name, arguments in steps.items()
                )
        except RuntimeError as error:
            if "cuDNN" in str(error):
                raise ValueError(
                    "attention='cudnn' is compiled only where cuDNN is installed "
                    f"({error}); plan with attention: xla, which needs no less memory"
                ) from error
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            failure = in_short(str(error))
        micro_batches = self.config.micro_batches
        return Plan(
            self.target,
            self.mesh,
            micro_batches,
            self._parts(),
            tuple(programs),
            failure,
        )

    def _rollout(self, rows: tuple[Rows, ...]) -> tuple[Program, Any]:
        # The optimizer's moments wait beside it.
        waiting = device_bytes(self.state.opt_state)
        return compile_program(
            "rollout",
            self.run.rollout,
            (self.state.all_params[STUDENT], self.teacher_params, rows, _KEY),
            options=self.target.compiler_options,
            waiting=waiting,
        )

    def _train_step(
        self, name: str, rows: tuple[Rows, ...], cached: tuple[Any, ...]
    ) -> Program:
        arguments = (self.state, self.teacher_params, rows, cached)
        options = self.target.compiler_options
        step = self.run.train_step
        return compile_program(name, step, arguments, options=options)[0]

    def _steps(
        self, rows: tuple[Rows, ...], cached: tuple[Any, ...], outputs: Any
    ) -> dict[str, tuple[tuple[Rows, ...], tuple[Any, ...]]]:
        """The rows of the largest steps: the student's, and the data's."""
        samples, _, heard = outputs
        if self.config.objective.sft:
            return {"train step": (rows + samples, cached + heard)}
        steps = {"train step": (samples, heard)}
        if self.config.rollout.always_generates:
            return steps
        # The teacher, who has been heard on samples, runs in it.
        return steps | {"train step on the data": (rows, cached)}

    def _state(self) -> Any:
        config, student = self.config, self.student
        weights, frozen = student.abstract_params(), {}
        params = jax.eval_shape(lambda: init_trained(config, student, _STEPS))
        if config.lora.rank:
            frozen = {STUDENT: _cast(weights, config.dtype)}
        else:
            params[STUDENT] = weights
        state = jax.eval_shape(
            lambda params, frozen: init_state(
                params, self.run.optimizer, config.seed, frozen=frozen
            ),
            params,
            frozen,
        )
        return with_places(state, state_shardings(self.mesh, student, state))

    def _teacher(self) -> Any:
        if self.teacher is None or not self.config.runs_teacher:
            return None
        dtype, params = self.config.teacher_dtype, self.teacher.abstract_params()
        places = sharding.shardings(self.mesh, self.teacher.partition_rules, params)
        if dtype != "int8":
            return with_places(_cast(params, dtype), places)
        halves = with_places(_cast(params, jnp.bfloat16), places)
        return jax.tree_util.tree_map_with_path(
            lambda path, x: quantized.quantize(path_name(path), x), halves
        )

    def _of_rows(self, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
        """The shape of what there is of every row of a micro-batch."""
        size = self.config.batch_size // self.config.micro_batches
        place = sharding.batch_sharding(self.mesh)
        return jax.ShapeDtypeStruct((size, *more), dtype, sharding=place)

    def _said(self) -> TopKTeacher | None:
        """What the teacher cache says of such rows."""
        if self.config.teacher_cache is None:
            return None
        recipe = self._recipe(Path(self.config.teacher_cache))
        shape = (self.config.data.max_length - 1, recipe.top_k)
        return TopKTeacher(
            logits=self._of_rows(recipe.logits_dtype, *shape),
            indices=self._of_rows(recipe.indices_dtype, *shape),
            logsumexp=self._of_rows(jnp.float32, *shape[:1]),
        )

    def _recipe(self, folder: Path) -> Recipe:
        """A cache's own; where it is not here, that of one written by default."""
        if (folder / MANIFEST).is_file():
            return read_manifest(folder).recipe
        top_k = max(Recipe.top_k, self.config.objective.num_candidates)
        return Recipe(
            Origin("", "", "", ""), 0, self.vocab_size, min(top_k, self.vocab_size)
        )

    def _rows(self) -> Rows:
        """A micro-batch of the data."""
        width = self.config.data.max_length
        one, row = self._of_rows(jnp.int32), self._of_rows(jnp.int32, width)
        return Rows(
            tokens=row,
            prompt_lengths=one,
            lengths=one,
            span_ids=row,
            example=one,
            ground_truth=self._of_rows(jnp.bool),
        )

    def _parts(self) -> dict[str, int]:
        """What stays in a device's memory, or is there all through a rollout."""
        dtype = jnp.dtype(self.config.dtype)
        trained = "adapters" if self.config.lora.rank else "student"
        parts = {
            f"{trained}, float32": device_bytes(self.state.params[STUDENT]),
            "optimizer": device_bytes(self.state.opt_state),
        }
        if self.state.frozen:
            parts[f"student, {dtype.name}"] = device_bytes(self.state.frozen)
        if CLIP_NETWORK in self.state.params:
            network = self.state.params[CLIP_NETWORK]
            parts["clip network"] = device_bytes(network)
        if self.teacher_params is not None:
            name = f"teacher, {self.config.teacher_dtype}"
            parts[name] = device_bytes(self.teacher_params)
        if self.run.rollout is not None:
            parts[f"decoder's copy, {dtype.name}"] = self._copy_bytes(dtype)
            parts["cache of the student"] = self._cache_bytes(self.student, dtype)
        return parts

    def _copy_bytes(self, dtype: np.dtype) -> int:
        params = self.student.abstract_params()
        rules = sharding.gathered(self.student.partition_rules)
        cast = _cast(params, dtype)
        return device_bytes(
            with_places(cast, sharding.shardings(self.mesh, rules, cast))
        )

    def _cache_bytes(self, model: LanguageModel, dtype: np.dtype) -> int:
        """Keys and values of all rows of a step."""
        rows = self.config.batch_size // sharding.row_parts(self.mesh)
        width = self.config.data.max_length
        cache = jax.eval_shape(lambda: model.init_cache(rows, width, dtype))
        split = model.config.num_kv_heads % model.tensor == 0
        size = sum(math.prod(x.shape) * dtype.itemsize for x in jax.tree.leaves(cache))
        return size // (model.tensor if split else 1)


_KEY = jax.eval_shape(lambda: jax.random.key(0))


def _cast(shapes: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), shapes)


def print_plan(found: Plan, console: Console) -> None:
    """Tables of memory, programs and collectives, and the verdict on a line."""
    shape = " x ".join(f"{axis} {size}" for axis, size in found.mesh.shape.items())
    console.print(
        f"{found.target.name}: {found.mesh.size} devices as {shape}, "
        f"{found.micro_batches} micro-batches"
    )
    memory = Table("in each device's memory", "GiB")
    for name, size in found.parts.items():
        memory.add_row(name, _gib(size))
    console.print(memory)
    programs = Table("program", "peak GiB", "of it arguments", "compiled in s")
    traffic = Table("program", "collective", "number", "GiB (a loop's body once)")
    for program in found.programs:
        programs.add_row(
            program.name,
            _gib(program.peak),
            _gib(program.arguments),
            f"{program.seconds:.1f}",
        )
        for kind, (count, size) in program.collectives.items():
            traffic.add_row(program.name, kind, str(count), _gib(size))
    if programs.row_count:
        console.print(programs)
    if traffic.row_count:
        console.print(traffic)
    console.print(verdict(found), soft_wrap=True)


def verdict(found: Plan) -> str:
    """One line: fits, or by how much it does not and what to try."""
    room = f"{_gib(found.target.memory)} GiB a device"
    if found.fits:
        share = found.peak / found.target.memory
        return f"fits: {_gib(found.peak)} of {room} at the peak ({share:.0%})"
    why = found.failure or (
        f"{_gib(found.peak)} of {room} at the peak, more than {MARGIN:.0%}"
    )
    return (
        f"does not fit: {why}; more micro_batches, remat: true, a larger mesh.fsdp or "
        "more devices lower it"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
