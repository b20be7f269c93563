"""The API reference is built from the docstrings without a warning, and has every public name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyro_genmodels import reference

pytest.importorskip("sphinx", reason="sphinx is not installed: pip install 'pyro-genmodels[docs]'.")


def escaped(text: str) -> str:
    lines = text.splitlines()
    reference._escape(None, "class", "name", None, None, lines)
    return "\n".join(lines)


def test_symbols_stay_themselves_and_formulas_keep_their_lines() -> None:
    assert escaped("x_ and 2 * |y| of ``a_*`` and ``b``s") == r"x\_ and 2 \* \|y\| of ``a_*`` and ``b``\ s"
    assert escaped("It is\n\n    z ~ N(0, 1)\n    x | z ~ N(z, 1)\n\nand so on.") == (
        "It is\n\n::\n\n    z ~ N(0, 1)\n    x | z ~ N(z, 1)\n\nand so on."
    )
    assert escaped("Args:\n    *args: Of x_.\n    x: (row, *shape).").splitlines()[1:] == [
        "    *args: Of x_.",
        r"    x: (row, \*shape).",
    ]
    assert escaped("References:\n    M. Ay, On x\n        (2000).") == "References:\n\n    M\\. Ay, On x\n    (2000)."


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("1")
    with pytest.raises(FileExistsError, match="exists and holds something else. Choose a new folder"):
        reference.build(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The mapping interface for autodoc options")  # of sphinx 9, by its own napoleon
def test_all_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    index = reference.build(tmp_path / "pages")
    assert index.is_file()
    text = (tmp_path / "pages" / "inference.em.html").read_text(encoding="utf-8")
    assert 'id="inference.em.EM"' in text and "E-step" in text
    start = (tmp_path / "pages" / "inference.html").read_text(encoding="utf-8")
    assert re.search(r'href="inference\.em\.html#inference\.em\.EM"', start)
    reference.build(tmp_path / "pages")  # once more, over what is there
