"""Normal rows as matrix products have the log-probabilities of rows one by one, or say that they have not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.func import grad, grad_and_value, jacrev, vmap

import inference.rows
from inference import EM, HMC
from inference.density import Density, Unconstrained
from inference.handlers import isolated
from inference.program import Program
from inference.rows import Kind, Known, Rows, log_sum
from inference.staging import Staged
from parameters import quick
from pyro_genmodels import GMM
from pyro_genmodels.classical.gmm import COVARIANCES

GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn(700, 3, generator=GENERATOR, dtype=torch.float64)
X = torch.where(torch.arange(700)[:, None] < 400, NOISE * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 100.0, 3.0]),
                0.3 * NOISE + torch.tensor([4.0, 90.0, 2.0])).double()  # fmt: skip


@pytest.fixture(autouse=True)
def run(inside_a_run: None) -> Iterator[None]:
    yield


def vectors(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_zeros(3), 100.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(x.new_zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean, spread).to_event(1), obs=x)


def scalars(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal(mean, 2.0), obs=x[:, 0])


def columns(x: Tensor) -> None:
    """The rows are not the last dimension."""
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
    with pyro.plate("column", 1, dim=-1), pyro.plate("rows", len(x), dim=-2):
        pyro.sample("x", dist.Normal(mean, 2.0), obs=x[:, :1])


def labelled(x: Tensor) -> None:
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
        spread = pyro.sample("spread", dist.LogNormal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(x.new_ones(2)))
        pyro.sample("x", dist.Normal(mean[z], spread[z]), obs=x[:, 1])


def without_a_plate(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
    pyro.sample("x", dist.Normal(mean, 2.0), obs=x[:, 0])


PROGRAMS: dict[str, Any] = {
    **{program.__name__: program for program in (vectors, scalars, columns, labelled, without_a_plate)},
    "scaled": poutine.scale(vectors, scale=0.5),
    **{covariance: GMM(3, covariance) for covariance in COVARIANCES},
}


def densities(program: Any, x: Tensor) -> tuple[Program, Any, Tensor]:
    """The program, its unconstrained density, and three positions drawn from the prior."""
    looked = Program(program, (x,))
    coordinates = Unconstrained(looked, looked.continuous)
    staged = Density(looked, rung="vmapped").unconstrained(coordinates, looked.finite)
    with isolated(1):
        draws = [looked.sample_prior() for _ in range(3)]
    values = {name: torch.stack([draw[name] for draw in draws]) for name in looked.continuous}
    return looked, staged, coordinates.position(values)


@pytest.mark.parametrize("name", PROGRAMS)
def test_products_have_the_log_density_and_gradient_of_rows_one_by_one(name: str, device: torch.device) -> None:
    program, staged, position = densities(PROGRAMS[name], X.to(device))
    gradient, value = staged._evaluated(position, {})
    expected_gradient, expected = staged.exact(position, {})
    assert program.has_rows
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


def switched(x: Tensor) -> None:
    """One label for all rows beside one for each."""
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
    which = pyro.sample("which", dist.Bernoulli(x.new_tensor(0.3)))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(x.new_tensor([0.3, 0.7])))
        pyro.sample("x", dist.Normal(mean[z], 2.0), obs=x[:, 1])
        pyro.sample("y", dist.Normal(mean[which.long()], 3.0), obs=x[:, 2])


def paired(x: Tensor) -> None:
    """Two statements of rows with one label."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(2)))
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
        spread = pyro.sample("spread", dist.LogNormal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mean[z], spread[z]), obs=x[:, 1])
        pyro.sample("y", dist.Normal(spread[z], 2.0), obs=x[:, 2])


def counted(x: Tensor) -> None:
    """A label whose probability differs from row to row, and a table of counts."""
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.sigmoid(x[:, 0])))
        pyro.sample("x", dist.Normal(mean[z.long()], 2.0), obs=x[:, 1])
        pyro.sample("n", dist.Poisson(1.0 + z), obs=x[:, 2].abs().round())


def alike(x: Tensor) -> None:
    """Components of one width beside components of widths of their own."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(2)))
    spread = pyro.sample("spread", dist.LogNormal(x.new_zeros(2), 1.0).to_event(1))
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(2), 100.0).to_event(1))
        height = pyro.sample("height", dist.LogNormal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mean[z], spread).to_event(1), obs=x[:, :2])
        pyro.sample("y", dist.Normal(mean[z, 0], height[z]), obs=x[:, 2])


SUMMED = {"labelled": labelled, "switched": switched, "paired": paired, "counted": counted, "alike": alike,
          **{covariance: GMM(3, covariance) for covariance in (*COVARIANCES, "isotropic")}}  # fmt: skip


@pytest.mark.parametrize("kept", [0, 10**9], ids=["formed", "kept"])
@pytest.mark.parametrize("name", SUMMED)
def test_rows_summed_out_in_chunks_have_the_log_density_and_gradient_of_rows_one_by_one(
    name: str, kept: int, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    monkeypatch.setattr(inference.rows, "_KEPT", kept)
    monkeypatch.setattr(inference.rows, "_FEW", 1)
    monkeypatch.setattr(inference.rows, "_LEAST_TABLE", 1)
    monkeypatch.setattr(inference.rows, "_CHUNK", 1)
    monkeypatch.setattr(inference.rows, "_LEAST_CHUNK", 256)
    program, staged, position = densities(SUMMED[name], X.to(device))
    gradient, value = staged._evaluated(position, {})
    expected_gradient, expected = staged.exact(position, {})
    assert program.has_rows
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-9)


STATISTICS: dict[Kind, Callable[[Tensor], Tensor]] = {
    "none": lambda u: u,
    "squares": lambda u: torch.cat([u, u**2], 1),
    "norm": lambda u: torch.cat([u, (u**2).sum(1, keepdim=True)], 1),
    "products": lambda u: torch.cat([u, *(u[:, i : i + 1] * u[:, : i + 1] for i in range(u.shape[1]))], 1),
}


@pytest.mark.parametrize("maximise", [False, True])
@pytest.mark.parametrize("kind", STATISTICS)
def test_a_sum_over_components_has_the_derivatives_of_its_table(
    kind: Kind, maximise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference.rows, "_CHUNK", 1)
    generator, statistics = torch.Generator().manual_seed(2), STATISTICS[kind]
    u = torch.randn(900, 5, generator=generator, dtype=torch.float64)
    width = statistics(u).shape[1]
    eta, c = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 4, width), (3, 4)))

    def of_table(u: Tensor, eta: Tensor, c: Tensor) -> Tensor:
        table = eta @ statistics(u).T + c[:, None]
        return (table.amax(0) if maximise else table.logsumexp(0)).sum()

    def chunked(u: Tensor, eta: Tensor, c: Tensor) -> Tensor:
        return log_sum(u, eta, c, maximise, kind)

    first = (0, 1, 2) if kind == "none" else (1, 2)  # what is formed of columns is formed of data
    for of in (
        lambda f: vmap(f, (None, 0, 0))(u, eta, c),
        lambda f: vmap(grad(f, first), (None, 0, 0))(u, eta, c),
        lambda f: vmap(jacrev(grad(f, (1, 2)), (1, 2)), (None, 0, 0))(u, eta, c),
        lambda f: vmap(f)(u.expand(3, -1, -1), eta, c),
    ):
        torch.testing.assert_close(of(chunked), of(of_table), rtol=1e-9, atol=1e-9)


def test_a_component_without_weight_has_no_share_of_the_rows() -> None:
    t, eta = torch.randn(300, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    c = torch.tensor([0.0, -torch.inf, 1.0], dtype=torch.float64)
    shares, value = grad_and_value(lambda c: log_sum(t, eta, c))(c)
    torch.testing.assert_close(shares, 300.0 * c.softmax(0))
    torch.testing.assert_close(value, 300.0 * c.logsumexp(0))
    assert shares[1] == 0.0
    assert log_sum(t, eta, torch.full_like(c, -torch.inf)) == -torch.inf
    assert log_sum(t, eta, torch.full_like(c, torch.nan)).isnan()


@pytest.mark.parametrize("kind", [kind for kind in STATISTICS if kind != "none"])
@pytest.mark.parametrize("components, is_kept", [(1, False), (2, False), (100, False), (100, True)])
def test_statistics_of_many_rows_are_not_kept(
    kind: Kind, components: int, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But products of columns, which take long to form, where one or two components ask for them."""
    monkeypatch.setattr(inference.rows, "_KEPT", 10**6 if is_kept else 1000)
    if components == 2:
        monkeypatch.setattr(inference.rows, "_WIDEST", 1000)
    found = Known([X]).statistics(X, X, kind, components)
    u, is_plain = (X - found.centre) / found.unit, is_kept or (kind == "products" and components == 1)
    assert found.table.shape[1] == (STATISTICS[kind](u).shape[1] if is_plain else 3)
    assert found.kind == ("none" if is_plain else kind)
    rows = Rows(found.table, X.new_zeros(1, len(found.largest)), X.new_zeros(1), -1, 0, found.kind)
    torch.testing.assert_close(rows.statistics, STATISTICS[kind](u), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rows.sums, STATISTICS[kind](u).sum(0), rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(inference.rows, "_FORMED", 100 * len(found.largest))
    natural = torch.randn(2, len(found.largest), dtype=torch.float64)
    rows, weights = rows._replace(natural=natural, constant=X.new_zeros(2)), torch.rand(2, len(X), dtype=torch.float64)
    torch.testing.assert_close(rows.table, natural @ STATISTICS[kind](u).T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(rows.total(weights), (weights * rows.table).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.largest, STATISTICS[kind](u).abs().amax(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name, own",
    [("alike", 2 + 2), ("paired", 2 + 1), ("full", 3 + 6), ("tied", 3), ("diagonal", 6), ("spherical", 4), ("isotropic", 3)],
)
def test_what_components_share_is_not_summed_over_them(name: str, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = set()

    def seen(statistics: Tensor, *rest: Any) -> Tensor:
        widths.add(statistics.shape[-1])
        return log_sum(statistics, *rest)

    monkeypatch.setattr(inference.rows, "_LEAST_TABLE", 1)
    monkeypatch.setattr("inference.enumeration.log_sum", seen)
    _, staged, position = densities(SUMMED[name], X)
    staged._evaluated(position, {})
    assert widths == {own}


def spots(x: Tensor) -> None:
    """Two components of one width; the second may be far narrower than the rows are wide."""
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(2)))
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(x.new_zeros(3), 100.0).to_event(1))
        spread = pyro.sample("spread", dist.LogNormal(x.new_zeros(3), 5.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(mean[z], spread[z]).to_event(1), obs=x)


def as_row_by_row(backend: EM, program: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What EM finds, its parameters held against what it finds from the weights of rows one by one."""
    monkeypatch.setattr(inference.rows, "_LEAST_TABLE", 1)
    point = backend.fit(program, x).point()
    monkeypatch.setattr(inference.rows, "FEWEST", 10_000)
    monkeypatch.setattr("inference.stacking.FEWEST", 10_000)
    expected = backend.fit(program, x).point()
    assert isinstance(backend.start, dict)
    for name in backend.start:
        torch.testing.assert_close(point[name], expected[name], rtol=1e-8, atol=0.0)
    return point


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("width", [1.0, 1e-7])
def test_em_from_expected_statistics_is_em_from_the_weights_of_rows(
    hard: bool, width: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a component becomes so narrow that products would not do."""
    x = torch.cat([X, torch.tensor([40.0, 10.0, 7.0]) + width * NOISE[:300]]).double()
    start = {"mean": torch.stack([x[0], x[-1]]), "spread": torch.full((2, 3), 5.0), "weights": torch.full((2,), 0.5)}
    backend = EM(start=start, steps=15, tolerance=0.0, hard=hard, objective="mle", seed=0, progress=False)
    point = as_row_by_row(backend, spots, x, monkeypatch)
    torch.testing.assert_close(point["spread"][1], x[700:].std(0, correction=0), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("hard", [False, True])
def test_em_of_components_that_share_a_width_is_em_from_the_weights_of_rows(
    hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = {
        "mean": X[[0, -1], :2],
        "height": X.new_tensor([5.0, 4.0]),
        "spread": X.new_tensor([5.0, 6.0]),
        "weights": X.new_ones(2) / 2,
    }
    backend = EM(start=start, steps=10, tolerance=0.0, hard=hard, objective="mle", seed=0, progress=False)
    as_row_by_row(backend, alike, X, monkeypatch)


def test_em_in_float32_is_em_in_float64_but_for_rounding() -> None:
    x = X[:, [0, 2]]
    start = {"means": x[[0, -1]], "covariances": torch.eye(2).double().expand(2, 2, 2), "weights": torch.full((2,), 0.5)}
    options = {"start": start, "steps": 10, "tolerance": 0.0, "seed": 0, "progress": False}
    expected = EM(**options).fit(GMM(2), x)
    single = EM(dtype=torch.float32, **options).fit(GMM(2), x)
    assert str(single.plan) == str(expected.plan)
    for name in start:
        torch.testing.assert_close(single.point()[name].double(), expected.point()[name], rtol=1e-3, atol=1e-4)


def test_pilots_that_see_some_rows_start_em_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inference.em._PILOT_ROWS", 200)
    posterior = EM(seed=0, progress=False).fit(GMM(2), X)
    sizes = posterior.draws["z"].flatten().bincount()
    assert sorted(sizes.tolist()) == [300, 400]


def regression(x: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x[:, 0], 1.0), obs=x[:, 1])


def masked(x: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
    with pyro.plate("rows", len(x)), poutine.mask(mask=x[:, 0] > 0):
        pyro.sample("x", dist.Normal(mean, 2.0), obs=x[:, 0])


def grouped(x: Tensor) -> None:
    with pyro.plate("groups", 2, dim=-1):
        mean = pyro.sample("mean", dist.Normal(x.new_tensor(0.0), 100.0))
        with pyro.plate("rows", len(x), dim=-2):
            pyro.sample("x", dist.Normal(mean, 2.0), obs=x[:, :2])


@pytest.mark.parametrize("program", [regression, masked, grouped], ids=lambda program: program.__name__)
def test_what_is_no_product_is_left_alone(program: Callable[[Tensor], None]) -> None:
    looked, staged, position = densities(program, X)
    staged(position, {})
    assert not looked.has_rows


def test_few_rows_are_left_alone() -> None:
    looked, staged, position = densities(vectors, X[:100])
    staged(position, {})
    assert not looked.has_rows


@pytest.mark.parametrize("width", [1.0, 1e-6])
def test_a_component_too_narrow_for_a_product_is_evaluated_row_by_row(width: float) -> None:
    """Beside rows 100 wide, the terms of the product of a narrow component would be 10¹⁶ and more."""
    _, staged, position = densities(vectors, X)
    position = torch.cat([X[:3], torch.full((3, 3), width, dtype=torch.float64).log()], -1)
    assert bool(staged._evaluated(position, {})[1].isnan().all()) == (width < 1e-5)
    gradient, value = staged(position, {})
    expected_gradient, expected = staged.exact(position, {})
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-6)


def test_a_weighted_sum_is_that_of_the_table() -> None:
    generator = torch.Generator().manual_seed(1)
    parts = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((50, 4), (3, 1, 4), (3, 1)))
    rows = Rows(*parts, -2)
    weights = torch.rand(rows.table.shape, generator=generator, dtype=torch.float64)
    assert rows.shape == rows.table.shape == (3, 50, 1)
    torch.testing.assert_close(rows.total(weights), (weights * rows.table).sum())
    torch.testing.assert_close(rows.total(), rows.table.sum())
    torch.testing.assert_close(rows.scaled(0.5).table, 0.5 * rows.table)


def test_em_on_rows_of_a_normal_finds_their_mean_and_covariance(device: torch.device) -> None:
    x = X[:400].to(device)
    start = {"means": x[:1], "covariances": torch.eye(3, dtype=x.dtype)[None], "weights": torch.ones(1, dtype=x.dtype)}
    point = EM(objective="mle", start=start, seed=0, progress=False).fit(GMM(1), x).point()
    torch.testing.assert_close(point["means"][0], x.mean(0).cpu(), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(point["covariances"][0], x.T.cov(correction=0).cpu(), rtol=1e-8, atol=1e-9)


def test_chains_come_back_from_where_rounding_would_show() -> None:
    """A fit whose chains start at a width of 10⁻⁶ goes on row by row, and ends where the data are."""
    start = {"mean": X[0], "spread": torch.full((3,), 1e-6, dtype=torch.float64)}
    posterior = HMC(chains=2, warmup=150, draws=50, most_steps=64, start=start, seed=0, progress=False).fit(vectors, X)
    torch.testing.assert_close(posterior.point()["spread"], X.std(0), rtol=0.1, atol=0.0)


@pytest.mark.parametrize("covariance", quick(COVARIANCES, ("full",)))
def test_the_steps_of_em_are_graphs(covariance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drafted = Staged._drafted
    made = []

    def seen(self: Staged, *rest: Any) -> Any:
        made.append(False)
        graphs = drafted(self, *rest)
        made[-1] = True
        return graphs

    monkeypatch.setattr(Staged, "_drafted", seen)
    monkeypatch.setattr(inference.rows, "_LEAST_TABLE", 1)
    looked = Program(GMM(2, covariance), (X,))
    backend = EM(steps=30, seed=0, progress=False)
    state = backend.init(looked)
    for _ in range(25):  # graphs are made after a few
        state, _ = backend.step(state, looked)
    assert made and all(made)
