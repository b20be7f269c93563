"""HMC and NUTS of this package beside NumPyro's vectorised NUTS and Pyro's NUTS: least ESS per second, in one run.

    python examples/benchmarks/hmc.py --rounds 3

Every process has one core and thread and works in float64, with as many warm-up steps as draws. "cold" is its first fit,
with empty caches: staging and compiling are inside. "warm" is the same fit again in that process, with another seed.
Seconds cover warm-up and draws, and are those of the processor, compilers included: what else a shared machine does is
not in them. Processes of the peers alternate, and medians over them are printed. ESS is ArviZ's bulk
ESS, the least of all scalars. Pyro runs one chain: its chains cost as much again each. The last columns divide ESS / s by
that of NumPyro, in the same state, and of Pyro. Then the means: the worst difference from NumPyro's, in Monte-Carlo
standard errors.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rows import Rows

ROWS = Rows()
CHAINS = (64, 4)
Values = dict[str, np.ndarray]
WHY = {
    "eight schools": "Python and dispatch, not arithmetic: a dozen operations a leapfrog step, sixty to adapt.",
    "logistic": "A gradient of 1,000 rows is arithmetic, of which Pyro's overhead is only a part.",
}
NAMES = {"ours": "HMC", "nuts": "NUTS", "numpyro": "NumPyro NUTS", "pyro": "Pyro NUTS"}


def schools_data() -> tuple[np.ndarray, np.ndarray]:
    return np.array([15.0, 10, 16, 11, 9, 11, 10, 18]), np.array([28.0, 8, -3, 7, -1, 1, 18, 12])


def logistic_data() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    x = random.normal(size=(1000, 10))
    logits = x @ random.normal(size=10) + 0.5
    return x, (random.uniform(size=1000) < 1 / (1 + np.exp(-logits))).astype(float)


DATA = {"eight schools": schools_data, "logistic": logistic_data}


def pyro_programs() -> dict[str, Callable[..., None]]:
    import pyro
    import pyro.distributions as dist
    from torch import Tensor

    def schools(sigma: Tensor, y: Tensor) -> None:
        """μ ~ N(0, 5²), τ ~ HalfCauchy(5), η_j ~ N(0, 1), y_j ~ N(μ + τ η_j, σ_j²)"""
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("school", 8):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)

    def logistic(x: Tensor, y: Tensor) -> None:
        """α ~ N(0, 2.5²), β ~ N(0, 2.5² I), y_n ~ Bernoulli(σ(α + x_n·β))"""
        alpha = pyro.sample("alpha", dist.Normal(0.0, 2.5))
        beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 2.5).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Bernoulli(logits=alpha + x @ beta), obs=y)

    return {"eight schools": schools, "logistic": logistic}


def numpyro_programs() -> dict[str, Callable[..., None]]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def schools(sigma: Any, y: Any) -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("school", 8):
            effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)

    def logistic(x: Any, y: Any) -> None:
        alpha = numpyro.sample("alpha", dist.Normal(0.0, 2.5))
        beta = numpyro.sample("beta", dist.Normal(jnp.zeros(x.shape[1]), 2.5).to_event(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Bernoulli(logits=alpha + x @ beta), obs=y)

    return {"eight schools": schools, "logistic": logistic}


def ours(kind: str, model: str, chains: int, draws: int) -> Callable[[int], Values]:
    import torch

    import inference

    program, data = pyro_programs()[model], [torch.as_tensor(part) for part in DATA[model]()]
    backend = {"ours": inference.HMC, "nuts": inference.NUTS}[kind]

    def fit(seed: int) -> Values:
        found = backend(chains=chains, warmup=draws, draws=draws, seed=seed, progress=False).fit(program, *data)
        return {site: value.numpy() for site, value in found.draws.items()}

    return fit


def numpyros(model: str, chains: int, draws: int) -> Callable[[int], Values]:
    import jax
    import numpyro

    jax.config.update("jax_enable_x64", True)
    numpyro.enable_x64()
    data = [jax.numpy.asarray(part) for part in DATA[model]()]
    kernel = numpyro.infer.NUTS(numpyro_programs()[model])
    mcmc = numpyro.infer.MCMC(
        kernel, num_warmup=draws, num_samples=draws, num_chains=chains, chain_method="vectorized", progress_bar=False
    )

    def fit(seed: int) -> Values:
        mcmc.run(jax.random.PRNGKey(seed), *data)
        return {site: np.asarray(value) for site, value in mcmc.get_samples(group_by_chain=True).items()}

    return fit


def pyros(model: str, draws: int) -> Callable[[int], Values]:
    import pyro
    import torch
    from pyro.infer import MCMC, NUTS

    torch.set_default_dtype(torch.float64)
    program, data = pyro_programs()[model], [torch.as_tensor(part) for part in DATA[model]()]
    pyro.enable_validation(False)

    def fit(seed: int) -> Values:
        torch.manual_seed(seed)
        mcmc = MCMC(NUTS(program), num_samples=draws, warmup_steps=draws, disable_progbar=True)
        mcmc.run(*data)
        return {site: value[None].numpy() for site, value in mcmc.get_samples().items()}

    return fit


def run(kind: str, model: str, chains: int, draws: int, fits: int, cores: int) -> dict[str, Any]:
    """Some fits in this process: seconds and least ESS of each, mean and standard error of every scalar in the last."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-cores:])
    if kind != "numpyro":
        import torch

        torch.set_num_threads(cores)
    makers: dict[str, Callable[[], Callable[[int], Values]]] = {
        "numpyro": lambda: numpyros(model, chains, draws),
        "pyro": lambda: pyros(model, draws),
    }
    fit = makers.get(kind, lambda: ours(kind, model, chains, draws))()  # imports are not timed
    seconds, found = [], []
    for seed in range(fits):
        start, begun = time.perf_counter(), sum(os.times()[:4])
        found.append(fit(seed))
        seconds.append(sum(os.times()[:4]) - begun)
        wall = time.perf_counter() - start
    import arviz as az

    ess = [az.ess(az.convert_to_dataset(values), method="bulk") for values in found]
    least = [min(float(np.min(each[site])) for site in each.data_vars) for each in ess]
    last, error = found[-1], az.mcse(az.convert_to_dataset(found[-1]))
    sites = sorted(last)
    return {
        "seconds": seconds,
        "wall": wall,
        "ess": least,
        "mean": np.concatenate([last[site].mean((0, 1)).ravel() for site in sites]).tolist(),
        "error": np.concatenate([error[site].values.ravel() for site in sites]).tolist(),
    }


def child(*arguments: Any) -> dict[str, Any]:
    """``run`` in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        cores = str(arguments[-1])
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": cores}
        command = [sys.executable, __file__, "--run", json.dumps(arguments)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def rates(found: list[dict[str, Any]], state: str) -> tuple[float, float]:
    """Median seconds and median ESS / s of the fits of several processes, cold or warm."""
    which = slice(0, 1) if state == "cold" else slice(1, None)
    pairs = [pair for f in found for pair in zip(f["seconds"][which], f["ess"][which], strict=True)]
    return statistics.median(s for s, _ in pairs), statistics.median(e / s for s, e in pairs)


def table(draws: int, rounds: int, fits: int) -> list[str]:
    head = f"{'':28}{'chains':>7}{'':>6}{'seconds':>9}{'ESS / s':>10}"
    head += f"{'/ NumPyro':>11}{'target':>8}{'/ Pyro':>9}{'target':>8}"
    lines, checks, missed = [head], [], []
    for model in DATA:
        peer = child("pyro", model, 1, draws, 1, 1)
        seconds, slow = rates([peer], "cold")
        lines.append(f"{model:14}{NAMES['pyro']:14}{1:7}{'':>6}{seconds:9.2f}{slow:10.1f}")
        for chains in CHAINS:
            kinds = ("ours", "numpyro") if chains > 12 else ("ours", "nuts", "numpyro")
            found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind in kinds:
                    found[kind].append(child(kind, model, chains, draws, fits, 1))
            for kind in kinds:
                for state in ("cold", "warm"):
                    seconds, rate = rates(found[kind], state)
                    line = f"{model:14}{NAMES[kind]:14}{chains:7}{state:>6}{seconds:9.2f}{rate:10.1f}"
                    if kind != "numpyro":
                        goal = {("cold", 64): 1.0, ("warm", 64): 3.0, ("cold", 4): 0.5, ("warm", 4): 1.0}[state, chains]
                        beyond = 300 if chains == 64 and state == "warm" else None
                        peers = rates(found["numpyro"], state)[1]
                        line += f"{rate / peers:11.2f}{goal:8.1f}{rate / slow:9.0f}{beyond or '':>8}"
                        label = f"{model}, {NAMES[kind]}, {chains} chains, {state}"
                        for name, other, target in (("NumPyro NUTS", peers, goal), ("Pyro NUTS, 1 chain", slow, beyond)):
                            ROWS.add("least ESS a second", label, rate, theirs=other, peer=name, is_less_better=False,
                                     target=target)  # fmt: skip
                        if rate < goal * peers:
                            missed.append(f"{label}: {rate / peers:.2f} of {goal} times NumPyro. {WHY[model]}")
                        if beyond and rate < beyond * slow:
                            missed.append(f"{label}: {rate / slow:.0f} of {beyond} times Pyro. {WHY[model]}")
                    lines.append(line)
            other = found["numpyro"][-1]
            for kind in kinds[:-1]:
                mine = found[kind][-1]
                z = np.subtract(mine["mean"], other["mean"]) / np.hypot(mine["error"], other["error"])
                checks.append(f"{model}, {chains} chains, {NAMES[kind]}: {np.abs(z).max():.1f} of {len(z)} means")
    default = child("ours", "eight schools", 4, 1000, 1, min(2, os.cpu_count() or 1))
    lines += ["", "Worst |z| of the difference from NumPyro's means: " + "; ".join(checks) + "."]
    lines += ["Missed: " + line for line in missed] or ["No target is missed."]
    return [*lines, f"HMC() as it is, eight schools, cold, two cores: {default['wall']:.1f} s by the clock (target 15 s), "
            f"{default['seconds'][0]:.1f} s of the processor; a load of {os.getloadavg()[0]:.1f} beside it."]  # fmt: skip


def main(smoke: bool = False, rounds: int = 3) -> None:
    draws, fits = (20, 2) if smoke else (1000, 2)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl", "numpyro", "jax", "arviz"))
    lines = [
        f"python examples/benchmarks/{os.path.basename(__file__)}{' --smoke' * smoke} --rounds {rounds}",
        f"{datetime.date.today()}, {os.cpu_count()} cores, shared; one core and thread a process, float64, "
        f"{draws} + {draws} steps, medians of {rounds} processes\nPython {platform.python_version()}, {versions}\n",
        *table(draws, rounds, fits),
    ]
    print("\n".join(lines))
    ROWS.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(*json.loads(arguments.run))))
    else:
        main(arguments.smoke, 1 if arguments.smoke else arguments.rounds)
