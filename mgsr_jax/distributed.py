"""Start-up of a run of several processes: one a host, or one a GPU.

The engine is JAX's own. On Cloud TPU, GKE, SLURM and under OpenMPI the processes find
each other; elsewhere three settings, or environment variables, say where they are.
"""

import dataclasses
import os
from typing import Any

import jax
from jax.experimental import multihost_utils

_VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """How processes find each other; nothing of it where a launcher tells them.

    Attributes:
      coordinator_address: host:port of process 0, the port free there; default: the
        variable JAX_COORDINATOR_ADDRESS.
      num_processes: of the whole run; default: JAX_NUM_PROCESSES.
      process_id: of this one, from 0; default: JAX_PROCESS_ID.
      timeout: seconds to wait for the others at the start.
      detect: whether to ask Cloud TPU, GKE, SLURM and OpenMPI for what is not set.
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
            cluster_detection_method=None if config.detect else "deactivate",
            initialization_timeout=config.timeout,
        )
    except ValueError as error:
        if not found:
            return  # no launcher, and nobody speaks of other processes
        raise ValueError(
            f"distributed: {error} Got {found or 'nothing'}; give all of "
            f"{', '.join(_VARIABLES)} (or {', '.join(_VARIABLES.values())}), or none"
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


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


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
    return found


def _launched() -> bool:
    """Whether a launcher says that there are more processes than this one.

    Those of one TPU slice have met by its own runtime, once devices are in use.
    """
    sizes = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    return any(_number(name, os.environ.get(name, "1")) > 1 for name in sizes)


def _number(variable: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"{variable}={text!r}; expected a whole number") from error
