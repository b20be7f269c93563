"""Counts whose rates a network gives: logarithms to the end, so that every rate has a gradient."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor

from pyro_genmodels.distributions.special import log_gamma_ratio

__all__ = ["LogPoisson", "NegativeBinomial"]


class LogPoisson(TorchDistribution):
    """Poisson distribution, given the logarithm of its rate.

        p(x) = exp(x ℓ − e^ℓ) / x!

    Args:
        log_rate: ℓ, (*batch).
    """

    arg_constraints = {"log_rate": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, log_rate: Tensor, validate_args: bool | None = None) -> None:
        self.log_rate = log_rate
        super().__init__(log_rate.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LogPoisson:
        return LogPoisson(self.log_rate.expand(Size(batch_shape)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.log_rate.exp()

    @property
    def variance(self) -> Tensor:
        return self.log_rate.exp()

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            return torch.poisson(self.log_rate.exp().expand(Size(sample_shape) + self.batch_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return value * self.log_rate - self.log_rate.exp() - torch.lgamma(value + 1.0)


class NegativeBinomial(TorchDistribution):
    """A Poisson distribution whose rate has a Gamma distribution, given the logarithms of its mean and its size.

        λ ~ Gamma(r, r/m),  x ~ Poisson(λ);    E x = m,  Var x = m + m²/r

    Args:
        log_mean: log m, (*batch).
        log_size: log r, (*batch); the larger, the nearer to a Poisson distribution.
    """

    arg_constraints = {"log_mean": constraints.real, "log_size": constraints.real}  # noqa: RUF012
    support = constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, log_size: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean, self.log_size = torch.broadcast_tensors(log_mean, log_size)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> NegativeBinomial:
        shape = Size(batch_shape)
        return NegativeBinomial(self.log_mean.expand(shape), self.log_size.expand(shape), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        return self.mean + (2.0 * self.log_mean - self.log_size).exp()

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            size = self.log_size.exp().expand(shape)
            # Gamma(r) as Gamma(r + 1) U^(1/r), by logarithms: a small r leaves rates that are no floating number
            log_gamma = torch._standard_gamma(size + 1.0).log() + torch.rand_like(size).log() / size
            return torch.poisson((log_gamma + self.log_mean - self.log_size).exp())

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        odds, size = self.log_mean - self.log_size, self.log_size.exp()
        value, size = torch.broadcast_tensors(value.to(size), size)
        none = torch.nn.functional.logsigmoid(-odds)  # log p(x = 0) / r
        counts = log_gamma_ratio(size, value)[0] - torch.lgamma(value + 1.0)
        return counts + size * none + value * torch.nn.functional.logsigmoid(odds)
