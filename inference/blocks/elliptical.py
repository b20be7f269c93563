"""A site with a Gaussian prior, such as a Gaussian process, moved along ellipses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from inference.blocks.block import Block, Current, Move, is_certified
from inference.contract import Unsupported
from inference.density import Density
from inference.handlers import base
from inference.messages import kind_of
from inference.staging import Staged

__all__ = ["EllipticalSlice", "Prior"]

_MOST_SHRINKS = 200  # a bracket halves about every step: it would be narrower than rounding long before


class Prior(NamedTuple):
    """The normal prior of a site given all others: mean and factor L of its covariance L Lᵀ, and its log-density as the program has it.

    ``factor`` is (chain, *batch, D, D), or (chain, *site) where the elements are independent.
    """  # noqa: E501

    mean: Tensor
    factor: Tensor
    log_density: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether the factor is a vector, the diagonal of one."""
        return self.factor.dim() == self.mean.dim()

    def scaled(self, noise: Tensor) -> Tensor:
        """L ε."""
        return self.factor * noise if self.is_diagonal else (self.factor @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; mean, L Lᵀ), (chain,)."""
        offset = value - self.mean
        if self.is_diagonal:
            whitened, log_scale = offset / self.factor, self.factor.log()
        else:
            whitened = torch.linalg.solve_triangular(self.factor, offset.unsqueeze(-1), upper=False).squeeze(-1)
            log_scale = self.factor.diagonal(dim1=-2, dim2=-1).log()
        terms = -0.5 * whitened.square() - log_scale - 0.5 * math.log(2 * math.pi)
        return terms.reshape(len(value), -1).sum(-1)


@dataclass(frozen=True)
class EllipticalSlice(Block):
    """Elliptical slice sampling: no step size, no gradient, no rejection.

        log p(f, data | rest) = log N(f; m, Σ) + log L(f)
        f' = m + (f − m) cos θ + ν sin θ,   ν ~ N(0, Σ)

    with θ from a bracket that shrinks until L(f') exceeds its slice. All chains shrink their own brackets at the same time.
    Mean and covariance are those of the site's own distribution at the present values of the others, hyper-parameters
    included; whatever depends on the site is likelihood. The certificate compares log N with the program's prior.

    Args:
        sites: Name of the one site; filled in by ``bind``.

    References:
        I. Murray, R. Adams and D. MacKay, Elliptical slice sampling (2010).
    """

    @property
    def update(self) -> str:
        return "EllipticalSlice"

    @property
    def has_certificate(self) -> bool:
        return True

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        if len(sites) != 1:
            raise Unsupported(f"EllipticalSlice() updates one site, but was given {', '.join(sites)}.")
        site = density.program.latents[sites[0]]
        refusal = f"EllipticalSlice() needs a Gaussian prior, but that of '{site.name}' is {site.family}"
        if not site.is_continuous or kind_of(site.support) != "real":
            raise Unsupported(f"{refusal}.")
        bound = type(self)(sites=(site.name,))
        try:
            priors = Prior(*bound._staged(density)(trials.values))
        except AttributeError:
            raise Unsupported(f"{refusal}, which has no mean and scale to read.") from None
        error = priors.log_prob(trials.values[site.name]) - priors.log_density
        if not is_certified(Move(error, error), priors.log_density):
            off = float(error.abs().max())
            raise Unsupported(f"{refusal}, or it is scaled or masked (log-density off by {off:.1e}).")
        return bound

    def is_correlated(self, density: Density, trials: Current) -> bool:
        """Whether the prior's covariance is not diagonal."""
        prior = Prior(*self._staged(density)(trials.values))
        return not prior.is_diagonal and bool(prior.factor.tril(-1).any())

    def _staged(self, density: Density) -> Staged:
        (site,), program = self.sites, density.program
        shape = program.latents[site].shape

        def prior(values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
            node = program.trace(values).nodes[site]
            normal = base(node["fn"])
            if hasattr(normal, "scale_tril"):
                factor = normal.scale_tril.to(program.dtype).expand(*shape, shape[-1])
            else:
                factor = normal.scale.to(program.dtype).expand(shape)
            return normal.loc.to(program.dtype).expand(shape), factor, node["log_prob_sum"].to(program.dtype)

        return density.stage(("normal prior", site), prior, (True,))

    def init(self, density: Density, current: Current) -> tuple[()]:
        return ()

    def step(self, state: tuple[()], density: Density, current: Current, warmup: int) -> tuple[tuple[()], Current, Move]:
        (site,) = self.sites
        value = current.values[site]
        prior = Prior(*self._staged(density)(current.values))
        shape = (-1, *(1,) * (value.dim() - 1))
        log_prior = prior.log_prob(value)
        offset, other = value - prior.mean, prior.scaled(torch.randn_like(value))
        level = current.log_joint - log_prior + torch.rand_like(log_prior).log()
        angle = 2 * math.pi * torch.rand_like(log_prior)
        low, high = angle - 2 * math.pi, angle
        found, log_joint = value, current.log_joint
        is_open = torch.ones_like(log_prior, dtype=torch.bool)
        for _ in range(_MOST_SHRINKS):
            turned = prior.mean + offset * angle.cos().reshape(shape) + other * angle.sin().reshape(shape)
            joint = density.joint({**current.values, site: turned})
            accepted = is_open & (joint - prior.log_prob(turned) > level)
            found = torch.where(accepted.reshape(shape), turned, found)
            log_joint = torch.where(accepted, joint, log_joint)
            is_open = is_open & ~accepted
            if not bool(is_open.any()):
                break
            low, high = torch.where(angle < 0, angle, low), torch.where(angle < 0, high, angle)
            angle = low + (high - low) * torch.rand_like(angle)
        moved = Current({**current.values, site: found}, log_joint)
        return (), moved, Move(torch.ones_like(log_prior), log_prior - prior.log_density)
