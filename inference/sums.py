"""Sums of a recorded graph: one node for each, and what is linear done after the sum instead of before.

The gradient of what every step of a loop uses is a chain of additions, with which autograd accumulates it term by term. It
becomes one sum of many terms. What is linear, and the same for several terms, is done once: Σ A g_t = A Σ g_t.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable

import torch
from torch import Tensor, fx

from inference.graphs import arguments, changing, constant, meta, operation, signature
from inference.recording import Draft, Meta

__all__ = ["gather", "placed", "sum_of"]

_FEWEST = 8  # terms; a sum of fewer stays as it is

_aten = torch.ops.aten


def sum_of(terms: list[Tensor]) -> Tensor:
    """Sum of tensors of one shape."""
    return torch.stack(terms).sum(0)


def placed(terms: list[Tensor] | Tensor, rows: list[int], count: int, dim: int) -> Tensor:
    """Zeros with ``count`` places in a dimension, to which tensors of one shape are added, each at its place."""
    stacked = terms if isinstance(terms, Tensor) else torch.stack(terms)
    if sorted(rows) == list(range(count)):
        return stacked[torch.tensor([rows.index(i) for i in range(count)], device=stacked.device)].movedim(0, dim)
    shape = [count, *stacked.shape[1:]]
    where = torch.tensor(rows, device=stacked.device)
    return stacked.new_zeros(shape).index_add(0, where, stacked).movedim(0, dim)


# Linear in their first argument, whatever the others are.
_LINEAR = {
    _aten.expand.default, _aten.neg.default, _aten.permute.default, _aten.select.int, _aten.slice.Tensor,
    _aten.slice_backward.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten.sum.dim_IntList, _aten.t.default,
    _aten.transpose.int, _aten.unsqueeze.default, _aten.view.default, _aten._unsafe_view.default, _aten.div.Tensor,
    _aten.mm.default, _aten.bmm.default, _aten.select_backward.default,
}  # fmt: skip


def gather(graph: Draft) -> None:
    """Makes one node of each chain of additions, and does after a sum what is linear and common to several terms."""
    unsteady = changing(graph)
    metas = {node: meta(graph, node) for node in graph.graph.nodes}

    def is_plain(node: fx.Node) -> bool:
        if node.target is not _aten.add.Tensor or node in unsteady or len(arguments(node)) != 2 or node.kwargs:
            return False
        return all(isinstance(arg, fx.Node) and metas[arg] == metas[node] is not None for arg in arguments(node))

    def terms(node: fx.Node) -> list[fx.Node]:
        found, frontier = [], [*reversed(arguments(node))]
        while frontier:
            term = frontier.pop()
            if is_plain(term) and len(term.users) == 1:
                frontier.extend(reversed(arguments(term)))
            else:
                found.append(term)
        return found

    pending: list[fx.Node] = []
    for node in reversed(list(graph.graph.nodes)):
        if not is_plain(node) or (len(node.users) == 1 and is_plain(next(iter(node.users)))):
            continue
        found = terms(node)
        if len(found) >= _FEWEST:
            with graph.graph.inserting_before(node):
                made = graph.graph.call_function(sum_of, (found,))
            made.meta["val"] = metas[made] = metas[node]
            node.replace_all_uses_with(made)
            pending.append(made)
    graph.graph.eliminate_dead_code()
    while pending:
        node = pending.pop()
        pending += _factored(graph, node, metas, unsteady)
    graph.graph.eliminate_dead_code()


def _factored(graph: Draft, node: fx.Node, metas: dict[fx.Node, Meta | None], unsteady: set[fx.Node]) -> list[fx.Node]:
    """Takes what is linear and common to terms of a sum out of it; the new sums inside."""
    groups: dict[Hashable, list[tuple[fx.Node, int]]] = defaultdict(list)
    rest: list[fx.Node] = []
    found = arguments(node)[0]
    assert isinstance(found, (list, tuple))
    for term in found:
        place = _linear(graph, term) if len(term.users) == 1 and term not in unsteady else None
        key = None if place is None else _signature(term, place, metas)
        if key is None or place is None:
            rest.append(term)
        else:
            groups[key].append((term, place))
    made = []
    for members in groups.values():
        if len(members) < 2:
            rest += [term for term, _ in members]
            continue
        (first, place), *_ = members
        inner = [arguments(term)[place] for term, place in members]
        with graph.graph.inserting_before(node):
            total = graph.graph.call_function(sum_of, (inner,))
            given = [*arguments(first)]
            given[place] = total
            outer = graph.graph.call_function(operation(first), tuple(given), dict(first.kwargs))
        total.meta["val"] = metas[total] = metas[inner[0]]
        outer.meta["val"] = metas[outer] = metas[node]
        rest.append(outer)
        made.append(total)
    rest, is_placed = _gathered(graph, node, rest, metas)
    if made or is_placed:
        with graph.graph.inserting_before(node):
            outside = rest[0] if len(rest) == 1 else graph.graph.call_function(sum_of, (rest,))
        if len(rest) > 1:
            outside.meta["val"] = metas[outside] = metas[node]
        node.replace_all_uses_with(outside)
        graph.graph.erase_node(node)
        for term in dict.fromkeys(found):
            if not term.users:
                graph.graph.erase_node(term)
    return made


def _gathered(
    graph: Draft, node: fx.Node, terms: list[fx.Node], metas: dict[fx.Node, Meta | None]
) -> tuple[list[fx.Node], bool]:
    """Terms, with one for all those that differ in which element of a dimension they are not zero at; whether any do."""
    groups: dict[Hashable, list[fx.Node]] = defaultdict(list)
    rest: list[fx.Node] = []
    for term in terms:
        is_element = term.target is _aten.select_backward.default and len(term.users) == 1
        (groups[repr(arguments(term)[1:3])] if is_element else rest).append(term)
    for members in groups.values():
        if len(members) < 2:
            rest += members
            continue
        _, sizes, dim, _ = arguments(members[0])
        dim = dim % len(sizes)
        rows = [arguments(term)[3] % sizes[dim] for term in members]
        with graph.graph.inserting_before(node):
            made = graph.graph.call_function(placed, ([arguments(term)[0] for term in members], rows, sizes[dim], dim))
        made.meta["val"] = metas[made] = metas[node]
        rest.append(made)
    return rest, len(rest) < len(terms)


def _linear(graph: Draft, node: fx.Node) -> int | None:
    """The number of the argument in which an operation is linear; None if there is none."""
    if node.op != "call_function":
        return None
    if node.target in _LINEAR:
        return 0 if isinstance(arguments(node)[0], fx.Node) else None
    if node.target is _aten.mul.Tensor:
        return None
    if node.target is _aten.index_put.default:
        base = arguments(node)[0]
        is_zero = base.op == "get_attr" and not bool(constant(graph, base).any())
        return 2 if is_zero and arguments(node)[3:] == (True,) else None
    return None


def _signature(node: fx.Node, place: int, metas: dict[fx.Node, Meta | None]) -> Hashable:
    """What terms share that differ in their linear argument only."""
    others = [arg for i, arg in enumerate(arguments(node)) if i != place]
    return node.target, place, signature((others, dict(node.kwargs)), lambda source: source), metas[arguments(node)[place]]
