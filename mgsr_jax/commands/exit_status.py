"""Exit status of the commands, which launchers and schedulers read."""

DONE = 0
MISTAKE = 2
"""A mistake in the settings or the input; `mgsr plan`: the run does not fit."""
STOPPED = 42
"""Stopped by a signal after a checkpoint; the run can be resumed."""
DIVERGED = 65
"""The loss is not finite."""
