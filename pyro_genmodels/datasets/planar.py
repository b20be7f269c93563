"""Shapes in the plane of which the density is known exactly, to see what a model misses."""

from __future__ import annotations

import math

import torch
from pyro import distributions as dist
from torch import Tensor

__all__ = ["PLANAR", "planar"]

PLANAR = ("checkerboard", "moons", "ring", "spirals")
_POINTS = 256  # of a curve, nearer to one another than the deviation
_CELLS = [(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]


def planar(name: str, deviation: float = 0.1) -> dist.TorchDistribution:
    """A distribution over the plane with ``sample`` and an exact ``log_prob``.

        moons, ring, spirals    an equal mixture of round Gaussians along curves
        checkerboard            uniform on eight of the sixteen unit squares of [−2, 2]²

    Args:
        name: One of ``PLANAR``.
        deviation: Of the Gaussians, positive; a checkerboard has none.

    Raises:
        ValueError: Another name, a deviation that is not positive.

    Example:
        >>> planar("checkerboard").log_prob(torch.tensor([[-1.5, -1.5], [-0.5, -1.5]]))
        tensor([-2.0794,    -inf])
    """
    if name not in PLANAR:
        raise ValueError(f"There is no shape {name!r}; there are {', '.join(PLANAR)}.")
    if not deviation > 0:
        raise ValueError(f"deviation is {deviation}, but must be positive.")
    if name == "checkerboard":
        corners = torch.tensor(_CELLS, dtype=torch.get_default_dtype()) - 2.0
        cells = dist.Uniform(corners, corners + 1.0, validate_args=False).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(corners))), cells, validate_args=False)
    points = _curve(name)
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(points))), dist.Normal(points, deviation).to_event(1))


def _curve(name: str) -> Tensor:
    """(points, 2), as far from one another everywhere."""
    share = (torch.arange(_POINTS, dtype=torch.get_default_dtype()) + 0.5) / _POINTS
    if name == "ring":
        return 2.0 * _on_circle(2.0 * math.pi * share)
    if name == "moons":
        arc = _on_circle(math.pi * share)
        return 1.5 * (torch.cat([arc, torch.tensor([1.0, 0.5]) - arc]) - torch.tensor([0.5, 0.25]))
    angle = 3.0 * math.pi * share.sqrt()
    arm = (0.25 * angle)[:, None] * _on_circle(angle)
    return torch.cat([arm, -arm])


def _on_circle(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), angle.sin()], -1)
