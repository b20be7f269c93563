"""Distributions that are known through their draws: what they draw, what they refuse, and how their noise is inferred."""

from __future__ import annotations

import copy
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.stats import kstest
from torch import Tensor, nn

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings, Unsupported, arviz
from inference.handlers import isolated
from pyro_genmodels import GAN, InfoGAN
from pyro_genmodels.implicit import ConvCritic, Critic, Generator, ImplicitDistribution, NoiseReparam, PackedCritic
from pyro_genmodels.implicit.distribution import row_scores
from pyro_genmodels.metrics.divergences import energy_distance, null_band

X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BACKENDS = [SVI, EM, Gibbs, MetropolisHastings, HMC]


class Line(nn.Module):
    """x = A ε + b, and C context if there is one."""

    def __init__(self, a: Tensor, b: Tensor, c: Tensor | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Parameter(a), nn.Parameter(b), c

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        x = noise @ self.a.T + self.b
        return x if context is None or self.c is None else x + context @ self.c.T


def line(context: bool = False) -> Generator:
    a = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    c = torch.tensor([[3.0], [-1.0]], dtype=torch.float64) if context else None
    return Generator((2,), 2, context=int(context), network=Line(a, a.new_tensor([1.0, -1.0]), c)).double()


def test_draws_are_those_of_pushed_noise() -> None:
    torch.manual_seed(0)
    x = line()().sample((40_000,))
    a = torch.tensor([[1.0, 0.0], [0.5, 2.0]], dtype=torch.float64)
    # five standard errors of means and covariances: false alarm 1e-6 each
    assert (x.mean(0) - x.new_tensor([1.0, -1.0])).abs().max() < 5 * 2.1 / 200
    assert (x.T.cov() - a @ a.T).abs().max() < 5 * 4.25 * 2**0.5 / 200


def test_gradients_of_draws_go_through_the_network() -> None:
    generator = line()
    torch.manual_seed(0)
    noise = generator().noise.sample((7,))
    torch.manual_seed(0)
    generator().rsample((7,)).sum().backward()
    weights = generator.network
    assert torch.allclose(weights.b.grad, torch.full((2,), 7.0, dtype=torch.float64))
    assert torch.allclose(weights.a.grad, noise.sum(0).expand(2, 2))


def test_context_has_its_row() -> None:
    context = torch.tensor([[0.0], [100.0], [200.0]], dtype=torch.float64)
    x = line(True)(context).sample((5,))
    assert x.shape == (5, 3, 2)
    assert torch.equal((x[..., 0] / 300.0).round(), torch.tensor([0.0, 1.0, 2.0]).double().expand(5, 3))


@pytest.mark.parametrize("noise", ["normal", "uniform"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes_in_plates_and_out(shape: tuple[int, ...], noise: str) -> None:
    generator = Generator(shape, 4, noise=noise, hidden=(5,))
    assert generator().sample().shape == shape
    assert generator().expand((6, 5)).sample((2,)).shape == (2, 6, 5, *shape)

    def program() -> Tensor:
        with pyro.plate("outer", 3), pyro.plate("rows", 4):
            return pyro.sample("x", generator())

    assert program().shape == (4, 3, *shape)


def test_noise_of_whole_numbers() -> None:
    coins = dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)
    assert set(ImplicitDistribution(coins, lambda e: e.sum(-1)).sample((100,)).tolist()) == {0.0, 1.0, 2.0}


def test_a_push_of_another_shape_is_refused() -> None:
    noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"push gave a tensor of shape \(5, 2\).* must have shape \(5, 3\)"):
        ImplicitDistribution(noise, lambda e: e, (3,)).sample((5,))
    with pytest.raises(ValueError, match=r"gave a tensor of shape \(5, 3\) for 5 rows, but x has shape \(2,\)"):
        Generator((2,), 4, network=nn.Linear(4, 3))().sample((5,))


def test_log_prob_says_what_to_use() -> None:
    with pytest.raises(Unsupported, match=r"no log_prob.*Adversarial\(critic\).*NoiseReparam\(\).*observation model"):
        line()().log_prob(X[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_observed_site_without_density_is_refused_before_the_first_step(backend: Any) -> None:
    steps: list[int] = []
    run = backend(progress=False, callbacks=(lambda step, info: steps.append(step),))
    with pytest.raises(Unsupported, match=r"Site 'x' of GAN: ImplicitDistribution has draws.*Adversarial\(critic\)"):
        run.fit(GAN((2,), 2), X)
    assert steps == []


LINE = line()
SAMPLERS = pytest.mark.parametrize(
    "sampler",
    [
        HMC(chains=48, warmup=200, draws=100, seed=0, progress=False),
        MetropolisHastings(chains=48, warmup=300, draws=100, thin=15, seed=1, progress=False),
    ],
    ids=["HMC", "MetropolisHastings"],
)


def seen(y: Tensor) -> None:
    """A hidden draw of the generator, seen with noise."""
    x = pyro.sample("x", LINE())
    pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hidden_site_without_density_is_refused_before_the_first_step(backend: Any) -> None:
    with pytest.raises(Unsupported, match="no log_prob.*NoiseReparam"):
        backend(progress=False).fit(seen, X[0])


@SAMPLERS
def test_the_noise_of_a_hidden_draw_has_its_exact_posterior(sampler: Any) -> None:
    y = torch.tensor([2.0, 1.0], dtype=torch.float64)
    posterior = sampler.fit(poutine.reparam(seen, config={"x": NoiseReparam()}), y)
    network = LINE.network
    a, b = network.a.detach(), network.b.detach()
    prior, noise = a @ a.T, 0.25 * torch.eye(2, dtype=torch.float64)
    gain = prior @ torch.linalg.inv(prior + noise)
    mean, covariance = b + gain @ (y - b), prior - gain @ prior
    x = posterior.draws["x"].flatten(0, 1)
    assert set(posterior.draws) == {"x", "x_noise"}
    # of at least 1000 independent draws; five standard errors, false alarm 1e-6 each
    assert ((x.mean(0) - mean).abs() / (covariance.diagonal() / 1000).sqrt()).max() < 5
    assert (x.T.cov() - covariance).abs().max() < 5 * covariance.max() * (2 / 1000) ** 0.5


def completed(y: Tensor) -> None:
    """The upper half of images 4 x 4, seen with noise."""
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", IMAGES())
        pyro.sample("y", dist.Normal(x[..., :2, :], 0.3).to_event(2), obs=y)


with isolated(2):
    IMAGES = Generator((4, 4), 3, network=nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16))).double()


def test_completions_of_half_an_image_agree_and_are_calibrated() -> None:
    """Of images that the generator made: chains agree, ranks of what is hidden are uniform, the export is whole."""
    with isolated(1):
        truth = IMAGES().sample((40,)).detach()
        y = truth[:, :2] + 0.3 * torch.randn(40, 2, 4, dtype=torch.float64)
    sampler = HMC(chains=8, warmup=250, draws=800, seed=0, progress=False)
    posterior = sampler.fit(poutine.reparam(completed, config={"x": NoiseReparam()}), y)
    hidden = posterior.draws["x"][..., 2:, :].mean((-1, -2))
    assert arviz.rhat(hidden.numpy()).max() < 1.01
    ranks = (hidden.flatten(0, 1) < truth[:, 2:].mean((-1, -2))).double().mean(0)
    assert kstest(ranks.numpy(), "uniform").pvalue > 1e-3  # the false-alarm rate
    pixels = posterior.draws["x"][..., 2:, :].flatten(0, 1)
    low, high = (pixels.quantile(level, 0) for level in (0.05, 0.95))
    inside = ((low <= truth[:, 2:]) & (truth[:, 2:] <= high)).double().mean((-1, -2))
    # five standard errors over independent images; false alarm 1e-6
    assert float(inside.mean()) == pytest.approx(0.9, abs=5 * float(inside.std()) / 40**0.5)
    exported = posterior.to_arviz()
    assert exported.posterior["x"].shape == (8, 800, 40, 4, 4) and exported.posterior["x_noise"].shape == (8, 800, 40, 3)
    assert exported.observed_data["y"].shape == (40, 2, 4)


def test_the_noise_of_what_is_observed_is_refused() -> None:
    with pytest.raises(Unsupported, match="'x' is observed, and its noise cannot be told"):
        poutine.reparam(GAN((2,), 2).model, config={"x": NoiseReparam()})(X.float())
    with pytest.raises(Unsupported, match="'y' is Normal"):
        poutine.reparam(seen, config={"x": NoiseReparam(), "y": NoiseReparam()})(X[0])


MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)


def exact_critic(x: Tensor) -> Tensor:
    """log p(x) − log q(x) of data N(MEAN, COVARIANCE) and the draws of ``LINE``."""
    a, b = LINE.network.a.detach(), LINE.network.b.detach()
    ratio: Tensor = dist.MultivariateNormal(MEAN, COVARIANCE).log_prob(x) - dist.MultivariateNormal(b, a @ a.T).log_prob(x)
    return ratio


def generated() -> None:
    pyro.sample("x", LINE())


@SAMPLERS
def test_a_critic_of_the_exact_ratio_makes_a_wrong_generator_right(sampler: Any) -> None:
    """Discriminator-driven sampling: p_draws(x) exp(D(x)) = p_data(x) where D is the logit of the best critic."""
    posterior = sampler.fit(poutine.reparam(generated, config={"x": NoiseReparam(exact_critic)}))
    x = posterior.draws["x"].flatten(0, 1)
    # of at least 1000 independent draws; five standard errors, false alarm 1e-6 each
    assert ((x.mean(0) - MEAN).abs() / (COVARIANCE.diagonal() / 1000).sqrt()).max() < 5
    assert (x.T.cov() - COVARIANCE).abs().max() < 5 * COVARIANCE.max() * (2 / 1000) ** 0.5
    data = dist.MultivariateNormal(MEAN, COVARIANCE)
    with isolated(0):
        truth = data.sample((400,))
    last = posterior.draws["x"][:, ::12].flatten(0, 1)[:400]
    assert null_band(energy_distance, last, truth).p > 1e-2  # the false-alarm rate
    assert null_band(energy_distance, LINE().sample((400,)).detach(), truth).p < 1e-2  # what the generator is by itself


def test_the_critic_corrects_what_else_is_inferred() -> None:
    """With an observation model the posterior is that of the data's prior: N(x; MEAN, COVARIANCE) N(y; x, 0.5²)."""
    y = torch.tensor([2.0, 1.0], dtype=torch.float64)
    sampler = HMC(chains=48, warmup=200, draws=100, seed=0, progress=False)
    x = sampler.fit(poutine.reparam(seen, config={"x": NoiseReparam(exact_critic)}), y).draws["x"].flatten(0, 1)
    gain = COVARIANCE @ torch.linalg.inv(COVARIANCE + 0.25 * torch.eye(2, dtype=torch.float64))
    mean, covariance = MEAN + gain @ (y - MEAN), COVARIANCE - gain @ COVARIANCE
    # of at least 1000 independent draws; five standard errors, false alarm 1e-6 each
    assert ((x.mean(0) - mean).abs() / (covariance.diagonal() / 1000).sqrt()).max() < 5
    assert (x.T.cov() - covariance).abs().max() < 5 * covariance.max() * (2 / 1000) ** 0.5


def test_the_factor_of_the_critic_has_the_shape_of_the_plates() -> None:
    def program() -> None:
        with pyro.plate("outer", 3), pyro.plate("rows", 4):
            pyro.sample("x", LINE())
        with pyro.plate("wholes", 5):
            pyro.sample("y", LINE().expand((5, 2)).to_event(1))

    config = {"x": NoiseReparam(exact_critic), "y": NoiseReparam(lambda x: exact_critic(x)[:, None])}
    trace = poutine.trace(poutine.reparam(program, config=config)).get_trace()
    x, y = trace.nodes["x"]["value"], trace.nodes["y"]["value"]
    assert x.shape == (4, 3, 2) and y.shape == (5, 2, 2)
    assert torch.equal(trace.nodes["x_critic"]["fn"].log_factor, exact_critic(x))
    assert torch.allclose(trace.nodes["y_critic"]["fn"].log_factor, exact_critic(y).sum(1))


def test_a_critic_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must give one number a row, \(1,\) or \(1, 1\), but gave shape \(1, 2\)"):
        poutine.reparam(generated, config={"x": NoiseReparam(lambda x: x)})()


def test_spectral_normalisation_divides_by_the_largest_singular_value() -> None:
    torch.manual_seed(0)
    for critic, x in ((Critic((6,), hidden=(8, 4), spectral=True), X[:, :1].float().expand(12, 6)),
                      (ConvCritic((8, 8), (3, 4), spectral=True), torch.zeros(2, 8, 8))):  # fmt: skip
        for _ in range(300):  # each run of a critic in training mode is one power iteration
            critic(x)
        for layer in critic.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                assert float(torch.linalg.svdvals(layer.weight.detach().flatten(1))[0]) == pytest.approx(1.0, abs=1e-3)


def test_critics_see_what_is_beside_x() -> None:
    x, context = torch.randn(5, 8, 8), torch.randn(5, 3)
    for critic in (Critic((8, 8), context=3), ConvCritic((8, 8), context=3)):
        scores = critic(x, context)
        assert scores.shape == (5,)
        assert not torch.equal(scores, critic(x, context + 1.0))


def test_infogan_draws_its_codes_from_their_priors_and_recognises_every_row() -> None:
    torch.manual_seed(0)
    model = InfoGAN((3,), 2, categories=4, codes=2, hidden=(5,))
    trace = poutine.trace(model.model).get_trace(None, size=4000)
    category, code = trace.nodes["category"]["value"], trace.nodes["code"]["value"]
    counts = category.bincount(minlength=4)
    assert ((counts - 1000).abs() < 5 * 750**0.5).all()  # five standard errors, false alarm 1e-6 each
    assert code.shape == (4000, 2) and code.abs().max() <= 1.0 and (code.var(0) - 1 / 3).abs().max() < 5 * 0.3 / 4000**0.5
    x = trace.nodes["x"]["value"]
    guided = poutine.trace(model.guide).get_trace(x)
    assert guided.nodes["category"]["value"].shape == (4000,) and guided.nodes["code"]["value"].shape == (4000, 2)
    torch.testing.assert_close(model.categories_of(x).sum(-1), torch.ones(4000))


@pytest.mark.parametrize("least", [0.01, 1.0])
def test_a_code_is_worth_no_more_than_its_least_scale_allows(least: float) -> None:
    """log 2 − ½ log(2π s²), which a recogniser reaches that is right about every code and as sure as it may be."""
    model = InfoGAN((1,), 1, categories=0, codes=1, recogniser=nn.Linear(1, 2), least_scale=least)
    x = torch.linspace(-0.9, 0.9, 5)[:, None]
    with torch.no_grad():
        model.recogniser.weight.copy_(torch.tensor([[1.0], [0.0]]))
        model.recogniser.bias.copy_(torch.tensor([0.0, -40.0]))
    guided = poutine.trace(poutine.condition(model.guide, {"code": x})).get_trace(x).nodes["code"]
    worth = guided["fn"].log_prob(x) - math.log(0.5)
    expected = math.log(2.0) - 0.5 * math.log(2.0 * math.pi * least**2)
    torch.testing.assert_close(worth, torch.full((5,), expected), rtol=0.0, atol=1e-5)


MODELS = {
    "GAN": lambda: GAN((3,), 2, hidden=(4,)),
    "GAN, uniform noise": lambda: GAN((3,), 2, hidden=(4,), noise="uniform"),
    "InfoGAN": lambda: InfoGAN((3,), 2, 3, 1, hidden=(4,)),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def drawn(model: Any) -> dict[str, Tensor]:
    """All that a model draws with one seed."""
    torch.manual_seed(5)
    nodes = poutine.trace(model.model).get_trace(None, size=6).nodes
    return {name: node["value"] for name, node in nodes.items() if node["type"] == "sample" and name != "rows"}


@every_model
def test_a_state_dict_carries_over_to_a_new_model(make: Any) -> None:
    old, new = make(), make()
    new.load_state_dict(old.state_dict())
    assert all(torch.equal(value, drawn(new)[name]) for name, value in drawn(old).items())


@every_model
def test_in_float64_all_draws_are(make: Any) -> None:
    assert {v.dtype for v in drawn(make().double()).values() if v.is_floating_point()} == {torch.float64}


@every_model
def test_two_instances_share_nothing_and_a_copy_is_whole(make: Any) -> None:
    one, two = make(), make()
    for other in (two, copy.deepcopy(one)):
        addresses = [{v.data_ptr() for v in m.state_dict().values()} for m in (one, other)]
        assert not addresses[0] & addresses[1]
    assert all(torch.equal(value, drawn(copy.deepcopy(one))[name]) for name, value in drawn(one).items())


@every_model
def test_every_weight_of_the_generator_has_a_gradient(make: Any) -> None:
    model = make()
    drawn(model)["x"].square().sum().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in model.generator.parameters())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Generator((2,), 0), "noise of at least 1 number"),
        (lambda: Generator((2,), noise="cauchy"), "noise is 'cauchy', but must be one of 'normal', 'uniform'"),
        (lambda: InfoGAN((2,), categories=1), "hides a category of at least 2, or numbers"),
        (lambda: InfoGAN((2,), categories=0), "Take a GAN to hide nothing"),
        (lambda: InfoGAN((2,), categories=0, codes=1).categories_of(X), "built without categories"),
        (lambda: InfoGAN((2,), codes=1, least_scale=0.0), "least_scale is 0.0, but must be positive and finite"),
        (lambda: InfoGAN((2,), recogniser=nn.Linear(2, 3)).categories_of(X), r"must give \(12, 10\)"),
        (lambda: GAN((2,)).model(X[:, :1]), r"x has shape \(12, 1\), but this GAN was built for \(rows, 2\)"),
        (lambda: GAN((2,)).model(), "needs data x, or the number of rows"),
        (lambda: GAN((2,), context=3).sample(5), "built for a context of 3 numbers a row"),
        (lambda: GAN((2,)).sample(context=X), "built without a context"),
        (lambda: GAN((2,), context=3).generator(torch.arange(3)), "one_hot"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_critic_that_runs_out_of_memory_says_so(error: RuntimeError) -> None:
    def critic(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(RuntimeError, match="memory") as found:
        row_scores(critic, torch.zeros(3, 2))
    assert found.value is error


def test_a_packed_critic_judges_rows_together() -> None:
    inner = Critic((2, 3), context=2 * 1, hidden=(8,))
    packed, x, context = PackedCritic(inner, 2), torch.randn(5, 3), torch.randn(5, 1)
    pairs = [(0, 1), (2, 3), (4, 0)]  # the last begins anew
    expected = torch.stack([inner(x[None, pair], context[None, pair])[0] for pair in pairs])
    torch.testing.assert_close(packed(x, context), expected.repeat_interleave(2)[:5])
    torch.testing.assert_close(PackedCritic(Critic((1, 3)).requires_grad_(False), 1)(x).shape, x[:, 0].shape)
    with pytest.raises(ValueError, match="rows is 0"):
        PackedCritic(inner, 0)
    with pytest.raises(ValueError, match=r"one number a row, \(3,\) or \(3, 1\), but gave shape \(3, 2, 1\)"):
        PackedCritic(nn.Linear(3, 1), 2)(x)


def test_a_packed_critic_sees_that_draws_are_alike() -> None:
    """Data are −1 or 1, draws too, but two of them in a row are equal: no single row shows it, and a pair does."""
    sides = torch.tensor([-1.0, 1.0])
    data = sides[torch.randint(2, (4096, 1), generator=torch.Generator().manual_seed(0))]
    draws = sides[torch.randint(2, (2048, 1), generator=torch.Generator().manual_seed(1))].repeat_interleave(2, 0)
    for rows, loss in ((1, 2 * math.log(2.0)), (2, math.log(3.0) / 2 + math.log(1.5))):
        torch.manual_seed(0)
        critic = PackedCritic(Critic((rows, 1), hidden=(16,)), rows)
        optimiser = torch.optim.Adam(critic.parameters(), lr=0.02)
        for _ in range(300):
            value = torch.nn.functional.softplus(-critic(data)).mean() + torch.nn.functional.softplus(critic(draws)).mean()
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
        assert float(value.detach()) == pytest.approx(loss, abs=0.03)


GENERATOR = Generator((2,), 3)


def behind(y: Tensor | None = None) -> None:
    pyro.sample("y", dist.Normal(pyro.sample("x", GENERATOR()), 0.5).to_event(1), obs=y)


def test_tools_of_pyro_run_on_the_noise() -> None:
    program = poutine.reparam(behind, config={"x": NoiseReparam()})
    drawn = pyro.infer.Predictive(program, num_samples=4)()
    torch.testing.assert_close(drawn["x"], GENERATOR.network(drawn["x_noise"]).detach())
    with pyro.get_param_store().scope():
        guide = pyro.infer.autoguide.AutoNormal(program)
        assert math.isfinite(pyro.infer.Trace_ELBO().loss(program, guide, torch.zeros(2)))
    assert {*SVI(steps=2, seed=0, progress=False).fit(program, torch.zeros(2)).draws} == {"x_noise", "x"}


class Positive(ImplicitDistribution):
    support = dist.constraints.positive


def test_a_subclass_stays_one_in_a_plate() -> None:
    wide = Positive(dist.Exponential(torch.ones(())), lambda noise: noise).expand([3])
    assert isinstance(wide, Positive) and wide.support is dist.constraints.positive
    assert wide.sample((2,)).shape == (2, 3)


def test_a_row_of_one_number_needs_no_shape() -> None:
    model = InfoGAN((), 4, 3, 1)
    assert model.categories_of(torch.randn(5)).shape == (5, 3)
    assert model.sample(5).shape == (5,)
