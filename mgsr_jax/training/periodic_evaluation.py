"""Evaluation during training: the student answers a few prompts and is scored."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from rich.console import Console

from mgsr_jax import sharding
from mgsr_jax.data.prompts import Prompt, load_prompts
from mgsr_jax.evaluation.evaluate import evaluate
from mgsr_jax.evaluation.responses import EvaluationConfig, scored_prompts
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
    path, split = config.evaluate.data, config.evaluate.split
    if path is None:
        path, split = config.data.valid, config.data.valid_split
    if path is None:
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
    encoding = dataclasses.replace(
        config.data.encoding, max_length=protocol.max_length, too_long="drop"
    )
    prompts, report = load_prompts(path, inputs.tokenizer, encoding, split=split)
    scored = scored_prompts(prompts, protocol)[: config.evaluate.limit]
    console.print(
        f"{path}: {len(scored)} of {report.kept} prompts are answered every "
        f"{config.evaluate_every} steps",
        markup=False,
    )
    return scored


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
        eos_ids=inputs.eos_ids,
        mesh=inputs.mesh,
    )
    return {**dataclasses.asdict(result.greedy), "loss": result.loss}


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
