"""Recorded steps are the program's on any device; on a GPU (``--device cuda``) their kernels are started by one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from inference import SVI, Adversarial, Denoising, objective
from inference.capture import Captured
from inference.recording import first_come
from pyro_genmodels import GAN, VAE, ScoreModel
from pyro_genmodels.diffusion import EDM, Network
from pyro_genmodels.nets import PointNetwork

STEPS = 40
X = torch.rand(48, 8, generator=torch.Generator().manual_seed(0))


def autoencoder(x: Tensor) -> Tensor:
    model = VAE((8,), 2, hidden=(16,)).to(x.device)
    return SVI(steps=STEPS, batch_size=16, transform=torch.bernoulli, seed=0, progress=False).fit(model, x).history["loss"]


def game(x: Tensor) -> Tensor:
    critic = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.LeakyReLU(), nn.Linear(16, 1)).to(x.device)
    fit = Adversarial(critic=critic, steps=STEPS, batch_size=16, seed=0, progress=False)
    found = fit.fit(GAN((8,), 4, hidden=(16,)).to(x.device), x)
    assert critic[1].num_batches_tracked >= 3 * STEPS  # data, draws, and draws for the generator
    return torch.cat([found.history["value"], critic[1].running_var.cpu(), critic[1].num_batches_tracked.cpu()[None]])


def denoiser(x: Tensor) -> Tensor:
    model = ScoreModel(Network(PointNetwork(8, width=16), EDM(), "preconditioned"), (8,)).to(x.device)
    fit = Denoising(steps=STEPS, batch_size=16, clip_norm=1.0, average=0.9, seed=0, progress=False)
    return fit.fit(model, x).history["loss"]


@pytest.mark.parametrize("train", [autoencoder, game, denoiser])
def test_steps_are_those_of_the_program(
    train: Callable[[Tensor], Tensor], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays = []

    class Counted(Captured):
        def __call__(self, *inputs: Tensor) -> Any:
            replays.append(self)
            return super().__call__(*inputs)

    monkeypatch.setattr(objective, "Captured", Counted)
    torch.manual_seed(1)
    found = train(X.to(device))
    assert bool(replays) == (device.type == "cuda")
    assert not len(replays) or len(replays) > STEPS // 4
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "looped")
    torch.manual_seed(1)
    assert_close(found, train(X.to(device)), rtol=2e-3, atol=2e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to wait for")
def test_a_step_that_waits_for_the_gpu_is_not_captured(device: torch.device) -> None:
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        Captured(lambda given: given * float(given.sum()), [x], [])
    assert torch.rand(3, device="cuda").isfinite().all()
    numbers = Captured(lambda given: given + torch.rand_like(given), [x], [])
    torch.manual_seed(0)
    found = [numbers(x).clone() for _ in range(3)]
    torch.manual_seed(0)
    assert_close(found, [x + torch.rand_like(x) for _ in range(3)])


@pytest.mark.parametrize("shape", [(5,), (7, 3)])
def test_one_draw_by_its_weight_is_that_of_torch(shape: tuple[int, ...]) -> None:
    p = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    expected = [torch.multinomial(p, 1, True) for _ in range(50)]
    torch.manual_seed(0)
    assert_close([first_come(p) for _ in range(50)], expected)
