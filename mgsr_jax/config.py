"""What a run is made of: one dataclass a topic, read from YAML and the command line.

`check` finds what cannot work before a model is loaded.
"""

import dataclasses
from typing import Literal

from mgsr_jax.objective import Objective
from mgsr_jax.rollout import RolloutConfig
from mgsr_jax.train_step import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Instruction data and how it becomes token rows.

    Attributes:
      train: JSONL or Parquet file, or a hub data set's name.
      valid: the same for validation; without it there is none.
      template: "alpaca", or "chat" for the tokenizer's own chat template.
      add_special_tokens: whether prompts carry the tokenizer's own (such as bos).
      max_prompt_length: longest prompt in tokens.
      max_length: longest prompt and response in tokens; the width of every row.
      too_long: "drop" longer examples, or "truncate" them; both are counted.
      max_bad_fraction: share of malformed records above which the run refuses to start.
      chunker: "textblob", or "spacy" (needs the extra and a model).
      spacy_model: name of spaCy's model.
      cache_dir: where tokenised data is kept; default: the datasets library's cache.
    """

    train: str
    valid: str | None = None
    template: Literal["alpaca", "chat"] = "alpaca"
    add_special_tokens: bool = True
    max_prompt_length: int = 256
    max_length: int = 512
    too_long: Literal["drop", "truncate"] = "drop"
    max_bad_fraction: float = 0.05
    chunker: Literal["textblob", "spacy"] = "textblob"
    spacy_model: str = "en_core_web_sm"
    cache_dir: str | None = None


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the device mesh's axes; -1 fills the rest.

    Attributes:
      data: copies of the models that work on different rows.
      fsdp: devices that share one copy's parameters (and work on different rows too).
    """

    data: int = -1
    fsdp: int = 1


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
      student: folder of the student's Hugging Face checkpoint.
      output: run folder; must be new, or hold the same run (see `resume`).
      data: instruction data.
      teacher: folder of the teacher's checkpoint; none: plain fine-tuning (SFT).
      steps: optimizer steps; give either `steps` or `epochs`.
      epochs: passes over the training data.
      batch_size: examples a step, over all hosts and micro-batches.
      micro_batches: parts that a step's batch is computed in, one after the other.
      seed: of data order, rollouts and the clip network.
      dtype: of computation; parameters, optimizer and losses are float32.
      teacher_dtype: of the teacher's parameters.
      objective: the three losses and their weights.
      rollout: where a step's rows come from.
      optimizer: of the student and of the clip network.
      mesh: device mesh.
      validate_every: steps between validations; 0: only at the end.
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
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batches: int = 1
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    teacher_dtype: Literal["float32", "bfloat16"] = "float32"
    objective: Objective = dataclasses.field(default_factory=Objective)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    validate_every: int = 0
    save_every: int = 0
    keep_checkpoints: int = 2
    log_every: int = 10
    resume: bool = False
    tensorboard: bool = True
