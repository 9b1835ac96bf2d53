"""Forward KL, value and gradient, against plain torch: extra memory and time.

2,048 tokens, 50,257 classes, hidden states of width 384 (student) and 768 (teacher),
float32. Both heads are multiplied, the loss is the mean over tokens, and the gradients
are those of the student's hidden states and head. Value and gradient norms are compared
first. torch holds all logits; its memory is the process's peak above its start. Ours is
XLA's plan without the gradients, which are a result; the record also has the process's
peak, which includes them.

    python benchmarks/forward_kl.py         # about a minute on two CPU cores
    python benchmarks/forward_kl.py --tiny --pairs 1
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
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
    """Options besides those of every script."""
    parser.add_argument("--tokens", type=int, default=2048, help="default 2048")
    parser.add_argument(
        "--chunk", type=int, help="tokens at once (default: as in training)"
    )


def arrays(options: Options) -> list[np.ndarray]:
    """Hidden states and head of the student, then of the teacher."""
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
    """Norm in float64: a float32 sum of 19 million squares has three right digits."""
    return float(np.linalg.norm(np.asarray(gradient, np.float64)))


def torch_side(options: Options) -> None:
    """Serve the loss in its textbook form."""
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
        return {"values": [loss, *(norm(x.grad) for x in trained)]}

    serve({"check": check, "run": lambda: {"loss": run()}})


def mgsr_side(options: Options) -> None:
    """Serve the loss as training computes it."""
    import jax
    import jax.numpy as jnp
    from _side import serve

    arguments = tuple(map(jnp.asarray, arrays(options)))
    gradient = jax.jit(jax.value_and_grad(_chunked_loss(options), (0, 1)))
    compiled: Any = gradient.lower(*arguments).compile()
    plan = compiled.memory_analysis().temp_size_in_bytes / 2**20

    def run() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    def check() -> Answer:
        value, gradients = run()
        return {"values": [float(value), *(norm(x) for x in gradients)]}

    serve({"check": check, "run": lambda: {"loss": float(run()[0])}}, plan_mib=plan)


def _chunked_loss(options: Options) -> Callable[..., Any]:
    """`losses.chunked` over hidden states, and inside a chunk over its logits."""
    import jax.numpy as jnp

    from mgsr_jax import losses
    from mgsr_jax.losses import default_chunk_size
    from mgsr_jax.step_loss import LOGIT_PARTS

    def logits_loss(shared: Any, student: Any, aux: Any) -> Any:
        values = losses.forward_kl(student, aux["teacher"], where=aux["where"])
        return jnp.sum(values) / options.tokens, ()

    def fn(shared: Any, hidden: Any, aux: Any) -> Any:
        student = losses.project(hidden, shared["head"])
        teacher = losses.project(aux["teacher_hidden"], shared["teacher_head"])
        logits = {"teacher": teacher, "where": aux["where"]}
        part = -(-len(hidden) // LOGIT_PARTS)
        return losses.chunked(
            logits_loss, (), student, logits, chunk_size=part, overlap=0
        )

    def loss(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any) -> Any:
        shared = {"head": losses.Projection(head), "teacher_head": teacher_head}
        aux = {"teacher_hidden": teacher_hidden, "where": jnp.ones(len(hidden), bool)}
        size = options.chunk or default_chunk_size(len(head))
        return losses.chunked(fn, shared, hidden, aux, chunk_size=size, overlap=0)[0]

    return loss


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """Records of memory and time, from the same repetitions."""
    sides = {"torch": start("torch"), "mgsr_jax": start("mgsr_jax")}
    values = {name: side("check")["values"] for name, side in sides.items()}
    names = ("value", "gradient norm, hidden states", "gradient norm, head")
    for what, ours, theirs in zip(
        names, values["mgsr_jax"], values["torch"], strict=True
    ):
        _pairs.require_close(what, ours, theirs, SAME)
    runs = {name: functools.partial(side, "run") for name, side in sides.items()}
    rounds = _pairs.alternate(options.pairs, runs)
    plan = sides["mgsr_jax"].ready["plan_mib"]
    for answers in rounds:
        for name, side in sides.items():
            peak = answers[name]["peak_mib"]
            answers[name]["extra_mib"] = peak - side.ready["resident_mib"]
    yield MEMORY.verdict(
        [plan / answers["torch"]["extra_mib"] for answers in rounds],
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
