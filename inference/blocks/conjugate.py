"""A site drawn from its conditional, whose family and parameters are read off the gradient of the log-joint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.func import grad, vmap

from inference.blocks.block import Block, Current, Move, holds, metropolised, where_proper
from inference.conditionals import Conditional, ParetoConditional, Points
from inference.contract import Unsupported
from inference.density import Density
from inference.messages import Family, Normal, Pareto, candidates, kind_of, least_of
from inference.program import Program
from inference.sites import Site

__all__ = ["Conjugate", "Joined", "Stacked", "edge", "merged", "message"]

_HALVINGS = 60  # of an interval: to the last bit


def message(
    family: Family, sites: Sequence[str], points: Points, density: Density, values: dict[str, Tensor]
) -> Conditional:
    """The conditional of ``sites`` given all others, in ``family``, from gradients near ``points``; several are stacked."""
    if isinstance(family, Pareto):  # the gradient has to be taken inside
        (site,) = sites
        begin = edge(site, density, values, torch.full_like(values[site], family.least))
        points = Points(2.0 * begin, begin)
    at = family.at(points)
    if len(sites) == 1:
        staged = density.gradients(sites[0])
    else:
        stacked = Stacked(density.program, sites).gradients(lambda values: density.program.log_joint(values))
        staged = density.stage(("stacked gradients", *sites), stacked, (True, True))
    gradients = staged(at.movedim(0, 1).contiguous(), values)
    conditional = family.solve(at, gradients.movedim(1, 0))
    return replace(conditional, scale=begin) if isinstance(conditional, ParetoConditional) else conditional


def edge(site: str, density: Density, values: dict[str, Tensor], least: Tensor) -> Tensor:
    """For each element the least value from ``least`` on with a finite log-joint, (chain, *site), by bisection.

    All other elements stay where they are. What comes out does not depend on the present value, but for rounding.
    """
    present = values[site]
    chains, size = len(present), present[0].numel()
    repeated = {name: value.repeat_interleave(size, 0) for name, value in values.items()}
    own = torch.eye(size, dtype=torch.bool, device=present.device)

    def is_finite(level: Tensor) -> Tensor:
        rows = torch.where(own, level.reshape(chains, 1, size), present.reshape(chains, 1, size))
        return density.joint({**repeated, site: rows.reshape(-1, *present.shape[1:])}).isfinite().reshape(present.shape)

    lower, upper = least, torch.where(is_finite(least), least, present)
    for _ in range(_HALVINGS):
        middle = 0.5 * (lower + upper)
        inside = is_finite(middle)
        lower, upper = torch.where(inside, lower, middle), torch.where(inside, middle, upper)
    return upper


class Joined:
    """Real sites as one: a single site keeps its shape, several become one vector.

    Args:
        program: The program.
        sites: Their names.

    Attributes:
        shape: Shape of the joint value.
    """

    def __init__(self, program: Program, sites: Sequence[str]) -> None:
        self.sites = tuple(sites)
        self.shapes = [program.latents[site].shape for site in self.sites]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.shape = self.shapes[0] if len(self.sites) == 1 else torch.Size([sum(self.sizes)])

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site to value (chain, *site) -> (chain, *shape)."""
        if len(self.sites) == 1:
            return values[self.sites[0]]
        return torch.cat([values[site].reshape(len(values[site]), -1) for site in self.sites], -1)

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """(…, *shape) -> site to value (…, *site)."""
        if len(self.sites) == 1:
            return {self.sites[0]: value}
        parts = value.split(self.sizes, -1)
        return {
            site: part.reshape(part.shape[:-1] + shape)
            for site, part, shape in zip(self.sites, parts, self.shapes, strict=True)
        }

    def is_coupled(self, precision: Tensor) -> Tensor:
        """Which sites share an entry of a joint precision (chain, D, D), (site, site)."""
        scale = precision.diagonal(dim1=-2, dim2=-1).abs().sqrt()
        relative = (precision / (scale.unsqueeze(-1) * scale.unsqueeze(-2))).abs().nan_to_num().amax(0)
        of = torch.arange(len(self.sizes), device=precision.device)
        of = of.repeat_interleave(torch.tensor(self.sizes, device=precision.device))
        member = (of == torch.arange(len(self.sizes), device=of.device)[:, None]).to(relative.dtype)
        return member @ (relative > 1e-8).to(relative.dtype) @ member.T > 0

    def gradients(self, log_density: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """(points (point, *shape), values, more) -> gradient in the joint value of ``log_density(values, more)``."""

        def at_points(points: Tensor, values: Mapping[str, Tensor], *more: Tensor) -> Tensor:
            return vmap(grad(lambda value: log_density({**values, **self.split(value)}, *more)))(points)

        return at_points


class Stacked(Joined):
    """Sites of one shape as one: a single site keeps its shape, several become one with an axis more, (site, *shape)."""

    def __init__(self, program: Program, sites: Sequence[str]) -> None:
        super().__init__(program, sites)
        if len(self.sites) > 1:
            self.shape = torch.Size([len(self.sites), *self.shapes[0]])

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        joined = super().join(values)
        return joined.reshape(len(joined), *self.shape)

    def split(self, value: Tensor) -> dict[str, Tensor]:
        lead = value.dim() - len(self.shape)
        return super().split(value if len(self.sites) == 1 else value.flatten(lead))


@dataclass(frozen=True)
class Conjugate(Block):
    """An exact draw from a conjugate conditional.

    Several sites of one shape, such as those of a loop, are drawn at once, as one site with an axis more; they must be
    independent given the others.

    The points of differentiation are the last conditional's mean and spread during warm-up, and frozen after it: they
    never look at the value that is being replaced, so that a wrong family would be rejected, not sampled from.

    Args:
        sites: Name of the site or sites; filled in by ``bind``.
        family: The family of the conditional; None tries those that live on its support.
    """

    family: Family | None = None

    @property
    def update(self) -> str:
        return self.family.name if self.family else "Conjugate"

    @property
    def is_exact(self) -> bool:
        return True

    @property
    def is_straight(self) -> bool:
        return not isinstance(self.family, Pareto)  # whose beginning is searched for

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        latents = density.program.latents
        site = latents[sites[0]]
        kinds = {(latents[name].shape, kind_of(latents[name].support)) for name in sites}
        if len(kinds) > 1 or (len(sites) > 1 and None in next(iter(kinds))):
            raise Unsupported(
                f"Conjugate() updates one site, or several of one shape and support, but was given {', '.join(sites)}. "
                "Gaussian() draws real ones jointly."
            )
        if any(not latents[name].is_continuous for name in sites):
            raise Unsupported(f"Conjugate() needs a continuous site, but '{site.name}' is {site.family}.")
        if len(sites) > 1:
            families = [*candidates(site.support, Stacked(density.program, sites).shape)]
        else:
            families = self._families(site, density, trials)
        for family in [self.family] if self.family else families:
            bound = replace(self, sites=tuple(sites), family=family)
            if holds(bound, density, trials):
                return bound
        where = kind_of(site.support) or str(site.support)
        raise Unsupported(f"The conditional of '{site.name}' is in no known family on its support ({where}).")

    @staticmethod
    def _families(site: Site, density: Density, trials: Current) -> list[Family]:
        least = least_of(site.support)
        families: list[Family] = [*candidates(site.support, site.shape)] if least is None else [Pareto(least)]
        idle = _idle(site.name, density, trials)
        if idle is not None and kind_of(site.support) == "real":  # what is masked may be in no other term either
            families.append(Normal(idle))
        return families

    def init(self, density: Density, current: Current) -> Points:
        assert self.family is not None
        points = self.family.initial(Stacked(density.program, self.sites).join(current.values))
        for _ in range(2):
            conditional = message(self.family, self.sites, points, density, current.values)
            points = merged(conditional, points)
        return points

    def drawn(
        self, state: Points, density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[Points, dict[str, Tensor], Tensor]:
        assert self.family is not None
        conditional = message(self.family, self.sites, state, density, values)
        found = where_proper(conditional.is_proper, Stacked(density.program, self.sites).split(conditional.sample()), values)
        return merged(conditional, state) if warmup else state, *found

    def step(self, state: Points, density: Density, current: Current, warmup: int) -> tuple[Points, Current, Move]:
        assert self.family is not None
        stacked = Stacked(density.program, self.sites)
        conditional = message(self.family, self.sites, state, density, current.values)
        proposal = conditional.sample()
        log_q, log_q_present = conditional.log_prob(proposal), conditional.log_prob(stacked.join(current.values))
        log_q = torch.where(conditional.is_proper, log_q, torch.inf)
        moved, move = metropolised(current, stacked.split(proposal), log_q, log_q_present, density)
        return merged(conditional, state) if warmup else state, moved, move


def _idle(site: str, density: Density, trials: Current) -> Tensor | None:
    """The elements that a mask takes out of the site's own statement, such as responses that are known; None if none."""
    node = density.program.trace({name: value[0] for name, value in trials.values.items()}, evaluated=False).nodes[site]
    if not isinstance(node["mask"], Tensor):
        return None
    known = density.program.latents[site]
    kept = node["mask"].expand(known.batch_shape).reshape(known.batch_shape + (1,) * known.event_dim)
    return None if bool(kept.all()) else ~kept.expand(known.shape)


def merged(conditional: Conditional, points: Points) -> Points:
    """The points that a conditional suggests, where it is proper and they are finite."""
    suggested = conditional.points()
    is_good = conditional.is_proper.reshape(-1, *(1,) * (points.location.dim() - 1))
    is_good = is_good & suggested.location.isfinite() & suggested.spread.isfinite()
    return Points(
        torch.where(is_good, suggested.location, points.location), torch.where(is_good, suggested.spread, points.spread)
    )
