"""Run every script that has a bound, and write RESULTS.md in this folder.

RESULTS.md has the table of ratios, the machine, the versions and the date. The exit
status is 1 if a bound does not hold or a script fails; the table is written anyway. Run
nothing else on the machine meanwhile.

    make bench                                  # about an hour on two CPU cores
    python benchmarks/run.py --only P2 P5       # print the table, write no file
    python benchmarks/run.py --tiny --pairs 1   # check that all run, write no file
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
    """Records that a script printed, by id; a script that failed may lack some."""
    command = [sys.executable, HERE / script, *arguments]
    print(f"== {script}", file=sys.stderr, flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        records = [json.loads(line) for line in process.stdout]
    return {record["id"]: record for record in records}


def table(records: dict[str, Any]) -> str:
    """A table with one row per bound, and a table of the values behind each ratio."""
    lines = [
        "| id | what | ratio, median | min-max | bound | holds |",
        "| --- | --- | --: | --- | --- | --- |",
    ]
    values = ["| id | pairs | medians and other values |", "| --- | --: | --- |"]
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
        details = {key: x for key, x in record.items() if key not in SHOWN}
        text = "; ".join(
            f"{key.replace('_', ' ')}: {_plain(x)}" for key, x in details.items()
        )
        values.append(f"| {name} | {record['pairs']} | {text} |")
    return "\n".join([*lines, "", *values])


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {x}" for key, x in value.items())
    return str(value)


def page(records: dict[str, Any]) -> str:
    """Content of RESULTS.md."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in PACKAGES
    )
    return f"""# Results

Written by `make bench`; run it again to repeat the measurement. Each script of this
folder, such as `python benchmarks/decode.py`, also runs by itself, and its `--help`
explains it.

{table(records)}

One pair is one repetition of each side, one right after the other, each in its own
process after a warm-up. The ratio is the median over the pairs. P3 and P7ours compare
this project with itself in one process. Memory plans (P2, P3, P4) are XLA's, without
the gradients, and are the same in every pair. P8 has no other side: the ratio is the
number itself, and every repetition compiles again. "Others" is the share of the
machine's time that other programs used; a measurement with a large share means little.

- Machine: {machine()}
- Versions: Python {platform.python_version()}, {versions}; mgsr_jax at {commit()}
- Date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d}
"""


def machine() -> str:
    """Model and instruction sets of the CPU, usable cores, memory."""
    cpu = _field("/proc/cpuinfo", "model name")
    flags = _field("/proc/cpuinfo", "flags").split()
    vectors = [name for name in ("avx2", "avx512f", "amx_bf16") if name in flags]
    gib = int(_field("/proc/meminfo", "MemTotal").split()[0]) / 2**20
    cores = len(os.sched_getaffinity(0))
    return f"{cpu} ({', '.join(vectors)}), {cores} cores, {gib:.0f} GiB"


def commit() -> str:
    """Short hash of the commit, and whether code has uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(HERE), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "../mgsr_jax", "*.py")
    return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")


def _field(file: str, name: str) -> str:
    """The first value of `name` in a file under /proc."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return "unknown"


def main() -> int:
    """Run all scripts, or those that `--only` names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pairs", default="5", help="repetitions of each comparison (default 5)"
    )
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
