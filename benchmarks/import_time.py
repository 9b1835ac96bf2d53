"""Time importing the losses against importing jax, each in a new process, in turn.

To measure what a user of the losses sees, run it in an environment that has only jax
and jaxtyping. If packages of the trainer are imported too, it names them and fails.

    python benchmarks/import_time.py
"""

import functools
import subprocess
import sys
from collections.abc import Iterator

import _pairs
from _pairs import Answer, Bound, Options, Sides

BOUND = Bound("import", "seconds to import: mgsr_jax.losses / jax", 1.5)
HEAVY = ("flax", "optax", "orbax", "transformers", "datasets", "torch", "grain")


def python(code: str) -> str:
    """Output of a new Python process."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """One record of the ratio and of heavy packages that were imported."""
    del start
    heavy = f"import sys, mgsr_jax.losses; print(*(set(sys.modules) & set({HEAVY})))"
    loaded = python(heavy).split()
    runs = {
        module: _pairs.timed(functools.partial(python, f"import {module}"))
        for module in ("jax", "mgsr_jax.losses")
    }
    rounds = _pairs.alternate(options.pairs, runs)
    record = BOUND.verdict(_pairs.ratios(rounds, "mgsr_jax.losses", "jax"))
    yield record | {"loaded": loaded, "holds": record["holds"] and not loaded}


if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare))
