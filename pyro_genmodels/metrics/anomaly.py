"""How well a score tells anomalies from the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats

__all__ = ["area_under_roc", "average_precision"]


def _checked(is_anomaly: Any, score: Any) -> tuple[np.ndarray, np.ndarray]:
    truth, scores = np.asarray(is_anomaly).astype(bool), np.asarray(score, float)
    if truth.ndim != 1 or truth.shape != scores.shape:
        raise ValueError(f"is_anomaly and score must be vectors of one length, but are {truth.shape} and {scores.shape}.")
    if truth.all() or not truth.any():
        raise ValueError(f"{'All' if truth.any() else 'None'} of the rows are anomalies: there is nothing to tell apart.")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of the scores are NaN.")
    return truth, scores


def area_under_roc(is_anomaly: Any, score: Any) -> float:
    """Probability that an anomaly has the higher score than another row, a tie counting half.

    Args:
        is_anomaly: Which rows are anomalies, (rows,).
        score: Higher is more anomalous, such as minus a log-density, (rows,).

    References:
        J. Hanley and B. McNeil, The meaning and use of the area under a receiver operating characteristic curve (1982).

    Example:
        >>> area_under_roc([False, False, True, True], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    truth, scores = _checked(is_anomaly, score)
    count, others = int(truth.sum()), int((~truth).sum())
    ranks = scipy.stats.rankdata(scores)
    return float((ranks[truth].sum() - 0.5 * count * (count + 1)) / (count * others))


def average_precision(is_anomaly: Any, score: Any) -> float:
    """Precision at each score, weighted by the recall that it adds: Σ_t (R_t − R_{t−1}) P_t, rows of one score together.

    Args:
        is_anomaly: Which rows are anomalies, (rows,).
        score: Higher is more anomalous, (rows,).
    """
    truth, scores = _checked(is_anomaly, score)
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)
    hits = np.cumsum(truth[order])[ends]
    return float((np.diff(hits, prepend=0) * hits / (ends + 1)).sum() / truth.sum())
