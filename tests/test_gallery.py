"""The gallery runs every example alone, shows what came of it, and says so where it failed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import pages
from pyro_genmodels import cli, gallery

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="  # one pixel
GOOD = f'''"""What a *good* one shows, with ``code`` & <b>.

    python examples/good.py

More of it.
"""

import base64
from pathlib import Path


def main(smoke=False, folder="runs/good"):
    print("smoke" if smoke else "whole", "é ± <b>")
    Path(folder).mkdir(exist_ok=True)
    (Path(folder) / "dot.png").write_bytes(base64.b64decode("{PNG}"))
    print(f"Saved {{Path(folder) / 'dot.png'}}")


if __name__ == "__main__":
    raise SystemExit("not to be run")
'''
BAD = "import sys\ndef main(smoke, folder):\n    print('before')\n    raise ValueError('what went wrong')\n"
BLANK = "def main(smoke, folder):\n    print('nothing to see')\n"
STUCK = "import time\ndef main(smoke, folder):\n    print('begun', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of one example that passes, and files that are no examples."""
    made = tmp_path / "examples"
    made.mkdir()
    (made / "good.py").write_text(GOOD, encoding="utf-8")
    (made / "helper.py").write_text("def main():\n    raise SystemExit(1)\n")
    (made / "broken.py").write_text("def main(smoke, folder:\n")
    return made


def run(*argv: str) -> int:
    return cli.main(["gallery", *argv])


def test_a_page_shows_what_each_printed_and_drew(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--examples", str(folder), "--out", str(tmp_path / "out"), "--smoke") == 0
    assert "1 of 1 passed" in capsys.readouterr().out
    page = pages.check(tmp_path / "out" / "index.html")
    assert [*(tmp_path / "out").iterdir()] == [tmp_path / "out" / "index.html"]
    assert page.said("h2") == ["All examples", "good"] and len(page.all("img")) == 1
    printed, code = page.said("pre")
    assert printed == "smoke é ± <b>\nSaved dot.png" and code == GOOD.strip()
    assert "What a *good* one shows, with code & <b>." in page.said("p") and "passed" in page.said("td")


def test_a_failed_one_is_shown_with_its_last_lines_and_costs_the_others_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"bad": BAD, "blank": BLANK}.items():
        (folder / f"{name}.py").write_text(text)
    assert run("--examples", str(folder), "--out", str(tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert "1 of 3 passed" in printed and "FAILED  ValueError: what went wrong" in printed
    page = pages.check(tmp_path / "out" / "index.html")
    assert page.said("td").count("failed") == 2 and page.said("td").count("passed") == 1
    assert {"bad failed.", "blank failed."} <= {*page.said("li")}
    shown = "\n".join(page.said("pre"))
    for line in ("before", "ValueError: what went wrong", "It saved no picture.", "whole é"):
        assert line in shown


def test_one_that_does_not_end_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    outcome = gallery.run(tmp_path / "stuck.py", timeout=2)
    assert outcome.seconds < 30 and (outcome.failure or "").endswith("Stopped after 2 s.")


def test_ctrl_c_leaves_what_there_is(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "later.py").write_text(BLANK)

    def stop(path: Path, *others: Any) -> gallery.Outcome:
        if path.stem == "later":
            raise KeyboardInterrupt
        return whole(path, *others)

    whole = gallery.run
    monkeypatch.setattr(gallery, "run", stop)
    assert run("--examples", str(folder), "--out", str(tmp_path / "out")) == 130
    assert "has what there is so far" in capsys.readouterr().err
    page = pages.check(tmp_path / "out" / "index.html")
    assert page.said("h2") == ["All examples", "good"] and "Not run, after Ctrl-C: later." in page.said("li")


def test_the_examples_of_this_checkout_are_found() -> None:
    root = Path(__file__).parents[1]
    found = [path.resolve() for path in gallery.examples()]
    assert found == gallery.examples(root / "examples") == sorted((root / "examples").glob("*.py"))


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--examples", "nowhere", "--out", "out"], "'nowhere' holds no example"),
        (["--examples", "examples", "--out", "out", "--only", "god"], "There is no example 'god'; there are good"),
        (["--examples", "examples", "--out", "examples/good.py"], "is a file, but a folder is to be written there"),
        (["--examples", "examples", "--out", "site"], "is no page of pyro-genmodels: choose another name"),
    ],
)
def test_bad_input_is_refused_before_the_first_example(
    argv: list[str],
    sentence: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("years of work")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    assert run(*argv) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and sentence in said and said.count("\n") == 1


def test_an_installed_package_says_where_examples_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gallery, "__file__", str(tmp_path / "site-packages" / "pyro_genmodels" / "gallery.py"))
    assert run("--out", "out") == 2
    assert "they are not part of the installed package" in capsys.readouterr().err
