"""Draws as arrays: what the export and the diagnosis both need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_numpy", "is_whole"]


def is_whole(values: Tensor) -> bool:
    return not values.is_floating_point() or bool((values == values.round()).all())


def as_numpy(tensor: Tensor) -> np.ndarray:
    """As numpy; half precisions, which netCDF or numpy lack, become float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor).numpy()
