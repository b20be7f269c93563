"""Gaussian chains: a block tridiagonal precision is factored, solved and drawn as the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import EM, Gibbs, Unsupported
from inference.blocks import Current, GaussianChain
from inference.chains import Chain, Tridiagonal
from inference.conditionals import Points
from inference.density import Density
from inference.handlers import reproducible
from inference.program import Program
from inference.sites import loops

STEPS, PHI, STEP, NOISE = 40, 0.9, 0.5, 0.7


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with reproducible(torch.float64):
        yield


# ------------------------------------------------------------------------------------------------------- linear algebra
def band(time: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A dense precision for each of two chains, (chain, D, D), its blocks on the diagonal and those below it."""
    generator = torch.Generator().manual_seed(time * 10 + width)
    size = time * width
    block = torch.arange(size) // width
    near = (block[:, None] - block[None, :]).abs() <= 1
    root = 0.5 * torch.randn(2, size, size, generator=generator, dtype=torch.float64).tril() * near + 2.0 * torch.eye(size)
    dense = root @ root.mT
    parts = dense.reshape(2, time, width, time, width)
    diagonal = torch.stack([parts[:, t, :, t] for t in range(time)], 1)
    lower = [parts[:, t + 1, :, t] for t in range(time - 1)]
    below = torch.stack(lower, 1) if lower else torch.zeros(2, 0, width, width, dtype=torch.float64)
    return dense.to(device), diagonal.to(device), below.to(device)


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("time", [1, 2, 3, 4, 5, 8, 17])
def test_a_tridiagonal_precision_is_the_dense_one(time: int, width: int, device: torch.device) -> None:
    dense, diagonal, lower = band(time, width, device)
    chain = Tridiagonal(diagonal, lower)
    right = torch.randn(2, time, width, dtype=torch.float64, device=device)
    assert bool(chain.is_positive.all())
    torch.testing.assert_close(chain.log_determinant, torch.logdet(dense))
    torch.testing.assert_close(chain.solve(right).flatten(1), torch.linalg.solve(dense, right.flatten(1)))
    torch.testing.assert_close(chain.times(right).flatten(1), (dense @ right.flatten(1).unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("time", [1, 2, 5, 16])
def test_few_points_have_the_covariances_of_neighbours(time: int, width: int, device: torch.device) -> None:
    dense, diagonal, lower = band(time, width, device)
    points = Tridiagonal(diagonal, lower).points().flatten(1, 2)
    assert points.shape[-1] == 3 * width
    block = torch.arange(time * width, device=device) // width
    near = (block[:, None] - block[None, :]).abs() <= 1
    torch.testing.assert_close((points @ points.mT)[:, near], torch.linalg.inv(dense)[:, near])


def test_draws_have_the_covariance(device: torch.device) -> None:
    """Each entry of a covariance of 6 elements within 4.5 standard errors: a false alarm in 7,000 runs."""
    dense, diagonal, lower = band(6, 1, device)
    torch.manual_seed(0)
    count = 20_000
    many = Tridiagonal(diagonal[:1].expand(count, -1, -1, -1), lower[:1].expand(count, -1, -1, -1))
    draws = many.sample().flatten(1)
    expected = torch.linalg.inv(dense[0])
    error = ((expected.square() + expected.diagonal()[:, None] * expected.diagonal()) / count).sqrt()
    assert bool(((draws.T @ draws / count - expected).abs() < 4.5 * error).all())


def test_what_is_not_positive_is_told(device: torch.device) -> None:
    _, diagonal, lower = band(7, 2, device)
    diagonal[1, 3] *= -1.0
    assert Tridiagonal(diagonal, lower).is_positive.tolist() == [True, False]


@pytest.mark.parametrize(("size", "width"), [(7, 1), (8, 2), (7, 3), (2, 4)])
def test_a_chain_is_read_off_a_few_gradients(size: int, width: int, device: torch.device) -> None:
    """Also where the last block is not full."""
    dense, _, _ = band(-(-size // width), width, device)
    dense = dense[:, :size, :size]
    mean = torch.randn(2, size, dtype=torch.float64, device=device)
    family = Chain(torch.Size([size]), width)
    at = family.at(Points(torch.randn_like(mean), 0.5 + torch.rand_like(mean)))
    assert len(at) == 3 * width + 1
    conditional = family.solve(at, (dense @ (mean - at).unsqueeze(-1)).squeeze(-1))
    value = torch.randn_like(mean)
    expected = dist.MultivariateNormal(mean, precision_matrix=dense).log_prob(value)
    torch.testing.assert_close(conditional.mode(), mean)
    torch.testing.assert_close(conditional.log_prob(value), expected)
    assert conditional.sample().shape == value.shape


# -------------------------------------------------------------------------------------------------------------- programs
def walk(y: Tensor) -> None:
    """x_t ~ N(φ x_{t−1}, 0.5²),  y_t ~ N(x_t, 0.7²)"""
    phi = pyro.sample("phi", dist.Normal(PHI, 1e-3))
    x: Any = 0.0
    for t in range(len(y)):
        x = pyro.sample(f"x{t}", dist.Normal(phi * x, STEP))
        pyro.sample(f"y{t}", dist.Normal(x, NOISE), obs=y[t])


def second_order(y: Tensor) -> None:
    level = pyro.sample("level", dist.HalfNormal(1.0))
    a: Any = 0.0
    b: Any = 0.0
    for t in range(len(y)):
        a, b = pyro.sample(f"x_{t}", dist.Normal(1.2 * a - 0.4 * b, level)), a
        pyro.sample(f"y_{t}", dist.Normal(a, NOISE), obs=y[t])


def vectors(y: Tensor) -> None:
    level = pyro.sample("level", dist.HalfNormal(1.0))
    turn = torch.tensor([[0.8, 0.3], [-0.3, 0.8]]).to(y)
    x = torch.zeros(2).to(y)
    for t in range(len(y)):
        x = pyro.sample(f"x{t}", dist.MultivariateNormal(turn @ x, level * torch.eye(2).to(y)))
        pyro.sample(f"y{t}", dist.Normal(x.sum(), NOISE), obs=y[t])


def volatility(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    h: Any = 0.0
    for t in range(len(y)):
        h = pyro.sample(f"h{t}", dist.Normal(0.9 * h, scale))
        pyro.sample(f"y{t}", dist.Normal(0.0, (0.5 * h).exp()), obs=y[t])


def data(steps: int = STEPS) -> Tensor:
    return torch.randn(steps, generator=torch.Generator().manual_seed(1), dtype=torch.float64).cumsum(0) * 0.3


def smoothed(y: Tensor, phi: float = PHI) -> tuple[Tensor, Tensor, float]:
    """Means and covariance of the states, and log p(y | φ), by dense linear algebra."""
    count = len(y)
    shift = torch.eye(count, dtype=y.dtype) - phi * torch.diag(torch.ones(count - 1, dtype=y.dtype), -1)
    prior = torch.linalg.inv(shift.T @ shift / STEP**2)
    covariance = torch.linalg.inv(shift.T @ shift / STEP**2 + torch.eye(count, dtype=y.dtype) / NOISE**2)
    evidence = dist.MultivariateNormal(torch.zeros_like(y), prior + NOISE**2 * torch.eye(count, dtype=y.dtype)).log_prob(y)
    return covariance @ y / NOISE**2, covariance, float(evidence)


def bound(
    program: Callable[[Tensor], None], sites: list[str], device: torch.device
) -> tuple[GaussianChain, Density, Current]:
    known = Program(program, (data().to(device),))
    density = Density(known, rung="vmapped")
    torch.manual_seed(0)
    draws = [known.sample_prior() for _ in range(4)]
    values = {name: torch.stack([draw[name] for draw in draws]) for name in known.latents}
    current = Current(values, density.joint(values))
    return GaussianChain().bind(sites, density, current), density, current


@pytest.mark.parametrize(("program", "name", "lags"), [(walk, "x{}", 1), (second_order, "x_{}", 2), (vectors, "x{}", 1)])
def test_states_are_drawn_exactly(program: Callable[[Tensor], None], name: str, lags: int, device: torch.device) -> None:
    block, density, current = bound(program, [name.format(t) for t in range(STEPS)], device)
    _, _, move = block.step(block.init(density, current), density, current, 0)
    assert block.lags == lags and move.log_ratio is not None and float(move.log_ratio.abs().max()) < 1e-8


def test_draws_are_those_of_a_smoother(device: torch.device) -> None:
    """Means and variances of 40 states within 5 standard errors of 2,000 draws: a false alarm in 20,000 runs."""
    y = data()
    posterior = Gibbs(chains=40, warmup=20, draws=50, seed=0, progress=False).fit(walk, y.to(device))
    assert posterior.plan is not None and posterior.plan["x0"].update == "Gaussian chain"
    assert posterior.plan["x0"].certificate <= 1e-8 and len(posterior.plan["x0"].sites) == STEPS
    draws = torch.stack([posterior.draws[f"x{t}"].flatten() for t in range(STEPS)]).cpu()
    mean, covariance, _ = smoothed(y)
    error = (covariance.diagonal() / draws.shape[1]).sqrt()
    assert bool(((draws.mean(1) - mean).abs() < 5 * error).all())
    ratio = draws.var(1) / covariance.diagonal()
    assert bool(((ratio - 1).abs() < 5 * math.sqrt(2 / draws.shape[1])).all())


def test_em_averages_over_states_exactly(device: torch.device) -> None:
    """Its objective is the exact log-evidence, and where it ends the slope of that is nothing."""
    y = data()
    posterior = EM(seed=0, progress=False, objective="mle", tolerance=1e-10).fit(walk, y.to(device))
    assert posterior.plan is not None and posterior.plan["x0"].note == "averaged"
    phi = float(posterior.draws["phi"])
    assert float(posterior.stats["lp"]) == pytest.approx(smoothed(y, phi)[2], abs=1e-7)
    around = [smoothed(y, phi + step)[2] for step in (-1e-4, 0.0, 1e-4)]
    assert abs(around[2] - around[0]) / 2e-4 < 1e-4 and around[1] > max(around[0], around[2])


def test_what_is_no_gaussian_chain_is_refused(device: torch.device) -> None:
    with pytest.raises(Unsupported, match="is not Gaussian, or couples sites"):
        bound(volatility, [f"h{t}" for t in range(STEPS)], device)
    with pytest.raises(Unsupported, match="several sites of one shape"):
        bound(walk, ["phi"], device)
    with pytest.raises(Unsupported, match="whole real line"):
        bound(second_order, ["level"], device)


def test_loops_are_told_by_their_names() -> None:
    names = ["a", *[f"x{t}" for t in range(20)], *[f"y_{t}_1" for t in range(18)], "z1", "z2"]
    assert loops(names, 16) == [names[1:21], names[21:39]]


# ------------------------------------------------------------------------------------------------------------ other loops
def proportions(y: Tensor) -> None:
    """θ_t ~ Beta(a, 3),  y_t ~ Binomial(20, θ_t)"""
    a = pyro.sample("a", dist.Gamma(20.0, 10.0))
    for t in range(len(y)):
        theta = pyro.sample(f"theta{t}", dist.Beta(a, 3.0))
        pyro.sample(f"y{t}", dist.Binomial(20, theta), obs=y[t])


def test_a_loop_of_conjugate_sites_is_drawn_at_once(device: torch.device) -> None:
    """Each mean within 4.5 standard errors of (a + y) / (a + 23), averaged over a: a false alarm in 4,000 runs of 32."""
    y = (torch.arange(32, dtype=torch.float64, device=device) * 7 % 20).round()
    posterior = Gibbs(chains=20, warmup=20, draws=100, seed=0, progress=False).fit(proportions, y)
    assert posterior.plan is not None
    update = posterior.plan["theta0"]
    assert update.update == "Beta" and len(update.sites) == 32 and update.certificate <= 1e-8
    a = posterior.draws["a"]
    for t in range(32):
        theta = posterior.draws[f"theta{t}"]
        conditional = (a + y[t].cpu()) / (a + 23.0)
        error = ((conditional * (1 - conditional) / (a + 24.0)).mean() / theta.numel()).sqrt()
        assert abs((theta - conditional).mean()) < 4.5 * error  # each draw around its own conditional mean


def test_a_loop_without_an_exact_draw_is_not_tried_site_by_site(device: torch.device) -> None:
    posterior = Gibbs(chains=2, warmup=2, draws=2, seed=0, progress=False).fit(rates, data(20).abs().to(device))
    assert posterior.plan is not None
    assert posterior.plan["rate0"].update == "HMC" and len(posterior.plan["rate0"].sites) == 21


def rates(y: Tensor) -> None:
    level = pyro.sample("level", dist.HalfNormal(1.0))
    for t in range(len(y)):
        rate = pyro.sample(f"rate{t}", dist.HalfCauchy(level))
        pyro.sample(f"y{t}", dist.Exponential(1.0 + rate), obs=y[t])
