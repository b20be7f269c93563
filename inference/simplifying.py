"""Rewrites of a recorded graph that do with fewer operations, or on fewer numbers, what autograd and vmap have spelt out.

    what is the same all along a dimension is computed once       Γ(expand x) = expand Γ(x),  Σ_n x = N x
    signs are carried to where they are an operation less         a + (−b) = a − b,  −(a · −b) = a · b
    a chain of views is one, a sum over one term is none          and x is finite where x − x = 0

Values stay as they are, but for the rounding of Σ_n x and the sign of the zero that a sum of one −0 is. What memory is
written to is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from inference.graphs import LARGEST_CONSTANT, arguments, changing, constant, meta
from inference.recording import Draft, Meta

__all__ = ["narrow", "simplified", "simplify"]

_LONGEST = 10_000  # nodes of a graph that is looked at: it takes half as long as to record it

_aten = torch.ops.aten
_SHAPED = {
    _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.squeeze.dims, _aten.squeeze.default, _aten.expand.default
}  # fmt: skip
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_LAID_OUT = {_aten.as_strided.default, _aten.as_strided_.default, _aten.as_strided_scatter.default}
_MOVED = {_aten.permute.default, _aten.transpose.int, _aten.t.default}
_ODD = {_aten.mul.Tensor, _aten.div.Tensor, _aten.mul.Scalar, _aten.div.Scalar}  # in both of their arguments
_MOVED_ALONG = {_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.reshape.default, _aten.view.default,
           _aten.unsqueeze.default, _aten.squeeze.dim, _aten.select.int}  # fmt: skip


def simplified(graph: Draft) -> Draft:
    """Both rewrites, in place."""
    if len(graph.graph.nodes) > _LONGEST or any(node.target in _LAID_OUT for node in graph.graph.nodes):
        return graph  # strides hold for one layout of the memory
    graph = simplify(narrow(graph))
    unsteady = changing(graph)
    for node in graph.graph.nodes:
        if node.target in _VIEWS and node not in unsteady:  # a new argument may be laid out in another way
            node.target = _aten.reshape.default
    return graph


class _Rewriting:
    """A graph whose nodes are replaced one after the other."""

    def __init__(self, graph: Draft) -> None:
        self.graph, self.unsteady = graph, changing(graph)

    def meta(self, node: Any) -> Meta | None:
        return meta(self.graph, node) if isinstance(node, fx.Node) else None

    def made(self, like: Meta, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node, at the place where nodes are inserted."""
        node = self.graph.graph.call_function(target, args, kwargs)
        node.meta["val"] = like
        return node

    def is_plain(self, node: Any, targets: Any = None, count: int | None = None) -> bool:
        """Whether a node is one of these operations, with no more than so many positional arguments."""
        if not isinstance(node, fx.Node) or node.op != "call_function" or node in self.unsteady:
            return False
        return (targets is None or node.target in targets) and (
            count is None or (len(node.args) == count and not node.kwargs)
        )


def _is_real(known: Meta | None) -> bool:
    return known is not None and known.dtype.is_floating_point


def _ones_left_out(shape: torch.Size) -> list[int]:
    """The dimensions that have more than one place, or none."""
    return [dim for dim, size in enumerate(shape) if size != 1]


# ------------------------------------------------------------------------------------------------ what repeats itself
class _Narrowing(_Rewriting):
    def __init__(self, graph: Draft) -> None:
        super().__init__(graph)
        self.cores: dict[fx.Node, fx.Node | None] = {}

    def run(self) -> None:
        for node in list(self.graph.graph.nodes):
            if self.is_plain(node) and self.meta(node) is not None:
                with self.graph.graph.inserting_before(node):
                    core = self._narrowed(node)
                if core is not None:
                    self.cores[node] = core
        self.graph.graph.eliminate_dead_code(lambda node: node.is_impure() or node in self.unsteady)

    def core(self, node: fx.Node) -> fx.Node | None:
        """What a node repeats: of as many dimensions, some of them of size 1; None if it does not."""
        if node.op == "get_attr" and node not in self.cores and node not in self.unsteady:
            self.cores[node] = self._constant(node)
        return self.cores.get(node)

    def _constant(self, node: fx.Node) -> fx.Node | None:
        value = known = constant(self.graph, node)
        if not 1 < value.numel() <= LARGEST_CONSTANT or value.device.type != "cpu":
            return None
        for dim in _ones_left_out(value.shape):
            first = value.narrow(dim, 0, 1)
            if bool((value == first).all()):
                value = first
        if value is known:
            return None
        name = f"_narrow_{len(self.graph._buffers)}"
        self.graph.register_buffer(name, value.contiguous(), persistent=False)
        made = self.graph.graph.get_attr(name)
        made.meta["val"] = Meta(value.shape, value.dtype, value.device)
        return made

    def _narrowed(self, node: fx.Node) -> fx.Node | None:
        """The core of a node, if its arguments have one."""
        known = self.meta(node)
        assert known is not None
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            self._pointwise(node, known)
            return None
        source = node.args[0] if node.args else None
        before = self.meta(source)
        if before is None or not isinstance(source, fx.Node):
            return None
        core = self.core(source) or source
        inner = self.meta(core)
        assert inner is not None
        if node.target is _aten.expand.default:
            shape = torch.Size([1] * (len(known.shape) - len(inner.shape)) + [*inner.shape])
            if shape == known.shape:
                return None
            return (
                core
                if shape == inner.shape
                else self.made(inner._replace(shape=shape), _aten.reshape.default, core, [*shape])
            )
        if core is source:
            return None
        if node.target in _SHAPED:
            return self._reshaped(core, before.shape, inner, known)
        if node.target is _aten.sum.dim_IntList and len(node.args) in (2, 3) and not node.kwargs:
            self._summed(node, core, before.shape, inner, known)
        return None

    def _pointwise(self, node: fx.Node, known: Meta) -> None:
        sources = node.all_input_nodes
        metas = [self.meta(source) for source in sources]
        if any(found is None or len(found.shape) != len(known.shape) for found in metas):
            return
        cores = {source: self.core(source) or source for source in sources}
        if all(cores[source] is source for source in sources):
            return
        inner = [self.meta(core) for core in cores.values()]
        shape = torch.broadcast_shapes(*(found.shape for found in inner if found is not None))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda source: cores[source])
        made = self.made(known._replace(shape=shape), node.target, *args, **kwargs)
        if shape == known.shape:
            node.replace_all_uses_with(made)
        else:
            self._repeated(node, made, known)

    def _repeated(self, node: fx.Node, core: fx.Node, known: Meta) -> None:
        """Puts what repeats a core in the place of a node."""
        wide = self.made(known, _aten.expand.default, core, [*known.shape])
        self.cores[wide] = core
        node.replace_all_uses_with(wide)

    def _reshaped(self, core: fx.Node, before: torch.Size, inner: Meta, known: Meta) -> fx.Node | None:
        """Where dimensions of size 1 alone come and go."""
        old, new = _ones_left_out(before), _ones_left_out(known.shape)
        if [before[dim] for dim in old] != [known.shape[dim] for dim in new]:
            return None
        shape = [1] * len(known.shape)
        for i, j in zip(old, new, strict=True):
            shape[j] = inner.shape[i]
        return self.made(known._replace(shape=torch.Size(shape)), _aten.reshape.default, core, shape)

    def _summed(self, node: fx.Node, core: fx.Node, before: torch.Size, inner: Meta, known: Meta) -> None:
        """Σ of the core, times the number of its repetitions."""
        dims = [dim % len(before) for dim in arguments(node)[1] or ()]
        if not dims or 0 in before or not _is_real(known) or inner.dtype != known.dtype:
            return
        count = math.prod(before[dim] for dim in dims if inner.shape[dim] == 1)
        kept = torch.Size([1 if dim in dims else size for dim, size in enumerate(inner.shape)])
        made = core
        if kept != inner.shape:
            made = self.made(inner._replace(shape=kept), _aten.sum.dim_IntList, core, dims, True)
        if count != 1:
            made = self.made(known._replace(shape=kept), _aten.mul.Tensor, made, float(count))
        is_kept = len(known.shape) == len(before)
        shape = kept if is_kept else torch.Size([size for dim, size in enumerate(kept) if dim not in dims])
        if not is_kept:
            made = self.made(known._replace(shape=shape), _aten.reshape.default, made, [*shape])
        if shape != known.shape:
            self._repeated(node, made, known)
        else:
            node.replace_all_uses_with(made)


def narrow(graph: Draft) -> Draft:
    """Computes once, in place, what is the same all along a dimension."""
    _Narrowing(graph).run()
    return graph


# -------------------------------------------------------------------------------------------- what is done for nothing
class _Simplifying(_Rewriting):
    def run(self) -> bool:
        is_changed = False
        for node in list(self.graph.graph.nodes):
            known = self.meta(node)
            if not self.is_plain(node) or known is None or not node.users:
                continue
            with self.graph.graph.inserting_before(node):
                found = next((new for rule in _RULES if (new := rule(self, node, known)) is not None), None)
            if found is not None:
                node.replace_all_uses_with(found)
                is_changed = True
        self.graph.graph.eliminate_dead_code(lambda node: node.is_impure() or node in self.unsteady)
        return is_changed

    def both(self, node: fx.Node) -> bool:
        """Whether both arguments are tensors of the type of the result."""
        known = self.meta(node)
        metas = [self.meta(arg) for arg in node.args]
        return known is not None and all(found is not None and found.dtype == known.dtype for found in metas)

    def negated(self, node: Any) -> Any:
        """The argument of a node that changes the sign; None if it is none."""
        return arguments(node)[0] if self.is_plain(node, {_aten.neg.default}) and _is_real(self.meta(node)) else None

    def shape_only(self, node: Any) -> fx.Node | None:
        """The argument of a node that changes the shape alone."""
        if not self.is_plain(node, _SHAPED | _MOVED):
            return None
        source = arguments(node)[0]
        before, known = self.meta(source), self.meta(node)
        if before is None or known is None or before.shape.numel() != known.shape.numel():
            return None
        if node.target in _MOVED:
            order = _order(node, len(before.shape))
            kept = [dim for dim in order if before.shape[dim] != 1]
            if kept != sorted(kept):
                return None
        return source if isinstance(source, fx.Node) else None


def _order(node: fx.Node, count: int) -> list[int]:
    """Which dimension goes where."""
    if node.target is _aten.permute.default:
        return [dim % count for dim in arguments(node)[1]]
    order = [*range(count)]
    first, second = (0, 1) if node.target is _aten.t.default else (dim % count for dim in arguments(node)[1:3])
    if count > 1:
        order[first], order[second] = order[second], order[first]
    return order


def _one_view(self: _Simplifying, node: fx.Node, known: Meta) -> fx.Node | None:
    """A view of a view, or one that changes nothing."""
    source = self.shape_only(node)
    if source is None:
        return None
    before = self.meta(source)
    assert before is not None
    if before.shape == known.shape:
        return source
    inner = self.shape_only(source)
    return None if inner is None else self.made(known, _aten.reshape.default, inner, [*known.shape])


def _no_sum(self: _Simplifying, node: fx.Node, known: Meta) -> fx.Node | None:
    """A sum over dimensions of size 1, or whether all hold along one."""
    if not self.is_plain(node, {_aten.sum.dim_IntList, _aten.all.dim}) or node.kwargs:
        return None
    before, dims = self.meta(arguments(node)[0]), arguments(node)[1]
    dims = (dims,) if isinstance(dims, int) else dims or ()
    is_same = before is not None and before.dtype == known.dtype and before.shape.numel() == known.shape.numel()
    is_one = before is not None and is_same and dims and all(before.shape[dim] == 1 for dim in dims)
    return self.made(known, _aten.reshape.default, arguments(node)[0], [*known.shape]) if is_one else None


def _sign(self: _Simplifying, node: fx.Node, known: Meta) -> fx.Node | None:
    """Signs go to the end, and out."""
    if not _is_real(known):
        return None
    if self.is_plain(node, {_aten.neg.default}):
        source = arguments(node)[0]
        inner: fx.Node | None = self.negated(source)
        return inner
    if self.is_plain(node, {_aten.add.Tensor, _aten.sub.Tensor}, 2) and self.both(node):
        one, two = arguments(node)
        first, second = self.negated(one), self.negated(two)
        is_sum = node.target is _aten.add.Tensor
        if second is not None:
            return self.made(known, _aten.sub.Tensor if is_sum else _aten.add.Tensor, one, second)
        if first is not None and is_sum:
            return self.made(known, _aten.sub.Tensor, two, first)
        return None
    if self.is_plain(node, {_aten.pow.Tensor_Scalar}) and arguments(node)[1] in (2, 2.0):
        inner = self.negated(arguments(node)[0])
        return None if inner is None else self.made(known, node.target, inner, arguments(node)[1])
    if self.is_plain(node, _ODD, 2):
        first, second = (self.negated(arg) for arg in arguments(node))
        if second is not None:
            return self.made(known, _aten.neg.default, self.made(known, node.target, arguments(node)[0], second))
        if first is not None:
            if isinstance(arguments(node)[1], (int, float)):
                return self.made(known, node.target, first, -arguments(node)[1])
            return self.made(known, _aten.neg.default, self.made(known, node.target, first, arguments(node)[1]))
        return None
    if self.is_plain(node, _MOVED_ALONG) and not node.kwargs:
        inner = self.negated(arguments(node)[0])
        if inner is not None:
            return self.made(known, _aten.neg.default, self.made(known, node.target, inner, *arguments(node)[1:]))
    return None


def _finite(self: _Simplifying, node: fx.Node, known: Meta) -> fx.Node | None:
    """``isfinite``, which is recorded as four operations."""
    if not self.is_plain(node, {_aten.mul.Tensor}, 2) or known.dtype != torch.bool:
        return None
    equal, other = arguments(node)
    if not self.is_plain(equal, {_aten.eq.Tensor}, 2) or not self.is_plain(other, {_aten.ne.Scalar}, 2):
        return None
    x, size = arguments(equal)[0], arguments(other)[0]
    before = self.meta(x)
    is_finite = arguments(equal)[1] is x and arguments(other)[1] == math.inf and self.is_plain(size, {_aten.abs.default})
    if not is_finite or arguments(size)[0] is not x or before is None:
        return None
    return self.made(known, _aten.eq.Scalar, self.made(before, _aten.sub.Tensor, x, x), 0)


_RULES: tuple[Callable[[_Simplifying, fx.Node, Meta], fx.Node | None], ...] = (
    _one_view, _no_sum, _sign, _finite
)  # fmt: skip
_MOST_PASSES = 4


def simplify(graph: Draft) -> Draft:
    """Does in place with fewer operations what can be done with fewer."""
    for _ in range(_MOST_PASSES):
        if not _Simplifying(graph).run():
            break
    return graph
