"""Priors of what an autoencoder hides, each with the family that its guide guesses in."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_genmodels.base import StochasticModule

__all__ = ["Prior", "StandardNormal"]

# Of guides: outside, rounding in float32 is worse than what is left to learn, and one bad batch may end a fit.
_LOG_SCALES = (-9.0, 9.0)


class Prior(StochasticModule):
    """p(z) of a vector of d numbers, and the family of q(z | x) that goes with it.

    ``pyro.sample("z", prior())`` in the model, ``pyro.sample("z", prior.posterior(encoder(x)))`` in the guide.

    Attributes:
        features: d.
        outputs: Numbers that an encoder gives per row.
    """

    features: int
    outputs: int

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"{type(self).__name__} needs at least 1 feature, but features is {features}.")
        self.features, self.outputs = features, 2 * features

    @abc.abstractmethod
    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> TorchDistribution:
        """p(z), of event shape (d,).

        Args:
            encode: x to q(z | x), the guide's; only a prior made of the guide's guesses looks at it.
        """

    def posterior(self, outputs: Tensor) -> TorchDistribution:
        """q(z | x): independent normals, means first, then logarithms of standard deviations.

        Args:
            outputs: The encoder's numbers, (…, outputs).

        Returns:
            Batch shape (…), event shape (d,).

        Raises:
            ValueError: If an encoder gave another number of outputs.
        """
        self._check(outputs)
        loc, log_scale = outputs.chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(*_LOG_SCALES).exp()).to_event(1)

    def _check(self, outputs: Tensor) -> None:
        if outputs.shape[-1] != self.outputs:
            raise ValueError(
                f"The encoder gave {outputs.shape[-1]} numbers per row, but {type(self).__name__} with {self.features} "
                f"features takes {self.outputs}."
            )


class StandardNormal(Prior):
    """z ~ N(0, I_d); guesses are independent normals.

    Args:
        features: d.

    References:
        D. Kingma and M. Welling, Auto-encoding variational Bayes (2014).
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.zeros: Tensor
        self.register_buffer("zeros", torch.zeros(features), persistent=False)

    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> TorchDistribution:
        return dist.Normal(self.zeros, torch.ones_like(self.zeros)).to_event(1)
