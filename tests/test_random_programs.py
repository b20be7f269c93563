"""Programs that nobody wrote mean to the engine what they mean to Pyro; tables that nobody measured go through the models.

A program is drawn site by site: family, plates, event dimensions, mask, scale, and the sites before that it depends on. The
reference is ``log_prob_sum`` of Pyro's own trace, at each chain by itself; for finite sites the sum over all their values.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor, nn

from inference import EM, HMC, Unsupported
from inference.density import Density
from inference.program import Program
from pyro_genmodels import GMM, Mixture, NaiveBayes, datasets

ROWS, COLUMNS, CHAINS = 3, 2, 2
PLATES = ((), ("rows",), ("columns",), ("columns", "rows"))
FLOATING = ("normal", "student", "gamma", "exponential", "beta", "lognormal", "dirichlet", "mvn", "poisson")
FINITE = ("bernoulli", "categorical", "binomial")


class Statement(NamedTuple):
    """One sample statement: what it draws from, where, and what it depends on."""

    family: str
    plates: tuple[str, ...]
    parents: tuple[int, ...]
    is_observed: bool
    event: int
    scale: float
    mask: str


def statements(families: tuple[str, ...], scales: tuple[float, ...]) -> st.SearchStrategy[Statement]:
    return st.builds(
        Statement,
        st.sampled_from(families),
        st.sampled_from(PLATES),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.booleans(),
        st.integers(0, 2),
        st.sampled_from(scales),
        st.sampled_from(("none", "none", "true", "rows", "false")),
    )


def programs(
    families: tuple[str, ...], scales: tuple[float, ...] = (1.0, 1.0, 0.5, 3.0)
) -> st.SearchStrategy[list[Statement]]:
    return st.lists(statements(families, scales), min_size=1, max_size=5)


def distribution(family: str, loc: Tensor, event: int) -> Any:
    """One that depends on ``loc``, (*batch), with ``event`` further dimensions of size 2."""
    wide = loc.reshape((*loc.shape, *(1,) * event)).expand((*loc.shape, *(2,) * event))
    positive = nn.functional.softplus(wide) + 0.1
    match family:
        case "normal":
            return dist.Normal(wide, 1.5).to_event(event)
        case "student":
            return dist.StudentT(4.0, wide, positive).to_event(event)
        case "gamma":
            return dist.Gamma(2.0, positive).to_event(event)
        case "exponential":
            return dist.Exponential(positive).to_event(event)
        case "beta":
            return dist.Beta(1.0 + positive, 2.0).to_event(event)
        case "lognormal":
            return dist.LogNormal(0.3 * wide, 0.5).to_event(event)
        case "poisson":
            return dist.Poisson(positive).to_event(event)
        case "dirichlet":
            return dist.Dirichlet(torch.stack([loc.exp().clamp(max=9.0), torch.ones_like(loc), torch.ones_like(loc)], -1))
        case "mvn":
            mean = torch.stack([loc, -loc], -1)
            return dist.MultivariateNormal(mean, scale_tril=loc.new_tensor([[1.0, 0.0], [0.5, 2.0]]))
        case "bernoulli":
            return dist.Bernoulli(logits=loc)
        case "binomial":
            return dist.Binomial(2, logits=loc)
        case _:
            return dist.Categorical(logits=torch.stack([torch.zeros_like(loc), loc, -loc], -1))


def program(drawn: list[Statement], like: Tensor, careless: bool) -> Any:
    """The program of some statements, and data for it: what it draws itself.

    It ends in an observation of the sum of all; a careless one sums over whatever dimensions there are, those of enumeration
    too, which Pyro does not notice.
    """
    seen: dict[str, Tensor] = {}

    def model(anchor: Tensor) -> None:
        plates = {"rows": pyro.plate("rows", ROWS, dim=-1), "columns": pyro.plate("columns", COLUMNS, dim=-2)}
        inside: dict[str, tuple[tuple[str, ...], Tensor]] = {}
        total = pyro.sample("m", dist.Normal(anchor.new_zeros(()), 1.0))
        for i, (family, within, parents, _, event, scale, mask) in enumerate(drawn):
            loc = anchor.new_zeros(())
            for j in sorted({j for j in parents if j < i and {*inside[f"s{j}"][0]} <= {*within}}):
                loc = loc + 0.3 * inside[f"s{j}"][1]
            kept = {"rows": torch.arange(ROWS) != 1, "true": True, "false": False}.get(mask, True)
            kept = True if mask == "rows" and "rows" not in within else kept
            with contextlib.ExitStack() as stack:
                for name in within:
                    stack.enter_context(plates[name])
                stack.enter_context(poutine.mask(mask=kept))
                stack.enter_context(poutine.scale(scale=scale))
                base = distribution(family, loc, event)
                value = pyro.sample(f"s{i}", base, obs=seen.get(f"s{i}"))
            deep = len(base.event_shape)
            inside[f"s{i}"] = within, value.to(anchor.dtype).sum([*range(-deep, 0)]) if deep else value.to(anchor.dtype)
        for within, value in inside.values():
            if careless or not within:
                total = total + (value.sum() if careless else value)
        pyro.sample("y", dist.Normal(total, 1.0), obs=anchor.sum())

    nodes = poutine.trace(model).get_trace(like).nodes
    seen |= {f"s{i}": nodes[f"s{i}"]["value"] for i, statement in enumerate(drawn) if statement.is_observed}
    return model


def reference(model: Any, values: dict[str, Tensor], data: Tensor) -> Tensor:
    return poutine.trace(poutine.condition(model, values)).get_trace(data).log_prob_sum()


def close(ours: Tensor, pyros: Tensor, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-4  # rounding of some fifty terms, which may cancel
    torch.testing.assert_close(ours.double(), pyros.double(), rtol=tolerance, atol=tolerance * 10)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def check_joint(drawn: list[Statement], dtype: torch.dtype, seed: int, rung: str) -> None:
    with precision(dtype), torch.random.fork_rng():
        torch.manual_seed(seed)
        data = torch.randn(ROWS)
        model = program(drawn, data, careless=True)
        looked = Program(model, (data,), dtype=dtype)
        assert {*looked.latents} == {"m"} | {f"s{i}" for i, statement in enumerate(drawn) if not statement.is_observed}
        chains = [poutine.trace(model).get_trace(data).nodes for _ in range(CHAINS)]
        values = {name: torch.stack([nodes[name]["value"] for nodes in chains]) for name in looked.latents}
        ours = Density(looked, rung=rung).joint(values)
        assert ours.shape == (CHAINS,) and ours.dtype == dtype
        for chain in range(CHAINS):
            close(ours[chain], reference(model, {name: value[chain] for name, value in values.items()}, data), dtype)


def check_marginal(drawn: list[Statement], seed: int, careless: bool) -> str:
    """log Σ_z p(z, θ, y) of all finite latent sites, against the sum over their values one by one; or it is refused."""
    with precision(torch.float64), torch.random.fork_rng():
        torch.manual_seed(seed)
        data = torch.randn(ROWS)
        model = program(drawn, data, careless)
        looked = Program(model, (data,), dtype=torch.float64)
        nodes = poutine.trace(model).get_trace(data).nodes
        finite = {name: nodes[name]["value"] for name in looked.finite}
        if not finite or sum(value.numel() for value in finite.values()) > 6:
            return "left out"
        rest = {name: nodes[name]["value"] for name in looked.latents if name not in finite}
        density, placed = (
            Density(looked, rung="vmapped"),
            {name: torch.stack(32 * [value]) for name, value in (rest | finite).items()},
        )
        try:
            # What every back-end asks before it sums out, at a draw for each chain; by chance a draw may be the one at which
            # a wrong sum is right, so there are many chains.
            density.certify(looked.finite, placed, "")
        except Unsupported as refusal:
            assert "coupled" in str(refusal), refusal
            return "refused"
        ours = density.marginal(looked.finite)({name: placed[name] for name in rest})
        terms = []
        for choice in itertools.product(range(3), repeat=sum(value.numel() for value in finite.values())):
            digits, values = iter(choice), dict(rest)
            for name, value in finite.items():
                each = [next(digits) for _ in range(value.numel())]
                values[name] = torch.tensor(each).to(value.dtype).reshape(value.shape)
            if all(bool(nodes[name]["fn"].support.check(values[name]).all()) for name in finite):
                terms.append(reference(model, values, data))
        close(ours[0], torch.stack(terms).logsumexp(0), torch.float64)
        return "summed out"


@pytest.mark.parametrize("backend", [HMC(chains=2, draws=5, warmup=5, seed=0, progress=False), EM(progress=False)])
@pytest.mark.parametrize("chance", [0.999, 0.001])
def test_a_sum_that_is_wrong_at_rare_values_only_is_refused(backend: Any, chance: float) -> None:
    """z.sum() sums over the values of an enumerated z, 0 + 1 = 1, which is right where z is 1, nearly always or never."""

    def careless(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(chance)))
        pyro.sample("y", dist.Normal(mean + 20.0 * (1.0 - z.sum()), 1.0), obs=y)

    with pytest.raises(Unsupported, match="does not give the marginal of the program"):
        backend.fit(careless, torch.tensor(20.0))


def few(count: int) -> Any:
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)  # explaining takes minutes
    quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=count, deadline=None, derandomize=True, phases=phases, suppress_health_check=quiet)


@few(14)
@given(programs(FLOATING + FINITE), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 99))
def test_the_log_joint_is_that_of_pyro(drawn: list[Statement], dtype: torch.dtype, seed: int) -> None:
    check_joint(drawn, dtype, seed, "vmapped")


@few(14)
@given(programs((*FINITE, "normal", "gamma"), scales=(1.0,)), st.integers(0, 99), st.booleans())
def test_finite_sites_are_summed_out_as_one_by_one_or_not_at_all(drawn: list[Statement], seed: int, careless: bool) -> None:
    check_marginal(drawn, seed, careless)


@pytest.mark.slow
@pytest.mark.parametrize("rung", ["looped", "vmapped", "staged"])
@few(150)
@given(programs(FLOATING + FINITE), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 10**6))
def test_the_log_joint_is_that_of_pyro_on_every_rung(
    rung: str, drawn: list[Statement], dtype: torch.dtype, seed: int
) -> None:
    check_joint(drawn, dtype, seed, rung)


@pytest.mark.slow
@few(200)
@given(programs((*FINITE, "normal", "gamma"), scales=(1.0,)), st.integers(0, 10**6), st.booleans())
def test_many_finite_sites_are_summed_out_or_not_at_all(drawn: list[Statement], seed: int, careless: bool) -> None:
    check_marginal(drawn, seed, careless)


# ----------------------------------------------------------------------------------------------------------------- tables
def tables(least: int = 1) -> st.SearchStrategy[np.ndarray]:
    """Of few rows, of numbers from tiny to large, with ties and constant columns."""
    numbers = st.one_of(
        st.floats(-1e6, 1e6, allow_nan=False), st.integers(-3, 3).map(float), st.sampled_from([0.0, 1e-8, -1e-8, 1e8])
    )
    return st.tuples(st.integers(least, 8), st.integers(1, 3)).flatmap(
        lambda shape: st.lists(
            st.lists(numbers, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        ).map(lambda rows: np.array(rows, dtype=np.float64).reshape(shape))
    )


FITS: dict[str, Any] = {
    "gmm": lambda x, k: (GMM(k, "diagonal"), (x,)),
    "mixture": lambda x, k: (Mixture(k, ["normal"] * x.shape[1]), (x,)),
    "naive_bayes": lambda x, k: (NaiveBayes(k, ["gaussian"] * x.shape[1]), (x, torch.arange(len(x)) % k)),
}


def check_fit(name: str, table: np.ndarray, components: int) -> None:
    """A few steps of EM end in finite numbers on the support, or the table is refused in words."""
    model, args = FITS[name](torch.from_numpy(table), components)
    try:
        posterior = EM(steps=3, seed=0, progress=False, standard_errors=False).fit(model, *args)
    except ValueError as refusal:
        assert str(refusal)[0].isupper() or str(refusal).startswith("x"), refusal
        return
    for site, value in posterior.point().items():
        assert bool(value.isfinite().all()), site
        if "weight" in site or "share" in site:
            torch.testing.assert_close(value.sum(-1), torch.ones_like(value.sum(-1)))
    assert bool(posterior.history["log_joint"].isfinite().all())


@pytest.mark.parametrize("name", FITS)
@few(2)
@given(tables(), st.integers(1, 3))
def test_a_table_that_nobody_measured_is_fitted_or_refused(name: str, table: np.ndarray, components: int) -> None:
    check_fit(name, table, components)


@pytest.mark.slow
@pytest.mark.parametrize("name", FITS)
@few(60)
@given(tables(), st.integers(1, 3))
def test_many_tables_that_nobody_measured_are_fitted_or_refused(name: str, table: np.ndarray, components: int) -> None:
    check_fit(name, table, components)


@few(30)
@given(tables())
def test_a_table_that_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, table: np.ndarray) -> None:
    folder = tmp_path_factory.mktemp("tables")
    np.save(folder / "table.npy", table)
    lines = [",".join(f"c{j}" for j in range(table.shape[1])), *(",".join(map(repr, row)) for row in table.tolist())]
    (folder / "table.csv").write_text("\n".join(lines))
    for name in ("table.npy", "table.csv"):
        assert np.array_equal(datasets.read_table(folder / name).x.numpy(), table)
