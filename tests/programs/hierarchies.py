"""Groups that learn from one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from exact import Moments, array, averaged, beta, grid, linear_normal, moments, noise, summit, variances
from pyro_genmodels import datasets

Draws = Mapping[str, np.ndarray]

# --------------------------------------------------------------------------------------------- schools
SCHOOLS = datasets.load("eight_schools")
EFFECTS, ERRORS = SCHOOLS["y"].double(), SCHOOLS["sigma"].double()
SMALL_ERRORS = ERRORS / 4.0  # as if there had been sixteen times as many pupils


def schools(effects: Tensor, errors: Tensor) -> None:
    """Schools, centred: what a school does is drawn around the mean, which is right where each tells much of itself."""
    mean = pyro.sample("mean", dist.Normal(effects.new_tensor(0.0), 5.0))
    spread = pyro.sample("spread", dist.LogNormal(effects.new_tensor(2.0), 0.5))
    with pyro.plate("schools", len(effects)):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("effects", dist.Normal(effect, errors), obs=effects)


def schools_apart(effects: Tensor, errors: Tensor) -> None:
    """Eight schools, not centred: what a school does is the mean and so many spreads (D. Rubin, 1981)."""
    mean = pyro.sample("mean", dist.Normal(effects.new_tensor(0.0), 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(effects.new_tensor(5.0)))
    with pyro.plate("schools", len(effects)):
        raw = pyro.sample("raw", dist.Normal(effects.new_tensor(0.0), 1.0))
        effect = pyro.deterministic("effect", mean + spread * raw)
        pyro.sample("effects", dist.Normal(effect, errors), obs=effects)


def _schools(errors: np.ndarray, u: np.ndarray, log_prior: np.ndarray) -> dict[str, Moments]:
    """By quadrature over the log spread u; (mean, raw) are jointly normal given it, and effects are sums of them."""
    spread, n = np.exp(u), len(EFFECTS)
    design = np.concatenate([np.ones((len(u), n, 1)), spread[:, None, None] * np.eye(n)], 2)
    mean, covariance, log_evidence = linear_normal(
        design, EFFECTS.numpy(), np.zeros(n + 1), np.diag([25.0] + [1.0] * n), errors**2
    )
    log_weights = log_evidence + log_prior
    effect = (design @ mean[:, :, None])[:, :, 0]
    variance = variances(design @ covariance @ np.swapaxes(design, 1, 2))
    return {
        "mean": averaged(log_weights, mean[:, 0], covariance[:, 0, 0]),
        "spread": averaged(log_weights, spread),
        "raw": averaged(log_weights, mean[:, 1:], variances(covariance)[:, 1:]),
        "effect": averaged(log_weights, effect, variance),
    }


def schools_moments() -> dict[str, Moments]:
    u = np.linspace(-1.5, 5.0, 501)
    found = _schools(SMALL_ERRORS.numpy(), u, -0.5 * ((u - 2.0) / 0.5) ** 2)
    return {site: found[site] for site in ("mean", "spread", "effect")}


def schools_mode() -> dict[str, Any]:
    """Of p(mean, spread | effects): what a single school does is averaged out."""

    def log_density(point: Tensor) -> Tensor:
        total = (2.0 * point[1]).exp() + SMALL_ERRORS.square()
        fit = -0.5 * (total.log() + (EFFECTS - point[0]).square() / total).sum()
        return fit - point[0] ** 2 / 50.0 - 0.5 * ((point[1] - 2.0) / 0.5) ** 2 - point[1]

    point = summit(log_density, [5.0, 2.0])
    return {"mean": point[0], "spread": point[1].exp()}


def schools_apart_moments() -> dict[str, Moments]:
    u = np.linspace(-9.0, 8.0, 1001)
    return _schools(ERRORS.numpy(), u, u - np.log1p((np.exp(u) / 5.0) ** 2))


# ---------------------------------------------------------------------------------------- batting
HITS, AT_BATS = array(18, 15, 12, 9, 14, 7), array(45, 45, 40, 45, 38, 45)


def batting(hits: Tensor, at_bats: Tensor) -> None:
    """Players' skills around a common share; how near to it is unknown (B. Efron and C. Morris, 1975)."""
    share = pyro.sample("share", dist.Beta(hits.new_tensor(2.0), 4.0))
    size = pyro.sample("size", dist.Gamma(hits.new_tensor(3.0), 0.1))
    with pyro.plate("players", len(hits)):
        skill = pyro.sample("skill", dist.Beta(share * size, (1.0 - share) * size))
        pyro.sample("hits", dist.Binomial(at_bats, skill), obs=hits)


def _batting(share: Tensor, size: Tensor) -> Tensor:
    """log p(share, size, hits) with the skills integrated out."""

    def log_beta(a: Tensor, b: Tensor) -> Tensor:
        return a.lgamma() + b.lgamma() - (a + b).lgamma()

    a, b = (share * size)[..., None], ((1 - share) * size)[..., None]
    evidence = (log_beta(a + HITS, b + AT_BATS - HITS) - log_beta(a, b)).sum(-1)
    return evidence + share.log() + 3.0 * (-share).log1p() + 2.0 * size.log() - 0.1 * size


def batting_moments() -> dict[str, Moments]:
    """By quadrature over the share's logit and the size's logarithm; skills are Beta given both."""
    logit, log_size = grid((-3.5, 2.0, 301), (-3.0, 6.5, 301)).T
    share, size = logit.sigmoid(), log_size.exp()
    log_weights = (_batting(share, size) + share.log() + (-share).log1p() + log_size).numpy()
    a, b = (share * size)[:, None] + HITS, ((1 - share) * size)[:, None] + AT_BATS - HITS
    skill = beta(a.numpy(), b.numpy())
    return {
        **moments(log_weights, {"share": share.numpy(), "size": size.numpy()}),
        "skill": averaged(log_weights, skill.mean, skill.sd**2),
    }


def batting_mode() -> dict[str, Any]:
    """Of p(share, size | hits): a skill belongs to one row, and is averaged out."""
    point = summit(lambda p: _batting(p[0].sigmoid(), p[1].exp()), [-0.8, 3.0])
    return {"share": point[0].sigmoid(), "size": point[1].exp()}


# ----------------------------------------------------------------------------------------------- radon
COUNTY = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 4])
FLOOR = array(0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0, 1)
LOG_RADON = 1.2 - 0.8 * FLOOR + (0.5 * noise(5, seed=21))[COUNTY] + 0.7 * noise(12, seed=22)


def radon(county: Tensor, floor: Tensor, y: Tensor) -> None:
    """An intercept for each county, looked up by the houses; known variances (A. Gelman and J. Hill, 2007)."""
    overall = pyro.sample("overall", dist.Normal(y.new_tensor(0.0), 3.0))
    slope = pyro.sample("slope", dist.Normal(y.new_tensor(0.0), 2.0))
    with pyro.plate("counties", 5):
        intercept = pyro.sample("intercept", dist.Normal(overall, 0.5))
    with pyro.plate("houses", len(y)):
        pyro.sample("y", dist.Normal(intercept[county] + slope * floor, 0.7), obs=y)


def radon_moments() -> dict[str, Moments]:
    """All seven are jointly normal; an intercept is the overall one and a deviation."""
    own = (COUNTY[:, None] == torch.arange(5)).double().numpy()
    design = np.concatenate([np.ones((12, 1)), FLOOR.numpy()[:, None], own], 1)
    prior = np.diag([9.0, 4.0] + [0.25] * 5)
    mean, covariance, _ = linear_normal(design, LOG_RADON.numpy(), np.zeros(7), prior, np.full(12, 0.49))
    sums = np.concatenate([np.ones((5, 1)), np.zeros((5, 1)), np.eye(5)], 1)
    sd = np.sqrt(np.diag(covariance))
    return {
        "overall": Moments(mean[0], sd[0]),
        "slope": Moments(mean[1], sd[1]),
        "intercept": Moments(sums @ mean, np.sqrt(np.diag(sums @ covariance @ sums.T))),
    }


def radon_mode() -> dict[str, Any]:
    """No county is a single row: all are maximised, and the top of a normal is its mean."""
    return {site: both.mean for site, both in radon_moments().items()}


# ------------------------------------------------------------------------------------------- item response
RIGHT = array([1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 1], [1, 1, 0], [0, 1, 0])


def rasch(right: Tensor) -> None:
    """Item response: a student answers rightly if ability exceeds difficulty by a logistic error (G. Rasch, 1960)."""
    students, items = pyro.plate("students", len(right), dim=-2), pyro.plate("items", right.shape[1], dim=-1)
    with students:
        ability = pyro.sample("ability", dist.Normal(right.new_tensor(0.0), 1.0))
    with items:
        difficulty = pyro.sample("difficulty", dist.Normal(right.new_tensor(0.0), 1.5))
    with students, items:
        pyro.sample("right", dist.Bernoulli(logits=ability - difficulty), obs=right)


ABILITIES = torch.linspace(-6.0, 6.0, 49, dtype=torch.float64)


def _rasch(difficulty: Tensor) -> Tensor:
    """log p(difficulty, abilities, right), each ability over a grid: (m, student, ability) of (m, item)."""
    chances = ABILITIES - difficulty[:, :, None]  # (m, item, ability)
    fit = torch.einsum("si,mia->msa", RIGHT, chances) - torch.nn.functional.softplus(chances).sum(1)[:, None]
    return fit - 0.5 * ABILITIES.square()


def rasch_moments() -> dict[str, Moments]:
    """By quadrature over the three difficulties, and over the ability of each student given them."""
    difficulty = grid(*[(-7.0, 7.0, 33)] * 3)
    fit = _rasch(difficulty)
    log_weights = fit.logsumexp(2).sum(1) - 0.5 * (difficulty / 1.5).square().sum(1)
    weights = fit.softmax(2)
    mean, square = weights @ ABILITIES, weights @ ABILITIES.square()
    return {
        "ability": averaged(log_weights.numpy(), mean[:, :, None].numpy(), (square - mean.square())[:, :, None].numpy()),
        "difficulty": averaged(log_weights.numpy(), difficulty.numpy()),
    }


def rasch_mode() -> dict[str, Any]:
    """Of p(difficulty | right): marginal maximum likelihood, with a prior."""

    def log_density(difficulty: Tensor) -> Tensor:
        return _rasch(difficulty[None]).logsumexp(2).sum() - 0.5 * (difficulty / 1.5).square().sum()

    return {"difficulty": summit(log_density, [0.0, 0.0, 0.0])}


# ------------------------------------------------------------------------------------------------ animals
SEEN = array([3, 2, 3, 4], [1, 1, 0, 1], [4, 5, 4, 3], [2, 1, 2, 2])


def abundance(seen: Tensor) -> None:
    """How many animals live at a site, if each visit sees only some of them (J. Royle, 2004)."""
    rate = pyro.sample("rate", dist.Gamma(seen.new_tensor(4.0), 1.0))
    share = pyro.sample("share", dist.Beta(seen.new_tensor(4.0), 4.0))
    with pyro.plate("sites", len(seen), dim=-2):
        number = pyro.sample("number", dist.Poisson(rate))
        with pyro.plate("visits", seen.shape[1], dim=-1):
            pyro.sample("seen", dist.Binomial(number, share), obs=seen)


NUMBERS = torch.arange(81, dtype=torch.float64)


def _abundance(logit: Tensor, log_rate: Tensor) -> tuple[Tensor, Tensor]:
    """log p(rate, share, seen) as densities of both, (m,), and the chances of every number at every site, (m, site, 81)."""
    share, missed = torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)
    ways = NUMBERS.add(1.0).lgamma() - (NUMBERS - SEEN[:, :, None]).clamp(min=0.0).add(1.0).lgamma()
    ways = torch.where(SEEN.amax(1, keepdim=True) <= NUMBERS, ways.sum(1) - NUMBERS.add(1.0).lgamma(), -torch.inf)
    total = SEEN.sum(1, keepdim=True)
    misses = SEEN.shape[1] * NUMBERS - total  # (site, 81)
    terms = ways + NUMBERS * log_rate[:, None, None] - log_rate.exp()[:, None, None]
    terms = terms + total * share[:, None, None] + misses * missed[:, None, None]
    log_density = terms.logsumexp(2).sum(1) + 3.0 * (log_rate + share + missed) - log_rate.exp()
    return log_density, terms.softmax(2)


def abundance_moments() -> dict[str, Moments]:
    """By quadrature over the share's logit and the rate's logarithm, and summing every number up to eighty."""
    logit, log_rate = grid((-6.0, 5.0, 161), (-2.5, 4.0, 161)).T
    log_density, chances = _abundance(logit, log_rate)
    share, rate = logit.sigmoid(), log_rate.exp()
    log_weights = (log_density + log_rate + share.log() + (-share).log1p()).numpy()
    mean, square = chances @ NUMBERS, chances @ NUMBERS.square()
    return {
        **moments(log_weights, {"rate": rate.numpy(), "share": share.numpy()}),
        "number": averaged(log_weights, mean[:, :, None].numpy(), (square - mean.square())[:, :, None].numpy()),
    }


def abundance_mode() -> dict[str, Any]:
    """Of p(rate, share | seen), the numbers summed out."""
    point = summit(lambda p: _abundance(p[:1], p[1:])[0].sum(), [0.0, 1.2])
    return {"share": point[0].sigmoid(), "rate": point[1].exp()}


# --------------------------------------------------------------------------------- matrix factorisation
RATINGS = array([1.4, -0.6, 2.1, 0.3, -1.0], [-0.2, -0.9, 1.2, 1.5, 0.8])
IS_RATED = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 0]], dtype=torch.bool)


def ratings(y: Tensor, is_rated: Tensor) -> None:
    """Probabilistic matrix factorisation; some ratings are missing (R. Salakhutdinov and A. Mnih, 2007)."""
    users, films = pyro.plate("users", len(y), dim=-2), pyro.plate("films", y.shape[1], dim=-1)
    with users:
        taste = pyro.sample("taste", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    with films:
        style = pyro.sample("style", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
    with users, films, poutine.mask(mask=is_rated):
        pyro.sample("y", dist.Normal((taste * style).sum(-1), 0.5), obs=y)


def ratings_moments() -> dict[str, Moments]:
    """By quadrature over tastes up to a turn: their QR factor has elements χ(2), N(0, 1) and χ(1), M. Bartlett (1933)."""
    log_first, second, third = grid((-7.0, 1.8, 61), (-5.5, 5.5, 45), (-5.5, 5.5, 45)).numpy().T
    first = np.exp(log_first)
    log_weights = 2.0 * log_first - 0.5 * (first**2 + second**2 + third**2)
    taste = np.stack([np.stack([first, 0 * first], 1), np.stack([second, third], 1)], 1)  # (m, user, 2)
    means, spreads = [], []
    for film in range(RATINGS.shape[1]):
        seen = IS_RATED[:, film].numpy()
        noise = np.full((1, int(seen.sum())), 0.25)
        style, covariance, log_evidence = linear_normal(
            taste[:, seen], RATINGS[seen, film].numpy(), np.zeros(2), np.eye(2)[None], noise
        )
        log_weights = log_weights + log_evidence
        means.append((taste @ style[:, :, None])[:, :, 0])
        spreads.append(variances(taste @ covariance @ np.swapaxes(taste, 1, 2)))
    return {"product": averaged(log_weights, np.stack(means, 2), np.stack(spreads, 2))}


def ratings_quantities(draws: Draws) -> dict[str, np.ndarray]:
    """Tastes and styles may be turned together; their product may not."""
    return {"product": (draws["taste"] * draws["style"][..., None, :, :]).sum(-1)}


# ------------------------------------------------------------------------------------ two parameters an item
MARKS = array([1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0])


def item_response(marks: Tensor) -> None:
    """Items differ in difficulty and in how well they tell students apart (A. Birnbaum, 1968)."""
    students, items = pyro.plate("students", len(marks), dim=-2), pyro.plate("items", marks.shape[1], dim=-1)
    with students:
        ability = pyro.sample("ability", dist.Normal(marks.new_tensor(0.0), 1.0))
    with items:
        slope = pyro.sample("slope", dist.LogNormal(marks.new_tensor(0.0), 0.5))
        difficulty = pyro.sample("difficulty", dist.Normal(marks.new_tensor(0.0), 1.5))
    with students, items:
        pyro.sample("marks", dist.Bernoulli(logits=slope * (ability - difficulty)), obs=marks)


def item_response_mode() -> dict[str, Any]:
    """Of p(slope, difficulty | marks): abilities are averaged out over a grid."""

    def log_density(point: Tensor) -> Tensor:
        log_slope, difficulty = point[:4], point[4:]
        chances = log_slope.exp() * (ABILITIES[:, None] - difficulty)  # (ability, item)
        fit = MARKS @ chances.T - torch.nn.functional.softplus(chances).sum(1) - 0.5 * ABILITIES.square()
        prior = -0.5 * (log_slope / 0.5).square().sum() - log_slope.sum() - 0.5 * (difficulty / 1.5).square().sum()
        return fit.logsumexp(1).sum() + prior

    point = summit(log_density, [0.0] * 8)
    return {"slope": point[:4].exp(), "difficulty": point[4:]}
