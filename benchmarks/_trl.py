"""TRL's on-policy trainers: one optimizer step per request."""

# TRL exports its names lazily, which pyright does not see.
# pyright: reportPrivateImportUsage=false

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from _side import Driver
from _sizes import Batch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
_FRAME = "[user] \n[assistant] "  # what the template adds to a prompt
_SPARE = 4  # steps for warm-up and checks, besides the timed ones


def serve_gkd(student: Any, teacher: Any, batch: Batch, pairs: int) -> None:
    """Serve steps of `GKDTrainer`, which forms all logits at once."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    config = GKDConfig(
        **_settings(batch, pairs),
        lmbda=1.0,
        max_new_tokens=batch.new,
        max_length=batch.width + 16,
    )
    answer = {"role": "assistant", "content": "y" * batch.new}
    trainer = GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=_byte_tokenizer(batch),
        train_dataset=_dataset(batch, pairs, lambda user: {"messages": [user, answer]}),
    )
    trainer.generation_config.eos_token_id = None
    trainer.generation_config.min_new_tokens = batch.new
    trainer.generation_kwargs["min_new_tokens"] = batch.new
    _serve(trainer, batch)


def serve_distillation(student: Any, teacher: Any, batch: Batch, pairs: int) -> None:
    """Serve steps of `DistillationTrainer`, which forms the divergence in chunks."""
    from trl import DistillationConfig, DistillationTrainer

    config = DistillationConfig(
        **_settings(batch, pairs),
        max_completion_length=batch.new,
        generation_kwargs={"min_new_tokens": batch.new},
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        processing_class=_byte_tokenizer(batch),
        train_dataset=_dataset(batch, pairs, lambda user: {"prompt": [user]}),
    )
    _serve(trainer, batch)


class _Steps(TrainerCallback):
    """A step lasts from one on_step_end to the next, with all that TRL does."""

    def __init__(self, driver: Driver, step: dict[str, Any]):
        self._driver, self._step = driver, step

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._driver.answer(**self._step)
        self._step.update(loss=0.0, rows=0)
        self._driver.wait()


def _serve(trainer: Any, batch: Batch) -> None:
    step: dict[str, Any] = {"loss": 0.0, "rows": 0, "lengths": []}
    _watch(trainer, step)
    trainer.add_callback(_Steps(Driver(), step))
    trainer.train()  # the driver ends the process before this returns


def _watch(trainer: Any, step: dict[str, Any]) -> None:
    """Record the losses that a step adds up, and the lengths of what it generates."""
    kind = type(trainer.model)
    generate, train = kind.generate, trainer.training_step

    def recorded_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        prompts = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        output = generate(self, *args, **kwargs)
        tokens = output if torch.is_tensor(output) else output.sequences
        step["lengths"] = [prompts.shape[1], tokens.shape[1]]
        step["rows"] += len(tokens)
        return output

    def recorded_train(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = train(*args, **kwargs)
        step["loss"] += loss.item()
        return loss

    kind.generate = recorded_generate
    trainer.training_step = recorded_train


def _settings(batch: Batch, pairs: int) -> dict[str, Any]:
    return dict(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        fp16=False,
        per_device_train_batch_size=batch.rows,
        gradient_accumulation_steps=batch.parts,
        max_steps=pairs + _SPARE,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        beta=0.0,  # forward KL
        temperature=1.0,
        gradient_checkpointing=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _dataset(
    batch: Batch, pairs: int, record: Callable[[dict[str, str]], Any]
) -> Dataset:
    """Prompts of exactly `batch.prompt` tokens, one token per byte."""
    user = {"role": "user", "content": "x" * (batch.prompt - len(_FRAME))}
    count = batch.size * (pairs + _SPARE)
    return Dataset.from_list([record(user)] * count)


def _byte_tokenizer(batch: Batch) -> PreTrainedTokenizerFast:
    """One token per byte, after those for padding and end of sequence."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
        model_max_length=batch.width,
    )
    fast.chat_template = _TEMPLATE
    return fast
