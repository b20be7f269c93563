"""Figures of merit are those of scikit-learn, or of a formula."""

from __future__ import annotations

import doctest
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from pyro_genmodels import plots
from pyro_genmodels.metrics import anomaly, calibration, clustering
from pyro_genmodels.metrics import bias_variance as bias_variances
from pyro_genmodels.metrics.bias_variance import BiasVariance, bias_variance

metrics = pytest.importorskip("sklearn.metrics")
curves = pytest.importorskip("sklearn.calibration")

SEEDS = pytest.mark.parametrize("seed", range(4))


@pytest.mark.parametrize("module", [anomaly, bias_variances, calibration, clustering], ids=lambda module: module.__name__)
def test_the_examples_in_the_docstrings_are_true(module: ModuleType) -> None:
    assert doctest.testmod(module).failed == 0


@SEEDS
def test_agreement_of_labellings_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, found = rng.integers(0, 3 + seed, 60), rng.integers(0, 4, 60)
    found = np.where(rng.random(60) < 0.5, truth, found) * 7
    ours, theirs = clustering.normalised_mutual_information(truth, found), metrics.normalized_mutual_info_score(truth, found)
    assert ours == pytest.approx(theirs, abs=1e-12)
    theirs = metrics.adjusted_rand_score(truth, found)
    assert clustering.adjusted_rand_index(torch.tensor(truth), torch.tensor(found)) == pytest.approx(theirs, abs=1e-12)
    assert np.array_equal(clustering.contingency(truth, found), metrics.cluster.contingency_matrix(truth, found))


def test_accuracy_is_that_of_the_best_names() -> None:
    """All 24 ways to name four clusters, and clusters more than there are classes."""
    from itertools import permutations

    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    best = max(np.mean(np.array(names)[found] == truth) for names in permutations(range(4)))
    assert clustering.accuracy(truth, found) == pytest.approx(best)
    assert clustering.accuracy([0, 0, 1, 1], [0, 1, 2, 3]) == 0.5
    assert clustering.accuracy(truth, (truth + 1) % 4) == 1.0


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_labellings_without_information_agree_with_themselves(labels: list[int]) -> None:
    assert clustering.adjusted_rand_index(labels, labels) == 1.0
    assert clustering.normalised_mutual_information(labels, labels) == pytest.approx(1.0)
    assert clustering.adjusted_rand_index([0], [1]) == 1.0


@SEEDS
def test_scores_of_anomalies_are_those_of_scikit_learn(seed: int) -> None:
    """With ties, which are rounded scores."""
    rng = np.random.default_rng(seed)
    truth = rng.random(80) < 0.2
    score = np.round(rng.normal(size=80) + truth, seed)
    assert anomaly.area_under_roc(truth, score) == pytest.approx(metrics.roc_auc_score(truth, score), abs=1e-12)
    assert anomaly.average_precision(truth, score) == pytest.approx(metrics.average_precision_score(truth, score), abs=1e-12)


@SEEDS
def test_calibration_is_that_of_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(200) ** (1 + seed)
    happened = rng.random(200) < p
    observed, predicted = curves.calibration_curve(happened, p, n_bins=7)
    curve = calibration.reliability(happened, p, 7)
    np.testing.assert_allclose(curve.observed, observed)
    np.testing.assert_allclose(curve.predicted, predicted)
    assert curve.rows.sum() == 200
    error = (curve.rows / 200 * np.abs(observed - predicted)).sum()
    assert calibration.expected_calibration_error(happened, p, 7) == pytest.approx(error)
    assert calibration.brier_score(happened, p) == pytest.approx(metrics.brier_score_loss(happened, p))
    both = calibration.brier_score(happened.astype(int), np.column_stack([1 - p, p]))
    assert both == pytest.approx(2 * metrics.brier_score_loss(happened, p))


def test_certain_predictions_are_in_the_outer_bins() -> None:
    curve = calibration.reliability([0, 1, 1], [0.0, 1.0, 1.0])
    assert curve.rows.tolist() == [1, 2] and curve.observed.tolist() == [0.0, 1.0]
    assert calibration.expected_calibration_error([0, 1, 1], [0.0, 1.0, 1.0]) == 0.0


def test_intervals_of_the_right_law_cover_their_level() -> None:
    """4000 rows: within four standard errors of the level, each of three a false alarm in 16,000."""
    rng = np.random.default_rng(0)
    truth, draws = rng.normal(size=4000), rng.normal(size=(2000, 4000))
    levels = np.array([0.5, 0.8, 0.95])
    found = calibration.coverage(truth, draws, levels)
    assert (np.abs(found - levels) < 4 * np.sqrt(levels * (1 - levels) / 4000)).all()
    assert calibration.coverage(truth, draws, 0.8).shape == ()
    assert calibration.coverage(truth, 0.1 * draws) < 0.3


SIGMA, X = 0.5, np.linspace(-1.0, 1.0, 12)
DESIGN, TRUTH = np.vander(X, 4), np.sin(3.0 * X)


def smoother(penalty: float) -> np.ndarray:
    """The matrix that makes the predictions of ridge regression from the responses."""
    return DESIGN @ np.linalg.solve(DESIGN.T @ DESIGN + penalty * np.eye(4), DESIGN.T)


def parts(penalty: float, repeats: int) -> BiasVariance:
    matrix = smoother(penalty)
    return bias_variance(
        lambda y: matrix @ y, lambda i: TRUTH + SIGMA * np.random.default_rng(i).normal(size=12), TRUTH, repeats
    )


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_bias_and_variance_of_ridge_regression_are_the_formula(penalty: float) -> None:
    """Bias (S − 1) f and variance σ² diag S Sᵀ: 4.5 standard errors at 12 rows, twice, a false alarm in 3000 runs."""
    found, matrix, repeats = parts(penalty, 2000), smoother(penalty), 2000
    variance = SIGMA**2 * np.diag(matrix @ matrix.T)
    assert (np.abs(found.variance / variance - 1.0) < 4.5 * np.sqrt(2.0 / repeats)).all()
    bias = matrix @ TRUTH - TRUTH
    slack = 4.5 * (2.0 * np.abs(bias) * np.sqrt(variance / repeats) + 2.0 * variance / repeats)
    assert (np.abs(found.bias_squared - bias**2) < slack).all()
    np.testing.assert_allclose(found.error, np.square(found.predictions - TRUTH).mean(0))  # exactly their sum


def test_pictures_show_the_parts() -> None:
    figure = plots.bias_variance({penalty: parts(penalty, 20) for penalty in (0.01, 1.0, 10.0)}, "penalty")
    assert isinstance(figure, Figure)
    (axis,) = figure.axes
    error, bias, variance = (line.get_ydata() for line in axis.get_lines())
    np.testing.assert_allclose(error, np.add(bias, variance))
    assert axis.get_xscale() == "log" and axis.get_xlabel() == "penalty"
    assert bias[0] < bias[2] and variance[0] > variance[2]
    curve = calibration.reliability([0, 1, 1, 0], [0.1, 0.9, 0.8, 0.3])
    (axis,) = plots.reliability({"one": curve, "two": curve}).axes
    assert [line.get_label() for line in axis.get_lines()[1:]] == ["one", "two"]
    for picture in (plots.bias_variance, plots.reliability):
        with pytest.raises(ValueError, match="at least one"):
            picture({})


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: clustering.accuracy([0, 1], [0]), "vectors of one length"),
        (lambda: clustering.accuracy([], []), "vectors of one length"),
        (lambda: anomaly.area_under_roc([True, True], [0, 1]), "All of the rows are anomalies"),
        (lambda: anomaly.area_under_roc([False, False], [0, 1]), "None of the rows are anomalies"),
        (lambda: anomaly.average_precision([True, False], [0.0, np.nan]), "1 of the scores are NaN"),
        (lambda: anomaly.average_precision([True, False], [0.0]), "vectors of one length"),
        (lambda: calibration.reliability([0, 1], [0.0, 1.5]), "range from 0 to 1.5"),
        (lambda: calibration.brier_score([0], np.ones((2, 2))), r"shape \(2, 2\)"),
        (lambda: calibration.coverage([0.0], np.zeros((3, 2))), r"must be \(draw, rows\)"),
        (lambda: bias_variance(np.mean, lambda i: [1.0], [1.0], 1), "at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused(call: object, words: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=words):
        call()
