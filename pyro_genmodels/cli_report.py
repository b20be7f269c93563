"""The command line for pages: ``genmodels report | gallery``, each of which writes one HTML file that needs no server."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyro_genmodels import gallery, report
from pyro_genmodels.comparison import check_writable
from pyro_genmodels.page import Page

__all__ = ["add"]

_FAILED = 1


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

    command = commands.add_parser("gallery", help="all examples of a checkout, run, on one HTML page")
    command.set_defaults(command=_gallery)
    command.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where index.html goes")
    command.add_argument("--examples", type=Path, metavar="FOLDER", help="where they are (examples, of a checkout)")
    command.add_argument("--only", metavar="A,B,C", help="names of some")
    command.add_argument("--smoke", action="store_true", help="a few steps of each, to see that it runs")
    command.add_argument("--timeout", type=count, default=1800, metavar="S", help="seconds for each (1800)")


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


def _gallery(args: argparse.Namespace) -> int:
    paths = gallery.examples(args.examples)
    if args.only is not None:
        names = {path.stem: path for path in paths}
        if unknown := [name for name in args.only.split(",") if name not in names]:
            raise ValueError(f"There is no example '{unknown[0]}'; there are {', '.join(names)}.")
        paths = [names[name] for name in args.only.split(",")]
    out = args.out / "index.html"
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"'{args.out}' is a file, but a folder is to be written there. Choose another name.")
    _check(out)
    check_writable(args.out)

    def say(outcome: gallery.Outcome) -> None:
        state = "passed" if outcome.failure is None else f"FAILED  {outcome.failure.splitlines()[-1]}"
        print(f"{outcome.path.stem:24}{outcome.seconds:7.1f} s   {state}", flush=True)

    page, outcomes, is_whole = gallery.gallery(paths, args.smoke, args.timeout, say)
    page.write(out)
    failed = [outcome.path.stem for outcome in outcomes if outcome.failure is not None]
    print(f"\n{len(outcomes) - len(failed)} of {len(paths)} passed: {out}")
    if not is_whole:
        raise KeyboardInterrupt(f"Stopped by Ctrl-C; {out} has what there is so far.")
    return _FAILED if failed else 0


def _check(out: Path) -> None:
    """Refuses to replace what is no page of ours."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out is '{out}', but must end in .html.")
    if out.is_dir():
        raise ValueError(f"--out is '{out}', which is a folder: name a file in it, such as report.html.")
    if out.exists() and Page.MARK not in out.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"'{out}' exists and is no page of pyro-genmodels: choose another name.")
