"""Expectation-maximisation of any program: averages from one backward pass, maxima from the messages of Gibbs sampling.

The E-step (``inference.expectation``) gives the posterior weight of every entry of every factor; the M-step raises

    Q(θ) = Σ_i ⟨w_i, log f_i(θ)⟩,

one site after the other: in closed form where the gradient of Q is a message of a known family, by gradient steps
(``inference.maximisation``) elsewhere. Where Q is itself random, for mini-batches of rows or draws in the E-step, the
gradients at fixed points, which are linear in the expected statistics, are averaged over the steps with gain γ_t.

References:
    A. Dempster, N. Laird and D. Rubin, Maximum likelihood from incomplete data via the EM algorithm (1977).
    X.-L. Meng and D. Rubin, Maximum likelihood estimation via the ECM algorithm (1993).
    B. Delyon, M. Lavielle and E. Moulines, Convergence of a stochastic approximation version of the EM algorithm (1999).
    R. Varadhan and C. Roland, Simple and globally convergent methods for accelerating the convergence of any EM algorithm
        (2008): ``acceleration="squarem"`` (``inference.acceleration``).
    O. Cappé and E. Moulines, On-line expectation-maximization algorithm for latent data models (2009).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from inference.acceleration import Path
from inference.blocks import Own
from inference.blocks.block import Move, is_certified
from inference.closed import Ascent, is_no_lower, suggested, where
from inference.conditionals import Points
from inference.contract import Backend, Draw, Started, Unsupported
from inference.density import Density
from inference.distributed import check_shards
from inference.expectation import ALL, Batch, Completed, Enumerated, Expectation, Moved, Weights
from inference.fit import Optimise
from inference.gibbs import Gibbs
from inference.handlers import isolated, reproducible
from inference.information import WIDEST, standard_errors
from inference.latents import GaussianLatents, PositiveLatents
from inference.marginal import MarginalSampler
from inference.maximisation import FEW, Adam, climb, grow, is_growing, stroll
from inference.messages import Family, candidates, kind_of
from inference.metropolis import MetropolisHastings
from inference.monte_carlo import Sampled, Sampler
from inference.plan import Plan, Update, assign
from inference.program import Program
from inference.sites import Site
from inference.start import ASCENT, ascended, given_values, starting_values, suggested_values

__all__ = ["EM", "EMInfo", "EMState", "Roles"]

_PILOTS, _PILOT_STEPS = 8, 5  # short runs, the best of which is continued: EM is only as good as its start
_MOST_PILOTED = 100_000  # numbers in all latent sites, of which there are pilots though the start is given
_PILOT_ROWS = 5_000  # that pilots see of data with more than twice as many
_PILOT_CANDIDATES = 8  # draws that each of them then begins with the best of
_SUGGESTED_CANDIDATES = 4  # where the model suggests where to begin: they are for what it says nothing of
_STROLL = 20  # steps of Adam in one M-step on all rows
_TRIAL = 0.5  # unconstrained distance at which a message must give the change of Q
_GAIN = 0.6  # γ_t = t^−0.6: Cappé and Moulines recommend it with averaging of the last half


class Roles(NamedTuple):
    """What EM does with each latent site; not tensors, and the same for every step.

    ``owned`` are the groups of sites that the model's own steps move. ``families`` maps another maximised site to the family
    of its closed-form M-step; sites without one are in ``grown`` if they are on a simplex and no entry has a negative
    exponent, else in ``climbed``.
    """

    averaged: tuple[str, ...]
    families: dict[str, Family]
    grown: tuple[str, ...]
    climbed: tuple[str, ...]
    expectation: Expectation
    task: Completed
    owned: tuple[tuple[str, ...], ...] = ()


class EMState(NamedTuple):
    """Where every restart is.

    Attributes:
        values: All latent sites; the maximised ones are θ, (restart, *site).
        points: Maximised site to the points of its message.
        statistics: Maximised site to the averaged gradients at its points, if Q is random.
        averages: Maximised site to its mean over the last half of the steps, if Q is random.
        memory: What the E-step remembers.
        own: What the model's own steps remember, for each group of sites that they move.
        adam: The optimiser of what has no closed M-step and is large or random; else None.
        rows: The order in which mini-batches take the rows, (row,); empty without mini-batches.
        objective: log p(data, θ), or the likelihood for "mle", before the last step; (restart,).
        change: Largest relative change of a maximised value in the last step, (restart,).
        distance: Estimated relative distance to the fixed point, (restart,).
        step: Number of steps taken, ().
        roles: What is done with each site.
        path: Of an accelerated run, where it is within its cycle; else None.
    """

    values: dict[str, Tensor]
    points: dict[str, Points]
    statistics: dict[str, Tensor]
    averages: dict[str, Tensor]
    memory: Any
    own: tuple[Any, ...]
    adam: Adam | None
    rows: Tensor
    objective: Tensor
    change: Tensor
    distance: Tensor
    step: Tensor
    roles: Roles
    path: Path | None = None


class EMInfo(NamedTuple):
    """What one step found.

    Attributes:
        log_joint: The objective before the step; an estimate for mini-batches, a bound's for draws; (restart,).
        distance: Estimated relative distance to the end, (restart,); NaN where Q is random.
        is_done: Whether all restarts have converged; where Q is random, whether all steps are taken; ().
    """

    log_joint: Tensor
    distance: Tensor
    is_done: Tensor


@dataclass(frozen=True, kw_only=True)
class EM(Backend[EMState, EMInfo]):
    """Expectation-maximisation; the result is a point.

    Finite discrete sites and sites in a plate over the rows of the data (``Program.row_plates``; if there is none, in any
    plate of the data) or in a Python loop over them (``Program.row_loops``, unless there is nothing else) are averaged; all
    others, such as a mean of each column, and the weights are maximised, on the scale on which the program samples them (no
    Jacobian). The objective never falls if the E-step is exact, as it is for finite sites, chains of them included, for
    jointly Gaussian ones, and for a positive one whose conditional is Gamma or inverse Gaussian; others are averaged over
    draws.

    A model may bring steps of its own (``inference.contract.Stepped``), which are taken for the sites that they move, unless
    ``maximise=`` says that such a site is averaged. They need not raise the objective.

    ``posterior.stats["standard_error_<site>"]`` holds standard errors of the maximised sites, from the observed information
    at given weights; NaN along a ridge of the density, or where the point is no maximum inside the support.

    Args:
        steps: Most steps.
        tolerance: Stop when the values are estimated to be this close to the fixed point, relatively (Aitken's estimate).
            Mini-batches and draws take all steps, and return the mean over the last half of them.
        restarts: Number of starting points, all run at once; the best wins.
        objective: "map" maximises p(data, θ); "mle" leaves out the priors of what is maximised.
        acceleration: "squarem" extrapolates from every two steps to where they lead, and takes that where the objective does
            not fall (Varadhan and Roland 2008); None takes plain steps. The fixed points are the same. Needs an exact E-step
            on all rows, and sites to maximise rather than weights.
        hard: Whether to take the most probable values of the finite sites instead of averaging over them. There are no
            standard errors then: the labels are taken for known.
        maximise: Names of the sites to maximise instead of those above.
        batch_size: Rows per step; None takes all. Averaged sites must lie in the plates of the rows.
        e_step: The sampler of the continuous averaged sites, such as ``HMC(chains=64)``: its ``chains`` are the draws of
            each restart, carried from step to step, and ``thin`` the moves per step; it adapts during the first half of
            the steps. None averages exactly where it can, else takes ``Gibbs(chains=64, thin=5)``.
        learning_rate: Of Adam, which takes the M-step without a closed form of more than 1,000 parameters, or on batches.
        standard_errors: Whether to compute them (not for more than 500 parameters).

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
    acceleration: str | None = None
    hard: bool = False
    maximise: Collection[str] | None = None
    batch_size: int | None = None
    e_step: Gibbs | MarginalSampler | None = None
    learning_rate: float = 1e-2
    standard_errors: bool = True

    @property
    def schedule(self) -> Optimise:
        return Optimise(self.steps, 1, 1, lambda info: bool(info.is_done))

    @property
    def view(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}

    # ------------------------------------------------------------------------------------- start
    def init(self, program: Program) -> EMState:
        if self.objective not in ("map", "mle"):
            raise ValueError(f"objective is '{self.objective}', but must be 'map' or 'mle'.")
        if self.acceleration not in (None, "squarem"):
            raise ValueError(f"acceleration is {self.acceleration!r}, but must be 'squarem' or None.")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, but must be positive.")
        if self.e_step is not None and not isinstance(self.e_step, (Gibbs, MarginalSampler)):
            raise TypeError(f"e_step= must be a sampler such as HMC(chains=64), but is {self.e_step!r}.")
        if isinstance(self.e_step, MetropolisHastings) and not self.e_step.proposal.climbs:
            raise Unsupported(
                f"e_step= moves draws on from step to step, while the parameters change, but {self.e_step.proposal!r} "
                "proposes from one distribution. Use HMC(chains=64), or RandomWalk() or Langevin() for a proposal."
            )
        averaged, maximised = self._split(program)
        owned = self._owned(program, maximised)
        check_shards(program, averaged, maximised, self.batch_size)
        if not maximised and not program.weights:
            raise Unsupported("EM has nothing to maximise: every latent site is averaged. Use maximise=.")
        if program.weights and self.restarts > 1:
            raise Unsupported("EM trains the weights of the program in place, which allows for one restart only.")
        self._check_batches(program, averaged)
        self._check_acceleration(program, owned)
        task = self._task(program, maximised)
        given = given_values(program, self.start, self.restarts)
        seen = program if owned else self._thinned(program, averaged, maximised)
        if seen is program:
            roles, values, points = self._piloted(program, task, averaged, given)
        else:
            with reproducible(seen.dtype, program.device):
                wide = {name: _as(value, seen) for name, value in given.items()}
                whole = dataclasses.replace(self, batch_size=None)  # there are few rows
                roles, values, points = whole._piloted(seen, self._task(seen, maximised), averaged, wide)
            if self._is_batched(program):
                roles = roles._replace(grown=(), climbed=roles.grown + roles.climbed)
            values = {name: _as(value, program) for name, value in values.items()} | given
            points = {name: Points(*(_as(part, program) for part in own)) for name, own in points.items()}
            # labels of all rows, which the first step does not look at
            values |= {name: _first(program.latents[name], self.restarts) for name in averaged}
        restarts = len(next(iter(values.values()))) if values else self.restarts
        if self.acceleration is not None and roles.expectation.is_random:
            raise Unsupported(
                f"acceleration= needs an exact E-step, but {', '.join(roles.expectation.sites)} can only be averaged over "
                "draws. Leave acceleration= out."
            )
        state = _fresh(values, restarts, roles._replace(task=task))
        return state._replace(points=points, memory=roles.expectation.init(values, task))

    def _owned(self, program: Program, maximised: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        """The groups of sites that the model's own steps move."""
        owned = tuple(sites for sites in program.steps if set(sites) <= set(maximised))
        if owned and (self._is_cut(program) or self.objective == "mle"):
            given = "batch_size=" if self._is_batched(program) else "several processes" if self._is_cut(program) else "'mle'"
            raise Unsupported(
                f"The steps that {program.name} brings for {', '.join(owned[0])} are of all rows under their priors, and "
                f"know no {given}. Leave that out, or the model's own steps."
            )
        return owned

    def _piloted(
        self, program: Program, task: Completed, averaged: tuple[str, ...], given: dict[str, Tensor]
    ) -> tuple[Roles, dict[str, Tensor], dict[str, Points]]:
        """What is done with each site, and where each restart begins: values, and points of closed M-steps."""
        maximised = task.maximised
        is_given, suggested = set(given) >= set(maximised), {}
        numbers = sum(site.shape.numel() for site in program.latents.values())
        owned = self._owned(program, maximised)
        is_wide = is_given and given and numbers > _MOST_PILOTED  # a trial of the M-step takes one
        is_alone = program.weights or owned or is_wide
        pilots = self.restarts if is_alone else max(_PILOTS, 2 * self.restarts)
        is_given_all = given.keys() == program.latents.keys()
        if is_given and given:  # whether an M-step is closed is tried nearby
            others = {} if is_given_all else starting_values(program, pilots, None, most=1, is_split=True)
            values = _around(program, given, others, pilots)
        else:
            few = {"most": _PILOT_CANDIDATES} if program.rows == _PILOT_ROWS else {}
            few = {"most": _SUGGESTED_CANDIDATES} if isinstance(program.owner, Started) else few
            values = starting_values(program, pilots, None, is_split=True, **few) if program.latents else {}
            suggested = {} if program.weights else suggested_values(program, values)
            values |= suggested
        if program.continuous and not suggested and not is_alone and not is_given and not self._is_batched(program):
            values = ascended(program, values, longest=ASCENT, is_split=True)
        if program.finite:
            with isolated(0, program.device):  # looking changes nothing
                task.density.certify(program.finite, values, "Use Gibbs().")
        trial = values
        if suggested and averaged:  # exactly there, latents may happen to be uncoupled, as they are along principal axes
            with isolated(0, program.device):
                trial = _around(program, {name: suggested[name] for name in suggested if name in maximised}, values, pilots)
        expectation = self._expectation(trial, averaged, task)
        pilot = _fresh(trial, pilots, Roles(averaged, {}, (), (), expectation, task, owned))
        pilot = self._find_families(pilot._replace(memory=expectation.init(trial, task)), program)
        if suggested and averaged:
            points = {name: family.initial(values[name]) for name, family in pilot.roles.families.items()}
            pilot = pilot._replace(values=values, memory=expectation.init(values, task), points=points)
        if is_given:
            chosen = torch.arange(self.restarts, device=program.device)
        else:
            plain = dataclasses.replace(self, acceleration=None)
            for _ in range(0 if is_alone else _PILOT_STEPS):
                pilot, _ = plain.step(pilot, program)
            chosen = _ranked(pilot.objective)[: self.restarts]
        if program.is_long:  # another number of restarts would have to be recorded anew, for longer than the copies take
            copies = torch.arange(pilots, device=program.device) % self.restarts
            chosen, given = chosen[copies], {name: value[copies] for name, value in given.items()}
        values = {name: value[chosen] for name, value in pilot.values.items()} | given
        points = {n: Points(p.location[chosen], p.spread[chosen]) for n, p in pilot.points.items()}
        # where a start is given, the pilots were elsewhere
        points |= {n: f.initial(values[n]) for n, f in pilot.roles.families.items() if n in given}
        return pilot.roles, values, points

    def _task(self, program: Program, maximised: tuple[str, ...]) -> Completed:
        density = Density(program, rung="vmapped") if program.weights else program.density
        return Completed(program, density, maximised, self.objective == "mle", self.hard)

    def _thinned(self, program: Program, averaged: tuple[str, ...], maximised: tuple[str, ...]) -> Program:
        """What pilots see of the program: few rows of very many, in float64, where tables are all that is averaged over."""
        rows = program.rows or 0
        is_large = rows > 2 * _PILOT_ROWS and len(program.row_plates) > 0
        if program.is_long or program.is_sequence or program.weights or not set(averaged) <= set(program.finite):
            return program
        if not is_large and program.dtype == torch.float64:
            return program
        index = torch.randperm(rows, device=program.device)[:_PILOT_ROWS].sort().values if is_large else torch.arange(rows)
        try:
            seen = program.thinned(index.to(program.device), torch.float64)
            kept = [seen.latents[name].shape == program.latents[name].shape for name in maximised]
        except Exception:  # whatever a program raises that was written for just these rows
            return program
        return seen if all(kept) and seen.latents.keys() == program.latents.keys() else program

    def _split(self, program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
        data_plates = {plate.name for site in program.observed_sites.values() for plate in site.plates}
        local_plates = data_plates & set(program.row_plates) or data_plates
        if self.maximise is not None:
            for name in self.maximise:
                if name not in program.latents:
                    raise ValueError(f"maximise= names '{name}', but the latent sites are {', '.join(program.latents)}.")
                if not program.latents[name].is_continuous:
                    raise Unsupported(
                        f"maximise= names '{name}', which is discrete: it can only be averaged. Use hard=True for its most "
                        "probable values."
                    )
            chosen = set(self.maximise)
        else:
            alone = {
                name
                for name, site in program.latents.items()
                if site.is_continuous and not local_plates & {plate.name for plate in site.plates}
            }
            chosen = alone - set(program.row_loops)
            if not chosen and not program.weights:
                chosen = alone
            chosen |= {name for sites in program.steps for name in sites}
        averaged = tuple(name for name in program.latents if name not in chosen)
        return averaged, tuple(name for name in program.latents if name in chosen)

    def _is_cut(self, program: Program) -> bool:
        """Whether a step of this process does not see all rows."""
        return self._is_batched(program) or program.processes.size > 1

    def _is_batched(self, program: Program) -> bool:
        return self.batch_size is not None and program.rows is not None and self.batch_size < program.rows

    def _check_batches(self, program: Program, averaged: tuple[str, ...]) -> None:
        if self.batch_size is None:
            return
        program.check_rows("batch_size")
        for name in averaged:
            if not {plate.name for plate in program.latents[name].plates} & set(program.row_plates):
                raise Unsupported(
                    f"batch_size needs rows that are independent given what is maximised, but '{name}' is averaged and not "
                    f"in the plate '{program.row_plates[0]}'. Take all rows, or name it in maximise=."
                )

    def _check_acceleration(self, program: Program, owned: tuple[tuple[str, ...], ...]) -> None:
        if self.acceleration is None:
            return
        if program.weights:
            raise Unsupported(
                f"acceleration= goes back where an extrapolation lowers the objective, but EM trains the weights of "
                f"{program.name} in place. Leave acceleration= out."
            )
        if self._is_batched(program):
            raise Unsupported("acceleration= needs the objective of all rows in every step. Leave it out, or batch_size=.")
        if owned:
            raise Unsupported(
                f"acceleration= needs steps that never lower the objective, but those that {program.name} brings for "
                f"{', '.join(owned[0])} may. Leave acceleration= out."
            )

    def _expectation(self, values: dict[str, Tensor], averaged: tuple[str, ...], task: Completed) -> Expectation:
        """How the continuous averaged sites are handled."""
        program = task.program
        others = tuple(name for name in averaged if name not in program.finite)
        if not others:
            if self.e_step is not None:
                raise ValueError("e_step= samples continuous averaged sites, but there are none: the E-step is exact.")
            return Enumerated()
        if self.e_step is None and not program.finite:
            found = GaussianLatents(others).bind(values, task) or PositiveLatents(others).bind(values, task)
            if found is not None:
                return found
        if self._is_cut(program):
            raise Unsupported(
                f"{'batch_size needs' if self._is_batched(program) else 'Several processes need'} an exact E-step, but "
                f"{', '.join(others)} can only be averaged over draws. Take all rows in one process "
                "(inference.distributed.alone)."
            )
        if isinstance(self.e_step, MarginalSampler):
            backend = dataclasses.replace(self.e_step, draws=1, thin=1, progress=False)
            return Sampler(others, (), averaged, self.e_step.chains, self.e_step.thin, backend)
        e_step = self.e_step or Gibbs(chains=64, thin=5)
        blocks = assign(program, e_step.blocks)[0]
        mixed = [block for block in blocks if 0 < len(set(block.sites) & set(averaged)) < len(block.sites)]
        if mixed:  # a joint block of averaged and maximised sites is split
            split = tuple(site for block in mixed for site in block.sites if site in averaged)
            if isinstance(mixed[0], Own):
                blocks = assign(program, e_step.blocks, with_own=False)[0]
            else:
                blocks = assign(program, {**(e_step.blocks or {}), split: type(mixed[0])()})[0]
        blocks = tuple(block for block in blocks if set(block.sites) <= set(averaged))
        return Sampled(others, blocks, averaged, e_step.chains, e_step.thin)

    def _find_families(self, state: EMState, program: Program) -> EMState:
        """Tries which M-steps are closed: the message of Q must give its differences, at a random draw."""
        owned = {name for sites in state.roles.owned for name in sites}
        if owned >= set(state.roles.task.maximised):
            return state
        task, batch = state.roles.task, self._batch(state, program)[0]
        moved = state.roles.expectation.step(state.memory, state.values, task, batch, self.steps)
        values, particles = {**state.values, **moved.values}, moved.particles
        _, weights = task.expect(values, particles, batch)
        families, points = {}, {}
        grown: list[str] = []
        climbed: list[str] = []
        is_random = self._is_batched(program) or state.roles.expectation.is_random
        for name in task.maximised:
            site = program.latents[name]
            if site.is_constant or name in owned:
                continue
            for family in candidates(site.support, site.shape):
                start = family.initial(values[name])
                for _ in range(2):
                    at = family.at(start)
                    conditional = family.solve(at, task.gradients(name, at, values, particles, weights, batch))
                    start = suggested(family, conditional)
                # a function with a maximum need not be a density: a component of three rows has no Wishart, but a covariance
                proposal = _nearby(site, values[name])
                usable = conditional.mode().reshape(len(proposal), -1).isfinite().all(-1)
                if 2 * int(usable.sum()) < len(usable):
                    continue
                before = task.expected(values, particles, weights, batch)
                after = task.expected({**values, name: proposal}, particles, weights, batch)
                ratio = (after - before) - (conditional.log_kernel(proposal) - conditional.log_kernel(values[name]))
                ratio, after, before = (torch.where(usable, part, 0.0) for part in (ratio, after, before))
                if is_certified(Move(ratio, ratio.nan_to_num(nan=math.inf)), after, before):
                    families[name], points[name] = family, start
                    break
            else:
                is_simplex = kind_of(site.support) == "simplex" and not is_random
                is_grown = is_simplex and is_growing(task, name, values, particles, weights, batch)
                (grown if is_grown else climbed).append(name)
        roles = state.roles._replace(families=families, grown=tuple(grown), climbed=tuple(climbed))
        return state._replace(roles=roles, points=points, values=values, memory=moved.memory)

    # -------------------------------------------------------------------------------------- step
    def _batch(self, state: EMState, program: Program) -> tuple[Batch, Tensor]:
        """The rows of this step, and the order of those to come: every row once in an epoch."""
        processes = program.processes
        if not self._is_batched(program):
            return ALL if program.shard is None else Batch(program.shard, float(processes.size), processes), state.rows
        assert self.batch_size is not None and program.rows is not None
        rows = state.rows
        if len(rows) < self.batch_size:
            rows = torch.randperm(program.rows, device=program.device)
        index, rest = processes.share(rows[: self.batch_size]), rows[self.batch_size :]
        return Batch(program.minibatch(index), processes.size * program.rows / self.batch_size, processes), rest

    def step(self, state: EMState, program: Program) -> tuple[EMState, EMInfo]:
        roles, task, count = state.roles, state.roles.task, int(state.step)
        batch, rows = self._batch(state, program)
        is_batched = self._is_batched(program)
        is_random = is_batched or roles.expectation.is_random
        half = self.steps // 2
        adapts = half if count < half else 0
        state, moved, weights = self._averages(state._replace(rows=rows), batch, adapts)
        before, objective = task.theta(state.values) | _copied(program.weights), state.objective
        state = self._owned_step(state)
        if is_random:
            # draws: all of them count anew until the last half; batches: each one counts less than the last from the start
            age = count + 1 if is_batched else max(count - half + 1, 1)
            state = self._random_step(state, moved.particles, weights, batch, age**-_GAIN)
            state = self._averaged(state, count - half + 1)
            distance, is_done = torch.full_like(objective, math.nan), count + 1 >= self.steps
        else:
            state = self._exact_step(state, moved.particles, weights, batch)
            change = _relative_change(before, state.values | program.weights, state.points, like=objective)
            ratio = (change / state.change).clamp(0.0, 0.999).nan_to_num(nan=0.0)
            distance = torch.where(change == 0, change, change * ratio / (1 - ratio) + 0.1 * change)
            if state.path is not None:
                path = state.path.moved(
                    program.latents, before, task.theta(state.values), _sizes(before, state.points, objective)
                )
                state, distance = state._replace(path=path), change * path.slowness
            if count < (2 if state.path is None else 4) and bool((change > 0).any()):
                distance = distance + math.inf
            state = state._replace(change=change, distance=distance)
            is_done = bool((distance <= self.tolerance).all())
        state = state._replace(step=state.step + 1)
        return state, EMInfo(objective, distance, torch.tensor(is_done))

    def _averages(self, state: EMState, batch: Batch, adapts: int) -> tuple[EMState, Moved, Weights]:
        """The E-step, and the objective; of an accelerated run where the last cycle leads to, if it is no lower there."""
        path = state.path
        if self.acceleration is not None and path is None and not state.roles.expectation.is_random:
            path = Path.begin(state.roles.task.theta(state.values), state.objective)
            state = state._replace(path=path)
        if path is None or not bool(path.jumps.any()):
            return self._expected(state, batch, adapts)
        plain, task = state.values, state.roles.task
        jumped = state._replace(values={**plain, **path.trial(task.theta(plain))})
        found = self._expected(jumped, batch, adapts)
        is_good = ~path.jumps | is_no_lower(found[0].objective, state.objective)
        path = path.judged(is_good)
        if not bool(is_good.all()):
            chosen = {name: where(is_good, jumped.values[name], plain[name]) for name in task.maximised}
            found = self._expected(state._replace(values={**plain, **chosen}), batch, adapts)
        return found[0]._replace(path=path), *found[1:]

    @staticmethod
    def _expected(state: EMState, batch: Batch, adapts: int) -> tuple[EMState, Moved, Weights]:
        """The E-step, and the objective, at the values."""
        task = state.roles.task
        moved = state.roles.expectation.step(state.memory, state.values, task, batch, adapts)
        state = state._replace(memory=moved.memory, values={**state.values, **moved.values})
        log_z, weights = task.expect(state.values, moved.particles, batch)
        objective = batch.processes.mean((log_z - batch.scale * moved.log_q).mean(1))
        return state._replace(objective=objective), moved, weights

    def _exact_step(self, state: EMState, particles: dict[str, Tensor], weights: Weights, batch: Batch) -> EMState:
        """Raises Q, or leaves it."""
        roles, task = state.roles, state.roles.task
        if roles.owned and not (roles.grown or roles.families or roles.climbed or task.program.weights):
            return state
        ascent = Ascent(task, particles, weights, batch)
        theta, points, reached = task.theta(state.values), state.points, None
        if roles.grown:
            proposed, grown = grow(task, roles.grown, state.values, particles, weights, batch)
            theta, reached = ascent.taken(theta, proposed, grown)
        if roles.families:
            is_alone = not roles.grown and not roles.owned
            theta, points, reached = ascent.maximised(roles.families, theta, points, is_alone)
        elif reached is None:
            reached = task.expected(theta, particles, weights, batch)
        state = state._replace(values={**state.values, **theta}, points=points)
        trained = list(task.program.weights.values())
        if not roles.climbed and not trained:
            return state
        if not self._is_large(task, roles):
            proposed = climb(task, roles.climbed, state.values, particles, weights, batch)
            return state._replace(values=ascent.taken(state.values, proposed, reached)[0])
        adam = state.adam or Adam.start(task, roles.climbed, state.values, self.learning_rate)
        kept = _copied(task.program.weights)
        rate = adam.optimiser.param_groups[0]["lr"]
        proposed = stroll(adam, task, roles.climbed, state.values, particles, weights, batch, _STROLL, rate)
        fell = bool((task.expected({**state.values, **proposed}, particles, weights, batch) < reached).any())
        state = state._replace(values=ascent.taken(state.values, proposed, reached)[0], adam=adam)
        if fell:  # too long a step
            adam.optimiser.param_groups[0]["lr"] = 0.5 * rate
            with torch.no_grad():
                for weight, old in zip(trained, kept.values(), strict=True):
                    weight.copy_(old)
        return state

    def _owned_step(self, state: EMState) -> EMState:
        values, memories = state.values, []
        for sites, memory in zip(state.roles.owned, state.own, strict=True):
            moved, memory = state.roles.task.program.steps[sites](state.roles.task.theta(values), memory)
            values = {**values, **{name: moved[name].detach() for name in sites}}
            memories.append(memory)
        return state._replace(values=values, own=tuple(memories))

    def _random_step(
        self, state: EMState, particles: dict[str, Tensor], weights: Weights, batch: Batch, gain: float
    ) -> EMState:
        """Moves to the maximum of the averaged Q."""
        roles, task = state.roles, state.roles.task
        for name, family in roles.families.items():
            at = family.at(state.points[name])
            gradients = task.gradients(name, at, state.values, particles, weights, batch)
            if name in state.statistics:
                gradients = torch.lerp(state.statistics[name], gradients, gain)
            mode = family.solve(at, gradients).mode()
            good = mode.isfinite().reshape(len(mode), -1).all(-1)
            value = torch.where(good.reshape(-1, *(1,) * (mode.dim() - 1)), mode, state.values[name])
            state = state._replace(values={**state.values, name: value}, statistics={**state.statistics, name: gradients})
        if not roles.climbed and not task.program.weights:
            return state
        if not batch.data and not self._is_large(task, roles):
            proposed = climb(task, roles.climbed, state.values, particles, weights, batch)
            coordinates = {name: task.program.latents[name].transform for name in proposed}
            for name, value in proposed.items():
                transform = coordinates[name]
                old, new = transform.inv(state.values[name]), transform.inv(value)
                proposed[name] = transform(torch.lerp(old, torch.where(new.isfinite(), new, old), gain))
            return state._replace(values={**state.values, **proposed})
        adam = state.adam or Adam.start(task, roles.climbed, state.values, self.learning_rate)
        progress = min(1.0, int(state.step) / self.steps)
        rate = self.learning_rate * (0.01 + 0.99 * 0.5 * (1.0 + math.cos(math.pi * progress)))
        proposed = stroll(adam, task, roles.climbed, state.values, particles, weights, batch, 1, rate)
        return state._replace(values={**state.values, **proposed}, adam=adam)

    def _averaged(self, state: EMState, count: int) -> EMState:
        """The mean of θ over the last ``count`` steps; closed forms live on convex supports, others are unconstrained."""
        averages = dict(state.averages)
        if count < 1:
            return state
        for name in (*state.roles.families, *state.roles.climbed):
            value = state.values[name]
            if name in state.roles.climbed:
                value = state.roles.task.program.latents[name].transform.inv(value)
            averages[name] = value if name not in averages or count == 1 else averages[name].lerp(value, 1.0 / count)
        return state._replace(averages=averages)

    @staticmethod
    def _is_large(task: Completed, roles: Roles) -> bool:
        sites = sum(task.program.latents[name].shape.numel() for name in roles.climbed)
        return sites + sum(weight.numel() for weight in task.program.weights.values()) > FEW

    # ------------------------------------------------------------------------------------ result
    def _finished(self, state: EMState) -> EMState:
        """θ as it is reported, with the E-step on all rows there."""
        roles, task, values = state.roles, state.roles.task, dict(state.values)
        for name, value in state.averages.items():
            values[name] = task.program.latents[name].transform(value) if name in roles.climbed else value
        moved = roles.expectation.step(state.memory, values, task)
        values |= moved.values
        log_z, _ = task.expect(values, moved.particles, ALL)
        if any(self._is_kept(task.program, name) for name in task.program.finite):
            values |= task.most_probable(values)
        return state._replace(values=values, memory=moved.memory, objective=(log_z - moved.log_q).mean(1))

    def _is_kept(self, program: Program, name: str) -> bool:
        """Whether anything is made of the values of a site."""
        return self.keep is None or name in self.keep or bool(program.deterministic)

    def sample(self, state: EMState, program: Program) -> tuple[EMState, Draw]:
        end = self._finished(state)
        best = _ranked(end.objective)[0]
        values = {name: end.values[name][best][None] for name in program.latents}
        stats = {"lp": end.objective[best][None]}
        task = end.roles.task
        sizes = sum(program.latents[name].shape.numel() for name in task.maximised)
        if self.standard_errors and not self.hard and not end.roles.owned and 0 < sizes <= WIDEST:
            memory = end.roles.expectation.init(values, task)
            errors = standard_errors(end.roles.expectation, memory, values, task)
            stats |= {f"standard_error_{name}": error for name, error in errors.items()}
        return state, Draw(values, stats)

    def values(self, state: EMState, program: Program) -> dict[str, Tensor]:
        values = self._finished(state).values
        return {name: values[name] for name in program.latents}

    def history(self, records: dict[str, Tensor], state: EMState) -> dict[str, Tensor]:
        best = int(_ranked(state.objective)[0])
        return {name: value[:, best] for name, value in records.items() if name != "is_done"}

    def plan(self, state: EMState, program: Program) -> Plan:
        roles = state.roles
        updates = []
        finite = tuple(name for name in roles.averaged if name in program.finite)
        if finite:
            updates.append(Update(finite, "Enumerate", note="most probable" if self.hard else "averaged"))
        rest = tuple(name for name in roles.averaged if name not in finite)
        if rest:
            updates.append(Update(rest, roles.expectation.update, note="averaged"))
        updates += [
            Update(sites, "Own", note="the model's own steps, which need not raise log_joint") for sites in roles.owned
        ]
        updates += [Update((name,), family.name, note="maximised") for name, family in roles.families.items()]
        updates += [Update((name,), "Growth", note="maximised; no closed form") for name in roles.grown]
        if roles.climbed:
            is_large = self._is_large(roles.task, roles) or self._is_batched(program)
            updates.append(Update(roles.climbed, "Adam" if is_large else "L-BFGS", note="maximised; no closed form"))
        return Plan(tuple(updates))


def _as(value: Tensor, program: Program) -> Tensor:
    """A value in the floating type of a program."""
    return value.to(program.dtype) if value.is_floating_point() else value


def _first(site: Site, restarts: int) -> Tensor:
    """The first choice of a finite site everywhere, (restart, *site)."""
    assert site.choices is not None
    return site.choices[0].expand(restarts, *site.shape)


def _fresh(values: dict[str, Tensor], restarts: int, roles: Roles) -> EMState:
    """A state that has taken no step."""
    program = roles.task.program
    infinite = torch.full((restarts,), math.inf, dtype=program.dtype, device=program.device)
    rows = torch.empty(0, dtype=torch.long, device=program.device)
    return EMState(
        values, {}, {}, {}, None, (None,) * len(roles.owned), None, rows, -infinite, infinite, infinite,
        infinite.new_zeros(()), roles,
    )  # fmt: skip


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


def _ranked(objective: Tensor) -> Tensor:
    """Restarts from the best to the worst, what is not finite last.

    The first of those that differ by rounding alone comes first: which of the modes that are equal but for the names of
    their labels wins may not hang on the order of a sum over rows.
    """
    finite = objective.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
    unit = (1e-9 if finite.dtype == torch.float64 else 1e-4) * (1.0 + objective.abs().nan_to_num(posinf=0.0).amax())
    return (finite / unit).round().argsort(descending=True, stable=True)


def _around(program: Program, given: Mapping[str, Tensor], values: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Given values, (restart, *site), each a little away from where it is, in place of those in ``values``."""
    moved = {}
    for name, value in given.items():
        moved[name] = _nearby(program.latents[name], value[torch.arange(count, device=value.device) % len(value)])
    return values | moved


def _nearby(site: Site, value: Tensor) -> Tensor:
    """Values a little away from others, (restart, *site); labels stay.

    A matrix L Lᵀ moves to that of (I + E) L, relatively: the entries of L have the scale of the data, and a step that has
    not leaves a wide matrix singular.
    """
    if not site.is_continuous:
        return value
    free = site.transform.inv(value)
    step = _TRIAL * torch.randn_like(free)
    if kind_of(site.support) != "positive definite":
        return site.transform(free + step)
    move = torch.linalg.cholesky(site.transform(step / math.sqrt(value.shape[-1])))
    factor = move @ torch.linalg.cholesky(value)
    return factor @ factor.mT


def _relative_change(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], points: Mapping[str, Points], like: Tensor
) -> Tensor:
    """Largest change of a value, relative to the largest value of its site, (restart,); weights have one restart.

    Or relative to its standard deviation, where that is larger: a mean of centred data is zero but for rounding.
    """
    changes = [torch.zeros_like(like)]
    for name, size in _sizes(before, points, like).items():
        moved = (after[name].detach() - before[name]).abs().reshape(len(like), -1).amax(-1)
        changes.append(moved / size)
    return torch.stack(changes).amax(0)


def _sizes(values: Mapping[str, Tensor], points: Mapping[str, Points], like: Tensor) -> dict[str, Tensor]:
    """What changes of values are small or large beside, site to (restart,): see ``_relative_change``."""
    sizes = {}
    for name, value in values.items():
        size = value.abs().reshape(len(like), -1).amax(-1)
        if name in points and points[name].spread.shape == value.shape:
            size = torch.maximum(size, points[name].spread.nan_to_num(0.0, 0.0).reshape(len(like), -1).amax(-1))
        sizes[name] = size.clamp(min=torch.finfo(value.dtype).tiny)
    return sizes
