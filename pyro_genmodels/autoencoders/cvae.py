"""Conditional variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_genmodels.autoencoders.ends import (
    Decoder,
    Encoder,
    centre,
    check_data,
    check_labels,
    check_shape,
    filled,
    like,
    one_hot,
    rows_of,
)
from pyro_genmodels.autoencoders.latent import check_beta, mirrored, sized
from pyro_genmodels.autoencoders.likelihoods import Bernoulli, Likelihood
from pyro_genmodels.autoencoders.priors import Prior, StandardNormal, VampPrior
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.nets import MLP

__all__ = ["CVAE"]


class CVAE(GenerativeModel):
    """Conditional variational autoencoder: rows that come with a context, which is not explained.

        z_n ~ p(z)  or  p(z | c_n),  x_n ~ p(x | decoder(z_n, c_n)),    guessed by q(z_n | encoder(x_n, c_n)),  c the context

    A context is a label or a vector of numbers; pictures are flattened. Entries of x that are NaN are left out: a CVAE of
    the lower half of a picture given the upper one may have all of the picture for x, with NaN in the upper half.

    Sites: ``z`` (rows, features), ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        shape: Of one x, such as (28, 28).
        context: Numbers in a context; of labels, the number of classes.
        features: Numbers in z; None: those of ``prior``, else 20.
        prior: p(z), and the family of q(z | x, context); None: ``StandardNormal(features)``.
        conditional_prior: Whether z has a prior that a network computes from the context, of the family of the guess, as in
            the paper; else it has ``prior``, whatever the context.
        likelihood: p(x | decoder(z, context)); None: ``Bernoulli()``.
        encoder: Network from (batch, *shape) and (batch, context) to (batch, ``prior.outputs``); None: an ``MLP``.
        decoder: Network from (batch, features) and (batch, context) to ``likelihood.outputs`` numbers an entry of x,
            (batch, k, *shape) or flattened; None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``, from x to z.
        beta: Weight of the divergence of the guess from the prior in the bound that ``SVI`` maximises.

    References:
        K. Sohn, H. Lee and X. Yan, Learning structured output representation using deep conditional generative models
        (2015).

    Example:
        >>> import torch
        >>> model = CVAE((8, 8), context=10, features=2)
        >>> model.sample(torch.arange(10)).shape
        torch.Size([10, 8, 8])
    """

    def __init__(
        self,
        shape: Sequence[int],
        context: int,
        features: int | None = None,
        *,
        prior: Prior | None = None,
        conditional_prior: bool = False,
        likelihood: Likelihood | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        hidden: Sequence[int] = (512, 256),
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        if context < 1:
            raise ValueError(f"context is {context}, but must be the numbers in a context, at least 1. Take a VAE for none.")
        if isinstance(prior, VampPrior):
            raise ValueError(
                "A VampPrior is made of guesses at x alone, but a CVAE guesses from x and a context. Take another."
            )
        features = sized(features, None if prior is None else prior.features, 20, type(prior).__name__)
        self.shape, self.context, self.beta = tuple(shape), context, check_beta(beta)
        self.prior = StandardNormal(features) if prior is None else prior
        self.decoder = Decoder(shape, features, likelihood or Bernoulli(), decoder, mirrored(hidden), context)
        reader = f"{type(self.prior).__name__} with {features} features"
        self.encoder = Encoder(shape, self.prior.outputs, reader, encoder, hidden, context)
        self.expect = MLP(context, self.prior.outputs, hidden) if conditional_prior else None

    def prepare(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the data.

        Args:
            x: All the data, (rows, *shape), floating; NaN where an entry is missing.
            context: Labels (rows,), integers, or numbers (rows, …), floating.
            size: Not used; ``prepare`` has the signature of ``model``.

        Raises:
            ValueError: If they are of another shape, have values that the likelihood has not, a row without any, a label
                that is none, or a context that is not finite.
        """
        if x is None:
            return
        check_data(x, self.shape, self.decoder.likelihood, "CVAE")
        self._check_context(context, len(x))
        assert context is not None
        if context.is_floating_point() and not bool(context.isfinite().all()):
            raise ValueError("context holds values that are NaN or infinite, but is not explained: fill them in.")
        if not context.is_floating_point():
            check_labels(context, len(x), self.context, name="context")

    def _check_context(self, context: Tensor | None, rows: int | None = None) -> None:
        if context is None:
            raise ValueError(f"This CVAE needs a context of {self.context} numbers, or a label, for each row.")
        if rows is not None and len(context) != rows:
            raise ValueError(f"context has {len(context)} rows, but x has {rows}.")
        if context.is_floating_point() and (context.dim() < 2 or context[0].numel() != self.context):
            advice = " Pass context.long() if these are labels." if context.dim() == 1 else ""
            raise ValueError(
                f"context has shape {tuple(context.shape)}, but must be (rows, {self.context}), numbers, or (rows,), labels."
                + advice
            )

    def _rows(self, x: Tensor | None, context: Tensor | None, size: int | None) -> int:
        rows = None if x is None else rows_of(x, None, self.shape, "CVAE")
        self._check_context(context, rows if size is None or x is not None else size)
        assert context is not None
        return len(context)

    def _numbers(self, context: Tensor, module: nn.Module) -> Tensor:
        """The context as numbers, (rows, context)."""
        if context.is_floating_point():
            return context.flatten(1)
        weight = next(module.parameters())
        return one_hot(context.to(weight.device), self.context, weight.dtype)

    def _given(self, context: Tensor) -> TorchDistribution:
        """p(z | context), of contexts (rows, context)."""
        if self.expect is not None:
            return self.prior.posterior(self.expect(context))
        return self.prior()

    def model(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> Tensor:
        rows = self._rows(x, context, size)
        assert context is not None
        numbers = self._numbers(context, self.decoder)
        with pyro.plate("rows", rows):
            z = pyro.sample("z", self._given(numbers))
            return pyro.sample("x", self.decoder(z, numbers), obs=x)

    def guide(self, x: Tensor | None = None, context: Tensor | None = None, size: int | None = None) -> None:
        """z of each row from q(z | encoder(x, context)); without data, from its prior."""
        rows = self._rows(x, context, size)
        assert context is not None
        numbers = self._numbers(context, self.decoder)
        with pyro.plate("rows", rows):
            pyro.sample("z", self._given(numbers) if x is None else self.prior.posterior(self.encoder(x, numbers)))

    # ------------------------------------------------------------------------------ conveniences
    def _floating(self, context: Tensor) -> Tensor:
        self._check_context(context)
        return like(self._numbers(context, self.decoder), self)

    @torch.no_grad()
    def encode(self, x: Tensor, context: Tensor) -> TorchDistribution:
        """q(z | x, context), the guess at z.

        Args:
            x: (rows, *shape), NaN where an entry is missing.
            context: Labels (rows,) or numbers (rows, …).

        Returns:
            Batch shape (rows,), event shape (features,).
        """
        check_shape(x, self.shape, "CVAE")
        self._check_context(context, len(x))
        return self.prior.posterior(self.encoder(like(x, self), self._floating(context)))

    @torch.no_grad()
    def expected(self, context: Tensor) -> TorchDistribution:
        """p(z | context), batch shape (rows,), of labels (rows,) or numbers (rows, …)."""
        numbers = self._floating(context)
        return self._given(numbers).expand(torch.Size((len(numbers),)))

    @torch.no_grad()
    def decode(self, z: Tensor, context: Tensor) -> TorchDistribution:
        """p(x | z, context), of z (…, rows, features), batch shape (…, rows)."""
        if z.shape[-1:] != (self.decoder.features,):
            raise ValueError(f"z has shape {tuple(z.shape)}, but must be (…, {self.decoder.features}).")
        return self.decoder(like(z, self), self._floating(context))

    @torch.no_grad()
    def reconstruct(self, x: Tensor, context: Tensor) -> Tensor:
        """Mean of x at the mean of q(z | x, context), (rows, *shape)."""
        return self.decoder.mean(centre(self.encode(x, context)), self._floating(context))

    @torch.no_grad()
    def sample(self, context: Tensor) -> Tensor:
        """A new row for each context, (rows, *shape)."""
        return self.decode(self.expected(context).sample(), context).sample()

    @torch.no_grad()
    def complete(self, x: Tensor, context: Tensor, draws: int = 1) -> Tensor:
        """x with its missing entries drawn from p(x | z, context) at draws of z from the guess, (draws, rows, *shape)."""
        z = self.encode(x, context).sample(torch.Size((draws,)))
        return filled(x, self.decode(z, context).sample())
