"""Fit and traffic of a run on a machine that is not attached."""
