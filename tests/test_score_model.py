"""A denoiser as a distribution, against exact densities; networks that it may be made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn
from torch.distributions.transforms import ComposeTransform
from torch.func import jacrev, vmap

from inference import HMC
from pyro_genmodels import ScoreModel, StochasticModule
from pyro_genmodels.diffusion import EDM, VP, Betas, Denoised, Denoiser, FlowPrior, Learned, Network, Oracle, Straight
from pyro_genmodels.nets import PointNetwork, UNet


def a_model(**settings: Any) -> ScoreModel:
    """One whose network has been shaken, so that its density is no Gaussian."""
    torch.manual_seed(0)
    model = ScoreModel(Network(PointNetwork(2, width=16, blocks=1), VP(), "preconditioned"), (2,), **settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.double()


@pytest.mark.parametrize("schedule", [EDM(), Straight()], ids=["EDM", "straight"])
def test_the_density_of_the_exact_denoiser_is_that_of_the_mixture(schedule: Any) -> None:
    """Within 5e-3 nats of the law at the end of the grid: what still shows of the variance of data in noise counts, too."""
    ring = Oracle.ring(5, schedule)
    means = ring.means - ring.log_weights.exp() @ ring.means  # as prepare would have it
    oracle = Oracle(ring.log_weights.exp(), means, 0.3, schedule)
    model = ScoreModel(oracle, (2,), steps=64, is_scaled=False)
    torch.manual_seed(0)
    x = oracle.distribution(model.grid[-1]).sample((50,))
    gap = model().log_prob(x) - oracle.log_prob(x, model.grid[-1])
    assert gap.abs().max() < 5e-3


def test_a_change_of_scale_changes_the_density_by_its_volume() -> None:
    oracle = Oracle.ring(3, EDM())
    model = ScoreModel(oracle, (2,), steps=16, is_scaled=False)
    x = oracle.distribution().sample((20,))
    plain = model().log_prob(x)
    model.location, model.deviation = torch.tensor([1.0, -2.0]).double(), torch.tensor([3.0, 0.5]).double()
    scaled = model().log_prob(model.location + model.deviation * x)
    torch.testing.assert_close(scaled, plain - math.log(1.5), rtol=1e-9, atol=1e-9)
    torch.manual_seed(3)
    drawn = model.standardised(model.sample(4))
    model.location, model.deviation = torch.zeros(2).double(), torch.ones(2).double()
    torch.manual_seed(3)
    torch.testing.assert_close(model.sample(4), drawn)


def test_the_density_of_a_network_integrates_to_one() -> None:
    """On a grid of 0.2 over [−6, 6]²: to 1e-3."""
    model = a_model(steps=48)
    axis = torch.arange(-6.0, 6.0, 0.2, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        mass = (model().log_prob(points).exp().sum() * 0.2**2).item()
    assert mass == pytest.approx(1.0, abs=1e-3)


def test_what_is_drawn_has_the_density_that_is_told() -> None:
    """log p of a draw is that of its noise less the volume: the gap of the two ways falls as the fourth power of a step."""
    noise = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    gaps = []
    for steps in (16, 32):
        distribution = a_model(steps=steps)()
        push = ComposeTransform(distribution.transforms)
        jacobian = vmap(jacrev(push))(noise)
        base = torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum(1)
        gap = distribution.log_prob(push(noise)) - (base - torch.linalg.slogdet(jacobian)[1])
        gaps.append(gap.abs().max().item())
    assert gaps[1] < 2e-3 and gaps[0] > 12.0 * gaps[1]


def test_probes_that_are_kept_make_the_estimate_of_the_density_a_function_with_the_right_mean() -> None:
    """The mean over all four pairs of signs is exact, one of them alone is not, and is the same each time."""
    model = a_model(steps=4)
    x = torch.randn(3, 2, dtype=torch.float64)
    exact = model().log_prob(x)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]).double()[:, None]
    model.probes = signs
    torch.testing.assert_close(model().log_prob(x), exact, rtol=0.0, atol=1e-10)
    model.probes = signs[:1]
    assert torch.equal(model().log_prob(x), model().log_prob(x)) and not torch.allclose(model().log_prob(x), exact)


def test_it_is_a_distribution_in_any_program() -> None:
    """Shapes under plates, gradients of draws, a copy; Pyro's Predictive and our HMC run on it."""
    model = a_model(steps=1)
    assert isinstance(model, StochasticModule) and model().expand((3, 4)).sample((5,)).shape == (5, 3, 4, 2)
    drawn = model().rsample((3,))
    assert drawn.requires_grad and drawn.shape == (3, 2)
    assert model().expand((3,)).log_prob(drawn).shape == (3,)
    torch.manual_seed(1)
    one = model.sample(2)
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(model).sample(2), one)

    def program(y: Tensor) -> None:
        x = pyro.sample("x", model())
        pyro.sample("y", dist.Normal(x.sum(-1), 0.3), obs=y)

    assert Predictive(program, num_samples=3)(torch.tensor(1.0).double())["x"].shape == (3, 2)
    posterior = HMC(chains=2, warmup=2, draws=2, most_steps=2, seed=0, progress=False).fit(
        program, torch.tensor(1.0).double()
    )
    assert bool(posterior.draws["x"].isfinite().all())


def test_a_state_dict_brings_scale_and_weights_to_a_new_model() -> None:
    model, other = (
        a_model(probes=2),
        ScoreModel(Network(PointNetwork(2, width=16, blocks=1), VP(), "preconditioned"), (2,), probes=2),
    )
    model.prepare(torch.randn(50, 2) * torch.tensor([1.0, 5.0]))
    other.double().load_state_dict(model.state_dict())
    x = torch.randn(4, 2).double()
    assert torch.equal(other().log_prob(x), model().log_prob(x))


# ---------------------------------------------------------------------------------------------------------- networks
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "points": (lambda **settings: PointNetwork(3, width=8, blocks=2, **settings), (3,)),
    "U-Net": (lambda **settings: UNet((2, 8, 12), width=8, multiples=(1, 2), blocks=1, heads=2, **settings), (2, 8, 12)),
}
every_network = pytest.mark.parametrize(("build", "shape"), NETWORKS.values(), ids=NETWORKS.keys())


@every_network
def test_a_network_says_nothing_at_first_and_every_weight_can_learn(build: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, x, level = build(outputs=2), torch.randn(4, *shape), torch.linspace(-3.0, 3.0, 4)
    assert not network(x, level).any() and network(x, level).shape == (4, 2 * shape[0], *shape[1:])
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    gradients = torch.autograd.grad(network(x, level).square().sum(), list(network.parameters()))
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in gradients)


@every_network
def test_a_row_does_not_depend_on_the_others_and_does_on_its_level(build: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network, x, level = build().double(), torch.randn(4, *shape).double(), torch.linspace(-3.0, 3.0, 4).double()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        together = network(x, level)
        torch.testing.assert_close(network(x[2:3], level[2:3])[0], together[2], rtol=1e-10, atol=1e-10)
        assert not torch.allclose(network(x, level.flip(0))[0], together[0])


@every_network
def test_a_label_of_minus_one_is_none(build: Any, shape: tuple[int, ...]) -> None:
    network, x, level = build(classes=3), torch.randn(2, *shape), torch.zeros(2)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    assert torch.equal(network(x, level, torch.tensor([-1, -1])), network(x, level))
    assert not torch.equal(network(x, level, torch.tensor([0, 1])), network(x, level))


def test_memory_in_channels_last_order_stays_so() -> None:
    network = UNet((2, 8, 8), width=8, multiples=(1, 2), blocks=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(3, 2, 8, 8).to(memory_format=torch.channels_last)
    assert network(x, torch.zeros(3)).is_contiguous(memory_format=torch.channels_last)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "images that cannot be halved": (
        lambda: UNet((1, 28, 28), multiples=(1, 2, 2, 2)),
        "Pad them to 32 x 32, or give at most 3",
    ),
    "images without channels": (lambda: UNet((28, 28)), "Grey images have 1 channel"),
    "images of another size": (
        lambda: UNet((1, 8, 8), width=8, multiples=(1, 2))(torch.zeros(2, 1, 16, 16), torch.zeros(2)),
        r"Images are \(rows, 1, 8, 8\)",
    ),
    "heads that do not divide": (lambda: UNet((1, 8, 8), width=8, multiples=(1,), heads=3), "3 heads"),
    "no resolutions": (lambda: UNet((1, 8, 8), multiples=()), "one for each resolution"),
    "points of another size": (lambda: PointNetwork(2)(torch.zeros(3, 4), torch.zeros(3)), r"x is \(rows, 2\)"),
    "an odd width": (lambda: PointNetwork(2, width=7), "an even number"),
    "numbers and labels": (lambda: PointNetwork(2, context=2, classes=3), "numbers or labels"),
    "numbers for labels": (
        lambda: PointNetwork(2, classes=3)(torch.zeros(2, 2), torch.zeros(2), torch.zeros(2)),
        "one label a row",
    ),
    "a short context": (
        lambda: PointNetwork(2, context=3)(torch.zeros(2, 2), torch.zeros(2), torch.zeros(2, 2)),
        "3 numbers a row",
    ),
    "a network for a denoiser": (lambda: ScoreModel(PointNetwork(2), (2,)), "Network\\(network, schedule\\)"),
    "a schedule that does not reach its end": (
        lambda: ScoreModel(Oracle.ring(3, EDM(0.002, 1.0)), (2,))().sample(),
        "does not reach its end",
    ),
    "no steps": (lambda: a_model(steps=0), "at least 1 step"),
    "no rows": (lambda: a_model(steps=1).sample(), "the number of rows to draw"),
}


@pytest.mark.parametrize(("call", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_go_together_is_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


def test_an_oracle_of_one_class_given_its_label_is_that_class() -> None:
    """A denoiser that takes a context: the density is that of each row's own."""

    class TwoClasses(Denoiser):
        def __init__(self) -> None:
            super().__init__(EDM())
            ones = torch.ones(1, dtype=torch.float64)
            self.classes = nn.ModuleList(Oracle(ones, mean * torch.ones(1, 2).double(), 0.5, EDM()) for mean in (-3.0, 3.0))

        def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Denoised:
            means = torch.stack([part(x, t).mean for part in self.classes])
            return Denoised(torch.where(context[:, None] > 0, means[1], means[0]))

    denoiser = TwoClasses()
    model, labels = ScoreModel(denoiser, (2,), is_scaled=False, steps=16), torch.tensor([0, 1, 1])
    x = torch.tensor([[-3.0, -2.5], [3.0, 3.5], [-3.0, -2.5]]).double()
    found = model(labels).log_prob(x)
    for row, label in enumerate(labels.tolist()):
        alone = ScoreModel(denoiser.classes[label], (2,), is_scaled=False, steps=16)  # type: ignore[arg-type]
        assert found[row].item() == pytest.approx(alone().log_prob(x[row : row + 1]).item(), abs=1e-9)
    assert model(labels).sample((4,)).shape == (4, 3, 2)


# ------------------------------------------------------------------------------------------------------- with a context
class Around(Denoiser):
    """That of x_0 ~ N(context, 1)."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> Denoised:
        assert context is not None
        alpha, sigma = self.at(x, t)
        return Denoised(context + (x - alpha * context) * alpha / (alpha.square() + sigma.square()))


@pytest.mark.parametrize("kind", ["ScoreModel", "FlowPrior"])
def test_values_broadcast_against_the_contexts(kind: str) -> None:
    centres, denoiser = torch.tensor([[0.0], [2.0]]), Around(EDM(0.01, 1000.0))
    if kind == "ScoreModel":
        law = ScoreModel(denoiser, (1,), steps=64, is_scaled=False)(centres)
    else:
        law = FlowPrior(denoiser, denoiser.schedule.grid(64), (1,))(centres)
    exact = dist.Normal(centres, 1.0).to_event(1)
    for shape in ((1,), (2, 1), (3, 2, 1), (2, 1, 1)):
        x = torch.randn(shape)
        torch.testing.assert_close(law.log_prob(x), exact.log_prob(x), rtol=1e-3, atol=1e-2)
    assert law.expand((3, 2)).sample().shape == (3, 2, 1)


def test_weights_of_a_schedule_are_restored_with_the_model() -> None:
    def made() -> ScoreModel:
        return ScoreModel(Network(PointNetwork(2, width=8), Learned()), (2,), steps=4)

    model, other, x = made(), made(), torch.randn(3, 2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model().log_prob(x), other().log_prob(x))


def test_a_schedule_without_noise_at_its_start_asks_for_one() -> None:
    network = Network(PointNetwork(2, width=8), Betas.linear(1000))
    with pytest.raises(
        ValueError, match=r"Betas has no noise at t = 0, .* Give start=, a time of little noise, such as 1\."
    ):
        ScoreModel(network, (2,))
    assert ScoreModel(network, (2,), start=1.0, steps=2)().sample((3,)).shape == (3, 2)


def test_labels_out_of_range_are_told() -> None:
    model = ScoreModel(Network(PointNetwork(2, width=8, classes=3), EDM(), "preconditioned"), (2,), steps=2)
    with pytest.raises(IndexError, match="Labels of this network are from 0 to 2, or −1 for none, but these go from 1 to 3"):
        model(torch.tensor([3, 1])).sample()
