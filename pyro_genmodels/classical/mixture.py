"""Mixtures: every row comes from one of K components, and does not say from which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.contract import Fitted
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.distributions import InverseWishart

__all__ = ["GMM"]

COVARIANCES = ("full", "tied", "diagonal", "spherical")


class GMM(GenerativeModel):
    """Gaussian mixture.

        w ~ Dirichlet(1),  μ_k ~ N(m, 9 diag s²),  Σ_k ~ InverseWishart(D + 2, diag s² / K^(2/D)),
        z_n ~ Categorical(w),  x_n ~ N(μ_{z_n}, Σ_{z_n})

    With m and s the mean and standard deviation of the data, the prior is proper, works on unscaled data and keeps a
    component from collapsing onto a point. Diagonal and spherical variances have the prior InverseGamma(D/2 + 1,
    s² / 2 K^(2/D)) of the corresponding marginal.

    Labels are exchangeable: compare posteriors through label-free functions, or relabel first.

    Sites: ``weights`` (K,), ``means`` (K, D), ``covariances`` (K, D, D) full, (D, D) tied, (K, D) diagonal variances, (K,)
    spherical variances; ``z`` (rows,), ``x`` (rows, D). Plates: ``components``, ``rows``.

    Args:
        components: Number of components K, at least 1.
        covariance: "full", "tied", "diagonal" or "spherical".
        features: Number of columns D; None takes it from the first data seen.
        location: m, (D,); None takes it from the data of each fit.
        scale: s, (D,), positive; None takes it from the data of each fit (a constant column counts as 1).

    References:
        C. Bishop, Pattern Recognition and Machine Learning (2006), section 9.2.
        C. Fraley and A. Raftery, Bayesian regularization for normal mixture estimation and model-based clustering (2007).
    """

    def __init__(
        self,
        components: int,
        covariance: str = "full",
        features: int | None = None,
        location: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"GMM needs at least 1 component, but components is {components}.")
        if covariance not in COVARIANCES:
            raise ValueError(f"covariance is '{covariance}', but must be one of {', '.join(COVARIANCES)}.")
        self.components, self.covariance = components, covariance
        given = [tensor for tensor in (location, scale) if tensor is not None]
        self.features = features or (len(given[0]) if given else None)
        self._has_location, self._has_scale = location is not None, scale is not None
        self._has_features = self.features is not None
        self.location: Any
        self.scale: Any
        self.register_buffer("location", location)
        self.register_buffer("scale", scale)
        self.guesses = nn.ParameterDict()
        if self.features:
            like = given[0] if given else torch.zeros(())
            self._shape(self.features, like)

    def _shape(self, features: int, like: Tensor) -> None:
        """Constants of the prior and weights of the guide, at their defaults, for this many columns."""
        self.features = features
        zeros = torch.zeros(features, dtype=like.dtype, device=like.device)
        self.location = self.location if self._has_location else zeros
        self.scale = self.scale if self._has_scale else zeros + 1.0
        count = 1 if self.covariance == "tied" else self.components
        eye = torch.eye(features, dtype=like.dtype, device=like.device)
        width = 1 if self.covariance == "spherical" else features
        guesses = {
            "log_concentration": zeros.new_zeros(self.components),
            "means": torch.linspace(-1.0, 1.0, self.components).to(zeros)[:, None].expand(-1, features).clone(),
            "means_factor": math.log(0.1) * eye.expand(self.components, -1, -1).clone(),
            "log_freedom": zeros.new_full((count,), math.log(10.0)),
        }
        if self.covariance in ("full", "tied"):
            guesses["covariances_factor"] = zeros.new_zeros(count, features, features)
        else:
            guesses["covariances"] = zeros.new_zeros(count, width)
        self.guesses = nn.ParameterDict(guesses)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.location is None and prefix + "location" in state_dict:
            self._shape(len(state_dict[prefix + "location"]), state_dict[prefix + "location"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Scales the prior to the data, unless ``location`` and ``scale`` were given, and starts the guide anew.

        Args:
            x: All the data, (rows, D), floating.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If x is not a finite table of the right width, with at least as many rows as components.
        """
        if x is None:
            return
        self._check(x)
        if len(x) < self.components:
            raise ValueError(f"GMM has {self.components} components, but x has only {len(x)} rows.")
        self._shape(x.shape[1], x)
        location, deviation = x.mean(0), x.std(0, correction=0)
        self.location = self.location if self._has_location else location
        self.scale = self.scale if self._has_scale else torch.where(deviation > 0, deviation, torch.ones_like(deviation))
        with torch.no_grad():
            standard = (x - self.location) / self.scale
            direction = torch.linalg.svd(standard, full_matrices=False).Vh[0]
            groups = (standard @ direction).argsort().tensor_split(self.components)
            self.guesses["means"].copy_(torch.stack([standard[rows].mean(0) for rows in groups]))
            self.guesses["log_concentration"].fill_(math.log(len(x) / self.components))
            self.guesses["log_freedom"].fill_(math.log(len(x) / len(self.guesses["log_freedom"])))

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be a table (rows, features).")
        if not x.shape[1]:
            raise ValueError("x has no columns.")
        if not x.is_floating_point():
            raise ValueError(f"x holds {str(x.dtype).removeprefix('torch.')}, but must be floating: pass x.double().")
        if self._has_features and x.shape[1] != self.features:
            raise ValueError(f"x has {x.shape[1]} features, but this GMM was built for {self.features}.")
        bad = (~x.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"x holds {len(bad)} values that are NaN or infinite, the first in row {row}, column {column}. "
                "Remove these rows, or fill them in."
            )

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        rows, components = self._rows(x, size), self.components
        weights = pyro.sample("weights", dist.Dirichlet(self.location.new_ones(components)))
        with pyro.plate("components", components):
            means = pyro.sample("means", dist.Normal(self.location, 3.0 * self.scale).to_event(1))
            if self.covariance != "tied":
                covariances = pyro.sample("covariances", self._prior())
        if self.covariance == "tied":
            covariances = pyro.sample("covariances", self._prior())
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Categorical(weights))
            return pyro.sample("x", self._rows_given(means, covariances, z), obs=x)

    def _prior(self) -> dist.TorchDistribution:
        """Prior of one component's covariance, in the parameterisation of ``covariance``."""
        features = self.scale.shape[0]
        variance = self.scale.square() / self.components ** (2.0 / features)
        if self.covariance in ("full", "tied"):
            return InverseWishart(features + 2.0, torch.diag(variance))
        if self.covariance == "diagonal":
            return dist.InverseGamma(0.5 * features + 1.0, 0.5 * variance).to_event(1)
        return dist.InverseGamma(0.5 * features + 1.0, 0.5 * variance.mean())

    def _rows_given(self, means: Tensor, covariances: Tensor, z: Tensor) -> dist.TorchDistribution:
        """Distribution of rows given the labels z (…) of their components."""
        if self.covariance == "full":
            return dist.MultivariateNormal(means[z], scale_tril=torch.linalg.cholesky(covariances)[z])
        if self.covariance == "tied":
            return dist.MultivariateNormal(means[z], scale_tril=torch.linalg.cholesky(covariances))
        deviations = covariances.sqrt()[z]
        return dist.Normal(means[z], deviations if self.covariance == "diagonal" else deviations[..., None]).to_event(1)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Independent factors: a Dirichlet, a normal for every mean, an inverse Wishart or Gamma for every covariance."""
        guess = self.guesses
        pyro.sample("weights", dist.Dirichlet(guess["log_concentration"].exp()))
        with pyro.plate("components", self.components):
            factor = guess["means_factor"].tril(-1) + torch.diag_embed(
                guess["means_factor"].diagonal(dim1=-2, dim2=-1).exp()
            )
            location = self.location + self.scale * guess["means"]
            pyro.sample("means", dist.MultivariateNormal(location, scale_tril=self.scale[:, None] * factor))
            if self.covariance != "tied":
                pyro.sample("covariances", self._guess())
        if self.covariance == "tied":
            pyro.sample("covariances", self._guess())

    def _guess(self) -> dist.TorchDistribution:
        """Factor of the guide for the covariances: mean of about one component's share of the data's variance."""
        guess, features = self.guesses, self.scale.shape[0]
        freedom = guess["log_freedom"].exp()
        if self.covariance in ("full", "tied"):
            raw = guess["covariances_factor"]
            factor = raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())
            factor = 0.5 * self.scale[:, None] * factor * freedom.sqrt()[:, None, None]
            approximate = InverseWishart(freedom + features + 1.0, factor @ factor.mT)
            return (
                approximate if self.covariance == "full" else InverseWishart(approximate.df[0], approximate.scale_matrix[0])
            )
        mean = 0.25 * guess["covariances"].exp()
        if self.covariance == "diagonal":
            rate = mean * self.scale.square() * freedom[:, None]
            return dist.InverseGamma(freedom[:, None] + 1.0, rate).to_event(1)
        return dist.InverseGamma(freedom + 1.0, mean[:, 0] * self.scale.square().mean() * freedom)

    def _rows(self, x: Tensor | None, size: int | None) -> int:
        if self.location is None or self.scale is None:
            if x is None:
                raise ValueError("This GMM has seen no data: give features=, or location= and scale=, to draw from it.")
            self.prepare(x)
        if x is not None:
            if x.shape[-1] != self.features:
                raise ValueError(f"x has {x.shape[-1]} features, but this GMM was built for {self.features}.")
            return x.shape[0]
        if size is None:
            raise ValueError("GMM.model needs data x, or the number of rows to draw, size.")
        return size

    def _log_joint(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """log p(x_n, z_n = k | draw), (draw, rows, K)."""
        table = draws if isinstance(draws, Mapping) else draws.matched
        parts = [torch.as_tensor(table[name]).to(x) for name in ("weights", "means", "covariances")]
        weights, means, covariances = (
            part.reshape(-1, *part.shape[part.dim() - own :])
            for part, own in zip(parts, (1, 2, self._covariance_dim()), strict=True)
        )
        if x.dim() != 2 or x.shape[1] != means.shape[-1]:
            raise ValueError(f"x has shape {tuple(x.shape)}, but these draws are of {means.shape[-1]} features.")
        labels = torch.arange(self.components, device=x.device)
        terms = [
            self._rows_given(m, c, labels).log_prob(x[:, None]) + w.log()
            for w, m, c in zip(weights, means, covariances, strict=True)
        ]
        return torch.stack(terms)

    def _covariance_dim(self) -> int:
        return {"full": 3, "tied": 2, "diagonal": 2, "spherical": 1}[self.covariance]

    @torch.no_grad()
    def predict_proba(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Probability of each component for each row, averaged over draws whose labels have been matched.

        Args:
            x: (rows, D).
            draws: A Posterior, or site to (…, *site).

        Returns:
            (rows, K), rows sum to 1.
        """
        return self._log_joint(x, draws).softmax(-1).mean(0)

    def predict(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Most probable component of each row, (rows,)."""
        return self.predict_proba(x, draws).argmax(-1)

    @torch.no_grad()
    def score_samples(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Log posterior predictive density of each row: log-mean over the draws of p(x_n | draw), (rows,)."""
        log_densities = self._log_joint(x, draws).logsumexp(-1)
        return log_densities.logsumexp(0) - math.log(len(log_densities))

    @torch.no_grad()
    def sample(self, size: int, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """New rows from the posterior predictive, each from a draw chosen at random; (size, D)."""
        table = draws if isinstance(draws, Mapping) else draws.draws
        weights, means, covariances = (torch.as_tensor(table[n]) for n in ("weights", "means", "covariances"))
        weights = weights.reshape(-1, self.components)
        means = means.reshape(-1, *means.shape[-2:])
        own = self._covariance_dim()
        covariances = covariances.reshape(-1, *covariances.shape[covariances.dim() - own :])
        chosen = torch.randint(len(weights), (size,))
        z = torch.multinomial(weights[chosen], 1).squeeze(1)
        rows = [self._rows_given(means[i], covariances[i], k).sample() for i, k in zip(chosen, z, strict=True)]
        return torch.stack(rows)
