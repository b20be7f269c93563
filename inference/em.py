"""Expectation-maximisation of any program: averages from one backward pass, maxima from the messages of Gibbs sampling.

With tables log f_i(z, u, θ) of all factors (z finite, u continuous and averaged, θ maximised), the E-step is

    w_i = ∂ log Z / ∂ log f_i,    log Z = log Σ_z exp Σ_i log f_i,

the posterior probability of every entry of every table; the M-step raises Q(θ) = Σ_i ⟨w_i, log f_i(θ)⟩, one site after the
other: in closed form where the gradient of Q is a message of a known family, by L-BFGS elsewhere. Continuous averaged
sites are replaced by points: sigma points, which are exact, where their conditional is Gaussian, and draws elsewhere.

References:
    A. Dempster, N. Laird and D. Rubin, Maximum likelihood from incomplete data via the EM algorithm (1977).
    X.-L. Meng and D. Rubin, Maximum likelihood estimation via the ECM algorithm (1993).
    A. Darwiche, A differential approach to inference in Bayesian networks (2003).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from inference.blocks import Block, Current
from inference.blocks.block import is_certified
from inference.conditionals import Conditional, GaussianConditional, NormalConditional, Points
from inference.contract import Backend, Draw, Unsupported
from inference.density import Density, Unconstrained
from inference.enumeration import Factor, draw_back, eliminate, factors, plates_of, total
from inference.fit import Optimise
from inference.messages import Family, Gaussian, Normal, candidates
from inference.plan import Plan, Update, assign
from inference.program import Program
from inference.start import ascended, given_values, starting_values

__all__ = ["EM", "EMInfo", "EMState"]

_SWEEPS, _PARTICLES = 5, 64  # of a Monte-Carlo E-step
_PILOTS, _PILOT_STEPS = 8, 5  # short runs, the best of which is continued: EM is only as good as its start


class Roles(NamedTuple):
    """What EM does with each latent site; not tensors, and the same for every step.

    ``families`` maps a maximised site to the family of its closed-form M-step; sites without one are in ``climbed``.
    ``average`` is how the continuous averaged sites are handled: "", "Gaussian" or "Monte-Carlo".
    """

    averaged: tuple[str, ...]
    maximised: tuple[str, ...]
    families: dict[str, Family]
    climbed: tuple[str, ...]
    average: str
    average_family: Family | None
    blocks: tuple[Block, ...]


class EMState(NamedTuple):
    """Where every restart is.

    Attributes:
        values: All latent sites; the maximised ones are θ, (restart, *site).
        points: Maximised or averaged site to the points of its last message.
        particles: Continuous averaged site to points or draws of the E-step, (restart, particle, *site).
        objective: log p(data, θ), or the likelihood for "mle"; a bound if the E-step is Monte-Carlo; (restart,).
        change: Largest relative change of a maximised value in the last step, (restart,).
        distance: Estimated relative distance to the fixed point, (restart,).
        step: Number of steps taken, ().
        roles: What is done with each site.
        density: The densities that the steps evaluate.
        memories: The states of the blocks of a Monte-Carlo E-step.
    """

    values: dict[str, Tensor]
    points: dict[str, Points]
    particles: dict[str, Tensor]
    objective: Tensor
    change: Tensor
    distance: Tensor
    step: Tensor
    roles: Roles
    density: Density
    memories: tuple[Any, ...]


class EMInfo(NamedTuple):
    """log_joint (restart,): the objective before the step; distance (restart,): estimated relative distance to the end."""

    log_joint: Tensor
    distance: Tensor


@dataclass(frozen=True, kw_only=True)
class EM(Backend[EMState, EMInfo]):
    """Expectation-maximisation; the result is a point.

    Finite discrete sites and sites local to an observed plate are averaged; all others and the weights are maximised, on
    the scale on which the program samples them (no Jacobian). The objective never falls if the E-step is exact.

    Args:
        steps: Most steps.
        tolerance: Stop when the values are estimated to be this close to the fixed point, relatively (Aitken's estimate).
        restarts: Number of starting points, all run at once; the best wins.
        objective: "map" maximises p(data, θ); "mle" leaves out the priors of what is maximised.
        hard: Whether to take the most probable values of the finite sites instead of averaging over them.
        maximise: Names of the sites to maximise instead of those above.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def coin(flips):
        ...     fairness = pyro.sample("fairness", dist.Beta(2.0, 2.0))
        ...     with pyro.plate("flip", len(flips)):
        ...         pyro.sample("heads", dist.Bernoulli(fairness), obs=flips)
        >>> round(float(EM(progress=False).fit(coin, torch.ones(8)).point()["fairness"]), 6)
        0.9
    """

    kind: ClassVar[str] = "point"

    steps: int = 200
    tolerance: float = 1e-6
    restarts: int = 1
    objective: str = "map"
    hard: bool = False
    maximise: Collection[str] | None = None

    @property
    def schedule(self) -> Optimise:
        def is_done(info: EMInfo) -> bool:
            return bool((info.distance <= self.tolerance).all())

        return Optimise(self.steps, 1, 1, is_done)

    # ------------------------------------------------------------------------------------- start
    def init(self, program: Program) -> EMState:
        if self.objective not in ("map", "mle"):
            raise ValueError(f"objective is '{self.objective}', but must be 'map' or 'mle'.")
        averaged, maximised = self._split(program)
        if not maximised and not program.weights:
            raise Unsupported("EM has nothing to maximise: every latent site is averaged. Use maximise=.")
        if program.weights and self.restarts > 1:
            raise Unsupported("EM trains the weights of the program in place, which allows for one restart only.")
        density = Density(program, rung="vmapped") if program.weights else program.density
        roles = Roles(averaged, maximised, {}, (), "", None, ())
        pilots = max(_PILOTS, 2 * self.restarts)
        values = starting_values(program, pilots, None)
        if program.continuous and not program.weights:
            values = ascended(program, values)
        pilot = self._find_families(self._average(_fresh(values, pilots, roles, density), program), program)
        given = given_values(program, self.start, self.restarts)
        if set(given) >= set(maximised):
            chosen = torch.arange(self.restarts, device=program.device)
        else:
            for _ in range(0 if program.weights else _PILOT_STEPS):
                pilot, _ = self.step(pilot, program)
            chosen = _finite(pilot.objective).argsort(descending=True)[: self.restarts]
        state = _fresh({n: v[chosen] for n, v in pilot.values.items()} | given, self.restarts, pilot.roles, density)
        points = {n: Points(p.location[chosen], p.spread[chosen]) for n, p in pilot.points.items()}
        if given:  # the pilots were elsewhere
            points |= {n: f.initial(state.values[n]) for n, f in pilot.roles.families.items() if n in given}
        return self._populate(state._replace(points=points), program)

    def _split(self, program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
        data_plates = {plate.name for site in program.observed_sites.values() for plate in site.plates}
        if self.maximise is not None:
            for name in self.maximise:
                if name not in program.latents:
                    raise ValueError(f"maximise= names '{name}', but the latent sites are {', '.join(program.latents)}.")
                if not program.latents[name].is_continuous:
                    raise Unsupported(f"maximise= names '{name}', which is discrete: it can only be averaged.")
            chosen = set(self.maximise)
        else:
            chosen = {
                name
                for name, site in program.latents.items()
                if site.is_continuous and not data_plates & {plate.name for plate in site.plates}
            }
        averaged = tuple(name for name in program.latents if name not in chosen)
        return averaged, tuple(name for name in program.latents if name in chosen)

    def _average(self, state: EMState, program: Program) -> EMState:
        """Decides how the continuous averaged sites are handled, and makes their first points."""
        continuous = [name for name in state.roles.averaged if name not in program.finite]
        if not continuous:
            return state
        if len(continuous) == 1 and not program.finite:
            (name,) = continuous
            current = Current(state.values, state.density.joint(state.values))
            for family in candidates(program.latents[name].support, program.latents[name].shape):
                if not isinstance(family, (Normal, Gaussian)):
                    continue
                points = family.initial(state.values[name])
                for _ in range(2):
                    conditional = _joint_message(state.density, family, name, points, state.values)
                    points = conditional.points()
                proposal = conditional.sample()
                joint = state.density.joint({**state.values, name: proposal})
                ratio = (joint - current.log_joint) - (
                    conditional.log_prob(proposal) - conditional.log_prob(state.values[name])
                )
                if bool(conditional.is_proper.all()) and _is_zero(ratio, joint, current.log_joint):
                    roles = state.roles._replace(average="Gaussian", average_family=family)
                    return state._replace(roles=roles, points={**state.points, name: points})
        blocks = assign(program)[0]
        mixed = [block for block in blocks if 0 < len(set(block.sites) & set(state.roles.averaged)) < len(block.sites)]
        if mixed:  # a joint block of averaged and maximised sites is split
            split = tuple(s for block in mixed for s in block.sites if s in state.roles.averaged)
            blocks = assign(program, {split: type(mixed[0])()})[0]
        blocks = tuple(block for block in blocks if set(block.sites) <= set(state.roles.averaged))
        return self._populate(state._replace(roles=state.roles._replace(average="Monte-Carlo", blocks=blocks)), program)

    def _populate(self, state: EMState, program: Program) -> EMState:
        """Starts the particles of a Monte-Carlo E-step, all at the present values."""
        if state.roles.average != "Monte-Carlo":
            return state
        spread = {name: value.repeat_interleave(_PARTICLES, 0) for name, value in state.values.items()}
        current = Current(spread, state.density.joint(spread))
        memories = tuple(block.init(state.density, current) for block in state.roles.blocks)
        particles = {n: spread[n].unflatten(0, (-1, _PARTICLES)) for n in state.roles.averaged}
        return state._replace(memories=memories, particles=particles)

    def _find_families(self, state: EMState, program: Program) -> EMState:
        """Tries which M-steps are closed: the message of Q must give its differences, at a random draw."""
        state, weights = self._expect(state, program)
        families, points, climbed = {}, dict(state.points), []
        for name in state.roles.maximised:
            site = program.latents[name]
            if site.is_constant:
                continue
            for family in candidates(site.support, site.shape):
                start = family.initial(state.values[name])
                for _ in range(2):
                    conditional = self._message(state, program, family, name, start, weights)
                    start = conditional.points()
                proposal = conditional.sample()
                usable = conditional.is_proper & proposal.reshape(len(proposal), -1).isfinite().all(-1)
                if 2 * int(usable.sum()) < len(usable):  # a flat likelihood need not be a density everywhere
                    continue
                before = self._expected(state, program, state.values, weights)
                after = self._expected(state, program, {**state.values, name: proposal}, weights)
                ratio = (after - before) - (conditional.log_prob(proposal) - conditional.log_prob(state.values[name]))
                ratio = torch.where(usable, ratio, 0.0)
                if _is_zero(ratio, torch.where(usable, after, 0.0), torch.where(usable, before, 0.0)):
                    families[name], points[name] = family, start
                    break
            else:
                climbed.append(name)
        roles = state.roles._replace(families=families, climbed=tuple(climbed))
        return state._replace(roles=roles, points=points)

    # ------------------------------------------------------------------------------------ E-step
    def _factors(self, program: Program, values: Mapping[str, Tensor], roles: Roles) -> list[Factor]:
        found = factors(program, values, program.finite)
        return [f for f in found if not (self.objective == "mle" and f.site in roles.maximised)]

    def _expect(self, state: EMState, program: Program) -> tuple[EMState, list[Tensor]]:
        """Particles of the continuous averaged sites, weights of all factors at each, and the objective."""
        roles = state.roles
        state = self._place(state, program)
        log_q = torch.zeros_like(state.objective)

        def expect(theta: dict[str, Tensor], particles: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
            def one(particle: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
                found = self._factors(program, {**theta, **particle}, roles)

                def log_z(tables: list[Tensor]) -> Tensor:
                    replaced = [f.with_table(t) for f, t in zip(found, tables, strict=True)]
                    left, _ = eliminate(replaced, plates_of(program, program.finite), maximise=self.hard)
                    return total(left)

                weights, value = grad_and_value(log_z)([f.table for f in found])
                return value, weights

            if particles:
                return vmap(one)(particles)
            value, weights = one({})
            return value[None], [weight[None] for weight in weights]

        theta = {name: state.values[name] for name in roles.maximised}
        particles = {name: value for name, value in state.particles.items() if name not in program.finite}
        staged = state.density.stage(("expect", self.objective, self.hard), expect, (True, True))
        values, weights = staged(theta, particles)
        objective = values.mean(1)
        if roles.average == "Gaussian":
            (name,) = particles
            conditional = self._conditional(state, program)
            middle = conditional.mode()
            log_q = conditional.log_prob(middle)
            objective = self._marginal(state, program, {**state.values, name: middle}) - log_q
        return state._replace(objective=objective), weights

    def _marginal(self, state: EMState, program: Program, values: dict[str, Tensor]) -> Tensor:
        def objective(all_values: dict[str, Tensor]) -> Tensor:
            return total(self._factors(program, all_values, state.roles))

        return state.density.stage(("total", self.objective), objective, (True,))(values)

    def _conditional(self, state: EMState, program: Program) -> Conditional:
        (name,) = [n for n in state.roles.averaged if n not in program.finite]
        family = state.roles.average_family
        assert family is not None
        return _joint_message(state.density, family, name, state.points[name], state.values)

    def _place(self, state: EMState, program: Program) -> EMState:
        """Moves the particles to where they represent the conditional of the averaged continuous sites given θ."""
        roles = state.roles
        if roles.average == "Gaussian":
            (name,) = [n for n in roles.averaged if n not in program.finite]
            conditional = self._conditional(state, program)
            particles = {name: _sigma_points(conditional)}
            values = {**state.values, name: conditional.mode()}
            return state._replace(particles=particles, values=values, points={**state.points, name: conditional.points()})
        if roles.average == "Monte-Carlo":
            spread = {n: v.repeat_interleave(_PARTICLES, 0) for n, v in state.values.items()}
            spread |= {n: v.flatten(0, 1) for n, v in state.particles.items()}
            current, memories = Current(spread, state.density.joint(spread)), list(state.memories)
            for _ in range(_SWEEPS):
                for i, block in enumerate(roles.blocks):
                    memories[i], current, _ = block.step(memories[i], state.density, current, self.steps)
            particles = {n: current.values[n].unflatten(0, (-1, _PARTICLES)) for n in roles.averaged}
            last = {n: value[:, -1] for n, value in particles.items()}
            return state._replace(particles=particles, memories=tuple(memories), values={**state.values, **last})
        return state

    # ------------------------------------------------------------------------------------ M-step
    def _q(self, program: Program, roles: Roles) -> Callable[..., Tensor]:
        """Q(θ) of one restart, given its particles and weights."""

        def expected(theta: dict[str, Tensor], particles: dict[str, Tensor], weights: list[Tensor]) -> Tensor:
            def one(particle: dict[str, Tensor], at: list[Tensor]) -> Tensor:
                found = self._factors(program, {**theta, **particle}, roles)
                terms = [
                    torch.where(w > 0, w * torch.where(w > 0, f.table, 0.0), 0.0).sum()
                    if f.variables
                    else (w * f.table).sum()
                    for f, w in zip(found, at, strict=True)
                ]
                return torch.stack(terms).sum()

            if particles:
                return vmap(one)(particles, weights).mean()
            return one({}, [weight[0] for weight in weights])

        return expected

    def _inputs(self, state: EMState, program: Program) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        theta = {name: state.values[name] for name in state.roles.maximised}
        return theta, {name: v for name, v in state.particles.items() if name not in program.finite}

    def _expected(self, state: EMState, program: Program, values: Mapping[str, Tensor], weights: list[Tensor]) -> Tensor:
        """Q at ``values``, (restart,)."""
        theta = {name: values[name] for name in state.roles.maximised}
        staged = state.density.stage(("Q", self.objective), self._q(program, state.roles), (True, True, True))
        return staged(theta, self._inputs(state, program)[1], weights)

    def _message(
        self, state: EMState, program: Program, family: Family, name: str, points: Points, weights: list[Tensor]
    ) -> Conditional:
        """The message of Q to one site."""
        expected = self._q(program, state.roles)

        def at_points(at: Tensor, theta: dict[str, Tensor], particles: dict[str, Tensor], w: list[Tensor]) -> Tensor:
            return vmap(grad(lambda value: expected({**theta, name: value}, particles, w)))(at)

        staged = state.density.stage(("Q message", self.objective, name), at_points, (True, True, True, True))
        at = family.at(points)
        theta, particles = self._inputs(state, program)
        gradients = staged(at.movedim(0, 1).contiguous(), theta, particles, weights)
        return family.solve(at, gradients.movedim(1, 0))

    def step(self, state: EMState, program: Program) -> tuple[EMState, EMInfo]:
        before = {name: state.values[name] for name in state.roles.maximised}
        state, weights = self._expect(state, program)
        objective = state.objective
        reached = self._expected(state, program, state.values, weights) if state.roles.maximised else objective
        for name, family in state.roles.families.items():
            conditional = self._message(state, program, family, name, state.points[name], weights)
            state, reached = self._take(state, program, {name: conditional.mode()}, weights, reached)
            usable = conditional.is_proper & conditional.mode().reshape(len(objective), -1).isfinite().all(-1)
            merged = _merged(usable, conditional.points(), state.points[name])
            state = state._replace(points={**state.points, name: merged})
        if state.roles.climbed or program.weights:
            state = self._climb(state, program, weights, reached)
        change = _relative_change(before, state.values, like=objective)
        ratio = (change / state.change).clamp(0.0, 0.999).nan_to_num(nan=0.0)
        distance = torch.where(change == 0, change, change * ratio / (1 - ratio) + 0.1 * change)
        if int(state.step) < 2 and bool((change > 0).any()):
            distance = distance + math.inf
        state = state._replace(change=change, distance=distance, step=state.step + 1)
        return state, EMInfo(objective, distance)

    def _take(
        self, state: EMState, program: Program, proposed: dict[str, Tensor], weights: list[Tensor], reached: Tensor
    ) -> tuple[EMState, Tensor]:
        """Takes proposed values in the restarts where Q does not fall by more than rounding."""
        values = {**state.values, **proposed}
        expected = self._expected(state, program, values, weights)
        rounding = 1e-13 if expected.dtype == torch.float64 else 1e-5
        good = expected >= reached - rounding * (1.0 + reached.abs())
        kept = {
            name: torch.where(good.reshape(-1, *(1,) * (value.dim() - 1)), value, state.values[name])
            for name, value in proposed.items()
        }
        return state._replace(values={**state.values, **kept}), torch.where(good, expected, reached)

    def _climb(self, state: EMState, program: Program, weights: list[Tensor], reached: Tensor) -> EMState:
        """L-BFGS on Q over the sites without a closed M-step, unconstrained, and over the weights of the program."""
        coordinates = Unconstrained(program, state.roles.climbed)
        theta, particles = self._inputs(state, program)
        fixed = {name: value for name, value in theta.items() if name not in coordinates.sites}
        expected = self._q(program, state.roles)

        def at(position: Tensor, others: dict[str, Tensor], p: dict[str, Tensor], w: list[Tensor]) -> Tensor:
            return expected({**others, **coordinates.values(position)}, p, w)

        def climb(position: Tensor, others: dict[str, Tensor], p: dict[str, Tensor], w: list[Tensor]) -> Any:
            return grad_and_value(lambda x: at(x, others, p, w))(position)

        staged = state.density.stage(("climb", self.objective), climb, (True, True, True, True))
        has_sites = bool(coordinates.sites)
        position = coordinates.position(state.values) if has_sites else reached.new_zeros(len(reached), 0)
        position = position.requires_grad_()
        trained = list(program.weights.values())
        optimiser = torch.optim.LBFGS([position, *trained], max_iter=20, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimiser.zero_grad()
            if trained:
                row = {name: value[0] for name, value in fixed.items()}
                w = [weight[0] for weight in weights]
                with torch.enable_grad():
                    loss = -at(position[0], row, {n: v[0] for n, v in particles.items()}, w)
                    loss.backward()
                return loss.detach()
            gradient, value = staged(position.detach(), fixed, particles, weights)
            position.grad = -gradient.nan_to_num(nan=0.0)
            return -_finite(value.sum())

        with torch.no_grad():
            optimiser.step(closure)
        if not has_sites:
            return state
        return self._take(state, program, coordinates.values(position.detach()), weights, reached)[0]

    # ------------------------------------------------------------------------------------ result
    def sample(self, state: EMState, program: Program) -> tuple[EMState, Draw]:
        values = self.values(state, program)
        best = _finite(state.objective).argmax()
        return state, Draw({name: value[best][None] for name, value in values.items()}, {"lp": state.objective[best][None]})

    def values(self, state: EMState, program: Program) -> dict[str, Tensor]:
        values = dict(state.values)
        if program.finite:
            others = {name: value for name, value in values.items() if name not in program.finite}
            values |= _most_probable(state.density, program)(others)
        return {name: values[name] for name in program.latents}

    def history(self, records: dict[str, Tensor], state: EMState) -> dict[str, Tensor]:
        best = int(_finite(state.objective).argmax())
        return {name: value[:, best] for name, value in records.items()}

    def plan(self, state: EMState, program: Program) -> Plan:
        roles = state.roles
        updates = []
        finite = tuple(name for name in roles.averaged if name in program.finite)
        if finite:
            updates.append(Update(finite, "Enumerate", note="most probable" if self.hard else "averaged"))
        rest = tuple(name for name in roles.averaged if name not in finite)
        if rest:
            updates.append(Update(rest, roles.average, note="averaged"))
        updates += [Update((name,), family.name, note="maximised") for name, family in roles.families.items()]
        if roles.climbed:
            updates.append(Update(roles.climbed, "L-BFGS", note="maximised; no closed form"))
        return Plan(tuple(updates))


def _fresh(values: dict[str, Tensor], restarts: int, roles: Roles, density: Density) -> EMState:
    """A state that has taken no step."""
    infinite = torch.full((restarts,), math.inf, dtype=density.program.dtype, device=density.program.device)
    zero = infinite.new_zeros(())
    return EMState(values, {}, {}, -infinite, infinite, infinite, zero, roles, density, ())


def _finite(objective: Tensor) -> Tensor:
    """What is not finite ranks last."""
    return objective.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)


def _joint_message(density: Density, family: Family, name: str, points: Points, values: dict[str, Tensor]) -> Conditional:
    at = family.at(points)
    gradients = density.gradients(name)(at.movedim(0, 1).contiguous(), values)
    return family.solve(at, gradients.movedim(1, 0))


def _is_zero(ratio: Tensor, *sizes: Tensor) -> bool:
    from inference.blocks.block import Move

    return is_certified(Move(ratio, ratio.nan_to_num(nan=math.inf)), *sizes)


def _merged(good: Tensor, new: Points, old: Points) -> Points:
    shape = (-1, *(1,) * (old.location.dim() - 1))
    return Points(*(torch.where(good.reshape(shape) & a.isfinite(), a, b) for a, b in zip(new, old, strict=True)))


def _sigma_points(conditional: Conditional) -> Tensor:
    """Equally weighted points, (restart, particle, *site), that average every quadratic in the site exactly."""
    if isinstance(conditional, GaussianConditional):
        width = conditional.mean.shape[-1]
        factor, _ = conditional._factor()
        eye = torch.eye(width, dtype=factor.dtype, device=factor.device)
        columns = torch.linalg.solve_triangular(factor.mT, eye.expand_as(factor), upper=True) * math.sqrt(width)
        points = [
            conditional.coupling.fold(conditional.mean + sign * columns[..., i])
            for i in range(width)
            for sign in (1.0, -1.0)
        ]
        return torch.stack(points, 1)
    assert isinstance(conditional, NormalConditional)
    sd = conditional.precision.rsqrt()
    return torch.stack([conditional.mean + sd, conditional.mean - sd], 1)


def _relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Largest change of a value, relative to the largest value of its site, (restart,)."""
    changes = [torch.zeros_like(like)]
    for name, value in before.items():
        size = value.abs().reshape(len(value), -1).amax(-1)
        moved = (after[name] - value).abs().reshape(len(value), -1).amax(-1)
        changes.append(moved / size.clamp(min=torch.finfo(value.dtype).tiny))
    return torch.stack(changes).amax(0)


def _most_probable(density: Density, program: Program) -> Any:
    """The most probable joint values of the finite sites given all others."""

    def best(values: dict[str, Tensor]) -> dict[str, Tensor]:
        found = factors(program, values, program.finite)
        _, records = eliminate(found, plates_of(program, program.finite), maximise=True)
        picked, _ = draw_back(program, records, lambda site, logits: logits.argmax(-1))
        result = {}
        for site in program.finite:
            choices = program.latents[site].choices
            assert choices is not None
            zeros = torch.zeros(program.latents[site].batch_shape, dtype=torch.long, device=choices.device)
            result[site] = choices[picked.get(site, zeros)]
        return result

    return density.stage(("most probable", program.finite), best, (True,))
