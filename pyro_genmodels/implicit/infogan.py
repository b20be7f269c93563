"""InfoGAN: a GAN some of whose noise can be read off what it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional

from pyro_genmodels.autoencoders.ends import check_shape, like, one_hot, row_shape, rows_of
from pyro_genmodels.base import GenerativeModel
from pyro_genmodels.implicit.generator import Generator
from pyro_genmodels.nets import MLP

__all__ = ["InfoGAN"]


class InfoGAN(GenerativeModel):
    """Information-maximising GAN: a category and a few numbers are hidden in every row, and recognised in it.

        c_n ~ Categorical(1 / K),  u_n ~ U(−1, 1),  ε_n ~ N(0, I),  x_n = network(ε_n, (c_n, u_n)),
        guessed by q(c_n, u_n | recogniser(x_n))

    ``Adversarial`` trains generator and recogniser to raise E[log q(c, u | x) − log p(c, u)], which is at most the mutual
    information of codes and x, and at most log K where there is a category only.

    Sites: ``category`` (rows,), ``code`` (rows, codes), ``x`` (rows, *shape). Plate: ``rows``.

    Args:
        shape: Of one x, such as (28, 28).
        features: Numbers in ε.
        categories: Number of categories K; 0: there are none.
        codes: Numbers in u; 0: there are none.
        network: From (batch, features) and (batch, K + codes) to (batch, *shape) or that flattened; None: an ``MLP``.
        recogniser: From (batch, *shape) to (batch, K + 2 codes), logits of the category, then means and scales of the codes;
            None: an ``MLP``.
        hidden: Widths of the hidden layers of the ``MLP``s.
        least_scale: Floor of the standard deviations of q(u | x), positive: without it the bound of a code that is read
            exactly has no end. A code is worth log 2 − ½ log(2π least_scale²) nats at most. Where that is more than the
            log K of the category, as at 0.01, pictures are made to tell the codes first, and look it.

    Raises:
        ValueError: If there is nothing to hide, or ``least_scale`` is not positive and finite.

    References:
        X. Chen et al., InfoGAN: interpretable representation learning by information maximizing generative adversarial nets
        (2016).

    Example:
        >>> model = InfoGAN((8, 8), categories=10, codes=2)
        >>> x = model.sample(5)
        >>> x.shape, model.categories_of(x).shape
        (torch.Size([5, 8, 8]), torch.Size([5, 10]))
    """

    def __init__(
        self,
        shape: Sequence[int],
        features: int = 16,
        categories: int = 10,
        codes: int = 0,
        *,
        network: nn.Module | None = None,
        recogniser: nn.Module | None = None,
        hidden: Sequence[int] = (128, 128),
        least_scale: float = 0.01,
    ) -> None:
        super().__init__()
        if categories == 1 or min(categories, codes) < 0 or not categories + codes:
            raise ValueError(
                f"InfoGAN hides a category of at least 2, or numbers, but categories is {categories} and codes {codes}. "
                "Take a GAN to hide nothing."
            )
        if not 0.0 < least_scale < math.inf:
            raise ValueError(f"least_scale is {least_scale!r}, but must be positive and finite, such as 0.01.")
        self.shape, self.categories, self.codes = row_shape(shape, "InfoGAN"), categories, codes
        self.least_scale = least_scale
        self.generator = Generator(shape, features, context=categories + codes, network=network, hidden=hidden)
        outputs, inputs = categories + 2 * codes, int(torch.Size(self.shape).numel())
        self.recogniser = MLP(inputs, outputs, hidden, nn.LeakyReLU) if recogniser is None else recogniser

    def prepare(self, x: Tensor | None = None, size: int | None = None) -> None:
        """Looks at the data.

        Raises:
            ValueError: If they are of another shape.
        """
        if x is not None:
            check_shape(x, self.shape, "InfoGAN")

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        zero = self.generator.zero
        with pyro.plate("rows", rows_of(x, size, self.shape, "InfoGAN")):
            parts = []
            if self.categories:
                category = pyro.sample("category", dist.Categorical(logits=zero.expand(self.categories)))
                parts.append(one_hot(category, self.categories, zero.dtype))
            if self.codes:
                ends = zero.expand(self.codes)
                parts.append(pyro.sample("code", dist.Uniform(ends - 1.0, ends + 1.0).to_event(1)))
            return pyro.sample("x", self.generator(torch.cat(parts, -1)), obs=x)

    def guide(self, x: Tensor, size: int | None = None) -> None:
        """Category and codes of each row, from q(c, u | recogniser(x))."""
        found = self._recognised(x)
        with pyro.plate("rows", len(x)):
            if self.categories:
                pyro.sample("category", dist.Categorical(logits=found[:, : self.categories]))
            if self.codes:
                loc, raw = found[:, self.categories :].chunk(2, -1)
                pyro.sample("code", dist.Normal(loc, functional.softplus(raw) + self.least_scale).to_event(1))

    def _recognised(self, x: Tensor) -> Tensor:
        check_shape(x, self.shape, "InfoGAN")
        found: Tensor = self.recogniser(x)
        outputs = self.categories + 2 * self.codes
        if found.shape != (len(x), outputs):
            raise ValueError(
                f"The recogniser gave a tensor of shape {tuple(found.shape)} for {len(x)} rows, but must give "
                f"({len(x)}, {outputs}): logits of {self.categories} categories, means and scales of {self.codes} codes."
            )
        return found

    @torch.no_grad()
    def sample(self, size: int) -> Tensor:
        """New rows, (size, *shape)."""
        drawn: Tensor = self.model(None, size=size)
        return drawn

    @torch.no_grad()
    def categories_of(self, x: Tensor) -> Tensor:
        """Probabilities of the categories of rows (rows, *shape), (rows, K)."""
        if not self.categories:
            raise ValueError("This InfoGAN was built without categories.")
        return self._recognised(like(x, self))[:, : self.categories].softmax(-1)
