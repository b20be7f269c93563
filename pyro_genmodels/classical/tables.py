"""What models ask of a table of numbers before the first step, and the scale that their priors take from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["check_known", "check_table", "check_weights", "moments", "principal"]

_ROWS = 2**14  # that are looked at together
_FLAT = 1e-12  # deviation beside the largest entry below which a column is constant, but for rounding


def check_table(x: Tensor, owner: str, features: int | None = None, is_whole: bool = False) -> None:
    """Raises ValueError unless x is a floating table (rows, features) without infinite entries.

    Args:
        x: The table.
        owner: What it is for.
        features: The number of columns that it must have; None: any.
        is_whole: Whether NaN is refused as well.
    """
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, but must be a table (rows, features).")
    if not x.shape[1]:
        raise ValueError("x has no columns, but must be a table (rows, features).")
    if not len(x):
        raise ValueError("x has no rows.")
    if not x.is_floating_point():
        raise ValueError(f"x holds {str(x.dtype).removeprefix('torch.')}, but must be floating: pass x.double().")
    if features is not None and x.shape[1] != features:
        raise ValueError(f"x has {x.shape[1]} features, but this {owner} was built for {features}.")
    bad = (~x.isfinite() if is_whole else x.isinf()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise ValueError(
            f"x holds {len(bad)} values that are {'NaN or infinite' if is_whole else 'infinite'}, the first in row {row}, "
            f"column {column}. Remove these rows, or {'fill them in' if is_whole else 'set what is not known to NaN'}."
        )


def check_weights(row_weights: Tensor, rows: int) -> None:
    """Raises ValueError unless there is a weight for each row, none of them negative and not all zero."""
    if row_weights.shape != (rows,):
        raise ValueError(f"row_weights has shape {tuple(row_weights.shape)}, but must be ({rows},): one for each row of x.")
    if not row_weights.is_floating_point():
        raise ValueError("row_weights must be floating: pass row_weights.double().")
    bad = (~(row_weights >= 0) | row_weights.isinf()).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"row_weights must be finite and not negative, but that of row {row} is {float(row_weights[row])}.")
    if not bool((row_weights > 0).any()):
        raise ValueError("row_weights are all zero: no row counts.")


def check_known(x: Tensor, row_weights: Tensor | None = None) -> None:
    """Raises ValueError unless every column has a value that is known, in a row that counts."""
    counts = torch.ones_like(x, dtype=torch.bool) if row_weights is None else (row_weights > 0)[:, None]
    empty = (~(~x.isnan() & counts).any(0)).nonzero()
    if len(empty):
        raise ValueError(
            f"Column {int(empty[0])} of x has no value that is known{'' if row_weights is None else ' and counts'}. "
            "Remove the column."
        )


def moments(x: Tensor, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what is known of each column, (D,); of a constant column the latter counts as 1."""
    weights = x.new_ones(len(x)) if row_weights is None else row_weights.to(x)
    parts = [*zip(x.split(_ROWS), weights.split(_ROWS), strict=True)]  # temporaries of all rows would be larger than x

    def added(of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack(
            [(weight[:, None] * torch.where(part.isnan(), 0.0, of(part))).sum(0) for part, weight in parts]
        ).sum(0)

    total = added(torch.ones_like)
    location = added(lambda part: part) / total
    deviation = (added(lambda part: (part - location).square()) / total).sqrt()
    largest = torch.stack([torch.where(part.isnan(), 0.0, part).abs().amax(0) for part, _ in parts]).amax(0)
    return location, torch.where(deviation > _FLAT * largest, deviation, torch.ones_like(deviation))


def principal(u: Tensor) -> Tensor:
    """The direction in which centred rows (rows, D) are spread the most, (D,)."""
    if len(u) <= max(_ROWS, u.shape[1]):
        found: Tensor = torch.linalg.svd(u, full_matrices=False).Vh[0]
        return found
    square = torch.stack([(part.mT @ part).double() for part in u.split(_ROWS)]).sum(0)
    return torch.linalg.eigh(square).eigenvectors[:, -1].to(u)
