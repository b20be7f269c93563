"""A denoiser tells the mean of x_0 given x_t, and its variance if it knows it; adapters make one of any network.

x_t = α_t x_0 + σ_t ε:  ε̂ = (x_t − α_t x̂_0) / σ_t,  score = −ε̂ / σ_t,  v̂ = α_t ε̂ − σ_t x̂_0
"""

from __future__ import annotations

import abc
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from pyro_genmodels.diffusion.schedule import Schedule

__all__ = [
    "PREDICTIONS", "Denoised", "Denoiser", "Given", "Network", "Prediction", "checked", "data_from", "output_from",
    "per_row",
]  # fmt: skip

Prediction = Literal["data", "noise", "velocity", "score", "flow"]
PREDICTIONS: tuple[Prediction, ...] = ("data", "noise", "velocity", "score", "flow")


class Denoised(NamedTuple):
    """What is known of x_0 given x_t.

    Attributes:
        mean: E[x_0 | x_t], of the shape of x_t.
        variance: Variance of each number of x_0 given x_t, of the same shape; None if unknown.
    """

    mean: Tensor
    variance: Tensor | None = None


def per_row(values: Tensor, x: Tensor) -> Tensor:
    """A number, or one per row of ``x``, in a shape that multiplies ``x``."""
    if values.ndim == 0:
        return values
    if values.shape != x.shape[:1]:
        raise ValueError(f"t is one number or one per row of x, ({len(x)},), but has the shape {tuple(values.shape)}.")
    return values.reshape(-1, *[1] * (x.ndim - 1)).to(x)


class Denoiser(nn.Module, abc.ABC):
    """The posterior of x_0 given x_t = α_t x_0 + σ_t ε; everything else follows from its mean.

    Args:
        schedule: α and σ.
    """

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(f"A denoiser knows its noise by a Schedule, such as EDM() or VP(), but got {schedule!r}.")
        self.schedule = schedule

    @abc.abstractmethod
    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        """Mean and variance of x_0.

        Args:
            x: x_t, (rows, …).
            t: One time, (), or one per row, (rows,).

        Returns:
            Both of the shape and dtype of ``x``.
        """

    @final
    def noise(self, x: Tensor, t: Tensor) -> Tensor:
        """E[ε | x_t], of the shape of ``x``."""
        alpha, sigma = self.at(x, t)
        return (x - alpha * self(x, t).mean) / sigma

    @final
    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p(x_t), of the shape of ``x``."""
        alpha, sigma = self.at(x, t)
        return (alpha * self(x, t).mean - x) / sigma.square()

    @final
    def at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """α_t and σ_t in shapes that multiply ``x``."""
        if not isinstance(t, Tensor):
            raise TypeError(f"t is a tensor, of one time or one per row, but is {t!r}. Give torch.tensor({t!r}).")
        alpha, sigma = self.schedule.levels(self.schedule.log_snr(t))
        return per_row(alpha, x), per_row(sigma, x)


def checked(denoiser: object, owner: str) -> Denoiser:
    """A denoiser, or a TypeError that says what one is."""
    if not isinstance(denoiser, Denoiser):
        raise TypeError(
            f"A {owner} is made of a Denoiser, such as Network(network, schedule), but got a {type(denoiser).__name__}."
        )
    return denoiser


def data_from(prediction: Prediction, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x̂_0 from what was predicted.

    Args:
        prediction: "data" x_0, "noise" ε, "velocity" α ε − σ x_0, "score" −ε / σ, or "flow" ε − x_0, the slope of straight
            paths, whichever the schedule.
        output: The prediction, of the shape of ``x``.
        x: x_t, (rows, …).
        alpha: α_t, in a shape that multiplies ``x``; not 0 for "noise" and "score".
        sigma: σ_t, likewise.
    """
    match prediction:
        case "data":
            return output
        case "noise":
            return (x - sigma * output) / alpha
        case "velocity":
            return (alpha * x - sigma * output) / (alpha.square() + sigma.square())
        case "score":
            return (x + sigma.square() * output) / alpha
        case "flow":
            return (x - sigma * output) / (alpha + sigma)
    raise ValueError(f"prediction is one of {', '.join(PREDICTIONS)}, not {prediction!r}.")


def output_from(prediction: Prediction, data: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network that predicts ``prediction`` should say where x̂_0 is ``data``: the inverse of ``data_from``."""
    if prediction == "data":
        return data
    noise = (x - alpha * data) / sigma
    match prediction:
        case "noise":
            return noise
        case "velocity":
            return alpha * noise - sigma * data
        case "score":
            return -noise / sigma
        case "flow":
            return noise - data
    raise ValueError(f"prediction is one of {', '.join(PREDICTIONS)}, not {prediction!r}.")


@final
class Network(Denoiser):
    """A network f(x_t, λ_t / 4) as a denoiser.

    Preconditioned, x̂_0 = c_skip x_t / α + c_out f(c_in x_t / α, λ_t / 4), where, with s = σ/α and data of deviation d,

        c_skip = d² / (d² + s²),  c_out = d s / √(d² + s²),  c_in = 1 / √(d² + s²),

    so that input and target have unit variance at every level. Since −λ/4 = log(s)/2, the network's second argument is
    −log(s)/2 in both forms. It runs in the dtype of its weights; ``x`` keeps its own.

    Args:
        network: Maps (rows, …) and (rows,) to the shape of the first, or with ``learns_variance`` to twice its dimension 1.
            With a context it takes that as its third argument.
        schedule: α and σ.
        prediction: "data", "noise", "velocity", "score" or "flow" of a plain network, or "preconditioned".
        deviation: d, the standard deviation of the data, for "preconditioned".
        learns_variance: Whether the second half u of the output tells a variance: that of x_0 is
            d² s² / (d² + s²) / (1 + exp(−u)), between none and that of Gaussian data. At d = 1 and α² + σ² = 1 a
            step of any length then has a variance between the lower and the upper one of ``samplers.ancestral``.

    References:
        T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the Design Space of Diffusion-Based Generative Models (2022).
        T. Salimans, J. Ho, Progressive Distillation for Fast Sampling of Diffusion Models (2022): velocity.
        Y. Lipman, R. Chen, H. Ben-Hamu, M. Nickel, M. Le, Flow Matching for Generative Modeling (2023): flow.
        A. Nichol, P. Dhariwal, Improved Denoising Diffusion Probabilistic Models (2021): learned variance.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        prediction: Prediction | Literal["preconditioned"] = "noise",
        deviation: float = 1.0,
        learns_variance: bool = False,
    ) -> None:
        super().__init__(schedule)
        if not callable(network):
            raise TypeError(f"network maps x_t and a level to a prediction, but is {network!r}.")
        if prediction not in (*PREDICTIONS, "preconditioned"):
            raise ValueError(f"prediction is one of {', '.join(PREDICTIONS)}, preconditioned, not {prediction!r}.")
        if not deviation > 0:
            raise ValueError(f"deviation is that of the data, above 0, but is {deviation}.")
        self.network, self.prediction, self.deviation = network, prediction, deviation
        self.learns_variance = learns_variance

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Denoised:
        alpha, sigma = self.at(x, t)
        spread = (self.deviation**2 + (sigma / alpha).square()).sqrt()
        is_plain = self.prediction in PREDICTIONS
        output = self._output(x if is_plain else (1.0 / (alpha * spread)) * x, t, context)
        variance = None
        if self.learns_variance:
            output, logits = output.chunk(2, 1)
            variance = (self.deviation * sigma / (alpha * spread)).square() * torch.sigmoid(logits)
        if output.shape != x.shape:
            raise ValueError(
                f"The network made {tuple(output.shape)} of {tuple(x.shape)}: its output has the shape of its input, "
                "and twice the size of dimension 1 with learns_variance=True."
            )
        if self.prediction == "preconditioned":
            kept, gained = (self.deviation / spread).square() / alpha, self.deviation * sigma / (alpha * spread)
            return Denoised(kept * x + gained * output, variance)
        return Denoised(data_from(self.prediction, output, x, alpha, sigma), variance)

    def _output(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        weights = next(self.network.parameters(), x)
        levels = (0.25 * self.schedule.log_snr(t)).to(weights).expand(len(x))
        beside = () if context is None else (context,)
        return self.network(x.to(weights.dtype), levels, *beside).to(x.dtype)


@final
class Given(Denoiser):
    """A conditional denoiser at a context, for whatever takes a denoiser.

    Args:
        denoiser: One that takes a context, such as a ``Network`` of a network that does.
        context: (rows, …); it is given again and again to more rows than that, which are whole repetitions of these.
    """

    def __init__(self, denoiser: Denoiser, context: Tensor) -> None:
        super().__init__(denoiser.schedule)
        self.denoiser, self.context = denoiser, context

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        times, left = divmod(len(x), len(self.context))
        if left:
            raise ValueError(f"The context has {len(self.context)} rows, and x has {len(x)}, which is no multiple of that.")
        known: Denoised = self.denoiser(x, t, self.context.repeat(times, *(1,) * (self.context.dim() - 1)))
        return known
