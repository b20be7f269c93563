"""The E-step of EM: points that stand for the continuous latents, and the weight of every factor at each of them.

With tables log f_i(z, u, θ) of all factors (z finite, u continuous and averaged, θ maximised), one backward pass through
the enumerated density gives the posterior probability of every entry of every table, chains of states included:

    w_i = ∂ log Z / ∂ log f_i,    log Z = log Σ_z exp Σ_i log f_i,    Q(θ) = Σ_i ⟨w_i, log f_i(θ)⟩.

Where a table is linear in few numbers, as that of normal rows is in their natural parameters, the derivatives in those stand
for the weights: the expected statistics are all that an M-step asks of the rows.

u is replaced by points: sigma points, which are exact, where its conditional is Gaussian; two points with the expected
statistics, exact too, where it is positive with conditionals of a known family; and draws elsewhere.

References:
    A. Darwiche, A differential approach to inference in Bayesian networks (2003).
    G. Wei and M. Tanner, A Monte Carlo implementation of the EM algorithm (1990).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap
from torch.utils._pytree import tree_map

from inference.blocks import Block, Current
from inference.blocks.block import Move, is_certified
from inference.chains import FEWEST, LAGS, Chain, ChainConditional
from inference.conditionals import (
    Conditional,
    GaussianConditional,
    InverseGaussianConditional,
    NormalConditional,
    Points,
    PowerGammaConditional,
)
from inference.density import Density, Staged, Unconstrained
from inference.distributed import ALONE, Processes
from inference.enumeration import Factor, Part, draw_back, eliminate, factors, plates_of, total
from inference.messages import WIDEST_GAUSSIAN, Family, Gaussian, candidates
from inference.program import Program
from inference.sites import Site

__all__ = [
    "ALL",
    "Batch",
    "Completed",
    "Enumerated",
    "Evidence",
    "Expectation",
    "GaussianLatents",
    "Given",
    "Moved",
    "PositiveLatents",
    "Sampled",
    "SampledState",
    "Sampler",
    "Stack",
    "Weights",
]

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

        staged = self.density.stage(("expect", self._key(batch)), expect, (True, True, False))
        inputs = self.batched(values), particles, batch.data
        value, parts = staged(*inputs)
        return value, Weights(parts, lambda: staged.row_by_row(*inputs)[1])

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

        staged = self.density.stage(("Q", self._key(batch)), at, (True, True, True, False))
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

        key = ("Q message", name, self._key(batch))
        staged = self.density.stage(key, at_points, (True, True, True, True, False))
        points, theta = at.movedim(0, 1).contiguous(), self.theta(values)
        exact = lambda: (points, theta, particles, weights.tables, batch.data)  # noqa: E731
        if is_exact:
            found = staged.row_by_row(*exact())
        else:
            found = staged(points, theta, particles, weights.parts, batch.data, instead=exact)
        return batch.processes.mean(found).movedim(1, 0)

    def _key(self, batch: Batch) -> tuple[Any, ...]:
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
                result[site] = choices[picked.get(site, zeros)]
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


class Stack:
    """Several sites as one: side by side in each row where they share their batch shape, else end to end.

    Args:
        sites: The sites, all real.
        rows: Number of rows in place of that of plates named ``row_plates``; None leaves the shapes alone.
        row_plates: Names of the plates over the rows.
    """

    def __init__(self, sites: list[Site], rows: int | None = None, row_plates: tuple[str, ...] = ()) -> None:
        self.names = [site.name for site in sites]
        self.shapes, self.batches = [], []
        for site in sites:
            shape = list(site.shape)
            for plate in site.plates:
                if rows is not None and plate.name in row_plates:
                    shape[len(site.batch_shape) + plate.dim] = rows
            self.shapes.append(torch.Size(shape))
            self.batches.append(torch.Size(shape[: len(site.batch_shape)]))
        self.is_side_by_side = len(set(self.batches)) == 1
        lead = self.batches[0] if self.is_side_by_side else torch.Size(())
        self.sizes = [shape.numel() // lead.numel() for shape in self.shapes]
        self.shape = self.shapes[0] if len(sites) == 1 else torch.Size((*lead, sum(self.sizes)))

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site to (…, *site) -> (…, *stack)."""
        if len(self.names) == 1:
            return values[self.names[0]]
        parts = []
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            value = values[name]
            parts.append(value.reshape((*value.shape[: value.dim() - len(shape)], *self.shape[:-1], size)))
        return torch.cat(parts, -1)

    def split(self, value: Tensor) -> Values:
        """(…, *stack) -> site to (…, *site)."""
        if len(self.names) == 1:
            return {self.names[0]: value}
        lead = value.shape[: value.dim() - len(self.shape)]
        parts = value.split(self.sizes, -1)
        return {n: p.reshape((*lead, *shape)) for n, p, shape in zip(self.names, parts, self.shapes, strict=True)}

    def families(self, support: Any) -> Iterator[Family]:
        """The families that the sites may have jointly, the narrowest first."""
        if len(self.names) == 1:
            yield from (f for f in candidates(support, self.shape) if f.name in ("Normal", "Gaussian"))
            return
        if len(self.names) >= FEWEST and len(set(self.sizes)) == 1 and not self.shape[:-1].numel() > 1:
            yield from (Chain(self.shape, lags * self.sizes[0]) for lags in LAGS)
        last = len(self.shape) - 1
        for axes in dict.fromkeys([(last,), tuple(range(len(self.shape)))]):
            family = Gaussian(self.shape, axes)
            if family.coupling.width <= WIDEST_GAUSSIAN:
                yield family


@dataclass(frozen=True)
class GaussianLatents(Expectation):
    """The continuous averaged sites are jointly Gaussian given θ: equally weighted sigma points average exactly.

    log p(data, u, θ) is quadratic in u, so that ± √W times each column of a root of the covariance of W coupled elements
    give Q, and with the density of the points log p(data, θ), up to rounding.

    Args:
        sites: Their names.
        family: The family of the conditional of the stack of sites; filled in by ``bind``.

    References:
        S. Julier and J. Uhlmann, Unscented filtering and nonlinear estimation (2004).
    """

    family: Family | None = None

    @property
    def update(self) -> str:
        return "Gaussian"

    def bind(self, values: Values, task: Completed) -> GaussianLatents | None:
        """The E-step with its family, if the sites are Gaussian: the message must give the differences of the log-joint."""
        sites = [task.program.latents[name] for name in self.sites]
        if any(_is_bounded(site) for site in sites):
            return None
        stack = Stack(sites)
        before = task.density.joint(values)
        for family in stack.families(sites[0].support):
            bound = dataclasses.replace(self, family=family)
            conditional = bound._conditional(bound.init(values, task), values, task)
            present = stack.join(values)
            proposal = torch.where(_is_idle(conditional), present, conditional.sample())
            after = task.density.joint({**values, **stack.split(proposal)})
            log_q, log_q_present = conditional.log_prob(proposal), conditional.log_prob(present)
            ratio = ((after - before) - (log_q - log_q_present)).nan_to_num(nan=math.inf)
            if bool(conditional.is_proper.all()) and is_certified(Move(ratio, ratio), after, before):
                return bound
        return None

    def _stack(self, task: Completed, batch: Batch = ALL) -> Stack:
        sites, program = [task.program.latents[name] for name in self.sites], task.program
        return Stack(sites, len(batch.data[0]) if batch.data else None, program.row_plates)

    def _family(self, shape: torch.Size) -> Family:
        assert self.family is not None
        return Gaussian(shape, self.family.coupling.axes) if isinstance(self.family, Gaussian) else self.family

    def init(self, values: Values, task: Completed) -> Points:
        assert self.family is not None
        points = self.family.initial(self._stack(task).join(values))
        return self._conditional(points, values, task).points()

    def _conditional(self, points: Points, values: Values, task: Completed, batch: Batch = ALL) -> Conditional:
        stack = self._stack(task, batch)

        def gradients(points: Tensor, others: Values, data: list[Tensor]) -> Tensor:
            def log_joint(value: Tensor) -> Tensor:
                return task.program.log_joint({**others, **stack.split(value)}, data or None)

            return vmap(grad(log_joint))(points)

        family = self._family(stack.shape)
        at = family.at(points)
        others = {name: value for name, value in values.items() if name not in self.sites}
        if not others:
            found = vmap(lambda p: gradients(p, {}, batch.data))(at.movedim(0, 1))
        else:
            staged = task.density.stage(("latents", self.sites, batch.scale), gradients, (True, True, False))
            found = staged(at.movedim(0, 1).contiguous(), others, batch.data)
        return _occupied(family.solve(at, found.movedim(1, 0)))

    def step(self, memory: Points, values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        stack = self._stack(task, batch)
        if batch.data:  # other rows in every step: the points cannot be remembered
            like = torch.zeros(
                len(memory.location), *stack.shape, dtype=memory.location.dtype, device=memory.location.device
            )
            conditional = self._conditional(Points(like, torch.ones_like(like)), values, task, batch)
            conditional = self._conditional(conditional.points(), values, task, batch)
            moved, kept = stack.split(self._sigma(conditional)), memory
            last: Values = {}
        else:
            conditional = self._conditional(memory, values, task)
            moved, kept = stack.split(self._sigma(conditional)), conditional.points()
            last = stack.split(conditional.mode())
        log_q = conditional.log_prob(conditional.mode()) - 0.5 * stack.shape.numel()
        count = next(iter(moved.values())).shape[1]
        return Moved(kept, moved, log_q.unsqueeze(1).expand(-1, count), last)

    @staticmethod
    def _sigma(conditional: Conditional) -> Tensor:
        """The points, (restart, particle, *stack)."""
        if isinstance(conditional, ChainConditional):
            return conditional.sigma()
        if isinstance(conditional, GaussianConditional):
            width = conditional.mean.shape[-1]
            factor, _ = conditional._factor()
            eye = torch.eye(width, dtype=factor.dtype, device=factor.device)
            root = torch.linalg.solve_triangular(factor.mT, eye.expand_as(factor), upper=True) * math.sqrt(width)
            both = torch.cat([root, -root], -1).movedim(-1, 1)  # (restart, particle, *independent, joint)
            return conditional.coupling.fold(conditional.mean.unsqueeze(1) + both)
        assert isinstance(conditional, NormalConditional)
        sd = conditional.precision.rsqrt()
        return torch.stack([conditional.mean + sd, conditional.mean - sd], 1)

    def marginal(self, theta: Values, memory: Points, task: Completed) -> Tensor:
        stack = self._stack(task)
        family = self._family(stack.shape)
        at = family.at(memory)

        def log_joint(value: Tensor) -> Tensor:
            return task.log_z({**theta, **stack.split(value)})

        conditional = _occupied(family.solve(at, vmap(grad(log_joint))(at.squeeze(1)).unsqueeze(1)))
        mode = conditional.mode()
        return log_joint(mode.squeeze(0)) - conditional.log_prob(mode).squeeze(0)


_FLATTEST = 1e-8  # least ratio of the two points of an element: the weights of an M-step have to leave each other digits


@dataclass(frozen=True)
class PositiveLatents(Expectation):
    """The averaged site has independent elements, Gamma (or a power of it) or inverse Gaussian given θ: two points each.

    Two equally likely values have the same expectations of two statistics: with A = E z and 1 / H = E 1 / z those of an
    inverse Gaussian are A ± √(A² − A H); with G = exp E log z those of a Gamma are A ± √(A² − G²). As log p(data, u, θ) is
    linear in the statistics, Q and, with the density of the points, log p(data, θ) are exact up to rounding. These are the
    scales of Student's t, of Laplace and asymmetric Laplace errors, of the lasso and of support vector machines.

    Args:
        sites: Its name.
        family: The family of its conditional; filled in by ``bind``.

    References:
        D. Andrews and C. Mallows, Scale mixtures of normal distributions (1974).
    """

    family: Family | None = None

    @property
    def update(self) -> str:
        assert self.family is not None
        return self.family.name

    def bind(self, values: Values, task: Completed) -> PositiveLatents | None:
        """The E-step with its family, if there is one: the message must give the differences of the log-joint."""
        if len(self.sites) != 1:
            return None
        (name,) = self.sites
        before = task.density.joint(values)
        for family in candidates(task.program.latents[name].support, task.program.latents[name].shape):
            bound = dataclasses.replace(self, family=family)
            conditional = bound._solved(family.initial(values[name]), values, task)
            if not isinstance(conditional, (PowerGammaConditional, InverseGaussianConditional)):
                continue
            conditional = bound._solved(conditional.points(), values, task)
            proposal = conditional.sample()
            after = task.density.joint({**values, name: proposal})
            ratio = (after - before) - (conditional.log_prob(proposal) - conditional.log_prob(values[name]))
            ratio = ratio.nan_to_num(nan=math.inf)
            if bool(conditional.is_proper.all()) and is_certified(Move(ratio, ratio), after, before):
                return bound
        return None

    def _solved(self, points: Points, values: Values, task: Completed, batch: Batch = ALL) -> Conditional:
        (name,) = self.sites
        assert self.family is not None

        def gradients(points: Tensor, others: Values, data: list[Tensor]) -> Tensor:
            return vmap(grad(lambda value: task.program.log_joint({**others, name: value}, data or None)))(points)

        at = self.family.at(points)
        others = {other: value for other, value in values.items() if other != name}
        if not others:
            found = vmap(lambda p: gradients(p, {}, batch.data))(at.movedim(0, 1))
        else:
            staged = task.density.stage(("scales", name, batch.scale), gradients, (True, True, False))
            found = staged(at.movedim(0, 1).contiguous(), others, batch.data)
        return self.family.solve(at, found.movedim(1, 0))

    def init(self, values: Values, task: Completed) -> Points:
        assert self.family is not None
        return self._solved(self.family.initial(values[self.sites[0]]), values, task).points()

    def step(self, memory: Points, values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        (name,) = self.sites
        points = memory
        if batch.data:  # other rows in every step: the points cannot be remembered
            stack = Stack([task.program.latents[name]], len(batch.data[0]), task.program.row_plates)
            like = torch.ones(len(memory.location), *stack.shape, dtype=memory.location.dtype, device=memory.location.device)
            points = self._solved(Points(like, like), values, task, batch).points()
        conditional = self._solved(points, values, task, batch)
        particles = self._matched(conditional)
        log_q = torch.stack([conditional.log_prob(particles[:, i]) for i in range(2)], 1)
        kept = memory if batch.data else conditional.points()
        last = {} if batch.data else {name: kept.location}
        return Moved(kept, {name: particles}, log_q, last)

    @staticmethod
    def _matched(conditional: Conditional) -> Tensor:
        """Two points for every element, (restart, 2, *site)."""
        if isinstance(conditional, InverseGaussianConditional):
            other = dataclasses.replace(conditional, a=conditional.b, b=conditional.a, order=-conditional.order)
            mean, square = conditional.mean(), conditional.mean() / other.mean()
            power = 1.0
        else:
            assert isinstance(conditional, PowerGammaConditional)
            mean = conditional.concentration / conditional.rate
            square = ((torch.digamma(conditional.concentration) - conditional.rate.log()) * 2.0).exp()
            power = 1.0 / conditional.power
        large = mean + (mean.square() - square).clamp(min=0.0).sqrt()
        small = torch.maximum(square / large, _FLATTEST * large)
        return torch.stack([large, small], 1).pow(power)

    def marginal(self, theta: Values, memory: Points, task: Completed) -> Tensor:
        assert self.family is not None
        (name,) = self.sites
        at = self.family.at(memory)

        def log_joint(value: Tensor) -> Tensor:
            return task.log_z({**theta, name: value})

        conditional = self.family.solve(at, vmap(grad(log_joint))(at.squeeze(1)).unsqueeze(1))
        location = memory.location
        return log_joint(location.squeeze(0)) - conditional.log_prob(location).squeeze(0)


_IDLE = 2.0 * math.pi * math.e  # precision of a normal without entropy


def _occupied(conditional: Conditional) -> Conditional:
    """Elements on which the density does not depend, such as those masked out, as normals without entropy around 0."""
    if not isinstance(conditional, NormalConditional):
        return conditional
    is_idle = conditional.precision == 0
    mean = torch.where(is_idle, 0.0, conditional.mean)
    return NormalConditional(mean, torch.where(is_idle, _IDLE, conditional.precision))


def _is_idle(conditional: Conditional) -> Tensor:
    return conditional.precision == _IDLE if isinstance(conditional, NormalConditional) else torch.tensor(False)


def _is_bounded(site: Site) -> bool:
    from inference.messages import kind_of

    return kind_of(site.support) != "real"


class SampledState(NamedTuple):
    """Draws of all averaged sites, (restart, particle, *site), and the state of what moves them."""

    particles: Values
    states: Any


@dataclass(frozen=True)
class Sampled(Expectation):
    """Draws of the averaged sites, moved by blocks as in Gibbs sampling; the finite ones are then averaged over.

    Args:
        sites: Names of the continuous ones.
        blocks: The blocks that move all averaged sites.
        averaged: Names of all averaged sites.
        count: Draws for each restart.
        sweeps: Sweeps in a step.
    """

    blocks: tuple[Block, ...] = ()
    averaged: tuple[str, ...] = ()
    count: int = 64
    sweeps: int = 5

    @property
    def update(self) -> str:
        return "Monte-Carlo"

    @property
    def is_random(self) -> bool:
        return True

    def init(self, values: Values, task: Completed) -> SampledState:
        spread = {name: value.repeat_interleave(self.count, 0) for name, value in values.items()}
        current = Current(spread, task.density.joint(spread))
        states = tuple(block.init(task.density, current) for block in self.blocks)
        return SampledState(self._folded(spread), states)

    def _folded(self, values: Values) -> Values:
        return {name: values[name].unflatten(0, (-1, self.count)) for name in self.averaged}

    def _spread(self, memory: SampledState, values: Values) -> Values:
        spread = {name: value.repeat_interleave(self.count, 0) for name, value in values.items()}
        return spread | {name: value.flatten(0, 1) for name, value in memory.particles.items()}

    def step(self, memory: SampledState, values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        spread = self._spread(memory, values)
        current, states = Current(spread, task.density.joint(spread)), list(memory.states)
        for _ in range(self.sweeps):
            for i, block in enumerate(self.blocks):
                states[i], current, _ = block.step(states[i], task.density, current, adapts)
        return self._moved(current.values, tuple(states), task)

    def _moved(self, values: Values, states: Any, task: Completed) -> Moved:
        particles = self._folded(values)
        shown = {name: value for name, value in particles.items() if name in self.sites}
        log_q = self._log_q(shown, task.program)
        last = {name: value[:, -1] for name, value in particles.items()}
        return Moved(SampledState(particles, states), shown, log_q, last)

    def _log_q(self, particles: Values, program: Program) -> Tensor:
        """Minus the entropy of independent normals with the draws' variances, unconstrained, (restart, particle).

        Without it the objective would have no upper bound: it would rank a collapsed scale of the latents highest.
        """
        coordinates = Unconstrained(program, [name for name in particles if program.latents[name].is_continuous])
        if not coordinates.sites:
            return next(iter(particles.values())).new_zeros(1, self.count, dtype=program.dtype)
        position = coordinates.position({n: particles[n].flatten(0, 1) for n in coordinates.sites})
        log_jacobian = vmap(coordinates.log_jacobian)(position).unflatten(0, (-1, self.count))
        variance = position.unflatten(0, (-1, self.count)).var(1, correction=min(1, self.count - 1))
        entropy = 0.5 * (2.0 * math.pi * math.e * variance.clamp(min=torch.finfo(variance.dtype).tiny)).log().sum(-1)
        return -entropy.unsqueeze(1) - log_jacobian


@dataclass(frozen=True)
class Sampler(Sampled):
    """Draws of the averaged sites, moved by a sampler of a back-end given θ.

    Args:
        backend: The back-end; its ``chains`` are the draws of each restart, ``thin`` the moves of a step.
    """

    backend: Any = None

    @property
    def update(self) -> str:
        return f"Monte-Carlo ({self.backend.update})"

    def init(self, values: Values, task: Completed) -> SampledState:
        spread = {name: value.repeat_interleave(self.count, 0) for name, value in values.items()}
        given = Given(task, {name: spread[name] for name in task.maximised})
        start = {name: spread[name] for name in self.averaged}
        state = self._sized(spread, start=start).init(given)
        return SampledState(self._folded(spread), state)

    def _sized(self, spread: Values, **options: Any) -> Any:
        return dataclasses.replace(self.backend, chains=len(next(iter(spread.values()))), **options)

    def step(self, memory: SampledState, values: Values, task: Completed, batch: Batch = ALL, adapts: int = 0) -> Moved:
        spread = self._spread(memory, values)
        given: Any = Given(task, {name: spread[name] for name in task.maximised})
        backend = self._sized(spread, warmup=adapts * self.sweeps)
        coordinates, density = backend._parts(given)
        kernel, _ = backend.begin(coordinates.position(spread), density, given)  # θ has moved: what was cached is stale
        state = memory.states._replace(kernel=kernel)
        for _ in range(self.sweeps):
            if adapts:
                state, _ = backend.step(state, given)
            else:
                kernel, adaptation, _ = backend.move(state.kernel, state.adaptation, density, 0)
                state = state._replace(kernel=kernel, adaptation=adaptation)
        return self._moved({**spread, **backend.values(state, given)}, state, task)


class Given:
    """A program some of whose sites have one given value for every chain; a sampler sees the others.

    Args:
        task: The completed density.
        values: Site to (chain, *site).
    """

    def __init__(self, task: Completed, values: Values) -> None:
        self.program, self.values, self.density = task.program, values, _GivenDensity(task.density, values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    @cached_property
    def latents(self) -> dict[str, Site]:
        """The sites that are not given."""
        return {name: site for name, site in self.program.latents.items() if name not in self.values}

    @cached_property
    def continuous(self) -> tuple[str, ...]:
        """The continuous ones among them."""
        return tuple(name for name in self.program.continuous if name not in self.values)


class _GivenDensity:
    """The densities of a program at given values of some of its sites."""

    def __init__(self, density: Density, values: Values) -> None:
        self.density, self.given = density, values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.density, name)

    @property
    def joint(self) -> Callable[..., Tensor]:
        return lambda values: self.density.joint({**values, **self.given})

    def marginal(self, enumerated: Any) -> Callable[..., Tensor]:
        staged = self.density.marginal(enumerated)
        return lambda values: staged({**values, **self.given})

    def draw(self, sites: Any, evaluations: int | None = None) -> Callable[..., Any]:
        staged = self.density.draw(sites, evaluations)
        return lambda values, uniforms: staged({**values, **self.given}, uniforms)

    def unconstrained(self, coordinates: Unconstrained, *args: Any, **kwargs: Any) -> _GivenStaged:
        return _GivenStaged(self.density.unconstrained(coordinates, *args, **kwargs), self.given)


class _GivenStaged:
    """A staged function of positions and other values, some of which are given."""

    def __init__(self, staged: Staged, given: Values) -> None:
        self.staged, self.given = staged, given

    def __call__(self, position: Tensor, others: Values) -> Any:
        return self.staged(position, {**others, **self.given})

    def first(self, position: Tensor, others: Values) -> Any:
        return self.staged.first(position, {**others, **self.given})
