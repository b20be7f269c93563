"""The score test passes right programs and finds wrong ones out, at exact draws of conjugate posteriors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from pyro.distributions import constraints
from torch import Tensor

from inference import Gibbs
from inference.calibration import ScoreTest, score_test
from inference.contract import Unsupported
from inference.handlers import isolated

DRAWS = 4000
Y = torch.tensor([1.3, 0.2, 2.1, -0.4, 1.7, 0.9, 3.0, 0.1], dtype=torch.float64)
COUNTS = torch.tensor([3.0, 0.0, 5.0, 1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    with isolated(7):
        yield
    torch.set_default_dtype(default)


# ------------------------------------------------------- right programs, and exact draws of their posteriors
def mean(y: Tensor, scale: float = 2.0) -> None:
    mu = pyro.sample("mu", dist.Normal(0.5, scale))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.5), obs=y)


def mean_draws() -> dict[str, Tensor]:
    precision = 1 / 4 + len(Y) / 2.25
    centre = (0.5 / 4 + Y.sum() / 2.25) / precision
    return {"mu": centre + torch.randn(DRAWS) / precision**0.5}


def variance(y: Tensor) -> None:
    variance = pyro.sample("variance", dist.InverseGamma(2.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.5, variance.sqrt()), obs=y)


def variance_draws() -> dict[str, Tensor]:
    rate = 3.0 + 0.5 * (Y - 0.5).square().sum()
    return {"variance": 1 / torch.distributions.Gamma(2.0 + len(Y) / 2, rate).sample((DRAWS,))}


def deviation(y: Tensor) -> None:
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.5, sigma), obs=y)


def deviation_draws() -> dict[str, Tensor]:
    half = torch.distributions.Gamma(0.5 * (len(Y) - 1), 0.5 * (Y - 0.5).square().sum())
    return {"sigma": half.sample((DRAWS,)).rsqrt()}


def shares(counts: Tensor) -> None:
    theta = pyro.sample("theta", dist.Dirichlet(torch.tensor([1.0, 2.0, 0.5, 1.5])))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), theta), obs=counts)


def shares_draws() -> dict[str, Tensor]:
    return {"theta": torch.distributions.Dirichlet(torch.tensor([1.0, 2.0, 0.5, 1.5]) + COUNTS).sample((DRAWS,))}


def rates(counts: Tensor) -> None:
    with pyro.plate("cells", len(counts)):
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("counts", dist.Poisson(rate), obs=counts)


def rates_draws() -> dict[str, Tensor]:
    return {"rate": torch.distributions.Gamma(2.0 + COUNTS, torch.tensor(2.0)).sample((DRAWS,))}


def matrix(counts: Tensor) -> None:
    """A prior alone: Σ ~ InverseWishart by its density."""
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive_definite, (), (2, 2)))
    pyro.factor("prior", -0.5 * (7.0 + 2 + 1) * sigma.logdet() - 0.5 * torch.linalg.inv(sigma).diagonal().sum())


def matrix_draws() -> dict[str, Tensor]:
    draws = scipy.stats.invwishart(7.0, np.eye(2)).rvs(DRAWS, random_state=np.random.default_rng(1))
    return {"sigma": torch.tensor(draws)}


def order(counts: Tensor) -> None:
    """Two exponentials in order: the density is twice that of the pair."""
    z = pyro.sample("z", dist.ImproperUniform(constraints.positive_ordered_vector, (), (2,)))
    pyro.factor("prior", dist.Exponential(2.0).log_prob(z).sum())


def order_draws() -> dict[str, Tensor]:
    return {"z": torch.distributions.Exponential(2.0).sample((DRAWS, 2)).sort(-1).values}


def component(counts: Tensor) -> None:
    """A coin that chooses the mean of one observation."""
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    z = pyro.sample("z", dist.Bernoulli(p))
    pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=counts.new_tensor(1.4))


def component_draws() -> dict[str, Tensor]:
    ones = 0.4 * float(dist.Normal(2.0, 1.0).log_prob(torch.tensor(1.4)).exp())
    zeros = 0.6 * float(dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.4)).exp())
    z = torch.bernoulli(torch.full((DRAWS,), ones / (ones + zeros)))
    return {"p": torch.distributions.Beta(2.0 + z, 4.0 - z).sample(), "z": z}


class Case(NamedTuple):
    program: Callable[..., None]
    draws: Callable[[], dict[str, Tensor]]
    data: Tensor


RIGHT = (
    Case(mean, mean_draws, Y), Case(variance, variance_draws, Y), Case(deviation, deviation_draws, Y),
    Case(shares, shares_draws, COUNTS), Case(rates, rates_draws, COUNTS), Case(matrix, matrix_draws, COUNTS),
    Case(order, order_draws, COUNTS), Case(component, component_draws, COUNTS),
)  # fmt: skip


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.program.__name__)
def test_a_right_program_passes(case: Case) -> None:
    """p > 10⁻⁴ for eight programs: a false alarm in 1200."""
    found = score_test(case.program, case.draws(), case.data)
    assert found.p_value > 1e-4, found
    np.testing.assert_allclose(found.slope, -1.0, atol=6.0 * found.slope_error.max())


# -------------------------------------------------------------------------------------- wrong programs
def wrong_scale(y: Tensor) -> None:
    mean(y, scale=0.5)


def variance_as_deviation(y: Tensor) -> None:
    variance = pyro.sample("variance", dist.InverseGamma(2.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.5, variance), obs=y)


def no_jacobian(y: Tensor) -> None:
    """A density of the variance, taken for one of its logarithm."""
    log_variance = pyro.sample("log_variance", dist.ImproperUniform(constraints.real, (), ()))
    pyro.factor("prior", dist.InverseGamma(2.0, 3.0).log_prob(log_variance.exp()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.5, (0.5 * log_variance).exp()), obs=y)


def proper_deviation(y: Tensor) -> None:
    sigma = pyro.sample("sigma", dist.HalfCauchy(0.3))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(0.5, sigma), obs=y)


def wrong_concentration(counts: Tensor) -> None:
    theta = pyro.sample("theta", dist.Dirichlet(torch.tensor([1.0, 2.0, 1.0, 1.5])))
    pyro.sample("counts", dist.Multinomial(int(counts.sum()), theta), obs=counts)


def wrong_component(counts: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    z = pyro.sample("z", dist.Bernoulli(1.0 - p))
    pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=counts.new_tensor(1.4))


def log_variance_draws() -> dict[str, Tensor]:
    return {"log_variance": variance_draws()["variance"].log()}


WRONG = (
    Case(wrong_scale, mean_draws, Y), Case(variance_as_deviation, variance_draws, Y),
    Case(no_jacobian, log_variance_draws, Y), Case(proper_deviation, deviation_draws, Y),
    Case(wrong_concentration, shares_draws, COUNTS), Case(wrong_component, component_draws, COUNTS),
)  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.program.__name__)
def test_a_wrong_program_is_found_out(case: Case) -> None:
    found = score_test(case.program, case.draws(), case.data)
    assert found.p_value < 1e-6, found


def test_a_density_of_a_logarithm_passes_with_its_jacobian() -> None:
    """p > 10⁻⁴: a false alarm in 10,000."""

    def program(y: Tensor) -> None:
        log_variance = pyro.sample("log_variance", dist.ImproperUniform(constraints.real, (), ()))
        pyro.factor("prior", dist.InverseGamma(2.0, 3.0).log_prob(log_variance.exp()) + log_variance)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.5, (0.5 * log_variance).exp()), obs=y)

    assert score_test(program, log_variance_draws(), Y).p_value > 1e-4


def centred(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.0, 2.0))
    pyro.factor("nothing", 0.0 * y.sum())


def test_the_slope_sees_a_wrong_scale_about_the_right_centre() -> None:
    """Under N(0, 4) draws of N(0, 1) have the mean score 0, and the slope −1/4; |z| < 4: a false alarm in 16,000."""
    found = score_test(centred, {"z": torch.randn(DRAWS)}, Y)
    assert abs(float(found.z[0])) < 4.0
    assert abs(float(found.slope[0]) + 0.25) < 5.0 * 2.0**0.5 / 4.0 / DRAWS**0.5
    assert found.p_value < 1e-6


# ------------------------------------------------------------------------------------------ the numbers
def test_the_mean_score_is_its_closed_form() -> None:
    draws = mean_draws()
    found = score_test(mean, draws, Y)
    scores = (0.5 - draws["mu"]) / 4.0 + (Y - draws["mu"][:, None]).sum(1) / 2.25
    np.testing.assert_allclose(found.scores["mu"], scores[None].numpy(), rtol=1e-10)
    np.testing.assert_allclose(found.mean, [float(scores.mean())], rtol=1e-10)
    slope = (draws["mu"] - draws["mu"].mean()) * scores
    np.testing.assert_allclose(found.slope, [float(slope.mean())], rtol=1e-10)
    # independent draws: the effective size is their number, up to ArviZ's own error
    np.testing.assert_allclose(found.error, [float(scores.std() / DRAWS**0.5)], rtol=0.2)


def wide(y: Tensor) -> None:
    with pyro.plate("elements", 200):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("nothing", 0.0 * y.sum())


def few(y: Tensor) -> None:
    with pyro.plate("elements", 20):
        pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("nothing", 0.0 * y.sum())


def test_errors_honour_autocorrelation() -> None:
    """z of 200 chains with autocorrelation 0.9 have variance 1, not 19: χ² bounds of ±5 standard deviations."""
    steps = [torch.randn(4, 200)]
    for _ in range(1999):
        steps.append(0.9 * steps[-1] + 0.19**0.5 * torch.randn(4, 200))
    found = score_test(wide, {"z": torch.stack(steps, 1)}, Y)
    # for a normal the second identity's terms are 1 − (x − x̄)², with autocorrelation 0.81
    for z in (found.z, found.z_slope):
        assert abs(np.square(z).mean() - 1.0) < 5.0 * (2.0 / 200) ** 0.5
    assert found.ess.max() < 2000
    assert found.p_value > 1e-4


def test_p_values_are_not_too_small() -> None:
    """40 looks at 1000 independent draws: Bonferroni's p below 0.05 in no more than its share, a false alarm in 10⁵."""
    small = 0
    for _ in range(20):
        small += score_test(few, {"z": torch.randn(4, 250, 20)}, Y).p_value < 0.05
    assert small <= scipy.stats.binom.isf(1e-5, 20, 0.05)


# ---------------------------------------------------------------------------------------- what it takes
def test_discrete_sites_are_summed_out_or_held() -> None:
    """Named or not, both identities hold, with other scores; |z| < 4.5: a false alarm in 10⁴."""
    draws = component_draws()
    held, summed = score_test(component, draws, COUNTS), score_test(component, {"p": draws["p"]}, COUNTS)
    assert held.worst < 4.5 and summed.worst < 4.5
    assert not np.allclose(held.scores["p"], summed.scores["p"])


def test_a_posterior_is_taken_as_it_is() -> None:
    """|z| < 4.5: a false alarm in 10⁵, and its deterministic sites are passed over."""

    def program(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(0.5, 2.0))
        pyro.deterministic("double", 2.0 * mu)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.5), obs=y)

    posterior = Gibbs(chains=4, warmup=5, draws=200, seed=0, progress=False).fit(program, Y)
    found = score_test(program, posterior, Y)
    assert found.scores["mu"].shape == (4, 200)
    assert found.worst < 4.5


def test_numpy_and_single_precision_will_do() -> None:
    draws = {"mu": mean_draws()["mu"].float().numpy()}
    assert score_test(mean, draws, Y.float().numpy()).worst < 4.5  # a false alarm in 10⁵


def test_the_callers_generators_are_left_alone() -> None:
    draws, before = mean_draws(), torch.get_rng_state()
    score_test(mean, draws, Y)
    assert torch.equal(torch.get_rng_state(), before)


def infinite(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    count = pyro.sample("count", dist.Poisson(rate))
    pyro.sample("y", dist.Normal(count, 1.0), obs=y[0])


def discrete(y: Tensor) -> None:
    z = pyro.sample("z", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(z, 1.0), obs=y[0])


@pytest.mark.parametrize(
    ("program", "draws", "error", "message"),
    [
        (mean, {"nu": torch.zeros(9)}, ValueError, "draws names 'nu', but mean has the latent sites mu."),
        (mean, {}, ValueError, "draws lacks the site 'mu' of mean."),
        (infinite, {"rate": torch.ones(9)}, ValueError, "draws lacks the site 'count'"),
        (mean, {"mu": torch.zeros(2, 3, 4)}, ValueError, r"gives 'mu' the shape \(2, 3, 4\)"),
        (mean, {"mu": torch.tensor(1.0)}, ValueError, r"gives 'mu' the shape \(\)"),
        (few, {"z": torch.ones(9, 3)}, ValueError, r"and the site has \(20,\)"),
        (infinite, {"rate": torch.ones(9), "count": torch.ones(8)}, ValueError, r"'count' \(8,\) draws, but \(9,\) to"),
        (mean, {"mu": torch.zeros(5, 3)}, ValueError, "needs 4 draws a chain, but there are 3"),
        (variance, {"variance": torch.arange(9.0)}, ValueError, "1 of the 9 draws of 'variance' lie outside its support"),
        (mean, {"mu": torch.tensor([0.0] * 8 + [torch.nan])}, ValueError, "1 of the 9 draws of 'mu'"),
        (discrete, {"z": torch.zeros(9)}, Unsupported, "has no continuous site"),
    ],
)  # fmt: skip
def test_bad_draws_are_refused(program: Any, draws: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        score_test(program, draws, Y)


# ------------------------------------------------------------------------------------------ the report
@pytest.fixture(scope="module")
def found() -> ScoreTest:
    with isolated(3):
        return score_test(wide, {"z": torch.randn(4, 50, 200, dtype=torch.float64)}, Y)


def test_it_prints_the_worst_coordinates(found: ScoreTest) -> None:
    lines = str(found).splitlines()
    assert len(lines) == 23
    largest = np.maximum(abs(found.z), abs(found.z_slope))
    assert {line.split()[0] for line in lines[1:21]} == {found.names[i] for i in largest.argsort()[-20:]}
    assert lines[21] == "and 180 more, with smaller z"
    assert lines[22].startswith(f"worst |z| {largest.max():.2f} of 400, p = ")
    assert repr(found) == str(found)


def test_it_exports_to_arviz(found: ScoreTest) -> None:
    exported = found.to_arviz()["posterior"]
    np.testing.assert_array_equal(exported["z"].values, found.scores["z"])
    assert exported["z"].dims[:2] == ("chain", "draw")


def test_it_plots_without_a_window() -> None:
    figure = score_test(mean, mean_draws(), Y).plot()
    assert isinstance(figure, Figure)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["mu"]


def test_a_score_that_is_nowhere_but_zero_has_no_error() -> None:
    def program(y: Tensor) -> None:
        pyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])

    found = score_test(program, {"z": torch.randn(100)}, Y)
    assert float(found.z[0]) == 0.0
    assert found.p_value < 1e-6  # no density has these draws and a flat logarithm: its slope is 0, not −1
