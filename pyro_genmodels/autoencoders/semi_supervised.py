"""Autoencoder with labels, most of which need not be known."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_genmodels.autoencoders.ends import (
    Decoder,
    Encoder,
    check_data,
    check_labels,
    check_shape,
    like,
    one_hot,
    rows_of,
)
from pyro_genmodels.autoencoders.latent import check_beta, mirrored
from pyro_genmodels.autoencoders.likelihoods import Bernoulli, Likelihood
from pyro_genmodels.autoencoders.priors import StandardNormal
from pyro_genmodels.base import GenerativeModel

__all__ = ["SemiSupervisedVAE"]

_ALPHA = 0.1  # of Kingma et al., who weigh the mean over labelled rows by 0.1 times the number of all rows


class SemiSupervisedVAE(GenerativeModel):
    """Semi-supervised autoencoder, "M2": a label says what is drawn, and z how.

        y_n ~ Categorical(π),  z_n ~ N(0, I),  x_n ~ p(x | decoder(z_n, y_n))

    A label of −1 is not known: such rows are summed out exactly, at K passes of the decoder. A classifier c(x) is trained on
    the labelled rows, by a ``pyro.factor`` of α log c(y_n | x_n), which depends on nothing that is hidden; and z is guessed
    by q(z | x, w), with w the label where it is known, else the probabilities of the classifier, so that it learns from the
    other rows, too. (The paper guesses an unknown label by the classifier, and z given the label.)

    Sites: ``y`` (rows,), ``z`` (rows, features), ``x`` (rows, *shape); factor ``classified``. Plate: ``rows``. Where some
    labels are known and some not, those to be found are ``y_unobserved``.

    Args:
        shape: Of one x, such as (28, 28).
        classes: Number of classes K, at least 2.
        features: Numbers in z, at least 1.
        alpha: Weight of log c(y | x) of each labelled row; None: 0.1 · rows / labelled rows, as in the paper.
        labelled_weight: Power to which the density of each labelled row is raised (``poutine.scale``): more than 1 where
            labels are so few that clusters form beside them. The posterior of z in these rows is tempered by it, too.
        shares: π, (K,); None: all the same.
        likelihood: p(x | decoder(z, y)); None: ``Bernoulli()``.
        encoder: Network from (batch, *shape) and (batch, K) to (batch, 2 · features); None: an ``MLP``.
        decoder: Network from (batch, features) and (batch, K) to ``likelihood.outputs`` numbers an entry of x,
            (batch, k, *shape) or flattened; None: an ``MLP``.
        classifier: Network from (batch, *shape) to logits (batch, K); None: an ``MLP``.
        hidden: Widths of the hidden layers of each ``MLP``, from x to z.
        beta: Weight of the divergence of the guess from the prior in the bound that ``SVI`` maximises.

    References:
        D. Kingma, D. Rezende, S. Mohamed and M. Welling, Semi-supervised learning with deep generative models (2014).

    Example:
        >>> import torch
        >>> model = SemiSupervisedVAE((8, 8), classes=10, features=2)
        >>> model.sample(torch.arange(10)).shape
        torch.Size([10, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        classes: int,
        features: int = 20,
        *,
        alpha: float | None = None,
        labelled_weight: float = 1.0,
        shares: Tensor | None = None,
        likelihood: Likelihood | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        classifier: nn.Module | None = None,
        hidden: Sequence[int] = (512, 256),
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(f"SemiSupervisedVAE needs at least 2 classes, but classes is {classes}. Take a VAE for one.")
        if alpha is not None and not 0.0 <= alpha < float("inf"):
            raise ValueError(f"alpha is {alpha}, but must be finite and at least 0.")
        if not 0.0 < labelled_weight < float("inf"):
            raise ValueError(f"labelled_weight is {labelled_weight}, but must be positive and finite.")
        if shares is not None and (
            shares.shape != (classes,) or bool((shares <= 0).any()) or abs(float(shares.sum()) - 1.0) > 1e-4
        ):
            raise ValueError(f"shares must be {classes} positive numbers that sum to 1, but is {shares.tolist()}.")
        self.shape, self.classes, self.alpha, self.beta = tuple(shape), classes, alpha, check_beta(beta)
        self.labelled_weight = labelled_weight
        self.family = StandardNormal(features)
        self.shares: Tensor
        self.register_buffer("shares", torch.full((classes,), 1.0 / classes) if shares is None else shares)
        self.decoder = Decoder(shape, features, likelihood or Bernoulli(), decoder, mirrored(hidden), classes)
        reader = f"a normal guess at {features} features"
        self.encoder = Encoder(shape, self.family.outputs, reader, encoder, hidden, classes)
        self.classifier = Encoder(shape, classes, f"a classifier of {classes} classes", classifier, hidden)
        self._known: float | None = None  # share of the rows whose label is known; None: not prepared yet

    def prepare(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the data, and at which labels are known.

        Args:
            x: All the data, (rows, *shape), floating; NaN where an entry is missing.
            y: Labels 0, …, K − 1, or −1 where not known, (rows,); None: none is known.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If they are of another shape, have values that the likelihood has not, a row without any, or a label
                that is none.
        """
        if x is None:
            return
        check_data(x, self.shape, self.decoder.likelihood, "SemiSupervisedVAE")
        if y is None:
            return
        check_labels(y, len(x), self.classes, least=-1)
        self._known = _share(y)

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("rows", self._rows(x, y, size)):
            known = self._share_of(y)
            weight = self._weight(y, known)
            label = self._labels(y, known, weight)
            with poutine.scale(scale=weight):
                z = pyro.sample("z", self.family())
                drawn = pyro.sample("x", self.decoder(z, one_hot(label, self.classes, z.dtype)), obs=x)
            alpha = _ALPHA / max(known, 1e-9) if self.alpha is None else self.alpha
            if x is not None and y is not None and known and alpha:
                right = self._classified(x).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
                pyro.factor("classified", torch.where(y >= 0, alpha * right, 0.0))
        return drawn

    def guide(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> None:
        """z of each row from q(z | x, w); without data, from the prior. Labels are left to be summed out."""
        with pyro.plate("rows", self._rows(x, y, size)), poutine.scale(scale=self._weight(y, self._share_of(y))):
            pyro.sample("z", self.family() if x is None else self._guess(x, y))

    def _share_of(self, y: Tensor | None) -> float:
        """Share of the rows whose label is known, of all the data where they have been seen."""
        return 0.0 if y is None else _share(y) if self._known is None else self._known

    def _weight(self, y: Tensor | None, known: float) -> Tensor | float:
        """Power of each row's density; one number where all are the same."""
        if y is None or known == 0.0 or self.labelled_weight == 1.0:
            return 1.0
        return torch.where(y < 0, 1.0, self.labelled_weight).to(self.shares)

    def _rows(self, x: Tensor | None, y: Tensor | None, size: int | None) -> int:
        if x is None and y is not None:
            return len(y)
        return rows_of(x, size, self.shape, "SemiSupervisedVAE")

    def _labels(self, y: Tensor | None, known: float, weight: Tensor | float) -> Tensor:
        prior = dist.Categorical(self.shares)
        if y is None or known == 1.0:
            with poutine.scale(scale=weight):
                return pyro.sample("y", prior, obs=y)
        is_known = y >= 0
        with poutine.mask(mask=is_known), poutine.scale(scale=weight):
            pyro.sample("y_observed", prior, obs=y.clamp(min=0))
        # ``obs_mask`` would give each value of what a known label leaves unused the weight 1, K of them together
        shares = torch.where(is_known.unsqueeze(-1), 1.0 / self.classes, self.shares)
        label = torch.where(is_known, y, pyro.sample("y_unobserved", dist.Categorical(shares)))
        return pyro.deterministic("y", label)

    def _classified(self, x: Tensor) -> Tensor:
        """log c(y | x), (rows, K)."""
        return self.classifier(x).log_softmax(-1)

    def _guess(self, x: Tensor, y: Tensor | None) -> TorchDistribution:
        weights = self._classified(x).exp()
        if y is not None:
            weights = torch.where((y >= 0).unsqueeze(-1), one_hot(y, self.classes, weights.dtype), weights)
        return self.family.posterior(self.encoder(x, weights))

    # ------------------------------------------------------------------------------ conveniences
    @torch.no_grad()
    def encode(self, x: Tensor, y: Tensor | None = None) -> TorchDistribution:
        """q(z | x, w), the guess at z.

        Args:
            x: (rows, *shape), NaN where an entry is missing.
            y: Labels (rows,), −1 where not known; None: none is known.

        Returns:
            Batch shape (rows,), event shape (features,).
        """
        self._check(x, y)
        return self._guess(like(x, self), y)

    def _check(self, x: Tensor, y: Tensor | None = None) -> None:
        check_shape(x, self.shape, "SemiSupervisedVAE")
        if y is not None:
            check_labels(y, len(x), self.classes, least=-1)

    @torch.no_grad()
    def decode(self, z: Tensor, y: Tensor) -> TorchDistribution:
        """p(x | z, y), of z (…, features) and labels (…)."""
        if z.shape[-1:] != (self.decoder.features,):
            raise ValueError(f"z has shape {tuple(z.shape)}, but must be (…, {self.decoder.features}).")
        z = like(z, self)
        return self.decoder(z, one_hot(y, self.classes, z.dtype))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean of x at its label and the mean of q(z | x, y), (rows, *shape)."""
        check_labels(y, len(x), self.classes)
        z = self.encode(x, y).mean
        return self.decoder.mean(z, one_hot(y, self.classes, z.dtype))

    @torch.no_grad()
    def sample(self, y: Tensor) -> Tensor:
        """A new row for each label, (rows, *shape)."""
        check_labels(y, len(y), self.classes)
        return self.decode(self.family().sample(torch.Size((len(y),))), y).sample()

    @torch.no_grad()
    def classify(self, x: Tensor) -> Tensor:
        """What the classifier alone says, c(y | x), (rows, K)."""
        self._check(x)
        return self._classified(like(x, self)).exp()

    @torch.no_grad()
    def predict_proba(self, x: Tensor, draws: int = 50) -> Tensor:
        """p(y | x) of the model, by importance sampling: p(y | x, z) averaged over draws of z from the guess.

        Args:
            x: (rows, *shape), NaN where an entry is missing. Grey pixels, under a ``Bernoulli`` that was fitted to draws of
                them, count as the mean over such draws.
            draws: Of z; random numbers come from torch's global generator. Each costs K passes of the decoder.

        Returns:
            (rows, K), rows sum to 1.
        """
        guess, x = self.encode(x), like(x, self)
        every = one_hot(torch.arange(self.classes, device=x.device), self.classes, x.dtype)
        joint = []
        for _ in range(draws):
            z = guess.sample()
            with pyro.validation_enabled(False):
                given = self.decoder(z.unsqueeze(-2), every).log_prob(x.unsqueeze(1))
            joint.append(given + self.shares.log() + (self.family().log_prob(z) - guess.log_prob(z)).unsqueeze(-1))
        return torch.stack(joint).logsumexp(0).softmax(-1)

    @torch.no_grad()
    def predict(self, x: Tensor, draws: int = 50) -> Tensor:
        """Most probable label of each row, (rows,)."""
        return self.predict_proba(x, draws).argmax(-1)


def _share(y: Tensor) -> float:
    """Share of the labels that are known."""
    return float((y >= 0).double().mean())
