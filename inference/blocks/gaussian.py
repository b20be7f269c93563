"""Several real sites drawn together from their joint conditional, where that is Gaussian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move, holds, metropolised, where_proper
from inference.blocks.conjugate import Joined, merged
from inference.conditionals import Conditional, GaussianConditional, Points
from inference.contract import Unsupported
from inference.density import Density
from inference.messages import WIDEST_GAUSSIAN, kind_of
from inference.messages import Gaussian as Family
from inference.recording import unlikely

__all__ = ["Gaussian", "check_real", "refined"]

_SHARED = 1e-4  # share of an element's precision that the elements before it leave to it; below, digits are lost


def check_real(block: str, sites: Sequence[str], density: Density, is_wide: bool = False) -> None:
    """Raises unless all sites live on the whole line, and are few enough for one joint normal, however wide it may be."""
    for name in sites:
        site = density.program.latents[name]
        if not site.is_continuous or kind_of(site.support) != "real":
            raise Unsupported(f"{block}() needs sites on the whole real line, but '{name}' is {site.family}.")
    size = sum(density.program.latents[name].shape.numel() for name in sites)
    if size > WIDEST_GAUSSIAN and not is_wide:
        raise Unsupported(
            f"{block}() would draw {size:,} elements of {', '.join(sites)} from one joint normal, but at most "
            f"{WIDEST_GAUSSIAN:,} are feasible. Update the sites one at a time."
        )


@dataclass(frozen=True)
class Gaussian(Block):
    """An exact draw of real sites from their joint conditional, such as an intercept and a slope, or effects and their mean.

    The precision is the change of the gradient from one point to the next, D + 1 points for D elements. What is linear
    and normal in all of its sites mixes at once, where one site at a time creeps along their correlations.

    Args:
        sites: Names of the sites; filled in by ``bind``.
    """

    @property
    def update(self) -> str:
        return "Gaussian"

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def is_straight(self) -> bool:
        return True

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        check_real("Gaussian", sites, density)
        bound = replace(self, sites=tuple(sites))
        if not holds(bound, density, trials):
            raise Unsupported(f"The joint conditional of {', '.join(sites)} is not Gaussian.")
        return bound

    def conditional(self, points: Points, density: Density, values: dict[str, Tensor]) -> Conditional:
        """The joint conditional of the sites as one vector, from gradients near ``points``."""
        return self._dense(points, density, values)

    def _dense(self, points: Points, density: Density, values: dict[str, Tensor]) -> GaussianConditional:
        joined = Joined(density.program, self.sites)
        family = Family(torch.Size([sum(joined.sizes)]), (0,))
        gradients = self._gradients(joined, density, values)
        at = family.at(points)
        return refined(family.solve(at, gradients(at)), gradients)

    def _gradients(self, joined: Joined, density: Density, values: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Gradients of the log-joint in the sites as one vector, at points."""
        size = sum(joined.sizes)
        staged = density.stage(
            ("joint gradients", self.sites), joined.gradients(lambda values: density.program.log_joint(values)), (True, True)
        )

        def gradients(at: Tensor) -> Tensor:
            """(point, chain, D) -> the same."""
            found = staged(at.movedim(0, 1).reshape(at.shape[1], -1, *joined.shape), values)
            return found.reshape(*found.shape[:2], size).movedim(1, 0)

        return gradients

    def is_coupled(self, density: Density, trials: Current) -> Tensor:
        """Which sites share an entry of the joint precision, (site, site)."""
        precision = self._dense(self.init(density, trials), density, trials.values).precision
        return Joined(density.program, self.sites).is_coupled(precision)

    def init(self, density: Density, current: Current) -> Points:
        values = Joined(density.program, self.sites).join(current.values).reshape(len(current.log_joint), -1)
        points = Points(values, 1.0 + values.abs())
        for _ in range(2):
            points = merged(self.conditional(points, density, current.values), points)
        return points

    def drawn(
        self, state: Points, density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[Points, dict[str, Tensor], Tensor]:
        joined = Joined(density.program, self.sites)
        conditional = self.conditional(state, density, values)
        proposal = conditional.sample()
        proposed = joined.split(proposal.reshape(len(proposal), *joined.shape))
        found = where_proper(conditional.is_proper, proposed, values)
        return merged(conditional, state) if warmup else state, *found

    def step(self, state: Points, density: Density, current: Current, warmup: int) -> tuple[Points, Current, Move]:
        joined = Joined(density.program, self.sites)
        conditional = self.conditional(state, density, current.values)
        proposal = conditional.sample()
        present = joined.join(current.values).reshape(proposal.shape)
        log_q = torch.where(conditional.is_proper, conditional.log_prob(proposal), torch.inf)
        proposed = joined.split(proposal.reshape(len(proposal), *joined.shape))
        moved, move = metropolised(current, proposed, log_q, conditional.log_prob(present), density)
        return merged(conditional, state) if warmup else state, moved, move


def refined(conditional: GaussianConditional, gradients: Callable[[Tensor], Tensor]) -> GaussianConditional:
    """The same conditional without the rounding of a precision that is almost singular, as that of effects and their mean.

    With P ≈ L Lᵀ the whitened precision V ᵀP V, V = L⁻ᵀ, is almost the identity. Taken from gradients at steps along the
    columns of V, it is exact to rounding whatever the condition of P, and so are its factor M and that of P, which is L M.

    Args:
        conditional: The conditional, (chain, D).
        gradients: (point, chain, D) -> gradients of the log-joint, the same shape.
    """
    factor, is_good = conditional._factor()
    shares = factor.diagonal(dim1=-2, dim2=-1).square() / factor.square().sum(-1)
    if not unlikely((shares < _SHARED).any()):
        return conditional
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    basis = torch.linalg.solve_triangular(factor.mT, eye.expand_as(factor), upper=True)
    mean = conditional.mean
    found = gradients(torch.cat([mean[None], mean + basis.movedim(-1, 0)]))
    columns = basis.mT @ (found[0] - found[1:]).movedim(0, -1)
    root, failed = torch.linalg.cholesky_ex(0.5 * (columns + columns.mT))
    is_good = is_good & (failed == 0)
    root = torch.where(is_good[:, None, None], root, eye)
    shift = basis @ torch.cholesky_solve(basis.mT @ found[0].unsqueeze(-1), root)
    root = factor @ root
    mean = torch.where(is_good[:, None], mean + shift.squeeze(-1), torch.nan)
    return GaussianConditional(mean, root @ root.mT, conditional.coupling, root)
