"""What a denoiser is trained for: squared errors over noise levels, and the terms of the variational bound.

Data are noised, x_t = α_t x_0 + σ_t ε, and a denoiser tells x̂_0 of x_t. All losses of denoising are one, Kingma and Gao:

    E_{t ~ times, ε} w(λ_t) ‖ε − ε̂‖² / D,  ε̂ = (x_t − α_t x̂_0) / σ_t,  λ_t = log α_t²/σ_t²

with D numbers in a row, which differ in how levels are drawn and how they count:

    w = 1                     the noise itself: the simple loss of DDPM; with λ equally likely, the variational bound
    w = exp(−λ)               x_0
    w = (1 + exp(−λ/2))²      the velocity ε − x_0 of straight paths: flow matching
    w = min(1, γ exp(−λ))     x_0, but by no more than γ: min-SNR
    w = 1 + exp(−λ) / d²      the target of a preconditioned network, of unit variance at every level: EDM

The least that any denoiser can reach at a level is w exp(λ) tr Cov[x_0 | x_t] / D in the mean over x_t, and not 0. Levels
carry no gradient: a schedule that has weights is to be held fixed.

References:
    J. Ho, A. Jain, P. Abbeel, Denoising diffusion probabilistic models (2020).
    A. Nichol, P. Dhariwal, Improved denoising diffusion probabilistic models (2021): the hybrid loss, importance sampling.
    D. Kingma, T. Salimans, B. Poole, J. Ho, Variational diffusion models (2021): times of low discrepancy.
    T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the design space of diffusion-based generative models (2022).
    T. Hang et al., Efficient diffusion training via min-SNR weighting strategy (2023).
    Y. Lipman et al., Flow matching for generative modeling (2023).
    D. Kingma, R. Gao, Understanding diffusion objectives as the ELBO with simple data augmentation (2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from inference.contract import Unsupported
from inference.structure import Structure

__all__ = [
    "BoundLoss", "Chain", "Curve", "DataError", "Denoises", "EDMError", "Even", "EvenLogSNR", "FlowError", "HybridLoss",
    "Importance", "LogNormal", "MinSNR", "NoiseError", "Noised", "SimpleLoss", "Span", "Standardised", "Times",
    "Weighting", "denoiser_of", "noised",
]  # fmt: skip


# ------------------------------------------------------------------------------------------- what a module must have
@runtime_checkable
class Curve(Structure, Protocol):
    """A curve of noise levels over times from ``start``, with the least noise, to ``stop``."""

    start: float
    stop: float

    def log_snr(self, t: Tensor) -> Tensor:
        """λ_t = log(α_t² / σ_t²), of the shape of ``t``."""

    def time(self, log_snr: Tensor) -> Tensor:
        """The time of a λ, its inverse."""

    def levels(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ of a λ, both of its shape."""


@runtime_checkable
class Denoises(Structure, Protocol):
    """A model with a ``denoiser``: a function of x_t, (rows, …), of t, (rows,), and of a context if there is one.

    What it returns has a ``mean``, x̂_0 in the shape of x_t. Its attribute ``schedule`` is a ``Curve``.
    """

    @property
    def denoiser(self) -> Any:
        """The function."""


@runtime_checkable
class Chain(Structure, Protocol):
    """A model that is a chain of links between the times of a grid, and knows the terms of its variational bound.

    Attributes:
        grid: Equally spaced times, noise first, (links + 1,), the last of them that of data.
    """

    grid: Tensor

    def link_cost(self, known: Any, x: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) in nats, or −log p(x_0 | x_t) for the last link, (rows,).

        Args:
            known: What the denoiser says of ``noisy``.
            x: Data x_0, (rows, …).
            noisy: x_t, with t the time ``index`` of the grid.
            index: Which link, from 0 at the noise, (rows,).
        """

    def prior_cost(self, x: Tensor) -> Tensor:
        """KL(q(x_T | x_0) ‖ p(x_T)) in nats, (rows,)."""


@runtime_checkable
class Standardised(Structure, Protocol):
    """A model whose denoiser is one of data on another scale."""

    def standardised(self, x: Tensor) -> Tensor:
        """Data on the scale of the denoiser, in the shape of ``x``."""


# -------------------------------------------------------------------------------------------------- how levels count
@runtime_checkable
class Weighting(Structure, Protocol):
    """How much the error of the noise counts at a level, a frozen dataclass."""

    def __call__(self, log_snr: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class NoiseError:
    """w = 1: ‖ε − ε̂‖²."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


@dataclass(frozen=True)
class DataError:
    """w = exp(−λ): ‖x_0 − x̂_0‖²."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-log_snr)


@dataclass(frozen=True)
class FlowError:
    """w = (1 + exp(−λ/2))²: ‖u − û‖² with u = ε − x_0, the velocity of straight paths."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return (1.0 + torch.exp(-0.5 * log_snr)).square()


@dataclass(frozen=True)
class MinSNR:
    """w = min(1, γ exp(−λ)): min(SNR, γ) ‖x_0 − x̂_0‖².

    Args:
        most: γ; 5 is Hang et al.'s.
    """

    most: float = 5.0

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise ValueError(f"MinSNR(most={self.most!r}): the largest weight of an error of x_0 must be positive.")

    def __call__(self, log_snr: Tensor) -> Tensor:
        return (self.most * torch.exp(-log_snr)).clamp(max=1.0)


@dataclass(frozen=True)
class EDMError:
    """w = 1 + exp(−λ) / d²: (s² + d²) / (s d)² ‖x_0 − x̂_0‖² with s = σ/α.

    Args:
        deviation: d, the standard deviation of the data, as that of the preconditioned network.
    """

    deviation: float = 1.0

    def __post_init__(self) -> None:
        if not self.deviation > 0:
            raise ValueError(f"EDMError(deviation={self.deviation!r}): must be that of the data, above 0.")

    def __call__(self, log_snr: Tensor) -> Tensor:
        return 1.0 + torch.exp(-log_snr) / self.deviation**2


# ------------------------------------------------------------------------------------------------ how times are drawn
class Span(NamedTuple):
    """Part of a schedule.

    Attributes:
        curve: The schedule, a ``Curve``.
        start: Time of the least noise.
        stop: Time of the most noise.
    """

    curve: Any
    start: Any
    stop: Any

    def ends(self, like: Tensor) -> Tensor:
        """Log-SNR at ``start`` and at ``stop``, (2,)."""
        times = torch.stack([torch.as_tensor(t, dtype=like.dtype, device=like.device) for t in (self.start, self.stop)])
        found: Tensor = self.curve.log_snr(times)
        return found


@runtime_checkable
class Times(Structure, Protocol):
    """How times are drawn: a function of uniform numbers."""

    def at(self, uniform: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """Times, and what an error there counts because of how likely they are; both (rows,).

        Args:
            uniform: Numbers between 0 and 1, (rows,).
            span: What there is to draw from.
        """


@dataclass(frozen=True)
class Even:
    """All times are equally likely."""

    def at(self, uniform: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        return span.start + uniform * (span.stop - span.start), torch.ones_like(uniform)


@dataclass(frozen=True)
class EvenLogSNR:
    """All log-SNR are equally likely: with ``NoiseError`` the bound, up to a factor, drawn where its terms vary least.

    Args:
        most: Log-SNR to go up to where the schedule goes further; 13.3 is Kingma et al.'s.
    """

    most: float = 13.3

    def at(self, uniform: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        first, last = span.ends(uniform).clamp(max=self.most).unbind()
        return span.curve.time(first + uniform * (last - first)), torch.ones_like(uniform)


@dataclass(frozen=True)
class LogNormal:
    """log σ/α ~ N(mean, deviation²), cut to what the schedule has.

    The defaults are EDM's, for data of deviation ½. N(0, 1) are the logit-normal times of straight paths.

    Args:
        mean: Of log σ/α.
        deviation: Of log σ/α.

    References:
        P. Esser et al., Scaling rectified flow transformers for high-resolution image synthesis (2024): logit-normal times.
    """

    mean: float = -1.2
    deviation: float = 1.2

    def __post_init__(self) -> None:
        if not self.deviation > 0:
            raise ValueError(f"LogNormal(deviation={self.deviation!r}): must be positive.")

    def at(self, uniform: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        edge = torch.finfo(uniform.dtype).eps
        scaled = self.mean + self.deviation * torch.special.ndtri(uniform.clamp(edge, 1.0 - edge))
        most, least = span.ends(uniform).unbind()
        return span.curve.time((-2.0 * scaled).clamp(least, most)), torch.ones_like(uniform)


class Importance(nn.Module):
    """Times are drawn where the loss has been large, and count for less there: the same loss in the mean, with less noise.

        p(t) ∝ √E[loss² | t], over ``bins`` parts of time, learnt from what was seen; a share is drawn from all evenly

    It remembers: every run has a copy of its own, which is written into checkpoints.

    Args:
        bins: Parts of time.
        share: Of times that are drawn from all evenly, above 0, so that every part is seen again and again.
        decay: Of what a part remembers of the squares of its losses, for each row seen there.

    References:
        A. Nichol, P. Dhariwal, Improved denoising diffusion probabilistic models (2021), section 3.3.
    """

    def __init__(self, bins: int = 50, share: float = 0.1, decay: float = 0.95) -> None:
        super().__init__()
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"Importance(bins={bins!r}): must be an integer of at least 2.")
        if not 0.0 < share <= 1.0 or not 0.0 < decay < 1.0:
            raise ValueError(
                f"Importance(share={share!r}, decay={decay!r}): a share is above 0 and at most 1, a decay between 0 and 1."
            )
        self.share, self.decay = share, decay
        self.squares: Tensor
        self.register_buffer("squares", torch.ones(bins, dtype=torch.float64))

    @property
    def chances(self) -> Tensor:
        """Probability of each part of time, (bins,)."""
        root = self.squares.sqrt()
        return self.share / len(root) + (1.0 - self.share) * root / root.sum()

    def at(self, uniform: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        chances = self.chances.to(uniform)
        ends = chances.cumsum(0)
        part = torch.searchsorted(ends, uniform, right=True).clamp(max=len(ends) - 1)
        inside = ((uniform - (ends - chances)[part]) / chances[part]).clamp(0.0, 1.0)
        t = span.start + (part + inside) / len(ends) * (span.stop - span.start)
        return t, 1.0 / (len(ends) * chances[part])

    @torch.no_grad()
    def learn(self, t: Tensor, loss: Tensor, span: Span) -> None:
        """Takes in what the loss was, (rows,), at times, (rows,), before it is weighed by how likely they are."""
        bins = len(self.squares)
        place = ((t - span.start) / (span.stop - span.start) * bins).long().clamp(0, bins - 1)
        is_there = (place[:, None] == torch.arange(bins, device=t.device)).to(self.squares)
        counts = is_there.sum(0)
        squares = loss.detach().to(self.squares).square().nan_to_num(0.0, 0.0, 0.0) @ is_there / counts.clamp(min=1.0)
        kept = self.decay**counts
        self.squares.copy_(kept * self.squares + (1.0 - kept) * squares)


# --------------------------------------------------------------------------------------------------------- the losses
class Noised(NamedTuple):
    """Noisy rows, and what the denoiser said of them.

    Attributes:
        x: Data x_0 on the scale of the denoiser, (rows, …).
        noisy: x_t, of that shape.
        known: What the denoiser says; its ``mean`` is x̂_0.
        drawn: Times, (rows,); of a chain, before they are those of its grid.
        span: What they were drawn from.
        log_snr: λ, (rows,).
        share: What a row counts because of how likely its time was, (rows,).
        link: Which link of the chain it is noised for, (rows,); None without a chain.
    """

    x: Tensor
    noisy: Tensor
    known: Any
    drawn: Tensor
    span: Span
    log_snr: Tensor
    share: Tensor
    link: Tensor | None

    @property
    def error(self) -> Tensor:
        """‖ε − ε̂‖² / D, (rows,)."""
        square = (self.x - self.known.mean).square().reshape(len(self.x), -1).mean(1)
        return torch.exp(self.log_snr).to(square) * square


def noised(module: Any, x: Tensor, context: Tensor | None, times: Times) -> Noised:
    """Noises each row to a time of its own, and asks the denoiser. Of a chain, a time is the next one of its grid.

    The uniform numbers behind the times are U, U + 1/rows, U + 2/rows …, modulo 1: each row's is uniform, and together they
    leave out no part of time.

    Args:
        module: A model that ``Denoises``, or a denoiser.
        x: Data, (rows, …).
        context: Context, (rows, …), or None.
        times: How to draw them.
    """
    denoiser = denoiser_of(module)
    span = _span(module, denoiser)
    if isinstance(module, Standardised):
        x = module.standardised(x)
    rows, link = len(x), None
    steps = torch.arange(rows, dtype=torch.float64, device=x.device) / rows
    uniform = (torch.rand((), dtype=torch.float64, device=x.device) + steps) % 1.0
    with torch.no_grad():
        drawn, share = times.at(uniform, span)
        t = drawn
        if isinstance(module, Chain):
            grid = module.grid.to(t)
            link = (len(grid) - 1 - torch.searchsorted(grid.flip(0), t, right=False)).clamp(0, len(grid) - 2)
            t = grid[link]
        log_snr = span.curve.log_snr(t)
        alpha, sigma = (level.to(x).reshape(-1, *(1,) * (x.dim() - 1)) for level in span.curve.levels(log_snr))
    noisy = alpha * x + sigma * torch.randn_like(x)
    known = denoiser(noisy, t) if context is None else denoiser(noisy, t, context)
    return Noised(x, noisy, known, drawn, span, log_snr, share.to(x), link)


def _span(module: Any, denoiser: Any) -> Span:
    curve = denoiser.schedule
    if isinstance(curve, nn.Module) and any(weight.requires_grad for weight in curve.parameters()):
        raise Unsupported(
            f"{type(curve).__name__} has weights, in which losses of denoising are no bounds: they would choose the levels "
            "that are easiest. Hold it fixed by denoiser.schedule.requires_grad_(False)."
        )
    if isinstance(module, Chain):
        return Span(curve, module.grid[-1], module.grid[0])
    return Span(curve, curve.start, curve.stop)


def denoiser_of(module: Any) -> Any:
    """The denoiser of a model, or the module if it is one.

    Raises:
        Unsupported: If there is none.
    """
    denoiser = module.denoiser if isinstance(module, Denoises) else module
    if not isinstance(getattr(denoiser, "schedule", None), Curve) or not callable(denoiser):
        raise Unsupported(
            f"{type(module).__name__} has no denoiser with a schedule of noise, which losses of denoising need. Give a "
            "model such as DDPM or ScoreModel, a Denoiser such as Network(network, schedule), or another loss."
        )
    return denoiser


def _learn(times: Times, seen: Noised, loss: Tensor) -> None:
    if isinstance(times, Importance):
        times.learn(seen.drawn, loss, seen.span)


@dataclass(frozen=True)
class SimpleLoss:
    """E w(λ_t) ‖ε − ε̂‖² / D: with the defaults the loss of DDPM, L_simple.

        SimpleLoss(MinSNR())                 min-SNR
        SimpleLoss(EDMError(d), LogNormal())      EDM, with a preconditioned network
        SimpleLoss(FlowError())                 flow matching, with straight paths
        SimpleLoss(times=EvenLogSNR())       maximum likelihood

    Args:
        weighting: w.
        times: How levels are drawn.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising diffusion probabilistic models (2020), equation 14.
    """

    weighting: Weighting = field(default_factory=NoiseError)
    times: Times = field(default_factory=Even)

    def __post_init__(self) -> None:
        _check(self.weighting, self.times)

    def rows(self, module: Any, x: Tensor, context: Tensor | None) -> Tensor:
        seen = noised(module, x, context, self.times)
        loss = self.weighting(seen.log_snr).to(x) * seen.error
        _learn(self.times, seen, loss)
        return seen.share * loss


@dataclass(frozen=True)
class BoundLoss:
    """−log p(x_0) ≤ L_T + Σ L_{t−1} + L_0 in nats a row, by one link of the chain that is drawn for each row.

    Args:
        times: How links are drawn; ``Importance()`` for less noise.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising diffusion probabilistic models (2020), equation 5.
    """

    times: Times = field(default_factory=Even)

    def __post_init__(self) -> None:
        _check(NoiseError(), self.times)

    def rows(self, module: Any, x: Tensor, context: Tensor | None) -> Tensor:
        chain = _chain_of(module, type(self).__name__)
        seen = noised(module, x, context, self.times)
        cost = _links(chain) * chain.link_cost(seen.known, seen.x, seen.noisy, seen.link)
        _learn(self.times, seen, cost)
        return (seen.share.to(cost) * cost + chain.prior_cost(seen.x)).to(x)


@dataclass(frozen=True)
class HybridLoss:
    """L_simple + weight · L_vlb, where the bound trains the variance alone: in it, the mean is held fixed.

    L_vlb is in bits a number, so that 0.001 is Nichol and Dhariwal's weight.

    Args:
        weight: Of the bound.
        weighting: Of the simple loss.
        times: How links are drawn.

    References:
        A. Nichol, P. Dhariwal, Improved denoising diffusion probabilistic models (2021), equation 16.
    """

    weight: float = 1e-3
    weighting: Weighting = field(default_factory=NoiseError)
    times: Times = field(default_factory=Even)

    def __post_init__(self) -> None:
        if not self.weight > 0:
            raise ValueError(f"HybridLoss(weight={self.weight!r}): must be positive; SimpleLoss() goes without the bound.")
        _check(self.weighting, self.times)

    def rows(self, module: Any, x: Tensor, context: Tensor | None) -> Tensor:
        chain = _chain_of(module, type(self).__name__)
        seen = noised(module, x, context, self.times)
        if getattr(seen.known, "variance", None) is None:
            raise Unsupported(
                "HybridLoss trains a variance by the bound, but the denoiser tells none. Give "
                "Network(learns_variance=True) and DDPM(variance='optimal'), or take SimpleLoss()."
            )
        frozen = seen.known._replace(mean=seen.known.mean.detach())
        bound = _links(chain) * chain.link_cost(frozen, seen.x, seen.noisy, seen.link) + chain.prior_cost(seen.x)
        bits = (bound / (math.log(2.0) * x[0].numel())).to(x)
        loss = self.weighting(seen.log_snr).to(x) * seen.error + self.weight * bits
        _learn(self.times, seen, loss)
        return seen.share * loss


def _links(chain: Any) -> int:
    return len(chain.grid) - 1


def _chain_of(module: Any, loss: str) -> Any:
    if not isinstance(module, Chain):
        raise Unsupported(
            f"{loss} is about the links of a chain, but {type(module).__name__} has none. Give a DDPM, or take "
            "SimpleLoss(times=EvenLogSNR()), the bound in continuous time."
        )
    return module


def _check(weighting: Any, times: Any) -> None:
    if not callable(weighting) or isinstance(weighting, type):
        raise TypeError(f"weighting= must be a function of log-SNR, such as MinSNR(), but is {weighting!r}.")
    if not isinstance(times, Times) or isinstance(times, type):
        raise TypeError(f"times= must be one of inference.noising, such as LogNormal(), but is {times!r}.")
