"""Compare memory and time of `chunked` with the dense form of the same losses.

Both sides compute value and gradient (of head, clip network and hidden states) from the
same hidden states. The dense side forms the logits of all tokens at once, as a trainer
without `chunked` does. The results are compared first. Memory is XLA's plan
(`memory_analysis().temp_size_in_bytes`) without the gradients.

    python benchmarks/loss_memory.py            # about 15 minutes on two CPU cores
    python benchmarks/loss_memory.py --tokens 256 --pairs 1
"""

import argparse
import functools
import sys
from collections.abc import Iterator
from typing import Any

import _pairs
import jax
import jax.numpy as jnp
import numpy as np
from _pairs import Answer, Bound, Options, Sides

from mgsr_jax import losses

STUDENT_WIDTH, TEACHER_WIDTH = 384, 768
VOCABULARIES = (50_257, 151_936)
MEMORY_BOUND, TIME_BOUND = 0.05, 1.0
FITS = 0.8  # share of the free memory that the dense form may need to be run


def forward_kl(shared: Any, hidden: Any, aux: Any, own: Any) -> Any:
    """Weighted sum of forward KL."""
    student, teacher = _logits(shared, hidden, aux)
    where = aux["where"] & own
    return jnp.sum(aux["weights"] * losses.forward_kl(student, teacher, where=where))


def mgsr(shared: Any, hidden: Any, aux: Any, own: Any) -> Any:
    """Weighted sum of cross-entropy, DAC-KL and span correlation."""
    student, teacher = _logits(shared, hidden, aux)
    where = aux["where"] & own
    values = losses.cross_entropy(student, aux["labels"], where=where)
    values += losses.dac_kl(shared["clip_network"], student, teacher, where=where).loss
    values += losses.span_correlation(
        student, teacher, aux["span_ids"], where=aux["where"]
    )
    return jnp.sum(aux["weights"] * values)


# Each with the largest chunk within the memory bound.
LOSSES = {"forward KL": (forward_kl, 64), "CE + DAC-KL + span": (mgsr, 88)}


def _logits(shared: Any, hidden: Any, aux: Any) -> Any:
    return (
        losses.project(hidden, shared["head"]),
        losses.project(aux["teacher_hidden"], shared["teacher_head"]),
    )


def dense(loss: Any, trained: Any, hidden: Any, teacher_head: Any, aux: Any) -> Any:
    """The loss on the logits of all tokens at once."""
    own = jnp.ones(hidden.shape[0], bool)
    return loss(trained | {"teacher_head": teacher_head}, hidden, aux, own)


def chunked(
    chunk: int, loss: Any, trained: Any, hidden: Any, teacher_head: Any, aux: Any
) -> Any:
    """The loss on `chunk` tokens at a time, which can read the next token too."""

    def fn(shared: Any, hidden: Any, aux: Any) -> Any:
        own = jnp.arange(hidden.shape[0]) < hidden.shape[0] - 1
        return loss(shared, hidden, aux, own), ()

    head = losses.Projection(trained["head"])
    shared = trained | {"head": head, "teacher_head": teacher_head}
    return losses.chunked(fn, shared, hidden, aux, chunk_size=chunk + 1)[0]


def problem(tokens: int, vocabulary: int) -> tuple[Any, ...]:
    """Random weights and states: logits of deviation 2, spans of three tokens."""
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


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """Memory, and time if the dense form fits, of every loss and vocabulary."""
    del start
    for vocabulary in VOCABULARIES:
        for name, (loss, chunk) in LOSSES.items():
            arguments = problem(options.tokens, vocabulary)
            in_chunks = functools.partial(chunked, chunk)
            sides = {
                side: jax.jit(jax.value_and_grad(functools.partial(form, loss), (0, 1)))
                .lower(*arguments)
                .compile()
                for side, form in (("dense", dense), ("chunked", in_chunks))
            }
            what = f"{name}, {options.tokens} tokens, V={vocabulary}, chunked / dense"
            yield from _records(what, chunk, sides, arguments, options.pairs)


def _records(
    what: str, chunk: int, sides: Any, arguments: Any, pairs: int
) -> Iterator[Answer]:
    plan = {
        side: compiled.memory_analysis().temp_size_in_bytes / 2**20
        for side, compiled in sides.items()
    }
    yield Bound("memory", f"{what}: plan", MEMORY_BOUND).verdict(
        [plan["chunked"] / plan["dense"]],
        chunk=chunk,
        plan_mib={side: round(mib, 1) for side, mib in plan.items()},
    )
    if plan["dense"] > FITS * _free_mib():
        _pairs.report(f"{what}: the dense form does not fit in memory, so no times")
        return
    _check_equal(*(run(*arguments) for run in sides.values()))
    runs = {
        side: _pairs.timed(lambda run=run: jax.block_until_ready(run(*arguments)))
        for side, run in sides.items()
    }
    ratios = _pairs.ratios(_pairs.alternate(pairs, runs), "chunked", "dense")
    yield Bound("time", f"{what}: time", TIME_BOUND).verdict(ratios, chunk=chunk)


def _check_equal(dense: Any, chunked: Any) -> None:
    def close(path: Any, a: Any, b: Any) -> None:
        off, size = (np.linalg.norm(np.asarray(x)) for x in (a - b, a))
        if not off <= 1e-4 * size:
            sys.exit(f"dense and chunked differ at {jax.tree_util.keystr(path)}")

    jax.tree_util.tree_map_with_path(close, dense, chunked)


def _free_mib() -> float:
    """Free memory of the machine."""
    with open("/proc/meminfo", encoding="ascii") as lines:
        kib = {line.split(":")[0]: line.split()[1] for line in lines}
    return int(kib["MemAvailable"]) / 1024


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options besides those of every script."""
    parser.add_argument("--tokens", type=int, default=2048, help="default 2048")


if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, add_options=add_options))
