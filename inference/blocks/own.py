"""A move that the model brings with it, for structure that cannot be seen in its log-joint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move, holds, metropolised
from inference.contract import Unsupported
from inference.density import Density

__all__ = ["Own"]


@dataclass(frozen=True)
class Own(Block):
    """The model's own move of some sites, a Metropolis proposal like any other: see ``inference.contract.Blocked``.

    Args:
        sites: Names of the sites; filled in by ``bind``.
    """

    @property
    def update(self) -> str:
        return "Own"

    @property
    def is_exact(self) -> bool:
        return True

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        bound, program = super().bind(sites, density, trials), density.program
        if bound.sites not in program.proposals:
            raise Unsupported(f"{program.name} brings no move of its own for {', '.join(sites)}.")
        if program.chain_data(1):
            raise Unsupported(f"The moves of {program.name} are for its own data, but here each chain has data of its own.")
        if not holds(bound, density, trials):
            raise Unsupported(
                f"The move that {program.name} brings for {', '.join(sites)} is not from their conditional, or its "
                "log_q_ratio is wrong: its certificate fails."
            )
        return bound

    def init(self, density: Density, current: Current) -> tuple[()]:
        return ()

    def drawn(
        self, state: tuple[()], density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[tuple[()], dict[str, Tensor], Tensor]:
        proposed, _ = density.program.proposals[self.sites](values)
        return (), proposed, torch.ones_like(next(iter(proposed.values())).flatten(1)[:, 0])

    def step(self, state: tuple[()], density: Density, current: Current, warmup: int) -> tuple[tuple[()], Current, Move]:
        proposed, log_q_ratio = density.program.proposals[self.sites](current.values)
        log_q: Any = log_q_ratio() if callable(log_q_ratio) else log_q_ratio
        moved, move = metropolised(current, proposed, log_q, torch.zeros_like(log_q), density)
        return (), moved, move
