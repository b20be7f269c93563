"""Sequences of states: summed out, maximised and drawn back, they are what enumeration of all paths says."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from inference import EM, HMC, SVI, Gibbs, Unsupported
from inference.enumeration import draw_back, eliminate, factors, log_normalizer, plates_of
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program
from inference.sequences import drawn_back, passage
from programs import chains
from pyro_genmodels.distributions import MarkovChain

STAYS = torch.tensor([[0.8, 0.15, 0.05], [0.1, 0.7, 0.2], [0.25, 0.25, 0.5]], dtype=torch.float64)
FIRST = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


@pytest.fixture(autouse=True)
def as_in_a_run() -> Iterator[None]:
    with isolated(0), reproducible(torch.float64), quiet():
        yield


def paths(states: int, length: int) -> Tensor:
    return torch.tensor([*itertools.product(range(states), repeat=length)])


def weights(states: Tensor, steps: Tensor, path: Tensor) -> Tensor:
    """Log-weight of every path (m, T)."""
    where = torch.arange(path.shape[1])
    return states[where, path].sum(1) + steps[where[:-1], path[:, :-1], path[:, 1:]].sum(1)


# -------------------------------------------------------------------------------------------------- the algebra
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 8])
def test_a_passage_is_the_sum_over_all_paths(length: int) -> None:
    states, steps, path = torch.randn(length, 3), torch.randn(length - 1, 3, 3), paths(3, length)
    found = passage(states, steps)
    torch.testing.assert_close(found.log_z, weights(states, steps, path).logsumexp(0))
    torch.testing.assert_close(passage(states, steps, maximise=True).log_z, weights(states, steps, path).amax())


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_paths_are_drawn_with_their_probabilities(length: int) -> None:
    states, steps = torch.randn(length, 2), torch.randn(length - 1, 2, 2)
    found, path = passage(states, steps), paths(2, length)
    chances = weights(states, steps, path).softmax(0)
    for row, chance in zip(path, chances, strict=True):
        drawn, log_q = drawn_back(found, lambda logits, where, row=row: row[where])
        assert torch.equal(drawn, row)
        torch.testing.assert_close(log_q.exp(), chance)


def test_the_most_probable_path_is_that_of_all() -> None:
    states, steps, path = torch.randn(6, 3), torch.randn(5, 3, 3), paths(3, 6)
    best, _ = drawn_back(passage(states, steps, maximise=True), lambda logits, where: logits.argmax(-1))
    assert torch.equal(best, path[weights(states, steps, path).argmax()])


def test_impossible_steps_leave_finite_gradients() -> None:
    # a left-to-right chain: most stretches are impossible between most states
    steps = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]).log().expand(7, 3, 3)
    states = torch.randn(8, 3).requires_grad_()
    value = passage(states, steps).log_z
    (gradient,) = torch.autograd.grad(value, states)
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.sum(-1), torch.ones(8))  # probabilities of the states
    torch.testing.assert_close(value, weights(states, steps, paths(3, 8)).logsumexp(0))


def test_a_sequence_far_from_everything_does_not_underflow() -> None:
    states = torch.tensor([[0.0, -4000.0], [-4000.0, 0.0]]).repeat(50, 1)
    steps = torch.tensor([[1.0, 1e-300], [1e-300, 1.0]]).log().expand(99, 2, 2)
    forward = states[0]
    for t in range(1, 100):
        forward = (forward[:, None] + steps[t - 1]).logsumexp(0) + states[t]
    torch.testing.assert_close(passage(states, steps).log_z, forward.logsumexp(0), rtol=1e-12, atol=0.0)


def test_wide_sums_are_taken_state_by_state(monkeypatch: pytest.MonkeyPatch) -> None:
    states, steps = torch.randn(9, 4), torch.randn(8, 4, 4)
    at_once = passage(states, steps).log_z
    monkeypatch.setattr("inference.sequences._LARGEST", 1)
    torch.testing.assert_close(passage(states, steps).log_z, at_once)


# ---------------------------------------------------------------------------------------------- the distribution
@pytest.mark.parametrize("transitions", [STAYS, torch.stack([STAYS, STAYS.flip(0), STAYS])])
def test_a_chain_has_the_frequencies_of_its_probabilities(transitions: Tensor) -> None:
    # the largest of 81 standardised differences exceeds 4.5 in one of 1,800 runs
    chain, path = MarkovChain(FIRST, transitions, 4), paths(3, 4)
    drawn = chain.sample(torch.Size([40_000]))
    chances = chain.log_prob(path).exp()
    assert float(chances.sum()) == pytest.approx(1.0)
    found = (drawn[:, None] == path).all(-1).double().mean(0)
    assert ((found - chances).abs() < 4.5 * (chances * (1 - chances) / 40_000).sqrt() + 1e-12).all()


def test_a_chain_of_one_state_is_categorical() -> None:
    chain = MarkovChain(FIRST, STAYS, 1)
    torch.testing.assert_close(chain.log_prob(torch.arange(3)[:, None]), FIRST.log())
    assert chain.sample().shape == (1,)


@pytest.mark.parametrize(
    ("transitions", "length", "words"),
    [(STAYS, 0, "at least 1 state"), (STAYS[:2], 4, "(3, 3)"), (STAYS[None], 4, "(3, 3, 3)")],
)
def test_a_chain_that_does_not_fit_is_refused(transitions: Tensor, length: int, words: str) -> None:
    with pytest.raises(ValueError, match=r"MarkovChain|transitions") as refusal:
        MarkovChain(FIRST, transitions, length)
    assert words in str(refusal.value)


# -------------------------------------------------------------------------------------------------- the programs
def forward_pass(y: Tensor, move: Tensor, location: Tensor) -> Tensor:
    """log p(y | move, location), as the textbook has it: probabilities, normalised at every step."""
    seen = (-0.5 * ((y[:, None] - location) / 0.7).square()).exp() / (0.7 * math.sqrt(2 * math.pi))
    forward, total = seen[0] / 2, 0.0
    for t in range(len(y)):
        forward = forward if t == 0 else (forward @ move) * seen[t]
        total, forward = total + forward.sum().log(), forward / forward.sum()
    return torch.as_tensor(total)


def series(length: int) -> Tensor:
    move = torch.tensor([[0.95, 0.05], [0.1, 0.9]])
    state = MarkovChain(torch.ones(2) / 2, move, length).sample()
    return torch.tensor([-1.5, 1.5])[state] + 0.7 * torch.randn(length)


def test_ten_thousand_steps_have_the_likelihood_of_the_forward_pass() -> None:
    y, move, location = series(10_000), torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([-1.2, 1.4])
    program = Program(chains.hidden_markov, (y,))
    values = {"move": move, "location": location}
    prior = dist.Dirichlet(chains.MOVES).log_prob(move).sum() + dist.Normal(chains.PLACES, 1.0).log_prob(location).sum()
    found = log_normalizer(program, values, ("state",)) - prior
    assert float(found) == pytest.approx(float(forward_pass(y, move, location)), rel=1e-10)


@pytest.mark.parametrize("length", [1, 2, 9])
def test_a_site_is_a_loop(length: int) -> None:
    y, values = series(length), {"move": STAYS[:2, :2] / STAYS[:2, :2].sum(-1, keepdim=True), "location": torch.randn(2)}
    one, many = Program(chains.hidden_markov, (y,)), Program(chains.hmm, (y,))
    torch.testing.assert_close(log_normalizer(one, values, one.finite), log_normalizer(many, values, many.finite))


def test_sites_that_are_coupled_at_every_step_are_drawn_jointly() -> None:
    program = Program(chains.factorial_chains, (chains.FLOWS,))
    values = {"effect": torch.tensor([1.2, 2.7])}
    places = plates_of(program, program.finite)
    left, records = eliminate(factors(program, values, program.finite), places)
    value = torch.stack([factor.table for factor in left]).sum()
    total: Any = 0.0
    for first in paths(2, 4):
        for second in paths(2, 4):
            drawn, log_q = draw_back(
                program, records, lambda sites, logits, positions, f=first, s=second: 2 * f[positions] + s[positions]
            )
            assert torch.equal(drawn["first"], first) and torch.equal(drawn["second"], second)
            joint = program.log_joint({**values, "first": first, "second": second})
            torch.testing.assert_close(joint - log_q, value)  # the certificate, for all 256 pairs of paths
            total = total + log_q.exp()
    torch.testing.assert_close(total, torch.tensor(1.0))


def spotted(y: Tensor) -> None:
    """A chain under labels of single steps: an observation is now and then an outlier."""
    scale = pyro.sample("scale", dist.Gamma(y.new_tensor(2.0), 2.0))
    state = pyro.sample("state", MarkovChain(y.new_ones(2) / 2, y.new_tensor([[0.9, 0.1], [0.3, 0.7]]), len(y)))
    with pyro.plate("steps", len(y)):
        is_off = pyro.sample("is_off", dist.Bernoulli(y.new_tensor([0.1, 0.4])[state]))
        pyro.sample("y", dist.Normal(2.0 * state, torch.where(is_off > 0.5, 5.0, scale)), obs=y)


@pytest.mark.slow
def test_labels_of_single_steps_are_summed_out_below_a_chain() -> None:
    y, values = torch.tensor([0.2, 2.4, 7.0, -0.1]), {"scale": torch.tensor(0.8)}
    program = Program(spotted, (y,))
    every = [
        program.log_joint({**values, "state": state, "is_off": is_off.double()})
        for state in paths(2, 4) for is_off in paths(2, 4)
    ]  # fmt: skip
    torch.testing.assert_close(log_normalizer(program, values, program.finite), torch.stack(every).logsumexp(0))
    posterior = Gibbs(seed=0, draws=50, warmup=50, progress=False).fit(spotted, y)
    assert posterior.plan["state"].update == "Enumerate" and posterior.plan["state"].certificate < 1e-8


def test_em_on_a_site_is_em_on_a_loop() -> None:
    y = series(60)
    start = {"move": torch.full((2, 2), 0.5), "location": torch.tensor([-1.0, 1.0])}
    one, many = (EM(seed=0, progress=False, start=start).fit(p, y) for p in (chains.hidden_markov, chains.hmm))
    assert torch.equal(one.point()["state"], torch.stack([many.point()[f"state_{t}"] for t in range(60)]))
    for site in ("move", "location"):
        torch.testing.assert_close(one.point()[site], many.point()[site], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.history["log_joint"][-1], many.history["log_joint"][-1])


def test_a_sequence_has_one_term_of_the_log_likelihood() -> None:
    y = series(20)
    posterior = Gibbs(seed=0, draws=20, warmup=20, chains=2, progress=False).fit(chains.hidden_markov, y)
    found = posterior.log_likelihood()["y"]
    assert found.shape[:2] == (2, 20) and found.numel() == 40
    move, location = posterior.draws["move"][1, 7], posterior.draws["location"][1, 7]
    assert float(found[1, 7]) == pytest.approx(float(forward_pass(y, move, location)), rel=1e-10)
    assert posterior.draws["state"].shape == (2, 20, 20)


# --------------------------------------------------------------------------------------------------- bad input
def in_a_plate(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(y.new_tensor(1.0), 1.0))
    with pyro.plate("series", 3):
        pyro.sample("state", MarkovChain(y.new_ones(3, 2) / 2, torch.stack([p, 1 - p]).expand(2, 2), 4))


def in_parts(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(y.new_tensor(1.0), 1.0))
    state = pyro.sample("state", MarkovChain(y.new_ones(2) / 2, torch.stack([p, 1 - p]).expand(2, 2), len(y)))
    with pyro.plate("steps", len(y) - 1):
        pyro.sample("y", dist.Normal(state[1:].to(y), 1.0), obs=y[1:])


def under_a_mask(y: Tensor) -> None:
    p = pyro.sample("p", dist.Beta(y.new_tensor(1.0), 1.0))
    chain = MarkovChain(y.new_ones(2) / 2, torch.stack([p, 1 - p]).expand(2, 2), len(y))
    state = pyro.sample("state", chain.mask(torch.tensor(True)))
    with pyro.plate("steps", len(y)):
        pyro.sample("y", dist.Normal(state.to(y), 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "words"),
    [(in_a_plate, "Python loop"), (in_parts, "coupled|plate"), (under_a_mask, "finitely|infinitely|mask|nothing")],
)
@pytest.mark.parametrize("backend", [HMC(), EM(), SVI()])
def test_what_is_no_single_sequence_is_refused(program: Callable[..., None], words: str, backend: Any) -> None:
    with pytest.raises((Unsupported, ValueError), match=words):
        backend.fit(program, torch.randn(5))


def test_a_sequence_is_not_cut_into_mini_batches() -> None:
    with pytest.raises(Unsupported, match="steps of a sequence"):
        SVI(batch_size=5, steps=3, progress=False).fit(chains.hidden_markov, series(20))
