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
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from inference.contract import Unsupported
from inference.dependence import lanes, lifetimes
from inference.program import Program
from inference.rows import Rows, log_sum, weighted
from inference.sequences import Passage, drawn_back, passage

__all__ = [
    "Factor",
    "Pick",
    "Record",
    "Walk",
    "draw_back",
    "eliminate",
    "factors",
    "indices",
    "log_normalizer",
    "place",
    "plates_of",
    "run",
    "total",
]

WIDEST = 2**20  # entries of one table, per chain; 8 MiB in float64
_SMALL = 4096  # entries of a table up to which sites with two neighbours are eliminated together

_LINK = "link"  # stands for a plate: from each state of a sequence to the next


class Pick(Protocol):
    """How to choose."""

    def __call__(self, sites: tuple[str, ...], logits: Tensor, positions: Tensor | None = None) -> Tensor:
        """Chooses values of finite sites.

        Args:
            sites: Sites of one batch shape; or, with positions, sequences of states that are chosen jointly.
            logits: Their log-probabilities (site, *batch without gaps, K), or (position, K), of joint states.
            positions: Elements of sequences, (position,).

        Returns:
            Indices, (site, *batch) or (position,).
        """


Part = Tensor | tuple[Tensor, Tensor]


class Factor(NamedTuple):
    """A table of log-values, or one row of a stack of tables of one shape.

    ``dims`` names the dimensions of ``table``; ``plates`` are those of them that it is multiplied over. ``rows`` is what a
    table of many rows is a product of, with the dimensions ``full``, of which ``kept`` are the table's and the others of
    size 1; the table of a lazy factor is not formed yet. ``node`` is the statement of an ``Augmented`` distribution.
    """

    source: Tensor
    dims: tuple[str, ...]
    plates: frozenset[str]
    site: str = ""
    row: int | None = None
    rows: Rows | None = None
    full: torch.Size = torch.Size()
    kept: tuple[int, ...] = ()
    is_lazy: bool = False
    node: Mapping[str, Any] | None = None

    @property
    def table(self) -> Tensor:
        """The log-values; those of a lazy factor are formed here."""
        if self.is_lazy:
            assert self.rows is not None
            return self.rows.table.reshape(self.shape)
        return self.source if self.row is None else self.source[self.row]

    @property
    def shape(self) -> torch.Size:
        """That of the table, which is not formed."""
        if self.is_lazy:
            return torch.Size([self.full[dim] for dim in self.kept])
        return self.source.shape if self.row is None else self.source.shape[1:]

    @property
    def variables(self) -> tuple[str, ...]:
        """The dimensions that are summed over, not multiplied."""
        return tuple(dim for dim in self.dims if dim not in self.plates)

    def with_table(self, table: Tensor) -> Factor:
        """The same factor with other log-values."""
        return self._replace(source=table, row=None, rows=None, is_lazy=False)

    @property
    def part(self) -> Part:
        """What the log-joint is linear in: the table, or the natural parameters and constants of a lazy one."""
        if not self.is_lazy:
            return self.table
        assert self.rows is not None
        return self.rows.natural, self.rows.constant

    def with_part(self, part: Part) -> Factor:
        """The same factor with another table, or other natural parameters of its rows."""
        if isinstance(part, Tensor):
            return self.with_table(part)
        assert self.rows is not None
        return self._replace(rows=self.rows._replace(natural=part[0], constant=part[1]))

    def dot(self, weights: Part) -> Tensor:
        """Sum of the table, weighted by a table of its shape or by derivatives in its part. A scalar.

        What has no weight may be infinite.
        """
        if self.rows is not None:
            return self.rows.total(weights.reshape(self.full) if isinstance(weights, Tensor) else weights)
        assert isinstance(weights, Tensor)
        return weighted(weights, self.table) if self.variables else (weights * self.table).sum()

    def summary(self, weights: Part) -> Any:
        """What an ``Augmented`` statement expects of what it hides, its table weighted."""
        assert self.node is not None and isinstance(weights, Tensor)
        scale, mask = self.node["scale"], self.node["mask"]
        counts = weights.reshape(self.full) * scale
        counts = counts if mask is None else torch.where(torch.as_tensor(mask, device=counts.device), counts, 0.0)
        return self.node["fn"].summary(self.node["value"], counts)

    def expected(self, summary: Any) -> Tensor:
        """The weighted sum of the table with what is hidden filled in, by a summary from other parameters; a scalar."""
        assert self.node is not None
        found: Tensor = self.node["fn"].expected_log_prob(self.node["value"], summary)
        return found


def _stack(group: Sequence[Factor]) -> Tensor:
    """Tables of one shape and order of dimensions, (factor, *shape)."""
    source, rows = group[0].source, [factor.row for factor in group]
    if rows[0] is None or any(factor.source is not source for factor in group):
        return torch.stack([factor.table for factor in group])
    picked = [row for row in rows if row is not None]
    return source if picked == list(range(len(source))) else source[torch.tensor(picked, device=source.device)]


class Walk(NamedTuple):
    """What is needed to draw sequences of states back, coupled element by element: the passage of their joint states."""

    sites: tuple[str, ...]
    sizes: tuple[int, ...]
    passage: Passage
    batch: tuple[str, ...]


class Record(NamedTuple):
    """What is needed to draw ``sites`` back, all at once: their log-weights given their neighbours.

    ``table`` is (site, *batch, *neighbour, K); ``batch`` names the batch dimensions, ``neighbours`` the sites, row by row.
    """

    sites: tuple[str, ...]
    table: Tensor
    batch: tuple[str, ...]
    neighbours: tuple[tuple[str, ...], ...]


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


def _spread(program: Program, lane: Mapping[str, int]) -> dict[str, Tensor]:
    """Every finite site in ``lane`` with all its values at once, in a dimension left of all plates."""
    spread = {}
    for site, number in lane.items():
        choices = program.latents[site].choices
        assert choices is not None
        spread[site] = choices.reshape(len(choices), *(1,) * (program.nesting + number), *choices.shape[1:])
        if program.latents[site].is_linked:  # as long as it is, for who takes it apart
            spread[site] = spread[site].expand(*spread[site].shape[:-1], program.latents[site].shape[-1])
    return spread


def factors(
    program: Program,
    values: Mapping[str, Tensor],
    enumerated: Collection[str],
    data: list[Tensor] | None = None,
    is_lazy: bool = False,
) -> list[Factor]:
    """The program's log-joint as plated factors, with the sites ``enumerated`` over all their values.

    Args:
        program: The program.
        values: Values of the other sites.
        enumerated: Names of finite sites.
        data: Tensors in place of those among the program's arguments.
        is_lazy: Whether the tables of many rows are not formed before they are needed, which ``draw_back`` cannot have.

    Raises:
        Unsupported: If a site depends on an enumerated site of a plate that it is not in.
    """
    return run(program, values, enumerated, data, is_lazy)[0]


def run(
    program: Program,
    values: Mapping[str, Tensor],
    enumerated: Collection[str],
    data: list[Tensor] | None = None,
    is_lazy: bool = False,
) -> tuple[list[Factor], Mapping[str, Mapping[str, Any]]]:
    """``factors``, and the statements of Pyro's trace that they are of."""
    lives = lifetimes(program.dependence, enumerated)
    lane = lanes(lives)
    try:
        nodes, stacks = program.log_probs({**values, **_spread(program, lane)}, data, is_wide=True)
    except (IndexError, RuntimeError) as error:
        if any(mark in str(error) for mark in ("item()", "control flow", "randomness", "data pointer", "numpy")):
            raise
        raise Unsupported(
            f"{program.name} indexes a plate of a finite site while it is enumerated: the elements of that plate are "
            "coupled. Use one site for each element, or pyro.ops.indexing.Vindex."
        ) from error
    statements = list(program.dependence)
    alive: dict[str, dict[int, str]] = {name: {} for name in statements}  # statement -> dimension -> site
    for site, (first, last) in lives.items():
        for name in statements[first : last + 1]:
            alive[name][-1 - program.nesting - lane[site]] = site
    found = []
    for stack in stacks:
        names, rows, shape, sources = stack.names, stack.rows, stack.shape[1:], {}
        is_left = rows is not None and is_lazy
        table = rows.constant if rows is not None and is_lazy else stack.table
        for row, name in enumerate(names):
            if name in lane and program.latents[name].is_linked:
                found += _links(program, nodes[name], name)
            elif name in program.batch_shapes and name not in program.deterministic:
                dims = _dims(program, nodes[name], name, shape, alive[name])
                kept = tuple(dims)  # one tensor for all rows that keep the same dimensions
                if kept not in sources:
                    wanted = (len(names), *(shape[dim] for dim in kept))
                    sources[kept] = table if is_left else table.reshape(wanted)
                labels = tuple(dims.values())
                own = None if is_left else row
                plates = frozenset(labels) - lane.keys()
                node = nodes[name] if name in program.augmented else None
                found.append(Factor(sources[kept], labels, plates, name, own, rows, shape, kept, is_left, node))
    number = {name: i for i, name in enumerate(statements)}
    return sorted(found, key=lambda factor: number[factor.site]), nodes


def _links(program: Program, node: Mapping[str, Any], name: str) -> list[Factor]:
    """The factors of a sequence of states: its first state, and its steps."""
    initial, steps = node["fn"].links()
    if node["mask"] is not None and node["mask"] is not True:
        raise Unsupported(
            f"Site '{name}' is a sequence of states under a mask. Mask the statements that depend on it instead."
        )
    initial, steps = initial * node["scale"], steps * node["scale"]
    rest = initial.new_zeros(program.latents[name].shape[-1] - 1, len(initial))
    (along,) = place(program, name)
    states = Factor(torch.cat([initial.unsqueeze(0), rest]), (along, name), frozenset([along]), name)
    then = f"{name}′"  # no variable of its own
    return [states, Factor(steps, (_LINK, name, then), frozenset([_LINK, then]), name)]


def _dims(
    program: Program, node: Mapping[str, Any], name: str, shape: torch.Size, alive: Mapping[int, str]
) -> dict[int, str]:
    """The dimensions of a statement's log-probabilities to their names; those of size 1 only if they are plates."""
    plates = {frame.dim: frame.name for frame in node["cond_indep_stack"] if frame.vectorized}
    batch, dims = program.batch_shapes[name], {}
    for dim in range(-len(shape), 0):
        size = shape[dim]
        if dim in plates:
            dims[dim] = plates[dim]
        elif size == 1:
            continue
        elif dim < -program.nesting:
            dims[dim] = alive[dim]
        elif len(batch) >= -dim and batch[dim] == size:
            dims[dim] = f"dimension {dim}"
        else:
            raise Unsupported(
                f"Site '{name}' depends on a finite site inside a plate of size {size} that it is not in itself, so "
                "that the elements of the plate are coupled. Update that site one element at a time, or put "
                f"'{name}' into the plate."
            )
    return dims


def _aligned(table: Tensor, dims: Sequence[Hashable], wanted: Sequence[Hashable]) -> Tensor:
    """A stack of tables with the dimensions in the order ``wanted``, those that are missing of size 1."""
    order = sorted(range(len(dims)), key=lambda i: wanted.index(dims[i]))
    table = table.permute(0, *(i + 1 for i in order))
    for i, dim in enumerate(wanted):
        if dim not in dims:
            table = table.unsqueeze(i + 1)
    return table


def _logsumexp(table: Tensor, dim: int) -> Tensor:
    top = table.detach().amax(dim, keepdim=True)
    top = torch.where(top.isfinite(), top, torch.zeros_like(top))
    return (table - top).exp().sum(dim).log() + top.squeeze(dim)


class _Group:
    """Factors of one set of plates, while the variables that are local to them are eliminated."""

    def __init__(self, factors: list[Factor], local: Collection[str]) -> None:
        self.local = dict.fromkeys(v for factor in factors for v in factor.variables if v in local)
        self.factors: dict[int, Factor] = {}
        self.of: dict[str, dict[int, None]] = {variable: {} for variable in self.local}  # its factors
        self._costs: dict[str, tuple[int, set[str]]] = {}
        self._count = 0
        for factor in factors:
            self.add(factor)

    def add(self, factor: Factor) -> None:
        self.factors[self._count] = factor
        for variable in factor.variables:
            if variable in self.local:
                self.of[variable][self._count] = None
                self._costs.pop(variable, None)
        self._count += 1

    def take(self, variable: str) -> list[Factor]:
        """Removes a variable and its factors."""
        taken = {i: self.factors.pop(i) for i in self.of.pop(variable)}
        del self.local[variable]
        for i, factor in taken.items():
            for other in factor.variables:
                if other in self.local:
                    del self.of[other][i]
        return list(taken.values())

    def cost(self, variable: str) -> tuple[int, set[str]]:
        """Entries of the table that summing a variable out makes, and its neighbours."""
        if variable not in self._costs:
            involved = [self.factors[i] for i in self.of[variable]]
            sizes = {dim: size for factor in involved for dim, size in zip(factor.dims, factor.shape, strict=True)}
            neighbours = {other for factor in involved for other in factor.variables} - {variable}
            self._costs[variable] = math.prod(sizes.values()), neighbours
        return self._costs[variable]

    def next(self) -> list[str]:
        """Variables to sum out together: all of an independent set with two neighbours at most, else the cheapest one.

        Every other state of a chain goes at once, so that a chain of n states takes log₂ n rounds.
        """
        chosen: list[str] = []
        if len(self.local) > 2:
            blocked: set[str] = set()
            for variable in self.local:
                width, neighbours = self.cost(variable)
                if variable not in blocked and len(neighbours) <= 2 and width <= _SMALL:
                    chosen.append(variable)
                    blocked |= neighbours
        return chosen or [min(self.local, key=lambda v: (self.cost(v)[0], v))]


class _Form(NamedTuple):
    """What variables that are summed out in one operation share: dimensions and shapes of their factors, by role."""

    factors: tuple[tuple[tuple[Hashable, ...], torch.Size], ...]
    neighbours: tuple[frozenset[str], ...]


def _form(
    variable: str, involved: list[Factor], plates_of: Mapping[str, frozenset[str]]
) -> tuple[_Form, list[Factor], tuple[str, ...]]:
    """The form of a variable, its factors in the order of the form, and its neighbours."""
    neighbours = tuple(dict.fromkeys(v for factor in involved for v in factor.variables if v != variable))
    roles: dict[str, Hashable] = {variable: -1, **{other: i for i, other in enumerate(neighbours)}}
    keyed = [(tuple(roles.get(dim, dim) for dim in factor.dims), factor.shape) for factor in involved]
    order = sorted(range(len(keyed)), key=lambda i: str(keyed[i][0]))
    form = _Form(tuple(keyed[i] for i in order), tuple(plates_of[other] for other in neighbours))
    return form, [involved[i] for i in order], neighbours


def _sum_out(
    form: _Form, members: list[tuple[str, list[Factor], tuple[str, ...]]], leaf: frozenset[str], maximise: bool
) -> tuple[list[Factor], Record]:
    """Sums variables of one form out, each of its own factors."""
    count, batch = len(members), tuple(sorted(leaf))
    wanted = (*batch, *range(len(form.neighbours)), -1)
    total: Tensor | None = None
    start = 0
    while start < len(form.factors):
        dims, shape = form.factors[start]
        end = start + 1
        while end < len(form.factors) and form.factors[end] == (dims, shape):
            end += 1
        stack = _stack([factor for _, factors, _ in members for factor in factors[start:end]])
        if end - start > 1:
            stack = stack.unflatten(0, (count, end - start)).sum(1)
        aligned = _aligned(stack, dims, wanted)
        total = aligned if total is None else total + aligned
        start = end
    assert total is not None
    left = total.amax(-1) if maximise else _logsumexp(total, -1)
    sites = tuple(variable for variable, _, _ in members)
    made = [
        Factor(left, (*batch, *neighbours), leaf, factors[0].site, row)
        for row, (_, factors, neighbours) in enumerate(members)
    ]
    return made, Record(sites, total, batch, tuple(neighbours for _, _, neighbours in members))


def eliminate(
    found: list[Factor],
    plates_of: Mapping[str, frozenset[str]],
    keep: frozenset[str] = frozenset(),
    maximise: bool = False,
    scales: Mapping[str, float] | None = None,
) -> tuple[list[Factor], list[Record | Walk]]:
    """Sums (or maximises) all variables out of a product of plated factors.

    Args:
        found: The factors.
        plates_of: Variable to the plates that it lives in.
        keep: Plates that are not multiplied over; each result has a subset of them as its dimensions.
        maximise: Whether to take the maximum over variables instead of the sum.
        scales: Plate to a factor for the product over it, for plates of which only a sample of rows is seen.

    Returns:
        The factors that are left, without variables, and the records for ``draw_back``, in order of elimination; lazy
        factors leave none.

    Raises:
        Unsupported: If variables of different plates are coupled, or a table would be too large.
    """
    done: list[Factor] = []
    records: list[Record | Walk] = []
    links = {factor.site: factor for factor in found if _LINK in factor.plates}
    pending = [factor for factor in found if _LINK not in factor.plates]
    while pending:
        leaf = max((factor.plates for factor in pending), key=lambda plates: (len(plates), sorted(plates)))
        inside = [factor for factor in pending if factor.plates == leaf]
        pending = [factor for factor in pending if factor.plates != leaf]
        local = {v for factor in inside for v in factor.variables if plates_of[v] == leaf}
        for factor in pending:
            outside = local & set(factor.variables)
            if outside:
                raise Unsupported(
                    f"Site '{factor.site}' depends on '{min(outside)}', which lives in plates {sorted(leaf)} that the "
                    "first is not in: the elements of those plates are coupled."
                )
        linked = local & links.keys()
        local -= linked
        inside, collapsed = _collapsed(inside, local, leaf, keep, maximise, scales or {})
        done += collapsed
        group = _Group(inside, local)
        while group.local:
            forms: dict[_Form, list[tuple[str, list[Factor], tuple[str, ...]]]] = {}
            for variable in group.next():
                _check_width(group, variable)
                form, involved, neighbours = _form(variable, group.take(variable), plates_of)
                forms.setdefault(form, []).append((variable, involved, neighbours))
            for form, members in forms.items():
                made, record = _sum_out(form, members, leaf, maximise)
                records.append(record)
                for factor in made:
                    group.add(factor)
        left, walks = _walked([*group.factors.values()], linked, links, leaf, maximise)
        records += walks
        products: dict[Hashable, Tensor] = {}
        for factor in left:
            if not factor.dims:
                done.append(factor)
                continue
            target = frozenset().union(*(plates_of[v] for v in factor.variables)) | (leaf & keep)
            if factor.variables and not target < leaf:
                raise Unsupported(
                    f"Finite sites {', '.join(sorted(factor.variables))} are coupled across the plates {sorted(leaf)}, so "
                    "that they cannot be summed out jointly. Update one of them at a time."
                )
            product = _multiplied(factor, target, scales or {}, products)
            if product.variables or target - keep:
                pending.append(product)
            else:
                done.append(product)
    return done, records


def _walked(
    found: list[Factor],
    linked: set[str],
    links: Mapping[str, Factor],
    leaf: frozenset[str],
    maximise: bool,
) -> tuple[list[Factor], list[Walk]]:
    """Factors of one plate with the sequences of states along it summed out: those that these are not in, and scalars.

    Sequences that one factor couples element by element are one sequence of joint states.
    """
    rest, walks, order = [], [], [name for name in links if name in linked]
    groups: list[set[str]] = [{name} for name in order]
    for factor in found:
        joined = [group for group in groups if group & set(factor.variables)]
        if len(joined) > 1:
            groups = [group for group in groups if group not in joined] + [set().union(*joined)]
    for group in groups:
        sites = tuple(name for name in order if name in group)
        own = [factor for factor in found if group & set(factor.variables)]
        outside = sorted({v for factor in own for v in factor.variables} - group)
        if outside or len(leaf) != 1 or any(factor.plates != leaf for factor in own):
            raise Unsupported(
                f"The sequence of states '{sites[0]}' is coupled with {', '.join(outside) or 'several plates'}, element by "
                "element, which cannot be summed out jointly. Update one of them at a time."
            )
        (along,) = leaf
        sizes = tuple(links[site].table.shape[-1] for site in sites)
        width, length = math.prod(sizes), 1 + len(links[sites[0]].table)
        if length * width**2 > WIDEST * 64:
            raise Unsupported(
                f"Summing out {', '.join(sites)} jointly needs a table of {length * width**2:,} entries (at most "
                f"{WIDEST * 64:,}). Update these sites one at a time."
            )
        states = torch.stack(
            [_aligned(factor.table.unsqueeze(0), factor.dims, (along, *sites))[0].expand(length, *sizes) for factor in own]
        ).sum(0)
        steps = links[sites[0]].table
        for site in sites[1:]:
            more = links[site].table
            steps = steps[:, :, None, :, None] + more[:, None, :, None, :]
            steps = steps.reshape(len(more), steps.shape[1] * steps.shape[2], -1)
        found_now = passage(states.reshape(length, width), steps, maximise)
        rest.append(Factor(found_now.log_z, (), frozenset(), sites[0]))
        walks.append(Walk(sites, sizes, found_now, (along,)))
    return [factor for factor in found if not set(factor.variables) & linked] + rest, walks


def _collapsed(
    inside: list[Factor],
    local: set[str],
    leaf: frozenset[str],
    keep: frozenset[str],
    maximise: bool,
    scales: Mapping[str, float],
) -> tuple[list[Factor], list[Factor]]:
    """The factors of one plate but those whose variable is summed out and product is taken at once, and what these become.

    That is where all factors of a variable are lazy and of it alone. ``local`` loses the variable.
    """
    lazy = [factor for factor in inside if factor.is_lazy]
    if not lazy or len(leaf) > 1 or leaf & keep:
        return [_formed(factor) for factor in inside], []
    (plate,) = leaf
    taken: list[tuple[list[Factor], Tensor]] = []
    for variable in sorted(local):
        involved = [factor for factor in inside if variable in factor.variables]
        is_own = all(f.is_lazy and f.variables == (variable,) and len(f.dims) == 2 for f in involved)
        if is_own and any(f.rows is not None and f.rows.is_large for f in involved):
            taken.append((involved, _log_sum([f.rows for f in involved if f.rows is not None], maximise)))
            local.remove(variable)
    taken += [([f], f.rows.total()) for f in lazy if f.rows is not None and not f.variables]
    gone = {id(factor) for group, _ in taken for factor in group}
    scale = scales.get(plate, 1.0)
    made = [Factor(value * scale, (), frozenset(), group[0].site) for group, value in taken]
    return [_formed(factor) for factor in inside if id(factor) not in gone], made


def _formed(factor: Factor) -> Factor:
    """A factor with its table."""
    return factor.with_table(factor.table) if factor.is_lazy else factor


def _log_sum(parts: list[Rows], maximise: bool) -> Tensor:
    """Log-probability of rows under several components, one for each value of a variable; a scalar.

    What is the same under all of them is taken out of the sum over components.
    """
    choices = max(part.constant.numel() for part in parts)
    constants = [part.constant.reshape(-1).expand(choices) for part in parts]
    products = [part for part in parts if part.is_product]
    widths = [part.natural.shape[-1] - part.shared for part in products]
    naturals = [part.natural.reshape(-1, part.natural.shape[-1]) for part in products]
    own = [natural[:, :width].expand(choices, -1) for natural, width in zip(naturals, widths, strict=True)]
    constant, (first, *others) = torch.stack(constants).sum(0), products
    if others or first.shared:
        tables = [p.columns[:, :width] if p.shared else p.statistics for p, width in zip(products, widths, strict=True)]
        found = log_sum(torch.cat(tables, -1) if others else tables[0], torch.cat(own, -1), constant, maximise)
    else:
        found = log_sum(first.columns, own[0], constant, maximise, first.kind)
    for part, natural, width in zip(products, naturals, widths, strict=True):
        if part.shared:
            found = found + natural[0, width:] @ part.sums[width:]
    return found


def _multiplied(
    factor: Factor, target: frozenset[str], scales: Mapping[str, float], products: dict[Hashable, Tensor]
) -> Factor:
    """The product of a factor over all its plates but ``target``; ``products`` holds those of whole stacks."""
    reduced = [i for i, dim in enumerate(factor.dims) if dim in factor.plates and dim not in target]
    key = id(factor.source), factor.dims if scales else (), tuple(reduced)
    if key not in products:
        offset = 0 if factor.row is None else 1
        table = factor.source.sum([i + offset for i in reduced]) if reduced else factor.source
        for i in reduced:
            table = table * scales.get(factor.dims[i], 1.0)
        products[key] = table
    dims = tuple(dim for i, dim in enumerate(factor.dims) if i not in reduced)
    return Factor(products[key], dims, target, factor.site, factor.row)


def _check_width(group: _Group, variable: str) -> None:
    width, neighbours = group.cost(variable)
    widest = max(WIDEST, *(4 * math.prod(group.factors[i].shape) for i in group.of[variable]))
    if width > widest:
        raise Unsupported(
            f"Summing out {', '.join(sorted((variable, *neighbours)))} jointly needs a table of {width:,} entries (at most "
            f"{widest:,}). Update these sites one at a time."
        )


def total(found: Collection[Factor]) -> Tensor:
    """Sum of all entries of all tables, a scalar."""
    groups: dict[int, list[Factor]] = defaultdict(list)
    for factor in found:
        groups[id(factor.source)].append(factor)
    parts = []
    for group in groups.values():
        if group[0].rows is not None:
            parts.append(group[0].rows.total())
        else:
            parts.append(_stack(group).sum() if group[0].row is not None else group[0].table.sum())
    return torch.stack(parts).sum()


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
    found = factors(program, values, enumerated, data, is_lazy=True)
    return total(eliminate(found, plates_of(program, enumerated), scales=scales)[0])


def indices(program: Program, site: str, value: Tensor) -> Tensor:
    """Which of the choices of a finite site each of its values is; shape: its batch shape."""
    known = program.latents[site]
    assert known.choices is not None
    if known.is_indexed:
        return value.long()
    matches = value.unsqueeze(-1 - known.event_dim) == known.choices
    matches = matches.reshape(*matches.shape[: matches.dim() - known.event_dim], -1).all(-1)
    return matches.to(torch.uint8).argmax(-1)


def draw_back(program: Program, records: list[Record | Walk], pick: Pick) -> tuple[dict[str, Tensor], Tensor]:
    """Fixes the eliminated variables in reverse order.

    Args:
        program: The program.
        records: What ``eliminate`` returned.
        pick: How to choose.

    Returns:
        Site to index (of its batch shape) and log q, the sum of the log-probabilities of what was picked.
    """
    pools: dict[tuple[str, ...], Tensor] = {}  # batch dimensions -> indices picked so far, (site, *batch)
    rows: dict[str, int] = {}
    log_q: Tensor | float = 0.0
    for record in reversed(records):
        if isinstance(record, Walk):
            states, log_p = drawn_back(record.passage, partial(pick, record.sites))
            log_q = log_q + log_p
            for site, size in zip(reversed(record.sites), reversed(record.sizes), strict=True):
                first = len(pools[record.batch]) if record.batch in pools else 0
                index, states = (states % size).unsqueeze(0), states // size
                pools[record.batch] = torch.cat([pools[record.batch], index]) if first else index
                rows[site] = first
            continue
        sites, table, batch, neighbours = record
        for j in reversed(range(len(neighbours[0]))):
            names = [row[j] for row in neighbours]
            order = place(program, names[0])
            chosen = torch.tensor([rows[name] for name in names], device=table.device)
            index = _aligned(pools[order][chosen], order, batch)
            index = index.reshape(index.shape + (1,) * (j + 2))
            shape = (*table.shape[:-2], 1, table.shape[-1])
            table = torch.take_along_dim(table, index.expand(shape), -2).squeeze(-2)
        order = place(program, sites[0])
        table = table.permute(-1, 0, *(batch.index(dim) + 1 for dim in order))
        logits = table.contiguous().log_softmax(0).movedim(0, -1)  # over a short last axis it takes six times as long
        index = pick(sites, logits)
        log_q = log_q + logits.gather(-1, index.unsqueeze(-1)).sum()
        first = len(pools[order]) if order in pools else 0
        pools[order] = torch.cat([pools[order], index]) if first else index
        rows.update(zip(sites, range(first, first + len(sites)), strict=True))
    drawn = {site: pools[place(program, site)][row].reshape(program.batch_shapes[site]) for site, row in rows.items()}
    return drawn, torch.as_tensor(log_q, dtype=program.dtype)
