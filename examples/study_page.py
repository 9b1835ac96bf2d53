"""Write docs/study.md and its figure from the results of study.py.

    python examples/study_page.py

A method with fewer than three seeds is named as missing and is in no table.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import small_runs
from jaxtyping import Float
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from study import RESULTS, Budget

from mgsr_jax.evaluation.tables import markdown_table

DOCS = Path(__file__).parents[1] / "docs"
MIN_SEEDS = 3
DRAWS = 2000


class Measure(NamedTuple):
    """A score that is known for every prompt, so that methods can be compared.

    Attributes:
      file: the scored file, a key of a result.
      field: the score; the same with `_by_prompt` holds its value for each prompt.
      head: its name.
    """

    file: str
    field: str
    head: str


@dataclasses.dataclass(frozen=True)
class TaskPage:
    """A task in the page.

    Attributes:
      name: of the task.
      title: heading.
      text: models, data and budget.
      measures: scores with intervals, the most important first.
      columns: (file, field, head, format) of all columns of scores.
    """

    name: str
    title: str
    text: str
    measures: Sequence[Measure]
    columns: Sequence[tuple[str, str, str, str]]


TOY_COLUMNS = (
    ("test", "greedy", "ROUGE-L greedy", ".1f"),
    ("test", "valid", "valid samples", ".1f"),
    ("test", "distinct_2", "distinct-2", ".3f"),
    ("test", "loss", "loss", ".3f"),
    ("test", "total_variation", "TV", ".4f"),
)
TOY_MEASURES = (
    Measure("test", "valid", "valid samples"),
    Measure("test", "greedy", "ROUGE-L greedy"),
)
TOY_TEXT = """Students of [Little English](../examples/little_english.py), a quarter of
their teacher's size, learn from {examples} examples after {warm} steps of SFT. A run
uses 500,000 tokens; batches of 32 rows."""

DOLLY_COLUMNS = (
    ("dolly", "greedy", "Dolly greedy", ".1f"),
    ("dolly", "sampled", "Dolly sampled", ".1f"),
    ("self_instruct", "sampled", "Self-Instruct", ".1f"),
    ("vicuna", "sampled", "Vicuna", ".1f"),
    ("s_ni", "sampled", "S-NI", ".1f"),
    ("dolly", "distinct_2", "distinct-2", ".3f"),
    ("dolly", "loss", "loss", ".3f"),
    ("dolly", "kl_on_student", "KL, own text", ".3f"),
    ("dolly", "kl_on_teacher", "KL, teacher's text", ".3f"),
    ("dolly", "tv_on_student", "TV, own text", ".3f"),
    ("dolly", "tv_on_teacher", "TV, teacher's text", ".3f"),
    ("dolly", "ex_acc_err", "ExAccErr", ".1f"),
)
DOLLY_MEASURES = (
    Measure("dolly", "sampled", "ROUGE-L sampled"),
    Measure("dolly", "greedy", "ROUGE-L greedy"),
)
DOLLY_TEXT = """The teacher is an instruction model after SFT on Dolly, the student some
of its layers, warmed up by SFT and forward KL (examples/study_dolly.py). Rows of at
most 64 + 64 tokens; ROUGE-L (F1 x 100) on the first 100 prompts of each file, samples
at temperature 1."""

TASKS = (
    *(
        TaskPage(
            f"toy-{examples}",
            f"Toy language, {examples:,} examples",
            TOY_TEXT.format(examples=f"{examples:,}", warm=233),
            TOY_MEASURES,
            TOY_COLUMNS,
        )
        for examples in (1000, 8000)
    ),
    TaskPage("dolly", "Real text: Dolly", DOLLY_TEXT, DOLLY_MEASURES, DOLLY_COLUMNS),
)

BUDGETS: Sequence[tuple[Budget, str | None]] = (
    ("tokens", None),
    ("seconds", "### The same time instead"),
)

QUESTIONS = (
    ("Does SCRG beat plain rollouts?", "SCRG argmax", "none"),
    ("Does it beat a correction at a random position?", "SCRG argmax", "SCRG random"),
    ("Is the first error better than the worst?", "SCRG first", "SCRG argmax"),
    ("Is an early error better than the worst?", "SCRG early", "SCRG argmax"),
    ("Does truncation beat whole rollouts?", "truncate", "none"),
    ("Does SCRG beat truncation?", "SCRG argmax", "truncate"),
    ("Does SKD beat SCRG?", "SKD", "SCRG argmax"),
    ("Does AdaSwitch beat SCRG?", "AdaSwitch", "SCRG argmax"),
    ("Do plain rollouts beat the data's text?", "none", "KD"),
    ("Does MGSR beat KD?", "MGSR", "KD"),
    ("Does MGSR beat GKD?", "MGSR", "GKD"),
    ("Does MGSR beat OPD?", "MGSR", "OPD"),
    ("Does MGSR beat SFT?", "MGSR", "SFT"),
    ("Within MGSR: does DAC-KL beat forward KL?", "MGSR", "MGSR, forward KL"),
    ("Do learned limits beat fixed ones?", "MGSR", "MGSR, fixed limits"),
    ("Does a sharper teacher do as well?", "MGSR", "MGSR, sharpened KL"),
    ("Is fidelity the better signal?", "MGSR, fidelity", "MGSR"),
    ("Is the unnormalised loss the better signal?", "MGSR, unnormalised", "MGSR"),
    ("Does the span term help?", "MGSR", "MGSR, no span"),
    ("Does SCRG help?", "MGSR", "MGSR, no SCRG"),
    ("Do rollouts help?", "MGSR", "MGSR, no rollouts"),
)
"""Question, and the two methods that answer it."""

HEAD = """# Does it work?

Methods at equal work, trained by [study.py](../examples/study.py) and written here by
[study_page.py](../examples/study_page.py): `make study` trains what is missing,
`make study-table` writes this page.

Work is the tokens that the student generates, those that are cut away again included,
plus the tokens that the teacher reads, prompts included. SFT has no teacher and makes
as many steps as KD. Every method of a seed starts from the same student and stops at
the same work. Each method's learning rate is the best of a few for seed 0 on the
validation file; the scores are those of the test file. SFT, KD, GKD, DistiLLM, ABKD,
OPD and MGSR are the [recipes](training.md). "none", SCRG, SKD, AdaSwitch and
"truncate" train by forward KL on the student's own responses in every step, and differ
only in what happens to a response.

Numbers are mean ± standard deviation over the seeds. A difference is paired over seeds
and prompts; its 95 % interval is a bootstrap over both ({draws:,} draws).
"""


@functools.cache
def results(task: str) -> tuple[dict[str, Any], ...]:
    """All results of a task."""
    files = sorted((RESULTS / task).glob("*seed*.json"))
    return tuple(json.loads(file.read_text(encoding="utf-8")) for file in files)


def by_method(task: str, budget: Budget = "tokens") -> dict[str, list[dict[str, Any]]]:
    """The results of each method at its best rate, in the order of their seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for result in results(task):
        if result["budget"] == budget:
            found.setdefault(result["method"], []).append(result)
    for method, runs in found.items():
        sweep = [run for run in runs if run["seed"] == 0] or runs
        best = max(sweep, key=lambda run: run["valid"]["rank"])["rate"]
        chosen = [run for run in runs if run["rate"] == best]
        found[method] = sorted(chosen, key=lambda run: run["seed"])
    return found


class Difference(NamedTuple):
    """A paired difference of two methods, with its interval."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """True if the interval does not contain 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        text = f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"
        return f"**{text}**" if self.is_clear else text


def difference(
    first: Float[np.ndarray, "S N"], second: Float[np.ndarray, "S N"]
) -> Difference:
    """Mean of first - second, with a 95 % bootstrap interval over seeds and prompts.

    Args:
      first, second: a score for each seed and prompt; the same seeds and prompts.

    >>> difference(np.array([[2.0, 2.0], [2.0, 2.0]]), np.ones((2, 2)))
    Difference(mean=1.0, low=1.0, high=1.0)
    """
    gaps, draw = first - second, np.random.default_rng(0)
    seeds, prompts = gaps.shape
    means = [
        gaps[draw.integers(seeds, size=seeds)][
            :, draw.integers(prompts, size=prompts)
        ].mean()
        for _ in range(DRAWS)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(gaps.mean()), float(low), float(high))


def compare(
    runs: dict[str, list[dict[str, Any]]], pair: tuple[str, str], measure: Measure
) -> Difference | None:
    """The difference of two methods over their common seeds; None for too few."""
    values = [
        {run["seed"]: run[measure.file][f"{measure.field}_by_prompt"] for run in own}
        for own in (runs.get(name, []) for name in pair)
    ]
    seeds = sorted(set(values[0]) & set(values[1]))
    if len(seeds) < MIN_SEEDS:
        return None
    first, second = (np.array([own[seed] for seed in seeds]) for own in values)
    return difference(first, second)


def score_table(page: TaskPage, runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each method: its scores and its work."""
    heads = [head for *_, head, _ in page.columns]
    rows = []
    for method, own in runs.items():
        scores = [
            small_runs.cell([run[file][field] for run in own], form)
            for file, field, _, form in page.columns
        ]
        work = [
            f"{np.mean([run['work'][name] for run in own]) / scale:.0f}"
            for name, scale in (("generated", 1000), ("scored", 1000), ("seconds", 1))
        ]
        rows.append([method, *scores, *work, f"{own[0]['rate']:g}", str(len(own))])
    ends = ["k tokens generated", "k tokens read", "seconds", "rate", "seeds"]
    return markdown_table(["method", *heads, *ends], rows)


def answers(page: TaskPage, runs: dict[str, list[dict[str, Any]]]) -> str:
    """A row for each question whose two methods have enough seeds."""
    rows = []
    for question, *pair in QUESTIONS:
        found = [compare(runs, (pair[0], pair[1]), m) for m in page.measures]
        if None not in found:
            rows.append([question, " - ".join(pair), *map(str, found)])
    heads = [measure.head for measure in page.measures]
    return markdown_table(["question", "difference", *heads], rows) if rows else ""


def sections(page: TaskPage) -> Iterator[str]:
    """The paragraphs of a task."""
    yield f"## {page.title}"
    yield page.text
    for budget, title in BUDGETS:
        runs = by_method(page.name, budget)
        whole = {name: own for name, own in runs.items() if len(own) >= MIN_SEEDS}
        missing = sorted(set(runs) - set(whole))
        if whole and title:
            yield title
        if whole:
            yield score_table(page, whole)
            table = answers(page, whole)
            yield table and f"Bold: the interval does not contain 0.\n\n{table}"
            if budget == "tokens":
                draw(page, whole)
                yield f"![Scores of all methods]({page.name}.png)"
        if missing:
            yield f"Not complete, fewer than {MIN_SEEDS} seeds: {', '.join(missing)}."


def draw(page: TaskPage, runs: dict[str, list[dict[str, Any]]]) -> None:
    """A figure of the first measure: a point for each seed, a bar for their mean."""
    measure = page.measures[0]
    values = {
        name: [run[measure.file][measure.field] for run in own]
        for name, own in runs.items()
    }
    names = sorted(values, key=lambda name: float(np.mean(values[name])))
    figure = Figure(figsize=(7, 0.6 + 0.28 * len(names)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for i, name in enumerate(names):
        axes.plot(
            values[name], [i] * len(values[name]), "o", color="#0072B2", alpha=0.4
        )
        axes.plot(
            np.mean(values[name]), i, "|", color="#D55E00", markersize=14, mew=2.5
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel(f"{measure.head}, %: seeds and their mean")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(DOCS / f"{page.name}.png", dpi=120)


def study_page() -> str:
    """Content of docs/study.md."""
    parts = [HEAD.format(draws=DRAWS).rstrip()]
    for page in TASKS:
        if results(page.name):
            parts += [part for part in sections(page) if part]
        else:
            parts.append(f"## {page.title}\n\nNot run yet.")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (DOCS / "study.md").write_text(study_page(), encoding="utf-8")
