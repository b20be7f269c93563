"""Where chains start: dispersed like the prior, but where the density is finite and not absurdly small."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value

from inference.contract import Started, Unsupported
from inference.density import Density, Unconstrained
from inference.distributed import cut
from inference.enumeration import log_normalizer
from inference.posterior import Posterior
from inference.program import Program
from inference.simulation import simulate

__all__ = ["ASCENT", "ascended", "dispersed_values", "given_values", "starting_values", "suggested_values"]

_CANDIDATES = 256  # draws looked at in all,
_LEAST, _MOST = 4, 64  # and for each chain,
_MANY = 4096  # or as many as this, if the density is finite at none
_NUMBERS = 2**24  # of all data, times the draws that are looked at together
_POOL = 1024  # different ones in all, where replicated data make for very many chains
ASCENT, _LONGEST_ASCENT = 40, 400  # steps of about 0.05 prior standard deviations each


def given_values(program: Program, start: Any, chains: int) -> dict[str, Tensor]:
    """What the caller says of the start, as site to (chain, *site).

    Args:
        program: The program.
        start: None, a mapping from site to constrained value with or without a chain axis, or a Posterior (whose last
            draws are taken, repeated if it has fewer chains).
        chains: Number of chains.

    Raises:
        ValueError: If a site is unknown, or a value has the wrong shape or lies outside the support.

    Sites that the program computes, which a point of a Posterior has as well, follow from the others and are passed over.
    """
    if start is None:
        return {}
    if not isinstance(start, Mapping) and not isinstance(start, Posterior):
        raise TypeError(f"start= must map sites to values, or be a Posterior, but it is {type(start).__name__}.")
    if not isinstance(start, Mapping):
        last = {name: draws[:, -1] for name, draws in start.draws.items() if name in program.latents}
        start = {name: value[torch.arange(chains) % len(value)] for name, value in last.items()}
    values = {}
    for name, value in start.items():
        site = program.latents.get(name)
        if site is None and name in program.deterministic:
            continue
        if site is None:
            raise ValueError(f"start= names '{name}', but {program.name} has the latent sites {', '.join(program.latents)}.")
        try:
            value = torch.as_tensor(value, device=program.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"start= gives '{name}' the value {value!r}, but it must be a number or a tensor.") from None
        value = value.to(program.dtype if site.dtype.is_floating_point else site.dtype)
        if value.shape == site.shape:
            value = value.expand(chains, *site.shape)
        if value.shape != (chains, *site.shape):
            raise ValueError(
                f"start= gives '{name}' the shape {tuple(value.shape)}, but it must be {tuple(site.shape)}, or "
                f"{(chains, *site.shape)} with a chain axis."
            )
        inside = bool(site.support.check(value).all())
        if inside and site.is_continuous:
            inside = bool(site.transform.inv(value).isfinite().all())  # the edge is not inside
        if not inside:
            raise ValueError(f"start= gives '{name}' a value outside its support {site.support}, or at its edge.")
        values[name] = value.clone()
    return values


def suggested_values(program: Program, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model itself says of the start, as site to (chain, *site): for each chain the best of a few suggestions.

    Args:
        program: The program.
        values: Values of all latent sites, (chain, *site), for those that the model says nothing of.

    Returns:
        Empty if it says nothing at all.
    """
    if not isinstance(program.owner, Started):
        return {}
    (args, kwargs), chains = program.arguments(), len(next(iter(values.values())))
    calls = [program.owner.start(*args, **kwargs) for _ in range(chains * _LEAST)]
    found = {name: torch.stack([call[name] for call in calls]) for name in calls[0] if name in program.latents}
    found = given_values(program, found, len(calls))
    free = [name for name in program.finite if name not in found]
    at = {name: value.repeat_interleave(_LEAST, 0) for name, value in values.items()} | found
    log_density = _log_density(program, at, free, False).nan_to_num(nan=-torch.inf).reshape(chains, _LEAST)
    rows = torch.arange(chains, device=program.device) * _LEAST + log_density.argmax(1)
    return {name: value[rows] for name, value in found.items()}


def dispersed_values(program: Program, chains: int, start: Any = None) -> dict[str, Tensor]:
    """Where the chains of a sampler start, (chain, *site): each on its own, from what the model suggests if it does.

    Suggestions that are the same for all chains are not taken: chains that start together show no disagreement. Finite
    sites that are neither given nor suggested are drawn from their conditional, so that they suit what is.

    Args:
        program: The program.
        chains: Number of chains.
        start: As ``given_values`` takes it; the model is then not asked.
    """
    values = starting_values(program, chains, start)
    if start is not None or program.chain_data(chains):
        return values
    suggested = suggested_values(program, values)
    if all(torch.equal(value, value[:1].expand_as(value)) for value in suggested.values()):
        return values
    values |= suggested
    free = [name for name in program.finite if name not in suggested]
    if free:
        with contextlib.suppress(Unsupported):  # what cannot be summed out is left as it is
            others = {name: value for name, value in values.items() if name not in free}
            density = Density(program, rung="vmapped")
            values |= density.draw(free)(others, density.uniforms(free, chains))[0]
    return values


def _candidates(program: Program, count: int) -> dict[str, Tensor]:
    """Half from the prior, half uniform on (-2, 2) after unconstraining, all drawn at once; (count, *site)."""
    at_once = program.at_once(count)
    sizes = [min(at_once, count - first) for first in range(0, count, at_once)]
    parts = [simulate(program, {}, size, with_data=False) for size in sizes]
    draws = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    is_uniform = torch.arange(count, device=program.device) % 2 > 0
    for name in program.continuous:
        site = program.latents[name]
        shape = (count, *site.transform.inverse_shape(site.shape))
        uniform = site.transform(torch.empty(shape, device=program.device).uniform_(-2.0, 2.0))
        draws[name] = torch.where(is_uniform.reshape(-1, *(1,) * len(site.shape)), uniform, draws[name])
    return {name: draws[name] for name in program.latents}


class _Split(Density):
    """The densities of a program whose rows are split over processes, all of which ask for the same values together."""

    def __init__(self, program: Program, rung: str | None = None) -> None:
        super().__init__(program, rung=rung)
        self.index = program.processes.share(torch.arange(program.rows or 0, device=program.device))
        self.scales = dict.fromkeys(program.row_plates, float(program.processes.size))

    def _log_joint(self, values: Mapping[str, Tensor], sites: tuple[str, ...]) -> Tensor:
        """That whose mean over processes is the log-joint, ``sites`` summed out."""
        own = cut(self.program, values, self.index)
        return log_normalizer(self.program, own, sites, self.program.shard, self.scales)

    def marginal(self, enumerated: Collection[str]) -> Callable[..., Any]:  # type: ignore[override]
        sites = tuple(enumerated)
        staged = self.stage(("marginal", sites), lambda values: self._log_joint(values, sites), (True,))
        return lambda values: self.program.processes.mean(staged(values))

    def unconstrained(self, coordinates: Unconstrained, enumerated: Collection[str] = (), *_: Any) -> Callable[..., Any]:  # type: ignore[override]
        """(position (chain, size), other values) -> gradient and log-density of the position."""
        sites = tuple(enumerated)

        def slope(position: Tensor, others: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            def log_density(at: Tensor) -> Tensor:
                values = {**others, **coordinates.values(at)}
                return self._log_joint(values, sites) + coordinates.log_jacobian(at)

            return grad_and_value(log_density)(position)

        staged = self.stage(("unconstrained", coordinates.sites, sites), slope, (True, True), _LONGEST_ASCENT)
        return lambda *inputs: tuple(self.program.processes.mean(part) for part in staged(*inputs))


def starting_values(
    program: Program, chains: int, start: Any = None, most: int = _MOST, is_split: bool = False
) -> dict[str, Tensor]:
    """Values of all latent sites, (chain, *site): for each chain the best of a few candidates, given sites as given.

    Args:
        program: The program.
        chains: Number of chains.
        start: As ``given_values`` takes it.
        most: Candidates for each chain, at most.
        is_split: Whether the processes of the program make these values together, each for its own rows.

    Raises:
        ValueError: If the log-density is not finite at any candidate.
    """
    given = given_values(program, start, chains)
    if len(given) == len(program.latents):
        return given
    share = 1 if program.surrogates else min(max(_LEAST, _CANDIDATES // chains), most)  # of which none is the best
    values, log_density = _looked_at(program, given, chains, share, is_split)
    if not bool((log_density > -torch.inf).any()) and share * chains < _MANY:  # a support that few draws hold
        share = _MANY // chains
        values, log_density = _looked_at(program, given, chains, share, is_split)
    best = log_density.argmax(1)
    lost = log_density.amax(1) == -torch.inf
    if bool(lost.all()):
        raise ValueError(
            f"{program.name} has no finite log-density at any of {chains * share} starting points. Check that the data lie "
            "in the support of their distributions, or give start=."
        )
    best = torch.where(lost, log_density.flatten().argmax() % share, best)
    rows = torch.arange(chains, device=best.device) * share + best
    rows = torch.where(lost, log_density.flatten().argmax(), rows)
    return {name: value[rows].clone() for name, value in values.items()}


def _looked_at(
    program: Program, given: Mapping[str, Tensor], chains: int, share: int, is_split: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Candidates, those of a chain side by side, and their log-densities (chain, share), −∞ where they have none."""
    data = program.chain_data(chains * share)
    if data:
        rows = torch.arange(chains * share, device=program.device) % _POOL
        values = {name: value[rows] for name, value in _candidates(program, _POOL).items()}
    else:
        values = _candidates(program, chains * share)
    values |= {name: value.repeat_interleave(share, 0) for name, value in given.items()}
    free = [name for name in program.finite if name not in given]
    log_density = _log_density(program, {**values, **data}, free, is_split)
    return values, log_density.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf).reshape(chains, share)


def _log_density(program: Program, values: Mapping[str, Tensor], free: Collection[str], is_split: bool) -> Tensor:
    """Log-densities at (chain, *site), the finite sites ``free`` summed out where they can be; few at once of large data."""
    is_split = is_split and program.shard is not None
    density = _Split(program, rung="vmapped") if is_split else Density(program, rung="vmapped")
    parts = [values]
    count = len(next(iter(values.values())))
    at_once = min(program.at_once(count), max(1, _NUMBERS // max((leaf.numel() for leaf in program.data), default=1)))
    if at_once < count:
        split = {name: value.split(at_once) for name, value in values.items()}
        parts = [dict(zip(split, part, strict=True)) for part in zip(*split.values(), strict=True)]
    others = [{name: value for name, value in part.items() if name not in free} for part in parts]
    if others[0]:
        with contextlib.suppress(Unsupported):
            return torch.cat([density.marginal(free)(part) for part in others])
    return torch.cat([density.joint(part) for part in parts])


def ascended(
    program: Program, values: Mapping[str, Tensor], longest: int = _LONGEST_ASCENT, is_split: bool = False
) -> dict[str, Tensor]:
    """Values moved up the marginal log-density, so that no chain starts in a tail that it cannot leave.

    Adam, every chain on its own, in coordinates scaled by the prior's standard deviations. All chains take forty steps (two
    standard deviations at most: towards the mass, not down a funnel); those that are then lower than the best of them go on
    until they are as high as it was.

    Args:
        program: The program.
        values: Values of all latent sites, (chain, *site).
        longest: Steps of the last chains, at most.
        is_split: Whether the processes of the program do this together, each for its own rows.
    """
    if not program.continuous:
        return dict(values)
    coordinates = Unconstrained(program, program.continuous)
    if is_split and program.shard is not None:
        staged = _Split(program).unconstrained(coordinates, program.finite)
    else:
        staged = program.density.unconstrained(coordinates, program.finite, evaluations=longest)
    scale = coordinates.position(_candidates(program, 32)).std(0).clamp(min=1e-6)
    others = {name: v for name, v in values.items() if name not in (*program.continuous, *program.finite)}
    others |= program.chain_data(len(next(iter(values.values()))))
    start = position = coordinates.position(values)
    first, second = torch.zeros_like(position), torch.zeros_like(position)
    gradient, before = staged(position, others)
    log_density, enough = before, torch.full_like(before, torch.inf)
    for i in range(1, longest + 1):
        climbs = (log_density < enough) | log_density.isnan()
        if not bool(climbs.any()):
            break
        gradient = (gradient * scale).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient.square()
        step = (first / (1 - 0.9**i)) / ((second / (1 - 0.95**i)).sqrt() + 1e-12)
        position = torch.where(climbs.unsqueeze(-1), position + 0.05 * scale * step, position)
        gradient, log_density = staged(position, others)
        if i == ASCENT:
            reached = log_density.nan_to_num(nan=-torch.inf, neginf=-torch.inf).unflatten(0, (program.groups, -1))
            enough = reached.amax(1, keepdim=True).expand_as(reached).flatten()
    position = torch.where((log_density > before).unsqueeze(-1), position, start)
    return {**values, **coordinates.values(position)}
