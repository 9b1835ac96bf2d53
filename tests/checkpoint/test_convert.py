"""Pickled weights to safetensors, without running code in a pickle."""

import json
import os
import sys

import jax
import numpy as np
import pytest
import torch
import transformers

from mgsr_jax import models
from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint.convert import convert

CONFIG = {
    "model_type": "opt",
    "vocab_size": 61,
    "hidden_size": 24,
    "ffn_dim": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}


@pytest.fixture
def source(tmp_path):
    """OPT as it was published: float16, with the tied head and decoder.version."""
    folder = tmp_path / "source"
    folder.mkdir()
    torch.manual_seed(0)
    reference = transformers.OPTForCausalLM(transformers.OPTConfig(**CONFIG)).half()
    state = {
        k.removeprefix("model."): v.contiguous()
        for k, v in reference.state_dict().items()
    }
    assert state["lm_head.weight"].data_ptr() == (
        state["decoder.embed_tokens.weight"].data_ptr()
    )
    state["decoder.version"] = torch.tensor([3.0]).half()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.json").write_text("{}")
    return folder, state, reference.float()


def assert_converted(folder, reference):
    model = models.from_config(folder)
    params = hf.load_params(folder, model)
    decoder = reference.model.decoder
    for ours, theirs in (
        (params["embed"]["embedding"], decoder.embed_tokens),
        (params["layers"]["mlp"]["up"]["kernel"][1].T, decoder.layers[1].fc1),
    ):
        np.testing.assert_array_equal(ours, theirs.weight.detach().numpy())
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert (folder / "vocab.json").read_text() == "{}"


def test_a_single_file_is_converted(source, tmp_path):
    folder, state, reference = source
    torch.save(state, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "out" / "deep")
    assert_converted(tmp_path / "out" / "deep", reference)
    assert not (tmp_path / "out" / "deep" / "pytorch_model.bin").exists()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["deep"]


def test_shards_with_an_index_are_converted(source, tmp_path):
    folder, state, reference = source
    names = sorted(state)
    weight_map = {}
    for i, part in enumerate((names[:9], names[9:]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save({name: state[name] for name in part}, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert(folder, tmp_path / "out")
    assert_converted(tmp_path / "out", reference)
    assert (tmp_path / "out" / "model-00002-of-00002.safetensors").is_file()
    index.write_text(json.dumps({"weight_map": {"a": "../pytorch_model.bin"}}))
    with pytest.raises(ValueError, match="names the shard"):
        convert(folder, tmp_path / "other")


class Exploit:
    def __reduce__(self):
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("content", ["exploit", "empty", "garbage", "truncated"])
def test_a_file_that_is_not_plain_weights_is_refused(
    source, tmp_path, monkeypatch, content
):
    folder, state, _ = source
    monkeypatch.chdir(tmp_path)
    file = folder / "pytorch_model.bin"
    if content == "exploit":
        torch.save({"a": Exploit()}, file)
    elif content == "truncated":
        torch.save(state, file)
        file.write_bytes(file.read_bytes()[:-2000])
    else:
        file.write_bytes(b"" if content == "empty" else b"garbage" * 99)
    with pytest.raises(ValueError, match=r"model\.bin cannot be read") as caught:
        convert(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_other_contents_and_missing_files_raise(source, tmp_path):
    folder, state, _ = source
    with pytest.raises(FileNotFoundError, match=r"no pytorch_model\.bin"):
        convert(folder, tmp_path / "out")
    torch.save({"state": state}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a dictionary from names to tensors"):
        convert(folder, tmp_path / "out")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        convert(folder, folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        convert(folder, tmp_path / "out")


def test_without_torch_the_error_names_the_extra(source, tmp_path, monkeypatch):
    folder, state, _ = source
    torch.save(state, folder / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'mgsr_jax\[convert\]'"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
