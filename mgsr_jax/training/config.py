"""Settings of a run: one dataclass a topic, read from YAML and the command line."""

import dataclasses
from pathlib import Path
from typing import Literal

from mgsr_jax import settings
from mgsr_jax.checkpoint.folder import check_folder
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.divergences import FROM_SAMPLES, check_cached_teacher
from mgsr_jax.models.lora import LoraConfig
from mgsr_jax.objective import Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.training.distributed import DistributedConfig
from mgsr_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Instruction data and how it becomes token rows.

    Attributes:
      train: JSONL or Parquet file, or a hub data set's name.
      valid: validation data, given like `train`; none: no validation.
      train_split: training split of a hub data set.
      valid_split: validation split of a hub data set.
      template: "alpaca", or "chat" for the tokenizer's own chat template.
      add_special_tokens: whether prompts carry the tokenizer's own (such as bos).
      max_prompt_length: longest prompt in tokens.
      max_length: longest prompt and response in tokens; the width of rows.
      buckets: additional, narrower widths such as [128,256]. Batches then hold examples
        of similar length, and a step on the data's or on replayed rows is only as wide
        as its rows need. A step's loss is a mean over its tokens, so a token in a batch
        of short examples counts more. Each width compiles the step again.
      too_long: "drop" longer examples, or "truncate" them; both are counted.
      max_bad_fraction: share of malformed records above which the run refuses to start.
      chunker: "textblob", "spacy" (needs the extra and a model), or your own as
        "module:function", from a text to the (start, end) of its phrases.
      spacy_model: name of spaCy's model.
      cache_dir: folder for tokenised data; default: the datasets library's cache, which
        is never cleared automatically.
    """

    train: str
    valid: str | None = None
    train_split: str = "train"
    valid_split: str = "validation"
    template: Literal["alpaca", "chat"] = "alpaca"
    add_special_tokens: bool = True
    max_prompt_length: int = 256
    max_length: int = 512
    buckets: tuple[int, ...] = ()
    too_long: Literal["drop", "truncate"] = "drop"
    max_bad_fraction: float = 0.05
    chunker: str = "textblob"
    spacy_model: str = "en_core_web_sm"
    cache_dir: str | None = None

    def check(self) -> None:
        """Refuse values that do not work, alone or with one another.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        settings.check_choices(self, "data.")
        self.encoding  # noqa: B018  the record checks itself
        widths = self.widths
        if min(widths) < 2 or sorted(set(widths)) != list(widths):
            raise ValueError(
                f"data.buckets={list(self.buckets)}; expected ascending widths from 2 "
                f"to below data.max_length={self.max_length}"
            )
        if self.chunker not in ("textblob", "spacy") and ":" not in self.chunker:
            raise ValueError(
                f"data.chunker={self.chunker!r}; expected textblob, spacy, or a "
                "function as module:function"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Allowed widths of rows, ascending."""
        return (*self.buckets, self.max_length)

    @property
    def encoding(self) -> Encoding:
        """The settings that turn a record into tokens."""
        return Encoding(
            template=self.template,
            add_special_tokens=self.add_special_tokens,
            max_prompt_length=self.max_prompt_length,
            max_length=self.max_length,
            too_long=self.too_long,
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; -1 fills the rest.

    Attributes:
      data: copies of the models, each of which processes different rows.
      fsdp: devices that share one copy's parameters (and process different rows too).
      tensor: devices that share one copy's heads, MLPs and vocabulary, and its rows;
        must divide the attention heads of both models.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      student: folder of the student's Hugging Face checkpoint, or its hub name
        (org/name, or org/name@revision).
      output: run folder, on storage that all hosts share; must be new, or hold the
        same run (see `resume`). For cache-teacher: the cache's folder; must be new, or
        hold an unfinished copy of the same cache.
      data: instruction data.
      teacher: the teacher's checkpoint, given like student; none: plain fine-tuning
        (SFT).
      teacher_cache: folder that `mgsr cache-teacher` wrote for this teacher and this
        training data; ground-truth rows read it instead of running the teacher.
      steps: optimizer steps; set either `steps` or `epochs`.
      epochs: passes over the training data.
      batch_size: examples a step, over all hosts and micro-batches.
      micro_batches: number of parts of a step's batch, computed one after the other.
      chunk_size: tokens whose logits are in a device's memory at once; none: as many as
        fill 24 MiB on a CPU and 256 MiB elsewhere.
      seed: seed of data order, rollouts and the clip network.
      dtype: dtype of computation, and of the student's weights where lora freezes
        them; trained parameters, the optimizer and the losses are float32.
      teacher_dtype: dtype of the teacher's parameters and computation; int8: only its
        layers' matrices, the rest bfloat16 (needs the extra mgsr_jax[int8]).
      attention: attention kernel for whole rows, in both models: "xla" everywhere,
        "cudnn" on NVIDIA GPUs (in bfloat16), "flash" on TPUs.
      remat: store only each student layer's input for the backward pass and recompute
        the rest; less memory, more time.
      objective: the three losses and their weights.
      rollout: the source of a step's rows.
      optimizer: optimizer of the student and of the clip network.
      lora: adapters that are trained instead of the student's own weights.
      mesh: device mesh.
      distributed: how several processes find each other without a launcher.
      validate_every: steps between validations; 0: only at the start and the end.
      save_every: steps between checkpoints; 0: only at the end.
      keep_checkpoints: number of latest checkpoints to keep.
      log_every: steps between lines in the metrics files.
      resume: continue from the run folder's latest checkpoint.
      tensorboard: write TensorBoard files next to metrics.jsonl.
    """

    student: str
    output: str
    data: DataConfig
    teacher: str | None = None
    teacher_cache: str | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batches: int = 1
    chunk_size: int | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    attention: Literal["xla", "cudnn", "flash"] = "xla"
    remat: bool = False
    objective: Objective = dataclasses.field(default_factory=Objective)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    distributed: DistributedConfig = dataclasses.field(
        default_factory=DistributedConfig
    )
    validate_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    resume: bool = False
    tensorboard: bool = True

    def check(self) -> None:
        """Refuse settings of a run that cannot work together, before a file is read.

        Raises:
          ValueError: names the setting, its value and the values that are allowed.
        """
        self.check_programs()
        check_folder("output", self.output)
        _check_size_of_run(self, required=True)
        _check_validation(self)

    def check_programs(self) -> None:
        """Refuse settings that the run's programs cannot be compiled for.

        The output folder, the data files and the number of steps may be missing.

        Raises:
          ValueError: see `check`.
        """
        settings.check_choices(self)
        for name in ("student", "teacher", "teacher_cache"):
            check_folder(name, getattr(self, name))
        _check_size_of_run(self, required=False)
        positive = ("batch_size", "micro_batches", "log_every", "keep_checkpoints")
        settings.check_positive(self, "steps", "epochs", "chunk_size", *positive)
        settings.check_not_negative(self, "validate_every", "save_every")
        self.data.check()
        self.objective.check()
        self.rollout.check()
        self.optimizer.check()
        self.lora.check()
        _check_parts(self)
        _check_replay(self)
        _check_teacher(self)
        _check_attention(self)
        if self.teacher_cache is not None:
            _check_teacher_cache(self)
        if self.objective.divergence in FROM_SAMPLES:
            self.rollout.check_samples(temperature=self.objective.temperature)

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch, over all hosts."""
        return self.batch_size // self.micro_batches

    @property
    def runs_teacher(self) -> bool:
        """Whether any step runs the teacher itself, so that its weights are loaded."""
        cached = self.teacher_cache is not None and self.rollout.policy == "off"
        return self.teacher is not None and not cached


def _check_size_of_run(config: TrainConfig, *, required: bool) -> None:
    sizes = sum(size is not None for size in (config.steps, config.epochs))
    if sizes > 1 or (required and sizes == 0):
        raise ValueError(
            f"set exactly one of steps and epochs, got steps={config.steps}, "
            f"epochs={config.epochs}"
        )


def _check_parts(config: TrainConfig) -> None:
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into "
            f"micro_batches={config.micro_batches}; make it a multiple"
        )
    if config.objective.span and config.chunk_size == 1:
        raise ValueError(
            "chunk_size=1 leaves no neighbouring token for the span loss; use 2 or more"
        )


def _check_validation(config: TrainConfig) -> None:
    data = config.data
    if config.validate_every and not data.valid:
        raise ValueError(
            f"validate_every={config.validate_every}, but there is no validation data; "
            "set data.valid, or validate_every to 0"
        )
    is_file = Path(data.train).suffix in (".json", ".jsonl", ".parquet")
    same_part = is_file or data.train_split == data.valid_split
    if data.train == data.valid and same_part:
        raise ValueError(
            f"data.train and data.valid are both {data.train!r} ({data.train_split}); "
            "validate on data that is not trained on"
        )


def _check_replay(config: TrainConfig) -> None:
    rollout = config.rollout
    ratio_can_rise = rollout.initial_ratio > 0 or config.validate_every
    if rollout.policy == "replay" and not ratio_can_rise:
        raise ValueError(
            "rollout.policy=replay with rollout.initial_ratio=0 never generates unless "
            "validations raise the ratio; set validate_every, or initial_ratio above 0"
        )


def _check_teacher(config: TrainConfig) -> None:
    needs_teacher = config.objective.needs_teacher
    if config.teacher is not None:
        if not needs_teacher:
            raise ValueError(
                "teacher is set, but objective.token and objective.span are 0 and "
                "never use it; leave teacher out, or give one of them a weight"
            )
        return
    if needs_teacher:
        raise ValueError(
            "objective.token and objective.span compare with a teacher, and none is "
            "set; set teacher, or both weights to 0 for plain fine-tuning (SFT)"
        )
    if config.rollout.policy != "off":
        raise ValueError(
            f"rollout.policy={config.rollout.policy!r} needs a teacher; set "
            "teacher, or rollout.policy to off"
        )


def _check_attention(config: TrainConfig) -> None:
    dtypes = {config.dtype, config.teacher_dtype if config.teacher else config.dtype}
    if config.attention == "cudnn" and "float32" in dtypes:
        raise ValueError(
            f"attention='cudnn' computes in bfloat16, got dtype={config.dtype}, "
            f"teacher_dtype={config.teacher_dtype}; set both to bfloat16 (the second "
            "may be int8), or attention to xla"
        )


def _check_teacher_cache(config: TrainConfig) -> None:
    objective = config.objective
    if config.teacher is None:
        raise ValueError(
            f"teacher_cache={config.teacher_cache!r}, but no teacher is set; set "
            "teacher to the folder that the cache was made from"
        )
    if objective.span:
        raise ValueError(
            f"objective.span={objective.span} compares whole distributions, and "
            "teacher_cache holds only the most probable classes; set objective.span "
            "to 0, or leave teacher_cache out"
        )
    check_cached_teacher(
        objective.divergence,
        objective.token_weights,
        temperature=objective.temperature,
    )
