"""What a critic and a generator play for: objectives of adversarial training, as functions of the critic's scores.

A critic gives every row a score, the higher the more like data. It is trained to raise ``value``, a mean
over data plus a mean over draws; at its best that is a divergence between data p and draws q, in closed form:

    Minimax, NonSaturating   D* = log p − log q        value = 2 JS(p, q) − log 4
    LeastSquares             D* = p / (p + q)          value = −½ ∫ p q / (p + q)
    Hinge                    D* = sign(p − q)          value = 2 TV(p, q) − 2
    Wasserstein              the best 1-Lipschitz D    value = W₁(p, q)

References:
    I. Goodfellow et al., Generative adversarial nets (2014).
    X. Mao et al., Least squares generative adversarial networks (2017).
    M. Arjovsky, S. Chintala and L. Bottou, Wasserstein generative adversarial networks (2017): clipping.
    I. Gulrajani et al., Improved training of Wasserstein GANs (2017): the penalty.
    J. Lim and J. Ye, Geometric GAN (2017): the hinge.
    L. Mescheder, A. Geiger and S. Nowozin, Which training methods for GANs do actually converge? (2018): R1.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

__all__ = [
    "Game", "Hinge", "LeastSquares", "Minimax", "NonSaturating", "Wasserstein", "gradient_penalty", "zero_penalty",
]  # fmt: skip

Scores = Callable[..., Tensor]


@dataclass(frozen=True)
class Game(abc.ABC):
    """An objective. Both methods take scores, (rows,), and give a scalar."""

    @abc.abstractmethod
    def value(self, data: Tensor, draws: Tensor) -> Tensor:
        """What the critic raises, given its scores of data and of draws."""

    @abc.abstractmethod
    def loss(self, draws: Tensor) -> Tensor:
        """What the generator lowers, given the scores of its draws."""


@dataclass(frozen=True)
class Minimax(Game):
    """E_data log σ(D) + E_draws log(1 − σ(D)), which the generator lowers: its gradient fades where the critic is sure."""

    def value(self, data: Tensor, draws: Tensor) -> Tensor:
        return -softplus(-data).mean() - softplus(draws).mean()

    def loss(self, draws: Tensor) -> Tensor:
        return -softplus(draws).mean()


@dataclass(frozen=True)
class NonSaturating(Minimax):
    """As ``Minimax`` for the critic; the generator lowers −E_draws log σ(D), whose gradient does not fade."""

    def loss(self, draws: Tensor) -> Tensor:
        return softplus(-draws).mean()


@dataclass(frozen=True)
class LeastSquares(Game):
    """−½ E_data (D − 1)² − ½ E_draws D²; the generator lowers ½ E_draws (D − 1)²."""

    def value(self, data: Tensor, draws: Tensor) -> Tensor:
        return -0.5 * (data - 1.0).square().mean() - 0.5 * draws.square().mean()

    def loss(self, draws: Tensor) -> Tensor:
        return 0.5 * (draws - 1.0).square().mean()


@dataclass(frozen=True)
class Hinge(Game):
    """−E_data max(0, 1 − D) − E_draws max(0, 1 + D); the generator lowers −E_draws D."""

    def value(self, data: Tensor, draws: Tensor) -> Tensor:
        return -relu(1.0 - data).mean() - relu(1.0 + draws).mean()

    def loss(self, draws: Tensor) -> Tensor:
        return -draws.mean()


@dataclass(frozen=True)
class Wasserstein(Game):
    """E_data D − E_draws D over critics that are about 1-Lipschitz.

    Args:
        penalty: Weight of E (‖∇D‖ − 1)² on segments between data and draws; None leaves it out.
        clip: Largest absolute value of a weight of the critic, which then is Lipschitz with a constant that nobody knows:
            the value is W₁ up to that factor. None does not clip.

    The penalty has a bias, too: the best linear critic of a shift by δ has ‖∇D‖ = 1 + ‖δ‖ / (2 penalty). And it resists a
    critic whose slope has to change its sign, which it must pass 0 for where data are one number a row: there take a small
    one, such as 0.1.
    """

    penalty: float | None = 10.0
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip!r}, but must be positive: the critic's weights lie in [−clip, clip].")
        if self.penalty is not None and not self.penalty > 0:
            raise ValueError(f"penalty is {self.penalty!r}, but must be positive; None leaves it out.")

    def value(self, data: Tensor, draws: Tensor) -> Tensor:
        return data.mean() - draws.mean()

    def loss(self, draws: Tensor) -> Tensor:
        return -draws.mean()


def gradient_penalty(
    critic: Scores, data: Sequence[Tensor], draws: Sequence[Tensor], beside: Sequence[Tensor] = ()
) -> Tensor:
    """E (‖∇_x D(x)‖ − 1)² at x = α data + (1 − α) draws with one α ~ U(0, 1) a row; a scalar.

    Args:
        critic: Takes the tensors of x, then those beside it; returns scores, (rows,), each of its row alone.
        data: The tensors that a row of data consists of, each (rows, …).
        draws: Those of draws, in the same shapes.
        beside: What is given and not compared, such as a context.
    """
    share = torch.rand(len(data[0]), dtype=data[0].dtype, device=data[0].device)
    between = []
    for real, fake in zip(data, draws, strict=True):
        alpha = share.reshape(-1, *(1,) * (real.dim() - 1))
        between.append((alpha * real + (1.0 - alpha) * fake).detach().requires_grad_())
    square = _square_norm(critic, between, beside)
    is_zero = square == 0.0  # where the root has no gradient
    norm = torch.where(is_zero, 1.0, square).sqrt() * ~is_zero
    return (norm - 1.0).square().mean()


def zero_penalty(critic: Scores, data: Sequence[Tensor], beside: Sequence[Tensor] = ()) -> Tensor:
    """E ‖∇_x D(x)‖² at the data, R1 without its weight γ / 2; a scalar.

    Args:
        critic: Takes the tensors of x, then those beside it; returns scores, (rows,), each of its row alone.
        data: The tensors that a row of data consists of, each (rows, …).
        beside: What is given and not compared.
    """
    return _square_norm(critic, [part.detach().clone().requires_grad_() for part in data], beside).mean()


def _square_norm(critic: Scores, x: Sequence[Tensor], beside: Sequence[Tensor]) -> Tensor:
    """‖∇_x D(x)‖² of each row over all of its tensors, (rows,)."""
    with torch.enable_grad():
        slopes = torch.autograd.grad(critic(*x, *beside).sum(), [*x], create_graph=True)
    return torch.stack([slope.square().reshape(len(slope), -1).sum(-1) for slope in slopes]).sum(0)
