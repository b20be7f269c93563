"""Bijections to supports for which torch and Pyro register none; pure functions, which models may import too.

Importing this module registers them with ``biject_to``, so that Pyro's own autoguides and NUTS know them as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, StickBreakingTransform, Transform

__all__ = ["PositiveDefinite", "StickBreaking", "bijection"]


def bijection(support: Any) -> Transform:
    """``biject_to(support)``, with simplexes by ``StickBreaking``."""
    return _summed(biject_to(support))


def _summed(transform: Transform) -> Transform:
    if isinstance(transform, IndependentTransform):
        return IndependentTransform(_summed(transform.base_transform), transform.reinterpreted_batch_ndims)
    return StickBreaking() if type(transform) is StickBreakingTransform else transform


class StickBreaking(StickBreakingTransform):
    """torch's own, but with sums of logarithms in place of products.

    Inside of ``vmap`` or ``grad`` the gradient of ``cumprod`` takes time and memory of the square of the width: 30 GB for
    the words of a text.
    """

    def _call(self, x: Tensor) -> Tensor:
        left = x.shape[-1] + 1 - x.new_ones(x.shape[-1]).cumsum(-1)
        info = torch.finfo(x.dtype)
        share = torch.sigmoid(x - left.log()).clamp(info.tiny, 1.0 - info.eps)
        rest = torch.log1p(-share).cumsum(-1).exp()
        return torch.nn.functional.pad(share, [0, 1], value=1) * torch.nn.functional.pad(rest, [1, 0], value=1)


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
