"""Bijections to supports for which torch and Pyro register none; pure functions, which models may import too.

Importing this module registers them with ``biject_to``, so that Pyro's own autoguides and NUTS know them as well.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions.constraints import sphere
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import IndependentTransform, StickBreakingTransform, Transform

__all__ = ["PositiveDefinite", "Stereographic", "StickBreaking", "bijection"]


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


class Stereographic(Transform):
    """Vector (…, d − 1) to the unit sphere (…, d): x = (2u, 1 − ‖u‖²) / (1 + ‖u‖²), all of it but the pole −e_d.

    log |dx / du| = (d − 1) log(2 / (1 + ‖u‖²)),  for densities with respect to the surface
    """

    domain = constraints.real_vector
    codomain = sphere
    bijective = True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stereographic)

    def __hash__(self) -> int:
        return hash(type(self))

    def forward_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] + 1))

    def inverse_shape(self, shape: Any) -> torch.Size:
        return torch.Size((*shape[:-1], shape[-1] - 1))

    def _call(self, x: Tensor) -> Tensor:
        square = x.square().sum(-1, keepdim=True)
        return torch.cat([2.0 * x, 1.0 - square], -1) / (1.0 + square)

    def _inverse(self, y: Tensor) -> Tensor:
        near, last = y[..., :-1], y[..., -1:]
        # 1 + y_d, which near the pole is less than its rounding
        square = near.square().sum(-1, keepdim=True).clamp(min=torch.finfo(y.dtype).tiny)
        return near / torch.where(last > 0.0, 1.0 + last, square / (1.0 - last))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.shape[-1] * (math.log(2.0) - torch.log1p(x.square().sum(-1)))


def _register() -> None:
    for constraint, factory in _BIJECTIONS:
        try:
            biject_to(constraint)
        except NotImplementedError:
            biject_to.register(constraint, factory)


_BIJECTIONS: list[tuple[Any, Any]] = [
    (constraints.positive_definite, lambda constraint: PositiveDefinite()),
    (sphere, lambda constraint: Stereographic()),
]
if hasattr(constraints, "MixtureSameFamilyConstraint"):  # not in torch 2.6, where a mixture has the support of its parts
    _BIJECTIONS.append(
        (constraints.MixtureSameFamilyConstraint(constraints.real), lambda own: biject_to(own.base_constraint))
    )

_register()
