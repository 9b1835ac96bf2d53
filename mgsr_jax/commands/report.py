"""`mgsr report`: the curves and a table of a run."""

from mgsr_jax.commands.exit_status import DONE


def report(run: str) -> int:
    """Write report.md and curves.png into a run's folder.

    Args:
      run: folder of a training run.
    """
    from mgsr_jax.evaluation.report import report

    print(report(run))
    return DONE
