"""Guides without a density: the bound that a critic tells, held to closed forms, and what is trained by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import SVI, AdversarialVI, Independence, MetropolisHastings, Unsupported
from inference.handlers import isolated
from inference.program import Program
from pyro_genmodels.implicit import Critic, Generator, ImplicitDistribution

DOUBLE = {"dtype": torch.float64}
A = torch.tensor([[1.0, 0.4], [-0.3, 0.6]], **DOUBLE)  # type: ignore[arg-type]
B = torch.tensor([0.5, -1.0], **DOUBLE)  # type: ignore[arg-type]
EYE, ZERO = torch.eye(2, **DOUBLE), torch.zeros(2, **DOUBLE)  # type: ignore[arg-type]
H = torch.tensor([[1.0, 0.5], [0.0, 1.0], [1.0, -1.0]], **DOUBLE)  # type: ignore[arg-type]
Y = torch.tensor([1.0, 0.5, -0.2], **DOUBLE)  # type: ignore[arg-type]


class Line(nn.Module):
    """x = A ε + b."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, noise: Tensor) -> Tensor:
        return noise @ self.a.T + self.b


class Implicit(nn.Module):
    """z is A ε + b, and its density nobody knows."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.generator = Generator((2,), 2, network=Line(a, b)).double()

    def forward(self, *_: Any) -> None:
        pyro.sample("z", self.generator())


class Auxiliary(Implicit):
    """The same, written with noise of its own."""

    def forward(self, *_: Any) -> None:
        noise = pyro.sample("noise", dist.Normal(ZERO, 1.0).to_event(1), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(self.generator.network(noise), event_dim=1))


class Quadratic(nn.Module):
    """A critic that is a polynomial of degree 2 in the position, and of degree 1 in products with what is beside it."""

    def __init__(self, size: int, beside: int = 0) -> None:
        super().__init__()
        self.size = size
        self.pairs = torch.triu_indices(size + beside, size + beside)
        self.head = nn.Linear(size + beside + self.pairs.shape[1], 1).double()
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, *given: Tensor) -> Tensor:
        u = torch.cat([part.reshape(len(part), -1) for part in given], -1)
        scores: Tensor = self.head(torch.cat([u, u[:, self.pairs[0]] * u[:, self.pairs[1]]], -1))
        return scores


def play(critic: nn.Module, **settings: Any) -> AdversarialVI:
    return AdversarialVI(critic=critic, **{"seed": 0, "progress": False} | settings)


PRIOR = dist.MultivariateNormal(
    torch.tensor([0.2, 0.1], dtype=torch.float64), torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
)


def prior() -> None:
    pyro.sample("z", PRIOR)


def regression() -> None:
    z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
    pyro.sample("y", dist.Normal(H @ z, 0.5).to_event(1), obs=Y)


@pytest.mark.parametrize("make", [Implicit, Auxiliary])
def test_the_bound_without_data_is_the_divergence_of_guide_and_prior(make: Any) -> None:
    """E_q[log p(z) − log q(z)] = −KL(N(b, A Aᵀ) ‖ prior), log q by the critic's word."""
    settings = {"learning_rate": None, "critic_learning_rate": 0.02, "average": 0.99, "steps": 400, "draws": 2000}
    posterior = play(Quadratic(2), guide=make(A, B), **settings).fit(prior)
    weight = posterior.stats["lp"] - posterior.stats["log_q"]
    exact = -float(torch.distributions.kl_divergence(dist.MultivariateNormal(B, A @ A.T), PRIOR))
    # three standard errors: false alarm 3e-3, of a seed that is fixed
    assert float(weight.mean()) == pytest.approx(exact, abs=3 * float(weight.std()) / 2000**0.5)
    truth = dist.MultivariateNormal(B, A @ A.T).log_prob(posterior.draws["z"])
    assert float((posterior.stats["log_q"] - truth).square().mean().sqrt()) < 0.2


CRITICS = [Quadratic(2), pytest.param(Critic((2,), hidden=(32, 32)).double(), marks=pytest.mark.slow)]


@pytest.mark.parametrize("critic", CRITICS, ids=["quadratic", "network"])
def test_an_implicit_guide_is_fitted_to_the_posterior_and_its_bound_to_the_evidence(critic: nn.Module) -> None:
    rates = {"learning_rate": 0.005, "critic_learning_rate": 0.01}
    fit = play(critic, guide=Implicit(EYE, ZERO), steps=500, critic_steps=2, average=0.99, particles=128, **rates)
    posterior = fit.fit(regression)
    covariance = torch.linalg.inv(EYE + H.T @ H / 0.25)
    mean, z = covariance @ H.T @ Y / 0.25, posterior.draws["z"][0]
    # of 1000 draws, and a game that circles around its optimum by a few per cent
    assert ((z.mean(0) - mean).abs() / covariance.diagonal().sqrt()).max() < 0.2
    assert (z.T.cov() - covariance).abs().max() / covariance.max() < 0.2
    evidence = float(dist.MultivariateNormal(torch.zeros(3).double(), H @ H.T + 0.25 * torch.eye(3)).log_prob(Y))
    assert float((posterior.stats["lp"] - posterior.stats["log_q"]).mean()) == pytest.approx(evidence, abs=0.08)
    assert -float(posterior.history["loss"][-100:].mean()) == pytest.approx(evidence, abs=0.08)
    assert set(posterior.weights) >= {"guide.generator.network.a"} and not posterior.diagnose()


def test_a_position_has_its_jacobian() -> None:
    """A log-normal guide is normal in its position, where the critic has nothing to add."""

    class LogNormal(nn.Module):
        def forward(self) -> None:
            noise = dist.Normal(torch.zeros(()).double(), 1.0)
            pyro.sample("s", ImplicitDistribution(noise, lambda e: (0.3 + 0.5 * e).exp()))

    def program() -> None:
        pyro.sample("s", dist.Gamma(torch.tensor(2.0).double(), 1.0))

    fit = play(Quadratic(1), guide=LogNormal(), learning_rate=None, critic_learning_rate=1e-12, steps=30, particles=4000)
    posterior = fit.fit(program)
    s = posterior.draws["s"]
    # moments of 20 · 4000 draws
    assert (posterior.stats["log_q"] - dist.LogNormal(0.3, 0.5).log_prob(s)).abs().max() < 0.1
    torch.testing.assert_close(posterior.stats["lp"], dist.Gamma(2.0, 1.0).log_prob(s))


X = torch.randn(300, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.3


class Factor(nn.Module):
    """z_n ~ N(0, 1), x_n ~ N(w z_n, 0.5²): marginally N(0, w² + 0.25). Guide: z_n = a x_n + c ε_n."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.a, self.c = (nn.Parameter(torch.tensor(value).double()) for value in (0.5, 0.1, 0.5))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.w * z, 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        noise = dist.Normal(x.new_zeros(len(x), 1), 1.0).to_event(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", ImplicitDistribution(noise, lambda e: self.a * x + self.c * e, (1,)))


@pytest.mark.parametrize("batch_size", [pytest.param(None, marks=pytest.mark.slow), 100])
def test_rows_are_guided_one_by_one_and_the_program_learns(batch_size: int | None) -> None:
    model = Factor()
    rates = {"learning_rate": 0.005, "critic_learning_rate": 0.02}
    fit = play(Quadratic(1, 1), steps=500, average=0.99, critic_steps=5, batch_size=batch_size, draws=200, **rates)
    posterior = fit.fit(model, X)
    w = (float(X.square().mean()) - 0.25) ** 0.5  # of the largest likelihood
    evidence = float(dist.Normal(0.0, (w**2 + 0.25) ** 0.5).log_prob(X).sum())
    # averages of some hundred steps in a game: a few per cent
    assert float(posterior.weights["w"]) == pytest.approx(w, rel=0.1)
    assert float(posterior.weights["a"]) == pytest.approx(w / (w**2 + 0.25), rel=0.15)
    assert abs(float(posterior.weights["c"])) == pytest.approx((0.25 / (w**2 + 0.25)) ** 0.5, rel=0.15)
    assert -float(posterior.history["loss"][-200:].mean()) == pytest.approx(evidence, abs=0.05 * len(X))
    assert posterior.draws["z"].shape == (1, 200, 300, 1)


def test_finite_sites_are_summed_out_and_drawn_back() -> None:
    """A coin chooses the sign of the mean of y; the posterior of the coin follows z."""

    def program() -> None:
        z = pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal((2 * k - 1) * z.sum(), 1.0), obs=torch.tensor(1.0).double())

    posterior = play(Quadratic(2), guide=Implicit(EYE, ZERO), learning_rate=None, steps=2, draws=4000).fit(program)
    z, k = posterior.draws["z"][0].sum(-1), posterior.draws["k"][0]
    chance = (2 * z).sigmoid()  # N(1; s, 1) / (N(1; s, 1) + N(1; −s, 1))
    # five standard errors, false alarm 1e-6 each
    assert abs(float((k - chance).mean())) < 5 * 0.5 / 4000**0.5
    assert abs(float(((k - chance) * z).mean())) < 5 * 0.75 / 4000**0.5


def test_recorded_steps_are_those_of_the_program() -> None:
    for fit, program in (
        (play(Quadratic(2), guide=Implicit(A, B)), Program(regression, (), {}, follow=True)),
        (play(Quadratic(1, 1), particles=3), Program(Factor(), (X,), {}, follow=True)),
    ):
        with isolated(0):
            state = fit.init(program)
            for _ in range(18):  # the step after is held against the program
                state, info = fit.step(state, program)
        assert [objective.rung for objective in state.objectives] == ["staged", "staged"]
        assert info.value.isfinite()


def test_going_on_equals_one_long_run(tmp_path: Any) -> None:
    settings: dict[str, Any] = {"steps": 30, "batch_size": 70, "critic_steps": 2, "average": 0.9, "checkpoint_every": 10}
    whole = play(Quadratic(1, 1), draws=20, **settings).fit(Factor(), X)

    def stop(step: int, info: Any) -> None:
        if step == 24:
            raise RuntimeError("power cut")

    stop.is_passive = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="power cut"):
        play(Quadratic(1, 1), draws=20, callbacks=(stop,), checkpoint=tmp_path / "run", **settings).fit(Factor(), X)
    again = play(Quadratic(1, 1), draws=20, **settings).resume(tmp_path / "run", Factor(), X)
    for one, other in ((whole.weights, again.weights), (whole.draws, again.draws), (whole.stats, again.stats)):
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_nan_stops_the_run_and_says_which_network() -> None:
    guide = Implicit(EYE, ZERO)

    def poison(step: int, info: Any) -> None:
        if step == 29:
            guide.generator.network.b.data.fill_(math.nan)

    with pytest.raises(
        ValueError,
        match="The guide of regression draws values that have not been finite since step 3\\d; .* 'generator.network' ",
    ):
        play(Quadratic(2), guide=guide, steps=200, callbacks=(poison,)).fit(regression)


def test_its_draws_are_what_independence_proposes_from() -> None:
    posterior = play(Quadratic(2), guide=Implicit(EYE, ZERO), learning_rate=None, steps=2).fit(regression)
    chains = MetropolisHastings(proposal=Independence(posterior), chains=8, warmup=50, draws=50, seed=0, progress=False)
    assert chains.fit(regression).draws["z"].shape == (8, 50, 2)


@pytest.mark.parametrize(
    "fit", [SVI(progress=False, guide=Implicit(A, B)), MetropolisHastings(proposal=Independence(Implicit(A, B)))]
)
def test_back_ends_that_need_the_density_of_the_guide_name_one_that_does_not(fit: Any) -> None:
    with pytest.raises(Unsupported, match=r"^Site 'z' of the guide of regression: .* no log_prob.*AdversarialVI\(critic\)"):
        fit.fit(regression)


def discrete() -> None:
    pyro.sample("k", dist.Bernoulli(0.5))
    pyro.sample("z", dist.Normal(ZERO, 1.0).to_event(1))


def wide() -> None:
    pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))


def positive() -> None:
    pyro.sample("z", dist.Gamma(EYE[0] + 1.0, 1.0).to_event(1))


class Coin(Implicit):
    def forward(self, *_: Any) -> None:
        pyro.sample("k", dist.Bernoulli(0.5))
        super().forward()


class Mixed(Factor):
    """A site of all rows beside those of each."""

    def model(self, x: Tensor) -> None:
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        super().model(x)

    def guide(self, x: Tensor) -> None:
        pyro.sample("shared", dist.Normal(self.a, 1.0))
        super().guide(x)


class Still(Implicit):
    def __init__(self) -> None:
        super().__init__(EYE, ZERO)
        self.requires_grad_(False)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no guide": (lambda: play(Quadratic(2)).fit(regression), r"guide= is None and regression brings none. SVI\(\)"),
    "a critic of two numbers": (
        lambda: play(nn.Linear(2, 2).double(), guide=Implicit(A, B)).fit(regression),
        r"one number a row, \(256,\) or \(256, 1\), but gave shape \(256, 2\)",
    ),
    "a critic of another size": (
        lambda: play(nn.Linear(3, 1).double(), guide=Implicit(A, B)).fit(regression),
        r"tensors of shape \(256, 2\) \(positions of the latent sites\)",
    ),
    "a critic that does not look at the rows": (
        lambda: play(nn.Linear(1, 1).double()).fit(Factor(), X),
        r"tensors of shape \(300, 1\), \(300, 1\) \(positions of the latent sites, then the program's tensors with rows\)",
    ),
    "one particle of all": (lambda: play(Quadratic(2), guide=Implicit(A, B), particles=1).fit(regression), "such as 256"),
    "no particle": (lambda: play(Quadratic(2), guide=Implicit(A, B), particles=0).fit(regression), "at least 1"),
    "no critic steps": (lambda: play(Quadratic(2), guide=Implicit(A, B), critic_steps=0).fit(prior), "critic_steps is 0"),
    "a guide of coins": (lambda: play(Quadratic(2), guide=Coin(A, B)).fit(discrete), "'k' without gradients.*summed out"),
    "sites of rows and of all": (
        lambda: play(Quadratic(2)).fit(Mixed(), X),
        "'z' is drawn for every row, but 'shared' once",
    ),
    "a class": (lambda: play(Quadratic(2), guide=Implicit).fit(regression), "is the class Implicit"),
    "draws of another shape": (
        lambda: play(Quadratic(2), guide=Implicit(A, B)).fit(wide),
        r"draws 'z' of shape \(2,\), but in wide it is \(3,\)",
    ),
    "draws outside the support": (
        lambda: play(Quadratic(2), guide=Implicit(A, B - 9.0)).fit(positive),
        r"'z' that are NaN or lie outside its support .* exp\(\)",
    ),
    "a guide that lacks a site": (lambda: play(Quadratic(2), guide=lambda: None).fit(regression), "does not sample 'z'"),
    "nothing to train": (lambda: play(Quadratic(2), guide=Still()).fit(regression), "Neither the guide nor regression"),
    "a place to start": (lambda: play(Quadratic(2), guide=Implicit(A, B), start={"z": B}).fit(prior), "leave start= out"),
    "more rows than there are": (lambda: play(Quadratic(1, 1), batch_size=301).fit(Factor(), X), "has 300 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()
