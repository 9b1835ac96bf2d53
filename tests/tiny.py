"""Tiny models and rows that several test files share."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from mgsr_jax import models
from mgsr_jax.rows import Rows, from_lists

VOCAB = 29

# config.json of the families, as small as they get.
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
}
OPT = {
    "model_type": "opt",
    "vocab_size": 32,
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 14,
}


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


WORDS = (
    "the a red green old small dog cat bird man child house river ball tree "
    "sees gives takes finds near under on to runs . , Write a story about"
).split()


def records(count: int, seed: int = 0) -> list[dict]:
    """Instructions with answers made of a few words."""
    rng = np.random.default_rng(seed)
    nouns, verbs = WORDS[6:15], WORDS[15:19]
    result = []
    for _ in range(count):
        first, second, third = rng.choice(nouns, 3, replace=False)
        result.append(
            {
                "instruction": f"Write a story about the {first} .",
                "output": f"the old {first} {rng.choice(verbs)} a small {second} "
                f"near the red {third} .",
            }
        )
    return result


def tokenizer(folder):
    """A word-level tokenizer saved to `folder`; padding is end-of-sequence."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mgsr_jax.data.plain_text import alpaca_prompt

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    texts = [alpaca_prompt(r["instruction"]) + r["output"] for r in records(200)]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>"
    )
    fast.save_pretrained(folder)
    return fast


def project(folder, *, teacher_seed: int = 1):
    """Teacher, student and data in `folder`, as a user has them; returns `folder`."""
    import json

    from mgsr_jax.checkpoint.hf import save_pretrained

    size = len(tokenizer(folder / "tokenizer"))
    shape = dict(
        vocab_size=size + 3,
        max_position_embeddings=128,
        hidden_size=32,
        intermediate_size=64,
        eos_token_id=0,
    )
    for name, seed, layers in (("student", 0, 1), ("teacher", teacher_seed, 2)):
        model, params = llama(seed, scale=2.0, num_hidden_layers=layers, **shape)
        save_pretrained(
            folder / name, model, params, tokenizer_from=folder / "tokenizer"
        )
    for name, count, seed in (("train", 48, 0), ("valid", 12, 1)):
        lines = [json.dumps(record) for record in records(count, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def train_config(project, name, **changes):
    """Settings of a short run on the data of `project`, in the folder `name` there."""
    from mgsr_jax.training.config import TrainConfig
    from mgsr_jax.training.data_config import DataConfig
    from mgsr_jax.training.optimizer import OptimizerConfig

    settings = dict(
        student=str(project / "student"),
        output=str(project / name),
        batch_size=8,
        data=DataConfig(
            train=str(project / "train.jsonl"),
            valid=str(project / "valid.jsonl"),
            max_prompt_length=40,
            max_length=56,
            cache_dir=str(project / "cache"),
        ),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        tensorboard=False,
    )
    return TrainConfig(**settings | changes)


def metrics(project, name):
    """The lines of a run's metrics."""
    lines = (project / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def checkpoint(folder):
    """Everything that the latest checkpoint of a run holds."""
    import orbax.checkpoint as ocp

    from mgsr_jax.checkpoint import state

    with state.open_manager(folder / "checkpoints") as manager:
        found = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(),
                host=ocp.args.JsonRestore(),
                replay=ocp.args.StandardRestore(),
            ),
        )
    key = jax.random.key_data(found.state.pop("key"))
    return dict(found.items()) | {"key": key}


def log_probs(model, params, tokens) -> np.ndarray:
    """Log-probabilities of the next token at every position, in float64. [B, T, V]"""

    @jax.jit
    def logits(params, tokens):
        hidden, _ = model.forward(params, tokens)
        return model.unembed(model.head_params(params), hidden)

    values = np.asarray(logits(params, jnp.asarray(tokens)), np.float64)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))
