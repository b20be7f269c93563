"""What follows from a score: Tweedie's formula, that is what a noisy observation says of the truth, and derivatives."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["jacobian", "score_of", "tweedie", "tweedie_covariance"]


def tweedie(y: Tensor, score: Callable[[Tensor], Tensor], noise: Tensor | float) -> Tensor:
    """Posterior mean of x given y = x + n, n ~ N(0, noise²), without the prior of x.

        E[x | y] = y + noise² ∇ log p(y)

    It is exact for the true p(y), the density of *noisy* observations. One that was fitted to observations gives the
    empirical-Bayes estimate.

    Args:
        y: Observations, (rows, …).
        score: ∇ log p(y) of rows, of the shape of ``y``; ``score_of`` makes it from log p.
        noise: Standard deviation of the noise, a number or of a shape that multiplies ``y``; not negative.

    Returns:
        Of the shape of ``y``.

    References:
        H. Robbins, An Empirical Bayes Approach to Statistics (1956).
        B. Efron, Tweedie's Formula and Selection Bias (2011).

    Example:
        >>> tweedie(torch.tensor([[2.0]]), lambda y: -y / 2, noise=1.0)  # x ~ N(0, 1): halfway to its mean
        tensor([[1.]])
    """
    variance = _variance(y, noise)
    slope = score(y)
    if slope.shape != y.shape:
        raise ValueError(
            f"score gives a gradient for each number of y, {tuple(y.shape)}, but gave the shape {tuple(slope.shape)}. "
            "Of a log-density, score_of(log_density) makes one."
        )
    return y + variance * slope


def tweedie_covariance(y: Tensor, score: Callable[[Tensor], Tensor], noise: Tensor | float) -> Tensor:
    """Posterior covariance of x given y = x + n, n ~ N(0, Σ) with Σ = diag(noise²), without the prior of x.

        Cov[x | y] = Σ + Σ ∇² log p(y) Σ

    It takes D calls of the score's derivative, for D numbers in a row.

    Args:
        y: Observations, (rows, …), D numbers in each.
        score: As in ``tweedie``, differentiable, and of each row by itself.
        noise: As in ``tweedie``.

    Returns:
        (rows, D, D).

    References:
        B. Efron, Tweedie's Formula and Selection Bias (2011).
    """
    variance = _variance(y, noise).expand_as(y).flatten(1)
    return torch.diag_embed(variance) + variance[:, :, None] * jacobian(score, y) * variance[:, None, :]


def score_of(log_density: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """∇ log p of a log-density of rows, (rows, …) to (rows,), such as ``distribution.log_prob``."""

    if isinstance(log_density, torch.distributions.Distribution):
        raise TypeError("score_of takes log p, such as distribution.log_prob, but was given the distribution itself.")

    def score(y: Tensor) -> Tensor:
        with torch.enable_grad():
            point = y if y.requires_grad else y.detach().requires_grad_()
            values = log_density(point)
            if values.shape != y.shape[:1]:
                raise ValueError(
                    f"log_density gives one number per row, ({len(y)},), but gave the shape {tuple(values.shape)}. "
                    "For a distribution over single numbers, use .to_event."
                )
            (slope,) = torch.autograd.grad(values.sum(), point, create_graph=True)
        return slope if y.requires_grad else slope.detach()

    return score


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂f/∂x of each row, (rows, D, D), for f that maps rows to rows of the same shape, each by itself."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value = function(point).flatten(1)
        rows = [
            torch.autograd.grad(value[:, i].sum(), point, retain_graph=True)[0].flatten(1) for i in range(value.shape[1])
        ]
    return torch.stack(rows, 1)


def _variance(y: Tensor, noise: Tensor | float) -> Tensor:
    if not y.is_floating_point():
        raise TypeError(f"y is made of floating-point numbers, which noise was added to, but is {y.dtype}. Give y.float().")
    deviation = torch.as_tensor(noise, dtype=y.dtype, device=y.device)
    if (deviation < 0).any() or not deviation.isfinite().all():
        raise ValueError("noise is a standard deviation, at least 0 and finite; some of it is not.")
    if torch.broadcast_shapes(deviation.shape, y.shape) != y.shape:
        raise ValueError(f"noise has the shape {tuple(deviation.shape)}, which does not multiply y, {tuple(y.shape)}.")
    return deviation.square()
