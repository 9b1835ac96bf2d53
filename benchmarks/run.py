"""Runs every script that has a bound, and writes RESULTS.md beside this file.

The table says what was measured, the lines under it on which machine, with which
versions and when. Ends with status 1 where a bound does not hold or a script fails; the
table is written all the same. The machine should have nothing else to do.

    make bench                                  # an hour or so on two CPU cores
    python benchmarks/run.py --only P2 P5       # shows the table, writes no file
    python benchmarks/run.py --tiny --pairs 1   # does everything run? the same
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SCRIPTS = {
    "decode.py": ("P1a", "P1b", "P1c"),
    "forward_kl.py": ("P2memory", "P2time"),
    "revision_loss.py": ("P3memory", "P3time", "P4"),
    "offline_step.py": ("P5speed", "P5memory"),
    "onpolicy_step.py": ("P6a", "P6b"),
    "scrg_step.py": ("P7ours", "P7trl"),
    "compilation.py": ("P8recompile", "P8decode", "P8step"),
}
PACKAGES = ("jax", "jaxlib", "optax", "flax", "torch", "transformers", "trl")
SHOWN = ("id", "what", "ratio", "min", "max", "bound", "at", "holds", "pairs")


def records_of(script: str, arguments: list[str]) -> dict[str, Any]:
    """What a script printed, by id; some may be missing where it failed."""
    command = [sys.executable, HERE / script, *arguments]
    print(f"== {script}", file=sys.stderr, flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = [json.loads(line) for line in process.stdout]
    return {record["id"]: record for record in found}


def table(records: dict[str, Any]) -> str:
    """One row a bound, then what is behind each of the ratios."""
    lines = [
        "| id | what | ratio, median | min-max | bound | holds |",
        "| --- | --- | --: | --- | --- | --- |",
    ]
    behind = ["| id | pairs | medians and other findings |", "| --- | --: | --- |"]
    for name, record in records.items():
        if record is None:
            lines.append(f"| {name} | not measured: the script failed | | | | no |")
            continue
        sign = ">=" if record["at"] == "least" else "<="
        cells = (
            name,
            record["what"],
            f"{record['ratio']:g}",
            f"{record['min']:g}-{record['max']:g}",
            f"{sign} {record['bound']:g}",
            "yes" if record["holds"] else "**no**",
        )
        lines.append(f"| {' | '.join(cells)} |")
        beside = {key: x for key, x in record.items() if key not in SHOWN}
        text = "; ".join(
            f"{key.replace('_', ' ')}: {_plain(x)}" for key, x in beside.items()
        )
        behind.append(f"| {name} | {record['pairs']} | {text} |")
    return "\n".join([*lines, "", *behind])


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {x}" for key, x in value.items())
    return str(value)


def page(records: dict[str, Any]) -> str:
    """RESULTS.md."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in PACKAGES
    )
    return f"""# Results

Written by `make bench`, which repeats it; `python benchmarks/decode.py` and the other
scripts of this folder run alone too, and `--help` says what each of them does.

{table(records)}

One pair is one repetition of each side, right after one another, each in a process of
its own that has warmed up; the ratio is the median over the pairs. P3 and P7ours
compare this project with itself, in one process. Memory plans (P2, P3, P4) are XLA's
own, the gradients not included, and are the same in every pair. P8 has no other side:
the number itself stands for the ratio, and every repetition compiles anew. "Others" is
the share of the machine's time that other programs had: what was measured beside much
of that is not worth much.

- Machine: {machine()}
- Versions: Python {platform.python_version()}, {versions}; mgsr_jax at {commit()}
- Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}
"""


def machine() -> str:
    """CPU, what of it may be used, memory."""
    cpu = _field("/proc/cpuinfo", "model name")
    flags = _field("/proc/cpuinfo", "flags").split()
    vectors = [name for name in ("avx2", "avx512f", "amx_bf16") if name in flags]
    gib = int(_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20
    cores = len(os.sched_getaffinity(0))
    return f"{cpu} ({', '.join(vectors)}), {cores} cores, {gib:.0f} GiB"


def commit() -> str:
    """Of the repository, and whether it has changes beside this page."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../mgsr_jax", "*.py")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def _field(file: str, name: str) -> str:
    """The first value of that name in one of Linux's tables."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def main() -> int:
    """All of them, or those that are asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", default="5", help="of each comparison (default 5)")
    parser.add_argument("--tiny", action="store_true", help="tiny models")
    parser.add_argument(
        "--only", nargs="+", metavar="ID", help="beginnings of ids, such as P1 P5"
    )
    options = parser.parse_args()
    arguments = ["--pairs", options.pairs] + ["--tiny"] * options.tiny
    records: dict[str, Any] = {}
    for script, ids in SCRIPTS.items():
        wanted = tuple(options.only or ids)
        if any(name.startswith(wanted) for name in ids):
            records |= dict.fromkeys(ids) | records_of(script, arguments)
    if options.tiny or options.only:
        print(table(records))
    else:
        (HERE / "RESULTS.md").write_text(page(records), encoding="utf-8")
        print(page(records))
    return 0 if all(record and record["holds"] for record in records.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
