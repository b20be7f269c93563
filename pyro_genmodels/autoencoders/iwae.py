"""The networks of the importance weighted autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_genmodels.autoencoders.ends import Decoder, Encoder, rows_of
from pyro_genmodels.autoencoders.latent import LatentModel
from pyro_genmodels.autoencoders.likelihoods import Bernoulli, Likelihood
from pyro_genmodels.autoencoders.priors import StandardNormal
from pyro_genmodels.nets import MLP

__all__ = ["IWAE"]

_LAYERS = {1: (50,), 2: (100, 50)}
_RARE = 1e-3  # the paper's bounds on the share of black pixels from which the output starts


class IWAE(LatentModel):
    """The autoencoders of Burda et al., with one or two layers of hidden numbers.

        one layer     z_n ~ N(0, I_50),                                   x_n ~ Bernoulli(decoder(z_n))
        two layers    t_n ~ N(0, I_50),  z_n ~ N(m(t_n), diag(s(t_n)²)),  x_n ~ Bernoulli(decoder(z_n)),  z of 100 numbers

    guessed by q(z_n | x_n), and q(t_n | z_n) on top. All networks have two hidden layers, tanh, of 200 units around z, and
    of 100 around t. What makes it importance weighted is the bound that it is fitted by, not the program:
    ``SVI(bound=IWELBO(particles=50))``.

    Sites: ``top`` (rows, features[1]) if there are two layers, ``z`` (rows, features[0]), ``x`` (rows, *shape).
    Plate: ``rows``.

    Args:
        shape: Of one x.
        layers: 1 or 2.
        features: Numbers in z, and in t; None: those of the paper.
        hidden: Width of the hidden layers around z; those around t are half as wide.
        likelihood: p(x | decoder(z)); None: ``Bernoulli()``.
        pixel_means: Mean of each pixel, (*shape), in [0, 1]: the logits of ``Bernoulli`` start there, as the authors' do.

    References:
        Y. Burda, R. Grosse and R. Salakhutdinov, Importance weighted autoencoders (2016).

    Example:
        >>> IWAE(layers=2).sample(3).shape
        torch.Size([3, 28, 28])
    """

    def __init__(
        self,
        shape: Sequence[int] = (28, 28),
        layers: int = 1,
        features: Sequence[int] | None = None,
        hidden: int = 200,
        *,
        likelihood: Likelihood | None = None,
        pixel_means: Tensor | None = None,
    ) -> None:
        super().__init__()
        if layers not in _LAYERS:
            raise ValueError(f"layers is {layers}, but must be 1 or 2.")
        sizes = _LAYERS[layers] if features is None else tuple(features)
        if len(sizes) != layers:
            raise ValueError(f"features is {sizes}, but must have a number for each of the {layers} layers.")
        self.shape, self.layers, self.beta = tuple(shape), layers, 1.0
        self.family = StandardNormal(sizes[0])
        wide, tanh = (hidden, hidden), nn.Tanh
        self.decoder = Decoder(shape, sizes[0], likelihood or Bernoulli(), None, wide, activation=tanh)
        self.encoder = Encoder(shape, self.family.outputs, "z", None, wide, activation=tanh)
        if layers == 2:
            self.top = StandardNormal(sizes[1])
            narrow = (max(hidden // 2, 1),) * 2
            self.lift = MLP(sizes[0], self.top.outputs, narrow, tanh)
            self.lower = MLP(sizes[1], self.family.outputs, narrow, tanh)
        if pixel_means is not None:
            self._start_at(pixel_means)

    def _start_at(self, means: Tensor) -> None:
        if not isinstance(self.decoder.likelihood, Bernoulli):
            raise ValueError("pixel_means is for a Bernoulli likelihood, whose numbers are logits.")
        if tuple(means.shape) != self.shape:
            raise ValueError(f"pixel_means has shape {tuple(means.shape)}, but must be {self.shape}: one for each pixel.")
        if not bool(((means >= 0.0) & (means <= 1.0)).all()):
            raise ValueError("pixel_means must be in [0, 1].")
        last: Any = cast(MLP, self.decoder.network).layers[-1]
        with torch.no_grad():
            last.bias.copy_(means.clamp(_RARE, 1.0 - _RARE).logit().flatten())

    def _guess(self, x: Tensor) -> TorchDistribution:
        return self.family.posterior(self.encoder(x))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("rows", rows_of(x, size, self.shape, "IWAE")):
            if self.layers == 2:
                top = pyro.sample("top", self.top())
                z = pyro.sample("z", self.family.posterior(self.lower(top)))
            else:
                z = pyro.sample("z", self.family())
            return pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """z of each row from q(z | encoder(x)), and what is above it from q(top | z); without data, z from N(0, I)."""
        with pyro.plate("rows", rows_of(x, size, self.shape, "IWAE")):
            z = pyro.sample("z", self.family() if x is None else self._guess(x))
            if self.layers == 2:
                pyro.sample("top", self.top.posterior(self.lift(z)))
