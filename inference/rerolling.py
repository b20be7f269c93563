"""Loops of a recorded graph, rolled up again: operations that are the same but for their arguments become one.

A program with a Python loop over time is recorded as one long graph, with the operations of every step of it. Two nodes are
*alike* if they are the same operation with the same literals on nodes that are alike; what they begin with are inputs and
constants of one shape, and the elements of one tensor. Nodes that are alike cannot depend on each other, since the depth of
what they are made of is the same, so that all of them are evaluated at once, by ``vmap`` of their operation over their
stacked arguments. An element of a stack and a stack of elements cancel, and no step of the loop is left.

What every step computes from the one before, such as h_t = a + b h_{t−1}, is *recurrent*, and stays a loop; but all that is
computed from it is alike.

Sums are gathered before (``inference.sums``).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import operator
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from inference.graphs import (
    LARGEST_CONSTANT,
    arguments,
    changing,
    constant,
    functional,
    merge,
    meta,
    operation,
    signature,
    unite,
)
from inference.recording import Draft, draft
from inference.sums import gather, placed, sum_of

__all__ = ["reroll"]

_FEWEST = 8  # nodes that are alike; fewer stay as they are
_LARGEST_STACK = 2**25  # numbers in the results of alike nodes; larger ones are better not held at once
_RADIUS = 4  # operations back to which what is recurrent looks the same in every step

_aten = torch.ops.aten


def reroll(graph: Draft, inputs: Sequence[Tensor]) -> Draft:
    """A graph that returns what ``graph`` does up to rounding, with one operation for nodes that are alike.

    Args:
        graph: The graph, as ``draft`` makes it; it is changed.
        inputs: Tensors of the shapes that it was recorded with.
    """
    gather(merge(unite(functional(graph))))
    return draft(_Rolled(graph), inputs)


# ------------------------------------------------------------------------------------------------------ alike nodes
class _Group(NamedTuple):
    """Nodes that are alike; ``kind`` tells how their values come about."""

    nodes: tuple[fx.Node, ...]
    kind: str  # "operation", "element" or "slice" of a tensor, or "part" of a split tensor


class _Likeness:
    """Which nodes of a graph are alike, and an order in which they can be evaluated."""

    def __init__(self, graph: Draft) -> None:
        self.graph = graph
        self.nodes = [node for node in graph.graph.nodes if node.op != "output"]
        self.number = {node: i for i, node in enumerate(self.nodes)}
        self.unsteady = changing(graph)
        self.sources: dict[fx.Node, list[fx.Node]] = {}
        last: list[fx.Node] = []
        for node in self.nodes:
            self.sources[node] = [*node.all_input_nodes]
            if node in self.unsteady:  # these keep their order
                self.sources[node] += last
                last = [node]
        self.recurrent: set[fx.Node] = set()
        self._picks = Counter(self._source(node) for node in self.nodes)

    @staticmethod
    def _source(node: fx.Node) -> Hashable:
        """What a node is a piece of, and along which dimension; None if it is no piece."""
        if node.target in (_aten.select.int, _aten.slice.Tensor):
            return node.target, *arguments(node)[:2]
        if node.target is operator.getitem and getattr(arguments(node)[0], "target", None) in _SPLITS:
            return node.target, arguments(node)[0]
        return None

    def _kind(self, node: fx.Node) -> str:
        source = self._source(node)
        if source is None or self._picks[source] < _FEWEST:  # the same piece of several tensors is an operation
            return "operation"
        return "element" if node.target is _aten.select.int else "slice" if node.target is _aten.slice.Tensor else "part"

    def _key(self, node: fx.Node, classes: dict[fx.Node, int]) -> Hashable:
        if node in self.unsteady:
            return (node,)
        if node in self.recurrent:
            return "recurrent", node.meta["val"]
        if node.op == "placeholder":
            return "input", node.meta["val"]
        if node.op == "get_attr":
            value = constant(self.graph, node)
            return ("constant", meta(self.graph, node)) if value.numel() <= LARGEST_CONSTANT else (node,)
        kind = self._kind(node)
        if kind == "element":
            return kind, arguments(node)[0], arguments(node)[1]
        if kind == "part":
            return kind, arguments(node)[0], node.meta["val"].shape
        if kind == "slice":
            return kind, arguments(node)[0], arguments(node)[1:2], arguments(node)[4:], node.meta["val"].shape
        return kind, node.target, signature((arguments(node), dict(node.kwargs)), classes.__getitem__)

    def _classes(self) -> dict[fx.Node, int]:
        """Node to the number of its class: nodes are alike if they are made alike, back to where they begin."""
        keys: dict[Hashable, int] = {}
        classes: dict[fx.Node, int] = {}
        for node in self.nodes:
            classes[node] = keys.setdefault(self._key(node, classes), len(keys))
        return classes

    def _members(self, classes: dict[fx.Node, int]) -> dict[int, list[fx.Node]]:
        """Classes of several operations that can be done together."""
        members: dict[int, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            is_operation = node.op == "call_function" and node.target is not sum_of
            if is_operation and node not in self.recurrent and node not in self.unsteady:
                members[classes[node]].append(node)
        return {number: alike for number, alike in members.items() if len(alike) >= _FEWEST and self._fits(alike)}

    @staticmethod
    def _fits(alike: list[fx.Node]) -> bool:
        known = alike[0].meta.get("val")
        return known is None or len(alike) * known.shape.numel() <= _LARGEST_STACK

    def _dependent(self, classes: dict[fx.Node, int]) -> set[int]:
        """Classes with a member that depends on another one."""
        above: dict[fx.Node, int] = {}  # the classes that a node depends on, a bit for each
        found: set[int] = set()
        for node in self.nodes:
            bits = 0
            for source in self.sources[node]:
                bits |= above[source] | (1 << classes[source])
            above[node] = bits
            if bits >> classes[node] & 1:
                found.add(classes[node])
        return found

    def _near(self, classes: dict[fx.Node, int], grouped: set[int]) -> dict[fx.Node, int]:
        """As ``_classes``, but of nodes that are alike in the few operations before them."""
        near: dict[fx.Node, int] = {}
        for radius in range(_RADIUS):
            keys: dict[Hashable, int] = {}
            found = {}
            for node in self.nodes:
                if classes[node] in grouped or node.op != "call_function" or node in self.unsteady:
                    key: Hashable = ("far", classes[node])
                elif not radius:
                    key = (node.target, node.meta.get("val"))
                else:
                    key = self._key(node, near)
                found[node] = keys.setdefault(key, len(keys))
            near = found
        return near

    def groups(self) -> tuple[list[_Group], list[fx.Node | int]]:
        """Nodes that are alike, and the order in which groups and single nodes are evaluated."""
        classes = self._classes()
        members = self._members(classes)
        near = self._near(classes, set(members))
        while True:
            again = self._dependent(near)
            more = {node for node in self.nodes if near[node] in again and "val" in node.meta} - self.recurrent
            more = {node for node in more if node.op == "call_function" and node not in self.unsteady}
            if not more:
                break
            self.recurrent |= more
            near = self._classes()
        members = self._members(near)
        while True:
            groups = [_Group(tuple(alike), self._kind(alike[0])) for alike in members.values()]
            units, left = self._ordered(groups)
            if not left:
                return groups, units
            tangled = [number for number, alike in members.items() if alike[0] in left]
            for number in tangled:
                del members[number]

    def _ordered(self, groups: list[_Group]) -> tuple[list[fx.Node | int], set[fx.Node]]:
        """Units so that each comes after what it needs, and the nodes of those for which there is no such order."""
        unit_of: dict[fx.Node, fx.Node | int] = {node: i for i, group in enumerate(groups) for node in group.nodes}
        unit = {node: unit_of.get(node, node) for node in self.nodes}
        first: dict[fx.Node | int, int] = {}
        needs: dict[fx.Node | int, set[fx.Node | int]] = defaultdict(set)
        users: dict[fx.Node | int, set[fx.Node | int]] = defaultdict(set)
        for node in self.nodes:
            own = unit[node]
            first.setdefault(own, self.number[node])
            needs[own].update(unit[source] for source in self.sources[node])
        for own, needed in needs.items():
            for other in needed:
                users[other].add(own)
        waiting = {own: len(needed) for own, needed in needs.items()}
        ready = [(first[own], own) for own, count in waiting.items() if not count]
        heapq.heapify(ready)
        order = []
        while ready:
            _, own = heapq.heappop(ready)
            order.append(own)
            for user in users[own]:
                waiting[user] -= 1
                if not waiting[user]:
                    heapq.heappush(ready, (first[user], user))
        done = set(order)
        return order, {node for node in self.nodes if unit[node] not in done}


class _Rolled:
    """Evaluates a graph, with one operation for nodes that are alike."""

    def __init__(self, graph: Draft) -> None:
        self.graph = graph
        self.groups, self.units = _Likeness(graph).groups()
        self.group_of = {node: (i, row) for i, group in enumerate(self.groups) for row, node in enumerate(group.nodes)}

    # --------------------------------------------------------------------------------------------------- evaluation
    def __call__(self, *inputs: Tensor) -> Any:
        self.single: dict[fx.Node, Any] = {}
        self.batched: dict[int, Any] = {}
        remaining = iter(inputs)
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                self.single[node] = next(remaining)
        for unit in self.units:
            if isinstance(unit, int):
                self.batched[unit] = self._together(self.groups[unit])
            elif unit.op != "placeholder":
                self.single[unit] = self._alone(unit)
        (output,) = (node for node in self.graph.graph.nodes if node.op == "output")
        return fx.map_arg(arguments(output)[0], self.value)

    def value(self, node: fx.Node) -> Any:
        """The value of one node."""
        if node not in self.single:
            group, row = self.group_of[node]
            value = self.batched[group]
            self.single[node] = value[row] if isinstance(value, Tensor) else type(value)(part[row] for part in value)
        return self.single[node]

    def _alone(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return constant(self.graph, node)
        if node.target is sum_of:
            return self._sum(arguments(node)[0])
        if node.target is placed:
            return placed(self.stack(arguments(node)[0]), *arguments(node)[1:])
        if node.target is _aten.stack.default and len(arguments(node)[0]) >= _FEWEST:
            stacked, dim = self.stack(arguments(node)[0]), (arguments(node)[1:] or (0,))[0]
            return stacked.movedim(0, dim)
        if node.target is _aten.cat.default and len(arguments(node)[0]) >= _FEWEST:
            return self._cat(*arguments(node))
        given, options = fx.map_arg((arguments(node), dict(node.kwargs)), self.value)
        return operation(node)(*given, **options)

    def _cat(self, nodes: Sequence[fx.Node], dim: int = 0) -> Tensor:
        """Tensors one after the other; those of one group that follow each other are there already."""
        pieces = []
        for number, run in itertools.groupby(nodes, key=lambda node: self.group_of.get(node, (-1, 0))[0]):
            members = list(run)
            if number < 0 or len(members) == 1:
                pieces += [self.value(node) for node in members]
            else:
                stacked = self.stack(members)
                at = dim % (stacked.dim() - 1)
                pieces.append(stacked.movedim(0, at).flatten(at, at + 1))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _sources(self, nodes: Sequence[fx.Node]) -> tuple[list[Tensor], list[int]]:
        """Stacks that together hold the values of nodes, and where in them each of the nodes is."""
        rows: dict[int, dict[int, None]] = defaultdict(dict)  # group -> the rows of it that are needed
        alone: dict[fx.Node, None] = {}
        for node in nodes:
            if node in self.group_of and isinstance(self.batched[self.group_of[node][0]], Tensor):
                group, row = self.group_of[node]
                rows[group][row] = None
            else:
                alone[node] = None
        where: dict[tuple[int, int], int] = {}
        sources, first = [], 0
        for group, needed in rows.items():
            whole = self.batched[group]
            if len(needed) == len(whole) or (len(rows) == 1 and not alone):
                sources.append(whole)  # picked below, in one operation
                where |= {(group, row): first + row for row in range(len(whole))}
            else:
                sources.append(_rows(whole, list(needed)))
                where |= {(group, row): first + i for i, row in enumerate(needed)}
            first += len(sources[-1])
        if alone:
            sources.append(torch.stack([self.value(node) for node in alone]))
        single = {node: first + i for i, node in enumerate(alone)}
        return sources, [single[n] if n in single else where[self.group_of[n]] for n in nodes]

    def stack(self, nodes: Sequence[fx.Node]) -> Tensor:
        """The values of nodes of one shape, (node, *shape)."""
        sources, order = self._sources(nodes)
        pool = sources[0] if len(sources) == 1 else torch.cat(sources)
        return _rows(pool, order)

    def _sum(self, nodes: Sequence[fx.Node]) -> Tensor:
        if len(set(nodes)) < len(nodes):
            return self.stack(nodes).sum(0)
        placed = defaultdict(list)
        for node in nodes:
            placed[self.group_of.get(node, (-1, 0))[0]].append(node)
        parts = []
        for group, members in placed.items():
            known = meta(self.graph, members[0])
            is_small = known is None or len(members) * known.shape.numel() <= _LARGEST_STACK
            if len(members) > 1 and (group >= 0 or is_small):
                parts.append(self.stack(members).sum(0))
            else:
                parts += [self.value(node) for node in members]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _together(self, group: _Group) -> Any:
        nodes = group.nodes
        if group.kind == "element":
            source, dim = self.value(arguments(nodes[0])[0]), arguments(nodes[0])[1]
            moved = source.movedim(dim, 0)
            return _rows(moved, [arguments(node)[2] % len(moved) for node in nodes])
        if group.kind == "slice":
            return self._slices(nodes)
        if group.kind == "part":
            return self._parts(nodes)
        if nodes[0].target is operator.getitem:
            return self._results(nodes)
        columns = list(zip(*(tree_flatten((arguments(node), dict(node.kwargs)))[0] for node in nodes), strict=True))
        structure = tree_flatten((arguments(nodes[0]), dict(nodes[0].kwargs)))[1]
        shared = [column[0] for column in columns]
        stacked: dict[int, Tensor] = {}
        for i, column in enumerate(columns):
            if isinstance(column[0], fx.Node):
                if all(node is column[0] for node in column):
                    shared[i] = self.value(column[0])
                else:
                    stacked[i] = self.stack(column)

        def one(*rows: Tensor) -> Any:
            leaves = list(shared)
            for i, row in zip(stacked, rows, strict=True):
                leaves[i] = row
            given, options = tree_unflatten(leaves, structure)
            return operation(nodes[0])(*given, **options)

        try:
            with _without_loops():
                return vmap(one)(*stacked.values())
        except RuntimeError:  # an operation without a rule for it
            found = [one(*rows) for rows in zip(*stacked.values(), strict=True)]
            return tree_map(lambda *parts: torch.stack(parts), *found)

    def _results(self, nodes: Sequence[fx.Node]) -> Tensor:
        """One of several results of each of some operations."""
        sources, which = [arguments(node)[0] for node in nodes], arguments(nodes[0])[1]
        places = [self.group_of.get(source, (-1, i)) for i, source in enumerate(sources)]
        (group, _), *_ = places
        if group < 0 or any(place[0] != group for place in places):
            return torch.stack([self.value(source)[which] for source in sources])
        return _rows(self.batched[group][which], [row for _, row in places])

    def _slices(self, nodes: Sequence[fx.Node]) -> Tensor:
        """Slices of one size of a tensor."""
        source, dim = self.value(arguments(nodes[0])[0]), (arguments(nodes[0])[1:] or (0,))[0]
        starts = []
        for node in nodes:
            _, _, start, *_ = (*arguments(node), None, None)
            count = source.shape[dim]
            start = 0 if start is None else start
            starts.append(max(start + count, 0) if start < 0 else start)
        length = nodes[0].meta["val"].shape[dim]
        step = (*arguments(nodes[0]), None, None, None, 1)[4] if len(arguments(nodes[0])) > 4 else 1
        where = torch.tensor(starts, device=source.device)[:, None] + step * torch.arange(length, device=source.device)
        dim = dim % source.dim()
        return source.index_select(dim, where.flatten()).unflatten(dim, (len(nodes), length)).movedim(dim, 0)

    def _parts(self, nodes: Sequence[fx.Node]) -> Tensor:
        """Parts of one size of a split tensor."""
        split = arguments(nodes[0])[0]
        assert isinstance(split, fx.Node)
        where = [arguments(node)[1] for node in nodes]
        is_row = where == list(range(where[0], where[0] + len(where)))
        if split.target is not _aten.split_with_sizes.default or not is_row:
            return torch.stack([self.value(split)[i] for i in where])
        source, sizes, *rest = arguments(split)
        dim = rest[0] if rest else 0
        whole, size = self.value(source), sizes[where[0]]
        start, dim = sum(sizes[: where[0]]), dim % whole.dim()
        return whole.narrow(dim, start, size * len(where)).unflatten(dim, (len(where), size)).movedim(dim, 0)


@contextlib.contextmanager
def _without_loops() -> Iterator[None]:
    """Lets ``vmap`` raise for what it would otherwise do one by one, with a warning."""
    functorch: Any = torch._C._functorch
    before = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(before)


_SPLITS = (
    _aten.split.Tensor, _aten.split_with_sizes.default, _aten.unbind.int, _aten.unsafe_split.Tensor,
    _aten.unsafe_split_with_sizes.default,
)  # fmt: skip


def _rows(whole: Tensor, order: list[int]) -> Tensor:
    """Rows of a tensor in an order, by a view where it can be."""
    if order == list(range(len(whole))):
        return whole
    step = order[1] - order[0] if len(order) > 1 else 1
    if step > 0 and order == list(range(order[0], order[-1] + 1, step)):
        return whole[order[0] : order[-1] + 1 : step]
    return whole.index_select(0, torch.tensor(order, device=whole.device))
