"""Networks that tell data from draws: one number a row, the higher the more like data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pyro_genmodels.nets import MLP, ConvEncoder

__all__ = ["ConvCritic", "Critic"]


class _Leaky(nn.LeakyReLU):
    """A leaky rectifier of slope 0.2."""

    def __init__(self) -> None:
        super().__init__(0.2)


class Critic(nn.Module):
    """A fully connected critic.

    Args:
        shape: Of one x, such as (28, 28).
        context: Numbers in a row of what is given beside x; 0: nothing is.
        hidden: Widths of the hidden layers.
        spectral: Whether the weight of each layer is divided by its largest singular value, so that the critic is
            1-Lipschitz up to the slopes of its activations.

    References:
        T. Miyato, T. Kataoka, M. Koyama and Y. Yoshida, Spectral normalization for generative adversarial networks (2018).

    Example:
        >>> Critic((2,), context=3)(torch.zeros(5, 2), torch.zeros(5, 3)).shape
        torch.Size([5])
    """

    def __init__(
        self, shape: Sequence[int], *, context: int = 0, hidden: Sequence[int] = (128, 128), spectral: bool = False
    ) -> None:
        super().__init__()
        self.network = MLP(int(torch.Size(shape).numel()) + context, 1, hidden, _Leaky)
        if spectral:
            _normalise(self.network)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """One number a row, (batch,), of x (batch, *shape) and what is given beside it, (batch, …)."""
        flat = [part.reshape(len(part), -1) for part in (x, *context)]
        score: Tensor = self.network(*flat)
        return score.squeeze(-1)


class ConvCritic(nn.Module):
    """A critic of images: convolutions that halve them, without batch normalisation, which penalties of gradients forbid.

    Args:
        shape: (height, width) or (channels, height, width).
        channels: Of the convolutions.
        context: Numbers in a row of what is given beside x; they enter after the convolutions.
        hidden: Widths of the fully connected layers after them.
        spectral: Whether weights are divided by their largest singular values, those of a convolution as a matrix of its
            outputs by all else.

    References:
        A. Radford, L. Metz and S. Chintala, Unsupervised representation learning with deep convolutional generative
        adversarial networks (2016).

    Example:
        >>> ConvCritic((8, 8), spectral=True)(torch.zeros(5, 8, 8)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        shape: Sequence[int],
        channels: Sequence[int] = (32, 64),
        *,
        context: int = 0,
        hidden: Sequence[int] = (),
        spectral: bool = False,
    ) -> None:
        super().__init__()
        self.network = ConvEncoder(shape, 1, channels, hidden, context, _Leaky)
        if spectral:
            _normalise(self.network)

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """One number a row, (batch,), of x (batch, *shape) and what is given beside it, (batch, …)."""
        score: Tensor = self.network(x, *context)
        return score.squeeze(-1)


def _normalise(network: nn.Module) -> None:
    for layer in [part for part in network.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]:
        spectral_norm(layer)
