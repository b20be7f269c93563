"""A denoiser as a distribution: drawn by the probability flow, with the density that the flow has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_genmodels.autoencoders.ends import check_shape, like, rows_of
from pyro_genmodels.base import StochasticModule
from pyro_genmodels.diffusion.denoiser import Denoiser, Given
from pyro_genmodels.diffusion.likelihood import flow_log_prob, rademacher
from pyro_genmodels.diffusion.samplers import rk4, terminal

__all__ = ["FlowDistribution", "ScoreModel"]

_MOST_EXACT = 256  # numbers in a row up to which the divergence is taken exactly, by as many derivatives


class FlowDistribution(TorchDistribution):
    """What the probability flow of a denoiser makes of noise.

        z_T ~ N(0, α_T² + σ_T²),  d(z/α)/ds = (z/α − ẑ_0(z)) / s along s = σ/α,  x = location + deviation · z

    ``rsample`` and ``log_prob`` follow the same flow along the same grid, by Runge-Kutta of order 4, one way and the other;
    the density is that of what is drawn, with the little noise in it that the grid ends with. Both can be differentiated.

    Args:
        denoiser: Of z; one that takes a context if there is one.
        shape: Of one x.
        grid: Falling times that end with noise, (N + 1,).
        location: In a shape that adds to x.
        deviation: In a shape that multiplies x, positive.
        probes: For Hutchinson's estimate of the divergence, (M, 1, *shape); None takes it exactly.
        context: (*batch, …), or None.
        batch_shape: Without a context.

    References:
        Y. Song et al., Score-based generative modeling through stochastic differential equations (2021), section 4.3.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch looks it up on the class)
    has_rsample = True

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        grid: Tensor,
        location: Tensor,
        deviation: Tensor,
        probes: Tensor | None = None,
        context: Tensor | None = None,
        batch_shape: Sequence[int] = (),
    ) -> None:
        self.denoiser, self.grid, self.probes, self.context = denoiser, grid, probes, context
        self.location, self.deviation = location, deviation
        super().__init__(torch.Size(batch_shape), torch.Size(shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> FlowDistribution:
        batch, context = torch.Size(batch_shape), self.context
        if context is not None:
            context = context.expand(*batch, *context.shape[len(self.batch_shape) :])
        parts = (self.grid, self.location, self.deviation, self.probes, context, batch)
        return FlowDistribution(self.denoiser, self.event_shape, *parts)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws (*sample, *batch, *event), with gradients in the weights of the denoiser."""
        shape = torch.Size(sample_shape) + self.batch_shape
        noise = torch.randn(shape + self.event_shape, dtype=self.location.dtype, device=self.location.device)
        return self.pushed(terminal(self.denoiser, self.grid, noise).scale * noise)

    def pushed(self, noise: Tensor) -> Tensor:
        """Where the flow takes z_T, (*sample, *batch, *event)."""
        lead = noise.shape[: noise.dim() - len(self.event_shape)]
        rows = noise.reshape(-1, *self.event_shape)
        found = rk4(self._at(lead), rows, self.grid)
        return self.location + self.deviation * found.reshape(noise.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, (*sample, *batch)."""
        count = len(self.event_shape)
        if value.shape[value.dim() - count :] != self.event_shape:
            raise ValueError(
                f"A value has the shape {tuple(self.event_shape)}, or more dimensions before that, but came as "
                f"{tuple(value.shape)}."
            )
        lead = torch.broadcast_shapes(value.shape[: value.dim() - count], self.batch_shape)
        z = ((value - self.location) / self.deviation).expand(lead + self.event_shape)
        log_p = flow_log_prob(self._at(lead), z.reshape(-1, *self.event_shape), self.grid, self.probes)
        volume = self.deviation.log().expand(self.event_shape).sum()
        found: Tensor = log_p.to(value.dtype).reshape(lead) - volume
        return found

    def _at(self, lead: torch.Size) -> Denoiser:
        """The denoiser, at the context of as many rows as ``lead`` has elements."""
        if self.context is None:
            return self.denoiser
        behind = self.context.shape[len(self.batch_shape) :]
        return Given(self.denoiser, self.context.expand(lead + behind).reshape(-1, *behind))


class ScoreModel(StochasticModule):
    """Noise-conditional score model: a denoiser at all levels of noise, and with it a distribution of data.

        z_T ~ N(0, α_T² + σ_T²),  x ~ what the probability flow makes of z_T

    Called with a context or without, it is a distribution with ``sample``, ``rsample`` and ``log_prob``, for any program. It
    is trained by ``inference.Denoising``, whose losses see data in units of their own deviation. This ``prepare`` finds
    before a fit looks: for each number of a row of numbers, for all pixels of an image together. Its program is

        x_n ~ model(context_n)

    Site: ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        denoiser: Any, such as a ``Network`` of a ``PointNetwork`` or a ``UNet``, in any parameterisation; for flow matching,
            ``Network(network, Straight(), "flow")``.
        shape: Of one row.
        steps: Of Runge-Kutta of order 4, four calls of the denoiser each.
        start: Time of the least noise; None takes the schedule's. It needs to be small against the details of the density.
        probes: Vectors for Hutchinson's estimate of the divergence, kept fixed so that ``log_prob`` is a function; 0 takes
            the exact one, by as many derivatives as a row has numbers, up to 256 of them, and beyond that one vector.
        is_scaled: Whether ``prepare`` finds the scale of the data; otherwise they are taken as they are.

    References:
        Y. Song, S. Ermon, Generative modeling by estimating gradients of the data distribution (2019).
        Y. Song et al., Score-based generative modeling through stochastic differential equations (2021).
        T. Karras, M. Aittala, T. Aila, S. Laine, Elucidating the design space of diffusion-based generative models (2022).

    Example:
        >>> from pyro_genmodels.diffusion import EDM, Network
        >>> from pyro_genmodels.nets import PointNetwork
        >>> model = ScoreModel(Network(PointNetwork(2), EDM(), "preconditioned"), (2,))
        >>> model().log_prob(model().sample((3,))).shape
        torch.Size([3])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        steps: int = 32,
        start: float | None = None,
        probes: int = 0,
        is_scaled: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(denoiser, Denoiser):
            raise TypeError(
                f"A ScoreModel is made of a Denoiser, such as Network(network, schedule), but got a "
                f"{type(denoiser).__name__}."
            )
        if probes < 0:
            raise ValueError(f"probes is {probes}, but must be at least 1, or 0 for the exact divergence.")
        self.denoiser, self.shape, self.is_scaled = denoiser, tuple(shape), is_scaled
        size = torch.Size(shape).numel()
        if not probes and size > _MOST_EXACT:
            probes = 1
        generator = torch.Generator().manual_seed(0)
        kept = rademacher(probes, torch.empty(1, *shape), generator) if probes else None
        scale = self.shape if len(self.shape) == 1 else (1,) * len(self.shape)
        self.grid: Tensor
        self.probes: Tensor | None
        self.location: Tensor
        self.deviation: Tensor
        self.register_buffer("grid", denoiser.schedule.grid(steps, "log_snr", start=start), persistent=False)
        self.register_buffer("probes", kept)
        self.register_buffer("location", torch.zeros(scale))
        self.register_buffer("deviation", torch.ones(scale))

    @torch.no_grad()
    def prepare(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> None:
        """Finds the scale of the data.

        Raises:
            ValueError: Data of another shape, or a number that is the same in all rows.
        """
        if x is None:
            return
        check_shape(x, self.shape, "ScoreModel")
        if not self.is_scaled or len(x) < 2:
            return
        dims = (0,) if len(self.shape) == 1 else tuple(range(x.dim()))
        x = x.double()
        deviation = x.std(dims, unbiased=False)
        flat = (deviation == 0).nonzero()
        if len(flat):
            raise ValueError(
                f"Number {flat[0].tolist()} of a row is the same in all rows, which has no density. Leave it out, or take "
                "is_scaled=False."
            )
        self.location = x.mean(dims).reshape(self.location.shape).to(self.location)
        self.deviation = deviation.reshape(self.deviation.shape).to(self.deviation)

    def standardised(self, x: Tensor) -> Tensor:
        """z, in the shape of ``x``."""
        return (x - self.location.to(x)) / self.deviation.to(x)

    def forward(self, context: Tensor | None = None) -> FlowDistribution:
        """The distribution of x, of batch shape () or (rows,).

        Args:
            context: (rows, …), for a denoiser that takes one.
        """
        weight = like(self.location, self)
        batch = () if context is None else context.shape[:1]
        scale = (self.location.to(weight), self.deviation.to(weight))
        return FlowDistribution(self.denoiser, self.shape, self.grid, *scale, self.probes, context, batch)

    def model(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> Tensor:
        """The program: ``rows`` draws of the distribution, or data."""
        size = len(context) if x is None and size is None and context is not None else size
        with pyro.plate("rows", rows_of(x, size, self.shape, "ScoreModel")):
            return pyro.sample("x", self(context), obs=x)

    @torch.no_grad()
    def sample(self, size: int | None = None, context: Tensor | None = None) -> Tensor:
        """New rows, (size, *shape); with a context (size, …), one for each of its rows."""
        drawn: Tensor = self.model(None, context, size=size)
        return drawn
