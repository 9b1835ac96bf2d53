"""What `chunked` saves, and what it costs: memory plan and time against the dense form.

Both sides are value and gradient (head, clip network, hidden states) of the same losses
from the same hidden states; the dense side is what a trainer does without `chunked`:
logits of all tokens at once. That they agree is checked first. Memory is XLA's own plan
(`memory_analysis().temp_size_in_bytes`), the gradients not included; time is taken in
alternating pairs, of which the median ratio counts.

    python benchmarks/loss_memory.py            # about 15 minutes on two CPU cores
    python benchmarks/loss_memory.py --pairs 0  # the plans alone, in a minute
"""

import argparse
import functools
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgsr_jax import losses

STUDENT_WIDTH, TEACHER_WIDTH = 384, 768
VOCABULARIES = (50_257, 151_936)
MEMORY_BOUND, TIME_BOUND = 0.05, 1.0
FITS = 0.8  # of the machine's free memory, for the dense form to be run


def forward_kl(shared: Any, hidden: Any, aux: Any, own: Any) -> Any:
    """The plain distillation loss."""
    student, teacher = _logits(shared, hidden, aux)
    where = aux["where"] & own
    return jnp.sum(aux["weights"] * losses.forward_kl(student, teacher, where=where))


def mgsr(shared: Any, hidden: Any, aux: Any, own: Any) -> Any:
    """Cross-entropy, DAC-KL and span correlation."""
    student, teacher = _logits(shared, hidden, aux)
    where = aux["where"] & own
    values = losses.cross_entropy(student, aux["labels"], where=where)
    values += losses.dac_kl(shared["clip_network"], student, teacher, where=where).loss
    values += losses.span_correlation(
        student, teacher, aux["span_ids"], where=aux["where"]
    )
    return jnp.sum(aux["weights"] * values)


# With the tokens a chunk that the memory bound has room for.
LOSSES = {"forward KL": (forward_kl, 64), "CE + DAC-KL + span": (mgsr, 88)}


def _logits(shared: Any, hidden: Any, aux: Any) -> Any:
    return (
        losses.project(hidden, shared["head"]),
        losses.project(aux["teacher_hidden"], shared["teacher_head"]),
    )


def dense(loss: Any, trained: Any, hidden: Any, teacher_head: Any, aux: Any) -> Any:
    """All logits at once."""
    own = jnp.ones(hidden.shape[0], bool)
    return loss(trained | {"teacher_head": teacher_head}, hidden, aux, own)


def chunked(
    chunk: int, loss: Any, trained: Any, hidden: Any, teacher_head: Any, aux: Any
) -> Any:
    """`chunk` tokens at a time, and the one after them for the span."""

    def fn(shared: Any, hidden: Any, aux: Any) -> Any:
        own = jnp.arange(hidden.shape[0]) < hidden.shape[0] - 1
        return loss(shared, hidden, aux, own), ()

    head = losses.Projection(trained["head"])
    shared = trained | {"head": head, "teacher_head": teacher_head}
    return losses.chunked(fn, shared, hidden, aux, chunk_size=chunk + 1)[0]


def problem(tokens: int, vocabulary: int) -> tuple[Any, ...]:
    """Random weights and states; spans of three tokens; logits of deviation 2."""
    keys = jax.random.split(jax.random.key(0), 5)

    def normal(key: Any, shape: tuple[int, ...], scale: float = 1.0) -> Any:
        return scale * jax.random.normal(key, shape)

    trained = {
        "head": normal(keys[0], (vocabulary, STUDENT_WIDTH), 2 / STUDENT_WIDTH**0.5),
        "clip_network": losses.init_clip_network(keys[1]),
    }
    teacher_head = normal(keys[2], (vocabulary, TEACHER_WIDTH), 2 / TEACHER_WIDTH**0.5)
    aux = {
        "teacher_hidden": normal(keys[3], (tokens, TEACHER_WIDTH)),
        "labels": jnp.arange(tokens) * 7919 % vocabulary,
        "span_ids": jnp.arange(tokens) // 3,
        "where": jnp.arange(tokens) % 10 < 9,  # padding is a tenth
        "weights": jnp.full(tokens, 1 / tokens),
    }
    return trained, normal(keys[4], (tokens, STUDENT_WIDTH)), teacher_head, aux


def measure(name: str, tokens: int, vocabulary: int, pairs: int) -> dict[str, Any]:
    """One row of the table."""
    (loss, chunk), arguments = LOSSES[name], problem(tokens, vocabulary)
    sides = {
        side: jax.jit(jax.value_and_grad(functools.partial(function, loss), (0, 1)))
        .lower(*arguments)
        .compile()
        for side, function in (
            ("dense", dense),
            ("chunked", functools.partial(chunked, chunk)),
        )
    }
    plan = {
        side: compiled.memory_analysis().temp_size_in_bytes
        for side, compiled in sides.items()
    }
    row = {
        "loss": name,
        "V": vocabulary,
        "tokens": tokens,
        "chunk": chunk,
        "dense_mib": plan["dense"] / 2**20,
        "chunked_mib": plan["chunked"] / 2**20,
        "memory": plan["chunked"] / plan["dense"],
    }
    if pairs and plan["dense"] < FITS * _free_memory():
        _check_equal(*(run(*arguments) for run in sides.values()))
        row["times"] = _time_pairs(sides, arguments, pairs)
    return row


def _time_pairs(sides: Any, arguments: Any, pairs: int) -> list[float]:
    def seconds(run: Any) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        return time.perf_counter() - start

    ratios = []
    for _ in range(pairs):
        dense = seconds(sides["dense"])
        ratios.append(seconds(sides["chunked"]) / dense)
    return ratios


def _check_equal(dense: Any, chunked: Any) -> None:
    def close(path: Any, a: Any, b: Any) -> None:
        off, size = (np.linalg.norm(np.asarray(x)) for x in (a - b, a))
        if not off <= 1e-4 * size:
            sys.exit(f"dense and chunked differ at {jax.tree_util.keystr(path)}")

    jax.tree_util.tree_map_with_path(close, dense, chunked)


def _free_memory() -> float:
    """Bytes that the device has left; of a CPU, the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats is not None:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    with open("/proc/meminfo", encoding="ascii") as lines:
        kib = {line.split(":")[0]: line.split()[1] for line in lines}
    return 1024 * int(kib["MemAvailable"])


def _line(row: dict[str, Any]) -> str:
    memory = f"{row['dense_mib']:8.0f}{row['chunked_mib']:9.0f}{row['memory']:8.4f}"
    text = f"{row['loss']:20}{row['V']:8}{row['chunk']:6}{memory}"
    if times := row.get("times"):
        spread = f"({min(times):.2f}-{max(times):.2f})"
        return f"{text}{statistics.median(times):8.2f} {spread}"
    return f"{text}       - (not run)"


def main() -> int:
    """Prints the table, then a JSON line for each bound; 1 where one does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    print(f"jax {jax.__version__}, {device.device_kind}, {arguments.tokens} tokens")
    print(
        f"{'':34}plan, MiB{'':16}ratios (bounds {MEMORY_BOUND}, {TIME_BOUND})\n"
        f"{'loss':20}{'V':>8}{'chunk':>6}{'dense':>8}{'chunked':>9}{'memory':>8}"
        f"{'time':>8} (min-max)"
    )
    verdicts = []
    for vocabulary in VOCABULARIES:
        for name in LOSSES:
            row = measure(name, arguments.tokens, vocabulary, arguments.pairs)
            print(_line(row), flush=True)
            verdicts.append((f"{name}, V={vocabulary}: memory", [row["memory"]]))
            if "times" in row:
                verdicts.append((f"{name}, V={vocabulary}: time", row["times"]))
    held = True
    for what, ratios in verdicts:
        bound = MEMORY_BOUND if what.endswith("memory") else TIME_BOUND
        ratio = statistics.median(ratios)
        held &= ratio <= bound
        print(
            json.dumps(
                {
                    "what": what,
                    "ratio": round(ratio, 4),
                    "min": round(min(ratios), 4),
                    "max": round(max(ratios), 4),
                    "bound": bound,
                    "holds": ratio <= bound,
                }
            )
        )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
