"""Inputs of a run, read and checked before a model's weights are loaded.

Most mistakes end here, in one line, before anything is written.
"""

import dataclasses
import math
from pathlib import Path

import datasets
import jax
from jax.sharding import Mesh
from rich.console import Console

from mgsr_jax import __version__, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.checkpoint.chat_template import same_template
from mgsr_jax.checkpoint.folder import weights_digest
from mgsr_jax.checkpoint.response_format import ResponseFormat
from mgsr_jax.checkpoint.tokenizer import eos_ids
from mgsr_jax.data import dataset
from mgsr_jax.data.encoding import Encoder
from mgsr_jax.data.spans import Chunker, resolve_chunker
from mgsr_jax.data.teacher_cache import TeacherCache
from mgsr_jax.data.teacher_manifest import Origin
from mgsr_jax.models import LanguageModel
from mgsr_jax.training.config import TrainConfig
from mgsr_jax.training.read_data import read_data
from mgsr_jax.training.run_folder import check_output
from mgsr_jax.training.run_models import (
    Teachers,
    check_sizes,
    models_of,
    read_models,
    shared_vocabulary,
)
from mgsr_jax.training.teacher_config import different_folders
from mgsr_jax.typing import Tokenizer


@dataclasses.dataclass(frozen=True)
class RunInputs:
    """Everything about a run that is known before weights are loaded.

    Attributes:
      config: settings, with the tensor axis of `mesh` filled in.
      student: the student as pure functions.
      teacher: the teacher as pure functions, or several that divide the rows, or None.
      tokenizer: the tokenizer of all models.
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
    teacher: Teachers | None
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
    for folder in different_folders(config.teacher)[0]:
        is_chat = encoder.encoding.template == "chat"
        if is_chat and not same_template(tokenizer, hf.load_tokenizer(folder)):
            lines.append(
                f"teacher {folder} has another chat template; the student's is used "
                "for both"
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
    teachers = models_of(inputs.teacher)
    return parts | {
        "mgsr_jax's version": __version__,
        "the rows of data.train": inputs.train_fingerprint,
        "the rows of data.valid": valid,
        "the student's config.json": repr(inputs.student.config),
        "the teachers' config.json": repr([m.config for _, m in teachers]),
        "the tokenizer": hf.tokenizer_fingerprint(inputs.tokenizer),
    }


def origin_of(inputs: RunInputs) -> Origin:
    """The origin of a teacher cache for this run; reads every byte of the weights.

    Raises:
      ValueError: the run has no teacher, or several.
      FileNotFoundError: the teacher's folder has no weights.
    """
    teacher = inputs.config.teacher
    if not isinstance(teacher, str):
        raise ValueError(
            f"teacher={teacher} is not one teacher to cache; set teacher to its folder"
        )
    return Origin(
        teacher=weights_digest(Path(teacher)),
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
