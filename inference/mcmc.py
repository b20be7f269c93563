"""Kernels on a vector of unconstrained numbers, and their adaptation; every chain of a batch moves at once.

A kernel is frozen: it never learns. An adaptation watches the moves of warm-up in a state of its own and hands out a new
kernel; what is learnt from one chain serves all. Covariances are taken *within* chains and then pooled, so that chains in
different modes (other labels of a mixture, say) do not widen each other's proposals.

Chains that have data of their own must not learn from one another: with ``groups`` above 1, what is learnt has a leading
group axis, is pooled over the chains of a group (consecutive, equally many) and serves them only.

References:
    M. Hoffman, A. Radul and P. Sountsov, An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte Carlo (2021).
    P. Sountsov and M. Hoffman, Focusing on difficult directions for learning HMC trajectory lengths (2021).
    M. Hoffman and A. Gelman, The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (2014).
    H. Haario, E. Saksman and J. Tamminen, An adaptive Metropolis algorithm (2001).
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = [
    "Gradient",
    "GradientAlone",
    "HamiltonianAdaptation",
    "HamiltonianInfo",
    "HamiltonianKernel",
    "HamiltonianState",
    "Moments",
    "RandomWalkAdaptation",
    "RandomWalkInfo",
    "RandomWalkKernel",
    "RandomWalkState",
    "diagonal",
    "evened",
    "first_log_step",
    "halton",
    "is_dense",
    "lead",
    "log_size",
    "pooled",
    "pulled",
    "pushed",
    "recent",
    "served",
    "whitened",
    "window_ends",
]

WIDEST_COVARIANCE = 512
COST = 0.3  # the jump is weighed against length^COST: 1 favours the squares over the means, 0 ignores the gradients
DIVERGENT = 1000.0  # rise of the energy beyond which a trajectory has left the exact one (Stan's threshold)


def window_ends(warmup: int) -> tuple[int, ...]:
    """Steps of warm-up at which the scale of the proposal is set anew: windows that double, then a last quiet stretch."""
    return tuple(int(warmup * share) for share in (0.05, 0.1, 0.2, 0.4, 0.8))


def pooled(values: Tensor, groups: int) -> Tensor:
    """Mean over chains, (…, chain) -> (…,), or over the chains of each group, (…, chain) -> (…, group)."""
    return values.mean(-1) if groups == 1 else values.unflatten(-1, (groups, -1)).mean(-1)


def served(scalar: Tensor, chains: int) -> Tensor:
    """What was learnt, so that it multiplies vectors (chain, D): () stays, (group,) -> (chain, 1)."""
    return scalar.repeat_interleave(chains // len(scalar)).unsqueeze(-1) if scalar.dim() else scalar


def lead(groups: int) -> tuple[int, ...]:
    """The leading axes of what groups of chains learn apart."""
    return () if groups == 1 else (groups,)


class Moments(NamedTuple):
    """Running mean and scatter of every chain (Welford): number (), mean (chain, D), scatter pooled within chains.

    The scatter is (D, D), or (D,), its diagonal, beyond 512 dimensions; with a leading axis if there are groups.
    """

    number: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def like(cls, position: Tensor, groups: int = 1) -> Moments:
        """Of no positions yet, for those of this shape."""
        width = position.shape[-1]
        shape = (width, width) if width <= WIDEST_COVARIANCE else (width,)
        return cls(position.new_zeros(()), torch.zeros_like(position), position.new_zeros(lead(groups) + shape))

    @property
    def is_full(self) -> bool:
        """Whether the scatter is a matrix."""
        return self.mean.shape[-1] <= WIDEST_COVARIANCE

    @property
    def groups(self) -> int:
        """Number of groups of chains, each with a scatter of its own."""
        return 1 if self.scatter.dim() == 1 + self.is_full else len(self.scatter)

    def update(self, position: Tensor) -> Moments:
        """With one more position of every chain."""
        number = self.number + 1
        before = position - self.mean
        mean = self.mean + before / number
        after = position - mean
        if self.groups > 1:
            before, after = (x.unflatten(0, (self.groups, -1)) for x in (before, after))
        scatter = before.mT @ after if self.is_full else (before * after).sum(-2)
        return Moments(number, mean, self.scatter + scatter)

    def covariance(self) -> Tensor:
        """Pooled within-chain covariance, shrunk towards 10⁻³ by as much as five draws would; shape of the scatter."""
        freedom = (self.number - 1).clamp(min=1) * (len(self.mean) // self.groups)
        shrunk = torch.full_like(self.mean[0], 1e-3) * (5.0 / (freedom + 5.0))
        covariance = self.scatter / (freedom + 5.0)
        return covariance + (torch.diag(shrunk) if self.is_full else shrunk)


Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]


@runtime_checkable
class GradientAlone(Protocol):
    """A log-density that can leave its value out."""

    def gradient(self, position: Tensor) -> Tensor:
        """Its gradient at positions, (chain, D)."""


def pushed(vector: Tensor, factor: Tensor) -> Tensor:
    """L v for vectors (chain, D); ``factor`` is L (D, D) or its diagonal (D,), of groups (group, D, D) or (group, 1, D)."""
    if factor.dim() < 3:
        return vector @ factor.T if factor.dim() == 2 else vector * factor
    vector = vector.unflatten(0, (len(factor), -1))
    return (vector * factor if factor.shape[-2] == 1 else vector @ factor.mT).flatten(0, 1)


def pulled(gradient: Tensor, factor: Tensor) -> Tensor:
    """Lᵀ g, the gradient in the coordinates x of q = L x; shapes as for ``pushed``."""
    if factor.dim() < 3:
        return gradient @ factor if factor.dim() == 2 else gradient * factor
    gradient = gradient.unflatten(0, (len(factor), -1))
    return (gradient * factor if factor.shape[-2] == 1 else gradient @ factor).flatten(0, 1)


def whitened(vector: Tensor, factor: Tensor) -> Tensor:
    """x of v = L x, for vectors (chain, D); shapes as for ``pushed``."""
    if factor.dim() < 3:
        return torch.linalg.solve_triangular(factor, vector.T, upper=False).T if factor.dim() == 2 else vector / factor
    vector = vector.unflatten(0, (len(factor), -1))
    is_diagonal = factor.shape[-2] == 1
    apart = vector / factor if is_diagonal else torch.linalg.solve_triangular(factor, vector.mT, upper=False).mT
    return apart.flatten(0, 1)


def is_dense(factor: Tensor) -> bool:
    """Whether a factor is L, not its diagonal."""
    return factor.dim() > 1 and factor.shape[-2] == factor.shape[-1]


def log_size(factor: Tensor) -> Tensor:
    """log det L / D, () or (group,)."""
    sizes = factor.diagonal(dim1=-2, dim2=-1) if is_dense(factor) else factor
    mean = sizes.log().mean(-1)
    return mean.reshape(-1) if factor.dim() == 3 else mean


def recent(rates: Tensor, rate: Tensor) -> Tensor:
    """Running acceptance rate of every chain, about ten steps long; both (chain,)."""
    return rates + 0.1 * (rate - rates)


def evened(rate: Tensor, rates: Tensor, groups: int = 1) -> Tensor:
    """Mean acceptance rate of the chains, lowered as far as they differ for long: one stuck chain shortens the steps.

    The harmonic by the arithmetic mean of what each chain accepted recently; of single steps, the harmonic mean would
    be low in every chain.

    Args:
        rate: Acceptance rates of this step, (chain,).
        rates: Running ones, (chain,).
        groups: Number of groups of chains, each of which has a mean of its own.
    """
    inverse = pooled(rates.clamp(min=1e-10).reciprocal(), groups)
    return pooled(rate, groups) / (inverse * pooled(rates, groups))


def diagonal(deviations: Tensor) -> Tensor:
    """Standard deviations (D,) or (group, D) as a factor."""
    return deviations if deviations.dim() == 1 else deviations.unsqueeze(-2)


def first_log_step(rate: Callable[[Tensor], Tensor], position: Tensor, groups: int = 1) -> Tensor:
    """Halves or doubles a step size of 0.1 until its acceptance rate crosses a half; returns its logarithm, by group.

    Args:
        rate: Step size, () or (group,), to the acceptance rate of every chain, (chain,).
        position: Where the chains are, (chain, D).
        groups: Number of groups.
    """
    log_step = torch.full(lead(groups), math.log(0.1), dtype=torch.float64, device=position.device)
    direction, is_found = torch.zeros_like(log_step), torch.zeros_like(log_step, dtype=torch.bool)
    for _ in range(30):
        rises = torch.where(pooled(rate(log_step.exp().to(position.dtype)), groups) > 0.5, 1.0, -1.0).to(log_step)
        is_found = is_found | (direction * rises < 0)
        if bool(is_found.all()):
            break
        direction = rises
        log_step = torch.where(is_found, log_step, log_step + rises * math.log(2.0))
    return log_step.to(position.dtype)


# --------------------------------------------------------------------------------------- random walk
class RandomWalkState(NamedTuple):
    """position (chain, D), log_density (chain,)."""

    position: Tensor
    log_density: Tensor


class RandomWalkInfo(NamedTuple):
    """acceptance_rate (chain,) of the proposal, accepted (chain,)."""

    acceptance_rate: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class RandomWalkKernel:
    """Metropolis: q' = q + scale · L ε, ε ~ N(0, I).

    Args:
        scale: A scalar, or (group,).
        factor: L or its diagonal, as ``pushed`` takes it.
    """

    scale: Tensor
    factor: Tensor

    def init(self, position: Tensor, density: Callable[[Tensor], Tensor]) -> RandomWalkState:
        """The state of chains at these positions."""
        return RandomWalkState(position, density(position))

    def step(self, state: RandomWalkState, density: Callable[[Tensor], Tensor]) -> tuple[RandomWalkState, RandomWalkInfo]:
        """One proposal of every chain, accepted or refused."""
        noise = torch.randn_like(state.position)
        proposal = state.position + served(self.scale, len(noise)) * pushed(noise, self.factor)
        log_density = density(proposal)
        log_ratio = (log_density - state.log_density).nan_to_num(nan=-math.inf)
        accepted = torch.rand_like(log_ratio).log() < log_ratio
        position = torch.where(accepted.unsqueeze(-1), proposal, state.position)
        log_density = torch.where(accepted, log_density, state.log_density)
        return RandomWalkState(position, log_density), RandomWalkInfo(log_ratio.clamp(max=0.0).exp(), accepted)


class RandomWalkAdaptation(NamedTuple):
    """step (), log_scale (), factor and the moments of the current window; all but the step by group, if there are any."""

    step: Tensor
    log_scale: Tensor
    factor: Tensor
    moments: Moments

    @classmethod
    def like(cls, position: Tensor, groups: int = 1) -> RandomWalkAdaptation:
        """Before the first step of chains at such positions."""
        width = position.shape[-1]
        initial = position.new_full(lead(groups), math.log(0.1 / math.sqrt(width)))
        ones = position.new_ones((*lead(groups), width))
        return cls(position.new_zeros(()), initial, diagonal(ones), Moments.like(position, groups))

    @property
    def kernel(self) -> RandomWalkKernel:
        """The kernel that has been learnt so far."""
        return RandomWalkKernel(self.log_scale.exp(), self.factor)

    def update(self, state: RandomWalkState, info: RandomWalkInfo, warmup: int) -> RandomWalkAdaptation:
        """Robbins-Monro on the acceptance rate (0.44 in one dimension, 0.234 else), the covariance window by window."""
        width = state.position.shape[-1]
        target = 0.44 if width == 1 else 0.234
        step = self.step + 1
        ends = window_ends(warmup)
        since = step - max((end for end in ends if end < int(step)), default=0)
        groups = self.moments.groups
        log_scale = self.log_scale + (pooled(info.acceptance_rate, groups) - target) * 2.0 / since**0.6
        moments = self.moments.update(state.position)
        if int(step) in ends:
            covariance = moments.covariance()
            factor = torch.linalg.cholesky(covariance) if moments.is_full else diagonal(covariance.sqrt())
            optimal = torch.full_like(self.log_scale, math.log(2.38 / math.sqrt(width)))
            return RandomWalkAdaptation(step, optimal, factor, Moments.like(state.position, groups))
        return RandomWalkAdaptation(step, log_scale, self.factor, moments)


# --------------------------------------------------------------------------------------- Hamiltonian
class HamiltonianState(NamedTuple):
    """position (chain, D), log_density (chain,), gradient (chain, D)."""

    position: Tensor
    log_density: Tensor
    gradient: Tensor


class HamiltonianInfo(NamedTuple):
    """What a trajectory did, (chain,) each; ``proposal`` and ``velocity`` (chain, D) are its end, for the adaptation."""

    acceptance_rate: Tensor
    diverging: Tensor
    energy: Tensor
    energy_error: Tensor
    n_steps: Tensor
    step_size: Tensor
    proposal: Tensor
    velocity: Tensor


class _Leap:
    """The two halves of a leapfrog step; with a diagonal factor one operation each, for small problems are all overhead.

    Args:
        factor: What whitens the coordinates, as ``pushed`` takes it.
        step_size: ε, () or (chain, 1).
    """

    def __init__(self, factor: Tensor, step_size: Tensor) -> None:
        self.factor, self.is_plain = factor, factor.dim() == 1
        self.whole, self.half = self.of(step_size), self.of(0.5 * step_size)

    def of(self, step_size: Tensor) -> Tensor:
        """What ``drifted`` and ``kicked`` take for a step of this size."""
        return step_size * self.factor if self.is_plain else step_size

    def drifted(self, position: Tensor, momentum: Tensor, step: Tensor) -> Tensor:
        """q + ε L p"""
        return torch.addcmul(position, momentum, step) if self.is_plain else position + step * pushed(momentum, self.factor)

    def kicked(self, momentum: Tensor, gradient: Tensor, step: Tensor) -> Tensor:
        """p + ε Lᵀ g"""
        return torch.addcmul(momentum, gradient, step) if self.is_plain else momentum + step * pulled(gradient, self.factor)


@dataclass(frozen=True)
class HamiltonianKernel:
    """Leapfrog trajectories of one common, jittered length, then a Metropolis decision.

        H(q, p) = −log π(q) + ½ |p|²   in coordinates scaled by ``scale``

    The value of π is asked for at the ends of a trajectory only, if the density can leave it out (``GradientAlone``).

    Args:
        step_size: ε, a scalar, or (group,).
        length: Longest trajectory, in time, of the same shape; the trajectory takes ⌈jitter · length / ε⌉ steps.
        scale: What whitens the coordinates: standard deviations (D,), or a factor L (D, D) of the covariance L Lᵀ, of
            groups as ``pushed`` takes them.
        jitter: In (0, 1), from a sequence known in advance.
        most_steps: Cap on the number of steps.
    """

    step_size: Tensor
    length: Tensor
    scale: Tensor
    jitter: Tensor
    most_steps: int = 1024

    def init(self, position: Tensor, density: Gradient) -> HamiltonianState:
        """The state of chains at these positions."""
        gradient, log_density = density(position)
        return HamiltonianState(position, log_density, gradient)

    def step(self, state: HamiltonianState, density: Gradient) -> tuple[HamiltonianState, HamiltonianInfo]:
        """One trajectory of every chain, its end accepted or refused."""
        chains = len(state.position)
        steps = served((self.jitter * self.length / self.step_size).ceil().clamp(1, self.most_steps), chains)
        move = served(self.step_size, chains)
        position, log_density, gradient = state
        momentum = torch.randn_like(position)
        energy = 0.5 * momentum.square().sum(-1) - log_density
        leap = _Leap(self.scale, move)
        momentum = leap.kicked(momentum, gradient, leap.half)
        last = int(steps.max()) - 1
        between = density.gradient if isinstance(density, GradientAlone) else lambda q: density(q)[0]
        for i in range(last + 1):
            drift, kick = leap.whole, leap.half if i == last else leap.whole
            if steps.dim():  # chains that have arrived stand still
                drift = leap.of(torch.where(steps > i, move, 0.0))
                kick = leap.of(torch.where(steps > i + 1, move, 0.5 * torch.where(steps > i, move, 0.0)))
            position = leap.drifted(position, momentum, drift)
            if i < last:
                gradient = between(position)
            else:
                gradient, log_density = density(position)
            momentum = leap.kicked(momentum, gradient, kick)
        new_energy = 0.5 * momentum.square().sum(-1) - log_density
        error = (new_energy - energy).nan_to_num(nan=math.inf)
        accepted = torch.rand_like(error).log() < -error
        rate = (-error).clamp(max=0.0).exp()
        chosen = accepted.unsqueeze(-1)
        kept = HamiltonianState(
            torch.where(chosen, position, state.position),
            torch.where(accepted, log_density, state.log_density),
            torch.where(chosen, gradient, state.gradient),
        )
        info = HamiltonianInfo(
            acceptance_rate=rate,
            diverging=error > DIVERGENT,
            energy=torch.where(accepted, new_energy, energy),
            energy_error=error,
            n_steps=steps.to(torch.int64).reshape(-1).expand_as(rate),
            step_size=move.reshape(-1).expand_as(rate),
            proposal=position,
            velocity=pushed(momentum, self.scale),
        )
        return kept, info


class HamiltonianAdaptation(NamedTuple):
    """Step size by dual averaging, trajectory length by squared jumps, scale from the pooled within-chain covariance.

    All are tensors, so that the state of a run can be written down at any step. Steps are counted for all chains, the rest
    has a leading group axis if there are groups.
    """

    step: Tensor
    log_step: Tensor
    log_step_mean: Tensor
    error_sum: Tensor
    centre: Tensor
    rates: Tensor
    since: Tensor
    log_length: Tensor
    log_length_mean: Tensor
    jumps: Tensor
    scale: Tensor
    longest: Tensor
    centres: Tensor
    moments: Moments

    @classmethod
    def start(
        cls, state: HamiltonianState, density: Gradient, groups: int = 1, dense: bool = False
    ) -> HamiltonianAdaptation:
        """Finds a first step size; see ``first_log_step``."""
        position, axes = state.position, lead(groups)
        ones = position.new_ones((*axes, position.shape[-1]))
        scale, one, zero = diagonal(ones), position.new_ones(()), position.new_zeros(())

        def rate(step_size: Tensor) -> Tensor:
            return HamiltonianKernel(step_size, step_size, scale, one).step(state, density)[1].acceptance_rate

        log_step = first_log_step(rate, position, groups)
        zeros = torch.zeros_like(log_step)
        return cls(
            step=zero,
            log_step=log_step,
            log_step_mean=log_step,
            error_sum=zeros,
            centre=log_step + math.log(2.0),
            rates=torch.ones_like(state.log_density),
            since=zero,
            log_length=zeros,
            log_length_mean=zeros,
            jumps=position.new_zeros((2, *axes)),
            scale=torch.diag_embed(ones) if dense else scale,
            longest=torch.zeros_like(ones),
            centres=position.clone(),
            moments=Moments.like(position, groups),
        )

    def kernel(self, is_final: bool, most_steps: int) -> HamiltonianKernel:
        """The kernel of the next step; a final one takes the averaged step size and length."""
        log_step = self.log_step_mean if is_final else self.log_step
        log_length = self.log_length_mean if is_final else self.log_length
        return HamiltonianKernel(log_step.exp(), log_length.exp(), self.scale, halton(self.step), most_steps)

    def advance(self) -> HamiltonianAdaptation:
        """Moves on in the sequence of jitters, without learning."""
        return self._replace(step=self.step + 1)

    def update(
        self, before: HamiltonianState, state: HamiltonianState, info: HamiltonianInfo, warmup: int, target: float
    ) -> HamiltonianAdaptation:
        """What one warm-up trajectory teaches.

        Args:
            before: The state that the trajectory left.
            state: The state after it.
            info: What it did.
            warmup: Length of the warm-up.
            target: Acceptance rate aimed at.
        """
        step, since = self.step + 1, self.since + 1
        rates = recent(self.rates, info.acceptance_rate)
        error_sum = self.error_sum + (target - evened(info.acceptance_rate, rates, self.moments.groups))
        log_step = self.centre - error_sum * since.sqrt() / (0.05 * (since + 10.0))
        weight = since**-0.75
        averaged = weight * log_step + (1 - weight) * self.log_step_mean
        log_length, jumps = self._lengthen(before, info)
        moments = self.moments.update(state.position)
        centres = self.centres + (state.position - self.centres) / (since + 1).clamp(max=50.0)
        new = self._replace(
            step=step,
            since=since,
            error_sum=error_sum,
            rates=rates,
            log_step=log_step,
            log_step_mean=averaged,
            log_length=log_length,
            log_length_mean=self.log_length_mean + (log_length - self.log_length_mean) / since,
            jumps=jumps,
            moments=moments,
            centres=centres,
        )
        if int(step) in window_ends(warmup):
            covariance = moments.covariance()
            deviations = covariance.diagonal(dim1=-2, dim2=-1).sqrt() if moments.is_full else covariance.sqrt()
            scale, longest = diagonal(deviations), torch.zeros_like(deviations)
            if is_dense(self.scale):  # whitened in all directions, none of which is the slowest
                scale = torch.linalg.cholesky(covariance)
            elif moments.is_full:
                longest = torch.linalg.eigh(covariance / deviations.unsqueeze(-2) / deviations.unsqueeze(-1))[1][..., -1]
            # the same step in the old coordinates: a geometric mean keeps it on average
            shift = log_size(self.scale) - log_size(scale)
            new = new._replace(
                scale=scale,
                longest=longest,
                jumps=torch.zeros_like(jumps),
                moments=Moments.like(state.position, moments.groups),
                since=torch.zeros_like(since),
                error_sum=torch.zeros_like(error_sum),
                log_step_mean=log_step + shift,
                log_step=log_step + shift,
                centre=log_step + shift,
                log_length=new.log_length_mean,
                log_length_mean=new.log_length_mean,
            )
        return new

    def _lengthen(self, before: HamiltonianState, info: HamiltonianInfo) -> tuple[Tensor, Tensor]:
        """A step up log(jump / length^COST), in whitened coordinates centred on each chain's own running mean.

            jump = ¼ E(|q′ − m|² − |q − m|²)²,   d jump / d length = E[(|q′ − m|² − |q − m|²) (q′ − m)·v′]

        Both are taken along the first principal component once a window has shown which it is: the slowest direction is
        what a trajectory must cover.

        Divided by the length, since time costs gradients. The jitter scales time and length alike, so that the slope in
        the logarithm takes the time that a trajectory had; both expectations are running means over steps and chains.
        """
        groups = self.moments.groups
        start = whitened(before.position - self.centres, self.scale)
        end = whitened(info.proposal - self.centres, self.scale)
        velocity = whitened(info.velocity, self.scale)
        if bool(self.longest.any()):
            start, end, velocity = (self._along(x) for x in (start, end, velocity))
        change = end.square().sum(-1) - start.square().sum(-1)
        along = (end * velocity).sum(-1)
        time = info.n_steps * info.step_size
        signals = torch.stack([time * change * along, 0.25 * change.square()])
        signals = (signals * info.acceptance_rate).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        jumps = 0.95 * self.jumps + 0.05 * pooled(signals, groups)
        slope = (jumps[0] / (jumps[1] + 1e-10)).clamp(-1.0, 3.0) - COST
        # whitened, no direction is longer than √D, and half a period of the longest is enough
        longest = math.log(math.pi * math.sqrt(self.scale.shape[-1]))
        return (self.log_length + 0.03 * slope).clamp(-4.0, longest), jumps

    def _along(self, vector: Tensor) -> Tensor:
        """(chain, D) -> (chain, 1), the component along the first principal component."""
        if self.longest.dim() == 1:
            return (vector @ self.longest).unsqueeze(-1)
        apart = vector.unflatten(0, (len(self.longest), -1))
        return (apart @ self.longest.unsqueeze(-1)).flatten(0, 1)


def halton(step: Tensor) -> Tensor:
    """Element ``step`` of van der Corput's sequence in base 2, on (0, 1)."""
    index, value, share = int(step) + 1, 0.0, 0.5
    while index:
        index, bit = divmod(index, 2)
        value += bit * share
        share *= 0.5
    return step.new_tensor(value)
