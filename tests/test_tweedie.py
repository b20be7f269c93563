"""Tweedie's formula on every density that the zoo can score, against posterior means that are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import Denoising
from inference.handlers import isolated
from inference.score_matching import NoisedLoss
from pyro_genmodels import GMM, EnergyModel, tweedie
from pyro_genmodels.diffusion import EDM, Network, Oracle, score_of, tweedie_covariance
from pyro_genmodels.nets import PointNetwork

NOISE = 0.6


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with isolated(5):
        yield


class Normal(nn.Module):
    """½ (x − m)ᵀ P (x − m), as an energy."""

    def __init__(self, mean: Tensor, precision: Tensor) -> None:
        super().__init__()
        self.mean, self.precision = nn.Parameter(mean), nn.Parameter(precision)

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((x - self.mean) @ self.precision * (x - self.mean)).sum(-1)


def test_of_a_fitted_mixture_it_is_the_posterior_mean() -> None:
    """The mixture with noise on top of each component, at the draws of a fit; as ``GMM.denoise`` has it."""
    at = {
        "weights": torch.tensor([0.2, 0.5, 0.3]).double(),
        "means": torch.randn(3, 4).double(),
        "covariances": torch.stack([torch.eye(4) * s for s in (0.1, 0.5, 1.0)]).double(),
    }
    at["covariances"][0, 0, 1] = at["covariances"][0, 1, 0] = 0.05
    y = 2.0 * torch.randn(50, 4).double()
    parts = dist.MultivariateNormal(at["means"], at["covariances"] + NOISE**2 * torch.eye(4))
    density = dist.MixtureSameFamily(dist.Categorical(at["weights"]), parts)
    assert torch.allclose(tweedie(y, score_of(density.log_prob), NOISE), GMM(3).denoise(y, NOISE, at), atol=1e-10)


def test_of_an_energy_it_needs_no_constant() -> None:
    """Mean and covariance of a normal posterior, from −E alone."""
    mean, root = torch.tensor([1.0, -0.5]).double(), torch.tensor([[1.0, 0.0], [0.7, 0.4]]).double()
    prior, noise = root @ root.T, NOISE**2 * torch.eye(2).double()
    energy = EnergyModel((2,), network=Normal(mean, (prior + noise).inverse()), spread=None).double()
    y = 3.0 * torch.randn(20, 2).double()
    score = score_of(energy().log_prob)
    gain = prior @ (prior + noise).inverse()
    assert torch.allclose(tweedie(y, score, NOISE), mean + (y - mean) @ gain.T, atol=1e-10)
    assert torch.allclose(tweedie_covariance(y, score, NOISE), (prior - gain @ prior).expand(20, 2, 2), atol=1e-10)


def test_of_a_score_network_it_is_what_the_network_says_of_the_data() -> None:
    """At any weights: the score of a denoiser is made of its mean."""
    denoiser = Network(PointNetwork(2, width=16).double(), EDM(), "preconditioned")
    for weight in denoiser.parameters():
        nn.init.normal_(weight, std=0.3)
    y, level = torch.randn(10, 2).double(), torch.tensor(NOISE).double()
    assert torch.allclose(tweedie(y, lambda z: denoiser.score(z, level), NOISE), denoiser(y, level).mean, atol=1e-12)


def test_a_trained_energy_denoises_nearly_as_well_as_the_truth() -> None:
    """Of a ring of modes: the excess over the least mean squared error, which is exact, is below a tenth of it.

    Least squares of the observations alone, which know nothing of the ring, are far above.
    """
    oracle = Oracle.ring(5, EDM())
    x, level = oracle.distribution().sample((4000,)).float(), torch.tensor(NOISE).double()
    energy = EnergyModel((2,), hidden=(64, 64), noise=NOISE)
    how: Any = {"steps": 500, "learning_rate": 5e-3, "batch_size": 256, "seed": 0, "progress": False}
    Denoising(loss=NoisedLoss(NOISE), **how).fit(energy, x)
    clean = oracle.distribution().sample((4000,))
    y = clean + NOISE * torch.randn(4000, 2).double()
    exact = oracle(y, level).mean
    least = (exact - clean).square().mean()
    found = tweedie(y, score_of(energy().log_prob), NOISE)
    assert (found - exact).square().mean() < 0.1 * least < 0.1 * (0.7 * (y - clean).square().mean())
