"""Images, and the latent spaces that they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_genmodels.plots.style import INK, figure_of, panels_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["images", "latent_scatter", "manifold", "traversals"]

_MISSING = (0.95, 0.80, 0.76)


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
    figure = figure_of(0.62 * across + 1.2, 0.62 * len(strips) + 0.1)
    grid = figure.subplots(len(strips), across, squeeze=False)
    for line, (name, strip) in zip(grid, strips.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, picture in zip(line, strip, strict=False):
            axis.imshow(picture, interpolation="nearest")
        line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8, color=INK)
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
    figure, axes = panels_of(len(codes), 3.4, 3.2)
    for axis, (name, z) in zip(axes, codes.items(), strict=True):
        points = z.detach().double().cpu()
        if points.shape[1] > 2:
            centred = points - points.mean(0)
            points = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].mT
        values = [INK] * len(points) if labels is None else [_hue(int(k)) for k in labels]
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
    figure = figure_of(4.0, 4.0 * high / wide)
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
