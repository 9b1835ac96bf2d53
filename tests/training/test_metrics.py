"""Sums into means; a log that a crash does not spoil; the terminal's line."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from rich.console import Console

from mgsr_jax.interventions.outcome import InterventionInfo
from mgsr_jax.losses import Sum, TopKTeacher
from mgsr_jax.objective import LIMITS_START
from mgsr_jax.training.metrics import Means, MetricsLog, peak_memory, step_metrics
from mgsr_jax.training.progress import StepProgress
from mgsr_jax.training.row_source import StepRows


def test_means_weigh_every_position_and_not_every_step():
    means = Means()
    means.add({"kl": Sum(jnp.float32(6.0), jnp.float32(1.0))})
    means.add({"kl": Sum(jnp.float32(2.0), jnp.float32(3.0)), "sft": Sum(1.0, 2.0)})
    assert means.count("kl") == 4 and means.count("none") == 0
    assert means.take() == {"kl": 2.0, "sft": 0.5}
    assert means.take() == {} and means.count("kl") == 0


def test_what_was_never_counted_is_left_out():
    means = Means()
    means.add({"sft": Sum(0.0, 0.0), "kl": Sum(3.0, 2.0)})
    assert means.take() == {"kl": 1.5}


def test_a_variance_comes_out_as_a_deviation():
    means = Means()
    lower = np.array([0.0, 0.2, 0.3, 0.5])
    for part in (lower[:1], lower[1:]):
        around = np.sum((part - LIMITS_START["lower"]) ** 2)
        means.add(
            {
                "train/lower": Sum(np.sum(part), len(part)),
                "train/lower_variance": Sum(around, len(part)),
            }
        )
    assert means.take() == pytest.approx(
        {"train/lower": np.mean(lower), "train/lower_deviation": np.std(lower)}
    )


def test_work_is_summed_over_the_steps_of_a_line():
    means = Means()
    for tokens in (3.0, 4.0):
        means.add({"tokens/teacher_scored": Sum(tokens, 1.0), "kl": Sum(tokens, 1.0)})
    assert means.take() == {"tokens/teacher_scored": 7.0, "kl": 3.5}


DATA, SAMPLES = (
    tiny.complete(lengths, width=12) for lengths in (((2, 5), (3, 4)), ((2, 8), (3, 4)))
)
HIDDEN = jnp.zeros((2, 12, 3))
INFO = InterventionInfo(
    teacher_wrote=jnp.zeros((2, 12), bool).at[0, jnp.array([2, 6])].set(True),
    kl=jnp.array([1.5, 0.0]),
    student_generated=jnp.array([11, 4]),
    teacher_scored=jnp.array([13, 6]),
)


def values(rows, **settings):
    return {
        name: (float(total), float(count))
        for name, (total, count) in step_metrics({}, rows, **settings).items()
    }


def test_an_intervention_is_measured_per_row_and_per_token():
    rows = StepRows((DATA, SAMPLES), "generate", (None, HIDDEN), (INFO,), horizon=8)
    got = values(rows)
    assert got["rollout/changed"] == (1, 2) and got["rollout/teacher_tokens"] == (2, 2)
    # The tokens 0 and 4 of a response of 8.
    assert got["rollout/teacher_position"] == (pytest.approx(0.0 + 0.5), 2)
    assert got["rollout/kl"] == (1.5, 1) and got["rollout/max_new_tokens"] == (8, 1)
    assert got["tokens/student_generated"] == (15, 1)
    # The rollout's teacher, and the step's on 6 + 6 tokens of the data.
    assert got["tokens/teacher_scored"] == (19 + 12, 1)


def test_only_the_teacher_that_runs_scores_tokens():
    top_k = TopKTeacher(HIDDEN, HIDDEN.astype(jnp.uint16), HIDDEN[..., 0])
    for output, scored in ((None, 12), (top_k, 0), (HIDDEN, 0), (SAMPLES, 15)):
        rows = StepRows((DATA,), "data", (output,))
        assert values(rows)["tokens/teacher_scored"] == (scored, 1)
    rows = StepRows((DATA,), "data", (None,))
    fine_tuned = values(rows, needs_teacher=False)
    assert fine_tuned["tokens/teacher_scored"] == (0, 1)
    assert "rollout/changed" not in fine_tuned


def lines(folder):
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder, steps, *, step=0, name="loss"):
    with MetricsLog(folder, step=step, tensorboard=False) as log:
        for at in steps:
            log.write(at, {name: at / 2})


def test_a_line_a_step_is_written_at_once(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": 0.5, "note": "fine"})
        assert lines(tmp_path) == [{"step": 1, "loss": 0.5, "note": "fine"}]


def test_a_resumed_run_writes_the_lines_behind_its_step_again(tmp_path):
    write(tmp_path, range(6), name="first")
    write(tmp_path, range(4, 8), step=3, name="again")
    assert [line["step"] for line in lines(tmp_path)] == list(range(8))
    assert ["again" in line for line in lines(tmp_path)] == [False] * 4 + [True] * 4


def test_a_run_that_starts_over_keeps_no_line(tmp_path):
    """A crash before the first checkpoint: the first validation is made again too."""
    write(tmp_path, [0, 1, 2], name="first")
    write(tmp_path, [0, 1], name="again")
    assert lines(tmp_path) == [{"step": 0, "again": 0.0}, {"step": 1, "again": 0.5}]


@pytest.mark.parametrize(
    "rest", ['{"ste', '{"step": 3, "loss": 0.', "{", '{"step": 2}']
)
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path, rest):
    write(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(rest)
    write(tmp_path, [3], step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["not json", '{"loss": 1.0}', "[1]", "7"])
def test_a_line_of_something_else_is_named_and_nothing_is_lost(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    file.write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is not a line of metrics"):
        MetricsLog(tmp_path, step=2, tensorboard=False)
    assert file.read_text() == text


def test_a_crash_while_dropping_lines_costs_none(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3])

    def crash(self, target):
        raise OSError("the disk went away")

    monkeypatch.setattr(type(tmp_path), "replace", crash)
    with pytest.raises(OSError, match="went away"):
        MetricsLog(tmp_path, step=1, tensorboard=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_tensorboard_has_the_numbers_and_purges_behind_the_step(tmp_path, monkeypatch):
    import tensorboardX

    made = []

    class Writer:
        def __init__(self, folder, *, purge_step):
            self.folder, self.purge_step, self.scalars = folder, purge_step, []
            self.closed = False
            made.append(self)

        def add_scalar(self, *scalar):
            self.scalars.append(scalar)

        def close(self):
            self.closed = True

    monkeypatch.setattr(tensorboardX, "SummaryWriter", Writer)
    with MetricsLog(tmp_path) as log:
        log.write(3, {"loss": 0.5, "tokens": 7, "note": "fine"})
    with MetricsLog(tmp_path, step=3):
        pass
    first, second = made
    assert first.folder == str(tmp_path / "tensorboard") and first.closed
    assert first.scalars == [("loss", 0.5, 3), ("tokens", 7, 3)]
    # TensorBoard drops the events at the purge step too, and step 3 is kept.
    assert first.purge_step == 0 and second.purge_step == 4


def test_tensorboard_files_are_written(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5})
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_progress_without_a_terminal_is_a_line_now_and_then(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mgsr_jax.training.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    values = {
        "train/loss": 1.25,
        "train/span": 0.5,
        "train/learning_rate": 0.1,
        "train/tokens_per_second": 1234.4,
        "device/peak_gib": 12.34,
    }
    console = Console(file=out, force_terminal=False, width=200)
    with StepProgress(console, start=0, steps=9, title="SFT") as progress:
        for step in (1, 2, 3):
            now[0] += 6
            progress.advance(step)
            progress.show(step, values)
    assert (
        out.getvalue() == "SFT 2: loss 1.250  span 0.500  1,234 tok/s  peak 12.3 GiB\n"
    )


class Device:
    """One that counts as a GPU's does, as one without an allocator, as a CPU."""

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_the_peak_is_the_fullest_devices(monkeypatch):
    gib = 2**30
    counted = [{"peak_bytes_in_use": n * gib, "bytes_in_use": 9 * gib} for n in (2, 3)]
    devices = [Device(stats) for stats in (*counted, {}, None)]
    monkeypatch.setattr("mgsr_jax.training.metrics.jax.local_devices", lambda: devices)
    assert peak_memory() == {"device/peak_gib": 3.0}


def test_a_cpu_has_no_peak():
    assert peak_memory() == {}
