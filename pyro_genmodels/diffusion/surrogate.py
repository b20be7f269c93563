"""A denoiser as a prior by its score alone: draws, a gradient, and no density.

What moves along gradients can use it, at one call of the denoiser each: ``SVI`` with a guide whose draws have gradients, and
``langevin.ula``. What compares values cannot, and is refused before its first step: that of log p is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from inference.contract import Unsupported
from pyro_genmodels.base import StochasticModule
from pyro_genmodels.diffusion.denoiser import Denoiser, checked
from pyro_genmodels.diffusion.flow import leaf
from pyro_genmodels.diffusion.samplers import heun, path, terminal

__all__ = ["ScoreDistribution", "ScorePrior"]


@final
class ScoreDistribution(TorchDistribution):
    """The law of x at the end of a grid, by its score.

    Args:
        prior: Of denoiser, grid and shape.
        batch_shape: Of independent ones.
        is_surrogate: Whether ``log_prob`` gives a surrogate, instead of refusing: see ``gradients``.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch looks it up on the class)

    def __init__(self, prior: ScorePrior, batch_shape: Sequence[int] = (), is_surrogate: bool = False) -> None:
        self.prior, self.is_surrogate = prior, is_surrogate
        super().__init__(torch.Size(batch_shape), prior.shape, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ScoreDistribution:
        return ScoreDistribution(self.prior, batch_shape, self.is_surrogate)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws (*sample, *batch, *event), by ``samplers.heun`` along the grid."""
        lead = torch.Size((*sample_shape, *self.batch_shape))
        denoiser, grid, like = self.prior.denoiser, self.prior.grid, leaf(self.prior.denoiser)
        start = terminal(denoiser, grid, like).sample((lead.numel(), *self.event_shape))
        return heun(denoiser, start, grid).reshape(*lead, *self.event_shape)

    def score(self, value: Tensor) -> Tensor:
        """∇ log p, of the shape of ``value``, (…, *event)."""
        rows = value.reshape(-1, *self.event_shape)
        return self.prior.denoiser.score(rows, self.prior.level).reshape(value.shape)

    def gradients(self) -> ScoreDistribution:
        """The same law with a surrogate for log p, ⟨score(x), x⟩ with the score held fixed: its gradient is ∇ log p."""
        return ScoreDistribution(self.prior, self.batch_shape, True)

    def log_prob(self, value: Tensor) -> Tensor:
        """Raises ``Unsupported``: there is none, but for back-ends that use its gradient alone."""
        if not self.is_surrogate:
            raise Unsupported(
                "A score prior knows ∇ log p, but not log p, which has been asked for. Take SVI() with a guide whose draws "
                "have gradients, such as AutoNormal, or langevin.ula on its score; or FlowPrior(denoiser, grid, shape), "
                "which has a density, and under TransformReparam suits HMC."
            )
        product = self.score(value).detach() * value
        return product.sum(list(range(-len(self.event_shape), 0))) if self.event_shape else product


@final
class ScorePrior(StochasticModule):
    """A denoiser as the prior of a program by its score: ``x = pyro.sample("x", prior())``.

    Args:
        denoiser: Any.
        grid: Falling times with noise at all of them, (N + 1,); the score is that at its end, the draws are made along it.
        shape: Of one x.

    Raises:
        ValueError: A grid that does not fall, or ends without noise, where there is no score.

    References:
        B. Feng, J. Smith, M. Rubinstein, H. Chang, K. Bouman, W. Freeman, Score-Based Diffusion Models as Principled Priors
        for Inverse Imaging (2023).

    Example:
        >>> from pyro_genmodels.diffusion import EDM, Oracle
        >>> prior = ScorePrior(Oracle.ring(5, EDM(0.02, 20.0)), EDM(0.02, 20.0).grid(16, "karras"), (2,))
        >>> prior().score(torch.zeros(3, 2, dtype=torch.float64)).shape
        torch.Size([3, 2])
    """

    def __init__(self, denoiser: Denoiser, grid: Tensor, shape: Sequence[int]) -> None:
        super().__init__()
        self.denoiser, self.grid, self.shape = checked(denoiser, "ScorePrior"), grid, torch.Size(shape)
        last = path(denoiser, torch.zeros(1, *shape), grid)[-1]
        if last.is_last:
            raise ValueError(
                f"Without noise there is no score, but at t = {grid[-1]:g} there is none. Let the grid end earlier."
            )
        self.level = last.earlier

    def forward(self, context: Any = None) -> ScoreDistribution:
        """The law of x; Unsupported with a context."""
        if context is not None:
            raise Unsupported(
                "A ScorePrior takes no context. Give it a denoiser that has one, ScorePrior(Given(denoiser, context), …)."
            )
        return ScoreDistribution(self)
