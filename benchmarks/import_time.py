"""What importing the losses costs beside importing jax: in turn, each in a new process.

Run it in an environment that has jax and jaxtyping alone to see what a user of the
losses gets. Ends with status 1 where the bound does not hold.

    python benchmarks/import_time.py
"""

import json
import statistics
import subprocess
import sys
import time

BOUND, PAIRS = 1.5, 9
HEAVY = ("flax", "optax", "orbax", "transformers", "datasets", "torch", "grain")


def seconds(module: str) -> float:
    """Of a process that imports `module` and nothing else."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def loaded() -> list[str]:
    """Packages of the trainer that importing the losses brings along; none is right."""
    code = f"import sys, mgsr_jax.losses; print(*(set(sys.modules) & set({HEAVY})))"
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.split()


def main() -> int:
    """Prints one JSON line."""
    seconds("mgsr_jax.losses")  # compiles what Python has not yet
    ratios = []
    for _ in range(PAIRS):
        of_jax = seconds("jax")
        ratios.append(seconds("mgsr_jax.losses") / of_jax)
    holds = statistics.median(ratios) < BOUND and not loaded()
    print(
        json.dumps(
            {
                "what": "import mgsr_jax.losses / import jax",
                "ratio": round(statistics.median(ratios), 3),
                "min": round(min(ratios), 3),
                "max": round(max(ratios), 3),
                "bound": BOUND,
                "loaded": loaded(),
                "holds": holds,
            }
        )
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
