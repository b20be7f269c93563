"""Langevin dynamics on a score: one level (``ula``, ``mala``) or a ladder of them (``annealed_langevin``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.diffusion.denoiser import Denoiser
from pyro_genmodels.diffusion.samplers import noises

__all__ = ["Accepted", "annealed_langevin", "mala", "ula"]


def _positive(step: float, steps: int) -> None:
    if not step > 0 or steps < 1:
        raise ValueError(f"Langevin needs a step above 0 and at least 1 of them, but step is {step} and steps is {steps}.")


def ula(score: Callable[[Tensor], Tensor], x: Tensor, step: float, steps: int, noise: Tensor | None = None) -> Tensor:
    """Unadjusted Langevin: x ← x + δ/2 ∇ log p(x) + √δ n.

    What it settles at is not p: on N(0, v) it is N(0, v / (1 − δ/(4v))), and for δ ≥ 4v it settles nowhere.

    Args:
        score: ∇ log p of rows, of the shape of ``x``.
        x: Start, (rows, …).
        step: δ, positive.
        steps: Number of steps.
        noise: Standard normal, (steps, rows, …); None draws it.

    Returns:
        State after the last step, of the shape of ``x``.

    References:
        G. Roberts, R. Tweedie, Exponential Convergence of Langevin Distributions and Their Discrete Approximations (1996).
    """
    _positive(step, steps)
    for draw in noises(noise, x, steps):
        x = x + 0.5 * step * score(x) + step**0.5 * draw
    return x


class Accepted(NamedTuple):
    """Where ``mala`` came to.

    Attributes:
        x: State after the last step, (rows, …).
        rate: Share of the steps that each row accepted, (rows,).
    """

    x: Tensor
    rate: Tensor


def mala(
    log_density: Callable[[Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    x: Tensor,
    step: float,
    steps: int,
    noise: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Accepted:
    """Metropolis-adjusted Langevin: the move of ``ula``, accepted so that p is what it settles at, each row by itself.

    Args:
        log_density: log p of rows up to a constant, (rows,); a surrogate whose values mean nothing will not do.
        score: Its gradient, of the shape of ``x``; another one only costs acceptance.
        x: Start, (rows, …).
        step: δ, positive.
        steps: Number of steps.
        noise: Standard normal, (steps, rows, …); None draws it.
        uniform: Uniform on [0, 1], (steps, rows); None draws it.

    References:
        G. Roberts, R. Tweedie, Exponential Convergence of Langevin Distributions and Their Discrete Approximations (1996).
    """
    _positive(step, steps)
    if uniform is not None and uniform.shape != (steps, len(x)):
        raise ValueError(f"uniform has the shape {(steps, len(x))}, one for each step and row, not {tuple(uniform.shape)}.")
    value, slope = log_density(x), score(x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"log_density gives one number per row, ({len(x)},), but gave the shape {tuple(value.shape)}.")
    accepted = torch.zeros_like(value)
    for i, draw in enumerate(noises(noise, x, steps)):
        there = x + 0.5 * step * slope + step**0.5 * draw
        value_there, slope_there = log_density(there), score(there)
        back = (x - there - 0.5 * step * slope_there).reshape(len(x), -1).square().sum(1) / (2.0 * step)
        ratio = value_there - value - back + 0.5 * draw.reshape(len(x), -1).square().sum(1)
        is_accepted = (torch.rand_like(value) if uniform is None else uniform[i].to(value)).log() < ratio
        rows = is_accepted.reshape(-1, *[1] * (x.ndim - 1))
        x, slope = torch.where(rows, there, x), torch.where(rows, slope_there, slope)
        value, accepted = torch.where(is_accepted, value_there, value), accepted + is_accepted
    return Accepted(x, accepted / steps)


def annealed_langevin(
    denoiser: Denoiser, x: Tensor, grid: Tensor, steps: int = 5, rate: float = 0.1, noise: Tensor | None = None
) -> Tensor:
    """Langevin dynamics down a ladder of levels: ``ula`` with δ = rate σ² at each time of the grid.

    On Gaussian data x_0 ~ N(m, v) the last level, run for long, has the variance V / (1 − δ/(4V)), V = α² v + σ².

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …).
        grid: Falling times, all of them with noise, (L,).
        steps: Steps at each level.
        rate: δ/σ², positive.
        noise: Standard normal, (L, steps, rows, …); None draws it.

    References:
        Y. Song, S. Ermon, Generative Modeling by Estimating Gradients of the Data Distribution (2019), algorithm 1.
    """
    _positive(rate, steps)
    if grid.ndim != 1 or not len(grid) or not (grid[1:] < grid[:-1]).all():
        raise ValueError(f"A grid falls from noise to data, but is {grid.tolist()}.")
    if noise is not None and noise.shape != (len(grid), steps, *x.shape):
        raise ValueError(
            f"noise has the shape {(len(grid), steps, *x.shape)}, a draw for each step, not {tuple(noise.shape)}."
        )
    with torch.no_grad():
        sigmas = denoiser.schedule.sigma(grid.double()).tolist()
    if not min(sigmas) > 0:
        raise ValueError(f"Langevin needs noise at every level, but σ is {min(sigmas):g} at one. End the grid earlier.")
    for i, (t, sigma) in enumerate(zip(grid, sigmas)):
        draws = None if noise is None else noise[i]
        x = ula(lambda y, t=t: denoiser.score(y, t), x, rate * sigma**2, steps, draws)  # type: ignore[misc]
    return x
