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
from inference.handlers import _check_reach, _Factories
from inference.objective import Objective
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


# ------------------------------------------------------------------------------------------------ gradients of a graph
def alike(a: Tensor, b: Tensor) -> Tensor:
    return (a + b - 3.0).square().sum()


def own_values(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def views(a: Tensor, b: Tensor) -> Tensor:
    return (a.reshape(2, 2) @ b.reshape(2, 2)).sum() + a.sum()


@pytest.mark.parametrize("loss", [alike, own_values, views])
def test_gradients_have_memory_of_their_own(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """They are scaled in place: two that are one tensor, or a weight, would be scaled twice, or would move the weight."""
    weights = [torch.arange(1.0, 5.0).requires_grad_(), torch.arange(2.0, 6.0).requires_grad_()]

    def both(data: list[Tensor] | None, is_recorded: bool) -> tuple[Tensor, Tensor]:
        value = loss(*weights)
        return value, value

    steps = Objective(both, weights, [], "a sum")
    for _ in range(23):
        steps()
        held = [weight.detach().clone() for weight in weights]
        expected = torch.autograd.grad(loss(*weights), weights)
        norm = torch.stack([part.norm() for part in expected]).norm()
        nn.utils.clip_grad_norm_(weights, 1.0)
        assert_close([weight.grad for weight in weights], [part / norm for part in expected], rtol=1e-4, atol=1e-5)
        assert_close([weight.detach() for weight in weights], held)
    assert steps.rung == "staged"


# ------------------------------------------------------------------------------------- ways to run a graph, and refusals
def quadratic(steps: int, is_compiled: bool = True, factor: list[float] | None = None) -> tuple[Objective, list[float]]:
    """An objective after some steps, and the losses of all of them."""
    weight, scale = torch.ones(3).requires_grad_(), factor or [1.0]

    def loss(data: list[Tensor] | None, is_recorded: bool) -> tuple[Tensor, Tensor]:
        value = scale[0] * weight.square().sum()
        return value, value

    found = Objective(loss, [weight], [], "a square", is_compiled=is_compiled)
    return found, [float(found()) for _ in range(steps)]


def test_machine_code_that_gives_other_values_leaves_the_recorded_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(run: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def wrong(*inputs: Tensor) -> Any:
            loss, gradients = run(*inputs)
            return 2.0 * loss, gradients

        return wrong

    monkeypatch.setattr(torch, "compile", twice)
    found, losses = quadratic(60)
    assert losses == [3.0] * 60 and found.rung == "staged"
    (told,) = found.calls.values()
    assert told[2:5] == [True, ["recorded"], ["compiled"]]
    again, _ = quadratic(0)
    again.recall(found.calls)  # a run that goes on remembers the refusal
    assert float(again()) == 3.0 and next(iter(again.calls.values()))[3:5] == told[3:5]


def test_what_cannot_be_compiled_goes_on_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler for this Python")

    monkeypatch.setattr(torch, "compile", refuse)
    found, losses = quadratic(30)
    assert losses == [3.0] * 30 and next(iter(found.calls.values()))[3] == ["recorded"]


def test_a_program_that_has_changed_loses_all_ways_at_the_next_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    factor = [1.0]
    found, _ = quadratic(40, factor=factor)
    assert next(iter(found.calls.values()))[3] == ["recorded", "compiled"]
    factor[0] = 5.0
    losses = [float(found()) for _ in range(40)]
    assert losses[-1] == 15.0 and found.rung == "looped" and not next(iter(found.calls.values()))[3]


# ----------------------------------------------------------------------------------------- where tensors are made, indices
def test_tensors_of_numbers_are_made_on_the_device_and_contexts_nest() -> None:
    meta = torch.device("meta")
    with _Factories(meta):
        assert torch.zeros(2).device == torch.tensor(1.0).device == meta
        with torch.device("cpu"):
            assert torch.ones(2).device.type == "cpu"
        with _Factories(torch.device("cpu")), _Factories(meta):
            assert torch.ones(2).device == torch.distributions.Normal(0.0, 1.0, validate_args=False).loc.device == meta
        assert torch.zeros(2, device="cpu").device.type == "cpu"
    with torch.device("cpu"), _Factories(meta):
        assert torch.rand(2).device == meta
    assert torch.zeros(2).device.type == "cpu"


@pytest.mark.parametrize(
    ("index", "is_in_reach"),
    [
        ((torch.tensor([0, 2, -3]),), True),
        ((torch.tensor([3]),), False),
        ((torch.tensor([-4]),), False),
        ((slice(None), torch.tensor([1, 5])), False),
        ((0, torch.tensor([4])), False),
        (([0, 7],), False),
        ((torch.tensor([True, False, True]),), True),
        ((torch.ones(3, dtype=torch.uint8),), True),
        ((True, torch.tensor([2]), torch.tensor([3])), True),
        ((..., torch.tensor([9])), True),  # it cannot be said
        ((torch.empty(0, dtype=torch.long),), True),
    ],
)
def test_an_index_out_of_reach_is_told_before_it_is_used(index: tuple[Any, ...], is_in_reach: bool) -> None:
    table = torch.zeros(3, 4)
    if is_in_reach:
        _check_reach(table, index)
        return
    with pytest.raises(IndexError, match="out of bounds for axis"):
        _check_reach(table, index)


def test_indices_of_chains_are_looked_at_below_vmap() -> None:
    table = torch.arange(3.0)

    def picked(index: Tensor) -> Tensor:
        _check_reach(table, (index,))
        return table[index]

    assert_close(torch.vmap(picked)(torch.tensor([[0], [2]])), torch.tensor([[0.0], [2.0]]))
    with pytest.raises(IndexError, match="index 3 is out of bounds for axis 0 of size 3"):
        torch.vmap(picked)(torch.tensor([[0], [3]]))
