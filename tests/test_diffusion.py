"""Schedules, denoisers, the oracle and Tweedie's formula, against formulas, quadrature and derivatives."""

from __future__ import annotations

import doctest
import importlib
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from pyro_genmodels.diffusion import (
    EDM,
    VE,
    VP,
    Betas,
    Cosine,
    Learned,
    Network,
    Oracle,
    Schedule,
    Sigmoid,
    Straight,
    SubVP,
    score_of,
    tweedie,
    tweedie_covariance,
)
from pyro_genmodels.diffusion.denoiser import PREDICTIONS, data_from, output_from
from pyro_genmodels.diffusion.scores import jacobian

SCHEDULES: dict[str, Callable[[], Schedule]] = {
    "betas": lambda: Betas.linear(100),
    "betas cosine": lambda: Betas.cosine(50),
    "cosine": Cosine,
    "sigmoid": Sigmoid,
    "vp": VP,
    "sub-vp": SubVP,
    "ve": VE,
    "edm": EDM,
    "straight": Straight,
    "learned": lambda: Learned(hidden=16),
}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    torch.manual_seed(0)
    return SCHEDULES[request.param]()


def inner(schedule: Schedule, count: int = 41) -> Tensor:
    """Times strictly between the ends."""
    return torch.linspace(schedule.start, schedule.stop, count + 2, dtype=torch.float64)[1:-1]


# Schedules.


def test_time_inverts_the_log_snr(schedule: Schedule) -> None:
    t = inner(schedule)
    assert torch.allclose(schedule.time(schedule.log_snr(t)), t, rtol=1e-9, atol=1e-12)


def test_the_log_snr_is_that_of_the_levels_and_falls(schedule: Schedule) -> None:
    t = inner(schedule)
    snr = schedule.log_snr(t)
    assert torch.allclose(2.0 * (schedule.alpha(t) / schedule.sigma(t)).log(), snr, atol=1e-10)
    assert (snr[1:] < snr[:-1]).all()


def test_a_schedule_keeps_its_digits_in_single_precision(schedule: Schedule) -> None:
    t = inner(schedule).float()
    assert torch.allclose(schedule.log_snr(t).double(), schedule.log_snr(t.double()), rtol=1e-4, atol=1e-3)


def test_levels_are_those_of_the_papers() -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    betas = np.linspace(1e-4, 0.02, 1000)
    whole = torch.arange(1, 1001, dtype=torch.float64)
    assert np.allclose(Betas.linear(1000).alpha(whole).square(), np.cumprod(1.0 - betas), rtol=1e-12)
    angle = np.cos((t.numpy() + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    assert np.allclose(Cosine().alpha(t).square(), angle, rtol=1e-12)
    sigmoid = stats.logistic.cdf(-3.0 + 6.0 * t.numpy())
    ends = stats.logistic.cdf([-3.0, 3.0])
    assert np.allclose(Sigmoid().alpha(t).square(), (ends[1] - sigmoid) / (ends[1] - ends[0]), rtol=1e-12)
    mean = np.exp(-0.25 * t.numpy() ** 2 * 19.9 - 0.5 * t.numpy() * 0.1)
    assert np.allclose(VP().alpha(t), mean) and np.allclose(VP().sigma(t), np.sqrt(1.0 - mean**2))
    assert np.allclose(SubVP().alpha(t), mean) and np.allclose(SubVP().sigma(t), 1.0 - mean**2)
    assert np.allclose(VE().sigma(t), 0.01 * 5000 ** t.numpy()) and (VE().alpha(t) == 1).all()
    assert np.allclose(EDM().sigma(t), t)
    assert np.allclose(Straight().alpha(t), 1 - t) and np.allclose(Straight().sigma(t), t)


@pytest.mark.parametrize("kind", ["vp", "sub-vp"])
def test_levels_solve_the_moments_of_the_sde(kind: str) -> None:
    """dm/dt = −β m/2 and dv/dt = −β v + g², with g² = β for VP and β (1 − α⁴) for sub-VP, by Runge-Kutta."""
    beta = lambda t: 0.1 + 19.9 * t  # noqa: E731
    state, steps = np.array([1.0, 0.0]), 4000
    total = lambda t: 0.1 * t + 9.95 * t * t  # noqa: E731

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        diffusion = beta(t) * (1.0 if kind == "vp" else 1.0 - math.exp(-2.0 * total(t)))
        return np.array([-0.5 * beta(t) * y[0], -beta(t) * y[1] + diffusion])

    h = 1.0 / steps
    for i in range(steps):
        t = i * h
        a = slope(t, state)
        b = slope(t + h / 2, state + h / 2 * a)
        c = slope(t + h / 2, state + h / 2 * b)
        state = state + h / 6 * (a + 2 * b + 2 * c + slope(t + h, state + h * c))
    one = f64(1.0)
    schedule = SCHEDULES[kind]()
    assert np.allclose([schedule.alpha(one).item(), schedule.sigma(one).item() ** 2], state, rtol=1e-9)


def test_a_grid_is_spaced_as_it_says() -> None:
    karras = EDM().grid(18, "karras") ** (1 / 7)
    assert torch.allclose(karras.diff(), karras.diff().mean().expand(18), rtol=1e-10)
    for name, make in SCHEDULES.items():
        schedule = make()
        start = 1.0 if name.startswith("betas") else None
        snr = schedule.log_snr(schedule.grid(10, "log_snr", start=start))
        assert torch.allclose(snr.diff(), snr.diff().mean().expand(10), rtol=1e-6)
    assert schedule.grid(10, "time").tolist() == pytest.approx(np.linspace(1, 0, 11))


def test_a_learned_schedule_learns_both_ends_and_what_lies_between() -> None:
    schedule = Learned(hidden=8)
    assert schedule.log_snr(f64(0.0, 1.0)).tolist() == pytest.approx([5.0, -13.3], abs=1e-5)
    (schedule.log_snr(f64(0.2, 0.7)) ** 2).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in schedule.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EDM().grid(0), "at least 1 step"),
        (lambda: EDM().grid(2.5), "whole number of steps"),  # type: ignore[arg-type]
        (lambda: EDM().grid(5, "karras", rho=0.0), "rho is above 0"),
        (lambda: EDM().grid(5, "quadratic"), "spacing is"),  # type: ignore[arg-type]
        (lambda: EDM().grid(5, start=90.0), "begins at noise"),
        (lambda: Betas.linear(100).grid(5, "log_snr"), "Give a start above 0"),
        (lambda: Betas([0.1, 1.2]), "above 0 and below 1"),
        (lambda: Betas.linear(10), "at least 21"),
        (lambda: VE(2.0, 1.0), "least is 2"),
        (lambda: EDM(1.0, 0.5), "least < most"),
        (lambda: Sigmoid(3.0, -3.0), "first is below last"),
        (lambda: Learned(5.0, -5.0), "least is below most"),
    ],
)
def test_a_schedule_says_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Denoisers.


def test_all_parameterisations_say_the_same(schedule: Schedule) -> None:
    torch.manual_seed(1)
    x, data = torch.randn(2, 8, 3, dtype=torch.float64)
    snr = torch.linspace(-8.0, 8.0, 8, dtype=torch.float64)
    alpha, sigma = (level[:, None] for level in schedule.levels(snr))
    for prediction in PREDICTIONS:
        output = output_from(prediction, data, x, alpha, sigma)
        assert torch.allclose(data_from(prediction, output, x, alpha, sigma), data, atol=1e-9)


class Fixed(nn.Module):
    """A network that says what an oracle knows, in the words of a parameterisation."""

    def __init__(self, oracle: Oracle, prediction: str, deviation: float) -> None:
        super().__init__()
        self.oracle, self.prediction, self.deviation = oracle, prediction, deviation

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        log_snr = 4.0 * level
        t = self.oracle.schedule.time(log_snr)
        alpha, sigma = (value[:, None] for value in self.oracle.schedule.levels(log_snr))
        if self.prediction != "preconditioned":
            return output_from(self.prediction, self.oracle(x, t).mean, x, alpha, sigma)  # type: ignore[arg-type]
        s = sigma / alpha
        spread = (self.deviation**2 + s**2).sqrt()
        z = x * spread
        skip = self.deviation**2 / spread**2
        return (self.oracle(alpha * z, t).mean - skip * z) / (self.deviation * s / spread)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "preconditioned"])
@pytest.mark.parametrize("kind", ["vp", "sub-vp", "edm"])
def test_a_network_of_any_parameterisation_is_the_same_denoiser(prediction: str, kind: str) -> None:
    torch.manual_seed(2)
    oracle = Oracle.ring(5, SCHEDULES[kind]())
    network = Network(Fixed(oracle, prediction, 1.4), oracle.schedule, prediction, deviation=1.4)  # type: ignore[arg-type]
    x, t = torch.randn(6, 2, dtype=torch.float64), inner(oracle.schedule, 6)
    assert torch.allclose(network(x, t).mean, oracle(x, t).mean, atol=1e-9)
    assert torch.allclose(network(x, t[2]).mean, oracle(x, t[2]).mean, atol=1e-9)
    assert torch.allclose(network.score(x, t), oracle.score(x, t), atol=1e-7)


def test_preconditioning_gives_unit_variance_to_input_and_target() -> None:
    """Exactly, from the variances of x_0 and ε: at every level Var(c_in x_t) = 1 = Var(F) for data of deviation d."""
    d, schedule = 0.5, VP()
    rows: list[Tensor] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            rows.append(x)
            return torch.zeros_like(x)

    basis = torch.eye(2, dtype=torch.float64) * f64(d, 1.0)  # rows: one deviation of x_0, one of ε
    for t in inner(schedule, 5):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x = (basis @ torch.stack([alpha, sigma]))[:, None]
        network = Network(Seen(), schedule, "preconditioned", deviation=d)
        skipped = network(x, t).mean
        ones = torch.ones_like(x)
        network.network.forward = lambda x, level: torch.ones_like(x)  # type: ignore[method-assign]
        scale = network(x, t).mean - skipped
        assert rows[-1].square().sum() == pytest.approx(1.0, rel=1e-12)
        target = (basis[:, :1] * f64(1.0, 0.0)[:, None] - skipped) / scale * ones
        assert target.square().sum() == pytest.approx(1.0, rel=1e-9)


def test_the_state_keeps_its_dtype_and_the_network_its_own() -> None:
    network = Network(Two(), VP())
    assert network(torch.randn(3, 2, dtype=torch.float64), f64(0.5)[0]).mean.dtype == torch.float64
    assert network(torch.randn(3, 2), f64(0.5)[0]).mean.dtype == torch.float32


class Two(nn.Module):
    def __init__(self, factor: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2 * factor)

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.layer(x) + level[:, None]


def test_a_denoiser_says_what_is_wrong() -> None:
    x, t = torch.randn(3, 2), torch.tensor(0.5)
    with pytest.raises(ValueError, match="prediction is one of data"):
        Network(Two(), VP(), "epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="deviation is that of the data"):
        Network(Two(), VP(), deviation=0.0)
    with pytest.raises(ValueError, match="made .* of .*"):
        Network(Two(3), VP())(x, t)
    with pytest.raises(ValueError, match="one per row of x"):
        Network(Two(), VP())(x, torch.rand(4))
    assert Network(Two(2), VP(), learns_variance=True)(x, t).variance.shape == x.shape  # type: ignore[union-attr]


# The oracle.


def skewed(schedule: Schedule, components: int = 3, size: int = 3) -> Oracle:
    torch.manual_seed(3)
    roots = 0.5 * torch.randn(components, size, size, dtype=torch.float64)
    means = 2.0 * torch.randn(components, size, dtype=torch.float64)
    return Oracle(torch.rand(components, dtype=torch.float64) + 0.2, means, roots @ roots.mT, schedule)


def test_the_noised_law_is_that_of_scipy(schedule: Schedule) -> None:
    oracle = skewed(schedule)
    t = inner(schedule, 3)[1]
    alpha, sigma = schedule.alpha(t).item(), schedule.sigma(t).item()
    x = torch.randn(7, 3, dtype=torch.float64)
    weights = oracle.log_weights.exp()
    density = sum(
        w.item() * stats.multivariate_normal(alpha * m.numpy(), (alpha**2 * c.numpy() + sigma**2 * np.eye(3))).pdf(x)
        for w, m, c in zip(weights, oracle.means, oracle.covariances)
    )
    assert np.allclose(oracle.log_prob(x, t).detach(), np.log(density), rtol=1e-9)
    assert torch.allclose(oracle.distribution(t).log_prob(x), oracle.log_prob(x, t), atol=1e-9)


def test_score_and_moments_are_the_derivatives_of_the_log_density(schedule: Schedule) -> None:
    oracle = skewed(schedule)
    t = inner(schedule, 9)[2:7]
    x = (torch.randn(5, 3, dtype=torch.float64) * 2.0).requires_grad_()
    score = score_of(lambda y: oracle.log_prob(y, t))
    assert torch.allclose(oracle.score(x, t), score(x), rtol=1e-8, atol=1e-8)
    alpha, sigma = (level[:, None] for level in (schedule.alpha(t), schedule.sigma(t)))
    assert torch.allclose(tweedie(x, score, sigma) / alpha, oracle(x, t).mean, rtol=1e-9, atol=1e-9)
    covariance = oracle.covariance(x, t)
    by_score = tweedie_covariance(x, score, sigma) / alpha[..., None] ** 2
    by_mean = (sigma**2 / alpha)[..., None] * jacobian(lambda y: oracle(y, t).mean, x)
    assert torch.allclose(by_score, covariance, atol=1e-8) and torch.allclose(by_mean, covariance, atol=1e-8)
    variance = oracle(x, t).variance
    assert variance is not None and torch.allclose(variance, covariance.diagonal(dim1=1, dim2=2), atol=1e-10)


def test_moments_are_those_of_quadrature() -> None:
    oracle = Oracle(f64(0.3, 0.7), f64(-1.0, 1.5)[:, None], f64(0.4, 0.8), VP())
    nodes = torch.linspace(-8.0, 9.0, 20001, dtype=torch.float64)
    prior = oracle.log_prob(nodes[:, None]).exp()
    t = f64(0.3)[0]
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    for y in (-1.2, 0.1, 0.9):
        joint = prior * torch.exp(-0.5 * ((y - alpha * nodes) / sigma) ** 2)
        mean = (joint * nodes).sum() / joint.sum()
        variance = (joint * (nodes - mean) ** 2).sum() / joint.sum()
        known = oracle(f64(y)[:, None], t)
        assert known.mean.item() == pytest.approx(mean.item(), abs=1e-10)
        assert known.variance.item() == pytest.approx(variance.item(), abs=1e-10)  # type: ignore[union-attr]


def test_reverse_kernels_and_forward_kernels_make_one_joint_law(schedule: Schedule) -> None:
    """Bayes' rule at any two times: p(x_t) q(x_s | x_t) = p(x_s) q(x_t | x_s)."""
    oracle = skewed(schedule)
    earlier, t = inner(schedule, 9)[[2, 6]]
    torch.manual_seed(4)
    before = oracle.distribution(earlier).sample((5,))
    ratio = schedule.alpha(t) / schedule.alpha(earlier)
    scale = (schedule.sigma(t) ** 2 - (ratio * schedule.sigma(earlier)) ** 2).sqrt()
    after = ratio * before + scale * torch.randn_like(before)
    forward = torch.distributions.Normal(ratio * before, scale).log_prob(after).sum(1)
    left = oracle.log_prob(after, t) + oracle.reverse(after, t, earlier).log_prob(before)
    assert torch.allclose(left, oracle.log_prob(before, earlier) + forward, atol=1e-7)


def test_conditioning_is_bayes_rule() -> None:
    oracle = skewed(VP())
    operator, covariance = torch.randn(2, 3, dtype=torch.float64), torch.diag(f64(0.3, 0.5))
    y = f64(0.4, -0.2)
    posterior = oracle.condition(operator, y, covariance)
    x = torch.randn(6, 3, dtype=torch.float64) * 2.0
    likelihood = torch.distributions.MultivariateNormal(x @ operator.T, covariance).log_prob(y)
    constant = oracle.log_prob(x) + likelihood - posterior.log_prob(x)
    assert torch.allclose(constant, constant[0].expand(6), atol=1e-8)


def test_the_least_loss_is_the_trace_of_the_posterior_covariance() -> None:
    """E‖ε − ε̂‖² = E tr Cov[ε | x_t] = D − E‖ε̂‖², and E ε·ε̂ = E‖ε̂‖²; 40,000 draws, 5 standard errors: 6e-7 each."""
    torch.manual_seed(5)
    oracle = Oracle.ring(5, VP())
    x = oracle.distribution().sample((40000,))
    for snr in (4.0, 0.0, -2.0):
        t = oracle.schedule.time(f64(snr))[0]
        alpha, sigma = oracle.at(x, t)
        eps = torch.randn_like(x)
        noisy = alpha * x + sigma * eps
        guess = oracle.noise(noisy, t)
        floor = (alpha / sigma) ** 2 * oracle(noisy, t).variance.sum(1)  # type: ignore[union-attr]
        for gap in (
            (eps - guess).square().sum(1) - floor,
            floor + guess.square().sum(1) - 2.0,
            ((eps - guess) * guess).sum(1),
        ):
            assert abs(gap.mean()) < 5.0 * gap.std() / len(x) ** 0.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2), torch.zeros(3, 2), 1.0), "weights are"),
        ((torch.tensor([1.0, -1.0]), torch.zeros(2, 2), 1.0), "weights are positive"),
        ((torch.ones(2), torch.zeros(2, 2), torch.eye(3)), "covariances are"),
        ((torch.ones(1), torch.zeros(1, 2), -torch.eye(2)[None]), "positive semi-definite"),
        ((torch.ones(1), torch.zeros(1, 2), torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])), "symmetric"),
    ],
)
def test_an_oracle_says_what_is_wrong(args: tuple[Tensor, Tensor, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Oracle(*args, VP())
    ring = Oracle.ring(5, VP())
    x, t = torch.zeros(3, 2), torch.tensor(0.5)
    with pytest.raises(ValueError, match="x is \\(rows, 2\\)"):
        ring(x[0], t)
    with pytest.raises(ValueError, match="a time before t"):
        ring.reverse(x, t, t)
    with pytest.raises(ValueError, match="y is \\(M,\\)"):
        ring.condition(torch.eye(2), torch.zeros(3), torch.eye(2))
    with pytest.raises(ValueError, match="at least 1 component"):
        Oracle.ring(0, VP())
    with pytest.raises(TypeError, match="t is a tensor"):
        ring(x, 0.5)  # type: ignore[arg-type]


# Tweedie.


def test_tweedie_needs_no_prior() -> None:
    """Under heteroscedastic noise, against the conjugate posterior of a normal prior N(m, v)."""
    noise = f64(0.2, 1.0, 3.0)
    m, v = 0.7, 0.5
    y = torch.randn(4, 3, dtype=torch.float64)
    score = score_of(lambda y: torch.distributions.Normal(m, (v + noise**2).sqrt()).log_prob(y).sum(1))
    mean = (m / v + y / noise**2) / (1 / v + 1 / noise**2)
    assert torch.allclose(tweedie(y, score, noise), mean, atol=1e-12)
    covariance = torch.diag(1 / (1 / v + 1 / noise**2)).expand(4, 3, 3)
    assert torch.allclose(tweedie_covariance(y, score, noise), covariance, atol=1e-12)
    assert torch.equal(tweedie(y, score, 0.0), y)


def test_tweedie_says_what_is_wrong() -> None:
    y = torch.randn(4, 3)
    with pytest.raises(ValueError, match="standard deviation"):
        tweedie(y, lambda y: -y, -1.0)
    with pytest.raises(ValueError, match="does not multiply y"):
        tweedie(y, lambda y: -y, torch.ones(5, 4, 3))
    with pytest.raises(ValueError, match="score_of"):
        tweedie(y, lambda y: y.sum(1), 1.0)
    with pytest.raises(ValueError, match="one number per row"):
        score_of(torch.distributions.Normal(0.0, 1.0).log_prob)(y)


@pytest.mark.parametrize("name", ["schedule", "oracle", "scores", "likelihood", "posterior", "flow", "surrogate", "plated"])
def test_examples_of_the_documentation_hold(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"pyro_genmodels.diffusion.{name}"))
    assert found.attempted and not found.failed


# ------------------------------------------------------------------------------------- other types than the usual ones
@pytest.mark.parametrize(
    "schedule", [Betas.linear(1000), VP(), VE(), Sigmoid(), SubVP(), Learned(), EDM()], ids=lambda s: type(s).__name__
)
def test_a_whole_time_is_that_time(schedule: Schedule) -> None:
    for level in (schedule.alpha, schedule.sigma):
        torch.testing.assert_close(level(torch.tensor([1])), level(torch.tensor([1.0])))


def test_an_oracle_keeps_the_type_of_x() -> None:
    oracle = Oracle(torch.ones(1), torch.zeros(1, 2), 1.0, VP())
    x, t = torch.randn(3, 2, dtype=torch.float64), torch.tensor(0.5)
    found = oracle(x, t)
    assert found.mean.dtype == found.variance.dtype == torch.float64
    torch.testing.assert_close(found.mean.float(), oracle(x.float(), t).mean)


def test_tweedie_refuses_whole_numbers() -> None:
    with pytest.raises(TypeError, match=r"floating-point numbers, .* but is torch.int64. Give y.float\(\)"):
        tweedie(torch.tensor([[2]]), lambda y: -y / 2, 0.5)


@pytest.mark.parametrize("ends", [{"stop": 5.0}, {"start": -1.0, "spacing": "time"}])
def test_a_grid_stays_within_the_times_of_its_schedule(ends: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Times of VP lie between 0 and stop = 1, but the grid goes from"):
        VP().grid(3, **ends)
    assert len(VP().grid(np.int64(3))) == 4
