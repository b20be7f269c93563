"""What an import costs: ``inference`` and ``pyro_genmodels`` beside ``pyro``, each in processes of its own.

    python examples/benchmarks/import_time.py --runs 7

Processor seconds of the import alone, user and system, from modules that are compiled, as pip leaves them; one process of
each kind in turn, so that what else the machine does hits all alike. Asked for: no more than Pyro plus 0.2 s.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile

import torch
from rows import Rows

ASKED = 0.2
NAMES = ("torch", "pyro", "inference", "pyro_genmodels")
CODE = "import time; begun = time.process_time(); import {}; print(time.process_time() - begun)"


def seconds(name: str, cache: str) -> float:
    """Processor seconds of one import in a fresh process."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = cache
    done = subprocess.run([sys.executable, "-c", CODE.format(name)], capture_output=True, text=True, check=True, env=env)
    return float(done.stdout)


def main(smoke: bool = False, runs: int = 7) -> None:
    """Prints the table."""
    print(f"python examples/benchmarks/import_time.py --runs {runs}")
    print(f"{datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, 2 cores, shared\n")
    with tempfile.TemporaryDirectory() as cache:
        for name in NAMES:
            seconds(name, cache)  # compiles the modules
        taken = [{name: seconds(name, cache) for name in NAMES} for _ in range(1 if smoke else runs)]
    print(f"{'import':17}{'processor s':>12}{'more than pyro':>16}   median of {len(taken)} runs, differences in pairs")
    rows = Rows()
    for name in NAMES:
        middle = statistics.median(run[name] for run in taken)
        more = statistics.median(run[name] - run["pyro"] for run in taken)
        if name not in ("torch", "pyro"):
            rows.add("processor seconds of an import beyond pyro's", name, more, target=ASKED)
        verdict = "" if name in ("torch", "pyro") else f"   (asked for: {ASKED}) {'ok' if more <= ASKED else 'MISSED'}"
        print(f"{name:17}{middle:12.3f}{more:16.3f}{verdict}")
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="processes of each kind")
    main(runs=parser.parse_args().runs)
