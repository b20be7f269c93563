"""The M-step where Q has its maximum in closed form, in one site after the other.

The family of a site is known from the gradient of Q (``inference.messages``), and so is where Q has its maximum given the
others. All of an M-step is one graph where nothing unlikely happens: Q does not fall, every maximum is inside its support.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

__all__ = ["Ascent", "is_no_lower", "suggested", "where"]

Values = dict[str, Tensor]
Reached = tuple[Values, dict[str, Points], Tensor]  # θ, where to differentiate next, Q


@dataclass(frozen=True)
class Ascent:
    """Q after an E-step, to be raised in θ, (restart, *site).

    Args:
        task: The completed density.
        particles: As ``Completed.expect`` takes them.
        weights: Those that it gave.
        batch: The rows.
    """

    task: Completed
    particles: Values
    weights: Weights
    batch: Batch

    def taken(self, theta: Values, proposed: Values, reached: Tensor) -> tuple[Values, Tensor]:
        """θ with what is proposed where Q does not fall from what it has reached, (restart,); and Q there."""
        if not proposed:
            return theta, reached
        expected = self._q({**theta, **proposed})
        good = is_no_lower(expected, reached)
        kept = {name: where(good, value, theta[name]) for name, value in proposed.items()}
        return {**theta, **kept}, torch.where(good, expected, reached)

    def maximised(self, families: Mapping[str, Family], theta: Values, points: dict[str, Points], is_alone: bool) -> Reached:
        """θ with each site of ``families`` at the maximum of Q in it, where Q does not fall.

        Args:
            families: Site to family.
            theta: Values of all sites that are maximised.
            points: Site to where to differentiate.
            is_alone: Whether nothing has moved since the E-step, so that the weights are those at ``theta``.
        """
        task = self.task
        if not is_alone or self.batch.processes is not ALONE or task.program.is_long or task.program.weights:
            return self._each(families, theta, points)
        key = "maximum", tuple((name, family.name) for name, family in families.items()), task.key(self.batch)
        staged = task.density.random(key, partial(_maximised, task, families, self.batch.scale))
        found: Reached = staged(theta, points, self.particles, self.weights.parts, self.batch.data)
        return found

    def _each(self, families: Mapping[str, Family], theta: Values, points: dict[str, Points]) -> Reached:
        """One site after the other: all of them, or if Q falls then, those in which it does not."""
        reached, tried, found = self._q(theta), theta, points
        for name, family in families.items():
            point, mode = self._solved(name, family, tried, found)
            is_there = mode.isfinite().reshape(len(mode), -1).all(-1)
            tried, found = {**tried, name: where(is_there, mode, tried[name])}, {**found, name: point}
        after = self._q(tried)
        if not unlikely(~is_no_lower(after, reached).all()):
            return tried, found, after
        for name, family in families.items():
            point, mode = self._solved(name, family, theta, points)
            theta, reached = self.taken(theta, {name: mode}, reached)
            points = {**points, name: point}
        return theta, points, reached

    def _solved(self, name: str, family: Family, theta: Values, points: Mapping[str, Points]) -> tuple[Points, Tensor]:
        """Where to differentiate next in one site, and the maximum of Q in it."""
        task, rest = self.task, (theta, self.particles, self.weights, self.batch)
        at = family.at(points[name])
        conditional = family.solve(at, task.gradients(name, at, *rest))
        mode = conditional.mode()
        # rounding may be all that the statistics of rows have left
        if task.program.has_rows and unlikely(~_is_inside(task.program.latents[name], mode)):
            conditional = family.solve(at, task.gradients(name, at, *rest, is_exact=True))
            mode = conditional.mode()
        usable = conditional.is_proper & mode.reshape(len(mode), -1).isfinite().all(-1)
        return _merged(usable, suggested(family, conditional), points[name]), mode

    def _q(self, theta: Values) -> Tensor:
        return self.task.expected(theta, self.particles, self.weights, self.batch)


def _maximised(
    task: Completed,
    families: Mapping[str, Family],
    scale: float,
    theta: Values,
    points: dict[str, Points],
    particles: Values,
    parts: Evidence,
    data: list[Tensor],
) -> Reached:
    """What a graph is recorded of: everything that changes from step to step is an argument."""
    batch = Batch(data, scale)
    return Ascent(task, particles, task.weights(parts, theta, particles, batch), batch)._each(families, theta, points)


def _is_inside(site: Site, value: Tensor) -> Tensor:
    """Whether all values lie in the support of a site; ()."""
    if site.support is constraints.positive_definite:  # whose check looks at a number first, which no graph does
        is_symmetric = torch.isclose(value, value.mT, atol=1e-6).all()
        return is_symmetric & (torch.linalg.cholesky_ex(value).info == 0).all()
    return value.isfinite().all() & site.support.check(value).all()


def is_no_lower(objective: Tensor, reached: Tensor) -> Tensor:
    """Where an objective has not fallen from what it had reached by more than rounding."""
    rounding = 1e-13 if objective.dtype == torch.float64 else 1e-5
    return objective >= reached - rounding * (1.0 + reached.abs())


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
