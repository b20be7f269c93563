"""A distribution that can be drawn from, and has no density."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import pyro
import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor
from torch.distributions import constraints

from inference.contract import Unsupported

__all__ = ["ImplicitDistribution", "NoiseReparam", "row_scores"]


class ImplicitDistribution(TorchDistribution):
    """What comes out of a function of noise.

        ε ~ p(ε),  x = push(ε)

    It has ``rsample``, whose gradients go through ``push``, and no ``log_prob``. As a hidden site of a program it is
    inferred through its noise (``NoiseReparam``); as an observed one, its weights are trained by ``inference.Adversarial``.

    Args:
        noise: p(ε), with the batch shape that the result is to have.
        push: Maps ε, (*sample, *batch, *noise.event_shape), to x, (*sample, *batch, *event_shape).
        event_shape: Shape of one x.

    References:
        S. Mohamed and B. Lakshminarayanan, Learning in implicit generative models (2016).

    Example:
        >>> import pyro.distributions as dist
        >>> noise = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        >>> ImplicitDistribution(noise, lambda e: e.square().sum(-1), ()).sample((5,)).shape
        torch.Size([5])
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (torch looks it up on the class)
    has_rsample = True

    def __init__(self, noise: TorchDistribution, push: Callable[[Tensor], Tensor], event_shape: Sequence[int] = ()) -> None:
        self.noise, self.push = noise, push
        super().__init__(torch.Size(noise.batch_shape), torch.Size(event_shape), validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> ImplicitDistribution:
        wide = copy.copy(self)  # of whatever class
        noise = self.noise.expand(torch.Size(batch_shape))
        ImplicitDistribution.__init__(wide, noise, self.push, self.event_shape)
        return wide

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws (*sample_shape, *batch, *event).

        Raises:
            ValueError: If ``push`` gives another shape.
        """
        shape = torch.Size(sample_shape)
        return self.pushed(self.noise.rsample(shape) if self.noise.has_rsample else self.noise.sample(shape))

    def pushed(self, noise: Tensor) -> Tensor:
        """push(ε), (*sample, *batch, *event), checked for its shape."""
        lead = noise.shape[: noise.dim() - self.noise.event_dim]
        x = self.push(noise)
        if x.shape != lead + self.event_shape:
            raise ValueError(
                f"push gave a tensor of shape {tuple(x.shape)} for noise of shape {tuple(noise.shape)}, but its draws "
                f"must have shape {tuple(lead + self.event_shape)}: event_shape is {tuple(self.event_shape)}."
            )
        return x

    def log_prob(self, value: Tensor) -> NoReturn:
        """Raises ``Unsupported``: there is none."""
        raise Unsupported(
            "ImplicitDistribution has draws, but no log_prob. Train it against data by Adversarial(critic), in a guide by "
            "AdversarialVI(critic). Infer it as a hidden site through its noise: poutine.reparam(program, config={site: "
            "NoiseReparam()}). For data that are seen through it, give the program noise and an observation model: "
            "z ~ Normal, y ~ Normal(generator.push(z), s)."
        )


def row_scores(critic: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """The critic's scores of rows, (rows,).

    Raises:
        ValueError: If it does not take such rows, or gives anything but one number a row.
    """
    count = len(rows[0])
    try:
        scores = critic(*rows)
    except RuntimeError as error:  # of torch, of shapes: what the critic's own layers say names neither it nor the rows
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise
        shapes = " and ".join(str(tuple(part.shape)) for part in rows)
        advice = " Give it what it was built for, or build it for these, such as Critic(shape, context=numbers)."
        raise ValueError(f"The critic does not take {shapes}: {str(error).splitlines()[0].rstrip('.')}.{advice}") from error
    if not isinstance(scores, Tensor) or scores.shape not in ((count,), (count, 1)):
        came = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
        raise ValueError(f"The critic must give one number a row, ({count},) or ({count}, 1), but gave {came}.")
    return scores.reshape(count)


class NoiseReparam(Reparam):
    """Makes of a hidden site x of an ``ImplicitDistribution`` its noise, and of x what is computed from that.

        ε ~ p(ε),  x = push(ε),  and with a critic D: p(ε | D) ∝ p(ε) exp(D(push(ε)))

    The program has the site ``x_noise`` then, which every sampler can move, and a deterministic ``x``; with a critic, also
    the factor ``x_critic``. Where D = log p(x) − log q(x), of data p and draws q of the generator, the noise is that of the
    data: x ~ p, however wrong the generator is, as long as it reaches wherever p has mass. That is what a critic learns
    whose objective is ``Minimax()`` or ``NonSaturating()``; the scores of others are no log-ratio.

    Args:
        critic: Maps x, (rows, *event_shape), to log p(x) − log q(x), (rows,) or (rows, 1); None takes the generator at its
            word.

    References:
        T. Che et al., Your GAN is secretly an energy-based model and you should use discriminator driven latent sampling
        (2020).

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro import poutine
        >>> def program(y):
        ...     noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        ...     x = pyro.sample("x", ImplicitDistribution(noise, torch.exp, (2,)))
        ...     pyro.sample("y", dist.Normal(x.sum(), 1.0), obs=y)
        >>> known = poutine.reparam(program, config={"x": NoiseReparam()})
        >>> sorted(poutine.trace(known).get_trace(torch.zeros(())).stochastic_nodes)
        ['x_noise']
    """

    def __init__(self, critic: Callable[[Tensor], Tensor] | None = None) -> None:
        self.critic = critic

    def apply(self, msg: Any) -> Any:
        name, fn = msg["name"], msg["fn"]
        fn, event_dim = self._unwrap(fn)
        if not isinstance(fn, ImplicitDistribution):
            raise Unsupported(
                f"NoiseReparam is for an ImplicitDistribution, but '{name}' is {type(fn).__name__}. Leave it out of config=."
            )
        if msg["is_observed"]:
            raise Unsupported(
                f"'{name}' is observed, and its noise cannot be told from its value. Add an observation model, such as "
                f"Normal({name}, s), and observe that; or train the weights by Adversarial(critic)."
            )
        noise_dim = event_dim - len(fn.event_shape) + fn.noise.event_dim
        x = fn.pushed(pyro.sample(f"{name}_noise", self._wrap(fn.noise, noise_dim)))
        if self.critic is not None:
            scores = row_scores(self.critic, x.reshape(-1, *fn.event_shape))
            pyro.factor(f"{name}_critic", scores.reshape(*x.shape[: x.dim() - event_dim], -1).sum(-1))
        return {"fn": Delta(x, event_dim=event_dim).mask(False), "value": x, "is_observed": True}
