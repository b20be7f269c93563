"""Generative adversarial network."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_genmodels.autoencoders.ends import check_shape, like, row_shape, rows_of
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.implicit.generator import Generator

__all__ = ["GAN"]


class GAN(GenerativeModel):
    """Generative adversarial network: rows of data are draws of a generator.

        ε_n ~ N(0, I),  x_n = network(ε_n, context_n)

    x has no density, so that its weights are trained by ``inference.Adversarial``, with a critic that tells data from draws.
    What the critic is trained for (minimax, Wasserstein, hinge ...) is a setting of the back-end, not of the model.

    Site: ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        shape: Of one x, such as (28, 28).
        features: Numbers in the noise of a row.
        context: Numbers in a row of the context, given beside x; 0: there is none.
        network: From (batch, features), and (batch, context) if there is one, to (batch, *shape) or that flattened; None: an
            ``MLP``.
        noise: "normal" or "uniform".
        hidden: Widths of the hidden layers of the ``MLP``.

    References:
        I. Goodfellow et al., Generative adversarial nets (2014).
        M. Mirza and S. Osindero, Conditional generative adversarial nets (2014).

    Example:
        >>> model = GAN((2,), 4)
        >>> model.sample(5).shape
        torch.Size([5, 2])
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
        self.shape = row_shape(shape, "GAN")
        self.generator = Generator(shape, features, context=context, network=network, noise=noise, hidden=hidden)

    def prepare(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the data.

        Raises:
            ValueError: If they are of another shape.
        """
        if x is not None:
            check_shape(x, self.shape, "GAN")

    def model(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> Tensor:
        rows = len(context) if x is None and size is None and context is not None else size
        with pyro.plate("rows", rows_of(x, rows, self.shape, "GAN")):
            return pyro.sample("x", self.generator(context), obs=x)

    @torch.no_grad()
    def sample(self, size: int | None = None, context: Tensor | None = None) -> Tensor:
        """New rows, (size, *shape); with a context (size, context), one for each of its rows."""
        drawn: Tensor = self.model(None, None if context is None else like(context, self), size=size)
        return drawn
