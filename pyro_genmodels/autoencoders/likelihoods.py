"""Likelihoods: what a decoder's numbers say of the data, p(x | decoder(z)).

The entries of an array, pixels, are independent given the decoder's numbers. An entry that is NaN has not been observed and
counts nothing.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_genmodels.distributions as own

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretisedLogistic",
    "Gaussian",
    "Likelihood",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
]

# In units of the distance of two levels: a logistic variable that is narrower is sure of its level, and has no gradient.
_LEAST_SCALE_OF_LEVELS = 0.05


class Likelihood(nn.Module, abc.ABC):
    """A distribution of arrays whose entries are independent, given what a decoder says of each: k numbers.

    ``likelihood(outputs, dims)`` is a distribution, for ``pyro.sample("x", likelihood(decoder(z), dims), obs=x)``.
    """

    outputs: int = 1  # numbers of the decoder per entry of x, k
    domain: str  # the values that entries may have, in words
    advice: str  # what to do with others

    def forward(self, outputs: Tensor, dims: int) -> own.Entries:
        """The distribution of arrays.

        Args:
            outputs: The decoder's numbers, (*batch, k, *shape).
            dims: Number of dimensions of an array, len(shape).

        Returns:
            Batch shape ``batch``, event shape ``shape``.

        Raises:
            ValueError: If there are not k numbers per entry.
        """
        axis = -dims - 1
        if outputs.dim() <= dims or outputs.shape[axis] != self.outputs:
            raise ValueError(
                f"outputs has shape {tuple(outputs.shape)}, but {type(self).__name__} takes {self.outputs} per entry of x: "
                f"(…, {self.outputs}, *shape), with {dims} dimensions in shape."
            )
        return own.Entries(self.given(outputs.movedim(axis, -1)), dims)

    @abc.abstractmethod
    def given(self, outputs: Tensor) -> Any:
        """The distribution of each entry.

        Args:
            outputs: The decoder's numbers, (*batch, *shape, k).

        Returns:
            A distribution of one number, batch shape (*batch, *shape).
        """

    @abc.abstractmethod
    def is_inside(self, x: Tensor) -> Tensor:
        """Which entries the likelihood may have drawn, in the shape of x; what it says of NaN does not matter."""

    def check(self, x: Tensor) -> None:
        """Looks at data once, before they are fitted. NaN is a missing entry.

        Args:
            x: (…, *shape).

        Raises:
            ValueError: If an entry is outside the domain; it says which one, and what to do.
        """
        is_inside = self.is_inside(x)
        if is_inside.all():
            return
        is_outside = ~(is_inside | x.isnan())
        if is_outside.any():
            value, count = x[is_outside][0].item(), int(is_outside.sum())
            raise ValueError(
                f"x has the value {value:g}, but entries of {type(self).__name__} are {self.domain}; {count} of "
                f"{x.numel()} are not. {self.advice}"
            )

    def mean(self, outputs: Tensor, dims: int) -> Tensor:
        """Mean of each entry, (*batch, *shape): a reconstruction. Of labels, the most probable one.

        Args:
            outputs: The decoder's numbers, (*batch, k, *shape).
            dims: len(shape).
        """
        return self(outputs, dims).mean


class _Grey(Likelihood, abc.ABC):
    """Entries between 0 and 1."""

    domain = "in [0, 1]"
    advice = "Scale them, x / 255 for bytes, or take another likelihood, such as Gaussian."

    def is_inside(self, x: Tensor) -> Tensor:
        return (x >= 0.0) & (x <= 1.0)


class _Real(Likelihood, abc.ABC):
    """Entries that may be any number."""

    domain = "finite"
    advice = "Leave the rows out, or make entries that have not been observed NaN."

    def is_inside(self, x: Tensor) -> Tensor:
        return x.isfinite()


class _Count(Likelihood, abc.ABC):
    """Entries that count something."""

    domain = "counts, 0, 1, 2, …"
    advice = "Give counts as they are, not scaled, nor their logarithms."

    def is_inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & x.isfinite() & (x == x.round())


class Bernoulli(_Grey):
    """Black and white pixels, p(x = 1) = 1 / (1 + exp(−output)).

    Grey pixels between 0 and 1 pass ``check``, since they are probabilities to draw the pixels from, anew in each batch: one
    must, before the density is asked for, which of grey pixels is none. ``ContinuousBernoulli`` has a density of grey ones.

    Example:
        >>> Bernoulli()(torch.zeros(1, 2, 2), 2).log_prob(torch.tensor([[0.0, 1.0], [1.0, torch.nan]]))
        tensor(-2.0794)
    """

    def given(self, outputs: Tensor) -> dist.Bernoulli:
        return dist.Bernoulli(logits=outputs[..., 0])


class ContinuousBernoulli(_Grey):
    """Grey pixels between 0 and 1: a density proportional to a Bernoulli's probability, but normalised.

    The mean is not 1 / (1 + exp(−output)), which is only the parameter that a Bernoulli would have.

    References:
        G. Loaiza-Ganem and J. Cunningham, The continuous Bernoulli: fixing a pervasive error in variational autoencoders
        (2019).
    """

    def given(self, outputs: Tensor) -> own.ContinuousBernoulli:
        return own.ContinuousBernoulli(outputs[..., 0])


class Gaussian(_Real):
    """Entries that are normal around the decoder's mean.

        x ~ N(mean, s²),    s² = least_scale² + exp(2 log-scale)

    Without a floor the density has no bound: a decoder that hits one row exactly may be as sure of it as it likes.

    Args:
        variance: "fixed": s is ``scale``, as it is. "shared": one s for all entries, a weight that starts at ``scale``.
            "each": the decoder gives log-scales, after the means.
        scale: See ``variance``; not used by "each".
        least_scale: The floor; 1e-3 is a quarter of a level of bytes divided by 255.

    Raises:
        ValueError: If ``variance`` is none of these, or ``scale`` is not above ``least_scale``, or that is negative.

    References:
        P.-A. Mattei and J. Frellsen, Leveraging the exact likelihood of deep latent variable models (2018).
        O. Rybkin, K. Daniilidis and S. Levine, Simple and effective VAE training with calibrated decoders (2021).
    """

    def __init__(self, variance: str = "shared", scale: float = 1.0, least_scale: float = 1e-3) -> None:
        super().__init__()
        if variance not in ("fixed", "shared", "each"):
            raise ValueError(f'variance is {variance!r}, but must be "fixed", "shared" or "each".')
        if not 0.0 <= least_scale < scale < math.inf:
            raise ValueError(
                f"scale is {scale:g} and least_scale is {least_scale:g}, but 0 ≤ least_scale < scale must hold."
            )
        self.variance, self.least_scale = variance, least_scale
        self.outputs = 2 if variance == "each" else 1
        self.log_scale: Any = None
        self.fixed_scale: Any
        if variance == "fixed":
            self.register_buffer("fixed_scale", torch.tensor(scale), persistent=False)
        elif variance == "shared":
            self.log_scale = nn.Parameter(torch.tensor(0.5 * math.log(scale**2 - least_scale**2)))

    def given(self, outputs: Tensor) -> dist.Normal:
        loc = outputs[..., 0]
        return dist.Normal(loc, self._scale(outputs).expand(loc.shape))

    def _scale(self, outputs: Tensor) -> Any:
        if self.variance == "fixed":
            return self.fixed_scale
        return _above(self.log_scale if self.variance == "shared" else outputs[..., 1], self.least_scale)


def _above(log_scale: Tensor, least: float) -> Tensor:
    """√(least² + exp(2 log-scale)), which has a gradient everywhere."""
    return torch.hypot(log_scale.exp(), torch.full_like(log_scale, least))


class DiscretisedLogistic(Likelihood):
    """Grey levels 0, 1/(bins − 1), …, 1: a logistic variable rounded to them; bytes divided by 255.

    The decoder gives locations, then log-scales.

    Args:
        bins: Number of levels, at least 2.

    References:
        D. Kingma et al., Improved variational inference with inverse autoregressive flow (2016), appendix.
    """

    outputs = 2

    def __init__(self, bins: int = 256) -> None:
        super().__init__()
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"DiscretisedLogistic needs at least 2 levels, but bins is {bins!r}.")
        self.bins = bins
        self.domain = f"levels k / {bins - 1}, k = 0, …, {bins - 1}"
        self.advice = f"Divide whole numbers by {bins - 1}, round, or set bins to the number of levels there are."

    def given(self, outputs: Tensor) -> own.DiscretisedLogistic:
        scale = _above(outputs[..., 1], _LEAST_SCALE_OF_LEVELS / (self.bins - 1))
        return own.DiscretisedLogistic(outputs[..., 0], scale, self.bins)

    def is_inside(self, x: Tensor) -> Tensor:
        inside: Tensor = own.DiscretisedLogistic(x.new_zeros(()), x.new_ones(()), self.bins).support.check(x)
        return inside


class Categorical(Likelihood):
    """Labels 0, …, K − 1; the decoder gives K logits for each.

    Args:
        classes: K, at least 2.
    """

    advice = "Number the labels from 0, or set classes to their number."

    def __init__(self, classes: int) -> None:
        super().__init__()
        if not isinstance(classes, int) or classes < 2:
            raise ValueError(f"Categorical needs at least 2 classes, but classes is {classes!r}.")
        self.outputs = classes
        self.domain = f"labels 0, …, {classes - 1}"

    def given(self, outputs: Tensor) -> dist.Categorical:
        return dist.Categorical(logits=outputs)

    def is_inside(self, x: Tensor) -> Tensor:
        return (x >= 0) & (x < self.outputs) & (x == x.round())


class StudentT(_Real):
    """Entries with outliers. The decoder gives locations, then log-scales, then what makes the degrees of freedom.

        x ~ location + s t_ν,    ν = 2 + softplus(output)

    Args:
        df: Degrees of freedom ν, above 1, so that there is a mean; None leaves them to the decoder.
        least_scale: Floor of the scale s, as in ``Gaussian``.

    Raises:
        ValueError: If an argument is too small.

    References:
        P.-A. Mattei and J. Frellsen, MIWAE: deep generative modelling and imputation of incomplete data sets (2019).
    """

    def __init__(self, df: float | None = None, least_scale: float = 1e-3) -> None:
        super().__init__()
        if least_scale < 0.0 or (df is not None and df <= 1.0):
            raise ValueError(f"df is {df} and least_scale is {least_scale:g}, but df > 1 and least_scale ≥ 0 must hold.")
        self.df, self.least_scale = df, least_scale
        self.outputs = 3 if df is None else 2

    def given(self, outputs: Tensor) -> dist.StudentT:
        loc, scale = outputs[..., 0], _above(outputs[..., 1], self.least_scale)
        df = 2.0 + torch.nn.functional.softplus(outputs[..., 2]) if self.df is None else torch.full_like(loc, self.df)
        return dist.StudentT(df, loc, scale)


class Poisson(_Count):
    """Counts; the decoder gives logarithms of rates."""

    def given(self, outputs: Tensor) -> own.LogPoisson:
        return own.LogPoisson(outputs[..., 0])


class NegativeBinomial(_Count):
    """Counts that vary more than Poisson's; the decoder gives logarithms of means.

        x ~ NegativeBinomial,  E x = m,  Var x = m + m² / r

    Args:
        size: "shared", one r for all entries, a weight that starts at 1; "each", the decoder gives logarithms of r after
            those of the means.

    Raises:
        ValueError: If ``size`` is neither.

    References:
        R. Lopez et al., Deep generative modeling for single-cell transcriptomics (2018).
    """

    def __init__(self, size: str = "each") -> None:
        super().__init__()
        if size not in ("shared", "each"):
            raise ValueError(f'size is {size!r}, but must be "shared" or "each".')
        self.outputs = 2 if size == "each" else 1
        self.log_size = nn.Parameter(torch.zeros(())) if size == "shared" else None

    def given(self, outputs: Tensor) -> Any:
        return own.NegativeBinomial(outputs[..., 0], outputs[..., 1] if self.log_size is None else self.log_size)
