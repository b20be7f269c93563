"""The loss of one stochastic step and its gradients, recorded once as a graph of tensor operations.

Forward and backward pass are one graph; random operations are recorded as such and draw afresh at each call. What the
program reads twice is computed once there, no handler of Pyro runs, and no Python of the program. A graph is trusted
after its loss, its gradients, what it wrote into buffers and what it took from the random generator have equalled those
of the program, from equal states. On a GPU its kernels are then captured, and started by one call; this is held against
the program as well.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from inference.capture import Captured
from inference.graphs import apart, fold, merge
from inference.recording import draft, quicken
from inference.staging import RUNGS, highest_rung

__all__ = ["Objective"]

_PATIENCE = 12  # steps before a graph is recorded, which costs as much as about so many
_CHECKS = 2  # of a way that is new; after them, at every power of two of steps
_LARGEST = 100_000  # nodes of a graph
_VARIANTS = 16  # graphs for other batch shapes and other states of the Python objects
_CAPTURED = 2  # of them, each of which keeps the memory of a step
_ALLOWED, _ALLOWED_OF_VALUES = 16.0, 4.0  # roundings, of gradients and of what is no gradient
_SMALL = 0.01  # share of the largest gradient, below which one may be rounding alone
_STAGED = RUNGS.index("staged")

_log = logging.getLogger("inference")

Loss = Callable[[list[Tensor] | None, bool], tuple[Tensor, Tensor]]


class _Way(NamedTuple):
    """One way to run a recorded step.

    Attributes:
        name: "recorded", "compiled" or "captured".
        run: Takes the data, then the weights and buffers; returns the loss and the gradients.
        eps: That of a smaller floating type, whose roundings a compiler leaves out in part; 0 where the operations are the
            program's own.
    """

    name: str
    run: Callable[..., Any]
    eps: float = 0.0


class _Variant:
    """The graph for one batch shape, and how often it was asked for."""

    def __init__(self, shapes: Hashable, alive: list[Tensor]) -> None:
        self.shapes = shapes  # of a batch
        self.alive = alive  # an id in a key is good only while its tensor lives
        self.calls = self.recorded = 0
        self.ways: list[_Way] = []  # the last is taken; those before it are for where that gives other values
        self.tried: list[str] = []  # names of ways
        self.proofs = 0  # how often the last way has been held against the program
        self.held: list[Tensor] = []  # weights and buffers, which the graph takes after the data

    @property
    def is_due(self) -> bool:
        """Whether the last way is to be held against the program at this call."""
        since = self.calls - self.recorded
        return self.proofs < _CHECKS or not since & (since - 1)

    def add(self, way: _Way) -> None:
        self.ways.append(way)
        self.proofs = 0

    def drop(self) -> None:
        self.ways.pop()
        self.proofs = 0


class _Seen(NamedTuple):
    """The state of Python objects: what can be compared, and the tensors whose ids are in it."""

    key: Hashable
    tensors: list[Tensor]


class Objective:
    """A loss of weights and data that draws random numbers, and its gradients.

    Args:
        loss: Takes the tensors of a batch, None for all data, and whether it is being recorded; returns what to
            differentiate, a scalar, and the loss to report. It reads the weights by itself.
        weights: The leaves to differentiate in.
        owners: Modules and other callables that the loss runs, whose buffers it may write to.
        name: Of the program, for the log.
        is_watched: Whether code of the user runs between steps, which may change what the owners are.
        is_compiled: Whether a graph is compiled by ``torch.compile``.
        precision: The smaller floating type of parts of the arithmetic. A compiler, which rounds less often, may then differ
            by as much as that rounds.

    Attributes:
        rung: The rung that the last call ran on.
    """

    def __init__(
        self,
        loss: Loss,
        weights: Sequence[Tensor],
        owners: Sequence[Any],
        name: str,
        is_watched: bool = False,
        is_compiled: bool = False,
        precision: torch.dtype | None = None,
    ) -> None:
        self.loss, self.weights, self.name, self.is_watched = loss, list(weights), name, is_watched
        self.is_compiled, self.precision = is_compiled, precision
        self.owners = list({id(owner): owner for owner in owners if owner is not None}.values())
        self.can_stage = highest_rung() >= _STAGED and not self._has_hooks()
        self.rung = "looped"
        self._variants: dict[Hashable, _Variant] = {}
        self._past: dict[str, list[Any]] = {}
        self._latest: dict[str, _Variant] = {}

    @property
    def calls(self) -> dict[str, list[Any]]:
        """For each batch shape, how often it was asked for, when its graph was recorded, and how that is run and trusted."""
        now = {
            shapes: [v.calls, v.recorded, bool(v.ways), [way.name for way in v.ways], v.tried, v.proofs]
            for shapes, v in self._latest.items()
        }
        return self._past | now

    def recall(self, calls: Mapping[str, list[Any]]) -> None:
        """Goes on as if it had been called so often: a graph's values differ from the program's in their last digits.

        Graphs are made anew when they are needed. Python objects are taken to be as the latest call had them.
        """
        self._past = dict(calls)
        self._variants.clear()
        self._latest.clear()

    def _recalled(self, variant: _Variant, data: list[Tensor] | None) -> None:
        """Makes of a variant what it was in an earlier run."""
        calls, recorded, is_staged, *rest = self._past.pop(repr(variant.shapes))
        ways, tried, proofs = rest or ([], [], _CHECKS)
        if is_staged:
            self._stage(variant, data)
        for name in ways[1:] if variant.ways else ():
            self._faster(variant, data, name)
        variant.calls, variant.recorded, variant.tried, variant.proofs = calls, recorded, [*tried], proofs

    def __call__(self, data: list[Tensor] | None = None) -> Tensor:
        """Puts the gradients into the weights' ``grad``; returns the loss of a batch, or of all data."""
        variant = self._variant(data) if self.can_stage else None
        if variant is None:
            return self._unstaged(data)
        if variant.calls == _PATIENCE:
            self._stage(variant, data)
        variant.calls += 1
        if not variant.ways:
            return self._unstaged(data)
        if variant.proofs >= _CHECKS and self._next_way(variant):
            self._faster(variant, data, self._next_way(variant))
        return self._checked(variant, data) if variant.is_due else self._staged(variant, data)

    def _variant(self, data: list[Tensor] | None) -> _Variant | None:
        shapes: Hashable = None if data is None else tuple((leaf.shape, leaf.dtype, leaf.device) for leaf in data)
        seen = _seen(self.owners, self._modules()) if self.is_watched else _Seen(None, [])
        key = (shapes, seen.key)
        if key not in self._variants and len(self._variants) < _VARIANTS:
            self._variants[key] = _Variant(shapes, seen.tensors)
            if repr(shapes) in self._past:
                self._recalled(self._variants[key], data)
        variant = self._variants.get(key)
        if variant is not None:
            self._latest[repr(shapes)] = variant
        return variant

    def _unstaged(self, data: list[Tensor] | None) -> Tensor:
        self.rung = "looped"
        for weight in self.weights:
            weight.grad = None
        surrogate, loss = self.loss(data, False)
        surrogate.backward()
        return loss.detach()

    def _staged(self, variant: _Variant, data: list[Tensor] | None) -> Tensor:
        self.rung = "staged"
        for weight in self.weights:
            weight.grad = None  # whose memory the next gradients take
        with torch.no_grad():
            loss, gradients = variant.ways[-1].run(*(data or ()), *variant.held)
            loss = loss.clone() if variant.ways[-1].name == "captured" else loss  # which the next call writes over
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        return loss

    def _modules(self) -> list[nn.Module]:
        return [module for owner in self.owners if isinstance(owner, nn.Module) for module in owner.modules()]

    def buffers(self) -> list[Tensor]:
        """Those of the owners, which a step may write to."""
        return list({id(buffer): buffer for module in self._modules() for buffer in module.buffers(recurse=False)}.values())

    def _has_hooks(self) -> bool:
        """Whether code of the user waits for a module to run or for a gradient to come; a graph would not call it."""
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        hooked = any(getattr(module, kind, None) for module in self._modules() for kind in kinds)
        return hooked or any(w._backward_hooks or getattr(w, "_post_accumulate_grad_hooks", None) for w in self.weights)

    def _stage(self, variant: _Variant, data: list[Tensor] | None) -> None:
        def flat(*batch: Tensor) -> tuple[Tensor, list[Tensor | None]]:
            surrogate, loss = self.loss(list(batch) if data is not None else None, True)
            wanted = [weight for weight in self.weights if weight.requires_grad]
            found = dict(zip(map(id, wanted), torch.autograd.grad(surrogate, wanted, allow_unused=True), strict=True))
            gradients = [found.get(id(weight)) for weight in self.weights]
            laid_out = [g if g is None else _laid_out(g, w) for g, w in zip(gradients, self.weights, strict=True)]
            return loss.detach(), laid_out

        buffers = self.buffers()
        held = [*self.weights, *buffers]
        before, seen = _Before(buffers, self.weights[0].device), _seen(self.owners, self._modules())
        attributes = [(vars(module), dict(vars(module))) for module in self._modules()]
        attributes += [(module._buffers, dict(module._buffers)) for module in self._modules()]
        try:
            graph = quicken(apart(fold(merge(draft(flat, data or [], held))).written()))
            if seen.key != _seen(self.owners, self._modules()).key or before.has_drawn_in_python():
                raise RuntimeError("a run changes Python objects, or draws by other means than torch")
        except Exception as error:
            _log.info("The steps of %s cannot be staged (%s); running without a graph.", self.name, error)
            return
        finally:  # a trial leaves no trace
            for held_now, held_before in attributes:
                held_now.update(held_before)
            before.restore()
        if len(graph.graph.nodes) <= _LARGEST:
            variant.held, variant.recorded = held, variant.calls
            variant.add(_Way("recorded", graph.forward))

    def _next_way(self, variant: _Variant) -> str:
        """The name of the next way to try; "" if there is none."""
        if self.is_compiled and "compiled" not in variant.tried:
            return "compiled"
        if self.weights[0].device.type != "cuda" or "captured" in variant.tried:
            return ""
        return "captured" if sum("captured" in other.tried for other in self._variants.values()) < _CAPTURED else ""

    def _faster(self, variant: _Variant, data: list[Tensor] | None, name: str) -> None:
        """Adds a faster way to run the graph, where it can be had."""
        variant.tried.append(name)
        way, device = variant.ways[-1], self.weights[0].device
        before = _Before(self._written(variant), device)
        try:
            with torch.no_grad():
                if name == "compiled":
                    torch.compiler.reset()
                    run = torch.compile(way.run, dynamic=False, options={"fallback_random": True})
                    run(*(data or ()), *variant.held)
                    eps = 0.0 if self.precision is None else torch.finfo(self.precision).eps
                    variant.add(_Way(name, run, eps))
                else:
                    variant.add(_Way(name, Captured(way.run, data or [], variant.held), way.eps))
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            _log.info("The steps of %s cannot be %s (%s); they go on as %s.", self.name, name, why, way.name)
        finally:
            before.restore()

    def _written(self, variant: _Variant) -> list[Tensor]:
        """The buffers that a graph holds."""
        return variant.held[len(self.weights) :]

    def _checked(self, variant: _Variant, data: list[Tensor] | None) -> Tensor:
        """A step of the program, held against the ways of the graph, the last first: those that give other values go."""
        buffers, device = self._written(variant), self.weights[0].device
        before = _Before(buffers, device)
        told: tuple[Tensor, list[Tensor | None], _Before] | None = None
        while variant.ways:
            way = variant.ways[-1]
            loss = self._staged(variant, data)
            found, after = [weight.grad for weight in self.weights], _Before(buffers, device)
            before.restore()
            if told is None:
                told = self._told(variant, data, before)
            if variant.ways[-1:] != [way]:
                continue  # there was no memory for it beside the program
            pairs = [(loss, told[0]), *zip(after.values, told[2].values, strict=True)]
            is_one = all(_agree(*pair, _ALLOWED_OF_VALUES * way.eps) for pair in pairs) and after.has_equal(told[2])
            if is_one and _agree_in_all(found, told[1], _ALLOWED * way.eps):
                variant.proofs += 1
                break
            _log.info("%s: a %s step gave other values than the program; running without it.", self.name, way.name)
            variant.drop()
            before.restore()
        assert told is not None
        told[2].restore()
        for weight, gradient in zip(self.weights, told[1], strict=True):
            weight.grad = gradient
        self.rung = "looped"
        return told[0]

    def _told(
        self, variant: _Variant, data: list[Tensor] | None, before: _Before
    ) -> tuple[Tensor, list[Tensor | None], _Before]:
        """Loss and gradients of the program, and what it leaves behind."""
        try:
            loss = self._unstaged(data)
        except torch.OutOfMemoryError:
            if variant.ways[-1].name != "captured":
                raise
            variant.drop()  # it keeps the memory of a step
            torch.cuda.empty_cache()
            before.restore()
            loss = self._unstaged(data)
        return loss, [weight.grad for weight in self.weights], _Before(self._written(variant), self.weights[0].device)


class _Before:
    """Buffers and random generators as they are now."""

    def __init__(self, buffers: list[Tensor], device: torch.device) -> None:
        self.buffers, self.values = buffers, [buffer.detach().clone() for buffer in buffers]
        self.device, self.generators = device, _generators(device)
        self.python = random.getstate(), np.random.get_state(legacy=False)

    @torch.no_grad()
    def restore(self) -> None:
        for buffer, value in zip(self.buffers, self.values, strict=True):
            buffer.copy_(value)
        random.setstate(self.python[0])
        np.random.set_state(self.python[1])
        torch.set_rng_state(self.generators[0])
        if len(self.generators) > 1:
            torch.cuda.set_rng_state(self.generators[1], self.device)

    def has_equal(self, other: _Before) -> bool:
        """Whether torch's generators were alike."""
        return all(torch.equal(own, its) for own, its in zip(self.generators, other.generators, strict=True))

    def has_drawn_in_python(self) -> bool:
        was, is_now = self.python[1], np.random.get_state(legacy=False)
        same = np.array_equal(was["state"]["key"], is_now["state"]["key"]) and was["state"]["pos"] == is_now["state"]["pos"]
        return random.getstate() != self.python[0] or not same


def _generators(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _laid_out(gradient: Tensor, weight: Tensor) -> Tensor:
    """The gradient in memory laid out as its weight is, which fused optimisers take for granted."""
    if gradient.stride() == weight.stride():
        return gradient
    return torch.empty_like(weight).copy_(gradient)


def _agree_in_all(found: list[Tensor | None], expected: list[Tensor | None], allowance: float) -> bool:
    """Whether gradients are those expected; beside the largest of a step, a small one may be rounding alone."""
    norms = [float(part.norm()) for part in expected if part is not None and part.isfinite().all()]
    most = _SMALL * max(norms, default=0.0)
    return all(_agree(*pair, allowance, most) for pair in zip(found, expected, strict=True))


def _agree(one: Tensor | None, other: Tensor | None, allowance: float = 0.0, least: float = 0.0) -> bool:
    """Whether two tensors are equal up to rounding, by the scale of the largest entry, or as vectors up to an allowance.

    Args:
        one: One.
        other: Other.
        allowance: Share of the norm; 0 compares entries.
        least: Scale below which no difference is looked for.
    """
    if one is None or other is None:
        return one is other
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = other[other.isfinite()]
    if allowance and len(finite) == other.numel():
        return float((one - other).norm()) <= allowance * max(float(other.norm()), least)
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-4
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, least)
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _seen(owners: Iterable[Any], modules: Iterable[nn.Module]) -> _Seen:
    """What the attributes of some objects and the variables of some functions hold: numbers, texts and tensors."""
    tensors: list[Tensor] = []
    key: list[Hashable] = []
    for module in modules:
        held: Mapping[str, Any] = vars(module)
        parts = itertools.chain(held["_parameters"].values(), held["_buffers"].values())
        own = [part for part in parts if part is not None]
        tensors += own
        key += [(id(part), part.requires_grad) for part in own]
        key += [_frozen(value, tensors) for name, value in held.items() if name not in _PARTS]
    key += [_frozen(owner, tensors) for owner in owners]
    return _Seen(tuple(key), tensors)


_PARTS = frozenset(("_modules", "_parameters", "_buffers"))
_DEPTH = 4


def _frozen(value: Any, tensors: list[Tensor], depth: int = _DEPTH) -> Hashable:
    """A value as something that can be compared; of objects that are no plain data only the type counts."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return type(value), value
    if isinstance(value, Tensor):
        tensors.append(value)
        return id(value), value._version, value.requires_grad
    parts: Iterable[Any] = ()
    if depth and isinstance(value, dict):  # other mappings may read a file at every look
        parts = itertools.chain(value, value.values())
    elif depth and isinstance(value, (list, tuple)):
        parts = value
    elif depth and isinstance(value, MethodType):
        parts = (value.__self__, value.__func__)
    elif depth and isinstance(value, FunctionType):
        names = value.__code__.co_names if depth >= _DEPTH - 1 else ()
        parts = [*_cells(value), *(value.__globals__[name] for name in names if name in value.__globals__)]
    elif depth == _DEPTH and not isinstance(value, nn.Module):
        parts = getattr(value, "__dict__", {}).values()
    return type(value), tuple(_frozen(part, tensors, depth - 1) for part in parts)


def _cells(function: FunctionType) -> list[Any]:
    """The variables that a function has taken from around it."""
    found = []
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # one that has no value yet
            found.append(cell.cell_contents)
    return found
