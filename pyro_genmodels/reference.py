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
    if said := warnings.getvalue().strip():
        raise RuntimeError(f"sphinx has warnings:\n{said}")
    return target / "index.html"


def _settings() -> dict[str, Any]:
    from pyro_genmodels import __version__

    return {
        "project": "pyro-genmodels",
        "release": __version__,
        "extensions": ["sphinx.ext.autodoc", "sphinx.ext.napoleon"],
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
    section = before = ""
    for line in lines:
        text, indent = line.strip(), len(line) - len(line.lstrip())
        if indent == 0 and text:
            section = text if _SECTION.fullmatch(text) else ""
        is_code = text.startswith((">>>", "...")) or section.startswith("Example")
        if not section and indent >= 4 and not before and text and not (escaped and escaped[-1].startswith(" ")):
            if not _in_block(escaped):
                escaped += ["::", ""]
        is_formula = not section and indent >= 4
        if is_code or is_formula or _STARRED.match(line):
            escaped.append(line)
        else:
            parts = _LITERAL.split(line)
            escaped.append("".join(p if p.startswith("``") else _MARKUP.sub(r"\\\1", p) for p in parts))
        before = text
    lines[:] = escaped


def _in_block(lines: list[str]) -> bool:
    """Whether the last line that is not empty is of a formula: blocks in a row are one."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    return last.startswith("    ")
