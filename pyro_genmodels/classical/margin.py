"""Margin classifiers: the support vector machine as a program with a posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from inference.contract import Fitted
from pyro_genmodels.classical.regression import LinearModel, _check_labels

__all__ = ["MarginClassifier"]

KERNELS = ("linear", "rbf")
_NEGLIGIBLE = 1e-10  # of the largest eigenvalue of a kernel matrix: below it rounding is all there is


class MarginClassifier(LinearModel):
    """Support vector machine: the hinge loss as a pseudo-likelihood.

        w_j ~ N(0, 1),  w_0 ~ N(0, intercept_scale²),  f(x) = φ(x)ᵀ w + w_0,
        p(y | f) ∝ exp(−C max(1 − s f, 0)),    s = 2 y − 1

    so that the mode is the machine of Cortes and Vapnik (its intercept is not penalised: ``intercept_scale`` is wide). With
    u = C (1 − s f) / 2 the hinge is exp(−2 max(u, 0)) = exp(−u) exp(−|u|), and Laplace's density a mixture of normals,

        λ_n ~ Exponential(½),  0 ~ N(u_n, λ_n),  factor exp(−u_n),

    given which w is normal, and 1 / λ_n inverse Gaussian given w: ``Gibbs`` draws both exactly, and ``EM`` averages λ exactly, which
    reweights least squares by 1 / |u_n| and has no trouble with the kink. The pseudo-likelihood is not normalised over y: the
    posterior is about f, new labels are not drawn from it.

    φ is x itself, or for a kernel k, with K = U Λ Uᵀ the matrix of the data, k(x, ·) U Λ^(−½): f is a Gaussian process in the
    span of the kernel, and ‖w‖ its norm.

    Sites: ``coefficients`` (features + 1,), the last one w_0; ``mixing`` λ (rows,) if ``latent``; ``margin`` (rows,). Plate
    ``rows``.

    Args:
        cost: C, positive.
        kernel: "linear", or "rbf": exp(−γ ‖x − x′‖²).
        gamma: γ; None: one by the number of features times their mean variance, scikit-learn's "scale".
        latent: Whether λ is a site; else it is summed out and 0 is Laplace(u_n, 1), which suits ``SVI``, ``HMC`` and
            ``MetropolisHastings`` better.
        intercept: Whether there is an intercept.
        standardise: Whether ``prepare`` centres and scales the columns.
        intercept_scale: Prior standard deviation of the intercept.

    References:
        N. Polson and S. Scott, Data augmentation for support vector machines (2011).
        P. Sollich, Bayesian methods for support vector machines: evidence and predictive class probabilities (2002).
    """  # noqa: E501

    def __init__(
        self,
        cost: float = 1.0,
        kernel: str = "linear",
        gamma: float | None = None,
        latent: bool = True,
        intercept: bool = True,
        standardise: bool = True,
        intercept_scale: float = 100.0,
    ) -> None:
        super().__init__(1.0, intercept, standardise, intercept_scale)
        if not cost > 0.0:
            raise ValueError(f"cost is {cost}, but must be positive.")
        if kernel not in KERNELS:
            raise ValueError(f"kernel is '{kernel}', but must be one of {', '.join(KERNELS)}.")
        if gamma is not None and not gamma > 0.0:
            raise ValueError(f"gamma is {gamma}, but must be positive.")
        self.cost, self.kernel, self.gamma, self.has_latent = cost, kernel, gamma, latent
        self.landmarks: Any
        self.projection: Any
        self.rate: Any
        for name in ("landmarks", "projection", "rate"):
            self.register_buffer(name, None)

    def _check_responses(self, y: Tensor) -> None:
        _check_labels(y, 2)

    def _adapt(self, x: Tensor, y: Tensor | None) -> None:
        if self.kernel == "linear":
            return
        self.landmarks = super().features(x)
        variance = self.landmarks.var(correction=0)
        rate = 1.0 / (x.shape[1] * torch.where(variance > 0, variance, 1.0)) if self.gamma is None else self.gamma
        self.rate = torch.as_tensor(rate, dtype=x.dtype, device=x.device)
        values, vectors = torch.linalg.eigh(self._kernel(self.landmarks).double())
        is_kept = values > _NEGLIGIBLE * values[-1]
        self.projection = (vectors[:, is_kept] * values[is_kept].rsqrt()).to(x.dtype)

    def _kernel(self, z: Tensor) -> Tensor:
        """k(z, landmark), (rows, landmarks)."""
        squares = z.square().sum(-1, keepdim=True) + self.landmarks.square().sum(-1) - 2.0 * z @ self.landmarks.mT
        return (-self.rate * squares.clamp(min=0.0)).exp()

    def features(self, x: Tensor) -> Tensor:
        """φ(x), (rows, features)."""
        standard = super().features(x)
        return standard if self.kernel == "linear" else self._kernel(standard) @ self.projection

    def model(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> Tensor:
        design = self.design(self._known(x, y))
        if y is None:
            raise ValueError(
                "MarginClassifier.model needs labels y: the hinge is no distribution that they could be drawn from."
            )
        scales = self._scales(design.shape[1] - self.has_intercept)
        coefficients = pyro.sample("coefficients", dist.Normal(torch.zeros_like(scales), scales).to_event(1))
        decision = design @ coefficients
        slack = 0.5 * self.cost * (1.0 - (2.0 * y.to(design.dtype) - 1.0) * decision)
        with pyro.plate("rows", len(design)):
            if self.has_latent:
                mixing = pyro.sample("mixing", dist.Exponential(torch.full_like(slack, 0.5)))
                margin = dist.Normal(slack, mixing.sqrt())
            else:
                margin = dist.Laplace(slack, torch.ones_like(slack))
            pyro.sample("margin", margin, obs=torch.zeros_like(slack))
            pyro.factor("slope", -slack)
        return decision

    def decision_function(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Posterior mean of f at each row, (rows,); ``linear`` gives f at each draw."""
        return self.linear(x, draws).mean(0)

    def predict(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """The side of the boundary on which each row lies on average, 0 or 1, (rows,)."""
        return (self.decision_function(x, draws) > 0).long()

    def predict_proba(self, x: Tensor, draws: Fitted | Mapping[str, Tensor]) -> Tensor:
        """Pseudo-likelihoods of both classes, normalised and averaged over draws (Sollich 2002), (rows, 2).

        A score between 0 and 1 that is surer the more draws agree; no model of how labels came about stands behind it.
        """
        decision = self.linear(x, draws)
        hinges = torch.stack([1.0 + decision, 1.0 - decision], -1).clamp(min=0.0)
        return (-self.cost * hinges).softmax(-1).mean(0)

    def score(self, x: Tensor, y: Tensor, draws: Fitted | Mapping[str, Tensor]) -> float:
        """Share of the rows whose class is predicted."""
        return float((self.predict(x, draws) == y).double().mean())
