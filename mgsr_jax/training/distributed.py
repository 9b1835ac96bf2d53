"""Runs of several processes: their start-up, and the checks that they agree.

JAX's own runtime connects the processes, one a host or one a GPU. On Cloud TPU, GKE,
SLURM and under Open MPI it detects them; elsewhere three settings or environment
variables give the address, the number of processes and this process's number.

A process that fails alone leaves the others waiting; a process with other settings or
data trains on something else without an error. `on_all_processes`, `check_equal` and
`check_shared` turn both into an error. They do nothing in a run of one process.
"""

import dataclasses
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from mgsr_jax import settings

T = TypeVar("T")

_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# JAX detects Open MPI by a variable that version 5 no longer sets. These exist in both
# versions, but carry no coordinator address.
_OPEN_MPI_VARIABLES = {
    "num_processes": "OMPI_COMM_WORLD_SIZE",
    "process_id": "OMPI_COMM_WORLD_RANK",
}
_SLURM_STEP = "SLURM_STEP_NODELIST"


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How processes find each other; a launcher that JAX detects needs no setting.

    Attributes:
      coordinator_address: host:port of process 0, the port free there; default: the
        variable JAX_COORDINATOR_ADDRESS.
      num_processes: processes of the whole run; default: JAX_NUM_PROCESSES.
      process_id: number of this process, from 0; default: JAX_PROCESS_ID.
      timeout: seconds to wait for the other processes at the start.
      detect: whether to read unset values from Cloud TPU, GKE, SLURM or Open MPI;
        Open MPI 5 does not provide coordinator_address.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300
    detect: bool = True

    def check(self) -> None:
        """Refuse numbers that no run of several processes has.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        section = "distributed."
        settings.check_positive(self, "num_processes", "timeout", section=section)
        processes = math.inf if self.num_processes is None else self.num_processes
        if self.process_id is not None and not 0 <= self.process_id < processes:
            raise ValueError(
                f"distributed.process_id={self.process_id}, "
                f"num_processes={self.num_processes}; processes are numbered from 0 to "
                "num_processes - 1"
            )


class _Address(TypedDict, total=False):
    """Arguments of `jax.distributed.initialize` that are known."""

    coordinator_address: str
    num_processes: int
    process_id: int


def start(config: DistributedConfig) -> None:
    """Connect this process to the run's others; do nothing if it is the only one.

    Call it before a device is used. A second call does nothing.

    Raises:
      ValueError: some settings are missing, are not numbers, or are out of range.
      ConnectionError: the other processes did not connect in time.
      RuntimeError: devices are already in use, and there are others to connect to.
    """
    if jax.distributed.is_initialized():
        return
    config.check()
    address = _address(config)
    try:
        jax.distributed.initialize(
            **address,
            local_device_ids=_local_gpus(address) if config.detect else None,
            cluster_detection_method=None if config.detect else "deactivate",
            initialization_timeout=config.timeout,
        )
    except ValueError as error:
        launcher = _launcher(config)
        if not address and not launcher:
            return  # no launcher and no setting: a single process
        raise _incomplete(error, address or launcher) from error
    except RuntimeError as error:
        if "must be called before" in str(error):  # devices are in use already
            if not address and not _launcher(config):
                return  # a call from Python in a single process
            raise RuntimeError(
                "distributed: devices were used before this process connected to the "
                "others; call distributed.start first, or, for a single process, set "
                "distributed.detect to false"
            ) from error
        if "mpi4py" in str(error):  # jax 0.12, under Open MPI 5 without that package
            raise _incomplete(error, address or _launcher(config)) from error
        raise ConnectionError(
            f"the processes of this run did not connect within {config.timeout} s with "
            f"{address or 'the values of the launcher'}: {error}"
        ) from error


def _incomplete(error: Exception, found: _Address | str) -> ValueError:
    return ValueError(
        f"distributed: {error} Got {found}; set all of {', '.join(_VARIABLES)} (or "
        f"{', '.join(_VARIABLES.values())}), or none; for a single process under a "
        "launcher set distributed.detect to false"
    )


def is_lead() -> bool:
    """Whether this is the lead process, which writes files and prints."""
    return jax.process_index() == 0


def _address(config: DistributedConfig) -> _Address:
    """The settings; where one is unset, its environment variable."""
    address: _Address = {}
    coordinator = config.coordinator_address
    if coordinator is None:
        coordinator = os.environ.get(_VARIABLES["coordinator_address"]) or None
    if coordinator is not None:
        address["coordinator_address"] = coordinator
    for name in ("num_processes", "process_id"):
        number = getattr(config, name)
        variables = [_VARIABLES[name]]
        if config.detect and coordinator is not None:
            variables.append(_OPEN_MPI_VARIABLES[name])
        for variable in variables:
            if number is None and (text := os.environ.get(variable)):
                number = _number(variable, text)
        if number is not None:
            address[name] = number
    return address


def _launcher(config: DistributedConfig) -> str:
    """The launcher's variables that count more than one process; empty without one.

    The hosts of one TPU slice are not listed: they connect through the TPU runtime once
    devices are in use. A shell inside a SLURM job, without a step of the job, is a
    single process.
    """
    if not config.detect:
        return ""
    names = ["OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"]
    if _SLURM_STEP in os.environ:
        names.append("SLURM_NTASKS")
    sizes = {name: _count(name) for name in names}
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


def _local_gpus(address: _Address) -> list[int] | None:
    """Numbers of the visible GPUs that belong to this process; None: JAX's default.

    The default is wrong in two cases. A SLURM task gets one GPU, by its number, even if
    it is the only task on its node. A process with an explicit address gets all.
    """
    if not address and _SLURM_STEP in os.environ:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = len(visible.split(",")) if visible else _count("SLURM_GPUS_ON_NODE")
        one_a_node = _count("SLURM_NTASKS") == _count("SLURM_STEP_NUM_NODES")
        return list(range(gpus)) if one_a_node else None
    if address and _count("OMPI_COMM_WORLD_LOCAL_SIZE") > 1:
        return [_count("OMPI_COMM_WORLD_LOCAL_RANK")]
    return None


def _count(variable: str) -> int:
    """The value of a launcher's variable; 1 where it is not set."""
    return _number(variable, os.environ.get(variable) or "1")


def _number(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{variable}={text!r}; expected a whole number") from error


def on_all_processes(call: Callable[[], T]) -> T:
    """The result of `call`, once it has returned in every process.

    `call` itself must not wait for other processes.

    Raises:
      ValueError: it failed in another process; gives its number and its error.
      Exception: the error of `call` in this process.
    """
    try:
        result = call()
    except Exception as error:
        _all_gather(str(error) or type(error).__name__)
        raise
    for number, reason in enumerate(_all_gather("")):
        if reason:
            raise ValueError(f"process {number} of this run failed: {reason}")
    return result


def lead_first(call: Callable[[], T]) -> T:
    """The result of `call`, which returns in the lead process before others begin it.

    Hosts that share a cache then read what the lead process has downloaded.

    Raises:
      ValueError, Exception: see `on_all_processes`.
    """
    first = on_all_processes(lambda: call() if is_lead() else None)
    return on_all_processes(lambda: call() if first is None else first)


def check_equal(parts: Mapping[str, str]) -> None:
    """Refuse `parts`, by name, that are not the same in every process.

    Raises:
      ValueError: the names that differ, and the process that differs.
    """
    lead, *others = map(json.loads, _all_gather(json.dumps(dict(parts))))
    for number, other in enumerate(others, 1):
        differ = [name for name in lead | other if lead.get(name) != other.get(name)]
        if differ:
            raise ValueError(
                f"processes 0 and {number} of this run differ in {', '.join(differ)}; "
                "start them with the same command and the same data"
            )


def check_shared(folder: Path, *, patience: float = 60.0) -> None:
    """Refuse a folder that is not the same one in every process.

    The lead process creates a file in it, the others look for it, then it is removed.

    Args:
      patience: seconds to look for the file; network file systems cache for a while
        that a file does not exist.

    Raises:
      ValueError: the processes that do not see the file.
    """
    if jax.process_count() == 1:
        return
    mark = folder / f".seen-{_all_gather(uuid.uuid4().hex)[0]}"
    try:
        on_all_processes(lambda: _create(mark) if is_lead() else None)
        deadline = time.monotonic() + patience
        while not (seen := mark.exists()) and time.monotonic() < deadline:
            time.sleep(0.1)
        answers = _all_gather("" if seen else "not seen")
    finally:
        if is_lead():
            mark.unlink(missing_ok=True)
    if blind := [number for number, answer in enumerate(answers) if answer]:
        raise ValueError(
            f"output: processes {blind} of this run do not see the files that process "
            f"0 writes in {folder}; give a folder on storage that all hosts share, "
            "under the same path on every host"
        )


def _create(mark: Path) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _all_gather(text: str) -> list[str]:
    """The `text` of each process, in their order; every process must call this."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(own.size))
    padded = np.zeros(max(1, sizes.max()), np.uint8)
    padded[: own.size] = own
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row[:n]).decode() for row, n in zip(rows, sizes, strict=True)]
