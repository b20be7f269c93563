"""The program of denoising diffusion with a plate of links: its bound is that of the chain, whichever links it sees."""

from __future__ import annotations

import math

import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor

from inference import SVI
from pyro_genmodels.diffusion import DDPM, Betas, Network, Oracle
from pyro_genmodels.diffusion.likelihood import variational_bound
from pyro_genmodels.diffusion.plated import PlatedDDPM
from pyro_genmodels.nets import PointNetwork

STEPS = 12


def case(variance: str = "upper") -> tuple[DDPM, Tensor]:
    torch.manual_seed(0)
    oracle = Oracle.ring(5, Betas.cosine(STEPS))
    return DDPM(oracle, (2,), STEPS, variance), oracle.distribution().sample((40,))  # type: ignore[arg-type]


@pytest.mark.parametrize(("variance", "links"), [("upper", 1), ("upper", 5), ("lower", 5), ("optimal", 1)])
def test_the_bound_of_some_links_is_unbiased_for_that_of_the_chain(variance: str, links: int) -> None:
    """Means over 100 runs, of the plate and of the closed forms: three standard errors of their difference,
    one of these draws in a hundred."""
    chain, x = case(variance)
    model = PlatedDDPM(chain, links)
    torch.manual_seed(1)
    plated = torch.tensor([-Trace_ELBO().loss(model.model, model.guide, x) for _ in range(100)])
    whole = variational_bound(chain.denoiser, x.repeat(50, 1), chain.grid, variance).total.reshape(50, -1).sum(1)  # type: ignore[arg-type]
    error = math.hypot(plated.std() / math.sqrt(100), whole.std() / math.sqrt(50))
    assert abs(plated.mean() - whole.mean()) < 3.0 * error


def test_all_links_are_the_sum_of_the_closed_forms_at_the_same_noise() -> None:
    for variance in ("upper", "lower", "optimal"):
        chain, x = case(variance)
        model = PlatedDDPM(chain, STEPS)
        torch.manual_seed(2)
        noise = poutine.trace(model.guide).get_trace(x).nodes["noise"]["value"]
        expected = variational_bound(chain.denoiser, x, chain.grid, variance, noise=noise).total.sum()  # type: ignore[arg-type]
        for bound in (Trace_ELBO(), TraceMeanField_ELBO()):
            torch.manual_seed(2)
            assert -bound.loss(model.model, model.guide, x) == pytest.approx(expected.item(), abs=1e-6)


def test_without_data_it_draws_from_the_chain() -> None:
    chain, _ = case()
    torch.manual_seed(3)
    x = PlatedDDPM(chain).model(size=6)
    torch.manual_seed(3)
    assert torch.equal(x, chain.model(size=6)) and x.shape == (6, 2)


def test_a_thousand_links_train_by_a_few() -> None:
    """The bound of all links, at the same noise before and after, rises by half a nat."""
    torch.manual_seed(4)
    oracle = Oracle.ring(5, Betas.cosine(1000))
    x = oracle.distribution().sample((100,)).float()
    chain = DDPM(Network(PointNetwork(2, width=32, blocks=1), oracle.schedule, "velocity"), (2,), 1000)
    before = all_links(chain, x[:20])
    SVI(steps=120, learning_rate=5e-3, draws=2, seed=0, progress=False).fit(PlatedDDPM(chain, 16), x)
    assert all_links(chain, x[:20]) > before + 0.5


@torch.no_grad()
def all_links(chain: DDPM, x: Tensor) -> float:
    model = PlatedDDPM(chain, chain.grid.numel() - 1)
    torch.manual_seed(5)
    return -Trace_ELBO().loss(model.model, model.guide, x) / len(x)


def test_a_number_of_links_that_cannot_be_is_refused() -> None:
    chain, _ = case()
    for links in (0, STEPS + 1, 2.0):
        with pytest.raises(ValueError, match="how many of the 12 links a row draws"):
            PlatedDDPM(chain, links)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        PlatedDDPM(chain).model(torch.zeros(4, 3))
