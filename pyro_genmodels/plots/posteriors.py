"""Chains, intervals, effective sizes and ranks of posteriors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inference import Posterior, arviz, relabel
from pyro_genmodels.plots.style import COLOURS, FAINT, INK, dress, figure_of, mix, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Posteriors", "coloured", "coordinates_of", "effective_growth", "effective_sizes", "elements", "forest", "ranks",
    "spaced", "traces",
]  # fmt: skip

Posteriors = Posterior | Mapping[str, Posterior]
RGB = tuple[float, float, float]

_ROWS, _LINES, _NAMED = 8, 40, 4


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

    def draw(axis: Axes, values: np.ndarray, colours: Sequence[RGB]) -> None:
        step = -(-values.shape[1] // 1000)
        for chain, colour in zip(values[:, ::step], colours):
            axis.plot(np.arange(len(chain)) * step, chain, color=colour, linewidth=0.4, alpha=0.8)
        axis.set_xlim(0, values.shape[1] - 1)

    return _grid(named, sites, draw, "draw", sharey="row")


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
    figure = figure_of(9.0, 1.0 + 0.28 * len(labels) * len(named))
    for axis, is_rate in zip(figure.subplots(1, 2, sharey=True), (False, True)):
        dress(axis)
        thickness = 0.8 / len(named)
        for j, (name, (posterior, colour)) in enumerate(named.items()):
            seconds = float(posterior.info.get("sampling_time", np.nan)) if is_rate else 1.0
            lengths = [sizes[name][label] / seconds for label in labels]
            places = np.arange(len(labels)) + (j - 0.5 * (len(named) - 1)) * thickness
            bars = axis.barh(places, lengths, 0.86 * thickness, color=colour, label=name)
            axis.bar_label(bars, fmt=_rounded, padding=3, color=INK, fontsize=8)
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

    def draw(axis: Axes, values: np.ndarray, colours: Sequence[RGB]) -> None:
        chains, draws = values.shape
        bins = min(20, max(4, draws // 20))
        rank = rankdata(values, method="average").reshape(values.shape)
        edges = np.linspace(0.5, chains * draws + 0.5, bins + 1)
        low, high = binom.ppf([0.005, 0.995], draws, 1.0 / bins)
        axis.axhspan(low, high, color=FAINT, alpha=0.6, linewidth=0)
        for own, colour in zip(rank, colours):
            axis.stairs(np.histogram(own, edges)[0], edges, color=colour, linewidth=0.8, alpha=0.9)
        axis.set_xlim(edges[0], edges[-1])
        axis.set_ylim(bottom=0.0)

    return _grid(named, sites, draw, "rank among all draws")


def forest(posteriors: Posteriors, sites: Sequence[str] | None = None) -> Figure:
    """Medians with central intervals of 50 % (thick) and 90 % (thin): a panel a site, a line an element and posterior.

    Args:
        posteriors: What was inferred; a point estimate is a dot.
        sites: Names of the sites; None takes all that do not belong to the rows of the data. At most forty elements.

    Raises:
        ValueError: If there is no element to show.
    """
    named = coloured(posteriors)
    found = {name: elements(posterior, sites) for name, (posterior, _) in named.items()}
    labels = list(dict.fromkeys(label for own in found.values() for label in own))[:_LINES]
    if not labels:
        raise ValueError("There is nothing to show: the posteriors have no site that does not belong to the data's rows.")
    groups = _apart(labels)
    height = 0.06 + 0.13 * max(1.6, len(named))
    figure = figure_of(6.5, 0.45 * len(groups) + height * len(labels) + 0.5)
    ratios = [len(own) for own in groups.values()]
    panels = figure.subplots(len(groups), squeeze=False, height_ratios=ratios)[:, 0]
    for axis, own in zip(panels, groups.values()):
        dress(axis)
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


def _grid(
    named: Mapping[str, tuple[Posterior, str]],
    sites: Sequence[str] | None,
    draw: Callable[[Axes, np.ndarray, Sequence[RGB]], None],
    below: str,
    **shared: Any,
) -> Figure:
    """A row for each element of the sites, at most eight, a column for each posterior.

    ``draw(axis, values (chain, draw), colours of the chains)`` fills a panel; ``below`` names the horizontal axis.
    """
    found = {name: elements(posterior, sites) for name, (posterior, _) in named.items()}
    labels = list(next(iter(found.values())))[:_ROWS]
    figure = figure_of(2.6 * max(len(named), 2) + 0.6, 0.95 * len(labels) + 0.8)
    grid = figure.subplots(len(labels), len(named), squeeze=False, sharex="col", **shared)
    for j, (name, (_, colour)) in enumerate(named.items()):
        for i, label in enumerate(labels):
            values = found[name][label]
            dress(grid[i, j])
            draw(grid[i, j], values, [mix(colour, shade) for shade in np.linspace(1.35, 0.45, len(values))])
        grid[0, j].set_title(f"{name} ({len(found[name][labels[0]])} chains)")
        grid[-1, j].set_xlabel(below)
    for i, label in enumerate(labels):
        grid[i, 0].set_ylabel(label, rotation=0, ha="right", va="center")
    figure.align_ylabels(grid[:, 0])
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
    figure, axes = panels_of(len(named), width=3.4, height=2.8)
    for axis, (name, (posterior, _)) in zip(axes, named.items()):
        chains, draws = posterior.shape
        draws_of = {site: posterior.draws[site] for site in _sites(posterior, sites)[:_ROWS]}
        invariant = relabel.invariant(draws_of, posterior.symmetry)
        counts = np.linspace(draws / 8, draws, 8).round().astype(int)
        for (site, values), colour in zip(invariant.items(), COLOURS * 2, strict=False):
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


def elements(posterior: Posterior, sites: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Draws of every element of some sites, by a name such as ``means[0, eruptions]``, (chain, draw) each.

    Args:
        posterior: What was inferred.
        sites: Names of the sites; None takes all that do not belong to the rows of the data.
    """
    found = {}
    for site in _sites(posterior, sites):
        values = posterior.draws[site]
        names = [coordinates_of(posterior, site, axis, size) for axis, size in enumerate(values.shape[2:])]
        for place, index in enumerate(np.ndindex(*values.shape[2:])):
            label = ", ".join(names[axis][i] for axis, i in enumerate(index))
            found[f"{site}[{label}]" if index else site] = values.reshape(*values.shape[:2], -1)[..., place].double().numpy()
    return found


def spaced(draws: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Evenly spaced draws over all chains, (draw, *site)."""
    flat = {site: values.flatten(0, 1) for site, values in draws.items()}
    size = len(next(iter(flat.values())))
    chosen = torch.linspace(0, size - 1, min(size, count)).round().long()
    return {site: values[chosen] for site, values in flat.items()}


def coloured(posteriors: Posteriors) -> dict[str, tuple[Posterior, str]]:
    """Name to posterior and colour, which is the same in every picture of the same posteriors."""
    if isinstance(posteriors, Posterior):
        posteriors = {str(posteriors.info.get("backend", "posterior")): posteriors}
    return {name: (posterior, COLOURS[i % len(COLOURS)]) for i, (name, posterior) in enumerate(posteriors.items())}


def _chained(posteriors: Posteriors, least: int) -> dict[str, tuple[Posterior, str]]:
    """Those that come from Markov chains with at least that many draws."""
    return {
        name: (posterior, colour)
        for name, (posterior, colour) in coloured(posteriors).items()
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


def coordinates_of(posterior: Posterior, site: str, axis: int, size: int) -> list[str]:
    """Labels along an axis of a site, numbers where it has none."""
    dims = posterior.dims.get(site, ())
    labels = posterior.coords.get(dims[axis], ()) if axis < len(dims) else ()
    return [str(label) for label in (labels if len(labels) == size else range(size))]


def _least(posterior: Posterior, sites: Sequence[str] | None) -> dict[str, float]:
    draws = {site: posterior.draws[site] for site in _sites(posterior, sites)}
    invariant = relabel.invariant(draws, posterior.symmetry)
    sizes = {site: arviz.ess(values.double().numpy()) for site, values in invariant.items()}
    return {site: float(np.nanmin(size)) for site, size in sizes.items() if np.isfinite(size).any()}


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
