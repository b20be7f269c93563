"""Likelihoods by ratio: what a critic of simulations learns, and the posteriors that any back-end makes of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import kstest
from torch import Tensor, nn

from inference import HMC, Adversarial, Hinge, MetropolisHastings, Minimax, Unsupported
from inference.handlers import isolated
from pyro_genmodels.implicit import Critic, RatioLikelihood

NOISE = 0.5  # θ ~ N(0, 1), x ~ N(θ, NOISE²)


class Quadratic(nn.Module):
    """A critic that is a polynomial of degree 2 in x and θ."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    @staticmethod
    def features(x: Tensor, theta: Tensor) -> Tensor:
        t = theta[:, 0]
        return torch.stack([x * t, x * x, t * t, x, t, torch.ones_like(x)], -1)

    def forward(self, x: Tensor, theta: Tensor) -> Tensor:
        return self.features(x, theta) @ self.weight


def exact_weight() -> Tensor:
    """That of log N(x; θ, s²) − log N(x; 0, 1 + s²)."""
    s2 = NOISE**2
    constant = 0.5 * math.log((1 + s2) / s2)
    return torch.tensor([1 / s2, 0.5 / (1 + s2) - 0.5 / s2, -0.5 / s2, 0.0, 0.0, constant], dtype=torch.float64)


def simulations(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    with isolated(seed):
        theta = torch.randn(rows, 1, dtype=torch.float64)
        return theta[:, 0] + NOISE * torch.randn(rows, dtype=torch.float64), theta


EXACT = RatioLikelihood(Quadratic(exact_weight()))


def inferred(x: Tensor, likelihood: RatioLikelihood = EXACT) -> None:
    """A parameter for every row."""
    with pyro.plate("rows", len(x)):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", likelihood(theta[..., None]), obs=x)


def shared(x: Tensor) -> None:
    """One parameter for all rows."""
    theta = pyro.sample("theta", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EXACT(theta), obs=x)


@pytest.fixture(scope="module")
def trained() -> RatioLikelihood:
    x, theta = simulations(20_000, 0)
    likelihood = RatioLikelihood(Quadratic(torch.zeros(6, dtype=torch.float64)))
    fit = Adversarial(
        critic=likelihood.critic,
        objective=Minimax(),
        learning_rate=None,
        critic_learning_rate=0.02,
        steps=800,
        batch_size=500,
        average=0.99,
        seed=0,
        progress=False,
    )
    posterior = fit.fit(likelihood, x, theta)
    assert "loss" not in posterior.history and {"critic.weight"} <= set(posterior.weights)
    assert torch.equal(posterior.weights["critic.weight"], likelihood.critic.weight.detach())
    return likelihood


def test_a_trained_critic_is_the_log_likelihood_up_to_that_of_the_data(trained: RatioLikelihood) -> None:
    x, theta = simulations(20_000, 0)
    features = Quadratic.features(x, theta)
    strangers = Quadratic.features(x.roll(1), theta)
    weight, exact = trained.critic.weight.detach(), exact_weight()
    truth, found = features @ exact, features @ weight
    centred = truth - truth.mean()
    assert float((found - found.mean()) @ centred / (centred @ centred)) == pytest.approx(1.0, abs=0.03)
    # five standard errors of a logistic regression on as many pairs and strangers, false alarm 1e-6 each
    both = torch.cat([features, strangers])
    chance = (both @ exact).sigmoid()
    information = both.T @ ((chance * (1 - chance))[:, None] * both)
    assert ((weight - exact).abs() < 5 * torch.linalg.inv(information).diagonal().sqrt()).all()


def test_posteriors_by_a_trained_critic_are_calibrated(trained: RatioLikelihood) -> None:
    """Ranks of true parameters among draws at fresh data are uniform, amortised over all of them."""
    x, theta = simulations(400, 1)
    sampler = HMC(chains=16, warmup=200, draws=60, seed=0, progress=False)
    draws = sampler.fit(inferred, x, trained).draws["theta"].flatten(0, 1)
    ranks = (draws < theta[:, 0]).double().mean(0)
    assert kstest(ranks.numpy(), "uniform").pvalue > 1e-3  # the false-alarm rate
    scale = NOISE / (1 + NOISE**2) ** 0.5
    offset = (draws.mean(0) - x / (1 + NOISE**2)) / scale
    # draws of 960, most of them independent, and a critic whose weights are known to about 1 %
    assert float(offset.square().mean().sqrt()) < 0.1
    assert float(draws.std(0).mean()) == pytest.approx(scale, rel=0.03)


SAMPLERS = [
    HMC(chains=48, warmup=200, draws=100, seed=0, progress=False),
    MetropolisHastings(chains=48, warmup=300, draws=100, thin=10, seed=1, progress=False),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=["HMC", "MetropolisHastings"])
def test_an_exact_ratio_gives_the_exact_posterior_of_many_rows(sampler: Any) -> None:
    x = torch.tensor([0.3, 1.2, 0.8, 1.9, 0.4], dtype=torch.float64)
    posterior = sampler.fit(shared, x)
    precision = 1 + len(x) / NOISE**2
    theta = posterior.draws["theta"].flatten()
    # of at least 1000 independent draws; five standard errors, false alarm 1e-6 each
    assert float(theta.mean()) == pytest.approx(float(x.sum()) / NOISE**2 / precision, abs=5 / (1000 * precision) ** 0.5)
    assert float(theta.var()) == pytest.approx(1 / precision, rel=5 * (2 / 1000) ** 0.5)


def test_the_evidence_of_a_row_is_one() -> None:
    """E_p(θ) exp(critic(x, θ)) = 1 at every x, by Gauss-Hermite quadrature."""
    nodes, weights = map(torch.tensor, np.polynomial.hermite_e.hermegauss(80))
    theta, weights = nodes[:, None], weights / weights.sum()
    for x in (-2.0, 0.0, 1.5):
        ratio = EXACT(theta).log_prob(torch.tensor(x, dtype=torch.float64)).exp()
        assert float(ratio.detach() @ weights) == pytest.approx(1.0, abs=1e-9)


def test_shapes_in_plates_and_out() -> None:
    likelihood = RatioLikelihood(Critic((2,), context=3), (2,), simulator=lambda theta: theta[..., :2])
    x, theta = torch.randn(5, 2), torch.randn(5, 3)
    one = likelihood(theta).log_prob(x)
    assert torch.equal(one, likelihood.critic(x, theta))
    assert likelihood(theta[:1]).log_prob(x).shape == (5,) and likelihood(theta[0]).log_prob(x).shape == (5,)
    assert likelihood(theta).log_prob(torch.randn(7, 1, 2)).shape == (7, 5)
    torch.testing.assert_close(likelihood(theta).expand((4, 5)).log_prob(x)[2], one)
    assert likelihood(theta).sample((6,)).shape == (6, 5, 2)
    (slope,) = torch.autograd.grad(likelihood(leaf := theta.clone().requires_grad_()).log_prob(x).sum(), leaf)
    assert slope.isfinite().all() and bool(slope.abs().sum() > 0)


def test_strangers_are_never_their_own_row_and_all_others_alike() -> None:
    x = torch.arange(4.0)
    with isolated(0):
        strangers = poutine.trace(poutine.uncondition(EXACT.model))
        drawn = torch.stack([strangers.get_trace(x, x[:, None]).nodes["x"]["value"] for _ in range(3000)])
    table = torch.stack([(drawn == value).double().mean(0) for value in x])  # (value, row)
    assert torch.equal(table.diagonal(), torch.zeros(4).double())
    # five standard errors of 3000, false alarm 1e-6 each
    away = table[~torch.eye(4, dtype=torch.bool)]
    assert (away - 1 / 3).abs().max() < 5 * (2 / 9 / 3000) ** 0.5


def test_predictions_are_simulations() -> None:
    likelihood = RatioLikelihood(Quadratic(exact_weight()), simulator=lambda theta: theta[..., 0])
    x, _ = simulations(5, 3)
    posterior = HMC(chains=2, warmup=50, draws=5, seed=0, progress=False).fit(inferred, x, likelihood)
    assert torch.equal(posterior.predict()["x"], posterior.draws["theta"])


X, THETA = simulations(12, 4)
REFUSED: dict[str, tuple[Any, str]] = {
    "no parameters": (lambda: EXACT(), r"theta\[..., None\]"),
    "a bare number": (lambda: EXACT(torch.tensor(1.0)), r"theta\[..., None\]"),
    "a critic of two numbers": (
        lambda: RatioLikelihood(nn.Bilinear(1, 1, 2), (1,))(torch.zeros(5, 1)).log_prob(torch.zeros(5, 1)),
        r"one number a row, \(5,\) or \(5, 1\), but gave shape \(5, 2\)",
    ),
    "more parameters than the critic takes": (
        lambda: RatioLikelihood(Critic((2,), context=3), (2,))(torch.zeros(4)).log_prob(torch.zeros(5, 2)),
        r"critic does not take \(5, 2\) and \(5, 4\): mat1 .* build it for these, such as Critic",
    ),
    "data of another shape": (
        lambda: RatioLikelihood(Critic((2,), context=3), (2,))(torch.zeros(3)).log_prob(torch.zeros(5, 3)),
        r"x has shape \(5, 3\), but this RatioLikelihood was built for rows of shape \(2,\)",
    ),
    "draws without a simulator": (lambda: EXACT(THETA).sample(), "weighs data and cannot draw them"),
    "a simulator of another shape": (
        lambda: RatioLikelihood(Quadratic(exact_weight()), simulator=lambda theta: theta)(THETA).sample(),
        r"gave a tensor of shape \(12, 1\), but must give \(12,\)",
    ),
    "one simulation": (lambda: EXACT.model(X[:1], THETA[:1]), "at least 2"),
    "parameters of other rows": (lambda: EXACT.model(X, THETA[:5]), r"x has shape \(12,\) and theta \(5, 1\)"),
    "parameters without features": (lambda: EXACT.model(X, THETA[:, 0]), r"theta \(12,\)"),
    "simulations of another shape": (lambda: EXACT.model(THETA, THETA), r"built for \(rows,\)"),
    "information by nobody": (
        lambda: Adversarial(critic=EXACT.critic, learning_rate=None, information=1.0).fit(EXACT, X, THETA),
        "RatioLikelihood does not learn",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises((ValueError, Unsupported), match=sentence):
        call()


def counts(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Poisson(torch.tensor(2.0)), obs=x)


def test_a_critic_alone_needs_no_path_through_draws() -> None:
    """Poisson(3) against Poisson(2): x log(3/2) − 1."""
    with isolated(0):
        x = torch.poisson(torch.full((4000,), 3.0))
    critic = nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(1, 1))
    fit = Adversarial(critic=critic, objective=Minimax(), learning_rate=None, critic_learning_rate=0.02, steps=500, seed=0)
    with pytest.raises(Unsupported, match="draws have no gradient"):
        Adversarial(critic=critic, objective=Hinge(), steps=5, progress=False).fit(counts, x)
    fit.fit(counts, x)
    # standard errors of a logistic regression on 4000 + 4000 rows are 0.014 and 0.04; five of them, false alarm 1e-6 each
    assert float(critic[1].weight.detach()) == pytest.approx(math.log(1.5), abs=5 * 0.014)
    assert float(critic[1].bias.detach()) == pytest.approx(-1.0, abs=5 * 0.04)
