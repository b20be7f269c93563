"""Programs as users write them run unchanged through every back-end, and mean what Pyro means by them.

Every program here has the normal posterior of one location, so that one closed form judges all: EM to rounding, samplers
within five Monte-Carlo standard errors (56 comparisons: a false alarm in 3e4 runs), SVI's guide, which contains the
posterior, within a fifth of a standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

from inference import EM, HMC, SVI, Backend, Gibbs, MetropolisHastings, Posterior, Unsupported, arviz

Y = torch.tensor([1.0, 2.5, -0.5, 2.0, 3.0, 0.5], dtype=torch.float64)
SEEN = torch.tensor([True, True, False, True, False, True])
HOLES = torch.where(SEEN, Y, torch.nan)
NEW = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)

BACKENDS: dict[str, Callable[..., Backend[Any, Any]]] = {
    "Gibbs": lambda **o: Gibbs(**{"chains": 50, "warmup": 20, "draws": 20, "progress": False, "seed": 0, **o}),
    "MetropolisHastings": lambda **o: MetropolisHastings(
        **{"chains": 50, "warmup": 100, "draws": 20, "thin": 4, "progress": False, "seed": 0, **o}
    ),
    "HMC": lambda **o: HMC(**{"chains": 50, "warmup": 60, "draws": 20, "progress": False, "seed": 0, **o}),
    "SVI": lambda **o: SVI(
        **{"steps": 300, "learning_rate": 0.1, "draws": 1000, "progress": False, "seed": 0, **o}
    ),
    "EM": lambda **o: EM(**{"progress": False, "seed": 0, **o}),
}  # fmt: skip
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
    """A program with its data, mean and standard deviation of the posterior of ``mean``, and what one gets of it."""

    program: Any
    data: tuple[Tensor, ...]
    exact: tuple[float, float]
    site: str = "mean"


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


def agrees(posterior: Posterior, backend: str, site: str, exact: tuple[float, float]) -> None:
    draws, (mean, sd) = posterior.draws[site].double().numpy(), exact
    if backend == "EM":
        assert float(draws) == pytest.approx(mean, rel=1e-6)
    elif backend == "SVI":
        assert abs(draws.mean() - mean) < 0.2 * sd and abs(draws.std() / sd - 1) < 0.2
    else:
        assert abs(draws.mean() - mean) < 5 * arviz.mcse(draws)
        assert abs(draws.std() - sd) < 5 * arviz.mcse(draws, method="sd")


@every_backend
@pytest.mark.parametrize("name", CASES)
def test_a_program_means_to_every_backend_what_it_means_to_pyro(name: str, backend: str) -> None:
    case = CASES[name]
    posterior = BACKENDS[backend]().fit(case.program, *case.data)
    agrees(posterior, backend, case.site, case.exact)
    if name == "deterministic":
        torch.testing.assert_close(posterior.draws["double"], 2.0 * posterior.draws["mean"])
        assert "double" in posterior.to_arviz(log_likelihood=False)["posterior"]
    if name == "obs_mask":  # what is missing is a latent site, drawn or averaged
        missing = posterior.draws["y_unobserved"]
        assert missing.shape[2:] == Y.shape and bool(missing.isfinite().all())
    predicted = posterior.predict()
    for site in posterior.observed:
        assert predicted[site].shape == (*posterior.shape, *posterior.observed[site].shape)


@every_backend
@pytest.mark.parametrize(
    "name", ["plain", "deterministic", "param", "plate index", "scale", "reparam", "infer_config", "do"]
)
def test_predictions_at_new_data_have_the_size_of_the_new_data(name: str, backend: str) -> None:
    case = CASES[name]
    posterior = BACKENDS[backend](**({} if backend == "EM" else {"draws": 4})).fit(case.program, *case.data)
    predicted = posterior.predict(NEW)["y"]
    assert predicted.shape == (*posterior.shape, 3) and bool(predicted.isfinite().all())


@every_backend
def test_predictions_have_the_moments_of_the_posterior_predictive(backend: str) -> None:
    """Within five standard errors; EM predicts from its point."""
    mean, sd = posterior_of(Y)
    posterior = BACKENDS[backend]().fit(level, Y)
    predicted = torch.cat([posterior.predict(NEW)["y"].flatten() for _ in range(1)]).numpy()
    spread = 2.0 if backend == "EM" else math.sqrt(4.0 + sd**2)
    least = 0.2 * sd if backend == "SVI" else 0.0
    assert abs(predicted.mean() - mean) < 5 * spread / math.sqrt(predicted.size) + least + 5 * sd / math.sqrt(300)
    if backend != "EM":
        assert abs(predicted.std() / spread - 1) < 0.1
    again = posterior.predict(NEW)["y"].flatten().numpy()
    assert np.array_equal(predicted, again)


@every_backend
def test_a_weight_of_the_program_is_trained_or_held_fixed(backend: str) -> None:
    def program(y: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.0, dtype=torch.float64))  # noqa: TID251
        mean = pyro.sample("mean", dist.Normal(0.0, 0.01))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mean + shift, 2.0), obs=y)

    posterior = BACKENDS[backend]().fit(program, Y)
    expected = float(Y.mean()) if backend in ("EM", "SVI") else 0.0
    assert float(posterior.weights["shift"]) == pytest.approx(expected, abs=0.02 if backend == "SVI" else 1e-3)


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
