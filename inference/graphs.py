"""Rewrites of a recorded graph that leave its values as they are: constants are folded, what is done twice is done once."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from inference.recording import Draft, Meta, constants, is_random

__all__ = [
    "LARGEST_CONSTANT",
    "apart",
    "arguments",
    "changing",
    "constant",
    "elements",
    "fold",
    "functional",
    "merge",
    "meta",
    "operation",
    "shortened",
    "signature",
    "unite",
]

LARGEST_CONSTANT = 4096  # numbers in a constant that is compared or stacked with others


Graph = TypeVar("Graph", fx.GraphModule, Draft)


def _written_anew(graph: Graph) -> Graph:
    if isinstance(graph, fx.GraphModule):
        graph.recompile()
    return graph


def fold(graph: Graph) -> Graph:
    """Evaluates once, in place, what does not depend on the inputs of a graph: data, constants and priors.

    What an in-place operation may write to is left alone: a constant that is written to would remember. Factors and
    divisors of 1 are left out, and what is the same along a dimension takes memory for one of them.
    """
    unsteady = changing(graph)
    known: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        filled = _filled(node) if node not in unsteady else None
        if filled is not None:
            known[node] = filled
        elif node.op == "get_attr":
            known[node] = getattr(graph, node.target)
        elif node.op == "call_function" and node not in unsteady and all(i in known for i in node.all_input_nodes):
            arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
            known[node] = node.target(*arguments[0], **arguments[1])
        elif node not in unsteady and (source := _times_one(node, known)) is not None:
            node.replace_all_uses_with(source)
    for node, value in known.items():
        needed = node.op == "call_function" and any(user not in known for user in node.users)
        if needed and isinstance(value, Tensor):
            name = f"_folded_{len(graph._buffers)}"  # of no constant that is there from an earlier time
            graph.register_buffer(name, _compact(value), persistent=False)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))
    for node in reversed(list(known)):  # also checks for errors, which dead-code elimination keeps
        if not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or _is_mutable(node))
    return _written_anew(graph)


def _times_one(node: fx.Node, known: Mapping[fx.Node, Any]) -> fx.Node | None:
    """What is multiplied or divided by a constant of ones, if that is the value of a node."""
    if node.op != "call_function" or node.target not in (_aten.mul.Tensor, _aten.div.Tensor):
        return None
    left, right = node.args[:2]
    for source, other in ((left, right), (right, left))[: 1 + (node.target is _aten.mul.Tensor)]:
        if isinstance(source, fx.Node) and isinstance(other, fx.Node) and other in known and "val" in source.meta:
            is_alike = source.meta["val"] == node.meta.get("val")  # neither wider nor of another type
            if is_alike and bool((known[other] == 1).all()):
                return source
    return None


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _compact(value: Tensor) -> Tensor:
    """The same values, whose memory holds one of what is the same along a dimension, bit for bit."""
    if value.is_complex() or (value.is_floating_point() and value.element_size() not in _BITS):
        return value.contiguous()
    kept = value.view(_BITS[value.element_size()]) if value.is_floating_point() else value
    for dim in range(kept.dim()):
        if kept.shape[dim] > 1 and bool((kept == kept.narrow(dim, 0, 1)).all()):
            kept = kept.narrow(dim, 0, 1)
    kept = kept.contiguous() if kept.shape == value.shape else kept.clone(memory_format=torch.contiguous_format)
    return kept.view(value.dtype).expand(value.shape)


def shortened(graph: fx.GraphModule) -> Draft:
    """A copy of a graph with a tuple of results that returns the first of them alone; the rest is dead code in it."""
    short = Draft(constants(graph), copy.deepcopy(graph.graph))
    (output,) = short.graph.find_nodes(op="output")
    output.args = (output.args[0][0],)
    return short


def merge(graph: Graph) -> Graph:
    """Does in place once what a graph does twice: equal operations on equal arguments, whose memory nothing writes to.

    The names that autograd gives to one tensor (``detach``, ``alias``, the transpose of a transpose) become one.
    """
    unsteady = changing(graph)
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        same = _renamed(node)
        if same is None and node not in unsteady:
            same = _unchanged(graph, node)
        if same is None and node not in unsteady:
            key = node.target, signature((node.args, dict(node.kwargs)), lambda source: source)
            same = seen.setdefault(key, node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    return _written_anew(graph)


def functional(graph: Graph) -> Graph:
    """Does not in place what need not be: an operation in place on what no other name is used for."""
    places = {node: place for place, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        name = getattr(node.target, "_opname", "")
        source = node.args[0] if node.args else None
        if not _is_mutable(node) or not name.endswith("_") or not isinstance(source, fx.Node):
            continue
        others = [user for user in source.users if user is not node]
        earlier = [user for user in others if places[user] < places[node]]
        is_fresh = source.op == "call_function" and not _is_view(source) and not any(_is_view(user) for user in earlier)
        packet = getattr(torch.ops.aten, name[:-1], None)
        if is_fresh and _written(node) == [source] and node.target._overloadname in getattr(packet, "overloads", list)():
            meta = source.meta.get("val"), node.meta.get("val")
            if meta[0] == meta[1] is not None:  # the same type: in place, a result is cast to what it is written to
                node.target = getattr(packet, node.target._overloadname)
                for user in others:
                    if user not in earlier:  # it reads what was written
                        user.replace_input_with(source, node)
    return _written_anew(graph)


def unite(graph: Graph) -> Graph:
    """Makes one constant of small ones that are equal."""
    unsteady = changing(graph)
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "get_attr" or node in unsteady:
            continue
        value = constant(graph, node)
        if value.numel() <= LARGEST_CONSTANT and value.device.type == "cpu":
            content = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            same = seen.setdefault((value.shape, value.dtype, content), node)
            if same is not node:
                node.replace_all_uses_with(same)
                graph.graph.erase_node(node)
    return _written_anew(graph)


def meta(graph: Draft | fx.GraphModule, node: fx.Node) -> Meta | None:
    """What is known of a node's value; None if it is no tensor."""
    if node.op == "get_attr":
        value = constant(graph, node)
        return Meta(value.shape, value.dtype, value.device)
    return node.meta.get("val")


def elements(graph: Draft | fx.GraphModule) -> int:
    """Elements of all tensors that a graph makes; views are no more than names."""
    made = [node for node in graph.graph.nodes if node.op == "call_function" and not _is_view(node)]
    return sum(node.meta["val"].shape.numel() for node in made if "val" in node.meta)


def signature(value: Any, label: Callable[[fx.Node], Hashable]) -> Hashable:
    """Arguments of a node as something to compare, with labels for nodes.

    What is written otherwise is different: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
    """
    if isinstance(value, fx.Node):
        return "node", label(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *(signature(part, label) for part in value)
    if isinstance(value, dict):
        return "dict", *((name, signature(part, label)) for name, part in value.items())
    return repr(value)


def constant(graph: Draft | fx.GraphModule, node: fx.Node) -> Tensor:
    """The value of a constant."""
    value: Tensor = getattr(graph, str(node.target))
    return value


def operation(node: fx.Node) -> Callable[..., Any]:
    """The operation of a node."""
    assert callable(node.target)
    return node.target


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a node."""
    return node.args


def _renamed(node: fx.Node) -> fx.Node | None:
    """The node of which this one is another name, if it is one."""
    aten = torch.ops.aten
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target in (aten.detach.default, aten.alias.default, aten.lift_fresh.default):
        return source
    is_returned = node.target is aten.t.default and source.target is aten.t.default
    return source.args[0] if is_returned else None  # type: ignore[return-value]


def _unchanged(graph: Draft | fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The argument of a node, if that is its value: a view in the same shape, times 1, to the power of 1."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or node.kwargs:
        return None
    before = meta(graph, source)
    if before is None or meta(graph, node) != before:
        return None
    rest, order = node.args[1:], [*range(len(before.shape))]
    is_view = node.target in _RESHAPED or (node.target is _aten.permute.default and rest == (order,))
    is_one = node.target in _SCALED and len(rest) == 1 and type(rest[0]) in (int, float) and rest[0] == 1
    return source if is_view or is_one else None


_aten = torch.ops.aten
_RESHAPED = {_aten.view.default, _aten._unsafe_view.default, _aten.expand.default, _aten.reshape.default}
_SCALED = {
    _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Tensor, _aten.div.Scalar, _aten.pow.Tensor_Scalar
}  # fmt: skip


def changing(graph: Graph) -> set[fx.Node]:
    """What is drawn at random, all names of memory that is written to, and what reads such memory."""
    written: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if _is_mutable(node):
            written.add(node)
            frontier = _written(node)
            while frontier:  # up to where the memory was made
                ancestor = frontier.pop()
                if ancestor not in written:
                    written.add(ancestor)
                    frontier.extend(ancestor.all_input_nodes if _is_view(ancestor) else ())
    for node in graph.graph.nodes:  # and down to its other names
        if _is_view(node) and any(source in written for source in node.all_input_nodes):
            written.add(node)
    readers = {node for node in graph.graph.nodes if any(source in written for source in node.all_input_nodes)}
    return written | readers | {node for node in graph.graph.nodes if is_random(node)}


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and (schema.is_mutable or node.target in _WRITES_UNSAID)


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that an in-place operation writes to."""
    if node.target in _WRITES_UNSAID:
        return [value for value in node.args[3:5] if isinstance(value, fx.Node)]
    given = dict(enumerate(node.args)) | node.kwargs
    declared = enumerate(node.target._schema.arguments)  # type: ignore[union-attr]
    pairs = [(argument, given.get(i, given.get(argument.name))) for i, argument in declared]
    written = [value for argument, value in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return [value for value in written if isinstance(value, fx.Node)]


_WRITES_UNSAID = {  # their schemas do not tell that they update the running mean and variance, arguments 3 and 4
    getattr(torch.ops.aten, name).default for name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
}


def _is_view(node: fx.Node) -> bool:
    """Whether a result may share its memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(value.alias_info is not None for value in schema.returns)


def _filled(node: fx.Node) -> Tensor | None:
    """The value of a node that takes only the shape of its input, such as ``zeros_like``."""
    aten, meta = torch.ops.aten, node.meta.get("val")
    if meta is None or node.op != "call_function":
        return None
    if node.target in (aten.zeros_like.default, aten.new_zeros.default):
        value: Any = 0
    elif node.target in (aten.ones_like.default, aten.new_ones.default):
        value = 1
    elif node.target in (aten.full_like.default, aten.new_full.default):
        value = node.args[-1]
    else:
        return None
    if not isinstance(value, (int, float, bool)):
        return None
    return torch.full(meta.shape, value, dtype=meta.dtype, device=meta.device)


def apart(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph of a loss and its gradients, with these in memory of their own: they are scaled and summed in place."""
    (output,) = graph.graph.find_nodes(op="output")
    loss, gradients = output.args[0]
    taken, own = {_memory(loss)}, list(gradients)
    for i, node in enumerate(gradients):
        memory = None if node is None else _memory(node)
        if memory is not None and (memory.op != "call_function" or memory in taken):
            with graph.graph.inserting_before(output):
                own[i] = graph.graph.call_function(torch.clone, (node,))
        elif memory is not None:
            taken.add(memory)
    output.args = ((loss, own),)
    graph.recompile()
    return graph


def _memory(node: fx.Node) -> fx.Node:
    """The node whose result a node is a view of, or is written into; itself if it is none."""
    while node.op == "call_function":
        source = node.args[0] if node.target is operator.getitem else node
        assert isinstance(source, fx.Node)
        returns = getattr(getattr(source.target, "_schema", None), "returns", ())
        if not any(part.alias_info is not None for part in returns):
            return node
        (node,) = source.args[:1]  # type: ignore[assignment]
    return node
