"""Rows of one of several classes: their class known, or summed out."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from inference.contract import Augmented

__all__ = ["Classwise", "LatentScaleT", "Mixed", "floating", "weighted"]


class Classwise(TorchDistribution):
    """Rows whose columns are independent given the class of the row.

        p(x | k) = Π_j p_kj(x_j),    k = index

    The log-probabilities of all rows under all K classes come first, as a product of matrices where the family allows for
    one, and each row picks its own: parameters are never gathered row by row, which text has no memory for.

    Args:
        given: Distributions of columns, batch shape (K, D); or a ``Multinomial``, batch shape (K,), of which only the
            probabilities are used: its counts have the log-probability of their words in some order, Σ_j x_j log θ_kj,
            without the multinomial coefficient, which depends on no parameter.
        index: Class of each row, (*batch).
        is_seen: Which entries count, (*batch, D); None: all.
        lengths: Number of words of each row that is drawn from a multinomial, (*batch).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(
        self,
        given: TorchDistribution,
        index: Tensor,
        is_seen: Tensor | None = None,
        lengths: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.given, self.index, self.is_seen, self.lengths = given, index, is_seen, lengths
        rows = Size() if is_seen is None else is_seen.shape[:-1]
        batch = torch.broadcast_shapes(index.shape, rows)
        columns = given.event_shape if given.event_shape else given.batch_shape[-1:]
        super().__init__(batch, columns, validate_args=False)

    @property
    def support(self) -> Any:
        if isinstance(self.given, dist.Multinomial):
            return constraints.independent(constraints.nonnegative_integer, 1)
        if isinstance(self.given, dist.Categorical):
            return constraints.independent(constraints.integer_interval(0, self.given.logits.shape[-1] - 1), 1)
        return constraints.independent(self.given.support, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Classwise:
        batch_shape = Size(batch_shape)
        return Classwise(self.given, self.index.expand(batch_shape), self.is_seen, self.lengths)

    @staticmethod
    def table(given: TorchDistribution, value: Tensor, is_seen: Tensor | None = None) -> Tensor:
        """log p(x | k) of every row under every class, (*batch, K)."""
        if isinstance(given, dist.Multinomial):
            return _product(value, given.logits)
        if isinstance(given, dist.Bernoulli):
            seen = torch.ones_like(value) if is_seen is None else is_seen.to(value)
            return _product(seen * value, given.logits) - _product(seen, torch.nn.functional.softplus(given.logits))
        if isinstance(given, dist.Poisson):
            seen = torch.ones_like(value) if is_seen is None else is_seen.to(value)
            rate = given.rate.clamp(min=torch.finfo(value.dtype).tiny)  # 0 log 0 = 0
            constant = (seen * torch.lgamma(value + 1.0)).sum(-1, keepdim=True)
            return _product(seen * value, rate.log()) - _product(seen, rate) - constant
        terms = given.log_prob(value.unsqueeze(-2))
        return (terms if is_seen is None else torch.where(is_seen.unsqueeze(-2), terms, 0.0)).sum(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        table = self.table(self.given, value, self.is_seen)
        shape = torch.broadcast_shapes(table.shape[:-1], self.index.shape)
        index = self.index.expand(shape).unsqueeze(-1)
        return table.expand(*shape, -1).gather(-1, index).squeeze(-1)

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape) + self.batch_shape
        index = self.index.expand(shape)
        if not isinstance(self.given, dist.Multinomial):
            rows = self.given.sample(shape)  # of every class, (*batch, K, D)
            chosen = index[..., None, None].expand(*shape, 1, rows.shape[-1])
            return rows.gather(-2, chosen).squeeze(-2).to(floating(self.given))
        probs = self.given.probs[index]
        lengths = torch.as_tensor(1.0 if self.lengths is None else self.lengths).to(probs).expand(shape)
        longest = max(int(lengths.max()), 1)
        words = torch.multinomial(probs.reshape(-1, probs.shape[-1]), longest, replacement=True).reshape(*shape, longest)
        is_word = torch.arange(longest, device=probs.device) < lengths.unsqueeze(-1)
        return torch.zeros_like(probs).scatter_add(-1, words, is_word.to(probs))


def _product(value: Tensor, parameters: Tensor) -> Tensor:
    """Products of rows (*batch, D) with those of every class (K, D), (*batch, K).

    With the rows on the right: where chains have parameters of their own, a product of matrices, and no copies of the rows.
    """
    flat = value.reshape(-1, value.shape[-1])
    return (parameters @ flat.mT).mT.reshape(*value.shape[:-1], -1)


def floating(given: TorchDistribution) -> torch.dtype:
    """The type of the parameters, which counts and labels have in a table."""
    return next(value.dtype for value in vars(given).values() if isinstance(value, Tensor))


class Mixed(TorchDistribution):
    """A mixture, its component summed out; EM fills it in.

        p(x) = Σ_k w_k p_k(x)

    Args:
        weights: w, (*batch, K).
        components: A distribution with the components in its last batch dimension, (*batch, K).
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, weights: Tensor, components: Any, batch_shape: Size | None = None) -> None:
        self.weights, self.components = weights, components
        shape = torch.broadcast_shapes(weights.shape, components.batch_shape)[:-1] if batch_shape is None else batch_shape
        super().__init__(shape, components.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.components.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixed:
        return Mixed(self.weights, self.components, batch_shape=Size(batch_shape))

    def _terms(self, value: Tensor) -> Tensor:
        """log w_k p_k(x), (…, K)."""
        log_prob: Tensor = self.weights.log() + self.components.log_prob(self._spread(value))
        return log_prob

    def _spread(self, value: Tensor) -> Tensor:
        return value.unsqueeze(value.dim() - len(self.event_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self._terms(value).logsumexp(-1)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))

    def summary(self, value: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """How much each component counts for each row, and what the components hide."""
        shares = weights.unsqueeze(-1) * self._terms(value).softmax(-1)
        is_hiding = isinstance(self.components, Augmented)
        return shares, {"components": self.components.summary(self._spread(value), shares)} if is_hiding else {}

    def expected_log_prob(self, value: Tensor, summary: tuple[Tensor, dict[str, Any]]) -> Tensor:
        shares, hidden = summary
        if hidden:
            inside = self.components.expected_log_prob(self._spread(value), hidden["components"])
        else:
            inside = weighted(shares, self.components.log_prob(self._spread(value)))
        total: Tensor = inside + weighted(shares, self.weights.log())
        return total

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape, components = Size(sample_shape) + self.batch_shape, self.weights.shape[-1]
        z = torch.distributions.Categorical(probs=self.weights.expand(*self.batch_shape, components)).sample(
            Size(sample_shape)
        )
        rows = self.components.expand(Size((*self.batch_shape, components))).sample(Size(sample_shape))
        index = z.reshape(*shape, 1, *(1,) * len(self.event_shape)).expand(*shape, 1, *self.event_shape)
        return rows.gather(len(shape), index).squeeze(len(shape))


class LatentScaleT(torch.distributions.StudentT, TorchDistribution):
    """Student's t as a normal of random scale, which EM fills in; its degrees of freedom are known.

        u ~ Gamma(ν/2, ν/2),  x ~ N(μ, s² / u)

    References:
        C. Liu and D. Rubin, ML estimation of the t distribution using EM and its extensions, ECM and ECME (1995).
    """

    def expand(self, batch_shape: Any, _instance: Any = None) -> LatentScaleT:
        shape = Size(batch_shape)
        return LatentScaleT(self.df.expand(shape), self.loc.expand(shape), self.scale.expand(shape), validate_args=False)

    def precision(self, value: Tensor) -> Tensor:
        """E u given x."""
        return (self.df + 1.0) / (self.df + ((value - self.loc) / self.scale).square())

    def log_prob_at(self, value: Tensor, precision: Tensor) -> Tensor:
        """E log p(x | u) at the expected precision, up to a constant."""
        return -self.scale.log() - 0.5 * precision * ((value - self.loc) / self.scale).square()


def weighted(weights: Tensor, table: Tensor) -> Tensor:
    """Sum of a table with weights; what has no weight may be infinite."""
    return torch.where(weights > 0, weights * torch.where(weights > 0, table, 0.0), 0.0).sum()
