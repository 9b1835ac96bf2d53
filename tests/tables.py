"""Rows, and models whose logits are their parameters: losses of known logits."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np

from mgsr_jax import losses
from mgsr_jax.objective import Objective, position_weights
from mgsr_jax.rows import from_lists
from mgsr_jax.step_loss import StepLoss, micro_batch_loss

VOCAB, COLUMNS, WIDTH, K = 11, 13, 10, 6
# (prompt, response) lengths; the last two rows have no scored position.
LENGTHS = ((2, 5), (1, 9), (3, 1), (4, 6), (5, 3), (1, 2), (1, 0), (10, 0))
SAMPLED = (1, 4)  # rows that the student wrote


@dataclasses.dataclass(frozen=True)
class Table:
    """A model whose logits are its parameters: `logits[id]` of the row's first token.

    A row keeps its logits in whatever micro-batch it is.
    """

    name: str = "table"

    @property
    def config(self):
        return types.SimpleNamespace(vocab_size=COLUMNS)

    def forward(self, params, tokens, *, positions=None, cache=None):
        return params["logits"][tokens[:, 0]], None

    def head_params(self, params):
        return {}

    def unembed(self, head, hidden):
        return hidden

    def init_cache(self, batch, length, dtype):
        raise NotImplementedError

    def place_decoding(self, per_row, hidden):
        raise NotImplementedError

    def decode_params(self, params, dtype):
        raise NotImplementedError


class NeverRun(Table):
    """A teacher that must not run."""

    def forward(self, params, tokens, *, positions=None, cache=None):
        raise AssertionError("the teacher ran")


def make_rows():
    """Eight ragged rows, row i beginning with token i."""
    rng = np.random.default_rng(3)
    rows = from_lists(
        [
            [i, *rng.integers(0, VOCAB, p - 1).tolist()]
            for i, (p, _) in enumerate(LENGTHS)
        ],
        [rng.integers(0, VOCAB, r).tolist() for _, r in LENGTHS],
        width=WIDTH,
        span_ids=[np.sort(rng.integers(-1, 3, r)).tolist() for _, r in LENGTHS],
    )
    rows.ground_truth[list(SAMPLED)] = False
    return jax.tree.map(jnp.asarray, rows)


def logits(seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(0, 2, (len(LENGTHS), WIDTH - 1, COLUMNS))
    return {"logits": jnp.asarray(table, jnp.float32)}


ROWS, STUDENT, TEACHER = make_rows(), logits(0), logits(1)
CLIP = losses.init_clip_network(jax.random.key(0), num_candidates=K, hidden=8)
# Zero weights in the last layer would hide the network from its own gradient.
CLIP["output"]["kernel"] = jnp.asarray(
    np.random.default_rng(2).normal(0, 0.3, (8, 2)), jnp.float32
)
PARAMS = {"student": STUDENT, "clip_network": CLIP}
MGSR = Objective(num_candidates=K)


def step_loss(params, teacher_params, rows, objective, teacher, dtype=jnp.float32):
    """Loss and metrics of a step of one micro-batch."""
    return micro_batch_loss(
        params,
        teacher_params,
        rows,
        position_weights(rows, objective),
        spec=StepLoss(Table(), teacher, objective, VOCAB, dtype),
    )


STATIC = ("objective", "teacher", "dtype")
values = jax.jit(step_loss, static_argnames=STATIC)
with_gradients = jax.jit(
    jax.value_and_grad(step_loss, (0, 1), has_aux=True), static_argnames=STATIC
)


def evaluate(objective=MGSR, *, rows=ROWS, student=STUDENT, teacher=TEACHER):
    """(loss, metrics)"""
    params = {"student": student, "clip_network": CLIP}
    return values(params, teacher, rows, objective, Table("teacher"))


def differentiate(objective=MGSR, *, rows=ROWS, student=STUDENT, teacher=TEACHER):
    """(loss, metrics, gradient, gradient of the teacher)"""
    params = {"student": student, "clip_network": CLIP}
    (loss, metrics), grads = with_gradients(
        params, teacher, rows, objective, Table("teacher")
    )
    return loss, metrics, *grads


def log_softmax(table):
    """float64, over the real vocabulary."""
    x = np.asarray(table, np.float64)[..., :VOCAB]
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def scored(rows=ROWS):
    """(row, t) of every label that belongs to a response, from the lengths."""
    lengths = zip(rows.prompt_lengths.tolist(), rows.lengths.tolist(), strict=True)
    return [(b, t) for b, (p, n) in enumerate(lengths) for t in range(p - 1, n - 1)]


def pairs():
    """(row, t) where the labels of t and t + 1 are in one phrase."""
    span_ids, at = np.asarray(ROWS.span_ids), scored()
    return [
        (b, t)
        for b, t in at
        if (b, t + 1) in at and span_ids[b, t + 1] == span_ids[b, t + 2] != -1
    ]


def assert_close(got, want, rtol=1e-6):
    """Leaf by leaf, relative to the leaf's norm."""

    def close(path, a, b):
        scale = np.linalg.norm(b)
        assert np.linalg.norm(a - b) <= rtol * scale, jax.tree_util.keystr(path)

    jax.tree_util.tree_map_with_path(close, got, want)
