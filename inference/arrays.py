"""Draws as arrays, and their elements: what the export, the diagnosis and the calibration need."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_numpy", "is_whole", "label", "spaced"]


def is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() or bool((values == values.round()).all())


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
