"""Sampling from first principles: four ways from uniform numbers, or from draws of q, to draws of p.

    inverse transform   x = F⁻¹(u), u ~ U(0, 1)                            exact, needs the CDF F
    ancestral           x_i ~ p(x_i | parents of x_i)                      exact, needs the program
    rejection           x ~ q, kept with probability p(x) / (M q(x))       exact, needs p ≤ M q everywhere
    importance          x ~ q with the weight p(x) / q(x)                  consistent, needs q > 0 where p > 0

Densities may be known up to a factor. What is drawn here follows ``torch.manual_seed``, unless an argument says otherwise;
distributions of torch have no generator of their own.

References:
    L. Devroye, Non-uniform random variate generation (1986).
    C. Robert and G. Casella, Monte Carlo statistical methods (2004), chapters 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from inference import arviz

__all__ = [
    "Estimate",
    "Importance",
    "Rejection",
    "ancestral",
    "importance",
    "inverse_transform",
    "quantile",
    "rejection",
]

_ROUNDING = 1e-9  # of a CDF that was computed, in probability
_SIGN = torch.iinfo(torch.int64).min
_LARGEST = torch.finfo(torch.float64).max
_FEWEST, _MOST = 1024, 2**20  # proposals made at once


# ------------------------------------------------------------------------------------ inverse transform
def _rank(x: Tensor) -> Tensor:
    """Float64 numbered in increasing order: neighbours differ by 1, and 0 is 0."""
    bits = x.view(torch.int64)
    return torch.where(bits >= 0, bits, -(bits & ~_SIGN))


def _unrank(rank: Tensor) -> Tensor:
    """The float64 of that number."""
    return torch.where(rank >= 0, rank, -rank | _SIGN).view(torch.float64)


def _probability(cdf: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """F(x), checked, in float64."""
    value = cdf(x)
    if not isinstance(value, Tensor) or value.shape != x.shape:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"A CDF takes each x to one number, but of the shape {tuple(x.shape)} this one makes {shape}.")
    value = value.to(torch.float64)
    bad = ~((value >= -_ROUNDING) & (value <= 1.0 + _ROUNDING))
    if bool(bad.any()):
        raise ValueError(f"A CDF lies between 0 and 1, but this one is {float(value[bad][0])} at x = {float(x[bad][0])}.")
    return value


def _check_rise(low: Tensor, at_low: Tensor, high: Tensor, at_high: Tensor) -> None:
    """Refuses a CDF that is larger at ``low`` than at ``high``."""
    bad = at_low > at_high + _ROUNDING
    if bool(bad.any()):
        x, y, p, q = (float(value[bad][0]) for value in (low, high, at_low, at_high))
        raise ValueError(f"A CDF does not fall, but this one is {p:.6g} at x = {x:.6g} and {q:.6g} at x = {y:.6g}.")


def _end(cdf: Callable[[Tensor], Tensor], levels: Tensor, end: float, origin: float, is_low: bool) -> tuple[Tensor, Tensor]:
    """The end of a bracket for each level, and F there: the end that was given, or one found by doubling steps."""
    if math.isfinite(end):
        x = torch.full_like(levels, end)
        return x, _probability(cdf, x)
    step = math.copysign(max(1.0, abs(origin)), end)
    x = torch.full_like(levels, min(max(origin + step, -_LARGEST), _LARGEST))
    while True:
        value = _probability(cdf, x)
        short = (levels > 0.0) & ((value >= levels) if is_low else (value < levels))
        step *= 2.0
        if not bool(short.any()) or not math.isfinite(origin + step):
            return x, value
        x = torch.where(short, origin + step, x)


def quantile(cdf: Callable[[Tensor], Tensor], levels: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """The numeric inverse of a CDF, to the last bit.

        F⁻¹(u) = min{x : F(x) ≥ u}

    An infinite end is replaced by a finite one, found by doubling steps. Then the float64 between the ends, in their
    order, are bisected: at most 64 evaluations, wherever the quantile lies and however small it is. F may have jumps and
    flat parts. What F loses to rounding, the quantile loses divided by the density: near 1, an upper tail is coarse.

    Args:
        cdf: F, from x (*shape), float64, to probabilities (*shape), each element by itself; it is called with finite x only.
        levels: u, (*shape), from 0 to 1; F⁻¹(0) is ``low``.
        low: Lower end of the support, or less.
        high: Upper end of the support, or more.

    Returns:
        (*shape), float64.

    Raises:
        ValueError: If a level is no probability, the ends do not bracket its quantile, or F is found to fall, to leave
            [0, 1] or to be NaN. F is seen where it is evaluated, and nowhere else.

    References:
        L. Devroye, Non-uniform random variate generation (1986), section 2.2.

    Example:
        >>> quantile(lambda x: -torch.expm1(-x), torch.tensor([0.5], dtype=torch.float64), low=0.0)
        tensor([0.6931], dtype=torch.float64)
    """
    if not low < high:
        raise ValueError(f"The lower end of a support is below the upper one, but low is {low} and high is {high}.")
    levels = levels.to(torch.float64)
    if not bool(((levels >= 0.0) & (levels <= 1.0)).all()):
        raise ValueError("Levels are probabilities, from 0 to 1.")
    flat = levels.flatten() if levels.dim() == 0 else levels
    a, at_a = _end(cdf, flat, low, high if math.isfinite(high) else 0.0, True)
    b, at_b = _end(cdf, flat, high, low if math.isfinite(low) else 0.0, False)
    _check_rise(a, at_a, b, at_b)
    for x, value, bad, name, other in (
        (a, at_a, at_a > flat + _ROUNDING, "low", "a smaller"),
        (b, at_b, at_b < flat - _ROUNDING, "high", "a larger"),
    ):
        bad = bad & (flat > 0.0)
        if bool(bad.any()):
            p, u, place = (float(v[bad][0]) for v in (value, flat, x))
            raise ValueError(
                f"The ends do not bracket the quantile of {u:.6g}: the CDF is {p:.6g} at x = {place:.6g}. "
                f"Give {other} {name}."
            )
    lower, upper = _rank(a), _rank(b)
    is_least = at_a >= flat
    while bool((lower + 1 < upper).any()):
        middle = (lower & upper) + ((lower ^ upper) >> 1)  # (lower + upper) / 2, whose numerator may overflow
        x = _unrank(middle)
        value = _probability(cdf, x)
        _check_rise(_unrank(lower), at_a, x, value)
        _check_rise(x, value, _unrank(upper), at_b)
        is_above = value >= flat
        lower, at_a = torch.where(is_above, lower, middle), torch.where(is_above, at_a, value)
        upper, at_b = torch.where(is_above, middle, upper), torch.where(is_above, value, at_b)
    found = torch.where(is_least, a, _unrank(upper))
    return torch.where(flat == 0.0, low, found).reshape(levels.shape)


def inverse_transform(
    cdf: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    low: float = -math.inf,
    high: float = math.inf,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws by the numeric inverse of a CDF.

        u ~ U(0, 1),  x = F⁻¹(u)

    Args:
        cdf: F, as for ``quantile``.
        shape: Shape of the draws; F may differ along it, as the CDF of a batch of distributions does.
        low: Lower end of the support, where F is 0.
        high: Upper end of the support, where F is 1.
        generator: Where the uniform numbers come from; None is torch's own. It is of the device.
        device: Where to draw.

    Returns:
        (*shape), float64.

    Raises:
        ValueError: If F is not 0 and 1 at the finite ends, or not a CDF (see ``quantile``).

    References:
        L. Devroye, Non-uniform random variate generation (1986), section 2.1.

    Example:
        >>> drawn = inverse_transform(torch.distributions.Normal(0.0, 1.0).cdf, (5, 2))
        >>> drawn.shape, drawn.dtype
        (torch.Size([5, 2]), torch.float64)
    """
    levels = 1.0 - torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device=device)  # never 0
    for end, name, expected in ((low, "low", 0.0), (high, "high", 1.0)):
        if math.isfinite(end):
            value = _probability(cdf, torch.full_like(levels, end))
            bad = (value - expected).abs() > _ROUNDING
            if bool(bad.any()):
                raise ValueError(
                    f"The CDF is {expected:g} at the {name} end of the support, but at {name} = {end:g} this one is "
                    f"{float(value[bad][0]):.6g}. Move {name}, or divide by the mass between the ends."
                )
    return quantile(cdf, levels, low, high)


# -------------------------------------------------------------------------------------------- ancestral
def ancestral(model: Callable[..., Any], draws: int, *args: Any, seed: int = 0) -> dict[str, Tensor]:
    """Draws of a Pyro program from its prior: each site given its parents, in the order of the program.

        x_i ~ p(x_i | parents of x_i),  i in topological order

    Running the program is ancestral sampling; this runs it as often as asked, and observed sites are drawn, too. It is
    ``Program.prior`` without a ``Program``.

    Args:
        model: A Pyro callable, or a model object with the method ``model``.
        draws: How many, at least 1.
        *args: Arguments of the program; observed data give their sites no more than a shape.
        seed: Of the draws; the generators of torch, numpy and Python are left as they were.

    Returns:
        Site to (draw, *site), latent sites first.

    Raises:
        Unsupported: If a prior is improper, or the structure of the program changes from run to run.
    """
    from inference.program import Program

    _check_count(draws)
    latent, observed = Program(model, args).prior(draws, seed)
    return {name: value[0] for name, value in {**latent, **observed}.items()}


# -------------------------------------------------------------------------------- rejection, importance
def _check_count(draws: int) -> None:
    if draws < 1:
        raise ValueError(f"The number of draws is at least 1, but this one is {draws}.")


def _point(x: Tensor) -> str:
    return str(x.tolist())


def _ratios(log_density: Callable[[Tensor], Tensor], proposal: Distribution, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws of q (count, *event), log p - log q there in float64, and how far rounding may have moved it."""
    if len(proposal.batch_shape):
        raise ValueError(
            f"A proposal draws one point, but this one has the batch shape {tuple(proposal.batch_shape)}. Make it one "
            "distribution with .to_event() or torch.distributions.Independent."
        )
    with torch.no_grad():
        x = proposal.sample(torch.Size((count,)))
        log_q, log_p = proposal.log_prob(x), log_density(x)
    if not isinstance(log_p, Tensor) or log_p.shape != (count,):
        shape = tuple(log_p.shape) if isinstance(log_p, Tensor) else type(log_p).__name__
        raise ValueError(
            f"A log-density takes {tuple(x.shape)} to ({count},), one number for each draw, but not to {shape}."
        )
    log_p = log_p if log_p.is_floating_point() else log_p.to(torch.float64)
    for value, name in ((log_p, "log-density"), (log_q, "log-density of the proposal")):
        bad = value.isnan() | (value == torch.inf)
        if bool(bad.any()):
            raise ValueError(f"The {name} is {float(value[bad][0])} at the draw {_point(x[bad][0])}.")
    bad = log_q == -torch.inf
    if bool(bad.any()):
        raise ValueError(f"The proposal has no density at its own draw {_point(x[bad][0])}: the weight there is infinite.")
    eps = max(torch.finfo(value.dtype).eps for value in (log_p, log_q))
    log_p, log_q = log_p.to(torch.float64), log_q.to(torch.float64)
    scale = 1.0 + log_p.abs().nan_to_num(posinf=0.0) + log_q.abs()
    return x, log_p - log_q, 64.0 * eps * scale


class Rejection(NamedTuple):
    """What rejection sampling has drawn.

    Attributes:
        draws: Independent draws of p, (draw, *event).
        acceptance_rate: Share of the proposals that was kept, up to the last draw; it estimates Z / M, where Z = ∫ p.
        largest_ratio: Largest log p - log q that was seen. Much below ``log_bound``, the bound may be lowered.
    """

    draws: Tensor
    acceptance_rate: float
    largest_ratio: float


def rejection(
    log_density: Callable[[Tensor], Tensor],
    proposal: Distribution,
    log_bound: float,
    draws: int,
    *,
    max_proposals: int = 10_000_000,
) -> Rejection:
    """Draws of p from draws of q under the envelope p ≤ M q.

        x ~ q,  u ~ U(0, 1),  keep x if u M q(x) < p(x)

    The envelope is checked at every proposal. That it fails where no proposal has been, or that p has mass where q has
    none, cannot be seen.

    Args:
        log_density: log p up to a constant, from (draw, *event) to (draw,); minus infinity off its support.
        proposal: q, with an empty batch shape.
        log_bound: log M.
        draws: How many, at least 1.
        max_proposals: When to give up.

    Raises:
        ValueError: If the envelope is seen not to hold, a log-density is NaN or infinite, or too few proposals are kept.

    References:
        J. von Neumann, Various techniques used in connection with random digits (1951).

    Example:
        >>> uniform = torch.distributions.Uniform(0.0, 1.0)
        >>> triangle = rejection(lambda x: (2.0 * x).log(), uniform, math.log(2.0), draws=100)
        >>> triangle.draws.shape
        torch.Size([100])
    """
    _check_count(draws)
    if not math.isfinite(log_bound):
        raise ValueError(f"The bound on log p - log q is finite, but this one is {log_bound}.")
    kept: list[Tensor] = []
    found, proposed, largest = 0, 0, -math.inf
    while True:
        missing = draws - found
        rate = (found + 1) / (proposed + 1)
        count = min(max(_FEWEST, int(1.1 * missing / rate)), _MOST)
        x, ratio, error = _ratios(log_density, proposal, count)
        excess = ratio - log_bound
        worst = int((excess - error).argmax())
        if bool(excess[worst] > error[worst]):
            raise ValueError(
                f"The envelope does not hold: log p - log q is {float(ratio[worst]):.6g} at {_point(x[worst])}, above "
                f"log_bound = {log_bound:.6g} by {float(excess[worst]):.3g}. Raise log_bound, or widen the proposal."
            )
        largest = max(largest, float(ratio.max()))
        index = (torch.rand_like(ratio).log() < excess).nonzero().squeeze(1)[:missing]
        kept.append(x[index])
        found += len(index)
        if found == draws:
            return Rejection(torch.cat(kept), draws / (proposed + int(index[-1]) + 1), largest)
        proposed += count
        if proposed >= max_proposals:
            why = "log p is minus infinity at all of them: is the support of the proposal another one?"
            if largest > -math.inf:
                why = f"The largest log p - log q was {largest:.6g}, and log_bound is {log_bound:.6g}: lower it if you can."
            raise ValueError(f"Of {proposed} proposals {found} were kept, but {draws} draws were asked for. {why}")


class Estimate(NamedTuple):
    """A Monte-Carlo estimate, (*shape), and its standard error, (*shape)."""

    value: Tensor
    se: Tensor


class Importance(NamedTuple):
    """What importance sampling has drawn.

    Attributes:
        draws: Of q, (draw, *event).
        log_weights: log p - log q, as they were, (draw,), float64.
        weights: Normalised to the sum 1, and smoothed if that was asked for, (draw,), float64.
        ess: Effective sample size 1 / Σ w².
        pareto_k: k-hat, the shape of the tail of the weights: below 0.7 averages can be relied on; minus infinity where the
            largest weights are equal; NaN for fewer than 25 weights that are not zero.
        log_normaliser: Estimate of log Z, where Z = ∫ p.
        log_normaliser_se: Its standard error, √(Σ w² - 1 / draws).
    """

    draws: Tensor
    log_weights: Tensor
    weights: Tensor
    ess: float
    pareto_k: float
    log_normaliser: float
    log_normaliser_se: float

    def mean(self, function: Callable[[Tensor], Tensor] = lambda x: x) -> Estimate:
        """The expectation of a function under p.

            μ = Σ w_s f(x_s),  se² = Σ w_s² (f(x_s) - μ)²

        Args:
            function: f, from (draw, *event) to (draw, *shape); the identity unless given.

        Raises:
            ValueError: If f is NaN or infinite where the weight is positive.

        References:
            A. Owen, Monte Carlo theory, methods and examples (2013), section 9.2.
        """
        values = function(self.draws)
        if values.dim() == 0 or len(values) != len(self.weights):
            raise ValueError(
                f"A function takes the {len(self.weights)} draws to as many values, but these have the shape "
                f"{tuple(values.shape)}."
            )
        values = values.to(torch.float64)
        weights = self.weights.reshape(-1, *[1] * (values.dim() - 1))
        values = torch.where(weights > 0.0, values, 0.0)
        bad = ~values.flatten(1).isfinite().all(1) if values.dim() > 1 else ~values.isfinite()
        if bool(bad.any()):
            raise ValueError(f"The function is not finite at the draw {_point(self.draws[bad][0])}, which has a weight.")
        value = (weights * values).sum(0)
        return Estimate(value, (weights * (values - value)).square().sum(0).sqrt())


def importance(
    log_density: Callable[[Tensor], Tensor], proposal: Distribution, draws: int, *, is_smoothed: bool = True
) -> Importance:
    """Self-normalised importance sampling, with Pareto-smoothed weights.

        x_s ~ q,  w_s ∝ p(x_s) / q(x_s),  log Z ≈ log (1/S) Σ p(x_s) / q(x_s)

    That p has mass where q has none cannot be seen from the draws of q: no weight says so.

    Args:
        log_density: log p up to a constant, from (draw, *event) to (draw,); minus infinity off its support.
        proposal: q, with an empty batch shape.
        draws: How many, at least 1.
        is_smoothed: Whether the largest weights are replaced by the expected order statistics of their tail. It lowers the
            variance; without it, Z is estimated without bias.

    Raises:
        ValueError: If a log-density is NaN or plus infinity, or every weight is zero.

    References:
        A. Vehtari et al., Pareto smoothed importance sampling (2024).

    Example:
        >>> target, wide = torch.distributions.Normal(3.0, 1.0), torch.distributions.StudentT(4.0, 3.0, 1.5)
        >>> found = importance(target.log_prob, wide, draws=4000)
        >>> bool((found.mean().value - 3.0).abs() < 0.2)
        True
    """
    _check_count(draws)
    x, raw, _ = _ratios(log_density, proposal, draws)
    if not bool((raw > -torch.inf).any()):
        raise ValueError(
            f"All {draws} weights are zero: the log-density is minus infinity at every draw. Is the support of the proposal "
            "another one?"
        )
    array = raw.cpu().numpy()
    used = torch.from_numpy(arviz.smoothed(array)).to(raw) if is_smoothed else raw
    total = used.logsumexp(0)
    weights = (used - total).exp()
    squares = float(weights.square().sum())
    return Importance(
        draws=x,
        log_weights=raw,
        weights=weights,
        ess=1.0 / squares,
        pareto_k=arviz.pareto_k(array),
        log_normaliser=float(total) - math.log(draws),
        log_normaliser_se=math.sqrt(max(0.0, squares - 1.0 / draws)),
    )
