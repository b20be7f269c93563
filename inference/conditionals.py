"""Conditional distributions over a leading chain axis: what a message is, once its parameters are known."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.distributions import Beta, Dirichlet, Gamma

__all__ = [
    "BetaConditional",
    "Conditional",
    "Coupling",
    "DirichletConditional",
    "GaussianConditional",
    "InverseGaussianConditional",
    "LogNormalConditional",
    "NormalConditional",
    "ParetoConditional",
    "Points",
    "PowerGammaConditional",
    "WishartConditional",
]


class Points(NamedTuple):
    """Where the gradient is taken: near ``location``, about ``spread`` apart; both (chain, *site), blind to the value."""

    location: Tensor
    spread: Tensor


def _elements(tensor: Tensor) -> Tensor:
    """Sum over everything but the chain axis."""
    return tensor.reshape(len(tensor), -1).sum(-1)


def _are_positive(one: Tensor, other: Tensor) -> Tensor:
    """Whether both are positive and finite, and their sum is."""
    return (torch.minimum(one, other) > 0) & (one + other < math.inf)


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
    def log_kernel(self, value: Tensor) -> Tensor:
        """log q(value) + c, (chain,); a function with a mode may have it though it is no distribution."""

    @abc.abstractmethod
    def log_normaliser(self) -> Tensor:
        """The constant c, (chain,); of no meaning where the parameters are not proper."""

    @final
    def log_prob(self, value: Tensor) -> Tensor:
        """log q(value), (chain,)."""
        return self.log_kernel(value) - self.log_normaliser()

    @abc.abstractmethod
    def mode(self) -> Tensor:
        """Where the density of the constrained value is largest, (chain, *site); NaN if that is nowhere."""

    @abc.abstractmethod
    def points(self) -> Points:
        """Points for the next message."""


@dataclass(frozen=True)
class NormalConditional(Conditional):
    """Independent normals with mean and precision (chain, *site).

    Elements that are ``idle`` (*site) are in no term of the log-joint. They have a density of 1, wherever they are, and are
    drawn from the standard normal.
    """

    mean: Tensor
    precision: Tensor
    idle: Tensor | None = None

    @property
    def is_proper(self) -> Tensor:
        is_good = (self.precision > 0) & self.mean.isfinite()
        return _every(is_good if self.idle is None else is_good | self.idle)

    def _sd(self) -> Tensor:
        return self.precision.clamp(min=torch.finfo(self.mean.dtype).tiny).rsqrt()

    def sample(self) -> Tensor:
        noise = torch.randn_like(self.mean)
        drawn = self.mean + self._sd() * noise
        return drawn if self.idle is None else torch.where(self.idle, noise, drawn)

    def log_kernel(self, value: Tensor) -> Tensor:
        terms = self.precision * (value - self.mean).square()
        return -0.5 * _elements(terms if self.idle is None else torch.where(self.idle, 0.0, terms))

    def log_normaliser(self) -> Tensor:
        terms = self._sd().log() + 0.5 * math.log(2 * math.pi)
        return _elements(terms if self.idle is None else torch.where(self.idle, 0.0, terms))

    def mode(self) -> Tensor:
        return self.mean

    def points(self) -> Points:
        return Points(self.mean, self._sd())


class Coupling:
    """Which axes of a site are coupled; the others are independent.

    Args:
        shape: Shape of the site.
        axes: The coupled axes.
    """

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


@dataclass(frozen=True)
class GaussianConditional(Conditional):
    """Joint normals: ``mean`` (chain, *independent, joint), ``precision`` (chain, *independent, joint, joint).

    ``root`` is the Cholesky factor of the precision, where it is known better than from the precision.
    """

    mean: Tensor
    precision: Tensor
    coupling: Coupling
    root: Tensor | None = None

    def _factor(self) -> tuple[Tensor, Tensor]:
        """The Cholesky factor of the precision, and whether it has one; the identity where not."""
        if self.root is None:
            factor, failed = torch.linalg.cholesky_ex(self.precision)
        else:
            factor, failed = self.root, torch.zeros_like(self.root[..., 0, 0])
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        is_good = (failed == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        return torch.where(is_good[..., None, None], factor, eye), is_good

    @property
    def is_proper(self) -> Tensor:
        return _every(self._factor()[1] & self.mean.isfinite().all(-1))

    def sample(self) -> Tensor:
        noise = torch.randn_like(self.mean).unsqueeze(-1)
        offset = torch.linalg.solve_triangular(self._factor()[0].mT, noise, upper=True).squeeze(-1)
        return self.coupling.fold(self.mean + offset)

    def log_kernel(self, value: Tensor) -> Tensor:
        whitened = (self._factor()[0].mT @ (self.coupling.unfold(value) - self.mean).unsqueeze(-1)).squeeze(-1)
        return -0.5 * _elements(whitened.square())

    def log_normaliser(self) -> Tensor:
        return _elements(0.5 * math.log(2 * math.pi) - self._factor()[0].diagonal(dim1=-2, dim2=-1).log())

    def mode(self) -> Tensor:
        return self.coupling.fold(torch.where(self._factor()[1].unsqueeze(-1), self.mean, torch.nan))

    def points(self) -> Points:
        sd = self.precision.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(self.mean.dtype).tiny).rsqrt()
        return Points(self.coupling.fold(self.mean), self.coupling.fold(sd))


@dataclass(frozen=True)
class PowerGammaConditional(Conditional):
    """z^power ~ Gamma(concentration, rate), all (chain, *site)."""

    concentration: Tensor
    rate: Tensor
    power: float

    @property
    def is_proper(self) -> Tensor:
        return _every(_are_positive(self.concentration, self.rate))

    def _gamma(self) -> Gamma:
        is_good = _are_positive(self.concentration, self.rate)
        one = torch.ones_like(self.rate)
        return Gamma(
            torch.where(is_good, self.concentration, one), torch.where(is_good, self.rate, one), validate_args=False
        )

    def sample(self) -> Tensor:
        return self._gamma().sample().pow(1.0 / self.power)

    @property
    def _exponent(self) -> Tensor:
        """A in z^A exp(−B z^p)."""
        return self.concentration * self.power - 1.0

    def log_kernel(self, value: Tensor) -> Tensor:
        return _elements(self._exponent * value.log() - self.rate * value.pow(self.power))

    def log_normaliser(self) -> Tensor:
        gamma = self._gamma()
        concentration, rate = gamma.concentration, gamma.rate
        return _elements(torch.lgamma(concentration) - concentration * rate.log() - math.log(abs(self.power)))

    def mode(self) -> Tensor:
        return (self._exponent / (self.rate * self.power)).clamp(min=0.0).pow(1.0 / self.power)

    def points(self) -> Points:
        gamma = self._gamma()
        location = gamma.mean.pow(1.0 / self.power)
        return Points(location, location * gamma.concentration.rsqrt() / abs(self.power))


_LEAST_MIDDLE = (
    1e-8  # √(a b) of an inverse Gaussian below which b is taken for small, and its share of rounding for a is 1e-8
)


@dataclass(frozen=True)
class InverseGaussianConditional(Conditional):
    """Density ∝ z^(order − 1) exp(−(a z + b / z) / 2): inverse Gaussian for order −½, its reciprocal for order ½.

    Args:
        a: (chain, *site).
        b: (chain, *site).
        order: −½ or ½.

    References:
        J. Michael, W. Schucany and R. Haas, Generating random variates using transformations with multiple roots (1976).
    """

    a: Tensor
    b: Tensor
    order: float

    def _is_good(self) -> Tensor:
        first, other = (self.a, self.b) if self.order > 0 else (self.b, self.a)
        return (first > 0) & (other >= 0) & (first + other).isfinite()

    @property
    def is_proper(self) -> Tensor:
        return _every(self._is_good())

    def _rates(self) -> tuple[Tensor, Tensor]:
        """a and b such that z^sign has order ½, sign that of the order."""
        is_good = self._is_good()
        a, b = torch.where(is_good, self.a, 1.0), torch.where(is_good, self.b, 1.0)
        return (a, b) if self.order > 0 else (b, a)

    def sample(self) -> Tensor:
        a, b = self._rates()
        middle, square = (b / a).sqrt(), torch.randn_like(a).square() / a
        large = middle + 0.5 * square + (middle * square + 0.25 * square.square()).sqrt()  # no difference: none cancels
        is_large = torch.rand_like(a) * (large + middle) <= large
        return torch.where(is_large, large, middle.square() / large).pow(math.copysign(1.0, self.order))

    def log_kernel(self, value: Tensor) -> Tensor:
        return _elements((self.order - 1.0) * value.log() - 0.5 * (self.a * value + self.b / value))

    def log_normaliser(self) -> Tensor:
        a, b = self._rates()
        return _elements(0.5 * math.log(2.0 * math.pi) - 0.5 * a.log() - (a * b).sqrt())

    def mode(self) -> Tensor:
        less = self.order - 1.0
        return (less + (less**2 + self.a * self.b).sqrt()) / self.a

    def mean(self) -> Tensor:
        """E z, (chain, *site)."""
        a, b = self._rates()
        return (b / a).sqrt() + 1.0 / a if self.order > 0 else (a / b).sqrt()

    def points(self) -> Points:
        """Where a z and b / z are of one size, so that the gradient shows both."""
        a, b = self._rates()
        location = torch.maximum((b / a).sqrt(), _LEAST_MIDDLE / a).pow(math.copysign(1.0, self.order))
        return Points(location, location)


@dataclass(frozen=True)
class LogNormalConditional(Conditional):
    """log z is normal."""

    log: NormalConditional

    @property
    def is_proper(self) -> Tensor:
        return self.log.is_proper

    def sample(self) -> Tensor:
        return self.log.sample().exp()

    def log_kernel(self, value: Tensor) -> Tensor:
        return self.log.log_kernel(value.log()) - _elements(value.log())

    def log_normaliser(self) -> Tensor:
        return self.log.log_normaliser()

    def mode(self) -> Tensor:
        return (self.log.mean - 1.0 / self.log.precision).exp()

    def points(self) -> Points:
        location, spread = self.log.points()
        return Points(location.exp(), location.exp() * spread)


@dataclass(frozen=True)
class ParetoConditional(Conditional):
    """Pareto: z^(−alpha − 1) above ``scale``, both (chain, *site)."""

    scale: Tensor
    alpha: Tensor

    @property
    def is_proper(self) -> Tensor:
        return _every(_are_positive(self.alpha, self.scale))

    def _shape(self) -> Tensor:
        is_good = (self.alpha > 0) & self.alpha.isfinite()
        return torch.where(is_good, self.alpha, torch.ones_like(self.alpha))

    def sample(self) -> Tensor:
        return self.scale * (torch.empty_like(self.scale).exponential_() / self._shape()).exp()

    def log_kernel(self, value: Tensor) -> Tensor:
        ratio = (value / self.scale).log()
        return _elements(torch.where(ratio >= 0, -value.log() - self.alpha * ratio, -math.inf))

    def log_normaliser(self) -> Tensor:
        return -_elements(self._shape().log())

    def mode(self) -> Tensor:
        return self.scale

    def points(self) -> Points:
        median = self.scale * 2.0 ** (1.0 / self._shape())
        return Points(median, median)


@dataclass(frozen=True)
class BetaConditional(Conditional):
    """Beta(a, b), both (chain, *site)."""

    a: Tensor
    b: Tensor

    @property
    def is_proper(self) -> Tensor:
        return _every(_are_positive(self.a, self.b))

    def _beta(self) -> Beta:
        is_good = _are_positive(self.a, self.b)
        one = torch.ones_like(self.a)
        return Beta(torch.where(is_good, self.a, one), torch.where(is_good, self.b, one), validate_args=False)

    def sample(self) -> Tensor:
        tiny = torch.finfo(self.a.dtype).eps
        return self._beta().sample().clamp(tiny, 1.0 - tiny)

    def log_kernel(self, value: Tensor) -> Tensor:
        return _elements(torch.xlogy(self.a - 1.0, value) + torch.special.xlog1py(self.b - 1.0, -value))

    def log_normaliser(self) -> Tensor:
        beta = self._beta()
        a, b = beta.concentration1, beta.concentration0
        return _elements(torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b))

    def mode(self) -> Tensor:
        a, b = (self.a - 1.0).clamp(min=0.0), (self.b - 1.0).clamp(min=0.0)
        return torch.where(a + b > 0, a / (a + b), 0.5)

    def points(self) -> Points:
        beta = self._beta()
        return Points(beta.mean, beta.variance.sqrt())


@dataclass(frozen=True)
class DirichletConditional(Conditional):
    """Dirichlet with concentration (chain, *site), the last axis being the simplex."""

    concentration: Tensor

    @property
    def is_proper(self) -> Tensor:
        return _every((self.concentration > 0) & self.concentration.isfinite())

    def _dirichlet(self) -> Dirichlet:
        is_good = (self.concentration > 0) & self.concentration.isfinite()
        return Dirichlet(torch.where(is_good, self.concentration, torch.ones_like(self.concentration)), validate_args=False)

    def sample(self) -> Tensor:
        floored = self._dirichlet().sample().clamp(min=torch.finfo(self.concentration.dtype).tiny)
        return floored / floored.sum(-1, keepdim=True)

    def log_kernel(self, value: Tensor) -> Tensor:
        return _elements(torch.xlogy(self.concentration - 1.0, value))

    def log_normaliser(self) -> Tensor:
        concentration = self._dirichlet().concentration
        return _elements(torch.lgamma(concentration).sum(-1) - torch.lgamma(concentration.sum(-1)))

    def mode(self) -> Tensor:
        counts = (self.concentration - 1.0).clamp(min=0.0)
        total = counts.sum(-1, keepdim=True)
        return torch.where(total > 0, counts / total, 1.0 / counts.shape[-1])

    def points(self) -> Points:
        mean = self._dirichlet().mean
        return Points(mean, (mean / self.concentration.sum(-1, keepdim=True)).sqrt())


def _bartlett(df: Tensor, size: int) -> Tensor:
    """Lower triangular A with A Aᵀ ~ Wishart(df, I); shape of ``df`` + (size, size)."""
    steps = torch.arange(size, dtype=df.dtype, device=df.device)
    diagonal = (2.0 * Gamma(0.5 * (df.unsqueeze(-1) - steps), torch.ones_like(steps), validate_args=False).sample()).sqrt()
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

    def log_kernel(self, value: Tensor) -> Tensor:
        size = value.shape[-1]
        symmetric = 0.5 * (self.matrix + self.matrix.mT)
        root, failed = torch.linalg.cholesky_ex(value)
        root = torch.where((failed > 0)[..., None, None], torch.nan, root)
        log_det = 2.0 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        if self.is_inverse:
            trace = torch.cholesky_solve(symmetric, root).diagonal(dim1=-2, dim2=-1).sum(-1)
            return _elements(-0.5 * (self.df + size + 1.0) * log_det - 0.5 * trace)
        return _elements(0.5 * (self.df - size - 1.0) * log_det - 0.5 * (symmetric * value).sum((-2, -1)))

    def log_normaliser(self) -> Tensor:
        factor, df, _ = self._parts()
        size = factor.shape[-1]
        log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return _elements(torch.mvlgamma(0.5 * df, size) - 0.5 * df * (log_det - size * math.log(2.0)))

    def mode(self) -> Tensor:
        size = self.matrix.shape[-1]
        symmetric = 0.5 * (self.matrix + self.matrix.mT)
        if self.is_inverse:
            return symmetric / (self.df + size + 1.0)[..., None, None]
        return (self.df - size - 1.0).clamp(min=0.0)[..., None, None] * torch.linalg.inv_ex(symmetric)[0]

    def points(self) -> Points:
        factor, df, _ = self._parts()
        matrix = factor @ factor.mT
        middle = matrix / df[..., None, None] if self.is_inverse else df[..., None, None] * torch.cholesky_inverse(factor)
        return Points(middle, middle)
