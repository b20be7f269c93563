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
from torch import Tensor, fx, nn

from inference.capture import Captured
from inference.graphs import fold, merge
from inference.recording import draft, quicken
from inference.staging import RUNGS, highest_rung

__all__ = ["Objective"]

_PATIENCE = 12  # steps before a graph is recorded, which costs as much as about so many
_CHECKS = 2  # at the steps after it, and then at every power of two
_LARGEST = 100_000  # nodes of a graph
_VARIANTS = 16  # graphs for other batch shapes and other states of the Python objects
_ALLOWED = 16.0  # roundings
_STAGED = RUNGS.index("staged")

_log = logging.getLogger("inference")

Loss = Callable[[list[Tensor] | None, bool], tuple[Tensor, Tensor]]


class _Variant:
    """The graph for one batch shape, and how often it was asked for."""

    def __init__(self, shapes: Hashable, alive: list[Tensor]) -> None:
        self.shapes = shapes  # of a batch
        self.alive = alive  # an id in a key is good only while its tensor lives
        self.calls = self.recorded = 0
        self.graph: fx.GraphModule | None = None
        self.held: list[Tensor] = []  # weights and buffers, which the graph takes after the data
        self.captured: Captured | None = None
        self.is_settled = False  # whether it is captured, or cannot be

    @property
    def is_trusted(self) -> bool:
        """Whether the graph has been held against the program."""
        return self.calls - self.recorded > _CHECKS

    @property
    def is_due(self) -> bool:
        """Whether the graph is to be held against the program at this call."""
        since = self.calls - self.recorded
        return since <= _CHECKS or not since & (since - 1)


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
        self.is_compiled = is_compiled
        self.allowance = _ALLOWED * torch.finfo(precision).eps if precision is not None and is_compiled else None
        self.owners = list({id(owner): owner for owner in owners if owner is not None}.values())
        self.can_stage = highest_rung() >= _STAGED and not self._has_hooks()
        self.rung = "looped"
        self._variants: dict[Hashable, _Variant] = {}
        self._past: dict[str, list[Any]] = {}
        self._latest: dict[str, _Variant] = {}

    @property
    def calls(self) -> dict[str, list[Any]]:
        """For each batch shape, how often it was asked for, when its graph was recorded and whether that is trusted."""
        now = {shapes: [v.calls, v.recorded, v.graph is not None] for shapes, v in self._latest.items()}
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
        calls, recorded, is_staged = self._past.pop(repr(variant.shapes))
        if is_staged:
            self._stage(variant, data)
        variant.calls, variant.recorded = calls, recorded

    def __call__(self, data: list[Tensor] | None = None) -> Tensor:
        """Puts the gradients into the weights' ``grad``; returns the loss of a batch, or of all data."""
        variant = self._variant(data) if self.can_stage else None
        if variant is None:
            return self._unstaged(data)
        if variant.calls == _PATIENCE:
            self._stage(variant, data)
        variant.calls += 1
        if variant.graph is None:
            return self._unstaged(data)
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
        assert variant.graph is not None
        self.rung = "staged"
        for weight in self.weights:
            weight.grad = None  # whose memory the next gradients take
        if not variant.is_settled and variant.is_trusted:
            self._capture(variant, data)
        with torch.no_grad():
            if variant.captured is not None and variant.captured.is_in_place:
                loss, gradients = variant.captured(*(data or ()))
                loss = loss.clone()
            else:
                loss, gradients = variant.graph.forward(*(data or ()), *variant.held)
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
            graph = quicken(fold(merge(draft(flat, data or [], held))).written())
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
            variant.graph, variant.held, variant.recorded = graph, held, variant.calls
            if self.is_compiled:
                self._compile(variant, data)

    def _compile(self, variant: _Variant, data: list[Tensor] | None) -> None:
        """Makes machine code of the graph, where that can be done."""
        assert variant.graph is not None
        before = _Before(self._written(variant), self.weights[0].device)
        torch.compiler.reset()
        code = torch.compile(variant.graph.forward, dynamic=False, options={"fallback_random": True})
        try:
            with torch.no_grad():
                code(*(data or ()), *variant.held)
            variant.graph.forward = code
        except Exception as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            _log.info("The steps of %s cannot be compiled (%s); they run as recorded.", self.name, why)
        finally:
            before.restore()

    def _capture(self, variant: _Variant, data: list[Tensor] | None) -> None:
        """Makes one launch of the graph, where that can be done."""
        assert variant.graph is not None
        variant.is_settled = True
        device = self.weights[0].device
        if device.type != "cuda":
            return
        before = _Before(self._written(variant), device)
        try:
            with torch.no_grad():
                variant.captured = Captured(variant.graph.forward, data or [], variant.held)
        except Exception as error:
            _log.info("The steps of %s cannot be captured (%s); their kernels are started one by one.", self.name, error)
        finally:
            before.restore()

    def _written(self, variant: _Variant) -> list[Tensor]:
        """The buffers that a graph holds."""
        return variant.held[len(self.weights) :]

    def _checked(self, variant: _Variant, data: list[Tensor] | None) -> Tensor:
        buffers = self._written(variant)
        before = _Before(buffers, self.weights[0].device)
        staged = [self._staged(variant, data), *(weight.grad for weight in self.weights)]
        after = _Before(buffers, self.weights[0].device)
        before.restore()
        loss = self._unstaged(data)
        unstaged = [loss, *(weight.grad for weight in self.weights)]
        pairs = [*zip(staged, unstaged, strict=True), *zip(after.values, buffers, strict=True)]
        if not (all(_agree(*pair, self.allowance) for pair in pairs) and after.has_equal_generators()):
            what = "staged" if variant.captured is None else "captured"
            _log.info("%s: a %s step gave other values than the program; running without it.", self.name, what)
            if variant.captured is None:
                variant.graph = None
            variant.captured = None
        return loss


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

    def has_equal_generators(self) -> bool:
        return all(torch.equal(was, is_now) for was, is_now in zip(self.generators, _generators(self.device), strict=True))

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


def _agree(one: Tensor | None, other: Tensor | None, allowance: float | None) -> bool:
    """Whether two tensors are equal up to rounding, by the scale of the largest entry, or as vectors up to an allowance."""
    if one is None or other is None:
        return one is other
    if not one.is_floating_point():
        return torch.equal(one, other)
    if allowance is not None and other.isfinite().all():
        return bool((one - other).norm() <= allowance * other.norm())
    tolerance = 1e-9 if one.dtype == torch.float64 else 1e-4
    finite = other[other.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
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
