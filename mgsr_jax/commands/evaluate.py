"""`mgsr evaluate`: scores of a checkpoint on one or several data sets."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from mgsr_jax.commands.exit_status import DONE
from mgsr_jax.commands.loaded import (
    Dtype,
    LoadedModel,
    check_sampling,
    load,
    make_mesh,
    new_folder,
)
from mgsr_jax.training.config import MeshConfig
from mgsr_jax.typing import Params

if TYPE_CHECKING:
    from mgsr_jax.data.encoding import Encoding
    from mgsr_jax.data.prompts import Prompt
    from mgsr_jax.evaluation.evaluate import EvaluationResult
    from mgsr_jax.evaluation.responses import EvaluationConfig
    from mgsr_jax.rows import Rows


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Settings of evaluate.

    Attributes:
      model: folder of a Hugging Face checkpoint, or its hub name (org/name, or
        org/name@revision).
      data: JSONL file with instruction, input and output (a string or a list of
        references), or a list of files in brackets. A record with "minillm": false is
        not scored.
      split: split of a hub data set.
      seeds: seeds of sampling; each prompt is sampled once per seed. []: only greedy
        responses.
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
      output: folder for all responses (JSONL) and the scores (JSON); must be new.
    """

    model: str
    data: str | list[str]
    split: str = "test"
    seeds: tuple[int, ...] = (10, 20, 30, 40, 50)
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
    output: str | None = None

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
            sampling=Sampling(self.temperature, self.top_k, self.top_p),
            max_prompt_length=self.encoding.prompt_limit,
            max_length=self.max_length,
            batch_size=self.batch_size,
            no_repeat_ngram=self.no_repeat_ngram,
            dtype=jnp.dtype(self.dtype),
        )


def evaluate(config: EvaluateConfig) -> int:
    """Score a model: ROUGE-L of sampled and greedy responses, diversity, loss.

    ROUGE-L is the F1 with stemming against the best reference, times 100: the mean over
    the examples for each seed, then mean and standard deviation over the seeds.
    """
    from mgsr_jax.evaluation.tables import score_table, write_scores

    _check(config)
    folder, mesh = new_folder(config.output), make_mesh(config.mesh)
    loaded, teacher = load(config.model, config.encoding, mesh=mesh), None
    for line in loaded.encoder.notes:
        print(line)
    if config.teacher is not None:
        teacher = load(config.teacher, mesh=mesh)
        _check_same_tokenizer(loaded, teacher)
    paths = [config.data] if isinstance(config.data, str) else config.data
    sets = {path: _load_prompts(config, loaded, path) for path in paths}
    results: dict[str, EvaluationResult] = {}
    for path, result in _score_sets(config, loaded, teacher, sets):
        results[path] = result
        write_scores(folder, results)
    Console().print(score_table(results))
    return DONE


def _check(config: EvaluateConfig) -> None:
    check_sampling(
        config.temperature,
        config.top_k,
        config.top_p,
        batch_size=config.batch_size,
        limit=config.limit,
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


def _check_same_tokenizer(student: LoadedModel, teacher: LoadedModel) -> None:
    from mgsr_jax.checkpoint.tokenizer import tokenizer_fingerprint

    first, second = student.tokenizer, teacher.tokenizer
    if tokenizer_fingerprint(first) != tokenizer_fingerprint(second):
        raise ValueError(
            f"teacher {teacher.folder} ({len(second)} tokens) and model "
            f"{student.folder} ({len(first)} tokens) have different tokenizers; "
            "exposure_bias compares distributions over one vocabulary, so give a "
            "teacher with the same tokenizer"
        )


def _load_prompts(
    config: EvaluateConfig, loaded: LoadedModel, path: str
) -> list["Prompt"]:
    """Read an evaluation set, and print which records are left out and why."""
    from mgsr_jax.data.prompts import load_prompts

    prompts, report = load_prompts(
        path, loaded.tokenizer, config.encoding, split=config.split
    )
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
                eos_ids=loaded.eos_ids(),
                mesh=loaded.mesh,
                progress=progress,
            )
        yield path, result
        if teacher is not None:
            with _progress_bar(f"exposure bias on {name}") as progress:
                bias = _measure_exposure_bias(models, prompts, protocol, progress)
            yield path, dataclasses.replace(result, exposure_bias=bias)


def _measure_exposure_bias(
    models: list[tuple[LoadedModel, Params]],
    prompts: list["Prompt"],
    protocol: "EvaluationConfig",
    progress: Callable[[int, int], None],
) -> float:
    """ExAccErr in percent of the first model with the second as its teacher."""
    import jax

    from mgsr_jax.decoding.sampling import ANCESTRAL
    from mgsr_jax.evaluation.exposure_bias import exposure_bias
    from mgsr_jax.evaluation.responses import scored_prompts

    protocol = dataclasses.replace(protocol, sampling=ANCESTRAL, no_repeat_ngram=0)
    scored = scored_prompts(prompts, protocol)
    vocab_size = len(models[0][0].tokenizer)
    batches = -(-len(scored) // protocol.batch_size)
    total, done = len(models) * len(protocol.seeds) * batches, itertools.count(1)

    def samples(loaded: LoadedModel, params: Params) -> Iterator["Rows"]:
        for rows in _samples(loaded, params, scored, protocol, vocab_size):
            yield rows
            progress(next(done), total)

    (student, student_params), (teacher, teacher_params) = models
    mesh = student.mesh
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return exposure_bias(
            student.model,
            student_params,
            teacher.model,
            teacher_params,
            samples(student, student_params),
            samples(teacher, teacher_params),
            vocab_size=vocab_size,
        )


def _samples(
    loaded: LoadedModel,
    params: Params,
    prompts: list["Prompt"],
    protocol: "EvaluationConfig",
    vocab_size: int,
) -> Iterator["Rows"]:
    """The model's samples of all prompts, batch by batch, once per seed."""
    from mgsr_jax.evaluation.responses import sample_responses

    decoding = protocol.decoding(loaded.eos_ids(), vocab_size)
    for seed in protocol.seeds:
        yield from sample_responses(
            loaded.model,
            params,
            prompts,
            protocol,
            decoding=decoding,
            seed=seed,
            mesh=loaded.mesh,
        )


@contextlib.contextmanager
def _progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar as a function of (done, total)."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)
