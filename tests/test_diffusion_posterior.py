"""Posteriors under a diffusion prior: likelihoods as programs have them, guidance and weights against exact posteriors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from inference.contract import Unsupported
from pyro_genmodels.diffusion import VP, Betas, Network, Oracle, samplers
from pyro_genmodels.diffusion.guidance import LedDenoiser
from pyro_genmodels.diffusion.posterior import DPS, MMPS, Likelihood, PiGDM, twisted

OPERATOR = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
NOISE = 0.3


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def seen(y: Tensor, operator: Tensor = OPERATOR, noise: Tensor | float = NOISE) -> None:
    x = pyro.sample("x", dist.Normal(operator.new_zeros(operator.shape[1]), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(operator @ x, noise).to_event(1), obs=y)


def rich(y: Tensor, kept: Tensor, factor: bool = True) -> None:
    """Masks, plates with scales, two sites and a factor: all Gaussian around linear maps."""
    x = pyro.sample("x", dist.Normal(f64(0.0, 0.0, 0.0), 1.0).to_event(1))
    with pyro.plate("numbers", 3), poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(2.0 * x + 1.0, f64(0.5, 0.7, 0.9)).mask(kept), obs=y)
    total = pyro.deterministic("total", x.sum())
    pyro.sample("sum", dist.Normal(total, 0.1), obs=f64(1.0)[0])
    if factor:
        pyro.factor("extra", -0.5 * (x[0] - x[1]).square())


def test_a_likelihood_is_all_that_the_program_observes() -> None:
    y, kept, x = f64(1.0, 2.0, 3.0), torch.tensor([True, False, True]), torch.randn(4, 3, dtype=torch.float64)
    terms = 2.0 * (dist.Normal(2.0 * x + 1.0, f64(0.5, 0.7, 0.9)).log_prob(y) * kept).sum(1)
    expected = terms + dist.Normal(x.sum(1), 0.1).log_prob(f64(1.0)) - 0.5 * (x[:, 0] - x[:, 1]).square()
    likelihood = Likelihood(rich, y, kept=kept)
    assert torch.allclose(likelihood(x), expected, atol=1e-10)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(likelihood(point).sum(), point)
    other = x.clone().requires_grad_()
    log_prob = -0.5 * ((2.0 * other + 1.0 - y) / f64(0.5, 0.7, 0.9)).square() * kept * 2.0
    value = log_prob.sum() - 50.0 * (other.sum(1) - 1.0).square().sum() - 0.5 * (other[:, 0] - other[:, 1]).square().sum()
    assert torch.allclose(slope, torch.autograd.grad(value, other)[0], atol=1e-9)


def test_a_measurement_is_the_likelihood() -> None:
    """log p = constant − ½ ‖target − operator x‖², and operatorᵀ operator = Aᵀ R⁻¹ A of all that is seen."""
    y, kept, x = f64(1.0, 2.0, 3.0), torch.tensor([True, False, True]), 5.0 * torch.randn(6, 3, dtype=torch.float64)
    likelihood = Likelihood(rich, y, kept)
    operator, target, constant = likelihood.measurement()
    assert torch.allclose(constant - 0.5 * (target - x @ operator.mT).square().sum(1), likelihood(x), rtol=1e-10)
    told = torch.diag(2.0 * 4.0 * kept / f64(0.25, 0.49, 0.81)) + 100.0 * torch.ones(3, 3, dtype=torch.float64)
    told[:2, :2] += f64(1.0, -1.0)[:, None] * f64(1.0, -1.0)
    assert torch.allclose(operator.mT @ operator, told, atol=1e-9)
    assert len(Likelihood(seen, f64(1.0)).measurement().operator) == 1


def correlated(schedule: Any, size: int = 3) -> Oracle:
    torch.manual_seed(0)
    root = torch.randn(size, size, dtype=torch.float64)
    return Oracle(f64(1.0), torch.randn(1, size, dtype=torch.float64), (root @ root.mT)[None], schedule)


@pytest.mark.parametrize("schedule", [VP(), Betas.linear(100)], ids=["vp", "betas"])
def test_moment_matching_is_exact_on_gaussian_data(schedule: Any) -> None:
    """Score, denoiser and likelihood p_t(y | x_t), with correlated data and a program of many statements."""
    oracle, kept, y = correlated(schedule), torch.tensor([True, True, False]), f64(1.0, 2.0, 3.0)
    likelihood = Likelihood(rich, y, kept)
    operator, target, constant = likelihood.measurement()
    posterior = oracle.condition(operator, target, torch.eye(len(target), dtype=torch.float64))
    led = MMPS(oracle, likelihood)
    for share in (0.05, 0.5, 0.99):
        t, x = f64(share * schedule.stop)[0], 2.0 * torch.randn(5, 3, dtype=torch.float64)
        assert torch.allclose(led(x, t).mean, posterior(x, t).mean, atol=1e-8)
        assert torch.allclose(led.score(x, t), posterior.score(x, t), rtol=1e-7, atol=1e-8)
        mean, spread = oracle(x, t).mean, oracle.covariance(x, t)
        whole = operator @ spread @ operator.mT + torch.eye(len(target), dtype=torch.float64)
        expected = dist.MultivariateNormal(mean @ operator.mT, whole).log_prob(target)
        unit = 0.5 * len(target) * math.log(2.0 * math.pi)
        assert torch.allclose(led.tilt(x, t).log_likelihood, constant + unit + expected, atol=1e-8)


def test_the_pseudo_inverse_is_exact_on_white_gaussian_data() -> None:
    oracle = Oracle(f64(1.0), torch.zeros(1, 2, dtype=torch.float64), 1.7, VP())
    led = PiGDM(oracle, Likelihood(seen, f64(1.0)), deviation=1.7)
    posterior = oracle.condition(OPERATOR, f64(1.0), f64(NOISE**2)[None])
    for t in f64(0.02, 0.4, 0.9):
        x = 2.0 * torch.randn(5, 2, dtype=torch.float64)
        assert torch.allclose(led.score(x, t), posterior.score(x, t), rtol=1e-8, atol=1e-9)


def test_the_plain_one_takes_the_mean_for_the_truth() -> None:
    """∇ log p(y | x̂_0) = ∂x̂_0/∂x_tᵀ Aᵀ (y − A x̂_0) / noise², with the derivative of the mean by its covariance."""
    oracle, t, x = Oracle.ring(5, VP()), f64(0.3)[0], torch.randn(4, 2, dtype=torch.float64)
    led = DPS(oracle, Likelihood(seen, f64(1.0)), scale=0.5)
    alpha, sigma = oracle.at(x, t)
    residual = (1.0 - oracle(x, t).mean @ OPERATOR[0]) / NOISE**2
    slope = alpha / sigma.square() * oracle.covariance(x, t) @ OPERATOR[0] * residual[:, None]
    assert torch.allclose(led.tilt(x, t).gradient, 0.5 * slope, atol=1e-9)


def test_a_led_denoiser_has_derivatives() -> None:
    """By finite differences; what is led twice by halves of the data is led by all of them, on Gaussian data."""
    oracle, t = correlated(VP(), 2), f64(0.4)[0]
    once = MMPS(oracle, Likelihood(seen, f64(1.0, -1.0), torch.eye(2, dtype=torch.float64)))
    first, second = (
        Likelihood(seen, f64(y), torch.eye(2, dtype=torch.float64)[i : i + 1]) for i, y in enumerate((1.0, -1.0))
    )
    twice = MMPS(MMPS(oracle, first), second)
    x = torch.randn(3, 2, dtype=torch.float64)
    assert torch.allclose(twice(x, t).mean, once(x, t).mean, atol=1e-8)
    for led in (once, DPS(oracle, first), PiGDM(oracle, first)):
        assert torch.autograd.gradcheck(lambda x, led=led: led(x, t).mean, (x.clone().requires_grad_(),))


# Twisted particles.


def exact_weights(oracle: Oracle, y: float) -> tuple[Tensor, Tensor]:
    """Weights of the modes given y, and log p(y)."""
    log_joint = oracle.log_weights + dist.Normal(oracle.means @ OPERATOR[0], spread(oracle)).log_prob(f64(y))
    return log_joint.softmax(0), log_joint.logsumexp(0)


def spread(oracle: Oracle) -> Tensor:
    return (oracle.covariances @ OPERATOR[0] @ OPERATOR[0] + NOISE**2).sqrt()


@pytest.mark.parametrize("method", [MMPS, lambda *args: PiGDM(*args, deviation=1.5)], ids=["MMPS", "PiGDM"])
def test_twisted_particles_have_the_weights_of_the_modes(method: Callable[..., Any]) -> None:
    """Within 0.03, which is 4 standard errors at the 2000 effective particles that there are; log p(y) within 0.15."""
    oracle = Oracle.ring(5, Betas.cosine(100))
    expected, evidence = exact_weights(oracle, 1.0)
    likelihood = Likelihood(seen, f64(1.0))
    torch.manual_seed(1)
    grid = oracle.schedule.grid(100, "time")
    found = twisted(method(oracle, likelihood), likelihood, oracle.distribution(grid[0]).sample((4000,)), grid)
    nearest = torch.nn.functional.one_hot((found.x[:, None] - oracle.means).norm(dim=-1).argmin(1), 5)
    assert found.effective[-1] > 1500 and found.lineages > 500
    assert (found.weights @ nearest.double() - expected).abs().max() < 0.03
    assert abs(found.log_evidence - evidence) < 0.15
    assert found.effective.shape == (101,) and found.weights.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("twist", ["PiGDM", "DPS"])
def test_evidence_is_unbiased_under_any_twist(twist: str) -> None:
    """Exact steps on Gaussian data, ten particles, resampled: mean of p̂(y)/p(y) over 80 runs, 4 standard errors."""
    schedule = Betas.cosine(4)
    oracle = Oracle(f64(1.0), torch.zeros(1, 2, dtype=torch.float64), 1.0, schedule)
    likelihood = Likelihood(seen, f64(1.0))
    led: LedDenoiser = PiGDM(oracle, likelihood, 0.6) if twist == "PiGDM" else DPS(oracle, likelihood, 0.3)
    grid, runs, resampled = schedule.grid(4, "time"), [], 0
    torch.manual_seed(2)
    for _ in range(80):
        found = twisted(led, likelihood, torch.randn(10, 2, dtype=torch.float64), grid, "optimal", threshold=0.8)
        runs.append((found.log_evidence - exact_weights(oracle, 1.0)[1]).exp())
        resampled += found.resampled
    ratio = torch.stack(runs)
    assert resampled > 30
    assert abs(ratio.mean() - 1.0) < 4.0 * ratio.std() / math.sqrt(80)


def test_particles_agree_with_quadrature_where_the_operator_is_not_linear() -> None:
    """y = ‖x‖ + n on a ring of two modes: E[x] within 5 standard errors of what 400 x 400 points say."""

    def far(y: Tensor) -> None:
        x = pyro.sample("x", dist.Normal(f64(0.0, 0.0), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((x.square().sum() + 1e-12).sqrt(), 0.2), obs=y)

    oracle = Oracle(f64(0.3, 0.7), f64(-1.5, 0.0, 1.0, 0.5).reshape(2, 2), f64(0.5, 0.4), Betas.cosine(100))
    likelihood, places = Likelihood(far, f64(1.8)[0]), torch.linspace(-5.0, 5.0, 400, dtype=torch.float64)
    points = torch.cartesian_prod(places, places)
    mass = (oracle.log_prob(points) + dist.Normal(points.norm(dim=1), 0.2).log_prob(f64(1.8))).softmax(0)
    for method in (MMPS, PiGDM):
        with pytest.raises(Unsupported, match=f"{method.__name__} needs a likelihood that is Gaussian .* DPS takes any"):
            method(oracle, likelihood)
    torch.manual_seed(3)
    grid = oracle.schedule.grid(100, "time")
    led = DPS(oracle, likelihood, scale=0.2)
    found = twisted(led, likelihood, oracle.distribution(grid[0]).sample((2000,)), grid)
    assert found.lineages > 100
    deviation = (mass @ points.square() - (mass @ points).square()).sqrt()
    assert ((found.mean() - mass @ points).abs() < 5.0 * deviation / math.sqrt(min(found.effective.min(), 500.0))).all()


def test_particles_are_a_function_of_their_noise() -> None:
    oracle, likelihood = Oracle.ring(5, Betas.cosine(10)), Likelihood(seen, f64(1.0))
    led, grid = MMPS(oracle, likelihood), oracle.schedule.grid(10, "time")
    x, noise, uniform = torch.randn(20, 2).double(), torch.randn(10, 20, 2).double(), torch.rand(10).double()
    before = torch.get_rng_state()
    one, two = (twisted(led, likelihood, x, grid, "full", 1.0, noise, uniform) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.log_weights, two.log_weights) and one.resampled == 10
    assert torch.equal(before, torch.get_rng_state())
    seeded = [torch.manual_seed(0) and twisted(led, likelihood, x, grid).x for _ in range(2)]
    assert torch.equal(*seeded)
    assert torch.equal(one.draws(7, f64(0.5)[0]), one.draws(7, f64(0.5)[0])) and one.draws(50).shape == (50, 2)


def test_weights_of_resampled_draws_are_kept() -> None:
    """Systematic resampling takes ⌊n w⌋ or ⌈n w⌉ copies."""
    oracle, likelihood = Oracle.ring(5, Betas.cosine(10)), Likelihood(seen, f64(1.0))
    torch.manual_seed(4)
    found = twisted(MMPS(oracle, likelihood), likelihood, torch.randn(30, 2).double(), oracle.schedule.grid(10, "time"))
    copies = (found.draws(1000)[:, None] == found.x).all(-1).double().sum(0)
    assert ((copies - 1000 * found.weights).abs() < 1.0 + 1e-9).all()


def test_any_sampler_takes_a_led_denoiser() -> None:
    oracle = Oracle(f64(1.0), torch.zeros(1, 2, dtype=torch.float64), 1.0, VP())
    led = MMPS(oracle, Likelihood(seen, f64(1.0)))
    posterior = oracle.condition(OPERATOR, f64(1.0), f64(NOISE**2)[None])
    x, grid = torch.randn(5, 2, dtype=torch.float64), VP().grid(10)
    for sampler in (samplers.ddim, samplers.heun, samplers.dpm_solver_pp_2m, samplers.rk4):
        assert torch.allclose(sampler(led, x, grid), sampler(posterior, x, grid), atol=1e-7)  # type: ignore[operator]


# What is refused.


def hidden(y: Tensor, case: str) -> None:
    scale = pyro.sample("scale", dist.Gamma(f64(2.0)[0], 1.0)) if case == "other" else 1.0
    if case == "plate":
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Normal(f64(0.0, 0.0), 1.0).to_event(1))
    else:
        x = pyro.sample("x", dist.Normal(f64(0.0, 0.0), 1.0).to_event(1))
    if case == "if" and x[0].item() > 0:
        x = 2.0 * x
    if case == "noise":
        scale = x[0].exp()
    if case == "corner":
        x = x.relu()
    if case == "apart":
        x = f64(0.0, 0.0)
    if case == "other" or case != "blind":
        pyro.sample("y", dist.Normal(x.sum(-1), scale), obs=y)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("other", "'scale'.* are hidden, too.*poutine.condition.*HMC"),
        ("plate", "in a plate or a batch"),
        ("blind", "observes nothing"),
        ("if", "runs with one 'x', but not with many.*torch.where"),
        ("noise", "MMPS needs a likelihood that is Gaussian.*DPS takes any"),
        ("corner", "MMPS needs a likelihood that is Gaussian.*DPS takes any"),
        ("apart", "depends on 'x'"),
    ],
)
def test_a_program_that_does_not_fit_is_refused(case: str, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        MMPS(Oracle.ring(5, VP()), Likelihood(hidden, f64(1.0)[0], case))


def test_wrong_input_is_told() -> None:
    oracle, likelihood = Oracle.ring(5, Betas.cosine(10)), Likelihood(seen, f64(1.0))
    led, x, grid = MMPS(oracle, likelihood), torch.zeros(3, 2, dtype=torch.float64), Betas.cosine(10).grid(10, "time")
    with pytest.raises(ValueError, match="hides \\['x'\\], but no 'z'"):
        Likelihood(seen, f64(1.0), site="z")
    with pytest.raises(ValueError, match="has the shape"):
        likelihood(torch.zeros(3, 5))
    with pytest.raises(TypeError, match="that is led"):
        twisted(oracle, likelihood, x, grid)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="is a Denoiser"):
        DPS(Network, likelihood)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="between 0 and 1"):
        twisted(led, likelihood, x, grid, threshold=2.0)
    with pytest.raises(ValueError, match="one draw for each of 10 steps"):
        twisted(led, likelihood, x, grid, noise=torch.zeros(9, 3, 2))
    with pytest.raises(ValueError, match="one number per step"):
        twisted(led, likelihood, x, grid, uniform=torch.zeros(9))
    with pytest.raises(ValueError, match="no particles"):
        twisted(led, likelihood, x[:0], grid)
    with pytest.raises(ValueError, match="falls from noise"):
        twisted(led, likelihood, x, grid.flip(0))
    with pytest.raises(ValueError, match="log-weights of 3 particles sum to nan"):
        twisted(led, likelihood, x * math.nan, grid)
    with pytest.raises(ValueError, match="scale is a number"):
        DPS(oracle, likelihood, -1.0)
    with pytest.raises(ValueError, match="deviation"):
        PiGDM(oracle, likelihood, 0.0)
    with pytest.raises(ValueError, match="At least 1 draw"):
        twisted(led, likelihood, x, grid).draws(0)


# --------------------------------------------------------------------------------------- what single precision may lose
def in_single(schedule: Any) -> Oracle:
    return Oracle(torch.ones(1), torch.zeros(1, 2), 1.0, schedule)


@pytest.mark.parametrize("led", [PiGDM, MMPS], ids=lambda led: led.__name__)
def test_the_posterior_of_white_data_is_exact_in_single_precision(led: Any) -> None:
    """x ~ N(0, I), y ~ N(x, ½²): mean ⅘ y; the flow of an exact denoiser, whose start of noise moves its end by little."""
    observed = torch.tensor([1.0, -2.0])
    guided = led(in_single(VP()), Likelihood(seen, observed, torch.eye(2), 0.5))
    x = samplers.heun(guided, torch.zeros(1, 2), VP().grid(64))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x[0], 0.8 * observed, rtol=0.0, atol=0.02)


def weak_beside_strong(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("sum", dist.Normal(x.sum(), 0.005), obs=y)
    pyro.sample("first", dist.Normal(x[0], 1.0), obs=torch.tensor(3.0))


def test_a_weak_measurement_is_not_lost_beside_a_strong_one() -> None:
    operator, target, _ = Likelihood(weak_beside_strong, torch.tensor(1.0)).measurement()
    assert operator.shape == (2, 2)
    torch.testing.assert_close(torch.linalg.solve(operator, target), f64(3.0, -2.0), rtol=1e-3, atol=1e-3)


def test_many_numbers_of_unlike_noise_are_all_told() -> None:
    noise = torch.full((64,), 0.1)
    noise[32:] = 2.0
    found = Likelihood(seen, torch.full((64,), 0.01), torch.eye(64), noise).measurement()
    assert found.operator.shape == (64, 64)


def with_gaps(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.1).mask(~y.isnan()).to_event(1), obs=y)


def test_nan_under_a_mask_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"'y' has NaN, whose derivatives are NaN even under a mask. .*nan_to_num"):
        Likelihood(with_gaps, torch.tensor([1.0, math.nan]))


def unseen(y: Tensor) -> None:
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 0.1).mask(False).to_event(1), obs=y)


def test_what_leads_nowhere_is_refused_in_words() -> None:
    with pytest.raises(Unsupported, match="does not depend on x through operations that have derivatives"):
        samplers.euler(DPS(in_single(VP()), Likelihood(unseen, torch.zeros(2))), torch.randn(1, 2), VP().grid(4))
    with pytest.raises(TypeError, match=r"comes as a Likelihood\(program, \*args\)"):
        PiGDM(in_single(VP()), lambda x: x)  # type: ignore[arg-type]
