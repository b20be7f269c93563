"""Contrastive divergence: raises the energy where the model is, lowers it where the data are.

For p(x) = exp(−E(x)) / Z the gradient of −log p(x) in the weights is ∇E(x) − E_p ∇E(x′): no Z, but draws x′ of the model. A
chain gives them, that moves a little after each step of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.contract import Persistent, Unsupported
from inference.proposals import LangevinKernel

__all__ = ["ContrastiveDivergence"]

_GAIN = 0.1  # of the log of the step size, for each move, by how far acceptance is off its target


@dataclass(frozen=True)
class ContrastiveDivergence:
    """E(x) − E(x′), with x′ from chains of Metropolis-adjusted Langevin moves on the model.

    Its gradient is that of −log p(x), as far as the chains are where the model is. Its value is no loss: it is about 0 where
    the two are alike, and falls where the chains lag behind. The moves are preconditioned by the deviations of the chains,
    and their size follows the acceptance rate.

    Args:
        moves: Of each chain, at each step of training; at least 1.
        is_persistent: Whether the chains go on from where the last step left them (Tieleman). Else they begin at the data
            each time (Hinton): what is far from all data is then never seen, and may be given any energy.
        target: Acceptance rate, in (0, 1).

    References:
        G. Hinton, Training Products of Experts by Minimizing Contrastive Divergence (2002).
        T. Tieleman, Training Restricted Boltzmann Machines Using Approximations to the Likelihood Gradient (2008).
    """

    moves: int = 10
    is_persistent: bool = True
    target: float = 0.574

    def __post_init__(self) -> None:
        if not isinstance(self.moves, int) or self.moves < 1:
            raise ValueError(f"moves is {self.moves!r}, but must be an integer of at least 1.")
        if not 0.0 < self.target < 1.0:
            raise ValueError(f"target is {self.target!r}, but an acceptance rate lies between 0 and 1.")

    def rows(self, module: Callable[[Any], Any], x: Tensor, context: Any = None) -> Tensor:
        """The difference of each row; moves the chains of the module.

        Args:
            module: ``module(context)`` is a distribution over rows; see ``inference.contract.Persistent``.
            x: (rows, …).
            context: What the module is given.

        Returns:
            (rows,).

        Raises:
            Unsupported: If the module keeps no chains, or keeps some while each row has a context of its own.
        """
        if not isinstance(module, Persistent):
            raise Unsupported(
                f"ContrastiveDivergence goes on from draws that a module keeps, as an EnergyModel does, but "
                f"{type(module).__name__} keeps none. Use a loss of inference.score_matching."
            )
        if self.is_persistent and context is not None:
            raise Unsupported(
                "The chains that a module keeps are of one distribution, but there is one for each context. Take "
                "ContrastiveDivergence(is_persistent=False), or a loss of inference.score_matching."
            )
        distribution = module(context)
        drawn = self._moved(module, distribution, module.particles if self.is_persistent else x)
        if self.is_persistent:
            with torch.no_grad():
                module.particles.copy_(drawn)
        energy, energy_drawn = -distribution.log_prob(x), -distribution.log_prob(drawn)
        difference: Tensor = energy - energy_drawn.mean()
        return difference

    @torch.no_grad()
    def _moved(self, module: Persistent, distribution: Any, begin: Tensor) -> Tensor:
        """The chains after their moves; the step size of the module follows."""
        shape, position = begin.shape, begin.flatten(1)

        def density(at: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                point = at.detach().requires_grad_()
                value = distribution.log_prob(point.reshape(shape))
                (gradient,) = torch.autograd.grad(value.sum(), point)
            return gradient, value.detach()

        spread = position.std(0)
        factor = torch.where(spread > 1e-3 * spread.norm() / len(spread) ** 0.5, spread, torch.ones_like(spread))
        state = LangevinKernel(module.log_step.exp(), factor).init(position, density)
        log_step = module.log_step
        for _ in range(self.moves):
            state, info = LangevinKernel(log_step.exp(), factor).step(state, density)
            log_step = log_step + _GAIN * (info.acceptance_rate.mean() - self.target)
        module.log_step.copy_(log_step.clamp(math.log(1e-4), math.log(10.0)))
        return state.position.reshape(shape)
