"""Posteriors under a diffusion prior, x_0 ~ p_0 and y ~ p(y | x_0), with the likelihood read from a Pyro program.

A sampler of the posterior needs p_t(y | x_t) = E[p(y | x_0) | x_t], which no denoiser tells. Each class here is a denoiser
that is led by one guess at it, for any of ``samplers``; ``twisted`` corrects any by weights, and is exact in the limit.

==================  =====================================  =============================  ==========================
Led by              x_0 given x_t is taken for             Likelihood                     Reference
==================  =====================================  =============================  ==========================
``DPS``             a point, x̂_0(x_t)                      any with derivatives           Chung et al. 2023
``PiGDM``           N(x̂_0, σ² d² / (α² d² + σ²))           Gaussian around a linear map   Song et al. 2023
``MMPS``            N(x̂_0, σ²/α ∂x̂_0/∂x_t), its moments    Gaussian around a linear map   Rozet et al. 2024
==================  =====================================  =============================  ==========================

Alone, all three are heuristics: on data of several modes they get the weights of the modes wrong, however many the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, final

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_map_only

from inference.contract import Unsupported
from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser
from pyro_genmodels.diffusion.guidance import LedDenoiser, Tilt, detached, slope
from pyro_genmodels.diffusion.samplers import Variance, noises, path, step_posterior

__all__ = ["DPS", "MMPS", "Likelihood", "Measurement", "Particles", "PiGDM", "twisted"]


class Measurement(NamedTuple):
    """A likelihood that is Gaussian around a linear map: log p(y | x) = constant − ½ ‖target − operator x‖².

    It is whitened, and as long as the likelihood tells numbers of x: for y = A x + n, n ~ N(0, R), operatorᵀ operator is
    Aᵀ R⁻¹ A.

    Attributes:
        operator: (M, D).
        target: (M,).
        constant: ().
    """

    operator: Tensor
    target: Tensor
    constant: Tensor


@final
class Likelihood:
    """log p(y | x) of a Pyro program, as a function of its site x: all that it observes, with its masks, scales and factors.

    What the program says of the distribution of x is not looked at, but for its shape: a denoiser takes its place.

    Args:
        program: A Pyro program with one hidden site.
        *args: Its arguments.
        site: Name of the hidden site.
        **kwargs: Its keyword arguments.

    Raises:
        Unsupported: Other hidden sites, x in a plate, or nothing observed.
        ValueError: There is no such site.

    Example:
        >>> import pyro.distributions as dist
        >>> def program(y):
        ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...     pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)
        >>> Likelihood(program, torch.tensor(3.0))(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
        tensor([-0.9189, -5.4189])
    """

    def __init__(self, program: Callable[..., Any], *args: Any, site: str = "x", **kwargs: Any) -> None:
        self.program, self.site, self._given = program, site, (args, kwargs)
        with torch.random.fork_rng(), torch.no_grad():
            nodes = poutine.trace(program).get_trace(*args, **kwargs).nodes
        sites = {name: node for name, node in nodes.items() if node["type"] == "sample" and not _is_idle(node)}
        hidden = [name for name, node in sites.items() if not node["is_observed"]]
        if site not in hidden:
            raise ValueError(f"The program hides {hidden}, but no {site!r}: name the one with the diffusion prior by site=.")
        others = [name for name in hidden if name != site]
        if others:
            raise Unsupported(
                f"Posterior samplers of diffusion move {site!r} alone, but {others} are hidden, too. Fix them, "
                f"poutine.condition(program, data={{{others[0]!r}: …}}), or give {site!r} the prior FlowPrior(denoiser, …) "
                "under TransformReparam, and infer all of them by HMC."
            )
        fn = nodes[site]["fn"]
        if fn.batch_shape.numel() != 1:
            raise Unsupported(
                f"{site!r} is in a plate or a batch, {tuple(fn.batch_shape)}, but a posterior sampler draws one x, often. "
                "Write .to_event for what belongs together, and go through the others one by one."
            )
        for name, node in sites.items():
            if node["is_observed"] and bool(torch.as_tensor(node["value"]).isnan().any()):
                raise ValueError(
                    f"The observation {name!r} has NaN, whose derivatives are NaN even under a mask. Put any number in its "
                    "place, torch.nan_to_num(y), and mask that."
                )
        if len(hidden) == len(sites):
            raise Unsupported("The program observes nothing: give the observation as obs=, or draw from the prior.")
        value = nodes[site]["value"]
        self.shape, self.dtype, self.device = value.shape, value.dtype, value.device

    def __call__(self, x: Tensor) -> Tensor:
        """log p(y | x) of rows of x, (rows, …) to (rows,), with derivatives.

        Raises:
            Unsupported: The program takes one x, but not many of them at once.
        """
        if x.shape[1:].numel() != self.shape.numel():
            raise ValueError(f"{self.site!r} has the shape {tuple(self.shape)}, but a row of x {tuple(x.shape[1:])}.")
        try:
            with pyro.validation_enabled(False):
                return torch.func.vmap(self._one)(x.reshape(len(x), *self.shape))
        except RuntimeError as error:
            with torch.no_grad(), torch.random.fork_rng():
                self._one(x[0].detach().reshape(self.shape))  # what is wrong with the program itself, says so here
            raise Unsupported(
                f"The program runs with one {self.site!r}, but not with many ({str(error).splitlines()[0]}). It may read a "
                "value of it (.item(), if, for): write that with torch.where. It may draw by itself: then it is no density."
            ) from error

    def measurement(self, method: str = "This method") -> Measurement:
        """The likelihood as a linear measurement with Gaussian noise, found by its derivatives.

        Args:
            method: Who asks for it, named by the message.

        Raises:
            Unsupported: It is none; the message says who can do with that.
        """
        try:  # in double precision, that a weak measurement beside a strong one is not lost
            return self._measurement(torch.float64, method)
        except (Unsupported, RuntimeError):  # of a program that casts, or keeps to its own precision
            if self.dtype == torch.float64:
                raise
            return self._measurement(self.dtype, method)

    def _measurement(self, dtype: torch.dtype, method: str) -> Measurement:
        size = self.shape.numel()

        def flat(x: Tensor) -> Tensor:
            return self(x.reshape(1, -1))[0]

        generator = torch.Generator().manual_seed(0)
        scales = torch.tensor([0.0, 1.0, 1.0, 3.0, 3.0], dtype=dtype)[:, None]
        points = (scales * torch.randn(5, size, generator=generator, dtype=dtype)).to(self.device)
        curvatures = [-torch.func.jacrev(torch.func.grad(flat))(point).detach().double() for point in points]
        curvature, digits = curvatures[0], torch.finfo(dtype).eps
        with torch.no_grad():
            values = self(points).double()
        offset = torch.func.grad(flat)(points[0]).detach().double()
        wide = points.double()
        terms = values[0], wide @ offset, 0.5 * ((wide @ curvature) * wide).sum(1)
        largest = sum(term.abs() for term in terms)
        is_quadratic = (terms[0] + terms[1] - terms[2] - values).abs() <= 1e3 * digits * (1.0 + largest)
        steady = [(c - curvature).abs().max() <= 1e3 * digits * (1.0 + curvature.abs().max()) for c in curvatures]
        lengths, axes = torch.linalg.eigh(0.5 * (curvature + curvature.mT))
        least = 1e2 * size**0.5 * digits * lengths.abs().max()
        is_told = lengths > least
        along = axes.mT @ offset
        astray = along[~is_told].abs().max() if not is_told.all() else along.new_zeros(())
        if (
            not (is_quadratic.all() and all(steady))
            or lengths[0] < -least
            or astray > 1e3 * digits * (1.0 + along.abs().max())
        ):
            raise Unsupported(
                f"{method} needs a likelihood that is Gaussian around a linear function of {self.site!r}, with noise that "
                "does not depend on it, but the second derivative of this one is not the same everywhere. DPS takes any "
                "that has derivatives, and twisted(DPS(denoiser, likelihood), …) corrects its bias by weights."
            )
        if not is_told.any():
            raise Unsupported(f"Nothing that the program observes depends on {self.site!r}: draw from the prior.")
        root = lengths[is_told].sqrt()
        target = along[is_told] / root
        constant = values[0] + 0.5 * target.square().sum()
        return Measurement((root[:, None] * axes.mT[is_told]), target, constant)

    def _one(self, x: Tensor) -> Tensor:
        def cast(leaf: Tensor) -> Tensor:
            return leaf.to(x.dtype) if leaf.dtype == self.dtype else leaf

        args, kwargs = tree_map_only(Tensor, cast, self._given)
        trace = poutine.trace(poutine.condition(self.program, data={self.site: x})).get_trace(*args, **kwargs)
        trace.compute_log_prob(lambda name, node: name != self.site)
        terms = [node["log_prob_sum"] for name, node in trace.nodes.items() if "log_prob_sum" in node and name != self.site]
        return torch.stack([torch.as_tensor(term, dtype=x.dtype, device=x.device) for term in terms]).sum()


def _checked(likelihood: Any) -> Likelihood:
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"What is observed comes as a Likelihood(program, *args), but is {likelihood!r}. DPS takes any function of rows."
        )
    return likelihood


def _is_idle(node: Any) -> bool:
    """Whether a statement is a plate or a deterministic one, and so neither hidden nor seen."""
    return type(node["fn"]).__name__ == "_Subsample" or bool(node["infer"].get("_deterministic", False))


@final
class DPS(LedDenoiser):
    """Diffusion posterior sampling: p_t(y | x_t) ≈ p(y | x̂_0(x_t))^ζ.

    Any likelihood will do. Where x_0 is far from known it is taken for known, so that guidance is much too strong there.
    (The published step is divided by the norm of the residual, which has no counterpart for a likelihood in general.)

    Args:
        denoiser: Of the prior.
        likelihood: Of the program.
        scale: ζ, not negative.

    References:
        H. Chung, J. Kim, M. McCann, M. Klasky, J. Ye, Diffusion Posterior Sampling for General Noisy Inverse Problems
        (2023), equations 10 and 11.
    """

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood, scale: float = 1.0) -> None:
        super().__init__(denoiser)
        if not 0.0 <= scale < math.inf:
            raise ValueError(f"scale is a number of at least 0, but is {scale}.")
        self.likelihood, self.scale = likelihood, scale

    def tilt(self, x: Tensor, t: Tensor) -> Tilt:
        def found(point: Tensor) -> tuple[Denoised, Tensor]:
            known = self.denoiser(point, t)
            return known, self.scale * self.likelihood(known.mean)

        return slope(found, x)


@final
class PiGDM(LedDenoiser):
    """Pseudo-inverse guidance: x_0 given x_t is taken for N(x̂_0(x_t), r²), with r² = σ² d² / (α² d² + σ²).

    It is exact for white Gaussian data of deviation d.

    Args:
        denoiser: Of the prior.
        likelihood: Of the program, Gaussian around a linear map.
        deviation: d, the standard deviation of the data.

    Raises:
        Unsupported: Another likelihood.

    References:
        J. Song, A. Vahdat, M. Mardani, J. Kautz, Pseudoinverse-Guided Diffusion Models for Inverse Problems (2023).
    """

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood, deviation: float = 1.0) -> None:
        super().__init__(denoiser)
        if not deviation > 0:
            raise ValueError(f"deviation is that of the data, above 0, but is {deviation}.")
        self.deviation = deviation
        self.measurement = _checked(likelihood).measurement("PiGDM")

    def tilt(self, x: Tensor, t: Tensor) -> Tilt:
        alpha, sigma = self.at(x, t)
        operator, target, constant = (part.to(x) for part in self.measurement)
        spread = (sigma * self.deviation).square() / ((alpha * self.deviation).square() + sigma.square())
        gram = spread.reshape(-1, 1, 1).to(x) * (operator @ operator.mT)

        def found(point: Tensor) -> tuple[Denoised, Tensor]:
            known = self.denoiser(point, t)
            return known, constant + _log_evidence(gram, target - known.mean.flatten(1) @ operator.mT)[0]

        return slope(found, x)


@final
class MMPS(LedDenoiser):
    """Moment-matching posterior sampling: x_0 given x_t is taken for a Gaussian of its mean and covariance, by Tweedie.

        p_t(y | x_t) ≈ N(y; A x̂_0, R + A V Aᵀ),  V = σ²/α ∂x̂_0/∂x_t

    It is exact for Gaussian data of any covariance. One evaluation takes as many derivatives of the denoiser as the
    likelihood tells numbers of x. As published, the gradient leaves out that V depends on x_t.

    Args:
        denoiser: Of the prior.
        likelihood: Of the program, Gaussian around a linear map.

    Raises:
        Unsupported: Another likelihood.

    References:
        F. Rozet, G. Andry, F. Lanusse, G. Louppe, Learning Diffusion Priors from Observations by Expectation Maximization
        (2024).
    """

    def __init__(self, denoiser: Denoiser, likelihood: Likelihood) -> None:
        super().__init__(denoiser)
        self.measurement = _checked(likelihood).measurement("MMPS")

    def tilt(self, x: Tensor, t: Tensor) -> Tilt:
        alpha, sigma = self.at(x, t)
        operator, target, constant = (part.to(x) for part in self.measurement)
        keeps_graph = torch.is_grad_enabled() and x.requires_grad
        with torch.enable_grad():
            point = x if keeps_graph else x.detach().requires_grad_()
            known = self.denoiser(point, t)
            seen = known.mean.flatten(1) @ operator.mT
            rows = [
                torch.autograd.grad(seen[:, i].sum(), point, retain_graph=True, create_graph=keeps_graph)[0].flatten(1)
                for i in range(seen.shape[1])
            ]
        slopes = torch.stack(rows, 1)  # of A x̂_0, (rows, M, D)
        gram = (sigma.square() / alpha).reshape(-1, 1, 1).to(x) * (slopes @ operator.mT)
        value, solved = _log_evidence(0.5 * (gram + gram.mT), target - seen)
        gradient = (slopes.mT @ solved[..., None])[..., 0].reshape(x.shape)
        tilt = Tilt(known, constant + value, gradient)
        return tilt if keeps_graph else detached(*tilt)


def _log_evidence(gram: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """−½ rᵀ (I + G)⁻¹ r − ½ log |I + G|, (rows,), and (I + G)⁻¹ r, (rows, M)."""
    # a network's Jacobian may be no covariance: what would be negative has no say
    values, axes = torch.linalg.eigh(gram)
    spread = 1.0 + values.clamp(min=0.0)
    along = (residual[:, None] @ axes)[:, 0]
    value = -0.5 * (along.square() / spread).sum(1) - 0.5 * spread.log().sum(-1)
    return value, (axes @ (along / spread)[..., None])[..., 0]


class Particles(NamedTuple):
    """Weighted draws of a posterior.

    Attributes:
        x: At the last time of the grid, (particles, …).
        log_weights: Of the sum 1, (particles,), in float64.
        effective: Effective sample size 1 / Σ w² at each time, before resampling, (N + 1,).
        resampled: How many times they were resampled.
        lineages: How many of the particles at the start these descend from: few, and the weights cannot be relied on,
            however even they are.
        log_evidence: Estimate of log p(y); p(y) itself is estimated without bias.
    """

    x: Tensor
    log_weights: Tensor
    effective: Tensor
    resampled: int
    lineages: int
    log_evidence: Tensor

    @property
    def weights(self) -> Tensor:
        """(particles,), of the sum 1."""
        return self.log_weights.exp()

    def mean(self, function: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Σ w f(x) of a function from (particles, …) to (particles, *shape)."""
        values = function(self.x).double()
        return torch.tensordot(self.weights, values, 1)

    def draws(self, count: int, uniform: Tensor | None = None) -> Tensor:
        """Equally weighted draws, (count, …), by systematic resampling from ``uniform``, of [0, 1); None draws it."""
        if count < 1:
            raise ValueError(f"At least 1 draw can be taken, not {count}.")
        return self.x[_systematic(self.weights, count, uniform)]


def _systematic(weights: Tensor, count: int, uniform: Tensor | None) -> Tensor:
    start = torch.rand((), dtype=weights.dtype, device=weights.device) if uniform is None else uniform.to(weights)
    places = (torch.arange(count, dtype=weights.dtype, device=weights.device) + start) / count
    levels = weights.cumsum(0)
    return torch.searchsorted(levels / levels[-1], places).clamp(max=len(weights) - 1)


@torch.no_grad()
def twisted(
    led: LedDenoiser,
    likelihood: Callable[[Tensor], Tensor],
    x: Tensor,
    grid: Tensor,
    variance: Variance = "upper",
    threshold: float = 0.5,
    noise: Tensor | None = None,
    uniform: Tensor | None = None,
) -> Particles:
    """Twisted sequential Monte Carlo: ancestral steps that are led, and weights for what that leaves out.

        x_s ~ N(mean + σ_{t|s}² α_s/α_t ∇ log ψ_t(x_t), variance),  w ← w p(x_s | x_t) ψ_s(x_s) / (q(x_s | x_t) ψ_t(x_t))

    with the twist ψ_t(x_t) ≈ p_t(y | x_t) of ``led``, and at the last time ψ = p(y | x_0), the likelihood itself. As the
    number of particles grows it is exact, whatever the twist, for the posterior under the prior that ``ancestral`` steps of
    this grid make; a good twist takes fewer. Particles are resampled where their weights have become too uneven.

    Args:
        led: Whose guess at p_t(y | x_t) leads: ``MMPS``, ``PiGDM``, ``DPS`` or another.
        likelihood: log p(y | x_0) of rows, (rows,).
        x: Draws of the prior at the first time, (particles, …).
        grid: Falling times, (N + 1,); what noise is left at its end is taken for a part of x_0.
        variance: Of the steps, as in ``samplers.ancestral``.
        threshold: Share of the particles that the effective sample size has to stay above; 0 never resamples.
        noise: Standard normal, (N, particles, …); None draws it.
        uniform: Uniform on [0, 1), (N,), for resampling; None draws it.

    Returns:
        Weighted particles.

    Raises:
        ValueError: No particles, a threshold outside of [0, 1], noise of another shape, weights that are all zero or NaN.

    References:
        L. Wu, B. Trippe, C. Naesseth, D. Blei, J. Cunningham, Practical and Asymptotically Exact Conditional Sampling in
        Diffusion Models (2023).
    """
    if not isinstance(led, LedDenoiser):
        raise TypeError(
            f"twisted takes a denoiser that is led, such as MMPS(denoiser, likelihood), not {type(led).__name__}."
        )
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold is a share of the particles, between 0 and 1, but is {threshold}.")
    steps = path(led, x, grid)
    if uniform is not None and uniform.shape != (len(steps),):
        raise ValueError(f"uniform is one number per step, ({len(steps)},), but has the shape {tuple(uniform.shape)}.")
    count = len(x)
    if not count:
        raise ValueError("There are no particles: x has no rows.")
    tilt = led.tilt(x, steps[0].t)
    log_weights = tilt.log_likelihood.double()
    origin = torch.arange(count, device=x.device)
    effective, resampled, evidence = [_effective(log_weights, steps[0].t)], 0, log_weights.new_zeros(())
    for i, (step, draw) in enumerate(zip(steps, noises(noise, x, len(steps)))):
        if effective[-1] < threshold * count:
            evidence = evidence + log_weights.logsumexp(0) - math.log(count)
            chosen = _systematic(log_weights.softmax(0), count, None if uniform is None else uniform[i])
            mean, spread = tilt.known
            known = Denoised(mean[chosen], None if spread is None else spread[chosen])
            x, origin, tilt = x[chosen], origin[chosen], Tilt(known, tilt.log_likelihood[chosen], tilt.gradient[chosen])
            log_weights, resampled = torch.zeros_like(log_weights), resampled + 1
        prior = step_posterior(led.denoiser, x, step, variance, tilt.known)
        if step.is_last and variance in ("upper", "lower"):  # no noise, and so nowhere to lead it
            there, correction = prior.mean, log_weights.new_zeros(count)
        else:
            shift = step.next_alpha / step.alpha * step.between * tilt.gradient
            led_step = prior._replace(mean=prior.mean + shift)
            there = led_step.at(draw)
            correction = prior.log_prob(there) - led_step.log_prob(there)
        before = tilt.log_likelihood
        if step is steps[-1]:
            tilt = Tilt(Denoised(there), likelihood(there), torch.zeros_like(there))
        else:
            tilt = led.tilt(there, step.earlier)
        x = there
        log_weights = log_weights + correction + tilt.log_likelihood.double() - before.double()
        effective.append(_effective(log_weights, step.earlier))
    total = log_weights.logsumexp(0)
    evidence = evidence + total - math.log(count)
    return Particles(x, log_weights - total, torch.stack(effective), resampled, len(origin.unique()), evidence)


def _effective(log_weights: Tensor, t: Tensor) -> Tensor:
    total = log_weights.logsumexp(0)
    if not total.isfinite():
        raise ValueError(
            f"At t = {t:g} the log-weights of {len(log_weights)} particles sum to {total:g}: the likelihood is zero or not "
            "finite, or the denoiser gave NaN. Take more steps, or another twist, such as DPS with a smaller scale."
        )
    return torch.exp(2.0 * total - (2.0 * log_weights).logsumexp(0))
