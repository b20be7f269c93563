"""Summing out and drawing back finite sites is exact: against all assignments, one by one, without any enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import math
import resource
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings
from inference.contract import Unsupported
from inference.density import Density
from inference.enumeration import Factor, draw_back, eliminate, factors, log_normalizer, plates_of
from inference.program import Program

pytestmark = pytest.mark.usefixtures("inside_a_run")


def double(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(*shape: int, seed: int) -> Tensor:
    """A table of probabilities, the last axis summing to one; fixed."""
    return normal(*shape, seed=seed).softmax(-1)


START, MOVES, SECOND = table(3, seed=1), table(3, 3, seed=2), table(3, 3, 3, seed=3)
LEVELS = double(-1.0, 0.3, 1.4)
OBSERVED = normal(6, seed=4)


# ------------------------------------------------------------------------------------------ programs
# Each has the finite sites that are summed out, and one continuous site "m" that is given.
def plain(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    z = pyro.sample("z", dist.Categorical(START.to(y)))
    pyro.sample("y", dist.Normal(m + LEVELS.to(y)[z], 1.0), obs=y[0])


def rows(y: Tensor) -> None:
    """A mixture: one finite site a row."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(START.to(y)))
        pyro.sample("y", dist.Normal(m + LEVELS.to(y)[z], 1.0), obs=y)


def hierarchy(y: Tensor) -> None:
    """A site outside, one in an outer plate, one in an inner plate; the inner ones see both."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    top = pyro.sample("top", dist.Categorical(START.to(y)))
    with pyro.plate("outer", 2, dim=-2):
        middle = pyro.sample("middle", dist.Categorical(MOVES.to(y)[top]))
        with pyro.plate("inner", 2, dim=-1):
            low = pyro.sample("low", dist.Categorical(SECOND.to(y)[top, middle]))
            pyro.sample("y", dist.Normal(m + LEVELS.to(y)[low] - 0.5 * LEVELS.to(y)[top], 1.0), obs=y[:4].reshape(2, 2))


def shared(y: Tensor) -> None:
    """Two plates side by side, both hanging on one site."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    top = pyro.sample("top", dist.Bernoulli(y.new_tensor(0.3)))
    with pyro.plate("left", 2):
        a = pyro.sample("a", dist.Categorical(MOVES.to(y)[top.long()]))
        pyro.sample("y_left", dist.Normal(m + LEVELS.to(y)[a], 1.0), obs=y[:2])
    with pyro.plate("right", 3):
        b = pyro.sample("b", dist.Bernoulli(torch.where(top > 0, y.new_tensor(0.2), y.new_tensor(0.7))))
        pyro.sample("y_right", dist.Normal(m * b + top, 0.5), obs=y[2:5])


def crossed(y: Tensor) -> None:
    """A site in a plate, another in no plate, a third in both plates."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Bernoulli(y.new_tensor(0.4)))
        with pyro.plate("inner", 3, dim=-1):
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("y", dist.Normal(m + a + 2 * b, 1.0), obs=y.reshape(2, 3))


def pair(y: Tensor) -> None:
    """Two sites in one plate that explain each other away."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 3):
        a = pyro.sample("a", dist.Categorical(START.to(y)))
        b = pyro.sample("b", dist.Bernoulli(y.new_tensor(0.4)))
        pyro.sample("y", dist.Normal(m + LEVELS.to(y)[a] * (1 - 2 * b), 0.5), obs=y[:3])


def _chain(steps: int, loop: Callable[[int], Any]) -> Callable[[Tensor], None]:
    def chain(y: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
        z: Any = None
        for i in loop(steps):
            z = pyro.sample(f"z_{i}", dist.Categorical(START.to(y) if z is None else MOVES.to(y)[z]))
            pyro.sample(f"y_{i}", dist.Normal(m + LEVELS.to(y)[z], 1.0), obs=y[i])

    chain.__name__ = f"chain_{steps}_{'markov' if loop is pyro.markov else 'loop'}"
    return chain


def second_order(y: Tensor) -> None:
    """A chain that remembers two steps."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    before = last = torch.zeros((), dtype=torch.long, device=y.device)
    for i in pyro.markov(range(5), history=2):
        before, last = last, pyro.sample(f"z_{i}", dist.Categorical(SECOND.to(y)[before, last]))
        pyro.sample(f"y_{i}", dist.Normal(m + LEVELS.to(y)[last], 1.0), obs=y[i])


def chains_in_a_plate(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    z: Any = 0
    with pyro.plate("sequences", 2):
        for i in pyro.markov(range(3)):
            z = pyro.sample(f"z_{i}", dist.Categorical(MOVES.to(y)[z]))
            pyro.sample(f"y_{i}", dist.Normal(m + LEVELS.to(y)[z], 1.0), obs=y.reshape(3, 2)[i])


def factorial(y: Tensor) -> None:
    """Two chains that are seen together."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    a: Any = 0
    b: Any = 0
    for i in pyro.markov(range(4)):
        a = pyro.sample(f"a_{i}", dist.Categorical(MOVES.to(y)[a]))
        b = pyro.sample(f"b_{i}", dist.Categorical(MOVES.to(y)[b]))
        pyro.sample(f"y_{i}", dist.Normal(m + LEVELS.to(y)[a] + 2 * LEVELS.to(y)[b], 1.0), obs=y[i])


def one_hot(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.OneHotCategorical(START.to(y)))
        pyro.sample("y", dist.Normal(m + (z * LEVELS.to(y)).sum(-1), 1.0), obs=y[:4])


def one_row(y: Tensor) -> None:
    """Plates of size one, and a site with one value."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("outer", 1, dim=-2):
        a = pyro.sample("a", dist.Categorical(START.to(y)))
        with pyro.plate("inner", 1, dim=-1):
            b = pyro.sample("b", dist.Categorical(MOVES.to(y)[a]))
            pyro.sample("y", dist.Normal(m + LEVELS.to(y)[a] + LEVELS.to(y)[b], 1.0), obs=y[:1, None])


def one_value(y: Tensor) -> None:
    """A mixture of one component, and a site that hangs on its label."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Categorical(y.new_ones(1)))
        b = pyro.sample("b", dist.Bernoulli(y.new_tensor([0.3])[z]))
        pyro.sample("y", dist.Normal(m + LEVELS.to(y)[z] + b, 1.0), obs=y[:3])


def impossible(y: Tensor) -> None:
    """Transitions of probability zero."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    moves = y.new_tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    z: Any = 0
    for i in range(4):
        z = pyro.sample(f"z_{i}", dist.Categorical(moves[z]))
        pyro.sample(f"y_{i}", dist.Normal(m + LEVELS.to(y)[z], 1.0), obs=y[i])


def weighted(y: Tensor) -> None:
    """A mask, a scale and a factor on what is summed out."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4), poutine.mask(mask=torch.tensor([True, False, True, True], device=y.device)):
        z = pyro.sample("z", dist.Categorical(START.to(y)))
        with poutine.scale(scale=0.4):
            pyro.sample("y", dist.Normal(m + LEVELS.to(y)[z], 1.0), obs=y[:4])
        pyro.factor("tilt", -0.7 * LEVELS.to(y)[z])


PROGRAMS = (
    plain, rows, hierarchy, shared, crossed, pair,
    *(_chain(steps, loop) for steps in (3, 6) for loop in (range, lambda n: pyro.markov(range(n)))),
    second_order, chains_in_a_plate, factorial, one_hot, one_row, one_value, impossible, weighted,
)  # fmt: skip
IDS = [f"{program.__name__}_{i}" if "chain_" in program.__name__ else program.__name__ for i, program in enumerate(PROGRAMS)]
EVERY = pytest.mark.parametrize("program", PROGRAMS, ids=IDS)


# ------------------------------------------------------------------------------------ brute force
def assignments(program: Program) -> Iterator[dict[str, Tensor]]:
    """Every joint value of the finite sites."""
    sites = [program.latents[name] for name in program.finite]
    cells = [(site, index) for site in sites for index in np.ndindex(*site.batch_shape)]
    for chosen in itertools.product(*(range(len(site.choices)) for site, _ in cells)):  # type: ignore[arg-type]
        values = {site.name: site.choices[0].expand(site.shape).clone() for site in sites}  # type: ignore[index]
        for (site, index), k in zip(cells, chosen, strict=True):
            values[site.name][index] = site.choices[k]  # type: ignore[index]
        yield values


def log_joints(call: Callable[..., Any], y: Tensor, program: Program, m: Tensor) -> tuple[list[dict[str, Tensor]], Tensor]:
    """All assignments, and log p(assignment, m, y) by plain Pyro: condition, run, add up."""
    found = list(assignments(program))
    totals = []
    for values in found:
        trace = poutine.trace(poutine.condition(call, {**values, "m": m})).get_trace(y)
        totals.append(trace.log_prob_sum())
    return found, torch.stack(totals)


MIDDLES = double(-0.7, 0.2, 1.1)
LARGEST = 400  # assignments of the larger programs are summed in blocks of a vectorised plain run


@EVERY
def test_the_sum_is_over_all_assignments(program: Callable[[Tensor], None], device: torch.device) -> None:
    y = OBSERVED.to(device)
    looked = Program(program, (y,))
    middles = MIDDLES.to(device)
    summed = Density(looked, rung="vmapped").marginal(looked.finite)({"m": middles})
    alone = torch.stack([log_normalizer(looked, {"m": m}, looked.finite) for m in middles])
    torch.testing.assert_close(summed, alone, rtol=1e-12, atol=1e-12)
    found = list(assignments(looked))
    joint = Density(looked, rung="vmapped").joint  # without enumeration: test_density checks it against plain Pyro
    stacked = {name: torch.stack([values[name] for values in found]) for name in looked.finite}
    for m, total in zip(middles, summed, strict=True):
        expected = joint({**stacked, "m": m.expand(len(found))}).logsumexp(0)
        torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("program", [plain, shared, pair, one_hot, weighted, PROGRAMS[6]], ids=lambda p: p.__name__)
def test_the_sum_is_that_of_plain_pyro(program: Callable[[Tensor], None], device: torch.device) -> None:
    y = OBSERVED.to(device)
    looked = Program(program, (y,))
    _, expected = log_joints(program, y, looked, MIDDLES[0].to(device))
    total = log_normalizer(looked, {"m": MIDDLES[0].to(device)}, looked.finite)
    torch.testing.assert_close(total, expected.logsumexp(0), rtol=1e-11, atol=1e-11)


@EVERY
def test_the_gradient_of_the_sum_is_the_mean_of_gradients(program: Any, device: torch.device) -> None:
    """∂ log Z / ∂m = E[∂ log p(z, m, y) / ∂m | m, y], Fisher's identity, the expectation over all assignments."""
    y, m = OBSERVED.to(device), MIDDLES[1].to(device)
    looked = Program(program, (y,))
    found = list(assignments(looked))
    stacked = {name: torch.stack([values[name] for values in found]) for name in looked.finite}
    slope = torch.func.grad(lambda value: log_normalizer(looked, {"m": value}, looked.finite))(m)

    def slope_and_value(z: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return torch.func.grad_and_value(lambda value: looked.log_joint({**z, "m": value}))(m)

    slopes, joints = torch.func.vmap(slope_and_value)(stacked)
    torch.testing.assert_close(slope, (joints.softmax(0) * slopes.nan_to_num(nan=0.0)).sum(), rtol=1e-9, atol=1e-10)


DRAWS = 20_000


@EVERY
def test_draws_have_the_exact_frequencies(program: Callable[[Tensor], None], device: torch.device) -> None:
    """G-test of joint configurations, the rare ones pooled, at 10⁻⁵ each: of 18 programs, a false alarm in 5000 seeds."""
    y = OBSERVED.to(device)
    looked = Program(program, (y,))
    density = Density(looked, rung="vmapped")
    m = MIDDLES[2].to(device).expand(DRAWS)
    drawn, log_q = density.draw(looked.finite)({"m": m}, density.uniforms(looked.finite, DRAWS))
    found = list(assignments(looked))
    stacked = {name: torch.stack([values[name] for values in found]) for name in looked.finite}
    joints = density.joint({**stacked, "m": MIDDLES[2].to(device).expand(len(found))})
    exact = joints.softmax(0).cpu().numpy()

    def code(values: dict[str, Tensor]) -> list[bytes]:
        flat = torch.cat([values[n].reshape(len(values[n]), -1).double() for n in looked.finite], 1)
        return [row.tobytes() for row in flat.cpu().numpy()]

    place = {key: i for i, key in enumerate(code(stacked))}
    where = np.array([place[key] for key in code(drawn)])
    counts = np.bincount(where, minlength=len(found))
    assert counts[exact == 0].sum() == 0
    # log q is the exact conditional probability of what was drawn
    np.testing.assert_allclose(log_q.cpu().numpy(), joints.log_softmax(0).cpu().numpy()[where], rtol=0, atol=1e-9)
    common = exact * DRAWS >= 5
    observed = np.append(counts[common], counts[~common].sum())
    expected = np.append(exact[common], exact[~common].sum()) * DRAWS
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) > 1:
        if expected[-1] < 5:  # the pool of the rare ones is rare itself: a share of the commonest
            observed[0], expected[0] = observed[0] + observed[-1], expected[0] + expected[-1]
            observed, expected = observed[:-1], expected[:-1]
        found_test = scipy.stats.power_divergence(observed, expected * DRAWS / expected.sum(), lambda_="log-likelihood")
        assert found_test.pvalue > 1e-5, found_test


@EVERY
def test_a_present_value_has_its_exact_probability(program: Callable[[Tensor], None], device: torch.device) -> None:
    """What ``redraw`` says of present values is log p(z | m, y), for every assignment."""
    y = OBSERVED.to(device)
    looked = Program(program, (y,))
    density = Density(looked, rung="vmapped")
    found = list(assignments(looked))[:LARGEST]
    stacked = {name: torch.stack([values[name] for values in found]) for name in looked.finite}
    values = {**stacked, "m": MIDDLES[0].to(device).expand(len(found))}
    _, _, log_q = density.redraw(looked.finite)(values, density.uniforms(looked.finite, len(found)))
    expected = density.joint(values) - density.marginal(looked.finite)({"m": values["m"]})
    torch.testing.assert_close(log_q, expected, rtol=1e-10, atol=1e-10)


@EVERY
def test_the_maximum_is_over_all_assignments(program: Callable[[Tensor], None], device: torch.device) -> None:
    y = OBSERVED.to(device)
    looked = Program(program, (y,))
    m = MIDDLES[1].to(device)
    left, records = eliminate(factors(looked, {"m": m}, looked.finite), plates_of(looked, looked.finite), maximise=True)
    found = list(assignments(looked))
    stacked = {name: torch.stack([values[name] for values in found]) for name in looked.finite}
    joints = Density(looked, rung="vmapped").joint({**stacked, "m": m.expand(len(found))})
    torch.testing.assert_close(torch.stack([f.table for f in left]).sum(), joints.max(), rtol=1e-11, atol=1e-11)
    picked, _ = draw_back(looked, records, lambda sites, logits: logits.argmax(-1))
    best = {name: values[joints.argmax()] for name, values in stacked.items()}
    for name, index in picked.items():
        choices = looked.latents[name].choices
        assert choices is not None and torch.equal(choices[index], best[name]), name


@EVERY
def test_marginals_are_gradients_of_the_sum(program: Callable[[Tensor], None], device: torch.device) -> None:
    """∂ log Z / ∂ factor is the posterior probability of each entry (Darwiche): the E-step of EM."""
    y = OBSERVED.to(device)
    looked = Program(program, (y,))
    m = MIDDLES[1].to(device)
    parts = factors(looked, {"m": m}, looked.finite)
    tables = [part.table.detach().requires_grad_() for part in parts]
    replaced = [part.with_table(table) for part, table in zip(parts, tables, strict=True)]
    left, _ = eliminate(replaced, plates_of(looked, looked.finite))
    gradients = torch.autograd.grad(torch.stack([f.table for f in left]).sum(), tables)
    found = list(assignments(looked))
    stacked = {name: torch.stack([values[name] for values in found]) for name in looked.finite}
    probability = Density(looked, rung="vmapped").joint({**stacked, "m": m.expand(len(found))}).softmax(0)
    for part, gradient in zip(parts, gradients, strict=True):
        if part.site not in looked.finite or part.site not in part.dims:
            continue
        choices = looked.latents[part.site].choices
        assert choices is not None
        site = looked.latents[part.site]
        flat = stacked[part.site].reshape(len(found), -1, *choices.shape[1:])
        member = (flat[:, :, None] == choices).reshape(*flat.shape[:2], len(choices), -1).all(-1).double()
        exact = (probability[:, None, None] * member).sum(0)  # (cell, value)
        axes = [i for i, dim in enumerate(part.dims) if dim not in part.plates and dim != part.site]
        order = [*(i for i, dim in enumerate(part.dims) if dim in part.plates), part.dims.index(part.site)]
        shrunk = gradient.sum(axes, keepdim=True) if axes else gradient
        got = shrunk.permute(order + axes).reshape(-1, len(choices))
        assert got.shape[0] == max(1, math.prod(site.batch_shape))
        torch.testing.assert_close(got, exact, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------------------------- factors by hand
def test_random_factor_graphs_sum_exactly() -> None:
    """Twenty graphs with variables in no plate, in one and in two nested ones, against a sum over all assignments."""
    generator = np.random.default_rng(0)
    sizes = {"a": 2, "b": 3, "c": 2, "d": 2, "P": 2, "Q": 2}
    plates = {"a": frozenset(), "b": frozenset(), "c": frozenset("P"), "d": frozenset("PQ")}
    for _ in range(20):
        found = []
        for variables in (("a",), ("b",), ("a", "b"), ("a", "c"), ("c",), ("b", "c"), ("c", "d"), ("d",), ("a", "d")):
            own = frozenset().union(*(plates[v] for v in variables))
            if generator.random() < 0.5 and "d" not in variables:
                continue
            dims = (*sorted(own), *variables)
            shape = [sizes[dim] for dim in dims]
            found.append(Factor(torch.tensor(generator.normal(size=shape)), dims, own, "+".join(variables)))
        left, _ = eliminate(found, plates)
        total = torch.stack([f.table for f in left]).sum()
        terms = []
        used = {v for f in found for v in f.variables}
        cells = [(v, index) for v in "abcd" if v in used for index in np.ndindex(*(2 for _ in plates[v]))]
        for chosen in itertools.product(*(range(sizes[v]) for v, _ in cells)):
            value = dict(zip(cells, chosen, strict=True))
            term = 0.0
            for f in found:
                for index in np.ndindex(*(sizes[p] for p in sorted(f.plates))):
                    at = dict(zip(sorted(f.plates), index, strict=True))
                    key = [value[v, tuple(at[p] for p in sorted(plates[v]))] for v in f.variables]
                    term += float(f.table[(*index, *key)])
            terms.append(term)
        assert float(total) == pytest.approx(float(scipy.special.logsumexp(terms)), rel=1e-11)


def test_a_plate_that_is_kept_is_not_multiplied_over(device: torch.device) -> None:
    """One marginal log-likelihood per row, as LOO needs."""
    y = OBSERVED.to(device)
    looked = Program(rows, (y,))
    m = MIDDLES[0].to(device)
    parts = [f for f in factors(looked, {"m": m}, looked.finite) if f.site != "m"]
    left, _ = eliminate(parts, plates_of(looked, looked.finite), keep=frozenset({"rows"}))
    (only,) = left
    log_normal = -0.5 * (OBSERVED[:, None] - MIDDLES[0] - LEVELS) ** 2 - 0.5 * math.log(2 * math.pi)
    expected = (START.log() + log_normal).logsumexp(1)
    torch.testing.assert_close(only.table.cpu(), expected, rtol=1e-12, atol=1e-12)


# ----------------------------------------------------------------------------------------- refusals
def summed(y: Tensor) -> None:
    """The sum of a plate is seen: its elements are coupled."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
    pyro.sample("y", dist.Normal(m + z.sum(-1), 1.0), obs=y[0])


def summed_over_everything(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
    pyro.sample("y", dist.Normal(m + z.sum(), 1.0), obs=y[0])


def accumulated(y: Tensor) -> None:
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
        pyro.sample("y", dist.Normal(m + z.cumsum(-1), 1.0), obs=y[:4])


def flipped(y: Tensor) -> None:
    """Each element is seen through its mirror image."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
        pyro.sample("y", dist.Normal(m + z + 2 * z.flip(-1), 1.0), obs=y[:4])


def picked(y: Tensor) -> None:
    """One element of a plate decides about something outside it."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
    pyro.sample("y", dist.Normal(m + 2 * z[..., 0] + z[..., -1], 1.0), obs=y[0])


def switched(y: Tensor) -> None:
    """A label outside a plate picks one of the states inside it."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    which = pyro.sample("which", dist.Categorical(START.to(y)))
    with pyro.plate("rows", 3):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor([0.4, 0.2, 0.7])))
    pyro.sample("y", dist.Normal(m + 3 * z[..., which], 1.0), obs=y[0])


def rolled(y: Tensor) -> None:
    """Every row depends on its neighbour's label: the shape gives nothing away."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
        pyro.sample("y", dist.Normal(m + z + 2 * z.roll(1, -1), 1.0), obs=y[:4])


def without_a_plate(y: Tensor) -> None:
    """As many data as the label has values, with nothing around them."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    z = pyro.sample("z", dist.Bernoulli(y.new_tensor(0.4)))
    pyro.sample("y", dist.Normal(m + 2 * z, 1.0), obs=y[:2])


COUPLED = (summed, summed_over_everything, accumulated, flipped, picked, switched, rolled, without_a_plate)


def on_a_grid(program: Any, y: Tensor, axis: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """All assignments of the finite sites, and the log-joint of each at every value of "m", (assignment, value)."""
    looked = Program(program, (y,))
    found = list(assignments(looked))
    stacked = {name: torch.stack([values[name] for values in found]) for name in looked.finite}
    each = {name: value.repeat_interleave(len(axis), 0) for name, value in stacked.items()}
    joints = Density(looked, rung="vmapped").joint({**each, "m": axis.repeat(len(found))})
    return stacked, joints.reshape(len(found), -1)


@pytest.mark.parametrize("backend", [Gibbs, HMC, MetropolisHastings], ids=lambda b: b.__name__)
@pytest.mark.parametrize("program", COUPLED, ids=lambda p: p.__name__)
def test_coupled_elements_of_a_plate_are_refused_or_exact(program: Any, backend: Any, device: torch.device) -> None:
    """Never silently wrong: a sentence, or the frequencies of all assignments (within 5 standard errors: 10⁻⁵ a seed)."""
    y = OBSERVED.to(device)
    try:
        posterior = backend(chains=64, warmup=100, draws=100, seed=0, progress=False).fit(program, y)
    except Unsupported as reason:
        assert "couple" in str(reason) or "depends on" in str(reason)
        return
    stacked, joints = on_a_grid(program, y, torch.linspace(-6.0, 6.0, 241, dtype=torch.float64, device=device))
    probability = joints.logsumexp(1).softmax(0)
    for name, values in stacked.items():
        exact = torch.tensordot(probability, values.double(), 1).cpu()
        got = posterior.draws[name].double()
        error = got.mean(1).std(0) / math.sqrt(len(got))  # chains are independent
        assert bool(((got.mean((0, 1)) - exact).abs() < 5 * error + 1e-3).all()), (name, got.mean((0, 1)), exact)


@pytest.mark.parametrize("backend", [EM(steps=500), SVI(steps=1500, learning_rate=0.03)], ids=lambda b: type(b).__name__)
@pytest.mark.parametrize("program", COUPLED, ids=lambda p: p.__name__)
def test_coupled_elements_of_a_plate_do_not_mislead_an_optimiser(program: Any, backend: Any, device: torch.device) -> None:
    """A sentence, or the mode on a grid (EM), and the mean within a fifth of a standard deviation (SVI, by a normal)."""
    y = OBSERVED.to(device)
    try:
        posterior = dataclasses.replace(backend, seed=0, progress=False).fit(program, y)
    except Unsupported as reason:
        assert "couple" in str(reason) or "depends on" in str(reason)
        return
    axis = torch.linspace(-6.0, 6.0, 2401, dtype=torch.float64, device=device)
    total = on_a_grid(program, y, axis)[1].logsumexp(0)
    if isinstance(backend, EM):
        assert abs(float(posterior.point()["m"]) - float(axis[total.argmax()])) < 0.006
        return
    weights = total.softmax(0)
    mean = weights @ axis
    sd = (weights @ (axis - mean).square()).sqrt()
    assert abs(float(posterior.draws["m"].mean()) - float(mean)) < 0.2 * float(sd)


def test_observations_that_share_labels_have_no_terms_of_their_own(device: torch.device) -> None:
    posterior = Gibbs(chains=2, warmup=5, draws=5, seed=0, progress=False).fit(rolled, OBSERVED.to(device))
    with pytest.raises(Unsupported, match="no terms of their own"):
        posterior.log_likelihood()
    with pytest.warns(UserWarning, match="Exported without the pointwise log-likelihood"):
        exported = posterior.to_arviz()
    assert "posterior" in exported and "log_likelihood" not in exported


@pytest.mark.parametrize("backend", [HMC, MetropolisHastings], ids=lambda b: b.__name__)
def test_the_sum_of_a_plate_is_refused(backend: Any, device: torch.device) -> None:
    with pytest.raises(Unsupported, match="coupled"):
        backend(chains=2, warmup=1, draws=1, progress=False).fit(summed, OBSERVED.to(device))


@pytest.fixture
def limited_memory(device: torch.device) -> Iterator[None]:
    """At most 6 GB, so that a table that should not be made is an error here and not the end of the process."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if device.type == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (6 * 10**9, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def wide(y: Tensor) -> None:
    """One observation sees nine sites of eight values: a table of 8⁹ entries."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    total = m
    for i in range(9):
        total = total + pyro.sample(f"z_{i}", dist.Categorical(y.new_ones(8) / 8))
    pyro.sample("y", dist.Normal(total, 1.0), obs=y[0])


@pytest.mark.usefixtures("limited_memory")
@pytest.mark.parametrize("backend", [HMC, MetropolisHastings], ids=lambda b: b.__name__)
def test_too_wide_a_table_is_refused_with_its_width(backend: Any, device: torch.device) -> None:
    with pytest.raises(Unsupported, match="needs a table of [0-9,]{9,} entries"):
        backend(chains=2, warmup=1, draws=1, progress=False).fit(wide, OBSERVED.to(device))


def joined(y: Tensor) -> None:
    """Tables of two sites each, whose join is wide: every site is tied to the first and to one seen with all others."""
    m = pyro.sample("m", dist.Normal(y.new_tensor(0.0), 1.0))
    z = [pyro.sample(f"z_{i}", dist.Categorical(y.new_ones(64) / 64)) for i in range(6)]
    for i, j in itertools.combinations(range(6), 2):
        pyro.sample(f"y_{i}{j}", dist.Normal(m + 0.01 * z[i] * z[j], 1.0), obs=y[0])


@pytest.mark.parametrize("backend", [HMC, MetropolisHastings], ids=lambda b: b.__name__)
def test_too_wide_a_join_is_refused_with_its_width(backend: Any, device: torch.device) -> None:
    """A complete graph of six sites of 64 values: 64⁶ entries."""
    with pytest.raises(Unsupported, match="68,719,476,736"):
        backend(chains=2, warmup=1, draws=1, progress=False).fit(joined, OBSERVED.to(device))


@pytest.mark.usefixtures("limited_memory")
def test_gibbs_takes_one_site_at_a_time_where_the_joint_is_too_wide(device: torch.device) -> None:
    posterior = Gibbs(chains=4, warmup=2, draws=5, seed=0, progress=False).fit(wide, OBSERVED.to(device))
    assert posterior.plan is not None
    for i in range(9):
        update = posterior.plan[f"z_{i}"]
        assert update.update == "Enumerate" and update.sites == (f"z_{i}",) and "needs a table of" in update.note
        assert "\n" not in update.note
        assert update.certificate is not None and update.certificate < 1e-8
