"""Fully connected networks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

__all__ = ["MLP", "initialise", "silent"]

_RECTIFIERS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Softplus)
_LAST_GAIN = 0.1  # of the last layer: a fit starts where the network says little of its input


class MLP(nn.Module):
    """Fully connected layers, an activation after all but the last.

    Weights start as N(0, g² / inputs of the layer), with g² = 2 before a rectifier and 1 before another activation, so that
    signals keep their scale on the way through; those of the last layer are ten times as small. Biases start at 0.

    Args:
        inputs: Numbers in, of all inputs together.
        outputs: Numbers out.
        hidden: Widths of the hidden layers; () makes the network linear.
        activation: Class of the activations.

    References:
        K. He, X. Zhang, S. Ren and J. Sun, Delving deep into rectifiers (2015).

    Example:
        >>> MLP(64 + 10, 40)(torch.zeros(5, 8, 8), torch.zeros(5, 10)).shape
        torch.Size([5, 40])
    """

    def __init__(
        self, inputs: int, outputs: int, hidden: Sequence[int] = (512, 256), activation: type[nn.Module] = nn.ReLU
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden, outputs]
        bad = [width for width in widths if width < 1]
        if bad:
            raise ValueError(
                f"MLP({inputs}, {outputs}, hidden={tuple(hidden)}) has a layer of {bad[0]}; all need at least 1."
            )
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(widths[:-1]):
            layers += [initialise(nn.Linear(wide, narrow), activation), activation()]
        self.layers = nn.Sequential(*layers, initialise(nn.Linear(widths[-2], outputs)))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output.

        Args:
            *inputs: Each (batch, …) or (batch,); they are flattened and stand side by side.

        Returns:
            (batch, outputs).
        """
        flat = [part.reshape(len(part), -1) for part in inputs]
        result: Tensor = self.layers(flat[0] if len(flat) == 1 else torch.cat(flat, -1))
        return result


def initialise(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, activation: type[nn.Module] | None = None) -> nn.Module:
    """Sets where a layer starts, and returns it.

    Args:
        layer: The layer.
        activation: Class of the activation after it; None: it is the last.
    """
    gain = _LAST_GAIN if activation is None else 2.0**0.5 if issubclass(activation, _RECTIFIERS) else 1.0
    weight = layer.weight
    fan_in = weight[0].numel()
    if isinstance(layer, nn.ConvTranspose2d):  # (in, out, *kernel); a stride spreads the kernel over as many outputs
        fan_in = weight.shape[0] * weight[0, 0].numel() // (layer.stride[0] * layer.stride[1])
    nn.init.normal_(weight, std=gain / max(fan_in, 1) ** 0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def silent(layer: nn.Linear | nn.Conv2d) -> nn.Module:
    """The layer, of which nothing comes at first: what it is added to begins as it was."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
