"""Standard errors of a mode: the inverse of the observed information, carried to the constrained scale.

    I = −∂² log p(data, θ(ξ)) / ∂ξ²,    Cov θ ≈ J I⁻¹ Jᵀ,    J = ∂θ / ∂ξ

in unconstrained coordinates ξ, all averaged sites averaged out and without the Jacobian of ξ: at a mode inside the support
the result does not depend on the coordinates. Where the average is over draws u, Louis' identity gives I from the
derivatives of log p(data, u, θ): minus their mean curvature, less the covariance of their slopes.

References:
    T. Louis, Finding the observed information matrix when using the EM algorithm (1982).
    B. Efron and D. Hinkley, Assessing the accuracy of the maximum likelihood estimator: observed versus expected Fisher
    information (1978).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from inference.density import Unconstrained
from inference.expectation import Completed, Expectation

__all__ = ["WIDEST", "standard_errors"]

WIDEST = 500  # parameters: the information takes as many backward passes
_CHUNK = 64  # of them at once
_SWEEPS = 20  # E-steps that Louis' identity averages over


def standard_errors(
    expectation: Expectation, memory: object, values: dict[str, Tensor], task: Completed
) -> dict[str, Tensor]:
    """Standard errors of all maximised sites, site to (1, *site).

    Args:
        expectation: The E-step.
        memory: Its memory, for one restart.
        values: Values of all latent sites at the mode, (1, *site).
        task: The completed density.

    Returns:
        NaN for what lies along a ridge of the density, and for all if the mode is at an edge or no maximum.
    """
    coordinates = Unconstrained(task.program, task.maximised)
    position = coordinates.position(values).squeeze(0)
    if not bool(position.isfinite().all()):
        return {name: torch.full_like(values[name], torch.nan) for name in task.maximised}
    if expectation.is_random:
        information = _louis(expectation, memory, values, task, coordinates, position)
    else:

        def log_density(at: Tensor) -> Tensor:
            return expectation.marginal(coordinates.values(at), memory, task)

        information = -jacrev(grad(log_density), chunk_size=_CHUNK)(position)

    def flat(at: Tensor) -> Tensor:
        return torch.cat([value.reshape(-1) for value in coordinates.values(at).values()])

    errors = _delta(information, jacrev(flat, chunk_size=_CHUNK)(position))
    parts = errors.split([values[name].numel() for name in coordinates.sites])
    return {name: part.reshape(values[name].shape) for name, part in zip(coordinates.sites, parts, strict=True)}


def _delta(information: Tensor, jacobian: Tensor) -> Tensor:
    """√ diag J I⁺ Jᵀ; NaN for what moves along a direction without information, and for all at a saddle."""
    if not information.numel() or not bool(information.isfinite().all()):
        return jacobian.sum(1) + (torch.nan if information.numel() else 0.0)
    scale = information.diagonal().abs().clamp(min=torch.finfo(information.dtype).tiny).rsqrt()
    values, vectors = torch.linalg.eigh(0.5 * scale[:, None] * (information + information.mT) * scale)
    rounding = 1e-7 if information.dtype == torch.float64 else 1e-3
    is_flat = values.abs() <= rounding
    moved = (jacobian * scale) @ vectors
    variance = (moved[:, ~is_flat].square() / values[~is_flat]).sum(1)
    size = moved.square().sum(1)
    is_lost = moved[:, is_flat].square().sum(1) > rounding * size
    return torch.where(is_lost | bool((values < -rounding).any()), torch.nan, variance.sqrt())


def _louis(
    expectation: Expectation,
    memory: object,
    values: dict[str, Tensor],
    task: Completed,
    coordinates: Unconstrained,
    position: Tensor,
) -> Tensor:
    def log_density(at: Tensor, particle: dict[str, Tensor]) -> Tensor:
        return task.log_z({**coordinates.values(at), **particle})

    slope = grad(log_density)
    slopes, curvature = [], torch.zeros(len(position), len(position), dtype=position.dtype, device=position.device)
    for _ in range(_SWEEPS):
        moved = expectation.step(memory, values, task)
        memory, values = moved.memory, {**values, **moved.values}
        particles = {name: value.squeeze(0) for name, value in moved.particles.items()}
        slopes.append(vmap(slope, in_dims=(None, 0))(position, particles))
        curvature = curvature + vmap(jacrev(slope), in_dims=(None, 0))(position, particles).mean(0) / _SWEEPS
    return -curvature - torch.cat(slopes).mT.cov(correction=0).reshape(curvature.shape)
