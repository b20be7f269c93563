"""Finite discrete sites, summed out and drawn back exactly: variable elimination over plated factors, in log space.

The log-joint of a program whose finite sites run over all their values at once is a sum of factors; each has plate
dimensions and enumerated dimensions. Elimination (``eliminate``) takes the deepest plates first, sums out what is local
to them, multiplies over the plate and goes on with the rest. Reading its records backwards (``draw_back``) gives an exact
joint draw, or the most probable values, and its log-probability q, so that

    log Z = log p(z, rest) − log q(z | rest)

holds for every z: that identity is the certificate of an enumeration.

References:
    F. Obermeyer et al., Tensor variable elimination for plated factor graphs (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from inference.contract import Unsupported
from inference.program import Program

__all__ = ["Factor", "draw_back", "eliminate", "factors", "indices", "log_normalizer", "place"]

WIDEST = 2**20  # entries of one table, per chain; 8 MiB in float64


class Factor(NamedTuple):
    """A table of log-values. ``dims`` names the dimensions of ``table``; ``plates`` are those it belongs to."""

    table: Tensor
    dims: tuple[str, ...]
    plates: frozenset[str]
    site: str = ""

    @property
    def variables(self) -> tuple[str, ...]:
        return tuple(dim for dim in self.dims if dim not in self.plates)


class Record(NamedTuple):
    """What is needed to draw ``variable`` back: its log-weights given all that was eliminated later."""

    variable: str
    table: Tensor
    dims: tuple[str, ...]


def place(program: Program, site: str) -> tuple[str, ...]:
    """Names of the batch dimensions of a site, outermost first: its plates, and an anonymous name for other extents."""
    shape, plates = program.batch_shapes[site], {}
    nodes = program.latents | program.observed_sites
    if site in nodes:
        plates = {plate.dim: plate.name for plate in nodes[site].plates}
    names = []
    for dim in range(-len(shape), 0):
        if dim in plates:
            names.append(plates[dim])
        elif shape[dim] > 1:
            names.append(f"dimension {dim}")
    return tuple(names)


def factors(
    program: Program, values: Mapping[str, Tensor], enumerated: Collection[str], data: list[Tensor] | None = None
) -> list[Factor]:
    """The program's log-joint as plated factors, with the sites ``enumerated`` over all their values.

    Raises:
        Unsupported: If a site depends on an enumerated site of a plate that it is not in.
    """
    try:
        trace = program.trace(values, data=data, enumerated=enumerated)
    except (IndexError, RuntimeError) as error:
        if any(mark in str(error) for mark in ("item()", "control flow", "randomness", "data pointer", "numpy")):
            raise
        raise Unsupported(
            f"{program.name} indexes a plate of a finite site while it is enumerated: the elements of that plate are "
            "coupled. Use one site for each element, or pyro.ops.indexing.Vindex."
        ) from error
    nodes = {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and name in program.batch_shapes and name not in program.deterministic
    }
    variables = {
        node["infer"]["_dim_to_id"][node["infer"]["_enumerate_dim"]]: name
        for name, node in nodes.items()
        if "_enumerate_dim" in node["infer"]
    }
    found = []
    for name, node in nodes.items():
        table, batch = node["log_prob"], program.batch_shapes[name]
        plates = {frame.dim: frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
        dims, shape = [], []
        for dim in range(-table.dim(), 0):
            size = table.shape[dim]
            if dim < -program.nesting:
                if size == 1:
                    continue
                dims.append(variables[node["infer"]["_dim_to_id"][dim]])
            elif dim in plates:
                dims.append(plates[dim])
            elif size == 1:
                continue
            elif len(batch) >= -dim and batch[dim] == size:
                dims.append(f"dimension {dim}")
            else:
                raise Unsupported(
                    f"Site '{name}' depends on a finite site inside a plate of size {size} that it is not in itself, so "
                    "that the elements of the plate are coupled. Update that site one element at a time, or put "
                    f"'{name}' into the plate."
                )
            shape.append(size)
        own = frozenset(dims) - set(variables.values())
        found.append(Factor(table.reshape(shape), tuple(dims), own, name))
    return found


def _aligned(group: Collection[Factor], dims: tuple[str, ...]) -> Tensor:
    """Sum of tables over the union of their dimensions, in the order of ``dims``."""
    total = None
    for factor in group:
        order = sorted(range(len(factor.dims)), key=lambda i: dims.index(factor.dims[i]))
        table = factor.table.permute(order)
        present = [factor.dims[i] for i in order]
        for i, dim in enumerate(dims):
            if dim not in present:
                table = table.unsqueeze(i)
        total = table if total is None else total + table
    assert total is not None
    return total


def _logsumexp(table: Tensor, dim: int) -> Tensor:
    top = table.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    return (table - top).exp().sum(dim).log() + top.squeeze(dim)


def _check_width(dims: tuple[str, ...], group: Collection[Factor], widest: int) -> None:
    sizes = {dim: size for factor in group for dim, size in zip(factor.dims, factor.table.shape, strict=True)}
    width = math.prod(sizes[dim] for dim in dims)
    if width > widest:
        raise Unsupported(
            f"Summing out {', '.join(dims)} jointly needs a table of {width:,} entries (at most {widest:,}). "
            "Update these sites one at a time."
        )


def eliminate(
    found: list[Factor],
    plates_of: Mapping[str, frozenset[str]],
    keep: frozenset[str] = frozenset(),
    maximise: bool = False,
    scales: Mapping[str, float] | None = None,
) -> tuple[list[Factor], list[Record]]:
    """Sums (or maximises) all variables out of a product of plated factors.

    Args:
        found: The factors.
        plates_of: Variable to the plates that it lives in.
        keep: Plates that are not multiplied over; each result has a subset of them as its dimensions.
        maximise: Whether to take the maximum over variables instead of the sum.
        scales: Plate to a factor for the product over it, for plates of which only a sample of rows is seen.

    Returns:
        The factors that are left, without variables, and the records for ``draw_back``, in order of elimination.

    Raises:
        Unsupported: If variables of different plates are coupled, or a table would be too large.
    """
    done, pending, records = [], list(found), []
    while pending:
        leaf = max((factor.plates for factor in pending), key=lambda plates: (len(plates), sorted(plates)))
        group = [factor for factor in pending if factor.plates == leaf]
        pending = [factor for factor in pending if factor.plates != leaf]
        local = {v for factor in group for v in factor.variables if plates_of[v] == leaf}
        for factor in pending:
            outside = local & set(factor.variables)
            if outside:
                raise Unsupported(
                    f"Site '{factor.site}' depends on '{min(outside)}', which lives in plates {sorted(leaf)} that the "
                    "first is not in: the elements of those plates are coupled."
                )
        while local:
            # the variable whose neighbours make the smallest table goes first
            neighbours = {
                v: dict.fromkeys(dim for factor in group if v in factor.dims for dim in factor.dims) for v in local
            }
            variable = min(local, key=lambda v: (len(neighbours[v]), v))
            local.remove(variable)
            involved = [factor for factor in group if variable in factor.dims]
            group = [factor for factor in group if variable not in factor.dims]
            dims = (*sorted(d for d in neighbours[variable] if d != variable), variable)
            _check_width(dims, involved, max(WIDEST, *(4 * factor.table.numel() for factor in involved)))
            table = _aligned(involved, dims)
            records.append(Record(variable, table, dims))
            table = table.amax(-1) if maximise else _logsumexp(table, -1)
            group.append(Factor(table, dims[:-1], leaf, involved[0].site))
        for factor in group:
            target = frozenset().union(*(plates_of[v] for v in factor.variables)) | (leaf & keep)
            if factor.variables and not target < leaf:
                raise Unsupported(
                    f"Finite sites {', '.join(sorted(factor.variables))} are coupled across the plates {sorted(leaf)}, so "
                    "that they cannot be summed out jointly. Update one of them at a time."
                )
            reduced = [i for i, dim in enumerate(factor.dims) if dim in leaf and dim not in target]
            table = factor.table.sum(reduced) if reduced else factor.table
            for i in reduced:
                table = table * (scales or {}).get(factor.dims[i], 1.0)
            left = Factor(table, tuple(d for i, d in enumerate(factor.dims) if i not in reduced), target, factor.site)
            if left.variables or target - keep:
                pending.append(left)
            else:
                done.append(left)
    return done, records


def plates_of(program: Program, sites: Collection[str]) -> dict[str, frozenset[str]]:
    """The plates (and other batch dimensions) in which each finite site lives."""
    return {site: frozenset(place(program, site)) for site in sites}


def log_normalizer(
    program: Program,
    values: Mapping[str, Tensor],
    enumerated: Collection[str],
    data: list[Tensor] | None = None,
    scales: Mapping[str, float] | None = None,
) -> Tensor:
    """log Σ p(z, values, data) over all values z of the sites ``enumerated``; a scalar. For the rest see ``eliminate``."""
    if not enumerated and not scales:
        return program.log_joint(values, data)
    left, _ = eliminate(factors(program, values, enumerated, data), plates_of(program, enumerated), scales=scales)
    return torch.stack([factor.table for factor in left]).sum()


def indices(program: Program, site: str, value: Tensor) -> Tensor:
    """Which of the choices of a finite site each of its values is; shape: its batch shape."""
    known = program.latents[site]
    assert known.choices is not None
    if known.is_indexed:
        return value.long()
    matches = value.unsqueeze(-1 - known.event_dim) == known.choices
    matches = matches.reshape(*matches.shape[: matches.dim() - known.event_dim], -1).all(-1)
    return matches.to(torch.uint8).argmax(-1)


def draw_back(
    program: Program,
    records: list[Record],
    pick: Callable[[str, Tensor], Tensor],
) -> tuple[dict[str, Tensor], Tensor]:
    """Fixes the eliminated variables in reverse order.

    Args:
        program: The program.
        records: What ``eliminate`` returned.
        pick: Takes a site and its log-probabilities (*batch without gaps, K) and returns indices (*batch without gaps).

    Returns:
        Site to index (of its batch shape) and log q, the sum of the log-probabilities of what was picked.
    """
    picked: dict[str, tuple[Tensor, tuple[str, ...]]] = {}
    log_q: Tensor | float = 0.0
    for variable, table, dims in reversed(records):
        for other in [dim for dim in dims if dim in picked]:
            index, index_dims = picked[other]
            axis = dims.index(other)
            rest = dims[:axis] + dims[axis + 1 :]
            aligned = _aligned([Factor(index, index_dims, frozenset())], rest)
            table = torch.take_along_dim(
                table, aligned.expand(table.shape[:axis] + table.shape[axis + 1 :]).unsqueeze(axis), axis
            ).squeeze(axis)
            dims = rest
        order = place(program, variable)
        logits = table.permute([*(dims.index(dim) for dim in order), dims.index(variable)]).log_softmax(-1)
        index = pick(variable, logits)
        log_q = log_q + logits.gather(-1, index.unsqueeze(-1)).sum()
        picked[variable] = index, order
    shaped = {v: index.reshape(program.batch_shapes[v]) for v, (index, _) in picked.items()}
    return shaped, torch.as_tensor(log_q, dtype=program.dtype)
