"""A likelihood that is known through simulations, by a critic that tells pairs from strangers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints

from inference.contract import Unsupported
from pyro_genmodels.autoencoders.ends import check_shape
from pyro_genmodels.base import StochasticModule
from pyro_genmodels.implicit.distribution import ImplicitDistribution, row_scores

__all__ = ["RatioDistribution", "RatioLikelihood"]

Simulator = Callable[[Tensor], Tensor]


class RatioDistribution(TorchDistribution):
    """p(x | θ), up to p(x).

        log_prob(x) = critic(x, θ) ≈ log p(x | θ) − log p(x)

    As a function of θ it is the likelihood, which is all that inference of θ at given data takes. As a function of x it is a
    density against p(x) dx instead of dx: evidences of models of other data or with another p(x) do not compare.

    Args:
        critic: Maps x, (rows, *event_shape), and θ, (rows, features), to one number a row.
        theta: (*batch, features).
        event_shape: Shape of one x.
        simulator: Draws x (…, *event_shape) at θ (…, features); None: it cannot be drawn from.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch looks it up on the class)

    def __init__(
        self, critic: Callable[..., Tensor], theta: Tensor, event_shape: Sequence[int], simulator: Simulator | None = None
    ) -> None:
        self.critic, self.theta, self.simulator = critic, theta, simulator
        super().__init__(theta.shape[:-1], torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> RatioDistribution:
        theta = self.theta.expand(*batch_shape, self.theta.shape[-1])
        return RatioDistribution(self.critic, theta, self.event_shape, self.simulator)

    def log_prob(self, value: Tensor) -> Tensor:
        """critic(x, θ), of the batch of x and θ together.

        Raises:
            ValueError: If x has another shape, or the critic does not take so many parameters.
        """
        if value.shape[value.dim() - self.event_dim :] != self.event_shape:
            raise ValueError(
                f"x has shape {tuple(value.shape)}, but this RatioLikelihood was built for rows of shape "
                f"{tuple(self.event_shape)}."
            )
        batch = torch.broadcast_shapes(value.shape[: value.dim() - self.event_dim], self.batch_shape)
        x, theta = value.expand(batch + self.event_shape), self.theta.expand(*batch, self.theta.shape[-1])
        scores = row_scores(self.critic, x.reshape(-1, *self.event_shape), theta.reshape(-1, theta.shape[-1]))
        return scores.reshape(batch)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Simulations (*sample_shape, *batch, *event).

        Raises:
            Unsupported: If there is no simulator.
        """
        if self.simulator is None:
            raise Unsupported(
                "A RatioLikelihood weighs data and cannot draw them. Observe its site, or build it with simulator=."
            )
        shape = torch.Size(sample_shape) + self.batch_shape
        x = self.simulator(self.theta.expand(*shape, self.theta.shape[-1]))
        if x.shape != shape + self.event_shape:
            raise ValueError(
                f"The simulator gave a tensor of shape {tuple(x.shape)}, but must give {tuple(shape + self.event_shape)}: a "
                f"row of shape {tuple(self.event_shape)} for each of its parameters."
            )
        return x


class RatioLikelihood(StochasticModule):
    """The likelihood of a simulator: ``pyro.sample("x", likelihood(theta), obs=x)`` works in any program.

        θ_n ~ p(θ),  x_n ~ simulator(θ_n),  critic(x, θ) → log p(x | θ) − log p(x)

    A critic that tells (x_n, θ_n) from (x_m, θ_n) of another simulation m has this for its best score. It is trained once,
    for all data and all priors whose mass lies where the θ_n do:

        Adversarial(critic=likelihood.critic, objective=Minimax(), learning_rate=None).fit(likelihood, x, theta)

    where ``model(x, theta)`` is the program of strangers, which has nothing to train. The score is only as good as the
    critic: E_p(θ) exp(critic(x, θ)) = 1 at every x, so that the evidence of one row under the simulated prior is 1.

    Args:
        critic: Maps x, (batch, *shape), and θ, (batch, features), to one number a row, such as
            ``Critic(shape, context=features)``. Bring both to scales near 1 within it.
        shape: Of one x, such as (2,); () for a number.
        simulator: Draws x, (…, *shape), at θ, (…, features), for predictions; None: there are none.

    References:
        K. Cranmer, J. Pavez and G. Louppe, Approximating likelihood ratios with calibrated discriminative classifiers
        (2015).
        J. Hermans, V. Begy and G. Louppe, Likelihood-free MCMC with amortized approximate ratio estimators (2020).

    Example:
        >>> from pyro_genmodels.implicit import Critic
        >>> likelihood = RatioLikelihood(Critic((2,), context=3), (2,))
        >>> likelihood(torch.zeros(3)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    def __init__(self, critic: nn.Module, shape: Sequence[int] = (), simulator: Simulator | None = None) -> None:
        super().__init__()
        self.critic, self.shape, self.simulator = critic, tuple(shape), simulator

    def forward(self, context: Tensor | None = None) -> RatioDistribution:
        """The likelihood at θ, of its batch shape.

        Args:
            context: θ, (*batch, features); a number goes as ``theta[..., None]``.
        """
        if context is None or context.dim() == 0:
            raise ValueError(
                "A RatioLikelihood needs its parameters, (…, features). A single number goes as theta[..., None]."
            )
        return RatioDistribution(self.critic, context, self.shape, self.simulator)

    def model(self, x: Tensor, theta: Tensor) -> Tensor:
        """Strangers: beside each θ_n stands the x of another row, any with the same probability.

        Args:
            x: Simulations, (rows, *shape).
            theta: What they were simulated at, (rows, features).
        """
        check_shape(x, self.shape, "RatioLikelihood")
        rows = len(x)
        if rows < 2 or theta.dim() != 2 or len(theta) != rows:
            raise ValueError(
                "A RatioLikelihood is trained on at least 2 rows, simulations x (rows, …) and parameters (rows, features), "
                f"but x has shape {tuple(x.shape)} and theta {tuple(theta.shape)}."
            )

        def stranger(u: Tensor) -> Tensor:
            away = 1 + (u * (rows - 1)).long().clamp(max=rows - 2)
            return x[(torch.arange(rows, device=x.device) + away) % rows]

        zero = theta.new_zeros(rows)
        with pyro.plate("rows", rows):
            drawn: Tensor = pyro.sample(
                "x", ImplicitDistribution(dist.Uniform(zero, zero + 1.0), stranger, self.shape), obs=x
            )
            return drawn
