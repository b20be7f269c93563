"""The state of a run as json and named tensors, and back; nothing in it is ever executed.

    None, bool, int, float, str      themselves
    anything else                    [tag, ...], such as ["tensor", "3"], ["record", "inference.gibbs:GibbsState", ...]

What is code or belongs to the program (the program itself, its density, its weights) is written as the name of a *link*, and
is whatever the reader has under that name. Classes are named, and found among those that are already imported, in a few
modules; objects are made without their constructors, of fields that are there and of the types that their class says.
Tensors keep the order of their memory: a sum over the same numbers in another order ends in other last digits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inference.density import Density

__all__ = ["Encoded", "decode", "encode"]

_MODULES = ("inference",)
_NAMED = ("torch.distributions", "pyro.distributions")  # whose classes may be named, but have no objects here
_OPTIMISERS = ("torch.optim",)
_ALIGNMENT = 64  # bytes: what the fastest kernels look at


class Encoded(NamedTuple):
    """What ``encode`` makes: a tree that json can hold, and the tensors that it names, on the CPU."""

    tree: Any
    tensors: dict[str, Tensor]


def encode(value: Any, links: Mapping[str, Any], modules: Collection[str] = ()) -> Encoded:
    """An object as json and tensors.

    Args:
        value: Numbers, text, tensors, tuples, lists, dicts, named tuples, dataclasses and plain objects of this package,
            optimisers, and whatever is linked.
        links: Name to what is written as that name.
        modules: Further modules whose classes may have objects in it, such as that of a user's back-end.

    Raises:
        ValueError: If it holds anything else; the message says where.
    """
    writer = _Writer(links, (*_MODULES, *modules))
    return Encoded(writer.tree(value, "state"), writer.tensors)


def decode(
    encoded: Encoded, links: Mapping[str, Any], modules: Collection[str] = (), device: torch.device | None = None
) -> Any:
    """What ``encode`` was given, in memory of its own.

    Args:
        encoded: The tree and its tensors.
        links: Name to what takes its place.
        modules: As for ``encode``.
        device: Where tensors go that were not on the CPU.

    Raises:
        ValueError: If it is damaged, or names a class that is not there, or that may have no place in it.
    """
    reader = _Reader(encoded.tensors, links, (*_MODULES, *modules), device or torch.device("cpu"))
    try:
        return reader.value(encoded.tree)
    except _Refusal:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OverflowError, MemoryError) as error:
        raise ValueError(f"A checkpoint is damaged: its state does not fit together ({error}). Run again.") from error


def _is_in(cls: type, modules: Collection[str]) -> bool:
    return any(cls.__module__ == module or cls.__module__.startswith(f"{module}.") for module in modules)


class _Writer:
    """One call of ``encode``: what was met before is not written twice."""

    def __init__(self, links: Mapping[str, Any], modules: tuple[str, ...]) -> None:
        self.links, self.modules = {id(value): name for name, value in links.items()}, modules
        self.tensors: dict[str, Tensor] = {}
        self.seen: dict[int, tuple[int, Any]] = {}  # holds the objects too: an id is good only while its object lives

    def tree(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else ["float", repr(float(value))]
        if id(value) in self.links:
            return ["link", self.links[id(value)]]
        if isinstance(value, torch.Size):
            return ["size", *value]
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            fields = zip(value._fields, value, strict=True)
            return ["record", self._name(value, where), *(self.tree(v, f"{where}.{name}") for name, v in fields)]
        if type(value) in (tuple, list):
            return [type(value).__name__, *(self.tree(v, f"{where}[{i}]") for i, v in enumerate(value))]
        if type(value) is dict:
            return ["dict", *([self.tree(k, where), self.tree(v, f"{where}[{k!r}]")] for k, v in value.items())]
        if isinstance(value, torch.dtype):
            return ["dtype", str(value).removeprefix("torch.")]
        if isinstance(value, torch.device):
            return ["device", str(value)]
        if isinstance(value, type):
            return ["class", self._named(value, (*self.modules, *_NAMED), where)]
        if isinstance(value, functools.partial):
            return ["partial", *(self.tree(v, where) for v in (value.func, value.args, value.keywords))]
        if id(value) in self.seen:
            return ["same", self.seen[id(value)][0]]
        self.seen[id(value)] = len(self.seen), value
        return self._kept(value, where)

    def _kept(self, value: Any, where: str) -> Any:
        """What may be met again under the same identity."""
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, Density):
            return ["density", self.tree(value.program, where), value.limit]
        if isinstance(value, torch.optim.Optimizer):
            groups = [[*group["params"]] for group in value.param_groups]
            parts = (self.tree(groups, where), self.tree(value.state_dict(), where))
            return ["optimiser", self._named(type(value), _OPTIMISERS, where), *parts]
        name = self._name(value, where)
        held = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else vars(value)
        return ["object", name, {key: self.tree(vars(value)[key], f"{where}.{key}") for key in held}]

    def _name(self, value: Any, where: str) -> str:
        return self._named(type(value), self.modules, where)

    def _named(self, cls: type, modules: tuple[str, ...], where: str) -> str:
        name = f"{cls.__module__}:{cls.__qualname__}"
        if not _is_in(cls, modules) or "<locals>" in name:
            raise ValueError(f"A checkpoint cannot hold {where}, which is a {cls.__module__}.{cls.__qualname__}.")
        return name

    def _tensor(self, value: Tensor) -> Any:
        name, layout, detached = str(len(self.tensors)), _layout(value), value.detach()
        if layout is not None:
            for dim, stride in enumerate(layout[1]):
                detached = detached.narrow(dim, 0, 1) if stride == 0 else detached
        self.tensors[name] = detached.to("cpu", copy=True).contiguous()
        return ["tensor", name, layout, value.requires_grad, value.device.type]


def _layout(value: Tensor) -> tuple[list[int], list[int], int] | None:
    """Shape, strides and offset of a tensor; None if they are the usual ones, or elements overlap in an unusual way."""
    offset = int(value.storage_offset()) % max(_ALIGNMENT // value.element_size(), 1)
    if value.is_contiguous() and not offset:
        return None
    extent = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size == 0 or (stride and size > 1 and stride < extent):
            return None
        extent += stride * (size - 1)
    return [*value.shape], [*value.stride()], offset


class _Refusal(ValueError):
    """What is wrong, in words already."""


class _Reader:
    """One call of ``decode``."""

    def __init__(
        self, tensors: Mapping[str, Tensor], links: Mapping[str, Any], modules: tuple[str, ...], device: torch.device
    ) -> None:
        self.tensors, self.links, self.modules, self.device = tensors, links, modules, device
        self.seen: list[Any] = []

    def value(self, tree: Any) -> Any:
        if not isinstance(tree, list):
            return tree
        tag, *parts = tree
        if tag == "same":
            return self.seen[parts[0]]
        if tag in ("tensor", "density", "optimiser", "object"):
            place = len(self.seen)
            self.seen.append(None)
            self.seen[place] = found = getattr(self, f"_{tag}")(*parts)
            return found
        if tag in ("float", "size", "dtype", "device", "link", "class"):
            return getattr(self, f"_{tag}")(*parts)
        if tag == "record":
            cls = self._class(parts[0], self.modules)
            record = cls._make(self.value(part) for part in parts[1:])
            _check_fields(cls, record._asdict())
            return record
        if tag == "dict":
            return {self.value(key): self.value(value) for key, value in parts}
        if tag in ("tuple", "list", "partial"):
            values = [self.value(part) for part in parts]
            if tag == "partial":
                return functools.partial(values[0], *values[1], **values[2])
            return tuple(values) if tag == "tuple" else values
        raise _Refusal(f"A checkpoint has a '{tag}', which this version does not know.")

    def _float(self, text: str) -> float:
        return float(text)

    def _size(self, *sizes: int) -> torch.Size:
        return torch.Size(sizes)

    def _dtype(self, name: str) -> torch.dtype:
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype):
            raise _Refusal(f"A checkpoint names a type of numbers '{name}', but torch has none.")
        return found

    def _device(self, name: str) -> torch.device:
        return torch.device(name)

    def _link(self, name: str) -> Any:
        if name not in self.links:
            raise _Refusal(f"A checkpoint refers to '{name}', which this program does not have.")
        return self.links[name]

    def _class(self, name: str, modules: tuple[str, ...] | None = None) -> Any:
        module, _, qualified = name.partition(":")
        found: Any = sys.modules.get(module)
        for part in qualified.split("."):
            found = getattr(found, part, None)
        is_it = isinstance(found, type) and (found.__module__, found.__qualname__) == (module, qualified)
        if not is_it or not _is_in(found, modules or (*self.modules, *_NAMED)):
            raise _Refusal(f"A checkpoint names the class {name}, which is not there, or has no place in one.")
        return found

    def _tensor(self, name: str, layout: Any, requires_grad: bool, device: str) -> Tensor:
        data, where = self.tensors[name], torch.device("cpu") if device == "cpu" else self.device
        if layout is None:
            found = torch.empty(data.shape, dtype=data.dtype, device=where)
            found.copy_(data)
        else:
            shape, strides, offset = layout
            extent = offset + 1 + sum(stride * (size - 1) for stride, size in zip(strides, shape, strict=True))
            found = torch.empty(extent, dtype=data.dtype, device=where).as_strided(shape, strides, offset)
            once = found
            for dim, stride in enumerate(strides):
                once = once.narrow(dim, 0, 1) if stride == 0 else once
            once.copy_(data)
        return found.requires_grad_(requires_grad)

    def _density(self, program: Any, limit: str | None) -> Density:
        return Density(self.value(program), rung=limit)

    def _optimiser(self, name: str, groups: Any, state: Any) -> torch.optim.Optimizer:
        cls = self._class(name, _OPTIMISERS)
        if not issubclass(cls, torch.optim.Optimizer):
            raise _Refusal(f"A checkpoint names the optimiser {name}, which is none.")
        optimiser = cls([{"params": group} for group in self.value(groups)])
        optimiser.load_state_dict(self.value(state))
        return optimiser

    def _object(self, name: str, held: Mapping[str, Any]) -> Any:
        cls = self._class(name, self.modules)
        found = object.__new__(cls)
        fields = {key: self.value(part) for key, part in held.items()}
        if dataclasses.is_dataclass(cls) and fields.keys() != (own := {field.name for field in dataclasses.fields(cls)}):
            raise TypeError(f"{name} has other fields: {', '.join(sorted(fields.keys() ^ own))}")
        _check_fields(cls, fields)
        found.__dict__.update(fields)
        return found


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    """The types of the fields of a class, as far as it says them."""
    try:
        return typing.get_type_hints(cls)
    except (NameError, TypeError, AttributeError):  # names that are known to type checkers only
        return {}


def _check_fields(cls: type, fields: Mapping[str, Any]) -> None:
    """Refuses what a whole checkpoint would not have, before it is an error somewhere in the middle of a run."""
    for name, value in fields.items():
        if not _fits(value, _types(cls).get(name, Any)):
            raise TypeError(f"{cls.__name__}.{name} cannot be {value if value is None else 'a ' + type(value).__name__}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type as annotations say it; what cannot be told is."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    outer = kind if origin is None else origin
    if kind is Any or not isinstance(outer, type):
        return True
    if outer is type(None):
        return value is None
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(parts) == 2 and parts[1] is Ellipsis:
            return all(_fits(element, parts[0]) for element in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if not getattr(outer, "_is_protocol", False) and not isinstance(value, outer):
        return False
    if isinstance(value, dict) and len(parts) == 2:
        return all(_fits(key, parts[0]) and _fits(element, parts[1]) for key, element in value.items())
    return not isinstance(value, list) or len(parts) != 1 or all(_fits(element, parts[0]) for element in value)
