"""Distributions that Pyro lacks."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

import inference.transforms  # noqa: F401  (the bijection to positive definite matrices)

__all__ = ["Classwise", "InverseWishart"]


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
            return rows.gather(-2, chosen).squeeze(-2).to(_floating(self.given))
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


def _floating(given: TorchDistribution) -> torch.dtype:
    """The type of the parameters, which counts and labels have in a table."""
    return next(value.dtype for value in vars(given).values() if isinstance(value, Tensor))


class InverseWishart(TorchDistribution):
    """Inverse Wishart distribution of a covariance matrix Σ (D × D).

        p(Σ) ∝ |Σ|^(−(ν + D + 1)/2) exp(−½ tr(Ψ Σ⁻¹)),    E Σ = Ψ / (ν − D − 1)

    Args:
        df: Degrees of freedom ν > D − 1, (*batch).
        scale_matrix: Ψ, positive definite, (*batch, D, D).

    References:
        A. Gelman et al., Bayesian Data Analysis (2013), appendix A.
    """

    arg_constraints = {"df": constraints.positive, "scale_matrix": constraints.positive_definite}  # noqa: RUF012
    support = constraints.positive_definite
    has_rsample = True

    def __init__(self, df: Tensor | float, scale_matrix: Tensor, validate_args: bool | None = None) -> None:
        df = torch.as_tensor(df, dtype=scale_matrix.dtype, device=scale_matrix.device)
        batch = torch.broadcast_shapes(df.shape, scale_matrix.shape[:-2])
        self.df = df.expand(batch)
        self.scale_matrix = scale_matrix.expand(*batch, *scale_matrix.shape[-2:])
        super().__init__(batch, scale_matrix.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> InverseWishart:
        batch_shape = Size(batch_shape)
        matrix = self.scale_matrix.expand(*batch_shape, *self.event_shape)
        return InverseWishart(self.df.expand(batch_shape), matrix, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.scale_matrix / (self.df - self.event_shape[-1] - 1.0)[..., None, None]

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        """Σ = C A⁻ᵀ A⁻¹ Cᵀ with Ψ = C Cᵀ and A the lower triangle of Bartlett's decomposition of a Wishart matrix."""
        size, shape = self.event_shape[-1], Size(sample_shape) + self.batch_shape
        steps = torch.arange(size, dtype=self.df.dtype, device=self.df.device)
        freedom = (self.df.unsqueeze(-1) - steps).expand(*shape, size)
        diagonal = (2.0 * torch._standard_gamma(0.5 * freedom)).sqrt()
        noise = torch.randn(*shape, size, size, dtype=self.df.dtype, device=self.df.device)
        bartlett = noise.tril(-1) + torch.diag_embed(diagonal)
        factor = torch.linalg.cholesky(self.scale_matrix).expand(*shape, size, size)
        root = torch.linalg.solve_triangular(bartlett, factor.mT, upper=False)
        return root.mT @ root

    def log_prob(self, value: Tensor) -> Tensor:
        size = self.event_shape[-1]
        root, factor = torch.linalg.cholesky(value), torch.linalg.cholesky(self.scale_matrix)
        log_det = 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det_scale = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        shape = torch.broadcast_shapes(root.shape, factor.shape)
        trace = torch.linalg.solve_triangular(root.expand(shape), factor.expand(shape), upper=False).square().sum((-2, -1))
        log_gamma = torch.lgamma(0.5 * (self.df.unsqueeze(-1) - torch.arange(size, device=value.device))).sum(-1)
        log_gamma = log_gamma + 0.25 * size * (size - 1) * math.log(math.pi)
        log_scale = 0.5 * self.df * (log_det_scale - size * math.log(2.0)) - log_gamma
        return log_scale - 0.5 * (self.df + size + 1.0) * log_det - 0.5 * trace
