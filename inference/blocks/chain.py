"""Real sites of a long loop drawn together from their joint conditional, where that is a Gaussian chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from inference.blocks.block import Current, holds
from inference.blocks.conjugate import Joined
from inference.blocks.gaussian import Gaussian, check_real
from inference.chains import LAGS, Chain, ChainConditional
from inference.conditionals import Points
from inference.contract import Unsupported
from inference.density import Density

__all__ = ["GaussianChain"]


@dataclass(frozen=True)
class GaussianChain(Gaussian):
    """An exact draw of the states of a linear Gaussian state-space model, x_t | x_{t−1} for a loop over t.

    Each site is coupled to the few before and after it, in the order of the program, so that the precision is banded: it
    has as many unknowns as a handful of gradients show, and is factored in logarithmic depth. What a Kalman filter and a
    backward pass draw.

    Args:
        sites: Names of the sites, in their order; filled in by ``bind``.
        lags: Sites back to which a site is coupled; filled in by ``bind``.
    """

    lags: int = 0

    @property
    def update(self) -> str:
        return "Gaussian chain"

    def bind(self, sites: Sequence[str], density: Density, trials: Current) -> Self:
        check_real("GaussianChain", sites, density, is_wide=True)
        shapes = {density.program.latents[name].shape for name in sites}
        if len(sites) < 2 or len(shapes) > 1:
            raise Unsupported(f"GaussianChain() needs several sites of one shape, but was given {', '.join(sites)}.")
        for lags in (self.lags,) if self.lags else LAGS:
            bound = replace(self, sites=tuple(sites), lags=lags)
            if holds(bound, density, trials):
                return bound
        raise Unsupported(
            f"The joint conditional of {sites[0]}, …, {sites[-1]} is not Gaussian, or couples sites that are more than "
            f"{LAGS[-1]} apart."
        )

    def conditional(self, points: Points, density: Density, values: dict[str, Tensor]) -> ChainConditional:
        joined = Joined(density.program, self.sites)
        family = Chain(torch.Size([sum(joined.sizes)]), self.lags * joined.sizes[0])
        gradients = self._gradients(joined, density, values)
        at = family.at(points)
        return family.solve(at, gradients(at))
