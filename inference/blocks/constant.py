"""Sites that have only one possible value, such as the weights of a mixture of one component."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move
from inference.density import Density

__all__ = ["Constant"]


@dataclass(frozen=True)
class Constant(Block):
    """Leaves its sites where they are."""

    @property
    def update(self) -> str:
        return "Constant"

    @property
    def is_exact(self) -> bool:
        return True

    def init(self, density: Density, current: Current) -> tuple[()]:
        return ()

    def drawn(
        self, state: tuple[()], density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[tuple[()], dict[str, Tensor], Tensor]:
        chains = len(next(iter(values.values())))
        return (), {}, torch.ones(chains, dtype=density.program.dtype, device=density.program.device)

    def step(self, state: tuple[()], density: Density, current: Current, warmup: int) -> tuple[tuple[()], Current, Move]:
        still = torch.zeros_like(current.log_joint)
        return (), current, Move(still + 1.0, still)
