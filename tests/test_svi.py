"""Pyro's automatic guides, by class, instance or function: closed forms where the family contains the posterior."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from inference import SVI, Posterior, Unsupported

DESIGN = torch.cat([torch.ones(30, 1), torch.randn(30, 1, generator=torch.Generator().manual_seed(0))], 1).double()
Y = DESIGN @ torch.tensor([0.5, -1.0]).double() + 0.7 * torch.randn(30, generator=torch.Generator().manual_seed(1)).double()


def regression(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, 0.7), obs=y)


def exact() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the coefficients."""
    covariance = np.linalg.inv(np.eye(2) / 4.0 + (DESIGN.T @ DESIGN).numpy() / 0.49)
    return covariance @ (DESIGN.T @ Y).numpy() / 0.49, covariance


def svi(**options: Any) -> SVI:
    return SVI(**{"steps": 400, "learning_rate": 0.1, "draws": 2, "seed": 0, "progress": False, **options})


def moments(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the coefficients under an automatic guide, by the formula of its family."""
    assert posterior.program is not None
    guide: Any = posterior.program.fitted.call
    with torch.no_grad(), pyro.settings.context(module_local_params=True):
        if isinstance(guide, autoguide.AutoDelta):
            return guide.median(DESIGN, Y)["beta"].cpu().numpy(), np.zeros((2, 2))
        if isinstance(guide, autoguide.AutoNormal):
            return guide.locs.beta.cpu().numpy(), np.diag(guide.scales.beta.cpu().numpy() ** 2)
        normal = guide.get_posterior()
        if isinstance(guide, autoguide.AutoDiagonalNormal):
            return normal.mean.cpu().numpy(), np.diag(normal.variance.cpu().numpy())
        return normal.mean.cpu().numpy(), normal.covariance_matrix.cpu().numpy()


FULL = (autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal, autoguide.AutoLaplaceApproximation)
MEAN_FIELD = (autoguide.AutoNormal, autoguide.AutoDiagonalNormal)


@pytest.mark.parametrize("family", [*FULL, *MEAN_FIELD, autoguide.AutoDelta], ids=lambda family: family.__name__)
def test_an_automatic_guide_finds_its_closed_form(family: type[AutoGuide], device: torch.device) -> None:
    """Within 2 % of a standard deviation: all of the posterior, or the best of a smaller family.

    The best independent normals have the posterior's mean and the inverse of its precision's diagonal (Bishop, 10.1.2).
    """
    posterior = svi(guide=family).fit(regression, DESIGN.to(device), Y.to(device))
    mean, covariance = exact()
    found, spread = moments(posterior)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs(found - mean).max() < 0.02 * sd.min()
    if family in FULL:
        np.testing.assert_allclose(np.sqrt(np.diag(spread)), sd, rtol=0.02)
        np.testing.assert_allclose(spread[0, 1], covariance[0, 1], atol=0.02 * sd[0] * sd[1])
    elif family in MEAN_FIELD:
        np.testing.assert_allclose(np.sqrt(np.diag(spread)), np.diag(np.linalg.inv(covariance)) ** -0.5, rtol=0.02)


def mixture(y: Tensor) -> None:
    """One location, rows that may be off by three: its finite sites are summed out."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        is_off = pyro.sample("is_off", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(mean + 3.0 * is_off, 1.0), obs=y)


SHIFTED = torch.tensor([0.1, -0.4, 3.2, 0.6, 2.7, -0.2]).double()


def peak() -> tuple[float, float]:
    """Mode and curvature by quadrature on a grid."""
    grid = np.linspace(-3.0, 4.0, 70001)
    rows = SHIFTED.numpy()[:, None]
    density = 0.7 * np.exp(-0.5 * (rows - grid) ** 2) + 0.3 * np.exp(-0.5 * (rows - grid - 3.0) ** 2)
    log = np.log(density).sum(0) - grid**2 / 18
    best = int(log.argmax())
    return grid[best], float(-(log[best + 100] - 2 * log[best] + log[best - 100]) / (100 * 1e-4) ** 2) ** -0.5


@pytest.mark.parametrize("family", [*FULL, *MEAN_FIELD, autoguide.AutoDelta], ids=lambda family: family.__name__)
def test_finite_sites_are_summed_out_of_every_automatic_guide(family: type[AutoGuide]) -> None:
    if family is autoguide.AutoLowRankMultivariateNormal:
        pytest.skip("one latent number has no low rank")
    posterior = svi(guide=family, steps=300).fit(mixture, SHIFTED)
    assert posterior.draws["is_off"].shape == (1, 2, 6) and posterior.draws["mean"].shape == (1, 2)
    mode, sd = peak()
    if family is autoguide.AutoDelta:
        assert abs(float(posterior.draws["mean"][0, 0]) - mode) < 0.02 * sd
    elif family is autoguide.AutoLaplaceApproximation:
        draws = svi(guide=family, steps=300, draws=4000).fit(mixture, SHIFTED).draws["mean"]
        assert abs(float(posterior.weights["guide.loc"]) - mode) < 0.02 * sd
        assert float(draws.std()) == pytest.approx(sd, rel=4 / 8000**0.5)  # a false alarm in 1.6e4 runs


def test_a_guide_may_be_an_instance_or_a_function() -> None:
    mean, covariance = exact()

    def by_hand(design: Tensor, y: Tensor) -> None:
        loc = pyro.param("loc", design.new_zeros(2))  # noqa: TID251
        root = pyro.param("root", torch.eye(2).to(design), constraint=dist.constraints.lower_cholesky)  # noqa: TID251
        pyro.sample("beta", dist.MultivariateNormal(loc, scale_tril=root))

    for guide in (autoguide.AutoMultivariateNormal(regression), by_hand):
        posterior = svi(guide=guide).fit(regression, DESIGN, Y)
        assert np.abs(posterior.weights["guide.loc"].numpy() - mean).max() < 0.02 * np.sqrt(np.diag(covariance)).min()


def test_mini_batches_find_the_posterior_of_all_rows() -> None:
    """Within a fifth of a standard deviation after 200 passes."""
    posterior = svi(guide=autoguide.AutoMultivariateNormal, steps=600, learning_rate=0.05, batch_size=10).fit(
        regression, DESIGN, Y
    )
    mean, covariance = exact()
    found, spread = moments(posterior)
    sd = np.sqrt(np.diag(covariance))
    assert (np.abs(found - mean) < 0.2 * sd).all()
    np.testing.assert_allclose(np.sqrt(np.diag(spread)), sd, rtol=0.2)


def strange(design: Tensor, y: Tensor) -> None:
    pyro.sample("gamma", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))  # noqa: TID251


def nothing(design: Tensor, y: Tensor) -> None:
    pyro.param("loc", torch.tensor(0.0))  # noqa: TID251


@pytest.mark.parametrize(
    ("guide", "sentence"),
    [
        (strange, "The guide samples 'gamma', but regression has no such latent site"),
        (nothing, "The guide does not sample 'beta', a latent site of regression"),
    ],
)
def test_a_guide_must_have_the_sites_of_the_program(guide: Any, sentence: str) -> None:
    with pytest.raises(Unsupported, match=sentence):
        svi(guide=guide).fit(regression, DESIGN, Y)


def test_mini_batches_need_rows() -> None:
    def program(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)

    with pytest.raises(Unsupported, match=r"batch_size needs rows, but no plate of program has the size .* \(30\)"):
        svi(batch_size=5).fit(program, Y)


def test_a_class_that_is_no_guide_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a Pyro guide or a class of automatic guides"):
        svi(guide=dict).fit(regression, DESIGN, Y)


def test_a_guide_of_a_program_in_a_handler_sees_the_handler() -> None:
    halved = poutine.scale(regression, scale=0.5)
    posterior = svi(guide=autoguide.AutoMultivariateNormal).fit(halved, DESIGN, Y)
    _, covariance = exact()
    _, spread = moments(posterior)
    np.testing.assert_allclose(np.diag(spread), 2.0 * np.diag(covariance), rtol=0.05)
