"""Inverse Gaussian conditionals, and the exact E-step over scales, on programs that are no model of the package.

False alarms. 6 tests at 1e-4 and 8 comparisons at 6.3e-5: a fresh seed would fail in one of 900 runs of this file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
from torch import Tensor

from agreement import assert_agree
from exact import Moments, array, averaged, grid, moments, noise
from inference import EM, Gibbs
from inference.conditionals import InverseGaussianConditional, PowerGammaConditional
from inference.handlers import isolated
from inference.latents import PositiveLatents
from inference.messages import InverseGaussian
from zoo import BY_NAME

RUN: dict[str, Any] = {"seed": 1, "progress": False}
RATES = [(1.0, 1.0), (2.0, 0.3), (0.5, 40.0), (1.0, 1e-6)]


@pytest.mark.parametrize("order", [0.5, -0.5])
@pytest.mark.parametrize(("a", "b"), RATES[:3])
def test_draws_and_densities_are_those_of_scipy(a: float, b: float, order: float) -> None:
    """scipy's generalised inverse Gaussian; Kolmogorov and Smirnov at 1e-4 each."""
    if order < 0:
        a, b = b, a
    conditional = InverseGaussianConditional(array([a]), array([b]), order)
    exact = scipy.stats.geninvgauss(order, np.sqrt(a * b), scale=np.sqrt(b / a))
    with isolated(0):
        draws = InverseGaussianConditional(array(a).expand(4000), array(b).expand(4000), order).sample()
    assert scipy.stats.kstest(draws.numpy(), exact.cdf).pvalue > 1e-4
    for value in (0.1, 1.0, 7.0):
        found = float(conditional.log_prob(array([value])))
        assert found == pytest.approx(float(exact.logpdf(value)), rel=1e-6, abs=1e-6)
    assert float(conditional.mean()) == pytest.approx(exact.mean(), rel=1e-6)
    mode = conditional.mode()
    for other in (0.99 * mode, 1.01 * mode):
        assert (conditional.log_kernel(other) < conditional.log_kernel(mode)).all()


@pytest.mark.parametrize("order", [0.5, -0.5])
@pytest.mark.parametrize(("a", "b"), [*RATES, (1.0, 0.0), (1.0, 1e-14)])
def test_messages_give_both_rates_back(a: float, b: float, order: float) -> None:
    """Also where one rate is far below the other: its square root, the size of a residual, has eight digits of the whole."""
    if order < 0:
        a, b = b, a
    family, value = InverseGaussian(order, ""), array([1.0])
    points = family.initial(value)
    for _ in range(4):
        at = family.at(points)
        found = family.solve(at, (order - 1.0) / at - 0.5 * a + 0.5 * b / at.square())
        assert bool(found.is_proper.all())
        points = found.points()
    np.testing.assert_allclose(float(found.a) ** 0.5, a**0.5, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(float(found.b) ** 0.5, b**0.5, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "conditional",
    [
        InverseGaussianConditional(array([2.0]), array([0.3]), 0.5),
        InverseGaussianConditional(array([2.0]), array([0.3]), -0.5),
        PowerGammaConditional(array([2.5]), array([0.7]), 1.0), PowerGammaConditional(array([2.5]), array([0.7]), -1.0),
        PowerGammaConditional(array([0.4]), array([0.7]), -2.0),
    ],
    ids=str,
)  # fmt: skip
def test_two_points_have_the_expected_statistics(conditional: Any) -> None:
    """Both statistics of each family, beside numerical integrals of scipy."""
    points = PositiveLatents._matched(conditional)[0, :, 0].numpy()
    if isinstance(conditional, InverseGaussianConditional):
        a, b = float(conditional.a), float(conditional.b)
        exact = scipy.stats.geninvgauss(conditional.order, np.sqrt(a * b), scale=np.sqrt(b / a))
        statistics = (lambda z: z, lambda z: 1.0 / z)
        expected = [exact.expect(t) for t in statistics]
    else:
        gamma = scipy.stats.gamma(float(conditional.concentration), scale=1.0 / float(conditional.rate))
        power = conditional.power
        statistics = (lambda z: z**power, np.log)
        expected = [gamma.mean(), gamma.expect(lambda g: np.log(g) / power)]
    for statistic, value in zip(statistics, expected, strict=True):
        assert statistic(points).mean() == pytest.approx(value, rel=1e-6)


# --------------------------------------------------------------------------------------- scale mixtures, as users write them
DESIGN, RESPONSE = noise(25, 2, seed=5), noise(25, 2, seed=5) @ array(0.6, 0.0) + 0.8 * noise(25, seed=6)


def lasso(x: Tensor, y: Tensor) -> None:
    """Laplace priors as mixtures of normals (Park and Casella, 2008)."""
    with pyro.plate("columns", x.shape[1]):
        spread = pyro.sample("spread", dist.Exponential(x.new_tensor(4.5)))
        beta = pyro.sample("beta", dist.Normal(0.0, spread.sqrt()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, 0.8), obs=y)


def test_the_lasso_is_drawn_exactly() -> None:
    """√(2 · 4.5) = 3 is the rate of the Laplace prior; on a grid."""
    points = grid((-1.5, 2.0, 801), (-1.5, 1.5, 801))
    log_density = -0.5 * ((RESPONSE - points @ DESIGN.T) / 0.8).square().sum(1) - 3.0 * points.abs().sum(1)
    posterior = Gibbs(chains=16, warmup=50, draws=250, thin=2, **RUN).fit(lasso, DESIGN, RESPONSE)
    assert posterior.plan["spread"].update == "InverseGaussian of the reciprocal"
    assert max(posterior.plan[site].certificate for site in posterior.plan) < 1e-8
    assert_agree(posterior.draws, moments(log_density, {"beta": points}))


def volatility(y: Tensor) -> None:
    """Normal observations whose variance has an inverse Gaussian prior, by its density: the order changes sign."""
    with pyro.plate("rows", len(y)):
        variance = pyro.sample("variance", dist.Exponential(y.new_tensor(1.5)))
        pyro.factor("order", -0.5 * variance.log() - 0.05 / variance)
        pyro.sample("y", dist.Normal(0.0, variance.sqrt()), obs=y)


def test_an_inverse_gaussian_is_drawn_exactly() -> None:
    """order ½ − ½ − 1 = −1: a half too little for one of the two families; with √variance more it is −½."""

    def shifted(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            variance = pyro.sample("variance", dist.Exponential(y.new_tensor(1.5)))
            pyro.factor("order", -variance.log() - 0.05 / variance)
            pyro.sample("y", dist.Normal(0.0, variance.sqrt()), obs=y)

    y = array(0.3, -1.0)
    posterior = Gibbs(chains=8, warmup=20, draws=500, **RUN).fit(shifted, y)
    assert posterior.plan["variance"].update == "InverseGaussian"
    z = np.exp(np.linspace(-12.0, 4.0, 20_001))
    parts = [
        averaged(-1.5 * np.log(z) - 1.5 * z - (0.05 + 0.5 * float(v) ** 2) / z + np.log(z), z, np.zeros_like(z)) for v in y
    ]
    exact = Moments(np.array([p.mean for p in parts]), np.array([p.sd for p in parts]))
    assert_agree(posterior.draws, {"variance": exact})
    other = Gibbs(chains=2, warmup=5, draws=5, **RUN).fit(volatility, y)
    assert "InverseGaussian" not in other.plan["variance"].update  # order 0 is neither


def test_em_with_students_errors_ends_at_the_mode() -> None:
    """Gamma scales averaged exactly: the zoo's robust regression, whose mode is known by its marginal density."""
    robust = BY_NAME["robust"]
    posterior = EM(steps=500, tolerance=1e-10, **RUN).fit(robust.program, *robust.data)
    assert posterior.plan["weight"].update == "Gamma"
    np.testing.assert_allclose(posterior.point()["beta"], robust.mode["beta"], rtol=1e-6)
    path = posterior.history["log_joint"]
    assert (path.diff() >= -1e-9 * path.abs().max()).all()


def test_em_on_batches_averages_scales_exactly() -> None:
    """Half of the rows a step, the last half of the steps averaged: within a tenth of a posterior deviation of the mode."""
    robust = BY_NAME["robust"]
    x, y = robust.data
    posterior = EM(steps=300, batch_size=len(y) // 2, **RUN).fit(robust.program, x, y)
    far = np.abs(posterior.point()["beta"].numpy() - robust.mode["beta"]) / robust.moments["beta"].sd
    assert far.max() < 0.1


def absolute(y: Tensor) -> None:
    """Laplace errors, so that the mode is near the median (the prior is wide)."""
    middle = pyro.sample("middle", dist.Normal(y.new_tensor(0.0), 100.0))
    with pyro.plate("rows", len(y)):
        scale = pyro.sample("scale", dist.Exponential(y.new_tensor(0.5)))
        pyro.sample("y", dist.Normal(middle, scale.sqrt()), obs=y)


def test_em_with_laplace_errors_ends_at_the_median() -> None:
    """At a kink, where no gradient is zero; and the objective is the log-density there."""
    y = array(-3.0, 0.5, 1.25, 9.0, 40.0)
    posterior = EM(steps=400, **RUN).fit(absolute, y)
    assert posterior.plan["scale"].update == "InverseGaussian of the reciprocal"
    assert float(posterior.point()["middle"]) == pytest.approx(1.25, abs=1e-5)
    expected = -(y - 1.25).abs().sum() - 5 * np.log(2.0) + dist.Normal(0.0, 100.0).log_prob(array(1.25))
    assert float(posterior.history["log_joint"][-1]) == pytest.approx(float(expected), abs=1e-5)
