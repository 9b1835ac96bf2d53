"""The objective of MGSR on one page: what is revised, and how much each part counts.

  L = sft * L_sft + token * L_token + span * L_span        (paper: plain sum, weights 1)

  L_sft    cross-entropy on the labels, ground-truth rows only (our choice: on the
           student's own samples it would teach its errors)
  L_token  DAC-KL on every scored position, or another divergence in its place
  L_span   span correlation on every scored pair of neighbours in one phrase

Each is a mean over its own count, taken once over the whole step: over all hosts,
devices and micro-batches. The counts depend on masks alone, so weights come first:
every position gets lambda_i / N_i, a micro-batch's loss is one weighted sum, and the
gradients of micro-batches add up to the gradient of the step, however it was split.

So too within a micro-batch: logits exist for a chunk of its scored tokens at a time.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from mgsr_jax import losses, sharding
from mgsr_jax.losses import Projection, Sum, TopKTeacher, masked_sum
from mgsr_jax.losses._chunked import default_chunk_size
from mgsr_jax.losses._dac_kl import LOWER_START, UPPER_START, at_bound
from mgsr_jax.rows import NextTokenView, Rows, next_token_view
from mgsr_jax.typing import Leaf, Model, Params, RowKeys

Divergence = Literal[
    "dac_kl",
    "dac_kl_fixed",
    "forward_kl",
    "reverse_kl",
    "symmetric_kl",
    "total_variation",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "alpha_beta_divergence",
    "taid",
]
DIVERGENCES = get_args(Divergence)

# What the others than these read beside the temperature.
SETTINGS = {
    "jensen_shannon": ("beta",),
    "skewed_forward_kl": ("alpha",),
    "skewed_reverse_kl": ("alpha",),
    "adaptive_kl": ("head_mass",),
    "alpha_beta_divergence": ("alpha", "beta"),
    "taid": ("mix",),
}

PARTS = 8
"""In which the losses of a chunk's logits are computed, one after the other."""

START = {"lower": LOWER_START, "upper": UPPER_START}
"""Of DAC-KL's limits; their variances are reported around it."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights of the three losses and the settings of the token-level one.

    Attributes:
      sft: weight of the cross-entropy on ground-truth labels.
      token: weight of the token-level divergence.
      span: weight of the span correlation.
      divergence: "dac_kl" (limits from the clip network), "dac_kl_fixed" (limits
        `lower` and `upper`), or one of the whole distribution, by its function's name.
      num_candidates: most probable teacher classes that DAC-KL chooses from.
      width: softness of DAC-KL's mask, in quantiles.
      normalization: "teacher" renormalises what is kept of the teacher; "none".
      prior_weight: pulls the learned limits to (0.1, 0.98); 0 is the paper.
      lower: lower quantile limit of "dac_kl_fixed".
      upper: upper quantile limit of "dac_kl_fixed".
      temperature: of all but DAC-KL, which has none.
      alpha: of the skewed KLs and "alpha_beta_divergence"; none: the function's own.
      beta: of "jensen_shannon" and "alpha_beta_divergence"; none: the function's own.
      head_mass: of "adaptive_kl"; none: the function's own.
      mix: of "taid", the teacher's share, which it needs; the same over the whole run.
    """

    sft: float = 1.0
    token: float = 1.0
    span: float = 1.0
    divergence: Divergence = "dac_kl"
    num_candidates: int = 512
    width: float = 0.01
    normalization: Literal["teacher", "none"] = "teacher"
    prior_weight: float = 10.0
    lower: float = 0.1
    upper: float = 0.98
    temperature: float = 1.0
    alpha: float | None = None
    beta: float | None = None
    head_mass: float | None = None
    mix: float | None = None

    @property
    def needs_teacher(self) -> bool:
        """Whether any part compares with a teacher."""
        return self.token != 0 or self.span != 0

    @property
    def needs_clip_network(self) -> bool:
        """Whether DAC-KL's limits are learned."""
        return self.token != 0 and self.divergence == "dac_kl"


class Weights(NamedTuple):
    """lambda_i / max(N_i, 1) at the positions that part i scores, 0 elsewhere."""

    sft: Float[Array, "*A B T"]
    token: Float[Array, "*A B T"]
    span: Float[Array, "*A B T"]


def position_weights(rows: Rows, objective: Objective) -> Weights:
    """The weights of every position of a step's rows, `[A, B, S]` or `[B, S]`."""
    view = next_token_view(rows)

    def spread(weight: float, where: Array) -> Array:
        return where * (weight / jnp.maximum(jnp.sum(where), 1))

    return Weights(
        sft=spread(objective.sft, _labelled(rows, view)),
        token=spread(objective.token, view.where),
        span=spread(objective.span, losses.span_pairs(view.span_ids, view.where)),
    )


class Chunk(NamedTuple):
    """Neighbouring tokens of a micro-batch: what their losses read beside `hidden`.

    Attributes:
      labels, span_ids, where: as in `next_token_view`. [N]
      scored: `where`, and its loss counts in this chunk. [N]
      labelled: so too, and the label is the data's own. [N]
      pairs: so too, with the next token, in one phrase. [N]
      weights: of the three losses. [N] each
      teacher: its hidden states [N, D], its K classes, or None.
    """

    labels: Leaf
    span_ids: Leaf
    where: Leaf
    scored: Leaf
    labelled: Leaf
    pairs: Leaf
    weights: Leaf
    teacher: Leaf


def micro_batch_loss(
    params: Params,
    teacher_params: Params | None,
    rows: Rows,
    weights: Weights,
    *,
    student: Model,
    teacher: Model | None,
    objective: Objective,
    vocab_size: int | None,
    cached: TopKTeacher | Array | None = None,
    dtype: Any = jnp.float32,
    chunk_size: int | None = None,
    score_teacher: bool = False,
    dropout_keys: RowKeys | None = None,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The weighted sum of the three losses over `rows` [B, S], and metrics as sums.

    `params` holds "student" and, where limits are learned, "clip_network"; `dtype` is
    that of the student's computation. `cached` is there in place of running the
    teacher: its classes at each position of `next_token_view`, or its hidden states at
    each of `rows`. `score_teacher` adds its cross-entropy on the labels to the metrics.
    Logits exist for `chunk_size` tokens on each device at a time; None: our choice.
    `dropout_keys`, one a row, are for a student whose forward pass takes them.

    Raises:
      ValueError: a part compares with a teacher and there is none, or K classes.
    """
    view = next_token_view(rows)
    cast = jax.tree.map(lambda p: p.astype(dtype), params["student"])
    own: Any = {} if dropout_keys is None else {"dropout_keys": dropout_keys}
    hidden, _ = student.forward(cast, view.inputs, **own)
    said, teacher_head = _teacher_of(teacher, teacher_params, view, objective, cached)
    head = student.head_params(params["student"])
    shared = {
        # Not the cast copy: each chunk's gradient is added up in float32.
        "head": jax.tree.map(lambda p: Projection(p) if p.ndim == 2 else p, head),
        "teacher_head": teacher_head,
        "clip_network": params.get("clip_network"),
    }
    chunk = Chunk(
        labels=view.labels,
        span_ids=view.span_ids,
        where=view.where,
        scored=view.where,
        labelled=_labelled(rows, view),
        pairs=losses.span_pairs(view.span_ids, view.where),
        weights=weights,
        teacher=said,
    )
    overlap, by_token = 1 if objective.span else 0, P(sharding.vocab_axis())
    fn = functools.partial(
        chunk_loss,
        student=student,
        teacher=teacher,
        objective=objective,
        vocab_size=vocab_size,
        dtype=dtype,
        overlap=overlap,
        score_teacher=score_teacher,
    )
    return losses.chunked(
        fn,
        shared,
        hidden,
        chunk,
        chunk_size=chunk_size or default_chunk_size(student.config.vocab_size),
        overlap=overlap,
        where=view.where,
        batch_axes=sharding.batch_axes(),
        shared_specs={"head": by_token, "teacher_head": by_token, "clip_network": P()},
    )


def chunk_loss(
    shared: Params,
    hidden: Float[Array, "N D"],
    chunk: Chunk,
    *,
    student: Model,
    teacher: Model | None,
    objective: Objective,
    vocab_size: int | None,
    dtype: Any,
    overlap: int,
    score_teacher: bool,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """The three losses of neighbouring tokens: weighted sum, and metrics.

    The last `overlap` tokens begin the next chunk: the span loss reads them here, none
    counts them. Logits are formed at once, for a head is read whole; their losses,
    which need many times their memory, in `PARTS` parts.
    """
    head = jax.tree.map(lambda p: p.astype(dtype), shared["head"])
    student_logits, said = student.unembed(head, hidden), chunk.teacher
    if teacher is not None and said is not None and not isinstance(said, TopKTeacher):
        said = teacher.unembed(shared["teacher_head"], said)
    fn = functools.partial(
        logits_loss,
        objective=objective,
        vocab_size=vocab_size,
        overlap=overlap,
        score_teacher=score_teacher,
    )
    return losses.chunked(
        fn,
        shared["clip_network"],
        student_logits,
        _own(chunk._replace(teacher=said), overlap),
        chunk_size=-(-len(hidden) // PARTS) + overlap,
        overlap=overlap,
        batch_axes=sharding.batch_axes(),
    )


def logits_loss(
    clip_params: Params | None,
    student_logits: Float[Array, "N V"],
    chunk: Chunk,
    *,
    objective: Objective,
    vocab_size: int | None,
    overlap: int,
    score_teacher: bool,
) -> tuple[Float[Array, ""], dict[str, Sum]]:
    """What `chunk_loss` computes, of logits; those of the teacher are in `chunk`."""
    chunk = _own(chunk, overlap)
    total, metrics = jnp.zeros(()), {}
    columns: Any = dict(vocab_size=vocab_size, vocab_axis=sharding.vocab_axis())
    if objective.sft:
        values = losses.cross_entropy(
            student_logits, chunk.labels, where=chunk.labelled, **columns
        )
        total += jnp.sum(chunk.weights.sft * values)
        metrics["sft"] = masked_sum(values, chunk.labelled)
    if chunk.teacher is None:
        return total, metrics

    if score_teacher and not isinstance(chunk.teacher, TopKTeacher):
        values = losses.cross_entropy(
            chunk.teacher, chunk.labels, where=chunk.labelled, **columns
        )
        metrics["teacher_sft"] = masked_sum(values, chunk.labelled)
    if objective.token:
        values, found = token_loss(
            clip_params,
            student_logits,
            chunk.teacher,
            chunk.scored,
            objective=objective,
            **columns,
        )
        total += jnp.sum(chunk.weights.token * values)
        metrics |= found
    if objective.span:
        values = losses.span_correlation(
            student_logits,
            chunk.teacher,
            chunk.span_ids,
            where=chunk.where,
            **columns,
        )
        total += jnp.sum(jnp.where(chunk.pairs, chunk.weights.span * values, 0.0))
        metrics["span"] = masked_sum(values, chunk.pairs)
    return total, metrics


def _own(chunk: Chunk, overlap: int) -> Chunk:
    """Without losses of the last `overlap` tokens, which are there to be read."""
    own = jnp.arange(len(chunk.where)) < len(chunk.where) - overlap
    return chunk._replace(
        scored=chunk.scored & own,
        labelled=chunk.labelled & own,
        pairs=chunk.pairs & own,
    )


def token_loss(
    clip_params: Params | None,
    student_logits: Float[Array, "*B V"],
    teacher: Float[Array, "*B W"] | TopKTeacher,
    where: Bool[Array, "*B"],
    *,
    objective: Objective,
    **columns: Any,
) -> tuple[Float[Array, "*B"], dict[str, Sum]]:
    """The chosen divergence at every scored position, and what DAC-KL kept.

    Raises:
      ValueError: an unknown divergence.
    """
    if objective.divergence not in DIVERGENCES:
        raise ValueError(
            f"objective.divergence={objective.divergence!r}; expected one of "
            f"{DIVERGENCES}"
        )
    settings: dict[str, Any] = dict(where=where, **columns)
    if not objective.divergence.startswith("dac_kl"):
        values = _whole_divergence(student_logits, teacher, objective, settings)
        return values, {objective.divergence: masked_sum(values, where)}
    settings |= dict(width=objective.width, normalization=objective.normalization)
    if objective.divergence == "dac_kl":
        result = losses.dac_kl(
            clip_params,
            student_logits,
            teacher,
            prior_weight=objective.prior_weight,
            **settings,
        )
    else:
        result = losses.dac_kl_fixed(
            (objective.lower, objective.upper),
            student_logits,
            teacher,
            num_candidates=objective.num_candidates,
            **settings,
        )
    reported = {
        "lower": result.lower,
        "lower_variance": jnp.square(result.lower - START["lower"]),
        "upper": result.upper,
        "upper_variance": jnp.square(result.upper - START["upper"]),
        "at_bound": at_bound(result.lower, result.upper),
        "kept_mass": result.kept_mass,
        "kept_classes": result.kept_classes,
        "candidate_mass": result.candidate_mass,
    }
    metrics = {name: masked_sum(values, where) for name, values in reported.items()}
    return result.loss, {objective.divergence: masked_sum(result.loss, where)} | metrics


def _whole_divergence(
    student_logits: Float[Array, "*B V"],
    teacher: Float[Array, "*B W"] | TopKTeacher,
    objective: Objective,
    settings: dict[str, Any],
) -> Float[Array, "*B"]:
    """One of those that look at every class; of a cached teacher, at K and a tail."""
    name = objective.divergence
    if isinstance(teacher, TopKTeacher):
        if name != "forward_kl":
            raise ValueError(
                f"objective.divergence={name!r} needs the teacher's whole distribution "
                "and a cached teacher has K classes; use forward_kl or a DAC-KL"
            )
        if objective.temperature != 1:
            raise ValueError(
                f"objective.temperature={objective.temperature}; a cached teacher is "
                "known at temperature 1 alone"
            )
        return losses.forward_kl_top_k(student_logits, teacher, **settings)
    chosen = {field: getattr(objective, field) for field in SETTINGS.get(name, ())}
    settings |= {field: x for field, x in chosen.items() if x is not None}
    return getattr(losses, name)(
        student_logits, teacher, temperature=objective.temperature, **settings
    )


def _teacher_of(
    teacher: Model | None,
    teacher_params: Params | None,
    view: NextTokenView,
    objective: Objective,
    cached: TopKTeacher | Array | None,
) -> tuple[Any, Any]:
    """What the teacher says at every position, and its head where that is needed."""
    if not objective.needs_teacher:
        return None, None
    if isinstance(cached, TopKTeacher):
        if objective.span:
            raise ValueError(
                "objective.span compares whole distributions and a cached teacher has "
                "K classes; set it to 0, or pass cached=None to run the teacher"
            )
        return cached, None
    if teacher is None or teacher_params is None:
        raise ValueError(
            "objective.token and objective.span compare with a teacher, got None; pass "
            "one, or set both weights to 0 for plain fine-tuning"
        )
    if cached is None:
        cached, _ = teacher.forward(teacher_params, view.inputs)
    hidden = cached[:, : view.inputs.shape[1]]
    return lax.stop_gradient((hidden, teacher.head_params(teacher_params)))


def _labelled(rows: Rows, view: NextTokenView) -> Bool[Array, "*B T"]:
    return view.where & rows.ground_truth[..., None]
