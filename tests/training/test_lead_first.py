"""`lead_first` with two real processes."""

import os
import socket
import subprocess
import sys

import pytest

PROCESS = """
import pathlib, sys
from mgsr_jax.training import distributed
log, port, number, *fails = sys.argv[1:]
distributed.start(distributed.DistributedConfig(
    f"127.0.0.1:{port}", num_processes=2, process_id=int(number), detect=False,
    timeout=60,
))

def call():
    with pathlib.Path(log).open("a") as stream:
        stream.write(f"{distributed.is_lead()} ")
    if fails:
        raise OSError("no such model")
    return "folder"

print(distributed.lead_first(call))
"""


def run_two(log, *arguments):
    """Exit status, output and errors of both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    kept = {name: os.environ[name] for name in os.environ if name[:4] != "JAX_"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, log, str(port), str(number), *arguments],
            env={**kept, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *out) for p, out in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_the_lead_process_calls_before_the_others(tmp_path):
    for status, out, errors in run_two(tmp_path / "log"):
        assert status == 0, errors
        assert out.splitlines()[-1] == "folder"
    assert (tmp_path / "log").read_text() == "True False "


@pytest.mark.slow
def test_a_failure_of_the_lead_process_is_an_error_in_all(tmp_path):
    lead, other = run_two(tmp_path / "log", "fails")
    assert (tmp_path / "log").read_text() == "True "
    assert lead[0] and "OSError: no such model" in lead[2]
    assert other[0] and "process 0 of this run failed: no such model" in other[2]
