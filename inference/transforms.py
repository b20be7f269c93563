"""Bijections to supports for which torch and Pyro register none; pure functions, which models may import too.

Importing this module registers them with ``biject_to``, so that Pyro's own autoguides and NUTS know them as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import Transform

__all__ = ["PositiveDefinite"]


class PositiveDefinite(Transform):
    """Vector (…, D (D + 1) / 2) to positive definite matrix (…, D, D): Σ = L Lᵀ, the diagonal of L through exp.

    log |dΣ / du| = D log 2 + Σ_i (D − i + 2) log L_ii,  i = 1 … D
    """

    domain = constraints.real_vector
    codomain = constraints.positive_definite
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PositiveDefinite)

    def __hash__(self) -> int:
        return hash(type(self))

    def forward_shape(self, shape: Any) -> torch.Size:
        size = (math.isqrt(8 * shape[-1] + 1) - 1) // 2
        return torch.Size((*shape[:-1], size, size))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))

    def _factor(self, x: Tensor) -> Tensor:
        size = self.forward_shape(x.shape)[-1]
        below = x.new_zeros(*x.shape[:-1], size * size)
        rows, columns = torch.tril_indices(size, size, -1, device=x.device)
        index = (rows * size + columns).expand(*x.shape[:-1], -1)
        below = below.scatter(-1, index, x[..., size:]) if size > 1 else below
        return below.reshape(*x.shape[:-1], size, size) + torch.diag_embed(x[..., :size].exp())

    def _call(self, x: Tensor) -> Tensor:
        factor = self._factor(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        factor = torch.linalg.cholesky(y)
        size = y.shape[-1]
        rows, columns = torch.tril_indices(size, size, -1, device=y.device)
        return torch.cat([factor.diagonal(dim1=-2, dim2=-1).log(), factor[..., rows, columns]], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        size = y.shape[-1]
        powers = size + 1 - torch.arange(size, dtype=x.dtype, device=x.device)
        return size * math.log(2.0) + (powers * x[..., :size]).sum(-1)


def _register() -> None:
    try:
        biject_to(constraints.positive_definite)
    except NotImplementedError:
        biject_to.register(constraints.positive_definite, lambda constraint: PositiveDefinite())


_register()
