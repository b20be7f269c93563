"""Sampling from first principles against closed forms, and its refusals.

Estimates lie within 4.5 standard errors of the truth, a false alarm in 1.5 · 10⁵ comparisons under a fresh seed; the seeds
are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from inference import Unsupported, sampling

ERRORS = 4.5
LEVELS = torch.tensor([1e-6, 0.001, 0.025, 0.3, 0.5, 0.8, 0.999, 1 - 1e-5], dtype=torch.float64)


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def within(estimate: Any, truth: Any, se: Any) -> bool:
    return bool(((tensor(estimate) - tensor(truth)).abs() <= ERRORS * tensor(se)).all())


def beta_cdf(a: float, b: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.from_numpy(scipy.special.betainc(a, b, x.clamp(0.0, 1.0).numpy()))


def cauchy_cdf(x: Tensor) -> Tensor:
    return torch.atan2(torch.ones_like(x), -x) / math.pi  # keeps its digits in the lower tail


# ------------------------------------------------------------------------------------ inverse transform
@pytest.mark.parametrize(
    ("cdf", "low", "high", "law"),
    [
        (torch.special.ndtr, -math.inf, math.inf, scipy.stats.norm()),
        (lambda x: torch.special.ndtr((x - 1e6) / 3), -math.inf, math.inf, scipy.stats.norm(1e6, 3)),
        (
            dist.Gamma(tensor(2.5), tensor(1.5), validate_args=False).cdf,
            0.0,
            math.inf,
            scipy.stats.gamma(2.5, scale=1 / 1.5),
        ),
        (dist.Gamma(tensor(0.2), tensor(1.0), validate_args=False).cdf, 0.0, math.inf, scipy.stats.gamma(0.2)),
        (beta_cdf(2.0, 5.0), 0.0, 1.0, scipy.stats.beta(2, 5)),
        (beta_cdf(0.5, 0.5), 0.0, 1.0, scipy.stats.beta(0.5, 0.5)),
        (cauchy_cdf, -math.inf, math.inf, scipy.stats.cauchy()),
        (lambda x: x.clamp(max=0.0).exp(), -math.inf, 0.0, scipy.stats.loglaplace(1.0)),
    ],
    ids=["normal", "far", "gamma", "spike", "beta", "arcsine", "cauchy", "negative_exponential"],
)
def test_quantiles_agree_with_their_closed_forms(
    cdf: Callable[[Tensor], Tensor], low: float, high: float, law: Any, request: pytest.FixtureRequest
) -> None:
    expected = LEVELS.log() if "negative" in request.node.name else tensor(law.ppf(LEVELS.numpy()))
    assert torch.allclose(sampling.quantile(cdf, LEVELS, low, high), expected, rtol=1e-10, atol=1e-10)


def test_a_quantile_is_the_smallest_number_of_its_level() -> None:
    """F(x) ≥ u, and F of the float before x is below u: nothing is left to bisect, near 0 as far from it."""
    for cdf in (cauchy_cdf, lambda x: 1.0 / (1.0 + torch.exp(-1e6 * x))):
        x = sampling.quantile(cdf, LEVELS)
        below = torch.nextafter(x, tensor(-math.inf).expand_as(x))
        assert bool((cdf(x) >= LEVELS).all()) and bool((cdf(below) < LEVELS).all())
    root = sampling.quantile(lambda x: x**0.01, tensor([1e-3]), 0.0, 1.0)
    assert float(root) == pytest.approx(1e-300, rel=1e-12)


def test_the_quantile_of_a_jump_is_where_it_jumps() -> None:
    """Of a die and of a mixture with an atom at 0; flat parts are left at their lower end."""
    die = sampling.quantile(lambda x: (x.floor() / 6).clamp(0.0, 1.0), tensor([0.1, 0.5, 0.51, 1.0]))
    assert die.tolist() == [1.0, 3.0, 4.0, 6.0]

    def cdf(x: Tensor) -> Tensor:
        return torch.where(x < 0.0, 0.0, 0.5 + 0.5 * x.clamp(0.0, 1.0))

    assert sampling.quantile(cdf, tensor([0.2, 0.5, 0.75]), -1.0, 1.0).tolist() == pytest.approx([0.0, 0.0, 0.5], abs=1e-15)


def test_the_ends_of_the_levels_are_the_ends_of_the_support() -> None:
    assert float(sampling.quantile(torch.special.ndtr, tensor(0.0))) == -math.inf
    assert sampling.quantile(beta_cdf(1.0, 1.0), tensor([0.0, 1.0]), 0.0, 1.0).tolist() == [0.0, 1.0]


def test_inverse_transforms_are_quantiles_of_uniform_numbers_and_follow_the_generator() -> None:
    """A batch of normals; one Kolmogorov-Smirnov test of 4000 draws, a false alarm in 10⁵ runs."""
    loc = tensor([-2.0, 100.0])
    drawn = [
        sampling.inverse_transform(dist.Normal(loc, 2.0).cdf, (2000, 2), generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    ]
    assert torch.equal(*drawn) and drawn[0].shape == (2000, 2) and drawn[0].dtype == torch.float64
    standard = ((drawn[0] - loc) / 2.0).flatten().numpy()
    assert scipy.stats.kstest(standard, "norm").pvalue > 1e-5


def bumpy(x: Tensor) -> Tensor:
    """Right at both ends, 0 and 0.8, and too large between."""
    return torch.where((x > 0.1) & (x < 0.4), 0.9, 1.6 * x)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sampling.quantile(lambda x: 1 - torch.special.ndtr(x), LEVELS, -3.0, 3.0), "A CDF does not fall"),
        (lambda: sampling.quantile(bumpy, tensor([0.75]), 0.0, 0.5), "A CDF does not fall"),
        (lambda: sampling.quantile(lambda x: x, LEVELS, 0.0, 2.0), "lies between 0 and 1, but this one is 2.0 at x = 2.0"),
        (lambda: sampling.quantile(lambda x: x * torch.nan, LEVELS), "lies between 0 and 1, but this one is nan"),
        (lambda: sampling.quantile(torch.special.ndtr, LEVELS, 0.0), r"the CDF is 0.5 at x = 0. Give a smaller low"),
        (lambda: sampling.quantile(torch.special.ndtr, LEVELS, -9.0, 0.0), r"the CDF is 0.5 at x = 0. Give a larger high"),
        (lambda: sampling.quantile(lambda x: torch.full_like(x, 0.25), tensor([0.5])), "do not bracket"),
        (lambda: sampling.quantile(torch.special.ndtr, LEVELS, 1.0, 1.0), "low is 1.0 and high is 1.0"),
        (lambda: sampling.quantile(torch.special.ndtr, tensor([1.5])), "Levels are probabilities"),
        (lambda: sampling.quantile(lambda x: x.sum(), LEVELS, 0.0, 1.0), "takes each x to one number"),
        (lambda: sampling.inverse_transform(torch.special.ndtr, (3,), low=0.0), "at low = 0 this one is 0.5"),
        (lambda: sampling.inverse_transform(torch.special.ndtr, (3,), high=0.0), "at high = 0 this one is 0.5"),
    ],
    ids=["falls", "bump", "above", "nan", "low", "high", "never", "ends", "levels", "shape", "cut_low", "cut_high"],
)
def test_what_is_no_cdf_is_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


# -------------------------------------------------------------------------------------------- ancestral
def sprinkler(wet: Tensor | None = None) -> None:
    rain = pyro.sample("rain", dist.Bernoulli(tensor(0.2)))
    sprinkles = pyro.sample("sprinkler", dist.Bernoulli(tensor(0.4) * (1 - rain) + 0.01 * rain))
    pyro.sample("wet", dist.Bernoulli(1 - (1 - 0.8 * rain) * (1 - 0.9 * sprinkles)), obs=wet)


def test_ancestral_draws_have_the_joint_law_of_the_network() -> None:
    """Shares of the eight states among 2000 draws, within 4.5 standard errors."""
    drawn = sampling.ancestral(sprinkler, 2000, tensor(1.0), seed=1)
    assert list(drawn) == ["rain", "sprinkler", "wet"] and drawn["wet"].shape == (2000,)
    for rain in (0, 1):
        for sprinkles in (0, 1):
            on, dry = (0.01 if rain else 0.4), (1 - 0.8 * rain) * (1 - 0.9 * sprinkles)
            for wet in (0, 1):
                p = (0.2 if rain else 0.8) * (on if sprinkles else 1 - on) * (1 - dry if wet else dry)
                is_state = (drawn["rain"] == rain) & (drawn["sprinkler"] == sprinkles) & (drawn["wet"] == wet)
                assert within(is_state.double().mean(), p, math.sqrt(p * (1 - p) / 2000))


def test_ancestral_draws_follow_their_seed_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    first, second, other = (sampling.ancestral(sprinkler, 50, seed=seed)["rain"] for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_ancestral_sampling_refuses_an_improper_prior() -> None:
    def program() -> None:
        pyro.sample("a", dist.ImproperUniform(dist.constraints.real, (), ()))

    with pytest.raises(Unsupported, match="a prior that is improper"):
        sampling.ancestral(program, 3)


# -------------------------------------------------------------------------------------------- rejection
def beta_target(x: Tensor) -> Tensor:
    """x (1 - x)³ without its normaliser B(2, 4) = 1/20; the largest value is 27/256, at 1/4."""
    return x.log() + 3.0 * torch.log1p(-x)


UNIT = dist.Uniform(tensor(0.0), tensor(1.0))


def test_rejection_keeps_the_share_that_the_envelope_says() -> None:
    """Acceptance Z / M = (1/20) / (27/256) within 4.5 standard errors; the draws by a KS test, a false alarm in 10⁵ runs."""
    torch.manual_seed(0)
    found = sampling.rejection(beta_target, UNIT, math.log(27 / 256), draws=5000)
    rate = 256 / 27 / 20
    assert within(found.acceptance_rate, rate, rate * math.sqrt((1 - rate) / 5000))
    assert found.draws.shape == (5000,)
    assert scipy.stats.kstest(found.draws.numpy(), scipy.stats.beta(2, 4).cdf).pvalue > 1e-5
    assert math.log(27 / 256) - 1e-3 < found.largest_ratio <= math.log(27 / 256) + 1e-12


def test_rejection_draws_vectors_and_follows_the_seed() -> None:
    """Uniform on the disc from the square: π / 4 is kept."""

    def disc(x: Tensor) -> Tensor:
        return torch.where(x.square().sum(-1) <= 1.0, 0.0, -math.inf)

    square = dist.Uniform(-torch.ones(2, dtype=torch.float64), 1.0).to_event(1)
    first, second = (torch.manual_seed(4) and sampling.rejection(disc, square, math.log(4.0), 3000) for _ in range(2))
    assert torch.equal(first.draws, second.draws) and first.draws.shape == (3000, 2)
    rate = math.pi / 4
    assert within(first.acceptance_rate, rate, rate * math.sqrt((1 - rate) / 3000))
    assert bool((first.draws.square().sum(1) <= 1.0).all()) and first.largest_ratio == pytest.approx(math.log(4.0))


def test_a_proposal_that_is_the_target_is_always_kept() -> None:
    found = sampling.rejection(dist.Poisson(tensor(3.0)).log_prob, dist.Poisson(tensor(3.0)), 0.0, draws=200)
    assert found.acceptance_rate == 1.0 and found.largest_ratio == 0.0


def test_a_broken_envelope_is_caught_with_the_point_and_by_how_much() -> None:
    """The normal under a Laplace: the ratio is largest at ±1, √(2e/π); a bound below by 0.1 is broken near there."""
    torch.manual_seed(0)
    normal, laplace = dist.Normal(tensor(0.0), tensor(1.0)), dist.Laplace(tensor(0.0), tensor(1.0))
    log_bound = 0.5 * math.log(2.0 * math.e / math.pi)
    sampling.rejection(normal.log_prob, laplace, log_bound, draws=500)
    with pytest.raises(ValueError, match=r"The envelope does not hold: log p - log q is 0.27\d+ at -?(1.0|0.9)\d+, above"):
        sampling.rejection(normal.log_prob, laplace, log_bound - 0.1, draws=500)


# ------------------------------------------------------------------------------------------- importance
def test_the_weights_of_the_target_itself_are_equal() -> None:
    gamma = dist.Gamma(tensor(2.0), tensor(3.0))
    found = sampling.importance(lambda x: gamma.log_prob(x) + 1.5, gamma, draws=500)
    assert found.ess == pytest.approx(500.0, rel=1e-12) and found.pareto_k == -math.inf
    assert found.log_normaliser == pytest.approx(1.5, abs=1e-12) and found.log_normaliser_se < 1e-6
    assert torch.allclose(found.weights, tensor(1 / 500).expand(500), rtol=1e-12)
    mean, se = found.mean()
    assert float(mean) == pytest.approx(float(found.draws.mean()))
    assert float(se) == pytest.approx(float(found.draws.std(correction=0)) / math.sqrt(500))


@pytest.mark.parametrize("is_smoothed", [True, False])
def test_importance_finds_normalisers_and_means(is_smoothed: bool) -> None:
    """Z, E x, E x² of an unnormalised normal from a wider Student, each within 4.5 standard errors."""
    torch.manual_seed(1)
    found = sampling.importance(
        lambda x: -0.5 * ((x - 1.0) / 0.7).square(),
        dist.StudentT(tensor(5.0), tensor(0.5), tensor(1.2)),
        draws=20_000,
        is_smoothed=is_smoothed,
    )
    assert found.pareto_k < 0.7 and 1000 < found.ess < 20_000
    assert within(found.log_normaliser, math.log(0.7 * math.sqrt(2 * math.pi)), found.log_normaliser_se)
    moments = found.mean(lambda x: torch.stack([x, x.square()], 1))
    assert within(moments.value, [1.0, 1.49], moments.se) and moments.value.shape == (2,)
    assert bool((moments.se < 0.03).all())


def test_standard_errors_of_importance_are_those_of_repetition() -> None:
    """The spread of 400 estimates by the average se they state: 4.5 standard errors of a spread are 0.16 of it."""
    torch.manual_seed(2)
    target, wide = dist.Normal(tensor(0.0), tensor(1.0)), dist.Normal(tensor(0.0), tensor(1.5))
    runs = [sampling.importance(target.log_prob, wide, draws=1000, is_smoothed=False) for _ in range(400)]
    means = [run.mean() for run in runs]
    spread = torch.stack([mean.value for mean in means]).std()
    assert float(spread / torch.stack([mean.se for mean in means]).mean()) == pytest.approx(1.0, abs=0.16)
    spread = tensor([run.log_normaliser for run in runs]).std()
    assert float(spread) / np.mean([run.log_normaliser_se for run in runs]) == pytest.approx(1.0, abs=0.16)


def test_a_narrow_proposal_is_told_by_k_hat() -> None:
    """Weights of N(0, 1) under N(0, 1/3) have a tail of the shape 1 - 1/9 = 8/9, and no variance."""
    torch.manual_seed(3)
    target, narrow = dist.Normal(tensor(0.0), tensor(1.0)), dist.Normal(tensor(0.0), tensor(1 / 3))
    assert sampling.importance(target.log_prob, narrow, draws=5000).pareto_k > 0.7


def test_draws_off_the_support_have_no_weight() -> None:
    """Half of a normal; log x is NaN on the other half, which does not count."""
    torch.manual_seed(4)
    normal = dist.Normal(tensor(0.0), tensor(1.0))
    found = sampling.importance(lambda x: torch.where(x > 0.0, normal.log_prob(x), -math.inf), normal, draws=4000)
    assert within(math.exp(found.log_normaliser), 0.5, 0.5 * found.log_normaliser_se)
    mean, se = found.mean(torch.log)
    truth = -0.5 * (np.euler_gamma + math.log(2.0))
    assert within(mean, truth, se)


STANDARD = dist.Normal(tensor(0.0), tensor(1.0))
BATCH = dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0)


def nowhere(x: Tensor) -> Tensor:
    """A density whose support no proposal reaches."""
    return torch.where(x > 50.0, 0.0, -math.inf)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sampling.rejection(nowhere, STANDARD, 0.0, 5, max_proposals=3000), "support of the proposal another"),
        (lambda: sampling.rejection(STANDARD.log_prob, STANDARD, 30.0, 5, max_proposals=3000), "log_bound is 30: lower it"),
        (lambda: sampling.rejection(STANDARD.log_prob, STANDARD, math.inf, 5), "is finite, but this one is inf"),
        (lambda: sampling.rejection(STANDARD.log_prob, STANDARD, 0.0, 0), "number of draws is at least 1"),
        (lambda: sampling.rejection(lambda x: x.log(), STANDARD, 0.0, 5), "log-density is nan at the draw"),
        (lambda: sampling.rejection(BATCH.log_prob, BATCH, 0.0, 5), r"batch shape \(3,\). Make it one"),
        (lambda: sampling.importance(nowhere, STANDARD, 20), "All 20 weights are zero"),
        (lambda: sampling.importance(lambda x: x.log(), STANDARD, 20), "log-density is nan at the draw"),
        (lambda: sampling.importance(lambda x: x + math.inf, STANDARD, 20), "log-density is inf at the draw"),
        (lambda: sampling.importance(BATCH.log_prob, BATCH, 20), r"batch shape \(3,\). Make it one"),
        (lambda: sampling.importance(BATCH.log_prob, BATCH.to_event(1), 20), r"takes \(20, 3\) to \(20,\)"),
        (lambda: sampling.importance(STANDARD.log_prob, STANDARD, 0), "number of draws is at least 1"),
        (lambda: sampling.importance(STANDARD.log_prob, STANDARD, 20).mean(lambda x: x.sum()), "as many values"),
        (lambda: sampling.importance(STANDARD.log_prob, STANDARD, 20).mean(torch.log), "function is not finite at the draw"),
    ],
)  # fmt: skip
def test_bad_densities_proposals_and_functions_are_refused(call: Callable[[], Any], sentence: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=sentence):
        call()
