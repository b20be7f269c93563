"""Fourteen posteriors of posteriordb: the score test of each program, and each sampler beside the reference draws.

    PYRO_GENMODELS_DATA=FOLDER python examples/benchmarks/posteriordb.py

FOLDER holds posteriordb.zip; programs and settings are those of tests/posteriordb.py. z are differences from the reference
draws (10 chains of 1000 nearly independent ones) in Monte-Carlo standard errors of both: the worst of all parameters, for
means and for standard deviations. R-hat is that of our chains together with theirs, the worst as well. Seconds are the
processor's, for start, warm-up and draws; ESS is ArviZ's bulk ESS, the least of all parameters. Gibbs is left out where its
plan is one HMC block.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rows import Rows

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import torch

from inference import arviz
from inference.calibration import score_test
from inference.handlers import isolated, quiet, reproducible
from inference.plan import Plan, assign
from inference.program import Program
from posteriordb import REFERENCES, SAMPLERS, Reference, compared, sampler


def short(plan: Plan) -> str:
    """The plan in one line; sites that are updated together are counted where there are more than three."""
    groups: dict[str, list[str]] = {}
    for update in plan.updates:
        groups.setdefault(update.update, []).extend(update.sites)
    return ", ".join(f"{u}: {' '.join(s) if len(s) < 4 else f'{len(s)} sites'}" for u, s in groups.items())


def programs(reference: Reference) -> Iterator[tuple[str, Callable[..., None]]]:
    """Samplers, and what each runs."""
    for name in SAMPLERS:
        program = reference.explicit if name == "Gibbs" and reference.explicit else reference.program
        with isolated(0), reproducible(torch.float64), quiet():
            is_hmc = name == "Gibbs" and {b.update for b in assign(Program(program, reference.data()))[0]} == {"HMC"}
        if not is_hmc:
            yield name, program


def row(reference: Reference, name: str, program: Callable[..., None], smoke: bool) -> str:
    """One sampler on one posterior."""
    backend = sampler(name, reference)
    if smoke:
        backend = replace(backend, chains=4, warmup=20, draws=20, thin=1)
    start = time.process_time()
    posterior = backend.fit(program, *reference.data())
    seconds = time.process_time() - start
    found = compared(posterior.draws, reference).values()
    ess = min(float(arviz.ess(values.numpy())) for values in reference.quantities(posterior.draws).values())
    run = f"{backend.chains} x ({backend.warmup} + {backend.draws * backend.thin})"
    assert posterior.plan is not None
    return (
        f"{reference.label:26}{name:20}{run:>22}{seconds:9.1f}{max(abs(c.mean) for c in found):8.2f}"
        f"{max(abs(c.sd) for c in found):8.2f}{max(c.rhat for c in found):8.4f}{ess:8.0f}{ess / seconds:9.1f}"
        f"  {short(posterior.plan)}"
    )


def main(smoke: bool = False, only: str = "") -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = Rows()
    chosen = [reference for reference in REFERENCES if only in reference.name]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl", "arviz"))
    rung = os.environ.get("PYRO_GENMODELS_RUNG", "compiled")
    print(f"python examples/benchmarks/{os.path.basename(__file__)}{' --smoke' * smoke}{f' --only {only}' if only else ''}")
    print(f"{datetime.date.today()}, {os.cpu_count()} CPUs, one thread, up to the {rung} rung, ", end="")
    print(f"Python {platform.python_version()}, {versions}\n")
    print(f"{'score test':26}{'coordinates':>12}{'worst |z|':>11}{'p':>8}")
    for reference in chosen:
        found = score_test(reference.program, reference.values(), *reference.data())
        print(f"{reference.label:26}{len(found.names):12}{found.worst:11.2f}{found.p_value:8.2g}", flush=True)
        rows.add("p of the score test, at least 1e-3", f"posteriordb, {reference.label}", float(found.p_value),
                 is_less_better=False, target=1e-3)  # fmt: skip
    print(f"\n{'':46}{'chains x steps':>22}{'seconds':>9}{'z mean':>8}{'z sd':>8}{'R-hat':>8}{'ESS':>8}{'ESS / s':>9}  plan")
    for reference in chosen:
        for name, program in programs(reference):
            print(row(reference, name, program, smoke), flush=True)
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--only", default="", metavar="NAME", help="posteriors whose names hold this")
    arguments = parser.parse_args()
    main(arguments.smoke, arguments.only)
