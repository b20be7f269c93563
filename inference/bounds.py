"""Bounds on the evidence, as objectives of stochastic gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["ELBO"]


@dataclass(frozen=True)
class ELBO:
    """Evidence lower bound: E_q[log p(x, z) − log q(z)] ≤ log p(x).

    Args:
        particles: Draws from the guide per step.
        path: Whether to drop the score of the guide from the gradient, where its sites are reparameterised. The gradient
            stays unbiased, and its variance vanishes where the guide is the posterior.

    References:
        D. Kingma and M. Welling, Auto-encoding variational Bayes (2014).
        G. Roeder, Y. Wu and D. Duvenaud, Sticking the landing (2017).
    """

    particles: int = 1
    path: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.particles, int) or self.particles < 1:
            raise ValueError(f"ELBO(particles={self.particles!r}): must be an integer of at least 1.")

    def surrogate(self, log_p: Tensor, log_q: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
        """What to differentiate, and the bound itself.

        Args:
            log_p: log p(x, z) of each particle, (particle,).
            log_q: log q(z), with or without its score, (particle,).
            score: Log-probability of the guide's sites that are not reparameterised, (particle,).
        """
        terms = log_p - log_q
        baseline = (terms.sum() - terms).detach() / max(self.particles - 1, 1) * (self.particles > 1)
        return (terms + (terms.detach() - baseline) * score).mean(), terms.detach().mean()
