"""What a block is: a way to move some sites of every chain, all others held fixed."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from inference.density import Density
from inference.terms import Elements

__all__ = [
    "Block",
    "Current",
    "Move",
    "averaged",
    "failed",
    "handed_out",
    "holds",
    "is_certified",
    "metropolised",
    "where_proper",
]


class Current(NamedTuple):
    """Where the chains are: all latent sites, site to (chain, *site), and log p(values, data), (chain,)."""

    values: dict[str, Tensor]
    log_joint: Tensor


class Move(NamedTuple):
    """What a block did: ``acceptance`` (chain,), and for a certificate the ``log_ratio`` that should be 0, (chain,)."""

    acceptance: Tensor
    log_ratio: Tensor | None = None


@dataclass(frozen=True)
class Block(abc.ABC):
    """A way to update sites; ``bind`` ties it to them.

    Args:
        sites: Names of the sites; filled in by ``bind``.
    """

    sites: tuple[str, ...] = ()

    @property
    @abc.abstractmethod
    def update(self) -> str:
        """What a plan prints."""

    @property
    def is_exact(self) -> bool:
        """Whether it draws its sites anew from their conditional, so that where they start does not matter."""
        return False

    @property
    def has_certificate(self) -> bool:
        """Whether its moves carry a ``log_ratio``, whose distance from 0 is the certificate."""
        return self.is_exact

    @property
    def is_straight(self) -> bool:
        """Whether it does the same operations at every sweep, but for what is ``unlikely``: one graph is for all."""
        return False

    @property
    def claim(self) -> str:
        """What the certificate is about: "exact", or "independent" if elements are decided on one by one."""
        return "exact"

    @property
    def note(self) -> str:
        """What a plan says beside the update."""
        return ""

    @property
    def elements(self) -> Elements | None:
        """Which elements of its sites it accepts on their own; None if all move together."""
        return None

    @property
    def is_scan(self) -> bool:
        """Whether one element moves after the other, so that nothing is taken for independent."""
        return True

    def scanning(self) -> Self:
        """The same block, one element after the other."""
        return self

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        """The block for these sites.

        Args:
            sites: Their names.
            density: The densities of the program.
            trials: A few settings of all sites, to try the update on.

        Raises:
            Unsupported: If the block does not fit the sites.
        """
        return replace(self, sites=tuple(sites))

    def saved(self) -> Block:
        """The block without code, as a checkpoint holds it."""
        return self

    def restored(self, asked: Block) -> Block:
        """The block of which this is what a checkpoint holds; ``asked`` is what was asked for its sites, before ``bind``."""
        return self

    def drawn(
        self, state: Any, density: Density, values: dict[str, Tensor], warmup: int
    ) -> tuple[Any, dict[str, Tensor], Tensor] | None:
        """Moves every chain without the log-joint: a move that carries a certificate is made as if it held.

        Args:
            state: The block's state.
            density: The densities of the program.
            values: Where the chains are.
            warmup: As for ``step``.

        Returns:
            The block's state, its sites' values and acceptance (chain,); None if the block always takes the log-joint.
        """
        return None

    @abc.abstractmethod
    def init(self, density: Density, current: Current) -> Any:
        """The block's own state: tensors only."""

    @abc.abstractmethod
    def step(self, state: Any, density: Density, current: Current, warmup: int) -> tuple[Any, Current, Move]:
        """Moves every chain.

        Args:
            state: The block's state.
            density: The densities of the program.
            current: Where the chains are.
            warmup: Length of the warm-up while it lasts, then 0: nothing adapts any more.
        """


def metropolised(
    current: Current, proposed: dict[str, Tensor], log_q: Tensor, log_q_present: Tensor, density: Density
) -> tuple[Current, Move]:
    """Accepts or rejects a proposal q that does not look at the present values of its sites.

        log ratio = log p(proposed) − log p(present) − log q(proposed) + log q(present)

    For an exact conditional it is 0 up to rounding, whatever the values: that is the certificate.
    """
    values = {**current.values, **proposed}
    log_joint = density.joint(values)
    log_ratio = (log_joint - current.log_joint) - (log_q - log_q_present)
    log_ratio = log_ratio.nan_to_num(nan=-torch.inf)
    accepted = torch.rand_like(log_ratio).log() < log_ratio
    kept = {
        name: torch.where(accepted.reshape(-1, *(1,) * (value.dim() - 1)), value, current.values[name])
        for name, value in proposed.items()
    }
    moved = Current({**current.values, **kept}, torch.where(accepted, log_joint, current.log_joint))
    return moved, Move(log_ratio.clamp(max=0.0).exp(), log_ratio)


def where_proper(
    is_proper: Tensor, proposed: dict[str, Tensor], values: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Proposed values of those chains whose conditional is a distribution, (chain,), and their acceptance."""
    kept = {
        name: torch.where(is_proper.reshape(-1, *(1,) * (value.dim() - 1)), value, values[name])
        for name, value in proposed.items()
    }
    return kept, is_proper.to(next(iter(proposed.values())).dtype)


def failed(log_ratio: Tensor, log_joint: Tensor) -> Tensor:
    """Whether a log ratio (chain,) is off by more than the rounding of log-joints (chain,), (); with room for tails."""
    precision = 1e-8 if log_joint.dtype == torch.float64 else 1e-3
    return ~(log_ratio.abs() <= precision * (100.0 + log_joint.abs())).all()


def is_certified(move: Move, *log_joints: Tensor) -> bool:
    """Whether a log ratio is 0 up to the rounding of the log-joints that it was computed from."""
    assert move.log_ratio is not None
    size = sum(log_joint.abs() for log_joint in log_joints)
    precision = 1e-10 if move.log_ratio.dtype == torch.float64 else 1e-4
    return bool((move.log_ratio.abs() <= precision * (100.0 + size)).all())


def holds(block: Block, density: Density, trials: Current) -> bool:
    """Whether the certificate of a block's moves holds at some settings of all sites, and again from where it learnt."""
    state = block.init(density, trials)
    for _ in range(2):
        state, moved, move = block.step(state, density, trials, 0)
        if not is_certified(move, trials.log_joint, moved.log_joint):
            return False
    return True


def averaged(values: Tensor, groups: int) -> Tensor:
    """Mean over chains, (chain, element) -> (element,), or over the chains of each group, -> (group, element)."""
    return values.mean(0) if groups == 1 else values.unflatten(0, (groups, -1)).mean(1)


def handed_out(learnt: Tensor, chains: int) -> Tensor:
    """What ``averaged`` gave, so that it multiplies (chain, element)."""
    return learnt if learnt.dim() == 1 else learnt.repeat_interleave(chains // len(learnt), 0)
