"""config.json: old and new keys, defaults, and settings that are refused."""

import json

import pytest

from mgsr_jax import models

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


def test_the_error_for_an_unknown_model_type_lists_the_supported_types():
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
def test_a_setting_that_is_not_implemented_raises_with_its_name(hf, key, value):
    name = "rope_type" if key == "rope_scaling" else key
    with pytest.raises(ValueError, match=rf"{name} = .* not implemented; expected"):
        models.from_config({**hf, key: value})


@pytest.mark.parametrize(
    ("hf", "key"), [(LLAMA, "vocab_size"), (GPT2, "n_layer"), (OPT, "ffn_dim")]
)
def test_a_missing_key_raises_with_its_name(hf, key):
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
def test_a_number_of_heads_that_does_not_divide_raises(hf, key, value):
    with pytest.raises(ValueError, match=f"{key} = {value}, which does not divide"):
        models.from_config({**hf, key: value})


def test_keys_that_old_llama_files_lack_have_defaults():
    """LLaMA 1 has no keys for kv heads, head width and tied embeddings."""
    config = models.from_config(LLAMA).config
    assert (config.num_kv_heads, config.head_dim) == (4, 6)
    assert not config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_several_end_of_sequence_ids_are_read_and_written():
    config = models.from_config({**LLAMA, "eos_token_id": [5, 7]}).config
    assert config.eos_token_id == (5, 7)
    assert config.to_hf()["eos_token_id"] == [5, 7]


def test_sliding_windows_of_each_layer_are_read():
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


def test_from_config_reads_a_folder_or_a_file(tmp_path):
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
def test_a_written_config_reads_back_equal(hf):
    config = models.from_config(hf).config
    assert models.from_config(config.to_hf()).config == config
