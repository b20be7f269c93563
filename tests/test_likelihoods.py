"""Likelihoods beside scipy's, by sums and quadrature; gaps, saturation and words.

False alarms. Seeds are fixed; with fresh ones: means and slopes at 4.5 standard errors (40 comparisons at 6.8e-6), goodness
of fit at a p-value of 1e-4 (8 tests).
"""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, vmap

from inference.handlers import Drawing, isolated
from pyro_genmodels.autoencoders import likelihoods
from pyro_genmodels.autoencoders.likelihoods import (
    Bernoulli,
    Categorical,
    ContinuousBernoulli,
    DiscretisedLogistic,
    Gaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from pyro_genmodels.distributions import Entries

LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "Bernoulli": Bernoulli,
    "Categorical": lambda: Categorical(5),
    "ContinuousBernoulli": ContinuousBernoulli,
    "DiscretisedLogistic": lambda: DiscretisedLogistic(16),
    "Gaussian, fixed": lambda: Gaussian("fixed", 0.3),
    "Gaussian, shared": lambda: Gaussian("shared", 0.3),
    "Gaussian, each": lambda: Gaussian("each"),
    "NegativeBinomial": NegativeBinomial,
    "NegativeBinomial, shared": lambda: NegativeBinomial("shared"),
    "Poisson": Poisson,
    "StudentT": StudentT,
    "StudentT, 4": lambda: StudentT(4.0),
}
EVERY = pytest.mark.parametrize("name", LIKELIHOODS)
SHAPE = (2, 3)


def outputs(
    likelihood: Likelihood, *batch: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, scale: float = 1.0
) -> Tensor:
    noise = torch.randn(*batch, likelihood.outputs, *shape, generator=torch.Generator().manual_seed(seed))
    return scale * noise.double()


def built(name: str) -> Likelihood:
    return LIKELIHOODS[name]().double()


def drawn(given: Entries, *shape: int, seed: int = 1) -> Tensor:
    with isolated(seed):
        return given.sample(torch.Size(shape))


def z_scores(values: Tensor, mean: Tensor) -> Tensor:
    return (values.mean(0) - mean) / (values.std(0) / math.sqrt(len(values)))


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(likelihoods, extraglobs={"torch": torch}).failed == 0


# --------------------------------------------------------------------------------------------- densities
def grid_of(likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """Values that an entry may have, and what each counts."""
    if isinstance(likelihood, (Gaussian, StudentT, ContinuousBernoulli)):
        nodes, weights = (torch.tensor(part) for part in np.polynomial.legendre.leggauss(60))
        if isinstance(likelihood, ContinuousBernoulli):
            return 0.5 * (1.0 + nodes), 0.5 * weights
        # x = sinh(y): the tails of Student's t are long
        ends = torch.linspace(-12.0, 12.0, 161, dtype=torch.float64)
        half = 0.5 * ends.diff().unsqueeze(-1)
        y = (ends[:-1].unsqueeze(-1) + half * (1.0 + nodes)).reshape(-1)
        return y.sinh(), (half * weights).reshape(-1) * y.cosh()
    if isinstance(likelihood, DiscretisedLogistic):
        values = torch.arange(likelihood.bins).double() / (likelihood.bins - 1)
    else:
        values = torch.arange({Bernoulli: 2, Categorical: 5}.get(type(likelihood), 3000)).double()
    return values, torch.ones_like(values)


@EVERY
def test_densities_sum_to_one_and_have_their_mean(name: str) -> None:
    likelihood = built(name)
    numbers = outputs(likelihood, 6, shape=())
    values, weights = grid_of(likelihood)
    share = likelihood(numbers, 0).log_prob(values.unsqueeze(-1)).exp() * weights.unsqueeze(-1)
    torch.testing.assert_close(share.sum(0), torch.ones(6).double(), rtol=1e-8, atol=0.0)
    if not isinstance(likelihood, Categorical):
        mean = (values.unsqueeze(-1) * share).sum(0)
        # x² p(x) ~ x^(−ν + 1) dx beyond e^12 / 2: ν is at least 2 by softplus
        torch.testing.assert_close(likelihood.mean(numbers, 0), mean, rtol=1e-6, atol=1e-6)


def test_labels_are_guessed_by_the_most_probable_one() -> None:
    likelihood = built("Categorical")
    numbers = outputs(likelihood, 4)
    assert torch.equal(likelihood.mean(numbers, 2), numbers.argmax(1).double())


def test_densities_are_those_of_scipy() -> None:
    x = torch.arange(6.0).double().reshape(SHAPE)
    found = {name: outputs(built(name)) for name in LIKELIHOODS}

    def agree(name: str, exact: Any, at: Tensor = x) -> None:
        log_prob = built(name)(found[name], 2).log_prob(at)
        assert float(log_prob) == pytest.approx(float(np.sum(exact)), rel=1e-10)

    at = {name: numbers.numpy() for name, numbers in found.items()}
    loc, log_scale = at["Gaussian, each"]
    agree("Gaussian, each", stats.norm.logpdf(x, loc, np.hypot(np.exp(log_scale), 1e-3)))
    agree("Gaussian, fixed", stats.norm.logpdf(x, at["Gaussian, fixed"][0], float(np.float32(0.3))))
    loc, log_scale, df = at["StudentT"]
    scale = np.hypot(np.exp(log_scale), 1e-3)
    agree("StudentT", stats.t.logpdf(x, 2.0 + np.log1p(np.exp(df)), loc, scale))
    agree("Poisson", stats.poisson.logpmf(x, np.exp(at["Poisson"][0])))
    log_mean, log_size = at["NegativeBinomial"]
    size = np.exp(log_size)
    agree("NegativeBinomial", stats.nbinom.logpmf(x, size, size / (size + np.exp(log_mean))))
    levels = torch.tensor([[0.0, 1.0, 7.0], [8.0, 14.0, 15.0]]).double() / 15.0
    loc, log_scale = at["DiscretisedLogistic"]
    edges = stats.logistic(loc, np.hypot(np.exp(log_scale), 0.05 / 15.0))
    above = np.where(levels == 1.0, 1.0, edges.cdf(levels + 0.5 / 15.0))
    agree("DiscretisedLogistic", np.log(above - np.where(levels == 0.0, 0.0, edges.cdf(levels - 0.5 / 15.0))), levels)
    peer = torch.distributions.ContinuousBernoulli(logits=found["ContinuousBernoulli"][0])
    agree("ContinuousBernoulli", peer.log_prob(levels).numpy(), levels)


@EVERY
def test_log_densities_have_the_gradients_of_differences(name: str) -> None:
    likelihood = built(name)
    numbers = outputs(likelihood, 3).requires_grad_()
    x = drawn(likelihood(numbers, 2))
    assert gradcheck(lambda numbers: likelihood(numbers, 2).log_prob(x), numbers)


# --------------------------------------------------------------------------------------------- gaps
@EVERY
def test_an_entry_that_is_missing_counts_nothing(name: str) -> None:
    """Neither in the density nor in its gradient; all of them missing is a density of 1."""
    likelihood = built(name)
    numbers = outputs(likelihood, 4).requires_grad_()
    given = likelihood(numbers, 2)
    x = drawn(given)
    is_seen = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    is_seen[0] = False
    found = given.log_prob(torch.where(is_seen, x, torch.nan))
    apart = likelihood(numbers, 0) if not SHAPE else likelihood(numbers.movedim(1, -1), 0)
    exact = (apart.log_prob(x) * is_seen).sum((-2, -1))
    torch.testing.assert_close(found, exact)
    assert float(found[0].detach()) == 0.0
    by_found, by_exact = (torch.autograd.grad(value.sum(), numbers, retain_graph=True)[0] for value in (found, exact))
    torch.testing.assert_close(by_found, by_exact)
    assert (by_found.movedim(1, -1)[~is_seen] == 0.0).all()
    for weight in likelihood.parameters():
        assert torch.autograd.grad(found.sum(), weight, retain_graph=True)[0].isfinite()


@EVERY
def test_samples_are_complete_and_inside_the_domain(name: str) -> None:
    for dtype in (torch.float32, torch.float64):
        likelihood = LIKELIHOODS[name]().to(dtype)
        x = drawn(likelihood(outputs(likelihood, 4).to(dtype), 2), 50)
        assert x.shape == (50, 4, *SHAPE) and x.dtype == dtype and x.isfinite().all()
        likelihood.check(x)
        likelihood.check(torch.where(x > x.mean(), torch.nan, x))
        if not isinstance(likelihood, (ContinuousBernoulli, Gaussian, StudentT)):
            likelihood.check(x.double())


@EVERY
def test_samples_have_the_mean(name: str) -> None:
    likelihood = built(name)
    if isinstance(likelihood, Categorical):
        numbers = outputs(likelihood, 2)
        x = drawn(likelihood(numbers, 2), 20_000)
        for label in range(5):
            share = numbers.softmax(1)[:, label]
            assert (z_scores((x == label).double(), share).abs() < 4.5).all()
    else:
        numbers = outputs(likelihood, 2, scale=0.5)
        x = drawn(likelihood(numbers, 2), 20_000)
        if name == "StudentT":  # with two to three degrees of freedom there are no standard errors
            x, mean = (x > likelihood.mean(numbers, 2)).double(), torch.full_like(numbers[:, 0], 0.5)
        else:
            mean = likelihood.mean(numbers, 2)
        assert (z_scores(x, mean).abs() < 4.5).all()


# --------------------------------------------------------------------------------------------- saturation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY
def test_outputs_far_out_have_finite_densities_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Each of the decoder's numbers at ±40, or ±110, for data at both ends of the domain; and none that vanishes wrongly."""
    likelihood = LIKELIHOODS[name]().to(dtype)
    ends = {Gaussian: (-1.0, 1.0), StudentT: (-1.0, 1.0), Categorical: (0.0, 4.0), Poisson: (0.0, 9.0)}
    low, high = ends.get(type(likelihood), (0.0, 9.0 if isinstance(likelihood, NegativeBinomial) else 1.0))
    far = (40.0,) if isinstance(likelihood, (Poisson, NegativeBinomial)) else (40.0, 80.0)
    for size in far:
        signs = torch.cartesian_prod(*[torch.tensor([-size, 0.0, size], dtype=dtype)] * min(likelihood.outputs, 3))
        signs = signs.reshape(len(signs), -1)
        signs = torch.cat([signs, signs[:, :1].expand(-1, likelihood.outputs - signs.shape[1])], 1).requires_grad_()
        for x in (low, high):
            log_prob = likelihood(signs, 0).log_prob(torch.tensor(x, dtype=dtype))
            assert log_prob.isfinite().all(), (x, log_prob)
            assert torch.autograd.grad(log_prob.sum(), signs)[0].isfinite().all()
        assert drawn(likelihood(signs.detach(), 0)).isnan().sum() == 0


def test_logits_far_out_are_not_rounded() -> None:
    """Where probabilities would be, log p = −40 has a slope of 1; a count at a rate of e^−40 too."""
    at = torch.tensor([[-40.0], [40.0]], requires_grad=True)
    cases: list[tuple[Likelihood, Tensor, list[float], list[float]]] = [
        (Bernoulli(), torch.tensor([1.0, 0.0]), [-40.0, -40.0], [1.0, -1.0]),
        (ContinuousBernoulli(), torch.tensor([1.0, 0.0]), [math.log(40.0) - 40.0] * 2, [1.0 - 1 / 40, -1.0 + 1 / 40]),
        (Poisson(), torch.tensor([1.0, torch.nan]), [-40.0, 0.0], [1.0, 0.0]),
    ]
    for likelihood, x, values, slopes in cases:
        log_prob = likelihood(at, 0).log_prob(x)
        torch.testing.assert_close(log_prob, torch.tensor(values))
        torch.testing.assert_close(torch.autograd.grad(log_prob.sum(), at)[0][:, 0], torch.tensor(slopes))


def test_a_narrow_logistic_variable_keeps_its_tails() -> None:
    """p(level) is 1e-87 or so, ten levels away: in float32 a difference of sigmoids is 0."""
    likelihood = DiscretisedLogistic(256)
    numbers = torch.tensor([100.0 / 255.0, math.log(1.0 / 255.0 / 20.0)]).requires_grad_()
    log_prob = likelihood(numbers, 0).log_prob(torch.tensor(110.0 / 255.0))
    scale = math.hypot(1.0 / 20.0, 0.05)  # in levels
    assert float(log_prob.detach()) == pytest.approx(-9.5 / scale, rel=1e-4)
    assert torch.autograd.grad(log_prob, numbers)[0][0] > 100.0


def test_negative_binomial_counts_become_poisson_s() -> None:
    x, log_rate = torch.arange(20.0), torch.full((20,), 1.5)
    many = NegativeBinomial()(torch.stack([log_rate, torch.full((20,), 25.0)], -1), 0).log_prob(x)
    torch.testing.assert_close(many, Poisson()(log_rate.unsqueeze(-1), 0).log_prob(x), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- draws
@pytest.mark.parametrize("logit", [-30.0, -1.0, 0.0, 1e-3, 2.0, 30.0])
def test_grey_pixels_are_drawn_from_their_density_and_carry_its_slope(logit: float) -> None:
    """d/dη E x = Var x, as in every exponential family."""
    for dtype in (torch.float32, torch.float64):
        logits = torch.full((20_000, 1), logit, dtype=dtype, requires_grad=True)
        with isolated(3):
            x = ContinuousBernoulli()(logits, 0).rsample()
        low, rest = -np.expm1(-abs(logit)), abs(logit) or 1.0
        up = x.detach().double().numpy() if logit <= 0.0 else 1.0 - x.detach().double().numpy()
        uniform = -np.expm1(-rest * up) / low if logit else up
        assert stats.kstest(uniform, "uniform").pvalue > 1e-4
        slopes = torch.autograd.grad(x.sum(), logits)[0].double()
        half = 0.5 * abs(logit)
        variance = 1.0 / 12.0 if half < 1e-6 else 0.25 * (1.0 / half**2 - 1.0 / np.sinh(half) ** 2)
        assert float(z_scores(slopes, torch.tensor(variance)).abs()) < 4.5


def test_the_slope_of_a_grey_pixel_has_no_seam() -> None:
    """At a fixed quantile, across the place where the series begins."""
    for dtype, width in ((torch.float32, 0.2), (torch.float64, 0.01)):
        logits = torch.linspace(-width, width, 41, dtype=dtype).unsqueeze(-1).requires_grad_()

        def quantiles(logits: Tensor) -> Tensor:
            with isolated(4):
                return vmap(lambda one: ContinuousBernoulli()(one, 0).rsample(), randomness="same")(logits)

        slopes = torch.autograd.grad(quantiles(logits).sum(), logits)[0][:, 0]
        assert slopes.diff().abs().max() < 5.0 * width / 41.0 / 6.0
        assert float(slopes.min()) > 0.0


def test_levels_are_drawn_in_their_shares() -> None:
    likelihood = DiscretisedLogistic(8)
    for loc, log_scale in ((0.5, -2.0), (-0.1, -1.0), (1.3, -0.5)):
        given = likelihood(torch.tensor([loc, log_scale]).double(), 0)
        levels = torch.arange(8.0).double() / 7.0
        counts = np.bincount((drawn(given, 8000) * 7.0).round().long().numpy(), minlength=8)
        expected = 8000.0 * given.log_prob(levels).exp().numpy()
        assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_counts_are_drawn_in_their_shares() -> None:
    for log_mean, log_size in ((1.0, 0.5), (0.0, -3.0)):
        given = NegativeBinomial()(torch.tensor([log_mean, log_size]).double(), 0)
        x = drawn(given, 8000)
        edges = [0, 1, 2, 4, 8, 10**9]
        counts = [int(((x >= low) & (x < high)).sum()) for low, high in itertools.pairwise(edges)]
        size = math.exp(log_size)
        cdf = stats.nbinom(size, size / (size + math.exp(log_mean))).cdf
        shares = np.diff([0.0, *(cdf(edge - 1) for edge in edges[1:-1]), 1.0])
        assert stats.chisquare(counts, 8000.0 * shares).pvalue > 1e-4


# --------------------------------------------------------------------------------------------- programs
@EVERY
def test_a_likelihood_works_in_plates_and_under_vmap(name: str) -> None:
    likelihood = built(name)
    numbers = outputs(likelihood, 4)

    def program(numbers: Tensor, x: Tensor | None = None) -> Tensor:
        with pyro.plate("rows", 4):
            return pyro.sample("x", likelihood(numbers, 2), obs=x)

    with isolated(5):
        x = program(numbers)
    assert x.shape == (4, *SHAPE)
    trace = pyro.poutine.trace(program).get_trace(numbers, x)
    assert trace.log_prob_sum().shape == ()
    many = torch.stack([numbers, 0.5 * numbers])
    with pyro.validation_enabled(False):
        log_prob = vmap(lambda numbers: likelihood(numbers, 2).log_prob(x))(many)
        slopes = vmap(grad(lambda numbers: likelihood(numbers, 2).log_prob(x).sum()))(many)
        with Drawing():
            again = vmap(program, randomness="different")(many)
    torch.testing.assert_close(log_prob, torch.stack([likelihood(part, 2).log_prob(x) for part in many]))
    assert slopes.isfinite().all() and again.shape == (2, 4, *SHAPE)
    likelihood.check(again)


@EVERY
def test_one_decoder_may_serve_many_rows(name: str) -> None:
    """Outputs broadcast against data; a plate expands them."""
    likelihood = built(name)
    given = likelihood(outputs(likelihood), 2)
    wide = given.expand(torch.Size([7]))
    x = drawn(wide)
    assert given.batch_shape == () and wide.batch_shape == (7,) and x.shape == (7, *SHAPE)
    assert given.log_prob(x).shape == wide.log_prob(x).shape == wide.log_prob(x[0]).shape == (7,)
    assert wide.mean.shape == (7, *SHAPE)


# --------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("likelihood", "values", "words"),
    [
        (Bernoulli(), [0.0, 255.0], ["255", "Bernoulli", "[0, 1]", "/ 255", "1 of 4"]),
        (ContinuousBernoulli(), [-0.5, 0.5], ["-0.5", "[0, 1]"]),
        (DiscretisedLogistic(256), [0.5001, 1.0], ["0.5001", "k / 255", "bins"]),
        (DiscretisedLogistic(4), [3.0, 1.0], ["3", "k / 3", "Divide"]),
        (Categorical(3), [0.0, 3.0], ["3", "0, …, 2", "classes"]),
        (Categorical(3), [0.0, 1.5], ["1.5"]),
        (Gaussian(), [0.0, math.inf], ["inf", "finite"]),
        (StudentT(), [0.0, -math.inf], ["-inf", "finite"]),
        (Poisson(), [0.0, -1.0], ["-1", "counts"]),
        (NegativeBinomial(), [0.0, 0.5], ["0.5", "NegativeBinomial", "counts"]),
    ],
    ids=str,
)
def test_data_outside_the_domain_are_refused_in_words(likelihood: Likelihood, values: list[float], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        likelihood.check(torch.tensor([values, [torch.nan, torch.nan]]))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_whole_numbers_may_be_integers() -> None:
    Categorical(3).check(torch.tensor([0, 1, 2]))
    Poisson().check(torch.tensor([0, 1, 200]))
    with pytest.raises(ValueError, match="Categorical"):
        Categorical(3).check(torch.tensor([0, 3]))
    DiscretisedLogistic(256).check(torch.arange(256, dtype=torch.uint8).float() / 255.0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: Gaussian("learned"), 'variance is \'learned\', but must be "fixed", "shared" or "each"'),
        (lambda: Gaussian("fixed", 0.0), "scale is 0"),
        (lambda: Gaussian(least_scale=-1.0), "least_scale is -1"),
        (lambda: StudentT(0.5), "df is 0.5"),
        (lambda: Categorical("3"), "classes is '3'"),
        (lambda: DiscretisedLogistic(2.5), "bins is 2.5"),
        (lambda: Entries(torch.distributions.Bernoulli(torch.ones(3)), 2), "Arrays have 2 dimensions"),
        (lambda: Categorical(1), "at least 2 classes"),
        (lambda: DiscretisedLogistic(1), "at least 2 levels"),
        (lambda: NegativeBinomial("fixed"), "size is 'fixed'"),
        (lambda: Gaussian("each")(torch.zeros(5, 1, 2, 3), 2), r"takes 2 per entry of x: \(…, 2, \*shape\)"),
        (lambda: Bernoulli()(torch.zeros(2, 3), 2), r"shape \(2, 3\)"),
    ],
)
def test_wrong_settings_are_refused_in_words(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


def test_scales_start_where_they_are_told_and_keep_their_floor() -> None:
    for variance in ("fixed", "shared"):
        normal = Gaussian(variance, scale=0.05, least_scale=0.03)(torch.zeros(1), 0).given
        assert float(normal.scale.detach()) == pytest.approx(0.05)
    likelihood = Gaussian("each", least_scale=0.03)
    assert float(likelihood(torch.tensor([0.0, -60.0]), 0).given.scale) == pytest.approx(0.03)
    assert [name for name, _ in Gaussian("shared").named_parameters()] == ["log_scale"]
    assert not list(Gaussian("fixed").parameters()) and not Gaussian("fixed").state_dict()
