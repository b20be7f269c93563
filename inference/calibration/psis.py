"""Pareto-smoothed importance weights: of an approximation towards its target, or of a sampler towards leave-one-out.

References:
    A. Vehtari et al., Pareto smoothed importance sampling (2024).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from inference import arviz
from inference.arrays import as_numpy
from inference.calibration.result import Result, canvas
from inference.contract import Unsupported
from inference.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PSIS", "psis"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PSIS(Result):
    """Pareto-smoothed importance weights.

    Of a guide (draws of q with their densities): one set of weights p(θ, y) / q(θ), whose average is the evidence. Of a
    sampler: leave-one-out, one set of weights 1 / p(y_i | θ) for each observation i.

    Attributes:
        estimand: "log evidence", or "elpd": the expected log pointwise predictive density.
        pareto_k: k-hat, the shape of the tail of the weights, () or (observation,): below 0.7 averages can be relied on;
            minus infinity where the largest weights are equal.
        log_weights: Smoothed, on the scale of the raw ones, (draw,) or (observation, draw).
        raw: As they were.
        ess: Effective sample size of the weights, () or (observation,); of draws of a Markov chain, as if independent.
        estimate: Of the estimand.
        se: Its standard error. That of the evidence comes from the weights, and is worth nothing if k-hat is above 0.7.
        model: Name of the program.
        backend: Name of the back-end.
    """

    estimand: str
    pareto_k: np.ndarray
    log_weights: np.ndarray
    raw: np.ndarray
    ess: np.ndarray
    estimate: float
    se: float
    model: str
    backend: str

    @property
    def passed(self) -> bool:
        """Whether k-hat is nowhere above 0.7."""
        return bool((self.pareto_k <= arviz.LARGEST_K).all())

    def to_arviz(self) -> Any:
        """Group ``psis``: "log_weights" (1, draw, *observation); ``psis_diagnostic``: "pareto_k" (1, 1, *observation)."""
        weights = np.moveaxis(self.log_weights, -1, 0)[None]
        dims = {} if self.pareto_k.ndim == 0 else {"log_weights": ["observation"], "pareto_k": ["observation"]}
        attrs = {"model": self.model, "backend": self.backend, "estimand": self.estimand, "estimate": self.estimate}
        # a group has one number of draws
        groups = {"psis": {"log_weights": weights}, "psis_diagnostic": {"pareto_k": self.pareto_k[None, None]}}
        return arviz.export(groups, dims=dims, attrs={**attrs, "se": self.se})

    def plot(self) -> Figure:
        """Of a guide: the largest weights by rank, raw and smoothed. Leave-one-out: k-hat of each observation."""
        figure, axes = canvas(self.title)
        if self.pareto_k.ndim:
            axes.plot(np.arange(len(self.pareto_k)), self.pareto_k, ".")
            axes.axhline(arviz.LARGEST_K, color="0.6", lw=0.8)
            axes.set(xlabel="observation", ylabel="k-hat")
            return figure
        rank = np.arange(1, self.raw.size + 1)
        top = self.raw.max()
        for label, values, style in (("raw", self.raw, "."), ("smoothed", self.log_weights, "-")):
            axes.loglog(rank, np.exp(np.sort(values)[::-1] - top), style, label=label)
        axes.set(xlabel="rank", ylabel="weight, by the largest")
        axes.legend(fontsize="small")
        return figure

    @property
    def title(self) -> str:
        up_to = "up to " if self.pareto_k.ndim else ""
        return f"PSIS of {self.backend} on {self.model}: k-hat {up_to}{self.pareto_k.max():.2f}"

    def __str__(self) -> str:
        verdict = "reliable" if self.passed else "not reliable, since k-hat is above 0.7"
        size = f"{float(self.ess.min()):.0f} of {self.log_weights.shape[-1]} draws"
        lines = [
            f"{self.title}, ESS {'at least ' if self.ess.ndim else ''}{size}.",
            f"{self.estimand} {self.estimate:.4g} ± {self.se:.2g} ({verdict})",
        ]
        bad = int((self.pareto_k > arviz.LARGEST_K).sum())
        if self.pareto_k.ndim and bad:
            lines.append(f"{bad} of {self.pareto_k.size} observations have a k-hat above 0.7: refit without them.")
        return "\n".join(lines)


def psis(posterior: Posterior) -> PSIS:
    """Pareto-smoothed importance sampling, of an approximation towards its target or of a sampler towards leave-one-out.

    Args:
        posterior: Of a back-end whose draws have densities ("lp" and "log_q" among its stats, as SVI has, or "log_weight" of
            its proposals, as ``MetropolisHastings(proposal=Independence(...))`` has), or of a sampler with observed sites.

    Raises:
        ValueError: If the weights are not finite.
        Unsupported: If there is neither: a point estimate.
    """
    names = {"model": str(posterior.info.get("model", "")), "backend": str(posterior.info.get("backend", ""))}
    if "log_q" in posterior.stats and "lp" in posterior.stats:
        weights = posterior.stats.get("log_weight", posterior.stats["lp"] - posterior.stats["log_q"])  # of the proposals
        return _evidence(weights.double().flatten().numpy(), names)
    if posterior.info.get("kind", "samples") != "samples":
        raise Unsupported(
            f"{names['backend']} gives no draws with a density. psis needs SVI, or a sampler for leave-one-out."
        )
    return _leave_one_out(posterior, names)


def _evidence(raw: np.ndarray, names: dict[str, str]) -> PSIS:
    """Of log weights (draw,), whose average is the evidence."""
    from scipy.special import logsumexp

    if np.isnan(raw).any() or np.isposinf(raw).any() or not np.isfinite(raw).any():
        raise ValueError("Some importance weights are NaN or infinite: the guide has no usable density.")
    log_weights = arviz.smoothed(raw)
    total = logsumexp(log_weights)
    squares = float(np.exp(logsumexp(2.0 * (log_weights - total))))
    return PSIS(
        estimand="log evidence",
        pareto_k=np.asarray(arviz.pareto_k(raw)),
        log_weights=log_weights,
        raw=raw,
        ess=np.asarray(1.0 / squares),
        estimate=float(total - math.log(raw.size)),
        se=math.sqrt(max(0.0, squares - 1.0 / raw.size)),
        **names,
    )


def _leave_one_out(posterior: Posterior, names: dict[str, str]) -> PSIS:
    """Of each observation, the weights that take it out of the posterior."""
    from scipy.special import logsumexp

    terms = [as_numpy(value.double().reshape(*value.shape[:2], -1)) for value in posterior.log_likelihood().values()]
    if not terms:
        raise Unsupported("Leave-one-out needs observed sites, but the program has none.")
    pointwise = np.concatenate(terms, 2)  # (chain, draw, observation)
    draws = {name: as_numpy(value) for name, value in posterior.draws.items()}
    found = arviz.loo(pointwise, draws)
    raw = -pointwise.reshape(-1, pointwise.shape[2]).T
    efficiency = arviz.efficiency(draws)
    log_weights = np.stack([arviz.smoothed(row, efficiency) for row in raw])
    normalised = log_weights - logsumexp(log_weights, 1, keepdims=True)
    return PSIS(
        estimand="elpd",
        pareto_k=found.pareto_k.ravel(),
        log_weights=log_weights,
        raw=raw,
        ess=np.exp(-logsumexp(2.0 * normalised, 1)),
        estimate=found.elpd,
        se=found.se,
        **names,
    )
