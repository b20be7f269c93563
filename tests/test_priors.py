"""Priors of autoencoders: densities by quadrature, divergences by draws or by hand, and every back-end on each.

False alarms. Seeds are fixed; with fresh ones: means and divergences at 4.5 standard errors (40 comparisons at 6.8e-6),
goodness of fit at a p-value of 1e-4 (20 tests), posteriors at 4 standard errors (60 comparisons at 6.3e-5): one run in 180.
"""

from __future__ import annotations

import copy
import doctest
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as flows
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.func import grad, vmap

from agreement import assert_agree
from exact import Moments, averaged
from inference import HMC, SVI, Gibbs, MetropolisHastings
from inference.handlers import Drawing, isolated
from parameters import quick
from pyro_genmodels.autoencoders import priors
from pyro_genmodels.autoencoders.priors import Cube, Flow, NormalMixture, Prior, Sphere, StandardNormal, VampPrior
from pyro_genmodels.distributions import Beta, Kumaraswamy

RUN: dict[str, Any] = {"seed": 1, "progress": False}


def flow(features: int) -> Flow:
    layers = [flows.affine_coupling(features, [8]), flows.permute(features), flows.affine_coupling(features, [8])]
    return Flow(StandardNormal(features), layers)


PRIORS: dict[str, Callable[[int], Prior]] = {
    "StandardNormal": StandardNormal,
    "NormalMixture": lambda d: NormalMixture(d, 3),
    "VampPrior": lambda d: VampPrior(d, 3, (4,)),
    "Sphere": Sphere,
    "Sphere, power": lambda d: Sphere(d, "power-spherical"),
    "Cube": lambda d: Cube(d, concentration1=2.0, concentration0=1.5),
    "Cube, beta": lambda d: Cube(d, "beta"),
    "Flow": flow,
}
EVERY = pytest.mark.parametrize("name", PRIORS)


class Coded(nn.Module):
    """z ~ prior, x ~ N(W z, ½²): an encoder, a decoder and a prior."""

    def __init__(self, prior: Prior) -> None:
        super().__init__()
        self.prior, self.encoder, self.decoder = prior, nn.Linear(4, prior.outputs), nn.Linear(prior.features, 4)

    def encode(self, x: Tensor) -> Any:
        return self.prior.posterior(self.encoder(x))

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        with pyro.plate("rows", size if x is None else len(x)):
            z = pyro.sample("z", self.prior(self.encode))
            return pyro.sample("x", dist.Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", self.encode(x))


def coded(name: str, features: int = 3, seed: int = 0) -> Coded:
    with isolated(seed):
        return Coded(PRIORS[name](features)).double()


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(priors, extraglobs={"torch": torch, "pyro": pyro}).failed == 0


# --------------------------------------------------------------------------------------------- laws of all priors
@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes_types_and_supports_fit(name: str, dtype: torch.dtype) -> None:
    model = coded(name).to(dtype)
    x = rows(6).to(dtype)
    for given, shape in ((model.prior(model.encode), ()), (model.encode(x), (6,)), (model.encode(x[0]), ())):
        assert given.batch_shape == shape and given.event_shape == (3,)
        with isolated(1):
            z = given.sample(torch.Size([5]))
        assert z.shape == (5, *shape, 3) and z.dtype == dtype
        assert model.prior(model.encode).support.check(z).all()
        log_prob = given.log_prob(z)
        assert log_prob.shape == (5, *shape) and log_prob.dtype == dtype and log_prob.isfinite().all()
    with isolated(1):
        assert model.model(size=7).shape == (7, 4)
        trace = pyro.poutine.trace(model.guide).get_trace(x)
        replayed = pyro.poutine.trace(pyro.poutine.replay(model.model, trace)).get_trace(x)
    assert replayed.log_prob_sum().isfinite()
    assert replayed.nodes["z"]["fn"].batch_shape == (6,)


@EVERY
def test_every_weight_has_a_gradient(name: str) -> None:
    """In an estimate of the bound, from one draw."""
    model, x = coded(name), rows(6)
    with isolated(2):
        guess = model.encode(x)
        z = guess.rsample()
    terms = model.prior(model.encode).log_prob(z) - guess.log_prob(z)
    bound = (terms + dist.Normal(model.decoder(z), 0.5).to_event(1).log_prob(x)).sum()
    bound.backward()
    for weight, value in model.named_parameters():
        assert value.grad is not None and value.grad.isfinite().all(), weight
        assert (value.grad != 0.0).any(), weight


@EVERY
def test_a_prior_is_copied_and_saved_after_it_was_used(name: str) -> None:
    model, x = coded(name), rows(6)
    guess = model.encode(x)
    z = guess.rsample()
    (model.prior(model.encode).log_prob(z) - guess.log_prob(z)).sum().backward()
    other, new = copy.deepcopy(model), coded(name, seed=5)
    new.load_state_dict(model.state_dict())
    with isolated(1):
        z = model.encode(x).sample()
    for same in (other, new):
        torch.testing.assert_close(same.prior(same.encode).log_prob(z), model.prior(model.encode).log_prob(z))
    with torch.no_grad():
        for value in other.parameters():
            value += 0.1
    again = model.prior(model.encode).log_prob(z)
    torch.testing.assert_close(again, new.prior(new.encode).log_prob(z))
    if list(model.prior.parameters()):
        assert not torch.allclose(other.prior(other.encode).log_prob(z), again)


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")  # of torch's Gamma
@EVERY
def test_a_prior_works_under_vmap(name: str) -> None:
    model = coded(name)
    z = torch.stack([model.encode(rows(6, seed=seed)).mean.detach() for seed in range(3)])
    z = torch.nn.functional.normalize(z, dim=-1) if name.startswith("Sphere") else z.clamp(0.05, 0.95)
    outputs = torch.stack([model.encoder(rows(6, seed=seed)).detach() for seed in range(3)])

    def from_prior(outputs: Tensor) -> Tensor:
        with pyro.plate("rows", 6):
            return pyro.sample("z", model.prior(model.encode)) + 0.0 * outputs.sum()

    def from_guess(outputs: Tensor) -> Tensor:
        with pyro.plate("rows", 6):
            return pyro.sample("z", model.prior.posterior(outputs))

    with pyro.validation_enabled(False), isolated(3), Drawing():
        drawn = [vmap(function, randomness="different")(outputs) for function in (from_prior, from_guess)]
        log_prob = vmap(lambda z: model.prior(model.encode).log_prob(z))(z)
        slopes = vmap(grad(lambda z: model.prior(model.encode).log_prob(z).sum()))(z)
        if name != "Cube, beta":  # the slopes of torch's Dirichlet are no function that vmap could see through
            paths = vmap(grad(lambda o: model.prior.posterior(o).rsample().sum()), randomness="different")(outputs)
            assert paths.isfinite().all()
    for found in drawn:
        assert found.shape == (3, 6, 3) and len(found.reshape(18, 3)[:, 0].unique()) == 18
    torch.testing.assert_close(log_prob, torch.stack([model.prior(model.encode).log_prob(part) for part in z]))
    assert slopes.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@EVERY
def test_an_encoder_far_out_leaves_finite_densities_and_gradients(name: str, dtype: torch.dtype) -> None:
    """Outputs of ±40 and ±1000, and all zero: draws in the support, log-densities and gradients finite."""
    model = coded(name).to(dtype)
    for size in (0.0, 40.0, 1000.0):
        signs = torch.randint(0, 2, (200, model.prior.outputs), generator=torch.Generator().manual_seed(4)) * 2 - 1
        outputs = (size * signs.to(dtype)).requires_grad_()
        with isolated(4):
            guess = model.prior.posterior(outputs)
            z = guess.rsample()
        prior = model.prior(model.encode)
        assert prior.support.check(z).all()
        value = guess.log_prob(z).sum()
        if name not in ("VampPrior", "NormalMixture", "Flow", "StandardNormal") or size < 100.0:
            value = value + prior.log_prob(z).sum()
        assert value.isfinite()
        assert torch.autograd.grad(value, outputs)[0].isfinite().all()


# --------------------------------------------------------------------------------------------- densities
@pytest.mark.parametrize(
    ("name", "features"),
    [(name, d) for name in PRIORS for d in (1, 2) if not name.startswith("Sphere") and (name, d) != ("Flow", 1)],
)
def test_densities_integrate_to_one(name: str, features: int) -> None:
    """Of the prior and of a guess. The layers of a flow have kinks, which cost the rule some digits."""
    model = coded(name, features)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    ends = np.linspace(-15.0, 15.0, 41)
    half = 0.5 * np.diff(ends)[:, None]
    at, weight = (torch.tensor(part.reshape(-1)) for part in (ends[:-1, None] + half * (1.0 + nodes), half * weights))
    if name.startswith("Cube"):  # densities may have no bound at 0 and 1
        at, weight = torch.sigmoid(2.0 * at), 2.0 * weight * torch.sigmoid(2.0 * at) * torch.sigmoid(-2.0 * at)
    points = torch.cartesian_prod(*[at] * features).reshape(-1, features)
    weight = torch.cartesian_prod(*[weight] * features).reshape(-1, features).prod(-1)
    for given in (model.prior(model.encode), model.encode(rows(1)[0])):
        total = float(weight @ given.log_prob(points).exp().detach())
        assert total == pytest.approx(1.0, abs=2e-5 if name == "Flow" else 1e-6)


@EVERY
def test_closed_divergences_are_expectations(name: str) -> None:
    """Where torch knows one: of the guess from the prior, beside draws of the guess."""
    model, x = coded(name), rows(2)
    guess, prior = model.encode(x), model.prior(model.encode)
    has_form = not isinstance(model.prior, (NormalMixture, VampPrior, Flow))
    if not has_form:
        with pytest.raises(NotImplementedError):
            kl_divergence(guess, prior)
        return
    with isolated(6):
        z = guess.sample(torch.Size([40_000]))
    terms = guess.log_prob(z) - prior.log_prob(z)
    exact = kl_divergence(guess, prior)
    assert exact.shape == (2,)
    assert ((terms.mean(0) - exact).abs() < 4.5 * terms.std(0) / 200.0).all()


def test_a_mixture_is_the_sum_of_its_components() -> None:
    model, x = coded("NormalMixture"), rows(4)
    z = model.encode(x).mean.detach()
    prior = model.prior
    assert isinstance(prior, NormalMixture)
    parts = dist.Normal(prior.loc, prior.log_scale.exp()).to_event(1).log_prob(z.unsqueeze(1)) + prior.logits.log_softmax(0)
    torch.testing.assert_close(prior().log_prob(z), parts.logsumexp(1))


def test_a_vampprior_is_the_mean_of_the_guesses_at_its_inputs() -> None:
    model, x = coded("VampPrior"), rows(40)
    prior = model.prior
    assert isinstance(prior, VampPrior)
    prior.start_from(x)
    assert (prior.inputs > 0.0).all() and (prior.inputs < 1.0).all()
    nearest = torch.cdist(prior.inputs.detach(), 0.5 + 0.95 * (x - 0.5)).min(1)
    assert float(nearest.values.max()) < 1e-6 and len(nearest.indices.unique()) == 3
    z = model.encode(x[:5]).mean.detach()
    parts = model.encode(prior.inputs).log_prob(z.unsqueeze(1)).logsumexp(1) - math.log(3.0)
    torch.testing.assert_close(prior(model.encode).log_prob(z), parts)
    wide = VampPrior(2, 2, (2, 2), interval=(-3.0, 5.0))
    wide.start_from(torch.full((3, 2, 2), torch.nan))
    torch.testing.assert_close(wide.inputs, torch.ones(2, 2, 2))


def test_a_flow_changes_variables() -> None:
    """log p(z) = log p(w) − log |dz/dw|, w = T⁻¹(z); a layer, its inverse and what another flow made are all trained."""
    with isolated(1):
        layers = [flows.affine_coupling(3, [8]), flows.affine_coupling(3, [8]).inv, flows.permute(3)]
        prior = Flow(Flow(StandardNormal(3), [flows.spline(3)]), layers).double()
        z = prior().sample()
    modules = [layers[0], layers[1].inv, prior.prior]
    assert len(list(prior.parameters())) == sum(len(list(part.parameters())) for part in modules) > 8
    w = z
    for transform in reversed(layers):
        w = transform.inv(w)

    def forward(w: Tensor) -> Tensor:
        for transform in layers:
            w = transform(w)
        return w

    torch.testing.assert_close(forward(w), z)
    jacobian = torch.autograd.functional.jacobian(forward, w.detach())
    exact = prior.prior().log_prob(w) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(prior().log_prob(z), exact)


# --------------------------------------------------------------------------------------------- on the unit cube
@pytest.mark.parametrize("a", [0.3, 1.0, 6.0])
@pytest.mark.parametrize("b", [0.2, 1.0, 9.0])
def test_kumaraswamy_s_distribution_is_its_formula(a: float, b: float) -> None:
    """Density, mean and entropy by quadrature over quantiles; draws by their distribution function."""
    given = Kumaraswamy(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))
    x = np.array([1e-6, 0.1, 0.5, 0.99])
    exact = np.log(a * b) + (a - 1.0) * np.log(x) + (b - 1.0) * np.log(1.0 - x**a)
    np.testing.assert_allclose(given.log_prob(torch.tensor(x)), exact, rtol=1e-9)

    def expected(what: Callable[[float, float], float]) -> float:
        """E what(x, x^a), where x^a = −expm1(−y), y ~ Exponential(b)."""

        def integrand(y: float) -> float:
            power = -math.expm1(-y)
            return b * math.exp(-b * y) * what(power ** (1.0 / a), y)

        return sum(integrate.quad(integrand, *ends, epsabs=1e-12, limit=200)[0] for ends in ((0.0, 1.0), (1.0, 30.0 / b)))

    assert float(given.mean) == pytest.approx(expected(lambda x, y: x), abs=1e-7)
    entropy = expected(lambda x, y: -(math.log(a * b) + (a - 1.0) * math.log(x) - (b - 1.0) * y) if x else 0.0)
    assert float(given.entropy()) == pytest.approx(entropy, abs=1e-5)
    with isolated(7):
        drawn = given.sample(torch.Size([4000]))
    below = drawn < 1.0 - 1e-9  # nearer to 1 float64 has few numbers
    assert (
        stats.kstest(drawn[below].numpy(), lambda x: (1 - (1 - x**a) ** b) / (1 - (1 - (1 - 1e-9) ** a) ** b)).pvalue > 1e-4
    )


@pytest.mark.parametrize("b", [0.05, 0.4, 1.0, 30.0])
@pytest.mark.parametrize("a", [0.05, 0.7, 1.0, 30.0])
def test_the_divergence_of_kumaraswamy_from_beta_is_good_to_a_millionth(a: float, b: float) -> None:
    """E log(1 − x) by adaptive quadrature; at a = 1 it is −1/b, at b = 1 the divergence has a closed form."""
    given = Kumaraswamy(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64))

    def integrand(y: float) -> float:
        log_power = math.log1p(-math.exp(-y)) if y > 0.7 else math.log(-math.expm1(-y))
        rest = -math.expm1(log_power / a) if y < 30.0 else math.exp(-y) / a
        return b * math.exp(-b * y) * (math.log(rest) if rest else -y - math.log(a))

    ends = (0.0, 1e-3, 0.1, 1.0, 5.0, 30.0, 100.0, 40.0 / b + 100.0)
    pieces = [integrate.quad(integrand, *end, epsabs=1e-13, limit=400)[0] for end in itertools.pairwise(ends)]
    log_rest = -1.0 / b if a == 1.0 else sum(pieces)
    at, beta = torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)
    flat = kl_divergence(given, dist.Beta(at, at))
    steep = kl_divergence(given, dist.Beta(at, beta))
    assert float(flat) == pytest.approx(-float(given.entropy()), rel=1e-9)
    exact = float(flat) - 1.5 * log_rest - math.log(2.5)
    assert float(steep) == pytest.approx(exact, rel=1e-6, abs=1e-9)


def test_beta_draws_keep_small_numbers_and_carry_slopes() -> None:
    """Where all of torch's are at the least number there is; d/da E x = ∂/∂a a/(a + b)."""
    for a, b in ((0.01, 0.02), (0.5, 2.0), (30.0, 4.0)):
        first = torch.full((20_000,), a, dtype=torch.float64, requires_grad=True)
        with isolated(8):
            x = Beta(first, torch.full_like(first, b)).rsample()
        slopes = torch.autograd.grad(x.sum(), first)[0]
        assert float((slopes.mean() - b / (a + b) ** 2).abs() / slopes.std() * math.sqrt(20_000)) < 4.5
        inside = x.detach()[(x > 1e-250) & (x < 1.0 - 1e-9)].numpy()
        cdf = stats.beta(a, b).cdf
        low, high = cdf(1e-250), cdf(1.0 - 1e-9)
        assert stats.kstest(inside, lambda x, f=cdf, low=low, high=high: (f(x) - low) / (high - low)).pvalue > 1e-4
        assert ((x > 0.0) & (x < 1.0)).all()


# --------------------------------------------------------------------------------------------- back-ends
def places(model: Coded, name: str) -> tuple[Tensor, float]:
    """Values of z, (places, d), and how much of a line, a plane or a circle each stands for."""
    middles = (torch.arange(4000).double() + 0.5) / 4000
    if name.startswith("Sphere"):
        return torch.stack([(2.0 * math.pi * middles).cos(), (2.0 * math.pi * middles).sin()], -1), 2.0 * math.pi / 4000
    if model.prior.features == 2:
        line = 14.0 * ((torch.arange(250).double() + 0.5) / 250 - 0.5)
        return torch.cartesian_prod(line, line), (14.0 / 250) ** 2
    size = 1.0 if name.startswith("Cube") else 16.0
    return (size * (middles - 0.5 * (size > 1.0))).unsqueeze(-1), size / 4000


def small(name: str) -> tuple[Coded, Tensor, Tensor, Tensor, float]:
    """A model of few numbers, two rows, places of z, log p(x, z) at them, (places, rows), and their size."""
    model, x = coded(name, 2 if name.startswith(("Sphere", "Flow")) else 1, seed=3), rows(2, seed=1)
    with torch.no_grad():
        z, step = places(model, name)
        log_joint = model.prior(model.encode).log_prob(z).unsqueeze(-1)
        log_joint = log_joint + dist.Normal(model.decoder(z).unsqueeze(1), 0.5).log_prob(x).sum(-1)
    return model, x, z, log_joint, step


@EVERY
def test_importance_weights_average_to_the_evidence(name: str) -> None:
    """p(x) = E_q p(x, z)/q(z | x), beside quadrature: both densities have their normaliser, in one and the same measure."""
    model, x, _, log_joint, step = small(name)
    with torch.no_grad(), isolated(9):
        guess = model.encode(x)
        drawn = guess.sample(torch.Size([20_000]))
        ratio = model.prior(model.encode).log_prob(drawn) - guess.log_prob(drawn)
        weights = (ratio + dist.Normal(model.decoder(drawn), 0.5).log_prob(x).sum(-1)).exp()
    exact = (log_joint.logsumexp(0) + math.log(step)).exp()
    assert ((weights.mean(0) - exact).abs() < 4.5 * weights.std(0) / math.sqrt(20_000)).all()


BACKENDS = {
    "Gibbs": Gibbs(chains=24, warmup=100, draws=150, thin=2, **RUN),
    "HMC": HMC(chains=24, warmup=150, draws=150, thin=2, **RUN),
    "MetropolisHastings": MetropolisHastings(chains=24, warmup=200, draws=150, thin=40, **RUN),
}


IN_TURN = [(name, [*BACKENDS][i % len(BACKENDS)]) for i, name in enumerate(PRIORS)]


@pytest.mark.parametrize(("name", "backend"), quick(itertools.product(PRIORS, BACKENDS), IN_TURN))
def test_every_back_end_draws_from_the_posterior(name: str, backend: str) -> None:
    model, x, z, log_joint, _ = small(name)
    posterior = BACKENDS[backend].fit(model, x)
    exact = [averaged(log_joint[:, row].numpy(), z.numpy()) for row in range(2)]
    moments = Moments(*(np.stack(part) for part in zip(*((m.mean, m.sd) for m in exact), strict=True)))
    assert_agree({"z": posterior.draws["z"]}, {"z": moments})


@EVERY
def test_weights_are_trained(name: str) -> None:
    """The bound rises, with the closed divergence or without; and a second run is the same."""
    losses = []
    for _ in range(2):
        model = coded(name)
        losses.append(SVI(steps=60, learning_rate=0.03, **RUN).fit(model, rows(40)).history["loss"])
    assert losses[0].isfinite().all() and losses[0][-10:].mean() < losses[0][:10].mean()
    assert torch.equal(losses[0], losses[1])


# --------------------------------------------------------------------------------------------- words
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: StandardNormal(2.5), "at least 1 feature, but features is 2.5"),
        (lambda: VampPrior(2, 3, 4), r"such as \(4,\)"),
        (lambda: Flow(StandardNormal(3), flows.permute(3)), "list of transforms, but was given Permute"),
        (lambda: StandardNormal(0), "at least 1 feature, but features is 0"),
        (lambda: NormalMixture(2, 0), "at least 1 component"),
        (lambda: VampPrior(2, 0, (3,)), "at least 1 component"),
        (lambda: VampPrior(2, 3, (3,), interval=(1.0, 1.0)), "interval is"),
        (lambda: VampPrior(2, 3, (3,))(), "prior\\(encode\\)"),
        (lambda: VampPrior(2, 3, (3,))(lambda x: dist.Normal(x, 1.0)), "batch shape"),
        (lambda: VampPrior(2, 3, (3,)).start_from(torch.zeros(2, 3)), "as many rows"),
        (lambda: VampPrior(2, 3, (3,)).start_from(torch.zeros(9, 4)), "each of shape"),
        (lambda: Sphere(1), "on a line it has two points"),
        (lambda: Sphere(3, "vmf"), '"von-mises-fisher" or "power-spherical"'),
        (lambda: Cube(3, "uniform"), '"kumaraswamy" or "beta"'),
        (lambda: Cube(3, concentration1=0.0), "must be positive"),
        (lambda: StandardNormal(3).posterior(torch.zeros(5, 3)), "takes 6 per row"),
        (lambda: Sphere(3).posterior(torch.zeros(5, 6)), "takes 4 per row"),
        (lambda: Flow(Sphere(3), [flows.planar(3)]), "Sphere is not on all of it"),
        (lambda: Flow(StandardNormal(3), []), "StandardNormal itself"),
        (lambda: Flow(StandardNormal(3), [flows.planar(3)]), "Transform 0 of this Flow, Planar, has no inverse"),
        (
            lambda: Flow(StandardNormal(3), [flows.permute(3), flows.affine_coupling(4)]),
            "Transform 1 .* vectors of 3 numbers",
        ),
        (lambda: Flow(StandardNormal(3), [flows.ExpTransform()]), "leads out of R\\^3"),
    ],
)
def test_wrong_settings_are_refused_in_words(wrong: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        wrong()


def test_a_new_encoder_guesses_the_prior_where_it_can() -> None:
    """All its numbers zero: the standard normal distribution, the uniform one on the cube; on the sphere a first axis."""
    zeros = torch.zeros(1, 6)
    assert float(kl_divergence(StandardNormal(3).posterior(zeros), StandardNormal(3)())) == 0.0
    for family in ("kumaraswamy", "beta"):
        guess, prior = Cube(3, family).posterior(zeros), Cube(3)()
        assert float(kl_divergence(guess, prior)) == pytest.approx(0.0, abs=1e-6)
    for family in ("von-mises-fisher", "power-spherical"):
        guess = Sphere(5, family).posterior(zeros)
        assert guess.rsample().isfinite().all() and guess.mode[0, 0] == 1.0
