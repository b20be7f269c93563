"""The No-U-Turn sampler: Hamiltonian trajectories as long as each of them needs, for few chains.

References:
    M. Hoffman and A. Gelman, The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (2014).
    M. Betancourt, A conceptual introduction to Hamiltonian Monte Carlo (2017).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from inference.adaptation import StepAdaptation, check_mass
from inference.marginal import MarginalSampler
from inference.mcmc import Gradient, HamiltonianKernel, HamiltonianState, diagonal, first_log_step, lead
from inference.program import Program
from inference.trees import TreeInfo, TreeKernel

__all__ = ["NUTS"]

_FIRST_DEPTH = 6  # before the scale is known, long trajectories teach little


@dataclass(frozen=True, kw_only=True)
class NUTS(MarginalSampler):
    """The No-U-Turn sampler on the unconstrained continuous sites, finite discrete ones summed out and drawn back.

    Warm-up sets the step size (dual averaging) and the mass matrix from all chains together. Trees of many chains wait
    for the longest of them: ``HMC`` is the better choice for more than a dozen.

    Args:
        chains: Number of chains, all advanced at once.
        draws: Draws kept of each chain.
        warmup: Adaptive steps before the first draw.
        thin: Steps per draw.
        until: When to stop before all draws are taken, such as ``Until(rhat=1.01, ess=400)``.
        target: Acceptance rate that warm-up aims at, in (0, 1).
        max_depth: Doublings of a trajectory at most: 2^max_depth − 1 leapfrog steps.
        mass: "diagonal", or "dense" for the full covariance, which straightens correlations (at most 512 dimensions).

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def coin(flips):
        ...     fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        ...     with pyro.plate("flip", len(flips)):
        ...         pyro.sample("heads", dist.Bernoulli(fairness), obs=flips)
        >>> fit = NUTS(warmup=20, draws=20, seed=0, progress=False).fit(coin, torch.ones(10))
        >>> sorted(fit.stats)[-2:]
        ['step_size', 'tree_depth']
    """

    target: float = 0.8
    max_depth: int = 10
    mass: str = "diagonal"

    @property
    def update(self) -> str:
        return "NUTS"

    @property
    def needs_gradient(self) -> bool:
        return True

    def begin(self, position: Tensor, density: Gradient, program: Program) -> tuple[HamiltonianState, StepAdaptation]:
        dense = check_mass(self.mass, position.shape[-1])
        groups = program.groups
        one, scale = position.new_ones(()), diagonal(position.new_ones((*lead(groups), position.shape[-1])))
        state = TreeKernel(one, scale).init(position, density)

        def rate(step_size: Tensor) -> Tensor:
            return HamiltonianKernel(step_size, step_size, scale, one).step(state, density)[1].acceptance_rate

        return state, StepAdaptation.start(position, first_log_step(rate, position, groups), dense, groups)

    def move(
        self, kernel: HamiltonianState, adaptation: StepAdaptation, density: Gradient, warmup: int
    ) -> tuple[HamiltonianState, StepAdaptation, TreeInfo]:
        max_depth = self.max_depth
        if warmup and int(adaptation.step) < warmup // 5:
            max_depth = min(max_depth, _FIRST_DEPTH)
        state, info = TreeKernel(adaptation.step_size(not warmup), adaptation.factor, max_depth).step(kernel, density)
        if warmup:
            adaptation = adaptation.update(state.position, info.acceptance_rate, warmup, self.target)
        return state, adaptation, info
