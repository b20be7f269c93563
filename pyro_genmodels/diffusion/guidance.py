"""Denoisers that are led: by the likelihood of something that is known, by a classifier, by what a label changes.

p_t(x_t | y) ∝ p_t(x_t) p_t(y | x_t) has the score ∇ log p_t(x_t) + ∇ log p_t(y | x_t), so that a led denoiser is a denoiser:

    x̂_0(x_t, y) = x̂_0(x_t) + σ_t²/α_t ∇ log p_t(y | x_t)

It goes wherever one goes. Where p_t(y | x_t) = E[p(y | x_0) | x_t] is exact, so is the law that a sampler makes with it.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from inference.contract import Unsupported
from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser

__all__ = ["ClassifierFree", "ClassifierGuided", "LedDenoiser", "Tilt", "detached", "slope"]


class Tilt(NamedTuple):
    """What a led denoiser knows at x_t.

    Attributes:
        known: x_0 given x_t, before it is led.
        log_likelihood: log p_t(y | x_t), or what stands for it, (rows,).
        gradient: Its gradient, or what stands for it, of the shape of x_t.
    """

    known: Denoised
    log_likelihood: Tensor
    gradient: Tensor


class LedDenoiser(Denoiser, abc.ABC):
    """A denoiser under a likelihood: subclasses tell log p_t(y | x_t) and its gradient.

    Args:
        denoiser: Of the prior.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        if not isinstance(denoiser, Denoiser):
            raise TypeError(f"What is led is a Denoiser, but got a {type(denoiser).__name__}.")
        super().__init__(denoiser.schedule)
        self.denoiser = denoiser

    @abc.abstractmethod
    def tilt(self, x: Tensor, t: Tensor) -> Tilt:
        """What is known at x_t, (rows, …), and time ``t``, () or (rows,); it has derivatives where ``x`` asks for them."""

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        alpha, sigma = self.at(x, t)
        known, _, gradient = self.tilt(x, t)
        return Denoised(known.mean + sigma.square() / alpha * gradient)


def slope(function: Callable[[Tensor], tuple[Denoised, Tensor]], x: Tensor) -> Tilt:
    """A tilt by derivative: ``function`` maps x_t to x_0 given it, and to log p_t(y | x_t)."""
    keeps_graph = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        point = x if keeps_graph else x.detach().requires_grad_()
        known, value = function(point)
        if value.shape != x.shape[:1]:
            raise ValueError(f"A log-likelihood is one number per row, ({len(x)},), but has the shape {tuple(value.shape)}.")
        if not value.requires_grad:
            raise Unsupported(
                "What is to lead this denoiser does not depend on x through operations that have derivatives. A likelihood "
                "that observes nothing of x leaves its prior: draw from the denoiser as it is. A classifier is not to be "
                "called under torch.no_grad(), or detached."
            )
        (gradient,) = torch.autograd.grad(value.sum(), point, create_graph=keeps_graph)
    return Tilt(known, value, gradient) if keeps_graph else detached(known, value, gradient)


def detached(known: Denoised, value: Tensor, gradient: Tensor) -> Tilt:
    """A tilt without a graph."""
    variance = None if known.variance is None else known.variance.detach()
    return Tilt(Denoised(known.mean.detach(), variance), value.detach(), gradient.detach())


@final
class ClassifierGuided(LedDenoiser):
    """Guidance by a classifier of noisy data: the score gains γ ∇ log p_t(c | x_t).

    γ = 1 with an exact classifier is the exact posterior. Other scales are no posterior at all levels at once:
    p_t(x_t) p_t(c | x_t)^γ are not the noised versions of one law, and what a sampler makes is not p_0(x) p_0(c | x)^γ.

    Args:
        denoiser: Of data of all classes.
        log_prob: log p_t(c | x_t) of the wanted class, from x_t (rows, …) and t to (rows,), with derivatives.
        scale: γ, not negative.

    References:
        P. Dhariwal, A. Nichol, Diffusion Models Beat GANs on Image Synthesis (2021).
    """

    def __init__(self, denoiser: Denoiser, log_prob: Callable[[Tensor, Tensor], Tensor] | None, scale: float = 1.0) -> None:
        super().__init__(denoiser)
        if log_prob is None or not callable(log_prob):
            raise ValueError(
                f"A guidance scale of {scale:g} needs something to be guided by, but log_prob is {log_prob!r}. Give "
                "log p(c | x_t) as a function of x_t and t, or take the denoiser as it is."
            )
        self.log_prob, self.scale = log_prob, _scale(scale)

    def tilt(self, x: Tensor, t: Tensor) -> Tilt:
        _, value, gradient = slope(lambda point: (Denoised(point), self.scale * self.log_prob(point, t)), x)
        return Tilt(self.denoiser(x, t), value, gradient)


@final
class ClassifierFree(Denoiser):
    """Guidance without a classifier, by p(c | x_t) ∝ p(x_t | c) / p(x_t): x̂_0 = (1 − γ) x̂_0(x_t) + γ x̂_0(x_t, c).

    γ = 0 does not look at the condition, γ = 1 is conditional sampling, and above 1 it is exaggerated: see
    ``ClassifierGuided`` for what that is not. (Ho and Salimans' w is γ − 1.)

    Args:
        conditional: Denoiser of data of the wanted class.
        unconditional: Denoiser of data of all classes, of the same schedule.
        scale: γ, not negative.

    References:
        J. Ho, T. Salimans, Classifier-Free Diffusion Guidance (2022).
    """

    def __init__(self, conditional: Denoiser | None, unconditional: Denoiser | None, scale: float) -> None:
        if not isinstance(conditional, Denoiser) or not isinstance(unconditional, Denoiser):
            raise ValueError(
                f"A guidance scale of {scale:g} needs a conditional and an unconditional denoiser, but they are "
                f"{type(conditional).__name__} and {type(unconditional).__name__}. Without a condition there is nothing to "
                "guide by: take the denoiser as it is."
            )
        if conditional is unconditional:
            raise ValueError(
                f"A guidance scale of {scale:g} without conditioning: both denoisers are the same one, so that any scale "
                "gives what it gives alone. Give one that knows the condition and one that does not."
            )
        times = torch.linspace(conditional.schedule.start, conditional.schedule.stop, 5, dtype=torch.float64)[1:]
        with torch.no_grad():
            one, other = conditional.schedule.log_snr(times), unconditional.schedule.log_snr(times)
        if not torch.allclose(one, other, rtol=1e-6, atol=1e-8):
            raise ValueError("Both denoisers have one schedule: at the same t their log-SNRs differ.")
        super().__init__(conditional.schedule)
        self.conditional, self.unconditional, self.scale = conditional, unconditional, _scale(scale)

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        plain = self.unconditional(x, t).mean
        return Denoised(plain + self.scale * (self.conditional(x, t).mean - plain))


def _scale(scale: float) -> float:
    if not 0.0 <= scale < float("inf"):
        raise ValueError(f"A guidance scale is a number of at least 0, but is {scale}.")
    return float(scale)
