"""Regressions whose likelihood, noise or prior is not normal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.special
import torch
from pyro import poutine
from torch import Tensor

from exact import Moments, array, averaged, gamma, grid, linear_normal, moments, noise, summit

Draws = Mapping[str, np.ndarray]

DESIGN = torch.cat([torch.ones(24, 1, dtype=torch.float64), noise(24, 1, seed=11)], 1)

# --------------------------------------------------------------------------------------------- probit
VOTES = (DESIGN @ array(-0.3, 0.9) + noise(24, seed=12) > 0).double()


def probit(design: Tensor, votes: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(votes)):
        pyro.sample("votes", dist.Bernoulli(torch.special.ndtr(design @ beta)), obs=votes)


def _probit(beta: Tensor) -> Tensor:
    signed = (2.0 * VOTES - 1.0) * (beta @ DESIGN.T)
    return torch.special.log_ndtr(signed).sum(-1) - beta.square().sum(-1) / 8.0


def probit_moments() -> dict[str, Moments]:
    """By quadrature on a grid."""
    beta = grid((-4.0, 4.0, 301), (-4.0, 6.0, 301))
    return moments(_probit(beta).numpy(), {"beta": beta.numpy()})


def probit_mode() -> dict[str, Any]:
    return {"beta": summit(_probit, [0.0, 0.0])}


# -------------------------------------------------------------------------------------------- Poisson
EXPOSURE = array(*[1.0, 2.0, 0.5, 1.5] * 6)
CLAIMS = (EXPOSURE * (DESIGN @ array(0.6, 0.5)).exp() + 0.8 * noise(24, seed=13)).clamp(min=0.0).round()


def poisson_regression(design: Tensor, exposure: Tensor, claims: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(claims)):
        pyro.sample("claims", dist.Poisson(exposure * (design @ beta).exp()), obs=claims)


def _poisson_regression(beta: Tensor) -> Tensor:
    log_rate = beta @ DESIGN.T
    return (CLAIMS * log_rate - EXPOSURE * log_rate.exp()).sum(-1) - beta.square().sum(-1) / 8.0


def poisson_regression_moments() -> dict[str, Moments]:
    """By quadrature on a grid."""
    beta = grid((-1.5, 2.5, 301), (-1.5, 2.5, 301))
    return moments(_poisson_regression(beta).numpy(), {"beta": beta.numpy()})


def poisson_regression_mode() -> dict[str, Any]:
    return {"beta": summit(_poisson_regression, [0.0, 0.0])}


# ----------------------------------------------------------------------------------------- heavy tails
HEIGHTS = DESIGN @ array(1.0, -0.7) + 0.5 * noise(24, seed=14) + torch.where(torch.arange(24) % 9 == 4, 4.0, 0.0)


def robust(design: Tensor, y: Tensor) -> None:
    """Student's t with four degrees of freedom, as normal noise whose precision differs from row to row."""
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        weight = pyro.sample("weight", dist.Gamma(y.new_tensor(2.0), 2.0))
        pyro.sample("y", dist.Normal(design @ beta, 0.5 / weight.sqrt()), obs=y)


def _robust(beta: Tensor) -> Tensor:
    squared = ((HEIGHTS - beta @ DESIGN.T) / 0.5).square()
    return -2.5 * (squared / 4.0).log1p().sum(-1) - beta.square().sum(-1) / 18.0


def robust_moments() -> dict[str, Moments]:
    """By quadrature on a grid; the weights are Gamma given the coefficients."""
    beta = grid((-0.5, 2.5, 201), (-2.2, 0.8, 201))
    weight = gamma(2.5, 2.0 + 0.5 * ((HEIGHTS - beta @ DESIGN.T) / 0.5).square().numpy())
    log_weights = _robust(beta).numpy()
    return {"beta": averaged(log_weights, beta.numpy()), "weight": averaged(log_weights, weight.mean, weight.sd**2)}


def robust_mode() -> dict[str, Any]:
    return {"beta": summit(_robust, [1.0, -0.7])}


# ------------------------------------------------------------------------------------ errors in variables
TRUE = noise(12, seed=15)
MEASURED, OUTCOME = TRUE + 0.3 * noise(12, seed=16), 0.5 + 1.0 * TRUE + 0.8 * noise(12, seed=17)


def errors_in_variables(x: Tensor, y: Tensor) -> None:
    """What is regressed on is itself seen through noise."""
    intercept = pyro.sample("intercept", dist.Normal(x.new_tensor(0.0), 2.0))
    slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        true = pyro.sample("true", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(true, 0.3), obs=x)
        pyro.sample("y", dist.Normal(intercept + slope * true, 0.8), obs=y)


def _errors_in_variables(slope: np.ndarray) -> tuple[np.ndarray, ...]:
    """For each slope: log p(slope, y | x), the intercept's mean and variance; then mean and variance of true given x."""
    x, y = MEASURED.numpy(), OUTCOME.numpy()
    spread = 1 / (1 + 1 / 0.09)
    middle = spread * x / 0.09
    total = 0.64 + slope**2 * spread
    precision = 0.25 + len(y) / total
    residual = y - slope[:, None] * middle
    intercept = residual.sum(1) / total / precision
    log_weights = -0.5 * len(y) * np.log(total) - 0.5 * (residual**2).sum(1) / total
    log_weights += 0.5 * precision * intercept**2 - 0.5 * np.log(precision) - 0.5 * slope**2
    return log_weights, intercept, 1 / precision, middle, spread


def errors_in_variables_moments() -> dict[str, Moments]:
    """By quadrature over the slope; all else is jointly normal given it."""
    slope = np.linspace(-2.0, 5.0, 2001)
    log_weights, intercept, variance, middle, spread = _errors_in_variables(slope)
    precision = 1 / spread + slope**2 / 0.64
    moved = -slope / 0.64 / precision  # of true, by one of the intercept
    true = (middle / spread + slope[:, None] * OUTCOME.numpy() / 0.64) / precision[:, None] + (moved * intercept)[:, None]
    return {
        "intercept": averaged(log_weights, intercept, variance),
        "slope": averaged(log_weights, slope),
        "true": averaged(log_weights, true, (1 / precision + moved**2 * variance)[:, None]),
    }


def errors_in_variables_mode() -> dict[str, Any]:
    """Of p(intercept, slope | x, y): the true values belong to single rows, and are averaged out."""

    def log_density(point: Tensor) -> Tensor:
        total = 0.64 + 0.09 / 1.09 * point[1].square()
        residual = OUTCOME - point[0] - point[1] * MEASURED / 1.09
        prior = -(point[0] ** 2) / 8.0 - 0.5 * point[1] ** 2
        return prior - 0.5 * (len(OUTCOME) * total.log() + residual.square().sum() / total)

    point = summit(log_density, [0.5, 1.5])
    return {"intercept": point[0], "slope": point[1]}


# ------------------------------------------------------------------------------------------ horseshoe
CONTRASTS = torch.linalg.qr(torch.linspace(-1, 1, 16, dtype=torch.float64)[:, None] ** torch.arange(5))[0][:, 1:] * 4.0
CURVE = CONTRASTS @ array(1.2, 0.0, -0.1, 0.0) + 0.6 * noise(16, seed=18)


def horseshoe(design: Tensor, y: Tensor) -> None:
    """Few of the coefficients matter (C. Carvalho et al., 2010); not centred, on orthogonal polynomials."""
    overall = pyro.sample("overall", dist.HalfCauchy(y.new_tensor(0.5)))
    with pyro.plate("features", design.shape[1]):
        local = pyro.sample("local", dist.HalfCauchy(y.new_tensor(1.0)))
        raw = pyro.sample("raw", dist.Normal(y.new_tensor(0.0), 1.0))
    beta = pyro.deterministic("beta", overall * local * raw)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, 0.6), obs=y)


def horseshoe_moments() -> dict[str, Moments]:
    """By quadrature over both log scales: coefficients of orthogonal columns are independent given the overall one."""
    n = len(CURVE)
    seen, variance = (CONTRASTS.T @ CURVE).numpy() / n, 0.36 / n
    u, v = np.linspace(-14.0, 9.0, 461), np.linspace(-18.0, 22.0, 801)
    overall, local = np.exp(u), np.exp(v)
    prior = v - np.log1p(local**2)
    total = variance + (overall[:, None] * local) ** 2  # (overall, local)
    inner = prior - 0.5 * np.log(total)[:, :, None].transpose(2, 0, 1) - 0.5 * seen[:, None, None] ** 2 / total
    evidence = scipy.special.logsumexp(inner, 2)  # (feature, overall)
    log_overall = u - np.log1p((overall / 0.5) ** 2) + evidence.sum(0)
    joint = inner - evidence[:, :, None] + log_overall[:, None]
    shrunk = 1 - variance / total
    found = []
    for j in range(len(seen)):
        flat = joint[j].ravel()
        found.append(
            (averaged(flat, (shrunk * seen[j]).ravel(), (shrunk * variance).ravel()), averaged(flat, np.tile(v, len(u))))
        )
    beta, log_local = (Moments(*(np.array(part) for part in zip(*both, strict=True))) for both in zip(*found, strict=True))
    return {"beta": beta, "log_local": log_local, "log_overall": averaged(log_overall, u)}


def horseshoe_quantities(draws: Draws) -> dict[str, np.ndarray]:
    """The local scales have no variance; their logarithms do."""
    return {"beta": draws["beta"], "log_local": np.log(draws["local"]), "log_overall": np.log(draws["overall"])}


# -------------------------------------------------------------------------------------------- missing
RESULTS = DESIGN[:10] @ array(0.4, 1.1) + 0.5 * noise(10, seed=19)
IS_KNOWN = torch.arange(10) % 4 != 1


def imputed(design: Tensor, y: Tensor, is_known: Tensor) -> None:
    """Some of the responses are missing."""
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, 0.5), obs=y, obs_mask=is_known)


def imputed_moments() -> dict[str, Moments]:
    """The coefficients from the rows that are known; a missing response is one of a new row."""
    design, known = DESIGN[:10].numpy(), IS_KNOWN.numpy()
    mean, covariance, _ = linear_normal(
        design[known], RESULTS.numpy()[known], np.zeros(2), 4.0 * np.eye(2), np.full(int(known.sum()), 0.25)
    )
    new = design[~known]
    variance = np.einsum("ni,ij,nj->n", new, covariance, new) + 0.25
    return {"beta": Moments(mean, np.sqrt(np.diag(covariance))), "missing": Moments(new @ mean, np.sqrt(variance))}


def imputed_quantities(draws: Draws) -> dict[str, np.ndarray]:
    return {"beta": draws["beta"], "missing": draws["y"][..., ~IS_KNOWN.numpy()]}


def imputed_mode() -> dict[str, Any]:
    return {"beta": imputed_moments()["beta"].mean}


# ------------------------------------------------------------------------------------------- censored
TIMES = array(0.8, 2.0, 1.1, 0.3, 2.0, 1.7, 0.6, 2.0, 1.2, 1.9)
IS_OVER = TIMES < 2.0


def censored(times: Tensor, is_over: Tensor) -> None:
    """Waiting times that are exponential; some had not ended when the study did."""
    rate = pyro.sample("rate", dist.Gamma(times.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(times)):
        with poutine.mask(mask=is_over):
            pyro.sample("times", dist.Exponential(rate), obs=times)
        pyro.factor("survival", torch.where(is_over, 0.0, -rate * times))


def censored_moments() -> dict[str, Moments]:
    return {"rate": gamma(2.0 + float(IS_OVER.sum()), 1.0 + float(TIMES.sum()))}


def censored_mode() -> dict[str, Any]:
    return {"rate": (1.0 + float(IS_OVER.sum())) / (1.0 + float(TIMES.sum()))}


def weibull(times: Tensor, is_over: Tensor) -> None:
    """The same, where the risk changes with time."""
    shape = pyro.sample("shape", dist.LogNormal(times.new_tensor(0.0), 0.5))
    scale = pyro.sample("scale", dist.LogNormal(times.new_tensor(0.5), 0.5))
    with pyro.plate("rows", len(times)):
        with poutine.mask(mask=is_over):
            pyro.sample("times", dist.Weibull(scale, shape), obs=times)
        with poutine.mask(mask=~is_over):
            pyro.factor("survival", -((times / scale) ** shape))


def _weibull(logs: Tensor) -> Tensor:
    """log p(shape, scale, times) as densities of shape and scale, at their logarithms (..., 2)."""
    shape, log_scale = logs[..., :1].exp(), logs[..., 1:]
    standard = TIMES.log() - log_scale
    over = shape.log() - log_scale + (shape - 1) * standard
    prior = -0.5 * (logs[..., 0] / 0.5).square() - 0.5 * ((logs[..., 1] - 0.5) / 0.5).square() - logs.sum(-1)
    return prior + torch.where(IS_OVER, over, 0.0).sum(-1) - (shape * standard).exp().sum(-1)


def weibull_moments() -> dict[str, Moments]:
    """By quadrature over both logarithms."""
    logs = grid((-2.0, 2.5, 301), (-1.5, 3.0, 301))
    shape, scale = logs.exp().numpy().T
    return moments((_weibull(logs) + logs.sum(-1)).numpy(), {"shape": shape, "scale": scale})


def weibull_mode() -> dict[str, Any]:
    logs = summit(_weibull, [0.3, 0.5])
    return {"shape": logs[0].exp(), "scale": logs[1].exp()}
