"""Coefficients, covariances and precisions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from exact import Moments, array, noise
from pyro_genmodels.distributions import InverseWishart

DESIGN = torch.cat([torch.ones(30, 1, dtype=torch.float64), noise(30, 2, seed=2)], 1)
RESPONSE = DESIGN @ array(0.5, -1.0, 2.0) + 0.7 * noise(30, seed=3)
PRIOR_FACTOR = array([2.0, 0.0, 0.0], [1.0, 1.5, 0.0], [-0.5, 0.3, 1.0])


def regression_event(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, 0.7), obs=y)


def regression_plate(design: Tensor, y: Tensor) -> None:
    with pyro.plate("features", 3):
        beta = pyro.sample("beta", dist.Normal(design.new_zeros(()), 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, 0.7), obs=y)


def regression_matrix(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.MultivariateNormal(design.new_zeros(3), scale_tril=PRIOR_FACTOR.to(design)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, 0.7), obs=y)


def _regression(prior_precision: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (3,) and covariance (3, 3) of the coefficients."""
    design, y = DESIGN.numpy(), RESPONSE.numpy()
    covariance = np.linalg.inv(prior_precision + design.T @ design / 0.49)
    return covariance @ design.T @ y / 0.49, covariance


def _regression_moments(prior_precision: np.ndarray) -> dict[str, Moments]:
    mean, covariance = _regression(prior_precision)
    return {"beta": Moments(mean, np.sqrt(np.diag(covariance)))}


_EYE = np.eye(3) / 4.0
_MATRIX = np.linalg.inv(PRIOR_FACTOR.numpy() @ PRIOR_FACTOR.numpy().T)


def regression_moments() -> dict[str, Moments]:
    return _regression_moments(_EYE)


def regression_mode() -> dict[str, Any]:
    return {"beta": _regression(_EYE)[0]}


def regression_matrix_moments() -> dict[str, Moments]:
    return _regression_moments(_MATRIX)


def regression_matrix_mode() -> dict[str, Any]:
    return {"beta": _regression(_MATRIX)[0]}


def flat_regression(design: Tensor, y: Tensor) -> None:
    """p(beta, noise) ∝ 1: beta is multivariate t, noise² scaled inverse χ²."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (3,)))
    noise = pyro.sample("noise", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, noise), obs=y)


def _least_squares() -> tuple[np.ndarray, np.ndarray, float]:
    design, y = DESIGN.numpy(), RESPONSE.numpy()
    beta = np.linalg.solve(design.T @ design, design.T @ y)
    return beta, np.linalg.inv(design.T @ design), float(((y - design @ beta) ** 2).sum())


def flat_regression_moments() -> dict[str, Moments]:
    beta, inverse, residual = _least_squares()
    freedom = len(RESPONSE) - 3 - 1  # a flat sd, not a flat log sd, costs one more
    variance = residual / (freedom - 2)
    log_mean = 0.5 * math.log(residual / 2) + math.lgamma((freedom - 1) / 2) - math.lgamma(freedom / 2)
    noise = math.exp(log_mean)
    return {
        "beta": Moments(beta, np.sqrt(variance * np.diag(inverse))),
        "noise": Moments(noise, math.sqrt(variance - noise**2)),
    }


def flat_regression_mode() -> dict[str, Any]:
    beta, _, residual = _least_squares()
    return {"beta": beta, "noise": math.sqrt(residual / len(RESPONSE))}


PAIRS = noise(20, 2, seed=4) @ array([1.5, 0.0], [0.8, 0.6]).T
SCATTER = (PAIRS.T @ PAIRS).numpy()
SCALE_MATRIX = array([2.0, 0.5], [0.5, 1.0])


def covariance(pairs: Tensor) -> None:
    matrix = pyro.sample("matrix", InverseWishart(5.0, SCALE_MATRIX.to(pairs)))
    with pyro.plate("rows", len(pairs)):
        factor = torch.linalg.cholesky(matrix)
        pyro.sample("pairs", dist.MultivariateNormal(pairs.new_zeros(2), scale_tril=factor), obs=pairs)


def covariance_moments() -> dict[str, Moments]:
    """A. Gupta and D. Nagar, Matrix Variate Distributions (2000), theorem 3.4.3, with ν degrees of freedom in our sense."""
    df, psi = 5.0 + len(PAIRS), SCALE_MATRIX.numpy() + SCATTER
    below = df - 2  # ν − D
    mean = psi / (below - 1)
    diagonal = np.diag(psi)
    variance = ((below + 1) * psi**2 + (below - 1) * np.outer(diagonal, diagonal)) / (below * (below - 1) ** 2 * (below - 3))
    return {"matrix": Moments(mean, np.sqrt(variance))}


def covariance_mode() -> dict[str, Any]:
    return {"matrix": (SCALE_MATRIX.numpy() + SCATTER) / (5.0 + len(PAIRS) + 3)}


def precision(pairs: Tensor) -> None:
    matrix = pyro.sample("matrix", dist.Wishart(pairs.new_tensor(5.0), covariance_matrix=SCALE_MATRIX.to(pairs)))
    with pyro.plate("rows", len(pairs)):
        pyro.sample("pairs", dist.MultivariateNormal(pairs.new_zeros(2), precision_matrix=matrix), obs=pairs)


def precision_moments() -> dict[str, Moments]:
    df, scale = 5.0 + len(PAIRS), np.linalg.inv(np.linalg.inv(SCALE_MATRIX.numpy()) + SCATTER)
    diagonal = np.diag(scale)
    return {"matrix": Moments(df * scale, np.sqrt(df * (scale**2 + np.outer(diagonal, diagonal))))}


def precision_mode() -> dict[str, Any]:
    df, scale = 5.0 + len(PAIRS), np.linalg.inv(np.linalg.inv(SCALE_MATRIX.numpy()) + SCATTER)
    return {"matrix": (df - 3) * scale}
