"""Densities of fitted models over the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.classical import GMM
from pyro_genmodels.plots.posteriors import Posteriors, coloured, spaced
from pyro_genmodels.plots.style import FAINT, INK, columns_for, mix, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Scored", "density_contours"]

_MASSES = (0.95, 0.8, 0.5)  # held by the contours
_DRAWS, _POINTS, _CLOUD = 100, 120, 20


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
    named = coloured(posteriors)
    labels = [columns[i] if columns is not None else f"x{i + 1}" for i in shown]
    figure, axes = panels_of(len(named), width=3.4, height=3.3, sharey=True)
    for axis, (name, (posterior, colour)) in zip(axes, named.items()):
        draws = spaced(posterior.draws, _DRAWS)
        if isinstance(model, GMM):
            draws = _marginal(model, draws, shown)
        panel = _curve if len(shown) == 1 else _contours
        panel(axis, model, x[:, shown], draws, colour)
        axis.set_title(name)
        axis.set_xlabel(labels[0])
    for axis in axes[:: columns_for(len(named))]:
        axis.set_ylabel(labels[1] if len(shown) == 2 else "density")
    _explain(figure, len(shown), isinstance(model, GMM))
    return figure


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
    shades = [mix(colour, share) for share in np.linspace(0.12, 0.38, len(filled) - 1)]
    axis.contourf(across, up, density, filled, colors=shades, zorder=0.5)
    axis.contour(across, up, density, levels, colors=[colour], linewidths=0.7, alpha=0.7, zorder=1)
    axis.scatter(x[:, 0], x[:, 1], s=7, color=INK, alpha=0.45, linewidths=0, zorder=2)
    if isinstance(model, GMM):
        matrices = _matrices(model, draws)
        if len(matrices) > 1:
            for i in np.linspace(0, len(matrices) - 1, min(_CLOUD, len(matrices))).round().astype(int):
                _ellipses(axis, draws["means"][i], matrices[i], color=INK, linewidth=0.4, alpha=0.25)
        _ellipses(axis, draws["means"].mean(0), matrices.mean(0), color=INK, linewidth=1.6)
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
    axis.hist(x[:, 0].numpy(), bins=min(40, 5 + int(len(x) ** 0.5)), density=True, color=FAINT, zorder=0.5)
    if isinstance(model, GMM):
        weights, means, variances = draws["weights"], draws["means"], _matrices(model, draws)[..., 0, 0]
        distance = (points[:, None, None] - means[..., 0]).square() / variances
        shares = weights * (-0.5 * distance).exp() / (2.0 * torch.pi * variances).sqrt()
        axis.plot(points, shares.mean(1), color=INK, linewidth=0.9, linestyle="--")
    axis.plot(points, model.score_samples(points[:, None], draws).exp(), color=colour, linewidth=2.0)
    axis.set_ylim(bottom=0.0)


def _explain(figure: Figure, dimensions: int, has_components: bool) -> None:
    """What is drawn, below the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    if dimensions == 2:
        handles = [
            (Line2D([], [], color=INK, alpha=0.6, marker="o", markersize=3, linewidth=0), "data"),
            (Patch(facecolor=mix(INK, 0.25), edgecolor=INK), "50, 80, 95 % of the predicted mass"),
        ]
        handles += [(Line2D([], [], color=INK, linewidth=1.6), "components, two standard deviations")] * has_components
        handles += [(Line2D([], [], color=INK, linewidth=0.4), "the same at single draws")] * has_components
    else:
        handles = [(Patch(facecolor=FAINT), "data"), (Line2D([], [], color=INK, linewidth=2.0), "predicted density")]
        handles += [(Line2D([], [], color=INK, linewidth=0.9, linestyle="--"), "each component's part")] * has_components
    figure.legend(*zip(*handles), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8)
