"""Observed normal rows as matrix products: many rows, few parameters.

Where the parameters of observed normal rows do not change from row to row, or only with a finite site that takes all of its
values at once, the log-probability of a row is linear in statistics of it that never change,

    log N(x_n | m, Σ) = ⟨η(m, Σ), T(x_n)⟩ + c(m, Σ),    T(x) = (x, x xᵀ),    η = (P m, −½ P),  P = Σ⁻¹.

A table of components by rows is then one product of matrices, its sum over rows one of Σ_n T(x_n) that is computed once, and
so are the gradients of both; the differences x_n − m of each row and component are never formed.

Where such a table is at once summed out over the components, it is not formed either: the rows are taken in chunks that
stay in the cache (``log_sum``), and what is left of them are the sum and its gradient in η, the expected statistics.

The terms of that product can be much larger than what they add up to, for a component that is narrow beside the spread of
the rows. Rows are centred and scaled, and a component whose rounding would show is NaN here: whoever evaluates a density
computes it row by row then (``inference.staging.Staged``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["FEWEST", "Known", "Rows", "Statistics", "gaussian", "is_rewritten", "log_sum", "rewritten", "weighted"]

FEWEST = 200  # rows; fewer are evaluated one by one, which costs no more
_WIDEST = 2**27  # numbers in a table of statistics
_LEAST_TABLE = 2**15  # entries of a table; smaller ones are formed
_CHUNK, _LEAST_CHUNK = 3 * 2**19, 512  # bytes of rows and their table that stay in a cache, and the least rows at once
_CHUNK_ON_GPU = 2**26
_ROWS = 2**13  # whose statistics are made at once
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


def is_rewritten() -> bool:
    """Whether sums over rows are rewritten here."""
    return _is_rewritten.get()


class Rows(NamedTuple):
    """Log-probabilities of rows under several components, not multiplied out.

    Attributes:
        statistics: T(x), (row, statistic), of rows that are centred and scaled; (row, 0) if all rows have the same.
        natural: η, (*component, statistic).
        constant: c, (*component).
        axis: Which dimension of the table the rows have, counted from the right, negative.
        shared: How many of the last statistics have one η for all components, such as x xᵀ where these share Σ.
    """

    statistics: Tensor
    natural: Tensor
    constant: Tensor
    axis: int
    shared: int = 0

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

    @property
    def is_product(self) -> bool:
        """Whether rows differ."""
        return self.statistics.shape[-1] > 0

    @property
    def is_large(self) -> bool:
        """Whether the table is better not formed."""
        return self.is_product and self.statistics.shape[0] * self.constant.numel() >= _LEAST_TABLE

    def total(self, weights: Tensor | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Sum of the table, weighted by a table of the same shape, or by what such a table gives for η and c."""
        if weights is None:
            count = self.statistics.shape[0]
            return (self.natural @ self.statistics.sum(0)).sum() + count * self.constant.sum()
        if not isinstance(weights, Tensor):
            return (weights[0] * self.natural).sum() + weighted(weights[1], self.constant)
        weights = weights.movedim(self.axis, -1)
        return ((weights @ self.statistics) * self.natural).sum() + weighted(weights.sum(-1), self.constant)

    def scaled(self, scale: float) -> Rows:
        """Of a log-density times ``scale``."""
        return self if scale == 1.0 else self._replace(natural=scale * self.natural, constant=scale * self.constant)


def weighted(weights: Tensor, table: Tensor) -> Tensor:
    """Sum of a table with weights; what has no weight may be infinite."""
    return torch.where(weights > 0, weights * torch.where(weights > 0, table, 0.0), 0.0).sum()


class Statistics(NamedTuple):
    """Statistics T(x) of rows, (row, statistic), the largest of each, and how rows were centred and scaled, (column,)."""

    table: Tensor
    largest: Tensor
    centre: Tensor
    unit: Tensor

    @classmethod
    def of(cls, x: Tensor, is_full: bool) -> Statistics:
        """Of rows (row, column), with products of columns or with squares only."""
        centre, unit = cls._frame(x)
        table = _monomials((x - centre) / unit, is_full)
        return cls(table, table.abs().amax(0), centre, unit)

    @classmethod
    def of_data(cls, x: Tensor, is_full: bool) -> Statistics:
        """The same of rows that are no part of a computation, in no more memory than the table's."""
        centre, unit = cls._frame(x)
        width = x.shape[-1]
        table = x.new_empty(len(x), width + (width * (width + 1) // 2 if is_full else width))
        for part, rows in zip(table.split(_ROWS), x.split(_ROWS), strict=True):
            part.copy_(_monomials((rows - centre) / unit, is_full))
        return cls(table, torch.maximum(table.amax(0), -table.amin(0)), centre, unit)

    @staticmethod
    def _frame(x: Tensor) -> tuple[Tensor, Tensor]:
        centre, unit = x.mean(0), x.std(0, correction=0)
        return centre, torch.where(unit > 0, unit, torch.ones_like(unit))


def _monomials(u: Tensor, is_full: bool) -> Tensor:
    """Columns (row, D), and their products or squares, side by side."""
    if not is_full:
        return torch.cat([u, u.square()], -1)
    return torch.cat([u, *(u[:, i : i + 1] * u[:, : i + 1] for i in range(u.shape[-1]))], -1)  # as tril_indices are ordered


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Outside of every transform, recording and handler of tensors: what is made inside of one is good in there only."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


class Known:
    """Remembers the statistics of data that do not change.

    Args:
        data: The data.
    """

    def __init__(self, data: Sequence[Tensor] = ()) -> None:
        self._data = data
        self._found: dict[tuple[int, bool], Statistics] = {}

    def statistics(self, value: Tensor, x: Tensor, is_full: bool) -> Statistics:
        """Of rows ``x``, which are ``value`` in another shape."""
        if not any(value is leaf for leaf in self._data):
            return Statistics.of(x, is_full)
        key = id(value), is_full
        if key not in self._found:
            with _apart():
                self._found[key] = Statistics.of_data(value.reshape(x.shape), is_full)
        return self._found[key]


def gaussian(node: Mapping[str, Any], origin: Callable[[Tensor], Tensor], known: Known | None = None) -> Rows | None:
    """The rows of an observed normal statement of a trace; None if it is none, has few rows, or parameters of each row.

    Args:
        node: The statement.
        origin: What a parameter was before plates expanded it.
        known: Statistics from earlier traces.
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
    location, spread = torch.atleast_1d(location, spread)  # one number for all columns
    *batch, width = value.shape
    axes = [i - len(batch) for i, size in enumerate(batch) if size > 1]
    if len(axes) != 1 or batch[axes[0]] < FEWEST or value.dtype not in _ROUNDING:
        return None
    (axis,) = axes
    if batch[axis] * width * (width + 3 if is_full else 4) > 2 * _WIDEST:
        return None
    if not _is_shared(location, axis, 1) or not _is_shared(spread, axis, 1 + is_full):
        return None
    location, spread = _without(location, axis - 1), _without(spread, axis - 1 - is_full)
    found = (known or Known()).statistics(value, value.reshape(batch[axis], width), is_full)
    unit, m = found.unit, (location - found.centre) / found.unit
    own = 2 if is_full else 1
    is_shared = spread.shape[:-own].numel() == 1 < location.shape[:-1].numel()
    if is_full:
        natural, constant = _full(m, spread / unit.unsqueeze(-1))
    else:
        natural, constant = _diagonal(m, spread / unit)
    constant = constant - unit.log().sum() - 0.5 * width * math.log(2.0 * math.pi)
    error = torch.finfo(value.dtype).eps * (natural.abs() @ found.largest + constant.abs())
    constant = torch.where(error <= _ROUNDING[value.dtype], constant, torch.nan)
    short = -axis - 1 - constant.dim()  # dimensions right of the rows
    if short > 0:
        natural, constant = natural.reshape(*(1,) * short, *natural.shape), constant.reshape(*(1,) * short, *constant.shape)
    shared = natural.shape[-1] - width if is_shared else 0
    return Rows(found.table, natural, constant, axis, shared).scaled(float(node["scale"]))


def _is_shared(parameter: Tensor, axis: int, events: int) -> bool:
    """Whether a parameter is the same along a batch dimension, counted from the right."""
    return parameter.dim() < events - axis or parameter.shape[axis - events] == 1


def _without(parameter: Tensor, dim: int) -> Tensor:
    """A parameter without a dimension of size 1, if it has it."""
    return parameter.squeeze(dim) if parameter.dim() >= -dim else parameter


def _full(m: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """η and c of means (*component, D) and Cholesky factors (*component, D, D)."""
    i, j = torch.tril_indices(m.shape[-1], m.shape[-1], device=m.device)
    is_singular = (factor.diagonal(dim1=-2, dim2=-1) == 0).any(-1)[..., None, None]
    factor = torch.where(is_singular, torch.nan, factor)  # no density; torch would raise
    precision = torch.cholesky_inverse(factor)
    linear = (precision @ m.unsqueeze(-1)).squeeze(-1)
    square = torch.where(i == j, -0.5, -1.0).to(m.dtype) * precision[..., i, j]
    square = square.expand(*linear.shape[:-1], -1)
    constant = -0.5 * (linear * m).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.cat([linear, square], -1), constant


def _diagonal(m: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor]:
    """η and c of means and standard deviations (*component, D)."""
    m, deviation = torch.broadcast_tensors(m, deviation)
    precision = deviation.square().reciprocal()
    constant = -0.5 * (precision * m.square()).sum(-1) - deviation.log().sum(-1)
    return torch.cat([precision * m, -0.5 * precision], -1), constant


def log_sum(statistics: Tensor, natural: Tensor, constant: Tensor, maximise: bool = False) -> Tensor:
    """Σ_n log Σ_k exp(⟨η_k, T_n⟩ + c_k), or with the maximum over k in place of the inner sum; a scalar.

    Args:
        statistics: T, (row, statistic).
        natural: η, (component, statistic).
        constant: c, (component,).
        maximise: Whether to take the maximum.
    """
    total: Tensor = _LogSum.apply(statistics, natural, constant, maximise)[0]
    return total


def _log_sum(statistics: Tensor, natural: Tensor, constant: Tensor, maximise: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``log_sum`` (*), and its gradients in η (*, component, statistic) and c (*, component); chunk by chunk."""
    shape, width = constant.shape, statistics.shape[-1]
    components, lead = shape[-1], shape[:-1].numel()
    eta, c = natural.reshape(-1, width), constant.reshape(-1, 1)
    negligible = 0.7 * math.log(torch.finfo(statistics.dtype).tiny)  # an exponential that underflows takes ten times as long
    total = statistics.new_zeros(lead, dtype=torch.float64)
    moments = statistics.new_zeros(lead * components, width, dtype=torch.float64)
    counts = statistics.new_zeros(lead * components, dtype=torch.float64)
    size = (len(eta) + width) * statistics.element_size()
    rows = max(_LEAST_CHUNK, (_CHUNK_ON_GPU if statistics.is_cuda else _CHUNK) // max(size, 1))
    for t in statistics.split(rows):
        table = torch.addmm(c, eta, t.mT).view(lead, components, -1)
        top = table.amax(1, keepdim=True)
        if maximise:
            weights = (table == top).to(t.dtype)
            weights = weights.div_(weights.sum(1, keepdim=True))
            total += top.sum((1, 2), dtype=torch.float64)
        else:
            weights = table.sub_(torch.where(top.isfinite(), top, 0.0)).clamp_(min=negligible).exp_()
            sums = weights.sum(1, keepdim=True)
            weights.div_(sums)
            total += sums.log_().add_(top).sum((1, 2), dtype=torch.float64)
        flat = weights.view(lead * components, -1)
        moments += flat @ t
        counts += flat.sum(1)
    is_gone = c == -math.inf
    moments, counts = moments.masked_fill_(is_gone, 0.0), counts.masked_fill_(is_gone.squeeze(-1), 0.0)
    parts = total.reshape(shape[:-1]), moments.reshape(*shape, width), counts.reshape(shape)
    return parts[0].to(t.dtype), parts[1].to(t.dtype), parts[2].to(t.dtype)


_library = torch.library.Library("inference", "DEF")  # one operation, so that a graph of it is one node
_library.define("log_sum(Tensor statistics, Tensor natural, Tensor constant, bool maximise) -> (Tensor, Tensor, Tensor)")
_library.impl("log_sum", _log_sum, "CompositeExplicitAutograd")


@torch.library.register_fake("inference::log_sum", lib=_library)
def _(statistics: Tensor, natural: Tensor, constant: Tensor, maximise: bool) -> tuple[Tensor, Tensor, Tensor]:
    shape = constant.shape
    return constant.new_empty(shape[:-1]), constant.new_empty(*shape, statistics.shape[-1]), constant.new_empty(shape)


def _weights(statistics: Tensor, natural: Tensor, constant: Tensor, maximise: bool) -> Tensor:
    """Derivative of ``log_sum`` in every entry of the table, (component, row)."""
    table = natural @ statistics.mT + constant.unsqueeze(-1)
    if not maximise:
        return table.softmax(-2)
    is_top = (table == table.amax(-2, keepdim=True)).to(table.dtype)
    return is_top / is_top.sum(-2, keepdim=True)


class _LogSum(torch.autograd.Function):
    """``log_sum`` and its gradients in one pass."""

    @staticmethod
    def forward(statistics: Tensor, natural: Tensor, constant: Tensor, maximise: bool) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.inference.log_sum(statistics, natural, constant, maximise)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        statistics, natural, constant, ctx.maximise = inputs
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(statistics, natural, constant, output[1], output[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        statistics, natural, constant, moments, counts = ctx.saved_tensors
        for_statistics = None
        if ctx.needs_input_grad[0]:
            for_statistics = gradient * _weights(statistics, natural, constant, ctx.maximise).mT @ natural
        if ctx.maximise:
            return for_statistics, gradient * moments, gradient * counts, None
        moments, counts = _Moments.apply(moments, counts, statistics, natural, constant)
        return for_statistics, gradient * moments, gradient * counts, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, statistics: Tensor, natural: Tensor, constant: Tensor, maximise: bool) -> Any:
        size = info.batch_size
        natural = natural.movedim(in_dims[1], 0) if in_dims[1] is not None else natural.expand(size, *natural.shape)
        constant = constant.movedim(in_dims[2], 0) if in_dims[2] is not None else constant.expand(size, *constant.shape)
        if in_dims[0] is None:
            return _LogSum.apply(statistics, natural, constant, maximise), (0, 0, 0)
        parts = [
            _LogSum.apply(*part, maximise) for part in zip(statistics.movedim(in_dims[0], 0), natural, constant, strict=True)
        ]
        return tuple(torch.stack(part) for part in zip(*parts, strict=True)), (0, 0, 0)


class _Moments(torch.autograd.Function):
    """The gradients of ``log_sum``, which are known, with their own derivatives in η and c."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        moments: Tensor, counts: Tensor, statistics: Tensor, natural: Tensor, constant: Tensor
    ) -> tuple[Tensor, Tensor]:
        return moments.clone(), counts.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, for_moments: Tensor, for_counts: Tensor) -> tuple[Tensor | None, ...]:
        statistics, natural, constant = ctx.saved_tensors
        weights = _weights(statistics, natural, constant, False)
        slope = for_moments @ statistics.mT + for_counts.unsqueeze(-1)
        slope = weights * (slope - (weights * slope).sum(-2, keepdim=True))
        return None, None, None, slope @ statistics, slope.sum(-1)
