"""Every example of a checkout, run, on one page: pictures, printed tables, times, and the code.

An example is a file with a function ``main(smoke=False, folder=...)``, which prints a table and saves pictures there. Each
runs in a process of its own, so that none sees what another left behind, and one that crashes costs the others nothing.
"""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyro_genmodels.page import Page

__all__ = ["Outcome", "examples", "gallery", "run"]

_LAST = 20  # lines of a failed example that are shown
_CODE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("example", sys.argv[1])
module = sys.modules["example"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(1)
module.main(smoke=sys.argv[3] == "smoke", folder=sys.argv[2])
"""


@dataclass(frozen=True)
class Outcome:
    """What came of one example.

    Attributes:
        path: Its file.
        seconds: Wall time of its process, imports included.
        printed: What it printed.
        pictures: Name to bytes of the pictures that it saved.
        failure: Its last lines, or why it was stopped; None if it passed.
    """

    path: Path
    seconds: float
    printed: str
    pictures: dict[str, bytes]
    failure: str | None


def examples(folder: str | os.PathLike[str] | None = None) -> list[Path]:
    """The examples of a folder, by name.

    Args:
        folder: Where they are; None takes ``examples`` in the current folder, or beside the package, as in a checkout.

    Raises:
        ValueError: If there are none.
    """
    places = [Path(folder)] if folder is not None else [Path("examples"), Path(__file__).parents[1] / "examples"]
    for place in places:
        if found := [path for path in sorted(place.glob("*.py")) if _main(path)]:
            return found
    if folder is None:
        raise ValueError(
            "There are no examples here: they are not part of the installed package, but lie in its checkout, in the folder "
            "examples. Go there, or give --examples FOLDER."
        )
    raise ValueError(f"'{folder}' holds no example: none of its files has a function main(smoke, folder).")


def _main(path: Path) -> bool:
    """Whether a file has a function main that takes smoke and folder; its code is not run."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, SyntaxError):
        return False
    made = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"]
    return any({"smoke", "folder"} <= {argument.arg for argument in node.args.args} for node in made)


def run(path: Path, smoke: bool = False, timeout: float = 1800.0) -> Outcome:
    """Runs one example in a process of its own.

    Args:
        path: Its file.
        smoke: Whether it takes a few steps only.
        timeout: Seconds after which it is stopped.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CODE, str(path), folder, "smoke" if smoke else ""]
        begun = time.perf_counter()
        try:
            ended = subprocess.run(
                command,
                env={**os.environ, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout,
                check=False,
            )
            printed, said, status = ended.stdout, ended.stderr, ended.returncode
        except subprocess.TimeoutExpired as stop:
            printed, said = (
                part.decode("utf-8", "replace") if isinstance(part, bytes) else part or ""
                for part in (stop.stdout, stop.stderr)
            )
            status, said = 1, f"{said}\nStopped after {timeout:g} s."
        seconds = time.perf_counter() - begun
        printed, said = (text.replace(f"{folder}{os.sep}", "") for text in (printed, said))
        pictures = {file.name: file.read_bytes() for file in sorted(Path(folder).rglob("*.png"))}
    failure = None
    if status:
        lines = [line.split("\r")[-1] for line in [*printed.splitlines(), *said.splitlines()] if line.strip()]
        failure = "\n".join(lines[-_LAST:]) or f"It ended with status {status} and said nothing."
    elif not pictures:
        failure = "It saved no picture."
    return Outcome(path, seconds, printed, pictures, failure)


def gallery(
    paths: Sequence[Path],
    smoke: bool = False,
    timeout: float = 1800.0,
    after: Callable[[Outcome], None] | None = None,
) -> tuple[Page, list[Outcome], bool]:
    """Runs examples one after the other and puts what came of them on a page.

    Args:
        paths: Their files.
        smoke: Whether each takes a few steps only.
        timeout: Seconds after which each is stopped.
        after: Called with what came of each, as soon as it is known.

    Returns:
        The page, what came of each, and whether all were run: Ctrl-C ends the run, and the page shows what there is.
    """
    outcomes: list[Outcome] = []
    is_whole = True
    try:
        for path in paths:
            outcomes.append(run(path, smoke, timeout))
            if after is not None:
                after(outcomes[-1])
    except KeyboardInterrupt:
        is_whole = False
    return _page(paths, outcomes, smoke), outcomes, is_whole


def _page(paths: Sequence[Path], outcomes: Sequence[Outcome], smoke: bool) -> Page:
    from inference.fingerprint import versions

    kind = (
        "A few steps of each, to see that it runs: its numbers and pictures say nothing." if smoke else "Each as it stands."
    )
    page = Page("Examples", kind)
    page.section("All examples")
    failed = [outcome for outcome in outcomes if outcome.failure is not None]
    left = [path.stem for path in paths[len(outcomes) :]]
    found = [f"{outcome.path.stem} failed." for outcome in failed]
    page.findings(found + ([f"Not run, after Ctrl-C: {', '.join(left)}."] if left else []), f"All {len(outcomes)} passed.")
    rows = [
        [outcome.path.stem, _title(outcome.path), f"{outcome.seconds:.1f}", "failed" if outcome.failure else "passed"]
        for outcome in outcomes
    ]
    page.table(["example", "what it shows", "seconds", ""], rows, {"failed": "bad", "passed": "good"})
    named = ", ".join(f"{name} {version}" for name, version in versions().items())
    day = time.strftime("%Y-%m-%d")
    page.text(
        f"{day}, Python {platform.python_version()}, {named}; {os.cpu_count()} cores, one thread a process.", soft=True
    )
    for outcome in outcomes:
        page.section(outcome.path.stem)
        first, *rest = (ast.get_docstring(ast.parse(outcome.path.read_text(encoding="utf-8"))) or "").split("\n\n")
        for paragraph in (first, *(part for part in rest if not part.startswith("    "))):
            page.text(_plain(paragraph))
        page.text(f"{outcome.seconds:.1f} s", soft=True)
        if outcome.failure is not None:
            page.findings(["It failed. Its last lines:"])
            page.code(outcome.failure)
        for name, picture in outcome.pictures.items():
            page.picture(picture, f"{name} of {outcome.path.stem}", name)
        if outcome.printed.strip():
            page.code(outcome.printed)
        page.code(outcome.path.read_text(encoding="utf-8"), f"The code: {outcome.path.name}")
    return page


def _title(path: Path) -> str:
    """The first sentence of a file's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return _plain(text.split("\n\n")[0])


def _plain(paragraph: str) -> str:
    """A paragraph of a docstring on one line."""
    return " ".join(paragraph.replace("``", "").split())
