"""The whole loss of training: its memory plan, its time, and the plan's growth.

Cross-entropy, DAC-KL and span correlation in one pass, value and gradient, as training
computes them (`micro_batch_loss`), without the transformers: hidden states of width 384
(student) and 768 (teacher) are given. Gradients are those of the student's hidden
states, its head (50,257 classes) and the clip network. Three bounds:

  P3memory  XLA's plan without the gradients, at 4,096 tokens, relative to the dense
            form: the same three losses on the logits of all tokens at once
  P3time    time relative to forward KL, computed the same way
  P4        growth of the plan from 512 to 8,192 tokens: at most twice the bytes of both
            models' hidden states in float32

At 256 tokens value and every gradient are compared with the dense form. At full size
the dense form is only compiled.

    python benchmarks/revision_loss.py      # about two minutes on two CPU cores
    python benchmarks/revision_loss.py --tiny --pairs 1
"""

import dataclasses
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import _pairs
import _sizes
import jax
import jax.numpy as jnp
from _pairs import Answer, Bound, Options, Sides

from mgsr_jax import losses
from mgsr_jax.objective import Objective, position_weights
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.step_loss import StepLoss, micro_batch_loss

ROWS, TOKENS, LENGTHS = 4, 4096, (512, 1024, 2048, 4096, 8192)
REVISION = Objective()
FORWARD_KL = Objective(sft=0.0, span=0.0, divergence="forward_kl")
OF = "cross-entropy + DAC-KL + span, 4,096 tokens, V = 50,257"
MEMORY = Bound("P3memory", f"{OF}: memory plan, chunked / dense", 0.015)
TIME = Bound("P3time", f"{OF}: time, relative to chunked forward KL", 1.8)
GROWTH = Bound(
    "P4",
    "the loss's plan from 512 to 8,192 tokens: bytes per token / 2 (d + D) 4",
    1.0,
)
SAME = 1e-4  # relative


@dataclasses.dataclass(frozen=True)
class Head:
    """A language model without its transformer; the hidden states are a parameter."""

    vocabulary: int

    @property
    def config(self) -> Any:
        return SimpleNamespace(vocab_size=self.vocabulary)

    def forward(self, params: Any, tokens: Any, **_: Any) -> Any:
        return params["hidden"], None

    def head_params(self, params: Any) -> Any:
        return params["head"]

    def unembed(self, head: Any, hidden: Any) -> Any:
        return losses.project(hidden, head["embedding"])


def problem(options: Options, tokens: int) -> tuple[Any, Any, Rows]:
    """Parameters of both models, and rows: logits of deviation 2, spans of 3 tokens."""
    sizes, columns = _sizes.models(options), tokens // ROWS
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def model(width: int) -> Any:
        head = jax.random.normal(next(keys), (sizes.vocabulary, width))
        hidden = jax.random.normal(next(keys), (ROWS, columns, width))
        return {"head": {"embedding": 2 / width**0.5 * head}, "hidden": hidden}

    params = {
        "student": model(sizes.student.width),
        "clip_network": losses.init_clip_network(next(keys)),
    }
    # One more token, which is only a label.
    index = jnp.broadcast_to(jnp.arange(columns + 1), (ROWS, columns + 1))
    rows = Rows(
        tokens=index * 7919 % sizes.vocabulary,
        prompt_lengths=jnp.ones(ROWS, jnp.int32),
        lengths=jnp.full(ROWS, columns + 1),
        span_ids=index // 3,
        example=jnp.arange(ROWS),
        ground_truth=jnp.ones(ROWS, bool),
        earlier_responses=jnp.zeros((ROWS, columns + 1), bool),
    )
    return params, model(sizes.teacher.width), rows


def chunked(objective: Objective, vocabulary: int) -> Any:
    """Value and gradient as training computes them."""

    model: Any = Head(vocabulary)

    def loss(params: Any, teacher_params: Any, rows: Rows) -> Any:
        return micro_batch_loss(
            params,
            teacher_params,
            rows,
            position_weights(rows, objective),
            spec=StepLoss(model, model, objective),
        )[0]

    return jax.jit(jax.value_and_grad(loss))


@jax.jit
@jax.value_and_grad
def dense(params: Any, teacher_params: Any, rows: Rows) -> Any:
    """Value and gradient from all logits at once, without `chunked`."""
    view = next_token_view(rows)
    student, teacher = (
        losses.project(model["hidden"], model["head"]["embedding"])
        for model in (params["student"], teacher_params)
    )
    dac_kl = losses.dac_kl(
        params["clip_network"],
        student,
        teacher,
        where=view.where,
        signal=losses.ClipPrior(REVISION.prior_weight),
        width=REVISION.width,
        normalization=REVISION.normalization,
    )
    spans = losses.span_correlation(student, teacher, view.span_ids, where=view.where)
    pairs = losses.span_pairs(view.span_ids, view.where)
    sft = losses.cross_entropy(student, view.labels, where=view.where)
    return (
        losses.masked_mean(sft, view.where)
        + losses.masked_mean(dac_kl.loss, view.where)
        + losses.masked_mean(spans, pairs)
    )


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """The plans, then the times."""
    del start
    vocabulary = _sizes.models(options).vocabulary
    revision = chunked(REVISION, vocabulary)
    _require_equal(revision, problem(options, 256))

    plans = {
        tokens: _plan_mib(
            revision, jax.eval_shape(lambda n=tokens: problem(options, n))
        )
        for tokens in LENGTHS
    }
    dense_plan = _plan_mib(dense, jax.eval_shape(lambda: problem(options, TOKENS)))
    yield MEMORY.verdict(
        [plans[TOKENS] / dense_plan],
        plan_mib={"chunked": round(plans[TOKENS], 1), "dense": round(dense_plan, 1)},
    )
    yield _growth(options, plans)

    arguments = problem(options, TOKENS)
    forward_kl = chunked(FORWARD_KL, vocabulary)
    runs = {
        name: _pairs.timed(lambda run=run: jax.block_until_ready(run(*arguments)))
        for name, run in (("forward KL", forward_kl), ("whole loss", revision))
    }
    rounds = _pairs.alternate(options.pairs, runs)
    yield TIME.verdict(
        _pairs.ratios(rounds, "whole loss", "forward KL"),
        **_pairs.times(rounds),
    )


def _growth(options: Options, plans: dict[int, float]) -> Answer:
    """Growth of the plan from the shortest length to the longest."""
    sizes, (first, *_, last) = _sizes.models(options), plans
    allowed = 2 * (sizes.student.width + sizes.teacher.width) * 4
    grown = (plans[last] - plans[first]) * 2**20 / (last - first)
    return GROWTH.verdict(
        [grown / allowed],
        plan_mib={tokens: round(plan, 1) for tokens, plan in plans.items()},
        bytes_per_token={"plan": round(grown), "allowed": allowed},
    )


def _plan_mib(function: Any, shapes: Any) -> float:
    compiled = function.lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes / 2**20


def _require_equal(revision: Any, arguments: Any) -> None:
    """Compare loss and norm of every gradient of `chunked` and the dense form."""
    ours, theirs = (
        jax.tree.map(lambda x: float(jnp.linalg.norm(x)), run(*arguments))
        for run in (revision, dense)
    )
    for (path, own), other in zip(
        jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        what = f"chunked and dense{jax.tree_util.keystr(path)}"
        _pairs.require_close(what, own, other, SAME)


if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare))
