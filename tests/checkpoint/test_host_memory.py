"""How much of a host's memory loading a model takes, beyond the model itself."""

import json
import os
import subprocess
import sys

import jax
import pytest

from mgsr_jax import models
from mgsr_jax.checkpoint import hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
# The file is mapped, and its pages are the system's: they are not counted.
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
before, most, loaded = used(), [0], threading.Event()

def watch():
    while not loaded.is_set():
        most[0] = max(most[0], used())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
params = jax.block_until_ready(hf.load_params(folder, model, mesh=mesh))
loaded.set()
watcher.join()
held = [shard for x in jax.tree.leaves(params) for shard in x.addressable_shards]
shards = sum(shard.data.nbytes for shard in held)
print(json.dumps({"peak": most[0] - before, "shards": shards}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_loading_takes_little_more_than_this_hosts_shards(tmp_path):
    model = models.from_config(LLAMA)
    params = model.init(jax.random.key(0))
    hf.save_pretrained(tmp_path / "model", model, params)
    largest = max(leaf.nbytes // 12 for leaf in jax.tree.leaves(params["layers"]))
    largest = max(largest, params["embed"]["embedding"].nbytes)
    found = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "model")],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(found.stdout)
    # Norms are on every device.
    assert found["shards"] > sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert found["peak"] <= 1.3 * found["shards"] + largest, found
