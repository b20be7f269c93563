"""What every test shares: one thread, the staged rung, no window, and a parameter store that stays empty.

``pytest --device cuda`` runs the same tests on a GPU; ``PYRO_GENMODELS_RUNG=compiled pytest`` on compiled graphs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("PYRO_GENMODELS_RUNG", "staged")
os.environ.setdefault("MPLBACKEND", "Agg")

import pyro
import pytest
import torch

from inference.handlers import isolated, quiet, reproducible

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the programs run: cpu (default), cuda, cuda:1 ...")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the programs of a test run."""
    return torch.device(request.config.getoption("--device"))


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
