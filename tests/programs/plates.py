"""Plates inside plates, plates across plates, and a loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.optimize
import scipy.special
from torch import Tensor

from exact import Moments, array, averaged, gamma, noise

NESTED = array([3, 1, 2, 4], [7, 9, 6, 8], [0, 1, 0, 2])


def nested(counts: Tensor) -> None:
    """Rates in a plate, counts in a plate inside it."""
    with pyro.plate("groups", len(counts), dim=-2):
        rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
        with pyro.plate("members", counts.shape[1], dim=-1):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)


def _nested() -> tuple[np.ndarray, float]:
    return 2.0 + NESTED.sum(1, keepdim=True).numpy(), 0.5 + NESTED.shape[1]


def nested_moments() -> dict[str, Moments]:
    return {"rate": gamma(*_nested())}


def nested_mode() -> dict[str, Any]:
    a, b = _nested()
    return {"rate": (a - 1) / b}


CROSSED = noise(4, 3, seed=5) + array(0.0, 1.0, -1.0, 2.0)[:, None]


def crossed(y: Tensor) -> None:
    """Row effects and column effects: two plates, neither inside the other."""
    rows, columns = pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", y.shape[1], dim=-1)
    with rows:
        row = pyro.sample("row", dist.Normal(y.new_tensor(0.0), 1.0))
    with columns:
        column = pyro.sample("column", dist.Normal(y.new_tensor(0.0), 1.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(row + column, 1.0), obs=y)


def crossed_moments() -> dict[str, Moments]:
    """All seven effects are jointly normal."""
    rows, columns = CROSSED.shape
    design = np.concatenate([np.kron(np.eye(rows), np.ones((columns, 1))), np.kron(np.ones((rows, 1)), np.eye(columns))], 1)
    joint = np.linalg.inv(np.eye(rows + columns) + design.T @ design)
    mean, sd = joint @ design.T @ CROSSED.numpy().ravel(), np.sqrt(np.diag(joint))
    return {
        "row": Moments(mean[:rows, None], sd[:rows, None]),
        "column": Moments(mean[rows:], sd[rows:]),
    }


def crossed_mode() -> dict[str, Any]:
    return {name: both.mean for name, both in crossed_moments().items()}


STEPS = array(0.4, 1.1, 0.7, 2.3)


def random_walk(y: Tensor) -> None:
    """A chain of normal states, written as a loop."""
    state = y.new_zeros(())
    for i in range(len(y)):
        state = pyro.sample(f"state_{i}", dist.Normal(state, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(state, 0.5), obs=y[i])


def random_walk_moments() -> dict[str, Moments]:
    n = len(STEPS)
    difference = np.eye(n) - np.eye(n, k=-1)
    joint = np.linalg.inv(difference.T @ difference + np.eye(n) / 0.25)
    mean, sd = joint @ STEPS.numpy() / 0.25, np.sqrt(np.diag(joint))
    return {f"state_{i}": Moments(mean[i], sd[i]) for i in range(n)}


def random_walk_mode() -> dict[str, Any]:
    return {name: both.mean for name, both in random_walk_moments().items()}


GROUPS, REPEATS = 8, 5
GROUPED = 3.0 + 2.0 * noise(GROUPS, 1, seed=6) + 1.2 * noise(GROUPS, REPEATS, seed=7)


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


def hierarchical_moments() -> dict[str, Moments]:
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
    effect = averaged(log_weights, effect_mean, effect_variance[:, None])
    zero = np.zeros_like(between)
    return {
        "mean": averaged(log_weights, mean, 1 / precision),
        "between": averaged(log_weights, between, zero),
        "within": averaged(log_weights, within, zero),
        "effect": Moments(effect.mean[:, None], effect.sd[:, None]),
    }


def hierarchical_mode() -> dict[str, Any]:
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
