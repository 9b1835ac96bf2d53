"""Rotary embeddings: keys of config.json, and the scaling of wavelengths."""

import numpy as np

from mgsr_jax import models
from mgsr_jax.models._rope import Rope

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def test_old_and_new_rope_keys_give_the_same_config():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    old = models.from_config(
        {
            **LLAMA,
            "rope_theta": 500.0,
            "rope_scaling": {"type": "llama3", **scaling},
            "torch_dtype": "bfloat16",
        }
    )
    new = models.from_config(
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                **scaling,
            },
            "dtype": "bfloat16",
        }
    )
    assert old == new
    assert old.config.rope == Rope(500.0, "llama3", 8.0, 1.0, 4.0, 16)
    assert models.from_config(LLAMA).config.rope == Rope()


def test_llama3_scaling_stretches_only_long_wavelengths():
    rope = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    plain = Rope(500000.0).inverse_frequencies(128)
    scaled = rope.inverse_frequencies(128)
    turns = 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(scaled[turns > 4], plain[turns > 4], rtol=1e-6)
    np.testing.assert_allclose(scaled[turns < 1], plain[turns < 1] / 8, rtol=1e-6)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()
