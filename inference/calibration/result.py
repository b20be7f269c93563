"""What a check returns, and how results are judged, printed and drawn."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Result", "canvas", "plotted", "table", "verdict"]


class Result(abc.ABC):
    """What a check found: it prints as sentences and a table, plots and exports to ArviZ."""

    @property
    @abc.abstractmethod
    def title(self) -> str:
        """What was checked, and what came out; the title of the plot, and a part of what is printed."""

    @abc.abstractmethod
    def to_arviz(self) -> Any:
        """``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with 1.x."""

    @abc.abstractmethod
    def plot(self) -> Figure:
        """A figure that belongs to no window."""

    @abc.abstractmethod
    def __str__(self) -> str: ...

    def __repr__(self) -> str:
        return str(self)


def verdict(p_values: np.ndarray, level: float) -> np.ndarray:
    """Whether each of several tests is passed, when all of them together err with a probability of 1 − ``level``."""
    return p_values * len(p_values) > 1.0 - level


def table(head: Sequence[str], rows: Sequence[Sequence[str]], align: str = "<", most: int = 12, rest: str = "") -> str:
    """Columns as wide as their widest cell.

    Args:
        head: Of each column.
        rows: Cells, as many in each as there are columns.
        align: "<" or ">", of all columns but the first.
        most: Rows that are shown.
        rest: How the others differ from them, in a last line that counts them: "of larger p".
    """
    shown = [head, *rows[:most]]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    sides = ["<", *[align] * (len(head) - 1)]
    lines = ["  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip() for row in shown]
    return "\n".join([*lines, f"({len(rows) - most} more, {rest})"] if len(rows) > most else lines)


def canvas(title: str, height: float = 4.0) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def plotted(title: str, labels: Sequence[str], z: Mapping[str, np.ndarray], bound: float, level: float) -> Figure:
    """Differences in standard errors, a row for each label, and the bounds between which all lie.

    Args:
        title: Of the figure.
        labels: Of the rows.
        z: Two kinds of differences: name to (label,).
        bound: The |z| that right ones stay below, all together, ...
        level: ... with this probability.
    """
    figure, axes = canvas(title, 1.6 + 0.22 * len(labels))
    axes.axvspan(-bound, bound, color="0.9", label=f"{100 * level:g} % bounds")
    axes.axvline(0.0, color="0.6", lw=0.8)
    rows = np.arange(len(labels))
    for (name, values), marker in zip(z.items(), ("o", "x"), strict=True):
        axes.plot(values, rows, marker, ms=4, label=name)
    axes.set_yticks(rows, labels)
    axes.invert_yaxis()
    axes.set_xlabel("z")
    axes.legend(fontsize="small")
    return figure
