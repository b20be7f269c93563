"""Training of networks by SVI: batches, transforms, schedules, averages, early stopping, precision, and what goes wrong."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from inference import ELBO, IWELBO, SVI, Gibbs, Unsupported
from inference.handlers import reproducible
from inference.program import Program

ROWS, WIDTH = 90, 6
GREY = torch.rand(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))
BITS = (GREY > 0.5).float()


class Binary(nn.Module):
    """z ~ N(0, I), x_i ~ Bernoulli(network(z)_i)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, WIDTH))
        self.seen: list[Tensor] = []

    def model(self, x: Tensor | None = None, size: int | None = None) -> None:
        rows = size if x is None else len(x)
        assert rows is not None
        weight = self.decoder[0].weight
        with pyro.plate("rows", rows):
            z = pyro.sample("z", dist.Normal(weight.new_zeros(rows, 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
        assert x is not None
        with pyro.plate("rows", len(x)):
            location, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(location, log_scale.exp()).to_event(1))


def svi(**settings: Any) -> SVI:
    return SVI(**{"steps": 60, "batch_size": 30, "draws": 1, "seed": 0, "learning_rate": 1e-2, "progress": False} | settings)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def test_a_step_leaves_no_tensor_behind() -> None:
    """Thousands of small ones, each between the large ones of two steps, would keep the heap from closing up."""
    alive = []

    def count(step: int, info: Any) -> None:
        if step in (100, 200):
            gc.collect()
            alive.append(sum(type(found) is Tensor for found in gc.get_objects()))

    history = svi(steps=201, callbacks=(count,)).fit(Binary(), BITS).history
    assert alive[0] == alive[1]
    assert history["loss"].shape == (201,) and history["loss"].dtype == torch.float32


def test_rows_are_binarised_anew_at_every_visit() -> None:
    """And differently at each, in a recorded graph, too."""
    seen = []

    def binarised(x: Tensor) -> Tensor:
        made = torch.bernoulli(x)
        if len(x) == ROWS:
            seen.append(made)
        return made

    model = Binary()
    svi(batch_size=None, steps=200, transform=binarised).fit(model, GREY)  # a recorded graph draws, too
    history = svi(transform=torch.bernoulli).fit(Binary(), GREY).history["loss"]
    assert history.isfinite().all() and len({float(value) for value in history}) == len(history)
    first, second = seen[0], seen[1]
    assert set(first.unique().tolist()) == {0.0, 1.0} and not torch.equal(first, second)


class Clusters(Binary):
    """The same, z from one of three clusters, which are summed out."""

    def model(self, x: Tensor | None = None, size: int | None = None) -> None:
        rows = size if x is None else len(x)
        assert rows is not None
        with pyro.plate("rows", rows):
            c = pyro.sample("c", dist.Categorical(logits=self.decoder[0].weight.new_zeros(3)))
            z = pyro.sample("z", dist.Normal(c.unsqueeze(-1) - torch.ones(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)


@pytest.mark.parametrize("batch", [30, None])
def test_a_finite_site_is_summed_out_of_what_is_binarised_anew(batch: int | None) -> None:
    posterior = svi(batch_size=batch, transform=torch.bernoulli, bound=IWELBO(3)).fit(Clusters(), GREY)
    assert posterior.history["loss"].isfinite().all() and set(posterior.draws["c"].unique().tolist()) <= {0, 1, 2}


def test_a_transform_may_make_numbers_of_bytes() -> None:
    byte = (255 * GREY).to(torch.uint8)
    to_bits = lambda x: torch.bernoulli(x.float() / 255)  # noqa: E731
    posterior = svi(transform=to_bits).fit(Binary(), byte)
    assert posterior.history["loss"].isfinite().all() and posterior.draws["z"].shape == (1, 1, ROWS, 2)


def test_a_file_in_memory_map_trains_as_a_tensor_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, BITS.numpy())
    mapped = np.load(path, mmap_mode="r")
    one, other = (svi().fit(Binary(), x).history["loss"] for x in (BITS, torch.from_numpy(np.asarray(mapped).copy())))
    assert torch.equal(one, other)
    assert torch.equal(svi().fit(Binary(), mapped).history["loss"], one)


@pytest.mark.parametrize("is_computed", [False, True])
def test_only_a_batch_is_looked_at_but_all_data_are_checked(is_computed: bool) -> None:
    """The program runs on all rows only where it computes what it observes: what comes as it is can be seen without it."""
    rows = []

    class Counting(Binary):
        def model(self, x: Tensor | None = None, size: int | None = None) -> None:
            assert x is not None
            rows.append(len(x))
            super().model(x * 1.0 if is_computed else x)

    program = Program(Counting(), (BITS,), follow=True, batch_size=10)
    assert program.latents["z"].shape == (ROWS, 2) and program.latents["z"].plates[0].size == ROWS
    assert program.observed["x"].shape == BITS.shape and torch.equal(program.observed["x"], BITS)
    assert set(rows) - {ROWS} == {10, 11} and rows.count(ROWS) == is_computed
    bad = BITS.clone()
    bad[71, 3] = 2.0
    with pytest.raises(ValueError, match=r"outside the support .*the first, at \(71,\)"):
        Program(Counting(), (bad,), follow=True, batch_size=10)
    missing = BITS.clone()
    missing[80, 1] = torch.nan
    Program(Counting(), (missing,), follow=True, batch_size=10)


def test_a_support_that_follows_the_rows_is_asked_of_the_program() -> None:
    """The limits of the row that is amiss are those of that row, not of the ones in the first batch."""

    class Limited(Binary):
        def model(self, x: Tensor | None = None, limits: Tensor | None = None) -> None:  # type: ignore[override]
            assert x is not None and limits is not None
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Uniform(-1.0 - limits, self.decoder(z).sum(-1).exp() + limits), obs=x)

    x, limits = torch.ones(ROWS), torch.full((ROWS,), 2.0)
    Program(Limited(), (x, limits), follow=True, batch_size=10)
    x[71] = 1e6  # inside, where z is far out
    Program(Limited(), (x, limits), follow=True, batch_size=10)
    x[71] = -3.5
    with pytest.raises(ValueError, match=r"(?s)1 of its data lie outside the support .* the first, at \(71,\), is -3.5"):
        Program(Limited(), (x, limits), follow=True, batch_size=10)
    limits[71] = 3.0
    Program(Limited(), (x, limits), follow=True, batch_size=10)


def test_data_that_a_transform_does_not_take_are_refused() -> None:
    class Looking(Binary):
        def prepare(self, x: Tensor) -> None: ...

    with pytest.raises(ValueError, match=r"transform= does not take these data: .*p_in"):
        svi(transform=torch.bernoulli).fit(Looking(), 2.0 * GREY)


def test_a_transform_is_made_of_all_rows_once() -> None:
    """What is checked, kept as observed, and read by the guide at the end is one and the same."""
    whole, read = [], []

    def binarised(x: Tensor) -> Tensor:
        if len(x) == ROWS:
            whole.append(torch.bernoulli(x))
            return whole[-1]
        return torch.bernoulli(x)

    class Looking(Binary):
        def prepare(self, x: Tensor) -> None:
            self.prepared = x

        def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
            read.append(x)
            super().guide(x)

    model = Looking()
    posterior = svi(transform=binarised).fit(model, GREY)
    assert len(whole) == 1 and torch.equal(model.prepared, whole[0])
    assert torch.equal(posterior.observed["x"], whole[0]) and torch.equal(read[-1], whole[0])


def test_a_large_value_outside_of_the_support_is_told_in_short() -> None:
    def program(x: Tensor) -> None:
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=shift).expand([28, 28]).to_event(2), obs=x)

    x = torch.zeros(3, 28, 28)
    x[1] = torch.linspace(0.0, 1.0, 784).reshape(28, 28)
    with pytest.raises(
        ValueError, match=r"the first, at \(1,\), is 784 numbers from 0 to 1\. Binarise them, .*bernoulli\)\.$"
    ):
        Program(program, (x,))


def test_draws_of_rows_are_those_of_the_guide_in_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Means of 4,000 draws within 5 standard errors of the encoder's; parts of 32 rows."""
    monkeypatch.setattr("inference.svi._ROWS", 32)
    model = Binary()
    draws = svi(draws=4000).fit(model, BITS).draws["z"][0]
    location, log_scale = model.encoder(BITS).detach().chunk(2, -1)
    error = log_scale.exp() / 4000**0.5
    assert ((draws.mean(0) - location).abs() < 5 * error).all()


def test_what_would_not_be_kept_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.buffers.LARGEST", 1000)
    posterior = svi(draws=1000).fit(Binary(), BITS)
    assert not posterior.draws and any("keep=" in finding for finding in posterior.info["findings"])


def test_a_prediction_draws_from_the_guide_what_was_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the prior: a trained model says of its own rows more than of any; the gap is 20 standard errors."""
    monkeypatch.setattr("inference.buffers.LARGEST", 1000)
    x = BITS[:2].repeat_interleave(45, 0)
    posterior = svi(steps=1500).fit(Binary(), x)
    right = (posterior.predict()["x"][0, 0] == x).float().mean()
    assert right > 0.85


def test_a_sampler_that_kept_too_little_predicts_nothing_at_the_fitted_data() -> None:
    def mean(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        s = pyro.sample("s", dist.Gamma(1.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(m, s), obs=x)

    posterior = Gibbs(chains=2, warmup=5, draws=5, seed=0, keep=["m"], progress=False).fit(mean, GREY[:, 0])
    with pytest.raises(ValueError, match=r"needs the draws of 's', which were not kept"):
        posterior.predict()


def test_a_gradient_is_cut_down_to_its_largest_norm() -> None:
    moves = []
    for clip in (None, 1e-3):
        model = Binary()
        before = weights(model)
        descent = functools.partial(torch.optim.SGD, lr=1.0)
        svi(steps=1, clip_norm=clip, optimiser=descent, scheduler=constant).fit(model, BITS)
        moves.append(float((weights(model) - before).norm()))
    assert moves[0] > 1.0 and abs(moves[1] - 1e-3) < 1e-6


def constant(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)


def test_schedules_and_optimisers_are_those_of_torch() -> None:
    """A hand-written loop with the same optimiser and schedule, at the same noise, ends at the same weights."""
    model = Binary()
    adam = functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)
    halved = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=5, gamma=0.5)
    rates: list[float] = []

    def watched(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        schedule = halved(optimiser)
        step = schedule.step
        schedule.step = lambda *a: (rates.append(optimiser.param_groups[0]["lr"]), step(*a))[1]  # type: ignore[method-assign]
        return schedule

    svi(steps=12, optimiser=adam, scheduler=watched).fit(model, BITS)
    assert rates == pytest.approx([0.02] * 5 + [0.01] * 5 + [0.005] * 2)


def test_grey_values_of_a_coin_are_told_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"outside the support.*SVI\(transform=torch.bernoulli\)"):
        svi().fit(Binary(), GREY)


def test_schedules_of_any_kind_are_stepped_and_one_that_waits_for_a_number_is_refused() -> None:
    kinds = torch.optim.lr_scheduler

    def chained(optimiser: torch.optim.Optimizer) -> Any:
        return kinds.ChainedScheduler([kinds.ExponentialLR(optimiser, 0.9), kinds.ConstantLR(optimiser, 1.0)])

    assert svi(steps=7, scheduler=chained).fit(Binary(), BITS).history["loss"].isfinite().all()
    with pytest.raises(Unsupported, match=r"ReduceLROnPlateau.*patience="):
        svi(scheduler=kinds.ReduceLROnPlateau).fit(Binary(), BITS)


def test_what_a_program_computes_from_late_rows_is_what_it_observes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part of the data looks like an argument, the rest does not."""
    monkeypatch.setattr("inference.program._CHUNK", 30)
    x = GREY.clone()
    x[60:] += 1.0

    class Clipped(Binary):
        def model(self, x: Tensor | None = None, size: int | None = None) -> None:
            assert x is not None
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x.clamp(max=1.0))

    program = Program(Clipped(), (x,), follow=True, batch_size=30)
    assert torch.equal(program.observed["x"], x.clamp(max=1.0))


def test_the_average_of_the_weights_takes_their_place() -> None:
    path: list[Tensor] = []
    model = Binary()
    svi(steps=40, average=0.9, callbacks=(lambda *_: path.append(weights(model)) and None,)).fit(model, BITS)
    expected = path[0]
    for step, now in enumerate(path[1:], 2):
        decay = min(0.9, (step - 1) / step)
        expected = decay * expected + (1 - decay) * now
    torch.testing.assert_close(weights(model), expected)


def test_training_stops_when_the_validation_bound_does_not_grow_and_takes_the_best_weights() -> None:
    few = BITS[:20]
    model = Binary()
    backend = svi(steps=3000, batch_size=10, learning_rate=3e-2, validation=BITS[40:], validate_every=20, patience=3)
    posterior = backend.fit(model, few)
    seen = posterior.history["validation"]
    assert len(posterior.history["loss"]) < 3000 and int(seen.argmax()) == len(seen) - 4
    again = svi(steps=1, batch_size=10, learning_rate=1e-12, validation=BITS[40:], validate_every=1).fit(model, few)
    torch.testing.assert_close(again.history["validation"][0], seen.max())


@pytest.mark.parametrize("bound", [ELBO(), IWELBO(4)], ids=["ELBO", "IWELBO"])
def test_half_precision_is_of_networks_only(bound: Any) -> None:
    kinds = set()

    class Watching(Binary):
        def model(self, x: Tensor | None = None, size: int | None = None) -> None:
            super().model(x, size)

        def guide(self, x: Tensor | None = None, size: int | None = None) -> None:
            assert x is not None
            kinds.add(self.encoder(x).dtype)
            super().guide(x)

    plain = svi(bound=bound).fit(Binary(), BITS).history["loss"]
    half = svi(bound=bound, autocast=torch.bfloat16).fit(Watching(), BITS).history["loss"]
    assert kinds == {torch.float32} and not torch.equal(plain, half)
    assert (plain - half).abs().max() < 0.02 * plain.abs().max()


@pytest.mark.parametrize("kill", [35, 60])
def test_a_run_that_is_gone_on_with_ends_as_if_it_had_not_stopped(tmp_path: Path, kill: int) -> None:
    """In the middle of a pass, with averages, validation and importance weights."""
    options = {
        "steps": 80, "bound": IWELBO(3), "average": 0.95, "validation": BITS[:20], "validate_every": 7, "patience": 50,
        "clip_norm": 5.0, "transform": torch.bernoulli, "draws": 3,
    }  # fmt: skip
    whole_model, model = Binary(), Binary()
    whole = svi(**options).fit(whole_model, GREY)

    class Stop(Exception): ...

    def stop(step: int, info: Any) -> None:
        if step == kill:
            raise Stop

    with pytest.raises(Stop):
        svi(**options, checkpoint=tmp_path, checkpoint_every=10, callbacks=(stop,)).fit(model, GREY)
    resumed = Binary()
    posterior = svi(**options).resume(tmp_path, resumed, GREY)
    for name, values in whole.history.items():
        assert torch.equal(posterior.history[name], values), name
    assert torch.equal(weights(resumed), weights(whole_model))
    assert torch.equal(posterior.draws["z"], whole.draws["z"])


def test_a_bound_that_is_lost_names_the_layer_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    model = Binary()

    def spoil(step: int, info: Any) -> None:
        if step == 40:
            with torch.no_grad():
                model.decoder[0].weight.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"not been finite since step 41.*'decoder.0' \(Linear\).*checkpoint"):
        svi(steps=400, checkpoint=tmp_path, checkpoint_every=10, callbacks=(spoil,)).fit(model, BITS)
    fresh = Binary()
    svi(steps=400).resume(tmp_path, fresh, BITS)
    assert weights(fresh).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"batch_size": 200}, "batch_size is 200, but Binary has 90 rows"), ({"clip_norm": 0.0}, "clip_norm"),
        ({"average": 1.5}, "average"), ({"patience": 3}, "need validation="), ({"autocast": torch.float64}, "autocast"),
        ({"transform": lambda x: x[:3]}, "as many rows as it is given"), ({"transform": lambda x: None}, "gave 'NoneType'"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        svi(**settings).fit(Binary(), BITS)


def test_progress_is_told_in_nats_a_row() -> None:
    backend = svi()
    program = Program(Binary(), (BITS,), follow=True, batch_size=30)
    with reproducible(program.dtype):
        _, info = backend.step(backend.init(program), program)
    assert backend.shown(info, program).startswith("bound -") and backend.shown(info, program).endswith("a row")


@pytest.mark.slow
def test_a_compiled_step_is_the_step() -> None:
    plain, compiled = (svi(steps=40, compile=flag).fit(Binary(), BITS).history["loss"] for flag in (False, True))
    torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-4)


def test_draws_of_data_that_are_binarised_anew_come_in_blocks() -> None:
    draws = svi(batch_size=None, transform=torch.bernoulli, draws=100).fit(Binary(), GREY).draws["z"]
    assert draws.shape == (1, 100, ROWS, 2) and bool((draws.std(1) > 0).all())
