"""A denoiser as a distribution: drawn by the probability flow, with the density that the flow has."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.transforms import AffineTransform

from pyro_genmodels.autoencoders.ends import check_shape, row_shape, rows_of
from pyro_genmodels.base import StochasticModule
from pyro_genmodels.diffusion.denoiser import Denoiser, checked
from pyro_genmodels.diffusion.flow import FlowDistribution, ProbabilityFlow, flow_of, leaf
from pyro_genmodels.diffusion.likelihood import rademacher
from pyro_genmodels.diffusion.samplers import terminal

__all__ = ["ScoreModel"]

_MOST_EXACT = 256  # numbers in a row up to which the divergence is taken exactly, by as many derivatives


class ScoreModel(StochasticModule):
    """Noise-conditional score model: a denoiser at all levels of noise, and with it a distribution of data.

        ε ~ N(0, I),  z_T = √(α_T² + σ_T²) ε,  z = flow(z_T),  x = location + deviation · z

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
        start: Time of the least noise; None takes the schedule's, if there is noise at it. It needs to be small against the
            details of the density.
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
        if probes < 0:
            raise ValueError(f"probes is {probes}, but must be at least 1, or 0 for the exact divergence.")
        self.denoiser, self.shape = checked(denoiser, "ScoreModel"), row_shape(shape, "ScoreModel")
        self.is_scaled = is_scaled
        schedule, begin = denoiser.schedule, denoiser.schedule.start
        if start is None and not bool(schedule.log_snr(torch.tensor(begin, dtype=torch.float64)).isfinite()):
            raise ValueError(
                f"{type(schedule).__name__} has no noise at t = {begin:g}, where the flow has no density. Give start=, a "
                f"time of little noise, such as {begin + 1e-3 * (schedule.stop - begin):g}."
            )
        size = torch.Size(shape).numel()
        if not probes and size > _MOST_EXACT:
            probes = 1
        generator = torch.Generator().manual_seed(0)
        kept = rademacher(probes, torch.empty(1, *shape), generator) if probes else None
        scale = self.shape if len(self.shape) == 1 else (1,) * len(self.shape)
        self.probes: Tensor | None
        self.location: Tensor
        self.deviation: Tensor
        self._spacing = steps, start
        self._grid: Tensor
        self.register_buffer("_grid", schedule.grid(steps, "log_snr", start=start), persistent=False)
        self.register_buffer("probes", kept)
        self.register_buffer("location", torch.zeros(scale))
        self.register_buffer("deviation", torch.ones(scale))

    @property
    def grid(self) -> Tensor:
        """Times of the flow, even in log-SNR, (steps + 1,); those of a schedule with weights follow these."""
        if next(self.denoiser.schedule.parameters(), None) is None:
            return self._grid
        steps, start = self._spacing
        return self.denoiser.schedule.grid(steps, "log_snr", start=start).to(self._grid)

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

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution of x, of batch shape () or (rows,).

        Args:
            context: (rows, …), for a denoiser that takes one.
        """
        weight, grid = leaf(self.denoiser), self.grid

        def flow(denoiser: Denoiser) -> ProbabilityFlow:
            return ProbabilityFlow(denoiser, grid, self.shape, self.probes)

        # scales of the whole shape: torch counts the volume by their numbers
        reached = terminal(self.denoiser, grid, weight).scale.expand(self.shape)
        location, deviation = (part.to(weight).expand(self.shape) for part in (self.location, self.deviation))
        noise, parts = flow_of(self.denoiser, flow, reached, context)
        return FlowDistribution(noise, [*parts, AffineTransform(location, deviation, event_dim=len(self.shape))])

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
