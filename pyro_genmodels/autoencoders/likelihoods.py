"""Likelihoods: what a decoder's numbers say of the data, p(x | decoder(z)).

The entries of an array, pixels, are independent given the decoder's numbers. An entry that is NaN has not been observed and
counts nothing.
"""

from __future__ import annotations

import abc
from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from pyro_genmodels.distributions import Entries

__all__ = ["Bernoulli", "Likelihood"]


class Likelihood(nn.Module, abc.ABC):
    """A distribution of arrays whose entries are independent, given what a decoder says of each: k numbers.

    ``likelihood(outputs, dims)`` is a distribution, for ``pyro.sample("x", likelihood(decoder(z), dims), obs=x)``.
    """

    outputs: int = 1  # numbers of the decoder per entry of x, k
    advice: str = ""  # what to do with data outside the domain

    def forward(self, outputs: Tensor, dims: int) -> Entries:
        """The distribution of arrays.

        Args:
            outputs: The decoder's numbers, (*batch, k, *shape).
            dims: Number of dimensions of an array, len(shape).

        Returns:
            Batch shape ``batch``, event shape ``shape``.

        Raises:
            ValueError: If there are not k numbers per entry.
        """
        axis = -dims - 1
        if outputs.dim() <= dims or outputs.shape[axis] != self.outputs:
            raise ValueError(
                f"outputs has shape {tuple(outputs.shape)}, but {type(self).__name__} takes {self.outputs} per entry of x: "
                f"(…, {self.outputs}, *shape), with {dims} dimensions in shape."
            )
        return Entries(self.given(outputs.movedim(axis, -1)), dims)

    @abc.abstractmethod
    def given(self, outputs: Tensor) -> Any:
        """The distribution of each entry.

        Args:
            outputs: The decoder's numbers, (*batch, *shape, k).

        Returns:
            A distribution of one number, batch shape (*batch, *shape).
        """

    @abc.abstractmethod
    def is_inside(self, x: Tensor) -> Tensor:
        """Which entries the likelihood may have drawn, in the shape of x; what it says of NaN does not matter."""

    @property
    @abc.abstractmethod
    def domain(self) -> str:
        """The values that entries may have, in words: "in [0, 1]"."""

    def check(self, x: Tensor) -> None:
        """Looks at data once, before they are fitted. NaN is a missing entry.

        Args:
            x: (…, *shape).

        Raises:
            ValueError: If an entry is outside the domain; it says which one, and what to do.
        """
        is_outside = ~(self.is_inside(x) | x.isnan())
        if is_outside.any():
            value, count = x[is_outside][0].item(), int(is_outside.sum())
            raise ValueError(
                f"x has the value {value:g}, but entries of {type(self).__name__} are {self.domain}; {count} of "
                f"{x.numel()} are not. {self.advice}".strip()
            )

    def mean(self, outputs: Tensor, dims: int) -> Tensor:
        """Mean of each entry, (*batch, *shape): a reconstruction. Of labels, the most probable one.

        Args:
            outputs: The decoder's numbers, (*batch, k, *shape).
            dims: len(shape).
        """
        return self(outputs, dims).mean


class Bernoulli(Likelihood):
    """Black and white pixels, p(x = 1) = 1 / (1 + exp(−output)).

    Grey pixels between 0 and 1 pass ``check``, since they are probabilities to draw the pixels from, anew in each batch: one
    must, before the density is asked for, which of grey pixels is none. ``ContinuousBernoulli`` has a density of grey ones.

    Example:
        >>> Bernoulli()(torch.zeros(1, 2, 2), 2).log_prob(torch.tensor([[0.0, 1.0], [1.0, torch.nan]]))
        tensor(-2.0794)
    """

    advice = "Scale them, x / 255 for bytes, or take another likelihood, such as Gaussian."

    def given(self, outputs: Tensor) -> dist.Bernoulli:
        return dist.Bernoulli(logits=outputs[..., 0])

    def is_inside(self, x: Tensor) -> Tensor:
        return (x >= 0.0) & (x <= 1.0)

    @property
    def domain(self) -> str:
        return "in [0, 1]"
