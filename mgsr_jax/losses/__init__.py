"""Distillation losses for any JAX trainer: arrays in, one float32 per token out.

Every loss takes logits with any leading axes and of any float dtype. It computes in
float32, stops the teacher's gradient, reduces only the vocabulary axis and shifts
nothing: logits at index t are scored at index t. Masked positions are exactly 0, with
exactly zero gradient. For a mean over several micro-batches or hosts, add the results
of `masked_sum` and divide once.
"""

from mgsr_jax.losses._adaptive_kl import adaptive_kl
from mgsr_jax.losses._alpha_beta import alpha_beta_divergence
from mgsr_jax.losses._chunked import chunked, default_chunk_size
from mgsr_jax.losses._clip_network import (
    LOWER_START,
    UPPER_START,
    at_bound,
    init_clip_network,
)
from mgsr_jax.losses._clip_signal import (
    ClipFidelity,
    ClipPrior,
    ClipSignal,
    ClipUnnormalised,
)
from mgsr_jax.losses._cross_entropy import cross_entropy
from mgsr_jax.losses._dac_kl import DacKl, dac_kl, dac_kl_fixed
from mgsr_jax.losses._divergences import (
    forward_kl,
    reverse_kl,
    symmetric_kl,
    total_variation,
)
from mgsr_jax.losses._kl_mixes import entropy_gated_kl, per_class_kl
from mgsr_jax.losses._logit_difference import logit_difference
from mgsr_jax.losses._mixtures import (
    jensen_shannon,
    skewed_forward_kl,
    skewed_reverse_kl,
    taid,
)
from mgsr_jax.losses._projection import Projection, project
from mgsr_jax.losses._reduce import Sum, masked_mean, masked_sum
from mgsr_jax.losses._reverse_kl_top_k import reverse_kl_top_k
from mgsr_jax.losses._sampled_reverse_kl import sampled_reverse_kl
from mgsr_jax.losses._span import span_correlation, span_pairs
from mgsr_jax.losses._teacher import (
    TopKTeacher,
    forward_kl_top_k,
    held_mass,
    top_k_teacher,
)
from mgsr_jax.losses._threshold import threshold
from mgsr_jax.losses._token_weights import (
    acceptance_weights,
    discrepancy_weights,
    entropy,
    student_entropy_weights,
    teacher_entropy_weights,
)
from mgsr_jax.losses._top_k import top_k

__all__ = [
    "LOWER_START",
    "UPPER_START",
    "ClipFidelity",
    "ClipPrior",
    "ClipSignal",
    "ClipUnnormalised",
    "DacKl",
    "Projection",
    "Sum",
    "TopKTeacher",
    "acceptance_weights",
    "adaptive_kl",
    "alpha_beta_divergence",
    "at_bound",
    "chunked",
    "cross_entropy",
    "dac_kl",
    "dac_kl_fixed",
    "default_chunk_size",
    "discrepancy_weights",
    "entropy",
    "entropy_gated_kl",
    "forward_kl",
    "forward_kl_top_k",
    "held_mass",
    "init_clip_network",
    "jensen_shannon",
    "logit_difference",
    "masked_mean",
    "masked_sum",
    "per_class_kl",
    "project",
    "reverse_kl",
    "reverse_kl_top_k",
    "sampled_reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "span_correlation",
    "span_pairs",
    "student_entropy_weights",
    "symmetric_kl",
    "taid",
    "teacher_entropy_weights",
    "threshold",
    "top_k",
    "top_k_teacher",
    "total_variation",
]
