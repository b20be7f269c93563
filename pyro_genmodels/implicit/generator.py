"""A network that turns noise into data, as a distribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_genmodels.autoencoders.ends import row_shape
from pyro_genmodels.base import StochasticModule
from pyro_genmodels.implicit.distribution import ImplicitDistribution
from pyro_genmodels.nets import MLP

__all__ = ["Generator"]

NOISES = ("normal", "uniform")


class Generator(StochasticModule):
    """A neural network of noise, and of a context if it has one: ``pyro.sample("x", generator(context))``.

        ε ~ N(0, I) or U(−1, 1),  x = network(ε, context)

    Args:
        shape: Of one x, such as (28, 28); () for a number.
        features: Numbers in ε, at least 1.
        context: Numbers in a row of the context; 0: there is none.
        network: From (batch, features), and (batch, context) if there is one, to (batch, *shape) or that flattened; None: an
            ``MLP``.
        noise: "normal" or "uniform".
        hidden: Widths of the hidden layers of the ``MLP``.

    Example:
        >>> Generator((8, 8), 16)().sample((5,)).shape
        torch.Size([5, 8, 8])
        >>> Generator((2,), 4, context=3)(torch.zeros(7, 3)).sample().shape
        torch.Size([7, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int = 16,
        *,
        context: int = 0,
        network: nn.Module | None = None,
        noise: str = "normal",
        hidden: Sequence[int] = (128, 128),
    ) -> None:
        super().__init__()
        if features < 1 or context < 0:
            raise ValueError(
                f"A Generator needs noise of at least 1 number and a context of 0 or more, but features is {features} and "
                f"context {context}."
            )
        if noise not in NOISES:
            raise ValueError(f"noise is {noise!r}, but must be one of {', '.join(map(repr, NOISES))}.")
        self.shape, self.features, self.context, self.noise = row_shape(shape, "Generator"), features, context, noise
        self.network = MLP(features + context, math.prod(self.shape), hidden) if network is None else network
        self.zero: Tensor
        self.register_buffer("zero", torch.zeros(()), persistent=False)  # where the noise is, and its type

    def _noise(self) -> TorchDistribution:
        zero = self.zero.expand(self.features)
        return (dist.Normal(zero, zero + 1.0) if self.noise == "normal" else dist.Uniform(zero - 1.0, zero + 1.0)).to_event(
            1
        )

    def push(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        """x of noise, (…, *shape).

        Args:
            noise: (…, features).
            context: (batch, context), where (…) ends with the batch; None if there is none.
        """
        lead = noise.shape[:-1]
        parts = [noise.reshape(-1, self.features)]
        if context is not None:
            parts.append(context.expand(*lead, self.context).reshape(-1, self.context))
        x: Tensor = self.network(*parts)
        if x.shape[:1] != parts[0].shape[:1] or x[0].numel() != math.prod(self.shape):
            raise ValueError(
                f"The network of this Generator gave a tensor of shape {tuple(x.shape)} for {len(parts[0])} rows, but x has "
                f"shape {self.shape}: it must give ({len(parts[0])}, {math.prod(self.shape)}), or that unflattened."
            )
        return x.reshape(lead + self.shape)

    def forward(self, context: Tensor | None = None) -> ImplicitDistribution:
        """The distribution of x, of batch shape () or that of the context.

        Args:
            context: (batch, context), floating; labels one-hot.
        """
        if context is None:
            if self.context:
                raise ValueError(f"This Generator was built for a context of {self.context} numbers a row: give it.")
            return ImplicitDistribution(self._noise(), self.push, self.shape)
        if not self.context:
            raise ValueError("This Generator was built without a context. Give context= numbers a row when it is made.")
        if context.shape[-1:] != (self.context,) or not context.is_floating_point():
            came = f"{str(context.dtype).removeprefix('torch.')} of shape {tuple(context.shape)}"
            raise ValueError(
                f"The context must be floating and of shape (batch, {self.context}), but is {came}. Labels become one by "
                "torch.nn.functional.one_hot(labels, classes).float()."
            )
        noise = self._noise().expand(context.shape[:-1])
        return ImplicitDistribution(noise, lambda e: self.push(e, context), self.shape)
