"""Runs benchmarks beside their peers (extra ``bench``), keeps what they print, and makes one table of it.

    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/run.py --all
    python examples/benchmarks/run.py hmm svi_step           # some of them
    python examples/benchmarks/run.py mnist_vae --options="--epochs 30 --images 500"
    python examples/benchmarks/run.py hmm --smoke            # a few steps, to see that it runs; keeps nothing
    python examples/benchmarks/run.py --from-results         # the table of what is there

Each script runs in a process of its own, one after the other. What it prints goes to results/NAME.txt, below lines that say
when, on what machine and under which load; a script that fails leaves the old file. The table goes to results/table.md: what
was measured, on what, ours, theirs, how many times better (or better by how much), the target, and whether it is met; the
rows with a peer go into README as well. The exit status is 1 if a script failed; a target that is missed is a result.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from rows import Row, read

FOLDER = Path(__file__).parent
RESULTS, TABLE = FOLDER / "results", "table.md"
OTHERS = ("clock", "run", "rows")  # files here that are no benchmarks
ON_GPU = ("infogan_mnist", "pictures_diffusion")  # run by name, with a GPU, and kept by hand as results/NAME_CARD.txt
PACKAGES = ("torch", "pyro-ppl", "numpy", "arviz", "scikit-learn", "numpyro", "tomotopy", "gensim", "pomegranate", "pythae")
README, MARKS = FOLDER.parents[1] / "README.md", ("<!-- benchmarks -->\n", "<!-- /benchmarks -->")
HEAD = ("benchmark", "measured", "on", "ours", "theirs", "peer", "gain", "target", "", "date")


def names() -> list[str]:
    """All benchmarks."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in OTHERS)


def header(command: str) -> str:
    """What was run, when, and on what."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = f"{platform.machine()}, {os.cpu_count()} cores, shared: a load of {os.getloadavg()[0]:.1f} at its start"
    return f"{command}\n{datetime.date.today()}; {machine}\n{', '.join(found)}\n\n"


def run(name: str, smoke: bool, timeout: float, options: Sequence[str] = ()) -> tuple[str, str | None]:
    """Runs a script and shows what it prints; all of it, and why it failed, if it did."""
    script = FOLDER / f"{name}.py"
    options = [*options, *(["--smoke"] if smoke and "--smoke" in script.read_text(encoding="utf-8") else [])]
    command = [sys.executable, str(script), *options]
    lines = [header(shlex.join(["python", f"examples/benchmarks/{name}.py", *options]))]
    begun = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8") as process,
    ):
        watch = threading.Timer(timeout, process.kill)
        watch.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                lines.append(line)
            status = process.wait()
        finally:
            watch.cancel()
            process.kill()
        errors.seek(0)
        said = [line for line in errors.read().splitlines() if line.strip()]
    spent = time.perf_counter() - begun
    lines.append(f"\n{spent:.0f} s in all\n")
    if status and spent >= timeout:
        return "".join(lines), f"stopped after {timeout:g} s"
    return "".join(lines), (said[-1] if said else f"it ended with status {status}") if status else None


def told(row: Row) -> list[str]:
    """The cells of a row between its name and its date."""
    sign = "" if row.theirs is None else "+" if row.is_difference else "x"
    gain = "" if not sign else f"{row.gain:+.4g}" if sign == "+" else f"{row.gain:.3g} x"
    target = ""
    if row.target is not None:
        bound = "at most" if row.theirs is None and row.is_less_better else "at least"
        form = {"": ".4g", "+": "+.4g", "x": ".3g"}[sign]
        target = f"{bound} {row.target:{form}}{' x' * (sign == 'x')}"
    theirs = "" if row.theirs is None else f"{row.theirs:.8g}"
    return [row.measured, row.on, f"{row.ours:.8g}", theirs, row.peer, gain, target, row.verdict]


def table(folder: Path, failures: dict[str, str]) -> str:
    """The table of the results in a folder, and what it lacks; failures are of this run."""
    rows: list[list[str]] = []
    older: list[str] = []
    never: list[str] = []
    for name in sorted({*names(), *(path.stem for path in folder.glob("*.txt"))}):
        path = folder / f"{name}.txt"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = read(text.splitlines())
        dates = re.findall(r"\d{4}-\d\d-\d\d", text)
        rows += [[name, *told(row), dates[0] if dates else ""] for row in found]
        if not found and (text or not any(folder.glob(f"{name}_*.txt"))):
            (older if text else never).append(name)
    lines = ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    verdicts = [row[-2] for row in rows]
    lines += ["", f"{len(rows)} rows, {verdicts.count('met')} targets met, {verdicts.count('MISS')} missed."]
    lines += [f"\nFailed in this run: {'; '.join(f'{name}: {why}' for name, why in failures.items())}."] if failures else []
    lines += [f"\nResults without rows, which the script does not or did not print: {', '.join(older)}."] if older else []
    lines += [f"\nNot run: {', '.join(never)}."] if never else []
    return "\n".join(lines) + "\n"


def short(number: float) -> str:
    """Three digits, or all before the point."""
    return f"{number:,.0f}" if 1000.0 <= abs(number) < 1e9 else f"{number:.3g}"


def comparisons(folder: Path) -> str:
    """The rows of the results in a folder that have a peer, as README shows them, in three digits."""
    lines = ["| measured | on | ours | theirs | gain | asked | |", "|" + " --- |" * 7]
    dates: list[str] = []
    for name in names():
        path = folder / f"{name}.txt"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for row in read(text.splitlines()):
            if row.theirs is None:
                continue
            measured, on, _, _, peer, gain, target, verdict = told(row)
            cells = [measured, on, short(row.ours), f"{short(row.theirs)} {peer}", gain, target, verdict]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
            dates += re.findall(r"\d{4}-\d\d-\d\d", text)[:1]
    verdicts = [line.rsplit("|", 2)[1].strip() for line in lines[2:]]
    said = f"{len(verdicts)} comparisons, {verdicts.count('met')} targets met, {verdicts.count('MISS')} missed"
    when = ", " + " to ".join(sorted({min(dates), max(dates)})) if dates else ""
    return "\n".join([f"{said}; two shared cores, no GPU{when}.", "", *lines]) + "\n"


def put_into_readme(path: Path, found: str) -> None:
    """Between the two marks."""
    before, rest = path.read_text(encoding="utf-8").split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(before + MARKS[0] + found + MARKS[1] + after, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}")
    parser.add_argument("--all", action="store_true", help="all but those for a GPU, which takes hours")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each that knows how; nothing is kept")
    parser.add_argument("--options", default="", metavar="TEXT", help="of the one script that is named, in one string")
    parser.add_argument("--timeout", type=float, default=7200.0, metavar="S", help="seconds for each (7200)")
    parser.add_argument("--from-results", action="store_true", help="run nothing: the table of what is there")
    options = parser.parse_args()
    if sum((bool(options.names), options.all, options.from_results)) != 1:
        parser.error("give names, --all, or --from-results")
    if unknown := [name for name in options.names if name not in names()]:
        parser.error(f"there is no benchmark '{unknown[0]}'; there are {', '.join(names())}")
    if options.options and len(options.names) != 1:
        parser.error("--options are those of one script: give one name")
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) if options.smoke else RESULTS
        for name in [n for n in names() if n not in ON_GPU] if options.all else options.names:
            try:
                text, failure = run(name, options.smoke, options.timeout, shlex.split(options.options))
            except KeyboardInterrupt:
                failures[name] = "stopped by Ctrl-C, and the benchmarks after it"
                break
            if failure is not None:
                failures[name] = failure
                print(f"{name} failed: {failure}\n", flush=True)
                continue
            fresh = folder / f".{name}.txt.new"
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(folder / f"{name}.txt")
        found = table(folder, failures)
        print(found)
        if not options.smoke:
            (RESULTS / TABLE).write_text(found, encoding="utf-8")
            put_into_readme(README, comparisons(RESULTS))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
