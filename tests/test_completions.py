"""Proposals from a guide, row by row, and completions of missing entries: against closed forms, a grid and HMC.

Draws agree with what is exact within 4 Monte-Carlo standard errors of each moment (``agreement``): of the 200 comparisons or
so of this file, one in 80 runs of it with other seeds would fail by chance. All seeds are fixed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor, nn

from agreement import assert_agree, assert_alike
from exact import Moments
from inference import (
    EM,
    HMC,
    SVI,
    Gibbs,
    GuideDraw,
    Independence,
    MetropolisHastings,
    Posterior,
    Slice,
    Unsupported,
    arviz,
)
from inference.blocks import Current
from inference.density import Density
from inference.evidence import log_evidence
from inference.handlers import isolated
from inference.program import Program
from parameters import quick
from pyro_genmodels import IWAE, VAE, datasets
from pyro_genmodels.distributions import Entries, PartialNormal

NAN = math.nan


def array(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------ a program where everything is known
LOADINGS = array([1.0, 0.8, -0.5, 0.2], [0.0, 0.7, 0.9, -1.1])  # (feature, entry)
SCALE = 0.6
X = array(
    [1.2, 0.3, -0.8, 0.5],
    [NAN, 1.4, NAN, -0.6],
    [-1.0, NAN, NAN, NAN],
    [NAN, NAN, 2.0, 1.0],
    [0.4, -0.9, 0.1, NAN],
)
EXACT_ENCODER = LOADINGS.T @ torch.linalg.inv(LOADINGS @ LOADINGS.T + SCALE**2 * torch.eye(2, dtype=torch.float64))


def linear(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        pyro.sample("x", Entries(dist.Normal(z @ LOADINGS.to(x), SCALE), 1), obs=x)


def encoder(x: Tensor) -> None:
    """Off in its mean and its scale, as an encoder is; it reads 0 where it is given a gap."""
    with pyro.plate("rows", len(x)):
        mean = 0.8 * x.nan_to_num(nan=0.0) @ EXACT_ENCODER.to(x) + 0.1
        pyro.sample("z", dist.Normal(mean, x.new_tensor([0.9, 1.2])).to_event(1))


def exact_posterior(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (row, 2) and covariance (row, 2, 2) of z given the known entries of each row."""
    means, covariances = [], []
    for row in x:
        loadings = LOADINGS[:, ~row.isnan()]
        precision = torch.eye(2, dtype=torch.float64) + loadings @ loadings.T / SCALE**2
        covariance = torch.linalg.inv(precision)
        means.append(covariance @ loadings @ row[~row.isnan()] / SCALE**2)
        covariances.append(covariance)
    return torch.stack(means), torch.stack(covariances)


def moments(x: Tensor) -> Moments:
    mean, covariance = exact_posterior(x)
    return Moments(mean.numpy(), covariance.diagonal(dim1=-2, dim2=-1).sqrt().numpy())


def sampled(program: Any, *data: Tensor, blocks: Any = None, **options: Any) -> Posterior:
    options = {"chains": 200, "draws": 60, "warmup": 30, "seed": 1} | options
    return Gibbs(blocks=blocks or {"z": GuideDraw()}, progress=False, **options).fit(program, *data)


@pytest.mark.parametrize("walks", [True, False], ids=["walks", "draws only"])
@pytest.mark.parametrize("completes", [True, False], ids=["completed", "read as they are"])
def test_proposals_of_a_guide_have_the_posterior_of_a_linear_program(completes: bool, walks: bool) -> None:
    posterior = sampled(linear, X, blocks={"z": GuideDraw(encoder, completes=completes, walks=walks)}, draws=150)
    assert_agree(posterior.draws, {"z": moments(X)})
    assert posterior.plan["z"].update == "Guide" and posterior.plan["z"].claim == "independent"
    certificate = posterior.plan["z"].certificate
    assert certificate is not None and certificate < 1e-10


def test_completions_have_the_predictive_distribution_of_the_known_entries() -> None:
    z = sampled(linear, X, blocks={"z": GuideDraw(encoder)}).draws["z"]
    mean, covariance = exact_posterior(X)
    expected = mean @ LOADINGS
    spread = torch.einsum("fe,nfg,ge->ne", LOADINGS, covariance, LOADINGS)
    with isolated(0):
        drawn = z @ LOADINGS + SCALE * torch.randn(*z.shape[:3], 4, dtype=torch.float64)
    gaps = X.isnan()
    exact = Moments(expected[gaps].numpy(), (spread + SCALE**2).sqrt()[gaps].numpy())
    assert_agree({"missing": drawn[..., gaps]}, {"missing": exact})


class _NoRatio(GuideDraw):
    """Takes whatever the encoder says: pseudo-Gibbs."""

    def _decided(self, density: Density, values: Any, proposed: Any, log_q_ratio: Tensor, is_led: bool = False) -> Any:
        return {**values, **proposed}, torch.ones(len(log_q_ratio)).double(), torch.zeros(len(log_q_ratio)).double()


class _LikelihoodOnly(GuideDraw):
    """Forgets log q in the ratio."""

    def _mapped(self, *args: Any, **kwargs: Any) -> Any:
        drawn, *log_q = super()._mapped(*args, **kwargs)
        return drawn, *(torch.zeros_like(part) for part in log_q)


class _Backwards(GuideDraw):
    """Divides by the density of the wrong draw."""

    def _mapped(self, *args: Any, **kwargs: Any) -> Any:
        drawn, present, log_q = super()._mapped(*args, **kwargs)
        return drawn, log_q, present


@pytest.mark.parametrize("broken", [_NoRatio, _LikelihoodOnly, _Backwards])
def test_a_wrong_ratio_is_found_out_by_the_closed_form(broken: Any) -> None:
    posterior = sampled(linear, X, blocks={"z": broken(encoder, walks=False)})
    with pytest.raises(AssertionError):
        assert_agree(posterior.draws, {"z": moments(X)})


def test_rows_are_accepted_one_by_one() -> None:
    """As many proposals are taken of 300 rows as of 5; all together, none would be."""
    few = sampled(linear, X, blocks={"z": GuideDraw(encoder)}).plan["z"].acceptance
    many = sampled(linear, X.repeat(60, 1), blocks={"z": GuideDraw(encoder)}, chains=4).plan["z"].acceptance
    assert few > 0.15 and many == pytest.approx(few, abs=0.02)  # a dozen standard errors of either
    together = sampled(linear, X.repeat(60, 1), blocks={"z": _Together(encoder)}, chains=4, draws=50, warmup=10)
    assert together.plan["z"].acceptance < 0.01


class _Together(GuideDraw):
    def bind(self, *args: Any) -> Any:
        return super().bind(*args).scanning()


def test_all_rows_together_have_the_same_posterior() -> None:
    rows = X[:2]
    posterior = sampled(linear, rows, blocks={"z": _Together(encoder)}, draws=80)
    assert_agree(posterior.draws, {"z": moments(rows)})
    alone = MetropolisHastings(proposal=Independence(encoder), chains=50, draws=400, warmup=0, seed=0, progress=False).fit(
        linear, rows
    )
    assert_alike(posterior.draws, alone.draws, ("z",))


def two_layers(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        top = pyro.sample("top", dist.Normal(x.new_tensor(0.0), 1.0))
        z = pyro.sample("z", dist.Normal(torch.stack([top, -top], -1), 1.0).to_event(1))
        pyro.sample("x", Entries(dist.Normal(z @ LOADINGS.to(x), SCALE), 1), obs=x)


def two_encoders(x: Tensor, coupled: float = 0.0) -> None:
    with pyro.plate("rows", len(x)):
        mean = 0.7 * x.nan_to_num(nan=0.0) @ EXACT_ENCODER.to(x)
        z = pyro.sample("z", dist.Normal(mean, 0.9).to_event(1))
        lean = 0.3 * (z[..., 0] - z[..., 1])
        pyro.sample("top", dist.Normal(lean + coupled * lean.roll(1, -1), 0.8))


@pytest.mark.parametrize("coupled", [0.0, 0.3], ids=["rows apart", "rows coupled by the guide"])
@pytest.mark.slow
def test_two_layers_move_together(coupled: float) -> None:
    """z and what is above it: (top, z) is normal. A guide that couples rows is as exact, but all rows move together."""
    rows = X[:2]
    guide = functools.partial(two_encoders, coupled=coupled)
    with isolated(0):
        looked = Program(two_layers, (rows,))
        values = {"top": torch.randn(8, 2).double(), "z": torch.randn(8, 2, 2).double()}
        bound = GuideDraw(guide).bind(("top", "z"), looked.density, Current(values, looked.density.joint(values)))
    assert bound.is_scan == bool(coupled)
    posterior = sampled(two_layers, rows, blocks={("top", "z"): GuideDraw(guide)}, draws=150)
    up = array([1.0], [-1.0])
    prior = torch.block_diag(torch.ones(1, 1).double(), torch.eye(2).double()) + 0.0
    prior[0, 0] = 3.0
    prior[0, 1:], prior[1:, 0] = -up[:, 0], -up[:, 0]  # precision of (top, z)
    mean, sd = [], []
    for row in rows:
        loadings = LOADINGS[:, ~row.isnan()]
        precision = prior.clone()
        precision[1:, 1:] += loadings @ loadings.T / SCALE**2
        covariance = torch.linalg.inv(precision)
        mean.append(covariance[:, 1:] @ loadings @ row[~row.isnan()] / SCALE**2)
        sd.append(covariance.diagonal().sqrt())
    means, sds = torch.stack(mean).numpy(), torch.stack(sd).numpy()
    exact = {"top": Moments(means[:, 0], sds[:, 0]), "z": Moments(means[:, 1:], sds[:, 1:])}
    assert_agree(posterior.draws, exact)


def shared(x: Tensor) -> None:
    """A level of all rows, drawn by another block, on which the guide of the rows depends."""
    level = pyro.sample("level", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(level, 1.0))
        pyro.sample("x", Entries(dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 0.7), 1), obs=x)


def shared_guide(x: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(0.3 * level + 0.6 * x.nan_to_num(nan=0.0).mean(-1), 0.7))


def test_a_guide_is_given_the_present_values_of_other_sites() -> None:
    x = array([1.0, NAN], [2.0, 0.5], [NAN, -0.2])
    posterior = sampled(shared, x, blocks={"z": GuideDraw(shared_guide)}, draws=80)
    known = (~x.isnan()).sum(1).double()
    rows = torch.diag(1.0 + known / 0.49)
    precision = torch.zeros(4, 4).double()
    precision[0, 0], precision[0, 1:], precision[1:, 0], precision[1:, 1:] = 4.0, -1.0, -1.0, rows
    covariance = torch.linalg.inv(precision)
    mean = covariance[:, 1:] @ (x.nansum(1) / 0.49)
    sd = covariance.diagonal().sqrt()
    exact = {"level": Moments(float(mean[0]), float(sd[0])), "z": Moments(mean[1:].numpy(), sd[1:].numpy())}
    assert_agree(posterior.draws, exact)
    assert posterior.plan["level"].update == "Normal"


# ------------------------------------------------------------------------------ a nonlinear decoder, with a grid
IMAGES = 5


@functools.cache
def trained() -> tuple[VAE, Tensor, Tensor]:
    """A VAE with two latent numbers on digits of 8x8 pixels; images, and the same images with gaps."""
    x = (datasets.load("digits").x >= 8.0).float().reshape(-1, 8, 8)
    with isolated(0):
        model = VAE((8, 8), 2, hidden=(64,))
        svi = SVI(steps=600, learning_rate=5e-3, batch_size=100, draws=1, seed=0, progress=False)
        svi.fit(model, x[IMAGES:])
        whole = x[:IMAGES].double()
        gaps = torch.where(torch.rand(whole.shape) < 0.5, NAN, whole)
    return model.double(), whole, gaps


@functools.cache
def grid(is_whole: bool) -> tuple[Moments, Tensor]:
    """Moments of z of each image, and log p(x), by a sum over a fine grid."""
    model, whole, gaps = trained()
    line = torch.linspace(-6.0, 6.0, 301, dtype=torch.float64)
    z = torch.cartesian_prod(line, line)
    log_prior = -0.5 * z.square().sum(1) - math.log(2 * math.pi) + 2.0 * math.log(float(line[1] - line[0]))
    given = model.decode(z)
    tables = torch.stack([given.log_prob(image) + log_prior for image in (whole if is_whole else gaps)])
    log_p = tables.logsumexp(1)
    weights = (tables - log_p[:, None]).exp()
    mean = weights @ z
    return Moments(mean.numpy(), (weights @ z.square() - mean.square()).sqrt().numpy()), log_p


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "gaps"])
@pytest.mark.parametrize("sampler", quick(["guide", "HMC"], ["guide"]))
def test_the_codes_of_each_image_agree_with_a_fine_grid(is_whole: bool, sampler: str) -> None:
    model, whole, gaps = trained()
    x = whole if is_whole else gaps
    if sampler == "guide":
        posterior = sampled(model, x, chains=50, draws=150, warmup=60)
        certificate = posterior.plan["z"].certificate
        assert certificate is not None and certificate < 1e-9
    else:
        posterior = HMC(chains=20, draws=300, warmup=300, seed=0, progress=False).fit(model, x)
    z = posterior.draws["z"].numpy()
    assert arviz.rhat(z).max() < 1.06  # of each image
    assert_agree(posterior.draws, {"z": grid(is_whole)[0]})


@pytest.mark.parametrize("is_whole", [True, False], ids=["whole", "gaps"])
def test_the_evidence_of_each_image_agrees_with_a_fine_grid(is_whole: bool) -> None:
    model, whole, gaps = trained()
    found = log_evidence(model, whole if is_whole else gaps, samples=20000)
    error = (found.log_p - grid(is_whole)[1]) / found.se
    is_reliable = found.pareto_k < 0.7
    assert int(is_reliable.sum()) >= (5 if is_whole else 4)
    assert float(error[is_reliable].abs().max()) < 3.0, error  # 5 images: a false alarm in 75 seeds


def test_completing_a_row_at_draws_of_its_code_keeps_what_is_known() -> None:
    model, whole, gaps = trained()
    z = sampled(model, gaps, draws=5, warmup=5, chains=2).draws["z"].flatten(0, 1)
    drawn = model.complete(gaps, z=z)
    known = ~gaps.isnan()
    assert drawn.shape == (10, *whole.shape) and not bool(drawn.isnan().any())
    assert torch.equal(drawn[:, known], whole[known].expand(10, -1))
    assert model.complete(gaps, 3).shape == (3, *whole.shape)
    with pytest.raises(ValueError, match=r"z has shape \(5, 2\), but must be \(draws, 5, 2\)"):
        model.complete(gaps, z=z[0])


def test_two_stochastic_layers_of_a_network_agree_with_hmc() -> None:
    """IWAE's second model, its weights random and large; the guide has not been trained."""
    with isolated(2):
        model = IWAE((2, 3), 2, (2, 1), hidden=4).double()
        x = torch.where(torch.rand(3, 2, 3) < 0.3, NAN, torch.rand(3, 2, 3).round()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    names = tuple(Program(model, (x,)).latents)
    left = sampled(model, x, blocks={names: GuideDraw()}, draws=80)
    right = HMC(chains=20, draws=120, warmup=60, seed=0, progress=False).fit(model, x)
    assert_alike(left.draws, right.draws, names)


# ------------------------------------------------------------------------------ EM
class Linear(nn.Module):
    """x = w z + noise with one factor, and an encoder that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.loadings = nn.Parameter(array(0.5, 0.5, 0.5))
        self.register_buffer("scale", array(0.5, 0.7, 0.6))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1) * self.loadings, self.scale).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(0.4 * x.sum(-1), 0.8))


def exact_em(x: Tensor, scale: Tensor, steps: int = 500) -> Tensor:
    """Loadings of one factor with known noise, by the closed forms of both steps."""
    loadings = array(0.5, 0.5, 0.5)
    for _ in range(steps):
        variance = 1.0 / (1.0 + (loadings / scale).square().sum())
        mean = variance * (x * loadings / scale.square()).sum(1)
        loadings = (x * mean[:, None]).sum(0) / (mean.square() + variance).sum()
    return loadings


def test_monte_carlo_em_by_proposals_of_the_guide_finds_the_maximum_of_exact_em() -> None:
    with isolated(0):
        x = torch.randn(60, 1).double() * array(1.0, 0.6, -0.8) + torch.randn(60, 3).double() * array(0.5, 0.7, 0.6)
    model = Linear()
    fit = EM(e_step=Gibbs(chains=32, thin=2, blocks={"z": GuideDraw()}), steps=40, seed=0, progress=False).fit(model, x)
    assert fit.plan is not None
    # the noise of the last steps: 60 rows of 32 draws
    torch.testing.assert_close(model.loadings.detach(), exact_em(x, model.scale), atol=0.03, rtol=0.0)


# ------------------------------------------------------------------------------ refusals
def correlated(x: Tensor) -> None:
    covariance = x.new_tensor([[1.0, 0.5], [0.5, 1.0]])
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        mean = z.unsqueeze(-1).expand(*z.shape, 2)
        pyro.sample("x", PartialNormal(mean, torch.linalg.cholesky(covariance)), obs=x)


def rescaled(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", Entries(dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0), 1), obs=2.0 * x)


def scaled(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", Entries(dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0), 1), obs=x)


def narrow(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(x.nan_to_num(nan=0.0).mean(-1), 1.0))


def unplated(x: Tensor) -> None:
    pyro.sample("z", dist.Normal(x.nan_to_num(nan=0.0).mean(-1), 1.0).to_event(1))


def another(x: Tensor) -> None:
    pyro.sample("other", dist.Normal(x.new_tensor(0.0), 1.0))


def point(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Delta(x.nan_to_num(nan=0.0).mean(-1)))


def restless(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("z", dist.Normal(nn.functional.dropout(x.new_ones(len(x))), 1.0))


def plain(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_tensor(0.0), 1.0))
        pyro.sample("x", Entries(dist.Normal(z.unsqueeze(-1).expand(*z.shape, 2), 1.0), 1), obs=x)


GAPS = array([1.0, NAN], [0.3, -0.4], [NAN, 0.5])
REFUSALS: list[tuple[Callable[..., None], Any, str]] = [
    (correlated, GuideDraw(narrow), "Entries of 'x' depend on one another given the latent sites"),
    (rescaled, GuideDraw(narrow), r"of shape \(3, 2\), are missing, but it is not the data of one observed site"),
    (scaled, GuideDraw(narrow), "'x' is scaled or masked, which changes its density and not the draws"),
    (plain, GuideDraw(), "but plain brings no guide. Give a Pyro guide, or a fitted Posterior"),
    (plain, GuideDraw(unplated), "in 1 independent parts, but in plain it has 3. Put it into the plates"),
    (plain, GuideDraw(another), "but the guide does not sample it"),
    (plain, GuideDraw(point), "or to one point, so that its density is not known"),
    (plain, GuideDraw(restless), "does not give the same density twice.*dropout"),
]


@pytest.mark.parametrize(
    ("program", "block", "sentence"), REFUSALS, ids=[f"{p.__name__} {i}" for i, (p, *_) in enumerate(REFUSALS)]
)
def test_what_would_make_the_ratio_wrong_is_refused(program: Any, block: GuideDraw, sentence: str) -> None:
    with pytest.raises(Unsupported, match=sentence):
        sampled(program, GAPS, blocks={"z": block})


def test_a_refused_completion_can_be_left_out() -> None:
    """The guide reads gaps; the correlated program is normal, so that Gibbs() knows its posterior."""
    left = sampled(correlated, GAPS, blocks={"z": GuideDraw(narrow, completes=False)})
    precision = array(2.0, 1.0 + 4.0 / 3.0, 2.0)
    mean = array(1.0, (4.0 / 3.0) * -0.05, 0.5) / precision
    assert_agree(left.draws, {"z": Moments(mean.numpy(), precision.rsqrt().numpy())})


@pytest.mark.parametrize("guide", [3, nn.Linear], ids=["number", "class"])
def test_a_guide_is_a_guide(guide: Any) -> None:
    with pytest.raises(TypeError, match="must be a Pyro guide or a fitted Posterior"):
        sampled(plain, GAPS, blocks={"z": GuideDraw(guide)})


def test_the_guide_of_a_variational_fit_is_taken() -> None:
    class Guided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x.nan_to_num(nan=0.0).sum(-1), 0.7))

    fit = SVI(guide=Guided(), steps=200, learning_rate=0.02, draws=10, seed=0, progress=False).fit(plain, GAPS)
    known = (~GAPS.isnan()).sum(1)
    mean, sd = GAPS.nansum(1) / (1.0 + known), (1.0 + known).rsqrt()
    assert_agree(sampled(plain, GAPS, blocks={"z": GuideDraw(fit)}).draws, {"z": Moments(mean.numpy(), sd.numpy())})
    with pytest.raises(Unsupported, match="takes the guide of a Posterior of SVI"):
        sampled(plain, GAPS, blocks={"z": GuideDraw(Gibbs(draws=10, warmup=5, seed=0, progress=False).fit(plain, GAPS))})


def test_sites_of_different_plates_have_blocks_of_their_own() -> None:
    with pytest.raises(Unsupported, match=r"updates sites of one batch shape, but 'level' has \(\), 'z' has \(3,\)"):
        sampled(shared, GAPS, blocks={("level", "z"): GuideDraw(shared_guide)})
    blocks = {"level": Slice(), "z": GuideDraw(shared_guide)}
    assert bool(sampled(shared, GAPS, blocks=blocks, draws=5).draws["z"].isfinite().all())
