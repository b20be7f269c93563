"""Finite sites: a change-point, a chain, mixtures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import scipy.optimize
import scipy.special
import torch
from torch import Tensor

from exact import Moments, array, assignments, averaged, noise, summit
from pyro_genmodels import datasets

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


def coal_moments() -> dict[str, Moments]:
    log_weights, a, b, c, d = _coal()
    switch = np.arange(len(a), dtype=float)
    return {
        "early": averaged(log_weights, a / b, a / b**2),
        "late": averaged(log_weights, c / d, c / d**2),
        "switch": averaged(log_weights, switch, 0 * switch),
    }


def coal_mode() -> dict[str, Any]:
    """Of p(early, late | counts), the switch summed out."""
    _, a, b, c, d = _coal()

    a, b, c, d = (torch.from_numpy(np.asarray(part)) for part in (a, b, c, d))

    def log_density(logs: Tensor) -> Tensor:
        terms = (a - 1) * logs[0] - b * logs[0].exp() + (c - 1) * logs[1] - d * logs[1].exp()
        return terms.logsumexp(0)

    early, late = summit(log_density, [math.log(3.0), 0.0]).exp()
    return {"early": early, "late": late}


STATES = array(-1.0, 0.5, 2.0)
MOVES = array([0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.25, 0.25, 0.5])
SEEN = array(0.1, 0.9, 1.4)


def chain(y: Tensor) -> None:
    """Three finite states, each seen through noise."""
    state = pyro.sample("z_0", dist.Categorical(y.new_tensor([0.5, 0.3, 0.2])))
    pyro.sample("y_0", dist.Normal(STATES.to(y)[state], 1.0), obs=y[0])
    for i in range(1, 3):
        state = pyro.sample(f"z_{i}", dist.Categorical(MOVES.to(y)[state]))
        pyro.sample(f"y_{i}", dist.Normal(STATES.to(y)[state], 1.0), obs=y[i])


def chain_moments() -> dict[str, Moments]:
    paths = assignments(3, 3)
    first, moves, states = np.log([0.5, 0.3, 0.2]), np.log(MOVES.numpy()), STATES.numpy()
    log_weights = first[paths[:, 0]] + moves[paths[:, 0], paths[:, 1]] + moves[paths[:, 1], paths[:, 2]]
    log_weights = log_weights - 0.5 * ((SEEN.numpy() - states[paths]) ** 2).sum(1)
    return {f"z_{i}": averaged(log_weights, paths[:, i].astype(float), np.zeros(len(paths))) for i in range(3)}


ROWS = array(-2.6, -0.4, 0.3, 2.2, 3.1, 1.2, -1.4)
CENTRES = array(-3.0, 0.0, 3.0)
SHARES = array(2.0, 1.5, 3.0)


def mixture(y: Tensor) -> None:
    """Three components with priors that tell them apart."""
    weights = pyro.sample("weights", dist.Dirichlet(SHARES.to(y)))
    with pyro.plate("components", 3):
        location = pyro.sample("location", dist.Normal(CENTRES.to(y), 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(location[z], 0.8), obs=y)


def mixture_moments() -> dict[str, Moments]:
    """By enumeration of all 3⁷ assignments; weights and locations are conjugate given one."""
    y, variance = ROWS.numpy(), 0.64
    z = assignments(3, len(y))
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
        "weights": averaged(log_weights, share, share * (1 - share) / (total + 1)),
        "location": averaged(log_weights, location, 1 / precision),
        "z": averaged(log_weights, z.astype(float), np.zeros(z.shape)),
    }


def mixture_mode() -> dict[str, Any]:
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


CLUSTERS = torch.cat([noise(3, 2, seed=8) - 1.5, noise(5, 2, seed=9) + 0.5])


def gmm_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁸ assignments, and quadrature over the variance of every feature of a component."""
    x = CLUSTERS.numpy()
    z = assignments(2, len(x))
    member = (z[:, :, None] == np.arange(2)).astype(float)
    counts = member.sum(1)
    number, total, squares = counts[:, :, None, None], *(np.einsum("mnk,nd->mkd", member, y)[..., None] for y in (x, x**2))
    v = np.exp(np.linspace(-4.0, 9.0, 301))
    precision = 1 / 25.0 + number / v
    mean = total / v / precision
    inner = -2.0 * np.log(v) - 1.0 / v - 0.5 * number * np.log(v) - 0.5 * squares / v  # of log v
    inner = inner - 0.5 * np.log(precision) + 0.5 * precision * mean**2
    evidence = scipy.special.logsumexp(inner, 3, keepdims=True)
    chance = np.exp(inner - evidence)
    log_weights = evidence.sum((1, 2, 3)) + scipy.special.gammaln(1.0 + counts).sum(1)
    first = (chance * mean).sum(3)
    second = (chance * (mean**2 + 1 / precision)).sum(3)
    log_v = (chance * np.log(v)).sum(3)
    log_v_square = (chance * np.log(v) ** 2).sum(3)
    share = (1.0 + counts) / (2.0 + len(x))
    share_square = share * (2.0 + counts) / (3.0 + len(x))
    own = z[:, :, None]
    first, second = np.take_along_axis(first, own, 1), np.take_along_axis(second, own, 1)
    log_v, log_v_square = np.take_along_axis(log_v, own, 1), np.take_along_axis(log_v_square, own, 1)
    share, share_square = (np.take_along_axis(y, z, 1) for y in (share, share_square))
    return {
        "own_mean": averaged(log_weights, first, second - first**2),
        "own_log_variance": averaged(log_weights, log_v, log_v_square - log_v**2),
        "own_weight": averaged(log_weights, share, share_square - share**2),
    }


def gmm_quantities(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a row's own component is, since components change places; a variance has no variance, its logarithm does."""
    z = draws["z"]
    return {
        "own_mean": np.take_along_axis(draws["mean"], z[..., None], 2),
        "own_log_variance": np.take_along_axis(np.log(draws["variance"]), z[..., None], 2),
        "own_weight": np.take_along_axis(draws["weights"], z, 2),
    }
