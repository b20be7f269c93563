"""One parameter, or one and a variance: the textbook of conjugate families."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor, nn

from exact import Moments, array, averaged, dirichlet, gamma, inverse_gamma, noise


class Guide(nn.Module):
    """A guide whose family contains the posterior; the logarithms of its parameters are its weights."""

    def __init__(self, size: int, start: float = 2.0) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((size,), start, dtype=torch.float64))

    def moments(self) -> dict[str, Moments]:
        """Mean and standard deviation of every site, by the formula of its family."""
        raise NotImplementedError


FLIPS, TRIALS = array(3, 7, 4, 6, 8, 2, 5), 10


def beta_binomial(successes: Tensor) -> None:
    fairness = pyro.sample("fairness", dist.Beta(successes.new_tensor(2.0), 3.0))
    with pyro.plate("rows", len(successes)):
        pyro.sample("successes", dist.Binomial(TRIALS, fairness), obs=successes)


def _beta() -> tuple[float, float]:
    return 2.0 + float(FLIPS.sum()), 3.0 + float((TRIALS - FLIPS).sum())


def beta_binomial_moments() -> dict[str, Moments]:
    a, b = _beta()
    return {"fairness": Moments(a / (a + b), math.sqrt(a * b / (a + b + 1)) / (a + b))}


def beta_binomial_mode() -> dict[str, Any]:
    a, b = _beta()
    return {"fairness": (a - 1) / (a + b - 2)}


class BetaGuide(Guide):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, successes: Tensor) -> None:
        a, b = self.log.exp()
        pyro.sample("fairness", dist.Beta(a, b))

    def moments(self) -> dict[str, Moments]:
        a, b = self.log.exp().tolist()
        return {"fairness": Moments(a / (a + b), math.sqrt(a * b / (a + b + 1)) / (a + b))}


COUNTS = array(2, 0, 4, 1, 3, 2, 5, 1, 0, 2, 3, 1)


def gamma_poisson(counts: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
    with pyro.plate("rows", len(counts)):
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


def _gamma_poisson(power: float) -> tuple[float, float]:
    return 2.0 + power * float(COUNTS.sum()), 0.5 + power * len(COUNTS)


def gamma_poisson_moments(power: float = 1.0) -> dict[str, Moments]:
    return {"rate": gamma(*_gamma_poisson(power))}


def gamma_poisson_mode(power: float = 1.0) -> dict[str, Any]:
    a, b = _gamma_poisson(power)
    return {"rate": (a - 1) / b}


class GammaGuide(Guide):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, counts: Tensor) -> None:
        concentration, rate = self.log.exp()
        pyro.sample("rate", dist.Gamma(concentration, rate))

    def moments(self) -> dict[str, Moments]:
        return {"rate": gamma(*self.log.exp().tolist())}


def tempered(counts: Tensor) -> None:
    """A likelihood to the power of a half."""
    rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
    with poutine.scale(scale=0.5), pyro.plate("rows", len(counts)):
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


def tempered_moments() -> dict[str, Moments]:
    return gamma_poisson_moments(0.5)


def tempered_mode() -> dict[str, Any]:
    return gamma_poisson_mode(0.5)


TABLE = array([3, 1, 4, 2], [2, 2, 5, 1], [4, 0, 4, 2])
PRIOR = array(2.0, 1.5, 1.0, 3.0)


def dirichlet_multinomial(table: Tensor) -> None:
    shares = pyro.sample("shares", dist.Dirichlet(PRIOR.to(table)))
    with pyro.plate("rows", len(table)):
        pyro.sample("table", dist.Multinomial(10, shares), obs=table)


def dirichlet_multinomial_moments() -> dict[str, Moments]:
    return {"shares": dirichlet((PRIOR + TABLE.sum(0)).numpy())}


def dirichlet_multinomial_mode() -> dict[str, Any]:
    counts = PRIOR + TABLE.sum(0) - 1
    return {"shares": counts / counts.sum()}


class DirichletGuide(Guide):
    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, table: Tensor) -> None:
        pyro.sample("shares", dist.Dirichlet(self.log.exp()))

    def moments(self) -> dict[str, Moments]:
        return {"shares": dirichlet(self.log.detach().exp().cpu().numpy())}


WAITS = array(0.3, 1.7, 0.2, 0.9, 2.4, 0.6, 0.1, 1.1, 0.8, 0.5)


def exponential_gamma(waits: Tensor) -> None:
    rate = pyro.sample("rate", dist.Exponential(waits.new_tensor(0.5)))
    with pyro.plate("rows", len(waits)):
        pyro.sample("waits", dist.Exponential(rate), obs=waits)


def exponential_gamma_moments() -> dict[str, Moments]:
    return {"rate": gamma(1.0 + len(WAITS), 0.5 + float(WAITS.sum()))}


def exponential_gamma_mode() -> dict[str, Any]:
    return {"rate": len(WAITS) / (0.5 + float(WAITS.sum()))}


def lognormal(sizes: Tensor) -> None:
    middle = pyro.sample("middle", dist.LogNormal(sizes.new_tensor(0.5), 1.0))
    with pyro.plate("rows", len(sizes)):
        pyro.sample("sizes", dist.LogNormal(middle.log(), 0.8), obs=sizes)


def _lognormal() -> tuple[float, float]:
    """Mean and variance of the logarithm of the middle."""
    variance = 1 / (1 + len(WAITS) / 0.64)
    return variance * (0.5 + float(WAITS.log().sum()) / 0.64), variance


class LogNormalGuide(Guide):
    def __init__(self) -> None:
        super().__init__(2, 0.0)

    def forward(self, sizes: Tensor) -> None:
        pyro.sample("middle", dist.LogNormal(self.log[0], self.log[1].exp()))

    def moments(self) -> dict[str, Moments]:
        m, log_sd = self.log.tolist()
        return _lognormal_moments(m, math.exp(2 * log_sd))


def _lognormal_moments(m: float, v: float) -> dict[str, Moments]:
    return {"middle": Moments(math.exp(m + v / 2), math.exp(m + v / 2) * math.sqrt(math.expm1(v)))}


def lognormal_moments() -> dict[str, Moments]:
    return _lognormal_moments(*_lognormal())


def lognormal_mode() -> dict[str, Any]:
    m, v = _lognormal()
    return {"middle": math.exp(m - v)}


SCALARS = 1.5 + 2.0 * noise(24, seed=1)


def normal_variance(y: Tensor) -> None:
    """Unknown mean and variance, conjugate: (variance, mean) is normal-inverse-gamma."""
    variance = pyro.sample("variance", dist.InverseGamma(y.new_tensor(3.0), 4.0))
    mean = pyro.sample("mean", dist.Normal(0.0, (variance / 0.5).sqrt()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)


def _normal_inverse_gamma() -> tuple[float, float, float, float]:
    """k, m, a, b of variance ~ InverseGamma(a, b), mean ~ N(m, variance / k)."""
    n, total = len(SCALARS), float(SCALARS.sum())
    k = 0.5 + n
    m = total / k
    return k, m, 3.0 + n / 2, 4.0 + 0.5 * (float(SCALARS.square().sum()) - k * m**2)


class NormalInverseGammaGuide(Guide):
    def __init__(self) -> None:
        super().__init__(3)
        self.m = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, y: Tensor) -> None:
        k, a, b = self.log.exp()
        variance = pyro.sample("variance", dist.InverseGamma(a, b))
        pyro.sample("mean", dist.Normal(self.m, (variance / k).sqrt()))

    def moments(self) -> dict[str, Moments]:
        k, a, b = self.log.exp().tolist()
        return _normal_inverse_gamma_moments(k, self.m.item(), a, b)


def _normal_inverse_gamma_moments(k: float, m: float, a: float, b: float) -> dict[str, Moments]:
    return {"mean": Moments(m, math.sqrt(b / (a - 1) / k)), "variance": inverse_gamma(a, b)}


def normal_variance_moments() -> dict[str, Moments]:
    return _normal_inverse_gamma_moments(*_normal_inverse_gamma())


def normal_variance_mode() -> dict[str, Any]:
    _, m, a, b = _normal_inverse_gamma()
    return {"mean": m, "variance": b / (a + 1.5)}


def normal_independent(y: Tensor) -> None:
    """Unknown mean and variance with independent priors: each conditional is conjugate, the joint is not."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 1.0))
    variance = pyro.sample("variance", dist.InverseGamma(y.new_tensor(3.0), 4.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)


def normal_independent_moments() -> dict[str, Moments]:
    """By quadrature over log variance; the mean is normal given the variance, and integrates out."""
    n, average = len(SCALARS), float(SCALARS.mean())
    spread = float((SCALARS - average).square().sum())
    v = np.exp(np.linspace(math.log(0.2), math.log(80.0), 4001))
    log_prior = -3.0 * np.log(v) - 4.0 / v  # of log v
    log_likelihood = -0.5 * (n - 1) * np.log(v) - 0.5 * spread / v
    log_average = -0.5 * np.log(1.0 + v / n) - 0.5 * average**2 / (1.0 + v / n)
    log_weights = log_prior + log_likelihood + log_average
    precision = 1.0 + n / v
    mean = averaged(log_weights, n * average / v / precision, 1 / precision)
    return {"mean": mean, "variance": averaged(log_weights, v, np.zeros_like(v))}


def normal_independent_mode() -> dict[str, Any]:
    n, total, mean, variance = len(SCALARS), float(SCALARS.sum()), 0.0, 1.0
    for _ in range(1000):  # both equations for zero gradient, in turn
        mean = total / variance / (1.0 + n / variance)
        variance = (4.0 + 0.5 * float((SCALARS - mean).square().sum())) / (3.0 + 1.0 + 0.5 * n)
    return {"mean": mean, "variance": variance}


IS_SEEN = torch.arange(len(SCALARS)) % 3 != 0


def masked(y: Tensor, is_seen: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 3.0))
    with pyro.plate("rows", len(y)), poutine.mask(mask=is_seen):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y)


def masked_moments() -> dict[str, Moments]:
    precision = 1 / 9 + int(IS_SEEN.sum()) / 4
    return {"mean": Moments(float(SCALARS[IS_SEEN].sum()) / 4 / precision, precision**-0.5)}


def masked_mode() -> dict[str, Any]:
    return {"mean": masked_moments()["mean"].mean}


def flat_location(y: Tensor) -> None:
    location = pyro.sample("location", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(location, 2.0), obs=y)


def flat_location_moments() -> dict[str, Moments]:
    return {"location": Moments(float(SCALARS.mean()), 2.0 / math.sqrt(len(SCALARS)))}


def flat_location_mode() -> dict[str, Any]:
    return {"location": float(SCALARS.mean())}
