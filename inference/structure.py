"""What an object can do, asked by its attributes, however they come."""

from __future__ import annotations

from functools import cache
from inspect import get_annotations
from typing import Any, Protocol, cast

__all__ = ["Structure"]

_ProtocolMeta = cast(type, type(Protocol))


class _ByAttributes(_ProtocolMeta):  # type: ignore[misc,valid-type]
    def __instancecheck__(cls, instance: Any) -> bool:
        if not cls.__dict__.get("_is_protocol"):
            return bool(super().__instancecheck__(instance))
        return all(getattr(instance, name, None) is not None for name in _members(cls))


class Structure(Protocol, metaclass=_ByAttributes):
    """A protocol whose ``isinstance`` sees what ``getattr`` does, None being as good as nothing.

    Since Python 3.12 that of ``typing`` looks past ``__getattr__``, by which modules of torch have their submodules,
    parameters and buffers: a guide that is a submodule would be none.
    """


@cache
def _members(kind: type) -> tuple[str, ...]:
    """What a class that follows the protocol must have."""
    names: dict[str, None] = {}
    for base in kind.__mro__:
        if base.__dict__.get("_is_protocol") and base not in (Protocol, Structure):
            names |= dict.fromkeys((*base.__dict__, *get_annotations(base)))
    return tuple(name for name in names if name == "__call__" or not name.startswith("_"))
