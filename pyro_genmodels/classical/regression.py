"""Regressions: a response that is linear in the columns, or whose log-odds are."""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping
from typing import Any, final

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.contract import Fitted
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.classical.tables import check_table, moments

__all__ = ["LinearModel", "LinearRegression", "LogisticRegression", "SoftmaxRegression"]


class LinearModel(GenerativeModel):
    """What the linear models share: standardised columns, an intercept, normal coefficients.

        τ² ~ InverseGamma(1, 1) unless given,  β_j ~ N(0, τ²),  β_0 ~ N(0, intercept_scale²)

    The last coefficient is the intercept. Coefficients are those of the standardised columns (x − m) / s.

    Args:
        scale: τ, prior standard deviation of the coefficients; None: unknown, with the site ``prior_variance``.
        intercept: Whether there is an intercept.
        standardise: Whether ``prepare`` centres and scales the columns (one of a single value is only centred).
        intercept_scale: Prior standard deviation of the intercept.
    """

    def __init__(
        self,
        scale: float | None = 1.0,
        intercept: bool = True,
        standardise: bool = True,
        intercept_scale: float = 10.0,
    ) -> None:
        super().__init__()
        for name, value in (("scale", scale), ("intercept_scale", intercept_scale)):
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"{name} is {value}, but must be positive and finite.")
        self.prior_scale, self.has_intercept = scale, intercept
        self.is_standardised, self.intercept_scale = standardise, intercept_scale
        self.location: Any
        self.scale: Any
        self.register_buffer("location", None)
        self.register_buffer("scale", None)

    @final
    def prepare(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the scale of the columns, and at whether the responses are what they must be.

        Args:
            x: All the data, (rows, D), floating and finite.
            y: Responses, (rows,).
            size: Not used.

        Raises:
            ValueError: If x is no finite table, or y is not what this model is about.
        """
        if x is None:
            return
        check_table(x, type(self).__name__, is_whole=True)
        location, scale = moments(x)
        self.location = location if self.is_standardised else torch.zeros_like(location)
        self.scale = scale if self.is_standardised else torch.ones_like(scale)
        if y is not None:
            if y.shape != x.shape[:1]:
                raise ValueError(f"y has shape {tuple(y.shape)}, but x has {x.shape[0]} rows.")
            self._check_responses(y)
        self._adapt(x, y)

    @abc.abstractmethod
    def _check_responses(self, y: Tensor) -> None:
        """Raises ValueError if they are not what this model is about."""

    def _adapt(self, x: Tensor, y: Tensor | None) -> None:
        """What else is scaled to the data."""

    def _known(self, x: Tensor | None, y: Tensor | None = None) -> Tensor:
        """The table, of the right width."""
        name = type(self).__name__
        if x is None:
            raise ValueError(f"{name} says how y follows from x, not where x comes from: model needs x.")
        if self.location is None:
            self.prepare(x, y)
        if x.shape[-1] != len(self.location):
            raise ValueError(f"x has {x.shape[-1]} features, but this {name} was built for {len(self.location)}.")
        return x

    def features(self, x: Tensor) -> Tensor:
        """What the coefficients belong to, (rows, D): the standardised columns."""
        return (x - self.location) / self.scale

    @final
    def design(self, x: Tensor) -> Tensor:
        """The features, and a column of ones if there is an intercept, (rows, D + 1)."""
        features = self.features(x)
        if not self.has_intercept:
            return features
        return torch.cat([features, features.new_ones(len(features), 1)], -1)

    def _scales(self, features: int) -> Tensor:
        """Prior standard deviations of the coefficients, (D + 1,)."""
        if self.prior_scale is None:
            one = self.location.new_ones(())
            scale = pyro.sample("prior_variance", dist.InverseGamma(one, one)).sqrt()
        else:
            scale = self.location.new_tensor(self.prior_scale)
        scales = scale.expand(features)
        if not self.has_intercept:
            return scales
        return torch.cat([scales, self.location.new_tensor([self.intercept_scale])])

    @torch.no_grad()
    def linear(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """The linear predictor of each row at each draw.

        Args:
            x: (rows, D).
            draws: A Posterior, or site to (…, *site).

        Returns:
            (draw, rows).
        """
        check_table(x, type(self).__name__, is_whole=True)
        design = self.design(self._known(x))
        coefficients = _flat(draws, "coefficients", 1).to(x)
        return coefficients @ design.mT


def _flat(draws: Fitted | Mapping[str, Tensor], site: str, dims: int) -> Tensor:
    """Draws of a site of so many dimensions, (draw, *site)."""
    table = draws if isinstance(draws, Mapping) else draws.draws
    value = torch.as_tensor(table[site])
    return value.reshape(-1, *value.shape[value.dim() - dims :])


def _check_labels(y: Tensor, classes: int) -> None:
    if y.is_floating_point() and not bool((y == y.floor()).all()):
        raise ValueError("y is no label: its values are not whole numbers.")
    if bool(((y < 0) | (y >= classes)).any()):
        raise ValueError(f"y has labels from {float(y.min()):g} to {float(y.max()):g}, but must be 0 to {classes - 1}.")


def _sums_to_zero(classes: int) -> Tensor:
    """Orthonormal columns that sum to zero, (K, K − 1): Helmert's contrasts."""
    below = torch.ones(classes, classes - 1, dtype=torch.float64).triu() - torch.arange(1.0, classes).diag_embed(-1)[:, :-1]
    return below / below.norm(dim=0)


class LinearRegression(LinearModel):
    """Linear regression with the conjugate prior.

        σ² ~ InverseGamma(a, b),  β_j ~ N(0, σ² τ²),  y_n ~ N(l + c (z_nᵀ β), c² σ²)

    with z the standardised columns and a one, and l and c mean and standard deviation of y (0 and 1 unless
    ``standardise``). The posterior is a formula while τ is known: β is Student, and its mode that of ridge regression with
    ``alpha = 1 / τ²``.

    Sites: ``variance`` (), ``prior_variance`` () if ``scale`` is None, ``coefficients`` (D + 1,), ``y`` (rows,). Plate ``rows``.

    Args:
        scale: τ; None: unknown, τ² ~ InverseGamma(1, 1).
        intercept: Whether there is an intercept.
        standardise: Whether ``prepare`` centres and scales columns and responses.
        intercept_scale: Prior standard deviation of the intercept, in units of the noise.
        noise: a and b.

    References:
        C. Bishop, Pattern Recognition and Machine Learning (2006), section 3.3.

    Example:
        >>> from inference import EM
        >>> x = torch.linspace(-1.0, 1.0, 20, dtype=torch.float64)[:, None]
        >>> model = LinearRegression()
        >>> round(float(model.predict(x[:1], EM(progress=False).fit(model, x, 3.0 * x[:, 0]))), 1)
        -2.9
    """  # noqa: E501

    def __init__(
        self,
        scale: float | None = 1.0,
        intercept: bool = True,
        standardise: bool = True,
        intercept_scale: float = 1000.0,
        noise: tuple[float, float] = (1.0, 0.01),
    ) -> None:
        super().__init__(scale, intercept, standardise, intercept_scale)
        if not min(noise) > 0.0:
            raise ValueError(f"noise is {noise}, but both numbers must be positive.")
        self.noise = noise
        self.y_location: Any
        self.y_scale: Any
        self.register_buffer("y_location", None)
        self.register_buffer("y_scale", None)

    def _check_responses(self, y: Tensor) -> None:
        if not y.is_floating_point():
            raise ValueError(f"y holds {str(y.dtype).removeprefix('torch.')}, but must be floating: pass y.double().")
        bad = (~y.isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"y holds {len(bad)} values that are NaN or infinite, the first in row {int(bad[0, 0])}.")

    def _adapt(self, x: Tensor, y: Tensor | None) -> None:
        zero = self.location.new_zeros(())
        self.y_location, self.y_scale = zero, zero + 1.0
        if y is not None and self.is_standardised:
            deviation = y.std(correction=0)
            self.y_location = y.mean()
            self.y_scale = torch.where(deviation > 0, deviation, torch.ones_like(deviation))

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> Tensor:
        design = self.design(self._known(x, y))
        a, b = (self.location.new_tensor(number) for number in self.noise)
        variance = pyro.sample("variance", dist.InverseGamma(a, b))
        scales = self._scales(design.shape[1] - self.has_intercept) * variance.sqrt()
        coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros_like(scales), scales).to_event(1))
        mean = self.y_location + self.y_scale * (design @ coefficients)
        with pyro.plate("rows", len(design)):
            return pyro.sample("y", dist.Normal(mean, self.y_scale * variance.sqrt()), obs=y)

    def predict(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Posterior mean of the response of each row, (rows,)."""
        return self.y_location + self.y_scale * self.linear(x, draws).mean(0)

    @torch.no_grad()
    def sample(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """New responses, one for each draw and row: the posterior predictive distribution, (draw, rows)."""
        mean = self.y_location + self.y_scale * self.linear(x, draws)
        return mean + self._noise(draws) * torch.randn_like(mean)

    @torch.no_grad()
    def score_samples(self, x: Tensor, y: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Log posterior predictive density of each response: log-mean over the draws, (rows,)."""
        mean = self.y_location + self.y_scale * self.linear(x, draws)
        log_densities = dist.Normal(mean, self._noise(draws)).log_prob(y)
        return log_densities.logsumexp(0) - math.log(len(log_densities))

    def score(self, x: Tensor, y: Tensor, draws: Fitted | Mapping[str, Tensor]) -> float:
        """Share of the variance of y that is predicted, R²."""
        y = y.to(x)
        rest = (y - self.predict(x, draws)).square().sum()
        return float(1.0 - rest / (y - y.mean()).square().sum())

    def line(self, draws: Fitted | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Coefficients (draw, D) and intercept (draw,) in the units of the data."""
        coefficients = _flat(draws, "coefficients", 1).to(self.scale)
        slopes = self.y_scale * coefficients[:, : len(self.scale)] / self.scale
        level = self.y_scale * coefficients[:, -1] if self.has_intercept else 0.0
        return slopes, self.y_location + level - slopes @ self.location

    def _noise(self, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Standard deviations of the noise, (draw, 1)."""
        return self.y_scale * _flat(draws, "variance", 0).to(self.scale).sqrt().unsqueeze(-1)


class LogisticRegression(LinearModel):
    """Logistic regression.

        β_j ~ N(0, τ²),  β_0 ~ N(0, intercept_scale²),  y_n ~ Bernoulli(logit⁻¹(z_nᵀ β))

    with z the standardised columns and a one. Its mode is that of scikit-learn with ``C = τ²``, but for the intercept, which
    is not penalised there. ``Gibbs`` draws the coefficients with Pólya-Gamma variables, exactly, by itself.

    Sites: ``prior_variance`` () if ``scale`` is None, ``coefficients`` (D + 1,), ``y`` (rows,). Plate ``rows``.

    Args:
        scale: τ; None: unknown, τ² ~ InverseGamma(1, 1).
        intercept: Whether there is an intercept.
        standardise: Whether ``prepare`` centres and scales the columns.
        intercept_scale: Prior standard deviation of the intercept.

    References:
        N. Polson, J. Scott and J. Windle, Bayesian inference for logistic models using Pólya-Gamma latent variables (2013).
    """

    def _check_responses(self, y: Tensor) -> None:
        _check_labels(y, 2)

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> Tensor:
        design = self.design(self._known(x, y))
        scales = self._scales(design.shape[1] - self.has_intercept)
        coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros_like(scales), scales).to_event(1))
        with pyro.plate("rows", len(design)):
            seen = None if y is None else y.to(design.dtype)
            return pyro.sample("y", dist.Bernoulli(logits=design @ coefficients), obs=seen)

    def predict_proba(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Probability of each class for each row, averaged over draws, (rows, 2)."""
        second = self.linear(x, draws).sigmoid().mean(0)
        return torch.stack([1.0 - second, second], -1)

    def predict(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Most probable class of each row, (rows,)."""
        return self.predict_proba(x, draws).argmax(-1)

    def score(self, x: Tensor, y: Tensor, draws: Fitted | Mapping[str, Tensor]) -> float:
        """Share of the rows whose class is predicted."""
        return float((self.predict(x, draws) == y).double().mean())


class SoftmaxRegression(LinearModel):
    """Softmax regression: K classes, each with coefficients of its own, which sum to zero.

        α_j ~ N(0, τ²) in K − 1 dimensions,  β = Q α,  y_n ~ Categorical(softmax_k(z_nᵀ β_k))

    with z the standardised columns and a one, and Q (K, K − 1) an orthonormal basis of what sums to zero over classes: what
    is added to all classes changes no probability. All classes are alike, β_kj has the variance (1 − 1 / K) τ², and the mode
    is that of scikit-learn with ``C = τ²``, whose coefficients sum to zero, too.

    Sites: ``prior_variance`` () if ``scale`` is None, ``contrasts`` α (K − 1, D + 1), ``y`` (rows,); computed
    ``coefficients`` β (K, D + 1). Plate ``rows``.

    Args:
        classes: Number of classes K, at least 2.
        scale: τ; None: unknown, τ² ~ InverseGamma(1, 1).
        intercept: Whether there is an intercept.
        standardise: Whether ``prepare`` centres and scales the columns.
        intercept_scale: Prior standard deviation of the contrasts of the intercepts.

    References:
        C. Bishop, Pattern Recognition and Machine Learning (2006), section 4.3.4.
    """

    def __init__(
        self,
        classes: int,
        scale: float | None = 1.0,
        intercept: bool = True,
        standardise: bool = True,
        intercept_scale: float = 10.0,
    ) -> None:
        super().__init__(scale, intercept, standardise, intercept_scale)
        if classes < 2:
            raise ValueError(
                f"SoftmaxRegression needs at least 2 classes, but classes is {classes}: there is nothing to learn."
            )
        self.classes = classes
        self.basis: Tensor
        self.register_buffer("basis", _sums_to_zero(classes))

    def _check_responses(self, y: Tensor) -> None:
        if y.is_floating_point():
            raise ValueError("y is floating, but labels are integers: pass y.long().")
        _check_labels(y, self.classes)

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> Tensor:
        design = self.design(self._known(x, y))
        scales = self._scales(design.shape[1] - self.has_intercept).expand(self.classes - 1, -1)
        contrasts = pyro.sample("contrasts", dist.Normal(torch.zeros_like(scales), scales).to_event(2))
        coefficients = pyro.deterministic("coefficients", self.basis.to(design.dtype) @ contrasts, event_dim=2)
        with pyro.plate("rows", len(design)):
            return pyro.sample("y", dist.Categorical(logits=design @ coefficients.mT), obs=y)

    @torch.no_grad()
    def linear(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """The linear predictor of each row and class at each draw, (draw, rows, K)."""
        check_table(x, type(self).__name__, is_whole=True)
        coefficients = self.basis.to(x) @ _flat(draws, "contrasts", 2).to(x)
        return self.design(self._known(x)) @ coefficients.mT

    def predict_proba(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Probability of each class for each row, averaged over draws, (rows, K)."""
        return self.linear(x, draws).softmax(-1).mean(0)

    def predict(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Most probable class of each row, (rows,)."""
        return self.predict_proba(x, draws).argmax(-1)

    def score(self, x: Tensor, y: Tensor, draws: Fitted | Mapping[str, Tensor]) -> float:
        """Share of the rows whose class is predicted."""
        return float((self.predict(x, draws) == y).double().mean())
