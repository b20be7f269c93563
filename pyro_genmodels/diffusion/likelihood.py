"""How likely data are under a denoiser: by the probability flow, by the variational bound, by the errors of denoising.

Three estimates by different routes, which agree where the denoiser is exact. Of a network, in the mean over data,

    bound → errors of denoising = E log p − ½ ∫ E‖x̂ − x̂_0‖² dγ,  flow ≤ E log p

with N → ∞ steps, p their density, x̂ its denoiser, and γ the ratio of signal to noise. The flow has a density of its own,
which is neither above nor below the others by law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser
from pyro_genmodels.diffusion.samplers import (
    Step,
    StepPosterior,
    Variance,
    both_ways,
    flow_slope,
    noises,
    path,
    step_posterior,
    terminal,
)

__all__ = [
    "Bound", "Flow", "bits_per_dimension", "bridge", "flow_log_prob", "immse_log_prob", "link_cost", "path_bound",
    "prior_cost", "probability_flow", "rademacher", "variational_bound",
]  # fmt: skip

_LEAST_MASS = 1e-12  # of a bin of discrete data: what float32 makes of the difference of two nearby cdfs may be 0 or less


class Flow(NamedTuple):
    """Where the flow came to.

    Attributes:
        x: State at the end, (rows, …).
        log_det: log |∂x_end/∂x|, (rows,), in float64.
    """

    x: Tensor
    log_det: Tensor


def rademacher(count: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Signs for Hutchinson's estimate of a trace, (count, *like.shape); kept, they make the estimate a function."""
    signs = torch.randint(0, 2, (count, *like.shape), generator=generator, device=like.device)
    return 2.0 * signs.to(like.dtype) - 1.0


def probability_flow(denoiser: Denoiser, x: Tensor, grid: Tensor, probes: Tensor | None = None) -> Flow:
    """The flow that has the marginals of the diffusion, with its Jacobian, by Runge-Kutta of order 4.

    It runs along the grid, which falls (from noise to data) or rises (from data to noise); one way undoes the other up to
    the error of the steps. Where gradients are on it can be differentiated, through every step.

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …), D numbers in each.
        grid: Falling or rising times, (N + 1,), with noise at all of them.
        probes: Vectors of unit covariance for Hutchinson's estimate of the divergence, (M, rows, …) or (M, 1, …), such as
            from ``rademacher``: the same ones at every step, so that the estimate is a smooth function of ``x``. Its mean is
            the log-determinant's, but not that of its exponential. None takes the exact divergence, by D derivatives.

    Raises:
        ValueError: A grid that does not fit, one that ends without noise, probes of another shape.

    References:
        W. Grathwohl, R. Chen, J. Bettencourt, I. Sutskever, D. Duvenaud, FFJORD (2019).
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based Generative Modeling through
        Stochastic Differential Equations (2021).
    """
    steps = both_ways(denoiser, x, grid)
    if probes is not None and (probes.ndim != x.ndim + 1 or torch.broadcast_shapes(probes.shape[1:], x.shape) != x.shape):
        raise ValueError(
            f"probes are (M, {', '.join(map(str, x.shape))}) or (M, 1, …), but have the shape {tuple(probes.shape)}."
        )
    log_det = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for step in steps:
        before, after = step.scaled
        width, middle = after - before, 0.5 * (before + after)
        z = x / step.alpha
        first, a = _slope_and_divergence(denoiser, z, before, step.t, probes)
        second, b = _slope_and_divergence(denoiser, z + 0.5 * width * first, middle, None, probes)
        third, c = _slope_and_divergence(denoiser, z + 0.5 * width * second, middle, None, probes)
        fourth, d = _slope_and_divergence(denoiser, z + width * third, after, step.earlier, probes)
        x = step.next_alpha * (z + width / 6.0 * (first + 2.0 * second + 2.0 * third + fourth))
        log_det = log_det + width / 6.0 * (a + 2.0 * b + 2.0 * c + d)
    size = x[0].numel()
    return Flow(x, log_det + size * (steps[-1].next_alpha / steps[0].alpha).log())


def _slope_and_divergence(
    denoiser: Denoiser, z: Tensor, scaled: Tensor, t: Tensor | None, probes: Tensor | None
) -> tuple[Tensor, Tensor]:
    # torch.func, so that it composes with vmap and further derivatives, as samplers take them
    slope, pull = torch.func.vjp(lambda point: flow_slope(denoiser, point, scaled, t), z)  # type: ignore[misc]
    if probes is None:
        divergence = torch.zeros(len(z), dtype=torch.float64, device=z.device)
        for i in range(z[0].numel()):
            basis = torch.zeros_like(z).flatten(1)
            basis[:, i] = 1.0
            divergence = divergence + pull(basis.reshape(z.shape))[0].flatten(1)[:, i].double()
    else:
        products = []
        for probe in probes.to(z):
            signs = probe.expand(z.shape)
            products.append((pull(signs)[0] * signs).flatten(1).double().sum(1))
        divergence = torch.stack(products).mean(0)
    return slope, divergence


def flow_log_prob(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    probes: Tensor | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """log p(x) at the *last* time of the grid, where the samplers end: log p(x_T) + log |∂x_T/∂x|.

    This is the density of what a sampler makes, with the little noise of that time still in it, not that of data.

    Args:
        denoiser: Any.
        x: State at the last time, (rows, …).
        grid: Falling times, (N + 1,), as for the samplers. 64 steps give three digits in two dimensions.
        probes: As for ``probability_flow``.
        prior: log p(x_T) of rows, (rows,); None takes ``terminal``.

    Returns:
        (rows,), in float64.

    References:
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based Generative Modeling through
        Stochastic Differential Equations (2021).
    """
    path(denoiser, x, grid)
    base = terminal(denoiser, grid, x) if prior is None else None
    end = probability_flow(denoiser, x, grid.flip(0), probes)
    value = base.log_prob(end.x).flatten(1).double().sum(1) if base is not None else prior(end.x)  # type: ignore[misc]
    return value + end.log_det


class Bound(NamedTuple):
    """Terms of the variational bound, in nats: log p(x_0) ≥ decoder − Σ steps − prior, in the mean over the noise.

    Attributes:
        prior: L_T = KL(q(x_T | x_0) ‖ p(x_T)), (rows,).
        steps: L_{t−1} = KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)), noise first, (N − 1, rows).
        decoder: −L_0 = log p(x_0 | x_1), (rows,).
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """The bound, (rows,)."""
        return self.decoder - self.steps.sum(0) - self.prior


def _to_data(denoiser: Denoiser, x: Tensor, grid: Tensor) -> list[Step]:
    steps = path(denoiser, x, grid)
    if not steps[-1].is_last or not torch.isclose(steps[-1].next_alpha, torch.ones_like(steps[-1].next_alpha)):
        raise ValueError(
            f"The bound is one on the density of data, so that the grid ends at α = 1 and σ = 0, but at "
            f"t = {steps[-1].earlier:g} they are {steps[-1].next_alpha:g} and {steps[-1].next_sigma:g}. Betas has t = 0 for "
            "that; with others that have no noise at time 0, append 0 to the grid; VE and EDM have none that is exact."
        )
    return steps


def variational_bound(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    variance: Variance = "upper",
    levels: int | None = None,
    noise: Tensor | None = None,
) -> Bound:
    """The bound of denoising diffusion, L_T + Σ L_{t−1} + L_0, each divergence in closed form at one draw of x_t.

    Args:
        denoiser: Any.
        x: Data x_0, (rows, …).
        grid: Falling times that end without noise, (N + 1,).
        variance: Of the reverse steps, as in ``samplers.ancestral``; for "lower" the last has the upper one.
        levels: Number of values of discrete data, spaced evenly from −1 to 1: the last step then has the probability of the
            bin, and the bound is one on a log-probability. None takes the density.
        noise: Standard normal, (N, rows, …), for x_t at the times of the grid, noise first; None draws it.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models (2020), equation 5 and section 3.3.
        A. Nichol, P. Dhariwal, Improved Denoising Diffusion Probabilistic Models (2021).
    """
    steps = _to_data(denoiser, x, grid)
    terminal(denoiser, grid, x)
    prior = prior_cost(x, steps[0].alpha, steps[0].sigma)
    terms = []
    decoder = prior
    for step, draw in zip(steps, noises(noise, x, len(steps))):
        noisy = step.alpha * x + step.sigma * draw
        if step.is_last:
            known = step_posterior(denoiser, noisy, step, "upper" if variance == "lower" else variance)
            decoder = known.log_prob(x) if levels is None else _log_mass(x, known, levels)
        else:
            truth = bridge(step, x, noisy)
            terms.append(step_posterior(denoiser, noisy, step, variance).divergence(*truth))
    return Bound(prior, torch.stack(terms) if terms else prior.new_zeros(0, len(x)), decoder)


def path_bound(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    variance: Variance = "upper",
    prior: Callable[[Tensor], Tensor] | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """log p(x_0, …, x_T) − log q(x_1, …, x_T | x_0) at one drawn path: with exact reverse steps it is log p(x_0), always.

    Args:
        denoiser: Any.
        x: Data x_0, (rows, …).
        grid: Falling times that end without noise, (N + 1,).
        variance: As for ``variational_bound``.
        prior: log p(x_T) of rows, (rows,); None takes ``terminal``.
        noise: Standard normal, (N, rows, …), noise first; None draws it.

    Returns:
        (rows,), in float64; its mean over paths is that of ``variational_bound``, its variance is larger.
    """
    steps = _to_data(denoiser, x, grid)
    draws = noises(noise, x, len(steps))
    start = next(draws)
    noisy = steps[0].alpha * x + steps[0].sigma * start
    base = terminal(denoiser, grid, x).log_prob if prior is None else None
    value = base(noisy).flatten(1).double().sum(1) if base is not None else prior(noisy).double()  # type: ignore[misc]
    value = value - StepPosterior(steps[0].alpha * x, steps[0].sigma, False).log_prob(noisy)
    for step in steps:
        if step.is_last:
            known = step_posterior(denoiser, noisy, step, "upper" if variance == "lower" else variance)
            return value + known.log_prob(x)
        known = step_posterior(denoiser, noisy, step, variance)
        mean, scale = bridge(step, x, noisy)
        noisy = mean + scale * next(draws)
        value = value + known.log_prob(noisy) - StepPosterior(mean, scale, False).log_prob(noisy)
    return value


def bridge(step: Step, x: Tensor, noisy: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of q(x_s | x_t, x_0)."""
    share = (step.next_sigma / step.sigma).square()
    kept = step.alpha / step.next_alpha
    fresh = -torch.expm1(-2.0 * step.width)  # σ_{t|s}² / σ_t²
    return kept * share * noisy + step.next_alpha * fresh * x, step.next_sigma * fresh.sqrt()


def prior_cost(x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """L_T = KL(N(α x, σ²) ‖ N(0, α² + σ²)) in nats, (rows,), at the levels of the first time."""
    scale = (alpha.square() + sigma.square()).sqrt()
    ratio = (sigma / scale).square()
    return 0.5 * ((alpha * x / scale).square() + ratio - 1.0 - ratio.log()).flatten(1).double().sum(1)


def link_cost(known: Denoised, x: Tensor, noisy: Tensor, step: Step, variance: Variance) -> Tensor:
    """L_{t−1}, or L_0 where no noise is left after the step, in nats, (rows,); the links may differ from row to row.

    Args:
        known: What a denoiser says of ``noisy``.
        x: Data x_0, (rows, …).
        noisy: x_t.
        step: Times and levels of each row, in shapes that multiply ``x``.
        variance: Of the reverse steps, "upper", "lower" or "optimal".
    """
    is_last = ~(step.next_sigma > 0)
    link = step_posterior(None, noisy, step, variance, known)
    if variance == "lower":  # the last link has the upper one
        upper = step_posterior(None, noisy, step, "upper", known)
        link = link._replace(root=torch.where(is_last, upper.root, link.root))
    mean, scale = bridge(step, x, noisy)
    apart = link.divergence(mean, torch.where(is_last, 1.0, scale))
    root = torch.as_tensor(link.root).expand(x.shape).flatten(1).double()
    decoder = torch.distributions.Normal(link.mean.flatten(1).double(), root).log_prob(x.flatten(1).double()).sum(1)
    return torch.where(is_last.expand(x.shape).flatten(1)[:, 0], -decoder, apart)


def _log_mass(x: Tensor, known: StepPosterior, levels: int) -> Tensor:
    """Log-probability of the bins of discrete data, the outer ones open, (rows,)."""
    if levels < 2:
        raise ValueError(f"Discrete data have at least 2 levels, but levels is {levels}.")
    if known.is_full:
        raise ValueError("Bins are those of single numbers, so that levels does not go with variance='full'.")
    half = 1.0 / (levels - 1)
    if x.abs().max() > 1.0 + 1e-4:
        raise ValueError(f"With levels, data lie between −1 and 1, but some are at {x.abs().max():g}.")
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64, device=x.device), 1.0)
    gap, root = (x - known.mean).double(), torch.as_tensor(known.root).double()
    # in the lower half of the normal, where its cdf has all its digits
    flipped = torch.where(gap > 0, -1.0, 1.0)
    ends = [flipped * (gap + sign * half) / root for sign in (-1.0, 1.0)]
    low, high = torch.minimum(*ends), torch.maximum(*ends)
    is_bottom, is_top = (x < -1.0 + half), (x > 1.0 - half)
    opens_low = torch.where(flipped > 0, is_bottom, is_top)
    opens_high = torch.where(flipped > 0, is_top, is_bottom)
    mass = torch.where(opens_high, 1.0, normal.cdf(high)) - torch.where(opens_low, 0.0, normal.cdf(low))
    return mass.clamp(min=_LEAST_MASS).log().flatten(1).sum(1)


def immse_log_prob(denoiser: Denoiser, x: Tensor, grid: Tensor, draws: int = 16, noise: Tensor | None = None) -> Tensor:
    """log p(x) from the errors of denoising, without an equation to solve:

        −log p(x) = D/2 log 2πe − 1/2 ∫ (D/(1 + γ) − E ‖x − x̂_0‖²) dγ over the signal-to-noise ratio γ = α²/σ²

    by the trapezoidal rule in log γ. Unbiased up to that rule and the range of the grid, which has to reach far enough at
    both ends: to noise that hides the data, and to noise that the density of the data does not feel.

    Args:
        denoiser: Any.
        x: Data x_0, (rows, …).
        grid: Falling times, (L,), best by spacing "log_snr".
        draws: Draws of noise at each time.
        noise: Standard normal, (L, draws, rows, …); None draws it.

    Returns:
        (rows,), in float64.

    References:
        X. Kong, R. Brekelmans, G. Ver Steeg, Information-Theoretic Diffusion (2023).
    """
    steps = path(denoiser, x, grid)
    if steps[-1].is_last:
        raise ValueError("The integral is over ratios of signal to noise, but the grid ends without noise. End it earlier.")
    if draws < 1:
        raise ValueError(f"draws is at least 1, but is {draws}.")
    if noise is not None and noise.shape != (len(grid), draws, *x.shape):
        raise ValueError(f"noise has the shape {(len(grid), draws, *x.shape)}, not {tuple(noise.shape)}.")
    levels = [(s.t, s.alpha, s.sigma) for s in steps] + [(steps[-1].earlier, steps[-1].next_alpha, steps[-1].next_sigma)]
    size = x[0].numel()
    values = []
    for i, (t, alpha, sigma) in enumerate(levels):
        gamma = (alpha / sigma).square()
        error = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for draw in noises(None if noise is None else noise[i], x, draws):
            error = error + (x - denoiser(alpha * x + sigma * draw, t).mean).flatten(1).double().square().sum(1) / draws
        values.append(gamma * (size / (1.0 + gamma) - error))
    snrs = torch.stack([2.0 * (alpha / sigma).log() for _, alpha, sigma in levels])
    integral = torch.trapezoid(torch.stack(values), snrs.to(x.device)[:, None], dim=0)
    return 0.5 * integral - 0.5 * size * math.log(2.0 * math.pi * math.e)


def bits_per_dimension(log_prob: Tensor, size: int, levels: int = 256, width: float = 2.0) -> Tensor:
    """Bits for each number of discrete data, from the log-density of data to which uniform noise of one bin was added.

    Its mean bounds that of the best code from above.

    Args:
        log_prob: In nats, (rows,).
        size: Numbers in a row, D.
        levels: Values that a number takes.
        width: Length of the interval that they were scaled to: 2 for [−1, 1], 1 for [0, 1].

    References:
        L. Theis, A. van den Oord, M. Bethge, A Note on the Evaluation of Generative Models (2016).

    Example:
        >>> bits_per_dimension(torch.tensor([3 * torch.tensor(0.5).log()]), size=3)  # uniform on [−1, 1]
        tensor([8.])
    """
    if size < 1 or levels < 2 or not width > 0:
        raise ValueError(f"size is at least 1, levels at least 2, width above 0; they are {size}, {levels} and {width}.")
    return -log_prob / (size * math.log(2.0)) + math.log2(levels / width)
