"""Numbers, settings and names as a page says them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference import Posterior

__all__ = ["brief", "json_of", "listed", "rounded", "said", "size_of"]

_UNSAID = ("seed", "progress", "callbacks", "checkpoint", "checkpoint_every")  # of a back-end's settings


def json_of(file: Path, form: str | None = None) -> dict[str, Any]:
    """The object in a file of json, of a format if one is named.

    Raises:
        ValueError: If the file is damaged, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is damaged: {error}.") from error
    if not isinstance(found, dict) or (form is not None and found.get("format") != form):
        raise ValueError(f"'{file}' was written by another program, or is damaged.")
    return found


def brief(key: str, value: Any) -> Any:
    """A fact without what says nothing."""
    if key == "config" and isinstance(value, Mapping):
        return {name: one for name, one in value.items() if name not in _UNSAID and one not in (None, False, [], ())}
    return str(value)[:19].replace("T", " ") if key == "created_at" else value


def size_of(posterior: Posterior) -> str:
    """How many chains and draws."""
    chains, draws = posterior.shape
    return f"{chains} chain{'s' * (chains != 1)} of {draws} draw{'s' * (draws != 1)}"


def said(value: Any) -> str:
    """A value, or a mapping of values, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {said(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, (list, tuple)):
        return " x ".join(said(one) for one in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rounded(column: str, value: float) -> str:
    """A number of ArviZ's summary, to the digits that say something."""
    if not math.isfinite(value):
        return "-"
    form = (
        ".0f" if column.startswith("ess") else ".3f" if column == "r_hat" else ".2g" if column.startswith("mcse") else ".4g"
    )
    return format(float(value), form)


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
