"""A step with SCRG against one without, and against TRL's step without it.

The student (30 million parameters) writes 128 tokens after each of 8 prompts of 64. An
update has four such micro-batches. In one round of SCRG (the paper's rule: the worst
token of the whole sample) the teacher (124 million) corrects one token in every row,
and the student writes the rest again. Forward KL, AdamW, float32, rows of full length.
The models are random, so the worst token can be anywhere. The script checks that every
row was corrected, and in the middle on average.

  P7ours  our step with SCRG / our step without SCRG, on the same prompts
  P7trl   our step with SCRG / a step of TRL's GKDTrainer, which has no SCRG

    python benchmarks/scrg_step.py          # about half an hour on two CPU cores
    python benchmarks/scrg_step.py --tiny --pairs 1
"""

import functools
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import _pairs
import _sizes
from _pairs import Answer, Bound, Options, Sides
from _sizes import Batch

BATCH = Batch(rows=8, prompt=64, new=128, parts=4)
ROWS, PROMPT, NEW, PARTS = BATCH
OF = f"step with SCRG, {PARTS} micro-batches of {ROWS} x ({PROMPT} + {NEW})"
OURS = Bound("P7ours", f"{OF}: seconds / our plain on-policy step", 1.35)
TRL = Bound("P7trl", f"{OF}: seconds / TRL's plain GKD step", 1.0)
MIDDLE = 0.35, 0.65  # share of the response; the mean of evenly spread errors
SAME_LOSS = 0.05  # relative; the samples differ


def trl_side(options: Options) -> None:
    """Serve TRL's GKDTrainer."""
    import _trl
    from _torch_models import pair

    models = pair(_sizes.models(options), Path(options.shared))
    _trl.serve_gkd(*models, BATCH, options.pairs)


def mgsr_side(options: Options) -> None:
    """Serve steps of `mgsr train` with the policy "on", with SCRG and without."""
    import numpy as np
    from _mgsr import Training, load_pair, prompt_rows
    from _side import serve

    from mgsr_jax.rollout_config import RolloutConfig

    prompts = _sizes.random_tokens(options, BATCH.size, PROMPT)
    training = Training(
        load_pair(Path(options.shared)),
        itertools.repeat(prompt_rows(prompts, width=BATCH.width)),
        {
            "plain": RolloutConfig(policy="on", intervention="none"),
            "scrg": RolloutConfig(policy="on", rounds=1),
        },
        BATCH,
    )

    def plain() -> Answer:
        rows, loss = training.step("plain")
        lengths = {int(n) for part in rows.micro_batches for n in part.lengths}
        written = sum(len(part.lengths) for part in rows.micro_batches)
        return {"loss": loss, "rows": written, "lengths": list(lengths)}

    def scrg() -> Answer:
        rows, loss = training.step("scrg")
        wrote = np.concatenate([x.teacher_wrote for x in rows.interventions])
        positions = np.argmax(wrote, axis=1)
        return {
            "loss": loss,
            "corrected": int(wrote.any(axis=1).sum()),
            "error": float(np.mean(positions - PROMPT) / NEW),
        }

    serve({"plain": plain, "scrg": scrg})


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """Records of three runs in turn: ours plain, ours with SCRG, TRL's."""
    peer, ours = start("GKDTrainer"), start("mgsr_jax")
    runs = {
        "GKDTrainer": functools.partial(peer, "step"),
        "plain": functools.partial(ours, "plain"),
        "scrg": functools.partial(ours, "scrg"),
    }
    rounds = _pairs.alternate(options.pairs, runs)
    require_same_work(rounds[0]["GKDTrainer"], rounds[0]["plain"])
    details = _pairs.times(rounds) | {"mean_error_position": require_corrected(rounds)}
    yield OURS.verdict(_pairs.ratios(rounds, "scrg", "plain"), **details)
    yield TRL.verdict(_pairs.ratios(rounds, "scrg", "GKDTrainer"), **details)


def require_same_work(theirs: Answer, ours: Answer) -> None:
    """Check that rows and lengths are equal and losses close."""
    assert theirs["lengths"] == [PROMPT, PROMPT + NEW], theirs
    assert ours["lengths"] == [PROMPT + NEW], ours
    assert theirs["rows"] == ours["rows"] == BATCH.size, (theirs, ours)
    _pairs.require_close("loss", ours["loss"], theirs["loss"], SAME_LOSS)


def require_corrected(rounds: list[dict[str, Answer]]) -> float:
    """Check the corrections; return their mean position as a share of the response."""
    steps = [answers["scrg"] for answers in rounds]
    if any(step["corrected"] != BATCH.size for step in steps):
        sys.exit(f"SCRG corrected {steps[0]['corrected']} rows of {BATCH.size}")
    mean = statistics.mean(step["error"] for step in steps)
    if not MIDDLE[0] <= mean <= MIDDLE[1]:
        sys.exit(f"mean error at {mean:.2f} of the response; expected it in {MIDDLE}")
    _pairs.report(f"checked: all rows corrected, at {mean:.2f} of the response")
    return round(mean, 3)


SIDES = {"GKDTrainer": trl_side, "mgsr_jax": mgsr_side}

if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, SIDES))
