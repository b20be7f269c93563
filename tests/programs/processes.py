"""Gaussian processes: functions as sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from exact import Moments, array, grid, linear_normal, moments, noise, summit

PLACES = torch.linspace(0.0, 4.0, 8, dtype=torch.float64)
HEIGHTS = PLACES.sin() + 0.3 * noise(8, seed=31)
DAYS = torch.linspace(0.0, 6.0, 24, dtype=torch.float64)
ACCIDENTS = array(3, 5, 4, 7, 3, 4, 6, 2, 1, 0, 2, 1, 0, 0, 1, 2, 1, 3, 2, 4, 5, 3, 6, 4)


def covariance(x: Tensor, height: Any, length: Any) -> Tensor:
    """height² exp(−½ (x − x′)² / length²), and a nugget of 10⁻² on the diagonal."""
    distance = x[:, None] - x
    return height**2 * (-0.5 * (distance / length) ** 2).exp() + 1e-2 * torch.eye(len(x), dtype=x.dtype, device=x.device)


def gaussian_process(x: Tensor, y: Tensor) -> None:
    """Regression with a known kernel; the function's values are a site."""
    f = pyro.sample("f", dist.MultivariateNormal(x.new_zeros(len(x)), covariance(x, 1.5, 1.2)))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(f, 0.4), obs=y)


def gaussian_process_moments() -> dict[str, Moments]:
    n = len(PLACES)
    prior = covariance(PLACES, 1.5, 1.2).numpy()
    mean, posterior, _ = linear_normal(np.eye(n), HEIGHTS.numpy(), np.zeros(n), prior, np.full(n, 0.16))
    return {"f": Moments(mean, np.sqrt(np.diag(posterior)))}


def gaussian_process_mode() -> dict[str, Any]:
    return {"f": gaussian_process_moments()["f"].mean}


def kriging(x: Tensor, y: Tensor) -> None:
    """Regression with an unknown kernel; the function is integrated out by hand."""
    height = pyro.sample("height", dist.LogNormal(x.new_tensor(0.0), 0.7))
    length = pyro.sample("length", dist.LogNormal(x.new_tensor(0.0), 0.5))
    total = covariance(x, height, length) + 0.16 * torch.eye(len(x), dtype=x.dtype, device=x.device)
    pyro.sample("y", dist.MultivariateNormal(x.new_zeros(len(x)), total), obs=y)


def _kriging(logs: Tensor) -> Tensor:
    """log p(height, length, y) as densities of both, at their logarithms (2,)."""
    n = len(PLACES)
    total = covariance(PLACES, logs[0].exp(), logs[1].exp()) + 0.16 * torch.eye(n, dtype=torch.float64)
    fit = -0.5 * HEIGHTS @ torch.linalg.solve(total, HEIGHTS) - 0.5 * torch.linalg.slogdet(total)[1]
    return fit - 0.5 * (logs[0] / 0.7) ** 2 - 0.5 * (logs[1] / 0.5) ** 2 - logs.sum()


def kriging_moments() -> dict[str, Moments]:
    """By quadrature over both logarithms."""
    logs = grid((-4.0, 4.0, 161), (-3.0, 3.0, 161))
    log_weights = torch.func.vmap(_kriging)(logs) + logs.sum(-1)
    height, length = logs.exp().numpy().T
    return moments(log_weights.numpy(), {"height": height, "length": length})


def kriging_mode() -> dict[str, Any]:
    logs = summit(_kriging, [0.0, 0.0])
    return {"height": logs[0].exp(), "length": logs[1].exp()}


def cox(x: Tensor, accidents: Tensor) -> None:
    """Counts whose log rate is a Gaussian process (J. Møller et al., 1998)."""
    f = pyro.sample("f", dist.MultivariateNormal(x.new_zeros(len(x)), covariance(x, 1.0, 1.2)))
    with pyro.plate("rows", len(x)):
        pyro.sample("accidents", dist.Poisson((1.0 + f).exp()), obs=accidents)


def cox_mode() -> dict[str, Any]:
    factor = torch.linalg.cholesky(covariance(DAYS, 1.0, 1.2))

    def log_density(f: Tensor) -> Tensor:
        scaled = torch.linalg.solve_triangular(factor, f[:, None], upper=False)
        return (ACCIDENTS * f - (1.0 + f).exp()).sum() - 0.5 * scaled.square().sum()

    return {"f": summit(log_density, [0.0] * len(DAYS))}


def cox_from_white(x: Tensor, accidents: Tensor) -> None:
    """The same posterior, in coordinates that NUTS likes."""
    white = pyro.sample("white", dist.Normal(x.new_zeros(len(x)), 1.0).to_event(1))
    f = torch.linalg.cholesky(covariance(x, 1.0, 1.2)) @ white
    with pyro.plate("rows", len(x)):
        pyro.sample("accidents", dist.Poisson((1.0 + f).exp()), obs=accidents)


def cox_from_white_quantities(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {"f": draws["white"] @ torch.linalg.cholesky(covariance(DAYS, 1.0, 1.2)).numpy().T}
