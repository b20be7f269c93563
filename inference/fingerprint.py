"""What a run depends on, so that it goes on only as it began: configuration, program, data, versions, threads, rung."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import textwrap
import tokenize
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from inference.handlers import isolated
from inference.program import Program
from inference.sites import is_statement

if TYPE_CHECKING:
    from inference.contract import Backend

__all__ = ["compare", "fingerprint", "source", "versions"]

# What changes no step: how a run is watched, where it is written, when it stops.
_FREE = ("progress", "callbacks", "checkpoint", "checkpoint_every", "until", "device", "seed")
_ROUNDING = 1e-6


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    found = {}
    for name in ("pyro-genmodels", "torch", "pyro-ppl", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def source(program: Callable[..., Any]) -> str:
    """The text of a program as it was written, for the record; "" where Python does not have it.

    Args:
        program: A function, what handlers or ``functools.partial`` made of one, or a module that is called.
    """
    while isinstance(program, functools.partial):
        is_handled = program.func.__module__.startswith("pyro.poutine")  # (handler, function)
        program = program.args[1] if is_handled else program.func
    program = inspect.unwrap(program)
    function = program if inspect.isroutine(program) else type(program).__call__
    function = getattr(program, "forward", function) if isinstance(program, nn.Module) else function
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):  # of a file that is not where the lines are from
        return ""


def fingerprint(backend: Backend[Any, Any], program: Program, seed: int) -> dict[str, Any]:
    """What json can hold of a run; see ``compare``."""
    settings = {f.name: getattr(backend, f.name) for f in dataclasses.fields(backend) if f.name not in _FREE}
    return {
        "backend": type(backend).__name__,
        "settings": {name: _described(value) for name, value in settings.items()} | {"seed": seed},
        "program": program.name,
        "sites": {
            name: [site.family, [*site.shape], site.event_dim, [[p.name, p.dim, p.size] for p in site.plates]]
            for name, site in {**program.latents, **program.observed_sites}.items()
        },
        "statements": [*program.factors, *program.deterministic],
        "weights": {name: [*weight.shape] for name, weight in program.weights.items()},
        "data": {label: _described(value) for label, value in program.named_arguments},
        "observed": {name: _hash(tensor) for name, tensor in program.observed.items()},
        "density": _trial(program),
        "device": program.device.type,
        "dtype": str(program.dtype),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "rung": os.environ.get("PYRO_GENMODELS_RUNG", ""),
    }


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to go on with a run that would not go on as it began.

    Args:
        then: The fingerprint of the run.
        now: That of what is to go on with it.

    Raises:
        ValueError: If they differ; the message names the first difference, and says what to do.
    """
    then, now = {**then}, _as_read(now)
    for name in {**then["versions"], **now["versions"]}:
        before, after = then["versions"].get(name), now["versions"].get(name)
        if before != after:
            raise ValueError(
                f"The run was begun with {name} {before}, but this is {after}, whose numbers may differ. Install {name} "
                f"{before}, or start a new run."
            )
    if then["backend"] != now["backend"]:
        raise ValueError(f"This is a run of {then['backend']}, so that {now['backend']} cannot go on with it.")
    _compare_settings(then["settings"], now["settings"])
    _compare_program(then, now)
    for what, how in (("data", "the argument"), ("observed", "the site")):
        for name in {**then[what], **now[what]}:
            if then[what].get(name) != now[what].get(name):
                raise ValueError(f"The data of {how} '{name}' are not those of the run. Give resume the same data.")
    if not _is_close(then["density"], now["density"]):
        raise ValueError(
            f"{now['program']} has another log-density than the program of the run, at the same values. Give resume the "
            "same model, or start a new run."
        )
    for what, name, remedy in (
        ("threads", "thread(s) of torch", "Use torch.set_num_threads({})."),
        ("rung", "PYRO_GENMODELS_RUNG", "Set PYRO_GENMODELS_RUNG to '{}'."),
        ("device", "device", "Use device='{}'."),
        ("dtype", "dtype", "Use dtype={}."),
    ):
        if then[what] != now[what]:
            raise ValueError(
                f"The run was begun with {name} {then[what]!r}, but this is {now[what]!r}: sums would end in other digits. "
                + remedy.format(then[what])
            )


def _compare_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in {**then, **now}:
        before, after = then.get(name), now.get(name)
        if name == "draws" and isinstance(before, int) and isinstance(after, int) and after >= before:
            continue
        if before != after:
            raise ValueError(
                f"{name}= was {_shown(before)} and is now {_shown(after)}. A run goes on with the settings that it began "
                "with; only draws= may be larger."
            )


def _compare_program(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if then["program"] != now["program"]:
        raise ValueError(f"The run is of {then['program']}, but this is {now['program']}. Give resume the same model.")
    for name in {**then["sites"], **now["sites"]}:
        before, after = then["sites"].get(name), now["sites"].get(name)
        if before is None or after is None:
            whose = f"{now['program']} has a site '{name}', which the program of the run has not"
            if after is None:
                whose = f"{now['program']} has no site '{name}', which the program of the run has"
            raise ValueError(f"{whose}. Give resume the same model.")
        if before != after:
            raise ValueError(
                f"Site '{name}' was {before[0]} of shape {tuple(before[1])}, and is now {after[0]} of shape "
                f"{tuple(after[1])}"
                + (", in other plates" if before[:2] == after[:2] else "")
                + ". Give resume the same model and data."
            )
    for what in ("statements", "weights"):
        if then[what] != now[what]:
            raise ValueError(f"{now['program']} has other {what} than the program of the run. Give resume the same model.")


def _as_read(facts: Mapping[str, Any]) -> dict[str, Any]:
    """As it would be after json."""
    return json.loads(json.dumps(facts))


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_close(before: str | None, after: str | None) -> bool:
    if before == after or before is None or after is None:
        return before == after
    return math.isclose(float(before), float(after), rel_tol=_ROUNDING, abs_tol=_ROUNDING)


def _trial(program: Program) -> str | None:
    """The log-density at a draw from the prior, of a part of many rows; None where training changes it."""
    if program.weights:
        return None
    with isolated(0, program.device), torch.no_grad():
        _, some = next(program.parts())
        nodes = program.trace({}, data=some).nodes.values()
    return repr(sum(float(node["log_prob_sum"]) for node in nodes if is_statement(node)))


def _hash(tensor: Tensor) -> str:
    data = tensor.detach().cpu().contiguous().flatten()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(data.view(torch.uint8).numpy().data if data.numel() else b"")
    return digest.hexdigest()


def _described(value: Any) -> Any:
    """A setting as json that is the same in every process."""
    from inference.posterior import Posterior

    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, (Tensor, np.ndarray)):
        return f"tensor {_hash(torch.as_tensor(value))[:16]}"
    if isinstance(value, Posterior):
        return ["Posterior", _described(value.draws)]
    if isinstance(value, Mapping):
        return ["mapping", *([_described(key), _described(part)] for key, part in value.items())]
    if isinstance(value, (set, frozenset)):
        return sorted(_described(part) for part in value)
    if isinstance(value, Collection):
        return [_described(part) for part in value]
    if isinstance(value, functools.partial):
        return ["partial", *(_described(part) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, nn.Module):
        return [_name(type(value)), *([name, [*weight.shape]] for name, weight in value.named_parameters())]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [_name(type(value)), {f.name: _described(getattr(value, f.name)) for f in dataclasses.fields(value)}]
    if isinstance(value, type) or hasattr(value, "__qualname__"):
        return _name(value)
    return _name(type(value))


def _name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
