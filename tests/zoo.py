"""The table of instances: small programs with data, the plan that Gibbs finds, and the exact posterior by formula.

A law is a test over the table; an instance is a row of it. Every exact value comes from a formula in this file (conjugate
updating, enumeration of all assignments, or quadrature of one or two dimensions), never from a run.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.optimize
import scipy.special
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor, nn

from pyro_genmodels import datasets
from pyro_genmodels.distributions import InverseWishart

__all__ = ["BY_NAME", "ZOO", "Guide", "Instance", "Moments"]


class Moments(NamedTuple):
    """Exact posterior mean and standard deviation of every element of a site, both (*site)."""

    mean: Any
    sd: Any


@dataclass(frozen=True)
class Instance:
    """A program with its data.

    Attributes:
        program: A plain Pyro program.
        data: Its arguments, on the CPU.
        plan: Site to the update that Gibbs should choose.
        solution: Returns the exact moments of the posterior, site to ``Moments``; None if there is no formula.
        peak: Returns where the constrained density, with its finite sites and those local to an observed plate averaged
            out, is largest; site to value. None if there is no formula.
        guide: Class of guides whose family contains the posterior, Pyro's automatic ones among them; None if there is none.
        refused: Names of back-ends that cannot run it.
    """

    program: Callable[..., Any]
    data: tuple[Tensor, ...]
    plan: dict[str, str]
    solution: Callable[[], dict[str, Moments]] | None = None
    peak: Callable[[], dict[str, Any]] | None = None
    guide: type[Guide] | type[AutoGuide] | None = None
    refused: frozenset[str] = field(default=frozenset())

    @property
    def name(self) -> str:
        return self.program.__name__

    @cached_property
    def moments(self) -> dict[str, Moments]:
        assert self.solution is not None
        return {site: Moments(*(np.asarray(part, float) for part in both)) for site, both in self.solution().items()}

    @cached_property
    def mode(self) -> dict[str, np.ndarray]:
        assert self.peak is not None
        return {site: np.asarray(value, float) for site, value in self.peak().items()}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arguments on a device."""
        return tuple(tensor.to(device) for tensor in self.data)


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _array(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _averaged(log_weights: np.ndarray, means: np.ndarray, variances: np.ndarray) -> Moments:
    """Moments of a mixture: weights (m,), means and variances (m, *site) or (*site) of its parts."""
    weights = scipy.special.softmax(log_weights.ravel())
    means = np.broadcast_to(means, (len(weights), *means.shape[1:]))
    mean = np.tensordot(weights, means, 1)
    return Moments(mean, np.sqrt(np.tensordot(weights, variances + (means - mean) ** 2, 1)))


def _gamma(concentration: Any, rate: Any) -> Moments:
    return Moments(concentration / rate, np.sqrt(concentration) / rate)


def _inverse_gamma(concentration: Any, rate: Any) -> Moments:
    mean = rate / (concentration - 1)
    return Moments(mean, mean / np.sqrt(concentration - 2))


def _dirichlet(concentration: np.ndarray) -> Moments:
    total = concentration.sum(-1, keepdims=True)
    mean = concentration / total
    return Moments(mean, np.sqrt(mean * (1 - mean) / (total + 1)))


class Guide(nn.Module):
    """A guide whose family contains the posterior; the logarithms of its parameters are its weights."""

    def __init__(self, size: int, start: float = 2.0) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.full((size,), start, dtype=torch.float64))

    def moments(self) -> dict[str, Moments]:
        """Mean and standard deviation of every site, by the formula of its family."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------- one parameter
FLIPS, TRIALS = _array(3, 7, 4, 6, 8, 2, 5), 10


def beta_binomial(successes: Tensor) -> None:
    fairness = pyro.sample("fairness", dist.Beta(successes.new_tensor(2.0), 3.0))
    with pyro.plate("rows", len(successes)):
        pyro.sample("successes", dist.Binomial(TRIALS, fairness), obs=successes)


def _beta() -> tuple[float, float]:
    return 2.0 + float(FLIPS.sum()), 3.0 + float((TRIALS - FLIPS).sum())


def _beta_moments() -> dict[str, Moments]:
    a, b = _beta()
    return {"fairness": Moments(a / (a + b), math.sqrt(a * b / (a + b + 1)) / (a + b))}


class BetaGuide(Guide):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, successes: Tensor) -> None:
        a, b = self.log.exp()
        pyro.sample("fairness", dist.Beta(a, b))

    def moments(self) -> dict[str, Moments]:
        a, b = self.log.exp().tolist()
        return {"fairness": Moments(a / (a + b), math.sqrt(a * b / (a + b + 1)) / (a + b))}


COUNTS = _array(2, 0, 4, 1, 3, 2, 5, 1, 0, 2, 3, 1)


def gamma_poisson(counts: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
    with pyro.plate("rows", len(counts)):
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


class GammaGuide(Guide):
    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, counts: Tensor) -> None:
        concentration, rate = self.log.exp()
        pyro.sample("rate", dist.Gamma(concentration, rate))

    def moments(self) -> dict[str, Moments]:
        return {"rate": _gamma(*self.log.exp().tolist())}


def tempered(counts: Tensor) -> None:
    """A likelihood to the power of a half."""
    rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
    with poutine.scale(scale=0.5), pyro.plate("rows", len(counts)):
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


TABLE = _array([3, 1, 4, 2], [2, 2, 5, 1], [4, 0, 4, 2])
PRIOR = _array(2.0, 1.5, 1.0, 3.0)


def dirichlet_multinomial(table: Tensor) -> None:
    shares = pyro.sample("shares", dist.Dirichlet(PRIOR.to(table)))
    with pyro.plate("rows", len(table)):
        pyro.sample("table", dist.Multinomial(10, shares), obs=table)


class DirichletGuide(Guide):
    def __init__(self) -> None:
        super().__init__(4)

    def forward(self, table: Tensor) -> None:
        pyro.sample("shares", dist.Dirichlet(self.log.exp()))

    def moments(self) -> dict[str, Moments]:
        return {"shares": _dirichlet(self.log.detach().exp().cpu().numpy())}


WAITS = _array(0.3, 1.7, 0.2, 0.9, 2.4, 0.6, 0.1, 1.1, 0.8, 0.5)


def exponential_gamma(waits: Tensor) -> None:
    rate = pyro.sample("rate", dist.Exponential(waits.new_tensor(0.5)))
    with pyro.plate("rows", len(waits)):
        pyro.sample("waits", dist.Exponential(rate), obs=waits)


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


SCALARS = 1.5 + 2.0 * _normal(24, seed=1)


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
    return {"mean": Moments(m, math.sqrt(b / (a - 1) / k)), "variance": _inverse_gamma(a, b)}


def _normal_variance_mode() -> dict[str, Any]:
    _, m, a, b = _normal_inverse_gamma()
    return {"mean": m, "variance": b / (a + 1.5)}


def normal_independent(y: Tensor) -> None:
    """Unknown mean and variance with independent priors: each conditional is conjugate, the joint is not."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 1.0))
    variance = pyro.sample("variance", dist.InverseGamma(y.new_tensor(3.0), 4.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)


def _normal_independent_moments() -> dict[str, Moments]:
    """By quadrature over log variance; the mean is normal given the variance, and integrates out."""
    n, average = len(SCALARS), float(SCALARS.mean())
    spread = float((SCALARS - average).square().sum())
    v = np.exp(np.linspace(math.log(0.2), math.log(80.0), 4001))
    log_prior = -3.0 * np.log(v) - 4.0 / v  # of log v
    log_likelihood = -0.5 * (n - 1) * np.log(v) - 0.5 * spread / v
    log_average = -0.5 * np.log(1.0 + v / n) - 0.5 * average**2 / (1.0 + v / n)
    log_weights = log_prior + log_likelihood + log_average
    precision = 1.0 + n / v
    mean = _averaged(log_weights, n * average / v / precision, 1 / precision)
    return {"mean": mean, "variance": _averaged(log_weights, v, np.zeros_like(v))}


def _normal_independent_mode() -> dict[str, Any]:
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


def _masked_moments() -> dict[str, Moments]:
    precision = 1 / 9 + int(IS_SEEN.sum()) / 4
    return {"mean": Moments(float(SCALARS[IS_SEEN].sum()) / 4 / precision, precision**-0.5)}


def flat_location(y: Tensor) -> None:
    location = pyro.sample("location", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(location, 2.0), obs=y)


# --------------------------------------------------------------------------------- several parameters
DESIGN = torch.cat([torch.ones(30, 1, dtype=torch.float64), _normal(30, 2, seed=2)], 1)
RESPONSE = DESIGN @ _array(0.5, -1.0, 2.0) + 0.7 * _normal(30, seed=3)
PRIOR_FACTOR = _array([2.0, 0.0, 0.0], [1.0, 1.5, 0.0], [-0.5, 0.3, 1.0])


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


def _flat_regression_moments() -> dict[str, Moments]:
    beta, inverse, residual = _least_squares()
    freedom = len(RESPONSE) - 3 - 1  # a flat sd, not a flat log sd, costs one more
    variance = residual / (freedom - 2)
    log_mean = 0.5 * math.log(residual / 2) + math.lgamma((freedom - 1) / 2) - math.lgamma(freedom / 2)
    noise = math.exp(log_mean)
    return {
        "beta": Moments(beta, np.sqrt(variance * np.diag(inverse))),
        "noise": Moments(noise, math.sqrt(variance - noise**2)),
    }


def _flat_regression_mode() -> dict[str, Any]:
    beta, _, residual = _least_squares()
    return {"beta": beta, "noise": math.sqrt(residual / len(RESPONSE))}


PAIRS = _normal(20, 2, seed=4) @ _array([1.5, 0.0], [0.8, 0.6]).T
SCATTER = (PAIRS.T @ PAIRS).numpy()
SCALE_MATRIX = _array([2.0, 0.5], [0.5, 1.0])


def covariance(pairs: Tensor) -> None:
    matrix = pyro.sample("matrix", InverseWishart(5.0, SCALE_MATRIX.to(pairs)))
    with pyro.plate("rows", len(pairs)):
        factor = torch.linalg.cholesky(matrix)
        pyro.sample("pairs", dist.MultivariateNormal(pairs.new_zeros(2), scale_tril=factor), obs=pairs)


def _covariance_moments() -> dict[str, Moments]:
    """A. Gupta and D. Nagar, Matrix Variate Distributions (2000), theorem 3.4.3, with ν degrees of freedom in our sense."""
    df, psi = 5.0 + len(PAIRS), SCALE_MATRIX.numpy() + SCATTER
    below = df - 2  # ν − D
    mean = psi / (below - 1)
    diagonal = np.diag(psi)
    variance = ((below + 1) * psi**2 + (below - 1) * np.outer(diagonal, diagonal)) / (below * (below - 1) ** 2 * (below - 3))
    return {"matrix": Moments(mean, np.sqrt(variance))}


def precision(pairs: Tensor) -> None:
    matrix = pyro.sample("matrix", dist.Wishart(pairs.new_tensor(5.0), covariance_matrix=SCALE_MATRIX.to(pairs)))
    with pyro.plate("rows", len(pairs)):
        pyro.sample("pairs", dist.MultivariateNormal(pairs.new_zeros(2), precision_matrix=matrix), obs=pairs)


def _precision_moments() -> dict[str, Moments]:
    df, scale = 5.0 + len(PAIRS), np.linalg.inv(np.linalg.inv(SCALE_MATRIX.numpy()) + SCATTER)
    diagonal = np.diag(scale)
    return {"matrix": Moments(df * scale, np.sqrt(df * (scale**2 + np.outer(diagonal, diagonal))))}


def _precision_mode() -> dict[str, Any]:
    df, scale = 5.0 + len(PAIRS), np.linalg.inv(np.linalg.inv(SCALE_MATRIX.numpy()) + SCATTER)
    return {"matrix": (df - 3) * scale}


# ------------------------------------------------------------------------------------- plates, loops
NESTED = _array([3, 1, 2, 4], [7, 9, 6, 8], [0, 1, 0, 2])


def nested(counts: Tensor) -> None:
    """Rates in a plate, counts in a plate inside it."""
    with pyro.plate("groups", len(counts), dim=-2):
        rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
        with pyro.plate("members", counts.shape[1], dim=-1):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)


def _nested_gamma() -> tuple[np.ndarray, float]:
    return 2.0 + NESTED.sum(1, keepdim=True).numpy(), 0.5 + NESTED.shape[1]


CROSSED = _normal(4, 3, seed=5) + _array(0.0, 1.0, -1.0, 2.0)[:, None]


def crossed(y: Tensor) -> None:
    """Row effects and column effects: two plates, neither inside the other."""
    rows, columns = pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", y.shape[1], dim=-1)
    with rows:
        row = pyro.sample("row", dist.Normal(y.new_tensor(0.0), 1.0))
    with columns:
        column = pyro.sample("column", dist.Normal(y.new_tensor(0.0), 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(row + column, 1.0), obs=y)


def _crossed_moments() -> dict[str, Moments]:
    """All seven effects are jointly normal."""
    rows, columns = CROSSED.shape
    design = np.concatenate([np.kron(np.eye(rows), np.ones((columns, 1))), np.kron(np.ones((rows, 1)), np.eye(columns))], 1)
    joint = np.linalg.inv(np.eye(rows + columns) + design.T @ design)
    mean, sd = joint @ design.T @ CROSSED.numpy().ravel(), np.sqrt(np.diag(joint))
    return {
        "row": Moments(mean[:rows, None], sd[:rows, None]),
        "column": Moments(mean[rows:], sd[rows:]),
    }


STEPS = _array(0.4, 1.1, 0.7, 2.3)


def random_walk(y: Tensor) -> None:
    """A chain of normal states, written as a loop."""
    state = y.new_zeros(())
    for i in range(len(y)):
        state = pyro.sample(f"state_{i}", dist.Normal(state, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(state, 0.5), obs=y[i])


def _random_walk_moments() -> dict[str, Moments]:
    n = len(STEPS)
    difference = np.eye(n) - np.eye(n, k=-1)
    joint = np.linalg.inv(difference.T @ difference + np.eye(n) / 0.25)
    mean, sd = joint @ STEPS.numpy() / 0.25, np.sqrt(np.diag(joint))
    return {f"state_{i}": Moments(mean[i], sd[i]) for i in range(n)}


GROUPS, REPEATS = 8, 5
GROUPED = 3.0 + 2.0 * _normal(GROUPS, 1, seed=6) + 1.2 * _normal(GROUPS, REPEATS, seed=7)


def hierarchical(y: Tensor) -> None:
    """Normal groups of normal observations; all variances unknown."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 5.0))
    between = pyro.sample("between", dist.InverseGamma(y.new_tensor(3.0), 6.0))
    within = pyro.sample("within", dist.InverseGamma(y.new_tensor(3.0), 4.0))
    with pyro.plate("groups", len(y), dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, between.sqrt()))
        with pyro.plate("repeats", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(effect, within.sqrt()), obs=y)


def _hierarchical_marginal(between: Any, within: Any) -> tuple[Any, Any, Any]:
    """log p(y, between, within) up to a constant with effects and mean integrated out, and the mean's mean and precision."""
    averages = GROUPED.mean(1).numpy()
    spread = float((GROUPED - GROUPED.mean(1, keepdim=True)).square().sum())
    total = between + within / REPEATS  # variance of a group's average
    precision = 1 / 25 + GROUPS / total
    mean = averages.sum() / total / precision
    log_prior = -4.0 * np.log(between) - 6.0 / between - 4.0 * np.log(within) - 4.0 / within
    log_within = -0.5 * GROUPS * (REPEATS - 1) * np.log(within) - 0.5 * spread / within
    log_averages = -0.5 * GROUPS * np.log(total) - 0.5 * (averages**2).sum() / total
    return log_prior + log_within + log_averages - 0.5 * np.log(precision) + 0.5 * precision * mean**2, mean, precision


def _hierarchical_moments() -> dict[str, Moments]:
    """By quadrature over the logarithms of both variances; mean and effects are normal given them."""
    u = np.linspace(math.log(0.1), math.log(300.0), 801)
    w = np.linspace(math.log(0.1), math.log(30.0), 601)
    between, within = (np.exp(grid).ravel() for grid in np.meshgrid(u, w))
    log_weights, mean, precision = _hierarchical_marginal(between, within)
    log_weights = log_weights + np.log(between) + np.log(within)
    averages = GROUPED.mean(1).numpy()
    share = between / (between + within / REPEATS)  # of the group's own average
    effect_mean = share[:, None] * averages + (1 - share[:, None]) * mean[:, None]
    effect_variance = share * within / REPEATS + (1 - share) ** 2 / precision
    effect = _averaged(log_weights, effect_mean, effect_variance[:, None])
    zero = np.zeros_like(between)
    return {
        "mean": _averaged(log_weights, mean, 1 / precision),
        "between": _averaged(log_weights, between, zero),
        "within": _averaged(log_weights, within, zero),
        "effect": Moments(effect.mean[:, None], effect.sd[:, None]),
    }


def _hierarchical_mode() -> dict[str, Any]:
    """The effects are local to the observations' plate, and averaged out; the mean is not."""
    averages = GROUPED.mean(1).numpy()

    def negative(point: np.ndarray) -> float:
        mean, between, within = point[0], math.exp(point[1]), math.exp(point[2])
        log_marginal, middle, precision = _hierarchical_marginal(between, within)
        # p(y, mean, variances) from the marginal, which has the mean integrated out
        return -float(log_marginal + 0.5 * math.log(precision) - 0.5 * precision * (mean - middle) ** 2)

    found = scipy.optimize.minimize(negative, [averages.mean(), 0.0, 0.0], method="Nelder-Mead", options=_PRECISELY)
    mean, between, within = found.x[0], math.exp(found.x[1]), math.exp(found.x[2])
    return {"mean": mean, "between": between, "within": within}


_PRECISELY = {"xatol": 1e-11, "fatol": 1e-15, "maxiter": 20000, "maxfev": 20000}


# ------------------------------------------------------------------------------------ finite sites
COAL = datasets.load("coal")
YEARS, DISASTERS = COAL["years"], COAL["counts"]


def coal(years: Tensor, counts: Tensor) -> None:
    """A change-point: two rates, and the year in which the first gives way to the second."""
    early = pyro.sample("early", dist.Gamma(years.new_tensor(2.0, dtype=torch.float64), 1.0))
    late = pyro.sample("late", dist.Gamma(years.new_tensor(2.0, dtype=torch.float64), 1.0))
    switch = pyro.sample("switch", dist.Categorical(logits=torch.zeros_like(years, dtype=torch.float64)))
    with pyro.plate("year", len(years)):
        pyro.sample("n", dist.Poisson(torch.where(years < years[switch], early, late)), obs=counts)


def _coal() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For each switch: log-weight, and the Gamma parameters of both rates."""
    counts, n = DISASTERS.double().numpy(), len(DISASTERS)
    before = np.concatenate([[0.0], counts.cumsum()[:-1]])
    a, b = 2.0 + before, 1.0 + np.arange(n)
    c, d = 2.0 + counts.sum() - before, 1.0 + n - np.arange(n)
    return scipy.special.gammaln(a) - a * np.log(b) + scipy.special.gammaln(c) - c * np.log(d), a, b, c, d


def _coal_moments() -> dict[str, Moments]:
    log_weights, a, b, c, d = _coal()
    switch = np.arange(len(a), dtype=float)
    return {
        "early": _averaged(log_weights, a / b, a / b**2),
        "late": _averaged(log_weights, c / d, c / d**2),
        "switch": _averaged(log_weights, switch, 0 * switch),
    }


def _coal_mode() -> dict[str, Any]:
    """Of p(early, late | counts), the switch summed out."""
    _, a, b, c, d = _coal()

    def negative(point: np.ndarray) -> float:
        terms = (a - 1) * point[0] - b * np.exp(point[0]) + (c - 1) * point[1] - d * np.exp(point[1])
        return -float(scipy.special.logsumexp(terms))

    found = scipy.optimize.minimize(negative, [math.log(3.0), 0.0], method="Nelder-Mead", options=_PRECISELY)
    return {"early": math.exp(found.x[0]), "late": math.exp(found.x[1])}


STATES = _array(-1.0, 0.5, 2.0)
MOVES = _array([0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5])
SEEN = _array(0.1, 0.9, 1.4)


def chain(y: Tensor) -> None:
    """Three finite states, each seen through noise."""
    state = pyro.sample("z_0", dist.Categorical(y.new_tensor([0.5, 0.3, 0.2])))
    pyro.sample("y_0", dist.Normal(STATES.to(y)[state], 1.0), obs=y[0])
    for i in range(1, 3):
        state = pyro.sample(f"z_{i}", dist.Categorical(MOVES.to(y)[state]))
        pyro.sample(f"y_{i}", dist.Normal(STATES.to(y)[state], 1.0), obs=y[i])


def _chain_moments() -> dict[str, Moments]:
    paths = np.array(list(itertools.product(range(3), repeat=3)))
    first, moves, states = np.log([0.5, 0.3, 0.2]), np.log(MOVES.numpy()), STATES.numpy()
    log_weights = first[paths[:, 0]] + moves[paths[:, 0], paths[:, 1]] + moves[paths[:, 1], paths[:, 2]]
    log_weights = log_weights - 0.5 * ((SEEN.numpy() - states[paths]) ** 2).sum(1)
    return {f"z_{i}": _averaged(log_weights, paths[:, i].astype(float), np.zeros(len(paths))) for i in range(3)}


ROWS = _array(-2.6, -0.4, 0.3, 2.2, 3.1, 1.2, -1.4)
CENTRES = _array(-3.0, 0.0, 3.0)
SHARES = _array(2.0, 1.5, 3.0)


def mixture(y: Tensor) -> None:
    """Three components with priors that tell them apart."""
    weights = pyro.sample("weights", dist.Dirichlet(SHARES.to(y)))
    with pyro.plate("components", 3):
        location = pyro.sample("location", dist.Normal(CENTRES.to(y), 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(location[z], 0.8), obs=y)


def _mixture_moments() -> dict[str, Moments]:
    """By enumeration of all 3⁷ assignments; weights and locations are conjugate given one."""
    y, variance = ROWS.numpy(), 0.64
    z = np.array(list(itertools.product(range(3), repeat=len(y))))
    member = z[:, :, None] == np.arange(3)
    counts, sums = member.sum(1), (member * y[:, None]).sum(1)
    concentration = SHARES.numpy() + counts
    precision = 1.0 + counts / variance
    location = (CENTRES.numpy() + sums / variance) / precision
    log_weights = scipy.special.gammaln(concentration).sum(1)
    log_weights = log_weights - 0.5 * np.log(precision).sum(1) + 0.5 * (precision * location**2).sum(1)
    # what does not depend on the assignment (Σ y² and the priors' constants) is left out
    total = concentration.sum(1, keepdims=True)
    share = concentration / total
    return {
        "weights": _averaged(log_weights, share, share * (1 - share) / (total + 1)),
        "location": _averaged(log_weights, location, 1 / precision),
        "z": _averaged(log_weights, z.astype(float), np.zeros(z.shape)),
    }


def _mixture_mode() -> dict[str, Any]:
    """Of p(weights, location | y), the labels summed out: Newton's method on its formula."""

    def log_density(point: Tensor) -> Tensor:
        log_weights, location = torch.cat([point[:2], point.new_zeros(1)]).log_softmax(0), point[2:]
        prior = ((SHARES - 1) * log_weights).sum() - 0.5 * (location - CENTRES).square().sum()
        terms = log_weights - 0.5 * (ROWS[:, None] - location).square() / 0.64
        return prior + terms.logsumexp(1).sum()

    point = torch.cat([torch.zeros(2, dtype=torch.float64), CENTRES])
    for i in range(200):
        gradient, hessian = torch.func.grad(log_density)(point), torch.func.hessian(log_density)(point)
        newton = torch.linalg.solve(hessian, gradient)
        point = point + 0.02 * gradient if i < 150 else point - newton
    weights = torch.cat([point[:2], point.new_zeros(1)]).softmax(0)
    return {"weights": weights, "location": point[2:]}


def gmm(x: Tensor) -> None:
    """A mixture of diagonal normals, as a user writes it."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(2)))
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 5.0).to_event(1))
        variance = pyro.sample("variance", dist.InverseGamma(2.0 * x.new_ones(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mean[z], variance[z].sqrt()).to_event(1), obs=x)


CLUSTERS = torch.cat([_normal(12, 2, seed=8) - 3.0, _normal(18, 2, seed=9)])


# -------------------------------------------------------------------------- no conjugate family
LABELS = (DESIGN[:, :2] @ _array(0.3, 1.2) + 0.8 * _normal(30, seed=10) > 0).double()


def logistic(design: Tensor, labels: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(labels)):
        pyro.sample("labels", dist.Bernoulli(logits=design @ beta), obs=labels)


def _logistic_log_density(beta: Tensor) -> Tensor:
    logits = beta @ DESIGN[:, :2].T
    return (LABELS * logits - torch.nn.functional.softplus(logits)).sum(-1) - beta.square().sum(-1) / 8


def _logistic_moments() -> dict[str, Moments]:
    """By quadrature on a grid; the trapezoidal rule converges geometrically on a smooth density that decays."""
    axis = torch.linspace(-9.0, 11.0, 801, dtype=torch.float64)
    beta = torch.cartesian_prod(axis, axis)
    return {"beta": _averaged(_logistic_log_density(beta).numpy(), beta.numpy(), np.zeros(beta.shape))}


def _logistic_mode() -> dict[str, Any]:
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


def _gamma_shape_moments() -> dict[str, Moments]:
    """By quadrature over log shape; the rate is Gamma given the shape, and integrates out."""
    n, total, logs = len(WAITS), float(WAITS.sum()), float(WAITS.log().sum())
    u = np.linspace(-4.0, 4.0, 4001)
    shape = np.exp(u)
    a, b = 2.0 + n * shape, 1.0 + total
    log_weights = -0.5 * (u / 0.7) ** 2 + shape * logs - n * scipy.special.gammaln(shape)
    log_weights = log_weights + scipy.special.gammaln(a) - a * math.log(b)
    return {
        "shape": _averaged(log_weights, shape, np.zeros_like(shape)),
        "rate": _averaged(log_weights, a / b, a / b**2),
    }


THINNED = _array(1, 0, 3)


def thinned(seen: Tensor) -> None:
    """Counts with infinitely many values: those not seen are Poisson(4 · 0.7)."""
    with pyro.plate("rows", len(seen)):
        count = pyro.sample("count", dist.Poisson(seen.new_tensor(4.0)))
        pyro.sample("seen", dist.Binomial(count, 0.3), obs=seen)


# --------------------------------------------------------------------------------------- the table
def _gamma_poisson(share: float) -> tuple[float, float]:
    return 2.0 + share * float(COUNTS.sum()), 0.5 + share * len(COUNTS)


_SAMPLED = frozenset({"MetropolisHastings", "HMC"})

ZOO: tuple[Instance, ...] = (
    Instance(
        beta_binomial, (FLIPS,), {"fairness": "Beta"},
        _beta_moments, lambda: {"fairness": (_beta()[0] - 1) / (sum(_beta()) - 2)}, BetaGuide,
    ),
    Instance(
        gamma_poisson, (COUNTS,), {"rate": "Gamma"},
        lambda: {"rate": _gamma(*_gamma_poisson(1.0))},
        lambda: {"rate": (_gamma_poisson(1.0)[0] - 1) / _gamma_poisson(1.0)[1]}, GammaGuide,
    ),
    Instance(
        tempered, (COUNTS,), {"rate": "Gamma"},
        lambda: {"rate": _gamma(*_gamma_poisson(0.5))},
        lambda: {"rate": (_gamma_poisson(0.5)[0] - 1) / _gamma_poisson(0.5)[1]},
    ),
    Instance(
        dirichlet_multinomial, (TABLE,), {"shares": "Dirichlet"},
        lambda: {"shares": _dirichlet((PRIOR + TABLE.sum(0)).numpy())},
        lambda: {"shares": (PRIOR + TABLE.sum(0) - 1) / (PRIOR + TABLE.sum(0) - 1).sum()}, DirichletGuide,
    ),
    Instance(
        exponential_gamma, (WAITS,), {"rate": "Gamma"},
        lambda: {"rate": _gamma(1.0 + len(WAITS), 0.5 + float(WAITS.sum()))},
        lambda: {"rate": len(WAITS) / (0.5 + float(WAITS.sum()))},
    ),
    Instance(
        lognormal, (WAITS,), {"middle": "LogNormal"},
        lambda: _lognormal_moments(*_lognormal()),
        lambda: {"middle": math.exp(_lognormal()[0] - _lognormal()[1])}, LogNormalGuide,
    ),
    Instance(
        normal_variance, (SCALARS,), {"variance": "InverseGamma", "mean": "Normal"},
        lambda: _normal_inverse_gamma_moments(*_normal_inverse_gamma()), _normal_variance_mode, NormalInverseGammaGuide,
    ),
    Instance(
        normal_independent, (SCALARS,), {"mean": "Normal", "variance": "InverseGamma"},
        _normal_independent_moments, _normal_independent_mode,
    ),
    Instance(
        masked, (SCALARS, IS_SEEN), {"mean": "Normal"},
        _masked_moments, lambda: {"mean": _masked_moments()["mean"].mean}, AutoNormal,
    ),
    Instance(
        flat_location, (SCALARS,), {"location": "Normal"},
        lambda: {"location": Moments(float(SCALARS.mean()), 2.0 / math.sqrt(len(SCALARS)))},
        lambda: {"location": float(SCALARS.mean())},
    ),
    Instance(
        regression_event, (DESIGN, RESPONSE), {"beta": "Gaussian"},
        lambda: _regression_moments(_EYE), lambda: {"beta": _regression(_EYE)[0]},
    ),
    Instance(
        regression_plate, (DESIGN, RESPONSE), {"beta": "Gaussian"},
        lambda: _regression_moments(_EYE), lambda: {"beta": _regression(_EYE)[0]},
    ),
    Instance(
        regression_matrix, (DESIGN, RESPONSE), {"beta": "Gaussian"},
        lambda: _regression_moments(_MATRIX), lambda: {"beta": _regression(_MATRIX)[0]}, AutoMultivariateNormal,
    ),
    Instance(
        flat_regression, (DESIGN, RESPONSE), {"beta": "Gaussian", "noise": "InverseGamma of the square"},
        _flat_regression_moments, _flat_regression_mode,
    ),
    Instance(
        covariance, (PAIRS,), {"matrix": "InverseWishart"},
        _covariance_moments,
        lambda: {"matrix": (SCALE_MATRIX.numpy() + SCATTER) / (5.0 + len(PAIRS) + 3)},
    ),
    Instance(precision, (PAIRS,), {"matrix": "Wishart"}, _precision_moments, _precision_mode),
    Instance(
        nested, (NESTED,), {"rate": "Gamma"},
        lambda: {"rate": _gamma(*_nested_gamma())},
    ),
    Instance(crossed, (CROSSED,), {"row": "Normal", "column": "Normal"}, _crossed_moments),
    Instance(
        random_walk, (STEPS,), {f"state_{i}": "Normal" for i in range(4)},
        _random_walk_moments, lambda: {name: both.mean for name, both in _random_walk_moments().items()},
    ),
    Instance(
        hierarchical, (GROUPED,),
        {"mean": "Normal", "between": "InverseGamma", "within": "InverseGamma", "effect": "Normal"},
        _hierarchical_moments, _hierarchical_mode,
    ),
    Instance(
        coal, (YEARS, DISASTERS), {"switch": "Enumerate", "early": "Gamma", "late": "Gamma"},
        _coal_moments, _coal_mode,
    ),
    Instance(
        chain, (SEEN,), {f"z_{i}": "Enumerate" for i in range(3)}, _chain_moments, refused=_SAMPLED | {"EM"},
    ),
    Instance(
        mixture, (ROWS,), {"weights": "Dirichlet", "location": "Normal", "z": "Enumerate"},
        _mixture_moments, _mixture_mode,
    ),
    Instance(
        gmm, (CLUSTERS,),
        {"weights": "Dirichlet", "mean": "Normal", "variance": "InverseGamma", "z": "Enumerate"},
    ),
    Instance(logistic, (DESIGN[:, :2], LABELS), {"beta": "HMC"}, _logistic_moments, _logistic_mode),
    Instance(gamma_shape, (WAITS,), {"shape": "HMC", "rate": "Gamma"}, _gamma_shape_moments),
    Instance(
        thinned, (THINNED,), {"count": "RandomWalk"},
        lambda: {"count": Moments(THINNED + 2.8, torch.full((3,), math.sqrt(2.8)))}, refused=_SAMPLED | {"EM"},
    ),
)  # fmt: skip

BY_NAME = {instance.name: instance for instance in ZOO}
