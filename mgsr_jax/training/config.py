"""What a run is made of: one dataclass a topic, read from YAML and the command line.

`check` finds what cannot work before a model is loaded.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mgsr_jax.checkpoint.folder import check_folder
from mgsr_jax.data.encoding import Encoding
from mgsr_jax.models.lora import LoraConfig
from mgsr_jax.objective import DIVERGENCE_SETTINGS, Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.training.distributed import DistributedConfig
from mgsr_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Instruction data and how it becomes token rows.

    Attributes:
      train: JSONL or Parquet file, or a hub data set's name.
      valid: the same for validation; without it there is none.
      train_split: which split of a hub data set to train on.
      valid_split: which split of a hub data set to validate on.
      template: "alpaca", or "chat" for the tokenizer's own chat template.
      add_special_tokens: whether prompts carry the tokenizer's own (such as bos).
      max_prompt_length: longest prompt in tokens.
      max_length: longest prompt and response in tokens; the width of rows.
      buckets: further, narrower widths such as [128,256]: batches are made of examples
        of like length, and steps on the data's or on replayed rows are as wide as these
        need. A step's loss is a mean over its tokens, so that one in a batch of short
        examples counts more. Each width compiles the step anew.
      too_long: "drop" longer examples, or "truncate" them; both are counted.
      max_bad_fraction: share of malformed records above which the run refuses to start.
      chunker: "textblob", "spacy" (needs the extra and a model), or your own as
        "module:function", from a text to the (start, end) of its phrases.
      spacy_model: name of spaCy's model.
      cache_dir: where tokenised data is kept; default: the datasets library's cache,
        which nobody clears.
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

    @property
    def widths(self) -> tuple[int, ...]:
        """Those that rows may have, ascending."""
        return (*self.buckets, self.max_length)

    @property
    def encoding(self) -> Encoding:
        """How a record becomes tokens."""
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
      data: copies of the models that work on different rows.
      fsdp: devices that share one copy's parameters (and work on different rows too).
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
      student: folder of the student's Hugging Face checkpoint.
      output: run folder, on storage that all hosts share; must be new, or hold the
        same run (see `resume`). For cache-teacher: the cache's folder; must be new, or
        hold a part of the same one.
      data: instruction data.
      teacher: folder of the teacher's checkpoint; none: plain fine-tuning (SFT).
      teacher_cache: folder that `mgsr cache-teacher` wrote for this teacher and this
        training data; read for ground-truth rows in place of running the teacher.
      steps: optimizer steps; give either `steps` or `epochs`.
      epochs: passes over the training data.
      batch_size: examples a step, over all hosts and micro-batches.
      micro_batches: parts that a step's batch is computed in, one after the other.
      chunk_size: tokens whose logits are in a device's memory at once; none: as many as
        fill 24 MiB on a CPU and 256 MiB elsewhere.
      seed: of data order, rollouts and the clip network.
      dtype: of computation, and of the student's weights where lora leaves them as they
        are; what is trained, the optimizer and the losses are float32.
      teacher_dtype: of the teacher's parameters and computation; int8: its layers'
        matrices alone, the rest bfloat16 (the extra mgsr_jax[int8]).
      attention: of whole rows, in both models: "xla" everywhere, "cudnn" on NVIDIA GPUs
        (in bfloat16), "flash" on TPUs.
      remat: keep only what goes into each layer of the student for the backward pass
        and compute the rest again; less memory, more time.
      objective: the three losses and their weights.
      rollout: where a step's rows come from.
      optimizer: of the student and of the clip network.
      lora: adapters that are trained in place of the student's own weights.
      mesh: device mesh.
      distributed: how several processes find each other, where no launcher says so.
      validate_every: steps between validations; 0: only at the start and the end.
      save_every: steps between checkpoints; 0: only at the end.
      keep_checkpoints: how many of the latest are kept.
      log_every: steps between lines in the metrics files.
      resume: go on from the run folder's latest checkpoint.
      tensorboard: write TensorBoard files beside metrics.jsonl.
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

    @property
    def runs_teacher(self) -> bool:
        """Whether any step asks the teacher itself: then its weights are loaded."""
        cached = self.teacher_cache is not None and self.rollout.policy == "off"
        return self.teacher is not None and not cached


def check(config: TrainConfig) -> None:
    """Finds settings that cannot work together, before anything is read.

    Raises:
      ValueError: names the setting, what it is and what it may be.
    """
    _check_choices(config)
    for name in ("student", "teacher", "teacher_cache", "output"):
        check_folder(name, getattr(config, name))
    config.data.encoding  # noqa: B018  checks itself
    rollout = config.rollout
    if (config.steps is None) == (config.epochs is None):
        raise ValueError(
            f"give exactly one of steps and epochs, got steps={config.steps}, "
            f"epochs={config.epochs}"
        )
    _check_signs(config)
    _check_widths(config.data)
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into "
            f"micro_batches={config.micro_batches}; make it a multiple"
        )
    for name in ("probability", "initial_ratio"):
        if not 0 <= getattr(rollout, name) <= 1:
            raise ValueError(
                f"rollout.{name} must lie in [0, 1], got {getattr(rollout, name)}"
            )
    if rollout.rounds < 0 or rollout.temperature < 0 or not 0 < rollout.top_p <= 1:
        raise ValueError(
            "rollout needs rounds >= 0, temperature >= 0 and 0 < top_p <= 1, got "
            f"rounds={rollout.rounds}, temperature={rollout.temperature}, "
            f"top_p={rollout.top_p}"
        )
    _check_validation(config)
    _check_objective(config)
    _check_lora(config.lora)
    if config.attention == "cudnn" and "float32" in (
        config.dtype,
        config.teacher_dtype if config.teacher else config.dtype,
    ):
        raise ValueError(
            f"attention='cudnn' computes in bfloat16, got dtype={config.dtype}, "
            f"teacher_dtype={config.teacher_dtype}; set both to bfloat16 (the second "
            "may be int8), or attention to xla"
        )
    if config.teacher_cache is not None:
        _check_teacher_cache(config)


def _check_widths(spec: DataConfig) -> None:
    widths = spec.widths
    if min(widths) < 2 or sorted(set(widths)) != list(widths):
        raise ValueError(
            f"data.buckets={list(spec.buckets)}; expected widths that ascend, from 2 "
            f"to below data.max_length={spec.max_length}"
        )


def _check_validation(config: TrainConfig) -> None:
    spec, rollout = config.data, config.rollout
    if config.validate_every and not spec.valid:
        raise ValueError(
            f"validate_every={config.validate_every} and no data to validate on; set "
            "data.valid, or validate_every to 0"
        )
    one_file = Path(spec.train).suffix in (".json", ".jsonl", ".parquet")
    same_part = one_file or spec.train_split == spec.valid_split
    if spec.train == spec.valid and same_part:
        raise ValueError(
            f"data.train and data.valid are both {spec.train!r} ({spec.train_split}); "
            "validate on data that is not trained on"
        )
    learns_to_generate = rollout.initial_ratio > 0 or config.validate_every
    if rollout.policy == "replay" and not learns_to_generate:
        raise ValueError(
            "rollout.policy=replay with rollout.initial_ratio=0 never generates unless "
            "validations raise the ratio; set validate_every, or initial_ratio above 0"
        )
    if spec.chunker not in ("textblob", "spacy") and ":" not in spec.chunker:
        raise ValueError(
            f"data.chunker={spec.chunker!r}; expected textblob, spacy, or your own "
            "function as module:function"
        )


def _check_choices(section: Any, prefix: str = "") -> None:
    """A typo in a field of a few choices would silently pick another branch."""
    types = get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value, name = getattr(section, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{name}.")
        choices = get_args(types[field.name])
        if get_origin(types[field.name]) is Literal and value not in choices:
            raise ValueError(f"{name}={value!r}; expected one of {choices}")


def _check_signs(config: TrainConfig) -> None:
    objective, rollout, optimizer = config.objective, config.rollout, config.optimizer
    positive = {
        "steps": config.steps,
        "epochs": config.epochs,
        "batch_size": config.batch_size,
        "chunk_size": config.chunk_size,
        "micro_batches": config.micro_batches,
        "log_every": config.log_every,
        "keep_checkpoints": config.keep_checkpoints,
        "rollout.capacity": rollout.capacity,
        "objective.num_candidates": objective.num_candidates,
        "objective.width": objective.width,
        "objective.temperature": objective.temperature,
        "optimizer.learning_rate": optimizer.learning_rate,
        "optimizer.clip_norm": optimizer.clip_norm,
        "lora.alpha": config.lora.alpha,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    not_negative = {
        "validate_every": config.validate_every,
        "save_every": config.save_every,
        "lora.rank": config.lora.rank,
        "rollout.top_k": rollout.top_k,
        "objective.prior_weight": objective.prior_weight,
        "optimizer.final_learning_rate": optimizer.final_learning_rate,
        "optimizer.warmup_steps": optimizer.warmup_steps,
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.clip_network_learning_rate": optimizer.clip_network_learning_rate,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def _check_objective(config: TrainConfig) -> None:
    objective = config.objective
    weights = (objective.sft, objective.token, objective.span)
    if min(weights) < 0 or max(weights) == 0:
        raise ValueError(
            "objective.sft, .token and .span must be at least 0 and one of them "
            f"above, got {weights}"
        )
    if objective.span and config.chunk_size == 1:
        raise ValueError(
            "chunk_size=1 leaves the span loss no neighbour to look at; use 2 or more"
        )
    if not 0 <= objective.lower < objective.upper <= 1:
        raise ValueError(
            "objective needs 0 <= lower < upper <= 1, got "
            f"lower={objective.lower}, upper={objective.upper}"
        )
    _check_divergence(objective)
    if objective.divergence.startswith("dac_kl") and objective.temperature != 1:
        raise ValueError(
            f"objective.temperature={objective.temperature} is not read by DAC-KL, "
            "which has none; leave it out"
        )
    if config.teacher is None:
        if objective.needs_teacher:
            raise ValueError(
                "objective.token and objective.span compare with a teacher and there "
                "is none; set teacher, or both to 0 for plain fine-tuning (SFT)"
            )
        if config.rollout.policy != "off":
            raise ValueError(
                f"rollout.policy={config.rollout.policy!r} needs a teacher; set "
                "teacher, or rollout.policy to off"
            )
    elif not objective.needs_teacher:
        raise ValueError(
            "a teacher is set, but objective.token and objective.span are 0 and never "
            "ask it; leave teacher out, or give one of them a weight"
        )


def _check_divergence(objective: Objective) -> None:
    """The numbers of the divergence are there, read, and in their range."""
    name, read = objective.divergence, DIVERGENCE_SETTINGS.get(objective.divergence, ())
    for field in ("alpha", "beta", "head_mass", "mix"):
        value = getattr(objective, field)
        if value is not None and field not in read:
            raise ValueError(
                f"objective.{field}={value} is not read by "
                f"objective.divergence={name!r}; leave it out, or choose one of "
                f"{[d for d, own in DIVERGENCE_SETTINGS.items() if field in own]}"
            )
        if name == "alpha_beta_divergence" and value == 0:
            raise ValueError(f"objective.{field}=0.0; expected another number than 0")
        fraction = value is None or 0 <= value <= 1
        if name != "alpha_beta_divergence" and not fraction:
            raise ValueError(f"objective.{field}={value}; expected 0 to 1")
    if name == "taid" and objective.mix is None:
        raise ValueError(
            "objective.divergence='taid' needs objective.mix, the teacher's share from "
            "0 to 1"
        )


def _check_lora(lora: LoraConfig) -> None:
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout must lie in [0, 1), got {lora.dropout}")
    try:
        re.compile(lora.targets)
    except re.error as error:
        raise ValueError(
            f"lora.targets={lora.targets!r} is no regular expression ({error}); "
            "expected one such as attention/(query|value)$"
        ) from error
    if lora.rank == 0 and lora != LoraConfig():
        raise ValueError(
            f"lora.rank=0 trains all weights and reads no other setting of {lora}; set "
            "lora.rank, or leave lora out"
        )


_FROM_CACHE = ("dac_kl", "dac_kl_fixed", "forward_kl")
"""Divergences that the teacher's most probable classes are enough for."""


def _check_teacher_cache(config: TrainConfig) -> None:
    objective = config.objective
    if config.teacher is None:
        raise ValueError(
            f"teacher_cache={config.teacher_cache!r} and no teacher that it was made "
            "from; set teacher to its folder"
        )
    if objective.span:
        raise ValueError(
            f"objective.span={objective.span} compares whole distributions, and "
            "teacher_cache holds the most probable classes alone; set objective.span "
            "to 0, or leave teacher_cache out"
        )
    if objective.divergence not in _FROM_CACHE:
        raise ValueError(
            f"objective.divergence={objective.divergence!r} needs the teacher's whole "
            f"distribution; with teacher_cache it is one of {_FROM_CACHE}"
        )
    if objective.temperature != 1:
        raise ValueError(
            f"objective.temperature={objective.temperature}; teacher_cache holds the "
            "distribution at temperature 1 and no other can be had from it: set it to "
            "1, or leave teacher_cache out"
        )
