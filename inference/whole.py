"""What all rows of a program have, of which only a part has shown the structure."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from inference.handlers import isolated, reproducible
from inference.screening import check_data, check_finite, check_support
from inference.sites import is_constant, largest, latent_values

if TYPE_CHECKING:
    from inference.program import Program

__all__ = ["is_alike", "leaves_observed", "widen"]

_LARGEST = 2**30  # bytes of observed values that are kept beside the arguments


def is_alike(program: Program) -> bool:
    """Takes sizes and values from all rows, a part of which has shown the structure; whether theirs is the same."""

    def told() -> list[Any]:
        kinds = [(s.name, s.family, s.event_dim, s.dtype, s.choices is None) for s in program.sites]
        return [*kinds, *program.frames.items(), program.augmented]

    before, plates = told(), program.row_plates
    free = [name for name, site in program.latents.items() if site.choices is None]
    with isolated(0, program.device), reproducible(program.dtype, program.device):
        trace = _trace_alike(program)
        program.take_down(largest([trace]), [trace])
        for name in set(free) & program.latents.keys():
            program.latents[name] = replace(program.latents[name], choices=None)
        sizes = {plate.name: plate.size for site in program.sites for plate in site.plates}
        is_same = (
            before == told()
            and len(plates) > 0
            and all(sizes.get(plate) == program.rows for plate in plates)
            and not any(site.is_linked for site in program.latents.values())
        )
        if is_same:
            check_data(program, [trace], program.observed, is_fitting=True)
            program.leaf_of = leaves_observed(program, [trace])
            values = latent_values(trace, program.latents)
            del trace  # which may hold a parameter of each row
            check_finite(program, [values])
    return is_same


def widen(program: Program, part: int) -> None:
    """Makes of what a part of the rows has shown what all rows have, and checks the data of all."""
    plates, rows = set(program.row_plates), program.rows
    assert rows is not None
    if not plates:
        return  # for the back-end to refuse

    for sites in (program.latents, program.observed_sites):
        for name, site in sites.items():
            known = tuple(replace(p, size=rows) if p.name in plates else p for p in site.plates)
            sites[name] = replace(site, shape=_widened(program, site.shape, name, site.event_dim), plates=known)
    program.batch_shapes = {name: _widened(program, shape, name, 0) for name, shape in program.batch_shapes.items()}
    for name, shape in program.deterministic.items():
        if plates & program.frames[name].keys():
            program.deterministic[name] = torch.Size(rows if size == part else size for size in shape)
    _see_all(program, part, [name for name in program.observed_sites if plates & program.frames[name].keys()])


def leaves_observed(program: Program, traces: list[poutine.Trace]) -> dict[str, int]:
    """Observed sites whose values are an argument as it came, to its place, where nothing but those can be amiss.

    What is amiss in other rows can then be seen without running the program on them: there is no mask, and the support
    is the same for all rows and all latent values.
    """
    found = {}
    for name in program.observed_sites:
        nodes = [trace.nodes[name] for trace in traces if name in trace.nodes]
        places = [i for i, leaf in enumerate(program.data) if all(node["value"] is leaf for node in nodes)]
        is_plain = all(node["mask"] is None and is_constant(node["fn"].support) for node in nodes)
        if places and is_plain and len(nodes) == len(traces):
            found[name] = places[0]
    return found


def _trace_alike(program: Program) -> poutine.Trace:
    """A run on all rows in which these hide the same, so that what they look up is not held for each of them."""
    alike = {}
    for name, site in program.latents.items():
        if site.choices is not None and any(plate in program.row_plates for plate in program.frames[name]):
            alike[name] = site.choices[0].expand(_widened(program, site.shape, name, site.event_dim))
    try:
        return program.trace(alike, evaluated=False)
    except Exception:  # whatever a program raises that needs memory of each row
        return program.trace({}, evaluated=False)


def _widened(program: Program, shape: torch.Size, name: str, behind: int) -> torch.Size:
    """What a shape of a site is for all rows, if a part of them has this; ``behind``: dimensions that no plate has."""
    sizes = [*shape]
    for plate, dim in program.frames[name].items():
        if plate in program.row_plates and len(sizes) - behind + dim >= 0:
            assert program.rows is not None
            sizes[len(sizes) - behind + dim] = program.rows
    return torch.Size(sizes)


def _see_all(program: Program, part: int, names: list[str]) -> None:
    """Goes through all rows: checks the data of the sites ``names``, and keeps them if they are not too large."""
    assert program.rows is not None
    sizes = {name: program.observed[name].numel() * program.observed[name].element_size() for name in names}
    is_kept = sum(sizes.values()) * program.rows <= _LARGEST * part
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    with isolated(0, program.device), reproducible(program.dtype, program.device), torch.no_grad():
        for first, data in program.parts():
            if data is not None and program.leaf_of.keys() == program.observed.keys() == set(names):
                seen = {name: data[place] for name, place in program.leaf_of.items()}
                for name, value in seen.items():
                    check_support(program, name, value, program.observed_sites[name].support.check(value), None, first)
            else:
                trace = program.trace({}, data=data, evaluated=False)
                seen = {name: trace.nodes[name]["value"].detach() for name in program.observed if name in trace.nodes}
                check_data(program, [trace], seen, first)
            for name in names if is_kept else ():
                found[name].append(seen[name])
    program.observed = {name: value for name, value in program.observed.items() if name not in names}
    if is_kept:
        program.observed |= {name: _joined(program, name, found[name]) for name in names}


def _joined(program: Program, name: str, parts: list[Tensor]) -> Tensor:
    """Values of a site of the rows, from those of parts of them; rows of an argument are not copied."""
    shape = program.observed_sites[name].shape
    for whole in program.transformed or program.data:
        if whole.shape == shape and whole.dtype == parts[0].dtype:
            cut = whole.split([len(part) for part in parts]) if sum(map(len, parts)) == len(whole) else ()
            if cut and all(torch.equal(*pair) for pair in zip(cut, parts, strict=True)):
                return whole
    site = program.observed_sites[name]
    dims = [dim - site.event_dim for plate, dim in program.frames[name].items() if plate in program.row_plates]
    return torch.cat(parts, dims[0])
