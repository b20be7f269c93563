"""Metrics: how good a fitted model is, by measures that do not ask which back-end fitted it."""

from pyro_genmodels.metrics import topics

__all__ = ["topics"]
