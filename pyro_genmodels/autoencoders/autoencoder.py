"""The autoencoder that hides nothing: a baseline."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor, nn

from pyro_genmodels.autoencoders.ends import Decoder, Encoder, check_data, check_shape, like
from pyro_genmodels.autoencoders.latent import mirrored
from pyro_genmodels.autoencoders.likelihoods import Bernoulli, Likelihood
from pyro_genmodels.base import GenerativeModel

__all__ = ["Autoencoder"]


class Autoencoder(GenerativeModel):
    """Deterministic autoencoder: x is told from a short code of itself.

        x_n ~ p(x | decoder(encoder(x_n)))

    There is no latent site: fitted by ``SVI``, its weights maximise the likelihood of rows given their codes, which says
    nothing of log p(x), and there is no prior to draw codes from. With a linear encoder and decoder and a ``Gaussian``
    likelihood the codes span the principal components. A missing entry is read as 0 and counts nothing.

    Site: ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        shape: Of one x, such as (28, 28).
        features: Numbers in a code, at least 1.
        likelihood: p(x | code); None: ``Bernoulli()``.
        encoder: Network from (batch, *shape) to (batch, features); None: an ``MLP``.
        decoder: Network from (batch, features) to ``likelihood.outputs`` numbers an entry of x, (batch, k, *shape) or
            flattened; None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``, from x to the code.

    References:
        P. Baldi and K. Hornik, Neural networks and principal component analysis (1989).
        G. Hinton and R. Salakhutdinov, Reducing the dimensionality of data with neural networks (2006).

    Example:
        >>> Autoencoder((8, 8), features=2).codes(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int = 20,
        *,
        likelihood: Likelihood | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        hidden: Sequence[int] = (512, 256),
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"Autoencoder needs a code of at least 1 number, but features is {features}.")
        self.shape, self.features = tuple(shape), features
        self.decoder = Decoder(shape, features, likelihood or Bernoulli(), decoder, mirrored(hidden))
        self.encoder = Encoder(shape, features, f"a code of {features} features", encoder, hidden)

    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the data.

        Args:
            x: All the data, (rows, *shape), floating; NaN where an entry is missing.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If they are of another shape, have values that the likelihood has not, or a row without any.
        """
        if x is not None:
            check_data(x, self.shape, self.decoder.likelihood, "Autoencoder")

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None:
            raise ValueError("An Autoencoder has no prior to draw codes from: give x, or take a VAE.")
        check_shape(x, self.shape, "Autoencoder")
        with pyro.plate("rows", len(x)):
            return pyro.sample("x", self.decoder(self.encoder(x)), obs=x)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Nothing is hidden."""

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of rows (rows, *shape), (rows, features)."""
        check_shape(x, self.shape, "Autoencoder")
        found: Tensor = self.encoder(like(x, self))
        return found

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Mean of x given its code, (rows, *shape)."""
        return self.decoder.mean(self.codes(x))
