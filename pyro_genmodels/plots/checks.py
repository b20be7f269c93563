"""Predictions beside the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from inference import Posterior
from pyro_genmodels.metrics.bias_variance import BiasVariance
from pyro_genmodels.metrics.calibration import Reliability
from pyro_genmodels.plots.posteriors import coordinates_of, spaced
from pyro_genmodels.plots.style import COLOURS, FAINT, INK, mix, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["bias_variance", "predictive_check", "reliability"]

_COLUMNS, _BINS = 6, 30
_BANDS = {0.9: (0.22, "90 % of the replications"), 0.5: (0.5, "50 %")}  # mass to shade and name
_DECADES = 100.0  # from which ratio of the largest to the least setting on the axis is logarithmic


def predictive_check(posterior: Posterior, draws: int = 50, columns: Sequence[str] = ()) -> Figure:
    """Data beside replicated data: what the program, at draws of the posterior, says the same rows might have been.

    A panel for each observed site, or for each of its columns: the data (dark), and the bands that hold 50 and 90 % of the
    replications. Where the data leave the bands, the program does not say how they came about.

    Args:
        posterior: What was inferred, with its program.
        draws: How many draws of the posterior replicate the data, at least 2.
        columns: Names of the columns of a table of data; its own numbers where there are not as many.

    Raises:
        RuntimeError: If the posterior was loaded without its model.
        ValueError: If nothing is observed, or ``draws`` is below 2.
    """
    if draws < 2:
        raise ValueError(f"draws is {draws}, but a band needs at least 2 replications.")
    some = spaced(posterior.draws, draws)
    kept = {site: values[torch.arange(draws) % len(values), None] for site, values in some.items()}
    made = dataclasses.replace(posterior, draws=kept).predict()
    panels: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for site, values in made.items():
        seen = posterior.observed[site].detach().cpu().double()
        replicated = values.detach().cpu().double().reshape(draws, *seen.shape)
        if seen.dim() < 2 or seen.shape[-1] > _COLUMNS:
            panels[site] = (seen.numpy(), replicated.numpy())
            continue
        width = seen.shape[-1]
        names = columns if len(columns) == width else coordinates_of(posterior, site, seen.dim() - 1, width)
        for i, name in enumerate(names):
            panels[f"{site}[{name}]"] = (seen[..., i].numpy(), replicated[..., i].numpy())
    if not panels:
        raise ValueError("There is nothing to check: the program observes nothing.")
    shown = dict(list(panels.items())[:_COLUMNS])
    figure, axes = panels_of(len(shown), width=3.4, height=2.8)
    for axis, (name, (observed, replications)) in zip(axes, shown.items()):
        _bands(axis, observed, replications)
        axis.set_xlabel(name)
        axis.set_ylabel("share of the rows")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[tuple[Any, str]] = [(Line2D([], [], color=INK, linewidth=1.4), "data")]
    handles += [(Patch(facecolor=mix(COLOURS[0], share)), text) for share, text in _BANDS.values()]
    figure.legend(*zip(*handles), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _bands(axis: Axes, observed: np.ndarray, replications: np.ndarray) -> None:
    """Histograms of the data and of each replication (draw, *observation), in common bins."""
    is_there = np.isfinite(observed)
    seen, made = observed[is_there], replications[:, is_there]
    low = min(seen.min(), np.quantile(made, 0.005))
    high = max(seen.max(), np.quantile(made, 0.995))
    if (seen == seen.round()).all() and (made == made.round()).all():
        step = max(1, -(-int(high - low + 1) // _BINS))
        edges = np.arange(low - 0.5, high + 0.5 + step, step)
    else:
        edges = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    shares = np.stack([np.histogram(row, edges)[0] for row in made]) / seen.size
    for mass, (shade, _) in _BANDS.items():
        bottom, top = np.quantile(shares, [0.5 - mass / 2, 0.5 + mass / 2], axis=0)
        axis.stairs(top, edges, baseline=bottom, fill=True, color=mix(COLOURS[0], shade), linewidth=0)
    axis.stairs(np.histogram(seen, edges)[0] / seen.size, edges, color=INK, linewidth=1.4)
    axis.set_ylim(bottom=0.0)


def bias_variance(parts: Mapping[float, BiasVariance], setting: str = "") -> Figure:
    """Squared bias, variance and their sum, averaged over rows, against a setting of the estimator.

    Args:
        parts: Value of the setting to the parts of the error.
        setting: What it is called.
    """
    if not parts:
        raise ValueError("bias_variance needs at least one setting, but parts is empty.")
    settings = sorted(parts)
    curves = {
        "error": [float(parts[at].error.mean()) for at in settings],
        "bias²": [float(parts[at].bias_squared.mean()) for at in settings],
        "variance": [float(parts[at].variance.mean()) for at in settings],
    }
    figure, (axis,) = panels_of(1, 5.0, 3.4)
    for (name, curve), colour in zip(curves.items(), (INK, *COLOURS), strict=False):
        axis.plot(settings, curve, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
    if settings[0] > 0 and settings[-1] / settings[0] >= _DECADES:
        axis.set_xscale("log")
    axis.set_xlabel(setting)
    axis.set_ylabel("mean squared error")
    axis.legend(frameon=False, fontsize=8)
    return figure


def reliability(curves: Mapping[str, Reliability]) -> Figure:
    """Reliability curves, each with the area of its points by the number of rows; the diagonal is perfect calibration."""
    if not curves:
        raise ValueError("reliability needs at least one curve, but curves is empty.")
    figure, (axis,) = panels_of(1, 3.8, 3.6)
    axis.plot([0.0, 1.0], [0.0, 1.0], color=FAINT, linewidth=1.2)
    for (name, curve), colour in zip(curves.items(), COLOURS * (1 + len(curves) // len(COLOURS)), strict=False):
        axis.plot(curve.predicted, curve.observed, color=colour, linewidth=1.2, label=name)
        axis.scatter(curve.predicted, curve.observed, s=80.0 * curve.rows / curve.rows.max(), color=colour)
    axis.set_xlabel("predicted probability")
    axis.set_ylabel("observed share")
    axis.legend(frameon=False, fontsize=8)
    return figure
