"""What a run needs to know before a model's weights are loaded.

Most mistakes end here, with one line, and nothing has been written yet.
"""

import dataclasses
import hashlib
import importlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import jax
import yaml
from jax.sharding import Mesh
from rich.console import Console

from mgsr_jax import __version__, models, sharding
from mgsr_jax.checkpoint import hf
from mgsr_jax.data import dataset
from mgsr_jax.data.spans import Chunker
from mgsr_jax.data.teacher_cache import Origin, TeacherCache
from mgsr_jax.models import lora, quantized
from mgsr_jax.training.config import TrainConfig, check

CONFIG_FILE = "config.yaml"


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is known before weights are loaded; making one finds most mistakes.

    Attributes:
      config: the run's.
      student: the student as pure functions.
      teacher: the teacher, or None.
      tokenizer: that of both.
      vocab_size: real tokens; embeddings may have more rows.
      eos_ids: tokens that end a response.
      mesh: device mesh.
      train: tokenised training data.
      train_fingerprint: digest of its rows, in their order.
      valid: tokenised validation data, or None.
      chunker: finds the phrases of a text.
      rejected: a line for every record that is not used as it stands.
      steps: of the whole run.
      teacher_cache: what the teacher says of the training data; None to run it.
      student_digest: of the student's folder, where adapters are trained on it.
    """

    config: TrainConfig
    student: models.LanguageModel
    teacher: models.LanguageModel | None
    tokenizer: Any
    vocab_size: int
    eos_ids: tuple[int, ...]
    mesh: Mesh
    train: datasets.Dataset
    train_fingerprint: str
    valid: datasets.Dataset | None
    chunker: Chunker
    rejected: tuple[str, ...]
    steps: int
    teacher_cache: TeacherCache | None = None
    student_digest: str | None = None


def prepare(config: TrainConfig, *, console: Console) -> Setup:
    """Everything that can fail before weights are loaded or files written."""
    check(config)
    _check_output(config)
    setup = read_inputs(config, console=console)
    if config.lora.rank:
        digest = _checkpoint_digest(Path(config.student))
        setup = dataclasses.replace(setup, student_digest=digest)
    if config.teacher_cache is None:
        return setup
    return dataclasses.replace(setup, teacher_cache=_open_cache(setup, console))


def common_parts(setup: Setup) -> dict[str, str]:
    """What all processes of a run must have in common, by name."""
    settings = dataclasses.asdict(setup.config)
    del settings["distributed"]
    leaves = jax.tree_util.tree_leaves_with_path(
        settings, is_leaf=lambda leaf: leaf is None
    )
    parts = {
        jax.tree_util.keystr(path, simple=True, separator="."): repr(leaf)
        for path, leaf in leaves
    }
    valid = "" if setup.valid is None else dataset.fingerprint(setup.valid)
    return parts | {
        "mgsr_jax's version": __version__,
        "the rows of data.train": setup.train_fingerprint,
        "the rows of data.valid": valid,
        "the student's config.json": repr(setup.student.config),
        "the teacher's config.json": repr(setup.teacher and setup.teacher.config),
        "the tokenizer": hf.tokenizer_fingerprint(setup.tokenizer),
    }


def read_inputs(config: TrainConfig, *, console: Console) -> Setup:
    """Models' shapes, the tokenizer and the data of a checked `config`."""
    sizes = config.mesh
    mesh = sharding.make_mesh(sizes.data, sizes.fsdp, sizes.tensor)
    # What vocabularies are padded to depends on it; it is kept with the run.
    sizes = dataclasses.replace(sizes, tensor=mesh.shape["tensor"])
    config = dataclasses.replace(config, mesh=sizes)
    student, teacher = read_models(config)
    tokenizer = hf.load_tokenizer(config.student)
    vocab_size = _shared_vocabulary(config, student, teacher, tokenizer)
    check_sizes(config, student, teacher, mesh)
    spec, rejected = config.data, []

    def load(path: str, split: str) -> datasets.Dataset:
        found, report = _load_data(config, path, split, tokenizer)
        rejected.extend(report.messages)
        _tell(path, report, console)
        return found

    train_data = load(spec.train, spec.train_split)
    valid = load(spec.valid, spec.valid_split) if spec.valid else None
    batches = len(train_data) // config.batch_size
    steps = config.steps or max(1, math.floor((config.epochs or 0) * batches))
    if config.optimizer.warmup_steps >= steps:
        raise ValueError(
            f"optimizer.warmup_steps={config.optimizer.warmup_steps} is not below the "
            f"run's {steps} steps"
        )
    return Setup(
        config=config,
        student=student,
        teacher=teacher,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        eos_ids=eos_ids(tokenizer, student),
        mesh=mesh,
        train=train_data,
        train_fingerprint=dataset.fingerprint(train_data),
        valid=valid,
        chunker=resolve_chunker(spec.chunker),
        rejected=tuple(rejected),
        steps=steps,
    )


def read_models(
    config: TrainConfig,
) -> tuple[models.LanguageModel, models.LanguageModel | None]:
    """Student and teacher, with vocabularies padded to one number of rows.

    On the mesh it depends as little as can be: a run may go on on another one.
    """
    if config.runs_teacher and config.teacher_dtype == "int8":
        quantized.check_installed()
    student = models.from_config(config.student)
    teacher = models.from_config(config.teacher) if config.teacher else None
    both = [model for model in (student, teacher) if model is not None]
    most = max(model.config.vocab_size for model in both)
    multiple = math.lcm(_VOCABULARY_MULTIPLE, config.mesh.tensor)
    rows = multiple * math.ceil(most / multiple)
    sizes: dict[str, Any] = dict(
        vocab_rows=rows, tensor=config.mesh.tensor, attention=config.attention
    )
    sizes_of_student = sizes | dict(remat=config.remat, lora=config.lora)
    student = dataclasses.replace(student, **sizes_of_student)
    if config.lora.rank:
        lora.targeted(student, config.lora)  # checks itself
    return student, teacher and dataclasses.replace(teacher, **sizes)


_VOCABULARY_MULTIPLE = 128
"""Every tensor axis of a power of two divides it, and so do an accelerator's tiles."""


def origin_of(setup: Setup) -> Origin:
    """What a teacher cache for this run is made from; reads all of the weights' bytes.

    Raises:
      ValueError: the run has no teacher.
      FileNotFoundError: the teacher's folder has no weights.
    """
    if setup.config.teacher is None:
        raise ValueError("there is no teacher to cache; set teacher to its folder")
    return Origin(
        teacher=_checkpoint_digest(Path(setup.config.teacher)),
        teacher_dtype=setup.config.teacher_dtype,
        tokenizer=hf.tokenizer_fingerprint(setup.tokenizer),
        data=setup.train_fingerprint,
    )


def check_candidates(config: TrainConfig, top_k: int, vocab_size: int) -> None:
    """DAC-KL finds all its candidates among the classes of a teacher cache.

    Raises:
      ValueError: it does not.
    """
    wanted = min(config.objective.num_candidates, vocab_size)
    if config.objective.divergence != "forward_kl" and top_k < wanted:
        raise ValueError(
            f"objective.num_candidates={wanted} and a teacher cache of {top_k} classes "
            f"a token; set objective.num_candidates to {top_k}, or make the cache with "
            f"--top_k {wanted}"
        )


def _open_cache(setup: Setup, console: Console) -> TeacherCache:
    folder = setup.config.teacher_cache
    assert folder is not None
    cache = TeacherCache.open(folder, origin_of(setup))
    top_k, held = cache.manifest.recipe.top_k, cache.manifest.held_mass
    check_candidates(setup.config, top_k, setup.vocab_size)
    console.print(
        f"{folder}: the teacher's {top_k} most probable classes of every training "
        f"token, {held:.4f} of its probability",
        markup=False,
    )
    return cache


def _checkpoint_digest(folder: Path) -> str:
    """Of a checkpoint's config.json and every byte of its weights."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"no .safetensors weights in {folder}")

    def digest(file: Path) -> bytes:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, hashlib.blake2b).digest()

    files = [folder / "config.json", *weights]
    whole = hashlib.blake2b(digest_size=16)
    with ThreadPoolExecutor() as pool:
        for file, own in zip(files, pool.map(digest, files), strict=True):
            whole.update(file.name.encode() + own)
    return whole.hexdigest()


def eos_ids(tokenizer: Any, model: models.LanguageModel) -> tuple[int, ...]:
    """The tokenizer's end-of-sequence, which data ends in, and the model's stop ids."""
    more = model.config.eos_token_id
    more = more if isinstance(more, tuple | list) else (more,)
    ids = {tokenizer.eos_token_id, *more} - {None}
    return tuple(sorted(ids))


def resolve_chunker(name: str) -> Chunker:
    """The chunker that a setting names; "module:function" is imported.

    Raises:
      ValueError: no such module or function.
    """
    if ":" not in name:
        return name
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"data.chunker={name!r} cannot be imported ({error}); expected "
            "module:function of a module on the Python path"
        ) from error


def _load_data(
    config: TrainConfig, path: str, split: str, tokenizer: Any
) -> tuple[datasets.Dataset, dataset.DataReport]:
    spec = config.data
    return dataset.load(
        path,
        tokenizer,
        spec.encoding,
        chunker=resolve_chunker(spec.chunker) if config.objective.span else None,
        spacy_model=spec.spacy_model,
        split=split,
        cache_dir=spec.cache_dir,
        max_bad_fraction=spec.max_bad_fraction,
    )


def _tell(path: str, report: dataset.DataReport, console: Console) -> None:
    console.print(
        f"{path}: {report.kept} examples, {report.too_long} too long, "
        f"{report.empty} empty, {report.malformed} malformed"
    )
    for message in report.messages[:3]:
        console.print(f"  {message}", markup=False)


def read_run_config(run: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings that a run folder was made with.

    Raises:
      FileNotFoundError: the folder holds no run.
      ValueError: its file cannot be read.
    """
    file = Path(run) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{run} has no {CONFIG_FILE}: it is no run of ours; give a run's folder"
        )
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {error}") from error
    if not isinstance(found, dict) or "student" not in found:
        raise ValueError(
            f"{file} was cut off or is no run's; restore it, or start anew"
        )
    return found


def _shared_vocabulary(
    config: TrainConfig, student: Any, teacher: Any, tokenizer: Any
) -> int:
    size = len(tokenizer)
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and model.config.vocab_size < size:
            raise ValueError(
                f"the tokenizer has {size} tokens, the {role}'s embedding "
                f"{model.config.vocab_size} rows; they do not belong together"
            )
    if config.teacher is not None:
        other = hf.load_tokenizer(config.teacher)
        if hf.tokenizer_fingerprint(tokenizer) != hf.tokenizer_fingerprint(other):
            raise ValueError(
                f"teacher {config.teacher} ({len(other)} tokens) and student "
                f"{config.student} ({size} tokens) have different tokenizers; "
                "distillation compares distributions over one vocabulary"
            )
    return size


def check_sizes(config: TrainConfig, student: Any, teacher: Any, mesh: Mesh) -> None:
    """What models and devices must allow of the settings.

    Raises:
      ValueError: rows are too long or do not divide over the mesh, or the devices have
        not the kernel of `attention`.
    """
    _check_lengths(config, student, teacher)
    _check_micro_batch(config, mesh)
    platform = mesh.devices.flat[0].platform
    needed = {"flash": "tpu", "cudnn": "gpu"}.get(config.attention, platform)
    if platform != needed:
        raise ValueError(
            f"attention={config.attention!r} is a kernel for a {needed}, and these "
            f"devices are of the platform {platform}; set attention to xla"
        )


def _check_lengths(config: TrainConfig, student: Any, teacher: Any) -> None:
    width = config.data.max_length
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and model.config.max_length < width:
            raise ValueError(
                f"data.max_length={width} is beyond the {role}'s "
                f"{model.config.max_length} positions; lower it"
            )


def _check_micro_batch(config: TrainConfig, mesh: Mesh) -> None:
    size = config.batch_size // config.micro_batches
    if size % (parts := sharding.row_parts(mesh)):
        raise ValueError(
            f"a micro-batch of {size} rows (batch_size={config.batch_size} / "
            f"micro_batches={config.micro_batches}) does not divide over the {parts} "
            f"parts of the mesh {dict(mesh.shape)}; use a multiple of {parts}"
        )


# What a resumed run computes does not depend on these.
_MAY_CHANGE = (
    "resume",
    "output",
    "mesh",
    "distributed",
    "micro_batches",
    "chunk_size",
    "attention",
    "remat",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "tensorboard",
)


def _check_output(config: TrainConfig) -> None:
    """The folder is new, or holds this very run and `resume` is asked for."""
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {output} is a file; choose a folder's name")
    if not output.exists() or not os.listdir(output):
        return
    if not config.resume:
        raise FileExistsError(
            f"output folder {output} is not empty; choose another one, or go on with "
            "what is there by resume: true"
        )
    before = read_run_config(output)
    now = json.loads(json.dumps(dataclasses.asdict(config)))
    changed = [
        name
        for name in now
        if name not in _MAY_CHANGE and before.get(name) != now[name]
    ]
    if changed:
        was = {name: before.get(name) for name in changed}
        raise ValueError(
            f"resume: {', '.join(changed)} changed since {output} was begun "
            f"(was {was}); a resumed run must have the same settings"
        )
