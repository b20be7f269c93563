"""Draws from Pólya-Gamma distributions, the mixing distributions behind logistic likelihoods.

ω ~ PG(b, z) is an infinite sum of gammas,

    ω = 1 / (2π²) Σ_k g_k / ((k − ½)² + z² / (4π²)),   g_k ~ Gamma(b, 1),   k = 1, 2, …

with E ω = b tanh(z / 2) / (2 z) and Laplace transform E exp(−t ω) = (cosh(z / 2) / cosh(√(z² / 2 + t) / √2))^b.

PG(1, z) is drawn exactly, by rejection with an alternating series for its density (Devroye). A sum of b of them is PG(b, z)
for small whole b. For all other b the first terms of the sum are drawn, and the tail, of known mean and variance, by one
gamma of these: what differs are the tail's third and higher cumulants, 10⁻⁹ and less of those of ω.

References:
    N. Polson, J. Scott and J. Windle, Bayesian inference for logistic models using Pólya-Gamma latent variables (2013).
    L. Devroye, On exact simulation algorithms for some distributions related to Jacobi theta functions (2009).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["draw", "mean", "variance"]

SPLIT = 0.64  # where the two series of Devroye's density meet
MOST_SUMMANDS = 6  # whole b up to here are sums of exact draws; beyond, the sum of gammas costs less
TERMS = 40
_LARGEST = 1e6  # |z| beyond which no float64 density tells the difference


def mean(b: Tensor, z: Tensor) -> Tensor:
    """E ω = b tanh(z / 2) / (2 z), b / 4 at 0."""
    half = 0.5 * z.abs()
    series = 1.0 - half.square() / 3.0 + 2.0 * half.pow(4) / 15.0
    return 0.25 * b * torch.where(half < 1e-2, series, half.tanh() / half.clamp(min=1e-2))


def variance(b: Tensor, z: Tensor) -> Tensor:
    """Var ω = b (sinh z − z) / (4 z³ cosh²(z / 2)), b / 24 at 0."""
    z = z.abs()
    safe = z.clamp(min=0.1)
    # sinh z / cosh² (z / 2) = 2 tanh (z / 2), and 1 / cosh² = 1 − tanh²
    tanh = (0.5 * safe).tanh()
    exact = (2.0 * tanh - safe * (1.0 - tanh.square())) / (4.0 * safe.pow(3))
    series = (1.0 / 24.0) * (1.0 - z.square() / 5.0 + 17.0 * z.pow(4) / 560.0 - 31.0 * z.pow(6) / 7560.0)
    return b * torch.where(z < 0.1, series, exact)


def draw(b: Tensor, z: Tensor) -> Tensor:
    """One draw from PG(b, z) for every element; 0 where b is 0.

    Args:
        b: At least 0.
        z: Real, of the same shape.
    """
    b, z = torch.broadcast_tensors(b, z)
    shape, b = z.shape, b.reshape(-1).nan_to_num(nan=0.0, posinf=0.0)
    z = z.reshape(-1).abs().nan_to_num(nan=0.0).clamp(max=_LARGEST)  # a rejected proposal must not run for ever
    drawn = torch.zeros_like(z)
    is_summed = (b == b.round()) & (b <= MOST_SUMMANDS)
    for i in range(MOST_SUMMANDS):
        which = (is_summed & (b > i)).nonzero().squeeze(-1)
        if len(which):
            drawn = drawn.index_add(0, which, _draw_one(z[which]))
    which = (~is_summed & (b > 0)).nonzero().squeeze(-1)
    if len(which):
        drawn = drawn.index_add(0, which, _draw_sum(b[which], z[which]))
    return drawn.reshape(shape)


def _draw_sum(b: Tensor, z: Tensor) -> Tensor:
    """The first terms of the sum of gammas, and a gamma with the mean and the variance of the others; all (n,)."""
    k = torch.arange(1, TERMS + 1, dtype=z.dtype, device=z.device) - 0.5
    weights = 1.0 / (2.0 * math.pi**2 * (k.square() + (z / (2.0 * math.pi)).square().unsqueeze(-1)))
    head = (weights * torch._standard_gamma(b.unsqueeze(-1).expand_as(weights).contiguous())).sum(-1)
    first, second = mean(b, z) - b * weights.sum(-1), variance(b, z) - b * weights.square().sum(-1)
    tiny = torch.finfo(z.dtype).tiny
    first, second = first.clamp(min=tiny), second.clamp(min=tiny)
    return head + torch._standard_gamma((first.square() / second).contiguous()) * second / first


def _draw_one(z: Tensor) -> Tensor:
    """PG(1, z) by rejection, (n,): a quarter of J*(1, z / 2), in Devroye's notation."""
    half = 0.5 * z
    rate = math.pi**2 / 8.0 + 0.5 * half.square()
    log_right = math.log(math.pi / 2.0) - rate.log() - rate * SPLIT
    root = math.sqrt(1.0 / SPLIT)
    log_left = (
        math.log(2.0)
        - half
        + torch.logaddexp(
            torch.special.log_ndtr(root * (SPLIT * half - 1.0)),
            2.0 * half + torch.special.log_ndtr(-root * (SPLIT * half + 1.0)),
        )
    )
    share = torch.sigmoid(log_right - log_left)
    found = torch.zeros_like(z)
    pending = torch.arange(len(z), device=z.device)
    goes_right = torch.rand_like(z) < share
    while len(pending):
        right, tilt = goes_right[pending], half[pending]
        tail = SPLIT + torch.empty_like(tilt).exponential_() / rate[pending]
        body, is_inside = _inverse_gaussian(tilt)
        proposal = torch.where(right, tail, body)
        is_proposed = right | is_inside
        accepted = is_proposed & _accept(proposal)
        found = found.index_copy(0, pending[accepted], proposal[accepted])
        redraw = is_proposed & ~accepted  # the side stays as it is until there is a proposal from it
        goes_right[pending[redraw]] = torch.rand_like(tilt[redraw]) < share[pending[redraw]]
        pending = pending[~accepted]
    return 0.25 * found


def _inverse_gaussian(tilt: Tensor) -> tuple[Tensor, Tensor]:
    """Proposals for an inverse Gaussian of mean 1 / tilt and shape 1, cut off at SPLIT, and whether to keep them."""
    # mean beyond the cut: 1 / χ² truncated, tilted by rejection
    first, second = (torch.empty_like(tilt).exponential_() for _ in range(2))
    far = SPLIT / (1.0 + SPLIT * first).square()
    keeps_far = (first.square() <= 2.0 * second / SPLIT) & (torch.rand_like(tilt) < (-0.5 * tilt.square() * far).exp())
    # mean inside: Michael, Schucany and Haas, until it is inside
    average = 1.0 / tilt.clamp(min=1.0)
    square = torch.randn_like(tilt).square()
    scaled = average * square
    root = average * (1.0 + 0.5 * scaled - 0.5 * (4.0 * scaled + scaled.square()).sqrt())
    near = torch.where(torch.rand_like(tilt) <= average / (average + root), root, average.square() / root)
    is_far = tilt * SPLIT < 1.0
    return torch.where(is_far, far, near), torch.where(is_far, keeps_far, near < SPLIT)


def _accept(x: Tensor) -> Tensor:
    """Whether a uniform lies below the ratio of the density to its first term, by partial sums from both sides."""
    first = _coefficient(0, x)
    level, total = torch.rand_like(x) * first, first
    accepted, decided = torch.zeros_like(x, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool)
    for n in range(1, 64):  # the terms fall faster than geometrically: two or three decide
        term = _coefficient(n, x)
        total = total - term if n % 2 else total + term
        is_now = ~decided & (level <= total if n % 2 else level > total)
        accepted = accepted | (is_now & bool(n % 2))
        decided = decided | is_now
        if bool(decided.all()):
            break
    return accepted


def _coefficient(n: int, x: Tensor) -> Tensor:
    """Term n of the alternating series for the density of J*(1, 0) at x."""
    half = n + 0.5
    left = (2.0 / (math.pi * x)).pow(1.5) * (-2.0 * half**2 / x).exp()
    right = (-0.5 * half**2 * math.pi**2 * x).exp()
    return math.pi * half * torch.where(x <= SPLIT, left, right)
