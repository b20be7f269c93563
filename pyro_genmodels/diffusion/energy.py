"""An energy as a distribution: p(x) ∝ exp(−E(x)), known but for its constant."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NoReturn

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from inference.contract import Unsupported
from pyro_genmodels.autoencoders.ends import check_shape, row_shape, rows_of
from pyro_genmodels.base import StochasticModule
from pyro_genmodels.diffusion.langevin import mala
from pyro_genmodels.diffusion.scores import score_of
from pyro_genmodels.nets import MLP

__all__ = ["EnergyDistribution", "EnergyModel"]

_BLOCK = 10  # moves between two looks at how many were accepted
_TARGET = 0.574  # of MALA in high dimension (Roberts and Rosenthal, 1998)


class EnergyDistribution(TorchDistribution):
    """p(x) = exp(−E(x)) / Z, where nobody knows Z.

    ``log_prob`` is −E(x): it tells differences, and no more (``inference.contract.Unnormalised``). That is enough for MCMC:
    HMC, NUTS, Metropolis-Hastings and Gibbs take it as a prior whose parameters are fixed. It is no density, so that
    ``SVI``, ``EM`` and every evidence refuse it, and so does any sampler where the energy depends on other hidden sites.

    ``sample`` runs Metropolis-adjusted Langevin moves, each draw on its own, and so is approximate: it forgets ``start`` as
    fast as they mix, which between far modes they do not. For draws with diagnostics, run a sampler on the program.

    Args:
        energy: E of (*sample, *batch, *event_shape), (*sample, *batch).
        start: Where draws start: makes (*lead, *event_shape) for a shape (*lead).
        event_shape: Shape of one x.
        batch_shape: How many there are.
        moves: Of each draw.
        step: Size δ of the first moves, positive; it is adjusted while they go on.
        scale: Moves are made in x / scale, a number or (*event_shape).

    Example:
        >>> normal = EnergyDistribution(lambda x: 0.5 * x.square().sum(-1), lambda lead: torch.randn(*lead, 2), (2,))
        >>> normal.log_prob(torch.ones(2)), normal.sample((5,)).shape
        (tensor(-1.), torch.Size([5, 2]))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        energy: Callable[[Tensor], Tensor],
        start: Callable[[torch.Size], Tensor],
        event_shape: Sequence[int],
        batch_shape: Sequence[int] = (),
        *,
        moves: int = 200,
        step: Tensor | float = 0.1,
        scale: Tensor | float = 1.0,
    ) -> None:
        if not isinstance(moves, int) or moves < 1:
            raise ValueError(f"moves is {moves!r}, but a draw takes an integer of at least 1.")
        if not isinstance(step, Tensor) and not 0.0 < step < math.inf:
            raise ValueError(f"step is {step!r}, but must be positive and finite.")
        self.energy, self.start, self.moves, self.step, self.scale = energy, start, moves, step, scale
        super().__init__(torch.Size(batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> EnergyDistribution:
        make = partial(EnergyDistribution, self.energy, self.start, self.event_shape, batch_shape)
        return make(moves=self.moves, step=self.step, scale=self.scale)

    def log_prob(self, value: Tensor) -> Tensor:
        """−E(x), (*sample, *batch): log p(x) + log Z."""
        lead = value.shape[: value.dim() - len(self.event_shape)]
        return -self.energy(value).expand(torch.broadcast_shapes(lead, self.batch_shape))

    def rough_draw(self) -> Tensor:
        """Where a draw starts."""
        return self.start(self.batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> NoReturn:
        """Raises ``Unsupported``: draws have no gradient."""
        raise Unsupported(
            "EnergyDistribution has no rsample: moves are accepted or not, which no gradient goes through. Take sample() "
            "for draws; to train an energy, see ContrastiveDivergence and inference.score_matching."
        )

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Approximate draws, (*sample_shape, *batch, *event).

        Raises:
            ValueError: If the energy is NaN or infinite where draws start.
        """
        begin = self.start(torch.Size(sample_shape) + self.batch_shape)
        lead = begin.shape[: begin.dim() - len(self.event_shape)]

        def log_density(z: Tensor) -> Tensor:
            return self.log_prob((z * self.scale).reshape(begin.shape)).reshape(-1)

        z, step, left = (begin / self.scale).reshape(-1, *self.event_shape), float(self.step), self.moves
        is_finite = log_density(z).isfinite()
        if not bool(is_finite.all()):
            raise ValueError(
                f"The energy is NaN or infinite at {int((~is_finite).sum())} of {len(z)} points where draws start. Look at "
                "the weights of its network."
            )
        while left > 0:
            moved = mala(log_density, score_of(log_density), z, step, min(left, _BLOCK))
            z, left = moved.x, left - _BLOCK
            step *= math.exp(float(moved.rate.mean()) - _TARGET)
        return (z * self.scale).reshape(lead + self.event_shape)


class EnergyModel(StochasticModule):
    """Energy-based model: a network tilts a wide normal.

        p(x | context) ∝ N(x; m, (w s)²) exp(−network(z, context)),  z = (x − m) / s

    m and s are mean and standard deviation of the data (``prepare`` takes them), w is ``spread``. A network that grows no
    faster than linearly, as fully connected ones with the usual activations, leaves this with a finite constant; without
    the normal it need not be.

    The constant is unknown, and depends on the weights: a bound or a likelihood cannot train them. Fit by
    ``inference.Denoising``, with a loss of ``inference.score_matching`` or with ``inference.ContrastiveDivergence``.
    ``model()`` is a distribution as ``EnergyDistribution`` says, and works as a prior in any program.

    Site of the program: ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        shape: Of one x, such as (8, 8).
        context: Numbers in a row of the context; 0: there is none.
        network: From (batch, *shape), and (batch, context) if there is one, to (batch, 1) or (batch,); None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``.
        spread: w, positive; None leaves the normal out, and the network is all of the energy.
        noise: Standard deviation of noise that comes on top of the data, as by ``NoisedLoss``: s is then that of both.
        chains: Draws that it keeps of itself, at least 1, for contrastive divergence to go on from.
        moves: Langevin moves of each draw of ``sample``.

    References:
        G. Hinton, Training Products of Experts by Minimizing Contrastive Divergence (2002).
        T. Tieleman, Training Restricted Boltzmann Machines Using Approximations to the Likelihood Gradient (2008).
        J. Xie, Y. Lu, S. Zhu, Y. Wu, A Theory of Generative ConvNet (2016): the tilted normal.

    Example:
        >>> model = EnergyModel((2,), hidden=(8,))
        >>> model().sample((5,)).shape, model.energy(torch.zeros(3, 2)).shape
        (torch.Size([5, 2]), torch.Size([3]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        context: int = 0,
        network: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        spread: float | None = 2.0,
        noise: float = 0.0,
        chains: int = 256,
        moves: int = 200,
    ) -> None:
        super().__init__()
        if context < 0 or chains < 1:
            raise ValueError(f"context is at least 0 and chains at least 1, but they are {context} and {chains}.")
        if spread is not None and not 0.0 < spread < math.inf:
            raise ValueError(f"spread is {spread!r}, but must be positive and finite, or None for no normal at all.")
        if not 0.0 <= noise < math.inf:
            raise ValueError(f"noise is {noise!r}, but must be a standard deviation, at least 0 and finite.")
        self.shape, self.context = row_shape(shape, "EnergyModel"), context
        self.spread, self.noise, self.moves = spread, noise, moves
        size = math.prod(self.shape)
        self.network = MLP(size + context, 1, hidden, nn.SiLU) if network is None else network
        self.mean: Tensor
        self.deviation: Tensor
        self.particles: Tensor
        self.log_step: Tensor
        self.register_buffer("mean", torch.zeros(self.shape))
        self.register_buffer("deviation", torch.ones(self.shape))
        self.register_buffer("particles", torch.randn(chains, *self.shape))
        self.register_buffer("log_step", torch.tensor(math.log(0.3)))

    def prepare(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> None:
        """Takes mean and standard deviation of the data, and begins the draws that it keeps anew.

        A number that hardly varies is given a tenth of the deviation of all.

        Raises:
            ValueError: If the data are of another shape, or not finite.
        """
        if x is None:
            return
        check_shape(x, self.shape, "EnergyModel")
        if not x.is_floating_point():
            raise ValueError(f"x must be floating, but is {str(x.dtype).removeprefix('torch.')}. Pass x.float().")
        if not bool(x.isfinite().all()):
            raise ValueError(
                "x has numbers that are NaN or infinite, of which an energy says nothing. Leave those rows out."
            )
        with torch.no_grad():
            deviation = (x.var(0, correction=0) + self.noise**2).sqrt()
            least = 0.1 * deviation.square().mean().sqrt()
            self.mean.copy_(x.mean(0))
            self.deviation.copy_(torch.where(deviation > least, deviation, least if least > 0 else 1.0))
            wide = self.deviation if self.spread is None else self.spread * self.deviation
            self.particles.copy_(self.mean + wide * torch.randn_like(self.particles))

    def energy(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """E(x), (…): −log p(x) but for a constant of the weights and the context. The network runs in its own dtype.

        Args:
            x: (…, *shape).
            context: (batch, context), where (…) broadcasts against the batch; None if there is none.
        """
        lead = x.shape[: x.dim() - len(self.shape)]
        if x.shape[len(lead) :] != torch.Size(self.shape):
            raise ValueError(f"x ends in the shape of a row, {self.shape}, but has the shape {tuple(x.shape)}.")
        if context is not None:
            lead = torch.broadcast_shapes(lead, context.shape[:-1])
            x = x.expand(*lead, *self.shape)
        z = (x - self.mean) / self.deviation
        weight = next(self.network.parameters(), z)
        parts = [z.reshape(-1, *self.shape).to(weight.dtype)]
        if context is not None:
            parts.append(context.expand(*lead, self.context).reshape(-1, self.context).to(weight.dtype))
        found: Tensor = self.network(*parts)
        if found.shape not in ((len(parts[0]),), (len(parts[0]), 1)):
            raise ValueError(
                f"The network of this EnergyModel gave a tensor of shape {tuple(found.shape)} for {len(parts[0])} rows, but "
                f"must give one number a row, ({len(parts[0])},) or ({len(parts[0])}, 1)."
            )
        found = found.reshape(lead).to(z.dtype)
        if self.spread is None:
            return found
        return found + 0.5 * z.square().reshape(*lead, -1).sum(-1) / self.spread**2

    def forward(self, context: Tensor | None = None) -> EnergyDistribution:
        """The distribution of x, of batch shape () or that of the context.

        Args:
            context: (batch, context), floating; labels one-hot.
        """
        if (context is not None) != bool(self.context):
            raise ValueError(
                f"This EnergyModel was built for a context of {self.context} numbers a row, but was given "
                + ("none. Give context=." if context is None else "one. Leave it out.")
            )
        if context is not None and (context.shape[-1:] != (self.context,) or not context.is_floating_point()):
            raise ValueError(
                f"The context must be floating and of shape (batch, {self.context}), but is "
                f"{str(context.dtype).removeprefix('torch.')} of shape {tuple(context.shape)}. Labels become one by "
                "torch.nn.functional.one_hot(labels, classes).float()."
            )
        return EnergyDistribution(
            self.energy if context is None else partial(self.energy, context=context),
            self._start,
            self.shape,
            () if context is None else context.shape[:-1],
            moves=self.moves,
            step=self.log_step.exp().square(),
            scale=self.deviation,
        )

    def _start(self, lead: torch.Size) -> Tensor:
        """Draws that it has kept, (*lead, *shape)."""
        rows = torch.randint(0, len(self.particles), lead, device=self.particles.device)
        return self.particles[rows]

    def model(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> Tensor:
        """The program: rows that are independent given the context."""
        rows = len(context) if x is None and size is None and context is not None else size
        with pyro.plate("rows", rows_of(x, rows, self.shape, "EnergyModel")):
            drawn: Tensor = pyro.sample("x", self(context), obs=x)
        return drawn

    @torch.no_grad()
    def sample(self, size: int | None = None, context: Tensor | None = None) -> Tensor:
        """New rows, (size, *shape), approximate; with a context (size, …), one for each of its rows."""
        return self.model(None, context, size=size)
