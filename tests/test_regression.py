"""Regressions beside their formulas and scikit-learn's, and the same posterior by every back-end.

False alarms. About 90 comparisons at 6.3e-5 each: a fresh seed would fail in one of 180 runs of this file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.infer
import pytest
import scipy.stats
import torch
from torch import Tensor

from agreement import assert_agree, assert_alike
from exact import Moments, noise
from inference import EM, HMC, SVI, Gibbs, MetropolisHastings
from pyro_genmodels import LinearRegression, LogisticRegression, SoftmaxRegression

linear_model = pytest.importorskip("sklearn.linear_model")

RUN: dict[str, Any] = {"seed": 1, "progress": False}
FIT = EM(tolerance=1e-10, **RUN)
X = noise(40, 3, seed=0) @ torch.tensor([[2.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 30.0]]).double() + 5.0
Z = (X - X.mean(0)) / X.std(0, correction=0)
Y = 3.0 + Z @ torch.tensor([1.0, -0.5, 0.0]).double() + 0.7 * noise(40, seed=1)
LABELS = (Z[:, 0] - 0.5 * Z[:, 1] + noise(40, seed=2) > 0).long()
CLASSES = (Z[:, 0] + noise(40, seed=3) > 0).long() + (Z[:, 0] + Z[:, 1] + noise(40, seed=4) > 1).long()
SAMPLERS = {
    "Gibbs": Gibbs(chains=16, warmup=50, draws=250, thin=2, **RUN),
    "MetropolisHastings": MetropolisHastings(chains=32, warmup=400, draws=100, thin=20, **RUN),
    "HMC": HMC(chains=32, warmup=150, draws=100, **RUN),
}


# -------------------------------------------------------------------------------------------------------- linear
def formula(model: LinearRegression) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Mean and scale of the Student-t posterior of the coefficients, shape and rate of the variance's."""
    design = np.column_stack([Z.numpy(), np.ones(len(Z))])
    y = ((Y - Y.mean()) / Y.std(correction=0)).numpy()
    prior = np.diag([1.0, 1.0, 1.0, 1.0 / model.intercept_scale**2])
    precision = design.T @ design + prior
    mean = np.linalg.solve(precision, design.T @ y)
    a, b = model.noise
    rate = b + 0.5 * (y @ y - mean @ precision @ mean)
    return mean, np.linalg.inv(precision), a + 0.5 * len(y), rate


def exact() -> dict[str, Moments]:
    mean, spread, a, b = formula(LinearRegression())
    sd = np.sqrt(np.diag(spread) * b / (a - 1.0))
    return {"coefficients": Moments(mean, sd), "variance": Moments(b / (a - 1.0), b / (a - 1.0) / math.sqrt(a - 2.0))}


@pytest.mark.parametrize("backend", SAMPLERS)
def test_the_linear_posterior_is_the_formula(backend: str) -> None:
    posterior = SAMPLERS[backend].fit(LinearRegression(), X, Y)
    assert_agree(posterior.draws, exact())
    if backend == "Gibbs":
        plan = posterior.plan
        assert (plan["coefficients"].update, plan["variance"].update) == ("Gaussian", "InverseGamma")


def test_the_guide_of_the_linear_posterior_has_its_means() -> None:
    posterior = SVI(steps=600, learning_rate=0.03, **RUN).fit(LinearRegression(), X, Y)
    for name, moments in exact().items():
        far = np.abs(posterior.draws[name].mean((0, 1)).numpy() - moments.mean) / moments.sd
        assert far.max() < 0.5, name


@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_the_linear_mode_is_ridge_regression(scale: float) -> None:
    model = LinearRegression(scale)
    posterior = FIT.fit(model, X, Y)
    ridge = linear_model.Ridge(alpha=1.0 / scale**2).fit(Z.numpy(), Y.numpy())
    np.testing.assert_allclose(model.predict(X, posterior), ridge.predict(Z.numpy()), rtol=0, atol=1e-6)
    assert model.score(X, Y, posterior) == pytest.approx(ridge.score(Z.numpy(), Y.numpy()), abs=1e-6)
    slopes, level = model.line(posterior)
    torch.testing.assert_close((X @ slopes[0] + level[0]), model.predict(X, posterior))


def test_the_predictive_density_is_students() -> None:
    """Within five standard errors of the mean of 4000 densities whose coefficient of variation is below one."""
    model = LinearRegression()
    posterior = SAMPLERS["Gibbs"].fit(model, X, Y)
    mean, spread, a, b = formula(model)
    design = np.column_stack([Z.numpy(), np.ones(len(Z))])
    scale = np.sqrt(b / a * (1.0 + np.einsum("ni,ij,nj->n", design, spread, design))) * float(model.y_scale)
    expected = scipy.stats.t(2 * a, float(model.y_location) + float(model.y_scale) * design @ mean, scale)
    np.testing.assert_allclose(model.score_samples(X, Y, posterior), expected.logpdf(Y.numpy()), rtol=0, atol=0.08)
    new = model.sample(X, posterior)
    z = (new.mean(0).numpy() - expected.mean()) / (expected.std() / math.sqrt(len(new)))
    assert np.abs(z).max() < 4.5  # 40 rows, each 7e-6


def test_an_unknown_prior_scale_is_that_of_the_coefficients() -> None:
    """Given the coefficients and the noise, τ² is inverse Gamma: its draws have that mean, averaged over the others."""
    posterior = SAMPLERS["Gibbs"].fit(LinearRegression(None), X, Y)
    draws = posterior.draws
    rate = 1.0 + 0.5 * draws["coefficients"][..., :3].square().sum(-1) / draws["variance"]
    residual = 1.0 / draws["prior_variance"] - 2.5 / rate  # E 1 / τ² given the rest is shape / rate, shape 1 + 3/2
    assert_agree({"residual": residual}, {"residual": Moments(0.0, residual.std().item(), 0.0, 1.0)})
    assert posterior.plan["prior_variance"].update == "InverseGamma"


# ------------------------------------------------------------------------------------------------------ logistic
@pytest.mark.parametrize("c", [1.0, 0.1])
def test_the_logistic_mode_is_that_of_scikit_learn(c: float) -> None:
    model = LogisticRegression(math.sqrt(c), intercept_scale=1e4)
    posterior = FIT.fit(model, X, LABELS)
    peer = linear_model.LogisticRegression(C=c, tol=1e-12, max_iter=10_000).fit(Z.numpy(), LABELS.numpy())
    found = posterior.point()["coefficients"].numpy()
    np.testing.assert_allclose(found, [*peer.coef_[0], *peer.intercept_], rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.predict_proba(X, posterior), peer.predict_proba(Z.numpy()), rtol=0, atol=1e-5)
    assert model.score(X, LABELS, posterior) == peer.score(Z.numpy(), LABELS.numpy())


@pytest.mark.parametrize("backend", ["Gibbs", "MetropolisHastings"])
def test_logistic_samplers_agree(backend: str) -> None:
    """Pólya-Gamma draws, and a random walk, beside Hamiltonian ones."""
    posterior = SAMPLERS[backend].fit(LogisticRegression(), X, LABELS)
    assert_alike(posterior.draws, SAMPLERS["HMC"].fit(LogisticRegression(), X, LABELS).draws, ("coefficients",))
    if backend == "Gibbs":
        assert posterior.plan["coefficients"].update == "PolyaGamma"


def test_the_logistic_guide_has_the_means_of_the_posterior() -> None:
    draws = SAMPLERS["HMC"].fit(LogisticRegression(), X, LABELS).draws["coefficients"]
    guess = SVI(steps=600, learning_rate=0.03, **RUN).fit(LogisticRegression(), X, LABELS).draws["coefficients"]
    assert ((guess.mean((0, 1)) - draws.mean((0, 1))).abs() < 0.5 * draws.std((0, 1))).all()


# ------------------------------------------------------------------------------------------------------- softmax
@pytest.mark.parametrize("c", [1.0, 0.1])
def test_the_softmax_mode_is_that_of_scikit_learn(c: float) -> None:
    model = SoftmaxRegression(3, math.sqrt(c), intercept_scale=1e4)
    posterior = FIT.fit(model, X, CLASSES)
    peer = linear_model.LogisticRegression(C=c, tol=1e-12, max_iter=10_000).fit(Z.numpy(), CLASSES.numpy())
    found = posterior.point()["coefficients"]
    np.testing.assert_allclose(found[:, :3], peer.coef_, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.sum(0), torch.zeros(4).double(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(model.predict_proba(X, posterior), peer.predict_proba(Z.numpy()), rtol=0, atol=1e-5)
    assert model.score(X, CLASSES, posterior) == peer.score(Z.numpy(), CLASSES.numpy())


def test_two_classes_are_a_logistic_regression() -> None:
    """β_1 − β_0 has the variance 2 τ²: the same posterior mode if τ² is half of the other's."""
    two, one = SoftmaxRegression(2, math.sqrt(0.5), intercept_scale=math.sqrt(0.5)), LogisticRegression(intercept_scale=1.0)
    left = two.predict_proba(X, FIT.fit(two, X, LABELS))
    torch.testing.assert_close(left, one.predict_proba(X, FIT.fit(one, X, LABELS)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["Gibbs", "MetropolisHastings"])
def test_softmax_samplers_agree(backend: str) -> None:
    fits = [SAMPLERS[name].fit(SoftmaxRegression(3), X, CLASSES).draws for name in (backend, "HMC")]
    assert_alike(*fits, ("contrasts", "coefficients"))


def test_the_softmax_guide_has_the_means_of_the_posterior() -> None:
    draws = SAMPLERS["HMC"].fit(SoftmaxRegression(3), X, CLASSES).draws["contrasts"]
    guess = SVI(steps=600, learning_rate=0.03, **RUN).fit(SoftmaxRegression(3), X, CLASSES).draws["contrasts"]
    assert ((guess.mean((0, 1)) - draws.mean((0, 1))).abs() < 0.5 * draws.std((0, 1))).all()


# ---------------------------------------------------------------------------------------------------- all of them
MODELS = {
    "linear": (LinearRegression, Y), "logistic": (LogisticRegression, LABELS),
    "softmax": (lambda **options: SoftmaxRegression(3, **options), CLASSES),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


@every_model
def test_units_do_not_matter(name: str) -> None:
    """Standardised columns: other units of x, the same predictions."""
    build, y = MODELS[name]
    scaled = 1000.0 * X - 7.0
    left, right = build(), build()
    first, second = FIT.fit(left, X, y), FIT.fit(right, scaled, y)
    predictions = (left.linear(X, first), right.linear(scaled, second))
    torch.testing.assert_close(*predictions, rtol=0, atol=1e-5)


@every_model
def test_a_column_of_one_value_gets_its_prior(name: str) -> None:
    build, y = MODELS[name]
    wide = torch.cat([X, torch.full((40, 1), 7.0).double()], 1)
    model, without = build(), build()
    posterior = FIT.fit(model, wide, y)
    torch.testing.assert_close(model.linear(wide, posterior), without.linear(X, FIT.fit(without, X, y)), rtol=0, atol=1e-5)
    assert posterior.point()["contrasts" if name == "softmax" else "coefficients"][..., 3].abs().max() < 1e-6


@every_model
def test_responses_are_drawn_where_there_are_none(name: str) -> None:
    build, _ = MODELS[name]
    model = build(intercept=False, standardise=False)
    with torch.random.fork_rng(), torch.no_grad():
        assert model.model(X).shape == (40,)
    with pytest.raises(ValueError, match="model needs x"):
        model.model(size=3)


@every_model
@pytest.mark.parametrize(
    ("x", "words"),
    [
        (X[0], "must be a table"),
        (X[:, :0], "must be a table"),
        (X.long(), "must be floating"),
        (torch.where(X[3, 1] == X, math.nan, X), "first in row 3, column 1"),
        (X[:5], r"y has shape \(40,\), but x has 5 rows"),
    ],
)
def test_tables_that_are_none_are_refused(name: str, x: Tensor, words: str) -> None:
    build, y = MODELS[name]
    with pytest.raises(ValueError, match=words):
        FIT.fit(build(), x, y)


@pytest.mark.parametrize(
    ("name", "y", "words"),
    [
        ("linear", LABELS, "y holds int64"),
        ("linear", torch.where(Y[2] == Y, math.nan, Y), "the first in row 2"),
        ("logistic", LABELS + 1, "labels from 1 to 2, but must be 0 to 1"),
        ("logistic", LABELS + 0.5, "not whole numbers"),
        ("softmax", CLASSES - 1, "labels from -1 to 1"),
        ("softmax", CLASSES.double(), "pass y.long()"),
    ],
)
def test_responses_that_are_none_are_refused(name: str, y: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FIT.fit(MODELS[name][0](), X, y)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LinearRegression(0.0), "scale is 0.0"),
        (lambda: LinearRegression(noise=(0.0, 1.0)), "both numbers must be positive"),
        (lambda: LogisticRegression(intercept_scale=math.inf), "intercept_scale is inf"),
        (lambda: SoftmaxRegression(1), "at least 2 classes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_a_model_of_other_columns_is_refused() -> None:
    model = LinearRegression()
    posterior = FIT.fit(model, X, Y)
    with pytest.raises(ValueError, match="x has 2 features, but this LinearRegression was built for 3"):
        model.predict(X[:, :2], posterior)


def test_rows_seen_twice_weigh_twice() -> None:
    """The logistic mode of every row twice is that of a prior of half the precision."""
    twice, wide = LogisticRegression(1.0, False), LogisticRegression(math.sqrt(2.0), False)
    left = FIT.fit(twice, X.repeat(2, 1), LABELS.repeat(2)).point()["coefficients"]
    torch.testing.assert_close(left, FIT.fit(wide, X, LABELS).point()["coefficients"], rtol=0, atol=1e-5)


def test_a_class_without_rows_is_the_least_probable() -> None:
    model = SoftmaxRegression(4)
    proba = model.predict_proba(X, FIT.fit(model, X, CLASSES))
    assert proba.isfinite().all() and proba[:, 3].max() < 0.1


@every_model
def test_a_state_holds_all_that_predictions_need(name: str) -> None:
    build, y = MODELS[name]
    model, other = build(), build()
    posterior = FIT.fit(model, X, y)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(X, posterior), model.predict(X, posterior))


@every_model
def test_the_tools_of_pyro_run_on_it(name: str) -> None:
    build, y = MODELS[name]
    model = build().double()
    model.prepare(X, y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kernel = pyro.infer.NUTS(model.model, max_tree_depth=3)
        chain = pyro.infer.MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True)
        chain.run(X, y)
        drawn = pyro.infer.Predictive(model.model, num_samples=5)(X)
    assert drawn["y"].shape[-1] == 40
    assert all(value.dtype == torch.float64 for value in chain.get_samples().values())
