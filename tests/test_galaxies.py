"""A mixture whose number of components is unknown, by Gibbs sampling alone, against what reversible jump found."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from inference import Gibbs
from inference.handlers import isolated, reproducible
from inference.program import Program
from pyro_genmodels import datasets

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from galaxies import MOST, PUBLISHED, velocities

EXACT = {
    "is_there": "Enumerate", "z": "Enumerate", "share": "Beta", "beta": "Gamma", "size": "Gamma", "mean": "Normal",
    "variance": "InverseGamma", "u": "Gamma",
}  # fmt: skip


@pytest.mark.slow
def test_the_number_of_components_is_uniform_before_the_data() -> None:
    """4000 draws. False alarm: 30 cells beyond 4 standard errors, 2e-3."""
    with isolated(0), reproducible(torch.float64):
        program = Program(velocities, (datasets.load("galaxies").x[:, 0],))
        k = torch.stack([1 + program.sample_prior()["is_there"].sum() for _ in range(4000)])
    share = torch.bincount(k.long(), minlength=MOST + 1)[1:] / len(k)
    error = np.sqrt((1 / MOST) * (1 - 1 / MOST) / len(k))
    assert float((share - 1 / MOST).abs().max()) < 4.0 * error


@pytest.mark.slow
def test_every_update_is_exact() -> None:
    posterior = Gibbs(chains=2, warmup=5, draws=20, seed=0, progress=False).fit(
        velocities, datasets.load("galaxies").x[:, 0]
    )
    assert posterior.plan is not None
    assert {site: update.update for site, update in posterior.plan.items()} == EXACT
    for update in posterior.plan.updates:
        assert update.certificate is not None and update.certificate < 1e-8 and update.acceptance >= 1.0 - 1e-8


@pytest.mark.slow
def test_the_number_of_components_of_the_galaxies_is_the_published_one() -> None:
    """Chains are independent: the error is that of the mean of 32 of them, and half a digit of the table's.

    False alarm: 11 probabilities beyond 4 standard errors of 32 chains (Student's t), 4e-3.
    """
    start = {"is_there": torch.ones(MOST - 1)}
    backend = Gibbs(chains=32, warmup=500, draws=1000, start=start, keep=["is_there"], seed=0, progress=False)
    k = 1 + backend.fit(velocities, datasets.load("galaxies").x[:, 0]).draws["is_there"].sum(-1).numpy()
    for components, published in PUBLISHED.items():
        own = (k == components).mean(1)
        error = own.std(ddof=1) / np.sqrt(len(own))
        assert abs(own.mean() - published) < 4.0 * error + 0.0005, (components, own.mean(), published, error)
