"""A saved result as one HTML page: what was asked, what came out, and how far it can be trusted.

A folder is one of these, told apart by what it holds:

checkpoint.json     ``Posterior.save``, ``genmodels fit --out``
comparison.json     ``genmodels compare --out``: one page, the back-ends side by side
settings.json       ``genmodels train --out``: learning curves, and pictures that the model draws
*.jsonl             logs of ``inference.JSONLines``; such a file may be given by itself
"""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import Posterior, checkpoint
from inference.contract import Guided, Programmed
from inference.fingerprint import source
from inference.plan import Plan, Update
from pyro_genmodels import plots, tables, trained
from pyro_genmodels.comparison import METHODS, MODELS, split, summary
from pyro_genmodels.page import Page

__all__ = ["find", "record", "report"]

_SHOWN = 50  # elements of a site that are shown
_TABLE = 60  # rows of the table of estimates
_REPLICATIONS = 50
_SAMPLES = 64
_FACTS = {
    "model": "program",
    "backend": "back-end",
    "config": "settings",
    "kind": "kind of result",
    "seed": "seed",
    "sampling_time": "wall time, s",
    "created_at": "made",
    "versions": "versions",
    "structure": "structure of the program",
    "interrupted": "stopped by Ctrl-C",
}  # what of a posterior's info is shown, and what it is called


_UNSAID = ("seed", "progress", "callbacks", "checkpoint", "checkpoint_every")  # of a back-end's settings


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
        raise ValueError(f"'{folder}' holds no result itself, but {_listed(below)} do{'es' * (len(below) == 1)}: give one.")
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
    return make(Path(folder), None if model is None else _imported(model))


def _kind(path: Path) -> Callable[[Path, Any], Page] | None:
    if path.is_file():
        return _log if path.suffix == ".jsonl" else None
    if (path / "comparison.json").is_file():
        return _comparison
    if (path / "checkpoint.json").is_file():
        return _single
    if (path / "settings.json").is_file():
        return _training
    return _log if path.is_dir() and any(path.glob("*.jsonl")) else None


# ------------------------------------------------------------------------------------------- posteriors
def _single(path: Path, model: Any) -> Page:
    """What ``Posterior.save`` wrote."""
    _, meta = checkpoint.read(path)
    if "draws" not in meta.get("info", {}) and "recipe" in meta:
        raise ValueError(f"'{path}' is a part of what train wrote: give its folder, '{path.resolve().parent}'.")
    posterior = Posterior.load(path)
    command = posterior.info.get("command")
    why = "The program is not at hand, so the data cannot be replicated: give --model MODULE:NAME."
    if model is not None:
        posterior = _with_program(path, model, posterior)
    elif command is not None:  # what ``genmodels fit`` asked for
        try:
            built, arguments = _built(command)
            posterior = Posterior.load(path, built, *arguments)
        except (ValueError, OSError) as error:
            why = f"The data cannot be replicated: {error}"
    name = str(posterior.info.get("backend", "posterior"))
    page = Page(f"{name} on {posterior.info.get('model', 'a program')}", _size(posterior))
    page.section("Findings")
    page.findings(posterior.diagnose(), f"No finding{': nothing speaks against these draws' * bool(posterior.draws)}.")
    _run(page, {name: posterior}, command)
    _sections(page, {name: posterior}, {name: why} if posterior.program is None else {})
    return page


def _comparison(path: Path, model: Any) -> Page:
    """What ``genmodels compare`` wrote."""
    if model is not None:
        raise ValueError("A comparison names its model itself: leave --model out.")
    settings = _json(path / "comparison.json", "pyro-genmodels comparison")
    kinds: dict[str, Any] = {
        "model": str,
        "data": str,
        "options": dict,
        "methods": dict,
        "held_out": (int, float),
        "seed": int,
    }
    results = settings.setdefault("results", {})
    if any(not isinstance(settings.get(name), kind) for name, kind in {**kinds, "results": dict}.items()):
        raise ValueError(f"'{path / 'comparison.json'}' is damaged, or of another version: compare again.")
    posteriors = {
        name: _read(file, results.get(name) or {})
        for name in METHODS
        if name in settings["methods"] and (file := path / f"{name}.nc").is_file()
    }
    if not posteriors:
        raise ValueError(f"'{path}' holds a comparison of which no back-end has ended: there is nothing to report.")
    options = ", ".join(f"{name}={value}" for name, value in settings["options"].items())
    page = Page(
        f"{settings['model']}({options}) on {settings['data']}",
        f"{len(posteriors)} back-ends on the same rows; {settings['held_out']:.0%} held out, seed {settings['seed']}",
    )
    page.section("Findings")
    for name in posteriors:
        page.heading(name)
        page.findings(results.get(name, {}).get("findings", posteriors[name].diagnose()), "No finding.")
    if (path / "table.csv").is_file():
        page.section("Comparison")
        _compared(page, path / "table.csv", list(posteriors))
    if (path / "density.png").is_file():
        page.section("Predicted density")
        page.picture((path / "density.png").read_bytes(), "Data, predicted density and components")
    _run(page, posteriors, None)
    why = {}
    try:
        built, arguments = _built(settings)
    except (ValueError, OSError) as error:
        why = dict.fromkeys(posteriors, f"The data cannot be replicated: {error}")
    else:
        from inference.program import Program

        posteriors = {
            name: dataclasses.replace(
                one, program=Program(built, arguments, is_fixed=one.info.get("structure") != "changing")
            )
            for name, one in posteriors.items()
        }
    _sections(page, posteriors, why)
    return page


def _run(page: Page, posteriors: Mapping[str, Posterior], command: Mapping[str, Any] | None) -> None:
    """What was run, and the text of the program."""
    page.section("Run")
    first = next(iter(posteriors.values()))
    infos = {name: {**one.info, "draws": _size(one)} for name, one in posteriors.items()}
    facts = {**_FACTS, "draws": "draws"}
    rows = [
        [title, *(_told(_brief(key, info.get(key))) for info in infos.values())]
        for key, title in facts.items()
        if any(info.get(key) not in (None, False, {}) for info in infos.values())
    ]
    if isinstance(command, Mapping):
        rows += [[f"command: {key}", _told(value)] for key, value in command.items() if value is not None]
    page.table(["", *posteriors] if len(posteriors) > 1 else [], rows)
    page.section("Program")
    text = first.info.get("source") or (source(first.program.call) if first.program is not None else "")
    if text:
        page.code(text)
    else:
        page.text("The text of the program was not saved: give --model MODULE:NAME to show it.", soft=True)


def _sections(page: Page, posteriors: Mapping[str, Posterior], why: Mapping[str, str]) -> None:
    """Plan, estimates and pictures; ``why`` says of whom the data cannot be replicated."""
    if any(one.plan is not None for one in posteriors.values()):
        page.section("Plan")
        page.text(
            "Which update moves which site. A certificate is the largest |log acceptance ratio| of an update that claims to "
            "be exact: rounding only, if the claim is true.",
            soft=True,
        )
        for name, one in posteriors.items():
            if one.plan is not None:
                if len(posteriors) > 1:
                    page.heading(name)
                _plan(page, one.plan)
    shown = {name: trimmed for name, one in posteriors.items() if (trimmed := _trimmed(one)).draws}
    if not shown:
        page.section("Draws")
        page.text("This result has no draws: its weights and its history are what was learnt.")
    else:
        page.section("Estimates")
        for name, one in shown.items():
            if len(shown) > 1:
                page.heading(name)
            _estimates(page, one, posteriors[name])
        if any(one.shape[1] > 1 for one in shown.values()):
            _draw(page, "Intervals", lambda: plots.forest(shown, _sites(shown)), _INTERVALS, shown)
    if any(_is_chained(one) for one in shown.values()):
        _draw(page, "Traces", lambda: plots.traces(shown, _sites(shown)), _TRACES, shown)
        _draw(page, "Ranks", lambda: plots.ranks(shown, _sites(shown)), _RANKS, shown)
        _draw(page, "Effective sample sizes", lambda: plots.effective_sizes(shown, _sites(shown)), _SIZES, shown)
        _draw(page, "Growth of effective sizes", lambda: plots.effective_growth(shown, _sites(shown)), _GROWTH, shown)
    if any(one.history for one in posteriors.values()):
        _draw(page, "Learning curves", lambda: plots.learning_curve(posteriors), "What the steps reported.", posteriors)
    if not shown:
        return
    page.section("Predictive check")
    for name, one in posteriors.items():
        if len(posteriors) > 1:
            page.heading(name)
        if one.program is None:
            page.text(why.get(name, "The program is not at hand."), soft=True)
            continue
        names = [str(name) for name in one.coords.get("features", ())]
        try:
            page.picture(plots.predictive_check(one, _REPLICATIONS, names), f"Data and replications of {name}", _CHECK)
        except (ValueError, RuntimeError) as error:
            page.text(f"The data cannot be replicated: {error}", soft=True)


def _is_chained(posterior: Posterior) -> bool:
    return posterior.info.get("kind", "samples") == "samples" and posterior.shape[1] > 1


_INTERVALS = "Medians, with central intervals of 50 % (thick) and 90 % (thin)."
_TRACES = (
    "Draws in the order in which they were made, of the first eight elements. Chains that agree lie on "
    "one another and wander nowhere."
)
_RANKS = (
    "Ranks among the draws of all chains, of the first eight elements: flat where the chains agree, and mostly inside the "
    "grey band (99 % of independent draws). Draws that depend on one another leave it more often."
)
_SIZES = "How many independent draws these are worth, for the worst element of each site; in all, and per second."
_GROWTH = "Effective sizes of the first draws only. A line that levels off says that more draws will not help."
_CHECK = "The data beside what the program says that they might have been. Data that leave the bands are not explained."


def _draw(page: Page, title: str, make: Callable[[], Any], caption: str, posteriors: Mapping[str, Posterior]) -> None:
    """A section of one picture, or of the reason why there is none."""
    page.section(title)
    try:
        page.picture(make(), f"{title} of {_listed(list(posteriors))}", caption)
    except ValueError as error:
        page.text(str(error), soft=True)


def _plan(page: Page, plan: Plan) -> None:
    rows = []
    for update in plan.updates:
        acceptance = "" if math.isnan(update.acceptance) else f"{update.acceptance:.3f}"
        certificate = "-" if update.certificate is None else f"{update.certificate:.1e}"
        sites = update.sites if len(update.sites) <= 8 else (*update.sites[:7], f"… ({len(update.sites)} sites)")
        rows.append([", ".join(sites), update.update, acceptance or "-", certificate, update.note])
    page.table(["sites", "update", "acceptance", "certificate", "note"], rows)


def _estimates(page: Page, shown: Posterior, whole: Posterior) -> None:
    """ArviZ's summary, and what it leaves out."""
    table = summary(shown, _sites({"": shown}), round_to="none")
    head = table.head(_TABLE)
    rows = [[str(label), *map(_number, head.columns, row)] for label, row in zip(head.index, head.to_numpy())]
    page.table(["", *map(str, head.columns)], rows)
    left = [
        site for site, values in whole.draws.items() if site not in shown.draws or values.shape != shown.draws[site].shape
    ]
    if left:
        page.text(
            f"In part or not at all, since they have many elements or belong to single rows: {_listed(left)}.", soft=True
        )
    if len(table) > len(head):
        page.text(f"{len(table) - len(head)} more rows are left out.", soft=True)


def _compared(page: Page, file: Path, methods: Sequence[str]) -> None:
    """table.csv: a row a quantity, a column a back-end."""
    with file.open(newline="", encoding="utf-8") as stream:
        records = list(csv.DictReader(stream))
    cells = {(row["method"], row["quantity"]): row for row in records}
    rows = []
    for quantity in dict.fromkeys(row["quantity"] for row in records):
        rows.append([quantity, *(_with_error(cells.get((method, quantity))) for method in methods)])
    page.table(["", *methods], rows[:_TABLE])
    page.text("Mean ± Monte-Carlo standard error. Components of all back-ends are matched to those of the first.", soft=True)


def _with_error(row: Mapping[str, str] | None) -> str:
    if row is None or not row["value"]:
        return "-"
    value, error = float(row["value"]), float(row["standard_error"] or "nan")
    if not error > 0:
        return f"{value:.5g}"
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _trimmed(posterior: Posterior) -> Posterior:
    """The posterior with labels matched, and without what no page can hold: sites of single rows, elements beyond fifty."""
    try:
        draws = posterior.matched
    except ValueError:  # the labels are matched already, or cannot be
        draws = posterior.draws
    rows = {dim for site in posterior.observed for dim in posterior.dims.get(site, ())}
    own = [site for site in draws if not rows & set(posterior.dims.get(site, ()))] or list(draws)
    kept, dims, symmetry = {}, dict(posterior.dims), {}
    for site in own:
        values = draws[site]
        if not values.numel():
            continue
        if values[0, 0].numel() <= _SHOWN:
            kept[site] = values
            if site in posterior.symmetry:
                symmetry[site] = posterior.symmetry[site]
        else:
            kept[site] = values.flatten(2)[..., :_SHOWN]
            dims.pop(site, None)
    # A symmetry holds for all of its sites or for none.
    whole = symmetry if symmetry.keys() == posterior.symmetry.keys() else {}
    return dataclasses.replace(posterior, draws=kept, dims=dims, symmetry=whole)


def _sites(posteriors: Mapping[str, Posterior]) -> list[str]:
    """The sites that all of the posteriors have."""
    first, *rest = posteriors.values()
    return [site for site in first.draws if all(site in other.draws for other in rest)]


def _read(file: Path, recorded: Mapping[str, Any]) -> Posterior:
    """A posterior from the netCDF file of a comparison, and what its record says."""
    import xarray as xr

    groups: dict[str, dict[str, Tensor]] = {}
    dims: dict[str, tuple[str, ...]] = {}
    coords: dict[str, np.ndarray] = {}
    attrs: dict[str, Any] = {}
    for group in ("posterior", "sample_stats", "observed_data", "constant_data"):
        try:
            data = xr.load_dataset(file, group=group, engine="h5netcdf")
        except (OSError, ValueError, KeyError) as error:
            if group != "posterior" and not isinstance(error, ValueError):
                continue
            raise ValueError(f"'{file}' is damaged, or no netCDF file of a posterior ({error}).") from error
        attrs |= data.attrs
        groups[group] = {str(name): torch.from_numpy(np.array(values)) for name, values in data.items()}
        dims |= {
            str(name): tuple(str(dim) for dim in values.dims if dim not in ("chain", "draw"))
            for name, values in data.items()
        }
        coords |= {str(name): values.to_numpy() for name, values in data.coords.items() if name not in ("chain", "draw")}
    info = dict(recorded.get("info") or {"backend": attrs.get("backend", "draws"), "model": attrs.get("model", "a program")})
    try:
        plan = Plan(tuple(Update(**{**row, "sites": tuple(row["sites"])}) for row in recorded.get("plan") or ()))
    except (TypeError, KeyError) as error:
        raise ValueError(f"The plan of '{file}' is damaged ({error}): compare again.") from error
    return Posterior(
        draws=groups["posterior"],
        stats=groups.get("sample_stats", {}),
        plan=plan or None,
        info=info,
        dims=dims,
        coords=coords,
        observed=groups.get("observed_data", {}),
        constants=groups.get("constant_data", {}),
    )


# --------------------------------------------------------------------------------------------- programs
def _imported(name: str) -> Any:
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


def _with_program(path: Path, model: Any, posterior: Posterior) -> Posterior:
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
        saved = _listed(list(given)) or "nothing"
        raise ValueError(
            f"The program takes '{needed[0]}', which cannot be told from what was saved ({saved}): name the parameter as "
            "that, or give a program of the data alone (functools.partial)."
        )
    loaded = Posterior.load(path, model, **arguments)
    return dataclasses.replace(loaded, info={**loaded.info, "source": source(call) or loaded.info.get("source", "")})


def _built(command: Any) -> tuple[Any, tuple[Tensor, ...]]:
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


# --------------------------------------------------------------------------------------------- training
def _training(path: Path, model: Any) -> Page:
    """What ``genmodels train`` wrote, ended or not."""
    if model is not None:
        raise ValueError("A training run names its model itself: leave --model out.")
    settings = _json(path / "settings.json")
    page = Page(f"{settings.get('model')} on {settings.get('data')}", f"A training run of {settings.get('epochs')} passes.")
    is_ended = (path / "model").exists()
    recipe, network, facts = trained.load(path / "model") if is_ended else (None, None, {})
    page.section("Findings")
    stopped = [] if facts.get("is_done", not is_ended) else ["The run was stopped by Ctrl-C: --resume goes on with it."]
    found = stopped if is_ended else ["The run has not ended: the same train command with --resume goes on with it."]
    page.findings(found, "The run went to its end.")
    page.section("Run")
    page.table([], [[name, _told(value)] for name, value in {**settings, **facts}.items() if value is not None])
    if network is not None:
        page.section("Program")
        page.code(source(network.model))
        if isinstance(network, Guided):
            page.heading("Guide")
            page.code(source(network.guide))
        page.heading("Networks")
        page.code(str(network))
    _logged(page, path / "log.jsonl")
    if recipe is not None and network is not None and recipe.is_pictured:
        page.section("Samples")
        drawn = plots.images(trained.grid(trained.sample(network, _SAMPLES)))
        page.picture(
            drawn, "Pictures that the model draws", f"{_SAMPLES} new rows, the means of their likelihood; not chosen."
        )
    return page


def _log(path: Path, model: Any) -> Page:
    """Logs of ``JSONLines``."""
    if model is not None:
        raise ValueError("A log has no draws that a program could use: leave --model out.")
    page = Page(path.resolve().name, "What a run said of its steps.")
    for file in [path] if path.is_file() else sorted(path.glob("*.jsonl")):
        _logged(page, file)
    return page


def _logged(page: Page, file: Path) -> None:
    page.section(f"Learning curves ({file.name})")
    if not file.is_file():
        page.text("The run has no log yet.", soft=True)
        return
    found = [_line(text) for text in file.read_text(encoding="utf-8", errors="replace").splitlines()]
    cut = [number for number, line in enumerate(found, 1) if line is None]
    if cut and cut != [len(found)]:  # the last one may have been cut by a kill
        raise ValueError(f"'{file}' is no log of JSONLines: see its line {cut[0]}.")
    lines = [line for line in found if line is not None]
    if not lines:
        page.text("The log has no line yet.", soft=True)
        return
    try:
        page.picture(
            plots.log_curves(lines), f"Learning curves of {file.name}", f"{len(lines)} lines, to step {lines[-1]['step']}."
        )
    except ValueError as error:
        page.text(str(error), soft=True)
    page.table(["", "first line", "last line"], [
        [name, _told(lines[0].get(name)), _told(value)] for name, value in lines[-1].items()
    ])  # fmt: skip


def _line(text: str) -> dict[str, Any] | None:
    """A line of a log; None if it is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


# ------------------------------------------------------------------------------------------------ words
def _json(file: Path, form: str | None = None) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{file}' is damaged: {error}.") from error
    if not isinstance(found, dict) or (form is not None and found.get("format") != form):
        raise ValueError(f"'{file}' was written by another program, or is damaged.")
    return found


def _brief(key: str, value: Any) -> Any:
    """A fact without what says nothing."""
    if key == "config" and isinstance(value, Mapping):
        return {name: one for name, one in value.items() if name not in _UNSAID and one not in (None, False, [], ())}
    return str(value)[:19].replace("T", " ") if key == "created_at" else value


def _size(posterior: Posterior) -> str:
    chains, draws = posterior.shape
    return f"{chains} chain{'s' * (chains != 1)} of {draws} draw{'s' * (draws != 1)}"


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_told(one)}" for name, one in value.items() if one is not None)
    if isinstance(value, (list, tuple)):
        return " x ".join(_told(one) for one in value)
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _number(column: str, value: float) -> str:
    """A number of ArviZ's summary, to the digits that say something."""
    if not math.isfinite(value):
        return "-"
    form = (
        ".0f" if column.startswith("ess") else ".3f" if column == "r_hat" else ".2g" if column.startswith("mcse") else ".4g"
    )
    return format(float(value), form)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)
