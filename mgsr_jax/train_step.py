"""One training step: gradients of micro-batches are summed, then applied once."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, PyTree

from mgsr_jax.losses import Sum
from mgsr_jax.objective import Objective, Weights, position_weights
from mgsr_jax.routed_teachers import Teacher
from mgsr_jax.rows import Rows
from mgsr_jax.step_loss import StepLoss, TeacherOutputs, micro_batch_loss
from mgsr_jax.typing import STUDENT, Leaf, Model, Params, PRNGKey, RowKeys

_DROPOUT_STREAM = 2**31 - 1
"""Folded into the run's key in place of a step's number; no step has this number."""


class Diverged(ArithmeticError):
    """A loss or its gradient is not finite."""


Metrics = dict[str, Sum]
TrainStep = Callable[..., tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step reads and changes, except the rows and the teacher.

    Attributes:
      step: updates made. int32 []
      key: the run's random key; a step's random numbers are folded from it by `step`.
      params: {"student": ..., "clip_network": ...}, float32; the trained parameters. A
        student with adapters has only those here: {"lora": ...}.
      opt_state: the optimizer's state.
      frozen: parameters that no step changes, by the same names: the weights under the
        adapters.
    """

    step: Leaf
    key: Leaf
    params: Leaf
    opt_state: Leaf
    frozen: Leaf = dataclasses.field(default_factory=dict)

    @property
    def all_params(self) -> Params:
        """Trained and frozen parameters together, as the models read them."""
        return _merge(self.params, self.frozen)

    @property
    def checkpointed(self) -> dict[str, Any]:
        """Every field except `frozen`, by name: the content of a checkpoint."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name != "frozen"}


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    frozen: Params | None = None,
) -> TrainState:
    """The state at step 0; by default nothing is frozen."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
        params=params,
        opt_state=optimizer.init(params),
        frozen=frozen or {},
    )


def _merge(params: Params, frozen: Params) -> Params:
    return {
        name: {**frozen.get(name, {}), **trained} for name, trained in params.items()
    }


def dropout_keys(key: PRNGKey, rows: Rows) -> RowKeys:
    """One key per row, from its example: the same however a step's rows are split.

    The student's own text for an example has another key than the data's text; several
    samples of one prompt have the same key.
    """

    def fold(example: Array, ground_truth: Array) -> PRNGKey:
        return jax.random.fold_in(jax.random.fold_in(key, example), ground_truth)

    return jax.vmap(fold)(rows.example, rows.ground_truth.astype(jnp.int32))


class _MicroBatch(NamedTuple):
    """One micro-batch, and all that belongs to it only."""

    rows: Rows
    weights: Weights
    teacher_outputs: TeacherOutputs | None


def make_train_step(
    student: Model,
    teacher: Teacher | None,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    chunk_size: int | None = None,
    dropout: bool = False,
) -> TrainStep:
    """A jitted `step(state, teacher_params, micro_batches, teacher_outputs=())`.

    The step returns the new state and metrics, as sums and counts. `state` is donated.
    `micro_batches` is a tuple of Rows of one shape; how rows are spread over it does
    not change the gradient. `teacher_outputs` is empty, or has for each micro-batch the
    outputs that are used in place of running the teacher (see `micro_batch_loss`), or
    None where the teacher is run.

    A gradient that is not finite is not applied: the state comes back unchanged except
    for `step`, and the metric "finite" is 0.

    Args:
      student: the model that is trained.
      teacher: the model that it is compared with, or `RoutedTeachers`, whose parameters
        are a tuple; without a teacher only the cross-entropy is trained.
      optimizer: from `make_optimizer`.
      objective: the three losses and their weights.
      vocab_size: columns of logits at or beyond it are padding.
      dtype: of the student's computation.
      chunk_size: tokens per device whose logits exist at a time.
      dropout: pass keys to the student's forward pass.

    Raises:
      ValueError: a field of `objective` has a value that does not work.
    """
    objective.check()
    spec = StepLoss(student, teacher, objective, vocab_size, dtype, chunk_size)
    step = functools.partial(_step, spec, optimizer, dropout)
    return jax.jit(step, donate_argnums=0)


def _step(
    spec: StepLoss,
    optimizer: optax.GradientTransformation,
    dropout: bool,
    state: TrainState,
    teacher_params: PyTree,
    micro_batches: tuple[Rows, ...],
    teacher_outputs: tuple[TeacherOutputs | None, ...] = (),
) -> tuple[TrainState, Metrics]:
    """Sum the gradients of all micro-batches, then apply them once."""
    key = _dropout_key(state) if dropout else None
    constant = state.frozen, teacher_params, key, spec
    groups = _grouped(micro_batches, teacher_outputs, spec.objective)
    sums = [_summed(state.params, constant, group) for group in groups]
    loss, metrics, grads = jax.tree.map(lambda *x: sum(x), *sums)
    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    step_values = {
        "loss": loss,
        "gradient_norm": optax.tree.norm(grads[STUDENT]),
        "finite": finite.astype(jnp.float32),
    }
    metrics |= {name: Sum(x, jnp.ones(())) for name, x in step_values.items()}
    return _update(optimizer, state, grads, finite), metrics


_Constant = tuple[Params, PyTree, PRNGKey | None, StepLoss]
"""Frozen parameters, the teacher's, the dropout key, and models with settings."""


def _loss(
    params: Params, constant: _Constant, batch: _MicroBatch
) -> tuple[Array, Metrics]:
    """The loss of one micro-batch as a function of the trained parameters."""
    frozen, teacher_params, key, spec = constant
    return micro_batch_loss(
        _merge(params, frozen),
        teacher_params,
        batch.rows,
        batch.weights,
        spec=spec,
        teacher_outputs=batch.teacher_outputs,
        dropout_keys=None if key is None else dropout_keys(key, batch.rows),
    )


def _dropout_key(state: TrainState) -> PRNGKey:
    by_stream = jax.random.fold_in(state.key, _DROPOUT_STREAM)
    return jax.random.fold_in(by_stream, state.step)


def _grouped(
    micro_batches: tuple[Rows, ...],
    teacher_outputs: tuple[TeacherOutputs | None, ...],
    objective: Objective,
) -> list[list[_MicroBatch]]:
    """The micro-batches, those with the same kind of teacher outputs together."""
    weights = position_weights(_stack(micro_batches), objective)
    teacher_outputs = teacher_outputs or (None,) * len(micro_batches)
    groups: dict[type, list[_MicroBatch]] = {}
    for i, (rows, outputs) in enumerate(
        zip(micro_batches, teacher_outputs, strict=True)
    ):
        own_weights = jax.tree.map(lambda w, i=i: w[i], weights)
        batch = _MicroBatch(rows, own_weights, outputs)
        groups.setdefault(type(outputs), []).append(batch)
    return list(groups.values())


def _summed(
    params: Params, constant: _Constant, batches: list[_MicroBatch]
) -> tuple[Array, Metrics, Params]:
    """Loss, metrics and gradient, summed over `batches` of one structure."""

    def loss_and_gradient(batch: _MicroBatch) -> tuple[Array, Metrics, Params]:
        value_and_grad = jax.value_and_grad(_loss, has_aux=True)
        (loss, metrics), grads = value_and_grad(params, constant, batch)
        return loss, metrics, grads

    if len(batches) == 1:  # a sum would need a second array for every gradient
        return loss_and_gradient(batches[0])

    def add(sums: Any, batch: _MicroBatch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, loss_and_gradient(batch)), None

    shapes = jax.eval_shape(loss_and_gradient, batches[0])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, _stack(batches))[0]


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


@jax.named_scope("update")
def _update(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    apply: Bool[Array, ""],
) -> TrainState:
    """One optimizer step; where `apply` is False only `step` is incremented."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(apply, new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    return dataclasses.replace(
        state, step=state.step + 1, params=params, opt_state=opt_state
    )


def make_validation_step(
    student: Model,
    teacher: Teacher | None,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    dtype: DTypeLike = jnp.float32,
    chunk_size: int | None = None,
) -> Callable[..., Metrics]:
    """A jitted `metrics(params, teacher_params, rows, teacher_outputs=None)`.

    It has every part of the loss, without gradients.

    The cross-entropy is always reported, whatever its weight in training, and so is the
    teacher's as "teacher_sft": a teacher that is worse than its student on the data's
    text was loaded, templated or tokenised wrongly.

    Raises:
      ValueError: a field of `objective` has a value that does not work.
    """
    objective = dataclasses.replace(objective, sft=objective.sft or 1.0)
    objective.check()
    spec = StepLoss(
        student,
        teacher,
        objective,
        vocab_size,
        dtype,
        chunk_size,
        score_teacher=True,
    )

    def metrics(
        params: Params,
        teacher_params: PyTree,
        rows: Rows,
        teacher_outputs: TeacherOutputs | None = None,
    ) -> Metrics:
        weights = position_weights(rows, objective)
        arguments = params, teacher_params, rows, weights
        return micro_batch_loss(*arguments, spec=spec, teacher_outputs=teacher_outputs)[
            1
        ]

    return jax.jit(metrics)
