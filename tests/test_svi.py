"""Pyro's automatic guides, by class, instance or function: closed forms where the family contains the posterior."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from inference import SVI, Posterior, Unsupported
from inference.bounds import ELBO
from inference.guides import log_prob
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program

DESIGN = torch.cat([torch.ones(30, 1), torch.randn(30, 1, generator=torch.Generator().manual_seed(0))], 1).double()
Y = DESIGN @ torch.tensor([0.5, -1.0]).double() + 0.7 * torch.randn(30, generator=torch.Generator().manual_seed(1)).double()


def regression(design: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(2), 2.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, 0.7), obs=y)


def exact() -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the coefficients."""
    covariance = np.linalg.inv(np.eye(2) / 4.0 + (DESIGN.T @ DESIGN).numpy() / 0.49)
    return covariance @ (DESIGN.T @ Y).numpy() / 0.49, covariance


def svi(**options: Any) -> SVI:
    return SVI(**{"steps": 400, "learning_rate": 0.1, "draws": 2, "seed": 0, "progress": False, **options})


def moments(posterior: Posterior) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of the coefficients under an automatic guide, by the formula of its family."""
    assert posterior.program is not None
    guide: Any = posterior.program.fitted.call
    with torch.no_grad(), pyro.settings.context(module_local_params=True):
        if isinstance(guide, autoguide.AutoDelta):
            return guide.median(DESIGN, Y)["beta"].cpu().numpy(), np.zeros((2, 2))
        if isinstance(guide, autoguide.AutoNormal):
            return guide.locs.beta.cpu().numpy(), np.diag(guide.scales.beta.cpu().numpy() ** 2)
        normal = guide.get_posterior()
        if isinstance(guide, autoguide.AutoDiagonalNormal):
            return normal.mean.cpu().numpy(), np.diag(normal.variance.cpu().numpy())
        return normal.mean.cpu().numpy(), normal.covariance_matrix.cpu().numpy()


FULL = (autoguide.AutoMultivariateNormal, autoguide.AutoLowRankMultivariateNormal, autoguide.AutoLaplaceApproximation)
MEAN_FIELD = (autoguide.AutoNormal, autoguide.AutoDiagonalNormal)


@pytest.mark.parametrize("family", [*FULL, *MEAN_FIELD, autoguide.AutoDelta], ids=lambda family: family.__name__)
def test_an_automatic_guide_finds_its_closed_form(family: type[AutoGuide], device: torch.device) -> None:
    """Within 2 % of a standard deviation: all of the posterior, or the best of a smaller family.

    The best independent normals have the posterior's mean and the inverse of its precision's diagonal (Bishop, 10.1.2).
    """
    posterior = svi(guide=family).fit(regression, DESIGN.to(device), Y.to(device))
    mean, covariance = exact()
    found, spread = moments(posterior)
    sd = np.sqrt(np.diag(covariance))
    assert np.abs(found - mean).max() < 0.02 * sd.min()
    if family in FULL:
        np.testing.assert_allclose(np.sqrt(np.diag(spread)), sd, rtol=0.02)
        np.testing.assert_allclose(spread[0, 1], covariance[0, 1], atol=0.02 * sd[0] * sd[1])
    elif family in MEAN_FIELD:
        np.testing.assert_allclose(np.sqrt(np.diag(spread)), np.diag(np.linalg.inv(covariance)) ** -0.5, rtol=0.02)


def mixture(y: Tensor) -> None:
    """One location, rows that may be off by three: its finite sites are summed out."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        is_off = pyro.sample("is_off", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(mean + 3.0 * is_off, 1.0), obs=y)


SHIFTED = torch.tensor([0.1, -0.4, 3.2, 0.6, 2.7, -0.2]).double()


def peak() -> tuple[float, float]:
    """Mode and curvature by quadrature on a grid."""
    grid = np.linspace(-3.0, 4.0, 70001)
    rows = SHIFTED.numpy()[:, None]
    density = 0.7 * np.exp(-0.5 * (rows - grid) ** 2) + 0.3 * np.exp(-0.5 * (rows - grid - 3.0) ** 2)
    log = np.log(density).sum(0) - grid**2 / 18
    best = int(log.argmax())
    return grid[best], float(-(log[best + 100] - 2 * log[best] + log[best - 100]) / (100 * 1e-4) ** 2) ** -0.5


@pytest.mark.parametrize("family", [*FULL, *MEAN_FIELD, autoguide.AutoDelta], ids=lambda family: family.__name__)
def test_finite_sites_are_summed_out_of_every_automatic_guide(family: type[AutoGuide]) -> None:
    if family is autoguide.AutoLowRankMultivariateNormal:
        pytest.skip("one latent number has no low rank")
    posterior = svi(guide=family, steps=300).fit(mixture, SHIFTED)
    assert posterior.draws["is_off"].shape == (1, 2, 6) and posterior.draws["mean"].shape == (1, 2)
    mode, sd = peak()
    if family is autoguide.AutoDelta:
        assert abs(float(posterior.draws["mean"][0, 0]) - mode) < 0.02 * sd
    elif family is autoguide.AutoLaplaceApproximation:
        draws = svi(guide=family, steps=300, draws=4000).fit(mixture, SHIFTED).draws["mean"]
        assert abs(float(posterior.weights["guide.loc"]) - mode) < 0.02 * sd
        assert float(draws.std()) == pytest.approx(sd, rel=4 / 8000**0.5)  # a false alarm in 1.6e4 runs


def test_a_guide_may_be_an_instance_or_a_function() -> None:
    mean, covariance = exact()

    for guide in (autoguide.AutoMultivariateNormal(regression), by_hand):
        posterior = svi(guide=guide).fit(regression, DESIGN, Y)
        assert np.abs(posterior.weights["guide.loc"].numpy() - mean).max() < 0.02 * np.sqrt(np.diag(covariance)).min()


def test_mini_batches_find_the_posterior_of_all_rows() -> None:
    """Within a fifth of a standard deviation after 200 passes."""
    posterior = svi(guide=autoguide.AutoMultivariateNormal, steps=600, learning_rate=0.05, batch_size=10).fit(
        regression, DESIGN, Y
    )
    mean, covariance = exact()
    found, spread = moments(posterior)
    sd = np.sqrt(np.diag(covariance))
    assert (np.abs(found - mean) < 0.2 * sd).all()
    np.testing.assert_allclose(np.sqrt(np.diag(spread)), sd, rtol=0.2)


def strange(design: Tensor, y: Tensor) -> None:
    pyro.sample("gamma", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))  # noqa: TID251


def nothing(design: Tensor, y: Tensor) -> None:
    pyro.param("loc", torch.tensor(0.0))  # noqa: TID251


@pytest.mark.parametrize(
    ("guide", "sentence"),
    [
        (strange, "The guide samples 'gamma', but regression has no such latent site"),
        (nothing, "The guide does not sample 'beta', a latent site of regression"),
    ],
)
def test_a_guide_must_have_the_sites_of_the_program(guide: Any, sentence: str) -> None:
    with pytest.raises(Unsupported, match=sentence):
        svi(guide=guide).fit(regression, DESIGN, Y)


def test_mini_batches_need_rows() -> None:
    def program(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)

    with pytest.raises(Unsupported, match=r"batch_size needs rows, but no plate of program has the size .* \(30\)"):
        svi(batch_size=5).fit(program, Y)


def test_a_class_that_is_no_guide_is_refused() -> None:
    with pytest.raises(TypeError, match="must be a Pyro guide or a class of automatic guides"):
        svi(guide=dict).fit(regression, DESIGN, Y)


def test_a_guide_of_a_program_in_a_handler_sees_the_handler() -> None:
    halved = poutine.scale(regression, scale=0.5)
    posterior = svi(guide=autoguide.AutoMultivariateNormal).fit(halved, DESIGN, Y)
    _, covariance = exact()
    _, spread = moments(posterior)
    np.testing.assert_allclose(np.diag(spread), 2.0 * np.diag(covariance), rtol=0.05)


# ------------------------------------------------------------------------------------------------------- staged steps
class Network(nn.Module):
    """A small variational autoencoder, whose parts the tests vary."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.Dropout(dropout))
        self.heads = nn.Linear(8, 4)
        self.decoder = nn.Sequential(nn.Linear(2, 8), *([nn.BatchNorm1d(8)] if norm else []), nn.ReLU(), nn.Linear(8, 5))
        self.double()

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mean, log_scale = self.heads(self.encoder(x).relu()).chunk(2, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))


BINARY = (torch.rand(30, 5, generator=torch.Generator().manual_seed(2)) > 0.6).double()


def network(**options: Any) -> Callable[[], tuple[Any, tuple[Tensor, ...]]]:
    def made() -> tuple[Any, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        return Network(**options), (BINARY,)

    return made


def by_hand(design: Tensor, y: Tensor) -> None:
    loc = pyro.param("loc", design.new_zeros(2))  # noqa: TID251
    root = pyro.param("root", torch.eye(2).to(design), constraint=dist.constraints.lower_cholesky)  # noqa: TID251
    pyro.sample("beta", dist.MultivariateNormal(loc, scale_tril=root))


def discrete(y: Tensor) -> None:
    """A guide without a reparameterised draw for every site: its gradient needs the score function."""
    logits = pyro.param("logits", y.new_zeros(len(y)))  # noqa: TID251
    loc = pyro.param("loc", y.new_zeros(()))  # noqa: TID251
    pyro.sample("mean", dist.Normal(loc, 0.3))
    with pyro.plate("rows", len(y)):
        pyro.sample("is_off", dist.Bernoulli(logits=logits))


Case = tuple[Callable[[], tuple[Any, tuple[Tensor, ...]]], dict[str, Any]]
CASES: dict[str, Case] = {
    "normal": (lambda: (regression, (DESIGN, Y)), {}),
    "multivariate": (lambda: (regression, (DESIGN, Y)), {"guide": autoguide.AutoMultivariateNormal}),
    "particles": (lambda: (regression, (DESIGN, Y)), {"bound": ELBO(particles=3)}),
    "score": (lambda: (regression, (DESIGN, Y)), {"bound": ELBO(path=False)}),
    "rows": (lambda: (regression, (DESIGN, Y)), {"batch_size": 10}),
    "scaled": (lambda: (poutine.scale(regression, scale=0.5), (DESIGN, Y)), {}),
    "function": (lambda: (regression, (DESIGN, Y)), {"guide": by_hand}),
    "finite": (lambda: (mixture, (SHIFTED,)), {}),
    "finite rows": (lambda: (mixture, (SHIFTED,)), {"batch_size": 2}),
    "discrete": (lambda: (mixture, (SHIFTED,)), {"guide": discrete, "bound": ELBO(particles=2)}),
    "network": (network(), {}),
    "network rows": (network(), {"batch_size": 8}),
    "batch norm": (network(norm=True), {"batch_size": 8}),
    "dropout": (network(dropout=0.3), {"batch_size": 8}),
}


class Steps(NamedTuple):
    losses: Tensor
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    rungs: list[str]


def steps_of(made: Any, options: dict[str, Any], rung: str, monkeypatch: pytest.MonkeyPatch, count: int = 40) -> Steps:
    """Losses of all steps, gradients of the last, and the buffers after it."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", rung)
    model, arguments = made()
    backend = svi(steps=count, learning_rate=0.01, **options)
    with isolated(0):
        program = Program(model, arguments, follow=True)
        with reproducible(program.dtype), quiet():
            torch.manual_seed(1)
            state, losses, rungs = backend.init(program), [], []
            for i in range(count):
                state, info = backend.step(state, program)
                for callback in backend.callbacks:
                    callback(i, info)
                losses.append(info.loss)
                rungs.append(state.objective.rung)
    buffers = [buffer.clone() for buffer in model.buffers()] if isinstance(model, nn.Module) else []
    return Steps(torch.stack(losses), [w.grad for w in state.objective.weights], buffers, rungs)


def assert_same_steps(one: Steps, other: Steps) -> None:
    """Equal up to the rounding that the steps pile up."""
    torch.testing.assert_close(one.losses, other.losses, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(one.gradients, other.gradients, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(one.buffers, other.buffers, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
def test_a_staged_step_is_the_step_of_the_program(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At equal random numbers losses, gradients and running statistics are those of the unstaged steps, up to rounding."""
    staged = steps_of(*CASES[case], "staged", monkeypatch)
    assert staged.rungs[-1] == "staged"
    unstaged = steps_of(*CASES[case], "vmapped", monkeypatch)
    assert "staged" not in unstaged.rungs
    assert_same_steps(staged, unstaged)


def test_batch_normalisation_counts_every_step_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the encoder, whose guide is run once a step, and in the decoder."""
    before = steps_of(network(norm=True), {"batch_size": 8}, "staged", monkeypatch, count=1)
    after = steps_of(network(norm=True), {"batch_size": 8}, "staged", monkeypatch, count=31)
    counts = [(int(b), int(a)) for a, b in zip(after.buffers, before.buffers, strict=True) if not a.is_floating_point()]
    assert [late - early for early, late in counts] == [30, 30]


def test_the_density_of_a_guide_with_dropout_is_that_of_its_draw() -> None:
    """A bound with log q at another mask than that of the draw would be wrong."""
    torch.manual_seed(0)
    program = Program(Network(dropout=0.5), (BINARY,), follow=True)
    with reproducible(program.dtype), quiet():
        state = svi(steps=1).init(program)
        torch.manual_seed(1)
        loss, *_ = state.objective()
        torch.manual_seed(1)
        trace = state.guide.trace(program)
        bound = program.log_joint({"z": trace.nodes["z"]["value"]}) - log_prob(trace)
    torch.testing.assert_close(loss, -bound.detach(), rtol=1e-12, atol=0)


class Reads(Network):
    """Python reads a number."""

    def guide(self, x: Tensor) -> None:
        if float(self.heads.bias.detach().abs().max()) > 1e6:
            raise ValueError("The weights are gone.")
        super().guide(x)


class Anneals(Network):
    """Python counts the steps, to no effect until the checks of a graph are over."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def guide(self, x: Tensor) -> None:
        self.count += 1
        super().guide(x if self.count < 50 else 0.9 * x)


class Remembers(Network):
    """A buffer is replaced, not written to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5).double())

    def guide(self, x: Tensor) -> None:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        super().guide(x - self.mean)


class Flips(Network):
    """Randomness that is not torch's."""

    def guide(self, x: Tensor) -> None:
        super().guide(x if random.random() < 0.5 else -x)


class Listens(Network):
    """A hook waits for the encoder to run."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[int] = []
        self.encoder.register_forward_hook(lambda *_: self.heard.append(1))


@pytest.mark.parametrize("kind", [Reads, Anneals, Remembers, Flips, Listens], ids=lambda kind: kind.__name__)
def test_what_cannot_be_recorded_runs_without_a_graph(kind: type[Network], monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> tuple[Any, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        random.seed(0)
        return kind(), (BINARY,)

    tried, unstaged = (steps_of(made, {"batch_size": 8}, rung, monkeypatch) for rung in ("staged", "vmapped"))
    assert "staged" not in tried.rungs
    assert_same_steps(tried, unstaged)
    assert tried.losses[-10:].mean() < tried.losses[:10].mean()


def test_what_a_callback_changes_reaches_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tempered(Network):
        weight = 1.0

        def model(self, x: Tensor) -> None:
            with poutine.scale(scale=self.weight):
                super().model(x)

    def case() -> tuple[Any, dict[str, Any]]:
        torch.manual_seed(0)
        model = Tempered()

        def anneal(step: int, _: Any) -> None:
            model.weight = 0.5 if step < 25 else 0.25

        return lambda: (model, (BINARY,)), {"callbacks": (anneal,)}

    staged = steps_of(*case(), "staged", monkeypatch, count=60)
    assert staged.rungs[24] == staged.rungs[-1] == "staged"
    assert_same_steps(staged, steps_of(*case(), "vmapped", monkeypatch, count=60))


def test_a_smaller_batch_has_a_graph_of_its_own() -> None:
    model, arguments = network()()
    program = Program(model, arguments, follow=True)
    with reproducible(program.dtype), quiet():
        objective = svi(batch_size=8).init(program).objective
        for _ in range(20):
            for size in (8, 6):
                torch.manual_seed(size)
                objective([BINARY[:size]])
        for size in (8, 6):
            torch.manual_seed(size)
            loss, rung = objective([BINARY[:size]]), objective.rung
            gradients = [w.grad for w in objective.weights]
            torch.manual_seed(size)
            expected = objective._unstaged([BINARY[:size]])
            assert rung == "staged"
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients, [w.grad for w in objective.weights])


def test_a_step_whose_bound_is_not_finite_is_left_out() -> None:
    def bounded(y: Tensor) -> None:
        top = pyro.sample("top", dist.Normal(0.0, 10.0))
        pyro.factor("inside", torch.where(top < 2.0, 0.0, -torch.inf))
        pyro.sample("y", dist.Normal(top, 1.0), obs=y)

    def wide(y: Tensor) -> None:
        loc = pyro.param("loc", y.new_zeros(()))  # noqa: TID251
        pyro.sample("top", dist.Normal(loc, 1.0))

    program = Program(bounded, (torch.tensor(3.0).double(),), follow=True)
    backend = svi(guide=wide)
    with isolated(3), reproducible(program.dtype), quiet():
        state, skipped = backend.init(program), 0
        for _ in range(200):
            before = {name: weight.detach().clone() for name, weight in state.guide.weights().items()}
            state, info = backend.step(state, program)
            if not info.loss.isfinite():
                skipped += 1
                torch.testing.assert_close(dict(state.guide.weights()), before, rtol=0, atol=0)
    assert skipped == int(state.skipped) > 0 and state.objective.rung == "staged"
    assert all(weight.isfinite().all() for weight in state.guide.weights().values())


@pytest.mark.parametrize("family", [autoguide.AutoNormal, autoguide.AutoMultivariateNormal])
def test_draws_that_are_made_at_once_are_draws_of_the_guide(family: type[AutoGuide]) -> None:
    """Each has the densities of its own point, and together they have the guide's moments (z below 5)."""
    posterior = svi(guide=family, draws=4000).fit(regression, DESIGN, Y)
    (beta,) = posterior.draws["beta"]
    mean, covariance = moments(posterior)
    q = torch.distributions.MultivariateNormal(torch.as_tensor(mean), torch.as_tensor(covariance))
    torch.testing.assert_close(posterior.stats["log_q"][0], q.log_prob(beta), rtol=1e-6, atol=1e-6)
    lp = dist.Normal(0.0, 2.0).log_prob(beta).sum(-1) + dist.Normal(beta @ DESIGN.T, 0.7).log_prob(Y).sum(-1)
    torch.testing.assert_close(posterior.stats["lp"][0], lp, rtol=1e-6, atol=1e-6)
    z = (beta.numpy() - mean).mean(0) / np.sqrt(np.diag(covariance) / 4000)
    assert np.abs(z).max() < 5.0


def test_a_program_that_hides_nothing_is_fitted_by_maximum_likelihood() -> None:
    """Poisson regression on one group: the weight ends at the log of the mean."""
    y = torch.tensor([2.0, 3.0, 0.0, 4.0, 1.0], dtype=torch.float64)

    def counts(y: Tensor) -> None:
        rate = pyro.param("log_rate", torch.zeros((), dtype=torch.float64)).exp()  # noqa: TID251
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Poisson(rate), obs=y)

    posterior = svi(steps=600, learning_rate=0.02).fit(counts, y)
    assert float(posterior.weights["log_rate"]) == pytest.approx(float(y.mean().log()), abs=1e-4)
    assert posterior.point() == {}


class Level(nn.Module):
    """μ ~ N(0, 1), y_n ~ N(μ, 1), with a normal guide that can be put at a value."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def model(self, y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(self.at.new_zeros(()), 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def guide(self, y: Tensor) -> None:
        pyro.sample("mu", dist.Normal(self.at, 0.1))


class Told(Level):
    @torch.no_grad()
    def guess(self, values: dict[str, Tensor], y: Tensor) -> None:
        self.at.copy_(values["mu"])


def test_the_guide_of_a_model_starts_where_it_is_told() -> None:
    told = Told()
    svi(start={"mu": 0.3}, steps=1, learning_rate=1e-9).fit(told, Y)
    assert told.at.item() == pytest.approx(0.3, abs=1e-8)
    with pytest.raises(ValueError, match="names 'nu'"):
        svi(start={"nu": 0.3}).fit(Told(), Y)


def test_a_guide_that_cannot_be_told_where_to_start_is_refused_with_what_to_do() -> None:
    for guide in (None, Level().guide):
        with pytest.raises(Unsupported, match="guide of a model with a method guess"):
            svi(start={"mu": 0.3}, guide=guide).fit(Level(), Y)
