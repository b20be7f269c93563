"""Metropolis-Hastings kernels beyond the random walk, and the distributions that an independence sampler proposes from.

A kernel sees positions, a density and tensors; every chain of a batch moves at once.

References:
    G. Roberts and J. Rosenthal, Optimal scaling of discrete approximations to Langevin diffusions (1998): 0.574.
    L. Tierney, Markov chains for exploring posterior distributions (1994): independence samplers.
    D. Peel and G. McLachlan, Robust mixture modelling using the t distribution (2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inference.contract import Unsupported
from inference.density import Unconstrained
from inference.enumeration import eliminate, factors, plates_of, total
from inference.guides import batched, is_plain
from inference.mcmc import Gradient, pulled, pushed, served
from inference.program import Program

__all__ = [
    "IndependenceInfo",
    "IndependenceKernel",
    "IndependenceState",
    "LangevinInfo",
    "LangevinKernel",
    "LangevinState",
    "PriorReference",
    "Reference",
    "StudentReference",
]

AHEAD = 64  # proposals of a chain that are drawn at once: running a guide costs far more than a density
CANDIDATES = 64  # draws that each chain's start is chosen from
FREEDOM = 5.0  # degrees of freedom of a fitted reference: heavier tails than any posterior with exponential ones
_COMPONENTS = (1, 2, 4, 8)
_FITTED = 4000  # draws that a reference is fitted to


# ------------------------------------------------------------------------------------------ Langevin
class LangevinState(NamedTuple):
    """position (chain, D), log_density (chain,), gradient (chain, D)."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor


class LangevinInfo(NamedTuple):
    """acceptance_rate (chain,) of the proposal, accepted (chain,), step_size (chain,)."""

    acceptance_rate: Tensor
    accepted: Tensor
    step_size: Tensor


@dataclass(frozen=True)
class LangevinKernel:
    """Metropolis-adjusted Langevin: q' = q + ½ ε² L Lᵀ ∇log π(q) + ε L ξ, ξ ~ N(0, I).

    Args:
        step_size: ε, a scalar, or (group,).
        factor: L (D, D), or its diagonal (D,), of groups as ``pushed`` takes them.
        is_adjusted: Whether moves are accepted by π; else all are taken that come to a finite gradient, and what the chain
            settles at is not π.
    """

    step_size: Tensor
    factor: Tensor
    is_adjusted: bool = True

    def init(self, position: Tensor, density: Gradient) -> LangevinState:
        """The state of chains at these positions."""
        gradient, log_density = density(position)
        return LangevinState(position, log_density, gradient)

    def step(self, state: LangevinState, density: Gradient) -> tuple[LangevinState, LangevinInfo]:
        """One proposal of every chain, accepted or refused."""
        noise = torch.randn_like(state.position)
        step_size = served(self.step_size, len(noise))
        drift = 0.5 * step_size * pulled(state.gradient, self.factor)
        position = state.position + step_size * pushed(drift + noise, self.factor)
        gradient, log_density = density(position)
        # the noise that would lead back: q = q' + ½ ε² L Lᵀ ∇log π(q') + ε L ξ'
        back = -noise - drift - 0.5 * step_size * pulled(gradient, self.factor)
        log_forward, log_backward = -0.5 * noise.square().sum(-1), -0.5 * back.square().sum(-1)
        log_ratio = (log_density - state.log_density + log_backward - log_forward).nan_to_num(nan=-math.inf)
        if not self.is_adjusted:
            log_ratio = torch.where(gradient.isfinite().all(-1), 0.0, -math.inf).to(log_ratio)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        chosen = accepted.unsqueeze(-1)
        moved = LangevinState(
            torch.where(chosen, position, state.position),
            torch.where(accepted, log_density, state.log_density),
            torch.where(chosen, gradient, state.gradient),
        )
        return moved, LangevinInfo(log_ratio.clamp(max=0.0).exp(), accepted, step_size.reshape(-1).expand_as(log_ratio))


# -------------------------------------------------------------------------------------- independence
class Reference(Protocol):
    """A distribution over positions that can be drawn from, and whose normalised density is known."""

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Draws (count, D) and the log q of each, (count,)."""

    def log_prob(self, position: Tensor) -> Tensor:
        """log q of positions (chain, D), (chain,)."""


class IndependenceState(NamedTuple):
    """Where the chains are, and proposals that were drawn ahead.

    Attributes:
        position: (chain, D).
        log_density: (chain,).
        log_q: log q of the position, (chain,).
        proposals: (ahead, chain, D).
        proposals_log_q: (ahead, chain).
        used: How many of the proposals are spent, ().
    """

    position: Tensor
    log_density: Tensor
    log_q: Tensor
    proposals: Tensor
    proposals_log_q: Tensor
    used: Tensor


class IndependenceInfo(NamedTuple):
    """What a step did, (chain,) each.

    Attributes:
        acceptance_rate: Of the proposal.
        accepted: Whether it was taken.
        log_q: log q of where the chain then is.
        log_weight: log p − log q of the proposal, which is a draw from q whatever became of it: the mean of its
            exponential is the evidence, and its tail gives PSIS's k-hat.
    """

    acceptance_rate: Tensor
    accepted: Tensor
    log_q: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class IndependenceKernel:
    """Proposals that do not look at where the chain is: ratio p(q') q(q) / (p(q) q(q')).

    Args:
        reference: What they are drawn from.
    """

    reference: Reference

    def init(self, position: Tensor | None, density: Callable[[Tensor], Tensor], chains: int = 1) -> IndependenceState:
        """The state at positions (chain, D), or, for None, at draws of the reference in proportion to their weights.

        Raises:
            ValueError: If the density is not finite at any of them.
        """
        if position is None:
            drawn, log_q = self.reference.sample(CANDIDATES * chains)
            log_density = density(drawn)
            log_weight = (log_density - log_q).nan_to_num(nan=-math.inf, posinf=-math.inf).reshape(chains, CANDIDATES)
            if not bool(log_weight.isfinite().any()):
                raise ValueError(
                    f"The log-density is not finite at any of {CANDIDATES * chains} draws of the proposal. Give one that "
                    "is closer to the posterior."
                )
            level = log_weight.amax(1, keepdim=True)
            pick = torch.where(level > -math.inf, log_weight, log_weight.amax(0)).softmax(1).multinomial(1).squeeze(1)
            row = torch.where(
                level.squeeze(1) > -math.inf, torch.arange(chains, device=pick.device), log_weight.amax(1).argmax()
            )
            index = row * CANDIDATES + pick
            return self._filled(drawn[index], log_density[index], log_q[index])
        return self._filled(position, density(position), self.reference.log_prob(position))

    def _filled(self, position: Tensor, log_density: Tensor, log_q: Tensor) -> IndependenceState:
        """With fresh proposals."""
        chains, width = position.shape
        ahead = max(1, min(AHEAD, 2**22 // (chains * width)))
        proposals, proposals_log_q = self.reference.sample(ahead * chains)
        used = torch.zeros((), dtype=torch.long)
        shape = (ahead, chains)
        return IndependenceState(
            position, log_density, log_q, proposals.reshape(*shape, width), proposals_log_q.reshape(shape), used
        )

    def step(
        self, state: IndependenceState, density: Callable[[Tensor], Tensor]
    ) -> tuple[IndependenceState, IndependenceInfo]:
        """One proposal of every chain, accepted or refused."""
        if int(state.used) == len(state.proposals):
            state = self._filled(state.position, state.log_density, state.log_q)
        used = int(state.used)
        proposal, log_q = state.proposals[used], state.proposals_log_q[used]
        log_density = density(proposal)
        log_weight = (log_density - log_q).nan_to_num(nan=-math.inf)
        log_ratio = (log_weight - (state.log_density - state.log_q)).nan_to_num(nan=-math.inf)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        moved = state._replace(
            position=torch.where(accepted.unsqueeze(-1), proposal, state.position),
            log_density=torch.where(accepted, log_density, state.log_density),
            log_q=torch.where(accepted, log_q, state.log_q),
            used=state.used + 1,
        )
        return moved, IndependenceInfo(log_ratio.clamp(max=0.0).exp(), accepted, moved.log_q, log_weight)


class PriorReference:
    """The prior of a program's continuous sites, its finite ones summed out, over unconstrained positions.

    Args:
        program: The program.

    Raises:
        Unsupported: If a site's prior is improper, scaled or masked, so that it cannot be drawn from.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.coordinates = Unconstrained(program, program.continuous)
        trace = program.trace({}, evaluated=False)
        for name, site in program.latents.items():
            if site.flaw:
                raise Unsupported(f"Prior() draws from the prior, but that of '{name}' is {site.flaw}. Use RandomWalk().")
            if not is_plain(trace.nodes[name]):
                raise Unsupported(
                    f"Prior() draws from the prior, but '{name}' is scaled or masked, which changes its density and not its "
                    "draws. Use RandomWalk()."
                )

    @torch.no_grad()
    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Positions, (draw, D), and their log-densities."""

        def drawn() -> dict[str, Tensor]:
            trace = self.program.trace({}, evaluated=False)
            return {name: trace.nodes[name]["value"].to(self.program.dtype) for name in self.coordinates.sites}

        position = self.coordinates.position(batched(drawn, count))
        return position, self.log_prob(position)

    @torch.no_grad()
    def log_prob(self, position: Tensor) -> Tensor:
        """Of positions, (draw, D)."""
        return self.program.density.stage("prior", self._log_prior, (True,), evaluations=0)(position)

    def _log_prior(self, position: Tensor) -> Tensor:
        program, values = self.program, self.coordinates.values(position)
        if program.finite:
            found = [factor for factor in factors(program, values, program.finite) if factor.site in program.latents]
            log_prior = total(eliminate(found, plates_of(program, program.finite))[0])
        else:
            _, stacks = program.log_probs(values)
            rows = [stack.table[i] for stack in stacks for i, name in enumerate(stack.names) if name in program.latents]
            log_prior = torch.stack([row.sum() for row in rows]).sum()
        return log_prior + self.coordinates.log_jacobian(position)


@dataclass(frozen=True)
class StudentReference:
    """A mixture of multivariate Student distributions.

    Args:
        weights: (component,).
        means: (component, D).
        factors: Lower triangular factors of the scale matrices, (component, D, D).
        freedom: Degrees of freedom.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor
    freedom: float = FREEDOM

    @classmethod
    def fitted(cls, draws: Tensor) -> StudentReference:
        """Fitted to draws (draw, D) by EM, with as many components as predict the draws best that were held out."""
        draws = draws[torch.randperm(len(draws), device=draws.device)[:_FITTED]]
        half = len(draws) // 2
        best, best_score = None, -math.inf
        for components in _COMPONENTS:
            if components > 1 and len(draws) < 20 * components * draws.shape[1]:
                break
            found = cls._by_em(draws[:half], components)
            score = float(found.log_prob(draws[half:]).mean())
            if best is not None and score <= best_score:
                break
            best, best_score = components, score
        return cls._by_em(draws, best or 1)

    @classmethod
    def _by_em(cls, draws: Tensor, components: int, steps: int = 50) -> StudentReference:
        count, width = draws.shape
        centred = draws - draws.mean(0)
        overall = centred.T @ centred / max(count - 1, 1)
        overall = overall + 1e-6 * torch.diag(overall.diagonal().clamp(min=1e-12))
        whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(overall), centred.T, upper=False).T
        index = [0]
        for _ in range(components - 1):  # k-means++: the next centre far from those that there are
            far = torch.stack([(whitened - whitened[i]).square().sum(-1) for i in index]).amin(0)
            index.append(int(far.multinomial(1)))
        means = draws[index]
        member = torch.stack([(whitened - whitened[i]).square().sum(-1) for i in index]).argmin(0)
        share = torch.nn.functional.one_hot(member, components).to(draws)
        heavy = torch.ones_like(share)
        found = cls(share.mean(0), means, torch.linalg.cholesky(overall).expand(components, width, width))
        for _ in range(steps):
            mass = share.sum(0)
            weight = share * heavy
            means = (weight.T @ draws) / weight.sum(0).clamp(min=1e-12).unsqueeze(-1)
            apart = draws.unsqueeze(1) - means  # (draw, component, D)
            scatter = torch.einsum("nk,nki,nkj->kij", weight, apart, apart)
            # as much of the overall covariance as D + 2 draws would bring: no component collapses
            scales = (scatter + (width + 2) / components * overall) / (mass + (width + 2) / components).reshape(-1, 1, 1)
            found = cls((mass + 1.0) / (mass + 1.0).sum(), means, torch.linalg.cholesky(scales))
            log_parts, distance = found._parts(draws)
            share = log_parts.softmax(-1)
            heavy = (found.freedom + width) / (found.freedom + distance)
        return found

    def _parts(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """log of weight times density, and squared distance, of each component, (chain, component) both."""
        width = position.shape[-1]
        apart = (position.unsqueeze(-2) - self.means).movedim(-2, 0)  # (component, chain, D)
        distance = torch.linalg.solve_triangular(self.factors, apart.mT, upper=False).square().sum(-2).T
        constant = (
            math.lgamma(0.5 * (self.freedom + width))
            - math.lgamma(0.5 * self.freedom)
            - 0.5 * width * math.log(self.freedom * math.pi)
        )
        log_size = self.factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        tail = -0.5 * (self.freedom + width) * torch.log1p(distance / self.freedom)
        return self.weights.log() + constant - log_size + tail, distance

    def log_prob(self, position: Tensor) -> Tensor:
        """Of positions, (draw, D)."""
        return self._parts(position)[0].logsumexp(-1)

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Positions, (draw, D), and their log-densities."""
        component = self.weights.multinomial(count, replacement=True)
        normal = torch.randn(count, self.means.shape[1], dtype=self.means.dtype, device=self.means.device)
        shape = torch.full((count, 1), 0.5 * self.freedom, dtype=normal.dtype, device=normal.device)
        spread = (torch._standard_gamma(shape) / (0.5 * self.freedom)).rsqrt()
        position = self.means[component] + spread * (self.factors[component] @ normal.unsqueeze(-1)).squeeze(-1)
        return position, self.log_prob(position)
