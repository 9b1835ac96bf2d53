"""Generation against transformers: tokens per second, greedy, sampled and at its best.

A GPT-2 of 124 million parameters, with the same random weights on both sides, writes
128 tokens after each of 8 prompts of 64 tokens; nothing ends a row. The greedy tokens
of the two sides are compared first. The other side is `generate` with its key/value
cache in float32. For P1c it is the fastest of its settings on this machine (static
cache, torch.compile, bfloat16), found by a probe of a few tokens. A setting whose
prompt by itself takes twice as long as all tokens of another is not probed further, so
its recorded rate is too high. This project runs in float32 in all three.

    python benchmarks/decode.py             # about 15 minutes on two CPU cores
    python benchmarks/decode.py --tiny --pairs 1
"""

import copy
import functools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _pairs
import _sizes
from _pairs import Answer, Bound, Options, Sides

if TYPE_CHECKING:
    import torch

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
HOPELESS = 2.0  # a prompt that takes this many times all tokens of another setting


class Transformers:
    """`generate` of transformers as a user calls it, and a probe of its settings."""

    def __init__(self, options: Options):
        import torch
        from _torch_models import gpt2

        sizes, folder = _sizes.models(options), Path(options.shared)
        model = gpt2(sizes.teacher, sizes.vocabulary, seed=0, folder=folder).eval()
        self._models: dict[str, Any] = {"float32": model}
        tokens = _sizes.random_tokens(options, ROWS, PROMPT)
        self._prompts = torch.from_numpy(tokens)
        self._best = ""

    def greedy(self) -> Answer:
        """Write greedily in float32."""
        return {"tokens": self._new_tokens("float32").tolist()}

    def sample(self) -> None:
        """Sample in float32."""
        self._new_tokens("float32", do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    def choose(self) -> Answer:
        """Find the setting that writes all tokens in the shortest time."""
        import torch

        model = self._models["float32"]
        compiled = copy.deepcopy(model)
        compiled.forward = torch.compile(compiled.forward)
        self._models["compiled"] = compiled
        self._models["bfloat16"] = copy.deepcopy(model).to(torch.bfloat16)
        seconds: dict[str, float] = {}
        for name in CANDIDATES:
            shortest = min(seconds.values(), default=float("inf"))
            seconds[name] = self._expected_seconds(name, shortest)
        self._best = min(seconds, key=lambda name: seconds[name])
        rates = {name: round(ROWS * NEW / s, 1) for name, s in seconds.items()}
        return {"best": self._best, "probed_tokens_per_second": rates}

    def best(self) -> None:
        """Write greedily with the setting that `choose` found."""
        kind, settings = CANDIDATES[self._best]
        self._new_tokens(kind, **settings)

    def _expected_seconds(self, candidate: str, shortest: float) -> float:
        """Seconds for all tokens, extrapolated from a few; too few if hopeless."""
        first = self._seconds(candidate, 1)
        if "compile" not in candidate and first > HOPELESS * shortest:
            return first
        for new in (1 + PROBED, 1 + PROBED, 1):
            self._seconds(candidate, new)  # compiles
        first = self._seconds(candidate, 1)
        rest = self._seconds(candidate, 1 + PROBED) - first
        return first + (NEW - 1) * rest / PROBED

    def _seconds(self, candidate: str, new: int) -> float:
        """Seconds for `new` tokens; the static cache has its full size."""
        kind, settings = CANDIDATES[candidate]
        start = time.perf_counter()
        self._write(kind, stopping_criteria=[_stop_at(PROMPT + new)], **settings)
        return time.perf_counter() - start

    def _new_tokens(self, kind: str, **settings: Any) -> "torch.Tensor":
        tokens = self._write(kind, **settings)
        assert tokens.shape == (ROWS, PROMPT + NEW), tokens.shape
        return tokens[:, PROMPT:]

    def _write(self, kind: str, **settings: Any) -> "torch.Tensor":
        import torch

        with torch.inference_mode():
            return self._models[kind].generate(
                input_ids=self._prompts,
                attention_mask=torch.ones_like(self._prompts),
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                use_cache=True,
                **{"do_sample": False} | settings,
            )


def _stop_at(length: int) -> Any:
    """A stopping criterion at `length` tokens."""
    import torch
    from transformers import StoppingCriteria

    class StopAt(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= length)

    return StopAt()


def transformers_side(options: Options) -> None:
    """Serve `Transformers`."""
    from _side import serve

    peer = Transformers(options)
    serve(
        {
            "greedy": peer.greedy,
            "sample": peer.sample,
            "choose": peer.choose,
            "best": peer.best,
        }
    )


def mgsr_side(options: Options) -> None:
    """Serve `mgsr_jax.decoding.decode.generate`; `best` is greedy float32 again."""
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


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """One record for each way of writing."""
    peer, ours = start("transformers"), start("mgsr_jax")
    if peer("greedy")["tokens"] != ours("greedy")["tokens"]:
        sys.exit("greedy tokens differ between the two sides; not the same model")
    _pairs.report("checked: greedy tokens are the same on both sides")
    for action, bound in BOUNDS.items():
        details = {}
        if action == "best":
            answer = peer("choose")
            details = {k: answer[k] for k in ("best", "probed_tokens_per_second")}
            _pairs.report(f"settings of transformers: {details}")
        runs = {
            "transformers": functools.partial(peer, action),
            "mgsr_jax": functools.partial(ours, action),
        }
        rounds = _pairs.alternate(options.pairs, runs, warm=action != "greedy")
        yield bound.verdict(
            _pairs.ratios(rounds, "transformers", "mgsr_jax"),
            **_pairs.times(rounds),
            **details,
        )


SIDES = {"transformers": transformers_side, "mgsr_jax": mgsr_side}

if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare, SIDES))
