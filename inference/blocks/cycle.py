"""Several blocks that move the same sites in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from inference.blocks.block import Block, Current, Move
from inference.density import Density
from inference.terms import Elements

__all__ = ["Cycle"]


@dataclass(frozen=True)
class Cycle(Block):
    """Blocks that move the same sites, one after the other in every sweep.

    Each leaves the conditional of the sites as it is, so that all of them together do; where one cannot go, another may.
    ``Cycle((Hamiltonian(), PriorDraw()))`` explores a mode along gradients and goes from mode to mode by proposals that do
    not look at where the chain is. What that takes is that such a proposal is accepted now and then.

    Args:
        blocks: At least one, in their order.
        sites: Names of the sites; filled in by ``bind``.

    References:
        L. Tierney, Markov chains for exploring posterior distributions (1994), section 2.4: cycles of kernels.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from inference import Cycle, Gibbs, Hamiltonian, PriorDraw
        >>> def square(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x**2, 0.1), obs=y)
        >>> sampler = Gibbs(blocks={"x": Cycle((Hamiltonian(), PriorDraw()))}, draws=50, seed=0, progress=False)
        >>> sampler.fit(square, torch.tensor(1.0)).plan["x"].update
        'HMC, Prior'
    """

    sites: tuple[str, ...] = field(default=(), kw_only=True)
    blocks: tuple[Block, ...] = ()

    def __post_init__(self) -> None:
        is_tuple = isinstance(self.blocks, tuple)
        odd = [block for block in self.blocks if not isinstance(block, Block)] if is_tuple else [self.blocks]
        if odd:
            raise TypeError(f"Cycle takes a tuple of blocks, such as (Hamiltonian(), PriorDraw()), but got {odd[0]!r}.")
        if not self.blocks:
            raise ValueError("Cycle() has no blocks: give at least one, such as Cycle((Hamiltonian(), PriorDraw())).")

    @property
    def update(self) -> str:
        return ", ".join(block.update for block in self.blocks)

    @property
    def has_certificate(self) -> bool:
        return any(block.has_certificate for block in self.blocks)

    @property
    def is_straight(self) -> bool:
        return all(block.is_straight for block in self.blocks)

    @property
    def claim(self) -> str:
        return next((block.claim for block in self.blocks if block.has_certificate), "exact")

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        blocks = tuple(block.bind(sites, density, trials) for block in self.blocks)
        return replace(self, sites=tuple(sites), blocks=blocks)

    @property
    def elements(self) -> Elements | None:
        return next((block.elements for block in self.blocks if block.elements is not None), None)

    @property
    def is_scan(self) -> bool:
        return all(block.is_scan for block in self.blocks)

    def scanning(self) -> Self:
        return replace(self, blocks=tuple(block.scanning() for block in self.blocks))

    def saved(self) -> Block:
        return replace(self, blocks=tuple(block.saved() for block in self.blocks))

    def restored(self, asked: Block) -> Block:
        if not isinstance(asked, Cycle):
            return self
        pairs = zip(self.blocks, asked.blocks, strict=True)
        return replace(self, blocks=tuple(block.restored(other) for block, other in pairs))

    def init(self, density: Density, current: Current) -> tuple[Any, ...]:
        return tuple(block.init(density, current) for block in self.blocks)

    def step(
        self, state: tuple[Any, ...], density: Density, current: Current, warmup: int
    ) -> tuple[tuple[Any, ...], Current, Move]:
        states, rates, ratios = [], [], []
        for block, memory in zip(self.blocks, state, strict=True):
            memory, current, move = block.step(memory, density, current, warmup)
            states.append(memory)
            rates.append(move.acceptance)
            if move.log_ratio is not None:
                ratios.append(move.log_ratio.abs())
        worst = torch.stack(ratios).amax(0) if ratios else None
        return tuple(states), current, Move(torch.stack(rates).mean(0), worst)
