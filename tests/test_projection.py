"""Sums over rows by coefficients are the sums over the rows, and cost no more for more rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.func import grad_and_value, vmap
from torch.utils._pytree import tree_flatten

from inference import HMC, Gibbs
from inference.density import Unconstrained
from inference.graphs import elements, fold, merge
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program
from inference.projection import _first_of_each, project
from inference.recording import draft
from inference.rows import log_sum

ROWS, COLUMNS, CHAINS = 400, 3, 5


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    with isolated(0), reproducible(torch.float64), quiet():
        yield


def table(rows: int = ROWS) -> tuple[Tensor, Tensor]:
    noise = torch.Generator().manual_seed(1)
    x = torch.randn(rows, COLUMNS, generator=noise, dtype=torch.float64)
    return x, x.sum(-1) + 0.5 * torch.randn(rows, generator=noise, dtype=torch.float64)


X, Y = table()
WIDE = torch.cat([X * k for k in range(1, 101)], 1) ** 2  # more columns than a quarter of the rows


def projected(function: Callable[..., Any], *inputs: Tensor) -> tuple[int, int]:
    """Elements that a graph makes before and after, whose values have been compared at two inputs."""
    before, after = fold(merge(draft(function, inputs))), fold(merge(draft(function, inputs)))
    project(after)
    graph = fold(merge(after)).written()
    for factor in (1.0, 0.5):
        at = [x * factor for x in inputs]
        torch.testing.assert_close(graph(*at), function(*at), rtol=1e-12, atol=1e-12)
    return elements(before), elements(after)


def chains(*shape: int) -> Tensor:
    return torch.randn(CHAINS, *shape).abs() + 0.1


# ------------------------------------------------------------------------------- functions of b (chain, column), s (chain,)
def residuals(b: Tensor, s: Tensor) -> Tensor:
    return (((Y - b @ X.T) / s[:, None]) ** 2).sum(-1)


def as_a_normal(b: Tensor, s: Tensor) -> Tensor:
    return dist.Normal(b @ X.T, s[:, None]).log_prob(Y).sum(-1)


def mean_and_total(b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    return (b @ X.T).sum(), (Y * s[:, None] + s[:, None].exp()).sum((0, 1))


def kept(b: Tensor, s: Tensor) -> Tensor:
    return (b @ X.T + s[:, None]).sum(1, keepdim=True) * s[:, None]


def products(b: Tensor, s: Tensor) -> Tensor:
    return X.T @ (Y[:, None] - X @ b.T) / s


def both_ways(b: Tensor, s: Tensor) -> Tensor:
    linear = b @ X.T
    return (linear * (Y - 2.0 * linear) * s[:, None] - linear + 3.0).sum(-1)


def moved(b: Tensor, s: Tensor) -> Tensor:
    linear = (X @ b.T).t().reshape(CHAINS, 1, ROWS).permute(1, 2, 0).squeeze(0)  # (row, chain)
    return (linear**2 + s).unsqueeze(0).expand(2, ROWS, CHAINS).sum((0, 1))


def beside_what_is_not_linear(b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    linear = b @ X.T
    return linear.exp().sum(-1) * s, linear.square().sum(-1)


def of_two_lengths(b: Tensor, s: Tensor) -> Tensor:
    return (b @ X.T).square().sum(-1) + (b @ X[:100].T - Y[:100]).square().sum(-1) * s


def over_columns_too(b: Tensor, s: Tensor) -> Tensor:
    return ((X - b[:, None]) / s[:, None, None]).square().sum((1, 2))


def over_columns_first(b: Tensor, s: Tensor) -> Tensor:
    return ((X - b[:, None]) / s[:, None, None]).square().sum(-1).sum(-1)


def gradients(b: Tensor, s: Tensor) -> Any:
    def one(b: Tensor, s: Tensor) -> Tensor:
        return dist.Normal(X @ b, s).log_prob(Y).sum()

    return vmap(grad_and_value(one, argnums=(0, 1)))(b, s)


ALL_LINEAR = [
    residuals, as_a_normal, mean_and_total, kept, products, both_ways, moved, of_two_lengths, over_columns_too,
    over_columns_first, gradients,
]  # fmt: skip


@pytest.mark.parametrize("function", ALL_LINEAR)
def test_what_is_linear_in_the_rows_makes_none_of_them(function: Callable[..., Any]) -> None:
    before, after = projected(function, chains(COLUMNS), chains())
    assert before >= CHAINS * ROWS and after < 2 * ROWS


def test_what_is_not_linear_stays_and_what_is_beside_it_is_still_right() -> None:
    before, after = projected(beside_what_is_not_linear, chains(COLUMNS), chains())
    assert CHAINS * ROWS < after < before


@pytest.mark.parametrize(
    "function",
    [
        lambda b, s: (b @ X.T).exp().sum(-1),
        lambda b, s: (b @ X.T * Y * s[:, None]).square().sum(-1),  # of degree 4
        lambda b, s: (b @ X.T * (Y > 0)).sum(-1),
        lambda b, s: torch.where(Y > 0, b @ X.T, 0.0).sum(-1),
        lambda b, s: (b @ X.T).cumsum(-1).sum(-1),
        lambda b, s: (b @ X.T) * 2.0,
        lambda b, s: (torch.ones(ROWS, ROWS) @ (X @ b.T)).square().sum(0),
        lambda b, s: (b @ X.T).amax(-1) + (b @ X.T)[:, 3],
        lambda b, s: (X.sin() @ b.T).square().sum(0) / (s + Y[:, None]).sum(0),
        lambda b, s: (WIDE * b[0, 0] * s[0]).square().sum() + (b @ X.T).sum(),
    ],
)
def test_values_do_not_change_whatever_a_function_does_with_its_rows(function: Callable[..., Any]) -> None:
    projected(function, chains(COLUMNS), chains())


def test_residuals_are_as_exact_as_row_by_row_where_sums_of_squares_would_cancel() -> None:
    x, y = X * 1e-3 + 1e4, Y * 1e-3 + 3e4  # X'X and y'y have 16 digits, the residuals begin after the 14th

    def loss(b: Tensor) -> Tensor:
        return (y - b @ x.T).square().sum(-1)

    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    b = best + 1e-9 * torch.randn(CHAINS, COLUMNS)
    graph = fold(merge(draft(loss, [b])))
    assert project(graph)
    # a residual is known to the rounding of y: 3e4 · 2e-16 beside 1e-3
    torch.testing.assert_close(fold(merge(graph)).written()(b), loss(b), rtol=1e-7, atol=0.0)


def line(x: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(x.new_tensor(2.0)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, noise), obs=y)


def test_the_gradient_of_a_regression_costs_the_same_for_any_number_of_rows() -> None:
    sizes = []
    for rows in (500, 5000):
        program = Program(line, table(rows))
        coordinates = Unconstrained(program, program.continuous)
        staged = program.density.unconstrained(coordinates)
        for _ in range(20):
            staged(torch.randn(CHAINS, coordinates.size), {})
        sizes.append(staged.elements)
    assert sizes[0] == sizes[1] < 500 * CHAINS


@pytest.mark.parametrize("backend", [Gibbs(draws=400, warmup=100, seed=0), HMC(draws=400, warmup=200, seed=0)])
def test_the_posterior_of_a_regression_is_the_one_of_least_squares(backend: Any) -> None:
    # with a flat enough prior, E β is the least-squares estimate up to 4 Monte-Carlo errors, and shrinkage of 1e-4 of it
    posterior = backend.fit(line, X, Y)
    best = torch.linalg.lstsq(X, Y[:, None]).solution[:, 0]
    draws = posterior.draws["beta"]
    error = draws.std((0, 1)) / 20.0  # of 1,600 draws, a quarter of them independent at the least
    assert ((draws.mean((0, 1)) - best).abs() < 4.0 * error + 1e-4).all()


def test_a_graph_that_is_folded_twice_keeps_the_constants_of_both_times() -> None:
    def function(b: Tensor) -> Tensor:
        return (b * X.sin().sum(0) + X.cos().sum(0)).sum(-1) + (b @ X.T - Y).square().sum(-1) * Y.exp().sum()

    graph = fold(merge(draft(function, [chains(COLUMNS)])))
    assert project(graph)
    twice, at = fold(merge(fold(merge(graph)))).written(), chains(COLUMNS)
    torch.testing.assert_close(twice(at), function(at))


def test_all_tensors_of_a_graph_are_described() -> None:
    graph = fold(merge(draft(gradients, [chains(COLUMNS), chains()])))
    project(graph)
    graph = fold(merge(graph))
    made = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert made and all("val" in node.meta for node in made)
    leaves = tree_flatten(graph.written()(chains(COLUMNS), chains()))[0]
    assert [leaf.shape for leaf in leaves] == [(CHAINS, COLUMNS), (CHAINS,), (CHAINS,)]


def test_columns_that_are_equal_are_found_once() -> None:
    signed = torch.cat([X, -X], 1)
    tables = [torch.cat([X, X[:, :1]], 1), signed, X.float(), X.flip(0)]
    assert [places.tolist() for places in _first_of_each(tables)] == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [0, 1, 2]]
    assert [places.tolist() for places in _first_of_each([X[:, :1].expand(-1, 7)])] == [[0]]


def test_rows_that_only_an_operation_of_its_own_takes_need_no_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    def summed(eta: Tensor, c: Tensor) -> Tensor:
        return log_sum(X, eta, c)

    monkeypatch.setattr(torch.linalg, "qr", lambda *_: pytest.fail("a basis was made"))
    before, after = projected(summed, torch.randn(4, COLUMNS), torch.randn(4))
    assert before == after


def test_rows_may_be_a_result_themselves() -> None:
    before, after = projected(lambda b, s: (residuals(b, s), X), chains(COLUMNS), chains())
    assert after < before
