"""Five small classics that come with the package: nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.datasets.tables import Dataset, parse_csv

__all__ = ["coal_mining", "digits", "eight_schools", "galaxies", "load", "names", "old_faithful"]


def old_faithful() -> Dataset:
    """Eruptions of the Old Faithful geyser: "x" (272, 2), minutes of eruption and minutes until the next one.

    References:
        A. Azzalini and A. Bowman, A look at some data on the Old Faithful geyser, Applied Statistics 39 (1990).
        W. Härdle, Smoothing Techniques with Implementation in S (1991): this selection of 272 eruptions.
    """
    x, columns = _read("faithful.csv")
    return Dataset(
        name="faithful",
        description="Old Faithful geyser: length of an eruption and waiting time until the next, minutes",
        source="Härdle (1991), Azzalini and Bowman (1990)",
        arrays={"x": x},
        columns=columns,
    )


def galaxies() -> Dataset:
    """Velocities of galaxies in the Corona Borealis region: "x" (82, 1), in 1000 km/s, ascending.

    The 78th is 26.960 as published; a much copied version, that of R's MASS, has 26.690 by a slip.

    References:
        K. Roeder, Density estimation with confidence sets exemplified by superclusters and voids in the galaxies,
        Journal of the American Statistical Association 85 (1990).
        M. Postman, J. Huchra and M. Geller, Probes of large-scale structure in the Corona Borealis region,
        Astronomical Journal 92 (1986).
    """
    x, columns = _read("galaxies.csv")
    return Dataset(
        name="galaxies",
        description="Velocities of 82 galaxies of the Corona Borealis region, 1000 km/s",
        source="Roeder (1990), Postman, Huchra and Geller (1986)",
        arrays={"x": x},
        columns=columns,
    )


def eight_schools() -> Dataset:
    """Effects of coaching on test scores in eight schools: "y" (8,), estimated, and "sigma" (8,), standard errors.

    References:
        D. Rubin, Estimation in parallel randomized experiments, Journal of Educational Statistics 6 (1981).
        A. Gelman et al., Bayesian Data Analysis, third edition (2013), section 5.5.
    """
    values, columns = _read("eight_schools.csv")
    return Dataset(
        name="eight_schools",
        description="Estimated effects of coaching on SAT scores in eight schools, with their standard errors, points",
        source="Rubin (1981)",
        arrays=_split(values, columns),
        columns=columns,
    )


def coal_mining() -> Dataset:
    """British coal-mining disasters: "years" (112,), 1851 to 1962, and "counts" (112,), accidents with 10 or more dead.

    References:
        R. Jarrett, A note on the intervals between coal-mining disasters, Biometrika 66 (1979).
        B. Carlin, A. Gelfand and A. Smith, Hierarchical Bayesian analysis of changepoint problems,
        Applied Statistics 41 (1992): the counts by year.
    """
    values, columns = _read("coal.csv")
    return Dataset(
        name="coal",
        description="Coal-mining accidents with ten or more dead in Great Britain, by year",
        source="Jarrett (1979), Carlin, Gelfand and Smith (1992)",
        arrays=_split(values, columns),
        columns=columns,
    )


def digits() -> Dataset:
    """Handwritten digits of 8x8 pixels: "x" (1797, 64), ink from 0 to 16, row by row, and "y" (1797,) int64, the digit.

    References:
        E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository (1998),
        CC BY 4.0: its test part.
    """
    with _FILES.joinpath("digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        x, y = (torch.from_numpy(arrays[name]) for name in ("x", "y"))
    return Dataset(
        name="digits",
        description="Handwritten digits of 8x8 pixels, ink from 0 to 16",
        source="Alpaydin and Kaynak (1998), UCI Machine Learning Repository, CC BY 4.0",
        arrays={"x": x.double(), "y": y.long()},
        columns=tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8)),
    )


_LOADERS: dict[str, Callable[[], Dataset]] = {
    "faithful": old_faithful,
    "galaxies": galaxies,
    "eight_schools": eight_schools,
    "coal": coal_mining,
    "digits": digits,
}


def names() -> tuple[str, ...]:
    """The names that ``load`` knows."""
    return tuple(_LOADERS)


def load(name: str) -> Dataset:
    """One of the data sets that come with the package, by its name on the command line.

    Raises:
        ValueError: There is none of that name.

    Example:
        >>> load("faithful").x.shape
        torch.Size([272, 2])
    """
    if name not in _LOADERS:
        raise ValueError(f"There is no data set '{name}'; there are {', '.join(_LOADERS)}.")
    return _LOADERS[name]()


_FILES = resources.files("pyro_genmodels.datasets") / "files"


def _read(file: str) -> tuple[Tensor, tuple[str, ...]]:
    return parse_csv(_FILES.joinpath(file).read_text(encoding="utf-8"), file)


def _split(values: Tensor, columns: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: column.clone() for name, column in zip(columns, values.unbind(1), strict=True)}
