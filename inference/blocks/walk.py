"""Sites moved by an adaptive random walk: what has no gradient, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move, averaged, handed_out
from inference.density import Density
from inference.mcmc import lead
from inference.terms import Coordinates, Elements, colour, one_by_one

__all__ = ["AdaptiveWalk", "WalkState"]


class WalkState(NamedTuple):
    """step (), and the log-scale of every element (element,), shared by the chains, or (group, element)."""

    step: Tensor
    log_scale: Tensor


@dataclass(frozen=True)
class AdaptiveWalk(Block):
    """A symmetric random walk: in unconstrained coordinates for continuous sites, in rounded steps for counts.

    Elements of a plate that are independent given the rest are accepted one by one; otherwise all elements move together.
    The scale follows the acceptance rate (0.44 for one coordinate, 0.234 else) by Robbins-Monro, until the end of warm-up.
    The certificate is the change of the log-joint that the elements' own terms do not explain.

    Args:
        sites: Names of the sites; filled in by ``bind``.
        elements: Which elements are accepted on their own; None finds out.
    """

    elements: Elements | None = None

    @property
    def update(self) -> str:
        return "RandomWalk"

    @property
    def has_certificate(self) -> bool:
        return True

    @property
    def claim(self) -> str:
        return "independent"

    @property
    def is_scan(self) -> bool:
        """Whether all elements move together, so that nothing is taken for independent."""
        return self.elements is not None and self.elements.number == 1

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        coordinates = Coordinates(density.program, sites)
        bound = replace(self, sites=tuple(sites), elements=colour(density, coordinates, coordinates.batch, trials.values))
        assert bound.elements is not None
        return bound if len(bound.elements.colours) == 1 else bound.scanning()

    def scanning(self) -> Self:
        """The same block, all elements together."""
        assert self.elements is not None
        return replace(self, elements=one_by_one(torch.zeros_like(self.elements.of), len(self.elements.owners[0])))

    def init(self, density: Density, current: Current) -> WalkState:
        assert self.elements is not None
        like = current.log_joint
        return WalkState(like.new_zeros(()), like.new_zeros((*lead(density.program.groups), self.elements.number)))

    def step(self, state: WalkState, density: Density, current: Current, warmup: int) -> tuple[WalkState, Current, Move]:
        assert self.elements is not None
        coordinates, elements = Coordinates(density.program, self.sites), self.elements
        staged, (owner,) = coordinates.terms(density), elements.owners
        others = {name: value for name, value in current.values.items() if name not in self.sites}
        present = coordinates.vector(current.values)
        step = handed_out(state.log_scale.exp(), len(present))[..., elements.of] * torch.randn_like(present)
        step = torch.where(coordinates.is_discrete, step.sign() * step.abs().ceil(), step)  # a count moves by one at least
        is_inside = coordinates.is_inside(present + step)
        outside = (
            present.new_zeros(len(present), elements.number).index_add(1, elements.of, (~is_inside).to(present.dtype)) > 0
        )
        proposal = torch.where(outside[:, elements.of], present, present + step)
        before, after = staged(present, others), staged(proposal, others)
        log_ratio = elements.own(after, owner) - elements.own(before, owner)
        log_ratio = torch.where(outside, -torch.inf, log_ratio.nan_to_num(nan=-torch.inf))
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        vector = torch.where(accepted[:, elements.of], proposal, present)
        values = {**current.values, **coordinates.values(vector)}
        explained = torch.where(accepted, log_ratio, 0.0).sum(-1)
        unexplained = staged(vector, others).sum(-1) - before.sum(-1) - explained
        rate = log_ratio.clamp(max=0.0).exp()
        if warmup:
            sizes = torch.bincount(elements.of, minlength=elements.number)
            target = torch.where(sizes == 1, 0.44, 0.234)
            log_scale = state.log_scale + (averaged(rate, density.program.groups) - target) / (state.step + 1) ** 0.6
            state = WalkState(state.step + 1, log_scale)
        return state, Current(values, density.joint(values)), Move(rate.mean(-1), unexplained)
