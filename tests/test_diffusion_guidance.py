"""Guidance: with an exact classifier it is exact, and what it makes at other scales is known on Gaussian data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyro_genmodels.diffusion import EDM, VE, VP, Oracle, samplers
from pyro_genmodels.diffusion.guidance import ClassifierFree, ClassifierGuided

LABELS = torch.tensor([0, 1, 1, 0, 1])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def of_class(oracle: Oracle, label: int) -> Oracle:
    chosen = label == LABELS
    return Oracle(oracle.log_weights.exp()[chosen], oracle.means[chosen], oracle.covariances[chosen], oracle.schedule)


def log_class(oracle: Oracle, label: int, x: Tensor, t: Tensor) -> Tensor:
    """log p(c | x_t) = log p(x_t | c) + log p(c) − log p(x_t)."""
    share = oracle.log_weights.exp()[label == LABELS].sum().log()
    return of_class(oracle, label).log_prob(x, t) + share - oracle.log_prob(x, t)


@pytest.mark.parametrize("schedule", [VP(), EDM(0.02, 10.0)], ids=["vp", "edm"])
def test_an_exact_classifier_gives_the_denoiser_of_its_class(schedule: VP | EDM) -> None:
    """Scale 1, at every level, for one time and for one per row; and so does every sampler."""
    oracle = Oracle.ring(5, schedule)
    torch.manual_seed(0)
    x = 2.0 * torch.randn(6, 2, dtype=torch.float64)
    for label in (0, 1):
        guided = ClassifierGuided(oracle, lambda x, t, label=label: log_class(oracle, label, x, t))
        expected = of_class(oracle, label)
        for t in (*f64(0.05, 0.5, 1.0), torch.linspace(0.05, 1.0, 6, dtype=torch.float64)):
            assert torch.allclose(guided(x, t).mean, expected(x, t).mean, atol=1e-10)
        grid = schedule.grid(6, start=0.05)
        noise = torch.randn(6, 6, 2, dtype=torch.float64)
        for sampler in (samplers.heun, samplers.dpm_solver_pp_2m):
            assert torch.allclose(sampler(guided, x, grid), sampler(expected, x, grid), atol=1e-8)
        ancestral = samplers.ancestral(expected, x, grid, noise=noise)
        assert torch.allclose(samplers.ancestral(guided, x, grid, noise=noise), ancestral, atol=1e-8)


def test_guidance_without_a_classifier_is_that_by_the_ratio() -> None:
    """γ log p(x_t | c)/p(x_t) has the same gradient; γ = 0 and 1 are the denoisers themselves, and between it is linear."""
    oracle, x = Oracle.ring(5, VP()), torch.randn(6, 2, dtype=torch.float64)
    inner = of_class(oracle, 1)
    for t in f64(0.1, 0.6):
        assert torch.equal(ClassifierFree(inner, oracle, 0.0)(x, t).mean, oracle(x, t).mean)
        assert torch.allclose(ClassifierFree(inner, oracle, 1.0)(x, t).mean, inner(x, t).mean, atol=1e-12)
        for scale in (0.3, 2.5):
            guided = ClassifierGuided(oracle, lambda x, t: log_class(oracle, 1, x, t), scale)
            assert torch.allclose(ClassifierFree(inner, oracle, scale)(x, t).mean, guided(x, t).mean, atol=1e-9)


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_what_a_scale_makes_of_gaussian_data_is_known(scale: float) -> None:
    """x | c ~ N(0, v), x ~ N(0, V): the flow multiplies by √((v + s²)^γ (V + s²)^(1 − γ)) at its end over that at its start.

    At γ = 3 that is not the deviation of p(x) p(c | x)^γ, which is (γ/v + (1 − γ)/V)^(−1/2).
    """
    schedule, v, whole = VE(0.02, 20.0), 0.3, 1.5
    zero = torch.zeros(1, 1, dtype=torch.float64)
    guided = ClassifierFree(Oracle(f64(1.0), zero, v**0.5, schedule), Oracle(f64(1.0), zero, whole**0.5, schedule), scale)
    end = samplers.rk4(guided, f64(1.0)[None], schedule.grid(128, "karras")).item()

    def spread(s: float) -> float:
        return math.sqrt((v + s**2) ** scale * (whole + s**2) ** (1.0 - scale))

    assert end == pytest.approx(spread(0.02) / spread(20.0), rel=1e-6)
    tilted = (scale / v + (1.0 - scale) / whole) ** -0.5
    assert (abs(end * 20.0 / tilted - 1.0) < 2e-3) == (scale == 1.0)


def test_a_guided_denoiser_has_derivatives() -> None:
    oracle, t = Oracle.ring(5, VP()), f64(0.4)[0]
    guided = ClassifierGuided(oracle, lambda x, t: log_class(oracle, 1, x, t), 2.0)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: guided(x, t).mean, (x,))
    assert not guided(x.detach(), t).mean.requires_grad


def test_guidance_without_a_condition_is_refused() -> None:
    oracle = Oracle.ring(5, VP())
    with pytest.raises(ValueError, match="guidance scale of 2 needs something to be guided by"):
        ClassifierGuided(oracle, None, 2.0)
    with pytest.raises(ValueError, match="guidance scale of 2 needs a conditional and an unconditional denoiser"):
        ClassifierFree(oracle, None, 2.0)
    with pytest.raises(ValueError, match="guidance scale of 3 without conditioning"):
        ClassifierFree(oracle, oracle, 3.0)
    with pytest.raises(ValueError, match="guidance scale is a number of at least 0"):
        ClassifierFree(of_class(oracle, 0), oracle, -1.0)
    with pytest.raises(ValueError, match="one schedule"):
        ClassifierFree(of_class(Oracle.ring(5, VE()), 0), oracle, 1.0)
    with pytest.raises(TypeError, match="What is led is a Denoiser"):
        ClassifierGuided(oracle.log_prob, oracle.log_prob)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one number per row"):
        ClassifierGuided(oracle, lambda x, t: x)(torch.zeros(3, 2), f64(0.5)[0])
