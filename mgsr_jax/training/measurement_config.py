"""Settings of what a run measures beside its loss, and by what it is judged."""

import dataclasses

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


def check_best_metric(
    metric: str | None, *, validate_every: int, evaluate_every: int
) -> None:
    """Refuse a metric that is not measured while the run trains.

    Raises:
      ValueError: the metric, and the setting that is missing.
    """
    if metric is None:
        return
    every = {"valid/": validate_every, "eval/": evaluate_every}
    names = {"valid/": "validate_every", "eval/": "evaluate_every"}
    prefix = metric[: metric.find("/") + 1]
    if prefix not in every:
        raise ValueError(
            f"best_metric={metric!r}; expected a metric of validation or evaluation, "
            "such as valid/loss or eval/rouge_l"
        )
    if not every[prefix]:
        raise ValueError(
            f"best_metric={metric!r} is not measured while the run trains; set "
            f"{names[prefix]}"
        )
