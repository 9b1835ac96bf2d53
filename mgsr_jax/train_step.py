"""One optimizer step: gradients of micro-batches summed, then one update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from mgsr_jax.losses import Sum, TopKTeacher
from mgsr_jax.objective import Objective, Weights, micro_batch_loss, position_weights
from mgsr_jax.rows import Rows
from mgsr_jax.typing import STUDENT, Leaf, Model, Params, PRNGKey, RowKeys

_DROPOUT = 2**31 - 1
"""Folded into the run's key where others fold a step: no step has this number."""


class Diverged(ArithmeticError):
    """A loss or its gradient is not finite."""


Metrics = dict[str, Sum]
TrainStep = Callable[..., tuple["TrainState", Metrics]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes.

    Attributes:
      step: updates made. int32 []
      key: the run's random key; what a step draws is folded from it by `step`.
      params: {"student": ..., "clip_network": ...}, float32; what is trained. Of a
        student with adapters those alone: {"lora": ...}.
      opt_state: the optimizer's.
      frozen: what no step changes, by the same names: the rest of such a student.
    """

    step: Leaf
    key: Leaf
    params: Leaf
    opt_state: Leaf
    frozen: Leaf = dataclasses.field(default_factory=dict)

    @property
    def whole(self) -> Params:
        """All parameters, trained or not, as the models read them."""
        return _whole(self.params, self.frozen)

    @property
    def changing(self) -> dict[str, Any]:
        """All but what is frozen, by its field: what a checkpoint holds."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name != "frozen"}


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    seed: int,
    *,
    frozen: Params | None = None,
) -> TrainState:
    """Step 0; nothing is frozen by default."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        key=jax.random.key(seed),
        params=params,
        opt_state=optimizer.init(params),
        frozen=frozen or {},
    )


def _whole(params: Params, frozen: Params) -> Params:
    return {name: {**frozen.get(name, {}), **own} for name, own in params.items()}


def dropout_keys(key: PRNGKey, rows: Rows) -> RowKeys:
    """One a row, by its example: however a step's rows are split, they are the same.

    The student's own text has another than the data's for the same example.
    """

    def fold(example: Array, ground_truth: Array) -> PRNGKey:
        return jax.random.fold_in(jax.random.fold_in(key, example), ground_truth)

    return jax.vmap(fold)(rows.example, rows.ground_truth.astype(jnp.int32))


def make_train_step(
    student: Model,
    teacher: Model | None,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    chunk_size: int | None = None,
    dropout: bool = False,
) -> TrainStep:
    """A jitted `step(state, teacher_params, micro_batches, cached=()) -> (state, ...)`.

    `state` is donated. `micro_batches` is a tuple of Rows of one shape; how rows are
    spread over it does not change the gradient. `cached` is empty, or has for each
    micro-batch what stands for running the teacher, see `micro_batch_loss`, None where
    it is to be run. The second result is metrics, sums and counts. `dropout` gives keys
    to the student's forward pass.
    An update with a gradient that is not finite is not made: the state comes back as it
    was, but for `step`, and the metric "finite" says so.
    """
    loss = functools.partial(
        _loss,
        student=student,
        teacher=teacher,
        objective=objective,
        vocab_size=vocab_size,
        dtype=dtype,
        chunk_size=chunk_size,
    )
    loss_of = jax.value_and_grad(loss, has_aux=True)

    def step(
        state: TrainState,
        teacher_params: Any,
        micro_batches: tuple[Rows, ...],
        cached: tuple[TopKTeacher | Array | None, ...] = (),
    ) -> tuple[TrainState, Metrics]:
        cached = cached or (None,) * len(micro_batches)
        weights = position_weights(_stack(micro_batches), objective)
        batches = [
            (rows, jax.tree.map(lambda w, i=i: w[i], weights), said)
            for i, (rows, said) in enumerate(zip(micro_batches, cached, strict=True))
        ]
        kinds = {}
        for batch in batches:
            kinds.setdefault(type(batch[2]), []).append(batch)
        key = None
        if dropout:
            key = jax.random.fold_in(
                jax.random.fold_in(state.key, _DROPOUT), state.step
            )
        given = (state.params, state.frozen, teacher_params, key)
        parts = [_summed(loss_of, given, kind) for kind in kinds.values()]
        loss, metrics, grads = jax.tree.map(lambda *x: sum(x), *parts)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        metrics |= {
            name: Sum(value, jnp.ones(()))
            for name, value in (
                ("loss", loss),
                ("gradient_norm", optax.tree.norm(grads[STUDENT])),
                ("finite", finite.astype(jnp.float32)),
            )
        }
        return _update(optimizer, state, grads, finite), metrics

    return jax.jit(step, donate_argnums=0)


def _loss(
    params: Params,
    frozen: Params,
    teacher_params: Any,
    key: PRNGKey | None,
    rows: Rows,
    weights: Weights,
    cached: Any,
    **settings: Any,
) -> tuple[Array, Metrics]:
    """Of one micro-batch; the first argument is what it is differentiated by."""
    return micro_batch_loss(
        _whole(params, frozen),
        teacher_params,
        rows,
        weights,
        cached=cached,
        dropout_keys=None if key is None else dropout_keys(key, rows),
        **settings,
    )


def _summed(
    loss_of: Callable[..., Any], given: tuple[Any, ...], batches: list[Any]
) -> Any:
    """Loss, metrics and gradient, summed over `batches` of one form."""
    if len(batches) == 1:  # no second array for every gradient
        (loss, metrics), grads = loss_of(*given, *batches[0])
        return loss, metrics, grads

    def one(carry: Any, batch: Any) -> Any:
        (loss, metrics), grads = loss_of(*given, *batch)
        return jax.tree.map(jnp.add, carry, (loss, metrics, grads)), None

    shapes = jax.eval_shape(loss_of, *given, *batches[0])
    (loss, metrics), grads = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(one, (loss, metrics, grads), _stack(batches))[0]


def _stack(trees: Any) -> Any:
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


def _update(
    optimizer: optax.GradientTransformation, state: TrainState, grads: Any, apply: Array
) -> TrainState:
    """One optimizer step; where `apply` is False only the step is counted."""
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
    teacher: Model | None,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    dtype: Any = jnp.float32,
    chunk_size: int | None = None,
) -> Callable[..., Metrics]:
    """A jitted `metrics(params, teacher_params, rows)`: every part, without a gradient.

    The cross-entropy is always among them, whatever its weight in training, and the
    teacher's own as "teacher_sft": a teacher that is worse than its student on the
    data's text was loaded, templated or tokenised wrongly.
    """
    objective = dataclasses.replace(objective, sft=objective.sft or 1.0)

    def metrics(params: Params, teacher_params: Any, rows: Rows) -> Metrics:
        weights = position_weights(rows, objective)
        return micro_batch_loss(
            params,
            teacher_params,
            rows,
            weights,
            student=student,
            teacher=teacher,
            objective=objective,
            vocab_size=vocab_size,
            dtype=dtype,
            chunk_size=chunk_size,
            score_teacher=True,
        )[1]

    return jax.jit(metrics)
