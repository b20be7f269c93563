"""Rows far apart from one another, around which a mixture may start."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["apart"]


def apart(x: Tensor, clusters: int, row_weights: Tensor | None = None) -> Tensor:
    """Assigns rows to the nearest of K rows that k-means++ has chosen: each with probability ∝ its squared distance from
    those chosen before, the best of 2 + log K candidates at a time.

    Random numbers come from torch's global generator.

    Args:
        x: (rows, D), on a common scale; NaN entries take no part, and count as 0 in a row that is chosen.
        clusters: K.
        row_weights: How often each row counts, (rows,).

    Returns:
        The number of each row's cluster, (rows,).

    References:
        D. Arthur and S. Vassilvitskii, k-means++: the advantages of careful seeding (2007).
    """
    is_known = ~x.isnan()
    filled = torch.where(is_known, x, 0.0)
    weights = filled.new_ones(len(x)) if row_weights is None else row_weights
    known = is_known.to(x.dtype)
    share = known.sum(1).clamp(min=1.0) / x.shape[1]
    squares = filled.square().sum(1)

    def distances(rows: Tensor) -> Tensor:
        """From each of some rows, (candidate, row)."""
        centres = filled[rows]
        return ((squares - 2.0 * centres @ filled.mT + centres.square() @ known.mT) / share).clamp(min=0.0)

    def pick(mass: Tensor, count: int) -> Tensor:
        total = mass.double().cumsum(0)
        levels = total[-1] * torch.rand(count, dtype=torch.float64, device=x.device)
        return torch.searchsorted(total, levels, right=True).clamp(max=len(mass) - 1)

    nearest = distances(pick(weights, 1)).squeeze(0)
    owner = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for k in range(1, clusters):
        mass = weights * nearest
        candidates = pick(mass if float(mass.sum()) > 0 else weights, 2 + int(math.log(clusters)))
        found = distances(candidates)
        best = int((weights * found.minimum(nearest)).sum(1).argmin())
        owner = torch.where(found[best] < nearest, k, owner)
        nearest = nearest.minimum(found[best])
    return owner
