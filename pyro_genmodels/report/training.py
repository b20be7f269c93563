"""Pages of training runs and of their logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from inference.contract import Guided
from inference.fingerprint import source
from pyro_genmodels import plots, trained
from pyro_genmodels.page import Page
from pyro_genmodels.report.words import json_of, said

__all__ = ["log_page", "training_page"]

_SAMPLES = 64


def training_page(path: Path, model: Any) -> Page:
    """What ``genmodels train`` wrote, ended or not."""
    if model is not None:
        raise ValueError("A training run names its model itself: leave --model out.")
    settings = json_of(path / "settings.json")
    page = Page(f"{settings.get('model')} on {settings.get('data')}", f"A training run of {settings.get('epochs')} passes.")
    is_ended = (path / "model").exists()
    recipe, network, facts = trained.load(path / "model") if is_ended else (None, None, {})
    page.section("Findings")
    stopped = [] if facts.get("is_done", not is_ended) else ["The run was stopped by Ctrl-C: --resume goes on with it."]
    found = stopped if is_ended else ["The run has not ended: the same train command with --resume goes on with it."]
    page.findings(found, "The run went to its end.")
    page.section("Run")
    page.table([], [[name, said(value)] for name, value in {**settings, **facts}.items() if value is not None])
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


def log_page(path: Path, model: Any) -> Page:
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
        [name, said(lines[0].get(name)), said(value)] for name, value in lines[-1].items()
    ])  # fmt: skip


def _line(text: str) -> dict[str, Any] | None:
    """A line of a log; None if it is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
