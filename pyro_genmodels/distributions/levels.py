"""Grey levels: finitely many, in order."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor
from torch.nn.functional import logsigmoid

from pyro_genmodels.distributions.special import log1mexp

__all__ = ["DiscretisedLogistic", "Levels"]


class Levels(constraints.Constraint):
    """The numbers 0, 1/(bins − 1), 2/(bins − 1), …, 1, to the rounding of bytes divided by 255 in float32."""

    is_discrete = True

    def __init__(self, bins: int) -> None:
        self.bins = bins

    def check(self, value: Tensor) -> Tensor:
        level = value * (self.bins - 1)
        is_level: Tensor = ((level - level.round()).abs() < 1e-3) & (value > -1e-6) & (value < 1.0 + 1e-6)
        return is_level


class DiscretisedLogistic(TorchDistribution):
    """A logistic variable rounded to the nearest of finitely many levels in [0, 1]; what is beyond an end counts there.

        y ~ Logistic(μ, s),  x = the level k/(bins − 1) nearest to y

    p(x) is a difference of sigmoids, σ(b) − σ(a) = σ(b) σ(−a) (1 − e^(a−b)): its logarithm has no difference in it that
    rounding could spoil, and no floor.

    Args:
        loc: μ, (*batch).
        scale: s > 0, (*batch).
        bins: Number of levels, at least 2; 256 for bytes.

    Raises:
        ValueError: If there are fewer than 2 levels.

    References:
        D. Kingma et al., Improved variational inference with inverse autoregressive flow (2016), appendix.
        T. Salimans et al., PixelCNN++ (2017).
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_enumerate_support = True

    def __init__(self, loc: Tensor, scale: Tensor, bins: int, validate_args: bool | None = None) -> None:
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"DiscretisedLogistic has at least 2 levels, but bins is {bins}.")
        self.loc, self.scale = torch.broadcast_tensors(loc, scale)
        self.bins = bins
        super().__init__(self.loc.shape, validate_args=validate_args)

    @property
    def support(self) -> Any:
        return Levels(self.bins)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DiscretisedLogistic:
        shape = Size(batch_shape)
        return DiscretisedLogistic(self.loc.expand(shape), self.scale.expand(shape), self.bins, validate_args=False)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        levels = torch.linspace(0.0, 1.0, self.bins, dtype=self.loc.dtype, device=self.loc.device)
        levels = levels.reshape(-1, *(1,) * len(self.batch_shape))
        return levels.expand(-1, *self.batch_shape) if expand else levels

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        last, half = self.bins - 1, 0.5 / (self.bins - 1)
        level = (value * last).round()
        middle = (level / last - self.loc) / self.scale
        below, above, width = middle - half / self.scale, middle + half / self.scale, 2.0 * half / self.scale
        inner = torch.where((level > 0) & (level < last), log1mexp(-width), 0.0)
        return torch.where(level < last, logsigmoid(above), 0.0) + torch.where(level > 0, logsigmoid(-below), 0.0) + inner

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: B008
        with torch.no_grad():
            uniform = torch.rand(Size(sample_shape) + self.batch_shape, dtype=self.loc.dtype, device=self.loc.device)
            finfo = torch.finfo(uniform.dtype)
            y = self.loc + self.scale * torch.logit(uniform.clamp(finfo.tiny, 1.0 - finfo.eps))
            return (y.clamp(0.0, 1.0) * (self.bins - 1)).round() / (self.bins - 1)

    @property
    def mean(self) -> Tensor:
        total = torch.zeros_like(self.loc)
        for k in range(1, self.bins):  # Σ_k p(x ≥ level k); one after the other: a picture has many numbers
            total = total + torch.sigmoid((self.loc - (k - 0.5) / (self.bins - 1)) / self.scale)
        return total / (self.bins - 1)

    def entropy(self) -> Tensor:
        log_prob = self.log_prob(self.enumerate_support())
        return -(log_prob.exp() * log_prob).sum(0)
