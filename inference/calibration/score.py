"""A translated model held against draws of its posterior, without any sampler: Stein's identities.

At draws of a density p on ℝᴰ that has p(x) = o(1 / |x|) in its tails, with the score s(x) = ∇ log p(x) and any constant m,

    E s_i(x) = 0,        E (x_i − m_i) s_i(x) = −1.

The first is blind to a scale that is wrong about the right centre (draws of N(0, 1) have a mean score of zero under N(0, 4)
as well); the second is not. Both are necessary, neither says that nothing is wrong.

References:
    C. Stein, A bound for the error in the normal approximation to the distribution of a sum of dependent random variables
        (1972).
    J. Gorham and L. Mackey, Measuring sample quality with Stein's method (2015).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inference import arviz
from inference.arrays import label
from inference.calibration.joint import Model
from inference.calibration.result import Result, plotted, table
from inference.contract import Unsupported
from inference.density import Density, Unconstrained
from inference.handlers import isolated, quiet, reproducible
from inference.posterior import Posterior
from inference.program import Program

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ScoreTest", "score_test"]

_FEWEST_DRAWS = 4  # a chain: below, ArviZ has no effective sample size
_WIDEST = 2**22  # numbers of data in one evaluation, rows of draws times size of the data
_ROWS = 256
_LINES = 20
_LEVEL = 0.99  # of the bounds in the plot


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ScoreTest(Result):
    """What ``score_test`` found; one element for each unconstrained coordinate, D of them.

    Attributes:
        names: Coordinates, (D,): the site, and the index into its unconstrained value, "beta[2]".
        scores: Site to ∂ log p at each draw, (chain, draw, *unconstrained).
        mean: Mean score, (D,).
        error: Its standard error, (D,), by ArviZ's effective sample size.
        slope: Mean of (x − x̄) · score, (D,): −1 for the right program.
        slope_error: Its standard error, (D,).
        ess: The smaller of the two effective sample sizes, (D,).
    """

    names: tuple[str, ...]
    scores: Mapping[str, np.ndarray]
    mean: np.ndarray
    error: np.ndarray
    slope: np.ndarray
    slope_error: np.ndarray
    ess: np.ndarray

    @property
    def z(self) -> np.ndarray:
        """Mean scores in standard errors, (D,)."""
        return _ratio(self.mean, self.error)

    @property
    def z_slope(self) -> np.ndarray:
        """Slopes above −1, in standard errors, (D,)."""
        return _ratio(self.slope + 1.0, self.slope_error)

    @property
    def worst(self) -> float:
        """The largest |z| of both kinds."""
        return float(max(np.abs(self.z).max(), np.abs(self.z_slope).max()))

    @property
    def p_value(self) -> float:
        """Probability of a z as large as the worst if the program is right: Student's t, times the 2 D looks."""
        from scipy.stats import t

        freedom = np.maximum(self.ess - 1.0, 1.0)
        tails = [2.0 * t.sf(np.abs(z), freedom) for z in (self.z, self.z_slope)]
        return float(min(1.0, np.min(tails) * 2 * len(self.names)))

    @property
    def title(self) -> str:
        return f"worst |z| {self.worst:.2f} of {2 * len(self.names)}, p = {self.p_value:.2g} (Bonferroni)"

    def __str__(self) -> str:
        largest = np.maximum(np.abs(self.z), np.abs(self.z_slope))
        shown = np.sort(np.argsort(-largest, kind="stable")[:_LINES])
        columns = [(self.mean, ".3g"), (self.z, ".2f"), (self.slope, ".3f"), (self.z_slope, ".2f"), (self.ess, ".0f")]
        rows = [[self.names[i], *(format(values[i], form) for values, form in columns)] for i in shown]
        lines = [table(("coordinate", "score", "z", "slope", "z", "ESS"), rows, align=">", most=_LINES)]
        if len(self.names) > len(shown):
            lines.append(f"and {len(self.names) - len(shown)} more, with smaller z")
        return "\n".join([*lines, self.title])

    def to_arviz(self) -> Any:
        """The scores as the group ``posterior``: site to (chain, draw, *unconstrained), whose means are to be zero."""
        return arviz.export({"posterior": self.scores}, attrs={"inference_library": "pyro-genmodels"})

    def plot(self) -> Figure:
        """Both z of every coordinate, and the bounds that one of them passes by chance in a hundred tests."""
        from scipy.stats import norm

        bound = float(norm.isf(0.5 * (1.0 - _LEVEL) / (2 * len(self.names))))
        return plotted(self.title, self.names, {"mean score": self.z, "slope": self.z_slope}, bound, _LEVEL)


def score_test(program: Model, draws: Mapping[str, Any] | Posterior, /, *args: Any, **kwargs: Any) -> ScoreTest:
    """Tests a program, without a sampler, at draws of what should be its posterior.

    Args:
        program: A Pyro program, or a model object with the method ``model``.
        draws: Site to draws (chain, draw, *site) or (draw, *site) on the constrained scale, or a Posterior. Names that are
            no latent sites are ignored if the program has them as deterministic or observed ones. Discrete sites are held
            at their draws; finite ones that are not named are summed out.
        *args: The program's data. Everything after ``draws`` goes to the program.
        **kwargs: The program's keyword arguments.

    Raises:
        Unsupported: If the program has no density that can be differentiated.
        ValueError: If a site is missing, unknown, of the wrong shape or outside its support, or if draws are too few.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def coin(heads):
        ...     fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        ...     pyro.sample("heads", dist.Binomial(10, fairness), obs=heads)
        >>> draws = torch.distributions.Beta(9.0, 5.0).sample((4000,))  # 7 heads
        >>> score_test(coin, {"fairness": draws}, torch.tensor(7.0)).p_value > 1e-6
        True
    """
    with isolated(0), quiet():
        looked = Program(program, args, kwargs)
        with reproducible(looked.dtype, looked.device):
            values, chains = _checked(looked, draws.draws if isinstance(draws, Posterior) else draws)
            coordinates = Unconstrained(looked, looked.continuous)
            position = coordinates.position({site: values.pop(site) for site in coordinates.sites})
            _require_finite(coordinates, position)
            summed = [site for site in looked.finite if site not in values]
            staged = Density(looked, rung="vmapped").unconstrained(coordinates, summed)
            size = max((leaf.numel() for leaf in looked.data), default=1)
            rows = max(1, min(_ROWS, _WIDEST // max(size, 1)))
            parts = [
                staged(position[i : i + rows], {site: value[i : i + rows] for site, value in values.items()})[0]
                for i in range(0, len(position), rows)
            ]
    scores = torch.cat(parts).cpu().double().numpy().reshape(chains, -1, coordinates.size)
    if not np.isfinite(scores).all():
        bad = _names(coordinates)[int((~np.isfinite(scores)).any((0, 1)).argmax())]
        raise ValueError(f"The score in {bad} is NaN or infinite at some draws: they have density zero under the program.")
    where = position.cpu().double().numpy().reshape(scores.shape)
    slopes = (where - where.mean((0, 1))) * scores
    (mean, error, ess), (slope, slope_error, slope_ess) = _summary(scores), _summary(slopes)
    split = np.split(scores, np.cumsum(coordinates.sizes)[:-1], -1)
    shapes = [tuple(coordinates.shapes[site]) for site in coordinates.sites]
    return ScoreTest(
        names=_names(coordinates),
        scores={s: p.reshape(*p.shape[:2], *shape) for s, p, shape in zip(coordinates.sites, split, shapes, strict=True)},
        mean=mean,
        error=error,
        slope=slope,
        slope_error=slope_error,
        ess=np.minimum(ess, slope_ess),
    )


def _checked(program: Program, draws: Mapping[str, Any]) -> tuple[dict[str, Tensor], int]:
    """Draws of the latent sites as (chain · draw, *site), and the number of chains."""
    if not program.continuous:
        raise Unsupported(f"{program.name} has no continuous site: there is no score.")
    known = {*program.latents, *program.observed_sites, *program.deterministic}
    if unknown := sorted(draws.keys() - known):
        raise ValueError(
            f"draws names '{unknown[0]}', but {program.name} has the latent sites {', '.join(program.latents)}."
        )
    values: dict[str, Tensor] = {}
    lead: tuple[int, ...] = ()
    for name, site in program.latents.items():
        if name not in draws:
            if name in program.finite:
                continue
            raise ValueError(f"draws lacks the site '{name}' of {program.name}.")
        value = torch.as_tensor(draws[name], device=program.device)
        value = value.to(program.dtype if site.dtype.is_floating_point else site.dtype)
        own = tuple(value.shape[: value.dim() - len(site.shape)])
        if not 1 <= len(own) <= 2 or value.shape != (*own, *site.shape):
            raise ValueError(
                f"draws gives '{name}' the shape {tuple(value.shape)}, but it must be (chain, draw, *site) or "
                f"(draw, *site), and the site has {tuple(site.shape)}."
            )
        if values and own != lead:
            raise ValueError(f"draws gives '{name}' {own} draws, but {lead} to the sites before it.")
        lead = own
        values[name] = value.reshape(-1, *site.shape)
    chains, length = (1, *lead)[-2:]
    if length < _FEWEST_DRAWS:
        raise ValueError(f"A standard error needs {_FEWEST_DRAWS} draws a chain, but there are {length}.")
    return values, chains


def _require_finite(coordinates: Unconstrained, position: Tensor) -> None:
    """The inverse of a bijection is not finite at the edge of a support and beyond."""
    for site, part in zip(coordinates.sites, position.split(coordinates.sizes, -1), strict=True):
        if bad := int((~part.isfinite()).any(-1).sum()):
            raise ValueError(f"{bad} of the {len(part)} draws of '{site}' lie outside its support, or at its edge.")


def _names(coordinates: Unconstrained) -> tuple[str, ...]:
    shapes, sizes = coordinates.shapes, coordinates.sizes
    return tuple(
        label(site, i, shapes[site]) for site, size in zip(coordinates.sites, sizes, strict=True) for i in range(size)
    )


def _summary(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, its standard error and its effective sample size of (chain, draw, coordinate); a constant has no error."""
    spread, count = values.std((0, 1), ddof=1), values.shape[0] * values.shape[1]
    ess = np.where(spread > 0, arviz.ess(values, method="mean"), float(count))
    return values.mean((0, 1)), spread / np.sqrt(ess), ess


def _ratio(value: np.ndarray, error: np.ndarray) -> np.ndarray:
    """value / error, where nothing by nothing is nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(value == 0, 0.0, value / error)
