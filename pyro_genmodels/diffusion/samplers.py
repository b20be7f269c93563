"""From noise to data: each sampler is a function of a denoiser, a start, a grid of times and, if it is random, its noise.

A grid falls from noise to data, as ``Schedule.grid`` makes it; ``x`` is the state at its first time, and what comes back
is the state at its last, in the dtype of ``x``. The state of a long run is best kept in float64, which asks nothing of the
network. Nothing is remembered between calls, and nothing is drawn where ``noise`` is given.

With z = x/α and s = σ/α the probability flow of any schedule is dz/ds = (z − x̂_0)/s, and with h = log s_t − log s_s > 0

    x_s = σ_s/σ_t x_t + α_s ∫_0^h exp(u − h) x̂_0(u) du,

so that samplers differ in what they make of x̂_0 between two times, and in what noise they add.

==============================  =======  ==========================  =============================
Sampler                         Order    Denoiser calls, N steps     Reference
==============================  =======  ==========================  =============================
``ddim``, ``euler``             1        N                           Song et al. 2021
``heun``                        2        2 N                         Karras et al. 2022
``dpm_solver_2``                2        2 N                         Lu et al. 2022
``dpm_solver_pp_2m``            2        N                           Lu et al. 2023
``dpm_solver_pp_3m``            3        N + 1                       Lu et al. 2023, corrected
``unipc``                       up to 4  N + 2                       Zhao et al. 2023
``rk4``                         4        4 N                         Kutta 1901
``ancestral``, ``ddim(eta=1)``  1, weak  N                           Ho et al. 2020
``euler_maruyama``              1, weak  N                           Song et al. 2021
``dpm_solver_pp_2m_sde``        2, weak  N                           Lu et al. 2023
==============================  =======  ==========================  =============================

Orders of the flow are those of the end points of paths, weak ones those of the law that Gaussian data come out with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser
from pyro_genmodels.diffusion.scores import jacobian

__all__ = [
    "Step",
    "StepPosterior",
    "Variance",
    "ancestral",
    "both_ways",
    "ddim",
    "dpm_solver_2",
    "dpm_solver_pp_2m",
    "dpm_solver_pp_2m_sde",
    "dpm_solver_pp_3m",
    "euler",
    "euler_maruyama",
    "flow_slope",
    "heun",
    "noises",
    "path",
    "predictor_corrector",
    "rk4",
    "runge_kutta",
    "step_posterior",
    "terminal",
    "unipc",
]

Variance = Literal["upper", "lower", "optimal", "full"]
_REACHED = -4.0  # log-SNR above which a signal of unit variance still shows in x_T: at −4, 1.8 % of the variance is signal


class Step(NamedTuple):
    """One step of a grid: times and levels before and after. The last may end without noise."""

    t: Tensor
    earlier: Tensor
    alpha: Tensor
    sigma: Tensor
    next_alpha: Tensor
    next_sigma: Tensor

    @property
    def scaled(self) -> tuple[Tensor, Tensor]:
        """s = σ/α before and after."""
        return self.sigma / self.alpha, self.next_sigma / self.next_alpha

    @property
    def width(self) -> Tensor:
        """h = log s_t − log s_s."""
        before, after = self.scaled
        return before.log() - after.log()

    @property
    def between(self) -> Tensor:
        """σ_{t|s}² = σ_t² − α_t²/α_s² σ_s², the variance of x_t given x_s."""
        return self.sigma.square() * -torch.expm1(-2.0 * self.width)

    @property
    def is_last(self) -> bool:
        """Whether no noise is left after it."""
        return not self.next_sigma > 0


def path(denoiser: Denoiser, x: Tensor, grid: Tensor) -> list[Step]:
    """The steps of a grid.

    Raises:
        ValueError: Less than one step, times that do not fall or are not numbers, noise that does not fall.
    """
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"A sampler takes a Denoiser, but got a {type(denoiser).__name__}. Network(network, schedule) is one."
        )
    if not isinstance(grid, Tensor):
        raise TypeError(f"A grid is a tensor of times, such as schedule.grid(steps), but is {grid!r}.")
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            f"A grid is a vector of at least 2 times, so that there is a step; it has the shape {tuple(grid.shape)}."
        )
    times = grid.to("cpu", torch.float64)
    falls = times[1:] < times[:-1]
    if not falls.all():
        at = int((~falls).nonzero()[0, 0])
        raise ValueError(
            f"A grid falls from noise to data, but goes from {times[at]:g} to {times[at + 1]:g} at step {at}. "
            f"{type(denoiser.schedule).__name__}().grid(steps) makes one; the same time twice is a step that does nothing."
        )
    denoiser.schedule.check_times(times)
    with torch.no_grad():
        snrs = denoiser.schedule.log_snr(times.to(grid.device)).double()
        alphas, sigmas = (level.cpu() for level in denoiser.schedule.levels(snrs))
    if not (alphas > 0).all() or not (sigmas[:-1] > 0).all() or not (snrs[1:] > snrs[:-1]).all():
        raise ValueError(
            f"Along a grid the log-SNR rises from a number, but {type(denoiser.schedule).__name__} has "
            f"{snrs.tolist()[:3]} … at {times.tolist()[:3]} …"
        )
    if not x.is_floating_point():
        raise ValueError(f"x is a state of noise and data, floating-point numbers, but is {x.dtype}.")
    return [Step(*args) for args in zip(times[:-1], times[1:], alphas[:-1], sigmas[:-1], alphas[1:], sigmas[1:])]


def both_ways(denoiser: Denoiser, x: Tensor, grid: Tensor) -> list[Step]:
    """The steps of a grid that falls, from noise to data, or rises, from data to noise, with noise at all of its times."""
    is_rising = grid.ndim == 1 and len(grid) > 1 and bool(grid[-1] > grid[0])
    steps = path(denoiser, x, grid.flip(0) if is_rising else grid)
    if steps[-1].is_last:
        raise ValueError(
            f"The flow has no density without noise, but at t = {steps[-1].earlier:g} there is none. Let the grid end "
            "earlier, as by Schedule.grid(steps, start=...): the density is that of x at its end."
        )
    if not is_rising:
        return steps
    return [Step(s.earlier, s.t, s.next_alpha, s.next_sigma, s.alpha, s.sigma) for s in reversed(steps)]


def terminal(denoiser: Denoiser, grid: Tensor, like: Tensor) -> torch.distributions.Normal:
    """N(0, α² + σ²) at the first time of a grid, where a sampler starts: x_t of data of unit variance, if it is Gaussian.

    Args:
        denoiser: Whose schedule counts.
        grid: As for the samplers.
        like: Dtype and device to be taken.

    Raises:
        ValueError: So much signal is left at that time that this is not the law of x_t.
    """
    t = grid[0]
    snr = denoiser.schedule.log_snr(t)
    if snr > _REACHED:
        raise ValueError(
            f"{type(denoiser.schedule).__name__} does not reach its end: at t = {t:g}, where the grid begins, log-SNR is "
            f"{snr:.3g}, above {_REACHED:g}, so that x_t still shows the data and is no plain noise. Begin the grid at "
            f"stop = {denoiser.schedule.stop:g}, or take a schedule with more noise."
        )
    alpha, sigma = denoiser.schedule.levels(snr)
    scale = (alpha.square() + sigma.square()).sqrt().detach().to(like)
    return torch.distributions.Normal(torch.zeros_like(scale), scale)


def noises(noise: Tensor | None, x: Tensor, count: int) -> Iterator[Tensor]:
    """Standard normal numbers of the shape of ``x``, one at a time: those given, or else fresh ones."""
    if noise is not None and noise.shape != (count, *x.shape):
        raise ValueError(
            f"noise holds one draw for each of {count} steps, {(count, *x.shape)}, but has the shape {tuple(noise.shape)}."
        )
    for i in range(count):
        yield torch.randn_like(x) if noise is None else noise[i].to(x)


def _blend(step: Step, x: Tensor, mean: Tensor) -> Tensor:
    """The exact step if x̂_0 did not change: σ_s/σ_t x_t + (α_s − α_t σ_s/σ_t) x̂_0."""
    kept = (step.next_sigma / step.sigma).item()
    return (kept * x).add(mean, alpha=step.next_alpha.item() - step.alpha.item() * kept)


def ddim(denoiser: Denoiser, x: Tensor, grid: Tensor, eta: float = 0.0, noise: Tensor | None = None) -> Tensor:
    """Denoising diffusion implicit sampler: x̂_0 and ε̂ again, and a share of fresh noise.

        x_s = α_s x̂_0 + √(σ_s² − τ²) ε̂ + τ n,  τ² = η² σ_s²/σ_t² (σ_t² − α_t²/α_s² σ_s²)

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …).
        grid: Falling times, (N + 1,).
        eta: η: 0 is the flow, 1 is ``ancestral`` with the lower variance.
        noise: Standard normal, (N, rows, …); None draws it. Not looked at where η = 0.

    Returns:
        State at the last time, of the shape of ``x``.

    References:
        J. Song, C. Meng, S. Ermon, Denoising Diffusion Implicit Models (2021).
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta is between 0, no noise, and 1, the noise of ancestral sampling, but is {eta}.")
    steps = path(denoiser, x, grid)
    draws = noises(noise, x, len(steps)) if eta else None
    for step in steps:
        mean = denoiser(x, step.t).mean
        eps = (x - step.alpha * mean) / step.sigma
        fresh = eta * step.next_sigma / step.sigma * step.between.sqrt()
        x = step.next_alpha * mean + (step.next_sigma.square() - fresh.square()).clamp(min=0.0).sqrt() * eps
        if draws is not None:
            x = x + fresh * next(draws)
    return x


def euler(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """Euler's method on dz/ds = (z − x̂_0)/s, which is ``ddim`` without noise.

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …).
        grid: Falling times, (N + 1,).
    """
    for step in path(denoiser, x, grid):
        x = _blend(step, x, denoiser(x, step.t).mean)
    return x


def heun(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """Heun's method on dz/ds = (z − x̂_0)/s; a last step to no noise is Euler's.

    References:
        T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the Design Space of Diffusion-Based Generative Models (2022).
    """
    for step in path(denoiser, x, grid):
        mean = denoiser(x, step.t).mean
        ahead = _blend(step, x, mean)
        if not step.is_last:
            before, after = step.scaled
            z, slope = x / step.alpha, (x / step.alpha - mean) / before
            slope_ahead = (ahead / step.next_alpha - denoiser(ahead, step.earlier).mean) / after
            ahead = step.next_alpha * (z + 0.5 * (after - before) * (slope + slope_ahead))
        x = ahead
    return x


def rk4(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """The classical Runge-Kutta method on dz/ds = (z − x̂_0)/s; a last step to no noise is Euler's."""
    steps = path(denoiser, x, grid)
    if not steps[-1].is_last:
        return runge_kutta(denoiser, x, steps)
    x = runge_kutta(denoiser, x, steps[:-1])
    return _blend(steps[-1], x, denoiser(x, steps[-1].t).mean)


def runge_kutta(denoiser: Denoiser, x: Tensor, steps: Sequence[Step]) -> Tensor:
    """Steps of ``rk4``, noise at the ends of all of them, in either direction; nothing is decided by values of tensors."""
    for step in steps:
        before, after = step.scaled
        width, middle = after - before, 0.5 * (before + after)
        z = x / step.alpha
        first = flow_slope(denoiser, z, before, step.t)
        second = flow_slope(denoiser, z + 0.5 * width * first, middle)
        third = flow_slope(denoiser, z + 0.5 * width * second, middle)
        fourth = flow_slope(denoiser, z + width * third, after, step.earlier)
        x = step.next_alpha * (z + width / 6.0 * (first + 2.0 * second + 2.0 * third + fourth))
    return x


def flow_slope(denoiser: Denoiser, z: Tensor, scaled: Tensor, t: Tensor | None = None) -> Tensor:
    """dz/ds at s = ``scaled``, whose time is looked up if it is not known."""
    log_snr = -2.0 * scaled.log()
    t = denoiser.schedule.time(log_snr) if t is None else t
    return (z - denoiser(denoiser.schedule.levels(log_snr)[0] * z, t).mean) / scaled


def dpm_solver_2(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """DPM-Solver-2: the midpoint method on ε̂ over log-SNR; a last step to no noise is Euler's.

    References:
        C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu, DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model
        Sampling in Around 10 Steps (2022), algorithm 1.
    """
    for step in path(denoiser, x, grid):
        mean = denoiser(x, step.t).mean
        if step.is_last:
            x = _blend(step, x, mean)
            continue
        before, after = step.scaled
        middle = (before * after).sqrt()
        z = x / step.alpha
        z_middle = z + (middle - before) * (z - mean) / before
        x = step.next_alpha * (z + (after - before) * flow_slope(denoiser, z_middle, middle))
    return x


def dpm_solver_pp_2m(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """DPM-Solver++(2M): x̂_0 along a line through its last two values; the first step, and one to no noise, hold it still.

    References:
        C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
        Probabilistic Models (2023), algorithm 2.
    """
    last: tuple[Tensor, float] | None = None  # x̂_0 and width of the step before
    steps = path(denoiser, x, grid)
    logs = _log_scales(steps)
    for step, before, after in zip(steps, logs, logs[1:]):
        mean, width = denoiser(x, step.t).mean, before - after
        ahead = mean
        if last is not None and not step.is_last:
            ahead = mean.lerp(last[0], -0.5 * width / last[1])
        x = _blend(step, x, ahead)
        last = mean, width
    return x


def dpm_solver_pp_3m(denoiser: Denoiser, x: Tensor, grid: Tensor, is_corrected: bool = True) -> Tensor:
    """DPM-Solver++(3M): x̂_0 along a parabola through its last three values.

    As published, the quadratic term has half the coefficient that the integral gives, and the first step is Euler's:
    the order is 2. Corrected, the integral is exact, and the first step takes a second call, so that the order is 3.
    With few steps the published form can still be the better one.

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …).
        grid: Falling times, (N + 1,).
        is_corrected: Whether to integrate exactly, or as published.

    References:
        C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
        Probabilistic Models (2023).
    """
    if is_corrected:
        return _multistep(denoiser, x, grid, order=3, corrects=False)
    means: list[Tensor] = []
    widths: list[float] = []
    steps = path(denoiser, x, grid)
    logs = _log_scales(steps)
    for step, before, after in zip(steps, logs, logs[1:]):
        mean, width = denoiser(x, step.t).mean, before - after
        ahead = _blend(step, x, mean)
        if step.is_last or not means:
            x = ahead
        elif len(means) == 1:
            x = _blend(step, x, mean + 0.5 * width / widths[0] * (mean - means[0]))
        else:
            first, second = widths[-1] / width, widths[-2] / width
            phi_2 = math.expm1(-width) / width + 1.0
            bend = (first * phi_2 - phi_2 / width + 0.5) / (first + second)
            slope, slope_before = (phi_2 + bend) / first, -bend / second
            change = torch.add(mean - means[-1], means[-1] - means[-2], alpha=slope_before / slope)
            x = ahead.add(change, alpha=step.next_alpha.item() * slope)
        means, widths = [*means, mean][-2:], [*widths, width][-2:]
    return x


def unipc(denoiser: Denoiser, x: Tensor, grid: Tensor, order: int = 3) -> Tensor:
    """UniPC: a step along a polynomial through the last values of x̂_0, corrected by the value that it leads to.

    The value at the predicted point also serves the next step, so that a correction costs no call. With all coefficients
    solved for, the choice of B(h) in the paper drops out. After a first step that takes a second call, p = ``order``
    values predict and p + 1 correct.

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …).
        grid: Falling times, (N + 1,).
        order: p, 1 to 3.

    References:
        W. Zhao, L. Bai, Y. Rao, J. Zhou, J. Lu, UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of
        Diffusion Models (2023).
    """
    if not isinstance(order, int) or order not in (1, 2, 3):
        raise ValueError(f"order is 1, 2 or 3, but is {order}.")
    return _multistep(denoiser, x, grid, order, corrects=True)


def _multistep(denoiser: Denoiser, x: Tensor, grid: Tensor, order: int, corrects: bool) -> Tensor:
    """Exponential multistep method: predictor of this order, corrector of one more."""
    known: list[tuple[float, Tensor]] = []  # log s and x̂_0 there, the latest first
    steps = path(denoiser, x, grid)
    logs = _log_scales(steps)
    for step, after in zip(steps, logs[1:]):
        if not known:
            known = [(logs[0], denoiser(x, step.t).mean)]
        if step.is_last:
            return _blend(step, x, known[0][1])
        is_first = len(known) == 1 and step is steps[0]
        ahead = _polynomial(step, x, after, known[:order], known[0][0])
        if step is steps[-1] and not (is_first and order > 1) and not corrects:
            return ahead
        value = denoiser(ahead, step.earlier).mean
        if is_first and order > 1:  # Euler's error here would stay, whatever comes after
            ahead = _polynomial(step, x, after, [(after, value), *known], known[0][0])
            if step is not steps[-1]:
                value = denoiser(ahead, step.earlier).mean
        elif corrects:
            ahead = _polynomial(step, x, after, [(after, value), *known[:order]], known[0][0])
        x, known = ahead, [(after, value), *known][: order + 1]
    return x


def _log_scales(steps: Sequence[Step]) -> list[float]:
    """log s at the times of a grid, (N + 1,), as numbers: a tensor of one number costs as much as one of thousands."""
    scaled = [steps[0].scaled[0], *(step.scaled[1] for step in steps)]
    found: list[float] = torch.stack(scaled).log().tolist()
    return found


def _polynomial(step: Step, x: Tensor, after: float, known: Sequence[tuple[float, Tensor]], before: float) -> Tensor:
    """σ_s/σ_t x + α_s ∫_0^h exp(u − h) P(u) du, with P the polynomial through known values of x̂_0.

    Args:
        step: From t to s.
        x: x_t.
        after: log s at its end.
        known: log s and x̂_0 there, at most four.
        before: log s at its beginning.
    """
    width = before - after
    moments = _moments(width, len(known))
    places = [(before - place) / width for place, _ in known]  # in u/h, which is 0 now and 1 after the step
    alpha = step.next_alpha.item()
    moved = x * (step.next_sigma / step.sigma).item()
    for i, (_, value) in enumerate(known):
        weight, powers = 1.0, [1.0]  # Lagrange's polynomial of this place: 1 here, 0 at the others
        for place in places[:i] + places[i + 1 :]:
            weight /= places[i] - place
            powers = [left - place * right for left, right in zip([0.0, *powers], [*powers, 0.0])]
        moved = moved.add(value, alpha=alpha * weight * sum(a * b for a, b in zip(powers, moments)))
    return moved


def _moments(width: float, count: int) -> list[float]:
    """Of exp(u − h) over [0, h] in powers of u/h from 0: by parts m_0 = 1 − exp(−h), m_p = 1 − p m_(p−1) / h."""
    moments = [-math.expm1(-width)]
    for power in range(1, count):
        if width > 1.0:
            moments.append(1.0 - power * moments[-1] / width)
            continue
        total = term = width / (power + 1)  # that would cancel: m_p = Σ_j p! (−1)^j h^(j+1) / (p + j + 1)!
        for j in range(1, 20):
            term *= -width / (power + 1 + j)
            total += term
        moments.append(total)
    return moments


class StepPosterior(NamedTuple):
    """The law of x_s given x_t that a sampler takes: Gaussian.

    Attributes:
        mean: Of the shape of x_t.
        root: Standard deviations, a number or of the shape of x_t; or a factor L of the covariance L Lᵀ, (rows, D, D).
        is_full: Whether it is a factor.
    """

    mean: Tensor
    root: Tensor
    is_full: bool

    def at(self, draw: Tensor) -> Tensor:
        """Where a standard normal ``draw`` leads, of its shape."""
        if not self.is_full:
            return self.mean + self.root * draw
        return self.mean + (self.root @ draw.flatten(1)[..., None]).reshape(draw.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of rows, (rows,), in float64."""
        gap = (x - self.mean).flatten(1).double()
        constant = 0.5 * gap.shape[1] * math.log(2.0 * math.pi)
        if not self.is_full:
            root = torch.as_tensor(self.root).double().expand(x.shape).flatten(1)
            return -0.5 * (gap / root).square().sum(1) - root.log().sum(1) - constant
        root = torch.linalg.cholesky((self.root @ self.root.mT).double())
        apart = torch.linalg.solve_triangular(root, gap[..., None], upper=False).square().sum((1, 2))
        return -0.5 * apart - root.diagonal(dim1=1, dim2=2).log().sum(1) - constant

    def divergence(self, mean: Tensor, scale: Tensor) -> Tensor:
        """KL(N(mean, scale²) ‖ this law), (rows,), in float64."""
        gap = (mean - self.mean).flatten(1).double()
        if not self.is_full:
            ratio = (scale / self.root).square().double().expand(mean.shape).flatten(1)
            apart = (gap / torch.as_tensor(self.root).double().expand(mean.shape).flatten(1)).square()
            return 0.5 * (ratio - 1.0 - ratio.log() + apart).sum(1)
        size = gap.shape[1]
        root = torch.linalg.cholesky((self.root @ self.root.mT).double())
        apart = torch.linalg.solve_triangular(root, gap[..., None], upper=False).square().sum((1, 2))
        unit = torch.eye(size, dtype=root.dtype, device=root.device)
        whitened = scale * torch.linalg.solve_triangular(root, unit, upper=False)
        log_det = 2.0 * root.diagonal(dim1=1, dim2=2).log().sum(1) - 2.0 * size * scale.log()
        return 0.5 * (whitened.square().sum((1, 2)) - size + log_det + apart)


def step_posterior(
    denoiser: Denoiser | None, x: Tensor, step: Step, variance: Variance, known: Denoised | None = None
) -> StepPosterior:
    """N(mean, variance) of x_s given x_t, as ``ancestral`` takes it.

    Args:
        denoiser: None will do where ``known`` is given, but for variance "full", which takes its derivatives.
        x: x_t, (rows, …).
        step: From t to s.
        variance: As in ``ancestral``.
        known: What the denoiser says of ``x``; None asks it.
    """
    if known is None:
        assert denoiser is not None
        known = denoiser(x, step.t)
    ratio = step.alpha / step.next_alpha
    between = step.between
    keep, gain = ratio * (step.next_sigma / step.sigma).square(), step.next_alpha * between / step.sigma.square()
    mean = keep * x + gain * known.mean
    lower = between * (step.next_sigma / step.sigma).square()
    match variance:
        case "upper":
            return StepPosterior(mean, between.sqrt(), False)
        case "lower":
            return StepPosterior(mean, lower.sqrt(), False)
        case "optimal":
            if known.variance is None:
                raise ValueError(
                    "variance='optimal' needs a denoiser that tells the variance of x_0, as Network(learns_variance=True) "
                    "does. Of any, variance='full' finds the covariance by derivatives."
                )
            return StepPosterior(mean, (lower + gain.square() * known.variance).sqrt(), False)
        case "full":
            assert denoiser is not None
            covariance = gain.square() * _covariance(denoiser, x, step)
            size = covariance.shape[-1]
            covariance = covariance + lower * torch.eye(size, dtype=x.dtype, device=x.device)
            values, axes = torch.linalg.eigh(0.5 * (covariance + covariance.mT))
            return StepPosterior(mean, axes * values.clamp(min=0.0).sqrt()[:, None], True)
    raise ValueError(f"variance is 'upper', 'lower', 'optimal' or 'full', not {variance!r}.")


def _covariance(denoiser: Denoiser, x: Tensor, step: Step) -> Tensor:
    """Cov[x_0 | x_t] = σ²/α ∂x̂_0/∂x_t, (rows, D, D)."""
    return step.sigma.square() / step.alpha * jacobian(lambda point: denoiser(point, step.t).mean, x)


def ancestral(
    denoiser: Denoiser, x: Tensor, grid: Tensor, variance: Variance = "lower", noise: Tensor | None = None
) -> Tensor:
    """Ancestral sampling, the reverse chain of denoising diffusion: x_s ~ N(mean, variance) given x_t, with

        mean = α_t/α_s σ_s²/σ_t² x_t + α_s σ_{t|s}²/σ_t² x̂_0,  σ_{t|s}² = σ_t² − α_t²/α_s² σ_s²

    Its variance is that of a Gaussian x_0 ("upper", β in DDPM), of an x_0 that is known ("lower", β̃), or what follows from
    the variance of x_0 given x_t, number by number ("optimal") or with all covariances by D derivatives ("full"). The
    last two have no error on Gaussian data. In a step to no noise at all, upper and lower add none.

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …).
        grid: Falling times, (N + 1,).
        variance: As above.
        noise: Standard normal, (N, rows, …); None draws it.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models (2020), algorithm 2.
        F. Bao, C. Li, J. Zhu, B. Zhang, Analytic-DPM (2022): the optimal variance.
    """
    steps = path(denoiser, x, grid)
    for step, draw in zip(steps, noises(noise, x, len(steps))):
        known = step_posterior(denoiser, x, step, variance)
        x = known.mean if step.is_last and variance in ("upper", "lower") else known.at(draw)
    return x


def euler_maruyama(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Tensor | None = None) -> Tensor:
    """Euler-Maruyama on the reverse SDE, dz = 2 (z − x̂_0)/s ds + √(2 s) dw̄ in z = x/α and s = σ/α.

    References:
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based Generative Modeling through
        Stochastic Differential Equations (2021).
    """
    steps = path(denoiser, x, grid)
    for step, draw in zip(steps, noises(noise, x, len(steps))):
        before, after = step.scaled
        z = x / step.alpha
        drift = 2.0 * (after - before) * (z - denoiser(x, step.t).mean) / before
        x = step.next_alpha * (z + drift + (2.0 * before * (before - after)).sqrt() * draw)
    return x


def dpm_solver_pp_2m_sde(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Tensor | None = None) -> Tensor:
    """SDE-DPM-Solver++(2M): the reverse SDE, solved exactly but for x̂_0, which lies on a line through its last two values.

    Its first step is that of ``ancestral`` with the lower variance.

    References:
        C. Lu, Y. Zhou, F. Bao, J. Chen, C. Li, J. Zhu, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion
        Probabilistic Models (2023).
    """
    steps = path(denoiser, x, grid)
    last: tuple[Tensor, Tensor] | None = None
    for step, draw in zip(steps, noises(noise, x, len(steps))):
        mean = denoiser(x, step.t).mean
        if step.is_last:
            return step.next_alpha * mean
        width = step.width
        ahead = mean if last is None else mean + 0.5 * width / last[1] * (mean - last[0])
        kept, fresh = torch.exp(-width), -torch.expm1(-2.0 * width)
        x = step.next_sigma / step.sigma * kept * x + step.next_alpha * fresh * ahead + step.next_sigma * fresh.sqrt() * draw
        last = mean, width
    return x


def predictor_corrector(
    denoiser: Denoiser,
    x: Tensor,
    grid: Tensor,
    corrections: int = 1,
    rate: float = 0.1,
    predictor: Callable[..., Tensor] = ancestral,
    noise: Tensor | None = None,
) -> Tensor:
    """After each step of a predictor, Langevin steps at the level it came to, x ← x + δ/2 score + √δ n with δ = rate σ².

    A step scaled by the level has a bias of its own, which goes with the rate: δ is small against the spread of x_t,
    which is at least σ². (The published step is scaled by norms of the batch, which ties the rows together.)

    Args:
        denoiser: Any.
        x: State at the first time, (rows, …).
        grid: Falling times, (N + 1,).
        corrections: Langevin steps at each level, at least 0; none where no noise is left.
        rate: δ/σ², above 0 and below 2.
        predictor: Any sampler of this module.
        noise: Of the corrections, standard normal, (N, corrections, rows, …); None draws it. The predictor draws its own.

    References:
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based Generative Modeling through
        Stochastic Differential Equations (2021).
    """
    if corrections < 0 or not 0.0 < rate < 2.0:
        raise ValueError(f"corrections are at least 0 and rate is between 0 and 2, but they are {corrections} and {rate}.")
    steps = path(denoiser, x, grid)
    if noise is not None and noise.shape != (len(steps), corrections, *x.shape):
        raise ValueError(
            f"noise has the shape {(len(steps), corrections, *x.shape)}, one draw a correction, not {tuple(noise.shape)}."
        )
    for i, step in enumerate(steps):
        x = predictor(denoiser, x, grid[i : i + 2])
        if step.is_last:
            continue
        size = rate * step.next_sigma.square()
        for draw in noises(None if noise is None else noise[i], x, corrections):
            x = x + 0.5 * size * denoiser.score(x, step.earlier) + size.sqrt() * draw
    return x
