"""The models that the command line knows by name, what they are built from, and how they read a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pyro_genmodels import bags
from pyro_genmodels.classical import (
    GMM,
    HMM,
    LDA,
    PPCA,
    FactorAnalysis,
    LinearRegression,
    LogisticRegression,
    MarginClassifier,
    Mixture,
    NaiveBayes,
    SoftmaxRegression,
)

__all__ = ["MODELS", "Entry"]


def _table(model: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """The table, and the labels if there are any."""
    return (x,) if y is None else (x, y)


def _log_density(model: Any, data: tuple[Tensor, ...], draws: Mapping[str, Tensor]) -> Tensor:
    found: Tensor = model.score_samples(*data, draws)
    return found


def _log_chance(model: Any, data: tuple[Tensor, ...], draws: Mapping[str, Tensor]) -> Tensor:
    """log p(y_n | x_n) of the labels that are known."""
    x, y = data
    chances: Tensor = model.predict_proba(x, draws)[y >= 0]
    return chances.gather(1, y[y >= 0, None])[:, 0].log()


@dataclass(frozen=True)
class Entry:
    """A model that the command line knows by name.

    Args:
        description: What it is.
        build: Makes one, from the options that the user gave.
        options: Defaults of the options that ``build`` takes; "classes" are counted in the labels.
        methods: Names of the back-ends that run it.
        shown: Sites in the printed table, on which back-ends are held against each other; those that there are
            ("chances" stands for "chances_3", too).
        judged: Sites whose convergence is judged, and which are in the table that is saved; those that there are.
        dims: Site to names of its dimensions; "features" takes the names of the columns, "terms" these and the intercept.
        labels: What a row is labelled with: "" nothing, "classes", or "numbers".
        arguments: (model, table (rows, features), labels (rows,) or None) -> the arguments of the program.
        score: (model, arguments, draws) -> log-density of each row, (rows,); None if rows are not held out.
        pictured: Whether ``plots.density_contours`` shows it.
    """

    description: str
    build: Callable[..., Any]
    options: Mapping[str, Any]
    methods: tuple[str, ...]
    shown: tuple[str, ...]
    judged: tuple[str, ...]
    dims: Mapping[str, tuple[str, ...]]
    labels: str = ""
    arguments: Callable[[Any, Tensor, Tensor | None], tuple[Tensor, ...]] = _table
    score: Callable[[Any, tuple[Tensor, ...], Mapping[str, Tensor]], Tensor] | None = _log_density
    pictured: bool = False


def _mixture(components: int, columns: str) -> Mixture:
    return Mixture(components, _kinds(columns))


def _naive_bayes(classes: int, columns: str) -> NaiveBayes:
    return NaiveBayes(classes, _kinds(columns))


def _kinds(columns: str) -> str | list[str]:
    """One kind for all columns, or one for each, separated by commas."""
    return columns.split(",") if "," in columns else columns


def _two(build: Callable[..., Any]) -> Callable[..., Any]:
    """Of two classes, whatever is counted."""

    def built(classes: int, **options: Any) -> Any:
        if classes > 2:
            raise ValueError(f"{build.__name__} tells 2 classes apart, labelled 0 and 1, but there are {classes}.")
        return build(**options)

    return built


def _counts(model: LDA, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """Rows of counts as documents, columns as words."""
    bad = (~((x >= 0) & (x == x.round()))).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"lda counts words, so that every entry must be a whole number from 0 on, but row {row} of the table has "
            f"{float(x[row, column]):g} in column {column}."
        )
    document, word = x.nonzero(as_tuple=True)
    return (bags.documents((document, word, x[document, word]), size=len(x)),)


def _series(model: HMM, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
    """Rows as steps; symbols and counts are a series of one column."""
    if model.emission in ("normal", "diagonal"):
        return (x,)
    if x.shape[1] != 1:
        raise ValueError(f"hmm with {model.emission} emissions reads one column, but the table has {x.shape[1]}.")
    is_whole = bool((x == x.round()).all())  # else the model says what is wrong
    return (x[:, 0].long() if is_whole else x[:, 0],)


EVERY = ("svi", "em", "gibbs", "mh", "hmc", "nuts")

MODELS: dict[str, Entry] = {
    "gmm": Entry(
        description="Gaussian mixture",
        build=GMM,
        options={"components": 2, "covariance": "full"},
        methods=EVERY,
        shown=("weights", "means"),
        judged=("weights", "means", "covariances"),
        dims={"weights": ("components",), "means": ("components", "features")},
        pictured=True,
    ),
    "mixture": Entry(
        description="Mixture of columns of any kind",
        build=_mixture,
        options={"components": 2, "columns": "normal"},
        methods=EVERY,
        shown=("weights", "probabilities", "rates", "means", "locations"),
        judged=("weights", "probabilities", "shares", "rates", "means", "variances", "locations", "squares"),
        dims={"weights": ("components",)},
    ),
    "naive_bayes": Entry(
        description="Naive Bayes classifier",
        build=_naive_bayes,
        options={"classes": None, "columns": "gaussian"},
        methods=EVERY,
        shown=("share", "means", "rates", "intensities"),
        judged=("share", "means", "variances", "rates", "chances", "intensities", "words"),
        dims={"share": ("classes",)},
        labels="classes",
        score=_log_chance,
    ),
    "linear": Entry(
        description="Linear regression",
        build=LinearRegression,
        options={},
        methods=EVERY,
        shown=("coefficients",),
        judged=("coefficients", "variance"),
        dims={"coefficients": ("terms",)},
        labels="numbers",
    ),
    "logistic": Entry(
        description="Logistic regression, 2 classes",
        build=_two(LogisticRegression),
        options={"classes": None},
        methods=EVERY,
        shown=("coefficients",),
        judged=("coefficients",),
        dims={"coefficients": ("terms",)},
        labels="classes",
        score=_log_chance,
    ),
    "softmax": Entry(
        description="Softmax regression",
        build=SoftmaxRegression,
        options={"classes": None},
        methods=EVERY,
        shown=("coefficients",),
        judged=("coefficients",),
        dims={"coefficients": ("classes", "terms")},
        labels="classes",
        score=_log_chance,
    ),
    "margin": Entry(
        description="Support vector machine",
        build=_two(MarginClassifier),
        options={"classes": None, "cost": 1.0, "kernel": "linear"},
        methods=("em", "gibbs", "hmc", "nuts"),
        shown=("coefficients",),
        judged=("coefficients",),
        dims={},
        labels="classes",
        score=None,
    ),
    "ppca": Entry(
        description="Probabilistic PCA",
        build=PPCA,
        options={"factors": 1},
        methods=("svi", "em", "gibbs", "hmc", "nuts"),
        shown=("location", "covariance"),
        judged=("location", "noise", "covariance"),
        dims={"location": ("features",)},
    ),
    "factors": Entry(
        description="Factor analysis",
        build=FactorAnalysis,
        options={"factors": 1},
        methods=("svi", "em", "gibbs", "hmc", "nuts"),
        shown=("location", "covariance"),
        judged=("location", "noise", "covariance"),
        dims={"location": ("features",)},
    ),
    "hmm": Entry(
        description="Hidden Markov model, rows in order",
        build=HMM,
        options={"states": 2, "emission": "normal"},
        methods=EVERY,
        shown=("transitions", "means", "rates", "probabilities"),
        judged=("initial", "transitions", "means", "covariances", "rates", "probabilities"),
        dims={"means": ("states", "features")},
        arguments=_series,
        score=None,
    ),
    "lda": Entry(
        description="Topics of documents (rows) of words",
        build=LDA,
        options={"components": 2},
        methods=("svi", "gibbs", "hmc"),
        shown=("topics",),
        judged=("topics",),
        dims={"topics": ("components", "words")},
        arguments=_counts,
        score=None,
    ),
}
