"""Pages of posteriors: one by itself, and those of a comparison side by side."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference import Posterior, checkpoint
from inference.fingerprint import source
from inference.plan import Plan, Update
from pyro_genmodels import plots
from pyro_genmodels.comparison import METHODS, summary
from pyro_genmodels.page import Page
from pyro_genmodels.report.programs import rebuilt, with_program
from pyro_genmodels.report.words import brief, json_of, listed, rounded, said, size_of

__all__ = ["comparison_page", "posterior_page"]

_SHOWN = 50  # elements of a site that are shown
_TABLE = 60  # rows of the table of estimates
_REPLICATIONS = 50
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


def posterior_page(path: Path, model: Any) -> Page:
    """What ``Posterior.save`` wrote."""
    _, meta = checkpoint.read(path)
    if "draws" not in meta.get("info", {}) and "recipe" in meta:
        raise ValueError(f"'{path}' is a part of what train wrote: give its folder, '{path.resolve().parent}'.")
    posterior = Posterior.load(path)
    command = posterior.info.get("command")
    why = "The program is not at hand, so the data cannot be replicated: give --model MODULE:NAME."
    if model is not None:
        posterior = with_program(path, model, posterior)
    elif command is not None:  # what ``genmodels fit`` asked for
        try:
            built, arguments = rebuilt(command)
            posterior = Posterior.load(path, built, *arguments)
        except (ValueError, OSError) as error:
            why = f"The data cannot be replicated: {error}"
    name = str(posterior.info.get("backend", "posterior"))
    page = Page(f"{name} on {posterior.info.get('model', 'a program')}", size_of(posterior))
    page.section("Findings")
    page.findings(posterior.diagnose(), f"No finding{': nothing speaks against these draws' * bool(posterior.draws)}.")
    _run(page, {name: posterior}, command)
    _sections(page, {name: posterior}, {name: why} if posterior.program is None else {})
    return page


def comparison_page(path: Path, model: Any) -> Page:
    """What ``genmodels compare`` wrote."""
    if model is not None:
        raise ValueError("A comparison names its model itself: leave --model out.")
    settings = json_of(path / "comparison.json", "pyro-genmodels comparison")
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
        built, arguments = rebuilt(settings)
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
    infos = {name: {**one.info, "draws": size_of(one)} for name, one in posteriors.items()}
    facts = {**_FACTS, "draws": "draws"}
    rows = [
        [title, *(said(brief(key, info.get(key))) for info in infos.values())]
        for key, title in facts.items()
        if any(info.get(key) not in (None, False, {}) for info in infos.values())
    ]
    if isinstance(command, Mapping):
        rows += [[f"command: {key}", said(value)] for key, value in command.items() if value is not None]
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


def _draw(page: Page, title: str, make: Callable[[], Any], caption: str, posteriors: Mapping[str, Posterior]) -> None:
    """A section of one picture, or of the reason why there is none."""
    page.section(title)
    try:
        page.picture(make(), f"{title} of {listed(list(posteriors))}", caption)
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
    rows = [[str(label), *map(rounded, head.columns, row)] for label, row in zip(head.index, head.to_numpy())]
    page.table(["", *map(str, head.columns)], rows)
    left = [
        site for site, values in whole.draws.items() if site not in shown.draws or values.shape != shown.draws[site].shape
    ]
    if left:
        page.text(
            f"In part or not at all, since they have many elements or belong to single rows: {listed(left)}.", soft=True
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
