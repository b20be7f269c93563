"""The Gaussian mixture: every row comes from one of K normal components, and does not say from which."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_genmodels.classical.components import Draws, FiniteMixture
from pyro_genmodels.classical.seeding import apart
from pyro_genmodels.classical.tables import check_known, check_table, check_weights, moments, principal
from pyro_genmodels.distributions import Columns, Filled, InverseWishart, Mixed, PartialNormal

__all__ = ["GMM"]

COVARIANCES = ("full", "tied", "diagonal", "spherical")
SHARES = ("free", "equal", "stick-breaking")
_CHUNK = 2**23  # numbers in the covariances of gappy rows that are looked at together


class GMM(FiniteMixture):
    """Gaussian mixture.

        w ~ Dirichlet(1),  μ_k ~ N(m, 9 diag s²),  Σ_k ~ InverseWishart(D + 2, diag s² / K^(2/D)),
        z_n ~ Categorical(w),  x_n ~ N(μ_{z_n}, Σ_{z_n})

    With m and s the mean and standard deviation of the data, the prior is proper, works on unscaled data and keeps a
    component from collapsing onto a point, where the likelihood has no upper bound: ``EM(objective="mle")``, which leaves
    the prior out, may run into such a singularity; ``EM()`` cannot. Diagonal, spherical and isotropic variances have the
    prior InverseGamma(D/2 + 1, s² / 2 K^(2/D)) of the corresponding marginal.

    Entries of x that are NaN are not observed: a row counts with the marginal of what is known of it, and a row of which
    nothing is known says nothing. (That is right if what is missing does not depend on its value, given the rest.) EM has
    closed forms all the same; Gibbs then moves full and tied covariances by HMC. missing="drawn" makes the missing entries a
    site of their own instead, flat before the data: the same posterior, of which Gibbs draws every site from its exact
    conditional. (It is meant for Gibbs: the others have more to move, and EM has to average over draws.)

    ``row_weights`` raise the density of each row to a power: a weight of 2 is the row twice. The components are then summed
    out inside the distribution of a row, there is no ``z``, and every back-end has the posterior of the weighted rows; Gibbs
    moves all sites by HMC, since one label cannot stand for several copies of a row.

    weights="equal" fixes w = 1/K; with covariance="isotropic", one variance for all, ``EM(hard=True, objective="mle")`` then
    is k-means. weights="stick-breaking" is the Dirichlet process with concentration α, truncated at K components,

        v_k ~ Beta(1, α),  w_k = v_k Π_{j<k} (1 − v_j),  k < K,

    which leaves those unused that the data do not ask for: K is then only a bound, and the prior of Σ_k has 1 + α in its
    place, or 2 if α is not known. What the truncation cuts off has the expected mass (α / (1 + α))^(K − 1). The number of
    components in use, ``inference.relabel.occupied``, is no estimate of a number of groups: it grows with the rows.

    Labels are exchangeable (but for sticks): compare posteriors through label-free functions, or relabel first.

    Sites: ``weights`` (K,), ``means`` (K, D), ``covariances`` (K, D, D) full, (D, D) tied, (K, D) diagonal variances, (K,)
    spherical variances, () isotropic variance; ``z`` (rows,), ``x`` (rows, D); ``sticks`` (K − 1,) and ``concentration`` ()
    of stick-breaking. Plates: ``components``, ``rows``, ``breaks``.

    Args:
        components: Number of components K, at least 1.
        covariance: "full", "tied", "diagonal", "spherical" or "isotropic".
        features: Number of columns D; None takes it from the first data seen.
        location: m, (D,); None takes it from the data of each fit.
        scale: s, (D,), positive; None takes it from the data of each fit (a constant column counts as 1).
        weights: "free", "equal" or "stick-breaking".
        concentration: α of stick-breaking, positive; None gives it the prior Gamma(1, 1).
        missing: What happens to missing entries: "summed" integrates them out, "drawn" makes them the site ``missing``
            (rows, D), which is a placeholder where an entry is known.

    References:
        C. Bishop, Pattern Recognition and Machine Learning (2006), section 9.2.
        H. Ishwaran and L. James, Gibbs sampling methods for stick-breaking priors (2001).
        J. Miller and M. Harrison, A simple example of Dirichlet process mixture inconsistency for the number of components
        (2013).
        Z. Ghahramani and M. Jordan, Supervised learning from incomplete data via an EM approach (1994).
        C. Fraley and A. Raftery, Bayesian regularization for normal mixture estimation and model-based clustering (2007).
    """

    def __init__(
        self,
        components: int,
        covariance: str = "full",
        features: int | None = None,
        location: Tensor | None = None,
        scale: Tensor | None = None,
        weights: str = "free",
        concentration: float | None = 1.0,
        missing: str = "summed",
    ) -> None:
        super().__init__()
        if components < 1:
            raise ValueError(f"GMM needs at least 1 component, but components is {components}.")
        if covariance not in (*COVARIANCES, "isotropic"):
            known = ", ".join((*COVARIANCES, "isotropic"))
            raise ValueError(f"covariance is '{covariance}', but must be one of {known}.")
        if weights not in SHARES:
            raise ValueError(f"weights is '{weights}', but must be one of {', '.join(SHARES)}.")
        if weights == "stick-breaking" and components < 2:
            raise ValueError(f"A stick cannot break into fewer than 2 components, but components is {components}.")
        if concentration is not None and not concentration > 0:
            raise ValueError(f"concentration is {concentration}, but must be positive.")
        self.components, self.covariance = components, covariance
        if missing not in ("summed", "drawn"):
            raise ValueError(f"missing is '{missing}', but must be 'summed' or 'drawn'.")
        self.weights, self.concentration, self.missing = weights, concentration, missing
        self._has_gaps: bool | None = None  # None: not prepared yet
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
        count = 1 if self._is_shared else self.components
        eye = torch.eye(features, dtype=like.dtype, device=like.device)
        guesses = {
            "means": torch.linspace(-1.0, 1.0, self.components).to(zeros)[:, None].expand(-1, features).clone(),
            "means_factor": math.log(0.1) * eye.expand(self.components, -1, -1).clone(),
            "log_freedom": zeros.new_full((count,), math.log(10.0)),
        }
        if self.weights == "free":
            guesses["log_concentration"] = zeros.new_zeros(self.components)
        elif self.weights == "stick-breaking":
            guesses["log_sticks"] = zeros.new_zeros(self.components - 1, 2)
            if self.concentration is None:
                guesses["log_gamma"] = zeros.new_zeros(2)
        if self.covariance in ("full", "tied"):
            guesses["covariances_factor"] = zeros.new_zeros(count, features, features)
        else:
            guesses["covariances"] = zeros.new_zeros(count, features if self.covariance == "diagonal" else 1)
        self.guesses = nn.ParameterDict(guesses)

    @property
    def _is_shared(self) -> bool:
        """Whether all components have the same covariance."""
        return self.covariance in ("tied", "isotropic")

    @property
    def _groups(self) -> float:
        """How many components share the spread of the data; 1 / E Σ w_k² for sticks, whatever they are truncated at."""
        if self.weights != "stick-breaking":
            return float(self.components)
        return 1.0 + (1.0 if self.concentration is None else self.concentration)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.location is None and prefix + "location" in state_dict:
            self._shape(len(state_dict[prefix + "location"]), state_dict[prefix + "location"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def prepare(self, x: Tensor | None = None, size: int | None = None, row_weights: Tensor | None = None) -> None:
        """Scales the prior to the data, unless ``location`` and ``scale`` were given, and starts the guide anew.

        Args:
            x: All the data, (rows, D), floating; NaN where an entry is missing.
            size: Not used; ``prepare`` has the signature of ``model``.
            row_weights: How often each row counts, (rows,).

        Raises:
            ValueError: If x is not a table of the right width, with at least as many rows as components and a value in every
                column, or the weights are not one for each row, none negative and not all zero.
        """
        if x is None:
            return
        self._check(x, row_weights)
        if len(x) < self.components:
            raise ValueError(f"GMM has {self.components} components, but x has only {len(x)} rows.")
        self._shape(x.shape[1], x)
        is_known = ~x.isnan()
        self._has_gaps = not bool(is_known.all())
        counts = x.new_ones(len(x)) if row_weights is None else row_weights.to(x)
        location, scale = moments(x, row_weights)
        self.location = self.location if self._has_location else location
        self.scale = self.scale if self._has_scale else scale
        with torch.no_grad():
            total = float(counts.sum())
            standard = (x - self.location).div_(self.scale).masked_fill_(~is_known, 0.0)
            groups = (standard @ principal(standard)).argsort().tensor_split(self.components)
            self.guesses["means"].copy_(torch.stack([standard[rows].mean(0) for rows in groups]))
            self.guesses["log_freedom"].fill_(math.log(total / len(self.guesses["log_freedom"])))
            if self.weights == "free":
                self.guesses["log_concentration"].fill_(math.log(total / self.components))
            elif self.weights == "stick-breaking":
                left = total * torch.arange(self.components - 1, 0, -1) / self.components
                self.guesses["log_sticks"].copy_(
                    torch.stack([torch.full_like(left, total / self.components), left], -1).log()
                )

    def _check(self, x: Tensor, row_weights: Tensor | None = None) -> None:
        check_table(x, "GMM", self.features if self._has_features else None)
        if row_weights is not None:
            check_weights(row_weights, len(x))
        check_known(x, row_weights)

    def model(self, x: Tensor | None = None, size: int | None = None, row_weights: Tensor | None = None) -> Tensor:
        rows, components = self._rows(x, size, row_weights), self.components
        weights = self._weights()
        with pyro.plate("components", components):
            means = pyro.sample("means", dist.Normal(self.location, 3.0 * self.scale).to_event(1))
            if not self._is_shared:
                covariances = pyro.sample("covariances", self._prior())
        if self._is_shared:
            covariances = pyro.sample("covariances", self._prior())
        is_gappy = self._is_gappy(x)
        with pyro.plate("rows", rows):
            if is_gappy and self.missing == "drawn" and x is not None:
                is_known, is_gappy = ~x.isnan(), False
                blank = dist.Normal(self.location, self.scale).expand(list(x.shape)).mask(is_known)
                x = torch.where(is_known, x.nan_to_num(), pyro.sample("missing", blank.to_event(1)))
            if row_weights is None:
                z = pyro.sample("z", dist.Categorical(weights))
                return pyro.sample("x", self._rows_given(means, covariances, z, is_gappy), obs=x)
            z = torch.arange(components, device=means.device)
            with poutine.scale(scale=row_weights.clamp(min=torch.finfo(row_weights.dtype).tiny)):
                return pyro.sample("x", Mixed(weights, self._rows_given(means, covariances, z, is_gappy)), obs=x)

    def _weights(self) -> Tensor:
        if self.weights == "free":
            return pyro.sample("weights", dist.Dirichlet(self.location.new_ones(self.components)))
        if self.weights == "equal":
            return pyro.deterministic("weights", self.location.new_full((self.components,), 1.0 / self.components))
        one = self.location.new_ones(())
        concentration = one if self.concentration is None else self.concentration * one
        if self.concentration is None:
            concentration = pyro.sample("concentration", dist.Gamma(one, 1.0))
        with pyro.plate("breaks", self.components - 1):
            sticks = pyro.sample("sticks", dist.Beta(one, concentration))
        left = (1.0 - sticks).cumprod(-1)
        end = torch.ones_like(left[..., :1])
        return pyro.deterministic("weights", torch.cat([sticks, end], -1) * torch.cat([end, left], -1))

    def _is_gappy(self, x: Tensor | None) -> bool:
        if self._has_gaps is None:
            return x is not None and bool(x.isnan().any())
        return self._has_gaps

    def _prior(self) -> dist.TorchDistribution:
        """Prior of one component's covariance, in the parameterisation of ``covariance``."""
        features = self.scale.shape[0]
        variance = self.scale.square() / self._groups ** (2.0 / features)
        if self.covariance in ("full", "tied"):
            return InverseWishart(features + 2.0, torch.diag(variance))
        if self.covariance == "diagonal":
            return dist.InverseGamma(0.5 * features + 1.0, 0.5 * variance).to_event(1)
        return dist.InverseGamma(0.5 * features + 1.0, 0.5 * variance.mean())

    def _rows_given(self, means: Tensor, covariances: Tensor, z: Tensor, is_gappy: bool = False) -> dist.TorchDistribution:
        """Distribution of rows given the labels z (…) of their components."""
        if self.covariance in ("full", "tied"):
            factor = torch.linalg.cholesky(covariances)
            factor = factor[z] if self.covariance == "full" else factor
            return PartialNormal(means[z], factor) if is_gappy else dist.MultivariateNormal(means[z], scale_tril=factor)
        deviations = covariances.sqrt()
        deviations = deviations if self.covariance == "isotropic" else deviations[z]
        columns = dist.Normal(means[z], deviations if self.covariance == "diagonal" else deviations[..., None])
        return Columns(((range(means.shape[-1]), columns),)) if is_gappy else columns.to_event(1)

    def guide(self, x: Tensor | None = None, size: int | None = None, row_weights: Tensor | None = None) -> None:
        """Independent factors: a Dirichlet or Betas, a normal a mean, an inverse Wishart or Gamma a covariance."""
        guess = self.guesses
        if self.weights == "free":
            pyro.sample("weights", dist.Dirichlet(guess["log_concentration"].exp()))
        elif self.weights == "stick-breaking":
            if self.concentration is None:
                pyro.sample("concentration", dist.Gamma(*guess["log_gamma"].exp()))
            with pyro.plate("breaks", self.components - 1):
                pyro.sample("sticks", dist.Beta(*guess["log_sticks"].exp().unbind(-1)))
        with pyro.plate("components", self.components):
            factor = guess["means_factor"].tril(-1) + torch.diag_embed(
                guess["means_factor"].diagonal(dim1=-2, dim2=-1).exp()
            )
            location = self.location + self.scale * guess["means"]
            pyro.sample("means", dist.MultivariateNormal(location, scale_tril=self.scale[:, None] * factor))
            if not self._is_shared:
                pyro.sample("covariances", self._guess())
        if self._is_shared:
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
        rate = mean[:, 0] * self.scale.square().mean() * freedom
        if self.covariance == "isotropic":
            return dist.InverseGamma(freedom[0] + 1.0, rate[0])
        return dist.InverseGamma(freedom + 1.0, rate)

    def _rows(self, x: Tensor | None, size: int | None, row_weights: Tensor | None = None) -> int:
        if self.location is None or self.scale is None:
            if x is None:
                raise ValueError("This GMM has seen no data: give features=, or location= and scale=, to draw from it.")
            self.prepare(x, row_weights=row_weights)
        if x is not None:
            if x.shape[-1] != self.features:
                raise ValueError(f"x has {x.shape[-1]} features, but this GMM was built for {self.features}.")
            return x.shape[0]
        if size is None:
            raise ValueError("GMM.model needs data x, or the number of rows to draw, size.")
        return size

    @torch.no_grad()
    def start(self, x: Tensor, size: int | None = None, row_weights: Tensor | None = None) -> dict[str, Tensor]:
        """Where a fit may start: the moments of clusters that k-means++ has chosen, drawn in with the prior's.

        EM and samplers start there by themselves, from several draws of which they take the best. Random numbers come from
        torch's global generator.

        Args:
            x: (rows, D).
            size: Not used.
            row_weights: How often each row counts, (rows,).

        Returns:
            Site to value, such as ``EM(start=...)`` takes.
        """
        if self.location is None or self.scale is None:
            self.prepare(x, row_weights=row_weights)
        counts = x.new_ones(len(x)) if row_weights is None else row_weights.to(x)
        location, scale = self.location.to(x), self.scale.to(x)
        owner = apart((x - location) / scale, self.components, counts)
        sizes = counts.new_zeros(self.components).index_add(0, owner, counts)
        if self.weights == "stick-breaking":  # the largest stick first
            rank = sizes.argsort(descending=True)
            sizes, owner = sizes[rank], rank.argsort()[owner]
        member = torch.nn.functional.one_hot(owner, self.components).to(x) * counts[:, None]
        is_known = ~x.isnan()
        known = member.mT @ is_known.to(x)
        means = (member.mT @ torch.where(is_known, x, 0.0) + location) / (known + 1.0)
        residual = torch.where(is_known, x - means[owner], 0.0)
        found = {"means": means, "covariances": self._spread(residual, member, sizes, scale)}
        if self.weights == "free":
            found["weights"] = (sizes + 1.0) / (sizes.sum() + self.components)
        elif self.weights == "stick-breaking":
            left = sizes.flip(0).cumsum(0).flip(0)
            found["sticks"] = (sizes[:-1] + 1.0) / (left[:-1] + 2.0)
            if self.concentration is None:
                found["concentration"] = x.new_ones(())
        return found

    def _spread(self, residual: Tensor, member: Tensor, sizes: Tensor, scale: Tensor) -> Tensor:
        """Covariances of clusters drawn in with that of the prior, in the parameterisation of ``covariance``."""
        features = residual.shape[1]
        variance = scale.square() / self._groups ** (2.0 / features)
        if self._is_shared:
            member, sizes = member.sum(1, keepdim=True), sizes.sum()[None]
        if self.covariance in ("full", "tied"):
            scatter = torch.einsum("nk,ni,nj->kij", member, residual, residual) if features * len(sizes) < 64 else None
            if scatter is None:
                scatter = torch.stack([(residual * weight[:, None]).mT @ residual for weight in member.mT])
            found = (torch.diag(variance) + scatter) / (sizes + features + 2.0)[:, None, None]
        else:
            found = (variance + member.mT @ residual.square()) / (sizes + features + 2.0)[:, None]
            found = found if self.covariance == "diagonal" else found.mean(1)
        return found[0] if self._is_shared else found

    # ------------------------------------------------------------------------------ what draws say
    def _tables(self, draws: Draws, like: Tensor, is_matched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Weights (draw, K), means (draw, K, D) and covariances (draw, …) of draws."""
        table = draws if isinstance(draws, Mapping) else draws.matched if is_matched else draws.draws
        parts = [torch.as_tensor(table[name]).to(like) for name in ("weights", "means", "covariances")]
        weights, means, covariances = (
            part.reshape(-1, *part.shape[part.dim() - own :])
            for part, own in zip(parts, (1, 2, self._covariance_dim()), strict=True)
        )
        if like.dim() != 2 or like.shape[1] != means.shape[-1]:
            raise ValueError(f"x has shape {tuple(like.shape)}, but these draws are of {means.shape[-1]} features.")
        return weights, means, covariances

    def _log_joint(self, x: Tensor, draws: Draws) -> Tensor:
        tables = self._tables(draws, x)
        return torch.stack([self._log_joint_at(x, *table) for table in zip(*tables, strict=True)])

    def _log_joint_at(self, x: Tensor, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
        labels = torch.arange(self.components, device=x.device)
        is_gappy = bool(x.isnan().any())
        rows_given = self._rows_given(means, covariances, labels, is_gappy)
        parts = x.split(max(1, _CHUNK // means.numel() // x.shape[1])) if is_gappy else (x,)
        return torch.cat([rows_given.log_prob(part[:, None]) + weights.log() for part in parts])

    def _covariance_dim(self) -> int:
        return {"full": 3, "tied": 2, "diagonal": 2, "spherical": 1, "isotropic": 0}[self.covariance]

    @property
    def parameters_free(self) -> int:
        """How many numbers the likelihood depends on."""
        if self.features is None:
            raise ValueError("This GMM has seen no data: give features=.")
        own = {"full": self.features * (self.features + 1) // 2, "tied": self.features * (self.features + 1) // 2,
               "diagonal": self.features, "spherical": 1, "isotropic": 1}[self.covariance]  # fmt: skip
        shares = 0 if self.weights == "equal" else self.components - 1
        return shares + self.components * self.features + (own if self._is_shared else own * self.components)

    @torch.no_grad()
    def _best(self, x: Tensor, draws: Draws, row_weights: Tensor | None) -> tuple[float, float]:
        """Highest log-likelihood of a draw, and the number of rows."""
        counts = x.new_ones(len(x)) if row_weights is None else row_weights.to(x)
        return float((self._log_joint(x, draws).logsumexp(-1) @ counts).max()), float(counts.sum())

    def aic(self, x: Tensor, draws: Draws, row_weights: Tensor | None = None) -> float:
        """Akaike's criterion −2 log L + 2 P at the likeliest draw, lower is better; it is meant for EM's "mle" point.

        References:
            H. Akaike, A new look at the statistical model identification (1974).
        """
        return 2.0 * self.parameters_free - 2.0 * self._best(x, draws, row_weights)[0]

    def bic(self, x: Tensor, draws: Draws, row_weights: Tensor | None = None) -> float:
        """Bayesian information criterion −2 log L + P log N at the likeliest draw, lower is better; for EM's "mle" point.

        References:
            G. Schwarz, Estimating the dimension of a model (1978).
        """
        log_likelihood, rows = self._best(x, draws, row_weights)
        return math.log(rows) * self.parameters_free - 2.0 * log_likelihood

    def _fill(self, x: Tensor, means: Tensor, covariances: Tensor) -> Filled:
        """What each component says of the rows, mean (rows, K, D) and covariance (rows, K, D, D)."""
        if self.covariance in ("full", "tied"):
            factor = torch.linalg.cholesky(covariances)
            return PartialNormal(means, factor).filled(x[:, None])
        own = covariances if self.covariance == "diagonal" else covariances[..., None].expand_as(means)
        unknown = x.isnan()[:, None]
        return Filled(torch.where(unknown, means, x[:, None]), torch.diag_embed(torch.where(unknown, own, 0.0)))

    @torch.no_grad()
    def impute(self, x: Tensor, draws: Draws) -> Tensor:
        """x with its missing entries at their posterior mean E[x_missing | x_known], (rows, D).

        Args:
            x: (rows, D), NaN where an entry is missing.
            draws: A Posterior, or site to (…, *site).
        """
        gappy = x.isnan().any(1).nonzero().squeeze(1)
        filled, tables = x.clone(), self._tables(draws, x)
        for rows in gappy.split(max(1, _CHUNK // (self.components * x.shape[1] ** 2))):
            means = [
                torch.einsum("nk,nkd->nd", self._log_joint_at(x[rows], w, m, c).softmax(-1), self._fill(x[rows], m, c).mean)
                for w, m, c in zip(*tables, strict=True)
            ]
            filled[rows] = torch.where(x[rows].isnan(), torch.stack(means).mean(0), x[rows])
        return filled

    @torch.no_grad()
    def imputations(self, x: Tensor, draws: Draws, size: int) -> Tensor:
        """Draws of the missing entries given the known ones, each at a draw chosen at random: (size, rows, D).

        Quantiles over the first dimension are intervals; as many tables to analyse are multiple imputation. Random numbers
        come from torch's global generator.

        References:
            D. Rubin, Multiple imputation for nonresponse in surveys (1987).
        """
        gappy = x.isnan().any(1).nonzero().squeeze(1)
        filled, (weights, means, covariances) = x.repeat(size, 1, 1), self._tables(draws, x, is_matched=False)
        chosen = torch.randint(len(weights), (size,))
        for i in chosen.unique().tolist():
            which = (chosen == i).nonzero().squeeze(1).to(x.device)
            for rows in gappy.split(max(1, _CHUNK // (self.components * x.shape[1] ** 2))):
                known, unknown = x[rows], x[rows].isnan()
                shares = self._log_joint_at(known, weights[i], means[i], covariances[i]).softmax(-1)
                z = torch.multinomial(shares, len(which), replacement=True).mT  # (draw, row)
                mean, covariance = self._fill(known, means[i], covariances[i])
                factor = torch.linalg.cholesky(covariance + torch.diag_embed((~unknown).to(x))[:, None])
                factor = factor.expand(*mean.shape, mean.shape[-1])
                noise = torch.where(unknown, torch.randn(len(which), *known.shape, dtype=x.dtype, device=x.device), 0.0)
                row = torch.arange(len(rows), device=x.device)
                drawn = mean[row, z] + (factor[row, z] @ noise.unsqueeze(-1)).squeeze(-1)
                filled[which[:, None], rows] = torch.where(unknown, drawn, known)
        return filled

    @torch.no_grad()
    def denoise(self, y: Tensor, noise: float | Tensor, draws: Draws) -> Tensor:
        """Posterior mean E[x | y] of rows that were seen with normal noise, exactly; the least mean squared error.

            y_n = x_n + e_n,  e_n ~ N(0, R):    E[x | y] = Σ_{s,k} r_sk (μ_sk + Σ_sk (Σ_sk + R)⁻¹ (y − μ_sk)),
            r_sk ∝ w_sk N(y | μ_sk, Σ_sk + R)

        over the components k of all draws s. A row is new to the fit, and says itself which draws to believe.

        Args:
            y: Noisy rows, (rows, D); no entry is missing.
            noise: Standard deviation, R = noise² I; or the covariance R, (D, D), which may be singular.
            draws: A Posterior of rows without noise, or site to (…, *site).

        Returns:
            (rows, D).

        Raises:
            ValueError: If entries of y are NaN or infinite, or the noise is no standard deviation and no covariance.

        References:
            D. Zoran and Y. Weiss, From learning models of natural image patches to whole image restoration (2011).
        """
        tables, bad = self._tables(draws, y, is_matched=False), (~y.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise ValueError(
                f"y must be finite, but holds {len(bad)} values that are not, the first in row {row}, column {column}. "
                "Remove these rows, or fill them in before: see impute."
            )
        total, cleaned = y.new_full((len(y),), -math.inf), torch.zeros_like(y)
        spread = _noise(noise, y)
        for weights, means, covariances in zip(*tables, strict=True):
            own = self._matrices(means, covariances)
            factor = torch.linalg.cholesky(own + spread)
            gain = torch.cholesky_solve(own, factor).mT
            rows_given = dist.MultivariateNormal(means, scale_tril=factor)
            for rows in torch.arange(len(y), device=y.device).split(max(1, _CHUNK // means.numel())):
                joint = rows_given.log_prob(y[rows, None]) + weights.log()
                each = means + torch.einsum("kde,nke->nkd", gain, y[rows, None] - means)
                mean = torch.einsum("nk,nkd->nd", joint.softmax(-1), each)
                before, here = total[rows], joint.logsumexp(-1)
                total[rows] = torch.logaddexp(before, here)
                cleaned[rows] += (here - total[rows]).exp()[:, None] * (mean - cleaned[rows])
        return cleaned

    def _matrices(self, means: Tensor, covariances: Tensor) -> Tensor:
        """Covariances of one draw as matrices, (K, D, D)."""
        if self.covariance in ("full", "tied"):
            return covariances.expand(*means.shape, means.shape[-1])
        own = covariances if self.covariance == "diagonal" else covariances[..., None]
        return torch.diag_embed(own.expand_as(means))

    @torch.no_grad()
    def sample(self, size: int, draws: Draws) -> Tensor:
        """New rows from the posterior predictive, each from a draw chosen at random; (size, D)."""
        table = draws if isinstance(draws, Mapping) else draws.draws
        means = torch.as_tensor(table["means"])
        weights, means, covariances = self._tables(draws, means.reshape(-1, means.shape[-1]), is_matched=False)
        chosen = torch.randint(len(weights), (size,))
        z = torch.multinomial(weights[chosen], 1).squeeze(1)
        rows = [self._rows_given(means[i], covariances[i], k).sample() for i, k in zip(chosen, z, strict=True)]
        return torch.stack(rows)


def _noise(noise: float | Tensor, like: Tensor) -> Tensor:
    """The covariance of noise, (D, D)."""
    given, features = torch.as_tensor(noise).to(like), like.shape[1]
    if given.dim() == 0 and bool((given >= 0.0) & given.isfinite()):
        return given.square() * torch.eye(features, dtype=like.dtype, device=like.device)
    if given.dim() == 0:
        raise ValueError(f"noise is {float(given)}, but a standard deviation must be finite and not negative.")
    if given.shape != (features, features):
        raise ValueError(
            f"noise has shape {tuple(given.shape)}, but must be a standard deviation () or a covariance ({features}, "
            f"{features}). For one variance a column, pass torch.diag(variances)."
        )
    slack = 1e3 * torch.finfo(like.dtype).eps * given.abs().max()
    if not bool(given.isfinite().all()) or bool(((given - given.mT).abs() > slack).any()):
        raise ValueError("noise must be finite and symmetric to be a covariance.")
    least = torch.linalg.eigvalsh(given)[0]
    if least < -slack:
        raise ValueError(f"noise has the eigenvalue {float(least):g}, but a covariance has none below zero.")
    return given
