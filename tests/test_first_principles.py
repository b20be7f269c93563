"""What maximum likelihood, divergence and the evidence bound have to do with each other, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from inference import EM
from pyro_genmodels import GMM, datasets
from pyro_genmodels.distributions import InverseWishart
from test_examples import load

EXAMPLE = load(Path(__file__).parents[1] / "examples" / "first_principles.py")
MLE: dict[str, Any] = {"objective": "mle", "standard_errors": False, "seed": 0, "progress": False}
COUNTS = datasets.load("coal")["counts"].long().bincount().double()
X = datasets.load("faithful").x


def normal(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 100.0).to_event(1))
    covariance = pyro.sample("covariance", InverseWishart(4.0, torch.eye(2).to(x)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(mean, scale_tril=torch.linalg.cholesky(covariance)), obs=x)


def labels_one_by_one(counts: Tensor) -> None:
    shares = pyro.sample("shares", dist.Dirichlet(torch.ones_like(counts)))
    labels = torch.arange(len(counts)).repeat_interleave(counts.long())
    with pyro.plate("rows", len(labels)):
        pyro.sample("label", dist.Categorical(shares), obs=labels)


@pytest.mark.parametrize("program", [EXAMPLE.multinomial, labels_one_by_one])
def test_most_likely_shares_are_counts_over_rows(program: Any) -> None:
    """Lagrange: the slopes counts / shares are all equal to the multiplier, which is the number of rows."""
    shares = EM(**MLE).fit(program, COUNTS).point()["shares"]
    torch.testing.assert_close(shares, COUNTS / COUNTS.sum(), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(COUNTS / shares, COUNTS.sum().expand_as(COUNTS), rtol=1e-9, atol=0.0)


def test_most_likely_moments_are_those_of_the_rows() -> None:
    point = EM(**MLE).fit(normal, X).point()
    mean, covariance = X.numpy().mean(0), np.cov(X.numpy().T, bias=True)
    np.testing.assert_allclose(point["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(point["covariance"], covariance, rtol=1e-9)


def test_squared_distances_average_to_the_number_of_columns() -> None:
    point = EM(**MLE).fit(GMM(1), X).point()
    away = (X - point["means"]).numpy()
    distances = np.einsum("ni,ij,nj->n", away, np.linalg.inv(point["covariances"][0].numpy()), away)
    assert distances.mean() == pytest.approx(2.0, rel=1e-9)


@pytest.mark.parametrize("counts", [[33.0, 31.0, 48.0], [1.0, 2.0, 40.0]])
def test_the_likeliest_is_the_nearest_in_divergence(counts: list[float]) -> None:
    """−log L / N = entropy of the data + KL(data ‖ model), at every model of a grid that holds counts / N."""
    seen = torch.tensor(counts).double()
    rows, empirical = int(seen.sum()), (seen / seen.sum()).numpy()
    grid = np.array([(i, j, rows - i - j) for i in range(1, rows) for j in range(1, rows - i)]) / rows
    divergences = np.array([scipy.stats.entropy(empirical, model) for model in grid])
    likelihoods = torch.distributions.Categorical(torch.from_numpy(grid)).logits @ seen
    np.testing.assert_allclose(-likelihoods / rows, scipy.stats.entropy(empirical) + divergences, rtol=1e-9)
    assert divergences.argmin() == int(likelihoods.argmax())
    shares = EM(**MLE).fit(EXAMPLE.multinomial, seen).point()["shares"]
    np.testing.assert_allclose(grid[divergences.argmin()], shares, rtol=1e-9)


# ------------------------------------------------------------------------------------------------- the bound of EM
POINT = {
    "weights": torch.tensor([0.3, 0.7]).double(),
    "means": torch.tensor([[2.0, 55.0], [4.0, 80.0]]).double(),
    "covariances": torch.tensor([[[0.5, 2.0], [2.0, 40.0]], [[0.3, 1.0], [1.0, 30.0]]]).double(),
}


def log_terms(x: np.ndarray, point: dict[str, Tensor]) -> np.ndarray:
    """log p(x_n, z_n = k) by scipy, (rows, 2)."""
    parts = zip(*(point[name].numpy() for name in ("weights", "means", "covariances")))
    return np.stack([np.log(w) + scipy.stats.multivariate_normal(m, c).logpdf(x) for w, m, c in parts], 1)


def guesses() -> list[Tensor]:
    """Any q at all, (rows, 2): drawn, equal, certain."""
    drawn = torch.rand(len(X), generator=torch.Generator().manual_seed(0)).double()
    return [torch.stack([one, 1.0 - one], -1) for one in (drawn, torch.full_like(drawn, 0.5), (drawn > 0.5).double())]


@pytest.mark.parametrize("q", guesses())
def test_evidence_is_bound_plus_divergence_whatever_q_is(q: Tensor) -> None:
    terms = log_terms(X.numpy(), POINT)
    evidence = scipy.special.logsumexp(terms, 1)
    bound, divergence = EXAMPLE.parts(EXAMPLE.log_joint(X, POINT), q)
    assert bound + divergence == pytest.approx(evidence.sum(), rel=1e-9)
    posterior = np.exp(terms - evidence[:, None])
    assert divergence == pytest.approx(scipy.stats.entropy(q.numpy(), posterior, axis=1).sum(), rel=1e-9)
    assert divergence >= 0.0


@pytest.mark.parametrize("q", guesses()[:2])
def test_the_bound_is_that_of_pyro_on_the_program(q: Tensor) -> None:
    """Pyro sums the labels of the guide out; with the parameters given, their priors are a constant."""
    program = GMM(2)
    program.prepare(X)
    given = poutine.condition(program.model, POINT)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(q), infer={"enumerate": "parallel"})

    found = -TraceEnum_ELBO(max_plate_nesting=1).loss(given, guide, X)
    trace = poutine.trace(poutine.condition(program.model, POINT)).get_trace(X)
    trace.compute_log_prob()
    priors = sum(float(trace.nodes[name]["log_prob"].sum()) for name in POINT)
    bound, _ = EXAMPLE.parts(EXAMPLE.log_joint(X, POINT), q)
    assert found - priors == pytest.approx(bound, rel=1e-9)


def test_an_e_step_closes_the_gap_and_an_m_step_maximises_the_bound() -> None:
    q = EXAMPLE.log_joint(X, POINT).softmax(-1)
    bound, divergence = EXAMPLE.parts(EXAMPLE.log_joint(X, POINT), q)
    assert abs(divergence) < 1e-9
    then = EM(steps=1, start=POINT, **MLE).fit(GMM(2), X).point()
    at = {name: then[name].clone().requires_grad_() for name in POINT}
    joint = EXAMPLE.log_joint(X, at)
    (q * joint).sum().backward()
    slopes = {name: value.grad for name, value in at.items()}
    torch.testing.assert_close(slopes["weights"], torch.full((2,), float(len(X))).double(), rtol=1e-9, atol=0.0)  # Lagrange
    scale = X.std(0)
    assert float((slopes["means"] * scale).abs().max()) < 1e-9 * len(X)
    assert float((slopes["covariances"] * scale[:, None] * scale).abs().max()) < 1e-9 * len(X)
    lifted, gap = EXAMPLE.parts(joint.detach(), q)
    assert lifted > bound and gap > 0.0
