"""Evaluation during training: the student answers a few prompts and is scored."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from rich.console import Console

from mgsr_jax import sharding
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.data.prompts import Prompt, load_prompts
from mgsr_jax.data.source_settings import DataSource
from mgsr_jax.evaluation.evaluate import evaluate, prompts_to_score
from mgsr_jax.evaluation.responses import EvaluationConfig
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.inputs import RunInputs
from mgsr_jax.training.measurement_config import SCORES
from mgsr_jax.typing import Params


def load_evaluation(inputs: RunInputs, *, console: Console) -> list[Prompt]:
    """The prompts of a run's evaluations; none if it never evaluates.

    Raises:
      ValueError, FileNotFoundError: a mistake in the data; rows are too long for the
        student, or a batch does not divide over the mesh.
      ImportError: the package of a metric is missing; names the extra.
    """
    config = inputs.config
    if not config.evaluate_every:
        return []
    if not (sources := _sources(config)):
        raise ValueError(
            f"evaluate_every={config.evaluate_every}, but there is no evaluation set; "
            "set evaluate.data or data.valid, or evaluate_every to 0"
        )
    protocol, limit = _protocol(inputs), inputs.student.config.max_length
    if protocol.max_length > limit:
        raise ValueError(
            f"evaluate.max_length={protocol.max_length} is beyond the student's "
            f"{limit} positions; lower it"
        )
    sharding.host_rows(inputs.mesh, protocol.batch_size)  # raises if it does not divide
    prompts: list[Prompt] = []
    left_out = 0
    for source in sources:
        found, report = load_prompts(
            source.path,
            inputs.tokenizer,
            _encoding(config),
            split=source.split or config.evaluate.split,
            columns=config.data.columns_of(source),
        )
        prompts += found
        left_out += report.too_long + report.empty + report.malformed
    prompts = [dataclasses.replace(p, example=i) for i, p in enumerate(prompts)]
    scored = prompts_to_score(prompts, protocol, config.evaluate.metrics)
    console.print(
        f"{', '.join(source.path for source in sources)}: "
        f"{len(scored[: config.evaluate.limit])} of {len(prompts)} prompts are "
        f"answered every {config.evaluate_every} steps; {left_out} records are left "
        f"out as too long (more than {protocol.max_prompt_length} tokens of prompt), "
        "empty or malformed",
        markup=False,
        soft_wrap=True,
    )
    return scored[: config.evaluate.limit]


def _sources(config: TrainConfig) -> list[DataSource]:
    """The evaluation set, or else the validation data; each with its split."""
    own = config.evaluate
    if own.data is not None:
        return [DataSource(own.data, split=own.split, columns=own.columns)]
    return [
        dataclasses.replace(source, split=source.split or config.data.valid_split)
        for source in config.data.valid_sources
    ]


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
    metrics = {name: mean.mean for name, mean in result.greedy.metrics.items()}
    scores = vars(result.greedy) | {"loss": result.loss}
    return metrics | {name: scores[name] for name in SCORES}


def _encoding(config: TrainConfig) -> Encoding:
    """How evaluation prompts become tokens: as the data does, with their own length."""
    encoding = config.data.encoding
    length = config.evaluate.max_length or encoding.max_length
    return dataclasses.replace(encoding, max_length=length, too_long="drop")


def _protocol(inputs: RunInputs) -> EvaluationConfig:
    config, encoding = inputs.config, _encoding(inputs.config)
    return EvaluationConfig(
        seeds=(),
        max_prompt_length=encoding.prompt_limit,
        max_length=encoding.max_length,
        batch_size=config.evaluate.batch_size or config.micro_batch_size,
        dtype=jnp.dtype(config.dtype),
    )
