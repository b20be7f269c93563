"""The command line for pages: ``genmodels report | gallery``, each of which writes one HTML file that needs no server."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_genmodels import report
from pyro_genmodels.page import Page

__all__ = ["add"]


def add(commands: Any, count: Callable[[str], int]) -> None:
    """Adds the commands to a parser.

    Args:
        commands: What ``add_subparsers`` gave.
        count: Reads an integer of at least 1.
    """
    command = commands.add_parser("report", help="a saved posterior, comparison or training run as one HTML page")
    command.set_defaults(command=_report)
    command.add_argument("folder", type=Path, metavar="FOLDER", help="what fit, compare, train wrote; or a log (.jsonl)")
    command.add_argument(
        "--model", metavar="MODULE:NAME", help="the program that was fitted, or FILE.py:NAME; its module is imported"
    )
    command.add_argument("--out", type=Path, metavar="FILE", help="the page (FOLDER.html, beside the folder)")


def _report(args: argparse.Namespace) -> int:
    folder = args.folder.resolve()
    out = args.out or folder.with_name(f"{folder.name}.html")
    report.find(args.folder)
    if folder.is_dir() and folder in out.resolve().parents:
        raise ValueError(f"--out lies in '{args.folder}', which a later run would then not replace: put the page beside it.")
    _check(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        page = report.report(args.folder, args.model)
    page.write(out)
    print(f"{page.title}: {out}")
    return 0


def _check(out: Path) -> None:
    """Refuses to replace what is no page of ours."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is '{out}', but must end in .html.")
    if out.is_dir():
        raise ValueError(f"--out is '{out}', which is a folder: name a file in it, such as report.html.")
    if out.exists() and Page.MARK not in out.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"'{out}' exists and is no page of pyro-genmodels: choose another name.")
