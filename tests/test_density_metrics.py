"""Evaluation of models with hidden variables, held to closed forms, grids, sums, ArviZ and scikit-learn.

Statistical tests have fixed seeds; the false-alarm rate that each states is that over seeds.
"""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor, nn

from exact import noise
from inference import Unsupported, arviz
from inference.annealing import annealed_evidence, simulated
from inference.evidence import Tally, log_evidence
from pyro_genmodels.metrics import calibration, codes, density

LOG_2PI = math.log(2.0 * math.pi)


class Linear(nn.Module):
    """z ~ N(0, I), x ~ N(W z + m, σ²), and a guide around the exact conditional that is wider or off by what is told."""

    def __init__(
        self, width: float = 1.2, shift: float = 0.0, features: int = 5, dtype: torch.dtype = torch.float64
    ) -> None:
        super().__init__()
        self.loadings = nn.Parameter(noise(features, 2, seed=1).to(dtype))
        self.location = nn.Parameter(noise(features, seed=2).to(dtype))
        self.log_scale = nn.Parameter(torch.tensor(-0.5, dtype=dtype))
        self.width, self.shift = width, shift

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        w = self.loadings
        with pyro.plate("rows", size if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(w.new_zeros(2), 1.0).to_event(1))
            given = dist.Normal(z @ w.T + self.location, self.log_scale.exp()).to_event(1)
            return pyro.sample("x", given, obs=x)

    def conditional(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and covariance of z given x."""
        w, variance = self.loadings, self.log_scale.exp().square()
        covariance = torch.linalg.inv(torch.eye(2, dtype=w.dtype) + w.T @ w / variance)
        return (x - self.location) @ w @ covariance / variance, covariance

    def q(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviations of the guide."""
        mean, covariance = self.conditional(x)
        return mean + self.shift, self.width * covariance.diagonal().sqrt()

    def guide(self, x: Tensor, size: int | None = None) -> None:
        mean, scale = self.q(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(mean, scale).to_event(1))

    def log_p(self, x: Tensor) -> Tensor:
        w = self.loadings.detach().double()
        covariance = w @ w.T + self.log_scale.detach().double().exp().square() * torch.eye(len(w), dtype=w.dtype)
        return dist.MultivariateNormal(self.location.detach().double(), covariance).log_prob(x.double())


LINEAR = Linear()
X, LATENTS = simulated(LINEAR, 200, seed=3)
X = X.detach()


def scores(found: Tensor, truth: Tensor, se: Tensor) -> Tensor:
    return (found - truth) / se


def check_scores(z: Tensor, bias: float = 0.0) -> None:
    """Standardised errors of independent rows: mean within 4 / √rows, spread within 20 %, none above 5.

    For 200 rows: a false alarm in 16,000, in 16,000 and in 8,700 runs, where the errors are normal.
    """
    assert abs(float(z.mean()) - bias) < 4.0 / math.sqrt(len(z))
    assert 0.8 < float(z.std()) < 1.2
    assert float(z.abs().max()) < 5.0


# ------------------------------------------------------------------------------ importance sampling
def test_log_evidence_is_that_of_the_formula() -> None:
    """Within its standard errors, row by row; see ``check_scores``."""
    found = log_evidence(LINEAR, X, samples=2000, seed=1)
    check_scores(scores(found.log_p, LINEAR.log_p(X), found.se))
    assert found.log_p.dtype == torch.float64 and found.log_p.shape == (200,)
    assert found.samples == 2000 and not found.findings and bool((found.pareto_k < 0.7).all())
    assert found.mean == pytest.approx(float(found.log_p.mean()))


def test_the_exact_guide_gives_the_evidence_without_error() -> None:
    """Every weight is p(x) where the guide is the posterior, whatever the number of draws."""

    def guide(x: Tensor, size: int | None = None) -> None:
        mean, covariance = LINEAR.conditional(x)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    found = log_evidence(LINEAR, X, guide=guide, samples=30)
    torch.testing.assert_close(found.log_p, LINEAR.log_p(X), rtol=0, atol=1e-9)
    assert float(found.se.max()) < 1e-7 and bool((found.pareto_k == -torch.inf).all())


def test_a_guide_beside_the_posterior_is_found_out() -> None:
    found = log_evidence(Linear(width=0.2, shift=0.8), X[:20], samples=1000)
    assert bool((found.pareto_k > 0.7).any()) and "k-hat is above 0.7" in found.findings[0]


def test_one_row_is_enough() -> None:
    """5 standard errors: a false alarm in 1.7 million runs."""
    found = log_evidence(LINEAR, X[:1], samples=1000)
    assert found.log_p.shape == (1,)
    assert float(scores(found.log_p, LINEAR.log_p(X[:1]), found.se).abs()) < 5.0


@pytest.mark.parametrize("chunk", [1, 7, 130, 5000])
def test_the_answer_does_not_depend_on_the_chunk(chunk: int) -> None:
    few = X[:9]
    found, whole = log_evidence(LINEAR, few, samples=40, chunk=chunk), log_evidence(LINEAR, few, samples=40)
    torch.testing.assert_close(found.log_p, whole.log_p, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.pareto_k, whole.pareto_k, rtol=0, atol=1e-9)
    one = density.rate_distortion(LINEAR, few, samples=40, chunk=chunk)
    torch.testing.assert_close(one.elbo, density.rate_distortion(LINEAR, few, samples=40).elbo, rtol=0, atol=1e-12)


def test_what_comes_in_parts_is_what_comes_at_once() -> None:
    log_weights = 3.0 * noise(1000, 30, seed=4) - 700.0
    log_weights[::7, 3] = -torch.inf
    tally = Tally(30, 1000)
    for part in log_weights.split([1, 10, 300, 689]):
        tally.add(part)
    found = tally.evidence()
    total = log_weights.logsumexp(0)
    torch.testing.assert_close(found.log_p, total - math.log(1000), rtol=0, atol=1e-12)
    weights = (log_weights - total).exp()
    torch.testing.assert_close(found.se, (weights.square().sum(0) - 1e-3).sqrt(), rtol=1e-12, atol=0)
    shapes = [arviz.pareto_k(row.numpy()) for row in log_weights.T]
    np.testing.assert_allclose(found.pareto_k, shapes, rtol=0, atol=1e-6)


def test_the_largest_weights_have_the_k_hat_of_all() -> None:
    """Of all kinds of weights: light and heavy, tied, few, and none but zeros."""
    raw = noise(400, 12, seed=5) * torch.tensor([1e-5, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0, 40.0, 1.0, 1.0, 1.0])
    raw[:, 9] = raw[:, 9].round()
    raw[20:, 10] = -torch.inf
    raw[:, 11] = -torch.inf
    top = raw.topk(arviz.tail_length(400) + 1, 0).values.T
    counts = (raw > -torch.inf).sum(0).tolist()
    found = np.array([arviz.pareto_k_of_largest(each.numpy(), count) for each, count in zip(top, counts)])
    expected = np.array([arviz.pareto_k(column.numpy()) for column in raw.T])
    is_finite = np.isfinite(expected)
    np.testing.assert_allclose(found[is_finite], expected[is_finite], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(found[~is_finite], expected[~is_finite])
    assert is_finite.sum() >= 7


def test_single_precision_keeps_double_sums() -> None:
    """Of the same draws, as far as single precision goes."""
    single, double = Linear(dtype=torch.float32), Linear()
    found = log_evidence(single, X.float(), samples=500)
    assert found.log_p.dtype == torch.float64
    check_scores(scores(found.log_p, double.log_p(X), found.se))
    mixed = log_evidence(single, X.numpy(), samples=500)  # the data follow the weights
    torch.testing.assert_close(mixed.log_p, found.log_p, rtol=0, atol=0)


def test_a_seed_is_a_run_and_the_caller_keeps_his_numbers() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other, third = (log_evidence(LINEAR, X[:4], samples=20, seed=seed).log_p for seed in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)
    assert torch.equal(before, torch.get_rng_state())


def curved(x: Tensor) -> None:
    """Two hidden numbers through a curved decoder, and seen as three with noise."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(bent(z), 0.5).to_event(1), obs=x)


def bent(z: Tensor) -> Tensor:
    return torch.stack([(2.0 * z[..., 0]).sin() + z[..., 1], z[..., 0] * z[..., 1], z[..., 1].square() - 1.0], -1)


def wide(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.StudentT(5.0, x.new_zeros(2), 1.0).to_event(1))


def on_grid(x: Tensor) -> Tensor:
    """log p(x) of ``curved`` by the trapezoid rule, whose error at a smooth density is below 1e-8 at this width."""
    line = torch.linspace(-7.0, 7.0, 701, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_z = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    mean = bent(z)
    rows = [dist.Normal(mean, 0.5).log_prob(row).sum(1) + log_z for row in x]
    return torch.stack(rows).logsumexp(1) + 2.0 * math.log(0.02)


CURVED = noise(12, 3, seed=6)


def test_a_curved_decoder_has_the_evidence_of_a_fine_grid() -> None:
    """12 rows within 3.5 standard errors: a false alarm in 180 runs."""
    found = log_evidence(curved, CURVED, guide=wide, samples=20_000)
    assert float(scores(found.log_p, on_grid(CURVED), found.se).abs().max()) < 3.5
    assert float(found.se.max()) < 0.1


def mixture(x: Tensor, has_codes: bool = True) -> None:
    """A cluster, a code of that cluster, and what is seen of it."""
    with pyro.plate("rows", len(x)):
        c = pyro.sample("c", dist.Categorical(x.new_tensor([0.2, 0.3, 0.5])))
        centre = x.new_tensor([-3.0, 0.0, 4.0])[c]
        if has_codes:
            centre = pyro.sample("z", dist.Normal(centre, 0.7))
        pyro.sample("x", dist.Normal(centre, 0.5), obs=x)


def code(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x, 0.6))


def code_and_cluster(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x, 0.6))
        pyro.sample("c", dist.Categorical(x.new_ones(3)))


def mixture_log_p(x: Tensor, variance: float) -> Tensor:
    parts = dist.Normal(torch.tensor([-3.0, 0.0, 4.0], dtype=torch.float64), math.sqrt(variance))
    return (parts.log_prob(x[:, None]) + torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()).logsumexp(1)


LINE = 3.0 * noise(200, seed=7)


@pytest.mark.parametrize("guide", [code, code_and_cluster], ids=lambda guide: guide.__name__)
def test_clusters_are_summed_out_or_drawn(guide: Callable[..., Any]) -> None:
    """See ``check_scores``; of drawn clusters only the sum of a few weights counts, so that errors are less normal."""
    found = log_evidence(mixture, LINE, guide=guide, samples=3000)
    check_scores(scores(found.log_p, mixture_log_p(LINE, 0.74), found.se))


def test_what_is_finite_needs_no_guide_and_has_no_error() -> None:
    found = log_evidence(mixture, LINE, False)
    torch.testing.assert_close(found.log_p, mixture_log_p(LINE, 0.25), rtol=0, atol=1e-12)
    assert found.samples == 0 and float(found.se.max()) == 0.0


def test_rates_of_clusters_are_those_of_the_mixture_prior() -> None:
    """−R − D − log p(x) = −KL(q ‖ p(z | x)), which is below zero; rate against quadrature. 12 rows, 4.5 standard errors."""
    few = LINE[:12]
    found = density.rate_distortion(mixture, few, guide=code, samples=5000)
    grid = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
    q = dist.Normal(few[:, None], 0.6)
    weight = q.log_prob(grid).exp() * 0.006
    rate = (weight * (q.log_prob(grid) - mixture_log_p(grid, 0.49))).sum(1)
    distortion = (weight * -dist.Normal(grid, 0.5).log_prob(few[:, None])).sum(1)
    assert float(scores(found.rate, rate, found.rate_se).abs().max()) < 4.5
    assert float(scores(found.distortion, distortion, found.distortion_se).abs().max()) < 4.5


# ------------------------------------------------------------------------------ programs of all kinds
def counts(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        rate = pyro.sample("rate", dist.Gamma(x.new_tensor(3.0), 0.5))
        pyro.sample("x", dist.Poisson(rate), obs=x)


def counts_guide(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("rate", dist.Gamma(2.5 + x, 1.3))


COUNTS = torch.arange(12.0, dtype=torch.float64)
COUNTS_LOG_P = torch.from_numpy(scipy.stats.nbinom(3.0, 1.0 / 3.0).logpmf(np.arange(12)))


def test_a_hidden_rate_has_the_evidence_of_the_negative_binomial() -> None:
    """12 rows, 4 standard errors: a false alarm in 1300 runs."""
    found = log_evidence(counts, COUNTS, guide=counts_guide, samples=4000)
    assert float(scores(found.log_p, COUNTS_LOG_P, found.se).abs().max()) < 4.0


def thinned(x: Tensor) -> None:
    """Of a Poisson number each is seen with probability 0.3: x ~ Poisson(1.2)."""
    with pyro.plate("rows", len(x)):
        n = pyro.sample("n", dist.Poisson(x.new_tensor(4.0)))
        pyro.sample("x", dist.Binomial(n, x.new_tensor(0.3)), obs=x)


def test_a_guide_may_draw_what_has_infinitely_many_values() -> None:
    """4 rows, 4 standard errors: a false alarm in 4000 runs."""

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("n", dist.Poisson(4.0 + 0.0 * x))

    x = torch.arange(4.0, dtype=torch.float64)
    found = log_evidence(thinned, x, guide=guide, samples=5000)
    truth = torch.from_numpy(scipy.stats.poisson(1.2).logpmf(np.arange(4)))
    assert float(scores(found.log_p, truth, found.se).abs().max()) < 4.0
    with pytest.raises(Unsupported, match=r"'n' \(Poisson\) is discrete"):
        annealed_evidence(thinned, x, steps=5)


class Pixels(nn.Module):
    """Rows and pixels as plates, a context for each row, pixels that are missing, and codes in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(noise(4, seed=8))

    def model(self, x: Tensor, offset: Tensor, is_seen: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            top = pyro.sample("top", dist.Normal(offset[:, None], 1.0))
            z = pyro.sample("z", dist.Normal(top, 1.0))
            with pyro.plate("pixels", 4, dim=-1), poutine.mask(mask=is_seen):
                pyro.sample("x", dist.Normal(z * self.weight, 0.5), obs=x)

    def guide(self, x: Tensor, offset: Tensor, is_seen: Tensor) -> None:
        with pyro.plate("rows", len(x), dim=-2):
            top = pyro.sample("top", dist.Normal(offset[:, None], 1.5))
            pyro.sample("z", dist.Normal(top, 1.2))


def test_rows_are_found_among_other_plates_with_context_and_missing_pixels() -> None:
    """Seen pixels of a row are jointly normal: 8 rows, 4 standard errors, a false alarm in 2000 runs."""
    model, x, offset = Pixels(), noise(8, 4, seed=9), noise(8, seed=10)
    is_seen = noise(8, 4, seed=11) > -0.5
    found = log_evidence(model, x, offset, is_seen, samples=20_000)
    w = model.weight.detach()
    for n in range(8):
        seen = is_seen[n]
        covariance = 2.0 * torch.outer(w[seen], w[seen]) + 0.25 * torch.eye(int(seen.sum()), dtype=w.dtype)
        truth = dist.MultivariateNormal(offset[n] * w[seen], covariance).log_prob(x[n, seen]) if seen.any() else 0.0
        assert abs(float(found.log_p[n] - truth)) < 4.0 * float(found.se[n])


class Layers(Linear):
    """A guide that takes what it drew for rows in two dimensions, so that one more would break it."""

    def guide(self, x: Tensor, size: int | None = None) -> None:
        mean, scale = self.q(x)
        with pyro.plate("rows", len(x)):
            u = pyro.sample("u", dist.Normal(mean[:, 0], scale[0]))
            assert u.dim() == 1
            rest = torch.einsum("n,nd->n", u, x) * 0.0
            pyro.sample("v", dist.Normal(mean[:, 1] + rest, scale[1]))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        w = self.loadings
        with pyro.plate("rows", size if x is None else len(x)):
            u = pyro.sample("u", dist.Normal(w.new_zeros(()), 1.0))
            v = pyro.sample("v", dist.Normal(w.new_zeros(()), 1.0))
            given = dist.Normal(torch.stack([u, v], -1) @ w.T + self.location, self.log_scale.exp()).to_event(1)
            return pyro.sample("x", given, obs=x)


def test_a_guide_that_takes_no_more_dimensions_is_given_repeated_rows() -> None:
    """See ``check_scores``."""
    model = Layers()
    found = log_evidence(model, X, samples=500)
    check_scores(scores(found.log_p, model.log_p(X), found.se))
    around = density.mutual_information(model, X[:20], samples=50)
    same = density.mutual_information(LINEAR, X[:20], samples=50)
    assert abs(around.lower - same.lower) < 4.0 * math.hypot(around.lower_se, same.lower_se)


def test_a_weight_of_the_objective_is_no_part_of_the_density() -> None:
    """Draw by draw: β-VAEs are judged as the VAEs that they are."""

    class Scaled(Linear):
        def model(self, x: Tensor | None = None, size: int | None = None) -> Any:
            with poutine.scale(scale=4.0):
                return super().model(x, size)

        def guide(self, x: Tensor, size: int | None = None) -> None:
            with poutine.scale(scale=4.0):
                super().guide(x, size)

    found, plain = log_evidence(Scaled(), X[:9], samples=30), log_evidence(LINEAR, X[:9], samples=30)
    assert torch.equal(found.log_p, plain.log_p)


class Network(Linear):
    """With dropout and batch normalisation, and a ``prepare`` that a fitted model must be spared."""

    def __init__(self) -> None:
        super().__init__(dtype=torch.float32)
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
        self.prepared = 0

    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        self.prepared += 1

    def guide(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


def test_a_model_is_left_as_it_was_found() -> None:
    model = Network().train()
    model.encoder[2].eval()
    before, modes = {n: v.clone() for n, v in model.state_dict().items()}, [part.training for part in model.modules()]
    one, other = (log_evidence(model, X.float()[:30], samples=50) for _ in range(2))
    assert torch.equal(one.log_p, other.log_p)
    codes.active_units(model, X.float()[:30])
    annealed_evidence(model, X.float()[:3], steps=5, particles=2)
    assert model.prepared == 0 and [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def shared(x: Tensor) -> None:
    location = pyro.sample("location", dist.Normal(x.new_zeros(()), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(location, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_what_rows_share_is_to_be_fixed_first() -> None:
    """log p(x | location): each row is N(location, 2); 200 rows as in ``check_scores``."""
    with pytest.raises(Unsupported, match=r"'location' of shared is in no plate of the rows.*poutine.condition"):
        log_evidence(shared, LINE, guide=code)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    fixed = poutine.condition(shared, data={"location": torch.tensor(0.5, dtype=torch.float64)})
    found = log_evidence(fixed, LINE, guide=guide, samples=1000)
    check_scores(scores(found.log_p, dist.Normal(0.5, math.sqrt(2.0)).log_prob(LINE), found.se))


# ------------------------------------------------------------------------------ annealing
def check_bracket(lower: Tensor, upper: Tensor, truth: Tensor) -> None:
    """Mean over rows of lower <= truth <= upper, by 4 standard errors of the spread between rows: 1 in 16,000 runs each."""
    root = math.sqrt(len(truth))
    assert float((lower - truth).mean()) < 4.0 * float((lower - truth).std()) / root
    assert float((upper - truth).mean()) > -4.0 * float((upper - truth).std()) / root


@pytest.mark.parametrize("steps", [1, 10, 60])
def test_annealing_puts_the_evidence_between_two_bounds(steps: int) -> None:
    latents = {name: value[:100] for name, value in LATENTS.items()}
    found = annealed_evidence(LINEAR, X[:100], latents=latents, steps=steps, particles=4, leapfrog=4)
    check_bracket(found.lower, found.upper, LINEAR.log_p(X[:100]))
    assert found.gap > {1: 1.0, 10: 0.1, 60: 0.0}[steps] and found.gap < {1: math.inf, 10: 2.0, 60: 0.4}[steps]
    if steps == 60:
        assert 0.5 < float(found.acceptance_rate.mean()) < 0.9


@pytest.mark.slow
def test_both_weights_have_their_expectations() -> None:
    """E w = p(x) and E w′ = 1 / p(x): many chains of a short path. 40 rows each, 4.5 standard errors: 1 in 1800 runs."""
    x, latents = simulated(LINEAR, 40, seed=8)
    found = annealed_evidence(LINEAR, x, latents=latents, steps=20, particles=400, leapfrog=3)
    truth = LINEAR.log_p(x)
    assert float(scores(found.lower, truth, found.lower_se).abs().max()) < 4.5
    off = (truth - found.upper).exp() - 1.0  # w′ p(x) − 1, of exact draws of the posterior: zero on average
    assert abs(float(off.mean())) < 4.0 * float(off.std()) / math.sqrt(40)


def test_annealing_from_the_guide_is_tighter() -> None:
    options: dict[str, Any] = {
        "latents": {n: v[:50] for n, v in LATENTS.items()},
        "steps": 10,
        "particles": 4,
        "leapfrog": 3,
    }
    near = annealed_evidence(LINEAR, X[:50], from_guide=True, **options)
    far = annealed_evidence(LINEAR, X[:50], **options)
    check_bracket(near.lower, near.upper, LINEAR.log_p(X[:50]))
    assert near.gap < 0.2 * far.gap


@pytest.mark.parametrize(
    ("model", "x", "truth"),
    [
        (counts, COUNTS, COUNTS_LOG_P),
        (mixture, LINE[:12], mixture_log_p(LINE[:12], 0.74)),
        (curved, CURVED, on_grid(CURVED)),
    ],
    ids=["constrained", "summed", "curved"],
)
def test_annealing_estimates_what_formulas_and_grids_say(model: Callable[..., Any], x: Tensor, truth: Tensor) -> None:
    """12 rows within 4.5 standard errors: a false alarm in 12,000 runs, where weights are light-tailed as these are."""
    found = annealed_evidence(model, x, steps=40, particles=100, leapfrog=4)
    assert bool(found.upper.isnan().all())
    assert float(scores(found.lower, truth, found.lower_se).abs().max()) < 4.5
    assert float((found.lower - truth).abs().max()) < 0.5


# ------------------------------------------------------------------------------ rates and codes
def test_rate_and_distortion_are_those_of_the_formula() -> None:
    """See ``check_scores``, twice."""
    found = density.rate_distortion(LINEAR, X, samples=300)
    with torch.no_grad():
        mean, scale = LINEAR.q(X)
        rate = 0.5 * (scale.square() + mean.square() - 1.0 - 2.0 * scale.log()).sum(1)
        variance = LINEAR.log_scale.exp().square()
        off = (X - LINEAR.location - mean @ LINEAR.loadings.T).square().sum(1)
        off = off + (LINEAR.loadings.square() @ scale.square()).sum()
        distortion = 0.5 * (off / variance + 5.0 * (LOG_2PI + variance.log()))
    check_scores(scores(found.rate, rate, found.rate_se))
    check_scores(scores(found.distortion, distortion, found.distortion_se))
    assert bool((found.elbo < LINEAR.log_p(X) + 4.0 * found.distortion_se).all())


def test_mutual_information_is_within_its_bounds() -> None:
    """One hidden number of known signal to noise, and the exact guide: I = ½ log(1 + s), and the aggregate is the prior.

    4 standard errors: a false alarm in 16,000 runs for each of four bounds.
    """

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.8 * x, math.sqrt(0.2)))

    x = math.sqrt(1.25) * noise(400, seed=12)
    truth = 0.5 * math.log(5.0)
    found = density.mutual_information(model, x, guide=guide, samples=5)
    assert found.lower - 4.0 * found.lower_se < truth < found.upper + 4.0 * found.upper_se
    assert 0.0 < found.upper - found.lower < 0.1 and found.lower < math.log(400)
    gap = density.aggregate_posterior_kl(model, x, guide=guide, samples=5)
    assert gap.lower - 4.0 * gap.lower_se < 0.0 < gap.upper + 4.0 * gap.upper_se and gap.lower < gap.upper < 0.1
    rate = density.rate_distortion(model, x, guide=guide, samples=5)
    assert gap.upper + found.lower == pytest.approx(float(rate.rate.mean()), abs=1e-9)  # the same draws: rate = I + KL


def test_the_aggregate_of_given_rows_is_a_mixture() -> None:
    """Two rows and a guide of two points far apart: I = log 2 for these rows, KL by quadrature; 5 standard errors."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 3.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, 0.3))

    x = torch.tensor([-4.0, 4.0], dtype=torch.float64)
    assert density.mutual_information(model, x, guide=guide).lower == pytest.approx(math.log(2.0), abs=1e-9)
    grid = torch.linspace(-10.0, 10.0, 20_001, dtype=torch.float64)
    log_q = dist.Normal(x[:, None], 0.3).log_prob(grid).logsumexp(0) - math.log(2.0)
    truth = (log_q.exp() * (log_q - dist.Normal(0.0, 3.0).log_prob(grid))).sum() * 1e-3
    found = density.aggregate_posterior_kl(model, x, guide=guide, samples=4000)
    assert abs(found.upper - float(truth)) < 5.0 * 0.8 / math.sqrt(8000)  # the spread of the terms is 0.8 at most


def test_units_that_do_not_follow_the_data_are_not_active() -> None:
    """The variance of E_q[z] without that of its draws: 4 of its standard errors for 5 units, 1 in 3000 runs."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z[..., :2], 1.0).to_event(1), obs=x)

    slope = torch.tensor([0.5, -0.3, 0.05, 0.0, 0.0], dtype=torch.float64)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x[:, :1] * slope, 0.9).to_event(1))

    x = noise(300, 2, seed=13)
    found = codes.active_units(model, x, guide=guide, samples=20)
    truth = slope.square() * x[:, 0].var()
    error = (2.0 * 0.9**2 / 20 * truth + 2.0 * (0.9**2 / 20) ** 2).div(300).sqrt() * math.sqrt(2.0)
    assert bool(((found.variance["z"] - truth).abs() < 4.0 * error).all())
    assert found.active == 2 and found.units == 5
    assert codes.active_units(model, x, guide=guide, threshold=0.2).active == 1
    means = codes.posterior_means(model, x, guide=guide, samples=20)
    z = scores(means.mean["z"], x[:, :1] * slope, means.variance["z"].sqrt())
    assert abs(float(z.mean())) < 4.0 / math.sqrt(1500)


@pytest.mark.parametrize("penalty", [1.0, 0.1])
def test_a_probe_is_the_logistic_regression_of_scikit_learn(penalty: float) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 300)
    table = rng.normal(size=(300, 4)) + np.eye(3, 4)[labels] * 2.0
    table[:, 1] *= 30.0
    found = codes.linear_probe(table[:200], labels[:200], table[200:], labels[200:], penalty=penalty)
    u = (table - table[:200].mean(0)) / table[:200].std(0)
    theirs = linear_model.LogisticRegression(C=1.0 / penalty, tol=1e-8, max_iter=1000).fit(u[:200], labels[:200])
    np.testing.assert_allclose(found.weight, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(found.bias - found.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)
    assert found.accuracy == theirs.score(u[200:], labels[200:])
    assert found.train_accuracy == theirs.score(u[:200], labels[:200])


def test_intervals_of_missing_entries_hold_what_their_draws_promise() -> None:
    """Rows share an error, which a standard error by entries would miss: 4 of it, a false alarm in 5000 runs of 3 levels."""
    rng = np.random.default_rng(1)

    def pixels(*lead: int) -> np.ndarray:
        return rng.normal(size=(*lead, 1)) + 0.5 * rng.normal(size=(*lead, 8))

    truth, draws, is_missing = pixels(500), pixels(99, 500), rng.random((500, 8)) < 0.5
    found = calibration.interval_calibration(truth, draws, is_missing, [0.5, 0.8, 0.95])
    assert found.entries == is_missing.sum()
    np.testing.assert_allclose(found.expected, 0.98 * found.level)
    assert (np.abs(found.coverage - found.expected) < 4.0 * found.se).all()
    assert (found.se > 1.3 * np.sqrt(found.coverage * (1.0 - found.coverage) / found.entries)).all()
    np.testing.assert_allclose(found.width / math.sqrt(1.25), 2.0 * scipy.stats.norm.ppf(0.5 + 0.5 * found.level), rtol=0.1)
    plain = calibration.coverage(truth[is_missing], draws[:, is_missing], found.level)
    np.testing.assert_allclose(found.coverage, plain)
    assert (calibration.interval_calibration(truth, 0.3 * draws, is_missing).coverage < 0.75).all()


@pytest.mark.parametrize("module", [calibration, codes, density], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_true(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# ------------------------------------------------------------------------------ refusals
def looked_up(x: Tensor, table: Tensor) -> None:
    """A table of as many lines as there are rows, though its lines are none."""
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(table[0, 0], 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def picky(x: Tensor) -> None:
    if x.shape[1] != 5:
        raise ValueError(f"x has {x.shape[1]} columns, but must have 5.")
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def coupled(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z - z.mean(), 1.0), obs=x)


def outside(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
    pyro.factor("sum", -z.sum().square())


def apart(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def binary(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z), obs=x)


def given(x: Tensor, context: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(context @ torch.eye(2, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def without_plate(x: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
    pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def code_in_context(x: Tensor, table: Tensor) -> None:
    code(x)


def empty_guide(x: Tensor) -> None:
    pass


def together(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x - x.mean(), 1.0))


def fixed_rows(x: Tensor) -> None:
    with pyro.plate("rows", 200):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def pointed(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Delta(x))


def auxiliary(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x, 0.6))
        pyro.sample("u", dist.Normal(x, 1.0), infer={"is_auxiliary": True})


def at_once(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x, 1.0).to_event(1))


def masked(x: Tensor) -> None:
    with poutine.mask(mask=x > 0):
        code(x)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: log_evidence(apart, LINE), Unsupported, "draws 'z' from a guide, but apart has none. Give guide="),
        (lambda: log_evidence(LINEAR, X[:, :3]), ValueError, r"Site 'x' is Normal of shape \(5, 5\), which does not fit"),
        (
            lambda: log_evidence(Linear(features=3), X[:, :3], guide=Network().double().guide),
            ValueError,
            r"The guide of Linear does not run on x of shape \(200, 3\): mat1 and mat2 shapes cannot be multiplied",
        ),
        (
            lambda: log_evidence(given, X, X[:, :3], guide=wide),
            ValueError,
            r"given does not run on x of shape \(200, 5\) with context of shape \(200, 3\)",
        ),
        (lambda: log_evidence(LINEAR, X, samples=0), ValueError, "samples is 0, but must be an integer of at least 1"),
        (lambda: log_evidence(LINEAR, X, samples=2.5), ValueError, "samples is 2.5"),
        (lambda: log_evidence(LINEAR, X, chunk=0), ValueError, "chunk is 0"),
        (lambda: log_evidence(LINEAR, None), ValueError, "x must be a tensor with rows .*, but is a NoneType"),
        (lambda: log_evidence(LINEAR, torch.tensor(1.0)), ValueError, "rows along dimension 0"),
        (lambda: log_evidence(LINEAR, X[:0]), ValueError, "The data are empty"),
        (lambda: log_evidence(X, LINEAR), TypeError, "A program is a function, .* but this is a Tensor"),
        (
            lambda: log_evidence(picky, X[:, :3]),
            ValueError,
            r"must have 5. \(Seen at the first 5 rows of x, whose shape is \(200, 3\).\)$",
        ),
        (lambda: log_evidence(apart, LINE, guide=Linear), TypeError, "must be a fitted Pyro guide"),
        (lambda: log_evidence(apart, LINE, guide=empty_guide), Unsupported, "guide does not sample 'z', a latent site"),
        (lambda: log_evidence(apart, LINE, guide=code_and_cluster), Unsupported, "The guide samples 'c', but apart has no"),
        (lambda: log_evidence(apart, LINE, guide=together), Unsupported, "The guide takes rows of apart together"),
        (lambda: log_evidence(apart, LINE, guide=fixed_rows), Unsupported, r"the shape \(200,\) at 5 rows, but in"),
        (lambda: log_evidence(apart, LINE, guide=pointed), Unsupported, "all its mass for 'z' on one point"),
        (lambda: log_evidence(apart, LINE, guide=auxiliary), Unsupported, "draws an auxiliary 'u'"),
        (lambda: log_evidence(apart, LINE, guide=at_once), Unsupported, "draws 'z' for all rows at once: put it"),
        (lambda: log_evidence(apart, LINE, guide=masked), Unsupported, "The guide masks 'z'"),
        (lambda: log_evidence(coupled, LINE, guide=code), Unsupported, "Rows of coupled depend on one another"),
        (lambda: log_evidence(looked_up, LINE, X, guide=code_in_context), Unsupported, "Rows of looked_up depend on one"),
        (lambda: log_evidence(outside, LINE, guide=code), Unsupported, "outside of the plate of the rows depends on what"),
        (lambda: log_evidence(without_plate, LINE, guide=at_once), Unsupported, "log_evidence needs rows, but no plate"),
        (
            lambda: log_evidence(binary, torch.cat([torch.ones(300), torch.full((1,), 0.5)]).double(), guide=code),
            ValueError,
            "Site 'x' is Bernoulli, but data lie outside the support Boolean",
        ),
        (
            lambda: log_evidence(apart, torch.cat([LINE, torch.tensor([torch.nan])]), guide=code),
            ValueError,
            "The log-density of row 200 under apart or its guide is NaN",
        ),
        (lambda: annealed_evidence(LINEAR, X, steps=0), ValueError, "steps is 0"),
        (lambda: annealed_evidence(LINEAR, X, particles=0), ValueError, "particles is 0"),
        (lambda: annealed_evidence(apart, LINE, from_guide=True), Unsupported, "starts from a guide, but there is none"),
        (lambda: annealed_evidence(mixture, LINE, False), Unsupported, "log_evidence is exact then"),
        (
            lambda: annealed_evidence(LINEAR, X, latents={"z": LATENTS["z"][:9]}),
            ValueError,
            r"The values of 'z' have the shape \(9, 2\), but must be \(200, 2\)",
        ),
        (lambda: annealed_evidence(LINEAR, X, latents={}), ValueError, "The values of 'z' are missing"),
        (lambda: simulated(lambda x, size: None, 3), ValueError, "must return its data"),
        (lambda: density.rate_distortion(mixture, LINE, False), ValueError, "it draws nothing"),
        (lambda: density.mutual_information(LINEAR, X[:1]), ValueError, "compares rows, but there is only one"),
        (lambda: codes.active_units(LINEAR, X, threshold=0.0), ValueError, "threshold is 0.0"),
        (lambda: codes.active_units(LINEAR, X[:1]), ValueError, "at least 2 of them"),
        (lambda: codes.posterior_means(LINEAR, X, samples=1), ValueError, "samples is 1"),
        (lambda: codes.posterior_means(mixture, LINE, guide=code_and_cluster), Unsupported, r"'c' .* is discrete"),
        (lambda: codes.linear_probe(X, np.zeros(200)), ValueError, "all 200 rows have the label"),
        (lambda: codes.linear_probe(X, [0, 1]), ValueError, r"codes has shape \(200, 5\)"),
        (lambda: codes.linear_probe(X, LINE > 0, X[:, :3], LINE > 0), ValueError, "test_codes has 3 columns, but codes"),
        (lambda: codes.linear_probe(X / 0.0, LINE > 0), ValueError, "NaN or infinite; the first in row 0"),
        (lambda: codes.linear_probe(X, LINE > 0, penalty=0), ValueError, "penalty is 0"),
        (lambda: calibration.interval_calibration(X, X), ValueError, r"truth \(200, 5\) must be \(rows, …\)"),
        (lambda: calibration.interval_calibration(X, X[None], X > 99.0), ValueError, "marks no entry"),
        (lambda: calibration.interval_calibration(X, X[None], level=1.5), ValueError, r"Levels must be in \(0, 1\)"),
        (lambda: calibration.interval_calibration(X, X[None] / 0.0), ValueError, "NaN or infinite"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
