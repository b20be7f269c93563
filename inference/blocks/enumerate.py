"""Finite discrete sites, drawn exactly from their conditional: jointly, or one element after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move, is_certified, metropolised
from inference.contract import Unsupported
from inference.density import Density
from inference.terms import Coordinates, Elements, colour, one_by_one

__all__ = ["Enumerate"]


@dataclass(frozen=True)
class Enumerate(Block):
    """A joint draw of finite sites by variable elimination, certified against the joint without enumeration.

    Where the elements of a plate are coupled, as in a block model or a lattice, there is no such draw. Then, with
    ``by_element``, each element is drawn given all others; those that share no term of the log-joint at the same time.

    Args:
        sites: Names of the sites; filled in by ``bind``.
        by_element: Whether elements are drawn one after the other. For one site only.
        elements: Which elements are drawn at the same time; None finds out.
    """

    by_element: bool = False
    elements: Elements | None = None

    @property
    def update(self) -> str:
        return "Enumerate"

    @property
    def is_exact(self) -> bool:
        return not self.by_element

    @property
    def has_certificate(self) -> bool:
        return True

    @property
    def is_straight(self) -> bool:
        return not self.by_element

    @property
    def claim(self) -> str:
        return "independent" if self.by_element else "exact"

    @property
    def is_scan(self) -> bool:
        """Whether one element moves after the other, so that nothing is taken for independent."""
        return self.elements is not None and self.elements.is_scan

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        for site in sites:
            if density.program.latents[site].choices is None:
                raise Unsupported(f"Enumerate() needs sites with finitely many values, but '{site}' is not one.")
        if self.by_element:
            if len(sites) != 1:
                raise Unsupported(f"Enumerate(by_element=True) updates one site, but was given {', '.join(sites)}.")
            coordinates = Coordinates(density.program, sites)
            elements = colour(density, coordinates, coordinates.batch, trials.values)
            return replace(self, sites=tuple(sites), elements=elements)
        bound = replace(self, sites=tuple(sites))
        _, moved, move = bound.step((), density, trials, 0)
        if not is_certified(move, trials.log_joint, moved.log_joint):
            raise Unsupported(
                f"Enumerating {', '.join(sites)} does not give the conditional of the program (log ratio "
                f"{float(move.log_ratio.abs().max()):.1e}): elements of a plate are coupled. Update them one at a time, by "  # type: ignore[union-attr]
                "Enumerate(by_element=True)."
            )
        return bound

    def scanning(self) -> Self:
        """One element after the other, nothing taken for independent."""
        assert self.elements is not None
        return replace(self, elements=one_by_one(self.elements.of, len(self.elements.owners[0])))

    def init(self, density: Density, current: Current) -> tuple[()]:
        return ()

    def drawn(
        self, state: tuple[()], density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[tuple[()], dict[str, Tensor], Tensor] | None:
        if self.by_element:
            return None
        chains = len(values[self.sites[0]])
        found = density.redraw(self.sites, is_blind=True)(values, density.uniforms(self.sites, chains))
        return (), found, torch.ones(chains, dtype=density.program.dtype, device=density.program.device)

    def step(self, state: tuple[()], density: Density, current: Current, warmup: int) -> tuple[tuple[()], Current, Move]:
        if self.by_element:
            return (), *self._one_by_one(density, current)
        uniforms = density.uniforms(self.sites, len(current.log_joint))
        drawn, log_q, log_q_present = density.redraw(self.sites)(current.values, uniforms)
        moved, move = metropolised(current, drawn, log_q, log_q_present, density)
        return (), moved, move

    def _one_by_one(self, density: Density, current: Current) -> tuple[Current, Move]:
        assert self.elements is not None
        (site,), elements = self.sites, self.elements
        choices = density.program.latents[site].choices
        assert choices is not None
        coordinates = Coordinates(density.program, self.sites)
        staged = coordinates.terms(density)
        others = {name: value for name, value in current.values.items() if name != site}
        vector = coordinates.vector(current.values)
        events = choices.to(vector.dtype).reshape(len(choices), -1)  # (choice, coordinate of an element)
        chains, count = vector.shape[0], len(choices)
        tables = events.repeat(1, elements.number)  # every element at that choice
        wide = {name: value.repeat(count, *(1,) * (value.dim() - 1)) for name, value in others.items()}
        before = now = staged(vector, others)
        explained = torch.zeros_like(current.log_joint)
        for owner, which in elements.each():
            is_moved = torch.isin(elements.of, which)
            tried = torch.where(is_moved, tables[:, None], vector).flatten(0, 1)
            own = elements.own(staged(tried, wide), owner)[:, which].unflatten(0, (count, chains))
            cumulative = own.softmax(0).cumsum(0)
            picked = (cumulative < torch.rand_like(cumulative[:1]) * cumulative[-1:]).sum(0)  # (chain, element)
            drawn = torch.zeros(chains, elements.number, dtype=torch.long, device=vector.device).index_copy(1, which, picked)
            of = drawn[:, elements.of]
            column = torch.arange(len(elements.of), device=of.device)
            vector = torch.where(is_moved, tables[of, column], vector)
            reached = own.gather(0, picked.unsqueeze(0)).squeeze(0)  # with all others at the same choice
            explained = explained + (reached - elements.own(now, owner)[:, which]).sum(-1)
            now = staged(vector, others)
        values = {**current.values, **coordinates.values(vector)}
        unexplained = now.sum(-1) - before.sum(-1) - explained
        return Current(values, density.joint(values)), Move(torch.ones_like(unexplained), unexplained)
