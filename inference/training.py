"""What back-ends that train weights in place share: passes over rows, steps, averages of weights, and when to give up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from inference.networks import autocast

if TYPE_CHECKING:
    from inference.objective import Loss
    from inference.program import Program

__all__ = [
    "NOT_FINITE", "PowerAverage", "adam", "are_finite", "at_once", "check_settings", "descend", "falling", "follow",
    "in_networks", "put", "rows_of_step",
]  # fmt: skip

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


def adam(weights: list[Tensor], learning_rate: float) -> torch.optim.Optimizer:
    """Adam as one operation for all weights; weights that it does not take, such as complex ones, are done in turn."""
    try:
        return torch.optim.Adam(weights, lr=learning_rate, fused=True)
    except RuntimeError:
        return torch.optim.Adam(weights, lr=learning_rate, fused=False)


def falling(optimiser: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Keeps the learning rate for the first half of the steps, then lets it fall along a cosine to a hundredth."""

    def rate(step: int) -> float:
        progress = max(0.0, 2.0 * step / steps - 1.0)
        return 0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))

    return torch.optim.lr_scheduler.LambdaLR(optimiser, rate)


def are_finite(weights: Sequence[Tensor]) -> Tensor:
    """Whether all gradients of these are, ()."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if any(gradient.device.type != "cpu" for gradient in gradients):
        return nn.utils.get_total_norm(gradients).isfinite()  # which does not wait for a GPU
    return torch.tensor(all(math.isfinite(gradient.sum().item()) for gradient in gradients))


def descend(optimiser: torch.optim.Optimizer, weights: Sequence[Tensor], loss: Tensor, clip_norm: float | None) -> Tensor:
    """One step of an optimiser, none where the loss or a gradient is not finite.

    Returns:
        Whether it was taken, ().
    """
    if clip_norm is not None:
        is_finite = loss.isfinite() & nn.utils.clip_grad_norm_(weights, clip_norm).isfinite()
    else:
        is_finite = loss.isfinite() & are_finite(weights)
    if optimiser.defaults.get("fused") and loss.device.type != "cpu":
        optimiser.found_inf = (~is_finite).float()  # type: ignore[attr-defined]  # as GradScaler does: no wait for a GPU
        optimiser.step()
    elif is_finite:
        optimiser.step()
    return is_finite


@dataclass(frozen=True)
class PowerAverage:
    """A moving average of weights whose width grows with the run: the weights of step t count as t^γ.

        θ̄_t = β_t θ̄_{t−1} + (1 − β_t) θ_t,  β_t = (1 − 1/t)^(γ + 1)

    Args:
        deviation: Standard deviation of the steps that it averages over, as a share of the run: above 0 and below 0.288,
            where all count alike. It decides γ.

    References:
        T. Karras et al., Analyzing and improving the training dynamics of diffusion models (2024), section 3.1.

    Example:
        >>> round(PowerAverage(0.1).exponent, 2)
        6.94
    """

    deviation: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.deviation < 12.0**-0.5:
            raise ValueError(
                f"PowerAverage(deviation={self.deviation!r}): a share of the run above 0 and below 0.288, such as 0.1."
            )

    @property
    def exponent(self) -> float:
        """γ, of which (γ + 1) / ((γ + 2)² (γ + 3)) = deviation²."""
        inverse = self.deviation**-2
        return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())

    def decay(self, count: int) -> float:
        """β at step ``count``, from 1."""
        return (1.0 - 1.0 / count) ** (self.exponent + 1.0)


def _check_average(average: float | PowerAverage | None) -> None:
    """Refuses what is no way to average.

    Raises:
        ValueError: If it is none.
    """
    if isinstance(average, PowerAverage) or average is None:
        return
    if not isinstance(average, (int, float)) or not 0.0 < average < 1.0:
        raise ValueError(
            f"average is {average!r}, but a decay lies between 0 and 1, such as 0.999; or take PowerAverage(0.1)."
        )


def check_settings(backend: Any, program: Program, *positive: str) -> None:
    """Refuses settings that no training can have.

    Args:
        backend: A back-end with the settings ``average``, ``autocast`` and ``batch_size``.
        program: What it trains.
        *positive: Names of settings that are positive, or None.

    Raises:
        ValueError: If one is out of its range, or a batch larger than the data.
    """
    for name in positive:
        value = getattr(backend, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value!r}, but must be positive.")
    _check_average(backend.average)
    if backend.autocast not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"autocast is {backend.autocast!r}, but must be torch.bfloat16 or torch.float16.")
    if backend.batch_size is not None and backend.batch_size > (program.rows or 0):
        raise ValueError(f"batch_size is {backend.batch_size}, but {program.name} has {program.rows} rows.")


@torch.no_grad()
def follow(averages: Sequence[Tensor], weights: Sequence[Tensor], average: float | PowerAverage, count: int) -> None:
    """Moves moving averages, in place; with a decay, at first they are means of all ``count`` that there were."""
    now = average.decay(count) if isinstance(average, PowerAverage) else min(average, (count - 1) / count)
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
