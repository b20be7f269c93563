"""Networks that tell data from draws: one number a row, the higher the more like data."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from pyro_genmodels.autoencoders.ends import row_shape
from pyro_genmodels.implicit.distribution import row_scores
from pyro_genmodels.nets import MLP, ConvEncoder

__all__ = ["ConvCritic", "Critic", "PackedCritic"]


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
        self.network = MLP(math.prod(row_shape(shape, "Critic")) + context, 1, hidden, _Leaky)
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


class PackedCritic(nn.Module):
    """A critic that judges several rows together: that draws are too much alike is seen in several, not in one.

        D(x_1, …, x_m) tells m rows of the data from m that were drawn: the ratio of p(x_1) … p(x_m) to q(x_1) … q(x_m)

    Consecutive rows of a batch are packed, and all of a pack get its score, so that every objective that is a mean over
    rows is that of packs. A batch that does not come out even begins anew with its first rows. Scores are no log-ratio of
    one row: ``NoiseReparam`` and ``RatioLikelihood`` need a critic of single rows. A penalty of gradients takes the norm
    for each row apart.

    Args:
        critic: Takes packs, (batch, rows, *shape), such as ``Critic((rows, *shape))``, and what is given beside them,
            (batch, rows, …).
        rows: m, how many are judged together.

    Raises:
        ValueError: If there is not at least one row in a pack, or a pack does not get one number.

    References:
        Z. Lin, A. Khetan, G. Fanti and S. Oh, PacGAN: the power of two samples in generative adversarial networks (2018).

    Example:
        >>> PackedCritic(Critic((4, 2)), rows=4)(torch.zeros(8, 2)).shape
        torch.Size([8])
    """

    def __init__(self, critic: nn.Module, rows: int = 2) -> None:
        super().__init__()
        if not isinstance(rows, int) or rows < 1:
            raise ValueError(f"rows is {rows!r}, but a pack has a whole number of rows, at least 1.")
        self.critic, self.rows = critic, rows

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        """One number a row, (batch,), of x (batch, *shape) and what is given beside it, (batch, …)."""
        index = torch.arange(-(-len(x) // self.rows) * self.rows, device=x.device) % len(x)
        packs = [part[index].unflatten(0, (-1, self.rows)) for part in (x, *context)]
        scores = row_scores(self.critic, *packs)
        return scores.repeat_interleave(self.rows)[: len(x)]


def _normalise(network: nn.Module) -> None:
    for layer in [part for part in network.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]:
        spectral_norm(layer)
