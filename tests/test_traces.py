"""Programs whose structure changes from run to run, against posteriors that are known exactly.

The transition matrix of the kernel is built without drawing: every number that it asks for, a site's value among them, takes
each of its values in turn, with its probability.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from scipy.integrate import trapezoid
from torch import Tensor
from torch.distributions import constraints

from inference import (
    EM,
    HMC,
    NUTS,
    SVI,
    Gibbs,
    Langevin,
    MetropolisHastings,
    Posterior,
    Prior,
    Unsupported,
    arviz,
    calibration,
    markov,
)
from inference.arrays import corner, ragged
from inference.program import Program
from inference.traces import SingleSiteKernel, Trace
from parameters import quick

EXACT = 1e-12
SIDE = 1e-12  # how near to an edge a decision is asked for


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def prior(**options: Any) -> MetropolisHastings:
    return MetropolisHastings(**{"proposal": Prior(), "seed": 0, "progress": False, **options})


def assert_agrees(draws: Any, exact: float) -> None:
    """The mean of draws (chain, draw) within four standard errors: under a fresh seed a false alarm in 16,000 checks."""
    values = np.asarray(draws, dtype=np.float64)
    assert abs(values.mean() - exact) < 4 * float(arviz.mcse(values)), (values.mean(), exact)


# --------------------------------------------------------------------------------------------------- programs
Y = tensor([0.5, 1.2, 1.9])


def optional(y: Tensor) -> None:
    """A mean that is 2, or else is to be learnt."""
    b = pyro.sample("b", dist.Bernoulli(0.6))
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0)) if b else torch.tensor(2.0)
    pyro.deterministic("twice", 2.0 * mu)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def optional_posterior(y: Tensor) -> tuple[float, float]:
    """P(b = 1 | y) and E[mu | b = 1, y]."""
    n = len(y)
    fixed = scipy.stats.norm(2.0, 1.0).logpdf(y.numpy()).sum()
    free = scipy.stats.multivariate_normal(np.zeros(n), np.eye(n) + 1.0).logpdf(y.numpy())
    odds = 0.6 / 0.4 * math.exp(free - fixed)
    return odds / (1.0 + odds), float(y.sum() / (n + 1))


def flips(y: Tensor) -> None:
    """Heads until the first tail."""
    n = 0
    while pyro.sample(f"flip_{n}", dist.Bernoulli(0.6)):
        n += 1
    pyro.sample("y", dist.Normal(float(n), 1.0), obs=y)


def sums(y: Tensor) -> None:
    """A sum of a number of terms that is not known."""
    k = pyro.sample("k", dist.Poisson(1.5))
    with pyro.plate("terms", int(k) + 1):
        m = pyro.sample("m", dist.Normal(1.0, 1.0))
    pyro.sample("y", dist.Normal(m.sum(), 0.5), obs=y)


def apart(y: Tensor) -> None:
    """Supports that do not meet."""
    b = pyro.sample("b", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Uniform(0.0, 1.0) if b else dist.Uniform(2.0, 4.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def nested(y: Tensor) -> None:
    """A support whose end is a latent."""
    top = pyro.sample("top", dist.Uniform(1.0, 3.0))
    x = pyro.sample("x", dist.Uniform(0.0, top))
    pyro.sample("y", dist.Normal(x, 0.5), obs=y)


def slab(y: Tensor) -> None:
    """A point, or a density: values may not go from one to the other."""
    b = pyro.sample("b", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(0.0, 2.0) if b else dist.Delta(torch.tensor(0.0)))
    pyro.sample("extra", dist.Normal(0.0, 1.0)) if b else None
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def families(y: Tensor) -> None:
    """A count, or a real number."""
    b = pyro.sample("b", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(1.0, 1.0) if b else dist.Poisson(1.0))
    pyro.sample("extra", dist.Normal(0.0, 1.0)) if b else None
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


# ---------------------------------------------------------------------------------------------------- oracles
@pytest.fixture(scope="module")
def optional_fit() -> Posterior:
    return prior(chains=8, warmup=50, draws=400).fit(optional, Y)


def test_an_optional_site_is_there_as_often_as_it_should_be(optional_fit: Posterior) -> None:
    """Against the closed form: two checks of ``assert_agrees``."""
    probability, mean = optional_posterior(Y)
    draws = optional_fit.draws
    there = draws["b"] == 1.0
    assert_agrees(there, probability)
    assert_agrees(torch.where(there, draws["mu"].nan_to_num() - mean, 0.0), 0.0)
    assert torch.equal(draws["mu"].isnan(), ~there)
    assert torch.equal(draws["twice"], torch.where(there, 2.0 * draws["mu"], 4.0))


@pytest.mark.slow
def test_a_loop_of_unknown_length_has_its_posterior() -> None:
    """P(n | y) by enumeration, and its mean: seven checks of ``assert_agrees``."""
    y = tensor(2.3)
    posterior = prior(chains=8, warmup=50, draws=500, thin=2).fit(flips, y)
    lengths = np.arange(60)
    law = 0.6**lengths * scipy.stats.norm(lengths, 1.0).pdf(float(y))
    law /= law.sum()
    sites = [name for name in posterior.draws if name.startswith("flip_")]
    found = sum((posterior.draws[name].nan_to_num() for name in sites), torch.zeros(8, 500))
    assert_agrees(found, float(law @ lengths))
    for n in range(6):
        assert_agrees(found == n, law[n])
    for n in range(1, len(sites)):  # a flip is there where all before it were heads
        assert torch.equal(posterior.draws[f"flip_{n}"].isnan(), posterior.draws[f"flip_{n - 1}"] != 1.0)


@pytest.mark.slow
def test_a_plate_of_unknown_size_has_its_posterior() -> None:
    """y | k ~ N(k + 1, k + 1 + ¼) in closed form, and E[Σ m | y]: six checks of ``assert_agrees``."""
    y = tensor(3.5)
    posterior = prior(chains=8, warmup=100, draws=500, thin=4).fit(sums, y)
    sizes = np.arange(60)
    law = scipy.stats.poisson(1.5).pmf(sizes) * scipy.stats.norm(sizes + 1, np.sqrt(sizes + 1.25)).pdf(float(y))
    law /= law.sum()
    k, m = posterior.draws["k"], posterior.draws["m"]
    for size in range(5):
        assert_agrees(k == size, law[size])
    shrinkage = (sizes + 1) / (sizes + 1.25)
    assert_agrees(m.nansum(-1), float(law @ (sizes + 1 + shrinkage * (float(y) - sizes - 1))))
    assert m.shape == (8, 500, int(k.max()) + 1)
    assert torch.equal((~m.isnan()).sum(-1), k.long() + 1)


@pytest.mark.slow
def test_supports_that_do_not_meet_are_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    """P(b = 1 | y) from normal distribution functions, by moves of single sites alone: one check of ``assert_agrees``."""
    monkeypatch.setattr("inference.traces.SingleSiteKernel", functools.partial(SingleSiteKernel, 0.0))
    y = tensor(1.6)
    normal = scipy.stats.norm(float(y), 1.0)
    odds = 0.3 / 0.7 * (normal.cdf(1.0) - normal.cdf(0.0)) / ((normal.cdf(4.0) - normal.cdf(2.0)) / 2.0)
    posterior = prior(chains=8, warmup=20, draws=800).fit(apart, y)
    assert_agrees(posterior.draws["b"], odds / (1.0 + odds))
    assert bool((posterior.draws["b"].double().std(1) > 0.0).all())


@pytest.mark.slow
def test_a_support_that_follows_a_latent_has_its_posterior() -> None:
    """E[top | y] and E[x | y] by quadrature: two checks of ``assert_agrees``."""
    y = tensor(1.4)
    posterior = prior(chains=8, warmup=50, draws=1000).fit(nested, y)
    tops = np.linspace(1.0, 3.0, 4001)
    normal = scipy.stats.norm(float(y), 0.5)
    weights = (normal.cdf(tops) - normal.cdf(0.0)) / tops
    first = float(y) * (normal.cdf(tops) - normal.cdf(0.0)) - 0.25 * (normal.pdf(tops) - normal.pdf(0.0))
    evidence = trapezoid(weights, tops)
    assert_agrees(posterior.draws["top"], trapezoid(weights * tops, tops) / evidence)
    assert_agrees(posterior.draws["x"], trapezoid(first / tops, tops) / evidence)
    assert posterior.info["structure"] == "changing" and not posterior.draws["x"].isnan().any()


def assert_points_stay_points() -> None:
    """P(b = 1 | y) of a spike and a slab, and of a count and a real number: two checks of ``assert_agrees``."""
    y = tensor(1.8)
    densities = {
        slab: (scipy.stats.norm(0.0, math.sqrt(5.0)).pdf(float(y)), scipy.stats.norm(0.0, 1.0).pdf(float(y))),
        families: (
            scipy.stats.norm(1.0, math.sqrt(2.0)).pdf(float(y)),
            scipy.stats.poisson(1.0).pmf(np.arange(40)) @ scipy.stats.norm(np.arange(40), 1.0).pdf(float(y)),
        ),
    }
    for program, (one, zero) in densities.items():
        posterior = prior(chains=8, warmup=20, draws=400).fit(program, y)
        assert_agrees(posterior.draws["b"], one / (one + zero))
        is_whole = posterior.draws["x"] == posterior.draws["x"].round()
        assert torch.equal(is_whole, posterior.draws["b"] == 0.0)


def test_values_do_not_go_from_a_point_or_a_count_to_a_density() -> None:
    assert_points_stay_points()


# ------------------------------------------------------------------------------------- the transition matrix
class Script:
    """Takes every choice in turn: one run for each way through them, with its probability."""

    def __init__(self) -> None:
        self.path: list[int] = []
        self.arity: list[int] = []
        self.position, self.weight = 0, 1.0
        self.is_active = False

    def pick(self, probabilities: Tensor) -> int:
        if self.position == len(self.path):
            self.path.append(0)
            self.arity.append(len(probabilities))
        chosen = self.path[self.position]
        self.position += 1
        self.weight *= float(probabilities[chosen])
        return chosen

    def replayed(self, run: Callable[[], Any]) -> Any:
        self.position, self.weight, self.is_active = 0, 1.0, True
        try:
            return run()
        finally:
            self.is_active = False

    def outcomes(self, run: Callable[[], Any]) -> Iterator[tuple[Any, float]]:
        self.path, self.arity = [], []
        while True:
            result = self.replayed(run)
            yield result, self.weight
            while self.path and self.path[-1] == self.arity[-1] - 1:
                self.path.pop()
                self.arity.pop()
            if not self.path:
                return
            self.path[-1] += 1


SCRIPT = Script()


class Among(constraints.Constraint):
    is_discrete = True
    event_dim = 0

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def check(self, value: Tensor) -> Tensor:
        return torch.isin(value, self.values)


class Values(dist.TorchDistribution):  # type: ignore[misc]
    """A few numbers with their probabilities, drawn by the script where it is active."""

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, values: list[float], probabilities: list[float], shape: Any = ()) -> None:
        self.values, self.probabilities = tensor(values), tensor(probabilities)
        super().__init__(torch.Size(shape), validate_args=False)

    @property
    def support(self) -> Among:
        return Among(self.values)

    def expand(self, shape: Any, _instance: Any = None) -> Values:
        return Values(self.values.tolist(), self.probabilities.tolist(), shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        count = math.prod(self.batch_shape)
        if not SCRIPT.is_active:
            return self.values[self.probabilities.multinomial(count, replacement=True)].reshape(self.batch_shape)
        return torch.stack([self.values[SCRIPT.pick(self.probabilities)] for _ in range(count)]).reshape(self.batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.where(value.unsqueeze(-1) == self.values, self.probabilities, 0.0).sum(-1).log()


LABELS, OPTION, EARLY, LATE, ITEM = [0.45, 0.55], [0.7, 0.3], [0.35, 0.65], [0.2, 0.8], [0.25, 0.75]


def branching(y: Tensor) -> None:
    """An optional and scaled site, supports that overlap, a plate of changing size, a factor, a site that is kept."""
    a = pyro.sample("a", Values([0.0, 1.0], LABELS))
    level = a
    if a > 0:
        with poutine.scale(scale=0.5):
            level = level + pyro.sample("b", Values([0.0, 1.0], OPTION))
    c = pyro.sample("c", Values([1.0, 2.0], LATE) if a > 0 else Values([0.0, 1.0], EARLY))
    with pyro.plate("items", int(a) + 1):
        d = pyro.sample("d", Values([0.0, 1.0], ITEM))
    e = pyro.sample("e", Values([0.0, 1.0], [0.4, 0.6] if a > 0 else [0.9, 0.1]))
    pyro.factor("nudge", 0.3 * c * e)
    pyro.sample("y", dist.Normal(level + d.sum(), 1.0), obs=y)


def branching_law(y: float) -> dict[tuple[Any, ...], float]:
    """Every trace of ``branching`` with its joint density, written down a second time."""
    law = {}
    for a, b, c, e in itertools.product((0, 1), (0, 1), (0, 1, 2), (0, 1)):
        for d in itertools.product((0, 1), repeat=a + 1):
            if (not a and b) or c not in ((1, 2) if a else (0, 1)):
                continue
            joint = LABELS[a] * (OPTION[b] ** 0.5 if a else 1.0) * (LATE[c - 1] if a else EARLY[c])
            joint *= math.prod(ITEM[i] for i in d) * ((0.4, 0.6)[e] if a else (0.9, 0.1)[e])
            joint *= math.exp(0.3 * c * e) * scipy.stats.norm(a + b + sum(d), 1.0).pdf(y)
            law[(float(a), float(b) if a else None, float(c), tuple(map(float, d)), float(e))] = joint
    return law


def _key(trace: Trace) -> tuple[Any, ...]:
    values = {name: choice.value for name, choice in trace.choices.items()}
    b = float(values["b"]) if "b" in values else None
    return (float(values["a"]), b, float(values["c"]), tuple(values["d"].tolist()), float(values["e"]))


def trace_matrix(redrawn: float, patch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """The kernel's transition matrix on ``branching``, and the law that it should leave as it is."""
    program = Program(branching, (tensor(1.3),), is_fixed=False)
    assert program.is_changing
    law = branching_law(1.3)
    kernel, order = SingleSiteKernel(redrawn), {key: i for i, key in enumerate(law)}
    traces = {_key(trace): trace for trace, _ in SCRIPT.outcomes(lambda: kernel.init(program))}
    assert traces.keys() == law.keys()
    decision = [0.0]

    def uniform(*_: Any) -> Tensor:  # the first of a step chooses the move, the second accepts it
        is_first = not SCRIPT.position
        if is_first:
            return tensor([0.0, 1.0 - SIDE][SCRIPT.pick(tensor([redrawn, 1.0 - redrawn]))])
        return tensor(decision[0])

    patch.setattr(torch, "rand", uniform)
    patch.setattr(torch, "randint", lambda high, *_: torch.tensor(SCRIPT.pick(torch.full((high,), 1.0 / high))))
    matrix = torch.zeros(len(law), len(law), dtype=torch.float64)
    for key, trace in traces.items():
        assert abs(trace.log_joint - math.log(law[key])) < EXACT

        def step(trace: Trace = trace) -> Any:
            return kernel.step(trace, program)

        decision[0] = 0.0
        for (moved, info), weight in SCRIPT.outcomes(step):
            rate, arrival = float(info.acceptance_rate), _key(moved)
            assert abs(moved.log_joint - math.log(law[arrival])) < EXACT and float(info.lp) == moved.log_joint
            matrix[order[key], order[arrival]] += weight * rate
            matrix[order[key], order[key]] += weight * (1.0 - rate)
            if weight and arrival != key and rate < 1.0 - 1e-9:
                decision[0] = rate * (1 + SIDE)
                assert SCRIPT.replayed(step)[0] is trace
                decision[0] = rate * (1 - SIDE)
                assert _key(SCRIPT.replayed(step)[0]) == arrival
                decision[0] = 0.0
    weights = tensor([*law.values()])
    return matrix, weights / weights.sum()


def assert_traces_have_their_matrix(redrawn: float, patch: pytest.MonkeyPatch) -> None:
    matrix, law = trace_matrix(redrawn, patch)
    assert float((matrix.sum(1) - 1.0).abs().max()) < EXACT
    assert float(markov.imbalance(matrix, law)) < EXACT
    assert float(markov.total_variation(law @ matrix, law)) < EXACT
    assert torch.allclose(markov.stationary(matrix), law, rtol=0.0, atol=1e-11)  # so that it reaches every trace


@pytest.mark.parametrize("redrawn", quick([0.0, 0.1, 1.0], (0.1,)))
def test_the_kernel_has_its_exact_transition_matrix(
    redrawn: float, inside_a_run: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_traces_have_their_matrix(redrawn, monkeypatch)


# ------------------------------------------------------------------------------------------------- what it returns
def test_same_seed_same_draws_and_the_callers_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (prior(chains=2, warmup=5, draws=30).fit(sums, tensor(2.0)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    other = prior(chains=2, warmup=5, draws=30, seed=1).fit(sums, tensor(2.0))
    assert all(torch.equal(first.draws[name].nan_to_num(), second.draws[name].nan_to_num()) for name in first.draws)
    assert not torch.equal(first.draws["k"], other.draws["k"])


def test_thinned_draws_are_some_of_all_draws() -> None:
    every, some = (prior(chains=2, warmup=4, draws=n, thin=t).fit(flips, tensor(1.0)) for n, t in ((30, 1), (10, 3)))
    assert torch.equal(some.draws["flip_0"], every.draws["flip_0"][:, 2::3])
    assert torch.equal(some.stats["lp"], every.stats["lp"][:, 2::3])
    rates = every.stats["acceptance_rate"].unflatten(1, (10, 3)).mean(-1)
    assert torch.allclose(some.stats["acceptance_rate"], rates)
    assert every.history["lp"].shape == (34, 2)
    assert torch.equal(every.history["lp"][4:].T, every.stats["lp"])


def test_draws_are_padded_to_the_largest_shape() -> None:
    one = {"a": torch.tensor(3), "b": tensor([1.0, 2.0]), "d": torch.tensor(1)}
    two = {"a": torch.tensor(4), "b": tensor([5.0]), "c": torch.tensor([[7, 8]]), "d": torch.tensor([2, 3])}
    found = ragged([one, two])
    assert found["a"].dtype == torch.int64 and found["a"].tolist() == [3, 4]
    nan = math.nan
    for name, expected in {
        "b": [[1.0, 2.0], [5.0, nan]],
        "c": [[[nan, nan]], [[7.0, 8.0]]],
        "d": [[1, nan], [2, 3]],
    }.items():
        assert torch.equal(found[name].nan_to_num(-1.0), tensor(expected).nan_to_num(-1.0)), name
    for i, row in enumerate((one, two)):
        assert all(torch.equal(corner(found[name][i], value.shape).to(value.dtype), value) for name, value in row.items())


def test_what_is_always_there_keeps_its_type_and_what_is_not_floats() -> None:
    def program(y: Tensor) -> None:
        always = pyro.sample("always", dist.Categorical(torch.ones(3)))
        if always > 0:
            always = always + pyro.sample("sometimes", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(always.to(y), 1.0), obs=y)

    posterior = prior(chains=2, warmup=2, draws=50).fit(program, tensor(0.7))
    assert posterior.draws["always"].dtype == torch.int64 and posterior.draws["sometimes"].dtype == torch.float64
    assert posterior.log_likelihood()["y"].isfinite().all() and posterior.predict()["y"].isfinite().all()
    assert posterior.point()["always"].dtype == torch.int64


def test_a_point_is_of_the_draws_that_have_the_site(optional_fit: Posterior) -> None:
    point, mu = optional_fit.point(), optional_fit.draws["mu"]
    assert float(point["mu"]) == pytest.approx(float(mu[~mu.isnan()].mean()))
    assert float(point["b"]) == float(optional_fit.draws["b"].flatten().median())


def test_absent_sites_are_no_finding(optional_fit: Posterior) -> None:
    assert not any("NaN" in finding or "never moved" in finding for finding in optional_fit.diagnose())
    always = Posterior(draws=dict(optional_fit.draws), info={**optional_fit.info, "structure": "fixed"})
    assert any("NaN" in finding for finding in always.diagnose())  # which they would be of a program that has its sites


def test_chains_that_disagree_about_a_site_are_a_finding(optional_fit: Posterior) -> None:
    mu = optional_fit.draws["mu"].clone()
    mu[:4] = torch.nan
    broken = Posterior(draws={"mu": mu}, info=optional_fit.info)
    assert any(finding.startswith("R-hat of 'size of mu'") for finding in broken.diagnose())


@pytest.mark.slow
def test_the_log_likelihood_is_that_of_each_draw(optional_fit: Posterior) -> None:
    found = optional_fit.log_likelihood()["y"]
    mean = optional_fit.draws["twice"] / 2.0
    assert torch.allclose(found, dist.Normal(mean.unsqueeze(-1), 1.0).log_prob(Y), rtol=0.0, atol=EXACT)
    b, mu = optional_fit.draws["b"], optional_fit.draws["mu"]
    log_prior = torch.where(b == 1.0, math.log(0.6) + dist.Normal(0.0, 1.0).log_prob(mu.nan_to_num()), math.log(0.4))
    assert torch.allclose(optional_fit.stats["lp"], log_prior + found.sum(-1), rtol=0.0, atol=1e-10)


@pytest.mark.slow
def test_predictions_follow_the_structure_of_each_draw(optional_fit: Posterior) -> None:
    """Residuals of predictions are standard normal: their mean and square, two checks of ``assert_agrees``."""
    mean = (optional_fit.draws["twice"] / 2.0).unsqueeze(-1)
    residuals = optional_fit.predict()["y"] - mean
    assert residuals.shape == (8, 400, 3)
    assert_agrees(residuals.mean(-1), 0.0)
    assert_agrees(residuals.square().mean(-1), 1.0)
    assert optional_fit.predict(torch.zeros(5))["y"].shape == (8, 400, 5)
    assert torch.equal(optional_fit.predict()["y"] - mean, residuals)


def test_an_observation_that_comes_and_goes_is_nan_where_it_is_not() -> None:
    def program(y: Tensor) -> None:
        b = pyro.sample("b", dist.Bernoulli(0.5))
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("near" if b else "far", dist.Normal(mu, 1.0 if b else 3.0), obs=y)

    posterior = prior(chains=2, warmup=5, draws=100).fit(program, tensor(2.0))
    b, mu = posterior.draws["b"], posterior.draws["mu"]
    found = posterior.log_likelihood()
    assert torch.equal(found["near"].isnan(), b == 0.0) and torch.equal(found["far"].isnan(), b == 1.0)
    expected = dist.Normal(mu, torch.where(b == 1.0, 1.0, 3.0)).log_prob(tensor(2.0))
    assert torch.allclose(found["near"].nan_to_num() + found["far"].nan_to_num(), expected)
    assert torch.equal(posterior.predict()["near"].isnan(), b == 0.0)


def test_what_was_fitted_exports_and_comes_back(optional_fit: Posterior, tmp_path: Any) -> None:
    posterior = prior(chains=2, warmup=5, draws=60).fit(sums, tensor(2.0))
    exported = posterior.to_arviz(prior=7, posterior_predictive=True)
    assert exported.posterior["m"].dims == ("chain", "draw", "terms")
    assert exported.prior["m"].shape[:2] == (1, 7) and exported.log_likelihood["y"].shape == (2, 60)
    summary = az.summary(optional_fit.to_arviz())
    assert float(summary.loc["b", "mean"]) == pytest.approx(float(optional_fit.draws["b"].mean()), abs=0.01)
    posterior.save(tmp_path / "saved")
    loaded = Posterior.load(tmp_path / "saved", sums, tensor(2.0))
    assert all(torch.equal(loaded.draws[n].nan_to_num(), posterior.draws[n].nan_to_num()) for n in posterior.draws)
    assert torch.equal(loaded.predict()["y"], posterior.predict()["y"])
    assert loaded.diagnose() == posterior.diagnose() and loaded.plan["m"].update == "Prior"


def test_the_plan_says_how_sites_are_updated(optional_fit: Posterior) -> None:
    assert optional_fit.plan is not None and {*optional_fit.plan} == {"b", "mu"}
    assert optional_fit.plan["mu"].update == "Prior"
    rate = float(optional_fit.stats["acceptance_rate"].mean())
    assert optional_fit.plan["mu"].acceptance == pytest.approx(rate)
    assert optional_fit.info["backend"] == "MetropolisHastings" and "Prior()" in optional_fit.info["config"]["proposal"]


# --------------------------------------------------------------------------------------------------------- options
def test_kept_sites_are_kept_and_unknown_ones_are_told() -> None:
    options: dict[str, Any] = {"chains": 2, "warmup": 2, "draws": 20}
    posterior = prior(**options, keep=["mu", "nowhere"]).fit(optional, Y)
    assert list(posterior.draws) == ["mu"]
    assert any("keep= names 'nowhere', but no draw has such a site." in finding for finding in posterior.diagnose())
    with pytest.raises(ValueError, match="needs the draws of 'b', which were not kept"):
        posterior.log_likelihood()
    with pytest.raises(ValueError, match="needs the draws of 'b', which were not kept"):
        posterior.predict()


def test_sites_that_would_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.buffers.LARGEST", 2 * 20 * 8 * 3)
    posterior = prior(chains=2, warmup=2, draws=20).fit(sums, tensor(6.0))
    assert "m" not in posterior.draws and "k" in posterior.draws
    assert any("The draws of 'm' would take" in finding for finding in posterior.diagnose())


@pytest.mark.parametrize("kept", [1, 7])
def test_draws_so_far_are_returned_when_stopped(kept: int) -> None:
    def press(step: int, info: Any) -> None:
        if step == 4 + kept - 1:
            raise KeyboardInterrupt

    whole = prior(chains=2, warmup=4, draws=20).fit(flips, tensor(2.0))
    stopped = prior(chains=2, warmup=4, draws=20, callbacks=(press,)).fit(flips, tensor(2.0))
    assert torch.equal(stopped.draws["flip_0"], whole.draws["flip_0"][:, :kept])
    assert any(f"Stopped by Ctrl-C after {kept} of 20 draws." in finding for finding in stopped.diagnose())
    ended = prior(chains=2, warmup=4, draws=20, callbacks=(lambda step, info: step == 4 + kept - 1,)).fit(flips, tensor(2.0))
    assert ended.draws["flip_0"].shape == (2, kept)


def test_warm_up_is_kept_where_it_is_asked_for() -> None:
    backend = prior(chains=2, warmup=9, draws=20)
    kept = prior(chains=2, warmup=9, draws=20, keep_warmup=True).fit(sums, tensor(2.0))
    assert kept.warmup_draws["k"].shape == (2, 9)
    assert torch.equal(kept.draws["k"], backend.fit(sums, tensor(2.0)).draws["k"])
    kept.to_arviz(warmup=True)


def test_chains_start_where_they_are_told() -> None:
    backend = prior(chains=2, warmup=0, draws=1, start={"k": torch.tensor([1.0, 2.0]), "m": torch.full((3,), 0.25)})
    program = Program(sums, (tensor(0.5),), is_fixed=False)
    state = backend.changing.init(program)  # type: ignore[union-attr]
    assert [trace.choices["k"].value.tolist() for trace in state.traces] == [1.0, 2.0]
    assert [trace.choices["m"].value.tolist() for trace in state.traces] == [[0.25] * 2, [0.25] * 3]
    fitted = prior(chains=2, warmup=5, draws=5).fit(sums, tensor(2.0))
    state = prior(chains=2, start=fitted).changing.init(program)  # type: ignore[union-attr]
    for i, trace in enumerate(state.traces):
        last = fitted.draws["m"][i, -1]
        assert torch.equal(trace.choices["m"].value, last[~last.isnan()])
    with pytest.raises(ValueError, match="start= gives 'n' a value for which no run of sums had a use"):
        prior(chains=2, start={"n": 1.0}).fit(sums, tensor(0.5))
    with pytest.raises(TypeError, match="start= must map sites to values"):
        prior(chains=2, start=3.0).fit(sums, tensor(0.5))


def test_a_fixed_structure_keeps_its_own_kernel() -> None:
    def program(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    posterior = prior(chains=2, warmup=2, draws=5).fit(program, tensor(0.5))
    assert posterior.info["structure"] == "fixed" and "log_weight" in posterior.stats


@pytest.mark.slow
def test_a_site_too_rare_to_be_seen_is_found_on_the_way() -> None:
    """P(far | y) by quadrature, where the prior has it once in 700 runs: one check of ``assert_agrees``."""

    def program(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        far = pyro.sample("far", dist.Normal(3.0, 1.0)) if level > 3.0 else torch.tensor(0.0)
        pyro.sample("y", dist.Normal(level + far, 1.0), obs=y)

    y = 5.5
    assert "far" not in Program(program, (tensor(y),), is_fixed=False).latents
    posterior = prior(chains=8, warmup=200, draws=500, thin=2).fit(program, tensor(y))
    levels = np.linspace(-8.0, 8.0, 16001)
    weights = scipy.stats.norm.pdf(levels)
    weights *= np.where(
        levels > 3.0, scipy.stats.norm(levels + 3.0, math.sqrt(2.0)).pdf(y), scipy.stats.norm(levels, 1.0).pdf(y)
    )
    exact = trapezoid(weights * (levels > 3.0), levels) / trapezoid(weights, levels)
    assert posterior.plan is not None and "far" in posterior.plan
    assert_agrees(~posterior.draws["far"].isnan(), exact)
    assert torch.equal(posterior.draws["far"].isnan(), posterior.draws["level"] <= 3.0)


# ------------------------------------------------------------------------------------------------------- refusals
OTHERS: dict[str, Any] = {
    "Gibbs": Gibbs(progress=False),
    "MetropolisHastings": MetropolisHastings(progress=False),
    "Langevin": MetropolisHastings(proposal=Langevin(), progress=False),
    "HMC": HMC(progress=False),
    "NUTS": NUTS(progress=False),
    "SVI": SVI(progress=False),
    "EM": EM(progress=False),
}
CHANGING: dict[Callable[..., None], str] = {
    optional: "Site 'mu' appears only in some runs of optional, but this back-end needs each site on every run.",
    flips: "Site 'flip_1' appears only in some runs of flips, but this back-end needs each site on every run.",
    sums: r"The shape of 'm' changes from run to run of sums, such as from \(1,\) to \(2,\), but this back-end needs",
    nested: "The support of 'x' depends on other latent sites.",
}


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("program", CHANGING, ids=lambda program: program.__name__)
def test_other_back_ends_refuse_a_structure_that_changes(backend: str, program: Callable[..., None]) -> None:
    with pytest.raises(Unsupported, match=CHANGING[program] + r".* Use MetropolisHastings\(proposal=Prior\(\)\)\."):
        OTHERS[backend].fit(program, tensor([1.0]))


def improper(y: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(0.5))
    level = pyro.sample("level", dist.ImproperUniform(constraints.real, (), ())) if b else torch.tensor(0.0)
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def masked(y: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(0.5))
    level = pyro.sample("level", dist.Normal(0.0, 1.0).mask(False)) if b else torch.tensor(0.0)
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def hidden_by_mask(y: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(0.5))
    with poutine.mask(mask=torch.tensor(False)):
        level = pyro.sample("level", dist.Normal(0.0, 1.0)) if b else torch.tensor(0.0)
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def two_kinds(y: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(0.5))
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y if b else None)


def chance(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    if torch.rand(()) < 0.5:
        pyro.sample("extra", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def impossible(y: Tensor) -> None:
    b = pyro.sample("b", dist.Bernoulli(0.5))
    level = pyro.sample("level", dist.Normal(0.0, 1.0)) if b else torch.tensor(0.0)
    pyro.factor("never", level - torch.inf)


def test_a_calibration_refuses_a_structure_that_changes() -> None:
    with pytest.raises(Unsupported, match="The structure of optional changes from run to run, but a calibration"):
        calibration.sbc(optional, prior(), Y)


def test_leave_one_out_takes_the_draws_as_they_are(optional_fit: Posterior) -> None:
    assert math.isfinite(float(calibration.psis(optional_fit).estimate))


REFUSED: dict[Callable[..., None], tuple[type[Exception], str]] = {
    improper: (Unsupported, "that of 'level' is improper"),
    masked: (Unsupported, "'level' is masked"),
    hidden_by_mask: (Unsupported, "'level' is masked"),
    two_kinds: (Unsupported, "Site 'y' of two_kinds is latent in some runs, and observed in others"),
    chance: (Unsupported, "chance has hidden randomness"),
    impossible: (ValueError, "impossible has no finite log-density at any of 256 starting points"),
}


@pytest.mark.parametrize("program", REFUSED, ids=lambda program: program.__name__)
def test_what_cannot_work_is_refused_with_a_sentence(program: Callable[..., None]) -> None:
    kind, sentence = REFUSED[program]
    with pytest.raises(kind, match=sentence):
        prior().fit(program, tensor(1.0))
