"""Calibration: right samplers pass, wrong ones do not, and the tests themselves err as often as they say."""

from __future__ import annotations

import itertools
import logging
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions import constraints
from torch import Tensor

from inference import (
    HMC,
    NUTS,
    SVI,
    Draw,
    Gibbs,
    Langevin,
    MetropolisHastings,
    Posterior,
    Prior,
    Unsupported,
    arviz,
    calibration,
)
from inference.calibration import geweke, psis, sbc, score_test, uniformity
from inference.calibration.geweke import differences
from inference.density import Density
from inference.mcmc import (
    HamiltonianAdaptation,
    HamiltonianKernel,
    RandomWalkAdaptation,
    RandomWalkInfo,
    RandomWalkKernel,
    RandomWalkState,
)
from inference.program import Program
from inference.simulation import simulate
from zoo import BY_NAME

COUNTS = torch.zeros(2, dtype=torch.float64)


def rates(counts: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(counts.new_tensor(2.0), 0.5))
    with pyro.plate("rows", len(counts)):
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


# ------------------------------------------------------------------------------------- the test statistic
@pytest.mark.parametrize("gamma", [1e-3, 0.05, 0.3, 0.8])
def test_the_p_value_of_gamma_is_that_of_all_arrangements(gamma: float) -> None:
    """Four values fall into five cells: 625 equally likely arrangements, of which some stay inside."""
    points, count = 5, 4
    z = np.arange(1, points) / points
    outside = 0
    for cells in itertools.product(range(points), repeat=count):
        below = np.array([(np.array(cells) < i).sum() for i in range(1, points)])
        tail = 2 * np.minimum(scipy.stats.binom.cdf(below, count, z), scipy.stats.binom.sf(below - 1, count, z))
        outside += bool(tail.min() <= gamma)
    assert uniformity.p_value(gamma, count, points) == pytest.approx(outside / points**count, abs=1e-12)


def test_gamma_is_the_least_tail_probability_of_the_counts() -> None:
    values = np.array([0.05, 0.1, 0.15, 0.2, 0.35, 0.9])
    tails = [
        2 * min(scipy.stats.binom.cdf(n, 6, z), scipy.stats.binom.sf(n - 1, 6, z))
        for z, n in ((0.25, 4), (0.5, 5), (0.75, 5))
    ]
    assert uniformity.gamma(values, 4) == pytest.approx(min(tails), abs=1e-14)


def test_the_band_is_left_as_often_as_it_says() -> None:
    """4,000 sets of 200 uniform values under a 90 % band; a standard error is 0.0047, so 4 of them: one failure in 10⁴.

    The band is the narrowest whose level is at least 90 %, so that it may be left less often, by one possible γ.
    """
    sets, count, points = 4000, 200, 40
    values = np.random.default_rng(0).random((sets, count))
    critical = uniformity.critical(0.9, count, points)
    exact = uniformity.p_value(critical, count, points)
    share = np.mean([uniformity.gamma(row, points) <= critical for row in values])
    assert 0.08 < exact <= 0.1
    assert abs(share - exact) < 4.0 * math.sqrt(0.1 * 0.9 / sets)


def test_ranks_that_are_not_uniform_leave_the_band() -> None:
    generator = np.random.default_rng(1)
    for values in (generator.beta(1.7, 1.7, 1000), generator.beta(0.6, 0.6, 1000), generator.beta(1.0, 1.5, 1000)):
        assert uniformity.p_value(uniformity.gamma(values, 100), 1000, 100) < 1e-3


# ------------------------------------------------------------------------------------- what a program draws
FAMILIES: dict[str, tuple[Callable[[], Any], Any]] = {
    "Normal": (lambda: dist.Normal(1.0, 2.0), scipy.stats.norm(1.0, 2.0)),
    "Exponential": (lambda: dist.Exponential(2.0), scipy.stats.expon(scale=0.5)),
    "HalfCauchy": (lambda: dist.HalfCauchy(2.0), scipy.stats.halfcauchy(scale=2.0)),
    "StudentT": (lambda: dist.StudentT(3.0, 1.0, 2.0), scipy.stats.t(3.0, 1.0, 2.0)),
    "Gamma": (lambda: dist.Gamma(0.7, 2.0), scipy.stats.gamma(0.7, scale=0.5)),
    "InverseGamma": (lambda: dist.InverseGamma(3.0, 2.0), scipy.stats.invgamma(3.0, scale=2.0)),
    "Beta": (lambda: dist.Beta(0.7, 2.0), scipy.stats.beta(0.7, 2.0)),
    "Dirichlet": (lambda: dist.Dirichlet(torch.tensor([0.7, 1.0, 2.0])), scipy.stats.beta(0.7, 3.0)),
    "MultivariateNormal": (lambda: dist.MultivariateNormal(torch.ones(2), 4.0 * torch.eye(2)), scipy.stats.norm(1.0, 2.0)),
    "Uniform": (lambda: dist.Uniform(-1.0, 3.0), scipy.stats.uniform(-1.0, 4.0)),
    "Poisson": (lambda: dist.Poisson(3.0), scipy.stats.poisson(3.0)),
    "Binomial": (lambda: dist.Binomial(7, 0.3), scipy.stats.binom(7, 0.3)),
    "NegativeBinomial": (lambda: dist.NegativeBinomial(4.0, torch.tensor(0.3)), scipy.stats.nbinom(4, 0.7)),
    "Categorical": (lambda: dist.Categorical(torch.ones(3)), scipy.stats.randint(0, 3)),
    "Multinomial": (lambda: dist.Multinomial(7, torch.tensor([0.3, 0.5, 0.2])), scipy.stats.binom(7, 0.3)),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("inside_a_run")
def test_rows_are_drawn_at_once_and_independently(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """First elements of 2,000 rows by Kolmogorov's test (conservative for counts) or χ²: one failure in 10⁴ each."""
    make, reference = FAMILIES[family]

    def program(y: Tensor) -> None:
        pyro.sample("latent", make())
        with pyro.plate("rows", 2):
            pyro.sample("y", make(), obs=y)

    shape = make().event_shape
    looked = Program(program, (make().expand([2]).sample(),))
    with caplog.at_level(logging.INFO, "inference"):
        drawn = simulate(looked, {}, 2000)
    assert "one after the other" not in caplog.text
    assert drawn["y"].shape == (2000, 2, *shape) and drawn["latent"].shape == (2000, *shape)
    columns = [drawn["latent"], drawn["y"][:, 0], drawn["y"][:, 1]]
    first = [column.double().reshape(2000, -1)[:, 0].numpy() for column in columns]
    for column in first:
        assert scipy.stats.kstest(column, reference.cdf).pvalue > 1e-4 or _chi2(column, reference) > 1e-4
    for left, right in itertools.combinations(first, 2):
        assert abs(scipy.stats.spearmanr(left, right).statistic) < 4.0 / math.sqrt(2000)


def _chi2(values: np.ndarray, reference: Any) -> float:
    if not hasattr(reference, "pmf"):
        return 0.0
    kinds = np.arange(int(values.max()) + 1)
    expected = len(values) * reference.pmf(kinds)
    kept = expected > 5
    observed = np.array([(values == kind).sum() for kind in kinds[kept]])
    expected = expected[kept]
    return float(scipy.stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.usefixtures("inside_a_run")
def test_data_are_drawn_given_the_latents_of_their_row() -> None:
    program = Program(rates, (COUNTS,))
    rate = torch.linspace(1.0, 100.0, 500, dtype=torch.float64)
    counts = simulate(program, {"rate": rate}, 500)["counts"]
    z = (counts.mean(1) - rate) / (rate / 2).sqrt()
    assert abs(float(z.mean())) < 4.0 / math.sqrt(500) and abs(float(z.var()) - 1.0) < 4.0 * math.sqrt(2.0 / 500)


# ------------------------------------------------------------------------------------- data of their own
@pytest.mark.parametrize("name", ["normal_variance", "regression_event", "hierarchical", "mixture", "coal"])
@pytest.mark.usefixtures("inside_a_run")
def test_replicated_data_give_the_density_of_a_program_with_those_data(name: str) -> None:
    """log p(z, y) and log p(y) of three replicates of two chains each, against three programs."""
    instance = BY_NAME[name]
    program = Program(instance.program, instance.data)
    (observed,) = program.observed
    data = simulate(program, {}, 3)[observed]
    replicated = program.replicate({observed: data}, groups=3)
    values = {name: torch.stack([draw] * 6) for name, draw in program.sample_prior().items()}
    values |= replicated.chain_data(6)
    others = {name: value for name, value in values.items() if name not in program.finite}
    density = Density(replicated, rung="vmapped")
    joint, marginal = density.joint(values), density.marginal(program.finite)(others)
    place = next(i for i, leaf in enumerate(program.data) if torch.equal(leaf.double(), program.observed[observed].double()))
    for chain in range(6):
        arguments = [data[chain // 2] if i == place else leaf for i, leaf in enumerate(program.data)]
        alone = Density(Program(instance.program, tuple(arguments)), rung="vmapped")
        latents = {name: values[name][:1] for name in program.latents}
        torch.testing.assert_close(joint[chain], alone.joint(latents)[0], rtol=1e-12, atol=1e-10)
        latents = {name: value for name, value in latents.items() if name not in program.finite}
        torch.testing.assert_close(marginal[chain], alone.marginal(program.finite)(latents)[0], rtol=1e-12, atol=1e-10)


def test_only_observed_sites_have_data_to_replicate() -> None:
    with pytest.raises(ValueError, match="'rate' is no observed site of rates; those are counts"):
        Program(rates, (COUNTS,)).replicate({"rate": torch.ones(3)})


# ------------------------------------------------------------------------------------- groups of chains
GROUPS, MEMBERS, WIDTH = 3, 4, 2


def quadratic(position: Tensor) -> tuple[Tensor, Tensor]:
    precision = torch.tensor([1.0, 9.0])
    return -position * precision, -0.5 * (position.square() * precision).sum(-1)


@pytest.mark.usefixtures("inside_a_run")
def test_trajectories_of_a_group_are_those_of_its_own_kernel() -> None:
    """Groups with other step sizes, lengths (so other numbers of steps) and scales; all against each one's kernel."""
    position = torch.randn(GROUPS * MEMBERS, WIDTH)
    step_size, length = torch.tensor([0.1, 0.3, 0.7]), torch.tensor([2.0, 1.0, 0.2])
    scale, one = torch.rand(GROUPS, 1, WIDTH) + 0.5, torch.ones(())
    grouped = HamiltonianKernel(step_size, length, scale, 0.9 * one)
    torch.manual_seed(0)
    state, info = grouped.step(grouped.init(position, quadratic), quadratic)
    assert info.n_steps.reshape(GROUPS, MEMBERS)[:, 0].tolist() == [18, 3, 1]
    for group in range(GROUPS):
        alone = HamiltonianKernel(step_size[group], length[group], scale[group, 0], 0.9 * one)
        torch.manual_seed(0)
        expected, told = alone.step(alone.init(position, quadratic), quadratic)
        rows = slice(group * MEMBERS, (group + 1) * MEMBERS)
        for ours, theirs in zip((*state, *info), (*expected, *told), strict=True):
            torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("inside_a_run")
def test_steps_of_a_group_are_those_of_its_own_walk() -> None:
    position = torch.randn(GROUPS * MEMBERS, WIDTH)
    scale = torch.tensor([0.1, 0.5, 2.0])
    for factor in (torch.randn(GROUPS, WIDTH, WIDTH).tril(), torch.rand(GROUPS, 1, WIDTH)):
        grouped = RandomWalkKernel(scale, factor)
        torch.manual_seed(0)
        state, _ = grouped.step(grouped.init(position, lambda q: quadratic(q)[1]), lambda q: quadratic(q)[1])
        for group in range(GROUPS):
            alone = RandomWalkKernel(scale[group], factor[group].squeeze(0))
            torch.manual_seed(0)
            expected, _ = alone.step(alone.init(position, lambda q: quadratic(q)[1]), lambda q: quadratic(q)[1])
            rows = slice(group * MEMBERS, (group + 1) * MEMBERS)
            torch.testing.assert_close(state.position[rows], expected.position[rows], rtol=1e-12, atol=1e-12)


def _of_group(value: Any, group: int) -> Any:
    """The part of a nested tuple of tensors that concerns one group."""
    if isinstance(value, Tensor):
        if value.dim() and len(value) == GROUPS * MEMBERS:
            return value[group * MEMBERS : (group + 1) * MEMBERS]
        return value[group].squeeze(0) if value.dim() and len(value) == GROUPS else value
    return type(value)(*(_of_group(part, group) for part in value))


def _assert_same(left: Any, right: Any) -> None:
    if isinstance(left, Tensor):
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)
        return
    for name in left._fields:
        if name == "jumps":  # the groups come last
            continue
        _assert_same(getattr(left, name), getattr(right, name))


@pytest.mark.usefixtures("inside_a_run")
def test_a_group_learns_what_it_would_learn_alone() -> None:
    """Forty moves of groups on targets of unlike scales, each watched by the adaptation of all and by one of its own."""
    widths = torch.tensor([0.1, 1.0, 10.0]).repeat_interleave(MEMBERS)[:, None]

    def density(position: Tensor) -> tuple[Tensor, Tensor]:
        return -position / widths**2, -0.5 * (position / widths).square().sum(-1)

    position = torch.randn(GROUPS * MEMBERS, WIDTH) * widths
    one = torch.ones(())
    state = HamiltonianKernel(one, one, torch.ones(WIDTH), one).init(position, density)
    together: Any = HamiltonianAdaptation.start(state, density, GROUPS)
    alone = [_of_group(together, group)._replace(jumps=torch.zeros(2)) for group in range(GROUPS)]
    for _ in range(40):
        moved, info = together.kernel(is_final=False, most_steps=50).step(state, density)
        for group in range(GROUPS):
            parts = [_of_group(part, group) for part in (state, moved, info)]
            alone[group] = alone[group].update(*parts, 40, 0.8)
        together, state = together.update(state, moved, info, 40, 0.8), moved
        for group in range(GROUPS):
            _assert_same(alone[group], _of_group(together._replace(jumps=torch.zeros(())), group))
    assert (together.scale[2] > 10 * together.scale[0]).all()

    walk = RandomWalkState(position, density(position)[1])
    shared: Any = RandomWalkAdaptation.like(position, GROUPS)
    own = [RandomWalkAdaptation.like(position[:MEMBERS]) for _ in range(GROUPS)]
    for _ in range(40):
        walk, told = shared.kernel.step(walk, lambda q: density(q)[1])
        for group in range(GROUPS):
            rows = slice(group * MEMBERS, (group + 1) * MEMBERS)
            here = RandomWalkState(walk.position[rows], walk.log_density[rows])
            own[group] = own[group].update(here, RandomWalkInfo(told.acceptance_rate[rows], told.accepted[rows]), 40)
        shared = shared.update(walk, told, 40)
        for group in range(GROUPS):
            _assert_same(own[group], _of_group(shared, group))


# ------------------------------------------------------------------------------------- samplers, right and wrong
@dataclass(frozen=True, kw_only=True)
class Closed(Gibbs):
    """Draws the rate from Gamma(2 + Σ counts + ``extra``, 0.5 + n), with ``extra`` 0 its posterior; or from the prior."""

    extra: float = 0.0
    sees_data: bool = True

    def init(self, program: Program) -> Any:
        return torch.ones(self.chains, dtype=torch.float64)

    def step(self, state: Any, program: Program) -> Any:
        return state, None

    def sample(self, state: Any, program: Program) -> Any:
        counts = program.chain_data(self.chains)["counts"]
        a, b = (2.0 + counts.sum(1) + self.extra, 0.5 + counts.shape[1]) if self.sees_data else (0 * counts[:, 0] + 2.0, 0.5)
        rate = torch._standard_gamma(a) / b
        return rate, Draw({"rate": rate}, {})

    def moved(self, state: Any, values: Mapping[str, Tensor], program: Program) -> Any:
        return values["rate"]


@dataclass(frozen=True, kw_only=True)
class WithoutJacobian(MetropolisHastings):
    """Samples log rate as if it had the density of the rate."""

    def _parts(self, program: Program) -> Any:
        coordinates, density = super()._parts(program)
        log_jacobian = torch.func.vmap(coordinates.log_jacobian)
        return coordinates, lambda position: density(position) - log_jacobian(position)


@dataclass(frozen=True, kw_only=True)
class Tempered(HMC):
    """Samples the density to the power of a half."""

    def _parts(self, program: Program) -> Any:
        coordinates, density = super()._parts(program)

        def tempered(position: Tensor) -> tuple[Tensor, Tensor]:
            gradient, value = density(position)
            return 0.5 * gradient, 0.5 * value

        return coordinates, tempered


QUIET: dict[str, Any] = {"seed": 0, "progress": False}
RIGHT: dict[str, Any] = {
    "exact": Closed(chains=1, warmup=0, draws=60, **QUIET),
    "Gibbs": Gibbs(chains=2, warmup=5, draws=20, **QUIET),
    "MetropolisHastings": MetropolisHastings(chains=2, warmup=100, draws=30, thin=4, **QUIET),
    "HMC": HMC(chains=2, warmup=40, draws=30, most_steps=8, **QUIET),
    "NUTS": NUTS(chains=2, warmup=40, draws=40, max_depth=3, **QUIET),
    "Langevin": MetropolisHastings(proposal=Langevin(), chains=2, warmup=80, draws=30, thin=2, **QUIET),
    "Prior": MetropolisHastings(proposal=Prior(), chains=2, warmup=20, draws=30, thin=4, **QUIET),
}
WRONG: dict[str, Any] = {
    "one event too many": Closed(chains=1, warmup=0, draws=60, extra=1.0, **QUIET),
    "data neglected": Closed(chains=1, warmup=0, draws=60, sees_data=False, **QUIET),
    "Jacobian dropped": WithoutJacobian(chains=2, warmup=100, draws=30, thin=4, **QUIET),
    "tempered": Tempered(chains=2, warmup=40, draws=30, most_steps=8, **QUIET),
}


@pytest.mark.parametrize("sampler", RIGHT)
def test_a_right_sampler_is_calibrated(sampler: str) -> None:
    """Level 99.9 %: one failure in a thousand, at a fixed seed."""
    result = sbc(rates, RIGHT[sampler], COUNTS, replicates=300)
    assert result.passed, result
    assert result.quantities == ("rate", "log_joint", "log_likelihood")
    assert result.pit.shape == (300, 3) and result.ranks.max() <= result.draws
    assert not result.findings


@pytest.mark.parametrize("sampler", WRONG)
def test_a_wrong_sampler_is_not_calibrated(sampler: str) -> None:
    result = sbc(rates, WRONG[sampler], COUNTS, replicates=400)
    assert not result.passed, result


def test_ranks_among_exact_draws_are_uniform_also_of_counts_with_ties() -> None:
    """Three exact draws leave four ranks; χ² with three degrees of freedom: one failure in 10⁴ each."""
    own = {"halves": lambda values: (2.0 * values["rate"]).floor()}
    result = sbc(rates, Closed(chains=1, warmup=0, draws=3, **QUIET), COUNTS, replicates=1000, thin=1, quantities=own)
    assert result.draws == 3 and result.thin == 1
    assert any("near independent" in finding for finding in result.findings)
    for column in result.ranks.T:
        assert scipy.stats.chisquare(np.bincount(column, minlength=4)).pvalue > 1e-4


@pytest.mark.parametrize("sampler", RIGHT)
def test_a_right_sampler_keeps_the_joint_distribution(sampler: str) -> None:
    """Level 99.9 %: one failure in a thousand, at a fixed seed."""
    result = geweke(rates, RIGHT[sampler], COUNTS, chains=200, iterations=20)
    assert result.passed, result
    assert result.successive.shape == (200, 20, 5) and result.marginal.shape == (800, 5)


@pytest.mark.parametrize("sampler", WRONG)
def test_a_wrong_sampler_leaves_the_joint_distribution(sampler: str) -> None:
    result = geweke(rates, WRONG[sampler], COUNTS, chains=300, iterations=30)
    assert not result.passed, result


def test_what_neglects_the_data_is_seen_in_the_likelihood_alone() -> None:
    """Latents from the prior and data given them are right, each by itself and both together, but not in turns."""
    result = geweke(rates, WRONG["data neglected"], COUNTS, chains=300, iterations=30)
    assert result.is_equal[:, result.quantities.index("rate")].all()
    assert not result.is_equal[:, result.quantities.index("log_likelihood")].all()


def test_errors_of_geweke_are_standard_errors() -> None:
    """z of 200 comparisons of AR(1) chains with the right marginal: mean square 1 within 4 standard errors of 0.1.

    Heavy tails (Cauchy) do not matter, since ranks are compared.
    """
    generator = np.random.default_rng(0)
    squares = []
    for _ in range(200):
        chains = np.empty((50, 20))
        chains[:, 0] = generator.normal(size=50)
        for i in range(1, 20):
            chains[:, i] = 0.8 * chains[:, i - 1] + 0.6 * generator.normal(size=50)
        cauchy = scipy.stats.cauchy.ppf(scipy.stats.norm.cdf(chains))
        squares.append(differences(generator.standard_cauchy((300, 1)), cauchy[..., None])[:, 0] ** 2)
    assert np.all(np.abs(np.mean(squares, 0) - 1.0) < 0.4)


def test_replicates_may_run_a_few_at_a_time() -> None:
    result = sbc(rates, RIGHT["Gibbs"], COUNTS, replicates=60, at_once=25)
    assert result.pit.shape == (60, 3) and result.passed


def test_the_same_seed_gives_the_same_ranks() -> None:
    first, second = (sbc(rates, RIGHT["HMC"], COUNTS, replicates=30) for _ in range(2))
    np.testing.assert_array_equal(first.pit, second.pit)
    before = torch.get_rng_state()
    sbc(rates, RIGHT["exact"], COUNTS, replicates=30)
    assert torch.equal(before, torch.get_rng_state())


def test_each_replicate_learns_alone() -> None:
    """Data of unlike sizes: a step size for all would be too long for one group and too short for another."""

    def scales(y: Tensor) -> None:
        width = pyro.sample("width", dist.LogNormal(y.new_tensor(0.0), 3.0))
        mean = pyro.sample("mean", dist.Normal(0.0, width))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, width), obs=y)

    result = sbc(scales, MetropolisHastings(chains=2, warmup=300, draws=25, thin=6, **QUIET), COUNTS, replicates=200)
    assert result.passed, result


# ------------------------------------------------------------------------------------- programs of all kinds
def test_what_is_observed_need_not_be_an_argument() -> None:
    """Data are replaced at the site, so that it does not matter where the program had them from."""

    def logged(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(y.new_tensor(2.0), 0.5))
        with pyro.plate("rows", len(y)):
            pyro.sample("log", dist.Normal(rate.log(), 1.0), obs=y.exp().log())
        pyro.sample("sum", dist.Normal(rate, 1.0), obs=y.sum())

    assert sbc(logged, RIGHT["MetropolisHastings"], COUNTS, replicates=100).passed


def test_finite_sites_and_missing_data_are_calibrated_too() -> None:
    """A finite site beside a continuous one; a third of the data are masked."""
    is_seen = torch.arange(9) % 3 != 0

    def masked(y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(y)), poutine.mask(mask=is_seen):
            pyro.sample("y", dist.Normal(4.0 * weight, 1.0), obs=y)
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
        pyro.sample("x", dist.Normal(torch.tensor([-1.0, 0.0, 2.0])[kind], 1.0), obs=y[0])

    result = sbc(masked, RIGHT["Gibbs"], torch.zeros(9), replicates=100)
    assert result.passed and "kind" in result.quantities


IMPROPER: dict[str, tuple[Callable[[Tensor], Any], str]] = {}


def refused(sentence: str) -> Callable[[Callable[[Tensor], Any]], Any]:
    def add(program: Callable[[Tensor], Any]) -> Any:
        IMPROPER[program.__name__] = (program, sentence)
        return program

    return add


@refused("'mean' has a law that is improper, from which nothing can be drawn")
def flat(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.ImproperUniform(constraints.real, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@refused("pyro.factor..prior.., which changes its density")
def factored(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.factor("prior", -mean.abs())
    pyro.sample("y", dist.Normal(mean, 1.0).expand([len(y)]).to_event(1), obs=y)


@refused("blind has no observed site")
def blind(y: Tensor) -> None:
    pyro.sample("mean", dist.Normal(0.0, 1.0))


@refused("The density of 'y' is scaled")
def scaled(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with poutine.scale(scale=0.5), pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@refused("The prior of 'mean' is masked in part")
def half_masked(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        with poutine.mask(mask=torch.arange(len(y)) > 2):
            mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


@pytest.mark.parametrize("name", IMPROPER)
@pytest.mark.parametrize("test", [sbc, geweke])
def test_what_cannot_draw_its_own_data_is_refused(test: Callable[..., Any], name: str) -> None:
    program, sentence = IMPROPER[name]
    with pytest.raises(Unsupported, match=sentence):
        test(program, Gibbs(**QUIET), COUNTS)


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"replicates": 3}, ValueError, "replicates=3: must be an integer of at least 20"),
        ({"thin": 0.5}, ValueError, "thin=0.5: must be an integer"),
        ({"level": 99.9}, ValueError, "level=99.9: must lie between 0 and 1"),
        ({"sites": ["tempo"]}, ValueError, "names 'tempo', but the latent sites are rate"),
        ({"quantities": {"rate": torch.sum}}, ValueError, "gives 'rate' a meaning that it has already"),
        ({"quantities": {"odd": lambda values: values["counts"].sum()}}, ValueError, "must return one number"),
        ({"backend": SVI(**QUIET)}, Unsupported, "SVI is no sampler"),
        ({"backend": HMC}, TypeError, "A back-end is an object"),
    ],
)  # fmt: skip
def test_bad_input_is_named(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    arguments = {"backend": RIGHT["exact"], **options}
    with pytest.raises(error, match=sentence):
        sbc(rates, arguments.pop("backend"), COUNTS, **arguments)


# ------------------------------------------------------------------------------------- results
def test_results_print_plot_and_export() -> None:
    ranked = sbc(rates, RIGHT["exact"], COUNTS, replicates=50)
    compared = geweke(rates, RIGHT["exact"], COUNTS, chains=30, iterations=4)
    lines = str(ranked).splitlines()
    assert lines[0].startswith("SBC of Closed on rates: passed. 50 replicates, 60 draws each") and len(lines) == 5
    assert str(compared).startswith("Geweke's test of Closed on rates: passed. 30 chains, 4 iterations")
    z, low, high = ranked.band()
    assert (low <= z).all() and (z <= high).all() and (np.diff(low) >= 0).all()
    for result in (ranked, compared):
        assert result.plot().axes[0].get_title() in str(result)
    tree = ranked.to_arviz()
    assert tree["prior_sbc"]["rate"].shape == (1, 50)
    tree = compared.to_arviz()
    assert tree["posterior"]["mean of counts"].shape == (30, 4) and tree["prior"]["rate"].shape == (1, 120)


# ------------------------------------------------------------------------------------- importance weights
def weighted(log_weights: np.ndarray) -> Posterior:
    """An approximation with these importance weights."""
    log_p = torch.from_numpy(log_weights)[None]
    stats = {"lp": log_p, "log_q": torch.zeros_like(log_p)}
    return Posterior(draws={"x": log_p}, stats=stats, info={"kind": "variational", "backend": "SVI", "model": "pareto"})


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.9])
def test_k_hat_is_the_shape_of_pareto_weights(shape: float) -> None:
    """Weights u^−k, of which the largest 3 √S = 600 are fitted: a standard error of (1 + k) / √600, and 4 of them."""
    log_weights = -shape * np.log(np.random.default_rng(0).random(40_000))
    result = psis(weighted(log_weights))
    assert abs(float(result.pareto_k) - shape) < 4.0 * (1.0 + shape) / math.sqrt(600)
    assert result.passed == (shape < 0.7) and ("not reliable" in str(result)) == (shape > 0.7)
    body = log_weights <= np.sort(log_weights)[-700]
    np.testing.assert_allclose(result.log_weights[body], log_weights[body], rtol=0, atol=1e-9)
    assert result.log_weights.max() <= log_weights.max() + 1e-9
    if shape < 0.5:  # E u^−k = 1 / (1 − k), with a variance
        assert abs(result.estimate + math.log(1.0 - shape)) < 4.0 * result.se
        assert result.ess == pytest.approx(40_000 * (1 - 2 * shape) / (1 - shape) ** 2, rel=0.05)


def test_equal_weights_are_the_evidence() -> None:
    """An approximation that is exact up to a constant."""
    result = psis(weighted(np.full(1000, -7.5)))
    assert result.estimate == pytest.approx(-7.5, abs=1e-12) and result.se < 1e-7
    assert result.ess == pytest.approx(1000.0) and result.passed and result.pareto_k == -math.inf


def test_evidence_of_a_conjugate_program() -> None:
    """Poisson counts with a Gamma rate, weighted draws of a Gamma that is wider than the posterior; 4 standard errors."""
    counts = BY_NAME["gamma_poisson"].data[0].numpy()
    a, b = 2.0 + counts.sum(), 0.5 + len(counts)
    log_counts = scipy.special.gammaln(counts + 1.0).sum()
    evidence = 2.0 * math.log(0.5) + scipy.special.gammaln(a) - a * math.log(b) - log_counts
    guide = scipy.stats.gamma(0.7 * a, scale=1.0 / (0.65 * b))
    rate = guide.rvs(4000, random_state=np.random.default_rng(0))
    log_prior = scipy.stats.gamma(2.0, scale=2.0).logpdf(rate)
    log_joint = log_prior + scipy.stats.poisson.logpmf(counts, rate[:, None]).sum(1)
    result = psis(weighted(log_joint - guide.logpdf(rate)))
    assert result.estimand == "log evidence" and result.passed and 0.0 < result.se < 0.05
    assert abs(result.estimate - evidence) < 4.0 * result.se


def test_leave_one_out_of_a_conjugate_program() -> None:
    """Σ log p(y_i | y_−i) in closed form: negative binomial. 4 Monte-Carlo errors of the weights' averages."""
    instance = BY_NAME["gamma_poisson"]
    posterior = Gibbs(chains=4, warmup=20, draws=1000, **QUIET).fit(instance.program, *instance.data)
    counts = instance.data[0].numpy()
    a, b = 2.0 + counts.sum() - counts, 0.5 + len(counts) - 1
    exact = scipy.stats.nbinom.logpmf(counts, a, b / (b + 1.0))
    result = psis(posterior)
    assert result.estimand == "elpd" and result.pareto_k.shape == counts.shape and result.passed
    average = scipy.special.logsumexp(result.log_weights - result.raw, 1) - scipy.special.logsumexp(result.log_weights, 1)
    assert np.abs(average - exact).max() < 4.0 * 0.02
    assert result.estimate == pytest.approx(exact.sum(), abs=0.1)
    assert result.estimate == pytest.approx(average.sum(), abs=1e-2)
    assert "elpd" in str(result) and result.plot().axes[0].get_ylabel() == "k-hat"
    assert result.to_arviz()["psis"]["log_weights"].shape == (1, 4000, len(counts))


def test_weights_print_plot_and_export() -> None:
    result = psis(weighted(np.random.default_rng(0).normal(size=500)))
    assert "log evidence" in str(result) and result.plot().axes[0].get_title() in str(result)
    tree = result.to_arviz()
    assert tree["psis"]["log_weights"].shape == (1, 500) and tree["psis_diagnostic"]["pareto_k"].shape == (1, 1)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        psis(weighted(np.array([0.0, np.nan] * 20)))


def test_smoothing_leaves_a_weight_of_zero_at_zero() -> None:
    log_weights = np.random.default_rng(0).normal(size=100)
    log_weights[3] = -np.inf
    smoothed = arviz.smoothed(log_weights)
    assert smoothed[3] == -np.inf and np.isfinite(np.delete(smoothed, 3)).all()


# ------------------------------------------------------------------------------------- what all results can do
FOUND: dict[str, tuple[Callable[[], Any], str]] = {
    "SBC": (lambda: sbc(rates, RIGHT["exact"], COUNTS, replicates=20), "prior_sbc"),
    "Geweke": (lambda: geweke(rates, RIGHT["exact"], COUNTS, chains=20, iterations=2), "posterior"),
    "PSIS": (lambda: psis(weighted(np.random.default_rng(0).normal(size=100))), "psis"),
    "ScoreTest": (lambda: score_test(rates, {"rate": torch.rand(50) + 0.5}, COUNTS), "posterior"),
}


@pytest.mark.parametrize("name", FOUND)
def test_every_result_prints_plots_and_exports(name: str) -> None:
    make, group = FOUND[name]
    result = make()
    assert isinstance(result, getattr(calibration, name)) and isinstance(result, calibration.Result)
    assert repr(result) == str(result) and result.title in str(result)
    assert [axes.get_title() for axes in result.plot().axes] == [result.title]
    assert result.to_arviz()[group].sizes["draw"] > 0


# ------------------------------------------------------------------------------------- the long run
@pytest.mark.slow
def test_all_samplers_are_calibrated_on_all_programs(capsys: pytest.CaptureFixture[str]) -> None:
    """30 cells, each with SBC and Geweke's test at a level of 99.9 %: one of them fails in 17 runs of other seeds."""
    benchmarks = Path(__file__).parent.parent / "examples" / "benchmarks"
    sys.path.insert(0, str(benchmarks))
    try:
        import calibration as table
    finally:
        sys.path.remove(str(benchmarks))
    results = table.main(smoke=False)
    assert all(result.passed for cell in results.values() for result in cell), capsys.readouterr().out
