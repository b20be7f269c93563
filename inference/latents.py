"""E-steps over continuous latents whose conditionals are known: points in place of each, exact for what EM asks of them.

Sigma points where they are Gaussian; where they are positive and of a known family, two points with the expected statistics.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

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
from inference.expectation import ALL, Batch, Completed, Expectation, Moved, Values
from inference.messages import WIDEST_GAUSSIAN, Family, Gaussian, candidates
from inference.sites import Site

__all__ = ["GaussianLatents", "PositiveLatents", "Stack"]

_IDLE = 2.0 * math.pi * math.e  # precision of a normal without entropy
_FLATTEST = 1e-8  # least ratio of the two points of an element: the weights of an M-step have to leave each other digits


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
