"""Directions: distributions on the unit sphere of R^d, S^(d−1) = {x : ‖x‖ = 1}.

Densities are with respect to the surface. Samples have derivatives in every parameter, of any order where said.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.distributions.kl import register_kl

from pyro_genmodels.distributions.special import Tilted, log_gamma_ratio, tilted

__all__ = ["HypersphericalUniform", "PowerSpherical", "VonMisesFisher"]

_NODES = 32  # of Gauss and Legendre
_PROPOSALS = 32  # of one draw; the worst case accepts 65 %, so that one draw in 4e14 has to take what was rejected
_MEMORY = 2**22  # numbers in the proposals that are looked at together


def _log_area(dimension: int) -> float:
    """log of the surface of the unit sphere of R^d, 2 π^(d/2) / Γ(d/2)."""
    return math.log(2.0) + 0.5 * dimension * math.log(math.pi) - math.lgamma(0.5 * dimension)


class HypersphericalUniform(TorchDistribution):
    """Uniform distribution on the unit sphere of R^d.

    Args:
        dimension: d, at least 2.
        like: A tensor whose type and device the samples have; None: torch's default.

    Example:
        >>> HypersphericalUniform(3).sample((5,)).shape
        torch.Size([5, 3])
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = constraints.sphere
    has_rsample = True

    def __init__(
        self,
        dimension: int,
        like: Tensor | None = None,
        batch_shape: Any = Size(),  # noqa: B008
        validate_args: bool | None = None,
    ) -> None:
        _check(self, dimension)
        self._like = torch.zeros(()) if like is None else like.new_zeros(())
        super().__init__(Size(batch_shape), Size((dimension,)), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HypersphericalUniform:
        return HypersphericalUniform(self.event_shape[0], self._like, batch_shape, validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._like.expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        noise = torch.randn(shape, dtype=self._like.dtype, device=self._like.device)
        return torch.nn.functional.normalize(noise, dim=-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return value.new_full(shape, -_log_area(self.event_shape[0]))

    def entropy(self) -> Tensor:
        return (self._like + _log_area(self.event_shape[0])).expand(self.batch_shape)


def _check(given: TorchDistribution, dimension: int) -> None:
    if not isinstance(dimension, int) or dimension < 2:
        raise ValueError(f"{type(given).__name__} is on a sphere of R^d, d at least 2, but d is {dimension}.")


class VonMisesFisher(TorchDistribution):
    """Von Mises and Fisher's distribution of directions.

        p(x) ∝ exp(κ μᵀx),    ‖x‖ = 1;    E x = A(κ) μ,  A(κ) = I_{d/2}(κ) / I_{d/2−1}(κ)

    κ = 0 is uniform. Draws are exact: Wood's rejection of the angle between x and μ, in a fixed number of proposals, so that
    they may be vectorised, and a tangent at random. Their derivative in κ is that of the angle at a fixed quantile, an
    integral (Gauss and Legendre, 1e-10): differentiating through the accepted proposal, as it is often done, forgets that
    the acceptance depends on κ. In μ they move along great circles. Derivatives are right to any order.

    Args:
        loc: Mean direction μ, of norm 1, (*batch, d), d at least 2.
        concentration: κ ≥ 0, (*batch).

    Raises:
        ValueError: If d is less than 2.

    Example:
        >>> VonMisesFisher(torch.tensor([1.0, 0.0, 0.0]), torch.tensor(2.0)).mean
        tensor([0.5373, 0.0000, 0.0000])

    References:
        A. Wood, Simulation of the von Mises Fisher distribution (1994).
        M. Figurnov, S. Mohamed and A. Mnih, Implicit reparameterization gradients (2018).
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}  # noqa: RUF012
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = None) -> None:
        self.loc, self.concentration = _broadcast(self, loc, concentration)
        super().__init__(self.concentration.shape, self.loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> VonMisesFisher:
        batch_shape = Size(batch_shape)
        loc = self.loc.expand(batch_shape + self.event_shape)
        return VonMisesFisher(loc, self.concentration.expand(batch_shape), validate_args=False)

    @property
    def _tilted(self) -> Tilted:
        return tilted(self.concentration, self.event_shape[0])

    @property
    def mean(self) -> Tensor:
        return self._tilted.mean.unsqueeze(-1) * self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # κ (μᵀx − 1), in which large κ leave no rounding, and an error of the norm of x counts twice only
        inside = -0.5 * self.concentration * (value - self.loc).square().sum(-1)
        return inside - self._tilted.excess - _log_area(self.event_shape[0])

    def entropy(self) -> Tensor:
        return _log_area(self.event_shape[0]) - _to_uniform(self)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape, dimension = Size(sample_shape) + self.batch_shape, self.event_shape[0]
        kappa = self.concentration.expand(shape)
        with torch.no_grad():
            drawn = _angle(kappa, dimension)
        angle = _Quantile.apply(drawn, kappa, dimension)
        return _turned(self.loc.expand(shape + self.event_shape), angle.cos(), angle.sin())


class PowerSpherical(TorchDistribution):
    """A distribution of directions that is easier to draw from than von Mises and Fisher's, and much like it.

        p(x) ∝ (1 + μᵀx)^κ,    ‖x‖ = 1;    (1 + μᵀx) / 2 ~ Beta((d − 1)/2 + κ, (d − 1)/2)

    κ = 0 is uniform.

    Args:
        loc: Mean direction μ, of norm 1, (*batch, d), d at least 2.
        concentration: κ ≥ 0, (*batch).

    Raises:
        ValueError: If d is less than 2.

    References:
        N. De Cao and W. Aziz, The power spherical distribution (2020).
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.nonnegative}  # noqa: RUF012
    support = constraints.sphere
    has_rsample = True

    def __init__(self, loc: Tensor, concentration: Tensor | float, validate_args: bool | None = None) -> None:
        self.loc, self.concentration = _broadcast(self, loc, concentration)
        super().__init__(self.concentration.shape, self.loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PowerSpherical:
        batch_shape = Size(batch_shape)
        loc = self.loc.expand(batch_shape + self.event_shape)
        return PowerSpherical(loc, self.concentration.expand(batch_shape), validate_args=False)

    @property
    def _half(self) -> float:
        """(d − 1) / 2."""
        return 0.5 * (self.event_shape[0] - 1)

    @property
    def _normaliser(self) -> tuple[Tensor, Tensor]:
        """Log-density at μ, relative to the uniform distribution, and −E log((1 + μᵀx) / 2)."""
        kappa, half = self.concentration, torch.full_like(self.concentration, self._half)
        ratio, slope = log_gamma_ratio(kappa + half, half)
        at_zero = self._half * math.log(4.0 * math.pi) - _log_area(self.event_shape[0])
        # log Γ of four numbers, two of which are close to the others: which ones, depends on κ
        small = log_gamma_ratio(2.0 * half, kappa)[0] - log_gamma_ratio(half, kappa)[0]
        return torch.where(kappa < half, small, ratio - at_zero), slope

    @property
    def mean(self) -> Tensor:
        return (self.concentration / (self.concentration + 2.0 * self._half)).unsqueeze(-1) * self.loc

    @property
    def mode(self) -> Tensor:
        return self.loc

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        away = 0.25 * (value - self.loc).square().sum(-1)  # (1 − μᵀx) / 2
        most = 1.0 - torch.finfo(away.dtype).eps
        relative = self._normaliser[0] + self.concentration * torch.log1p(-away.clamp(max=most))
        return relative - _log_area(self.event_shape[0])

    def entropy(self) -> Tensor:
        return _log_area(self.event_shape[0]) - _to_uniform(self)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape) + self.batch_shape
        kappa = self.concentration.expand(shape)
        near, far = torch._standard_gamma(kappa + self._half), torch._standard_gamma(torch.full_like(kappa, self._half))
        cos, sin = (near - far) / (near + far), 2.0 * (near * far).sqrt() / (near + far)
        return _turned(self.loc.expand(shape + self.event_shape), cos, sin)


def _broadcast(given: TorchDistribution, loc: Tensor, concentration: Tensor | float) -> tuple[Tensor, Tensor]:
    if not loc.is_floating_point() or not loc.dim():
        raise ValueError(
            f"loc is of type {loc.dtype} and shape {tuple(loc.shape)}, but {type(given).__name__} takes unit vectors of "
            "floating numbers, (…, d)."
        )
    _check(given, loc.shape[-1])
    concentration = torch.as_tensor(concentration, dtype=loc.dtype, device=loc.device)
    batch = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
    return loc.expand(*batch, loc.shape[-1]), concentration.expand(batch)


def _turned(loc: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x = μ cos θ + v sin θ, with v a tangent at μ at random.

    In its derivative the tangent moves with μ by the shortest rotation, which has no exceptional point: the derivative of
    Householder's reflection is infinite at one, and that of a projection has an infinite variance for d = 3.
    """
    here = loc.detach()
    tangent = torch.randn_like(here)
    for _ in range(2):  # what a first projection leaves to rounding matters where little else is left
        tangent = tangent - (tangent * here).sum(-1, keepdim=True) * here
        tangent = torch.nn.functional.normalize(tangent, dim=-1)
    along = (tangent * loc).sum(-1, keepdim=True) / (1.0 + (here * loc).sum(-1, keepdim=True))
    moved = tangent - along * (here + loc)
    return cos.unsqueeze(-1) * loc + sin.unsqueeze(-1) * moved


def _angle(kappa: Tensor, dimension: int) -> Tensor:
    """Angles from μ, drawn by Wood's rejection; all in (1 − cos θ) / 2, which keeps its digits where κ is large."""
    width = dimension - 1
    b = width / (2.0 * kappa + (4.0 * kappa.square() + width**2).sqrt())
    middle = b / (1.0 + b)  # the proposal's (1 − x₀) / 2
    near, far, is_drawn = torch.ones_like(kappa), torch.ones_like(kappa), torch.zeros_like(kappa, dtype=torch.bool)
    together = max(1, min(_PROPOSALS, _MEMORY // max(kappa.numel(), 1)))
    for _ in range(0, _PROPOSALS, together):
        many = kappa.unsqueeze(-1).expand(*kappa.shape, together)
        # (z, 1 − z) with z ~ Beta((d − 1)/2, (d − 1)/2), after Ulrich (1984)
        short = torch.rand_like(many) ** (2.0 / (dimension - 2)) if dimension > 2 else torch.zeros_like(many)
        long, turn = (1.0 - short).sqrt(), math.pi * torch.rand_like(many)
        edge = 0.5 * short / (1.0 + long)
        z, rest = b.unsqueeze(-1) * (edge + long * turn.cos().square()), edge + long * turn.sin().square()
        u, v, x = z / (rest + z), rest / (rest + z), middle.unsqueeze(-1)
        log_ratio = 2.0 * many * (x - u) + width * ((x + u - 2.0 * x * u) / (2.0 * x * (1.0 - x))).log()
        is_taken = torch.rand_like(many).log() <= log_ratio
        first = is_taken.to(many.dtype).argmax(-1, keepdim=True)
        near = torch.where(is_drawn, near, u.gather(-1, first).squeeze(-1))
        far = torch.where(is_drawn, far, v.gather(-1, first).squeeze(-1))
        is_drawn = is_drawn | is_taken.any(-1)
    return 2.0 * torch.atan2(near.sqrt(), far.sqrt())


@functools.cache
def _gauss() -> tuple[tuple[float, ...], tuple[float, ...]]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return tuple(0.5 * (nodes + 1.0)), tuple(0.5 * weights)


def _slope(angle: Tensor, kappa: Tensor, dimension: int) -> Tensor:
    """dθ/dκ at a fixed quantile of p(θ) ∝ exp(κ cos θ) sin^(d−2) θ = exp h(θ).

        dθ/dκ = −∫_0^θ (cos φ − A(κ)) exp(h(φ) − h(θ)) dφ = ∫_θ^π (same) dφ

    of which the integral away from the mode has an integrand that falls. In w = sin(φ/2) h is concave, with a curvature that
    is known: the integral ends where it has fallen to the rounding.
    """
    power, finfo = dimension - 2, torch.finfo(angle.dtype)
    w = (0.5 * angle).sin().detach().clamp(finfo.tiny**0.25, 1.0 - finfo.eps)
    strength = kappa.detach()
    rise = -4.0 * strength * w + power * (1.0 / w - w / (1.0 - w.square()))
    is_below = rise > 0.0
    cap = (1.0 + w.square()) / (1.0 - w.square()).square()
    curvature = 4.0 * strength + power * (1.0 + torch.where(is_below, 1.0 / w.square(), cap)) + 1.0
    fall = -math.log(finfo.eps) + 4.0
    reach = 2.0 * fall / (rise.abs() + (rise.square() + 2.0 * curvature * fall).sqrt())
    end = 2.0 * torch.where(is_below, w - reach, w + reach).clamp(0.0, 1.0).asin()
    nodes, weights = (torch.tensor(part, dtype=angle.dtype, device=angle.device) for part in _gauss())
    length = end - angle
    y = length.unsqueeze(-1) * nodes
    phi = angle.unsqueeze(-1) + y
    change = -2.0 * kappa.unsqueeze(-1) * (angle.unsqueeze(-1) + 0.5 * y).sin() * (0.5 * y).sin()
    if power:
        change = change + power * (
            phi.sin().clamp(min=finfo.tiny).log() - angle.sin().clamp(min=finfo.tiny).log().unsqueeze(-1)
        )
    offset = tilted(kappa, dimension).rest.unsqueeze(-1) - 2.0 * (0.5 * phi).sin().square()  # cos φ − A
    return length * (weights * offset * change.exp()).sum(-1)


class _Quantile(torch.autograd.Function):
    """The angle as a function of κ, at a fixed quantile."""

    generate_vmap_rule = True

    @staticmethod
    def forward(angle: Tensor, kappa: Tensor, dimension: int) -> Tensor:
        return angle.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, kappa, ctx.dimension = inputs
        ctx.save_for_backward(output, kappa)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        angle, kappa = ctx.saved_tensors
        return None, grad * _slope(angle, kappa, ctx.dimension), None


def _to_uniform(p: VonMisesFisher | PowerSpherical) -> Tensor:
    """Divergence from the uniform distribution, without differences of large numbers."""
    kappa = p.concentration
    if isinstance(p, PowerSpherical):
        highest, fall = p._normaliser
        return highest - kappa * fall
    found = p._tilted
    return torch.where(kappa < 1.0, kappa * found.mean - found.log_normaliser, -kappa * found.rest - found.excess)


@register_kl(VonMisesFisher, HypersphericalUniform)
@register_kl(PowerSpherical, HypersphericalUniform)
def _(p: VonMisesFisher | PowerSpherical, q: HypersphericalUniform) -> Tensor:
    return _to_uniform(p).expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(VonMisesFisher, VonMisesFisher)
@register_kl(PowerSpherical, VonMisesFisher)
def _(p: VonMisesFisher | PowerSpherical, q: VonMisesFisher) -> Tensor:
    """E log q, relative to the uniform distribution, needs no more of p than its mean."""
    rest = p._tilted.rest if isinstance(p, VonMisesFisher) else 2.0 * p._half / (p.concentration + 2.0 * p._half)
    near = 1.0 - 0.5 * (p.loc - q.loc).square().sum(-1)  # μ_pᵀ μ_q
    return _to_uniform(p) - q.concentration * (near - 1.0 - rest * near) + q._tilted.excess


@register_kl(HypersphericalUniform, VonMisesFisher)
def _(p: HypersphericalUniform, q: VonMisesFisher) -> Tensor:
    return q._tilted.log_normaliser.expand(torch.broadcast_shapes(p.batch_shape, q.batch_shape))


@register_kl(HypersphericalUniform, HypersphericalUniform)
def _(p: HypersphericalUniform, q: HypersphericalUniform) -> Tensor:
    return p.entropy().new_zeros(torch.broadcast_shapes(p.batch_shape, q.batch_shape))
