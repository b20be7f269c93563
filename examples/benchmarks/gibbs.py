"""Gibbs of this package beside JAGS, and beside sweeps derived by hand in torch: ESS per second, in one run.

    python examples/benchmarks/gibbs.py --rounds 3

A Gaussian mixture (10,000 numbers, 5 components), the rat tumours (71 groups with binomial counts, whose rates have a Beta
prior of unknown parameters) and a linear regression (1,000 rows, 10 columns). 16 chains each, with as many warm-up sweeps as
draws. Ours and the sweeps by hand advance all chains at once, JAGS (with its glm module) one after the other; a process of
its own for each, on one core. Seconds are those of warm-up and draws, of the processor (what else a shared machine
does is not in them): the start (JAGS compiles and initialises; we plan,
stage and compile: what a first fit takes beyond the sweeps of a second) has a column of its own, and "cold" divides by
the sum of both. ESS is ArviZ's bulk
ESS, the least of all scalars; components of the mixture are sorted by their means. The sweep by hand of the rat tumours
moves the parameters of the Beta by a random walk, where ours has an HMC block. Then milliseconds of a sweep of all chains
after warm-up, medians over blocks that alternate between ours and the one by hand: of a run of 2,000 sweeps, and of one of a
million, for which it pays to compile every graph. And the worst difference of a mean from that of JAGS, in Monte-Carlo
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
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from rows import Rows
from torch import Tensor

from inference import Gibbs
from inference.handlers import quiet, reproducible
from inference.program import Program

CHAINS, COMPONENTS = 16, 5
CENTRES = (-8.0, -4.0, 0.0, 4.0, 8.5)
Values = dict[str, np.ndarray]
Sweep = Callable[[dict[str, Tensor]], dict[str, Tensor]]

TUMOURS = [0] * 14 + [1] * 8 + [2] * 9 + [1, 5, 2, 5, 3, 2, 7, 7, 3, 3, 2, 9, 10, 4, 4, 4, 4, 4, 4, 4, 10, 4, 4, 4]
TUMOURS += [5, 11, 12, 5, 5, 6, 5, 6, 6, 6, 6, 16, 15, 15, 9, 4]
RATS = [20] * 7 + [19] * 4 + [18, 18, 17] + [20] * 4 + [19, 19, 18, 18, 25, 24, 23] + [20] * 6 + [10, 49, 19, 46, 27, 17]
RATS += [49, 47, 20, 20, 13, 48, 50] + [20] * 7 + [48, 19, 19, 19, 22, 46, 49, 20, 20, 23, 19, 22, 20, 20, 20]
RATS += [52, 46, 47, 24, 14]


# ------------------------------------------------------------------------------------------------- the programs
def mixture(x: Tensor) -> None:
    """w ~ Dirichlet(1), μ_k ~ N(0, 10²), τ_k ~ Gamma(2, 2), z_n ~ Categorical(w), x_n ~ N(μ_{z_n}, 1 / τ_{z_n})"""
    w = pyro.sample("w", dist.Dirichlet(x.new_ones(COMPONENTS)))
    with pyro.plate("components", COMPONENTS):
        mu = pyro.sample("mu", dist.Normal(x.new_tensor(0.0), 10.0))
        tau = pyro.sample("tau", dist.Gamma(x.new_tensor(2.0), 2.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], tau[z].rsqrt()), obs=x)


def tumours(rats: Tensor, y: Tensor) -> None:
    """a ~ Gamma(2, 0.5), b ~ Gamma(2, 0.1), θ_j ~ Beta(a, b), y_j ~ Binomial(n_j, θ_j)"""
    a = pyro.sample("a", dist.Gamma(rats.new_tensor(2.0), 0.5))
    b = pyro.sample("b", dist.Gamma(rats.new_tensor(2.0), 0.1))
    with pyro.plate("groups", len(y)):
        theta = pyro.sample("theta", dist.Beta(a, b))
        pyro.sample("y", dist.Binomial(rats, theta), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    """β ~ N(0, 10² I), τ ~ Gamma(1, 1), y_n ~ N(x_n·β, 1 / τ)"""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1))
    tau = pyro.sample("tau", dist.Gamma(x.new_tensor(1.0), 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, tau.rsqrt()), obs=y)


JAGS = {
    "mixture": """model { w ~ ddirch(one)
for (k in 1:5) { mu[k] ~ dnorm(0, 0.01)
  tau[k] ~ dgamma(2, 2) }
for (n in 1:N) { z[n] ~ dcat(w)
  x[n] ~ dnorm(mu[z[n]], tau[z[n]]) } }""",
    "rat tumours": """model { a ~ dgamma(2, 0.5)
b ~ dgamma(2, 0.1)
for (n in 1:N) { theta[n] ~ dbeta(a, b)
  y[n] ~ dbin(theta[n], rats[n]) } }""",
    "regression": """model { for (d in 1:D) { beta[d] ~ dnorm(0, 0.01) }
tau ~ dgamma(1, 1)
for (n in 1:N) { y[n] ~ dnorm(inprod(x[n,], beta), tau) } }""",
}
PROGRAMS: dict[str, Callable[..., None]] = {"mixture": mixture, "rat tumours": tumours, "regression": regression}
SITES = {"mixture": ("w", "mu", "tau"), "rat tumours": ("a", "b", "theta"), "regression": ("beta", "tau")}
WHY = {
    "mixture": "The gradients in μ and τ pass over the rows, which are sorted by label anew in every sweep.",
    "rat tumours": "HMC moves (a, b) along a few gradients, where the random walk by hand has two numbers to look at.",
    "regression": "A hundred and twenty small operations, each dispatched on its own, where the sweep by hand has twenty.",
}
TARGETS = {"mixture": 50, "rat tumours": 5, "regression": 5}


def data(model: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    if model == "mixture":
        label = random.choice(COMPONENTS, size=10_000, p=[0.1, 0.15, 0.2, 0.25, 0.3])
        return {"x": random.normal(np.array(CENTRES)[label], np.array([0.7, 0.9, 0.8, 0.9, 1.2])[label])}
    if model == "rat tumours":
        return {"rats": np.array(RATS, dtype=float), "y": np.array(TUMOURS, dtype=float)}
    x = random.normal(size=(1000, 10))
    return {"x": x, "y": x @ random.normal(size=10) + 0.7 * random.normal(size=1000)}


def starts(model: str) -> dict[str, Tensor]:
    """The components of the mixture near where they are, for all methods alike; else each starts where it likes."""
    if model != "mixture":
        return {}
    shift = 0.3 * torch.randn(CHAINS, COMPONENTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means, one = torch.tensor(CENTRES).double() + shift, torch.ones(COMPONENTS).double()
    return {"w": one / COMPONENTS, "mu": means, "tau": one}


# --------------------------------------------------------------------------------------------- sweeps by hand
def gamma(shape: Tensor, rate: Tensor) -> Tensor:
    return torch._standard_gamma(shape) / rate


def mixture_by_hand(parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], Sweep]:
    x = parts["x"]
    powers = torch.stack([torch.ones_like(x), x, x * x])

    def sweep(s: dict[str, Tensor]) -> dict[str, Tensor]:
        w, mu, tau = s["w"], s["mu"], s["tau"]
        natural = torch.stack([w.log() + 0.5 * tau.log() - 0.5 * tau * mu * mu, tau * mu, -0.5 * tau], -1)
        logits = natural @ powers
        cumulative = (logits - logits.amax(1, keepdim=True)).exp_().cumsum(1)
        z = (cumulative < torch.rand(CHAINS, 1, len(x), dtype=x.dtype) * cumulative[:, -1:]).sum(1)
        chosen = torch.nn.functional.one_hot(z, COMPONENTS).to(x.dtype)
        count, total, square = (powers @ chosen).unbind(1)
        w = torch._sample_dirichlet(1.0 + count)
        precision = 0.01 + tau * count
        mu = tau * total / precision + torch.randn_like(mu) * precision.rsqrt()
        tau = gamma(2.0 + 0.5 * count, 2.0 + 0.5 * (square - 2.0 * mu * total + mu * mu * count))
        return {"w": w, "mu": mu, "tau": tau}

    return {name: value.expand(CHAINS, COMPONENTS) for name, value in starts("mixture").items()}, sweep


def tumours_by_hand(parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], Sweep]:
    rats, y = parts["rats"], parts["y"]

    def log_density(log_a: Tensor, log_b: Tensor, logs: Tensor, others: Tensor) -> Tensor:
        a, b = log_a.exp(), log_b.exp()
        normaliser = len(y) * (torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b))
        return normaliser + (a - 1) * logs + (b - 1) * others + 2 * log_a - 0.5 * a + 2 * log_b - 0.1 * b

    def sweep(s: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = s["a"], s["b"]
        one, two = gamma(a[:, None] + y, a.new_ones(())), gamma(b[:, None] + rats - y, a.new_ones(()))
        theta = one / (one + two)
        logs, others = theta.log().sum(1), torch.log1p(-theta).sum(1)
        log_a, log_b = a.log(), b.log()
        common, apart = 0.5 * torch.randn_like(a), 0.15 * torch.randn_like(a)
        new_a, new_b = log_a + common + apart, log_b + common - apart
        ratio = log_density(new_a, new_b, logs, others) - log_density(log_a, log_b, logs, others)
        accepted = torch.rand_like(ratio).log() < ratio
        return {
            "a": torch.where(accepted, new_a, log_a).exp(),
            "b": torch.where(accepted, new_b, log_b).exp(),
            "theta": theta,
        }

    one = torch.ones(CHAINS, dtype=y.dtype)
    return {"a": 2 * one, "b": 14 * one}, sweep


def regression_by_hand(parts: dict[str, Tensor]) -> tuple[dict[str, Tensor], Sweep]:
    x, y = parts["x"], parts["y"]
    gram, moment, square, prior = x.T @ x, x.T @ y, y @ y, 0.01 * torch.eye(x.shape[1], dtype=x.dtype)

    def sweep(s: dict[str, Tensor]) -> dict[str, Tensor]:
        tau = s["tau"]
        factor = torch.linalg.cholesky(tau[:, None, None] * gram + prior)
        mean = torch.cholesky_solve((tau[:, None] * moment).unsqueeze(-1), factor)
        noise = torch.randn(CHAINS, x.shape[1], 1, dtype=x.dtype)
        beta = (mean + torch.linalg.solve_triangular(factor.mT, noise, upper=True)).squeeze(-1)
        residual = square - 2.0 * beta @ moment + ((beta @ gram) * beta).sum(-1)
        return {"beta": beta, "tau": gamma(tau.new_full((CHAINS,), 1.0 + 0.5 * len(y)), 1.0 + 0.5 * residual)}

    return {"tau": torch.ones(CHAINS, dtype=y.dtype)}, sweep


BY_HAND = {"mixture": mixture_by_hand, "rat tumours": tumours_by_hand, "regression": regression_by_hand}


# ------------------------------------------------------------------------------------------------ the methods
def tensors(model: str) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in data(model).items()}


def run_ours(model: str, draws: int) -> tuple[float, float, Values]:
    """Fits twice: what the first takes longer than the sweeps of the second is the start."""
    clock: list[float] = []
    backend = Gibbs(
        chains=CHAINS, warmup=draws, draws=draws, seed=0, progress=False, start=starts(model) or None,
        keep=SITES[model], callbacks=(lambda step, info: clock.append(seconds_of_processor()) if not step else None,),
    )  # fmt: skip
    start = seconds_of_processor()
    backend.fit(PROGRAMS[model], *tensors(model).values())
    cold = seconds_of_processor() - start
    values = backend.fit(PROGRAMS[model], *tensors(model).values()).draws
    seconds = seconds_of_processor() - clock[-1]
    return cold - seconds, seconds, {site: values[site].numpy() for site in SITES[model]}


def run_by_hand(model: str, draws: int) -> tuple[float, float, Values]:
    start = seconds_of_processor()
    state, sweep = BY_HAND[model](tensors(model))
    begun, found = seconds_of_processor(), []
    for i in range(2 * draws):
        state = sweep(state)
        if i >= draws:
            found.append(state)
    end = seconds_of_processor()
    return begun - start, end - begun, {site: torch.stack([f[site] for f in found], 1).numpy() for site in SITES[model]}


def dumped(values: dict[str, Any]) -> str:
    """In R's dump format."""
    lines = []
    for name, value in values.items():
        array = np.asarray(value)
        numbers = f"c({', '.join(map(repr, array.ravel(order='F').tolist()))})"
        shape = f"structure({numbers}, .Dim=c({', '.join(map(str, array.shape))}))" if array.ndim > 1 else numbers
        lines.append(f'"{name}" <- {shape if array.ndim else repr(value)}')
    return "\n".join(lines) + "\n"


def run_jags(model: str, draws: int) -> tuple[float, float, Values]:
    """JAGS writes a file after its first sweep: what it took of the processor until then is its start."""
    parts: dict[str, Any] = {**data(model)}
    parts["N"] = len(next(iter(parts.values())))
    if model == "mixture":
        parts["one"] = np.ones(COMPONENTS)
    elif model == "regression":
        parts["D"] = parts["x"].shape[1]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "model.bug").write_text(JAGS[model])
        (place / "data.R").write_text(dumped(parts))
        script = ["load glm", 'model in "model.bug"', 'data in "data.R"', f"compile, nchains({CHAINS})"]
        for chain in range(CHAINS):
            first = {name: (value[chain] if value.dim() > 1 else value).numpy() for name, value in starts(model).items()}
            own = {**first, ".RNG.name": "base::Mersenne-Twister", ".RNG.seed": chain + 1}
            (place / f"start{chain}.R").write_text(dumped(own).replace("'", '"'))
            script.append(f'parameters in "start{chain}.R", chain({chain + 1})')
        script.append("initialize")
        script += [f"monitor {SITES[model][0]}", "update 1", "coda *, stem(begun)", f"monitor clear {SITES[model][0]}"]
        script += [f"update {draws}", *(f"monitor {site}" for site in SITES[model]), f"update {draws}", "coda *", "exit", ""]
        (place / "script.txt").write_text("\n".join(script))
        before = seconds_of_processor()
        with subprocess.Popen(["jags", "script.txt"], cwd=place, stdout=subprocess.PIPE, text=True) as process:
            while process.poll() is None and not (place / "begunindex.txt").exists():
                time.sleep(0.005)
            ticks = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13]
            start = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            said, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(said)
        seconds = seconds_of_processor() - before - start
        index = [line.split() for line in (place / "CODAindex.txt").read_text().splitlines()]
        chains = [np.loadtxt(place / f"CODAchain{chain + 1}.txt")[:, 1] for chain in range(CHAINS)]
    values = np.stack(chains)
    found: dict[str, list[np.ndarray]] = {}
    for name, first_row, last_row in index:
        found.setdefault(name.split("[")[0], []).append(values[:, int(first_row) - 1 : int(last_row)])
    return start, seconds, {
        site: np.stack(parts, -1) if len(parts) > 1 else parts[0] for site, parts in found.items()
    }  # fmt: skip


def seconds_of_processor() -> float:
    """Of this process and of those that it waited for."""
    return sum(os.times()[:4])


METHODS = {"ours": run_ours, "by hand": run_by_hand, "JAGS": run_jags}


def settled(model: str, values: Values) -> Values:
    """Components in the order of their means."""
    if model != "mixture":
        return values
    order = np.argsort(values["mu"], -1)
    return {site: np.take_along_axis(value, order, -1) for site, value in values.items()}


def pinned() -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    pyro.enable_validation(False)


def run(method: str, model: str, draws: int) -> dict[str, Any]:
    pinned()
    start, seconds, values = METHODS[method](model, draws)
    import arviz as az

    values = settled(model, values)
    table = az.convert_to_dataset(values)
    ess, error, sites = az.ess(table, method="bulk"), az.mcse(table), SITES[model]
    return {
        "start": start,
        "seconds": seconds,
        "ess": min(float(np.min(ess[site])) for site in sites),
        "mean": np.concatenate([values[site].mean((0, 1)).ravel() for site in sites]).tolist(),
        "error": np.concatenate([error[site].values.ravel() for site in sites]).tolist(),
    }


def sweeps(model: str, warmup: int, blocks: int, block: int, asked: int) -> tuple[float, float, str]:
    """Median milliseconds of a sweep, ours in a run of so many and by hand, and our plan."""
    pinned()
    backend = Gibbs(chains=CHAINS, warmup=warmup, draws=blocks * block, seed=0, progress=False, start=starts(model) or None)
    program = Program(PROGRAMS[model], tuple(tensors(model).values()))
    by_hand, sweep = BY_HAND[model](tensors(model))
    times: tuple[list[float], list[float]] = ([], [])
    with reproducible(program.dtype), quiet():
        program.density.evaluations = asked
        state = backend.init(program)
        for _ in range(warmup):
            state, _ = backend.step(state, program)
            by_hand = sweep(by_hand)
        for _ in range(block * 10):  # graphs are made when they are needed, those of certificates in every tenth sweep
            state, _ = backend.sample(state, program)
        for _ in range(blocks):
            start = time.process_time()
            for _ in range(block):
                state, _ = backend.sample(state, program)
            middle = time.process_time()
            for _ in range(block):
                by_hand = sweep(by_hand)
            times[0].append((middle - start) / block * 1e3)
            times[1].append((time.process_time() - middle) / block * 1e3)
        plan = ", ".join(f"{update.update}: {' '.join(update.sites)}" for update in backend.plan(state, program).updates)
    return statistics.median(times[0]), statistics.median(times[1]), plan


def child(*arguments: Any) -> Any:
    """``run`` or ``sweeps`` in a fresh process with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--run", json.dumps(arguments)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(smoke: bool = False, rounds: int = 3, only: str = "") -> None:
    models = [model for model in PROGRAMS if only in model]
    draws, blocks = (20, 1) if smoke else (1000, 20)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl", "arviz"))
    lines = [
        f"python examples/benchmarks/{os.path.basename(__file__)}{' --smoke' * smoke} --rounds {rounds}"
        + (f" --only {only!r}" if only else ""),
        f"{datetime.date.today()}, {os.cpu_count()} cores, shared; one core and thread a process, float64, {CHAINS} chains, "
        f"medians of {rounds} processes\nPython {platform.python_version()}, {versions}, JAGS 4.3\n",
        f"{'':13}{'':9}{'sweeps':>13}{'start':>7}{'seconds':>9}{'least ESS':>11}{'ESS / s':>10}{'/ JAGS':>8}{'target':>8}"
        f"{'cold / JAGS':>13}{'/ by hand':>11}",
    ]
    checks, missed, rows = [], [], Rows()
    for model in models:
        mine, theirs = (3 * draws // 10, draws // 10 or 5) if model == "mixture" else (draws, draws)
        found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        for i in range(rounds):
            for method in METHODS:
                if method == "JAGS" and i and model == "mixture":
                    continue  # minutes each
                found[method].append(child("run", method, model, theirs if method == "JAGS" else mine))
        middle = {m: [statistics.median(f[k] for f in found[m]) for k in ("start", "seconds", "ess")] for m in METHODS}
        rate = {m: ess / seconds for m, (_, seconds, ess) in middle.items()}
        cold = {m: ess / (start + seconds) for m, (start, seconds, ess) in middle.items()}
        for m, (start, seconds, ess) in middle.items():
            steps = theirs if m == "JAGS" else mine
            line = f"{model:13}{m:9}{f'{steps} + {steps}':>13}{start:7.1f}{seconds:9.2f}{ess:11.0f}{rate[m]:10.1f}"
            if m == "ours":
                line += f"{rate[m] / rate['JAGS']:8.1f}{TARGETS[model]:8}{cold[m] / cold['JAGS']:13.1f}"
                line += f"{rate[m] / rate['by hand']:11.2f}"
                for peer, target in (("JAGS", float(TARGETS[model])), ("by hand", None)):
                    rows.add("least ESS a second, Gibbs", f"{model}, {CHAINS} chains", rate[m], theirs=rate[peer], peer=peer,
                             is_less_better=False, target=target)  # fmt: skip
                if rate[m] < TARGETS[model] * rate["JAGS"]:
                    missed.append(f"{model}: {rate[m] / rate['JAGS']:.1f} of {TARGETS[model]} times JAGS. {WHY[model]}")
            lines.append(line)
        for m in ("ours", "by hand"):
            one, two = found[m][-1], found["JAGS"][-1]
            z = np.subtract(one["mean"], two["mean"]) / np.hypot(one["error"], two["error"])
            checks.append(f"{model} {m} {np.abs(z).max():.1f} of {len(z)}")
    lines.append(
        f"\n{'sweep, ms':13}{'ours':>9}{'by hand':>9}{'ratio':>7}{'target':>8}{'compiled':>10}{'by hand':>9}{'ratio':>7}"
        "  plan"
    )
    for model in models:
        own, hand, plan = child("sweeps", model, min(draws, 300), blocks, 20, 2000)
        long, again, _ = child("sweeps", model, min(draws, 300), blocks, 20, 2000 if smoke else 1_000_000)
        line = f"{model:13}{own:9.2f}{hand:9.2f}{own / hand:7.2f}{2:8}{long:10.2f}{again:9.2f}{long / again:7.2f}"
        lines.append(f"{line}  {plan}")
        rows.add("ms a sweep of Gibbs", f"{model}, {CHAINS} chains", own, theirs=hand, peer="by hand", target=0.5)
        if own > 2.0 * hand:
            missed.append(f"{model}: a sweep takes {own / hand:.1f} times that by hand, 2 at most. {WHY[model]}")
    lines += ["", *("Missed: " + line for line in missed)]
    lines.append("\nWorst |z| of the difference from the means of JAGS: " + ", ".join(checks) + ".")
    print("\n".join(lines))
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--only", default="", help="part of the name of a model")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        kind, *rest = json.loads(arguments.run)
        print(json.dumps(run(*rest) if kind == "run" else sweeps(*rest)))
    else:
        main(arguments.smoke, 1 if arguments.smoke else arguments.rounds, arguments.only)
