"""Of very many rows a part shows the structure of a program: what is found is what a look at all of them finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import inference.program
from inference import EM
from inference.program import Program
from inference.symmetry import exchangeable
from pyro_genmodels import GMM
from pyro_genmodels.distributions import MarkovChain

ROWS = 16_400
X = torch.randn(ROWS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GAPPY = torch.where(torch.arange(ROWS)[:, None] == ROWS - 3, torch.nan, X)
LABEL = torch.arange(ROWS) % 3


def rows(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(mean + z[..., None], 1.0).to_event(1), obs=x)


def two(label: Tensor, x: Tensor) -> None:
    with pyro.plate("groups", 3):
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean[label], 1.0), obs=x[:, 0])
        pyro.deterministic("shifted", x[:, 1] + mean[label])


def switch(x: Tensor) -> None:
    """As many choices as rows."""
    at = pyro.sample("at", dist.Categorical(logits=torch.zeros(len(x), dtype=x.dtype)))
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(torch.where(torch.arange(len(x)) < at, *mean), 1.0), obs=x[:, 0])


def inducing(x: Tensor) -> None:
    """A plate whose size follows that of the data, but is not equal to it."""
    points = x[:: max(1, len(x) // 10), 0]
    with pyro.plate("points", len(points)):
        height = pyro.sample("height", dist.Normal(points, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(height.mean(), 1.0), obs=x[:, 0])


def standardised(x: Tensor) -> None:
    """What is observed of a row depends on the other rows."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=(x[:, 0] - x[:, 0].mean()) / x[:, 0].std())


def branching(x: Tensor) -> None:
    """Another site where an entry is missing, which only the last rows show."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(x)):
        if bool(x.isnan().any()):
            pyro.sample("seen", dist.Bernoulli(0.5), obs=(~x[:, 0].isnan()).to(x.dtype))
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0].nan_to_num())


def bounded(x: Tensor) -> None:
    """A support that follows a latent site."""
    top = pyro.sample("top", dist.Pareto(5.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Uniform(0.0, top), obs=x[:, 0].abs())


def fixed(x: Tensor) -> None:
    """Written for just these rows."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


def looked_up(table: Tensor, index: Tensor) -> None:
    """The first argument has no rows of data, but what they point to."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(index)):
        pyro.sample("x", dist.Normal(mean, 1.0), obs=table[index, 0])


def states(x: Tensor) -> None:
    move = torch.full((2, 2), 0.5, dtype=x.dtype)
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    z = pyro.sample("z", MarkovChain(move[0], move, len(x)))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean[z], 1.0), obs=x[:, 0])


def no_plate(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x)]).to_event(1), obs=x[:, 0])


CASES: dict[str, tuple[Callable[[], Any], tuple[Tensor, ...], bool]] = {  # program, its data, whether a part suffices
    "rows": (lambda: rows, (X,), True),
    "two": (lambda: two, (LABEL, X), True),
    "switch": (lambda: switch, (X,), True),
    "inducing": (lambda: inducing, (X,), True),
    "standardised": (lambda: standardised, (X,), True),
    "GMM": (lambda: GMM(2), (X,), True),
    "GMM with a gap": (lambda: GMM(2), (GAPPY,), True),
    "branching": (lambda: branching, (GAPPY,), False),
    "bounded": (lambda: bounded, (X,), True),
    "fixed": (lambda: fixed, (X,), False),
    "looked up": (lambda: looked_up, (X, torch.arange(ROWS - 50, ROWS)), False),
    "states": (lambda: states, (X,), False),
    "no plate": (lambda: no_plate, (X,), False),
}


def facts(site: Any) -> dict[str, Any]:
    fields = {field.name: getattr(site, field.name) for field in dataclasses.fields(site)}
    return fields | {"support": str(site.support), "choices": None if site.choices is None else site.choices.tolist()}


@pytest.mark.parametrize("name", CASES)
def test_a_part_of_the_rows_shows_what_all_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data, suffices = CASES[name]
    few = Program(make(), data)
    monkeypatch.setattr(inference.program, "_MANY_ROWS", ROWS + 1)
    whole = Program(make(), data)
    assert (few.part is not None) == suffices
    assert whole.part is None
    for ours, theirs in ((few.latents, whole.latents), (few.observed_sites, whole.observed_sites)):
        assert [facts(site) for site in ours.values()] == [facts(site) for site in theirs.values()]
    for fact in ("batch_shapes", "frames", "deterministic", "factors", "nesting", "row_plates", "row_loops", "dependence"):
        assert getattr(few, fact) == getattr(whole, fact), fact
    for fact in ("knows_rows", "finite", "continuous", "dims", "rows", "dtype", "augmented", "leaf_of"):
        assert getattr(few, fact) == getattr(whole, fact), fact
    for site, value in whole.observed.items():
        torch.testing.assert_close(few.observed[site], value, rtol=0.0, atol=0.0, equal_nan=True)
    assert exchangeable(few) == exchangeable(whole)


@pytest.mark.parametrize("last", [2.0, -1.0])
def test_data_outside_the_support_are_found_in_the_last_row(last: float) -> None:
    def coins(x: Tensor) -> None:
        fairness = pyro.sample("fairness", dist.Beta(1.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(fairness), obs=x)

    x = torch.ones(ROWS)
    x[-1] = last
    with pytest.raises(ValueError, match=rf"1 of its data lie outside.*at \({ROWS - 1},\)"):
        Program(coins, (x,))


def test_labels_given_to_a_few_rows_are_not_exchangeable() -> None:
    """The rows that tell the components apart are the last ones."""

    def mixture(x: Tensor, label: Tensor) -> None:
        with pyro.plate("components", 2):
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.full((2,), 0.5, dtype=x.dtype)))
            pyro.sample("x", dist.Normal(mean[z], 1.0), obs=x)
            pyro.sample("seen", dist.Categorical(torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=x.dtype)[z]).mask(label >= 0),
                        obs=label.clamp(min=0))  # fmt: skip

    label = torch.full((ROWS,), -1)
    assert exchangeable(Program(mixture, (X[:, 0], label))).keys() == {"mean", "z"}
    label[-1] = 1
    assert exchangeable(Program(mixture, (X[:, 0], label))) == {}


def test_a_mini_batch_step_finds_the_components_of_very_many_rows() -> None:
    """Pilots see five thousand rows; the truth is 30 standard deviations apart."""
    truth = torch.tensor([[-15.0, 0.0], [15.0, 0.0]], dtype=torch.float64)
    x = X + truth[torch.arange(ROWS) % 2]
    backend = EM(steps=20, batch_size=2_000, seed=0, progress=False, standard_errors=False, keep=("means", "weights"))
    point = backend.fit(GMM(2, "diagonal"), x).point()
    order = point["means"][:, 0].argsort()
    torch.testing.assert_close(point["means"][order], truth, rtol=0.0, atol=0.1)  # 6 standard errors of a batch's mean
    torch.testing.assert_close(point["weights"], torch.full((2,), 0.5, dtype=torch.float64), rtol=0.0, atol=0.02)
