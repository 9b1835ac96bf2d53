"""Settings of a run: one dataclass a topic, read from YAML and the command line."""

import dataclasses
from typing import Literal

from mgsr_jax import settings
from mgsr_jax.checkpoint.folder import check_folder
from mgsr_jax.divergences import FROM_SAMPLES, check_cached_teacher
from mgsr_jax.models.lora import LoraConfig
from mgsr_jax.objective import Objective
from mgsr_jax.rollout_config import RolloutConfig
from mgsr_jax.sharding import MeshConfig
from mgsr_jax.training.data_config import DataConfig
from mgsr_jax.training.distributed import DistributedConfig
from mgsr_jax.training.measurement_config import PeriodicEvaluation, check_best_metric
from mgsr_jax.training.optimizer import OptimizerConfig
from mgsr_jax.training.profile import ProfileConfig
from mgsr_jax.training.teacher_config import TeacherFolders, check_teachers


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
        (SFT). Several teachers as {NAME: FOLDER, ...}: each record names its own in the
        column teacher, or see data.default_teacher. A folder that is named twice is
        loaded once.
      teacher_cache: folder that `mgsr cache-teacher` wrote for this teacher and this
        training data; ground-truth rows read it instead of running the teacher.
      steps: optimizer steps; set either `steps` or `epochs`.
      epochs: passes over the training data, as a number of steps: epochs * (examples //
        batch_size), rounded down. With `rollout.policy` "replay" a step that replays
        reads no row of the data, so the run makes fewer passes than this; how many
        depends on the validation losses.
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
      evaluate_every: steps between evaluations of the student's greedy responses, which
        also run at the start and the end; 0: none.
      evaluate: the prompts of these evaluations.
      best_metric: metric of validation or evaluation, such as valid/loss or
        eval/rouge_l; a checkpoint is saved whenever it is measured, and the best one is
        kept beside the latest (see mgsr export --best). Of valid/ metrics and losses
        the lowest is the best, of others the highest. none: only the latest are kept.
      save_every: steps between checkpoints; 0: only at the end.
      keep_checkpoints: number of latest checkpoints to keep.
      log_every: steps between lines in the metrics files.
      resume: continue from the run folder's latest checkpoint.
      tensorboard: write TensorBoard files next to metrics.jsonl.
      profile: steps whose trace is written.
    """

    student: str
    output: str
    data: DataConfig
    teacher: TeacherFolders = None
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
    evaluate_every: int = 0
    evaluate: PeriodicEvaluation = dataclasses.field(default_factory=PeriodicEvaluation)
    best_metric: str | None = None
    save_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    resume: bool = False
    tensorboard: bool = True
    profile: ProfileConfig = dataclasses.field(default_factory=ProfileConfig)

    def check(self) -> None:
        """Refuse settings of a run that cannot work together, before a file is read.

        Raises:
          ValueError: names the setting, its value and the values that are allowed.
        """
        self.check_programs()
        check_folder("output", self.output)
        _check_size_of_run(self, required=True)
        _check_validation(self)
        check_best_metric(
            self.best_metric,
            validated=_validated_losses(self),
            validate_every=self.validate_every,
            evaluated=self.evaluate.metrics,
            evaluate_every=self.evaluate_every,
        )

    def check_programs(self) -> None:
        """Refuse settings that the run's programs cannot be compiled for.

        The output folder, the data files and the number of steps may be missing.

        Raises:
          ValueError: see `check`.
        """
        settings.check_choices(self)
        for name in ("student", "teacher_cache"):
            check_folder(name, getattr(self, name))
        _check_size_of_run(self, required=False)
        positive = ("batch_size", "micro_batches", "log_every", "keep_checkpoints")
        settings.check_positive(self, "steps", "epochs", "chunk_size", *positive)
        settings.check_not_negative(
            self, "validate_every", "evaluate_every", "save_every"
        )
        self.data.check()
        check_teachers(self.teacher, self.data, self.rollout, self.teacher_cache)
        self.objective.check()
        self.rollout.check()
        self.optimizer.check()
        self.lora.check()
        self.mesh.check()
        self.distributed.check()
        self.evaluate.check()
        self.profile.check()
        _check_parts(self)
        _check_replay(self)
        _check_teacher(self)
        _check_attention(self)
        if self.teacher_cache is not None:
            _check_teacher_cache(self)
        if self.data.teacher_prompt is not None:
            _check_teacher_prompt(self)
        if self.objective.sample_divergence and self.rollout.policy == "off":
            raise ValueError(
                f"objective.sample_divergence={self.objective.sample_divergence!r} is "
                "read only on rows that the student wrote, and rollout.policy is off; "
                "set rollout.policy, or leave sample_divergence out"
            )
        if set(FROM_SAMPLES) & set(self.objective.divergences):
            self.rollout.check_samples(temperature=self.objective.temperature)

    @property
    def micro_batch_size(self) -> int:
        """Rows of a micro-batch, over all hosts."""
        return self.batch_size // self.micro_batches

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Names of several teachers; empty for one or none."""
        return tuple(self.teacher) if isinstance(self.teacher, dict) else ()

    @property
    def runs_teacher(self) -> bool:
        """Whether any step runs the teacher itself, so that its weights are loaded."""
        cached = self.teacher_cache is not None and self.rollout.policy == "off"
        return self.teacher is not None and not cached


def _validated_losses(config: TrainConfig) -> tuple[str, ...]:
    """Names of the losses that a validation measures."""
    objective, names = config.objective, ["loss", "sft"]
    if config.runs_teacher:
        of_data = objective.token and objective.divergence not in FROM_SAMPLES
        names += [objective.divergence] if of_data else []
        names += [f"{n}/{t}" for n in names[2:] for t in config.teacher_names]
        names += ["span"] if objective.span else []
    return tuple(names)


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
    data.check_validation()


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


def _check_teacher_prompt(config: TrainConfig) -> None:
    if config.teacher is None:
        raise ValueError(
            f"data.teacher_prompt={config.data.teacher_prompt!r}, but no teacher is "
            "set; set teacher, or leave teacher_prompt out"
        )
    if config.teacher_cache is not None:
        raise ValueError(
            "data.teacher_prompt is set, but teacher_cache holds the teacher's output "
            "on the student's prompts; leave one of them out"
        )
    rollout = config.rollout
    if rollout.policy != "off" and rollout.intervention != "none":
        raise ValueError(
            f"rollout.intervention={rollout.intervention!r}, but the intervening "
            "teacher reads the student's rows, not those of data.teacher_prompt; set "
            "rollout.intervention to none"
        )


def _check_teacher_cache(config: TrainConfig) -> None:
    objective = config.objective
    if config.teacher is None:
        raise ValueError(
            f"teacher_cache={config.teacher_cache!r}, but no teacher is set; set "
            "teacher to the folder that the cache was made from"
        )
    if config.data.train_on == "all":
        raise ValueError(
            "data.train_on='all', but teacher_cache holds the teacher's output only on "
            "the last response; set data.train_on to last, or leave teacher_cache out"
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
        teacher_temperature=objective.teacher_temperature,
    )
