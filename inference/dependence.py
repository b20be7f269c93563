"""Which statements of a program depend on which of its sites, seen by following the tensors of one run.

A finite site that takes all its values at once needs a dimension of its own for as long as a statement depends on it, and
no longer: a chain of a thousand states needs two. Nothing has to be marked with ``pyro.markov``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pyro import poutine
from torch import Tensor
from torch.overrides import TorchFunctionMode

from inference.handlers import isolated, reproducible
from inference.sites import is_statement

if TYPE_CHECKING:
    from inference.program import Program

__all__ = ["Followed", "dependence", "is_read", "lanes", "lifetimes", "parameters_follow"]


_READERS = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "__array__")


class Followed(TorchFunctionMode):
    """Passes the names of sites on from the arguments of every torch function to its results.

    Args:
        values: Site to the tensor that the program sees.

    Attributes:
        is_read: Whether Python has read a number that depends on a site, as ``if``, ``int`` and ``.item()`` do.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._alive: list[Tensor] = []  # an id is good only while its tensor lives
        self._sources: dict[int, frozenset[str]] = {}
        self.is_read = False
        for name, value in values.items():
            self._mark(value, frozenset([name]))

    def of(self, tensor: Any) -> frozenset[str]:
        """The sites that a tensor depends on."""
        return self._sources.get(id(tensor), frozenset())

    def _mark(self, tensor: Tensor, sources: frozenset[str]) -> None:
        self._alive.append(tensor)
        self._sources[id(tensor)] = sources | self.of(tensor)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        found: frozenset[str] = frozenset()
        for leaf in _tensors((args, kwargs)):
            found |= self._sources.get(id(leaf), frozenset())
        if found:
            name = getattr(func, "__name__", "")
            self.is_read = self.is_read or name in _READERS
            written = args[:1] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else ()
            for leaf in _tensors((result, written, (kwargs or {}).get("out"))):
                self._mark(leaf, found)
        return result


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for part in tree:
            yield from _tensors(part)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def lifetimes(dependence: Mapping[str, frozenset[str]], sites: Collection[str]) -> dict[str, tuple[int, int]]:
    """Site to the first and the last statement (by its number) that depends on it.

    Args:
        dependence: Statement, in the order of the program, to the sites that its density depends on.
        sites: The sites of interest.
    """
    wanted = set(sites)
    found: dict[str, tuple[int, int]] = {}
    for number, (name, sources) in enumerate(dependence.items()):
        for site in (sources | {name}) & wanted:
            found[site] = (found.get(site, (number,))[0], number)
    return found


def lanes(lives: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Site to the smallest number that no other site has while it lives."""
    taken: dict[int, int] = {}  # lane to the statement after which it is free
    assigned = {}
    for site, (first, last) in sorted(lives.items(), key=lambda item: item[1]):
        lane = next(i for i in range(len(taken) + 1) if taken.get(i, -1) < first)
        assigned[site], taken[lane] = lane, last
    return assigned


def is_read(program: Program, trace: poutine.Trace) -> bool:
    """Whether Python reads the value of a latent site, so that rare sites may hang on it that no look has shown."""
    values = {name: trace.nodes[name]["value"].clone() for name in program.latents}
    with Followed(values) as followed:
        program.trace(values)
    return followed.is_read


def dependence(program: Program, trace: poutine.Trace) -> dict[str, frozenset[str]]:
    """Statement to the finite sites that its density depends on, in the order of the program."""
    values = {name: trace.nodes[name]["value"].clone() for name in program.latents}
    with Followed({name: values[name] for name in program.finite}) as followed:
        nodes = program.trace(values).nodes
        statements = {name: node for name, node in nodes.items() if is_statement(node)}
        return {
            name: followed.of(node["log_prob"]) for name, node in statements.items() if name not in program.deterministic
        }


def parameters_follow(program: Program, name: str) -> frozenset[str]:
    """The latent sites that the parameters of a site's distribution depend on."""
    with isolated(0, program.device), reproducible(program.dtype, program.device):
        nodes = program.trace({}, evaluated=False).nodes
        apart = nodes[name]["value"].detach().clone()
        values = {latent: nodes[latent]["value"].clone() for latent in program.latents}
        with Followed(values) as followed:
            fn = program.trace(values, evaluated=False).nodes[name]["fn"]
            return followed.of(fn.log_prob(apart))
