"""Variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_genmodels.autoencoders.ends import Decoder, Encoder, rows_of
from pyro_genmodels.autoencoders.latent import LatentModel, check_beta, mirrored, sized
from pyro_genmodels.autoencoders.likelihoods import Bernoulli, Likelihood
from pyro_genmodels.autoencoders.priors import Prior, StandardNormal

__all__ = ["VAE"]


class VAE(LatentModel):
    """Variational autoencoder.

        z_n ~ p(z),  x_n ~ p(x | decoder(z_n)),    guessed by q(z_n | encoder(x_n))

    Entries of x that are NaN have not been observed: the likelihood leaves them out, so that the model is that of the known
    ones, and the encoder reads 0 for them (Nazabal et al. 2020, Mattei and Frellsen 2019).

    Sites: ``z`` (rows, features), ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        shape: Of one x, such as (28, 28).
        features: Numbers in z; None: those of ``prior``, else 20.
        prior: p(z), and the family of q(z | x); None: ``StandardNormal(features)``.
        likelihood: p(x | decoder(z)); None: ``Bernoulli()``.
        encoder: Network from (batch, *shape) to (batch, ``prior.outputs``); None: an ``MLP``.
        decoder: Network from (batch, features) to ``likelihood.outputs`` numbers an entry of x, (batch, k, *shape) or
            flattened; None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``, from x to z.
        observed: Whether the encoder is told which entries are known (see ``Encoder``).
        beta: Weight of the divergence of q(z | x) from p(z) in the bound that ``SVI`` maximises: above 1 it is the beta-VAE.
            The program does not depend on it.

    References:
        D. Kingma and M. Welling, Auto-encoding variational Bayes (2014).
        D. Rezende, S. Mohamed and D. Wierstra, Stochastic backpropagation and approximate inference in deep generative
        models (2014).
        I. Higgins et al., beta-VAE: learning basic visual concepts with a constrained variational framework (2017).

    Example:
        >>> import torch
        >>> model = VAE((8, 8), features=2)
        >>> x = torch.rand(5, 8, 8).round()
        >>> model.encode(x).mean.shape, model.sample(3).shape
        (torch.Size([5, 2]), torch.Size([3, 8, 8]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int | None = None,
        *,
        prior: Prior | None = None,
        likelihood: Likelihood | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        hidden: Sequence[int] = (512, 256),
        observed: bool = False,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        features = sized(features, None if prior is None else prior.features, 20, type(prior).__name__)
        self.shape, self.beta = tuple(shape), check_beta(beta)
        self.prior = StandardNormal(features) if prior is None else prior
        self.decoder = Decoder(shape, features, likelihood or Bernoulli(), decoder, mirrored(hidden))
        reader = f"{type(self.prior).__name__} with {features} features"
        self.encoder = Encoder(shape, self.prior.outputs, reader, encoder, hidden, sees_gaps=observed)

    def _guess(self, x: Tensor) -> TorchDistribution:
        return self.prior.posterior(self.encoder(x))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("rows", rows_of(x, size, self.shape, "VAE")):
            z = pyro.sample("z", self.prior(self._guess))
            return pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """z of each row from q(z | encoder(x)); without data, from the prior."""
        with pyro.plate("rows", rows_of(x, size, self.shape, "VAE")):
            pyro.sample("z", self.prior(self._guess) if x is None else self._guess(x))
