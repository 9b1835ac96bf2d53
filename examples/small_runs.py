"""Parts that the examples share: small models, settings of short runs, tables."""

import dataclasses
import hashlib
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich import box
from rich.console import Console
from rich.table import Table

import mgsr_jax
from mgsr_jax import models
from mgsr_jax.checkpoint import hf
from mgsr_jax.evaluation.tables import markdown_table
from mgsr_jax.models import LanguageModel
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.optimizer import OptimizerConfig
from mgsr_jax.training.trainer import TrainResult, train
from mgsr_jax.typing import Params

Columns = Mapping[str, tuple[str, str]]
"""Field of a record of scores -> head of its column, format of a number."""


@dataclasses.dataclass(frozen=True)
class Method:
    """Training of a student from its start.

    Attributes:
      objective: the losses and their weights.
      rollout: where the rows of a step come from.
    """

    objective: Objective
    rollout: RolloutConfig = RolloutConfig()


def write_model(
    folder: Path, tokenizer_folder: Path, *, width: int, layers: int, seed: int
) -> Path:
    """Write a random LLaMA as a Hugging Face folder."""
    tokenizer = hf.load_tokenizer(tokenizer_folder)
    model = models.from_config(
        {
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 32,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "eos_token_id": tokenizer.eos_token_id,
        }
    )
    params = scaled_for_width(model.init(jax.random.key(seed)))
    hf.save_pretrained(folder, model, params, tokenizer_from=tokenizer_folder)
    return folder


def load(folder: Path, mesh: Mesh) -> tuple[LanguageModel, Params]:
    """Model and weights of a Hugging Face folder, sharded over the mesh."""
    model = models.from_config(folder)
    return model, hf.load_params(folder, model, mesh=mesh)


def scaled_for_width(params: Params) -> Params:
    """Rescale kernels to a deviation of fan_in ** -0.5 and embeddings to 0.3.

    `init` draws with deviation 0.02, as large models do. At these small widths that is
    too small: learning to copy words from the prompt then takes three times the steps.
    """

    def scaled(path: tuple, leaf: jax.Array) -> jax.Array:
        if path[-1].key == "kernel":
            return leaf * (leaf.shape[-2] ** -0.5 / 0.02)
        return leaf * 15.0 if path[-1].key == "embedding" else leaf

    return jax.tree_util.tree_map_with_path(scaled, params)


def optimizer(learning_rate: float, final_learning_rate: float) -> OptimizerConfig:
    """AdamW for a short run: 20 warm-up steps, a short mean of squared gradients."""
    return OptimizerConfig(
        learning_rate=learning_rate,
        final_learning_rate=final_learning_rate,
        warmup_steps=20,
        beta2=0.98,
    )


def train_to_the_end(config: TrainConfig, console: Console) -> TrainResult:
    """Train; end the example if a signal such as Ctrl-C stopped the training."""
    result = train(config, console=console)
    if not result.finished:
        raise SystemExit(f"stopped in {result.output}; start the example again")
    return result


def recipe_digest(*files: str, settings: str = "") -> str:
    """Short digest of everything that a model is made by.

    Args:
      files: source files, in addition to this one and mgsr_jax's version.
      settings: settings that are not in a file.
    """
    recipe = b"".join(Path(file).read_bytes() for file in (*files, __file__))
    recipe += f"{mgsr_jax.__version__} {settings}".encode()
    return hashlib.sha256(recipe).hexdigest()[:8]


def one_device_per_core() -> None:
    """Make jax simulate a device per core, at most eight; call it before any array.

    On a CPU, one device per core, each with its share of the rows, is faster than one
    device that splits every small product over the cores.
    """
    cores = os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", 1 << min(cores.bit_length() - 1, 3))


def run_name(method: str) -> str:
    """A folder name for a method."""
    return method.lower().replace(", ", "-").replace(" ", "-")


def cell(values: Sequence[float], form: str) -> str:
    """The mean, and for several values their standard deviation."""
    text = f"{statistics.fmean(values):{form}}"
    return f"{text} ± {statistics.stdev(values):{form}}" if len(values) > 1 else text


def table_rows(
    scores: Mapping[str, Sequence[object]], columns: Columns
) -> list[list[str]]:
    """One row per model: its name and a cell for each column.

    Args:
      scores: model -> its records of scores, one per seed.
      columns: fields of the records.
    """
    return [
        [name]
        + [
            cell([getattr(scores, field) for scores in by_seed], form)
            for field, (_, form) in columns.items()
        ]
        for name, by_seed in scores.items()
    ]


def show_table(
    console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: str
) -> str:
    """Print a table of models with its notes, and return both as Markdown.

    Args:
      console: where it is printed.
      heads: heads of all columns but the first, which has the models' names.
      rows: from `table_rows`.
      notes: text below the table.
    """
    printed = Table(
        *(head.replace(" ", "\n") for head in ("model", *heads)), box=box.SIMPLE
    )
    printed.columns[0].no_wrap = True
    for row in rows:
        printed.add_row(*row)
    console.print(printed, notes)
    return f"{markdown_table(['model', *heads], rows)}\n\n{notes}\n"
