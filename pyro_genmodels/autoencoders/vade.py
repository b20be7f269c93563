"""Variational deep embedding: a mixture of Gaussians as the prior of an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_genmodels.autoencoders.autoencoder import Autoencoder
from pyro_genmodels.autoencoders.ends import Decoder, Encoder, one_hot, rows_of
from pyro_genmodels.autoencoders.latent import LatentModel, check_beta, mirrored
from pyro_genmodels.autoencoders.likelihoods import Bernoulli, Likelihood
from pyro_genmodels.autoencoders.priors import StandardNormal
from pyro_genmodels.classical.seeding import apart

__all__ = ["VaDE"]

_STARTS, _SWEEPS, _FEW = 10, 100, 5_000  # of the mixture that start_from fits to codes: runs, their steps, their rows
_FLOOR = 1e-2  # least share of the variance of all codes that a cluster has, where the mixture starts


class VaDE(LatentModel):
    """Variational deep embedding: rows fall into clusters, in a space that a network unfolds.

        c_n ~ Categorical(π),  z_n ~ N(μ_c, Σ_c) with c = c_n,  x_n ~ p(x | decoder(z_n))

    guessed by q(z_n | x_n), independent normals whose parameters an encoder gives. The cluster is not guessed: it is summed
    out exactly, in every bound and by every sampler, which is at least as tight as the paper's q(c | x).

    From random weights it rarely finds clusters: the decoder learns to use z before the mixture takes shape. As in the
    paper, train an autoencoder first, with the same networks, then start the mixture from its codes:

        autoencoder = model.autoencoder()
        SVI(...).fit(autoencoder, x)
        model.start_from(autoencoder.codes(x))
        SVI(...).fit(model, x)

    Labels are exchangeable. Sites: ``cluster`` (rows,), ``z`` (rows, features), ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        shape: Of one x, such as (28, 28).
        clusters: Number of clusters K, at least 1.
        features: Numbers in z, at least 1.
        likelihood: p(x | decoder(z)); None: ``Bernoulli()``.
        encoder: Network from (batch, *shape) to (batch, 2 · features), means and logarithms of standard deviations;
            None: an ``MLP``.
        decoder: Network from (batch, features) to ``likelihood.outputs`` numbers an entry of x, (batch, k, *shape) or
            flattened; None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``, from x to z; the default is the paper's.
        covariance: "diagonal", as in the paper, or "full": of each cluster. Codes of an autoencoder are correlated within a
            cluster, so that "full" starts from better clusters.
        beta: Weight of the divergence of q(z | x) from p(z) in the bound that ``SVI`` maximises.

    References:
        Z. Jiang, Y. Zheng, H. Tan, B. Tang and H. Zhou, Variational deep embedding: an unsupervised and generative approach
        to clustering (2017).

    Example:
        >>> VaDE((8, 8), clusters=3, features=2, hidden=(16,)).responsibilities(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        shape: Sequence[int],
        clusters: int = 10,
        features: int = 10,
        *,
        likelihood: Likelihood | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        hidden: Sequence[int] = (500, 500, 2000),
        covariance: Literal["diagonal", "full"] = "diagonal",
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if clusters < 1:
            raise ValueError(f"VaDE needs at least 1 cluster, but clusters is {clusters}.")
        if covariance not in ("diagonal", "full"):
            raise ValueError(f"covariance is {covariance!r}, but must be 'diagonal' or 'full'.")
        self.shape, self.clusters, self.beta = tuple(shape), clusters, check_beta(beta)
        self.family = StandardNormal(features)
        self.decoder = Decoder(shape, features, likelihood or Bernoulli(), decoder, mirrored(hidden))
        reader = f"a normal guess at {features} features"
        self.encoder = Encoder(shape, self.family.outputs, reader, encoder, hidden)
        self.logits = nn.Parameter(torch.zeros(clusters))
        self.means = nn.Parameter(torch.randn(clusters, features))
        self.log_scales = nn.Parameter(torch.zeros(clusters, features))
        self.mixing = nn.Parameter(torch.zeros(clusters, features, features)) if covariance == "full" else None

    def _guess(self, x: Tensor) -> TorchDistribution:
        return self.family.posterior(self.encoder(x))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("rows", rows_of(x, size, self.shape, "VaDE")):
            c = pyro.sample("cluster", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", self._cluster(c))
            return pyro.sample("x", self.decoder(z), obs=x)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """z of each row from q(z | encoder(x)); without data, from the mixture. Clusters are left to be summed out."""
        with pyro.plate("rows", rows_of(x, size, self.shape, "VaDE")):
            pyro.sample("z", self._mixture() if x is None else self._guess(x))

    def _cluster(self, c: Tensor) -> TorchDistribution:
        """z of rows in clusters c."""
        scales = self.log_scales.exp()
        if self.mixing is None:
            return dist.Normal(self.means[c], scales[c]).to_event(1)
        factors = self.mixing.tril(-1) + torch.diag_embed(scales)
        return dist.MultivariateNormal(self.means[c], scale_tril=factors[c])

    def _mixture(self) -> TorchDistribution:
        clusters = self._cluster(torch.arange(self.clusters, device=self.means.device))
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), clusters)

    def autoencoder(self) -> Autoencoder:
        """The deterministic autoencoder of the same networks: its codes are the means of q(z | x). They share weights."""
        features, likelihood = self.decoder.features, self.decoder.likelihood
        code = _Code(self.encoder, self.family)
        return Autoencoder(self.shape, features, likelihood=likelihood, encoder=code, decoder=self.decoder.network)

    @torch.no_grad()
    def start_from(self, codes: Tensor) -> None:
        """Sets the mixture to one that is fitted to codes: the best of a few runs of EM, each from k-means++.

        Random numbers come from torch's global generator.

        Args:
            codes: (rows, features), such as ``Autoencoder.codes`` gives.

        Raises:
            ValueError: If they are no such table, or there are fewer rows than clusters.
        """
        features = self.decoder.features
        if codes.dim() != 2 or codes.shape[1] != features:
            raise ValueError(f"codes has shape {tuple(codes.shape)}, but must be (rows, {features}), one code a row.")
        if not bool(codes.isfinite().all()):
            raise ValueError(
                "codes holds values that are NaN or infinite. Train the autoencoder with a smaller learning rate."
            )
        if len(codes) < self.clusters:
            raise ValueError(f"codes has {len(codes)} rows, but there are {self.clusters} clusters.")
        codes, is_full = codes.double(), self.mixing is not None
        some = codes[torch.randperm(len(codes), device=codes.device)[:_FEW]]
        scale = some.std(0, unbiased=False).clamp(min=torch.finfo(torch.float32).tiny)
        firsts = [one_hot(apart(some / scale, self.clusters), self.clusters, codes.dtype) for _ in range(_STARTS)]
        best = max((_mixture_of(some, first, is_full) for first in firsts), key=lambda run: run[0])
        if len(some) < len(codes):
            best = _mixture_of(codes, _log_joint(codes, *best[1:]).softmax(-1), is_full)
        _, shares, means, factors = best
        self.logits.copy_(shares.log())
        self.means.copy_(means)
        self.log_scales.copy_(factors.diagonal(dim1=-2, dim2=-1).log())
        if self.mixing is not None:
            self.mixing.copy_(factors)

    @torch.no_grad()
    def responsibilities(self, x: Tensor, draws: int = 10) -> Tensor:
        """Probability of each cluster for each row: p(c | z), averaged over draws of z from q(z | x).

        Args:
            x: (rows, *shape), NaN where an entry is missing.
            draws: Of z; random numbers come from torch's global generator.

        Returns:
            (rows, K), rows sum to 1.
        """
        z = self.encode(x).sample(torch.Size((draws,)))
        mixture = self._mixture()
        within = mixture.component_distribution.log_prob(z.unsqueeze(-2))
        return (within + mixture.mixture_distribution.logits).softmax(-1).mean(0)

    @torch.no_grad()
    def predict(self, x: Tensor, draws: int = 10) -> Tensor:
        """Most probable cluster of each row, (rows,)."""
        return self.responsibilities(x, draws).argmax(-1)

    @torch.no_grad()
    def cluster_means(self) -> Tensor:
        """Mean of x at the centre of each cluster, (K, *shape)."""
        return self.decoder.mean(self.means)


class _Code(nn.Module):
    """The mean of a guess, as a code."""

    def __init__(self, encoder: Encoder, family: StandardNormal) -> None:
        super().__init__()
        self.encoder, self.family = encoder, family

    def forward(self, x: Tensor) -> Tensor:
        mean: Tensor = self.family.posterior(self.encoder(x)).mean
        return mean


def _log_joint(codes: Tensor, shares: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    """log p(code, cluster), (rows, K)."""
    white = torch.linalg.solve_triangular(factors, (codes - means.unsqueeze(1)).mT, upper=False)
    within = -0.5 * (white.square() + math.log(2.0 * math.pi)).sum(1)  # (K, rows)
    return (within - factors.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)).mT + shares.log()


def _mixture_of(codes: Tensor, weights: Tensor, is_full: bool) -> tuple[float, Tensor, Tensor, Tensor]:
    """Mean log-likelihood, shares (K,), means (K, D) and factors of covariances (K, D, D) of a mixture, by EM.

    Args:
        codes: (rows, D).
        weights: Probabilities of clusters to begin with, (rows, K).
        is_full: Whether clusters have full covariances.
    """
    floor = _FLOOR * codes.var(0, unbiased=False).clamp(min=torch.finfo(torch.float32).tiny)
    log_likelihood = -math.inf
    for _ in range(_SWEEPS):
        sizes = weights.sum(0) + 1e-6
        means = weights.mT @ codes / sizes[:, None]
        gaps = codes - means.unsqueeze(1)  # (K, rows, D)
        if is_full:
            scatter = (weights.mT.unsqueeze(-1) * gaps).mT @ gaps
            factors = torch.linalg.cholesky(scatter / sizes[:, None, None] + floor.diag())
        else:
            squares = (weights.mT.unsqueeze(1) @ gaps.square()).squeeze(1)
            factors = torch.diag_embed((squares / sizes[:, None] + floor).sqrt())
        shares = sizes / sizes.sum()
        joint = _log_joint(codes, shares, means, factors)
        before, log_likelihood = log_likelihood, float(joint.logsumexp(-1).mean())
        weights = joint.softmax(-1)
        if log_likelihood - before < 1e-5:
            break
    return log_likelihood, shares, means, factors
