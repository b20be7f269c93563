"""Samplers agree with the reference draws of posteriordb, ten thousand nearly independent ones for each posterior.

The programs are written anew from the Stan programs, and are tested themselves, without any sampler: the score, averaged
over the reference draws, is zero (Stein's identity).

References:
    M. Magnusson et al., posteriordb: a set of posteriors for Bayesian inference and probabilistic programming (2023).
    J. Gorham and L. Mackey, Measuring sample quality with Stein's method (2015).
"""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from inference import HMC, Gibbs, MetropolisHastings, Posterior, arviz
from inference.density import Density, Unconstrained
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program

FOLDER = Path(os.environ.get("PYRO_GENMODELS_DATA") or Path(__file__).parents[2] / "shared" / "data")
ARCHIVE = FOLDER / "posteriordb.zip"
pytestmark = pytest.mark.skipif(not ARCHIVE.exists(), reason=f"There is no {ARCHIVE}: set PYRO_GENMODELS_DATA.")


# ------------------------------------------------------------------------------------------ programs
def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """eight_schools_noncentered.stan"""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", len(y)):
        offset = pyro.sample("offset", dist.Normal(y.new_tensor(0.0), 1.0))
        theta = pyro.deterministic("theta", mu + tau * offset)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore(score: Tensor, iq: Tensor) -> None:
    """kidscore_momiq.stan: beta is flat."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = pyro.sample("sigma", dist.HalfCauchy(score.new_tensor(2.5)))
    with pyro.plate("children", len(score)):
        pyro.sample("score", dist.Normal(beta[0] + beta[1] * iq, sigma), obs=score)


def mixture(y: Tensor) -> None:
    """low_dim_gauss_mix.stan without its ordering: labels are sorted afterwards, which is the same posterior."""
    theta = pyro.sample("theta", dist.Beta(y.new_tensor(5.0), 5.0))
    with pyro.plate("components", 2):
        mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 2.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(y.new_tensor(2.0)))
    with pyro.plate("rows", len(y)):
        second = pyro.sample("second", dist.Bernoulli(1.0 - theta)).long()
        pyro.sample("y", dist.Normal(mu[second], sigma[second]), obs=y)


class Reference(NamedTuple):
    """A posterior of posteriordb.

    Attributes:
        name: Its name.
        program: The program, in Pyro.
        data: Names of the data that are its arguments.
        quantities: Draws of our sites to posteriordb's parameters, as (chain, draw) each.
        sites: Reference draws by parameter to values of our sites.
        backends: What to run, by name.
    """

    name: str
    program: Callable[..., None]
    data: tuple[str, ...]
    quantities: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    sites: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    backends: dict[str, Any]


def _stack(draws: dict[str, Tensor], name: str, count: int) -> Tensor:
    return torch.stack([draws[f"{name}[{i + 1}]"] for i in range(count)], -1)


def _named(name: str, values: Tensor) -> dict[str, Tensor]:
    return {f"{name}[{i + 1}]": values[..., i] for i in range(values.shape[-1])}


def _schools_sites(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    mu, tau = draws["mu"], draws["tau"]
    return {"mu": mu, "tau": tau, "offset": (_stack(draws, "theta", 8) - mu[..., None]) / tau[..., None]}


def _sorted(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names the components by their means, as Stan's ordered vector does; theta is the weight of the first."""
    order = draws["mu"].argsort(-1)
    theta = torch.where(order[..., 0] == 0, draws["theta"], 1.0 - draws["theta"])
    return {
        **_named("mu", draws["mu"].gather(-1, order)), **_named("sigma", draws["sigma"].gather(-1, order)), "theta": theta,
    }  # fmt: skip


REFERENCES = (
    Reference(
        "eight_schools-eight_schools_noncentered", eight_schools, ("y", "sigma"),
        lambda draws: {"mu": draws["mu"], "tau": draws["tau"], **_named("theta", draws["theta"])},
        _schools_sites,
        {
            "Gibbs": Gibbs(chains=32, warmup=300, draws=250, thin=3, seed=1, progress=False),
            "MetropolisHastings": MetropolisHastings(chains=32, warmup=2000, draws=250, thin=25, seed=2, progress=False),
            "HMC": HMC(chains=32, warmup=300, draws=400, seed=3, progress=False),
        },
    ),
    Reference(
        "kidiq-kidscore_momiq", kidscore, ("kid_score", "mom_iq"),
        lambda draws: {**_named("beta", draws["beta"]), "sigma": draws["sigma"]},
        lambda draws: {"beta": _stack(draws, "beta", 2), "sigma": draws["sigma"]},
        {
            "Gibbs": Gibbs(chains=16, warmup=100, draws=250, seed=1, progress=False),
            "MetropolisHastings": MetropolisHastings(chains=16, warmup=1000, draws=250, thin=10, seed=2, progress=False),
            "HMC": HMC(chains=16, warmup=300, draws=400, seed=3, progress=False),
        },
    ),
    Reference(
        "low_dim_gauss_mix-low_dim_gauss_mix", mixture, ("y",),
        _sorted,
        lambda draws: {"mu": _stack(draws, "mu", 2), "sigma": _stack(draws, "sigma", 2), "theta": draws["theta"]},
        {
            "Gibbs": Gibbs(chains=8, warmup=100, draws=300, seed=1, progress=False),
            "MetropolisHastings": MetropolisHastings(chains=8, warmup=1000, draws=300, thin=10, seed=2, progress=False),
            "HMC": HMC(chains=8, warmup=150, draws=400, seed=3, progress=False),
        },
    ),
)  # fmt: skip
EVERY = pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name.split("-")[1])


def loaded(reference: Reference) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The arguments of the program, and the reference draws by parameter, (chain, draw) each."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        info = json.loads(archive.read(f"info/{reference.name}.json"))
        values = json.loads(archive.read(info["data_file"]))
        draws = torch.from_numpy(np.load(io.BytesIO(archive.read(info["draws_file"]))).astype(float))
    data = tuple(torch.tensor(values[name], dtype=torch.float64) for name in reference.data)
    return data, dict(zip(info["parameter_names"], draws.unbind(-1), strict=True))


def score(program: Callable[..., None], data: tuple[Tensor, ...], values: dict[str, Tensor]) -> np.ndarray:
    """Mean of ∇ log p over independent draws in unconstrained space, in standard errors: (coordinates,)."""
    with isolated(0), reproducible(torch.float64), quiet():
        looked = Program(program, data)
        coordinates = Unconstrained(looked, looked.continuous)
        position = coordinates.position({name: value.flatten(0, 1) for name, value in values.items()})
        slopes = Density(looked, rung="vmapped").unconstrained(coordinates, looked.finite)
        gradients = torch.cat([slopes(part, {})[0] for part in position.split(500)]).numpy()
    return gradients.mean(0) / (gradients.std(0) / len(gradients) ** 0.5)


@EVERY
def test_a_translation_has_zero_mean_score(reference: Reference) -> None:
    """|z| < 4 for 18 coordinates: a false alarm in 900, if the reference draws were drawn anew."""
    data, draws = loaded(reference)
    z = score(reference.program, data, reference.sites(draws))
    assert np.abs(z).max() < 4.0, z


def wrong_prior(y: Tensor, sigma: Tensor) -> None:
    """As eight_schools, with 5.5 for 5."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.5))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", len(y)):
        offset = pyro.sample("offset", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * offset, sigma), obs=y)


def flat_sigma(score: Tensor, iq: Tensor) -> None:
    """As kidscore, without the half-Cauchy prior."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (2,)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("children", len(score)):
        pyro.sample("score", dist.Normal(beta[0] + beta[1] * iq, sigma), obs=score)


@pytest.mark.parametrize(("wrong", "index"), [(wrong_prior, 0), (flat_sigma, 1)], ids=["prior", "flat"])
def test_a_wrong_translation_is_found_out(wrong: Callable[..., None], index: int) -> None:
    data, draws = loaded(REFERENCES[index])
    assert np.abs(score(wrong, data, REFERENCES[index].sites(draws))).max() > 5.0


def compared(posterior: Posterior, reference: Reference) -> dict[str, tuple[float, float, float]]:
    """For each parameter the z of its mean and of its standard deviation, and R-hat of ours together with theirs."""
    _, theirs = loaded(reference)
    ours = reference.quantities(posterior.draws)
    assert ours.keys() == theirs.keys()
    found = {}
    for name in ours:
        a, b = ours[name].numpy(), theirs[name].numpy()
        scores = []
        for method, statistic in (("mean", np.mean), ("sd", np.std)):
            error = np.hypot(arviz.mcse(a, method=method), arviz.mcse(b, method=method))
            scores.append(float((statistic(a) - statistic(b)) / error))
        length = min(a.shape[1], b.shape[1])
        together = np.concatenate([a[:, :length], b[:, :length]])
        found[name] = (scores[0], scores[1], float(arviz.rhat(together)))
    return found


@pytest.mark.parametrize("backend", ["Gibbs", "MetropolisHastings", "HMC"])
@EVERY
def test_samplers_agree_with_the_reference_draws(reference: Reference, backend: str, device: torch.device) -> None:
    """|z| < 4 for 36 means and standard deviations of each back-end: a false alarm in 400, under fresh seeds."""
    data, _ = loaded(reference)
    posterior = reference.backends[backend].fit(reference.program, *(tensor.to(device) for tensor in data))
    for name, (mean, sd, rhat) in compared(posterior, reference).items():
        assert abs(mean) < 4.0 and abs(sd) < 4.0, (name, mean, sd)
        assert rhat < 1.01, (name, rhat)
