"""Evaluation of a model, and the report of a run."""
