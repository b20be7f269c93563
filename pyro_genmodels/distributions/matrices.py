"""Matrices at random."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

import inference.transforms  # noqa: F401  (the bijection to positive definite matrices)

__all__ = ["InverseWishart"]


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
