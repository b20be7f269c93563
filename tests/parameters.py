"""Parameters of tests, most of which take long."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

__all__ = ["quick"]


def quick(values: Iterable[Any], named: Collection[Any]) -> list[Any]:
    """Values of a parameter, tuples of several, of which those that are not named are left to ``-m slow``."""
    return [
        value if value in named else pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
        for value in values
    ]
