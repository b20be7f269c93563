"""Sites moved by an adaptive random walk: what has no gradient, and counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move
from inference.density import Density, Unconstrained
from inference.mcmc import pooled, served

__all__ = ["AdaptiveWalk"]


class WalkState(NamedTuple):
    """step (), and log_scale () shared by the chains, or (group,)."""

    step: Tensor
    log_scale: Tensor


@dataclass(frozen=True)
class AdaptiveWalk(Block):
    """A symmetric random walk: in unconstrained coordinates for continuous sites, in rounded steps for counts.

    The scale follows the acceptance rate (0.44 for one element, 0.234 else) by Robbins-Monro, until the end of warm-up.
    """

    @property
    def update(self) -> str:
        return "RandomWalk"

    def init(self, density: Density, current: Current) -> WalkState:
        like, groups = current.log_joint, density.program.groups
        return WalkState(like.new_zeros(()), like.new_zeros(() if groups == 1 else groups))

    def step(self, state: WalkState, density: Density, current: Current, warmup: int) -> tuple[WalkState, Current, Move]:
        latents = density.program.latents
        groups = density.program.groups
        scale = served(state.log_scale.exp(), len(current.log_joint))
        coordinates = Unconstrained(density.program, [name for name in self.sites if latents[name].is_continuous])
        values, log_jacobian, size = dict(current.values), torch.zeros_like(current.log_joint), 0
        if coordinates.sites:
            before = coordinates.position(values)
            after = before + scale * torch.randn_like(before)
            jacobian = torch.func.vmap(coordinates.log_jacobian)
            log_jacobian = jacobian(after) - jacobian(before)
            values |= coordinates.values(after)
            size = coordinates.size
        for name in self.sites:
            if name not in coordinates.sites:
                value = values[name]
                noise = torch.randn(value.shape, dtype=scale.dtype, device=value.device)
                step = scale.reshape(-1, *(1,) * (value.dim() - 1)) * noise
                values[name] = value + (step.sign() * step.abs().ceil()).to(value.dtype)  # at least one away
                size += value[0].numel()
        inside = torch.stack([self._inside(density, name, values[name]) for name in self.sites]).all(0)
        safe = {name: _where(inside, value, current.values[name]) for name, value in values.items()}
        log_joint = density.joint(safe)
        log_ratio = (log_joint - current.log_joint + log_jacobian).nan_to_num(nan=-math.inf)
        log_ratio = torch.where(inside, log_ratio, -math.inf)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        kept = {name: _where(accepted, value, current.values[name]) for name, value in safe.items()}
        rate = log_ratio.clamp(max=0.0).exp()
        if warmup:
            target = 0.44 if size == 1 else 0.234
            log_scale = state.log_scale + (pooled(rate, groups) - target) / (state.step + 1) ** 0.6
            state = WalkState(state.step + 1, log_scale)
        return state, Current(kept, torch.where(accepted, log_joint, current.log_joint)), Move(rate)

    @staticmethod
    def _inside(density: Density, name: str, value: Tensor) -> Tensor:
        checked = density.program.latents[name].support.check(value)
        return checked.reshape(len(value), -1).all(-1)


def _where(chosen: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *(1,) * (left.dim() - 1)), left, right)
