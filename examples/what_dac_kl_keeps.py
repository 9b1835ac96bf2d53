"""Draw what DAC-KL keeps of a teacher's distributions: the figure of docs/losses.md.

    python examples/what_dac_kl_keeps.py --teacher models/teacher \
        --data dolly/valid.jsonl --output docs/what_dac_kl_keeps.png

The figure covers every scored position of the first responses, with the limits that
the clip network starts from, (0.1, 0.98). About a minute on two CPU cores for a 135M
teacher.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from mgsr_jax import losses, models
from mgsr_jax.checkpoint import hf
from mgsr_jax.data import dataset
from mgsr_jax.data.batches import eval_batches
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.rows import next_token_view

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

LOWER, UPPER, WIDTH, CANDIDATES = 0.1, 0.98, 0.01, 512
SHOWN = (0.3, 0.6, 0.9)  # quantiles of the entropy, from certain to open positions
KEPT, CLIPPED = "#1f6f8b", "#c8cdd0"


def distributions(args, tokenizer):
    """Log-probabilities of N scored positions, [N, V], and the text before each."""
    model = models.from_config(args.teacher)
    params = hf.load_params(args.teacher, model)
    width = args.max_length
    encoding = Encoding(max_prompt_length=width // 2, max_length=width)
    rows, _ = dataset.load(args.data, tokenizer, encoding, chunker=None)
    size = len(tokenizer)

    @jax.jit
    def log_probs(params, tokens, first):
        hidden, _ = model.forward(params, tokens)
        # A fixed number of positions per row, from the prompt's last token on.
        at = jnp.minimum(first[:, None] + jnp.arange(args.positions)[None], width - 2)
        chosen = jnp.take_along_axis(hidden, at[..., None], axis=1)
        logits = model.unembed(model.head_params(params), chosen)
        return jax.nn.log_softmax(logits[..., :size]), at

    scored, before = [], []
    chosen = rows.select(range(min(args.examples, len(rows))))
    for batch in eval_batches(chosen, 4, widths=[width]):
        view = next_token_view(batch)
        log_p, at = jax.device_get(
            log_probs(params, view.inputs, batch.prompt_lengths - 1)
        )
        for b, t in zip(
            *np.nonzero(np.take_along_axis(view.where, at, 1)), strict=True
        ):
            scored.append(log_p[b, t])
            before.append(tokenizer.decode(batch.tokens[b, : at[b, t] + 1][-7:]))
    return np.stack(scored), before


def kept_weights(p):
    """DAC-KL's mask over candidates `p` in descending order, [K], in numpy."""
    others = p[p < p[0]]
    rest = 1 - (p.sum() - others.sum())
    above = (others > others[:, None]) @ others
    equal = (others == others[:, None]) @ others
    level = 1 - (above + equal / 2) / rest

    def sigmoid(x):
        return 1 / (1 + np.exp(-np.clip(x, -700, 700)))

    kept = sigmoid((level - LOWER) / WIDTH) * sigmoid((UPPER - level) / WIDTH)
    return np.concatenate([np.ones(len(p) - len(others)), kept])


def draw_position(axis, log_p, before, tokenizer):
    """Draw probability by rank; kept classes are dark."""
    order = np.argsort(-log_p)[:CANDIDATES]
    p = np.exp(log_p[order].astype(np.float64))
    weight, rank = kept_weights(p), np.arange(1, len(p) + 1)
    axis.vlines(rank, 1e-7, p, color=CLIPPED, linewidth=1.5)
    axis.vlines(rank, 1e-7, np.maximum(weight * p, 1e-7), color=KEPT, linewidth=1.5)
    axis.set(xscale="log", yscale="log", xlim=(0.8, CANDIDATES), ylim=(1e-6, 1.5))
    axis.set_title(f"… {before.strip()[-38:]!s} …".replace("\n", "⏎"), fontsize=9)
    top = ", ".join(repr(tokenizer.decode([k]).strip()) for k in order[:3])
    axis.text(
        0.97,
        0.95,
        f"next: {top}\nkept: {weight.sum():.0f} classes, {np.sum(weight * p):.3f}",
        transform=axis.transAxes,
        ha="right",
        va="top",
        fontsize=8,
    )
    axis.set_xlabel("rank of the class")


def draw_all(axes, log_p, kept):
    """Draw the number of kept classes, and the kept mass by entropy."""
    entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
    axes[0].hist(
        np.asarray(kept.kept_classes), bins=np.geomspace(1, CANDIDATES, 30), color=KEPT
    )
    axes[0].set(xscale="log", xlabel="classes kept", ylabel="positions")
    for values, label, color in (
        (kept.kept_mass, "kept", KEPT),
        (kept.candidate_mass, f"in the top {CANDIDATES}", CLIPPED),
    ):
        axes[1].plot(entropy, values, ".", markersize=2, color=color, label=label)
    axes[1].set(xlabel="entropy of the teacher, nats", ylabel="teacher's probability")
    axes[1].legend(frameon=False, markerscale=4)


def main():
    """Write the figure and print its medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="JSON Lines of instructions")
    parser.add_argument("--output", type=Path, default=Path("what_dac_kl_keeps.png"))
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--positions", type=int, default=32, help="most per response")
    parser.add_argument("--max_length", type=int, default=256)
    args = parser.parse_args()
    tokenizer = hf.load_tokenizer(args.teacher)
    log_p, before = distributions(args, tokenizer)
    kept = losses.dac_kl_fixed(
        (LOWER, UPPER), log_p, log_p, num_candidates=CANDIDATES, width=WIDTH
    )
    entropy = -np.sum(np.exp(log_p) * log_p, axis=-1)
    order = np.argsort(entropy)
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.3), layout="constrained")
    for axis, quantile in zip(axes, SHOWN, strict=False):
        chosen = order[int(quantile * (len(order) - 1))]
        draw_position(axis, log_p[chosen], before[chosen], tokenizer)
    axes[0].set_ylabel("teacher's probability")
    draw_all(axes[3:], log_p, kept)
    figure.savefig(args.output, dpi=110)
    print(
        f"{args.output}: {len(log_p)} positions; medians: entropy "
        f"{np.median(entropy):.2f} nats, {np.median(kept.kept_classes):.1f} classes "
        f"kept with {np.median(kept.kept_mass):.4f} of the probability; the top "
        f"{CANDIDATES} hold {np.median(kept.candidate_mass):.4f}"
    )


if __name__ == "__main__":
    main()
