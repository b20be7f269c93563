"""Bounds on the evidence, as objectives of stochastic gradients.

All are means over independent elements (rows, mostly) of

    L_α(w) = 1/(1 − α) log (1/K Σ_k w_k^{1−α}),   w_k = p(x, z_k) / q(z_k),

of K particles z_k of the guide: α = 1, the limit, is the evidence lower bound, α = 0 the importance-weighted one. The
gradient in the weights of the program is Σ_k w̃_k ∇ log w_k, with w̃ = softmax((1 − α) log w). In those of the guide it has
the score of the guide, too, whose mean is zero at α = 1 only; written by the path of the draws alone it is

    Σ_k (α w̃_k + (1 − α) w̃_k²) ∂ log w_k / ∂z_k · ∂z_k / ∂φ.

References:
    Y. Li and R. Turner, Rényi divergence variational inference (2016).
    G. Tucker et al., Doubly reparameterized gradient estimators for Monte Carlo objectives (2019).
    A. Mnih and D. Rezende, Variational inference for Monte Carlo objectives (2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

__all__ = ["ELBO", "IWELBO", "Bound", "Cyclical", "MultiplyIWELBO", "Particles", "Renyi", "Warmup"]


class Particles(NamedTuple):
    """What K particles of a guide weigh, by the independent elements of the program.

    Of shape (particle, *element), and, of what is drawn once for all elements, ().

    Attributes:
        joint: log p(x_n, z_nk).
        log_q: log q(z_nk).
        shared_joint: log p of what belongs to no element.
        shared_log_q: log q of what belongs to no element.
        scale: How much an element counts, () or (*element): rows in all by rows in the batch, and any ``poutine.scale``.
        score: Log-probability of the guide's sites that are not reparameterised; None if there are none.
        shared_score: That of what belongs to no element.
        prior: log p(z_nk), (particle, *element); None where it is not known.
        shared_prior: That of what belongs to no element.
        parts: By group of latent numbers, log q − log p of it, (particle, *element, group); None where it is not asked for.
    """

    joint: Tensor
    log_q: Tensor
    shared_joint: Tensor
    shared_log_q: Tensor
    scale: Tensor
    score: Tensor | None = None
    shared_score: Tensor | None = None
    prior: Tensor | None = None
    shared_prior: Tensor | None = None
    parts: Tensor | None = None


@dataclass(frozen=True)
class Warmup:
    """β grows linearly from ``start`` to ``end`` over the first ``steps`` steps.

    References:
        S. Bowman et al., Generating sentences from a continuous space (2016).
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(self, self.steps, self.start, self.end)

    def __call__(self, step: int) -> float:
        """β of a step, of which the first is 0."""
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


@dataclass(frozen=True)
class Cyclical:
    """β grows linearly from ``start`` to ``end`` over the first half of every cycle of ``steps`` steps, and stays there.

    After the last of ``cycles`` it is ``end``.

    References:
        H. Fu et al., Cyclical annealing schedule: a simple approach to mitigating KL vanishing (2019).
    """

    steps: int
    cycles: int = 4
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        _check(self, self.steps, self.start, self.end)
        if not isinstance(self.cycles, int) or self.cycles < 1:
            raise ValueError(f"Cyclical(cycles={self.cycles!r}): must be an integer of at least 1.")

    def __call__(self, step: int) -> float:
        """β of a step, of which the first is 0."""
        if step >= self.steps * self.cycles:
            return self.end
        return self.start + (self.end - self.start) * min(1.0, 2.0 * (step % self.steps) / self.steps)


def _check(schedule: object, steps: int, start: float, end: float) -> None:
    name = type(schedule).__name__
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name}(steps={steps!r}): must be an integer of at least 1.")
    if not (start >= 0.0 and end >= 0.0):
        raise ValueError(f"{name}(start={start!r}, end={end!r}): must not be negative.")


Beta = float | Callable[[int], float]


class Bound:
    """What the bounds share.

    Attributes:
        particles: Draws from the guide per step, K.
        path: Whether the gradient leaves the score of the guide out, where its sites are reparameterised ("sticking the
            landing", and for importance weights "doubly reparameterised"). It stays unbiased, and its variance vanishes
            where the guide is the posterior. Other sites have a score with leave-one-out baselines (VIMCO).
        beta: Weight of the divergence of the guide from the prior, E_q[log q(z) − log p(z)]: a number, or a function of
            the step such as ``Warmup(1000)``. None takes that of the model (``inference.contract.Tempered``), else 1, with
            which alone it is a bound on the evidence.
    """

    particles: int
    path: bool
    beta: Beta | None

    @property
    def order(self) -> float:
        """α."""
        return 1.0

    @property
    def draws(self) -> int:
        """Particles in all."""
        return self.particles

    @property
    def floor(self) -> float:
        """The least divergence that counts, in nats a group of latent numbers."""
        return 0.0

    def combined(self, log_w: Tensor) -> Tensor:
        """L_α of log-weights (particle, …), (…)."""
        power = 1.0 - self.order
        if power == 0.0:
            return log_w.mean(0)
        return ((power * log_w).logsumexp(0) - math.log(len(log_w))) / power

    def loadings(self, log_w: Tensor) -> Tensor:
        """What multiplies the path derivative of each particle beyond w̃, the same shape as ``log_w``."""
        return self.order + (1.0 - self.order) * ((1.0 - self.order) * log_w.detach()).softmax(0)

    def log_weights(self, particles: Particles, beta: Tensor | None) -> Tensor:
        """log w with the divergence weighted, (particle, *element)."""
        log_w = particles.joint - particles.log_q
        if beta is not None:
            assert particles.prior is not None
            log_w = log_w + (beta - 1.0) * (particles.prior - particles.log_q)
        return self._grouped(log_w)

    def _grouped(self, values: Tensor) -> Tensor:
        return values

    def objective(self, particles: Particles, beta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What to differentiate, and the bound itself, both scalars.

        Args:
            particles: What the particles weigh.
            beta: Weight of the divergence, (); None is 1.
        """
        log_w = self.log_weights(particles, beta)
        shared = particles.shared_joint - particles.shared_log_q
        if beta is not None:
            assert particles.shared_prior is not None
            shared = shared + (beta - 1.0) * (particles.shared_prior - particles.shared_log_q)
        inside = self.combined(log_w)
        scale = particles.scale / max(1, inside.numel() // max(1, particles.joint[0].numel()))  # groups are averaged over
        bound = shared + (scale * inside).sum()
        surrogate = bound
        if particles.score is not None and particles.shared_score is not None:
            surrogate = surrogate + (scale * self._signal(log_w.detach()) * self._grouped(particles.score)).sum()
            surrogate = surrogate + bound.detach() * particles.shared_score
        return surrogate, bound.detach()

    def _signal(self, log_w: Tensor) -> Tensor:
        """What each particle adds to the bound, with that of the others for a baseline; the same shape."""
        count = len(log_w)
        if count == 1:
            return self.combined(log_w).unsqueeze(0)
        others = (log_w.sum(0) - log_w) / (count - 1)
        if self.order == 1.0:
            return (log_w - others) / count
        table = log_w.unsqueeze(1).expand(count, *log_w.shape).clone()  # (particle, left out, …)
        table[range(count), range(count)] = others
        return self.combined(log_w) - self.combined(table)

    def _check_particles(self) -> None:
        name = type(self).__name__
        if not isinstance(self.particles, int) or isinstance(self.particles, bool) or self.particles < 1:
            raise ValueError(f"{name}(particles={self.particles!r}): must be an integer of at least 1.")
        if self.beta is not None and not callable(self.beta) and not self.beta >= 0.0:
            raise ValueError(f"{name}(beta={self.beta!r}): must not be negative.")


@dataclass(frozen=True)
class ELBO(Bound):
    """Evidence lower bound: E_q[log p(x, z) − log q(z)] ≤ log p(x).

    Args:
        particles: Draws from the guide per step.
        path: Whether to drop the score of the guide from the gradient, where its sites are reparameterised. The gradient
            stays unbiased, and its variance vanishes where the guide is the posterior.
        beta: Weight of the divergence of the guide from the prior: a number, or a function of the step such as
            ``Warmup(1000)``. None takes that of the model, else 1.
        free_bits: Nats of divergence that cost nothing, for every number of a latent site of the rows (for every site, where
            its numbers are not independent); the divergence is averaged over the rows of a step first.

    References:
        D. Kingma and M. Welling, Auto-encoding variational Bayes (2014).
        G. Roeder, Y. Wu and D. Duvenaud, Sticking the landing (2017).
        I. Higgins et al., beta-VAE: learning basic visual concepts with a constrained variational framework (2017).
        D. Kingma et al., Improving variational inference with inverse autoregressive flow (2016): free bits.
    """

    particles: int = 1
    path: bool = True
    beta: Beta | None = None
    free_bits: float = 0.0

    def __post_init__(self) -> None:
        self._check_particles()
        if not self.free_bits >= 0.0:
            raise ValueError(f"ELBO(free_bits={self.free_bits!r}): must not be negative.")

    @property
    def floor(self) -> float:
        return self.free_bits

    def objective(self, particles: Particles, beta: Tensor | None = None) -> tuple[Tensor, Tensor]:
        surrogate, bound = super().objective(particles, beta)
        if particles.parts is None:
            return surrogate, bound
        # mean over particles, sum over elements; the floor is for what a row costs in the mean
        elements = max(1, particles.joint[0].numel())
        costs = (particles.scale * particles.parts.movedim(-1, 0)).flatten(1).sum(1) / particles.parts.shape[0]
        total = particles.scale.sum() * (elements if particles.scale.dim() == 0 else 1)
        extra = (total * self.free_bits - costs).clamp(min=0.0).sum()
        weight = 1.0 if beta is None else beta
        return surrogate - weight * extra, bound - (weight * extra).detach()


@dataclass(frozen=True)
class IWELBO(Bound):
    """Importance-weighted bound: E log (1/K Σ_k p(x, z_k) / q(z_k)) ≤ log p(x), tighter with every particle.

    Particles are weighed row by row, or element by element of the plates that the latent sites of the guide share; what is
    drawn once for all rows enters as in the evidence lower bound. So it is a bound under sub-sampling, too. Without such a
    plate particles are weighed as a whole, which needs all rows at a time.

    Args:
        particles: K.
        path: Whether to take the doubly reparameterised gradient, where the sites of the guide are reparameterised: the
            plain one of the guide's weights drowns in noise as K grows.
        beta: As that of ``ELBO``.

    References:
        Y. Burda, R. Grosse and R. Salakhutdinov, Importance weighted autoencoders (2016).
        G. Tucker et al., Doubly reparameterized gradient estimators for Monte Carlo objectives (2019).
        A. Mnih and D. Rezende, Variational inference for Monte Carlo objectives (2016): sites without a path.
    """

    particles: int = 5
    path: bool = True
    beta: Beta | None = None

    def __post_init__(self) -> None:
        self._check_particles()

    @property
    def order(self) -> float:
        return 0.0


@dataclass(frozen=True)
class MultiplyIWELBO(Bound):
    """Mean of ``groups`` importance-weighted bounds of ``particles`` each: between ``ELBO`` and ``IWELBO``.

    More particles tighten the bound, more groups take noise from the gradient of the guide.

    Args:
        groups: M.
        particles: K, of each group.
        path: As that of ``IWELBO``.
        beta: As that of ``ELBO``.

    References:
        T. Rainforth et al., Tighter variational bounds are not necessarily better (2018).
    """

    groups: int = 8
    particles: int = 8
    path: bool = True
    beta: Beta | None = None

    def __post_init__(self) -> None:
        self._check_particles()
        if not isinstance(self.groups, int) or self.groups < 1:
            raise ValueError(f"MultiplyIWELBO(groups={self.groups!r}): must be an integer of at least 1.")

    @property
    def order(self) -> float:
        return 0.0

    @property
    def draws(self) -> int:
        return self.groups * self.particles

    def _grouped(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (self.particles, self.groups))

    def loadings(self, log_w: Tensor) -> Tensor:
        return super().loadings(log_w).flatten(0, 1)


@dataclass(frozen=True)
class Renyi(Bound):
    """Rényi's bound of order α: 1/(1 − α) log E_q[(p(x, z) / q(z))^{1−α}], estimated with K particles.

    Orders from 0 (``IWELBO``) to 1 (``ELBO``) are bounds whatever K; a negative one bounds from above only as K grows.

    Args:
        order: α, at most 1.
        particles: K; what is estimated grows with it.
        path: As that of ``IWELBO``.
        beta: As that of ``ELBO``.

    References:
        Y. Li and R. Turner, Rényi divergence variational inference (2016).
    """

    order: float = 0.5
    particles: int = 5
    path: bool = True
    beta: Beta | None = None

    def __post_init__(self) -> None:
        self._check_particles()
        if not self.order <= 1.0:
            raise ValueError(f"Renyi(order={self.order!r}): must be at most 1.")
