"""Pictures of data and posteriors. Each function returns a matplotlib ``Figure``, which has ``savefig``, and shows nothing.

All take one posterior, or a mapping from a name to a posterior, which then stand side by side. Exchangeable labels are
drawn as they are in ``posterior.draws``: match them before (``dataclasses.replace(posterior, draws=posterior.matched)``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from inference import Posterior, arviz, relabel
from pyro_genmodels.classical import GMM
from pyro_genmodels.metrics.bias_variance import BiasVariance
from pyro_genmodels.metrics.calibration import Reliability

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Scored", "bias_variance", "density_contours", "effective_growth", "effective_sizes", "elements", "forest", "images",
    "latent_scatter", "learning_curve", "log_curves", "manifold", "predictive_check", "ranks", "reliability",
    "traces", "traversals",
]  # fmt: skip

Posteriors = Posterior | Mapping[str, Posterior]

_COLOURS = ("#3b6fb6", "#d1603d", "#3c9d78", "#8b5fb0", "#c29b22", "#5a6b7b")
_INK, _FAINT = "#2b2f36", "#d9dde3"
_MASSES = (0.95, 0.8, 0.5)  # held by the contours
_DRAWS, _POINTS, _CLOUD, _ROWS = 100, 120, 20, 8


class Scored(Protocol):
    """A model that knows the log-density of rows (rows, features) under draws: ``score_samples(x, draws) -> (rows,)``."""

    def score_samples(self, x: Tensor, draws: Any) -> Tensor:
        """Log-density of each row, (row,), averaged over draws."""


def density_contours(
    model: Scored,
    x: Tensor,
    posteriors: Posteriors,
    columns: Sequence[str] | None = None,
    features: tuple[int, ...] = (0, 1),
) -> Figure:
    """Data, the posterior predictive density, and the components of a Gaussian mixture: one panel a posterior.

    In two dimensions the contours hold 50, 80 and 95 % of the mass, an ellipse is two standard deviations of a component
    (bold: at the mean of the draws; thin: at single draws). In one dimension: a histogram, the density, and each
    component's share of it.

    Args:
        model: The model that was fitted.
        x: Data, (rows, features).
        posteriors: What was inferred.
        columns: Names of the features.
        features: The one or two columns to show; others are integrated out, which only a GMM can.

    Raises:
        ValueError: If x has more columns than can be shown, and the model is no GMM.
    """
    x = x.detach().cpu().double()
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be a table (rows, features).")
    shown = [feature for feature in features if feature < x.shape[1]][:2]
    if not shown or (len(shown) < x.shape[1] and not isinstance(model, GMM)):
        raise ValueError(f"x has {x.shape[1]} features, but features={features} of them can be shown only for a GMM.")
    named = _named(posteriors)
    labels = [columns[i] if columns is not None else f"x{i + 1}" for i in shown]
    figure, axes = _panels(len(named), width=3.4, height=3.3, sharey=True)
    for axis, (name, (posterior, colour)) in zip(axes, named.items()):
        draws = _some(posterior.draws, _DRAWS)
        if isinstance(model, GMM):
            draws = _marginal(model, draws, shown)
        panel = _curve if len(shown) == 1 else _contours
        panel(axis, model, x[:, shown], draws, colour)
        axis.set_title(name)
        axis.set_xlabel(labels[0])
    for axis in axes[:: _across(len(named))]:
        axis.set_ylabel(labels[1] if len(shown) == 2 else "density")
    _explain(figure, len(shown), isinstance(model, GMM))
    return figure


def traces(posteriors: Posteriors, sites: Sequence[str] | None = None) -> Figure:
    """Draws in the order in which they were made: a row for each element of the sites, a column for each sampler.

    Args:
        posteriors: What was inferred; point estimates and guides, which have independent draws, are left out.
        sites: Names of the sites; None takes all that do not belong to the rows of the data. At most eight elements.

    Raises:
        ValueError: If no posterior comes from Markov chains.
    """
    named = _chained(posteriors, 2)
    if not named:
        raise ValueError("There is nothing to trace: no posterior has Markov chains of two draws.")
    found = {name: elements(posterior, sites) for name, (posterior, _) in named.items()}
    labels = list(next(iter(found.values())))[:_ROWS]
    figure = _figure(2.6 * max(len(named), 2) + 0.6, 0.95 * len(labels) + 0.8)
    grid = figure.subplots(len(labels), len(named), squeeze=False, sharex="col", sharey="row")
    for j, (name, (_, colour)) in enumerate(named.items()):
        for i, label in enumerate(labels):
            axis, values = grid[i, j], found[name][label]
            _dress(axis)
            step = -(-values.shape[1] // 1000)
            for chain, shade in zip(values[:, ::step], np.linspace(1.35, 0.45, len(values))):
                axis.plot(np.arange(len(chain)) * step, chain, color=_mix(colour, shade), linewidth=0.4, alpha=0.8)
            axis.set_xlim(0, values.shape[1] - 1)
        grid[0, j].set_title(f"{name} ({len(found[name][labels[0]])} chains)")
        grid[-1, j].set_xlabel("draw")
    for i, label in enumerate(labels):
        grid[i, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.align_ylabels(grid[:, 0])
    return figure


def effective_sizes(posteriors: Posteriors, sites: Sequence[str] | None = None) -> Figure:
    """Effective sample size of each site, the least over its elements, in all and per second of wall time.

    Elements that change when exchangeable labels are renamed are sorted over the labels first.

    Args:
        posteriors: What was inferred; point estimates and guides are left out.
        sites: Names of the sites; None takes all that do not belong to the rows of the data.

    Raises:
        ValueError: If no posterior comes from Markov chains.
    """
    named = _chained(posteriors, 4)
    if not named:
        raise ValueError("There are no effective sample sizes: no posterior has Markov chains of four draws.")
    sizes = {name: _least(posterior, sites) for name, (posterior, _) in named.items()}
    labels = list(next(iter(sizes.values())))
    figure = _figure(9.0, 1.0 + 0.28 * len(labels) * len(named))
    for axis, is_rate in zip(figure.subplots(1, 2, sharey=True), (False, True)):
        _dress(axis)
        thickness = 0.8 / len(named)
        for j, (name, (posterior, colour)) in enumerate(named.items()):
            seconds = float(posterior.info.get("sampling_time", np.nan)) if is_rate else 1.0
            lengths = [sizes[name][label] / seconds for label in labels]
            places = np.arange(len(labels)) + (j - 0.5 * (len(named) - 1)) * thickness
            bars = axis.barh(places, lengths, 0.86 * thickness, color=colour, label=name)
            axis.bar_label(bars, fmt=_rounded, padding=3, color=_INK, fontsize=8)
        axis.set_yticks(np.arange(len(labels)), labels)
        axis.xaxis.set_major_formatter(lambda value, _: _rounded(value))
        axis.locator_params(axis="x", nbins=5)
        axis.margins(x=0.15)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)
        axis.set_xlabel("effective draws per second" if is_rate else "effective draws")
    figure.axes[0].invert_yaxis()
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, frameon=False)
    return figure


def ranks(posteriors: Posteriors, sites: Sequence[str] | None = None) -> Figure:
    """Ranks of the draws among those of all chains, a histogram for each chain: a row for each element of the sites.

    Chains that agree have flat histograms: of N draws a chain, each of B bins holds N/B, within the grey band at 99 % of
    independent draws. One that sits low, high or narrow bends its own.

    Args:
        posteriors: What was inferred; point estimates and guides, which have no chains, are left out.
        sites: Names of the sites; None takes all that do not belong to the rows of the data. At most eight elements.

    Raises:
        ValueError: If no posterior comes from two Markov chains.

    References:
        A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Bürkner, Rank-normalization, folding, and localization: an
        improved R-hat for assessing convergence of MCMC (2021).
    """
    from scipy.stats import binom, rankdata

    named = {name: pair for name, pair in _chained(posteriors, 4).items() if pair[0].shape[0] > 1}
    if not named:
        raise ValueError("There are no ranks to compare: no posterior has two Markov chains of four draws.")
    found = {name: elements(posterior, sites) for name, (posterior, _) in named.items()}
    labels = list(next(iter(found.values())))[:_ROWS]
    figure = _figure(2.6 * max(len(named), 2) + 0.6, 0.95 * len(labels) + 0.8)
    grid = figure.subplots(len(labels), len(named), squeeze=False)
    for j, (name, (_, colour)) in enumerate(named.items()):
        for i, label in enumerate(labels):
            axis, values = grid[i, j], found[name][label]
            _dress(axis)
            chains, draws = values.shape
            bins = min(20, max(4, draws // 20))
            rank = rankdata(values, method="average").reshape(values.shape)
            edges = np.linspace(0.5, chains * draws + 0.5, bins + 1)
            low, high = binom.ppf([0.005, 0.995], draws, 1.0 / bins)
            axis.axhspan(low, high, color=_FAINT, alpha=0.6, linewidth=0)
            for own, shade in zip(rank, np.linspace(1.35, 0.45, chains)):
                axis.stairs(np.histogram(own, edges)[0], edges, color=_mix(colour, shade), linewidth=0.8, alpha=0.9)
            axis.set_xlim(edges[0], edges[-1])
            axis.set_ylim(bottom=0.0)
            if i < len(labels) - 1:
                axis.set_xticklabels([])
        grid[0, j].set_title(f"{name} ({len(found[name][labels[0]])} chains)")
        grid[-1, j].set_xlabel("rank among all draws")
    for i, label in enumerate(labels):
        grid[i, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.align_ylabels(grid[:, 0])
    return figure


def forest(posteriors: Posteriors, sites: Sequence[str] | None = None) -> Figure:
    """Medians with central intervals of 50 % (thick) and 90 % (thin): a panel a site, a line an element and posterior.

    Args:
        posteriors: What was inferred; a point estimate is a dot.
        sites: Names of the sites; None takes all that do not belong to the rows of the data. At most forty elements.

    Raises:
        ValueError: If there is no element to show.
    """
    named = _named(posteriors)
    found = {name: elements(posterior, sites) for name, (posterior, _) in named.items()}
    labels = list(dict.fromkeys(label for own in found.values() for label in own))[:_LINES]
    if not labels:
        raise ValueError("There is nothing to show: the posteriors have no site that does not belong to the data's rows.")
    groups = _apart(labels)
    height = 0.06 + 0.13 * max(1.6, len(named))
    figure = _figure(6.5, 0.45 * len(groups) + height * len(labels) + 0.5)
    ratios = [len(own) for own in groups.values()]
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=ratios)[:, 0]
    for axis, own in zip(panels, groups.values()):
        _dress(axis)
        axis.grid(axis="y", visible=False)
        for j, (name, (_, colour)) in enumerate(named.items()):
            shift = 0.0 if len(named) == 1 else 0.5 * (j / (len(named) - 1) - 0.5)
            for place, label in enumerate(own):
                if label not in found[name]:
                    continue
                low, left, middle, right, high = np.nanquantile(found[name][label], [0.05, 0.25, 0.5, 0.75, 0.95])
                axis.plot([low, high], [place + shift] * 2, color=colour, linewidth=0.9)
                axis.plot([left, right], [place + shift] * 2, color=colour, linewidth=2.6, solid_capstyle="butt")
                axis.plot([middle], [place + shift], color=colour, marker="o", markersize=3.2, linewidth=0)
        axis.set_yticks(range(len(own)), own)
        axis.tick_params(axis="y", length=0)
        axis.set_ylim(len(own) - 0.5, -0.5)
    if len(named) > 1:
        from matplotlib.lines import Line2D

        handles = [Line2D([], [], color=colour, marker="o", markersize=4, label=name) for name, (_, colour) in named.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=min(6, len(named)), frameon=False, fontsize=8)
    return figure


def _apart(labels: Sequence[str]) -> dict[str, list[str]]:
    """Elements that share an axis: those of a site, or, where few columns have names, and so units, those of each column."""
    groups: dict[str, list[str]] = {}
    for site in dict.fromkeys(label.split("[")[0] for label in labels):
        own = [label for label in labels if label.split("[")[0] == site]
        columns = {label: label.removesuffix("]").rpartition(", ")[2] for label in own}
        is_named = 1 < len({*columns.values()}) <= _NAMED and not any(
            name.isdigit() or "[" in name for name in columns.values()
        )
        for label in own:
            groups.setdefault(f"{site} {columns[label]}" if is_named else site, []).append(label)
    return groups


def effective_growth(posteriors: Posteriors, sites: Sequence[str] | None = None) -> Figure:
    """Effective sample size of the first draws, against their number: of the worst element of each site.

    It grows in proportion where chains mix. Where it levels off they are stuck, and more draws would not help.

    Args:
        posteriors: What was inferred; point estimates and guides are left out.
        sites: Names of the sites; None takes all that do not belong to the rows of the data. At most eight sites.

    Raises:
        ValueError: If no posterior comes from Markov chains of forty draws.
    """
    named = _chained(posteriors, 40)
    if not named:
        raise ValueError("There is no growth to show: no posterior has Markov chains of forty draws.")
    figure, axes = _panels(len(named), width=3.4, height=2.8)
    for axis, (name, (posterior, _)) in zip(axes, named.items()):
        chains, draws = posterior.shape
        draws_of = {site: posterior.draws[site] for site in _sites(posterior, sites)[:_ROWS]}
        invariant = relabel.invariant(draws_of, posterior.symmetry)
        counts = np.linspace(draws / 8, draws, 8).round().astype(int)
        for (site, values), colour in zip(invariant.items(), _COLOURS * 2, strict=False):
            sizes = [arviz.ess(values[:, :count].double().numpy()) for count in counts]
            if all(np.isfinite(size).any() for size in sizes):
                curve = [np.nanmin(size) for size in sizes]
                axis.plot(counts * chains, curve, color=colour, marker="o", markersize=2.5, linewidth=1.2, label=site)
        axis.set_title(name)
        axis.set_xlabel("draws of all chains")
        axis.set_ylabel("effective draws")
        axis.set_ylim(bottom=0.0)
        axis.legend(frameon=False, fontsize=7)
    return figure


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
    some = _some(posterior.draws, draws)
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
        names = columns if len(columns) == width else _coordinates(posterior, site, seen.dim() - 1, width)
        for i, name in enumerate(names):
            panels[f"{site}[{name}]"] = (seen[..., i].numpy(), replicated[..., i].numpy())
    if not panels:
        raise ValueError("There is nothing to check: the program observes nothing.")
    shown = dict(list(panels.items())[:_COLUMNS])
    figure, axes = _panels(len(shown), width=3.4, height=2.8)
    for axis, (name, (observed, replications)) in zip(axes, shown.items()):
        _bands(axis, observed, replications)
        axis.set_xlabel(name)
        axis.set_ylabel("share of the rows")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[tuple[Any, str]] = [(Line2D([], [], color=_INK, linewidth=1.4), "data")]
    handles += [(Patch(facecolor=_mix(_COLOURS[0], share)), text) for share, text in _BANDS.values()]
    figure.legend(*zip(*handles), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


_LINES, _COLUMNS, _BINS, _NAMED = 40, 6, 30, 4
_BANDS = {0.9: (0.22, "90 % of the replications"), 0.5: (0.5, "50 %")}  # mass to shade and name


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
        axis.stairs(top, edges, baseline=bottom, fill=True, color=_mix(_COLOURS[0], shade), linewidth=0)
    axis.stairs(np.histogram(seen, edges)[0] / seen.size, edges, color=_INK, linewidth=1.4)
    axis.set_ylim(bottom=0.0)


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def learning_curve(posteriors: Posteriors) -> Figure:
    """What the steps reported: the loss of a guide, the objective of EM, the log-density of every chain.

    Args:
        posteriors: What was inferred; those without a history are left out.

    Raises:
        ValueError: If no posterior has a history.
    """
    named = {name: pair for name, pair in _named(posteriors).items() if pair[0].history}
    if not named:
        raise ValueError("There is no curve to draw: no posterior has a history.")
    figure, axes = _panels(len(named), width=3.4, height=2.8)
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
    figure, axes = _panels(len(names), width=3.4, height=2.6)
    for axis, name, colour in zip(axes, names, _COLOURS * len(names), strict=False):
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


def elements(posterior: Posterior, sites: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Draws of every element of some sites, by a name such as ``means[0, eruptions]``, (chain, draw) each.

    Args:
        posterior: What was inferred.
        sites: Names of the sites; None takes all that do not belong to the rows of the data.
    """
    found = {}
    for site in _sites(posterior, sites):
        values = posterior.draws[site]
        names = [_coordinates(posterior, site, axis, size) for axis, size in enumerate(values.shape[2:])]
        for place, index in enumerate(np.ndindex(*values.shape[2:])):
            label = ", ".join(names[axis][i] for axis, i in enumerate(index))
            found[f"{site}[{label}]" if index else site] = values.reshape(*values.shape[:2], -1)[..., place].double().numpy()
    return found


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
    figure, (axis,) = _panels(1, 5.0, 3.4)
    for (name, curve), colour in zip(curves.items(), (_INK, *_COLOURS), strict=False):
        axis.plot(settings, curve, color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
    if settings[0] > 0 and settings[-1] / settings[0] >= _DECADES:
        axis.set_xscale("log")
    axis.set_xlabel(setting)
    axis.set_ylabel("mean squared error")
    axis.legend(frameon=False, fontsize=8)
    return figure


_DECADES = 100.0  # from which ratio of the largest to the least setting on the axis is logarithmic


def reliability(curves: Mapping[str, Reliability]) -> Figure:
    """Reliability curves, each with the area of its points by the number of rows; the diagonal is perfect calibration."""
    if not curves:
        raise ValueError("reliability needs at least one curve, but curves is empty.")
    figure, (axis,) = _panels(1, 3.8, 3.6)
    axis.plot([0.0, 1.0], [0.0, 1.0], color=_FAINT, linewidth=1.2)
    for (name, curve), colour in zip(curves.items(), _COLOURS * (1 + len(curves) // len(_COLOURS)), strict=False):
        axis.plot(curve.predicted, curve.observed, color=colour, linewidth=1.2, label=name)
        axis.scatter(curve.predicted, curve.observed, s=80.0 * curve.rows / curve.rows.max(), color=colour)
    axis.set_xlabel("predicted probability")
    axis.set_ylabel("observed share")
    axis.legend(frameon=False, fontsize=8)
    return figure


def images(rows: Mapping[str, Tensor]) -> Figure:
    """Pictures in a grid, a named row each: data above their reconstructions, samples of one model above those of another.

    Args:
        rows: Name to pictures, (count, height, width) or (count, channels, height, width) with 1 or 3 channels, from 0 to 1:
            grey ones from white to black, colours from black to bright. What is missing, NaN, is pale red.

    Raises:
        ValueError: If there are none, or one is no row of pictures.
    """
    if not rows:
        raise ValueError("images needs at least one row of pictures, but rows is empty.")
    strips = {name: _pictures(name, pictures) for name, pictures in rows.items()}
    across = max(len(strip) for strip in strips.values())
    figure = _figure(0.62 * across + 1.2, 0.62 * len(strips) + 0.1)
    grid = figure.subplots(len(strips), across, squeeze=False)
    for line, (name, strip) in zip(grid, strips.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, picture in zip(line, strip, strict=False):
            axis.imshow(picture, interpolation="nearest")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8, color=_INK)
    return figure


def _pictures(name: str, pictures: Tensor) -> np.ndarray:
    """Pictures as colours, (count, height, width, 3)."""
    x = pictures.detach().double().cpu()
    if x.dim() not in (3, 4) or not len(x) or (x.dim() == 4 and x.shape[1] not in (1, 3)):
        raise ValueError(
            f"'{name}' has shape {tuple(pictures.shape)}, but must be (count, height, width), or (count, channels, height, "
            "width) with 1 or 3 channels."
        )
    x = x.unsqueeze(1) if x.dim() == 3 else x
    shown = 1.0 - x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    missing = torch.tensor(_MISSING, dtype=x.dtype)[:, None, None]
    return torch.where(shown.isnan(), missing, shown.clamp(0.0, 1.0)).movedim(1, -1).numpy()


_MISSING = (0.95, 0.80, 0.76)


def latent_scatter(codes: Mapping[str, Tensor], labels: Tensor | None = None) -> Figure:
    """Two numbers of each row, one panel a model, coloured by what the models were not told.

    Args:
        codes: Name to codes, (rows, features); of more than two features the two principal axes are shown.
        labels: (rows,); None: one colour.

    Raises:
        ValueError: If there are no codes, or some have fewer than two features, or other rows than the labels.
    """
    if not codes:
        raise ValueError("latent_scatter needs the codes of at least one model, but codes is empty.")
    for name, z in codes.items():
        if z.dim() != 2 or z.shape[1] < 2 or (labels is not None and len(labels) != len(z)):
            known = "" if labels is None else f" for {len(labels)} labels"
            raise ValueError(f"'{name}' has shape {tuple(z.shape)}, but must be (rows, features) of two or more{known}.")
    figure, axes = _panels(len(codes), 3.4, 3.2)
    for axis, (name, z) in zip(axes, codes.items(), strict=True):
        points = z.detach().double().cpu()
        if points.shape[1] > 2:
            centred = points - points.mean(0)
            points = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].mT
        values = [_INK] * len(points) if labels is None else [_hue(int(k)) for k in labels]
        axis.scatter(points[:, 0], points[:, 1], s=4, c=values, linewidths=0, alpha=0.7)
        axis.set_title(name)
    if labels is not None:
        from matplotlib.lines import Line2D

        present = labels.unique().tolist()
        handles = [
            Line2D([], [], color=_hue(int(k)), marker="o", markersize=4, linewidth=0, label=str(int(k))) for k in present
        ]
        figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize=8)
    return figure


def _hue(label: int) -> Any:
    from matplotlib import colormaps

    return colormaps["tab20" if label > 9 else "tab10"](label % 20)


def manifold(mean: Callable[[Tensor], Tensor], size: int = 15, spread: float = 0.95) -> Figure:
    """What a decoder makes of a plane of two hidden numbers, at evenly spaced quantiles of N(0, 1) in both.

    Args:
        mean: Takes z, (count, 2), and returns pictures, (count, height, width) or (count, channels, height, width): of a VAE
            ``lambda z: model.decode(z).mean``.
        size: Pictures across and down, at least 2.
        spread: Mass of N(0, 1) that each side of the plane covers, in (0, 1).
    """
    if size < 2 or not 0.0 < spread < 1.0:
        raise ValueError(f"manifold(size={size}, spread={spread}): size must be at least 2, and spread in (0, 1).")
    tail = 0.5 * (1.0 - spread)
    side = torch.special.ndtri(torch.linspace(tail, 1.0 - tail, size, dtype=torch.float64)).float()
    z = torch.stack([side.repeat(size), side.flip(0).repeat_interleave(size)], 1)
    pictures = _pictures("mean", mean(z))
    high, wide = pictures.shape[1:3]
    sheet = pictures.reshape(size, size, high, wide, 3).transpose(0, 2, 1, 3, 4).reshape(size * high, size * wide, 3)
    figure = _figure(4.0, 4.0 * high / wide)
    axis = figure.subplots()
    axis.imshow(sheet, interpolation="nearest")
    axis.set_axis_off()
    return figure


def traversals(mean: Callable[[Tensor], Tensor], z: Tensor, size: int = 9, reach: float = 2.5) -> Figure:
    """What each hidden number does to a picture: one row a number, which goes from −reach to reach while the others stay.

    Args:
        mean: Takes z, (count, features), and returns pictures, as in ``manifold``.
        z: Where to start, (features,).
        size: Pictures a row.
        reach: How far each number goes, positive.
    """
    if z.dim() != 1:
        raise ValueError(f"z has shape {tuple(z.shape)}, but must be (features,): where one row is.")
    steps = torch.linspace(-reach, reach, size).to(z)
    rows = {}
    for i in range(len(z)):
        points = z.repeat(size, 1)
        points[:, i] = steps
        rows[f"z {i}"] = mean(points)
    return images(rows)


def _named(posteriors: Posteriors) -> dict[str, tuple[Posterior, str]]:
    """Name to posterior and colour, which is the same in every picture of the same posteriors."""
    if isinstance(posteriors, Posterior):
        posteriors = {str(posteriors.info.get("backend", "posterior")): posteriors}
    return {name: (posterior, _COLOURS[i % len(_COLOURS)]) for i, (name, posterior) in enumerate(posteriors.items())}


def _chained(posteriors: Posteriors, least: int) -> dict[str, tuple[Posterior, str]]:
    """Those that come from Markov chains with at least that many draws."""
    return {
        name: (posterior, colour)
        for name, (posterior, colour) in _named(posteriors).items()
        if posterior.info.get("kind", "samples") == "samples" and _count(posterior) >= least
    }


def _count(posterior: Posterior) -> int:
    return next((values.shape[1] for values in posterior.draws.values()), 0)


def _sites(posterior: Posterior, sites: Sequence[str] | None) -> list[str]:
    """The sites asked for, or all that share no dimension with the data."""
    if sites is not None:
        if unknown := [site for site in sites if site not in posterior.draws]:
            raise ValueError(f"sites names '{unknown[0]}', but there are {', '.join(posterior.draws)}.")
        return list(sites)
    rows = {dim for site in posterior.observed for dim in posterior.dims.get(site, ())}
    return [site for site in posterior.draws if not rows & set(posterior.dims.get(site, ()))]


def _coordinates(posterior: Posterior, site: str, axis: int, size: int) -> list[str]:
    dims = posterior.dims.get(site, ())
    labels = posterior.coords.get(dims[axis], ()) if axis < len(dims) else ()
    return [str(label) for label in (labels if len(labels) == size else range(size))]


def _least(posterior: Posterior, sites: Sequence[str] | None) -> dict[str, float]:
    draws = {site: posterior.draws[site] for site in _sites(posterior, sites)}
    invariant = relabel.invariant(draws, posterior.symmetry)
    sizes = {site: arviz.ess(values.double().numpy()) for site, values in invariant.items()}
    return {site: float(np.nanmin(size)) for site, size in sizes.items() if np.isfinite(size).any()}


def _some(draws: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Evenly spaced draws over all chains, (draw, *site)."""
    flat = {site: values.flatten(0, 1) for site, values in draws.items()}
    size = len(next(iter(flat.values())))
    chosen = torch.linspace(0, size - 1, min(size, count)).round().long()
    return {site: values[chosen] for site, values in flat.items()}


def _marginal(model: GMM, draws: Mapping[str, Tensor], features: list[int]) -> dict[str, Tensor]:
    """Draws of the mixture that the chosen columns follow; covariances in the model's own form."""
    covariances = draws["covariances"]
    if model.covariance in ("full", "tied"):
        covariances = covariances[..., features, :][..., features]
    elif model.covariance == "diagonal":
        covariances = covariances[..., features]
    return {"weights": draws["weights"], "means": draws["means"][..., features], "covariances": covariances}


def _matrices(model: GMM, draws: Mapping[str, Tensor]) -> Tensor:
    """Covariance matrix of every component in every draw, (draw, K, D, D)."""
    means, covariances = draws["means"], draws["covariances"]
    if model.covariance == "spherical":
        covariances = covariances[..., None].expand_as(means)
    if model.covariance in ("diagonal", "spherical"):
        covariances = torch.diag_embed(covariances)
    return covariances[:, None].expand(-1, means.shape[1], -1, -1) if model.covariance == "tied" else covariances


def _range(values: Tensor) -> Tensor:
    low, high = values.min(), values.max()
    room = 0.12 * (high - low) if high > low else torch.ones_like(low)
    return torch.linspace(float(low - room), float(high + room), _POINTS, dtype=values.dtype)


def _contours(axis: Axes, model: Scored, x: Tensor, draws: Mapping[str, Tensor], colour: str) -> None:
    across, up = _range(x[:, 0]), _range(x[:, 1])
    points = torch.cartesian_prod(across, up)
    log_density = model.score_samples(points, draws).reshape(len(across), len(up)).T.numpy()
    density = np.exp(log_density - log_density.max())
    ordered = np.sort(density.ravel())[::-1]
    mass = ordered.cumsum() / ordered.sum()
    levels = np.unique([ordered[(mass < share).sum()] for share in _MASSES])
    filled = [*levels, max(1.0 + 1e-9, 1.01 * levels[-1])]
    shades = [_mix(colour, share) for share in np.linspace(0.12, 0.38, len(filled) - 1)]
    axis.contourf(across, up, density, filled, colors=shades, zorder=0.5)
    axis.contour(across, up, density, levels, colors=[colour], linewidths=0.7, alpha=0.7, zorder=1)
    axis.scatter(x[:, 0], x[:, 1], s=7, color=_INK, alpha=0.45, linewidths=0, zorder=2)
    if isinstance(model, GMM):
        matrices = _matrices(model, draws)
        if len(matrices) > 1:
            for i in np.linspace(0, len(matrices) - 1, min(_CLOUD, len(matrices))).round().astype(int):
                _ellipses(axis, draws["means"][i], matrices[i], color=_INK, linewidth=0.4, alpha=0.25)
        _ellipses(axis, draws["means"].mean(0), matrices.mean(0), color=_INK, linewidth=1.6)
    axis.set_xlim(float(across[0]), float(across[-1]))
    axis.set_ylim(float(up[0]), float(up[-1]))


def _ellipses(axis: Axes, means: Tensor, matrices: Tensor, **style: Any) -> None:
    """Two standard deviations of each component: μ + 2 L (cos t, sin t)."""
    turn = torch.linspace(0.0, 2.0 * torch.pi, 100, dtype=means.dtype)
    circle = 2.0 * torch.stack([turn.cos(), turn.sin()])
    for mean, factor in zip(means, torch.linalg.cholesky(matrices)):
        outline = mean[:, None] + factor @ circle
        axis.plot(*outline, zorder=3, **style)


def _curve(axis: Axes, model: Scored, x: Tensor, draws: Mapping[str, Tensor], colour: str) -> None:
    points = _range(x[:, 0])
    axis.hist(x[:, 0].numpy(), bins=min(40, 5 + int(len(x) ** 0.5)), density=True, color=_FAINT, zorder=0.5)
    if isinstance(model, GMM):
        weights, means, variances = draws["weights"], draws["means"], _matrices(model, draws)[..., 0, 0]
        distance = (points[:, None, None] - means[..., 0]).square() / variances
        shares = weights * (-0.5 * distance).exp() / (2.0 * torch.pi * variances).sqrt()
        axis.plot(points, shares.mean(1), color=_INK, linewidth=0.9, linestyle="--")
    axis.plot(points, model.score_samples(points[:, None], draws).exp(), color=colour, linewidth=2.0)
    axis.set_ylim(bottom=0.0)


def _explain(figure: Figure, dimensions: int, has_components: bool) -> None:
    """What is drawn, below the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if dimensions == 2:
        handles = [
            (Line2D([], [], color=_INK, alpha=0.6, marker="o", markersize=3, linewidth=0), "data"),
            (Patch(facecolor=_mix(_INK, 0.25), edgecolor=_INK), "50, 80, 95 % of the predicted mass"),
        ]
        handles += [(Line2D([], [], color=_INK, linewidth=1.6), "components, two standard deviations")] * has_components
        handles += [(Line2D([], [], color=_INK, linewidth=0.4), "the same at single draws")] * has_components
    else:
        handles = [(Patch(facecolor=_FAINT), "data"), (Line2D([], [], color=_INK, linewidth=2.0), "predicted density")]
        handles += [(Line2D([], [], color=_INK, linewidth=0.9, linestyle="--"), "each component's part")] * has_components
    figure.legend(*zip(*handles), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)


def _mix(colour: str, share: float) -> tuple[float, float, float]:
    """The colour, with white where the share is below 1, with black where it is above."""
    from matplotlib.colors import to_rgb

    red, green, blue = (1.0 - share * (1.0 - c) if share <= 1.0 else c * (2.0 - share) for c in to_rgb(colour))
    return red, green, blue


def _figure(width: float, height: float) -> Figure:
    """A figure of its own: nothing of pyplot, whose state is global, and no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _panels(count: int, width: float, height: float, **share: Any) -> tuple[Figure, list[Axes]]:
    across = _across(count)
    down = -(-count // across)
    figure = _figure(width * across + 0.4, height * down)
    grid = figure.subplots(down, across, squeeze=False, **share).ravel()
    for axis in grid[count:]:
        axis.remove()
    for axis in grid[:count]:
        _dress(axis)
    return figure, list(grid[:count])


def _across(count: int) -> int:
    return 2 if count == 4 else min(count, 3)


def _dress(axis: Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(_INK)
    axis.tick_params(colors=_INK, labelsize=8)
    axis.grid(color=_FAINT, linewidth=0.5)
    axis.set_axisbelow(True)
    axis.title.set_fontsize(10)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_fontsize(9)
        label.set_color(_INK)
