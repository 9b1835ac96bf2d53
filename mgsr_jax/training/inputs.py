"""Inputs of a run, read and checked before a model's weights are loaded.

Most mistakes end here, in one line, before anything is written.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import datasets
import jax
from jax.sharding import Mesh
from rich.console import Console

from mgsr_jax import __version__, models, sharding
from mgsr_jax.checkpoint import hf, hub
from mgsr_jax.checkpoint.chat_template import same_template
from mgsr_jax.checkpoint.folder import weights_digest
from mgsr_jax.checkpoint.response_format import ResponseFormat
from mgsr_jax.checkpoint.tokenizer import eos_ids
from mgsr_jax.data import dataset
from mgsr_jax.data.encoding import Encoder
from mgsr_jax.data.spans import Chunker, resolve_chunker
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.data.teacher_manifest import Origin
from mgsr_jax.models import LanguageModel, lora, quantized
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.distributed import lead_first
from mgsr_jax.training.read_data import read_data
from mgsr_jax.training.run_folder import check_output
from mgsr_jax.typing import Tokenizer

_VOCABULARY_MULTIPLE = 128
"""Divisible by every tensor axis that is a power of two, and by accelerators' tiles."""

_PLATFORMS = {"flash": "tpu", "cudnn": "gpu"}
"""Platforms of the attention kernels that exist on one platform only."""


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """Everything about a run that is known before weights are loaded.

    Attributes:
      config: settings, with the tensor axis of `mesh` filled in.
      student: the student as pure functions.
      teacher: the teacher as pure functions, or None.
      tokenizer: the tokenizer of both models.
      vocab_size: number of tokens; embeddings may have more rows.
      response_format: tokens that end a response, and the run's own template file.
      mesh: device mesh.
      train: tokenised training data.
      train_fingerprint: digest of the training rows, in their order.
      valid: tokenised validation data, or None.
      chunker: finds the phrases of a text.
      rejected: one line for each record that is not used unchanged.
      steps: optimizer steps of the whole run.
      teacher_cache: the teacher's output on the training data; None runs the teacher.
      student_digest: digest of the student's folder, if adapters are trained on it.
    """

    config: TrainConfig
    student: LanguageModel
    teacher: LanguageModel | None
    tokenizer: Tokenizer
    vocab_size: int
    response_format: ResponseFormat
    mesh: Mesh
    train: datasets.Dataset
    train_fingerprint: str
    valid: datasets.Dataset | None
    chunker: Chunker
    rejected: tuple[str, ...]
    steps: int
    teacher_cache: TeacherCache | None = None
    student_digest: str | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response."""
        return self.response_format.eos_ids


def prepare(config: TrainConfig, *, console: Console) -> RunInputs:
    """Check and read everything that a training run needs except the weights.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a mistake in the settings, the
        data, a checkpoint folder, the teacher cache or the output folder.
    """
    config.check()
    check_output(Path(config.output), dataclasses.asdict(config), resume=config.resume)
    inputs = read_inputs(config, console=console)
    if config.lora.rank:
        digest = weights_digest(Path(config.student))
        inputs = dataclasses.replace(inputs, student_digest=digest)
    if config.teacher_cache is not None:
        cache = _open_cache(config.teacher_cache, inputs, console)
        inputs = dataclasses.replace(inputs, teacher_cache=cache)
    return inputs


def read_inputs(config: TrainConfig, *, console: Console) -> RunInputs:
    """Read the models' shapes, the tokenizer and the data of a checked `config`."""
    sizes = config.mesh
    mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    # The padding of vocabularies depends on the tensor axis: keep it with the run.
    sizes = dataclasses.replace(sizes, tensor=mesh.shape["tensor"])
    config = dataclasses.replace(config, mesh=sizes)
    student, teacher = read_models(config)
    tokenizer = hf.load_tokenizer(config.student)
    vocab_size = shared_vocabulary(config, student, teacher, tokenizer)
    check_sizes(config, student, teacher, mesh)
    encoder = _encoder(config, tokenizer, console)
    data = read_data(config, tokenizer, console=console)
    return RunInputs(
        config=config,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        response_format=ResponseFormat(
            eos_ids(tokenizer, student, encoder.chat), encoder.template_file_text
        ),
        mesh=mesh,
        train=data.train,
        train_fingerprint=dataset.fingerprint(data.train),
        valid=data.valid,
        chunker=resolve_chunker(config.data.chunker),
        rejected=data.rejected,
        steps=_steps(config, len(data.train)),
    )


def _encoder(config: TrainConfig, tokenizer: Tokenizer, console: Console) -> Encoder:
    """The encoder of the data; prints which template it uses."""
    encoder = Encoder(tokenizer, config.data.encoding)
    lines = list(encoder.notes)
    if config.teacher is not None and encoder.encoding.template == "chat":
        if not same_template(tokenizer, hf.load_tokenizer(config.teacher)):
            lines.append(
                f"teacher {config.teacher} has another chat template; the student's is "
                "used for both"
            )
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    return encoder


def _steps(config: TrainConfig, examples: int) -> int:
    """Optimizer steps of the whole run on a data set of `examples`."""
    batches = examples // config.batch_size
    steps = config.steps or max(1, math.floor((config.epochs or 0) * batches))
    if config.optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is not below the "
            f"run's {steps} steps; lower it"
        )
    return steps


def with_local_models(config: TrainConfig) -> TrainConfig:
    """The settings with folders for the models; hub names are downloaded first.

    With several processes all of them must call this.

    Raises:
      FileNotFoundError, PermissionError, OSError: see `hub.local_folder`.
    """

    def local() -> TrainConfig:
        teacher = None if config.teacher is None else hub.local_folder(config.teacher)
        student = hub.local_folder(config.student)
        return dataclasses.replace(config, student=student, teacher=teacher)

    return lead_first(local)


def read_models(config: TrainConfig) -> tuple[LanguageModel, LanguageModel | None]:
    """Student and teacher, with vocabularies padded to a common number of rows.

    The padding depends on the mesh as little as possible, because a run may be resumed
    on another mesh.
    """
    if config.runs_teacher and config.teacher_dtype == "int8":
        quantized.check_installed()
    student = models.from_config(config.student)
    teacher = models.from_config(config.teacher) if config.teacher else None
    rows = max(model.config.vocab_size for _, model in _roles(student, teacher))
    multiple = math.lcm(_VOCABULARY_MULTIPLE, config.mesh.tensor)

    def fitted(model: LanguageModel) -> LanguageModel:
        return dataclasses.replace(
            model,
            vocab_rows=multiple * math.ceil(rows / multiple),
            tensor=config.mesh.tensor,
            attention=config.attention,
        )

    student = fitted(student)
    student = dataclasses.replace(student, remat=config.remat, lora=config.lora)
    if config.lora.rank:
        lora.targeted(student, config.lora)  # raises if no kernel matches
    return student, teacher and fitted(teacher)


def shared_vocabulary(
    config: TrainConfig,
    student: LanguageModel,
    teacher: LanguageModel | None,
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
    if config.teacher is not None:
        other = hf.load_tokenizer(config.teacher)
        if hf.tokenizer_fingerprint(tokenizer) != hf.tokenizer_fingerprint(other):
            raise ValueError(
                f"teacher {config.teacher} ({len(other)} tokens) and student "
                f"{config.student} ({size} tokens) have different tokenizers; "
                "distillation compares distributions over one vocabulary, so give a "
                "pair with the same tokenizer"
            )
    return size


def check_sizes(
    config: TrainConfig,
    student: LanguageModel,
    teacher: LanguageModel | None,
    mesh: Mesh,
) -> None:
    """Refuse settings that the models or the devices do not support.

    Raises:
      ValueError: rows are too long or do not divide over the mesh, or the devices do
        not have the kernel of `attention`.
    """
    encoding = config.data.encoding
    widths = {"student": encoding.max_length, "teacher": encoding.teacher_width}
    for role, model in _roles(student, teacher):
        if model.config.max_length < widths[role]:
            raise ValueError(
                f"data.max_length={encoding.max_length} makes rows of {widths[role]} "
                f"tokens, which is beyond the {role}'s {model.config.max_length} "
                "positions; lower it"
            )
    if config.micro_batch_size % (parts := sharding.row_parts(mesh)):
        raise ValueError(
            f"a micro-batch of {config.micro_batch_size} rows "
            f"(batch_size={config.batch_size} / micro_batches={config.micro_batches}) "
            f"does not divide over the {parts} parts of the mesh {dict(mesh.shape)}; "
            f"use a multiple of {parts}"
        )
    platform = mesh.devices.flat[0].platform
    expected = _PLATFORMS.get(config.attention, platform)
    if platform != expected:
        raise ValueError(
            f"attention={config.attention!r} is a kernel for a {expected}, but these "
            f"devices are of the platform {platform}; set attention to xla"
        )


def _roles(
    student: LanguageModel, teacher: LanguageModel | None
) -> Iterator[tuple[str, LanguageModel]]:
    yield "student", student
    if teacher is not None:
        yield "teacher", teacher


def common_parts(inputs: RunInputs) -> dict[str, str]:
    """Everything that must be the same in all processes of a run, by name."""
    settings = dataclasses.asdict(inputs.config)
    del settings["distributed"]
    leaves = jax.tree_util.tree_leaves_with_path(
        settings, is_leaf=lambda leaf: leaf is None
    )
    parts = {
        jax.tree_util.keystr(path, simple=True, separator="."): repr(leaf)
        for path, leaf in leaves
    }
    valid = "" if inputs.valid is None else dataset.fingerprint(inputs.valid)
    return parts | {
        "mgsr_jax's version": __version__,
        "the rows of data.train": inputs.train_fingerprint,
        "the rows of data.valid": valid,
        "the student's config.json": repr(inputs.student.config),
        "the teacher's config.json": repr(inputs.teacher and inputs.teacher.config),
        "the tokenizer": hf.tokenizer_fingerprint(inputs.tokenizer),
    }


def origin_of(inputs: RunInputs) -> Origin:
    """The origin of a teacher cache for this run; reads every byte of the weights.

    Raises:
      ValueError: the run has no teacher.
      FileNotFoundError: the teacher's folder has no weights.
    """
    if inputs.config.teacher is None:
        raise ValueError("there is no teacher to cache; set teacher to its folder")
    return Origin(
        teacher=weights_digest(Path(inputs.config.teacher)),
        teacher_dtype=inputs.config.teacher_dtype,
        tokenizer=hf.tokenizer_fingerprint(inputs.tokenizer),
        data=inputs.train_fingerprint,
    )


def check_candidates(config: TrainConfig, top_k: int, vocab_size: int) -> None:
    """Refuse a teacher cache that has fewer classes a token than DAC-KL has candidates.

    Raises:
      ValueError: both numbers, and the settings to change.
    """
    candidates = min(config.objective.num_candidates, vocab_size)
    if config.objective.divergence != "forward_kl" and top_k < candidates:
        raise ValueError(
            f"objective.num_candidates={candidates}, but the teacher cache has {top_k} "
            f"classes a token; set objective.num_candidates to {top_k}, or make the "
            f"cache with --top_k {candidates}"
        )


def _open_cache(folder: str, inputs: RunInputs, console: Console) -> TeacherCache:
    cache = TeacherCache.open(folder, origin_of(inputs))
    top_k, held_mass = cache.manifest.recipe.top_k, cache.manifest.held_mass
    check_candidates(inputs.config, top_k, inputs.vocab_size)
    console.print(
        f"{folder}: the teacher's {top_k} most probable classes of every training "
        f"token, {held_mass:.4f} of its probability",
        markup=False,
    )
    return cache
