"""The E-step of EM: points that stand for the continuous latents, and the weight of every factor at each of them.

With tables log f_i(z, u, θ) of all factors (z finite, u continuous and averaged, θ maximised), one backward pass through
the enumerated density gives the posterior probability of every entry of every table, chains of states included:

    w_i = ∂ log Z / ∂ log f_i,    log Z = log Σ_z exp Σ_i log f_i,    Q(θ) = Σ_i ⟨w_i, log f_i(θ)⟩.

Where a table is linear in few numbers, as that of normal rows is in their natural parameters, the derivatives in those stand
for the weights: the expected statistics are all that an M-step asks of the rows.

u is replaced by points: sigma points, which are exact, where its conditional is Gaussian; two points with the expected
statistics, exact too, where it is positive with conditionals of a known family (both in ``inference.latents``); and draws
elsewhere (``inference.monte_carlo``).

References:
    A. Darwiche, A differential approach to inference in Bayesian networks (2003).
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.utils._pytree import tree_map

from inference.density import Density
from inference.distributed import ALONE, Processes
from inference.enumeration import Factor, Part, draw_back, eliminate, factors, plates_of, total
from inference.program import Program
from inference.staging import Staged

__all__ = ["ALL", "Batch", "Completed", "Enumerated", "Evidence", "Expectation", "Moved", "Weights"]

Values = dict[str, Tensor]


class Batch(NamedTuple):
    """The rows that a step sees: the program's tensors cut down to them (none: all rows), and rows in all by rows seen.

    Several ``processes`` see different rows; the mean of what each of them finds is what all rows would give.
    """

    data: list[Tensor]
    scale: float
    processes: Processes = ALONE


ALL = Batch([], 1.0)


class Evidence(NamedTuple):
    """What an E-step knows of one point, or of many, with leading axes.

    Attributes:
        weights: For each factor the weights of its table, or of the natural parameters that its table is linear in.
        hidden: Name of an ``Augmented`` statement to the summary of what it hides.
    """

    weights: list[Part]
    hidden: dict[str, Any]


class Weights:
    """The weights of all factors at each point, (restart, particle, ...).

    Args:
        parts: For each factor those of its table, or of the natural parameters that its table is linear in.
        tables: Gives those of all tables.
    """

    def __init__(self, parts: Evidence, tables: Callable[[], Evidence]) -> None:
        self.parts = parts
        self._tables = tables

    @cached_property
    def tables(self) -> Evidence:
        """Those of all tables, formed when they are asked for."""
        return self._tables()

    @property
    def first(self) -> Evidence:
        """Those of the only restart, (particle, ...)."""
        return tree_map(lambda weight: weight[0], self.parts)


@dataclass(frozen=True)
class Completed:
    """The log-joint as EM sees it: factors of θ, of points of the continuous averaged sites and of tables over finite ones.

    Args:
        program: The program.
        density: Its densities.
        maximised: Names of the sites that are θ.
        is_likelihood: Whether the priors of θ are left out.
        is_hard: Whether the finite sites take their most probable values instead of being averaged.
    """

    program: Program
    density: Density
    maximised: tuple[str, ...]
    is_likelihood: bool
    is_hard: bool

    def theta(self, values: Mapping[str, Tensor]) -> Values:
        """What is maximised, among values of all sites."""
        return {name: values[name] for name in self.maximised}

    def batched(self, values: Mapping[str, Tensor]) -> tuple[Values, Tensor]:
        """θ, and a tensor that has the restart axis where there is no θ: weights have one restart."""
        theta = self.theta(values)
        count = len(next(iter(theta.values()))) if theta else 1
        return theta, torch.zeros(count, dtype=self.program.dtype, device=self.program.device)

    def factors(self, values: Mapping[str, Tensor], data: list[Tensor]) -> list[Factor]:
        """The factors at values, (restart, ...), with other data if there are any."""
        found = factors(self.program, values, self.program.finite, data or None, is_lazy=True)
        return [f for f in found if not (self.is_likelihood and f.site in self.maximised)]

    def log_z(self, values: Mapping[str, Tensor], batch: Batch = ALL) -> Tensor:
        """log Σ_z p(data, z, values), or the maximum over z; a scalar."""
        return self._eliminated(self.factors(values, batch.data), batch.scale)

    def _is_filled(self, factor: Factor) -> bool:
        """Whether what a statement hides is filled in. Weights are trained in place: there is no E-step at earlier ones."""
        return factor.node is not None and not self.program.weights

    def _eliminated(self, found: list[Factor], scale: float) -> Tensor:
        scales = dict.fromkeys(self.program.row_plates, scale) if scale != 1.0 else None
        places = plates_of(self.program, self.program.finite)
        left, _ = eliminate(found, places, maximise=self.is_hard, scales=scales)
        return total(left)

    def expect(self, values: Mapping[str, Tensor], particles: Values, batch: Batch) -> tuple[Tensor, Weights]:
        """log Z at each point, (restart, particle), and the weights of all factors there."""
        value, parts = self._expect(batch)(self.batched(values), particles, batch.data)
        return value, self.weights(parts, values, particles, batch)

    def weights(self, parts: Evidence, values: Mapping[str, Tensor], particles: Values, batch: Batch) -> Weights:
        """Weights that ``expect`` gave at these values."""
        inputs = self.batched(values), particles, batch.data
        return Weights(parts, lambda: self._expect(batch).row_by_row(*inputs)[1])

    def _expect(self, batch: Batch) -> Staged:
        def expect(inputs: tuple[Values, Tensor], particles: Values, data: list[Tensor]) -> tuple[Tensor, Evidence]:
            theta, _ = inputs

            def one(particle: Values) -> tuple[Tensor, Evidence]:
                found = self.factors({**theta, **particle}, data)

                def log_z(parts: list[Part]) -> Tensor:
                    replaced = [f.with_part(part) for f, part in zip(found, parts, strict=True)]
                    return self._eliminated(replaced, batch.scale)

                weights, value = grad_and_value(log_z)([f.part for f in found])
                hidden = {f.site: f.summary(w) for f, w in zip(found, weights, strict=True) if self._is_filled(f)}
                return value, Evidence(weights, hidden)

            if particles:
                return vmap(one)(particles)
            value, evidence = one({})
            return value[None], tree_map(lambda part: part[None], evidence)

        return self.density.stage(("expect", self.key(batch)), expect, (True, True, False))

    def q(self) -> Callable[..., Tensor]:
        """Q(θ) of one restart: a function of θ, particles, weights and data."""

        def expected(theta: Values, particles: Values, weights: Evidence, data: list[Tensor]) -> Tensor:
            def one(particle: Values, at: Evidence) -> Tensor:
                found = self.factors({**theta, **particle}, data)
                terms = [
                    f.expected(at.hidden[f.site]) if self._is_filled(f) else f.dot(w)
                    for f, w in zip(found, at.weights, strict=True)
                ]
                return torch.stack(terms).sum()

            if particles:
                return vmap(one)(particles, weights).mean()
            return one({}, tree_map(lambda weight: weight[0], weights))

        return expected

    def expected(self, values: Mapping[str, Tensor], particles: Values, weights: Weights, batch: Batch) -> Tensor:
        """Q at ``values``, (restart,)."""
        expected = self.q()

        def at(inputs: tuple[Values, Tensor], particles: Values, weights: Evidence, data: list[Tensor]) -> Tensor:
            return expected(inputs[0], particles, weights, data)

        staged = self.density.stage(("Q", self.key(batch)), at, (True, True, True, False))
        inputs = self.batched(values)
        exact = lambda: (inputs, particles, weights.tables, batch.data)  # noqa: E731
        return batch.processes.mean(staged(inputs, particles, weights.parts, batch.data, instead=exact))

    def gradients(
        self,
        name: str,
        at: Tensor,
        values: Mapping[str, Tensor],
        particles: Values,
        weights: Weights,
        batch: Batch,
        is_exact: bool = False,
    ) -> Tensor:
        """Gradient of Q in one site at the points ``at`` (point, restart, *site), same shape; row by row if ``is_exact``."""
        expected = self.q()

        def at_points(points: Tensor, theta: Values, p: Values, w: Evidence, data: list[Tensor]) -> Tensor:
            return vmap(grad(lambda value: expected({**theta, name: value}, p, w, data)))(points)

        key = ("Q message", name, self.key(batch))
        staged = self.density.stage(key, at_points, (True, True, True, True, False))
        points, theta = at.movedim(0, 1).contiguous(), self.theta(values)
        exact = lambda: (points, theta, particles, weights.tables, batch.data)  # noqa: E731
        if is_exact:
            found = staged.row_by_row(*exact())
        else:
            found = staged(points, theta, particles, weights.parts, batch.data, instead=exact)
        return batch.processes.mean(found).movedim(1, 0)

    def key(self, batch: Batch) -> tuple[Any, ...]:
        """What functions of this density are told apart by."""
        return self.maximised, self.is_likelihood, self.is_hard, batch.scale

    def most_probable(self, values: Values) -> Values:
        """The most probable joint values of the finite sites given all others, (restart, *site)."""
        program = self.program

        def best(others: Values) -> Values:
            found = factors(program, others, program.finite)
            _, records = eliminate(found, plates_of(program, program.finite), maximise=True)
            picked, _ = draw_back(program, records, lambda sites, logits, positions=None: logits.argmax(-1))
            result = {}
            for site in program.finite:
                choices = program.latents[site].choices
                assert choices is not None
                zeros = torch.zeros(program.latents[site].batch_shape, dtype=torch.long, device=choices.device)
                index = picked.get(site, zeros).unsqueeze(0)  # torch before 2.7 takes a batched number for one to be read
                result[site] = choices[index].squeeze(0)
            return result

        others = {name: value for name, value in values.items() if name not in program.finite}
        if not others:
            count = len(next(iter(values.values())))
            return {name: value.expand(count, *value.shape) for name, value in best({}).items()}
        return self.density.stage(("most probable", program.finite), best, (True,))(others)


class Moved(NamedTuple):
    """What an E-step hands to the M-step.

    Attributes:
        memory: The state of the E-step.
        particles: Continuous averaged site to points, (restart, particle, *site).
        log_q: Log-density of each point, whose mean is exact for sigma points and estimated for draws; (restart, particle).
        values: Values of the averaged sites to go on from, (restart, *site).
    """

    memory: Any
    particles: Values
    log_q: Tensor
    values: Values


@dataclass(frozen=True)
class Expectation(abc.ABC):
    """How the continuous averaged sites are handled.

    Args:
        sites: Their names.
    """

    sites: tuple[str, ...] = ()

    @property
    @abc.abstractmethod
    def update(self) -> str:
        """What a plan prints."""

    @property
    def is_random(self) -> bool:
        """Whether the weights are an estimate from draws."""
        return False

    @abc.abstractmethod
    def init(self, values: Values, task: Completed) -> Any:
        """The memory of the E-step, at values of all sites (restart, *site)."""

    @abc.abstractmethod
    def step(self, memory: Any, values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        """Points that represent the conditional given θ.

        Args:
            memory: What ``init`` or the last step gave.
            values: Values of all latent sites, (restart, *site).
            task: The completed density.
            batch: The rows.
            adapts: Number of steps for which samplers adapt, 0 once they must not.
        """

    def marginal(self, theta: Values, memory: Any, task: Completed) -> Tensor:
        """log p(data, θ) of one restart, to be differentiated; a scalar."""
        raise NotImplementedError


@dataclass(frozen=True)
class Enumerated(Expectation):
    """There are no continuous averaged sites: tables are all there is."""

    @property
    def update(self) -> str:
        return "Enumerate"

    def init(self, values: Values, task: Completed) -> tuple[()]:
        return ()

    def step(self, memory: tuple[()], values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        like = next((values[name] for name in task.maximised), None)
        restarts = 1 if like is None else len(like)
        return Moved((), {}, torch.zeros(restarts, 1, dtype=task.program.dtype, device=task.program.device), {})

    def marginal(self, theta: Values, memory: tuple[()], task: Completed) -> Tensor:
        return task.log_z(theta)
