"""Tables and files of `mgsr evaluate`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console

from mgsr_jax.commands.loaded import LoadedModel

if TYPE_CHECKING:
    from mgsr_jax.evaluation.scores import EvaluationResult


def print_tables(results: Mapping[str, "EvaluationResult"]) -> None:
    """Print the tables of all sets.

    Args:
      results: path of a set -> its result.
    """
    from mgsr_jax.evaluation.tables import difference_table, score_table, text_table

    console = Console()
    console.print(score_table(results))
    differences = {path: d for path, r in results.items() if (d := r.difference)}
    if differences:
        console.print(difference_table(differences))
    console.print(text_table(results))


def write_evaluation(
    folder: Path,
    settings: Mapping[str, Any],
    models: Mapping[str, LoadedModel | None],
    results: Mapping[str, "EvaluationResult"],
) -> None:
    """Write the scores, the responses and the settings of an evaluation.

    Args:
      folder: created if it is missing.
      settings: all settings.
      models: setting -> model; one of the hub is written by its name and commit.
      results: path of a set -> its result.
    """
    from mgsr_jax.checkpoint.hub import portable_name
    from mgsr_jax.evaluation.tables import write_scores

    write_scores(folder, results)
    names = {
        name: model and portable_name(model.folder) for name, model in models.items()
    }
    text = yaml.safe_dump({**settings, **names}, sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
