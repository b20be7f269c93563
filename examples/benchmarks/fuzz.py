"""Damaged files for every reader: what became of each kind, and a sentence of each.

    python examples/benchmarks/fuzz.py --count 2000

Damage is flipped bits, cuts, repetitions, splices, other numbers, pickles, and json with parts that are missing or others;
where checksums are forged, they fit the damage. A defect is an error that is none of ours or does not name the file, a file
that was lost or changed, or code that was run, as Python's audit events tell. tests/fuzzing.py has the damage and the cases.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import sys
import tempfile
import textwrap
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
os.environ.setdefault("PYRO_GENMODELS_RUNG", "vmapped")  # graphs take longer to make than all of these runs

import numpy as np
import safetensors
from rows import Rows

from fuzzing import CASES, fuzz


def main(smoke: bool = False, count: int = 2000, seed: int = 1) -> int:
    """Prints the table; the number of defects."""
    each = 3 if smoke else -(-count // len(CASES))
    print(f"python examples/benchmarks/fuzz.py --count {count} --seed {seed}")
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, safetensors {safetensors.__version__}"
    print(f"{datetime.date.today()}, {versions}, 2 cores, shared\n")
    print(f"{'kind of file':40}{'files':>7}{'read':>7}{'refused':>9}{'defects':>9}{'seconds':>9}")
    sentences, defects, total = {}, [], Counter[str]()
    for case in CASES:
        begun = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            outcomes = [*fuzz(case, each, Path(folder), seed)]
        kinds = Counter(outcome.kind for outcome in outcomes)
        bad = [outcome.defect for outcome in outcomes if outcome.defect]
        seconds = time.perf_counter() - begun
        print(
            f"{case.name:40}{each:7}{kinds['value']:7}{kinds['refused']:9}{len(bad):9}{seconds:9.1f}",
            flush=True,
        )
        total += kinds
        defects += bad
        sentences[case.name] = next((o.sentence for o in reversed(outcomes) if o.kind == "refused"), "")
    print(f"{'all':40}{each * len(CASES):7}{total['value']:7}{total['refused']:9}{len(defects):9}\n")
    rows = Rows()
    rows.add("defects of loaders", f"{each * len(CASES):,} damaged files", float(len(defects)), target=0.0)
    print("Defects", *(defects or ["none"]), sep="\n  ")
    print("\nOne sentence of each kind")
    for name, sentence in sentences.items():
        print(textwrap.fill(f"{name}: {ascii(sentence)[1:-1]}", 120, initial_indent="  ", subsequent_indent="    ")[:600])
    rows.show()
    return len(defects)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="files in all")
    parser.add_argument("--seed", type=int, default=1, help="of the damage")
    arguments = parser.parse_args()
    sys.exit(main(count=arguments.count, seed=arguments.seed) > 0)
