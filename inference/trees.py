"""The No-U-Turn kernel: trajectories that double until they turn back, all chains at once.

Every chain grows a tree of its own; one leapfrog step of all of them is one call of the density, and chains that are done
stand still while others go on. Trees are built leaf by leaf: what the recursive form keeps on its stack is the first leaf
of every unfinished subtree, and since all chains are at the same leaf of the same doubling, that stack is a list.

References:
    M. Hoffman and A. Gelman, The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (2014).
    M. Betancourt, A conceptual introduction to Hamiltonian Monte Carlo (2017): multinomial weights, the criterion.
    D. Phan, N. Pradhan and M. Jankowiak, Composable effects for flexible and accelerated probabilistic programming in
        NumPyro (2019): the iterative form.
    J. Lao et al., tfp.mcmc: Modern Markov chain Monte Carlo tools built for modern hardware (2020): many chains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from inference.mcmc import DIVERGENT, Gradient, HamiltonianState, pulled, pushed, served

__all__ = ["TreeInfo", "TreeKernel", "turns"]


class TreeInfo(NamedTuple):
    """What a tree was, (chain,) each; names are ArviZ's.

    Attributes:
        acceptance_rate: Mean over its leaves of the probability of accepting one.
        diverging: Whether the energy rose beyond all bounds.
        energy: Of the point that was chosen.
        n_steps: Leapfrog steps.
        step_size: ε.
        tree_depth: Doublings.
        reached_max_treedepth: Whether it was still growing when there were ``max_depth`` of them.
    """

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    n_steps: Tensor
    step_size: Tensor
    tree_depth: Tensor
    reached_max_treedepth: Tensor


class _Leaf(NamedTuple):
    """A point of a trajectory: position, momentum and gradient (chain, D), log_density (chain,)."""

    position: Tensor
    momentum: Tensor
    gradient: Tensor
    log_density: Tensor

    @property
    def energy(self) -> Tensor:
        return 0.5 * self.momentum.square().sum(-1) - self.log_density


class _Branch(NamedTuple):
    """A subtree: its last leaf, a leaf chosen by weight, log of the sum of weights, sum of momenta; whether it is whole.

    ``is_whole`` is False where it diverged or turned within: none of it may be chosen. ``rate`` is the sum of acceptance
    probabilities over ``n_steps`` leaves.
    """

    end: _Leaf
    chosen: _Leaf
    log_weight: Tensor
    total: Tensor
    is_whole: Tensor
    diverging: Tensor
    rate: Tensor
    n_steps: Tensor


def _where(mask: Tensor, left: _Leaf, right: _Leaf) -> _Leaf:
    wide = mask.unsqueeze(-1)
    pairs = zip(left, right, strict=True)
    return _Leaf(*(torch.where(wide if a.dim() == 2 else mask, a, b) for a, b in pairs))


def turns(first: Tensor, last: Tensor, total: Tensor) -> Tensor:
    """Whether a stretch of a trajectory turns back on itself, (chain,), from its momenta in whitened coordinates.

    Its ends no longer move apart along the way between them, which is the integral of the momenta by the trapezoidal
    rule: their sum less half of the ends.

    Args:
        first: Momentum at one end, (chain, D).
        last: Momentum at the other end, (chain, D).
        total: Sum of the momenta of all its leaves, both ends among them, (chain, D).
    """
    way = total - 0.5 * (first + last)
    return ((first * way).sum(-1) <= 0) | ((last * way).sum(-1) <= 0)


@dataclass(frozen=True)
class TreeKernel:
    """One trajectory of the No-U-Turn sampler, a point of which is chosen by weight exp(−energy).

    Args:
        step_size: ε, a scalar, or (group,).
        scale: What whitens the coordinates: standard deviations (D,), or a factor L (D, D) of the covariance L Lᵀ, of
            groups as ``pushed`` takes them.
        max_depth: Doublings at most; the trajectory has 2^max_depth − 1 steps then.
    """

    step_size: Tensor
    scale: Tensor
    max_depth: int = 10

    def init(self, position: Tensor, density: Gradient) -> HamiltonianState:
        """The state of chains at these positions."""
        gradient, log_density = density(position)
        return HamiltonianState(position, log_density, gradient)

    def step(self, state: HamiltonianState, density: Gradient) -> tuple[HamiltonianState, TreeInfo]:
        """One trajectory of every chain, doubled until it turns."""
        root = _Leaf(state.position, torch.randn_like(state.position), state.gradient, state.log_density)
        energy = root.energy
        left = right = chosen = root
        total, log_weight = root.momentum, torch.zeros_like(energy)
        rate, n_steps = torch.zeros_like(energy), torch.zeros_like(energy, dtype=torch.int64)
        depth, diverging = n_steps, torch.zeros_like(energy, dtype=torch.bool)
        grows = ~diverging
        for level in range(self.max_depth):
            is_right = torch.rand_like(energy) < 0.5
            branch = self._grow(_where(is_right, right, left), is_right, level, energy, grows, density)
            rate, n_steps, diverging = rate + branch.rate, n_steps + branch.n_steps, diverging | branch.diverging
            depth = depth + grows.long()
            grows = grows & branch.is_whole
            # biased towards the new half, which is further away: at stationarity both orders weigh the same
            taken = grows & (torch.rand_like(energy).log() < branch.log_weight - log_weight)
            chosen = _where(taken, branch.chosen, chosen)
            log_weight = torch.where(grows, torch.logaddexp(log_weight, branch.log_weight), log_weight)
            total = torch.where(grows.unsqueeze(-1), total + branch.total, total)
            right = _where(grows & is_right, branch.end, right)
            left = _where(grows & ~is_right, branch.end, left)
            grows = grows & ~turns(left.momentum, right.momentum, total)
            if not bool(grows.any()):
                break
        info = TreeInfo(
            acceptance_rate=rate / n_steps,
            diverging=diverging,
            energy=chosen.energy,
            n_steps=n_steps,
            step_size=served(self.step_size, len(energy)).reshape(-1).expand_as(energy),
            tree_depth=depth,
            reached_max_treedepth=grows,
        )
        return HamiltonianState(chosen.position, chosen.log_density, chosen.gradient), info

    def _grow(self, edge: _Leaf, is_right: Tensor, level: int, energy: Tensor, grows: Tensor, density: Gradient) -> _Branch:
        """2^level leaves beyond an edge of the tree, of those chains that grow."""
        step_size = served(self.step_size, len(energy))
        step = torch.where(is_right.unsqueeze(-1), step_size, -step_size)
        end = chosen = edge
        total, log_weight = torch.zeros_like(edge.momentum), torch.full_like(energy, -math.inf)
        rate, n_steps = torch.zeros_like(energy), torch.zeros_like(energy, dtype=torch.int64)
        diverging = torch.zeros_like(grows)
        firsts: list[tuple[Tensor, Tensor]] = []  # of unfinished subtrees: momentum of the first leaf, sum up to it
        for leaf in range(2**level):
            end = _where(grows, self._leapfrog(end, step, density), end)
            error = (end.energy - energy).nan_to_num(nan=math.inf, posinf=math.inf)
            rate = rate + torch.where(grows, (-error).clamp(max=0.0).exp(), 0.0)
            n_steps = n_steps + grows.long()
            diverging = diverging | (grows & (error > DIVERGENT))
            grows = grows & ~diverging
            sum_weight = torch.logaddexp(log_weight, -error)
            taken = grows & (torch.rand_like(energy).log() < -error - sum_weight)
            chosen = _where(taken, end, chosen)
            log_weight = torch.where(grows, sum_weight, log_weight)
            total = total + end.momentum
            if leaf % 2 == 0:
                firsts.append((end.momentum, total))
            else:
                done = ((leaf + 1) & -(leaf + 1)).bit_length() - 1  # subtrees of 2, 4, … 2^done leaves end here
                for momentum, before in firsts[-done:]:
                    grows = grows & ~turns(momentum, end.momentum, total - before + momentum)
                del firsts[len(firsts) - done + 1 :]
            if not bool(grows.any()):
                break
        return _Branch(end, chosen, log_weight, total, grows, diverging, rate, n_steps)

    def _leapfrog(self, leaf: _Leaf, step: Tensor, density: Gradient) -> _Leaf:
        """One step; ``step`` (chain, 1) is negative where time runs backwards."""
        momentum = leaf.momentum + 0.5 * step * pulled(leaf.gradient, self.scale)
        position = leaf.position + step * pushed(momentum, self.scale)
        gradient, log_density = density(position)
        return _Leaf(position, momentum + 0.5 * step * pulled(gradient, self.scale), gradient, log_density)
