"""Machines that are not attached, by name: `v5p:4x4x4`, `h200:1x1x8`.

JAX compiles for a machine's description as it does for the machine. TPUs need libtpu
(the plan-tpu extra), GPUs the CUDA plugin (plan-gpu); neither needs a driver.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from mgsr_jax.planning.compiled import CompilerOptions
from mgsr_jax.planning.hlo_costs import InMemory
from mgsr_jax.planning.speeds import SPEEDS, Speed

GIB = 2**30
_HOST = 5  # XLA's memory space of arrays on the host


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine to compile for.

    Attributes:
      name: the name that `describe` was given.
      devices: devices that a program can be compiled for, but not run on.
      memory: bytes per device, including what the compiler and the driver reserve.
      speed: the most that a device can do.
      compiler_options: XLA options that a real machine would choose by itself.
    """

    name: str
    devices: tuple[object, ...]
    memory: int
    speed: Speed
    compiler_options: CompilerOptions = dataclasses.field(default_factory=dict)


# GiB per device. A device is a chip, but v2, v3 and tpu7x have two devices per chip.
_TPUS = {"v2": 8, "v3": 16, "v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}


@dataclasses.dataclass(frozen=True)
class _Gpu:
    memory: int  # bytes
    bandwidth: int  # bytes per second


_GPUS = {
    "h100": _Gpu(84_942_979_072, 3_352_320_000_000),
    "h200": _Gpu(151_397_597_184, 4_800_000_000_000),
}

# Without this description XLA looks for a GPU. H100 and H200 have the same cores.
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: {memory}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  device_vendor: "NVIDIA Corporation" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0" driver_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{name}"
"""


def describe(name: str, *, slices: int = 1) -> Machine:
    """The machine of a name such as KIND:AxB or KIND:AxBxC.

    The numbers are the torus of a TPU slice, or SLICESxHOSTSxGPUS of a GPU cluster.
    `slices` TPU slices are joined by the data centre's network.

    Raises:
      ValueError: there is no such kind or shape; the extra that brings the compiler is
        not installed.
    """
    match = re.fullmatch(r"([a-z0-9]+):(\d+(?:x\d+)+)", name)
    kind, shape = match.groups() if match else ("", "")
    if kind in _GPUS and shape.count("x") == 2 and slices == 1:
        return _gpus(name, kind, shape)
    if kind in _TPUS and slices >= 1:
        return _tpus(name, kind, shape, slices)
    raise ValueError(
        f"target={name!r}, slices={slices}; expected KIND:SHAPE such as v5p:4x4x4 or "
        f"v6e:16x16 ({', '.join(_TPUS)}) and slices of at least 1, or "
        f"SLICESxHOSTSxGPUS such as h200:1x2x8 ({', '.join(_GPUS)}) and slices=1"
    )


def _gpus(name: str, kind: str, shape: str) -> Machine:
    gpu = _GPUS[kind]
    text = _DESCRIPTION.format(name=kind.upper(), **dataclasses.asdict(gpu))
    devices = _topology(
        "cuda", "", "plan-gpu", name, target_config=text, topology=shape
    )
    # Triton's tiles are found by trials on a GPU, so products go to cuBLAS.
    options: CompilerOptions = {"xla_gpu_enable_triton_gemm": False}
    return Machine(name, devices, gpu.memory, SPEEDS[kind], options)


def _tpus(name: str, kind: str, shape: str, slices: int) -> Machine:
    options: dict[str, object] = {"num_slices": slices} if slices > 1 else {}
    if set(shape.split("x")) == {"1"}:  # by default a host has four chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    if kind == "v4":  # by default each chip has two devices
        options["chip_config_name"] = "megacore"
    devices = _topology("tpu", name, "plan-tpu", name, **options)
    return Machine(name, devices, _TPUS[kind] * GIB, SPEEDS[kind])


def domains(devices: Sequence[Any]) -> tuple[int, ...]:
    """The TPU slice or the GPU host of each device: links between them are slower."""
    tpu = devices[0].platform == "tpu"
    name = "slice_index" if tpu else "process_index"
    return tuple(getattr(device, name, 0) for device in devices)


def in_memory(device: Any) -> InMemory:
    """Whether an array is in a device's main memory, by its memory space.

    The compiler places arrays in a TPU's faster memories, and on the host.
    """
    if device.platform == "tpu":
        return lambda array: array.space == 0
    return lambda array: array.space != _HOST


def use_no_device() -> None:
    """Keep this process from using the attached devices; it only compiles.

    Call it before a device is used.
    """
    jax.config.update("jax_platforms", "cpu")
    # libtpu asks a metadata server for its slice, and locks out a second process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def _topology(
    platform: str, topology_name: str, extra: str, name: str, **options: object
) -> tuple[object, ...]:
    try:
        topology = topologies.get_topology_desc(
            platform=platform, topology_name=topology_name, **options
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"target={name!r} cannot be described: {reason}; check that this shape "
            f"exists and the compiler is installed (pip install 'mgsr_jax[{extra}]')"
        ) from error
    return tuple(topology.devices)
