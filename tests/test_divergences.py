"""Divergences are those of scipy, of a formula or of brute force; bands hold what they say."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from pyro_genmodels.metrics import divergences
from pyro_genmodels.metrics.divergences import (
    energy_distance,
    frechet,
    jensen_shannon,
    kullback_leibler,
    maximum_mean_discrepancy,
    modes,
    null_band,
    sliced_wasserstein,
    wasserstein,
    wasserstein_line,
    wasserstein_normal,
    wasserstein_quantiles,
)

RNG = np.random.default_rng(0)
SIZES = pytest.mark.parametrize("sizes", [(30, 30), (7, 30), (30, 12), (1, 5)])


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(divergences).failed == 0


@SIZES
def test_distances_on_the_line_are_those_of_scipy(sizes: tuple[int, int]) -> None:
    x, y = RNG.standard_normal(sizes[0]), RNG.gamma(2.0, size=sizes[1])
    assert wasserstein_line(x, y) == pytest.approx(scipy.stats.wasserstein_distance(x, y), abs=1e-12)
    assert wasserstein(x, y) == pytest.approx(scipy.stats.wasserstein_distance(x, y), abs=1e-9)
    assert wasserstein_line(x, y, 2.0) == pytest.approx(wasserstein(x, y, 2.0), abs=1e-9)
    assert energy_distance(x, y) == pytest.approx(scipy.stats.energy_distance(x, y) ** 2, abs=1e-12)


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_transport_is_the_best_assignment(order: float) -> None:
    x, y = RNG.standard_normal((2, 6, 3))
    cost = np.linalg.norm(x[:, None] - y, axis=-1) ** order
    best = min(cost[np.arange(6), list(p)].mean() for p in permutations(range(6)))
    assert wasserstein(x, y, order) == pytest.approx(best ** (1 / order), abs=1e-12)
    assert wasserstein(x, np.concatenate([y, y]), order) == pytest.approx(best ** (1 / order), abs=1e-9)  # by programming


def test_the_distance_of_a_shifted_sample_is_the_shift() -> None:
    x, shift = RNG.standard_normal((60, 3)), np.array([1.0, -2.0, 2.0])
    assert wasserstein(x, x + shift) == pytest.approx(3.0, abs=1e-12)
    assert wasserstein(torch.tensor(x), torch.tensor(x + shift), 2.0) == pytest.approx(3.0, abs=1e-12)
    # E (u·δ)² = ‖δ‖²/3 over directions; the variance of (u·δ)² is (3/15 − 1/9)‖δ‖⁴; five standard errors, false alarm 1e-6
    found = sliced_wasserstein(x, x + shift, 2.0, directions=4000) ** 2
    assert found == pytest.approx(3.0, abs=5 * (4 / 45 * 81 / 4000) ** 0.5)


def test_on_a_line_all_directions_are_one() -> None:
    x, y = RNG.standard_normal(20), RNG.standard_normal(33)
    assert sliced_wasserstein(x, y, directions=3) == pytest.approx(wasserstein_line(x, y), abs=1e-12)


@pytest.mark.parametrize("bandwidth", [0.7, None])
def test_discrepancies_of_kernels_are_sums_over_pairs(bandwidth: float | None) -> None:
    x, y = RNG.standard_normal((9, 2)), RNG.standard_normal((12, 2)) + 1.0
    rows = np.concatenate([x, y])
    apart = [np.linalg.norm(a - b) for i, a in enumerate(rows) for b in rows[i + 1 :]]
    h = float(np.median(apart)) if bandwidth is None else bandwidth

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return math.exp(-float(np.square(a - b).sum()) / (2 * h * h))

    def mean(a: np.ndarray, b: np.ndarray, f: Callable[[np.ndarray, np.ndarray], float]) -> float:
        return float(np.mean([f(s, t) for s in a for t in b]))

    expected = mean(x, x, k) + mean(y, y, k) - 2 * mean(x, y, k)
    assert maximum_mean_discrepancy(x, y, bandwidth) == pytest.approx(expected, rel=1e-9)
    norm = lambda s, t: float(np.linalg.norm(s - t))  # noqa: E731
    assert energy_distance(x, y) == pytest.approx(2 * mean(x, y, norm) - mean(x, x, norm) - mean(y, y, norm), abs=1e-12)


def test_frechet_is_the_distance_of_gaussians() -> None:
    x, y = RNG.standard_normal((40, 3)) @ RNG.standard_normal((3, 3)), RNG.standard_normal((50, 3)) + 1.0
    first, second = np.cov(x.T), np.cov(y.T)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(
        first + second - 2 * scipy.linalg.sqrtm(first @ second).real
    )
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet(x[:, 0], 2 * x[:, 0] + 3) == pytest.approx((x[:, 0].mean() + 3) ** 2 + x[:, 0].var(ddof=1), rel=1e-9)


def test_transport_of_gaussians_has_a_closed_form() -> None:
    """Of covariances that commute W₂² is the sum of those on the axes; a rotation of both changes nothing."""
    means, scales = RNG.standard_normal((2, 4)), RNG.gamma(2.0, size=(2, 4))
    expected = float(np.square(means[0] - means[1]).sum() + np.square(scales[0] - scales[1]).sum())
    turn = scipy.stats.ortho_group.rvs(4, random_state=0)
    moments = [part for m, s in zip(means, scales) for part in (turn @ m, turn @ np.diag(s**2) @ turn.T)]
    assert wasserstein_normal(*moments) ** 2 == pytest.approx(expected, rel=1e-9)
    flat = [means[0], np.zeros((4, 4)), means[1], np.diag(scales[1] ** 2)]  # a point: all mass goes there
    assert wasserstein_normal(*flat) ** 2 == pytest.approx(
        np.square(means[0] - means[1]).sum() + np.square(scales[1]).sum(), rel=1e-9
    )


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_transport_on_the_line_is_that_of_quantiles(order: float) -> None:
    uniform, shifted = scipy.stats.uniform(0, 1), scipy.stats.uniform(2, 5)  # quantiles u and 2 + 5u
    expected = ((6 ** (order + 1) - 2 ** (order + 1)) / (4 * (order + 1))) ** (1 / order)
    assert wasserstein_quantiles(uniform.ppf, shifted.ppf, order) == pytest.approx(expected, rel=1e-8)
    normal = torch.distributions.Normal(1.0, 2.0)
    assert wasserstein_quantiles(lambda u: normal.icdf(torch.tensor(u)), scipy.stats.norm(1, 2).ppf) < 1e-6
    levels = (np.arange(200_000) + 0.5) / 200_000
    one, other = scipy.stats.expon.ppf, scipy.stats.gamma(3.0).ppf
    sampled = wasserstein_line(one(levels), other(levels), order)  # by midpoints
    assert wasserstein_quantiles(one, other, order) == pytest.approx(sampled, rel=1e-3)


def test_a_sample_is_no_distance_from_itself() -> None:
    x = RNG.standard_normal((25, 2))
    for distance in (wasserstein, sliced_wasserstein, energy_distance, maximum_mean_discrepancy):
        assert distance(x, x[::-1]) == pytest.approx(0.0, abs=1e-9)


def gaussian(mean: float, scale: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.distributions.Normal(mean, scale).log_prob


def test_divergences_of_gaussians() -> None:
    torch.manual_seed(0)
    x, y = 1.0 + 0.5 * torch.randn(20_000).double(), torch.randn(20_000).double()
    found = kullback_leibler(gaussian(1.0, 0.5), gaussian(0.0, 1.0), x)
    expected = math.log(2.0) + (0.25 + 1.0) / 2 - 0.5
    assert abs(found.value - expected) < 5 * found.se < 0.05  # five standard errors, false alarm 1e-6
    grid = np.linspace(-12, 12, 100_001)
    p, q = scipy.stats.norm.pdf(grid, 1.0, 0.5), scipy.stats.norm.pdf(grid)
    exact = scipy.spatial.distance.jensenshannon(p, q) ** 2
    shared = jensen_shannon(gaussian(1.0, 0.5), gaussian(0.0, 1.0), x, y)
    assert abs(shared.value - exact) < 5 * shared.se < 0.02


def test_of_lines_that_do_not_meet_only_transport_tells_how_far() -> None:
    """The parallel lines of Arjovsky et al.: KL is infinite and JS log 2 for every gap, W₁ is the gap."""
    height = torch.rand(50, dtype=torch.float64)
    for gap in (1.0, 0.1, 1e-3):
        lines = [torch.stack([torch.full_like(height, at), height], -1) for at in (0.0, gap)]
        on = [lambda x, at=at: torch.where(x[:, 0] == at, 0.0, -torch.inf) for at in (0.0, gap)]
        assert kullback_leibler(on[0], on[1], lines[0]).value == math.inf
        assert jensen_shannon(on[0], on[1], *lines).value == pytest.approx(math.log(2.0))
        assert wasserstein(*lines) == pytest.approx(gap)


def test_the_test_of_a_band_keeps_its_level() -> None:
    """100 pairs of samples of one distribution: p is uniform. Kolmogorov's test, false alarm 0.001."""
    rng = np.random.default_rng(1)
    found = [null_band(energy_distance, *rng.standard_normal((2, 12, 2)), permutations=99, seed=i).p for i in range(100)]
    assert scipy.stats.kstest(found, "uniform").pvalue > 0.001


STATISTICS = [energy_distance, maximum_mean_discrepancy, sliced_wasserstein, wasserstein, frechet]


@pytest.mark.parametrize("distance", STATISTICS)
def test_a_band_counts_what_rounding_tells_apart(distance: Callable[..., float]) -> None:
    """Of the 6 splits of 2 + 2 rows the given one and its mirror are the farthest: p = 1/3. Five standard errors, 1e-6."""
    for seed in range(6):
        x, y = np.random.default_rng(seed).standard_normal((2, 2, 3)) + np.array([[[0.0]], [[8.0]]])
        found = null_band(distance, x, y, permutations=500, seed=seed)
        assert abs(found.p - 1 / 3) < 5 * (2 / 9 / 500) ** 0.5


@pytest.mark.parametrize("distance", STATISTICS)
def test_a_band_tells_samples_of_two_distributions(distance: Callable[..., float]) -> None:
    x, y = RNG.standard_normal((40, 2)), RNG.standard_normal((40, 2)) + 2.0
    band = null_band(distance, x, y, permutations=60)
    assert band.p == pytest.approx(1 / 61) and band.value > band.quantile(0.95) and band.null.shape == (60,)


def test_modes_count_what_lies_near_them() -> None:
    angles = np.arange(8) * np.pi / 4
    centres = 2.0 * np.stack([np.cos(angles), np.sin(angles)], -1)
    rng = np.random.default_rng(2)
    x = centres[rng.integers(0, 8, 20_000)] + 0.1 * rng.standard_normal((20_000, 2))
    found, share = modes(x, centres, 0.1), 1 - math.exp(-4.5)
    assert found.hit == 8
    assert abs(found.quality - share) < 5 * (share * (1 - share) / 20_000) ** 0.5  # five standard errors, false alarm 1e-6
    # cut at r = 3 standard deviations a variance is 1 − (r²/2) / (exp(r²/2) − 1); five standard errors of 2,400 draws
    cut = 1 - 4.5 / (math.exp(4.5) - 1)
    assert np.abs(found.covariances / 0.01 - cut * np.eye(2)).max() < 5 * (2 / 2400) ** 0.5
    few = modes(np.concatenate([centres[:3].repeat(10, 0), np.zeros((10, 2))]), centres, 0.1)
    assert few.hit == 3 and few.quality == 0.75 and few.counts.tolist() == [10, 10, 10, 0, 0, 0, 0, 0]
    assert np.isnan(few.covariances[3:]).all() and np.abs(few.covariances[:3]).max() < 1e-30


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: wasserstein(np.zeros((5001, 1)), np.zeros((5001, 1))), "at most 4000, or use sliced_wasserstein"),
        (lambda: wasserstein(np.zeros((301, 1)), np.zeros((5, 1))), "at most 300 if the sizes differ"),
        (lambda: wasserstein(np.zeros((5, 1)), np.zeros((5, 2))), "x has 1 features and y 2"),
        (lambda: wasserstein_line(np.zeros((5, 2)), np.zeros((5, 2))), "Use wasserstein or sliced_wasserstein"),
        (lambda: wasserstein_line([1.0], [math.nan]), "y holds 1 values that are NaN"),
        (lambda: wasserstein_line([1.0], [2.0], 0.5), "order is 0.5, but must be at least 1"),
        (lambda: energy_distance([], [1.0]), "x must be a sample"),
        (lambda: sliced_wasserstein([1.0], [1.0], directions=0), "directions is 0"),
        (lambda: maximum_mean_discrepancy([1.0], [1.0], 0.0), "bandwidth is 0.0, but must be positive"),
        (lambda: null_band(energy_distance, [1.0], [1.0], 0), "permutations is 0"),
        (lambda: modes(np.zeros((2, 2)), np.zeros((1, 2)), 0.0), "scale is 0.0"),
        (lambda: frechet([1.0], [1.0, 2.0]), "needs at least 2 rows"),
        (lambda: wasserstein_normal([0.0], np.eye(2), [0.0], np.eye(2)), "but the means have 1 features"),
        (lambda: wasserstein_normal([0.0], [[-1.0]], [0.0], [[1.0]]), "covariance_x is no covariance"),
        (lambda: wasserstein_normal(np.zeros(2), np.eye(2), np.zeros(2), np.ones((2, 2)) - np.eye(2)), "covariance_y is no"),
        (lambda: wasserstein_quantiles(scipy.stats.norm.ppf, scipy.stats.cauchy.ppf, 2.0), "does not converge"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


# ------------------------------------------------------------------------------------------------ what hides from quadrature
@pytest.mark.parametrize(
    ("quantile", "order", "expected"),
    [
        (scipy.stats.bernoulli(0.001).ppf, 1.0, 0.001),
        (lambda level: 1e3 * (level > 0.99999), 1.0, 0.01),
        (scipy.stats.norm(0.0, 1e-6).ppf, 1.0, 1e-6 * math.sqrt(2.0 / math.pi)),
        (scipy.stats.t(3).ppf, 2.0, math.sqrt(3.0)),
    ],
    ids=["rare", "far", "small", "heavy"],
)
def test_quantiles_that_differ_in_few_levels_are_apart(
    quantile: Callable[[np.ndarray], np.ndarray], order: float, expected: float
) -> None:
    assert wasserstein_quantiles(quantile, lambda level: 0.0 * level, order) == pytest.approx(expected, rel=1e-6)


def test_large_orders_come_near_the_largest_distance() -> None:
    assert wasserstein_line([0.0], [0.1], 400) == pytest.approx(0.1)
    assert wasserstein_line([0.0, 1.0], [5.0, 1.0], 500) == pytest.approx(4.0 * 0.5 ** (1 / 500))
    assert wasserstein([[0.0]], [[5.0]], 500) == pytest.approx(5.0)
    assert sliced_wasserstein([[0.0]], [[5.0]], 500) == pytest.approx(5.0)
    with pytest.raises(ValueError, match="order is inf, but must be at least 1 and finite"):
        wasserstein_line([0.0], [5.0], math.inf)


def test_log_densities_of_other_shapes_are_refused() -> None:
    one = torch.distributions.Normal(0.0, 1.0)
    with pytest.raises(ValueError, match=r"one number for each of at least 2 rows, \(rows,\), but gave \(9, 9\)"):
        jensen_shannon(lambda x: one.log_prob(x)[:, 0], one.log_prob, torch.randn(9, 1), torch.randn(9, 1))
    with pytest.raises(ValueError, match=r"but gave \(9, 3\)"):
        kullback_leibler(one.log_prob, one.log_prob, torch.randn(9, 3))


def test_a_band_gives_the_distance_rows_as_they_came() -> None:
    shapes = []

    def distance(x: np.ndarray, y: np.ndarray) -> float:
        shapes.append((x.shape[1:], y.shape[1:]))
        return energy_distance(x, y)

    null_band(distance, torch.rand(6, 4, 3), torch.rand(5, 4, 3), permutations=3)
    assert set(shapes) == {((4, 3), (4, 3))}
    with pytest.raises(ValueError, match="The distance is nan, and 3 of 3 permutations give none that is finite"):
        null_band(lambda x, y: math.nan, torch.rand(6), torch.rand(5), permutations=3)
