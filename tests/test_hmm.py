"""Hidden Markov models against enumeration of all sequences, and against the textbook's algorithm."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from torch import Tensor

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings, Posterior
from inference.enumeration import log_normalizer
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program
from pyro_genmodels import HMM
from pyro_genmodels.classical.hmm import EMISSIONS
from pyro_genmodels.distributions import MarkovChain

QUIET: dict[str, Any] = {"seed": 0, "progress": False}
MOVES = torch.tensor([[0.92, 0.08], [0.1, 0.9]], dtype=torch.float64)


CENTRES = torch.tensor([[0.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
TRUTH = {
    "normal": {"means": CENTRES, "covariances": torch.eye(2, dtype=torch.float64).expand(2, 2, 2)},
    "diagonal": {"means": CENTRES, "covariances": torch.ones(2, 2, dtype=torch.float64)},
    "categorical": {"probabilities": torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)},
    "poisson": {"rates": torch.tensor([1.5, 8.0], dtype=torch.float64)},
}


def series(emission: str, steps: int, seed: int = 0) -> Tensor:
    """Of two states that last, far apart."""
    with isolated(seed):
        z = MarkovChain(torch.ones(2, dtype=torch.float64) / 2, MOVES, steps).sample()
        if emission == "categorical":
            return torch.multinomial(TRUTH[emission]["probabilities"][z], 1).squeeze(1)
        if emission == "poisson":
            return torch.poisson(TRUTH[emission]["rates"][z])
        return CENTRES[z] + torch.randn(steps, 2, dtype=torch.float64)


def prior_draw(model: HMM, x: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """One draw of the parameters from the prior that is scaled to x."""
    with isolated(seed), reproducible(torch.float64), quiet():
        model.prepare(x)
        trace = pyro.poutine.trace(model.double().model).get_trace(None, size=4)
        return {name: trace.nodes[name]["value"].double() for name in model._sites}


def by_enumeration(model: HMM, x: Tensor, point: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """All sequences of states (m, T), and log p(z, x | point) of each."""
    paths = torch.tensor([*itertools.product(range(model.states), repeat=len(x))])
    own = tuple(point[name] for name in list(model._sites)[2:])
    seen = torch.stack([
        torch.stack([model._given(own, z).log_prob(x[t].double()) for z in torch.arange(model.states)])
        if bool(model._is_seen(x)[t]) else torch.zeros(model.states, dtype=torch.float64)
        for t in range(len(x))
    ])  # fmt: skip
    where = torch.arange(len(x))
    chain = MarkovChain(point["initial"], point["transitions"], len(x))
    return paths, chain.log_prob(paths) + seen[where, paths].sum(1)


def with_gaps(x: Tensor) -> Tensor:
    x = x.clone()
    x[2] = -1 if not x.is_floating_point() else math.nan
    return x


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("is_gappy", [False, True])
def test_scores_probabilities_and_paths_are_those_of_all_sequences(emission: str, is_gappy: bool) -> None:
    model, x = HMM(2, emission), series(emission, 6)
    point = prior_draw(model, x)
    x = with_gaps(x) if is_gappy else x
    paths, log_joint = by_enumeration(model, x, point)
    assert model.score(x, point) == pytest.approx(float(log_joint.logsumexp(0)), rel=1e-10)
    member = paths[:, :, None] == torch.arange(2)
    expected = (log_joint.softmax(0)[:, None, None] * member).sum(0)
    torch.testing.assert_close(model.predict_proba(x, point), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(model.predict(x, point), paths[log_joint.argmax()])


@pytest.mark.parametrize("emission", EMISSIONS)
def test_the_program_sums_its_states_out_to_the_score(emission: str) -> None:
    model, x = HMM(2, emission), with_gaps(series(emission, 7))
    point = prior_draw(model, x)
    program = Program(model, (x,))
    with reproducible(torch.float64), quiet():
        alone = {**point, "z": torch.zeros(7, dtype=torch.long)}
        priors = program.trace(alone).nodes
        prior = sum(priors[name]["log_prob_sum"] for name in point)
        found = log_normalizer(program, point, ("z",)) - prior
    assert float(found) == pytest.approx(model.score(x, point), rel=1e-10)


def test_scores_are_averaged_over_draws_of_the_density() -> None:
    model, x = HMM(2, "poisson"), series("poisson", 5)
    points = [prior_draw(model, x, seed) for seed in range(3)]
    draws = {name: torch.stack([point[name] for point in points])[None] for name in points[0]}
    every = torch.tensor([model.score(x, point) for point in points], dtype=torch.float64)
    assert model.score(x, draws) == pytest.approx(float(every.logsumexp(0)) - math.log(3), rel=1e-10)


def test_a_step_of_em_is_that_of_baum_and_welch() -> None:
    """Forward and backward probabilities as the textbook has them; the prior adds its counts."""
    x = series("categorical", 40)
    start = {
        "initial": torch.tensor([0.6, 0.4]).double(),
        "transitions": torch.tensor([[0.7, 0.3], [0.4, 0.6]]).double(),
        "probabilities": torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]).double(),
    }
    pi, a, b = (start[name].numpy() for name in ("initial", "transitions", "probabilities"))
    seen, steps = b[:, x.numpy()].T, len(x)
    alpha, beta = np.zeros((steps, 2)), np.ones((steps, 2))
    alpha[0] = pi * seen[0]
    for t in range(1, steps):
        alpha[t] = (alpha[t - 1] @ a) * seen[t]
    for t in range(steps - 2, -1, -1):
        beta[t] = a @ (seen[t + 1] * beta[t + 1])
    gamma = alpha * beta / alpha[-1].sum()
    xi = alpha[:-1, :, None] * a * (seen[1:] * beta[1:])[:, None] / alpha[-1].sum()
    counts = np.stack([gamma[x.numpy() == symbol].sum(0) for symbol in range(3)], 1)
    for objective in ("mle", "map"):  # the priors are uniform
        found = EM(start=start, steps=1, objective=objective, **QUIET).fit(HMM(2, "categorical", symbols=3), x).point()
        np.testing.assert_allclose(found["initial"], gamma[0], rtol=1e-9)
        np.testing.assert_allclose(found["transitions"], xi.sum(0) / xi.sum((0, 2))[:, None], rtol=1e-9)
        np.testing.assert_allclose(found["probabilities"], counts / counts.sum(1, keepdims=True), rtol=1e-9)


@pytest.mark.parametrize("emission", EMISSIONS)
def test_em_climbs_to_the_states_that_made_the_series(emission: str) -> None:
    x, model = series(emission, 300), HMM(2, emission)
    posterior = EM(**QUIET).fit(model, x)
    assert float(posterior.history["log_joint"].diff().min()) > -1e-8
    assert not posterior.diagnose()
    with isolated(0):
        z = MarkovChain(torch.ones(2, dtype=torch.float64) / 2, MOVES, 300).sample()
    path = model.predict(x, posterior)
    assert torch.equal(path, posterior.point()["z"])
    known = model.predict(x, TRUTH[emission] | {"initial": torch.ones(2, dtype=torch.float64) / 2, "transitions": MOVES})
    best = float((known == z).double().mean())  # of who knows all parameters
    agreement = float((path == z).double().mean())
    assert max(agreement, 1.0 - agreement) > best - 0.05


@pytest.mark.slow
def test_samplers_agree_on_what_does_not_depend_on_labels() -> None:
    """Rates of two states far apart, in order: every pair of back-ends within 4.5 Monte-Carlo errors (1 in 15,000 each)."""
    import arviz

    x = series("poisson", 80)
    backends = [
        Gibbs(chains=16, warmup=60, draws=100, **QUIET),
        HMC(chains=16, warmup=120, draws=60, **QUIET),
        MetropolisHastings(chains=16, warmup=400, draws=120, thin=30, **QUIET),
    ]
    found = []
    for backend in backends:
        posterior = backend.fit(HMM(2, "poisson"), x)
        rates = posterior.draws["rates"].sort(-1).values.numpy()
        assert max(float(arviz.rhat(rates[..., k])) for k in range(2)) < 1.06
        errors = np.array([float(arviz.mcse(rates[..., k])) for k in range(2)])
        found.append((rates.mean((0, 1)), errors))
    for (one, first), (two, second) in itertools.combinations(found, 2):
        assert (np.abs(one - two) < 4.5 * np.hypot(first, second)).all(), (one, two)


@pytest.mark.slow
def test_svi_finds_the_rates() -> None:
    x = series("poisson", 200)
    sampled = Gibbs(chains=4, warmup=50, draws=100, **QUIET).fit(HMM(2, "poisson"), x).draws["rates"].sort(-1).values
    found = SVI(steps=600, learning_rate=0.05, **QUIET).fit(HMM(2, "poisson"), x).draws["rates"].sort(-1).values
    assert ((found.mean((0, 1)) - sampled.mean((0, 1))).abs() < 0.5 * sampled.std((0, 1))).all()


def test_labels_of_states_are_known_to_be_exchangeable(tmp_path: Path) -> None:
    posterior = Gibbs(chains=4, warmup=20, draws=20, **QUIET).fit(HMM(3, "poisson"), series("poisson", 60))
    assert posterior.symmetry == {"initial": 0, "transitions": (0, 1), "rates": 0, "z": None}
    matched, raw = posterior.matched, posterior.draws
    order = torch.stack([  # the label that each matched rate had
        (matched["rates"][..., k, None] == raw["rates"]).double().argmax(-1) for k in range(3)
    ], -1)  # fmt: skip
    rows = raw["transitions"].gather(2, order[..., None].expand(-1, -1, -1, 3))
    both = rows.gather(3, order[..., None, :].expand(-1, -1, 3, -1))
    torch.testing.assert_close(matched["transitions"], both)
    posterior.save(tmp_path / "saved")
    assert Posterior.load(tmp_path / "saved").symmetry == posterior.symmetry


def test_a_forecast_tends_to_the_shares_of_the_states() -> None:
    model, x = HMM(2), series("normal", 200)
    point = prior_draw(model, x)
    point["transitions"] = MOVES
    longer = torch.cat([x, torch.full((400, 2), math.nan, dtype=torch.float64)])
    shares = torch.tensor([0.1, 0.08], dtype=torch.float64) / 0.18  # of a chain that leaves with 0.08 and 0.1
    torch.testing.assert_close(model.predict_proba(longer, point)[-1], shares, rtol=1e-9, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- bad input
SERIES = torch.zeros(5, 2)


@pytest.mark.parametrize(
    ("settings", "x", "words"),
    [
        ((0,), SERIES, "at least 1 state"),
        ((2, "cauchy"), SERIES, "must be one of normal"),
        ((2, "normal", None, -1.0), SERIES, "stickiness is -1.0"),
        ((2, "categorical", 0), SERIES, "symbols is 0"),
        ((2,), torch.zeros(5), "series of rows"),
        ((2,), torch.zeros(5, 2, dtype=torch.long), "floating"),
        ((2,), torch.full((5, 2), math.inf), "infinite"),
        ((2,), torch.full((5, 2), math.nan), "Nothing of x is observed"),
        ((2,), torch.tensor([[0.0, 1.0], [math.nan, 1.0]]), "Row 1 of x is NaN in some columns"),
        ((2, "poisson"), SERIES, "series of numbers"),
        ((2, "poisson"), torch.tensor([0.0, 1.5]), "x holds 1.5"),
        ((2, "poisson"), torch.tensor([0.0, -2.0]), "x holds -2"),
        ((2, "categorical", 3), torch.tensor([0, 1, 3]), "symbol 3, but there are 3"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(settings: tuple[Any, ...], x: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EM(**QUIET).fit(HMM(*settings), x)


def test_one_state_and_one_step_work() -> None:
    alone = EM(**QUIET).fit(HMM(1), series("normal", 30))
    assert torch.equal(alone.point()["z"], torch.zeros(30, dtype=alone.point()["z"].dtype))
    short = Gibbs(chains=2, warmup=5, draws=5, **QUIET).fit(HMM(2, "poisson"), torch.tensor([3.0]))
    assert short.draws["z"].shape == (2, 5, 1)


def test_an_hmm_without_data_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match="prepare"):
        HMM(2).model(None, size=3)
    model = HMM(2)
    model.prepare(SERIES)
    with pytest.raises(ValueError, match="number of steps"):
        model.model()
    with pytest.raises(ValueError, match="3 features, but this HMM was built for 2"):
        model.model(torch.zeros(4, 3))
