"""Adapters that peft loads: its logits equal ours."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tiny import GPT2, LLAMA, OPT

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint.peft import save_adapter
from mgsr_jax.models import lora
from mgsr_jax.models.lora import LORA, LoraConfig

# peft uses a deprecated name of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")

FAMILIES = {
    "gpt2": GPT2 | {"initializer_range": 0.3},
    "opt": OPT | {"init_std": 0.3},
    "llama": LLAMA,
    "qwen3": LLAMA | {"model_type": "qwen3", "head_dim": 8},
}
TOKENS = np.random.default_rng(0).integers(3, 32, (2, 9))


def trained(family, **settings):
    """A model, its parameters, and adapters without zeros."""
    config = LoraConfig(**{"rank": 3, "alpha": 6.0, **settings})
    model = dataclasses.replace(models.from_config(FAMILIES[family]), lora=config)
    params = jax.jit(model.init)(jax.random.key(0))
    adapters = lora.init(jax.random.key(1), model, config)
    waves = jax.tree.map(
        lambda x: 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters
    )
    return model, params, jax.tree.map(jnp.add, adapters, waves)


def our_logits(model, params):
    hidden, _ = jax.jit(model.forward)(params, jnp.asarray(TOKENS, jnp.int32))
    return model.unembed(model.head_params(params), hidden)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "attention/(query|value)$"),
        ("qwen3", ""),
        ("opt", ""),
        ("gpt2", ""),
        ("gpt2", "attention/(query|value)$"),
        ("gpt2", "value$|mlp"),
        ("gpt2", "output$"),
    ],
)
def test_logits_of_peft_equal_ours(family, targets, tmp_path):
    model, params, adapters = trained(family, targets=targets)
    hf.save_pretrained(tmp_path / "base", model, params)
    save_adapter(tmp_path / "adapter", model, adapters, base_model=tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        plain = base.eval()(torch.tensor(TOKENS)).logits.numpy()
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        got = theirs(torch.tensor(TOKENS)).logits.numpy()
    want = our_logits(model, {**params, LORA: adapters})
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(want - plain).max() > 0.1
    with torch.no_grad():
        merged = theirs.merge_and_unload()(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(merged, want, atol=1e-4)


def test_the_config_names_the_base_model_and_the_settings(tmp_path):
    model, _, adapters = trained("llama", dropout=0.1)
    save_adapter(
        tmp_path / "a", model, adapters, base_model="student", dtype="bfloat16"
    )
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "student"
    assert config["target_modules"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 6.0, 0.1)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    np.testing.assert_array_equal(
        tensors[name], adapters["attention"]["value"]["b"][1].T.astype(jnp.bfloat16)
    )


def test_adapters_of_a_fused_tensor_become_blocks_of_one_adapter(tmp_path):
    """GPT-2 stores query, key and value as one tensor."""
    model, _, adapters = trained("gpt2", targets="query|value")
    save_adapter(tmp_path / "a", model, adapters, base_model="student")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["attn.c_attn"] and config["fan_in_fan_out"]
    assert config["rank_pattern"] == {"attn.c_attn": 6}
    assert config["alpha_pattern"] == {"attn.c_attn": 12.0}
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    b = tensors["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"]
    blocks = np.abs(b.reshape(3, 16, 2, 3)).max(axis=(1, 3)) > 0
    assert blocks.tolist() == [[True, False], [False, False], [False, True]]


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    model, _, adapters = trained("llama")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        save_adapter(tmp_path, model, adapters, base_model="student")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_sharded_adapters_give_the_same_file(tmp_path):
    model, _, adapters = trained("llama", targets="")
    mesh = sharding.make_mesh(2, 2, 2)
    rules = lora.partition_rules(model.partition_rules, adapters)
    split = jax.device_put(adapters, sharding.shardings(mesh, rules, adapters))
    for name, tree in (("whole", adapters), ("split", split)):
        save_adapter(tmp_path / name, model, tree, base_model="student")
    whole, from_split = (
        load_file(tmp_path / name / "adapter_model.safetensors")
        for name in ("whole", "split")
    )
    jax.tree.map(np.testing.assert_array_equal, whole, from_split)
