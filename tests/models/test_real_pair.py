"""Real checkpoints: SmolLM2-135M and a smaller model cut from it.

The environment variable MGSR_REAL_PAIR names their folder; without it the tests are
skipped.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mgsr_jax import models
from mgsr_jax.checkpoint import hf

PAIR = os.environ.get("MGSR_REAL_PAIR")
pytestmark = pytest.mark.skipif(
    PAIR is None, reason="MGSR_REAL_PAIR names no folder with teacher/ and student/"
)
TEXT = "The capital of France is Paris. Water boils at"


@pytest.fixture(scope="module", params=["teacher", "student"])
def real(request):
    folder = Path(PAIR) / request.param
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()
    model = models.from_config(folder)
    return folder, reference, model, hf.load_params(folder, model)


forward = jax.jit(
    lambda model, params, tokens, **kwargs: model.forward(params, tokens, **kwargs),
    static_argnums=0,
)


def test_logits_and_greedy_decoding_equal_those_of_transformers(real):
    folder, reference, model, params = real
    tokenizer = hf.load_tokenizer(folder)
    ids = tokenizer(TEXT)["input_ids"]
    assert ids == transformers.AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"]
    new, prompt = 12, torch.tensor([ids])
    expected = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
    ).numpy()
    with torch.no_grad():
        expected_logits = reference(prompt).logits.numpy()
    decoding = model.decode_params(params, jnp.float32)
    cache = model.init_cache(1, len(ids) + new, jnp.float32)
    hidden, cache = forward(model, decoding, jnp.asarray([ids]), cache=cache)
    logits = model.unembed(model.head_params(params), hidden)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-4, rtol=1e-5)
    stop = {2}  # min_new_tokens keeps `generate` from choosing it
    row = list(ids)
    for position in range(len(ids), len(ids) + new):
        last = np.array(logits[0, -1])
        last[list(stop)] = -np.inf
        row.append(int(last.argmax()))
        hidden, cache = forward(
            model,
            decoding,
            jnp.asarray([row[-1:]]),
            positions=jnp.asarray([[position]]),
            cache=cache,
        )
        logits = model.unembed(model.head_params(params), hidden)
    assert row == expected[0].tolist()


def test_an_export_has_equal_weights_and_tokenizer(real, tmp_path):
    folder, reference, model, params = real
    hf.save_pretrained(tmp_path / "out", model, params, tokenizer_from=folder)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    state, expected = again.state_dict(), reference.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = hf.load_tokenizer(folder)
    assert tokenizer(TEXT)["input_ids"] == ours(TEXT)["input_ids"]
    assert tokenizer.eos_token_id == ours.eos_token_id == model.config.eos_token_id
    messages = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(
        messages, tokenize=False
    ) == ours.apply_chat_template(messages, tokenize=False)


def test_teacher_and_student_have_the_same_tokenizer():
    prints = {
        hf.tokenizer_fingerprint(hf.load_tokenizer(Path(PAIR) / name))
        for name in ("teacher", "student")
    }
    assert len(prints) == 1
