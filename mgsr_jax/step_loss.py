"""The objective of one micro-batch, computed a chunk of its tokens at a time.

Logits [B, T, V] of both models would be the largest arrays of a step by far. So the
models' hidden states are computed for the whole micro-batch, and logits exist for one
chunk of its scored tokens at a time, forwards and backwards.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from mgsr_jax import losses, sharding
from mgsr_jax.loss_targets import Targets, make_targets
from mgsr_jax.losses import Projection, Sum, TopKTeacher, default_chunk_size
from mgsr_jax.objective import Objective, Weights
from mgsr_jax.routed_teachers import (
    RoutedHidden,
    Teacher,
    teacher_hidden,
    teacher_names,
)
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.token_loss import (
    check_teacher,
    label_discrepancy,
    with_discrepancy_weights,
)
from mgsr_jax.typing import Leaf, Model, Params, RowKeys
from mgsr_jax.weighted_sum import weighted_sum

LOGIT_PARTS = 8
"""Parts of a chunk whose losses are computed one after the other.

Logits of a chunk are formed at once, since that reads the whole head. Their losses need
many times the memory of the logits.
"""

TeacherOutputs = TopKTeacher | Float[Array, "B S D"] | Rows
"""In place of running the teacher on a micro-batch: K classes per label, or hidden
states; or the rows that it reads instead, with other prompts and the same responses."""


@dataclasses.dataclass(frozen=True)
class StepLoss:
    """Models and settings of the loss; static, the same for all micro-batches.

    Attributes:
      student: the model that is trained.
      teacher: what it is compared with: a model, several that divide the rows, or None.
      objective: the three losses and their weights.
      vocab_size: columns of logits at or beyond it are padding.
      dtype: of the student's computation.
      chunk_size: tokens per device whose logits exist at a time; None: a default by
        the size of the vocabulary.
      score_teacher: add the teacher's cross-entropy on the labels to the metrics.
    """

    student: Model
    teacher: Teacher | None
    objective: Objective
    vocab_size: int | None = None
    dtype: DTypeLike = jnp.float32
    chunk_size: int | None = None
    score_teacher: bool = False

    @property
    def tokens_per_chunk(self) -> int:
        """Tokens per device whose logits exist at a time."""
        return self.chunk_size or default_chunk_size(self.student.config.vocab_size)

    @property
    def overlap(self) -> int:
        """Tokens that a chunk shares with the next: a span pair reads two."""
        return 1 if self.objective.span else 0


class Chunk(NamedTuple):
    """Adjacent tokens of a micro-batch: all that their losses read except `hidden`.

    Attributes:
      targets: labels, masks and weights. [N]
      teacher: the teacher's hidden states [N, D], those of several teachers, K classes,
        or None.
    """

    targets: Targets
    teacher: Leaf


def micro_batch_loss(
    params: Params,
    teacher_params: PyTree,
    rows: Rows,
    weights: Weights,
    *,
    spec: StepLoss,
    teacher_outputs: TeacherOutputs | None = None,
    dropout_keys: RowKeys | None = None,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The weighted sum of the three losses over `rows` [B, S], and metrics as sums.

    Args:
      params: "student" and, where limits are learned, "clip_network".
      teacher_params: None where no part runs the teacher; of several a tuple.
      rows: the micro-batch.
      weights: of its positions, from `position_weights` of the whole step.
      spec: models and settings.
      teacher_outputs: used in place of running the teacher on `rows`.
      dropout_keys: one per row, for a student whose forward pass takes them.

    Raises:
      ValueError: a part compares with a teacher and there is none, or K classes; there
        are several teachers and `rows` names none.
    """
    student, view = spec.student, next_token_view(rows)
    cast = jax.tree.map(lambda p: p.astype(spec.dtype), params["student"])
    dropout = {} if dropout_keys is None else {"dropout_keys": dropout_keys}
    with jax.named_scope("student"):
        hidden, _ = student.forward(cast, view.inputs, **dropout)
    teacher, teacher_head = _teacher_chunk(spec, teacher_params, rows, teacher_outputs)
    head = student.head_params(params["student"])
    shared = {
        # Not the cast copy: gradients of chunks are summed in float32.
        "head": jax.tree.map(lambda p: Projection(p) if p.ndim == 2 else p, head),
        "teacher_head": teacher_head,
        "clip_network": params.get("clip_network"),
    }
    targets = make_targets(rows, weights, spec.objective)
    if spec.objective.weighs_by_discrepancy:
        heads = head, teacher_head
        gaps = _discrepancy(spec, heads, hidden, teacher, targets)
        targets = with_discrepancy_weights(targets, gaps, spec.objective)
    by_token = P(sharding.vocab_axis())
    return losses.chunked(
        functools.partial(chunk_loss, spec=spec),
        shared,
        hidden,
        Chunk(targets, teacher),
        chunk_size=spec.tokens_per_chunk,
        overlap=spec.overlap,
        where=view.where,
        batch_axes=sharding.batch_axes(),
        shared_specs={"head": by_token, "teacher_head": by_token, "clip_network": P()},
    )


@jax.named_scope("loss")
def chunk_loss(
    shared: Params, hidden: Float[Array, "N D"], chunk: Chunk, *, spec: StepLoss
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The three losses of adjacent tokens: weighted sum, and metrics.

    The last `spec.overlap` tokens also begin the next chunk: the span loss reads them
    here, and they count there.
    """
    head = jax.tree.map(lambda p: p.astype(spec.dtype), shared["head"])
    student_logits = spec.student.unembed(head, hidden)
    teacher = chunk.teacher
    if spec.teacher is not None and not isinstance(teacher, TopKTeacher | None):
        teacher = spec.teacher.unembed(shared["teacher_head"], teacher)
    targets = _without_overlap(chunk.targets, spec.overlap)
    return losses.chunked(
        functools.partial(_logits_loss, spec=spec),
        shared["clip_network"],
        student_logits,
        Chunk(targets, teacher),
        chunk_size=-(-len(hidden) // LOGIT_PARTS) + spec.overlap,
        overlap=spec.overlap,
        batch_axes=sharding.batch_axes(),
    )


def _logits_loss(
    clip_params: Params | None,
    student_logits: Float[Array, "N V"],
    chunk: Chunk,
    *,
    spec: StepLoss,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The losses of one part of a chunk; `chunk.teacher` holds logits or K classes."""
    return weighted_sum(
        clip_params,
        student_logits,
        chunk.teacher,
        _without_overlap(chunk.targets, spec.overlap),
        spec.objective,
        vocab_size=spec.vocab_size,
        vocab_axis=sharding.vocab_axis(),
        score_teacher=spec.score_teacher,
        teachers=teacher_names(spec.teacher),
    )


def _discrepancy(
    spec: StepLoss,
    heads: tuple[PyTree, PyTree],
    hidden: Float[Array, "B T D"],
    of_teacher: Leaf,
    targets: Targets,
) -> Float[Array, "B T"]:
    """Each label's discrepancy, without gradient.

    The weights of a row read all of it, so this pass over both heads comes before that
    of the losses. Logits exist for a few positions of all rows at a time.
    """
    assert spec.teacher is not None  # `_teacher_chunk` raises
    teacher, hidden = spec.teacher, lax.stop_gradient(hidden)
    head, teacher_head = lax.stop_gradient(heads)
    head = jax.tree.map(lambda p: p.astype(spec.dtype), head)
    # All-gathered over fsdp once, not once per chunk of positions.
    head, teacher_head = sharding.constrain((head, teacher_head), P("tensor"))
    rows, width = targets.where.shape
    size = spec.tokens_per_chunk * sharding.batch_shards() // rows
    size = min(max(size, 1), width)

    def add_chunk(i: Array, found: Float[Array, "B T"]) -> Float[Array, "B T"]:
        # The last chunk is shifted left to stay full; positions that overlap are
        # recomputed to the same value.
        start = jnp.minimum(i * size, width - size)
        student_part, teacher_part, part = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, start, size, axis=1),
            (hidden, of_teacher, targets),
        )
        values = label_discrepancy(
            spec.student.unembed(head, student_part),
            teacher.unembed(teacher_head, teacher_part),
            part,
            vocab_size=spec.vocab_size,
            vocab_axis=sharding.vocab_axis(),
        )
        return lax.dynamic_update_slice_in_dim(found, values, start, axis=1)

    empty = jnp.zeros(targets.where.shape)
    return lax.fori_loop(0, -(-width // size), add_chunk, empty)


def _without_overlap(targets: Targets, overlap: int) -> Targets:
    """`targets` in which the last `overlap` tokens are read but do not count."""
    size = len(targets.where)
    counts = jnp.arange(size) < size - overlap
    return targets._replace(
        scored=targets.scored & counts,
        labelled=targets.labelled & counts,
        pairs=targets.pairs & counts,
    )


@jax.named_scope("teacher")
def _teacher_chunk(
    spec: StepLoss,
    teacher_params: PyTree,
    rows: Rows,
    outputs: TeacherOutputs | None,
) -> tuple[Leaf, PyTree]:
    """The teacher's outputs at every label, and its head where logits are needed."""
    objective, view = spec.objective, next_token_view(rows)
    if not objective.needs_teacher:
        return None, None
    if isinstance(outputs, TopKTeacher):
        if objective.span:
            raise ValueError(
                "objective.span compares whole distributions and a cached teacher has "
                "K classes; set it to 0, or pass no teacher_outputs, to run the teacher"
            )
        check_teacher(outputs, objective)
        return outputs, None
    if spec.teacher is None or teacher_params is None:
        raise ValueError(
            "objective.token and objective.span compare with a teacher, got None; pass "
            "one, or set both weights to 0 for plain fine-tuning"
        )
    if outputs is None:
        hidden = teacher_hidden(spec.teacher, teacher_params, view.inputs, rows.teacher)
    elif isinstance(outputs, Rows):
        read = next_token_view(outputs).inputs
        hidden = teacher_hidden(spec.teacher, teacher_params, read, rows.teacher)
        hidden = _at_responses(hidden, outputs, rows)
    else:
        hidden = outputs[:, : view.inputs.shape[1]]
    return lax.stop_gradient((hidden, spec.teacher.head_params(teacher_params)))


def _at_responses(
    hidden: PyTree, teacher_rows: Rows, rows: Rows
) -> RoutedHidden | Float[Array, "B T D"]:
    """Hidden states on `teacher_rows`, moved to the index of their label in `rows`.

    Only those of responses are defined: their labels are in both rows.
    """
    shift = teacher_rows.prompt_lengths - rows.prompt_lengths
    index = jnp.arange(rows.tokens.shape[1] - 1)[None] + shift[:, None]
    index = jnp.clip(index, 0, teacher_rows.tokens.shape[1] - 2)

    def move(x: Array) -> Array:
        own = index.reshape(*index.shape, *[1] * (x.ndim - 2))
        return jnp.take_along_axis(x, own, axis=1)

    return jax.tree.map(move, hidden)
