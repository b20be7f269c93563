"""A site proposed from its own distribution, given the sites that it depends on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move
from inference.contract import Unsupported
from inference.density import Density
from inference.handlers import base
from inference.staging import Staged
from inference.terms import Coordinates, Elements, colour, one_by_one

__all__ = ["PriorDraw"]


@dataclass(frozen=True)
class PriorDraw(Block):
    """A Metropolis step that proposes a site from its own distribution at the present values of the others.

    It needs no gradient, no scale and no warm-up, and serves where the likelihood is weak or jumps, and for sites that
    nothing else can move. Elements that are independent given the rest are accepted one by one.

    Args:
        sites: Name of the one site; filled in by ``bind``.
        elements: Which elements are accepted on their own; None finds out.
        family: Makes the distribution of all chains from its parameters, if it is made of them alone; else None.

    References:
        L. Tierney, Markov chains for exploring posterior distributions (1994): independence chains.
    """

    elements: Elements | None = None
    family: Callable[..., Any] | None = None

    @property
    def update(self) -> str:
        return "Prior"

    @property
    def has_certificate(self) -> bool:
        return True

    @property
    def claim(self) -> str:
        return "independent"

    @property
    def is_scan(self) -> bool:
        """Whether one element moves after the other, so that nothing is taken for independent."""
        return self.elements is not None and self.elements.is_scan

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        if len(sites) != 1:
            raise Unsupported(f"PriorDraw() updates one site, but was given {', '.join(sites)}.")
        site, program = density.program.latents[sites[0]], density.program
        if site.flaw:
            raise Unsupported(f"PriorDraw() cannot draw '{site.name}' from its prior, which is {site.flaw}.")
        node = program.trace({name: value[0] for name, value in trials.values.items()}, evaluated=False).nodes[site.name]
        if _is_masked(node["fn"]):
            raise Unsupported(f"PriorDraw() cannot draw '{site.name}' from its prior, which is masked.")
        coordinates = Coordinates(program, sites, is_constrained=True)
        elements = colour(density, coordinates, coordinates.batch, trials.values)
        bound = replace(self, sites=(site.name,), elements=elements)
        inner = base(node["fn"])
        family: Callable[..., Any] = type(inner)
        held = {name: vars(inner).get(name) for name in inner.arg_constraints}
        numbers = {name: value for name, value in held.items() if isinstance(value, (int, float))}
        bound = replace(bound, family=functools.partial(family, **numbers))
        return bound if bound._is_rebuilt(density, trials) else replace(bound, family=None)

    def scanning(self) -> Self:
        """The same block, one element after the other."""
        assert self.elements is not None
        return replace(self, elements=one_by_one(self.elements.of, len(self.elements.owners[0])))

    def _log_prior(self, density: Density) -> Staged:
        """(values, value of the site) -> log-density of what is proposed, (chain, element)."""
        (site,), program = self.sites, density.program
        batch = program.latents[site].batch_shape

        def log_prior(values: Mapping[str, Tensor], value: Tensor) -> Tensor:
            found = program.trace(values, evaluated=False).nodes[site]["fn"].log_prob(value)
            return found.to(program.dtype).expand(batch).reshape(-1)

        return density.stage(("own distribution", site), log_prior, (True, True))

    def _rebuilt(self, density: Density, values: Mapping[str, Tensor]) -> Any:
        """The site's distribution with a leading chain axis."""
        (site,), program = self.sites, density.program

        def parameters(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = base(program.trace(values, evaluated=False).nodes[site]["fn"])
            held = {name: vars(found).get(name) for name in found.arg_constraints}
            return {name: value for name, value in held.items() if isinstance(value, Tensor)}

        assert self.family is not None
        return self.family(**density.stage(("own parameters", site), parameters, (True,))(values))

    def _is_rebuilt(self, density: Density, trials: Current) -> bool:
        """Whether the distribution of all chains is that of each."""
        value = trials.values[self.sites[0]]
        try:
            found = self._rebuilt(density, trials.values)
            log_prob, shape = found.log_prob(value), found.sample().shape
        except (TypeError, ValueError, RuntimeError):
            return False
        expected = self._log_prior(density)(trials.values, value)
        return shape == value.shape and torch.allclose(log_prob.reshape(len(value), -1).sum(-1), expected.sum(-1))

    def _proposed(self, density: Density, values: Mapping[str, Tensor]) -> Tensor:
        """A draw of the site for every chain.

        What is not made of its parameters alone, such as a transformed distribution, is drawn chain by chain: torch's
        samplers do not go through ``vmap``.
        """
        (site,), program = self.sites, density.program
        if self.family is not None:
            return self._rebuilt(density, values).sample()
        draws = []
        for chain in range(len(values[site])):
            others = {name: value[chain] for name, value in values.items() if name != site}
            draws.append(program.trace(others, evaluated=False).nodes[site]["value"].expand(program.latents[site].shape))
        return torch.stack(draws)

    def init(self, density: Density, current: Current) -> tuple[()]:
        return ()

    def step(self, state: tuple[()], density: Density, current: Current, warmup: int) -> tuple[tuple[()], Current, Move]:
        assert self.elements is not None
        (site,), elements = self.sites, self.elements
        coordinates = Coordinates(density.program, self.sites, is_constrained=True)
        staged, log_prior = coordinates.terms(density), self._log_prior(density)
        others = {name: value for name, value in current.values.items() if name != site}
        vector = coordinates.vector(current.values)
        before = now = staged(vector, others)
        explained, rates = torch.zeros_like(current.log_joint), []
        for owner, which in elements.each():
            is_moved = torch.isin(elements.of, which)
            drawn = coordinates.vector({site: self._proposed(density, current.values)})
            proposal = torch.where(is_moved, drawn, vector)
            after = staged(proposal, others)
            present, proposed = (coordinates.values(v)[site] for v in (vector, proposal))
            log_q = log_prior(current.values, proposed) - log_prior(current.values, present)
            gain = elements.own(after, owner) - elements.own(now, owner)
            log_ratio = (gain - log_q)[:, which].nan_to_num(nan=-torch.inf)
            accepted = torch.rand_like(log_ratio).log() < log_ratio
            is_accepted = torch.zeros_like(gain, dtype=torch.bool).index_copy(1, which, accepted)
            vector = torch.where(is_accepted[:, elements.of], proposal, vector)
            now = staged(vector, others)
            explained = explained + torch.where(is_accepted, gain, 0.0).sum(-1)
            rates.append(log_ratio.clamp(max=0.0).exp())
        unexplained = now.sum(-1) - before.sum(-1) - explained
        values = {**current.values, **coordinates.values(vector)}
        return (), Current(values, density.joint(values)), Move(torch.cat(rates, 1).mean(1), unexplained)


def _is_masked(distribution: Any) -> bool:
    while type(distribution).__name__ in ("Independent", "ExpandedDistribution", "MaskedDistribution"):
        if type(distribution).__name__ == "MaskedDistribution":
            return True
        distribution = distribution.base_dist
    return False
