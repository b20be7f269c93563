"""Distributions that can be drawn from exactly, to hold kernels against, and the checks that do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.stats
import torch
from torch import Tensor

__all__ = ["TARGETS", "Target", "assert_stationary", "steps_of"]

FALSE_ALARM = 1e-6  # of one call of ``assert_stationary`` under a fresh seed; a bias is to be seen, not suspected


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Target:
    """A density on the line, plane, … with its inverse Rosenblatt map: independent standard normals to draws.

    Attributes:
        log_density: (chain, D) -> (chain,), normalised.
        warp: Standard normals (chain, D) -> draws (chain, D), one to one.
        unwarp: Its inverse.
        width: D.
    """

    log_density: Callable[[Tensor], Tensor]
    warp: Callable[[Tensor], Tensor]
    unwarp: Callable[[Tensor], Tensor]
    width: int

    def gradient(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """What a kernel with gradients is given: (gradient, log-density)."""
        leaf = position.detach().requires_grad_()
        value = self.log_density(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return gradient, value.detach()

    def draws(self, chains: int, seed: int = 0) -> Tensor:
        """Exact draws, (chain, D)."""
        return self.warp(_randn(chains, self.width, seed=seed))


def gaussian(width: int, correlation: float) -> Target:
    """Means 1, 2, …, standard deviations ½, 1, 2, ½, …, and one correlation for all pairs."""
    deviations = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64).repeat(width)[:width]
    ones = torch.ones(width, width, dtype=torch.float64)
    matrix = correlation * ones + (1.0 - correlation) * torch.eye(width, dtype=torch.float64)
    factor = torch.linalg.cholesky(deviations.unsqueeze(1) * matrix * deviations)
    mean = torch.arange(1.0, width + 1.0, dtype=torch.float64)

    def unwarp(x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(factor, (x - mean).T, upper=False).T

    def log_density(x: Tensor) -> Tensor:
        constant = 0.5 * width * math.log(2 * math.pi) + factor.diagonal().log().sum()
        return -0.5 * unwarp(x).square().sum(-1) - constant

    return Target(log_density, lambda z: z @ factor.T + mean, unwarp, width)


def _normal(x: Tensor, mean: Any, deviation: Any) -> Tensor:
    deviation = torch.as_tensor(deviation, dtype=x.dtype)
    return -0.5 * ((x - mean) / deviation).square() - deviation.log() - 0.5 * math.log(2 * math.pi)


def banana() -> Target:
    """x ~ N(0, 1), y ~ N(x², ½²)."""
    return Target(
        lambda q: _normal(q[:, 0], 0.0, 1.0) + _normal(q[:, 1], q[:, 0].square(), 0.5),
        lambda z: torch.stack([z[:, 0], z[:, 0].square() + 0.5 * z[:, 1]], -1),
        lambda q: torch.stack([q[:, 0], 2.0 * (q[:, 1] - q[:, 0].square())], -1),
        2,
    )


def funnel() -> Target:
    """v ~ N(0, 1), x, y ~ N(0, exp(v / 2)²)."""

    def log_density(q: Tensor) -> Tensor:
        return _normal(q[:, 0], 0.0, 1.0) + _normal(q[:, 1:], 0.0, (0.5 * q[:, :1]).exp()).sum(-1)

    return Target(
        log_density,
        lambda z: torch.cat([z[:, :1], z[:, 1:] * (0.5 * z[:, :1]).exp()], -1),
        lambda q: torch.cat([q[:, :1], q[:, 1:] * (-0.5 * q[:, :1]).exp()], -1),
        3,
    )


def two_modes() -> Target:
    """Equal parts N(−2, ½²) and N(2, ½²), on a line."""

    def cumulative(x: Tensor) -> Tensor:
        return 0.5 * (torch.special.ndtr((x + 2.0) / 0.5) + torch.special.ndtr((x - 2.0) / 0.5))

    def warp(z: Tensor) -> Tensor:
        low, high = torch.full_like(z, -12.0), torch.full_like(z, 12.0)
        for _ in range(60):  # bisection
            middle = 0.5 * (low + high)
            above = cumulative(middle) > torch.special.ndtr(z)
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return low

    def log_density(q: Tensor) -> Tensor:
        parts = torch.stack([_normal(q[:, 0], mean, 0.5) for mean in (-2.0, 2.0)])
        return parts.logsumexp(0) - math.log(2.0)

    return Target(log_density, warp, lambda q: torch.special.ndtri(cumulative(q)), 1)


TARGETS = {
    "normal": gaussian(1, 0.0),
    "independent": gaussian(5, 0.0),
    "correlated": gaussian(3, 0.8),
    "banana": banana(),
    "funnel": funnel(),
    "two modes": two_modes(),
}


def assert_stationary(move: Callable[[Tensor], Tensor], target: Target, chains: int = 4000, seed: int = 0) -> None:
    """Chains that start at exact draws are at exact draws after a move.

    The draws, unwarped, are then independent standard normals: each coordinate, each product of two, and the radius are
    tested (Kolmogorov-Smirnov), at ``FALSE_ALARM`` together by Bonferroni.

    Args:
        move: (chain, D) -> (chain, D).
        target: What the kernel is to leave as it is.
        chains: Number of chains.
        seed: Of the draws and of torch's generator.
    """
    torch.manual_seed(1000 + seed)  # not the normals that the draws are made of
    moved = target.unwarp(move(target.draws(chains, seed)))
    assert bool(moved.isfinite().all())
    z, width = moved.numpy(), target.width
    p_values = [scipy.stats.kstest(z[:, i], "norm").pvalue for i in range(width)]
    p_values.append(scipy.stats.kstest((z**2).sum(1), "chi2", args=(width,)).pvalue)
    for i in range(width):
        for j in range(i):  # (z_i + z_j) / √2 is standard normal only if they are uncorrelated
            p_values.append(scipy.stats.kstest((z[:, i] + z[:, j]) / np.sqrt(2.0), "norm").pvalue)
    assert min(p_values) * len(p_values) > FALSE_ALARM, p_values


def steps_of(kernel: Any, density: Callable[[Tensor], Any], count: int) -> Callable[[Tensor], Tensor]:
    """``count`` steps of a kernel as a move of positions."""

    def move(position: Tensor) -> Tensor:
        state = kernel.init(position, density)
        for _ in range(count):
            state, _ = kernel.step(state, density)
        return state.position

    return move
