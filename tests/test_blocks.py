"""Every block leaves the exact conditional of its sites as it is: against closed forms, enumeration and quadrature."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
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
from torch import Tensor
from torch.utils._pytree import tree_leaves

from inference import (
    AdaptiveWalk,
    Conjugate,
    Cycle,
    EllipticalSlice,
    Enumerate,
    Gaussian,
    Gibbs,
    GuideDraw,
    Hamiltonian,
    PolyaGamma,
    Posterior,
    PriorDraw,
    Slice,
    Unsupported,
    polya_gamma,
)
from inference.blocks import Block, Current
from inference.blocks.conjugate import Joined
from inference.density import Density
from inference.handlers import isolated
from inference.plan import assign
from inference.program import Program
from inference.start import starting_values
from inference.terms import Coordinates, Elements, colour

CERTIFICATE = 1e-8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def array(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def fitted(program: Callable[..., None], *data: Tensor, chains: int = 64, draws: int = 50, **options: Any) -> Posterior:
    options = {"warmup": 40, "seed": 0} | options
    return Gibbs(chains=chains, draws=draws, progress=False, **options).fit(program, *data)


def plan_of(program: Callable[..., None], *data: Tensor) -> dict[str, str]:
    with isolated(0):
        blocks, _ = assign(Program(program, data))
    return {site: block.update for block in blocks for site in block.sites}


def assert_certified(posterior: Posterior) -> None:
    assert posterior.plan is not None
    for update in posterior.plan.updates:
        assert update.certificate is None or update.certificate <= CERTIFICATE, update


def assert_mean(values: Tensor, exact: Any, errors: float = 5.0) -> None:
    """Means of independent chains (chain, draw, …) within five standard errors, 6·10⁻⁷ each (10⁻⁵ with 64 chains)."""
    values = values.double()
    error = values.mean(1).std(0) / math.sqrt(len(values))
    off = (values.mean((0, 1)) - torch.as_tensor(exact, dtype=torch.float64)).abs()
    assert bool((off <= errors * error + 1e-12).all()), (values.mean((0, 1)), exact, error)


def at_trials(program: Callable[..., None], *data: Tensor, count: int = 8) -> tuple[Density, Current]:
    looked = Program(program, data)
    density = Density(looked, rung="vmapped")
    values = starting_values(looked, count, most=4)
    return density, Current(values, density.joint(values))


# ------------------------------------------------------------------------------- Pólya-Gamma variables
TILTED = [(b, z) for b in (1.0, 2.0, 0.4, 3.0, 7.5, 60.0) for z in (0.0, 0.7, -4.0, 25.0)]


def log_laplace(t: Tensor, b: float, z: float) -> Tensor:
    """log E exp(−t ω) = b (log cosh(z / 2) − log cosh √((z² / 2 + t) / 2)), for t > 0 − z² / 2."""

    def log_cosh(x: Tensor) -> Tensor:
        return x + torch.log1p((-2.0 * x).exp()) - math.log(2.0)

    return b * (log_cosh(torch.tensor(abs(z) / 2, dtype=torch.float64)) - log_cosh(((0.5 * z * z + t) / 2).sqrt()))


@pytest.mark.parametrize(("b", "z"), TILTED)
def test_moments_of_polya_gamma_are_derivatives_of_its_laplace_transform(b: float, z: float) -> None:
    start = torch.tensor(1e-9 if z == 0.0 else 0.0, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(log_laplace(start, b, z), start, create_graph=True)
    (second,) = torch.autograd.grad(first, start)
    tolerance = 1e-5 if z == 0.0 else 1e-9  # √t at 10⁻⁹ loses half of the digits
    assert float(polya_gamma.mean(array(b), array(z))) == pytest.approx(-float(first.detach()), rel=tolerance)
    if z:
        assert float(polya_gamma.variance(array(b), array(z))) == pytest.approx(float(second), rel=1e-6)
    else:
        assert float(polya_gamma.variance(array(b), array(z))) == pytest.approx(b / 24.0)


def test_moments_of_polya_gamma_are_smooth_where_their_formulas_meet() -> None:
    b = array(1.0)
    for moment, joint in ((polya_gamma.mean, 2e-2), (polya_gamma.variance, 0.1)):
        below, above = moment(b, array(joint * (1 - 1e-9))), moment(b, array(joint * (1 + 1e-9)))
        assert float(below) == pytest.approx(float(above), rel=1e-8)


@pytest.mark.parametrize(("b", "z"), TILTED)
def test_polya_gamma_draws_have_the_laplace_transform(b: float, z: float) -> None:
    """Mean, variance and E exp(−t ω) at two t, each |z| < 5: a false alarm in 18,000 for all 96 together."""
    with isolated(3):
        drawn = polya_gamma.draw(array(b).expand(20_000), array(z).expand(20_000))
    mean, variance = polya_gamma.mean(array(b), array(z)), polya_gamma.variance(array(b), array(z))
    scale = 1.0 / mean
    for values, exact in (
        (drawn, mean),
        ((drawn - mean).square(), variance),
        ((-0.5 * scale * drawn).exp(), log_laplace(0.5 * scale, b, z).exp()),
        ((-4.0 * scale * drawn).exp(), log_laplace(4.0 * scale, b, z).exp()),
    ):
        error = float(values.std()) / math.sqrt(len(values))
        assert abs(float(values.mean() - exact)) < 5 * error


@pytest.mark.parametrize("z", [0.0, 1.3, 6.0])
def test_rejection_and_the_sum_of_gammas_draw_from_one_distribution(z: float) -> None:
    """Two algorithms with nothing in common; Kolmogorov-Smirnov, a false alarm in 10⁴ each."""
    tilts, ones = array(z).repeat(20_000), array(1.0).repeat(20_000)
    with isolated(4):
        rejection, sums = polya_gamma._draw_one(tilts), polya_gamma._draw_sum(ones, tilts)
    assert scipy.stats.ks_2samp(rejection.numpy(), sums.numpy()).pvalue > 1e-4


def test_polya_gamma_variables_of_nothing_and_of_extreme_logits() -> None:
    b, z = array(0.0, 0.0, 1.0, 2.5, 1.0), array(0.0, 3.0, 1e5, -1e4, math.nan)
    with isolated(0):
        drawn = polya_gamma.draw(b, z)
    assert drawn[:2].tolist() == [0.0, 0.0] and bool((drawn >= 0).all()) and bool(drawn.isfinite().all())
    assert drawn[2:4].numpy() == pytest.approx([0.5e-5, 1.25e-4], rel=1e-1)


# ------------------------------------------------------------------------------------ joint Gaussian
X = torch.linspace(2.0, 4.0, 12, dtype=torch.float64)  # far from its origin: intercept and slope are all but one
LINE = 1.0 + 0.5 * X + 0.3 * normal(12, seed=1)


def line(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 2.0))
    intercept = pyro.sample("intercept", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.3), obs=y)


def _line() -> tuple[Tensor, Tensor]:
    """Mean and covariance of slope and intercept."""
    design = torch.stack([X, torch.ones_like(X)], 1)
    covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) / 4 + design.T @ design / 0.09)
    return covariance @ design.T @ LINE / 0.09, covariance


@pytest.mark.usefixtures("inside_a_run")
def test_the_joint_conditional_is_that_of_the_formula() -> None:
    density, trials = at_trials(line, X, LINE)
    block = Gaussian().bind(("slope", "intercept"), density, trials)
    conditional = block.conditional(block.init(density, trials), density, trials.values)
    mean, covariance = _line()
    assert torch.allclose(conditional.mean, mean.expand(8, 2), rtol=1e-9)
    assert torch.allclose(conditional.precision, torch.linalg.inv(covariance).expand(8, 2, 2), rtol=1e-9)


def test_intercept_and_slope_are_drawn_together_and_at_once() -> None:
    """Correlation −0.98: single sites would need hundreds of sweeps, this block none. The correlation of successive draws is
    0, within five standard errors."""
    posterior = fitted(line, X, LINE, draws=50, warmup=10)
    assert posterior.plan is not None and posterior.plan["slope"].update == "Gaussian"
    assert posterior.plan["slope"].sites == ("slope", "intercept")
    assert_certified(posterior)
    mean, covariance = _line()
    slope = posterior.draws["slope"]
    assert_mean(slope, mean[0])
    assert_mean((slope - mean[0]).square(), covariance[0, 0])
    assert_mean((slope - mean[0]) * (posterior.draws["intercept"] - mean[1]), covariance[0, 1])
    successive = ((slope[:, 1:] - mean[0]) * (slope[:, :-1] - mean[0])) / covariance[0, 0]
    assert_mean(successive, 0.0)


def uncoupled(y: Tensor) -> None:
    first = pyro.sample("first", dist.Normal(y.new_tensor(0.0), 1.0))
    second = pyro.sample("second", dist.Normal(y.new_tensor(0.0), 1.0))
    pyro.sample("y", dist.Normal(torch.stack([first, second]), 1.0).to_event(1), obs=y[:2])


def bilinear(y: Tensor) -> None:
    """Rows and columns: each is normal given the other, both together are not."""
    with pyro.plate("left", 3):
        row = pyro.sample("row", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("right", 4):
        column = pyro.sample("column", dist.Normal(y.new_tensor(0.0), 1.0))
    pyro.sample("y", dist.Normal(torch.outer(row, column), 1.0).to_event(2), obs=y[:12].reshape(3, 4))


def two_levels(y: Tensor) -> None:
    """A mean, effects and a slope that is coupled to the effects through the data; bilinear in the loading."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 2.0))
    loading = pyro.sample("loading", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("groups", 3, dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        with pyro.plate("members", 4, dim=-1):
            pyro.sample("y", dist.Normal(loading * effect, 1.0), obs=y[:12].reshape(3, 4))


Y = normal(12, seed=5)


def test_only_what_is_coupled_and_jointly_normal_is_joined() -> None:
    assert plan_of(uncoupled, Y) == {"first": "Normal", "second": "Normal"}
    assert plan_of(bilinear, Y) == {"row": "Normal", "column": "Normal"}
    with isolated(0):
        blocks, _ = assign(Program(two_levels, (Y,)))
    assert {frozenset(block.sites): block.update for block in blocks} == {
        frozenset({"mean", "effect"}): "Gaussian",
        frozenset({"loading"}): "Normal",
    }


def detached_line(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 2.0))
    intercept = pyro.sample("intercept", dist.Normal(x.new_tensor(0.0), 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + 0.5 * (slope + slope.detach()) * x, 0.3), obs=y)


@pytest.mark.parametrize("program", [bilinear, detached_line], ids=lambda program: program.__name__)
def test_what_is_not_jointly_normal_is_refused(program: Callable[..., None]) -> None:
    data = (X, LINE) if program is detached_line else (Y,)
    names = ("slope", "intercept") if program is detached_line else ("row", "column")
    with pytest.raises(Unsupported, match=f"joint conditional of {names[0]}, {names[1]} is not Gaussian"):
        assign(Program(program, data), {names: Gaussian()})


def funnel(y: Tensor) -> None:
    """Effects that all but equal their mean, when the spread is small."""
    spread = pyro.sample("spread", dist.HalfCauchy(y.new_tensor(1.0)))
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 10.0))
    with pyro.plate("rows", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, spread))
        pyro.sample("y", dist.Normal(effect, 5.0), obs=y)


@pytest.mark.usefixtures("inside_a_run")
def test_a_precision_that_is_almost_singular_costs_no_digits() -> None:
    """Condition numbers of 10⁴ to 10¹⁴; the mean has precision 1 / 100 + n / (25 + spread²), the effects integrated out."""
    density, trials = at_trials(funnel, Y, count=6)
    block = Gaussian().bind(("mean", "effect"), density, trials)
    spread = array(1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    values = {**trials.values, "spread": spread, "mean": spread, "effect": spread[:, None] * normal(6, 12)}
    current = Current(values, density.joint(values))
    state = block.init(density, current)
    for _ in range(20):
        state, current, move = block.step(state, density, current, 10)
        assert move.log_ratio is not None and bool((move.log_ratio.abs() < 1e-8).all())
    conditional = block.conditional(state, density, current.values)
    factor, _ = conditional._factor()
    right = torch.zeros(13, 1, dtype=torch.float64)
    right[0] = 1.0
    variance = torch.cholesky_solve(right.expand(6, 13, 1), factor)[:, 0, 0]
    assert torch.allclose(1.0 / variance, 0.01 + 12.0 / (25.0 + spread.square()), rtol=1e-6)
    assert torch.allclose(conditional.mean[:, 0], variance * Y.sum() / (25.0 + spread.square()), rtol=1e-6)


# ------------------------------------------------------------------------------------ logistic sites
DESIGN = torch.cat([torch.ones(20, 1, dtype=torch.float64), normal(20, 1, seed=2)], 1)
LOGITS = DESIGN @ array(0.4, 1.1)
TRIALS = 5.0


def _uniform(seed: int) -> Tensor:
    return torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUCCESSES = array(*scipy.stats.binom.ppf(_uniform(3).numpy(), TRIALS, torch.sigmoid(LOGITS).numpy()))
FAILURES = array(*scipy.stats.nbinom.ppf(_uniform(4).numpy(), 3.0, torch.sigmoid(-LOGITS).numpy()))
IS_SEEN = torch.arange(20) % 4 != 0


def binomial(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Binomial(TRIALS, logits=design @ beta), obs=y)


def split_binomial(design: Tensor, y: Tensor) -> None:
    """Two sites, half of the weight of every row, and some rows not seen."""
    first = pyro.sample("first", dist.Normal(design.new_tensor(0.0), 2.0))
    second = pyro.sample("second", dist.Normal(design.new_tensor(0.0), 2.0))
    with pyro.plate("rows", len(y)), poutine.scale(scale=0.5), poutine.mask(mask=IS_SEEN):
        pyro.sample("y", dist.Binomial(TRIALS, logits=design[:, 0] * first + design[:, 1] * second), obs=y)


def negative_binomial(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.NegativeBinomial(3.0, logits=design @ beta), obs=y)


def by_probability(design: Tensor, y: Tensor) -> None:
    """As the binomial, written with a probability."""
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Binomial(TRIALS, torch.sigmoid(design @ beta)), obs=y)


def _grid() -> np.ndarray:
    axis = np.linspace(-4.0, 6.0, 401)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)


def _log_likelihood(y: Tensor, failures: float, weight: Any = 1.0) -> np.ndarray:
    """Σ weight · (y ψ − b log(1 + e^ψ)) on the grid; b is y + failures, or TRIALS if that is 0."""
    logits = _grid() @ DESIGN.numpy().T
    b = y.numpy() + failures if failures else TRIALS
    return (np.asarray(weight) * (y.numpy() * logits - b * np.logaddexp(0.0, logits))).sum(1)


def _moments(log_likelihood: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and second moments of both coefficients under the prior N(0, 4)."""
    weights = scipy.special.softmax(log_likelihood - 0.125 * (_grid() ** 2).sum(1))
    return weights @ _grid(), weights @ _grid() ** 2


@pytest.mark.parametrize(
    ("program", "y", "failures", "weight"),
    [
        (binomial, SUCCESSES, 0.0, 1.0),
        (split_binomial, SUCCESSES, 0.0, 0.5 * IS_SEEN.numpy()),
        (negative_binomial, FAILURES, 3.0, 1.0),
        pytest.param(by_probability, SUCCESSES, 0.0, 1.0, marks=pytest.mark.slow),
    ],
    ids=["Binomial", "two sites, scaled and masked", "NegativeBinomial", "probabilities"],
)
def test_logistic_regression_agrees_with_quadrature(program: Any, y: Tensor, failures: float, weight: Any) -> None:
    posterior = fitted(program, DESIGN, y, draws=60, warmup=20)
    assert posterior.plan is not None and {update.update for update in posterior.plan.values()} == {"PolyaGamma"}
    assert_certified(posterior)
    assert all(update.acceptance >= 1 - CERTIFICATE for update in posterior.plan.values())
    beta = posterior.draws["beta"] if "beta" in posterior.draws else torch.stack([*posterior.draws.values()], -1)
    first, second = _moments(_log_likelihood(y, failures, weight))
    assert_mean(beta, first)
    assert_mean(beta.square(), second)


@pytest.mark.usefixtures("inside_a_run")
def test_the_augmented_conditional_is_that_of_the_formula() -> None:
    """N(V Xᵀ(y − n/2), V) with V⁻¹ = Xᵀ diag(ω) X + I / 4."""
    density, trials = at_trials(binomial, DESIGN, SUCCESSES)
    block = PolyaGamma().bind(("beta",), density, trials)
    omega = polya_gamma.draw(*block._logistic(density, trials.values))
    conditional: Any = block._conditional(block.init(density, trials), density, trials.values, omega)
    precision = torch.einsum("ni,cn,nj->cij", DESIGN, omega, DESIGN) + torch.eye(2, dtype=torch.float64) / 4
    right = DESIGN.T @ (SUCCESSES - 0.5 * TRIALS)
    assert torch.allclose(conditional.precision, precision, rtol=1e-8)
    assert torch.allclose(conditional.mean, torch.linalg.solve(precision, right.expand(8, 2)), rtol=1e-8)


ANSWERS = (normal(30, 6, seed=6) + normal(30, 1, seed=7) > normal(1, 6, seed=8)).double()


def item_response(answers: Tensor) -> None:
    """Two-parameter logistic: bilinear in discrimination and ability, jointly affine in ability and difficulty."""
    persons, items = pyro.plate("persons", len(answers), dim=-2), pyro.plate("items", answers.shape[1], dim=-1)
    with items:
        discrimination = pyro.sample("discrimination", dist.LogNormal(answers.new_tensor(0.0), 0.3))
        difficulty = pyro.sample("difficulty", dist.Normal(answers.new_tensor(0.0), 1.0))
    with persons:
        ability = pyro.sample("ability", dist.Normal(answers.new_tensor(0.0), 1.0))
    with persons, items:
        pyro.sample("answers", dist.Bernoulli(logits=discrimination * (ability - difficulty)), obs=answers)


def hierarchical_logistic(answers: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(answers.new_tensor(0.0), 2.0))
    variance = pyro.sample("variance", dist.InverseGamma(answers.new_tensor(3.0), 2.0))
    with pyro.plate("persons", len(answers), dim=-2):
        effect = pyro.sample("effect", dist.Normal(mean, variance.sqrt()))
        with pyro.plate("items", answers.shape[1], dim=-1):
            pyro.sample("answers", dist.Bernoulli(logits=effect), obs=answers)


def test_item_response_is_logistic_in_ability_and_difficulty() -> None:
    posterior = fitted(item_response, ANSWERS, chains=4, draws=5, warmup=5)
    assert posterior.plan is not None
    assert {site: update.update for site, update in posterior.plan.items()} == {
        "discrimination": "HMC", "difficulty": "PolyaGamma", "ability": "PolyaGamma",
    }  # fmt: skip
    assert set(posterior.plan["ability"].sites) == {"difficulty", "ability"}
    assert_certified(posterior)


def test_logistic_effects_are_drawn_with_their_mean() -> None:
    with isolated(0):
        blocks, _ = assign(Program(hierarchical_logistic, (ANSWERS[:8],)))
    assert {frozenset(block.sites): block.update for block in blocks} == {
        frozenset({"mean", "effect"}): "PolyaGamma",
        frozenset({"variance"}): "InverseGamma",
    }


def probit(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        cdf = 0.5 * (1 + torch.erf(design @ beta / math.sqrt(2)))
        pyro.sample("y", dist.Bernoulli(cdf.clamp(1e-9, 1 - 1e-9)), obs=(y > 2).to(y))


def squared(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Binomial(TRIALS, logits=(design @ beta).square()), obs=y)


def wide_tailed(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.StudentT(3.0, design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Binomial(TRIALS, logits=design @ beta), obs=y)


def detached_logits(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Binomial(TRIALS, logits=0.5 * design @ (beta + beta.detach())), obs=y)


@pytest.mark.parametrize("program", [probit, squared, wide_tailed, detached_logits], ids=lambda program: program.__name__)
def test_what_is_not_logistic_is_refused(program: Callable[..., None]) -> None:
    with pytest.raises(Unsupported, match="conditional of beta is not normal"):
        assign(Program(program, (DESIGN, SUCCESSES)), {"beta": PolyaGamma()})


def test_a_program_without_logits_is_refused() -> None:
    with pytest.raises(Unsupported, match="there is none"):
        assign(Program(line, (X, LINE)), {("slope", "intercept"): PolyaGamma()})


# ----------------------------------------------------------------------------------- elliptical slice
TIMES = torch.linspace(0.0, 1.0, 24, dtype=torch.float64)
KERNEL = (-0.5 * ((TIMES[:, None] - TIMES) / 0.3).square()).exp() + 1e-6 * torch.eye(24, dtype=torch.float64)
CURVE = (2 * math.pi * TIMES).sin() + 0.5 * normal(24, seed=9)
SEEN = (TIMES * 10).round().remainder(4.0)


def process(times: Tensor, y: Tensor) -> None:
    curve = pyro.sample("curve", dist.MultivariateNormal(0.3 + 0.0 * times, KERNEL.to(times)))
    with pyro.plate("rows", len(times)):
        pyro.sample("y", dist.Normal(curve, 0.5), obs=y)


def counted_process(times: Tensor, y: Tensor) -> None:
    """Counts around a process with a latent amplitude; not conjugate, and its prior is as correlated as they come."""
    amplitude = pyro.sample("amplitude", dist.LogNormal(times.new_tensor(0.0), 0.5))
    curve = pyro.sample("curve", dist.MultivariateNormal(0.0 * times, scale_tril=amplitude * torch.linalg.cholesky(KERNEL)))
    with pyro.plate("rows", len(times)):
        pyro.sample("y", dist.Poisson(curve.exp()), obs=y)


def test_elliptical_slices_have_the_exact_posterior_of_a_gaussian_process() -> None:
    posterior = fitted(process, TIMES, CURVE, blocks={"curve": EllipticalSlice()}, warmup=40, draws=40, thin=3)
    assert posterior.plan is not None
    assert posterior.plan["curve"].acceptance == 1.0
    assert_certified(posterior)
    gain = torch.linalg.solve(KERNEL + 0.25 * torch.eye(24), KERNEL).T
    mean = 0.3 + gain @ (CURVE - 0.3)
    variance = (KERNEL - gain @ KERNEL).diagonal()
    assert_mean(posterior.draws["curve"], mean)
    assert_mean((posterior.draws["curve"] - mean).square(), variance)


def test_a_wide_correlated_prior_gets_an_elliptical_slice() -> None:
    posterior = fitted(counted_process, TIMES, SEEN, chains=4, draws=5, warmup=10)
    assert posterior.plan is not None
    assert {site: update.update for site, update in posterior.plan.items()} == {
        "amplitude": "HMC", "curve": "EllipticalSlice",
    }  # fmt: skip
    assert_certified(posterior)


def heavy(y: Tensor) -> None:
    m = pyro.sample("m", dist.StudentT(3.0, y.new_tensor(0.0), 1.0))
    pyro.sample("y", dist.Normal(m, 1.0), obs=y[0])


def tempered_prior(y: Tensor) -> None:
    with poutine.scale(scale=0.5):
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    pyro.sample("y", dist.Normal(m, 1.0), obs=y[0])


def positive(y: Tensor) -> None:
    m = pyro.sample("m", dist.Gamma(y.new_tensor(2.0), 1.0))
    pyro.sample("y", dist.Normal(m, 1.0), obs=y[0])


@pytest.mark.parametrize("program", [heavy, tempered_prior, positive], ids=lambda program: program.__name__)
def test_an_elliptical_slice_needs_a_gaussian_prior(program: Callable[..., None]) -> None:
    with pytest.raises(Unsupported, match=r"EllipticalSlice\(\) needs a Gaussian prior"):
        assign(Program(program, (Y,)), {"m": EllipticalSlice()})


# ------------------------------------------------------------------------------------ what interacts
def plated(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.StudentT(3.0, m, 1.0), obs=y)


def plated_guide(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("m", dist.Normal(0.6 * y, 0.9))


def walked(y: Tensor) -> None:
    """States of a random walk in one vector: neighbours interact, so two colours do."""
    m = pyro.sample("m", dist.Normal(y.new_zeros(len(y)), 3.0).to_event(1))
    pyro.factor("smooth", -0.5 * m.diff().square().sum())
    pyro.sample("y", dist.StudentT(3.0, m, 1.0).to_event(1), obs=y)


def walked_in_terms(y: Tensor) -> None:
    """The same with a term for each pair of neighbours, and one for each observation."""
    m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), (len(y),)))
    with pyro.plate("pairs", len(y) - 1):
        pyro.sample("step", dist.Normal(m.diff(), 1.0), obs=y.new_zeros(len(y) - 1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(3.0, m, 1.0), obs=y)


def walked_normal(y: Tensor) -> None:
    """Terms of its own for each element, and one factor that ties them all."""
    with pyro.plate("rows", len(y)):
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    pyro.factor("smooth", -2.0 * m.diff().square().sum())


def walked_guide(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("m", dist.Normal(y, 1.0))


def gathered(y: Tensor) -> None:
    """Elements outside the plate of their observations, which look them up."""
    with pyro.plate("groups", 5):
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.StudentT(3.0, m[torch.arange(len(y), device=y.device) % 5], 1.0), obs=y)


@pytest.mark.usefixtures("inside_a_run")
@pytest.mark.parametrize(
    ("program", "colours"),
    [(plated, 1), (gathered, 1), (walked_in_terms, 2), (walked, 12)],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_elements_that_share_no_term_have_one_colour(program: Any, colours: int) -> None:
    density, trials = at_trials(program, Y)
    coordinates = Coordinates(density.program, ["m"])
    found = colour(density, coordinates, torch.arange(coordinates.size), trials.values)
    assert len(found.colours) == colours
    assert sorted(torch.cat(found.colours).tolist()) == list(range(coordinates.size))
    # the terms of one element are those that change with it: all others are as they were
    vector, others = coordinates.vector(trials.values), {}
    staged = coordinates.terms(density)
    before = staged(vector, others)
    for owner, which in zip(found.owners, found.colours, strict=True):
        for element in which.tolist():
            moved = vector.clone()
            moved[:, element] += 1.0
            change = staged(moved, others) - before
            own = (found.own(staged(moved, others), owner) - found.own(before, owner))[:, element]
            assert torch.allclose(own, change.sum(-1), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------ univariate slices
def two_peaks(y: Tensor) -> None:
    """Folded: y says how far from 0 m is, and not on which side."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.5), 2.0))
    pyro.sample("y", dist.Normal(m.square(), 1.5), obs=y[0])


def _two_peaks(y: float) -> tuple[np.ndarray, np.ndarray]:
    m = np.linspace(-6.0, 6.0, 20001)
    return m, scipy.special.softmax(-0.125 * (m - 0.5) ** 2 - 0.5 * (m**2 - y) ** 2 / 2.25)


def test_slices_cross_between_two_peaks() -> None:
    y = array(4.0)
    posterior = fitted(two_peaks, y, blocks={"m": Slice()}, chains=128, draws=60, warmup=30, thin=2)
    m, weights = _two_peaks(4.0)
    draws = posterior.draws["m"]
    assert_mean(draws, weights @ m)
    assert_mean(draws.square(), weights @ m**2)
    assert_mean((draws > 0).double(), weights @ (m > 0))
    assert_certified(posterior)


FAR = array(9.0)
TURNS = Cycle((Hamiltonian(), PriorDraw()))


def test_a_cycle_goes_where_one_of_its_blocks_cannot() -> None:
    """Peaks at ±3 with a barrier of 18 nats between them, all chains begun at the lower one: trajectories alone stay there,
    with draws of the prior in turn both peaks have their weight."""
    m, weights = _two_peaks(9.0)
    start = {"m": torch.full((64,), -3.0, dtype=torch.float64)}
    alone = fitted(two_peaks, FAR, blocks={"m": Hamiltonian()}, start=start).draws["m"]
    assert bool((alone < 0).all())
    posterior = fitted(two_peaks, FAR, blocks={"m": TURNS}, start=start, draws=100)
    draws = posterior.draws["m"]
    assert_mean(draws, weights @ m)
    assert_mean(draws.square(), weights @ m**2)
    assert_mean((draws > 0).double(), weights @ (m > 0))
    assert_certified(posterior)
    assert posterior.plan is not None and posterior.plan["m"].update == "HMC, Prior"


def test_a_run_of_a_cycle_goes_on_where_it_stopped(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"chains": 2, "warmup": 5, "blocks": {"m": TURNS}, "seed": 0, "progress": False}
    Gibbs(draws=5, checkpoint=tmp_path, **settings).fit(two_peaks, FAR)
    longer = Gibbs(draws=9, **settings)
    assert torch.equal(longer.resume(tmp_path, two_peaks, FAR).draws["m"], longer.fit(two_peaks, FAR).draws["m"])


def test_elements_tied_where_a_cycle_comes_to_move_in_turn() -> None:
    """As for one block: what a part of it took for independent is found out in warm-up, and its note says so."""
    posterior = fitted(tied_far_out, array(9.0, 1.0), blocks={"count": Cycle((PriorDraw(), Slice()))}, draws=10)
    assert posterior.plan is not None and "demoted from Prior, Slice" in posterior.plan["count"].note
    assert_certified(posterior)


@pytest.mark.parametrize(
    ("blocks", "error", "sentence"),
    [
        ((), ValueError, "no blocks: give at least one"),
        (Hamiltonian(), TypeError, "takes a tuple of blocks, such as .*but got Hamiltonian"),
        ((Hamiltonian(), "Prior"), TypeError, "takes a tuple of blocks, such as .*but got 'Prior'"),
    ],
    ids=["none", "no tuple", "a string"],
)
def test_a_cycle_says_what_it_is_made_of(blocks: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Cycle(blocks)


def test_slices_move_on_the_support_of_a_site() -> None:
    """Rates in unconstrained coordinates: the Jacobian is in. rate | y ~ Gamma(2 + y, 1.5)."""

    def program(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            rate = pyro.sample("rate", dist.Gamma(y.new_tensor(2.0), 0.5))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    y = array(0.0, 3.0, 11.0)
    posterior = fitted(program, y, blocks={"rate": Slice()}, draws=60)
    assert_mean(posterior.draws["rate"], (2 + y) / 1.5)
    assert_mean((posterior.draws["rate"] - (2 + y) / 1.5).square(), (2 + y) / 1.5**2)
    assert_certified(posterior)


def test_slices_take_turns_where_elements_interact() -> None:
    """Neighbours of a random walk, in two colours, against the exact normal posterior."""

    def program(y: Tensor) -> None:
        m = pyro.sample("m", dist.ImproperUniform(dist.constraints.real, (), (len(y),)))
        with pyro.plate("pairs", len(y) - 1):
            pyro.sample("step", dist.Normal(m.diff(), 1.0), obs=y.new_zeros(len(y) - 1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    posterior = fitted(program, Y[:6], blocks={"m": Slice()}, draws=60, thin=2)
    difference = torch.eye(6, dtype=torch.float64).diff(dim=0)
    covariance = torch.linalg.inv(torch.eye(6, dtype=torch.float64) + difference.T @ difference)
    assert_mean(posterior.draws["m"], covariance @ Y[:6])
    assert_mean((posterior.draws["m"] - covariance @ Y[:6]).square(), covariance.diagonal())
    assert_certified(posterior)


# ------------------------------------------------------------------------------------------ counts
MEANS = array(0.3, 4.0, 900.0)


def counted(y: Tensor) -> None:
    """Counts of three sizes, seen in part: those not seen are Poisson(mean / 2)."""
    with pyro.plate("rows", len(y)):
        count = pyro.sample("count", dist.Poisson(MEANS.to(y)))
        pyro.sample("y", dist.Binomial(count, 0.5), obs=y)


def test_counts_of_all_sizes_move_one_by_one() -> None:
    y = array(0.0, 1.0, 450.0)
    posterior = fitted(counted, y, draws=80, thin=2)
    assert posterior.plan is not None and posterior.plan["count"].update == "Slice"
    assert_certified(posterior)
    hidden = posterior.draws["count"] - y
    assert bool((hidden >= 0).all())
    assert_mean(hidden, MEANS / 2)
    assert_mean((hidden - MEANS / 2).square(), MEANS / 2)
    for i in (0, 1):
        for value in range(3):
            assert_mean((hidden[..., i] == value).double(), scipy.stats.poisson.pmf(value, float(MEANS[i]) / 2))


def thinned_twice(y: Tensor) -> None:
    """A binomial whose total is latent, and whose own value is."""
    total = pyro.sample("total", dist.Poisson(y.new_tensor(5.0)))
    part = pyro.sample("part", dist.Binomial(total, 0.4))
    pyro.sample("y", dist.Normal(part, 1.5), obs=y[0])


def waited(y: Tensor) -> None:
    """A geometric count: torch's formula is finite below 0."""
    count = pyro.sample("count", dist.Geometric(y.new_tensor(0.3)))
    pyro.sample("y", dist.Normal(count, 2.0), obs=y[0])


def overdispersed(y: Tensor) -> None:
    count = pyro.sample("count", dist.NegativeBinomial(y.new_tensor(2.0), y.new_tensor(0.6)))
    pyro.sample("y", dist.Normal(count, 2.0), obs=y[0])


def _thinned_twice() -> dict[str, float]:
    total, part = np.meshgrid(np.arange(60), np.arange(60), indexing="ij")
    log_joint = scipy.stats.poisson.logpmf(total, 5.0) + scipy.stats.binom.logpmf(part, total, 0.4)
    weights = scipy.special.softmax(log_joint - 0.5 * (1.0 - part) ** 2 / 2.25)
    return {"total": float((weights * total).sum()), "part": float((weights * part).sum())}


def _single(log_prior: np.ndarray) -> dict[str, float]:
    count = np.arange(len(log_prior))
    return {"count": float(scipy.special.softmax(log_prior - 0.125 * (count - 1.0) ** 2) @ count)}


@pytest.mark.parametrize(
    ("program", "exact"),
    [
        (thinned_twice, _thinned_twice),
        (waited, lambda: _single(scipy.stats.geom.logpmf(np.arange(1, 200), 0.3))),
        (overdispersed, lambda: _single(scipy.stats.nbinom.logpmf(np.arange(200), 2.0, 0.4))),
    ],
    ids=["binomial of a latent total", "geometric", "negative binomial"],
)
def test_counts_agree_with_enumeration(program: Any, exact: Any) -> None:
    posterior = fitted(program, array(1.0), draws=80)
    assert posterior.plan is not None and {update.update for update in posterior.plan.values()} == {"Slice"}
    for site, mean in exact().items():
        assert_mean(posterior.draws[site], mean)


def test_a_walk_accepts_the_elements_of_a_plate_one_by_one() -> None:
    """Fifty counts: accepted together, hardly any proposal would be."""

    def program(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            count = pyro.sample("count", dist.Poisson(4.0))
            pyro.sample("y", dist.Normal(count, 2.0), obs=y)

    posterior = fitted(program, torch.full((50,), 3.0).double(), blocks={"count": AdaptiveWalk()}, draws=60, thin=4)
    assert posterior.plan is not None and 0.3 < posterior.plan["count"].acceptance < 0.7
    count = np.arange(100)
    weights = scipy.special.softmax(scipy.stats.poisson.logpmf(count, 4.0) - 0.125 * (count - 3.0) ** 2)
    assert_mean(posterior.draws["count"].mean(-1), weights @ count)
    assert_certified(posterior)


# ------------------------------------------------------------------------------ finite, element by element
def lattice(y: Tensor) -> None:
    """An Ising model of three by three in a field, written with one plate."""
    with pyro.plate("spins", 9):
        spin = pyro.sample("spin", dist.Bernoulli(y.new_tensor(0.4)))
    grid = 2 * spin.reshape(*spin.shape[:-1], 3, 3) - 1
    with pyro.plate("bonds", 6):
        across = (grid[..., :, 1:] * grid[..., :, :-1]).reshape(*spin.shape[:-1], 6)
        down = (grid[..., 1:, :] * grid[..., :-1, :]).reshape(*spin.shape[:-1], 6)
        pyro.factor("across", 0.5 * across)
        pyro.factor("down", 0.5 * down)


def _lattice() -> np.ndarray:
    spins = np.array(list(itertools.product([0, 1], repeat=9)))
    grid = 2 * spins.reshape(-1, 3, 3) - 1
    bonds = (grid[:, :, 1:] * grid[:, :, :-1]).sum((1, 2)) + (grid[:, 1:] * grid[:, :-1]).sum((1, 2))
    return scipy.special.softmax(0.5 * bonds + spins.sum(1) * math.log(0.4 / 0.6)) @ spins


def test_coupled_elements_of_a_plate_are_enumerated_one_after_the_other() -> None:
    posterior = fitted(lattice, Y, draws=80, thin=3)
    assert posterior.plan is not None
    update = posterior.plan["spin"]
    assert update.update == "Enumerate" and update.note.startswith("element by element: ") and update.acceptance == 1.0
    assert_certified(posterior)
    assert_mean(posterior.draws["spin"], _lattice())


# ------------------------------------------------------------------------------------ no gradient
BREAKS = array(0.05, 0.2, 0.35, 0.6, 0.7, 0.9)


def stepped(x: Tensor) -> None:
    """A threshold: how many points lie below it decides, so that the gradient is 0 and the density a step function."""
    threshold = pyro.sample("threshold", dist.Uniform(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal((x < threshold).to(x), 0.8), obs=(x < 0.5).to(x))


def _stepped() -> float:
    edges = np.concatenate([[0.0], BREAKS.numpy(), [1.0]])
    below = (BREAKS.numpy() < edges[1:, None]).astype(float)
    log_likelihood = -0.5 * ((below - (BREAKS.numpy() < 0.5)) ** 2).sum(1) / 0.64
    weights = np.exp(log_likelihood) * np.diff(edges)
    return float((weights * 0.5 * (edges[1:] + edges[:-1])).sum() / weights.sum())


@pytest.mark.parametrize("block", [None, PriorDraw()], ids=["plan", "PriorDraw"])
def test_a_density_of_steps_agrees_with_the_sum_over_steps(block: Block | None) -> None:
    blocks = {} if block is None else {"threshold": block}
    posterior = fitted(stepped, BREAKS, draws=60, thin=2, blocks=blocks)
    assert posterior.plan is not None
    assert posterior.plan["threshold"].update == ("Prior" if isinstance(block, PriorDraw) else "Slice")
    assert_mean(posterior.draws["threshold"], _stepped())


def kinked(y: Tensor) -> None:
    m = pyro.sample("m", dist.Laplace(y.new_tensor(0.0), 1.0))
    pyro.sample("y", dist.StudentT(3.0, m.abs(), 1.0), obs=y[0])


def blind(y: Tensor) -> None:
    m = pyro.sample("m", dist.Gumbel(y.new_tensor(0.0), 1.0))
    pyro.sample("y", dist.StudentT(3.0, 3 * m.detach(), 0.3), obs=y[0])


def test_a_kink_is_no_step_and_a_missing_gradient_is_seen() -> None:
    assert plan_of(kinked, Y) == {"m": "HMC"}
    assert plan_of(heavy, Y) == {"m": "HMC"}
    assert plan_of(blind, Y) == {"m": "Slice"}


INSIDE = array(-1.3, 0.2, 2.1, -0.4, 1.7)


def bounded(y: Tensor) -> None:
    """Both ends of a uniform: given the other, the density of each ends at the outermost of the data."""
    low = pyro.sample("low", dist.Uniform(y.new_tensor(-8.0), 0.0))
    high = pyro.sample("high", dist.Uniform(y.new_tensor(0.0), 8.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Uniform(low, high), obs=y)


def test_the_ends_of_a_uniform_are_cliffs() -> None:
    """The means by quadrature: the density is (high − low)⁻⁵ on low < −1.3, high > 2.1."""
    posterior = fitted(bounded, INSIDE, draws=200, thin=2)
    assert posterior.plan is not None and {update.update for update in posterior.plan.updates} == {"Slice"}
    low, high = np.linspace(-8.0, -1.3, 2001)[:, None], np.linspace(2.1, 8.0, 2001)
    weights = (high - low) ** -5.0
    weights[[0, -1]] *= 0.5  # trapezoidal rule
    weights[:, [0, -1]] *= 0.5
    assert_mean(posterior.draws["low"], float((weights * low).sum() / weights.sum()))
    assert_mean(posterior.draws["high"], float((weights * high).sum() / weights.sum()))


def test_draws_from_the_prior_follow_what_the_prior_depends_on() -> None:
    """scale ~ Gamma, m_i | scale ~ N(0, scale²): the proposal moves with the scale; against quadrature."""

    def program(y: Tensor) -> None:
        scale = pyro.sample("scale", dist.Gamma(y.new_tensor(3.0), 2.0))
        with pyro.plate("rows", len(y)):
            m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), scale))
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    y = array(0.5, -2.0)
    blocks: dict[Any, Block] = {"m": PriorDraw(), "scale": Slice()}
    posterior = fitted(program, y, blocks=blocks, draws=100, warmup=40, thin=2)
    scale = np.linspace(1e-3, 12.0, 20001)
    log_weights = scipy.stats.gamma.logpdf(scale, 3.0, scale=0.5)
    log_weights = log_weights + scipy.stats.norm.logpdf(y.numpy(), 0.0, np.sqrt(1 + scale[:, None] ** 2)).sum(1)
    weights = scipy.special.softmax(log_weights)
    assert_mean(posterior.draws["scale"], weights @ scale)
    shrink = scale**2 / (1 + scale**2)
    assert_mean(posterior.draws["m"], (weights @ shrink) * y.numpy())
    assert_certified(posterior)


def drawn_totals(y: Tensor) -> None:
    """A Dirichlet-multinomial latent: values with a fixed sum, which no walk keeps."""
    parts = pyro.sample("parts", dist.DirichletMultinomial(y.new_tensor([2.0, 1.0, 1.5]), 4))
    pyro.sample("y", dist.Normal(parts, 1.0).to_event(1), obs=y[:3])


@pytest.mark.slow
def test_events_of_counts_are_drawn_from_their_prior() -> None:
    posterior = fitted(drawn_totals, array(1.0, 2.0, 1.0), draws=100, thin=3)
    assert posterior.plan is not None and posterior.plan["parts"].update == "Prior"
    parts = np.array([p for p in itertools.product(range(5), repeat=3) if sum(p) == 4])
    log_weights = scipy.stats.dirichlet_multinomial.logpmf(parts, [2.0, 1.0, 1.5], 4) - 0.5 * ((parts - [1, 2, 1]) ** 2).sum(
        1
    )
    assert_mean(posterior.draws["parts"], scipy.special.softmax(log_weights) @ parts)


# ---------------------------------------------------------------------------------------- demotion
def bent(y: Tensor) -> None:
    """Conjugate as far as the prior of ``level`` reaches, and not where its data take it: y sees m³ there."""
    level = pyro.sample("level", dist.Normal(y.new_tensor(0.0), 1.0))
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.5), 1.0))
    pyro.sample("x", dist.Normal(level, 0.05), obs=y[0])
    pyro.sample("y", dist.Normal(torch.where(level > 6.0, m**3, m), 1.0), obs=y[1])


def tied_far_out(y: Tensor) -> None:
    """Counts that are independent only as far as the prior of ``level`` reaches."""
    level = pyro.sample("level", dist.Normal(y.new_tensor(0.0), 1.0))
    pyro.sample("x", dist.Normal(level, 0.05), obs=y[0])
    with pyro.plate("rows", 2):
        count = pyro.sample("count", dist.Poisson(y.new_tensor(3.0)))
    both = torch.where(level > 6.0, count[..., 0] - count[..., 1], count[..., 0])
    pyro.sample("y", dist.Normal(both, 0.5), obs=y[1])


def test_a_conjugate_site_that_is_none_where_the_chains_are_is_demoted() -> None:
    y = array(9.0, 2.0)
    assert plan_of(bent, y)["m"] == "Normal"
    posterior = fitted(bent, y, warmup=80, draws=40, thin=2)
    assert posterior.plan is not None
    update = posterior.plan["m"]
    assert update.update == "HMC" and update.note.startswith("demoted from Normal: certificate ")
    m = np.linspace(-4.0, 4.0, 8001)
    weights = scipy.special.softmax(-0.5 * (m - 0.5) ** 2 - 0.5 * (m**3 - 2.0) ** 2)
    assert_mean(posterior.draws["m"], weights @ m)
    assert not [finding for finding in posterior.diagnose() if "certificate" in finding or "claims" in finding]


def test_elements_that_are_tied_where_the_chains_are_move_in_turn() -> None:
    y = array(9.0, 1.0)
    posterior = fitted(tied_far_out, y, warmup=40, draws=50, thin=2)
    assert posterior.plan is not None
    update = posterior.plan["count"]
    assert update.update == "Slice" and "demoted from Slice: certificate " in update.note
    assert_certified(posterior)
    first, second = np.meshgrid(np.arange(40), np.arange(40), indexing="ij")
    log_weights = scipy.stats.poisson.logpmf(first, 3.0) + scipy.stats.poisson.logpmf(second, 3.0)
    weights = scipy.special.softmax(log_weights - 2.0 * (first - second - 1.0) ** 2)
    assert_mean(posterior.draws["count"], [(weights * first).sum(), (weights * second).sum()])


def test_what_was_asked_for_stays_and_is_reported() -> None:
    posterior = fitted(bent, array(9.0, 2.0), warmup=10, draws=10, blocks={"m": Conjugate()})
    assert posterior.plan is not None and posterior.plan["m"].update == "Normal" and posterior.plan["m"].note == "as asked"
    assert any("Normal update of 'm' claims to be exact" in finding for finding in posterior.diagnose())


def test_labels_that_are_tied_where_the_chains_are_are_drawn_in_turn() -> None:
    """As the counts; jointly they enumerate as long as they are independent."""

    def program(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("x", dist.Normal(level, 0.05), obs=y[0])
        with pyro.plate("rows", 2):
            z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.3)))
        both = torch.where(level > 6.0, z[..., 0] + z[..., 1] - 1.0, 0.0 * z[..., 0])
        pyro.sample("y", dist.Normal(both, 0.5), obs=y[1])

    posterior = fitted(program, array(9.0, 0.0), warmup=30, draws=40, thin=2, blocks={"z": Enumerate(by_element=True)})
    assert posterior.plan is not None and "demoted from Enumerate" in posterior.plan["z"].note
    assert_certified(posterior)
    weights = np.array([0.49 * math.exp(-2.0), 2 * 0.21, 0.09 * math.exp(-2.0)])
    assert_mean((posterior.draws["z"].sum(-1) == 1).double(), weights[1] / weights.sum())


def test_nothing_is_demoted_after_warm_up() -> None:
    posterior = fitted(tied_far_out, array(9.0, 1.0), warmup=1, draws=10)
    assert posterior.plan is not None and "demoted" not in posterior.plan["count"].note
    assert any("takes elements for independent that are not" in finding for finding in posterior.diagnose())


def test_a_demotion_is_the_same_in_every_run() -> None:
    first, second = (fitted(bent, array(9.0, 2.0), warmup=12, draws=5, chains=2) for _ in range(2))
    assert all(torch.equal(first.draws[site], second.draws[site]) for site in first.draws)


@pytest.mark.usefixtures("inside_a_run")
@pytest.mark.parametrize(
    "block", [Slice(), AdaptiveWalk(), PriorDraw(), GuideDraw(walked_guide)], ids=lambda block: type(block).__name__
)
@pytest.mark.parametrize("is_in_cycle", [False, True], ids=["alone", "in a cycle"])
def test_elements_that_are_wrongly_taken_for_independent_are_found_out(block: Any, is_in_cycle: bool) -> None:
    """Elements tied by a factor, which is forgotten."""
    density, trials = at_trials(walked_normal, Y)
    bound = block.bind(("m",), density, trials)
    each = torch.arange(12)
    owner = torch.full_like(bound.elements.owners[0], 12)
    owner[:12] = each  # the factor and the Jacobian are nobody's
    bound = dataclasses.replace(bound, elements=Elements(each, (each,), (owner,), 12))
    bound = Cycle((PriorDraw().bind(("m",), density, trials), bound), sites=("m",)) if is_in_cycle else bound
    state, worst = bound.init(density, trials), 0.0
    for _ in range(3):
        state, trials, move = bound.step(state, density, trials, 10)
        worst = max(worst, float(move.log_ratio.abs().max()))
    assert worst > 1e-3


# ---------------------------------------------------------------------------------------- refusals
def everything(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    scale = pyro.sample("scale", dist.Gamma(y.new_tensor(2.0), 2.0))
    flat = pyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
    z = pyro.sample("z", dist.Bernoulli(0.5))
    parts = pyro.sample("parts", dist.DirichletMultinomial(y.new_ones(2), 3))
    pyro.sample("y", dist.Normal(m + z + flat + parts[..., 0], scale), obs=y[0])


REFUSALS: list[tuple[Any, Block, str]] = [
    ("scale", Gaussian(), r"Gaussian\(\) needs sites on the whole real line, but 'scale' is Gamma"),
    (("m", "z"), Gaussian(), r"whole real line, but 'z' is Bernoulli"),
    ("scale", PolyaGamma(), r"PolyaGamma\(\) needs sites on the whole real line, but 'scale' is Gamma"),
    (("m", "flat"), EllipticalSlice(), r"EllipticalSlice\(\) updates one site, but was given m, flat"),
    ("flat", EllipticalSlice(), r"needs a Gaussian prior, but that of 'flat' is ImproperUniform"),
    ("z", Slice(), r"Slice\(\) needs sites that are continuous or counts, but 'z' is Bernoulli. Use Enumerate"),
    ("parts", Slice(), r"but 'parts' is DirichletMultinomial. Use PriorDraw"),
    ("flat", PriorDraw(), r"PriorDraw\(\) cannot draw 'flat' from its prior, which is improper"),
    (("m", "flat"), PriorDraw(), r"PriorDraw\(\) updates one site"),
    ("parts", Enumerate(), r"Enumerate\(\) needs sites with finitely many values, but 'parts' is not one"),
    ("m", Enumerate(by_element=True), r"needs sites with finitely many values, but 'm' is not one"),
    ("z", Hamiltonian(), r"Hamiltonian\(\) needs continuous sites, but 'z' is discrete"),
    ("flat", Cycle((Hamiltonian(), PriorDraw())), r"PriorDraw\(\) cannot draw 'flat' from its prior, which is improper"),
]


@pytest.mark.parametrize(("sites", "block", "sentence"), REFUSALS, ids=[f"{r[0]}, {type(r[1]).__name__}" for r in REFUSALS])
def test_a_block_that_does_not_fit_its_sites_is_refused(sites: Any, block: Block, sentence: str) -> None:
    with pytest.raises(Unsupported, match=sentence):
        fitted(everything, Y, blocks={sites: block})


def test_a_joint_that_is_too_wide_says_how_wide_and_what_to_use() -> None:
    def program(y: Tensor) -> None:
        labels = [pyro.sample(f"z_{i}", dist.Categorical(y.new_ones(16))) for i in range(6)]
        pyro.sample("y", dist.Normal(sum(labels), 1.0), obs=y[0])

    names = tuple(f"z_{i}" for i in range(6))
    with pytest.raises(Unsupported, match=r"table of 16,777,216 entries.*one at a time"):
        fitted(program, Y, blocks={names: Enumerate()})


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ({"nothing": Slice()}, "blocks= names 'nothing', but the latent sites are m, scale"),
        ({"m": Slice(), ("m", "flat"): Gaussian()}, "blocks= gives 'm' two blocks"),
    ],
    ids=["unknown", "twice"],
)
def test_an_override_names_each_site_once(blocks: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fitted(everything, Y, blocks=blocks)


# -------------------------------------------------------------------------------------- every block
def blocks_of_every_kind() -> Iterator[tuple[str, Callable[..., None], tuple[Tensor, ...], Any]]:
    yield "Gaussian", line, (X, LINE), {("slope", "intercept"): Gaussian()}
    yield "PolyaGamma", binomial, (DESIGN, SUCCESSES), {"beta": PolyaGamma()}
    yield "EllipticalSlice", process, (TIMES, CURVE), {"curve": EllipticalSlice()}
    yield "EllipticalSlice", plated, (Y,), {"m": EllipticalSlice()}
    yield "Slice", counted, (array(0.0, 1.0, 450.0),), {"count": Slice()}
    yield "AdaptiveWalk", plated, (Y,), {"m": AdaptiveWalk()}
    yield "PriorDraw", plated, (Y,), {"m": PriorDraw()}
    yield "GuideDraw", plated, (Y,), {"m": GuideDraw(plated_guide)}
    yield "Enumerate", lattice, (Y,), {"spin": Enumerate(by_element=True)}
    yield "Cycle", plated, (Y,), {"m": Cycle((PriorDraw(), AdaptiveWalk()))}


EVERY = [*blocks_of_every_kind()]


@pytest.mark.usefixtures("inside_a_run")
@pytest.mark.parametrize(("name", "program", "data", "blocks"), EVERY, ids=[case[0] for case in EVERY])
def test_a_block_moves_its_sites_only_and_knows_the_log_joint(name: str, program: Any, data: Any, blocks: Any) -> None:
    """What else is among the values is handed on; the log-joint is that of the new values; after warm-up nothing adapts."""
    density, trials = at_trials(program, *data)
    ((sites, block),) = blocks.items()
    bound = block.bind((sites,) if isinstance(sites, str) else sites, density, trials)
    state = bound.init(density, trials)
    current = Current({**trials.values, "else": normal(8, 3)}, trials.log_joint)
    for warmup in (10, 10, 0):
        before = state
        state, moved, move = bound.step(state, density, current, warmup)
        assert set(moved.values) == set(current.values)
        assert torch.equal(moved.values["else"], current.values["else"])
        assert torch.allclose(moved.log_joint, density.joint(moved.values), rtol=1e-12)
        assert move.acceptance.shape == (8,) and move.log_ratio is not None and bool((move.log_ratio.abs() < 1e-8).all())
        current = moved
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(state), strict=True))


def test_real_sites_join_and_split() -> None:
    looked = Program(two_levels, (Y,))
    joined = Joined(looked, ("effect", "mean"))
    values = {"effect": normal(2, 3, 1), "mean": normal(2)}
    assert joined.join(values).shape == (2, 4)
    assert all(torch.equal(value, values[site]) for site, value in joined.split(joined.join(values)).items())


class _Coins:
    """Two coins of a model that brings moves of its own: the right one, one from elsewhere, or one that counts wrongly."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def model(self, flips: Tensor) -> None:
        with pyro.plate("coins", 2, dim=-1):
            fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        with pyro.plate("flips", len(flips), dim=-2):
            pyro.sample("heads", dist.Bernoulli(fairness), obs=flips)

    def blocks(self, flips: Tensor) -> Any:
        number = float(len(flips)) * (2.0 if self.kind == "counts twice" else 1.0)
        heads = flips.sum(0) * number / len(flips)
        conditional = torch.distributions.Beta(2.0 + heads, 2.0 + number - heads)

        def propose(position: Any) -> Any:
            present = position["fairness"]
            value = conditional.sample(present.shape[:1])
            ratio = (conditional.log_prob(value) - conditional.log_prob(present)).sum(-1)
            if self.kind == "forgets the way back":
                ratio = conditional.log_prob(value).sum(-1)
            return {"fairness": value}, ratio if self.kind == "at once" else lambda: ratio

        return {("nobody" if self.kind == "names nobody" else "fairness",): propose}


FLIPS = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]]).double()


@pytest.mark.parametrize("kind", ["when asked", "at once"])
def test_a_move_that_a_model_brings_is_certified_like_any_other(kind: str) -> None:
    """Beta(5, 2) and Beta(3, 4): four comparisons at 4.5 standard errors of 4,000 draws, a false alarm in 3e4 seeds."""
    posterior = Gibbs(chains=4, warmup=5, draws=1000, seed=0, progress=False).fit(_Coins(kind), FLIPS)
    assert posterior.plan is not None
    update = posterior.plan["fairness"]
    assert update.update == "Own" and update.acceptance == 1.0 and update.certificate < 1e-8  # type: ignore[operator]
    draws = posterior.draws["fairness"].flatten(0, 1)
    exact = torch.distributions.Beta(torch.tensor([5.0, 3.0]).double(), torch.tensor([2.0, 4.0]).double())
    assert bool(((draws.mean(0) - exact.mean).abs() < 4.5 * (exact.variance / 4000).sqrt()).all())
    fourth = (draws - exact.mean).square()
    assert bool(((fourth.mean(0) - exact.variance).abs() < 4.5 * fourth.std(0) / 4000**0.5).all())


@pytest.mark.parametrize("kind", ["counts twice", "forgets the way back"])
def test_a_wrong_move_is_not_taken_and_the_next_that_fits_is(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    posterior = Gibbs(chains=2, warmup=5, draws=5, seed=0, progress=False).fit(_Coins(kind), FLIPS)
    assert posterior.plan is not None and posterior.plan["fairness"].update == "Beta"
    assert "its certificate fails" in caplog.text


def test_a_move_for_a_site_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="names 'nobody'"):
        Gibbs(progress=False).fit(_Coins("names nobody"), FLIPS)


def test_a_run_with_a_move_of_the_models_own_goes_on_where_it_stopped() -> None:
    short = Gibbs(chains=2, warmup=5, draws=5, seed=0, progress=False).fit(_Coins("at once"), FLIPS)
    backend = Gibbs(chains=2, warmup=5, draws=9, seed=0, progress=False)
    assert torch.equal(
        backend.resume(short, _Coins("at once"), FLIPS).draws["fairness"],
        backend.fit(_Coins("at once"), FLIPS).draws["fairness"],
    )
