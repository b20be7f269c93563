"""Factor models: many columns that move together because a few numbers of each row, which nobody has seen, move them."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from inference.contract import Fitted
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.classical.tables import check_known, check_table, moments
from pyro_genmodels.distributions import Columns, PartialNormal

__all__ = ["PPCA", "FactorAnalysis", "FactorModel", "Scores"]

Draws = Fitted | Mapping[str, Tensor]

_JITTER = 0.1  # of a start of factor analysis, whose likelihood may have several maxima; in standard deviations of the data
_LEAST_NOISE = 0.05  # share of a column's variance that a start leaves to its noise: from zero EM hardly gets away


class Scores(NamedTuple):
    """What rows say of their factors: z_n | x_n has this mean and covariance.

    Attributes:
        mean: (rows, q).
        covariance: (rows, q, q).
    """

    mean: Tensor
    covariance: Tensor


class FactorModel(GenerativeModel):
    """What the factor models share: rows are normal, with a covariance of few directions and independent noise.

        W_dk ~ N(0, s_d²),  m_d ~ N(x̄_d, 9 s_d²),  z_n ~ N(0, I_q),  x_n ~ N(W z_n + m, Ψ)

    Args:
        factors: Number of factors q, at least 1 and fewer than there are columns.
        features: Number of columns D; None takes it from the first data seen.
        location: x̄, (D,); None takes the mean of the data of each fit.
        scale: Standard deviations of the columns, (D,), positive; None takes those of the data of each fit (a constant
            column counts as 1).
        latent: Whether z is a site; else it is integrated out and x_n ~ N(m, W Wᵀ + Ψ), which leaves ``HMC`` and
            ``MetropolisHastings`` fewer sites to move. ``Gibbs`` and ``EM`` have closed forms with it.
    """

    def __init__(
        self,
        factors: int,
        features: int | None = None,
        location: Tensor | None = None,
        scale: Tensor | None = None,
        latent: bool = True,
    ) -> None:
        super().__init__()
        if factors < 1:
            raise ValueError(f"{self._name} needs at least 1 factor, but factors is {factors}.")
        self.factors, self.has_latent = factors, latent
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
            self._shape(self.features, given[0] if given else torch.zeros(()))

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    @abc.abstractmethod
    def _unit(self) -> Tensor:
        """s, the scale of each column's prior, (D,)."""

    @property
    @abc.abstractmethod
    def _jitter(self) -> float:
        """How far from principal axes a fit starts, in units of s."""

    @abc.abstractmethod
    def _noise_shape(self, features: int) -> tuple[int, ...]:
        """Shape of the site ``noise``."""

    @abc.abstractmethod
    def _left(self, variances: Tensor, loadings: Tensor, spectrum: Tensor) -> Tensor:
        """Variances that principal axes leave, in the shape of ``noise``, in units of s².

        Args:
            variances: Of the columns, (D,).
            loadings: (D, q).
            spectrum: Eigenvalues of the covariance of the data, the largest first, (D,).
        """

    def _shape(self, features: int, like: Tensor) -> None:
        """Constants of the prior and weights of the guide, at their defaults, for this many columns."""
        if self.factors >= features:
            raise ValueError(
                f"{self._name} explains columns by fewer factors, but factors is {self.factors} and there are {features} "
                f"columns. Take at most {features - 1}"
                + (f": {self._name}({features - 1}) has any covariance." if features > 1 else " of more columns.")
            )
        self.features = features
        zeros = torch.zeros(features, dtype=like.dtype, device=like.device)
        self.location = self.location if self._has_location else zeros
        self.scale = self.scale if self._has_scale else zeros + 1.0
        noise = zeros.new_zeros(self._noise_shape(features))
        guesses = {
            "loadings": torch.eye(features, self.factors, dtype=like.dtype, device=like.device),
            "loadings_log_scale": zeros.new_full((features, self.factors), math.log(0.1)),
            "location": zeros.clone(),
            "location_log_scale": zeros + math.log(0.1),
            "noise": noise - 1.0,
            "noise_log_scale": noise + math.log(0.1),
        }
        self.guesses = nn.ParameterDict(guesses)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self.location is None and prefix + "location" in state_dict:
            self._shape(len(state_dict[prefix + "location"]), state_dict[prefix + "location"])
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Scales the prior to the data, unless they are given, and starts the guide at principal axes.

        Args:
            x: All the data, (rows, D), floating; NaN where an entry is missing.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If x is not a table of the right width, wider than there are factors, with finite values and at least
                one in every column.
        """
        if x is None:
            return
        check_table(x, self._name, self.features if self._has_features else None)
        check_known(x)
        self._shape(x.shape[1], x)
        self._has_gaps = bool(x.isnan().any())
        location, scale = moments(x)
        self.location = self.location if self._has_location else location
        self.scale = self.scale if self._has_scale else scale
        with torch.no_grad():
            found, size_of = self._principal(x), x.new_tensor(float(len(x))).log()
            self.guesses["loadings"].copy_(found["loadings"] / self._unit[:, None])
            self.guesses["noise"].copy_((found["noise"] / self._units(found["noise"])).log())
            for name in ("loadings_log_scale", "location_log_scale", "noise_log_scale"):
                self.guesses[name].fill_(float(-0.5 * size_of))

    def _rows(self, x: Tensor | None, size: int | None) -> int:
        if self.location is None or self.scale is None:
            if x is None:
                raise ValueError(
                    f"This {self._name} has seen no data: give features=, or location= and scale=, to draw from it."
                )
            self.prepare(x)
        if x is not None:
            if x.shape[-1] != self.features:
                raise ValueError(f"x has {x.shape[-1]} features, but this {self._name} was built for {self.features}.")
            return x.shape[0]
        if size is None:
            raise ValueError(f"{self._name}.model needs data x, or the number of rows to draw, size.")
        return size

    def _is_gappy(self, x: Tensor | None) -> bool:
        if self._has_gaps is None:
            return x is not None and bool(x.isnan().any())
        return self._has_gaps

    def _units(self, noise: Tensor) -> Tensor:
        """s² in the shape of ``noise``; all s are the same where it is one number."""
        return self._unit.square() if noise.dim() else self._unit[0].square()

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        rows, unit = self._rows(x, size), self._unit
        wide = torch.zeros(self.factors, dtype=unit.dtype, device=unit.device)
        variance = dist.InverseGamma(torch.full_like(unit, 1.5), 0.5 * unit.square())
        if not self._noise_shape(len(unit)):
            noise = pyro.sample("noise", dist.InverseGamma(variance.concentration[0], variance.rate[0]))
        with pyro.plate("features", len(unit)):
            location = pyro.sample("location", dist.Normal(self.location, 3.0 * unit))
            loadings = pyro.sample("loadings", dist.Normal(wide, unit[:, None]).to_event(1))
            if self._noise_shape(len(unit)):
                noise = pyro.sample("noise", variance)
        covariance = loadings @ loadings.mT + torch.diag_embed(noise.expand(unit.shape))
        pyro.deterministic("covariance", covariance)
        with pyro.plate("rows", rows):
            if not self.has_latent:
                factor = torch.linalg.cholesky(covariance)
                is_gappy = self._is_gappy(x)
                full = PartialNormal(location, factor) if is_gappy else dist.MultivariateNormal(location, scale_tril=factor)
                return pyro.sample("x", full, obs=x)
            z = pyro.sample("z", dist.Normal(wide, torch.ones_like(wide)).to_event(1))
            entries = dist.Normal(z @ loadings.mT + location, noise.sqrt())
            given = Columns(((range(len(unit)), entries),)) if self._is_gappy(x) else entries.to_event(1)
            return pyro.sample("x", given, obs=x)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Independent normals for W, m and log Ψ; z has its exact conditional given these."""
        rows, unit, guess = self._rows(x, size), self._unit, self.guesses
        middle = guess["noise"] + self._units(guess["noise"]).log()
        variance = dist.LogNormal(middle, guess["noise_log_scale"].exp())
        if not self._noise_shape(len(unit)):
            noise = pyro.sample("noise", variance)
        with pyro.plate("features", len(unit)):
            centre = self.location + unit * guess["location"]
            location = pyro.sample("location", dist.Normal(centre, unit * guess["location_log_scale"].exp()))
            spread = unit[:, None] * guess["loadings_log_scale"].exp()
            loadings = pyro.sample("loadings", dist.Normal(unit[:, None] * guess["loadings"], spread).to_event(1))
            if self._noise_shape(len(unit)):
                noise = pyro.sample("noise", variance)
        if not self.has_latent:
            return
        with pyro.plate("rows", rows):
            if x is None:
                wide = torch.zeros_like(loadings[0])
                pyro.sample("z", dist.Normal(wide, torch.ones_like(wide)).to_event(1))
            else:
                mean, factor = _conditional(x, loadings, location, noise, self._is_gappy(x))
                pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=factor @ factor.mT))

    @torch.no_grad()
    def start(self, x: Tensor, size: int | None = None) -> dict[str, Tensor]:
        """Where a fit may start: near principal axes.

        The likelihood of ``PPCA`` on a complete table is highest at them, and nowhere else. That of ``FactorAnalysis`` may
        have several maxima: it starts a little away from those of the standardised columns, elsewhere at every call. EM
        starts there by itself. Random numbers come from torch's global generator.

        Args:
            x: (rows, D), NaN where an entry is missing.
            size: Not used.

        Returns:
            Site to value, such as ``EM(start=...)`` takes.
        """
        if self.location is None or self.scale is None:
            self.prepare(x)
        found = self._principal(x)
        if self._jitter:
            noise = self._unit.to(x)[:, None] * torch.randn_like(found["loadings"])
            found["loadings"] = found["loadings"] + self._jitter * noise
        return found

    @torch.no_grad()
    def _principal(self, x: Tensor) -> dict[str, Tensor]:
        """Principal axes of the correlated columns, missing entries at their means: site to value."""
        is_known, unit = ~x.isnan(), self._unit.to(x)
        location = torch.where(is_known, x, 0.0).sum(0) / is_known.sum(0)
        standard = torch.where(is_known, (x - location) / unit, 0.0)
        covariance = standard.mT @ standard / len(x)
        values, vectors = torch.linalg.eigh(covariance)
        values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
        least = values[self.factors :].mean()
        loadings = vectors[:, : self.factors] * (values[: self.factors] - least).sqrt()
        noise = self._left(covariance.diagonal(), loadings, values)
        return {
            "location": location, "loadings": unit[:, None] * loadings, "noise": noise * self._units(noise).to(x),
        }  # fmt: skip

    # ------------------------------------------------------------------------------ what draws say
    def _tables(self, draws: Draws, x: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Loadings (D, q), location (D,) and noise (D,) of each draw."""
        table = draws if isinstance(draws, Mapping) else draws.draws
        location = torch.as_tensor(table["location"])
        like = location if x is None else x
        if x is not None and (x.dim() != 2 or x.shape[1] != location.shape[-1]):
            raise ValueError(f"x has shape {tuple(x.shape)}, but these draws are of {location.shape[-1]} features.")
        features = location.shape[-1]
        loadings = torch.as_tensor(table["loadings"]).to(like).reshape(-1, features, self.factors)
        location = location.to(like).reshape(-1, features)
        noise = torch.as_tensor(table["noise"]).to(like).reshape(len(location), -1).expand(-1, features)
        return zip(loadings, location, noise, strict=True)

    @torch.no_grad()
    def aligned(self, draws: Draws) -> dict[str, Tensor]:
        """The draws with W, and z if there is one, rotated so that factors mean the same in all of them.

        The likelihood and the prior do not change when W becomes W R and z becomes Rᵀ z: means and quantiles of W and z
        over draws, or over chains, say nothing, unless each draw has been rotated towards one pivot. This is what comes
        nearest to it by an orthogonal R, reflections among them. The pivot is the common part of the mean of W Wᵀ, along
        its principal axes in units of s, the largest first, the largest entry of each positive.

        Args:
            draws: A Posterior, or site to (…, *site).

        Returns:
            Site to (…, *site); ``covariance``, ``noise`` and ``location`` are what they were.

        References:
            P. Schönemann, A generalized solution of the orthogonal Procrustes problem (1966).
            C. Aßmann, J. Boysen-Hogrefe and M. Pape, Bayesian analysis of static and dynamic factor models: an ex-post
            approach towards the rotation problem (2016).
        """
        table = dict(draws if isinstance(draws, Mapping) else draws.draws)
        loadings = torch.as_tensor(table["loadings"])
        unit = self._unit.to(loadings)[:, None]
        standard = loadings / unit
        flat = standard.reshape(-1, *standard.shape[-2:])
        side_by_side = flat.transpose(0, 1).flatten(1)  # (D, draw · q)
        values, vectors = torch.linalg.eigh(side_by_side @ side_by_side.mT / len(flat))
        pivot = vectors.flip(1)[:, : self.factors] * values.flip(0)[: self.factors].clamp(min=0.0).sqrt()
        largest = pivot.gather(0, pivot.abs().argmax(0, keepdim=True))
        pivot = pivot * torch.where(largest < 0, -1.0, 1.0)
        left, _, right = torch.linalg.svd(standard.mT @ pivot)
        rotation = left @ right
        table["loadings"] = unit * (standard @ rotation)
        if "z" in table:
            table["z"] = torch.as_tensor(table["z"]) @ rotation.to(torch.as_tensor(table["z"]))
        return table

    @torch.no_grad()
    def components(self, draws: Draws) -> Tensor:
        """Principal axes of the posterior mean of W Wᵀ, (q, D): orthonormal rows, the largest first.

        No rotation of W changes them. For ``PPCA`` at its maximum likelihood they are those of principal component analysis.
        """
        side_by_side = torch.cat([loadings for loadings, _, _ in self._tables(draws)], 1)  # of all draws, (D, draw · q)
        vectors = torch.linalg.eigh(side_by_side @ side_by_side.mT).eigenvectors.flip(1)[:, : self.factors]
        largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
        return (vectors * torch.where(largest < 0, -1.0, 1.0)).mT

    @torch.no_grad()
    def explained(self, draws: Draws) -> Tensor:
        """Share of the total variance tr(W Wᵀ + Ψ) along each axis of W Wᵀ, the largest first, at each draw: (draw, q)."""
        shares = []
        for loadings, _, noise in self._tables(draws):
            along = torch.linalg.svdvals(loadings).square()
            shares.append(along / (along.sum() + noise.sum()))
        return torch.stack(shares)

    @torch.no_grad()
    def transform(self, x: Tensor, draws: Draws) -> Scores:
        """Posterior mean and covariance of the factors of each row, over draws that have been ``aligned``.

        Args:
            x: (rows, D), NaN where an entry is missing.
            draws: A Posterior, or site to (…, *site).

        Returns:
            Mean and covariance; what the draws differ in is part of the covariance. A row of which nothing is known has the
            prior's, 0 and I.
        """
        is_gappy, count = bool(x.isnan().any()), 0
        first, second = x.new_zeros(len(x), self.factors), x.new_zeros(len(x), self.factors, self.factors)
        for loadings, location, noise in self._tables(self.aligned(draws), x):
            mean, factor = _conditional(x, loadings, location, noise, is_gappy)
            first, count = first + mean, count + 1
            second = second + torch.cholesky_inverse(factor) + mean.unsqueeze(-1) * mean.unsqueeze(-2)
        mean = first / count
        return Scores(mean, second / count - mean.unsqueeze(-1) * mean.unsqueeze(-2))

    @torch.no_grad()
    def score_samples(self, x: Tensor, draws: Draws) -> Tensor:
        """Log predictive density of what is known of each row: log-mean over the draws of p(x_n | draw), (rows,)."""
        log_densities = torch.stack([_log_density(x, *table) for table in self._tables(draws, x)])
        return log_densities.logsumexp(0) - math.log(len(log_densities))

    @torch.no_grad()
    def impute(self, x: Tensor, draws: Draws) -> Tensor:
        """x with its missing entries at their posterior mean E[x_missing | x_known], (rows, D).

        Args:
            x: (rows, D), NaN where an entry is missing.
            draws: A Posterior, or site to (…, *site).
        """
        means = [
            _conditional(x, loadings, location, noise, True)[0] @ loadings.mT + location
            for loadings, location, noise in self._tables(draws, x)
        ]
        return torch.where(x.isnan(), torch.stack(means).mean(0), x)

    @torch.no_grad()
    def imputations(self, x: Tensor, draws: Draws, size: int) -> Tensor:
        """Draws of the missing entries given the known ones, each at a draw chosen at random: (size, rows, D).

        Quantiles over the first dimension are intervals; as many tables to analyse are multiple imputation. Random numbers
        come from torch's global generator.

        References:
            D. Rubin, Multiple imputation for nonresponse in surveys (1987).
        """
        tables = list(self._tables(draws, x))
        filled = []
        for i in torch.randint(len(tables), (size,)).tolist():
            loadings, location, noise = tables[i]
            mean, factor = _conditional(x, loadings, location, noise, True)
            spread = torch.linalg.solve_triangular(factor.mT, torch.randn_like(mean).unsqueeze(-1), upper=True).squeeze(-1)
            drawn = (mean + spread) @ loadings.mT + location + noise.sqrt() * torch.randn_like(x)
            filled.append(torch.where(x.isnan(), drawn, x))
        return torch.stack(filled)

    @torch.no_grad()
    def sample(self, size: int, draws: Draws) -> Tensor:
        """New rows from the posterior predictive, each from a draw chosen at random; (size, D)."""
        tables = list(self._tables(draws))
        rows = []
        for i in torch.randint(len(tables), (size,)).tolist():
            loadings, location, noise = tables[i]
            z = torch.randn(self.factors, dtype=location.dtype, device=location.device)
            rows.append(loadings @ z + location + noise.sqrt() * torch.randn_like(location))
        return torch.stack(rows)


def _conditional(x: Tensor, loadings: Tensor, location: Tensor, noise: Tensor, is_gappy: bool) -> tuple[Tensor, Tensor]:
    """Mean (rows, q) of z given what is known of x, and a Cholesky factor of its precision, (rows or 1, q, q).

    The precision is I + Σ_d w_d w_dᵀ / ψ_d over the known entries.
    """
    weighted = loadings / noise.expand(location.shape)[:, None]
    eye = torch.eye(loadings.shape[-1], dtype=x.dtype, device=x.device)
    if is_gappy:
        known = (~x.isnan()).to(x.dtype)
        products = (loadings.unsqueeze(-1) * weighted.unsqueeze(-2)).flatten(-2)
        precision = (known @ products).unflatten(-1, eye.shape) + eye
        residual = torch.where(x.isnan(), 0.0, x - location)
    else:
        precision, residual = (loadings.mT @ weighted + eye).unsqueeze(0), x - location
    factor = torch.linalg.cholesky(precision)
    projected = residual @ weighted
    if is_gappy:
        return torch.cholesky_solve(projected.unsqueeze(-1), factor).squeeze(-1), factor
    return torch.cholesky_solve(projected.mT, factor[0]).mT, factor


def _log_density(x: Tensor, loadings: Tensor, location: Tensor, noise: Tensor) -> Tensor:
    """log p of what is known of each row, (rows,): in q dimensions, with the quadratic form as a sum of squares.

    With ẑ the mean of z given x, the quadratic form is Σ_d (x_d − m_d − w_dᵀ ẑ)² / ψ_d + ẑᵀ ẑ.
    """
    is_known = ~x.isnan()
    mean, factor = _conditional(x, loadings, location, noise, not bool(is_known.all()))
    residual = torch.where(is_known, x - location - mean @ loadings.mT, 0.0)
    form = (residual.square() / noise).sum(-1) + mean.square().sum(-1)
    log_det = 2.0 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    known = is_known.to(x.dtype)
    return -0.5 * (form + log_det + known @ (noise.log() + math.log(2.0 * math.pi)))


class PPCA(FactorModel):
    """Probabilistic principal component analysis: all columns have the same noise.

        W_dk ~ N(0, s²),  m_d ~ N(x̄_d, 9 s²),  σ² ~ InverseGamma(3/2, s²/2),
        z_n ~ N(0, I_q),  x_n ~ N(W z_n + m, σ² I)

    with x̄ the means and s² the mean variance of the columns: the prior is proper, works on unscaled data and looks the same
    from all sides, as principal components do. Columns in units that have nothing to do with one another are better
    standardised first, or left to ``FactorAnalysis``. The likelihood has its maximum where W spans the first q principal
    axes and σ² is the mean of the other eigenvalues; ``EM(objective="mle")`` goes there. PPCA(D − 1) has any covariance, and
    its maximum is the covariance of the data. With q + 1 rows or fewer the likelihood has no upper bound; the posterior has.

    W is known up to a rotation only. ``covariance`` = W Wᵀ + σ² I is what data speak of: compare posteriors by it, or see
    ``aligned``. Entries of x that are NaN are not observed: given z the entries of a row are independent, so that they are
    left out. (That is right if what is missing does not depend on its value, given the rest.)

    Sites: ``noise`` σ² (), ``location`` (D,), ``loadings`` (D, q), ``covariance`` (D, D), ``z`` (rows, q) if ``latent``,
    ``x`` (rows, D). Plates: ``features``, ``rows``.

    Args:
        factors: Number of factors q, at least 1 and fewer than there are columns.
        features: Number of columns D; None takes it from the first data seen.
        location: x̄, (D,); None takes the mean of the data of each fit.
        scale: Standard deviations of the columns, (D,), positive; None takes those of the data of each fit (a constant
            column counts as 1).
        latent: Whether z is a site; else it is integrated out.

    References:
        M. Tipping and C. Bishop, Probabilistic principal component analysis (1999).
        S. Roweis, EM algorithms for PCA and SPCA (1997).

    Example:
        >>> import torch
        >>> from inference import EM
        >>> x = torch.tensor([[0.0, 0.1, 0.0], [1.0, 0.9, 0.1], [2.0, 2.1, 0.0], [3.0, 2.9, 0.1]])
        >>> model = PPCA(1)
        >>> posterior = EM(objective="mle", seed=0, progress=False).fit(model, x)
        >>> print([round(abs(float(entry)), 2) for entry in model.components(posterior)[0]])
        [0.72, 0.69, 0.01]
    """

    @property
    def _unit(self) -> Tensor:
        unit: Tensor = self.scale.square().mean().sqrt().expand(self.scale.shape)
        return unit

    @property
    def _jitter(self) -> float:
        return 0.0

    def _noise_shape(self, features: int) -> tuple[int, ...]:
        return ()

    def _left(self, variances: Tensor, loadings: Tensor, spectrum: Tensor) -> Tensor:
        left = spectrum[self.factors :].mean()
        floor = _LEAST_NOISE * spectrum.mean().clamp(min=_LEAST_NOISE)
        return torch.where(left > 1e-10 * spectrum[0], left, floor)


class FactorAnalysis(FactorModel):
    """Factor analysis: each column has noise of its own.

        W_dk ~ N(0, s_d²),  m_d ~ N(x̄_d, 9 s_d²),  ψ_d ~ InverseGamma(3/2, s_d²/2),
        z_n ~ N(0, I_q),  x_n ~ N(W z_n + m, diag ψ)

    with x̄_d and s_d the mean and standard deviation of a column: the prior is proper, does not mind units, and keeps ψ_d
    from zero, where the likelihood often is highest (a Heywood case) and ``EM(objective="mle")``, which leaves the prior
    out, creeps towards it.

    W is known up to a rotation only. ``covariance`` = W Wᵀ + diag ψ is what data speak of: compare posteriors by it, or see
    ``aligned``. It has room for all covariances, and ψ is not known either, if (D − q)² < D + q. Entries of x that are NaN
    are not observed: given z the entries of a row are independent, so that they are left out. (That is right if what is
    missing does not depend on its value, given the rest.)

    Sites: ``location`` (D,), ``loadings`` (D, q), ``noise`` ψ (D,), ``covariance`` (D, D), ``z`` (rows, q) if ``latent``,
    ``x`` (rows, D). Plates: ``features``, ``rows``.

    Args:
        factors: Number of factors q, at least 1 and fewer than there are columns.
        features: Number of columns D; None takes it from the first data seen.
        location: x̄, (D,); None takes the mean of the data of each fit.
        scale: s, (D,), positive; None takes the standard deviations of the data of each fit (a constant column counts as 1).
        latent: Whether z is a site; else it is integrated out.

    References:
        D. Rubin and D. Thayer, EM algorithms for ML factor analysis (1982).
        J. Martin and R. McDonald, Bayesian estimation in unrestricted factor analysis: a treatment for Heywood cases (1975).
    """

    @property
    def _unit(self) -> Tensor:
        unit: Tensor = self.scale
        return unit

    @property
    def _jitter(self) -> float:
        return _JITTER

    def _noise_shape(self, features: int) -> tuple[int, ...]:
        return (features,)

    def _left(self, variances: Tensor, loadings: Tensor, spectrum: Tensor) -> Tensor:
        return torch.maximum(variances - loadings.square().sum(-1), _LEAST_NOISE * variances.clamp(min=_LEAST_NOISE))
