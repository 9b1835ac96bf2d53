"""Tiny models and rows that several test files share."""

import jax
import jax.numpy as jnp
import numpy as np

from mgsr_jax import models
from mgsr_jax.rows import Rows, from_lists

VOCAB = 29


def llama(seed: int = 0, *, width: int = 16, scale: float = 4.0, **changes):
    """A random LLaMA sharp enough that its greedy choices are far from ties."""
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    model = models.from_config(config | changes)
    params = model.init(jax.random.key(seed))
    return model, jax.tree.map(lambda p: p * scale if p.ndim > 1 else p, params)


def prompts(lengths=(1, 4, 2, 6), width: int = 14, seed: int = 0) -> Rows:
    """Prompt-only rows of ragged lengths."""
    rng = np.random.default_rng(seed)
    texts = [rng.integers(2, VOCAB, n).tolist() for n in lengths]
    rows = from_lists(texts, [[]] * len(texts), width=width, ground_truth=False)
    return jax.tree.map(jnp.asarray, rows)


def complete(lengths=((2, 5), (1, 9), (3, 1), (4, 6)), width: int = 14, seed: int = 0):
    """Ground-truth rows with spans: (prompt, response) lengths."""
    rng = np.random.default_rng(seed)

    def draw(n):
        return rng.integers(2, VOCAB, n).tolist()

    spans = [np.sort(rng.integers(-1, 3, r)).tolist() for _, r in lengths]
    rows = from_lists(
        [draw(p) for p, _ in lengths],
        [draw(r) for _, r in lengths],
        width=width,
        span_ids=spans,
    )
    return jax.tree.map(jnp.asarray, rows)
