"""Rows of which some entries have not been observed: they are NaN, and count nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from pyro_genmodels.distributions.mixtures import LatentScaleT, floating, weighted

__all__ = ["Columns", "Entries", "Filled", "PartialNormal"]

_MATRICES = 2**19  # numbers in the matrices of rows with gaps that are looked at together, at least


class Filled(NamedTuple):
    """What the known entries of rows say of all of them: x | known ~ N(mean, covariance).

    Attributes:
        mean: Known entries as they are, (…, D).
        covariance: Zero in the rows and columns of known entries, (…, D, D).
    """

    mean: Tensor
    covariance: Tensor


class PartialNormal(TorchDistribution):
    """Multivariate normal of which some entries are not observed.

    An entry that is NaN has been integrated out: the log-density is that of the others. EM fills it in.

    Args:
        loc: Mean, (*batch, D).
        scale_tril: Lower Cholesky factor of the covariance, (*batch, D, D).

    References:
        D. Rubin, Inference and missing data (1976).
        Z. Ghahramani and M. Jordan, Supervised learning from incomplete data via an EM approach (1994).
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}  # noqa: RUF012
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, loc: Tensor, scale_tril: Tensor, validate_args: bool | None = None, batch_shape: Size | None = None
    ) -> None:
        self.loc, self.scale_tril = loc, scale_tril
        shape = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2]) if batch_shape is None else batch_shape
        super().__init__(shape, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PartialNormal:
        return PartialNormal(self.loc, self.scale_tril, batch_shape=Size(batch_shape))

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    def _pieces(self, value: Tensor, weights: Tensor | None = None) -> list[tuple[Tensor, Tensor | None]]:
        """Values, and weights in the shape of their log-probabilities, few rows at a time: each takes a matrix."""
        axis = 1 - value.dim()  # of the rows, from the right, without the event
        shape = torch.broadcast_shapes(self.loc.shape[:-1], self.scale_tril.shape[:-2])
        if value.dim() < 2 or (len(shape) >= -axis and shape[axis] > 1):
            return [(value, weights)]
        width, most = self.event_shape[0], max(_MATRICES, 32 * value.numel())
        each = max(1, shape.numel() * value[:1].numel() * width)
        count = max(1, most // each)
        parts = value.split(count)
        cut = [None] * len(parts) if weights is None else weights.split(count, axis)
        return list(zip(parts, cut, strict=True))

    def _known(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which entries are known, how far they are from the mean, and a Cholesky factor of their covariance.

        Unknown entries take part as independent ones of variance 1, at their mean.
        """
        is_known = ~value.isnan()
        residual = torch.where(is_known, value - self.loc, 0.0)
        known = is_known.to(self.loc.dtype)
        covariance = self.scale_tril @ self.scale_tril.mT
        masked = covariance * (known.unsqueeze(-1) * known.unsqueeze(-2)) + torch.diag_embed(1.0 - known)
        return is_known, residual, torch.linalg.cholesky(masked)

    def log_prob(self, value: Tensor) -> Tensor:
        parts = [self._log_prob(part) for part, _ in self._pieces(value)]
        log_prob = parts[0] if len(parts) == 1 else torch.cat(parts, 1 - value.dim())
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def _log_prob(self, value: Tensor) -> Tensor:
        is_known, residual, factor = self._known(value)
        scaled = torch.linalg.solve_triangular(factor, residual.unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        count = is_known.sum(-1).to(log_det.dtype)
        return -0.5 * (scaled.square().sum(-1) + count * math.log(2.0 * math.pi)) - log_det

    def filled(self, value: Tensor) -> Filled:
        """The distribution of all entries, given those that are known."""
        is_known, residual, factor = self._known(value)
        covariance = self.scale_tril @ self.scale_tril.mT
        to_known = covariance * is_known.to(self.loc.dtype).unsqueeze(-2)
        root = torch.linalg.solve_triangular(factor, to_known.mT, upper=False)  # of what the known entries explain
        slope = torch.linalg.solve_triangular(factor.mT, root, upper=True).mT
        mean = torch.where(is_known, value, self.loc + (slope @ residual.unsqueeze(-1)).squeeze(-1))
        unknown = (~is_known).to(self.loc.dtype)
        left = (covariance - root.mT @ root) * (unknown.unsqueeze(-1) * unknown.unsqueeze(-2))
        return Filled(mean, left)

    def summary(self, value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Σ w, Σ w E(x − c) and Σ w E(x − c)(x − c)ᵀ in the shape of the parameters, and c, the mean."""
        shape = torch.broadcast_shapes(self.loc.shape[:-1], self.scale_tril.shape[:-2])
        totals = []
        for part, own in self._pieces(value, weights):
            assert own is not None
            filled = self.filled(part)
            residual = filled.mean - self.loc
            first = own.unsqueeze(-1) * residual
            second = own[..., None, None] * (filled.covariance + residual.unsqueeze(-1) * residual.unsqueeze(-2))
            sums = (own, shape), (first, shape + self.event_shape), (second, shape + self.event_shape * 2)
            totals.append([_summed(term.double(), goal) for term, goal in sums])
        count, first, second = (torch.stack(list(terms)).sum(0).to(value.dtype) for terms in zip(*totals, strict=True))
        return count, first, second, self.loc.expand(first.shape)

    def expected_log_prob(self, value: Tensor, summary: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        count, first, second, centre = summary
        shift = self.loc - centre
        moved = first.unsqueeze(-1) * shift.unsqueeze(-2)
        scatter = second - moved - moved.mT + count[..., None, None] * (shift.unsqueeze(-1) * shift.unsqueeze(-2))
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = 0.5 * self.event_shape[0] * math.log(2.0 * math.pi)
        return -0.5 * (torch.cholesky_inverse(self.scale_tril) * scatter).sum() - (count * (log_det + constant)).sum()


def _summed(table: Tensor, shape: Size) -> Tensor:
    """A table summed over what it has more of than a shape."""
    extra = table.dim() - len(shape)
    table = table.sum(tuple(range(extra))) if extra else table
    dims = tuple(i for i, (have, want) in enumerate(zip(table.shape, shape, strict=True)) if want == 1 and have > 1)
    return table.sum(dims, keepdim=True) if dims else table


class Columns(TorchDistribution):
    """Rows whose columns are independent, each of a family of its own. Entries that are NaN have not been observed.

    Args:
        parts: Pairs of the numbers of columns and a distribution of one number, with these columns for its last batch
            dimension, (*batch, columns).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, parts: Sequence[tuple[Sequence[int], Any]], batch_shape: Size | None = None) -> None:
        self.parts = tuple((tuple(columns), part) for columns, part in parts)
        shape = torch.broadcast_shapes(*(part.batch_shape[:-1] for _, part in self.parts))
        width = sum(len(columns) for columns, _ in self.parts)
        super().__init__(shape if batch_shape is None else batch_shape, Size((width,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Columns:
        return Columns(self.parts, batch_shape=Size(batch_shape))

    @property
    def _is_plain(self) -> bool:
        """Whether there is one family, whose columns are in order."""
        return len(self.parts) == 1 and self.parts[0][0] == tuple(range(self.event_shape[0]))

    def _joined(self, values: Sequence[Tensor]) -> Tensor:
        order = torch.tensor([column for columns, _ in self.parts for column in columns]).argsort()
        return torch.cat(list(values), -1)[..., order.to(values[0].device)]

    @property
    def mean(self) -> Tensor:
        shape = self.batch_shape
        return self._joined([_mean(part).expand(*shape, len(columns)) for columns, part in self.parts])

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = self.batch_shape
        drawn = [part.expand(Size((*shape, len(columns)))).sample(Size(sample_shape)) for columns, part in self.parts]
        wide = torch.get_default_dtype() if not any(value.is_floating_point() for value in drawn) else None
        like = next((value.dtype for value in drawn if value.is_floating_point()), wide)
        return self._joined([value.to(like) for value in drawn])

    def log_prob(self, value: Tensor) -> Tensor:
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for columns, part in self.parts:
            own, is_known = self._own(value, columns, part)
            total = total + torch.where(is_known, part.log_prob(own), 0.0).sum(-1)
        return total.expand(torch.broadcast_shapes(total.shape, self.batch_shape))

    def _own(self, value: Tensor, columns: tuple[int, ...], part: Any) -> tuple[Tensor, Tensor]:
        """The columns of a part, something inside the support where they are unknown; and which entries are known."""
        return _inside(value if self._is_plain else value[..., torch.tensor(columns, device=value.device)], part)

    def summary(self, value: Tensor, weights: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The weights, and the expected precisions of the parts that hide a scale."""
        precisions = {}
        for i, (columns, part) in enumerate(self.parts):
            if isinstance(part, LatentScaleT):
                precisions[i] = part.precision(self._own(value, columns, part)[0])
        return weights, precisions

    def expected_log_prob(self, value: Tensor, summary: tuple[Tensor, dict[int, Tensor]]) -> Tensor:
        weights, precisions = summary
        total = torch.zeros((), dtype=value.dtype, device=value.device)
        for i, (columns, part) in enumerate(self.parts):
            own, is_known = self._own(value, columns, part)
            log_prob = part.log_prob_at(own, precisions[i]) if i in precisions else part.log_prob(own)
            total = total + torch.where(is_known, log_prob, 0.0).sum(-1)
        return weighted(weights, total)


def _mean(part: Any) -> Tensor:
    """Mean of a distribution of one number; the most probable label of labels."""
    mean: Tensor = part.probs.argmax(-1).to(part.probs) if isinstance(part, torch.distributions.Categorical) else part.mean
    return mean


def _inside(value: Tensor, given: Any) -> tuple[Tensor, Tensor]:
    """Values with something inside the support where they are unknown; and which entries are known."""
    filler = float(given.support is constraints.positive)
    return value.nan_to_num(nan=filler, posinf=math.inf, neginf=-math.inf), ~value.isnan()  # much faster than where


class Entries(TorchDistribution):
    """Arrays whose entries are independent, all of one family. Entries that are NaN have not been observed.

    What ``given.to_event(dims)`` is, but that an entry which is NaN counts nothing, in the log-density and in its gradient.
    Samples are complete, and of a floating type, labels among them.

    Args:
        given: A distribution of one number, (*batch, *shape); its support contains 0, or it is the positive numbers.
        dims: Number of dimensions of an array, len(shape).

    Raises:
        ValueError: If ``given`` has fewer dimensions.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, given: Any, dims: int, batch_shape: Size | None = None) -> None:
        self.given, self.dims = given, dims
        cut = len(given.batch_shape) - dims
        if cut < 0:
            raise ValueError(f"Arrays have {dims} dimensions, but given has batch shape {tuple(given.batch_shape)}.")
        shape = given.batch_shape[:cut] if batch_shape is None else batch_shape
        super().__init__(shape, given.batch_shape[cut:], validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return bool(self.given.has_rsample)

    @property
    def support(self) -> Any:
        return constraints.independent(self.given.support, self.dims)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Entries:
        return Entries(self.given, self.dims, batch_shape=Size(batch_shape))

    @property
    def _wide(self) -> Any:
        return self.given.expand(self.batch_shape + self.event_shape)

    @property
    def mean(self) -> Tensor:
        """Of each entry; of labels, the most probable one."""
        return _mean(self._wide)

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        return self._wide.sample(Size(sample_shape)).to(floating(self.given))

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        drawn: Tensor = self._wide.rsample(Size(sample_shape))
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        own, is_known = _inside(value, self.given)
        log_prob = torch.where(is_known, self.given.log_prob(own), 0.0)
        log_prob = log_prob.sum(tuple(range(-self.dims, 0))) if self.dims else log_prob
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))
