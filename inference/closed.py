"""The M-step where Q has its maximum in closed form, in one site after the other.

The family of a site is known from the gradient of Q (``inference.messages``), and so is where Q has its maximum given the
others. All of an M-step is one graph where nothing unlikely happens: Q does not fall, every maximum is inside its support.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.distributions import constraints

from inference.conditionals import Conditional, Points
from inference.distributed import ALONE
from inference.expectation import Batch, Completed, Evidence, Weights
from inference.messages import Family
from inference.recording import unlikely
from inference.sites import Site

__all__ = ["maximise", "rounding", "suggested", "taken", "where"]

Values = dict[str, Tensor]
Reached = tuple[Values, dict[str, Points], Tensor]  # θ, where to differentiate next, Q


def maximise(
    task: Completed,
    families: Mapping[str, Family],
    theta: Values,
    points: dict[str, Points],
    particles: Values,
    weights: Weights,
    batch: Batch,
    is_alone: bool,
) -> Reached:
    """θ, (restart, *site), with each site of ``families`` at the maximum of Q in it, where Q does not fall.

    Args:
        task: The completed density.
        families: Site to family.
        theta: Values of all sites that are maximised.
        points: Site to where to differentiate.
        particles: As ``Completed.expect`` takes them.
        weights: Those that it gave.
        batch: The rows.
        is_alone: Whether nothing else has moved since, so that ``weights`` are those at ``theta``.

    Returns:
        θ, where to differentiate next, and Q, (restart,).
    """
    if not is_alone or batch.processes is not ALONE or task.program.is_long or task.program.weights:
        return _maximised(task, families, theta, points, particles, weights, batch)
    key = "maximum", tuple((name, family.name) for name, family in families.items()), task.key(batch)
    staged = task.density.random(key, partial(_from_parts, task, families, batch.scale))
    found: Reached = staged(theta, points, particles, weights.parts, batch.data)
    return found


def _from_parts(
    task: Completed,
    families: Mapping[str, Family],
    scale: float,
    theta: Values,
    points: dict[str, Points],
    particles: Values,
    parts: Evidence,
    data: list[Tensor],
) -> Reached:
    batch = Batch(data, scale)
    return _maximised(task, families, theta, points, particles, task.weights(parts, theta, particles, batch), batch)


def _maximised(
    task: Completed,
    families: Mapping[str, Family],
    theta: Values,
    points: dict[str, Points],
    particles: Values,
    weights: Weights,
    batch: Batch,
) -> Reached:
    reached = task.expected(theta, particles, weights, batch)
    tried, found = theta, points
    for name, family in families.items():
        point, mode = _solved(task, family, name, tried, found, particles, weights, batch)
        is_there = mode.isfinite().reshape(len(mode), -1).all(-1)
        tried, found = {**tried, name: where(is_there, mode, tried[name])}, {**found, name: point}
    after = task.expected(tried, particles, weights, batch)
    if not unlikely(~_is_no_lower(after, reached).all()):
        return tried, found, after
    for name, family in families.items():
        point, mode = _solved(task, family, name, theta, points, particles, weights, batch)
        theta, reached = taken(task, theta, {name: mode}, particles, weights, reached, batch)
        points = {**points, name: point}
    return theta, points, reached


def _solved(
    task: Completed,
    family: Family,
    name: str,
    values: Values,
    points: Mapping[str, Points],
    particles: Values,
    weights: Weights,
    batch: Batch,
) -> tuple[Points, Tensor]:
    """Where to differentiate next in one site, and the maximum of Q in it."""
    at = family.at(points[name])
    conditional = family.solve(at, task.gradients(name, at, values, particles, weights, batch))
    mode = conditional.mode()
    if task.program.has_rows and unlikely(
        ~_is_inside(task.program.latents[name], mode)
    ):  # rounding may be all that the statistics of rows have left
        exact = task.gradients(name, at, values, particles, weights, batch, is_exact=True)
        conditional = family.solve(at, exact)
        mode = conditional.mode()
    usable = conditional.is_proper & mode.reshape(len(mode), -1).isfinite().all(-1)
    return _merged(usable, suggested(family, conditional), points[name]), mode


def _is_inside(site: Site, value: Tensor) -> Tensor:
    """Whether all values lie in the support of a site; ()."""
    if site.support is constraints.positive_definite:  # whose check looks at a number first, which no graph does
        is_symmetric = torch.isclose(value, value.mT, atol=1e-6).all()
        return is_symmetric & (torch.linalg.cholesky_ex(value).info == 0).all()
    return value.isfinite().all() & site.support.check(value).all()


def taken(
    task: Completed,
    values: Values,
    proposed: Values,
    particles: Values,
    weights: Weights,
    reached: Tensor,
    batch: Batch,
) -> tuple[Values, Tensor]:
    """Values with those proposed in the restarts where Q does not fall by more than rounding, and Q there."""
    if not proposed:
        return values, reached
    expected = task.expected({**values, **proposed}, particles, weights, batch)
    good = _is_no_lower(expected, reached)
    kept = {name: where(good, value, values[name]) for name, value in proposed.items()}
    return {**values, **kept}, torch.where(good, expected, reached)


def _is_no_lower(objective: Tensor, reached: Tensor) -> Tensor:
    return objective >= reached - rounding(objective) * (1.0 + reached.abs())


def rounding(objective: Tensor) -> float:
    """By how much an objective may fall, relatively, for no other reason."""
    return 1e-13 if objective.dtype == torch.float64 else 1e-5


def where(good: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Values (restart, *site), new in the good restarts."""
    return torch.where(good.reshape(-1, *(1,) * (new.dim() - 1)), new, old)


def suggested(family: Family, conditional: Conditional) -> Points:
    """Where to differentiate next; in float32 no closer together than values are large, or rounding is all there is."""
    points = conditional.points()
    return points if points.location.dtype == torch.float64 else family.initial(points.location)


def _merged(good: Tensor, new: Points, old: Points) -> Points:
    shape = (-1, *(1,) * (old.location.dim() - 1))
    return Points(*(torch.where(good.reshape(shape) & a.isfinite(), a, b) for a, b in zip(new, old, strict=True)))
