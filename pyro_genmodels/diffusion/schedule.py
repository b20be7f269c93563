"""How data turn into noise: x_t = α_t x_0 + σ_t ε, told by the log-SNR λ_t = log α_t² / σ_t².

A schedule is two choices: a curve t ↦ λ_t (``log_snr``, with the inverse ``time``), and the pair of levels (α, σ) that has a
given log-SNR (``levels``): variance preserving has α² + σ² = 1, variance exploding α = 1. Time runs from data to noise:
λ falls as t grows. Samplers need no more than that, since the flow of any schedule is, in x/α over σ/α, the same one.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["EDM", "VE", "VP", "Betas", "Cosine", "Learned", "Schedule", "Sigmoid", "Straight", "SubVP"]

_LEAST = -12.0  # log-SNR where curves that would end at pure noise are cut: 1/400 of the noise is left of the data


class Schedule(nn.Module, abc.ABC):
    """A curve of noise levels.

        x_t = α_t x_0 + σ_t ε,  λ_t = log(α_t² / σ_t²) falls from data (``start``) to noise (``stop``)

    Attributes:
        start: Time of the least noise, where a grid ends.
        stop: Time of the most noise, where a grid begins.
    """

    start: float
    stop: float

    @abc.abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """λ_t, of the shape of ``t``; infinite where there is no noise."""

    @abc.abstractmethod
    def time(self, log_snr: Tensor) -> Tensor:
        """The t of which λ_t is ``log_snr``, of its shape."""

    @abc.abstractmethod
    def levels(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at this log-SNR, both of its shape."""

    @final
    def alpha(self, t: Tensor) -> Tensor:
        """α_t, of the shape of ``t``."""
        return self.levels(self.log_snr(t))[0]

    @final
    def sigma(self, t: Tensor) -> Tensor:
        """σ_t, of the shape of ``t``."""
        return self.levels(self.log_snr(t))[1]

    @final
    def check_times(self, times: Tensor) -> None:
        """Raises ValueError unless falling times lie between 0 and ``stop``."""
        if not times[-1] >= 0.0 or times[0] > self.stop * (1.0 + 1e-6):
            raise ValueError(
                f"Times of {type(self).__name__} lie between 0 and stop = {self.stop:g}, but the grid goes from "
                f"{times[0]:g} to {times[-1]:g}."
            )

    @final
    def grid(
        self,
        steps: int,
        spacing: Literal["time", "log_snr", "karras"] = "log_snr",
        start: float | None = None,
        stop: float | None = None,
        rho: float = 7.0,
    ) -> Tensor:
        """Times for a sampler, from noise to data.

        Args:
            steps: Number of steps, at least 1.
            spacing: What is equally far apart: "time" t, "log_snr" λ, or "karras" (σ/α)^(1/ρ).
            start: Where to end; None takes ``self.start``.
            stop: Where to begin; None takes ``self.stop``.
            rho: ρ of "karras"; 7 is Karras et al.'s.

        Returns:
            Decreasing times in float64, (steps + 1,).

        Raises:
            ValueError: No steps; an unknown spacing; one in λ or σ whose end has no noise, or too little signal to tell.

        References:
            T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the Design Space of Diffusion-Based Generative Models
            (2022).

        Example:
            >>> EDM().grid(3, "karras")
            tensor([8.0000e+01, 9.7232e+00, 4.6998e-01, 2.0000e-03], dtype=torch.float64)
        """
        if not isinstance(steps, (int, np.integer)) or steps < 1:
            raise ValueError(f"A grid needs a whole number of steps, at least 1 step, but steps is {steps}.")
        if not rho > 0:
            raise ValueError(f"rho is above 0, but is {rho}.")
        if spacing not in ("time", "log_snr", "karras"):
            raise ValueError(f"spacing is 'time', 'log_snr' or 'karras', not {spacing!r}.")
        ends = torch.tensor(
            [self.stop if stop is None else stop, self.start if start is None else start], dtype=torch.float64
        )
        if not ends[0] > ends[1]:
            raise ValueError(f"A grid begins at noise and ends at data, but stop is {ends[0]:g} and start is {ends[1]:g}.")
        self.check_times(ends)
        share = torch.linspace(0.0, 1.0, int(steps) + 1, dtype=torch.float64)
        if spacing == "time":
            return ends[0] + share * (ends[1] - ends[0])
        with torch.no_grad():
            snrs = self.log_snr(ends).double()
            if not snrs.isfinite().all():
                raise ValueError(
                    f"{type(self).__name__} has a log-SNR of {snrs[1]:g} at t = {ends[1]:g} and of {snrs[0]:g} at "
                    f"t = {ends[0]:g}, which cannot be spaced by {spacing!r}. Give a start above {ends[1]:g}, or take "
                    "spacing='time'."
                )
            if spacing == "log_snr":
                inner = self.time(snrs[0] + share * (snrs[1] - snrs[0]))
            else:
                roots = torch.exp(-snrs / (2.0 * rho))
                inner = self.time(-2.0 * rho * torch.log(roots[0] + share * (roots[1] - roots[0])))
        inner = inner.double().clone()
        inner[0], inner[-1] = ends[0], ends[1]  # not off by the rounding of the inverse
        return inner


class _Preserving(Schedule):
    """α² + σ² = 1."""

    @final
    def levels(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


class _Exploding(Schedule):
    """α = 1."""

    @final
    def levels(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(log_snr), torch.exp(-0.5 * log_snr)


def _real(t: Tensor) -> Tensor:
    """Whole times as floating-point numbers, which curves between them are made of."""
    return t if t.is_floating_point() else t.to(torch.get_default_dtype())


def _snr_of(log_signal: Tensor) -> Tensor:
    """λ where log α² is ``log_signal`` and α² + σ² = 1."""
    return log_signal - torch.log(-torch.expm1(log_signal))


@final
class Betas(_Preserving):
    """Steps of given variance, as in denoising diffusion: α_t² = Π_{s ≤ t} (1 − β_s), at t = 0, 1, …, T.

    Between whole times log α² is linear. There is no noise at t = 0.

    Args:
        betas: β_1, …, β_T, each above 0 and below 1, (T,).

    Raises:
        ValueError: Not a vector of numbers between 0 and 1.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models (2020).

    Example:
        >>> Betas.linear(1000).alpha(torch.tensor([0.0, 500.0, 1000.0])).square()
        tensor([1.0000e+00, 7.8587e-02, 4.0358e-05])
    """

    start = 0.0

    def __init__(self, betas: Tensor | Sequence[float]) -> None:
        super().__init__()
        steps = torch.as_tensor(betas, dtype=torch.float64)
        if steps.ndim != 1 or not len(steps) or not ((steps > 0) & (steps < 1)).all():
            raise ValueError(f"betas are a vector of numbers above 0 and below 1, but came as {betas}.")
        self.stop = float(len(steps))
        self.knots: Any
        self.register_buffer("knots", F.pad(torch.log1p(-steps).cumsum(0), (1, 0)))

    @staticmethod
    def linear(steps: int = 1000) -> Betas:
        """β from 1e-4 to 0.02 in 1,000 steps; with another number all β are scaled so that the last α is about the same."""
        if steps < 21:
            raise ValueError(
                f"Scaled to {steps} steps, the largest of the linear betas would be above 0.99. Take at least 21."
            )
        return Betas(torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000.0 / steps))

    @staticmethod
    def cosine(steps: int = 1000, offset: float = 0.008) -> Betas:
        """The steps of ``Cosine``, each β at most 0.999."""
        angles = (torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64) + offset) / (1.0 + offset) * (math.pi / 2)
        signal = angles.cos().square()
        return Betas((1.0 - signal[1:] / signal[:-1]).clamp(max=0.999))

    def log_snr(self, t: Tensor) -> Tensor:
        t = _real(t)
        knots = self.knots.to(t)
        below = t.floor().long().clamp(0, len(knots) - 2)
        return _snr_of(knots[below] + (t - below) * (knots[below + 1] - knots[below]))

    def time(self, log_snr: Tensor) -> Tensor:
        knots, signal = self.knots.to(log_snr), F.logsigmoid(log_snr)
        below = (torch.searchsorted(-knots, -signal, right=True) - 1).clamp(0, len(knots) - 2)
        return below + (signal - knots[below]) / (knots[below + 1] - knots[below])


@final
class Cosine(_Preserving):
    """α_t = cos(π/2 (t + s) / (1 + s)) / cos(π/2 s / (1 + s)) for t in [0, 1], which keeps some signal for longer.

    Args:
        offset: s, which keeps the first steps from being tiny; 0.008 is Nichol and Dhariwal's.
        least: Log-SNR at which it stops, since at t = 1 no signal is left.

    References:
        A. Nichol, P. Dhariwal, Improved Denoising Diffusion Probabilistic Models (2021).
    """

    start = 1e-3

    def __init__(self, offset: float = 0.008, least: float = _LEAST) -> None:
        super().__init__()
        if offset < 0:
            raise ValueError(f"offset is at least 0, but is {offset}.")
        self.offset = offset
        self._first = math.cos(math.pi / 2 * offset / (1 + offset))
        self.stop = self.time(torch.tensor(least, dtype=torch.float64)).item()

    def log_snr(self, t: Tensor) -> Tensor:
        # σ² = (cos² a − cos² b) / cos² a = sin(b − a) sin(b + a) / cos² a: nothing cancels near the data
        a, b = math.pi / 2 * self.offset / (1 + self.offset), math.pi / 2 * (t + self.offset) / (1 + self.offset)
        step = math.pi / 2 * t / (1 + self.offset)
        return 2.0 * torch.log(b.cos()) - torch.log(step.sin()) - torch.log((b + a).sin())

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.acos(self._first * torch.sigmoid(log_snr).sqrt()) * 2 / math.pi * (1 + self.offset) - self.offset


@final
class Sigmoid(_Preserving):
    """α_t² = (s(b) − s(a + t (b − a))) / (s(b) − s(a)) for t in [0, 1], with s(u) = 1 / (1 + exp(−u / τ)).

    Args:
        first: a.
        last: b, above a.
        temperature: τ, positive.
        least: Log-SNR at which it stops, since at t = 1 no signal is left.

    References:
        A. Jabri, D. Fleet, T. Chen, Scalable Adaptive Computation for Iterative Generation (2023).
        T. Chen, On the Importance of Noise Scheduling for Diffusion Models (2023).
    """

    start = 1e-3

    def __init__(self, first: float = -3.0, last: float = 3.0, temperature: float = 1.0, least: float = _LEAST) -> None:
        super().__init__()
        if not first < last or temperature <= 0:
            raise ValueError(f"first is below last and temperature above 0, but they are {first}, {last} and {temperature}.")
        self.first, self.last, self.temperature = first, last, temperature
        self._top, self._bottom = (1.0 / (1.0 + math.exp(-end / temperature)) for end in (last, first))
        self.stop = self.time(torch.tensor(least, dtype=torch.float64)).item()

    def log_snr(self, t: Tensor) -> Tensor:
        at = torch.sigmoid((self.first + t * (self.last - self.first)) / self.temperature)
        return torch.log(self._top - at) - torch.log(at - self._bottom)

    def time(self, log_snr: Tensor) -> Tensor:
        at = self._top - (self._top - self._bottom) * torch.sigmoid(log_snr)
        return (self.temperature * torch.logit(at) - self.first) / (self.last - self.first)


def _linear_rate(least: float, most: float, t: Tensor) -> Tensor:
    """−∫_0^t β, with β from ``least`` to ``most`` over a unit of time: log α² of VP."""
    return -(least * t + 0.5 * (most - least) * t.square())


def _linear_rate_time(least: float, most: float, log_signal: Tensor) -> Tensor:
    slope = most - least
    if slope == 0:
        return -log_signal / least
    # the root of slope/2 t² + least t + log α² = 0 in the form that does not cancel
    return -2.0 * log_signal / (least + (least**2 - 2.0 * slope * log_signal).sqrt())


def _checked(name: str, least: float, most: float) -> None:
    if not 0 < least <= most:
        raise ValueError(f"{name} needs 0 < least ≤ most, but least is {least} and most is {most}.")


@final
class VP(_Preserving):
    """dx = −β(t)/2 x dt + √β(t) dw with β from ``least`` to ``most`` over t in [0, 1]: DDPM's linear steps, made small.

    References:
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based Generative Modeling through
        Stochastic Differential Equations (2021).
    """

    start, stop = 1e-3, 1.0

    def __init__(self, least: float = 0.1, most: float = 20.0) -> None:
        super().__init__()
        _checked("VP", least, most)
        self.least, self.most = least, most

    def log_snr(self, t: Tensor) -> Tensor:
        return _snr_of(_linear_rate(self.least, self.most, t))

    def time(self, log_snr: Tensor) -> Tensor:
        return _linear_rate_time(self.least, self.most, F.logsigmoid(log_snr))


@final
class SubVP(Schedule):
    """dx = −β(t)/2 x dt + √(β(t) (1 − α_t⁴)) dw: the α of ``VP``, with σ_t = 1 − α_t², at all times less noise.

    References:
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based Generative Modeling through
        Stochastic Differential Equations (2021).
    """

    start, stop = 1e-3, 1.0

    def __init__(self, least: float = 0.1, most: float = 20.0) -> None:
        super().__init__()
        _checked("SubVP", least, most)
        self.least, self.most = least, most

    def log_snr(self, t: Tensor) -> Tensor:
        log_signal = _linear_rate(self.least, self.most, t)
        return log_signal - 2.0 * torch.log(-torch.expm1(log_signal))

    def levels(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        # α/σ = r and σ = 1 − α²: r α² + α − r = 0, whose root is 2 r / (1 + √(1 + 4 r²)), here with 1/r
        inverse = torch.exp(-0.5 * log_snr)
        alpha = 2.0 / (inverse + (inverse.square() + 4.0).sqrt())
        return alpha, alpha * inverse

    def time(self, log_snr: Tensor) -> Tensor:
        # log α² = log(1 − σ), as α² = 1 − σ
        return _linear_rate_time(self.least, self.most, torch.log1p(-self.levels(log_snr)[1]))


@final
class VE(_Exploding):
    """σ_t = least (most / least)^t for t in [0, 1]: noise is added, nothing shrinks.

    References:
        Y. Song, S. Ermon, Generative Modeling by Estimating Gradients of the Data Distribution (2019).
    """

    start, stop = 0.0, 1.0

    def __init__(self, least: float = 0.01, most: float = 50.0) -> None:
        super().__init__()
        _checked("VE", least, most)
        if least == most:
            raise ValueError(f"VE needs least below most, but both are {least}.")
        self._first, self._slope = math.log(least), math.log(most / least)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2.0 * (self._first + self._slope * t)

    def time(self, log_snr: Tensor) -> Tensor:
        return (-0.5 * log_snr - self._first) / self._slope


@final
class EDM(_Exploding):
    """Time is noise: σ_t = t, from ``least`` to ``most``.

    References:
        T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the Design Space of Diffusion-Based Generative Models (2022).
    """

    def __init__(self, least: float = 0.002, most: float = 80.0) -> None:
        super().__init__()
        if not 0 <= least < most:
            raise ValueError(f"EDM needs 0 ≤ least < most, but least is {least} and most is {most}.")
        self.start, self.stop = least, most

    def log_snr(self, t: Tensor) -> Tensor:
        return -2.0 * torch.log(t)

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-0.5 * log_snr)


@final
class Straight(Schedule):
    """α_t = 1 − t, σ_t = t for t in [0, 1]: the paths of flow matching with independent ends.

    Args:
        least: Log-SNR at which it stops, since at t = 1 no signal is left.

    References:
        Y. Lipman, R. Chen, H. Ben-Hamu, M. Nickel, M. Le, Flow Matching for Generative Modeling (2023).
    """

    start = 1e-3

    def __init__(self, least: float = _LEAST) -> None:
        super().__init__()
        self.stop = self.time(torch.tensor(least, dtype=torch.float64)).item()

    def log_snr(self, t: Tensor) -> Tensor:
        return 2.0 * (torch.log1p(-t) - torch.log(t))

    def time(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr)

    def levels(self, log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(0.5 * log_snr), torch.sigmoid(-0.5 * log_snr)


@final
class Learned(_Preserving):
    """A falling curve with weights: a network of one hidden layer whose weights are positive, between two free ends.

    The continuous-time bound depends on its ends alone; what lies between changes the variance of its estimate.

    Args:
        least: Log-SNR at t = 1, to begin with.
        most: Log-SNR at t = 0, to begin with.
        hidden: Width of the hidden layer.

    References:
        D. Kingma, T. Salimans, B. Poole, J. Ho, Variational Diffusion Models (2021), appendix H.
    """

    start, stop = 0.0, 1.0

    def __init__(self, least: float = -13.3, most: float = 5.0, hidden: int = 64) -> None:
        super().__init__()
        if not least < most or hidden < 1:
            raise ValueError(f"least is below most and hidden at least 1, but they are {least}, {most} and {hidden}.")
        self.most = nn.Parameter(torch.tensor(most))
        self.log_range = nn.Parameter(torch.tensor(math.log(most - least)))
        self.rate = nn.Parameter(torch.randn(hidden))
        self.shift = nn.Parameter(torch.randn(hidden))
        self.weight = nn.Parameter(torch.zeros(hidden) - math.log(hidden))

    def _rise(self, t: Tensor) -> Tensor:
        rate, shift, weight = (parameter.to(t.dtype) for parameter in (self.rate, self.shift, self.weight))
        return t + (weight.exp() * torch.sigmoid(rate.exp() * t[..., None] + shift)).sum(-1)

    def log_snr(self, t: Tensor) -> Tensor:
        t = _real(t)
        zero, one = self._rise(torch.zeros_like(t)), self._rise(torch.ones_like(t))
        return self.most.to(t.dtype) - self.log_range.to(t.dtype).exp() * (self._rise(t) - zero) / (one - zero)

    @torch.no_grad()
    def time(self, log_snr: Tensor) -> Tensor:
        """By bisection over [0, 1]; no gradient goes through it."""
        low, high = torch.zeros_like(log_snr), torch.ones_like(log_snr)
        for _ in range(60):
            middle = 0.5 * (low + high)
            is_early = self.log_snr(middle) > log_snr
            low, high = torch.where(is_early, middle, low), torch.where(is_early, high, middle)
        return 0.5 * (low + high)
