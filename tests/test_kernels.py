"""Kernels leave their target as it is: exactly on finite spaces, pointwise by detailed balance, and in distribution.

Transition matrices are built without drawing: the random numbers of a kernel are replaced by chosen ones, at both sides of
every edge at which its decision should turn, so that the probability of each move is known to 1e-12.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoStructured
from torch import Tensor, nn

from inference import (
    EM,
    HMC,
    NUTS,
    SVI,
    AdaptiveWalk,
    Enumerate,
    Gibbs,
    Independence,
    Langevin,
    MetropolisHastings,
    Posterior,
    Prior,
    Unsupported,
    arviz,
    calibration,
    markov,
)
from inference.adaptation import StepAdaptation
from inference.blocks import Current
from inference.mcmc import HamiltonianKernel, RandomWalkKernel, evened, recent
from inference.program import Program
from inference.proposals import IndependenceKernel, IndependenceState, LangevinKernel, StudentReference
from inference.trees import TreeKernel, turns
from targets import TARGETS, Target, assert_stationary, gaussian, steps_of
from zoo import BY_NAME

EXACT = 1e-12
SIDE = 1e-12  # how near to an edge a decision is asked for


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float64)


def scripted(monkeypatch: pytest.MonkeyPatch, *, normals: Tensor | None = None, uniforms: Tensor | None = None) -> None:
    """Replaces what the next kernel step draws."""
    if normals is not None:
        monkeypatch.setattr(torch, "randn_like", lambda like, **_: normals.expand_as(like))
        monkeypatch.setattr(torch, "randn", lambda *shape, **_: normals)
    if uniforms is not None:
        monkeypatch.setattr(torch, "rand_like", lambda like, **_: uniforms.expand_as(like))


# --------------------------------------------------------------------------------- finite Markov chains
LAW = tensor([0.05, 0.3, 0.2, 0.35, 0.1])


def test_the_stationary_law_of_two_states_is_their_formula() -> None:
    there, back = 0.3, 0.05
    law = markov.stationary(tensor([[1 - there, there], [back, 1 - back]]))
    assert torch.allclose(law, tensor([back, there]) / (there + back), rtol=0.0, atol=EXACT)
    assert markov.relaxation(tensor([[1 - there, there], [back, 1 - back]])) == pytest.approx(1 / (there + back))


def test_metropolis_matrices_are_reversible_and_have_the_law_for_their_stationary_one() -> None:
    proposals = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = markov.metropolis(proposals / proposals.sum(1, keepdim=True), 7.0 * LAW)
    assert float(markov.imbalance(matrix, LAW)) < EXACT
    assert torch.allclose(markov.stationary(matrix), LAW, rtol=0.0, atol=EXACT)


def test_a_sweep_of_conditionals_is_stationary_and_not_reversible() -> None:
    law = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    updates = [markov.conditional(law, axis) for axis in range(3)]
    assert all(float(markov.imbalance(update, law.flatten())) < EXACT for update in updates)
    sweep = updates[0] @ updates[1] @ updates[2]
    assert float(markov.imbalance(sweep, law.flatten())) > 1e-3
    assert float(markov.total_variation(markov.stationary(sweep), law.flatten() / law.sum())) < EXACT


def test_states_of_no_probability_are_left_and_not_entered() -> None:
    uniform = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    matrix = markov.metropolis(uniform, tensor([0.5, 0.5, 0.0]))
    assert float(matrix[:2, 2].abs().max()) == 0.0 and float(matrix[2, :2].sum()) == pytest.approx(2 / 3)


def test_a_chain_visits_its_states_as_often_as_it_should() -> None:
    """Shares of 4000 independent chains within five standard errors, a false alarm in 10⁵ runs."""
    torch.manual_seed(0)
    matrix = markov.metropolis(torch.full((5, 5), 0.2, dtype=torch.float64), LAW)
    paths = markov.sample(matrix, torch.zeros(4000, dtype=torch.long), 40)
    assert paths.shape == (4000, 41)
    share = torch.nn.functional.one_hot(paths[:, -1], 5).double().mean(0)
    assert bool(((share - LAW).abs() < 5 * (LAW * (1 - LAW) / 4000).sqrt()).all())


def blocks(sizes: list[int], periods: list[int], seed: int) -> tuple[Tensor, list[list[int]]]:
    """A random chain of closed classes of known sizes and periods, in shuffled order, and the classes.

    A class of the period d goes round d groups of states; from one group to the next, every probability is positive.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(sizes), generator=generator)
    matrix = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    classes, first = [], 0
    for size, d in zip(sizes, periods, strict=True):
        states = order[first : first + size]
        group = torch.arange(size) % d
        weights = torch.rand(size, size, generator=generator, dtype=torch.float64) + 0.1
        weights = torch.where(group.unsqueeze(0) == (group.unsqueeze(1) + 1) % d, weights, 0.0)
        matrix[states.unsqueeze(1), states] = weights / weights.sum(1, keepdim=True)
        classes.append(sorted(states.tolist()))
        first += size
    return matrix, sorted(classes)


@pytest.mark.parametrize("seed", range(5))
def test_classes_and_periods_are_those_by_which_a_chain_was_built(seed: int) -> None:
    sizes, periods = [4, 6, 1, 9, 5], [2, 3, 1, 4, 1]
    matrix, classes = blocks(sizes, periods, seed)
    assert markov.communicating_classes(matrix) == classes
    assert bool(markov.is_recurrent(matrix).all())
    expected = dict(zip(sizes, periods, strict=True))
    found = markov.period(matrix)
    assert all(set(found[states].tolist()) == {expected[len(states)]} for states in classes)
    assert markov.mixing_time(matrix) == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_a_class_with_a_way_out_is_transient(seed: int) -> None:
    """The class of 4 leaks into that of 6; periods and classes stay, and the stationary law is that of the class of 6."""
    matrix, classes = blocks([4, 6], [2, 1], seed)
    leaking, closed = sorted(classes, key=len)
    i, j = leaking[0], closed[0]
    matrix[i] *= 0.9
    matrix[i, j] += 0.1
    assert markov.communicating_classes(matrix) == classes
    assert [state for state, stays in enumerate(markov.is_recurrent(matrix).tolist()) if stays] == closed
    assert markov.period(matrix)[leaking].tolist() == [2] * 4
    law = markov.stationary(matrix)
    assert law[leaking].tolist() == [0.0] * 4
    assert float((law @ matrix - law).abs().max()) < EXACT
    assert math.isfinite(markov.mixing_time(matrix))  # once it has left, it forgets


def test_a_state_that_is_never_seen_again_has_no_period() -> None:
    assert markov.period(tensor([[0.0, 1.0], [0.0, 1.0]])).tolist() == [0, 1]


def test_the_stationary_law_keeps_its_digits_where_parts_hardly_meet() -> None:
    """A birth-and-death chain: π_{i+1} / π_i = b_i / d_{i+1}, from 1 down to 10⁻³⁰, over a bridge of 10⁻¹¹."""
    births, deaths = tensor([0.3, 1e-11, 0.2, 1e-10]), tensor([0.4, 3e-11, 0.5, 0.5])
    matrix = torch.diag(births, 1) + torch.diag(deaths, -1)
    matrix += torch.diag(1.0 - matrix.sum(1))
    law = torch.cat([tensor([1.0]), (births / deaths).cumprod(0)])
    assert torch.allclose(markov.stationary(matrix), law / law.sum(), rtol=1e-12, atol=0.0)


def test_reversible_chains_are_told_from_those_that_go_round() -> None:
    """Kolmogorov: on a cycle of three, the products of the probabilities of both directions are equal or not."""
    proposals = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    proposals /= proposals.sum(1, keepdim=True)
    assert markov.is_reversible(markov.metropolis(proposals, LAW)) and markov.is_reversible(
        markov.metropolis(proposals, LAW), LAW
    )
    assert not markov.is_reversible(markov.metropolis(proposals, LAW), torch.ones(5))
    for q in (0.3, 0.2, 0.3 + 1e-9):
        there, back = 0.3, q
        matrix = tensor([[1 - there - back, there, back], [back, 1 - there - back, there], [there, back, 1 - there - back]])
        assert markov.is_reversible(matrix) == (there**3 == back**3)
        assert markov.is_reversible(matrix, tolerance=1e-6) == (q != 0.2)


@pytest.mark.parametrize("tolerance", [0.25, 0.01, 1e-6])
@pytest.mark.parametrize(("there", "back"), [(0.1, 0.1), (0.013, 0.002), (0.9, 0.8), (1e-7, 3e-7)])
def test_the_mixing_time_of_two_states_is_their_formula(there: float, back: float, tolerance: float) -> None:
    """d(t) = max(π) |1 - a - b|ᵗ."""
    matrix = tensor([[1 - there, there], [back, 1 - back]])
    largest = max(there, back) / (there + back)
    expected = math.ceil(math.log(tolerance / largest) / math.log(abs(1 - there - back)))
    assert markov.mixing_time(matrix, tolerance) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dimension", [1, 3, 6])
def test_the_mixing_time_of_the_lazy_walk_on_the_cube_is_that_of_its_spectrum(dimension: int) -> None:
    """P^t(0, x) depends on the weight k of x: 2⁻ⁿ Σ_j K_k(j) (1 - j/n)ᵗ, K the Krawtchouk polynomials."""
    n, states = dimension, 2**dimension
    matrix = 0.5 * torch.eye(states, dtype=torch.float64)
    for i in range(states):
        for bit in range(n):
            matrix[i, i ^ (1 << bit)] += 0.5 / n

    def distance(t: int) -> float:
        total = 0.0
        for k in range(n + 1):
            krawtchouk = [
                sum((-1) ** i * math.comb(k, i) * math.comb(n - k, j - i) for i in range(min(j, k) + 1) if j - i <= n - k)
                for j in range(n + 1)
            ]
            p = sum(krawtchouk[j] * (1 - j / n) ** t for j in range(n + 1)) / states
            total += 0.5 * math.comb(n, k) * abs(p - 1 / states)
        return total

    for tolerance in (0.3, 0.25, 0.011):
        expected = next(t for t in range(1000) if distance(t) <= tolerance)
        assert markov.mixing_time(matrix, tolerance) == expected
    assert markov.mixing_time(2.0 * matrix - torch.eye(states)) == math.inf  # not lazy: of period 2


def test_a_chain_that_draws_its_law_mixes_in_one_step_and_one_state_in_none() -> None:
    assert markov.mixing_time(LAW.expand(5, 5)) == 1.0
    assert markov.mixing_time(torch.ones(1, 1)) == 0.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: markov.stationary(tensor([[0.5, 0.6], [0.5, 0.5]])), "every row of it sums to 1"),
        (lambda: markov.stationary(tensor([[1.0, 0.0]])), "is square"),
        (lambda: markov.stationary(torch.eye(2, dtype=torch.float64)), "more than one stationary law"),
        (lambda: markov.imbalance(torch.eye(2), tensor([0.2, 0.3, 0.5])), "2 states has 2 entries"),
        (lambda: markov.metropolis(torch.eye(2), tensor([-0.2, 1.2])), "no negative entries"),
        (lambda: markov.communicating_classes(torch.ones(2, 3) / 3), "is square"),
        (lambda: markov.period(torch.ones(3)), "is square"),
        (lambda: markov.is_recurrent(tensor([[0.5, 0.6], [0.5, 0.5]])), "every row of it sums to 1"),
        (lambda: markov.is_reversible(torch.eye(2)), "more than one stationary law"),
        (lambda: markov.mixing_time(torch.eye(2), 0.5), "above 0 and below 1/2, but this one is 0.5"),
        (lambda: markov.mixing_time(torch.ones(1, 2) / 2), "is square"),
    ],
    ids=[
        *("rows", "shape", "parts", "law", "negative"),
        *("classes", "period", "recurrent", "reversible", "tolerance", "mixing"),
    ],
)
def test_what_is_no_markov_chain_is_refused(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()


# ------------------------------------------------------------------- exact transition matrices of kernels
@pytest.fixture
def run(inside_a_run: None) -> Iterator[None]:
    """Alias, so that a test says what it needs."""
    yield


def independence_matrix(log_law: Tensor, log_q: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Transition matrix of the independence kernel on the points 0, 1, …, with every decision tried at its edge."""
    count = len(log_law)
    origin, aim = (x.flatten() for x in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))
    position = origin.to(log_law).unsqueeze(1)
    proposals = aim.to(log_law)[None, :, None]
    kernel = IndependenceKernel(reference=None)  # type: ignore[arg-type]
    state = IndependenceState(
        position, log_law[origin], log_q[origin], proposals, log_q[aim].unsqueeze(0), torch.zeros((), dtype=torch.long)
    )

    def density(points: Tensor) -> Tensor:
        return log_law[points.squeeze(1).long()]

    def arrivals(uniforms: Tensor) -> tuple[Tensor, Any]:
        scripted(monkeypatch, uniforms=uniforms)
        moved, info = kernel.step(state, density)
        assert torch.equal(moved.log_density, density(moved.position))
        assert torch.equal(moved.log_q, log_q[moved.position.squeeze(1).long()])
        return moved.position.squeeze(1).long(), info

    _, info = arrivals(torch.tensor(0.5, dtype=torch.float64))
    rate = info.acceptance_rate
    assert torch.equal(arrivals(rate * (1 - SIDE))[0], aim)
    is_sure = rate > 1.0 - 1e-9
    assert torch.equal(arrivals(torch.where(is_sure, 0.5, rate * (1 + SIDE)))[0], torch.where(is_sure, aim, origin))
    moves = (rate * log_q[aim].exp()).reshape(count, count)
    moves = moves * (1.0 - torch.eye(count, dtype=moves.dtype))
    return moves + torch.diag(1.0 - moves.sum(1))


def test_an_independence_sampler_has_its_exact_transition_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    q = tensor([0.4, 0.1, 0.1, 0.1, 0.3])
    matrix = independence_matrix(LAW.log() + 3.0, q.log(), monkeypatch)  # p is known up to a factor
    assert float((matrix - markov.metropolis(q.expand(5, 5), LAW)).abs().max()) < EXACT
    assert float(markov.imbalance(matrix, LAW)) < EXACT


TABLES = {
    "a": tensor([0.2, 0.5, 0.3]),
    "b": tensor([[0.6, 0.4], [0.1, 0.9], [0.7, 0.3]]),
    "y": tensor([[-1.0, 0.5], [0.3, 2.0], [1.2, -0.4]]),
}


def labels(y: Tensor) -> None:
    """Two coupled finite sites and one observation."""
    a = pyro.sample("a", dist.Categorical(TABLES["a"]))
    b = pyro.sample("b", dist.Categorical(TABLES["b"][a]))
    pyro.sample("y", dist.Normal(TABLES["y"][a, b], 1.0), obs=y)


def _joint(y: float) -> Tensor:
    return TABLES["a"].unsqueeze(1) * TABLES["b"] * (-0.5 * (y - TABLES["y"]).square()).exp()


def enumerate_matrix(sites: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Transition matrix of Enumerate on the states (a, b) of ``labels``; intervals of its uniforms tried at both ends."""
    law = _joint(0.7)
    program = Program(labels, (tensor(0.7),))
    density = program.density
    a, b = (x.flatten() for x in torch.meshgrid(torch.arange(3), torch.arange(2), indexing="ij"))
    values = {"a": a, "b": b}
    current = Current(values, density.joint(values))
    block = Enumerate(sites=sites)
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    (site,) = sites
    given = law / law.sum(0 if site == "a" else 1, keepdim=True)
    rows = given.T[b] if site == "a" else given[a]  # (state, choice)
    edges = torch.cat([torch.zeros(6, 1, dtype=rows.dtype), rows.cumsum(1)], 1)
    for choice in range(rows.shape[1]):
        for level in (edges[:, choice] + SIDE, edges[:, choice + 1] - SIDE):
            monkeypatch.setattr(density, "uniforms", lambda names, chains, level=level: level.unsqueeze(1))
            scripted(monkeypatch, uniforms=torch.tensor(1.0 - SIDE, dtype=torch.float64))
            _, moved, move = block.step((), density, current, 0)
            assert move.log_ratio is not None and float(move.log_ratio.abs().max()) < EXACT
            assert bool((moved.values[site] == choice).all())
            assert torch.allclose(moved.log_joint, density.joint(moved.values), rtol=0.0, atol=EXACT)
        arrival = moved.values["a"] * 2 + moved.values["b"]
        matrix[torch.arange(6), arrival] += rows[:, choice]
    return matrix


@pytest.mark.parametrize("axis", [0, 1])
def test_enumeration_of_one_site_is_its_exact_conditional(axis: int, run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = enumerate_matrix((("a", "b")[axis],), monkeypatch)
    law = _joint(0.7)
    assert float((matrix - markov.conditional(law, axis)).abs().max()) < EXACT
    assert float(markov.imbalance(matrix, law.flatten())) < EXACT


TRIALS = 4


def hits(y: Tensor) -> None:
    count = pyro.sample("count", dist.Binomial(TRIALS, 0.3))
    pyro.sample("y", dist.Normal(count, 1.5), obs=y)


def walk_matrix(scale: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """Transition matrix of AdaptiveWalk on the counts 0 … TRIALS, and the law that it should keep."""
    program = Program(hits, (tensor(1.8),))
    density = program.density
    counts = torch.arange(TRIALS + 1, dtype=torch.float64)
    current = Current({"count": counts}, density.joint({"count": counts}))
    block = AdaptiveWalk().bind(["count"], density, current)
    state = block.init(density, current)._replace(log_scale=tensor([math.log(scale)]))
    matrix = torch.zeros(TRIALS + 1, TRIALS + 1, dtype=torch.float64)
    half = tensor(0.5)
    for size in range(1, TRIALS + 1):
        for sign in (-1, 1):
            chance = float(torch.special.ndtr(tensor(size / scale)) - torch.special.ndtr(tensor((size - 1) / scale)))
            for normal in ((size - 1) / scale + SIDE, size / scale - SIDE):  # the whole interval takes this step
                scripted(monkeypatch, normals=torch.full((TRIALS + 1, 1), sign * normal, dtype=torch.float64), uniforms=half)
                _, _, move = block.step(state, density, current, 0)
                rate = move.acceptance
                aim = counts + sign * size
                scripted(monkeypatch, uniforms=(rate * (1 - SIDE)).unsqueeze(1))
                _, moved, _ = block.step(state, density, current, 0)
                assert torch.equal(moved.values["count"], torch.where(rate > 0.0, aim, counts))
                assert torch.allclose(moved.log_joint, density.joint(moved.values), rtol=0.0, atol=EXACT)
                is_sure = rate > 1.0 - 1e-9
                scripted(monkeypatch, uniforms=torch.where(is_sure, 0.5, rate * (1 + SIDE)).unsqueeze(1))
                _, moved, _ = block.step(state, density, current, 0)
                assert torch.equal(moved.values["count"], torch.where(is_sure, aim, counts))
            inside = (aim >= 0) & (aim <= TRIALS)
            assert bool((rate[~inside] == 0.0).all())
            matrix[counts[inside].long(), aim[inside].long()] += chance * rate[inside]
    law = (current.log_joint - current.log_joint.logsumexp(0)).exp()
    return matrix + torch.diag(1.0 - matrix.sum(1)), law


@pytest.mark.parametrize("scale", [0.7, 2.5])
def test_a_walk_on_counts_has_its_exact_transition_matrix(scale: float, run: None, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, law = walk_matrix(scale, monkeypatch)
    assert float(markov.imbalance(matrix, law)) < EXACT
    assert float(markov.total_variation(law @ matrix, law)) < EXACT
    assert torch.allclose(markov.stationary(matrix), law, rtol=0.0, atol=1e-11)


# ------------------------------------------------------------------------------------ detailed balance
FACTORS = {
    "diagonal": tensor([0.7, 1.3, 0.4]),
    "dense": tensor([[0.7, 0.0, 0.0], [0.5, 1.1, 0.0], [-0.2, 0.3, 0.6]]),
}


def log_normal(x: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    matrix = torch.diag(factor) if factor.dim() == 1 else factor
    return torch.distributions.MultivariateNormal(mean, scale_tril=matrix).log_prob(x)


def assert_langevin_balances(monkeypatch: pytest.MonkeyPatch, factor: Tensor) -> None:
    """π(x) q(y | x) a(x, y) = π(y) q(x | y) a(y, x), each side by the formula of q and the kernel's own a."""
    target, step_size = TARGETS["funnel"], tensor(0.5)
    kernel = LangevinKernel(step_size, factor)
    x = target.draws(200, seed=1)
    state = kernel.init(x, target.gradient)
    scripted(monkeypatch, normals=torch.randn_like(x), uniforms=tensor(0.0))
    y_state, there = kernel.step(state, target.gradient)  # a uniform of 0 accepts everything
    y = y_state.position

    def mean(z: Tensor) -> Tensor:
        matrix = torch.diag(factor) if factor.dim() == 1 else factor
        return z + 0.5 * step_size.square() * target.gradient(z)[0] @ matrix @ matrix.T

    matrix = torch.diag(factor) if factor.dim() == 1 else factor
    noise = torch.linalg.solve_triangular(matrix, (x - mean(y)).T / step_size, upper=False).T
    scripted(monkeypatch, normals=noise)
    back_state, back = kernel.step(kernel.init(y, target.gradient), target.gradient)
    assert torch.allclose(back_state.position, x, rtol=1e-9, atol=1e-9)
    forward = target.log_density(x) + log_normal(y, mean(x), step_size * factor) + there.acceptance_rate.log()
    backward = target.log_density(y) + log_normal(x, mean(y), step_size * factor) + back.acceptance_rate.log()
    is_seen = (there.acceptance_rate > 0.0) & (back.acceptance_rate > 0.0)  # not rounded to 0
    assert float(is_seen.double().mean()) > 0.9
    assert torch.allclose(forward[is_seen], backward[is_seen], rtol=0.0, atol=1e-9)
    assert 0.05 < float(there.acceptance_rate.mean()) < 0.95
    assert torch.allclose(back_state.log_density, state.log_density) and torch.allclose(back_state.gradient, state.gradient)


@pytest.mark.parametrize("shape", FACTORS)
def test_langevin_satisfies_detailed_balance_pointwise(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_langevin_balances(monkeypatch, FACTORS[shape])


def banana_gradient(q: Tensor) -> tuple[Tensor, Tensor]:
    """By hand, so that a trajectory can be differentiated; with a third, normal coordinate."""
    x, y, w = q.unbind(-1)
    apart = 4.0 * (y - x.square())
    return torch.stack([-x + 2 * x * apart, -apart, -w], -1), -0.5 * (x.square() + w.square()) - 0.5 * (y - x * x) ** 2 * 4


def trajectory(monkeypatch: pytest.MonkeyPatch, shape: str, step_size: float = 0.2, steps: int = 7) -> Callable[..., Any]:
    """(position, momentum) -> end of the leapfrog trajectory, and the info of the kernel."""
    factor = FACTORS[shape]
    size = tensor(step_size)
    kernel = HamiltonianKernel(size, size * (steps - 0.5), factor, tensor(1.0))

    def run(position: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor, Any]:
        scripted(monkeypatch, normals=momentum)
        _, info = kernel.step(kernel.init(position, banana_gradient), banana_gradient)
        whitened = torch.linalg.solve_triangular(
            torch.diag(factor) if factor.dim() == 1 else factor, info.velocity.T, upper=False
        )
        return info.proposal, whitened.T, info

    return run


@pytest.mark.parametrize("shape", FACTORS)
def test_a_leapfrog_trajectory_is_reversible(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trajectory(monkeypatch, shape)
    position, momentum = torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    end, last, there = run(position, momentum)
    home, first, back = run(end, -last)
    assert int(there.n_steps[0]) == 7 and float((end - position).abs().max()) > 0.5
    assert torch.allclose(home, position, rtol=0.0, atol=1e-10) and torch.allclose(first, -momentum, rtol=0.0, atol=1e-10)
    assert torch.allclose(there.energy_error, -back.energy_error, rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("shape", FACTORS)
def test_a_leapfrog_trajectory_preserves_volume(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trajectory(monkeypatch, shape)

    def flow(phase: Tensor) -> Tensor:
        end, last, _ = run(phase[:3].unsqueeze(0), phase[3:].unsqueeze(0))
        return torch.cat([end, last], 1).squeeze(0)

    jacobian = torch.autograd.functional.jacobian(flow, tensor([0.3, -0.8, 1.1, 0.5, 1.0, -0.7]))
    assert float((torch.linalg.det(jacobian) - 1.0).abs()) < 1e-10
    assert float((jacobian - torch.eye(6)).abs().max()) > 0.1


class Counted:
    """The banana, that counts how often its value is asked for."""

    def __init__(self) -> None:
        self.values, self.gradients = 0, 0

    def __call__(self, q: Tensor) -> tuple[Tensor, Tensor]:
        self.values += 1
        return banana_gradient(q)

    def gradient(self, q: Tensor) -> Tensor:
        self.gradients += 1
        return banana_gradient(q)[0]


@pytest.mark.parametrize("groups", [1, 2])
def test_a_trajectory_asks_for_the_density_at_its_end_only_and_goes_the_same_way(groups: int) -> None:
    size = tensor(0.2) if groups == 1 else tensor([0.2, 0.3])
    kernel = HamiltonianKernel(size, tensor(1.3).expand(groups).squeeze(), torch.ones(3, dtype=torch.float64), tensor(1.0))
    position = torch.randn(20, 3, dtype=torch.float64)
    counted, found = Counted(), []
    for density in (banana_gradient, counted):
        state = kernel.init(position, density)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            found.append(kernel.step(state, density))
    for plain, alone in zip(*(state + info for state, info in found), strict=True):
        assert torch.equal(plain, alone)
    assert counted.values == 2 and counted.gradients == 6  # ⌈1.3 / 0.2⌉ steps


def test_the_energy_error_of_a_trajectory_falls_with_the_square_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over one time: slope 2 within 0.1."""
    position = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    momentum = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        *_, info = trajectory(monkeypatch, "diagonal", 2.0 / steps, steps)(position, momentum)
        errors.append(float(info.energy_error.abs().median()))
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(slope - 2.0) < 0.1 for slope in slopes), slopes


# ----------------------------------------------------------------------------------------- stationarity
def _student(target: Target) -> IndependenceKernel:
    torch.manual_seed(5)
    return IndependenceKernel(StudentReference.fitted(target.draws(2000, seed=9)))


def _factor(target: Target, is_dense: bool) -> Tensor:
    covariance = torch.cov(target.draws(2000, seed=9).T).reshape(target.width, target.width)
    return torch.linalg.cholesky(covariance) if is_dense else covariance.diagonal().sqrt()


STEP, TIME, ONE = tensor(0.9), tensor(2.0), tensor(1.0)
KERNELS: dict[str, Callable[[Target], tuple[Any, bool]]] = {
    "walk": lambda t: (RandomWalkKernel(tensor(1.2), _factor(t, True)), False),
    "langevin": lambda t: (LangevinKernel(tensor(1.1), _factor(t, True)), True),
    "langevin, diagonal": lambda t: (LangevinKernel(STEP, _factor(t, False)), True),
    "independence": lambda t: (_student(t), False),
    "hamiltonian": lambda t: (HamiltonianKernel(STEP, TIME, _factor(t, False), ONE), True),
    "hamiltonian, dense": lambda t: (HamiltonianKernel(STEP, TIME, _factor(t, True), ONE), True),
    "tree": lambda t: (TreeKernel(STEP, _factor(t, False)), True),
    "tree, dense": lambda t: (TreeKernel(tensor(0.4), _factor(t, True)), True),
    "tree, cut off": lambda t: (TreeKernel(tensor(0.2), _factor(t, False), max_depth=2), True),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_leaves_exact_draws_exact(kernel: str, target: str) -> None:
    """Five steps of 4000 chains; false alarms: 54 tests at 1e-6 each."""
    law = TARGETS[target]
    built, needs_gradient = KERNELS[kernel](law)
    assert_stationary(steps_of(built, law.gradient if needs_gradient else law.log_density, 5), law)


# --------------------------------------------------------------------------------------------- adaptation
@pytest.mark.parametrize("is_dense", [False, True], ids=["diagonal", "dense"])
def test_step_size_and_covariance_are_found(is_dense: bool) -> None:
    """The covariance within 10 % of that of the target, the acceptance rate above its aim but by less than 0.1.

    It is the logarithm of the step size that is averaged, and the rate is a concave function of it.
    """
    torch.manual_seed(0)
    target = gaussian(4, 0.6 if is_dense else 0.0)
    position = target.draws(32, seed=3)
    adaptation = StepAdaptation.start(position, -3.0, is_dense)
    state = LangevinKernel(ONE, adaptation.factor).init(position, target.gradient)
    for _ in range(1000):
        kernel = LangevinKernel(adaptation.step_size(is_final=False), adaptation.factor)
        state, info = kernel.step(state, target.gradient)
        adaptation = adaptation.update(state.position, info.acceptance_rate, 1000, 0.6)
    kernel, rates = LangevinKernel(adaptation.step_size(is_final=True), adaptation.factor), []
    for _ in range(100):
        state, info = kernel.step(state, target.gradient)
        rates.append(info.acceptance_rate.mean())
    assert 0.58 < float(torch.stack(rates).mean()) < 0.7
    exact = torch.cov(target.draws(100_000, seed=4).T)
    if is_dense:
        found = adaptation.factor @ adaptation.factor.T
        assert float((found / exact - 1.0).abs().max()) < 0.1
    else:
        assert float((adaptation.factor.square() / exact.diagonal() - 1.0).abs().max()) < 0.1


def test_a_chain_that_refuses_everything_shortens_the_steps_of_all() -> None:
    rates = torch.full((16,), 0.8, dtype=torch.float64)
    healthy = rates + tensor([0.2, -0.5] * 8)
    for _ in range(40):
        healthy_recent = recent(rates, healthy)
    assert abs(float(evened(healthy, healthy_recent) - healthy.mean())) < 0.02  # what varies from step to step costs little
    stuck, running = healthy.clone(), rates
    stuck[0] = 0.0
    for _ in range(60):
        running = recent(running, stuck)
    assert float(evened(stuck, running)) < 0.2


# -------------------------------------------------------------------------------------------- references
def _own(y: Tensor) -> None:
    """A guide by hand, for ``gamma_poisson``."""
    pyro.sample("rate", dist.Gamma(9.0, 5.0))


@functools.cache
def _fit(name: str, guide: Any, steps: int = 150) -> Posterior:
    instance = BY_NAME[name]
    backend = SVI(steps=steps, learning_rate=0.05, guide=guide, draws=1, seed=0, progress=False)
    return backend.fit(instance.program, *instance.data)


def _program(name: str) -> Program:
    instance = BY_NAME[name]
    return Program(instance.program, instance.data)


def reference(kind: str, name: str) -> tuple[Any, Program]:
    """A distribution over positions and the program that it is for."""
    program = _program(name)
    proposal: Any = {
        "prior": lambda: Prior(),
        "AutoNormal": lambda: Independence(_fit(name, AutoNormal)),
        "AutoMultivariateNormal": lambda: Independence(_fit(name, AutoMultivariateNormal)),
        "own": lambda: Independence(_own),
        "draws": lambda: Independence(MetropolisHastings(chains=8, warmup=200, draws=50, seed=0, progress=False).fit(
            BY_NAME[name].program, *BY_NAME[name].data)),
    }[kind]()  # fmt: skip
    return proposal.reference(program), program


ONE_DIMENSION = [
    ("prior", "gamma_poisson"), ("prior", "beta_binomial"), ("AutoNormal", "beta_binomial"),
    ("AutoMultivariateNormal", "gamma_poisson"), ("own", "gamma_poisson"), ("draws", "beta_binomial"),
]  # fmt: skip


def assert_normalised(kind: str, name: str) -> None:
    """∫ q = 1 over the unconstrained line, by the trapezoidal rule, and log q of a draw is that of its place."""
    torch.manual_seed(0)
    found, _ = reference(kind, name)
    grid = torch.linspace(-30.0, 30.0, 6001, dtype=torch.float64)
    mass = torch.trapezoid(found.log_prob(grid.unsqueeze(1)).exp().nan_to_num(nan=0.0), grid)
    assert abs(float(mass) - 1.0) < (1e-3 if kind == "draws" else 1e-6)  # the tails of Student's distribution are wide
    position, log_q = found.sample(300)
    assert torch.allclose(found.log_prob(position), log_q, rtol=0.0, atol=1e-8)
    # shares of the draws below the quartiles, within five standard errors
    cumulative = torch.cumulative_trapezoid(found.log_prob(grid.unsqueeze(1)).exp().nan_to_num(nan=0.0), grid)
    for level in (0.25, 0.5, 0.75):
        share = float((position < grid[1:][cumulative < level].amax()).double().mean())
        assert abs(share - level) < 5 * math.sqrt(level * (1 - level) / 300)


@pytest.mark.parametrize(("kind", "name"), ONE_DIMENSION, ids=[f"{k}-{n}" for k, n in ONE_DIMENSION])
def test_the_density_of_a_reference_is_that_of_its_draws(kind: str, name: str, run: None) -> None:
    assert_normalised(kind, name)


@pytest.mark.parametrize("kind", ["prior", "AutoNormal", "AutoMultivariateNormal", "draws"])
def test_a_reference_knows_its_density_in_several_dimensions(kind: str, run: None) -> None:
    """At its own draws, of a simplex, positive numbers and a plate."""
    torch.manual_seed(0)
    for name in ("mixture",) if kind != "prior" else ("mixture", "hierarchical"):
        found, program = reference(kind, name)
        position, log_q = found.sample(20)
        assert position.shape == (20, len(found.sample(1)[0][0])) and position.dtype == program.dtype
        assert torch.allclose(found.log_prob(position), log_q, rtol=1e-9, atol=1e-7)


def test_a_fitted_mixture_has_a_component_for_each_mode() -> None:
    torch.manual_seed(0)
    target = TARGETS["two modes"]
    found = StudentReference.fitted(target.draws(2000, seed=2))
    weights = found.log_prob(tensor([[-2.0], [2.0], [0.0]]))
    assert len(found.weights) > 1 and float(weights[:2].min() - weights[2]) > 2.0


# --------------------------------------------------------------------------------------- whole samplers
def assert_agrees(posterior: Posterior, name: str, limit: float = 5.0) -> None:
    """Means and standard deviations within five Monte-Carlo standard errors of the formula: a false alarm in 10⁶."""
    for site, exact in BY_NAME[name].moments.items():
        draws = posterior.draws[site].double().numpy()
        assert arviz.ess(draws).min() > 200, (site, arviz.ess(draws))
        mean = np.abs((draws.mean((0, 1)) - exact.mean) / arviz.mcse(draws))
        sd = np.abs((draws.std((0, 1)) - exact.sd) / arviz.mcse(draws, method="sd"))
        assert mean.max() < limit and sd.max() < limit, (site, mean, sd)


def sampled(name: str, proposal: Any, **options: Any) -> Posterior:
    settings: dict[str, Any] = {"chains": 32, "warmup": 20, "draws": 100, "seed": 0, "progress": False, **options}
    return MetropolisHastings(proposal=proposal, **settings).fit(BY_NAME[name].program, *BY_NAME[name].data)


@pytest.mark.parametrize(
    ("guide", "name"),
    [(AutoNormal, "normal_variance"), (AutoMultivariateNormal, "normal_variance"), (AutoStructured, "gamma_poisson")],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_variational_fit_becomes_an_exact_sampler(guide: Any, name: str) -> None:
    """Stopped before it has converged; correlated sites, one of them positive.

    Many draws: where the guide is too narrow a chain stays long, and a short run's standard errors have not seen that.
    """
    posterior = sampled(name, Independence(_fit(name, guide)), draws=3000)
    assert posterior.plan is not None and {update.update for update in posterior.plan.updates} == {"Independence"}
    assert_agrees(posterior, name)


def test_a_guide_whose_weights_are_in_a_jacobian_finds_its_width() -> None:
    """AutoStructured scales standard noise; a gradient that forgets the Jacobian would let it collapse onto a point."""
    posterior = sampled("gamma_poisson", Independence(_fit("gamma_poisson", AutoStructured)), draws=50, warmup=0)
    assert float(posterior.stats["acceptance_rate"].mean()) > 0.8


def test_draws_of_one_sampler_become_the_proposals_of_another() -> None:
    first = HMC(chains=8, warmup=100, draws=50, seed=3, progress=False)
    fitted = first.fit(BY_NAME["hierarchical"].program, *BY_NAME["hierarchical"].data)
    posterior = sampled("hierarchical", Independence(fitted), draws=200)
    assert_agrees(posterior, "hierarchical")
    assert 0.2 < float(posterior.stats["acceptance_rate"].mean()) <= 1.0


def test_a_model_proposes_by_its_own_guide() -> None:
    class Counts:
        def model(self, counts: Tensor) -> None:
            BY_NAME["gamma_poisson"].program(counts)

        def guide(self, counts: Tensor) -> None:
            _own(counts)

    backend = MetropolisHastings(proposal=Independence(), chains=32, warmup=10, draws=200, seed=0, progress=False)
    assert_agrees(backend.fit(Counts(), *BY_NAME["gamma_poisson"].data), "gamma_poisson")


@pytest.mark.parametrize("name", ["mixture", "normal_variance"])
def test_langevin_finds_the_posterior_at_its_acceptance_rate(name: str) -> None:
    posterior = sampled(name, Langevin(), warmup=200, thin=3)
    assert_agrees(posterior, name)
    assert 0.5 < float(posterior.stats["acceptance_rate"].mean()) < 0.75


@pytest.mark.parametrize("name", ["beta_binomial", "mixture"])
def test_proposals_of_the_prior_find_the_posterior(name: str) -> None:
    assert_agrees(sampled(name, Prior(), draws=400), name)


@pytest.mark.parametrize("proposal", [Prior(), Independence(_own)], ids=["Prior", "Independence"])
def test_importance_weights_give_the_evidence(proposal: Any) -> None:
    """log ∫ p(θ, data) dθ of a Gamma-Poisson model, within five standard errors of the mean of the weights."""
    counts = BY_NAME["gamma_poisson"].data[0]
    shape, rate, n, total = 2.0, 0.5, len(counts), float(counts.sum())
    exact = (
        math.lgamma(shape + total) - math.lgamma(shape) + shape * math.log(rate)
        - (shape + total) * math.log(rate + n) - float(torch.lgamma(counts + 1.0).sum())
    )  # fmt: skip
    posterior = sampled("gamma_poisson", proposal, draws=200, warmup=0)
    stats, found = posterior.stats, calibration.psis(posterior)
    assert abs(float(found.estimate) - exact) < 5 * float(found.se) and float(found.pareto_k) < 0.7
    weights = (stats["log_weight"] - exact).exp().flatten()
    assert abs(float(weights.mean()) - 1.0) < 5 * float(weights.std()) / math.sqrt(len(weights))
    assert arviz.pareto_k(stats["log_weight"].flatten().numpy()) < 0.7
    assert {"lp", "log_q"} <= stats.keys() and stats["lp"].shape == stats["log_q"].shape == stats["log_weight"].shape


def distance(y: Tensor) -> None:
    """The sign of the level cannot be known."""
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    pyro.sample("y", dist.Normal(level.abs(), 0.3), obs=y)


def test_chains_hop_between_modes_that_a_walk_does_not_leave() -> None:
    y = tensor(3.0)
    walk = MetropolisHastings(chains=16, warmup=200, draws=100, seed=0, progress=False).fit(distance, y)
    signs = (walk.draws["level"] > 0).double().mean(1)
    assert bool(((signs == 0.0) | (signs == 1.0)).all()) and 0.0 < float(signs.mean()) < 1.0
    backend = MetropolisHastings(proposal=Independence(walk), chains=16, warmup=0, draws=400, seed=0, progress=False)
    draws = backend.fit(distance, y).draws["level"].numpy()
    positive = (draws > 0).astype(float)
    assert np.abs(positive.mean(1) - 0.5).max() < 0.2  # every chain, some 200 effective draws each
    assert abs(positive.mean() - 0.5) < 5 * arviz.mcse(positive)


def slab(y: Tensor) -> None:
    """The prior of a continuous site depends on a finite one."""
    kind = pyro.sample("kind", dist.Bernoulli(0.3))
    level = pyro.sample("level", dist.Normal(3.0 * kind, 1.0))
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def test_a_prior_that_depends_on_a_finite_site_is_summed_out() -> None:
    """P(kind = 1 | y) by Bayes's rule."""
    y = tensor(1.2)
    weights = tensor([0.7, 0.3]).log() + torch.distributions.Normal(tensor([0.0, 3.0]), math.sqrt(2.0)).log_prob(y)
    exact = float(weights.softmax(0)[1])
    backend = MetropolisHastings(proposal=Prior(), chains=32, warmup=10, draws=300, seed=0, progress=False)
    kind = backend.fit(slab, y).draws["kind"].double().numpy()
    assert abs(kind.mean() - exact) < 5 * arviz.mcse(kind)


@pytest.mark.parametrize(
    ("name", "mass"), [("mixture", "diagonal"), ("normal_variance", "diagonal"), ("normal_variance", "dense")]
)
def test_nuts_finds_the_posterior(name: str, mass: str) -> None:
    backend = NUTS(chains=48, warmup=60, draws=30, mass=mass, seed=0, progress=False)
    posterior = backend.fit(BY_NAME[name].program, *BY_NAME[name].data)
    assert_agrees(posterior, name)
    stats = posterior.stats
    assert 0.7 < float(stats["acceptance_rate"].mean()) < 0.95 and not bool(stats["diverging"].any())
    assert bool((stats["n_steps"] <= 2 ** stats["tree_depth"] - 1).all() & (stats["n_steps"] >= 1).all())
    names = {"lp", "acceptance_rate", "diverging", "energy", "n_steps", "step_size", "tree_depth", "reached_max_treedepth"}
    assert names == stats.keys()


def test_a_shallow_tree_says_that_it_was_cut_off() -> None:
    backend = NUTS(chains=2, warmup=20, draws=20, max_depth=1, seed=0, progress=False)
    stats = backend.fit(BY_NAME["normal_variance"].program, *BY_NAME["normal_variance"].data).stats
    assert bool(stats["reached_max_treedepth"].any()) and int(stats["n_steps"].max()) == 1


def test_a_straight_stretch_does_not_turn_and_a_half_circle_does() -> None:
    first = tensor([[1.0, 0.0]])
    assert not bool(turns(first, first, 5 * first))
    assert bool(turns(first, -first, 0.0 * first))
    turned = tensor([[-0.6, 0.8]])
    assert bool(turns(first, turned, first + turned + tensor([[-0.2, 1.0]])))


@pytest.mark.parametrize(
    "kernel",
    [HamiltonianKernel(tensor(40.0), tensor(100.0), tensor([1.0]), ONE), TreeKernel(tensor(40.0), tensor([1.0]))],
    ids=["hamiltonian", "tree"],
)
def test_divergences_are_counted(kernel: Any) -> None:
    """Steps of forty standard deviations; the chain stays where it is."""
    target = TARGETS["normal"]
    state = kernel.init(target.draws(20), target.gradient)
    moved, info = kernel.step(state, target.gradient)
    assert info.diverging.dtype == torch.bool and bool(info.diverging.all())
    assert torch.equal(moved.position, state.position) and torch.equal(moved.log_density, state.log_density)


def test_divergences_reach_the_findings() -> None:
    """A warm-up too short to find steps for a spike."""

    def spike(y: Tensor) -> None:
        found = pyro.sample("level", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(found, 1e-4), obs=y)

    posterior = NUTS(chains=4, warmup=0, draws=20, seed=0, progress=False, start={"level": tensor(3.0)}).fit(
        spike, tensor(0.0)
    )
    diverging = posterior.stats["diverging"]
    assert diverging.dtype == torch.bool
    assert any("diverged" in finding for finding in posterior.diagnose()) == bool(diverging.any())


def ridge(x: Tensor, y: Tensor) -> None:
    """An intercept and a slope far from the middle of the data."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(intercept + slope * x, 0.5), obs=y)


@pytest.mark.parametrize("backend", [HMC, NUTS], ids=["HMC", "NUTS"])
def test_a_dense_mass_matrix_straightens_a_ridge(backend: Any) -> None:
    """The posterior by the formula of linear regression, in fewer leapfrog steps than a diagonal one takes."""
    x = torch.linspace(2.0, 4.0, 12, dtype=torch.float64)  # correlation −0.98
    y = 2.0 - 0.5 * x + 0.5 * torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    design = torch.stack([torch.ones_like(x), x], 1)
    covariance = torch.linalg.inv(design.T @ design / 0.25 + torch.eye(2, dtype=torch.float64) / 100.0)
    mean = covariance @ design.T @ y / 0.25
    steps = {}
    for mass in ("diagonal", "dense"):
        posterior = backend(chains=32, warmup=80, draws=30, mass=mass, seed=0, progress=False).fit(ridge, x, y)
        steps[mass] = float(posterior.stats["n_steps"].double().mean())
        if mass == "dense":
            for i, site in enumerate(("intercept", "slope")):
                draws = posterior.draws[site].numpy()
                assert abs(draws.mean() - float(mean[i])) < 5 * arviz.mcse(draws)
                assert abs(draws.std() - float(covariance[i, i].sqrt())) < 5 * arviz.mcse(draws, method="sd")
    assert steps["dense"] < 0.5 * steps["diagonal"]


def test_no_chain_is_left_in_the_neck_of_a_funnel() -> None:
    """It starts where steps have to be a twentieth of what suits the other chains."""
    torch.manual_seed(0)
    target, backend = TARGETS["funnel"], HMC(warmup=200)
    position = target.draws(16, seed=3)
    position[0] = tensor([-6.0, 0.03, -0.03])
    state, adaptation = backend.begin(position, target.gradient, SimpleNamespace(groups=1))  # type: ignore[arg-type]
    for _ in range(200):
        state, adaptation, _ = backend.move(state, adaptation, target.gradient, 200)
    rates = []
    for _ in range(60):
        state, adaptation, info = backend.move(state, adaptation, target.gradient, 0)
        rates.append(info.acceptance_rate)
    assert float(torch.stack(rates).mean(0).min()) > 0.5


ADAPTIVE: dict[str, Callable[[], Any]] = {
    "RandomWalk": lambda: MetropolisHastings(chains=4, warmup=8, progress=False),
    "Langevin": lambda: MetropolisHastings(proposal=Langevin(), chains=4, warmup=8, progress=False),
    "HMC": lambda: HMC(chains=4, warmup=8, progress=False),
    "NUTS": lambda: NUTS(chains=4, warmup=8, progress=False),
}


def assert_frozen(name: str) -> None:
    """Kernel and adaptation are the same before and after reading out, but for counters of steps."""
    backend, program = ADAPTIVE[name](), _program("gamma_poisson")
    torch.manual_seed(0)
    state = backend.init(program)
    for _ in range(8):
        state, _ = backend.step(state, program)
    before = state.adaptation
    for _ in range(4):
        state, _ = backend.sample(state, program)
    for field, old, new in zip(before._fields, before, state.adaptation, strict=True):
        parts = zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]
        assert field == "step" or all(torch.equal(a, b) for a, b in parts), field


@pytest.mark.parametrize("name", ADAPTIVE)
def test_nothing_adapts_after_warm_up(name: str, run: None) -> None:
    assert_frozen(name)


# -------------------------------------------------------------------------------------------- bad input
def visits(y: Tensor) -> None:
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    count = pyro.sample("count", dist.Poisson(rate))
    pyro.sample("y", dist.Normal(count, 1.0), obs=y)


def flat(y: Tensor) -> None:
    level = pyro.sample("level", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def tempered_prior(y: Tensor) -> None:
    with poutine.scale(scale=0.5):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def level(y: Tensor) -> None:
    found = pyro.sample("level", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(found, 1.0), obs=y)


def _sites(**families: Any) -> Callable[[Tensor], None]:
    def guide(y: Tensor) -> None:
        for name, family in families.items():
            pyro.sample(name, family)

    return guide


def _auxiliary(y: Tensor) -> None:
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
    pyro.sample("level", dist.Normal(noise, 1.0))


NORMAL = dist.Normal(0.0, 1.0)
REFUSED: dict[str, tuple[Callable[[Tensor], None], Any, str]] = {
    "endless": (visits, HMC(), "'count' \\(Poisson\\) has infinitely many values"),
    "endless, NUTS": (visits, NUTS(), "'count' \\(Poisson\\) has infinitely many values"),
    "no guide": (level, Independence(), "level brings no guide. Give a fitted Posterior"),
    "a site too many": (level, Independence(_sites(level=NORMAL, slope=NORMAL)), "samples 'slope', but level has no such"),
    "a site too few": (level, Independence(_sites(slope=NORMAL)), "no such latent site|does not sample 'level'"),
    "nothing": (level, Independence(_sites()), "does not sample 'level'"),
    "a shape": (level, Independence(_sites(level=NORMAL.expand([2]))), r"the shape \(2,\), but in level it is \(\)"),
    "a point": (level, Independence(_sites(level=dist.Delta(tensor(0.0)))), "all its mass for 'level' on one point"),
    "a scaled guide": (level, Independence(poutine.scale(_sites(level=NORMAL), scale=0.5)), "scales or masks 'level'"),
    "an auxiliary site": (level, Independence(_auxiliary), "draws an auxiliary 'noise'"),
    "a finite site": (slab, Independence(_sites(kind=dist.Bernoulli(0.5), level=NORMAL)), "samples 'kind', which"),
    "a flat prior": (flat, Prior(), "that of 'level' is improper"),
    "a scaled prior": (tempered_prior, Prior(), "'level' is scaled or masked"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_a_sentence(case: str) -> None:
    program, backend, sentence = REFUSED[case]
    if not isinstance(backend, (HMC, NUTS)):
        backend = MetropolisHastings(proposal=backend, chains=2, warmup=2, draws=2, progress=False)
    with pytest.raises(Unsupported, match=sentence):
        backend.fit(program, tensor(1.0))


def _fitted(backend: Any) -> Posterior:
    return backend.fit(level, tensor(1.0))


def test_a_posterior_without_a_distribution_is_refused(tmp_path: Any) -> None:
    variational = _fitted(SVI(steps=3, draws=2, progress=False))
    variational.save(tmp_path / "fit")
    loaded = Posterior.load(tmp_path / "fit", level, tensor(1.0))
    cases = {
        "a guide is code, which save and load leave out": loaded,
        "is one point": _fitted(EM(steps=2, progress=False)),
        "2 usable draws, too few": _fitted(Gibbs(chains=1, warmup=0, draws=2, progress=False)),
        "puts all its mass on one point": _fitted(SVI(steps=3, draws=2, guide=AutoDelta, progress=False)),
    }
    for sentence, posterior in cases.items():
        with pytest.raises(Unsupported, match=sentence):
            MetropolisHastings(proposal=Independence(posterior), progress=False).fit(level, tensor(1.0))
    with pytest.raises(Unsupported, match="level has a site 'level' of shape \\(\\), of which"):
        other = Gibbs(chains=2, warmup=0, draws=9, progress=False).fit(visits, tensor(1.0))
        MetropolisHastings(proposal=Independence(other), progress=False).fit(level, tensor(1.0))


@pytest.mark.parametrize(
    ("backend", "kind", "sentence"),
    [
        (NUTS(mass="full"), ValueError, "mass='full': must be one of 'diagonal', 'dense'"),
        (HMC(mass="full"), ValueError, "mass='full': must be one of 'diagonal', 'dense'"),
        (NUTS(target=1.5), ValueError, r"target=1.5\): must lie between 0 and 1"),
        (NUTS(max_depth=0), ValueError, r"max_depth=0\): must be an integer of at least 1"),
        (MetropolisHastings(proposal=Langevin(target=0.0)), ValueError, r"Langevin\(target=0.0\): must lie between"),
        (MetropolisHastings(proposal=Independence(AutoNormal)), TypeError, "has to be fitted first"),
        (MetropolisHastings(proposal=Independence(3)), TypeError, "must be a Pyro guide or a fitted Posterior"),  # type: ignore[arg-type]
    ],
    ids=["NUTS", "HMC", "target", "max_depth", "Langevin", "class", "number"],
)
def test_bad_settings_are_refused_with_a_sentence(backend: Any, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        backend.fit(level, tensor(1.0))


def test_a_start_is_kept_where_the_guide_tells_its_density_there() -> None:
    fit = _fit("normal_variance", AutoNormal)
    instance = BY_NAME["normal_variance"]
    backend = MetropolisHastings(
        proposal=Independence(fit), chains=2, warmup=0, draws=1, seed=0, progress=False, keep_warmup=True,
        start={"mean": tensor(1.0), "variance": tensor(4.0)},
    )  # fmt: skip
    program = _program("normal_variance")
    values = backend.values(backend.init(program), program)
    assert torch.allclose(values["variance"], tensor(4.0)) and torch.allclose(values["mean"], tensor(1.0))
    with pytest.raises(Unsupported, match="AutoStructured does not tell its density at a given point"):
        MetropolisHastings(
            proposal=Independence(_fit("normal_variance", AutoStructured)), progress=False,
            start={"mean": tensor(1.0), "variance": tensor(4.0)},
        ).fit(instance.program, *instance.data)  # fmt: skip


def test_a_dense_mass_matrix_of_many_dimensions_is_refused() -> None:
    def wide(y: Tensor) -> None:
        pyro.sample(
            "y", dist.Normal(pyro.sample("level", dist.Normal(0.0, 1.0).expand([600]).to_event(1)).sum(), 1.0), obs=y
        )

    with pytest.raises(Unsupported, match="600 by 600 numbers, but 512 by 512 is the most"):
        NUTS(mass="dense", progress=False).fit(wide, tensor(1.0))


class Scaled(nn.Module):
    """A model with a weight, which the guide shares."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def model(self, y: Tensor) -> None:
        found = pyro.sample("level", dist.Normal(self.shift, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(found, 1.0), obs=y)

    def guide(self, y: Tensor) -> None:
        pyro.sample("level", dist.Normal(self.shift + y.mean(), 0.5))


def test_a_guide_that_shares_weights_with_its_model_is_used_in_the_models_precision() -> None:
    y = torch.tensor([0.4, 1.3, 0.7])
    backend = MetropolisHastings(proposal=Independence(), chains=32, warmup=10, draws=200, seed=0, progress=False)
    draws = backend.fit(Scaled(), y).draws["level"]
    assert draws.dtype == torch.float32
    exact = float(y.sum()) / 4.0
    values = draws.double().numpy()
    assert abs(values.mean() - exact) < 5 * arviz.mcse(values)
    assert abs(values.std() - 0.5) < 5 * arviz.mcse(values, method="sd")
