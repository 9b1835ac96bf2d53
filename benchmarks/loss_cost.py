"""Time value and gradient of each loss against forward KL, on dense logits.

Every loss is timed in turn with `forward_kl` on the same logits. The median of the
ratios is printed. Models and heads, which make the logits, are not included.

    python benchmarks/loss_cost.py      # a few minutes on two CPU cores

A name ending in "_weights" is forward KL times these token weights.
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import _pairs
import jax
import jax.numpy as jnp

from mgsr_jax import losses

CLIP = losses.init_clip_network(jax.random.key(0))


def top_k(student: Any, teacher: Any) -> Any:
    """The top-K loss with 256 classes, the reduction of the teacher included."""
    return losses.forward_kl_top_k(student, losses.top_k_teacher(teacher, 256))


def spans(student: Any, teacher: Any) -> Any:
    """Span correlation with phrases of three tokens."""
    return losses.span_correlation(student, teacher, jnp.arange(len(student)) // 3)


def sampled(student: Any, teacher: Any) -> Any:
    """The sampled-token reverse KL, on the teacher's most probable tokens."""
    tokens = jnp.argmax(teacher, -1)
    return losses.sampled_reverse_kl(student, teacher, tokens)


def union(student: Any, teacher: Any) -> Any:
    """The top-K reverse KL on the classes of both models."""
    return losses.reverse_kl_top_k(student, teacher, support="union")


def weighted(weights: Any, student: Any, teacher: Any) -> Any:
    """Forward KL times token weights."""
    return weights * losses.forward_kl(student, teacher)


def discrepancy(student: Any, teacher: Any) -> Any:
    """Weights by the models' difference on the teacher's most probable tokens."""
    labels = jnp.argmax(teacher, -1)
    both = (losses.cross_entropy(x, labels) for x in (student, teacher))
    return losses.discrepancy_weights(jnp.abs(jnp.subtract(*both)))


LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda s, t: losses.cross_entropy(s, jnp.argmax(t, -1)),
    "forward_kl": losses.forward_kl,
    "reverse_kl": losses.reverse_kl,
    "symmetric_kl": losses.symmetric_kl,
    "total_variation": losses.total_variation,
    "jensen_shannon": losses.jensen_shannon,
    "skewed_forward_kl": losses.skewed_forward_kl,
    "skewed_reverse_kl": losses.skewed_reverse_kl,
    "adaptive_kl": losses.adaptive_kl,
    "alpha_beta_divergence": losses.alpha_beta_divergence,
    "taid": lambda s, t: losses.taid(s, t, mix=0.5),
    "entropy_gated_kl": losses.entropy_gated_kl,
    "per_class_kl": losses.per_class_kl,
    "logit_difference": losses.logit_difference,
    "reverse_kl_top_k": losses.reverse_kl_top_k,
    "reverse_kl_top_k_union": union,
    "sampled_reverse_kl": sampled,
    "forward_kl_top_k": top_k,
    "dac_kl": lambda s, t: losses.dac_kl(CLIP, s, t).loss,
    "dac_kl_fixed": lambda s, t: losses.dac_kl_fixed((0.1, 0.98), s, t).loss,
    "span_correlation": spans,
    "student_entropy_weights": lambda s, t: weighted(
        losses.student_entropy_weights(s), s, t
    ),
    "teacher_entropy_weights": lambda s, t: weighted(
        losses.teacher_entropy_weights(t), s, t
    ),
    "acceptance_weights": lambda s, t: weighted(losses.acceptance_weights(s, t), s, t),
    "discrepancy_weights": lambda s, t: weighted(discrepancy(s, t), s, t),
}


def gradient_of(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled value and gradient of the summed loss."""
    return jax.jit(jax.value_and_grad(lambda s, t: jnp.sum(loss(s, t))))


def call(run: Callable[..., Any], *arguments: Any) -> None:
    """Call `run` and wait for its result."""
    jax.block_until_ready(run(*arguments))


def main() -> None:
    """Print one line per loss."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[*LOSSES], choices=[*LOSSES])
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    shape = (2, args.tokens, args.vocabulary)
    student, teacher = 2 * jax.random.normal(jax.random.key(1), shape)
    plain = gradient_of(losses.forward_kl)
    print(
        f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {args.tokens} tokens, "
        f"V = {args.vocabulary}: time / that of forward_kl, median (min-max)"
    )
    for name in args.only:
        run = gradient_of(LOSSES[name])
        runs = {
            side: _pairs.timed(functools.partial(call, function, student, teacher))
            for side, function in (("forward_kl", plain), ("loss", run))
        }
        rounds = _pairs.alternate(args.pairs, runs)
        ratios = _pairs.ratios(rounds, "loss", "forward_kl")
        print(
            f"{name:24}{statistics.median(ratios):6.2f}"
            f"  ({min(ratios):.2f}-{max(ratios):.2f})",
            flush=True,
        )


if __name__ == "__main__":
    main()
