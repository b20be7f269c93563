"""When a sampler may stop before it has taken all its draws."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Until"]

_FEWEST = 4  # draws; of fewer, there is no R-hat


@dataclass(frozen=True)
class Until:
    """Targets of a sampler: it stops as soon as all of them are met, or the time is spent; ``draws`` is the most.

    R-hat and ESS are ArviZ's, the worst over what ``posterior.diagnose`` judges. They are looked at after every ``every``
    draws of a chain, so that where a run stops follows from its draws. Stopping at the first look that pleases makes the
    last look a little too pleasing: ask for more than is needed.

    A time budget is looked at after every draw, from the call of ``fit`` or ``resume`` on, warm-up included, which is never
    cut short. It is the one thing that may depend on the clock, and a finding says so where it ended a run.

    Args:
        rhat: Largest R-hat, at least 1.
        ess: Smallest effective sample size, of all chains together.
        seconds: Time budget, positive.
        every: Draws of a chain from one look to the next, at least 4.

    References:
        A. Vehtari et al., Rank-normalization, folding, and localization: an improved R-hat (2021).
        J. Flegal and L. Gong, Relative fixed-width stopping rules for Markov chain Monte Carlo simulations (2015).
    """

    rhat: float | None = None
    ess: float | None = None
    seconds: float | None = None
    every: int = 100

    @property
    def has_targets(self) -> bool:
        """Whether draws are looked at, and not the clock alone."""
        return self.rhat is not None or self.ess is not None

    def are_met(self, rhat: float, ess: float) -> bool:
        """Whether the worst R-hat and ESS of some draws are good enough; NaN is not."""
        return (self.rhat is None or rhat <= self.rhat) and (self.ess is None or ess >= self.ess)

    def check(self, chains: int, draws: int) -> None:
        """Refuses what can never be met in a run of so many chains and draws.

        Raises:
            ValueError: If there is no target, or one that is out of reach.
        """
        if self.rhat is None and self.ess is None and self.seconds is None:
            raise ValueError("until=Until() has no target. Give it rhat=, ess= or seconds=.")
        if self.rhat is not None and not self.rhat >= 1.0:
            raise ValueError(f"until=Until(rhat={self.rhat}) can never be met: R-hat is 1 at best. Try rhat=1.01.")
        if self.ess is not None and not self.ess > 0:
            raise ValueError(f"until=Until(ess={self.ess}): must be positive.")
        if self.ess is not None and self.ess > chains * draws:
            raise ValueError(
                f"until=Until(ess={self.ess}) can never be met: {chains} chains of {draws} draws are {chains * draws}. "
                "Raise draws, or ask for less."
            )
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ValueError(f"until=Until(seconds={self.seconds}): must be positive and finite.")
        if not isinstance(self.every, int) or self.every < _FEWEST:
            raise ValueError(f"until=Until(every={self.every!r}): must be an integer of at least {_FEWEST}.")
        if self.has_targets and self.every > draws:
            raise ValueError(
                f"until=Until(every={self.every}) would never look at the {draws} draws. Raise draws, or lower every."
            )
