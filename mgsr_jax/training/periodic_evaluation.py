"""Evaluation during training: the student answers a few prompts and is scored."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from rich.console import Console

from mgsr_jax import sharding
from mgsr_jax.data.prompts import Prompt, load_prompts
from mgsr_jax.data.source_settings import DataSource, as_sources
from mgsr_jax.evaluation.evaluate import evaluate, prompts_to_score
from mgsr_jax.evaluation.responses import EvaluationConfig
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.inputs import RunInputs
from mgsr_jax.typing import Params


def load_evaluation(inputs: RunInputs, *, console: Console) -> list[Prompt]:
    """The prompts of a run's evaluations; none if it never evaluates.

    Raises:
      ValueError, FileNotFoundError: a mistake in the data; rows are too long for the
        student, or a batch does not divide over the mesh.
    """
    config = inputs.config
    if not config.evaluate_every:
        return []
    source = _source(config)
    protocol, limit = _protocol(inputs), inputs.student.config.max_length
    if protocol.max_length > limit:
        raise ValueError(
            f"evaluate.max_length={protocol.max_length} is beyond the student's "
            f"{limit} positions; lower it"
        )
    sharding.host_rows(inputs.mesh, protocol.batch_size)  # raises if it does not divide
    encoding = dataclasses.replace(
        config.data.encoding, max_length=protocol.max_length, too_long="drop"
    )
    prompts, report = load_prompts(
        source.path,
        inputs.tokenizer,
        encoding,
        split=source.split or config.evaluate.split,
        columns=source.columns,
    )
    scored = prompts_to_score(prompts, protocol, config.evaluate.metrics)
    scored = scored[: config.evaluate.limit]
    console.print(
        f"{source.path}: {len(scored)} of {report.kept} prompts are answered every "
        f"{config.evaluate_every} steps",
        markup=False,
    )
    return scored


def _source(config: TrainConfig) -> DataSource:
    """The evaluation set: that of `evaluate`, or the validation data."""
    given, data = config.evaluate, config.data
    if given.data is not None:
        return DataSource(given.data, split=given.split, columns=given.columns)
    sources = as_sources(data.valid or [])
    if len(sources) != 1:
        raise ValueError(
            f"evaluate_every={config.evaluate_every} needs one evaluation set, and "
            f"data.valid is {data.valid}; set evaluate.data, or evaluate_every to 0"
        )
    (source,) = sources
    return dataclasses.replace(
        source,
        split=source.split or data.valid_split,
        columns=source.columns or data.columns,
    )


def evaluation_scores(
    inputs: RunInputs, prompts: Sequence[Prompt], params: Params
) -> dict[str, float]:
    """Scores of the student's greedy responses, and its loss on the references.

    Args:
      inputs: of the run; its mesh is the current one.
      prompts: from `load_evaluation`.
      params: the student's parameters; adapters are merged by the decoder.
    """
    result = evaluate(
        inputs.student,
        params,
        inputs.tokenizer,
        prompts,
        _protocol(inputs),
        metrics=inputs.config.evaluate.metrics,
        eos_ids=inputs.eos_ids,
        mesh=inputs.mesh,
    )
    scores = {name: score.mean for name, score in result.greedy.metrics.items()}
    others = dataclasses.asdict(result.greedy)
    del others["metrics"]
    return {**scores, **others, "loss": result.loss}


def _protocol(inputs: RunInputs) -> EvaluationConfig:
    config = inputs.config
    settings, encoding = config.evaluate, config.data.encoding
    return EvaluationConfig(
        seeds=(),
        max_prompt_length=encoding.max_prompt_length,
        max_length=settings.max_length or encoding.max_length,
        batch_size=settings.batch_size or config.micro_batch_size,
        dtype=jnp.dtype(config.dtype),
    )
