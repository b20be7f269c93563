"""Finite Markov chains, exactly: a transition matrix P has P[i, j] = probability of going from state i to state j.

    reversible      π_i P_ij = π_j P_ji for all i, j      implies stationary
    stationary      π P = π                               holds of every step of a correct sampler
    recurrent       i is in a class with no way out       else it is left for good
    aperiodic       gcd{t : P^t_ii > 0} = 1               with one closed class, P^t → π

What a sampler does on a space of a few dozen states can be written down as such a matrix, and then there is nothing to be
estimated: a sampler is right to 10⁻¹² or it is wrong. A sweep is the product of the matrices of its updates.

References:
    J. Norris, Markov chains (1997).
    D. Levin, Y. Peres and E. Wilmer, Markov chains and mixing times (2009).
    L. Tierney, Markov chains for exploring posterior distributions (1994).
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from torch import Tensor

from inference.arrays import as_numpy

__all__ = [
    "communicating_classes",
    "conditional",
    "imbalance",
    "is_recurrent",
    "is_reversible",
    "metropolis",
    "mixing_time",
    "period",
    "relaxation",
    "sample",
    "stationary",
    "total_variation",
]

_ROUNDING = 1e-9
_EDGE = 1e-13  # an entry below is what is left of 1 minus a sum, and no way from state to state
_SQUARES = 50  # 2⁵⁰ steps, by which the rounding of one step has become a tenth


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


def _edges(matrix: Tensor) -> np.ndarray:
    """Which states are reached in one step from which."""
    return as_numpy(matrix > _EDGE)


def _classes(edges: np.ndarray) -> list[list[int]]:
    """Strongly connected components, by their first state."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    count, labels = connected_components(csr_matrix(edges), directed=True, connection="strong")
    return sorted(np.flatnonzero(labels == label).tolist() for label in range(count))


def _is_closed(edges: np.ndarray, states: list[int]) -> bool:
    outside = np.ones(len(edges), dtype=bool)
    outside[states] = False
    return not edges[states][:, outside].any()


def _period(edges: np.ndarray, states: list[int]) -> int:
    """Of a communicating class: the gcd of depth(i) + 1 - depth(j) over its edges i → j, in any search from one state."""
    depth = {states[0]: 0}
    queue = deque(states[:1])
    found = 0
    while queue:
        i = queue.popleft()
        for j in states:
            if edges[i, j]:
                if j not in depth:
                    depth[j] = depth[i] + 1
                    queue.append(j)
                found = math.gcd(found, depth[i] + 1 - depth[j])
    return found


def communicating_classes(transitions: Tensor) -> list[list[int]]:
    """States that reach one another: i and j are in one class if P^s_ij > 0 and P^t_ji > 0 for some s, t ≥ 0.

    An entry below 10⁻¹³ is taken for rounding. The chain is irreducible if there is one class.

    Args:
        transitions: P, (state, state).

    Returns:
        The classes in the order of their first states, each in increasing order.

    References:
        J. Norris, Markov chains (1997), section 1.2. R. Tarjan, Depth-first search and linear graph algorithms (1972).

    Example:
        >>> communicating_classes(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
        [[0], [1, 2]]
    """
    return _classes(_edges(_check(transitions)))


def is_recurrent(transitions: Tensor) -> Tensor:
    """Whether the chain returns to each state for certain; if not, it leaves the state for good one day.

    In a finite chain, the recurrent states are those of the closed classes, from which there is no way out.

    Args:
        transitions: P, (state, state).

    Returns:
        (state,), bool.

    References:
        J. Norris, Markov chains (1997), theorems 1.5.5 and 1.5.6.

    Example:
        >>> is_recurrent(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
        tensor([False,  True,  True])
    """
    edges = _edges(_check(transitions))
    result = torch.zeros(len(edges), dtype=torch.bool, device=transitions.device)
    for states in _classes(edges):
        result[states] = _is_closed(edges, states)
    return result


def period(transitions: Tensor) -> Tensor:
    """Greatest common divisor of the times at which the chain can be back, gcd{t ≥ 1 : P^t_ii > 0}, of each state i.

    States of one class have one period. 1 is aperiodic; 0 is a state that is never seen again.

    Args:
        transitions: P, (state, state).

    Returns:
        (state,), integers.

    References:
        E. Denardo, Periods of connected networks and powers of nonnegative matrices (1977).

    Example:
        >>> period(torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
        tensor([1, 2, 2])
    """
    edges = _edges(_check(transitions))
    result = torch.zeros(len(edges), dtype=torch.long, device=transitions.device)
    for states in _classes(edges):
        result[states] = _period(edges, states)
    return result


def stationary(transitions: Tensor) -> Tensor:
    """The law π with π P = π.

    States are taken out one after the other, without a subtraction: each probability is right to its last digits, however
    small it is and however seldom the chain goes from one part to another. Transient states have probability 0.

    Args:
        transitions: P, (state, state).

    Returns:
        (state,), float64.

    Raises:
        ValueError: If P is no transition matrix, or has more than one stationary law because it falls into parts.

    References:
        W. Grassmann, M. Taksar and D. Heyman, Regenerative analysis and steady state distributions for Markov chains (1985).

    Example:
        >>> stationary(torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64))
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    matrix = _check(transitions)
    edges = _edges(matrix)
    closed = [states for states in _classes(edges) if _is_closed(edges, states)]
    if len(closed) > 1:
        raise ValueError("The chain falls into parts that do not reach one another: it has more than one stationary law.")
    states = closed[0]
    flow = torch.where(matrix > _EDGE, matrix, 0.0)[states][:, states]
    for k in range(len(states) - 1, 0, -1):
        flow[:k, k] /= flow[k, :k].sum()
        flow[:k, :k] += flow[:k, k, None] * flow[k, :k]
    weights = torch.ones(len(states), dtype=flow.dtype, device=flow.device)
    for k in range(1, len(states)):
        weights[k] = weights[:k] @ flow[:k, k]
    law = torch.zeros(len(matrix), dtype=flow.dtype, device=flow.device)
    law[states] = weights / weights.sum()
    return law


def imbalance(transitions: Tensor, law: Tensor) -> Tensor:
    """Largest |π_i P_ij − π_j P_ji|: 0 for a reversible chain, and then π is stationary.

    Args:
        transitions: P, (state, state).
        law: π, (state,), up to a factor.
    """
    matrix = _check(transitions)
    flow = _check_law(law, len(matrix)).unsqueeze(1) * matrix
    return (flow - flow.T).abs().max()


def is_reversible(transitions: Tensor, law: Tensor | None = None, tolerance: float = 1e-12) -> bool:
    """Whether the chain looks the same run backwards, π_i P_ij = π_j P_ji for all i and j.

    Args:
        transitions: P, (state, state).
        law: π, (state,), up to a factor; None is the stationary law of P.
        tolerance: Largest imbalance that counts as rounding.

    Raises:
        ValueError: If no law is given and P has more than one stationary law.

    References:
        F. Kelly, Reversibility and stochastic networks (1979), section 1.2.

    Example:
        >>> is_reversible(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
        False
    """
    return float(imbalance(transitions, stationary(transitions) if law is None else law)) <= tolerance


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


def mixing_time(transitions: Tensor, tolerance: float = 0.25) -> float:
    """Steps after which the start is as good as forgotten: the smallest t with d(t) ≤ ε, and infinity if there is none.

        d(t) = max_i ½ Σ_j |P^t_ij - π_j|

    d never increases, so that t is found by doubling and then by bisection, with powers of P, to the step unless rounding
    counts (from about 10¹⁰ steps on). It is infinite if the recurrent states have a period above 1, or fall into parts;
    transient states alone do no harm.

    Args:
        transitions: P, (state, state).
        tolerance: ε, above 0 and below 1/2, which a periodic chain never gets below; 1/4 is the custom.

    Returns:
        A whole number, or infinity.

    Raises:
        ValueError: If the tolerance is out of range, or 2⁵⁰ steps do not suffice.

    References:
        D. Levin, Y. Peres and E. Wilmer, Markov chains and mixing times (2009), section 4.5.

    Example:
        >>> mixing_time(torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64))  # d(t) = 0.8ᵗ / 2
        4.0
    """
    if not 0.0 < tolerance < 0.5:
        raise ValueError(f"The tolerance of a mixing time is above 0 and below 1/2, but this one is {tolerance}.")
    matrix = _check(transitions)
    edges = _edges(matrix)
    closed = [states for states in _classes(edges) if _is_closed(edges, states)]
    if len(closed) > 1 or _period(edges, closed[0]) > 1:
        return math.inf
    law = stationary(matrix)

    def is_mixed(power: Tensor) -> bool:
        return bool(total_variation(power, law).max() <= tolerance)

    def product(first: Tensor, second: Tensor) -> Tensor:
        power = first @ second
        return power / power.sum(1, keepdim=True)  # rounding would double with every square

    current = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    if is_mixed(current):
        return 0.0
    powers = [product(matrix.clamp(min=0.0), current)]
    while not is_mixed(powers[-1]):
        if len(powers) > _SQUARES:
            raise ValueError(
                "The chain moves so slowly that float64 does not carry it to this tolerance. Raise the tolerance."
            )
        powers.append(product(powers[-1], powers[-1]))
    steps = 0
    for k in range(len(powers) - 2, -1, -1):
        later = product(current, powers[k])
        if not is_mixed(later):
            current, steps = later, steps + 2**k
    return float(steps + 1)


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
