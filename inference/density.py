"""The densities of a program over a leading chain axis: joint, finite sites summed out, unconstrained, with gradients.

Each is a function of one chain that ``inference.staging`` runs for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, vmap

from inference.contract import Unsupported
from inference.enumeration import draw_back, eliminate, factors, indices, log_normalizer, plates_of
from inference.program import Program
from inference.staging import Random, Staged

__all__ = ["Density", "Slope", "Unconstrained"]

_ROWS = "has rows"  # a key among those of functions, which are no plain words


class Unconstrained:
    """Coordinates: the values of some continuous sites as one vector of unconstrained numbers.

    Args:
        program: The program.
        sites: Names of the sites, in the order of the vector.
    """

    def __init__(self, program: Program, sites: Collection[str]) -> None:
        self.sites = tuple(sites)
        self.transforms = {name: program.latents[name].transform for name in self.sites}
        self.shapes = {name: self.transforms[name].inverse_shape(program.latents[name].shape) for name in self.sites}
        self.sizes = [self.shapes[name].numel() for name in self.sites]
        self.size = sum(self.sizes)

    def values(self, position: Tensor) -> dict[str, Tensor]:
        """(…, size) -> site to constrained value (…, *site)."""
        parts = position.split(self.sizes, -1)
        lead = position.shape[:-1]
        return {
            name: self.transforms[name](part.reshape(lead + self.shapes[name]))
            for name, part in zip(self.sites, parts, strict=True)
        }

    def position(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site to constrained value (chain, *site) -> (chain, size)."""
        parts = [self.transforms[name].inv(values[name]) for name in self.sites]
        return torch.cat([part.reshape(part.shape[0], -1) for part in parts], -1)

    def log_jacobian(self, position: Tensor) -> Tensor:
        """log |d values / d position| at a vector (size,); a scalar."""
        total = position.new_zeros(())
        for name, part in zip(self.sites, position.split(self.sizes, -1), strict=True):
            unconstrained = part.reshape(self.shapes[name])
            transform = self.transforms[name]
            total = total + transform.log_abs_det_jacobian(unconstrained, transform(unconstrained)).sum()
        return total


class Slope:
    """A log-density over positions, all else given: (chain, size) -> (gradient, value), or the gradient alone.

    Args:
        staged: Takes positions and other values, returns the gradient (chain, size) and the value (chain,).
        others: The other values, for a number of chains.
    """

    def __init__(self, staged: Staged, others: Callable[[int], Mapping[str, Tensor]]) -> None:
        self.staged, self.others = staged, others

    def __call__(self, position: Tensor) -> Any:
        return self.staged(position, self.others(len(position)))

    def gradient(self, position: Tensor) -> Tensor:
        """The gradient where the value is not wanted, (chain, size)."""
        found: Tensor = self.staged.first(position, self.others(len(position)))
        return found


class Density:
    """The densities of a program over a leading chain axis.

    Args:
        program: The program.
        evaluations: How many evaluations the run's configuration asks for; decides the rung.
        rung: The highest rung allowed; None reads ``PYRO_GENMODELS_RUNG``.
    """

    def __init__(self, program: Program, evaluations: int = 0, rung: str | None = None) -> None:
        self.program, self.evaluations, self.limit = program, evaluations, rung
        self.functions: dict[Hashable, Staged] = {}
        self.said: set[str] = set()
        self._past: dict[str, Any] = {}
        self._coordinates: dict[tuple[str, ...], Unconstrained] = {}

    def coordinates(self, sites: Collection[str]) -> Unconstrained:
        """The unconstrained coordinates of some continuous sites, in this order."""
        key = tuple(sites)
        if key not in self._coordinates:
            self._coordinates[key] = Unconstrained(self.program, key)
        return self._coordinates[key]

    @property
    def calls(self) -> dict[str, Any]:
        """How often every function was called, and on which rung it is: what json can hold."""
        now: dict[str, Any] = {repr(key): staged.calls for key, staged in self.functions.items()}
        return self._past | now | {_ROWS: self.program.has_rows}

    def recall(self, calls: Mapping[str, Any]) -> None:
        """Goes on as the density whose ``calls`` these are would."""
        self._past = {key: known for key, known in calls.items() if key != _ROWS}
        self.program.has_rows = calls.get(_ROWS, self.program.has_rows)
        for key, staged in self.functions.items():
            staged.recall(self._past.get(repr(key), {}))

    def stage(
        self,
        key: Hashable,
        function: Callable[..., Any],
        batched: tuple[bool, ...],
        evaluations: int | None = None,
        steady: tuple[bool, ...] = (),
    ) -> Staged:
        """``function`` for all chains; the same ``key`` gives the same staged function again.

        ``evaluations`` is how many calls are asked for here, where they are fewer than the run makes in all. For ``steady``
        see ``Staged``.
        """

        def made(**rest: Any) -> Staged:
            return Staged(function, batched, steady=steady, has_rows=lambda: self.program.has_rows, **rest)

        return self._kept(key, made, evaluations)

    def random(self, key: Hashable, function: Callable[..., Any], steady: tuple[bool, ...] = ()) -> Staged:
        """``function`` of all chains, that draws random numbers; the same ``key`` gives the same again."""
        return self._kept(key, lambda **rest: Random(function, self.program.device, steady=steady, **rest), None)

    def _kept(self, key: Hashable, make: Callable[..., Staged], evaluations: int | None) -> Staged:
        """The staged function of this key, made if there is none; see ``stage``."""
        if key not in self.functions:
            program = self.program
            self.functions[key] = make(name=program.name, rung=self.limit, is_long=program.is_long, said=self.said)
            self.functions[key].recall(self._past.get(repr(key), {}))
        staged = self.functions[key]
        staged.evaluations = max(staged.evaluations, self.evaluations if evaluations is None else evaluations)
        return staged

    @cached_property
    def joint(self) -> Staged:
        """Values of all latent sites, site to (chain, *site) -> log p(values, data), (chain,)."""
        return self.stage("joint", lambda values: self.program.log_joint(values), (True,))

    @cached_property
    def deterministics(self) -> Staged:
        """Values of all latent sites -> values of the ``pyro.deterministic`` statements, (chain, *site)."""
        return self.stage("deterministics", lambda values: self.program.deterministics(values), (True,))

    def marginal(self, enumerated: Collection[str]) -> Staged:
        """Values of the other latent sites -> log p with the finite sites ``enumerated`` summed out, (chain,)."""
        sites = tuple(enumerated)
        return self.stage(("marginal", sites), lambda values: log_normalizer(self.program, values, sites), (True,))

    def unconstrained(
        self,
        coordinates: Unconstrained,
        enumerated: Collection[str] = (),
        gradient: bool = True,
        evaluations: int | None = None,
    ) -> Staged:
        """(position (chain, size), other values) -> log-density of the position, or (gradient, log-density)."""
        sites = tuple(enumerated)

        def log_density(position: Tensor, others: Mapping[str, Tensor]) -> Tensor:
            values = {**others, **coordinates.values(position)}
            return log_normalizer(self.program, values, sites) + coordinates.log_jacobian(position)

        key = ("unconstrained", coordinates.sites, sites, gradient)

        def with_gradient(position: Tensor, others: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            # a closure: what is an argument of grad_and_value is wrapped, and a wrapped integer cannot be an index
            return grad_and_value(lambda p: log_density(p, others))(position)

        function = with_gradient if gradient else log_density
        return self.stage(key, function, (True, True), evaluations, steady=(False, True))

    def slopes(self, sites: Collection[str], enumerated: Collection[str]) -> Staged:
        """(values of ``sites``) -> (gradient, log p) with ``enumerated`` summed out; all on the constrained scale."""
        finite = tuple(enumerated)

        def slopes(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            return grad_and_value(lambda v: log_normalizer(self.program, v, finite))(values)

        return self.stage(("slopes", tuple(sites), finite), slopes, (True,))

    def gradients(self, site: str) -> Staged:
        """(points (chain, point, *site), values) -> gradient of the log-joint in ``site`` at each point, same shape."""

        def at_points(points: Tensor, values: Mapping[str, Tensor]) -> Tensor:
            def log_joint(value: Tensor) -> Tensor:
                return self.program.log_joint({**values, site: value})

            return vmap(grad(log_joint))(points)

        return self.stage(("gradients", site), at_points, (True, True))

    def draw(self, sites: Collection[str], evaluations: int | None = None) -> Staged:
        """(values of the other sites, ``uniforms`` of the sites) -> exact joint draw of finite ``sites``, log q."""
        names = tuple(sites)

        def drawn(values: Mapping[str, Tensor], uniforms: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            return self._drawn(values, uniforms, names)[:2]

        return self.stage(("draw", names), drawn, (True, True), evaluations)

    def certify(
        self, sites: Collection[str], values: Mapping[str, Tensor], advice: str, evaluations: int | None = None
    ) -> Tensor:
        """Holds the identity log Z = log p(z, rest) − log q(z | rest) of an enumeration at one draw for every chain.

        And at the first and the last of all values: a wrong sum may be right at the values that it draws by itself.

        Args:
            sites: The finite sites that are summed out.
            values: Values of all latent sites, (chain, *site); those of ``sites`` are not looked at.
            advice: What to do instead, a sentence.
            evaluations: As for ``draw``.

        Returns:
            The largest error, ().

        Raises:
            Unsupported: If it fails: elements of a plate are coupled in a way that enumeration does not see.
        """
        others = {name: value for name, value in values.items() if name not in sites}
        chains = len(next(iter(values.values())))
        if not others:  # nothing that a chain axis could come from
            return torch.zeros((), dtype=self.program.dtype, device=self.program.device)
        uniforms, errors, joints = self.uniforms(sites, chains), [], []
        for levels in (uniforms, torch.zeros_like(uniforms), torch.ones_like(uniforms)):
            at_once = self.program.at_once(chains)
            for first in range(0, chains, at_once):
                some = {name: value[first : first + at_once] for name, value in others.items()}
                drawn, log_q = self.draw(sites, evaluations)(some, levels[first : first + at_once])
                joints.append(self.joint({**some, **drawn}))
                errors.append((joints[-1] - log_q - self.marginal(sites)(some)).abs())
        joint, error = torch.cat(joints), torch.cat(errors)
        error = torch.where(joint.isfinite(), error, 0.0)
        precision = 1e-10 if self.program.dtype == torch.float64 else 1e-4
        if bool((error > precision * (100.0 + joint.abs())).any()):
            raise Unsupported(
                f"Summing out {', '.join(sites)} does not give the marginal of the program (log-density off by "
                f"{float(error.max()):.1e}): elements of a plate are coupled. {advice}"
            )
        return error.amax()

    def redraw(self, sites: Collection[str], is_blind: bool = False) -> Staged:
        """As ``draw``, with the values of ``sites`` among the values; -> draw, its log q, log q of the present values.

        If it ``is_blind``, the draw alone.
        """
        names = tuple(sites)

        def redrawn(values: Mapping[str, Tensor], uniforms: Tensor) -> Any:
            drawn, log_q, records = self._drawn(values, uniforms, names)
            if is_blind:
                return drawn

            def present(sites: tuple[str, ...], logits: Tensor, positions: Tensor | None = None) -> Tensor:
                if positions is not None:
                    joint = torch.zeros_like(positions)
                    for site in sites:
                        choices = self.program.latents[site].choices
                        assert choices is not None
                        joint = joint * len(choices) + values[site].long()[positions]
                    return joint
                found = [indices(self.program, site, values[site]).reshape(logits.shape[1:-1]) for site in sites]
                return torch.stack(found)

            return drawn, log_q, draw_back(self.program, records, present)[1]

        return self.stage(("blind redraw" if is_blind else "redraw", names), redrawn, (True, True))

    def _drawn(
        self, values: Mapping[str, Tensor], uniforms: Tensor, sites: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], Tensor, Any]:
        others = {name: value for name, value in values.items() if name not in sites}
        found = factors(self.program, others, sites)
        _, records = eliminate(found, plates_of(self.program, sites))

        latents, first, offsets = self.program.latents, 0, {}
        for site in sites:
            offsets[site] = first
            first += latents[site].batch_shape.numel()

        def pick(sites: tuple[str, ...], logits: Tensor, positions: Tensor | None = None) -> Tensor:
            cumulative = logits.exp().cumsum(-1)
            if positions is not None:
                level = uniforms[offsets[sites[0]] + positions]
            else:
                own = torch.arange(logits.shape[1:-1].numel(), device=logits.device)
                where = torch.tensor([offsets[site] for site in sites], device=logits.device)[:, None] + own
                level = uniforms[where].reshape(logits.shape[:-1])
            level = level.unsqueeze(-1) * cumulative[..., -1:]
            return (cumulative < level).sum(-1)

        picked, log_q = draw_back(self.program, records, pick)
        drawn = {}
        for site in sites:
            choices = latents[site].choices
            assert choices is not None
            zeros = torch.zeros(latents[site].batch_shape, dtype=torch.long, device=choices.device)
            index = picked.get(site, zeros)
            drawn[site] = index.to(choices.dtype) if latents[site].is_indexed else choices[index]
        return drawn, log_q, records

    def uniforms(self, sites: Collection[str], chains: int) -> Tensor:
        """Fresh uniforms for ``draw`` and ``redraw``, one for each element of the sites; (chain, element)."""
        count = sum(self.program.latents[site].batch_shape.numel() for site in sites)
        return torch.rand(chains, count, device=self.program.device, dtype=self.program.dtype)
