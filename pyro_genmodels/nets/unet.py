"""A compact U-Net for diffusion on images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyro_genmodels.nets.embedding import Conditioning
from pyro_genmodels.nets.mlp import silent

__all__ = ["UNet"]

_GROUP = 8  # channels that are normalised together, where they are a multiple


class UNet(nn.Module):
    """Reads an image and a noise level: residual blocks on the way down to a small image, and up again beside those.

    Each block is scaled and shifted by the level; at low resolution all places attend to all. The last layer of every block,
    of every attention and of the network starts at 0. Memory in channels-last order stays so:
    ``model.to(memory_format=torch.channels_last)``. Its attention has no second derivatives on every device; where they
    are needed, take ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.

    Args:
        shape: (channels, height, width); height and width are halved at each step down.
        outputs: Numbers out for each pixel and channel: 1, or 2 with a learned variance.
        width: Channels at full resolution.
        multiples: Channels at each resolution, in multiples of ``width``; as many resolutions.
        blocks: Residual blocks at each resolution, on either way.
        attention: How many of the lowest resolutions have attention.
        heads: Of the attention; each has width · multiple / heads channels.
        dropout: Share of numbers that a block leaves out in training.
        context: Numbers in a row of the context; 0: there is none.
        classes: Labels that a context may be, in place of ``context``; 0: there are none.

    Raises:
        ValueError: An image that cannot be halved so often, channels that heads do not divide.

    References:
        O. Ronneberger, P. Fischer, T. Brox, U-Net (2015).
        J. Ho, A. Jain, P. Abbeel, Denoising diffusion probabilistic models (2020).
        P. Dhariwal, A. Nichol, Diffusion models beat GANs on image synthesis (2021): blocks scaled and shifted by the level.

    Example:
        >>> UNet((1, 8, 8), width=16, multiples=(1, 2))(torch.zeros(5, 1, 8, 8), torch.zeros(5)).shape
        torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int = 1,
        width: int = 64,
        multiples: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: int = 1,
        heads: int = 4,
        dropout: float = 0.0,
        context: int = 0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        self.shape = _checked(shape, multiples)
        if blocks < 1 or outputs < 1 or not 0 <= attention <= len(multiples):
            raise ValueError(
                f"blocks and outputs are at least 1 and attention at most the {len(multiples)} resolutions, but they are "
                f"{blocks}, {outputs} and {attention}."
            )
        told = 4 * width
        self.told = Conditioning(told, context, classes)
        self.first = nn.Conv2d(self.shape[0], width, 3, padding=1)
        has_attention = [i >= len(multiples) - attention for i in range(len(multiples))]
        channels, kept = width, [width]
        self.down = nn.ModuleList()
        for i, multiple in enumerate(multiples):
            for _ in range(blocks):
                self.down.append(_Stage(channels, width * multiple, told, heads if has_attention[i] else 0, dropout))
                channels = width * multiple
                kept.append(channels)
            if i < len(multiples) - 1:
                self.down.append(_Half(channels))
                kept.append(channels)
        attending = (heads if attention else 0, 0)
        self.middle = nn.ModuleList(_Stage(channels, channels, told, those, dropout) for those in attending)
        self.up = nn.ModuleList()
        for i, multiple in reversed([*enumerate(multiples)]):
            for _ in range(blocks + 1):
                stage = _Stage(channels + kept.pop(), width * multiple, told, heads if has_attention[i] else 0, dropout)
                self.up.append(stage)
                channels = width * multiple
            if i:
                self.up.append(_Double(channels))
        self.last = nn.Sequential(
            _norm(channels), nn.SiLU(), silent(nn.Conv2d(channels, outputs * self.shape[0], 3, padding=1))
        )

    def forward(self, x: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """The output, (rows, outputs · channels, height, width).

        Args:
            x: (rows, channels, height, width).
            level: (rows,).
            context: (rows, context) or labels (rows,), if it was built for one.
        """
        if x.shape[1:] != self.shape:
            raise ValueError(
                f"Images are (rows, {', '.join(map(str, self.shape))}), but came as {tuple(x.shape)}. Build a UNet for that "
                "shape."
            )
        told = F.silu(self.told(level, context))
        hidden = self.first(x)
        kept = [hidden]
        for step in self.down:
            hidden = step(hidden, told)
            kept.append(hidden)
        for step in self.middle:
            hidden = step(hidden, told)
        for step in self.up:
            hidden = step(hidden, told) if isinstance(step, _Double) else step(torch.cat([hidden, kept.pop()], 1), told)
        found: Tensor = self.last(hidden)
        return found


class _Stage(nn.Module):
    """A residual block, and attention after it if there are heads."""

    def __init__(self, inputs: int, outputs: int, told: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.before = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.norm = _norm(outputs)
        self.film = nn.Linear(told, 2 * outputs)
        self.after = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), silent(nn.Conv2d(outputs, outputs, 3, padding=1)))
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        self.attention = _Attention(outputs, heads) if heads else None

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[:, :, None, None].chunk(2, 1)
        hidden: Tensor = self.skip(x) + self.after(torch.addcmul(shift, self.norm(self.before(x)), 1.0 + scale))
        return hidden if self.attention is None else self.attention(hidden)


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{channels} channels cannot be shared out among {heads} heads. Take a divisor of them.")
        self.heads = heads
        self.norm = _norm(channels)
        self.ask = nn.Conv2d(channels, 3 * channels, 1)
        self.answer = silent(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.ask(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(-1, -2)
        query, key, value = parts.unbind(1)  # each (rows, heads, places, channels of a head)
        found = F.scaled_dot_product_attention(query, key, value).transpose(-1, -2).reshape(x.shape)
        answer: Tensor = x + self.answer(found)
        return answer


class _Half(nn.Conv2d):
    """Height and width halved."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        return super().forward(x)


class _Double(nn.Conv2d):
    """Height and width doubled."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, told: Tensor | None = None) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm(channels: int) -> nn.GroupNorm:
    groups = min(32, channels // _GROUP) if not channels % _GROUP else 1
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


def _checked(shape: Sequence[int], multiples: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"shape is (channels, height, width), but came as {tuple(shape)}. Grey images have 1 channel.")
    if not multiples or min(multiples) < 1:
        raise ValueError(f"multiples are at least 1, one for each resolution, but came as {tuple(multiples)}.")
    factor = 2 ** (len(multiples) - 1)
    height, width = shape[1:]
    if height % factor or width % factor or min(height, width) < factor:
        fitting = tuple(max(factor, -(-size // factor) * factor) for size in (height, width))
        most = min((size & -size).bit_length() for size in (height, width))
        raise ValueError(
            f"Images of {height} x {width} cannot be halved {len(multiples) - 1} times, as {len(multiples)} resolutions "
            f"need. Pad them to {fitting[0]} x {fitting[1]}, or give at most {most} multiples."
        )
    return shape[0], height, width
