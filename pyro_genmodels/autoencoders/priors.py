"""Priors of what an autoencoder hides, each with the family that its guide guesses in."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor, nn

from pyro_genmodels.base import StochasticModule
from pyro_genmodels.distributions import Beta, HypersphericalUniform, Kumaraswamy, PowerSpherical, VonMisesFisher

__all__ = ["Cube", "Flow", "NormalMixture", "Prior", "Sphere", "StandardNormal", "VampPrior"]

# Of guides: outside, rounding in float32 is worse than what is left to learn, and one bad batch may end a fit.
_LOG_SCALES = (-9.0, 9.0)


class Prior(StochasticModule):
    """p(z) of a vector of d numbers, and the family of q(z | x) that goes with it.

    ``pyro.sample("z", prior())`` in the model, ``pyro.sample("z", prior.posterior(encoder(x)))`` in the guide.

    Attributes:
        features: d.
        outputs: Numbers that an encoder gives per row.
    """

    features: int
    outputs: int

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        if not isinstance(features, int) or features < 1:
            raise ValueError(f"{type(self).__name__} needs at least 1 feature, but features is {features!r}.")
        self.features, self.outputs = features, outputs

    @abc.abstractmethod
    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> Any:
        """p(z), of event shape (d,).

        Args:
            encode: x to q(z | x), the guide's; only a prior that is made of the guide's guesses looks at it.
        """

    def posterior(self, outputs: Tensor) -> TorchDistribution:
        """q(z | x).

        Args:
            outputs: The encoder's numbers, (…, outputs).

        Returns:
            Batch shape (…), event shape (d,).

        Raises:
            ValueError: If the encoder gave another number of outputs.
        """
        if outputs.shape[-1:] != (self.outputs,):
            raise ValueError(
                f"The encoder gave numbers of shape {tuple(outputs.shape)}, but {type(self).__name__} with {self.features} "
                f"features takes {self.outputs} per row, (…, {self.outputs})."
            )
        return self._guess(outputs)

    @abc.abstractmethod
    def _guess(self, outputs: Tensor) -> Any:
        """q(z | x), of numbers that are as many as they should be."""


class _Normal(Prior, abc.ABC):
    """A prior on R^d; guesses are independent normals: means first, then logarithms of standard deviations."""

    def __init__(self, features: int) -> None:
        super().__init__(features, 2 * features)

    def _guess(self, outputs: Tensor) -> Any:
        loc, log_scale = outputs.chunk(2, -1)
        return dist.Normal(loc, log_scale.clamp(*_LOG_SCALES).exp()).to_event(1)


class StandardNormal(_Normal):
    """z ~ N(0, I_d); guesses are independent normals.

    Args:
        features: d.

    References:
        D. Kingma and M. Welling, Auto-encoding variational Bayes (2014).
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.zeros: Tensor
        self.register_buffer("zeros", torch.zeros(features), persistent=False)

    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> Any:
        return dist.Normal(self.zeros, torch.ones_like(self.zeros)).to_event(1)


class NormalMixture(_Normal):
    """A mixture of normals whose weights, means and scales are learned; guesses are independent normals.

        z ~ Σ_k w_k N(μ_k, diag s_k²)

    The means start at draws from a standard normal distribution, so that no two components learn the same.

    Args:
        features: d.
        components: K.

    References:
        N. Dilokthanakul et al., Deep unsupervised clustering with Gaussian mixture variational autoencoders (2016).
    """

    def __init__(self, features: int, components: int = 10) -> None:
        super().__init__(features)
        _at_least_one(self, components)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, features))
        self.log_scale = nn.Parameter(torch.zeros(components, features))

    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> Any:
        parts = dist.Normal(self.loc, self.log_scale.clamp(*_LOG_SCALES).exp()).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits), parts)


def _at_least_one(prior: Prior, components: int) -> None:
    if not isinstance(components, int) or components < 1:
        raise ValueError(f"{type(prior).__name__} needs at least 1 component, but components is {components}.")


class VampPrior(_Normal):
    """The mixture of the guide's guesses at rows that are learned: pseudo-inputs u_k.

        z ~ 1/K Σ_k q(z | x = u_k)

    Args:
        features: d.
        components: K.
        shape: Shape of a row of data.
        interval: Where the data are, and the pseudo-inputs. They start near its middle; ``start_from`` puts them at rows.

    Raises:
        ValueError: If an argument is no number or shape, or the interval is empty.

    References:
        J. Tomczak and M. Welling, VAE with a VampPrior (2018).
    """

    def __init__(
        self, features: int, components: int, shape: Sequence[int], interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__(features)
        _at_least_one(self, components)
        if isinstance(shape, int):
            raise ValueError(f"shape is {shape}, but must be that of a row of data, such as ({shape},).")
        if not interval[0] < interval[1]:
            raise ValueError(f"interval is {interval}, but its first number must be less than its second.")
        self.shape, self.interval = tuple(shape), interval
        self.logits = nn.Parameter(0.5 * torch.randn(components, *self.shape))  # of the place in the interval

    @property
    def inputs(self) -> Tensor:
        """Pseudo-inputs, (K, *shape)."""
        low, high = self.interval
        return low + (high - low) * torch.sigmoid(self.logits)

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Puts the pseudo-inputs at rows, drawn without replacement by torch's global generator.

        They are moved a twentieth of the way to the middle of the interval, from whose ends there is no gradient.

        Args:
            x: (rows, *shape), at least K rows; what is missing is in the middle.

        Raises:
            ValueError: If there are too few rows, or of another shape.
        """
        components = len(self.logits)
        if tuple(x.shape[1:]) != self.shape or len(x) < components:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, but these {components} pseudo-inputs start from as many rows at least, "
                f"each of shape {self.shape}."
            )
        low, high = self.interval
        place = (x[torch.randperm(len(x))[:components].to(x.device)] - low) / (high - low)
        place = torch.where(place.isnan(), 0.5, place).clamp(0.0, 1.0)
        self.logits.copy_(torch.logit(0.025 + 0.95 * place))

    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> Any:
        if encode is None:
            raise ValueError(
                "A VampPrior is made of the guide's guesses: call it with the function from x to q(z | x), prior(encode)."
            )
        parts = encode(self.inputs)
        if parts.batch_shape != self.logits.shape[:1] or parts.event_shape != (self.features,):
            raise ValueError(
                f"encode gave a distribution of batch shape {tuple(parts.batch_shape)} and event shape "
                f"{tuple(parts.event_shape)} for {len(self.logits)} pseudo-inputs, but a VampPrior needs "
                f"({len(self.logits)},) and ({self.features},)."
            )
        return dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros_like(self.logits.flatten(1)[:, 0])), parts)


class Sphere(Prior):
    """z is uniform on the unit sphere of R^d; guesses have a direction and a concentration.

        z ~ Uniform(S^(d−1));    q(z | x) ∝ exp(κ μᵀz), or (1 + μᵀz)^κ

    The encoder gives d numbers whose direction is μ, and one whose softplus is κ. The divergence from the prior does not
    depend on μ, and it has a closed form.

    Args:
        features: d, at least 2; the sphere has d − 1 dimensions.
        family: "von-mises-fisher" or "power-spherical".

    Raises:
        ValueError: If the family is neither, or d is less than 2.

    References:
        T. Davidson et al., Hyperspherical variational auto-encoders (2018).
        N. De Cao and W. Aziz, The power spherical distribution (2020).
    """

    def __init__(self, features: int, family: str = "von-mises-fisher") -> None:
        super().__init__(features, features + 1)
        if features < 2:
            raise ValueError(f"Sphere needs at least 2 features, but features is {features}: on a line it has two points.")
        if family not in _DIRECTIONS:
            raise ValueError(f'family is {family!r}, but must be "von-mises-fisher" or "power-spherical".')
        self.family = family
        self.pole: Tensor
        self.register_buffer("pole", torch.eye(features)[0], persistent=False)

    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> HypersphericalUniform:
        return HypersphericalUniform(self.features, self.pole)

    def _guess(self, outputs: Tensor) -> Any:
        direction, raw = outputs[..., :-1], outputs[..., -1]
        # an encoder that gives zeros, as a new one without a bias may, has no direction
        direction = torch.where((direction == 0.0).all(-1, keepdim=True), self.pole.to(outputs), direction)
        direction = direction / direction.abs().amax(-1, keepdim=True).detach()  # squares of small numbers are zero
        loc = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        return _DIRECTIONS[self.family](loc, torch.nn.functional.softplus(raw))


_DIRECTIONS = {"von-mises-fisher": VonMisesFisher, "power-spherical": PowerSpherical}


class Cube(Prior):
    """The numbers of z are independent, each between 0 and 1; so are guesses, each with two parameters.

        z_i ~ Beta(a, b);    q(z_i | x) = Kumaraswamy or Beta

    The encoder gives d numbers for the first parameters, then d for the second; their softplus is taken, and a floor added,
    below which most of the mass rounds to 0 and 1. The divergence from the prior has a closed form, but for one number that
    is integrated.

    Args:
        features: d.
        family: "kumaraswamy" or "beta".
        concentration1: a of the prior; 1 and 1 are uniform.
        concentration0: b of the prior.

    Raises:
        ValueError: If the family is neither, or a or b is not positive.

    References:
        E. Nalisnick and P. Smyth, Stick-breaking variational autoencoders (2017).
    """

    def __init__(
        self, features: int, family: str = "kumaraswamy", concentration1: float = 1.0, concentration0: float = 1.0
    ) -> None:
        super().__init__(features, 2 * features)
        if family not in _FRACTIONS:
            raise ValueError(f'family is {family!r}, but must be "kumaraswamy" or "beta".')
        if min(concentration1, concentration0) <= 0.0:
            raise ValueError(f"concentrations are {concentration1:g} and {concentration0:g}, but must be positive.")
        self.family = family
        self.concentration1: Tensor
        self.concentration0: Tensor
        self.register_buffer("concentration1", torch.full((features,), concentration1), persistent=False)
        self.register_buffer("concentration0", torch.full((features,), concentration0), persistent=False)

    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> Any:
        return Beta(self.concentration1, self.concentration0).to_event(1)

    def _guess(self, outputs: Tensor) -> Any:
        # softplus(x + 0.54) is 1 at x = 0: a new encoder guesses what is uniform
        raw = torch.nn.functional.softplus(outputs + _UNIFORM) + _LEAST_CONCENTRATION
        return _FRACTIONS[self.family](*raw.chunk(2, -1)).to_event(1)


_FRACTIONS: dict[str, Any] = {"kumaraswamy": Kumaraswamy, "beta": Beta}
_LEAST_CONCENTRATION = 0.05
_UNIFORM = math.log(math.expm1(1.0 - _LEAST_CONCENTRATION))


class Flow(Prior):
    """Another prior on R^d, moved by invertible transforms that are learned; guesses are those of the other prior.

        z = (T_n ∘ … ∘ T_1)(w),  w ~ prior

    The density of a guess needs w, hence the inverses: coupling layers and splines have them, ``Planar`` has none, and that
    of an autoregressive layer takes a step per feature.

    Args:
        prior: The distribution of w.
        transforms: Pyro's transforms of vectors of d numbers, applied in this order; those that are modules, or inverses of
            modules, are trained.

    Raises:
        ValueError: If the prior is not on R^d, or a transform has no inverse, or is not for d numbers, or leads out of R^d.

    Example:
        >>> from pyro.distributions import transforms
        >>> prior = Flow(StandardNormal(4), [transforms.affine_coupling(4, hidden_dims=[16])])
        >>> prior().sample().shape
        torch.Size([4])

    References:
        X. Chen et al., Variational lossy autoencoder (2017).
        I. Kobyzev, S. Prince and M. Brubaker, Normalizing flows: an introduction and review of current methods (2021).
    """

    def __init__(self, prior: Prior, transforms: Sequence[Any]) -> None:
        super().__init__(prior.features, prior.outputs)
        if not isinstance(prior, (_Normal, Flow)):
            raise ValueError(f"A Flow moves a prior on R^d, but {type(prior).__name__} is not on all of it.")
        if isinstance(transforms, torch.distributions.Transform):
            raise ValueError(f"A Flow takes a list of transforms, but was given {type(transforms).__name__} itself.")
        if not transforms:
            raise ValueError(f"A Flow has at least one transform; without any it is {type(prior).__name__} itself.")
        self.prior = prior
        self._transforms = tuple(transforms)
        self.layers = nn.ModuleList()
        for number, transform in enumerate(transforms):
            _try(transform, number, prior.features)
            self.layers.extend([part for part in (transform, transform.inv) if isinstance(part, nn.Module)])

    def forward(self, encode: Callable[[Tensor], Any] | None = None) -> Any:
        self._forget()
        return dist.TransformedDistribution(self.prior(encode), list(self._transforms))

    def _guess(self, outputs: Tensor) -> Any:
        return self.prior.posterior(outputs)

    def _forget(self) -> None:
        """Clears what transforms keep of their last call: it is wrong for other weights, and graphs have no copies."""
        parts: list[Any] = [*self._transforms, *(t for t in self.layers.modules() if hasattr(t, "clear_cache"))]
        for transform in parts:
            transform.clear_cache()
            kept = [name for name, value in vars(transform).items() if name.startswith("_cache") and torch.is_tensor(value)]
            vars(transform).update(dict.fromkeys(kept))

    def __getstate__(self) -> dict[str, Any]:
        self._forget()
        return dict(vars(self))


@torch.no_grad()
def _try(transform: Any, number: int, features: int) -> None:
    """Sends two vectors through a transform and back."""
    x = torch.linspace(-1.0, 1.0, 2 * features).reshape(2, features)
    what = f"Transform {number} of this Flow, {type(transform).__name__},"
    try:
        y = transform(x)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{what} does not take vectors of {features} numbers, as its prior has: {error}") from error
    if y.shape != x.shape or not _is_real(transform.codomain):
        raise ValueError(f"{what} leads out of R^{features}, where guesses are.")
    try:
        transform.inv(y.clone())
    except (NotImplementedError, KeyError) as error:
        raise ValueError(
            f"{what} has no inverse, which the density of a guess needs. Take couplings, splines or autoregressive layers."
        ) from error


def _is_real(constraint: Any) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real
