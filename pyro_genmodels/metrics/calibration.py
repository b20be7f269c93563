"""Whether probabilities and intervals mean what they say."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "IntervalCalibration",
    "Reliability",
    "brier_score",
    "coverage",
    "expected_calibration_error",
    "interval_calibration",
    "reliability",
]


class Reliability(NamedTuple):
    """Bins of predicted probabilities that have rows in them.

    Attributes:
        predicted: Mean prediction of each bin, (bin,).
        observed: Share of its rows for which the event came about, (bin,).
        rows: How many rows it has, (bin,).
    """

    predicted: np.ndarray
    observed: np.ndarray
    rows: np.ndarray


def _checked(happened: Any, probability: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, p = np.asarray(happened, float), np.asarray(probability, float)
    if truth.ndim != 1 or truth.shape != p.shape or not len(p):
        raise ValueError(f"happened and probability must be vectors of one length, but are {truth.shape} and {p.shape}.")
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"Probabilities must be in [0, 1], but range from {p.min():g} to {p.max():g}.")
    return truth, p


def reliability(happened: Any, probability: Any, bins: int = 10) -> Reliability:
    """The reliability curve: bins of equal width of the predicted probability, and how often the event came about.

    Args:
        happened: Whether the event came about, (rows,).
        probability: Its predicted probability, (rows,).
        bins: Number of bins.

    References:
        A. Murphy and R. Winkler, Reliability of subjective probability forecasts of precipitation and temperature (1977).
    """
    truth, p = _checked(happened, probability)
    which = np.clip(np.searchsorted(np.linspace(0.0, 1.0, bins + 1)[1:-1], p), 0, bins - 1)
    count = np.bincount(which, minlength=bins)
    sums = [np.bincount(which, part, minlength=bins)[count > 0] for part in (p, truth)]
    count = count[count > 0]
    return Reliability(sums[0] / count, sums[1] / count, count)


def expected_calibration_error(happened: Any, probability: Any, bins: int = 10) -> float:
    """Mean distance of the reliability curve from the diagonal, bins weighted by their rows.

    For a classifier: ``happened`` is whether the predicted class is right, ``probability`` that of the predicted class.

    References:
        M. Naeini, G. Cooper and M. Hauskrecht, Obtaining well calibrated probabilities using Bayesian binning (2015).
    """
    curve = reliability(happened, probability, bins)
    return float((curve.rows * np.abs(curve.predicted - curve.observed)).sum() / curve.rows.sum())


def brier_score(truth: Any, probability: Any) -> float:
    """Mean squared error of probabilities.

    Args:
        truth: Whether the event came about, (rows,); or the class of each row, 0 … K − 1.
        probability: Of the event, (rows,), or of each class, (rows, K), whose squared errors are added up.

    References:
        G. Brier, Verification of forecasts expressed in terms of probability (1950).
    """
    p = np.asarray(probability, float)
    if p.ndim == 1:
        happened, p = _checked(truth, p)
        return float(np.square(p - happened).mean())
    labels = np.asarray(truth)
    if p.ndim != 2 or labels.shape != p.shape[:1]:
        raise ValueError(f"probability has shape {p.shape}, but truth has shape {labels.shape}.")
    return float(np.square(p - (labels[:, None] == np.arange(p.shape[1]))).sum(1).mean())


def coverage(truth: Any, draws: Any, level: Any = 0.9) -> np.ndarray:
    """Share of the rows inside the central interval of their predictive draws; ``level`` of them if it is calibrated.

    Args:
        truth: Values that came about, (rows,).
        draws: Draws of them, (draw, rows).
        level: Probability, or probabilities (level,), of the interval.

    Returns:
        The share, of the shape of ``level``.
    """
    values, sample, levels = np.asarray(truth, float), np.asarray(draws, float), np.asarray(level, float)
    if sample.ndim != 2 or sample.shape[1:] != values.shape:
        raise ValueError(f"draws has shape {sample.shape}, but must be (draw, rows) with the {values.shape} of truth.")
    tail = 0.5 * (1.0 - np.atleast_1d(levels))
    low, high = np.quantile(sample, tail, axis=0), np.quantile(sample, 1.0 - tail, axis=0)
    return np.asarray(((low <= values) & (values <= high)).mean(1).reshape(levels.shape))


class IntervalCalibration(NamedTuple):
    """How often central intervals of predictive draws hold entries that were missing, and how wide they are.

    Attributes:
        level: Probabilities of the intervals, (level,).
        expected: Share of entries that they would hold if the draws were right; a little below ``level``, since the ends of
            an interval come from finitely many draws, (level,).
        coverage: Share of entries that they hold, (level,).
        se: Its standard error; the entries of a row may depend on one another, rows may not, (level,).
        width: Mean width, (level,).
        entries: How many entries were judged.
    """

    level: np.ndarray
    expected: np.ndarray
    coverage: np.ndarray
    se: np.ndarray
    width: np.ndarray
    entries: int


def interval_calibration(
    truth: Any, draws: Any, is_missing: Any = None, level: Any = (0.5, 0.8, 0.9, 0.95)
) -> IntervalCalibration:
    """Central intervals for missing entries, such as the pixels of an image, level by level.

    Of values that take few levels, such as binary pixels, an interval holds whole ties and so more than its level.

    Args:
        truth: Values that were taken away, (rows, …), at least 2 rows.
        draws: Draws of them, (draw, rows, …).
        is_missing: Which entries were taken away, of the shape of truth; None judges all.
        level: Probabilities of the intervals, each in (0, 1).

    Raises:
        ValueError: If shapes do not fit, nothing is missing, or a value that is judged is not finite.

    Example:
        >>> draws = np.random.default_rng(0).normal(size=(500, 100, 3))
        >>> interval_calibration(np.zeros((100, 3)), draws, level=[0.9]).coverage
        array([1.])
    """
    values, sample, levels = np.asarray(truth, float), np.asarray(draws, float), np.atleast_1d(np.asarray(level, float))
    missing = np.ones(values.shape, bool) if is_missing is None else np.asarray(is_missing).astype(bool)
    if values.ndim < 1 or sample.shape[1:] != values.shape or missing.shape != values.shape or len(values) < 2:
        raise ValueError(
            f"truth {values.shape} must be (rows, …) of at least 2 rows, draws {sample.shape} (draw, rows, …), and "
            f"is_missing {missing.shape} like truth."
        )
    if not ((levels > 0) & (levels < 1)).all():
        raise ValueError(f"Levels must be in (0, 1), but are {levels.tolist()}.")
    if not missing.any():
        raise ValueError("is_missing marks no entry: there is nothing to judge.")
    rows = np.nonzero(missing)[0]
    value, drawn = values[missing], sample[:, missing]
    if not (np.isfinite(value).all() and np.isfinite(drawn).all()):
        raise ValueError("Some of the values that are judged, or of their draws, are NaN or infinite.")
    tail = 0.5 * (1.0 - levels)
    low, high = np.quantile(drawn, tail, axis=0), np.quantile(drawn, 1.0 - tail, axis=0)
    is_inside = (low <= value) & (value <= high)
    share, counts = is_inside.mean(1), np.bincount(rows, minlength=len(values))
    hits = np.stack([np.bincount(rows, inside, minlength=len(values)) for inside in is_inside])
    off = np.square(hits - share[:, None] * counts).sum(1)
    se = np.sqrt(off * len(values) / (len(values) - 1)) / len(value)
    expected = levels * (len(sample) - 1) / (len(sample) + 1)
    return IntervalCalibration(levels, expected, share, se, (high - low).mean(1), len(value))
