"""Series: states that follow one another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from exact import (
    Moments,
    array,
    assignments,
    averaged,
    conjugate_normal,
    dirichlet,
    grid,
    linear_normal,
    log_dirichlet,
    moments,
    summit,
    variances,
)  # fmt: skip
from pyro_genmodels.distributions import MarkovChain

# ---------------------------------------------------------------------------------- hidden Markov model
SWITCHED = array(-1.2, -0.7, 0.9, 1.6, 0.1, -1.1)
MOVES, PLACES = array([4.0, 2.0], [1.5, 3.0]), array(-1.5, 1.5)


def hmm(y: Tensor) -> None:
    """Two states that last; how long, and where they lie, is unknown."""
    with pyro.plate("states", 2):
        move = pyro.sample("move", dist.Dirichlet(MOVES.to(y)))
        location = pyro.sample("location", dist.Normal(PLACES.to(y), 1.0))
    state, probabilities = None, y.new_ones(2) / 2
    for t in pyro.markov(range(len(y))):
        state = pyro.sample(f"state_{t}", dist.Categorical(probabilities if state is None else move[state]))
        pyro.sample(f"y_{t}", dist.Normal(location[state], 0.7), obs=y[t])


def hmm_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁶ paths; moves and locations are conjugate given one."""
    y, path = SWITCHED.numpy(), assignments(2, len(SWITCHED))
    member = path[:, :, None] == np.arange(2)
    moves = MOVES.numpy() + np.einsum("mtk,mtl->mkl", member[:, :-1].astype(float), member[:, 1:].astype(float))
    location, variance, log_evidence = conjugate_normal(
        PLACES.numpy(), 1.0, member.sum(1), (member * y[:, None]).sum(1), 0.49
    )
    log_weights = log_dirichlet(moves).sum(1) + log_evidence.sum(1)
    move = dirichlet(moves)
    states = {f"state_{t}": averaged(log_weights, path[:, t].astype(float)) for t in range(len(y))}
    return {
        "move": averaged(log_weights, move.mean, move.sd**2),
        "location": averaged(log_weights, location, variance),
        **states,
    }


def hidden_markov(y: Tensor) -> None:
    """The same, its states one site."""
    with pyro.plate("states", 2):
        move = pyro.sample("move", dist.Dirichlet(MOVES.to(y)))
        location = pyro.sample("location", dist.Normal(PLACES.to(y), 1.0))
    state = pyro.sample("state", MarkovChain(y.new_ones(2) / 2, move, len(y)))
    with pyro.plate("steps", len(y)):
        pyro.sample("y", dist.Normal(location[state], 0.7), obs=y)


def hidden_markov_moments() -> dict[str, Moments]:
    found = hmm_moments()
    states = [found.pop(f"state_{t}") for t in range(len(SWITCHED))]
    return found | {"state": Moments(*(np.stack([state[i] for state in states]) for i in range(2)))}


def hmm_mode() -> dict[str, Any]:
    """Of p(move, location | y), the path summed out by the forward recursion."""

    def parts(point: Tensor) -> tuple[Tensor, Tensor]:
        stay, leave = torch.nn.functional.logsigmoid(point[:2]), torch.nn.functional.logsigmoid(-point[:2])
        return torch.stack([torch.stack([stay[0], leave[0]]), torch.stack([leave[1], stay[1]])]), point[2:]

    def log_density(point: Tensor) -> Tensor:
        move, location = parts(point)
        seen = -0.5 * (SWITCHED[:, None] - location).square() / 0.49
        forward = seen[0]
        for t in range(1, len(SWITCHED)):
            forward = (forward[:, None] + move).logsumexp(0) + seen[t]
        return forward.logsumexp(0) + ((MOVES - 1) * move).sum() - 0.5 * (location - PLACES).square().sum()

    move, location = parts(summit(log_density, [0.5, 0.5, -1.5, 1.5]))
    return {"move": move.exp(), "location": location}


# ------------------------------------------------------------------------ factorial hidden Markov model
FLOWS = array(0.9, 2.1, 4.3, 2.4)
EFFECTS, STAY = array(1.0, 3.0), ((0.3, 0.8), (0.2, 0.7))  # on after off, on after on


def factorial_hmm(y: Tensor) -> None:
    """Two switches that do not know of each other; only the sum of what they add is seen."""
    effect = pyro.sample("effect", dist.Normal(EFFECTS.to(y), 0.5).to_event(1))
    first = second = y.new_zeros(())
    for t in pyro.markov(range(len(y))):
        first = pyro.sample(f"first_{t}", dist.Bernoulli(torch.where(first > 0.5, STAY[0][1], STAY[0][0]).to(y)))
        second = pyro.sample(f"second_{t}", dist.Bernoulli(torch.where(second > 0.5, STAY[1][1], STAY[1][0]).to(y)))
        pyro.sample(f"y_{t}", dist.Normal(effect[0] * first + effect[1] * second, 1.0), obs=y[t])


def factorial_chains(y: Tensor) -> None:
    """The same, each switch one site."""
    effect = pyro.sample("effect", dist.Normal(EFFECTS.to(y), 0.5).to_event(1))
    switches = []
    for name, (after_off, after_on) in zip(("first", "second"), STAY, strict=True):
        initial, moves = (
            y.new_tensor([1 - after_off, after_off]),
            y.new_tensor([[1 - after_off, after_off], [1 - after_on, after_on]]),
        )
        switches.append(pyro.sample(name, MarkovChain(initial, moves, len(y))))
    with pyro.plate("steps", len(y)):
        pyro.sample("y", dist.Normal(effect[0] * switches[0] + effect[1] * switches[1], 1.0), obs=y)


def factorial_chains_moments() -> dict[str, Moments]:
    found = factorial_hmm_moments()
    steps = range(len(FLOWS))
    rows = {name: [found.pop(f"{name}_{t}") for t in steps] for name in ("first", "second")}
    return found | {name: Moments(*(np.stack([row[i] for row in own]) for i in range(2))) for name, own in rows.items()}


def _switches() -> tuple[np.ndarray, np.ndarray]:
    """All paths of both switches, (m, step, switch), and their log-probabilities."""
    steps = len(FLOWS)
    path = assignments(2, 2 * steps).reshape(-1, steps, 2)
    before = np.concatenate([np.zeros_like(path[:, :1]), path[:, :-1]], 1)
    chance = np.where(before, [STAY[0][1], STAY[1][1]], [STAY[0][0], STAY[1][0]])
    return path, np.log(np.where(path, chance, 1 - chance)).sum((1, 2))


def factorial_hmm_moments() -> dict[str, Moments]:
    """By enumeration of all 2⁸ pairs of paths; the effects are jointly normal given them."""
    path, log_weights = _switches()
    mean, covariance, log_evidence = linear_normal(
        path.astype(float), FLOWS.numpy(), EFFECTS.numpy(), 0.25 * np.eye(2), np.ones(len(FLOWS))
    )
    log_weights = log_weights + log_evidence
    found = {"effect": averaged(log_weights, mean, variances(covariance))}
    for t in range(len(FLOWS)):
        found[f"first_{t}"] = averaged(log_weights, path[:, t, 0].astype(float))
        found[f"second_{t}"] = averaged(log_weights, path[:, t, 1].astype(float))
    return found


def factorial_hmm_mode() -> dict[str, Any]:
    """Of p(effect | y), both paths summed out."""
    path, log_weights = (torch.from_numpy(part) for part in _switches())

    def log_density(effect: Tensor) -> Tensor:
        fit = -0.5 * (FLOWS - path.double() @ effect).square().sum(1)
        return (log_weights + fit).logsumexp(0) - 0.5 * (effect - EFFECTS).square().sum() / 0.25

    return {"effect": summit(log_density, EFFECTS.tolist())}


# ---------------------------------------------------------------------------------------- local level
LEVELS = array(0.4, 1.1, 0.7, 2.3, 2.0, 3.1)


def local_level(y: Tensor) -> None:
    """A level that drifts, seen through noise; both variances are unknown."""
    drift = pyro.sample("drift", dist.InverseGamma(y.new_tensor(4.0), 2.0))
    noise = pyro.sample("noise", dist.InverseGamma(y.new_tensor(4.0), 1.0))
    level = pyro.sample("level_0", dist.Normal(y.new_tensor(0.0), 2.0))
    pyro.sample("y_0", dist.Normal(level, noise.sqrt()), obs=y[0])
    for t in pyro.markov(range(1, len(y))):
        level = pyro.sample(f"level_{t}", dist.Normal(level, drift.sqrt()))
        pyro.sample(f"y_{t}", dist.Normal(level, noise.sqrt()), obs=y[t])


def local_level_moments() -> dict[str, Moments]:
    """By quadrature over the logarithms of both variances; the levels are jointly normal given them."""
    log_points = grid((-4.5, 5.0, 121), (-5.0, 4.0, 121)).numpy()
    drift, noise = np.exp(log_points).T
    n = len(LEVELS)
    shared = np.minimum.outer(np.arange(n), np.arange(n))
    mean, covariance, log_evidence = linear_normal(
        np.eye(n), LEVELS.numpy(), np.zeros(n), 4.0 + drift[:, None, None] * shared, noise[:, None] * np.ones(n)
    )
    log_weights = log_evidence - 4.0 * np.log(drift) - 2.0 / drift - 4.0 * np.log(noise) - 1.0 / noise
    levels = {
        f"level_{t}": averaged(log_weights, mean[:, t], variances(covariance)[:, t])
        for t in range(n)
    }  # fmt: skip
    return {**moments(log_weights, {"drift": drift, "noise": noise}), **levels}


def local_level_mode() -> dict[str, Any]:
    """Of p(drift, noise | y): each level belongs to one observation, as the loop says."""
    n = len(LEVELS)
    shared = torch.minimum(torch.arange(n)[:, None], torch.arange(n)).to(LEVELS)

    def log_density(point: Tensor) -> Tensor:
        drift, noise = point.exp()
        covariance = 4.0 + drift * shared + noise * torch.eye(n).to(LEVELS)
        evidence = dist.MultivariateNormal(torch.zeros(n).to(LEVELS), covariance).log_prob(LEVELS)
        return evidence - 5.0 * point.sum() - 2.0 / drift - 1.0 / noise

    point = summit(log_density, [-1.0, -1.5])
    return {"drift": point[0].exp(), "noise": point[1].exp()}
