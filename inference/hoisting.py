"""What a recorded graph computes of inputs that seldom change, computed when they do and kept until they do again.

The points at which Gibbs differentiates stand still after warm-up; along a Hamiltonian trajectory all sites but those that
move do. What follows from such inputs and from constants alone is taken out of the graph, into one of its own:

    f(x, s) = body(x, s, prelude(s))
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx

from inference.graphs import changing, meta
from inference.recording import quicken

__all__ = ["Prelude", "hoist"]

_MOST_KEPT = 2**22  # numbers that are kept from one call to the next; of more, nothing is


def hoist(graph: fx.GraphModule, steady: Sequence[int]) -> tuple[fx.GraphModule | None, fx.GraphModule]:
    """A graph in two parts.

    Args:
        graph: Takes tensors; it is left as it is.
        steady: Which of them seldom change.

    Returns:
        The prelude, which takes those of ``steady`` and returns a tuple, None if there is nothing to take out; and the body,
        which takes all that ``graph`` takes and after it what the prelude returns.
    """
    if not steady:
        return None, graph
    body = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    inputs, unsteady = body.graph.find_nodes(op="placeholder"), changing(body)
    known, made = {inputs[i] for i in steady}, list[fx.Node]()
    for node in body.graph.nodes:
        if node.op == "get_attr" and node not in unsteady:
            known.add(node)
        elif node.op == "call_function" and node not in unsteady and all(source in known for source in node.all_input_nodes):
            known.add(node)
            made.append(node)
    kept = [node for node in made if any(user not in known for user in node.users)]
    metas = [meta(body, node) for node in kept]
    if not kept or sum(_MOST_KEPT if known is None else known.shape.numel() for known in metas) > _MOST_KEPT:
        return None, graph
    before, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in [*(inputs[i] for i in steady), *(node for node in body.graph.nodes if node.op == "get_attr"), *made]:
        copies[node] = before.node_copy(node, lambda source: copies[source])
    before.output(tuple(copies[node] for node in kept))
    before.eliminate_dead_code()
    prelude = fx.GraphModule(body, before)
    place = next(node for node in body.graph.nodes if node.op != "placeholder")
    for i, node in enumerate(kept):
        with body.graph.inserting_before(place):
            given = body.graph.placeholder(f"kept_{i}")
        given.meta.update(node.meta)
        node.replace_all_uses_with(given)
    for node in [*reversed(made), *body.graph.find_nodes(op="get_attr")]:
        if not node.users:
            body.graph.erase_node(node)
    return prelude, fx.GraphModule(body, body.graph)


class Prelude:
    """What a prelude returned last, and of which inputs.

    Args:
        graph: The prelude.
        steady: Which of the inputs of all it takes.
    """

    def __init__(self, graph: fx.GraphModule, steady: Sequence[int]) -> None:
        self._run, self._steady = quicken(graph).forward, tuple(steady)
        self._seen: list[tuple[Tensor, int]] = []
        self._kept: tuple[Tensor, ...] = ()

    def __call__(self, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the body takes beside its inputs: computed anew if one of them is another tensor, or was written to."""
        seen = self._seen
        for place, i in enumerate(self._steady):
            if not seen or seen[place][0] is not leaves[i] or seen[place][1] != leaves[i]._version:
                given = [leaves[i] for i in self._steady]
                self._kept = self._run(*given)
                self._seen = [(leaf, leaf._version) for leaf in given]
                break
        return self._kept

    def around(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """The whole function."""
        return lambda *leaves: body(*leaves, *self(leaves))
