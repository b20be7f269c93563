"""What the steps of a run have reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inference import Posterior
from pyro_genmodels.plots.posteriors import Posteriors, coloured
from pyro_genmodels.plots.style import COLOURS, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["learning_curve", "log_curves"]


def learning_curve(posteriors: Posteriors) -> Figure:
    """What the steps reported: the loss of a guide, the objective of EM, the log-density of every chain.

    Args:
        posteriors: What was inferred; those without a history are left out.

    Raises:
        ValueError: If no posterior has a history.
    """
    named = {name: pair for name, pair in coloured(posteriors).items() if pair[0].history}
    if not named:
        raise ValueError("There is no curve to draw: no posterior has a history.")
    figure, axes = panels_of(len(named), width=3.4, height=2.8)
    for axis, (name, (posterior, colour)) in zip(axes, named.items()):
        label, values = next(iter(posterior.history.items()))
        rows = _rows(posterior) if "rate" in posterior.history else None  # what a row costs, where rows have codes
        values = values if rows is None else values / rows
        curve = values.detach().cpu().double().reshape(len(values), -1).numpy()
        _course(axis, np.arange(len(curve)), curve, colour, is_noisy=label == "loss")
        axis.set_title(name)
        axis.set_xlabel("step")
        unit = "" if rows is None else ", nats a row"
        axis.set_ylabel({"lp": "log-density", "log_joint": "log-joint"}.get(label, label) + unit)
    return figure


def log_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """What a log of ``inference.JSONLines`` says of a run: a panel for each number that it follows.

    Args:
        lines: The lines of the file, each with "step".

    Raises:
        ValueError: If no line has a number beside its step and time.
    """
    names = dict.fromkeys(
        name
        for line in lines
        for name, value in line.items()
        if name not in ("step", "seconds") and isinstance(value, (int, float)) and not isinstance(value, bool)
    )
    if not names:
        raise ValueError("There is no curve to draw: the log follows no number.")
    figure, axes = panels_of(len(names), width=3.4, height=2.6)
    for axis, name, colour in zip(axes, names, COLOURS * len(names), strict=False):
        found = [(line["step"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
        steps, values = np.array(found, dtype=float).T
        _course(axis, steps, values[:, None], colour, is_noisy=name == "loss")
        axis.set_title(name.replace("_", " "))
        axis.set_xlabel("step")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
    return figure


def _course(axis: Axes, steps: np.ndarray, curve: np.ndarray, colour: str, is_noisy: bool) -> None:
    """Curves (step, chain), with a running mean where single steps are noise."""
    mark: dict[str, Any] = {"marker": "o", "markersize": 3} if len(curve) < 20 else {}
    axis.plot(steps, curve, color=colour, linewidth=0.8, alpha=0.35 if is_noisy and len(curve) >= 100 else 0.8, **mark)
    axis.locator_params(axis="x", integer=True)
    if is_noisy and len(curve) >= 100:
        width = len(curve) // 50
        smooth = np.convolve(curve[:, 0], np.ones(width) / width, "valid")
        axis.plot(np.convolve(steps, np.ones(width) / width, "valid"), smooth, color=colour, linewidth=1.8)
    settled = curve[len(curve) // 10 :] if len(curve) > 50 else curve
    settled = settled[np.isfinite(settled)]
    if settled.size:
        # The first steps fall from heights that would flatten all the rest.
        low, high = np.percentile(settled, [0, 100])
        room = 0.1 * (high - low) or 1.0
        axis.set_ylim(low - room, high + room)


def _rows(posterior: Posterior) -> int | None:
    """How many rows the largest plate of the data has."""
    return max((len(values) for values in posterior.coords.values()), default=None)
