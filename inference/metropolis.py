"""Metropolis-Hastings: propose, then accept or stay.

References:
    N. Metropolis et al., Equation of state calculations by fast computing machines (1953).
    W. Hastings, Monte Carlo sampling methods using Markov chains and their applications (1970).
    G. Roberts, A. Gelman and W. Gilks, Weak convergence and optimal scaling of random walk Metropolis algorithms (1997).
    G. Roberts and R. Tweedie, Exponential convergence of Langevin distributions and their discrete approximations (1996).
"""

from __future__ import annotations

import abc
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from inference.adaptation import StepAdaptation
from inference.contract import Unsupported
from inference.density import Unconstrained
from inference.guides import Guide, GuideReference
from inference.marginal import MarginalSampler, MarginalState
from inference.mcmc import RandomWalkAdaptation, first_log_step, lead
from inference.posterior import Posterior
from inference.program import Program
from inference.proposals import IndependenceKernel, LangevinKernel, PriorReference, Reference, StudentReference
from inference.traces import TraceSampler

__all__ = ["Independence", "Langevin", "MetropolisHastings", "Prior", "Proposal", "RandomWalk", "Unadjusted"]


class Proposal(abc.ABC):
    """How to propose: gives a kernel and what it learns in warm-up."""

    @property
    def update(self) -> str:
        """What a plan prints."""
        return type(self).__name__

    @property
    def takes_surrogates(self) -> bool:
        """Whether it looks at gradients alone; see ``inference.contract.Surrogate``."""
        return False

    @property
    def note(self) -> str:
        """What a plan says of how exact it is."""
        return ""

    @property
    def needs_gradient(self) -> bool:
        """Whether the kernel's density returns (gradient, value)."""
        return False

    @property
    def climbs(self) -> bool:
        """Whether chains first climb the density, where nobody says where they start."""
        return True

    @property
    def takes_changing(self) -> bool:
        """Whether ``inference.traces`` can propose in the same way where the structure of a program changes."""
        return False

    @abc.abstractmethod
    def begin(self, position: Tensor, density: Callable[[Tensor], Any], program: Program, is_given: bool) -> tuple[Any, Any]:
        """The kernel's first state and what it has learnt, at (chain, D); ``is_given`` if the caller chose the place."""

    @abc.abstractmethod
    def move(self, kernel: Any, adaptation: Any, density: Callable[[Tensor], Any], warmup: int) -> tuple[Any, Any, Any]:
        """One move: new state, adaptation and info; ``warmup`` is its length while it lasts, then 0."""


@dataclass(frozen=True)
class RandomWalk(Proposal):
    """A Gaussian step whose full covariance is learnt in warm-up, within chains and pooled over them."""

    def begin(self, position: Tensor, density: Callable[[Tensor], Any], program: Program, is_given: bool) -> tuple[Any, Any]:
        adaptation = RandomWalkAdaptation.like(position, program.groups)
        return adaptation.kernel.init(position, density), adaptation

    def move(self, kernel: Any, adaptation: Any, density: Callable[[Tensor], Any], warmup: int) -> tuple[Any, Any, Any]:
        state, info = adaptation.kernel.step(kernel, density)
        return state, adaptation.update(state, info, warmup) if warmup else adaptation, info


@dataclass(frozen=True)
class Langevin(Proposal):
    """A Gaussian step along the gradient (MALA), preconditioned by the covariance of warm-up, pooled over chains.

    Args:
        target: Acceptance rate that warm-up aims at, in (0, 1); 0.574 is the best in high dimension.
    """

    target: float = 0.574

    @property
    def needs_gradient(self) -> bool:
        return True

    def begin(self, position: Tensor, density: Callable[[Tensor], Any], program: Program, is_given: bool) -> tuple[Any, Any]:
        if not 0.0 < self.target < 1.0:
            raise ValueError(f"Langevin(target={self.target!r}): must lie between 0 and 1.")
        groups = program.groups
        zeros = position.new_zeros(lead(groups))
        factor = StepAdaptation.start(position, zeros, dense=True, groups=groups).factor
        state = LangevinKernel(zeros, factor).init(position, density)

        def rate(step_size: Tensor) -> Tensor:
            return LangevinKernel(step_size, factor).step(state, density)[1].acceptance_rate

        log_step = first_log_step(rate, position, groups)
        return state, StepAdaptation.start(position, log_step, dense=True, groups=groups)

    def move(self, kernel: Any, adaptation: Any, density: Callable[[Tensor], Any], warmup: int) -> tuple[Any, Any, Any]:
        now = LangevinKernel(adaptation.step_size(is_final=not warmup), adaptation.factor)
        state, info = now.step(kernel, density)
        if warmup:
            adaptation = adaptation.update(state.position, info.acceptance_rate, warmup, self.target)
        return state, adaptation, info


@dataclass(frozen=True)
class Unadjusted(Proposal):
    """Langevin moves that are all taken, q ← q + δ/2 ∇log π(q) + √δ ξ (ULA): for a gradient without a density.

    It follows gradients alone, and so takes a surrogate (``inference.contract.Surrogate``). What it settles at is not π: a
    normal of variance v, in the unconstrained coordinates, becomes one of v / (1 − δ/(4v)), and for δ ≥ 4v it settles
    nowhere. Nothing is learnt in warm-up, since nothing says how large a step is right. With a density, use ``Langevin()``.

    Args:
        step: δ, positive, in the units of the squared unconstrained coordinates.

    References:
        G. Roberts and R. Tweedie, Exponential convergence of Langevin distributions and their discrete approximations
            (1996).
    """

    step: float

    def __post_init__(self) -> None:
        if not 0.0 < self.step < math.inf:
            raise ValueError(f"Unadjusted(step={self.step!r}): must be positive and finite.")

    @property
    def takes_surrogates(self) -> bool:
        return True

    @property
    def needs_gradient(self) -> bool:
        return True

    @property
    def climbs(self) -> bool:
        return False

    @property
    def note(self) -> str:
        return "every move is taken: biased by the size of its step"

    def _kernel(self, position: Tensor) -> LangevinKernel:
        ones = torch.ones_like(position[0])
        return LangevinKernel(ones.new_tensor(self.step**0.5), ones, is_adjusted=False)

    def begin(self, position: Tensor, density: Callable[[Tensor], Any], program: Program, is_given: bool) -> tuple[Any, Any]:
        state = self._kernel(position).init(position, density)
        self._check(state.gradient.isfinite().all(-1))
        return state, ()

    def move(self, kernel: Any, adaptation: Any, density: Callable[[Tensor], Any], warmup: int) -> tuple[Any, Any, Any]:
        state, info = self._kernel(kernel.position).step(kernel, density)
        self._check(info.accepted)
        return state, adaptation, info

    def _check(self, is_finite: Tensor) -> None:
        if not bool(is_finite.all()):
            raise ValueError(
                f"The gradient of the log-density is NaN or infinite where {int((~is_finite).sum())} of {len(is_finite)} "
                f"chains came to. Take a step below {self.step:g}, if they ran away, or look at the weights of the score."
            )


class _Independent(Proposal):
    """What proposes from one distribution, wherever the chain is; it learns nothing, and starts in draws of it."""

    @property
    def climbs(self) -> bool:
        return False

    @abc.abstractmethod
    def reference(self, program: Program) -> Reference:
        """What is proposed from."""

    def begin(self, position: Tensor, density: Callable[[Tensor], Any], program: Program, is_given: bool) -> tuple[Any, Any]:
        kernel = IndependenceKernel(self.reference(program))
        return kernel.init(position if is_given else None, density, len(position)), kernel

    def move(self, kernel: Any, adaptation: Any, density: Callable[[Tensor], Any], warmup: int) -> tuple[Any, Any, Any]:
        state, info = adaptation.step(kernel, density)
        return state, adaptation, info


@dataclass(frozen=True)
class Independence(_Independent):
    """Draws of a fixed distribution q, accepted by their importance weights: an exact sampler of whatever q misses.

    ``posterior.stats`` then has ``log_q`` beside ``lp``, both in unconstrained coordinates, and ``log_weight``, that of
    each proposal, for PSIS and for the evidence (the mean of its exponential).

    Args:
        guide: A Pyro guide, used as it is; or the Posterior of a variational fit, whose guide is taken; or that of a
            sampler, to whose draws a mixture of Student distributions is fitted; None takes the model's own guide.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from inference import SVI, Independence, MetropolisHastings
        >>> def coin(flips):
        ...     fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        ...     with pyro.plate("flip", len(flips)):
        ...         pyro.sample("heads", dist.Bernoulli(fairness), obs=flips)
        >>> fit = SVI(seed=0, steps=300, progress=False).fit(coin, torch.ones(8))
        >>> exact = MetropolisHastings(proposal=Independence(fit), draws=100, warmup=0, seed=0, progress=False)
        >>> exact.fit(coin, torch.ones(8)).draws["fairness"].shape
        torch.Size([4, 100])
    """

    guide: Callable[..., Any] | Posterior | None = field(default=None)

    def reference(self, program: Program) -> Reference:
        chosen = program.guide if self.guide is None else self.guide
        if chosen is None:
            raise Unsupported(
                f"Independence() needs something to propose from, but {program.name} brings no guide. Give a fitted "
                "Posterior, such as Independence(SVI().fit(...)), or a Pyro guide."
            )
        if isinstance(chosen, Posterior):
            return _of_posterior(chosen, program)
        if inspect.isclass(chosen) or not callable(chosen):
            raise TypeError(
                f"Independence(guide={chosen!r}): must be a Pyro guide or a fitted Posterior. A class of automatic guides "
                "has to be fitted first: Independence(SVI(guide=...).fit(...))."
            )
        return GuideReference(Guide(chosen), program)


def _of_posterior(posterior: Posterior, program: Program) -> Reference:
    kind = posterior.info.get("kind", "samples")
    if kind == "point":
        raise Unsupported("Independence() needs a distribution, but this Posterior is one point. Fit by SVI() or a sampler.")
    if kind == "variational":
        if posterior.program is None or posterior.program.fitted is None:
            raise Unsupported(
                "This Posterior has no guide any more: a guide is code, which save and load leave out. Fit again, or give "
                "the guide itself."
            )
        return GuideReference(posterior.program.fitted, program)
    coordinates = Unconstrained(program, program.continuous)
    values = {}
    for name in coordinates.sites:
        shape = program.latents[name].shape
        if name not in posterior.draws or posterior.draws[name].shape[2:] != shape:
            raise Unsupported(
                f"{program.name} has a site '{name}' of shape {tuple(shape)}, of which this Posterior has no draws."
            )
        values[name] = posterior.draws[name].flatten(0, 1).to(program.device, program.dtype)
    position = coordinates.position(values)
    position = position[position.isfinite().all(-1)]
    if len(position) < 2 * (coordinates.size + 1):
        raise Unsupported(
            f"This Posterior has {len(position)} usable draws, too few for a covariance in {coordinates.size} dimensions."
        )
    return StudentReference.fitted(position)


@dataclass(frozen=True)
class Prior(_Independent):
    """Draws of the prior, accepted by the ratio of likelihoods: for few observations, and without a gradient.

    Where sites come and go, or their shapes or supports change, or Python reads a latent value (``if``, ``int``), so that
    they may, one site at a time is drawn from its prior, and the program is run again around it: see ``inference.traces``.
    """

    @property
    def takes_changing(self) -> bool:
        return True

    def reference(self, program: Program) -> Reference:
        return PriorReference(program)


@dataclass(frozen=True, kw_only=True)
class MetropolisHastings(MarginalSampler):
    """Metropolis-Hastings on the unconstrained continuous sites, finite discrete ones summed out and drawn back.

    With ``Prior()`` it also runs programs whose structure changes: see ``inference.traces``.

    Args:
        proposal: How to propose: ``RandomWalk()``, ``Langevin()``, ``Independence(...)`` or ``Prior()``; or
            ``Unadjusted(step)``, which accepts all.
        chains: Number of chains, all advanced at once.
        draws: Draws kept of each chain.
        warmup: Adaptive steps before the first draw.
        thin: Steps per draw; a random walk needs about ten per dimension for one independent draw.
        until: When to stop before all draws are taken, such as ``Until(rhat=1.01, ess=400)``.
    """

    proposal: Proposal = field(default_factory=RandomWalk)

    @property
    def update(self) -> str:
        return self.proposal.update

    @property
    def view(self) -> dict[str, Any]:
        return {"takes_surrogates": self.proposal.takes_surrogates}

    @property
    def note(self) -> str:
        return self.proposal.note

    @property
    def changing(self) -> TraceSampler | None:
        if not self.proposal.takes_changing:
            return None
        return TraceSampler(**{field.name: getattr(self, field.name) for field in fields(TraceSampler)})

    @property
    def needs_gradient(self) -> bool:
        return self.proposal.needs_gradient

    @property
    def climbs(self) -> bool:
        return self.proposal.climbs

    def saved(self, state: MarginalState, program: Program) -> MarginalState:
        learnt = state.adaptation
        is_code = isinstance(learnt, IndependenceKernel) and not isinstance(learnt.reference, StudentReference)
        return state._replace(adaptation=None) if is_code else state

    def restored(self, saved: MarginalState, program: Program) -> MarginalState:
        """A guide or a prior is code, and the proposal has it."""
        if saved.adaptation is not None:
            return saved
        assert isinstance(self.proposal, _Independent)
        return saved._replace(adaptation=IndependenceKernel(self.proposal.reference(program)))

    def begin(self, position: Tensor, density: Callable[[Tensor], Any], program: Program) -> tuple[Any, Any]:
        return self.proposal.begin(position, density, program, is_given=self.start is not None)

    def move(self, kernel: Any, adaptation: Any, density: Callable[[Tensor], Any], warmup: int) -> tuple[Any, Any, Any]:
        return self.proposal.move(kernel, adaptation, density, warmup)
