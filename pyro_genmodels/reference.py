"""The API reference: pages made from the docstrings of both packages, by sphinx, which the extra ``docs`` installs."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["build"]

_PACKAGES = ("inference", "pyro_genmodels")
_SECTION = re.compile(r"(Args|Attributes|Returns|Yields|Raises|References|Example|Examples|Note|Notes):\s*")
_LITERAL = re.compile(r"(``.+?``)")
_MARKUP = re.compile(r"([*|`\\]|(?<=\w)_(?!\w))")  # what reStructuredText would take for its own
_INITIAL = re.compile(r"^(\w)\.(?= )")
_ROW = re.compile(r"\S+(?: \S+)* {3,}\S")
_STARRED = re.compile(r"\s*\*{1,2}\w+:")


def build(folder: str | os.PathLike[str]) -> Path:
    """Builds the pages.

    Args:
        folder: Where they go; what an earlier build put there is replaced.

    Returns:
        The first page, index.html.

    Raises:
        ModuleNotFoundError: If sphinx is not installed.
        FileExistsError: If the folder holds something else.
        RuntimeError: If sphinx has a warning; the message has its words.
    """
    try:
        from sphinx.application import Sphinx
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("The reference is built by sphinx: pip install 'pyro-genmodels[docs]'.") from error
    target = Path(folder)
    if target.exists() and not (target / "objects.inv").is_file() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"'{target}' exists and holds something else. Choose a new folder.")
    modules = [importlib.import_module(name) for package in _PACKAGES for name in _names(package)]
    warnings = io.StringIO()
    with tempfile.TemporaryDirectory() as source:
        for name, text in _pages(modules):
            (Path(source) / f"{name}.rst").write_text(text, encoding="utf-8")
        app = Sphinx(
            source, None, str(target), f"{source}/trees", "html", _settings(), status=None, warning=warnings, freshenv=True
        )
        app.connect("autodoc-process-docstring", _escape, priority=100)  # before napoleon
        app.build(force_all=True)
    if said := re.sub(r"\x1b\[[\d;]*m", "", warnings.getvalue()).strip():
        raise RuntimeError(f"sphinx has warnings:\n{said}")
    return target / "index.html"


def _settings() -> dict[str, Any]:
    from pyro_genmodels import __version__

    return {
        "project": "pyro-genmodels",
        "release": __version__,
        "extensions": ["sphinx.ext.autodoc", "sphinx.ext.napoleon"],
        "suppress_warnings": [
            f"app.add_{what}" for what in ("directive", "node", "role", "generic_role", "source_parser")
        ],  # twice
        "autodoc_member_order": "bysource",
        "autodoc_typehints": "none",
        "napoleon_google_docstring": True,
        "napoleon_numpy_docstring": False,
        "napoleon_use_ivar": True,
        "html_show_sourcelink": False,
        "html_show_sphinx": False,
    }


def _names(package: str) -> list[str]:
    found = importlib.import_module(package)
    below = (each.name for each in pkgutil.walk_packages(found.__path__, f"{package}."))
    return [package, *sorted(name for name in below if not name.endswith("__main__"))]


def _pages(modules: list[ModuleType]) -> Iterator[tuple[str, str]]:
    """Name and text of each page: a package lists what it offers, a module documents what it defines."""
    names = [module.__name__ for module in modules]
    tree = "\n".join(f"   {name}" for name in names)
    title = "pyro-genmodels"
    yield "index", f"{title}\n{'=' * len(title)}\n\n.. toctree::\n   :maxdepth: 1\n\n{tree}\n"
    for module in modules:
        name = module.__name__
        heading = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {name}\n"
        own = [key for key in module.__all__ if getattr(getattr(module, key), "__module__", None) == name]
        other = [getattr(module, key) for key in module.__all__ if key not in own]
        defined = [value for value in other if callable(value) and getattr(value, "__module__", "").startswith(_PACKAGES)]
        members = f"   :members: {', '.join(own)}\n" if own else ""
        links = "\n".join(f"* :py:obj:`{value.__module__}.{value.__qualname__}`" for value in defined)
        yield name, f"{heading}{members}\n{links}\n"


def _escape(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are plain text with mathematics: symbols stay themselves, and formulas, indented, keep their lines."""
    escaped: list[str] = []
    section, is_block = "", False
    for line in _indented_tables(lines):
        text, is_indented = line.strip(), line.startswith("    ")
        if text and not is_indented:
            escaped += [""] if is_block and escaped[-1].strip() else []
            section, is_block = text if _SECTION.fullmatch(text) else "", False
        if not section and is_indented and not is_block and escaped and not escaped[-1].strip():
            escaped += ["::", ""]
            is_block = True
        if is_block or text.startswith((">>>", "...")) or section.startswith("Example") or _STARRED.match(line):
            escaped.append(line)
            continue
        if section.startswith("References") and is_indented:
            escaped += [""] if _INITIAL.match(text) else []  # a paragraph each, and no list that begins with the item M.
            escaped.append("    " + _INITIAL.sub(r"\g<1>\\.", _plain(text)))
        else:
            escaped.append(_plain(line))
    lines[:] = escaped


def _plain(line: str) -> str:
    parts = _LITERAL.split(line)
    for i, part in enumerate(parts):
        if not part.startswith("``"):
            parts[i] = _MARKUP.sub(r"\\\1", part)
            if i and part[:1].isalnum():  # the plural of a literal
                parts[i] = "\\ " + parts[i]
    return "".join(parts)


def _indented_tables(lines: list[str]) -> Iterator[str]:
    """Rows such as "name     what it is", and what goes on below them, as blocks that keep their lines."""
    if any(line.startswith("====") for line in lines):  # a table already
        yield from lines
        return
    is_table, before = False, ""
    for line in lines:
        if line and not line.startswith(" "):
            is_row = bool(_ROW.match(line))
            if is_row and not is_table and before.strip():
                yield ""
            is_table = is_row
        yield f"    {line}" if is_table and line.strip() else line
        before = line
