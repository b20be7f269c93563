"""Which labels of a program are exchangeable: those of its components, and nothing that has a place of its own."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import Gibbs
from inference.program import Program
from inference.symmetry import exchangeable

Y = torch.tensor([-2.1, -1.9, 2.2, 1.8, 2.0], dtype=torch.float64)


def labelled(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(y.new_ones(2)))
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 3.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)


def summed_out(y: Tensor) -> None:
    """No site holds a label, but the components compete for every row."""
    weights = pyro.sample("weights", dist.Dirichlet(y.new_ones(2)))
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mean, 1.0)), obs=y)


def ordered_by_prior(y: Tensor) -> None:
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(y.new_tensor([-1.0, 1.0]), 3.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(y.new_ones(2)))
        pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)


def new_rows(y: Tensor) -> None:
    """Values that have not been seen yet: all alike, and each a row of its own."""
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 3.0))
    with pyro.plate("new", 3):
        pyro.sample("x", dist.Normal(mean, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def effects(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 3.0))
    with pyro.plate("groups", len(y)):
        effect = pyro.sample("effect", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(effect, 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "symmetry"),
    [
        (labelled, {"weights": 0, "mean": 0, "z": None}),
        (summed_out, {"weights": 0, "mean": 0}),
        (ordered_by_prior, {}),
        (new_rows, {}),
        (effects, {}),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_components_are_exchangeable_and_places_are_not(
    program: Callable[[Tensor], None], symmetry: dict[str, int | None], device: torch.device
) -> None:
    assert exchangeable(Program(program, (Y.to(device),))) == symmetry


def test_the_point_of_a_place_is_its_mean(device: torch.device) -> None:
    """Matched to a pivot, three draws that are alike would be sorted; their means are one number."""
    posterior = Gibbs(chains=4, warmup=10, draws=50, seed=0, progress=False).fit(new_rows, Y.to(device))
    torch.testing.assert_close(posterior.point()["x"], posterior.draws["x"].mean((0, 1)))
