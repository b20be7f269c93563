"""How a network is told of a noise level, and of a context."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["Conditioning", "Waves"]

_SLOWEST, _FASTEST = 0.25, 4.0  # angular frequencies: levels λ/4 span about ten, and a flow is to be smooth along them


class Waves(nn.Module):
    """Numbers as sines and cosines of geometrically spaced frequencies.

    Args:
        features: Numbers out, even.

    References:
        A. Vaswani et al., Attention is all you need (2017), section 3.5.

    Example:
        >>> Waves(8)(torch.zeros(5)).shape
        torch.Size([5, 8])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 4 or features % 2:
            raise ValueError(f"features is {features}, but must be an even number of at least 4: a sine and a cosine each.")
        steps = torch.linspace(math.log(_SLOWEST), math.log(_FASTEST), features // 2)
        self.frequencies: Tensor
        self.register_buffer("frequencies", steps.exp(), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """(rows, features), of values (rows,)."""
        angles = values[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


class Conditioning(nn.Module):
    """What a network is told beside x: the noise level, and a context if there is one, as one vector a row.

    A context is a row of numbers, or a label, an integer from 0. Rows of label −1 have none, as has every row where
    no context is given: so that one network serves with and without, as guidance without a classifier needs.

    Args:
        width: Numbers out, even.
        context: Numbers in a row of the context; 0: there is none.
        classes: How many labels there are, in place of ``context``; 0: there are none.
    """

    def __init__(self, width: int, context: int = 0, classes: int = 0) -> None:
        super().__init__()
        if context and classes:
            raise ValueError(f"A context is numbers or labels, but context is {context} and classes is {classes}.")
        self.context, self.classes = context, classes
        self.level = nn.Sequential(Waves(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.beside: nn.Module | None = None
        if context:
            self.beside = nn.Linear(context, width)
        elif classes:
            self.beside = nn.Embedding(classes + 1, width)
            nn.init.zeros_(self.beside.weight)

    def forward(self, level: Tensor, context: Tensor | None = None) -> Tensor:
        """(rows, width).

        Args:
            level: The second argument of a network, (rows,).
            context: (rows, context), or labels (rows,); None without.

        Raises:
            ValueError: A context that it was not built for.
        """
        told: Tensor = self.level(level)
        if context is None:
            return told + self.beside.weight[0] if isinstance(self.beside, nn.Embedding) else told
        if self.beside is None:
            raise ValueError(
                f"A context of shape {tuple(context.shape)} came, but this network was built without one. Build it with "
                "context=, the numbers in a row of it, or classes=, the number of labels."
            )
        if isinstance(self.beside, nn.Embedding):
            if context.is_floating_point() or context.shape != level.shape:
                raise ValueError(
                    f"The context of this network is one label a row, integers {tuple(level.shape)}, but it came as "
                    f"{context.dtype} of shape {tuple(context.shape)}."
                )
            try:
                return told + self.beside(context + 1)
            except IndexError as error:
                raise IndexError(
                    f"Labels of this network are from 0 to {self.classes - 1}, or −1 for none, but these go from "
                    f"{int(context.min())} to {int(context.max())}."
                ) from error
        if context.shape != (len(level), self.context):
            raise ValueError(
                f"The context of this network is {self.context} numbers a row, ({len(level)}, {self.context}), but it has "
                f"the shape {tuple(context.shape)}."
            )
        found: Tensor = told + self.beside(context.to(told))
        return found
