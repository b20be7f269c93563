"""Small convolutional networks, for images of any size: each layer halves or doubles height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn

from pyro_genmodels.nets.mlp import MLP, initialise

__all__ = ["ConvDecoder", "ConvEncoder"]

_KERNEL, _STRIDE, _PADDING = 4, 2, 1  # an even kernel reaches every pixel equally often: no checkerboards


class ConvEncoder(nn.Module):
    """Reads images: convolutions that halve them, then fully connected layers.

    Args:
        shape: (height, width) or (channels, height, width).
        outputs: Numbers out.
        channels: Of the convolutions.
        hidden: Widths of the fully connected layers between them and the output.
        context: Numbers that come along with each image; they enter the fully connected layers.
        activation: Class of the activations.

    Example:
        >>> import torch
        >>> ConvEncoder((8, 8), 40)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 40])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        channels: Sequence[int] = (32, 64),
        hidden: Sequence[int] = (128,),
        context: int = 0,
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        self.shape = _image(shape)
        sizes = _halved(self.shape[1:], len(channels))
        layers: list[nn.Module] = []
        for wide, narrow in zip([self.shape[0], *channels[:-1]], channels, strict=True):
            layer = nn.Conv2d(wide, narrow, _KERNEL, _STRIDE, _PADDING)
            layers += [initialise(layer, activation), activation()]
        self.layers = nn.Sequential(*layers)
        self.head = MLP(channels[-1] * sizes[-1][0] * sizes[-1][1] + context, outputs, hidden, activation)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """The output, (batch, outputs), of images (batch, *shape)."""
        result: Tensor = self.head(self.layers(x.reshape(-1, *self.shape)), *context)
        return result


class ConvDecoder(nn.Module):
    """Writes images: fully connected layers, then transposed convolutions that double them.

    Args:
        inputs: Numbers in, of all inputs together.
        shape: (height, width) or (channels, height, width).
        outputs: Numbers out per pixel and channel, what a likelihood asks for.
        channels: Of the layers before the image.
        hidden: Widths of the fully connected layers.
        activation: Class of the activations.

    Example:
        >>> import torch
        >>> ConvDecoder(20, (3, 32, 32), outputs=2)(torch.zeros(5, 20)).shape
        torch.Size([5, 2, 3, 32, 32])
    """

    def __init__(
        self,
        inputs: int,
        shape: Sequence[int],
        outputs: int = 1,
        channels: Sequence[int] = (64, 32),
        hidden: Sequence[int] = (128,),
        activation: type[nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        image = _image(shape)
        self.image = (outputs, *shape)
        sizes = _halved(image[1:], len(channels))[::-1]
        self.first = (channels[0], *sizes[0])
        self.head = MLP(inputs, channels[0] * sizes[0][0] * sizes[0][1], hidden, activation)
        layers: list[nn.Module] = [activation()]
        for i, (wide, narrow) in enumerate(zip(channels, [*channels[1:], outputs * image[0]], strict=True)):
            odd = (sizes[i + 1][0] - 2 * sizes[i][0], sizes[i + 1][1] - 2 * sizes[i][1])
            layer = nn.ConvTranspose2d(wide, narrow, _KERNEL, _STRIDE, _PADDING, output_padding=odd)
            is_last = i == len(channels) - 1
            layers += [initialise(layer, None if is_last else activation)] + [activation()] * (not is_last)
        initialise(cast(nn.Linear, self.head.layers[-1]), activation)  # it is not the last of this network
        self.layers = nn.Sequential(*layers)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The output, (batch, outputs, *shape), of inputs (batch, …)."""
        result: Tensor = self.layers(self.head(*inputs).reshape(-1, *self.first))
        return result.reshape(-1, *self.image)


def _image(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) == 2:
        return 1, shape[0], shape[1]
    if len(shape) != 3:
        raise ValueError(f"shape is {tuple(shape)}, but must be (height, width) or (channels, height, width).")
    return shape[0], shape[1], shape[2]


def _halved(size: Sequence[int], times: int) -> list[tuple[int, int]]:
    """Height and width before and after each halving, which rounds down."""
    if times < 1:
        raise ValueError("channels is empty, but there must be at least one convolution. Take an MLP for none.")
    sizes = [(size[0] >> i, size[1] >> i) for i in range(times + 1)]
    if min(sizes[-1]) < 1:
        most = min(size).bit_length() - 1
        raise ValueError(
            f"Images of {size[0]} x {size[1]} cannot be halved {times} times. Give at most {most} channels, one for each "
            "halving."
        )
    return sizes
