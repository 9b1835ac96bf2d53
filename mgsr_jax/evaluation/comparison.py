"""Comparison with another model's responses: paired differences on the same prompts."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mgsr_jax.evaluation.estimates import Estimate, mean_estimate
from mgsr_jax.evaluation.scores import (
    Difference,
    EvaluationResult,
    ScoredResponse,
    prompt_means,
)

SCORES_FILE = "scores.json"


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Another model's responses to one set, read from the files of `mgsr evaluate`.

    Attributes:
      folder: the folder of these files.
      sampled: responses of the seeds, draw by draw; empty without seeds.
      greedy: the greedy responses, one a prompt.
    """

    folder: str
    sampled: tuple[ScoredResponse, ...]
    greedy: tuple[ScoredResponse, ...]

    def check(self, asked: Sequence[tuple[str, Sequence[str]]]) -> None:
        """Refuse a baseline that did not respond to the same prompts.

        Args:
          asked: each prompt as the model reads it, and its references.

        Raises:
          ValueError: the first prompt that differs.
        """
        if len(asked) != len(self.greedy):
            raise ValueError(
                f"against {self.folder}: it has {len(self.greedy)} prompts, got "
                f"{len(asked)}; evaluate both models on the same prompts"
            )
        for (prompt, references), theirs in zip(asked, self.greedy, strict=True):
            if (prompt, tuple(references)) != (theirs.prompt, theirs.references):
                raise ValueError(
                    f"against {self.folder}: the prompt or the references of "
                    f"{theirs.source} differ: it has {theirs.prompt[-80:]!r}, got "
                    f"{prompt[-80:]!r}; evaluate both models with the same data and "
                    "template"
                )

    def check_metrics(self, names: Sequence[str]) -> None:
        """Refuse metrics that the baseline was not scored with.

        Raises:
          ValueError: names the metrics.
        """
        known = self.greedy[0].scores
        if missing := [name for name in names if name not in known]:
            raise ValueError(
                f"against {self.folder}: it has no scores of {missing}, only of "
                f"{list(known)}; evaluate it with the same metrics"
            )

    def difference(self, result: EvaluationResult) -> Difference:
        """Scores of `result`, on the same prompts, minus those of the baseline."""
        count = result.examples
        ours = result.responses[:-count], result.responses[-count:]
        both = bool(ours[0] and self.sampled)
        return Difference(
            against=self.folder,
            sampled=_differences(ours[0], self.sampled, count) if both else None,
            greedy=_differences(ours[1], self.greedy, count),
        )


def _differences(
    ours: Sequence[ScoredResponse], theirs: Sequence[ScoredResponse], prompts: int
) -> dict[str, Estimate]:
    other = prompt_means(theirs, prompts)
    return {
        name: mean_estimate(values - other[name], least=-100.0)
        for name, values in prompt_means(ours, prompts).items()
    }


def read_baseline(folder: str | Path, path: str) -> Baseline:
    """Read the responses to the set `path` from the output folder of `mgsr evaluate`.

    Raises:
      FileNotFoundError: the folder or one of its files is missing.
      ValueError: the folder has no scores of this set, or was not written by this
        version of `mgsr evaluate`.
    """
    folder = Path(folder)
    file = folder / SCORES_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"against {folder}: there is no {SCORES_FILE}; give the output folder of "
            "mgsr evaluate"
        )
    sets = json.loads(file.read_text(encoding="utf-8"))
    if path not in sets:
        raise ValueError(
            f"against {folder}: it has no scores of {path}, only of {list(sets)}; "
            "evaluate both models on the same sets"
        )
    try:
        with (folder / sets[path]["responses"]).open(encoding="utf-8") as lines:
            responses = [_response(json.loads(line)) for line in lines]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"against {folder}: its files are not those of this version of mgsr "
            f"evaluate ({error}); evaluate that model again"
        ) from error
    return Baseline(
        str(folder),
        tuple(r for r in responses if r.seed is not None),
        tuple(r for r in responses if r.seed is None),
    )


def _response(record: Mapping) -> ScoredResponse:
    return ScoredResponse(**{**record, "references": tuple(record["references"])})
