"""Learning the size and the shape of a proposal in warm-up, for kernels whose step size has a best acceptance rate.

References:
    M. Hoffman and A. Gelman, The No-U-Turn Sampler: adaptively setting path lengths in Hamiltonian Monte Carlo (2014):
        dual averaging.
    M. Hoffman, A. Radul and P. Sountsov, An adaptive-MCMC scheme for setting trajectory lengths in Hamiltonian Monte
        Carlo (2021): the harmonic mean of the chains' acceptance rates.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from inference.contract import Unsupported
from inference.mcmc import (
    WIDEST_COVARIANCE,
    Moments,
    diagonal,
    evened,
    is_dense,
    lead,
    log_size,
    recent,
    window_ends,
)

__all__ = ["MASSES", "StepAdaptation", "check_mass"]

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


class StepAdaptation(NamedTuple):
    """Step size by dual averaging on all chains together, factor L of the pooled covariance L Lᵀ window by window.

    With groups, what is marked has a leading group axis.

    Attributes:
        step: Steps of the run, ().
        since: Steps of the current window, ().
        log_step: The step size to try next, (), marked.
        log_step_mean: Its average over the window, (), marked.
        error_sum: Sum of target minus acceptance, (), marked.
        centre: Where dual averaging pulls to, (), marked.
        rates: Recent acceptance rate of every chain, (chain,).
        factor: L, (D, D) and lower triangular, or its diagonal (D,); of groups (group, D, D) or (group, 1, D).
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
    def start(cls, position: Tensor, log_step: Tensor | float, dense: bool, groups: int = 1) -> StepAdaptation:
        """At positions (chain, D), with a first ``log_step`` () or (group,) and an identity for factor."""
        zero, width = position.new_zeros(()), position.shape[-1]
        log = torch.as_tensor(log_step, dtype=position.dtype, device=position.device)
        ones = position.new_ones((*lead(groups), width))
        factor = torch.diag_embed(ones) if dense and width <= WIDEST_COVARIANCE else diagonal(ones)
        rates, moments = torch.ones_like(position[:, 0]), Moments.like(position, groups)
        return cls(zero, zero, log, log, torch.zeros_like(log), log + math.log(2.0), rates, factor, moments)

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
        error_sum = self.error_sum + (target - evened(rate, rates, self.moments.groups))
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
        if is_dense(self.factor):
            factor = torch.linalg.cholesky(covariance)
        else:
            variances = covariance.diagonal(dim1=-2, dim2=-1) if moments.is_full else covariance
            factor = diagonal(variances.sqrt())
        # the same step in the old coordinates: a geometric mean keeps it on average
        kept = log_step_mean + log_size(self.factor) - log_size(factor)
        zero, zeros, moments = torch.zeros_like(since), torch.zeros_like(error_sum), Moments.like(position, moments.groups)
        return StepAdaptation(step, zero, kept, kept, zeros, kept, rates, factor, moments)
