"""config.json: old and new keys, and what is refused by name."""

import json

import numpy as np
import pytest

from mgsr_jax import models
from mgsr_jax.models._attention import Rope

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 61,
    "hidden_size": 24,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
QWEN2 = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 2}


def test_unknown_model_type_names_it_and_the_known_ones():
    with pytest.raises(ValueError, match="'t5' is not supported.*gpt2.*llama.*qwen3"):
        models.from_config({"model_type": "t5"})


@pytest.mark.parametrize(
    ("hf", "key", "value"),
    [
        (LLAMA, "hidden_act", "gelu"),
        (LLAMA, "quantization_config", {"bits": 4}),
        (LLAMA, "rope_scaling", {"type": "yarn", "factor": 2.0}),
        (LLAMA, "rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        (LLAMA, "partial_rotary_factor", 0.5),
        (GPT2, "activation_function", "swish"),
        (GPT2, "scale_attn_by_inverse_layer_idx", True),
        (GPT2, "scale_attn_weights", False),
        (GPT2, "reorder_and_upcast_attn", True),
        (GPT2, "add_cross_attention", True),
        (OPT, "layer_norm_elementwise_affine", False),
        (QWEN2, "hidden_act", "relu"),
    ],
)
def test_unsupported_settings_are_refused_by_name(hf, key, value):
    name = "rope_type" if key == "rope_scaling" else key
    with pytest.raises(ValueError, match=rf"{name} = .* not implemented; expected"):
        models.from_config({**hf, key: value})


@pytest.mark.parametrize(
    ("hf", "key"), [(LLAMA, "vocab_size"), (GPT2, "n_layer"), (OPT, "ffn_dim")]
)
def test_a_missing_key_is_named(hf, key):
    with pytest.raises(ValueError, match=f"has no '{key}'"):
        models.from_config({k: v for k, v in hf.items() if k != key})


@pytest.mark.parametrize(
    ("hf", "key", "value"),
    [
        (LLAMA, "num_key_value_heads", 3),
        (GPT2, "n_head", 5),
        (OPT, "num_attention_heads", 7),
    ],
)
def test_heads_that_do_not_divide_are_refused(hf, key, value):
    with pytest.raises(ValueError, match=f"{key} = {value}, which does not divide"):
        models.from_config({**hf, key: value})


def test_old_and_new_rope_keys_mean_the_same():
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


def test_llama3_leaves_short_wavelengths_and_stretches_long_ones():
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


def test_old_llama_files_say_less():
    """LLaMA 1 has no kv heads, no head width and no tied-embedding key."""
    config = models.from_config(LLAMA).config
    assert (config.num_kv_heads, config.head_dim) == (4, 6)
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_several_end_ids():
    config = models.from_config({**LLAMA, "eos_token_id": [5, 7]}).config
    assert config.eos_token_id == (5, 7)
    assert config.to_hf()["eos_token_id"] == [5, 7]


def test_windows():
    mistral = {**LLAMA, "model_type": "mistral", "num_key_value_heads": 2}
    assert models.from_config(mistral).config.windows == (4096, 4096)
    none = models.from_config({**mistral, "sliding_window": None}).config
    assert none.windows is None
    sliding = {**QWEN2, "sliding_window": 4, "max_window_layers": 1}
    assert models.from_config(sliding).config.windows is None
    sliding["use_sliding_window"] = True
    assert models.from_config(sliding).config.windows == (None, 4)
    kinds = {**sliding, "layer_types": ["sliding_attention", "full_attention"]}
    assert models.from_config(kinds).config.windows == (4, None)


def test_from_a_folder_or_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json at"):
        models.from_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        models.from_config(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"holds list, expected an object"):
        models.from_config(tmp_path)
    file.write_text(json.dumps(LLAMA))
    assert models.from_config(tmp_path) == models.from_config(LLAMA)
    assert models.from_config(str(file)) == models.from_config(LLAMA)


@pytest.mark.parametrize("hf", [LLAMA, GPT2, OPT, QWEN2])
def test_written_config_reads_back(hf):
    config = models.from_config(hf).config
    assert models.from_config(config.to_hf()).config == config
