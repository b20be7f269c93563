"""Samplers in unconstrained space: finite discrete sites are summed out, moved without, and drawn back exactly."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.contract import Backend, Draw, Unsupported
from inference.density import Slope, Unconstrained
from inference.fit import Sample
from inference.plan import Plan, Update
from inference.program import Program
from inference.start import ascended, dispersed_values
from inference.until import Until

__all__ = ["MarginalInfo", "MarginalSampler", "MarginalState"]


class MarginalState(NamedTuple):
    """The kernel's state, its adaptation, and what was achieved since warm-up.

    ``certificate`` is the largest |log p(z, rest) − log q(z | rest) − log Z| of the finite sites drawn back.
    """

    kernel: Any
    adaptation: Any
    acceptance: Tensor
    reads: Tensor
    certificate: Tensor


class MarginalInfo(NamedTuple):
    """lp (chain,): log-density of the unconstrained position; the rest by ArviZ's names."""

    lp: Tensor
    acceptance_rate: Tensor


@dataclass(frozen=True, kw_only=True)
class MarginalSampler(Backend[MarginalState, MarginalInfo]):
    """What random-walk and Hamiltonian sampling share.

    Args:
        chains: Number of chains, all advanced at once.
        draws: Draws kept of each chain.
        warmup: Adaptive steps before the first draw.
        thin: Steps per draw.
        until: When to stop before all draws are taken, such as ``Until(rhat=1.01, ess=400)``.
    """

    chains: int = 4
    draws: int = 1000
    warmup: int = 1000
    thin: int = 1
    until: Until | None = None

    @property
    def schedule(self) -> Sample:
        cost = 8 if self.needs_gradient else 1
        return Sample(self.chains, self.warmup, self.draws, self.thin, cost, until=self.until)

    @property
    @abc.abstractmethod
    def update(self) -> str:
        """What a plan prints."""

    @property
    def note(self) -> str:
        """What a plan says of how exact it is."""
        return ""

    @property
    @abc.abstractmethod
    def needs_gradient(self) -> bool:
        """Whether the kernel's density returns (gradient, value)."""

    @property
    def takes_unnormalised(self) -> bool:
        return True

    @property
    def climbs(self) -> bool:
        """Whether chains first climb the density, where ``start`` does not say where they are."""
        return True

    @abc.abstractmethod
    def begin(self, position: Tensor, density: Callable[[Tensor], Any], program: Program) -> tuple[Any, Any]:
        """The kernel's first state and its adaptation, at (chain, D); ``program.groups`` of chains learn apart."""

    @abc.abstractmethod
    def move(self, kernel: Any, adaptation: Any, density: Callable[[Tensor], Any], warmup: int) -> tuple[Any, Any, Any]:
        """One move: new state, adaptation and info; ``warmup`` is its length while it lasts, then 0."""

    def _parts(self, program: Program) -> tuple[Unconstrained, Callable[[Tensor], Any]]:
        coordinates = Unconstrained(program, program.continuous)
        staged = program.density.unconstrained(coordinates, program.finite, gradient=self.needs_gradient)
        return coordinates, Slope(staged, program.chain_data)

    def init(self, program: Program) -> MarginalState:
        stuck = [name for name in program.latents if name not in (*program.continuous, *program.finite)]
        if stuck:
            raise Unsupported(
                f"{type(self).__name__} sums discrete sites out, but '{stuck[0]}' ({program.latents[stuck[0]].family}) has "
                "infinitely many values. Use Gibbs()."
            )
        if program.surrogates and program.finite:
            raise Unsupported(
                f"Site '{program.surrogates[0]}' of {program.name} has a gradient, but no log-density, by which "
                f"'{program.finite[0]}' would have to be summed out. Give that a fixed value, or the other a density."
            )
        if not program.continuous:
            raise Unsupported(f"{type(self).__name__} needs a continuous site, but all are finite. Use Gibbs().")
        coordinates, density = self._parts(program)
        values = dispersed_values(program, self.chains, self.start)
        certificate = self._certify(values, program)
        if self.start is None and self.climbs:
            values = ascended(program, values)
        position = coordinates.position(values)
        kernel, adaptation = self.begin(position, density, program)
        zero = position.new_zeros(())
        return MarginalState(kernel, adaptation, zero, zero, certificate)

    def _certify(self, values: dict[str, Tensor], program: Program) -> Tensor:
        """The identity log Z = log p − log q of the enumeration, at one draw for every chain."""
        if not program.finite:
            return torch.zeros((), dtype=program.dtype)
        return program.density.certify(program.finite, values | program.chain_data(self.chains), "Use Gibbs().", self.draws)

    def step(self, state: MarginalState, program: Program) -> tuple[MarginalState, MarginalInfo]:
        _, density = self._parts(program)
        kernel, adaptation, info = self.move(state.kernel, state.adaptation, density, self.warmup)
        state = state._replace(kernel=kernel, adaptation=adaptation)
        lp = kernel.log_density * math.nan if program.surrogates else kernel.log_density  # its values would mean nothing
        return state, MarginalInfo(lp, info.acceptance_rate)

    def sample(self, state: MarginalState, program: Program) -> tuple[MarginalState, Draw]:
        _, density = self._parts(program)
        rates = []
        for _ in range(self.thin):
            kernel, adaptation, info = self.move(state.kernel, state.adaptation, density, 0)
            state = state._replace(kernel=kernel, adaptation=adaptation)
            rates.append(info.acceptance_rate)
        rate = torch.stack(rates).mean(0)
        state = state._replace(acceptance=state.acceptance + rate.mean(), reads=state.reads + 1)
        stats = {name: value for name, value in info._asdict().items() if value.shape == rate.shape}
        stats |= {"acceptance_rate": rate} if program.surrogates else {"lp": kernel.log_density, "acceptance_rate": rate}
        return state, Draw(self.values(state, program), stats)

    def values(self, state: MarginalState, program: Program) -> dict[str, Tensor]:
        values = self._parts(program)[0].values(state.kernel.position)
        if program.finite:
            uniforms = program.density.uniforms(program.finite, self.chains)
            others = {**values, **program.chain_data(self.chains)}
            values |= program.density.draw(program.finite, self.draws)(others, uniforms)[0]
        return {name: values[name] for name in program.latents}

    def moved(self, state: MarginalState, values: Mapping[str, Tensor], program: Program) -> MarginalState:
        coordinates, density = self._parts(program)
        placed = replace(self, start=values)  # chains begin there, and nowhere that they would choose themselves
        kernel, _ = placed.begin(coordinates.position(values), density, program)
        return state._replace(kernel=kernel)

    def plan(self, state: MarginalState, program: Program) -> Plan:
        rate = float(state.acceptance / state.reads) if state.reads > 0 else float("nan")
        updates = [Update(program.continuous, self.update, rate, note=self.note)]
        if program.finite:
            updates.append(
                Update(
                    program.finite,
                    "Enumerate",
                    certificate=float(state.certificate),
                    note="summed out, then drawn back",
                )
            )
        return Plan(tuple(updates))
