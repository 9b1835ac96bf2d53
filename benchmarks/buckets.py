"""Time an epoch of distillation steps with length buckets and without.

Examples are about as long as Dolly's: log-normal, median 137 tokens, a seventh longer
than 288, none longer than 512. Both sides see the same examples, each in its own order
of batches. Whole epochs are timed in turn, after compilation. The median of the ratios
is printed.

    python benchmarks/buckets.py        # about six minutes on two CPU cores
"""

import argparse
import statistics
import time
from collections.abc import Iterable
from typing import Any

import datasets
import jax
import numpy as np

from mgsr_jax import models, sharding
from mgsr_jax.data.batches import train_batches
from mgsr_jax.objective import Objective
from mgsr_jax.rows import Rows
from mgsr_jax.train_step import init_state, make_train_step
from mgsr_jax.training.optimizer import OptimizerConfig, make_optimizer

LONGEST, BUCKETS = 512, (128, 256)
BATCH, STEPS, VOCABULARY = 8, 16, 8192
SHAPE = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_attention_heads": 8,
    "max_position_embeddings": LONGEST,
}


def examples() -> datasets.Dataset:
    """The examples of an epoch, with responses of random tokens."""
    rng = np.random.default_rng(0)
    sizes = np.exp(
        rng.normal(np.log(129), np.log(288 / 129) / 1.2816, 4 * BATCH * STEPS)
    )
    sizes = sizes[(sizes >= 20) & (sizes <= LONGEST)][: BATCH * STEPS].astype(int)
    rows = [rng.integers(2, VOCABULARY, size).tolist() for size in sizes]
    return datasets.Dataset.from_dict(
        {
            "prompt": [row[:10] for row in rows],
            "response": [row[10:] for row in rows],
            "span_ids": [[-1] * (len(row) - 10) for row in rows],
        }
    )


class Side:
    """A student that trains on rows of the given widths."""

    def __init__(self, dataset: datasets.Dataset, widths: tuple[int, ...]):
        self.mesh, self.dataset, self.widths = sharding.make_mesh(), dataset, widths
        student = models.from_config(SHAPE | {"num_hidden_layers": 4})
        teacher = models.from_config(SHAPE | {"num_hidden_layers": 8})
        optimizer = make_optimizer(OptimizerConfig(), 1000)
        objective = Objective(span=0.0, divergence="dac_kl_fixed")
        self.step = make_train_step(student, teacher, optimizer, objective)
        self.teacher_params = teacher.init(jax.random.key(1))
        params = {"student": student.init(jax.random.key(0))}
        self.state = init_state(params, optimizer, seed=0)

    def batches(self) -> Iterable[Rows]:
        """Batches of one epoch, the same every time."""
        settings: Any = dict(widths=self.widths, seed=0, epochs=1)
        return train_batches(self.dataset, BATCH, **settings)

    def epoch(self) -> float:
        """Seconds for all steps of an epoch, making their rows included."""
        began = time.perf_counter()
        for host_rows in self.batches():
            rows = (sharding.put_batch(self.mesh, host_rows),)
            self.state, _ = self.step(self.state, self.teacher_params, rows)
        jax.block_until_ready(self.state)
        return time.perf_counter() - began


def main() -> None:
    """Print the seconds of every epoch and the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3, help="epochs of each side")
    pairs = parser.parse_args().pairs
    dataset = examples()
    sides = {
        "one width": Side(dataset, (LONGEST,)),
        "buckets": Side(dataset, (*BUCKETS, LONGEST)),
    }
    for name, side in sides.items():
        shapes = [rows.tokens.shape for rows in side.batches()]
        padded = sum(height * width for height, width in shapes)
        print(f"{name}: {padded} positions in {len(shapes)} batches")
        side.epoch()  # compiles
    rounds = [
        {name: side.epoch() for name, side in sides.items()} for _ in range(pairs)
    ]
    ratios = [times["one width"] / times["buckets"] for times in rounds]
    for times in rounds:
        print({name: round(seconds, 2) for name, seconds in times.items()})
    print(f"buckets {BUCKETS}: {statistics.median(ratios):.2f} x as fast as one width")


if __name__ == "__main__":
    main()
