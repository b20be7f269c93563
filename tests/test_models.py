"""Laws that hold for every model: instances × laws. A new model is a line of the table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

import pyro_genmodels
from inference import EM, Denoising, HybridLoss
from inference.handlers import isolated, quiet, reproducible
from pyro_genmodels import (
    CVAE,
    DDPM,
    GAN,
    GMM,
    HMM,
    IWAE,
    LDA,
    PPCA,
    VAE,
    Autoencoder,
    FactorAnalysis,
    GenerativeModel,
    InfoGAN,
    LinearRegression,
    LogisticRegression,
    MarginClassifier,
    Mixture,
    NaiveBayes,
    SemiSupervisedVAE,
    SoftmaxRegression,
    VaDE,
)
from pyro_genmodels.diffusion import Betas, Network
from pyro_genmodels.nets import PointNetwork

ROWS = 12


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TABLE, LABELS = numbers(ROWS, 3), torch.arange(ROWS) % 3
COUNTS = torch.arange(ROWS * 3, dtype=torch.float64).reshape(ROWS, 3) % 5
PIXELS = torch.where(numbers(ROWS, 2, 3, seed=2) > 1.5, torch.nan, (numbers(ROWS, 2, 3, seed=3) > 0).double())
BAGS = torch.tensor([[[0, 2], [1, 1]], [[1, 3], [2, 1]], [[0, 1], [2, 2]]], dtype=torch.int32)


@dataclass(frozen=True)
class Instance:
    """A model with data.

    Attributes:
        build: Makes a new one.
        data: Its arguments.
        drawn: Its arguments where it draws ``size`` rows; None if it draws none.
        row: Shape of a row that is drawn.
        is_hiding: Whether anything is hidden.
        backend: What it is fitted by.
    """

    build: Callable[[], Any]
    data: tuple[Tensor, ...]
    drawn: tuple[Any, ...] | None = (None,)
    row: tuple[int, ...] = field(default=())
    is_hiding: bool = True
    backend: Any = EM(steps=2, seed=0, progress=False)


MODELS = {
    "GMM": Instance(lambda: GMM(2), (TABLE,), row=(3,)),
    "GMM, sticks": Instance(lambda: GMM(3, "diagonal", weights="stick-breaking"), (TABLE,), row=(3,)),
    "Mixture": Instance(lambda: Mixture(2, ["normal", "student", "poisson"]), (COUNTS,), row=(3,)),
    "HMM": Instance(lambda: HMM(2), (TABLE,), row=(3,)),
    "HMM, symbols": Instance(lambda: HMM(2, "categorical"), (LABELS,)),
    "PPCA": Instance(lambda: PPCA(1), (TABLE,), row=(3,)),
    "FactorAnalysis": Instance(lambda: FactorAnalysis(1), (TABLE,), row=(3,)),
    "LDA": Instance(
        lambda: LDA(2, 3), (BAGS,), None, backend=EM(steps=2, seed=0, progress=False, maximise=("shares", "topics"))
    ),
    "NaiveBayes": Instance(lambda: NaiveBayes(3, ["gaussian", "gaussian", "poisson"]), (COUNTS, LABELS), None),
    "LinearRegression": Instance(LinearRegression, (TABLE, numbers(ROWS, seed=1)), None),
    "LogisticRegression": Instance(LogisticRegression, (TABLE, LABELS % 2), None),
    "SoftmaxRegression": Instance(lambda: SoftmaxRegression(3), (TABLE, LABELS), None),
    "MarginClassifier": Instance(MarginClassifier, (TABLE, LABELS % 2), None),
    "Autoencoder": Instance(lambda: Autoencoder((2, 3), 2, hidden=(4,)), (PIXELS,), None, is_hiding=False),
    "VAE": Instance(lambda: VAE((2, 3), 2, hidden=(4,)), (PIXELS,), row=(2, 3)),
    "VAE, told of gaps": Instance(lambda: VAE((2, 3), 2, hidden=(4,), observed=True), (PIXELS,), row=(2, 3)),
    "CVAE": Instance(lambda: CVAE((2, 3), 3, 2, hidden=(4,)), (PIXELS, LABELS), None),
    "CVAE, conditional prior": Instance(
        lambda: CVAE((2, 3), 3, 2, hidden=(4,), conditional_prior=True), (PIXELS, TABLE), None
    ),
    "DDPM": Instance(
        lambda: DDPM(Network(PointNetwork(3, 2, 4, 1), Betas.cosine(2), learns_variance=True), (3,), 2, "optimal"),
        (TABLE,),
        row=(3,),
        backend=Denoising(loss=HybridLoss(), steps=2, seed=0, progress=False),
    ),
    "VaDE": Instance(lambda: VaDE((2, 3), 3, 2, hidden=(4,)), (PIXELS,), row=(2, 3)),
    "IWAE": Instance(lambda: IWAE((2, 3), 1, (2,), hidden=4), (PIXELS,), row=(2, 3)),
    "IWAE, two layers": Instance(lambda: IWAE((2, 3), 2, (3, 2), hidden=4), (PIXELS,), row=(2, 3)),
    "SemiSupervisedVAE": Instance(lambda: SemiSupervisedVAE((2, 3), 3, 2, hidden=(4,)), (PIXELS, LABELS), row=(2, 3)),
    "SemiSupervisedVAE, few labels": Instance(
        lambda: SemiSupervisedVAE((2, 3), 3, 2, hidden=(4,)), (PIXELS, torch.where(LABELS > 1, -1, LABELS)), row=(2, 3)
    ),
}
# Known through draws alone: laws of densities are not theirs (those that they have instead are in test_implicit.py).
IMPLICIT = {
    "GAN": Instance(lambda: GAN((2, 3), 2, hidden=(4,)), (PIXELS.nan_to_num(),), row=(2, 3), is_hiding=False),
    "InfoGAN": Instance(lambda: InfoGAN((2, 3), 2, 3, 1, hidden=(4,)), (PIXELS.nan_to_num(),), row=(2, 3)),
}
every_model = pytest.mark.parametrize("instance", MODELS.values(), ids=MODELS.keys())
drawing = pytest.mark.parametrize(
    "instance",
    [i for i in (MODELS | IMPLICIT).values() if i.drawn is not None],
    ids=[n for n, i in (MODELS | IMPLICIT).items() if i.drawn is not None],
)


def prepared(instance: Instance) -> Any:
    with isolated(0):  # the same weights each time
        model = instance.build()
    model.prepare(*instance.data)
    return model.double()


def statements(program: Callable[..., Any], *args: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Its statements at one draw, with their log-probabilities."""
    with isolated(0), reproducible(torch.float64), quiet():
        trace = poutine.trace(program).get_trace(*args, **kwargs)
        trace.compute_log_prob()
    nodes = trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] == "sample" and not poutine.util.site_is_subsample(s)}


def test_every_public_model_is_in_the_table() -> None:
    public = {getattr(pyro_genmodels, name) for name in pyro_genmodels.__all__}
    models = {thing for thing in public if isinstance(thing, type) and issubclass(thing, GenerativeModel)}
    assert models - {GenerativeModel} == {type(instance.build()) for instance in (MODELS | IMPLICIT).values()}


@every_model
def test_the_log_density_of_a_draw_is_finite_and_float64(instance: Instance) -> None:
    for name, site in statements(prepared(instance).model, *instance.data).items():
        assert site["log_prob_sum"].dtype == torch.float64 and bool(site["log_prob_sum"].isfinite()), name
        assert not site["value"].is_floating_point() or site["value"].dtype == torch.float64, name


@every_model
def test_what_is_observed_is_the_data_and_all_else_is_not(instance: Instance) -> None:
    told = statements(prepared(instance).model, *instance.data)
    seen = [site for site in told.values() if site["is_observed"] and not site["infer"].get("_deterministic")]
    assert seen and (len(seen) < len(told)) == instance.is_hiding


@drawing
@pytest.mark.parametrize("size", [1, 7])
def test_size_is_the_number_of_rows_that_are_drawn(instance: Instance, size: int) -> None:
    assert instance.drawn is not None
    with isolated(0), reproducible(torch.float64), quiet():
        drawn = prepared(instance).model(*instance.drawn, size=size)
    assert drawn.shape == (size, *instance.row)


@drawing
def test_pyros_predictive_draws_from_the_prior(instance: Instance) -> None:
    assert instance.drawn is not None
    with isolated(0), reproducible(torch.float64), quiet():
        drawn = Predictive(prepared(instance).model, num_samples=3)(*instance.drawn, size=4)
    assert drawn["x"].shape == (3, 4, *instance.row)


@every_model
def test_a_guide_has_the_continuous_sites_of_its_model_and_weights_with_gradients(instance: Instance) -> None:
    model = prepared(instance)
    if not hasattr(model, "guide"):
        assert not list(model.parameters())
        return
    told, guessed = statements(model.model, *instance.data), statements(model.guide, *instance.data)
    computed = [n for n, s in told.items() if s["infer"].get("_deterministic")]
    hidden = {n for n, s in told.items() if not s["is_observed"] and not s["fn"].has_enumerate_support and n not in computed}
    assert set(guessed) == hidden
    for name in hidden:
        assert guessed[name]["value"].shape == told[name]["value"].shape, name
        assert bool(told[name]["fn"].support.check(guessed[name]["value"]).all()), name
    loss = torch.stack([site["log_prob_sum"] for site in (*told.values(), *guessed.values())]).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients)


@every_model
def test_a_state_dict_carries_over_to_a_new_model(instance: Instance) -> None:
    old, new = prepared(instance), instance.build().double()
    new.load_state_dict(old.state_dict())
    assert new.state_dict().keys() == old.state_dict().keys()
    for name, value in old.state_dict().items():
        assert torch.equal(new.state_dict()[name], value), name
    left, right = (statements(model.model, *instance.data) for model in (old, new))
    for name, site in left.items():
        assert torch.equal(site["log_prob_sum"], right[name]["log_prob_sum"]), name


@every_model
def test_two_instances_share_nothing_and_a_copy_is_whole(instance: Instance) -> None:
    one, two = prepared(instance), prepared(instance)
    for other in (two, copy.deepcopy(one)):
        addresses = [{v.data_ptr() for v in m.state_dict().values() if v.numel()} for m in (one, other)]
        assert not addresses[0] & addresses[1]
        left, right = (statements(model.model, *instance.data) for model in (one, other))
        assert all(torch.equal(site["log_prob_sum"], right[name]["log_prob_sum"]) for name, site in left.items())


@every_model
def test_a_fit_leaves_the_data_and_the_store_of_pyro_alone(instance: Instance) -> None:
    before = [tensor.clone() for tensor in instance.data]
    instance.backend.fit(instance.build(), *instance.data)
    for was, now in zip(before, instance.data, strict=True):
        torch.testing.assert_close(now, was, rtol=0.0, atol=0.0, equal_nan=True)
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("instance", (MODELS | IMPLICIT).values(), ids=(MODELS | IMPLICIT).keys())
def test_a_model_says_what_it_is(instance: Instance) -> None:
    documentation = type(instance.build()).__doc__ or ""
    assert "~" in documentation and "Args:" in documentation and "References:" in documentation
