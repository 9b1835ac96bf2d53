"""A step with SCRG against one without, and against TRL's step without it.

The student (30 million parameters) writes 128 tokens after each of 8 prompts of 64,
four micro-batches of them for one update. With one round of SCRG (the paper's rule: the
worst token of the whole sample) the teacher (124 million) corrects a token in every
row, and the student writes again what follows. Forward KL, AdamW, float32, rows of full
length. Models are random, so the worst token may be anywhere: that every row was
corrected, and in the middle on average, is checked.

  P7ours  our step with SCRG / our step without, on the same prompts
  P7trl   our step with SCRG / TRL's GKDTrainer, without SCRG and with the same batch

    python benchmarks/scrg_step.py          # about half an hour on two CPU cores
    python benchmarks/scrg_step.py --tiny --pairs 1
"""

import functools
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import _pairs
import _sizes
from _pairs import Answer, Bound, Options, Sides

ROWS, PROMPT, NEW, PARTS = 8, 64, 128, 4
OF = f"step with SCRG, {PARTS} micro-batches of {ROWS} x ({PROMPT} + {NEW})"
OURS = Bound("P7ours", f"{OF}: seconds, of our plain on-policy step's", 1.35)
TRL = Bound("P7trl", f"{OF}: seconds, of TRL's plain GKD step's", 1.0)
MIDDLE = 0.35, 0.65  # of the response: errors evenly spread have their mean there
SAME_LOSS = 0.05  # relative; the samples are not the same


def trl_side(options: Options) -> None:
    """TRL's trainer."""
    import _trl
    from _torch_models import pair

    models = pair(_sizes.models(options), Path(options.shared))
    batch = _trl.Batch(ROWS, PROMPT, NEW, PARTS)
    _trl.serve_gkd(*models, batch, options.pairs)


def mgsr_side(options: Options) -> None:
    """What `mgsr train` does in a step of the policy "on", with SCRG and without."""
    import numpy as np
    from _mgsr import Training, load_pair, prompt_rows
    from _side import serve

    from mgsr_jax.rollout import RolloutConfig

    width = PROMPT + NEW
    prompts = _sizes.random_tokens(options, ROWS * PARTS, PROMPT)
    training = Training(
        load_pair(Path(options.shared)),
        itertools.repeat(prompt_rows(prompts, width=width)),
        {
            "plain": RolloutConfig(policy="on", rounds=0),
            "scrg": RolloutConfig(policy="on", rounds=1),
        },
        batch_size=ROWS * PARTS,
        micro_batches=PARTS,
        prompt_width=PROMPT,
        width=width,
    )

    def plain() -> Answer:
        rows, loss = training.step("plain")
        lengths = {int(n) for part in rows.micro_batches for n in part.lengths}
        written = sum(len(part.lengths) for part in rows.micro_batches)
        return {"loss": loss, "rows": written, "lengths": list(lengths)}

    def scrg() -> Answer:
        rows, loss = training.step("scrg")
        at = np.concatenate([np.ravel(x.error_position) for x in rows.corrections])
        corrected = np.concatenate([np.ravel(x.corrected) for x in rows.corrections])
        return {
            "loss": loss,
            "corrected": int(corrected.sum()),
            "error": float(np.mean(at - PROMPT) / NEW),
        }

    serve({"plain": plain, "scrg": scrg})


def compare(options: Options, start: Sides) -> Any:
    """Three runs in turn: ours plain, ours with SCRG, TRL's."""
    peer, ours = start("GKDTrainer"), start("mgsr_jax")
    runs = {
        "GKDTrainer": functools.partial(peer, "step"),
        "plain": functools.partial(ours, "plain"),
        "scrg": functools.partial(ours, "scrg"),
    }
    rounds = _pairs.alternate(options.pairs, runs)
    require_same_work(rounds[0]["GKDTrainer"], rounds[0]["plain"])
    beside = _pairs.times(rounds) | {"mean_error_position": require_corrected(rounds)}
    yield OURS.verdict(_pairs.ratios(rounds, "scrg", "plain"), **beside)
    yield TRL.verdict(_pairs.ratios(rounds, "scrg", "GKDTrainer"), **beside)


def require_same_work(theirs: Answer, ours: Answer) -> None:
    """The same rows and lengths, and a loss of the same kind."""
    assert theirs["lengths"] == [PROMPT, PROMPT + NEW], theirs
    assert ours["lengths"] == [PROMPT + NEW], ours
    assert theirs["rows"] == ours["rows"] == ROWS * PARTS, (theirs, ours)
    _pairs.require_close("loss", ours["loss"], theirs["loss"], SAME_LOSS)


def require_corrected(rounds: list[dict[str, Answer]]) -> float:
    """The mean error position, as a share of the response."""
    found = [each["scrg"] for each in rounds]
    if any(each["corrected"] != ROWS * PARTS for each in found):
        sys.exit(f"SCRG corrected {found[0]['corrected']} rows of {ROWS * PARTS}")
    mean = statistics.mean(each["error"] for each in found)
    if not MIDDLE[0] <= mean <= MIDDLE[1]:
        sys.exit(f"errors are at {mean:.2f} of the response on average; not in between")
    _pairs.say(f"checked: all rows corrected, at {mean:.2f} of the response on average")
    return round(mean, 3)


SIDES = {"GKDTrainer": trl_side, "mgsr_jax": mgsr_side}

if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, SIDES))
