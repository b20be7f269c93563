"""Machine code of a recorded graph, by the compiler itself, kept for the next fit of the same graph."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from inference.recording import constants

__all__ = ["compiled", "identity", "laid_out"]

_MOST_CODES, _LARGEST_CONSTANTS = 32, 2**24  # graphs whose machine code is kept, bytes of the constants of one
_COMPILER: dict[str, Any] = {
    "cpp.vec_isa_ok": True,  # trusts the processor's flags; asking the compiler takes ten seconds
    "size_asserts": False,  # inputs are checked here, once for all rungs
    "alignment_asserts": False,
    "fallback_random": True,  # the random numbers that an uncompiled graph draws
    "use_joint_graph_passes": False,  # they look for attention and paddings, and loading their patterns takes a second
}
_codes: dict[str, Callable[..., Any]] = {}  # what it holds changes no values, only the time until they are there


def compiled(graph: fx.GraphModule, leaves: list[Tensor], strides: list[list[int]]) -> Callable[..., Any]:
    """Machine code of a graph, called as it is.

    By the compiler itself: ``torch.compile`` would look at the graph's Python code first, and at every call check what
    cannot change here. Memory has to be laid out as in ``strides``, though: what comes otherwise is copied. The same graph
    with the same constants, of another fit, is not compiled again.
    """
    from torch._inductor import compile as compile_graph  # imported where it is used: it takes seconds
    from torch._inductor import config as inductor

    layout = [tuple(stride) for stride in strides]
    flat, rebuilt = _flattened(graph)
    key = identity(graph, leaves, layout)
    code = _codes.get(key)
    if code is None:
        options = {**_COMPILER, "deterministic": True}
        known = {name: value for name, value in options.items() if "." in name or hasattr(inductor, name)}
        code = compile_graph(flat, [*laid_out(leaves, layout)], known)
        if key:
            while len(_codes) >= _MOST_CODES:
                del _codes[next(iter(_codes))]
            _codes[key] = code

    def run(*leaves: Tensor) -> Any:
        for leaf, stride in zip(leaves, layout, strict=True):
            if leaf.stride() != stride:
                return rebuilt(*leaves, *code(*laid_out(leaves, layout)))
        return rebuilt(*leaves, *code(*leaves))

    return run


def _flattened(graph: fx.GraphModule) -> tuple[fx.GraphModule, Callable[..., Any]]:
    """A copy of a graph that returns what it computes as one tuple; and what makes its results of its inputs and of that.

    A result that is an input stays the same tensor, by which one tells that it has not changed.
    """
    flat, rebuilding = fx.GraphModule(graph, copy.deepcopy(graph.graph)), fx.Graph()
    for node in flat.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default  # constants may be laid out in another way than those recorded
    (output,) = flat.graph.find_nodes(op="output")
    leaves, structure = tree_flatten(fx.node.map_aggregate(output.args[0], lambda leaf: leaf))
    inputs = flat.graph.find_nodes(op="placeholder")
    given = {node: rebuilding.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    made = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf not in given))
    given |= {node: rebuilding.placeholder(f"made_{i}") for i, node in enumerate(made)}
    rebuilding.output(
        tree_unflatten([given.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], structure)
    )
    output.args = (tuple(made),)
    flat.recompile()
    return flat, fx.GraphModule({}, rebuilding).forward  # as code: ten times as fast as ``tree_unflatten``


def identity(graph: fx.GraphModule, leaves: list[Tensor], layout: list[tuple[int, ...]]) -> str:
    """All that the machine code of a graph depends on, as a digest; "" if its constants are too large to keep."""
    held = constants(graph)
    if sum(value.nbytes for value in held.values()) > _LARGEST_CONSTANTS:
        return ""
    digest = hashlib.sha256(f"{graph.code} {layout} {torch.get_num_threads()}".encode())
    for name, value in [*held.items(), *((str(i), leaf) for i, leaf in enumerate(leaves))]:
        digest.update(f"{name} {value.shape} {value.stride()} {value.dtype} {value.device}".encode())
    for value in held.values():
        whole = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # also where one number repeats itself
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def laid_out(leaves: Sequence[Tensor], strides: list[tuple[int, ...]]) -> list[Tensor]:
    """The same tensors with these strides, copied where they have others."""
    return [
        leaf
        if leaf.stride() == stride
        else torch.empty_strided(leaf.shape, stride, dtype=leaf.dtype, device=leaf.device).copy_(leaf)
        for leaf, stride in zip(leaves, strides, strict=True)
    ]
