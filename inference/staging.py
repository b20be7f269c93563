"""A function of one chain, run for all chains at once: vectorised, staged into a graph, compiled, each rung checked.

    looped     one chain after the other, Pyro's handlers at every call
    vmapped    all chains at once (``torch.func.vmap``), Pyro's handlers at every call
    staged     all chains at once, recorded once as a graph of tensor operations: no Pyro, no Python of the program
    compiled   that graph, compiled to machine code

A run climbs as far as its configuration pays for: the rung follows from the number of evaluations that the configuration
asks for and the size of the graph alone. ``PYRO_GENMODELS_RUNG`` set to one of the names forbids the rungs above it. A
rung is tried once a function has been called a dozen times (a long one, four times) with inputs of the same shapes, and
trusted after its values have equalled those of the rung below at three different inputs.

Of a graph that is trusted, the first result can be had alone (``Staged.first``): what only the others need is left out, such
as the log-density where its gradient is all that is wanted.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from inference.contract import Unsupported
from inference.graphs import elements, fold, functional, merge, shortened
from inference.hoisting import Prelude, hoist
from inference.machine_code import compiled, laid_out
from inference.projection import project
from inference.recording import Draft, assuming, constants, draft, is_assuming, quicken, unlikely
from inference.rerolling import reroll
from inference.rows import rewritten
from inference.simplifying import simplified

__all__ = ["RUNGS", "Random", "Staged", "highest_rung"]

RUNGS = ("looped", "vmapped", "staged", "compiled")
_CHECKS = 2
_PATIENCE = (12, 4)  # calls before a graph is recorded, which costs as much as about so many; of short and long programs
_LARGEST_COMPILED = 600  # nodes; larger graphs stay staged (compile time grows faster than the gain)
_LARGEST_STAGED = 100_000
_LONG = 500  # nodes of a graph that may have loops
_SECONDS_PER_NODE = 5e-6  # dispatch of one tensor operation, measured
_SECONDS_PER_ELEMENT = 5e-10  # of one element of its result, that goes to memory and comes back
_SECONDS_TO_COMPILE = (5.0, 0.02)  # constant and per node, measured on two cores without a cache
_SECONDS_TO_COMPILE_AGAIN = 2.5  # the constant, once the compiler is there
_SECONDS_PER_ELEMENT_LESS = 2.5e-9  # that a compiled graph saves by what it leaves out: logarithms of rows, and their sums
_ENOUGH = sys.maxsize
_NO_COMPILER = "would run faster compiled, but there is no C++ compiler: install g++, or name yours in CXX."
_EXACT = "row by row"  # a key among those of inputs, which are no plain words

_log = logging.getLogger("inference")
_REFUSALS = (
    (".item()", "turns a latent value into a Python number (.item(), float(), int() or a loop bound)"),
    ("data-dependent control flow", "branches in Python on a latent value (if, while, assert, bool())"),
    ("data pointer", "hands a latent value to numpy"),
    ("numpy()", "hands a latent value to numpy"),
    ("is not possible because there exists a Tensor", "writes a latent value into a tensor of its own"),
    ("out=", "writes a latent value into a tensor of its own"),
    ("setup_context", "uses a torch.autograd.Function that has no setup_context"),
    ("generate_vmap_rule", "uses a torch.autograd.Function that has no generate_vmap_rule = True"),
    ("randomness", "draws random numbers outside pyro.sample"),
)


def _translated(error: Exception, name: str) -> Exception:
    text = str(error)
    for mark, reason in _REFUSALS:
        if mark in text:
            return Unsupported(
                f"{name} {reason}, which cannot be differentiated or run for many chains at once. Use torch operations "
                "instead, for example torch.where or torch.cat."
            )
    return error


@dataclass
class _Variant:
    """The graph for inputs of one shape, how often to hold it against the program yet, and what its rung was chosen for.

    ``plain`` is the graph before its rows were projected, while that is on trial; ``body`` what is left of the graph
    without ``prelude``, which computes what depends on ``steady`` inputs alone (``inference.hoisting``). ``first`` gives the
    first result alone, once it has been asked for; ``is_whole`` if it was refused a graph of its own, since that gave
    something else.
    """

    calls: int = 0
    checks: int = 0
    evaluations: int = -1
    graph: fx.GraphModule | None = None
    plain: Draft | None = None
    steady: tuple[int, ...] = ()
    body: fx.GraphModule | None = None
    prelude: Prelude | None = None
    run: Callable[..., Any] | None = None
    strides: list[list[int]] | None = None
    is_compiled: bool = False
    is_plain: bool = False
    first: Callable[..., Any] | None = None
    is_whole: bool = False

    @property
    def rung(self) -> str:
        """What ``run`` is; nothing without a graph."""
        return "" if self.run is None else "compiled" if self.is_compiled else "staged"

    def interpret(self) -> fx.GraphModule:
        """Takes the graph as it is; what of it is run at every call."""
        assert self.graph is not None
        self.prelude, self.body = _apart(self.graph, self.steady)
        self.take(quicken(self.body).forward, is_compiled=False)
        return self.body

    def take(self, body: Callable[..., Any], is_compiled: bool) -> None:
        """Runs the body this way."""
        self.run, self.is_compiled, self.first = _around(self.prelude, body), is_compiled, None


def _apart(graph: fx.GraphModule, steady: Sequence[int]) -> tuple[Prelude | None, fx.GraphModule]:
    """What is computed when steady inputs change, and what at every call."""
    before, body = hoist(graph, steady)
    return None if before is None else Prelude(before, steady), body


def _around(prelude: Prelude | None, body: Callable[..., Any]) -> Callable[..., Any]:
    """A body as a function of the inputs alone."""
    return body if prelude is None else prelude.around(body)


class Staged:
    """``function`` of one chain, called with a leading chain axis.

    Args:
        function: Takes trees of tensors without the chain axis, returns a tree of tensors.
        batched: For each argument, whether it has a chain axis.
        name: Of the program, for errors.
        steady: For each argument, whether it is often the same tensors as at the call before.
        evaluations: How many calls the run's configuration asks for; may be raised later.
        rung: The highest rung allowed; None reads ``PYRO_GENMODELS_RUNG``.
        is_long: Whether a call without a graph is dear.
        said: Sentences that have been said in this run; shared by all its functions, so that each is said once.
        has_rows: Tells whether ``function`` has matrix products of normal rows, which are NaN where their rounding would
            show (``inference.rows``); it is evaluated row by row then.

    Attributes:
        rung: The rung that the last call ran on.
        nodes: Size of the graph that is run at every call, 0 if there is none.
        elements: Of all that it computes, number.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        batched: tuple[bool, ...],
        *,
        name: str = "The program",
        steady: tuple[bool, ...] = (),
        evaluations: int = 0,
        rung: str | None = None,
        is_long: bool = False,
        has_rows: Callable[[], bool] | None = None,
        said: set[str] | None = None,
    ) -> None:
        self.name, self.evaluations, self.has_rows = name, evaluations, has_rows
        self.said = set() if said is None else said
        self.function = function if has_rows is None else rewritten()(function)
        self.exact = (
            None
            if has_rows is None
            else Staged(rewritten(False)(function), batched, name=name, steady=steady, rung=rung, is_long=is_long, said=said)
        )
        self.steady = steady
        self.in_dims = tuple(0 if is_batched else None for is_batched in batched)
        self.limit = highest_rung(rung)
        self.rung, self.nodes, self.elements = "", 0, 0
        self.patience = _PATIENCE[is_long] if rung is None else 0
        self._variants: dict[Hashable, _Variant] = {}
        self._past: dict[str, Any] = {}

    @property
    def calls(self) -> dict[str, Any]:
        """For each shape of the inputs, how often it was called and on which rung it is: what json can hold."""
        now = {
            repr(key): [v.calls, v.checks, v.evaluations, v.rung, v.strides, v.is_plain, v.is_whole, self.evaluations]
            for key, v in self._variants.items()
        }
        exact = {} if self.exact is None else self.exact.calls
        return self._past | now | ({_EXACT: exact} if exact else {})

    def recall(self, calls: Mapping[str, Any]) -> None:
        """Goes on as if it had been called so often: values of two rungs differ in their last digits.

        Graphs are made anew when they are needed.
        """
        self._past = {key: known for key, known in calls.items() if key != _EXACT}
        self._variants.clear()
        if self.exact is not None:
            self.exact.recall(calls.get(_EXACT, {}))

    def _recalled(self, key: Hashable, leaves: list[Tensor], structure: Any) -> _Variant:
        """What is known of inputs of this shape from an earlier run, with its graph."""
        if repr(key) not in self._past:
            return _Variant()
        calls, checks, evaluations, rung, strides, is_plain, is_whole, asked = self._past[repr(key)]
        self.evaluations = max(self.evaluations, asked)
        variant = _Variant(calls, is_plain=is_plain, is_whole=is_whole)
        if rung:
            pairs = zip(leaves, strides, strict=True)
            alike = [torch.empty_strided(leaf.shape, s, dtype=leaf.dtype, device=leaf.device) for leaf, s in pairs]
            self._stage(variant, [a.copy_(leaf) for a, leaf in zip(alike, leaves, strict=True)], structure)
        if rung == "compiled" and variant.graph is not None:
            self._compile(variant, leaves)
        variant.checks, variant.evaluations = checks, evaluations
        return variant

    def __call__(self, *inputs: Any, instead: Callable[[], tuple[Any, ...]] | None = None) -> Any:
        """The value; ``instead`` gives inputs that take the place of ``inputs`` row by row."""
        found = self._reference(*inputs) if is_assuming() else self._evaluated(*inputs)
        if self.exact is None or self.has_rows is None or not self.has_rows() or not unlikely(_has_nan(found)):
            return found
        return self.row_by_row(*(inputs if instead is None else instead()))

    def row_by_row(self, *inputs: Any) -> Any:
        """The value without matrix products of rows."""
        if self.exact is None:
            return self(*inputs)
        self.exact.evaluations = self.evaluations
        return self.exact(*inputs)

    def first(self, *inputs: Any) -> Any:
        """The first of the results alone, without what only the others need; if compiled, equal up to rounding.

        Until a graph is trusted it is taken from all results; so it is of a program with products of rows, where it may be
        another that shows the rounding.
        """
        if is_assuming() or (self.exact is not None and self.has_rows is not None and self.has_rows()):
            return self(*inputs)[0]
        leaves = _leaves(_sorted(inputs))
        variant = self._variants.get(_key(leaves))
        if variant is None or variant.run is None or variant.checks or variant.evaluations < self.evaluations:
            return self._evaluated(*inputs)[0]
        with torch.no_grad():
            return self._shorten(variant, leaves) if variant.first is None else variant.first(*leaves)

    def _shorten(self, variant: _Variant, leaves: list[Tensor]) -> Any:
        """Finds the graph of the first result, held once against that of all."""
        whole, graph = variant.run, variant.graph
        assert whole is not None and graph is not None
        variant.first = lambda *leaves: whole(*leaves)[0]
        expected = variant.first(*leaves)
        if variant.is_whole:
            return expected
        short = fold(merge(functional(shortened(graph)))).written()
        prelude, body = _apart(short, variant.steady)
        if variant.is_compiled:
            assert variant.body is not None
            nodes, saved = len(body.graph.nodes), elements(variant.body) - elements(body)
            per_node = _SECONDS_TO_COMPILE[1]
            if self.evaluations * saved * _SECONDS_PER_ELEMENT_LESS <= _SECONDS_TO_COMPILE_AGAIN + per_node * nodes:
                return expected
        made = self._machine_code(body, prelude, leaves, variant.strides) if variant.is_compiled else quicken(body).forward
        run = None if made is None else _around(prelude, made)
        found = expected if run is None else run(*leaves)
        if run is None or not _equal(found, expected):
            _log.info("%s: the first result alone was another; running the graph of all results.", self.name)
            variant.is_whole = True
            return expected
        variant.first = run
        return found

    def _evaluated(self, *inputs: Any) -> Any:
        inputs = _sorted(inputs)
        leaves = _leaves(inputs)
        key = _key(leaves)
        with torch.no_grad():
            variant = self._variants.get(key)
            if variant is None:
                variant = self._variants[key] = self._recalled(key, leaves, tree_flatten(inputs)[1])
            if variant.calls == self.patience:
                self._stage(variant, leaves, tree_flatten(inputs)[1])
            if variant.graph is not None and variant.evaluations < self.evaluations:
                self._compile(variant, leaves)
            variant.calls += 1
            if variant.run is not None and not variant.checks:
                return variant.run(*leaves)
            expected = self._reference(*inputs)
            if variant.run is None:
                self.rung = RUNGS[min(self.limit, 1)]
            else:
                variant.checks -= 1
                if not self._is_alike(variant.run, leaves, expected):
                    self._step_down(variant, leaves, expected)
                elif not variant.checks:
                    variant.plain = None
            return expected

    def _reference(self, *inputs: Any) -> Any:
        if self.limit == 0:
            return self._looped(*inputs)
        try:
            return vmap(self.function, in_dims=self.in_dims)(*inputs)
        except Exception as error:
            raise _translated(error, self.name) from error

    def _steady_leaves(self, structure: Any) -> tuple[int, ...]:
        """The numbers of the tensors of those arguments that seldom change."""
        arguments = tree_unflatten([*range(structure.num_leaves)], structure)
        owners = [i for i, argument in enumerate(arguments) for _ in tree_flatten(argument)[0]]
        return tuple(leaf for leaf, i in enumerate(owners) if i < len(self.steady) and self.steady[i])

    def _is_alike(self, run: Callable[..., Any], leaves: list[Tensor], expected: Any) -> bool:
        """Whether a graph gives what the function gave."""
        return _equal(run(*leaves), expected)

    def _flat(self, leaves: Sequence[Tensor], structure: Any) -> Any:
        """What is recorded."""
        return vmap(self.function, in_dims=self.in_dims)(*tree_unflatten(list(leaves), structure))

    def _looped(self, *inputs: Any) -> Any:
        leaves = tree_flatten([i for i, dim in zip(inputs, self.in_dims, strict=True) if dim == 0])[0]
        rows = [
            self.function(
                *(
                    tree_map(_element(c), value) if dim == 0 else value
                    for value, dim in zip(inputs, self.in_dims, strict=True)
                )
            )
            for c in range(len(leaves[0]))
        ]
        return tree_map(lambda *parts: torch.stack(parts), *rows)

    def _stage(self, variant: _Variant, leaves: list[Tensor], structure: Any) -> None:
        if self.limit < RUNGS.index("staged"):
            return
        try:
            graph, plain = self._drafted(lambda *flat: self._flat(flat, structure), leaves, variant.is_plain)
        except Exception as error:
            _log.info("%s cannot be staged (%s); running without a graph.", self.name, error)
            return
        graph = fold(merge(simplified(functional(graph))))
        if len(graph.graph.nodes) <= _LARGEST_STAGED:
            variant.graph, variant.plain, variant.is_plain = graph.written(), plain, plain is None
            variant.steady = self._steady_leaves(structure)
            body = variant.interpret()
            self.nodes, self.elements = len(body.graph.nodes), elements(body)
            variant.strides = [[*leaf.detach().clone().stride()] for leaf in leaves]  # as they were recorded
            variant.checks, self.rung = _CHECKS, "staged"

    def _drafted(self, flat: Callable[..., Any], leaves: list[Tensor], is_plain: bool) -> tuple[Draft, Draft | None]:
        """The graph of ``flat``, with its loops rolled up if it is long; and the same before its rows were projected."""
        graph, plain = fold(merge(draft(flat, leaves))), None
        if not is_plain:
            before = Draft(constants(graph), copy.deepcopy(graph.graph))
            if project(graph):
                graph, plain = fold(merge(graph)), before
        if len(graph.graph.nodes) < _LONG:
            return graph, plain
        try:
            rolled = fold(merge(reroll(graph, leaves)))
        except Exception as error:
            _log.info("The loops of %s stay as they are (%s).", self.name, error)
            return fold(merge(draft(flat, leaves))), None
        return min(rolled, graph, key=lambda found: len(found.graph.nodes)), plain

    def _compile(self, variant: _Variant, leaves: list[Tensor]) -> None:
        variant.evaluations = self.evaluations
        if self.limit < RUNGS.index("compiled") or not self._pays_to_compile():
            return
        assert variant.body is not None
        code = self._machine_code(variant.body, variant.prelude, leaves, variant.strides)
        if code is not None:
            variant.take(code, is_compiled=True)
            variant.checks, self.rung, variant.evaluations = _CHECKS, "compiled", _ENOUGH

    def _machine_code(
        self, body: fx.GraphModule, prelude: Prelude | None, leaves: list[Tensor], layout: list[list[int]] | None
    ) -> Callable[..., Any] | None:
        """A graph without its prelude compiled; None if the compiler does not take it."""
        assert layout is not None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own deprecations
                leaves = laid_out(leaves, [tuple(stride) for stride in layout])  # as for a run that goes on
                kept = () if prelude is None else prelude(leaves)
                code = compiled(body, [*leaves, *kept], [*layout, *([*tensor.stride()] for tensor in kept)])
                code(*leaves, *kept)
        except Exception as error:
            _log.info("%s cannot be compiled (%s); running the staged graph.", self.name, error)
            return None
        return code

    def _step_down(self, variant: _Variant, leaves: list[Tensor], expected: Any) -> None:
        plain = None if variant.is_compiled or variant.plain is None else variant.plain.written()
        _log.info("%s: a %s graph gave other values than the program; running without it.", self.name, self.rung)
        if variant.is_compiled:
            variant.interpret()
            variant.checks, self.rung = _CHECKS, "staged"
        elif plain is not None and self._is_alike(plain, leaves, expected):
            variant.graph, variant.plain, variant.is_plain, variant.checks = plain, None, True, _CHECKS
            variant.interpret()
        else:
            variant.graph = variant.run = variant.plain = variant.body = variant.prelude = variant.first = None
            self.rung = "vmapped"

    def _pays_to_compile(self) -> bool:
        constant, per_node = _SECONDS_TO_COMPILE
        saved = self.evaluations * (self.nodes * _SECONDS_PER_NODE + self.elements * _SECONDS_PER_ELEMENT)
        if self.nodes > _LARGEST_COMPILED or saved <= constant + per_node * self.nodes:
            return False
        if any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
            return True
        if _NO_COMPILER not in self.said:
            self.said.add(_NO_COMPILER)
            _log.warning("%s %s", self.name, _NO_COMPILER)
        return False


class Random(Staged):
    """A function of all chains that draws random numbers, and decides on nothing but what is ``unlikely``.

    A graph draws the same numbers in the same order. Where something unlikely has happened, the function is called again
    from where the random numbers were.

    Args:
        function: Takes trees of tensors with a chain axis, returns a tree of tensors.
        device: Whose random numbers it draws.
        **rest: Those of ``Staged``.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device, **rest: Any) -> None:
        super().__init__(function, (), **rest)
        self.device = device

    def __call__(self, *inputs: Any, instead: Any = None) -> Any:
        before = self._numbers()
        found, has_happened = self._evaluated(*inputs)
        if has_happened is None or not bool(has_happened):
            return found
        self._rewind(before)
        return self.function(*inputs)

    def first(self, *inputs: Any) -> Any:
        return self(*inputs)[0]

    def _numbers(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _rewind(self, numbers: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(numbers, self.device)
        else:
            torch.set_rng_state(numbers)

    def _stage(self, variant: _Variant, leaves: list[Tensor], structure: Any) -> None:
        before = self._numbers()  # which recording uses up, and a run that goes on records elsewhere
        super()._stage(variant, leaves, structure)
        self._rewind(before)

    def _compile(self, variant: _Variant, leaves: list[Tensor]) -> None:
        before = self._numbers()
        super()._compile(variant, leaves)
        self._rewind(before)

    def _reference(self, *inputs: Any) -> Any:
        self._before = self._numbers()
        return self.function(*inputs), None

    def _is_alike(self, run: Callable[..., Any], leaves: list[Tensor], expected: Any) -> bool:
        after = self._numbers()
        self._rewind(self._before)
        found, has_happened = run(*leaves)
        is_alike = _equal((found, self._numbers()), (expected[0], after))
        self._rewind(after)
        return is_alike or (has_happened is not None and bool(has_happened))

    def _flat(self, leaves: Sequence[Tensor], structure: Any) -> Any:
        with assuming() as conditions:
            found = self.function(*tree_unflatten(list(leaves), structure))
        return found, torch.stack(conditions).any() if conditions else None


def _sorted(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same trees, with the entries of each in the order of their names."""
    return tuple({name: x[name] for name in sorted(x)} if isinstance(x, dict) else x for x in inputs)


def _key(leaves: list[Tensor]) -> Hashable:
    """What a graph is recorded for."""
    return tuple([(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves])


def _leaves(inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors of some trees, in the order of ``tree_flatten``, which takes ten times as long for what is usual."""
    leaves: list[Tensor] = []
    for tree in inputs:
        _gather(tree, leaves)
    return leaves


def _gather(tree: Any, leaves: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        leaves.append(tree)
    elif isinstance(tree, tuple):
        for part in tree:
            _gather(part, leaves)
    elif type(tree) is dict:
        for part in tree.values():
            _gather(part, leaves)
    else:
        leaves.extend(tree_flatten(tree)[0])


def _has_nan(tree: Any) -> Tensor:
    found = [leaf.isnan().any() for leaf in tree_flatten(tree)[0] if leaf.is_floating_point()]
    return found[0] if len(found) == 1 else torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool)


def highest_rung(rung: str | None = None) -> int:
    """The number of the highest rung allowed; None reads ``PYRO_GENMODELS_RUNG``."""
    limit = rung or os.environ.get("PYRO_GENMODELS_RUNG") or "compiled"
    if limit not in RUNGS:
        raise ValueError(f"PYRO_GENMODELS_RUNG is '{limit}', but must be one of {', '.join(RUNGS)}.")
    return RUNGS.index(limit)


def _element(index: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[index]


def _equal(left: Any, right: Any) -> bool:
    pairs = zip(tree_flatten(left)[0], tree_flatten(right)[0], strict=True)
    return all(
        torch.allclose(a, b, rtol=1e-9 if a.dtype == torch.float64 else 1e-4, atol=1e-9, equal_nan=True)
        if a.is_floating_point()
        else torch.equal(a, b)
        for a, b in pairs
    )
