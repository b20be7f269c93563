"""What every test shares: one thread, the staged rung, no window, and a parameter store that stays empty.

``pytest --device cuda`` runs the same tests on a GPU; ``PYRO_GENMODELS_RUNG=compiled pytest`` on compiled graphs.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("PYRO_GENMODELS_RUNG", "staged")
os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch

from inference import HMC, Gibbs, MetropolisHastings, Posterior
from inference.handlers import isolated, quiet, reproducible
from zoo import BY_NAME, Instance

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the programs run: cpu (default), cuda, cuda:1 ...")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the programs of a test run."""
    return torch.device(request.config.getoption("--device"))


# Sweeps or steps per draw, where a draw would be much like the last one.
GIBBS_THIN = {
    "gamma_shape": 4, "mixture": 4, "crossed": 2, "normal_independent": 2, "hmm": 2, "hidden_markov": 2, "annotators": 4,
    "gmm": 4, "topics": 2, "robust": 2, "horseshoe": 8, "imputed": 6, "schools": 20, "radon": 3, "abundance": 4,
    "logistic": 4, "cox": 15, "block_model": 2, "GMM, full": 10, "GMM, tied": 8, "GMM, diagonal": 10, "GMM, spherical": 4,
    "GMM, isotropic": 2, "GMM, sticks": 10, "PPCA": 6, "FactorAnalysis": 6, "Mixture, bernoulli": 2,
    "Mixture, mixed columns": 6, "HMM": 4, "NaiveBayes": 3,
}  # fmt: skip
METROPOLIS_THIN = {
    "hierarchical": 30, "mixture": 20, "crossed": 20, "random_walk": 15, "local_level": 40, "annotators": 15, "topics": 40,
    "gmm": 40, "stick_breaking": 15, "robust": 80, "errors_in_variables": 20, "horseshoe": 160, "schools": 20,
    "schools_apart": 20, "batting": 15, "radon": 15, "rasch": 25, "item_response": 60, "ratings": 80, "cox": 150,
    "gaussian_process": 15, "hmm": 10, "GMM, full": 150, "GMM, tied": 80, "GMM, diagonal": 120, "GMM, spherical": 60,
    "GMM, isotropic": 20, "GMM, sticks": 240, "Mixture, mixed columns": 60, "NaiveBayes": 20, "LinearRegression": 20,
    "MarginClassifier": 20, "PPCA": 90, "PPCA, summed": 20, "FactorAnalysis": 180, "HMM": 60,
}  # fmt: skip
# Sweeps before the first draw, where labels take long to leave the clusters that a chain starts from.
GIBBS_WARMUP = {"Mixture, mixed columns": 400}
HMC_THIN = {"hmm": 2, "horseshoe": 4, "MarginClassifier": 4, "PPCA": 3, "GMM, full": 2}
# Far out its curvature is two hundred times as large, and a chain that strays there in warm-up takes long to leave.
HMC_WARMUP = {"horseshoe": 300, "MarginClassifier": 300}
# Chains where one evaluation is dear: the change-point has a table of years by years.
CHAINS = {"coal": 16}


def _gibbs(name: str) -> Gibbs:
    warmup = GIBBS_WARMUP.get(name, 60)
    return Gibbs(chains=64, warmup=warmup, draws=60, thin=GIBBS_THIN.get(name, 1), seed=1, progress=False)


def _metropolis(name: str) -> MetropolisHastings:
    chains, thin = CHAINS.get(name, 48), METROPOLIS_THIN.get(name, 10)
    return MetropolisHastings(chains=chains, warmup=500, draws=60, thin=thin, seed=2, progress=False)


def _hmc(name: str) -> HMC:
    chains, warmup, thin = CHAINS.get(name, 48), HMC_WARMUP.get(name, 150), HMC_THIN.get(name, 1)
    return HMC(chains=chains, warmup=warmup, draws=100, thin=thin, seed=3, progress=False)


SAMPLERS: dict[str, Callable[[str], Any]] = {"Gibbs": _gibbs, "MetropolisHastings": _metropolis, "HMC": _hmc}


@pytest.fixture(scope="session")
def sampled(device: torch.device) -> Callable[[Instance, str], Posterior]:
    """Fits an instance of the zoo by one of ``SAMPLERS``, once for all tests that look at it."""

    @functools.cache
    def fitted(name: str, sampler: str) -> Posterior:
        return SAMPLERS[sampler](name).fit(BY_NAME[name].program, *BY_NAME[name].on(device))

    return lambda instance, sampler: fitted(instance.name, sampler)


@pytest.fixture(autouse=True)
def parameter_store_stays_empty() -> Iterator[None]:
    """Nothing that a test does may leave a trace in Pyro's global parameter store."""
    yield
    left = sorted(pyro.get_param_store().keys())
    assert not left, f"Pyro's parameter store holds {left}."


@pytest.fixture
def inside_a_run() -> Iterator[None]:
    """What ``fit`` sets up around a back-end: a seed, float64, deterministic algorithms, no validation."""
    with isolated(0), reproducible(torch.float64), quiet():
        yield
