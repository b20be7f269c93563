"""Conjugacy by differentiation: the natural parameters of a conditional, read off the gradient of the log-joint.

A latent z with statistics t(z) has a conditional in their exponential family exactly if

    log p(z | rest) = ⟨η, t(z)⟩ + log h(z) + c,

so that the gradient of the *joint* at a few points is a linear system for η. Prior parameters, wrappers, gathers and
deterministic arithmetic need not be looked at: they are in the gradient. All chains and all elements of a plate are solved
at once. The families of one kind of support share their points, so the program need not say which one it is:

    real                Normal, element by element or jointly over some axes   g = h − P z
    positive            z^p ~ Gamma for p in {1, −1, −2, 2}                     z g = A − B p z^p
                        (Gamma, InverseGamma, standard deviation, square root) or LogNormal
    unit interval       Beta                                                    z (1 − z) g = a − (a + b) z
    simplex             Dirichlet                                               z g = m − N z
    positive definite   InverseWishart, Wishart                                 g = a S⁻¹ + S⁻¹ B S⁻¹,  a S⁻¹ + B

The count N matters: torch's Categorical and Multinomial renormalise, which moves the gradient along z.

References:
    M. Hoffman, M. Johnson and D. Tran, Autoconj: recognizing and exploiting conjugacy without a domain-specific language (2018).
    P. de Valpine et al., Programming with models: writing statistical algorithms for general model structures with NIMBLE (2017).
"""  # noqa: E501

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta, Dirichlet, Gamma, constraints

__all__ = ["Conditional", "Family", "Gaussian", "Points", "candidates", "kind_of"]

WIDEST_GAUSSIAN = 1000  # a joint Gaussian over more elements would need too many gradients


class Points(NamedTuple):
    """Where the gradient is taken: near ``location``, about ``spread`` apart; both (chain, *site), blind to the value."""

    location: Tensor
    spread: Tensor


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


def _number(bound: Any) -> float | None:
    """A bound as a number, if it is one and the same for all elements."""
    if isinstance(bound, Tensor):
        return float(bound.flatten()[0]) if bound.numel() and bool((bound == bound.flatten()[0]).all()) else math.nan
    return None if bound is None else float(bound)


def _elements(tensor: Tensor) -> Tensor:
    """Sum over everything but the chain axis."""
    return tensor.reshape(len(tensor), -1).sum(-1)


def _every(tensor: Tensor) -> Tensor:
    """Whether all elements hold, for each chain."""
    return tensor.reshape(len(tensor), -1).all(-1)


class Conditional(abc.ABC):
    """A conditional distribution for every chain, whose elements are independent or jointly Gaussian."""

    @property
    @abc.abstractmethod
    def is_proper(self) -> Tensor:
        """(chain,): whether the parameters are those of a distribution."""

    @abc.abstractmethod
    def sample(self) -> Tensor:
        """A draw, (chain, *site)."""

    @abc.abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), (chain,)."""

    @abc.abstractmethod
    def mode(self) -> Tensor:
        """Where the density of the constrained value is largest, (chain, *site)."""

    @abc.abstractmethod
    def points(self) -> Points:
        """Points for the next message."""


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


# ---------------------------------------------------------------------------------------------- real
@dataclass(frozen=True)
class NormalConditional(Conditional):
    """Independent normals with mean and precision (chain, *site)."""

    mean: Tensor
    precision: Tensor

    @property
    def is_proper(self) -> Tensor:
        return _every((self.precision > 0) & self.mean.isfinite())

    def _sd(self) -> Tensor:
        return self.precision.clamp(min=torch.finfo(self.mean.dtype).tiny).rsqrt()

    def sample(self) -> Tensor:
        return self.mean + self._sd() * torch.randn_like(self.mean)

    def log_prob(self, value: Tensor) -> Tensor:
        quadratic = self.precision * (value - self.mean).square()
        return -0.5 * _elements(quadratic + math.log(2 * math.pi) + 2 * self._sd().log())

    def mode(self) -> Tensor:
        return self.mean

    def points(self) -> Points:
        return Points(self.mean, self._sd())


class Normal(Family):
    """Independent normals: g = precision · (mean − z)."""

    name = "Normal"

    def at(self, points: Points) -> Tensor:
        location, spread = points
        return torch.stack([location - spread, location + spread])

    def solve(self, at: Tensor, gradients: Tensor) -> NormalConditional:
        precision = (gradients[0] - gradients[1]) / (at[1] - at[0])
        safe = torch.where(precision == 0, torch.ones_like(precision), precision)
        middle = 0.5 * (at[0] + at[1])
        return NormalConditional(middle + 0.5 * (gradients[0] + gradients[1]) / safe, precision)


@dataclass(frozen=True)
class GaussianConditional(Conditional):
    """Joint normals: ``mean`` (chain, *independent, joint), ``precision`` (chain, *independent, joint, joint)."""

    mean: Tensor
    precision: Tensor
    family: Gaussian

    def _factor(self) -> tuple[Tensor, Tensor]:
        factor, failed = torch.linalg.cholesky_ex(self.precision)
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        is_good = (failed == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        return torch.where(is_good[..., None, None], factor, eye), is_good

    @property
    def is_proper(self) -> Tensor:
        return _every(self._factor()[1] & self.mean.isfinite().all(-1))

    def sample(self) -> Tensor:
        noise = torch.randn_like(self.mean).unsqueeze(-1)
        offset = torch.linalg.solve_triangular(self._factor()[0].mT, noise, upper=True).squeeze(-1)
        return self.family.fold(self.mean + offset)

    def log_prob(self, value: Tensor) -> Tensor:
        factor = self._factor()[0]
        whitened = (factor.mT @ (self.family.unfold(value) - self.mean).unsqueeze(-1)).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log()
        return _elements(-0.5 * (whitened.square() + math.log(2 * math.pi)) + log_det)

    def mode(self) -> Tensor:
        return self.family.fold(self.mean)

    def points(self) -> Points:
        sd = self.precision.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(self.mean.dtype).tiny).rsqrt()
        return Points(self.family.fold(self.mean), self.family.fold(sd))


class Gaussian(Family):
    """Joint normals over some axes of a site, independent over the others: g = P (mean − z).

    Args:
        shape: Shape of the site.
        axes: The axes that are coupled.
    """

    name = "Gaussian"

    def __init__(self, shape: torch.Size, axes: tuple[int, ...]) -> None:
        self.shape, self.axes = shape, axes
        self.rest = tuple(axis for axis in range(len(shape)) if axis not in axes)
        self.width = math.prod(shape[axis] for axis in axes)

    def unfold(self, value: Tensor) -> Tensor:
        """(…, *site) -> (…, *independent, joint)."""
        lead = value.dim() - len(self.shape)
        order = [*range(lead), *(lead + axis for axis in self.rest), *(lead + axis for axis in self.axes)]
        moved = value.permute(order)
        return moved.reshape(*moved.shape[: lead + len(self.rest)], self.width)

    def fold(self, value: Tensor) -> Tensor:
        """(…, *independent, joint) -> (…, *site)."""
        lead = value.dim() - len(self.rest) - 1
        value = value.reshape(*value.shape[:-1], *(self.shape[axis] for axis in self.axes))
        order = [*range(lead), *(lead + axis for axis in self.rest), *(lead + axis for axis in self.axes)]
        return value.permute([order.index(i) for i in range(len(order))])

    def at(self, points: Points) -> Tensor:
        location, spread = self.unfold(points.location), self.unfold(points.spread)
        steps = torch.eye(self.width, dtype=location.dtype, device=location.device)
        steps = steps.reshape(self.width, *(1,) * (location.dim() - 1), self.width) * spread
        return self.fold(torch.cat([location[None], location + steps]))

    def solve(self, at: Tensor, gradients: Tensor) -> GaussianConditional:
        at, gradients = self.unfold(at), self.unfold(gradients)
        steps = (at[1:] - at[0]).diagonal(dim1=0, dim2=-1)
        columns = (gradients[0] - gradients[1:]).movedim(0, -1) / steps.unsqueeze(-2)
        precision = 0.5 * (columns + columns.mT)
        factor, failed = torch.linalg.cholesky_ex(precision)
        eye = torch.eye(self.width, dtype=factor.dtype, device=factor.device)
        factor = torch.where((failed == 0)[..., None, None], factor, eye)
        mean = at[0] + torch.cholesky_solve(gradients[0].unsqueeze(-1), factor).squeeze(-1)
        return GaussianConditional(mean, precision, self)


# ------------------------------------------------------------------------------------------ positive
class _Positive(Family):
    """Points a fixed factor apart, around the location."""

    def at(self, points: Points) -> Tensor:
        step = (points.spread / points.location).clamp(0.05, 1.0)
        return torch.stack([points.location * (-step).exp(), points.location * step.exp()])

    @staticmethod
    def _spread(value: Tensor) -> Tensor:
        return 0.5 * value


@dataclass(frozen=True)
class PowerGammaConditional(Conditional):
    """z^power ~ Gamma(concentration, rate), all (chain, *site)."""

    concentration: Tensor
    rate: Tensor
    power: float

    @property
    def is_proper(self) -> Tensor:
        return _every((self.concentration > 0) & (self.rate > 0) & (self.concentration + self.rate).isfinite())

    def _gamma(self) -> Gamma:
        is_good = (self.concentration > 0) & (self.rate > 0) & (self.concentration + self.rate).isfinite()
        one = torch.ones_like(self.rate)
        return Gamma(
            torch.where(is_good, self.concentration, one), torch.where(is_good, self.rate, one), validate_args=False
        )

    def sample(self) -> Tensor:
        return self._gamma().sample().pow(1.0 / self.power)

    def log_prob(self, value: Tensor) -> Tensor:
        log_jacobian = math.log(abs(self.power)) + (self.power - 1.0) * value.log()
        return _elements(self._gamma().log_prob(value.pow(self.power)) + log_jacobian)

    def mode(self) -> Tensor:
        exponent = self.concentration * self.power - 1.0  # A in z^A exp(−B z^p)
        return (exponent / (self.rate * self.power)).clamp(min=0.0).pow(1.0 / self.power)

    def points(self) -> Points:
        gamma = self._gamma()
        location = gamma.mean.pow(1.0 / self.power)
        return Points(location, location * gamma.concentration.rsqrt() / abs(self.power))


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


@dataclass(frozen=True)
class LogNormalConditional(Conditional):
    """log z is normal."""

    log: NormalConditional

    @property
    def is_proper(self) -> Tensor:
        return self.log.is_proper

    def sample(self) -> Tensor:
        return self.log.sample().exp()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.log.log_prob(value.log()) - _elements(value.log())

    def mode(self) -> Tensor:
        return (self.log.mean - 1.0 / self.log.precision).exp()

    def points(self) -> Points:
        location, spread = self.log.points()
        return Points(location.exp(), location.exp() * spread)


class LogNormal(_Positive):
    """log z is normal: z g + 1 = precision · (mean − log z)."""

    name = "LogNormal"

    def solve(self, at: Tensor, gradients: Tensor) -> LogNormalConditional:
        return LogNormalConditional(Normal().solve(at.log(), at * gradients + 1.0))


# ------------------------------------------------------------------------------- unit interval, simplex
@dataclass(frozen=True)
class BetaConditional(Conditional):
    """Beta(a, b), both (chain, *site)."""

    a: Tensor
    b: Tensor

    @property
    def is_proper(self) -> Tensor:
        return _every((self.a > 0) & (self.b > 0) & (self.a + self.b).isfinite())

    def _beta(self) -> Beta:
        is_good = (self.a > 0) & (self.b > 0) & (self.a + self.b).isfinite()
        one = torch.ones_like(self.a)
        return Beta(torch.where(is_good, self.a, one), torch.where(is_good, self.b, one), validate_args=False)

    def sample(self) -> Tensor:
        tiny = torch.finfo(self.a.dtype).eps
        return self._beta().sample().clamp(tiny, 1.0 - tiny)

    def log_prob(self, value: Tensor) -> Tensor:
        return _elements(self._beta().log_prob(value))

    def mode(self) -> Tensor:
        a, b = (self.a - 1.0).clamp(min=0.0), (self.b - 1.0).clamp(min=0.0)
        return torch.where(a + b > 0, a / (a + b), 0.5)

    def points(self) -> Points:
        beta = self._beta()
        return Points(beta.mean, beta.variance.sqrt())


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


@dataclass(frozen=True)
class DirichletConditional(Conditional):
    """Dirichlet with concentration (chain, *site), the last axis being the simplex."""

    concentration: Tensor

    @property
    def is_proper(self) -> Tensor:
        return _every((self.concentration > 0) & self.concentration.isfinite())

    def _dirichlet(self) -> Dirichlet:
        is_good = (self.concentration > 0) & self.concentration.isfinite()
        return Dirichlet(
            torch.where(is_good, self.concentration, torch.ones_like(self.concentration)), validate_args=False
        )

    def sample(self) -> Tensor:
        floored = self._dirichlet().sample().clamp(min=torch.finfo(self.concentration.dtype).tiny)
        return floored / floored.sum(-1, keepdim=True)

    def log_prob(self, value: Tensor) -> Tensor:
        return _elements(self._dirichlet().log_prob(value))

    def mode(self) -> Tensor:
        counts = (self.concentration - 1.0).clamp(min=0.0)
        total = counts.sum(-1, keepdim=True)
        return torch.where(total > 0, counts / total, 1.0 / counts.shape[-1])

    def points(self) -> Points:
        mean = self._dirichlet().mean
        return Points(mean, (mean / self.concentration.sum(-1, keepdim=True)).sqrt())


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


# --------------------------------------------------------------------------------- positive definite
def _bartlett(df: Tensor, size: int) -> Tensor:
    """Lower triangular A with A Aᵀ ~ Wishart(df, I); shape of ``df`` + (size, size)."""
    steps = torch.arange(size, dtype=df.dtype, device=df.device)
    diagonal = (
        2.0 * Gamma(0.5 * (df.unsqueeze(-1) - steps), torch.ones_like(steps), validate_args=False).sample()
    ).sqrt()
    below = torch.randn(*df.shape, size, size, dtype=df.dtype, device=df.device).tril(-1)
    return below + torch.diag_embed(diagonal)


@dataclass(frozen=True)
class WishartConditional(Conditional):
    """Wishart with ``df`` (chain, *batch) and inverse scale matrix (chain, *batch, D, D); or the inverse of one.

    Wishart:          |S|^((df − D − 1)/2) exp(−½ tr(M S))
    inverse Wishart:  |S|^(−(df + D + 1)/2) exp(−½ tr(M S⁻¹))
    """

    df: Tensor
    matrix: Tensor
    is_inverse: bool

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        size = self.matrix.shape[-1]
        factor, failed = torch.linalg.cholesky_ex(0.5 * (self.matrix + self.matrix.mT))
        is_good = (failed == 0) & (self.df > size - 1) & self.df.isfinite()
        eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
        safe = torch.where(is_good, self.df, torch.full_like(self.df, size + 1.0))
        return torch.where(is_good[..., None, None], factor, eye), safe, is_good

    @property
    def is_proper(self) -> Tensor:
        return _every(self._parts()[2])

    def sample(self) -> Tensor:
        factor, df, _ = self._parts()
        bartlett = _bartlett(df, factor.shape[-1])
        if self.is_inverse:  # S = C A⁻ᵀ A⁻¹ Cᵀ with M = C Cᵀ
            root = torch.linalg.solve_triangular(bartlett, factor.mT, upper=False).mT
        else:  # S = C⁻ᵀ A Aᵀ C⁻¹
            root = torch.linalg.solve_triangular(factor.mT, bartlett, upper=True)
        return root @ root.mT

    def log_prob(self, value: Tensor) -> Tensor:
        factor, df, _ = self._parts()
        size = factor.shape[-1]
        root = torch.linalg.cholesky(value)
        log_det = 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_det_matrix = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.is_inverse:
            trace = torch.linalg.solve_triangular(root, factor, upper=False).square().sum((-2, -1))
            exponent = -0.5 * (df + size + 1.0)
        else:
            trace = (factor.mT @ root).square().sum((-2, -1))
            exponent = 0.5 * (df - size - 1.0)
        normaliser = 0.5 * df * (log_det_matrix - size * math.log(2.0)) - torch.mvlgamma(0.5 * df, size)
        return _elements(exponent * log_det - 0.5 * trace + normaliser)

    def mode(self) -> Tensor:
        size = self.matrix.shape[-1]
        symmetric = 0.5 * (self.matrix + self.matrix.mT)
        if self.is_inverse:
            return symmetric / (self.df + size + 1.0)[..., None, None]
        return (self.df - size - 1.0).clamp(min=0.0)[..., None, None] * torch.linalg.inv(symmetric)

    def points(self) -> Points:
        factor, df, _ = self._parts()
        matrix = factor @ factor.mT
        middle = (
            matrix / df[..., None, None] if self.is_inverse else df[..., None, None] * torch.cholesky_inverse(factor)
        )
        return Points(middle, middle)


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
                if family.width <= WIDEST_GAUSSIAN:
                    yield family
    elif kind == "positive":
        yield PowerGamma(1.0, "Gamma")
        yield PowerGamma(-1.0, "InverseGamma")
        yield PowerGamma(-2.0, "InverseGamma of the square")
        yield PowerGamma(2.0, "Gamma of the square")
        yield LogNormal()
    elif kind == "unit interval":
        yield BetaFamily()
    elif kind == "simplex":
        yield DirichletFamily()
    elif kind == "positive definite":
        yield Wishart(is_inverse=True)
        yield Wishart(is_inverse=False)
