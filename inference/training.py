"""What back-ends that train weights in place share: passes over rows, averages of weights, and when to give up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from inference.networks import autocast

if TYPE_CHECKING:
    from inference.objective import Loss
    from inference.program import Program

__all__ = ["NOT_FINITE", "at_once", "follow", "in_networks", "put", "rows_of_step"]

NOT_FINITE = 25  # steps in a row of numbers that are not finite after which training is given up
_LARGEST_BLOCK = 2**22  # numbers of data and latents, at all values of finite sites, of the draws that are made at once


def at_once(program: Program) -> int:
    """How many draws of a guide are made at once."""
    sizes = [*(site.shape.numel() for site in program.latents.values()), *(leaf.numel() for leaf in program.data)]
    choices = max((len(site.choices) for site in program.latents.values() if site.choices is not None), default=1)
    return max(1, _LARGEST_BLOCK // (1 + sum(sizes) * choices))


def rows_of_step(program: Program, order: Tensor, taken: int, size: int) -> tuple[Tensor, Tensor]:
    """The order of the rows in this pass, and the rows of the next step; what is left at the end of a pass is put back.

    Args:
        program: The program.
        order: The order so far, (rows,); any at the first step.
        taken: Steps before this one.
        size: Rows per step, at most all.
    """
    assert program.rows is not None
    first = taken % (program.rows // size) * size
    order = order if first else torch.randperm(program.rows, device=program.device)
    program.processes.equalise([] if first else [order])
    return order, order[first : first + size]


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float, count: int) -> None:
    """Moves exponential moving averages, in place; at first they are means of all ``count`` that there were."""
    now = min(decay, (count - 1) / count)
    get_ema_multi_avg_fn(now)([*averages], [weight.detach() for weight in weights], count)


@torch.no_grad()
def put(weights: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
    """Sets weights, in place; returns what they were."""
    before = [weight.detach().clone() for weight in weights]
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
    return before


def in_networks(loss: Loss, networks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype | None) -> Loss:
    """The loss, with the arithmetic of networks in another floating type; None leaves it."""
    if dtype is None:
        return loss
    own, smaller = list({id(network): network for network in networks}.values()), dtype

    def cast(data: list[Tensor] | None, is_recorded: bool) -> Any:
        with autocast(own, device, smaller):
            return loss(data, is_recorded)

    return cast
