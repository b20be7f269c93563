"""Denoising diffusion as a hierarchical program, whose bound is L_T + Σ L_{t−1} + L_0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_genmodels.autoencoders.ends import check_shape, row_shape, rows_of
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.diffusion.denoiser import Denoised, Denoiser, Given, checked, per_row
from pyro_genmodels.diffusion.likelihood import bridge, link_cost, prior_cost
from pyro_genmodels.diffusion.samplers import Step, ancestral, path, step_posterior, terminal

__all__ = ["DDPM"]


class DDPM(GenerativeModel):
    """Denoising diffusion: a chain from noise to data, each link a normal around what the denoiser expects.

        x_T ~ N(0, α_T² + σ_T²),  x_{t−1} ~ N(mean(x_t, x̂_0(x_t)), variance) for t = T, …, 2,  x ~ N(x̂_0(x_1), variance)

    The guide runs the other way's bridges in the *same* order, x_T | x and then x_{t−1} | x_t, x, so that program and guide
    have the same dependencies and ``TraceMeanField_ELBO`` takes every divergence in closed form: its terms are those of
    ``likelihood.variational_bound``. The guide has no weights.

    ``inference.Denoising`` trains it by one link a row, so that T may be a thousand: by L_simple, by the bound, or by both,
    where the bound trains a learned variance: ``Network(learns_variance=True)`` with "optimal". As a program, each of the
    T links is a site and a call of the denoiser in turn: fit for tens of steps.

    Data are to have about unit variance.

    A context (rows, …), for a denoiser that takes one, is the second argument of the program.

    Sites: ``x_T``, …, ``x_1`` and ``x``, each (rows, *shape). Plate: ``rows``.

    Args:
        denoiser: Any whose schedule has no noise at time 0.
        shape: Of one row.
        steps: T; times are equally far apart.
        variance: "upper", "lower" or "optimal", as in ``samplers.ancestral``; for "lower" the last link has the upper one.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models (2020).
        A. Nichol, P. Dhariwal, Improved Denoising Diffusion Probabilistic Models (2021): learned variance.

    Example:
        >>> from pyro_genmodels.diffusion import Betas, Network
        >>> from pyro_genmodels.nets import PointNetwork
        >>> model = DDPM(Network(PointNetwork(2), Betas.linear(1000)), (2,), 1000)
        >>> model.link_cost(model.denoiser(torch.ones(3, 2), torch.tensor(1000.0)), torch.ones(3, 2), torch.ones(3, 2),
        ...                 torch.tensor([0, 0, 0])).shape
        torch.Size([3])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        shape: Sequence[int],
        steps: int,
        variance: Literal["upper", "lower", "optimal"] = "upper",
    ) -> None:
        super().__init__()
        if variance not in ("upper", "lower", "optimal"):
            raise ValueError(f"variance is 'upper', 'lower' or 'optimal', not {variance!r}.")
        self.denoiser, self.shape, self.variance = checked(denoiser, "DDPM"), row_shape(shape, "DDPM"), variance
        least = float(denoiser.schedule.sigma(torch.zeros((), dtype=torch.float64)).detach())
        if least > 0:
            raise ValueError(
                f"A chain ends with data, but {type(denoiser.schedule).__name__} has noise of {least:.3g} at time 0. Take "
                "another schedule, such as Betas."
            )
        self.grid: Tensor
        self.register_buffer("grid", denoiser.schedule.grid(steps, "time", start=0.0), persistent=False)

    def prepare(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the data.

        Raises:
            ValueError: If they are of another shape.
        """
        if x is not None:
            check_shape(x, self.shape, "DDPM")

    def model(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> Tensor:
        size = len(context) if x is None and size is None and context is not None else size
        rows, like = self._rows(x, size)
        events, denoiser = len(self.shape), self._given(context)
        steps = path(denoiser, like, self.grid)
        scale = terminal(denoiser, self.grid, like).scale
        with pyro.plate("rows", rows):
            noisy = pyro.sample(f"x_{len(steps)}", dist.Normal(like.new_zeros(rows, *self.shape), scale).to_event(events))
            for i, step in zip(range(len(steps) - 1, 0, -1), steps):
                known = step_posterior(denoiser, noisy, step, self.variance)
                noisy = pyro.sample(f"x_{i}", dist.Normal(known.mean, known.root.to(noisy)).to_event(events))
            last = "upper" if self.variance == "lower" else self.variance
            known = step_posterior(denoiser, noisy, steps[-1], last)
            return pyro.sample("x", dist.Normal(known.mean, known.root.to(noisy)).to_event(events), obs=x)

    def guide(self, x: Tensor, context: Tensor | None = None, size: int | None = None) -> None:
        rows, like = self._rows(x, size)
        steps = path(self.denoiser, like, self.grid)
        with pyro.plate("rows", rows):
            mean, scale = steps[0].alpha * x, steps[0].sigma.to(x)
            noisy = pyro.sample(f"x_{len(steps)}", dist.Normal(mean, scale).to_event(len(self.shape)))
            for i, step in zip(range(len(steps) - 1, 0, -1), steps):
                mean, scale = bridge(step, x, noisy)
                noisy = pyro.sample(f"x_{i}", dist.Normal(mean, scale.to(x)).to_event(len(self.shape)))

    @torch.no_grad()
    def sample(self, size: int | None = None, context: Tensor | None = None) -> Tensor:
        """New rows, (size, *shape), by ``samplers.ancestral``; with a context (size, …), one for each of its rows.

        Its last step adds no noise, but with the "optimal" variance, that of x_0 given x_1.
        """
        rows, like = self._rows(None, len(context) if size is None and context is not None else size)
        start = terminal(self.denoiser, self.grid, like).scale * torch.randn(rows, *self.shape).to(like)
        return ancestral(self._given(context), start, self.grid, self.variance)

    def link_cost(self, known: Denoised, x: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """L_{t−1}, or L_0 for the last link, in nats, (rows,).

        Args:
            known: What the denoiser says of ``noisy``.
            x: Data x_0, (rows, *shape).
            noisy: x_t, with t the time ``index`` of the grid.
            index: Which link, from 0 at the noise, (rows,).
        """
        with torch.no_grad():  # as x_t has no gradient in them, either
            pairs = self.denoiser.schedule.levels(self.denoiser.schedule.log_snr(self.grid))
        levels = [level[at] for level in pairs for at in (index, index + 1)]
        alpha, next_alpha, sigma, next_sigma = (per_row(level, x) for level in levels)
        step = Step(self.grid[index], self.grid[index + 1], alpha, sigma, next_alpha, next_sigma)
        return link_cost(known, x, noisy, step, self.variance)

    def prior_cost(self, x: Tensor) -> Tensor:
        """L_T in nats, (rows,)."""
        with torch.no_grad():
            alpha, sigma = self.denoiser.at(x, self.grid[0])
        return prior_cost(x, alpha.to(x), sigma.to(x))

    def _given(self, context: Tensor | None) -> Denoiser:
        return self.denoiser if context is None else Given(self.denoiser, context)

    def _rows(self, x: Tensor | None, size: int | None) -> tuple[int, Tensor]:
        rows = rows_of(x, size, self.shape, "DDPM")
        return rows, next(self.parameters(), torch.zeros((), device=self.grid.device)).new_zeros(()) if x is None else x
