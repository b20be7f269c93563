"""The program of denoising diffusion: its bound, by Pyro's own estimators, against closed forms."""

from __future__ import annotations

import math

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

from inference import SVI
from pyro_genmodels.diffusion import DDPM, VE, Betas, Network, Oracle
from pyro_genmodels.diffusion.likelihood import variational_bound


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_with_exact_links_every_draw_of_the_guide_has_the_log_density_of_its_data() -> None:
    """Standard normal data have a standard normal x_T: the bound is log p(x), through Pyro's ELBO of one particle."""
    for steps in (5, 50):
        schedule = Betas.cosine(steps)
        oracle = Oracle(f64(1.0), torch.zeros(1, 3, dtype=torch.float64), 1.0, schedule)
        ddpm = DDPM(oracle, (3,), steps, "optimal")
        torch.manual_seed(0)
        x = oracle.distribution().sample((4,))
        for _ in range(3):
            assert Trace_ELBO().loss(ddpm.model, ddpm.guide, x) == pytest.approx(-oracle.log_prob(x).sum().item(), abs=1e-8)


@pytest.mark.parametrize("variance", ["upper", "lower", "optimal"])
def test_the_mean_field_bound_is_the_sum_of_the_closed_forms_at_the_same_path(variance: str) -> None:
    """L_T + Σ L_{t−1} + L_0, each at the x_t that the guide drew."""
    torch.manual_seed(1)
    oracle = Oracle.ring(5, Betas.cosine(6))
    x = oracle.distribution().sample((30,))
    ddpm = DDPM(oracle, (2,), 6, variance)  # type: ignore[arg-type]
    torch.manual_seed(2)
    sites = poutine.trace(ddpm.guide).get_trace(x).nodes
    draws = []
    for i in range(6, 0, -1):
        t = f64(i)[0]
        draws.append((sites[f"x_{i}"]["value"] - oracle.schedule.alpha(t) * x) / oracle.schedule.sigma(t))
    expected = variational_bound(oracle, x, ddpm.grid, variance, noise=torch.stack(draws)).total  # type: ignore[arg-type]
    torch.manual_seed(2)
    found = TraceMeanField_ELBO().loss(ddpm.model, ddpm.guide, x)
    assert -found == pytest.approx(expected.sum().item(), abs=1e-7)


def test_draws_of_the_program_are_those_of_the_data() -> None:
    """Normal data and optimal links: mean and variance of 20,000 draws, 5 standard errors."""
    oracle = Oracle(f64(1.0), torch.zeros(1, 1, dtype=torch.float64), 1.0, Betas.cosine(8))
    torch.manual_seed(3)
    x = DDPM(oracle, (1,), 8, "optimal").model(size=20000)
    assert x.shape == (20000, 1)
    assert abs(x.mean()) < 5.0 / math.sqrt(20000) and abs(x.var() - 1.0) < 5.0 * math.sqrt(2.0 / 20000)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.layers(torch.cat([x, level[:, None]], 1))


def test_training_by_svi_raises_the_bound() -> None:
    torch.manual_seed(4)
    oracle = Oracle.ring(5, Betas.cosine(10))
    x = oracle.distribution().sample((300,))
    ddpm = DDPM(Network(Small(), oracle.schedule, "velocity"), (2,), 10)
    before = variational_bound(ddpm.denoiser, x, ddpm.grid).total.mean()
    SVI(steps=100, learning_rate=1e-2, seed=0, progress=False).fit(ddpm, x)
    after = variational_bound(ddpm.denoiser, x, ddpm.grid).total.mean()
    assert after > before + 0.1
    assert after < oracle.log_prob(x).mean() + 0.2


def test_a_program_says_what_is_wrong() -> None:
    oracle = Oracle.ring(5, Betas.cosine(6))
    with pytest.raises(ValueError, match="variance is 'upper'"):
        DDPM(oracle, (2,), 6, "full")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="or the number of rows to draw"):
        DDPM(oracle, (2,), 6).model()
    with pytest.raises(ValueError, match="built for"):
        DDPM(oracle, (2,), 6).model(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="append 0 to the grid"):
        variational_bound(Oracle.ring(5, VE()), torch.zeros(1, 2), VE().grid(3, "time"))
    assert not pyro.get_param_store().keys()
