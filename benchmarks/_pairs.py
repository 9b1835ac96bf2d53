"""A peer and this project in turn, each a process of its own; a bound on their ratio.

One machine gives the same program other speeds within minutes, so a time alone says
little: every pair is one repetition of each side, right after one another, and the
median of the pairs' ratios is what is held against a bound. torch and JAX in one
process would fight for the cores, and a process has one peak of memory; so a script of
this folder is its own sides too, and runs itself again as each of them (`_side.py`).
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

# On the CPU, which the bounds are about; without a network; nothing compiled before.
# JAX reads this when it is imported: a script that does so imports this file first.
os.environ |= {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_DISABLED": "true",
}


class Bound(NamedTuple):
    """What is claimed.

    Attributes:
      id: its name in the table.
      what: the ratio in words, with the sizes.
      number: the claim itself.
      at_least: whether the ratio must reach the number, or stay below it.
    """

    id: str
    what: str
    number: float
    at_least: bool = False

    def verdict(self, ratios: Sequence[float], **beside: Any) -> Answer:
        """The record of measured ratios, which hold or do not; `beside` goes with it.

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
            **beside,
        }


class Side:
    """A process that does what it is asked for, one action after the other.

    Args:
      name: which side of the script that is running.
      options: the script's own, and a folder that all sides share.
    """

    def __init__(self, name: str, options: Options):
        self._name, self._log = name, tempfile.TemporaryFile(mode="w+")
        itself = [sys.executable, *sys.argv, "--side", name]
        self._process = subprocess.Popen(
            [*itself, "--shared", options.shared],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        say(f"{name}: starting")
        self.ready = self._answer()

    def __call__(self, action: str) -> Answer:
        """Does `action` once; the answer has its seconds and whatever it returned."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(action + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer, which does not come, tells why
        return self._answer()

    def close(self) -> None:
        """Ends the process; it hears of it at its next wait."""
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
        sys.exit(f"{tail}\nthe side {self._name!r} ended with status {status}")


class Sides:
    """Starts sides, each once, and ends them."""

    def __init__(self, options: Options):
        self._options, self._open = options, {}

    def __call__(self, name: str) -> Side:
        """The side of that name, ready."""
        if name not in self._open:
            self._open[name] = Side(name, self._options)
        return self._open[name]

    def close(self, name: str | None = None) -> None:
        """Ends one of them, or all."""
        for each in [name] if name else list(self._open):
            self._open.pop(each).close()


def alternate(
    pairs: int, runs: Mapping[str, Callable[[], Answer]], *, warm: int = 1
) -> list[dict[str, Answer]]:
    """Every run once in turn, `pairs` times; before that `warm` times, not counted."""
    rounds = []
    for number in range(1 - warm, pairs + 1):
        answers = {}
        for name, run in runs.items():
            answers[name] = run()
            which = f"pair {number} of {pairs}" if number > 0 else "warm-up"
            say(f"{which}: {name} {spent(answers[name])}")
        rounds.append(answers)
    return rounds[warm:]


def ratios(
    rounds: Sequence[Mapping[str, Answer]], above: str, below: str, key: str = "seconds"
) -> list[float]:
    """`key` of the run `above` over that of `below`, of every round."""
    return [each[above][key] / each[below][key] for each in rounds]


def medians(rounds: Sequence[Mapping[str, Answer]], key: str) -> dict[str, float]:
    """Of each run alone, for the record."""
    return {
        name: round(statistics.median(each[name][key] for each in rounds), 3)
        for name in rounds[0]
    }


def times(rounds: Sequence[Mapping[str, Answer]]) -> Answer:
    """Seconds of each run, and the share of the machine that other programs had."""
    others = statistics.median(x["others"] for each in rounds for x in each.values())
    return {"seconds": medians(rounds, "seconds"), "others": round(others, 3)}


def timed(run: Callable[[], Any]) -> Callable[[], Answer]:
    """`run` in this process, as a run of `alternate`."""

    def answer() -> Answer:
        clock = Clock()
        run()
        return clock.read()

    return answer


def require_close(what: str, ours: float, theirs: float, relative: float) -> None:
    """Ends the benchmark where two sides do not compute the same."""
    if not abs(ours - theirs) <= relative * abs(theirs):
        sys.exit(f"{what}: ours {ours:.8g}, theirs {theirs:.8g}; not the same work")
    say(f"checked: {what} ours {ours:.8g}, theirs {theirs:.8g}")


def spent(answer: Answer) -> str:
    """How long, and where that was not all its own doing."""
    others = answer["others"]
    busy = f", {others:.0%} of the machine was others'" if others > 0.05 else ""
    return f"{answer['seconds']:.2f} s{busy}"


def say(text: str) -> None:
    """Progress; standard output is for the records."""
    print(text, file=sys.stderr, flush=True)


def main(
    doc: str | None,
    compare: Callable[[Options, Sides], Iterator[Answer]],
    sides: Mapping[str, SideOf] | None = None,
    add_options: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> int:
    """The command line of a script: a JSON line for each bound, 1 if one fails.

    `compare(options, sides)` yields the records; `sides` has what each process runs.
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
        help="tiny models: shows in seconds that everything runs, and measures nothing",
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
