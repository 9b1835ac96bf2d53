"""What importing the losses costs beside importing jax: in turn, each in a new process.

Run it in an environment that has jax and jaxtyping alone to see what a user of the
losses gets. Packages of the trainer that come along are named, and then it fails too.

    python benchmarks/import_time.py
"""

import functools
import subprocess
import sys
from typing import Any

import _pairs
from _pairs import Bound, Options, Sides

BOUND = Bound("import", "seconds to import: mgsr_jax.losses / jax", 1.5)
HEAVY = ("flax", "optax", "orbax", "transformers", "datasets", "torch", "grain")


def python(code: str) -> str:
    """What a new process prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def compare(options: Options, start: Sides) -> Any:
    """One record."""
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
