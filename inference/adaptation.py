"""Learning the size and the shape of a proposal in warm-up, for kernels whose step size has a best acceptance rate.

References:
    M. Hoffman and A. Gelman, The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (2014):
        dual averaging.
    M. Hoffman, A. Radul and P. Sountsov, An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte
        Carlo (2021): the harmonic mean of the chains' acceptance rates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inference.contract import Unsupported
from inference.mcmc import WIDEST_COVARIANCE, Moments, window_ends

__all__ = ["MASSES", "StepAdaptation", "check_mass", "first_log_step"]

MASSES = ("diagonal", "dense")


def check_mass(mass: str, width: int) -> bool:
    """Whether a mass matrix is to be dense.

    Raises:
        ValueError: If it is neither "diagonal" nor "dense".
        Unsupported: If a dense one would be too large.
    """
    if mass not in MASSES:
        raise ValueError(f"mass={mass!r}: must be one of {', '.join(repr(name) for name in MASSES)}.")
    if mass == "dense" and width > WIDEST_COVARIANCE:
        raise Unsupported(
            f"mass='dense' keeps a matrix of {width} by {width} numbers, but {WIDEST_COVARIANCE} by {WIDEST_COVARIANCE} is "
            "the most. Use mass='diagonal'."
        )
    return mass == "dense"


def first_log_step(rate: Callable[[float], Tensor]) -> float:
    """Halves or doubles a step size of 0.1 until its acceptance rate crosses a half; returns its logarithm.

    Args:
        rate: Step size to the acceptance rate of every chain, (chain,).
    """
    log_step, direction = math.log(0.1), 0
    for _ in range(30):
        rises = 1 if float(rate(math.exp(log_step)).mean()) > 0.5 else -1
        if direction and rises != direction:
            break
        direction = rises
        log_step += rises * math.log(2.0)
    return log_step


def recent(rates: Tensor, rate: Tensor) -> Tensor:
    """Running acceptance rate of every chain, about ten steps long; both (chain,)."""
    return rates + 0.1 * (rate - rates)


def evened(rate: Tensor, rates: Tensor) -> Tensor:
    """Mean acceptance rate of the chains, lowered as far as they differ for long: one stuck chain shortens the steps.

    The harmonic by the arithmetic mean of what each chain accepted recently; of single steps, the harmonic mean would
    be low in every chain.

    Args:
        rate: Acceptance rates of this step, (chain,).
        rates: Running ones, (chain,).
    """
    return rate.mean() / (rates.clamp(min=1e-10).reciprocal().mean() * rates.mean())


class StepAdaptation(NamedTuple):
    """Step size by dual averaging on all chains together, factor L of the pooled covariance L Lᵀ window by window.

    Attributes:
        step: Steps of the run, ().
        since: Steps of the current window, ().
        log_step: The step size to try next, ().
        log_step_mean: Its average over the window, ().
        error_sum: Sum of target minus acceptance, ().
        centre: Where dual averaging pulls to, ().
        rates: Recent acceptance rate of every chain, (chain,).
        factor: L, (D, D) and lower triangular, or its diagonal (D,).
        moments: Of the current window.
    """

    step: Tensor
    since: Tensor
    log_step: Tensor
    log_step_mean: Tensor
    error_sum: Tensor
    centre: Tensor
    rates: Tensor
    factor: Tensor
    moments: Moments

    @classmethod
    def start(cls, position: Tensor, log_step: float, is_dense: bool) -> StepAdaptation:
        """At positions (chain, D), with an identity for factor."""
        zero, width = position.new_zeros(()), position.shape[-1]
        log = position.new_tensor(log_step)
        one = torch.ones_like(position[0])
        factor = torch.diag(one) if is_dense and width <= WIDEST_COVARIANCE else one
        rates = torch.ones_like(position[:, 0])
        return cls(zero, zero, log, log, zero, log + math.log(2.0), rates, factor, Moments.like(position))

    def step_size(self, is_final: bool) -> Tensor:
        """The step size to try, or the average that is kept after warm-up."""
        return (self.log_step_mean if is_final else self.log_step).exp()

    def update(self, position: Tensor, rate: Tensor, warmup: int, target: float) -> StepAdaptation:
        """What one warm-up step teaches.

        Args:
            position: Where the chains are, (chain, D).
            rate: Their acceptance rates, (chain,).
            warmup: Length of the warm-up.
            target: Acceptance rate aimed at.
        """
        step, since = self.step + 1, self.since + 1
        rates = recent(self.rates, rate)
        error_sum = self.error_sum + (target - evened(rate, rates))
        log_step = self.centre - error_sum * since.sqrt() / (0.05 * (since + 10.0))
        weight = since**-0.75
        log_step_mean = weight * log_step + (1 - weight) * self.log_step_mean
        moments = self.moments.update(position)
        new = self._replace(
            step=step,
            since=since,
            log_step=log_step,
            log_step_mean=log_step_mean,
            error_sum=error_sum,
            rates=rates,
            moments=moments,
        )
        if int(step) not in window_ends(warmup):
            return new
        covariance = moments.covariance()
        if self.factor.dim() == 2:
            factor = torch.linalg.cholesky(covariance)
        else:
            factor = (covariance.diagonal() if covariance.dim() == 2 else covariance).sqrt()
        # the same step in the old coordinates: a geometric mean keeps it on average
        kept = log_step_mean + (_log_sizes(self.factor) - _log_sizes(factor)).mean()
        zero = torch.zeros_like(since)
        return StepAdaptation(step, zero, kept, kept, zero, kept, rates, factor, Moments.like(position))


def _log_sizes(factor: Tensor) -> Tensor:
    return (factor.diagonal() if factor.dim() == 2 else factor).log()
