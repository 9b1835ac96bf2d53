"""Real processes of a run, on CPU devices."""

import os
import socket
import subprocess
import sys

TIMEOUT = 300


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment(devices, **more):
    """Environment with `devices` CPU devices and no variable of a launcher."""
    launchers = "SLURM_", "OMPI_", "JAX_", "XLA_", "TPU_", "MEGASCALE_"
    compiler = "JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS"
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in compiler or not name.startswith(launchers)
    }
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    return kept | settings | more


def ended(commands, environments):
    """One process for each; status, what it prints, and what it complains of."""
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command, env in zip(commands, environments, strict=True)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        (process.returncode, *said)
        for process, said in zip(running, outputs, strict=True)
    ]


def together(command, environments):
    """One process for each environment; what they print."""
    found = ended([command] * len(environments), environments)
    for status, _, complaint in found:
        assert status == 0, complaint[-3000:]
    return [out for _, out, _ in found]


def by_variables(i, port):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(i),
    }
