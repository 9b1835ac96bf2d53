"""Settings of evaluations during training, and of the best checkpoint."""

import dataclasses
from collections.abc import Sequence

from mgsr_jax import settings
from mgsr_jax.data.source_settings import check_columns
from mgsr_jax.evaluation.text_metrics import MetricName


@dataclasses.dataclass(frozen=True)
class PeriodicEvaluation:
    """Prompts that the student answers greedily while it trains, and is scored on.

    Attributes:
      data: evaluation set, given as in `mgsr evaluate`; default: data.valid.
      split: split of a folder or a hub data set.
      columns: names of columns of `data`, as in data.columns.
      metrics: scores of a response, as in `mgsr evaluate`.
      limit: number of prompts; the first of the set are taken.
      max_length: longest prompt and response in tokens; default: data.max_length.
      batch_size: prompts decoded at a time, over all hosts; default: the rows of a
        micro-batch.
    """

    data: str | None = None
    split: str = "test"
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: tuple[MetricName, ...] = ("rouge_l",)
    limit: int = 64
    max_length: int | None = None
    batch_size: int | None = None

    def check(self) -> None:
        """Refuse values that do not work.

        Raises:
          ValueError: names the field, its value and the values that are allowed.
        """
        names = ("limit", "max_length", "batch_size")
        settings.check_positive(self, *names, section="evaluate.")
        check_columns(self.columns)


SCORES = ("distinct_1", "distinct_2", "distinct_4", "length", "stopped", "loss")
"""Scores of an evaluation in addition to its metrics."""


def check_best_metric(
    metric: str | None,
    *,
    validated: Sequence[str],
    validate_every: int,
    evaluated: Sequence[MetricName],
    evaluate_every: int,
) -> None:
    """Refuse a metric that is not measured while the run trains.

    Args:
      metric: the metric of the best checkpoint; None: there is none.
      validated: names of the losses that a validation measures.
      validate_every: steps between validations; 0: there are none.
      evaluated: metrics of an evaluation.
      evaluate_every: steps between evaluations; 0: there are none.

    Raises:
      ValueError: the metric, and the setting that is missing.
    """
    if metric is None:
        return
    every = {"valid/": validate_every, "eval/": evaluate_every}
    setting = {"valid/": "validate_every", "eval/": "evaluate_every"}
    names = {"valid/": validated, "eval/": (*evaluated, *SCORES)}
    prefix = metric[: metric.find("/") + 1]
    if metric.removeprefix(prefix) not in names.get(prefix, ()):
        known = [prefix + name for prefix in names for name in names[prefix]]
        raise ValueError(
            f"best_metric={metric!r} is not measured; expected one of "
            f"{', '.join(known)}"
        )
    if not every[prefix]:
        raise ValueError(
            f"best_metric={metric!r} is not measured while the run trains; set "
            f"{setting[prefix]}"
        )
