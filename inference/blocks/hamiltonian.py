"""Continuous sites moved jointly by Hamiltonian trajectories, all others held fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from torch import Tensor

from inference.blocks.block import Block, Current, Move
from inference.contract import Unsupported
from inference.density import Density, Unconstrained
from inference.mcmc import Gradient, HamiltonianAdaptation, HamiltonianKernel

__all__ = ["Hamiltonian"]


class HamiltonianBlockState(NamedTuple):
    """The adaptation; nothing of the density is kept, since other blocks move in between."""

    adaptation: HamiltonianAdaptation


@dataclass(frozen=True)
class Hamiltonian(Block):
    """One Hamiltonian trajectory in the unconstrained coordinates of the sites.

    Args:
        sites: Names of the sites; filled in by ``bind``.
        target: Acceptance rate that warm-up aims at, in (0, 1).
        most_steps: Cap on the leapfrog steps of one trajectory.
    """

    target: float = 0.8
    most_steps: int = 64

    @property
    def update(self) -> str:
        return "HMC"

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        for site in sites:
            if not density.program.latents[site].is_continuous:
                raise Unsupported(f"Hamiltonian() needs continuous sites, but '{site}' is discrete.")
        return replace(self, sites=tuple(sites))

    def _parts(self, density: Density, current: Current) -> tuple[Unconstrained, Gradient, dict[str, Tensor]]:
        coordinates = Unconstrained(density.program, self.sites)
        others = {name: value for name, value in current.values.items() if name not in self.sites}
        staged = density.unconstrained(coordinates)
        return coordinates, lambda position: staged(position, others), others

    def init(self, density: Density, current: Current) -> HamiltonianBlockState:
        coordinates, gradient, _ = self._parts(density, current)
        position = coordinates.position(current.values)
        one = position.new_ones(())
        kernel = HamiltonianKernel(one, one, position.new_ones(coordinates.size), one)
        start = kernel.init(position, gradient)
        return HamiltonianBlockState(HamiltonianAdaptation.start(start, gradient, density.program.groups))

    def step(
        self, state: HamiltonianBlockState, density: Density, current: Current, warmup: int
    ) -> tuple[HamiltonianBlockState, Current, Move]:
        coordinates, gradient, others = self._parts(density, current)
        adaptation = state.adaptation
        kernel = adaptation.kernel(is_final=not warmup, most_steps=self.most_steps)
        before = kernel.init(coordinates.position(current.values), gradient)
        after, info = kernel.step(before, gradient)
        if warmup:
            adaptation = adaptation.update(before, after, info, warmup, self.target)
        else:
            adaptation = adaptation.advance()
        values = {**others, **coordinates.values(after.position)}
        values = {name: values[name] for name in current.values}
        moved = Current(values, density.joint(values))
        return HamiltonianBlockState(adaptation), moved, Move(info.acceptance_rate)
