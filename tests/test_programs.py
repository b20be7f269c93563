"""Programs as users write them run unchanged through every back-end, and mean what Pyro means by them.

Every program here has the normal posterior of one location, so that one closed form judges all: EM's point and standard
error to rounding, and Gibbs, whose draws are exact and independent, within four standard errors of mean and sd (20 programs:
a false alarm in 400 runs). All back-ends share the density, so of the others a few steps show that they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor, nn

from inference import EM, HMC, SVI, Backend, Gibbs, MetropolisHastings, Prior, Unsupported
from inference.program import Program
from parameters import quick

Y = torch.tensor([1.0, 2.5, -0.5, 2.0, 3.0, 0.5], dtype=torch.float64)
SEEN = torch.tensor([True, True, False, True, False, True])
HOLES = torch.where(SEEN, Y, torch.nan)
NEW = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

SHORT: dict[str, Any] = {"chains": 2, "warmup": 4, "draws": 4, "progress": False, "seed": 0}
BACKENDS: dict[str, Callable[..., Backend[Any, Any]]] = {
    "Gibbs": lambda **options: Gibbs(**{**SHORT, **options}),
    "MetropolisHastings": lambda **options: MetropolisHastings(**{**SHORT, **options}),
    "HMC": lambda **options: HMC(**{**SHORT, **options}),
    "SVI": lambda **options: SVI(**{"steps": 4, "draws": 4, "progress": False, "seed": 0, **options}),
    "EM": lambda **options: EM(**{"steps": 50, "progress": False, "seed": 0, **options}),
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def level(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y)


def with_deterministic(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    pyro.deterministic("double", 2.0 * mean)
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y)


def with_factor(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    pyro.factor("likelihood", dist.Normal(mean, 2.0).log_prob(y).sum())


def with_param(y: Tensor) -> None:
    """A weight that is held where it starts, because its gradient is cut."""
    two = torch.tensor(2.0, dtype=torch.float64)
    scale = pyro.param("scale", two, constraint=constraints.positive).detach()  # noqa: TID251
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, scale), obs=y)


def with_obs_mask(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y, obs_mask=SEEN)


def with_holes(y: Tensor) -> None:
    """Missing values as NaN, masked out by the program."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    seen = ~y.isnan()
    with pyro.plate("rows", len(y)), poutine.mask(mask=seen):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=torch.where(seen, y, 0.0))


def with_plate_of_all(y: Tensor) -> None:
    """A plate that hands out the indices of its rows."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)) as index:
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y[index])


def with_subsample_argument(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y), subsample=torch.arange(len(y))) as index:
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y[index])


def in_a_loop(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    for i in pyro.plate("rows", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(mean, 2.0), obs=y[i])


def written(y: Tensor) -> None:
    """Row by row into a tensor of the program's own."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    location = torch.zeros(len(y), dtype=y.dtype)
    for i in range(len(y)):
        location[i] = mean
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(location, 2.0), obs=y)


def added_up(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    location = y.new_zeros(len(y))
    location += 0.5 * mean
    location[1:] += 0.5 * mean
    location.index_add_(0, torch.tensor([0]), (0.5 * mean).reshape(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(location, 2.0), obs=y)


def filled_in(y: Tensor) -> None:
    """Missing values are latent, and written where the data have holes."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    holes = y.isnan()
    with pyro.plate("holes", 2):
        missing = pyro.sample("missing", dist.Normal(mean, 2.0))
    whole = y.clone()
    whole[holes] = missing
    pyro.factor("rows", dist.Normal(mean, 2.0).log_prob(torch.where(holes, mean, whole))[~holes].sum())
    pyro.deterministic("whole", whole)


def written_by_label(y: Tensor) -> None:
    """A finite site is summed out of what was written; it does not matter which of its values is drawn."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    label = pyro.sample("label", dist.Bernoulli(torch.tensor(0.5, dtype=y.dtype)))
    location = torch.empty(2, dtype=y.dtype)
    location[0], location[1] = mean, mean
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(location[0] * label + location[1] * (1.0 - label), 2.0), obs=y)


def without_a_plate(y: Tensor) -> None:
    """Data wider than their distribution, and a dimension that is not there squeezed out."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(mean.squeeze(-1), 2.0), obs=y)


def two_levels(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    offset = pyro.sample("offset", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean + offset, 2.0), obs=y)


def generated(y: Tensor | None = None) -> None:
    """The observed site by name: data come from ``condition``."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(Y)):
        pyro.sample("y", dist.Normal(mean, 2.0), obs=y)


def posterior_of(y: Tensor, scale: float = 1.0) -> tuple[float, float]:
    precision = 1 / 9 + scale * len(y) / 4
    return scale * float(y.sum()) / 4 / precision, precision**-0.5


class Case(NamedTuple):
    """A program with its data, and mean and standard deviation of the posterior of its site ``mean``."""

    program: Any
    data: tuple[Tensor, ...]
    exact: tuple[float, float]


CASES = {
    "plain": Case(level, (Y,), posterior_of(Y)),
    "deterministic": Case(with_deterministic, (Y,), posterior_of(Y)),
    "factor": Case(with_factor, (Y,), posterior_of(Y)),
    "param": Case(with_param, (Y,), posterior_of(Y)),
    "obs_mask": Case(with_obs_mask, (Y,), posterior_of(Y[SEEN])),
    "holes": Case(with_holes, (HOLES,), posterior_of(Y[SEEN])),
    "plate index": Case(with_plate_of_all, (Y,), posterior_of(Y)),
    "plate subsample": Case(with_subsample_argument, (Y,), posterior_of(Y)),
    "plate loop": Case(in_a_loop, (Y,), posterior_of(Y)),
    "written": Case(written, (Y,), posterior_of(Y)),
    "added up": Case(added_up, (Y,), posterior_of(Y)),
    "filled in": Case(filled_in, (HOLES,), posterior_of(Y[SEEN])),
    "written by label": Case(written_by_label, (Y,), posterior_of(Y)),
    "without a plate": Case(without_a_plate, (Y,), posterior_of(Y)),
    "condition data": Case(poutine.condition(generated, {"y": Y}), (), posterior_of(Y)),
    "condition latent": Case(poutine.condition(two_levels, {"offset": torch.tensor(1.0)}), (Y,), posterior_of(Y - 1.0)),
    "do": Case(poutine.do(two_levels, {"offset": torch.tensor(1.0)}), (Y,), posterior_of(Y - 1.0)),
    "scale": Case(poutine.scale(level, scale=0.5), (Y,), (float(Y.sum()) / 8 / (1 / 18 + 6 / 8), (1 / 18 + 6 / 8) ** -0.5)),
    "mask": Case(poutine.mask(level, mask=True), (Y,), posterior_of(Y)),
    "infer_config": Case(poutine.infer_config(level, lambda site: {"enumerate": "parallel"}), (Y,), posterior_of(Y)),
    "reparam": Case(poutine.reparam(level, {"mean": LocScaleReparam(0.0)}), (Y,), posterior_of(Y)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short runs, for which a graph does not pay."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "vmapped")


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_a_program_runs_through_every_backend(name: str, backend: str) -> None:
    case = CASES[name]
    posterior = BACKENDS[backend]().fit(case.program, *case.data)
    assert bool(posterior.draws["mean"].isfinite().all())
    if name == "deterministic":
        torch.testing.assert_close(posterior.draws["double"], 2.0 * posterior.draws["mean"])
        assert "double" in posterior.to_arviz(log_likelihood=False)["posterior"]
    if name == "filled in":
        assert torch.equal(posterior.draws["whole"][..., ~SEEN], posterior.draws["missing"])
    if name == "obs_mask":  # what is missing is a latent site, and the whole is computed
        whole = posterior.draws["y"]
        assert bool((whole[..., SEEN] == Y[SEEN]).all()) and bool(whole.isfinite().all())
    predicted = posterior.predict()
    assert predicted.keys() == posterior.observed.keys()
    for site, data in posterior.observed.items():
        assert predicted[site].shape == (*posterior.shape, *data.shape)


@pytest.mark.parametrize("name", [name for name in CASES if name != "reparam"])
def test_the_mode_of_a_program_is_exact(name: str) -> None:
    """A reparameterised site is another one, which has another mode."""
    case = CASES[name]
    posterior = BACKENDS["EM"]().fit(case.program, *case.data)
    mean, sd = case.exact
    assert float(posterior.point()["mean"]) == pytest.approx(mean, rel=1e-6)
    assert float(posterior.stats["standard_error_mean"]) == pytest.approx(sd, rel=1e-6)
    if name == "obs_mask":  # two of six are missing: one Gaussian of what the density depends on
        assert posterior.plan is not None and posterior.plan["y_unobserved"].update == "Gaussian"
        expected = dist.Normal(0.0, 3.0).log_prob(torch.tensor(mean)) + dist.Normal(mean, 2.0).log_prob(Y[SEEN]).sum()
        assert float(posterior.stats["lp"]) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in CASES if name != "obs_mask"])
def test_the_draws_of_a_program_are_those_of_its_posterior(name: str) -> None:
    """Where missing rows are drawn too, successive draws depend on each other: that case is left to EM."""
    case = CASES[name]
    posterior = Gibbs(chains=50, warmup=2, draws=40, progress=False, seed=0).fit(case.program, *case.data)
    mean, sd = case.exact
    draws = posterior.draws["mean"].numpy()
    assert abs(draws.mean() - mean) < 4 * sd / math.sqrt(draws.size)
    assert abs(draws.std() / sd - 1) < 4 / math.sqrt(2 * draws.size)


@every_backend
@pytest.mark.parametrize(
    "name", ["plain", "deterministic", "param", "plate index", "scale", "reparam", "infer_config", "do"]
)
def test_predictions_at_new_data_have_the_size_of_the_new_data(name: str, backend: str) -> None:
    case = CASES[name]
    posterior = BACKENDS[backend]().fit(case.program, *case.data)
    predicted = posterior.predict(NEW)["y"]
    assert predicted.shape == (*posterior.shape, 3) and bool(predicted.isfinite().all())


def test_predictions_have_the_moments_of_the_posterior_predictive() -> None:
    """Mean and sd of 3 × 1000 draws within four standard errors."""
    mean, sd = posterior_of(Y)
    posterior = Gibbs(chains=50, warmup=2, draws=20, progress=False, seed=0).fit(level, Y)
    predicted = posterior.predict(NEW)["y"]
    spread = math.sqrt(4.0 + sd**2)
    assert abs(float(predicted.mean()) - mean) < 4 * math.sqrt(4.0 / 3000 + sd**2 / 1000)
    assert abs(float(predicted.std()) / spread - 1) < 4 / math.sqrt(2 * 1000)
    assert torch.equal(predicted, posterior.predict(NEW)["y"])


def columns(y: Tensor) -> None:
    """Column means in a plate of the data, but not of its rows."""
    features, rows = pyro.plate("features", y.shape[1], dim=-1), pyro.plate("rows", len(y), dim=-2)
    with features:
        mean = pyro.sample("mean", dist.Normal(0.0, 50.0))
    with rows, features:
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def looped_columns(y: Tensor) -> None:
    """The same in a loop."""
    for j in range(y.shape[1]):
        mean = pyro.sample(f"mean_{j}", dist.Normal(0.0, 50.0))
        with pyro.plate(f"rows_{j}", len(y)):
            pyro.sample(f"y_{j}", dist.Normal(mean, 1.0), obs=y[:, j])


TABLE = torch.tensor([[5.0, -5.0, 20.0], [6.0, -4.5, 19.0], [4.0, -6.0, 21.5]], dtype=torch.float64)


@pytest.mark.parametrize("rows", quick([1, 3, 5], (3,)))
@pytest.mark.parametrize("program", [columns, looped_columns])
@pytest.mark.parametrize("size", [2, 3])
def test_new_rows_keep_the_parameters_of_the_columns(size: int, program: Callable[..., None], rows: int) -> None:
    """Also those of square data, of size 3. Means and sds of 12 programs within four standard errors: 72 checks, a false
    alarm in 200 runs."""
    y = TABLE[:size]
    posterior = Gibbs(chains=50, warmup=2, draws=20, progress=False, seed=0).fit(program, y)
    predicted = posterior.predict(torch.zeros(rows, 3, dtype=y.dtype))
    found = predicted["y"] if program is columns else torch.stack([predicted[f"y_{j}"] for j in range(3)], -1)
    assert found.shape == (50, 20, rows, 3)
    precision = size + 1 / 50.0**2
    mean, variance = y.sum(0) / precision, 1.0 + 1 / precision
    first = found[:, :, 0]
    assert bool(((first.mean((0, 1)) - mean).abs() < 4 * math.sqrt(variance / 1000)).all())
    assert bool(((first.std((0, 1)) / math.sqrt(variance) - 1).abs() < 4 / math.sqrt(2 * 1000)).all())


def test_the_mode_of_column_parameters_is_exact() -> None:
    posterior = EM(progress=False, seed=0).fit(columns, TABLE)
    torch.testing.assert_close(posterior.point()["mean"], TABLE.sum(0) / (3 + 1 / 50.0**2), rtol=1e-6, atol=0.0)


def switching(y: Tensor) -> None:
    """A hidden Markov chain, in a Python loop, of which the data leave no doubt."""
    move = pyro.sample("move", dist.Dirichlet(2.0 * torch.ones(2, 2)).to_event(1))
    level, state = torch.tensor([-3.0, 3.0]), 0
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Categorical(move[state]))
        pyro.sample(f"y_{t}", dist.Normal(level[state], 0.5), obs=y[t])


@pytest.mark.parametrize("length", [2, 4, 6])
def test_a_new_series_has_states_of_its_own(length: int) -> None:
    """Means within four standard errors of a quadrature over the two chances to move to state 1, which are Beta(3, 2) from
    state 0, seen once, and Beta(5, 2) from state 1, seen three times: 12 checks, a false alarm in 1300 runs."""
    posterior = Gibbs(chains=50, warmup=5, draws=20, progress=False, seed=0).fit(switching, torch.full((4,), 3.0))
    predicted = posterior.predict(torch.zeros(length))
    assert predicted.keys() == {f"y_{t}" for t in range(length)}
    chance = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    weights = [dist.Beta(a, 2.0).log_prob(chance).softmax(0) for a in (3.0, 5.0)]
    state = torch.zeros(1000, 1000, dtype=torch.float64)
    for t in range(length):
        state = (1 - state) * chance[:, None] + state * chance
        share = float(weights[0] @ state @ weights[1])
        sd = math.sqrt(0.25 + 36.0 * share * (1 - share))
        assert abs(float(predicted[f"y_{t}"].mean()) - (6.0 * share - 3.0)) < 4 * sd / math.sqrt(1000)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_new_series_of_a_changing_program_has_states_of_its_own(length: int) -> None:
    """Python reads the states. Means of 1000 draws within four standard errors: 6 checks, a false alarm in 2600 runs."""

    def program(y: Tensor) -> None:
        for t in range(len(y)):
            state = pyro.sample(f"state_{t}", dist.Bernoulli(0.5))
            pyro.sample(f"y_{t}", dist.Normal(3.0 if state else -3.0, 0.5), obs=y[t])

    posterior = MetropolisHastings(proposal=Prior(), chains=10, warmup=10, draws=100, progress=False, seed=0).fit(
        program, torch.full((2,), 3.0)
    )
    predicted = posterior.predict(torch.zeros(length))
    assert predicted.keys() == {f"y_{t}" for t in range(length)}
    assert all(abs(float(value.mean())) < 4 * math.sqrt(9.25 / 1000) for value in predicted.values())


def test_labels_given_with_new_rows_are_kept() -> None:
    """Observations at labels 0 and 1 are 20 apart."""

    def program(y: Tensor, label: Tensor | None = None) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y)):
            label = pyro.sample("label", dist.Bernoulli(0.5), obs=label)
            pyro.sample("y", dist.Normal(mean + 20.0 * label, 1.0), obs=y)

    posterior = Gibbs(**SHORT).fit(program, torch.tensor([0.0, 20.0, 1.0]))
    predicted = posterior.predict(torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]))
    assert predicted.keys() == {"y"}
    assert torch.equal(predicted["y"] > 10.0, torch.tensor([False, True, True]).expand(2, 4, 3))


@every_backend
def test_a_weight_of_the_program_is_trained_or_held_fixed(backend: str) -> None:
    def program(y: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0, dtype=torch.float64))  # noqa: TID251
        mean = pyro.sample("mean", dist.Normal(0.0, 0.01))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean + shift, 2.0), obs=y)

    posterior = BACKENDS[backend]().fit(program, Y)
    shift = float(posterior.weights["shift"])
    if backend == "EM":
        assert shift == pytest.approx(float(Y.mean()), abs=1e-3)
    else:
        assert (shift != 0.0) == (backend == "SVI")


@every_backend
def test_a_hidden_site_is_drawn_by_nobody(backend: str) -> None:
    """``block`` hides a site from inference: what is drawn there is hidden randomness, and said to be so."""
    with pytest.raises(Unsupported, match="hidden randomness"):
        BACKENDS[backend]().fit(poutine.block(two_levels, hide=["offset"]), Y)


@every_backend
def test_a_hidden_site_with_a_value_is_a_constant(backend: str) -> None:
    held = poutine.block(poutine.condition(two_levels, {"offset": torch.tensor(1.0)}), hide=["offset"])
    posterior = BACKENDS[backend]().fit(held, Y)
    assert posterior.draws.keys() == {"mean"}


@every_backend
def test_a_plate_that_draws_its_rows_is_refused_with_what_to_use(backend: str) -> None:
    def program(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(y), subsample_size=3) as index:
            pyro.sample("y", dist.Normal(mean, 2.0), obs=y[index])

    with pytest.raises(Unsupported, match=r"takes 3 of 6 rows at random.*batch_size"):
        BACKENDS[backend]().fit(program, Y)


def test_a_program_that_is_not_run_is_its_weights_and_rows() -> None:
    """What a back-end of losses sees: no site, all weights, rows by their first dimension; predictions run it after all."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by, self.idle, self.runs = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(3)), 0

        def model(self, x: Tensor) -> None:
            self.runs += 1
            with pyro.plate("rows", len(x)):
                pyro.sample("x", dist.Normal(self.by, 1e-3).to_event(1), obs=x)

    module, x = Shifted(), torch.arange(12.0).reshape(6, 2)
    program = Program(module, (x,), is_run=False)
    assert not module.runs and not program.latents and not program.observed
    assert set(program.weights) == {"by", "idle"} and program.rows == 6 and program.dtype == torch.float32
    assert torch.equal(program.minibatch(torch.tensor([4, 1]))[0], x[[4, 1]])
    torch.testing.assert_close(program.predict({})["x"], torch.ones(1, 1, 6, 2), rtol=0.0, atol=0.01)
    with pytest.raises(Unsupported, match="no method model"):
        Program(nn.Linear(2, 2), (x,), is_run=False).predict({})
