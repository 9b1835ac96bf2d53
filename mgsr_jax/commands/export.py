"""`mgsr export`: a checkpoint of a run as a folder that other programs load."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mgsr_jax import models
from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint.peft import save_adapter
from mgsr_jax.checkpoint.state import params_shapes, restore_params
from mgsr_jax.models import lora
from mgsr_jax.models.lora import LORA, LoraConfig
from mgsr_jax.training.inputs import read_run_config
from mgsr_jax.training.trainer import CHECKPOINTS
from mgsr_jax.typing import STUDENT


def export(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Any = jnp.float32,
    adapter: bool = False,
) -> None:
    """Writes the student of checkpoint `step`, or of the latest, to `output`.

    A Hugging Face folder, adapters merged; with `adapter` a peft folder of those alone.

    Raises:
      FileNotFoundError: no run or no such checkpoint.
      FileExistsError: `output` holds something.
      ValueError: `adapter`, and the run has none; a checkpoint that does not fit.
    """
    config, checkpoints = read_run_config(run), Path(run) / CHECKPOINTS
    source, settings = config["student"], LoraConfig(**config.get("lora", {}))
    model = dataclasses.replace(models.from_config(source), lora=settings)
    if adapter and not settings.rank:
        raise ValueError(
            f"{run} trained all weights (lora.rank=0) and has no adapter; leave "
            "--adapter out"
        )
    if settings.rank:
        key = jax.random.key(0)
        trained = {LORA: jax.eval_shape(lambda: lora.init(key, model, settings))}
    else:  # as it was trained, with a padded vocabulary
        rows = params_shapes(checkpoints, step)[f"{STUDENT}/embed/embedding"][0]
        model = dataclasses.replace(model, vocab_rows=rows)
        trained = model.abstract_params()
    found = restore_params(checkpoints, step, {STUDENT: trained})
    params = jax.tree.map(jnp.asarray, found[STUDENT])
    if adapter:
        save_adapter(output, model, params[LORA], base_model=source, dtype=dtype)
        return
    if settings.rank:
        # In the precision in which the adapters were trained beside them.
        base = hf.load_params(source, model, dtype=jnp.dtype(config["dtype"]))
        params = lora.merged(base | params, settings)
    hf.save_pretrained(output, model, params, tokenizer_from=source, dtype=dtype)
