"""Count compilations after the second step, and time those of the two large programs.

  P8recompile  compilations after step 2 of 50 on-policy steps: prompts of 1 to 24
               tokens, responses of any length, SCRG, the whole loss; a tiny model,
               because only shapes matter, not sizes
  P8decode     seconds to trace and compile the decoder of a GPT-2 of 124 million
               parameters, 8 x (64 + 128)
  P8step       seconds to trace and compile a training step with the whole loss,
               student and teacher of 124 million parameters

No compilation cache is used.

    python benchmarks/compilation.py        # about three minutes on two CPU cores
    python benchmarks/compilation.py --tiny --pairs 1
"""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any, cast

import _pairs
import _sizes
import jax
import jax.numpy as jnp
import numpy as np
from _clock import Clock
from _mgsr import STEPS, Pair, Training, constant_rate
from _pairs import Answer, Bound, Options, Sides
from _sizes import Batch

from mgsr_jax import models
from mgsr_jax.decoding.decode import Decoding, generate
from mgsr_jax.losses import init_clip_network
from mgsr_jax.models import LanguageModel
from mgsr_jax.objective import Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.rows import Rows, from_lists
from mgsr_jax.train_step import init_state, make_train_step
from mgsr_jax.training.optimizer import make_optimizer

RECOMPILED = Bound(
    "P8recompile", "compilations after step 2 of 50 steps of ragged lengths", 0
)
DECODE = Bound("P8decode", "seconds to compile the decoder, 124M, 8 x (64 + 128)", 6)
STEP = Bound("P8step", "seconds to compile the training step, 124M, 8 x 192", 15)
COMPILED = "/jax/core/compile/backend_compile_duration"
RAGGED_STEPS, SETTLED = 50, 2
ROWS, PROMPT, NEW = 8, 64, 128


def compare(options: Options, start: Sides) -> Iterator[Answer]:
    """The count, then the times."""
    del start
    yield RECOMPILED.verdict([_compilations_after(SETTLED)])
    for bound, lower in ((DECODE, _lower_decoder), (STEP, _lower_step)):
        rounds = []
        for number in range(options.pairs):
            jax.clear_caches()
            clock = Clock()
            lower(_gpt2(_sizes.models(options))).compile()
            rounds.append({bound.id: clock.read()})
            spent = _pairs.spent(rounds[-1][bound.id])
            _pairs.report(f"{bound.id}: {number + 1} of {options.pairs}: {spent}")
        seconds = [answers[bound.id]["seconds"] for answers in rounds]
        yield bound.verdict(seconds, others=_pairs.times(rounds)["others"])


def _compilations_after(settled: int) -> int:
    """Number of XLA programs that are compiled after the first `settled` steps."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if event == COMPILED else None
    )
    training, counts = _ragged_training(), []
    for step in range(RAGGED_STEPS):
        training.step("scrg")
        counts.append(len(events))
        if step == 0 or counts[step] > counts[step - 1]:
            _pairs.report(f"step {step + 1}: {len(events)} programs compiled so far")
    return counts[-1] - counts[settled - 1]


def _ragged_training() -> Training:
    """A run on ragged rows, in which one token in twenty ends a row."""
    batch = Batch(rows=ROWS // 2, prompt=24, new=40, parts=2)
    sizes = _sizes.Models(
        _sizes.Size(1, 32, 2), _sizes.Size(2, 64, 2), vocabulary := 1000
    )
    student, teacher = (_gpt2(sizes, size) for size in sizes[:2])
    objective = Objective()
    weights = student.init(jax.random.key(0)), teacher.init(jax.random.key(1))
    pair = Pair(student, teacher, *weights)
    network = init_clip_network(jax.random.key(2))
    return Training(
        pair,
        _ragged_rows(batch, vocabulary),
        {"scrg": RolloutConfig(policy="on", rounds=1)},
        batch,
        objective=objective,
        params={"clip_network": network},
        eos_ids=tuple(range(vocabulary // 20)),
        add_spans=_thirds,
    )


def _ragged_rows(batch: Batch, vocabulary: int) -> Iterator[Rows]:
    """Endless batches of ground-truth host rows."""
    rng = np.random.default_rng(0)

    def text(least: int, most: int) -> list[int]:
        return rng.integers(0, vocabulary, rng.integers(least, most + 1)).tolist()

    while True:
        prompts = [text(1, batch.prompt) for _ in range(batch.size)]
        responses = [text(1, batch.width - len(tokens)) for tokens in prompts]
        yield _thirds(from_lists(prompts, responses, width=batch.width))


def _thirds(rows: Rows) -> Rows:
    """Mark phrases of three tokens."""
    index = np.broadcast_to(np.arange(rows.tokens.shape[1]), rows.tokens.shape)
    return dataclasses.replace(rows, span_ids=(index // 3).astype(np.int32))


def _gpt2(sizes: _sizes.Models, size: _sizes.Size | None = None) -> LanguageModel:
    layers, width, heads = size or sizes.teacher
    return models.from_config(
        {
            "model_type": "gpt2",
            "vocab_size": sizes.vocabulary,
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": 1024,
        }
    )


def _lower_decoder(model: LanguageModel) -> Any:
    rows = jax.eval_shape(_full_rows)
    return cast(Any, generate).lower(  # jitted, which its type does not show
        model,
        model.abstract_params(),
        rows,
        key=jax.random.key(0),
        decoding=Decoding(PROMPT + NEW, ()),
        prefill_width=PROMPT,
    )


def _lower_step(model: LanguageModel) -> Any:
    optimizer = make_optimizer(constant_rate(1e-6), STEPS)

    def initial() -> Any:
        clip_network = init_clip_network(jax.random.key(0))
        params = {
            "student": model.init(jax.random.key(0)),
            "clip_network": clip_network,
        }
        return init_state(params, optimizer, seed=0)

    rows = jax.eval_shape(_full_rows)
    step: Any = make_train_step(model, model, optimizer, Objective())
    return step.lower(jax.eval_shape(initial), model.abstract_params(), (rows,))


def _full_rows() -> Rows:
    width = PROMPT + NEW
    return Rows(
        tokens=jnp.zeros((ROWS, width), jnp.int32),
        prompt_lengths=jnp.full(ROWS, PROMPT, jnp.int32),
        lengths=jnp.full(ROWS, width, jnp.int32),
        span_ids=jnp.zeros((ROWS, width), jnp.int32),
        example=jnp.zeros(ROWS, jnp.int32),
        ground_truth=jnp.ones(ROWS, bool),
        earlier_responses=jnp.zeros((ROWS, width), bool),
    )


if __name__ == "__main__":
    sys.exit(_pairs.main(__doc__, compare))
