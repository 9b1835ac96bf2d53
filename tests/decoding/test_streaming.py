"""Streamed tokens are those of `generate`."""

import jax
import jax.numpy as jnp
import pytest
import tiny

from mgsr_jax.decoding.decode import Decoding, generate
from mgsr_jax.decoding.sampling import GREEDY, Sampling
from mgsr_jax.decoding.streaming import stream
from mgsr_jax.rows import from_lists

PROMPT = [5, 9, 4]


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


def streamed(model, prompt, decoding, **settings):
    module, params = model
    settings = dict(key=jax.random.key(3), width=24) | settings
    params = module.decode_params(params, jnp.float32)
    return list(stream(module, params, prompt, decoding=decoding, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampling", "eos"), [(GREEDY, False), (Sampling(1.0, top_k=5, top_p=0.9), True)]
)
def test_streamed_tokens_are_those_of_generate(model, sampling, eos):
    decoding = Decoding(20, (), sampling, tiny.VOCAB)
    first = streamed(model, PROMPT, decoding)
    # With eos a token from the middle of the response ends it.
    decoding = Decoding(20, (first[6],) if eos else (), sampling, tiny.VOCAB)
    rows = jax.tree.map(jnp.asarray, from_lists([PROMPT], [[]], width=24))
    whole = generate(*model, rows, key=jax.random.key(3), decoding=decoding)
    expected = whole.tokens[0, len(PROMPT) : int(whole.lengths[0])].tolist()
    assert streamed(model, PROMPT, decoding) == expected
    assert len(expected) < 17 if eos else len(expected) == 17


@pytest.mark.parametrize("prompt", [[], [1] * 20])
def test_a_prompt_without_room_is_refused(model, prompt):
    with pytest.raises(ValueError, match=f"{len(prompt)} tokens, expected 1 to 19"):
        streamed(model, prompt, Decoding(20, (), GREEDY, tiny.VOCAB))
