"""Diffusions as distributions in programs: the flow, through its noise, and the score alone, against exact posteriors."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoMultivariateNormal
from pyro.infer.reparam import TransformReparam
from torch import Tensor

from inference import (
    ELBO,
    EM,
    HMC,
    IWELBO,
    NUTS,
    SVI,
    Cycle,
    Gibbs,
    Hamiltonian,
    MetropolisHastings,
    PriorDraw,
    Unsupported,
)
from inference.contract import Surrogate
from pyro_genmodels.diffusion import EDM, VP, FlowPrior, Oracle, ProbabilityFlow, ScorePrior, likelihood, samplers
from pyro_genmodels.diffusion.langevin import ula

SCHEDULE = EDM(0.02, 20.0)
SHORT: dict[str, Any] = {"seed": 0, "progress": False}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def modes() -> Oracle:
    return Oracle(f64(0.3, 0.7), f64(-1.4, -0.7, 0.6, 0.3).reshape(2, 2), f64(0.5, 0.4), SCHEDULE)


def test_the_flow_is_a_distribution() -> None:
    """Its log-density is that of x at the end of the grid, but for N(0, σ_T²) in place of p(x_T), at fourth order; batches,
    expansion and plates keep their shapes."""
    oracle, gaps = modes(), []
    for steps in (20, 40):
        grid = SCHEDULE.grid(steps, "karras")
        prior = FlowPrior(oracle, grid, (2,))
        torch.manual_seed(0)
        x = prior().sample((50,))
        start = ProbabilityFlow(oracle, grid, (2,)).inv(x)
        assumed = samplers.terminal(oracle, grid, x).log_prob(start).sum(-1)
        found = prior().log_prob(x) - assumed + oracle.log_prob(start, grid[0])
        gaps.append((found - oracle.log_prob(x, grid[-1])).abs().max())
    assert gaps[1] < 1e-3 and gaps[0] > 12.0 * gaps[1]
    wide = prior().expand([3])
    assert wide.sample((5,)).shape == (5, 3, 2) and wide.batch_shape == (3,) and wide.event_shape == (2,)
    assert wide.log_prob(wide.sample((5,))).shape == (5, 3)
    with pyro.plate("rows", 4):
        assert pyro.sample("x", prior()).shape == (4, 2)


def test_draws_of_the_flow_are_those_of_the_data() -> None:
    """Share of the first mode and the means of 4000 draws, 4.5 standard errors."""
    torch.manual_seed(1)
    x, oracle = FlowPrior(modes(), SCHEDULE.grid(16, "karras"), (2,))().rsample((4000,)), modes()
    truth = oracle.distribution()
    assert ((x.mean(0) - truth.mean).abs() < 4.5 * truth.stddev / math.sqrt(4000)).all()
    assert ((x.std(0) / truth.stddev - 1.0).abs() < 0.05).all()


def test_the_flow_is_a_bijection_with_its_jacobian() -> None:
    """Inverse to 1e-5 at 64 steps; log-determinant against that of autograd's Jacobian; the same steps as the sampler's."""
    oracle = modes()
    flow = ProbabilityFlow(oracle, SCHEDULE.grid(64, "karras"), (2,))
    torch.manual_seed(2)
    noise = 20.0 * torch.randn(4, 2, dtype=torch.float64)
    x = flow(noise)
    assert torch.equal(x, samplers.rk4(oracle, noise, flow.grid))
    assert (flow(flow.inv(x)) - x).abs().max() < 1e-5
    assert (flow.inv(x) - noise).abs().max() < 1e-5
    jacobian = torch.stack([torch.autograd.functional.jacobian(flow, row) for row in noise])
    assert torch.allclose(flow.log_abs_det_jacobian(noise, x), jacobian.det().abs().log(), atol=1e-3)
    assert flow(noise.reshape(2, 2, 2)).shape == (2, 2, 2)
    frozen = ProbabilityFlow(oracle, flow.grid, (2,), likelihood.rademacher(1, torch.zeros(1, 2, dtype=torch.float64)))
    assert torch.equal(frozen.log_abs_det_jacobian(noise, x), frozen.log_abs_det_jacobian(noise, x))


def seen(y: Tensor, prior: Any) -> None:
    x = pyro.sample("x", prior())
    pyro.sample("y", dist.Normal(x[..., 0] + 0.5 * x[..., 1], 0.7), obs=y)


def exact() -> Oracle:
    return modes().condition(f64(1.0, 0.5)[None], f64(0.0), f64(0.49)[None])


def agrees(draws: Tensor, posterior: Oracle) -> None:
    """Means and the share of the first mode over chains, 4.5 standard errors of the chains' means, and their bias 0.01."""
    torch.manual_seed(3)
    truth = posterior.distribution().sample((200000,))
    pairs = [(draws[..., 0], truth[:, 0]), (draws[..., 1], truth[:, 1]), (draws[..., 0] < -0.4, truth[:, 0] < -0.4)]
    for ours, theirs in pairs:
        chains = ours.double().mean(1)
        assert abs(chains.mean() - theirs.double().mean()) < 4.5 * chains.std() / math.sqrt(len(chains)) + 0.01


def test_hmc_in_the_space_of_noise_agrees_with_the_exact_posterior() -> None:
    prior = FlowPrior(modes(), SCHEDULE.grid(5, "karras"), (2,))
    program = poutine.reparam(seen, config={"x": TransformReparam()})
    start = {"x_base": torch.randn(128, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    found = HMC(chains=128, warmup=20, draws=4, start=start, **SHORT).fit(program, f64(0.0)[0], prior)
    assert set(found.draws) == {"x", "x_base"}
    agrees(found.draws["x"], exact())


@pytest.mark.slow
def test_hmc_in_the_space_of_noise_agrees_at_length() -> None:
    prior = FlowPrior(modes(), SCHEDULE.grid(12, "karras"), (2,))
    program = poutine.reparam(seen, config={"x": TransformReparam()})
    agrees(HMC(chains=128, warmup=60, draws=40, **SHORT).fit(program, f64(0.0)[0], prior).draws["x"], exact())


@pytest.mark.slow
def test_draws_of_the_prior_in_turn_take_hmc_from_mode_to_mode() -> None:
    """Five modes, all chains begun in one of 5 %: weights within five standard errors of the chains' means, 6·10⁻⁷ each, of
    those by importance sampling from the same flow, whose own error is far less."""
    oracle = Oracle.ring(5, SCHEDULE)
    prior = FlowPrior(oracle, SCHEDULE.grid(3, "karras"), (2,))

    def nearest(x: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((x[..., None, :] - oracle.means).norm(dim=-1).argmin(-1), 5).double()

    torch.manual_seed(0)
    x = prior().sample((200_000,))
    exact = dist.Normal(x @ f64(1.0, 0.5), 0.3).log_prob(f64(1.0)).softmax(0) @ nearest(x)
    lightest = (prior.flow.inv(oracle.means[4:]) / prior.scale).expand(64, 2)
    turns = Cycle((Hamiltonian(most_steps=4), PriorDraw()))
    sampler = Gibbs(chains=64, warmup=8, draws=12, blocks={"x_base": turns}, start={"x_base": lightest}, **SHORT)

    def narrow(y: Tensor, prior: Any) -> None:
        pyro.sample("y", dist.Normal(pyro.sample("x", prior()) @ f64(1.0, 0.5), 0.3), obs=y)

    found = sampler.fit(poutine.reparam(narrow, config={"x": TransformReparam()}), f64(1.0)[0], prior)
    chains = nearest(found.draws["x"]).mean(1)
    assert exact[1] > 0.7 and chains[:, 1].std() > 0.0
    assert ((chains.mean(0) - exact).abs() < 5.0 * chains.std(0) / 8.0 + 1e-3).all(), (chains.mean(0), exact)


def test_a_flow_says_what_is_wrong() -> None:
    oracle = modes()
    with pytest.raises(ValueError, match="falls from noise"):
        FlowPrior(oracle, SCHEDULE.grid(4).flip(0), (2,))
    with pytest.raises(ValueError, match="no density without noise"):
        ProbabilityFlow(oracle, torch.cat([SCHEDULE.grid(4), f64(0.0)]), (2,))
    with pytest.raises(ValueError, match="does not reach its end"):
        FlowPrior(oracle, SCHEDULE.grid(4, stop=1.0), (2,))
    with pytest.raises(ValueError, match="of the shape \\(2,\\), but came to one of \\(5, 3\\)"):
        ProbabilityFlow(oracle, SCHEDULE.grid(4), (2,))(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="falls from noise"):
        ScorePrior(oracle, SCHEDULE.grid(4).flip(0), (2,))
    with pytest.raises(ValueError, match="no score"):
        ScorePrior(Oracle.ring(5, VP()), f64(1.0, 0.0), (2,))


# The score alone.


def line() -> tuple[Oracle, ScorePrior]:
    covariance = f64(1.0, 0.6, 0.6, 0.8).reshape(1, 2, 2)
    oracle = Oracle(f64(1.0), f64(0.5, -0.5)[None], covariance, SCHEDULE)
    return oracle, ScorePrior(oracle, SCHEDULE.grid(12, "karras"), (2,))


def test_a_surrogate_has_the_gradient_and_no_value() -> None:
    oracle, prior = line()
    assert isinstance(prior(), Surrogate) and not isinstance(dist.Normal(0.0, 1.0), Surrogate)
    with pytest.raises(Unsupported, match="knows ∇ log p, but not log p.*FlowPrior"):
        prior().log_prob(f64(0.0, 0.0))
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    fake = prior().expand([4]).gradients()
    assert fake.log_prob(x).shape == (3, 4) and fake.sample((3,)).shape == (3, 4, 2)
    (slope,) = torch.autograd.grad(fake.log_prob(x).sum(), x)
    covariance = oracle.covariances[0] + 0.0004 * torch.eye(2, dtype=torch.float64)
    assert torch.allclose(slope, -torch.linalg.solve(covariance, (x - oracle.means[0]).mT.reshape(3, 2, 4)).mT, atol=1e-8)


def test_unadjusted_langevin_takes_a_score() -> None:
    """Means of 3000 chains, 5 standard errors, and the bias of the step."""
    oracle, prior = line()
    torch.manual_seed(4)
    x = ula(prior().score, prior().sample((3000,)), 0.05, 50)
    assert ((x.mean(0) - oracle.means[0]).abs() < 5.0 * x.std(0) / math.sqrt(3000) + 0.01).all()


def test_variational_inference_takes_a_gradient_and_reports_no_value() -> None:
    """Gaussian prior and likelihood, a guide with all covariances: mean and covariance of the exact posterior."""
    oracle, prior = line()
    fit = SVI(steps=400, learning_rate=0.03, guide=AutoMultivariateNormal, draws=4000, **SHORT)
    found = fit.fit(seen, f64(0.0)[0], prior)
    posterior = oracle.condition(f64(1.0, 0.5)[None], f64(0.0), f64(0.49)[None])
    draws = found.draws["x"][0]
    assert (draws.mean(0) - posterior.means[0]).abs().max() < 0.08
    assert (draws.T.cov() - posterior.covariances[0]).abs().max() < 0.1
    assert found.history["loss"].isnan().all() and "lp" not in found.stats


@pytest.mark.parametrize(
    "backend",
    [
        HMC(chains=2, warmup=2, draws=2, **SHORT), NUTS(chains=2, warmup=2, draws=2, **SHORT),
        MetropolisHastings(chains=2, warmup=2, draws=2, **SHORT), Gibbs(chains=2, warmup=2, draws=2, **SHORT),
        EM(steps=2, **SHORT),
    ],
    ids=lambda backend: type(backend).__name__,
)  # fmt: skip
def test_a_kernel_that_uses_its_value_refuses_it(backend: Any) -> None:
    with pytest.raises(Unsupported, match=r"Site 'x' of seen has a score.*no log-density.*SVI\(\).*TransformReparam"):
        backend.fit(seen, f64(0.0)[0], line()[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bound": IWELBO(particles=3)}, "another bound than ELBO"),
        ({"bound": ELBO(), "guide": AutoLaplaceApproximation}, "curvature"),
    ],
)
def test_a_fit_that_uses_more_than_its_gradient_refuses_it(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Unsupported, match=f"Site 'x' of seen has a gradient, but no log-density.*{words}.*AutoNormal"):
        SVI(steps=2, **options, **SHORT).fit(seen, f64(0.0)[0], line()[1])


def test_the_mode_of_a_score_prior_is_found() -> None:
    oracle, prior = line()
    found = SVI(steps=200, learning_rate=0.05, guide=AutoDelta, draws=1, **SHORT).fit(seen, f64(0.0)[0], prior)
    posterior = oracle.condition(f64(1.0, 0.5)[None], f64(0.0), f64(0.49)[None])
    assert (found.draws["x"][0, 0] - posterior.means[0]).abs().max() < 0.02
