"""Adversarial training: games at their exact optima, penalties in closed form, what is trained, gone on with and refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy.spatial.distance import jensenshannon
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

from inference import Adversarial, Hinge, LeastSquares, Minimax, NonSaturating, Posterior, Unsupported, Wasserstein
from inference.games import Game, gradient_penalty, zero_penalty
from inference.handlers import isolated
from inference.program import Program
from pyro_genmodels import GAN, InfoGAN
from pyro_genmodels.implicit import ConvCritic, Critic

P, Q = np.array([4, 2, 1, 1, 0]) / 8, np.array([1, 1, 2, 2, 2]) / 8  # two distributions on five points
DATA, DRAWS = (torch.arange(5).repeat_interleave(torch.tensor(p * 8).long()) for p in (P, Q))
SHARP = {"Minimax": Minimax(), "NonSaturating": NonSaturating(), "LeastSquares": LeastSquares(), "Hinge": Hinge()}
GAMES: dict[str, Game] = SHARP | {"GP": Wasserstein(penalty=0.1), "clipping": Wasserstein(penalty=None, clip=0.1)}
every_game = pytest.mark.parametrize("game", GAMES.values(), ids=GAMES.keys())


def quantiles(count: int) -> Tensor:
    """The standard normal distribution, in equal parts."""
    return dist.Normal(0.0, 1.0).icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)


class Shift(nn.Module):
    """x ~ N(by, scale²)."""

    def __init__(self, features: int = 1) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(features, dtype=torch.float64))
        self.raw = nn.Parameter(torch.zeros(features, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(self.by, self.raw.exp()).to_event(1), obs=x)


class Features(nn.Module):
    """A critic that is linear in x and x²."""

    def __init__(self, inputs: int = 1, power: int = 2) -> None:
        super().__init__()
        self.power = power
        self.head = nn.Linear(inputs * power, 1, dtype=torch.float64)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, *beside: Tensor) -> Tensor:
        scores: Tensor = self.head(torch.cat([x**i for i in range(1, self.power + 1)], -1))
        return scores


def play(critic: nn.Module, **settings: Any) -> Adversarial:
    return Adversarial(critic=critic, **{"seed": 0, "progress": False} | settings)


# ------------------------------------------------------------------------------------------------- exact optima
def best(name: str) -> Tensor:
    with np.errstate(divide="ignore"):
        logit = np.log(P) - np.log(Q)
    scores = {"LeastSquares": P / (P + Q), "Hinge": np.sign(P - Q)}.get(name, logit)
    return torch.as_tensor(np.maximum(scores, -1e3))


OPTIMA = {
    "Minimax": 2 * jensenshannon(P, Q) ** 2 - math.log(4),
    "NonSaturating": 2 * jensenshannon(P, Q) ** 2 - math.log(4),
    "LeastSquares": -0.5 * float((P * Q / (P + Q)).sum()),
    "Hinge": float(np.abs(P - Q).sum()) - 2,
}


@pytest.mark.parametrize("name", SHARP)
def test_the_value_of_the_best_critic_is_the_divergence(name: str) -> None:
    scores = best(name)
    assert float(SHARP[name].value(scores[DATA], scores[DRAWS])) == pytest.approx(OPTIMA[name], abs=1e-12)


@pytest.mark.parametrize("name", SHARP)
def test_no_critic_is_better(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-3, 0.1, 1.0, 10.0):
        scores = best(name) + size * torch.randn(5, generator=generator, dtype=torch.float64)
        assert float(SHARP[name].value(scores[DATA], scores[DRAWS])) <= OPTIMA[name] + 1e-12


def test_the_best_lipschitz_critic_tells_the_distance_of_wasserstein() -> None:
    """On the line the best critic has the slope of the sign of the difference of the distribution functions."""
    slopes = np.sign(np.cumsum(Q - P)[:-1])
    scores = torch.as_tensor(np.concatenate([[0.0], np.cumsum(slopes)]))
    value = float(Wasserstein().value(scores[DATA], scores[DRAWS]))
    assert value == pytest.approx(wasserstein_distance(np.arange(5), np.arange(5), P, Q), abs=1e-12)


def test_what_the_generator_lowers() -> None:
    s = torch.linspace(-3, 3, 7, dtype=torch.float64)
    sigma = s.sigmoid()
    expected = {
        Minimax(): (1 - sigma).log().mean(),
        NonSaturating(): -sigma.log().mean(),
        LeastSquares(): 0.5 * (s - 1).square().mean(),
        Hinge(): -s.mean(),
        Wasserstein(): -s.mean(),
    }
    for game, loss in expected.items():
        torch.testing.assert_close(game.loss(s), loss)


def test_the_penalty_of_a_linear_critic() -> None:
    torch.manual_seed(0)
    w, v = torch.randn(2, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    data, draws = torch.randn(2, 9, 2, 3, dtype=torch.float64)
    more, drawn = torch.randn(2, 9, 4, dtype=torch.float64)
    one = gradient_penalty(lambda x: (x * w).sum((1, 2)), [data], [draws])
    two = gradient_penalty(lambda x, y, c: (x * w).sum((1, 2)) + y @ v + c, [data, more], [draws, drawn], [more[:, 0]])
    torch.testing.assert_close(one, (w.norm() - 1).square())
    torch.testing.assert_close(two, ((w.square().sum() + v.square().sum()).sqrt() - 1).square())


def test_the_penalty_lies_between_data_and_draws() -> None:
    """‖∇D‖ of D(x) = x²/2 is |x|, and x = 2 + α with α uniform: E (1 + α)² = 7/3."""
    torch.manual_seed(0)
    rows = torch.ones(200_000, 1, dtype=torch.float64)
    found = gradient_penalty(lambda x: 0.5 * x.square().sum(1), [3 * rows], [2 * rows]).detach()
    # the standard deviation of (1 + α)² is 0.88; five standard errors, false alarm 1e-6
    assert float(found) == pytest.approx(7 / 3, abs=5 * 0.88 / 200_000**0.5)


def test_the_penalty_of_a_flat_critic_has_a_gradient() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = gradient_penalty(lambda x: x @ w, [torch.ones(3, 2).double()], [torch.zeros(3, 2).double()])
    (slope,) = torch.autograd.grad(found, w)
    assert float(found.detach()) == 1.0 and slope.isfinite().all()


def test_the_zero_penalty_of_a_quadratic_critic() -> None:
    torch.manual_seed(0)
    a, b, x = torch.randn(3, 3).double(), torch.randn(3).double(), torch.randn(20, 3).double()
    a = a + a.T
    found = zero_penalty(lambda x: 0.5 * ((x @ a) * x).sum(1) + x @ b, [x])
    torch.testing.assert_close(found, (x @ a + b).square().sum(1).mean())


# ------------------------------------------------------------------------------------------- critics by training
def test_a_trained_critic_is_the_log_ratio_of_two_gaussians() -> None:
    """log N(x; 1, 0.7²) − log N(x; 0, 1); its slope over x, weighed by the data, is 1 within 0.03."""
    x, critic = (1.0 + 0.7 * quantiles(4000))[:, None], Features()
    fit = play(critic, objective=Minimax(), steps=800, learning_rate=None, critic_learning_rate=0.03, critic_steps=1)
    posterior = fit.fit(Shift(), x)
    truth = (dist.Normal(1.0, 0.7).log_prob(x) - dist.Normal(0.0, 1.0).log_prob(x))[:, 0]
    found = critic(x).detach()[:, 0]
    centred = truth - truth.mean()
    assert float((found - found.mean()) @ centred / (centred @ centred)) == pytest.approx(1.0, abs=0.03)
    grid = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    p, q = dist.Normal(1.0, 0.7).log_prob(grid).exp(), dist.Normal(0.0, 1.0).log_prob(grid).exp()
    value = 2 * jensenshannon(p, q) ** 2 - math.log(4)
    # of 4000 draws, the standard error of a step is below 0.02; of the last hundred together below 0.002
    assert float(posterior.history["value"][-100:].mean()) == pytest.approx(value, abs=0.01)


def test_the_penalty_and_clipping_bias_the_distance_by_what_theory_says() -> None:
    """A linear critic w, shift δ: w·δ − λ (‖w‖ − 1)² is best at ‖w‖ = 1 + ‖δ‖/(2λ); clipped at c, at w = c sign δ."""
    shift = torch.tensor([0.6, -0.8], dtype=torch.float64)
    x = quantiles(500)[:, None].expand(500, 2) + shift
    for weight in (10.0, 100.0):
        critic = Features(2, 1)
        nn.init.ones_(critic.head.weight)
        fit = play(critic, objective=Wasserstein(penalty=weight), steps=1000, learning_rate=None, critic_learning_rate=1e-2)
        found = fit.fit(Shift(2), x).history["value"][-100:].mean()
        # 500 draws and 100 steps: a standard error of 0.0063 on a shift of 1
        assert float(critic.head.weight.detach().norm()) == pytest.approx(1 + 1 / (2 * weight), rel=0.02)
        assert float(found) == pytest.approx(1 + 1 / (2 * weight), rel=0.03)
    critic = Features(2, 1)
    fit = play(critic, objective=Wasserstein(None, clip=0.1), steps=200, learning_rate=None, critic_learning_rate=3e-3)
    found = fit.fit(Shift(2), x).history["value"][-100:].mean()
    assert torch.equal(critic.head.weight.detach(), 0.1 * shift.sign()[None])
    assert float(found) == pytest.approx(0.1 * 1.4, rel=0.03)  # a tenth of the distance in the 1-norm, not the distance 1


# -------------------------------------------------------------------------------------------- generators by training
@every_game
def test_a_program_with_a_density_is_trained_to_the_moments_of_its_data(game: Game) -> None:
    x, model = (1.5 + 0.5 * quantiles(400))[:, None], Shift()
    critic = Features(power=2)
    rates = {"learning_rate": 0.01, "critic_learning_rate": 0.05}
    fit = play(critic, objective=game, steps=1500, average=0.99, zero_penalty=0.3, batch_size=100, **rates)
    posterior = fit.fit(model, x)
    # averages of some hundred steps of 100 draws each: standard errors near 0.01, and the game's circles around its optimum
    assert float(posterior.weights["by"]) == pytest.approx(1.5, abs=0.1)
    assert float(posterior.weights["raw"].exp()) == pytest.approx(0.5, abs=0.12)


class Hidden(nn.Module):
    """z ~ N(0, 1), x ~ N(w z, 0.1²): a hidden site that nobody recognises."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), 0.3, dtype=torch.float64))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.w * z, 0.1).to_event(1), obs=x)


def test_gradients_go_through_hidden_sites() -> None:
    model = Hidden()
    x = (1.5**2 + 0.1**2) ** 0.5 * quantiles(400)[:, None]
    fit = play(Features(), steps=1500, average=0.99, zero_penalty=0.3, learning_rate=0.01, critic_learning_rate=0.05)
    posterior = fit.fit(model, x)
    assert abs(float(posterior.weights["w"])) == pytest.approx(1.5, abs=0.1)
    assert posterior.draws == {} and "information" not in posterior.history


def test_a_context_is_given_to_generator_and_critic() -> None:
    torch.manual_seed(0)
    context = torch.tensor([-1.0, 1.0]).repeat(200)[:, None]
    x = 2.0 * context + 0.3 * torch.randn(400, 1)
    model = GAN((1,), 1, context=1, network=Affine())
    fit = play(Critic((1,), context=1, hidden=(32,)), steps=600, average=0.98, batch_size=100, zero_penalty=0.1)
    fit = dataclasses.replace(fit, learning_rate=0.01, critic_learning_rate=0.01)
    posterior = fit.fit(model, x, context)
    assert posterior.predict()["x"].shape == (1, 1, 400, 1)
    drawn = model.sample(context=torch.tensor([-1.0, 1.0]).repeat_interleave(500)[:, None]).reshape(2, 500)
    assert drawn.mean(1).tolist() == pytest.approx([-2.0, 2.0], abs=0.4)


class Affine(nn.Module):
    """x = a ε + b context + c."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, noise: Tensor, context: Tensor) -> Tensor:
        x: Tensor = self.linear(torch.cat([noise, context], -1))
        return x


# ------------------------------------------------------------------------------------------------------- InfoGAN
class Shown(nn.Module):
    """x is the code itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, noise: Tensor, codes: Tensor) -> Tensor:
        return codes * self.weight


class Reader(nn.Module):
    """Logits that are as sharp as asked."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sharpness


@pytest.mark.parametrize("sharpness", [-2.0, 0.0, 1.0, 100.0])
def test_the_information_is_at_most_log_of_the_categories(sharpness: float) -> None:
    """E log q(c | x) + log 10, where q is a softmax that gives the right category e^s against nine times 1."""
    model = InfoGAN((10,), 1, 10, network=Shown(), recogniser=Reader(sharpness))
    fit = play(Critic((10,), hidden=(4,)), steps=1).fit(model, torch.eye(10)[torch.arange(50) % 10])
    expected = -math.log1p(9 * math.exp(-sharpness)) + math.log(10)
    found = float(fit.history["information"][0])
    assert found == pytest.approx(expected, abs=1e-5) and found <= math.log(10) + 1e-6


def test_infogan_learns_to_be_read() -> None:
    torch.manual_seed(0)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])[torch.arange(400) % 4]
    x = corners + 0.1 * torch.randn(400, 2)
    model = InfoGAN((2,), 2, categories=4, hidden=(32, 32))
    fit = play(Critic((2,), hidden=(32, 32)), steps=800, learning_rate=2e-3, batch_size=100, zero_penalty=0.1)
    posterior = fit.fit(model, x)
    assert float(posterior.history["information"][-50:].mean()) > 0.9 * math.log(4)
    assert {"critic.network.layers.0.weight", "recogniser.layers.0.weight"} <= set(posterior.weights)


def test_the_information_of_numbers_has_its_exact_value() -> None:
    """x = u uniform on (−1, 1)², q(u | x) = N(u, s²): E log q − log p = −2 log(s √(2π)) + 2 log 2."""

    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.raw.expand_as(x)], -1)

    model = InfoGAN((2,), 1, 0, 2, network=Shown(), recogniser=Told())
    fit = play(Critic((2,), hidden=(4,)), steps=1).fit(model, torch.zeros(64, 2))
    scale = math.log(2) + 1e-2
    expected = 2 * math.log(2) - 2 * math.log(scale * math.sqrt(2 * math.pi))
    assert float(fit.history["information"][0]) == pytest.approx(expected, abs=1e-5)


def test_without_weight_nothing_is_recognised() -> None:
    model = InfoGAN((2,), 1, 3, hidden=(4,))
    before = [weight.detach().clone() for weight in model.recogniser.parameters()]
    posterior = play(Critic((2,), hidden=(4,)), steps=3, information=0.0).fit(model, torch.zeros(16, 2))
    assert "information" not in posterior.history
    assert all(torch.equal(*pair) for pair in zip(before, model.recogniser.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ the machinery
def a_gan() -> tuple[GAN, Tensor]:
    with isolated(3):
        return GAN((2,), 3, hidden=(8,)), torch.randn(30, 2)


def a_critic(spectral: bool = False) -> Critic:
    with isolated(4):
        return Critic((2,), hidden=(8,), spectral=spectral)


@every_game
@pytest.mark.parametrize("spectral", [False, True])
def test_recorded_steps_are_those_of_the_program(game: Game, spectral: bool) -> None:
    """The graphs of both players are taken, so that they have equalled the program in losses, gradients and buffers."""
    model, x = a_gan()
    fit = play(a_critic(spectral), objective=game, zero_penalty=0.1, batch_size=10)
    program = Program(model, (x,), {}, follow=True, **fit.view)
    with isolated(0):
        state = fit.init(program)
        for _ in range(18):  # the step after is held against the program
            state, info = fit.step(state, program)
    assert [objective.rung for objective in state.objectives] == ["staged", "staged"]
    assert info.value.isfinite()


@every_game
def test_going_on_equals_one_long_run(game: Game, tmp_path: Any) -> None:
    settings: dict[str, Any] = {"objective": game, "steps": 40, "batch_size": 7, "critic_steps": 2, "average": 0.9}
    settings |= {"learning_rate": 1e-2, "checkpoint_every": 10}
    model, x = a_gan()
    whole = play(a_critic(True), **settings).fit(model, x)

    def stop(step: int, info: Any) -> None:
        if step == 24:
            raise RuntimeError("power cut")

    stop.is_passive = True  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="power cut"):
        play(a_critic(True), callbacks=(stop,), checkpoint=tmp_path / "run", **settings).fit(a_gan()[0], x)
    model, critic = a_gan()[0], a_critic(True)
    again = play(critic, **settings).resume(tmp_path / "run", model, x)
    for name, value in whole.weights.items():
        assert torch.equal(value, again.weights[name]), name
    for name, value in whole.history.items():
        assert torch.equal(value, again.history[name]), name
    assert torch.equal(whole.stats["value"], again.stats["value"])


def test_same_seed_same_weights_and_the_caller_keeps_its_random_numbers() -> None:
    results = []
    for _ in range(2):
        model, x = a_gan()
        before = torch.get_rng_state()
        results.append(play(a_critic(), steps=20, batch_size=10).fit(model, x).weights)
        assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_the_average_is_the_exponential_one() -> None:
    model, seen = Shift(), []
    x = (1.0 + quantiles(50))[:, None]
    callback = lambda step, info: seen.append(model.by.detach().clone())  # noqa: E731
    posterior = play(Features(), steps=30, average=0.8, learning_rate=0.1, callbacks=(callback,)).fit(model, x)
    average = torch.zeros(1, dtype=torch.float64)
    for count, value in enumerate(seen, 1):
        decay = min(0.8, (count - 1) / count)
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(posterior.weights["by"], average)
    torch.testing.assert_close(model.by.detach(), average)


def test_the_critic_takes_its_steps_on_batches_of_its_own() -> None:
    model, x = a_gan()
    fit = play(a_critic(), critic_steps=3, batch_size=10)
    program = Program(model, (x,), {}, follow=True, **fit.view)
    with isolated(0):
        state = fit.init(program)
        for _ in range(4):
            state, _ = fit.step(state, program)
    assert int(state.batches) == 12 and int(state.step) == 4
    assert [int(next(iter(o.state.values()))["step"]) for o in state.optimisers] == [12, 4]
    assert sorted(state.order.tolist()) == list(range(30))


def test_learning_rates_are_two() -> None:
    """A first step of Adam has the size of the rate."""
    model, critic = Shift(), Features()
    nn.init.ones_(critic.head.weight)
    x = (1.0 + quantiles(50))[:, None]
    play(critic, steps=1, learning_rate=0.25, critic_learning_rate=0.125).fit(model, x)
    assert abs(float(model.by.detach())) == pytest.approx(0.25, rel=1e-4)
    assert (critic.head.weight.detach() - 1).abs().flatten().tolist() == pytest.approx([0.125] * 2, rel=1e-4)


def test_a_posterior_is_saved_and_predicts(tmp_path: Any) -> None:
    model, x = a_gan()
    posterior = play(a_critic(), steps=5).fit(model, x)
    assert posterior.predict()["x"].shape == (1, 1, 30, 2)
    posterior.save(tmp_path / "gan")
    loaded = Posterior.load(tmp_path / "gan")
    assert torch.equal(loaded.weights["generator.network.layers.0.weight"], model.generator.network.layers[0].weight)
    with pytest.raises(Unsupported, match="no latent site"):
        posterior.log_likelihood()


def test_images_are_judged_by_convolutions_in_half_precision() -> None:
    with isolated(0):
        model, critic, x = GAN((4, 4), 3, hidden=(8,)), ConvCritic((4, 4), (4,)), torch.rand(20, 4, 4)
    posterior = play(critic, steps=20, batch_size=10, autocast=torch.bfloat16, objective=Hinge()).fit(model, x)
    assert posterior.history["value"].dtype == torch.float32 and posterior.history["value"].isfinite().all()


# ------------------------------------------------------------------------------------------------------ refusals
class Broken(nn.Module):
    """A network that gives NaN when told to."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x)
        return found


@pytest.mark.parametrize("who", ["generator", "critic"])
def test_nan_stops_the_run_and_the_last_good_weights_are_kept(who: str, tmp_path: Any) -> None:
    with isolated(0):
        model, critic, x = GAN((2,), 2, network=Broken(2)), Broken(1), torch.randn(20, 2)
    victim = model.generator.network.linear if who == "generator" else critic.linear

    def poison(step: int, info: Any) -> None:
        if step == 29:
            victim.bias.data.fill_(math.nan)

    fit = play(critic, steps=500, callbacks=(poison,), checkpoint=tmp_path / "run", checkpoint_every=10)
    subject = "GAN draws values" if who == "generator" else "The critic gives scores"
    layer = "'generator.network.linear'" if who == "generator" else "'linear'"
    with pytest.raises(ValueError, match=rf"{subject} that have not been finite since step 3\d; the first .* is {layer}"):
        fit.fit(model, x)
    again = dataclasses.replace(fit, callbacks=(), checkpoint=None)
    posterior = again.resume(tmp_path / "run", model, x)
    assert posterior.history["value"].isfinite().all() and len(posterior.history["value"]) == 500


class Coin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=self.logit).to_event(1), obs=x)


class Choosing(nn.Module):
    """A hidden category whose probabilities are weights."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.locs = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=self.logits))
            pyro.sample("x", dist.Normal(self.locs[k], 1.0), obs=x)


def still(x: Tensor) -> None:
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


X = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a critic of two numbers": (
        lambda: play(nn.Linear(2, 2)).fit(a_gan()[0], X),
        r"one number a row, \(12,\) or \(12, 1\), but gave shape \(12, 2\)",
    ),
    "a critic of other rows": (lambda: play(nn.Linear(3, 1)).fit(a_gan()[0], X), r"does not run on .* shape \(12, 2\)"),
    "a critic that is none": (lambda: play(torch.relu).fit(a_gan()[0], X), "must be a torch.nn.Module"),  # type: ignore[arg-type]
    "a critic without weights": (lambda: play(nn.Flatten(0)).fit(GAN((), 2), X[:, 0]), "no weights to train"),
    "an objective by name": (lambda: play(a_critic(), objective="hinge").fit(a_gan()[0], X), "such as Hinge"),
    "no critic steps": (lambda: play(a_critic(), critic_steps=0).fit(a_gan()[0], X), "critic_steps is 0, but must be"),
    "a bound of zero": (lambda: Wasserstein(clip=0.0), "clip is 0.0, but must be positive"),
    "a bound below zero": (lambda: Wasserstein(clip=-1.0), "clip is -1.0, but must be positive"),
    "no penalty of zero": (lambda: Wasserstein(penalty=0.0), "None leaves it out"),
    "a rate of zero": (lambda: play(a_critic(), learning_rate=0.0).fit(a_gan()[0], X), "learning_rate is 0.0"),
    "an average of one": (lambda: play(a_critic(), average=1.0).fit(a_gan()[0], X), "a decay lies between 0 and 1"),
    "a negative R1": (lambda: play(a_critic(), zero_penalty=-1.0).fit(a_gan()[0], X), "must not be negative"),
    "more rows than there are": (lambda: play(a_critic(), batch_size=13).fit(a_gan()[0], X), "has 12 rows"),
    "data of another shape": (lambda: play(a_critic()).fit(a_gan()[0], X[:, :1]), r"built for \(rows, 2\)"),
    "data in a wider event": (
        lambda: play(nn.Linear(3, 1).double()).fit(Shift(2), torch.zeros(9, 3)),
        "does not fit its data",
    ),
    "draws narrower than data": (
        lambda: play(nn.Linear(3, 1).double()).fit(Shift(1), torch.zeros(9, 3)),
        "but its data have",
    ),
    "missing data": (
        lambda: play(a_critic()).fit(a_gan()[0], torch.where(X > 2, torch.nan, X).index_fill(0, torch.tensor(3), torch.nan)),
        r"missing or infinite \(the first at \(",
    ),
    "draws without gradients": (
        lambda: play(nn.Linear(2, 1)).fit(Coin(), X.round().abs().clamp(max=1)),
        r"Bernoulli.*SVI\(\)",
    ),
    "a category with weights": (lambda: play(nn.Linear(1, 1)).fit(Choosing(), X[:, 0]), "'k' is Categorical with weights"),
    "nothing to train": (lambda: play(nn.Linear(1, 1)).fit(still, X[:, 0]), "depends on no weights"),
    "information about nothing": (lambda: play(a_critic(), information=1.0).fit(a_gan()[0], X), "GAN hides nothing"),
    "information without a guide": (
        lambda: play(nn.Linear(1, 1), information=1.0).fit(Hidden(), X[:, :1]),
        "brings no guide that recognises",
    ),
    "a place to start": (lambda: play(a_critic(), start={"x": X}).fit(a_gan()[0], X), "leave start= out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(case: str) -> None:
    call, sentence = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()


# ----------------------------------------------------------------------------------------- what is data, and what is beside
class Given(nn.Module):
    """Draws under a context, which is its first argument."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = GAN((1,), 4, context=1).generator

    def model(self, context: Tensor, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", self.generator(context), obs=x)


def test_data_are_told_from_what_equals_them_in_the_first_rows() -> None:
    context, x = torch.randn(40, 1), torch.full((40, 1), 5.0)
    context[:8] = x[:8] = 0.0
    backend = Adversarial(critic=Critic((1,), context=1), batch_size=8, seed=0, progress=False)
    wiring = backend._wiring(Program(Given(), (context, x), follow=True, batch_size=8, is_simulated=True))
    assert (wiring.sources, wiring.beside) == ((1,), (0,))


class Logs(Shift):
    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(self.by, self.raw.exp()).to_event(1), obs=x.log())


class Masked(Shift):
    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)), poutine.mask(mask=x[:, 0] > 0):
            pyro.sample("x", dist.Normal(self.by, self.raw.exp()).to_event(1), obs=x)


class Weighed(Shift):
    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)), poutine.scale(scale=2.0):
            pyro.sample("x", dist.Normal(self.by, self.raw.exp()).to_event(1), obs=x)


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            Logs,
            "The data of site 'x' are made of argument 0 of Logs. A critic that were given both would tell draws by that",
        ),
        (Masked, "Site 'x' is masked or scaled, but a critic compares whole rows"),
        (Weighed, "Site 'x' is masked or scaled, but a critic compares whole rows"),
    ],
)
def test_data_that_a_critic_cannot_compare_are_refused(model: Callable[[], nn.Module], sentence: str) -> None:
    x = torch.rand(20, 1, dtype=torch.float64) + 0.5
    with pytest.raises(Unsupported, match=sentence):
        Adversarial(critic=Critic((1,), context=1), steps=2, seed=0, progress=False).fit(model(), x)


def test_a_context_that_is_not_finite_is_told_by_its_place() -> None:
    context = torch.zeros(20, 3)
    context[14, 1] = math.nan
    backend = Adversarial(critic=Critic((2,), context=3), batch_size=4, steps=2, seed=0, progress=False)
    with pytest.raises(
        ValueError, match=r"'context' of GAN has 1 values that are missing or infinite \(the first at \(14, 1\)"
    ):
        backend.fit(GAN((2,), context=3), torch.randn(20, 2), context)


def test_clipping_leaves_frozen_weights_of_the_critic() -> None:
    critic = Critic((2,))
    first = critic.network.layers[0].requires_grad_(False).weight.clone()  # type: ignore[union-attr, operator]
    game = Wasserstein(penalty=None, clip=0.01)
    Adversarial(critic=critic, objective=game, steps=2, seed=0, progress=False).fit(GAN((2,)), torch.randn(20, 2))
    assert torch.equal(critic.network.layers[0].weight, first)  # type: ignore[union-attr]


class Rooted(nn.Module):
    """Finite, but without a slope where a unit is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, noise: Tensor) -> Tensor:
        hidden = self.layer(noise)
        return torch.where(hidden > 0, hidden.sqrt(), hidden)


def test_gradients_that_are_not_finite_are_told_and_move_nothing() -> None:
    model = GAN((2,), 4, network=Rooted())
    before = copy.deepcopy(model.state_dict())
    backend = Adversarial(critic=Critic((2,)), steps=4, seed=0, progress=False)
    with pytest.raises(
        ValueError, match="Losses are finite, but there are gradients that have not been finite since step 0"
    ):
        backend.fit(model, torch.randn(20, 2))
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())


@pytest.mark.parametrize("make", [lambda: GAN((2,), 4), lambda: InfoGAN((2,), 4, 3, 1)], ids=["GAN", "InfoGAN"])
def test_a_saved_game_is_drawn_from(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, other, x = make(), make(), torch.randn(20, 2)
    Adversarial(critic=Critic((2,)), steps=2, seed=0, progress=False).fit(model, x).save(tmp_path / "fit")
    assert Posterior.load(tmp_path / "fit", other, x).predict()["x"].shape == (1, 1, 20, 2)
    assert all(torch.equal(leaf, other.state_dict()[name]) for name, leaf in model.state_dict().items())


def test_a_context_goes_by_its_name() -> None:
    context, x = torch.randn(20, 3), torch.randn(20, 2)
    backend = Adversarial(critic=Critic((2,), context=3), steps=2, seed=0, progress=False)
    posterior = backend.fit(GAN((2,), context=3), x, context=context)
    assert posterior.predict(None, context=context[:5])["x"].shape == (1, 1, 5, 2)


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_as_many_rows_as_cannot_be_are_refused(size: Any) -> None:
    with pytest.raises(ValueError, match="size is the number of rows to draw, an integer of at least 1"):
        GAN((2,)).sample(size)


@pytest.mark.parametrize("kind", [GAN, Critic, InfoGAN])
def test_a_number_is_no_shape(kind: Any) -> None:
    with pytest.raises(TypeError, match=rf"shape of a {kind.__name__} is that of a row, \(2,\) for 2 numbers, but is 2"):
        kind(2)
