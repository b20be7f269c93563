"""A density is the same on every rung of the ladder; coordinates are bijections with the Jacobian that they claim."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import init_to_value
from pyro.infer.mcmc.util import initialize_model
from scipy import special, stats
from torch import Size, Tensor
from torch.autograd.functional import jacobian
from torch.distributions import biject_to
from torch.func import grad, jvp, vmap

from inference.density import Density, Unconstrained
from inference.graphs import fold, functional, merge, shortened
from inference.handlers import Arithmetic, isolated, quiet, reproducible
from inference.program import Program
from inference.recording import quicken, record
from inference.staging import RUNGS, Staged
from inference.transforms import PositiveDefinite, Stereographic, StickBreaking, bijection
from parameters import quick
from pyro_genmodels import datasets
from pyro_genmodels.distributions import InverseWishart
from zoo import BY_NAME, ZOO, Instance

CHAINS = 3
CALLS = 5  # a graph answers from the fourth call on: before, it is checked


def schools(sigma: Tensor, y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", len(y)):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def mixture(x: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2):
        scatter = pyro.sample("scatter", InverseWishart(4.0, torch.eye(2)))
        mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("x", dist.MultivariateNormal(mean[z], scale_tril=torch.linalg.cholesky(scatter)[z]), obs=x)


def hidden_states(x: Tensor) -> None:
    """Pyro's own forward recursion, through a logarithm of its own."""
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    location = pyro.sample("location", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    emission = dist.Normal(location, 1.0)
    pyro.sample("x", dist.DiscreteHMM(torch.zeros(2), transition.log(), emission, duration=len(x)), obs=x)


def graded(x: Tensor, grade: Tensor) -> None:
    """Pyro's ordered logistic distribution writes its probabilities into a tensor of its own."""
    gaps = pyro.sample("gaps", dist.Gamma(2.0, torch.ones(2)).to_event(1))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("grade", dist.OrderedLogistic(slope * x, gaps.cumsum(-1) - 2.0), obs=grade)


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    with isolated(0), reproducible(torch.float64), quiet():
        yield


def programs() -> dict[str, Program]:
    school, rows = datasets.load("eight_schools").arrays, datasets.load("faithful").arrays["x"][:5]
    return {
        "eight schools": Program(schools, (school["sigma"], school["y"])),
        "coal": Program(BY_NAME["coal"].program, BY_NAME["coal"].data),
        "mixture": Program(mixture, (rows,)),
        "hidden states": Program(hidden_states, (rows[:, 0] - 3.0,)),
        "graded": Program(graded, (rows[:, 0] - 3.0, torch.tensor([1, 0, 2, 1, 2]))),
    }


def positions(size: int, calls: int = CALLS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(CHAINS, size, dtype=torch.float64, generator=generator) for _ in range(calls)]


def unconstrained(program: Program, rung: str, gradient: bool, evaluations: int = 0) -> tuple[Staged, int]:
    coordinates = Unconstrained(program, program.continuous)
    density = Density(program, evaluations, rung).unconstrained(coordinates, program.finite, gradient)
    return density, coordinates.size


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ rungs
def assert_is_pyros(program: Program, rung: str, calls: int) -> None:
    """Value and gradient of the unconstrained density against Pyro's own, as its NUTS would see it."""
    density, size = unconstrained(program, rung, gradient=True)
    args, kwargs = program.arguments()
    start = init_to_value(values=program.sample_prior())  # Pyro cannot start flat priors itself
    _, potential, _, _ = initialize_model(program.call, args, kwargs, max_plate_nesting=program.nesting, init_strategy=start)
    coordinates = Unconstrained(program, program.continuous)
    for position in positions(size, calls):
        gradients, values = density(position, {})
        for row, gradient, value in zip(position, gradients, values, strict=True):
            row = row.clone().requires_grad_()
            parts = row.split(coordinates.sizes)
            sites = {s: p.reshape(coordinates.shapes[s]) for s, p in zip(coordinates.sites, parts, strict=True)}
            expected = -potential(sites)
            assert_close(value, expected.detach())
            assert_close(gradient, torch.autograd.grad(expected, row)[0])
    assert density.rung == rung


@pytest.mark.parametrize("rung", ["looped", "vmapped", "staged"])
@pytest.mark.parametrize("name", ["eight schools", "coal", "mixture", "hidden states", "graded"])
def test_every_rung_gives_pyros_own_potential_and_its_gradient(name: str, rung: str) -> None:
    assert_is_pyros(programs()[name], rung, 2 if rung == "looped" else CALLS)


SEQUENCES = (
    "hidden_markov",
    "factorial_chains",
    "HMM",
    "HMM, symbols",
    "HMM, counts",
)  # which Pyro cannot sum out: test_sequences.py holds them to their loops


@pytest.mark.parametrize(
    "instance",
    [i for i in ZOO if "HMC" not in i.refused and i.name not in SEQUENCES],
    ids=lambda instance: instance.name,
)
def test_the_density_of_every_program_is_pyros_own(instance: Instance) -> None:
    assert_is_pyros(Program(instance.program, instance.data), "vmapped", 1)


@pytest.mark.parametrize("name", ["eight schools", "coal", "mixture"])
def test_vmapped_and_staged_agree_with_looped_on_the_joint_and_on_exact_draws(name: str) -> None:
    program = programs()[name]
    results = []
    for rung in RUNGS[:3]:
        with isolated(1):
            density, outcome = Density(program, rung=rung), []
            for _ in range(CALLS):
                draws = [program.sample_prior() for _ in range(CHAINS)]
                values = {site: torch.stack([draw[site] for draw in draws]) for site in program.latents}
                outcome.append(density.joint(values))
                if program.finite:
                    uniforms = density.uniforms(program.finite, CHAINS)
                    drawn, *log_q = density.redraw(program.finite)(values, uniforms)
                    outcome += [density.marginal(program.finite)(values), *drawn.values(), *log_q]
            results.append(outcome)
            assert density.joint.rung == rung
    for looped, *others in zip(*results, strict=True):
        for other in others:
            torch.testing.assert_close(other, looped, rtol=1e-9, atol=1e-9)


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name),
    reason="the compiled rung needs a C++ compiler",
)


@needs_compiler
@pytest.mark.parametrize("name", quick(["eight schools", "coal"], ["coal"]))
def test_the_compiled_rung_gives_the_values_and_gradients_of_the_looped_one(name: str) -> None:
    program = programs()[name]
    compiled, size = unconstrained(program, "compiled", gradient=True, evaluations=10**6)
    looped, _ = unconstrained(program, "looped", gradient=True)
    for position in positions(size):
        results = compiled(position, {})
    for result, expected in zip(results, looped(position, {}), strict=True):
        assert_close(result, expected)
    assert compiled.rung == "compiled"


def test_without_a_compiler_a_run_is_staged_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    program = programs()["eight schools"]
    density, coordinates = Density(program, evaluations=10**6, rung="compiled"), Unconstrained(program, program.continuous)
    for gradient in (True, False):
        staged = density.unconstrained(coordinates, gradient=gradient)
        for position in positions(coordinates.size):
            staged(position, {})
        assert staged.rung == "staged"
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage() == (
        "schools would run faster compiled, but there is no C++ compiler: install g++, or name yours in CXX."
    )


_HIDDEN = """
import sys, torch, pyro, pyro.distributions as dist
from inference.density import Density
from inference.program import Program
from inference.handlers import quiet, reproducible

def hidden(y):
    move = pyro.sample("move", dist.Dirichlet(torch.ones(3, 3)).to_event(1))
    level = pyro.sample("level", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(move[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"y_{t}", dist.Normal(level[z], 1.0), obs=y[t])

torch.set_num_threads(2)
program = Program(hidden, (torch.arange(float(sys.argv[1]), dtype=torch.float64),))
density = Density(program, evaluations=10**7, rung="compiled")
with reproducible(program.dtype), quiet():
    values = {name: torch.stack([program.sample_prior()[name] for _ in range(64)]) for name in program.continuous}
    staged = density.slopes(program.continuous, program.finite)
    for _ in range(200):
        staged(values)
    assert staged.rung in sys.argv[2:], (staged.rung, staged.nodes)
"""


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "rungs"), [(3, ("compiled",)), (10, ("staged", "compiled"))])
def test_a_compiled_chain_of_states_does_not_kill_its_process(steps: int, rungs: tuple[str, ...]) -> None:
    """Three steps once corrupted the heap on two threads; ten are a cycle to the compiler, and stay staged then."""
    command = [sys.executable, "-c", _HIDDEN, str(steps), *rungs]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def logistic(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(x.new_zeros(x.shape[1]), 2.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ slope), obs=y)


@pytest.mark.parametrize("rung", ["looped", "vmapped", "staged"])
@pytest.mark.parametrize("name", ["eight schools", "coal", "mixture", "hidden states", "graded"])
def test_a_gradient_alone_is_that_beside_the_value_bit_for_bit(name: str, rung: str) -> None:
    density, size = unconstrained(programs()[name], rung, gradient=True)
    for position in positions(size, 2 if rung == "looped" else CALLS):
        gradient = density.first(position, {})
        assert torch.equal(gradient, density(position, {})[0])
    assert density.rung == rung


def test_a_gradient_alone_leaves_out_what_only_the_value_needs() -> None:
    x = torch.randn(300, 2, dtype=torch.float64)
    program = Program(logistic, (x, (x[:, 0] > 0).double()))
    density, size = unconstrained(program, "staged", gradient=True)
    for position in positions(size):
        density.first(position, {})
    (variant,) = density._variants.values()
    names = [str(node.target) for node in fold(merge(functional(shortened(variant.graph)))).graph.nodes]
    assert any("log_sigmoid" in str(node.target) for node in variant.graph.graph.nodes)
    assert not any("log" in name.replace("logistic", "") for name in names) and any("sigmoid" in name for name in names)


def test_a_gradient_alone_is_row_by_row_where_that_of_the_value_is() -> None:
    """At a standard deviation of a millionth of the spread of the rows, products of matrices show their rounding."""
    x = torch.randn(400, dtype=torch.float64)

    def program(x: Tensor) -> None:
        location = pyro.sample("location", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 5.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Normal(location, scale), obs=x)

    looked = Program(program, (x,))
    density, _ = unconstrained(looked, "staged", gradient=True)
    for log_scale in (0.0, 0.1, 0.2, 0.3, -14.0):
        position = torch.tensor([[0.3, log_scale]], dtype=torch.float64)
        gradient, value = density(position, {})
        assert torch.equal(density.first(position, {}), gradient) and bool(value.isfinite())
    residual = (x - 0.3) / math.exp(-14.0)
    expected = residual.sum() / math.exp(-14.0) - 0.3
    assert looked.has_rows and math.isclose(float(gradient[0, 0]), float(expected), rel_tol=1e-9)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_gradient_alone_is_that_of_the_looped_rung() -> None:
    x = torch.randn(1000, 2, dtype=torch.float64)
    program = Program(logistic, (x, (x[:, 0] > 0).double()))
    compiled, size = unconstrained(program, "compiled", gradient=True, evaluations=10**7)
    looped, _ = unconstrained(program, "looped", gradient=True)
    for position in positions(size, 2 * CALLS):
        gradient = compiled.first(position, {})
        assert_close(gradient, looped(position, {})[0])
    (variant,) = compiled._variants.values()
    assert compiled.rung == "compiled" and not variant.is_whole and variant.first is not None


def test_a_graph_that_gives_another_first_result_alone_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: Any) -> Any:
        short = shortened(graph)
        (output,) = short.graph.find_nodes(op="output")
        with short.graph.inserting_before(output):
            output.args = (short.graph.call_function(torch.ops.aten.mul.Scalar, (output.args[0], 1.001)),)
        return short

    monkeypatch.setattr("inference.staging.shortened", broken)
    density, size = unconstrained(programs()["eight schools"], "staged", gradient=True)
    for position in positions(size, 2 * CALLS):
        assert torch.equal(density.first(position, {}), density(position, {})[0])
    (variant,) = density._variants.values()
    assert variant.is_whole


def test_a_logistic_likelihood_has_the_value_and_the_slopes_of_scipy(inside_a_run: None) -> None:
    logits = torch.tensor([-800.0, -30.0, -1.5, 0.0, 0.7, 40.0, 800.0], dtype=torch.float64)
    for label in (0.0, 0.3, 1.0):
        value = torch.full_like(logits, label)

        def log_prob(x: Tensor, value: Tensor = value) -> Tensor:
            with Arithmetic():
                return dist.Bernoulli(logits=x, validate_args=False).log_prob(value)

        expected = label * special.log_expit(logits.numpy()) + (1 - label) * special.log_expit(-logits.numpy())
        assert_close(log_prob(logits), torch.from_numpy(expected))
        slope = vmap(grad(log_prob))(logits, value)
        graph = record(vmap(grad(log_prob)), [logits, value])
        assert sum(str(node.target).startswith("aten.exp") for node in graph.graph.nodes) == 0
        assert_close(slope, torch.from_numpy(label - special.expit(logits.numpy())))
        bend = vmap(grad(grad(log_prob)))(logits, value)
        assert_close(bend, torch.from_numpy(-special.expit(logits.numpy()) * special.expit(-logits.numpy())))
        pushed = jvp(lambda x: log_prob(x), (logits,), (torch.ones_like(logits),))[1]
        assert_close(pushed, slope)


def test_a_short_run_is_not_compiled() -> None:
    density, size = unconstrained(programs()["eight schools"], "compiled", gradient=True, evaluations=100)
    density(positions(size)[0], {})
    assert density.rung == "staged"


def test_the_rung_follows_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    program = programs()["eight schools"]
    for rung in RUNGS[:3]:
        monkeypatch.setenv("PYRO_GENMODELS_RUNG", rung)
        density = Density(program, evaluations=10**6).joint
        values = {site: value[None] for site, value in program.sample_prior().items()}
        results = [float(density(values)) for _ in range(100)]  # a graph is made only where it is used often
        assert density.rung == rung
        assert max(results) - min(results) < 1e-9


def test_a_chain_does_not_depend_on_the_chains_beside_it() -> None:
    density, size = unconstrained(programs()["coal"], "staged", gradient=True)
    for position in positions(size):
        gradients, values = density(position, {})
    for c in range(CHAINS):
        for _ in range(CALLS):
            gradient, value = density(position[c : c + 1], {})
        assert_close(gradient[0], gradients[c])
        assert_close(value[0], values[c])


@pytest.mark.parametrize("form", ["probs", "logits"])
def test_labels_of_a_plate_are_looked_up_with_the_probabilities_and_gradients_of_pyro(form: str, inside_a_run: None) -> None:
    labels = torch.tensor([2, 0, 1, 2, 2])
    is_seen = torch.tensor([True, True, False, True, True])

    def program(rows: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("rows", len(rows)), pyro.poutine.mask(mask=is_seen), pyro.poutine.scale(scale=2.0):
            pyro.sample("z", dist.Categorical(**{form: shares if form == "probs" else 3.0 * shares}))

    shares = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    looked_at = Program(program, (labels.double(),))
    gradient, value = torch.func.grad_and_value(lambda s: looked_at.log_joint({"shares": s, "z": labels}))(shares)
    leaf = shares.clone().requires_grad_()
    conditioned = pyro.poutine.condition(program, {"shares": leaf, "z": labels})
    expected = pyro.poutine.trace(conditioned).get_trace(labels.double()).log_prob_sum()
    expected.backward()
    assert_close(value, expected.detach())
    assert_close(gradient, leaf.grad)


# ------------------------------------------------------------------------------------------ what a graph cannot know
def test_a_program_that_reads_a_changing_python_value_is_run_without_a_graph() -> None:
    setting = {"scale": 1.0}
    staged = Staged(lambda x: (setting["scale"] * x).sum(), (True,), rung="staged")
    for call, (position, scale) in enumerate(zip(positions(2), itertools.cycle([1.0, 2.0]), strict=False)):
        setting["scale"] = scale
        assert_close(staged(position), scale * position.sum(-1))
        assert call == 0 or staged.rung == "vmapped"


def test_a_program_that_counts_its_calls_is_run_without_a_graph() -> None:
    count = itertools.count(1)
    staged = Staged(lambda x: next(count) * x.sum(), (True,), rung="staged")
    ratios = [float((staged(position) / position.sum(-1)).mean()) for position in positions(2, 6)]
    assert staged.rung == "vmapped"
    assert ratios == sorted(ratios) and len(set(ratios)) == len(ratios)


def test_a_program_that_branches_on_the_number_of_chains_gets_a_graph_for_each() -> None:
    staged = Staged(lambda x: x.square().sum(), (True,), rung="staged")
    for chains in (1, 4, 1, 4, 2):
        for _ in range(CALLS):
            position = torch.randn(chains, 2, dtype=torch.float64)
            assert_close(staged(position), position.square().sum(-1))


# ---------------------------------------------------------------------------------------------------------- folding
# x has a chain axis, c has not: vmap lets a program write only the latter into a tensor of its own
def accumulated(x: Tensor, c: Tensor) -> Tensor:
    total = torch.zeros(3, dtype=x.dtype)
    total += c
    return (total * x).sum()


def accumulated_after_a_constant(x: Tensor, c: Tensor) -> Tensor:
    total = torch.zeros(3, dtype=x.dtype)
    total += 1.0
    return (total * x).sum() + total.mul_(c).sum()


def written_through_a_view(x: Tensor, c: Tensor) -> Tensor:
    total = torch.ones(3, dtype=x.dtype)
    total[1:].add_(c[1:])
    return (total * x).sum()


def read_through_a_view(x: Tensor, c: Tensor) -> Tensor:
    total = torch.ones(3, dtype=x.dtype)
    last = total[2:]
    total.add_(c)
    return (last * x).sum()


def filled_by_index(x: Tensor, c: Tensor) -> Tensor:
    table = torch.ones(3, dtype=x.dtype)
    table[torch.tensor([0, 2])] += c[:2]
    return (table * x).sum()


def copied(x: Tensor, c: Tensor) -> Tensor:
    source = torch.arange(3.0, dtype=x.dtype)
    target = torch.empty(3, dtype=x.dtype).copy_(source)
    source.sub_(c)
    return (target * source * x).sum()


def written_by_out(x: Tensor, c: Tensor) -> Tensor:
    total = torch.ones(3, dtype=x.dtype)
    before = total.sum()
    torch.mul(c, 2.0, out=total)
    return (total * x).sum() + before


def updated_twice(x: Tensor, c: Tensor) -> Tensor:
    total = torch.ones(3, dtype=x.dtype)
    first = total.add_(1.0)
    second = first.mul_(c)
    return (first * second * total * x).sum()


def written_with_a_latent(x: Tensor, c: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total[0] += x[0]
    total += c
    return (total * x).sum()


IN_PLACE = (
    accumulated,
    accumulated_after_a_constant,
    written_through_a_view,
    read_through_a_view,
    filled_by_index,
    copied,
    written_by_out,
    updated_twice,
    written_with_a_latent,
)


@pytest.mark.parametrize("function", IN_PLACE, ids=lambda function: function.__name__)
def test_a_folded_graph_does_not_remember_in_place_writes(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    staged = Staged(function, (True, False), rung="staged")
    for position, (shared, *_) in zip(positions(3, 8), reversed(positions(3, 8)), strict=True):
        assert_close(staged(position, shared), torch.stack([function(row, shared) for row in position]))
    assert staged.rung == "staged"


def test_folding_evaluates_once_what_does_not_depend_on_the_inputs() -> None:
    data = torch.randn(50, 3, dtype=torch.float64)

    def quadratic(x: Tensor) -> Tensor:
        precision = torch.linalg.inv(data.T @ data + torch.eye(3, dtype=data.dtype))
        return x @ precision @ x

    x = torch.randn(3, dtype=torch.float64)
    graph = fold(record(quadratic, [x]))
    targets = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not any("inv" in target for target in targets)
    assert_close(graph(x), quadratic(x))


def test_constants_that_repeat_themselves_are_kept_once_and_factors_of_one_left_out() -> None:
    data = torch.tensor([1.0, 2.0, torch.nan], dtype=torch.float64)
    signed = torch.tensor([0.0, -0.0], dtype=torch.float64)
    whole = torch.arange(3)

    def function(x: Tensor) -> Tensor:
        ones = torch.ones(4, 3, dtype=x.dtype) * torch.exp(torch.zeros(3, dtype=x.dtype))
        wide = x * torch.ones(2, 4, 3, dtype=x.dtype)  # wider than x
        widened = whole * torch.ones((), dtype=x.dtype) * (x > 0)  # of another type
        return (
            (x * ones + data.neg().expand(4, 3)).nan_to_num(nan=7.0) + wide.sum(0) + widened + (1.0 / (signed * 1.0)).sum()
        )

    x = torch.randn(4, 3, dtype=torch.float64)
    graph = fold(merge(record(function, [x])))
    assert torch.equal(graph(x).nan_to_num(nan=-3.0), function(x).nan_to_num(nan=-3.0))
    products = [node for node in graph.graph.nodes if node.target is torch.ops.aten.mul.Tensor]
    assert len(products) == 2
    assert all(buffer.untyped_storage().nbytes() <= 64 for name, buffer in graph.named_buffers() if "folded" in name)


def twice(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Equal operations that are not the same: draws, updates of running statistics, and reads before and after a write."""
    functional, total = torch.nn.functional, torch.zeros(3, dtype=x.dtype)
    draws = torch.randn_like(x) - torch.randn_like(x)
    part = total[:2]
    before = part + 1.0
    total.add_(x.sum(0))
    after = part + 1.0
    normed = sum(functional.batch_norm(x, mean, variance, training=True) for _ in range(2))
    return torch.cat([draws.flatten(), before, after, normed.flatten(), (x.exp() - x.exp()).flatten()])


def test_merging_keeps_apart_what_is_equal_by_name_only() -> None:
    x = torch.randn(7, 3, dtype=torch.float64)
    states = [(torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype)) for _ in range(3)]
    graph = fold(merge(record(lambda x: twice(x, *states[0]), [x], states[0])))
    assert sum("exp" in str(node.target) for node in graph.graph.nodes) == 1
    for _ in range(2):  # what was drawn or folded must not stay
        torch.manual_seed(0)
        expected = twice(x, *states[1])
        torch.manual_seed(0)
        assert_close(graph(x, *states[2]), expected)
        assert_close(states[2], states[1])
    torch.manual_seed(1)
    other = graph(x, *states[2])
    assert not torch.equal(other[:21], expected[:21])


def test_an_operation_by_its_quickest_name_is_the_same() -> None:
    x = torch.rand(4, 3, dtype=torch.float64) + 0.5
    data = torch.rand(4, 3, dtype=torch.float64)

    def function(x: Tensor) -> Tensor:
        y = torch.where(x > 1.0, x.log(), x.pow(2.0)) - torch.add(x, data, alpha=3) + (2.0 - x) + 2.0**x
        z = y.sum(-1, keepdim=True).expand(4, 3) + x.logsumexp(0) + x.mean() + torch.rsub(x, 1.0, alpha=2)
        return torch.stack([z, x.transpose(0, 1).reshape(4, 3), x.cumsum(0), x.select(0, 1).view(1, 3).expand(4, 3)])

    graph = record(function, [x])
    assert_close(quicken(graph)(x), function(x))


# ------------------------------------------------------------------------------------------------------ coordinates
def strictly_below(matrix: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(matrix.shape[-1], matrix.shape[-1], -1)
    return matrix[..., rows, columns]


def below(matrix: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(matrix.shape[-1], matrix.shape[-1])
    return matrix[..., rows, columns]


# support, event shape, and the coordinates of a value that Lebesgue measure on the support runs over
SUPPORTS: dict[str, tuple[Any, tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "real": (constraints.real, (), lambda value: value),
    "real vector": (constraints.real_vector, (3,), lambda value: value),
    "positive": (constraints.positive, (), lambda value: value),
    "positive vector": (constraints.independent(constraints.positive, 1), (3,), lambda value: value),
    "unit interval": (constraints.unit_interval, (), lambda value: value),
    "interval (2, 5)": (constraints.interval(2.0, 5.0), (), lambda value: value),
    "above 1.5": (constraints.greater_than(1.5), (), lambda value: value),
    "at least 1.5": (constraints.greater_than_eq(1.5), (), lambda value: value),
    "below -1": (constraints.less_than(-1.0), (), lambda value: value),
    "simplex": (constraints.simplex, (4,), lambda value: value[..., :-1]),
    "ordered": (constraints.ordered_vector, (3,), lambda value: value),
    "positive ordered": (constraints.positive_ordered_vector, (3,), lambda value: value),
    "positive definite 1": (constraints.positive_definite, (1, 1), below),
    "positive definite": (constraints.positive_definite, (3, 3), below),
    "correlation": (constraints.corr_matrix, (3, 3), strictly_below),
    "correlation factor": (constraints.corr_cholesky, (3, 3), strictly_below),
}


def flat(support: Any, shape: tuple[int, ...]) -> Program:
    """Two elements of a plate with a flat prior on the support."""

    def program() -> None:
        with pyro.plate("elements", 2):
            pyro.sample("value", dist.ImproperUniform(support, Size(), Size(shape)))

    return Program(program)


@pytest.mark.parametrize("name", SUPPORTS)
def test_coordinates_go_there_and_back(name: str) -> None:
    support, shape, _ = SUPPORTS[name]
    coordinates = Unconstrained(flat(support, shape), ["value"])
    for position in positions(coordinates.size):
        values = coordinates.values(2.0 * position)
        assert values["value"].shape == (CHAINS, 2, *shape)
        assert bool(support.check(values["value"]).all())
        torch.testing.assert_close(coordinates.position(values), 2.0 * position, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(coordinates.values(coordinates.position(values)), values, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_log_jacobian_is_that_of_automatic_differentiation(name: str) -> None:
    support, shape, free = SUPPORTS[name]
    coordinates = Unconstrained(flat(support, shape), ["value"])
    for position in positions(coordinates.size, 2)[1]:
        matrix = jacobian(lambda u: free(coordinates.values(u)["value"]).flatten(), position)
        assert matrix.shape == (coordinates.size, coordinates.size)
        assert_close(coordinates.log_jacobian(position), torch.linalg.slogdet(matrix).logabsdet)


def test_coordinates_of_several_sites_lie_one_after_the_other() -> None:
    program = programs()["mixture"]
    sites = ("scatter", "weights", "mean")
    coordinates = Unconstrained(program, sites)
    position = torch.randn(coordinates.size, dtype=torch.float64)
    assert coordinates.sizes == [2 * 3, 1, 2 * 2]
    total = position.new_zeros(())
    for site, part in zip(sites, position.split(coordinates.sizes), strict=True):
        alone = Unconstrained(program, [site])
        assert torch.equal(alone.values(part)[site], coordinates.values(position)[site])
        total += alone.log_jacobian(part)
    assert_close(coordinates.log_jacobian(position), total)


PRIORS: dict[str, Callable[[], Any]] = {
    "Normal": lambda: dist.Normal(1.0, 2.0),
    "Gamma": lambda: dist.Gamma(3.0, 2.0),
    "LogNormal": lambda: dist.LogNormal(0.3, 0.7),
    "Beta": lambda: dist.Beta(2.0, 5.0),
    "Uniform": lambda: dist.Uniform(2.0, 5.0),
    "Pareto": lambda: dist.Pareto(torch.tensor(1.5), torch.tensor(3.0)),
    "Dirichlet": lambda: dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0])),
    "LKJCholesky": lambda: dist.LKJCholesky(2, torch.tensor(2.0)),
    "InverseWishart 1": lambda: InverseWishart(3.0, torch.tensor([[2.0]])),
    "InverseWishart 2": lambda: InverseWishart(14.0, torch.tensor([[20.0, 4.0], [4.0, 30.0]])),
    "Wishart": lambda: dist.Wishart(torch.tensor(12.0), torch.tensor([[0.5, 0.1], [0.1, 0.3]])),
}


@pytest.mark.parametrize("name", PRIORS)
def test_a_prior_integrates_to_one_over_its_coordinates(name: str) -> None:
    """By the trapezoidal rule, whose error falls exponentially for what decays smoothly at both ends."""
    program = Program(lambda: pyro.sample("value", PRIORS[name]()))
    density, size = unconstrained(program, "vmapped", gradient=False)
    reach, points = {1: (40.0, 8001), 2: (25.0, 501), 3: (8.0, 121)}[size]
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(*[axis] * size, indexing="ij"), -1).reshape(-1, size)
    log_densities = torch.cat([density(block, {}) for block in grid.split(2**18)])
    log_mass = log_densities.nan_to_num(nan=-math.inf).logsumexp(0) + size * math.log(2.0 * reach / (points - 1))
    assert abs(float(log_mass)) < 1e-6


# -------------------------------------------------------------------------------------------------- inverse Wishart
def positive_definite(size: int, *batch: int, seed: int = 0) -> Tensor:
    noise = torch.randn(*batch, size, size + 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise @ noise.mT / size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_inverse_wishart_density_is_that_of_scipy(size: int) -> None:
    df, scale, values = size + 1.5, positive_definite(size), positive_definite(size, 6, seed=1)
    expected = [stats.invwishart(df, scale.numpy()).logpdf(value.numpy()) for value in values]
    actual = InverseWishart(df, scale).log_prob(values)
    np.testing.assert_allclose(actual, expected, rtol=1e-10, atol=1e-10)


def test_inverse_wisharts_of_a_batch_do_not_touch_one_another() -> None:
    df, scale = torch.tensor([5.0, 9.0], dtype=torch.float64), positive_definite(3, 4, 1)
    batch, values = InverseWishart(df, scale), positive_definite(3, 4, 2, seed=1)
    assert batch.batch_shape == (4, 2) and batch.event_shape == (3, 3)
    assert batch.sample(Size([7])).shape == (7, 4, 2, 3, 3)
    expected = [[InverseWishart(df[j], scale[i, 0]).log_prob(values[i, j]) for j in range(2)] for i in range(4)]
    assert_close(batch.log_prob(values), torch.tensor(expected, dtype=torch.float64))
    assert_close(InverseWishart(df, scale[0, 0]).expand([4, 2]).mean[3], InverseWishart(df, scale[0, 0]).mean)


def test_the_inverse_wishart_density_has_the_gradient_of_finite_differences() -> None:
    df = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    factor = torch.linalg.cholesky(positive_definite(3)).requires_grad_()
    position = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    transform = PositiveDefinite()
    assert torch.autograd.gradcheck(
        lambda df, f, u: InverseWishart(df, f.tril() @ f.tril().mT).log_prob(transform(u)), (df, factor, position)
    )


def test_inverse_wishart_draws_have_the_law_of_the_density() -> None:
    """Σ_11 ~ InverseGamma((ν − D + 1)/2, Ψ_11/2), and |Ψ| / |Σ| ~ χ²(ν) χ²(ν−1) …

    Each p-value falls below 1e-4 by chance for one seed in 10,000.
    """
    df, scale = 5.5, positive_definite(3)
    with isolated(0):
        draws = InverseWishart(df, scale).sample(Size([4000])).numpy()
        ratios = np.linalg.det(scale.numpy()) / np.linalg.det(draws)
        peer = np.prod([stats.chi2(df - i).rvs(4000) for i in range(3)], axis=0)
    marginal = stats.invgamma((df - 2.0) / 2.0, scale=float(scale[0, 0]) / 2.0)
    assert stats.kstest(draws[:, 0, 0], marginal.cdf).pvalue > 1e-4
    assert stats.ks_2samp(ratios, peer).pvalue > 1e-4
    np.testing.assert_allclose(draws, draws.swapaxes(1, 2), rtol=1e-12)


def test_inverse_wishart_draws_carry_the_gradients_of_their_expectations() -> None:
    """D = 1: E log Σ = log(ψ/2) − digamma(ν/2). False alarm: |z| > 5, 6e-7."""
    df = torch.full((20000,), 6.0, dtype=torch.float64, requires_grad=True)
    psi = torch.full((20000,), 2.0, dtype=torch.float64, requires_grad=True)
    with isolated(0):
        draws = InverseWishart(df, psi[:, None, None]).rsample().log()
    by_df, by_psi = torch.autograd.grad(draws.sum(), (df, psi))
    expected = -0.5 * torch.polygamma(1, torch.tensor(3.0, dtype=torch.float64))
    z = (by_df.mean() - expected) / (by_df.std() / math.sqrt(len(by_df)))
    assert abs(float(z)) < 5.0
    assert_close(by_psi, torch.full_like(by_psi, 0.5))


def test_the_transform_to_positive_definite_matrices_is_the_cholesky_factor() -> None:
    transform, matrix = PositiveDefinite(), positive_definite(3, 2)
    factor = torch.linalg.cholesky(matrix)
    position = transform.inv(matrix)
    assert position.shape == transform.inverse_shape(matrix.shape) == (2, 6)
    assert transform.forward_shape(position.shape) == matrix.shape
    assert_close(position[:, :3].exp(), factor.diagonal(dim1=-2, dim2=-1))
    assert_close(position[:, 3:], strictly_below(factor))
    assert_close(transform(position), matrix)


@pytest.mark.parametrize("dimension", [2, 3, 7])
def test_a_sphere_is_projected_from_a_pole(dimension: int) -> None:
    """There and back, close to the pole too; the Jacobian is that of surfaces, √|JᵀJ|."""
    transform = bijection(constraints.sphere)
    assert isinstance(transform, Stereographic)
    u = torch.randn(20, dimension - 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u = u * 10.0 ** torch.linspace(-3, 6, 20, dtype=torch.float64).unsqueeze(-1)
    x = transform(u)
    assert transform.inverse_shape(x.shape) == u.shape and transform.forward_shape(u.shape) == x.shape
    assert constraints.sphere.check(x).all()
    torch.testing.assert_close(transform.inv(x), u, rtol=1e-9, atol=0.0)
    jacobian = vmap(torch.func.jacrev(transform))(u[:10])
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, x)[:10], 0.5 * torch.logdet(jacobian.mT @ jacobian))


def test_a_mixture_has_the_coordinates_of_its_components() -> None:
    parts = dist.Gamma(torch.tensor([1.0, 5.0]), 1.0)
    mixture = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), parts)
    assert bijection(mixture.support) == biject_to(parts.support)
    matrices = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), dist.Dirichlet(torch.ones(2, 3)))
    assert isinstance(bijection(matrices.support), StickBreaking)


def test_a_simplex_is_broken_as_torch_does_it() -> None:
    """Values, inverses, Jacobians and gradients, also near the edge; and a gradient for 20,000 parts fits into memory."""
    ours, theirs = bijection(constraints.independent(constraints.simplex, 1)), biject_to(constraints.simplex)
    assert isinstance(bijection(constraints.simplex), StickBreaking)
    x = 8.0 * torch.randn(50, 2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(ours.inv(ours(0.1 * x)), 0.1 * x)
    expected = theirs.log_abs_det_jacobian(x, theirs(x)).sum(-1)
    torch.testing.assert_close(ours.log_abs_det_jacobian(x, ours(x)), expected)
    slopes = [vmap(grad(lambda u, t=t: t(u).square().sum()))(x) for t in (ours, theirs)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)
    wide = grad(lambda u: StickBreaking()(u).square().sum())(torch.zeros(20_000))  # 1.6 GB a product in torch's own
    assert wide.isfinite().all()


def test_a_graph_takes_inputs_that_are_laid_out_in_another_way() -> None:
    graph = quicken(record(lambda x: x.reshape(-1) * torch.arange(6.0), [torch.ones(3, 2)]))
    x = torch.arange(6.0).reshape(2, 3).mT
    assert torch.equal(graph.forward(x), x.reshape(-1) * torch.arange(6.0))
