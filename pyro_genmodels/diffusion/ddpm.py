"""Denoising diffusion as a hierarchical program, whose bound is L_T + Σ L_{t−1} + L_0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.diffusion.denoiser import Denoiser
from pyro_genmodels.diffusion.likelihood import bridge
from pyro_genmodels.diffusion.samplers import path, step_posterior, terminal

__all__ = ["DDPM"]


class DDPM(GenerativeModel):
    """Denoising diffusion: a chain from noise to data, each link a normal around what the denoiser expects.

        x_T ~ N(0, α_T² + σ_T²),  x_{t−1} ~ N(mean(x_t, x̂_0(x_t)), variance) for t = T, …, 2,  x ~ N(x̂_0(x_1), variance)

    The guide runs the other way's bridges in the *same* order, x_T | x and then x_{t−1} | x_t, x, so that program and guide
    have the same dependencies and ``TraceMeanField_ELBO`` takes every divergence in closed form: its terms are those of
    ``likelihood.variational_bound``. It has no weights. Each of the T links is a site and a call of the denoiser in turn:
    fit for tens of steps, not thousands.

    Args:
        denoiser: Any whose schedule has no noise at time 0.
        shape: Of one row.
        steps: T; times are equally far apart.
        variance: "upper", "lower" or "optimal", as in ``samplers.ancestral``; for "lower" the last link has the upper one.

    References:
        J. Ho, A. Jain, P. Abbeel, Denoising Diffusion Probabilistic Models (2020).
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
        self.denoiser, self.shape, self.variance = denoiser, tuple(shape), variance
        self.grid = denoiser.schedule.grid(steps, "time", start=0.0)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        rows, like = self._rows(x, size)
        events = len(self.shape)
        steps = path(self.denoiser, like, self.grid)
        scale = terminal(self.denoiser, self.grid, like).scale
        with pyro.plate("rows", rows):
            noisy = pyro.sample(f"x_{len(steps)}", dist.Normal(like.new_zeros(rows, *self.shape), scale).to_event(events))
            for i, step in zip(range(len(steps) - 1, 0, -1), steps):
                known = step_posterior(self.denoiser, noisy, step, self.variance)
                noisy = pyro.sample(f"x_{i}", dist.Normal(known.mean, known.root.to(noisy)).to_event(events))
            last = "upper" if self.variance == "lower" else self.variance
            known = step_posterior(self.denoiser, noisy, steps[-1], last)
            return pyro.sample("x", dist.Normal(known.mean, known.root.to(noisy)).to_event(events), obs=x)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        rows, like = self._rows(x, size)
        steps = path(self.denoiser, like, self.grid)
        with pyro.plate("rows", rows):
            mean, scale = steps[0].alpha * x, steps[0].sigma.to(x)
            noisy = pyro.sample(f"x_{len(steps)}", dist.Normal(mean, scale).to_event(len(self.shape)))
            for i, step in zip(range(len(steps) - 1, 0, -1), steps):
                mean, scale = bridge(step, x, noisy)
                noisy = pyro.sample(f"x_{i}", dist.Normal(mean, scale.to(x)).to_event(len(self.shape)))

    def _rows(self, x: Tensor | None, size: int | None) -> tuple[int, Tensor]:
        if x is None:
            if size is None:
                raise ValueError("Without data, DDPM draws rows: say how many, as in model(size=100).")
            return size, next((p for p in self.parameters()), torch.zeros(())).new_zeros(())
        if x.shape[1:] != self.shape:
            raise ValueError(f"Rows of x have the shape {tuple(x.shape[1:])}, but this DDPM was built for {self.shape}.")
        return len(x), x
