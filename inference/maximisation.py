"""The M-step of EM where it has no closed form: gradient steps on Q over sites and weights.

Growth of sites on a simplex of which exp Q is a polynomial without negative coefficients, such as the weights of mixtures
that a program sums out by itself (not those that Categorical normalises: that hides the exponents); L-BFGS for few other
parameters, whose steps are taken only where Q rises; Adam for many, and for a Q that is itself random.

References:
    L. Baum and J. Eagon, An inequality with applications to statistical estimation for probabilistic functions of Markov
        processes and to a model for ecology (1967).
    D. Liu and J. Nocedal, On the limited memory BFGS method for large scale optimization (1989).
    D. Kingma and J. Ba, Adam: a method for stochastic optimization (2015).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.utils._pytree import tree_map

from inference.density import Unconstrained
from inference.expectation import Batch, Completed, Evidence, Values, Weights

__all__ = ["FEW", "Adam", "climb", "grow", "is_growing", "stroll"]

FEW = 1000  # parameters that L-BFGS takes
_LONGEST_CLIMB = 20  # iterations of one M-step


def _masses(
    task: Completed, sites: tuple[str, ...], values: Values, particles: Values, weights: Weights, batch: Batch
) -> tuple[Values, Tensor]:
    """θ ∂Q/∂θ of the sites, (restart, *site): the expected exponent of each entry; and Q, (restart,)."""
    expected = task.q()
    fixed = {name: value for name, value in task.theta(values).items() if name not in sites}

    def slopes(own: Values, others: Values, p: Values, w: Evidence, data: list[Tensor]) -> tuple[Values, Tensor]:
        return grad_and_value(lambda v: expected({**others, **v}, p, w, data))(own)

    staged = task.density.stage(("grow", sites, task.key(batch)), slopes, (True, True, True, True, False))
    own = {name: values[name] for name in sites}
    exact = lambda: (own, fixed, particles, weights.tables, batch.data)  # noqa: E731
    found, reached = staged(own, fixed, particles, weights.parts, batch.data, instead=exact)
    return {name: batch.processes.mean(found[name]) * values[name] for name in sites}, batch.processes.mean(reached)


def is_growing(task: Completed, site: str, values: Values, particles: Values, weights: Weights, batch: Batch) -> bool:
    """Whether no entry of a site on a simplex has a negative exponent at the values, so that ``grow`` may raise Q."""
    masses = _masses(task, (site,), values, particles, weights, batch)[0][site]
    rounding = 1e-9 if masses.dtype == torch.float64 else 1e-4
    return bool((masses >= -rounding * masses.abs().amax()).all()) and bool((masses.sum(-1) > 0).all())


def grow(
    task: Completed, sites: tuple[str, ...], values: Values, particles: Values, weights: Weights, batch: Batch
) -> tuple[Values, Tensor]:
    """θ ∂Q/∂θ, normalised, of sites on simplices, all at once.

    If exp Q is a polynomial in them without negative coefficients this does not lower it, whatever its degree; for mixtures
    it is the step of EM, though the responsibilities are nowhere written down.

    Returns:
        Proposed values of the sites, (restart, *site), and Q before, (restart,).
    """
    masses, reached = _masses(task, sites, values, particles, weights, batch)
    proposed = {}
    for name, mass in masses.items():
        positive = mass.nan_to_num(nan=0.0).clamp(min=torch.finfo(mass.dtype).tiny)
        proposed[name] = positive / positive.sum(-1, keepdim=True)
    return proposed, reached


class Adam(NamedTuple):
    """Adam over the climbed sites' positions and over the weights, which torch trains in place.

    Attributes:
        position: Unconstrained values of the climbed sites, (restart, size).
        optimiser: The optimiser of position and weights.
    """

    position: Tensor
    optimiser: torch.optim.Adam

    @classmethod
    def start(cls, task: Completed, sites: tuple[str, ...], values: Values, rate: float) -> Adam:
        """At values, (restart, *site), with fresh moments."""
        position = _position(Unconstrained(task.program, sites), values).detach().clone().requires_grad_()
        return cls(position, torch.optim.Adam([position, *task.program.weights.values()], lr=rate))


def _position(coordinates: Unconstrained, values: Values) -> Tensor:
    if coordinates.sites:
        return coordinates.position(values)
    like = next(iter(values.values()), torch.zeros(1))
    return like.new_zeros(len(like) if like.dim() else 1, 0, dtype=torch.get_default_dtype())


class _Slope:
    """−Q and its gradients in position and weights."""

    def __init__(
        self,
        task: Completed,
        sites: tuple[str, ...],
        values: Values,
        particles: Values,
        weights: Weights,
        batch: Batch,
    ) -> None:
        self.task, self.particles, self.weights, self.batch = task, particles, weights, batch
        self.coordinates = Unconstrained(task.program, sites)
        self.fixed = {name: value for name, value in task.theta(values).items() if name not in sites}
        expected = task.q()

        def at(position: Tensor, others: Values, p: Values, w: Evidence, data: list[Tensor]) -> Tensor:
            return expected({**others, **self.coordinates.values(position)}, p, w, data)

        def slope(position: Tensor, others: Values, p: Values, w: Evidence, data: list[Tensor]) -> Any:
            return grad_and_value(lambda x: at(x, others, p, w, data))(position)

        self.at = at
        key = ("climb", sites, task.key(batch))
        self.staged = task.density.stage(key, slope, (True, True, True, True, False))

    def __call__(self, position: Tensor, trained: list[Tensor]) -> Tensor:
        """−Q, summed over restarts; leaves its gradients in ``.grad``."""
        if trained:  # one restart: the weights are the program's own
            row = {name: value[0] for name, value in self.fixed.items()}
            particles = {name: value[0].detach() for name, value in self.particles.items()}  # of the E-step, at weights
            weights = tree_map(Tensor.detach, self.weights.first)  # that were
            with torch.enable_grad():
                loss = -self.at(position[0], row, particles, weights, self.batch.data)
                loss.backward()
            return self.batch.processes.average(loss.detach(), [position, *trained], list)
        free, data = position.detach(), self.batch.data
        exact = lambda: (free, self.fixed, self.particles, self.weights.tables, data)  # noqa: E731
        found = self.staged(free, self.fixed, self.particles, self.weights.parts, data, instead=exact)
        gradient, value = (self.batch.processes.mean(part) for part in found)
        position.grad = -gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return -value.sum().nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)


def climb(
    task: Completed, sites: tuple[str, ...], values: Values, particles: Values, weights: Weights, batch: Batch
) -> Values:
    """L-BFGS on Q; weights are trained in place.

    Returns:
        Proposed values of the sites, (restart, *site).
    """
    slope = _Slope(task, sites, values, particles, weights, batch)
    position = _position(slope.coordinates, values).requires_grad_()
    trained = list(task.program.weights.values())
    optimiser = torch.optim.LBFGS([position, *trained], max_iter=_LONGEST_CLIMB, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        return slope(position, trained)

    with torch.no_grad():
        optimiser.step(closure)
    return slope.coordinates.values(position.detach()) if sites else {}


def stroll(
    adam: Adam,
    task: Completed,
    sites: tuple[str, ...],
    values: Values,
    particles: Values,
    weights: Weights,
    batch: Batch,
    count: int,
    rate: float,
) -> Values:
    """``count`` steps of Adam on Q, at the given learning rate; weights are trained in place.

    Returns:
        Values of the sites, (restart, *site).
    """
    slope = _Slope(task, sites, values, particles, weights, batch)
    trained = list(task.program.weights.values())
    for group in adam.optimiser.param_groups:
        group["lr"] = rate
    for _ in range(count):
        adam.optimiser.zero_grad()
        slope(adam.position, trained)
        adam.optimiser.step()
    return slope.coordinates.values(adam.position.detach()) if sites else {}
