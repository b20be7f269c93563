"""The Gaussian mixture beside scikit-learn's, and what it does with draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inference import EM, Gibbs, Posterior
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


@pytest.mark.parametrize("covariance", COVARIANCES)
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
