"""Hamiltonian Monte Carlo, with one trajectory length for all chains.

References:
    S. Duane et al., Hybrid Monte Carlo (1987).
    R. Neal, MCMC using Hamiltonian dynamics (2011).
    P. Sountsov and M. Hoffman, Focusing on difficult directions for learning HMC trajectory lengths (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.adaptation import check_mass
from inference.marginal import MarginalSampler
from inference.mcmc import Gradient, HamiltonianAdaptation, HamiltonianInfo, HamiltonianKernel, HamiltonianState
from inference.program import Program

__all__ = ["HMC"]


@dataclass(frozen=True, kw_only=True)
class HMC(MarginalSampler):
    """Hamiltonian Monte Carlo on the unconstrained continuous sites, finite discrete ones summed out and drawn back.

    Warm-up sets the step size (dual averaging), the trajectory length (squared jumps along the slowest direction) and the
    mass matrix from all chains together; afterwards nothing adapts. Trajectories have a length that is jittered by a
    sequence known in advance, so that all chains take the same number of steps.

    Args:
        chains: Number of chains, all advanced at once.
        draws: Draws kept of each chain.
        warmup: Adaptive steps before the first draw.
        thin: Steps per draw.
        until: When to stop before all draws are taken, such as ``Until(rhat=1.01, ess=400)``.
        target: Acceptance rate that warm-up aims at, in (0, 1).
        most_steps: Cap on the leapfrog steps of one trajectory.
        mass: "diagonal", or "dense" for the full covariance, which straightens correlations (at most 512 dimensions).
    """

    target: float = 0.8
    most_steps: int = 1024
    mass: str = "diagonal"

    @property
    def update(self) -> str:
        return "HMC"

    @property
    def needs_gradient(self) -> bool:
        return True

    def begin(self, position: Tensor, density: Gradient, program: Program) -> tuple[HamiltonianState, HamiltonianAdaptation]:
        dense = check_mass(self.mass, position.shape[-1])
        one = position.new_ones(())
        state = HamiltonianKernel(one, one, torch.ones_like(position[0]), one).init(position, density)
        return state, HamiltonianAdaptation.start(state, density, program.groups, dense)

    def move(
        self, kernel: HamiltonianState, adaptation: HamiltonianAdaptation, density: Gradient, warmup: int
    ) -> tuple[HamiltonianState, HamiltonianAdaptation, HamiltonianInfo]:
        most_steps = self.most_steps
        if warmup and int(adaptation.step) < warmup // 5:
            most_steps = min(most_steps, 64)  # before the scale is known, long trajectories teach little
        moved, info = adaptation.kernel(is_final=not warmup, most_steps=most_steps).step(kernel, density)
        if warmup:
            return moved, adaptation.update(kernel, moved, info, warmup, self.target), info
        return moved, adaptation.advance(), info
