"""`mgsr evaluate`: scores of a checkpoint on one or several data sets."""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from mgsr_jax.commands.evaluation_output import print_tables, write_evaluation
from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.exposure_bias import check_same_tokenizer, measure_exposure_bias
from mgsr_jax.commands.loaded import (
    Dtype,
    LoadedModel,
    check_sampling,
    load,
    make_mesh,
    new_folder,
)
from mgsr_jax.evaluation.text_metrics import MetricName
from mgsr_jax.sharding import MeshConfig
from mgsr_jax.training.distributed import (
    DistributedConfig,
    check_equal,
    is_lead,
    lead_first,
    on_all_processes,
    start,
)

if TYPE_CHECKING:
    from mgsr_jax.data.encoding import Encoding
    from mgsr_jax.data.prompts import Prompt
    from mgsr_jax.evaluation.comparison import Baseline
    from mgsr_jax.evaluation.responses import EvaluationConfig
    from mgsr_jax.evaluation.scores import EvaluationResult

_NAMED = 10  # records that are left out and whose reason is printed


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of evaluate.

    Attributes:
      model: folder of a Hugging Face checkpoint, or its hub name (org/name, or
        org/name@revision).
      data: data with references, in any form and place of data.train of mgsr train, or
        several in brackets. A record with "minillm": false is not scored.
      split: split of a folder or a hub data set.
      columns: the data's names of columns that it names differently, such as
        {question: problem, answer: solution}.
      metrics: one or several metrics, 0 to 100 each: rouge_l (ROUGE-L F1 with
        stemming), exact_match (equal after SQuAD's normalisation), math (final answer
        equal as a number or as LaTeX; needs the extra math). The best reference counts.
      seeds: seeds of sampling. []: only greedy responses.
      samples: samples of each prompt per seed. avg@k and pass@k count the k = seeds x
        samples samples of a prompt.
      temperature: sampling temperature; greedy responses do not use it.
      top_k: sample from the k most probable tokens; 0: from all.
      top_p: sample from the fewest most probable tokens whose mass reaches top_p.
      exposure_bias: also measure ExAccErr (MiniLLM, arXiv 2306.08543, section 3.3): the
        excess of KL(teacher || model) on the model's own samples over that on the
        teacher's samples, in percent. Both sample the same prompts with the same seeds
        at temperature 1, whatever the settings of sampling are. Needs teacher.
      teacher: the teacher's checkpoint, given like model, for exposure_bias; must have
        the same tokenizer.
      template: "chat" for the tokenizer's chat template, the path of a template file
        (.jinja), "alpaca", "none" for the plain text, or "auto": chat where the
        tokenizer has a template, otherwise alpaca.
      template_args: further variables of the chat template, such as
        {enable_thinking: false}.
      system: text of a system message for prompts without one.
      add_special_tokens: whether the tokenizer adds its special tokens (such as bos)
        to a prompt.
      max_prompt_length: longest prompt in tokens; longer prompts are left out and
        listed. None: half of max_length.
      max_length: longest prompt and response in tokens.
      no_repeat_ngram: length of n-grams that a response must not repeat (published
        figures: 6); 0: no limit.
      batch_size: prompts decoded at a time.
      limit: score only the first examples of each set, at most this many.
      dtype: precision of weights and cache.
      mesh: devices that share the work; by default one device. Scores do not depend on
        it.
      distributed: how several processes find each other without a launcher.
      output: folder for all responses (JSONL), the scores (JSON) and these settings;
        must be new.
      against: output folder of another evaluation of the same sets with the same
        metrics. The differences to its scores, paired by prompt, are added.
    """

    model: str
    data: str | list[str]
    split: str = "test"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: MetricName | list[MetricName] = "rouge_l"
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
    samples: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    exposure_bias: bool = False
    teacher: str | None = None
    template: str = "auto"
    template_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: str = ""
    add_special_tokens: bool = True
    max_prompt_length: int | None = None
    max_length: int = 512
    no_repeat_ngram: int = 0
    batch_size: int = 32
    limit: int | None = None
    dtype: Dtype = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=1))
    distributed: DistributedConfig = dataclasses.field(
        default_factory=DistributedConfig
    )
    output: str | None = None
    against: str | None = None

    @property
    def paths(self) -> list[str]:
        """The sets, one or several."""
        return [self.data] if isinstance(self.data, str) else self.data

    @property
    def metric_names(self) -> list[MetricName]:
        """The metrics, one or several."""
        return [self.metrics] if isinstance(self.metrics, str) else self.metrics

    @property
    def encoding(self) -> "Encoding":
        """How a record becomes tokens."""
        from mgsr_jax.data.encoding import Encoding

        return Encoding(
            self.template,
            self.add_special_tokens,
            self.max_prompt_length,
            self.max_length,
            template_args=self.template_args,
            system=self.system,
        )

    def protocol(self) -> "EvaluationConfig":
        """The settings of sampling and decoding."""
        import jax.numpy as jnp

        from mgsr_jax.decoding.sampling import Sampling
        from mgsr_jax.evaluation.responses import EvaluationConfig

        return EvaluationConfig(
            seeds=self.seeds,
            samples=self.samples,
            sampling=Sampling(self.temperature, self.top_k, self.top_p),
            max_prompt_length=self.encoding.prompt_limit,
            max_length=self.max_length,
            batch_size=self.batch_size,
            no_repeat_ngram=self.no_repeat_ngram,
            dtype=jnp.dtype(self.dtype),
        )


def evaluate(config: EvaluateConfig) -> int:
    """Score a model on data sets: metrics of its responses, diversity, loss.

    Every prompt is sampled with each seed and answered greedily once. A metric is the
    mean over the prompts, with the 95 % interval over the prompts in brackets.
    """
    from mgsr_jax.evaluation.text_metrics import check_metrics

    _check(config)
    start(config.distributed)
    on_all_processes(lambda: check_metrics(config.metric_names))
    folder = on_all_processes(lambda: new_folder(config.output))
    baselines = on_all_processes(lambda: _read_baselines(config))
    mesh = make_mesh(config.mesh)
    loaded, teacher = load(config.model, config.encoding, mesh=mesh), None
    for note in loaded.encoder.notes if is_lead() else ():
        print(note)
    if config.teacher is not None:
        teacher = load(config.teacher, mesh=mesh)
        check_same_tokenizer(loaded, teacher)
    sets = lead_first(lambda: _load_sets(config, loaded, baselines))
    check_equal({path: _digest(prompts) for path, prompts in sets.items()})
    results: dict[str, EvaluationResult] = {}
    for path, result in _score_sets(config, loaded, teacher, sets):
        if path in baselines:
            difference = baselines[path].difference(result)
            result = dataclasses.replace(result, difference=difference)
        results[path] = result
        if folder is not None and is_lead():
            models = {"model": loaded, "teacher": teacher}
            write_evaluation(folder, dataclasses.asdict(config), models, results)
    if is_lead():
        print_tables(results)
    return DONE


def _check(config: EvaluateConfig) -> None:
    check_sampling(
        config.temperature,
        config.top_k,
        config.top_p,
        batch_size=config.batch_size,
        limit=config.limit,
        samples=config.samples,
    )
    if config.exposure_bias and config.teacher is None:
        raise ValueError(
            "exposure_bias compares the model with its teacher, and there is none; set "
            "--teacher to the teacher's folder"
        )
    if config.exposure_bias and not config.seeds:
        raise ValueError(
            "exposure_bias is measured on samples, but seeds is empty; give at least "
            "one seed"
        )
    if config.teacher is not None and not config.exposure_bias:
        raise ValueError(
            f"teacher={config.teacher} is read only by exposure_bias; set "
            "--exposure_bias true, or leave teacher out"
        )


def _read_baselines(config: EvaluateConfig) -> dict[str, "Baseline"]:
    """Set -> the responses in `against`, read by the lead process, which writes."""
    from mgsr_jax.evaluation.comparison import read_baseline

    if config.against is None or not is_lead():
        return {}
    baselines = {path: read_baseline(config.against, path) for path in config.paths}
    for baseline in baselines.values():
        baseline.check_metrics(config.metric_names)
    return baselines


def _load_sets(
    config: EvaluateConfig, loaded: LoadedModel, baselines: dict[str, "Baseline"]
) -> dict[str, list["Prompt"]]:
    """Read the sets, and compare their prompts with those of the baselines."""
    from mgsr_jax.evaluation.evaluate import prompts_to_score
    from mgsr_jax.evaluation.responses import prompt_text

    sets, protocol = {}, config.protocol()
    for path in config.paths:
        sets[path] = _load_prompts(config, loaded, path)
        scored = prompts_to_score(sets[path], protocol, config.metric_names)
        if path in baselines:
            baselines[path].check(
                [(prompt_text(loaded.tokenizer, p), p.references) for p in scored]
            )
    return sets


def _digest(prompts: list["Prompt"]) -> str:
    return hashlib.sha256(repr(prompts).encode()).hexdigest()


def _load_prompts(
    config: EvaluateConfig, loaded: LoadedModel, path: str
) -> list["Prompt"]:
    """Read an evaluation set, and print which records are left out and why."""
    from mgsr_jax.data.prompts import load_prompts

    prompts, report = load_prompts(
        path,
        loaded.tokenizer,
        config.encoding,
        split=config.split,
        columns=config.columns,
    )
    if is_lead():
        unscored = sum(not prompt.scored for prompt in prompts)
        print(
            f"{path}: {report.kept} prompts ({unscored} not scored), "
            f"{report.too_long} too long, {report.empty} empty, {report.malformed} "
            "malformed"
        )
        for message in report.messages[:_NAMED]:
            print(f"  {message}")
        if (more := len(report.messages) + report.unlisted - _NAMED) > 0:
            print(f"  and {more} more")
    return prompts[: config.limit]


def _score_sets(
    config: EvaluateConfig,
    loaded: LoadedModel,
    teacher: LoadedModel | None,
    sets: dict[str, list["Prompt"]],
) -> Iterator[tuple[str, "EvaluationResult"]]:
    """Evaluate each set; a set comes again when its exposure bias is known."""
    from mgsr_jax.evaluation.evaluate import evaluate

    protocol, params = config.protocol(), loaded.params(config.dtype)
    models = [(loaded, params)]
    if teacher is not None:
        models.append((teacher, teacher.params(config.dtype)))
    for path, prompts in sets.items():
        name = Path(path).name
        with _progress_bar(name) as progress:
            result = evaluate(
                loaded.model,
                params,
                loaded.tokenizer,
                prompts,
                protocol,
                metrics=config.metric_names,
                eos_ids=loaded.eos_ids(),
                mesh=loaded.mesh,
                progress=progress,
            )
        yield path, result
        if teacher is not None:
            with _progress_bar(f"exposure bias on {name}") as progress:
                bias = measure_exposure_bias(models, prompts, protocol, progress)
            yield path, dataclasses.replace(result, exposure_bias=bias)


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of (done, total); only the lead process shows it."""
    console = Console(stderr=True, quiet=not is_lead())
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)
