"""Likelihoods of diffusion: the flow, the bound and the errors of denoising, against the closed forms of the oracle."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from inference import Denoising, SimpleLoss
from inference.noising import EDMError, LogNormal
from pyro_genmodels import ScoreModel
from pyro_genmodels.diffusion import EDM, VE, VP, Betas, Denoised, Denoiser, Network, Oracle, Schedule, Straight, SubVP
from pyro_genmodels.diffusion.likelihood import (
    bits_per_dimension,
    flow_log_prob,
    immse_log_prob,
    path_bound,
    probability_flow,
    rademacher,
    variational_bound,
)
from pyro_genmodels.diffusion.samplers import path, rk4
from pyro_genmodels.nets import PointNetwork


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ring(schedule: Schedule, rows: int) -> tuple[Oracle, Tensor]:
    torch.manual_seed(0)
    oracle = Oracle.ring(5, schedule)
    return oracle, oracle.distribution().sample((rows,))


# The flow.


@pytest.mark.parametrize("schedule", [EDM(0.02, 10.0), VP(), SubVP(), Straight()], ids=lambda s: type(s).__name__)
def test_the_density_of_the_flow_is_that_of_the_mixture(schedule: Schedule) -> None:
    oracle, x = ring(schedule, 32)
    grid = schedule.time(-2.0 * EDM(0.02, 10.0).grid(64, "karras").log())
    x = schedule.alpha(grid[-1]) * x
    found = flow_log_prob(oracle, x, grid, prior=lambda y: oracle.log_prob(y, grid[0]))
    assert (found - oracle.log_prob(x, grid[-1])).abs().max() < 1e-3
    assert (found - oracle.log_prob(x, grid[-1])).abs().mean() < 1e-4


def test_the_density_of_the_flow_has_the_order_of_its_steps() -> None:
    oracle, x = ring(EDM(0.02, 10.0), 32)
    errors = []
    for steps in (32, 64):
        grid = oracle.schedule.grid(steps, "karras")
        found = flow_log_prob(oracle, x, grid, prior=lambda y: oracle.log_prob(y, f64(10.0)[0]))
        errors.append((found - oracle.log_prob(x, grid[-1])).abs().median())
    assert 3.5 < math.log2(errors[0] / errors[1]) < 4.5


def test_a_plain_prior_errs_by_what_is_left_of_the_data() -> None:
    """KL(q(x_T) ‖ p(x_T)) in the mean: on a normal, log p of the flow is off by log p(x_T) − log q(x_T), at each row."""
    schedule = VP()
    oracle = Oracle(f64(1.0), f64(0.7)[:, None], 0.5, schedule)
    x = oracle.distribution().sample((16,))
    grid = schedule.grid(100)
    exact = oracle.log_prob(x, grid[-1])
    end = probability_flow(oracle, x, grid.flip(0)).x
    off = stats.norm.logpdf(end[:, 0]) - oracle.log_prob(end, grid[0]).numpy()
    assert np.allclose(flow_log_prob(oracle, x, grid) - exact, off, atol=1e-5)
    assert abs(off).max() < 0.05


def test_the_flow_is_undone_by_the_flow() -> None:
    oracle, x = ring(EDM(0.02, 10.0), 32)
    grid = oracle.schedule.grid(64, "karras")
    there = probability_flow(oracle, x, grid.flip(0))
    back = probability_flow(oracle, there.x, grid)
    assert (back.x - x).norm(dim=1).max() < 1e-4 and (back.x - x).norm(dim=1).median() < 1e-5
    assert (there.log_det + back.log_det).abs().max() < 5e-3
    assert torch.allclose(rk4(oracle, there.x, grid), back.x, atol=1e-12)


def test_the_log_determinant_is_that_of_the_jacobian() -> None:
    schedule = SubVP()
    oracle, x = ring(schedule, 3)
    grid = schedule.grid(120)
    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    moved = torch.cat([x, *(x + sign * delta for delta in step for sign in (1.0, -1.0))])
    flow = probability_flow(oracle, moved, grid.flip(0))
    ends = flow.x.reshape(5, 3, 2)
    jacobian = torch.stack([ends[1] - ends[2], ends[3] - ends[4]], 1) / 2e-5
    assert torch.allclose(flow.log_det[:3], jacobian.det().abs().log(), atol=1e-3)


def test_frozen_probes_are_unbiased_with_the_variance_of_rademacher() -> None:
    """Hutchinson on a linear flow: exact mean, and none of the variance where the Jacobian is diagonal."""
    torch.manual_seed(1)
    schedule = EDM(0.1, 10.0)
    root = torch.randn(3, 3, dtype=torch.float64)
    grid = schedule.grid(16, "karras")
    for covariance, is_exact in ((torch.diag(f64(0.3, 1.0, 2.0)), True), (root @ root.mT, False)):
        oracle = Oracle(f64(1.0), torch.zeros(1, 3, dtype=torch.float64), covariance[None], schedule)
        x = oracle.distribution().sample((2,))
        exact = probability_flow(oracle, x, grid).log_det
        signs = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * 3)).reshape(3, 8).T)  # all there are: the mean itself
        found = probability_flow(oracle, x, grid, signs[:, None, :]).log_det
        assert torch.allclose(found, exact, atol=1e-8)
        one = probability_flow(oracle, x, grid, rademacher(1, x)).log_det
        assert torch.allclose(one, exact, atol=1e-8) == is_exact


def test_the_log_density_of_the_flow_has_the_exact_gradient() -> None:
    oracle, x = ring(EDM(0.1, 10.0), 4)
    grid = oracle.schedule.grid(48, "karras")
    point = x.clone().requires_grad_()
    value = flow_log_prob(oracle, point, grid, prior=lambda y: oracle.log_prob(y, f64(10.0)[0]))
    (slope,) = torch.autograd.grad(value.sum(), point)
    assert torch.allclose(slope, oracle.score(x, grid[-1]), atol=2e-2, rtol=1e-2)
    with torch.no_grad():
        assert not flow_log_prob(oracle, point, grid).requires_grad


class Wild(nn.Module):
    """A network that nobody trained."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs + 1, 32), nn.Tanh(), nn.Linear(32, outputs))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.layers(torch.cat([x, level[:, None]], 1))


def test_an_untrained_network_has_a_density_that_integrates_to_one() -> None:
    """Normalisation is by construction, whatever the network: on a plane, by the trapezoidal rule."""
    torch.manual_seed(2)

    denoiser = Network(Wild(2, 2).double(), EDM(0.3, 10.0), "preconditioned")
    axis = torch.linspace(-7.0, 7.0, 71, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = flow_log_prob(denoiser, points, denoiser.schedule.grid(24, "karras")).exp()
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1.0, abs=1e-3)


# The bound.


@pytest.mark.parametrize("variance", ["optimal", "full"])
@pytest.mark.parametrize("steps", [1, 5, 50])
def test_with_exact_steps_every_path_has_the_log_density_of_its_data(variance: str, steps: int) -> None:
    schedule = Betas.cosine(steps) if steps > 1 else Betas([0.9])
    oracle = Oracle(f64(1.0), f64(0.7, -0.2)[None], torch.diag(f64(0.25, 1.5))[None], schedule)
    x = oracle.distribution().sample((20,))
    grid = schedule.grid(steps, "time")
    prior = lambda y: oracle.log_prob(y, grid[0])  # noqa: E731
    if steps == 1:  # too short for a plain prior, but exact with its own
        with pytest.raises(ValueError, match="does not reach its end"):
            variational_bound(oracle, x, grid, variance)  # type: ignore[arg-type]
    found = path_bound(oracle, x, grid, variance, prior)  # type: ignore[arg-type]
    assert torch.allclose(found, oracle.log_prob(x), atol=1e-8)


def test_the_oracles_own_reverse_kernels_make_any_mixture_exact() -> None:
    """log p(x_T) + Σ log p(x_s | x_t) − log q(path | x_0) = log p(x_0) for every path, with steps of mixtures."""
    schedule = Betas.cosine(8)
    oracle, x = ring(schedule, 20)
    states = [x]
    forward = torch.zeros(20, dtype=torch.float64)
    for step in reversed(path(oracle, x, schedule.grid(8, "time"))):
        ratio = step.alpha / step.next_alpha
        scale = (step.sigma**2 - (ratio * step.next_sigma) ** 2).sqrt()
        states.append(ratio * states[-1] + scale * torch.randn_like(x))
        forward += torch.distributions.Normal(ratio * states[-2], scale).log_prob(states[-1]).sum(1)
    total = oracle.log_prob(states[-1], f64(8.0)[0]) - forward
    for t in range(8, 0, -1):
        total += oracle.reverse(states[t], f64(t)[0], f64(t - 1)[0]).log_prob(states[t - 1])
    assert torch.allclose(total, oracle.log_prob(x), atol=1e-8)


def linear(steps: int) -> Betas:
    return Betas((torch.linspace(1e-4, 0.02, steps, dtype=torch.float64) * (1000.0 / steps)).clamp(max=0.999))


@pytest.mark.parametrize(
    ("steps", "gaps"),
    [(30, {"upper": 0.316, "lower": 4.93, "optimal": 0.125}), (100, {"upper": 0.092, "lower": 2.36, "optimal": 0.028})],
)
def test_the_gap_of_the_bound_is_that_of_the_table(steps: int, gaps: dict[str, float]) -> None:
    """On the ring, by an independent program: at most 1.3 times as large, and not below 0 by 4 standard errors: 3e-5."""
    oracle, x = ring(linear(steps), 4000)
    grid = oracle.schedule.grid(steps, "time")
    noise = torch.randn(steps, *x.shape, dtype=torch.float64)
    for variance, most in gaps.items():
        gap = oracle.log_prob(x) - variational_bound(oracle, x, grid, variance, noise=noise).total  # type: ignore[arg-type]
        error = gap.std() / len(x) ** 0.5
        assert -4.0 * error < gap.mean() < 1.3 * most + 4.0 * error
        assert gap.mean() > most / 1.3 - 4.0 * error


@pytest.mark.parametrize("variance", ["upper", "lower", "optimal", "full"])
def test_divergences_in_closed_form_are_the_mean_over_paths(variance: str) -> None:
    """Both estimate one number: 4 standard errors of their difference, 6e-5 false alarms."""
    torch.manual_seed(3)
    oracle, _ = ring(Betas.cosine(6), 1)
    x = oracle.distribution().sample((1,)).expand(8000, -1)
    grid = oracle.schedule.grid(6, "time")
    terms = variational_bound(oracle, x, grid, variance)  # type: ignore[arg-type]
    paths = path_bound(oracle, x, grid, variance)  # type: ignore[arg-type]
    assert terms.steps.shape == (5, 8000) and (terms.steps >= 0).all() and (terms.prior >= 0).all()
    gap = terms.total.mean() - paths.mean()
    assert abs(gap) < 4.0 * math.sqrt((terms.total.var() + paths.var()) / 8000)


class Known(Denoiser):
    """Says what it was told, so that a bin's probability can be written down."""

    def __init__(self, value: float) -> None:
        super().__init__(Betas.cosine(20))
        self.value = value

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        return Denoised(torch.full_like(x, self.value))


def test_probabilities_of_discrete_data_are_those_of_their_bins_and_sum_to_one() -> None:
    levels = 11
    values = torch.linspace(-1.0, 1.0, levels, dtype=torch.float64)
    denoiser = Known(0.33)
    grid = denoiser.schedule.grid(20, "time")
    noise = torch.zeros(20, levels, 1, dtype=torch.float64)
    found = variational_bound(denoiser, values[:, None], grid, levels=levels, noise=noise).decoder
    scale = denoiser.schedule.sigma(f64(1.0)).item()
    edges = stats.norm.cdf([-np.inf, *(values[:-1].numpy() + 0.1), np.inf], 0.33, scale)
    assert np.allclose(found.exp(), np.maximum(np.diff(edges), 1e-12), rtol=1e-6)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_the_bound_of_a_network_with_a_learned_variance_is_finite_and_has_gradients() -> None:
    torch.manual_seed(4)
    network = Wild(2, 4)
    denoiser = Network(network, Betas.cosine(20), "velocity", learns_variance=True)
    total = variational_bound(denoiser, torch.randn(5, 2), denoiser.schedule.grid(20, "time"), "optimal").total
    total.sum().backward()
    assert total.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


# Errors of denoising.


def test_errors_of_denoising_integrate_to_the_log_density() -> None:
    """Against −log p exactly, in the mean over 500 rows: 5 standard errors, and 0.02 for the rule and its ends."""
    oracle, x = ring(VE(0.001, 1000.0), 500)
    grid = oracle.schedule.grid(
        160, start=oracle.schedule.time(f64(12.0)).item(), stop=oracle.schedule.time(f64(-12.0)).item()
    )
    gap = immse_log_prob(oracle, x, grid, draws=8) - oracle.log_prob(x)
    assert abs(gap.mean()) < 0.02 + 5.0 * gap.std() / 500**0.5
    assert gap.std() < 0.6


def test_the_errors_of_a_normal_integrate_to_its_density_in_closed_form() -> None:
    """One row, noise ±1: E‖x − x̂_0‖² in closed form for a symmetric pair, so that only the rule and its ends are left."""
    v = 0.25
    for schedule in (VP(1e-4, 60.0), VE(1e-4, 1e4)):
        oracle = Oracle(f64(1.0), torch.zeros(1, 1, dtype=torch.float64), v**0.5, schedule)
        x = f64(0.3)[:, None]
        grid = schedule.grid(400, start=schedule.time(f64(14.0)).item(), stop=schedule.time(f64(-14.0)).item())
        noise = torch.ones(401, 2, 1, 1, dtype=torch.float64)
        noise[:, 1] = -1.0
        found = immse_log_prob(oracle, x, grid, 2, noise)
        assert found.item() == pytest.approx(stats.norm.logpdf(0.3, 0.0, 0.5), abs=1e-4)


def test_three_estimates_agree() -> None:
    oracle, x = ring(EDM(0.002, 80.0), 200)
    flow = flow_log_prob(oracle, x, oracle.schedule.grid(40, "karras"))
    errors = immse_log_prob(oracle, x, oracle.schedule.grid(120), draws=8)
    diffusion, _ = ring(linear(300), 1)
    bound = variational_bound(diffusion, x, diffusion.schedule.grid(300, "time"), "optimal").total
    for other in (errors, bound):
        gap = other - flow
        assert abs(gap.mean()) < 0.05 + 4.0 * gap.std() / 200**0.5


def test_estimates_of_a_trained_network_differ_by_what_it_gets_wrong() -> None:
    """In the mean over data, with p the truth, and excess = ½ ∫ E‖x̂_exact − x̂_0‖² dγ, the error of the network:

        all signs as probes   the exact divergence, to rounding
        the bound             tends to the errors of denoising as 1/N
        errors of denoising   E log p − excess, exactly
        flow                  at most E log p, as its density integrates to 1

    Differences have 4.5 standard errors each, 7·10⁻⁶. That the flow is no further from the truth than twice the excess is no
    law, as the flow has terms of first order in the error, but what a network that has learnt does.
    """
    schedule = EDM(0.01, 10.0)
    oracle, data = ring(schedule, 4000)
    torch.manual_seed(1)
    model = ScoreModel(Network(PointNetwork(2, width=32), schedule, "preconditioned", 1.4), (2,), is_scaled=False).double()
    loss = SimpleLoss(EDMError(1.4), LogNormal(-1.0, 1.5))
    Denoising(loss=loss, steps=300, batch_size=256, learning_rate=5e-3, seed=0, progress=False).fit(model, data)
    network, x, size = model.denoiser, data[:400], 2

    def within(difference: Tensor, floor: float = 0.0) -> bool:
        return bool(difference.mean().abs() < 4.5 * difference.std() / math.sqrt(len(difference)) + floor)

    with torch.no_grad():
        grid = schedule.grid(24, "karras")
        flow = flow_log_prob(network, x, grid)
        signs = f64(1.0, 1.0, 1.0, -1.0).reshape(2, 1, 2)
        assert torch.allclose(flow_log_prob(network, x, grid, signs), flow, rtol=0.0, atol=1e-10)
        assert within(flow_log_prob(network, x, grid, rademacher(1, x)) - flow)

        grid = schedule.grid(48, "log_snr")
        noise = torch.randn(49, 6, len(x), size, dtype=torch.float64)
        errors, best = (immse_log_prob(denoiser, x, grid, draws=6, noise=noise) for denoiser in (network, oracle))
        excess = torch.zeros(len(grid), len(x), dtype=torch.float64)
        for i, t in enumerate(grid):
            for draw in noise[i]:
                apart = network(x + t * draw, t).mean - oracle(x + t * draw, t).mean
                excess[i] += apart.square().sum(1) / t.square() / len(noise[i])
        excess = 0.5 * torch.trapezoid(excess, -2.0 * grid.log()[:, None], dim=0)
        assert within(best - errors - excess) and within(best - oracle.log_prob(x), 0.01)
        assert 0.01 < excess.mean() < 0.5
        divergence = oracle.log_prob(x) - flow
        error = 4.5 * divergence.std() / math.sqrt(len(x))
        assert -error < divergence.mean() < 2.0 * excess.mean() + error

        gaps = []
        for steps in (32, 64):
            chain = torch.cat([schedule.grid(steps, "log_snr"), f64(0.0)])
            bound = torch.stack([variational_bound(network, x, chain).total for _ in range(8)]).mean(0)
            gaps.append((errors - bound).mean())
        assert 0.0 < gaps[1] < 0.7 * gaps[0]


def test_bits_are_those_of_the_entropy_for_a_model_that_is_right() -> None:
    """Uniform bins of given mass: the mean bits of the density are the entropy of the masses."""
    masses = np.array([0.5, 0.25, 0.125, 0.125])
    for width in (1.0, 2.0):
        log_density = torch.as_tensor(np.log(masses * 4 / width))
        bits = bits_per_dimension(log_density, 1, levels=4, width=width)
        assert (masses * bits.numpy()).sum() == pytest.approx(stats.entropy(masses, base=2))


# What is refused.

X = torch.zeros(3, 2, dtype=torch.float64)
RING = Oracle.ring(5, VP())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow_log_prob(RING, X, f64(1.0, 0.5, 0.0)), "no density without noise"),
        (lambda: flow_log_prob(RING, X, f64(0.1, 0.5)), "falls from noise to data"),
        (lambda: flow_log_prob(RING, X, f64(0.3, 0.1)), "does not reach its end"),
        (lambda: flow_log_prob(RING, X, f64(1.0, 0.1), probes=X), "probes are"),
        (lambda: probability_flow(RING, X, f64(0.1, 0.5, 0.5)), "falls from noise to data"),
        (lambda: variational_bound(RING, X, f64(1.0, 0.1)), "append 0 to the grid"),
        (lambda: path_bound(RING, X, f64(1.0, 0.1)), "append 0 to the grid"),
        (lambda: variational_bound(RING, X, f64(1.0, 0.1, 0.0), levels=1), "at least 2 levels"),
        (lambda: variational_bound(RING, X + 2.0, f64(1.0, 0.1, 0.0), levels=4), "between −1 and 1"),
        (lambda: variational_bound(RING, X, f64(1.0, 0.1, 0.0), "full", levels=4), "does not go with variance='full'"),
        (lambda: immse_log_prob(RING, X, f64(1.0, 0.0)), "ends without noise"),
        (lambda: immse_log_prob(RING, X, f64(1.0, 0.1), draws=0), "draws is at least 1"),
        (lambda: immse_log_prob(RING, X, f64(1.0, 0.1), noise=X), "noise has the shape"),
        (lambda: bits_per_dimension(f64(1.0), 0), "size is at least 1"),
    ],
)
def test_a_likelihood_says_what_is_wrong(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
