"""Hugging Face folders: reading, writing, memory, and what is refused."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import _tensors, hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
}


def random_params(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        model.abstract_params(),
    )


def saved(folder, config, **kwargs):
    model = models.from_config(config)
    params = random_params(model)
    hf.save_pretrained(folder, model, params, **kwargs)
    return model, params


def rewrite(folder, change):
    """Replace the folder's tensors by `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file, metadata={"format": "pt"})


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_saved_params_load_back_equal(tmp_path, config):
    model, params = saved(tmp_path / "m", config)
    loaded = hf.load_params(tmp_path / "m", models.from_config(tmp_path / "m"))
    assert_equal(loaded, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype("float32")}
    assert not [p for p in tmp_path.iterdir() if p.name != "m"]


def test_old_gpt2_files_load(tmp_path):
    """They have no prefix, have buffers of masks, and store the tied head."""
    model, params = saved(tmp_path, GPT2)

    def old(tensors):
        tensors = {k.removeprefix("transformer."): v for k, v in tensors.items()}
        for i in range(2):
            tensors[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 16, 16), np.uint8))
            tensors[f"h.{i}.attn.masked_bias"] = np.array(-1e4, np.float32)
        return {**tensors, "lm_head.weight": tensors["wte.weight"].copy()}

    rewrite(tmp_path, old)
    assert_equal(hf.load_params(tmp_path, model), params)


def test_old_llama_files_load(tmp_path):
    """They have no prefix, and have buffers of rotary frequencies."""
    model, params = saved(tmp_path, LLAMA)

    def old(tensors):
        tensors = {k.removeprefix("model."): v for k, v in tensors.items()}
        for i in range(3):
            name = f"layers.{i}.self_attn.rotary_emb.inv_freq"
            tensors[name] = np.ones(3, np.float32)
        return tensors

    rewrite(tmp_path, old)
    assert_equal(hf.load_params(tmp_path, model), params)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    model, _ = saved(tmp_path, LLAMA)

    def other_head(tensors):
        head = tensors["model.embed_tokens.weight"].copy()
        head[60, 23] += 1
        return {**tensors, "lm_head.weight": head}

    rewrite(tmp_path, other_head)
    with pytest.raises(ValueError, match=r"lm_head\.weight differs.*embed_tokens"):
        hf.load_params(tmp_path, model)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_files_are_written_and_read(tmp_path, dtype):
    model, params = saved(tmp_path, LLAMA, dtype=jnp.dtype(dtype))
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
    assert kinds == {"BF16" if dtype == "bfloat16" else "F16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    expected = jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params)
    assert_equal(hf.load_params(tmp_path, model), expected)
    kept = hf.load_params(tmp_path, model, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}


def test_an_index_and_its_shards_load_through_symlinks(tmp_path):
    """The cache of the Hugging Face hub consists of symlinks."""
    model, params = saved(tmp_path / "blobs", LLAMA, max_shard_bytes=8000)
    cache = tmp_path / "cache"
    cache.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (cache / file.name).symlink_to(file)
    index = json.loads((cache / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 3
    assert all(os.path.getsize(cache / shard) < 10_000 for shard in shards)
    total = sum(leaf.size for leaf in jax.tree.leaves(params)) * 4
    assert index["metadata"]["total_size"] == total
    assert_equal(hf.load_params(cache, model), params)


def test_loading_onto_a_mesh_reads_each_shard_separately(tmp_path, monkeypatch):
    model, params = saved(tmp_path, LLAMA)
    reads = []
    read = _tensors.Tensor.read

    def recorded(self, index):
        values = read(self, index)
        reads.append((self.name, values.shape))
        return values

    monkeypatch.setattr(_tensors.Tensor, "read", recorded)
    loaded = hf.load_params(tmp_path, model, mesh=sharding.make_mesh(2, 4))
    assert_equal(loaded, params)
    shapes = {shape for name, shape in reads if name.endswith("q_proj.weight")}
    assert shapes == {(24, 6)}  # [out, in]: a quarter of D, one layer
    count = sum(name == "model.layers.0.self_attn.q_proj.weight" for name, _ in reads)
    assert count == 4  # once per shard, not once per replica
    kernel = loaded["layers"]["attention"]["query"]["kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 6, 24)}


def test_rows_that_pad_the_vocabulary_are_zero_and_not_written(tmp_path):
    config = LLAMA | {"tie_word_embeddings": False, "num_attention_heads": 8}
    model = models.from_config(config)
    hf.save_pretrained(tmp_path / "a", model, random_params(model))
    plain = hf.load_params(tmp_path / "a", model)
    padded = dataclasses.replace(model, vocab_rows=64)
    for mesh in (None, sharding.make_mesh(1, 4, 2)):
        loaded = hf.load_params(tmp_path / "a", padded, mesh=mesh)
        for name in ("embed", "head"):
            table = np.asarray(loaded[name]["embedding"])
            np.testing.assert_array_equal(table[:61], plain[name]["embedding"])
            assert table.shape == (64, 24) and not np.any(table[61:])
    hf.save_pretrained(tmp_path / "b", padded, loaded)
    again = hf.load_params(tmp_path / "b", models.from_config(tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, again, plain)


def test_a_mesh_that_does_not_divide_a_parameter_raises(tmp_path):
    model, _ = saved(tmp_path, {**LLAMA, "hidden_size": 20})
    with pytest.raises(ValueError, match="embed/embedding.*cannot be split"):
        hf.load_params(tmp_path, model, mesh=sharding.make_mesh(1, 8))


def test_one_error_names_all_tensors_that_do_not_fit(tmp_path):
    model, _ = saved(tmp_path, LLAMA)

    def spoil(tensors):
        tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((44, 24), np.float32)
        tensors["surprise"] = np.zeros(3, np.float32)
        tensors["norm.weight"] = tensors["model.norm.weight"].copy()
        name = "model.layers.0.self_attn.q_proj.weight"
        tensors[name] = np.zeros((24, 23), np.float32)
        name = "model.layers.2.self_attn.q_proj.weight"
        tensors[name] = np.zeros((24, 24), np.int32)
        return tensors

    rewrite(tmp_path, spoil)
    with pytest.raises(ValueError) as caught:
        hf.load_params(tmp_path, model)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "missing: layers.1.mlp.up_proj.weight;",
        "unmapped: model.layers.3.mlp.up_proj.weight, surprise;",
        "model.norm.weight",
        "model.layers.0.self_attn.q_proj.weight (24, 23), expected (24, 24)",
        "model.layers.2.self_attn.q_proj.weight of dtype I32",
    ):
        assert part in message


def test_a_fused_tensor_of_the_wrong_shape_raises(tmp_path):
    model, _ = saved(tmp_path, GPT2)
    name = "transformer.h.1.attn.c_attn.weight"
    rewrite(tmp_path, lambda t: {**t, name: np.zeros((24, 48), np.float32)})
    with pytest.raises(ValueError, match=r"h\.1\.attn\.c_attn.*expected \(24, 72\)"):
        hf.load_params(tmp_path, model)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_the_error_for_a_truncated_file_names_it(tmp_path, keep):
    model, _ = saved(tmp_path, LLAMA)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole"):
        hf.load_params(tmp_path, model)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_error_for_values_that_are_not_finite_names_the_tensor(tmp_path, value):
    model, _ = saved(tmp_path, LLAMA)
    name = "model.layers.1.self_attn.o_proj.weight"

    def spoil(tensors):
        tensors[name][3, 4] = value
        return tensors

    rewrite(tmp_path, spoil)
    for mesh in (None, sharding.make_mesh(2, 4)):
        with pytest.raises(ValueError, match=f"not finite.* in {name};"):
            hf.load_params(tmp_path, model, mesh=mesh)


def test_the_error_for_values_that_overflow_the_dtype_names_the_tensor(tmp_path):
    model, _ = saved(tmp_path, LLAMA)

    def widen(tensors):
        tensors["model.norm.weight"][0] = 1e6
        return tensors

    rewrite(tmp_path, widen)
    assert hf.load_params(tmp_path, model)["final_norm"]["scale"][0] == 1e6
    with pytest.raises(ValueError, match=r"float16 in model\.norm\.weight"):
        hf.load_params(tmp_path, model, dtype=jnp.float16)


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/tmp/x.safetensors", "a/b.safetensors", "x.bin"]
)
def test_an_index_cannot_name_files_outside_its_folder(tmp_path, name):
    model = models.from_config(LLAMA)
    saved(tmp_path / "good", LLAMA)
    folder = tmp_path / "bad"
    folder.mkdir()
    (tmp_path / "good" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names the shard"):
        hf.load_params(folder, model)


def test_a_broken_or_incomplete_index_raises(tmp_path):
    model = models.from_config(LLAMA)
    index = tmp_path / "model.safetensors.index.json"
    for text in ("{", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[]"):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json"):
            hf.load_params(tmp_path, model)
    index.write_text('{"weight_map": {"a": "one.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"lacks one\.safetensors"):
        hf.load_params(tmp_path, model)


def test_a_folder_without_safetensors_raises(tmp_path):
    model = models.from_config(LLAMA)
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        hf.load_params(tmp_path, model)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin.*`mgsr convert"):
        hf.load_params(tmp_path, model)


def test_weights_that_are_a_git_lfs_pointer_are_named(tmp_path):
    pointer = (
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{0:064}\nsize 9\n"
    )
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(ValueError, match=r"model\.safetensors is a git-lfs pointer"):
        hf.load_params(tmp_path, models.from_config(LLAMA))


def test_only_an_earlier_export_is_overwritten(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()  # an empty folder is accepted
    model, params = saved(folder, LLAMA)
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        hf.save_pretrained(folder, model, params)
    doubled = jax.tree.map(lambda x: 2 * x, params)
    hf.save_pretrained(folder, model, doubled, overwrite=True)
    assert_equal(hf.load_params(folder, model), doubled)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes.txt"):
        hf.save_pretrained(folder, model, params, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    rewrite(folder, lambda tensors: tensors)  # weights of another producer
    with pytest.raises(FileExistsError, match="not written by mgsr_jax"):
        hf.save_pretrained(folder, model, params, overwrite=True)
    assert_equal(hf.load_params(folder, model), doubled)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError):
        hf.save_pretrained(file, model, params, overwrite=True)


def test_an_export_that_fails_leaves_no_files(tmp_path):
    model = models.from_config(LLAMA)
    params = random_params(model)
    with pytest.raises(FileNotFoundError, match="no tokenizer files"):
        hf.save_pretrained(tmp_path / "out", model, params, tokenizer_from=tmp_path)
    params["layers"]["mlp"].pop("up")
    params["final_norm"]["scale"] = jnp.ones(3)
    with pytest.raises(ValueError, match=r"final_norm/scale \(3,\).*mlp/up/kernel"):
        hf.save_pretrained(tmp_path / "out", model, params)
    assert not list(tmp_path.iterdir())


def test_sharded_params_give_the_same_files(tmp_path):
    model, params = saved(tmp_path / "plain", LLAMA)
    sharded = hf.load_params(tmp_path / "plain", model, mesh=sharding.make_mesh(2, 4))
    hf.save_pretrained(tmp_path / "sharded", model, sharded)
    expected, got = (
        load_file(tmp_path / name / "model.safetensors")
        for name in ("plain", "sharded")
    )
    assert expected.keys() == got.keys()
    assert_equal(got, expected)


def test_bfloat16_values_are_read_exactly(tmp_path):
    model, _ = saved(tmp_path, LLAMA, dtype=jnp.bfloat16)
    raw = load_file(tmp_path / "model.safetensors")["model.norm.weight"]
    assert raw.dtype == ml_dtypes.bfloat16
    loaded = hf.load_params(tmp_path, model, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(loaded["final_norm"]["scale"], raw)


LARGE = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
# Counts anonymous memory only: the file is mapped, so its pages belong to the system.
LOAD = """
import json, sys, threading, time
import jax
jax.config.update("jax_num_cpu_devices", 8)
from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf

def used():
    with open("/proc/self/status") as status:
        return 1024 * next(int(s.split()[1]) for s in status if "RssAnon" in s)

folder = sys.argv[1]
model = models.from_config(folder)
mesh = sharding.make_mesh(fsdp=8)
jax.block_until_ready(jax.device_put(1.0, sharding.replicated(mesh)))
before, peaks, loaded = used(), [0], threading.Event()

def watch():
    while not loaded.is_set():
        peaks[0] = max(peaks[0], used())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(hf.load_params(folder, model, mesh=mesh))
loaded.set()
watcher.join()
all_shards = [shard for x in jax.tree.leaves(params) for shard in x.addressable_shards]
shards = sum(shard.data.nbytes for shard in all_shards)
print(json.dumps({"peak": peaks[0] - before, "shards": shards}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_loading_takes_little_more_memory_than_this_hosts_shards(tmp_path):
    model = models.from_config(LARGE)
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), model.abstract_params())
    hf.save_pretrained(tmp_path / "model", model, params)
    largest = max(leaf.nbytes // 12 for leaf in jax.tree.leaves(params["layers"]))
    largest = max(largest, params["embed"]["embedding"].nbytes)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model")],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    used = json.loads(run.stdout)
    # Norms are replicated on all devices.
    assert used["shards"] > sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert used["peak"] <= 1.3 * used["shards"] + largest, used
