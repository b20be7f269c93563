"""Topic models: the posterior of a tiny corpus by enumeration, each piece against its formula, and what they refuse."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.func import grad, vmap
from torch.testing import assert_close

from exact import Moments, assignments, averaged, dirichlet, log_dirichlet
from inference import EM, HMC, NUTS, SVI, Gibbs, MetropolisHastings, Posterior, arviz
from pyro_genmodels import LDA, bags
from pyro_genmodels.bags import BagOfWords, SparseDirichlet, documents, folded, layout
from pyro_genmodels.classical import averages
from pyro_genmodels.classical.averages import Averages, Counts
from pyro_genmodels.classical.topics import _Tokens
from pyro_genmodels.metrics import topics as metrics

ALPHA, BETA = 0.75, 0.875
TINY = documents(([0, 0, 1, 1], [0, 1, 1, 2], [3, 1, 1, 2]))  # two documents, three words; one cell has three tokens
CORPUS = Path(os.environ.get("PYRO_GENMODELS_DATA") or Path(__file__).parents[2] / "shared" / "data") / "bow_reuters395.npz"


def lda(**options: Any) -> LDA:
    return LDA(2, 3, ALPHA, BETA, **options)


def blend_moments() -> Moments:
    """What each document blends, Σ_k θ_dk φ_kw, by enumeration of all 2⁷ assignments of the seven tokens."""
    words, owners = np.array([0, 0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 0, 1, 1, 1])
    member = (assignments(2, 7)[..., None] == np.arange(2)).astype(float)
    numbers = ALPHA + np.einsum("mik,id->mdk", member, owners[:, None] == np.arange(2))
    counts = BETA + np.einsum("mik,iv->mkv", member, words[:, None] == np.arange(3))
    log_weights = log_dirichlet(numbers).sum(1) + log_dirichlet(counts).sum(1)
    share, topic = dirichlet(numbers), dirichlet(counts)
    pair = share.mean.prod(-1) - share.sd[..., 0] ** 2
    blend = np.einsum("mdk,mkv->mdv", share.mean, topic.mean)
    second = np.einsum("mdk,mkv->mdv", share.mean**2 + share.sd**2, topic.mean**2 + topic.sd**2)
    second += 2.0 * pair[..., None] * topic.mean.prod(1)[:, None]
    return averaged(log_weights, blend, second - blend**2)


def blends(posterior: Posterior) -> np.ndarray:
    return (posterior.draws["shares"] @ posterior.draws["topics"]).numpy()


# ------------------------------------------------------------------------------------------------ every back-end
BACKENDS = {
    "blocked": (False, Gibbs(chains=4, warmup=30, draws=300, seed=1, progress=False)),
    "partially collapsed": (True, Gibbs(chains=4, warmup=30, draws=250, seed=2, progress=False)),
    "Metropolis": (False, MetropolisHastings(chains=32, warmup=500, draws=60, thin=40, seed=3, progress=False)),
    "HMC": (False, HMC(chains=32, warmup=150, draws=100, seed=4, progress=False)),
}


@pytest.mark.parametrize("name", BACKENDS)
def test_samplers_agree_with_the_enumerated_posterior(name: str, device: torch.device) -> None:
    """Twelve comparisons at 4 Monte-Carlo standard errors each: one false alarm in 1,300 fresh seeds of one sampler."""
    is_collapsed, backend = BACKENDS[name]
    posterior = backend.fit(lda(is_collapsed=is_collapsed), TINY.to(device))
    draws, exact = blends(posterior), blend_moments()
    assert arviz.ess(draws).min() > 400 and arviz.rhat(draws).max() < 1.05
    assert np.abs((draws.mean((0, 1)) - exact.mean) / arviz.mcse(draws)).max() < 4.0
    squares = (draws - exact.mean) ** 2
    assert np.abs((squares.mean((0, 1)) - exact.sd**2) / arviz.mcse(squares)).max() < 4.0
    if isinstance(backend, Gibbs):
        assert posterior.plan is not None and posterior.plan["shares"].update == "Own"
        assert posterior.plan["shares"].certificate < 1e-8  # type: ignore[operator]
        assert posterior.plan["shares"].acceptance == 1.0


def test_without_the_models_own_move_gibbs_finds_another() -> None:
    model = lda().double()

    def program(x: Tensor) -> None:
        model.model(x)

    posterior = Gibbs(chains=32, warmup=150, draws=60, seed=5, progress=False).fit(program, TINY)
    assert posterior.plan is not None and posterior.plan["topics"].update == "HMC"
    draws, exact = blends(posterior), blend_moments()
    assert np.abs((draws.mean((0, 1)) - exact.mean) / arviz.mcse(draws)).max() < 4.0  # 1 of 2,600 fresh seeds fails


@pytest.mark.parametrize(
    ("guide", "batch_size"), [(None, None), (None, 1), (AutoNormal, None)], ids=["own", "own in batches", "automatic"]
)
def test_guides_have_means_within_half_a_standard_deviation(guide: Any, batch_size: int | None) -> None:
    backend = SVI(steps=700, learning_rate=0.03, guide=guide, batch_size=batch_size, seed=0, progress=False, draws=500)
    posterior = backend.fit(lda().double(), TINY)
    exact = blend_moments()
    assert np.abs((blends(posterior).mean((0, 1)) - exact.mean) / exact.sd).max() < 0.5


def test_the_guide_has_the_best_shares_for_its_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """At γ the bound of each document, by its formula, has gradient zero."""
    monkeypatch.setattr(bags, "_INNER", 1000)
    model = lda().double()
    model.prepare(TINY)
    guess = model.guesses["topics"].detach().exp()
    weights = (guess.digamma() - guess.sum(-1, keepdim=True).digamma()).exp()
    alpha = torch.full((2,), ALPHA, dtype=torch.float64)

    def bound(gamma: Tensor) -> Tensor:
        mean_log = gamma.digamma() - gamma.sum(-1, keepdim=True).digamma()
        evidence = (TINY[..., 1] * (mean_log.exp().unsqueeze(1) * weights.T[TINY[..., 0].long()]).sum(-1).log()).sum()
        prior = torch.distributions.Dirichlet(alpha)
        return evidence - torch.distributions.kl_divergence(torch.distributions.Dirichlet(gamma), prior).sum()

    gamma = bags.folded_in(TINY, weights, alpha)
    assert float(grad(bound)(gamma).abs().max()) < 1e-8


def test_the_guide_starts_where_it_is_told() -> None:
    """λ_k = β + n_k φ_k, with n_k = Σ_d N_d θ_dk, of topics and shares that are given; equal n_k without shares.

    Data are integers, so that what is given comes in single precision.
    """
    model, topics = lda().double(), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]).double()
    shares = torch.tensor([[0.9, 0.1], [0.25, 0.75]]).double()
    tokens = 4.0 * shares[0] + 3.0 * shares[1]
    backend = SVI(start={"topics": topics, "shares": shares}, steps=1, learning_rate=1e-12, draws=1, seed=0, progress=False)
    backend.fit(model, TINY)
    assert_close(model.guesses["topics"].detach().exp(), BETA + tokens[:, None] * topics, rtol=3e-7, atol=0.0)
    model.guess({"topics": topics}, TINY)
    assert_close(model.guesses["topics"].detach().exp(), BETA + 3.5 * topics)


def test_the_state_of_a_model_makes_another_like_it() -> None:
    model = lda()
    model.prepare(TINY)
    with torch.no_grad():
        model.guesses["topics"].add_(1.0)
    other = LDA(2)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.guesses["topics"], model.guesses["topics"]) and other.words == 3


def test_nuts_runs() -> None:
    posterior = NUTS(chains=2, warmup=20, draws=5, seed=0, progress=False).fit(lda(), TINY)
    assert blends(posterior).shape == (2, 5, 2, 3)


@pytest.mark.parametrize("with_start", [True, False])
def test_em_climbs_to_a_top_by_responsibilities_that_are_nowhere_written_down(with_start: bool) -> None:
    """Never down; and at the end every entry is its own M-step, (expected count + concentration − 1), normalised."""
    model = LDA(2, 3, 1.0 + ALPHA, 1.0 + BETA)
    start = model.start(TINY, seed=0) if with_start else None
    backend = EM(maximise=("shares", "topics"), start=start, tolerance=1e-10, steps=1000, seed=0, progress=False)
    posterior = backend.fit(model, TINY)
    assert posterior.plan is not None and posterior.plan["topics"].update == "Growth"
    climb = posterior.history["log_joint"]
    assert float(climb.diff().min()) >= -1e-10 * abs(float(climb[-1]))
    shares, topics = (posterior.draws[name][0, 0] for name in ("shares", "topics"))
    expected = m_step(shares, topics)
    assert_close(shares, expected[0], rtol=1e-6, atol=1e-8)
    assert_close(topics, expected[1], rtol=1e-6, atol=1e-8)


def m_step(shares: Tensor, topics: Tensor) -> tuple[Tensor, Tensor]:
    n = torch.zeros(2, 3, dtype=torch.float64)
    n[0, 0], n[0, 1], n[1, 1], n[1, 2] = 3.0, 1.0, 1.0, 2.0
    joint = shares[:, :, None] * topics[None]  # document, topic, word
    counts = n[:, None] * joint / joint.sum(1, keepdim=True)
    pair = counts.sum(2) + ALPHA, counts.sum(0) + BETA
    return pair[0] / pair[0].sum(-1, keepdim=True), pair[1] / pair[1].sum(-1, keepdim=True)


def test_one_step_of_em_is_the_step_with_responsibilities() -> None:
    model = LDA(2, 3, 1.0 + ALPHA, 1.0 + BETA)
    start = {name: value.double() for name, value in model.start(TINY, seed=3).items()}
    start = {name: value / value.sum(-1, keepdim=True) for name, value in start.items()}
    backend = EM(maximise=("shares", "topics"), start=start, steps=1, seed=0, progress=False, standard_errors=False)
    point = backend.fit(model, TINY).point()
    for name, expected in zip(("shares", "topics"), m_step(start["shares"], start["topics"]), strict=True):
        assert_close(point[name], expected, rtol=1e-10, atol=0.0)


# ------------------------------------------------------------------------------------------------ averages of tokens
SPARSE = documents(([0, 0, 1, 1, 2, 3, 3], [0, 1, 2, 3, 4, 1, 3], [3, 2, 2, 2, 4, 1, 1]), size=5)  # the last is empty


def expected_counts(r: Tensor, alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """α + tokens of each topic in each document, and β + those of each word, cell by cell."""
    cells = layout(SPARSE)
    shares, topics = alpha.repeat(5, 1), beta[:, None].repeat(1, len(alpha))
    for d, w, n, row in zip(cells.document, cells.word, cells.count, r, strict=True):
        shares[d] += n * row
        topics[w] += n * row
    return shares, topics


def one_step(r: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """The equation of CVB0, cell by cell."""
    cells, (shares, topics) = layout(SPARSE), expected_counts(r, alpha, beta)
    found = []
    for d, w, row in zip(cells.document, cells.word, r, strict=True):
        product = (shares[d] - row) * (topics[w] - row) / (topics.sum(0) - row)
        found.append(product / product.sum())
    return torch.stack(found)


def test_one_step_of_averages_is_their_equation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averages, "_LONGER", 0.0)
    monkeypatch.setattr(averages, "_PASSES", 1)
    alpha, beta = torch.tensor([0.1, 0.4, 0.2]).double(), torch.tensor([0.3, 0.1, 0.2, 0.1, 0.5]).double()
    r = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = r / r.sum(-1, keepdim=True)
    found, counts = Averages(SPARSE, alpha, beta).swept(r, 0)
    assert_close(found, one_step(r, alpha, beta))
    assert_close(counts, Counts(*(after := expected_counts(found, alpha, beta)), after[1].sum(0)))


@pytest.mark.parametrize("chunk", [1, 2**17], ids=["documents alone", "all at once"])
def test_em_of_a_collapsed_model_ends_where_averages_no_longer_move(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(averages, "_CHUNK", chunk)
    model = LDA(3, 5, 0.1, 0.2, is_collapsed=True).double()
    posterior = EM(steps=400, tolerance=1e-13, seed=1, progress=False).fit(model, SPARSE)
    assert posterior.plan is not None and posterior.plan["shares"].update == posterior.plan["topics"].update == "Own"
    alpha, beta = torch.full((3,), 0.1).double(), torch.full((5,), 0.2).double()
    shares, topics = posterior.point()["shares"], posterior.point()["topics"]
    assert_close(shares[4], torch.full((3,), 1.0 / 3.0).double())  # an empty document has the mean of the prior
    r, _ = (found := Averages(SPARSE, alpha, beta)).started(topics)
    for step in range(400):
        r, counts = found.swept(r, step)
    assert_close(one_step(r, alpha, beta), r, rtol=1e-9, atol=1e-9)
    assert_close(counts.means(), (shares, topics), rtol=1e-9, atol=1e-9)


def test_averages_of_one_topic_are_the_means_of_the_posterior() -> None:
    posterior = EM(steps=2, seed=0, progress=False).fit(LDA(1, 3, ALPHA, BETA, is_collapsed=True), TINY)
    exact = dirichlet(BETA + np.array([3.0, 2.0, 2.0])).mean
    assert_close(posterior.point()["topics"][0], torch.from_numpy(exact))


def test_averages_of_tokens_have_blends_near_those_of_the_enumerated_posterior() -> None:
    """An approximation: within six tenths of a standard deviation. All topics are alike there, as they are on average."""
    posterior = EM(steps=50, seed=0, progress=False).fit(lda(is_collapsed=True), TINY)
    exact = blend_moments()
    assert np.abs((blends(posterior)[0, 0] - exact.mean) / exact.sd).max() < 0.6


def test_restarts_of_averages_begin_with_topics_of_their_own() -> None:
    model = lda()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(model.start(TINY)["topics"], model.start(TINY)["topics"])
    assert torch.equal(model.start(TINY, seed=3)["topics"], model.start(TINY, seed=3)["topics"])


def test_one_topic_has_the_conjugate_posterior() -> None:
    """Means of 3 entries within 4 standard errors of 2,000 independent draws: a false alarm in 5,000 fresh seeds."""
    posterior = Gibbs(chains=4, warmup=2, draws=500, seed=0, progress=False).fit(LDA(1, 3, ALPHA, BETA), TINY)
    exact = dirichlet(BETA + np.array([3.0, 2.0, 2.0]))
    draws = posterior.draws["topics"][..., 0, :].reshape(-1, 3).numpy()
    assert bool((posterior.draws["shares"] == 1.0).all())
    assert (np.abs(draws.mean(0) - exact.mean) < 4.0 * exact.sd / np.sqrt(2000)).all()


# ------------------------------------------------------------------------------------------------------- the pieces
def test_the_tokens_of_a_cell_are_shared_out_as_a_multinomial() -> None:
    """Ten outcomes of three tokens, 20,000 draws, 4.5 standard errors each: a false alarm in 15,000 fresh seeds."""
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    shares = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    topics = torch.stack([weights / shares[0] / 10.0, 1.0 - weights / shares[0] / 10.0], -1)
    x = torch.tensor([[[0, 3]]]).expand(20_000, 1, 2).contiguous()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = _Tokens(x, 3)
        z, log_q = tokens.allocated(shares.expand(20_000, 3).contiguous(), topics)
    counts = tokens.by_document(z)
    assert_close(log_q, (counts * weights.log()).sum())
    for outcome in torch.cartesian_prod(*[torch.arange(4)] * 3):
        if outcome.sum() == 3:
            ways = math.factorial(3) / math.prod(math.factorial(n) for n in outcome.tolist())
            p = ways * float((weights**outcome).prod())
            share = float((counts == outcome).all(-1).double().mean())
            assert abs(share - p) < 4.5 * math.sqrt(p * (1 - p) / 20_000), outcome


@pytest.mark.parametrize("is_large", [False, True], ids=["plain", "sparse matrices"])
def test_log_probabilities_are_those_of_the_tokens(is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a word that two cells share, of an empty document, over chains, and of tables of each chain's own."""
    monkeypatch.setattr(bags, "_SMALL", 0 if is_large else 10**9)
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    topics = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    x = torch.tensor([[[4, 2], [1, 1], [4, 1]], [[0, 0], [0, 0], [0, 0]], [[0, 5], [3, 1], [0, 0]]], dtype=torch.int32)
    weight = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)

    def log_p(shares: Tensor, topics: Tensor, x: Tensor) -> Tensor:
        return (weight * BagOfWords(shares, topics, x[..., 1].sum(-1), x.shape[-2], False).log_prob(x)).sum()

    p = shares @ topics
    expected = 3 * p[0, 4].log() + p[0, 1].log() - 0.5 * (5 * p[2, 0].log() + p[2, 3].log())
    assert_close(log_p(shares, topics, x), expected)
    slopes = grad(log_p, (0, 1))(shares, topics, x)
    dense = torch.zeros(3, 5, dtype=torch.float64)
    dense[0, 4], dense[0, 1], dense[2, 0], dense[2, 3] = 3.0, 1.0, -2.5, -0.5
    for found, exact in zip(slopes, ((dense / p) @ topics.T, shares.T @ (dense / p)), strict=True):
        assert_close(found, exact)
    chains = [part.expand(2, *part.shape).contiguous() for part in (shares, topics, x)]
    for dims, inputs in (((0, 0, None), (*chains[:2], x)), ((None, 0, 0), (shares, *chains[1:]))):
        for found, exact in zip(vmap(grad(log_p, (0, 1)), in_dims=dims)(*inputs), slopes, strict=True):
            assert_close(found, exact.expand_as(found))


def test_many_documents_are_not_differentiated_twice_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bags, "_SMALL", 0)
    shares, topics = torch.full((2, 2), 0.5), torch.full((2, 3), 1.0 / 3.0)

    def slope(shares: Tensor) -> Tensor:
        return grad(lambda s: BagOfWords(s, topics, torch.ones(2), 2).log_prob(TINY).sum())(shares).sum()

    with pytest.raises(NotImplementedError, match="once, but not twice"):
        grad(slope)(shares)


def test_drawn_documents_have_the_words_of_their_blend() -> None:
    """Shares of 3 words among 40,000 tokens, 4 standard errors: a false alarm in 5,000 fresh seeds."""
    shares = torch.tensor([0.3, 0.7]).expand(400, 2)
    topics = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = BagOfWords(shares, topics, torch.full((400,), 100)).sample()
    assert x.shape == (400, 100, 2) and bool((x[..., 1] == 1).all())
    found, p = x[..., 0].flatten().bincount(minlength=3) / 40_000, shares[0] @ topics
    assert bool(((found - p).abs() < 4.0 * (p * (1 - p) / 40_000).sqrt()).all())


def test_documents_may_have_more_cells_than_words() -> None:
    """As those that are drawn from the prior have: their cells hold one token each."""
    x = torch.stack([torch.arange(40).reshape(1, -1) % 3, torch.ones(1, 40, dtype=torch.long)], -1)
    topics = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
    merged = documents((torch.zeros(3), torch.arange(3), torch.tensor([14, 13, 13])))
    assert_close(folded(x, topics, ALPHA), folded(merged, topics, ALPHA))
    posterior = Gibbs(chains=2, warmup=5, draws=5, seed=0, progress=False).fit(lda(), x)
    assert posterior.plan is not None and posterior.plan["shares"].certificate < 1e-8  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sparse_dirichlet_draws_have_the_moments_of_their_logarithms(dtype: torch.dtype) -> None:
    """E log θ_k = ψ(a) − ψ(Σ a), 4.5 standard errors of 20,000 draws, a false alarm in 1e5; no draw has an entry 0."""
    concentration = torch.tensor([0.01, 0.3, 2.0], dtype=dtype)
    family = SparseDirichlet(concentration)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logs = family.log_sample((20_000,)).double()
        drawn = family.sample((1000,))
    assert bool((drawn > 0).all())
    expected = concentration.double().digamma() - concentration.double().sum().digamma()
    larger = slice(1, 3)  # the first logarithm is below that of the least number in most draws
    error = logs.std(0) / math.sqrt(20_000)
    assert bool(((logs.mean(0) - expected).abs() < 4.5 * error)[larger].all())
    reference = torch.distributions.Dirichlet(concentration)
    value = torch.tensor([0.2, 0.3, 0.5], dtype=dtype)
    assert_close(family.expand((4,)).log_prob(value), reference.expand((4,)).log_prob(value))


def test_the_shares_of_a_document_are_a_fixed_point_and_an_empty_one_has_those_of_the_prior() -> None:
    model, x = LDA(2, 3, torch.tensor([0.3, 0.9]), BETA), torch.cat([TINY, torch.zeros_like(TINY[:1])])
    topics = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
    shares = model.transform(x, {"topics": topics})
    assert_close(shares[2], torch.tensor([0.25, 0.75], dtype=torch.float64), rtol=1e-6, atol=0.0)
    p = shares[:2, :, None] * topics[None]
    r = p / p.sum(1, keepdim=True)
    gamma = torch.tensor([0.3, 0.9]).double() + torch.stack([r[0] @ torch.tensor([3.0, 1, 0]).double(),
                                                             r[1] @ torch.tensor([0, 1.0, 2]).double()])  # fmt: skip
    assert_close(shares[:2], gamma / gamma.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_transform_and_topics_take_a_posterior_with_its_labels_matched() -> None:
    posterior = Gibbs(chains=2, warmup=20, draws=10, seed=0, progress=False).fit(lda(), TINY)
    shares = lda().transform(TINY, posterior)
    assert_close(shares.sum(-1), torch.ones(2, dtype=shares.dtype))
    table = lda().topics(posterior, 2, ["ape", "bee", "cat"])
    assert len(table) == 2 and all(len(row) == 2 and set(row) <= {"ape", "bee", "cat"} for row in table)


# ------------------------------------------------------------------------------------------------------- the metrics
def test_perplexity_is_the_vocabulary_if_all_words_are_alike() -> None:
    topics = torch.full((2, 2, 3), 1.0 / 3.0, dtype=torch.float64)
    seen, rest = metrics.halves(TINY)
    assert torch.equal(seen[..., 1] + rest[..., 1], TINY[..., 1])
    assert metrics.completion_perplexity(topics, seen, rest, ALPHA) == pytest.approx(3.0)


def test_perplexity_averages_probabilities_over_draws() -> None:
    draws = torch.tensor([[[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], [[0.2, 0.3, 0.5], [0.8, 0.1, 0.1]]], dtype=torch.float64)
    seen = torch.tensor([[[0, 2]], [[2, 1]]])
    rest = torch.tensor([[[1, 1]], [[2, 2]]])
    p = sum(folded(seen, phi, ALPHA) @ phi for phi in draws) / 2
    expected = math.exp(-(float(p[0, 1].log()) + 2 * float(p[1, 2].log())) / 3)
    assert metrics.completion_perplexity(draws, seen, rest, ALPHA) == pytest.approx(expected)


def test_left_to_right_is_unbiased() -> None:
    """p(document) by enumeration of 2⁴ and 2³ assignments; the mean of 300 estimates within 4.5 standard errors: a
    false alarm in 7e4 fresh seeds of two documents."""
    topics = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.2, 0.7]], dtype=torch.float64)
    found = torch.stack([metrics.left_to_right(topics, TINY, ALPHA, 4, seed) for seed in range(300)]).exp()
    for document, words in enumerate(([0, 0, 0, 1], [1, 2, 2])):
        z = assignments(2, len(words))
        counts = np.stack([(z == k).sum(1) for k in range(2)], 1)
        log_p = log_dirichlet(ALPHA + counts) - log_dirichlet(np.full(2, ALPHA)) + np.log(topics.numpy()[z, words]).sum(1)
        exact = np.exp(log_p).sum()
        estimate = found[:, document]
        assert abs(float(estimate.mean()) - exact) < 4.5 * float(estimate.std()) / math.sqrt(300)


def test_coherence_is_the_mutual_information_of_pairs() -> None:
    x = documents(([0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 2, 0], [1, 2, 1, 1, 3, 1]))
    topics = torch.tensor([[0.5, 0.4, 0.1], [0.4, 0.1, 0.5]])
    expected = math.log(0.5 / (0.75 * 0.5)) / -math.log(0.5)  # words 0 and 1: together in 2 of 4 documents
    assert_close(metrics.coherence(topics, x, 2), torch.tensor([expected, -1.0], dtype=torch.float64))
    assert metrics.diversity(topics, 2) == 0.75


def test_metrics_refuse_what_are_no_topics() -> None:
    with pytest.raises(ValueError, match="distributions over words"):
        metrics.diversity(torch.ones(2, 3))


# -------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        (([0], [0], [-1]), "count must hold whole numbers"),
        (([0], [0], [1.5]), "count must hold whole numbers"),
        (([0], [-2], [1]), "word must hold whole numbers"),
        (([0, 1], [0], [1]), "must agree"),
        (([0], [0], [0]), "no token"),
        (([0], [0], [math.nan]), "count must hold whole numbers"),
    ],
)
def test_counts_that_are_none_are_refused(counts: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        documents(counts)
    with pytest.raises(TypeError, match="scipy.sparse"):
        documents(np.ones((2, 2)))


def test_a_cell_that_is_given_twice_is_added_up_and_empty_documents_stay() -> None:
    matrix = scipy.sparse.coo_matrix(([1, 2, 1], ([0, 0, 2], [1, 1, 0])), shape=(4, 3))
    assert documents(matrix).tolist() == [[[1, 3]], [[0, 0]], [[0, 1]], [[0, 0]]]
    posterior = Gibbs(chains=2, warmup=5, draws=5, seed=0, progress=False).fit(lda(), documents(matrix))
    assert posterior.draws["shares"].shape == (2, 5, 4, 2)


def test_duplicated_documents_are_documents_of_their_own() -> None:
    x = torch.cat([TINY, TINY])
    posterior = Gibbs(chains=2, warmup=5, draws=5, seed=0, progress=False).fit(lda(), x)
    assert not torch.equal(posterior.draws["shares"][..., :2, :], posterior.draws["shares"][..., 2:, :])


@pytest.mark.parametrize(
    ("x", "sentence"),
    [
        (torch.tensor([[[0, -1]]]), "The count in cell 0 of document 0 is negative"),
        (torch.tensor([[[0, 1.5]]]), "must be integers"),
        (torch.tensor([[[3, 1]]]), "knows the words 0 to 2 only"),
        (torch.tensor([[[0, 0]]]), "no token"),
        (torch.tensor([[1, 2, 3]]), "documents as cells"),
    ],
)
def test_documents_that_are_none_are_refused_before_the_first_step(x: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Gibbs(progress=False).fit(lda(), x)


def test_wrong_settings_and_vocabularies_are_refused() -> None:
    draws = {"topics": torch.full((2, 3), 1.0 / 3.0)}
    with pytest.raises(ValueError, match="at least 1 topic"):
        LDA(0)
    with pytest.raises(ValueError, match="share_concentration must be positive"):
        LDA(2, share_concentration=0.0)
    with pytest.raises(ValueError, match="topic_concentration has shape"):
        LDA(2, 3, topic_concentration=torch.ones(4))
    with pytest.raises(ValueError, match="has seen no data"):
        LDA(2).model(None, size=3)
    with pytest.raises(ValueError, match="the number of documents"):
        lda().model(None)
    with pytest.raises(ValueError, match="vocabulary has 2 words"):
        lda().topics(draws, vocabulary=["a", "b"])
    with pytest.raises(ValueError, match="knows the words"):
        lda().transform(torch.tensor([[[7, 1]]]), draws)
    with pytest.raises(ValueError, match="draws are of 2 topics"):
        LDA(3, 3).transform(TINY, draws)


def test_the_prior_draws_documents() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = LDA(2, 5, length=7).model(None, size=3)
    assert x.shape == (3, 7, 2) and int(x[..., 1].sum()) == 21 and int(x[..., 0].max()) < 5


# ------------------------------------------------------------------------------------------------------- real words
@pytest.mark.skipif(not CORPUS.exists(), reason=f"There is no {CORPUS}: set PYRO_GENMODELS_DATA.")
def test_topics_of_reuters_beat_the_frequencies_of_words_and_go_together() -> None:
    found = np.load(CORPUS)
    matrix = scipy.sparse.csr_matrix(
        tuple(found[part].astype(int) for part in ("data", "indices", "indptr")), found["shape"]
    )
    x = documents(matrix)
    training, (seen, rest) = x[:350], metrics.halves(x[350:])
    model = LDA(20, matrix.shape[1], 1.1, 1.01)
    posterior = EM(
        maximise=("shares", "topics"),
        start=model.start(training, seed=0),
        steps=60,
        seed=0,
        progress=False,
        standard_errors=False,
    ).fit(model, training)
    topics = posterior.draws["topics"][0, 0]
    cells = layout(training)
    frequency = 0.01 + torch.zeros(matrix.shape[1]).double().index_add_(0, cells.word, cells.count.double())
    plain = metrics.completion_perplexity((frequency / frequency.sum()).expand(1, -1), seen, rest, 0.1)
    assert metrics.completion_perplexity(topics, seen, rest, 0.1) < 0.7 * plain
    assert float(metrics.coherence(topics, x).mean()) > 0.1 and metrics.diversity(topics) > 0.5
