"""Measure whether DAC-KL's clip network learns limits that depend on the position.

A student of Little English (quickstart.py) is warmed up by SFT. Then every signal of
`objective.clip_signal` trains it and a new clip network on the same batches; "meta" is
a signal that exists only here. At some steps the limits are compared with the teacher's
entropy and with the student's error on the validation data.

    python examples/dac_kl_signals.py --output runs/dac_kl_signals

The table of docs/method.md. About ten minutes on two CPU cores.
"""

import argparse
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
from quickstart import DAC_KL, Workspace
from rich.console import Console
from small_runs import load, optimizer

from mgsr_jax import losses
from mgsr_jax.data import dataset
from mgsr_jax.data.batches import train_batches
from mgsr_jax.evaluation.tables import markdown_table
from mgsr_jax.loss_targets import make_targets
from mgsr_jax.objective import Objective, position_weights
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.training.optimizer import make_optimizer
from mgsr_jax.typing import CLIP_NETWORK, STUDENT, Model, Params
from mgsr_jax.weighted_sum import weighted_sum

META = "meta"


def _signal(name: str, **settings: float) -> Objective:
    return dataclasses.replace(DAC_KL, clip_signal=name, **settings)


OBJECTIVES = {
    "prior": DAC_KL,
    "no prior": dataclasses.replace(DAC_KL, prior_weight=0.0),
    "fidelity 0.3": _signal("fidelity", fidelity_weight=0.3),
    "fidelity 1": _signal("fidelity", fidelity_weight=1.0),
    "fidelity 3": _signal("fidelity", fidelity_weight=3.0),
    "unnormalised": _signal("unnormalised"),
    # The network's own term is replaced by the gradient on held-out text.
    META: dataclasses.replace(DAC_KL, prior_weight=0.0),
}
MEASURED = {
    "lower": "l",
    "upper": "u",
    "kept_mass": "kept mass",
    "kl": "KL(p, q)",
}


def meta_gradient(
    loss: Callable[[Params, Params], jax.Array],
    held_out: Callable[[Params], jax.Array],
    student: Params,
    clip_network: Params,
) -> Params:
    """Gradient of the held-out loss after one small step of the student, per step size.

    d/dphi H(theta - eta g(theta, phi)) / eta = -d/dphi (v . g) + O(eta)

    with g = dL/dtheta and v = dH/dtheta. The mixed derivative of L is symmetric: v . g
    differentiated by phi is dL/dphi differentiated in the direction v of theta, one
    forward-mode derivative of the network's gradient.
    """
    direction = jax.grad(held_out)(student)

    def of_network(student: Params) -> Params:
        return jax.grad(loss, argnums=1)(student, clip_network)

    _, mixed = jax.jvp(of_network, (student,), (direction,))
    return jax.tree.map(jnp.negative, mixed)


class Experiment:
    """Models, data and optimizer of all runs; a run starts from the same student."""

    def __init__(self, workspace: Workspace, teacher: Path, start: Path, steps: int):
        self.teacher, self.teacher_params = load(teacher, workspace.mesh)
        self.student, self.start = load(start, workspace.mesh)
        self.steps, self.data = steps, workspace.data_config
        self.optimizer = make_optimizer(optimizer(3e-3, 1e-7), steps)
        self.tokenizer = workspace.tokenizer
        self.vocab_size = len(self.tokenizer)
        folder = workspace.data
        # The student's data are the first lines of the teacher's.
        lines = (folder / "teacher.jsonl").read_text().splitlines(keepends=True)
        seen = len((folder / "train.jsonl").read_text().splitlines())
        unseen = workspace.output / "unseen.jsonl"
        unseen.write_text("".join(lines[seen:]))
        self.rows = {
            "train": self._rows(folder / "train.jsonl", 32, seed=1),
            "unseen": self._rows(unseen, 32, seed=2),
            "valid": self._rows(folder / "valid.jsonl", 128, seed=3),
        }

    def _rows(self, path: Path, size: int, *, seed: int) -> Callable[[], Iterator]:
        rows, _ = dataset.load(path, self.tokenizer, self.data.encoding, chunker=None)
        width = [self.data.max_length]
        return lambda: train_batches(rows, size, widths=width, seed=seed)

    def logits(self, model: Model, params: Params, rows: Rows) -> jax.Array:
        """Logits of every position, [B, T, V]."""
        hidden, _ = model.forward(params, next_token_view(rows).inputs)
        return model.unembed(model.head_params(params), hidden)

    def loss(
        self, objective: Objective, rows: Rows, student: Params, clip_network: Params
    ) -> jax.Array:
        """The objective on `rows`, from all logits at once."""
        targets = make_targets(rows, position_weights(rows, objective), objective)
        total, _ = weighted_sum(
            clip_network,
            self.logits(self.student, student, rows),
            self.logits(self.teacher, self.teacher_params, rows),
            targets,
            objective,
            vocab_size=self.vocab_size,
        )
        return total

    def run(self, name: str, steps: list[int]) -> list[dict[str, object]]:
        """Train with one signal; measurements before the steps in `steps`."""
        size = min(OBJECTIVES[name].num_candidates, self.vocab_size)
        params = {
            STUDENT: self.start,
            CLIP_NETWORK: losses.init_clip_network(
                jax.random.key(0), num_candidates=size
            ),
        }
        state = self.optimizer.init(params)
        train, unseen = self.rows["train"](), self.rows["unseen"]()
        valid, found = next(self.rows["valid"]()), []
        for step in range(self.steps + 1):
            if step in steps:
                values = self.measure(params, valid)
                found.append({"signal": name, "step": step, **values})
            if step < self.steps:
                rows = next(train), next(unseen)
                params, state = self.step(params, state, *rows, name=name)
        return found

    @functools.partial(jax.jit, static_argnames=("self", "name"))
    def step(
        self, params: Params, state: optax.OptState, rows: Rows, unseen: Rows, name: str
    ) -> tuple[Params, optax.OptState]:
        """One update of both models."""
        loss = functools.partial(self.loss, OBJECTIVES[name], rows)
        both = params[STUDENT], params[CLIP_NETWORK]
        of_student, of_network = jax.grad(loss, argnums=(0, 1))(*both)
        if name == META:
            forward = Objective(sft=0.0, span=0.0, divergence="forward_kl")

            def held_out(student: Params) -> jax.Array:
                return self.loss(forward, unseen, student, both[1])

            of_network = meta_gradient(loss, held_out, *both)
        gradient = {STUDENT: of_student, CLIP_NETWORK: of_network}
        updates, state = self.optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    @functools.partial(jax.jit, static_argnames=("self",))
    def positions(self, params: Params, rows: Rows) -> dict[str, jax.Array]:
        """Limits, the teacher's entropy and the student's error at every position."""
        student = self.logits(self.student, params[STUDENT], rows)
        teacher = self.logits(self.teacher, self.teacher_params, rows)
        columns = {"vocab_size": self.vocab_size}
        out = losses.dac_kl(params[CLIP_NETWORK], student, teacher, **columns)
        return {
            "lower": out.lower,
            "upper": out.upper,
            "kept_mass": out.kept_mass,
            "entropy": losses.entropy(teacher, **columns),
            "kl": losses.forward_kl(student, teacher, **columns),
            "scored": next_token_view(rows).where,
        }

    def measure(self, params: Params, rows: Rows) -> dict[str, object]:
        """Mean and deviation of the measured values; correlations of the limits."""
        values = {
            name: np.asarray(value, np.float64)
            for name, value in self.positions(params, rows).items()
        }
        scored = values.pop("scored") > 0
        values = {name: value[scored] for name, value in values.items()}
        found: dict[str, object] = {
            name: (float(values[name].mean()), float(values[name].std()))
            for name in MEASURED
        }
        for limit in ("lower", "upper"):
            for other in ("entropy", "kl"):
                found[f"{limit}_{other}"] = correlation(values[limit], values[other])
        return found


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson's correlation; None where `x` has the same value at every position."""
    if x.std() < 1e-6:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def table(found: list[dict[str, object]]) -> str:
    """The measurements as Markdown."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    heads = ["signal", "step", *MEASURED.values()]
    heads += ["l, entropy", "l, KL", "u, entropy", "u, KL"]
    cells = []
    for row in found:
        pairs = (f"{row[name][0]:.3f} ± {row[name][1]:.3f}" for name in MEASURED)
        both = (f"{a}_{b}" for a in ("lower", "upper") for b in ("entropy", "kl"))
        cells.append(
            [row["signal"], str(row["step"]), *pairs, *(number(row[k]) for k in both)]
        )
    return markdown_table(heads, cells)


def main() -> None:
    """Train the teacher and the student, then measure every signal."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/dac_kl_signals"))
    parser.add_argument("--signals", nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--measure", type=int, nargs="+", default=[0, 50, 200])
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    console = Console()
    workspace = Workspace(arguments.output, console)
    teacher = workspace.train_teacher()
    start = arguments.output / "seed-0" / "start" / "student"
    if not start.exists():
        workspace.train_students(teacher, {}, seed=0)
    experiment = Experiment(workspace, teacher, start, arguments.steps)
    found = []
    for name in arguments.signals:
        found += experiment.run(name, arguments.measure)
        console.print(table(found[-len(arguments.measure) :]), markup=False)
        (arguments.output / "signals.json").write_text(json.dumps(found, indent=2))
        (arguments.output / "signals.md").write_text(table(found) + "\n")


if __name__ == "__main__":
    main()
