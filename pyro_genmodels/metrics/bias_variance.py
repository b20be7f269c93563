"""How wrong an estimator is on average, and how much it depends on the data that it happened to get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BiasVariance", "bias_variance"]


class BiasVariance(NamedTuple):
    """The parts of the mean squared error of predictions, and what they were estimated from.

    Attributes:
        bias_squared: (E f̂ − f)² at each row, estimated without bias, so that it may be below zero by chance, (rows,).
        variance: Var f̂ at each row, (rows,).
        predictions: (repeat, rows).
    """

    bias_squared: np.ndarray
    variance: np.ndarray
    predictions: np.ndarray

    @property
    def error(self) -> np.ndarray:
        """Mean squared distance from the truth at each row, the sum of both parts, (rows,)."""
        return np.asarray(self.bias_squared + self.variance)


def bias_variance(predict: Callable[[Any], Any], draw: Callable[[int], Any], truth: Any, repeats: int = 100) -> BiasVariance:
    """Bias and variance of an estimator over data sets drawn anew.

        E (f̂(x) − f(x))² = (E f̂(x) − f(x))² + Var f̂(x)

    Args:
        predict: What the estimator predicts at the rows of interest after a fit to a data set, (rows,).
        draw: Makes the data set of a repeat from its number.
        truth: f at those rows, without noise, (rows,).
        repeats: Number of data sets, at least 2.

    Returns:
        The parts; averaged over rows they are those of the whole error.

    References:
        S. Geman, E. Bienenstock and R. Doursat, Neural networks and the bias/variance dilemma (1992).

    Example:
        >>> parts = bias_variance(np.mean, lambda i: np.random.default_rng(i).normal(3.0, size=10), [3.0], 1000)
        >>> round(float(parts.variance[0]), 1)
        0.1
    """
    if repeats < 2:
        raise ValueError(f"repeats is {repeats}, but a variance needs at least 2.")
    exact = np.asarray(truth, float)
    found = np.stack([np.asarray(predict(draw(number)), float).reshape(exact.shape) for number in range(repeats)])
    variance = found.var(0, ddof=1)
    return BiasVariance((found.mean(0) - exact) ** 2 - variance / repeats, variance, found)
