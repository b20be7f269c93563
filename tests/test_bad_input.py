"""What cannot work says so before the first step: what was expected, what came, what to do. What can be saved is kept."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from inference import (
    EM,
    HMC,
    SVI,
    AdaptiveWalk,
    Backend,
    Conjugate,
    Enumerate,
    Gibbs,
    Hamiltonian,
    MetropolisHastings,
    Posterior,
    Prior,
    Unsupported,
)
from pyro_genmodels import GMM, datasets

CHAINS: dict[str, Any] = {"chains": 2, "warmup": 4, "draws": 5}
BACKENDS: dict[str, Callable[..., Backend[Any, Any]]] = {
    "Gibbs": lambda **options: Gibbs(**{**CHAINS, "progress": False, "seed": 0, **options}),
    "MetropolisHastings": lambda **options: MetropolisHastings(**{**CHAINS, "progress": False, "seed": 0, **options}),
    "HMC": lambda **options: HMC(**{**CHAINS, "progress": False, "seed": 0, **options}),
    "SVI": lambda **options: SVI(**{"steps": 5, "draws": 5, "progress": False, "seed": 0, **options}),
    "EM": lambda **options: EM(**{"steps": 3, "progress": False, "seed": 0, **options}),
}
SAMPLERS = ("Gibbs", "MetropolisHastings", "HMC")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_sampler = pytest.mark.parametrize("backend", SAMPLERS)

ROWS = datasets.load("faithful").arrays["x"][:12]
Y = torch.tensor([1.0, 2.5, -0.5, 2.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here concerns graphs, which take seconds to make."""
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "vmapped")


def normal(y: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 3.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(level, 1.0), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    spread = pyro.sample("spread", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, spread), obs=y)


def pieces(*sentences: str) -> str:
    """A pattern of sentences that stand in a message in this order, other words between them."""
    return "(?s)" + ".*".join(re.escape(sentence) for sentence in sentences)


def refuse(backend: str, error: type[Exception], sentences: tuple[str, ...], model: Any, *args: Any, **options: Any) -> None:
    """The fit raises this error with these pieces in its message, and has not taken a step before."""
    steps: list[int] = []
    watched = BACKENDS[backend](callbacks=(lambda step, info: steps.append(step),), **options)
    with pytest.raises(error, match=pieces(*sentences)) as caught:
        watched.fit(model, *args)
    assert isinstance(caught.value, error) and not steps


def assert_finite(posterior: Posterior) -> None:
    assert posterior.draws
    for site, draws in posterior.draws.items():
        assert bool(draws.isfinite().all()), site
    for name, values in posterior.stats.items():
        assert not bool(values.double().isnan().any()), name


# ------------------------------------------------------------------------------------------------- NaN and infinities
bad_number = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus inf"])


@every_backend
@pytest.mark.parametrize("bad", [math.inf, -math.inf], ids=["inf", "minus inf"])
def test_a_mixture_refuses_rows_that_are_infinite(backend: str, bad: float) -> None:
    x = ROWS.clone()
    x[3, 1] = x[5, 0] = bad
    refuse(backend, ValueError, ("x holds 2 values that are infinite", "row 3, column 1", "NaN"), GMM(2), x)


@every_backend
def test_a_mixture_refuses_a_column_of_which_nothing_is_known(backend: str) -> None:
    x = ROWS.clone()
    x[:, 1] = math.nan
    refuse(backend, ValueError, ("Column 1 of x has no value that is known", "Remove the column"), GMM(2), x)


BAD_WEIGHTS = {
    "negative": (torch.ones(len(ROWS)).double().index_fill(0, torch.tensor([4]), -1.0), ("not negative", "row 4", "-1.0")),
    "zero": (torch.zeros(len(ROWS)).double(), ("row_weights are all zero",)),
    "short": (torch.ones(3).double(), ("row_weights has shape (3,)", f"({len(ROWS)},)")),
    "whole": (torch.ones(len(ROWS), dtype=torch.long), ("row_weights must be floating", ".double()")),
    "NaN": (torch.full((len(ROWS),), math.nan).double(), ("finite and not negative", "row 0")),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_a_mixture_refuses_weights_of_rows_that_are_none(case: str) -> None:
    weights, sentences = BAD_WEIGHTS[case]
    with pytest.raises(ValueError, match=pieces(*sentences)):
        EM(progress=False).fit(GMM(2), ROWS, row_weights=weights)


@every_backend
@bad_number
def test_a_function_refuses_data_that_are_not_finite(backend: str, bad: float) -> None:
    y = Y.clone()
    y[2] = bad
    refuse(backend, ValueError, ("y", "1", "(2,)", "mask"), normal, y)


@every_backend
def test_a_function_refuses_a_covariate_that_is_not_finite(backend: str) -> None:
    x = Y.clone()
    x[0] = math.nan
    sentences = ("x holds 1 values that are NaN or infinite (the first at (0,))", "regression", "mask")
    refuse(backend, ValueError, sentences, regression, x, Y)


@every_backend
def test_a_program_that_masks_missing_values_is_accepted(backend: str) -> None:
    def masked(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 3.0))
        is_seen = ~y.isnan()
        with pyro.plate("rows", len(y)), poutine.mask(mask=is_seen):
            pyro.sample("y", dist.Normal(level, 1.0), obs=torch.where(is_seen, y, 0.0))

    holed = torch.cat([Y, Y.new_full((3,), math.nan)])
    posterior = BACKENDS[backend]().fit(masked, holed)
    assert_finite(posterior)
    if backend == "EM":
        torch.testing.assert_close(posterior.point()["level"], Y.sum() / (len(Y) + 1 / 9), rtol=1e-6, atol=0.0)


# ------------------------------------------------------------------------------------------------------ shape of data
@every_backend
@pytest.mark.parametrize("given", ["features", "location", "scale"])
def test_a_mixture_built_for_another_width_refuses_the_data(backend: str, given: str) -> None:
    options: dict[str, Any] = {
        "features": {"features": 3},
        "location": {"location": torch.zeros(3)},
        "scale": {"scale": torch.ones(3)},
    }
    sentence = "x has 2 features, but this GMM was built for 3."
    refuse(backend, ValueError, (sentence,), GMM(2, **options[given]), ROWS)


@pytest.mark.parametrize("method", ["predict_proba", "predict", "score_samples"])
@pytest.mark.parametrize("covariance", ["full", "tied", "diagonal", "spherical"])
def test_another_width_is_refused_by_what_reads_the_draws(method: str, covariance: str) -> None:
    model = GMM(2, covariance)
    model.prepare(ROWS)
    trace = poutine.trace(model.guide).get_trace()
    draws = {name: trace.nodes[name]["value"].detach()[None] for name in ("weights", "means", "covariances")}
    assert getattr(model, method)(ROWS, draws).shape[0] == len(ROWS)
    for x in (ROWS[:, :1], torch.cat([ROWS, ROWS], 1), ROWS[:, 0]):
        with pytest.raises(ValueError, match=pieces("x has shape", str(tuple(x.shape)), "2 features")):
            getattr(model, method)(x, draws)


@every_backend
def test_a_mixture_needs_a_table(backend: str) -> None:
    refuse(backend, ValueError, ("x has shape (12,)", "(rows, features)"), GMM(2), ROWS[:, 0])
    refuse(backend, ValueError, ("x", "no columns"), GMM(2), ROWS[:, :0])


@every_backend
@pytest.mark.parametrize("model", [GMM(2), normal], ids=["mixture", "function"])
def test_empty_data_are_refused(backend: str, model: Any) -> None:
    x = ROWS[:0] if isinstance(model, GMM) else Y[:0]
    refuse(backend, ValueError, ("The data are empty", "no rows"), model, x)


@every_backend
def test_one_row_gives_a_finite_answer(backend: str) -> None:
    assert_finite(BACKENDS[backend]().fit(GMM(1), ROWS[:1]))


@every_backend
def test_one_row_gives_a_finite_answer_to_a_function(backend: str) -> None:
    assert_finite(BACKENDS[backend]().fit(normal, Y[:1]))


@every_backend
def test_more_components_than_rows_are_refused(backend: str) -> None:
    refuse(backend, ValueError, ("GMM has 5 components, but x has only 4 rows.",), GMM(5), ROWS[:4])


@every_backend
def test_a_constant_column_gives_a_finite_answer(backend: str) -> None:
    x = torch.stack([ROWS[:, 0], torch.full((12,), 7.0)], 1)
    assert_finite(BACKENDS[backend]().fit(GMM(2), x))


@every_backend
def test_rows_that_are_all_the_same_give_a_finite_answer(backend: str) -> None:
    assert_finite(BACKENDS[backend]().fit(GMM(2), ROWS[:1].expand(6, 2)))


# ------------------------------------------------------------------------------------------------------- type of data
@every_backend
def test_integer_data_are_refused_by_a_floating_program(backend: str) -> None:
    x = ROWS.round().long()
    refuse(backend, ValueError, ("x holds int64", "floating", "x.double()"), GMM(2), x)
    refuse(backend, ValueError, ("'y'", "Normal", "int64", ".double()"), normal, Y.long())


@every_backend
@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.float64, np.float64, np.int64])
def test_counts_may_have_any_type_of_number(backend: str, kind: Any) -> None:
    def poisson(counts: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(counts)):
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    values = [0, 3, 1, 2]
    counts = torch.tensor(values, dtype=kind) if isinstance(kind, torch.dtype) else np.array(values, dtype=kind)
    assert_finite(BACKENDS[backend]().fit(poisson, counts))


@every_backend
def test_boolean_data_are_refused(backend: str) -> None:
    def coin(flips: Tensor) -> None:
        fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        with pyro.plate("rows", len(flips)):
            pyro.sample("flips", dist.Bernoulli(fairness), obs=flips)

    refuse(backend, ValueError, ("'flips'", "Bernoulli", "bool", ".double()"), coin, Y > 0)
    assert_finite(BACKENDS[backend]().fit(coin, (Y > 0).double()))


OUTSIDE: dict[str, tuple[Callable[[Tensor], Any], list[float]]] = {
    "Exponential": (lambda rate: dist.Exponential(rate), [1.0, -1.0]),
    "LogNormal": (lambda rate: dist.LogNormal(rate, 1.0), [1.0, 0.0]),
    "Bernoulli": (lambda rate: dist.Bernoulli(logits=rate), [1.0, 2.0]),
    "Poisson": (lambda rate: dist.Poisson(rate), [1.0, -1.0]),
    "Beta": (lambda rate: dist.Beta(rate, 1.0), [0.5, 1.5]),
}


@every_backend
@pytest.mark.parametrize("family", OUTSIDE)
def test_data_outside_the_support_are_refused(backend: str, family: str) -> None:
    make, values = OUTSIDE[family]

    def program(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", make(rate), obs=y)

    refuse(backend, ValueError, ("'y'", family, "outside", str(values[1])), program, torch.tensor(values))


@every_sampler
def test_data_inside_a_support_that_depends_on_a_latent_are_accepted(backend: str) -> None:
    def longest(y: Tensor) -> None:
        end = pyro.sample("end", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Uniform(0.0, end), obs=y)

    posterior = BACKENDS[backend]().fit(longest, torch.tensor([0.5, 6.0]))  # inside in one of 57 draws of the prior
    assert bool((posterior.draws["end"] > 6.0).all())


@every_sampler
def test_data_outside_of_what_a_latent_does_not_move_are_refused(backend: str) -> None:
    def longest(y: Tensor) -> None:
        end = pyro.sample("end", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Uniform(0.0, end).expand([2]).to_event(1), obs=y)

    y = torch.tensor([[0.5, 1.0], [4.0, -0.25]])
    refuse(backend, ValueError, ("'y'", "Uniform", "1 of its data lie outside", "at (1,)", "-0.25"), longest, y)


# ------------------------------------------------------------------------------------------------- structure of programs
@every_backend
def test_a_program_that_hides_nothing_is_refused(backend: str) -> None:
    def nothing(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    refuse(backend, Unsupported, ("nothing has no latent site", "nothing to infer"), nothing, Y)


@every_backend
def test_a_site_that_comes_and_goes_is_refused(backend: str) -> None:
    def sometimes(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        if level > 0:
            level = level + pyro.sample("extra", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(level, 1.0).expand([len(y)]).to_event(1), obs=y)

    sentences = ("Site 'extra' appears only in some runs of sometimes", "each site on every run", "torch.where")
    refuse(backend, Unsupported, sentences, sometimes, Y)


def item(level: Tensor) -> Tensor:
    return torch.tensor(level.item())


def floated(level: Tensor) -> Tensor:
    return torch.tensor(float(level))


def to_numpy(level: Tensor) -> Tensor:
    return torch.as_tensor(np.exp(level.detach().numpy()))


def branch(level: Tensor) -> Tensor:
    return level if level > 0 else -level


def loop(level: Tensor) -> Tensor:
    return level + sum(range(int(level.abs())))


LEAVERS: dict[Callable[[Tensor], Tensor], str] = {
    item: "Python number",
    floated: "Python number",
    to_numpy: "numpy",
    branch: "branches in Python",
    loop: "Python number",
}


@every_sampler
@pytest.mark.parametrize("leave", LEAVERS, ids=lambda function: function.__name__)
def test_a_program_that_leaves_torch_is_refused(backend: str, leave: Callable[[Tensor], Tensor]) -> None:
    def leaver(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(leave(level), 1.0), obs=y)

    refuse(backend, Unsupported, ("leaver", LEAVERS[leave], "Use torch operations"), leaver, Y)


@pytest.mark.parametrize("backend", ["SVI", "EM"])
@pytest.mark.parametrize("leave", LEAVERS, ids=lambda function: function.__name__)
def test_a_program_that_leaves_torch_is_refused_or_gives_the_right_answer(
    backend: str, leave: Callable[[Tensor], Tensor]
) -> None:
    """Without its gradient, the latent would stay near its prior: |level| is √(19/20) wide there and 0.45 here."""

    def leaver(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(leave(level), 1.0), obs=y + 20.0)

    options = {"steps": 400, "learning_rate": 0.1} if backend == "SVI" else {"steps": 50}
    try:
        posterior = BACKENDS[backend](**options).fit(leaver, Y)
    except Unsupported as refusal:
        assert "leaver" in str(refusal) and "Use torch operations" in str(refusal)
    else:
        assert leave is branch
        peak = float((Y + 20.0).sum()) / (len(Y) + 1)
        assert abs(abs(float(posterior.point()["level"])) - peak) < 0.5


@every_backend
def test_a_subsampled_plate_is_refused(backend: str) -> None:
    def subsampled(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y), subsample_size=2) as rows:
            pyro.sample("y", dist.Normal(level, 1.0), obs=y[rows])

    refuse(backend, Unsupported, ("Plate 'rows' takes 2 of 4 rows", "all rows", "batch_size"), subsampled, Y)


@every_backend
def test_hidden_randomness_is_refused(backend: str) -> None:
    def noisy(y: Tensor) -> None:
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(level + 0.1 * torch.rand(()), 1.0), obs=y)

    refuse(backend, Unsupported, ("noisy has hidden randomness", "pyro.sample only", ".eval()"), noisy, Y)


@every_backend
def test_a_count_without_an_end_is_refused_where_it_would_have_to_be_summed_out(backend: str) -> None:
    def hidden(seen: Tensor) -> None:
        count = pyro.sample("count", dist.Poisson(4.0))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        pyro.sample("seen", dist.Binomial(count, share), obs=seen)

    seen = torch.tensor(2.0)
    if backend == "Gibbs":
        draws = BACKENDS[backend]().fit(hidden, seen).draws["count"]
        assert bool((draws >= 2.0).all()) and bool((draws == draws.round()).all())
    elif backend == "EM":
        try:
            assert_finite(BACKENDS[backend]().fit(hidden, seen))
        except Unsupported as refusal:
            assert "'count'" in str(refusal) and "Gibbs()" in str(refusal)
    else:
        refuse(backend, Unsupported, ("'count'", "Poisson", "Gibbs()"), hidden, seen)


@every_backend
def test_a_site_whose_support_has_no_coordinates_is_refused(backend: str) -> None:
    def factors(y: Tensor) -> None:
        scatter = dist.Wishart(torch.tensor(4.0), covariance_matrix=torch.eye(2))
        factor = pyro.sample("factor", dist.TransformedDistribution(scatter, [dist.transforms.CholeskyTransform()]))
        pyro.sample("y", dist.Normal(factor.sum((-2, -1)), 1.0).expand([len(y)]).to_event(1), obs=y)

    refuse(backend, Unsupported, ("'factor'", "LowerCholesky"), factors, Y)


@every_backend
def test_data_that_no_start_can_explain_are_refused(backend: str) -> None:
    def impossible(y: Tensor) -> None:
        level = pyro.sample("level", dist.Uniform(0.0, 1.0))
        pyro.factor("never", torch.where(level < 2.0, -math.inf, 0.0))
        pyro.sample("y", dist.Normal(level, 1.0).expand([len(y)]).to_event(1), obs=y)

    refuse(backend, ValueError, ("impossible has no finite log-density", "start="), impossible, Y)


@every_backend
@pytest.mark.parametrize("model", [None, 3, "normal"], ids=repr)
def test_what_is_no_program_is_refused(backend: str, model: Any) -> None:
    refuse(backend, TypeError, ("function", "method model", repr(model)), model, Y)


# ---------------------------------------------------------------------------------------------------------- options
@every_backend
def test_keeping_a_site_that_is_not_there_is_refused(backend: str) -> None:
    refuse(backend, ValueError, ("keep= names 'levle'", "the sites are", "level"), normal, Y, keep=["levle"])


with_start = pytest.mark.parametrize("backend", [*SAMPLERS, "EM", "SVI"])


@with_start
def test_starting_a_site_that_is_not_there_is_refused(backend: str) -> None:
    refuse(backend, ValueError, ("start= names 'levle'", "normal", "level"), normal, Y, start={"levle": 0.0})
    sentences = ("start= names 'y'", "latent sites", "level")
    refuse(backend, ValueError, sentences, normal, Y, start={"y": Y})


@with_start
def test_a_start_of_the_wrong_shape_is_refused(backend: str) -> None:
    sentences = ("start= gives 'level' the shape (3, 3)", "must be ()", "chain axis")
    refuse(backend, ValueError, sentences, normal, Y, start={"level": torch.zeros(3, 3)})


@with_start
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf])
def test_a_start_outside_the_support_or_at_its_edge_is_refused(backend: str, value: float) -> None:
    sentences = ("start= gives 'spread' a value outside its support",)
    refuse(backend, ValueError, sentences, regression, Y, Y, start={"spread": value})


@with_start
@pytest.mark.parametrize("start", [[1.0], 3.0, "level"], ids=repr)
def test_what_is_no_start_is_refused(backend: str, start: Any) -> None:
    refuse(backend, TypeError, ("start=", "Posterior", type(start).__name__), normal, Y, start=start)


def test_a_block_for_a_site_that_is_not_there_is_refused() -> None:
    refuse("Gibbs", ValueError, ("blocks= names 'levle'", "level"), normal, Y, blocks={"levle": Hamiltonian()})


def test_two_blocks_for_one_site_are_refused() -> None:
    blocks = {"slope": Hamiltonian(), ("slope", "spread"): Hamiltonian()}
    refuse("Gibbs", ValueError, ("blocks= gives 'slope' two blocks",), regression, Y, Y, blocks=blocks)


def test_a_block_that_does_not_fit_its_site_is_refused() -> None:
    def coin(flips: Tensor) -> None:
        fairness = pyro.sample("fairness", dist.Gamma(2.0, 2.0))
        side = pyro.sample("side", dist.Bernoulli(0.5))
        with pyro.plate("rows", len(flips)):
            pyro.sample("flips", dist.Normal(fairness.log() + side, 1.0), obs=flips)

    for blocks, sentences in (
        ({"fairness": Enumerate()}, ("Enumerate()", "finitely many", "'fairness'")),
        ({"side": Conjugate()}, ("Conjugate()", "continuous", "'side'")),
        ({"side": Hamiltonian()}, ("Hamiltonian()", "continuous", "'side'")),
        ({("fairness", "side"): Conjugate()}, ("Conjugate()", "one site", "fairness, side")),
        ({"fairness": Conjugate()}, ("'fairness'", "no known family")),
    ):
        refuse("Gibbs", Unsupported, sentences, coin, Y, blocks=blocks)
    assert_finite(BACKENDS["Gibbs"](blocks={"side": AdaptiveWalk()}).fit(coin, Y))


COUNTED = [(b, n) for b in SAMPLERS for n in ("chains", "draws", "warmup", "thin")]
COUNTED += [("SVI", "steps"), ("SVI", "draws"), ("SVI", "batch_size"), ("EM", "steps"), ("EM", "restarts")]


@pytest.mark.parametrize(("backend", "option"), COUNTED)
@pytest.mark.parametrize("value", [0, -1, 2.5])
def test_a_number_of_steps_must_be_a_count(backend: str, option: str, value: Any) -> None:
    if option == "warmup" and value == 0:
        assert_finite(BACKENDS[backend](warmup=0).fit(normal, Y))
        return
    steps: list[int] = []
    with pytest.raises(ValueError, match=pieces(backend, option, repr(value), "integer")):
        BACKENDS[backend](callbacks=(lambda step, info: steps.append(step),), **{option: value}).fit(normal, Y)
    assert not steps


@pytest.mark.parametrize(
    ("backend", "option", "value"),
    [
        ("SVI", "learning_rate", 0.0),
        ("SVI", "learning_rate", -1.0),
        ("EM", "tolerance", -1.0),
        ("EM", "objective", "posterior"),
        ("EM", "maximise", ["levle"]),
        ("HMC", "target", 1.5),
        ("HMC", "most_steps", 0),
    ],
)
def test_an_option_outside_its_range_is_refused(backend: str, option: str, value: Any) -> None:
    refuse(backend, ValueError, (option, "levle" if option == "maximise" else str(value)), normal, Y, **{option: value})


@every_sampler
def test_a_rung_that_is_not_there_is_refused(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRO_GENMODELS_RUNG", "fast")
    sentences = ("PYRO_GENMODELS_RUNG is 'fast'", "looped, vmapped, staged, compiled")
    refuse(backend, ValueError, sentences, normal, Y)


# ----------------------------------------------------------------------------------------------------------- Ctrl-C
def interrupt_at(last: int) -> Callable[[int, Any], None]:
    def callback(step: int, info: Any) -> None:
        if step == last:
            raise KeyboardInterrupt

    return callback


@every_sampler
@pytest.mark.parametrize("kept", [1, 7])
def test_draws_so_far_are_returned_when_stopped(backend: str, kept: int) -> None:
    stopped = BACKENDS[backend](draws=20, callbacks=(interrupt_at(CHAINS["warmup"] + kept - 1),)).fit(normal, Y)
    whole = BACKENDS[backend](draws=20).fit(normal, Y)
    assert torch.equal(stopped.draws["level"], whole.draws["level"][:, :kept])
    assert all(values.shape == (2, kept) for values in stopped.stats.values())
    assert any(f"Stopped by Ctrl-C after {kept} of 20 draws." in finding for finding in stopped.diagnose())
    assert not any("Ctrl-C" in finding for finding in whole.diagnose())


@every_sampler
def test_what_was_stopped_can_be_exported_and_saved(backend: str, tmp_path: Any) -> None:
    stopped = BACKENDS[backend](draws=20, callbacks=(interrupt_at(CHAINS["warmup"] + 6),)).fit(normal, Y)
    assert dict(stopped.to_arviz().posterior.sizes) == {"chain": 2, "draw": 7}
    stopped.save(tmp_path / "stopped")
    loaded = Posterior.load(tmp_path / "stopped")
    assert torch.equal(loaded.draws["level"], stopped.draws["level"]) and loaded.diagnose() == stopped.diagnose()


@every_sampler
def test_a_stop_in_warm_up_says_that_there_are_no_draws(backend: str) -> None:
    with pytest.raises(KeyboardInterrupt, match=f"{backend} was stopped in warm-up: there are no draws yet."):
        BACKENDS[backend](callbacks=(interrupt_at(2),)).fit(normal, Y)


@pytest.mark.parametrize("backend", ["SVI", "EM"])
def test_an_optimiser_that_is_stopped_returns_where_it_is(backend: str) -> None:
    posterior = BACKENDS[backend](steps=50, callbacks=(interrupt_at(1),)).fit(regression, Y, Y)
    assert all(bool(draws.isfinite().all()) for draws in posterior.draws.values())
    assert bool(posterior.stats["lp"].isfinite().all())  # where EM was stopped is no maximum: it has no standard errors
    assert any("Stopped by Ctrl-C after 2 of 50 steps." in finding for finding in posterior.diagnose())


@every_backend
def test_a_callback_that_returns_true_ends_the_phase(backend: str) -> None:
    posterior = BACKENDS[backend](callbacks=(lambda step, info: step in (2, 6),)).fit(normal, Y)
    assert_finite(posterior)
    if backend in SAMPLERS:
        assert posterior.draws["level"].shape[1] == 3


# ------------------------------------------------------------------------------------ data and settings of another kind
def flips(x: Any) -> None:
    fairness = pyro.sample("fairness", dist.Beta(1.0, 1.0))
    with pyro.plate("flips", len(x)):
        pyro.sample("x", dist.Bernoulli(fairness), obs=x)


def four(x: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4):
        pyro.sample("x", dist.Normal(level, 1.0), obs=x)


@every_backend
@pytest.mark.parametrize(
    ("program", "data", "error", "words"),
    [
        (flips, [1.0, 0.0, 1.0], TypeError, "are a list, but must be a tensor"),
        (flips, torch.tensor([1, 0, 1]), ValueError, "its data are int64. Convert them first"),
        (flips, np.array([1, 0, 1]), ValueError, "its data are int64. Convert them first"),
        (four, torch.zeros(5), ValueError, re.escape("of shape (4,), which does not fit its data of shape (5,)")),
    ],
)
def test_data_that_a_statement_cannot_take_are_refused(
    backend: str, program: Callable[..., None], data: Any, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        BACKENDS[backend]().fit(program, data)


@every_backend
def test_a_start_that_is_no_number_is_refused(backend: str) -> None:
    with pytest.raises(TypeError, match="start= gives 'level' the value 'high', but it must be a number"):
        BACKENDS[backend](start={"level": "high"}).fit(normal, Y)


def one_hot(y: Tensor) -> None:
    centre = pyro.sample("centre", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(y.new_ones(2) / 2))
        pyro.sample("y", dist.Normal((torch.nn.functional.one_hot(z, 2) * centre).sum(-1), 1.0), obs=y)


def indexed(y: Tensor) -> None:
    centre = pyro.sample("centre", dist.Normal(y.new_zeros(2), 3.0).to_event(1))
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(y.new_ones(2) / 2))
        pyro.sample("y", dist.Normal(centre[z], 1.0), obs=y)


@every_backend
def test_one_hot_labels_are_labels(backend: str) -> None:
    one, other = (BACKENDS[backend]().fit(program, Y) for program in (one_hot, indexed))
    assert one.draws.keys() == other.draws.keys()
    for site, value in one.draws.items():
        torch.testing.assert_close(value, other.draws[site])


def skewed(y: Tensor) -> None:
    spread = pyro.sample("spread", dist.Gamma(2.0, 2.0))
    with pyro.plate("rows", len(y)):
        rate = pyro.sample("rate", dist.LogNormal(y.new_zeros(()), spread))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def test_an_e_step_that_proposes_from_one_distribution_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"e_step= moves draws on .* Prior\(\) proposes from one distribution"):
        EM(e_step=MetropolisHastings(proposal=Prior()), progress=False).fit(skewed, torch.tensor([1.0, 4.0, 0.0]))
