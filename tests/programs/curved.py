"""Densities that no family describes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from exact import Moments, array, averaged, noise
from programs.scalars import WAITS
from programs.vectors import DESIGN

LABELS = (DESIGN[:, :2] @ array(0.3, 1.2) + 0.8 * noise(30, seed=10) > 0).double()


def logistic(design: Tensor, labels: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(labels)):
        pyro.sample("labels", dist.Bernoulli(logits=design @ beta), obs=labels)


def _logistic_log_density(beta: Tensor) -> Tensor:
    logits = beta @ DESIGN[:, :2].T
    return (LABELS * logits - torch.nn.functional.softplus(logits)).sum(-1) - beta.square().sum(-1) / 8


def logistic_moments() -> dict[str, Moments]:
    """By quadrature on a grid; the trapezoidal rule converges geometrically on a smooth density that decays."""
    axis = torch.linspace(-9.0, 11.0, 801, dtype=torch.float64)
    beta = torch.cartesian_prod(axis, axis)
    return {"beta": averaged(_logistic_log_density(beta).numpy(), beta.numpy(), np.zeros(beta.shape))}


def logistic_mode() -> dict[str, Any]:
    beta = torch.zeros(2, dtype=torch.float64)
    for _ in range(50):
        gradient, hessian = torch.func.grad(_logistic_log_density)(beta), torch.func.hessian(_logistic_log_density)(beta)
        beta = beta - torch.linalg.solve(hessian, gradient)
    return {"beta": beta}


def gamma_shape(waits: Tensor) -> None:
    """One site with a conjugate conditional beside one without."""
    shape = pyro.sample("shape", dist.LogNormal(waits.new_tensor(0.0), 0.7))
    rate = pyro.sample("rate", dist.Gamma(waits.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(waits)):
        pyro.sample("waits", dist.Gamma(shape, rate), obs=waits)


def gamma_shape_moments() -> dict[str, Moments]:
    """By quadrature over log shape; the rate is Gamma given the shape, and integrates out."""
    n, total, logs = len(WAITS), float(WAITS.sum()), float(WAITS.log().sum())
    u = np.linspace(-4.0, 4.0, 4001)
    shape = np.exp(u)
    a, b = 2.0 + n * shape, 1.0 + total
    log_weights = -0.5 * (u / 0.7) ** 2 + shape * logs - n * scipy.special.gammaln(shape)
    log_weights = log_weights + scipy.special.gammaln(a) - a * math.log(b)
    return {
        "shape": averaged(log_weights, shape, np.zeros_like(shape)),
        "rate": averaged(log_weights, a / b, a / b**2),
    }


THINNED = array(1, 0, 3)


def thinned(seen: Tensor) -> None:
    """Counts with infinitely many values: those not seen are Poisson(4 · 0.7)."""
    with pyro.plate("rows", len(seen)):
        count = pyro.sample("count", dist.Poisson(seen.new_tensor(4.0)))
        pyro.sample("seen", dist.Binomial(count, 0.3), obs=seen)


def thinned_moments() -> dict[str, Moments]:
    return {"count": Moments(THINNED + 2.8, torch.full((3,), math.sqrt(2.8)))}
