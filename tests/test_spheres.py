"""Directions: densities beside scipy's and quadrature, draws beside their distribution functions, gradients beside moments.

False alarms. Seeds are fixed. With fresh ones: comparisons with a standard error are at 3 of them for the slopes of means in
the concentration (17 comparisons at 2.7e-3: 4.5 % a run), else at 4.5 (60 comparisons at 6.8e-6); goodness of fit at a
p-value of 1e-4 (26 tests: 0.3 %).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import kl_divergence
from torch.func import grad, vmap

from agreement import assert_agree
from exact import Moments, array
from inference import EM, HMC, Gibbs, MetropolisHastings
from inference.handlers import isolated
from pyro_genmodels.distributions import HypersphericalUniform, PowerSpherical, VonMisesFisher
from pyro_genmodels.distributions.special import langevin, log1mexp, log_gamma_ratio, log_sinhc, tilted
from pyro_genmodels.distributions.spheres import _slope

FAMILIES = pytest.mark.parametrize("family", [VonMisesFisher, PowerSpherical])
DIMENSIONS = pytest.mark.parametrize("dimension", [2, 3, 5, 20])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
RUN: dict[str, Any] = {"seed": 1, "progress": False}


def pole(dimension: int, **options: Any) -> Tensor:
    return torch.eye(dimension, **{"dtype": torch.float64, **options})[0]


def unit(*shape: int, seed: int = 0) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(noise, dim=-1)


def at_angle(angle: Tensor, dimension: int) -> Tensor:
    """Points at an angle from the first axis."""
    rest = angle.sin().unsqueeze(-1) * pole(dimension - 1).to(angle)
    return torch.cat([angle.cos().unsqueeze(-1), rest], -1)


def angular(given: Any, angle: Tensor) -> Tensor:
    """Density of the angle from the first axis."""
    dimension = given.event_shape[0]
    log_area = math.log(2.0) + 0.5 * (dimension - 1) * math.log(math.pi) - math.lgamma(0.5 * (dimension - 1))
    return (given.log_prob(at_angle(angle, dimension)) + log_area).exp() * angle.sin() ** (dimension - 2)


def expected(given: Any, what: Callable[[Tensor], Tensor]) -> float:
    """E what(θ), by Gauss and Legendre on panels that are short near 0, where a large concentration is, and near π."""
    nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(16))
    steps = torch.logspace(-5, math.log10(0.5), 60, dtype=torch.float64)
    ends = math.pi * torch.cat([steps.new_zeros(1), steps, 1.0 - steps[:-1].flip(0), steps.new_ones(1)])
    half = 0.5 * ends.diff().unsqueeze(-1)
    angle = (ends[:-1].unsqueeze(-1) + half * (1.0 + nodes)).reshape(-1)
    return float((half * weights).reshape(-1) @ (angular(given, angle) * what(angle)))


def log_density(given: Any) -> Callable[[Tensor], Tensor]:
    """Of a point at an angle from the first axis."""
    return lambda angle: given.log_prob(at_angle(angle, given.event_shape[0]))


def z_score(values: Tensor, mean: float) -> float:
    return float((values.double().mean() - mean) / (values.double().std() / math.sqrt(values.numel())))


# --------------------------------------------------------------------------------------------- densities
@FAMILIES
@DIMENSIONS
@pytest.mark.parametrize("kappa", [0.0, 0.5, 10.0, 3000.0])
def test_densities_integrate_to_one(family: Any, dimension: int, kappa: float) -> None:
    given = family(pole(dimension), kappa)
    assert expected(given, torch.ones_like) == pytest.approx(1.0, abs=1e-9)
    assert expected(given, torch.cos) == pytest.approx(float(given.mean[0]), abs=1e-9)
    assert float(given.entropy()) == pytest.approx(-expected(given, log_density(given)), abs=1e-8)


@pytest.mark.parametrize("dimension", [2, 3, 4, 10, 51])
@pytest.mark.parametrize("kappa", [1e-3, 1.0, 40.0, 600.0])
def test_von_mises_and_fisher_s_density_is_that_of_scipy(dimension: int, kappa: float) -> None:
    mean, x = unit(dimension), unit(7, dimension, seed=1)
    peer = stats.vonmises_fisher(mean.numpy(), kappa)
    given = VonMisesFisher(mean, kappa)
    np.testing.assert_allclose(given.log_prob(x), peer.logpdf(x.numpy()), rtol=1e-10, atol=1e-10)
    assert float(given.entropy()) == pytest.approx(peer.entropy(), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 4e-6)])
@pytest.mark.parametrize("dimension", [2, 3, 4, 5, 20, 37, 38, 64])
def test_the_normaliser_and_the_mean_are_ratios_of_bessel_functions(
    dimension: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Small and large concentrations, low and high orders; and the derivative of one is the other.

    Sums of numbers of the size of 18 log κ are rounded, 2e-5 in float32.
    """
    kappa = torch.tensor([0.01, 0.1, 1.0, 5.0, 30.0, 200.0, 1e4, 1e6], dtype=dtype, requires_grad=True)
    found, order, at = tilted(kappa, dimension), 0.5 * dimension - 1.0, kappa.detach().double().numpy()
    bessel = special.ive(order, at)
    excess = np.log(bessel) - order * np.log(0.5 * at) + special.gammaln(order + 1.0)
    mean = special.ive(order + 1.0, at) / bessel
    scale = 1.0 + np.abs(excess)
    assert (np.abs(found.excess.detach().double().numpy() - excess) / scale).max() < tolerance
    np.testing.assert_allclose(found.mean.detach().double(), mean, rtol=tolerance)
    slopes = torch.autograd.grad(found.log_normaliser.sum(), kappa, retain_graph=True)[0]
    np.testing.assert_allclose(slopes.double(), mean, rtol=max(tolerance, 1e-11))
    np.testing.assert_allclose(found.mean.detach() + found.rest.detach(), torch.ones(8), rtol=4 * tolerance)
    # at large κ, 1 − A = (d − 1)/(2κ) − (d − 1)(d − 3)/(8κ²) + O(κ⁻³), where a difference would have few digits left
    width, last = dimension - 1, at[-1]
    series = width / (2.0 * last) - width * (dimension - 3) / (8.0 * last**2)
    assert float(found.rest[-1].detach()) == pytest.approx(series, rel=max(1e-4 * (dtype == torch.float32), 1e-7))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-6)])
def test_special_functions_are_their_formulas(dtype: torch.dtype, tolerance: float) -> None:
    a = torch.tensor([1e-6, 0.5, 3.0, 200.0], dtype=dtype).unsqueeze(-1)
    b = torch.tensor([0.0, 0.5, 9.0, 80.0], dtype=dtype)
    value, slope = log_gamma_ratio(a, b)
    high, low = (a + b).double().numpy(), a.double().numpy()
    np.testing.assert_allclose(value, special.gammaln(high) - special.gammaln(low), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope, special.digamma(high) - special.digamma(low), rtol=tolerance, atol=tolerance)
    y = torch.tensor([0.0, 1e-3, 0.1, 0.299, 0.301, 2.0, 20.0, 300.0], dtype=dtype, requires_grad=True)
    at = y.detach().double().numpy()[1:]
    exact = np.concatenate([[0.0], np.log(np.sinh(at) / at)])
    np.testing.assert_allclose(log_sinhc(y).detach(), exact, rtol=tolerance, atol=tolerance)
    slopes = torch.autograd.grad(log_sinhc(y).sum(), y)[0]
    np.testing.assert_allclose(slopes, langevin(y.detach()), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slopes[1:], 1.0 / np.tanh(at) - 1.0 / at, rtol=tolerance, atol=5 * tolerance)
    minus = torch.tensor([-1e-30, -1e-5, -0.5, -1.0, -50.0], dtype=dtype, requires_grad=True)
    at = minus.detach().double().numpy()
    exact = np.where(at > -1.0, np.log(-np.expm1(at.clip(-1.0))), np.log1p(-np.exp(at.clip(max=-0.5))))
    np.testing.assert_allclose(log1mexp(minus).detach(), exact, rtol=tolerance)
    assert torch.autograd.grad(log1mexp(minus).sum(), minus)[0].isfinite().all()


@FAMILIES
def test_log_densities_have_the_gradients_of_differences(family: Any) -> None:
    for dimension in (2, 3, 6):
        kappa = array(0.1, 1.0, 7.0, 60.0).requires_grad_()
        mean, x = unit(4, dimension).requires_grad_(), unit(4, dimension, seed=1).requires_grad_()
        assert gradcheck(lambda k, m, x: family(m, k, validate_args=False).log_prob(x), (kappa, mean, x))
        mean = mean.detach()
        assert gradcheck(lambda k, m=mean: family(m, k).entropy(), (kappa,))


# --------------------------------------------------------------------------------------------- draws
@FAMILIES
@DTYPES
@pytest.mark.parametrize(("dimension", "kappa"), [(2, 0.0), (2, 5.0), (3, 300.0), (5, 2.0), (20, 30.0), (200, 90.0)])
def test_draws_are_of_the_density(family: Any, dtype: torch.dtype, dimension: int, kappa: float) -> None:
    """The angle has its distribution function; the tangent is uniform, and knows nothing of the angle."""
    mean = unit(dimension, seed=dimension).to(dtype)
    with isolated(dimension):
        x = family(mean, kappa).sample(torch.Size([4000]))
    assert x.dtype == dtype and dist.constraints.sphere.check(x).all()
    points = torch.linspace(0.0, math.pi, 20001, dtype=torch.float64)
    table = integrate.cumulative_simpson(angular(family(pole(dimension), kappa), points), x=points, initial=0.0)
    x, mean = x.double(), mean.double()
    angle = 2.0 * torch.asin(0.5 * (x - mean).norm(dim=-1).clamp(max=2.0))
    assert stats.kstest(angle.numpy(), lambda a: np.interp(a, points, table)).pvalue > 1e-4
    across = unit(dimension, seed=99)
    across = torch.nn.functional.normalize(across - (across @ mean) * mean, dim=0)
    tangent = torch.nn.functional.normalize(x - (x @ mean).unsqueeze(-1) * mean, dim=-1) @ across
    if dimension == 2:
        assert abs(z_score(tangent, 0.0)) < 4.5
    else:
        beta = stats.beta(0.5 * (dimension - 2), 0.5 * (dimension - 2), loc=-1.0, scale=2.0)
        assert stats.kstest(tangent.numpy(), beta.cdf).pvalue > 1e-4
    assert stats.spearmanr(tangent.numpy(), angle.numpy()).pvalue > 1e-4


def test_uniform_directions_are_uniform() -> None:
    given = HypersphericalUniform(4, torch.zeros((), dtype=torch.float64))
    with isolated(0):
        x = given.sample(torch.Size([4000]))
    first = stats.beta(1.5, 1.5, loc=-1.0, scale=2.0)
    assert all(stats.kstest(x[:, i].numpy(), first.cdf).pvalue > 1e-4 for i in range(4))
    assert float(given.entropy()) == pytest.approx(math.log(2.0 * math.pi**2))
    assert float(given.log_prob(x[0])) == pytest.approx(-math.log(2.0 * math.pi**2))


def slope_of_mean(family: Any, dimension: int, kappa: float) -> float:
    """A'(κ), by the formula."""
    if family is PowerSpherical:
        return (dimension - 1) / (kappa + dimension - 1) ** 2
    if kappa == 0.0:
        return 1.0 / dimension
    mean = special.ive(0.5 * dimension, kappa) / special.ive(0.5 * dimension - 1.0, kappa)
    return 1.0 - mean**2 - (dimension - 1) * mean / kappa


@FAMILIES
@pytest.mark.parametrize(("dimension", "kappa"), [(2, 1.0), (3, 2.0), (3, 0.0), (5, 2.0), (5, 50.0), (20, 5.0), (20, 100.0)])
def test_draws_carry_the_slope_of_the_mean_in_the_concentration(family: Any, dimension: int, kappa: float) -> None:
    """d/dκ E μᵀx = A'(κ), within 3 standard errors of less than 1 %.

    Differentiating through the accepted proposal is 13 % off at d = 5, κ = 2.
    """
    concentration = torch.full((100_000,), kappa, dtype=torch.float64, requires_grad=True)
    with isolated(3):
        along = family(pole(dimension), concentration).rsample()[:, 0]
    slopes = torch.autograd.grad(along.sum(), concentration)[0]
    exact = slope_of_mean(family, dimension, kappa)
    assert abs(z_score(slopes, exact)) < 3.0
    assert float(slopes.std()) / math.sqrt(len(slopes)) < 0.01 * exact


def test_draws_carry_the_slope_of_the_mean_in_float32() -> None:
    for dimension, kappa in ((3, 500.0), (5, 2.0), (20, 5000.0)):
        concentration = torch.full((100_000,), kappa, requires_grad=True)
        mean = pole(dimension, dtype=torch.float32)
        with isolated(4):
            x = VonMisesFisher(mean, concentration).rsample()
        away = -0.5 * (x - mean).square().sum(-1)  # μᵀx − 1, of which float32 keeps the digits
        slopes = torch.autograd.grad(away.sum(), concentration)[0]
        assert abs(z_score(slopes, slope_of_mean(VonMisesFisher, dimension, kappa))) < 3.0


def test_the_slope_of_an_angle_is_that_of_its_quantile_on_the_ordinary_sphere() -> None:
    """d = 3, where quantiles are elementary: (1 − t)/2 = −log(q + (1 − q) e^(−2κ)) / 2κ, t = cos θ."""
    kappa = torch.tensor([0.1, 1.0, 10.0, 300.0, 1e4], dtype=torch.float64, requires_grad=True)
    for quantile in (1e-4, 1e-3, 0.2, 0.5, 0.9, 0.999):
        half = -torch.log(quantile + (1.0 - quantile) * torch.exp(-2.0 * kappa)) / (2.0 * kappa)
        angle = 2.0 * torch.asin(half.clamp(max=1.0).sqrt())
        exact = torch.autograd.grad(angle.sum(), kappa)[0]
        torch.testing.assert_close(_slope(angle.detach(), kappa.detach(), 3), exact, rtol=1e-7, atol=1e-12)


@FAMILIES
def test_draws_carry_the_slopes_of_other_moments_and_of_directions(family: Any) -> None:
    """E t² in κ; E cᵀx = A(κ) cᵀμ in μ, along the sphere: A(κ) (I − μ μᵀ) c."""
    dimension, kappa, draws = 4, 3.0, 100_000
    concentration = torch.full((draws,), kappa, dtype=torch.float64, requires_grad=True)
    mean, across = unit(dimension, seed=2), unit(dimension, seed=3)
    many = mean.expand(draws, -1).clone().requires_grad_()
    with isolated(5):
        x = family(many, concentration).rsample()
    slopes = torch.autograd.grad((x @ mean).square().sum(), concentration, retain_graph=True)[0]
    step = 1e-3
    second = [expected(family(pole(dimension), kappa + sign * step), lambda a: a.cos().square()) for sign in (-1.0, 1.0)]
    assert abs(z_score(slopes, (second[1] - second[0]) / (2.0 * step))) < 4.5
    by_mean = torch.autograd.grad((x @ across).sum(), many)[0]
    by_mean = by_mean - (by_mean @ mean).unsqueeze(-1) * mean
    length = float(family(mean, kappa).mean @ mean)
    exact = length * (across - (across @ mean) * mean)
    for i in range(dimension):
        assert abs(z_score(by_mean[:, i], float(exact[i]))) < 4.5


def test_draws_carry_second_derivatives() -> None:
    """Of E μᵀx in κ, and under torch.func."""
    exact = torch.autograd.functional.hessian(lambda k: tilted(k, 5).log_normaliser, array(3.0))
    third = torch.autograd.functional.jacobian(
        lambda k: torch.func.hessian(lambda j: tilted(j, 5).log_normaliser)(k), array(3.0)
    )
    kappa = torch.full((50_000,), 3.0, dtype=torch.float64)

    def along(k: Tensor) -> Tensor:
        return VonMisesFisher(pole(5), k, validate_args=False).rsample()[0]

    with isolated(6):
        first = vmap(grad(along), randomness="different")(kappa)
        second = vmap(grad(grad(along)), randomness="different")(kappa)
    assert abs(z_score(first, float(exact))) < 4.5
    assert abs(z_score(second, float(third))) < 4.5


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # of torch's Gamma
@FAMILIES
def test_draws_can_be_vectorised(family: Any) -> None:
    """Parameters may be batched or not; each copy has draws, and derivatives, of its own."""
    kappa, means = array(0.5, 2.0, 40.0), unit(3, 5)

    def draw(k: Tensor, mean: Tensor) -> Tensor:
        return pyro.sample("x", family(mean, k, validate_args=False))

    with isolated(7):
        x = vmap(draw, randomness="different")(kappa, means)
        same = vmap(lambda k: draw(k, means[0]), randomness="different")(kappa)
        fixed = vmap(lambda mean: draw(torch.tensor(3.0, dtype=torch.float64), mean), randomness="different")(means)
        slopes = vmap(grad(lambda k, m: family(m, k, validate_args=False).rsample() @ pole(5)), randomness="different")(
            kappa, means
        )
    for found in (x, same, fixed):
        assert dist.constraints.sphere.check(found).all() and len(found[:, 0].unique()) == 3
    assert slopes.isfinite().all() and (slopes != 0.0).all()
    assert vmap(lambda k, m, x: family(m, k, validate_args=False).log_prob(x))(kappa, means, x).shape == (3,)


@FAMILIES
@DTYPES
def test_nothing_is_lost_at_poles_and_extremes(family: Any, dtype: torch.dtype) -> None:
    """μ = ±e_1 and all other axes, κ = 0 and so large that x is μ to rounding: unit vectors and finite gradients."""
    for dimension in (2, 3, 30):
        axes = torch.cat([torch.eye(dimension, dtype=dtype), -torch.eye(dimension, dtype=dtype)])[:, None]
        means = axes.expand(-1, 5, -1).clone().requires_grad_()
        kappa = torch.tensor([0.0, 1e-6, 1.0, 1e3, 1e7], dtype=dtype, requires_grad=True)
        with isolated(8):
            given = family(means, kappa)
            x = given.rsample(torch.Size([4]))
        assert dist.constraints.sphere.check(x).all()
        uniform = HypersphericalUniform(dimension, means)
        for value in (x.sum(-1), given.log_prob(x), given.log_prob(-means.detach())[:, :1], kl_divergence(given, uniform)):
            assert value.isfinite().all()
            for slope in torch.autograd.grad(value.sum(), (means, kappa), retain_graph=True, allow_unused=True):
                assert slope is None or slope.isfinite().all()
        near = given.log_prob(means).detach()
        assert (near.diff(dim=-1) >= 0.0).all()  # the more concentrated, the higher the mode
        torch.testing.assert_close(given.log_prob(x.detach())[..., 0], uniform.log_prob(x)[..., 0])  # κ = 0
        assert (kl_divergence(given, uniform)[:, 0].abs() < 1e-5).all()


# --------------------------------------------------------------------------------------------- divergences
@FAMILIES
@DIMENSIONS
def test_divergences_are_expectations(family: Any, dimension: int) -> None:
    """From the uniform distribution by quadrature; from another direction by its draws, at 4.5 standard errors."""
    for kappa in (0.0, 1.0, 80.0):
        given, uniform = family(pole(dimension), kappa), HypersphericalUniform(dimension, pole(dimension))
        log_area = float(uniform.entropy())
        own = expected(given, log_density(given)) + log_area
        assert float(kl_divergence(given, uniform)) == pytest.approx(own, abs=1e-8)
        other = VonMisesFisher(unit(dimension, seed=4), 2.5)
        with isolated(9):
            x, u = given.sample(torch.Size([20_000])), uniform.sample(torch.Size([20_000]))
        difference = given.log_prob(x) - other.log_prob(x)
        if kappa:
            assert abs(z_score(difference, float(kl_divergence(given, other)))) < 4.5
        assert abs(z_score(-log_area - other.log_prob(u), float(kl_divergence(uniform, other)))) < 4.5
    assert float(kl_divergence(other, other)) == pytest.approx(0.0, abs=1e-13)
    assert float(kl_divergence(uniform, uniform)) == 0.0


@FAMILIES
def test_divergences_in_float32_are_those_in_float64(family: Any) -> None:
    """To 1e-5 of them, at concentrations at which the difference of two large numbers would have none of its digits."""
    for dimension in (3, 20, 300):
        kappa, mean = torch.tensor([1e-2, 1.0, 1e2, 1e4, 1e6]), pole(dimension, dtype=torch.float32)
        rough = kl_divergence(family(mean, kappa), HypersphericalUniform(dimension, mean))
        fine = kl_divergence(family(mean.double(), kappa.double()), HypersphericalUniform(dimension, mean.double()))
        torch.testing.assert_close(rough.double(), fine, rtol=1e-5, atol=1e-5)
        at, exact = kappa.clone().requires_grad_(), kappa.double().requires_grad_()
        rough = torch.autograd.grad(kl_divergence(family(mean, at), HypersphericalUniform(dimension, mean)).sum(), at)[0]
        fine = torch.autograd.grad(
            kl_divergence(family(mean.double(), exact), HypersphericalUniform(dimension, mean)).sum(), exact
        )[0]
        torch.testing.assert_close(rough.double(), fine, rtol=1e-3, atol=1e-7)


# --------------------------------------------------------------------------------------------- shapes and errors
@FAMILIES
def test_shapes_broadcast_and_expand(family: Any) -> None:
    given = family(unit(4, 1, 3), array(1.0, 2.0))
    assert given.batch_shape == (4, 2) and given.event_shape == (3,) and given.mean.shape == (4, 2, 3)
    wide = given.expand(torch.Size([5, 4, 2]))
    assert wide.batch_shape == (5, 4, 2) and wide.rsample(torch.Size([6])).shape == (6, 5, 4, 2, 3)
    assert wide.log_prob(wide.sample()).shape == (5, 4, 2) and wide.entropy().shape == (5, 4, 2)
    uniform = HypersphericalUniform(3).expand(torch.Size([5, 4, 2]))
    assert uniform.sample(torch.Size([6])).shape == (6, 5, 4, 2, 3)
    assert kl_divergence(wide, uniform).shape == kl_divergence(given, uniform).shape == (5, 4, 2)


def test_wrong_parameters_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="at least 2, but d is 1"):
        VonMisesFisher(torch.ones(1), 1.0)
    with pytest.raises(ValueError, match="at least 2, but d is 1"):
        HypersphericalUniform(1)
    with pytest.raises(ValueError, match="torch.int64 and shape"):
        VonMisesFisher(torch.tensor([1, 0]), 1.0)
    with pytest.raises(ValueError, match=r"shape \(\)"):
        PowerSpherical(torch.tensor(1.0), 1.0)
    with pytest.raises(ValueError, match="loc"):
        PowerSpherical(torch.ones(3), 1.0, validate_args=True)
    with pytest.raises(ValueError, match="concentration"):
        VonMisesFisher(pole(3), -1.0, validate_args=True)
    with pytest.raises(ValueError, match="support"):
        VonMisesFisher(pole(3), 1.0, validate_args=True).log_prob(array(1.0, 1.0, 1.0))


# --------------------------------------------------------------------------------------------- inference
SIGHTINGS = unit(5, 3, seed=11)
BACKENDS = {
    "Gibbs": Gibbs(chains=16, warmup=100, draws=300, thin=3, **RUN),
    "HMC": HMC(chains=16, warmup=200, draws=200, thin=2, **RUN),
    "MetropolisHastings": MetropolisHastings(chains=16, warmup=300, draws=200, thin=10, **RUN),
}


def heading(sightings: Tensor) -> None:
    """μ ~ VMF(e_1, 1),  x_n ~ VMF(μ, 2): μ | x ~ VMF again, of the sum e_1 + 2 Σ x_n."""
    mean = pyro.sample("mean", VonMisesFisher(pole(3).to(sightings), 1.0))
    with pyro.plate("rows", len(sightings)):
        pyro.sample("x", VonMisesFisher(mean, 2.0), obs=sightings)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_hidden_direction_is_drawn_from_its_posterior(name: str) -> None:
    draws = BACKENDS[name].fit(heading, SIGHTINGS).draws["mean"]
    total = pole(3) + 2.0 * SIGHTINGS.sum(0)
    kappa = float(total.norm())
    direction = (total / kappa).numpy()
    length = 1.0 / math.tanh(kappa) - 1.0 / kappa
    along = 1.0 - 2.0 * length / kappa  # E t²
    variance = 0.5 * (1.0 - along) + (1.5 * along - 0.5) * direction**2 - (length * direction) ** 2
    assert_agree({"mean": draws}, {"mean": Moments(length * direction, np.sqrt(variance))})


def test_the_mode_of_a_hidden_direction_is_its_mean_direction() -> None:
    """EM's coordinates stretch the sphere: the mode of the density is meant, not that of the coordinates."""
    point = EM(steps=300, **RUN).fit(heading, SIGHTINGS).point()["mean"]
    total = pole(3) + 2.0 * SIGHTINGS.sum(0)
    torch.testing.assert_close(point, total / total.norm(), atol=1e-4, rtol=0.0)
