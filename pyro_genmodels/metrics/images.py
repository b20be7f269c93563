"""How good and how varied drawn pictures are, in the features of a network that is named.

A Fréchet distance "of images" means nothing without the network whose features are compared: numbers in the features of
one network cannot be held beside those of another. ``feature_network`` has small ones for handwritten digits, trained to
name the digit by ``tests/make_features.py``, which come with the package; any module from pictures to rows of numbers
will do instead, such as that of torchmetrics, whose ``FrechetInceptionDistance(feature=)`` takes these in turn.

All of them have a floor, which is theirs at two samples of one distribution and depends on the numbers of rows: give that
of held-out data beside any of them. ``divergences.null_band(frechet, network(x), network(y))`` says whether a distance is
beyond it.

References:
    M. Heusel et al., GANs trained by a two time-scale update rule converge to a local Nash equilibrium (2017): FID.
    M. Bińkowski, D. Sutherland, M. Arbel and A. Gretton, Demystifying MMD GANs (2018): KID.
    T. Kynkäänniemi et al., Improved precision and recall metric for assessing generative models (2019).
    M. Naeem et al., Reliable fidelity and diversity metrics for generative models (2020): density and coverage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
import scipy.spatial.distance
import torch
from safetensors import safe_open
from torch import Tensor, nn

from pyro_genmodels.metrics.divergences import frechet, paired
from pyro_genmodels.nets import ConvEncoder

__all__ = [
    "FeatureNetwork", "Manifolds", "feature_network", "frechet_distance", "kernel_distance", "manifolds", "network_names",
]  # fmt: skip

_FILES = resources.files("pyro_genmodels.metrics") / "files"
_RANGE = (-4.0, 5.0)  # draws of a network may leave 0 to 1, but pictures of 0 to 16 or 255 are another mistake
_ROWS = 1000  # of pictures that pass through a network at once

Network = Callable[[Tensor], Tensor]


class FeatureNetwork(nn.Module):
    """A convolutional classifier, of which all but the last layer are kept in mind: what that reads are the features.

    Args:
        shape: Of one picture, (height, width) or (channels, height, width).
        classes: It was trained to tell.
        channels: Of the convolutions, each of which halves the picture.
        features: Numbers that the last layer reads, each at least 0.
        name: Of these features, to be given with every distance.
        about: What it was trained on and how, and its accuracy.

    Attributes:
        num_features: The same as ``features``, by the name that torchmetrics looks for.

    Example:
        >>> FeatureNetwork((8, 8), features=12)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 12])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        classes: int = 10,
        channels: Sequence[int] = (16, 32),
        features: int = 32,
        name: str = "untrained",
        about: str = "",
    ) -> None:
        super().__init__()
        self.shape, self.num_features, self.name, self.about = tuple(shape), features, name, about
        self.network = ConvEncoder(shape, classes, channels, (features,))

    def forward(self, x: Tensor) -> Tensor:
        """Features, (rows, features), of pictures with values from 0 to 1, (rows, *shape).

        Raises:
            ValueError: If they have another shape, or values far outside of that, or NaN.
        """
        if tuple(x.shape[1:]) != self.shape or not len(x):
            raise ValueError(
                f"The features '{self.name}' are of pictures (rows, {', '.join(map(str, self.shape))}), but came "
                f"{tuple(x.shape)}."
            )
        x = x.to(next(self.parameters()))
        least, most = (float(end) for end in x.aminmax())
        if not _RANGE[0] <= least <= most <= _RANGE[1]:
            raise ValueError(
                f"Pictures have values from 0 to 1 here, but these go from {least:g} to {most:g}. Divide them by the "
                "largest that they can have."
            )
        maps = self.network.layers(x.reshape(-1, *self.network.shape)).flatten(1)
        result: Tensor = self.network.head.layers[:-1](maps)
        return result

    def classify(self, x: Tensor) -> Tensor:
        """Logits of the classes, (rows, classes), of pictures (rows, *shape)."""
        result: Tensor = self.network.head.layers[-1](self(x))
        return result


def network_names() -> tuple[str, ...]:
    """The names that ``feature_network`` knows."""
    return tuple(sorted(file.name.removesuffix(".safetensors") for file in _FILES.iterdir() if file.name[0] != "."))


def feature_network(name: str = "digits") -> FeatureNetwork:
    """A trained network that comes with the package, ready to be used; ``about`` says what it was trained on.

    Args:
        name: One of ``network_names()``.

    Raises:
        ValueError: There is none of that name.

    Example:
        >>> feature_network("digits")(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 32])
    """
    if name not in network_names():
        raise ValueError(f"There are no features '{name}'; there are {', '.join(network_names())}, or give a network.")
    with resources.as_file(_FILES / f"{name}.safetensors") as path, safe_open(path, "pt") as file:
        told = file.metadata()
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118  (the file is no dict)
    shape, channels = (tuple(map(int, told[key].split())) for key in ("shape", "channels"))
    features = len(weights["network.head.layers.0.weight"])
    network = FeatureNetwork(shape, channels=channels, features=features, name=name, about=told["about"])
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


class Manifolds(NamedTuple):
    """How far draws and data cover each other; each from 0, and 1 is best.

    Attributes:
        precision: Share of the draws that lie in the balls of data: how good they are.
        recall: Share of the data that lie in the balls of draws: how varied those are.
        density: Balls of data that a draw lies in, over ``neighbours``: as precision, but one odd row of data counts little;
            1 in the mean for draws like data, and more where they crowd where data are dense.
        coverage: Share of the balls of data that hold a draw: as recall, but one odd draw counts little.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def _features(x: Any, network: Network | None) -> Any:
    """The features of pictures, (rows, features), or the pictures themselves."""
    if network is None:
        return x
    if not callable(network):
        raise TypeError(
            f"network is {network!r}, but must be a function of pictures that gives features, such as "
            'feature_network("digits").'
        )
    pictures, weight = torch.as_tensor(x), None
    if isinstance(network, nn.Module):
        weight = next((w for w in network.parameters() if w.is_floating_point()), None)
    if weight is not None and pictures.is_floating_point():
        pictures = pictures.to(weight.dtype)
    with torch.no_grad():
        return torch.cat([network(part) for part in pictures.split(_ROWS)])


def frechet_distance(x: Any, y: Any, network: Network) -> float:
    """FID: ``divergences.frechet`` of the features of two samples of pictures.

    Its floor grows with the square of the number of features and falls with the number of rows, and it is biased upwards.

    Args:
        x: Pictures, (rows, …).
        y: (rows of its own, …).
        network: From pictures to features, (rows, features).

    Example:
        >>> from pyro_genmodels import datasets
        >>> digits = datasets.pictures("digits")
        >>> network = feature_network("digits")
        >>> frechet_distance(digits.train, digits.test, network) < frechet_distance(1 - digits.train, digits.test, network)
        True
    """
    return frechet(_features(x, network), _features(y, network))


def kernel_distance(x: Any, y: Any, network: Network | None = None, degree: int = 3) -> float:
    """KID: MMD² with k(a, b) = (a·b / features + 1)^degree, over all pairs of different rows; unbiased, so also below 0.

        1/n(n−1) Σ_{i≠j} k(x_i, x_j) + 1/m(m−1) Σ_{i≠j} k(y_i, y_j) − 2/nm Σ_ij k(x_i, y_j)

    Args:
        x: Pictures, (rows, …), at least 2.
        y: (rows of its own, …), at least 2.
        network: From pictures to features, (rows, features); None compares the rows themselves.
        degree: Of the polynomial, at least 1: moments up to it are compared.
    """
    one, other = paired(_features(x, network), _features(y, network))
    if not isinstance(degree, int) or degree < 1:
        raise ValueError(f"degree is {degree}, but must be an integer of at least 1.")
    if min(len(one), len(other)) < 2:
        raise ValueError(f"Pairs of different rows need at least 2, but x has {len(one)} and y {len(other)}.")

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / one.shape[1] + 1.0) ** degree

    def within(a: np.ndarray) -> float:
        table = kernel(a, a)
        return float((table.sum() - np.trace(table)) / (len(a) * (len(a) - 1)))

    return within(one) + within(other) - 2.0 * float(kernel(one, other).mean())


def manifolds(data: Any, draws: Any, network: Network | None = None, neighbours: int = 3) -> Manifolds:
    """Precision, recall, density and coverage of draws, by balls around rows that reach to their k-th nearest neighbour.

    For N rows of data and M draws of one distribution the mean of density is 1, that of coverage
    1 − (N−1)···(N−k) / ((N+M−1)···(N+M−k)), whatever the distribution; precision and recall have a floor that depends on it:
    give that of held-out data.

    Args:
        data: Pictures, (rows, …).
        draws: (rows of its own, …). The two are not exchangeable.
        network: From pictures to features, (rows, features); None compares the rows themselves.
        neighbours: k, at least 1 and less than the rows of each.

    Example:
        >>> rows = [[0.0], [1.0], [2.0], [3.0]]
        >>> manifolds(rows, [[0.1], [0.2], [0.3]], neighbours=1)
        Manifolds(precision=1.0, recall=0.25, density=2.0, coverage=0.5)
    """
    real, drawn = paired(_features(data, network), _features(draws, network), ("data", "draws"))
    if not isinstance(neighbours, int) or not 1 <= neighbours < min(len(real), len(drawn)):
        raise ValueError(
            f"neighbours is {neighbours}, but must be an integer of at least 1 and less than the rows: data have "
            f"{len(real)}, draws {len(drawn)}."
        )

    def radii(rows: np.ndarray) -> np.ndarray:  # a row is its own nearest, at 0
        return np.partition(scipy.spatial.distance.cdist(rows, rows), neighbours, axis=1)[:, neighbours]

    apart = scipy.spatial.distance.cdist(real, drawn)
    in_data, in_draws = apart <= radii(real)[:, None], apart <= radii(drawn)
    return Manifolds(
        precision=float(in_data.any(0).mean()),
        recall=float(in_draws.any(1).mean()),
        density=float(in_data.sum(0).mean() / neighbours),
        coverage=float(in_data.any(1).mean()),
    )
