"""Every family against transformers: random tiny checkpoints, loaded and written."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf

torch.set_num_threads(1)  # the matrices are tiny: more threads are slower

VOCAB = 61
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "intermediate_size": 44, "num_key_value_heads": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
OPT = {**SMALL, "ffn_dim": 44, "init_std": 0.2}
FAMILIES = {
    "gpt2": transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=24,
        n_layer=2,
        n_head=4,
        n_positions=40,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "opt": transformers.OPTConfig(**OPT),
    "opt_350m": transformers.OPTConfig(
        **OPT, do_layer_norm_before=False, word_embed_proj_dim=16
    ),
    "llama_untied": transformers.LlamaConfig(
        **GROUPED,
        tie_word_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
        rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
    ),
    "llama_tied": transformers.LlamaConfig(
        **GROUPED, tie_word_embeddings=True, head_dim=10, rope_parameters=LLAMA3
    ),
    "mistral": transformers.MistralConfig(**GROUPED, sliding_window=5),
    "qwen2_mixed_window": transformers.Qwen2Config(
        **GROUPED,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    ),
    "qwen3": transformers.Qwen3Config(**GROUPED, head_dim=10, attention_bias=True),
}
"""Each feature of a config is in some family; few families keep the tests quick."""


def random_torch_model(config):
    """A model whose biases and norms are random too, so that a swapped one is found."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    reference = random_torch_model(FAMILIES[request.param])
    reference.save_pretrained(folder)
    model = models.from_config(folder)
    return folder, reference, model, hf.load_params(folder, model)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, VOCAB, (3, 19)).astype(np.int32)


def torch_logits(reference, tokens):
    with torch.no_grad():
        return reference(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def logits_of(model, params, tokens, **kwargs):
    hidden, cache = model.forward(params, jnp.asarray(tokens), **kwargs)
    return model.unembed(model.head_params(params), hidden), cache


# The tests share its compiled programs.
forward = jax.jit(logits_of, static_argnums=0)


def test_logits_equal_those_of_transformers(family, tokens):
    _, reference, model, params = family
    logits, cache = forward(model, params, tokens)
    expected = torch_logits(reference, tokens)
    assert np.abs(expected).max() > 1.0  # the logits are not all near 0
    assert cache is None
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)


def test_decoding_with_a_cache_equals_recomputation_on_ragged_rows(family, tokens):
    """Each row has its own prompt length, and then its own position at each step."""
    _, reference, model, params = family
    lengths, steps, slots = np.array([3, 7, 5]), 9, 19
    expected = torch_logits(reference, tokens)
    cache = model.init_cache(3, slots, jnp.float32)
    decoding = model.decode_params(params, jnp.float32)
    # Prompts are padded to one width; later steps overwrite the slots of padding.
    prompt = np.where(np.arange(7)[None] < lengths[:, None], tokens[:, :7], 0)
    logits, cache = forward(model, decoding, prompt, cache=cache)
    for b in range(3):
        np.testing.assert_allclose(
            logits[b, : lengths[b]], expected[b, : lengths[b]], atol=1e-4, rtol=0
        )
    for step in range(steps):
        positions = (lengths + step)[:, None].astype(np.int32)
        token = np.take_along_axis(tokens, positions, axis=1)
        logits, cache = forward(
            model, decoding, token, positions=jnp.asarray(positions), cache=cache
        )
        np.testing.assert_allclose(
            logits[:, 0], expected[np.arange(3), positions[:, 0]], atol=1e-4, rtol=0
        )


def test_greedy_decoding_equals_transformers_generate(family, tokens):
    _, reference, model, params = family
    prompt, new = tokens[:, :7], 12
    expected = reference.generate(
        torch.tensor(prompt, dtype=torch.long),
        attention_mask=torch.ones(prompt.shape, dtype=torch.long),
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        suppress_tokens=[2],
    ).numpy()
    decoding = model.decode_params(params, jnp.float32)
    cache = model.init_cache(3, 7 + new, jnp.float32)
    logits, cache = forward(model, decoding, prompt, cache=cache)
    row = [*prompt.T]
    for t in range(7, 7 + new):
        row.append(np.asarray(logits[:, -1].at[:, 2].set(-jnp.inf).argmax(-1)))
        positions = jnp.full((3, 1), t, jnp.int32)
        logits, cache = forward(
            model, decoding, row[-1][:, None], positions=positions, cache=cache
        )
    np.testing.assert_array_equal(np.stack(row, axis=1), expected)


def test_transformers_loads_an_export_with_equal_logits(family, tokens, tmp_path):
    _, reference, model, params = family
    hf.save_pretrained(tmp_path / "export", model, params)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    np.testing.assert_array_equal(
        torch_logits(again.eval(), tokens), torch_logits(reference, tokens)
    )
    config = models.from_config(tmp_path / "export").config
    assert config == model.config
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(again.config, key) == getattr(reference.config, key)
        assert getattr(again.generation_config, key) == getattr(reference.config, key)


def test_loading_onto_a_mesh_gives_equal_parameters(family):
    folder, _, model, params = family
    sharded = hf.load_params(folder, model, mesh=sharding.make_mesh(2, 4))
    kernel = sharded["layers"]["attention"]["query"]["kernel"]
    assert kernel.addressable_shards[0].data.shape[1] == kernel.shape[1] // 4
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
