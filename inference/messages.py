"""Conjugacy by differentiation: the natural parameters of a conditional, read off the gradient of the log-joint.

A latent z with statistics t(z) has a conditional in their exponential family exactly if

    log p(z | rest) = ⟨η, t(z)⟩ + log h(z) + c,

so that the gradient of the *joint* at a few points is a linear system for η. Prior parameters, wrappers, gathers and
deterministic arithmetic need not be looked at: they are in the gradient. All chains and all elements of a plate are solved
at once. The families of one kind of support share their points, so the program need not say which one it is:

    real                Normal, element by element or jointly over some axes   g = h − P z
    positive            z^p ~ Gamma for p in {1, −1, −2, 2}                     z g = A − B p z^p
                        (Gamma, InverseGamma, standard deviation, square root) or LogNormal
                        InverseGaussian, z or 1 / z                         z g = p − 1 − a z / 2 + b / 2 z, p = ∓ ½
    above a number      Pareto                                                  z g = A
    unit interval       Beta                                                    z (1 − z) g = a − (a + b) z
    simplex             Dirichlet                                               z g = m − N z
    positive definite   InverseWishart, Wishart                                 g = a S⁻¹ + S⁻¹ B S⁻¹,  a S⁻¹ + B

The gradient does not show where a Pareto begins (``Uniform(0, z)`` has one at z of less than the data, too): whoever asks
for one looks at the density itself. The count N matters: torch's Categorical and Multinomial renormalise, which moves the gradient along z.

References:
    M. Hoffman, M. Johnson and D. Tran, Autoconj: recognizing and exploiting conjugacy without a domain-specific language (2018).
    P. de Valpine et al., Programming with models: writing statistical algorithms for general model structures with NIMBLE (2017).
"""  # noqa: E501

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from inference.conditionals import (
    BetaConditional,
    Conditional,
    Coupling,
    DirichletConditional,
    GaussianConditional,
    InverseGaussianConditional,
    LogNormalConditional,
    NormalConditional,
    ParetoConditional,
    Points,
    PowerGammaConditional,
    WishartConditional,
)

__all__ = [
    "BetaFamily",
    "Conditional",
    "DirichletFamily",
    "Family",
    "Gaussian",
    "InverseGaussian",
    "LogNormal",
    "Normal",
    "Pareto",
    "Points",
    "PowerGamma",
    "Wishart",
    "candidates",
    "kind_of",
    "least_of",
]

WIDEST_GAUSSIAN = 1000  # a joint Gaussian over more elements would need too many gradients


def kind_of(support: Any) -> str | None:
    """The kind of a support, in the words of this module; None if no family lives on it."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is constraints.real or support is constraints.real_vector:
        return "real"
    if support is constraints.simplex:
        return "simplex"
    if support is constraints.positive_definite:
        return "positive definite"
    if support.is_discrete:
        return None
    lower, upper = (_number(getattr(support, name, None)) for name in ("lower_bound", "upper_bound"))
    if lower == 0.0:
        return {None: "positive", 1.0: "unit interval"}.get(upper)
    return None


def least_of(support: Any) -> float | None:
    """The bound of a support that has one below, if it is positive and has none above."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    lower, upper = (_number(getattr(support, name, None)) for name in ("lower_bound", "upper_bound"))
    return lower if lower is not None and lower > 0.0 and upper is None and not support.is_discrete else None


def _number(bound: Any) -> float | None:
    """A bound as a number, if it is one and the same for all elements."""
    if isinstance(bound, Tensor):
        return float(bound.flatten()[0]) if bound.numel() and bool((bound == bound.flatten()[0]).all()) else math.nan
    return None if bound is None else float(bound)


class Family(abc.ABC):
    """A family of conditionals: where to differentiate, and how to solve for the parameters.

    The name of a family is the ``update`` that a plan prints.
    """

    name: str

    @abc.abstractmethod
    def at(self, points: Points) -> Tensor:
        """The points of differentiation, (point, chain, *site)."""

    @abc.abstractmethod
    def solve(self, at: Tensor, gradients: Tensor) -> Conditional:
        """The conditional whose log-density has these gradients at these points."""

    def initial(self, value: Tensor) -> Points:
        """Points before any message is known."""
        return Points(value, self._spread(value))

    @staticmethod
    def _spread(value: Tensor) -> Tensor:
        return 1.0 + value.abs()


class Normal(Family):
    """Independent normals: g = precision · (mean − z).

    Args:
        idle: Elements that are masked, so that nothing depends on them, (*site); None if there are none.
    """

    name = "Normal"

    def __init__(self, idle: Tensor | None = None) -> None:
        self.idle = idle

    def at(self, points: Points) -> Tensor:
        location, spread = points
        return torch.stack([location - spread, location + spread])

    def solve(self, at: Tensor, gradients: Tensor) -> NormalConditional:
        precision = (gradients[0] - gradients[1]) / (at[1] - at[0])
        safe = torch.where(precision == 0, torch.ones_like(precision), precision)
        middle = 0.5 * (at[0] + at[1])
        return NormalConditional(middle + 0.5 * (gradients[0] + gradients[1]) / safe, precision, self.idle)


class Gaussian(Family):
    """Joint normals over some axes of a site, independent over the others: g = P (mean − z).

    Args:
        shape: Shape of the site.
        axes: The axes that are coupled.
    """

    name = "Gaussian"

    def __init__(self, shape: torch.Size, axes: tuple[int, ...]) -> None:
        self.coupling = Coupling(shape, axes)

    def at(self, points: Points) -> Tensor:
        location, spread = self.coupling.unfold(points.location), self.coupling.unfold(points.spread)
        steps = torch.eye(self.coupling.width, dtype=location.dtype, device=location.device)
        steps = steps.reshape(self.coupling.width, *(1,) * (location.dim() - 1), self.coupling.width) * spread
        return self.coupling.fold(torch.cat([location[None], location + steps]))

    def solve(self, at: Tensor, gradients: Tensor) -> GaussianConditional:
        at, gradients = self.coupling.unfold(at), self.coupling.unfold(gradients)
        steps = (at[1:] - at[0]).diagonal(dim1=0, dim2=-1)
        columns = (gradients[0] - gradients[1:]).movedim(0, -1) / steps.unsqueeze(-2)
        conditional = GaussianConditional(at[0], 0.5 * (columns + columns.mT), self.coupling)
        shift = torch.cholesky_solve(gradients[0].unsqueeze(-1), conditional._factor()[0]).squeeze(-1)
        return replace(conditional, mean=at[0] + shift)


class _Positive(Family):
    """Points a fixed factor apart, around the location."""

    def at(self, points: Points) -> Tensor:
        step = (points.spread / points.location).clamp(0.05, 1.0)
        return torch.stack([points.location * (-step).exp(), points.location * step.exp()])

    @staticmethod
    def _spread(value: Tensor) -> Tensor:
        return 0.5 * value


class PowerGamma(_Positive):
    """z^p ~ Gamma: z g = A − B p z^p with density z^A exp(−B z^p).

    Args:
        power: p, not 0.
        name: What a plan calls it.
    """

    def __init__(self, power: float, name: str) -> None:
        self.power, self.name = power, name

    def solve(self, at: Tensor, gradients: Tensor) -> PowerGammaConditional:
        scaled, powers = at * gradients, at.pow(self.power)
        slope = (scaled[1] - scaled[0]) / (powers[1] - powers[0])
        exponent = scaled[0] - slope * powers[0]
        return PowerGammaConditional((exponent + 1.0) / self.power, -slope / self.power, self.power)


class LogNormal(_Positive):
    """log z is normal: z g + 1 = precision · (mean − log z)."""

    name = "LogNormal"

    def solve(self, at: Tensor, gradients: Tensor) -> LogNormalConditional:
        return LogNormalConditional(Normal().solve(at.log(), at * gradients + 1.0))


class InverseGaussian(_Positive):
    """z g = order − 1 − a z / 2 + b / (2 z), of given order: scales of Laplace errors, of the lasso, of support vectors.

    Args:
        order: −½ (inverse Gaussian) or ½ (its reciprocal).
        name: What a plan calls it.
    """

    def __init__(self, order: float, name: str) -> None:
        self.order, self.name = order, name

    def solve(self, at: Tensor, gradients: Tensor) -> InverseGaussianConditional:
        first, second = at * (at * gradients - (self.order - 1.0))  # (b − a z²) / 2
        a = 2.0 * (first - second) / (at[1].square() - at[0].square())
        b = 2.0 * first + a * at[0].square()
        # what is 0 but for rounding
        small = 8.0 * torch.finfo(at.dtype).eps
        b = torch.where(b.abs() <= small * at[0] * (1.0 + (a * at[0]).abs()), b.clamp(min=0.0), b)
        a = torch.where(a.abs() * at[0] <= small * (1.0 + (b / at[0]).abs()), a.clamp(min=0.0), a)
        return InverseGaussianConditional(a, b, self.order)


class Pareto(Family):
    """z g = −alpha − 1, wherever it begins: here at the bound of the support.

    Args:
        least: The bound.
    """

    name = "Pareto"

    def __init__(self, least: float) -> None:
        self.least = least

    def at(self, points: Points) -> Tensor:
        return points.location.unsqueeze(0)

    def solve(self, at: Tensor, gradients: Tensor) -> ParetoConditional:
        return ParetoConditional(torch.full_like(at[0], self.least), -at[0] * gradients[0] - 1.0)


class BetaFamily(Family):
    """z (1 − z) g = (a − 1) − (a + b − 2) z."""

    name = "Beta"

    def at(self, points: Points) -> Tensor:
        logit = torch.logit(points.location, eps=1e-6)
        step = (points.spread / (points.location * (1 - points.location)).clamp(min=1e-12)).clamp(0.05, 1.0)
        return torch.stack([torch.sigmoid(logit + scale * step) for scale in (-1.0, 1.0)])

    def solve(self, at: Tensor, gradients: Tensor) -> BetaConditional:
        scaled = at * (1 - at) * gradients
        slope = (scaled[1] - scaled[0]) / (at[1] - at[0])
        a = scaled[0] - slope * at[0]
        return BetaConditional(a + 1.0, -slope - a + 1.0)

    @staticmethod
    def _spread(value: Tensor) -> Tensor:
        return 0.5 * value * (1 - value)


class DirichletFamily(Family):
    """z g = (concentration − 1) − N z, with N left free by the program's normalisation."""

    name = "Dirichlet"

    def at(self, points: Points) -> Tensor:
        location = points.location.clamp(min=1e-6)
        step = (points.spread / location).clamp(0.1, 1.0)
        signs = 1.0 - 2.0 * (torch.arange(location.shape[-1], device=location.device) % 2).to(location.dtype)
        raw = torch.stack([location * (scale * step).exp() for scale in (-signs, signs)])
        return raw / raw.sum(-1, keepdim=True)

    def solve(self, at: Tensor, gradients: Tensor) -> DirichletConditional:
        scaled, gap = at * gradients, at[0] - at[1]
        count = -((scaled[0] - scaled[1]) * gap).sum(-1, keepdim=True) / gap.square().sum(-1, keepdim=True)
        return DirichletConditional(scaled[0] + count * at[0] + 1.0)

    @staticmethod
    def _spread(value: Tensor) -> Tensor:
        return 0.5 * value


class Wishart(Family):
    """Wishart or inverse Wishart, from the gradient at a matrix and at a multiple of it.

    Args:
        is_inverse: Whether the inverse of the site is Wishart.
    """

    _FACTOR = 2.0

    def __init__(self, is_inverse: bool) -> None:
        self.is_inverse = is_inverse
        self.name = "InverseWishart" if is_inverse else "Wishart"

    def at(self, points: Points) -> Tensor:
        location = points.location
        return torch.stack([location, self._FACTOR * location])

    def solve(self, at: Tensor, gradients: Tensor) -> WishartConditional:
        size = at.shape[-1]
        first, second = (0.5 * (g + g.mT) for g in gradients)
        factor = torch.linalg.cholesky_ex(at[0])[0]
        inverse = torch.cholesky_inverse(factor)
        if self.is_inverse:  # S g S = a S + B: at S and c S
            middle, scaled = at[0] @ first @ at[0], at[0] @ second @ at[0] * self._FACTOR**2
            exponent = (inverse * (middle - scaled)).sum((-2, -1)) / (size * (1.0 - self._FACTOR))
            matrix = 2.0 * (middle - exponent[..., None, None] * at[0])
            return WishartConditional(-2.0 * exponent - size - 1.0, matrix, True)
        exponent = (at[0] * (first - second)).sum((-2, -1)) / (size * (1.0 - 1.0 / self._FACTOR))
        matrix = -2.0 * (first - exponent[..., None, None] * inverse)
        return WishartConditional(2.0 * exponent + size + 1.0, matrix, False)

    @staticmethod
    def _spread(value: Tensor) -> Tensor:
        return value


def candidates(support: Any, shape: torch.Size) -> Iterator[Family]:
    """The families that a site of this support and shape could have as its conditional, likely ones first."""
    kind = kind_of(support)
    if kind == "real":
        yield Normal()
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        for count in range(1, len(axes) + 1):
            for coupled in itertools.combinations(reversed(axes), count):
                family = Gaussian(shape, tuple(sorted(coupled)))
                if family.coupling.width <= WIDEST_GAUSSIAN:
                    yield family
    elif kind == "positive":
        yield PowerGamma(1.0, "Gamma")
        yield PowerGamma(-1.0, "InverseGamma")
        yield PowerGamma(-2.0, "InverseGamma of the square")
        yield PowerGamma(2.0, "Gamma of the square")
        yield LogNormal()
        yield InverseGaussian(0.5, "InverseGaussian of the reciprocal")
        yield InverseGaussian(-0.5, "InverseGaussian")
    elif kind == "unit interval":
        yield BetaFamily()
    elif kind == "simplex":
        yield DirichletFamily()
    elif kind == "positive definite":
        yield Wishart(is_inverse=True)
        yield Wishart(is_inverse=False)
