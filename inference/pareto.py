"""Shapes of the tails of importance weights, of many sets at once and from their largest members alone.

ArviZ fits one set after the other, and needs all of it; the estimator is the same (see ``inference.arviz.pareto_k``).

References:
    J. Zhang and M. Stephens, A new and efficient estimation method for the generalized Pareto distribution (2009).
    A. Vehtari et al., Pareto smoothed importance sampling (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["largest", "tail_shape"]

_FEWEST_WEIGHTS, _FEWEST_TAIL = 25, 5
_SMALLEST_SPREAD = 1e-3  # of log weights; rounding has a Pareto tail as well
_SETS = 256  # fitted at once


def largest(count: int) -> int:
    """How many of ``count`` weights, the largest, ``tail_shape`` looks at."""
    return min(count, int(_tail_length(torch.tensor([count], dtype=torch.float64))) + 1)


def _tail_length(count: Tensor) -> Tensor:
    return torch.minimum(count / 5.0, 3.0 * count.sqrt()).ceil()


def tail_shape(top: Tensor, count: Tensor) -> Tensor:
    """k-hat of sets of importance weights.

    Args:
        top: The largest log weights of each set, the largest first, (set, largest(n)) or more of them.
        count: How many weights of each set are not zero, at most n, (set,).

    Returns:
        k-hat, (set,): below 0.7 averages can be relied on; minus infinity where the largest weights are equal; infinity
        where a few weights are all that count; NaN for fewer than 25 weights that are not zero.
    """
    parts = [_fitted(a, b) for a, b in zip(top.double().split(_SETS), count.double().split(_SETS), strict=True)]
    return torch.cat(parts) if parts else top.new_empty(0, dtype=torch.float64)


def _fitted(top: Tensor, count: Tensor) -> Tensor:
    place = torch.arange(top.shape[1], device=top.device)
    length = _tail_length(count).long().clamp(max=top.shape[1] - 1)
    x = top - top[:, :1]
    last = x.gather(1, (length - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    cut = x.gather(1, length.unsqueeze(1)).clamp(min=torch.log(torch.tensor(torch.finfo(torch.float64).tiny)).item())
    is_tail = (place < length.unsqueeze(1)) & (x > cut)
    n = is_tail.sum(1)
    tail = torch.where(is_tail, x.exp() - cut.exp(), 0.0)  # the largest first
    size = n.clamp(min=1).double()
    quarter = tail.gather(1, (n - (size / 4.0 + 0.5).long().clamp(min=1)).clamp(min=0).unsqueeze(1))  # the first quartile
    points = 30 + size.sqrt().long()
    grid = torch.arange(1, int(points.max()) + 1, device=top.device)
    b = 1.0 - (points.unsqueeze(1) / (grid - 0.5)).sqrt()
    b = b / (3.0 * quarter) + 1.0 / tail[:, :1]
    shape = _mean_log(b, tail, size)
    profile = size.unsqueeze(1) * ((-b / shape).log() - shape - 1.0)
    profile = torch.where(grid <= points.unsqueeze(1), profile, -torch.inf)
    weight = profile.softmax(1)
    weight = torch.where(weight >= 10.0 * torch.finfo(torch.float64).eps, weight, 0.0)
    weight = weight / weight.sum(1, keepdim=True)
    b = torch.where(weight > 0.0, b * weight, 0.0).sum(1, keepdim=True)
    k = _mean_log(b, tail, size).squeeze(1)
    k = (size * k + 5.0) / (size + 10.0)  # a weak prior at 0.5
    k = torch.where(k.isnan() | (n < _FEWEST_TAIL), torch.inf, k)
    k = torch.where(x[:, 0] - last < _SMALLEST_SPREAD, -torch.inf, k)
    return torch.where(count < _FEWEST_WEIGHTS, torch.nan, k)


def _mean_log(b: Tensor, tail: Tensor, size: Tensor) -> Tensor:
    """Mean of log(1 − b x) over a tail, whose entries beyond ``size`` are zero, for each b (set, point)."""
    return torch.log1p(-b.unsqueeze(2) * tail.unsqueeze(1)).sum(2) / size.unsqueeze(1)
