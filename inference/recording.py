"""A function of tensors, run once and recorded as a graph of the operations that it did.

What ``make_fx`` does, without its bookkeeping for symbolic shapes and fake tensors: twenty times as fast on the graphs of
long programs. Operations are recorded below ``vmap`` and ``grad``, so that the graph has no trace of either.
"""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = [
    "Draft",
    "Meta",
    "assuming",
    "constants",
    "draft",
    "drawn_one",
    "first_come",
    "is_assuming",
    "is_random",
    "quicken",
    "record",
    "unlikely",
]

_assumed: ContextVar[list[Tensor] | None] = ContextVar("assumed", default=None)


@contextlib.contextmanager
def assuming() -> Iterator[list[Tensor]]:
    """Takes what is unlikely for false, and collects the conditions: what is recorded holds where none is true."""
    token = _assumed.set([])
    try:
        held = _assumed.get()
        assert held is not None
        yield held
    finally:
        _assumed.reset(token)


def is_assuming() -> bool:
    """Whether what is unlikely is taken for false."""
    return _assumed.get() is not None


def unlikely(condition: Tensor) -> bool:
    """Whether a condition (), on which a function branches, is true."""
    held = _assumed.get()
    if held is None:
        return bool(condition)
    held.append(condition)
    return False


class Meta(NamedTuple):
    """What is known of a node's value."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class _Recorder(TorchDispatchMode):
    """Writes every operation on tensors into a graph."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self._alive: list[Tensor] = []  # an id is good only while its tensor lives
        self._nodes: dict[int, fx.Node] = {}
        self._storages: set[int] = set()  # of what depends on the inputs
        self._dependent: set[fx.Node] = set()
        for i, tensor in enumerate(inputs):
            node = self.graph.placeholder(f"input_{i}")
            self._dependent.add(node)
            self._enter(tensor, node)

    def _enter(self, tensor: Tensor, node: fx.Node) -> None:
        self._alive.append(tensor)
        self._nodes[id(tensor)] = node
        node.meta["val"] = Meta(tensor.shape, tensor.dtype, tensor.device)
        if node in self._dependent:
            self._storages.add(tensor.untyped_storage()._cdata)

    def node(self, tensor: Tensor) -> fx.Node:
        """The node of a tensor; one that was not made here is a constant."""
        found = self._nodes.get(id(tensor))
        if found is None:
            if tensor.untyped_storage()._cdata in self._storages:
                raise RuntimeError("a tensor shares its memory with an input in a way that was not recorded")
            name = f"_constant_{len(self.constants)}"
            self.constants[name] = tensor
            found = self.graph.create_node("get_attr", name)
            self._enter(tensor, found)
        return found

    def _symbolic(self, value: Any) -> Any:
        """Arguments with nodes for tensors; of plain containers, as operations take them."""
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, (tuple, list)):
            return type(value)([self._symbolic(part) for part in value])
        return {name: self._symbolic(part) for name, part in value.items()} if isinstance(value, dict) else value

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default:
            if self.node(args[0]) in self._dependent:
                raise RuntimeError("a value becomes a Python number: item()")
            return result
        node = self.graph.call_function(func, self._symbolic(args), self._symbolic(kwargs or {}))
        if is_random(node) or any(source in self._dependent for source in node.all_input_nodes):
            self._dependent.add(node)
        if isinstance(result, Tensor):
            self._enter(result, node)
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                if isinstance(part, Tensor):
                    item = self.graph.call_function(operator.getitem, (node, i))
                    if node in self._dependent:
                        self._dependent.add(item)
                    self._enter(part, item)
        return result


def is_random(node: fx.Node) -> bool:
    """Whether an operation draws random numbers, anew at each call."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


class Draft(nn.Module):
    """A graph with its constants, whose Python code is not written yet: that of a long graph takes seconds."""

    def __init__(self, constants: Mapping[str, Tensor], graph: fx.Graph) -> None:
        super().__init__()
        for name, value in constants.items():
            plain = value.detach() if isinstance(value, nn.Parameter) else value  # of a parameter fx makes no buffer
            self.register_buffer(name, plain, persistent=False)
        self.graph = graph

    def written(self) -> fx.GraphModule:
        """The graph with its code."""
        return fx.GraphModule(self, self.graph)


def constants(graph: Draft | fx.GraphModule) -> dict[str, Tensor]:
    """The constants of a graph, by name; one tensor may have two."""
    return dict(graph.named_buffers(remove_duplicate=False))


def record(function: Callable[..., Any], inputs: Sequence[Tensor], held: Sequence[Tensor] = ()) -> fx.GraphModule:
    """The graph of ``function(*inputs)``; called with tensors of the same shapes, it returns the same tree.

    For arguments and errors see ``draft``.
    """
    return draft(function, inputs, held).written()


def draft(function: Callable[..., Any], inputs: Sequence[Tensor], held: Sequence[Tensor] = ()) -> Draft:
    """What ``record`` returns, before its code is written.

    Args:
        function: Takes and returns tensors. Random operations are recorded as such.
        inputs: Its arguments, of which it sees copies.
        held: Tensors that it reads or writes without being given them, such as the weights and buffers of a module; the
            graph takes them after ``inputs``.

    Raises:
        RuntimeError: If a value becomes a Python number, or memory is shared in a way that cannot be recorded.
    """
    fresh = [tensor.detach().clone() for tensor in inputs]
    recorder = _Recorder([*fresh, *held])
    with recorder:
        result = function(*fresh)
    leaves, structure = tree_flatten(result)
    recorder.graph.output(
        tree_unflatten([recorder.node(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
    )
    return Draft(recorder.constants, recorder.graph)


# Operations that torch.* and methods of tensors take with the arguments of their aten forms, in half the time to dispatch.
_FUNCTIONS = """abs add addmm bmm cat cos cumsum digamma div eq erf exp expm1 ge gt index_select isfinite le lerp lgamma log
log1p logical_and logical_not logsumexp lt maximum mean minimum mm mul ne neg permute pow reciprocal relu round rsqrt select
sigmoid sign sin sqrt square squeeze stack sub sum t tanh transpose unsqueeze where"""
_METHODS = """expand"""


def quicken(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph, to be run by itself: its common operations by their quickest names, its constants as attributes."""
    quick = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    names = {name: getattr(torch, name) for name in _FUNCTIONS.split()}
    names |= {name: getattr(Tensor, name) for name in _METHODS.split()}
    # reshape takes inputs that are laid out in another way than those that were recorded, too
    names["view"] = names["reshape"] = Tensor.reshape
    for node in quick.graph.nodes:
        name = getattr(node.target, "_opname", None)
        is_plain = name not in ("add", "sub") or len(node.args) == 2  # a third argument would be their alpha
        if name in names and is_plain and node.target._overloadname not in ("out", "int_out", "dtype"):
            node.target = names[name]
        elif name == "multinomial":
            node.target = drawn_one
    quick.recompile()
    _name_tuples(quick)
    for name in list(quick._buffers):  # whose look-up is Python code
        quick.__dict__[name] = quick._buffers.pop(name)
    return quick


def drawn_one(p: Tensor, count: int, *rest: Any, **options: Any) -> Tensor:
    """``torch.multinomial``; on a GPU a draw of one without its look at the weights, for which the processor would wait."""
    is_plain = count == 1 and p.is_cuda and options.get("generator") is None
    return first_come(p) if is_plain else torch.multinomial(p, count, *rest, **options)


def first_come(p: Tensor) -> Tensor:
    """An index by its weight, (…, 1): the first event of Poisson processes of these rates.

    These are torch's own draws where the weights are some: of negative ones, of NaN and of zeros alone it gives any.
    """
    return (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)


def _name_tuples(graph: fx.GraphModule) -> None:
    """Makes known to the code of a graph the classes of the named tuples that it returns: torch before 2.13 forgets some."""
    known = type(graph).forward.__globals__
    parts: list[Any] = [node.args for node in graph.graph.nodes if node.op == "output"]
    while parts:
        part = parts.pop()
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            kind = type(part)
            known.setdefault(kind.__name__, kind)
        parts += part.values() if isinstance(part, dict) else part if isinstance(part, (tuple, list)) else ()
