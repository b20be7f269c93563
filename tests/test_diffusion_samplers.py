"""Samplers: their order on an exact mixture, and the exact law of what the random ones make of Gaussian data."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from torch import Tensor

from pyro_genmodels.diffusion import (
    EDM,
    VE,
    VP,
    Betas,
    Denoised,
    Denoiser,
    Oracle,
    Schedule,
    Straight,
    SubVP,
    samplers,
    score_of,
)
from pyro_genmodels.diffusion.conformance import Paths, law, median_error, paths, wasserstein
from pyro_genmodels.diffusion.langevin import annealed_langevin, mala, ula

FLOWS: dict[str, tuple[Callable[..., Tensor], float, float]] = {
    "euler": (samplers.euler, 0.9, 1.1),
    "ddim": (samplers.ddim, 0.9, 1.1),
    "heun": (samplers.heun, 1.9, 2.15),
    "dpm_solver_2": (samplers.dpm_solver_2, 1.9, 2.15),
    "dpm_solver_pp_2m": (samplers.dpm_solver_pp_2m, 1.9, 2.15),
    "dpm_solver_pp_3m": (samplers.dpm_solver_pp_3m, 2.8, 3.2),
    "unipc, 1": (lambda *args: samplers.unipc(*args, order=1), 1.9, 2.15),
    "unipc, 2": (lambda *args: samplers.unipc(*args, order=2), 2.8, 3.2),
    "unipc, 3": (lambda *args: samplers.unipc(*args, order=3), 3.5, 4.2),
    "rk4": (samplers.rk4, 3.9, 4.1),
}
NEW: dict[str, Callable[..., Tensor]] = {
    "ancestral": samplers.ancestral,
    "ddim, 1": lambda *args, **kwargs: samplers.ddim(*args, eta=1.0, **kwargs),
    "ddim, 0.5": lambda *args, **kwargs: samplers.ddim(*args, eta=0.5, **kwargs),
    "upper": lambda *args, **kwargs: samplers.ancestral(*args, variance="upper", **kwargs),
    "euler_maruyama": samplers.euler_maruyama,
    "dpm_solver_pp_2m_sde": samplers.dpm_solver_pp_2m_sde,
}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(scope="module")
def mixture() -> Paths:
    """A mixture with noise from 10 to 0.02, starts, and where the flow takes them: by scipy, to 1e-10."""
    return paths()


@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
@pytest.mark.parametrize("name", FLOWS)
def test_a_sampler_of_the_flow_has_its_order(name: str, spacing: str, mixture: Paths) -> None:
    sampler, least, most = FLOWS[name]
    order = math.log2(median_error(sampler, mixture, 128, spacing) / median_error(sampler, mixture, 256, spacing))
    assert least < order < most


def test_the_third_order_solver_as_published_is_of_order_two(mixture: Paths) -> None:
    def published(*args: Any) -> Tensor:
        return samplers.dpm_solver_pp_3m(*args, is_corrected=False)

    errors = [median_error(published, mixture, steps, "karras") for steps in (128, 256)]
    assert 1.7 < math.log2(errors[0] / errors[1]) < 2.1
    assert errors[1] > 4.0 * median_error(samplers.dpm_solver_pp_3m, mixture, 256, "karras")


@pytest.mark.parametrize("name", FLOWS)
def test_all_schedules_have_the_same_flow(name: str) -> None:
    """At equal ratios of noise to signal, x/α is the same whatever α is."""
    oracle = Oracle.ring(5, EDM())
    torch.manual_seed(1)
    z = 5.0 * torch.randn(4, 2, dtype=torch.float64)
    ratios = EDM(0.1, 5.0).grid(12, "karras")
    expected = FLOWS[name][0](oracle, z, ratios)
    for schedule in (VP(), SubVP(), VE(), Straight(), Betas.linear(1000)):
        grid = schedule.time(-2.0 * ratios.log())
        other = Oracle(oracle.log_weights.exp(), oracle.means, oracle.covariances, schedule)
        end = FLOWS[name][0](other, schedule.alpha(grid[0]) * z, grid) / schedule.alpha(grid[-1])
        assert torch.allclose(end, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("euler", 10), ("ddim", 10), ("heun", 20), ("dpm_solver_2", 20), ("dpm_solver_pp_2m", 10), ("dpm_solver_pp_3m", 11),
        ("unipc, 3", 12), ("unipc, 1", 11), ("rk4", 40),
    ],
)  # fmt: skip
def test_a_sampler_makes_as_many_calls_as_it_says(name: str, calls: int) -> None:
    counted = Counted(EDM())
    FLOWS[name][0](counted, torch.ones(2, 2), EDM().grid(10, "karras"))
    assert counted.calls == calls


class Counted(Denoiser):
    """Standard normal data, however shaped, and how often it was asked."""

    calls = 0

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        self.calls += 1
        alpha, sigma = self.at(x, t)
        return Denoised(alpha * x / (alpha.square() + sigma.square()))


@pytest.mark.parametrize("name", [*FLOWS, *NEW])
@pytest.mark.parametrize("schedule", [EDM(0.0, 80.0), Betas.linear(100)], ids=["edm", "betas"])
def test_a_grid_may_end_without_noise(name: str, schedule: Schedule) -> None:
    """Then the last step is to x̂_0, and images keep their shape and dtype."""
    grid = torch.cat([schedule.grid(20, "log_snr", start=1.0 if schedule.stop == 100 else 0.01), f64(0.0)])
    sampler = FLOWS[name][0] if name in FLOWS else NEW[name]
    torch.manual_seed(2)
    x = sampler(Counted(schedule), schedule.sigma(grid[0]).float() * torch.randn(50, 1, 8, 8), grid)
    assert x.shape == (50, 1, 8, 8) and x.dtype == torch.float32
    assert 0.7 < x.std() < 1.3


# Random samplers: on Gaussian data all are linear, so that the law of what they make is Gaussian, and known exactly.


def normal(schedule: Schedule, mean: float = 0.7, variance: float = 0.25) -> Oracle:
    return Oracle(f64(1.0), f64(mean)[:, None], variance**0.5, schedule)


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("schedule", [VP(), VE(), SubVP()], ids=["vp", "ve", "sub-vp"])
def test_a_random_sampler_has_its_weak_order(name: str, schedule: Schedule) -> None:
    oracle = normal(schedule)
    errors = []
    for steps in (200, 400):
        grid = schedule.grid(steps, start=schedule.time(f64(6.0)).item(), stop=schedule.time(f64(-6.0)).item())
        errors.append(wasserstein(oracle, law(NEW[name], oracle, grid), grid[-1]))
    order = 2.0 if "2m" in name else 1.0
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1


@pytest.mark.parametrize("variance", ["optimal", "full"])
@pytest.mark.parametrize("schedule", [VP(), VE(), SubVP(), Betas.linear(100)], ids=["vp", "ve", "sub-vp", "betas"])
def test_steps_of_the_optimal_variance_have_no_error_on_gaussian_data(variance: str, schedule: Schedule) -> None:
    oracle = normal(schedule)
    for steps in (1, 2, 7, 40):
        grid = schedule.grid(steps, "time")
        found = law(samplers.ancestral, oracle, grid, variance=variance)
        assert wasserstein(oracle, found, grid[-1]) < 1e-10


def test_the_published_steps_have_the_errors_of_their_recursion() -> None:
    """Ho et al.'s 100 linear steps, against the recursion of mean and variance, written out."""
    beta = np.linspace(1e-4, 0.02, 100) * 10.0
    a, kept = 1.0 - beta, np.cumprod(1.0 - beta)
    for variance in ("upper", "lower"):
        mean, spread = math.sqrt(kept[-1]) * 0.7, kept[-1] * 0.25 + 1.0 - kept[-1]
        for t in range(99, -1, -1):
            before = kept[t - 1] if t else 1.0
            gain = math.sqrt(kept[t]) * 0.25 / (kept[t] * 0.25 + 1.0 - kept[t])
            to_data = math.sqrt(before) * beta[t] / (1.0 - kept[t])
            factor = to_data * gain + math.sqrt(a[t]) * (1.0 - before) / (1.0 - kept[t])
            fresh = 0.0 if not t else beta[t] * (1.0 if variance == "upper" else (1.0 - before) / (1.0 - kept[t]))
            mean = factor * mean + to_data * (0.7 - gain * math.sqrt(kept[t]) * 0.7)
            spread = factor**2 * spread + fresh
        schedule = Betas.linear(100)
        found = law(samplers.ancestral, normal(schedule), schedule.grid(100, "time"), variance=variance)
        assert found == pytest.approx((mean, spread), abs=1e-12)


def test_ancestral_steps_with_all_covariances_are_exact_posterior_steps() -> None:
    """On correlated Gaussian data: the mean of q(x_s | x_t) and its covariance, of the oracle's own reverse kernel."""
    torch.manual_seed(3)
    root = torch.randn(3, 3, dtype=torch.float64)
    oracle = Oracle(f64(1.0), torch.randn(1, 3, dtype=torch.float64), (root @ root.mT)[None], VP())
    grid = f64(0.6, 0.3)
    x = torch.randn(5, 3, dtype=torch.float64)
    step = samplers.path(oracle, x, grid)[0]
    known = samplers.step_posterior(oracle, x, step, "full")
    exact = oracle.reverse(x, grid[0], grid[1])
    assert torch.allclose(known.mean, exact.mean, atol=1e-10)
    covariance = exact.component_distribution.covariance_matrix[:, 0]
    assert torch.allclose(known.root @ known.root.mT, covariance, atol=1e-10)


def test_samplers_that_are_one_step_are_one_step() -> None:
    """DDIM(1) is ancestral sampling, DDIM(0) is Euler, and the first step of the SDE solver is ancestral."""
    torch.manual_seed(4)
    for schedule in (VP(), EDM(), SubVP(), Straight()):
        oracle = Oracle.ring(5, schedule)
        x = torch.randn(6, 2, dtype=torch.float64)
        grid = schedule.grid(8)
        noise = torch.randn(8, 6, 2, dtype=torch.float64)
        ancestral = samplers.ancestral(oracle, x, grid, noise=noise)
        assert torch.allclose(samplers.ddim(oracle, x, grid, 1.0, noise), ancestral, atol=1e-9)
        assert torch.allclose(samplers.ddim(oracle, x, grid), samplers.euler(oracle, x, grid), atol=1e-9)
        one = samplers.dpm_solver_pp_2m_sde(oracle, x, grid[:2], noise[:1])
        assert torch.allclose(one, samplers.ancestral(oracle, x, grid[:2], noise=noise[:1]), atol=1e-9)


def test_a_learned_variance_lies_between_the_lower_and_the_upper() -> None:
    class Learnt(Denoiser):
        def __init__(self, share: float) -> None:
            super().__init__(Betas.linear(100))
            self.share = share

        def forward(self, x: Tensor, t: Tensor) -> Denoised:
            sigma = self.at(x, t)[1]
            return Denoised(torch.zeros_like(x), self.share * sigma.square().expand(x.shape))

    x = torch.zeros(1, 1, dtype=torch.float64)
    for times in ((100.0, 99.0), (60.0, 20.0), (2.0, 1.0)):
        roots = {}
        for share in (0.0, 1.0):
            denoiser = Learnt(share)
            step = samplers.path(denoiser, x, f64(*times))[0]
            roots[share] = samplers.step_posterior(denoiser, x, step, "optimal").root.item()
            for variance in ("lower", "upper"):
                roots[variance] = samplers.step_posterior(denoiser, x, step, variance).root.item()  # type: ignore[arg-type]
        assert roots[0.0] == pytest.approx(roots["lower"], rel=1e-12)
        assert roots[1.0] == pytest.approx(roots["upper"], rel=1e-9)


def test_noise_that_is_given_makes_a_sampler_a_function() -> None:
    oracle, grid = Oracle.ring(5, VP()), VP().grid(6)
    x, noise = torch.randn(3, 2, dtype=torch.float64), torch.randn(6, 3, 2, dtype=torch.float64)
    before = torch.get_rng_state()
    for name, sampler in NEW.items():
        assert torch.equal(sampler(oracle, x, grid, noise=noise), sampler(oracle, x, grid, noise=noise)), name
    assert torch.equal(before, torch.get_rng_state())


# Langevin.


@pytest.mark.parametrize("share", [0.05, 0.5, 2.0])
def test_unadjusted_langevin_settles_at_its_closed_form(share: float) -> None:
    """Variance v/(1 − δ/(4v)), from the answers to unit vectors of noise: but for what 400 steps have not forgotten."""
    v, steps = 0.25, 400
    noise = torch.eye(steps, dtype=torch.float64)[:, :, None]
    x = ula(lambda x: -x / v, torch.zeros(steps, 1, dtype=torch.float64), share * v, steps, noise)
    forgotten = (1.0 - share / 2.0) ** (2 * steps)
    assert x.square().sum().item() == pytest.approx(v / (1.0 - share / 4.0), rel=forgotten + 1e-9)


def test_adjusted_langevin_keeps_the_target() -> None:
    """From exact draws of a mixture, after 20 large steps: counts in 12 cells of equal mass; chi-squared, 1e-6 false alarms.

    Unadjusted steps of that size fail the same test.
    """
    torch.manual_seed(5)
    oracle = Oracle(f64(0.3, 0.7), f64(-1.0, 1.0)[:, None], f64(0.5, 0.7), VP())
    x = oracle.distribution().sample((40000,))
    cdf = lambda y: 0.3 * stats.norm.cdf(y, -1.0, 0.5) + 0.7 * stats.norm.cdf(y, 1.0, 0.7)  # noqa: E731
    edges = f64(*(brentq(lambda y, q=q: cdf(y) - q, -9.0, 9.0) for q in np.arange(1, 12) / 12))
    limit = stats.chi2.isf(1e-6, 11)

    def statistic(draws: Tensor) -> float:
        counts = torch.bincount(torch.bucketize(draws[:, 0].contiguous(), edges), minlength=12)
        return ((counts - len(x) / 12) ** 2 / (len(x) / 12)).sum().item()

    out = mala(oracle.log_prob, score_of(oracle.log_prob), x, 0.5, 20)
    assert 0.3 < out.rate.mean() < 0.99
    assert statistic(out.x) < limit < statistic(ula(score_of(oracle.log_prob), x, 0.5, 20))


def test_annealed_langevin_settles_at_the_bias_of_its_last_level() -> None:
    schedule, rate, steps = VE(0.1, 10.0), 0.2, 300
    oracle = normal(schedule)
    grid = f64(1.0, 0.7, 0.5)
    total = 3 * steps
    noise = torch.zeros(3, steps, total + 1, 1, dtype=torch.float64)
    noise.view(total, total + 1)[:, 1:] = torch.eye(total, dtype=torch.float64)
    x = annealed_langevin(oracle, torch.zeros(total + 1, 1, dtype=torch.float64), grid, steps, rate, noise)[:, 0]
    spread = 0.25 + schedule.sigma(grid[-1]).item() ** 2
    size = rate * schedule.sigma(grid[-1]).item() ** 2
    assert (x[1:] - x[0]).square().sum().item() == pytest.approx(spread / (1.0 - size / (4.0 * spread)), rel=1e-9)
    assert x[0].item() == pytest.approx(0.7, rel=1e-9)


def test_corrections_leave_the_law_but_for_the_bias_of_their_step() -> None:
    """With exact predictions (optimal variance) on Gaussian data: one correction multiplies the variance and adds δ."""
    schedule, rate, steps = VP(), 0.1, 5
    oracle = normal(schedule)
    grid = schedule.grid(steps)

    def exact(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
        return samplers.ancestral(denoiser, x, grid, "optimal", torch.zeros(1, *x.shape, dtype=torch.float64))

    x = torch.zeros(1, 1, dtype=torch.float64)
    noise = torch.randn(steps, 1, 1, 1, dtype=torch.float64)
    found = samplers.predictor_corrector(oracle, x, grid, 1, rate, exact, noise)
    by_hand = x
    for i in range(steps):
        by_hand = exact(oracle, by_hand, grid[i : i + 2])
        alpha, sigma = schedule.alpha(grid[i + 1]), schedule.sigma(grid[i + 1])
        score = -(by_hand - alpha * 0.7) / (alpha**2 * 0.25 + sigma**2)
        by_hand = by_hand + rate * sigma**2 / 2 * score + rate**0.5 * sigma * noise[i, 0]
    assert torch.allclose(found, by_hand, atol=1e-10)
    same = samplers.predictor_corrector(oracle, x, grid, 0, rate, exact)
    assert torch.allclose(same, samplers.ancestral(oracle, x, grid, "optimal", torch.zeros(5, 1, 1)), atol=1e-10)


# What is refused.

X = torch.zeros(3, 2, dtype=torch.float64)
RING = Oracle.ring(5, VP())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: samplers.ddim(RING, X, f64(0.5)), "at least 2 times"),
        (lambda: samplers.heun(RING, X, f64(0.1, 0.5)), "falls from noise to data"),
        (lambda: samplers.heun(RING, X, f64(0.5, 0.1, 0.1)), "from 0.1 to 0.1 at step 1"),
        (lambda: samplers.heun(RING, X, f64(0.5, math.nan)), "falls from noise"),
        (lambda: samplers.euler(RING, X, f64(0.5, -0.1)), "lie between 0 and stop"),
        (lambda: samplers.euler(RING, X.long(), f64(0.5, 0.1)), "floating-point"),
        (lambda: samplers.ddim(RING, X, f64(0.5, 0.1), eta=2.0), "eta is between 0"),
        (lambda: samplers.ddim(RING, X, f64(0.5, 0.1), 1.0, X), "one draw for each of 1 steps"),
        (lambda: samplers.unipc(RING, X, f64(0.5, 0.1), order=4), "order is 1, 2 or 3"),
        (lambda: samplers.ancestral(RING, X, f64(0.5, 0.1), "best"), "variance is 'upper'"),  # type: ignore[arg-type]
        (lambda: samplers.ancestral(Counted(VP()), X, f64(0.5, 0.1), "optimal"), "learns_variance"),
        (lambda: samplers.terminal(RING, f64(0.2, 0.1), X), "does not reach its end"),
        (lambda: samplers.predictor_corrector(RING, X, f64(0.5, 0.1), rate=3.0), "rate is between"),
        (lambda: samplers.predictor_corrector(RING, X, f64(0.5, 0.1), noise=X), "one draw a correction"),
        (lambda: ula(lambda x: -x, X, 0.0, 5), "step above 0"),
        (lambda: mala(lambda x: -x, lambda x: -x, X, 0.1, 5), "one number per row"),
        (lambda: mala(lambda x: -x[:, 0], lambda x: -x, X, 0.1, 5, uniform=X), "one for each step and row"),
        (lambda: annealed_langevin(RING, X, f64(0.5, 0.0)), "noise at every level"),
        (lambda: annealed_langevin(RING, X, f64(0.1, 0.5)), "falls from noise"),
        (lambda: annealed_langevin(RING, X, f64(0.5), noise=X), "a draw for each step"),
    ],
)
def test_a_sampler_says_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_sampler_says_what_it_takes() -> None:
    with pytest.raises(TypeError, match="takes a Denoiser, but got a function"):
        samplers.heun(lambda x, t: x, X, f64(0.5, 0.1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a tensor of times"):
        samplers.heun(RING, X, [0.5, 0.1])  # type: ignore[arg-type]
    assert samplers.heun(RING, X.float(), f64(0.5, 0.1)).dtype == torch.float32
