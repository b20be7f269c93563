"""Draws as arrays, and their elements: what the loop, the export, the diagnosis and the calibration need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_numpy", "corner", "is_whole", "label", "ragged", "spaced"]


def is_whole(values: Tensor) -> bool:
    """Whether all values are whole numbers, of whatever type."""
    return not values.is_floating_point() or bool((values == values.round()).all())


def corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """The part of ``tensor`` where ``ragged`` has put a value of this shape, as a view; it may not be larger."""
    return tensor[(0,) * (tensor.dim() - len(shape)) + tuple(slice(size) for size in shape)]


def ragged(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stacks tensors of rows that have not all the same names and shapes.

    Returns:
        Name to (row, *largest shape). NaN where a row has no such name, and beyond the size of its value, which lies at
        the beginning of every dimension; integers become floating if there is any of that.
    """
    stacked = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = {i: row[name] for i, row in enumerate(rows) if name in row}
        shapes = {value.shape for value in values.values()}
        if len(values) == len(rows) and len(shapes) == 1:
            stacked[name] = torch.stack([*values.values()])
            continue
        rank = max(len(shape) for shape in shapes)
        largest = [max(sizes) for sizes in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True)]
        first = next(iter(values.values()))
        floating = [value.dtype for value in values.values() if value.is_floating_point()]
        padded = first.new_full((len(rows), *largest), torch.nan, dtype=floating[0] if floating else torch.float64)
        for i, value in values.items():
            corner(padded[i], value.shape).copy_(value)
        stacked[name] = padded
    return stacked


def as_numpy(tensor: Tensor) -> np.ndarray:
    """As numpy; half precisions, which netCDF or numpy lack, become float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()


def label(name: str, index: int, shape: Sequence[int]) -> str:
    """An element of a site by its index into the flat value: "mu", or "beta[2, 0]"."""
    return f"{name}[{', '.join(map(str, np.unravel_index(index, shape)))}]" if shape else name


def spaced(count: int, most: int) -> np.ndarray:
    """Indices of ``count`` elements, or of ``most`` evenly spaced ones among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
