"""Programs with long Python loops: chains of finite sites are one exact block, statements of one family are stacked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from inference import Enumerate, Gibbs
from inference.blocks import Current
from inference.density import Density
from inference.dependence import lanes, lifetimes
from inference.handlers import reproducible
from inference.program import Program
from inference.stacking import log_probs


def markov(states: int, is_marked: bool) -> Callable[[Tensor], None]:
    """A hidden Markov chain as a Python loop; y_t ~ N(μ[z_t], 1)."""

    def program(y: Tensor) -> None:
        moves = pyro.sample("moves", dist.Dirichlet(1.0 + 5.0 * torch.eye(states)).to_event(1))
        mean = pyro.sample("mean", dist.Normal(3.0 * torch.arange(states).to(y), 3.0).to_event(1))
        z: Any = 0
        for t in pyro.markov(range(len(y))) if is_marked else range(len(y)):
            z = pyro.sample(f"z{t}", dist.Categorical(moves[z]))
            pyro.sample(f"y{t}", dist.Normal(mean[z], 1.0), obs=y[t])

    return program


def forward(y: Tensor, moves: Tensor, mean: Tensor) -> Tensor:
    """log p(y | moves, mean) by the forward recursion."""
    seen = dist.Normal(mean, 1.0).log_prob(y[:, None])
    alpha = moves[0].log() + seen[0]
    for row in seen[1:]:
        alpha = torch.logsumexp(alpha[:, None] + moves.log(), 0) + row
    return alpha.logsumexp(0)


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    with reproducible(torch.float64):
        yield


def data(steps: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 6.0 * torch.rand(steps, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("is_marked", [True, False], ids=["pyro.markov", "range"])
@pytest.mark.parametrize(("steps", "states"), [(1, 3), (2, 2), (7, 3), (70, 4), (150, 20)])
def test_a_loop_of_states_sums_as_the_forward_recursion(
    steps: int, states: int, is_marked: bool, device: torch.device
) -> None:
    y = data(steps).to(device)
    program = Program(markov(states, is_marked), (y,))
    torch.manual_seed(0)
    values = {name: torch.stack([program.sample_prior()[name] for _ in range(2)]) for name in ("moves", "mean")}
    density = Density(program, rung="vmapped")
    found = density.marginal(program.finite)(values)
    for chain in range(2):
        moves, mean = values["moves"][chain], values["mean"][chain]
        prior = dist.Dirichlet(1.0 + 5.0 * torch.eye(states).to(y)).log_prob(moves).sum()
        prior = prior + dist.Normal(3.0 * torch.arange(states).to(y), 3.0).log_prob(mean).sum()
        torch.testing.assert_close(found[chain], prior + forward(y, moves, mean), rtol=1e-11, atol=1e-9)


def test_five_hundred_states_are_one_exact_block(device: torch.device) -> None:
    y = data(500).to(device)
    program = Program(markov(5, is_marked=True), (y,))
    draw = program.sample_prior()
    values = {name: value.unsqueeze(0) for name, value in draw.items()}
    density = Density(program, rung="vmapped")
    block = Enumerate().bind(program.finite, density, Current(values, density.joint(values)))  # certified, or refused
    _, moved, move = block.step((), density, Current(values, density.joint(values)), 0)
    assert move.log_ratio is not None and float(move.log_ratio.abs().max()) < 1e-8
    assert any(int(moved.values[name]) != int(values[name]) for name in program.finite)


def test_states_are_drawn_with_their_smoothed_probabilities(device: torch.device) -> None:
    """Each of 12 states within 4.5 standard errors of its smoothed probabilities: a false alarm in 5,000 runs."""
    y = data(12).to(device)
    program = Program(markov(2, is_marked=False), (y,))
    torch.manual_seed(1)
    chains = 4000
    point = program.sample_prior()
    point["mean"] = torch.tensor([1.0, 4.0], dtype=torch.float64, device=device)
    values = {name: point[name].expand(chains, *point[name].shape) for name in ("moves", "mean")}
    density = Density(program, rung="vmapped")
    drawn, log_q = density.draw(program.finite)(values, density.uniforms(program.finite, chains))
    log_z = density.marginal(program.finite)(values)
    torch.testing.assert_close(density.joint({**values, **drawn}) - log_q, log_z)  # the certificate, draw by draw
    for t, name in enumerate(program.finite):  # forward, then backward
        seen = dist.Normal(point["mean"], 1.0).log_prob(y[:, None])
        later = torch.zeros(2, dtype=torch.float64, device=device)
        for row in seen[t + 1 :].flip(0):
            later = torch.logsumexp(point["moves"].log() + row + later, 1)
        earlier = point["moves"][0].log() + seen[0]
        for row in seen[1 : t + 1]:
            earlier = torch.logsumexp(earlier[:, None] + point["moves"].log(), 0) + row
        share = (earlier + later).softmax(0)[1]
        error = (share * (1 - share) / chains).sqrt()
        assert abs(drawn[name].double().mean() - share) < 4.5 * error, name


def test_factorial_chains_are_one_exact_block(device: torch.device) -> None:
    def program(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(torch.zeros(2).to(y), 2.0).to_event(1))
        a: Any = 0
        b: Any = 0
        stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).to(y)
        for t in range(len(y)):
            a = pyro.sample(f"a{t}", dist.Categorical(stay[a]))
            b = pyro.sample(f"b{t}", dist.Categorical(stay[b]))
            pyro.sample(f"y{t}", dist.Normal(level[0] * a + level[1] * b, 1.0), obs=y[t])

    posterior = Gibbs(chains=2, warmup=2, draws=2, seed=0, progress=False).fit(program, data(10).to(device))
    assert posterior.plan is not None
    update = posterior.plan["a0"]
    assert len(update.sites) == 20 and update.update == "Enumerate" and update.certificate <= 1e-8


def test_a_late_look_back_at_an_early_state_is_exact(device: torch.device) -> None:
    """The first state reaches over all the others, and keeps its dimension while they take turns."""

    def program(y: Tensor) -> None:
        pyro.sample("level", dist.Normal(torch.zeros(()).to(y), 1.0))
        first = pyro.sample("first", dist.Bernoulli(torch.tensor(0.3).to(y)))
        z: Any = torch.zeros(()).to(y)
        for t in range(len(y)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(torch.sigmoid(2.0 * z - 1.0)))
            pyro.sample(f"y{t}", dist.Normal(z, 1.0), obs=y[t])
        pyro.sample("last", dist.Normal(first + z, 1.0), obs=y[0])

    y = data(6).to(device)
    program_ = Program(program, (y,))
    density = Density(program_, rung="vmapped")
    level = torch.zeros(1, dtype=torch.float64, device=device)
    total = []
    for code in range(2**7):
        bits = [torch.tensor([float(code >> i & 1)], dtype=torch.float64, device=device) for i in range(7)]
        values = dict(zip(program_.finite, bits, strict=True)) | {"level": level}
        total.append(density.joint(values))
    torch.testing.assert_close(density.marginal(program_.finite)({"level": level}), torch.stack(total).logsumexp(0))


def test_lanes_are_taken_in_turn() -> None:
    depends = {"a": {"a"}, "b": {"a", "b"}, "y": {"b"}, "c": {"b", "c"}, "x": {"c"}, "d": {"d"}}
    lives = lifetimes({name: frozenset(sources) for name, sources in depends.items()}, ["a", "b", "c", "d"])
    assert lives == {"a": (0, 1), "b": (1, 3), "c": (3, 4), "d": (5, 5)}
    assert lanes(lives) == {"a": 0, "b": 1, "c": 0, "d": 0}


FAMILIES = {
    "bernoulli": lambda x: dist.Bernoulli(logits=x),
    "bernoulli of probs": lambda x: dist.Bernoulli(x.sigmoid()),
    "beta": lambda x: dist.Beta(x.exp(), 2.0),
    "binomial": lambda x: dist.Binomial(5, logits=x),
    "categorical": lambda x: dist.Categorical(logits=torch.stack([x, 2 * x, 0 * x], -1)),
    "categorical of probs": lambda x: dist.Categorical(torch.stack([x.exp(), 1 + 0 * x], -1)),
    "cauchy": lambda x: dist.Cauchy(x, 2.0),
    "dirichlet": lambda x: dist.Dirichlet(torch.stack([x.exp(), 1 + 0 * x], -1)),
    "exponential": lambda x: dist.Exponential(x.exp()),
    "gamma": lambda x: dist.Gamma(x.exp(), 3.0),
    "geometric": lambda x: dist.Geometric(logits=x),
    "half-cauchy": lambda x: dist.HalfCauchy(x.exp()),
    "half-normal": lambda x: dist.HalfNormal(x.exp()),
    "inverse gamma": lambda x: dist.InverseGamma(x.exp(), 3.0),
    "laplace": lambda x: dist.Laplace(x, 2.0),
    "log-normal": lambda x: dist.LogNormal(x, 2.0),
    "multivariate normal": lambda x: dist.MultivariateNormal(torch.stack([x, -x], -1), 2.0 * torch.eye(2).to(x)),
    "normal": lambda x: dist.Normal(x, x.exp()),
    "poisson": lambda x: dist.Poisson(x.exp()),
    "student": lambda x: dist.StudentT(3.0, x, 2.0),
    "uniform": lambda x: dist.Uniform(x - 1.0, x + 2.0),  # not stacked
}


@pytest.mark.parametrize("how", ["plain", "event", "plate", "scaled", "masked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_statements_have_the_log_probabilities_of_each(family: str, how: str) -> None:
    def program() -> None:
        for t in range(6):
            x = torch.linspace(-1.0, 1.0, 3, dtype=torch.float64) + 0.1 * t
            build = FAMILIES[family]
            if how == "plain":
                pyro.sample(f"s{t}", build(x[0]))
            elif how == "event":
                pyro.sample(f"s{t}", build(x).to_event(1))
            elif how == "plate":
                with pyro.plate(f"p{t}", 3, dim=-1):
                    pyro.sample(f"s{t}", build(x))
            elif how == "scaled":
                with poutine.scale(scale=2.5), pyro.plate(f"p{t}", 3, dim=-1):
                    pyro.sample(f"s{t}", build(x))
            else:
                with poutine.mask(mask=torch.tensor([True, False, True])), pyro.plate(f"p{t}", 3, dim=-1):
                    pyro.sample(f"s{t}", build(x))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = poutine.trace(program).get_trace()
    trace.compute_log_prob()
    stacks = log_probs(trace.nodes)
    assert [name for stack in stacks for name in stack.names] == [f"s{t}" for t in range(6)]
    assert len(stacks) == (6 if how == "masked" or family == "uniform" else 1)
    for stack in stacks:
        for name, table in zip(stack.names, stack.table, strict=True):
            torch.testing.assert_close(table, trace.nodes[name]["log_prob"], rtol=1e-12, atol=1e-12)
