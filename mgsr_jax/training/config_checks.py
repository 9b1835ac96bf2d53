"""Checks of a run's settings against one another, before any file is read."""

import dataclasses
import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from mgsr_jax.checkpoint.folder import check_folder
from mgsr_jax.models.lora import LoraConfig
from mgsr_jax.objective import DIVERGENCE_SETTINGS, Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.training.config import DataConfig, TrainConfig

_FROM_CACHE = ("dac_kl", "dac_kl_fixed", "forward_kl")
"""Divergences that need only the teacher's most probable classes."""


def check_config(config: TrainConfig) -> None:
    """Refuse settings of a run that cannot work together.

    Raises:
      ValueError: names the setting, its value and the values that are allowed.
    """
    check_programs(config)
    check_folder("output", config.output)
    _check_size_of_run(config, required=True)
    _check_validation(config)


def check_programs(config: TrainConfig) -> None:
    """Refuse settings that the run's programs cannot be compiled for.

    The output folder, the data files and the number of steps may be missing.

    Raises:
      ValueError: see `check_config`.
    """
    _check_choices(config)
    for name in ("student", "teacher", "teacher_cache"):
        check_folder(name, getattr(config, name))
    config.data.encoding  # noqa: B018  the record checks itself
    _check_size_of_run(config, required=False)
    _check_signs(config)
    _check_widths(config.data)
    _check_micro_batches(config)
    _check_rollout(config.rollout)
    _check_replay(config)
    _check_chunker(config.data)
    _check_objective(config)
    _check_divergence(config.objective)
    _check_teacher(config)
    _check_lora(config.lora)
    _check_attention(config)
    if config.teacher_cache is not None:
        _check_teacher_cache(config)


def _check_choices(section: object, prefix: str = "") -> None:
    """A typo in a `Literal` field would otherwise select another branch silently."""
    types = get_type_hints(type(section))
    for name, value in vars(section).items():
        if dataclasses.is_dataclass(value):
            _check_choices(value, f"{prefix}{name}.")
        choices = get_args(types[name])
        if get_origin(types[name]) is Literal and value not in choices:
            raise ValueError(f"{prefix}{name}={value!r}; expected one of {choices}")


def _check_size_of_run(config: TrainConfig, *, required: bool) -> None:
    sizes = sum(size is not None for size in (config.steps, config.epochs))
    if sizes > 1 or (required and sizes == 0):
        raise ValueError(
            f"set exactly one of steps and epochs, got steps={config.steps}, "
            f"epochs={config.epochs}"
        )


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


def _check_widths(data: DataConfig) -> None:
    widths = data.widths
    if min(widths) < 2 or sorted(set(widths)) != list(widths):
        raise ValueError(
            f"data.buckets={list(data.buckets)}; expected ascending widths from 2 to "
            f"below data.max_length={data.max_length}"
        )


def _check_micro_batches(config: TrainConfig) -> None:
    if config.batch_size % config.micro_batches:
        raise ValueError(
            f"batch_size={config.batch_size} does not divide into "
            f"micro_batches={config.micro_batches}; make it a multiple"
        )


def _check_rollout(rollout: RolloutConfig) -> None:
    for name in ("probability", "initial_ratio"):
        if not 0 <= getattr(rollout, name) <= 1:
            raise ValueError(
                f"rollout.{name} must be in [0, 1], got {getattr(rollout, name)}"
            )
    if rollout.rounds < 0 or rollout.temperature < 0 or not 0 < rollout.top_p <= 1:
        raise ValueError(
            "rollout needs rounds >= 0, temperature >= 0 and 0 < top_p <= 1, got "
            f"rounds={rollout.rounds}, temperature={rollout.temperature}, "
            f"top_p={rollout.top_p}"
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


def _check_chunker(data: DataConfig) -> None:
    if data.chunker not in ("textblob", "spacy") and ":" not in data.chunker:
        raise ValueError(
            f"data.chunker={data.chunker!r}; expected textblob, spacy, or a function "
            "as module:function"
        )


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
            "chunk_size=1 leaves no neighbouring token for the span loss; use 2 or more"
        )
    if not 0 <= objective.lower < objective.upper <= 1:
        raise ValueError(
            "objective needs 0 <= lower < upper <= 1, got "
            f"lower={objective.lower}, upper={objective.upper}"
        )


def _check_divergence(objective: Objective) -> None:
    """A divergence's own settings are present, read, and in their range."""
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
        is_fraction = value is None or 0 <= value <= 1
        if name != "alpha_beta_divergence" and not is_fraction:
            raise ValueError(f"objective.{field}={value}; expected 0 to 1")
    if name == "taid" and objective.mix is None:
        raise ValueError(
            "objective.divergence='taid' needs objective.mix, the teacher's share from "
            "0 to 1"
        )
    if name.startswith("dac_kl") and objective.temperature != 1:
        raise ValueError(
            f"objective.temperature={objective.temperature} is not read by DAC-KL, "
            "which has no temperature; leave it out"
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


def _check_lora(lora: LoraConfig) -> None:
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout must be in [0, 1), got {lora.dropout}")
    try:
        re.compile(lora.targets)
    except re.error as error:
        raise ValueError(
            f"lora.targets={lora.targets!r} is not a regular expression ({error}); "
            "expected one such as attention/(query|value)$"
        ) from error
    if lora.rank == 0 and lora != LoraConfig():
        raise ValueError(
            f"lora.rank=0 trains all weights and reads no other setting of {lora}; set "
            "lora.rank, or leave lora out"
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
    if objective.divergence not in _FROM_CACHE:
        raise ValueError(
            f"objective.divergence={objective.divergence!r} needs the teacher's whole "
            f"distribution; with teacher_cache it is one of {_FROM_CACHE}"
        )
    if objective.temperature != 1:
        raise ValueError(
            f"objective.temperature={objective.temperature}, but teacher_cache holds "
            "the distribution at temperature 1; set it to 1, or leave teacher_cache out"
        )
