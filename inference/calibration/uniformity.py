"""Whether values are uniform: an exact test by their empirical distribution function, and its simultaneous band.

Of n values, n_i lie below i / points. If they are uniform, each n_i is binomial, and n_1, n_2, ... are a Markov chain. γ is
the least probability of the tails that the n_i lie in; values whose γ is too small leave a band that is as wide at every
point as its pointwise probability allows.

References:
    T. Säilynoja, P. Bürkner and A. Vehtari, Graphical test for discrete uniformity and its applications in goodness-of-fit
        evaluation and multiple sample comparison (2022).
"""

from __future__ import annotations

import functools
import math

import numpy as np

__all__ = ["band", "critical", "gamma", "p_value", "points_for"]

_POINTS = 100  # at which an empirical distribution function is held against its band
_SMALLEST = 1e-13  # pointwise probability below which 1 − P(inside) has lost its digits


def points_for(draws: int, count: int) -> int:
    """Cells into which (0, 1) is divided for ``count`` ranks among ``draws`` draws each."""
    return min(_POINTS, draws + 1, count)


def gamma(values: np.ndarray, points: int) -> float:
    """γ of values that should be uniform on (0, 1): the least tail probability of their distribution function.

    γ = 2 min_i min(P(N_i ≤ n_i), P(N_i ≥ n_i)),  n_i values lie below i / points,  N_i ~ Binomial(n, i / points).
    """
    counts = np.searchsorted(np.sort(values), np.arange(1, points) / points, side="right")
    return float(_tails(len(values), points)[np.arange(points - 1), counts].min())


@functools.lru_cache(maxsize=4096)
def p_value(gamma: float, count: int, points: int) -> float:
    """P(γ(U) ≤ ``gamma``) for ``count`` uniform values: exact, by the Markov chain of the counts from point to point."""
    if gamma < _SMALLEST:
        return 0.0
    from scipy.special import gammaln

    tails, factorial = _tails(count, points), gammaln(np.arange(count + 1) + 1.0)
    states, mass = np.zeros(1, dtype=int), np.ones(1)
    for i in range(points - 1):
        inside = np.flatnonzero(tails[i] > gamma)
        if not inside.size:
            return 1.0
        share = 1.0 / (points - i)
        new, left = inside[:, None] - states, count - states
        is_possible = (new >= 0) & (new <= left)
        new = np.where(is_possible, new, 0)
        log_mass = factorial[left] - factorial[new] - factorial[np.where(is_possible, left - new, 0)]
        log_mass = log_mass + new * math.log(share) + (left - new) * math.log1p(-share)
        mass = np.exp(np.where(is_possible, log_mass, -np.inf)) @ mass
        states = inside
    return float(min(1.0, max(0.0, 1.0 - mass.sum())))


@functools.lru_cache(maxsize=64)
def critical(level: float, count: int, points: int) -> float:
    """The largest γ that uniform values fall short of, or reach, with a probability of at most 1 − ``level``."""
    low, high = math.log(_SMALLEST), 0.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if p_value(math.exp(middle), count, points) <= 1.0 - level else (low, middle)
    return math.exp(low)


def band(level: float, count: int, points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points z, and the least and the largest share of ``count`` uniform values below each, with probability ``level``."""
    inside = _tails(count, points) > critical(level, count, points)
    low, high = inside.argmax(1), count - inside[:, ::-1].argmax(1)
    return np.arange(1, points) / points, low / count, high / count


@functools.lru_cache(maxsize=16)
def _tails(count: int, points: int) -> np.ndarray:
    """2 min(P(N ≤ n), P(N ≥ n)) for N ~ Binomial(count, i / points), (points − 1, count + 1)."""
    from scipy.stats import binom

    z = np.arange(1, points)[:, None] / points
    n = np.arange(count + 1)
    return 2.0 * np.minimum(binom.cdf(n, count, z), binom.sf(n - 1, count, z))
