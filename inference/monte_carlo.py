"""E-steps by draws of what is averaged: by the blocks of a plan, or by a sampler of the caller's.

References:
    G. Wei and M. Tanner, A Monte Carlo implementation of the EM algorithm (1990).
    B. Delyon, M. Lavielle and E. Moulines, Convergence of a stochastic approximation version of the EM algorithm (1999).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from inference.blocks import Block, Current
from inference.density import Density, Unconstrained
from inference.expectation import ALL, Batch, Completed, Expectation, Moved, Values
from inference.program import Program
from inference.sites import Site
from inference.staging import Staged

__all__ = ["Given", "Sampled", "SampledState", "Sampler"]


class SampledState(NamedTuple):
    """Draws of all averaged sites, (restart, particle, *site), and the state of what moves them."""

    particles: Values
    states: Any


@dataclass(frozen=True)
class Sampled(Expectation):
    """Draws of the averaged sites, moved by blocks as in Gibbs sampling; the finite ones are then averaged over.

    Args:
        sites: Names of the continuous ones.
        blocks: The blocks that move all averaged sites.
        averaged: Names of all averaged sites.
        count: Draws for each restart.
        sweeps: Sweeps in a step.
    """

    blocks: tuple[Block, ...] = ()
    averaged: tuple[str, ...] = ()
    count: int = 64
    sweeps: int = 5

    @property
    def update(self) -> str:
        return "Monte-Carlo"

    @property
    def is_random(self) -> bool:
        return True

    def init(self, values: Values, task: Completed) -> SampledState:
        spread = {name: value.repeat_interleave(self.count, 0) for name, value in values.items()}
        current = Current(spread, task.density.joint(spread))
        states = tuple(block.init(task.density, current) for block in self.blocks)
        return SampledState(self._folded(spread), states)

    def _folded(self, values: Values) -> Values:
        return {name: values[name].unflatten(0, (-1, self.count)) for name in self.averaged}

    def _spread(self, memory: SampledState, values: Values) -> Values:
        spread = {name: value.repeat_interleave(self.count, 0) for name, value in values.items()}
        return spread | {name: value.flatten(0, 1) for name, value in memory.particles.items()}

    def step(self, memory: SampledState, values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        spread = self._spread(memory, values)
        current, states = Current(spread, task.density.joint(spread)), list(memory.states)
        for _ in range(self.sweeps):
            for i, block in enumerate(self.blocks):
                states[i], current, _ = block.step(states[i], task.density, current, adapts)
        return self._moved(current.values, tuple(states), task)

    def _moved(self, values: Values, states: Any, task: Completed) -> Moved:
        particles = self._folded(values)
        shown = {name: value for name, value in particles.items() if name in self.sites}
        log_q = self._log_q(shown, task.program)
        last = {name: value[:, -1] for name, value in particles.items()}
        return Moved(SampledState(particles, states), shown, log_q, last)

    def _log_q(self, particles: Values, program: Program) -> Tensor:
        """Minus the entropy of independent normals with the draws' variances, unconstrained, (restart, particle).

        Without it the objective would have no upper bound: it would rank a collapsed scale of the latents highest.
        """
        coordinates = Unconstrained(program, [name for name in particles if program.latents[name].is_continuous])
        if not coordinates.sites:
            return next(iter(particles.values())).new_zeros(1, self.count, dtype=program.dtype)
        position = coordinates.position({n: particles[n].flatten(0, 1) for n in coordinates.sites})
        log_jacobian = vmap(coordinates.log_jacobian)(position).unflatten(0, (-1, self.count))
        variance = position.unflatten(0, (-1, self.count)).var(1, correction=min(1, self.count - 1))
        entropy = 0.5 * (2.0 * math.pi * math.e * variance.clamp(min=torch.finfo(variance.dtype).tiny)).log().sum(-1)
        return -entropy.unsqueeze(1) - log_jacobian


@dataclass(frozen=True)
class Sampler(Sampled):
    """Draws of the averaged sites, moved by a sampler of a back-end given θ.

    Args:
        backend: The back-end; its ``chains`` are the draws of each restart, ``thin`` the moves of a step.
    """

    backend: Any = None

    @property
    def update(self) -> str:
        return f"Monte-Carlo ({self.backend.update})"

    def init(self, values: Values, task: Completed) -> SampledState:
        spread = {name: value.repeat_interleave(self.count, 0) for name, value in values.items()}
        given = Given(task, {name: spread[name] for name in task.maximised})
        start = {name: spread[name] for name in self.averaged}
        state = self._sized(spread, start=start).init(given)
        return SampledState(self._folded(spread), state)

    def _sized(self, spread: Values, **options: Any) -> Any:
        return dataclasses.replace(self.backend, chains=len(next(iter(spread.values()))), **options)

    def step(self, memory: SampledState, values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        spread = self._spread(memory, values)
        given: Any = Given(task, {name: spread[name] for name in task.maximised})
        backend = self._sized(spread, warmup=adapts * self.sweeps)
        coordinates, density = backend._parts(given)
        kernel, _ = backend.begin(coordinates.position(spread), density, given)  # θ has moved: what was cached is stale
        state = memory.states._replace(kernel=kernel)
        for _ in range(self.sweeps):
            if adapts:
                state, _ = backend.step(state, given)
            else:
                kernel, adaptation, _ = backend.move(state.kernel, state.adaptation, density, 0)
                state = state._replace(kernel=kernel, adaptation=adaptation)
        return self._moved({**spread, **backend.values(state, given)}, state, task)


class Given:
    """A program some of whose sites have one given value for every chain; a sampler sees the others.

    Args:
        task: The completed density.
        values: Site to (chain, *site).
    """

    def __init__(self, task: Completed, values: Values) -> None:
        self.program, self.values, self.density = task.program, values, _GivenDensity(task.density, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    @cached_property
    def latents(self) -> dict[str, Site]:
        """The sites that are not given."""
        return {name: site for name, site in self.program.latents.items() if name not in self.values}

    @cached_property
    def continuous(self) -> tuple[str, ...]:
        """The continuous ones among them."""
        return tuple(name for name in self.program.continuous if name not in self.values)


class _GivenDensity:
    """The densities of a program at given values of some of its sites."""

    def __init__(self, density: Density, values: Values) -> None:
        self.density, self.given = density, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.density, name)

    @property
    def joint(self) -> Callable[..., Tensor]:
        return lambda values: self.density.joint({**values, **self.given})

    def marginal(self, enumerated: Any) -> Callable[..., Tensor]:
        staged = self.density.marginal(enumerated)
        return lambda values: staged({**values, **self.given})

    def draw(self, sites: Any, evaluations: int | None = None) -> Callable[..., Any]:
        staged = self.density.draw(sites, evaluations)
        return lambda values, uniforms: staged({**values, **self.given}, uniforms)

    def unconstrained(self, coordinates: Unconstrained, *args: Any, **kwargs: Any) -> _GivenStaged:
        return _GivenStaged(self.density.unconstrained(coordinates, *args, **kwargs), self.given)


class _GivenStaged:
    """A staged function of positions and other values, some of which are given."""

    def __init__(self, staged: Staged, given: Values) -> None:
        self.staged, self.given = staged, given

    def __call__(self, position: Tensor, others: Values) -> Any:
        return self.staged(position, {**others, **self.given})

    def first(self, position: Tensor, others: Values) -> Any:
        return self.staged.first(position, {**others, **self.given})
