"""An on-policy distillation step against TRL's two trainers.

The student (30 million parameters) writes 64 tokens after each of 4 prompts of 64, the
teacher (124 million) scores them; then come forward KL over the whole vocabulary,
backward and AdamW. Both sides have the same random weights in float32 and rows of full
length. A step is everything that a trainer does between two updates. The losses are of
different samples; they must agree within what 256 tokens allow.

    python benchmarks/onpolicy_step.py      # about three minutes on two CPU cores
    python benchmarks/onpolicy_step.py --tiny --pairs 1
"""

import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import _pairs
import _sizes
from _pairs import Answer, Bound, Options, Sides
from _sizes import Batch

BATCH = Batch(rows=4, prompt=64, new=64)
ROWS, PROMPT, NEW, _ = BATCH
OF = f"on-policy step, {ROWS} x ({PROMPT} + {NEW}), 30M <- 124M: seconds of TRL's"
BOUNDS = {
    "GKDTrainer": Bound("P6a", f"{OF} GKDTrainer / ours", 1.8, at_least=True),
    "DistillationTrainer": Bound(
        "P6b", f"{OF} DistillationTrainer / ours", 1.7, at_least=True
    ),
}
SAME_LOSS = 0.1  # relative; the samples differ


def trl_side(name: str, options: Options) -> None:
    """Serve one of TRL's trainers."""
    import _trl
    from _torch_models import pair

    serve = {
        "GKDTrainer": _trl.serve_gkd,
        "DistillationTrainer": _trl.serve_distillation,
    }[name]
    models = pair(_sizes.models(options), Path(options.shared))
    serve(*models, BATCH, options.pairs)


def mgsr_side(options: Options) -> None:
    """Serve steps of `mgsr train` with the policy "on", without SCRG."""
    from _mgsr import Training, load_pair, prompt_rows
    from _side import serve

    from mgsr_jax.rollout_config import RolloutConfig

    prompts = _sizes.random_tokens(options, ROWS, PROMPT)
    training = Training(
        load_pair(Path(options.shared)),
        itertools.repeat(prompt_rows(prompts, width=BATCH.width)),
        {"plain": RolloutConfig(policy="on", intervention="none")},
        BATCH,
    )

    def step() -> Answer:
        rows, loss = training.step("plain")
        (written,) = rows.micro_batches
        lengths = {int(n) for n in written.lengths}
        return {"loss": loss, "rows": len(written.lengths), "lengths": list(lengths)}

    serve({"step": step})


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """One record per trainer of TRL."""
    for name, bound in BOUNDS.items():
        peer, ours = start(name), start("mgsr_jax")
        runs = {name: functools.partial(peer, "step")}
        runs["mgsr_jax"] = functools.partial(ours, "step")
        rounds = _pairs.alternate(options.pairs, runs)
        require_same_work(rounds[0][name], rounds[0]["mgsr_jax"])
        yield bound.verdict(
            _pairs.ratios(rounds, name, "mgsr_jax"),
            **_pairs.times(rounds),
        )
        start.close(name)


def require_same_work(theirs: Answer, ours: Answer) -> None:
    """Check that rows and lengths are equal and losses close."""
    assert theirs["lengths"] == [PROMPT, PROMPT + NEW], theirs
    assert ours["lengths"] == [PROMPT + NEW], ours
    assert theirs["rows"] == ours["rows"] == ROWS, (theirs, ours)
    _pairs.require_close("loss", ours["loss"], theirs["loss"], SAME_LOSS)


SIDES = {name: functools.partial(trl_side, name) for name in BOUNDS}

if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, SIDES | {"mgsr_jax": mgsr_side}))
