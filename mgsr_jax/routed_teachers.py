"""Several teachers that divide the rows of a step between them.

Every row names its teacher (`Rows.teacher`), and the student is compared with only that
one at the row's tokens. A model runs on a micro-batch, and forms the logits of a chunk,
only where one of the rows is its own. With rows ordered by teacher a step costs about
as much as with one teacher.
"""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from mgsr_jax import sharding
from mgsr_jax.typing import Leaf, Model, Params

M = TypeVar("M", bound=Model, covariant=True)


class RoutedHidden(NamedTuple):
    """Hidden states of several models, and the one that counts at each position.

    Attributes:
      hidden: of every model; zeros where it did not run. [..., D] each
      model: index of the model that counts; -1 for none. [...]
    """

    hidden: tuple[Leaf, ...]
    model: Leaf


@dataclasses.dataclass(frozen=True)
class RoutedTeachers(Generic[M]):
    """Several teachers with one vocabulary; hashable, so static under `jax.jit`.

      z_bt = unembed_k(forward_k(tokens_b)_t),   k the model of row b's teacher

    Their parameters are a tuple, one tree per model. The heads of all models are
    all-gathered over fsdp for every micro-batch, whichever of them it needs.

    Attributes:
      names: name of each teacher; `Rows.teacher` is an index into them.
      models: the different models. Their logits have the same number of columns.
      model_of: index of each teacher's model: two names may share one.
    """

    names: tuple[str, ...]
    models: tuple[M, ...]
    model_of: tuple[int, ...]

    def forward(
        self,
        params: tuple[Params, ...],
        tokens: Int[Array, "B T"],
        teacher: Int[Array, "B"],
    ) -> RoutedHidden:
        """Hidden states on `tokens` of the models that one of the rows is routed to."""
        # A teacher of -1, of a row that fills up a batch, has no model.
        model = jnp.full_like(teacher, -1)
        for i, own in enumerate(self.model_of):
            model = jnp.where(teacher == i, own, model)
        hidden = tuple(
            _forward_where(jnp.any(model == i), own, params[i], tokens)
            for i, own in enumerate(self.models)
        )
        return RoutedHidden(hidden, jnp.broadcast_to(model[:, None], tokens.shape))

    def head_params(self, params: tuple[Params, ...]) -> tuple[Params, ...]:
        """The part of each model's parameters that `unembed` reads."""
        pairs = zip(self.models, params, strict=True)
        return tuple(model.head_params(own) for model, own in pairs)

    def unembed(
        self, heads: tuple[Params, ...], hidden: RoutedHidden
    ) -> Float[Array, "*B V"]:
        """Logits of each position's model; zeros where there is none.

        Raises:
          ValueError: the models' logits have different numbers of columns.
        """
        self._check_columns(heads, hidden)
        # Zeros of the right type for a shard_map; the logits are not computed.
        logits = jnp.zeros_like(self.models[0].unembed(heads[0], hidden.hidden[0]))
        for i, model in enumerate(self.models):
            own = hidden.model == i
            logits = _unembed_where(own, model, heads[i], hidden.hidden[i], logits)
        return logits

    def _check_columns(self, heads: tuple[Params, ...], hidden: RoutedHidden) -> None:
        triples = zip(self.models, heads, hidden.hidden, strict=True)
        shapes = [jax.eval_shape(m.unembed, head, own) for m, head, own in triples]
        columns = [shape.shape[-1] for shape in shapes]
        if len(set(columns)) > 1:
            raise ValueError(
                f"the teachers' logits have {columns} columns; expected the same "
                "number: pad the embeddings and heads to the largest"
            )


Teacher = Model | RoutedTeachers
"""What the student is compared with: one model, or several that divide the rows."""


def teacher_names(teacher: Teacher | None) -> tuple[str, ...]:
    """Names of several teachers; empty for one model or none."""
    return teacher.names if isinstance(teacher, RoutedTeachers) else ()


def teacher_hidden(
    teacher: Teacher,
    params: PyTree,
    tokens: Int[Array, "B T"],
    route: Int[Array, "B"] | None,
) -> RoutedHidden | Float[Array, "B T D"]:
    """Hidden states of each row's teacher on `tokens`.

    Args:
      teacher: one model, or several.
      params: its parameters; of several a tuple.
      tokens: the rows that it reads.
      route: `Rows.teacher` of these rows.

    Raises:
      ValueError: there are several teachers, and the rows name none.
    """
    if not isinstance(teacher, RoutedTeachers):
        return teacher.forward(params, tokens)[0]
    if route is None:
        raise ValueError(
            "Rows.teacher is None, but there are several teachers "
            f"({', '.join(teacher.names)}); set it to the index of each row's teacher"
        )
    return teacher.forward(params, tokens, route)


def _forward_where(
    wanted: Bool[Array, ""], model: Model, params: Params, tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """Hidden states, or zeros if they are not wanted. `wanted` is a global value, so
    that all devices take the same branch: a model's layers exchange data."""

    def run() -> Float[Array, "B T D"]:
        return model.forward(params, tokens)[0]

    def skip() -> Float[Array, "B T D"]:
        shape = jax.eval_shape(run)
        zeros = jnp.zeros(shape.shape, shape.dtype)
        return sharding.constrain(zeros, sharding.BATCH)

    return lax.cond(wanted, run, skip)


def _unembed_where(
    own: Bool[Array, "*B"],
    model: Model,
    head: Params,
    hidden: Float[Array, "*B D"],
    logits: Float[Array, "*B V"],
) -> Float[Array, "*B V"]:
    """`logits` with those of `model` at its own positions."""

    def fill() -> Float[Array, "*B V"]:
        return jnp.where(own[..., None], model.unembed(head, hidden), logits)

    return lax.cond(jnp.any(own), fill, lambda: logits)
