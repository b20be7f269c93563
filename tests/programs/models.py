"""The models of ``pyro_genmodels``, each with a few rows, and their posteriors by enumeration and quadrature."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.special
import torch
from torch import Tensor

from exact import (
    Moments,
    array,
    assignments,
    averaged,
    beta,
    conjugate_normal,
    dirichlet,
    gamma,
    grid,
    log_dirichlet,
    moments,
    noise,
    summit,
    variances,
)  # fmt: skip

Draws = Mapping[str, np.ndarray]

# ------------------------------------------------------------------- rows that come from components
# A subset of the rows is a number whose bits say which rows are in it. Given one, what a component has of its own
# is conjugate, or has one or three dimensions left to integrate over.


class Part(NamedTuple):
    """What a component is, for every subset of the rows that it may have, or for every assignment and component.

    Attributes:
        evidence: Log-density of the subset's rows, (subset,).
        first, second: Moments of the component's own site, (subset, *site).
    """

    evidence: np.ndarray
    first: np.ndarray
    second: np.ndarray


def _subsets(rows: int) -> np.ndarray:
    """Which rows are in each subset, (2 ** rows, rows)."""
    return (np.arange(2**rows)[:, None] >> np.arange(rows) & 1).astype(float)


def _owned(z: np.ndarray, components: int) -> np.ndarray:
    """The subset that each component has, (assignment, components)."""
    member = z[:, :, None] == np.arange(components)
    found: np.ndarray = (member * 2 ** np.arange(z.shape[1])[:, None]).sum(1)
    return found


def _part(evidence: np.ndarray, site: Moments) -> Part:
    return Part(evidence, site.mean, site.sd**2 + site.mean**2)


def _bernoulli(x: np.ndarray, a: float) -> Part:
    member = _subsets(len(x))
    yes, no = a + member @ x, a + member @ (1 - x)
    return _part(scipy.special.betaln(yes, no), beta(yes, no))


def _categorical(x: np.ndarray, a: float, levels: int) -> Part:
    counts = a + _subsets(len(x)) @ (x[:, None] == np.arange(levels))
    return _part(log_dirichlet(counts), dirichlet(counts))


def _poisson(x: np.ndarray, a: float) -> Part:
    member, rate = _subsets(len(x)), a / x.mean()
    shape, total = a + member @ x, rate + member.sum(1)
    evidence = scipy.special.gammaln(shape) - shape * np.log(total) - scipy.special.gammaln(a) + a * np.log(rate)
    return _part(evidence, gamma(shape, total))


def _normal(x: np.ndarray, shape: float, rate: float) -> tuple[Part, Part]:
    """μ ~ N(m, 9 s²), v ~ InverseGamma(shape, rate): the mean, and the logarithm of the variance, by quadrature over it."""
    member, log_v = _subsets(len(x)), np.linspace(np.log(rate) - 4.0, np.log(rate) + 16.0, 401)
    v, y = np.exp(log_v), x - x.mean()
    mean, variance, inner = conjugate_normal(0.0, 9.0 * x.var(), member.sum(1)[:, None], (member @ y)[:, None], v)
    inner = inner - shape * log_v - rate / v - 0.5 * (member @ y**2)[:, None] / v - 0.5 * member.sum(1)[:, None] * log_v
    evidence = scipy.special.logsumexp(inner, 1)
    chance = np.exp(inner - evidence[:, None])
    mean = mean + x.mean()
    return (
        Part(evidence, (chance * mean).sum(1), (chance * (mean**2 + variance)).sum(1)),
        Part(np.zeros_like(evidence), chance @ log_v, chance @ log_v**2),
    )


def _beside(*parts: Part) -> Part:
    """Columns of a site, independent given the subset."""
    evidence = sum(part.evidence for part in parts)
    return Part(np.asarray(evidence), *(np.stack([part[i] for part in parts], 1) for i in (1, 2)))


def _given(z: np.ndarray, components: int, log_prior: np.ndarray, sites: Mapping[str, Part]) -> dict[str, Part]:
    """Of each assignment: its log-weight, and the moments of each component's site, (assignment, components, *site)."""
    owned = _owned(z, components)
    log_weights = log_prior + sum(part.evidence[owned].sum(1) for part in sites.values())
    return {name: Part(log_weights, part.first[owned], part.second[owned]) for name, part in sites.items()}


def _shares(z: np.ndarray, components: int) -> tuple[np.ndarray, Part]:
    """w ~ Dirichlet(1): log-probability of the assignments, and w given each."""
    numbers = 1.0 + (z[:, :, None] == np.arange(components)).sum(1)
    log_prior = log_dirichlet(numbers)
    return log_prior, _part(log_prior, dirichlet(numbers))


def _own(z: np.ndarray, sites: Mapping[str, Part]) -> dict[str, Moments]:
    """Moments of the site of each row's own component, and of whether rows go with the first."""
    found = {}
    for name, (log_weights, *both) in sites.items():
        first, second = (np.take_along_axis(part, z.reshape(*z.shape, *(1,) * (part.ndim - 2)), 1) for part in both)
        found[name] = averaged(log_weights, first, second - first**2)
    return found | {"together": averaged(log_weights, (z[:, 1:] == z[:, :1]).astype(float))}


def _own_of(draws: Draws, *sites: str, logarithms: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """The same of draws, since components change places; a variance need not have a variance, its logarithm has."""
    z, found = draws["z"], {}
    for name in (*sites, *logarithms):
        value = np.log(draws[name]) if name in logarithms else draws[name]
        found[name] = np.take_along_axis(value, z.reshape(*z.shape, *(1,) * (value.ndim - 3)), 2)
    return found | {"together": (z[..., 1:] == z[..., :1]).astype(float)}


# ----------------------------------------------------------------------------------- Gaussian mixtures
POINTS = array([-1.5, 0.3], [-0.4, -1.1], [-0.1, 0.9], [0.6, -0.3], [1.3, 1.0])


def _spread_grid(covariance: str) -> tuple[np.ndarray, np.ndarray]:
    """Covariances (g, 2, 2) in units of the data's deviations, and the logarithm of their prior with that of the Jacobian.

    A full one is s = Σ₁₁, v = Σ₂₂ − Σ₂₁²/s and t = Σ₂₁ / (s √v), so that dΣ = s² v^(3/2) dt dlog s dlog v.
    """
    if covariance in ("spherical", "isotropic"):
        log_v = np.linspace(-5.0, 10.0, 301)
        variance = 0.5 * POINTS.numpy().var(0).mean() / 2.0
        return np.exp(log_v)[:, None, None] * np.eye(2), -2.0 * log_v - variance / np.exp(log_v)
    log_s, t, log_v = grid((-5.0, 11.0, 41), (-9.0, 9.0, 41), (-5.0, 9.0, 41)).numpy().T
    s, v = np.exp(log_s), np.exp(log_v)
    matrix = np.stack([np.stack([s, t * s * v**0.5], 1), np.stack([t * s * v**0.5, v + t**2 * s * v], 1)], 1)
    scale = np.diag(POINTS.numpy().var(0)) / 2.0
    # IW(4, scale): |Σ|^(−7/2) exp(−½ tr(scale Σ⁻¹)), and |Σ| = s v
    log_prior = -3.5 * (log_s + log_v) - 0.5 * np.einsum("ij,gji->g", scale, np.linalg.inv(matrix))
    return matrix, log_prior + 2.0 * log_s + 1.5 * log_v


def _gmm_parts(covariance: str, z: np.ndarray, log_prior: np.ndarray) -> dict[str, Part]:
    """Means and log-determinants of the covariances, by quadrature over these; means are conjugate given them."""
    x = POINTS.numpy() - POINTS.numpy().mean(0)
    matrix, log_weight = _spread_grid(covariance)
    precision, log_det = np.linalg.inv(matrix), np.linalg.slogdet(matrix)[1]
    prior = np.diag(1.0 / (9.0 * x.var(0)))
    member = _subsets(len(x))
    inner, first, second = [], [], []
    for rows in member:
        n, total, scatter = rows.sum(), rows @ x, (rows[:, None] * x).T @ x
        spread = np.linalg.inv(prior + n * precision)
        middle = np.einsum("gij,gjk,k->gi", spread, precision, total)
        fit = np.einsum("gi,gij,j->g", middle, precision, total) - np.einsum("gij,ji->g", precision, scatter)
        inner.append(0.5 * (fit + np.linalg.slogdet(spread @ prior)[1] - n * log_det))
        first.append(middle)
        second.append(variances(spread) + middle**2)
    inner, first, second = (np.stack(part) for part in (inner, first, second))
    first, second = first + POINTS.numpy().mean(0), second + 2 * first * POINTS.numpy().mean(0) + POINTS.numpy().mean(0) ** 2
    owned, is_shared = _owned(z, 2), covariance in ("tied", "isotropic")
    found: dict[str, list[Any]] = {"means": [], "means²": [], "log_det": [], "log_det²": [], "evidence": []}
    for both in owned:
        chances, evidence = [], 0.0
        for log_density in [inner[both].sum(0)] if is_shared else inner[both]:
            log_chance = log_weight + log_density
            evidence = evidence + scipy.special.logsumexp(log_chance)
            chances.append(scipy.special.softmax(log_chance))
        chances = chances * 2 if is_shared else chances
        found["evidence"].append(evidence)
        for name, value in (("means", first), ("means²", second)):
            found[name].append([chance @ value[own] for chance, own in zip(chances, both, strict=True)])
        for name, number in (("log_det", log_det), ("log_det²", log_det**2)):
            found[name].append([chance @ number for chance in chances])
    made = {name: np.array(value) for name, value in found.items()}
    log_weights = log_prior + made["evidence"]
    return {name: Part(log_weights, made[name], made[f"{name}²"]) for name in ("means", "log_det")}


def gmm_moments(covariance: str) -> Callable[[], dict[str, Moments]]:
    """By enumeration of all 2⁵ assignments, and quadrature over a covariance, or over the one that all share."""

    def found() -> dict[str, Moments]:
        z = assignments(2, len(POINTS))
        log_prior, weights = _shares(z, 2)
        if covariance == "isotropic":
            return _own(z, _gmm_parts(covariance, z, 0.0 * log_prior))  # equal weights
        parts = _gmm_parts(covariance, z, log_prior)
        return _own(z, parts | {"weights": weights._replace(evidence=parts["means"].evidence)})

    return found


def gmm_quantities(draws: Draws) -> dict[str, np.ndarray]:
    """Of each row's own component: its mean, the log-determinant of its covariance, and its weight unless all are alike."""
    value, components = draws["covariances"], draws["means"].shape[2]
    log_det = np.linalg.slogdet(value)[1] if value.ndim > 3 else 2.0 * np.log(value)
    log_det = log_det if value.ndim in (3, 5) else np.repeat(log_det[..., None], components, 2)
    names = ("means", "log_det") if (draws["weights"] == 0.5).all() else ("means", "log_det", "weights")
    return _own_of({**draws, "log_det": log_det}, *names)


STICKS, ALPHA = 3, 1.5


def gmm_sticks_moments() -> dict[str, Moments]:
    """By enumeration of all 3⁵ assignments: sticks are conjugate, and columns independent, given one."""
    z, x = assignments(STICKS, len(POINTS)), POINTS.numpy()
    numbers = (z[:, :, None] == np.arange(STICKS)).sum(1)
    a, b = 1.0 + numbers[:, :-1], ALPHA + numbers[:, ::-1].cumsum(1)[:, ::-1][:, 1:]
    log_prior = scipy.special.betaln(a, b).sum(1)
    means, spreads = zip(*(_normal(y, 2.0, 0.5 * y.var() / (1.0 + ALPHA)) for y in x.T), strict=True)
    parts = _given(z, STICKS, log_prior, {"means": _beside(*means), "covariances": _beside(*spreads)})
    ends = np.ones((len(z), 1))
    weight, square = (
        np.concatenate([take, ends], 1) * np.concatenate([ends, leave.cumprod(1)], 1)
        for take, leave in (
            (a / (a + b), b / (a + b)),
            (a * (a + 1) / (a + b) / (a + b + 1), b * (b + 1) / (a + b) / (a + b + 1)),
        )
    )
    return _own(z, parts | {"weights": Part(parts["means"].evidence, weight, square)})


def gmm_columns_quantities(draws: Draws) -> dict[str, np.ndarray]:
    return _own_of(draws, "means", "weights", logarithms=("covariances",))


def gmm_diagonal_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁵ assignments, and quadrature over every variance."""
    z, x = assignments(2, len(POINTS)), POINTS.numpy()
    log_prior, weights = _shares(z, 2)
    means, spreads = zip(*(_normal(y, 2.0, 0.25 * y.var()) for y in x.T), strict=True)
    parts = _given(z, 2, log_prior, {"means": _beside(*means), "covariances": _beside(*spreads)})
    return _own(z, parts | {"weights": weights._replace(evidence=parts["means"].evidence)})


# ------------------------------------------------------------------------------- mixtures of other columns
SWITCHES = array([1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 1, 1], [0, 0, 1])
CALLS = array([0, 1], [1, 0], [2, 3], [5, 1], [4, 4])
MIXED = array([1, 0, 1, -1.2], [1, 0, 2, -0.6], [1, 1, 0, -0.1], [0, 2, 4, 0.4], [0, 1, 3, 1.1])


def mixture_bernoulli_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁶ assignments."""
    z = assignments(2, len(SWITCHES))
    log_prior, weights = _shares(z, 2)
    parts = _given(z, 2, log_prior, {"probabilities": _beside(*(_bernoulli(y, 1.0) for y in SWITCHES.numpy().T))})
    return _own(z, parts | {"weights": weights._replace(evidence=parts["probabilities"].evidence)})


def mixture_poisson_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁵ assignments."""
    z = assignments(2, len(CALLS))
    log_prior, weights = _shares(z, 2)
    parts = _given(z, 2, log_prior, {"rates": _beside(*(_poisson(y, 1.0) for y in CALLS.numpy().T))})
    return _own(z, parts | {"weights": weights._replace(evidence=parts["rates"].evidence)})


def mixture_mixed_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁵ assignments; a column of each kind, the variance of one by quadrature."""
    z, (yes, kind, count, number) = assignments(2, len(MIXED)), MIXED.numpy().T
    log_prior, weights = _shares(z, 2)
    mean, log_variance = _normal(number, 1.5, 0.125 * number.var())
    sites = {
        "probabilities": _bernoulli(yes, 1.0), "shares": _categorical(kind, 1.0, 3), "rates": _poisson(count, 1.0),
        "means": mean, "variances": log_variance,
    }  # fmt: skip
    parts = _given(z, 2, log_prior, {name: _beside(part) for name, part in sites.items()})
    return _own(z, parts | {"weights": weights._replace(evidence=parts["means"].evidence)})


def mixture_quantities(draws: Draws) -> dict[str, np.ndarray]:
    names = ("weights", "probabilities", "shares", "rates", "means")
    logarithms = tuple(name for name in ("variances",) if name in draws)
    return _own_of(draws, *(name for name in names if name in draws), logarithms=logarithms)


# ----------------------------------------------------------------------------------------- naive Bayes
PATIENTS = array([1, 0, -1.2], [1, 1, -0.6], [1, 0, -0.9], [0, 3, 0.8], [0, 5, 1.4], [0, 4, 0.9], [1, 2, 0.1], [0, 1, 0.3])
ILLNESS = torch.tensor([0, 0, 0, 1, 1, 1, -1, -1])


def naive_bayes_moments() -> dict[str, Moments]:
    """By enumeration of the two labels that are missing."""
    is_known, (yes, count, number) = ILLNESS.numpy() >= 0, PATIENTS.numpy().T
    missing = assignments(2, int((~is_known).sum()))
    z = np.broadcast_to(ILLNESS.numpy(), (len(missing), len(ILLNESS))).copy()
    z[:, ~is_known] = missing
    log_prior, share = _shares(z, 2)
    mean, log_variance = _normal(number, 1.5, 0.5 * number.var())
    sites = {
        "rates": _bernoulli(yes, 2.0), "intensities": _poisson(count, 2.0), "means": mean, "variances": log_variance,
    }  # fmt: skip
    parts = _given(z, 2, log_prior, {name: _beside(part) for name, part in sites.items()})
    log_weights = parts["means"].evidence
    parts["share"] = share._replace(evidence=log_weights)
    found = {name: averaged(log_weights, first, second - first**2) for name, (_, first, second) in parts.items()}
    return found | {"missing": averaged(log_weights, missing.astype(float))}


def naive_bayes_quantities(draws: Draws) -> dict[str, np.ndarray]:
    found = {name: draws[name] for name in ("share", "rates", "intensities", "means")}
    return found | {"variances": np.log(draws["variances"]), "missing": draws["y"][..., ILLNESS.numpy() < 0]}


# ------------------------------------------------------------------------------------------ regressions
TABLE = noise(12, 2, seed=30)
YIELD = TABLE @ array(1.5, -0.7) + 2.0 + 0.5 * noise(12, seed=31)
PASSED = (TABLE[:, 0] + 0.8 * noise(12, seed=32) > 0.3).long()
GRADE = torch.tensor([0, 2, 1, 0, 1, 2, 2, 0, 1, 1, 0, 2])


def _standardised(x: Tensor, has_intercept: bool = True) -> np.ndarray:
    z = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    return np.concatenate([z, np.ones((len(z), 1))], 1) if has_intercept else z


def _regression() -> tuple[np.ndarray, np.ndarray, float, float]:
    """Posterior of β given σ², N(mean, σ² covariance), and of σ², InverseGamma(a, b)."""
    design, y = _standardised(TABLE), (YIELD - YIELD.mean()).numpy() / float(YIELD.std(correction=0))
    precision = design.T @ design + np.diag([1.0, 1.0, 1e-6])
    mean = np.linalg.solve(precision, design.T @ y)
    return mean, np.linalg.inv(precision), 1.0 + 0.5 * len(y), 0.01 + 0.5 * (y @ y - mean @ precision @ mean)


def linear_moments() -> dict[str, Moments]:
    """The normal-inverse-Gamma posterior: β is Student."""
    mean, covariance, a, b = _regression()
    return {
        "log_variance": Moments(np.log(b) - scipy.special.digamma(a), np.sqrt(scipy.special.polygamma(1, a))),
        "coefficients": Moments(mean, np.sqrt(np.diag(covariance) * b / (a - 1))),
    }


def linear_quantities(draws: Draws) -> dict[str, np.ndarray]:
    return {"log_variance": np.log(draws["variance"]), "coefficients": draws["coefficients"]}


def linear_mode() -> dict[str, Any]:
    mean, _, a, b = _regression()
    return {"variance": b / (a + 1 + 0.5 * len(mean)), "coefficients": mean}


def linear_unknown_moments() -> dict[str, Moments]:
    """The scale of the coefficients unknown: by quadrature over it, as everything else is conjugate."""
    design, y = _standardised(TABLE, has_intercept=False), (YIELD - YIELD.mean()).numpy() / float(YIELD.std(correction=0))
    log_tau = np.linspace(-5.0, 9.0, 801)
    found, a = [], 1.0 + 0.5 * len(y)
    for tau in np.exp(log_tau):
        precision = design.T @ design + np.eye(2) / tau
        mean, covariance = np.linalg.solve(precision, design.T @ y), np.linalg.inv(precision)
        b = 0.01 + 0.5 * (y @ y - mean @ precision @ mean)
        log_weight = -0.5 * np.linalg.slogdet(tau * precision)[1] - a * np.log(b) - np.log(tau) - 1.0 / tau
        found.append((log_weight, mean, np.diag(covariance) * b / (a - 1), b))
    log_weights, mean, variance, b = (np.array(part) for part in zip(*found, strict=True))
    return {
        "log_prior_variance": averaged(log_weights, log_tau),
        "log_variance": averaged(log_weights, np.log(b) - scipy.special.digamma(a), scipy.special.polygamma(1, a)),
        "coefficients": averaged(log_weights, mean, variance),
    }


def linear_unknown_quantities(draws: Draws) -> dict[str, np.ndarray]:
    return linear_quantities(draws) | {"log_prior_variance": np.log(draws["prior_variance"])}


def logistic_moments() -> dict[str, Moments]:
    """By quadrature."""
    points = grid((-7.0, 11.0, 161), (-9.0, 9.0, 161)).numpy()
    logits = points @ _standardised(TABLE[:, :1]).T
    log_weights = -0.5 * points[:, 0] ** 2 - 0.005 * points[:, 1] ** 2
    log_weights = log_weights + PASSED.numpy() @ logits.T - np.logaddexp(0.0, logits).sum(1)
    return moments(log_weights, {"coefficients": points})


def logistic_mode() -> dict[str, Any]:
    design, y = torch.from_numpy(_standardised(TABLE[:, :1])), PASSED.double()

    def log_density(point: Tensor) -> Tensor:
        logits = design @ point
        return (y * logits).sum() - torch.nn.functional.softplus(logits).sum() - 0.5 * point[0] ** 2 - 0.005 * point[1] ** 2

    return {"coefficients": summit(log_density, [0.0, 0.0])}


BASIS = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -2.0]], dtype=torch.float64) / array(2.0, 6.0).sqrt()


def softmax_moments() -> dict[str, Moments]:
    """By quadrature over both contrasts, whose basis is Helmert's."""
    points = grid((-5.0, 5.0, 161), (-5.0, 5.0, 161)).numpy()
    coefficients = points @ BASIS.numpy().T
    logits = coefficients[:, None, :] * _standardised(TABLE[:, :1], has_intercept=False)
    seen = np.take_along_axis(logits, GRADE.numpy()[None, :, None], 2).sum((1, 2))
    log_weights = seen - scipy.special.logsumexp(logits, 2).sum(1) - 0.5 * (points**2).sum(1)
    return moments(log_weights, {"contrasts": points[..., None], "coefficients": coefficients[..., None]})


def softmax_mode() -> dict[str, Any]:
    design = torch.from_numpy(_standardised(TABLE[:, :1], has_intercept=False))

    def log_density(point: Tensor) -> Tensor:
        logits = design * (BASIS @ point)
        return logits.log_softmax(1).gather(1, GRADE[:, None]).sum() - 0.5 * point.square().sum()

    return {"contrasts": summit(log_density, [0.0, 0.0])[:, None]}


# ------------------------------------------------------------------------------------------------ margins
SIDES = (TABLE[:6, :1] * 1.0, torch.tensor([0, 1, 1, 0, 0, 1]))


def _margin() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points, (g, 2), their log-density, and u, (g, rows)."""
    points = grid((-6.0, 6.0, 401), (-12.0, 12.0, 401)).numpy()
    side = 2.0 * SIDES[1].numpy() - 1.0
    u = 0.5 * (1.0 - side * (points @ _standardised(SIDES[0]).T))
    log_density = -2.0 * np.maximum(u, 0.0).sum(1) - 0.5 * points[:, 0] ** 2 - 0.5 * points[:, 1] ** 2 / 4.0
    return points, log_density, u


def margin_moments() -> dict[str, Moments]:
    """By quadrature."""
    points, log_weights, _ = _margin()
    return moments(log_weights, {"coefficients": points})


def margin_latent_moments() -> dict[str, Moments]:
    """By quadrature; λ given u is generalised inverse Gaussian, with E λ = |u| + 1 and var λ = |u| + 2."""
    points, log_weights, u = _margin()
    found = moments(log_weights, {"coefficients": points})
    return found | {"mixing": averaged(log_weights, np.abs(u) + 1.0, np.abs(u) + 2.0)}


# ------------------------------------------------------------------------------------------------ factors
PAIRS = array([-1.4, -1.0], [-0.6, -0.9], [-0.2, 0.3], [0.1, 0.0], [0.5, 0.9], [0.7, 0.2], [1.1, 1.4], [-0.8, -0.3])


def _factor_grid(
    loadings: np.ndarray, noise_levels: np.ndarray, unit: np.ndarray, log_prior: np.ndarray
) -> dict[str, Moments]:
    """Loadings (g, 2), noise (g, 2); the location is conjugate given them, factors and all else follow."""
    x, n = PAIRS.numpy() - PAIRS.numpy().mean(0), len(PAIRS)
    eye, total, scatter = np.eye(2), (PAIRS.numpy() - PAIRS.numpy().mean(0)).sum(0), x.T @ x
    covariance = loadings[:, :, None] * loadings[:, None, :] + noise_levels[:, :, None] * eye
    precision = np.linalg.inv(covariance)
    prior = np.diag(1.0 / (9.0 * unit**2))
    spread = np.linalg.inv(prior + n * precision)
    middle = np.einsum("gij,gjk,k->gi", spread, precision, total)
    fit = np.einsum("gi,gij,j->g", middle, precision, total) - np.einsum("gij,ji->g", precision, scatter)
    log_weights = log_prior + 0.5 * (fit + np.linalg.slogdet(spread @ prior)[1] - n * np.linalg.slogdet(covariance)[1])
    log_weights = log_weights - 0.5 * ((loadings / unit) ** 2).sum(1)
    # z_n | m ~ N(v wᵀ Ψ⁻¹ (x_n − m), v) with v = 1 / (1 + wᵀ Ψ⁻¹ w), and of it the part w z_n of a row
    v = 1.0 / (1.0 + (loadings**2 / noise_levels).sum(1))
    weighted = v[:, None] * loadings / noise_levels
    score = np.einsum("gi,gni->gn", weighted, x - middle[:, None])
    score_variance = v + np.einsum("gi,gij,gj->g", weighted, spread, weighted)
    return {
        "location": averaged(log_weights, middle + PAIRS.numpy().mean(0), variances(spread)),
        "log_noise": averaged(log_weights, np.log(noise_levels)),
        "log_covariance": averaged(log_weights, np.log(variances(covariance))),
        "correlation": averaged(log_weights, covariance[:, 0, 1] / np.sqrt(covariance[:, 0, 0] * covariance[:, 1, 1])),
        "part": averaged(
            log_weights, loadings[:, None, 0] * score, (loadings[:, 0] ** 2 * score_variance)[:, None]
        ),
    }  # fmt: skip


def ppca_moments() -> dict[str, Moments]:
    """By quadrature over the loadings and the logarithm of the noise."""
    unit = np.full(2, np.sqrt(PAIRS.numpy().var(0).mean()))
    points = grid((-4.5 * unit[0], 4.5 * unit[0], 61), (-4.5 * unit[0], 4.5 * unit[0], 61), (-5.0, 3.0, 61)).numpy()
    log_noise = points[:, 2]
    log_prior = -1.5 * log_noise - 0.5 * unit[0] ** 2 / np.exp(log_noise)
    found = _factor_grid(points[:, :2], np.exp(log_noise)[:, None].repeat(2, 1), unit, log_prior)
    return found | {"log_noise": Moments(*(np.asarray(part)[0] for part in found["log_noise"][:2]))}


def ppca_summed_moments() -> dict[str, Moments]:
    return {name: value for name, value in ppca_moments().items() if name != "part"}


def factor_analysis_moments() -> dict[str, Moments]:
    """By quadrature over two loadings and the logarithms of two noises."""
    unit = PAIRS.numpy().std(0)
    lines = [(-4.5 * s, 4.5 * s, 29) for s in unit] + [(-5.0, 4.0, 29)] * 2
    points = grid(*lines).numpy()
    log_noise = points[:, 2:]
    log_prior = (-1.5 * log_noise - 0.5 * unit**2 / np.exp(log_noise)).sum(1)
    return _factor_grid(points[:, :2], np.exp(log_noise), unit, log_prior)


def factor_quantities(draws: Draws) -> dict[str, np.ndarray]:
    """What rotations of the factors leave alone."""
    covariance = draws["covariance"]
    deviations = np.sqrt(variances(covariance))
    found = {
        "location": draws["location"], "log_noise": np.log(draws["noise"]), "log_covariance": 2.0 * np.log(deviations),
        "correlation": covariance[..., 0, 1] / deviations.prod(-1),
    }  # fmt: skip
    if "z" in draws:
        found["part"] = draws["z"][..., 0] * draws["loadings"][..., :1, 0]
    return found


# ------------------------------------------------------------------------------------- hidden Markov models
TALLY = torch.tensor([1, 0, 2, 6, 8, 5, 1])
SYMBOLS = torch.tensor([0, 0, 1, 2, 2, 2, 0])
SERIES = array([-1.2], [-0.4], [-0.8], [0.7], [1.4], [0.4], [-0.6])


def _paths(steps: int) -> tuple[np.ndarray, np.ndarray, Part]:
    """All paths, their log-probabilities, and the chances to move given each."""
    z = assignments(2, steps)
    member = (z[:, :, None] == np.arange(2)).astype(float)
    moves = 1.0 + np.einsum("mtk,mtl->mkl", member[:, :-1], member[:, 1:])
    log_prior = log_dirichlet(1.0 + member[:, 0]) + log_dirichlet(moves).sum(1)
    return z, log_prior, _part(log_prior, dirichlet(moves))


def _hmm(site: str, part: Part, *others: tuple[str, Part]) -> dict[str, Moments]:
    """The emission of each step's own state, and the chance to stay in it."""
    z, log_prior, moves = _paths(int(np.log2(len(part.evidence))))
    parts = _given(z, 2, log_prior, {site: part} | dict(others))
    stay = (np.einsum("mkk->mk", table) for table in moves[1:])
    return _own(z, parts | {"stay": Part(parts[site].evidence, *stay)})


def hmm_poisson_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁷ paths."""
    return _hmm("rates", _poisson(TALLY.double().numpy(), 1.0))


def hmm_categorical_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁷ paths."""
    return _hmm("probabilities", _categorical(SYMBOLS.numpy(), 1.0, 3))


def hmm_normal_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁷ paths, and quadrature over the variances."""
    x = SERIES[:, 0].numpy()
    mean, log_variance = _normal(x, 1.5, 0.125 * x.var())
    return _hmm("means", _beside(mean), ("covariances", _beside(log_variance)))


def hmm_quantities(draws: Draws) -> dict[str, np.ndarray]:
    found = {**draws, "stay": np.einsum("cikk->cik", draws["transitions"])}
    if "covariances" in found:
        found["covariances"] = found["covariances"][..., 0]
    logarithms = tuple(name for name in ("covariances",) if name in found)
    names = ("rates", "probabilities", "means")
    return _own_of(found, *(name for name in names if name in found), "stay", logarithms=logarithms)


# ------------------------------------------------------------------------------------------------- topics
BAGS = torch.tensor([[[0, 3], [1, 1]], [[0, 1], [1, 2]], [[2, 2], [3, 2]], [[1, 1], [3, 2]]], dtype=torch.int32)


def lda_moments() -> dict[str, Moments]:
    """By enumeration of the topics of all 14 tokens: the words that each document blends, and how alike two are."""
    document, word = (
        np.repeat(index, BAGS[..., 1].numpy().ravel())
        for index in (np.repeat(np.arange(len(BAGS)), BAGS.shape[1]), BAGS[..., 0].numpy().ravel())
    )
    z = assignments(2, len(word))
    member = (z[:, :, None] == np.arange(2)).astype(float)
    numbers = 1.5 + np.einsum("mik,id->mdk", member, np.eye(len(BAGS))[document])
    counts = 1.5 + np.einsum("mik,iv->mkv", member, np.eye(4)[word])
    log_weights = log_dirichlet(numbers).sum(1) + log_dirichlet(counts).sum(1)
    share, topic = dirichlet(numbers), dirichlet(counts)
    pair = share.mean.prod(-1) - share.sd[..., 0] ** 2  # E s₁ s₂
    blend = np.einsum("mdk,mkv->mdv", share.mean, topic.mean)
    second = np.einsum("mdk,mkv->mdv", share.mean**2 + share.sd**2, topic.mean**2 + topic.sd**2)
    second += 2.0 * pair[..., None] * topic.mean.prod(1)[:, None]
    return {"blend": averaged(log_weights, blend, second - blend**2)}


def lda_quantities(draws: Draws) -> dict[str, np.ndarray]:
    return {"blend": np.einsum("cidk,cikv->cidv", draws["shares"], draws["topics"])}
