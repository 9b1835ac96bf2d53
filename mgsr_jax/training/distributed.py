"""Start-up of a run of several processes: one a host, or one a GPU.

The engine is JAX's own. On Cloud TPU, GKE, SLURM and under OpenMPI the processes find
each other; elsewhere three settings, or environment variables, say where they are.
"""

import dataclasses
import os
from typing import Any

import jax

_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
# JAX hears Open MPI 4 by what 5 does not say. Both say this, and no address.
_OF_OPEN_MPI = {
    "num_processes": "OMPI_COMM_WORLD_SIZE",
    "process_id": "OMPI_COMM_WORLD_RANK",
}
_SLURM_STEP = "SLURM_STEP_NODELIST"


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How processes find each other; nothing of it where a launcher tells them.

    Attributes:
      coordinator_address: host:port of process 0, the port free there; default: the
        variable JAX_COORDINATOR_ADDRESS.
      num_processes: of the whole run; default: JAX_NUM_PROCESSES.
      process_id: of this one, from 0; default: JAX_PROCESS_ID.
      timeout: seconds to wait for the others at the start.
      detect: whether to ask Cloud TPU, GKE, SLURM and OpenMPI for what is not set;
        Open MPI 5 does not know coordinator_address.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 300
    detect: bool = True


def start(config: DistributedConfig) -> None:
    """Joins this process to the run's others; nothing where it is the only one.

    To be called before a device is used. A second call does nothing.

    Raises:
      ValueError: settings of which some are missing or no number.
      ConnectionError: the others were not there in time.
      RuntimeError: devices are in use, and there are others to join.
    """
    if jax.distributed.is_initialized():
        return
    found = _settings(config)
    try:
        jax.distributed.initialize(
            **found,
            local_device_ids=_own_gpus(found) if config.detect else None,
            cluster_detection_method=None if config.detect else "deactivate",
            initialization_timeout=config.timeout,
        )
    except ValueError as error:
        said = _launched() if config.detect else ""
        if not found and not said:
            return  # no launcher, and nobody speaks of other processes
        raise ValueError(
            f"distributed: {error} Got {found or said}; give all of "
            f"{', '.join(_VARIABLES)} (or {', '.join(_VARIABLES.values())}), or none; "
            "a process that a launcher started to be alone sets distributed.detect to "
            "false"
        ) from error
    except RuntimeError as error:
        if "must be called before" in str(error):  # devices are in use already
            if not found and not (config.detect and _launched()):
                return  # a call from Python, of a process on its own
            raise RuntimeError(
                "distributed: devices were used before this process joined the run's "
                "others; call distributed.start first, or, where it is alone, set "
                "distributed.detect to false"
            ) from error
        raise ConnectionError(
            f"the processes of this run did not meet within {config.timeout} s, with "
            f"{found or 'what the launcher says'}: {error}"
        ) from error


def is_lead() -> bool:
    """Whether this is the process that writes files and speaks."""
    return jax.process_index() == 0


def _settings(config: DistributedConfig) -> dict[str, Any]:
    """What is set, by option or by variable; the option wins."""
    found: dict[str, Any] = {}
    for name, variable in _VARIABLES.items():
        value = getattr(config, name)
        if value is None and (text := os.environ.get(variable)):
            value = text if name == "coordinator_address" else _number(variable, text)
        if value is not None:
            found[name] = value
    if config.detect and "coordinator_address" in found:
        for name, variable in _OF_OPEN_MPI.items():
            if name not in found and (text := os.environ.get(variable)):
                found[name] = _number(variable, text)
    return found


def _launched() -> str:
    """What a launcher says of more processes than this one, if it does.

    Those of one TPU slice have met by its own runtime, once devices are in use. A shell
    of a SLURM job that is no step of it is alone, whatever it may start.
    """
    names = ["OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES"]
    if _SLURM_STEP in os.environ:
        names.append("SLURM_NTASKS")
    sizes = {name: _count(name) for name in names}
    return ", ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)


def _own_gpus(found: dict[str, Any]) -> list[int] | None:
    """The GPUs that are this process's among those it sees; None: as JAX does.

    JAX gives a SLURM task the one GPU of its number, also where the task is alone on
    its node, and a process that is told where the others are all that it sees.
    """
    if not found and _SLURM_STEP in os.environ:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = len(seen.split(",")) if seen else _count("SLURM_GPUS_ON_NODE")
        alone = _count("SLURM_NTASKS") == _count("SLURM_STEP_NUM_NODES")
        return list(range(gpus)) if alone else None
    if found and _count("OMPI_COMM_WORLD_LOCAL_SIZE") > 1:
        return [_count("OMPI_COMM_WORLD_LOCAL_RANK")]
    return None


def _count(variable: str) -> int:
    """What a launcher's variable says; 1 where it says nothing."""
    return _number(variable, os.environ.get(variable) or "1")


def _number(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{variable}={text!r}; expected a whole number") from error
