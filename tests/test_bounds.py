"""Bounds are bounds: held against log p(x) of a linear normal model; their gradients against quadrature and enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from inference import ELBO, IWELBO, SVI, Cyclical, MultiplyIWELBO, Renyi, Unsupported, Warmup
from inference.bounds import Bound
from inference.guides import Guide
from inference.handlers import isolated, quiet, reproducible
from inference.particles import Weigher
from inference.program import Program
from parameters import quick

N, FEATURES = 12, 3
LOADINGS = torch.tensor([[1.0, 0.5], [-0.7, 1.2], [0.3, -0.4]], dtype=torch.float64)
NOISE = 0.8


def table(rows: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    return z @ LOADINGS.T + NOISE * torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64)


X = table()


class Linear(nn.Module):
    """z_n ~ N(0, I), x_n ~ N(W z_n, σ² I), and a guide that is not its posterior.

    Args:
        exact: Whether the guide is the posterior, as far as a diagonal one can be.
        scale: Of all statements, as ``poutine.scale``.
    """

    def __init__(self, exact: bool = False, scale: float = 1.0) -> None:
        super().__init__()
        self.loadings = nn.Parameter(LOADINGS.clone())
        precision = torch.eye(2, dtype=torch.float64) + LOADINGS.T @ LOADINGS / NOISE**2
        covariance = torch.linalg.inv(precision)
        mean = covariance @ LOADINGS.T / NOISE**2
        self.map = nn.Parameter(mean if exact else 0.8 * mean)
        self.root = nn.Parameter(torch.linalg.cholesky(covariance) if exact else 0.6 * torch.eye(2, dtype=torch.float64))
        self.scale = scale

    def model(self, x: Tensor) -> None:
        with poutine.scale(scale=self.scale), pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(z @ self.loadings.T, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with poutine.scale(scale=self.scale), pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MultivariateNormal(x @ self.map.T, scale_tril=self.root))


class Shared(Linear):
    """The same, with a location that all rows share."""

    def model(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.new_zeros(FEATURES), 1.0).to_event(1))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).expand([len(x), 2]).to_event(1))
            pyro.sample("x", dist.Normal(m + z @ self.loadings.T, NOISE).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.new_zeros(FEATURES), 0.3).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MultivariateNormal((x - m) @ self.map.T, scale_tril=self.root))


def evidence(x: Tensor, extra: float = 0.0) -> float:
    """log p(x) of rows, of a location with variance ``extra`` that they share."""
    covariance = LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(FEATURES, dtype=torch.float64)
    if not extra:
        return float(torch.distributions.MultivariateNormal(x.new_zeros(FEATURES), covariance).log_prob(x).sum())
    n = len(x)
    whole = torch.kron(torch.eye(n, dtype=x.dtype), covariance)
    whole = whole + extra * torch.kron(torch.ones(n, n, dtype=x.dtype), torch.eye(FEATURES, dtype=x.dtype))
    return float(torch.distributions.MultivariateNormal(x.new_zeros(n * FEATURES), whole).log_prob(x.flatten()))


def estimate(model: Any, bound: Bound, repeats: int, batch: int | None = None, x: Tensor = X) -> tuple[float, float]:
    """Mean of a bound over draws and over the batches of a pass, and its standard error."""
    program = Program(model, (x,), follow=True, batch_size=batch)
    svi = SVI(bound=bound, batch_size=batch, progress=False)
    seen = []
    with isolated(1), reproducible(program.dtype), quiet():
        objective = svi.init(program).objective
        for _ in range(repeats):
            batches = [None] if batch is None else [program.minibatch(i) for i in torch.arange(len(x)).split(batch)]
            seen.append(np.mean([-float(objective(data).reshape(-1)[0]) for data in batches]))
    return float(np.mean(seen)), float(np.std(seen)) / math.sqrt(repeats)


ORDERED = [(None, 1.0), (None, 0.1), (3, 10.0)]


@pytest.mark.parametrize(("batch", "scale"), quick(itertools.product((None, 3, 4), (1.0, 0.1, 10.0)), ORDERED))
def test_bounds_are_ordered_below_the_evidence(batch: int | None, scale: float) -> None:
    """ELBO ≤ IW(2) ≤ IW(20) ≤ log p(x), with and without sub-sampling, under any scale; 5 standard errors."""
    model, truth = Linear(scale=scale), scale * evidence(X)
    found = [estimate(model, bound, 300, batch) for bound in (ELBO(), IWELBO(2), IWELBO(20))]
    for (lower, one), (upper, other) in itertools.pairwise([*found, (truth, 0.0)]):
        assert lower <= upper + 5 * math.hypot(one, other)
    assert found[0][0] < found[1][0] - 5 * found[1][1]  # the guide is far enough off for them to differ


@pytest.mark.parametrize("batch", [None, 4])
def test_importance_weighting_converges_to_the_evidence(batch: int | None) -> None:
    mean, error = estimate(Linear(), IWELBO(4000), 10, batch)
    assert abs(mean - evidence(X)) < 5 * error + 0.02


@pytest.mark.parametrize("bound", [Renyi(0.5, 10), MultiplyIWELBO(4, 10)], ids=lambda bound: type(bound).__name__)
def test_bounds_between_are_between(bound: Bound) -> None:
    (low, a), (mean, b), (high, c) = (estimate(Linear(), each, 300, 4) for each in (ELBO(), bound, IWELBO(10)))
    assert low - 5 * math.hypot(a, b) <= mean <= high + 5 * math.hypot(b, c)


def test_what_rows_share_enters_as_in_the_evidence_lower_bound() -> None:
    """E_q(m)[log p(m, x) − log q(m)] is the limit, for all rows and for batches."""
    model = Shared()
    limit = []
    covariance = LOADINGS @ LOADINGS.T + NOISE**2 * torch.eye(FEATURES, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        m = 0.3 * torch.randn(FEATURES, generator=generator, dtype=torch.float64)
        ratio = dist.Normal(0.0, 1.0).log_prob(m).sum() - dist.Normal(0.0, 0.3).log_prob(m).sum()
        limit.append(float(ratio + torch.distributions.MultivariateNormal(m, covariance).log_prob(X).sum()))
    spread = np.std(limit) / math.sqrt(len(limit))
    for batch in (None, 4):
        mean, error = estimate(model, IWELBO(300), 400, batch)
        assert abs(mean - np.mean(limit)) < 5 * math.hypot(error, spread) + 0.05
        assert mean < evidence(X, extra=1.0)


# ------------------------------------------------------------------------------------------------------ gradients
Y = torch.tensor([0.7, -1.1], dtype=torch.float64)


class Scalar(nn.Module):
    """z_n ~ N(μ, 1), x_n ~ N(z_n, 1); the guide N(a x_n, s)."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
        self.log_s = nn.Parameter(torch.tensor(-0.2, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.a * x, self.log_s.exp()))

    def exact(self, bound: Bound) -> Tensor:
        """The bound for two particles, by Gauss-Hermite quadrature over both."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(60)
        e, w = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
        total = torch.zeros((), dtype=torch.float64)
        for x in Y:
            z = self.a * x + self.log_s.exp() * e
            log_w = dist.Normal(self.mu, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
            log_w = log_w - dist.Normal(self.a * x, self.log_s.exp()).log_prob(z)
            both = torch.stack(torch.broadcast_tensors(log_w[:, None], log_w[None, :]))
            total = total + (w[:, None] * w[None, :] * bound.combined(both)).sum()
        return total


def gradients(model: nn.Module, bound: Bound, x: Tensor, repeats: int, **settings: Any) -> Tensor:
    """Gradients of minus the loss in all weights, (repeat, weight)."""
    program = Program(model, (x,), follow=True)
    found = []
    with isolated(2), reproducible(program.dtype), quiet():
        state = SVI(bound=bound, progress=False, **settings).init(program)
        for _ in range(repeats):
            state.objective()
            found.append(torch.stack([-weight.grad.sum() for weight in state.objective.weights]))
    return torch.stack(found)


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize(
    "make",
    [lambda path: ELBO(2, path), lambda path: IWELBO(2, path), lambda path: Renyi(0.4, 2, path)],
    ids=["ELBO", "IWELBO", "Renyi"],
)
def test_gradients_are_those_of_quadrature(make: Callable[[bool], Bound], path: bool) -> None:
    """Means over 3,000 steps within 4.5 standard errors; three weights: false alarms 2e-5."""
    model, bound = Scalar(), make(path)
    found = gradients(model, bound, Y, 3000)
    names = {id(w): n for n, w in model.named_parameters()}
    program_order = [id(w) for w in SVI(bound=bound).init(Program(model, (Y,), follow=True)).objective.weights]
    exact = dict(
        zip([n for n, _ in model.named_parameters()], torch.autograd.grad(model.exact(bound), [*model.parameters()]))
    )
    wanted = torch.stack([exact[names[key]] for key in program_order])
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - wanted).abs() < 4.5 * error + 1e-9).all())


@pytest.mark.parametrize("bound", [ELBO(3), IWELBO(3), MultiplyIWELBO(2, 3), Renyi(0.5, 3)], ids=lambda b: type(b).__name__)
def test_the_path_gradient_has_no_variance_where_the_guide_is_the_posterior(bound: Bound) -> None:
    model = Linear(exact=True)
    model.loadings.requires_grad_(False)
    assert gradients(model, bound, X, 5).abs().max() < 1e-10


@pytest.mark.parametrize("bound", [IWELBO(64), Renyi(0.3, 64)], ids=lambda bound: type(bound).__name__)
def test_the_doubly_reparameterised_gradient_is_less_noisy_than_the_plain_one(bound: Bound) -> None:
    plain = type(bound)(**{**bound.__dict__, "path": False})
    model = Linear()
    model.loadings.requires_grad_(False)
    assert gradients(model, bound, X, 300).std(0).mean() < 0.5 * gradients(model, plain, X, 300).std(0).mean()


class Coins(nn.Module):
    """A coin for each row that says which of two rates the row has; nothing is reparameterised."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor([-0.5, 0.9], dtype=torch.float64))
        self.logit = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(torch.where(z > 0.5, self.mu[1], self.mu[0]), 1.0), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.logit * x))

    def exact(self, bound: Bound, particles: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for x in Y:
            q = dist.Bernoulli(logits=self.logit * x)
            for bits in itertools.product((0.0, 1.0), repeat=particles):
                z = x.new_tensor(bits)
                log_q = q.log_prob(z)
                log_p = dist.Bernoulli(x.new_tensor(0.3)).log_prob(z)
                log_p = log_p + dist.Normal(torch.where(z > 0.5, self.mu[1], self.mu[0]), 1.0).log_prob(x)
                total = total + log_q.sum().exp() * bound.combined(log_p - log_q)
        return total


@pytest.mark.parametrize("bound", [ELBO(3), IWELBO(3), IWELBO(1), Renyi(0.5, 3)], ids=str)
def test_gradients_of_discrete_sites_are_those_of_enumeration(bound: Bound) -> None:
    """All 2³ draws of three particles; means over 3,000 steps within 4.5 standard errors."""
    model = Coins()
    found = gradients(model, bound, Y, 3000)
    exact = torch.autograd.grad(model.exact(bound, bound.particles), [*model.parameters()])
    by_name = {"mu": exact[0].sum(), "logit": exact[1]}
    program = Program(model, (Y,), follow=True)
    order = [id(w) for w in SVI(bound=bound).init(program).objective.weights]
    wanted = torch.stack([by_name[{id(w): n for n, w in model.named_parameters()}[key]] for key in order])
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - wanted).abs() < 4.5 * error + 1e-9).all())


class CoupledCoins(Coins):
    """The same, and a statement outside of the plate that looks at all coins."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(x.new_tensor(0.3)))
            pyro.sample("x", dist.Normal(torch.where(z > 0.5, self.mu[1], self.mu[0]), 1.0), obs=x)
        pyro.factor("alike", 3.0 * (z[0] == z[1]).to(x))


def test_draws_that_are_not_reparameterised_learn_from_all_that_depends_on_them() -> None:
    """All four draws; means over 3,000 steps within 4.5 standard errors. A bound row by row would miss the factor."""
    model = CoupledCoins()
    found = gradients(model, ELBO(), Y, 3000)
    total = torch.zeros((), dtype=torch.float64)
    q = dist.Bernoulli(logits=model.logit * Y)
    for bits in itertools.product((0.0, 1.0), repeat=2):
        z = Y.new_tensor(bits)
        log_p = dist.Bernoulli(Y.new_tensor(0.3)).log_prob(z).sum() + 3.0 * float(bits[0] == bits[1])
        log_p = log_p + dist.Normal(torch.where(z > 0.5, model.mu[1], model.mu[0]), 1.0).log_prob(Y).sum()
        total = total + q.log_prob(z).sum().exp() * (log_p - q.log_prob(z).sum())
    names = {id(w): n for n, w in model.named_parameters()}
    exact = dict(zip(names.values(), torch.autograd.grad(total, [*model.parameters()])))
    order = [id(w) for w in SVI().init(Program(model, (Y,), follow=True)).objective.weights]
    wanted = torch.stack([exact[names[key]].sum() for key in order])
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - wanted).abs() < 4.5 * error + 1e-9).all())
    with pytest.raises(Unsupported, match="outside the plate 'rows' depends"):
        SVI(bound=ELBO(beta=0.5), progress=False).fit(model, Y)


# -------------------------------------------------------------------------------------------------- weighed divergence
def test_beta_weighs_the_divergence() -> None:
    """At β the bound is −distortion − β rate, at the same draws."""
    program = Program(Linear(), (X,), follow=True)
    with isolated(0), reproducible(program.dtype), quiet():
        for beta in (0.0, 0.5, 4.0):
            state = SVI(bound=ELBO(beta=beta), progress=False).init(program)
            loss, rate, distortion = state.objective.loss(None, False)[1]
            torch.testing.assert_close(loss, distortion + beta * rate)


def test_a_schedule_reaches_every_step_of_a_recorded_graph() -> None:
    seen: list[int] = []

    def schedule(step: int) -> float:
        seen.append(step)
        return 0.1 * step

    posterior = SVI(steps=30, bound=ELBO(beta=schedule), draws=1, seed=0, progress=False).fit(Linear(), X)
    history = posterior.history
    beta = (history["loss"] - history["distortion"]) / history["rate"]
    torch.testing.assert_close(beta, 0.1 * torch.arange(30, dtype=beta.dtype), atol=1e-6, rtol=1e-6)
    assert set(range(30)) <= set(seen)


def test_schedules() -> None:
    assert [Warmup(4)(i) for i in (0, 1, 2, 4, 9)] == [0.0, 0.25, 0.5, 1.0, 1.0]
    assert [Cyclical(4, 2)(i) for i in (0, 1, 2, 3, 4, 5, 8)] == [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]


def test_the_model_may_say_beta() -> None:
    model = Linear()
    model.beta = 3.0  # type: ignore[assignment]
    history = SVI(steps=3, draws=1, seed=0, progress=False).fit(model, X).history
    torch.testing.assert_close(history["loss"], history["distortion"] + 3.0 * history["rate"])


def test_free_bits_cost_nothing() -> None:
    """−distortion − Σ_d max(λ, mean over rows of KL_d) of a guide with independent numbers."""

    class Diagonal(Linear):
        def guide(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(x @ self.map.T, self.root.diagonal()).to_event(1))

    program = Program(Diagonal(), (X,), follow=True)
    with isolated(0), reproducible(program.dtype), quiet():
        state = SVI(bound=ELBO(particles=500, free_bits=0.333), progress=False).init(program)
        loss, _, distortion = state.objective.loss(None, False)[1]
        model = Diagonal()
        q = dist.Normal(X @ model.map.T, model.root.diagonal())
        costs = torch.distributions.kl_divergence(q, dist.Normal(torch.zeros_like(q.loc), 1.0)).mean(0)
        assert costs.min() < 0.333 < costs.max()
        wanted = distortion + N * costs.clamp(min=0.333).sum()
        assert abs(float((loss - wanted).detach())) < 0.02 * float(wanted.detach())


# ------------------------------------------------------------------------------------------------------- refusals
def test_rows_that_depend_on_one_another_have_no_bound_of_their_own() -> None:
    class Centred(Linear):
        def model(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).expand([len(x), 2]).to_event(1))
                pyro.sample("x", dist.Normal((z - z.mean(0)) @ self.loadings.T, NOISE).to_event(1), obs=x)

    with pytest.raises(Unsupported, match="depends on the latent values of others"):
        SVI(bound=IWELBO(), progress=False).fit(Centred(), X)


def test_a_guide_of_global_sites_cannot_be_weighed_on_batches() -> None:
    def mean(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)

    with pytest.raises(Unsupported, match="Leave batch_size out"):
        SVI(bound=IWELBO(), batch_size=4, progress=False).fit(mean, X[:, 0])
    history = SVI(bound=IWELBO(), steps=600, draws=1, seed=0, progress=False).fit(mean, X[:, 0]).history["loss"]
    exact = torch.distributions.MultivariateNormal(X.new_zeros(N), torch.eye(N, dtype=X.dtype) + 1.0).log_prob(X[:, 0])
    assert abs(float(-history[-100:].mean() - exact)) < 0.02


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: IWELBO(0), "at least 1"), (lambda: ELBO(beta=-1.0), "negative"), (lambda: Renyi(1.5), "at most 1"),
        (lambda: ELBO(free_bits=-1.0), "negative"), (lambda: MultiplyIWELBO(0), "at least 1"), (lambda: Warmup(0), "steps"),
        (lambda: Cyclical(10, 0), "cycles"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_guide_that_makes_one_draw_at_a_time_is_found_out() -> None:
    class Averaging(Linear):
        def guide(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                z = pyro.sample("u", dist.Normal(x @ self.map.T, 0.6).to_event(1), infer={"is_auxiliary": True})
                pyro.sample("z", dist.Normal(z.mean(0) + x @ self.map.T, 0.6).to_event(1))

    program = Program(Averaging(), (X,), follow=True)
    with isolated(0), reproducible(program.dtype), quiet():
        guide = Guide(program.guide)
        assert not Weigher(guide, program, guide.trace(program)).is_wide
        model = Linear()
        program = Program(model, (X,), follow=True)
        guide = Guide(model.guide)
        assert Weigher(guide, program, guide.trace(program)).is_wide
