"""Metropolis-Hastings: propose, then accept or stay.

References:
    N. Metropolis et al., Equation of state calculations by fast computing machines (1953).
    W. Hastings, Monte Carlo sampling methods using Markov chains and their applications (1970).
    G. Roberts, A. Gelman and W. Gilks, Weak convergence and optimal scaling of random walk Metropolis algorithms (1997).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from inference.marginal import MarginalSampler
from inference.mcmc import RandomWalkAdaptation, RandomWalkInfo, RandomWalkState

__all__ = ["MetropolisHastings", "RandomWalk"]


@dataclass(frozen=True)
class RandomWalk:
    """A Gaussian step whose full covariance is learnt in warm-up, within chains and pooled over them."""


@dataclass(frozen=True, kw_only=True)
class MetropolisHastings(MarginalSampler):
    """Metropolis-Hastings on the unconstrained continuous sites, finite discrete ones summed out and drawn back.

    Args:
        proposal: How to propose.
        chains: Number of chains, all advanced at once.
        draws: Draws kept of each chain.
        warmup: Adaptive steps before the first draw.
        thin: Steps per draw; a random walk needs about ten per dimension for one independent draw.
    """

    proposal: RandomWalk = field(default_factory=RandomWalk)

    @property
    def update(self) -> str:
        return "RandomWalk"

    @property
    def needs_gradient(self) -> bool:
        return False

    def begin(self, position: Tensor, density: Callable[[Tensor], Tensor]) -> tuple[RandomWalkState, RandomWalkAdaptation]:
        adaptation = RandomWalkAdaptation.like(position)
        return adaptation.kernel.init(position, density), adaptation

    def move(
        self,
        kernel: RandomWalkState,
        adaptation: RandomWalkAdaptation,
        density: Callable[[Tensor], Tensor],
        warmup: int,
    ) -> tuple[RandomWalkState, RandomWalkAdaptation, RandomWalkInfo]:
        state, info = adaptation.kernel.step(kernel, density)
        if warmup:
            adaptation = adaptation.update(state, info, warmup)
        return state, adaptation, info
