"""What all pictures have in common: colours, figures without pyplot, axes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "FAINT", "INK", "columns_for", "dress", "figure_of", "mix", "panels_of"]

COLOURS = ("#3b6fb6", "#d1603d", "#3c9d78", "#8b5fb0", "#c29b22", "#5a6b7b")
INK, FAINT = "#2b2f36", "#d9dde3"


def mix(colour: str, share: float) -> tuple[float, float, float]:
    """The colour, with white where the share is below 1, with black where it is above."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1.0 - share * (1.0 - c) if share <= 1.0 else c * (2.0 - share) for c in to_rgb(colour))
    return red, green, blue


def figure_of(width: float, height: float) -> Figure:
    """A figure of its own: nothing of pyplot, whose state is global, and no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def panels_of(count: int, width: float, height: float, **share: Any) -> tuple[Figure, list[Axes]]:
    """A figure of that many panels of that size, side by side and below one another, and their axes."""
    across = columns_for(count)
    down = -(-count // across)
    figure = figure_of(width * across + 0.4, height * down)
    grid = figure.subplots(down, across, squeeze=False, **share).ravel()
    for axis in grid[count:]:
        axis.remove()
    for axis in grid[:count]:
        dress(axis)
    return figure, list(grid[:count])


def columns_for(count: int) -> int:
    """How many panels stand side by side."""
    return 2 if count == 4 else min(count, 3)


def dress(axis: Axes) -> None:
    """Gives axes the looks of all pictures."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(INK)
    axis.tick_params(colors=INK, labelsize=8)
    axis.grid(color=FAINT, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.title.set_fontsize(10)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_fontsize(9)
        label.set_color(INK)
