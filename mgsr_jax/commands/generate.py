"""The commands of `mgsr`, each a function of its settings to an exit status.

What a command alone needs is imported there: `mgsr --help` waits for nothing.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from mgsr_jax.training.config import TrainConfig

DONE, MISTAKE, STOPPED, DIVERGED = 0, 2, 42, 65  # exit status
Dtype = Literal["float32", "bfloat16"]


def train(config: TrainConfig) -> int:
    """Distils (or, without a teacher, fine-tunes) a student."""
    from mgsr_jax.training import distributed
    from mgsr_jax.training.trainer import train

    _take_the_gpu()
    distributed.start(config.distributed)
    return DONE if train(config).finished else STOPPED


def cache_teacher(
    config: TrainConfig,
    *,
    top_k: int = 512,
    logits_dtype: Literal["float16", "float32"] = "float16",
) -> int:
    """Runs the teacher over the training data once and keeps what it says on disk.

    Takes the YAML file and the settings of train; of these it reads student (for the
    tokenizer), teacher, teacher_dtype, data, mesh, batch_size and micro_batches. Then
    train reads the folder by --teacher_cache. A stopped command goes on where it was.
    objective.span must be 0: it compares whole distributions.

    Args:
      top_k: K, most probable classes kept of each token; K * 4 + 4 bytes with
        float16 and a vocabulary of at most 65,536.
      logits_dtype: of the K logits on disk.
    """
    from mgsr_jax.commands.cache_teacher import cache_teacher

    _take_the_gpu()
    cache_teacher(config, top_k=top_k, logits_dtype=logits_dtype)
    return DONE


def plan(
    config: TrainConfig, *, target: str, slices: int = 1, search: bool = False
) -> int:
    """Says whether a run fits a machine that is not here, and what it would send.

    Takes the YAML file and the settings of train, and compiles the rollout and the
    training step for the target with its own compiler (the plan-tpu or plan-gpu extra);
    no device is used. student and teacher may be folders or config.json files: weights,
    tokenizers and data are not read. output and data.train may be left out, though they
    are called required below; a teacher_cache that is not here is taken to hold 512
    classes a token. Exit status 2 where the run does not fit.

    Args:
      target: a TPU slice such as v5e:4x4, v5p:4x4x4 or v6e:16x16, or GPUs as
        SLICESxHOSTSxGPUS, such as h200:1x2x8.
      slices: TPU slices that work together; mesh.data is a multiple of it.
      search: try mesh.fsdp from 1 up, and of each the fewest micro_batches that fit.
    """
    from mgsr_jax.planning import machines, plan

    machines.use_no_device()
    console, machine = Console(), machines.describe(target, slices=slices)
    if not search:
        found = plan.plan(config, machine)
        plan.print_plan(found, console)
        return DONE if found.fits else MISTAKE
    found = plan.search(config, machine, lambda trial: plan.print_plan(trial, console))
    if found is None:
        console.print(f"no mesh.fsdp and micro_batches of this run fit {target}")
        return MISTAKE
    sizes = " ".join(f"--mesh.{axis} {n}" for axis, n in found.mesh.shape.items())
    console.print(f"{sizes} --micro_batches {found.micro_batches}", soft_wrap=True)
    return DONE


def _take_the_gpu() -> None:
    """JAX would take three quarters of its memory; `mgsr plan` counts on 92 %."""
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")


def generate(
    model: str,
    prompt: str | list[str],
    *,
    input: str = "",
    template: Literal["alpaca", "chat", "none"] = "alpaca",
    add_special_tokens: bool = True,
    max_length: int = 512,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 10,
    dtype: Dtype = "float32",
) -> int:
    """Writes answers to prompts.

    Args:
      model: folder of a Hugging Face checkpoint.
      prompt: an instruction, or a list of them in brackets; one answer each.
      input: further context of the instructions (Alpaca's input).
      template: "alpaca", "chat" for the tokenizer's own, "none" for the bare text.
      add_special_tokens: whether prompts carry the tokenizer's own (such as bos).
      max_length: tokens of prompt and answer.
      temperature: of sampling; 0 is greedy.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens that hold this mass.
      seed: of sampling.
      dtype: of weights and cache.
    """
    import jax
    import jax.numpy as jnp

    from mgsr_jax import rows
    from mgsr_jax.decoding import decode
    from mgsr_jax.training import inputs

    _check_sampling(temperature, top_k, top_p, max_length=max_length)
    prompt = [prompt] if isinstance(prompt, str) else prompt
    found = _load(model)
    ids = [
        _prompt_ids(found, text, input, template, add_special_tokens, max_length)
        for text in prompt
    ]
    batch = rows.from_lists(ids, [[]] * len(ids), width=max_length)
    answers = decode.generate(
        found.model,
        found.params(dtype),
        jax.tree.map(jnp.asarray, batch),
        key=jax.random.key(seed),
        max_length=max_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=inputs.eos_ids(found.tokenizer, found.model),
        vocab_size=len(found.tokenizer),
        dtype=jnp.dtype(dtype),
    )
    for tokens, start, end in zip(
        answers.tokens, answers.prompt_lengths, answers.lengths, strict=True
    ):
        text = found.tokenizer.decode(
            tokens[int(start) : int(end)].tolist(), skip_special_tokens=True
        )
        print(text)
    return DONE


def evaluate(
    model: str,
    data: str | list[str],
    *,
    split: str = "test",
    seeds: list[int] = [10, 20, 30, 40, 50],  # noqa: B006  never changed
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    template: Literal["alpaca", "chat"] = "alpaca",
    add_special_tokens: bool = True,
    max_prompt_length: int = 256,
    max_length: int = 512,
    no_repeat_ngram: int = 0,
    batch_size: int = 32,
    limit: int | None = None,
    dtype: Dtype = "float32",
    output: str | None = None,
) -> int:
    """Scores a model: ROUGE-L of sampled and greedy answers, diversity, loss.

    ROUGE-L is the F1 with stemming against the best reference, times 100: mean over the
    examples of each seed, then mean and standard deviation over the seeds.

    Args:
      model: folder of a Hugging Face checkpoint.
      data: JSONL file with instruction, input and output (a string or a list of
        references), or a list of files in brackets. A record with "minillm": false is
        not scored.
      split: which split of a hub data set.
      seeds: one sample of every prompt each, [] for greedy answers alone.
      temperature: of the samples; the greedy answers have none.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens that hold this mass.
      template: "alpaca", or "chat" for the tokenizer's own.
      add_special_tokens: whether prompts carry the tokenizer's own (such as bos).
      max_prompt_length: longer prompts are left out, counted and named.
      max_length: tokens of prompt and answer.
      no_repeat_ngram: forbid repeated n-grams (published figures: 6); 0 is off.
      batch_size: answers generated at a time.
      limit: only the first so many examples of each set.
      dtype: of weights and cache.
      output: folder for every answer (JSONL) and the scores (JSON); must be new.
    """
    from mgsr_jax.data.encoding import Encoding
    from mgsr_jax.evaluation.report import score_table

    _check_sampling(temperature, top_k, top_p, batch_size=batch_size, limit=limit)
    _new_folder(output)
    found = _load(model)
    encoding = Encoding(template, add_special_tokens, max_prompt_length, max_length)
    paths = [data] if isinstance(data, str) else data
    sets = {path: _load_prompts(path, split, found, encoding)[:limit] for path in paths}
    results = _score_sets(
        found,
        found.params(dtype),
        sets,
        _new_folder(output),
        seeds=seeds,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_prompt_length=max_prompt_length,
        max_length=max_length,
        batch_size=batch_size,
        no_repeat_ngram=no_repeat_ngram,
        dtype=dtype,
    )
    Console().print(score_table(results))
    return DONE


def export(
    run: str,
    output: str,
    *,
    step: int | None = None,
    dtype: Dtype = "float32",
    adapter: bool = False,
) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder.

    LoRA's adapters are merged into the student's weights.

    Args:
      run: folder of a training run.
      output: the folder to make; must be new.
      step: of the checkpoint; default: the latest.
      dtype: of the weights written.
      adapter: of a run with LoRA write the adapters alone, as peft loads them onto the
        student that the run began with.
    """
    import jax.numpy as jnp

    from mgsr_jax.commands.export import export

    _new_folder(output)
    export(run, output, step=step, dtype=jnp.dtype(dtype), adapter=adapter)
    print(output)
    return DONE


def convert(source: str, output: str) -> int:
    """Rewrites pickled weights (.bin) as safetensors; needs the convert extra.

    Args:
      source: folder with pytorch_model.bin, whole or in parts.
      output: the folder to make; must be new.
    """
    from mgsr_jax.checkpoint.convert import convert

    convert(source, output)
    print(output)
    return DONE


def report(run: str) -> int:
    """Writes report.md and curves.png into a run's folder.

    Args:
      run: folder of a training run.
    """
    from mgsr_jax.evaluation.report import report

    print(report(run))
    return DONE


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A checkpoint's model and tokenizer; its weights are read when asked for."""

    folder: str
    model: Any
    tokenizer: Any

    def params(self, dtype: Dtype) -> Any:
        import jax.numpy as jnp

        from mgsr_jax.checkpoint import hf

        return hf.load_params(self.folder, self.model, dtype=jnp.dtype(dtype))


def _load(folder: str) -> _Loaded:
    from mgsr_jax import models
    from mgsr_jax.checkpoint import hf

    model, tokenizer = models.from_config(folder), hf.load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding "
            f"{model.config.vocab_size} rows; they do not belong together"
        )
    return _Loaded(folder, model, tokenizer)


def _prompt_ids(
    found: _Loaded,
    text: str,
    context: str,
    template: str,
    add_special_tokens: bool,
    max_length: int,
) -> list[int]:
    from mgsr_jax.data.encoding import encode_prompt

    if template == "none":
        ids = found.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    else:
        ids = encode_prompt(
            found.tokenizer,
            text,
            context,
            template=template,
            add_special_tokens=add_special_tokens,
        )
    if len(ids) >= max_length:
        raise ValueError(
            f"a prompt of {len(ids)} tokens leaves no room in max_length={max_length}; "
            "raise it"
        )
    return ids


def _load_prompts(path: str, split: str, found: _Loaded, encoding: Any) -> list[Any]:
    """An evaluation set; says what of it is left out, and why."""
    from mgsr_jax.data.dataset import load_prompts

    prompts, report = load_prompts(path, found.tokenizer, encoding, split=split)
    unscored = sum(not prompt.scored for prompt in prompts)
    print(
        f"{path}: {report.kept} prompts ({unscored} not scored), {report.too_long} too "
        f"long, {report.empty} empty, {report.malformed} malformed"
    )
    for message in report.messages:
        print(f"  {message}")
    return prompts


def _score_sets(
    found: _Loaded,
    params: Any,
    sets: dict[str, list[Any]],
    folder: Path | None,
    *,
    dtype: Dtype,
    **settings: Any,
) -> dict[str, Any]:
    """The evaluation of each set; what is there is written after each."""
    import jax.numpy as jnp

    from mgsr_jax.evaluation.evaluate import evaluate
    from mgsr_jax.evaluation.report import write_scores
    from mgsr_jax.training.inputs import eos_ids

    results = {}
    for path, prompts in sets.items():
        with _bar(Path(path).name) as progress:
            results[path] = evaluate(
                found.model,
                params,
                found.tokenizer,
                prompts,
                eos_ids=eos_ids(found.tokenizer, found.model),
                dtype=jnp.dtype(dtype),
                progress=progress,
                **settings,
            )
        write_scores(folder, results)
    return results


def _check_sampling(
    temperature: float, top_k: int, top_p: float, **positive: int | None
) -> None:
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            "sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}"
        )


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of (done, total)."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _new_folder(path: str | None) -> Path | None:
    from mgsr_jax.checkpoint.folder import check_folder

    if path is None:
        return None
    check_folder("output", path)
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output {folder} exists; choose another folder")
    return folder


COMMANDS: dict[str, Callable[..., int]] = {
    command.__name__.replace("_", "-"): command
    for command in (
        train,
        plan,
        cache_teacher,
        generate,
        evaluate,
        export,
        convert,
        report,
    )
}
