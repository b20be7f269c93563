"""Data of which everything about diffusion is known exactly: a Gaussian, or a mixture of Gaussians.

A sampler, loss, likelihood or guidance that is wrong is wrong on these as well, and here it shows, without any training.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, final

import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser
from pyro_genmodels.diffusion.schedule import Schedule

__all__ = ["Oracle"]


class _Parts(NamedTuple):
    """x_t as each component sees it: log w_k N(x_t), (rows, K), and along its axes what is left, and how much is usual."""

    log_joint: Tensor
    residuals: Tensor
    spread: Tensor
    alpha: Tensor
    sigma: Tensor


@final
class Oracle(Denoiser):
    """The exact denoiser of a mixture of Gaussians.

        x_0 ~ Σ_k w_k N(m_k, C_k),  x_t = α_t x_0 + σ_t ε  ⇒  x_t ~ Σ_k w_k N(α_t m_k, α_t² C_k + σ_t² I)

    Posterior mean and covariance of x_0, score, log-density at any level, the reverse kernels between any two levels, and
    the posterior under linear measurements with Gaussian noise are all in closed form.

    Args:
        weights: w, (K,), positive; scaled to sum to 1.
        means: m, (K, D).
        covariances: C, (K, D, D), positive semi-definite; or standard deviations of round components, (K,) or a number.
        schedule: α and σ.

    Raises:
        ValueError: Shapes that do not go together, weights that are not positive, covariances that are no covariances.

    References:
        B. Efron, Tweedie's Formula and Selection Bias (2011).

    Example:
        >>> from pyro_genmodels.diffusion.schedule import EDM
        >>> ring = Oracle.ring(5, EDM())
        >>> ring(torch.zeros(1, 2), torch.tensor(80.0)).variance.shape
        torch.Size([1, 2])
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor | float, schedule: Schedule) -> None:
        super().__init__(schedule)
        if means.ndim != 2 or weights.shape != means.shape[:1]:
            raise ValueError(
                f"weights are (K,) and means (K, D), but have the shapes {tuple(weights.shape)} and {tuple(means.shape)}."
            )
        if not (weights > 0).all():
            raise ValueError(f"weights are positive, but came as {weights.tolist()}. Leave out a component of weight 0.")
        count, size = means.shape
        spread = torch.as_tensor(covariances, dtype=means.dtype, device=means.device)
        if spread.ndim < 2:
            spread = spread.expand(count).square()[:, None, None] * torch.eye(size, dtype=means.dtype, device=means.device)
        if spread.shape != (count, size, size):
            raise ValueError(
                f"covariances are (K, D, D) = {(count, size, size)}, or standard deviations (K,), but have the shape "
                f"{tuple(spread.shape)}."
            )
        values, axes = torch.linalg.eigh(spread)
        least = -1e-6 * values.abs().amax()
        if not torch.allclose(spread, spread.mT, rtol=1e-5, atol=1e-6) or (values < least).any():
            raise ValueError(
                "covariances are symmetric and positive semi-definite; of these, the smallest eigenvalue is "
                f"{values.min():g} and the largest asymmetry {(spread - spread.mT).abs().max():g}."
            )
        self.log_weights: Any
        self.means: Any
        self.axes: Any
        self.values: Any
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(means.dtype))
        self.register_buffer("means", means)
        self.register_buffer("axes", axes)
        self.register_buffer("values", values.clamp(min=0.0))

    @staticmethod
    def ring(components: int, schedule: Schedule, radius: float = 2.0, deviation: float = 0.3) -> Oracle:
        """Round components on a circle in the plane, in float64, of weights that rise as 2, 3, …, K + 1."""
        if components < 1:
            raise ValueError(f"A ring has at least 1 component, but components is {components}.")
        angles = torch.arange(components, dtype=torch.float64) * (2.0 * math.pi / components)
        means = radius * torch.stack([angles.cos(), angles.sin()], -1)
        return Oracle(torch.arange(2, components + 2, dtype=torch.float64), means, deviation, schedule)

    @property
    def covariances(self) -> Tensor:
        """C, (K, D, D)."""
        return (self.axes * self.values[:, None]) @ self.axes.mT

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        parts = self._parts(x, t)
        shares = parts.log_joint.softmax(-1)
        means = self._means(parts)
        mean = (shares[..., None] * means).sum(1)
        within = torch.einsum("kde,rke->rkd", self.axes.square(), self.values * parts.sigma.square() / parts.spread)
        variance = (shares[..., None] * (within + (means - mean[:, None]).square())).sum(1)
        return Denoised(mean.to(x.dtype), variance.to(x.dtype))

    def covariance(self, x: Tensor, t: Tensor) -> Tensor:
        """Cov[x_0 | x_t], (rows, D, D)."""
        parts = self._parts(x, t)
        shares = parts.log_joint.softmax(-1)
        means = self._means(parts)
        apart = means - (shares[..., None] * means).sum(1, keepdim=True)
        scales = self.values * parts.sigma.square() / parts.spread
        within = torch.einsum("rk,kde,rke,kfe->rdf", shares, self.axes, scales, self.axes)
        return within + torch.einsum("rk,rkd,rke->rde", shares, apart, apart)

    def log_prob(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        """log p(x_t), (rows,); that of data if ``t`` is None, which needs covariances of full rank."""
        return self._parts(x, t).log_joint.logsumexp(-1)

    def distribution(self, t: Tensor | None = None) -> dist.TorchDistribution:
        """The law of x_t, for one t; that of data if ``t`` is None."""
        alpha, sigma = self._levels(self.means, t)
        return self._mixture(self.log_weights, alpha * self.means, self.axes, alpha**2 * self.values + sigma**2)

    def reverse(self, x: Tensor, t: Tensor, earlier: Tensor) -> dist.TorchDistribution:
        """The law of x_s given x_t = ``x``, for one time s = ``earlier`` before ``t``: a mixture, one for each row.

        Chains that step through these have the exact law at every level, however few the steps.
        """
        if not (earlier < t).all():
            raise ValueError(f"earlier is a time before t, with less noise, but is {earlier} at t = {t}.")
        parts = self._parts(x, t)
        alpha, sigma = self._levels(x, earlier)
        ratio = parts.alpha / alpha
        before = alpha**2 * self.values + sigma**2  # eigenvalues of the covariance of x_s in each component
        gain = ratio * before / parts.spread
        means = alpha * self.means + torch.einsum("kde,rke->rkd", self.axes, gain * parts.residuals)
        step = parts.sigma**2 - (ratio * sigma) ** 2  # of x_t given x_s
        values = before * step / parts.spread
        return self._mixture(parts.log_joint.log_softmax(-1), means, self.axes.expand(len(x), -1, -1, -1), values)

    def condition(self, operator: Tensor, y: Tensor, covariance: Tensor) -> Oracle:
        """The posterior of x_0 given y = A x_0 + n, n ~ N(0, R): a mixture again, and so an oracle.

        Args:
            operator: A, (M, D).
            y: (M,).
            covariance: R, (M, M), positive definite.
        """
        if operator.ndim != 2 or operator.shape[1] != self.means.shape[1] or y.shape != operator.shape[:1]:
            raise ValueError(
                f"The operator is (M, {self.means.shape[1]}) and y is (M,), but they have the shapes "
                f"{tuple(operator.shape)} and {tuple(y.shape)}."
            )
        prior = self.covariances
        operator, y, covariance = (tensor.to(prior) for tensor in (operator, y, covariance))
        cross = prior @ operator.mT  # (K, D, M)
        evidence = dist.MultivariateNormal(self.means @ operator.mT, operator @ cross + covariance)
        gain = torch.cholesky_solve(cross.mT, evidence.scale_tril).mT
        means = self.means + (gain @ (y - evidence.mean)[..., None])[..., 0]
        kept = torch.eye(operator.shape[1], dtype=prior.dtype, device=prior.device) - gain @ operator
        after = kept @ prior @ kept.mT + gain @ covariance @ gain.mT  # Joseph's form, which stays semi-definite
        log_weights = (self.log_weights + evidence.log_prob(y)).log_softmax(-1)
        # a weight that underflows is one of a component that no draw will ever come from
        weights = log_weights.exp().clamp(min=torch.finfo(means.dtype).tiny)
        return Oracle(weights, means, 0.5 * (after + after.mT), self.schedule)

    def _levels(self, x: Tensor, t: Tensor | None) -> tuple[Any, Any]:
        if t is None:
            return 1.0, 0.0
        return tuple(level.to(x.dtype) for level in self.at(x, t))  # type: ignore[return-value]

    def _parts(self, x: Tensor, t: Tensor | None) -> _Parts:
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x is (rows, {self.means.shape[1]}), but has the shape {tuple(x.shape)}.")
        x = x.to(self.means.dtype)
        alpha, sigma = (torch.as_tensor(level, dtype=x.dtype)[..., None] for level in self._levels(x, t))
        alpha, sigma = (level if level.ndim == 3 else level.reshape(1, 1, 1) for level in (alpha, sigma))
        residuals = torch.einsum("kde,rkd->rke", self.axes, x[:, None] - alpha * self.means)
        spread = alpha**2 * self.values + sigma**2
        quadratic = (residuals.square() / spread + (2.0 * math.pi * spread).log()).sum(-1)
        return _Parts(self.log_weights - 0.5 * quadratic, residuals, spread, alpha, sigma)

    def _means(self, parts: _Parts) -> Tensor:
        """E[x_0 | x_t, k], (rows, K, D)."""
        scaled = parts.alpha * self.values / parts.spread * parts.residuals
        return self.means + torch.einsum("kde,rke->rkd", self.axes, scaled)

    @staticmethod
    def _mixture(log_weights: Tensor, means: Tensor, axes: Tensor, values: Tensor) -> dist.TorchDistribution:
        # a root that is not triangular: its triangular factor by QR, as (Q R)ᵀ (Q R) = Rᵀ R
        root = (axes * values.sqrt()[..., None, :]).mT
        triangle = torch.linalg.qr(root).R.mT
        triangle = triangle * torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
        return dist.MixtureSameFamily(
            dist.Categorical(logits=log_weights), dist.MultivariateNormal(means, scale_tril=triangle)
        )
