"""Networks of diffusion for rows of numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_genmodels.nets.embedding import Conditioning
from pyro_genmodels.nets.mlp import initialise, silent

__all__ = ["PointNetwork"]


class PointNetwork(nn.Module):
    """Reads a row of numbers and a noise level: residual blocks of which each is scaled and shifted by the level.

        h ← h + W₂ silu((1 + a) norm(W₁ h) + b),  a, b linear in what is told of level and context

    The last layer of every block and that of the network start at 0.

    Args:
        features: Numbers in a row, D.
        outputs: Numbers out for each of them: 1, or 2 with a learned variance.
        width: Of the hidden layers, even.
        blocks: Residual blocks.
        context: Numbers in a row of the context; 0: there is none.
        classes: Labels that a context may be, in place of ``context``; 0: there are none.

    References:
        E. Perez et al., FiLM: visual reasoning with a general conditioning layer (2018).

    Example:
        >>> PointNetwork(2)(torch.zeros(5, 2), torch.zeros(5)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, features: int, outputs: int = 1, width: int = 128, blocks: int = 3, context: int = 0, classes: int = 0
    ) -> None:
        super().__init__()
        for name, value in {"features": features, "outputs": outputs, "width": width, "blocks": blocks}.items():
            if value < 1:
                raise ValueError(f"{name} is {value}, but must be at least 1.")
        self.features = features
        self.told = Conditioning(width, context, classes)
        self.first = initialise(nn.Linear(features, width), nn.SiLU)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.last = nn.Sequential(nn.SiLU(), silent(nn.Linear(width, outputs * features)))

    def forward(self, x: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """The output, (rows, outputs · D).

        Args:
            x: (rows, D).
            level: (rows,).
            context: (rows, context) or labels (rows,), if it was built for one.
        """
        if x.dim() != 2 or x.shape[1] != self.features:
            raise ValueError(f"x is (rows, {self.features}), but has the shape {tuple(x.shape)}.")
        told = self.told(level, context)
        hidden = self.first(x)
        for block in self.blocks:
            hidden = block(hidden, told)
        found: Tensor = self.last(hidden)
        return found


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = silent(nn.Linear(width, 2 * width))
        self.outer = silent(nn.Linear(width, width))

    def forward(self, hidden: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(nn.functional.silu(told)).chunk(2, -1)
        inner = self.norm(self.inner(nn.functional.silu(hidden)))
        found: Tensor = hidden + self.outer(nn.functional.silu(torch.addcmul(shift, inner, 1.0 + scale)))
        return found
