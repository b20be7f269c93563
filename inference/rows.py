"""Observed normal rows as matrix products: many rows, few parameters.

Where the parameters of observed normal rows do not change from row to row, or only with a finite site that takes all of its
values at once, the log-probability of a row is linear in statistics of it that never change,

    log N(x_n | m, Σ) = ⟨η(m, Σ), T(x_n)⟩ + c(m, Σ),    T(x) = (x, x xᵀ),    η = (P m, −½ P),  P = Σ⁻¹,

with the squares of x alone where Σ is diagonal, and |x|² where all its variances are one number.

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
from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["FEWEST", "Known", "Rows", "Statistics", "gaussian", "is_rewritten", "log_sum", "rewritten", "weighted"]

FEWEST = 200  # rows; fewer are evaluated one by one, which costs no more
_KEPT = 2**20  # numbers in a table of statistics; larger ones are formed as they are needed, from what the cache holds,
_FEW = 8  # but products of columns only where as many components share the work, or so many numbers would be kept
_WIDEST = 2**27
_FORMED = 2**24  # numbers that are formed at once
_LEAST_TABLE = 2**15  # entries of a table; smaller ones are formed
_CHUNK, _LEAST_CHUNK = 3 * 2**19, 512  # bytes of rows and their table that stay in a cache, and the least rows at once
_CHUNK_ON_GPU = 2**26
_ROWS = 2**13  # whose statistics are made at once
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-2}  # bound on the error of the log-probability of one row

Kind = Literal["none", "products", "squares", "norm"]  # what comes to columns x: nothing, x xᵀ, their squares, or |x|²

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
        columns: Of rows that are centred and scaled, (row, column); (row, 0) if all rows have the same.
        natural: η, (*component, statistic).
        constant: c, (*component).
        axis: Which dimension of the table the rows have, counted from the right, negative.
        shared: How many of the last statistics have one η for all components, such as x xᵀ where these share Σ.
        kind: What T(x) has beside the columns, formed where it is needed.
    """

    columns: Tensor
    natural: Tensor
    constant: Tensor
    axis: int
    shared: int = 0
    kind: Kind = "none"

    @property
    def statistics(self) -> Tensor:
        """T(x), (row, statistic)."""
        return _monomials(self.columns, self.kind)

    @property
    def sums(self) -> Tensor:
        """Σ_n T(x_n), (statistic,)."""
        if self.kind != "products":
            return self.statistics.sum(0)
        i, j = torch.tril_indices(self.columns.shape[-1], self.columns.shape[-1], device=self.columns.device)
        return torch.cat([self.columns.sum(0), (self.columns.mT @ self.columns)[i, j]])

    @property
    def shape(self) -> torch.Size:
        """Of the table."""
        shape = [*self.constant.shape]
        shape.insert(len(shape) + 1 + self.axis, len(self.columns))
        return torch.Size(shape)

    @property
    def table(self) -> Tensor:
        """Log-probability of every row, (*component) with the rows at ``axis``."""
        parts = [self.natural @ _monomials(part, self.kind).mT for part in self.columns.split(self._at_once)]
        table = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return (table + self.constant.unsqueeze(-1)).movedim(-1, self.axis)

    @property
    def _at_once(self) -> int:
        """Rows whose statistics are formed together; all of those that need not be."""
        return max(1, len(self.columns) if self.kind == "none" else _FORMED // max(1, self.natural.shape[-1]))

    @property
    def is_product(self) -> bool:
        """Whether rows differ."""
        return self.columns.shape[-1] > 0

    @property
    def is_large(self) -> bool:
        """Whether the table is better not formed."""
        return self.is_product and len(self.columns) * self.constant.numel() >= _LEAST_TABLE

    def total(self, weights: Tensor | tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Sum of the table, weighted by a table of the same shape, or by what such a table gives for η and c."""
        if weights is None:
            return (self.natural @ self.sums).sum() + len(self.columns) * self.constant.sum()
        if not isinstance(weights, Tensor):
            return (weights[0] * self.natural).sum() + weighted(weights[1], self.constant)
        weights = weights.movedim(self.axis, -1)
        pairs = zip(weights.split(self._at_once, -1), self.columns.split(self._at_once), strict=True)
        moments = torch.stack([weight @ _monomials(part, self.kind) for weight, part in pairs]).sum(0)
        return (moments * self.natural).sum() + weighted(weights.sum(-1), self.constant)

    def scaled(self, scale: float) -> Rows:
        """Of a log-density times ``scale``."""
        return self if scale == 1.0 else self._replace(natural=scale * self.natural, constant=scale * self.constant)


def weighted(weights: Tensor, table: Tensor) -> Tensor:
    """Sum of a table with weights; what has no weight may be infinite."""
    return torch.where(weights > 0, weights * torch.where(weights > 0, table, 0.0), 0.0).sum()


class Statistics(NamedTuple):
    """Statistics T(x) of rows, (row, statistic), the largest of each, and how rows were centred and scaled, (column,).

    Large ones are not kept: the table is that of the rows then, (row, column), and ``kind`` is what is to be formed of it.
    """

    table: Tensor
    largest: Tensor
    centre: Tensor
    unit: Tensor
    kind: Kind = "none"

    @classmethod
    def of(cls, x: Tensor, kind: Kind) -> Statistics:
        """Of rows (row, column)."""
        centre, unit = cls._frame(x, kind)
        table = _monomials((x - centre) / unit, kind)
        return cls(table, table.abs().amax(0), centre, unit)

    @classmethod
    def of_data(cls, x: Tensor, kind: Kind, is_kept: bool) -> Statistics:
        """The same of rows that are no part of a computation, in no more memory than is kept."""
        centre, unit = cls._frame(x, kind)
        width = _width(x, kind)
        table = x.new_empty(width if is_kept else x.shape[-1], len(x)).mT  # by columns, as products take them
        largest = x.new_zeros(width)
        for part, rows in zip(table.split(_ROWS), x.split(_ROWS), strict=True):
            found = _monomials((rows - centre) / unit, kind)
            part.copy_(found[:, : part.shape[-1]])
            largest = torch.maximum(largest, torch.maximum(found.amax(0), -found.amin(0)))
        return cls(table, largest, centre, unit, "none" if is_kept else kind)

    @staticmethod
    def _frame(x: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
        centre, unit = x.mean(0), x.std(0, correction=0)
        if kind == "norm":  # a sphere stays one
            unit = unit.square().mean().sqrt().expand_as(unit)
        return centre, torch.where(unit > 0, unit, torch.ones_like(unit))


def _width(x: Tensor, kind: Kind) -> int:
    """Number of statistics of rows (row, column)."""
    columns = x.shape[-1]
    return columns + {"products": columns * (columns + 1) // 2, "squares": columns, "norm": 1, "none": 0}[kind]


def _monomials(u: Tensor, kind: Kind) -> Tensor:
    """Columns (row, D), and what comes to them, side by side."""
    if kind == "none":
        return u
    if kind == "norm":
        return torch.cat([u, u.square().sum(-1, keepdim=True)], -1)
    if kind == "squares":
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
        self._found: dict[tuple[int, Kind, bool], Statistics] = {}

    def statistics(self, value: Tensor, x: Tensor, kind: Kind, components: int) -> Statistics:
        """Of rows ``x``, which are ``value`` in another shape, for so many components."""
        if not any(value is leaf for leaf in self._data):
            return Statistics.of(x, kind)
        is_dear = kind == "products" and components < _FEW
        is_kept = len(x) * _width(x, kind) <= (_WIDEST if is_dear else _KEPT)
        key = id(value), kind, is_kept
        if key not in self._found:
            with _apart():
                self._found[key] = Statistics.of_data(value.reshape(x.shape), kind, is_kept)
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
    if not _is_shared(location, axis, 1) or not _is_shared(spread, axis, 1 + is_full):
        return None
    location, spread = _without(location, axis - 1), _without(spread, axis - 1 - is_full)
    kind: Kind = "products" if is_full else "norm" if spread.shape[-1] == 1 < width else "squares"
    components = torch.broadcast_shapes(location.shape[:-1], spread.shape[: spread.dim() - (2 if is_full else 1)]).numel()
    found = (known or Known()).statistics(value, value.reshape(batch[axis], width), kind, components)
    unit, m = found.unit, (location - found.centre) / found.unit
    own = 2 if is_full else 1
    is_shared = spread.shape[:-own].numel() == 1 < location.shape[:-1].numel()
    if is_full:
        natural, constant = _full(m, spread / unit.unsqueeze(-1))
    else:
        natural, constant = _diagonal(m, spread / unit)
        if kind == "norm":
            natural = natural[..., : width + 1]
    constant = constant - unit.log().sum() - 0.5 * width * math.log(2.0 * math.pi)
    error = torch.finfo(value.dtype).eps * (natural.abs() @ found.largest + constant.abs())
    constant = torch.where(error <= _ROUNDING[value.dtype], constant, torch.nan)
    short = -axis - 1 - constant.dim()  # dimensions right of the rows
    if short > 0:
        natural, constant = natural.reshape(*(1,) * short, *natural.shape), constant.reshape(*(1,) * short, *constant.shape)
    shared = natural.shape[-1] - width if is_shared else 0
    return Rows(found.table, natural, constant, axis, shared, found.kind).scaled(float(node["scale"]))


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


def log_sum(columns: Tensor, natural: Tensor, constant: Tensor, maximise: bool = False, kind: Kind = "none") -> Tensor:
    """Σ_n log Σ_k exp(⟨η_k, T_n⟩ + c_k), or with the maximum over k in place of the inner sum; a scalar.

    Args:
        columns: Of rows, (row, column).
        natural: η, (component, statistic).
        constant: c, (component,).
        maximise: Whether to take the maximum.
        kind: What T has beside the columns.
    """
    total: Tensor = _LogSum.apply(columns, natural, constant, maximise, kind)[0]
    return total


def _turned(columns: Tensor, kind: Kind) -> list[Tensor]:
    """T of some rows in one part or two, (statistic, row) each: side by side they would have to be copied."""
    u = columns.mT
    if kind == "none":
        return [u]
    if kind == "squares":
        return [u, u.square()]
    if kind == "norm":
        return [u, u.square().sum(0, keepdim=True)]
    products = u.new_empty(_width(columns, kind) - len(u), len(columns))
    for i, part in enumerate(products.split([*range(1, len(u) + 1)])):
        torch.mul(u[i], u[: i + 1], out=part)
    return [u, products]


def _log_sum(
    columns: Tensor, natural: Tensor, constant: Tensor, maximise: bool, kind: Kind
) -> tuple[Tensor, Tensor, Tensor]:
    """``log_sum`` (*), and its gradients in η (*, component, statistic) and c (*, component); chunk by chunk."""
    shape, width = constant.shape, natural.shape[-1]
    components, lead = shape[-1], shape[:-1].numel()
    is_gone = constant.reshape(lead, components) == -math.inf
    is_empty = is_gone.all(1)  # no component has any probability
    etas = natural.reshape(-1, width).split([columns.shape[-1], width - columns.shape[-1]], -1)
    c = constant.reshape(lead, components).masked_fill(is_empty[:, None], 0.0).view(-1, 1)
    negligible = 0.7 * math.log(torch.finfo(columns.dtype).tiny)  # an exponential that underflows takes ten times as long
    total = columns.new_zeros(lead, dtype=torch.float64)
    moments = columns.new_zeros(lead * components, width, dtype=torch.float64)
    counts = columns.new_zeros(lead * components, dtype=torch.float64)
    size = (len(c) + width) * columns.element_size()
    rows = max(_LEAST_CHUNK, (_CHUNK_ON_GPU if columns.is_cuda else _CHUNK) // max(size, 1))
    for some in columns.split(rows):
        parts = _turned(some, kind)
        table = c
        for eta, t in zip(etas, parts, strict=False):
            table = torch.addmm(table, eta, t) if table is c else table.addmm_(eta, t)
        table = table.view(lead, components, -1)
        top = table.amax(1, keepdim=True)
        weights = (table == top).to(table.dtype) if maximise else table.sub_(top).clamp_(min=negligible).exp_()
        sums = weights.sum(1, keepdim=True)
        weights *= sums.reciprocal()
        total += (top if maximise else sums.log_().add_(top)).sum((1, 2), dtype=torch.float64)
        flat = weights.view(lead * components, -1)
        moments += torch.cat([flat @ t.mT for t in parts], 1)
        counts += flat.sum(1)
    total.masked_fill_(is_empty, -math.inf)
    moments.masked_fill_(is_gone.view(-1, 1), 0.0)
    counts.masked_fill_(is_gone.view(-1), 0.0)
    found = total.reshape(shape[:-1]), moments.reshape(*shape, width), counts.reshape(shape)
    return found[0].to(natural.dtype), found[1].to(natural.dtype), found[2].to(natural.dtype)


_library = torch.library.Library("inference", "DEF")  # one operation, so that a graph of it is one node
_library.define(
    "log_sum(Tensor columns, Tensor natural, Tensor constant, bool maximise, str kind) -> (Tensor, Tensor, Tensor)"
)
_library.impl("log_sum", _log_sum, "CompositeExplicitAutograd")


@torch.library.register_fake("inference::log_sum", lib=_library)
def _(columns: Tensor, natural: Tensor, constant: Tensor, maximise: bool, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
    shape = constant.shape
    return constant.new_empty(shape[:-1]), constant.new_empty(*shape, natural.shape[-1]), constant.new_empty(shape)


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
    def forward(
        columns: Tensor, natural: Tensor, constant: Tensor, maximise: bool, kind: Kind
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.inference.log_sum(columns, natural, constant, maximise, kind)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        columns, natural, constant, ctx.maximise, ctx.kind = inputs
        ctx.mark_non_differentiable(output[1], output[2])
        ctx.save_for_backward(columns, natural, constant, output[1], output[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        columns, natural, constant, moments, counts = ctx.saved_tensors
        for_columns = None
        if ctx.needs_input_grad[0]:  # these are all that T has: what is formed of columns is formed of data
            for_columns = gradient * _weights(columns, natural, constant, ctx.maximise).mT @ natural
        if ctx.maximise:
            return for_columns, gradient * moments, gradient * counts, None, None
        moments, counts = _Moments.apply(moments, counts, columns, natural, constant, ctx.kind)
        return for_columns, gradient * moments, gradient * counts, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, columns: Tensor, natural: Tensor, constant: Tensor, maximise: bool, kind: Kind) -> Any:
        size = info.batch_size
        natural = natural.movedim(in_dims[1], 0) if in_dims[1] is not None else natural.expand(size, *natural.shape)
        constant = constant.movedim(in_dims[2], 0) if in_dims[2] is not None else constant.expand(size, *constant.shape)
        if in_dims[0] is None:
            return _LogSum.apply(columns, natural, constant, maximise, kind), (0, 0, 0)
        each = zip(columns.movedim(in_dims[0], 0), natural, constant, strict=True)
        parts = [_LogSum.apply(*part, maximise, kind) for part in each]
        return tuple(torch.stack(part) for part in zip(*parts, strict=True)), (0, 0, 0)


class _Moments(torch.autograd.Function):
    """The gradients of ``log_sum``, which are known, with their own derivatives in η and c."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        moments: Tensor, counts: Tensor, columns: Tensor, natural: Tensor, constant: Tensor, kind: Kind
    ) -> tuple[Tensor, Tensor]:
        return moments.clone(), counts.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[2:5])
        ctx.kind = inputs[5]

    @staticmethod
    def backward(ctx: Any, for_moments: Tensor, for_counts: Tensor) -> tuple[Tensor | None, ...]:
        columns, natural, constant = ctx.saved_tensors
        statistics = _monomials(columns, ctx.kind)
        weights = _weights(statistics, natural, constant, False)
        slope = for_moments @ statistics.mT + for_counts.unsqueeze(-1)
        slope = weights * (slope - (weights * slope).sum(-2, keepdim=True))
        return None, None, None, slope @ statistics, slope.sum(-1), None
