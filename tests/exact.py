"""Exact posteriors by formula: moments of families, mixtures over assignments, jointly normal sites, quadrature.

Nothing here knows of programs: every reference value of the table of instances is computed from a density written down a
second time, by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

__all__ = [
    "Moments", "array", "assignments", "averaged", "beta", "conjugate_normal", "dirichlet", "gamma", "grid",
    "inverse_gamma", "linear_normal", "log_dirichlet", "moments", "noise", "summit", "variances",
]  # fmt: skip


class Moments(NamedTuple):
    """Posterior mean and standard deviation of every element of a site, both (*site), and their Monte-Carlo errors."""

    mean: Any
    sd: Any
    mean_error: Any = 0.0
    sd_error: Any = 0.0


def noise(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, the same everywhere."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(*values: Any) -> Tensor:
    """Numbers in double precision."""
    return torch.tensor(values, dtype=torch.float64)


def averaged(log_weights: np.ndarray, means: Any, variances: Any = 0.0) -> Moments:
    """Moments of a mixture.

    Args:
        log_weights: (m,), up to a constant.
        means: Of its parts, (m, *site) or (*site).
        variances: Of its parts, as ``means``.
    """
    weights = scipy.special.softmax(np.ravel(log_weights))
    means = np.broadcast_to(means, (len(weights), *np.shape(means)[1:]))
    mean = np.tensordot(weights, means, 1)
    return Moments(mean, np.sqrt(np.tensordot(weights, variances + (means - mean) ** 2, 1)))


def gamma(concentration: Any, rate: Any) -> Moments:
    return Moments(concentration / rate, np.sqrt(concentration) / rate)


def inverse_gamma(concentration: Any, rate: Any) -> Moments:
    mean = rate / (concentration - 1)
    return Moments(mean, mean / np.sqrt(concentration - 2))


def beta(a: Any, b: Any) -> Moments:
    mean = a / (a + b)
    return Moments(mean, np.sqrt(mean * (1 - mean) / (a + b + 1)))


def dirichlet(concentration: np.ndarray) -> Moments:
    total = concentration.sum(-1, keepdims=True)
    mean = concentration / total
    return Moments(mean, np.sqrt(mean * (1 - mean) / (total + 1)))


def log_dirichlet(concentration: np.ndarray) -> np.ndarray:
    """Logarithm of the normaliser of Dirichlet distributions, (...) of (..., k)."""
    return scipy.special.gammaln(concentration).sum(-1) - scipy.special.gammaln(concentration.sum(-1))


def assignments(values: int, elements: int) -> np.ndarray:
    """All labellings, (values ** elements, elements)."""
    return np.array(list(itertools.product(range(values), repeat=elements)))


def conjugate_normal(
    mean: Any, variance: Any, numbers: np.ndarray, sums: np.ndarray, noise: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal means of observations with known noise.

    Args:
        mean: Prior means.
        variance: Prior variances.
        numbers: How many observations there are of each.
        sums: Their sums.
        noise: Variance of an observation.

    Returns:
        Posterior means and variances, and the log-evidence without what neither numbers nor sums change.
    """
    precision = 1 / variance + numbers / noise
    location = (mean / variance + sums / noise) / precision
    return location, 1 / precision, -0.5 * np.log(precision * variance) + 0.5 * precision * location**2


def linear_normal(
    design: np.ndarray, y: np.ndarray, mean: np.ndarray, covariance: np.ndarray, noise: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y ~ N(design · b, noise), b ~ N(mean, covariance); every argument may have leading dimensions.

    Args:
        design: (..., n, d).
        y: (..., n).
        mean: (..., d).
        covariance: (..., d, d).
        noise: Variances (..., n).

    Returns:
        Posterior mean (..., d) and covariance (..., d, d) of b, and log p(y), (...).
    """
    residual = y - (design @ mean[..., None])[..., 0]
    cross = covariance @ np.swapaxes(design, -1, -2)
    total = design @ cross + noise[..., None] * np.eye(design.shape[-2])
    gain = np.swapaxes(np.linalg.solve(total, np.swapaxes(cross, -1, -2)), -1, -2)
    posterior = mean + (gain @ residual[..., None])[..., 0]
    scaled = np.linalg.solve(total, residual[..., None])[..., 0]
    log_evidence = -0.5 * (residual * scaled).sum(-1) - 0.5 * np.linalg.slogdet(2 * np.pi * total)[1]
    return posterior, covariance - gain @ np.swapaxes(cross, -1, -2), log_evidence


def variances(covariance: np.ndarray) -> np.ndarray:
    """Variances, the diagonals (..., d) of matrices (..., d, d)."""
    return np.diagonal(covariance, axis1=-2, axis2=-1)


def grid(*axes: tuple[float, float, int]) -> Tensor:
    """Points of a grid, (m, dimensions); an axis is its two ends and its number of points.

    The trapezoidal rule converges geometrically for a smooth density that decays inside the grid.
    """
    lines = [torch.linspace(low, high, number, dtype=torch.float64) for low, high, number in axes]
    return torch.cartesian_prod(*lines).reshape(-1, len(axes))


def summit(log_density: Callable[[Tensor], Tensor], start: Sequence[float]) -> Tensor:
    """Where a smooth function of a vector is largest: BFGS from ``start``, then Newton's steps to the last digit."""
    gradient, hessian = torch.func.grad(log_density), torch.func.hessian(log_density)

    def negative(point: np.ndarray) -> tuple[float, np.ndarray]:
        at = torch.from_numpy(point)
        return -float(log_density(at)), -gradient(at).numpy()

    found = scipy.optimize.minimize(negative, np.asarray(start, float), jac=True, method="BFGS", options={"gtol": 1e-6})
    point = torch.from_numpy(found.x)
    for _ in range(5):
        point = point - torch.linalg.solve(hessian(point), gradient(point))
    assert float(gradient(point).abs().max()) < 1e-8
    assert float(torch.linalg.eigvalsh(hessian(point)).max()) < 0.0
    return point


def moments(log_weights: Any, values: Mapping[str, Any]) -> dict[str, Moments]:
    """Moments of functions of a grid's points: name to values (m, *site)."""
    return {name: averaged(np.asarray(log_weights), np.asarray(value)) for name, value in values.items()}
