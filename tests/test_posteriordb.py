"""Samplers agree with the reference draws of posteriordb, ten thousand nearly independent ones for each posterior.

The programs are tested themselves, without any sampler: at the reference draws their scores obey Stein's identities.
``examples/benchmarks/posteriordb.py`` prints what the slow tests here compare.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import Tensor

from inference.calibration import score_test
from inference.handlers import isolated, quiet, reproducible
from inference.plan import assign
from inference.program import Program
from posteriordb import ARCHIVE, BY_NAME, REFERENCES, SAMPLERS, Reference, compared, sampler

pytestmark = pytest.mark.skipif(not ARCHIVE.exists(), reason=f"There is no {ARCHIVE}: set PYRO_GENMODELS_DATA.")

EVERY = pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.label)
QUICK = ("eight_schools_noncentered", "kidscore_momiq", "low_dim_gauss_mix")


# ------------------------------------------------------------------------------------------ translations
@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
@EVERY
def test_a_translation_has_zero_mean_score(reference: Reference, step: int) -> None:
    """|z| < 4 for 174 means and slopes of 87 coordinates: a false alarm in 90, if the draws were drawn anew."""
    values = {site: value[:, ::step] for site, value in reference.values().items()}
    found = score_test(reference.program, values, *reference.data())
    assert found.worst < 4.0, found


def wrong_prior(y: Tensor, sigma: Tensor) -> None:
    """As eight_schools, with 5.5 for 5."""
    mu = pyro.sample("mu", dist.Normal(y.new_tensor(0.0), 5.5))
    tau = pyro.sample("tau", dist.HalfCauchy(y.new_tensor(5.0)))
    with pyro.plate("schools", len(y)):
        offset = pyro.sample("offset", dist.Normal(y.new_tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(mu + tau * offset, sigma), obs=y)


def flat_sigma(y: Tensor, x: Tensor) -> None:
    """As kidscore, without the half-Cauchy prior."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), (x.shape[1],)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [(wrong_prior, "eight_schools-eight_schools_noncentered"), (flat_sigma, "kidiq-kidscore_momiq")],
    ids=["prior", "flat"],
)
def test_a_wrong_translation_is_found_out(wrong: Callable[..., None], name: str) -> None:
    reference = BY_NAME[name]
    assert score_test(wrong, reference.values(), *reference.data()).worst > 5.0


def test_summing_states_out_changes_nothing(inside_a_run: None) -> None:
    """``hmm_example`` by products of matrices and by its states, summed out one by one."""
    reference = BY_NAME["hmm_example-hmm_example"]
    assert reference.explicit is not None
    values = {name: value[0, :3] for name, value in reference.values().items()}
    for name in ("theta1", "theta2"):  # single precision does not sum to one
        values[name] = values[name] / values[name].sum(-1, keepdim=True)
    data = reference.data()
    whole, states = Program(reference.program, data), Program(reference.explicit, data)
    found = states.density.marginal(states.finite)(values) + torch.tensor(2.0).log()  # the first state is uniform there
    torch.testing.assert_close(whole.density.joint(values), found, rtol=1e-10, atol=0)


# ------------------------------------------------------------------------------------------------ plans
SD = "InverseGamma of the square"
CONJUGATE = {  # normals alone or jointly with others
    "eight_schools_noncentered": {"mu": "Gaussian", "offset": "Gaussian"},
    "kidscore_momiq": {"beta": "Gaussian"},
    "kidscore_interaction": {"beta": "Gaussian"},
    "logearn_height": {"beta": "Gaussian", "sigma": SD},
    "nes": {"beta": "Gaussian", "sigma": SD},
    "mesquite": {"beta": "Gaussian", "sigma": SD},
    "blr": {"beta": "Gaussian"},
    "kilpisjarvi": {"alpha": "Gaussian", "beta": "Gaussian", "sigma": SD},
    "arK": {"alpha": "Gaussian", "beta": "Gaussian"},
    "arma11": {"mu": "Gaussian", "phi": "Gaussian"},
    "gp_pois_regr": {},
    "low_dim_gauss_mix": {"second": "Enumerate", "theta": "Beta", "mu": "Gaussian"},
}


@pytest.mark.parametrize("label", CONJUGATE)
def test_conjugate_sites_are_recognised(label: str, inside_a_run: None) -> None:
    (reference,) = (reference for reference in REFERENCES if reference.label == label)
    blocks, _ = assign(Program(reference.program, reference.data()))
    found = {site: block.update for block in blocks if block.is_exact for site in block.sites}
    assert {site: "Gaussian" if update == "Normal" else update for site, update in found.items()} == CONJUGATE[label]


def test_a_chain_of_states_is_drawn_at_once(inside_a_run: None) -> None:
    reference = BY_NAME["hmm_example-hmm_example"]
    assert reference.explicit is not None
    blocks, _ = assign(Program(reference.explicit, reference.data()))
    updates = {site: block.update for block in blocks for site in block.sites}
    assert {updates.pop(site) for site in [*updates] if site.startswith("state")} == {"Enumerate"}
    assert updates == {"theta1": "Dirichlet", "theta2": "Dirichlet", "mu": "Normal"}


# --------------------------------------------------------------------------------------------- samplers
def _cells() -> list[object]:
    """Each of the quick ones leaves all but one of the samplers to ``-m slow``, the next one the next."""
    turns = {label: [*SAMPLERS][number % len(SAMPLERS)] for number, label in enumerate(QUICK)}
    return [
        pytest.param(r, name, id=f"{r.label}-{name}", marks=() if turns.get(r.label) == name else (pytest.mark.slow,))
        for r in REFERENCES
        for name in SAMPLERS
    ]


@pytest.mark.parametrize(("reference", "name"), _cells())
def test_samplers_agree_with_the_reference_draws(reference: Reference, name: str, device: torch.device) -> None:
    """|z| < 4 for 36 means and standard deviations of each sampler: a false alarm in 400, under fresh seeds.

    The slow tests, 400 more: |z| < 4.5, a false alarm in 300.
    """
    program = reference.explicit if name == "Gibbs" and reference.explicit else reference.program
    data = reference.data(device)
    if name == "Gibbs":
        with isolated(0), reproducible(torch.float64), quiet():
            blocks, _ = assign(Program(program, data))
        if not any(block.is_exact for block in blocks):
            pytest.skip("the plan is what HMC does")
    posterior = sampler(name, reference).fit(program, *data)
    bound = 4.0 if reference.label in QUICK else 4.5
    for parameter, found in compared(posterior.draws, reference).items():
        assert abs(found.mean) < bound and abs(found.sd) < bound, (parameter, found)
        assert found.rhat < 1.01, (parameter, found)
