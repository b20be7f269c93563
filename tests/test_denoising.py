"""Training of denoisers, held to what is known exactly: losses of mixtures, optima of Gaussian data, the bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference import BoundLoss, Denoising, HybridLoss, MinSNR, PowerAverage, SimpleLoss, Unsupported
from inference.noising import (
    DataError,
    EDMError,
    Even,
    EvenLogSNR,
    FlowError,
    Importance,
    LogNormal,
    NoiseError,
    noised,
)
from inference.posterior import Posterior
from inference.score_matching import SlicedLoss
from inference.training import follow
from pyro_genmodels import DDPM, EnergyModel, ScoreModel
from pyro_genmodels.diffusion import EDM, VP, Betas, Denoised, Denoiser, Learned, Network, Oracle, Schedule, Straight
from pyro_genmodels.diffusion.likelihood import variational_bound
from pyro_genmodels.nets import PointNetwork

X = torch.randn(96, 2, generator=torch.Generator().manual_seed(0))


def a_score(schedule: Schedule | None = None, prediction: Any = "preconditioned", **settings: Any) -> ScoreModel:
    torch.manual_seed(0)
    return ScoreModel(Network(PointNetwork(2, width=16, blocks=1), schedule or VP(), prediction), (2,), **settings)


def train(**settings: Any) -> Denoising:
    return Denoising(**{"steps": 30, "batch_size": 32, "seed": 0, "progress": False, **settings})


class Scaled(Denoiser):
    """The exact denoiser, times a number."""

    def __init__(self, oracle: Oracle) -> None:
        super().__init__(oracle.schedule)
        self.oracle, self.factor = oracle, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Denoised:
        known = self.oracle(x, t)
        return Denoised(self.factor * known.mean, known.variance)


# ------------------------------------------------------------------------------------------------- losses and truth
@pytest.mark.parametrize(
    ("weighting", "schedule"),
    [(NoiseError(), VP()), (MinSNR(5.0), VP()), (EDMError(0.7), EDM()), (FlowError(), Straight()), (DataError(), VP())],
    ids=["noise", "min-SNR", "EDM", "flow", "data"],
)
def test_the_exact_denoiser_has_the_loss_that_follows_from_its_covariance(weighting: Any, schedule: Schedule) -> None:
    """E loss = E w e^λ tr Cov[x_0 | x_t] / D; the difference of both, row by row, has mean 0 (5 standard errors)."""
    oracle = Oracle.ring(5, schedule)
    torch.manual_seed(0)
    x = oracle.distribution().sample((4000,))
    times = LogNormal(0.0, 1.0)
    torch.manual_seed(1)
    found = SimpleLoss(weighting, times).rows(oracle, x, None)
    torch.manual_seed(1)
    seen = noised(oracle, x, None, times)
    assert seen.known.variance is not None
    truth = weighting(seen.log_snr) * seen.log_snr.exp() * seen.known.variance.mean(1)
    gap = found - truth
    assert abs(gap.mean()) < 5.0 * gap.std() / math.sqrt(len(x)) and truth.mean() > 0.01


@pytest.mark.parametrize(
    ("prediction", "weighting", "schedule"),
    [
        ("noise", NoiseError(), VP()),
        ("data", DataError(), VP()),
        ("flow", FlowError(), Straight()),
        ("flow", FlowError(), VP()),
        ("preconditioned", EDMError(0.7), EDM()),
        ("preconditioned", EDMError(0.7), VP()),
    ],
)
def test_a_weighting_makes_the_loss_the_error_of_what_a_network_predicts(
    prediction: Any, weighting: Any, schedule: Schedule
) -> None:
    """w ‖ε − ε̂‖² = ‖target − output‖², to 1e-8 in float64."""

    class Fixed(nn.Module):
        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            return torch.sin(x + level[:, None])

    denoiser = Network(Fixed(), schedule, prediction, deviation=0.7)
    x = X.double()
    torch.manual_seed(0)
    seen = noised(denoiser, x, None, LogNormal(0.0, 1.0))
    t = schedule.time(seen.log_snr)
    alpha, sigma = denoiser.at(x, t)
    noise = (seen.noisy - alpha * x) / sigma
    if prediction == "preconditioned":
        spread = (0.49 + (sigma / alpha).square()).sqrt()
        inside = seen.noisy / (alpha * spread)
        target = (x - 0.49 / spread.square() * seen.noisy / alpha) / (0.7 * sigma / (alpha * spread))
    else:
        inside, target = seen.noisy, {"noise": noise, "data": x, "flow": noise - x}[prediction]
    error = (target - Fixed()(inside, 0.25 * seen.log_snr)).square().mean(1)
    torch.manual_seed(0)
    found = SimpleLoss(weighting, LogNormal(0.0, 1.0)).rows(denoiser, x, None)
    torch.testing.assert_close(found, error, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("loss", [SimpleLoss(), SimpleLoss(MinSNR()), SimpleLoss(EDMError(1.0), LogNormal()), BoundLoss()])
def test_at_the_exact_denoiser_the_gradient_is_zero(loss: Any) -> None:
    """The mean of the gradients of 4,000 rows, within 5 standard errors; on either side it points back."""
    oracle = Scaled(Oracle.ring(5, Betas.cosine(20)))
    module = DDPM(oracle, (2,), 20, "optimal") if isinstance(loss, BoundLoss) else oracle
    torch.manual_seed(0)
    x = oracle.oracle.distribution().sample((4000,))
    slopes = []
    for factor in (1.0, 0.9, 1.1):
        torch.manual_seed(1)
        with torch.no_grad():
            oracle.factor.fill_(factor)
        each = []
        for part in x.chunk(40):
            (slope,) = torch.autograd.grad(loss.rows(module, part, None).mean(), oracle.factor)
            each.append(slope)
        slopes.append(torch.stack(each))
    error = slopes[0].std() / math.sqrt(40)
    assert abs(slopes[0].mean()) < 5.0 * error
    assert slopes[1].mean() < -5.0 * error and slopes[2].mean() > 5.0 * error


def test_a_linear_denoiser_that_is_trained_recovers_the_best_one() -> None:
    """x̂_0 = m + α C (α² C + σ²)⁻¹ (x_t − α m), with mean and covariance of the data, to 2 % at each of four levels."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix, self.shift = nn.Parameter(torch.zeros(4, 2, 2)), nn.Parameter(torch.zeros(4, 2))

        def forward(self, x: Tensor, level: Tensor) -> Tensor:
            at = (level[:, None] - levels).abs().argmin(1)
            return (self.matrix[at] @ x[..., None])[..., 0] + self.shift[at]

    schedule = Betas([0.2, 0.3, 0.4, 0.5])
    levels = 0.25 * schedule.log_snr(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    torch.manual_seed(0)
    x = torch.tensor([1.0, -0.5]) + torch.randn(512, 2) @ torch.tensor([[1.0, 0.6], [0.0, 0.5]])
    network = Linear()
    model = DDPM(Network(network, schedule, "data"), (2,), 4)
    train(loss=SimpleLoss(DataError()), steps=1500, batch_size=None, learning_rate=0.02).fit(model, x)
    mean, covariance = x.mean(0), x.T.cov(correction=0)
    for i, t in enumerate((4.0, 3.0, 2.0, 1.0)):
        alpha, sigma = schedule.alpha(torch.tensor(t)), schedule.sigma(torch.tensor(t))
        best = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2))
        torch.testing.assert_close(network.matrix[i].detach(), best, rtol=0.0, atol=0.02)
        torch.testing.assert_close(network.shift[i].detach(), mean - alpha * best @ mean, rtol=0.0, atol=0.02)


@pytest.mark.parametrize("variance", ["upper", "lower", "optimal"])
def test_each_link_costs_what_the_variational_bound_says(variance: Any) -> None:
    oracle = Oracle.ring(5, Betas.cosine(6))
    torch.manual_seed(1)
    x = oracle.distribution().sample((20,))
    model, noise = DDPM(oracle, (2,), 6, variance), torch.randn(6, 20, 2, dtype=torch.float64)
    expected = variational_bound(oracle, x, model.grid, variance, noise=noise)
    torch.testing.assert_close(model.prior_cost(x), expected.prior, rtol=1e-12, atol=1e-12)
    for i in range(6):
        t = model.grid[i].expand(20)
        alpha, sigma = oracle.at(x, t)
        noisy = alpha * x + sigma * noise[i]
        found = model.link_cost(oracle(noisy, t), x, noisy, torch.full((20,), i))
        truth = expected.steps[i] if i < 5 else -expected.decoder
        torch.testing.assert_close(found, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("times", [Even(), Importance(4, share=0.3)], ids=["even", "importance"])
def test_the_loss_of_the_bound_has_the_mean_of_the_variational_bound(times: Any) -> None:
    """Over 300 draws for 64 rows, within 5 standard errors."""
    oracle = Oracle.ring(3, Betas.cosine(8))
    torch.manual_seed(2)
    x = oracle.distribution().sample((64,))
    model = DDPM(oracle, (2,), 8, "optimal")
    found = torch.stack([BoundLoss(times).rows(model, x, None).mean() for _ in range(300)])
    truth = torch.stack([-variational_bound(oracle, x, model.grid, "optimal").total.mean() for _ in range(100)])
    error = math.sqrt(float(found.var() / 300 + truth.var() / 100))
    assert abs(found.mean() - truth.mean()) < 5.0 * error


def test_times_that_are_drawn_where_the_bound_is_large_leave_its_mean_and_lessen_its_noise() -> None:
    oracle = Oracle.ring(5, Betas.cosine(100))
    torch.manual_seed(3)
    x = oracle.distribution().sample((256,))
    model = DDPM(oracle, (2,), 100, "upper")
    learnt = BoundLoss(Importance(20, share=0.2))
    for _ in range(30):
        learnt.rows(model, x, None)
    even, led = (torch.cat([loss.rows(model, x, None) for _ in range(30)]) for loss in (BoundLoss(), learnt))
    assert abs(even.mean() - led.mean()) < 5.0 * math.sqrt(float(even.var() + led.var()) / len(even))
    assert led.var() < 0.7 * even.var()


def test_the_hybrid_loss_trains_the_variance_by_the_bound_and_the_mean_without_it() -> None:
    torch.manual_seed(0)
    network = Network(PointNetwork(2, 2, width=16, blocks=1), Betas.cosine(10), learns_variance=True)
    model, head = DDPM(network, (2,), 10, "optimal"), network.network.last[1]
    x = X + 0.0

    def slopes(loss: Any) -> Tensor:
        torch.manual_seed(5)
        return torch.autograd.grad(loss.rows(model, x, None).mean(), head.weight)[0]

    hybrid, simple = slopes(HybridLoss(0.1)), slopes(SimpleLoss())
    torch.testing.assert_close(hybrid[:2], simple[:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(hybrid[2:], slopes(HybridLoss(0.2))[2:] / 2.0, rtol=1e-4, atol=1e-6)
    assert not simple[2:].any() and hybrid[2:].abs().max() > 1e-4


def test_times_are_spread_as_they_are_said_to_be() -> None:
    """Quantiles of 10,000 even numbers: log σ/α of LogNormal is normal, EvenLogSNR even, Importance as likely as it says."""
    uniform = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    schedule = EDM()
    span = noised(Oracle.ring(3, schedule), X.double(), None, Even()).span
    t, share = LogNormal(-1.2, 1.2).at(uniform, span)
    assert t.log().mean() == pytest.approx(-1.2, abs=2e-3) and t.log().std() == pytest.approx(1.2, abs=2e-3)
    assert bool((share == 1.0).all())
    snrs = schedule.log_snr(EvenLogSNR().at(uniform, span)[0])
    assert (snrs.max() - snrs).quantile(0.25) == pytest.approx(0.25 * float(snrs.max() - snrs.min()), rel=1e-3)
    times = Importance(4, share=0.2)
    times.learn(torch.tensor([1.0, 30.0, 50.0, 75.0]).double(), torch.tensor([0.0, 0.0, 3.0, 0.0]), span)
    t, share = times.at(uniform, span)
    place = ((t - span.start) / (span.stop - span.start) * 4).long()
    counts = torch.bincount(place, minlength=4) / 10000
    torch.testing.assert_close(counts.double(), times.chances, rtol=0.0, atol=1e-3)
    assert float(share.mean()) == pytest.approx(1.0, abs=1e-3) and times.chances[2] > times.chances[0]


def test_uniform_numbers_of_a_batch_leave_nothing_out() -> None:
    torch.manual_seed(0)
    drawn = noised(Oracle.ring(3, VP()), X.double(), None, Even()).drawn
    assert drawn.sort().values.diff().max() < 1.01 / len(X)


# ----------------------------------------------------------------------------------------------- averages and the run
def test_an_average_by_a_power_counts_each_step_by_how_much_the_power_grows() -> None:
    average, values = PowerAverage(0.15), torch.randn(40, dtype=torch.float64)
    held = [torch.zeros((), dtype=torch.float64)]
    for count, value in enumerate(values, 1):
        follow(held, [value], average, count)
    steps = torch.arange(41, dtype=torch.float64) ** (average.exponent + 1.0)
    torch.testing.assert_close(held[0], (steps.diff() / steps[-1] * values).sum(), rtol=1e-12, atol=1e-12)


def test_the_width_of_a_power_average_is_the_share_of_the_run_that_it_was_asked_for() -> None:
    for deviation in (0.05, 0.1, 0.2, 0.28):
        weights = torch.arange(20001, dtype=torch.float64).pow(PowerAverage(deviation).exponent + 1.0).diff()
        weights /= weights.sum()
        t = (torch.arange(20000) + 0.5) / 20000
        mean = (weights * t).sum()
        assert float((weights * (t - mean).square()).sum().sqrt()) == pytest.approx(deviation, abs=1e-4)


def test_averaged_weights_take_the_place_of_the_last_ones() -> None:
    last, kept = a_score(), a_score()
    train(average=PowerAverage(0.2)).fit(kept, X)
    train().fit(last, X)
    assert not torch.equal(kept.denoiser.network.first.weight, last.denoiser.network.first.weight)  # type: ignore[union-attr]


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    models = a_score(), a_score()
    state = torch.get_rng_state()
    one, two = (train(average=0.9).fit(model, X).weights for model in models)
    assert all(torch.equal(one[name], two[name]) for name in one) and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("loss", [SimpleLoss(), SimpleLoss(times=Importance(5))], ids=["plain", "with a memory"])
@pytest.mark.parametrize("settings", [{}, {"average": PowerAverage(0.2), "clip_norm": 1.0}], ids=["", "averaged"])
def test_a_run_that_is_gone_on_with_is_the_run_undisturbed(tmp_path: Any, loss: Any, settings: dict[str, Any]) -> None:
    """Bit for bit, from a checkpoint at step 20, after graphs were recorded."""

    def stop(step: int, info: Any) -> None:
        if step == 24:
            raise RuntimeError("killed")

    whole = train(loss=loss, checkpoint_every=20, **settings).fit(a_score(), X)
    with pytest.raises(RuntimeError, match="killed"):
        train(loss=loss, checkpoint=tmp_path / "run", checkpoint_every=20, callbacks=(stop,), **settings).fit(a_score(), X)
    model = a_score()
    rest = train(loss=loss, checkpoint_every=20, **settings).resume(tmp_path / "run", model, X)
    assert torch.equal(rest.history["loss"], whole.history["loss"])
    assert all(torch.equal(rest.weights[name], whole.weights[name]) for name in whole.weights)


def test_a_loss_remembers_within_a_run_and_not_beyond() -> None:
    loss = SimpleLoss(times=Importance(5))
    train(loss=loss).fit(a_score(), X)
    assert bool((loss.times.squares == 1.0).all())  # type: ignore[union-attr]


def test_a_context_reaches_the_network() -> None:
    """Two classes apart by 4: draws given a label lie around its mean, within 1."""
    torch.manual_seed(0)
    labels = torch.arange(128) % 2
    x = torch.randn(128, 2) * 0.5 + 4.0 * labels[:, None]
    model = ScoreModel(Network(PointNetwork(2, width=32, blocks=2, classes=2), EDM(), "preconditioned"), (2,), steps=8)
    train(loss=SimpleLoss(EDMError(), LogNormal()), steps=400, batch_size=None, learning_rate=5e-3).fit(model, x, labels)
    torch.manual_seed(1)
    drawn = model.sample(context=torch.tensor([0, 1]).repeat_interleave(50))
    assert abs(drawn[:50].mean()) < 1.0 and abs(drawn[50:].mean() - 4.0) < 1.0


def test_a_schedule_with_weights_is_to_be_held_fixed() -> None:
    model = a_score(Learned(hidden=4))
    with pytest.raises(Unsupported, match="Hold it fixed by denoiser.schedule.requires_grad_"):
        train().fit(model, X)
    model.denoiser.schedule.requires_grad_(False)
    assert not any("schedule" in name for name in train().fit(model, X).weights)


def test_smaller_arithmetic_and_bytes_are_taken() -> None:
    grey = (255 * torch.rand(64, 2)).to(torch.uint8)
    fit = train(autocast=torch.bfloat16, transform=lambda b: b.float() / 127.5 - 1.0).fit(a_score(), grey)
    assert bool(fit.history["loss"].isfinite().all())


def test_what_is_predicted_are_as_many_new_rows() -> None:
    fit = train(steps=2).fit(a_score(steps=4), X)
    assert fit.predict()["x"].shape == (1, 1, 96, 2) and not fit.draws


# ----------------------------------------------------------------------------------------------------- what is refused
class Lost(nn.Module):
    """A network whose numbers are lost at a step."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.layer, self.after, self.calls = nn.Linear(2, 2), after, 0

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * (math.nan if self.calls > self.after else 1.0)


def test_a_network_that_gives_nan_stops_the_run_and_the_last_good_checkpoint_is_kept(tmp_path: Any) -> None:
    model = ScoreModel(Network(Lost(6), VP()), (2,))
    callbacks = (lambda step, info: None,)
    with pytest.raises(ValueError, match=r"has not been finite since step 5.*a checkpoint holds the last weights"):
        train(steps=60, checkpoint=tmp_path / "run", checkpoint_every=2, callbacks=callbacks).fit(model, X)
    with pytest.raises(ValueError, match="is not finite at the start; the first layer"):
        exploded = a_score()
        with torch.no_grad():
            exploded.denoiser.network.first.weight.fill_(math.inf)  # type: ignore[union-attr]
        train().fit(exploded, X)


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "data that are missing": (
        lambda: train().fit(a_score(is_scaled=False), torch.where(X > 2.0, math.nan, X)),
        ValueError,
        r"missing or infinite, the first at \(",
    ),
    "data of another shape": (lambda: train().fit(a_score(), X.T), ValueError, "this ScoreModel was built for"),
    "data that do not vary": (lambda: train().fit(a_score(), X * torch.tensor([1.0, 0.0])), ValueError, "same in all rows"),
    "bytes without a transform": (
        lambda: train().fit(a_score(is_scaled=False), (X * 10).long()),
        ValueError,
        "floating-point numbers, but these are torch.int64",
    ),
    "three tensors": (lambda: train().fit(a_score().denoiser, X, X, X), Unsupported, "was given 3 tensors"),
    "a context of other rows": (
        lambda: train(batch_size=None).fit(a_score().denoiser, X, X[:5]),
        ValueError,
        "a row each for every row of the other",
    ),
    "a context for a network without": (
        lambda: train().fit(a_score(), X, X),
        ValueError,
        "this network was built without one",
    ),
    "a function": (lambda: train().fit(lambda x: None, X), Unsupported, "trains a torch.nn.Module"),
    "a module without a denoiser": (lambda: train().fit(nn.Linear(2, 2), X), Unsupported, "has no denoiser with a schedule"),
    "no weights": (lambda: train().fit(Oracle.ring(3, VP()), X), Unsupported, "no weights to train"),
    "the bound without a chain": (lambda: train(loss=BoundLoss()).fit(a_score(), X), Unsupported, "links of a chain"),
    "hybrid without a variance": (
        lambda: train(loss=HybridLoss()).fit(DDPM(Network(PointNetwork(2), Betas.cosine(5)), (2,), 5), X),
        Unsupported,
        "the denoiser tells none",
    ),
    "a chain that ends with noise": (
        lambda: DDPM(Network(PointNetwork(2), Learned()), (2,), 5),
        ValueError,
        "A chain ends with data, but Learned has noise",
    ),
    "no loss": (lambda: train(loss="simple").fit(a_score(), X), TypeError, "rows\\(module, x, context\\)"),
    "a class for a loss": (lambda: train(loss=SimpleLoss).fit(a_score(), X), TypeError, "must be an object"),
    "a weighting by name": (lambda: SimpleLoss("min-snr"), TypeError, "such as MinSNR"),
    "times by name": (lambda: SimpleLoss(times="uniform"), TypeError, "such as LogNormal"),
    "a decay of one": (lambda: train(average=1.0).fit(a_score(), X), ValueError, "a decay lies between 0 and 1"),
    "a width of a half": (lambda: PowerAverage(0.5), ValueError, "below 0.288"),
    "too large a batch": (lambda: train(batch_size=97).fit(a_score(), X), ValueError, "has 96 rows"),
    "a start": (lambda: train(start={"x": 0.0}).fit(a_score(), X), Unsupported, "leave start= out"),
}


@pytest.mark.parametrize(("call", "kind", "sentence"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_is_refused_before_the_first_step(
    call: Callable[[], Any], kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        call()


# ---------------------------------------------------------------------------------------- saved, and drawn from
MODELS: dict[str, Callable[[], Any]] = {
    "ScoreModel": lambda: ScoreModel(Network(PointNetwork(2, width=8), EDM(), "preconditioned"), (2,), steps=4),
    "DDPM": lambda: DDPM(Network(PointNetwork(2, width=8), Betas.linear(30)), (2,), 30),
    "EnergyModel": lambda: EnergyModel((2,), hidden=(8,), moves=10),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_fit_draws_as_the_fitted_model(name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, other = MODELS[name](), MODELS[name]()
    loss = SlicedLoss() if name == "EnergyModel" else SimpleLoss()
    posterior = train(steps=3, loss=loss).fit(model, 1000.0 + 5.0 * X)
    posterior.save(tmp_path / "fit")
    assert not [warning for warning in recwarn if "pointwise" in str(warning.message)]
    loaded = Posterior.load(tmp_path / "fit", other, 1000.0 + 5.0 * X)
    for key, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key
    assert posterior.predict()["x"].shape == loaded.predict()["x"].shape == (1, 1, len(X), 2)
    with pytest.raises(ValueError, match="was given no data"):
        Posterior.load(tmp_path / "fit", other, None, size=5).predict(size=4)


@pytest.mark.parametrize("is_named", [False, True], ids=["by position", "by name"])
@pytest.mark.parametrize("name", ["ScoreModel", "DDPM"])
def test_a_conditional_model_is_drawn_from_under_its_labels(name: str, is_named: bool) -> None:
    network = PointNetwork(2, width=8, classes=3)
    model: Any = (
        DDPM(Network(network, Betas.linear(30)), (2,), 30)
        if name == "DDPM"
        else ScoreModel(Network(network, EDM(), "preconditioned"), (2,), steps=2)
    )
    labels = torch.arange(len(X)) % 3
    fit = train(steps=2)
    posterior = fit.fit(model, X, context=labels) if is_named else fit.fit(model, X, labels)
    assert posterior.predict()["x"].shape == (1, 1, len(X), 2)
    assert posterior.predict(context=labels[:7])["x"].shape == posterior.predict(None, labels[:7])["x"].shape == (1, 1, 7, 2)
    assert model.sample(context=labels[:4]).shape == (4, 2)


class Root(nn.Module):
    """Has no slope where its weight is 0, though it is finite there."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        return x + torch.where(self.weight > 0, self.weight.sqrt(), self.weight)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    model = ScoreModel(Network(Root(), EDM(), "preconditioned"), (2,), steps=2)
    train(steps=3).fit(model, X)
    assert float(model.denoiser.network.weight.detach()) == 0.0
