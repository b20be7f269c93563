"""What maximum likelihood, divergence and the evidence bound have to do with each other, to rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from inference import EM, SVI
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


def test_svi_of_a_point_is_maximum_likelihood_where_the_prior_is_flat() -> None:
    """A delta on the simplex has no entropy, and Dirichlet(1) no slope; in steps of 1e-2 that shrink not at all."""
    backend = SVI(guide=pyro.infer.autoguide.AutoDelta, steps=1500, learning_rate=1e-2, draws=1, seed=0, progress=False)
    found = backend.fit(labels_one_by_one, COUNTS).point()["shares"]
    torch.testing.assert_close(found.double(), COUNTS / COUNTS.sum(), rtol=1e-4, atol=1e-4)


def test_the_likeliest_is_the_nearest_in_divergence() -> None:
    """−log L / N = entropy of the data + KL(data ‖ model), at every model of a grid that holds counts / N."""
    counts = COUNTS.long().clamp(max=60)[:3]
    rows = int(counts.sum())
    grid = np.array([(i, j, rows - i - j) for i in range(1, rows) for j in range(1, rows - i)]) / rows
    empirical = counts.numpy() / rows
    divergences = scipy.stats.entropy(empirical, grid, axis=1) if False else (empirical * np.log(empirical / grid)).sum(1)
    likelihoods = np.array([float(dist.Categorical(torch.from_numpy(one)).log_prob(torch.arange(3)) @ counts.double()) for one in grid])
    np.testing.assert_allclose(-likelihoods / rows, scipy.stats.entropy(empirical) + divergences, rtol=1e-9)
    np.testing.assert_allclose(grid[divergences.argmin()], empirical, rtol=1e-12)
    assert divergences.argmin() == likelihoods.argmax()
