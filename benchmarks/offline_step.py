"""An offline distillation step against plain torch: tokens per second, peak memory.

A student of 30 million parameters, a teacher of 124 million, 4 rows of 256 tokens,
every position scored: teacher forward, student forward and backward, forward KL over
the whole vocabulary, AdamW. Both sides have the same random weights and tokens, in
float32. Loss and gradient norm of the first step are compared first. The torch side
forms all logits at once, as TRL's GKDTrainer and DistiLLM do. Memory is the peak of a
process in a repetition.

    python benchmarks/offline_step.py       # about a minute on two CPU cores
    python benchmarks/offline_step.py --tiny --pairs 1
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _pairs
import _sizes
from _pairs import Answer, Bound, Options, Sides

if TYPE_CHECKING:
    import torch

ROWS, LENGTH, RATE = 4, 256, 1e-5
OF = f"offline step, {ROWS} x {LENGTH}, 30M <- 124M"
SPEED = Bound("P5speed", f"{OF}: tokens/s, ours / torch", 1.1, at_least=True)
MEMORY = Bound("P5memory", f"{OF}: peak resident memory, ours / torch", 0.6)
SAME = 1e-4  # relative


def torch_side(options: Options) -> None:
    """Serve the step in its textbook form."""
    import torch
    from _side import serve
    from _torch_models import pair

    student, teacher = pair(_sizes.models(options), Path(options.shared))
    student.train()
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    tokens = torch.from_numpy(_sizes.random_tokens(options, ROWS, LENGTH))

    def step() -> Answer:
        optimizer.zero_grad(set_to_none=True)
        loss = _torch_loss(student, teacher, tokens)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    def first_step() -> Answer:
        loss = step()["loss"]
        # In float64: a float32 sum of millions of squares has few right digits.
        gradients = [p.grad.double().norm() for p in student.parameters()]
        return {"loss": loss, "norm": torch.stack(gradients).norm().item()}

    serve({"first step": first_step, "step": step})


def _torch_loss(student: Any, teacher: Any, tokens: "torch.Tensor") -> "torch.Tensor":
    """Mean forward KL over all positions."""
    import torch
    from torch.nn import functional

    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "use_cache": False,
    }
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits
    student_logits = student(**inputs).logits
    values = functional.kl_div(
        functional.log_softmax(student_logits.float(), -1),
        functional.log_softmax(teacher_logits.float(), -1),
        reduction="none",
        log_target=True,
    )
    return values.sum(-1).mean()


def mgsr_side(options: Options) -> None:
    """Serve the trainer's step."""
    import jax
    import numpy as np
    from _mgsr import FORWARD_KL, STEPS, constant_rate, load_pair
    from _side import serve

    from mgsr_jax import sharding
    from mgsr_jax.rows import from_lists
    from mgsr_jax.train_step import init_state, make_train_step
    from mgsr_jax.training.optimizer import make_optimizer

    pair, mesh = load_pair(Path(options.shared)), sharding.make_mesh()
    optimizer = make_optimizer(constant_rate(RATE), STEPS)
    train_step = make_train_step(pair.student, pair.teacher, optimizer, FORWARD_KL)
    # One more token, which is only a label: 256 tokens are read and scored.
    tokens = _sizes.random_tokens(options, ROWS, LENGTH)
    tokens = np.pad(tokens, [(0, 0), (0, 1)], constant_values=2).tolist()
    prompts, responses = [row[:1] for row in tokens], [row[1:] for row in tokens]
    host = from_lists(prompts, responses, width=LENGTH + 1)
    rows = (sharding.put_batch(mesh, host),)
    state = jax.jit(
        lambda params: init_state(params, optimizer, seed=0),
        out_shardings=sharding.replicated(mesh),
        donate_argnums=0,
    )({"student": pair.student_params})

    def step() -> Answer:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, pair.teacher_params, rows)
        jax.block_until_ready(state)
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        return {"loss": float(loss.total), "norm": float(norm.total)}

    serve({"first step": step, "step": step})


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """Records of speed and memory, from the same repetitions."""
    sides = {"torch": start("torch"), "mgsr_jax": start("mgsr_jax")}
    first = {name: side("first step") for name, side in sides.items()}
    for what in ("loss", "norm"):
        _pairs.require_close(
            what, first["mgsr_jax"][what], first["torch"][what], relative=SAME
        )
    runs = {name: functools.partial(side, "step") for name, side in sides.items()}
    rounds = _pairs.alternate(options.pairs, runs)
    yield SPEED.verdict(
        _pairs.ratios(rounds, "torch", "mgsr_jax"),
        **_pairs.times(rounds),
    )
    yield MEMORY.verdict(
        _pairs.ratios(rounds, "mgsr_jax", "torch", "peak_mib"),
        peak_mib=_pairs.medians(rounds, "peak_mib"),
    )


SIDES = {"torch": torch_side, "mgsr_jax": mgsr_side}

if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, SIDES))
