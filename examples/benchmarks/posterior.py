"""Posterior samplers of diffusion on a mixture whose posterior is exact: the weights that they give its modes.

    python examples/benchmarks/posterior.py

Five components on a ring, y = x_1 + x_2/2 + N(0, 0.3²), the denoiser exact, 300 steps: what is wrong is the method's. Led by
a guess at p(y | x_t), ancestral steps alone are heuristics; twisted particles weigh the same steps; HMC moves the noise of
the flow. Columns: weights of the modes, the largest error among them, the error of log p(y), the least effective sample size
on the way, and how many of the first particles have descendants.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import time

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import TransformReparam
from rows import Rows
from torch import Tensor

from inference import HMC
from pyro_genmodels.diffusion import EDM, Betas, FlowPrior, Oracle, samplers
from pyro_genmodels.diffusion.posterior import DPS, MMPS, Likelihood, PiGDM, twisted

OPERATOR, NOISE, Y = torch.tensor([1.0, 0.5], dtype=torch.float64), 0.3, torch.tensor(1.0, dtype=torch.float64)


def program(y: Tensor, prior: dist.Distribution) -> None:
    x = pyro.sample("x", prior)
    pyro.sample("y", dist.Normal(x @ OPERATOR, NOISE), obs=y)


def main(smoke: bool = False) -> None:
    torch.set_num_threads(1)
    print("python examples/benchmarks/posterior.py")
    print(f"{datetime.date.today()}, 2 cores, shared; one thread, one seed")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "pyro-ppl"))
    print(f"Python {platform.python_version()}, {versions}\n")
    steps, count = (20, 200) if smoke else (300, 4000)
    oracle = Oracle.ring(5, Betas.cosine(steps))
    grid = oracle.schedule.grid(steps, "time")
    likelihood = Likelihood(program, Y, dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    spread = (oracle.covariances @ OPERATOR @ OPERATOR + NOISE**2).sqrt()
    log_joint = oracle.log_weights + dist.Normal(oracle.means @ OPERATOR, spread).log_prob(Y)
    exact, evidence = log_joint.softmax(0), log_joint.logsumexp(0)

    rows = Rows()

    def row(name: str, x: Tensor, weights: Tensor | None, rest: str, begin: float) -> None:
        nearest = torch.nn.functional.one_hot((x[:, None] - oracle.means).norm(dim=-1).argmin(1), 5).double()
        found = nearest.mean(0) if weights is None else weights @ nearest
        shown = " ".join(f"{w:6.3f}" for w in found.tolist())
        error = (found - exact).abs().max()
        target = 0.03 if name.startswith(("twisted", "HMC")) else None
        rows.add("error of the weights of modes", f"ring of 5, {name}", float(error), target=target)
        miss = "   MISS: above 0.03" if name.startswith(("twisted", "HMC")) and error > 0.03 else ""
        print(f"{name:18} {shown} {error:8.3f} {rest:28}{time.perf_counter() - begin:8.1f}{miss}", flush=True)

    print(f"{'':18} {'weights of the modes':>34} {'error':>8} {'log p(y)':>9} {'ESS':>8} {'lineages':>9} {'seconds':>8}")
    print(f"{'exact':18} {' '.join(f'{w:6.3f}' for w in exact.tolist())}")
    for led in (DPS(oracle, likelihood), PiGDM(oracle, likelihood, 1.5), MMPS(oracle, likelihood)):
        torch.manual_seed(0)
        x, begin = oracle.distribution(grid[0]).sample((count,)), time.perf_counter()
        with torch.no_grad():
            row(type(led).__name__, samplers.ancestral(led, x, grid, "upper"), None, "", begin)
        begin = time.perf_counter()
        found = twisted(led, likelihood, x, grid)
        rest = f"{found.log_evidence - evidence:9.3f} {found.effective.min():8.0f} {found.lineages:9}"
        row(f"twisted {type(led).__name__}", found.x, found.weights, rest, begin)
    schedule, begin = EDM(0.02, 20.0), time.perf_counter()
    prior = FlowPrior(Oracle.ring(5, schedule), schedule.grid(6, "karras"), (2,))
    seen, chains = poutine.reparam(program, config={"x": TransformReparam()}), 16 if smoke else 512
    start = {"x_base": torch.randn(chains, 2, dtype=torch.float64)}
    run = HMC(chains=chains, warmup=5 if smoke else 25, draws=2 if smoke else 8, seed=0, start=start, progress=False)
    row("HMC in noise", run.fit(seen, Y, prior()).draws["x"].flatten(0, 1), None, "", begin)
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    main(parser.parse_args().smoke)
