"""How far two distributions are apart: by samples, or by log-densities where there are any.

Distances between samples have a floor: two samples of one distribution are not zero apart. ``null_band`` gives it, for any
of them. Nor do they see all: with 2,000 draws of eight Gaussians, components that are 1.5 times too wide lie inside the band
of most. ``modes`` counts what is known of such data beside them.

References:
    M. Arjovsky, S. Chintala and L. Bottou, Wasserstein generative adversarial networks (2017).
    G. Székely and M. Rizzo, Energy statistics (2013).
    A. Gretton et al., A kernel two-sample test (2012).
    N. Bonneel, J. Rabin, G. Peyré and H. Pfister, Sliced and Radon Wasserstein barycenters of measures (2015).
    A. Srivastava et al., VEEGAN: reducing mode collapse in GANs using implicit variational learning (2017): modes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import scipy.integrate
import scipy.optimize
import scipy.sparse
import scipy.spatial.distance
import torch
from torch import Tensor

__all__ = [
    "Band", "Estimate", "Modes", "energy_distance", "frechet", "jensen_shannon", "kullback_leibler",
    "maximum_mean_discrepancy", "modes", "null_band",
    "paired", "sliced_wasserstein", "wasserstein", "wasserstein_line", "wasserstein_normal", "wasserstein_quantiles",
]  # fmt: skip

Quantiles = Callable[[Any], Any]
_COST = 1e4  # of the longest way, which the tolerance of linear programming, 1e-7, is small against
_MOST = 4000  # rows that exact transport is computed for: an assignment of n rows takes about n³ operations


class Estimate(NamedTuple):
    """A mean over draws, and its standard error."""

    value: float
    se: float


class Band(NamedTuple):
    """A distance, and what it is between random halves of all rows together.

    Attributes:
        value: The distance of the two samples.
        null: Distances of permuted samples, (permutations,).
        p: Share of the null, with the value in it, that is at least the value: of a valid test that both are of one
            distribution.
    """

    value: float
    null: np.ndarray
    p: float

    def quantile(self, share: float = 0.95) -> float:
        """The quantile of the null that a value beyond the band passes."""
        return float(np.quantile(self.null, share))


class Modes(NamedTuple):
    """How draws spread over known modes.

    Attributes:
        hit: Modes that at least ``least`` draws lie near.
        quality: Share of the draws that lie near a mode.
        counts: Draws near each mode, (mode,).
        covariances: Covariance of the draws near each mode, (mode, feature, feature); NaN where there are fewer than two.
    """

    hit: int
    quality: float
    counts: np.ndarray
    covariances: np.ndarray


def paired(x: Any, y: Any, names: tuple[str, str] = ("x", "y")) -> tuple[np.ndarray, np.ndarray]:
    """Two samples as float64 tables, (rows, features).

    Raises:
        ValueError: If one is no sample of finite numbers, or they have different numbers of features; by their names.
    """
    tables = []
    for name, rows in zip(names, (x, y), strict=True):
        table = np.asarray(rows.detach().cpu().double() if isinstance(rows, Tensor) else rows, float)
        if not table.ndim or not len(table):
            raise ValueError(f"{name} must be a sample, (rows,) or (rows, …), but has shape {table.shape}.")
        if not np.isfinite(table).all():
            raise ValueError(f"{name} holds {int((~np.isfinite(table)).sum())} values that are NaN or infinite.")
        tables.append(table.reshape(len(table), -1))
    if tables[0].shape[1] != tables[1].shape[1]:
        raise ValueError(
            f"{names[0]} has {tables[0].shape[1]} features and {names[1]} {tables[1].shape[1]}: they must have the same."
        )
    return tables[0], tables[1]


def _check_order(order: float) -> None:
    if not 1 <= order < math.inf:
        raise ValueError(f"order is {order}, but must be at least 1 and finite.")


def _on_lines(x: np.ndarray, y: np.ndarray, order: float) -> np.ndarray:
    """W_p of the columns of two tables, (feature,): the distance of the quantile functions."""
    x, y = np.sort(x, 0), np.sort(y, 0)
    if len(x) == len(y):
        return _power_mean(np.abs(x - y), order)
    levels = np.unique(np.concatenate([np.arange(1, len(x) + 1) / len(x), np.arange(1, len(y) + 1) / len(y)]))
    widths, middles = np.diff(levels, prepend=0.0), levels - 0.5 * np.diff(levels, prepend=0.0)
    at_x, at_y = ((middles * len(rows)).astype(int).clip(max=len(rows) - 1) for rows in (x, y))
    return _power_mean(np.abs(x[at_x] - y[at_y]), order, widths)


def _power_mean(apart: np.ndarray, order: float, shares: np.ndarray | None = None) -> np.ndarray:
    """(mean of apart^p)^(1/p) over the rows; of large p, too."""
    largest = apart.max(0)
    scale = np.where(largest > 0, largest, 1.0)
    return scale * np.average((apart / scale) ** order, 0, shares) ** (1 / order)


def wasserstein_line(x: Any, y: Any, order: float = 1.0) -> float:
    """Exact Wasserstein distance of two samples of numbers: (∫ |F_x⁻¹(u) − F_y⁻¹(u)|^p du)^(1/p).

    Args:
        x: (rows,).
        y: (rows of its own,).
        order: p, at least 1.

    Example:
        >>> wasserstein_line([0.0, 1.0], [5.0, 6.0])
        5.0
    """
    _check_order(order)
    one, other = paired(x, y)
    if one.shape[1] != 1:
        raise ValueError(f"x has {one.shape[1]} features, but a line has one. Use wasserstein or sliced_wasserstein.")
    return float(_on_lines(one, other, order)[0])


def wasserstein_quantiles(quantile_x: Quantiles, quantile_y: Quantiles, order: float = 1.0) -> float:
    """Wasserstein distance of two distributions on the line, from their quantile functions, by quadrature.

    Args:
        quantile_x: F_x⁻¹, from levels between 0 and 1, (levels,), to numbers, (levels,); such as ``scipy.stats.norm.ppf``.
        quantile_y: F_y⁻¹.
        order: p, at least 1.

    Raises:
        ValueError: If the quadrature does not converge, as where the distance is infinite.

    Example:
        >>> from scipy import stats
        >>> round(wasserstein_quantiles(stats.norm(0, 1).ppf, stats.norm(3, 5).ppf, order=2), 6)
        5.0
    """
    _check_order(order)

    def apart(level: float) -> float:
        at = np.array([min(level, np.nextafter(1.0, 0.0))])  # rounding may put a level on the end
        return float(np.abs(np.asarray(quantile_x(at)) - np.asarray(quantile_y(at)))[0] ** order)

    # jumps may hide in the tails: from each level to ten times as near to the end
    tail = 0.5 * 10.0 ** -np.arange(9.0)
    ends = np.concatenate([[0.0], tail[::-1], 1.0 - tail[1:], [1.0]])
    parts = [scipy.integrate.quad(apart, *part, limit=200, epsabs=0.0, full_output=True) for part in pairwise(ends)]
    value, error = (sum(part[i] for part in parts) for i in range(2))
    size = float(np.abs([quantile_x(ends[1:-1]), quantile_y(ends[1:-1])]).max())  # of what may be rounding
    if not np.isfinite(value) or error > 1e-5 * max(value, 1e-9 * size**order):
        raise ValueError(
            f"The integral of |F_x⁻¹ − F_y⁻¹|^{order:g} does not converge: {value:g} with an error of "
            f"{error:g}. It is infinite where the tails are heavy; take a smaller order."
        )
    return float(value ** (1 / order))


def wasserstein(x: Any, y: Any, order: float = 1.0) -> float:
    """Exact Wasserstein distance of two samples: the least mean of ‖x_i − y_j‖^p over all plans of transport, to the 1/p.

    By assignment for samples of one size, else by linear programming, which is slower.

    Args:
        x: (rows, …), at most 4,000; 300 if the sizes differ.
        y: (rows of its own, …).
        order: p, at least 1.

    Raises:
        ValueError: If there are more rows.
    """
    _check_order(order)
    one, other = paired(x, y)
    n, m = len(one), len(other)
    most = _MOST if n == m else 300
    if max(n, m) > most:
        raise ValueError(
            f"Exact transport of {n} to {m} rows takes too long: give at most {most}"
            f"{'' if n == m else ' if the sizes differ'}, or use sliced_wasserstein."
        )
    apart = scipy.spatial.distance.cdist(one, other)
    scale = float(apart.max()) or 1.0
    cost = _COST * (apart / scale) ** order
    if n == m:
        rows, columns = scipy.optimize.linear_sum_assignment(cost)
        return float(_power_mean(apart[rows, columns], order))
    leaving = scipy.sparse.kron(scipy.sparse.eye(n), np.ones((1, m)))
    arriving = scipy.sparse.kron(np.ones((1, n)), scipy.sparse.eye(m))
    shares = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    plan = scipy.optimize.linprog(cost.ravel(), A_eq=scipy.sparse.vstack([leaving, arriving]), b_eq=shares, method="highs")
    return scale * float((max(plan.fun, 0.0) / _COST) ** (1 / order))


def sliced_wasserstein(x: Any, y: Any, order: float = 1.0, directions: int = 200, seed: int = 0) -> float:
    """Wasserstein distance on random lines: (mean over directions of W_p^p of the projections)^(1/p).

    Args:
        x: (rows, …).
        y: (rows of its own, …).
        order: p, at least 1.
        directions: How many, drawn uniformly.
        seed: Of the directions.
    """
    _check_order(order)
    if directions < 1:
        raise ValueError(f"directions is {directions}, but must be at least 1.")
    one, other = paired(x, y)
    lines = np.random.default_rng(seed).standard_normal((one.shape[1], directions))
    lines /= np.linalg.norm(lines, axis=0)
    return float(_power_mean(_on_lines(one @ lines, other @ lines, order), order))


def energy_distance(x: Any, y: Any) -> float:
    """2 E‖X − Y‖ − E‖X − X'‖ − E‖Y − Y'‖ over all pairs of the samples, at least 0; scipy's is its root.

    Args:
        x: (rows, …).
        y: (rows of its own, …).
    """
    one, other = paired(x, y)
    return float(_two_sample(-scipy.spatial.distance.cdist(*[np.concatenate([one, other])] * 2), len(one)))


def maximum_mean_discrepancy(x: Any, y: Any, bandwidth: float | None = None) -> float:
    """MMD², E k(X, X') + E k(Y, Y') − 2 E k(X, Y) over all pairs of the samples, with k = exp(−‖x − y‖² / 2h²); at least 0.

    Args:
        x: (rows, …).
        y: (rows of its own, …).
        bandwidth: h; None takes the median distance of all pairs.
    """
    one, other = paired(x, y)
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth is {bandwidth}, but must be positive.")
    return float(_two_sample(_kernel(np.concatenate([one, other]), bandwidth), len(one)))


def _kernel(rows: np.ndarray, bandwidth: float | None) -> np.ndarray:
    square = scipy.spatial.distance.cdist(rows, rows, "sqeuclidean")
    if bandwidth is None:
        apart = np.sqrt(square[np.triu_indices(len(rows), 1)])
        bandwidth = float(np.median(apart)) if len(apart) and np.median(apart) > 0 else 1.0
    return np.exp(-square / (2.0 * bandwidth**2))


def _two_sample(kernel: np.ndarray, count: int) -> float:
    """w'Kw with weights 1/n of the first ``count`` rows and −1/m of the others."""
    signs = np.concatenate([np.full(count, 1 / count), np.full(len(kernel) - count, -1 / (len(kernel) - count))])
    return max(float(signs @ kernel @ signs), 0.0)


def frechet(x: Any, y: Any) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two samples; of features of images, their FID.

        ‖m_x − m_y‖² + tr(S_x + S_y − 2 (S_x^½ S_y S_x^½)^½)

    It is W₂² of these Gaussians. Samples of one distribution are about (features²/rows) apart: compare those of one size,
    and name the network whose features they are.

    Args:
        x: (rows, features), at least 2 rows.
        y: (rows of its own, features).

    References:
        M. Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash equilibrium (2017).
    """
    one, other = paired(x, y)
    if min(len(one), len(other)) < 2:
        raise ValueError(f"A covariance needs at least 2 rows, but x has {len(one)} and y {len(other)}.")
    moments = ((rows.mean(0), np.atleast_2d(np.cov(rows.T))) for rows in (one, other))
    return wasserstein_normal(*(part for pair in moments for part in pair)) ** 2


def wasserstein_normal(mean_x: Any, covariance_x: Any, mean_y: Any, covariance_y: Any) -> float:
    """W₂ of two Gaussians: (‖m_x − m_y‖² + tr(S_x + S_y − 2 (S_x^½ S_y S_x^½)^½))^½.

    Args:
        mean_x: (features,).
        covariance_x: (features, features), which may be singular.
        mean_y: (features,).
        covariance_y: (features, features).

    References:
        D. Dowson and B. Landau, The Fréchet distance between multivariate normal distributions (1982).

    Example:
        >>> wasserstein_normal([0.0], [[1.0]], [3.0], [[25.0]])
        5.0
    """
    means = paired([mean_x], [mean_y], ("mean_x", "mean_y"))
    covariances = paired(covariance_x, covariance_y, ("covariance_x", "covariance_y"))
    size = means[0].shape[1]
    for name, covariance in zip(("covariance_x", "covariance_y"), covariances, strict=True):
        if covariance.shape != (size, size):
            raise ValueError(f"{name} has shape {covariance.shape}, but the means have {size} features.")
        values = np.linalg.eigvalsh(covariance)
        if np.abs(covariance - covariance.T).max() > 1e-8 * np.abs(values).max() or values[0] < -1e-8 * np.abs(values).max():
            raise ValueError(f"{name} is no covariance: it must be symmetric, and no eigenvalue negative.")
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    middle = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(min=0.0)).sum()
    square = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1]) - 2.0 * middle
    return float(max(square, 0.0) ** 0.5)


def null_band(distance: Callable[[Any, Any], float], x: Any, y: Any, permutations: int = 200, seed: int = 0) -> Band:
    """A distance beside what it is where rows belong to either sample at random.

    Args:
        distance: Takes two samples, such as ``energy_distance``.
        x: (rows, …).
        y: (rows of its own, …).
        permutations: How many, at least 1; ``p`` cannot be below 1 / (permutations + 1).
        seed: Of the permutations.
    """
    if permutations < 1:
        raise ValueError(f"permutations is {permutations}, but must be at least 1.")
    one, other = paired(x, y)
    shape = (-1, *np.shape(x)[1:])
    rows, count, rng = np.concatenate([one, other]).reshape(shape), len(one), np.random.default_rng(seed)
    value = float(distance(rows[:count], rows[count:]))
    orders = (rng.permutation(len(rows)) for _ in range(permutations))
    null = np.array([distance(rows[order[:count]], rows[order[count:]]) for order in orders])
    if not (np.isfinite(value) and np.isfinite(null).all()):
        bad = int((~np.isfinite(null)).sum())
        raise ValueError(f"The distance is {value:g}, and {bad} of {permutations} permutations give none that is finite.")
    ties = 1e-9 * max(abs(value), float(np.abs(null).max()))  # the same split in another order differs by rounding
    return Band(value, null, float((1 + (null >= value - ties).sum()) / (1 + permutations)))


LogDensity = Callable[[Tensor], Tensor]


def _mean(values: Tensor, *parts: Tensor) -> Estimate:
    """Of values, (rows,), that were made of these."""
    for part in (values, *parts):
        if part.dim() != 1 or part.shape != values.shape or len(part) < 2:
            raise ValueError(
                f"A log-density gives one number for each of at least 2 rows, (rows,), but gave {tuple(part.shape)}. A "
                "distribution over rows of numbers is made by .to_event(1)."
            )
    values = values.double()
    return Estimate(float(values.mean()), float(values.std() / len(values) ** 0.5))


@torch.no_grad()
def kullback_leibler(log_p: LogDensity, log_q: LogDensity, x: Tensor) -> Estimate:
    """KL(p ‖ q) = E_p [log p(x) − log q(x)], at draws of p.

    Args:
        log_p: Log-density, from (rows, …) to (rows,).
        log_q: That of the other.
        x: Draws of p, (rows, …).
    """
    one, other = log_p(x), log_q(x)
    return _mean(one - other, one, other)


@torch.no_grad()
def jensen_shannon(log_p: LogDensity, log_q: LogDensity, x: Tensor, y: Tensor) -> Estimate:
    """JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2, at draws of both; between 0 and log 2.

    Args:
        log_p: Log-density, from (rows, …) to (rows,).
        log_q: That of the other.
        x: Draws of p, (rows, …).
        y: Draws of q, (rows of its own, …).
    """
    parts = []
    for rows, own in ((x, log_p), (y, log_q)):
        one, other = log_p(rows), log_q(rows)
        mixed = torch.logaddexp(one, other) - math.log(2.0)
        parts.append(_mean((one if own is log_p else other) - mixed, one, other))
    return Estimate(0.5 * (parts[0].value + parts[1].value), 0.5 * math.hypot(parts[0].se, parts[1].se))


def modes(x: Any, centres: Any, scale: float, radius: float = 3.0, least: int | None = None) -> Modes:
    """How draws spread over modes that are known to be round.

    A draw is near the mode that is nearest to it, if that is within ``radius`` times ``scale``. Of data themselves the share
    is that of a chi distribution: 1 − exp(−radius²/2), 0.989 for 3, in the plane.

    Args:
        x: Draws, (rows, features).
        centres: (mode, features).
        scale: Standard deviation of each mode.
        radius: How far a draw may lie, in those.
        least: Draws near a mode that count as a hit; None is a twentieth of an even share, and at least 1.
    """
    rows, middles = paired(x, centres)
    if not scale > 0 or not radius > 0:
        raise ValueError(f"scale is {scale} and radius {radius}, but both must be positive.")
    apart = scipy.spatial.distance.cdist(rows, middles)
    nearest, is_near = apart.argmin(1), apart.min(1) <= radius * scale
    counts = np.bincount(nearest[is_near], minlength=len(middles))
    enough = max(1, math.ceil(len(rows) / (20 * len(middles)))) if least is None else least
    features = rows.shape[1]
    covariances = np.full((len(middles), features, features), np.nan)
    for mode in np.flatnonzero(counts > 1):
        covariances[mode] = np.cov(rows[is_near & (nearest == mode)].T).reshape(features, features)
    return Modes(int((counts >= enough).sum()), float(is_near.mean()), counts, covariances)
