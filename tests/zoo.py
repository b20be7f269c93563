"""The table of instances: small programs with data, the plan that Gibbs finds, and the posterior known by other means.

A law is a test over the table; an instance is a row of it. A reference is a formula beside the program (conjugate updating,
enumeration of all assignments, quadrature of one to three dimensions) or, where there is none, a long run of Pyro's NUTS
that ``make_references.py`` stored. Run as a script, this module prints the table of the README.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from exact import Moments
from inference import Posterior
from programs import chains, classes, curved, hierarchies, labels, models, plates, processes, regressions, scalars, vectors
from programs.scalars import Guide
from pyro_genmodels import (
    GMM,
    HMM,
    LDA,
    PPCA,
    FactorAnalysis,
    LinearRegression,
    LogisticRegression,
    MarginClassifier,
    Mixture,
    NaiveBayes,
    SoftmaxRegression,
)

__all__ = ["BY_NAME", "ZOO", "Instance", "markdown"]


@dataclass(frozen=True)
class Instance:
    """A program with its data.

    Attributes:
        program: A plain Pyro program, or a model.
        data: Its arguments, on the CPU.
        plan: Site to the update that Gibbs should choose.
        solution: Returns the moments of the posterior, name to ``Moments``; None if nothing is known of them.
        peak: Returns where the constrained density, with its finite sites and those local to an observed plate averaged
            out, is largest; site to value. None if there is no formula.
        guide: Class of guides whose family contains the posterior, Pyro's automatic ones among them; None if there is none.
        maximise: What EM should maximise, where its own choice leaves nothing; None leaves it to EM.
        quantities: Draws, name to (chain, draw, *site), to the functions of them that ``solution`` knows; None where
            these are the sites themselves. Where labels are exchangeable, functions that do not depend on them.
        refused: Back-end that cannot run it to words of the sentence that says so.
        slow: Back-ends that take longer than a default run has time for.
        stepped: Whether EM takes steps that the model brings, which approximate the posterior means and climb nothing.
        rough: Whether EM averages by drawing, so that its point moves about the mode.
        scattered: Whether the posterior has modes that are apart, besides those of renaming; a guide takes one of them.
        title: Name of the instance; None: that of the program.
    """

    program: Callable[..., Any]
    data: tuple[Tensor, ...]
    plan: dict[str, str]
    solution: Callable[[], dict[str, Moments]] | None = None
    peak: Callable[[], dict[str, Any]] | None = None
    guide: type[Guide] | type[AutoGuide] | None = None
    maximise: tuple[str, ...] | None = None
    quantities: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    rough: bool = False
    stepped: bool = False
    scattered: bool = False
    title: str | None = None

    @property
    def name(self) -> str:
        return self.title or self.program.__name__

    @cached_property
    def moments(self) -> dict[str, Moments]:
        assert self.solution is not None
        return {name: Moments(*(np.asarray(part, float) for part in both)) for name, both in self.solution().items()}

    @cached_property
    def mode(self) -> dict[str, np.ndarray]:
        assert self.peak is not None
        return {site: np.asarray(value, float) for site, value in self.peak().items()}

    def known(self, posterior: Posterior) -> dict[str, np.ndarray]:
        """Draws of what ``solution`` knows, name to (chain, draw, *site)."""
        draws = {name: value.double().numpy() for name, value in posterior.draws.items()}
        if self.quantities is None:
            return draws
        whole = {name: value.numpy() for name, value in posterior.draws.items()}
        return self.quantities(whole)

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arguments on a device."""
        return tuple(tensor.to(device) for tensor in self.data)


@dataclass(frozen=True)
class Stored:
    """The moments that ``make_references.py`` stored of a program."""

    name: str

    def __call__(self) -> dict[str, Moments]:
        found = json.loads(Path(__file__).with_name("references.json").read_text())[self.name]["moments"]
        return {quantity: Moments(**values) for quantity, values in found.items()}


ALL_FINITE = {
    "SVI": "no continuous site", "EM": "nothing to maximise",
    "MetropolisHastings": "all are finite", "HMC": "all are finite",
}  # fmt: skip
ENDLESS = dict.fromkeys(("SVI", "MetropolisHastings", "HMC"), "infinitely many values")
COUPLED = dict.fromkeys(("SVI", "EM", "MetropolisHastings", "HMC"), "are coupled")

LONG = ("MetropolisHastings", "HMC")  # chains of the models of the package, which take long to move

ZOO: tuple[Instance, ...] = (
    Instance(
        scalars.beta_binomial, (scalars.FLIPS,),
        {"fairness": "Beta"},
        scalars.beta_binomial_moments, scalars.beta_binomial_mode, scalars.BetaGuide,
    ),
    Instance(
        scalars.gamma_poisson, (scalars.COUNTS,),
        {"rate": "Gamma"},
        scalars.gamma_poisson_moments, scalars.gamma_poisson_mode, scalars.GammaGuide,
    ),
    Instance(
        scalars.tempered, (scalars.COUNTS,),
        {"rate": "Gamma"},
        scalars.tempered_moments, scalars.tempered_mode,
    ),
    Instance(
        scalars.dirichlet_multinomial, (scalars.TABLE,),
        {"shares": "Dirichlet"},
        scalars.dirichlet_multinomial_moments, scalars.dirichlet_multinomial_mode, scalars.DirichletGuide,
    ),
    Instance(
        scalars.exponential_gamma, (scalars.WAITS,),
        {"rate": "Gamma"},
        scalars.exponential_gamma_moments, scalars.exponential_gamma_mode,
    ),
    Instance(
        scalars.lognormal, (scalars.WAITS,),
        {"middle": "LogNormal"},
        scalars.lognormal_moments, scalars.lognormal_mode, scalars.LogNormalGuide,
    ),
    Instance(
        scalars.normal_variance, (scalars.SCALARS,),
        {"variance": "InverseGamma", "mean": "Normal"},
        scalars.normal_variance_moments, scalars.normal_variance_mode, scalars.NormalInverseGammaGuide,
    ),
    Instance(
        scalars.normal_independent, (scalars.SCALARS,),
        {"mean": "Normal", "variance": "InverseGamma"},
        scalars.normal_independent_moments, scalars.normal_independent_mode,
    ),
    Instance(
        scalars.masked, (scalars.SCALARS, scalars.IS_SEEN),
        {"mean": "Normal"},
        scalars.masked_moments, scalars.masked_mode, AutoNormal,
    ),
    Instance(
        scalars.flat_location, (scalars.SCALARS,),
        {"location": "Normal"},
        scalars.flat_location_moments, scalars.flat_location_mode,
    ),
    Instance(
        vectors.regression_event, (vectors.DESIGN, vectors.RESPONSE),
        {"beta": "Gaussian"},
        vectors.regression_moments, vectors.regression_mode,
    ),
    Instance(
        vectors.regression_plate, (vectors.DESIGN, vectors.RESPONSE),
        {"beta": "Gaussian"},
        vectors.regression_moments, vectors.regression_mode,
    ),
    Instance(
        vectors.regression_matrix, (vectors.DESIGN, vectors.RESPONSE),
        {"beta": "Gaussian"},
        vectors.regression_matrix_moments, vectors.regression_matrix_mode, AutoMultivariateNormal,
    ),
    Instance(
        vectors.flat_regression, (vectors.DESIGN, vectors.RESPONSE),
        {"beta": "Gaussian", "noise": "InverseGamma of the square"},
        vectors.flat_regression_moments, vectors.flat_regression_mode,
    ),
    Instance(
        vectors.covariance, (vectors.PAIRS,),
        {"matrix": "InverseWishart"},
        vectors.covariance_moments, vectors.covariance_mode,
    ),
    Instance(
        vectors.precision, (vectors.PAIRS,),
        {"matrix": "Wishart"},
        vectors.precision_moments, vectors.precision_mode,
    ),
    Instance(
        plates.nested, (plates.NESTED,),
        {"rate": "Gamma"},
        plates.nested_moments, plates.nested_mode, maximise=("rate",),
    ),
    Instance(
        plates.crossed, (plates.CROSSED,),
        {"row": "Gaussian", "column": "Gaussian"},
        plates.crossed_moments, plates.crossed_mode, maximise=("row", "column"),
    ),
    Instance(
        plates.random_walk, (plates.STEPS,),
        {f"state_{i}": "Gaussian" for i in range(4)},
        plates.random_walk_moments, plates.random_walk_mode,
    ),
    Instance(
        plates.hierarchical, (plates.GROUPED,),
        {"mean": "Gaussian", "between": "InverseGamma", "within": "InverseGamma", "effect": "Gaussian"},
        plates.hierarchical_moments, plates.hierarchical_mode,
    ),
    Instance(
        labels.coal, (labels.YEARS, labels.DISASTERS),
        {"switch": "Enumerate", "early": "Gamma", "late": "Gamma"},
        labels.coal_moments, labels.coal_mode,
    ),
    Instance(
        labels.chain, (labels.SEEN,),
        {f"z_{i}": "Enumerate" for i in range(3)},
        labels.chain_moments, refused=ALL_FINITE,
    ),
    Instance(
        labels.mixture, (labels.ROWS,),
        {"weights": "Dirichlet", "location": "Normal", "z": "Enumerate"},
        labels.mixture_moments, labels.mixture_mode,
    ),
    Instance(
        labels.gmm, (labels.CLUSTERS,),
        {"weights": "Dirichlet", "mean": "Normal", "variance": "InverseGamma", "z": "Enumerate"},
        labels.gmm_moments, quantities=labels.gmm_quantities,
    ),
    Instance(
        chains.hmm, (chains.SWITCHED,),
        {"move": "Dirichlet", "location": "Normal", **{f"state_{t}": "Enumerate" for t in range(6)}},
        chains.hmm_moments, chains.hmm_mode,
    ),
    Instance(
        chains.factorial_hmm, (chains.FLOWS,),
        {"effect": "Gaussian", **{f"{site}_{t}": "Enumerate" for t in range(4) for site in ("first", "second")}},
        chains.factorial_hmm_moments, chains.factorial_hmm_mode,
    ),
    Instance(
        chains.hidden_markov, (chains.SWITCHED,),
        {"move": "Dirichlet", "location": "Normal", "state": "Enumerate"},
        chains.hidden_markov_moments, chains.hmm_mode,
    ),
    Instance(
        chains.factorial_chains, (chains.FLOWS,),
        {"effect": "Gaussian", "first": "Enumerate", "second": "Enumerate"},
        chains.factorial_chains_moments, chains.factorial_hmm_mode,
    ),
    Instance(
        chains.local_level, (chains.LEVELS,),
        {"drift": "InverseGamma", "noise": "InverseGamma", **{f"level_{t}": "Gaussian" for t in range(6)}},
        chains.local_level_moments, chains.local_level_mode,
    ),
    Instance(
        classes.naive_bayes, (classes.WORDS, classes.CLASSES, classes.IS_LABELLED),
        {"share": "Dirichlet", "rate": "Beta", "label_unobserved": "Enumerate"},
        classes.naive_bayes_moments, classes.naive_bayes_mode, quantities=classes.naive_bayes_quantities,
    ),
    Instance(
        classes.annotators, (classes.ANSWERS,),
        {"share": "Dirichlet", "answer": "Dirichlet", "label": "Enumerate"},
        classes.annotators_moments, classes.annotators_mode, maximise=("share", "answer"),
    ),
    Instance(
        classes.topics, (classes.TEXTS,),
        {"topic": "Dirichlet", "share": "Dirichlet", "z": "Enumerate"},
        classes.topics_moments, maximise=("topic", "share"), quantities=classes.topics_quantities,
    ),
    Instance(
        classes.block_model, (classes.TIES, classes.IS_TIED),
        {"share": "Beta", "within": "Beta", "between": "Beta", "group": "Enumerate"},
        classes.block_model_moments, quantities=classes.block_model_quantities, refused=COUPLED,
    ),
    Instance(
        classes.stick_breaking, (classes.SPOTS,),
        {"stick": "Beta", "location": "Normal", "z": "Enumerate"},
        classes.stick_breaking_moments, quantities=classes.stick_breaking_quantities,
    ),
    Instance(
        classes.zero_inflated, (classes.CATCHES,),
        {"gate": "HMC", "rate": "HMC"},
        classes.zero_inflated_moments, classes.zero_inflated_mode,
    ),
    Instance(
        classes.zero_inflated_labels, (classes.CATCHES,),
        {"gate": "Beta", "rate": "Gamma", "is_empty": "Enumerate"},
        classes.zero_inflated_labels_moments, classes.zero_inflated_mode,
        quantities=classes.zero_inflated_labels_quantities,
    ),
    Instance(
        curved.logistic, (vectors.DESIGN[:, :2], curved.LABELS),
        {"beta": "PolyaGamma"},
        curved.logistic_moments, curved.logistic_mode,
    ),
    Instance(
        curved.gamma_shape, (scalars.WAITS,),
        {"shape": "HMC", "rate": "Gamma"},
        curved.gamma_shape_moments,
    ),
    Instance(
        curved.thinned, (curved.THINNED,),
        {"count": "Slice"},
        curved.thinned_moments, refused=ENDLESS | {"SVI": "no continuous site", "EM": "nothing to maximise"},
    ),
    Instance(
        regressions.probit, (regressions.DESIGN, regressions.VOTES),
        {"beta": "HMC"},
        regressions.probit_moments, regressions.probit_mode,
    ),
    Instance(
        regressions.poisson_regression, (regressions.DESIGN, regressions.EXPOSURE, regressions.CLAIMS),
        {"beta": "HMC"},
        regressions.poisson_regression_moments, regressions.poisson_regression_mode,
    ),
    Instance(
        regressions.robust, (regressions.DESIGN, regressions.HEIGHTS),
        {"beta": "Gaussian", "weight": "Gamma"},
        regressions.robust_moments, regressions.robust_mode, rough=True,
    ),
    Instance(
        regressions.errors_in_variables, (regressions.MEASURED, regressions.OUTCOME),
        {"intercept": "Gaussian", "slope": "Gaussian", "true": "Normal"},
        regressions.errors_in_variables_moments, regressions.errors_in_variables_mode,
    ),
    Instance(
        regressions.horseshoe, (regressions.CONTRASTS, regressions.CURVE),
        {"overall": "HMC", "local": "HMC", "raw": "Normal"},
        regressions.horseshoe_moments,
        quantities=regressions.horseshoe_quantities, slow=("Gibbs", "MetropolisHastings", "HMC", "SVI"),
    ),
    Instance(
        regressions.imputed, (regressions.DESIGN[:10], regressions.RESULTS, regressions.IS_KNOWN),
        {"beta": "Gaussian", "y_unobserved": "Normal"},
        regressions.imputed_moments, regressions.imputed_mode, quantities=regressions.imputed_quantities, rough=True,
    ),
    Instance(
        regressions.censored, (regressions.TIMES, regressions.IS_OVER),
        {"rate": "Gamma"},
        regressions.censored_moments, regressions.censored_mode,
    ),
    Instance(
        regressions.weibull, (regressions.TIMES, regressions.IS_OVER),
        {"shape": "HMC", "scale": "HMC"},
        regressions.weibull_moments, regressions.weibull_mode,
    ),
    Instance(
        hierarchies.schools, (hierarchies.EFFECTS, hierarchies.SMALL_ERRORS),
        {"mean": "Gaussian", "spread": "HMC", "effect": "Gaussian"},
        hierarchies.schools_moments, hierarchies.schools_mode,
    ),
    Instance(
        hierarchies.schools_apart, (hierarchies.EFFECTS, hierarchies.ERRORS),
        {"mean": "Gaussian", "spread": "HMC", "raw": "Gaussian"},
        hierarchies.schools_apart_moments,
    ),
    Instance(
        hierarchies.batting, (hierarchies.HITS, hierarchies.AT_BATS),
        {"share": "HMC", "size": "HMC", "skill": "Beta"},
        hierarchies.batting_moments, hierarchies.batting_mode, rough=True,
    ),
    Instance(
        hierarchies.radon, (hierarchies.COUNTY, hierarchies.FLOOR, hierarchies.LOG_RADON),
        {"overall": "Gaussian", "slope": "Gaussian", "intercept": "Gaussian"},
        hierarchies.radon_moments, hierarchies.radon_mode,
    ),
    Instance(
        hierarchies.rasch, (hierarchies.RIGHT,),
        {"ability": "PolyaGamma", "difficulty": "PolyaGamma"},
        hierarchies.rasch_moments, hierarchies.rasch_mode, maximise=("difficulty",), rough=True,
    ),
    Instance(
        hierarchies.item_response, (hierarchies.MARKS,),
        {"ability": "PolyaGamma", "slope": "HMC", "difficulty": "PolyaGamma"},
        Stored("item_response"), hierarchies.item_response_mode, slow=("MetropolisHastings",), rough=True,
    ),
    Instance(
        hierarchies.abundance, (hierarchies.SEEN,),
        {"rate": "Gamma", "share": "Beta", "number": "Slice"},
        hierarchies.abundance_moments, hierarchies.abundance_mode, refused=ENDLESS, rough=True,
    ),
    Instance(
        hierarchies.ratings, (hierarchies.RATINGS, hierarchies.IS_RATED),
        {"taste": "Gaussian", "style": "Gaussian"},
        hierarchies.ratings_moments, maximise=("style",), quantities=hierarchies.ratings_quantities,
    ),
    Instance(
        processes.gaussian_process, (processes.PLACES, processes.HEIGHTS),
        {"f": "Gaussian"},
        processes.gaussian_process_moments, processes.gaussian_process_mode,
    ),
    Instance(
        processes.kriging, (processes.PLACES, processes.HEIGHTS),
        {"height": "HMC", "length": "HMC"},
        processes.kriging_moments, processes.kriging_mode,
    ),
    Instance(
        processes.cox, (processes.DAYS, processes.ACCIDENTS),
        {"f": "EllipticalSlice"},
        Stored("cox"), processes.cox_mode,
    ),
    Instance(
        GMM(2, "full"), (models.POINTS,),
        {"weights": "Dirichlet", "means": "Gaussian", "covariances": "InverseWishart", "z": "Enumerate"},
        models.gmm_moments("full"), quantities=models.gmm_quantities,
        title="GMM, full", scattered=True, slow=LONG,
    ),
    Instance(
        GMM(2, "tied"), (models.POINTS,),
        {"weights": "Dirichlet", "means": "Gaussian", "covariances": "InverseWishart", "z": "Enumerate"},
        models.gmm_moments("tied"), quantities=models.gmm_quantities,
        title="GMM, tied", scattered=True, slow=(*LONG, "Gibbs"),
    ),
    Instance(
        GMM(2, "diagonal"), (models.POINTS,),
        {"weights": "Dirichlet", "means": "Normal", "covariances": "InverseGamma", "z": "Enumerate"},
        models.gmm_diagonal_moments, quantities=models.gmm_columns_quantities,
        title="GMM, diagonal", scattered=True, slow=LONG,
    ),
    Instance(
        GMM(2, "spherical"), (models.POINTS,),
        {"weights": "Dirichlet", "means": "Normal", "covariances": "InverseGamma", "z": "Enumerate"},
        models.gmm_moments("spherical"), quantities=models.gmm_quantities,
        title="GMM, spherical", scattered=True, slow=(*LONG, "Gibbs"),
    ),
    Instance(
        GMM(2, "isotropic", weights="equal"), (models.POINTS,),
        {"means": "Normal", "covariances": "InverseGamma", "z": "Enumerate"},
        models.gmm_moments("isotropic"), quantities=models.gmm_quantities, title="GMM, isotropic", slow=(*LONG, "Gibbs"),
    ),
    Instance(
        GMM(models.STICKS, "diagonal", weights="stick-breaking", concentration=models.ALPHA), (models.POINTS,),
        {"sticks": "Beta", "means": "Normal", "covariances": "InverseGamma", "z": "Enumerate"},
        models.gmm_sticks_moments, quantities=models.gmm_columns_quantities,
        title="GMM, sticks", scattered=True, slow=(*LONG, "Gibbs"),
    ),
    Instance(
        Mixture(2, "bernoulli"), (models.SWITCHES,),
        {"weights": "Dirichlet", "probabilities": "Beta", "z": "Enumerate"},
        models.mixture_bernoulli_moments, quantities=models.mixture_quantities, title="Mixture, bernoulli", slow=LONG,
    ),
    Instance(
        Mixture(2, "poisson"), (models.CALLS,),
        {"weights": "Dirichlet", "rates": "Gamma", "z": "Enumerate"},
        models.mixture_poisson_moments, quantities=models.mixture_quantities,
        title="Mixture, poisson", slow=(*LONG, "Gibbs"),
    ),
    Instance(
        Mixture(2, ["bernoulli", "categorical", "poisson", "normal"]), (models.MIXED,),
        {"weights": "Dirichlet", "probabilities": "Beta", "shares": "Dirichlet", "rates": "Gamma", "means": "Normal",
         "variances": "InverseGamma", "z": "Enumerate"},
        models.mixture_mixed_moments, quantities=models.mixture_quantities,
        title="Mixture, mixed columns", slow=(*LONG, "Gibbs"),
    ),
    Instance(
        NaiveBayes(2, ["bernoulli", "poisson", "gaussian"]), (models.PATIENTS, models.ILLNESS),
        {"share": "Dirichlet", "rates": "Beta", "intensities": "Gamma", "means": "Normal", "variances": "InverseGamma",
         "y_unobserved": "Enumerate"},
        models.naive_bayes_moments, quantities=models.naive_bayes_quantities, title="NaiveBayes", slow=LONG,
    ),
    Instance(
        LinearRegression(), (models.TABLE, models.YIELD),
        {"variance": "InverseGamma", "coefficients": "Gaussian"},
        models.linear_moments, models.linear_mode, quantities=models.linear_quantities, title="LinearRegression",
    ),
    Instance(
        LinearRegression(scale=None, intercept=False), (models.TABLE, models.YIELD),
        {"variance": "InverseGamma", "prior_variance": "InverseGamma", "coefficients": "Gaussian"},
        models.linear_unknown_moments, quantities=models.linear_unknown_quantities, title="LinearRegression, scale unknown",
    ),
    Instance(
        LogisticRegression(), (models.TABLE[:, :1], models.PASSED),
        {"coefficients": "PolyaGamma"},
        models.logistic_moments, models.logistic_mode, title="LogisticRegression",
    ),
    Instance(
        SoftmaxRegression(3, intercept=False), (models.TABLE[:, :1], models.GRADE),
        {"contrasts": "HMC"},
        models.softmax_moments, models.softmax_mode, title="SoftmaxRegression",
    ),
    Instance(
        MarginClassifier(intercept_scale=2.0), models.SIDES,
        {"coefficients": "Gaussian", "mixing": "InverseGaussian of the reciprocal"},
        models.margin_latent_moments, title="MarginClassifier", slow=LONG,
    ),
    Instance(
        MarginClassifier(intercept_scale=2.0, latent=False), models.SIDES,
        {"coefficients": "HMC"},
        models.margin_moments, title="MarginClassifier, summed", slow=(*LONG, "Gibbs"),
    ),
    Instance(
        PPCA(1), (models.PAIRS,),
        {"noise": "InverseGamma", "location": "Gaussian", "loadings": "Gaussian", "z": "Normal"},
        models.ppca_moments, quantities=models.factor_quantities, title="PPCA", slow=LONG,
    ),
    Instance(
        PPCA(1, latent=False), (models.PAIRS,),
        {"noise": "HMC", "location": "Gaussian", "loadings": "HMC"},
        models.ppca_summed_moments, quantities=models.factor_quantities, title="PPCA, summed", slow=(*LONG, "Gibbs"),
    ),
    Instance(
        FactorAnalysis(1), (models.PAIRS,),
        {"noise": "InverseGamma", "location": "Gaussian", "loadings": "Gaussian", "z": "Normal"},
        models.factor_analysis_moments, quantities=models.factor_quantities,
        title="FactorAnalysis", slow=LONG,
    ),
    Instance(
        HMM(2), (models.SERIES,),
        {"initial": "Dirichlet", "transitions": "Dirichlet", "means": "Normal", "covariances": "InverseWishart",
         "z": "Enumerate"},
        models.hmm_normal_moments, quantities=models.hmm_quantities, title="HMM", slow=LONG,
    ),
    Instance(
        HMM(2, "categorical"), (models.SYMBOLS,),
        {"initial": "Dirichlet", "transitions": "Dirichlet", "probabilities": "Dirichlet", "z": "Enumerate"},
        models.hmm_categorical_moments, quantities=models.hmm_quantities,
        title="HMM, symbols", slow=(*LONG, "Gibbs"),
    ),
    Instance(
        HMM(2, "poisson"), (models.TALLY,),
        {"initial": "Dirichlet", "transitions": "Dirichlet", "rates": "Gamma", "z": "Enumerate"},
        models.hmm_poisson_moments, quantities=models.hmm_quantities, title="HMM, counts", slow=(*LONG, "Gibbs"),
    ),
    Instance(
        LDA(2, 4, share_concentration=1.5, topic_concentration=1.5), (models.BAGS,),
        {"topics": "Own", "shares": "Own"},
        models.lda_moments, maximise=("shares", "topics"), quantities=models.lda_quantities, title="LDA", slow=LONG,
    ),
    Instance(
        LDA(2, 4, share_concentration=1.5, topic_concentration=1.5, is_collapsed=True), (models.BAGS,),
        {"topics": "Own", "shares": "Own"},
        models.lda_moments, maximise=("shares", "topics"), quantities=models.lda_quantities,
        title="LDA, collapsed", slow=(*LONG, "Gibbs"), stepped=True,
    ),
)  # fmt: skip

BY_NAME = {instance.name: instance for instance in ZOO}

# ------------------------------------------------------------------------------------- the README's table
BACKENDS = ("Gibbs", "MetropolisHastings", "HMC", "SVI", "EM")


def cell(instance: Instance, backend: str) -> str:
    """What the tests hold a back-end to on an instance."""
    if backend in instance.refused:
        return f"refused: {instance.refused[backend]}"
    if backend == "Gibbs":
        return ", ".join(dict.fromkeys(instance.plan.values()))
    if backend == "SVI":
        return "one mode of several" if instance.scattered else "means agree" if instance.guide is None else "agrees"
    if backend == "EM":
        if instance.stepped:
            return "near the means"
        return "climbs" if instance.peak is None else "near the mode" if instance.rough else "mode"
    return "agrees"


def markdown() -> str:
    """The table of programs and back-ends."""
    rows = [("Program", "Reference", *BACKENDS), ("---",) * (2 + len(BACKENDS))]
    for instance in ZOO:
        reference = "NUTS of Pyro" if isinstance(instance.solution, Stored) else "formula"
        rows.append((f"`{instance.name}`", reference, *(cell(instance, backend) for backend in BACKENDS)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(markdown())
