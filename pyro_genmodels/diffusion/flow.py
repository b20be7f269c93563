"""A diffusion as a distribution of Pyro: noise that its probability flow carries to data.

    ε ~ N(0, I),  x_T = √(α_T² + σ_T²) ε,  x = flow(x_T)

It has draws with gradients, and a density. As a hidden site of a program it is best moved through its noise, which needs no
density: ``poutine.reparam(program, config={"x": TransformReparam()})`` has a standard normal site ``x_base`` in place of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.transforms import AffineTransform, Transform

from pyro_genmodels.base import StochasticModule
from pyro_genmodels.diffusion.denoiser import Denoiser, Given, checked
from pyro_genmodels.diffusion.likelihood import probability_flow
from pyro_genmodels.diffusion.samplers import both_ways, path, runge_kutta, terminal

__all__ = ["FlowDistribution", "FlowPrior", "ProbabilityFlow", "flow_of", "leaf"]


def leaf(denoiser: Denoiser) -> Tensor:
    """A weight or buffer of a denoiser, whose dtype and device draws are to have."""
    leaves = (*denoiser.parameters(), *denoiser.buffers())
    return next((leaf for leaf in leaves if leaf.is_floating_point()), torch.zeros(())).detach()


@final
class ProbabilityFlow(Transform):
    """The probability flow of a denoiser, x_T ↦ x at the end of a grid, by Runge-Kutta steps of fixed length.

    Steps of fixed length make it a smooth function of x_T, as Hamiltonian trajectories and guides need; its inverse is the
    flow the other way, up to the error of the steps.

    Args:
        denoiser: Any.
        grid: Falling times with noise at all of them, (N + 1,).
        shape: Of one x.
        probes: For the log-determinant, as in ``likelihood.probability_flow``, (M, 1, *shape): kept, so that a density is a
            function, though its log is right only in the mean. None takes the exact divergence, by D derivatives.

    Raises:
        ValueError: A grid that does not fall, or ends without noise.
    """

    bijective = True

    def __init__(self, denoiser: Denoiser, grid: Tensor, shape: Sequence[int], probes: Tensor | None = None) -> None:
        super().__init__()
        self.denoiser, self.grid, self.shape, self.probes = denoiser, grid, torch.Size(shape), probes
        like = torch.zeros(1, *shape)
        path(denoiser, like, grid)
        # looked at now, so that the flow itself decides nothing by values, and can be staged
        self._steps, self._back = both_ways(denoiser, like, grid), both_ways(denoiser, like, grid.flip(0))

    @property
    def domain(self) -> constraints.Constraint:  # type: ignore[override]
        """Real numbers."""
        return constraints.independent(constraints.real, len(self.shape))

    @property
    def codomain(self) -> constraints.Constraint:  # type: ignore[override]
        """Real numbers."""
        return self.domain

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[x.dim() - len(self.shape) :] != self.shape:
            raise ValueError(f"This flow is of x of the shape {tuple(self.shape)}, but came to one of {tuple(x.shape)}.")
        return x.reshape(-1, *self.shape)

    def _call(self, x: Tensor) -> Tensor:
        return runge_kutta(self.denoiser, self._rows(x), self._steps).reshape(x.shape)

    def _inverse(self, y: Tensor) -> Tensor:
        return runge_kutta(self.denoiser, self._rows(y), self._back).reshape(y.shape)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """From data to noise, so that of a draw that is seen the density is that of ``likelihood.flow_log_prob``."""
        found = probability_flow(self.denoiser, self._rows(y), self.grid.flip(0), self.probes)
        return -found.log_det.to(x.dtype).reshape(x.shape[: x.dim() - len(self.shape)])


@final
class FlowDistribution(dist.TransformedDistribution):
    """Noise that a flow carries to data, where each x of a batch may have a flow of its own, by its context."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Of values that broadcast against the batch, (…)."""
        return super().log_prob(value.expand(torch.broadcast_shapes(value.shape, self.batch_shape + self.event_shape)))


def flow_of(
    denoiser: Denoiser, flow: Callable[[Denoiser], ProbabilityFlow], scale: Tensor | float, context: Tensor | None
) -> tuple[TorchDistribution, list[Transform]]:
    """Noise, and what makes data of it, where a context (rows, …) may be given."""
    carried = flow(denoiser if context is None else Given(denoiser, context))
    like, events = leaf(denoiser), len(carried.shape)
    batch = () if context is None else context.shape[:1]
    noise = dist.Normal(like.new_zeros((*batch, *carried.shape)), like.new_ones(())).to_event(events)
    return noise, [AffineTransform(0.0, scale, event_dim=events), carried]


@final
class FlowPrior(StochasticModule):
    """A diffusion as the prior of a program: ``x = pyro.sample("x", prior())``.

    Its density is that of x at the end of the grid, with the little noise that is left there. Where hidden, move it through
    its noise, by ``TransformReparam``: a gradient then takes 4 N calls of the denoiser, and no derivative of a derivative.
    Up to some hundred numbers HMC is at home there; for more see ``posterior``.

    Args:
        denoiser: Any.
        grid: Falling times with noise at all of them, (N + 1,); 8 to 16 steps do for a prior, 64 for log-densities.
        shape: Of one x.
        probes: For the log-determinant, as for ``ProbabilityFlow``.

    Raises:
        ValueError: A grid that does not fall, ends without noise, or begins where the data still show.

    References:
        Y. Song, J. Sohl-Dickstein, D. Kingma, A. Kumar, S. Ermon, B. Poole, Score-Based Generative Modeling through
        Stochastic Differential Equations (2021), section 4.3.
        H. Ben-Hamu, O. Puny, I. Gat, B. Karrer, U. Singer, Y. Lipman, D-Flow: Differentiating through Flows for Controlled
        Generation (2024).

    Example:
        >>> from pyro_genmodels.diffusion import EDM, Oracle
        >>> prior = FlowPrior(Oracle.ring(5, EDM(0.02, 20.0)), EDM(0.02, 20.0).grid(16, "karras"), (2,))
        >>> prior().sample((3,)).shape
        torch.Size([3, 2])
    """

    def __init__(self, denoiser: Denoiser, grid: Tensor, shape: Sequence[int], probes: Tensor | None = None) -> None:
        super().__init__()
        self.denoiser, self.shape = checked(denoiser, "FlowPrior"), torch.Size(shape)
        self.flow = ProbabilityFlow(denoiser, grid, shape, probes)
        self.scale = float(terminal(denoiser, grid, torch.zeros((), dtype=torch.float64)).scale)

    def forward(self, context: Tensor | None = None) -> TorchDistribution:
        """The distribution of x, of batch shape () or (rows,).

        Args:
            context: (rows, …), for a denoiser that takes one.
        """

        def flow(denoiser: Denoiser) -> ProbabilityFlow:
            grid, probes = self.flow.grid, self.flow.probes
            return self.flow if context is None else ProbabilityFlow(denoiser, grid, self.shape, probes)

        return FlowDistribution(*flow_of(self.denoiser, flow, self.scale, context))
