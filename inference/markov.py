"""Finite Markov chains, exactly: a transition matrix P has P[i, j] = probability of going from state i to state j.

    reversible      π_i P_ij = π_j P_ji for all i, j      implies stationary
    stationary      π P = π                               holds of every step of a correct sampler

What a sampler does on a space of a few dozen states can be written down as such a matrix, and then there is nothing to be
estimated: a sampler is right to 10⁻¹² or it is wrong. A sweep is the product of the matrices of its updates.

References:
    J. Norris, Markov chains (1997).
    D. Levin, Y. Peres and E. Wilmer, Markov chains and mixing times (2009).
    L. Tierney, Markov chains for exploring posterior distributions (1994).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["conditional", "imbalance", "metropolis", "relaxation", "sample", "stationary", "total_variation"]

_ROUNDING = 1e-9


def _check(transitions: Tensor) -> Tensor:
    """The matrix in float64."""
    if transitions.dim() != 2 or transitions.shape[0] != transitions.shape[1]:
        raise ValueError(f"A transition matrix is square, but this one has the shape {tuple(transitions.shape)}.")
    matrix = transitions.to(torch.float64)
    if bool((matrix < -_ROUNDING).any()) or bool(((matrix.sum(1) - 1.0).abs() > _ROUNDING).any()):
        raise ValueError("A transition matrix has no negative entries, and every row of it sums to 1.")
    return matrix


def _check_law(law: Tensor, states: int) -> Tensor:
    """A distribution over the states, normalised, in float64."""
    if law.shape != (states,):
        raise ValueError(f"A law over {states} states has {states} entries, but this one has the shape {tuple(law.shape)}.")
    weights = law.to(torch.float64)
    if bool((weights < 0.0).any()) or not bool(weights.sum() > 0.0):
        raise ValueError("A law has no negative entries, and one that is positive.")
    return weights / weights.sum()


def stationary(transitions: Tensor) -> Tensor:
    """The law π with π P = π.

    Args:
        transitions: P, (state, state).

    Returns:
        (state,), float64.

    Raises:
        ValueError: If P is no transition matrix, or has more than one stationary law because it falls into parts.

    Example:
        >>> stationary(torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    matrix = _check(transitions)
    left, values, _ = torch.linalg.svd(matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device))
    if len(values) > 1 and float(values[-2]) < _ROUNDING:
        raise ValueError("The chain falls into parts that do not reach one another: it has more than one stationary law.")
    law = left[:, -1]
    return law / law.sum()


def imbalance(transitions: Tensor, law: Tensor) -> Tensor:
    """Largest |π_i P_ij − π_j P_ji|: 0 for a reversible chain, and then π is stationary.

    Args:
        transitions: P, (state, state).
        law: π, (state,), up to a factor.
    """
    matrix = _check(transitions)
    flow = _check_law(law, len(matrix)).unsqueeze(1) * matrix
    return (flow - flow.T).abs().max()


def metropolis(proposals: Tensor, law: Tensor) -> Tensor:
    """The Metropolis-Hastings chain: from i, j is proposed with probability Q_ij and taken with min(1, π_j Q_ji / π_i Q_ij).

    Args:
        proposals: Q, (state, state); equal rows make an independence sampler.
        law: π, (state,), up to a factor; states of probability 0 are left and never entered.

    Returns:
        P, (state, state), float64.
    """
    matrix = _check(proposals)
    weights = _check_law(law, len(matrix)).unsqueeze(1)
    forward = weights * matrix
    rate = torch.where(forward > 0.0, (forward.T / forward.clamp(min=torch.finfo(forward.dtype).tiny)).clamp(max=1.0), 1.0)
    rate = torch.where((weights == 0.0) & (weights.T == 0.0), 0.0, rate)
    moves = matrix * rate
    moves.fill_diagonal_(0.0)
    return moves + torch.diag(1.0 - moves.sum(1))


def conditional(law: Tensor, axis: int) -> Tensor:
    """The Gibbs update of one coordinate: it is drawn from its conditional given all others.

    Args:
        law: Joint probabilities up to a factor, one axis for each coordinate.
        axis: The coordinate that moves.

    Returns:
        P, (state, state), float64; states are in the order of ``law.flatten()``.
    """
    weights = _check_law(law.flatten(), law.numel()).reshape(law.shape)
    given = weights / weights.sum(axis, keepdim=True)
    index = torch.arange(law.numel(), device=law.device).reshape(law.shape).movedim(axis, -1)
    rows = index.reshape(-1, law.shape[axis])  # states that differ in this coordinate only
    matrix = torch.zeros(law.numel(), law.numel(), dtype=torch.float64, device=law.device)
    values = given.movedim(axis, -1).reshape(rows.shape)
    matrix[rows.unsqueeze(2), rows.unsqueeze(1)] = values.unsqueeze(1).expand(-1, rows.shape[1], -1)
    return matrix


def relaxation(transitions: Tensor) -> float:
    """Relaxation time 1 / (1 − |λ₂|) in steps: how long the slowest statistic remembers; infinite if it never forgets."""
    moduli = torch.linalg.eigvals(_check(transitions)).abs().sort(descending=True).values
    gap = 1.0 - float(moduli[1]) if len(moduli) > 1 else 1.0
    return 1.0 / gap if gap > _ROUNDING else math.inf


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """½ Σ |p − q|, the largest difference between the probabilities of any event."""
    return 0.5 * (first - second).abs().sum(-1)


def sample(transitions: Tensor, start: Tensor, steps: int) -> Tensor:
    """Runs chains.

    Args:
        transitions: P, (state, state).
        start: State in which each chain starts, (chain,), integers.
        steps: How many steps each takes.

    Returns:
        (chain, steps + 1), the start first.
    """
    cumulative = _check(transitions).cumsum(1)
    path = [start.long()]
    for _ in range(steps):
        rows = cumulative[path[-1]]
        level = torch.rand(len(start), 1, dtype=rows.dtype, device=rows.device) * rows[:, -1:]
        path.append((rows < level).sum(1))
    return torch.stack(path, 1)
