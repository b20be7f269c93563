"""Naive Bayes beside scikit-learn's classifiers, beside enumeration of the missing labels, and given bad input.

False alarms. Samplers make 3 x 22 comparisons at 6.3e-5 each: a fresh seed would fail in one of 240 runs of this file.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import scipy.special
import torch
from torch import Tensor

from agreement import assert_agree
from exact import Moments, array, assignments, averaged, beta, dirichlet, gamma, grid, log_dirichlet, moments, noise
from inference import EM, HMC, SVI, Gibbs, MetropolisHastings
from parameters import quick
from pyro_genmodels import NaiveBayes
from pyro_genmodels.distributions import Classwise

theirs = pytest.importorskip("sklearn.naive_bayes")

Y = torch.arange(60) % 3
X = noise(60, 4, seed=0) + Y[:, None]
COUNTS = X.clamp(0.0, 3.0).floor()
TABLES = {"gaussian": X, "bernoulli": (X > 1).double(), "categorical": COUNTS, "multinomial": COUNTS}
PEERS = {
    "gaussian": lambda a: theirs.GaussianNB(var_smoothing=0.0), "bernoulli": lambda a: theirs.BernoulliNB(alpha=a),
    "categorical": lambda a: theirs.CategoricalNB(alpha=a, min_categories=4),
    "multinomial": lambda a: theirs.MultinomialNB(alpha=a),
}  # fmt: skip


@pytest.mark.parametrize("smoothing", [1.0, 0.1])
@pytest.mark.parametrize("kind", PEERS)
def test_em_with_all_labels_is_the_classifier_of_scikit_learn(kind: str, smoothing: float) -> None:
    x = TABLES[kind]
    model = NaiveBayes(3, kind, concentration=1.0 + smoothing, levels=[4] * 4 if kind == "categorical" else None)
    posterior = EM(objective="mle" if kind == "gaussian" else "map", seed=0, progress=False).fit(model, x, Y)
    peer = PEERS[kind](smoothing).fit(x.numpy(), Y.numpy())
    np.testing.assert_allclose(model.predict_proba(x, posterior), peer.predict_proba(x.numpy()), rtol=0, atol=1e-9)
    assert np.array_equal(model.predict(x, posterior), peer.predict(x.numpy()))
    assert model.score(x, Y, posterior) == peer.score(x.numpy(), Y.numpy())


# ------------------------------------------------------------------------------- enumeration of three missing labels
KINDS = ("bernoulli", "categorical", "poisson")
TABLE = array(
    [1, 0, 2], [1, 1, 3], [0, 2, 0], [0, 2, 1], [1, 0, math.nan], [math.nan, 2, 0], [0, math.nan, 4], [1, 1, 0]
)  # fmt: skip
LABELS = torch.tensor([0, 0, 1, 1, 0, -1, -1, -1])
MEAN = float(TABLE[:, 2].nanmean())
START: dict[str, Any] = {"seed": 1, "progress": False}


def solution(a: float = 2.0) -> dict[str, Moments]:
    """By enumeration; given all labels, every parameter is conjugate."""
    missing = assignments(2, 3)
    label = np.broadcast_to(LABELS.numpy(), (len(missing), len(LABELS))).copy()
    label[:, 5:] = missing
    member = (label[:, :, None] == np.arange(2)).astype(float)
    yes, level, count = (TABLE[:, j].numpy() for j in range(3))
    on, off = (np.einsum("mnk,n->mk", member, np.nan_to_num(part)) for part in (yes, 1 - yes))
    levels = a + np.einsum("mnk,nl->mkl", member, (level[:, None] == np.arange(3)).astype(float))
    total = np.einsum("mnk,n->mk", member, np.nan_to_num(count))
    number = np.einsum("mnk,n->mk", member, ~np.isnan(count))
    share, rate = 1.0 + member.sum(1), a / MEAN + number
    log_weights = log_dirichlet(share) + scipy.special.betaln(a + on, a + off).sum(1) + log_dirichlet(levels).sum(1)
    log_weights = log_weights + (scipy.special.gammaln(a + total) - (a + total) * np.log(rate)).sum(1)
    known = {"share": dirichlet(share), "rates": beta(a + on, a + off), "chances_3": dirichlet(levels)}
    known["intensities"] = gamma(a + total, rate)
    found = {name: averaged(log_weights, each.mean, each.sd**2) for name, each in known.items()}
    return found | {"missing": averaged(log_weights, missing.astype(float))}


BACKENDS = {
    "Gibbs": Gibbs(chains=32, warmup=30, draws=100, **START),
    "MetropolisHastings": MetropolisHastings(chains=32, warmup=500, draws=100, thin=25, **START),
    "HMC": HMC(chains=32, warmup=150, draws=100, **START),
}


@pytest.mark.parametrize("backend", quick(BACKENDS, ("Gibbs",)))
def test_samplers_agree_with_enumeration_of_the_missing_labels(backend: str) -> None:
    posterior = BACKENDS[backend].fit(NaiveBayes(2, KINDS), TABLE, LABELS)
    draws = {name: value.double().numpy() for name, value in posterior.draws.items()}
    draws = {"missing": draws["y"][..., 5:]} | {
        name: value.squeeze(3) if name != "share" and value.shape[3:4] == (1,) else value for name, value in draws.items()
    }
    assert_agree(draws, solution())
    if backend == "Gibbs":
        plan = posterior.plan
        updates = {name: plan[name].update for name in plan}
        assert updates == {
            "share": "Dirichlet", "rates": "Beta", "chances_3": "Dirichlet", "intensities": "Gamma",
            "y_unobserved": "Enumerate",
        }  # fmt: skip
        assert max(plan[name].certificate for name in plan) < 1e-8


@pytest.mark.slow
def test_the_means_of_an_automatic_guide_are_not_far_off() -> None:
    """Within half a posterior standard deviation, though independent normals do not contain the posterior."""
    posterior = SVI(steps=800, learning_rate=0.03, **START).fit(NaiveBayes(2, KINDS), TABLE, LABELS)
    for name, exact in solution().items():
        if name != "missing":
            mean = posterior.draws[name].mean((0, 1)).numpy().reshape(exact.mean.shape)
            assert (np.abs(mean - exact.mean) / exact.sd).max() < 0.5, name


def test_em_with_missing_labels_ends_where_the_density_is_highest() -> None:
    """The density of all parameters, written down again: no gradient at the end, and EM never falls on its way."""
    posterior = EM(tolerance=1e-10, **START).fit(NaiveBayes(2, KINDS), TABLE, LABELS)
    found = posterior.point()
    share, rate, chance, intensity = (found[n] for n in ("share", "rates", "chances_3", "intensities"))
    free = torch.cat([share.log(), rate.logit().flatten(), chance.log().flatten(), intensity.log().flatten()])

    def log_density(free: Tensor) -> Tensor:
        a, b, c, d = free.split([2, 2, 6, 2])
        share, rate = a.softmax(0), b.sigmoid()
        chance, intensity = c.reshape(2, 3).softmax(1), d.exp()
        rows: Any = share.log()
        columns = (dist.Bernoulli(rate), dist.Categorical(chance), dist.Poisson(intensity))
        for j, column in enumerate(columns):
            value = TABLE[:, j, None]
            rows = rows + torch.where(value.isnan(), 0.0, column.log_prob(value.nan_to_num(0.0)))
        known = rows[:5].gather(1, LABELS[:5, None]).sum() + rows[5:].logsumexp(1).sum()
        prior = (rate * (1 - rate)).log().sum() + chance.log().sum() + (intensity.log() - 2 / MEAN * intensity).sum()
        return known + prior

    assert torch.func.grad(log_density)(free).abs().max() < 1e-6
    objective = posterior.history["log_joint"]
    assert (objective.diff() >= -1e-9).all()


def test_gaussian_columns_agree_with_quadrature() -> None:
    """Mean and variance of one column of one class, on a grid; the other class has its own."""
    x, y = array([0.1], [1.9], [0.7], [-0.4], [5.0], [6.5]), torch.tensor([0, 0, 0, 0, 1, 1])
    m, s = x.mean(), x.std(correction=0)
    points = grid((-6.0, 9.0, 601), (-3.0, 6.0, 601))
    mean, log_variance = points[:, 0], points[:, 1]
    variance = log_variance.exp()
    own = dist.Normal(mean[:, None], variance.sqrt()[:, None]).log_prob(x[:4, 0]).sum(1)
    prior = dist.Normal(m, 3 * s).log_prob(mean) + dist.InverseGamma(1.5, 0.5 * s**2).log_prob(variance) + log_variance
    exact = moments(own + prior, {"mean": mean, "log_variance": log_variance})
    posterior = BACKENDS["Gibbs"].fit(NaiveBayes(2), x, y)
    draws = {"mean": posterior.draws["means"][..., 0, 0], "log_variance": posterior.draws["variances"][..., 0, 0].log()}
    assert_agree(draws, exact)


def test_predictions_average_the_probabilities_of_draws() -> None:
    model = NaiveBayes(2, KINDS)
    posterior = Gibbs(chains=2, warmup=5, draws=4, **START).fit(model, TABLE, LABELS)
    single = [
        model.predict_proba(TABLE, {name: value[c, d] for name, value in posterior.draws.items()})
        for c in range(2)
        for d in range(4)
    ]
    torch.testing.assert_close(model.predict_proba(TABLE, posterior), torch.stack(single).mean(0))
    torch.testing.assert_close(model.predict_proba(TABLE, posterior).sum(1), torch.ones(8).double())


def test_a_lighter_row_counts_as_its_power() -> None:
    """With weight ½, two equal rows without a label and one of full weight without one have the same posterior.

    Where the label is certain: a power of the joint density of row and label, summed over a label, is else no power.
    """
    x, y = array([1, 0, 9], [0, 2, 0], [1, 0, 9]), torch.tensor([0, 1, -1])
    one = NaiveBayes(2, ["poisson"] * 3)
    one.prepare(x, y)
    half = NaiveBayes(2, ["poisson"] * 3, unlabelled_weight=0.5)
    twice = torch.cat([x, x[2:]]), torch.cat([y, y[2:]])
    x_far = x * 40.0
    whole = EM(**START).fit(_Fixed(one, x_far), x_far, y).point()
    light = EM(**START).fit(_Fixed(half, x_far), twice[0] * 40.0, twice[1]).point()
    torch.testing.assert_close(whole["intensities"], light["intensities"], rtol=1e-6, atol=1e-6)


class _Fixed(torch.nn.Module):
    """A model whose prior follows the data ``x``, whatever it is fitted to."""

    def __init__(self, inner: NaiveBayes, x: Tensor) -> None:
        super().__init__()
        self.inner, self.x = inner, x

    def prepare(self, x: Tensor, y: Tensor) -> None:
        self.inner.prepare(x, y)
        constants = self.inner.location, self.inner.scale
        self.inner.prepare(self.x)
        self.inner._is_partly_labelled = bool((y < 0).any())
        assert constants[0].shape == self.inner.location.shape

    def model(self, x: Tensor, y: Tensor) -> Any:
        return self.inner.model(x, y)


@pytest.mark.parametrize("kind", TABLES)
def test_rows_are_drawn_as_their_class_has_them(kind: str) -> None:
    """Means of 4000 rows of each of two classes within 4.5 standard errors: a false alarm in 1e4 runs of this file."""
    parameters: dict[str, Any] = {
        "gaussian": dist.Normal(array([0.0, 1.0], [3.0, -2.0]), array([1.0, 2.0], [0.5, 1.0])),
        "bernoulli": dist.Bernoulli(array([0.2, 0.9], [0.5, 0.1])),
        "categorical": dist.Categorical(array([[0.2, 0.8], [0.5, 0.5]], [[0.9, 0.1], [0.3, 0.7]])),
        "multinomial": dist.Multinomial(1, array([0.2, 0.8], [0.5, 0.5])),
    }
    given = parameters[kind]
    index, lengths = torch.arange(8000) % 2, 1.0 + torch.arange(8000) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = Classwise(given, index, lengths=lengths).sample()
    assert rows.shape == (8000, 2)
    if kind == "multinomial":
        assert torch.equal(rows.sum(1), lengths.double())
    for k in range(2):
        own = rows[index == k]
        mean = given.probs[..., 1] if kind == "categorical" else given.mean
        expected = mean[k] * (lengths[index == k].mean() if kind == "multinomial" else 1.0)
        assert ((own.mean(0) - expected).abs() < 4.5 * own.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("kind", [*TABLES, "poisson"])
def test_log_probabilities_are_those_of_each_family(kind: str) -> None:
    """The table, computed as a product of matrices, row by row and column by column."""
    x = TABLES.get(kind, COUNTS)[:10]
    parts: dict[str, Any] = {
        "gaussian": dist.Normal(noise(3, 4, seed=1), noise(3, 4, seed=2).exp()),
        "bernoulli": dist.Bernoulli(noise(3, 4, seed=1).sigmoid()),
        "categorical": dist.Categorical(noise(3, 4, 4, seed=1).softmax(-1)),
        "multinomial": dist.Multinomial(1, noise(3, 4, seed=1).softmax(-1)),
        "poisson": dist.Poisson(noise(3, 4, seed=1).exp()),
    }
    given, index = parts[kind], torch.arange(10) % 3
    if kind == "multinomial":
        coefficient = torch.lgamma(x.sum(1) + 1) - torch.lgamma(x + 1).sum(1)
        expected = [dist.Multinomial(int(r.sum()), given.probs[k]).log_prob(r) for r, k in zip(x, index, strict=True)]
        expected = list(torch.stack(expected) - coefficient)
    else:
        expected = [given.log_prob(r)[k].sum() for r, k in zip(x, index, strict=True)]
    torch.testing.assert_close(Classwise(given, index).log_prob(x), torch.stack(expected))


# ---------------------------------------------------------------------------------------------------- bad input
FIT = EM(steps=20, **START)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("poisson", -1.0, r"x is -1 in row 1, column 0, but a poisson column must be a whole number"),
        ("poisson", 0.5, "x is 0.5 in row 1, column 0"),
        ("multinomial", -2.0, "x is -2 in row 1"),
        ("multinomial", math.nan, "unknown count"),
        ("bernoulli", 2.0, "a bernoulli column must be 0 or 1"),
        ("categorical", 1.5, "a categorical column must be a whole number"),
        ("gaussian", math.inf, "a gaussian column must be finite"),
    ],
)
def test_entries_that_a_column_cannot_have_are_named(kind: str, value: float, words: str) -> None:
    x = TABLES.get(kind, COUNTS).clone()
    x[1, 0] = value
    with pytest.raises(ValueError, match=words):
        FIT.fit(NaiveBayes(3, kind), x, Y)


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (Y + 1, "labels from 1 to 3, but must be 0 to 2"),
        (Y - 2, "labels from -2 to 0"),
        (Y.double(), "labels are integers"),
        (Y[:5], "x has 60 rows"),
    ],
)
def test_labels_that_are_none_are_refused(y: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FIT.fit(NaiveBayes(3), X, y)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: NaiveBayes(0), "at least 1 class"),
        (lambda: NaiveBayes(2, "normal"), "columns names 'normal'"),
        (lambda: NaiveBayes(2, concentration=0.5), "concentration is 0.5"),
        (lambda: NaiveBayes(2, unlabelled_weight=0.0), "unlabelled_weight is 0.0"),
        (lambda: NaiveBayes(2, ["categorical"], levels=[2, 3]), "levels has 2 numbers"),
        (lambda: NaiveBayes(2).model(size=3), "has seen no data"),
        (lambda: NaiveBayes(2, ["poisson"]).model(), "needs data x, or the number of rows"),
        (lambda: NaiveBayes(2, ["poisson"]).prepare(X), "x has 4 columns"),
        (lambda: NaiveBayes(2).prepare(X[0]), "must be a table"),
        (lambda: NaiveBayes(2).prepare(X.long()), "must be floating"),
        (lambda: NaiveBayes(2, "categorical", levels=[2, 2, 2, 2]).prepare(COUNTS), "has 2 levels"),
    ],
)
def test_settings_that_make_no_sense_are_refused(build: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


@pytest.mark.parametrize("kind", [*TABLES, "poisson"])
def test_a_class_without_rows_breaks_nothing(kind: str) -> None:
    x = TABLES.get(kind, COUNTS)
    model = NaiveBayes(4, kind)
    for backend in (FIT, Gibbs(chains=2, warmup=10, draws=10, **START)):
        proba = model.predict_proba(x, backend.fit(model, x, Y))
        assert proba.isfinite().all() and float(proba[:, 3].max()) < 0.3


def test_a_column_of_one_value_says_nothing() -> None:
    x = torch.cat([X, torch.full((60, 1), 7.0).double()], 1)
    with_it, without = NaiveBayes(3), NaiveBayes(3)
    wide, narrow = FIT.fit(with_it, x, Y), FIT.fit(without, X, Y)
    torch.testing.assert_close(with_it.predict_proba(x, wide), without.predict_proba(X, narrow), rtol=0, atol=0.02)


def test_a_row_or_a_column_that_is_missing_says_nothing() -> None:
    x = X.clone()
    x[3], x[:, 2] = math.nan, math.nan
    model, without = NaiveBayes(3), NaiveBayes(3)
    posterior = FIT.fit(model, x, Y)
    proba = model.predict_proba(x, posterior)
    torch.testing.assert_close(proba[3], posterior.point()["share"].double())  # its class is all that is known of it
    rest = x[:, [0, 1, 3]]
    others = FIT.fit(without, rest, Y)
    torch.testing.assert_close(proba, without.predict_proba(rest, others))


def test_one_class_is_certain() -> None:
    model = NaiveBayes(1)
    for backend in (FIT, Gibbs(chains=2, warmup=5, draws=5, **START)):
        posterior = backend.fit(model, X, torch.zeros(60, dtype=torch.long))
        assert torch.equal(model.predict_proba(X, posterior), torch.ones(60, 1).double())


def test_rows_seen_twice_count_twice() -> None:
    """Maximum likelihood does not change if every row is there twice."""
    fit = EM(objective="mle", **START)
    once, twice = (fit.fit(NaiveBayes(3), x, y).point() for x, y in ((X, Y), (X.repeat(2, 1), Y.repeat(2))))
    for name in ("share", "means", "variances"):
        torch.testing.assert_close(once[name], twice[name])


def test_words_never_seen_are_smoothed_not_impossible() -> None:
    """A word of no document has the probability a − 1 over all counts: the posterior mode of a Dirichlet."""
    x = torch.cat([COUNTS, torch.zeros(60, 1).double()], 1)
    model = NaiveBayes(3, "multinomial")
    posterior = FIT.fit(model, x, Y)
    new = torch.zeros(1, 5).double()
    new[0, 4] = 3.0
    totals = torch.stack([x[k == Y].sum() + 5.0 for k in range(3)])
    expected = (-3.0 * totals.log()).softmax(0)
    torch.testing.assert_close(model.predict_proba(new, posterior)[0], expected)


def test_without_labels_it_is_a_mixture() -> None:
    """Three far groups, found without a label: every pair of rows is together as it should be, all but certainly."""
    x = X + 20.0 * Y[:, None]
    model = NaiveBayes(3)
    posterior = EM(restarts=4, **START).fit(model, x)
    found = model.predict(x, posterior)
    assert torch.equal(found[:, None] == found, Y[:, None] == Y)


def test_a_state_holds_all_that_predictions_need() -> None:
    model, other = NaiveBayes(2, KINDS), NaiveBayes(2, KINDS)
    posterior = FIT.fit(model, TABLE, LABELS)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict_proba(TABLE, posterior), model.predict_proba(TABLE, posterior))


def test_the_tools_of_pyro_run_on_it() -> None:
    model = NaiveBayes(2, KINDS, levels=[3])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = pyro.infer.Predictive(model.model, num_samples=5)(size=4)
        assert drawn["x_poisson"].shape == (5, 4, 1) and drawn["y"].shape == (5, 4)
        seen = {name: value[0] for name, value in drawn.items() if name[:2] == "x_" or name == "y"}
        x = torch.cat([seen[f"x_{name}"] for name in ("bernoulli", "categorical_3", "poisson")], 1)
        kernel = pyro.infer.NUTS(lambda: model.model(x, seen["y"]), max_tree_depth=3)
        chain = pyro.infer.MCMC(kernel, num_samples=3, warmup_steps=3, disable_progbar=True)
        chain.run()
    assert chain.get_samples()["rates"].shape == (3, 2, 1)
