"""Which folder makes which page."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference import Posterior
from pyro_genmodels.page import Page
from pyro_genmodels.report.posteriors import comparison_page, posterior_page
from pyro_genmodels.report.programs import imported
from pyro_genmodels.report.training import log_page, training_page
from pyro_genmodels.report.words import listed

__all__ = ["find", "record", "report"]


def record(posterior: Posterior) -> dict[str, Any]:
    """What json can hold of a posterior beside its draws: what a report of a comparison needs.

    Args:
        posterior: What was inferred.
    """
    plan = None if posterior.plan is None else [update._asdict() for update in posterior.plan.updates]
    return {"info": posterior.info, "plan": plan, "findings": posterior.diagnose()}


def find(folder: str | os.PathLike[str]) -> Callable[[Path, Any], Page]:
    """What makes the page of a folder.

    Args:
        folder: A folder, or a log.

    Returns:
        A function of the path and of a program or None, which returns the page.

    Raises:
        ValueError: If there is no result in it; the message says what may be given, and which folders in it hold one.
    """
    path = Path(folder)
    found = _kind(path)
    if found is not None:
        return found
    if not path.exists():
        raise ValueError(f"There is no folder '{folder}'. Give one that fit, compare, train or Posterior.save wrote.")
    below = [str(place) for place in sorted(path.iterdir()) if _kind(place)] if path.is_dir() else []
    if below:
        raise ValueError(f"'{folder}' holds no result itself, but {listed(below)} do{'es' * (len(below) == 1)}: give one.")
    raise ValueError(
        f"'{folder}' holds no result. Give a folder that fit, compare, train or Posterior.save wrote, or a log (.jsonl)."
    )


def report(folder: str | os.PathLike[str], model: str | None = None) -> Page:
    """The page of a saved result.

    Args:
        folder: What ``genmodels fit``, ``compare``, ``train`` or ``Posterior.save`` wrote, or a log of ``JSONLines``.
        model: The program that was fitted, "module:name" or "file.py:name", whose code is then run; shown, and used to
            replicate the data. None takes what the folder says.

    Raises:
        ValueError: If the folder holds no result, is damaged, or the model is not the one that was fitted.
        OSError: If a file cannot be read.
    """
    make = find(folder)
    return make(Path(folder), None if model is None else imported(model))


def _kind(path: Path) -> Callable[[Path, Any], Page] | None:
    if path.is_file():
        return log_page if path.suffix == ".jsonl" else None
    if (path / "comparison.json").is_file():
        return comparison_page
    if (path / "checkpoint.json").is_file():
        return posterior_page
    if (path / "settings.json").is_file():
        return training_page
    return log_page if path.is_dir() and any(path.glob("*.jsonl")) else None
