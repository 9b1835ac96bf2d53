"""Models of a run: their folders and shapes, and the checks that they fit."""

import dataclasses
import math
from collections.abc import Iterator

from jax.sharding import Mesh

from mgsr_jax import models, sharding
from mgsr_jax.checkpoint import hf, hub
from mgsr_jax.models import LanguageModel, lora, quantized
from mgsr_jax.routed_teachers import RoutedTeachers
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.distributed import lead_first
from mgsr_jax.training.teacher_config import different_folders
from mgsr_jax.typing import Tokenizer

_VOCABULARY_MULTIPLE = 128
"""Divisible by every tensor axis that is a power of two, and by accelerators' tiles."""

_PLATFORMS = {"flash": "tpu", "cudnn": "gpu"}
"""Platforms of the attention kernels that exist on one platform only."""

Teachers = LanguageModel | RoutedTeachers[LanguageModel]
"""The teacher of a run, or several that divide its rows."""


def with_local_models(config: TrainConfig) -> TrainConfig:
    """The settings with folders for the models; hub names are downloaded first.

    With several processes all of them must call this.

    Raises:
      FileNotFoundError, PermissionError, OSError: see `hub.local_folder`.
    """

    def local() -> TrainConfig:
        teacher = config.teacher
        if isinstance(teacher, dict):
            teacher = {name: hub.local_folder(own) for name, own in teacher.items()}
        elif teacher is not None:
            teacher = hub.local_folder(teacher)
        student = hub.local_folder(config.student)
        return dataclasses.replace(config, student=student, teacher=teacher)

    return lead_first(local)


def read_models(config: TrainConfig) -> tuple[LanguageModel, Teachers | None]:
    """Student and teacher, with vocabularies padded to a common number of rows.

    The padding depends on the mesh as little as possible, because a run may be resumed
    on another mesh.
    """
    if config.runs_teacher and config.teacher_dtype == "int8":
        quantized.check_installed()
    student = models.from_config(config.student)
    folders, indices = different_folders(config.teacher)
    teachers = [models.from_config(folder) for folder in folders]
    rows = max(model.config.vocab_size for model in (student, *teachers))
    multiple = math.lcm(_VOCABULARY_MULTIPLE, config.mesh.tensor)

    def fitted(model: LanguageModel) -> LanguageModel:
        return dataclasses.replace(
            model,
            vocab_rows=multiple * math.ceil(rows / multiple),
            tensor=config.mesh.tensor,
            attention=config.attention,
        )

    student = fitted(student)
    student = dataclasses.replace(
        student,
        remat=config.remat,
        lora=config.lora,
        split_decoder=config.rollout.split_weights,
    )
    if config.lora.rank:
        lora.targeted(student, config.lora)  # raises if no kernel matches
    teachers = tuple(map(fitted, teachers))
    if isinstance(config.teacher, dict):
        return student, RoutedTeachers(tuple(config.teacher), teachers, indices)
    return student, teachers[0] if teachers else None


def shared_vocabulary(
    config: TrainConfig,
    student: LanguageModel,
    teacher: Teachers | None,
    tokenizer: Tokenizer,
) -> int:
    """Number of tokens of the one tokenizer that both models use.

    Raises:
      ValueError: an embedding has fewer rows, or the teacher has another tokenizer.
    """
    size = len(tokenizer)
    for role, model in _roles(student, teacher):
        if model.config.vocab_size < size:
            raise ValueError(
                f"the tokenizer has {size} tokens, but the {role}'s embedding has only "
                f"{model.config.vocab_size} rows; give the tokenizer of that checkpoint"
            )
    for folder in different_folders(config.teacher)[0]:
        other = hf.load_tokenizer(folder)
        if hf.tokenizer_fingerprint(tokenizer) != hf.tokenizer_fingerprint(other):
            raise ValueError(
                f"teacher {folder} ({len(other)} tokens) and student "
                f"{config.student} ({size} tokens) have different tokenizers; "
                "distillation compares distributions over one vocabulary, so give a "
                "pair with the same tokenizer"
            )
    return size


def check_sizes(
    config: TrainConfig,
    student: LanguageModel,
    teacher: Teachers | None,
    mesh: Mesh,
) -> None:
    """Refuse settings that the models or the devices do not support.

    Raises:
      ValueError: rows are too long, the rows of a micro-batch or `rollout.decode_rows`
        do not divide over the mesh, or the devices do not have the kernel of
        `attention`.
    """
    encoding = config.data.encoding
    for role, model in _roles(student, teacher):
        width = encoding.teacher_width if model is not student else encoding.max_length
        if model.config.max_length < width:
            raise ValueError(
                f"data.max_length={encoding.max_length} makes rows of {width} "
                f"tokens, which is beyond the {role}'s {model.config.max_length} "
                "positions; lower it"
            )
    parts = sharding.row_parts(mesh)
    if config.micro_batch_size % parts:
        raise ValueError(
            f"a micro-batch of {config.micro_batch_size} rows "
            f"(batch_size={config.batch_size} / micro_batches={config.micro_batches}) "
            f"does not divide over the {parts} parts of the mesh {dict(mesh.shape)}; "
            f"use a multiple of {parts}"
        )
    if (config.rollout.decode_rows or 0) % parts:
        raise ValueError(
            f"rollout.decode_rows={config.rollout.decode_rows} does not divide over "
            f"the {parts} parts of the mesh {dict(mesh.shape)}; use a multiple of "
            f"{parts}, or leave it out to decode all rows of a step together"
        )
    platform = mesh.devices.flat[0].platform
    expected = _PLATFORMS.get(config.attention, platform)
    if platform != expected:
        raise ValueError(
            f"attention={config.attention!r} is a kernel for a {expected}, but these "
            f"devices are of the platform {platform}; set attention to xla"
        )


def _roles(
    student: LanguageModel, teacher: Teachers | None
) -> Iterator[tuple[str, LanguageModel]]:
    yield "student", student
    for name, model in models_of(teacher):
        yield f"teacher {name}".strip(), model


def models_of(teacher: Teachers | None) -> list[tuple[str, LanguageModel]]:
    """The different models of the teachers, each with the names of those that share it.

    The name of a single teacher is empty.
    """
    if not isinstance(teacher, RoutedTeachers):
        return [] if teacher is None else [("", teacher)]
    named = [*zip(teacher.names, teacher.model_of, strict=True)]
    return [
        (", ".join(name for name, own in named if own == i), model)
        for i, model in enumerate(teacher.models)
    ]
