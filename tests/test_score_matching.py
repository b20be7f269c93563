"""Score matching against closed forms, quadrature and each other; the exact density has no gradient left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from inference.contract import Scored
from inference.handlers import isolated
from inference.score_matching import ExplicitLoss, ImplicitLoss, NoisedLoss, SlicedLoss, score

MEAN = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
FACTOR = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0], [-0.3, 0.4, 0.5]], dtype=torch.float64)
BATCHES = 40
RATE = 1e-6  # of false alarms, in each statistical test


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with isolated(11):
        yield
    torch.set_default_dtype(default)


# ------------------------------------------------------------------------------------------- modules
class Gaussian(nn.Module):
    """N(mean, L Lᵀ), where L is that of the truth times exp(log_scale)."""

    def __init__(self, mean: Tensor = MEAN, factor: Tensor = FACTOR) -> None:
        super().__init__()
        self.mean = nn.Parameter(mean.clone())
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.shear = nn.Parameter(torch.zeros(()))
        self.factor = factor

    def forward(self, context: Any = None) -> dist.TorchDistribution:
        tilt = torch.eye(3) + self.shear * torch.diag(torch.ones(2), -1)
        return dist.MultivariateNormal(self.mean, scale_tril=self.log_scale.exp() * tilt @ self.factor)


class Mixture(nn.Module):
    """Two normals on the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.3, -0.3]))
        self.means = nn.Parameter(torch.tensor([[-1.0, 0.0], [1.2, 0.4]]))
        self.log_scales = nn.Parameter(torch.tensor([[-0.4, -0.2], [-0.6, -0.1]]))

    def forward(self, context: Any = None) -> dist.TorchDistribution:
        parts = dist.Normal(self.means, self.log_scales.exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)


class Field(nn.Module):
    """A score that is the gradient of nothing, x ↦ A x, as a network's may be, and that knows no density."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, context: Any = None) -> Field:
        return self

    def score(self, value: Tensor) -> Tensor:
        return value @ self.matrix.T


MODULES: dict[str, Callable[[], nn.Module]] = {"Gaussian": Gaussian, "mixture": Mixture}


def exact(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: score(module, x).detach()


LOSSES: dict[str, Callable[[nn.Module], Any]] = {
    "explicit": lambda module: ExplicitLoss(exact(MODULES[type(module).__name__.replace("Mix", "mix")]())),
    "implicit": lambda module: ImplicitLoss(),
    "sliced": lambda module: SlicedLoss(),
    "sliced, normal, two": lambda module: SlicedLoss(2, "normal"),
    "sliced, as published first": lambda module: SlicedLoss(is_reduced=False),
}


def gradients(loss: Any, module: nn.Module, x: Tensor) -> Tensor:
    """Of batches of rows, (batch, parameter)."""
    weights = [*module.parameters()]
    found = []
    for part in x.chunk(BATCHES):
        grads = torch.autograd.grad(loss.rows(module, part, None).mean(), weights)
        found.append(torch.cat([grad.flatten() for grad in grads]))
    return torch.stack(found)


def assert_zero_mean(numbers: Tensor, rate: float = RATE) -> None:
    """Each column has mean zero: t-tests over batches, Bonferroni."""
    count = len(numbers)
    t = numbers.mean(0) / (numbers.std(0) / count**0.5).clamp(min=1e-14)
    assert t.abs().max() < scipy.stats.t.isf(rate / (2 * numbers.shape[1]), count - 1)


# ---------------------------------------------------------------------------- the exact density is the optimum
@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_is_left_at_the_known_score(name: str, family: str) -> None:
    """t-tests over 40 batches of 250 exact draws; 1e-6 false alarms."""
    module = MODULES[family]()
    x = module().sample((250 * BATCHES,))
    assert_zero_mean(gradients(LOSSES[name](module), module, x))


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_points_back(name: str) -> None:
    """The sign that trained energies upside down elsewhere: too wide a model is narrowed, too narrow a one widened."""
    module = Gaussian()
    loss = LOSSES[name](module)
    x = module().sample((20000,))
    for off in (-0.2, 0.2):
        with torch.no_grad():
            module.log_scale.fill_(off)
        (slope,) = torch.autograd.grad(loss.rows(module, x, None).mean(), module.log_scale)
        assert slope.item() * off > 0.0


def test_noised_is_lowest_at_the_score_of_the_noised_density() -> None:
    """There its gradient is zero (1e-6 false alarms), and at the clean density it is not."""
    sigma, clean = 0.7, Gaussian()
    x = clean().sample((250 * BATCHES,))
    noised = Gaussian(factor=torch.linalg.cholesky(FACTOR @ FACTOR.T + sigma**2 * torch.eye(3)))
    loss = NoisedLoss(sigma)
    assert_zero_mean(gradients(loss, noised, x))
    with pytest.raises(AssertionError):
        assert_zero_mean(gradients(loss, clean, x))


# --------------------------------------------------------------------------------------------- their values
def sigma_points(mean: Tensor, factor: Tensor) -> Tensor:
    """Points of equal weight whose mean and covariance are exact, (2D, D)."""
    size = len(mean)
    return mean + size**0.5 * torch.cat([factor.T, -factor.T])


def closed_form(module: Gaussian) -> tuple[float, float]:
    """E ImplicitLoss and E ½‖∇ log p‖² under N(MEAN, FACTOR FACTORᵀ), of a normal model."""
    truth = FACTOR @ FACTOR.T
    distribution: Any = module()
    precision, apart = distribution.precision_matrix, MEAN - distribution.loc
    squares = (precision @ truth @ precision).trace() + (precision @ apart).square().sum()
    return (-precision.trace() + 0.5 * squares).item(), (0.5 * truth.inverse().trace()).item()


@pytest.mark.parametrize("is_off", [False, True])
def test_implicit_and_explicit_have_their_closed_forms_on_gaussians(is_off: bool) -> None:
    module, x = Gaussian(), sigma_points(MEAN, FACTOR)
    if is_off:
        with torch.no_grad():
            module.mean.add_(0.3)
            module.log_scale.add_(0.2)
            module.shear.add_(0.4)
    implicit, constant = closed_form(module)
    assert ImplicitLoss().rows(module, x).mean().item() == pytest.approx(implicit, rel=1e-12)
    assert ExplicitLoss(exact(Gaussian())).rows(module, x).mean().item() == pytest.approx(implicit + constant, abs=1e-12)
    if not is_off:  # where the score is known, the value is that of the constant
        assert implicit == pytest.approx(-constant, rel=1e-12)


def test_implicit_is_explicit_but_for_a_constant_on_a_mixture() -> None:
    """Over a grid, whose sums are exact to rounding for functions that smooth."""
    truth, module = Mixture(), Mixture()
    with torch.no_grad():
        module.means.add_(torch.tensor([[0.2, -0.3], [-0.1, 0.1]]))
        module.log_scales.add_(0.15)
    axis = torch.linspace(-8.0, 8.0, 161)
    x = torch.cartesian_prod(axis, axis)
    weights = truth().log_prob(x).exp().detach() * 0.1**2
    constant = 0.5 * (weights * exact(truth)(x).square().sum(1)).sum()
    implicit = (weights * ImplicitLoss().rows(module, x)).sum()
    explicit = (weights * ExplicitLoss(exact(truth)).rows(module, x)).sum()
    assert weights.sum().item() == pytest.approx(1.0, abs=1e-9)
    assert explicit.item() == pytest.approx((implicit + constant).item(), abs=1e-9)
    assert explicit > 0.01


@pytest.mark.parametrize("directions", ["rademacher", "normal"])
@pytest.mark.parametrize("is_reduced", [True, False])
def test_sliced_is_implicit_in_expectation(directions: str, is_reduced: bool) -> None:
    """At three rows, over 4,000 directions each; 1e-6 false alarms (normal approximation)."""
    module, x = Mixture(), torch.tensor([[-0.8, 0.4], [0.1, 0.2], [1.5, -0.6]])
    many = x.repeat_interleave(4000, 0)
    sliced = SlicedLoss(1, directions, is_reduced).rows(module, many).detach().reshape(3, -1)
    spread = sliced.std(1) / sliced.shape[1] ** 0.5
    assert ((sliced.mean(1) - ImplicitLoss().rows(module, x)).abs() < scipy.stats.norm.isf(RATE / 6) * spread + 1e-12).all()


def test_variance_reduction_reduces_variance() -> None:
    """Rademacher directions leave 2 Σ_{i≠j} J_ij² of it for a normal model, none if it has independent parts."""
    module, x = Gaussian(), (MEAN + torch.tensor([1.0, -0.5, 2.0])).expand(20000, 3)
    precision = torch.cholesky_inverse(FACTOR)
    expected = 2.0 * (precision - precision.diagonal().diag()).square().sum().item()
    reduced, plain = (SlicedLoss(is_reduced=is_reduced).rows(module, x).var().item() for is_reduced in (True, False))
    assert reduced == pytest.approx(expected, rel=0.1)  # 7 standard errors of a variance of three equal terms
    assert plain > 2.0 * reduced
    independent = Gaussian(factor=torch.eye(3))
    assert torch.allclose(SlicedLoss().rows(independent, x[:5]), ImplicitLoss().rows(independent, x[:5]), rtol=1e-12)


def test_noised_has_its_closed_form_on_gaussians() -> None:
    """½ (σ² tr(P (S + σ²) P) − 2 σ² tr P + D); 1e-6 false alarms. It is σ² ExplicitLoss there, and a constant."""
    sigma, module, truth = 0.5, Gaussian(), FACTOR @ FACTOR.T
    precision = torch.cholesky_inverse(FACTOR)
    noised = truth + sigma**2 * torch.eye(3)
    expected = 0.5 * (sigma**2 * (precision @ noised @ precision - 2.0 * precision).trace() + 3.0)
    rows = NoisedLoss(sigma).rows(module, module().sample((100000,))).detach()
    assert abs(rows.mean() - expected) < scipy.stats.norm.isf(RATE / 2) * rows.std() / len(rows) ** 0.5
    gap = noised.inverse() - precision
    explicit = 0.5 * (gap @ noised @ gap).trace()
    constant = 0.5 * (3.0 - sigma**2 * noised.inverse().trace())
    assert (sigma**2 * explicit + constant).item() == pytest.approx(expected.item(), rel=1e-12)


# ------------------------------------------------------------------------------------ what they are given
def test_a_field_without_a_density_is_fitted_through_its_score() -> None:
    """By the exact solution −S⁻¹ of the normal equations, symmetric although nothing makes it so."""
    covariance = torch.tensor([[1.0, 0.4], [0.4, 0.5]])
    x = sigma_points(torch.zeros(2), torch.linalg.cholesky(covariance))
    module = Field(-covariance.inverse())
    assert isinstance(module(), Scored)
    for loss in (ImplicitLoss(), ExplicitLoss(lambda y: -y @ covariance.inverse())):
        (slope,) = torch.autograd.grad(loss.rows(module, x).mean(), module.matrix)
        assert slope.abs().max() < 1e-12
    wrong = Field(torch.tensor([[-1.0, 0.5], [-0.5, -1.0]]))
    assert ImplicitLoss().rows(wrong, x).mean() > ImplicitLoss().rows(module, x).mean()


def test_contexts_reach_the_module() -> None:
    x, context = torch.randn(4, 2), torch.randn(4, 2)
    found = score(lambda context: dist.Normal(context, 2.0).to_event(1), x, context)
    assert torch.allclose(found, (context - x) / 4.0)


def test_pictures_are_rows() -> None:
    module = lambda context: dist.Normal(torch.zeros(4, 4), 1.0).to_event(2)  # noqa: E731
    for loss in (ImplicitLoss(), SlicedLoss(), NoisedLoss(0.1)):
        assert loss.rows(module, torch.randn(3, 4, 4)).shape == (3,)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: NoisedLoss(0.0), ValueError, "noise is 0.0, but must be positive"),
        (lambda: NoisedLoss(math.nan), ValueError, "positive and finite"),
        (lambda: SlicedLoss(0), ValueError, "projections is 0"),
        (lambda: SlicedLoss(directions="uniform"), ValueError, "'rademacher', 'normal'"),
        (lambda: ImplicitLoss().rows(lambda c: None, torch.ones(3, 2)), TypeError, "makes none"),
        (lambda: ImplicitLoss().rows(nn.Module(), torch.ones(3, 2)), TypeError, "Module makes none"),
        (lambda: ImplicitLoss().rows(lambda c: c, torch.ones(3, 2), "c"), TypeError, "got a str"),
        (lambda: ImplicitLoss().rows(lambda c: dist.Normal(0.0, 1.0), torch.ones(3, 2)), ValueError, r"\.to_event"),
        (lambda: ExplicitLoss(lambda x: x.sum(1)).rows(Gaussian(), torch.ones(2, 3)), ValueError, "target gives a gradient"),
        (lambda: ImplicitLoss().rows(Field(torch.ones(1, 2)), torch.ones(3, 2)), ValueError, "A score has the shape of x"),
    ],
)
def test_what_is_wrong_is_said(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
