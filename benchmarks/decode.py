"""Generation against transformers: tokens a second, greedy, sampled, and at its best.

A GPT-2 of 124 million parameters with the same random weights on both sides writes 128
tokens after each of 8 prompts of 64; nothing ends a row. Greedy tokens are compared one
by one first. The peer is `generate` with its key/value cache in float32; for P1c the
fastest of its settings on this machine (static cache, torch.compile, bfloat16), which a
probe of a few tokens finds: one whose prompt alone takes twice as long as all of
another is probed no further, and the rate in the record is then more than it has. This
project runs in float32 in all three.

    python benchmarks/decode.py             # about 15 minutes on two CPU cores
    python benchmarks/decode.py --tiny --pairs 1
"""

import copy
import sys
import time
from pathlib import Path
from typing import Any

import _pairs
import _sizes
from _pairs import Answer, Bound, Options, Sides

ROWS, PROMPT, NEW = 8, 64, 128
OF = f"decode tokens/s, 124M, {ROWS} x ({PROMPT} + {NEW}): ours / transformers"
BOUNDS = {
    "greedy": Bound("P1a", f"{OF} float32 greedy", 2.0, at_least=True),
    "sample": Bound("P1b", f"{OF} float32 sampling", 2.3, at_least=True),
    "best": Bound("P1c", f"{OF} at its best, greedy", 1.4, at_least=True),
}
STATIC = {"cache_implementation": "static", "disable_compile": True}
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {
    "float32, dynamic cache": ("float32", {}),
    "float32, static cache": ("float32", STATIC),
    "float32, static cache, torch.compile": ("compiled", STATIC),
    "bfloat16, dynamic cache": ("bfloat16", {}),
}
PROBED = 8  # tokens, after the first
HOPELESS = 2.0  # the prompt alone takes that many times as long as all of another


def transformers_side(options: Options) -> None:
    """`generate`, called as a user would."""
    import torch
    from _side import serve
    from _torch_models import gpt2
    from transformers import StoppingCriteria

    class After(StoppingCriteria):
        """Stops early; the static cache has the size that it has in earnest."""

        def __init__(self, new: int):
            self._length = PROMPT + new

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= self._length)

    sizes, folder = _sizes.models(options), Path(options.shared)
    model = gpt2(sizes.teacher, sizes.vocabulary, seed=0, folder=folder).eval()
    models: dict[str, Any] = {"float32": model}
    prompts = torch.from_numpy(_sizes.random_tokens(options, ROWS, PROMPT))
    best: list[str] = []

    def write(kind: str = "float32", **settings: Any) -> torch.Tensor:
        with torch.inference_mode():
            return models[kind].generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                use_cache=True,
                **{"do_sample": False} | settings,
            )

    def new_tokens(*args: Any, **settings: Any) -> torch.Tensor:
        tokens = write(*args, **settings)
        assert tokens.shape == (ROWS, PROMPT + NEW), tokens.shape
        return tokens[:, PROMPT:]

    def seconds(candidate: str, new: int) -> float:
        kind, settings = CANDIDATES[candidate]
        start = time.perf_counter()
        write(kind, stopping_criteria=[After(new)], **settings)
        return time.perf_counter() - start

    def expected(candidate: str, least: float) -> float:
        """Seconds for all tokens, from those for a few."""
        first = seconds(candidate, 1)
        if "compile" not in candidate and first > HOPELESS * least:
            return first  # less than it takes, and too long already
        for new in (1 + PROBED, 1 + PROBED, 1):
            seconds(candidate, new)  # what compiles does so now
        first = seconds(candidate, 1)
        return first + (NEW - 1) * (seconds(candidate, 1 + PROBED) - first) / PROBED

    def choose() -> Answer:
        """The setting that would write all tokens soonest."""
        models["compiled"] = copy.deepcopy(model)
        models["compiled"].forward = torch.compile(models["compiled"].forward)
        models["bfloat16"] = copy.deepcopy(model).to(torch.bfloat16)
        found: dict[str, float] = {}
        for name in CANDIDATES:
            found[name] = expected(name, min(found.values(), default=float("inf")))
        best.append(min(found, key=lambda name: found[name]))
        rate = {name: round(ROWS * NEW / s, 1) for name, s in found.items()}
        return {"best": best[-1], "probed_tokens_per_second": rate}

    def write_best() -> None:
        kind, settings = CANDIDATES[best[-1]]
        new_tokens(kind, **settings)

    def sample() -> None:
        new_tokens(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    serve(
        {
            "greedy": lambda: {"tokens": new_tokens().tolist()},
            "sample": sample,
            "choose": choose,
            "best": write_best,
        }
    )


def mgsr_side(options: Options) -> None:
    """`mgsr_jax.decoding.decode.generate`; `best` is its greedy float32 again."""
    import jax
    import numpy as np
    from _mgsr import load, prompt_rows
    from _side import serve

    from mgsr_jax.decoding.decode import Decoding, generate
    from mgsr_jax.decoding.sampling import Sampling

    model, params = load(Path(options.shared))
    prompts = _sizes.random_tokens(options, ROWS, PROMPT)
    rows = jax.device_put(prompt_rows(prompts, width=PROMPT + NEW))
    keys = iter(jax.random.split(jax.random.key(0), 10_000))

    def write(temperature: float) -> np.ndarray:
        written = generate(
            model,
            params,
            rows,
            key=next(keys),
            decoding=Decoding(PROMPT + NEW, (), Sampling(temperature)),
            prefill_width=PROMPT,
        )
        assert (np.asarray(written.lengths) == PROMPT + NEW).all()
        return np.asarray(written.tokens)[:, PROMPT:]

    def greedy() -> Answer:
        return {"tokens": write(0.0).tolist()}

    def sample() -> None:
        tokens = write(1.0)
        assert tokens.min() >= 0 and tokens.max() < model.config.vocab_size

    serve({"greedy": greedy, "sample": sample, "best": greedy})


def compare(options: Options, start: Sides) -> Any:
    """One record for each way of writing."""
    peer, ours = start("transformers"), start("mgsr_jax")
    if peer("greedy")["tokens"] != ours("greedy")["tokens"]:
        sys.exit("greedy tokens differ between the two sides; not the same model")
    _pairs.say("checked: the two sides' greedy tokens are the same")
    for action, bound in BOUNDS.items():
        beside = {}
        if action == "best":
            chosen = peer("choose")
            beside = {k: chosen[k] for k in ("best", "probed_tokens_per_second")}
            _pairs.say(f"transformers' settings: {beside}")
        runs = {
            "transformers": lambda action=action: peer(action),
            "mgsr_jax": lambda action=action: ours(action),
        }
        rounds = _pairs.alternate(options.pairs, runs, warm=action != "greedy")
        yield bound.verdict(
            _pairs.ratios(rounds, "transformers", "mgsr_jax"),
            **_pairs.times(rounds),
            **beside,
        )


SIDES = {"transformers": transformers_side, "mgsr_jax": mgsr_side}

if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, SIDES))
