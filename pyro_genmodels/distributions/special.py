"""Special functions that torch lacks, or has not for large arguments, for small ones or in float32."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Tilted", "langevin", "log1mexp", "log_gamma_ratio", "log_sinhc", "tilted"]

_LEAST_ORDER = 18.0  # from which Debye's series is good to 1e-13, with this many terms
_TERMS = 10
_SHIFT = 10  # steps of the recurrence of Γ, after which Stirling's series is good to 1e-14, with the terms below
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360)  # B_2k / (2k (2k − 1)), k = 1, 2, …
_LOG_SINHC = (1 / 6, -1 / 180, 1 / 2835, -1 / 37800, 1 / 467775, -691 / 3831077250)


class Tilted(NamedTuple):
    """The uniform distribution on a sphere of R^d, tilted by exp(κ t), where t is one coordinate.

    Attributes:
        log_normaliser: log E exp(κ t), under the uniform distribution.
        excess: log E exp(κ t) − κ, which stays of the order of log κ.
        mean: E t under the tilted distribution, A(κ).
        rest: 1 − A(κ), which is not lost to rounding where κ is large.
    """

    log_normaliser: Tensor
    excess: Tensor
    mean: Tensor
    rest: Tensor


def tilted(kappa: Tensor, dimension: int) -> Tilted:
    """Normaliser and mean of exp(κ t) on the sphere of R^d.

    With ν = d/2 − 1, E exp(κ t) = Γ(ν + 1) (2/κ)^ν I_ν(κ) and A(κ) = I_{ν+1}(κ) / I_ν(κ). Debye's series, which is uniform
    in κ, gives them at an order of 18 or more; recurrences of positive terms, in which the powers of κ have cancelled, lead
    down to ν. Good to 1e-12 in float64, for every κ ≥ 0 and every d; smooth at κ = 0.

    Args:
        kappa: κ ≥ 0.
        dimension: d, at least 2.

    References:
        F. Olver, Asymptotics and Special Functions (1974), chapter 10, section 7.
        D. Amos, Computation of modified Bessel functions and their ratios (1974).
    """
    order = 0.5 * dimension - 1.0
    steps = max(0, math.ceil(_LEAST_ORDER - order))
    top = order + steps
    series, slope, constant = _debye(top)
    root = (top**2 + kappa.square()).sqrt()
    p = top / root
    g = 1.0 + _polynomial(p, series)
    own = kappa.square() / (root + top)  # √(M² + κ²) − M
    shared = g.log() - constant - 0.25 * torch.log1p((kappa / top).square()) - top * torch.log1p(own / (2.0 * top))
    is_small = kappa < top
    excess = torch.where(is_small, own - kappa, top**2 / (root + kappa) - top) + shared
    log_normaliser = own + shared
    bend = 0.5 / root.square() + top / root**3 * _polynomial(p, slope) / g
    ratio = 1.0 / (top + root) - bend  # A / κ
    rest = (top + top**2 / (root + kappa)) / (top + root) + kappa * bend
    for step in range(steps, 0, -1):
        twice = 2.0 * (order + step)
        term = kappa.square() * ratio
        growth = torch.log1p(term / twice)
        log_normaliser, excess = log_normaliser + growth, excess + growth
        ratio, rest = 1.0 / (twice + term), (twice - kappa * rest) / (twice + term)
    return Tilted(log_normaliser, excess, torch.where(is_small, kappa * ratio, 1.0 - rest), rest)


@functools.cache
def _debye(order: float) -> tuple[tuple[float, ...], tuple[float, ...], float]:
    """Coefficients of Σ_k U_k(p) / M^k and of its derivative, for k ≥ 1, and the logarithm of 1 + the sum at p = 1.

    U_{k+1}(p) = ½ p² (1 − p²) U_k'(p) + ⅛ ∫_0^p (1 − 5 s²) U_k(s) ds
    """
    polynomial, total = [Fraction(1)], [0.0] * (3 * _TERMS + 1)
    for k in range(1, _TERMS + 1):
        following = [Fraction(0)] * (len(polynomial) + 3)
        for i, c in enumerate(polynomial):
            following[i + 1] += c * Fraction(i, 2) + c / (8 * (i + 1))
            following[i + 3] -= c * Fraction(i, 2) + 5 * c / (8 * (i + 3))
        polynomial = following
        for i, c in enumerate(polynomial):
            total[i] += float(c) / order**k
    return tuple(total), tuple(i * c for i, c in enumerate(total))[1:], math.log1p(math.fsum(total))


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule."""
    value = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        value = value * x + c
    return value


def log_gamma_ratio(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """log Γ(a + b) − log Γ(a), and its derivative in a, without the difference of large numbers.

    Args:
        a: Positive.
        b: At least 0.
    """
    value, slope = torch.zeros_like(a + b), torch.zeros_like(a + b)
    for step in range(_SHIFT):
        value = value - torch.log1p(b / (a + step))
        slope = slope + b / ((a + step) * (a + b + step))
    low, high = a + _SHIFT, a + b + _SHIFT
    growth = torch.log1p(b / low)
    value = value + (low - 0.5) * growth + b * high.log() - b
    slope = slope + growth + 0.5 * b / (low * high)
    for k, c in enumerate(_STIRLING):
        value = value + c * (high ** -(2 * k + 1) - low ** -(2 * k + 1))
        slope = slope - c * (2 * k + 1) * (high ** -(2 * k + 2) - low ** -(2 * k + 2))
    return value, slope


def log1mexp(y: Tensor) -> Tensor:
    """log(1 − exp(y)), y < 0.

    References:
        M. Mächler, Accurately computing log(1 − exp(−|a|)) (2012).
    """
    is_near = y > -math.log(2.0)
    near, far = torch.where(is_near, y, -1.0), torch.where(is_near, -1.0, y)
    return torch.where(is_near, (-torch.expm1(near)).log(), torch.log1p(-far.exp()))


def log_sinhc(y: Tensor) -> Tensor:
    """log(sinh(y) / y), an even function; 0 at 0."""
    y = y.abs()
    is_small = y < 0.3
    square = torch.where(is_small, y, 0.0).square()
    series = square * _polynomial(square, _LOG_SINHC)
    large = torch.where(is_small, 1.0, y)
    return torch.where(is_small, series, large + torch.log1p(-(-2.0 * large).exp()) - (2.0 * large).log())


def langevin(y: Tensor) -> Tensor:
    """coth y − 1/y, the derivative of ``log_sinhc``; 0 at 0."""
    is_small = y.abs() < 0.3
    small, large = torch.where(is_small, y, 0.0), torch.where(is_small, 1.0, y)
    series = small * _polynomial(small.square(), tuple(2 * (n + 1) * c for n, c in enumerate(_LOG_SINHC)))
    return torch.where(is_small, series, 1.0 / large.tanh() - 1.0 / large)
