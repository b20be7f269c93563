"""EM against closed forms: textbook updates, k-means, exact marginal likelihoods, and the information at the mode."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor, nn

from inference import EM, HMC, Gibbs, MetropolisHastings, Unsupported
from inference.acceleration import Path
from inference.expectation import Completed
from inference.program import Program
from inference.sites import Site
from pyro_genmodels import GMM, datasets
from pyro_genmodels.distributions import InverseWishart

FAITHFUL = datasets.load("faithful").x


def em(**options: Any) -> EM:
    return EM(**{"seed": 0, "progress": False, **options})


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curvature_errors(log_density: Any, at: np.ndarray) -> np.ndarray:
    """Standard errors from central second differences of a log-density written in numpy."""
    steps, size = 1e-4 * (1.0 + np.abs(at)), len(at)
    hessian = np.empty((size, size))
    for i in range(size):
        for j in range(size):
            a, b = np.eye(size)[i] * steps[i], np.eye(size)[j] * steps[j]
            corners = log_density(at + a + b) - log_density(at + a - b) - log_density(at - a + b) + log_density(at - a - b)
            hessian[i, j] = corners / (4 * steps[i] * steps[j])
    return np.sqrt(np.diag(np.linalg.inv(-hessian)))


# ------------------------------------------------------------------------------------------------ finite latents
def clusters(x: Tensor) -> None:
    """Three normals of the same width and weight."""
    with pyro.plate("cluster", 3):
        centre = pyro.sample("centre", dist.Normal(x.new_zeros(2), 100.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(x.new_ones(3)))
        pyro.sample("x", dist.Normal(centre[z], 0.5).to_event(1), obs=x)


def k_means(x: Tensor, start: Tensor) -> Any:
    return pytest.importorskip("sklearn.cluster").KMeans(len(start), init=start.numpy(), n_init=1, tol=0.0).fit(x.numpy())


def test_hard_assignments_to_equal_spheres_are_k_means(device: torch.device) -> None:
    x = (FAITHFUL - FAITHFUL.mean(0)) / FAITHFUL.std(0)
    start = x[:3] + torch.tensor([[0.0, 0.0], [0.1, 0.2], [-0.1, 0.1]])
    peer = k_means(x, start)
    point = em(hard=True, objective="mle", start={"centre": start}).fit(clusters, x.to(device)).point()
    assert (point["z"].numpy() == peer.labels_).all()
    np.testing.assert_allclose(point["centre"].numpy(), peer.cluster_centers_, rtol=1e-10)
    distortion = float((x - point["centre"][point["z"]]).square().sum())
    assert distortion == pytest.approx(peer.inertia_, rel=1e-10)


@pytest.mark.parametrize("covariance", ["spherical", "tied"])
def test_a_mixture_of_equal_spheres_is_k_means(covariance: str) -> None:
    """The model of the zoo, with its weights and covariances held equal from outside."""
    x = (FAITHFUL - FAITHFUL.mean(0)) / FAITHFUL.std(0)
    shape = {"spherical": torch.full((2,), 0.1), "tied": 0.1 * torch.eye(2)}[covariance].double()
    model = poutine.condition(GMM(2, covariance).model, {"weights": torch.ones(2).double() / 2, "covariances": shape})
    peer = k_means(x, x[:2])
    point = em(hard=True, objective="mle", maximise=["means"], start={"means": x[:2]}).fit(model, x).point()
    assert (point["z"].numpy() == peer.labels_).all()
    np.testing.assert_allclose(point["means"].numpy(), peer.cluster_centers_, rtol=1e-10)


SYMBOLS = torch.tensor([0, 0, 1, 0, 2, 2, 1, 2, 2, 0, 0, 1])
INITIAL = torch.tensor([0.6, 0.4], dtype=torch.float64)


def chain(symbols: Tensor) -> None:
    """A hidden Markov chain written as a loop."""
    with pyro.plate("state", 2):
        transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2)))
        emission = pyro.sample("emission", dist.Dirichlet(torch.ones(3)))
    z: Any = None
    for t in pyro.markov(range(len(symbols))):
        z = pyro.sample(f"z_{t}", dist.Categorical(INITIAL.to(symbols.device) if z is None else transition[z]))
        pyro.sample(f"x_{t}", dist.Categorical(emission[z]), obs=symbols[t])


def baum_welch(transition: np.ndarray, emission: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """One step of the textbook (Bishop, section 13.2), and the log-likelihood before it."""
    x, count = SYMBOLS.numpy(), len(SYMBOLS)
    forward, backward = np.zeros((count, 2)), np.ones((count, 2))
    forward[0] = INITIAL.numpy() * emission[:, x[0]]
    for t in range(1, count):
        forward[t] = forward[t - 1] @ transition * emission[:, x[t]]
    for t in reversed(range(count - 1)):
        backward[t] = transition @ (emission[:, x[t + 1]] * backward[t + 1])
    likelihood = forward[-1].sum()
    share = forward * backward / likelihood
    pairs = sum(
        np.outer(forward[t], emission[:, x[t + 1]] * backward[t + 1]) * transition / likelihood for t in range(count - 1)
    )
    seen = np.stack([share[x == symbol].sum(0) for symbol in range(3)], 1)
    return pairs / pairs.sum(1, keepdims=True), seen / seen.sum(1, keepdims=True), math.log(likelihood)


def test_a_step_on_a_hidden_chain_is_a_step_of_baum_and_welch(device: torch.device) -> None:
    start = {"transition": [[0.7, 0.3], [0.2, 0.8]], "emission": [[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in start.items()}
    posterior = em(steps=1, objective="mle", start=tensors, standard_errors=False).fit(chain, SYMBOLS.to(device))
    transition, emission, log_likelihood = baum_welch(*(tensor.numpy() for tensor in tensors.values()))
    np.testing.assert_allclose(posterior.point()["transition"].numpy(), transition, rtol=1e-10)
    np.testing.assert_allclose(posterior.point()["emission"].numpy(), emission, rtol=1e-10)
    assert float(posterior.history["log_joint"][0]) == pytest.approx(log_likelihood, rel=1e-10)
    assert float(posterior.stats["lp"]) == pytest.approx(baum_welch(transition, emission)[2], rel=1e-10)


# ---------------------------------------------------------------------------------------------- Gaussian latents
GROUPS, SIZE = 12, 5
Y = (2.0 + 1.5 * normal(GROUPS, seed=1))[:, None] + 0.8 * normal(GROUPS, SIZE, seed=2)


def intercepts(y: Tensor) -> None:
    """Random intercepts of a balanced one-way layout."""
    mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
    between = pyro.sample("between", dist.HalfCauchy(2.0))
    within = pyro.sample("within", dist.HalfCauchy(2.0))
    with pyro.plate("group", y.shape[0], dim=-2):
        u = pyro.sample("u", dist.Normal(mean, between))
        with pyro.plate("row", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(u, within), obs=y)


def one_way() -> dict[str, float]:
    """The maximum of the likelihood, in closed form (Searle, Casella and McCulloch 1992, section 4.3)."""
    y = Y.numpy()
    means = y.mean(1)
    within = ((y - means[:, None]) ** 2).sum() / (GROUPS * (SIZE - 1))
    between = (SIZE * ((means - means.mean()) ** 2).sum() / GROUPS - within) / SIZE
    return {"mean": means.mean(), "between": math.sqrt(between), "within": math.sqrt(within)}


def one_way_likelihood(at: np.ndarray) -> float:
    mean, between, within = at
    covariance = within**2 * np.eye(SIZE) + between**2
    return float(scipy.stats.multivariate_normal.logpdf(Y.numpy(), np.full(SIZE, mean), covariance).sum())


def test_random_intercepts_have_their_closed_form(device: torch.device) -> None:
    posterior = em(objective="mle", tolerance=1e-10, steps=500).fit(intercepts, Y.to(device))
    assert posterior.plan is not None and posterior.plan["u"].update == "Gaussian" and not posterior.info["findings"]
    exact = one_way()
    for name, value in exact.items():
        assert float(posterior.draws[name]) == pytest.approx(value, rel=1e-7), name
    at = np.array([*exact.values()])
    assert float(posterior.stats["lp"]) == pytest.approx(one_way_likelihood(at), rel=1e-10)
    errors = [float(posterior.stats[f"standard_error_{name}"]) for name in exact]
    np.testing.assert_allclose(errors, curvature_errors(one_way_likelihood, at), rtol=1e-4)


SAMPLERS = {
    "Gibbs": Gibbs(chains=32, thin=1),
    "HMC": HMC(chains=32),
    "MetropolisHastings": MetropolisHastings(chains=64, thin=40),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_e_step_by_draws_agrees_with_the_exact_one(sampler: str) -> None:
    """Mode within 6 % of a standard error, standard errors by Louis' identity within 25 %.

    The latents hold at most f = 0.28 of the complete information (of ``between``), so that N draws leave an error of
    √(f / N) standard errors: 1.7 % for 30 averaged steps of 32 draws. A random walk needs some 40 moves for a fresh draw
    in 12 dimensions: twice the draws, of 40 moves. The limit is 3.5 such errors, 9 times: a false alarm in 200 runs.
    """
    posterior = em(objective="mle", steps=60, e_step=SAMPLERS[sampler]).fit(intercepts, Y)
    assert posterior.plan is not None and posterior.plan["u"].update.startswith("Monte-Carlo")
    assert not posterior.info["findings"]
    exact = one_way()
    errors = curvature_errors(one_way_likelihood, np.array([*exact.values()]))
    for (name, value), error in zip(exact.items(), errors, strict=True):
        assert abs(float(posterior.draws[name]) - value) < 0.06 * error, name
        assert abs(float(posterior.stats[f"standard_error_{name}"]) / error - 1) < 0.25, name


ROWS, FEATURES = 60, 5
LOADED = normal(ROWS, 2, seed=3) @ normal(2, FEATURES, seed=4) + 0.5 * normal(ROWS, FEATURES, seed=5)


def components(x: Tensor) -> None:
    """Probabilistic principal components."""
    loadings = pyro.sample("loadings", dist.Normal(x.new_zeros(FEATURES, 2), 10.0).to_event(2))
    noise = pyro.sample("noise", dist.InverseGamma(1.0, 1.0))
    with pyro.plate("rows", len(x)):
        factor = pyro.sample("factor", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(factor @ loadings.mT, noise.sqrt()).to_event(1), obs=x)


def components_likelihood() -> tuple[float, float]:
    """Largest log-likelihood, and the noise there: the mean of the eigenvalues that are left (Tipping and Bishop 1999)."""
    values = np.linalg.eigvalsh((LOADED.T @ LOADED / ROWS).numpy())[::-1]
    noise = values[2:].mean()
    log_det = np.log(values[:2]).sum() + (FEATURES - 2) * math.log(noise)
    return -0.5 * ROWS * (FEATURES * math.log(2 * math.pi) + log_det + FEATURES), noise


def test_probabilistic_components_reach_the_closed_form_likelihood(device: torch.device) -> None:
    posterior = em(objective="mle", steps=2000, tolerance=1e-7).fit(components, LOADED.to(device))
    best, noise = components_likelihood()
    assert float(posterior.stats["lp"]) == pytest.approx(best, rel=1e-8)
    assert float(posterior.draws["noise"]) == pytest.approx(noise, rel=1e-4)
    climb = posterior.history["log_joint"]
    assert float(climb.diff().min()) >= -1e-9 * abs(float(climb[-1]))
    # a rotation of the loadings changes nothing: along that ridge there is no standard error
    assert bool(posterior.stats["standard_error_loadings"].isnan().all())
    error = noise * math.sqrt(2 / (ROWS * (FEATURES - 2)))
    assert float(posterior.stats["standard_error_noise"]) == pytest.approx(error, rel=1e-3)
    assert any("standard error" in finding for finding in posterior.diagnose())


LEVELS = normal(12, seed=6).cumsum(0) + normal(12, seed=7)


def local_level(y: Tensor) -> None:
    """A random walk seen through noise, one site a step."""
    drift = pyro.sample("drift", dist.InverseGamma(2.0, 1.0))
    noise = pyro.sample("noise", dist.InverseGamma(2.0, 1.0))
    level = y.new_zeros(())
    for t in pyro.markov(range(len(y))):
        level = pyro.sample(f"level_{t}", dist.Normal(level, drift.sqrt()))
        pyro.sample(f"y_{t}", dist.Normal(level, noise.sqrt()), obs=y[t])


def test_a_state_space_of_many_sites_is_one_gaussian(device: torch.device) -> None:
    """The maximum of the likelihood is a fixed point, with its likelihood, standard errors and smoothed levels."""
    steps = np.arange(1, 1 + len(LEVELS))
    walk, eye = np.minimum.outer(steps, steps), np.eye(len(LEVELS))

    def log_likelihood(at: np.ndarray) -> float:
        return float(scipy.stats.multivariate_normal.logpdf(LEVELS.numpy(), cov=at[0] * walk + at[1] * eye))

    found = scipy.optimize.minimize(
        lambda log: -log_likelihood(np.exp(log)), [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
    )
    at = np.exp(found.x)
    backend = em(maximise=["drift", "noise"], objective="mle", steps=4, start={"drift": at[0], "noise": at[1]})
    posterior = backend.fit(local_level, LEVELS.to(device))
    assert posterior.plan is not None and posterior.plan["level_3"].update == "Gaussian"
    np.testing.assert_allclose([float(posterior.draws[name]) for name in ("drift", "noise")], at, rtol=1e-6)
    assert float(posterior.stats["lp"]) == pytest.approx(log_likelihood(at), rel=1e-10)
    errors = [float(posterior.stats[f"standard_error_{name}"]) for name in ("drift", "noise")]
    np.testing.assert_allclose(errors, curvature_errors(log_likelihood, at), rtol=1e-3)
    smoothed = at[0] * walk @ np.linalg.solve(at[0] * walk + at[1] * eye, LEVELS.numpy())
    np.testing.assert_allclose([float(posterior.draws[f"level_{t - 1}"]) for t in steps], smoothed, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- no closed form
DESIGN = torch.cat([torch.ones(40, 1).double(), normal(40, 2, seed=8)], 1)
LABELS = (torch.sigmoid(DESIGN @ torch.tensor([0.3, 1.0, -0.7]).double()) > 0.5 + 0.3 * normal(40, seed=9)).double()


def logistic(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(3), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=design @ beta), obs=y)


class Network(nn.Module):
    """The same regression, its coefficients being weights; ``width`` of them are padding, to pass for a network."""

    def __init__(self, width: int = 0) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.zeros(3 + width, dtype=torch.float64))

    def model(self, design: Tensor, y: Tensor) -> None:
        padded = torch.cat([design, design.new_zeros(len(design), len(self.beta) - 3)], 1)
        pyro.factor("penalty", -self.beta.square().sum() / 8.0)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=padded @ self.beta), obs=y)


def logistic_mode() -> tuple[np.ndarray, np.ndarray]:
    """Mode and standard errors by Newton's method."""
    design, y, beta = DESIGN.numpy(), LABELS.numpy(), np.zeros(3)
    for _ in range(50):
        p = scipy.special.expit(design @ beta)
        information = design.T * (p * (1 - p)) @ design + np.eye(3) / 4.0
        beta = beta + np.linalg.solve(information, design.T @ (y - p) - beta / 4.0)
    return beta, np.sqrt(np.diag(np.linalg.inv(information)))


def test_without_a_closed_form_the_gradient_climbs(device: torch.device) -> None:
    posterior = em().fit(logistic, DESIGN.to(device), LABELS.to(device))
    mode, errors = logistic_mode()
    np.testing.assert_allclose(posterior.point()["beta"].numpy(), mode, rtol=1e-5)
    np.testing.assert_allclose(posterior.stats["standard_error_beta"][0, 0].numpy(), errors, rtol=1e-5)


@pytest.mark.parametrize("width", [0, 1500], ids=["L-BFGS", "Adam"])
def test_weights_are_trained_and_the_objective_never_falls(width: int) -> None:
    posterior = em(steps=60, learning_rate=0.05).fit(Network(width), DESIGN, LABELS)
    np.testing.assert_allclose(posterior.weights["beta"][:3].numpy(), logistic_mode()[0], atol=1e-3)
    climb = posterior.history["log_joint"]
    assert float(climb.diff().min()) >= -1e-9 * abs(float(climb[-1]))


# ----------------------------------------------------------------------------------------------------- standard errors
def test_standard_errors_of_a_normal_and_a_poisson() -> None:
    def program(y: Tensor, counts: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        variance = pyro.sample("variance", dist.InverseGamma(1.0, 1.0))
        rate = pyro.sample("rate", dist.Gamma(1.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, variance.sqrt()), obs=y)
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    y, counts = 3.0 * normal(30, seed=10), torch.arange(30).double() % 7
    posterior = em(objective="mle", tolerance=1e-9).fit(program, y, counts)
    variance = float(y.var(correction=0))
    expected = {"mean": math.sqrt(variance / 30), "variance": variance * math.sqrt(2 / 30)}
    expected["rate"] = math.sqrt(float(counts.mean()) / 30)
    for name, error in expected.items():
        assert float(posterior.stats[f"standard_error_{name}"]) == pytest.approx(error, rel=1e-6), name


def test_standard_errors_of_shares_lie_on_the_simplex() -> None:
    """√(p (1 − p) / n): the delta method through the coordinates of the simplex is exact at the mode."""

    def program(counts: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        pyro.sample("counts", dist.Multinomial(int(counts.sum()), shares), obs=counts)

    counts = torch.tensor([12.0, 30.0, 8.0]).double()
    posterior = em().fit(program, counts)
    p = counts.numpy() / 50
    np.testing.assert_allclose(posterior.draws["shares"][0, 0].numpy(), p, rtol=1e-9)
    np.testing.assert_allclose(posterior.stats["standard_error_shares"][0, 0].numpy(), np.sqrt(p * (1 - p) / 50), rtol=1e-8)


def test_standard_errors_of_a_mixture_know_that_labels_are_missing() -> None:
    def program(y: Tensor) -> None:
        share = pyro.sample("share", dist.Beta(1.0, 1.0))
        with pyro.plate("component", 2):
            mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(share))
            pyro.sample("y", dist.Normal(mean[z.long()], 1.0), obs=y)

    y = torch.cat([normal(20, seed=11) - 1.0, normal(30, seed=12) + 1.5])
    posterior = em(objective="mle", steps=2000, tolerance=1e-10).fit(program, y)

    def log_likelihood(at: np.ndarray) -> float:
        normals = scipy.stats.norm.pdf(y.numpy(), at[1:, None])
        return float(np.log((1 - at[0]) * normals[0] + at[0] * normals[1]).sum())

    at = np.array([float(posterior.draws["share"]), *posterior.draws["mean"][0, 0].tolist()])
    errors = [float(posterior.stats["standard_error_share"]), *posterior.stats["standard_error_mean"][0, 0].tolist()]
    np.testing.assert_allclose(errors, curvature_errors(log_likelihood, at), rtol=1e-4)


def test_standard_errors_are_exported_with_the_dimensions_of_their_sites() -> None:
    data = em().fit(logistic, DESIGN, LABELS).to_arviz(log_likelihood=False)
    error = data["sample_stats"]["standard_error_beta"]
    assert error.dims == ("chain", "draw", "beta_dim_0") and error.shape == (1, 1, 3)


def test_there_are_no_standard_errors_of_labels_taken_for_known() -> None:
    posterior = em(hard=True, start={"centre": FAITHFUL[:3]}).fit(clusters, FAITHFUL)
    assert posterior.stats.keys() == {"lp"}


# -------------------------------------------------------------------------------------------------------- mini-batches
def test_mini_batches_reach_the_mode_of_all_rows() -> None:
    """Within a tenth of a standard error after 20 passes over the rows, of which the last half is averaged."""
    start = {"means": torch.tensor([[2.0, 55.0], [4.0, 80.0]]).double()}
    model = GMM(2)
    full = em(steps=500, start=start).fit(model, FAITHFUL)
    part = em(steps=100, batch_size=54, start=start).fit(model, FAITHFUL)
    assert not part.info["findings"] and part.history["log_joint"].shape == (100,)
    for name in ("weights", "means", "covariances"):
        error = full.stats[f"standard_error_{name}"][0, 0]
        assert bool(((part.draws[name] - full.draws[name])[0, 0].abs() < 0.1 * error).all()), name
    assert float(part.stats["lp"]) == pytest.approx(float(full.stats["lp"]), abs=0.05)


@pytest.mark.slow
def test_mini_batches_of_gaussian_latents_reach_the_likelihood_of_all_rows() -> None:
    """Within 0.2 nats of the closed form after 600 passes: what is missing shrinks as one over their number."""
    posterior = em(objective="mle", steps=1800, batch_size=20, standard_errors=False).fit(components, LOADED)
    assert posterior.plan is not None and posterior.plan["factor"].update == "Gaussian"
    assert float(posterior.stats["lp"]) == pytest.approx(components_likelihood()[0], abs=0.2)
    assert posterior.draws["factor"].shape == (1, 1, ROWS, 2)


def test_mini_batches_without_a_closed_form_reach_the_mode() -> None:
    mode, errors = logistic_mode()
    part = em(steps=400, batch_size=10, learning_rate=0.05).fit(logistic, DESIGN, LABELS)
    assert bool((np.abs(part.point()["beta"].numpy() - mode) < 0.2 * errors).all())


# ----------------------------------------------------------------------------------------------------------- bad input
def sums(y: Tensor) -> None:
    """The rows are not in a plate."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)


def switched(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    sign = pyro.sample("sign", dist.Bernoulli(0.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean * (2 * sign - 1), 1.0), obs=y)


def skewed(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    with pyro.plate("rows", len(y)):
        u = pyro.sample("u", dist.Gamma(2.0, scale))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "options", "sentence"),
    [
        (clusters, {"maximise": ["z"]}, "'z', which is discrete: it can only be averaged. Use hard=True"),
        (sums, {"batch_size": 5}, r"batch_size needs rows, but no plate of sums has the size .* \(12\)"),
        (switched, {"batch_size": 5}, "'sign' is averaged and not in the plate 'rows'"),
        (skewed, {"batch_size": 5}, "batch_size needs an exact E-step, but u can only be averaged over draws"),
        (switched, {"e_step": HMC()}, "there are none: the E-step is exact"),
        (switched, {"learning_rate": 0.0}, "learning_rate is 0.0, but must be positive"),
        (switched, {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(program: Any, options: dict[str, Any], sentence: str) -> None:
    data = FAITHFUL if program is clusters else LEVELS
    with pytest.raises(ValueError, match=sentence):
        em(**options).fit(program, data)


def test_an_e_step_must_be_a_sampler() -> None:
    with pytest.raises(TypeError, match="must be a sampler"):
        em(e_step="HMC").fit(skewed, LEVELS)


def test_a_flat_prior_is_no_obstacle() -> None:
    def program(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 2.0), obs=y)

    posterior = em().fit(program, LEVELS)
    assert float(posterior.draws["mean"]) == pytest.approx(float(LEVELS.mean()), rel=1e-9)
    assert float(posterior.stats["standard_error_mean"]) == pytest.approx(2.0 / math.sqrt(12), rel=1e-9)


def test_a_site_alone_cannot_be_maximised_if_all_are_averaged() -> None:
    with pytest.raises(Unsupported, match="nothing to maximise"):
        em(maximise=[]).fit(skewed, LEVELS)


def test_weights_that_a_program_sums_out_itself_grow_by_the_step_of_em() -> None:
    """One step is Σ_n r_n + concentration − 1, normalised; the objective never falls, and the end is a fixed point."""
    x = torch.tensor([-2.0, -1.5, 0.3, 1.0, 2.2, 2.5]).double()
    centres = torch.tensor([-2.0, 0.0, 2.0]).double()

    def program(x: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(x.new_tensor([2.0, 1.5, 1.0])))
        densities = dist.Normal(centres, 1.0).log_prob(x[:, None]).exp()
        with pyro.plate("rows", len(x)):
            pyro.factor("x", (weights * densities).sum(-1).log())

    def m_step(weights: Tensor) -> Tensor:
        joint = weights * torch.distributions.Normal(centres, 1.0).log_prob(x[:, None]).exp()
        mass = (joint / joint.sum(1, keepdim=True)).sum(0) + torch.tensor([1.0, 0.5, 0.0]).double()
        return mass / mass.sum()

    start = torch.tensor([0.2, 0.3, 0.5]).double()
    one = EM(start={"weights": start}, steps=1, seed=0, progress=False).fit(program, x)
    assert one.plan is not None and one.plan["weights"].update == "Growth"
    torch.testing.assert_close(one.point()["weights"], m_step(start), rtol=1e-10, atol=0.0)
    end = EM(start={"weights": start}, steps=500, tolerance=1e-10, seed=0, progress=False).fit(program, x)
    assert float(end.history["log_joint"].diff().min()) >= -1e-10
    torch.testing.assert_close(end.point()["weights"], m_step(end.point()["weights"]), rtol=1e-6, atol=0.0)


# ---------------------------------------------------------------------- what distributions hide, what models suggest
class Heavy(dist.StudentT):
    """Student's t, seen as a normal whose precision is hidden."""

    def summary(self, value: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        precision = (self.df + 1.0) / (self.df + ((value - self.loc) / self.scale).square())
        return weights, precision

    def expected_log_prob(self, value: Tensor, summary: tuple[Tensor, Tensor]) -> Tensor:
        weights, precision = summary
        return (weights * (-self.scale.log() - 0.5 * precision * ((value - self.loc) / self.scale).square())).sum()

    def expand(self, batch_shape: Any, _instance: Any = None) -> Heavy:
        shape = torch.Size(batch_shape)
        return Heavy(self.df.expand(shape), self.loc.expand(shape), self.scale.expand(shape), validate_args=False)


OUTLYING = torch.tensor([-0.3, 0.1, 0.4, 0.9, 1.2, 0.6, 30.0, -25.0]).double()


def heavy(y: Tensor, counts: Tensor) -> None:
    location = pyro.sample("location", dist.Normal(y.new_zeros(()), 10.0))
    variance = pyro.sample("variance", dist.InverseGamma(y.new_tensor(2.0), 1.0))
    with pyro.plate("rows", len(y)), poutine.scale(scale=counts):
        pyro.sample("y", Heavy(y.new_tensor(3.0), location, variance.sqrt()), obs=y)


def test_em_fills_in_what_a_distribution_hides() -> None:
    """Closed M-steps, a climb without a fall, and the end where scipy's optimiser finds the mode."""
    counts = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0, 1.0, 1.0, 1.0]).double()
    backend = EM(steps=2000, tolerance=1e-10, seed=0, progress=False)
    posterior = backend.fit(heavy, OUTLYING, counts)
    assert posterior.plan["location"].update == "Normal" and posterior.plan["variance"].update == "InverseGamma"
    assert float(posterior.history["log_joint"].diff().min()) >= -1e-9

    def loss(at: Any) -> float:
        location, variance = at[0], math.exp(at[1])
        prior = scipy.stats.norm(0, 10).logpdf(location) + scipy.stats.invgamma(2.0, scale=1.0).logpdf(variance)
        rows = scipy.stats.t(3.0, location, math.sqrt(variance)).logpdf(OUTLYING.numpy())
        return -float(prior + counts.numpy() @ rows)

    best = scipy.optimize.minimize(loss, [0.5, 0.0], options={"gtol": 1e-8})
    assert float(posterior.point()["location"]) == pytest.approx(best.x[0], abs=1e-4)
    assert float(posterior.point()["variance"]) == pytest.approx(math.exp(best.x[1]), rel=1e-4)
    assert float(posterior.stats["lp"]) == pytest.approx(-best.fun, rel=1e-9)


class Narrow(nn.Module):
    """A mode in a corner of a wide prior, with nothing that points to it from afar; the model knows the corner."""

    def model(self, y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 1000.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal((mean - 700.0).clamp(-3.0, 3.0), 0.1), obs=y)

    def start(self, y: Tensor) -> dict[str, Tensor]:
        return {"mean": y.new_tensor(701.5)}


def test_em_starts_where_the_model_suggests() -> None:
    y = torch.full((20,), 1.0).double()
    posterior = EM(seed=0, progress=False, standard_errors=False).fit(Narrow(), y)
    assert float(posterior.point()["mean"]) == pytest.approx(701.0, abs=0.01)


class Turned(nn.Module):
    """Two hidden numbers in each row, coupled given it, but for where the model suggests to start: at orthogonal slopes."""

    def model(self, y: Tensor) -> None:
        slopes = pyro.sample("slopes", dist.Normal(y.new_zeros(3, 2), 1.0).to_event(2))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ slopes.mT, 0.5).to_event(1), obs=y)

    def start(self, y: Tensor) -> dict[str, Tensor]:
        return {"slopes": torch.eye(3, 2, dtype=y.dtype)}


def test_what_is_uncoupled_where_the_model_suggests_is_not_taken_to_be_so_elsewhere() -> None:
    y = normal(40, 3, seed=0) @ normal(3, 3, seed=1)
    posterior = EM(seed=0, progress=False, standard_errors=False, steps=500).fit(Turned(), y)
    slopes, climb = posterior.point()["slopes"], posterior.history["log_joint"]

    def log_density(slopes: Tensor) -> Tensor:
        rows = dist.MultivariateNormal(slopes.new_zeros(3), slopes @ slopes.mT + 0.25 * torch.eye(3).double())
        return rows.log_prob(y).sum() + dist.Normal(0.0, 1.0).log_prob(slopes).sum()

    assert float(posterior.stats["lp"]) == pytest.approx(float(log_density(slopes)), rel=1e-9)
    assert float(climb.diff().min()) >= -1e-9 * abs(float(climb[-1]))
    assert torch.func.grad(log_density)(slopes).abs().max() < 1e-3


def test_em_stops_at_a_mean_of_zero() -> None:
    """Which it comes near by a factor in every step, so that the change is never small beside the value."""

    def centred(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 10.0))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(mean + z, 0.5), obs=y)

    y = torch.tensor([-1.5, 1.5, 0.25, -0.25]).double()
    posterior = em(start={"mean": torch.tensor(3.0)}, steps=500).fit(centred, y)
    assert len(posterior.history["log_joint"]) < 120  # by 0.8 a step, rounding is reached after 180
    assert float(posterior.point()["mean"]) == pytest.approx(0.0, abs=1e-5)


def test_a_wide_matrix_of_small_numbers_has_its_closed_form() -> None:
    """The trial of the M-step goes as far as the matrix is large, not as far as the numbers of its factor."""
    rows, width = 300, 30
    x = 1e-3 * torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).double()

    def program(x: Tensor) -> None:
        scatter = pyro.sample("scatter", InverseWishart(width + 2.0, 1e-6 * torch.eye(width)))
        factor = torch.linalg.cholesky(scatter)
        with pyro.plate("row", rows):
            pyro.sample("x", dist.MultivariateNormal(x.new_zeros(width), scale_tril=factor), obs=x)

    backend = EM(start={"scatter": 1e-6 * torch.eye(width)}, standard_errors=False, seed=0, progress=False)
    posterior = backend.fit(program, x)
    expected = (1e-6 * torch.eye(width).double() + x.mT @ x) / (rows + width + 2.0 + width + 1.0)
    torch.testing.assert_close(posterior.point()["scatter"], expected, rtol=1e-9, atol=1e-15)
    assert len(posterior.history["log_joint"]) < 5  # no ascent by gradients


def test_em_goes_on_from_its_own_point_labels_included() -> None:
    x = datasets.load("faithful").x
    options: dict[str, Any] = {"standard_errors": False, "seed": 0, "progress": False}
    first = EM(steps=3, **options).fit(GMM(2), x)
    assert "z" in first.point()
    then = EM(steps=200, start=first.point(), **options).fit(GMM(2), x)
    assert float(then.history["log_joint"][0]) >= float(first.history["log_joint"][-1])


class Loadings(nn.Module):
    """x_n ~ N(w z_n, σ²), z_n ~ N(0, 1), with w and log σ for weights."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.1, 0.2, -0.1], dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(self.log_scale), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * self.w, self.log_scale.exp()).to_event(1), obs=x)


def test_weights_are_trained_beside_an_exact_e_step() -> None:
    x = normal(40, 1, seed=40) * torch.tensor([1.0, 2.0, -1.0]) + 0.7 * normal(40, 3, seed=41)
    posterior = EM(steps=60, seed=0, progress=False).fit(Loadings(), x)
    assert posterior.plan is not None and posterior.plan["z"].update == "Gaussian"
    spectrum, axes = torch.linalg.eigh(x.mT @ x / 40)  # Tipping and Bishop (1999): the principal axis, the rest is noise
    noise_variance = spectrum[:-1].mean()
    covariance = (spectrum[-1] - noise_variance) * torch.outer(axes[:, -1], axes[:, -1]) + noise_variance * torch.eye(3)
    best = dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(x).sum()
    history = posterior.history["log_joint"]
    assert bool((history.diff() > -1e-9).all())
    torch.testing.assert_close(history[-1], best, rtol=0.0, atol=1e-3)


def test_em_goes_on_from_its_own_point_with_what_a_program_computes() -> None:
    x = datasets.load("faithful").x
    options: dict[str, Any] = {"standard_errors": False, "seed": 0, "progress": False}

    def program(x: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(()), 10.0))
        pyro.deterministic("double", 2.0 * mean)
        with pyro.plate("row", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    first = EM(steps=3, **options).fit(program, x[:, 0])
    assert "double" in first.point()
    then = EM(steps=3, start=first.point(), **options).fit(program, x[:, 0])
    torch.testing.assert_close(then.point(), first.point())
    with pytest.raises(ValueError, match="start= names 'triple'"):
        EM(start={"triple": 1.0}, **options).fit(program, x[:, 0])


# ------------------------------------------------------------------------------------------------ acceleration
def overlapping(x: Tensor) -> None:
    """Two normals of one width, so close that EM creeps."""
    share = pyro.sample("share", dist.Dirichlet(2.0 * x.new_ones(2)))
    with pyro.plate("component", 2):
        centre = pyro.sample("centre", dist.Normal(x.new_zeros(2), 3.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(share))
        pyro.sample("x", dist.Normal(centre[z], 1.0), obs=x)


def one_factor(x: Tensor) -> None:
    """Columns that one hidden number of each row moves."""
    with pyro.plate("column", x.shape[1]):
        loading = pyro.sample("loading", dist.Normal(0.0, 3.0))
        noise = pyro.sample("noise", dist.InverseGamma(2.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1) * loading, noise.sqrt()).to_event(1), obs=x)


OVERLAPPING = torch.cat([normal(150, seed=1), normal(50, seed=2) + 2.5])
CREEPING: dict[str, tuple[Any, Tensor, dict[str, Tensor], float]] = {  # least gain in E-steps
    "mixture": (overlapping, OVERLAPPING, {"share": torch.tensor([0.5, 0.5]), "centre": torch.tensor([0.0, 0.3])}, 3.0),
    "factor": (
        one_factor,
        normal(60, 1, seed=3) * torch.tensor([1.0, 0.3, -0.2, 0.2]) + normal(60, 4, seed=4),
        {"loading": torch.full((4,), 0.1), "noise": torch.ones(4)},
        2.0,
    ),
}


@pytest.mark.parametrize("name", CREEPING)
def test_an_accelerated_run_ends_at_the_fixed_point_of_the_plain_one_in_fewer_e_steps(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, x, start, gain = CREEPING[name]
    count: list[int] = []
    expected = EM._expected
    monkeypatch.setattr(EM, "_expected", staticmethod(lambda *rest: (count.append(1), expected(*rest))[1]))
    found = {}
    for acceleration in (None, "squarem"):
        count.clear()
        options = {"steps": 5000, "tolerance": 1e-8, "standard_errors": False, "start": start}
        posterior = em(acceleration=acceleration, **options).fit(program, x)
        climb = posterior.history["log_joint"]
        assert float(climb.diff().min()) >= -1e-12 * float(climb.abs().max())
        found[acceleration] = posterior, len(count)
    (plain, slow), (fast, quick) = found.values()
    assert gain * quick < slow < 5000, (quick, slow)
    for site, value in plain.point().items():
        torch.testing.assert_close(fast.point()[site], value, rtol=1e-6, atol=1e-6)
    assert float(fast.stats["lp"]) == pytest.approx(float(plain.stats["lp"]), rel=1e-12)


def free(name: str, *shape: int, support: Any = constraints.real) -> Site:
    def program() -> None:
        pyro.sample(name, dist.ImproperUniform(support, torch.Size(), torch.Size(shape)))

    return Program(program).latents[name]


def test_squarem_leaps_to_the_end_of_a_geometric_approach() -> None:
    """θ_t = θ* + λ^t e: three points determine the limit, whatever the direction and the unit."""
    end, error = torch.tensor([[3.0, -200.0]]).double(), torch.tensor([[1.0, 50.0]]).double()
    sites, units = {"value": free("value", 2)}, {"value": torch.tensor([200.0]).double()}
    theta = [{"value": end + 0.95**t * error} for t in range(3)]
    path = Path.begin(theta[0], torch.zeros(1).double())._replace(longest=torch.tensor([1e6]).double())
    for before, after in itertools.pairwise(theta):
        path = path.moved(sites, before, after, units)
    torch.testing.assert_close(path.trial(theta[2])["value"], end)
    torch.testing.assert_close(path.slowness, torch.tensor([1.0 / (1.0 - 0.95)]).double())


@pytest.mark.parametrize(
    ("support", "theta"),
    [
        (constraints.positive, [[0.9, 1.0], [0.5, 1.0], [0.2, 1.0]]),
        (constraints.unit_interval, [[0.9, 0.0], [0.96, 0.0], [0.99, 0.0]]),
        (constraints.simplex, [[0.5, 0.3, 0.2], [0.6, 0.32, 0.08], [0.65, 0.34, 0.01]]),
        (constraints.positive_definite, [[[1.0, 0.5], [0.5, 1.0]], [[1.0, 0.8], [0.8, 1.0]], [[1.0, 0.95], [0.95, 1.0]]]),
    ],
    ids=["positive", "unit interval", "simplex", "positive definite"],
)
def test_an_extrapolation_stays_inside_the_support(support: Any, theta: list[Any]) -> None:
    """On the scale of the program each of these would leave it; an element at the edge stays where it is."""
    values = [{"value": torch.tensor([value]).double()} for value in theta]
    event = support.event_dim
    shape = values[0]["value"].shape[1:]
    wrapped = constraints.independent(support, 1) if not event else support
    sites, units = {"value": free("value", *shape, support=wrapped)}, {"value": torch.ones(1).double()}
    path = Path.begin(values[0], torch.zeros(1).double())._replace(longest=torch.tensor([50.0]).double())
    for before, after in itertools.pairwise(values):
        path = path.moved(sites, before, after, units)
    found = path.trial(values[2])["value"]
    assert bool(path.jumps) and bool(wrapped.check(found).all()) and bool(found.isfinite().all())
    assert not torch.equal(found, values[2]["value"]) or bool((values[2]["value"] == 0).any())


def test_where_an_extrapolation_lowers_the_objective_the_plain_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    program, x, start, _ = CREEPING["mixture"]
    options = {"steps": 12, "tolerance": 0.0, "standard_errors": False, "start": start}
    plain = em(**options).fit(program, x)
    trial = Path.trial

    def lost(path: Path, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**trial(path, values), "centre": values["centre"] + 30.0}

    monkeypatch.setattr(Path, "trial", lost)
    refused = em(acceleration="squarem", **options).fit(program, x)
    assert torch.equal(refused.history["log_joint"], plain.history["log_joint"])
    assert torch.equal(refused.draws["centre"], plain.draws["centre"])


def test_acceleration_of_what_it_cannot_be_of_is_refused_in_a_sentence() -> None:
    x = OVERLAPPING
    with pytest.raises(ValueError, match="acceleration is 'anderson', but must be 'squarem' or None."):
        em(acceleration="anderson").fit(overlapping, x)
    with pytest.raises(Unsupported, match="acceleration= needs the objective of all rows in every step"):
        em(acceleration="squarem", batch_size=10).fit(overlapping, x)
    with pytest.raises(Unsupported, match="EM trains the weights of Slope in place. Leave acceleration= out."):
        em(acceleration="squarem").fit(Slope(), x)
    with pytest.raises(
        Unsupported, match="steps that never lower the objective, but those that Stepping brings for mean may"
    ):
        em(acceleration="squarem").fit(Stepping(), x)
    with pytest.raises(Unsupported, match="acceleration= needs an exact E-step, but rate can only be averaged over draws"):
        em(acceleration="squarem").fit(counted, torch.tensor([3.0, 0.0, 5.0, 9.0]).double())


class Slope(nn.Module):
    """A line whose slope is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def model(self, x: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(level * self.slope, 1.0), obs=x)


class Stepping:
    """A mean with a step of its own."""

    def model(self, x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    def steps(self, x: Tensor) -> dict[tuple[str, ...], Any]:
        return {("mean",): lambda values, memory: (values, memory)}


def counted(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.Normal(level, 1.0))
        pyro.sample("y", dist.Poisson(rate.exp()), obs=y)


def test_most_probable_labels_are_not_looked_for_where_nobody_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    backend = EM(steps=5, seed=0, progress=False)
    whole = backend.fit(GMM(2, "diagonal"), x).point()
    monkeypatch.setattr(Completed, "most_probable", lambda *_: pytest.fail("looked for"))
    kept = replace(backend, keep=("means", "weights")).fit(GMM(2, "diagonal"), x).point()
    assert kept.keys() == {"means", "weights"}
    for name, value in kept.items():
        torch.testing.assert_close(value, whole[name], rtol=0.0, atol=0.0)
