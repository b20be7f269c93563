"""Observed normal rows as matrix products: many rows, few parameters.

Where the parameters of observed normal rows do not change from row to row, or only with a finite site that takes all of its
values at once, the log-probability of a row is linear in statistics of it that never change,

    log N(x_n | m, Σ) = ⟨η(m, Σ), T(x_n)⟩ + c(m, Σ),    T(x) = (x, x xᵀ),    η = (P m, −½ P),  P = Σ⁻¹.

A table of components by rows is then one product of matrices, its sum over rows one of Σ_n T(x_n) that is computed once, and
so are the gradients of both; the differences x_n − m of each row and component are never formed.

The terms of that product can be much larger than what they add up to, for a component that is narrow beside the spread of
the rows. Rows are centred and scaled, and a component whose rounding would show is NaN here: whoever evaluates a density
computes it row by row then (``inference.density.Staged``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Rows", "gaussian", "rewritten"]

_FEWEST = 200  # rows; fewer are evaluated one by one, which costs no more
_WIDEST = 2**27  # numbers in a table of statistics
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-2}  # bound on the error of the log-probability of one row

_is_rewritten: ContextVar[bool] = ContextVar("is_rewritten", default=False)


@contextlib.contextmanager
def rewritten(is_on: bool = True) -> Iterator[None]:
    """Whether normal rows are matrix products inside."""
    token = _is_rewritten.set(is_on)
    try:
        yield
    finally:
        _is_rewritten.reset(token)


class Rows(NamedTuple):
    """Log-probabilities of rows under several components, not multiplied out.

    Attributes:
        statistics: T(x), (row, statistic), of rows that are centred and scaled.
        natural: η, (*component, statistic).
        constant: c, (*component).
        axis: Which dimension of the table the rows have, counted from the right, negative.
    """

    statistics: Tensor
    natural: Tensor
    constant: Tensor
    axis: int

    @property
    def shape(self) -> torch.Size:
        """Of the table."""
        shape = [*self.constant.shape]
        shape.insert(len(shape) + 1 + self.axis, self.statistics.shape[0])
        return torch.Size(shape)

    @property
    def table(self) -> Tensor:
        """Log-probability of every row, (*component) with the rows at ``axis``."""
        return (self.natural @ self.statistics.T + self.constant.unsqueeze(-1)).movedim(-1, self.axis)

    def total(self, weights: Tensor | None = None) -> Tensor:
        """Sum of the table, weighted by a table of the same shape."""
        if weights is None:
            count = self.statistics.shape[0]
            return (self.natural @ self.statistics.sum(0)).sum() + count * self.constant.sum()
        weights = weights.movedim(self.axis, -1)
        return ((weights @ self.statistics) * self.natural).sum() + (weights.sum(-1) * self.constant).sum()

    def scaled(self, scale: float) -> Rows:
        return self if scale == 1.0 else self._replace(natural=scale * self.natural, constant=scale * self.constant)


def gaussian(node: Mapping[str, Any], origin: Callable[[Tensor], Tensor]) -> Rows | None:
    """The rows of an observed normal statement of a trace; None if it is none, has few rows, or parameters of each row.

    Args:
        node: The statement.
        origin: What a parameter was before plates expanded it.
    """
    if not _is_rewritten.get() or not node["is_observed"] or node["args"] or node["kwargs"]:
        return None
    if node["mask"] is not None or not isinstance(node["scale"], (int, float)):
        return None
    fn, value, events = node["fn"], node["value"], 0
    if isinstance(fn, dist.Independent):
        fn, events = fn.base_dist, fn.reinterpreted_batch_ndims
    is_full = type(fn) is dist.MultivariateNormal
    if not (is_full and not events) and not (type(fn) is dist.Normal and events < 2):
        return None
    location, spread = origin(fn.loc), origin(fn._unbroadcasted_scale_tril if is_full else fn.scale)
    if not is_full and not events:  # rows of one number each
        value, location, spread = value.unsqueeze(-1), location.unsqueeze(-1), spread.unsqueeze(-1)
    elif not location.dim() or not spread.dim():
        return None
    *batch, width = value.shape
    axes = [i - len(batch) for i, size in enumerate(batch) if size > 1]
    if len(axes) != 1 or batch[axes[0]] < _FEWEST or value.dtype not in _ROUNDING:
        return None
    (axis,) = axes
    if batch[axis] * width * (width + 3 if is_full else 4) > 2 * _WIDEST:
        return None
    if not _is_shared(location, axis, 1) or not _is_shared(spread, axis, 1 + is_full):
        return None
    location, spread = _without(location, axis - 1), _without(spread, axis - 1 - is_full)
    x = value.reshape(batch[axis], width)
    centre, unit = x.mean(0), x.std(0, correction=0)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    u, m = (x - centre) / unit, (location - centre) / unit
    if is_full:
        statistics, natural, constant = _full(u, m, spread / unit.unsqueeze(-1))
    else:
        statistics, natural, constant = _diagonal(u, m, spread / unit)
    constant = constant - unit.log().sum() - 0.5 * width * math.log(2.0 * math.pi)
    error = torch.finfo(x.dtype).eps * (natural.abs() @ statistics.abs().amax(0) + constant.abs())
    constant = torch.where(error <= _ROUNDING[x.dtype], constant, torch.nan)
    short = -axis - 1 - constant.dim()  # dimensions right of the rows
    if short > 0:
        natural, constant = natural.reshape(*(1,) * short, *natural.shape), constant.reshape(*(1,) * short, *constant.shape)
    return Rows(statistics, natural, constant, axis).scaled(float(node["scale"]))


def _is_shared(parameter: Tensor, axis: int, events: int) -> bool:
    """Whether a parameter is the same along a batch dimension, counted from the right."""
    return parameter.dim() < events - axis or parameter.shape[axis - events] == 1


def _without(parameter: Tensor, dim: int) -> Tensor:
    """A parameter without a dimension of size 1, if it has it."""
    return parameter.squeeze(dim) if parameter.dim() >= -dim else parameter


def _full(u: Tensor, m: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T, η and c of rows (row, D), means (*component, D) and Cholesky factors (*component, D, D)."""
    i, j = torch.tril_indices(u.shape[-1], u.shape[-1], device=u.device)
    precision = torch.cholesky_inverse(factor)
    linear = (precision @ m.unsqueeze(-1)).squeeze(-1)
    square = torch.where(i == j, -0.5, -1.0).to(u.dtype) * precision[..., i, j]
    square = square.expand(*linear.shape[:-1], -1)
    constant = -0.5 * (linear * m).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.cat([u, u[:, i] * u[:, j]], -1), torch.cat([linear, square], -1), constant


def _diagonal(u: Tensor, m: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """T, η and c of rows (row, D), means and standard deviations (*component, D)."""
    m, deviation = torch.broadcast_tensors(m, deviation)
    precision = deviation.square().reciprocal()
    constant = -0.5 * (precision * m.square()).sum(-1) - deviation.log().sum(-1)
    return torch.cat([u, u.square()], -1), torch.cat([precision * m, -0.5 * precision], -1), constant
