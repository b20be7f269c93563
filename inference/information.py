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
        NaN everywhere if the information is not positive definite: the mode is at an edge, on a ridge or not reached.
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

    jacobian = jacrev(flat, chunk_size=_CHUNK)(position)
    factor, failed = torch.linalg.cholesky_ex(0.5 * (information + information.mT))
    if int(failed) or not bool(factor.isfinite().all()):
        errors = torch.full_like(jacobian[:, 0], torch.nan) if jacobian.shape[1] else jacobian.new_zeros(len(jacobian))
    else:
        errors = torch.linalg.solve_triangular(factor, jacobian.mT, upper=False).square().sum(0).sqrt()
    parts = errors.split([values[name].numel() for name in coordinates.sites])
    return {name: part.reshape(values[name].shape) for name, part in zip(coordinates.sites, parts, strict=True)}


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
