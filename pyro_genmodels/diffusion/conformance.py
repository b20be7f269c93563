"""What a sampler does, held against what is exact: its order, its bias, the gap of its bound. For any sampler, yours too.

    print(certify(samplers.heun))

A sampler is a function of (denoiser, x, grid), or of (denoiser, x, grid, noise=...) if it is random. ``from_k_diffusion``
and ``from_diffusers`` make one of those of other libraries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, Protocol, final

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser
from pyro_genmodels.diffusion.likelihood import bridge, prior_cost
from pyro_genmodels.diffusion.oracle import Oracle
from pyro_genmodels.diffusion.samplers import Step, StepPosterior, path
from pyro_genmodels.diffusion.schedule import EDM, VP, Betas

__all__ = [
    "Certificate", "Paths", "Scheduler", "bound_gap", "certify", "from_diffusers", "from_k_diffusion", "law",
    "median_error", "paths", "wasserstein",
]  # fmt: skip

Sampler = Callable[..., Tensor]
_LINEAR = 1e-6  # by how much, relative to its output, a sampler may fail to be linear on Gaussian data
_LINKS, _ROWS = 100, 1000  # of the chain whose bound is taken


class Paths(NamedTuple):
    """A mixture, starts of its flow, and where the flow takes them, by an adaptive method of order 8."""

    oracle: Oracle
    start: Tensor
    end: Tensor


def paths(count: int = 128) -> Paths:
    """Five components on a ring, noise from 10 to 0.02: paths to about 1e-10."""
    oracle = Oracle.ring(5, EDM(0.02, 10.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = oracle.distribution(torch.tensor(10.0, dtype=torch.float64)).sample((count,))

    def slope(t: float, x: np.ndarray) -> np.ndarray:
        t_ = torch.tensor(t, dtype=torch.float64)
        return (-t * oracle.score(torch.as_tensor(x).reshape(-1, 2), t_)).numpy().ravel()

    end = solve_ivp(slope, (10.0, 0.02), start.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return Paths(oracle, start, torch.as_tensor(end).reshape(-1, 2))


def median_error(
    sampler: Sampler, case: Paths, steps: int, spacing: Literal["time", "log_snr", "karras"] = "karras"
) -> float:
    """Distance to the end of the flow, the median over paths.

    A few paths pass near the border of two basins, and their errors, which rule the mean, say nothing of the order.
    """
    oracle, start, end = case
    return (sampler(oracle, start, oracle.schedule.grid(steps, spacing)) - end).norm(dim=1).median().item()


def law(sampler: Sampler, oracle: Oracle, grid: Tensor, is_random: bool = True, **kwargs: Any) -> tuple[float, float]:
    """Mean and variance of what a sampler makes of one-dimensional Gaussian data, exactly.

    It is linear there, so that its answers to unit vectors of start and noise tell the law of its output.

    Raises:
        ValueError: It is not linear, as where steps adapt to x.
    """
    steps = len(grid) - 1
    start = oracle.distribution(grid[0])
    mean, scale = start.mean.item(), start.stddev.item()
    x = torch.full((steps + 3 if is_random else 3, 1), mean, dtype=torch.float64)
    x[1] += scale
    x[2] += 3.0 * scale
    if is_random:
        noise = torch.zeros(steps, steps + 3, 1, dtype=torch.float64)
        noise[torch.arange(steps), torch.arange(3, steps + 3)] = 1.0
        kwargs["noise"] = noise
    out = sampler(oracle, x, grid, **kwargs)[:, 0]
    answers = out[1:] - out[0]
    if not abs(answers[1] - 3.0 * answers[0]) <= _LINEAR * (out.abs().max() + 1.0):
        raise ValueError(
            "On Gaussian data the denoiser is linear, but this sampler is not: three times the start does not lead to three "
            "times the answer. Does it choose its steps by x, clip x, or draw noise of its own?"
        )
    return out[0].item(), (answers.square().sum() - answers[1].square()).item()


def wasserstein(oracle: Oracle, found: tuple[float, float], t: Tensor) -> float:
    """Wasserstein distance of a Gaussian, by mean and variance, to the law of x_t of Gaussian data in one dimension."""
    truth = oracle.distribution(t)
    return math.hypot(found[0] - truth.mean.item(), math.sqrt(found[1]) - truth.stddev.item())


class _Gap(NamedTuple):
    mean: float
    error: float


def bound_gap(sampler: Sampler) -> _Gap:
    """log p(x_0) less the variational bound of a chain of 100 linear betas, mean over data of a mixture, and its error.

    Each step by itself, from a grid of two times, is taken for the Gaussian that its answers to no noise and to unit vectors
    of it tell. A last step without noise has the variance of DDPM's "upper". Steps without noise have no bound: infinity.
    """
    oracle = Oracle.ring(5, Betas.linear(_LINKS))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        x = oracle.distribution().sample((_ROWS,))
        grid = oracle.schedule.grid(_LINKS, "time", start=0.0)
        steps = path(oracle, x, grid)
        gap = oracle.log_prob(x) + prior_cost(x, steps[0].alpha, steps[0].sigma)
        for i, step in enumerate(steps):
            noisy = step.alpha * x + step.sigma * torch.randn_like(x)
            known = _kernel(sampler, oracle, noisy, grid[i : i + 2], step)
            if step.is_last:
                gap = gap - known.log_prob(x)
            elif not (torch.linalg.det(known.root).abs() > 0).all():
                return _Gap(math.inf, 0.0)
            else:
                gap = gap + known.divergence(*bridge(step, x, noisy))
    return _Gap(gap.mean().item(), gap.std().item() / math.sqrt(_ROWS))


def _kernel(sampler: Sampler, oracle: Oracle, x: Tensor, grid: Tensor, step: Step) -> StepPosterior:
    """One step of a sampler, as a Gaussian."""
    rows, size = x.shape
    noise = torch.cat([x.new_zeros(1, rows, size), torch.eye(size).to(x)[:, None].expand(size, rows, size)])
    out = sampler(oracle, x.repeat(size + 1, 1), grid, noise=noise.reshape(1, -1, size)).reshape(size + 1, rows, size)
    root = (out[1:] - out[0]).permute(1, 2, 0)
    if step.is_last and not root.abs().max() > 0:
        return StepPosterior(out[0], step.between.sqrt(), False)
    return StepPosterior(out[0], root, True)


class Certificate(NamedTuple):
    """What was observed of a sampler.

    Attributes:
        calls: Calls of the denoiser in ten steps.
        order: Of the ends of paths, log2 of the ratio of the median errors at ``steps``; None of a random sampler.
        errors: Those median errors; None of a random sampler.
        weak_order: Of the law of its output on Gaussian data, log2 of the ratio of ``bias``; NaN where that is rounding.
        bias: Wasserstein distance of that law to the truth, at ``steps``.
        gap: log p(x) less its variational bound, in nats, of single steps; infinite where steps add no noise.
        gap_error: Standard error of the gap.
        steps: Two numbers of steps, the second twice the first.
    """

    calls: int
    order: float | None
    errors: tuple[float, float] | None
    weak_order: float
    bias: tuple[float, float]
    gap: float
    gap_error: float
    steps: tuple[int, int]

    def __str__(self) -> str:
        few, many = self.steps
        lines = [f"calls in 10 steps      {self.calls}"]
        if self.order is not None and self.errors is not None:
            lines.append(
                f"order of paths         {self.order:.2f}   (median error {_pair(self.errors)} at {few}, {many} steps)"
            )
        lines.append(f"order of the law       {self.weak_order:.2f}   (bias {_pair(self.bias)} at {few}, {many} steps)")
        gap = (
            f"{self.gap:.3f} ± {self.gap_error:.3f} nats in {_LINKS} steps" if math.isfinite(self.gap) else "none: no noise"
        )
        return "\n".join([*lines, f"gap of the bound       {gap}"])


def _pair(values: tuple[float, float]) -> str:
    return f"{values[0]:.1e}, {values[1]:.1e}"


@final
class _Counted(Denoiser):
    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser, self.calls = denoiser, 0

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        self.calls += 1
        found: Denoised = self.denoiser(x, t)
        return found


def certify(
    sampler: Sampler, is_random: bool = False, steps: int = 128, case: Paths | None = None, has_bound: bool = True
) -> Certificate:
    """Observes a sampler where all that it should do is known; nothing is drawn, and nothing is trained.

    The order of paths is that on a mixture of five Gaussians, against an adaptive solution of order 8. The law is that of
    its output on Gaussian data, exact for linear samplers. The bound is that of its single steps, as links of a chain.

    Args:
        sampler: Of (denoiser, x, grid); a random one takes ``noise`` too, standard normal, (N, rows, …).
        is_random: Whether it takes noise.
        steps: It is observed at this many steps and at twice as many.
        case: Paths to be used again; None makes them.
        has_bound: Whether to take the bound of a random sampler, 100 steps on 3,000 rows; else it is NaN.

    Raises:
        ValueError: It draws noise of its own, changes the shape or dtype of x, gives NaN, or is not linear on Gaussian data.

    Example:
        >>> from pyro_genmodels.diffusion import samplers
        >>> round(certify(samplers.euler, steps=64).order, 1)
        1.0
    """
    if not isinstance(steps, (int, np.integer)) or steps < 2:
        raise ValueError(f"steps is at least 2, a whole number, but is {steps!r}.")
    steps, sampler = int(steps), _on_copies(sampler)
    case = paths() if case is None else case
    calls = _checked(sampler, case, is_random)
    both = (steps, 2 * steps)
    errors = None if is_random else tuple(median_error(sampler, case, n) for n in both)
    schedule = VP()
    place = torch.tensor([[0.7]], dtype=torch.float64)
    oracle = Oracle(torch.ones_like(place[0]), place, 0.5, schedule)
    bias = []
    for n in both:
        ends = {name: schedule.time(torch.tensor(snr, dtype=torch.float64)).item() for name, snr in _ENDS.items()}
        grid = schedule.grid(n, **ends)  # type: ignore[arg-type]
        bias.append(wasserstein(oracle, law(sampler, oracle, grid, is_random), grid[-1]))
    gap = _Gap(math.inf, 0.0)
    if is_random:
        gap = bound_gap(sampler) if has_bound else _Gap(math.nan, math.nan)
    return Certificate(
        calls=calls,
        order=None if errors is None else _order(errors),
        errors=errors,  # type: ignore[arg-type]
        weak_order=_order(bias) if bias[1] > 1e-12 else math.nan,
        bias=(bias[0], bias[1]),
        gap=gap.mean,
        gap_error=gap.error,
        steps=both,
    )


_ENDS = {"start": 6.0, "stop": -6.0}  # log-SNR at which the grid of Gaussian data ends and begins


def _order(errors: Any) -> float:
    return math.log2(errors[0] / errors[1]) if errors[1] > 0 else math.nan


def _on_copies(sampler: Sampler) -> Sampler:
    """A sampler that may write into its x, for a case that is used again."""

    def run(denoiser: Denoiser, x: Tensor, grid: Tensor, **noise: Tensor) -> Tensor:
        return sampler(denoiser, x.clone(), grid, **noise)

    return run


def _checked(sampler: Sampler, case: Paths, is_random: bool) -> int:
    oracle, start, _ = case
    counted, grid = _Counted(oracle), oracle.schedule.grid(10, "karras")
    given = {"noise": torch.zeros(10, *start.shape, dtype=torch.float64)} if is_random else {}
    out, again = (sampler(counted, start, grid, **given) for _ in range(2))
    if not isinstance(out, Tensor):
        raise TypeError(f"A sampler gives x, a tensor of shape {tuple(start.shape)}, but this one gave {out!r}.")
    if out.shape != start.shape or out.dtype != start.dtype:
        raise ValueError(
            f"A sampler gives x in its own shape and dtype, but of {tuple(start.shape)}, {start.dtype}, this one made "
            f"{tuple(out.shape)}, {out.dtype}."
        )
    if not out.isfinite().all():
        raise ValueError(
            f"Of {len(start)} paths in 10 steps, {int((~out.isfinite()).any(1).sum())} ended at NaN or infinity."
        )
    if not torch.equal(out, again):
        raise ValueError(
            "Called twice with the same input, this sampler gave two answers: it draws noise of its own. Let it take "
            "noise=, and certify it with is_random=True."
        )
    return counted.calls // 2


# ------------------------------------------------------------------------------------------------ other libraries
def from_k_diffusion(function: Callable[..., Tensor], **kwargs: Any) -> Sampler:
    """A sampler of k-diffusion's form, ``function(model, x, sigmas, ...)``, as one of ours.

    Its model maps z = x/α and s = σ/α, one for each row, to x̂_0. A random one draws by ``noise_sampler(s, next)``.

    Args:
        function: The sampler.
        **kwargs: What it takes besides.

    Returns:
        A function of (denoiser, x, grid, noise=None).

    References:
        T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the Design Space of Diffusion-Based Generative Models (2022).
    """

    def sampler(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Tensor | None = None) -> Tensor:
        steps = path(denoiser, x, grid)
        sigmas = torch.stack([*(step.scaled[0] for step in steps), steps[-1].scaled[1]])
        draws = iter(()) if noise is None else iter(noise)
        drawn = {} if noise is None else {"noise_sampler": lambda sigma, following: next(draws)}

        def model(z: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            return _data(denoiser, z, sigma.flatten()[0].double())

        return steps[-1].next_alpha * function(model, x / steps[0].alpha, sigmas, **drawn, **kwargs)

    return sampler


class Scheduler(Protocol):
    """What ``from_diffusers`` asks of a scheduler of diffusers."""

    timesteps: Any
    alphas_cumprod: Tensor

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """What its network is to be given."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **kwargs: Any) -> Any:
        """One step; what comes has ``prev_sample``."""


def from_diffusers(make: Callable[[np.ndarray, int], Scheduler], noise: str | None = None) -> Sampler:
    """A scheduler of diffusers as one of our samplers.

    The levels of a grid of N steps become its table of N + 1 training steps, of which it is to take N, …, 1 and to end at 0:

        DDIMScheduler(len(betas), trained_betas=betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
        DPMSolverMultistepScheduler(len(betas), trained_betas=betas, final_sigmas_type="sigma_min", lower_order_final=False)

    Its tables are in float32, so that errors below 1e-6 are theirs.

    Args:
        make: From betas (N + 1,) and N to a scheduler on which ``set_timesteps`` has been called; it predicts noise.
        noise: Name under which its ``step`` takes noise, "variance_noise"; None for one that is not random.

    Returns:
        A function of (denoiser, x, grid, noise=None).

    Raises:
        ValueError: The scheduler does not take the steps N, …, 1.
    """
    name = noise

    def sampler(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Tensor | None = None) -> Tensor:
        steps = path(denoiser, x, grid)
        ratios = torch.stack([steps[-1].scaled[1], *(step.scaled[0] for step in reversed(steps))]).numpy()
        kept = 1.0 / (1.0 + ratios**2)
        scheduler = make(1.0 - kept / np.concatenate([[1.0], kept[:-1]]), len(steps))
        times = [round(float(t)) for t in scheduler.timesteps]
        if sorted(set(times), reverse=True) != list(range(len(steps), 0, -1)):
            raise ValueError(
                f"The scheduler is to take the steps {len(steps)}, …, 1, but takes {times[:3]} … {times[-2:]}. Give it "
                "steps_offset=1 with 'leading' spacing, or timesteps=list(range(steps, 0, -1))."
            )
        z = x / steps[0].alpha
        unit = torch.ones_like(z)
        is_scaled = not torch.equal(scheduler.scale_model_input(unit, scheduler.timesteps[0]), unit)
        at = z if is_scaled else z * math.sqrt(kept[-1])
        draws: Iterator[Tensor] = iter(()) if noise is None else iter(noise)
        for t, when in zip(scheduler.timesteps, times):
            seen = scheduler.scale_model_input(at, t) / math.sqrt(kept[when])
            s = torch.tensor(ratios[when])
            drawn = {} if noise is None or name is None else {name: next(draws)}
            at = scheduler.step((seen - _data(denoiser, seen, s)) / s, t, at, **drawn).prev_sample
        return steps[-1].next_alpha * (at if is_scaled else at / math.sqrt(kept[0]))

    return sampler


def _data(denoiser: Denoiser, z: Tensor, scaled: Tensor) -> Tensor:
    """x̂_0 at z = x/α and s = σ/α."""
    log_snr = -2.0 * scaled.log()
    alpha = denoiser.schedule.levels(log_snr)[0]
    return denoiser(alpha * z, denoiser.schedule.time(log_snr)).mean
