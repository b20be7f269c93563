"""The Gaussian mixture beside scikit-learn's, and what it does with draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings, Posterior, relabel
from inference.enumeration import log_normalizer
from inference.program import Program
from parameters import quick
from pyro_genmodels import GMM, datasets
from pyro_genmodels.classical.gmm import COVARIANCES

mixture = pytest.importorskip("sklearn.mixture")

X = datasets.load("faithful").x
WEIGHTS, MEANS = torch.tensor([0.5, 0.5]).double(), torch.tensor([[2.0, 55.0], [4.0, 80.0]]).double()
VARIANCES = torch.tensor([1.0, 100.0]).double()
START = {
    "full": torch.diag(VARIANCES).expand(2, 2, 2), "tied": torch.diag(VARIANCES),
    "diagonal": VARIANCES.expand(2, 2), "spherical": torch.tensor([10.0, 10.0]).double(),
}  # fmt: skip


def precisions(covariance: str, covariances: Tensor) -> Tensor:
    return covariances.inverse() if covariance in ("full", "tied") else covariances.reciprocal()


def theirs(covariance: str, **options: Any) -> Any:
    """scikit-learn's mixture, started where ours is."""
    return mixture.GaussianMixture(
        2,
        covariance_type={"diagonal": "diag"}.get(covariance, covariance),
        reg_covar=0.0,
        weights_init=WEIGHTS.numpy(),
        means_init=MEANS.numpy(),
        precisions_init=precisions(covariance, START[covariance]).numpy(),
        **options,
    )


def fitted(covariance: str, device: torch.device, **options: Any) -> Posterior:
    start = {"weights": WEIGHTS, "means": MEANS, "covariances": START[covariance]}
    backend = EM(objective="mle", start=start, seed=0, progress=False, **options)
    return backend.fit(GMM(2, covariance), X.to(device))


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_em_reaches_the_likelihood_of_scikit_learn_and_never_decreases(covariance: str, device: torch.device) -> None:
    posterior = fitted(covariance, device, steps=1000)
    peer = theirs(covariance, tol=1e-10, max_iter=1000).fit(X.numpy())
    climb = posterior.history["log_joint"]
    torch.testing.assert_close(float(climb[-1]), float(peer.score(X.numpy())) * len(X), rtol=1e-6, atol=0.0)
    assert float(climb.diff().min()) >= -1e-9 * abs(float(climb[-1]))
    point = posterior.point()
    order = point["means"][:, 0].argsort()
    torch.testing.assert_close(point["means"][order], torch.from_numpy(peer.means_), rtol=1e-4, atol=0.0)
    torch.testing.assert_close(point["weights"][order], torch.from_numpy(peer.weights_), rtol=1e-4, atol=0.0)


@pytest.mark.filterwarnings("ignore:Best performing initialization did not converge")
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_one_step_of_em_is_one_step_of_scikit_learns(covariance: str, device: torch.device) -> None:
    posterior = fitted(covariance, device, steps=1, restarts=1)
    peer = theirs(covariance, max_iter=1).fit(X.numpy())
    point = posterior.point()
    torch.testing.assert_close(point["weights"], torch.from_numpy(peer.weights_), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(point["means"], torch.from_numpy(peer.means_), rtol=1e-8, atol=0.0)
    torch.testing.assert_close(point["covariances"], torch.from_numpy(peer.covariances_), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_scores_and_labels_are_those_of_scikit_learn(covariance: str, device: torch.device) -> None:
    peer = theirs(covariance).fit(X.numpy())
    draws = {name: torch.from_numpy(getattr(peer, f"{name}_")).to(device) for name in ("weights", "means", "covariances")}
    model, x = GMM(2, covariance), X.to(device)
    scores, shares = torch.from_numpy(peer.score_samples(X.numpy())), torch.from_numpy(peer.predict_proba(X.numpy()))
    torch.testing.assert_close(model.score_samples(x, draws).cpu(), scores, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.predict_proba(x, draws).cpu(), shares, rtol=1e-9, atol=1e-9)
    assert torch.equal(model.predict(x, draws).cpu(), torch.from_numpy(peer.predict(X.numpy())))


@pytest.mark.parametrize("covariance", quick(COVARIANCES, ("full", "spherical")))
def test_scores_average_densities_over_the_draws(covariance: str, device: torch.device) -> None:
    x = X.to(device)
    model = GMM(2, covariance)
    start = {"means": MEANS}  # from elsewhere, a chain may stay where one component has all rows
    posterior = Gibbs(chains=2, warmup=100, draws=5, seed=0, progress=False, start=start).fit(model, x)
    single = [
        model.score_samples(x, {name: value[chain, draw] for name, value in posterior.draws.items()})
        for chain in range(2)
        for draw in range(5)
    ]
    expected = torch.stack(single).exp().mean(0).log()
    torch.testing.assert_close(model.score_samples(x, posterior), expected)
    shares = model.predict_proba(x, posterior)  # with the labels matched
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[:, 0]))
    assert float(shares.amax(-1).mean()) > 0.95


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_new_rows_have_the_moments_of_the_mixture(covariance: str) -> None:
    """Means within 4.5 standard errors: four covariances of two features, a false alarm in 2e4 runs."""
    draws = {"weights": torch.tensor([0.3, 0.7]).double(), "means": MEANS, "covariances": 2.0 * START[covariance]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = GMM(2, covariance).sample(4000, draws)
    assert rows.shape == (4000, 2)
    expected = draws["weights"] @ MEANS
    assert bool(((rows.mean(0) - expected).abs() < 4.5 * rows.std(0) / 4000**0.5).all())


# ----------------------------------------------------------------------------------------- entries that are missing
def gappy(share: float = 0.3, rows: int = len(X)) -> Tensor:
    """The rows with holes, the first one empty."""
    generator = torch.Generator().manual_seed(0)
    x = torch.where(torch.rand(rows, 2, generator=generator) < share, math.nan, X[:rows])
    x[0] = math.nan
    return x


def matrices(covariance: str, covariances: Tensor) -> Tensor:
    """Covariances of two components of two features in full, (2, 2, 2)."""
    if covariance == "full":
        return covariances
    if covariance == "tied":
        return covariances.expand(2, 2, 2)
    if covariance == "diagonal":
        return torch.diag_embed(covariances)
    return covariances.expand(2)[:, None, None] * torch.eye(2).double()


KINDS = (*COVARIANCES, "isotropic")
PARAMETERS = {
    "full": torch.tensor([[[0.5, 2.0], [2.0, 40.0]], [[0.3, 1.0], [1.0, 30.0]]]).double(),
    "tied": torch.tensor([[0.5, 2.0], [2.0, 40.0]]).double(),
    "diagonal": torch.tensor([[0.5, 40.0], [0.3, 30.0]]).double(),
    "spherical": torch.tensor([10.0, 20.0]).double(),
    "isotropic": torch.tensor(15.0).double(),
}
SHARES = torch.tensor([0.3, 0.7]).double()


def point(covariance: str) -> dict[str, Tensor]:
    return {"weights": SHARES, "means": MEANS, "covariances": PARAMETERS[covariance]}


def log_terms(covariance: str, x: Tensor) -> np.ndarray:
    """log w_k p_k(known entries), (rows, 2), by scipy."""
    terms = np.tile(SHARES.log().numpy(), (len(x), 1))
    for n, row in enumerate(x):
        known = (~row.isnan()).numpy()
        for k, full in enumerate(matrices(covariance, PARAMETERS[covariance]).numpy()):
            if known.any():
                normal = scipy.stats.multivariate_normal(MEANS[k].numpy()[known], full[np.ix_(known, known)])
                terms[n, k] += normal.logpdf(row.numpy()[known])
    return terms


@pytest.mark.parametrize("covariance", KINDS)
def test_scores_of_gappy_rows_are_marginals(covariance: str) -> None:
    x = gappy(rows=40)
    terms = log_terms(covariance, x)
    scores = scipy.special.logsumexp(terms, 1)
    model = GMM(2, covariance)
    np.testing.assert_allclose(model.score_samples(x, point(covariance)), scores, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(model.predict_proba(x, point(covariance)), np.exp(terms - scores[:, None]), rtol=1e-9)
    program = Program(GMM(2, covariance), (x,))
    values = point(covariance)
    found = float(log_normalizer(program, values, ("z",)))
    trace = poutine.trace(poutine.condition(program.call, values)).get_trace(x)
    trace.compute_log_prob()
    expected = scores.sum() + sum(float(trace.nodes[name]["log_prob"].sum()) for name in values)
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("covariance", KINDS)
def test_imputed_entries_are_conditional_means(covariance: str) -> None:
    x = gappy(rows=40)
    terms = log_terms(covariance, x)
    shares = np.exp(terms - scipy.special.logsumexp(terms, 1)[:, None])
    expected = x.numpy().copy()
    for n, row in enumerate(x.numpy()):
        known, unknown = ~np.isnan(row), np.isnan(row)
        means = []
        for k, full in enumerate(matrices(covariance, PARAMETERS[covariance]).numpy()):
            mean = MEANS[k].numpy()
            slope = full[np.ix_(unknown, known)] @ np.linalg.inv(full[np.ix_(known, known)])
            means.append(mean[unknown] + slope @ (row[known] - mean[known]))
        expected[n, unknown] = shares[n] @ np.stack(means)
    np.testing.assert_allclose(GMM(2, covariance).impute(x, point(covariance)), expected, rtol=1e-9)


@pytest.mark.parametrize("covariance", KINDS)
def test_imputations_have_the_imputed_mean(covariance: str) -> None:
    """Within 5 standard errors: five kinds of 26 entries, a false alarm in 1e4 runs."""
    x = gappy(rows=40)
    model = GMM(2, covariance)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = model.imputations(x, point(covariance), 2000)
    assert torch.equal(drawn[:, ~x.isnan()], x[~x.isnan()].expand(2000, -1))
    unknown = drawn[:, x.isnan()]
    error = (unknown.mean(0) - model.impute(x, point(covariance))[x.isnan()]).abs()
    assert bool((error < 5.0 * unknown.std(0) / 2000**0.5).all())


@pytest.mark.parametrize("covariance", KINDS)
def test_em_climbs_to_a_fixed_point_of_what_is_known(covariance: str) -> None:
    """The slope of Σ log p(known entries) is zero at the end, by torch's autograd on scipy's formula of marginals."""
    x = gappy()
    start = {
        "weights": WEIGHTS,
        "means": MEANS,
        "covariances": (START | {"isotropic": torch.tensor(10.0).double()})[covariance],
    }
    backend = EM(objective="mle", start=start, steps=2000, tolerance=1e-9, seed=0, progress=False, standard_errors=False)
    posterior = backend.fit(GMM(2, covariance), x)
    assert float(posterior.history["log_joint"].diff().min()) >= -1e-9 * abs(float(posterior.history["log_joint"][-1]))
    at = {name: value.clone().requires_grad_() for name, value in posterior.point().items() if name != "z"}
    total: Any = 0.0
    full = matrices(covariance, at["covariances"])
    for row in x:
        known = (~row.isnan()).nonzero().squeeze(1)
        if len(known):
            normals = [
                torch.distributions.MultivariateNormal(at["means"][k][known], full[k][known][:, known]).log_prob(row[known])
                for k in range(2)
            ]
            total = total + (at["weights"].log() + torch.stack(normals)).logsumexp(0)
    slopes = torch.autograd.grad(total, [at["means"], at["covariances"]])
    assert float(total.detach()) == pytest.approx(float(posterior.history["log_joint"][-1]), rel=1e-9)
    for slope, value in zip(slopes, (at["means"], at["covariances"]), strict=True):
        assert float((slope * value.detach().abs().max()).abs().max()) < 1e-3


def test_rows_of_which_nothing_is_known_say_nothing() -> None:
    x = gappy()
    more = torch.cat([x, torch.full((50, 2), math.nan).double()])
    start = {"weights": WEIGHTS, "means": MEANS, "covariances": START["full"]}
    backend = EM(start=start, tolerance=1e-10, steps=1000, objective="mle", seed=0, progress=False, standard_errors=False)
    one, two = (backend.fit(GMM(2), rows).point() for rows in (x, more))
    for name in ("means", "covariances"):
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_samplers_agree_on_gappy_rows(covariance: str) -> None:
    """One component, means of means and covariances from three samplers: within 5 standard errors of the difference,
    some thirty numbers, a false alarm in 5e4 runs."""
    x = gappy(rows=60)
    backends = {
        "Gibbs": Gibbs(chains=4, warmup=300, draws=1000, seed=0, progress=False),
        "HMC": HMC(chains=8, warmup=300, draws=500, seed=1, progress=False),
        "MetropolisHastings": MetropolisHastings(chains=16, warmup=1000, draws=1000, thin=5, seed=2, progress=False),
    }
    found = {}
    for name, backend in backends.items():
        draws = backend.fit(GMM(1, covariance), x).draws
        flat = torch.cat([draws[site].flatten(2) for site in ("means", "covariances")], -1)
        batches = flat.reshape(-1, flat.shape[1] // 10, flat.shape[2]).mean(1)  # batch means of ten batches a chain
        found[name] = flat.mean((0, 1)), batches.std(0) / len(batches) ** 0.5
    for name in ("HMC", "MetropolisHastings"):
        error = (found[name][1].square() + found["Gibbs"][1].square()).sqrt()
        assert bool(((found[name][0] - found["Gibbs"][0]).abs() < 5.0 * error).all()), name


@pytest.mark.slow
def test_gibbs_draws_missing_entries_from_their_conditional(device: torch.device) -> None:
    """Two ways to one posterior: entries integrated out, and drawn. Means of the component and of the entries in one
    column, within 5 standard errors from 16 chains: some twenty numbers, a false alarm in 3e2 runs (t, 15 degrees)."""
    x = gappy(rows=25).to(device)
    backend = Gibbs(chains=16, warmup=60, draws=150, seed=0, progress=False)
    drawn, summed = backend.fit(GMM(1, missing="drawn"), x), backend.fit(GMM(1), x)
    kinds = {"missing": "Gaussian", "means": "Gaussian", "covariances": "InverseWishart"}
    assert {name: drawn.plan[name].update for name in kinds} == kinds
    assert max(drawn.plan[name].certificate for name in kinds) < 1e-7
    model = GMM(1)
    by_chain = [
        model.impute(x, {name: value[chain] for name, value in summed.draws.items()}) for chain in range(16)
    ]  # Rao-Blackwellised
    is_gone = x.isnan()
    one, two = drawn.draws["missing"].mean(1)[:, is_gone], torch.stack(by_chain)[:, is_gone]
    pairs = [(one, two), *((drawn.draws[n].mean(1).flatten(1), summed.draws[n].mean(1).flatten(1)) for n in ("means",))]
    for a, b in pairs:
        error = ((a.var(0) + b.var(0)) / 16).sqrt()
        assert bool(((a.mean(0) - b.mean(0)).abs() < 5.0 * error).all())


def test_svi_fits_gappy_and_weighted_rows() -> None:
    x = gappy()
    posterior = SVI(steps=600, seed=0, progress=False).fit(GMM(2), x, row_weights=torch.ones(len(x)).double())
    means = posterior.point()["means"].sort(0).values
    torch.testing.assert_close(means, MEANS, rtol=0.1, atol=0.0)


# ---------------------------------------------------------------------------------------------- weights of rows
COUNTS = torch.randint(0, 4, (len(X),), generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("covariance", quick(KINDS, ("full", "isotropic")))
def test_a_row_of_weight_two_is_two_rows(covariance: str) -> None:
    x = gappy(0.2)
    start = {"means": MEANS}
    backend = EM(start=start, tolerance=1e-10, steps=3000, seed=0, progress=False, standard_errors=False)
    one = backend.fit(GMM(2, covariance), x, row_weights=COUNTS)
    two = backend.fit(GMM(2, covariance), x.repeat_interleave(COUNTS.long(), 0))
    torch.testing.assert_close(one.stats["lp"], two.stats["lp"], rtol=1e-9, atol=0.0)
    a, b = (posterior.point()["means"].sort(0).values for posterior in (one, two))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=0.0)


def test_the_density_of_weighted_rows_is_that_of_repeated_rows_with_labels_summed_out() -> None:
    """What HMC, Metropolis-Hastings, SVI and Gibbs see."""
    weighted = Program(GMM(2), (X,), {"row_weights": COUNTS})
    repeated = Program(GMM(2), (X.repeat_interleave(COUNTS.long(), 0),))
    values = point("full")
    one, two = float(weighted.log_joint(values)), float(log_normalizer(repeated, values, ("z",)))
    assert one == pytest.approx(two, rel=1e-9)


# -------------------------------------------------------------------------------------------------- k-means
@pytest.mark.parametrize("clusters", [2, 5])
def test_hard_em_with_one_variance_is_k_means(clusters: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    standard = (X - X.mean(0)) / X.std(0)
    first = standard[:: len(X) // clusters][:clusters]
    peer = cluster.KMeans(clusters, init=first.numpy(), n_init=1, algorithm="lloyd", tol=0.0, max_iter=1000).fit(
        standard.numpy()
    )
    start = {"means": first, "covariances": torch.tensor(1.0).double()}
    backend = EM(hard=True, objective="mle", start=start, steps=1000, seed=0, progress=False)
    posterior = backend.fit(GMM(clusters, "isotropic", weights="equal"), standard)
    torch.testing.assert_close(posterior.point()["means"], torch.from_numpy(peer.cluster_centers_), rtol=1e-8, atol=1e-10)
    assert np.array_equal(posterior.draws["z"][0, 0].numpy(), peer.labels_)
    distortion = float(posterior.point()["covariances"]) * standard.numel()
    assert distortion == pytest.approx(peer.inertia_, rel=1e-9)


# --------------------------------------------------------------------------------------------------- criteria, start
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_criteria_are_those_of_scikit_learn(covariance: str) -> None:
    peer = theirs(covariance).fit(X.numpy())
    draws = {name: torch.from_numpy(getattr(peer, f"{name}_")) for name in ("weights", "means", "covariances")}
    model = GMM(2, covariance, features=2)
    assert model.aic(X, draws) == pytest.approx(peer.aic(X.numpy()), rel=1e-9)
    assert model.bic(X, draws) == pytest.approx(peer.bic(X.numpy()), rel=1e-9)
    twice = torch.full((len(X),), 2.0).double()
    assert model.bic(X, draws, twice) == pytest.approx(peer.bic(np.tile(X.numpy(), (2, 1))), rel=1e-9)


def test_em_starts_as_well_as_scikit_learn() -> None:
    """Sixteen components: the best of five ends within a hundredth of a nat a row of the best of scikit-learn's five."""
    generator = torch.Generator().manual_seed(0)
    means = 2.0 * torch.randn(16, 8, generator=generator).double()
    x = means[torch.randint(16, (3000,), generator=generator)] + torch.randn(3000, 8, generator=generator).double()
    peer = mixture.GaussianMixture(16, covariance_type="spherical", n_init=5, tol=1e-6, max_iter=500, random_state=0).fit(
        x.numpy()
    )
    backend = EM(objective="mle", restarts=5, seed=0, steps=500, progress=False, standard_errors=False)
    posterior = backend.fit(GMM(16, "spherical"), x)
    assert float(posterior.stats["lp"]) / len(x) > peer.score(x.numpy()) - 0.01


def test_a_start_needs_no_distinct_rows() -> None:
    model = GMM(3)
    found = model.start(torch.ones(6, 2).double())
    assert all(bool(value.isfinite().all()) for value in found.values())
    posterior = EM(seed=0, progress=False, standard_errors=False).fit(GMM(3), torch.ones(6, 2).double())
    assert bool(posterior.point()["covariances"].isfinite().all())


@pytest.mark.parametrize("covariance", quick(COVARIANCES, ("full", "spherical")))
def test_variances_of_float32_rows_far_from_zero_are_positive(covariance: str) -> None:
    x = 1000.0 + torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    backend = EM(objective="mle", dtype=torch.float32, seed=0, progress=False, standard_errors=False)
    found = matrices(covariance, backend.fit(GMM(2, covariance), x).point()["covariances"])
    assert float(torch.linalg.eigvalsh(found.double()).min()) > 0.05


def test_one_known_value_in_a_column_is_enough() -> None:
    x = X[:30].clone()
    x[1:, 1] = math.nan
    posterior = EM(seed=0, progress=False, standard_errors=False).fit(GMM(2), x)
    assert all(bool(value.isfinite().all()) for value in posterior.point().values() if value.is_floating_point())


# ------------------------------------------------------------------------------------------------ sticks
@pytest.mark.slow
def test_sticks_break_as_they_should() -> None:
    """w_k = v_k Π (1 − v_j), and the rest for the last; the labels of a Gibbs run empty most of twelve components."""
    model = GMM(12, weights="stick-breaking", concentration=None)
    posterior = Gibbs(chains=2, warmup=60, draws=60, seed=0, progress=False).fit(model, X)
    sticks, weights = posterior.draws["sticks"], posterior.draws["weights"]
    left = torch.ones_like(sticks[..., 0])
    for k in range(11):
        torch.testing.assert_close(weights[..., k], left * sticks[..., k])
        left = left * (1.0 - sticks[..., k])
    torch.testing.assert_close(weights[..., 11], left)
    assert {posterior.plan[name].update for name in ("sticks", "concentration", "z")} == {"Beta", "Gamma", "Enumerate"}
    occupied = torch.tensor([[len(z.unique()) for z in chain] for chain in posterior.draws["z"]])
    assert float(occupied.double().mean()) < 8.0


@pytest.mark.slow
def test_the_dirichlet_process_finds_the_groups_of_galaxies() -> None:
    """Velocities of 82 galaxies, truncated at 20. Two seeds agree on the number of occupied components within 5 standard
    errors from 16 chains each (a false alarm in 1e4 runs); both ends of the velocities are clusters of their own."""
    x = datasets.load("galaxies").x.double()
    model = GMM(20, "diagonal", weights="stick-breaking", concentration=None)
    found = [Gibbs(chains=16, warmup=300, draws=500, seed=seed, progress=False).fit(model, x) for seed in (0, 1)]
    sizes = [relabel.occupied(posterior.draws["z"]).double().mean(1) for posterior in found]
    error = sum(float(size.var()) / 16 for size in sizes) ** 0.5
    assert abs(float(sizes[0].mean() - sizes[1].mean())) < 5.0 * error
    clusters = relabel.partition(found[0].draws["z"][:, ::10])
    order = x[:, 0].argsort()
    lowest, middle, highest = clusters[order[0]], clusters[order[40]], clusters[order[-1]]
    assert len({int(lowest), int(middle), int(highest)}) == 3


@pytest.mark.slow
def test_half_of_a_table_is_filled_in_better_than_by_regressions() -> None:
    """The thirty measurements of 569 tumours: mean squared error of a multivariate normal 0.23 at most, in standard units.

    90 % intervals hold 90 ± 3 % if they are those of Gibbs, which does not know the parameters either; those at EM's point
    are narrower.
    """
    sets = pytest.importorskip("sklearn.datasets")
    x = torch.from_numpy(sets.load_breast_cancer().data).double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    is_gone = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    gaps = torch.where(is_gone, math.nan, x)
    model = GMM(1)
    posterior = EM(steps=100, standard_errors=False, seed=0, progress=False).fit(model, gaps)
    assert float((model.impute(gaps, posterior) - x)[is_gone].square().mean()) <= 0.23
    gibbs = Gibbs(chains=2, warmup=40, draws=60, keep=("missing",), seed=0, progress=False)
    drawn = gibbs.fit(GMM(1, missing="drawn"), gaps).draws["missing"].flatten(0, 1)
    assert float((drawn.mean(0) - x)[is_gone].square().mean()) <= 0.23
    is_inside = (x >= drawn.quantile(0.05, 0)) & (x <= drawn.quantile(0.95, 0))
    assert 0.87 < float(is_inside[is_gone].double().mean()) < 0.93


# ----------------------------------------------------------------------------------------- rows with noise
NOISES = {"sphere": 3.0, "covariance": torch.tensor([[0.5, -1.0], [-1.0, 30.0]]).double()}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("covariance", KINDS)
def test_denoised_rows_are_posterior_means(covariance: str, noise: str) -> None:
    """By quadrature over x of p(x) N(y | x, R), p the density that two draws have on average."""
    y, model = X[:4] + torch.tensor([0.5, -6.0]).double(), GMM(2, covariance)
    both = [(SHARES, MEANS, PARAMETERS[covariance]), (WEIGHTS, MEANS.flip(0) + 1.0, 1.5 * PARAMETERS[covariance])]
    draws = {name: torch.stack(parts) for name, parts in zip(("weights", "means", "covariances"), zip(*both))}
    spread = NOISES[noise] if noise == "covariance" else NOISES[noise] ** 2 * torch.eye(2).double()
    ends = ((-40.0, 45.0, 601), (-30.0, 170.0, 401))
    grid = torch.cartesian_prod(*(torch.linspace(*end, dtype=torch.float64) for end in ends))
    density = torch.zeros_like(grid[:, 0])
    for weights, means, covariances in both:
        for weight, mean, full in zip(weights, means, matrices(covariance, covariances)):
            density += weight * torch.distributions.MultivariateNormal(mean, full).log_prob(grid).exp()
    for row, found in zip(y, model.denoise(y, NOISES[noise], draws)):
        posterior = density * torch.distributions.MultivariateNormal(row, spread).log_prob(grid).exp()
        torch.testing.assert_close(found, posterior @ grid / posterior.sum(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("covariance", KINDS)
def test_rows_without_noise_stay_and_with_much_noise_go_to_the_mean(covariance: str) -> None:
    model, draws = GMM(2, covariance), point(covariance)
    torch.testing.assert_close(model.denoise(X, 0.0, draws), X)
    far = model.denoise(X, 1e6, draws)
    torch.testing.assert_close(far, (SHARES @ MEANS).expand_as(X), rtol=1e-4, atol=0.0)


def test_a_component_far_away_cannot_overflow() -> None:
    model = GMM(2, "isotropic")
    y = torch.tensor([[1e5, -1e5]]).double()
    draws = {"weights": WEIGHTS.new_tensor([1.0, 0.0]), "means": MEANS, "covariances": torch.tensor(4.0).double()}
    torch.testing.assert_close(model.denoise(y, 2.0, draws), 0.5 * (y + MEANS[:1]))


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (-1.0, "standard deviation must be"),
        (math.nan, "standard deviation must be"),
        (torch.ones(2), "torch.diag"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
    ],
)
def test_noise_that_is_none_is_refused(noise: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GMM(2).denoise(X, noise, point("full"))


def test_gappy_rows_are_not_denoised() -> None:
    with pytest.raises(ValueError, match="row 0, column 0.*impute"):
        GMM(2).denoise(gappy(), 1.0, point("full"))
    with pytest.raises(ValueError, match="of 2 features"):
        GMM(2).denoise(X[:, :1], 1.0, point("full"))


@pytest.mark.parametrize("arguments", [{"weights": "some"}, {"weights": "stick-breaking", "concentration": 0.0}])
def test_a_mixture_refuses_weights_that_it_does_not_know(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(reversed(arguments))):
        GMM(3, **arguments)
    with pytest.raises(ValueError, match="fewer than 2"):
        GMM(1, weights="stick-breaking")


@pytest.mark.parametrize("covariance", quick(["tied", "full"], ("full",)))
def test_no_chain_starts_in_a_mode_that_it_cannot_leave(covariance: str, device: torch.device) -> None:
    """From the prior 7 of 24 chains stayed with one component for all rows; each starts from clusters of its own."""
    posterior = Gibbs(chains=24, warmup=40, draws=30, seed=0, progress=False).fit(GMM(2, covariance), X.to(device))
    assert float(posterior.draws["weights"].amax(-1).mean(1).max()) < 0.75
    lp = posterior.stats["lp"].mean(1)
    assert float(lp.max() - lp.min()) < 6.0 * float(posterior.stats["lp"].std(1).mean())
