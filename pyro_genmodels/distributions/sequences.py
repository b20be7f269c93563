"""States in a row."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

__all__ = ["MarkovChain"]


class MarkovChain(TorchDistribution):
    """A sequence of finitely many states, each of which depends on the one before it alone.

        z_1 ~ Categorical(initial),  z_t ~ Categorical(transitions[z_{t−1}]),    t = 2, …, T

    Every back-end sums a latent one out, or draws it as one, in logarithmic depth; statements in a plate of T elements may
    depend on it element by element: the states of a hidden Markov model.

    Args:
        initial: Probabilities of the first state, (K,).
        transitions: Probabilities of the next state given the present one, rows sum to 1, (K, K); or (T − 1, K, K).
        length: T, at least 1.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> stays = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> MarkovChain(torch.tensor([0.5, 0.5]), stays, 3).log_prob(torch.tensor([0, 0, 1])).exp()
        tensor(0.0450)

    References:
        L. Rabiner, A tutorial on hidden Markov models and selected applications in speech recognition (1989).
    """

    arg_constraints: dict[str, Any] = {  # noqa: RUF012
        "initial": constraints.simplex,
        "transitions": constraints.independent(constraints.simplex, 1),
    }

    def __init__(self, initial: Tensor, transitions: Tensor, length: int, validate_args: bool | None = None) -> None:
        states = initial.shape[-1]
        if initial.dim() != 1:
            raise ValueError(
                f"initial has shape {tuple(initial.shape)}, but a MarkovChain is one sequence, which has ({states},). "
                "Sample each sequence in a Python loop."
            )
        if length < 1:
            raise ValueError(f"A MarkovChain has at least 1 state, but length is {length}.")
        if transitions.shape[-2:] != (states, states) or (transitions.dim() > 2 and transitions.shape[-3] != length - 1):
            raise ValueError(
                f"transitions has shape {tuple(transitions.shape)}, but must be ({states}, {states}), or ({length - 1}, "
                f"{states}, {states}), for {states} states and a length of {length}."
            )
        self.initial, self.transitions, self.length = initial, transitions, length
        super().__init__(initial.shape[:-1], Size([length]), validate_args=validate_args)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.integer_interval(0, self.initial.shape[-1] - 1), 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MarkovChain:
        if Size(batch_shape) != self.batch_shape:
            raise ValueError("A MarkovChain is one sequence: sample each sequence in a Python loop, not in a plate.")
        return self

    def links(self) -> tuple[Tensor, Tensor]:
        states = self.initial.shape[-1]
        return self.initial.log(), self.transitions.log().expand(self.length - 1, states, states)

    def log_prob(self, value: Tensor) -> Tensor:
        value = value.long()
        first, steps = self.links()
        here, there = value[..., :-1], value[..., 1:]
        moves = steps[torch.arange(self.length - 1, device=value.device), here, there]
        return first[value[..., 0]] + moves.sum(-1)

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape)
        with torch.no_grad():
            first, steps = self.initial.cumsum(-1), self.transitions.cumsum(-1)
            uniforms = torch.rand(shape.numel(), self.length, 1, dtype=first.dtype, device=first.device)
            state = (first < uniforms[:, 0] * first[-1]).sum(-1, keepdim=True)
            # each step is a map from state to state; maps are composed with those 1, 2, 4, … steps before
            maps = (steps < uniforms[:, 1:, None] * steps[..., -1:]).sum(-1)
            distance = 1
            while distance < self.length - 1:
                maps = torch.cat([maps[:, :distance], maps[:, distance:].gather(-1, maps[:, :-distance])], 1)
                distance *= 2
            later = maps.gather(-1, state.unsqueeze(1).expand(-1, self.length - 1, -1)).squeeze(-1)
            return torch.cat([state, later], 1).reshape(shape + self.event_shape)
