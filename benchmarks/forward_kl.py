"""Forward KL alone against plain torch: extra memory and time, value and gradient.

2,048 tokens, 50,257 classes, hidden states of width 384 (student) and 768 (teacher),
float32: both heads are multiplied, the loss is the mean over tokens, gradients are
those of the student's hidden states and head. Value and gradient norms are compared
first. The peer holds all logits; its memory is the peak above what the process held at
the start. Ours is XLA's plan beyond the gradients, which are a result; the process's
own peak, with them, is beside it in the record.

    python benchmarks/forward_kl.py         # about a minute on two CPU cores
    python benchmarks/forward_kl.py --tiny --pairs 1
"""

import argparse
import functools
import sys
from typing import Any

import _pairs
import _sizes
import numpy as np
from _pairs import Answer, Bound, Options, Sides

OF = "forward KL, value and gradient, 2,048 tokens, V = 50,257"
MEMORY = Bound("P2memory", f"{OF}: extra memory, ours / torch", 0.03)
TIME = Bound("P2time", f"{OF}: time, ours / torch", 0.75)
SAME = 1e-4  # relative


def add_options(parser: argparse.ArgumentParser) -> None:
    """Beside those of every script."""
    parser.add_argument("--tokens", type=int, default=2048, help="default 2048")
    parser.add_argument(
        "--chunk", type=int, help="tokens at once (default: what training takes)"
    )


def arrays(options: Options) -> list[np.ndarray]:
    """Hidden states and heads, of the student and of the teacher."""
    (student, teacher, vocabulary), rng = (
        _sizes.models(options),
        np.random.default_rng(0),
    )

    def normal(rows: int, width: int, scale: float) -> np.ndarray:
        return scale * rng.standard_normal((rows, width), np.float32)

    return [
        made
        for width in (student.width, teacher.width)
        for made in (
            normal(options.tokens, width, 1.0),
            normal(vocabulary, width, 0.05),
        )
    ]


def norm(gradient: Any) -> float:
    """In float64: a float32 sum of 19 million squares has three digits."""
    return float(np.linalg.norm(np.asarray(gradient, np.float64)))


def torch_side(options: Options) -> None:
    """The loss as one writes it down."""
    import torch
    from _side import serve
    from torch.nn import functional

    hidden, head, teacher_hidden, teacher_head = map(torch.from_numpy, arrays(options))
    trained: Any = (hidden.requires_grad_(), head.requires_grad_())

    def kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        values = functional.kl_div(
            functional.log_softmax(student_logits.float(), -1),
            functional.log_softmax(teacher_logits.float(), -1),
            reduction="none",
            log_target=True,
        )
        return values.sum()

    def run() -> float:
        for x in trained:
            x.grad = None
        loss = kl(hidden @ head.T, teacher_hidden @ teacher_head.T) / options.tokens
        loss.backward()
        return loss.item()

    def check() -> Answer:
        loss = run()
        return {"found": [loss, *(norm(x.grad) for x in trained)]}

    serve({"check": check, "run": lambda: {"loss": run()}})


def mgsr_side(options: Options) -> None:
    """`losses.chunked` of hidden states, and within it of logits: as training does."""
    import jax
    import jax.numpy as jnp
    from _side import serve

    from mgsr_jax import losses
    from mgsr_jax.losses import default_chunk_size
    from mgsr_jax.step_loss import LOGIT_PARTS

    hidden, head, *teacher = map(jnp.asarray, arrays(options))

    def of_logits(shared: Any, student: Any, aux: Any) -> Any:
        values = losses.forward_kl(student, aux["teacher"], where=aux["where"])
        return jnp.sum(values) / options.tokens, ()

    def fn(shared: Any, hidden: Any, aux: Any) -> Any:
        student = losses.project(hidden, shared["head"])
        teacher = losses.project(aux["teacher_hidden"], shared["teacher_head"])
        logits = {"teacher": teacher, "where": aux["where"]}
        part = -(-len(hidden) // LOGIT_PARTS)
        return losses.chunked(
            of_logits, (), student, logits, chunk_size=part, overlap=0
        )

    def loss(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any) -> Any:
        shared = {"head": losses.Projection(head), "teacher_head": teacher_head}
        aux = {"teacher_hidden": teacher_hidden, "where": jnp.ones(len(hidden), bool)}
        size = options.chunk or default_chunk_size(len(head))
        return losses.chunked(fn, shared, hidden, aux, chunk_size=size, overlap=0)[0]

    arguments = (hidden, head, *teacher)
    compiled: Any = (
        jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
    )
    plan = compiled.memory_analysis().temp_size_in_bytes / 2**20

    def run() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    def check() -> Answer:
        value, gradients = run()
        return {"found": [float(value), *(norm(x) for x in gradients)]}

    serve({"check": check, "run": lambda: {"loss": float(run()[0])}}, plan_mib=plan)


def compare(options: Options, start: Sides) -> Any:
    """Memory and time of the same repetitions."""
    sides = {"torch": start("torch"), "mgsr_jax": start("mgsr_jax")}
    found = {name: side("check")["found"] for name, side in sides.items()}
    names = ("value", "gradient norm, hidden states", "gradient norm, head")
    for what, ours, theirs in zip(
        names, found["mgsr_jax"], found["torch"], strict=True
    ):
        _pairs.require_close(what, ours, theirs, SAME)
    runs = {name: functools.partial(side, "run") for name, side in sides.items()}
    rounds = _pairs.alternate(options.pairs, runs)
    plan = sides["mgsr_jax"].ready["plan_mib"]
    for each in rounds:
        for name, side in sides.items():
            each[name]["extra_mib"] = (
                each[name]["peak_mib"] - side.ready["resident_mib"]
            )
    yield MEMORY.verdict(
        [plan / each["torch"]["extra_mib"] for each in rounds],
        plan_mib=round(plan, 1),
        peak_above_start_mib=_pairs.medians(rounds, "extra_mib"),
    )
    yield TIME.verdict(
        _pairs.ratios(rounds, "mgsr_jax", "torch"),
        **_pairs.times(rounds),
    )


SIDES = {"torch": torch_side, "mgsr_jax": mgsr_side}

if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, SIDES, add_options))
