"""Factor models beside scikit-learn's, beside formulas for complete and gappy rows, beside quadrature, and given bad input.

False alarms. Samplers make 30 + 36 + 68 comparisons at 6.3e-5 each: a fresh seed would fail in one of 118 runs of this
file. Another statistical test states its own.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

from agreement import assert_agree, assert_alike
from exact import Moments, array, grid, moments, noise
from inference import EM, HMC, SVI, Gibbs, MetropolisHastings, Posterior
from inference.handlers import isolated
from parameters import quick
from pyro_genmodels import PPCA, FactorAnalysis

decomposition = pytest.importorskip("sklearn.decomposition")

X = noise(120, 2, seed=0) @ noise(2, 6, seed=1) + 0.5 * noise(120, 6, seed=2) + array(3.0, 0.0, -20.0, 1.0, 0.0, 5.0)
START: dict[str, Any] = {"seed": 1, "progress": False}
MODELS = {"PPCA": PPCA, "FactorAnalysis": FactorAnalysis}
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For laws that do not concern graphs, which take seconds to make."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "vmapped")


graphless = pytest.mark.usefixtures("without_graphs")


def gappy(share: float = 0.3, rows: int = len(X)) -> Tensor:
    """The rows with holes, the first one empty."""
    holes = torch.rand(rows, 6, generator=torch.Generator().manual_seed(0)) < share
    x = torch.where(holes, math.nan, X[:rows])
    x[0] = math.nan
    return x


def parameters(name: str) -> dict[str, Tensor]:
    """A point that is no end of anything."""
    spread = array(0.5, 1.0, 0.2, 2.0, 0.7, 0.3)
    return {
        "loadings": noise(6, 2, seed=5),
        "location": X.mean(0) + 0.3 * noise(6, seed=6),
        "noise": spread if name == "FactorAnalysis" else spread[3],
    }  # fmt: skip


def covariance(point: dict[str, Tensor]) -> np.ndarray:
    return (point["loadings"] @ point["loadings"].mT + torch.diag(point["noise"].expand(6))).numpy()


# ------------------------------------------------------------------------------------------ maximum of the likelihood
def tipping_and_bishop(x: Tensor, factors: int) -> tuple[float, float, np.ndarray]:
    """Noise, log-likelihood and covariance at the maximum, from the eigenvalues of the covariance of the data."""
    rows, features = x.shape
    values, vectors = np.linalg.eigh(np.cov(x.numpy().T, bias=True))
    values, vectors = values[::-1], vectors[:, ::-1]
    left = values[factors:].mean()
    log_det = np.log(values[:factors]).sum() + (features - factors) * np.log(left)
    log_likelihood = -0.5 * rows * (features * np.log(2 * np.pi) + log_det + features)
    first = vectors[:, :factors]
    return left, log_likelihood, first * (values[:factors] - left) @ first.T + left * np.eye(features)


FAR = {"loadings": noise(6, 2, seed=3), "location": torch.zeros(6).double(), "noise": torch.ones(()).double()}


@pytest.mark.parametrize(("factors", "start"), [(2, None), (5, None), (2, FAR)])
def test_em_reaches_the_closed_form_maximum_from_near_and_far(factors: int, start: dict[str, Tensor] | None) -> None:
    posterior = EM(objective="mle", start=start, steps=3000, tolerance=1e-8, **START).fit(PPCA(factors), X)
    left, log_likelihood, matrix = tipping_and_bishop(X, factors)
    climb, point = posterior.history["log_joint"], posterior.point()
    assert float(climb[-1]) == pytest.approx(log_likelihood, rel=1e-9)
    assert len(climb) < 2 or float(climb.diff().min()) >= -1e-9 * abs(log_likelihood)
    assert float(point["noise"]) == pytest.approx(left, rel=1e-4)
    np.testing.assert_allclose(point["covariance"], matrix, rtol=0, atol=1e-4 * np.abs(matrix).max())
    peer = decomposition.PCA(factors).fit(X.numpy())
    components = PPCA(factors, features=6).components(posterior)
    np.testing.assert_allclose(np.abs(components.numpy() @ peer.components_.T), np.eye(factors), rtol=0, atol=1e-4)


def test_with_one_factor_fewer_than_columns_the_maximum_is_the_covariance_of_the_data() -> None:
    np.testing.assert_allclose(tipping_and_bishop(X, 5)[2], np.cov(X.numpy().T, bias=True), rtol=0, atol=1e-9)


def test_em_reaches_the_likelihood_of_scikit_learn_and_never_decreases() -> None:
    posterior = EM(objective="mle", steps=2000, **START).fit(FactorAnalysis(2), X)
    peer = decomposition.FactorAnalysis(2, tol=1e-12, max_iter=10**5, svd_method="lapack").fit(X.numpy())
    climb = posterior.history["log_joint"]
    assert float(climb[-1]) >= float(peer.score(X.numpy())) * len(X) * (1 + 1e-6)
    assert float(climb.diff().min()) >= -1e-9 * abs(float(climb[-1]))
    np.testing.assert_allclose(posterior.point()["covariance"], peer.get_covariance(), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["PPCA", "FactorAnalysis"])
def test_with_and_without_factors_em_has_the_same_maximum_of_the_posterior(name: str) -> None:
    """By closed forms and by gradients, of a table with gaps. Both objectives end within 1e-4 of one another."""
    x, ends = gappy(rows=30), []
    for latent in (True, False):
        posterior = EM(steps=600, standard_errors=False, **START).fit(MODELS[name](1, latent=latent), x)
        climb = posterior.history["log_joint"]
        assert float(climb.diff().min()) >= -1e-9 * abs(float(climb[-1]))
        ends.append(float(climb[-1]))
    assert ends[0] == pytest.approx(ends[1], abs=1e-4 * 30)


# --------------------------------------------------------------------------------------------- what a point says of rows
@every_model
def test_scores_are_those_of_scikit_learn(name: str) -> None:
    x = X.numpy()
    if name == "PPCA":
        peer = decomposition.PCA(2).fit(x)
        loadings = peer.components_.T * np.sqrt(peer.explained_variance_ - peer.noise_variance_)
    else:
        peer = decomposition.FactorAnalysis(2).fit(x)
        loadings = peer.components_.T
    draws = {"loadings": loadings, "location": peer.mean_, "noise": peer.noise_variance_}
    point = {site: torch.as_tensor(value).double() for site, value in draws.items()}
    model = MODELS[name](2, features=6)
    np.testing.assert_allclose(model.score_samples(X, point), peer.score_samples(x), rtol=1e-9)
    if name == "FactorAnalysis":  # which turns no factors
        common = model.transform(X, point).mean @ model.aligned(point)["loadings"].mT
        np.testing.assert_allclose(common, peer.transform(x) @ peer.components_, rtol=0, atol=1e-9)


@every_model
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_rows_are_marginals_and_conditionals_of_one_normal(name: str, share: float) -> None:
    """Densities, factors and missing entries of rows with and without gaps, by formulas in D dimensions."""
    x, point = (gappy(share, 40) if share else X[:40]), parameters(name)
    model, total = MODELS[name](2, features=6), covariance(point)
    loadings, location = model.aligned(point)["loadings"].numpy(), point["location"].numpy()
    score, filled, (mean, spread) = model.score_samples(x, point), model.impute(x, point), model.transform(x, point)
    for n, row in enumerate(x.numpy()):
        known = ~np.isnan(row)
        part, residual = total[np.ix_(known, known)], row[known] - location[known]
        slope = np.linalg.solve(part, loadings[known]).T
        expected = scipy.stats.multivariate_normal(location[known], part).logpdf(row[known]) if known.any() else 0.0
        assert float(score[n]) == pytest.approx(expected, rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(mean[n], slope @ residual, rtol=0, atol=1e-9)
        np.testing.assert_allclose(spread[n], np.eye(2) - slope @ loadings[known], rtol=0, atol=1e-9)
        guess = location + total[:, known] @ np.linalg.solve(part, residual)
        np.testing.assert_allclose(filled[n], np.where(known, row, guess), rtol=0, atol=1e-9)


@graphless
@every_model
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_programs_with_and_without_factors_are_one_model(name: str, share: float) -> None:
    """What EM averages, what is integrated out inside ``x``, and the density of the rows are one number."""
    x, point = (gappy(share, 40) if share else X[:40]), parameters(name)
    expected = float(MODELS[name](2, features=6).score_samples(x, point).sum())
    for latent in (True, False):
        model = MODELS[name](2, latent=latent)
        options: dict[str, Any] = {"objective": "mle", "steps": 1, "standard_errors": False, "start": point}
        climb = EM(**options, **START).fit(model, x).history["log_joint"]
        assert float(climb[0]) == pytest.approx(expected, rel=1e-9)


@every_model
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_guide_has_the_exact_conditional_of_the_factors(name: str, share: float) -> None:
    """log p(x, z, θ) − log q(z | θ) is log p(x, θ), whatever z and θ are."""
    x = gappy(share, 40) if share else X[:40]
    model, marginal = MODELS[name](2), MODELS[name](2, latent=False)
    for each in (model, marginal):
        each.double().prepare(x)
    with isolated(0), torch.no_grad():
        guided = poutine.trace(model.guide).get_trace(x)
        joint = poutine.trace(poutine.replay(model.model, guided)).get_trace(x)
        alone = poutine.trace(poutine.replay(marginal.model, guided)).get_trace(x)
        for trace in (guided, joint, alone):
            trace.compute_log_prob()
    z = float(guided.nodes["z"]["log_prob"].sum())
    assert float(joint.log_prob_sum()) - z == pytest.approx(float(alone.log_prob_sum()), rel=1e-9)
    sites = {
        site for site, node in guided.nodes.items() if node["type"] == "sample" and not node["infer"].get("_deterministic")
    }
    assert {"loadings", "location", "noise", "z"} <= sites


def test_draws_of_missing_entries_have_their_conditional_moments() -> None:
    """Means of 4,000 draws of 85 entries, and those of 6 columns of new rows, within 4.5 standard errors: a false alarm in
    1,600 runs. The covariance of a row of which nothing is known within six of its standard errors, far rarer."""
    x, point = gappy(rows=40), parameters("FactorAnalysis")
    model = FactorAnalysis(2, features=6)
    with isolated(0):
        drawn = model.imputations(x, point, 4000)
    mean, known = model.impute(x, point), ~x.isnan()
    assert torch.equal(drawn[:, known], x[known].expand(4000, -1))
    error = (drawn.mean(0) - mean)[~known] / (drawn.std(0)[~known] / 4000**0.5)
    assert float(error.abs().max()) < 4.5
    empty = drawn[:, 0]  # a row of which nothing is known: the whole covariance
    total = covariance(point)
    bound = 6.0 * np.sqrt((np.outer(np.diag(total), np.diag(total)) + total**2) / 4000)
    assert (np.abs(np.cov(empty.numpy().T) - total) < bound).all()
    with isolated(1):
        rows = model.sample(4000, point)
    assert float(((rows.mean(0) - point["location"]) / rows.std(0) * 4000**0.5).abs().max()) < 4.5


@graphless
def test_scores_and_imputed_entries_average_over_the_draws() -> None:
    x = gappy(rows=40)
    posterior = Gibbs(chains=2, warmup=20, draws=3, **START).fit(FactorAnalysis(2), x)
    model, singles = FactorAnalysis(2, features=6), []
    for chain in range(2):
        singles += [{site: value[chain, draw] for site, value in posterior.draws.items()} for draw in range(3)]
    scores = torch.stack([model.score_samples(x, single) for single in singles]).exp().mean(0).log()
    torch.testing.assert_close(model.score_samples(x, posterior), scores)
    filled = torch.stack([model.impute(x, single) for single in singles]).mean(0)
    torch.testing.assert_close(model.impute(x, posterior), filled)


# ------------------------------------------------------------------------------------------------------------- rotations
@every_model
def test_aligned_draws_do_not_depend_on_how_factors_were_turned(name: str) -> None:
    """Draws about one W, each turned at random, come back as if none had been; what is identified stays as it was."""
    model = MODELS[name](2, scale=array(1.0, 1.0, 2.0, 1.0, 0.5, 3.0))
    loadings = noise(6, 2, seed=5) * array(3.0, 1.0) + 0.05 * noise(4, 25, 6, 2, seed=6)
    z, turn = noise(4, 25, 9, 2, seed=7), torch.linalg.qr(noise(4, 25, 2, 2, seed=8)).Q
    straight = model.aligned({"loadings": loadings, "z": z})
    turned = model.aligned({"loadings": loadings @ turn, "z": z @ turn})
    for site in ("loadings", "z"):
        torch.testing.assert_close(turned[site], straight[site], rtol=0, atol=1e-9)
    torch.testing.assert_close(turned["z"] @ turned["loadings"].mT, z @ loadings.mT)
    assert float(turned["loadings"].std((0, 1)).max()) < 0.1 * float(loadings.std())
    once = model.aligned({"loadings": loadings[0, 0]})["loadings"]  # along principal axes, in units of the columns
    standard = once / model._unit[:, None]
    gram = standard.mT @ standard
    assert float(gram[0, 0]) > float(gram[1, 1]) and abs(float(gram[0, 1])) < 1e-9


@every_model
def test_explained_shares_are_eigenvalues_of_the_common_part(name: str) -> None:
    point, model = parameters(name), MODELS[name](2, features=6)
    total = covariance(point)
    values = np.linalg.eigvalsh(total - np.diag(point["noise"].expand(6).numpy()))[::-1][:2]
    np.testing.assert_allclose(model.explained(point), values[None] / np.trace(total), rtol=1e-9)
    axes = model.components(point).numpy()
    np.testing.assert_allclose(axes @ axes.T, np.eye(2), rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------- posterior
ROWS = noise(14, 1, seed=10) @ array([1.5, -1.0]) + 0.6 * noise(14, 2, seed=11) + 2.0


@functools.cache
def solution(name: str) -> dict[str, Moments]:
    """By quadrature over the loadings of two columns and the noise; m has been integrated out, Σ_n x_n = N x̄."""
    rows, mean = len(ROWS), ROWS.mean(0)
    scatter, s2 = (ROWS - mean).mT @ (ROWS - mean), ROWS.var(0, correction=0)
    reach, step = 5.5 * float(s2.max().sqrt()), 5.5 * float(s2.max().sqrt()) / 32  # W and −W are one: half of the plane
    if name == "PPCA":
        s2 = s2.mean().expand(2)
        points = grid((step / 2, reach - step / 2, 32), (-reach, reach, 65), (-4.5, 3.5, 121))
        first, second, log_one = points.mT
        log_noise = torch.stack([log_one, log_one], -1)
        prior = torch.distributions.InverseGamma(array(1.5), 0.5 * s2[0]).log_prob(log_one.exp()) + log_one
    else:
        points = grid((step / 2, reach - step / 2, 32), (-reach, reach, 65), (-5.5, 3.5, 41), (-5.5, 3.5, 41))
        first, second, *logs = points.mT
        log_noise = torch.stack(logs, -1)
        prior = torch.distributions.InverseGamma(array(1.5), 0.5 * s2).log_prob(log_noise.exp()).sum(-1) + log_noise.sum(-1)
    a, d = first**2 + log_noise[:, 0].exp(), second**2 + log_noise[:, 1].exp()
    b = first * second
    det = a * d - b**2
    trace = (d * scatter[0, 0] + a * scatter[1, 1] - 2 * b * scatter[0, 1]) / det
    u, v = 9.0 * s2  # |C/N + 9 diag s²|, of x̄ about the middle of its prior
    spread = (a / rows + u) * (d / rows + v) - (b / rows) ** 2
    weights = prior - 0.5 * (rows - 1) * det.log() - 0.5 * trace - 0.5 * spread.log()
    weights = weights - 0.5 * (first**2 / s2[0] + second**2 / s2[1])
    matrix = torch.stack([torch.stack([a, b], -1), torch.stack([b, d], -1)], -2)
    return moments(weights, {"covariance": matrix, "noise": log_noise[:, 0].exp() if name == "PPCA" else log_noise.exp()})


BACKENDS = {
    "Gibbs": Gibbs(chains=160, warmup=60, draws=25, thin=6, **START),
    "MetropolisHastings": MetropolisHastings(chains=48, warmup=500, draws=80, thin=25, **START),
    "HMC": HMC(chains=48, warmup=150, draws=100, **START),
}
PLAN = {"noise": "InverseGamma", "location": "Gaussian", "loadings": "Gaussian", "z": "Normal"}


def draws_of(posterior: Posterior) -> dict[str, np.ndarray]:
    return {site: posterior.draws[site].numpy() for site in ("covariance", "noise")}


@pytest.mark.parametrize(
    ("name", "backend", "latent"),
    [
        *quick([("PPCA", "Gibbs", True), ("PPCA", "HMC", True), ("PPCA", "MetropolisHastings", False)], ()),
        ("FactorAnalysis", "Gibbs", True), ("FactorAnalysis", "HMC", False), ("FactorAnalysis", "MetropolisHastings", False),
    ],
)  # fmt: skip
def test_samplers_agree_with_quadrature(name: str, backend: str, latent: bool) -> None:
    posterior = BACKENDS[backend].fit(MODELS[name](1, latent=latent), ROWS)
    assert_agree(draws_of(posterior), solution(name))
    if backend == "Gibbs":
        assert {site: posterior.plan[site].update for site in posterior.plan} == PLAN
        assert max(posterior.plan[site].certificate for site in posterior.plan) < 1e-8


@every_model
@pytest.mark.parametrize("latent", [True, False])
def test_the_guide_of_the_model_ends_near_the_posterior(name: str, latent: bool) -> None:
    """Within half a posterior standard deviation, though independent normals do not contain the posterior."""
    posterior = SVI(steps=1000, learning_rate=0.03, **START).fit(MODELS[name](1, latent=latent), ROWS)
    for site, exact in solution(name).items():
        mean = posterior.draws[site].mean((0, 1)).numpy()
        assert (np.abs(mean - exact.mean) / exact.sd).max() < 0.5, site


@pytest.mark.slow
def test_samplers_agree_with_one_another_on_rows_with_gaps() -> None:
    x = torch.where(torch.rand(30, 4, generator=torch.Generator().manual_seed(1)) < 0.2, math.nan, X[:30, :4])
    exact = draws_of(BACKENDS["Gibbs"].fit(PPCA(1), x))
    assert_alike(draws_of(BACKENDS["HMC"].fit(PPCA(1, latent=False), x)), exact, ("covariance", "noise"))
    assert_alike(draws_of(BACKENDS["MetropolisHastings"].fit(PPCA(1, latent=False), x)), exact, ("covariance", "noise"))


# -------------------------------------------------------------------------------------------------------------- programs
@every_model
@pytest.mark.parametrize("latent", [True, False])
def test_rows_are_drawn_from_the_prior_and_weights_go_through_a_file(name: str, latent: bool) -> None:
    model = MODELS[name](2, features=6, latent=latent)
    with isolated(0):
        assert model.model(size=5).shape == (5, 6)
    model.prepare(X)
    other = MODELS[name](2, latent=latent)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.location, X.mean(0)) and torch.equal(other.guesses["loadings"], model.guesses["loadings"])


@graphless
@every_model
def test_an_empty_row_changes_nothing(name: str) -> None:
    options: dict[str, Any] = {"steps": 5, "standard_errors": False, "start": parameters(name)}
    one = EM(**options, **START).fit(MODELS[name](2), X[:40])
    x = torch.cat([X[:40], torch.full((3, 6), math.nan)])
    two = EM(**options, **START).fit(MODELS[name](2), x)
    torch.testing.assert_close(one.point()["covariance"], two.point()["covariance"], rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_half_of_a_table_is_filled_in_better_than_by_neighbours() -> None:
    """The thirty measurements of 569 tumours, in standard units; 90 % intervals hold 85 % at least."""
    sets, impute = pytest.importorskip("sklearn.datasets"), pytest.importorskip("sklearn.impute")
    x = torch.from_numpy(sets.load_breast_cancer().data).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    is_gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    gaps = torch.where(is_gone, math.nan, x)
    model = FactorAnalysis(5)
    posterior = EM(steps=100, standard_errors=False, **START).fit(model, gaps)
    peer = torch.from_numpy(impute.KNNImputer().fit_transform(gaps.numpy()))
    error, theirs = (float((filled - x)[is_gone].square().mean()) for filled in (model.impute(gaps, posterior), peer))
    assert error < theirs
    with isolated(0):
        drawn = model.imputations(gaps, posterior, 200)
    is_inside = (x >= drawn.quantile(0.05, 0)) & (x <= drawn.quantile(0.95, 0))
    assert 0.85 < float(is_inside[is_gone].double().mean()) < 0.95


# ------------------------------------------------------------------------------------------------------------- bad input
def spoiled(row: int, column: int, value: float) -> Tensor:
    x = X[:10].clone()
    x[row, column] = value
    return x


EMPTY = torch.where(torch.arange(6) == 1, math.nan, X[:10])


@graphless
@every_model
@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (X[:, 0], "x has shape (120,), but must be a table"),
        (X[:, :0], "x has no columns"),
        (X[:0], "no rows"),
        (X.long(), "x holds int64, but must be floating"),
        (spoiled(3, 1, math.inf), "x holds 1 values that are infinite, the first in row 3, column 1"),
        (EMPTY, "Column 1 of x has no value that is known. Remove the column."),
        (X[:, :2], "factors is 2 and there are 2 columns. Take at most 1"),
    ],
)
def test_tables_that_cannot_be_used_are_refused(name: str, x: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        EM(**START).fit(MODELS[name](2), x)
    assert sentence in str(caught.value)


@graphless
@every_model
def test_models_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="at least 1 factor"):
        MODELS[name](0)
    with pytest.raises(ValueError, match="Take at most 2"):
        MODELS[name](3, features=3)
    with pytest.raises(ValueError, match="x has 6 features, but this"):
        EM(**START).fit(MODELS[name](2, features=5), X)
    with pytest.raises(ValueError, match="has seen no data"):
        MODELS[name](2).model(size=3)
    with pytest.raises(ValueError, match="or the number of rows to draw"):
        MODELS[name](2, features=3).model()
    with pytest.raises(ValueError, match="these draws are of 6 features"):
        MODELS[name](2, features=6).score_samples(X[:, :5], parameters(name))


@graphless
@every_model
@pytest.mark.parametrize("backend", ["EM", "Gibbs", "SVI"])
@pytest.mark.parametrize("kind", quick(["few rows", "constant column", "same rows", "one row"], ("few rows", "one row")))
def test_poor_tables_have_a_posterior(name: str, backend: str, kind: str) -> None:
    tables = {"few rows": X[:4], "constant column": spoiled(0, 0, 1.0), "same rows": X[:1].expand(8, 6), "one row": X[:1]}
    x = tables[kind].clone()
    if kind == "constant column":
        x[:, 0] = 1e6
    backends = {
        "EM": EM(steps=5, standard_errors=False, **START), "Gibbs": Gibbs(chains=2, warmup=5, draws=5, **START),
        "SVI": SVI(steps=10, draws=5, **START),
    }  # fmt: skip
    posterior = backends[backend].fit(MODELS[name](2), x)
    assert all(bool(value.isfinite().all()) for value in posterior.draws.values())
    assert bool((torch.linalg.eigvalsh(posterior.draws["covariance"].double()) > 0).all())
