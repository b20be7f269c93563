"""A function of one chain, run for all chains at once: vectorised, staged into a graph, compiled, each rung checked.

    looped     one chain after the other, Pyro's handlers at every call
    vmapped    all chains at once (``torch.func.vmap``), Pyro's handlers at every call
    staged     all chains at once, recorded once as a graph of tensor operations: no Pyro, no Python of the program
    compiled   that graph, compiled to machine code

A run climbs as far as its configuration pays for: the rung follows from the number of evaluations that the configuration
asks for and the size of the graph alone. ``PYRO_GENMODELS_RUNG`` set to one of the names forbids the rungs above it. A
rung is tried once a function has been called a dozen times with inputs of the same shapes, and trusted after its values
have equalled those of the rung below at three different inputs.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import grad, grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from inference.contract import Unsupported
from inference.enumeration import draw_back, eliminate, factors, indices, log_normalizer, plates_of
from inference.program import Program
from inference.recording import is_random, record
from inference.rows import rewritten

__all__ = ["RUNGS", "Density", "Staged", "Unconstrained", "fold", "highest_rung", "merge"]

RUNGS = ("looped", "vmapped", "staged", "compiled")
_CHECKS = 2
_PATIENCE = 12  # calls before a graph is recorded, which costs as much as about so many
_LARGEST_COMPILED = 600  # nodes; larger graphs stay staged (compile time grows faster than the gain)
_LARGEST_STAGED = 100_000
_SECONDS_PER_NODE = 5e-6  # dispatch of one tensor operation, measured
_SECONDS_TO_COMPILE = (5.0, 0.02)  # constant and per node, measured on two cores without a cache
_ENOUGH = sys.maxsize
_COMPILER: dict[str, Any] = {"cpp.vec_isa_ok": True}  # trusts the processor's flags; asking the compiler takes ten seconds

_EXACT, _ROWS = "row by row", "has rows"  # keys among those of inputs and functions, which are no plain words

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
    """The graph for inputs of one shape, how often to hold it against the program yet, and what its rung was chosen for."""

    calls: int = 0
    checks: int = 0
    evaluations: int = -1
    graph: fx.GraphModule | None = None
    run: Callable[..., Any] | None = None
    strides: list[list[int]] | None = None

    @property
    def rung(self) -> str:
        """What ``run`` is; nothing without a graph."""
        return "" if self.run is None else "staged" if self.run is self.graph else "compiled"


class Staged:
    """``function`` of one chain, called with a leading chain axis.

    Args:
        function: Takes trees of tensors without the chain axis, returns a tree of tensors.
        batched: For each argument, whether it has a chain axis.
        name: Of the program, for errors.
        evaluations: How many calls the run's configuration asks for; may be raised later.
        rung: The highest rung allowed; None reads ``PYRO_GENMODELS_RUNG``.
        has_rows: Tells whether ``function`` has matrix products of normal rows, which are NaN where their rounding would
            show (``inference.rows``); it is evaluated row by row then.

    Attributes:
        rung: The rung that the last call ran on.
        nodes: Size of its graph, 0 if there is none.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        batched: tuple[bool, ...],
        *,
        name: str = "The program",
        evaluations: int = 0,
        rung: str | None = None,
        has_rows: Callable[[], bool] | None = None,
    ) -> None:
        self.name, self.evaluations, self.has_rows = name, evaluations, has_rows
        self.function = function if has_rows is None else rewritten()(function)
        self.exact = None if has_rows is None else Staged(rewritten(False)(function), batched, name=name, rung=rung)
        self.in_dims = tuple(0 if is_batched else None for is_batched in batched)
        self.limit = highest_rung(rung)
        self.rung, self.nodes = "", 0
        self.patience = _PATIENCE if rung is None else 0
        self._variants: dict[Hashable, _Variant] = {}
        self._past: dict[str, Any] = {}

    @property
    def calls(self) -> dict[str, Any]:
        """For each shape of the inputs, how often it was called and on which rung it is: what json can hold."""
        now = {
            repr(key): [v.calls, v.checks, v.evaluations, v.rung, v.strides, self.evaluations]
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
        calls, checks, evaluations, rung, strides, asked = self._past[repr(key)]
        self.evaluations = max(self.evaluations, asked)
        variant = _Variant(calls)
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
        found = self._evaluated(*inputs)
        if self.exact is None or self.has_rows is None or not self.has_rows() or not _has_nan(found):
            return found
        return self.row_by_row(*(inputs if instead is None else instead()))

    def row_by_row(self, *inputs: Any) -> Any:
        """The value without matrix products of rows."""
        if self.exact is None:
            return self(*inputs)
        self.exact.evaluations = self.evaluations
        return self.exact(*inputs)

    def _evaluated(self, *inputs: Any) -> Any:
        leaves, structure = tree_flatten(inputs)
        key = tuple((tuple(leaf.shape), leaf.dtype, leaf.device) for leaf in leaves)
        with torch.no_grad():
            if key not in self._variants:
                self._variants[key] = self._recalled(key, leaves, structure)
            variant = self._variants[key]
            if variant.calls == self.patience:
                self._stage(variant, leaves, structure)
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
                if not _equal(variant.run(*leaves), expected):
                    self._step_down(variant)
            return expected

    def _reference(self, *inputs: Any) -> Any:
        if self.limit == 0:
            return self._looped(*inputs)
        try:
            return vmap(self.function, in_dims=self.in_dims)(*inputs)
        except Exception as error:
            raise _translated(error, self.name) from error

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

        def flat(*flat_leaves: Tensor) -> Any:
            return vmap(self.function, in_dims=self.in_dims)(*tree_unflatten(list(flat_leaves), structure))

        try:
            graph = fold(merge(record(flat, leaves)))
        except Exception as error:
            _log.info("%s cannot be staged (%s); running without a graph.", self.name, error)
            return
        self.nodes = len(graph.graph.nodes)
        if self.nodes <= _LARGEST_STAGED:
            variant.graph = variant.run = graph
            variant.strides = [[*leaf.detach().clone().stride()] for leaf in leaves]  # as they were recorded
            variant.checks, self.rung = _CHECKS, "staged"

    def _compile(self, variant: _Variant, leaves: list[Tensor]) -> None:
        variant.evaluations = self.evaluations
        if self.limit < RUNGS.index("compiled") or not self._pays_to_compile():
            return
        from torch._inductor import config as inductor  # imported where it is used: it takes seconds

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the compiler's own deprecations
                assert variant.graph is not None
                options = {**_COMPILER, "deterministic": True} if hasattr(inductor, "deterministic") else _COMPILER
                compiled = torch.compile(variant.graph, dynamic=False, fullgraph=True, options=options)
                compiled(*leaves)
        except Exception as error:
            _log.info("%s cannot be compiled (%s); running the staged graph.", self.name, error)
            return
        variant.run, variant.checks, self.rung = compiled, _CHECKS, "compiled"
        variant.evaluations = _ENOUGH

    def _step_down(self, variant: _Variant) -> None:
        _log.info("%s: a %s graph gave other values than the program; running without it.", self.name, self.rung)
        if variant.run is variant.graph:
            variant.graph = variant.run = None
            self.rung = "vmapped"
        else:
            variant.run, variant.checks, self.rung = variant.graph, _CHECKS, "staged"

    def _pays_to_compile(self) -> bool:
        constant, per_node = _SECONDS_TO_COMPILE
        saved = self.evaluations * self.nodes * _SECONDS_PER_NODE
        has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)
        return self.nodes <= _LARGEST_COMPILED and saved > constant + per_node * self.nodes and has_compiler


def _has_nan(tree: Any) -> bool:
    return any(bool(leaf.isnan().any()) for leaf in tree_flatten(tree)[0] if leaf.is_floating_point())


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


def fold(graph: fx.GraphModule) -> fx.GraphModule:
    """Evaluates once, in place, what does not depend on the inputs of a graph: data, constants and priors.

    What an in-place operation may write to is left alone: a constant that is written to would remember.
    """
    changing = _changing(graph)
    known: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        filled = _filled(node) if node not in changing else None
        if filled is not None:
            known[node] = filled
        elif node.op == "get_attr":
            known[node] = getattr(graph, node.target)
        elif node.op == "call_function" and node not in changing and all(i in known for i in node.all_input_nodes):
            arguments = fx.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
            known[node] = node.target(*arguments[0], **arguments[1])
    for count, (node, value) in enumerate(known.items()):
        needed = node.op == "call_function" and any(user not in known for user in node.users)
        if needed and isinstance(value, Tensor):
            name = f"_folded_{count}"
            graph.register_buffer(name, value.contiguous(), persistent=False)
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.get_attr(name))
    for node in reversed(list(known)):  # also checks for errors, which dead-code elimination keeps
        if not node.users:
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(lambda node: node.is_impure() or _is_mutable(node))
    graph.recompile()
    return graph


def merge(graph: fx.GraphModule) -> fx.GraphModule:
    """Does in place once what a graph does twice: equal operations on equal arguments, whose memory nothing writes to.

    The names that autograd gives to one tensor (``detach``, ``alias``, the transpose of a transpose) become one.
    """
    changing = _changing(graph)
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        same = _renamed(node)
        if same is None and node not in changing:
            leaves, structure = tree_flatten((node.args, dict(node.kwargs)))
            # 1, 1.0 and True are equal, and so are 0.0 and -0.0
            literal = tuple(leaf if isinstance(leaf, fx.Node) else repr(leaf) for leaf in leaves)
            key = (node.target, str(structure), literal)
            same = seen.setdefault(key, node)
        if same is not None and same is not node:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


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


def _changing(graph: fx.GraphModule) -> set[fx.Node]:
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
    declared = node.target._schema.arguments  # type: ignore[union-attr]
    pairs = zip(declared, node.args, strict=False)
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


class Unconstrained:
    """Coordinates: the values of some continuous sites as one vector of unconstrained numbers.

    Args:
        program: The program.
        sites: Names of the sites, in the order of the vector.
    """

    def __init__(self, program: Program, sites: Collection[str]) -> None:
        self.sites = tuple(sites)
        self.transforms = {name: program.latents[name].transform for name in self.sites}
        self.shapes = {name: self.transforms[name].inverse_shape(program.latents[name].shape) for name in self.sites}
        self.sizes = [self.shapes[name].numel() for name in self.sites]
        self.size = sum(self.sizes)

    def values(self, position: Tensor) -> dict[str, Tensor]:
        """(…, size) -> site to constrained value (…, *site)."""
        parts = position.split(self.sizes, -1)
        lead = position.shape[:-1]
        return {
            name: self.transforms[name](part.reshape(lead + self.shapes[name]))
            for name, part in zip(self.sites, parts, strict=True)
        }

    def position(self, values: Mapping[str, Tensor]) -> Tensor:
        """Site to constrained value (chain, *site) -> (chain, size)."""
        parts = [self.transforms[name].inv(values[name]) for name in self.sites]
        return torch.cat([part.reshape(part.shape[0], -1) for part in parts], -1)

    def log_jacobian(self, position: Tensor) -> Tensor:
        """log |d values / d position| at a vector (size,); a scalar."""
        total = position.new_zeros(())
        for name, part in zip(self.sites, position.split(self.sizes, -1), strict=True):
            unconstrained = part.reshape(self.shapes[name])
            transform = self.transforms[name]
            total = total + transform.log_abs_det_jacobian(unconstrained, transform(unconstrained)).sum()
        return total


class Density:
    """The densities of a program over a leading chain axis.

    Args:
        program: The program.
        evaluations: How many evaluations the run's configuration asks for; decides the rung.
        rung: The highest rung allowed; None reads ``PYRO_GENMODELS_RUNG``.
    """

    def __init__(self, program: Program, evaluations: int = 0, rung: str | None = None) -> None:
        self.program, self.evaluations, self.limit = program, evaluations, rung
        self.functions: dict[Hashable, Staged] = {}
        self._past: dict[str, Any] = {}

    @property
    def calls(self) -> dict[str, Any]:
        """How often every function was called, and on which rung it is: what json can hold."""
        now: dict[str, Any] = {repr(key): staged.calls for key, staged in self.functions.items()}
        return self._past | now | {_ROWS: self.program.has_rows}

    def recall(self, calls: Mapping[str, Any]) -> None:
        """Goes on as the density whose ``calls`` these are would."""
        self._past = {key: known for key, known in calls.items() if key != _ROWS}
        self.program.has_rows = calls.get(_ROWS, self.program.has_rows)
        for key, staged in self.functions.items():
            staged.recall(self._past.get(repr(key), {}))

    def stage(
        self, key: Hashable, function: Callable[..., Any], batched: tuple[bool, ...], evaluations: int | None = None
    ) -> Staged:
        """``function`` for all chains; the same ``key`` gives the same staged function again.

        ``evaluations`` is how many calls are asked for here, where they are fewer than the run makes in all.
        """
        if key not in self.functions:
            self.functions[key] = Staged(
                function, batched, name=self.program.name, rung=self.limit, has_rows=lambda: self.program.has_rows
            )
            self.functions[key].recall(self._past.get(repr(key), {}))
        staged = self.functions[key]
        staged.evaluations = max(staged.evaluations, self.evaluations if evaluations is None else evaluations)
        return staged

    @cached_property
    def joint(self) -> Staged:
        """Values of all latent sites, site to (chain, *site) -> log p(values, data), (chain,)."""
        return self.stage("joint", lambda values: self.program.log_joint(values), (True,))

    @cached_property
    def deterministics(self) -> Staged:
        """Values of all latent sites -> values of the ``pyro.deterministic`` statements, (chain, *site)."""
        return self.stage("deterministics", lambda values: self.program.deterministics(values), (True,))

    def marginal(self, enumerated: Collection[str]) -> Staged:
        """Values of the other latent sites -> log p with the finite sites ``enumerated`` summed out, (chain,)."""
        sites = tuple(enumerated)
        return self.stage(("marginal", sites), lambda values: log_normalizer(self.program, values, sites), (True,))

    def unconstrained(
        self,
        coordinates: Unconstrained,
        enumerated: Collection[str] = (),
        gradient: bool = True,
        evaluations: int | None = None,
    ) -> Staged:
        """(position (chain, size), other values) -> log-density of the position, or (gradient, log-density)."""
        sites = tuple(enumerated)

        def log_density(position: Tensor, others: Mapping[str, Tensor]) -> Tensor:
            values = {**others, **coordinates.values(position)}
            return log_normalizer(self.program, values, sites) + coordinates.log_jacobian(position)

        key = ("unconstrained", coordinates.sites, sites, gradient)

        def with_gradient(position: Tensor, others: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            # a closure: what is an argument of grad_and_value is wrapped, and a wrapped integer cannot be an index
            return grad_and_value(lambda p: log_density(p, others))(position)

        return self.stage(key, with_gradient if gradient else log_density, (True, True), evaluations)

    def slopes(self, sites: Collection[str], enumerated: Collection[str]) -> Staged:
        """(values of ``sites``) -> (gradient, log p) with ``enumerated`` summed out; all on the constrained scale."""
        finite = tuple(enumerated)

        def slopes(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
            return grad_and_value(lambda v: log_normalizer(self.program, v, finite))(values)

        return self.stage(("slopes", tuple(sites), finite), slopes, (True,))

    def gradients(self, site: str) -> Staged:
        """(points (chain, point, *site), values) -> gradient of the log-joint in ``site`` at each point, same shape."""

        def at_points(points: Tensor, values: Mapping[str, Tensor]) -> Tensor:
            def log_joint(value: Tensor) -> Tensor:
                return self.program.log_joint({**values, site: value})

            return vmap(grad(log_joint))(points)

        return self.stage(("gradients", site), at_points, (True, True))

    def draw(self, sites: Collection[str], evaluations: int | None = None) -> Staged:
        """(values of the other sites, ``uniforms`` of the sites) -> exact joint draw of finite ``sites``, log q."""
        names = tuple(sites)

        def drawn(values: Mapping[str, Tensor], uniforms: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            return self._drawn(values, uniforms, names)[:2]

        return self.stage(("draw", names), drawn, (True, True), evaluations)

    def certify(
        self, sites: Collection[str], values: Mapping[str, Tensor], advice: str, evaluations: int | None = None
    ) -> Tensor:
        """Holds the identity log Z = log p(z, rest) − log q(z | rest) of an enumeration at one draw for every chain.

        Args:
            sites: The finite sites that are summed out.
            values: Values of all latent sites, (chain, *site); those of ``sites`` are not looked at.
            advice: What to do instead, a sentence.
            evaluations: As for ``draw``.

        Returns:
            The largest error, ().

        Raises:
            Unsupported: If it fails: elements of a plate are coupled in a way that enumeration does not see.
        """
        others = {name: value for name, value in values.items() if name not in sites}
        chains = len(next(iter(values.values())))
        if not others:  # nothing that a chain axis could come from
            return torch.zeros((), dtype=self.program.dtype, device=self.program.device)
        drawn, log_q = self.draw(sites, evaluations)(others, self.uniforms(sites, chains))
        joint = self.joint({**others, **drawn})
        error = (joint - log_q - self.marginal(sites)(others)).abs()
        error = torch.where(joint.isfinite(), error, 0.0)
        precision = 1e-10 if self.program.dtype == torch.float64 else 1e-4
        if bool((error > precision * (100.0 + joint.abs())).any()):
            raise Unsupported(
                f"Summing out {', '.join(sites)} does not give the marginal of the program (log-density off by "
                f"{float(error.max()):.1e}): elements of a plate are coupled. {advice}"
            )
        return error.amax()

    def redraw(self, sites: Collection[str]) -> Staged:
        """As ``draw``, with the values of ``sites`` among the values; -> draw, its log q, log q of the present values."""
        names = tuple(sites)

        def redrawn(values: Mapping[str, Tensor], uniforms: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            drawn, log_q, records = self._drawn(values, uniforms, names)

            def present(sites: tuple[str, ...], logits: Tensor) -> Tensor:
                found = [indices(self.program, site, values[site]).reshape(logits.shape[1:-1]) for site in sites]
                return torch.stack(found)

            return drawn, log_q, draw_back(self.program, records, present)[1]

        return self.stage(("redraw", names), redrawn, (True, True))

    def _drawn(
        self, values: Mapping[str, Tensor], uniforms: Tensor, sites: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], Tensor, Any]:
        others = {name: value for name, value in values.items() if name not in sites}
        found = factors(self.program, others, sites)
        _, records = eliminate(found, plates_of(self.program, sites))

        latents, first, offsets = self.program.latents, 0, {}
        for site in sites:
            offsets[site] = first
            first += latents[site].batch_shape.numel()

        def pick(group: tuple[str, ...], logits: Tensor) -> Tensor:
            cumulative = logits.exp().cumsum(-1)
            own = torch.arange(logits.shape[1:-1].numel(), device=logits.device)
            where = torch.tensor([offsets[site] for site in group], device=logits.device)[:, None] + own
            level = uniforms[where].reshape(logits.shape[:-1]).unsqueeze(-1) * cumulative[..., -1:]
            return (cumulative < level).sum(-1)

        picked, log_q = draw_back(self.program, records, pick)
        drawn = {}
        for site in sites:
            choices = latents[site].choices
            assert choices is not None
            zeros = torch.zeros(latents[site].batch_shape, dtype=torch.long, device=choices.device)
            index = picked.get(site, zeros)
            drawn[site] = index.to(choices.dtype) if latents[site].is_indexed else choices[index]
        return drawn, log_q, records

    def uniforms(self, sites: Collection[str], chains: int) -> Tensor:
        """Fresh uniforms for ``draw`` and ``redraw``, one for each element of the sites; (chain, element)."""
        count = sum(self.program.latents[site].batch_shape.numel() for site in sites)
        return torch.rand(chains, count, device=self.program.device, dtype=self.program.dtype)
