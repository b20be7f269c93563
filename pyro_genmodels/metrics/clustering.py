"""How far two labellings of the same rows agree, whatever their labels are called."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.optimize
import scipy.special

__all__ = ["accuracy", "adjusted_rand_index", "contingency", "normalised_mutual_information"]


def contingency(truth: Any, found: Any) -> np.ndarray:
    """How many rows have each pair of labels, (labels of ``truth``, labels of ``found``).

    Args:
        truth: Labels, (rows,), of any kind.
        found: Labels, (rows,).

    Raises:
        ValueError: If they are not of the same rows, or there are none.
    """
    left, right = np.asarray(truth), np.asarray(found)
    if left.ndim != 1 or left.shape != right.shape or not len(left):
        raise ValueError(f"Labels must be two vectors of one length, but have the shapes {left.shape} and {right.shape}.")
    (rows, i), (columns, j) = np.unique(left, return_inverse=True), np.unique(right, return_inverse=True)
    table = np.zeros((len(rows), len(columns)), int)
    np.add.at(table, (i, j), 1)
    return table


def accuracy(truth: Any, found: Any) -> float:
    """Share of rows with the right label, under the best matching of labels one to one.

    References:
        H. Kuhn, The Hungarian method for the assignment problem (1955).

    Example:
        >>> accuracy([0, 0, 1, 1], ["b", "b", "a", "b"])
        0.75
    """
    table = contingency(truth, found)
    return float(table[scipy.optimize.linear_sum_assignment(-table)].sum() / table.sum())


def normalised_mutual_information(truth: Any, found: Any) -> float:
    """Mutual information of two labellings by the mean of their entropies; 1 if both have one label only.

    References:
        A. Strehl and J. Ghosh, Cluster ensembles: a knowledge reuse framework for combining multiple partitions (2002).
    """
    joint = contingency(truth, found) / len(np.asarray(truth))
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = [float(scipy.special.entr(p).sum()) for p in (rows, columns, joint)]
    mean = 0.5 * (entropies[0] + entropies[1])
    return 1.0 if mean == 0.0 else max(entropies[0] + entropies[1] - entropies[2], 0.0) / mean


def adjusted_rand_index(truth: Any, found: Any) -> float:
    """Share of pairs of rows that both labellings treat alike, so shifted and scaled that chance gives 0 and identity 1.

    References:
        L. Hubert and P. Arabie, Comparing partitions (1985).
    """
    table = contingency(truth, found).astype(float)
    together = (table * (table - 1.0)).sum()
    left, right = ((part * (part - 1.0)).sum() for part in (table.sum(1), table.sum(0)))
    pairs = table.sum() * (table.sum() - 1.0)
    expected = left * right / pairs if pairs else 0.0
    most = 0.5 * (left + right)
    return 1.0 if most == expected else float((together - expected) / (most - expected))
