"""Distances of pictures are those of their features, which are held to formulas, brute force and means that are known."""

from __future__ import annotations

import doctest
import math
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from parameters import quick
from posteriordb import FOLDER
from pyro_genmodels import datasets
from pyro_genmodels.metrics import images
from pyro_genmodels.metrics.divergences import frechet, null_band
from pyro_genmodels.metrics.images import (
    FeatureNetwork,
    feature_network,
    frechet_distance,
    kernel_distance,
    manifolds,
    network_names,
)

RNG = np.random.default_rng(0)
DIGITS, LABELS = datasets.pictures("digits"), datasets.load("digits")["y"]


def test_the_examples_in_the_docstrings_are_true() -> None:
    assert doctest.testmod(images).failed == 0


@pytest.mark.parametrize("name", quick(network_names(), [name for name in network_names() if name != "cifar10"]))
def test_features_say_what_they_are(name: str) -> None:
    network = feature_network(name)
    assert network.name == name and "accuracy" in network.about and not network.training
    assert not any(weight.requires_grad for weight in network.parameters())
    file = images._FILES / f"{name}.safetensors"
    assert len(file.read_bytes()) < 100_000  # they travel in the wheel
    x = torch.rand(7, *network.shape)
    features = network(x)
    assert features.shape == (7, network.num_features) and (features >= 0.0).all()
    last = network.network.head.layers[-1]
    torch.testing.assert_close(last(features), network.network(x))  # they are what the last layer reads
    torch.testing.assert_close(network.classify(x), network.network(x))


@pytest.mark.parametrize("name", network_names())
def test_pictures_are_told_as_well_as_is_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRO_GENMODELS_DATA", str(FOLDER))
    network = feature_network(name)
    if name == "digits":
        x, y = DIGITS.test, LABELS[len(DIGITS.train) :]
    else:
        path = FOLDER / f"{name}{'_test' if name == 'cifar10' else ''}.npz"
        if not path.exists():
            pytest.skip(f"There is no {path}: set PYRO_GENMODELS_DATA.")
        with np.load(path) as arrays:
            y = torch.from_numpy(next(arrays[key] for key in ("y_test", "y") if key in arrays).astype(np.float32))
        x = datasets.pictures(name).test
    assert x is not None
    found = torch.cat([network.classify(part).argmax(-1) for part in x.split(1000)])
    share = float(found.eq(y).double().mean())
    said = re.search(r"([\d.]+) on (\d+) others", network.about)
    assert said is not None and int(said[2]) == len(x) and abs(float(said[1]) - share) < 1e-3


def test_distances_are_those_of_features_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, y = feature_network(), DIGITS.train[:90], DIGITS.train[90:150]
    expected = frechet(network(x), network(y))
    assert frechet_distance(x, y, network) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(images, "_ROWS", 40)
    assert frechet_distance(x, y, network) == pytest.approx(expected, rel=1e-4)
    assert kernel_distance(x, y, network) == pytest.approx(kernel_distance(network(x), network(y)), abs=1e-3)
    assert manifolds(x, y, network) == manifolds(network(x), network(y))


@pytest.mark.parametrize(
    "damage", [lambda x: x + 0.3 * torch.randn_like(x), lambda x: x.flip(-1), lambda x: x[:1].expand_as(x)]
)
def test_distances_grow_with_damage(damage: Callable[[Tensor], Tensor]) -> None:
    """Noise, mirrored digits and one digit for all are each beyond the band of two halves of the data."""
    torch.manual_seed(0)
    network, order = feature_network(), torch.randperm(1500)
    x, y = DIGITS.train[order[:300]], damage(DIGITS.train[order[300:600]])
    for distance in (frechet, kernel_distance):
        band = null_band(distance, network(x), network(y), permutations=40)
        assert band.p == pytest.approx(1 / 41)


def test_one_digit_left_out_is_seen() -> None:
    network, y = feature_network(), LABELS[:1500]
    x, half = DIGITS.train[750:], DIGITS.train[:750]
    without = half[y[:750] != 3]
    assert null_band(kernel_distance, network(x), network(without), permutations=40).p == pytest.approx(1 / 41)
    assert frechet_distance(x, without, network) > frechet_distance(x, half, network)


# ------------------------------------------------------------------------------------------------------------------- KID
@pytest.mark.parametrize("degree", [1, 3])
def test_kernel_distance_is_a_mean_over_pairs(degree: int) -> None:
    x, y = RNG.standard_normal((6, 4)), RNG.standard_normal((9, 4)) + 1.0

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 4 + 1.0) ** degree)

    within = [np.mean([k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    expected = sum(within) - 2.0 * np.mean([k(a, b) for a in x for b in y])
    assert kernel_distance(x, y, degree=degree) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased() -> None:
    """On the line (ab + 1)³ compares moments: Σ_m (3 over m) (E xᵐ − E yᵐ)². Five standard errors, false alarm 1e-6."""
    rng = np.random.default_rng(1)
    found = np.array([kernel_distance(rng.standard_normal(8), 0.5 + rng.standard_normal(12)) for _ in range(4000)])
    moments = [(0.0, 0.5), (1.0, 1.25), (0.0, 0.5**3 + 3 * 0.5)]
    expected = sum(math.comb(3, m + 1) * (a - b) ** 2 for m, (a, b) in enumerate(moments))
    assert abs(found.mean() - expected) < 5 * found.std() / 4000**0.5
    same = np.array([kernel_distance(rng.standard_normal(8), rng.standard_normal(12)) for _ in range(4000)])
    assert abs(same.mean()) < 5 * same.std() / 4000**0.5 and (same < 0).any()


# ---------------------------------------------------------------------------------------------- precision and recall
def test_manifolds_are_those_of_brute_force() -> None:
    data, draws, k = RNG.standard_normal((15, 2)), RNG.standard_normal((11, 2)) + 0.7, 3

    def radius(rows: np.ndarray, i: int) -> float:
        return float(sorted(np.linalg.norm(rows[i] - other) for j, other in enumerate(rows) if j != i)[k - 1])

    inside = np.array([[np.linalg.norm(d - x) <= radius(data, i) for x in draws] for i, d in enumerate(data)])
    covers = np.array([[np.linalg.norm(d - x) <= radius(draws, j) for j, x in enumerate(draws)] for d in data])
    found = manifolds(data, draws, neighbours=k)
    assert found.precision == pytest.approx(np.mean(inside.any(0)))
    assert found.recall == pytest.approx(np.mean(covers.any(1)))
    assert found.density == pytest.approx(inside.sum() / (k * 11))
    assert found.coverage == pytest.approx(np.mean(inside.any(1)))


def test_precision_and_recall_are_not_exchanged() -> None:
    """Draws of one of two modes are good and not varied; draws of three are varied and not all good."""
    modes = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]])
    rng = np.random.default_rng(2)
    one, two, three = (modes[rng.integers(0, count, 300)] + rng.standard_normal((300, 2)) for count in (1, 2, 3))
    few, many = manifolds(two, one), manifolds(two, three)
    assert few.precision > 0.95 and abs(few.recall - 0.5) < 0.1 and few.coverage < 0.6
    assert abs(many.precision - 2 / 3) < 0.1 and many.recall > 0.95
    swapped = manifolds(one, two)
    assert (swapped.precision, swapped.recall) == (few.recall, few.precision)


def test_of_one_distribution_the_means_of_density_and_coverage_are_known() -> None:
    """Distances are ranked at random, whatever the distribution. Five standard errors of 400 pairs, false alarm 1e-6."""
    rng, rows, drawn, k = np.random.default_rng(3), 30, 20, 4
    found = np.array([manifolds(*rng.gamma(0.5, size=(2, 30, 3))[:, :rows], neighbours=k)[2:] for _ in range(400)])
    unequal = np.array(
        [manifolds(rng.gamma(0.5, size=(rows, 3)), rng.gamma(0.5, size=(drawn, 3)), neighbours=k)[2:] for _ in range(400)]
    )
    for values, count in ((found, rows), (unequal, drawn)):
        missed = math.prod((rows - i) / (rows + count - i) for i in range(1, k + 1))
        error = values.std(0) / len(values) ** 0.5
        assert (np.abs(values.mean(0) - [1.0, 1.0 - missed]) < 5 * error).all()


def test_data_cover_themselves() -> None:
    x = RNG.standard_normal((40, 3))
    found = manifolds(x, x[::-1])
    assert found.precision == found.recall == found.coverage == 1.0


def test_a_name_is_no_network() -> None:
    with pytest.raises(TypeError, match=r"network is 'digits', but must be a function .* feature_network\("):
        frechet_distance(torch.zeros(5, 8, 8), torch.zeros(5, 8, 8), "digits")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: feature_network("inception"),
            "no features 'inception'; there are cifar10, digits, fashion_mnist, mnist, or give",
        ),
        (lambda: feature_network()(torch.zeros(5, 28, 28)), r"pictures \(rows, 8, 8\), but came \(5, 28, 28\)"),
        (lambda: feature_network()(torch.zeros(0, 8, 8)), r"but came \(0, 8, 8\)"),
        (lambda: feature_network()(torch.full((1, 8, 8), 16)), "go from 16 to 16. Divide them by the largest"),
        (lambda: feature_network()(torch.full((1, 8, 8), math.nan)), "these go from nan to nan"),
        (lambda: frechet_distance(torch.zeros(1, 8, 8), torch.zeros(5, 8, 8), feature_network()), "needs at least 2 rows"),
        (lambda: kernel_distance([1.0], [1.0, 2.0]), "need at least 2, but x has 1 and y 2"),
        (lambda: kernel_distance([1.0, 2.0], [1.0, 2.0], degree=0), "degree is 0"),
        (lambda: manifolds([1.0, 2.0, 3.0], [1.0, 2.0], neighbours=2), "data have 3, draws 2"),
        (lambda: manifolds(np.zeros((5, 2)), np.zeros((5, 3))), "data has 2 features and draws 3"),
        (partial(manifolds, [1.0, math.inf], [1.0, 2.0]), "data holds 1 values that are NaN or infinite"),
        (lambda: manifolds([1.0, 2.0], [1.0, 2.0], neighbours=1.5), "neighbours is 1.5, but must be an integer"),
        (lambda: FeatureNetwork((8, 8), channels=()), "channels is empty"),
    ],
)
def test_wrong_input_is_answered_in_a_sentence(call: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
