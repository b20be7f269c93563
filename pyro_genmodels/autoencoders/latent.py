"""What the autoencoders with a prior share."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_genmodels.autoencoders.ends import Decoder, centre, check_data, check_shape, filled, like
from pyro_genmodels.base import GenerativeModel

__all__ = ["LatentModel", "check_beta", "mirrored", "sized"]


class LatentModel(GenerativeModel):
    """A vector z of each row, from a prior, and x given z through a network.

    Attributes:
        shape: Of one x.
        decoder: p(x | z).
        beta: Weight that a bound gives to the divergence of the guess from the prior. It is no part of the program, whose
            posterior and whose log p(x) do not depend on it.
    """

    shape: tuple[int, ...]
    decoder: Decoder
    beta: float

    @abc.abstractmethod
    def _guess(self, x: Tensor) -> TorchDistribution:
        """q(z | x) of rows (…, *shape)."""

    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the data.

        Args:
            x: All the data, (rows, *shape), floating; NaN where an entry is missing.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If they are of another shape, have values that the likelihood has not, or a row without any.
        """
        if x is not None:
            check_data(x, self.shape, self.decoder.likelihood, type(self).__name__)

    @torch.no_grad()
    def encode(self, x: Tensor) -> TorchDistribution:
        """q(z | x), the guess at z.

        Args:
            x: (rows, *shape), NaN where an entry is missing.

        Returns:
            Batch shape (rows,), event shape (features,).
        """
        check_shape(x, self.shape, type(self).__name__)
        return self._guess(like(x, self))

    @torch.no_grad()
    def decode(self, z: Tensor) -> TorchDistribution:
        """p(x | z).

        Args:
            z: (…, features).

        Returns:
            Batch shape (…), event shape ``shape``.
        """
        if z.shape[-1:] != (self.decoder.features,):
            raise ValueError(f"z has shape {tuple(z.shape)}, but must be (…, {self.decoder.features}).")
        return self.decoder(like(z, self))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of x at the centre of q(z | x), (rows, *shape)."""
        return self.decoder.mean(centre(self.encode(x)))

    @torch.no_grad()
    def sample(self, size: int) -> Tensor:
        """New rows, (size, *shape)."""
        drawn: Tensor = self.model(None, size=size)
        return drawn

    @torch.no_grad()
    def complete(self, x: Tensor, draws: int = 1, z: Tensor | None = None) -> Tensor:
        """x with its missing entries drawn from p(x | z) at draws of z.

        At draws of q(z | x), the default, that is as good as the guess at z is. At draws of z from its posterior, such as
        those of ``Gibbs(blocks={"z": GuideDraw()})``, it is exact.

        Args:
            x: (rows, *shape), NaN where an entry is missing.
            draws: How many completions; not used where z is given.
            z: (draws, rows, features).

        Returns:
            (draws, rows, *shape).

        Raises:
            ValueError: If x or z has another shape.
        """
        check_shape(x, self.shape, type(self).__name__)
        if z is None:
            z = self.encode(x).sample(torch.Size((draws,)))
        elif z.dim() != 3 or z.shape[1:] != (len(x), self.decoder.features):
            raise ValueError(
                f"z has shape {tuple(z.shape)}, but must be (draws, {len(x)}, {self.decoder.features}). Of the draws of a "
                'posterior, pass posterior.draws["z"].flatten(0, 1).'
            )
        return filled(x, self.decoder(like(z, self)).sample())


def check_beta(beta: float) -> float:
    """beta, if it is one."""
    if not 0.0 <= beta < float("inf"):
        raise ValueError(f"beta is {beta}, but must be finite and at least 0.")
    return float(beta)


def sized(features: int | None, given: int | None, usual: int, prior: str) -> int:
    """How many numbers z has: what is asked for, what a prior has, else the usual."""
    if features is not None and given is not None and features != given:
        raise ValueError(f"features is {features}, but the prior, {prior}, has {given}. Leave features out.")
    if given is not None:
        return given
    return usual if features is None else features


def mirrored(hidden: Sequence[int]) -> tuple[int, ...]:
    """Widths of a decoder, for those of the encoder."""
    return tuple(reversed(tuple(hidden)))
