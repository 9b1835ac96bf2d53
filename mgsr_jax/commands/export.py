"""`mgsr export`: a run's checkpoint as a folder that other programs load."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.loaded import Dtype, new_folder
from mgsr_jax.models.lora import LORA, LoraConfig
from mgsr_jax.typing import STUDENT, Params

if TYPE_CHECKING:
    from jax.typing import DTypeLike

    from mgsr_jax.models import LanguageModel


def export(
    run: str,
    output: str,
    *,
    step: int | None = None,
    best: bool = False,
    dtype: Dtype = "float32",
    adapter: bool = False,
) -> int:
    """Write a checkpoint of a run as a Hugging Face folder.

    LoRA adapters are merged into the student's weights.

    Args:
      run: folder of a training run.
      output: folder to create; must be new.
      step: step of the checkpoint; default: the latest.
      best: export the checkpoint that is best by the run's best_metric.
      dtype: precision of the weights written.
      adapter: write only the adapters of a run with LoRA, as a folder that peft loads
        onto the original student.
    """
    import jax.numpy as jnp

    new_folder(output)
    if best:
        step = _best_step(run, step)
    export_student(run, output, step=step, dtype=jnp.dtype(dtype), adapter=adapter)
    print(output)
    return DONE


def _best_step(run: str, step: int | None) -> int:
    """The step of the run's best checkpoint, which is printed."""
    from mgsr_jax.checkpoint.state import best_step
    from mgsr_jax.training.run_folder import CHECKPOINTS, read_run_config

    if step is not None:
        raise ValueError(
            f"step={step} and best=true name two checkpoints; give only one of them"
        )
    metric = read_run_config(run).get("best_metric")
    if metric is None:
        raise ValueError(
            f"{run} has no best checkpoint: best_metric was not set; leave --best out, "
            "or choose a checkpoint with --step"
        )
    best = best_step(Path(run) / CHECKPOINTS, metric)
    print(f"best {metric}: step {best}")
    return best


def export_student(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: "DTypeLike" = "float32",
    adapter: bool = False,
) -> None:
    """Write the student of checkpoint `step`, or of the latest, to `output`.

    The result is a Hugging Face folder with adapters merged, or with `adapter` a peft
    folder of the adapters.

    Raises:
      FileNotFoundError: there is no such run or checkpoint.
      FileExistsError: `output` holds files.
      ValueError: `adapter` is set but the run has none; the checkpoint does not fit the
        model.
    """
    from mgsr_jax import models
    from mgsr_jax.checkpoint import hf, hub
    from mgsr_jax.checkpoint.peft import save_adapter
    from mgsr_jax.checkpoint.response_format import load_format
    from mgsr_jax.models import lora
    from mgsr_jax.training.run_folder import RESPONSE_FORMAT_FILE, read_run_config

    config = read_run_config(run)
    source = hub.local_folder(config["student"])
    settings = LoraConfig(**config.get("lora", {}))
    model = dataclasses.replace(models.from_config(source), lora=settings)
    if adapter and not settings.rank:
        raise ValueError(
            f"{run} trained all weights (lora.rank=0) and has no adapter; leave "
            "--adapter out"
        )
    model, params = _restore(run, step, model)
    if adapter:
        save_adapter(output, model, params[LORA], base_model=source, dtype=dtype)
        return
    if settings.rank:
        # The frozen weights had this precision while the adapters were trained.
        base = hf.load_params(source, model, dtype=config["dtype"])
        params = lora.merged(base | params, settings)
    ends = load_format(Path(run) / RESPONSE_FORMAT_FILE)
    hf.save_pretrained(
        output, model, params, tokenizer_from=source, response_format=ends, dtype=dtype
    )


def _restore(
    run: str | os.PathLike[str], step: int | None, model: "LanguageModel"
) -> tuple["LanguageModel", Params]:
    """The trained parameters of a checkpoint, and the model with their vocabulary."""
    import jax
    import jax.numpy as jnp

    from mgsr_jax.checkpoint.state import params_shapes, restore_params
    from mgsr_jax.models import lora
    from mgsr_jax.training.run_folder import CHECKPOINTS

    checkpoints = Path(run) / CHECKPOINTS
    if model.lora.rank:
        key = jax.random.key(0)
        trained = {LORA: jax.eval_shape(lambda: lora.init(key, model, model.lora))}
    else:  # training padded the vocabulary
        rows = params_shapes(checkpoints, step)[f"{STUDENT}/embed/embedding"][0]
        model = dataclasses.replace(model, vocab_rows=rows)
        trained = model.abstract_params()
    restored = restore_params(checkpoints, step, {STUDENT: trained})
    return model, jax.tree.map(jnp.asarray, restored[STUDENT])
