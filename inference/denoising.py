"""Training of denoisers, scores and energies: a loss of each row, with times and noise drawn inside, is lowered."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

__all__ = ["RowLoss"]


@runtime_checkable
class RowLoss(Protocol):
    """What a module is trained for, a frozen dataclass; ``Denoising`` lowers its mean over the rows.

    Times and noise are drawn inside, by torch's global generator.
    """

    def rows(self, module: Any, x: Tensor, context: Tensor | None) -> Tensor:
        """The loss of each row, (rows,), with gradients in the weights of the module.

        Args:
            module: The model that is trained.
            x: Data, (rows, …).
            context: What the data are conditioned on, (rows, …); None without.
        """
