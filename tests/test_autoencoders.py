"""Autoencoders: densities by hand, closed forms of linear networks, posteriors by quadrature, sentences for bad input."""

from __future__ import annotations

import doctest
import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import sklearn.decomposition
import sklearn.mixture
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

from agreement import assert_agree
from exact import Moments
from inference import ELBO, EM, HMC, SVI, Gibbs, GuideDraw, MetropolisHastings, PowerAverage
from inference.enumeration import log_normalizer
from inference.handlers import isolated, reproducible
from inference.program import Program
from parameters import quick
from pyro_genmodels import CVAE, IWAE, VAE, Autoencoder, SemiSupervisedVAE, VaDE
from pyro_genmodels.autoencoders import priors
from pyro_genmodels.autoencoders.likelihoods import Gaussian
from pyro_genmodels.autoencoders.priors import StandardNormal
from pyro_genmodels.nets import MLP, ConvDecoder, ConvEncoder

SHAPE, ROWS = (2, 3), 4


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PIXELS = (normal(ROWS, *SHAPE, seed=0) > 0).double()
LABELS = torch.tensor([0, 2, 1, 2])
GAPS = torch.where(normal(ROWS, *SHAPE, seed=1) > 0.5, torch.nan, PIXELS)


def built(make: Callable[[], Any], *data: Tensor, gain: float = 20.0) -> Any:
    """A model in float64 with random weights, its last layers grown so that x says much of z."""
    with isolated(0):
        model = make().double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, MLP):
                module.layers[-1].weight.mul_(gain)
                module.layers[-1].bias.copy_(0.5 * normal(len(module.layers[-1].bias), seed=9))
    model.prepare(*data)
    return model


def log_joint(program: Callable[..., Any], values: Mapping[str, Tensor], *data: Any) -> Tensor:
    """log p(data, values) of each row, by Pyro alone."""
    trace = poutine.trace(poutine.condition(program, values)).get_trace(*data)
    trace.compute_log_prob()
    return sum(site["log_prob"] for n, site in trace.nodes.items() if site["type"] == "sample" and n != "rows")


def drawn(guide: Callable[..., Any], *data: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Draws of a guide, and their log-density, row by row."""
    with isolated(3):
        trace = poutine.trace(guide).get_trace(*data)
    trace.compute_log_prob()
    sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and n != "rows"}
    return {n: s["value"] for n, s in sites.items()}, sum(s["log_prob"] for s in sites.values())


# ------------------------------------------------------------------------------ densities by hand
def by_hand(x: Tensor, logits: Tensor) -> Tensor:
    """log p(x | logits) of Bernoulli pixels, those that are NaN left out, (rows,)."""
    known = ~x.isnan()
    terms = -F.binary_cross_entropy_with_logits(logits.reshape(x.shape), x.nan_to_num(nan=0.0), reduction="none")
    return torch.where(known, terms, 0.0).flatten(1).sum(1)


def log_normal(value: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    terms = -0.5 * ((value - mean) / log_scale.exp()).square() - log_scale - 0.5 * math.log(2 * math.pi)
    return terms.sum(-1)


@pytest.mark.parametrize("x", [PIXELS, GAPS], ids=["whole", "gaps"])
def test_the_bound_of_a_vae_is_that_of_a_page_of_torch(x: Tensor) -> None:
    model = built(lambda: VAE(SHAPE, 2, hidden=(5,)), x)
    values, log_q = drawn(model.guide, x)
    z = values["z"]
    mean, log_scale = model.encoder.network.layers(x.nan_to_num(nan=0.0).flatten(1)).chunk(2, -1)
    expected = by_hand(x, model.decoder.network.layers(z)) + log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
    expected = expected - log_normal(z, mean, log_scale)
    torch.testing.assert_close(log_joint(model.model, values, x) - log_q, expected)


def test_the_bound_of_two_stochastic_layers_is_that_of_a_page_of_torch() -> None:
    model = built(lambda: IWAE(SHAPE, 2, (3, 2), hidden=4), GAPS)
    values, log_q = drawn(model.guide, GAPS)
    z, top = values["z"], values["top"]
    expected = by_hand(GAPS, model.decoder.network.layers(z)) + log_normal(z, *model.lower.layers(top).chunk(2, -1))
    expected = expected + log_normal(top, torch.zeros_like(top), torch.zeros_like(top))
    expected = expected - log_normal(z, *model.encoder.network.layers(GAPS.nan_to_num(nan=0.0).flatten(1)).chunk(2, -1))
    expected = expected - log_normal(top, *model.lift.layers(z).chunk(2, -1))
    torch.testing.assert_close(log_joint(model.model, values, GAPS) - log_q, expected)


@pytest.mark.parametrize("conditional_prior", [False, True])
def test_a_cvae_is_conditioned_on_its_context(conditional_prior: bool) -> None:
    model = built(lambda: CVAE(SHAPE, 3, 2, hidden=(5,), conditional_prior=conditional_prior), PIXELS, LABELS)
    values, log_q = drawn(model.guide, PIXELS, LABELS)
    z, numbers = values["z"], torch.eye(3, dtype=torch.float64)[LABELS]
    mean, log_scale = torch.zeros_like(z), torch.zeros_like(z)
    if conditional_prior:
        mean, log_scale = model.expect.layers(numbers).chunk(2, -1)
    expected = by_hand(PIXELS, model.decoder.network.layers(torch.cat([z, numbers], -1))) + log_normal(z, mean, log_scale)
    seen = model.encoder.network.layers(torch.cat([PIXELS.flatten(1), numbers], -1))
    expected = expected - log_normal(z, *seen.chunk(2, -1))
    torch.testing.assert_close(log_joint(model.model, values, PIXELS, LABELS) - log_q, expected)
    as_numbers = log_joint(model.model, values, PIXELS, numbers)
    torch.testing.assert_close(as_numbers, log_joint(model.model, values, PIXELS, LABELS))
    torch.testing.assert_close(model.expected(LABELS).mean, mean)


def summed_out(model: Any, values: dict[str, Tensor], sites: tuple[str, ...], *data: Tensor) -> Tensor:
    """log p(data, values) with finite sites summed out by the engine, a scalar."""
    with reproducible(torch.float64):
        return log_normalizer(Program(model, data), values, sites).detach()


def test_the_marginal_of_a_vade_is_the_sum_over_its_clusters() -> None:
    model = built(lambda: VaDE(SHAPE, 3, 2, hidden=(5,)), GAPS)
    with torch.no_grad():
        model.logits.copy_(normal(3, seed=2))
        model.log_scales.copy_(0.3 * normal(3, 2, seed=3))
    values, _ = drawn(model.guide, GAPS)
    z, shares = values["z"], model.logits.softmax(0)
    within = torch.stack([log_normal(z, model.means[c], model.log_scales[c]) for c in range(3)], -1)
    expected = by_hand(GAPS, model.decoder.network.layers(z)) + (within + shares.log()).logsumexp(-1)
    torch.testing.assert_close(summed_out(model, values, ("cluster",), GAPS), expected.sum())
    each = torch.stack([log_joint(model.model, values | {"cluster": torch.full((ROWS,), c)}, GAPS) for c in range(3)])
    torch.testing.assert_close(each.logsumexp(0), expected)
    with isolated(5):
        draws = model.encode(GAPS).sample((7,))
    one = torch.stack([log_normal(draws, model.means[c], model.log_scales[c]) for c in range(3)], -1) + shares.log()
    with isolated(5):
        found = model.responsibilities(GAPS, draws=7)
    torch.testing.assert_close(found, one.softmax(-1).mean(0).detach())


def test_an_unknown_label_is_summed_out_and_a_known_one_is_not() -> None:
    y = torch.tensor([0, -1, 1, -1])
    model = built(lambda: SemiSupervisedVAE(SHAPE, 3, 2, hidden=(5,)), PIXELS, y)
    values, log_q = drawn(model.guide, PIXELS, y)
    z, classified = values["z"], model.classifier.network.layers(PIXELS.flatten(1)).log_softmax(-1)
    each = []
    for k in range(3):
        numbers = torch.eye(3, dtype=torch.float64)[torch.full((ROWS,), k)]
        each.append(by_hand(PIXELS, model.decoder.network.layers(torch.cat([z, numbers], -1))) - math.log(3.0))
    joint = torch.stack(each, -1) + log_normal(z, torch.zeros_like(z), torch.zeros_like(z)).unsqueeze(-1)
    alpha = 0.1 * 4 / 2
    expected = sum(
        joint[n, y[n]] + alpha * classified[n, y[n]] if y[n] >= 0 else joint[n].logsumexp(-1) for n in range(ROWS)
    )
    torch.testing.assert_close(summed_out(model, values, ("y_unobserved",), PIXELS, y), expected.detach())
    weights = torch.where((y >= 0)[:, None], torch.eye(3, dtype=torch.float64)[y], classified.exp())
    seen = model.encoder.network.layers(torch.cat([PIXELS.flatten(1), weights], -1))
    torch.testing.assert_close(log_q, log_normal(z, *seen.chunk(2, -1)))


def test_all_labels_and_none_are_two_ends_of_some_labels() -> None:
    model = built(lambda: SemiSupervisedVAE(SHAPE, 3, 2, hidden=(5,), alpha=0.0), PIXELS, LABELS)
    z = normal(ROWS, 2, seed=4)
    known = [log_joint(model.model, {"z": z}, PIXELS, torch.full((ROWS,), k)) for k in range(3)]
    unknown = summed_out(model, {"z": z}, ("y",), PIXELS)
    torch.testing.assert_close(unknown, torch.stack(known).logsumexp(0).sum().detach())


@pytest.mark.parametrize("layers", [1, 2])
def test_the_networks_are_those_of_the_paper(layers: int) -> None:
    def dense(*widths: int) -> int:
        return sum(a * b + b for a, b in itertools.pairwise(widths))

    count = sum(p.numel() for p in IWAE(layers=layers).parameters())
    if layers == 1:
        assert count == dense(784, 200, 200, 100) + dense(50, 200, 200, 784)
    else:
        bottom = dense(784, 200, 200, 200) + dense(100, 200, 200, 784)
        assert count == bottom + dense(100, 100, 100, 100) + dense(50, 100, 100, 200)


def test_the_output_starts_at_the_pixel_means() -> None:
    means = torch.tensor([[0.0, 0.25, 0.5], [0.75, 1.0, 0.1]])
    model = IWAE(SHAPE, pixel_means=means)
    torch.testing.assert_close(model.decoder.mean(torch.zeros(1, 50))[0], means.clamp(1e-3, 1 - 1e-3), atol=0.02, rtol=0.0)


def test_beta_is_no_part_of_the_program() -> None:
    for make in (
        lambda b: VAE(SHAPE, 2, hidden=(5,), beta=b),
        lambda b: CVAE(SHAPE, 3, 2, hidden=(5,), beta=b),
        lambda b: VaDE(SHAPE, 3, 2, hidden=(5,), beta=b),
        lambda b: SemiSupervisedVAE(SHAPE, 3, 2, hidden=(5,), beta=b),
    ):
        data = (PIXELS, LABELS) if isinstance(make(1.0), (CVAE, SemiSupervisedVAE)) else (PIXELS,)
        one, four = (built(lambda b=b, make=make: make(b), *data) for b in (1.0, 4.0))
        assert (one.beta, four.beta) == (1.0, 4.0)
        values = {"z": normal(ROWS, 2, seed=5), "cluster": LABELS}
        assert torch.equal(log_joint(one.model, values, *data), log_joint(four.model, values, *data))


# ------------------------------------------------------------------------------ linear networks
LOADINGS = torch.tensor([[2.0, 0.0], [1.5, 1.0], [-1.0, 1.0], [0.5, -1.0], [0.0, 0.7]]).double()
TABLE = normal(120, 2, seed=6) @ LOADINGS.mT + 0.5 * normal(120, 5, seed=7) + 0.3


class Principal:
    """The maximum of probabilistic PCA with two factors, in closed form (Tipping and Bishop 1999)."""

    mean = TABLE.mean(0)
    spectrum, axes = (part.flip(-1) for part in torch.linalg.eigh((TABLE - mean).mT @ (TABLE - mean) / len(TABLE)))
    noise = spectrum[2:].mean()
    covariance = axes[:, :2] @ torch.diag(spectrum[:2] - noise) @ axes[:, :2].mT + noise * torch.eye(5)
    log_likelihood = dist.MultivariateNormal(mean, covariance).log_prob(TABLE).sum()


def linear() -> VAE:
    return VAE((5,), 2, likelihood=Gaussian(), hidden=())


def assert_is_principal(model: VAE, log_likelihood: float = 1e-3, noise: float = 1e-3, angle: float = 1e-3) -> None:
    """Span of the loadings, noise variance and log p(x) are those of probabilistic PCA."""
    layer: Any = model.decoder.network.layers[-1]  # type: ignore[union-attr,index]
    given: Any = model.decode(torch.zeros(2))
    loadings, variance = layer.weight.detach(), given.given.scale[0] ** 2
    covariance = loadings @ loadings.mT + variance * torch.eye(5)
    found = dist.MultivariateNormal(layer.bias.detach(), covariance).log_prob(TABLE).sum()
    torch.testing.assert_close(found, Principal.log_likelihood, rtol=0.0, atol=log_likelihood)
    assert float(variance) == pytest.approx(float(Principal.noise), rel=noise)
    basis = torch.linalg.qr(loadings).Q
    overlap = torch.linalg.svdvals(Principal.axes[:, :2].mT @ basis)
    assert float(overlap.clamp(max=1.0).acos().max()) < angle


def exact_bound(model: VAE) -> Tensor:
    """The bound without noise: what is averaged is quadratic in z, so that four points with the moments of q(z | x) do."""
    guess: Any = model._guess(TABLE)
    mean, scale = guess.base_dist.loc, guess.base_dist.scale
    signed = torch.cat([torch.eye(2), -torch.eye(2)]).double() * 2.0**0.5
    points = [mean + scale * direction for direction in signed]
    terms = [log_joint(model.model, {"z": z}, TABLE) - guess.log_prob(z) for z in points]
    return torch.stack(terms).mean(0).sum()


def test_the_maximum_of_the_bound_of_a_linear_vae_is_probabilistic_pca() -> None:
    """Lucas et al., Don't blame the ELBO! (2019): the bound has no other maximum, and is log p(x) there."""
    model = built(linear, TABLE, gain=1.0)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=2000, history_size=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -exact_bound(model)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert_is_principal(model)
    torch.testing.assert_close(exact_bound(model).detach(), Principal.log_likelihood, rtol=0.0, atol=1e-3)
    values, log_q = drawn(model.guide, TABLE)  # at any noise: the guess is the posterior
    bound = (log_joint(model.model, values, TABLE) - log_q).sum().detach()
    torch.testing.assert_close(bound, Principal.log_likelihood, rtol=0.0, atol=0.02)


def test_svi_of_a_linear_vae_finds_probabilistic_pca() -> None:
    """Span, noise variance and log p(x) of all rows together, within a thousandth each.

    At the maximum the guess is the posterior, where the path gradient of the guess has no noise; that of the loadings and of
    the noise variance keeps the noise of z, which many particles, a falling rate and the average of late steps take out. Of
    seeds 0, 1 and 2 the noise variance is off by at most 4.6e-4 and log p(x) by at most 9.4e-4.
    """
    model = built(linear, TABLE, gain=1.0)
    bound, average = ELBO(particles=400), PowerAverage(0.1)
    SVI(steps=500, learning_rate=0.1, bound=bound, average=average, draws=1, seed=0, progress=False).fit(model, TABLE)
    assert_is_principal(model)


@pytest.mark.slow
def test_em_of_a_linear_vae_finds_probabilistic_pca() -> None:
    model = built(linear, TABLE, gain=1.0)
    posterior = EM(steps=200, tolerance=1e-9, seed=0, progress=False).fit(model, TABLE)
    assert posterior.plan is not None and posterior.plan["z"].update == "Gaussian"
    assert_is_principal(model)


def test_an_encoder_is_fitted_again_to_rows_with_gaps_by_itself() -> None:
    """Mattei and Frellsen, Refit your encoder when new data comes by (2018): the decoder stays, bit for bit.

    Proposals of an encoder that has seen complete rows only are refused at least twice as often before.
    """
    model = built(lambda: VAE((5,), 1, likelihood=Gaussian(), hidden=(), observed=True), TABLE, gain=1.0)
    SVI(steps=400, learning_rate=0.05, draws=1, seed=0, progress=False).fit(model, TABLE)
    gaps = TABLE[:40].where(normal(40, 5, seed=11) < 0.0, torch.nan)
    gaps[:, 0] = TABLE[:40, 0]
    before = {name: value.clone() for name, value in model.decoder.state_dict().items()}

    def taken() -> float:
        gibbs = Gibbs(blocks={"z": GuideDraw(completes=False)}, chains=2, warmup=10, draws=40, seed=0, progress=False)
        plan = gibbs.fit(model, gaps).plan
        assert plan is not None
        return plan["z"].acceptance

    rates = [taken()]
    model.decoder.requires_grad_(False)
    SVI(steps=400, learning_rate=0.05, draws=1, seed=0, progress=False).fit(model, gaps)
    rates.append(taken())
    assert all(torch.equal(value, before[name]) for name, value in model.decoder.state_dict().items())
    assert 1.0 - rates[1] < 0.5 * (1.0 - rates[0]), rates


def test_a_linear_autoencoder_finds_the_principal_components() -> None:
    model = built(lambda: Autoencoder((5,), 2, likelihood=Gaussian(), hidden=()), TABLE, gain=1.0)
    SVI(steps=3000, learning_rate=0.02, draws=1, seed=0, progress=False).fit(model, TABLE)
    pca = sklearn.decomposition.PCA(2).fit(TABLE.numpy())
    expected = torch.tensor(pca.inverse_transform(pca.transform(TABLE.numpy())))
    torch.testing.assert_close(model.reconstruct(TABLE), expected, rtol=0.0, atol=2e-3)


# ------------------------------------------------------------------------------ back-ends agree with quadrature
GRID = torch.linspace(-12.0, 12.0, 321, dtype=torch.float64)


def weighted(values: Tensor, mass: Tensor) -> Moments:
    """Mean and standard deviation of values (…, point) with masses (row, point), of each row: (row, …)."""
    mean = torch.einsum("...p,rp->r...", values, mass)
    square = torch.einsum("...p,rp->r...", values.square(), mass)
    return Moments(mean.numpy(), (square - mean.square()).sqrt().numpy())


def quadrature(model: Any, sites: Mapping[str, int], finite: str | None, choices: int, *data: Tensor) -> dict[str, Moments]:
    """Posterior moments of each row on a grid over continuous sites, one or two numbers, and all values of a finite one."""
    widths = list(sites.values())
    points = torch.cartesian_prod(*[GRID] * sum(widths)).reshape(-1, sum(widths))
    values = dict(zip(sites, points.split(widths, -1), strict=True))
    tables = []
    for n in range(len(data[0])):
        rows = tuple(part[n].expand(len(points), *part.shape[1:]) for part in data)
        for k in range(choices):
            given = values | ({} if finite is None else {finite: torch.full((len(points),), k)})
            with torch.no_grad(), pyro.validation_enabled(False):
                tables.append(log_joint(model.model, given, *rows))
    mass = torch.stack(tables).reshape(len(data[0]), choices, -1)
    mass = (mass - mass.flatten(1).logsumexp(1)[:, None, None]).exp()
    found = {name: weighted(value.mT, mass.sum(1)) for name, value in values.items()}
    if finite is not None:
        share = mass.sum(2)
        labels = torch.arange(choices, dtype=torch.float64)
        mean, square = share @ labels, share @ labels.square()
        found[finite] = Moments(mean.numpy(), (square - mean.square()).sqrt().numpy())
    return found


CASES: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...], dict[str, int], str | None]] = {
    "VAE": (lambda: VAE(SHAPE, 2, hidden=(5,)), (GAPS,), {"z": 2}, None),
    "CVAE": (lambda: CVAE(SHAPE, 3, 1, hidden=(5,), conditional_prior=True), (PIXELS, LABELS), {"z": 1}, None),
    "VaDE": (lambda: VaDE(SHAPE, 3, 1, hidden=(5,)), (GAPS,), {"z": 1}, "cluster"),
    "VaDE, full": (lambda: VaDE(SHAPE, 3, 1, hidden=(5,), covariance="full"), (GAPS,), {"z": 1}, "cluster"),
    "IWAE, two layers": (lambda: IWAE(SHAPE, 2, (1, 1), hidden=4), (PIXELS,), {"z": 1, "top": 1}, None),
    "SemiSupervisedVAE": (lambda: SemiSupervisedVAE(SHAPE, 3, 1, hidden=(5,)), (PIXELS,), {"z": 1}, "y"),
}
BACKENDS: dict[str, Any] = {
    "Gibbs": Gibbs(chains=64, warmup=100, draws=100, thin=2, seed=1, progress=False),
    "MetropolisHastings": MetropolisHastings(chains=64, warmup=500, draws=100, thin=20, seed=2, progress=False),
    "HMC": HMC(chains=64, warmup=150, draws=100, seed=3, progress=False),
}


IN_TURN = [(case, [*BACKENDS][i % len(BACKENDS)]) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("case", "backend"), quick(itertools.product(CASES, BACKENDS), IN_TURN))
def test_samplers_find_the_posterior_of_what_is_hidden(case: str, backend: str) -> None:
    """Four standard errors, 8 to 16 comparisons each, 200 in all: a false alarm in one of 80 runs under fresh seeds."""
    make, data, sites, finite = CASES[case]
    model = built(make, *data, gain=5.0 if "layers" in case else 20.0)  # so that a grid is fine enough
    exact = quadrature(model, sites, finite, 1 if finite is None else 3, *data)
    posterior = BACKENDS[backend].fit(model, *data)
    assert_agree({name: posterior.draws[name].double().numpy() for name in exact}, exact)


def test_importance_sampling_finds_the_probability_of_a_label() -> None:
    model = built(lambda: SemiSupervisedVAE(SHAPE, 3, 1, hidden=(5,)), PIXELS, gain=10.0)
    exact = []
    for k in range(3):
        joint = []
        for n in range(ROWS):
            rows = PIXELS[n].expand(len(GRID), *SHAPE)
            given = {"z": GRID[:, None], "y": torch.full((len(GRID),), k)}
            joint.append(log_joint(model.model, given, rows).logsumexp(0))
        exact.append(torch.stack(joint))
    with isolated(0):
        found = model.predict_proba(PIXELS, draws=4000)
    torch.testing.assert_close(found, torch.stack(exact, -1).softmax(-1).detach(), rtol=0.0, atol=0.03)


# ------------------------------------------------------------------------------ training
@pytest.mark.parametrize("case", [*CASES, "Autoencoder"])
def test_svi_raises_the_bound_of_every_model(case: str) -> None:
    make, data = CASES[case][:2] if case != "Autoencoder" else (lambda: Autoencoder(SHAPE, 2, hidden=(5,)), (GAPS,))
    many = tuple(part.repeat(30, *[1] * (part.dim() - 1)) for part in data)
    with isolated(0):
        model = make().double()
    posterior = SVI(steps=300, learning_rate=0.02, batch_size=40, draws=1, seed=0, progress=False).fit(model, *many)
    loss = posterior.history["loss"]
    assert float(loss[-50:].mean()) < float(loss[:50].mean()) - 30.0  # 120 rows; four of them are all that there is to learn


def test_few_labels_are_carried_to_the_other_rows() -> None:
    """Three patterns with a tenth of their pixels turned over, four labels each."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    patterns = (torch.rand(3, 4, 4, generator=generator) < 0.5).float()
    x = (patterns[truth] - (torch.rand(300, 4, 4, generator=generator) < 0.1).float()).abs()
    y = torch.where(torch.arange(300) < 12, truth, -1)
    with isolated(0):
        model = SemiSupervisedVAE((4, 4), 3, 1, labelled_weight=10.0, hidden=(16,))
    SVI(steps=500, learning_rate=0.01, batch_size=100, draws=1, seed=0, progress=False).fit(model, x, y)
    with isolated(0):
        found = model.predict(x, draws=20)
    assert float((found == truth).float().mean()) > 0.95


# ------------------------------------------------------------------------------ VaDE
def test_pretraining_by_the_autoencoder_trains_the_networks_of_the_vade() -> None:
    model = VaDE(SHAPE, 3, 2, hidden=(5,))
    autoencoder = model.autoencoder()
    own = {p.data_ptr() for p in (*model.encoder.parameters(), *model.decoder.parameters())}
    assert {p.data_ptr() for p in autoencoder.parameters()} == own
    assert torch.equal(autoencoder.codes(PIXELS), model.encode(PIXELS).mean)
    assert torch.equal(autoencoder.reconstruct(PIXELS), model.reconstruct(PIXELS))


@pytest.mark.parametrize(("covariance", "theirs"), [("diagonal", "diag"), ("full", "full")])
def test_the_mixture_starts_at_the_maximum_that_scikit_learn_finds(covariance: Any, theirs: str) -> None:
    centres = torch.tensor([[0.0, 0.0], [4.0, 1.0], [0.0, 5.0]]).double()
    codes = centres[torch.arange(300) % 3] + normal(300, 2, seed=8) @ torch.tensor([[0.5, 0.4], [0.0, 1.0]]).double()
    model = VaDE(SHAPE, 3, 2, hidden=(5,), covariance=covariance).double()
    with isolated(0):
        model.start_from(codes)
    peer = sklearn.mixture.GaussianMixture(3, covariance_type=theirs, n_init=5, random_state=0).fit(codes.numpy())
    log_joint = torch.stack([model._cluster(torch.tensor(k)).log_prob(codes) for k in range(3)], -1) + model.logits
    # the floor of a hundredth of the variance costs a few thousandths of a nat a row
    assert float(log_joint.logsumexp(-1).mean().detach()) == pytest.approx(peer.score(codes.numpy()), abs=0.01)


def test_a_vade_finds_clusters_that_pretraining_has_parted() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.arange(300) % 3
    patterns = (torch.rand(3, 4, 4, generator=generator) < 0.5).float()
    x = (patterns[truth] - (torch.rand(300, 4, 4, generator=generator) < 0.1).float()).abs()
    with isolated(0):
        model = VaDE((4, 4), 3, 2, hidden=(16,))
        autoencoder = model.autoencoder()
        SVI(steps=400, learning_rate=0.01, batch_size=100, draws=1, seed=0, progress=False).fit(autoencoder, x)
        model.start_from(autoencoder.codes(x))
        SVI(steps=300, learning_rate=0.005, batch_size=100, draws=1, seed=0, progress=False).fit(model, x)
        found = model.predict(x)
    table = torch.stack([torch.bincount(truth[found == k], minlength=3) for k in range(3)])
    assert int(table.amax(1).sum()) > 285
    assert model.cluster_means().shape == (3, 4, 4)


# ------------------------------------------------------------------------------ missing entries
def test_a_missing_entry_has_no_say() -> None:
    model = built(lambda: VAE(SHAPE, 2, hidden=(5,)), GAPS)
    z = normal(ROWS, 2, seed=5)
    whole = dist.Bernoulli(logits=model.decoder.numbers(z)[:, 0]).log_prob(GAPS.nan_to_num(nan=0.0))
    expected = torch.where(GAPS.isnan(), 0.0, whole).sum((1, 2)) - 0.5 * z.square().sum(1) - math.log(2 * math.pi)
    found = log_joint(model.model, {"z": z}, GAPS)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.sum(), list(model.decoder.parameters()))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_a_completion_keeps_what_is_known_and_draws_the_rest() -> None:
    model = built(lambda: VAE(SHAPE, 2, hidden=(5,)), GAPS)
    with isolated(0):
        found = model.complete(GAPS, draws=4000)
    known = ~GAPS.isnan()
    assert found.shape == (4000, ROWS, *SHAPE)
    assert torch.equal(found[:, known], GAPS[known].expand(4000, -1))
    with isolated(1):
        expected = model.decode(model.encode(GAPS).sample((4000,))).mean.mean(0)
    # two estimates of a probability from 4000 draws each, 5 standard errors
    assert float((found.mean(0) - expected)[~known].abs().max()) < 5 * (2 * 0.25 / 4000) ** 0.5


def test_an_encoder_can_be_told_what_is_missing() -> None:
    zeros = GAPS.nan_to_num(nan=0.0)
    for observed in (False, True):
        model = built(lambda observed=observed: VAE(SHAPE, 2, hidden=(5,), observed=observed), GAPS)
        is_same = torch.allclose(model.encode(GAPS).mean, model.encode(zeros).mean)
        assert is_same is not observed
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), 4, dtype=x.dtype)

    VAE(SHAPE, 2, encoder=Spy(), observed=True).encode(GAPS)
    assert torch.equal(seen[-1], torch.stack([zeros, (~GAPS.isnan()).double()], 1).to(seen[-1]))


# ------------------------------------------------------------------------------ networks
@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (3, 7, 10), (5, 4)])
def test_convolutions_read_and_write_images_of_any_size(shape: tuple[int, ...]) -> None:
    with isolated(0):
        model = VAE(shape, 3, encoder=ConvEncoder(shape, 6, (4, 8), (5,)), decoder=ConvDecoder(3, shape, 1, (8, 4), (5,)))
    x = torch.zeros(2, *shape)
    assert model.reconstruct(x).shape == x.shape and model.sample(4).shape == (4, *shape)
    loss = log_joint(model.model, {"z": normal(2, 3, seed=0).float()}, x).sum()
    gradients = torch.autograd.grad(loss, list(model.decoder.parameters()))
    assert all(float(gradient.abs().sum()) > 0 for gradient in gradients)


def test_signals_keep_their_scale_on_the_way_through() -> None:
    with isolated(0):
        layers = MLP(200, 10, (400, 400, 400)).layers
        signal = layers[:-1](torch.randn(500, 200))
        images = ConvEncoder((32, 32), 1, (64, 64, 64)).layers(torch.randn(50, 1, 32, 32))
    for found in (signal.detach(), images.detach()):
        assert 0.4 < float(found.square().mean()) < 2.0  # He et al.: 1 in expectation, but for pixels beyond the border


def test_leading_dimensions_are_those_of_the_batch() -> None:
    model = built(lambda: CVAE(SHAPE, 3, 2, hidden=(5,)), PIXELS, LABELS)
    z, numbers = normal(7, 1, 2, seed=1), torch.eye(3, dtype=torch.float64)
    found = model.decoder(z, numbers)
    assert found.batch_shape == (7, 3) and found.event_shape == SHAPE
    torch.testing.assert_close(model.decoder.numbers(z, numbers)[4, 2], model.decoder.numbers(z[4], numbers[2:])[0])
    wide = model.encoder(PIXELS, numbers[:, None])
    torch.testing.assert_close(wide[2], model.encoder(PIXELS, numbers[2:].expand(ROWS, -1)))


def test_a_network_of_the_user_is_looked_at_without_a_trace() -> None:
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    decoder, generator = nn.Linear(2, 6), torch.get_rng_state()
    VAE(SHAPE, 2, encoder=encoder, decoder=decoder)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(module.training for module in encoder.modules())
    assert torch.equal(torch.get_rng_state(), generator)


# ------------------------------------------------------------------------------ bad input
def fit(model: Any, *data: Any) -> Any:
    return SVI(steps=1, draws=1, progress=False).fit(model, *data)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "flat images": (
        lambda: fit(VAE(SHAPE), PIXELS.flatten(1)),
        r"x has shape \(4, 6\), but this VAE was built for \(rows, 2, 3\). Pass x.reshape\(-1, 2, 3\)",
    ),
    "other images": (lambda: fit(VAE(SHAPE), torch.zeros(4, 3, 3)), r"x has shape \(4, 3, 3\), but this VAE was built"),
    "one image": (lambda: fit(VAE(SHAPE), PIXELS[0]), r"Pass x\[None\] for a single row"),
    "bytes": (
        lambda: fit(VAE(SHAPE), (255 * PIXELS).byte()),
        r"x holds uint8, but must be floating: pass x.float\(\) / 255",
    ),
    "pixels to 255": (
        lambda: fit(VAE(SHAPE), 255 * PIXELS),
        r"x has the value 255, but entries of Bernoulli are in \[0, 1\]",
    ),
    "an empty row": (
        lambda: fit(VAE(SHAPE), torch.where(torch.arange(ROWS)[:, None, None] == 2, torch.nan, PIXELS)),
        "Row 2 of x has no entry that is known",
    ),
    "no features": (lambda: VAE(SHAPE, 0), "needs at least 1 feature, but features is 0"),
    "no code": (lambda: Autoencoder(SHAPE, 0), "at least 1 number, but features is 0"),
    "no shape": (lambda: VAE(()), r"shape is \(\), but must be that of one x"),
    "beta below 0": (lambda: VAE(SHAPE, beta=-1.0), "beta is -1.0, but must be finite and at least 0"),
    "prior of other features": (
        lambda: VAE(SHAPE, 3, prior=StandardNormal(2)),
        "features is 3, but the prior, StandardNormal, has 2. Leave features out",
    ),
    "narrow encoder": (
        lambda: VAE(SHAPE, 2, encoder=MLP(6, 2)),
        r"The encoder gives 2 numbers for x of shape \(2, 3\), but must give 4: StandardNormal with 2 features takes 4",
    ),
    "wide decoder": (
        lambda: VAE(SHAPE, 2, decoder=ConvDecoder(2, SHAPE, 2, (4,))),
        r"The decoder gives 12 numbers, \(2, 2, 3\), for z of 2 features, but must give 6: Bernoulli takes 1",
    ),
    "encoder of other images": (
        lambda: VAE(SHAPE, 2, encoder=MLP(7, 4)),
        r"The encoder does not take \(batch, 2, 3\): mat1 and mat2",
    ),
    "encoder without a context": (lambda: CVAE(SHAPE, 3, 2, encoder=nn.Linear(6, 4)), "The encoder does not take"),
    "nothing to draw from": (lambda: Autoencoder(SHAPE).model(), "has no prior to draw codes from: give x, or take a VAE"),
    "neither data nor size": (lambda: VAE(SHAPE).model(), "VAE.model needs data x, or the number of rows to draw, size"),
    "z of other features": (lambda: VAE(SHAPE, 2).decode(torch.zeros(3)), r"z has shape \(3,\), but must be \(…, 2\)"),
    "no context": (lambda: fit(CVAE(SHAPE, 3), PIXELS), "needs a context of 3 numbers, or a label, for each row"),
    "context of other rows": (lambda: fit(CVAE(SHAPE, 3), PIXELS, LABELS[:2]), "context has 2 rows, but x has 4"),
    "labels that float": (
        lambda: fit(CVAE(SHAPE, 3), PIXELS, LABELS.double()),
        r"context has shape \(4,\), but must be \(rows, 3\), numbers, or \(rows,\), labels. Pass context.long\(\)",
    ),
    "labels out of range": (
        lambda: fit(CVAE(SHAPE, 2), PIXELS, LABELS),
        "context has labels from 0 to 2, but must be 0 to 1",
    ),
    "context with gaps": (
        lambda: fit(CVAE(SHAPE, 3), PIXELS, torch.full((4, 3), torch.nan)),
        "context holds values that are NaN or infinite",
    ),
    "classes out of range": (
        lambda: fit(SemiSupervisedVAE(SHAPE, 2), PIXELS, LABELS),
        "y has labels from 0 to 2, but must be 0 to 1, or −1 where the label is not known",
    ),
    "classes that float": (lambda: fit(SemiSupervisedVAE(SHAPE, 3), PIXELS, LABELS.double()), "labels are integers"),
    "one class": (lambda: SemiSupervisedVAE(SHAPE, 1), "at least 2 classes, but classes is 1"),
    "guesses without a context": (
        lambda: CVAE(SHAPE, 3, prior=priors.VampPrior(2, 3, SHAPE)),
        "made of guesses at x alone, but a CVAE guesses from x and a context",
    ),
    "weight": (lambda: SemiSupervisedVAE(SHAPE, 2, labelled_weight=0.0), "labelled_weight is 0.0, but must be positive"),
    "shares": (lambda: SemiSupervisedVAE(SHAPE, 2, shares=torch.tensor([0.5, 0.6])), "2 positive numbers that sum to 1"),
    "no clusters": (lambda: VaDE(SHAPE, 0), "at least 1 cluster, but clusters is 0"),
    "other covariance": (
        lambda: VaDE(SHAPE, 2, covariance="tied"),
        "covariance is 'tied', but must be 'diagonal' or 'full'",
    ),  # type: ignore[arg-type]
    "few codes": (lambda: VaDE(SHAPE, 5, 2).start_from(torch.zeros(3, 2)), "codes has 3 rows, but there are 5 clusters"),
    "other codes": (lambda: VaDE(SHAPE, 2, 2).start_from(torch.zeros(3, 4)), r"must be \(rows, 2\), one code a row"),
    "three layers": (lambda: IWAE(layers=3), "layers is 3, but must be 1 or 2"),
    "features of one layer": (lambda: IWAE(layers=2, features=(50,)), "must have a number for each of the 2 layers"),
    "means of other pixels": (lambda: IWAE(SHAPE, pixel_means=torch.zeros(6)), r"pixel_means has shape \(6,\)"),
    "images too small": (lambda: ConvEncoder((3, 8), 4), "cannot be halved 2 times. Give at most 1 channels"),
    "no image": (lambda: ConvEncoder((6,), 4), r"must be \(height, width\) or \(channels, height, width\)"),
    "an empty layer": (lambda: MLP(3, 2, (0,)), "has a layer of 0; all need at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case: str) -> None:
    call, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        call()


def test_examples_of_the_documentation_hold() -> None:
    modules = ("mlp", "conv"), ("vae", "cvae", "vade", "iwae", "semi_supervised", "autoencoder")
    for package, names in zip(("nets", "autoencoders"), modules, strict=True):
        for name in names:
            found = doctest.testmod(importlib.import_module(f"pyro_genmodels.{package}.{name}"))
            assert found.attempted and not found.failed, name
