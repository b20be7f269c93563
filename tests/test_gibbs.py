"""Gibbs takes an exact update wherever there is one, and every sweep proves that it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from inference import Conjugate, Enumerate, Gibbs, Hamiltonian, Unsupported, arviz
from inference.conditionals import NormalConditional
from inference.messages import Normal
from inference.plan import assign
from inference.program import Program
from inference.start import dispersed_values
from parameters import quick
from pyro_genmodels import GMM, datasets
from pyro_genmodels.classical.gmm import COVARIANCES
from zoo import BY_NAME, ZOO, Instance

CERTIFICATE = 1e-8  # of float64, as DESIGN.md has it
INEXACT = {"HMC"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_exact(posterior: Any, plan: dict[str, str]) -> None:
    """The plan is as expected, every exact update holds its certificate, and every proposal of one was accepted."""
    assert posterior.plan is not None
    assert {site: update.update for site, update in posterior.plan.items()} == plan
    for update in posterior.plan.updates:
        if update.update in INEXACT:
            assert update.certificate is None and 0.05 < update.acceptance <= 1.0
            continue
        assert update.certificate is not None and update.certificate <= CERTIFICATE, update
        assert update.acceptance >= 1.0 - CERTIFICATE, update


@pytest.mark.parametrize(
    "instance",
    [
        pytest.param(instance, id=instance.name, marks=[pytest.mark.slow] if number % 6 or "Gibbs" in instance.slow else [])
        for number, instance in enumerate(ZOO)
    ],
)
def test_every_conjugate_site_has_its_exact_update(instance: Instance, sampled: Any) -> None:
    assert_exact(sampled(instance, "Gibbs"), instance.plan)


GMM_PLAN = {
    "full": "InverseWishart", "tied": "InverseWishart", "diagonal": "InverseGamma", "spherical": "InverseGamma",
}  # fmt: skip


@pytest.mark.parametrize("covariance", quick(COVARIANCES, ("full", "spherical")))
def test_a_gaussian_mixture_is_exact_on_unscaled_data(covariance: str, device: torch.device) -> None:
    x = datasets.load("faithful").x.to(device)
    posterior = Gibbs(chains=4, warmup=30, draws=30, seed=0, progress=False).fit(GMM(2, covariance), x)
    # rows of two features: the means of one component are coupled by a full covariance
    means = "Normal" if covariance in ("diagonal", "spherical") else "Gaussian"
    plan = {"z": "Enumerate", "weights": "Dirichlet", "means": means, "covariances": GMM_PLAN[covariance]}
    assert_exact(posterior, plan)


@pytest.mark.parametrize("components", [1, 3])
def test_a_gaussian_mixture_is_exact_whatever_its_size(components: int, device: torch.device) -> None:
    x = datasets.load("galaxies").x.to(device)
    posterior = Gibbs(chains=4, warmup=30, draws=30, seed=0, progress=False).fit(GMM(components), x)
    assert posterior.plan is not None
    assert all(update.certificate is not None and update.certificate <= CERTIFICATE for update in posterior.plan.updates)
    # a simplex of one value and a site of one value have nothing to move
    assert {site: posterior.plan[site].update for site in ("means", "covariances")} == {
        "means": "Normal", "covariances": "InverseWishart",
    }  # fmt: skip


def test_every_proposal_of_a_long_run_is_accepted(device: torch.device) -> None:
    """A hierarchical model over five hundred sweeps: frozen points of differentiation do not wear out."""
    instance = BY_NAME["hierarchical"]
    posterior = Gibbs(chains=4, warmup=100, draws=500, seed=0, progress=False).fit(instance.program, *instance.on(device))
    assert_exact(posterior, instance.plan)


# ------------------------------------------------------------------------------ forms of programs
TABLE = torch.tensor([0.2, 0.7, -0.4], dtype=torch.float64)
SINGLE = torch.tensor([-1.0, 0.3, 1.4])
COVARIATE = torch.linspace(-1.0, 1.0, 6)
Y = normal(6, seed=1)


def test_a_label_may_be_an_index_beside_an_hmc_block(device: torch.device) -> None:
    def program(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
        z = pyro.sample("z", dist.Categorical(y.new_ones(3)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.StudentT(3.0, m + TABLE.to(y)[z], 1.0), obs=y)

    posterior = Gibbs(chains=4, warmup=10, draws=10, seed=0, progress=False).fit(program, Y.to(device))
    assert_exact(posterior, {"z": "Enumerate", "m": "HMC"})


INDICES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "plain": (lambda y: dist.Categorical(y.new_ones(3)), lambda table, z: table[z]),
    "arithmetic": (lambda y: dist.Categorical(y.new_ones(3)), lambda table, z: table[2 - z]),
    "long": (lambda y: dist.Bernoulli(y.new_tensor(0.3)), lambda table, z: table[z.long()]),
    "two": (lambda y: dist.Bernoulli(y.new_tensor(0.3)), lambda table, z: torch.outer(table, table)[z.long(), 1 - z.long()]),
    "row": (lambda y: dist.Categorical(y.new_ones(3)), lambda table, z: torch.outer(table, table)[z].sum(-1)),
    "column": (lambda y: dist.Categorical(y.new_ones(3)), lambda table, z: torch.outer(table, table)[:, z].sum(0)),
    "where": (lambda y: dist.Bernoulli(y.new_tensor(0.3)), lambda table, z: torch.where(z > 0.5, table[0], table[1])),
    "select": (
        lambda y: dist.Categorical(y.new_ones(3)),
        lambda table, z: table.index_select(0, z.reshape(-1)).reshape(z.shape),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", INDICES)
def test_a_label_may_be_an_index_in_any_form(form: str, device: torch.device) -> None:
    prior, look_up = INDICES[form]

    def program(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
        z = pyro.sample("z", prior(y))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m * look_up(TABLE.to(y), z), 1.0), obs=y)

    posterior = Gibbs(chains=4, warmup=10, draws=10, seed=0, progress=False).fit(program, Y.to(device))
    assert_exact(posterior, {"z": "Enumerate", "m": "Normal"})


def test_single_precision_constants_of_the_program_do_not_cost_conjugacy(device: torch.device) -> None:
    """What a program holds of its own is float32, as ``torch.tensor([...])`` makes it."""

    def program(y: Tensor) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Categorical(torch.ones(3, device=y.device)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(slope * COVARIATE.to(y.device) + SINGLE.to(y.device)[z], 1.0), obs=y)

    posterior = Gibbs(chains=4, warmup=10, draws=10, seed=0, progress=False).fit(program, Y.to(device))
    assert_exact(posterior, {"z": "Enumerate", "slope": "Normal"})


# --------------------------------------------------------------------------------------- overrides
def test_blocks_override_the_plan(device: torch.device) -> None:
    instance = BY_NAME["normal_independent"]
    backend = Gibbs(chains=8, warmup=50, draws=20, seed=0, progress=False, blocks={("mean", "variance"): Hamiltonian()})
    posterior = backend.fit(instance.program, *instance.on(device))
    assert posterior.plan is not None
    assert posterior.plan["mean"].sites == ("mean", "variance") and posterior.plan["mean"].update == "HMC"


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [
        ({"mean": Enumerate()}, "needs sites with finitely many values, but 'mean' is not one"),
        (
            {("mean", "variance"): Conjugate()},
            "updates one site, or several of one shape and support, but was given mean, variance",
        ),
    ],
    ids=["Enumerate", "Conjugate"],
)
def test_a_block_that_does_not_fit_its_site_is_refused(blocks: Any, sentence: str, device: torch.device) -> None:
    instance = BY_NAME["normal_independent"]
    with pytest.raises(Unsupported, match=sentence):
        Gibbs(blocks=blocks, progress=False).fit(instance.program, *instance.on(device))


@pytest.mark.parametrize(
    ("blocks", "sentence"),
    [({"nothing": Hamiltonian()}, "names 'nothing'"), ({"mean": Conjugate(), ("mean",): Conjugate()}, "two blocks")],
    ids=["unknown", "twice"],
)
def test_an_override_names_each_site_once(blocks: Any, sentence: str, device: torch.device) -> None:
    instance = BY_NAME["normal_independent"]
    with pytest.raises(ValueError, match=sentence):
        Gibbs(blocks=blocks, progress=False).fit(instance.program, *instance.on(device))


def test_a_plan_prints_one_line_for_each_block(sampled: Any) -> None:
    instance = BY_NAME["mixture"]
    posterior = sampled(instance, "Gibbs")
    lines = str(posterior.plan).splitlines()
    assert len(lines) == 1 + len(instance.plan) and lines[0].split() == ["sites", "update", "acceptance", "certificate"]
    assert len(posterior.plan) == len(instance.plan) and next(iter(posterior.plan)) == "z"


def test_finite_sites_move_first_and_the_rest_in_the_order_of_the_program(device: torch.device) -> None:
    """Finite sites follow at once from the starting values of the others."""
    for name, expected in {"coal": ["switch", "early", "late"], "gamma_shape": ["shape", "rate"]}.items():
        blocks, _ = assign(Program(BY_NAME[name].program, BY_NAME[name].on(device)))
        assert [site for block in blocks for site in block.sites] == expected


@pytest.mark.parametrize("sampler", ["HMC", "MetropolisHastings"])
def test_what_is_drawn_back_is_certified_in_other_samplers_too(sampler: str, sampled: Any) -> None:
    certificate = sampled(BY_NAME["mixture"], sampler).plan["z"].certificate
    assert certificate is not None and certificate <= CERTIFICATE


def test_no_chain_of_a_gibbs_sampler_is_left_behind(device: torch.device) -> None:
    """A deviation whose prior is far narrower than its posterior: every chain gets from one to the other in warm-up."""

    def program(x: Tensor, y: Tensor) -> None:
        beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
        sigma = pyro.sample("sigma", dist.HalfCauchy(y.new_tensor(2.5)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(beta[0] + beta[1] * x, sigma), obs=y)

    x = 100.0 + 15.0 * normal(400, seed=2)
    y = 25.0 + 0.6 * x + 18.0 * normal(400, seed=3)
    posterior = Gibbs(chains=64, warmup=150, draws=30, seed=0, progress=False).fit(program, x.to(device), y.to(device))
    sigma = posterior.draws["sigma"]
    assert float(sigma.mean(1).min()) > 16.0 and float(sigma.mean(1).max()) < 20.0
    assert float(sigma.std(1).min()) > 0.0


def test_counts_beside_a_continuous_site(device: torch.device) -> None:
    """count_n ~ Poisson(rate), seen_n ~ Binomial(count_n, 0.3): the rate is Gamma(2 + Σ count, 0.5 + n)."""

    def program(seen: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(seen.new_tensor(2.0), 0.5))
        with pyro.plate("rows", len(seen)):
            count = pyro.sample("count", dist.Poisson(rate))
            pyro.sample("seen", dist.Binomial(count, 0.3), obs=seen)

    seen = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    posterior = Gibbs(chains=64, warmup=40, draws=60, thin=2, seed=0, progress=False).fit(program, seen.to(device))
    assert_exact(posterior, {"rate": "Gamma", "count": "Slice"})
    # with the counts summed out seen_n is Poisson(0.3 rate), so that the rate is Gamma(2 + 4, 0.5 + 0.9)
    draws = posterior.draws["rate"].numpy()
    assert abs(draws.mean() - 6.0 / 1.4) < 4.0 * float(arviz.mcse(draws))


def test_a_certificate_that_held_for_long_is_taken_now_and_then_and_always_again_once_it_fails(
    inside_a_run: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = BY_NAME["normal_independent"]
    program = Program(instance.program, instance.data)
    backend = Gibbs(chains=2, warmup=0, progress=False)
    state, taken, solve = backend.init(program), [], Normal.solve
    step = Conjugate.step
    monkeypatch.setattr(Conjugate, "step", lambda self, *rest: (taken.append(sweep), step(self, *rest))[1])
    monkeypatch.setattr(Conjugate, "is_straight", False)  # no graph of a sweep, that would not call anything
    for sweep in range(200):  # noqa: B007
        state, _ = backend.sample(state, program)
    assert sorted({*taken}) == [*range(100), *range(100, 200, 10)]
    assert float(state.certificate.max()) < CERTIFICATE

    def shifted(self: Normal, at: torch.Tensor, gradients: torch.Tensor) -> NormalConditional:
        found = solve(self, at, gradients)
        return replace(found, mean=found.mean + 1e-3)

    monkeypatch.setattr(Normal, "solve", shifted)
    for sweep in range(200, 230):  # noqa: B007
        state, _ = backend.sample(state, program)
    assert {*taken} >= {*range(200, 230)} and float(state.certificate.max()) > CERTIFICATE
    assert "certificate" in str(backend.plan(state, program))


class Suggested(nn.Module):
    """A model that suggests where to start: the same place always, or another one at every call."""

    def __init__(self, is_fixed: bool) -> None:
        super().__init__()
        self.is_fixed = is_fixed

    def model(self, y: torch.Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 10.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    def start(self, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"mean": torch.zeros(()) if self.is_fixed else 0.01 * torch.rand(())}


def test_chains_start_where_a_model_suggests_unless_all_would_start_there_together(inside_a_run: None) -> None:
    y = 7.0 + normal(5, seed=0)
    for is_fixed in (True, False):
        found = dispersed_values(Program(Suggested(is_fixed), (y,)), 6)["mean"]
        assert len(found.unique()) == 6
        assert bool((found.abs() < 0.01).all()) != is_fixed
