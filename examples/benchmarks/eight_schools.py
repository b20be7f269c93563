"""Eight schools: this package's HMC with 64 chains beside Pyro's own NUTS, one thread each, in one run.

    python examples/benchmarks/eight_schools.py

Every row is a process of its own. "first fit" starts with empty caches and includes staging and compiling; "again" is the
same fit, repeated in the same process. Seconds cover warm-up and draws; ESS is ArviZ's bulk ESS, the least of all ten
latent values. The last columns divide ESS / s by that of the first and the second row, Pyro with its validation off.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS

from inference import HMC
from pyro_genmodels import datasets

ROWS = {  # name: kind, environment
    "Pyro NUTS": ("nuts", {}),
    "Pyro NUTS, jit_compile": ("jit", {}),
    "HMC, staged": ("hmc", {"PYRO_GENMODELS_RUNG": "staged"}),
    "HMC, compiled": ("hmc", {"PYRO_GENMODELS_RUNG": "compiled"}),
}


def schools(sigma: torch.Tensor, y: torch.Tensor) -> None:
    """μ ~ N(0, 5²), τ ~ HalfCauchy(5), η_j ~ N(0, 1), y_j ~ N(μ + τ η_j, σ_j²)"""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def run(kind: str, smoke: bool) -> list[tuple[str, int, int, float, float]]:
    """One method in this process: label, chains, draws, seconds and least ESS of each of its fits."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    data = datasets.load("eight_schools").arrays
    results = []
    for label in ("first fit", "again") if kind == "hmc" else ("",):
        start = time.perf_counter()
        if kind == "hmc":
            chains, draws = (4, 20) if smoke else (64, 500)
            backend = HMC(chains=chains, warmup=draws, draws=draws, seed=0, progress=False)
            values = {site: v.numpy() for site, v in backend.fit(schools, data["sigma"], data["y"]).draws.items()}
        else:
            chains, draws = 1, 10 if smoke else 500
            pyro.enable_validation(False)
            torch.manual_seed(0)
            kernel = NUTS(schools, jit_compile=kind == "jit", ignore_jit_warnings=True)
            mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws, disable_progbar=True)
            mcmc.run(data["sigma"], data["y"])
            values = {site: v[None].numpy() for site, v in mcmc.get_samples().items()}
        seconds = time.perf_counter() - start
        ess = az.ess(az.convert_to_dataset(values), method="bulk")
        results.append((label, chains, draws, seconds, min(float(np.min(ess[site])) for site in ess.data_vars)))
    return results


def main(smoke: bool = False) -> None:
    command = [sys.executable, __file__, *(["--smoke"] if smoke else []), "--run"]
    table = []
    for name, (kind, environment) in ROWS.items():
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, **environment, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
            done = subprocess.run([*command, kind], env=environment, stdout=subprocess.PIPE, text=True, check=True)
        for label, *numbers in json.loads(done.stdout.splitlines()[-1]):
            table.append((f"{name}{label and ', ' + label}", *numbers))
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl", "arviz"))
    print(f"python examples/benchmarks/{os.path.basename(__file__)}{' --smoke' * smoke}")
    print(f"{datetime.date.today()}, {os.cpu_count()} CPUs, one thread, Python {platform.python_version()}, {versions}\n")
    print(
        f"{'':26}{'chains':>7}{'warm-up + draws':>17}{'seconds':>9}{'least ESS':>11}{'ESS / s':>9}{'/ NUTS':>8}{'/ jit':>8}"
    )
    nuts, jit = (ess / seconds for _, _, _, seconds, ess in table[:2])
    for name, chains, draws, seconds, ess in table:
        rate, steps = ess / seconds, f"{draws} + {draws}"
        print(f"{name:26}{chains:7}{steps:>17}{seconds:9.2f}{ess:11.0f}{rate:9.1f}{rate / nuts:8.1f}{rate / jit:8.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.run, arguments.smoke)))
    else:
        main(arguments.smoke)
