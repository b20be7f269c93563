"""The certificate of a sampler: right ones pass it, and each of the known bugs of other libraries shows in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from pyro_genmodels.diffusion import EDM, Denoiser, Oracle, samplers
from pyro_genmodels.diffusion.conformance import (
    Paths,
    bound_gap,
    certify,
    from_diffusers,
    from_k_diffusion,
    law,
    median_error,
    paths,
)

FEW: dict[str, Any] = {"steps": 64}


@pytest.fixture(scope="module")
def case() -> Paths:
    return paths(64)


def ancestral(variance: Any) -> Callable[..., Tensor]:
    return lambda denoiser, x, grid, noise: samplers.ancestral(denoiser, x, grid, variance, noise)


def test_a_certificate_of_a_flow_has_its_orders(case: Paths) -> None:
    found = certify(samplers.heun, case=case, **FEW)
    assert found.calls == 20 and found.order is not None and 1.9 < found.order < 2.2 and 1.9 < found.weak_order < 2.2
    assert found.gap == math.inf and "none: no noise" in str(found) and "order of paths         2.0" in str(found)


def test_a_certificate_of_noise_has_the_order_of_its_law(case: Paths) -> None:
    found = certify(ancestral("upper"), True, case=case, has_bound=False, **FEW)
    assert found.order is None and 0.9 < found.weak_order < 1.1 and found.calls == 10 and math.isnan(found.gap)
    exact = certify(ancestral("optimal"), True, case=case, has_bound=False, **FEW)
    assert max(exact.bias) < 1e-10 and math.isnan(exact.weak_order)


@pytest.mark.parametrize(("variance", "gap"), [("upper", 0.092), ("lower", 2.36)])
def test_the_gap_of_a_bound_is_that_of_the_table(variance: str, gap: float) -> None:
    """Of an independent implementation: within 4 standard errors and 0.01 for its own error."""
    found = bound_gap(ancestral(variance))
    assert abs(found.mean - gap) < 4.0 * found.error + 0.01


def inverted(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """Heun's method whose slope ahead is divided by the noise that it came from."""
    for step in samplers.path(denoiser, x, grid):
        before, after = step.scaled
        slope = (x - denoiser(x, step.t).mean) / before
        ahead = x + (after - before) * slope
        x = x + 0.5 * (after - before) * (slope + (ahead - denoiser(ahead, step.earlier).mean) / before)
    return x


def repeated(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    """Heun's method that forgets its last step."""
    return samplers.heun(denoiser, x, grid[:-1])


def halved(denoiser: Denoiser, x: Tensor, grid: Tensor, noise: Tensor) -> Tensor:
    """Ancestral steps with half of the noise."""
    return samplers.ancestral(denoiser, x, grid, "upper", 0.5 * noise)


def test_known_bugs_show(case: Paths) -> None:
    """A wrong noise level, a step that is left out, too little noise, a coefficient that is half of what it should be."""
    wrong = certify(inverted, case=case, **FEW)
    assert wrong.order is not None and wrong.order < 1.6
    short = certify(repeated, case=case, **FEW)
    assert short.order is not None and short.order < 1.8
    thin = certify(halved, True, case=case, has_bound=False, **FEW)
    assert thin.weak_order < 0.1 and thin.bias[1] > 0.05
    published = certify(lambda *args: samplers.dpm_solver_pp_3m(*args, is_corrected=False), case=case, steps=128)
    assert published.order is not None and published.order < 2.1


# Samplers as other libraries have them.


def k_heun(model: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None) -> Tensor:
    ones = x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        slope = (x - model(x, sigmas[i] * ones, **(extra_args or {}))) / sigmas[i]
        ahead = x + slope * (sigmas[i + 1] - sigmas[i])
        after = (ahead - model(ahead, sigmas[i + 1] * ones)) / sigmas[i + 1]
        x = x + 0.5 * (slope + after) * (sigmas[i + 1] - sigmas[i])
    return x


def k_ancestral(model: Any, x: Tensor, sigmas: Tensor, noise_sampler: Any) -> Tensor:
    ones = x.new_ones(len(x))
    for i in range(len(sigmas) - 1):
        s, following = sigmas[i], sigmas[i + 1]
        up = (following**2 * (s**2 - following**2) / s**2) ** 0.5
        down = (following**2 - up**2) ** 0.5
        x = x + (x - model(x, s * ones)) / s * (down - s) + noise_sampler(s, following) * up
    return x


def test_samplers_of_the_form_of_k_diffusion_are_samplers(case: Paths) -> None:
    ours, start, _ = case
    grid = ours.schedule.grid(12, "karras")
    assert torch.allclose(from_k_diffusion(k_heun)(ours, start, grid), samplers.heun(ours, start, grid), atol=1e-9)
    found = certify(from_k_diffusion(k_heun, extra_args={}), case=case, **FEW)
    assert found.order is not None and 1.9 < found.order < 2.2
    noise = torch.randn(12, *start.shape, dtype=torch.float64)
    other = from_k_diffusion(k_ancestral)(ours, start, grid, noise)
    assert torch.allclose(other, samplers.ancestral(ours, start, grid, noise=noise), atol=1e-9)


class Stepped(NamedTuple):
    prev_sample: Tensor


class Scheduler:
    """DDIM as diffusers has it; ``skipped`` is what its prev_timestep is off by, with linspace or trailing spacing."""

    def __init__(self, betas: np.ndarray, steps: int, skipped: int = 0, offset: int = 1) -> None:
        self.alphas_cumprod = torch.tensor(np.cumprod(1.0 - betas))
        self.timesteps = torch.arange(steps - 1, -1, -1) + offset
        self.skipped = skipped

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Stepped:
        t = int(timestep)
        now, before = self.alphas_cumprod[t], self.alphas_cumprod[max(t - 1 - self.skipped, 0)]
        data = (sample - (1.0 - now).sqrt() * model_output) / now.sqrt()
        return Stepped(before.sqrt() * data + (1.0 - before).sqrt() * model_output)


def test_schedulers_of_the_form_of_diffusers_are_samplers(case: Paths) -> None:
    ours, start, _ = case
    grid = ours.schedule.grid(12, "karras")
    assert torch.allclose(from_diffusers(Scheduler)(ours, start, grid), samplers.ddim(ours, start, grid), atol=1e-8)
    right = certify(from_diffusers(Scheduler), case=case, **FEW)
    wrong = certify(from_diffusers(lambda betas, steps: Scheduler(betas, steps, skipped=1)), case=case, **FEW)
    assert right.order is not None and 0.9 < right.order < 1.1
    assert wrong.errors is not None and right.errors is not None and wrong.errors[1] > 1.5 * right.errors[1]
    with pytest.raises(ValueError, match="is to take the steps 12, …, 1, but takes \\[11, 10, 9\\] … \\[1, 0\\]"):
        from_diffusers(lambda betas, steps: Scheduler(betas, steps, offset=0))(ours, start, grid)


# What is refused.


def test_what_is_no_sampler_is_told(case: Paths) -> None:
    with pytest.raises(ValueError, match="draws noise of its own"):
        certify(samplers.ancestral, case=case)
    with pytest.raises(ValueError, match="in its own shape and dtype"):
        certify(lambda denoiser, x, grid: x[:1], case=case)
    with pytest.raises(ValueError, match="64 ended at NaN"):
        certify(lambda denoiser, x, grid: x / 0.0 - x / 0.0, case=case)
    with pytest.raises(ValueError, match="steps is at least 2"):
        certify(samplers.heun, steps=1)
    with pytest.raises(ValueError, match="three times the start"):
        oracle = Oracle(torch.ones(1).double(), torch.zeros(1, 1).double(), 1.0, EDM(0.02, 10.0))
        law(lambda d, x, grid: x.clamp(-1.0, 1.0), oracle, EDM(0.02, 10.0).grid(2), is_random=False)
    assert median_error(samplers.rk4, case, 64) < 1e-5


def in_place(denoiser: Denoiser, x: Tensor, grid: Tensor) -> Tensor:
    for step in samplers.path(denoiser, x, grid):
        mean, kept = denoiser(x, step.t).mean, step.next_sigma / step.sigma
        x.mul_(kept).add_((step.next_alpha - step.alpha * kept) * mean)
    return x


def test_a_sampler_may_write_into_its_state() -> None:
    case = paths()
    start = case[1].clone()
    orders = [certify(sampler, steps=16, case=case).order for sampler in (in_place, samplers.euler)]
    assert orders[0] == pytest.approx(orders[1])
    assert torch.equal(case[1], start)
    with pytest.raises(TypeError, match="A sampler gives x, a tensor"):
        certify(lambda denoiser, x, grid: None, case=case)  # type: ignore[arg-type, return-value]
