"""What a program says of data, at given draws: pointwise log-likelihood, posterior and prior predictive draws."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference import traces
from inference.arrays import ragged
from inference.contract import Unsupported
from inference.density import Density
from inference.enumeration import Factor, eliminate, factors, place, plates_of
from inference.handlers import isolated, quiet, reproducible
from inference.program import Program
from inference.sites import Shape, is_statement, kin, kind_of

__all__ = ["Anew", "log_likelihood", "posterior_predictive", "prior_predictive"]

_CHUNK = 2**22  # table entries evaluated at once
_CERTIFIED = 4  # draws at which the sum over local sites is held against the joint


def _local(program: Program) -> tuple[str, ...]:
    """Finite sites that live in the plates of an observed site, and so belong to single observations."""
    observed = [set(place(program, name)) for name in program.observed_sites]
    local = []
    for name in program.finite:
        own = set(place(program, name))
        if own and any(own <= plates for plates in observed):
            local.append(name)
    return tuple(local)


def _components(found: list[Factor]) -> list[list[Factor]]:
    """Factors that share finite sites, directly or through others."""
    groups: list[tuple[set[str], list[Factor]]] = []
    for factor in found:
        variables, members = set(factor.variables), [factor]
        apart = []
        for other, theirs in groups:
            if other & variables:
                variables, members = variables | other, theirs + members
            else:
                apart.append((other, theirs))
        groups = [*apart, (variables, members)]
    return [members for _, members in groups]


def _total(program: Program, group: list[Factor], keep: tuple[str, ...]) -> Tensor:
    """Log-sum over the finite sites of a component, one term for each element of the plates ``keep``."""
    variables = {v for factor in group for v in factor.variables}
    left, _ = eliminate(group, plates_of(program, variables), frozenset(keep))
    total = torch.zeros((), dtype=program.dtype, device=program.device)
    for factor in left:
        order = [factor.dims.index(dim) for dim in keep if dim in factor.dims]
        table = factor.table.permute(order)
        for i, dim in enumerate(keep):
            if dim not in factor.dims:
                table = table.unsqueeze(i)
        total = total + table
    return total


def _pointwise(program: Program, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One draw: the log-likelihood of each observation, site to (*batch)."""
    local = _local(program)
    found = factors(program, {name: value for name, value in values.items() if name not in local}, local)
    terms = {}
    for group in _components(found):
        names = [factor.site for factor in group if factor.site in program.observed_sites]
        if not names:
            continue
        variables = {v for factor in group for v in factor.variables}
        if not variables:
            (factor,) = group
            terms[factor.site] = factor.table.reshape(program.batch_shapes[factor.site])
            continue
        shared = frozenset.intersection(*(frozenset(place(program, v)) for v in variables))
        keep = tuple(dim for dim in place(program, names[0]) if dim in shared)
        hidden = [factor for factor in group if factor.site not in program.observed_sites]
        term = _total(program, group, keep) - _total(program, hidden, keep)
        full = math.prod(program.batch_shapes[names[0]])
        terms["+".join(names)] = (
            term.reshape(program.batch_shapes[names[0]]) if len(names) == 1 and term.numel() == full else term
        )
    return terms


def log_likelihood(program: Program, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pointwise log-likelihood of the observed sites.

    Finite sites local to an observation's plate are summed out, with the weights that they have given all other sites;
    those others are at their draws. Observed sites that share a finite site have one term together, named "a+b". A
    ``pyro.factor`` is no observation.

    Where the structure of the program changes, all latent sites are at their draws: each draw is replayed in the structure
    that it has, and a term that it lacks is NaN.

    Args:
        program: The program.
        draws: Every latent site but the local finite ones to (chain, draw, *site).

    Returns:
        Observed site to (chain, draw, *batch), on the CPU.

    Raises:
        Unsupported: If the observations share finite sites in a way that leaves them no terms of their own.
    """
    for name, site in program.observed_sites.items():
        if site.is_unnormalised:
            raise Unsupported(f"'{name}' is {site.family}, whose log_prob lacks its constant: it has no log-likelihood.")
    if program.is_changing:
        return traces.log_likelihood(program, draws)
    local = _local(program)
    missing = [name for name in program.latents if name not in draws and name not in local]
    if missing:
        raise ValueError(f"The log-likelihood needs the draws of '{missing[0]}', which were not kept. keep= decides.")
    needed = {name: draws[name] for name in program.latents if name not in local}
    if not needed:
        raise Unsupported(f"{program.name} has no latent site outside the plates of its data.")
    chains, count = next(iter(needed.values())).shape[:2]
    choices = [program.latents[name].choices for name in local]
    width = max(len(c) for c in choices if c is not None) if choices else 1
    size = width * sum(value.numel() for value in program.observed.values())
    chunk = max(1, min(chains * count, _CHUNK // max(size, 1)))
    flat = {name: value.flatten(0, 1) for name, value in needed.items()}
    with reproducible(program.dtype, program.device), quiet():
        if local:
            few = {name: value[:_CERTIFIED].to(program.device) for name, value in flat.items()}
            with isolated(0, program.device):
                advice = "Its observations have no terms of their own, nor a leave-one-out."
                Density(program, rung="vmapped").certify(local, few, advice)
        staged = Density(program).stage("pointwise", lambda values: _pointwise(program, values), (True,))
        parts = []
        for begin in range(0, chains * count, chunk):
            rows = torch.arange(begin, begin + chunk).clamp(max=chains * count - 1)  # one shape, so one graph
            values = {name: value[rows].to(program.device) for name, value in flat.items()}
            used = min(chunk, chains * count - begin)
            parts.append({name: term[:used].cpu() for name, term in staged(values).items()})
    return {name: torch.cat([p[name] for p in parts]).unflatten(0, (chains, count)) for name in parts[0]}


class Anew(NamedTuple):
    """What a prediction draws.

    Attributes:
        plates: Names of the plates in which latent sites are drawn.
        latents: Names of other latent sites of the fitted program that do not keep their draws.
        observed: Names of the sites that are predicted.
    """

    plates: set[str]
    latents: set[str]
    observed: set[str]

    @classmethod
    def at(cls, program: Program, arguments: tuple[tuple[Any, ...], dict[str, Any]] | None, seed: int) -> Anew:
        """At new arguments, or at those that were fitted; see ``posterior_predictive``."""
        fitted, known = set(program.latents), set(program.observed_sites)
        if arguments is None:
            return cls(set(), set(), known)
        with isolated(seed, program.device), reproducible(program.dtype, program.device):
            traces = [program.trace({}, arguments=arguments, evaluated=False) for _ in range(program.looks)]
        shape = Shape.of(traces)
        sites = [*program.latents.values(), *program.observed_sites.values()]
        sizes = {plate.name: plate.size for site in sites for plate in site.plates if plate.name not in program._resized}
        plates = set(program.row_plates)
        plates |= {name for name, size in sizes.items() if name in shape.plates and size not in shape.plates[name]}
        if not plates and not program.knows_rows:
            plates = {plate.name for site in program.observed_sites.values() for plate in site.plates}
        kinds = {name: kind_of(node) for trace in traces for name, node in trace.nodes.items() if is_statement(node)}
        observed = {name for name, kind in kinds.items() if kind == "observed"} | kin(shape.latents, known)
        observed = known | (observed - fitted - kin(observed, fitted))
        changed = shape.latents - fitted - observed
        if program.is_changing:  # sites come and go by themselves, and are looked at one by one
            return cls(plates, {*program.row_loops, *kin(fitted, changed)}, observed)
        changed |= fitted - set(kinds)
        nodes = traces[0].nodes
        unfit = {
            name
            for name, site in program.latents.items()
            if kinds.get(name) == "observed" or (name in kinds and nodes[name]["value"].shape != site.shape)
        }
        return cls(plates, {*program.row_loops, *kin(fitted, changed), *unfit}, observed)


def posterior_predictive(
    program: Program,
    draws: Mapping[str, Tensor],
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Draws of the observed sites given each posterior draw.

    New arguments are new rows, not more of the fitted ones. Latent sites that belong to the fitted rows are drawn anew from
    their priors given the others, which keep their posterior draws. To the rows belong

        - sites in a plate over the rows (``Program.row_plates``), or in one that has another size now,
        - sites of a Python loop over the rows, such as z_0, z_1, …: those of which one row more, or the new arguments, make
          more or fewer, told by names that differ in one number (``Program.row_loops``),
        - sites that have another shape now.

    So a new series has states of its own, of any length; to go on with a fitted one, fit it with its end missing. Where a
    program does not run with one row more, a plate belongs to the rows if it has their number, even by chance, and a loop
    whose length does not change is taken for one over parameters. Where nothing tells the rows, such as where the first
    argument is no tensor and no plate changes its size, all latent sites in the plates of the data are drawn anew.

    At the fitted data, latent sites whose draws were not kept are drawn by the guide that was fitted.

    The sites predicted are the observed ones at the new arguments. Where these give data to a latent site, it keeps them.

    Args:
        program: The program that was fitted.
        draws: Site to (chain, draw, *site).
        args: New arguments of the program; none means those that were fitted.
        kwargs: New keyword arguments.
        seed: Seed of the draws.

    Returns:
        Observed site to (chain, draw, *observation), on the CPU.

    Raises:
        ValueError: If draws that were not kept are needed, and there is no guide.
    """
    arguments = program.cast(args, kwargs or {}) if args or kwargs else None
    anew = Anew.at(program, arguments, seed)
    if program.is_changing:
        return traces.predictive(program, draws, arguments, anew, seed)
    kept = [
        name
        for name, site in program.latents.items()
        if name in draws and name not in anew.latents and not anew.plates & {plate.name for plate in site.plates}
    ]
    left_out = [] if arguments is not None else [name for name in program.latents if name not in draws]
    fitted = program.fitted
    if left_out and fitted is None:
        raise ValueError(
            f"At the fitted data a prediction needs the draws of '{left_out[0]}', which were not kept. keep= decides."
        )
    chains, count = next(iter(draws.values())).shape[:2] if draws else (1, 1)  # where nothing is hidden, or kept
    rows = []
    with isolated(seed, program.device), reproducible(program.dtype, program.device), torch.no_grad():
        for c in range(chains):
            for i in range(count):
                values = {name: draws[name][c, i].to(program.device) for name in kept}
                if left_out and fitted is not None:  # the guide draws what was too large to be kept
                    guided = fitted.trace(program, values).nodes
                    values |= {name: guided[name]["value"] for name in left_out if name in guided}
                nodes = program.trace(values, arguments=arguments, resampled=anew.observed).nodes
                rows.append({name: nodes[name]["value"].detach().cpu() for name in nodes if name in anew.observed})
    return {name: torch.stack([row[name] for row in rows]).unflatten(0, (chains, count)) for name in rows[0]}


def prior_predictive(program: Program, draws: int, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws of the latent and of the observed sites before any data, each (1, draw, *site).

    Raises:
        Unsupported: If a prior is improper, or known without its constant.
    """
    for name, site in program.latents.items():
        if site.flaw:
            raise Unsupported(f"'{name}' has a prior that is {site.flaw}, from which nothing can be drawn.")
    rows = []
    with isolated(seed, program.device), reproducible(program.dtype, program.device):
        for _ in range(draws):
            trace = program.trace({}, resampled=tuple(program.observed_sites))
            rows.append({name: node["value"].detach().cpu() for name, node in trace.nodes.items() if is_statement(node)})
    drawn = {name: values.unsqueeze(0) for name, values in ragged(rows).items()}
    latent, observed = (
        {name: drawn[name] for name in names if name in drawn} for names in (program.latents, program.observed_sites)
    )
    return latent, observed
