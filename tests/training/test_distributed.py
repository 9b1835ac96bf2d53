"""Several real processes: how they meet, and that they compute what one computes."""

import http.server
import json
import os
import shutil
import threading
from contextlib import ExitStack, contextmanager

import jax
import numpy as np
import pytest
import tiny
import yaml
from processes import by_variables, ended, environment, free_port, together

from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint import state as checkpoint_state
from mgsr_jax.models import from_config
from mgsr_jax.training import distributed
from mgsr_jax.training.distributed import DistributedConfig

MEET = """
import jax
from mgsr_jax.training import distributed
distributed.start(distributed.DistributedConfig(timeout=60))
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


def two(launcher):
    """The environments of two processes, of two devices each."""
    port = free_port()
    return [environment(2, **launcher(i, port)) for i in (0, 1)]


def by_slurm(i, port):
    return {
        "SLURM_JOB_ID": "123",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(i),
        "SLURM_LOCALID": str(i),
        "JAX_COORDINATOR_PORT": str(port),
    }


def by_open_mpi(i, port):
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:5555",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
        "JAX_COORDINATOR_PORT": str(port),
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_variables, by_slurm, by_open_mpi])
def test_two_processes_meet(launcher):
    found = together(["-c", MEET], two(launcher))
    # Gloo prints too.
    assert [out.splitlines()[-1] for out in found] == ["0 2 4", "1 2 4"]


GPUS = """
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
print(CUDA_VISIBLE_DEVICES.value)
"""


def by_open_mpi_5(i, port):
    """It has no variable of version 4's but the numbers."""
    return {
        "PRTE_LAUNCHED": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(i),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(i),
    }


def test_a_launcher_without_an_address_takes_one_from_the_settings():
    environments = two(by_open_mpi_5)
    found = ended([["-c", MEET]] * 2, environments)
    for status, _, complaint in found:
        assert status == 1 and "Got OMPI_COMM_WORLD_SIZE=2; set all of" in complaint
    address = f"127.0.0.1:{free_port()}"
    more = {"JAX_COORDINATOR_ADDRESS": address}
    found = together(["-c", MEET + GPUS], [env | more for env in environments])
    assert [out.splitlines()[-2:] for out in found] == [
        ["0 2 4", "0"],
        ["1 2 4", "1"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "gpus"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_NUM_NODES": "2"}, ["0,1,2,3"] * 2),
        ({"CUDA_VISIBLE_DEVICES": "1,3", "SLURM_STEP_NUM_NODES": "2"}, ["0,1"] * 2),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_NUM_NODES": "1"}, ["0", "1"]),
    ],
)
def test_a_slurm_task_alone_on_its_node_has_all_gpus(more, gpus):
    environments = two(by_slurm)
    for i, env in enumerate(environments):
        alone = more["SLURM_STEP_NUM_NODES"] == "2"
        env |= more | {"SLURM_LOCALID": "0" if alone else str(i)}
    found = together(["-c", MEET + GPUS], environments)
    assert [out.splitlines()[-1] for out in found] == gpus


def test_a_shell_of_a_slurm_job_is_alone():
    alone = {"SLURM_JOB_ID": "123", "SLURM_NTASKS": "8"}
    (out,) = together(["-c", MEET], [environment(3, **alone)])
    assert out.split() == ["0", "1", "3"]


# What JAX finds out when it is imported on a TPU host.
ON_A_TPU_HOST = """
import os
import jax
from jax._src.clusters import cloud_tpu_cluster, cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = True
os.environ.pop("TPU_SKIP_MDS_QUERY", None)
"""


@contextmanager
def metadata_server(**attributes):
    """Run a metadata server of a Cloud TPU host; yields its address."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = "/computeMetadata/v1/instance/attributes/"
            found = attributes.get(self.path.removeprefix(path).replace("-", "_"))
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def by_cloud_tpu(i, port):
    """Environment of a process that only the metadata server describes."""
    return {"JAX_COORDINATOR_PORT": str(port)}


def by_gke(i, port):
    """One slice of two hosts."""
    return by_cloud_tpu(i, port) | {
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "TPU_WORKER_ID": str(i),
    }


def by_gke_slices(i, port):
    """Two slices of one host."""
    return by_cloud_tpu(i, port) | {
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "MEGASCALE_NUM_SLICES": "2",
        "MEGASCALE_SLICE_ID": str(i),
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost:8080",
    }


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [by_cloud_tpu, by_gke, by_gke_slices])
def test_two_tpu_hosts_meet(launcher):
    port, environments = free_port(), []
    with ExitStack() as stack:
        for i in (0, 1):
            address = stack.enter_context(
                metadata_server(
                    agent_worker_number=str(i) if launcher is by_cloud_tpu else None,
                    worker_network_endpoints="localhost,localhost",
                    tpu_env="ACCELERATOR_TYPE: 'v5p-16'",
                )
            )
            more = launcher(i, port) | {"GCE_METADATA_IP": address}
            environments.append(environment(2, **more))
        found = together(["-c", ON_A_TPU_HOST + MEET], environments)
    assert [out.splitlines()[-1] for out in found] == ["0 2 4", "1 2 4"]


def test_a_process_on_its_own_needs_no_launcher():
    (out,) = together(["-c", MEET], [environment(3)])
    assert out.split() == ["0", "1", "3"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DistributedConfig(num_processes=2), "coordinator_address"),
        (DistributedConfig("127.0.0.1:1"), "JAX_NUM_PROCESSES"),
        (DistributedConfig("127.0.0.1:1", 2), "process_id"),
        (DistributedConfig("127.0.0.1:1", 2, 2), "process_id=2, num_processes=2; pro"),
    ],
)
def test_settings_of_which_some_are_missing_are_refused(config, message, monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=message):
        distributed.start(config)


def test_devices_in_use_are_no_way_around_a_launcher(monkeypatch):
    """Every process would be a run of its own, in one folder."""
    for name in os.environ.keys() - environment(1).keys():
        monkeypatch.delenv(name)
    jax.devices()
    distributed.start(DistributedConfig())
    monkeypatch.setenv("SLURM_NTASKS", "2")
    distributed.start(DistributedConfig())  # no step of that job
    monkeypatch.setenv("SLURM_STEP_NODELIST", "localhost")
    with pytest.raises(RuntimeError, match="call distributed.start first"):
        distributed.start(DistributedConfig())
    distributed.start(DistributedConfig(detect=False))


def test_a_launcher_that_cannot_be_heard_is_no_reason_to_run_alone(monkeypatch):
    def initialize(**_):
        raise RuntimeError("Failed to recognize coordinator address t1v-0")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ConnectionError, match="did not connect .*: Failed to rec"):
        distributed.start(DistributedConfig())


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(ValueError, match="JAX_PROCESS_ID='one'"):
        distributed.start(DistributedConfig())


# Faults that a single process would not meet


def complaints(script):
    """The errors of two processes that run `script`."""
    found = ended([["-c", MEET + script]] * 2, two(by_variables))
    assert [status for status, _, _ in found] == [1, 1]
    return [complaint for _, _, complaint in found]


def test_a_failure_of_one_is_told_to_all():
    found = complaints("""
from mgsr_jax.training.distributed import on_all_processes
assert on_all_processes(lambda: jax.process_index()) == jax.process_index()
on_all_processes(lambda: open("nowhere") if jax.process_index() else None)
""")
    assert "process 1 of this run failed: [Errno 2] No such file" in found[0]
    assert "FileNotFoundError: [Errno 2]" in found[1]


def test_what_differs_is_named():
    found = complaints("""
from mgsr_jax.training.distributed import check_equal
check_equal({"seed": "1", "data": "a"})
number = jax.process_index()
check_equal({"seed": str(number), "steps": "9", **({"only": "1"} if number else {})})
""")
    for complaint in found:
        assert "processes 0 and 1 of this run differ in seed, only;" in complaint


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    found = complaints(f"""
from pathlib import Path
from mgsr_jax.training.distributed import check_shared
own = Path({str(tmp_path)!r})
check_shared(own / "shared")
check_shared(own / str(jax.process_index()), patience=0.5)
""")
    for complaint in found:
        assert "processes [1] of this run do not see" in complaint
    # No mark is left.
    assert {path.name: list(path.iterdir()) for path in tmp_path.iterdir()} == {
        "shared": [],
        "0": [],
    }


# The same run, in one process and in two


LAYOUTS = {
    "one device": (1, 1, {}),
    "eight devices": (1, 8, {"fsdp": 4}),
    "two processes": (2, 4, {"fsdp": 2, "tensor": 2}),
}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return tiny.project(tmp_path_factory.mktemp("project"))


def write_config(project, output, mesh, **settings):
    """The file of a run's settings."""
    config = {
        "student": str(project / "student"),
        "teacher": str(project / "teacher"),
        "output": str(output),
        "data": {
            "train": str(project / "train.jsonl"),
            "valid": str(project / "valid.jsonl"),
            "max_prompt_length": 64,
            "max_length": 96,
            "cache_dir": str(project / "cache"),
        },
        "steps": 4,
        "batch_size": 16,
        "micro_batches": 2,
        "objective": {"num_candidates": 16},
        "rollout": {"policy": "replay", "initial_ratio": 1.0, "capacity": 24},
        "mesh": mesh,
        "log_every": 1,
        "evaluate_every": 2,
        "evaluate": {"limit": 5},
        "best_metric": "eval/loss",
        "save_every": 2,
        "keep_checkpoints": 9,
        "tensorboard": False,
        **settings,
    }
    file = project / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def train(project, output, layout, **settings):
    """Runs `mgsr train`; returns the lines of its metrics."""
    processes, devices, mesh = LAYOUTS[layout]
    file = write_config(project, output, mesh, **settings)
    port = free_port()
    # The run that goes on is of programs that another one has compiled.
    alone = {
        "JAX_COMPILATION_CACHE_DIR": str(project / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    environments = [
        environment(devices, **(by_variables(i, port) if processes > 1 else alone))
        for i in range(processes)
    ]
    together(["-m", "mgsr_jax", "train", "--config", str(file)], environments)
    text = (output / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def runs(project):
    return {
        layout: (
            project / layout.replace(" ", "_"),
            train(project, project / layout.replace(" ", "_"), layout),
        )
        for layout in LAYOUTS
    }


def replayed(output):
    """The replay buffer of the last checkpoint."""
    with checkpoint_state.open_manager(output / "checkpoints") as manager:
        import orbax.checkpoint as ocp

        found = manager.restore(
            4, args=ocp.args.Composite(replay=ocp.args.StandardRestore())
        )
    return jax.tree.map(np.asarray, found["replay"])


def assert_close(found, expected):
    """Every step has the same metrics, except those of time."""
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"train/tokens_per_second"}:
            np.testing.assert_allclose(
                line[name], other[name], rtol=1e-5, atol=1e-5, err_msg=name
            )


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", ["eight devices", "two processes"])
def test_rollouts_and_losses_do_not_depend_on_hosts_and_devices(runs, layout):
    (reference, expected), (output, found) = runs["one device"], runs[layout]
    for name in ("rollout/changed", "start/kl", "eval/rouge_l"):
        assert any(name in line for line in expected), name
    assert_close(found, expected)
    ours, theirs = replayed(output), replayed(reference)
    assert np.any(theirs["lengths"] > 1)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.exhaustive
def test_only_the_lead_process_writes(runs):
    output, lines = runs["two processes"]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    student = output / "student"
    loaded = hf.load_params(student, from_config(student))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loaded))


@pytest.mark.exhaustive
def test_a_run_of_two_processes_goes_on_in_one(runs, project):
    output, straight = runs["two processes"]
    resumed = project / "resumed"
    shutil.copytree(output, resumed)
    shutil.rmtree(resumed / "checkpoints" / "4")
    found = train(project, resumed, "eight devices", resume=True)
    assert_close(found, straight)


@pytest.mark.slow
def test_hosts_that_would_train_apart_are_stopped(project, tmp_path):
    """Other settings, other rows, an output that is each host's own."""
    config = write_config(project, tmp_path / "apart", {"fsdp": 2})
    command = ["-m", "mgsr_jax", "train", "--config", str(config)]
    rows = (project / "train.jsonl").read_text().splitlines()
    other = tmp_path / "train.jsonl"
    other.write_text("\n".join(reversed(rows)))
    copies = ["--seed", "7", "--data.train", str(other)]
    found = ended([command, command + copies], two(by_variables))
    for status, _, complaint in found:
        assert status == 2
        line = complaint.splitlines()[-1]
        assert "differ in data.train, seed, the rows of data.train;" in line
    assert not (tmp_path / "apart").exists()

    missing = ["--data.train", str(tmp_path / "nowhere.jsonl")]
    found = ended([command, command + missing], two(by_variables))
    assert [status for status, _, _ in found] == [2, 2]
    assert "process 1 of this run failed: " in found[0][2].splitlines()[-1]
    assert "nowhere.jsonl" in found[1][2].splitlines()[-1]
