"""Finite discrete sites, drawn jointly and exactly from their conditional."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from inference.blocks.block import Block, Current, Move, is_certified, metropolised
from inference.contract import Unsupported
from inference.density import Density

__all__ = ["Enumerate"]


@dataclass(frozen=True)
class Enumerate(Block):
    """A joint draw of finite sites by variable elimination, certified against the joint without enumeration."""

    @property
    def update(self) -> str:
        return "Enumerate"

    @property
    def is_exact(self) -> bool:
        return True

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        for site in sites:
            if density.program.latents[site].choices is None:
                raise Unsupported(f"Enumerate() needs sites with finitely many values, but '{site}' is not one.")
        bound = replace(self, sites=tuple(sites))
        _, moved, move = bound.step((), density, trials, 0)
        if not is_certified(move, trials.log_joint, moved.log_joint):
            raise Unsupported(
                f"Enumerating {', '.join(sites)} does not give the conditional of the program (log ratio "
                f"{float(move.log_ratio.abs().max()):.1e}): elements of a plate are coupled. Update them one at a time."  # type: ignore[union-attr]
            )
        return bound

    def init(self, density: Density, current: Current) -> tuple[()]:
        return ()

    def step(self, state: tuple[()], density: Density, current: Current, warmup: int) -> tuple[tuple[()], Current, Move]:
        uniforms = density.uniforms(self.sites, len(current.log_joint))
        drawn, log_q, log_q_present = density.redraw(self.sites)(current.values, uniforms)
        moved, move = metropolised(current, drawn, log_q, log_q_present, density)
        return (), moved, move
