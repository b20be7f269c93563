"""The laws that hold for every back-end on every program, and for every model under Pyro's own inference."""

from __future__ import annotations

import ast
import contextlib
import functools
import json
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, Predictive, Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import inference
import pyro_genmodels
from inference import EM, HMC, SVI, Backend, Gibbs, MetropolisHastings, Posterior
from parameters import quick
from pyro_genmodels import GMM, datasets

Fit = Callable[..., Posterior]

ROWS = datasets.load("faithful").arrays["x"][:30]
COVARIANCES = ("full", "tied", "diagonal", "spherical")

CHAINS: dict[str, Any] = {"chains": 2, "warmup": 6, "draws": 6}
DETERMINISTIC: Any = torch.utils.deterministic
BACKENDS: dict[str, Callable[..., Backend[Any, Any]]] = {
    "Gibbs": lambda **options: Gibbs(**{**CHAINS, "progress": False, "seed": 0, **options}),
    "MetropolisHastings": lambda **options: MetropolisHastings(**{**CHAINS, "progress": False, "seed": 0, **options}),
    "HMC": lambda **options: HMC(**{**CHAINS, "progress": False, "seed": 0, **options}),
    "SVI": lambda **options: SVI(**{"steps": 10, "draws": 6, "progress": False, "seed": 0, **options}),
    "EM": lambda **options: EM(**{"steps": 4, "progress": False, "seed": 0, **options}),
}
SAMPLERS = ("Gibbs", "MetropolisHastings", "HMC")

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """For laws that do not concern graphs, which take seconds to make."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "vmapped")


graphless = pytest.mark.usefixtures("without_graphs")


def outages(counts: Tensor) -> None:
    """A user's program with a site of every kind: conjugate, without a conjugate family, in a plate, and finite."""
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("regime", 2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    level = pyro.sample("level", dist.Uniform(0.5, 5.0))
    with pyro.plate("day", len(counts)):
        busy = pyro.sample("busy", dist.Bernoulli(share))
        pyro.sample("count", dist.Poisson(level + rate[busy.long()]), obs=counts)


SUPPORTS = {
    "share": constraints.unit_interval,
    "rate": constraints.positive,
    "level": constraints.interval(0.5, 5.0),
    "busy": constraints.boolean,
}


COUNTS = torch.tensor([0.0, 1, 0, 6, 7, 1, 0, 5, 9, 1])


def fit_outages(backend: Backend[Any, Any], device: torch.device | str = "cpu") -> Posterior:
    return backend.fit(outages, COUNTS.to(device))


def rates(counts: Tensor) -> None:
    """The smallest program with a finite site, for laws that need many fits."""
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("day", len(counts)):
        busy = pyro.sample("busy", dist.Bernoulli(0.3))
        pyro.sample("count", dist.Poisson(rate * (1.0 + 3.0 * busy)), obs=counts)


def fit_rates(backend: Backend[Any, Any], device: torch.device | str = "cpu") -> Posterior:
    return backend.fit(rates, COUNTS.to(device))


@functools.cache
def fit_mixture(backend: str, device: torch.device) -> Posterior:
    return BACKENDS[backend]().fit(GMM(2), ROWS.to(device))


def tensors(posterior: Posterior) -> dict[str, Tensor]:
    groups = ("draws", "stats", "history", "weights", "warmup_draws")
    return {f"{group}/{name}": value for group in groups for name, value in getattr(posterior, group).items()}


def assert_identical(left: Posterior, right: Posterior) -> None:
    assert tensors(left).keys() == tensors(right).keys()
    for name, value in tensors(left).items():
        other = tensors(right)[name]
        assert value.dtype == other.dtype and torch.equal(value.nan_to_num(), other.nan_to_num()), name


# ------------------------------------------------------------------------------------------------------ same seed
LONGER = {"SVI": {"steps": 40}, "EM": {"steps": 40}} | {name: {"warmup": 20, "draws": 20} for name in SAMPLERS}


@every_backend
def test_one_seed_gives_one_result_on_a_function(backend: str, device: torch.device) -> None:
    """Long enough for graphs to be made."""
    torch.manual_seed(1)
    first = fit_rates(BACKENDS[backend](**LONGER[backend]), device)
    torch.manual_seed(2)
    np.random.seed(2)
    assert_identical(first, fit_rates(BACKENDS[backend](**LONGER[backend]), device))


def test_one_seed_gives_one_result_with_blocks_of_every_kind(device: torch.device) -> None:
    first, second = (fit_outages(BACKENDS["Gibbs"](**LONGER["Gibbs"]), device) for _ in range(2))
    assert_identical(first, second)


@graphless
@pytest.mark.parametrize("backend", [*SAMPLERS, "SVI"])
def test_another_seed_gives_another_result(backend: str) -> None:
    first, second = (fit_rates(BACKENDS[backend](seed=seed)).draws["rate"] for seed in (3, 4))
    assert not torch.equal(first, second)


@graphless
@every_backend
def test_one_seed_gives_one_result_on_a_model_whatever_was_fitted_before(backend: str, device: torch.device) -> None:
    model, x = GMM(2), ROWS.to(device)
    SVI(steps=2, draws=1, progress=False).fit(model, 100.0 + 3.0 * x[:12, :1])
    assert_identical(fit_mixture(backend, device), BACKENDS[backend]().fit(model, x))


@graphless
def test_a_result_without_a_seed_can_be_had_again() -> None:
    first = fit_rates(Gibbs(**CHAINS, progress=False))
    second = fit_rates(Gibbs(**CHAINS, progress=False))
    assert not torch.equal(first.draws["rate"], second.draws["rate"])
    assert_identical(first, fit_rates(Gibbs(**CHAINS, progress=False, seed=first.info["seed"])))


def test_the_order_of_sets_in_this_python_does_not_matter(capsys: pytest.CaptureFixture[str]) -> None:
    """Python orders sets of strings differently in every process."""
    script = """
import pyro, pyro.distributions as dist, torch
from inference import MetropolisHastings
def program(y):
    weights = torch.tensor([0.2, 0.3, 0.5])
    first, second = (pyro.sample(name, dist.Categorical(weights)) for name in ("first", "second"))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        odd = pyro.sample("odd", dist.Bernoulli(0.2))
        pyro.sample("y", dist.Normal(level + first * second, 1.0 + odd), obs=y)
backend = MetropolisHastings(chains=2, warmup=2, draws=4, seed=0, progress=False)
draws = backend.fit(program, torch.tensor([0.3, 1.0, 2.0])).draws
print({name: value.tolist() for name, value in draws.items()})
"""
    exec(script, {})
    assert run_python(script, PYTHONHASHSEED="1") == capsys.readouterr().out


@graphless
@pytest.mark.parametrize("watch", quick(["callbacks", "keep", "keep_warmup", "progress"], ["callbacks", "keep_warmup"]))
@every_backend
def test_watching_a_run_does_not_change_it(backend: str, watch: str) -> None:
    seen: list[int] = []
    options: dict[str, Any] = {
        "callbacks": (lambda step, info: seen.append(step),),
        "keep": ["rate"],
        "keep_warmup": True,
        "progress": True,
    }
    watched, plain = (fit_rates(BACKENDS[backend](**chosen)) for chosen in ({watch: options[watch]}, {}))
    assert torch.equal(watched.draws["rate"], plain.draws["rate"])
    assert set(watched.draws) == ({"rate"} if watch == "keep" else {"rate", "busy"})
    if watch == "callbacks":
        assert seen == list(range({"SVI": 10, "EM": len(seen)}.get(backend, 12))) and seen
    if watch == "keep_warmup" and backend in SAMPLERS:
        assert watched.warmup_draws["rate"].shape == (2, 6)


# ------------------------------------------------------------------------------------- the caller's world is left alone
def world() -> dict[str, Any]:
    """Every global that a run might touch."""
    store = pyro.get_param_store()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "pyro": {name: value for name, value in pyro.settings.get().items()},
        "torch validation": torch.distributions.Distribution._validate_args,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": DETERMINISTIC.fill_uninitialized_memory,
        "warnings": list(warnings.filters),
        "store": {name: value.tolist() for name, value in store.items()},
    }


@contextlib.contextmanager
def unusual() -> Iterator[None]:
    """The opposite of every default, restored."""
    fill = DETERMINISTIC.fill_uninitialized_memory
    with pyro.settings.context(validate_infer=False, validate_poutine=False, validate_distributions_torch=False):
        torch.set_default_dtype(torch.float64)
        torch.use_deterministic_algorithms(True, warn_only=True)
        DETERMINISTIC.fill_uninitialized_memory = not fill
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)
            torch.use_deterministic_algorithms(False)
            DETERMINISTIC.fill_uninitialized_memory = fill


def stop_at_once(step: int, info: Any) -> None:
    raise ArithmeticError("enough")


@graphless
@every_backend
@pytest.mark.parametrize("setting", [contextlib.nullcontext, unusual], ids=["defaults", "unusual settings"])
def test_the_callers_world_is_left_alone(backend: str, setting: Callable[[], Any]) -> None:
    with setting():
        before = world()
        fit_rates(BACKENDS[backend]())
        assert world() == before
        with pytest.raises(ArithmeticError, match="enough"):
            fit_rates(BACKENDS[backend](callbacks=(stop_at_once,)))
        assert world() == before
        with pytest.raises(ValueError):
            BACKENDS[backend]().fit(rates, torch.tensor([0.0, torch.nan]))
        assert world() == before


@graphless
def test_reading_a_posterior_leaves_the_callers_world_alone() -> None:
    posterior = fit_rates(Gibbs(**CHAINS, seed=0, progress=False))
    before = world()
    posterior.predict()
    posterior.log_likelihood()
    posterior.diagnose()
    assert world() == before


@graphless
@every_backend
def test_the_callers_data_are_left_alone(backend: str) -> None:
    counts = COUNTS.clone().requires_grad_()
    before = counts.detach().clone()
    BACKENDS[backend]().fit(rates, counts)
    assert torch.equal(counts.detach(), before) and counts.dtype == torch.float32
    assert counts.requires_grad and counts.grad is None


@graphless
@every_backend
def test_nothing_is_printed_without_progress(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    fit_rates(BACKENDS[backend]())
    assert capfd.readouterr() == ("", "")


@graphless
@every_backend
def test_progress_goes_to_the_error_stream(backend: str, capfd: pytest.CaptureFixture[str]) -> None:
    fit_rates(BACKENDS[backend](progress=True))
    output, errors = capfd.readouterr()
    assert output == "" and backend in errors


# ------------------------------------------------------------------------------------------ Pyro's parameter store
def with_param(y: Tensor) -> None:
    shift = pyro.param("shift", torch.tensor(0.5))  # noqa: TID251
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)  # noqa: TID251
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level + shift, scale), obs=y)


class Line:
    """A program with a network in ``pyro.module``."""

    def __init__(self) -> None:
        self.network = nn.Linear(1, 1, dtype=torch.float64)
        nn.init.ones_(self.network.weight)
        nn.init.zeros_(self.network.bias)

    def model(self, y: Tensor) -> None:
        pyro.module("network", self.network)  # noqa: TID251
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(self.network(level.expand(1)).squeeze(-1), 1.0), obs=y)


Y = torch.tensor([1.0, 2.5, 3.0, 2.0], dtype=torch.float64)


@graphless
@every_backend
def test_a_users_parameters_stay_out_of_pyros_store(backend: str) -> None:
    posterior = BACKENDS[backend]().fit(with_param, Y)
    assert not pyro.get_param_store().keys()
    own = {name: float(weight) for name, weight in posterior.weights.items() if not name.startswith("guide.")}
    assert set(own) == {"shift", "scale"} and own["scale"] > 0.0
    assert (own == {"shift": 0.5, "scale": pytest.approx(2.0)}) == (backend in SAMPLERS)


@graphless
@every_backend
def test_a_users_module_stays_out_of_pyros_store(backend: str) -> None:
    program = Line()
    posterior = BACKENDS[backend]().fit(program, Y)
    assert not pyro.get_param_store().keys()
    own = {name: weight for name, weight in posterior.weights.items() if not name.startswith("guide.")}
    assert len(own) == 2 and all(bool(weight.isfinite().all()) for weight in own.values())
    assert (float(program.network.bias.detach()) != 0.0) == (backend in ("SVI", "EM"))


@graphless
@every_backend
def test_the_callers_own_store_is_neither_read_nor_written(backend: str) -> None:
    with pyro.get_param_store().scope():
        pyro.param("shift", torch.tensor(77.0))  # noqa: TID251
        posterior = BACKENDS[backend]().fit(with_param, Y)
        store = pyro.get_param_store()
        assert set(store.keys()) == {"shift"} and float(store["shift"].detach()) == 77.0
        assert abs(float(posterior.weights["shift"])) < 10.0


# ------------------------------------------------------------------------------------------------- draws and support
@graphless
@every_backend
def test_draws_lie_in_the_support(backend: str, device: torch.device) -> None:
    posterior = fit_outages(BACKENDS[backend](), device)
    assert set(posterior.draws) == set(SUPPORTS)
    for site, draws in posterior.draws.items():
        assert draws.device.type == "cpu" and bool(draws.isfinite().all()), site
        assert bool(SUPPORTS[site].check(draws).all()), site
    shapes = {site: tuple(draws.shape[2:]) for site, draws in posterior.draws.items()}
    assert shapes == {"share": (), "rate": (2,), "level": (), "busy": (10,)}
    leads = {draws.shape[:2] for draws in posterior.draws.values()}
    assert leads == {{"SVI": (1, 6), "EM": (1, 1)}.get(backend, (2, 6))}


@graphless
@every_backend
def test_draws_of_a_mixture_lie_in_the_support(backend: str) -> None:
    draws = fit_mixture(backend, torch.device("cpu")).draws
    assert bool(constraints.simplex.check(draws["weights"]).all())
    assert bool(constraints.positive_definite.check(draws["covariances"]).all())
    assert bool(draws["means"].isfinite().all())
    assert bool(((draws["z"] >= 0) & (draws["z"] < 2)).all()) and not draws["z"].is_floating_point()


@graphless
@every_backend
def test_no_weights_means_double_precision_unless_asked(backend: str) -> None:
    if backend != "SVI":
        assert fit_rates(BACKENDS[backend]()).draws["rate"].dtype == torch.float64
    assert fit_rates(BACKENDS[backend](dtype=torch.float32)).draws["rate"].dtype == torch.float32


# ------------------------------------------------------------------------------------------------- laws of a model
every_covariance = pytest.mark.parametrize("covariance", COVARIANCES)
every_shape = pytest.mark.parametrize(("components", "features"), [(1, 1), (3, 2)])


def prepared(covariance: str, components: int = 2, features: int = 2) -> GMM:
    model = GMM(components, covariance)
    model.prepare(ROWS[:, :features])
    return model


def statements(program: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
    trace = poutine.trace(program).get_trace(*args, **kwargs)
    trace.compute_log_prob()
    nodes = trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] == "sample" and not poutine.util.site_is_subsample(s)}


@every_covariance
@every_shape
def test_guide_and_model_agree_on_their_continuous_sites(covariance: str, components: int, features: int) -> None:
    model, x = prepared(covariance, components, features), ROWS[:, :features]
    guessed, told = statements(model.guide, x), statements(model.model, x)
    hidden = {n for n, site in told.items() if not site["is_observed"] and not site["fn"].has_enumerate_support}
    assert set(guessed) == hidden
    for name in hidden:
        assert guessed[name]["value"].shape == told[name]["value"].shape
        assert guessed[name]["fn"].batch_shape == told[name]["fn"].batch_shape
        assert bool(told[name]["fn"].support.check(guessed[name]["value"]).all())
        plates = [[(f.name, f.size) for f in sites[name]["cond_indep_stack"]] for sites in (guessed, told)]
        assert plates[0] == plates[1]


@every_covariance
def test_rows_add_to_the_data_term_and_to_nothing_else(covariance: str) -> None:
    model = prepared(covariance).double()
    values = {name: site["value"] for name, site in statements(model.guide).items()}
    given = poutine.condition(model.model, {**values, "z": torch.tensor(1)})

    def terms(x: Tensor) -> dict[str, Tensor]:
        return {name: site["log_prob_sum"] for name, site in statements(given, x).items()}

    head, tail, both = terms(ROWS[:10]), terms(ROWS[10:]), terms(ROWS)
    for name in ("weights", "means", "covariances"):
        assert head[name] == tail[name] == both[name]
    for name in ("z", "x"):
        torch.testing.assert_close(head[name] + tail[name], both[name])


@every_covariance
def test_size_sets_the_number_of_rows_and_nothing_else(covariance: str) -> None:
    model = prepared(covariance)
    given = poutine.condition(model.model, {name: site["value"] for name, site in statements(model.guide).items()})
    few, many = (statements(given, None, size=size) for size in (3, 8))
    for name in ("weights", "means", "covariances"):
        assert few[name]["value"].shape == many[name]["value"].shape
        assert few[name]["log_prob_sum"] == many[name]["log_prob_sum"]
    assert [sites[name]["value"].shape for sites in (few, many) for name in ("z", "x")] == [(3,), (3, 2), (8,), (8, 2)]


@every_covariance
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_site_has_the_dtype_of_the_model(covariance: str, dtype: torch.dtype) -> None:
    model = GMM(3, covariance, location=torch.zeros(2), scale=torch.ones(2)).to(dtype)
    for program in (model.model, model.guide):
        for name, site in statements(program, None, size=4).items():
            assert not site["value"].is_floating_point() or site["value"].dtype == dtype, name
            assert site["log_prob_sum"].dtype == dtype, name


@every_covariance
@every_shape
def test_every_weight_gets_a_finite_gradient(covariance: str, components: int, features: int) -> None:
    model, x = prepared(covariance, components, features), ROWS[:, :features]
    elbo = TraceEnum_ELBO(max_plate_nesting=1)(config_enumerate(model.model), model.guide)
    elbo(x).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and bool(weight.grad.isfinite().all()), name
        assert components == 1 or bool(weight.grad.any()), name


@every_covariance
@pytest.mark.parametrize("built", ["lazily", "for two features"])
def test_a_state_dict_round_trips(covariance: str, built: str) -> None:
    features = None if built == "lazily" else 2
    old, new = GMM(3, covariance, features=features), GMM(3, covariance, features=features).double()
    old.prepare(ROWS)
    with torch.no_grad():
        for weight in old.parameters():
            weight.normal_()
    new.load_state_dict(old.state_dict())
    assert new.state_dict().keys() == old.state_dict().keys()
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value)
    shape = [statements(model.model, None, size=3)["x"]["value"].shape for model in (old, new)]
    assert shape[0] == shape[1] == (3, 2)


@graphless
@every_covariance
def test_two_instances_share_nothing(covariance: str) -> None:
    location, scale = torch.zeros(2), torch.ones(2)
    one = GMM(2, covariance, location=location, scale=scale)
    two = GMM(2, covariance, location=location.clone(), scale=scale.clone())
    before = {name: value.clone() for name, value in two.state_dict().items()}
    addresses = [{value.data_ptr() for value in model.state_dict().values()} for model in (one, two)]
    assert not addresses[0] & addresses[1]
    with torch.no_grad():
        for value in one.state_dict().values():
            value.add_(1.0)
    SVI(steps=3, draws=2, seed=0, progress=False).fit(one, ROWS)
    for name, value in two.state_dict().items():
        assert torch.equal(value, before[name]), name


# --------------------------------------------------------------------------------------------- Pyro's own inference
@every_covariance
def test_pyros_nuts_runs_on_the_model(covariance: str) -> None:
    model, x = prepared(covariance).double(), ROWS
    mcmc = MCMC(NUTS(model.model, max_tree_depth=3), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(x)
    samples = mcmc.get_samples()
    assert set(samples) == {"weights", "means", "covariances"}
    assert all(bool(draws.isfinite().all()) for draws in samples.values())


@every_covariance
def test_pyros_svi_trains_the_guide_and_leaves_the_store_empty(covariance: str) -> None:
    """Enumerated, and with the labels drawn by a guide of the user's own."""
    model = prepared(covariance)

    def labelled(x: Tensor) -> None:
        model.guide(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Categorical(x.new_ones(2)))

    enumerated = TraceEnum_ELBO(max_plate_nesting=1)(config_enumerate(model.model), model.guide)
    for elbo in (enumerated, Trace_ELBO()(model.model, labelled)):
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        for _ in range(2):
            optimiser.zero_grad()
            loss = elbo(ROWS)
            loss.backward()
            optimiser.step()
        assert bool(loss.isfinite())
        assert all(not torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert not pyro.get_param_store().keys()


@every_covariance
def test_the_enumerated_bound_rises_under_pyros_svi(covariance: str) -> None:
    """100 steps of Adam. False alarm: 4 standard errors of the bound, of 20 draws at either end, 3e-5."""
    model = prepared(covariance).double()
    elbo = TraceEnum_ELBO(max_plate_nesting=1)(config_enumerate(model.model), model.guide)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.03)

    def bounds() -> Tensor:
        return torch.stack([-elbo(ROWS).detach() for _ in range(20)])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = bounds()
        for _ in range(100):
            optimiser.zero_grad()
            elbo(ROWS).backward()
            optimiser.step()
        after = bounds()
    standard_error = (before.var() / 20 + after.var() / 20).sqrt()
    assert after.mean() - before.mean() > 4.0 * standard_error


@every_covariance
def test_pyros_predictive_runs_on_the_model_and_on_our_draws(covariance: str) -> None:
    model = prepared(covariance).double()
    prior = Predictive(model.model, num_samples=4)(None, size=5)
    assert prior["x"].shape == (4, 5, 2)
    with torch.no_grad():
        guessed = Predictive(model.model, guide=model.guide, num_samples=4)(None, size=5)
    assert guessed["x"].shape == (4, 5, 2)


@graphless
def test_pyros_predictive_runs_on_our_draws() -> None:
    model = GMM(2, "spherical")
    posterior = Gibbs(chains=1, warmup=2, draws=4, seed=0, progress=False).fit(model, ROWS)
    draws = {name: value[0] for name, value in posterior.draws.items() if name != "z"}
    predicted = Predictive(model.model, posterior_samples=draws, parallel=False)(None, size=5)
    assert predicted["x"].shape == (4, 5, 2) and bool(predicted["x"].isfinite().all())


# -------------------------------------------------------------------------------------------------------- import law
def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, anywhere in it; ``from a import b`` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def within(names: set[str], *packages: str) -> set[str]:
    return {name for name in names if any(name == p or name.startswith(p + ".") for p in packages)}


INFERENCE = Path(inference.__file__).parent
MODELS = Path(pyro_genmodels.__file__).parent
BACKEND_MODULES = (
    "gibbs", "marginal", "metropolis", "hamiltonian", "nuts", "em", "svi", "adversarial", "denoising", "fit",
)  # fmt: skip
GLOBAL_STATE = {"param", "module", "get_param_store", "clear_param_store"}


@pytest.mark.parametrize("path", sorted(INFERENCE.rglob("*.py")), ids=lambda p: str(p.relative_to(INFERENCE)))
def test_inference_imports_no_model(path: Path) -> None:
    assert not within(imported(path), "pyro_genmodels")


# The layer that brings models and back-ends together.
APPLICATION = {
    "catalogue.py", "cli.py", "cli_train.py", "__main__.py", "comparison.py", "gallery.py", "plots", "report", "trained.py",
    "metrics/codes.py", "metrics/density.py",
}  # fmt: skip


def is_of_application(path: Path) -> bool:
    place = path.relative_to(MODELS)
    return bool({place.as_posix(), place.parts[0]} & APPLICATION)


MODEL_FILES = sorted(path for path in MODELS.rglob("*.py") if not is_of_application(path))


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda p: str(p.relative_to(MODELS)))
def test_a_model_imports_the_vocabulary_and_pure_functions_only(path: Path) -> None:
    names = within(imported_at_run_time(path), "inference")
    assert names <= within(names, "inference.contract", "inference.sampling", "inference.sequences", "inference.transforms")


def imported_at_run_time(path: Path) -> set[str]:
    """As ``imported``, without what stands under ``if TYPE_CHECKING``."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


KERNELS = ("mcmc.py", "proposals.py", "trees.py", "adaptation.py")


@pytest.mark.parametrize("name", [*KERNELS, *(f"blocks/{path.name}" for path in (INFERENCE / "blocks").glob("*.py"))])
def test_a_kernel_imports_no_backend(name: str) -> None:
    forbidden = [f"inference.{module}" for module in BACKEND_MODULES]
    names = imported(INFERENCE / name)
    assert not within(names, *forbidden)
    assert not {name.split(".")[-1] for name in within(names, "inference")} & {"Gibbs", "HMC", "NUTS", "EM", "SVI"}


@pytest.mark.parametrize("package", [INFERENCE, MODELS], ids=["inference", "pyro_genmodels"])
def test_our_own_code_keeps_nothing_in_pyros_store(package: Path) -> None:
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pyro":
                assert node.attr not in GLOBAL_STATE, f"{path.name}, line {node.lineno}"


def run_python(script: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(INFERENCE.parent), **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_costs_pyros_import_and_changes_nothing() -> None:
    script = """
import json, random, sys, warnings
import numpy, pyro, torch
import torch.utils.deterministic
def world():
    return [str(torch.get_rng_state().tolist()), repr(numpy.random.get_state()), repr(random.getstate()),
            str(torch.get_default_dtype()), repr(sorted(pyro.settings.get().items())), torch.get_num_threads(),
            torch.distributions.Distribution._validate_args, torch.are_deterministic_algorithms_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory, repr(warnings.filters)]
before, loaded = world(), set(sys.modules)
import inference
import pyro_genmodels
print(json.dumps({"changed": [a for a, b in zip(before, world()) if a != b], "new": sorted(set(sys.modules) - loaded)}))
"""
    found = json.loads(run_python(script))
    assert not found["changed"]
    heavy = {"arviz", "arviz_base", "xarray", "matplotlib", "pandas", "h5netcdf", "sklearn"}
    assert not {*heavy, "scipy.optimize", "scipy.stats"} & set(found["new"])
    assert {"inference", "inference.gibbs"} <= set(found["new"])
