"""What several draws of a guide weigh, element by element of the plates in which all that the guide draws is independent.

A weight p(x, z) / q(z) of all rows together has a variance that grows with their number. Where rows are independent given
what they share, each has a weight of its own, and a bound of its own. The draws are made at once, in a plate outside the
guide's; what is drawn once for all rows is drawn once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from inference.bounds import Particles
from inference.contract import Unsupported
from inference.enumeration import Factor, eliminate, plates_of, run
from inference.guides import PARTICLES, Guide, is_drawn, mapped
from inference.handlers import isolated
from inference.program import Program
from inference.sites import is_statement

__all__ = ["Draws", "Ways", "Weigher"]

_log = logging.getLogger("inference")

Node = Mapping[str, Any]


class Draws(NamedTuple):
    """Particles of a guide.

    Attributes:
        particles: How many.
        traces: Its runs: one of all particles, or one of each.
        values: Latent site to (particle, *site), or (*site) where the elements share it.
    """

    particles: int
    traces: list[poutine.Trace]
    values: dict[str, Tensor]

    @property
    def is_wide(self) -> bool:
        """Whether one run has all particles, side by side."""
        return len(self.traces) < self.particles


class Ways(NamedTuple):
    """A tensor on the way from the guide's weights to what its draws weigh.

    Attributes:
        tensor: The tensor.
        event_dim: How many of its last dimensions belong to one event.
        particle: The particle whose it is; None if its first dimension are all.
        frames: Plate to dimension.
    """

    tensor: Tensor
    event_dim: int
    particle: int | None
    frames: Mapping[str, int]

    def spread(self, loadings: Tensor, plates: Sequence[str]) -> Tensor:
        """Numbers (particle, *element) in a shape that multiplies the tensor."""
        shape = [1] * self.tensor.dim()
        for plate in plates:
            place = self.tensor.dim() - self.event_dim + self.frames[plate]
            shape[place] = self.tensor.shape[place]
        if self.particle is not None:
            return loadings[self.particle].reshape(shape)
        shape[0] = len(loadings)
        return loadings.reshape(shape)


class _Terms(NamedTuple):
    """Terms of a log-density: those of every element, and what belongs to none."""

    elements: Tensor
    shared: Tensor


class _Model(NamedTuple):
    """Terms of the program, and log p of single numbers of latent sites."""

    joint: _Terms
    prior: _Terms
    numbers: dict[str, Tensor]


class Weigher:
    """Draws particles of a guide and weighs them.

    Args:
        guide: The guide.
        program: The program.
        trace: A run of the guide with the data ``program.glimpse``.

    Attributes:
        plates: Names of the plates of the elements, outermost first; () if only all of it together has a weight.
        frames: Statement of the guide to its plates and their dimensions.
        local: Statements of the guide that belong to elements.
        enumerated: Finite sites that the guide lacks, which are summed out.
    """

    def __init__(self, guide: Guide, program: Program, trace: poutine.Trace) -> None:
        self.guide, self.program = guide, program
        self.enumerated = tuple(name for name in program.finite if name not in trace.nodes)
        self._nodes = {name: node for name, node in trace.nodes.items() if is_statement(node)}
        self._nesting = max((len(node["fn"].batch_shape) for node in self._nodes.values()), default=0)
        frames = {name: _frames(node) for name, node in self._nodes.items()}
        drawn = {name for name, node in self._nodes.items() if is_drawn(node)}
        rows = set(program.row_plates)
        local = {name for name in frames if rows & frames[name].keys()}
        local = local if local & drawn else set(frames)
        self.plates = self._common([frames[name] for name in local & drawn], list(frames.values()))
        self.local = tuple(name for name in frames if name in local or not self.plates)
        self.frames = frames
        self._is_scaled = self._has_one_scale()  # found out now, and not while a graph is recorded

    def _common(self, local: list[dict[str, int]], guided: list[dict[str, int]]) -> tuple[str, ...]:
        """The plates that all local sites share, and all statements that are in any of these."""
        program = self.program
        statements = [frames for name, frames in program.frames.items() if name not in program.deterministic]
        dims = {name: dim for frames in statements for name, dim in frames.items()}
        common = set.intersection(*map(set, local)) & dims.keys() if local else set[str]()
        while True:
            smaller = common.intersection(*(f.keys() for f in (*statements, *guided) if common & f.keys()))
            if smaller == common:
                return tuple(sorted(common, key=lambda name: dims[name]))
            common = smaller

    @property
    def has_rows(self) -> bool:
        """Whether rows are elements."""
        return bool({*self.plates} & {*self.program.row_plates})

    @property
    def has_scores(self) -> bool:
        """Whether the guide draws anything that is not reparameterised."""
        return any(is_drawn(node) and not node["fn"].has_rsample for node in self._nodes.values())

    # ------------------------------------------------------------------------------------------------ drawing
    def draw(self, count: int, data: list[Tensor] | None, scale: float = 1.0) -> Draws:
        """Draws ``count`` particles.

        Args:
            count: How many.
            data: The tensors of a batch; None takes all.
            scale: Rows in all by rows in the batch.
        """
        shared, scale = self._shared(data), self._inner(scale)
        if count > 1 and self.is_wide:
            return self._draws(self._wide(count, shared, data, scale), count)
        return self._draws([self.guide.trace(self.program, shared, data, scale) for _ in range(count)], count)

    def _inner(self, scale: float) -> float:
        """What rows count inside an element."""
        return 1.0 if self.has_rows else scale

    def _wide(
        self, count: int, shared: Mapping[str, Tensor], data: list[Tensor] | None, scale: float = 1.0
    ) -> list[poutine.Trace]:
        return [self.guide.trace(self.program, shared, data, scale, particles=(count, self._nesting))]

    def _shared(self, data: list[Tensor] | None) -> dict[str, Tensor]:
        """One draw of what the elements share."""
        names = [name for name, node in self._nodes.items() if is_drawn(node) and name not in self.local]
        if not names:
            return {}
        trace = self.guide.trace(self.program, data=data)
        return {name: trace.nodes[name]["value"] for name in names}

    def _draws(self, traces: list[poutine.Trace], count: int) -> Draws:
        found = {}
        for name, site in self.program.latents.items():
            if name not in self._nodes:
                continue
            values = [trace.nodes[name]["value"] for trace in traces]
            if name not in self.local:
                found[name] = values[0].reshape(-1, *site.shape)[0]
            elif len(traces) < count:
                batch = values[0].shape[: values[0].dim() - site.event_dim][1:]
                own = batch[len(batch) - len(site.batch_shape) :]
                found[name] = values[0].reshape(count, *own, *values[0].shape[values[0].dim() - site.event_dim :])
            else:
                found[name] = torch.stack(values)
        return Draws(count, traces, found)

    @cached_property
    def is_wide(self) -> bool:
        """Whether the guide makes many draws in one run: held against runs of one, at the same values."""
        count, data = 3, self.program.glimpse
        try:
            with isolated(0, self.program.device), torch.no_grad():
                shared = self._shared(data)
                (trace,) = traces = self._wide(count, shared, data)
                terms, _ = self._guided(traces, count)
                self._draws(traces, count)
                for i in range(count):
                    names = [name for name in self.local if is_drawn(self._nodes[name])]
                    sites = {name: _one(trace.nodes[name]["value"], i, self._nodes[name]["value"]) for name in names}
                    alone, _ = self._guided([self.guide.trace(self.program, shared | sites, data)], 1)
                    size = float(alone.elements.abs().max())
                    if not torch.allclose(terms.elements[i], alone.elements[0], rtol=1e-4, atol=1e-4 * size):
                        raise RuntimeError("its draws are not independent of one another")
            return True
        except Exception as error:  # whatever a guide does that takes its draws for one
            _log.info("The guide of %s makes one draw at a time (%s).", self.program.name, error)
            return False

    # ------------------------------------------------------------------------------------------------ weighing
    def weigh(
        self, draws: Draws, data: list[Tensor] | None, scale: float, path: bool, is_floored: bool = False
    ) -> tuple[Particles, list[Ways]]:
        """What draws weigh.

        Args:
            draws: The draws.
            data: The tensors of a batch; None takes all.
            scale: Rows in all by rows in the batch.
            path: Whether log q is taken with frozen weights, but for sites that are not reparameterised.
            is_floored: Whether the divergences of single numbers are wanted.

        Returns:
            The weights, and the tensors through which the guide's weights move them by the path of its draws.
        """
        values, traces, ways = draws.values, draws.traces, list[Ways]()
        _, score = self._guided(traces, draws.particles)
        if path:
            values, traces, ways = self._parted(draws, data, self._inner(scale))
        log_q, _ = self._guided(traces, draws.particles)
        model = self._weighed(values, data, draws.particles, is_floored, self._inner(scale))
        counts = self._counts(draws)
        parts = None
        if is_floored:
            numbers = [self._numbers(traces, name, draws) - model.numbers[name] for name in model.numbers]
            parts = torch.cat(numbers, -1) / counts.unsqueeze(-1)
        own = model.joint.elements.new_tensor(scale if self.has_rows else 1.0)
        return Particles(
            joint=model.joint.elements / counts,
            log_q=log_q.elements / counts,
            score=None if score is None else score.elements / counts,
            shared_joint=model.joint.shared[0],
            shared_log_q=log_q.shared,
            shared_score=None if score is None else score.shared,
            scale=own * counts,
            prior=model.prior.elements / counts,
            shared_prior=model.prior.shared[0],
            parts=parts,
        ), ways

    def _parted(
        self, draws: Draws, data: list[Tensor] | None, scale: float
    ) -> tuple[dict[str, Tensor], list[poutine.Trace], list[Ways]]:
        """The draws cut off from the runs that made them, so that their paths can be told: values, frozen runs and ways."""
        ways: list[Ways] = []
        frozen, parted = [], []
        for i, trace in enumerate(draws.traces):
            particle = None if draws.is_wide or draws.particles == 1 else i
            drawn = {}
            for name, node in self._nodes.items():
                if not is_drawn(node):
                    continue
                value = drawn[name] = trace.nodes[name]["value"].view_as(trace.nodes[name]["value"])
                if name in self.local and value.requires_grad:
                    ways.append(Ways(value, node["fn"].event_dim, particle, self.frames[name]))
            wide = (draws.particles, self._nesting) if draws.is_wide else None
            frozen.append(self.guide.trace(self.program, drawn, data, scale, is_frozen=True, particles=wide))
            parted.append(drawn)
        values = {}
        own = self._draws(frozen, draws.particles).values
        for name, value in draws.values.items():
            if is_drawn(self._nodes[name]):
                values[name] = own[name]
            else:  # an automatic guide computes it from what it draws
                values[name] = value.view_as(value)
                if name in self.local and value.requires_grad:
                    ways.append(Ways(values[name], self.program.latents[name].event_dim, None, self.frames[name]))
        return values, frozen, ways

    def _guided(self, traces: list[poutine.Trace], count: int) -> tuple[_Terms, _Terms | None]:
        """log q of runs of the guide, and that of its sites that are not reparameterised, if there are any."""
        is_wide = len(traces) < count
        zero = torch.zeros((), dtype=self.program.dtype, device=self.program.device)
        log_q = score = _Terms(zero, zero)
        for name, known in self._nodes.items():
            if name in self.local:
                terms = [self._reduced(trace.nodes[name], name, is_wide) for trace in traces]
                add = _Terms(terms[0] if is_wide else torch.stack(terms), zero)
            else:
                term = traces[0].nodes[name]["log_prob"]
                add = _Terms(zero, (term[0] if is_wide and term.dim() > self._nesting else term).sum())
            log_q = _Terms(*map(torch.add, log_q, add))
            if is_drawn(known) and not known["fn"].has_rsample:
                score = _Terms(*map(torch.add, score, add))
        return log_q, score if self.has_scores else None

    def _reduced(self, node: Node, name: str, is_wide: bool) -> Tensor:
        """log q of one site, ((particle), *element)."""
        term = node["log_prob"]
        if is_wide and term.dim() <= self._nesting:  # the same for all particles
            return self._reduced(node, name, False).unsqueeze(0)
        dims = [self.frames[name][plate] for plate in self.plates] + ([-1 - self._nesting] if is_wide else [])
        kept = {term.dim() + dim for dim in dims}
        summed = [dim for dim in range(term.dim()) if dim not in kept]
        return term.sum(summed) if summed else term

    def _counts(self, draws: Draws) -> Tensor:
        """How much an element counts in the program and the guide alike, () or (*element)."""
        node, one = draws.traces[0].nodes, torch.ones((), dtype=self.program.dtype, device=self.program.device)
        if not self._is_scaled:
            return one
        name = next(name for name in self.local if is_drawn(self._nodes[name]))
        scale = torch.as_tensor(node[name]["scale"], dtype=one.dtype, device=one.device)
        if scale.dim() == 0:
            return scale
        kept = [scale.dim() + self.frames[name][plate] for plate in self.plates]
        return scale[tuple(slice(None) if dim in kept else 0 for dim in range(scale.dim()))]

    def _has_one_scale(self) -> bool:
        """Whether one scale stands before all that an element consists of, so that it belongs before the bound."""
        with isolated(0, self.program.device), torch.no_grad():
            draws = self.draw(1, self.program.glimpse)
            values = {name: value[0] if name in self.local else value for name, value in draws.values.items()}
            _, nodes = run(self.program, values, self.enumerated, self.program.glimpse)
        inside = {*self.plates}
        model = [node for node in nodes.values() if is_statement(node) and inside & _frames(node).keys()]
        guide = [draws.traces[0].nodes[n] for n in self.local if is_drawn(self._nodes[n])]
        scales = [torch.as_tensor(node["scale"]) for node in (*guide, *model)] if inside else []
        return bool(scales) and all(s.shape == scales[0].shape and bool((s == scales[0]).all()) for s in scales)

    # ----------------------------------------------------------------------------------------------- the program
    def _weighed(
        self,
        values: Mapping[str, Tensor],
        data: list[Tensor] | None,
        count: int,
        is_floored: bool = False,
        scale: float = 1.0,
    ) -> _Model:
        """Terms of the program at draws, each with a particle axis."""
        shared = {name: value for name, value in values.items() if name not in self.local}
        local = {name: value for name, value in values.items() if name in self.local}

        def terms(own: Mapping[str, Tensor]) -> _Model:
            return self._model({**shared, **own}, data, is_floored, scale)

        if count > 1 and local:
            return mapped(terms, local)
        one = terms({name: value[0] for name, value in local.items()})
        several = lambda pair: _Terms(*(part.expand(count, *part.shape) for part in pair))  # noqa: E731
        return _Model(several(one.joint), several(one.prior), {n: v.expand(count, *v.shape) for n, v in one.numbers.items()})

    def _model(self, values: Mapping[str, Tensor], data: list[Tensor] | None, is_floored: bool, scale: float) -> _Model:
        found, nodes = run(self.program, values, self.enumerated, data)
        scales = dict.fromkeys(self.program.row_plates, scale) if scale != 1.0 else {}
        prior = self._summed([factor for factor in found if factor.site in self.program.latents], scales)
        if self.enumerated:
            joint = self._summed(found, scales)
        else:
            rest = self._summed([factor for factor in found if factor.site not in self.program.latents], scales)
            joint = _Terms(prior.elements + rest.elements, prior.shared + rest.shared)
        numbers = {n: self._by_number(nodes[n], n) for n in self._floored} if is_floored else {}
        return _Model(joint, prior, numbers)

    def _summed(self, found: list[Factor], scales: Mapping[str, float]) -> _Terms:
        """Factors multiplied and summed over finite sites, by elements."""
        zero = torch.zeros((), dtype=self.program.dtype, device=self.program.device)
        variables = {variable for factor in found for variable in factor.variables}
        known = plates_of(self.program, variables & {*self.enumerated})
        left, _ = eliminate(found, known, frozenset(self.plates), scales=scales)
        elements, shared = zero, zero
        for factor in left:
            if not factor.dims:
                shared = shared + factor.table
            else:
                elements = elements + factor.table.permute([factor.dims.index(plate) for plate in self.plates])
        return _Terms(elements, shared) if self.plates else _Terms(shared, zero)

    # ------------------------------------------------------------------------------------------------ free bits
    @cached_property
    def _floored(self) -> tuple[str, ...]:
        return tuple(name for name in self.local if name in self.program.latents and is_drawn(self._nodes[name]))

    def _by_number(self, node: Node, name: str, is_wide: bool = False) -> Tensor:
        """Log-probabilities of the numbers of an event where these are independent, ((particle), *element, number)."""
        fn, value = node["fn"], node["value"]
        if type(fn).__name__ == "Independent" and fn.event_dim == fn.reinterpreted_batch_ndims:
            table = fn.base_dist.log_prob(value)
            table = table.flatten(table.dim() - fn.event_dim).unsqueeze(-1).flatten(-2)
        else:
            table = fn.log_prob(value).unsqueeze(-1)
        dims = [self.frames[name][plate] - 1 for plate in self.plates] + ([-2 - self._nesting] if is_wide else []) + [-1]
        kept = {table.dim() + dim for dim in dims}
        summed = [dim for dim in range(table.dim()) if dim not in kept]
        table = table.sum(summed) if summed else table
        return table * node["scale"]

    def _numbers(self, traces: list[poutine.Trace], name: str, draws: Draws) -> Tensor:
        found = [self._by_number(trace.nodes[name], name, draws.is_wide) for trace in traces]
        return found[0] if draws.is_wide else torch.stack(found)

    def check_floor(self) -> None:
        """Refuses free bits where the divergence has no numbers that they could be counted on."""
        if not self.plates:
            raise Unsupported("free_bits= needs latent sites in a plate, such as one over rows, for an average over it.")
        with isolated(0, self.program.device), torch.no_grad():
            draws = self.draw(1, self.program.glimpse)
            numbers = self._weighed(draws.values, self.program.glimpse, 1, True).numbers
            for name, value in numbers.items():
                depends = self.program.dependence.get(name, frozenset()) & {*self.enumerated}
                if depends or value.shape != self._numbers(draws.traces, name, draws).shape:
                    why = f"follows '{min(depends)}', which is summed out" if depends else "has other numbers in the guide"
                    raise Unsupported(f"free_bits= cannot be counted on '{name}', which {why}. Leave free_bits out.")

    # ---------------------------------------------------------------------------------------------- certificate
    def couples(self) -> str | None:
        """What makes elements depend on one another's draws, in words; None if nothing does.

        Draws of two particles are mixed, every other element from the other one: what an element weighs must be what it
        weighs in the particle that it is from, and what belongs to no element must not have moved.
        """
        if not self.plates:
            return None
        data = self.program.glimpse
        with isolated(0, self.program.device), torch.no_grad():
            draws = self.draw(2, data)
            if not any(name in self.local for name in draws.values):
                return None
            model = self._weighed(draws.values, data, 2)
            plate = self.plates[-1]
            mixed = {}
            for name, value in draws.values.items():
                if name not in self.local:
                    mixed[name] = value
                    continue
                place = value.dim() - self.program.latents[name].event_dim + self.frames[name][plate]
                odd = (torch.arange(value.shape[place], device=value.device) % 2).bool()
                shape = [1] * (value.dim() - 1)
                shape[place - 1] = len(odd)
                mixed[name] = torch.where(odd.reshape(shape), value[1], value[0])[None]
            both = self._weighed(mixed, data, 1)
            odd = (torch.arange(model.joint.elements.shape[-1], device=self.program.device) % 2).bool()
            wanted = torch.where(odd, model.joint.elements[1], model.joint.elements[0])
            tolerance = 1e-3 if wanted.dtype == torch.float32 else 1e-8
            size = tolerance * float(wanted.abs().max())
            if not torch.allclose(both.joint.elements[0], wanted, rtol=tolerance, atol=size):
                return f"what the program says of an element of '{plate}' depends on the latent values of others"
            shared = torch.stack([*model.joint.shared, both.joint.shared[0]])
            if not torch.allclose(shared, shared[:1].expand_as(shared), rtol=tolerance, atol=size):
                return f"a statement outside the plate '{plate}' depends on latent values inside"
        return None


def _frames(node: Node) -> dict[str, int]:
    return {f.name: f.dim for f in node["cond_indep_stack"] if f.vectorized and f.name != PARTICLES}


def _one(value: Tensor, particle: int, like: Tensor) -> Tensor:
    """The value of one particle, in the shape that a run of one has."""
    return value[particle].reshape(like.shape)
