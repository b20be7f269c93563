"""The mixture of columns of several kinds: densities by scipy, posteriors by enumeration of all labels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings
from pyro_genmodels import Mixture

ALL = ("bernoulli", "categorical", "poisson", "normal", "student")
DISCRETE = ("bernoulli", "categorical", "poisson", "bernoulli")
NAN = math.nan
SMALL = torch.tensor(
    [[1, 0, 3, NAN], [1, 2, 0, 1], [0, 1, 7, 0], [1, NAN, 1, 1], [0, 1, 9, 0], [NAN, NAN, NAN, NAN]]
).double()


def rows(count: int = 300) -> Tensor:
    """Of two components, a tenth of the entries missing."""
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(count, generator=generator) < 0.4
    uniform = torch.rand(count, 5, generator=generator).double()
    noise = torch.randn(count, 2, generator=generator).double()
    x = torch.stack(
        [
            (uniform[:, 0] < torch.where(z, 0.9, 0.2)).double(),
            torch.where(uniform[:, 1] < torch.where(z, 0.7, 0.1), 0.0, 1.0 + (uniform[:, 2] < 0.5)),
            torch.poisson(torch.where(z, 8.0, 2.0), generator=generator).double(),
            torch.where(z, 1.0, -1.0) + 0.7 * noise[:, 0],
            torch.where(z, 100.0, 90.0) + 2.0 * noise[:, 1] / (uniform[:, 3] + 0.05),
        ],
        1,
    )
    return torch.where(torch.rand(count, 5, generator=generator) < 0.1, NAN, x)


VALUES = {
    "weights": torch.tensor([0.3, 0.7], dtype=torch.float64),
    "probabilities": torch.tensor([[0.9], [0.2]], dtype=torch.float64),
    "shares": torch.tensor([[[0.7, 0.2, 0.1]], [[0.1, 0.4, 0.5]]], dtype=torch.float64),
    "rates": torch.tensor([[8.0], [2.0]], dtype=torch.float64),
    "means": torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
    "variances": torch.tensor([[0.5], [0.8]], dtype=torch.float64),
    "locations": torch.tensor([[100.0], [90.0]], dtype=torch.float64),
    "squares": torch.tensor([[9.0], [4.0]], dtype=torch.float64),
}


def log_terms(x: np.ndarray) -> np.ndarray:
    """log w_k p_k(known entries), (rows, 2), by scipy."""
    terms = np.tile(VALUES["weights"].log().numpy(), (len(x), 1))
    v = {name: value.numpy() for name, value in VALUES.items()}
    for k in range(2):
        columns = [
            scipy.stats.bernoulli(v["probabilities"][k, 0]).logpmf,
            lambda c, k=k: np.log(v["shares"][k, 0][c.astype(int)]),
            scipy.stats.poisson(v["rates"][k, 0]).logpmf,
            scipy.stats.norm(v["means"][k, 0], v["variances"][k, 0] ** 0.5).logpdf,
            scipy.stats.t(4.0, v["locations"][k, 0], v["squares"][k, 0] ** 0.5).logpdf,
        ]
        for j, log_density in enumerate(columns):
            known = ~np.isnan(x[:, j])
            terms[known, k] += log_density(x[known, j])
    return terms


def test_scores_are_those_of_scipy() -> None:
    x = rows(50)
    model = Mixture(2, ALL)
    terms = log_terms(x.numpy())
    scores = scipy.special.logsumexp(terms, 1)
    np.testing.assert_allclose(model.score_samples(x, VALUES), scores, rtol=1e-9)
    np.testing.assert_allclose(model.predict_proba(x, VALUES), np.exp(terms - scores[:, None]), rtol=1e-8)


def test_imputed_entries_are_means_or_most_probable_labels() -> None:
    x = rows(50)
    shares = torch.from_numpy(np.exp(log_terms(x.numpy())))
    shares = shares / shares.sum(1, keepdim=True)
    filled = Mixture(2, ALL).impute(x, VALUES)
    for column, site in ((0, "probabilities"), (2, "rates"), (3, "means"), (4, "locations")):
        gone = x[:, column].isnan()
        torch.testing.assert_close(filled[gone, column], (shares @ VALUES[site])[gone, 0], rtol=1e-8, atol=0.0)
    gone = x[:, 1].isnan()
    assert torch.equal(filled[gone, 1], (shares @ VALUES["shares"][:, 0]).argmax(1)[gone].double())
    assert torch.equal(filled[~x.isnan()], x[~x.isnan()])


def test_new_rows_have_the_means_of_the_mixture() -> None:
    """Within 5 standard errors: four columns, a false alarm in 4e5 runs."""
    model = Mixture(2, ALL)
    model.prepare(rows())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = model.sample(3000, VALUES)
    for column, site in ((0, "probabilities"), (2, "rates"), (3, "means"), (4, "locations")):
        error = drawn[:, column].mean() - VALUES["weights"] @ VALUES[site][:, 0]
        assert abs(float(error)) < 5.0 * float(drawn[:, column].std()) / 3000**0.5


@pytest.fixture(scope="module")
def pairs() -> np.ndarray:
    """P(z_i = z_j | x) of the small table, by enumeration: all priors but the labels' integrate in closed form."""
    x = SMALL.numpy()
    mean = np.nanmean(x[:, 2])
    total, together = -math.inf, np.full((6, 6), -math.inf)
    for z in itertools.product(range(2), repeat=6):
        z = np.array(z)
        log_p = scipy.special.gammaln(1 + np.bincount(z, minlength=2)).sum()
        for k in range(2):
            own = x[z == k]
            for j in (0, 3):
                ones, zeros = (own[:, j] == 1).sum(), (own[:, j] == 0).sum()
                log_p += scipy.special.betaln(1 + ones, 1 + zeros)
            labels = own[:, 1][~np.isnan(own[:, 1])].astype(int)
            log_p += scipy.special.gammaln(1 + np.bincount(labels, minlength=3)).sum() - scipy.special.gammaln(
                3 + len(labels)
            )
            counts = own[:, 2][~np.isnan(own[:, 2])]
            log_p += scipy.special.gammaln(1 + counts.sum()) - (1 + counts.sum()) * np.log(1 / mean + len(counts))
        total = np.logaddexp(total, log_p)
        together = np.where(z[:, None] == z, np.logaddexp(together, log_p), together)
    return np.exp(together - total)


@pytest.mark.parametrize(
    "backend",
    [
        Gibbs(chains=32, warmup=50, draws=250, seed=0, progress=False),
        pytest.param(HMC(chains=32, warmup=100, draws=200, seed=0, progress=False), marks=pytest.mark.slow),
        MetropolisHastings(chains=64, warmup=300, draws=200, thin=10, seed=0, progress=False),
    ],
    ids=lambda backend: type(backend).__name__,
)
def test_samplers_agree_with_the_enumeration_of_all_labels(backend: Any, pairs: np.ndarray) -> None:
    """Standard errors from independent chains; 15 pairs within 5 of them (t with 31 degrees): a false alarm in 3e3 runs."""
    posterior = backend.fit(Mixture(2, DISCRETE), SMALL)
    z = posterior.draws["z"]
    same = (z.unsqueeze(-1) == z.unsqueeze(-2)).double().mean(1)
    error = (same.mean(0) - torch.from_numpy(pairs)).abs()
    assert bool((error <= 5.0 * same.std(0) / len(same) ** 0.5 + 1e-12).all())


@pytest.mark.slow
def test_conditionals_and_maxima_are_closed_forms() -> None:
    found = Gibbs(chains=2, warmup=5, draws=5, seed=0, progress=False).fit(Mixture(2, ALL[:4]), rows()[:, :4]).plan
    kinds = {"weights": "Dirichlet", "probabilities": "Beta", "shares": "Dirichlet", "rates": "Gamma", "means": "Normal",
             "variances": "InverseGamma", "z": "Enumerate"}  # fmt: skip
    assert {name: found[name].update for name in kinds} == kinds
    climbed = EM(seed=0, progress=False, standard_errors=False).fit(Mixture(2, ALL), rows()).plan
    assert {name: climbed[name].update for name in kinds} == kinds
    assert climbed["locations"].update == "Normal" and climbed["squares"].update == "InverseGamma"


@pytest.mark.slow
def test_em_climbs_to_where_no_step_is_left() -> None:
    """The slope of scipy's log-likelihood by differences is zero at the "mle" point, along every parameter."""
    x = rows(150)
    backend = EM(objective="mle", steps=2000, tolerance=1e-9, seed=0, progress=False, standard_errors=False)
    posterior = backend.fit(Mixture(2, ALL), x)
    climb = posterior.history["log_joint"]
    assert float(climb.diff().min()) >= -1e-9 * abs(float(climb[-1]))
    point = {name: value for name, value in posterior.point().items() if name != "z"}
    model = Mixture(2, ALL)
    level = float(model.score_samples(x, point).sum())
    assert level == pytest.approx(float(climb[-1]), rel=1e-9)
    for name in ("probabilities", "rates", "means", "variances", "locations", "squares"):
        for k in range(2):
            step = torch.zeros_like(point[name])
            step[k] = 1e-4 * point[name][k].abs()
            sides = [float(model.score_samples(x, point | {name: point[name] + s * step}).sum()) for s in (1.0, -1.0)]
            assert abs(sides[0] - sides[1]) < 1e-4, name


@pytest.mark.parametrize("kinds", [pytest.param(ALL, marks=pytest.mark.slow), "student"], ids=["all", "student"])
def test_a_row_of_weight_two_is_two_rows(kinds: Any) -> None:
    x = rows()[:, 3:] if kinds == "student" else rows()
    weights = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(1)).double()
    start = {name: value for name, value in VALUES.items() if name in ("weights", "locations", "squares")}
    start = {} if kinds == "student" else start
    backend = EM(tolerance=1e-10, steps=3000, seed=0, start=start or None, progress=False, standard_errors=False)
    one = backend.fit(Mixture(2, kinds), x, row_weights=weights)
    two = backend.fit(Mixture(2, kinds), x.repeat_interleave(weights.long(), 0))
    torch.testing.assert_close(one.stats["lp"], two.stats["lp"], rtol=1e-8, atol=0.0)


@pytest.mark.slow
def test_svi_tells_the_components_apart() -> None:
    x = rows()
    posterior = SVI(steps=300, seed=0, progress=False).fit(Mixture(2, ALL), x)
    rates = posterior.point()["rates"][:, 0].sort().values
    assert 1.0 < float(rates[0]) < 4.0 and 6.0 < float(rates[1]) < 10.0


BAD = {
    "half": ("poisson", [[1.0], [0.5], [2.0]], "Column 0 is of the kind 'poisson' and must hold whole numbers from 0 on"),
    "negative": ("poisson", [[1.0], [2.0], [-1.0]], "row 2 has -1"),
    "two": ("bernoulli", [[1.0], [2.0], [0.0]], "must hold 0 or 1, or NaN, but row 1 has 2"),
    "label": ("categorical", [[1.0], [2.0], [-1.0]], "must hold labels 0 to 2"),
    "infinite": ("student", [[1.0], [math.inf], [-1.0]], "must hold finite numbers"),
    "empty": ("normal", [[NAN], [NAN], [NAN]], "Column 0 of x has no value that is known"),
    "few": ("normal", [[1.0]], "Mixture has 2 components, but x has only 1 rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_column_cannot_hold_is_refused(case: str) -> None:
    kinds, x, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        EM(progress=False).fit(Mixture(2, kinds), torch.tensor(x).double())


def test_unknown_kinds_and_other_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="kinds holds 'beta', but each must be one of bernoulli"):
        Mixture(2, ("beta",))
    with pytest.raises(ValueError, match="x has 3 columns, but this Mixture was built for 2"):
        EM(progress=False).fit(Mixture(2, ("normal", "normal")), torch.randn(9, 3).double())


@pytest.mark.parametrize("kinds", ["poisson", "bernoulli", "categorical", "normal", "student"])
def test_one_component_and_equal_rows_do(kinds: str) -> None:
    posterior = EM(seed=0, progress=False, standard_errors=False).fit(Mixture(1, kinds), torch.ones(5, 2).double())
    assert all(bool(value.isfinite().all()) for value in posterior.point().values() if value.is_floating_point())
