"""`mgsr evaluate`: scores of a checkpoint on one or several data sets."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.progress import Progress

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.loaded import (
    Dtype,
    LoadedModel,
    check_sampling,
    load,
    new_folder,
)

if TYPE_CHECKING:
    from mgsr_jax.data.prompts import Prompt
    from mgsr_jax.evaluation.evaluate import EvaluationResult


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of evaluate.

    Attributes:
      model: folder of a Hugging Face checkpoint.
      data: JSONL file with instruction, input and output (a string or a list of
        references), or a list of files in brackets. A record with "minillm": false is
        not scored.
      split: split of a hub data set.
      seeds: seeds of sampling; each prompt is sampled once per seed. []: only greedy
        responses.
      temperature: sampling temperature; greedy responses do not use it.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the fewest most probable tokens whose mass reaches top_p.
      template: "alpaca", or "chat" for the tokenizer's chat template.
      add_special_tokens: whether the tokenizer adds its special tokens (such as bos)
        to a prompt.
      max_prompt_length: longest prompt in tokens; longer prompts are left out and
        listed.
      max_length: longest prompt and response in tokens.
      no_repeat_ngram: length of n-grams that a response must not repeat (published
        figures: 6); 0: no limit.
      batch_size: prompts decoded at a time.
      limit: score only the first examples of each set, at most this many.
      dtype: precision of weights and cache.
      output: folder for all responses (JSONL) and the scores (JSON); must be new.
    """

    model: str
    data: str | list[str]
    split: str = "test"
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    template: Literal["alpaca", "chat"] = "alpaca"
    add_special_tokens: bool = True
    max_prompt_length: int = 256
    max_length: int = 512
    no_repeat_ngram: int = 0
    batch_size: int = 32
    limit: int | None = None
    dtype: Dtype = "float32"
    output: str | None = None


def evaluate(config: EvaluateConfig) -> int:
    """Score a model: ROUGE-L of sampled and greedy responses, diversity, loss.

    ROUGE-L is the F1 with stemming against the best reference, times 100: the mean over
    the examples for each seed, then mean and standard deviation over the seeds.
    """
    from mgsr_jax.evaluation.tables import score_table

    check_sampling(
        config.temperature,
        config.top_k,
        config.top_p,
        batch_size=config.batch_size,
        limit=config.limit,
    )
    folder = new_folder(config.output)
    loaded = load(config.model)
    paths = [config.data] if isinstance(config.data, str) else config.data
    sets = {path: _load_prompts(config, loaded, path) for path in paths}
    results = _score_sets(config, loaded, sets, folder)
    Console().print(score_table(results))
    return DONE


def _load_prompts(
    config: EvaluateConfig, loaded: LoadedModel, path: str
) -> list["Prompt"]:
    """Read an evaluation set, and print which records are left out and why."""
    from mgsr_jax.data.encoding import Encoding
    from mgsr_jax.data.prompts import load_prompts

    encoding = Encoding(
        config.template,
        config.add_special_tokens,
        config.max_prompt_length,
        config.max_length,
    )
    prompts, report = load_prompts(path, loaded.tokenizer, encoding, split=config.split)
    unscored = sum(not prompt.scored for prompt in prompts)
    print(
        f"{path}: {report.kept} prompts ({unscored} not scored), {report.too_long} too "
        f"long, {report.empty} empty, {report.malformed} malformed"
    )
    for message in report.messages:
        print(f"  {message}")
    return prompts[: config.limit]


def _score_sets(
    config: EvaluateConfig,
    loaded: LoadedModel,
    sets: dict[str, list["Prompt"]],
    folder: Path | None,
) -> dict[str, "EvaluationResult"]:
    """Evaluate each set; the scores so far are written after each."""
    import jax.numpy as jnp

    from mgsr_jax.checkpoint.tokenizer import eos_ids
    from mgsr_jax.decoding.sampling import Sampling
    from mgsr_jax.evaluation.evaluate import evaluate
    from mgsr_jax.evaluation.responses import EvaluationConfig
    from mgsr_jax.evaluation.tables import write_scores

    protocol = EvaluationConfig(
        seeds=config.seeds,
        sampling=Sampling(config.temperature, config.top_k, config.top_p),
        max_prompt_length=config.max_prompt_length,
        max_length=config.max_length,
        batch_size=config.batch_size,
        no_repeat_ngram=config.no_repeat_ngram,
        dtype=jnp.dtype(config.dtype),
    )
    params, results = loaded.params(config.dtype), {}
    for path, prompts in sets.items():
        with _progress_bar(Path(path).name) as progress:
            results[path] = evaluate(
                loaded.model,
                params,
                loaded.tokenizer,
                prompts,
                protocol,
                eos_ids=eos_ids(loaded.tokenizer, loaded.model),
                progress=progress,
            )
        write_scores(folder, results)
    return results


@contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of (done, total)."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)
