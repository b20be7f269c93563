"""Univariate slices: any site, continuous or count, element by element, without a gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move, averaged, handed_out
from inference.contract import Unsupported
from inference.density import Density
from inference.mcmc import lead
from inference.terms import Coordinates, Elements, colour, one_by_one

__all__ = ["Slice", "SliceState"]

_MOST_STEPS = 16  # widths of the longest interval
_MOST_SHRINKS = 100
_JUMPS = 3.0  # width of the first interval in mean jumps: about the slice of a normal


class SliceState(NamedTuple):
    """step (), and the mean distance that a coordinate jumps (size,), shared by the chains, or (group, size)."""

    step: Tensor
    jump: Tensor


@dataclass(frozen=True)
class Slice(Block):
    """Slice sampling of one coordinate after the other: stepping out, then shrinking.

    Continuous sites move in unconstrained coordinates. A count n moves as u ~ Uniform(n, n + 1), whose floor it is: a step
    function has slices like any other. Counts need no table of values, so that nothing is cut off, and no
    scale that suits all of them; every proposal that is refused shrinks its own interval only.

    Coordinates that share no term of the log-joint given the rest, such as the elements of a plate, move at the same time
    and are decided one by one; those that share one move in turn. What is shared is found by trying (``inference.terms``).
    The certificate is the change of the log-joint that the terms do not explain.

    Args:
        sites: Names of the sites; filled in by ``bind``.
        elements: Which coordinates move at the same time; None finds out.

    References:
        R. Neal, Slice sampling (2003).
    """

    elements: Elements | None = None

    @property
    def update(self) -> str:
        return "Slice"

    @property
    def has_certificate(self) -> bool:
        return True

    @property
    def claim(self) -> str:
        return "independent"

    @property
    def is_scan(self) -> bool:
        """Whether one coordinate moves after the other, so that nothing is taken for independent."""
        return self.elements is not None and self.elements.is_scan

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        for name in sites:
            site = density.program.latents[name]
            if site.support.is_discrete and (site.event_dim or site.choices is not None):
                raise Unsupported(
                    f"Slice() needs sites that are continuous or counts, but '{name}' is {site.family}. "
                    + ("Use Enumerate()." if site.choices is not None else "Use PriorDraw().")
                )
        coordinates = Coordinates(density.program, sites)
        of = torch.arange(coordinates.size, device=coordinates.batch.device)
        return replace(self, sites=tuple(sites), elements=colour(density, coordinates, of, trials.values))

    def scanning(self) -> Self:
        """The same block, one coordinate after the other."""
        assert self.elements is not None
        return replace(self, elements=one_by_one(self.elements.of, len(self.elements.owners[0])))

    def init(self, density: Density, current: Current) -> SliceState:
        one = current.log_joint.new_ones(())
        size = Coordinates(density.program, self.sites).size
        return SliceState(0.0 * one, (one / _JUMPS).expand(*lead(density.program.groups), size))

    def step(self, state: SliceState, density: Density, current: Current, warmup: int) -> tuple[SliceState, Current, Move]:
        assert self.elements is not None
        coordinates = Coordinates(density.program, self.sites)
        staged, elements = coordinates.terms(density), self.elements
        others = {name: value for name, value in current.values.items() if name not in self.sites}
        start = coordinates.vector(current.values)
        vector = torch.where(coordinates.is_discrete, start + torch.rand_like(start), start)
        width = _JUMPS * handed_out(state.jump, len(start)).expand_as(start)
        width = torch.where(coordinates.is_discrete, width.clamp(min=1.0), width)

        def settled(vector: Tensor) -> Tensor:
            return torch.where(coordinates.is_discrete, vector.floor(), vector)

        before = now = staged(start, others)
        explained = torch.zeros_like(current.log_joint)
        for owner, which in elements.each():
            log_density = elements.own(now, owner)[:, which]

            def at(position: Tensor) -> Tensor:
                """Log-density of each element of this colour at a position of its own, (chain, element)."""
                moved = settled(vector.index_copy(1, which, position))  # noqa: B023
                inside = coordinates.is_inside(moved)
                terms = staged(torch.where(inside, moved, start), others)
                return torch.where(inside, elements.own(terms, owner), -torch.inf)[:, which]  # noqa: B023

            level = log_density - torch.empty_like(log_density).exponential_()
            low, high = _stepped_out(vector[:, which], width[:, which], level, at)
            position, reached = _shrunk(vector[:, which], low, high, log_density, level, at)
            vector = vector.index_copy(1, which, position)
            now = staged(settled(vector), others)
            explained = explained + (reached - log_density).sum(-1)
        vector = settled(vector)
        if warmup:
            gain = (state.step + 1) ** -0.6
            jump = state.jump + gain * (averaged((vector - start).abs(), density.program.groups) - state.jump)
            state = SliceState(state.step + 1, jump.clamp(min=1e-10))
        values = {**current.values, **coordinates.values(vector)}
        unexplained = (now.sum(-1) - before.sum(-1)) - explained
        return state, Current(values, density.joint(values)), Move(torch.ones_like(unexplained), unexplained)


def _stepped_out(
    present: Tensor, width: Tensor, level: Tensor, log_density: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """An interval around the present positions whose ends lie outside the slice, or as far out as the steps allow."""
    low = present - width * torch.rand_like(present)
    high = low + width
    below = (torch.rand_like(present) * _MOST_STEPS).floor()
    above = _MOST_STEPS - 1 - below
    for _ in range(_MOST_STEPS):
        is_short = (below > 0) & (log_density(low) > level)
        if not bool(is_short.any()):
            break
        low, below = torch.where(is_short, low - width, low), below - 1
    for _ in range(_MOST_STEPS):
        is_short = (above > 0) & (log_density(high) > level)
        if not bool(is_short.any()):
            break
        high, above = torch.where(is_short, high + width, high), above - 1
    return low, high


def _shrunk(
    present: Tensor,
    low: Tensor,
    high: Tensor,
    reached: Tensor,
    level: Tensor,
    log_density: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """A point of the slice, uniform on the interval, which shrinks towards the present point at every miss.

    The log-density ``reached`` at the present point is handed in, that at the new one out. It is what an element was
    accepted by, while others had yet to move: the sum tells whether they are independent.
    """
    found, is_open = present, torch.ones_like(present, dtype=torch.bool)
    for _ in range(_MOST_SHRINKS):
        proposal = torch.where(is_open, low + (high - low) * torch.rand_like(present), found)
        value = log_density(proposal)
        hits = is_open & (value > level)
        found, reached = torch.where(hits, proposal, found), torch.where(hits, value, reached)
        is_open = is_open & ~hits
        if not bool(is_open.any()):
            break
        low = torch.where(is_open & (proposal < present), proposal, low)
        high = torch.where(is_open & (proposal >= present), proposal, high)
    return found, reached
