"""The rolled-up graph of a loop returns what the loop does, and hardly grows with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from inference import rerolling
from inference.density import Unconstrained
from inference.graphs import fold, functional, merge
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program
from inference.recording import draft
from inference.rerolling import reroll
from parameters import quick
from zoo import ZOO, Instance

STEPS = 24


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    with isolated(0), reproducible(torch.float64), quiet():
        yield


def rolled(function: Callable[..., Any], *inputs: Tensor) -> int:
    """Nodes that are left of a function, whose values have been compared at two inputs."""
    graph = fold(merge(reroll(fold(merge(draft(function, inputs))), inputs))).written()
    for factor in (1.0, 0.5):
        at = [x * factor if x.is_floating_point() else x for x in inputs]
        torch.testing.assert_close(graph(*at), function(*at), rtol=1e-12, atol=1e-12, equal_nan=True)
    return len(graph.graph.nodes)


# --------------------------------------------------------------------------------------------- functions with a loop
def elements(x: Tensor) -> Tensor:
    return torch.stack([x[..., t].exp() + t * 0 for t in range(STEPS)], -1)


def backwards(x: Tensor) -> Tensor:
    return torch.stack([2.0 * x[..., -1 - t].sin() for t in range(STEPS)], 0)


def every_second(x: Tensor) -> Tensor:
    return torch.stack([x[..., t].cos() for t in range(0, STEPS, 2)] * 2, -1)


def one_after_the_other(x: Tensor) -> list[Tensor]:
    return [x[..., t].exp() * x[..., t + 1] for t in range(STEPS - 1)]


def parts(x: Tensor) -> Tensor:
    sizes = [2, 1, *[2] * (STEPS // 2 - 3), 3]
    return torch.cat([part.softmax(-1) for part in x.split(sizes, -1)], -1)


def slices(x: Tensor) -> Tensor:
    return torch.stack([x[..., t : t + 3].prod(-1) for t in range(STEPS - 3)], -1)


def uneven(x: Tensor) -> Tensor:
    return torch.cat([x[..., : 1 + t % 3].exp() for t in range(STEPS)], -1)


def several_results(x: Tensor) -> list[Tensor]:
    found = [x[..., t : t + 4].max(-1) for t in range(STEPS - 4)]
    return [best.values * 2.0 for best in found] + [best.indices for best in found[::3]]


def repeated_terms(x: Tensor) -> Tensor:
    terms = [x[..., t % 5].exp() for t in range(STEPS)]
    total = terms[0]
    for term in [*terms[1:], terms[0], x[..., 0], terms[3]]:
        total = total + term
    return total


def recurrence(x: Tensor) -> Tensor:
    h, seen = x[..., 0], []
    for t in range(1, STEPS):
        h = 0.1 + 0.5 * h.tanh() + 0.2 * x[..., t]
        seen.append((0.5 * h).exp() * x[..., t])
    return torch.stack(seen, -1)


def two_recurrences(x: Tensor) -> Tensor:
    a, b, seen = x[..., 0], x[..., 1], []
    for t in range(1, STEPS):
        a, b = (a * b).sin() + x[..., t], (a - b).cos()
        seen.append(a.exp() - b.exp() * x[..., t])
    return torch.stack(seen, -1)


def in_place(x: Tensor) -> Tensor:
    total, seen = torch.zeros_like(x[..., 0]), []
    for t in range(STEPS):
        total += x[..., t]
        seen.append(total.clone().mul_(2.0).add_(1.0))
    return torch.stack([*seen, total], -1)


def written(x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(STEPS):
        out[..., t] = x[..., t].exp() + (out[..., t - 1] if t else 0.0)
    return out


def wrapped(x: Tensor) -> Tensor:
    """In place on a view: what it is a view of changes, too."""
    y = x + 0.5
    y[..., 0].add_(1.0)
    return torch.stack([y[..., t].log() for t in range(STEPS)], -1)


def picked(x: Tensor) -> Tensor:
    index = torch.arange(3)
    return torch.stack([x[..., index + t % 4].sum(-1) for t in range(STEPS)], -1)


def unrelated(x: Tensor) -> list[Tensor]:
    return [x.exp(), x.sin(), x[..., 0].exp().exp(), x.sum(-1)]


LOOPS = [
    elements, backwards, every_second, one_after_the_other, parts, slices, uneven, several_results, repeated_terms,
    recurrence, two_recurrences, in_place, written, wrapped, picked, unrelated,
]  # fmt: skip


@pytest.mark.parametrize("function", LOOPS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("with_gradient", [False, True], ids=["value", "gradient"])
def test_a_rolled_up_loop_returns_what_the_loop_does(
    function: Callable[[Tensor], Any], with_gradient: bool, device: torch.device
) -> None:
    x = 0.1 + torch.rand(3, STEPS, dtype=torch.float64, device=device)

    def total(row: Tensor) -> Tensor:
        found = function(row)
        return torch.stack([f.sum() * (i + 1.0) for i, f in enumerate(found if isinstance(found, list) else [found])]).sum()

    rolled(vmap(grad(total)) if with_gradient else vmap(function), x)


@pytest.mark.parametrize("function", [elements, backwards, every_second, slices, repeated_terms], ids=lambda f: f.__name__)
def test_nothing_is_left_of_a_loop(function: Callable[[Tensor], Tensor], device: torch.device) -> None:
    assert rolled(vmap(function), torch.rand(3, STEPS, dtype=torch.float64, device=device)) < 25


def test_integers_and_bools_are_rolled_up(device: torch.device) -> None:
    def function(z: Tensor, x: Tensor) -> Tensor:
        return torch.stack([torch.where(z[t] > 0, x.index_select(0, z[t : t + 1]), -x[t]).sum() for t in range(STEPS)])

    z = torch.arange(STEPS, device=device) % 4
    assert rolled(function, z, torch.rand(STEPS, dtype=torch.float64, device=device)) < 25


def test_an_operation_that_vmap_has_no_rule_for_stays_a_loop(device: torch.device) -> None:
    def function(z: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x.take(z[t : t + 2]).exp() for t in range(STEPS - 1)])

    rolled(function, torch.arange(STEPS, device=device) % 4, torch.rand(STEPS, dtype=torch.float64, device=device))


def test_inputs_of_one_shape_are_stacked(device: torch.device) -> None:
    def function(*rows: Tensor) -> Tensor:
        return torch.stack([row.exp().sum() for row in rows]).sum()

    rows = [torch.rand(4, dtype=torch.float64, device=device) for _ in range(STEPS)]
    assert rolled(function, *rows) < STEPS + 15


def test_one_element_of_many_inputs_is_picked_at_once(device: torch.device) -> None:
    def function(*rows: Tensor) -> Tensor:
        return torch.stack([(row[0].exp() * row[1]).sum() for row in rows]).sum()

    rows = [torch.rand(2, 4, dtype=torch.float64, device=device) for _ in range(STEPS)]
    assert rolled(function, *rows) < STEPS + 15


def test_large_results_are_not_held_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What each step makes of a large table is added up one after the other, as the program does it."""
    monkeypatch.setattr(rerolling, "_LARGEST_STACK", 1000)

    def total(x: Tensor, table: Tensor) -> Tensor:
        found = table * 0.0
        for t in range(STEPS):
            found = found + (table * x[t]).exp()
        return found

    x, table = (torch.rand(n, dtype=torch.float64, device=device) for n in (STEPS, 100))
    rolled(total, x, table)
    graph = reroll(fold(merge(draft(total, [x, table]))), [x, table])
    assert max(node.meta["val"].shape.numel() for node in graph.graph.nodes if "val" in node.meta) == 100


def test_a_sum_goes_before_what_is_linear(device: torch.device) -> None:
    """What every step looks up in one table is one sum of gradients, put into the table once."""

    def total(table: Tensor, x: Tensor) -> Tensor:
        return torch.stack([(table[torch.arange(3) + t % 2] * x[t]).sum() for t in range(STEPS)]).sum()

    inputs = torch.rand(5, dtype=torch.float64, device=device), torch.rand(STEPS, 3, dtype=torch.float64, device=device)
    graph = fold(merge(reroll(fold(merge(draft(grad(total), inputs))), inputs)))
    puts = [node for node in graph.graph.nodes if node.target is torch.ops.aten.index_put.default]
    assert len(puts) == 2 and all(node.meta["val"].shape == (5,) for node in puts)  # at two places in the table
    rolled(grad(total), *inputs)


@pytest.mark.parametrize("is_view", [False, True])
def test_what_is_in_place_stays_so_where_memory_is_shared(is_view: bool, device: torch.device) -> None:
    def function(x: Tensor) -> Tensor:
        y = x.exp()
        (y[:2] if is_view else y).add_(1.0)
        return y if is_view else y.exp()

    x = torch.rand(4, dtype=torch.float64, device=device)
    graph = functional(draft(function, [x])).written()
    torch.testing.assert_close(graph(x), function(x))
    torch.testing.assert_close(graph(x), function(x))


# ------------------------------------------------------------------------------------------------- programs with a loop
def hidden_chain(y: Tensor) -> None:
    moves = pyro.sample("moves", dist.Dirichlet(1.0 + 2.0 * torch.eye(3).to(y)).to_event(1))
    mean = pyro.sample("mean", dist.Normal(torch.arange(3).to(y), 3.0).to_event(1))
    z: Any = 0
    for t in range(len(y)):
        z = pyro.sample(f"z{t}", dist.Categorical(moves[z]))
        pyro.sample(f"y{t}", dist.Normal(mean[z], 1.0), obs=y[t])


def random_walk(y: Tensor) -> None:
    step, noise = pyro.sample("step", dist.HalfNormal(1.0)), pyro.sample("noise", dist.HalfNormal(1.0))
    x: Any = 0.0
    for t in range(len(y)):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, step))
        pyro.sample(f"y{t}", dist.Normal(x, noise), obs=y[t])


def vector_walk(y: Tensor) -> None:
    matrix = pyro.sample("matrix", dist.Normal(torch.zeros(2, 2).to(y), 1.0).to_event(2))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 2.0))
    x = torch.zeros(2).to(y)
    for t in range(len(y)):
        x = pyro.sample(f"x{t}", dist.MultivariateNormal(matrix @ x, scale_tril=factor))
        pyro.sample(f"y{t}", dist.Normal(x.sum(), 1.0), obs=y[t])


def proportions(y: Tensor) -> None:
    a, b = pyro.sample("a", dist.Gamma(2.0, 1.0)), pyro.sample("b", dist.Gamma(2.0, 1.0))
    for t in range(len(y)):
        rate = pyro.sample(f"rate{t}", dist.Beta(a, b))
        pyro.sample(f"y{t}", dist.Binomial(20, rate), obs=y[t].round())


def volatility(y: Tensor) -> None:
    """The states are a recurrence: h_t = μ + φ (h_{t−1} − μ) + s e_t."""
    scale, phi = pyro.sample("scale", dist.HalfCauchy(1.0)), pyro.sample("phi", dist.Beta(20.0, 1.5))
    h: Any = 0.0
    for t in range(len(y)):
        h = phi * h + scale * pyro.sample(f"e{t}", dist.Normal(0.0, 1.0))
        pyro.sample(f"y{t}", dist.Normal(0.0, (0.5 * h).exp()), obs=y[t])


def sizes(program: Callable[[Tensor], None], steps: int, device: torch.device) -> tuple[int, int]:
    """Operations of a program's gradient as it was recorded and after rolling up, whose values have been compared."""
    y = 1.0 + 10.0 * torch.rand(steps, dtype=torch.float64, device=device)
    known = Program(program, (y,))
    coordinates = Unconstrained(known, known.continuous)
    function = known.density.unconstrained(coordinates, known.finite).function

    def gradient(position: Tensor) -> Any:
        return vmap(lambda row: function(row, {}))(position)

    x = torch.randn(2, coordinates.size, dtype=torch.float64, device=device)
    before = fold(merge(draft(gradient, [x])))
    expected, count = before.written()(x), len(before.graph.nodes)
    graph = fold(merge(reroll(before, [x]))).written()
    torch.testing.assert_close(graph(x), expected, rtol=1e-10, atol=1e-10)
    return count, sum(node.op == "call_function" for node in graph.graph.nodes)


@pytest.mark.parametrize("program", quick([random_walk, vector_walk, proportions], [random_walk]), ids=lambda p: p.__name__)
def test_a_graph_does_not_grow_with_a_loop(program: Callable[[Tensor], None], device: torch.device) -> None:
    short, long = sizes(program, 40, device), sizes(program, 120, device)
    assert long[0] > 2 * short[0] and long[1] <= 1.05 * short[1]


@pytest.mark.slow
def test_a_chain_of_states_grows_with_its_logarithm(device: torch.device) -> None:
    counts = [sizes(hidden_chain, steps, device)[1] for steps in (32, 128, 512)]
    assert counts[2] - counts[1] < 1.2 * (counts[1] - counts[0])


def test_only_the_recurrence_grows(device: torch.device) -> None:
    (_, short), (_, long) = sizes(volatility, 40, device), sizes(volatility, 120, device)
    assert (long - short) / 80 < 12  # operations a step, forward and backward, of about thirty


@pytest.mark.parametrize("instance", [i for i in ZOO if "HMC" not in i.refused], ids=lambda instance: instance.name)
def test_every_program_keeps_its_density(instance: Instance) -> None:
    """Loops or none: the rewrite is right for every graph."""
    program = Program(instance.program, instance.data)
    coordinates = Unconstrained(program, program.continuous)
    function = program.density.unconstrained(coordinates, program.finite).function

    def gradient(position: Tensor) -> Any:
        return vmap(lambda row: function(row, {}))(position)

    x = torch.randn(2, coordinates.size, dtype=torch.float64)
    expected = fold(merge(draft(gradient, [x]))).written()(x)
    graph = fold(merge(reroll(fold(merge(draft(gradient, [x]))), [x]))).written()
    torch.testing.assert_close(graph(x), expected, rtol=1e-9, atol=1e-9, equal_nan=True)
