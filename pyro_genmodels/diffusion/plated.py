"""Denoising diffusion as a program whose links are a plate: a bound of a thousand of them from a few at a time."""

from __future__ import annotations

from typing import final

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.diffusion.ddpm import DDPM

__all__ = ["PlatedDDPM"]


@final
class PlatedDDPM(GenerativeModel):
    """The bound of a ``DDPM``, with its links as independent elements of a plate, some of which are seen at a time.

        log p(x) ≥ −L_T(x) − T E[L_{t−1}(x_t, x)],  t uniform on 1, …, T,  x_t = α_t x + σ_t ε_t,  ε_t ~ N(0, I)

    A term needs x_t alone, and its law given x is known: no link waits for another. Every row draws K = ``links`` of its
    own, one from each K-th of the chain. Program and guide draw the same, so that what is left of their ELBO is the factors,
    whose mean is the bound of the chain. A step takes one call of the denoiser, on K times as many rows.

    Without data it is the chain: ``model(size=n)`` draws from it.

    Sites: ``place`` (links, rows), ``noise`` (links, rows, *shape). Plates: ``rows``, ``links``.

    Args:
        chain: The links, and their variance.
        links: K, how many of its T links a row draws, 1 to T; with T it sees every one.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models (2020), section 3.4.

    Example:
        >>> from pyro.infer import Trace_ELBO
        >>> from pyro_genmodels.diffusion import Betas, Oracle
        >>> oracle = Oracle.ring(5, Betas.cosine(1000))
        >>> model = PlatedDDPM(DDPM(oracle, (2,), 1000), links=4)
        >>> Trace_ELBO().loss(model.model, model.guide, oracle.means) > 0
        True
    """

    def __init__(self, chain: DDPM, links: int = 1) -> None:
        super().__init__()
        self.chain, self.steps = chain, len(chain.grid) - 1
        if not isinstance(links, int) or not 1 <= links <= self.steps:
            raise ValueError(f"links is how many of the {self.steps} links a row draws, but is {links!r}.")
        self.links = links

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        if x is None:
            return self.chain.model(size=size)
        self.chain.prepare(x)
        with pyro.plate("rows", len(x), dim=-1):
            pyro.factor("prior", -self.chain.prior_cost(x).to(x.dtype))
            index, noise = self._drawn(x)
            costs = self.steps / self.links * self._cost(x, noise, index)
            pyro.factor("link", -costs.sum(0).to(x.dtype))
        return x

    def guide(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("rows", len(x), dim=-1):
            self._drawn(x)

    def _drawn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Which links, (links, rows), and their noise, (links, rows, *shape)."""
        shape = self.chain.shape
        with pyro.plate("links", self.links, dim=-2):
            place = pyro.sample("place", dist.Uniform(x.new_zeros(()), 1.0))
            noise = pyro.sample("noise", dist.Normal(x.new_zeros(shape), 1.0).to_event(len(shape)))
        part = torch.arange(self.links, device=x.device)[:, None]
        index = ((part + place.double()) * (self.steps / self.links)).long()
        return index.clamp(max=self.steps - 1), noise

    def _cost(self, x: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """L_{t−1} of each link and row, (links, rows)."""
        rows, which = x.expand(noise.shape).flatten(0, 1), index.flatten()
        times = self.chain.grid[which]
        alpha, sigma = self.chain.denoiser.at(rows, times)
        noisy = alpha * rows + sigma * noise.flatten(0, 1)
        return self.chain.link_cost(self.chain.denoiser(noisy, times), rows, noisy, which).reshape(index.shape)
