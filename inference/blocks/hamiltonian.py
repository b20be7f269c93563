"""Continuous sites moved jointly by Hamiltonian trajectories, all others held fixed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move
from inference.contract import Unsupported
from inference.density import Density, Slope, Unconstrained
from inference.mcmc import Gradient, HamiltonianAdaptation, HamiltonianKernel

__all__ = ["Hamiltonian", "HamiltonianBlockState", "misled"]

_PIECES, _ROUNDS, _PATHS = 16, 5, 4  # 16⁻⁵ of a path is a millionth of it
_STEPS = 8  # evaluations of a trajectory, about
_DENSE = 16  # numbers, up to which correlations are learnt: sites that one loop or plate hangs on often move together
_CLIFF = 50.0  # below the highest point of a path, where the density ends unnoticed


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

    def _parts(self, density: Density, values: Mapping[str, Tensor]) -> tuple[Unconstrained, Gradient]:
        coordinates = density.coordinates(self.sites)
        others = {name: value for name, value in values.items() if name not in self.sites}
        staged = density.unconstrained(coordinates, evaluations=_STEPS * density.evaluations)
        return coordinates, Slope(staged, lambda chains: others)

    def init(self, density: Density, current: Current) -> HamiltonianBlockState:
        coordinates, gradient = self._parts(density, current.values)
        position = coordinates.position(current.values)
        one = position.new_ones(())
        kernel = HamiltonianKernel(one, one, position.new_ones(coordinates.size), one)
        start = kernel.init(position, gradient)
        return HamiltonianBlockState(
            HamiltonianAdaptation.start(start, gradient, density.program.groups, coordinates.size <= _DENSE)
        )

    def step(
        self, state: HamiltonianBlockState, density: Density, current: Current, warmup: int
    ) -> tuple[HamiltonianBlockState, Current, Move]:
        state, moved, rate = self.drawn(state, density, current.values, warmup)
        values = {**current.values, **moved}
        return state, Current(values, density.joint(values)), Move(rate)

    def drawn(
        self, state: HamiltonianBlockState, density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[HamiltonianBlockState, dict[str, Tensor], Tensor]:
        coordinates, gradient = self._parts(density, values)
        adaptation = state.adaptation
        kernel = adaptation.kernel(is_final=not warmup, most_steps=self.most_steps)
        before = kernel.init(coordinates.position(values), gradient)
        after, info = kernel.step(before, gradient)
        if warmup:
            adaptation = adaptation.update(before, after, info, warmup, self.target)
        else:
            adaptation = adaptation.advance()
        return HamiltonianBlockState(adaptation), coordinates.values(after.position), info.acceptance_rate


def misled(sites: Sequence[str], density: Density, trials: Current) -> tuple[str, ...]:
    """Sites along which the gradient does not account for the log-density: it jumps, or the gradient is wrong or zero.

    Along paths through a few settings of a site, all others held fixed, the change of the log-density is held against the
    integral of the gradient, piece by piece; the worst piece is cut into smaller ones until it is a millionth of the path.
    What is smooth agrees there; a kink differs by no more than the slope times the length; a jump does not shrink. A wrong
    slope is wrong in most pieces. Where the density ends at a height that chains reach, as at the end of a uniform, there is
    a cliff.
    """
    coordinates = Unconstrained(density.program, sites)
    staged = density.unconstrained(coordinates)
    count = min(_PATHS, len(trials.log_joint))
    settings = coordinates.position(trials.values)
    across = settings.roll(-1, 0)[:count] - settings[:count]
    around = 2.0 * torch.where(across < 0, -1.0, 1.0).to(settings.dtype)
    present, change = settings[:count].repeat(2, 1), torch.cat([across, around])
    back = torch.cat([torch.zeros_like(across), 0.5 * around])  # where the path begins, in the coordinates that it takes
    rows = torch.arange(count, device=present.device).repeat(2).repeat_interleave(_PIECES + 1)
    others = {name: value[rows] for name, value in trials.values.items() if name not in sites}
    steps = torch.linspace(0.0, 1.0, _PIECES + 1, dtype=present.dtype, device=present.device)
    found, offset = [], 0
    for name, size in zip(coordinates.sites, coordinates.sizes, strict=True):
        own = torch.arange(offset, offset + size, device=present.device)
        direction = torch.zeros_like(change).index_copy(1, own, change[:, own])
        start = present.index_copy(1, own, (present - back)[:, own])
        offset += size
        low, length = torch.zeros_like(start[:, 0]), 1.0
        for _ in range(_ROUNDS):
            at = low[:, None] + length * steps
            points = start[:, None] + at[..., None] * direction[:, None]
            gradient, value = staged(points.flatten(0, 1), others)
            slope = (gradient.unflatten(0, at.shape) * direction[:, None]).sum(-1)
            value, length = value.unflatten(0, at.shape), length / _PIECES
            rise, expected = value.diff(dim=1), 0.5 * length * (slope[:, 1:] + slope[:, :-1])
            error = (rise - expected).abs().nan_to_num(nan=0.0, posinf=0.0)
            ends = value.isfinite()[:, 1:] ^ value.isfinite()[:, :-1]
            edge = torch.maximum(value[:, 1:], value[:, :-1]).masked_fill(~ends, -torch.inf)
            if length == 1.0 / _PIECES:
                top = value.nan_to_num(nan=-torch.inf).amax(1)
            error = torch.where(edge > (top - _CLIFF).unsqueeze(1), torch.inf, error)
            low = at.gather(1, error.argmax(1, keepdim=True)).squeeze(1)
        rounding = (1e-10 if value.dtype == torch.float64 else 1e-4) * (1.0 + value.abs().nan_to_num(posinf=0.0, neginf=0.0))
        steepest = length * slope.abs().nan_to_num(posinf=0.0).amax(1)
        jumps = error.amax(1) > 1e-6 + 100.0 * steepest + rounding.amax(1)  # of a cliff, the error is infinite
        largest = torch.maximum(rise.abs(), expected.abs()).nan_to_num(posinf=0.0)
        is_wrong = (error > 0.1 * largest) & (error > rounding[:, 1:])
        if bool((jumps | (is_wrong.sum(1) > _PIECES // 2)).any()):
            found.append(name)
    return tuple(found)
