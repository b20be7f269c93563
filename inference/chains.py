"""Jointly normal sites in a row, each coupled to its neighbours: block tridiagonal precisions in logarithmic depth.

Every other block is conditioned on its two neighbours and integrated out, all of them at once, until one is left (cyclic
reduction). With P_oo = L Lᵀ for an odd block o, W = L⁻¹ P_oe for its even neighbours e, and a right-hand side r,

    P'_ee = P_ee − Σ WᵀW,    r'_e = r_e − Σ Wᵀ y_o,    y_o = L⁻¹ r_o,

and back again x_o = L⁻ᵀ (y_o + z_o − Σ W x_e), where z is 0 for the mean and standard normal for a draw.

References:
    R. Sweet, A cyclic reduction algorithm for solving block tridiagonal systems of arbitrary dimension (1977).
    H. Rue and L. Held, Gaussian Markov random fields (2005).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from inference.conditionals import Conditional, Points
from inference.messages import Family

__all__ = ["FEWEST", "LAGS", "Chain", "ChainConditional", "Layout", "Tridiagonal"]

FEWEST = 16  # sites in a row that are tried together
LAGS = (1, 2, 4)  # sites back to which a site of a chain may be coupled


class _Level(NamedTuple):
    """The odd blocks of a reduction: their factors L, and L⁻¹ times their couplings to the left and to the right."""

    factor: Tensor
    left: Tensor
    right: Tensor


def _solved(factor: Tensor, right: Tensor, *, transposed: bool = False) -> Tensor:
    """L⁻¹ right, or L⁻ᵀ right."""
    if factor.shape[-1] == 1:
        return right / factor
    return torch.linalg.solve_triangular(factor.mT if transposed else factor, right, upper=transposed)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return left * right if left.shape[-1] == 1 else left @ right


class Tridiagonal:
    """A block tridiagonal precision P, factored.

    Args:
        diagonal: P_tt, (…, time, width, width).
        lower: P_{t+1,t}, (…, time − 1, width, width).

    Attributes:
        is_positive: Whether it is positive definite, (…); what is not is replaced by something that is.
    """

    def __init__(self, diagonal: Tensor, lower: Tensor) -> None:
        self.diagonal, self.lower = diagonal, lower
        self.is_positive = torch.ones(diagonal.shape[:-3], dtype=torch.bool, device=diagonal.device)
        self.levels: list[_Level] = []
        while diagonal.shape[-3] > 1:
            factor = self._factor(diagonal[..., 1::2, :, :])
            count, evens = factor.shape[-3], (diagonal.shape[-3] + 1) // 2
            to_left, to_right = lower[..., 0::2, :, :], lower[..., 1::2, :, :].mT
            if to_right.shape[-3] < count:  # the last block has no neighbour on its right
                to_right = torch.cat([to_right, torch.zeros_like(to_left[..., :1, :, :])], -3)
            left, right = _solved(factor, to_left), _solved(factor, to_right)
            self.levels.append(_Level(factor, left, right))
            diagonal = diagonal[..., 0::2, :, :] - _spread(_product(left.mT, left), _product(right.mT, right), evens)
            lower = -_product(right.mT, left)[..., : evens - 1, :, :]
        self.levels.append(_Level(self._factor(diagonal), diagonal, diagonal))

    def _factor(self, blocks: Tensor) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(blocks)
        is_good = (failed == 0) & factor.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        self.is_positive = self.is_positive & is_good.all(-1)
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        return torch.where(is_good[..., None, None], factor, eye)

    @cached_property
    def log_determinant(self) -> Tensor:
        """log |P|, (…)."""
        parts = [level.factor.diagonal(dim1=-2, dim2=-1).log().sum((-2, -1)) for level in self.levels]
        return 2.0 * torch.stack(parts).sum(0)

    def times(self, x: Tensor) -> Tensor:
        """P x of vectors (…, time, width)."""
        x = x.unsqueeze(-1)
        below = _product(self.lower, x[..., :-1, :, :])
        above = _product(self.lower.mT, x[..., 1:, :, :])
        zero = torch.zeros_like(x[..., :1, :, :])
        return (_product(self.diagonal, x) + torch.cat([zero, below], -3) + torch.cat([above, zero], -3)).squeeze(-1)

    def solve(self, right: Tensor) -> Tensor:
        """P⁻¹ right of vectors (…, time, width)."""
        right, ys = right.unsqueeze(-1), []
        for level in self.levels[:-1]:
            y = _solved(level.factor, right[..., 1::2, :, :])
            ys.append(y)
            evens = (right.shape[-3] + 1) // 2
            spread = _spread(_product(level.left.mT, y), _product(level.right.mT, y), evens)
            right = right[..., 0::2, :, :] - spread
        ys.append(_solved(self.levels[-1].factor, right))
        return self._back(lambda number, left, right: ys[number]).squeeze(-1)

    def sample(self) -> Tensor:
        """A draw of N(0, P⁻¹), (…, time, width)."""

        def noise(number: int, left: Tensor | None, right: Tensor | None) -> Tensor:
            return torch.randn_like(self.levels[number].factor[..., :1])

        return self._back(noise).squeeze(-1)

    def points(self) -> Tensor:
        """Few vectors with Σ_s x_s x_sᵀ as in P⁻¹ for each block and each pair of neighbours, (…, time, width, vector).

        Each block is a combination of its two neighbours and of a remainder that is orthogonal to them. Vectors of
        three times the width have room for that; neighbours of every level of the reduction are as they have to be.
        """
        width = self.diagonal.shape[-1]

        def noise(number: int, left: Tensor | None, right: Tensor | None) -> Tensor:
            factor = self.levels[number].factor
            if left is None or right is None:
                eye = torch.eye(width, 3 * width, dtype=factor.dtype, device=factor.device)
                return eye.expand(*factor.shape[:-1], 3 * width)
            basis = torch.linalg.qr(torch.cat([left, right], -2).mT, mode="complete")[0]
            return basis[..., 2 * width :].mT

        return self._back(noise)

    def _back(self, noise: Callable[[int, Tensor | None, Tensor | None], Tensor]) -> Tensor:
        """x, from the last level to the first; ``noise`` gives y + z of a level, given x left and right of it."""
        last = len(self.levels) - 1
        x = _solved(self.levels[last].factor, noise(last, None, None), transposed=True)
        for number in range(last - 1, -1, -1):
            level = self.levels[number]
            count = level.factor.shape[-3]
            left, right = x[..., :count, :, :], x[..., 1 : count + 1, :, :]
            if right.shape[-3] < count:
                right = torch.cat([right, torch.zeros_like(x[..., :1, :, :])], -3)
            odd = noise(number, left, right) - _product(level.left, left) - _product(level.right, right)
            odd = _solved(level.factor, odd, transposed=True)
            evens = x.shape[-3]
            both = torch.stack([x[..., :count, :, :], odd], -3).flatten(-4, -3)
            x = both if evens == count else torch.cat([both, x[..., count:, :, :]], -3)
        return x


def _spread(left: Tensor, right: Tensor, evens: int) -> Tensor:
    """What odd blocks give to the even ones on their left and on their right, summed; (…, even, ·, ·)."""
    zero = torch.zeros_like(left[..., :1, :, :])
    count = left.shape[-3]
    to_left = left if count == evens else torch.cat([left, zero], -3)
    to_right = torch.cat([zero, right], -3)[..., :evens, :, :]
    return to_left + to_right


class Layout(NamedTuple):
    """How a stack of elements is cut into blocks: ``blocks`` of ``width`` elements, the last one padded."""

    shape: torch.Size
    width: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.shape.numel()

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.size // self.width)

    def cut(self, value: Tensor, filling: float = 0.0) -> Tensor:
        """(…, *shape) -> (…, block, width)."""
        value = value.reshape(*value.shape[: value.dim() - len(self.shape)], self.size)
        short = self.blocks * self.width - self.size
        if short:
            value = torch.cat([value, value.new_full((*value.shape[:-1], short), filling)], -1)
        return value.unflatten(-1, (self.blocks, self.width))

    def joined(self, value: Tensor) -> Tensor:
        """(…, block, width) -> (…, *shape)."""
        return value.flatten(-2)[..., : self.size].unflatten(-1, self.shape)


@dataclass(frozen=True)
class ChainConditional(Conditional):
    """Joint normals in a row: ``mean`` (chain, block, width), their precision, and how the elements are cut into blocks."""

    mean: Tensor
    precision: Tridiagonal
    layout: Layout

    @property
    def is_proper(self) -> Tensor:
        return self.precision.is_positive & self.mean.flatten(1).isfinite().all(-1)

    def sample(self) -> Tensor:
        return self.layout.joined(self.mean + self.precision.sample())

    def log_kernel(self, value: Tensor) -> Tensor:
        away = self.layout.cut(value) - self.mean  # 0 in the padding
        return -0.5 * (away * self.precision.times(away)).flatten(1).sum(-1)

    def log_normaliser(self) -> Tensor:
        return 0.5 * (self.layout.size * math.log(2 * math.pi) - self.precision.log_determinant)

    def mode(self) -> Tensor:
        return self.layout.joined(torch.where(self.precision.is_positive[:, None, None], self.mean, torch.nan))

    def points(self) -> Points:
        tiny = torch.finfo(self.mean.dtype).tiny
        sd = self.precision.diagonal.diagonal(dim1=-2, dim2=-1).clamp(min=tiny).rsqrt()
        return Points(self.layout.joined(self.mean), self.layout.joined(sd))

    def sigma(self) -> Tensor:
        """Points with the mean and, of neighbours, the covariance of the conditional, (chain, point, *site)."""
        vectors = self.precision.points()
        offsets = vectors.movedim(-1, 1) * math.sqrt(vectors.shape[-1])  # the mean of ± √W x_s has their sum as covariance
        mean = self.mean.unsqueeze(1)
        return self.layout.joined(torch.cat([mean + offsets, mean - offsets], 1))


class Chain(Family):
    """Joint normals of which each block of elements is coupled to the blocks before and after it only: g = P (mean − z).

    The precision has as many unknowns as a few gradients show: of every third block the same element is moved at once.

    Args:
        shape: Shape of the stack of sites.
        width: Elements of a block.
    """

    name = "Gaussian chain"

    def __init__(self, shape: torch.Size, width: int) -> None:
        self.layout = Layout(shape, width)

    def at(self, points: Points) -> Tensor:
        layout, width = self.layout, self.layout.width
        location, spread = layout.cut(points.location), layout.cut(points.spread)
        colour = torch.arange(layout.blocks * width, device=location.device) % (3 * width)
        moved = colour == torch.arange(3 * width, device=location.device)[:, None]
        moved = moved.reshape(3 * width, *(1,) * (location.dim() - 2), layout.blocks, width)
        steps = moved.to(location.dtype) * spread
        return layout.joined(torch.cat([location[None], location + steps]))

    def solve(self, at: Tensor, gradients: Tensor) -> ChainConditional:
        layout, width = self.layout, self.layout.width
        start, first = layout.cut(at[0]), layout.cut(gradients[0])
        changes = layout.cut(gradients[0] - gradients[1:]).unflatten(0, (3, width))  # (block % 3, column, chain, block, row)
        steps = layout.cut((at[1:] - at[0]).sum(0), 1.0)
        block = torch.arange(layout.blocks, device=at.device)

        def couplings(offset: int) -> Tensor:
            """P_{t,t+offset}, (chain, block, row, column)."""
            rows = block[max(0, -offset) : layout.blocks - max(0, offset)]
            found = changes[(rows + offset) % 3, :, :, rows, :]  # (block, column, chain, row)
            return found.permute(2, 0, 3, 1) / steps[:, rows + offset].unsqueeze(-2)

        diagonal = couplings(0)
        diagonal = 0.5 * (diagonal + diagonal.mT)
        padding = layout.blocks * width - layout.size
        if padding:
            unit = torch.zeros(layout.blocks, width, dtype=diagonal.dtype, device=diagonal.device)
            unit[-1, width - padding :] = 1.0
            diagonal = diagonal + torch.diag_embed(unit)
        precision = Tridiagonal(diagonal, 0.5 * (couplings(-1) + couplings(1).mT))
        return ChainConditional(start + precision.solve(first), precision, layout)
