"""HMC from 1 to 1,024 chains: peak memory of a fit, and what a gradient of all chains costs.

    python examples/benchmarks/chains.py

Eight schools and a logistic regression (1,000 rows, 10 columns), float64. Each fit is a process of its own, 200 + 200
steps; "peak" is the most memory that it ever held, "above one chain" what it held more than the fit of one chain, beside the
draws that it returns. Microseconds are those of one call for the gradients of all chains on the compiled rung, the median
over blocks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from hmc import DATA, pyro_programs
from rows import Rows

from inference import HMC
from inference.density import Density, Unconstrained
from inference.handlers import quiet, reproducible
from inference.program import Program

FITS = (1, 256, 512, 1024)
GRADIENTS = tuple(2**i for i in range(11))


def tensors(model: str) -> tuple[torch.Tensor, ...]:
    return tuple(torch.as_tensor(part) for part in DATA[model]())


def fit(model: str, chains: int, draws: int) -> tuple[float, float, float]:
    """Peak MiB, MiB of draws and statistics, and seconds of a fit."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    backend = HMC(chains=chains, warmup=draws, draws=draws, seed=0, progress=False)
    posterior = backend.fit(pyro_programs()[model], *tensors(model))
    seconds = time.perf_counter() - start
    kept = sum(value.nbytes for value in [*posterior.draws.values(), *posterior.stats.values()])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, kept / 2**20, seconds


def gradients(model: str, blocks: int) -> list[float]:
    """Median microseconds of the gradients of all chains, for each number of chains."""
    torch.set_num_threads(1)
    program = Program(pyro_programs()[model], tensors(model))
    coordinates, found = Unconstrained(program, program.continuous), []
    with reproducible(program.dtype), quiet():
        for chains in GRADIENTS:
            staged = Density(program, evaluations=10**7, rung="compiled").unconstrained(coordinates)
            position = 0.1 * torch.randn(chains, coordinates.size, dtype=program.dtype)
            times = []
            for _ in range(blocks + 1):
                start = time.process_time()
                for _ in range(50):
                    staged(position, {})
                times.append((time.process_time() - start) / 50 * 1e6)
            found.append(statistics.median(times[1:] or times))
    return found


def child(*arguments: Any) -> Any:
    command = [sys.executable, __file__, "--run", json.dumps(arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def picture(costs: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for model, micros in costs.items():
        axes.loglog(GRADIENTS, micros, "o-", base=2, label=model)
    axes.loglog(
        GRADIENTS, [costs["eight schools"][0] * c for c in GRADIENTS], "k:", base=2, label="one chain after the other"
    )
    axes.set(xlabel="chains", ylabel="µs a gradient of all chains", title="One call for all chains, one thread, float64")
    axes.set_yscale("log", base=10)
    axes.set_ylim(0.5 * min(map(min, costs.values())), 2.0 * max(map(max, costs.values())))
    axes.set_xticks(GRADIENTS, [f"{c:,}" for c in GRADIENTS], minor=False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main(smoke: bool = False) -> None:
    rows = Rows()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl"))
    lines = [
        f"python examples/benchmarks/{os.path.basename(__file__)}{' --smoke' * smoke}",
        f"{datetime.date.today()}, {os.cpu_count()} cores, shared; one thread a process, float64\n"
        f"Python {platform.python_version()}, {versions}\n",
        f"{'':15}{'chains':>7}{'peak, MiB':>11}{'above one chain':>17}{'draws, MiB':>12}{'KiB a chain':>13}{'seconds':>9}",
    ]
    for model in DATA:
        base = 0.0
        for chains in FITS[:: 3 if smoke else 1]:
            peak, kept, seconds = child("fit", model, chains, 20 if smoke else 200)
            base = base or peak
            each = f"{(peak - base) / (chains - 1) * 1024:13.0f}" if chains > 1 else f"{'':13}"
            lines.append(f"{model:15}{chains:7}{peak:11.0f}{peak - base:17.0f}{kept:12.1f}{each}{seconds:9.1f}")
    costs = {model: child("gradients", model, 1 if smoke else 10) for model in DATA}
    lines.append(f"\n{'µs a gradient':15}" + "".join(f"{chains:>7}" for chains in GRADIENTS) + "  chains")
    lines += [f"{model:15}" + "".join(f"{micros:7.0f}" for micros in costs[model]) for model in DATA]
    ratios = [f"{costs[model][-1] / costs[model][0]:.0f} times for {model}" for model in DATA]
    lines.append(f"\n1,024 chains cost as much as one {' and '.join(ratios)}. Picture: results/chains.png")
    print("\n".join(lines))
    for model in DATA:
        one, many = costs[model][0], costs[model][-1]
        rows.add("µs a gradient of 1,024 chains", model, many, theirs=1024 * one, peer="as many of one chain")
    rows.show()
    if not smoke:
        picture(costs, Path(__file__).parent / "results" / "chains.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        kind, *rest = json.loads(arguments.run)
        print(json.dumps(fit(*rest) if kind == "fit" else gradients(*rest)))
    else:
        main(arguments.smoke)
