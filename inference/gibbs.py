"""Gibbs sampling of any program: the plan picks a block for every site, a sweep makes one move with each.

References:
    S. Geman and D. Geman, Stochastic relaxation, Gibbs distributions and the Bayesian restoration of images (1984).
    L. Tierney, Markov chains for exploring posterior distributions (1994): Metropolis steps within Gibbs.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.blocks import Block, Current
from inference.blocks.block import failed
from inference.contract import Backend, Draw, Unsupported
from inference.density import Density
from inference.fit import Sample
from inference.plan import Plan, Update, assign, demoted
from inference.program import Program
from inference.start import ascended, dispersed_values, starting_values
from inference.until import Until

__all__ = ["Gibbs", "GibbsInfo", "GibbsState", "Part"]

_STRIKES = 3  # sweeps of warm-up in which a certificate may fail before its block is demoted: one may be rounding far out
_HELD = 100  # sweeps in a row that a certificate must have held to be taken only every few sweeps from then on
_EVERY = 10  # sweeps, then
_TRIALS = 8  # chains at which a block that is to take its place is tried


class GibbsState(NamedTuple):
    """Where the chains are, and what each block remembers and has achieved since warm-up.

    Attributes:
        current: Values of all sites and their log-joint.
        blocks: The blocks of the plan, in the order of a sweep.
        notes: A note for each.
        states: The state of each block.
        acceptance: Sum of acceptance rates of each block over sweeps and chains, (block,).
        certificate: Largest |log ratio| of each block, (block,); the last in warm-up; 0 for blocks without one.
        sweeps: Sweeps counted in the two above, ().
        strikes: Sweeps of warm-up in which the certificate of each block has failed, (block,).
        trust: Sweeps since each block began, if its certificate has held in all that took it, (block,); else -∞.
    """

    current: Current
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]
    states: tuple[Any, ...]
    acceptance: Tensor
    certificate: Tensor
    sweeps: Tensor
    strikes: Tensor
    trust: Tensor


class GibbsInfo(NamedTuple):
    """lp (chain,): log p(values, data) after the sweep; acceptance_rate (chain,): mean over the blocks."""

    lp: Tensor
    acceptance_rate: Tensor


def _is_due(block: Block, trust: float) -> bool:
    """Whether the certificate of a block is to be taken in this sweep: always, until it has held for long.

    A function of the number of sweeps alone, so that a run that goes on takes it where one long run would.
    """
    return block.has_certificate and (trust < _HELD or trust % _EVERY == 0)


@dataclass(frozen=True)
class Part:
    """Some blocks of a sweep, one after the other.

    Args:
        blocks: The blocks.
        due: Whether the certificate of each is to be taken.
        warmup: Length of the warm-up while it lasts, then 0.
        is_straight: Whether all of them do the same operations at every sweep.
        is_last: Whether a sweep ends with it.
    """

    blocks: tuple[Block, ...]
    due: tuple[bool, ...]
    warmup: int
    is_straight: bool
    is_last: bool

    @property
    def name(self) -> tuple[Any, ...]:
        """What tells one part from another."""
        return "part", tuple((block.update, block.sites) for block in self.blocks), self.due, bool(self.warmup), self.is_last

    def __call__(
        self, density: Density, values: dict[str, Tensor], log_joint: Tensor | tuple[()], memories: tuple[Any, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Tensor], Tensor | tuple[()], Tensor, Tensor, Tensor]:
        """Moves every chain.

        Args:
            density: The densities of the program.
            values: Where the chains are.
            log_joint: Of the values, (chain,); () if it is not known.
            memories: The state of each block.

        Returns:
            The states, values and log-joint after it, which is known at the end of a sweep; for each block its acceptance
            (block, chain), its largest |log ratio| (block,), -1 where it was not taken, and whether it has failed (block,).
        """
        known = log_joint if isinstance(log_joint, Tensor) else None  # None where a block has moved without
        states, rates, ratios, fails = [], [], [], []
        for block, memory, is_due in zip(self.blocks, memories, self.due, strict=True):
            drawn = None if is_due else block.drawn(memory, density, values, self.warmup)
            if drawn is not None:
                memory, moved, rate = drawn
                values, known, ratio = {**values, **moved}, None, None
            else:
                current = Current(values, density.joint(values) if known is None else known)
                memory, (values, known), (rate, ratio) = block.step(memory, density, current, self.warmup)
                ratio = torch.zeros_like(rate) if ratio is None else ratio
            states.append(memory)
            rates.append(rate)
            ratios.append(-torch.ones_like(rate[0]) if ratio is None else ratio.abs().amax())
            fails.append(
                torch.zeros_like(rate[0]) if ratio is None or known is None else failed(ratio, known).to(rate.dtype)
            )
        known = density.joint(values) if known is None and self.is_last else known
        return (
            tuple(states),
            values,
            () if known is None else known,
            torch.stack(rates),
            torch.stack(ratios),
            torch.stack(fails),
        )


def _parts(blocks: tuple[Block, ...], trust: list[float], warmup: int, is_long: bool) -> Iterator[Part]:
    """The blocks of a sweep in their order, those together that one graph serves."""
    due = [_is_due(block, since) for block, since in zip(blocks, trust, strict=True)]
    for is_straight, group in itertools.groupby(range(len(blocks)), lambda i: blocks[i].is_straight and not is_long):
        members = [*group]
        own = tuple(blocks[i] for i in members)
        yield Part(own, tuple(due[i] for i in members), warmup, is_straight, members[-1] == len(blocks) - 1)


@dataclass(frozen=True, kw_only=True)
class Gibbs(Backend[GibbsState, GibbsInfo]):
    """Gibbs sampling with exact conditionals wherever the program has them, Metropolis or HMC moves elsewhere.

    Finite discrete sites are drawn jointly by enumeration, conjugate sites from the conditional that the gradient of the
    log-joint gives away, logistic ones with Pólya-Gamma variables, the rest by one HMC block, what has no gradient by
    slices. Each exact update is a Metropolis proposal that would be accepted with certainty; how nearly so is its
    certificate (``posterior.plan``), and a wrong one cannot bias the draws. A block whose certificate fails in warm-up gives
    way to the next that fits, and the plan says so; after warm-up nothing changes.

    Args:
        chains: Number of chains, all advanced at once.
        draws: Draws kept of each chain.
        warmup: Sweeps before the first draw.
        thin: Sweeps per draw.
        until: When to stop before all draws are taken, such as ``Until(rhat=1.01, ess=400)``.
        blocks: Site, or tuple of sites that move together, to the block that moves them; None leaves all to the plan.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def coin(flips):
        ...     fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        ...     with pyro.plate("flip", len(flips)):
        ...         pyro.sample("heads", dist.Bernoulli(fairness), obs=flips)
        >>> Gibbs(seed=0, progress=False).fit(coin, torch.ones(10)).plan["fairness"].update
        'Beta'
    """

    chains: int = 4
    draws: int = 1000
    warmup: int = 1000
    thin: int = 1
    until: Until | None = None
    blocks: Mapping[str | tuple[str, ...], Block] | None = None

    @property
    def schedule(self) -> Sample:
        return Sample(self.chains, self.warmup, self.draws, self.thin, until=self.until)

    def saved(self, state: GibbsState, program: Program) -> GibbsState:
        return state._replace(blocks=tuple(block.saved() for block in state.blocks))

    def restored(self, saved: GibbsState, program: Program) -> GibbsState:
        asked = {(names,) if isinstance(names, str) else tuple(names): block for names, block in (self.blocks or {}).items()}
        return saved._replace(blocks=tuple(block.restored(asked.get(block.sites, block)) for block in saved.blocks))

    @property
    def takes_unnormalised(self) -> bool:
        return True

    def init(self, program: Program) -> GibbsState:
        blocks, notes = assign(program, self.blocks)
        density = program.density
        values = dispersed_values(program, self.chains, self.start)
        if self.start is None and not all(block.is_exact for block in blocks):
            # one step size serves all chains of a Metropolis block: none may start where it is hopeless
            with contextlib.suppress(Unsupported):  # finite sites that cannot be summed out
                values = ascended(program, values)
        values |= program.chain_data(self.chains)
        current = Current(values, density.joint(values))
        states = tuple(block.init(density, current) for block in blocks)
        zeros = current.log_joint.new_zeros(len(blocks))
        return GibbsState(current, blocks, notes, states, zeros, zeros, zeros.new_zeros(()), zeros, zeros)

    def step(self, state: GibbsState, program: Program) -> tuple[GibbsState, GibbsInfo]:
        state, info = self._sweep(state, program, self.warmup)
        if bool((state.strikes >= _STRIKES).any()):
            state = self._demote(state, program)
        return state, info

    def _demote(self, state: GibbsState, program: Program) -> GibbsState:
        """Blocks that have failed too often give way to the next that fit."""
        current, density = state.current, program.density
        rows = torch.arange(_TRIALS, device=current.log_joint.device) % len(current.log_joint)
        values = {name: value[rows] for name, value in current.values.items()}
        fresh = starting_values(program, _TRIALS // 2, most=4)  # one chain alone would show no change
        values |= {name: torch.cat([values[name][: _TRIALS // 2], value]) for name, value in fresh.items()}
        trials = Current(values, density.joint(values))
        blocks, notes, states, strikes = [], [], [], []
        parts = zip(state.blocks, state.notes, state.states, state.strikes.tolist(), state.certificate.tolist(), strict=True)
        for block, note, memory, strike, certificate in parts:
            if strike < _STRIKES:
                new, kept = [(block, note)], [memory]
            else:
                new = demoted(program, block, note, certificate, trials)
                kept = [memory if b is block else b.init(density, current) for b, _ in new]
                strike = 0.0 if any(b is not block for b, _ in new) else -math.inf
            blocks += [b for b, _ in new]
            notes += [n for _, n in new]
            states += kept
            strikes += [strike] * len(new)
        zeros = current.log_joint.new_zeros(len(blocks))
        return state._replace(
            blocks=tuple(blocks),
            notes=tuple(notes),
            states=tuple(states),
            acceptance=zeros,
            certificate=zeros,
            strikes=zeros.new_tensor(strikes),
            trust=zeros,
        )

    def sample(self, state: GibbsState, program: Program) -> tuple[GibbsState, Draw]:
        for _ in range(self.thin):
            state, info = self._sweep(state, program, 0)
        return state, Draw(self.values(state, program), info._asdict())

    def values(self, state: GibbsState, program: Program) -> dict[str, Tensor]:
        return {name: state.current.values[name] for name in program.latents}

    def moved(self, state: GibbsState, values: Mapping[str, Tensor], program: Program) -> GibbsState:
        values = {**values, **program.chain_data(self.chains)}
        return state._replace(current=Current(values, program.density.joint(values)))

    def _sweep(self, state: GibbsState, program: Program, warmup: int) -> tuple[GibbsState, GibbsInfo]:
        density, (values, log_joint) = program.density, state.current
        known: Tensor | tuple[()] = log_joint
        memories: list[Any] = []
        found, first = [], 0
        for part in _parts(state.blocks, state.trust.tolist(), warmup, program.is_long):
            memory = state.states[first : first + len(part.blocks)]
            move: Callable[..., Any] = partial(part, density)
            if part.is_straight:  # what blocks remember stands still after warm-up
                move = density.random(part.name, move, steady=(False, False, not warmup))
            memory, values, known, *achieved = move(values, known, memory)
            memories += memory
            found.append(achieved)
            first += len(part.blocks)
        assert isinstance(known, Tensor)
        rates, ratios, fails = found[0] if len(found) == 1 else [torch.cat(same) for same in zip(*found, strict=True)]
        if warmup:
            state = state._replace(
                strikes=state.strikes + fails, certificate=torch.where(ratios < 0, state.certificate, ratios)
            )
        else:
            state = state._replace(
                acceptance=state.acceptance + rates.mean(1),
                certificate=torch.maximum(state.certificate * (state.sweeps > 0), ratios),
                sweeps=state.sweeps + 1,
            )
        state = state._replace(
            current=Current(values, known),
            states=tuple(memories),
            trust=torch.where(fails > 0, -math.inf, state.trust + 1),
        )
        return state, GibbsInfo(known, rates.mean(0))

    def plan(self, state: GibbsState, program: Program) -> Plan:
        updates = []
        for i, (block, note) in enumerate(zip(state.blocks, state.notes, strict=True)):
            has_run = bool(state.sweeps > 0)
            updates.append(
                Update(
                    sites=block.sites,
                    update=block.update,
                    acceptance=float(state.acceptance[i] / state.sweeps) if has_run else float("nan"),
                    certificate=float(state.certificate[i]) if has_run and block.has_certificate else None,
                    note=note,
                    claim=block.claim,
                )
            )
        return Plan(tuple(updates))
