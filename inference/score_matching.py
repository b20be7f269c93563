"""Score matching: losses that fit ∇ log p to data, and so need no normaliser.

    ExplicitLoss    ½ ‖s(x) − ∇ log p(x)‖²             where the score of the data is known
    ImplicitLoss    tr ∇s(x) + ½ ‖s(x)‖²               the same in expectation, but for ½ E‖∇ log p‖², without knowing it
    SlicedLoss      vᵀ ∇s(x) v + ½ ‖s(x)‖²             the same again in expectation over v, in one derivative
    NoisedLoss      ½ ‖σ s(x + σε) + ε‖²               lowest at the score of the data with noise added

A loss is a frozen dataclass with a method ``rows(module, x, context)``. ``module(context)`` is a distribution, as of a
stochastic module; its score is what it says it is (``inference.contract.Scored``), else the gradient of its ``log_prob``,
which may lack any constant. Gradients reach the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inference.contract import Scored

__all__ = ["ExplicitLoss", "ImplicitLoss", "NoisedLoss", "SlicedLoss", "score"]

DIRECTIONS = ("rademacher", "normal")


@dataclass(frozen=True)
class ExplicitLoss:
    """½ ‖s(x) − ∇ log p(x)‖², where the score of the data is known: to learn one module from another.

    Args:
        target: ∇ log p of rows, of the shape of x.
    """

    target: Callable[[Tensor], Tensor]

    def rows(self, module: Callable[[Any], Any], x: Tensor, context: Any = None) -> Tensor:
        """The loss of each row.

        Args:
            module: ``module(context)`` is a distribution over rows.
            x: (rows, …).
            context: What the module is given.

        Returns:
            (rows,).
        """
        known = self.target(x).detach()
        if known.shape != x.shape:
            raise ValueError(f"target gives a gradient for each number of x, {tuple(x.shape)}, not {tuple(known.shape)}.")
        return 0.5 * _squares(score(module, x, context) - known)


@dataclass(frozen=True)
class ImplicitLoss:
    """tr ∇s(x) + ½ ‖s(x)‖², with the exact trace: as many derivatives of the score as a row has numbers.

    Its expectation is that of ``ExplicitLoss`` less ½ E‖∇ log p‖², for a score that is smooth and data that fade out.

    References:
        A. Hyvärinen, Estimation of Non-Normalized Statistical Models by Score Matching (2005).

    Example:
        >>> import torch, pyro.distributions as dist
        >>> ImplicitLoss().rows(lambda context: dist.Normal(torch.zeros(2), 1.0).to_event(1), torch.ones(3, 2)).detach()
        tensor([-1., -1., -1.])
    """

    def rows(self, module: Callable[[Any], Any], x: Tensor, context: Any = None) -> Tensor:
        """As ``ExplicitLoss.rows``."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            slope = score(module, point, context)
            flat = slope.flatten(1)
            trace = sum(_derivative(flat[:, i].sum(), point).flatten(1)[:, i] for i in range(flat.shape[1]))
            return trace + 0.5 * _squares(slope)


@dataclass(frozen=True)
class SlicedLoss:
    """vᵀ ∇s(x) v + ½ ‖s(x)‖² for random v with E v vᵀ = I: ``ImplicitLoss`` in expectation, whatever the size of a row.

    Args:
        projections: Draws of v for each row, at least 1.
        directions: "rademacher", with v of ±1, which is exact where ∇s is diagonal, or "normal".
        is_reduced: Whether ½ ‖s‖² is taken as it is; else as ½ (vᵀ s)², which has the same expectation and more variance.

    References:
        Y. Song, S. Garg, J. Shi, S. Ermon, Sliced Score Matching (2019): SSM, with variance reduction.
    """

    projections: int = 1
    directions: str = "rademacher"
    is_reduced: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.projections, int) or self.projections < 1:
            raise ValueError(f"projections is {self.projections!r}, but must be an integer of at least 1.")
        if self.directions not in DIRECTIONS:
            raise ValueError(f"directions is {self.directions!r}, but must be one of {', '.join(map(repr, DIRECTIONS))}.")

    def rows(self, module: Callable[[Any], Any], x: Tensor, context: Any = None) -> Tensor:
        """As ``ExplicitLoss.rows``."""
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            slope = score(module, point, context)
            found = []
            for _ in range(self.projections):
                v = torch.randn_like(x)
                if self.directions == "rademacher":
                    v = torch.where(v < 0, -torch.ones_like(v), torch.ones_like(v))
                along = (v * slope).flatten(1).sum(1)
                bend = (v * _derivative(along.sum(), point)).flatten(1).sum(1)
                found.append(bend + 0.5 * (_squares(slope) if self.is_reduced else along.square()))
            return torch.stack(found).mean(0)


@dataclass(frozen=True)
class NoisedLoss:
    """½ ‖σ s(x + σε) + ε‖², ε ~ N(0, I): denoising score matching at one level of noise.

    It is lowest where s is the score of the *noised* density, p * N(0, σ²); what Tweedie's formula takes. In expectation it
    is σ² times ``ExplicitLoss`` at that density, but for a constant.

    Args:
        noise: σ, positive.

    References:
        P. Vincent, A Connection Between Score Matching and Denoising Autoencoders (2011).
    """

    noise: float

    def __post_init__(self) -> None:
        if not 0.0 < self.noise < float("inf"):
            raise ValueError(f"noise is {self.noise!r}, but must be positive and finite. Without noise, use SlicedLoss().")

    def rows(self, module: Callable[[Any], Any], x: Tensor, context: Any = None) -> Tensor:
        """As ``ExplicitLoss.rows``."""
        noise = torch.randn_like(x)
        return 0.5 * _squares(self.noise * score(module, x + self.noise * noise, context) + noise)


def score(module: Callable[[Any], Any], x: Tensor, context: Any = None) -> Tensor:
    """∇ log p(x | context), of the shape of ``x``, with gradients to the weights and, where it asks for them, to ``x``.

    Raises:
        TypeError: If ``module(context)`` is no distribution over rows.
        ValueError: If it gives another shape.
    """
    try:
        distribution = module(context)
    except NotImplementedError:  # what torch says of a module without forward
        distribution = None
    if isinstance(distribution, Scored):
        slope = distribution.score(x)
        if slope.shape != x.shape:
            raise ValueError(f"A score has the shape of x, {tuple(x.shape)}, but this one has {tuple(slope.shape)}.")
        return slope
    log_prob = getattr(distribution, "log_prob", None)
    if log_prob is None:
        raise TypeError(
            "Score matching takes a module whose module(context) is a distribution, such as an EnergyModel, but "
            + (f"{type(module).__name__} makes none." if distribution is None else f"got a {type(distribution).__name__}.")
        )
    with torch.enable_grad():
        point = x if x.requires_grad else x.detach().requires_grad_()
        values = log_prob(point)
        if values.shape != x.shape[:1]:
            raise ValueError(
                f"log_prob gives one number a row, ({len(x)},), but gave the shape {tuple(values.shape)}. A distribution "
                "over single numbers becomes one over rows by .to_event."
            )
        return _derivative(values.sum(), point)


def _derivative(value: Tensor, point: Tensor) -> Tensor:
    """∂value/∂point, itself to be differentiated; zero where the one does not depend on the other."""
    if not value.requires_grad:
        return torch.zeros_like(point)
    (found,) = torch.autograd.grad(value, point, create_graph=True, materialize_grads=True)
    return found


def _squares(x: Tensor) -> Tensor:
    """‖x‖² of each row, (rows,)."""
    return x.flatten(1).square().sum(1)
