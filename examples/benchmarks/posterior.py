"""Posterior samplers of diffusion on a mixture whose posterior is exact: the weights that they give its modes.

    python examples/benchmarks/posterior.py

Five components on a ring, y = x_1 + x_2/2 + N(0, 0.3²), the denoiser exact, 300 steps: what is wrong is the method's. Led by
a guess at p(y | x_t), ancestral steps alone are heuristics; twisted particles weigh the same steps. Chains move the noise of
a flow of 6 steps: by HMC from draws of the prior, which stays where it began, as R-hat says; by HMC from the twisted
particles, which are in the right modes; by HMC and draws of the prior in turn, which goes from mode to mode.
Columns: weights of the modes, the largest error among them, the error of log p(y), the least effective sample size on the
way, how many of the first particles have descendants, and the largest R-hat of the chains, seconds of the processor.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import platform
import time

import arviz as az
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import TransformReparam
from rows import Rows
from torch import Tensor

from inference import HMC, Cycle, Gibbs, Hamiltonian, PriorDraw
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
        error = float((found - exact).abs().max())
        is_exact = name.startswith(("twisted", "HMC"))
        rows.add("error of the weights of modes", f"ring of 5, {name}", error, target=0.03 if is_exact else None)
        miss = "   MISS: above 0.03" if is_exact and error > 0.03 else ""
        print(f"{name:25} {shown} {error:8.3f} {rest:36}{time.process_time() - begin:8.1f}{miss}", flush=True)

    head = f"{'error':>8} {'log p(y)':>9} {'ESS':>8} {'lineages':>9} {'R-hat':>7} {'seconds':>8}"
    print(f"{'':25} {'weights of the modes':>34} {head}")
    print(f"{'exact':25} {' '.join(f'{w:6.3f}' for w in exact.tolist())}")
    for led in (DPS(oracle, likelihood), PiGDM(oracle, likelihood, 1.5), MMPS(oracle, likelihood)):
        torch.manual_seed(0)
        x, begin = oracle.distribution(grid[0]).sample((count,)), time.process_time()
        with torch.no_grad():
            row(type(led).__name__, samplers.ancestral(led, x, grid, "upper"), None, "", begin)
        begin = time.process_time()
        particles = twisted(led, likelihood, x, grid)
        rest = f"{particles.log_evidence - evidence:9.3f} {particles.effective.min():8.0f} {particles.lineages:9}"
        row(f"twisted {type(led).__name__}", particles.x, particles.weights, rest, begin)

    schedule = EDM(0.02, 20.0)
    prior = FlowPrior(Oracle.ring(5, schedule), schedule.grid(6, "karras"), (2,))
    seen = poutine.reparam(program, config={"x": TransformReparam()})
    many = {"chains": 8 if smoke else 512, "warmup": 5 if smoke else 15, "draws": 4 if smoke else 12}
    few = {"chains": 8 if smoke else 64, "warmup": 5 if smoke else 25, "draws": 4 if smoke else 150}
    of_prior = torch.randn(many["chains"], 2, dtype=torch.float64)
    of_particles = prior.flow.inv(particles.draws(many["chains"])) / prior.scale
    turns = {"x_base": Cycle((Hamiltonian(most_steps=16), PriorDraw()))}
    shared = {"seed": 0, "progress": False}
    for name, sampler in {
        "HMC in noise": HMC(start={"x_base": of_prior}, most_steps=16, **many, **shared),
        "HMC from particles": HMC(start={"x_base": of_particles}, most_steps=16, **many, **shared),
        "HMC, prior draws in turn": Gibbs(start={"x_base": of_prior[: few["chains"]]}, blocks=turns, **few, **shared),
    }.items():
        begin = time.process_time()
        posterior = sampler.fit(seen, Y, prior())
        rhat = float(az.rhat(posterior.to_arviz(), var_names=["x"])["x"].max())
        row(name, posterior.draws["x"].flatten(0, 1), None, f"{rhat:36.3f}", begin)
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    main(parser.parse_args().smoke)
