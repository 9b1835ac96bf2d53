"""The comparison of teacher and student on the first batch, before the first step.

Most runs that fail without an error are wrong from the start: a chat template that the
teacher was not trained with, a tokenizer that does not fit, the wrong checkpoint. It
shows here, and costs one forward pass of both models.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, PyTree

from mgsr_jax import losses, sharding
from mgsr_jax.loss_targets import VocabArguments
from mgsr_jax.losses import masked_sum
from mgsr_jax.routed_teachers import Teacher, teacher_hidden, teacher_names
from mgsr_jax.rows import Rows, next_token_view
from mgsr_jax.train_step import Metrics
from mgsr_jax.training.metrics import Means
from mgsr_jax.typing import STUDENT, Leaf, Model, Params

Comparison = Callable[[Params, PyTree, Rows], Metrics]
"""(all parameters, the teacher's or None, rows) -> sums over the scored positions."""


class _Chunk(NamedTuple):
    """Adjacent tokens: all that is read of them except the student's hidden states."""

    labels: Leaf
    where: Leaf
    teacher_hidden: Leaf
    teacher: Leaf


@dataclasses.dataclass(frozen=True)
class _Spec:
    """The arguments of `make_comparison`."""

    student: Model
    teacher: Teacher | None
    vocab_size: int
    dtype: DTypeLike
    chunk_size: int

    @property
    def columns(self) -> VocabArguments:
        """Arguments of the losses about the columns of logits."""
        axis = sharding.vocab_axis()
        return VocabArguments(vocab_size=self.vocab_size, vocab_axis=axis)


def make_comparison(
    student: Model,
    teacher: Teacher | None,
    *,
    vocab_size: int,
    dtype: DTypeLike,
    chunk_size: int,
) -> Comparison:
    """A jitted `metrics(params, teacher_params, rows)`: how two models read responses.

    "kl" is KL(teacher || student), "student_loss" and "teacher_loss" are the responses'
    cross-entropies, "student_entropy" and "teacher_entropy" are of the models' own
    distributions. They are in nats, per token. Without a teacher there are only the
    student's two. With several teachers there is each value as NAME/TEACHER too, over
    the tokens of this teacher's rows.

    Args:
      student, teacher: the models.
      vocab_size: columns of logits at or beyond it are padding.
      dtype: of the student's computation.
      chunk_size: tokens per device whose logits exist at a time.
    """
    spec = _Spec(student, teacher, vocab_size, dtype, chunk_size)
    return jax.jit(functools.partial(_compare, spec))


def _compare(
    spec: _Spec, params: Params, teacher_params: PyTree, rows: Rows
) -> Metrics:
    view = next_token_view(rows)
    student = jax.tree.map(lambda p: p.astype(spec.dtype), params[STUDENT])
    hidden, _ = spec.student.forward(student, view.inputs)
    of_teacher, teacher_head, route = None, None, None
    if spec.teacher is not None and teacher_params is not None:
        of_teacher = teacher_hidden(
            spec.teacher, teacher_params, view.inputs, rows.teacher
        )
        teacher_head = spec.teacher.head_params(teacher_params)
    if teacher_names(spec.teacher):
        route = jnp.broadcast_to(rows.teacher[:, None], view.labels.shape)
    by_token = P(sharding.vocab_axis())
    _, metrics = losses.chunked(
        functools.partial(_compare_chunk, spec=spec),
        {"student": spec.student.head_params(student), "teacher": teacher_head},
        hidden,
        _Chunk(view.labels, view.where, of_teacher, route),
        chunk_size=spec.chunk_size,
        overlap=0,
        where=view.where,
        batch_axes=sharding.batch_axes(),
        shared_specs={"student": by_token, "teacher": by_token},
    )
    return metrics


def _compare_chunk(
    heads: Params, hidden: Float[Array, "N D"], chunk: _Chunk, *, spec: _Spec
) -> tuple[Float[Array, ""], Metrics]:
    """Metrics of adjacent tokens; the scalar is not used, as nothing is trained."""
    student = spec.student.unembed(heads["student"], hidden)
    values = _of_model("student", student, chunk, spec)
    if spec.teacher is not None and chunk.teacher_hidden is not None:
        teacher = spec.teacher.unembed(heads["teacher"], chunk.teacher_hidden)
        values |= _of_model("teacher", teacher, chunk, spec)
        columns = spec.columns
        kl = losses.forward_kl(student, teacher, where=chunk.where, **columns)
        values["kl"] = kl
    metrics = _sums(values, chunk.where)
    for i, name in enumerate(teacher_names(spec.teacher)):
        own = chunk.where & (chunk.teacher == i)
        metrics |= _sums(values, own, f"/{name}")
    return metrics["student_loss"].total, metrics


def _of_model(
    name: str, logits: Float[Array, "N V"], chunk: _Chunk, spec: _Spec
) -> dict[str, Float[Array, "N"]]:
    """Cross-entropy and entropy of one model at each token."""
    where, columns = chunk.where, spec.columns
    loss = losses.cross_entropy(logits, chunk.labels, where=where, **columns)
    entropy = losses.entropy(logits, where=where, **columns)
    return {f"{name}_loss": loss, f"{name}_entropy": entropy}


def _sums(
    values: Mapping[str, Float[Array, "N"]], where: Bool[Array, "N"], suffix: str = ""
) -> Metrics:
    return {name + suffix: masked_sum(value, where) for name, value in values.items()}


def compare_first_batch(
    comparison: Comparison,
    params: Params,
    teacher_params: PyTree,
    micro_batches: Iterable[Rows],
) -> dict[str, float]:
    """Means over the scored positions of a batch; empty if there is none."""
    means = Means()
    for rows in micro_batches:
        means.add(comparison(params, teacher_params, rows))
    return means.take()


def describe(
    values: Mapping[str, float], vocab_size: int, *, sampled: bool = False
) -> list[str]:
    """Lines about the first batch for the log: the values, then warnings.

    The teacher should read the references better than the student does, and the student
    should be closer to it than a uniform distribution: KL(teacher || uniform) is
    log V - H(teacher). The student's own responses are more probable to the student.

    Args:
      values: from `compare_first_batch`.
      vocab_size: number of tokens, V.
      sampled: whether the responses are the student's own, not references.

    >>> describe({"student_loss": 3.0, "student_entropy": 2.5}, 50)
    ['first batch, nats per token: student loss 3.0000, entropy 2.5000']
    """
    if not values:
        return [
            "first batch: it has no references; teacher and student are compared on "
            "the first responses that the student writes"
        ]
    title = f"first {'responses of the student' if sampled else 'batch'}"
    lines = _compared(values, vocab_size, title, sampled=sampled)
    for teacher in [n.removeprefix("kl/") for n in values if n.startswith("kl/")]:
        end = f"/{teacher}"
        own = {n.removesuffix(end): v for n, v in values.items() if n.endswith(end)}
        own_title = f"{title}, rows of {teacher}"
        lines += _compared(own, vocab_size, own_title, sampled=sampled, name=teacher)
    return lines


def _compared(
    values: Mapping[str, float],
    vocab_size: int,
    title: str,
    *,
    sampled: bool,
    name: str = "",
) -> list[str]:
    """The line of the teacher of this name, or of all rows, and its warnings."""
    parts = [
        f"{role} loss {values[f'{role}_loss']:.4f}, "
        f"entropy {values[f'{role}_entropy']:.4f}"
        for role in ("teacher", "student")
        if f"{role}_loss" in values
    ]
    if "kl" not in values:
        return [f"{title}, nats per token: {parts[0]}"]
    kl, uniform = values["kl"], math.log(vocab_size) - values["teacher_entropy"]
    parts = [f"KL(teacher || student) {kl:.4f}", *parts]
    lines = [f"{title}, nats per token: {'; '.join(parts)}"]
    of_teacher = f"teacher {name}".strip()
    if not sampled and values["teacher_loss"] > values["student_loss"]:
        lines.append(
            f"warning: the {of_teacher} reads the references of the first batch worse "
            "than the student does. Check data.template, the teacher's checkpoint and "
            "the data; only a student that was fine-tuned on this data may be better"
        )
    if kl > uniform:
        lines.append(
            f"warning: KL({of_teacher} || student) is above {uniform:.4f}, which a "
            "uniform distribution would have. Check data.template and both "
            "checkpoints; only an untrained student may be that far from its teacher"
        )
    return lines
