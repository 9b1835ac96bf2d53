"""Exposure bias of a checkpoint against its teacher's, for `mgsr evaluate`."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from mgsr_jax.commands.loaded import LoadedModel
from mgsr_jax.typing import Params

if TYPE_CHECKING:
    from mgsr_jax.data.prompts import Prompt
    from mgsr_jax.evaluation.responses import EvaluationConfig
    from mgsr_jax.rows import Rows


def check_same_tokenizer(student: LoadedModel, teacher: LoadedModel) -> None:
    """Refuse a teacher whose tokenizer is not the student's.

    Raises:
      ValueError: names both models.
    """
    from mgsr_jax.checkpoint.tokenizer import tokenizer_fingerprint

    first, second = student.tokenizer, teacher.tokenizer
    if tokenizer_fingerprint(first) != tokenizer_fingerprint(second):
        raise ValueError(
            f"teacher {teacher.folder} ({len(second)} tokens) and model "
            f"{student.folder} ({len(first)} tokens) have different tokenizers; "
            "exposure_bias compares distributions over one vocabulary, so give a "
            "teacher with the same tokenizer"
        )


def measure_exposure_bias(
    models: list[tuple[LoadedModel, Params]],
    prompts: list["Prompt"],
    protocol: "EvaluationConfig",
    progress: Callable[[int, int], None],
) -> float:
    """ExAccErr in percent of the first model with the second as its teacher."""
    import jax

    from mgsr_jax.decoding.sampling import ANCESTRAL
    from mgsr_jax.evaluation.exposure_bias import exposure_bias
    from mgsr_jax.evaluation.responses import scored_prompts

    protocol = dataclasses.replace(protocol, sampling=ANCESTRAL, no_repeat_ngram=0)
    scored = scored_prompts(prompts, protocol)
    vocab_size = len(models[0][0].tokenizer)
    batches = -(-len(scored) // protocol.batch_size)
    draws = len(protocol.seeds) * protocol.samples
    total, done = len(models) * draws * batches, itertools.count(1)

    def samples(loaded: LoadedModel, params: Params) -> Iterator["Rows"]:
        for rows in _samples(loaded, params, scored, protocol, vocab_size):
            yield rows
            progress(next(done), total)

    (student, student_params), (teacher, teacher_params) = models
    mesh = student.mesh
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return exposure_bias(
            student.model,
            student_params,
            teacher.model,
            teacher_params,
            samples(student, student_params),
            samples(teacher, teacher_params),
            vocab_size=vocab_size,
        )


def _samples(
    loaded: LoadedModel,
    params: Params,
    prompts: list["Prompt"],
    protocol: "EvaluationConfig",
    vocab_size: int,
) -> Iterator["Rows"]:
    """The model's samples of all prompts, batch by batch."""
    from mgsr_jax.evaluation.responses import sample_responses

    decoding = protocol.decoding(loaded.eos_ids(), vocab_size)
    for seed, sample in itertools.product(protocol.seeds, range(protocol.samples)):
        yield from sample_responses(
            loaded.model,
            params,
            prompts,
            protocol,
            decoding=decoding,
            seed=seed,
            sample=sample,
            mesh=loaded.mesh,
        )
