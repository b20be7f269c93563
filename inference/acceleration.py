"""Squared extrapolation of a fixed-point iteration that raises an objective: from three points in a row to where they lead.

With θ₁ = F(θ₀) and θ₂ = F(θ₁), r = θ₁ − θ₀ and v = (θ₂ − θ₁) − r,

    θ′ = θ₀ + 2 a r + a² v,    a = |r| / |v|.

Near the fixed point r shrinks by a factor λ from step to step along the slowest direction, and a is 1 / (1 − λ): the error
in that direction is squared away. a = 1 gives θ₂. A proposal is only that: it is taken where it does not lower the
objective, which the next E-step tells.

The coefficients sum to 1, so that probabilities go on summing to 1 and covariances stay symmetric on the scale on which
the program samples them. An element that would leave its support there is extrapolated in unconstrained coordinates, and
one that has none, at the edge of its support, is θ₂.

References:
    R. Varadhan and C. Roland, Simple and globally convergent methods for accelerating the convergence of any EM algorithm
        (2008): scheme S3, and the bound on a that grows with success.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from inference.sites import Site

__all__ = ["Path"]

_GROWTH = 4.0  # of the bound on a
_MEMORY = 0.7  # for which the longest recent a counts at the next cycle: those of a slow and of a fast direction alternate

Values = dict[str, Tensor]


class Path(NamedTuple):
    """Where an iteration is within a cycle of two steps, and what the last one proposes.

    Attributes:
        start: θ₀ of the cycle, site to (restart, *site).
        proposed: θ′, of the same shapes.
        jumps: Where θ′ is to be tried, (restart,).
        longest: Bound on a, (restart,).
        slowness: The largest recent a, an estimate of 1 / (1 − λ), (restart,).
        steps: Steps of the cycle that are taken, 0 or 1, ().
    """

    start: Values
    proposed: Values
    jumps: Tensor
    longest: Tensor
    slowness: Tensor
    steps: Tensor

    @classmethod
    def begin(cls, values: Values, like: Tensor) -> Path:
        """At values, (restart, *site), with numbers like those of a tensor (restart,)."""
        ones = torch.ones_like(like)
        return cls(values, values, torch.zeros_like(like, dtype=torch.bool), ones, ones, like.new_zeros(()))

    def trial(self, values: Values) -> Values:
        """θ′ where it is to be tried, else the values."""
        return {name: _chosen(self.jumps, self.proposed[name], value) for name, value in values.items()}

    def judged(self, is_good: Tensor) -> Path:
        """After the trial: the bound shrinks in the restarts where θ′ was not good, (restart,)."""
        shrunk = (self.longest / _GROWTH**2).clamp(min=1.0)  # it grew when θ′ was proposed
        longest = torch.where(self.jumps & ~is_good, shrunk, self.longest)
        return self._replace(longest=longest, jumps=torch.zeros_like(self.jumps))

    def moved(self, sites: Mapping[str, Site], before: Values, after: Values, units: Values) -> Path:
        """After a step: the first of a cycle is remembered, the second proposes.

        Args:
            sites: Name to site.
            before: Values before the step, (restart, *site).
            after: Values after it.
            units: What a change of a site is measured in, (restart,): sites count alike.
        """
        if not bool(self.steps):
            return self._replace(start=before, steps=self.steps + 1)
        squares = []
        for name, start in self.start.items():
            first, second = before[name] - start, after[name] - before[name]
            parts = torch.stack([first, second - first]).reshape(2, len(start), -1) / units[name].unsqueeze(-1)
            squares.append(parts.square().sum(-1))
        r, v = torch.stack(squares).sum(0).sqrt()
        wanted = (r / v).nan_to_num(nan=1.0, posinf=1.0).clamp(min=1.0)
        a = torch.minimum(wanted, self.longest)
        return Path(
            start=self.start,
            proposed={n: _proposed(sites[n], start, before[n], after[n], a) for n, start in self.start.items()},
            jumps=a > 1.0,
            longest=torch.where(wanted >= self.longest, _GROWTH * self.longest, self.longest),
            slowness=torch.maximum(wanted, _MEMORY * self.slowness),
            steps=torch.zeros_like(self.steps),
        )


def _proposed(site: Site, start: Tensor, middle: Tensor, end: Tensor, a: Tensor) -> Tensor:
    """θ′ of one site, (restart, *site)."""
    found = _extrapolated(start, middle, end, a)
    is_inside = site.support.check(found) & _finite(found, site)
    if bool(is_inside.all()):
        return found
    transform = site.transform
    free = transform(_extrapolated(transform.inv(start), transform.inv(middle), transform.inv(end), a))
    free = torch.where(_wide(_finite(free, site), site), free, end)
    return torch.where(_wide(is_inside, site), found, free)


def _finite(value: Tensor, site: Site) -> Tensor:
    """Which elements of a site are finite, (restart, *batch)."""
    return value.isfinite().flatten(-site.event_dim).all(-1) if site.event_dim else value.isfinite()


def _wide(mask: Tensor, site: Site) -> Tensor:
    return mask.reshape(*mask.shape, *(1,) * site.event_dim)


def _extrapolated(start: Tensor, middle: Tensor, end: Tensor, a: Tensor) -> Tensor:
    a = a.reshape(-1, *(1,) * (start.dim() - 1))
    r = middle - start
    return start + 2.0 * a * r + a.square() * ((end - middle) - r)


def _chosen(mask: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return torch.where(mask.reshape(-1, *(1,) * (left.dim() - 1)), left, right)
