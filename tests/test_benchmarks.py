"""The table of benchmarks says what was measured, and nothing else."""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """rows.py and run.py, as scripts beside them see them."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module("rows"), importlib.import_module("run")
    for name in ("rows", "run"):
        sys.modules.pop(name, None)


GOOD = """
from rows import Rows
print("a table")
rows = Rows()
rows.add("seconds", "one | two", 2.0, theirs=7.0, peer="them", target=3.0)
rows.add("score", "one", 0.5, theirs=0.75, peer="them", is_less_better=False, is_difference=True, target=-0.1)
rows.show()
"""


@pytest.mark.parametrize(
    ("row", "gain", "verdict"),
    [
        ({"ours": 2.0, "theirs": 6.0, "target": 3.0}, 3.0, "met"),
        ({"ours": 2.0, "theirs": 5.9, "target": 3.0}, 2.95, "MISS"),
        ({"ours": 6.0, "theirs": 2.0, "is_less_better": False, "target": 3.0}, 3.0, "met"),
        ({"ours": -5.0, "theirs": -4.0, "is_less_better": False, "is_difference": True, "target": 0.0}, -1.0, "MISS"),
        ({"ours": 4.0, "theirs": 5.0, "is_difference": True, "target": 1.0}, 1.0, "met"),
        ({"ours": 1.02, "target": 1.03}, 1.02, "met"),
        ({"ours": 1.04, "target": 1.03}, 1.04, "MISS"),
        ({"ours": 0.4, "is_less_better": False, "target": 0.5}, 0.4, "MISS"),
        ({"ours": 2.0, "theirs": 6.0}, 3.0, ""),
        ({"ours": 0.0, "theirs": 6.0, "target": 2.0}, math.nan, "MISS"),
        ({"ours": math.nan, "theirs": 6.0, "target": 2.0}, math.nan, "MISS"),
        ({"ours": math.nan, "target": 2.0}, math.nan, "MISS"),
    ],
)
def test_gain_and_verdict_follow_from_the_numbers(row: dict[str, Any], gain: float, verdict: str, modules: Any) -> None:
    made = modules[0].Row(measured="seconds", on="data", **row)
    assert made.gain == pytest.approx(gain, nan_ok=True) and made.verdict == verdict


def test_rows_are_read_as_they_were_shown(modules: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = modules[0].Rows()
    rows.add("µs, a step", 'data "quoted"', 0.1234567, theirs=7, peer="them", target=3.0)
    rows.add("seconds", "row {}", math.inf)
    rows.show()
    found = modules[0].read(["row of a table", *capsys.readouterr().out.splitlines()])
    assert [row.measured for row in found] == ["µs, a step", "seconds"]
    assert found[0].ours == pytest.approx(0.1234567, rel=1e-5) and found[0].target == 3.0 and found[1].ours == math.inf


def test_a_run_keeps_what_was_printed_and_makes_the_table(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = modules
    for name, text in {"good": GOOD, "bad": "print('begun')\nraise SystemExit('no peer here')", "later": "1"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "rows.py").write_text((FOLDER / "rows.py").read_text(encoding="utf-8"), encoding="utf-8")
    results = tmp_path / "results"
    results.mkdir()
    (results / "bad.txt").write_text("2020-01-01, an older run")
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "RESULTS", results)
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nbelow\n")
    monkeypatch.setattr(run, "README", readme)
    monkeypatch.setattr(sys, "argv", ["run.py", "good", "bad"])
    assert run.main() == 1
    kept = (results / "good.txt").read_text(encoding="utf-8")
    assert kept.startswith("python examples/benchmarks/good.py\n") and "a table\n" in kept and "a load of" in kept
    assert (results / "bad.txt").read_text() == "2020-01-01, an older run"
    table = (results / "table.md").read_text(encoding="utf-8")
    assert "| good | seconds | one \\| two | 2 | 7 | them | 3.5 x | at least 3 x | met | 20" in table
    assert "| good | score | one | 0.5 | 0.75 | them | -0.25 | at least -0.1 | MISS | 20" in table
    for said in ("2 rows, 1 targets met, 1 missed.", "bad: no peer here.", "did not print: bad.", "Not run: later."):
        assert said in table
    assert table in capsys.readouterr().out
    shown = readme.read_text(encoding="utf-8")
    assert "| seconds | one \\| two | 2 | 7 them | 3.5 x | at least 3 x | met |" in shown
    assert shown.startswith("above\n<!-- benchmarks -->\n2 comparisons, 1 targets met, 1 missed;") and "old" not in shown
    assert shown.endswith("<!-- /benchmarks -->\nbelow\n")
    # From what is there the same table comes, but for what failed only then.
    monkeypatch.setattr(sys, "argv", ["run.py", "--from-results"])
    assert run.main() == 0
    assert (results / "table.md").read_text(encoding="utf-8") == table.replace(
        "\nFailed in this run: bad: no peer here.\n", ""
    )
    # A smoke run keeps nothing.
    monkeypatch.setattr(sys, "argv", ["run.py", "good", "--smoke"])
    before = sorted((path.name, path.stat().st_mtime_ns) for path in results.iterdir())
    assert run.main() == 0
    assert sorted((path.name, path.stat().st_mtime_ns) for path in results.iterdir()) == before


def test_a_script_that_does_not_end_is_stopped(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stuck.py").write_text("import time\ntime.sleep(60)")
    monkeypatch.setattr(modules[1], "FOLDER", tmp_path)
    text, failure = modules[1].run("stuck", False, 0.5)
    assert failure == "stopped after 0.5 s" and float(re.findall(r"(\d+) s in all", text)[0]) < 30


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "give names, --all, or --from-results"),
        (["--all", "--from-results"], "give names, --all, or --from-results"),
        (["hmm", "gmm", "--options=--smoke"], "--options are those of one script: give one name"),
        (["hmn"], "there is no benchmark 'hmn'; there are "),
    ],
)
def test_bad_input_is_refused(
    argv: list[str], sentence: str, modules: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *argv])
    with pytest.raises(SystemExit):
        modules[1].main()
    assert sentence in capsys.readouterr().err


def test_every_script_shows_its_rows(modules: Any) -> None:
    """All but those whose results have no number to set beside another."""
    without = {name for name in modules[1].names() if ".show()" not in (FOLDER / f"{name}.py").read_text(encoding="utf-8")}
    assert without <= {"missing_mnist", "vade"}


def test_readme_shows_the_results_there_are(modules: Any) -> None:
    _, run = modules
    assert run.comparisons(run.RESULTS) in run.README.read_text(encoding="utf-8")
