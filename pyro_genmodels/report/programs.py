"""The program that was fitted, from what a user names or from what a folder says."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference import Posterior
from inference.contract import Programmed
from inference.fingerprint import source
from pyro_genmodels import tables
from pyro_genmodels.comparison import MODELS, split
from pyro_genmodels.report.words import listed

__all__ = ["imported", "rebuilt", "with_program"]


def imported(name: str) -> Any:
    """A program by "module:name" or "file.py:name"."""
    place, _, attribute = name.partition(":")
    if not place or not attribute:
        raise ValueError(f"--model is '{name}', but must be MODULE:NAME or FILE.py:NAME, such as examples/coal.py:coal.")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            sys.path.insert(0, os.getcwd())
            try:
                module = importlib.import_module(place)
            finally:
                sys.path.remove(os.getcwd())
    except (ImportError, OSError) as error:
        raise ValueError(f"--model names '{place}', which cannot be imported: {error}.") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"--model names '{name}', but '{place}' has no '{attribute}'.")
        found = getattr(found, part)
    if inspect.isclass(found):
        raise ValueError(
            f"--model names the class '{attribute}': name an object of it, made as for the fit (m = {attribute}(…))."
        )
    if not callable(found) and not isinstance(found, Programmed):
        raise ValueError(f"--model names '{attribute}', which is {type(found).__name__} and no program.")
    return found


def with_program(path: Path, model: Any, posterior: Posterior) -> Posterior:
    """The posterior with its program, whose arguments are those that were saved."""
    call = model.model if isinstance(model, Programmed) else model
    given = {**posterior.constants, **posterior.observed}
    parameters = inspect.signature(call).parameters.values()
    arguments = {one.name: given[one.name] for one in parameters if one.name in given}
    needed = [one.name for one in parameters if one.name not in given and one.default is one.empty]
    left = [site for site in posterior.observed if site not in arguments]
    if len(needed) == len(left) == 1:
        arguments[needed[0]] = posterior.observed[left[0]]
    elif needed:
        saved = listed(list(given)) or "nothing"
        raise ValueError(
            f"The program takes '{needed[0]}', which cannot be told from what was saved ({saved}): name the parameter as "
            "that, or give a program of the data alone (functools.partial)."
        )
    loaded = Posterior.load(path, model, **arguments)
    return dataclasses.replace(loaded, info={**loaded.info, "source": source(call) or loaded.info.get("source", "")})


def rebuilt(command: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """The model and its arguments, from what the command line wrote down.

    Raises:
        ValueError: If that is none of this version, or was tampered with.
    """
    if not isinstance(command, dict) or command.get("model") not in MODELS:
        raise ValueError("the folder does not say which model of this version it is about.")
    entry, options = MODELS[command["model"]], command.get("options")
    if not isinstance(options, dict) or not options.keys() <= entry.options.keys():
        raise ValueError(f"its options are none of {command['model']}.")
    x, y, _ = tables.read(command["model"], str(command.get("data")), command.get("labels"))
    share = 0.0 if entry.score is None else float(command.get("held_out") or 0.0)
    kept, _ = split(torch.arange(len(x)), share, int(command.get("seed") or 0))
    try:
        model = entry.build(**options)
    except (TypeError, AttributeError) as error:
        raise ValueError(f"its options do not make a {command['model']} ({error}).") from error
    return model, entry.arguments(model, x[kept], None if y is None else y[kept])
