"""Sequences of finite states, summed out and drawn back in logarithmic depth.

A sequence z_1, …, z_T has log-weights u_t[z_t] of its states and a_t[z_t, z_{t+1}] of its steps. Two adjacent stretches are
one longer stretch once the state between them is summed out,

    c[i, k] = log Σ_j exp(a[i, j] + b[j, k])

so that log₂ T rounds, in each of which all stretches halve in number, leave log Z. Read backwards they draw the states: the
two ends first, then the state in the middle of every stretch given its ends, all of a round at once.

References:
    S. Särkkä and Á. García-Fernández, Temporal parallelization of Bayesian smoothers (2021).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Passage", "Round", "drawn_back", "passage"]

_LARGEST = 2**22  # numbers of one sum over the middle state, before it is taken state by state


class Round(NamedTuple):
    """Stretches that became one: log-weights of the left and right ones (pair, K, K), and where they begin, meet and end."""

    left: Tensor
    right: Tensor
    first: Tensor
    middle: Tensor
    last: Tensor


class Passage(NamedTuple):
    """All rounds of a sequence.

    Attributes:
        log_z: log Z, or the largest log-weight of a sequence; a scalar.
        ends: Log-weights of the first and the last state, (K, K); of a sequence of one state (K,).
        tail: Of the last state, (K,).
        rounds: From the shortest stretches to the longest.
        length: T.
    """

    log_z: Tensor
    ends: Tensor
    tail: Tensor
    rounds: list[Round]
    length: int


def _log_sum(table: Tensor, dim: int, maximise: bool) -> Tensor:
    """log Σ exp, with a gradient of 0 where all terms are 0."""
    if maximise:
        return table.amax(dim)
    top = table.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    total = (table - top).exp().sum(dim)
    is_some = total > 0
    return torch.where(is_some, torch.where(is_some, total, 1.0).log() + top.squeeze(dim), -torch.inf)


def _joined(left: Tensor, right: Tensor, maximise: bool) -> Tensor:
    """Two stretches each, (pair, K, K), as one."""
    pairs, states = left.shape[0], left.shape[-1]
    if pairs * states**3 <= _LARGEST:
        return _log_sum(left.unsqueeze(-1) + right.unsqueeze(-3), -2, maximise)
    rows = [_log_sum(left[:, i].unsqueeze(-1) + right, -2, maximise) for i in range(states)]
    return torch.stack(rows, -2)


def passage(states: Tensor, steps: Tensor, maximise: bool = False) -> Passage:
    """Sums (or maximises) over all sequences.

    Args:
        states: u, (T, K).
        steps: a, (T − 1, K, K).
        maximise: Whether to take the maximum instead of the sum.
    """
    length = len(states)
    if length == 1:
        return Passage(_log_sum(states[0], -1, maximise), states[0], states[0], [], 1)
    stretches = steps + states[1:].unsqueeze(-2)
    bounds, rounds = [*range(length)], []
    while len(stretches) > 1:
        pairs = len(stretches) // 2
        left, right = stretches[0 : 2 * pairs : 2], stretches[1 : 2 * pairs : 2]
        where = [torch.tensor(bounds[i : i + 2 * pairs - 1 : 2], device=states.device) for i in range(3)]
        rounds.append(Round(left, right, *where))
        joined = _joined(left, right, maximise)
        stretches = torch.cat([joined, stretches[2 * pairs :]])
        bounds = bounds[0 : 2 * pairs : 2] + bounds[2 * pairs :]
    ends = states[0].unsqueeze(-1) + stretches[0]
    tail = _log_sum(ends, 0, maximise)
    return Passage(_log_sum(tail, -1, maximise), ends, tail, rounds, length)


def drawn_back(found: Passage, pick: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Chooses states in the order in which a joint draw has them.

    Args:
        found: What ``passage`` returned.
        pick: Log-probabilities (position, K) and positions (position,) to what is chosen there, (position,).

    Returns:
        The states, (T,), and the log-probability of the sequence, a scalar.
    """
    device = found.tail.device

    def chosen(logits: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.log_softmax(-1)
        index = pick(logits, where)
        return index, logits.gather(-1, index.unsqueeze(-1)).sum()

    last, log_q = chosen(found.tail.unsqueeze(0), torch.tensor([found.length - 1], device=device))
    if found.length == 1:
        return last, log_q
    states = torch.zeros(found.length, dtype=torch.long, device=device)
    states = states.index_copy(0, torch.tensor([found.length - 1], device=device), last)
    start = torch.tensor([0], device=device)
    index, log_p = chosen(found.ends.index_select(-1, last).squeeze(-1).unsqueeze(0), start)
    states, log_q = states.index_copy(0, start, index), log_q + log_p
    for step in reversed(found.rounds):
        before, after = states.index_select(0, step.first), states.index_select(0, step.last)
        into = torch.take_along_dim(step.left, before[:, None, None], -2).squeeze(-2)
        out = torch.take_along_dim(step.right, after[:, None, None], -1).squeeze(-1)
        index, log_p = chosen(into + out, step.middle)
        states, log_q = states.index_copy(0, step.middle, index), log_q + log_p
    return states, log_q
