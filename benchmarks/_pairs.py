"""Run two sides in turn, each in its own process, and compare their ratio to a bound.

The same program runs at different speeds on one machine within minutes, so a time by
itself means little. A pair is one repetition of each side, one right after the other,
and the median of the pairs' ratios is compared with the bound. torch and JAX in one
process would compete for the cores, and a process has only one memory peak. Therefore a
script of this folder starts itself again for each side (`_side.py`).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from _clock import Clock

Answer = dict[str, Any]
Options = argparse.Namespace
SideOf = Callable[[Options], None]

# The bounds are about the CPU, without a network and without a compilation cache. JAX
# reads these variables when it is imported, so a script imports this file first.
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
}


class Bound(NamedTuple):
    """A claim about a ratio.

    Attributes:
      id: name in the table.
      what: the ratio in words, with the sizes.
      number: the bound.
      at_least: True: the ratio must be at least `number`; False: at most.
    """

    id: str
    what: str
    number: float
    at_least: bool = False

    def verdict(self, ratios: Sequence[float], **details: object) -> Answer:
        """Record of the measured ratios and whether the bound holds, with `details`.

        >>> Bound("P0", "a / b", 2.0, at_least=True).verdict([3.0, 1.0, 2.5])["holds"]
        True
        """
        ratio = statistics.median(ratios)
        return {
            "id": self.id,
            "what": self.what,
            "ratio": round(ratio, 4),
            "min": round(min(ratios), 4),
            "max": round(max(ratios), 4),
            "bound": self.number,
            "at": "least" if self.at_least else "most",
            "holds": ratio >= self.number if self.at_least else ratio <= self.number,
            "pairs": len(ratios),
            **details,
        }


class Side:
    """A process of one side, which runs one action after the other.

    Args:
      name: name of the side in the script.
      options: options of the script, and the folder that all sides share.
    """

    def __init__(self, name: str, options: Options):
        self._name, self._log = name, tempfile.TemporaryFile(mode="w+")
        script = [sys.executable, *sys.argv, "--side", name]
        self._process = subprocess.Popen(
            [*script, "--shared", options.shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        report(f"{name}: starting")
        self.ready = self._answer()

    def __call__(self, action: str) -> Answer:
        """Run `action` once; the answer has its seconds and its return values."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(action + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer reports why the process ended
        return self._answer()

    def close(self) -> None:
        """End the process, by the end of its input."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _answer(self) -> Answer:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._log.seek(0)
        tail = "".join(self._log.readlines()[-30:])
        status = self._process.wait()
        sys.exit(f"{tail}\nside {self._name!r} ended with status {status}")


class Sides:
    """All sides of a script; each is started once."""

    def __init__(self, options: Options):
        self._options, self._open = options, {}

    def __call__(self, name: str) -> Side:
        """The side `name`, started if necessary."""
        if name not in self._open:
            self._open[name] = Side(name, self._options)
        return self._open[name]

    def close(self, name: str | None = None) -> None:
        """End the side `name`, or all sides."""
        for side in [name] if name else list(self._open):
            self._open.pop(side).close()


def alternate(
    pairs: int, runs: Mapping[str, Callable[[], Answer]], *, warm: int = 1
) -> list[dict[str, Answer]]:
    """Do every run in turn, `pairs` times, after `warm` times that are not counted."""
    rounds = []
    for number in range(1 - warm, pairs + 1):
        answers = {}
        for name, run in runs.items():
            answers[name] = run()
            which = f"pair {number} of {pairs}" if number > 0 else "warm-up"
            report(f"{which}: {name} {spent(answers[name])}")
        rounds.append(answers)
    return rounds[warm:]


def ratios(
    rounds: Sequence[Mapping[str, Answer]], above: str, below: str, key: str = "seconds"
) -> list[float]:
    """`key` of the run `above` divided by that of the run `below`, for every round."""
    return [answers[above][key] / answers[below][key] for answers in rounds]


def medians(rounds: Sequence[Mapping[str, Answer]], key: str) -> dict[str, float]:
    """Median of `key` for each run."""
    return {
        name: round(statistics.median(answers[name][key] for answers in rounds), 3)
        for name in rounds[0]
    }


def times(rounds: Sequence[Mapping[str, Answer]]) -> Answer:
    """Seconds of each run, and the share of the machine that other programs used."""
    shares = [answer["others"] for answers in rounds for answer in answers.values()]
    others = statistics.median(shares)
    return {"seconds": medians(rounds, "seconds"), "others": round(others, 3)}


def timed(run: Callable[[], object]) -> Callable[[], Answer]:
    """Wrap `run`, which runs in this process, as a run of `alternate`."""

    def answer() -> Answer:
        clock = Clock()
        run()
        return clock.read()

    return answer


def require_close(what: str, ours: float, theirs: float, relative: float) -> None:
    """End the benchmark if the two sides do not compute the same."""
    if not abs(ours - theirs) <= relative * abs(theirs):
        sys.exit(f"{what}: ours {ours:.8g}, theirs {theirs:.8g}; not the same work")
    report(f"checked: {what} ours {ours:.8g}, theirs {theirs:.8g}")


def spent(answer: Answer) -> str:
    """Seconds as text, and the share of other programs if it is large."""
    others = answer["others"]
    busy = f", {others:.0%} of the machine used by others" if others > 0.05 else ""
    return f"{answer['seconds']:.2f} s{busy}"


def report(text: str) -> None:
    """Print progress to stderr; stdout is for the records."""
    print(text, file=sys.stderr, flush=True)


def main(
    doc: str | None,
    compare: Callable[[Options, Sides], Iterator[Answer]],
    sides: Mapping[str, SideOf] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """Run a script: print a JSON line per bound; return 1 if a bound does not hold.

    `compare(options, sides)` yields the records. `sides` maps names of sides to what
    their processes run.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", type=int, default=5, help="repetitions of each side (default 5)"
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="tiny models: checks in seconds that everything runs, measures nothing",
    )
    add_options(parser)
    parser.add_argument("--side", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--shared", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pairs < 1:
        parser.error(f"--pairs {options.pairs}; expected at least 1")
    if sides and options.side:
        sides[options.side](options)
        return 0
    held = True
    with tempfile.TemporaryDirectory(prefix="mgsr-bench-") as options.shared:
        started = Sides(options)
        for record in compare(options, started):
            record |= {"tiny": True} if options.tiny else {}
            print(json.dumps(record), flush=True)
            held &= record["holds"]
        started.close()
    return 0 if held else 1
