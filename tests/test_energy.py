"""Energies: signs, gradients and draws against quadrature; what needs a density refuses them, what does not takes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from inference import (
    EM,
    HMC,
    NUTS,
    SVI,
    ContrastiveDivergence,
    Denoising,
    Gibbs,
    Langevin,
    MetropolisHastings,
    Prior,
    PriorDraw,
    RandomWalk,
    Unadjusted,
    arviz,
)
from inference.annealing import annealed_evidence
from inference.calibration import sbc
from inference.contract import Persistent, Scored, Surrogate, Unnormalised, Unsupported
from inference.evidence import log_evidence
from inference.handlers import isolated
from inference.sampling import ancestral
from inference.score_matching import ImplicitLoss, NoisedLoss, SlicedLoss
from pyro_genmodels import EnergyModel
from pyro_genmodels.diffusion import EDM, EnergyDistribution, Oracle, ScorePrior, score_of

RATE = 1e-6  # of false alarms, in each statistical test
QUIET: dict[str, Any] = {"seed": 0, "progress": False}
f64 = lambda *numbers: torch.tensor(numbers, dtype=torch.float64)  # noqa: E731


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with isolated(3):
        yield


class Quadratic(nn.Module):
    """½ (x − m)ᵀ A Aᵀ (x − m)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(size))
        self.root = nn.Parameter(torch.eye(size))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((x - self.centre) @ self.root).square().sum(-1)


class Quartic(nn.Module):
    """a x + b x² + c x⁴, two wells."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.tensor([0.3, -1.5, 0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.square(), x**4], -1) @ self.factors


def two_wells() -> tuple[EnergyModel, Tensor, Tensor]:
    """The model of ``Quartic``, a grid, and its exact probabilities there."""
    model = EnergyModel((1,), network=Quartic(), spread=None, chains=4000).double()
    grid = torch.linspace(-5.0, 5.0, 4001, dtype=torch.float64)
    return model, grid, (-model.energy(grid[:, None])).softmax(0).detach()


def drawn(grid: Tensor, weights: Tensor, count: int) -> Tensor:
    """Exact draws, but for the width of a cell: (count, 1)."""
    width = grid[1] - grid[0]
    return (grid[weights.multinomial(count, replacement=True)] + width * (torch.rand(count).double() - 0.5))[:, None]


def normal_data(rows: int = 2000) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.7]]) + torch.tensor([3.0, -1.0])
    return x.double(), x.double().mean(0), x.double().T.cov(correction=0)


# ------------------------------------------------------------------------------------------------ learning
def test_a_quadratic_energy_learns_mean_and_covariance() -> None:
    """Score matching of a normal model is maximum likelihood: those of the data, to the last digits."""
    x, mean, covariance = normal_data(200)
    model = EnergyModel((2,), network=Quadratic(2), spread=None).double()
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = ImplicitLoss().rows(model, x).mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    network: Any = model.network
    assert torch.allclose(network.centre, mean, atol=1e-6)
    assert torch.allclose((network.root @ network.root.T).inverse(), covariance, atol=1e-6)


def test_contrastive_divergence_learns_mean_and_covariance() -> None:
    """By 1,000 persistent chains, averaged over the last steps: within 5 standard errors of so many independent draws."""
    x, mean, covariance = normal_data(500)
    model = EnergyModel((2,), network=Quadratic(2), spread=None, chains=1000).double()
    model.prepare(x)
    optimiser, found = torch.optim.Adam(model.parameters(), 0.05), []
    for step in range(240):
        if step == 150:
            optimiser.param_groups[0]["lr"] = 0.01
        optimiser.zero_grad()
        ContrastiveDivergence(5).rows(model, x).mean().backward()
        optimiser.step()
        if step >= 190:
            network: Any = model.network
            there = model.mean + model.deviation * network.centre.detach()
            spread = model.deviation[:, None] * (network.root @ network.root.T).inverse().detach() * model.deviation
            found.append(torch.cat([there, spread.flatten()]))
    found = torch.stack(found).mean(0)
    scale = covariance.diagonal().sqrt() / 1000**0.5
    assert ((found[:2] - mean).abs() < 5.0 * scale).all()
    assert torch.allclose(found[2:].reshape(2, 2), covariance, atol=5.0 * 2**0.5 * covariance.max().item() / 1000**0.5)


def test_the_gradient_of_contrastive_divergence_is_that_of_the_likelihood() -> None:
    """Chains that begin in draws of the model stay such: t-tests against quadrature, 1e-6 false alarms."""
    model, grid, weights = two_wells()
    features = torch.stack([grid, grid.square(), grid**4])
    x = f64(-1.0, 0.2, 2.0)[:, None]
    exact = torch.cat([x, x.square(), x**4], 1).mean(0) - features @ weights
    found = []
    for _ in range(20):
        model.particles.copy_(drawn(grid, weights, 4000))
        loss = ContrastiveDivergence(4).rows(model, x).mean()
        found.append(torch.autograd.grad(loss, [*model.parameters()])[0])
    gradients = torch.stack(found)
    t = (gradients.mean(0) - exact) / (gradients.std(0) / 20**0.5)
    assert t.abs().max() < scipy.stats.t.isf(RATE / 6, 19)
    assert 0.3 < (model.log_step.exp() / 0.3).item() < 10.0 and model.log_step != math.log(0.3)


def test_chains_that_begin_at_the_data_do_not_see_far_wells() -> None:
    """What CD-1 is known for: with all data in one well, its gradient hardly speaks of the other."""
    model, grid, weights = two_wells()
    x = drawn(grid, weights * (grid > 0.3), 4000)
    model.particles.copy_(drawn(grid, weights, 4000))
    short = torch.autograd.grad(ContrastiveDivergence(1, is_persistent=False).rows(model, x).mean(), [*model.parameters()])
    kept = model.particles.clone()
    long = torch.autograd.grad(ContrastiveDivergence(1).rows(model, x).mean(), [*model.parameters()])
    assert abs(short[0][0]) < 0.2 * abs(long[0][0])
    assert not torch.equal(kept, model.particles)


LOSSES = [SlicedLoss(), NoisedLoss(0.2), ContrastiveDivergence(5)]


def ring(rows: int = 1000) -> Tensor:
    angle = torch.rand(rows) * 2 * math.pi
    return torch.stack([angle.cos(), angle.sin()], -1) + 0.1 * torch.randn(rows, 2)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_the_energy_is_low_on_data(loss: Any) -> None:
    """The sign: of nearly all rows below that of points around them, after a short training on a ring."""
    x, model = ring(), EnergyModel((2,), hidden=(32, 32))
    Denoising(loss=loss, steps=150, learning_rate=5e-3, batch_size=256, **QUIET).fit(model, x)
    with torch.no_grad():
        on, inside, outside = model.energy(x), model.energy(0.2 * x), model.energy(2.0 * x)
    assert (on < inside).double().mean() > 0.9 and (on < outside).double().mean() > 0.9


def test_a_run_that_was_stopped_goes_on_with_its_chains(tmp_path: Path) -> None:
    """Bit for bit: the chains and the size of their moves are in the checkpoint."""

    def stop(step: int, info: Any) -> None:
        if step == 25:
            raise ZeroDivisionError

    x, models = ring(100), [EnergyModel((2,), hidden=(8,), chains=20) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    fit = Denoising(loss=ContrastiveDivergence(2), steps=40, batch_size=20, **QUIET)
    fit.fit(models[0], x)
    stopped = dataclasses.replace(fit, checkpoint=tmp_path, checkpoint_every=10, callbacks=(stop,))
    with pytest.raises(ZeroDivisionError):
        stopped.fit(models[1], x)
    fit.resume(tmp_path, models[2], x)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[2].state_dict()[name]), name
    assert not torch.equal(models[0].particles, models[1].particles)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_numbers_that_are_none_stop_the_training(loss: Any) -> None:
    model = EnergyModel((2,), hidden=(8,))
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match=r"not finite at the start; the first layer that gives NaN .*layers\.0"):
        Denoising(loss=loss, steps=5, **QUIET).fit(model, ring(50))


# --------------------------------------------------------------------------------------------------- draws
def test_draws_have_the_density_but_for_its_constant() -> None:
    """A lone well: counts in 12 cells of equal mass; chi-squared, 1e-6 false alarms. Differences of log_prob are exact."""
    model, grid, _ = two_wells()
    with torch.no_grad():
        model.network.factors.copy_(f64(0.5, 0.5, 0.2))  # type: ignore[union-attr]
    weights = (-model.energy(grid[:, None])).softmax(0).detach()
    x = model().sample((6000,))[:, 0]
    edges = grid[torch.searchsorted(weights.cumsum(0), torch.arange(1, 12).double() / 12)]
    counts = torch.bincount(torch.bucketize(x.contiguous(), edges), minlength=12)
    assert ((counts - 500) ** 2 / 500).sum().item() < scipy.stats.chi2.isf(RATE, 11)
    log_p = model().log_prob(grid[:, None])
    assert torch.allclose(log_p - log_p[0], weights.log() - weights[0].log(), atol=1e-8)


def test_a_network_that_says_nothing_leaves_the_wide_normal() -> None:
    """Of the mean of data and noise, and of w times their deviation; a number that hardly varies has a tenth of all."""
    x = torch.randn(500, 3).double() * f64(1.0, 4.0, 1e-6) + f64(5.0, 0.0, 2.0)
    model = EnergyModel((3,), spread=1.5, noise=0.5, hidden=(4,)).double()
    for weight in model.parameters():
        nn.init.zeros_(weight)
    model.prepare(x)
    deviation = 1.5 * (x.var(0, correction=0) + 0.25).sqrt()
    log_p = dist.Normal(x.mean(0), deviation).to_event(1).log_prob(x)
    found = model().log_prob(x)
    assert torch.allclose(found - found[0], log_p - log_p[0], atol=1e-9)
    still = EnergyModel((2,), hidden=(4,))
    still.prepare(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert torch.allclose(still.deviation, torch.tensor([0.1 * 0.5**0.5, 1.0]))


@pytest.mark.parametrize(
    "backend",
    [
        HMC(chains=50, draws=60, warmup=100, **QUIET),
        Gibbs(chains=50, draws=60, warmup=100, **QUIET),
        MetropolisHastings(chains=50, draws=100, warmup=200, thin=3, **QUIET),
        MetropolisHastings(proposal=Langevin(), chains=50, draws=60, warmup=100, thin=3, **QUIET),
    ],
    ids=["HMC", "Gibbs", "RandomWalk", "Langevin"],
)
def test_an_energy_is_a_prior_for_markov_chains(backend: Any) -> None:
    """Posterior mean and spread given y = x + n against quadrature, within 5 standard errors by the effective size."""
    model, grid, weights = two_wells()

    def program(y: Tensor) -> None:
        x = pyro.sample("x", model())
        pyro.sample("y", dist.Normal(x[..., 0], 1.0), obs=y)

    y = f64(0.6)[0]
    posterior = dataclasses.replace(backend, start={"x": torch.randn(50, 1)}).fit(program, y)
    exact = (weights.log() - 0.5 * (grid - y).square()).softmax(0)
    for power in (1, 2):
        draws = posterior.draws["x"][..., 0].numpy() ** power
        error = draws.std() / float(arviz.ess(draws, "mean")) ** 0.5
        assert abs(draws.mean() - float((grid**power) @ exact)) < 5.0 * error


def test_the_whole_model_is_a_program() -> None:
    model = EnergyModel((2,), hidden=(8,))
    posterior = HMC(chains=2, draws=10, warmup=10, **QUIET).fit(model, None, size=3)
    assert posterior.draws["x"].shape == (2, 10, 3, 2)
    assert model.sample(4).shape == (4, 2)
    conditional = EnergyModel((2,), context=3, hidden=(8,))
    assert conditional.sample(context=torch.zeros(5, 3)).shape == (5, 2)
    assert conditional(torch.zeros(5, 3)).log_prob(torch.zeros(7, 5, 2)).shape == (7, 5)


# ------------------------------------------------------------------------------------------ what is refused
class Scores(TorchDistribution):
    """A score −A x, and nothing else."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012
    support = constraints.real_vector

    def __init__(self, matrix: Tensor, is_surrogate: bool = False) -> None:
        self.matrix, self.is_surrogate = matrix, is_surrogate
        super().__init__(torch.Size(()), torch.Size((len(matrix),)), validate_args=False)

    def score(self, value: Tensor) -> Tensor:
        return -value @ self.matrix.T

    def gradients(self) -> Scores:
        return Scores(self.matrix, True)

    def log_prob(self, value: Tensor) -> Tensor:
        assert self.is_surrogate, "nobody may ask for it"
        return (self.score(value).detach() * value).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randn(*sample_shape, len(self.matrix)).to(self.matrix)


def with_surrogate() -> None:
    pyro.sample("x", Scores(torch.eye(2, dtype=torch.float64)))


def with_surrogate_of_hidden() -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    pyro.sample("x", Scores(torch.eye(2, dtype=torch.float64) / scale))


def with_energy(y: Tensor) -> None:
    x = pyro.sample("x", EnergyDistribution(lambda x: x.square().sum(-1), lambda lead: torch.randn(*lead, 2), (2,)))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


def with_energy_of_hidden(y: Tensor) -> None:
    scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
    x = pyro.sample("x", EnergyDistribution(lambda x: (x / scale).square().sum(-1), lambda n: torch.randn(*n, 2), (2,)))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)


def observed_energy(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        pyro.sample("x", EnergyDistribution(lambda x: (x / scale) ** 2, lambda lead: torch.randn(*lead), ()), obs=x)


def beside_energy(x: Tensor) -> None:
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(shift, 1.0), obs=x[0])
    with pyro.plate("rows", len(x)):
        pyro.sample("x", EnergyDistribution(lambda x: x**2, lambda lead: torch.randn(*lead), ()), obs=x)


def choosing(y: Tensor) -> None:
    x = pyro.sample("x", Scores(torch.eye(2, dtype=torch.float64)))
    which = pyro.sample("which", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(x[..., 0] + which, 1.0), obs=y)


Y = torch.tensor(0.5)
ROWS = torch.tensor([0.5, -0.3, 1.0])
VALUES = r"Site 'x' of with_surrogate has a score, ∇ log p, but no log-density"
CONSTANT = "lacks a constant that nobody knows, but {} needs a density"
WALK: dict[str, Any] = {"chains": 2, "draws": 5, "warmup": 5, **QUIET}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HMC(**WALK).fit(with_surrogate), VALUES),
        (lambda: NUTS(**WALK).fit(with_surrogate), VALUES),
        (lambda: Gibbs(**WALK).fit(with_surrogate), VALUES),
        (lambda: MetropolisHastings(proposal=RandomWalk(), **WALK).fit(with_surrogate), VALUES),
        (lambda: MetropolisHastings(proposal=Langevin(), **WALK).fit(with_surrogate), VALUES),
        (lambda: MetropolisHastings(proposal=Prior(), **WALK).fit(with_surrogate), VALUES),
        (lambda: EM(steps=2, **QUIET).fit(with_surrogate), VALUES),
        (
            lambda: MetropolisHastings(proposal=Unadjusted(0.1), **WALK).fit(choosing, Y),
            "'which' would have to be summed out",
        ),
        (lambda: SVI(steps=2, **QUIET).fit(with_energy, Y), CONSTANT.format("SVI")),
        (lambda: EM(steps=2, **QUIET).fit(with_energy, Y), CONSTANT.format("EM")),
        (lambda: SVI(steps=2, **QUIET).fit(EnergyModel((2,), hidden=(4,)), torch.randn(5, 2)), CONSTANT.format("SVI")),
        (lambda: log_evidence(observed_energy, ROWS), CONSTANT.format("log_evidence")),
        (lambda: annealed_evidence(observed_energy, ROWS), CONSTANT.format("annealed_evidence")),
        (lambda: HMC(**WALK).fit(with_energy_of_hidden, Y), "they depend on 'scale', which is hidden"),
        (lambda: HMC(**WALK).fit(observed_energy, ROWS), "they depend on 'scale', which is hidden"),
        (
            lambda: MetropolisHastings(proposal=Unadjusted(0.1), **WALK).fit(with_surrogate_of_hidden),
            "they depend on 'scale', which is hidden",
        ),
        (lambda: MetropolisHastings(proposal=Prior(), **WALK).fit(with_energy, Y), "'x' is known without its constant"),
        (lambda: Gibbs(blocks={"x": PriorDraw()}, **WALK).fit(with_energy, Y), "which is known without its constant"),
        (lambda: ancestral(with_energy, 3, Y), "a prior that is known without its constant"),
        (lambda: sbc(with_energy, HMC(**WALK), Y, replicates=20), "known without its constant, from which nothing can be"),
        (lambda: HMC(**WALK).fit(beside_energy, ROWS).log_likelihood(), "it has no log-likelihood"),
        (lambda: EnergyModel((2,), hidden=(4,))().rsample((3,)), r"has no rsample.* Take sample\(\)"),
    ],
)
def test_what_needs_more_of_a_density_refuses_it(call: Callable[[], object], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        call()


def test_they_say_what_they_are() -> None:
    energy, scores = EnergyModel((2,), hidden=(4,)), Scores(torch.eye(2))
    assert isinstance(energy(), Unnormalised) and isinstance(energy, Persistent)
    assert isinstance(scores, Surrogate) and isinstance(scores, Scored)
    assert not isinstance(dist.Normal(0.0, 1.0), (Unnormalised, Surrogate, Scored, Persistent))


@pytest.mark.parametrize("share", [0.4, 1.5])
def test_unadjusted_moves_settle_at_their_closed_form(share: float) -> None:
    """On a surrogate of N(0, v), v/(1 − δ/(4v)): the variance of 4,000 chains, chi-squared at 1e-6 false alarms.

    So it does on a plain program, whose unconstrained coordinates are its own.
    """
    v = 0.25
    step, chains = share * v, 4000
    how: Any = {"chains": chains, "warmup": 60, "draws": 1, "start": {"x": f64(0.0, 0.0)}, **QUIET}

    def plain() -> None:
        pyro.sample("x", dist.Normal(f64(0.0, 0.0), v**0.5).to_event(1))

    def surrogate() -> None:
        pyro.sample("x", Scores(torch.eye(2, dtype=torch.float64) / v))

    low, high = scipy.stats.chi2.interval(1.0 - RATE, 2 * chains)
    expected = v / (1.0 - step / (4.0 * v))
    for program in (plain, surrogate):
        posterior = MetropolisHastings(proposal=Unadjusted(step), **how).fit(program)
        assert ("lp" in posterior.stats) == (program is plain)  # the values of a surrogate mean nothing
        squares = float(posterior.draws["x"].square().sum()) / expected
        assert low < squares < high
        assert not low < squares * expected / v < high  # that it is not v can be seen
        assert "biased by the size of its step" in str(posterior.plan)
        assert any("Every move was taken" in finding for finding in posterior.diagnose())


def test_unadjusted_moves_take_a_score_prior_in_a_program() -> None:
    """A normal prior by its score alone, seen through noise: the exact mean, and the variance of the closed form.

    4,000 chains; 1e-6 false alarms each.
    """
    v, tau, chains = 0.49, 0.8, 4000
    schedule = EDM(0.1, 10.0)
    prior = ScorePrior(Oracle(f64(1.0), f64(1.0)[:, None], v**0.5, schedule), schedule.grid(8, "karras"), (1,))

    def program(y: Tensor) -> None:
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(x[..., 0], tau), obs=y)

    variance = 1.0 / (1.0 / (v + 0.1**2) + 1.0 / tau**2)
    mean, step = variance * (1.0 / (v + 0.1**2) + 2.0 / tau**2), 0.8 * variance
    how: Any = {"chains": chains, "warmup": 50, "draws": 1, "start": {"x": f64(0.0)}, **QUIET}
    x = MetropolisHastings(proposal=Unadjusted(step), **how).fit(program, f64(2.0)[0]).draws["x"].flatten()
    settled = variance / (1.0 - step / (4.0 * variance))
    assert abs(x.mean() - mean) < scipy.stats.norm.isf(RATE / 2) * (settled / chains) ** 0.5
    low, high = scipy.stats.chi2.interval(1.0 - RATE, chains)
    assert low < float((x - mean).square().sum()) / settled < high


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Unadjusted(0.0), ValueError, "step=0.0"),
        (lambda: Unadjusted(math.nan), ValueError, "positive and finite"),
        (lambda: ContrastiveDivergence(0), ValueError, "moves is 0"),
        (lambda: ContrastiveDivergence(target=1.0), ValueError, "between 0 and 1"),
        (lambda: ContrastiveDivergence().rows(lambda c: None, torch.ones(3, 2)), Unsupported, "a module keeps"),
        (
            lambda: ContrastiveDivergence().rows(EnergyModel((2,), context=1), torch.ones(3, 2), torch.ones(3, 1)),
            Unsupported,
            "is_persistent=False",
        ),
        (lambda: EnergyModel((2,), spread=0.0), ValueError, "spread is 0.0"),
        (lambda: EnergyModel((2,), chains=0), ValueError, "chains at least 1"),
        (lambda: EnergyModel((2,)).prepare(torch.ones(3, 4)), ValueError, "built for"),
        (lambda: EnergyModel((2,)).prepare(torch.ones(3, 2).long()), ValueError, r"int64\. Pass x\.float"),
        (lambda: EnergyModel((2,)).prepare(torch.full((3, 2), math.nan)), ValueError, "NaN or infinite"),
        (lambda: EnergyModel((2,), network=nn.Linear(2, 2))().log_prob(torch.ones(3, 2)), ValueError, "one number a row"),
        (lambda: EnergyModel((2,))(torch.ones(3, 1)), ValueError, "Leave it out"),
        (lambda: EnergyModel((2,), context=2)(), ValueError, "Give context="),
        (lambda: EnergyModel((2,), context=2)(torch.ones(3)), ValueError, r"\(batch, 2\)"),
        (lambda: EnergyModel((2,), context=2)(torch.ones(3, 2).long()), ValueError, "one_hot"),
        (lambda: EnergyModel((2,))().log_prob(torch.ones(3, 4)), ValueError, r"ends in the shape of a row, \(2,\)"),
        (lambda: score_of(EnergyModel((2,))()), TypeError, "the distribution itself"),
        (lambda: EnergyModel((2,), noise=-1.0), ValueError, "noise is -1.0"),
        (lambda: EnergyModel((2,)).model(), ValueError, "number of rows to draw"),
        (lambda: EnergyDistribution(lambda x: x, lambda n: torch.zeros(n), (), moves=0), ValueError, "moves is 0"),
        (lambda: EnergyDistribution(lambda x: x, lambda n: torch.zeros(n), (), step=-1.0), ValueError, "step is -1.0"),
        (
            lambda: EnergyDistribution(lambda x: x.sum(-1) * math.nan, lambda n: torch.ones(*n, 2), (2,)).sample((3,)),
            ValueError,
            "NaN or infinite at 3 of 3",
        ),
    ],
)
def test_what_is_wrong_is_said(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_unadjusted_moves_stop_at_numbers_that_are_none() -> None:
    """A step too large for the density, and a network whose score is NaN somewhere."""

    def steep() -> None:
        pyro.sample("x", dist.Normal(f64(0.0)[0], 0.01))

    def torn() -> None:
        x = pyro.sample("x", dist.Normal(f64(0.0)[0], 1.0))
        pyro.factor("tear", torch.where(x > 1.0, math.nan, 0.0) * x)

    with pytest.raises(ValueError, match="Take a step below 1"):
        MetropolisHastings(proposal=Unadjusted(1.0), chains=2, draws=200, warmup=0, **QUIET).fit(steep)
    with pytest.raises(ValueError, match="NaN or infinite"):
        MetropolisHastings(proposal=Unadjusted(0.1), chains=8, draws=200, warmup=0, **QUIET).fit(torn)
