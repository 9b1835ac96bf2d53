"""The command line: YAML and overrides into functions, errors into one line.

Exit status: 0 done; 2 a mistake in settings or input; 42 stopped by a signal, saved,
can be resumed; 65 diverged. MGSR_TRACEBACK=1 shows where an error arose.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mgsr_jax.config import TrainConfig

DONE, MISTAKE, STOPPED, DIVERGED = 0, 2, 42, 65
Dtype = Literal["float32", "bfloat16"]


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    try:
        parser = _parser()
        settings = parser.instantiate(parser.parse_args(list(arguments)))
        return _run(settings.subcommand, settings[settings.subcommand])
    except (
        argparse.ArgumentError,
        ArithmeticError,
        ImportError,
        OSError,
        ValueError,
    ) as error:
        if os.environ.get("MGSR_TRACEBACK"):
            raise
        print(f"mgsr: error: {' '.join(str(error).split())}", file=sys.stderr)
        return DIVERGED if isinstance(error, ArithmeticError) else MISTAKE


def train(config: TrainConfig) -> int:
    """Distils (or, without a teacher, fine-tunes) a student."""
    from mgsr_jax.trainer import train

    return DONE if train(config).finished else STOPPED


def generate(
    model: str,
    prompt: str | list[str],
    *,
    input: str = "",
    template: Literal["alpaca", "chat", "none"] = "alpaca",
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
      max_length: tokens of prompt and answer.
      temperature: of sampling; 0 is greedy.
      top_k: keep the k most probable tokens; 0 keeps all.
      top_p: keep the fewest most probable tokens that hold this mass.
      seed: of sampling.
      dtype: of weights and cache.
    """
    import jax
    import jax.numpy as jnp

    from mgsr_jax import decode, encoding, rows, setup

    found = _load(model, dtype)
    prompt = [prompt] if isinstance(prompt, str) else prompt
    if template == "none":
        ids = [found.tokenizer(text)["input_ids"] for text in prompt]
    else:
        ids = [
            encoding.encode_prompt(found.tokenizer, text, input, template=template)
            for text in prompt
        ]
    if longest := [len(i) for i in ids if len(i) >= max_length]:
        raise ValueError(
            f"a prompt of {max(longest)} tokens leaves no room in max_length="
            f"{max_length}; raise it"
        )
    batch = rows.from_lists(ids, [[]] * len(ids), width=max_length)
    answers = decode.generate(
        found.model,
        found.params,
        jax.tree.map(jnp.asarray, batch),
        key=jax.random.key(seed),
        max_length=max_length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        eos_ids=setup.eos_ids(found.tokenizer, found.model),
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
        references), or a list of files in brackets.
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
    import jax.numpy as jnp

    from mgsr_jax import evaluate as evaluation
    from mgsr_jax import setup
    from mgsr_jax.data import load_prompts
    from mgsr_jax.encoding import Encoding

    folder = _new_folder(output)
    found = _load(model, dtype)
    encoding = Encoding(template, add_special_tokens, max_prompt_length, max_length)
    console, results = Console(), {}
    for path in [data] if isinstance(data, str) else data:
        prompts, report = load_prompts(path, found.tokenizer, encoding)
        console.print(
            f"{path}: {report.kept} prompts, {report.too_long} too long, "
            f"{report.empty} empty, {report.malformed} malformed"
        )
        with _bar(Path(path).name) as progress:
            results[path] = evaluation.evaluate(
                found.model,
                found.params,
                found.tokenizer,
                prompts[:limit],
                seeds=seeds,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                max_prompt_length=max_prompt_length,
                max_length=max_length,
                batch_size=batch_size,
                no_repeat_ngram=no_repeat_ngram,
                eos_ids=setup.eos_ids(found.tokenizer, found.model),
                dtype=jnp.dtype(dtype),
                progress=progress,
            )
    console.print(_score_table(results))
    if folder is not None:
        _write_scores(folder, results)
        console.print(f"answers and scores: {folder}")
    return DONE


def export(
    run: str, output: str, *, step: int | None = None, dtype: Dtype = "float32"
) -> int:
    """Writes a checkpoint of a run as a Hugging Face folder.

    Args:
      run: folder of a training run.
      output: the folder to make; must be new.
      step: of the checkpoint; default: the latest.
      dtype: of the weights written.
    """
    import jax
    import jax.numpy as jnp

    from mgsr_jax import models
    from mgsr_jax.checkpoint import hf
    from mgsr_jax.checkpoint.state import restore_params
    from mgsr_jax.setup import CONFIG_FILE
    from mgsr_jax.trainer import CHECKPOINTS, STUDENT

    _new_folder(output)
    file = Path(run) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{run} has no {CONFIG_FILE}; give a run's folder")
    source = yaml.safe_load(file.read_text(encoding="utf-8"))["student"]
    model = models.from_config(source)
    params = restore_params(
        Path(run) / CHECKPOINTS, step, {STUDENT: model.abstract_params()}
    )
    hf.save_pretrained(
        output,
        model,
        jax.tree.map(jnp.asarray, params[STUDENT]),
        tokenizer_from=source,
        dtype=jnp.dtype(dtype),
    )
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
    from mgsr_jax.report import report

    print(report(run))
    return DONE


COMMANDS: tuple[Callable[..., int], ...] = (generate, evaluate, export, convert, report)
"""All but `train`, whose settings are one dataclass."""


def _parser() -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog="mgsr",
        description="Distil large language models in JAX.",
        exit_on_error=False,
    )
    commands = parser.add_subcommands(title="commands", metavar="COMMAND")
    found = {"train": _subparser(train)}
    found["train"].add_argument("--config", action="config", help="YAML file")
    found["train"].add_class_arguments(TrainConfig)
    for command in COMMANDS:
        found[command.__name__] = sub = _subparser(command)
        sub.add_argument("--config", action="config", help="YAML file")
        sub.add_function_arguments(command)
    for name, sub in found.items():
        commands.add_subcommand(name, sub, help=sub.description)
    return parser


def _subparser(command: Callable[..., int]) -> jsonargparse.ArgumentParser:
    description = (command.__doc__ or "").splitlines()[0]
    return jsonargparse.ArgumentParser(description=description, exit_on_error=False)


def _run(name: str, settings: jsonargparse.Namespace) -> int:
    values = dict(vars(settings))
    values.pop("config", None)
    if name == "train":
        return train(TrainConfig(**values))
    return next(c for c in COMMANDS if c.__name__ == name)(**values)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    model: Any
    params: Any
    tokenizer: Any


def _load(folder: str, dtype: Dtype) -> _Loaded:
    import jax.numpy as jnp

    from mgsr_jax import models
    from mgsr_jax.checkpoint import hf

    model = models.from_config(folder)
    tokenizer = hf.load_tokenizer(folder)
    return _Loaded(
        model, hf.load_params(folder, model, dtype=jnp.dtype(dtype)), tokenizer
    )


@contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of (done, total)."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _new_folder(path: str | None) -> Path | None:
    if path is None:
        return None
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"output {folder} exists; choose another folder")
    return folder


def _score_table(results: dict[str, Any]) -> Table:
    table = Table("set", "examples")
    for column in ("ROUGE-L", "greedy ROUGE-L", "distinct-2", "length", "loss"):
        table.add_column(column, justify="right")
    for path, result in results.items():
        sampled = result.sampled or result.greedy
        spread = "" if result.rouge_l_std is None else f" ± {result.rouge_l_std:.2f}"
        table.add_row(
            Path(path).name,
            str(result.examples),
            f"{sampled.rouge_l:.2f}{spread}",
            f"{result.greedy.rouge_l:.2f}",
            f"{sampled.distinct_2:.3f}",
            f"{sampled.length:.1f}",
            f"{result.loss:.4f}",
        )
    return table


def _write_scores(folder: Path, results: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    scores = {}
    for path, result in results.items():
        values = dataclasses.asdict(result)
        answers = values.pop("answers")
        scores[path] = values
        lines = [json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers]
        name = "-".join(Path(path).with_suffix("").parts[-2:]).strip("/")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "scores.json").write_text(json.dumps(scores, indent=2), encoding="utf-8")
