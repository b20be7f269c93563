"""A step of SVI beside the same step written by hand in PyTorch, and beside Pyro's own SVI.

    python examples/benchmarks/svi_step.py

First a variational autoencoder (784-512-256-20, Bernoulli likelihood by logits, normal prior and guide) on rows of 0 and 1.
All three start from the same weights, take their rows from a shuffled order, and train with torch's fused Adam. Ours and the
step by hand have the same gradient, without the score of the guide (Roeder et al., 2017), which is checked first; Pyro's
Trace_ELBO has its own. Then small programs under AutoNormal at float64: a step of ours with and without a recorded graph, a
step of Pyro, and 5,000 draws from the fitted guide. Milliseconds are medians over blocks of steps that alternate in one
process, so that what else the machine does meets all alike.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI as PyroSVI
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from rows import Rows
from torch import Tensor, nn
from torch.nn import functional

from inference import SVI
from inference.handlers import quiet, reproducible
from inference.program import Program
from pyro_genmodels import datasets

PIXELS, LATENTS, RATE = 784, 20, 1e-3


def layers(*sizes: int) -> nn.Sequential:
    pairs = [[nn.Linear(a, b), nn.ReLU()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*[layer for pair in pairs for layer in pair][:-1])


class VAE(nn.Module):
    """z_n ~ N(0, I),  x_n ~ Bernoulli(logits = decoder(z_n));  guide: z_n ~ N(μ(x_n), σ(x_n)²)"""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = layers(PIXELS, 512, 256, 2 * LATENTS), layers(LATENTS, 256, 512, PIXELS)

    def model(self, x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(mean, log_scale.exp()).to_event(1))

    def loss(self, x: Tensor) -> Tensor:
        """Minus the bound up to a constant, by hand."""
        mean, log_scale = self.encoder(x).chunk(2, -1)
        z = mean + log_scale.exp() * torch.randn_like(mean)
        log_q = (-0.5 * ((z - mean.detach()) / log_scale.detach().exp()) ** 2 - log_scale.detach()).sum()
        likelihood = functional.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="sum")
        return likelihood + (0.5 * z * z).sum() + log_q


class Batches:
    """Rows in a shuffled order, again and again."""

    def __init__(self, x: Tensor, size: int) -> None:
        self.x, self.size, self.first = x, size, len(x)

    def next(self) -> Tensor:
        if self.first + self.size > len(self.x):
            self.order, self.first = torch.randperm(len(self.x)), 0
        self.first += self.size
        return self.x[self.order[self.first - self.size : self.first]]


Run = Callable[[int], None]  # a number of steps


def repeated(step: Callable[[], Any]) -> Run:
    def run(count: int) -> None:
        for _ in range(count):
            step()

    return run


def ours(model: Any, data: tuple[Tensor, ...], rung: str = "staged", **options: Any) -> Run:
    """Steps of SVI, inside the contexts of a run."""
    os.environ["PYRO_GENMODELS_RUNG"] = rung
    backend = SVI(steps=10**9, learning_rate=RATE, progress=False, **options)
    program = Program(model, data, follow=True)
    with reproducible(program.dtype), quiet():
        state, losses = backend.init(program), []

    def run(count: int) -> None:
        nonlocal state
        with reproducible(program.dtype), quiet():
            for _ in range(count):
                state, info = backend.step(state, program)
                losses.append(info.loss)

    return run


def pyros(model: Any, guide: Any, data: Callable[[], tuple[Tensor, ...]], scale: float = 1.0) -> Run:
    """Steps of Pyro's SVI, with its validation off."""
    pyro.clear_param_store()  # noqa: TID251
    adam = pyro.optim.Adam({"lr": RATE, "fused": True})  # noqa: TID251
    svi = PyroSVI(pyro.poutine.scale(model, scale), pyro.poutine.scale(guide, scale), adam, Trace_ELBO())

    def run(count: int) -> None:
        with pyro.validation_enabled(False):
            for _ in range(count):
                svi.step(*data())

    return run


def milliseconds(runs: list[Run], block: int, blocks: int) -> list[float]:
    """Median time of a step of each kind."""
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(20)
    for _ in range(blocks):
        for found, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run(block)
            found.append((time.perf_counter() - start) / block * 1e3)
    return [statistics.median(found) for found in times]


def autoencoder(x: Tensor, size: int, block: int, blocks: int) -> list[float]:
    torch.manual_seed(0)
    one = VAE()
    two, three = copy.deepcopy(one), copy.deepcopy(one)
    check(copy.deepcopy(one), x[:size])
    adam, batches, others = torch.optim.Adam(one.parameters(), lr=RATE, fused=True), Batches(x, size), Batches(x, size)
    scale = len(x) / size

    def by_hand() -> None:
        adam.zero_grad()
        (scale * one.loss(batches.next())).backward()
        adam.step()

    def model(x: Tensor) -> None:
        pyro.module("vae", three)  # noqa: TID251
        three.model(x)

    peer = pyros(model, three.guide, lambda: (others.next(),), scale)
    return milliseconds([repeated(by_hand), ours(two, (x,), batch_size=size), peer], block, blocks)


def check(vae: VAE, x: Tensor) -> None:
    """That ours and the step by hand have the same gradient."""
    run = ours(vae, (x,))
    run(20)
    before = copy.deepcopy(vae)
    torch.manual_seed(1)
    run(1)
    torch.manual_seed(1)
    expected = torch.autograd.grad(before.loss(x), list(before.parameters()))
    found = [weight.grad for weight in vae.parameters()]
    torch.testing.assert_close(found, list(expected), rtol=1e-3, atol=1e-3)


def schools(sigma: Tensor, y: Tensor) -> None:
    """μ ~ N(0, 5²), τ ~ HalfCauchy(5), η_j ~ N(0, 1), y_j ~ N(μ + τ η_j, σ_j²)"""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)


def regression(design: Tensor, y: Tensor) -> None:
    """β ~ N(0, 4 I), σ ~ HalfCauchy(1), y_n ~ N(x_n·β, σ²)"""
    beta = pyro.sample("beta", dist.Normal(design.new_zeros(design.shape[1]), 2.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(design @ beta, sigma), obs=y)


def small(program: Any, data: tuple[Tensor, ...], block: int, blocks: int, draws: int) -> list[float]:
    pyro.set_rng_seed(0)
    torch.set_default_dtype(torch.float64)
    guide = AutoNormal(program)
    peer = pyros(program, guide, lambda: data)
    staged, plain = ours(program, data), ours(program, data, "vmapped")
    found = milliseconds([staged, plain, peer], block, blocks)
    torch.set_default_dtype(torch.float32)
    return [*found, seconds_of_draws(program, data, draws)]


def seconds_of_draws(program: Any, data: tuple[Tensor, ...], draws: int) -> float:
    backend, looked_at = SVI(steps=1, progress=False), Program(program, data, follow=True)
    with reproducible(looked_at.dtype), quiet():
        state, done = backend.init(looked_at), 0
        start = time.perf_counter()
        while done < draws:
            state, block = backend.readings(state, looked_at, min(backend.most_readings(looked_at), draws - done))
            done += block.stats["lp"].shape[1]
        return time.perf_counter() - start


def main(smoke: bool = False) -> None:
    torch.set_num_threads(1)
    blocks, rows = 1 if smoke else 60, Rows()
    torch.manual_seed(0)
    x = (torch.rand(500 if smoke else 10_000, PIXELS) > 0.7).float()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "pyro-ppl"))
    print(f"python examples/benchmarks/{os.path.basename(__file__)}{' --smoke' * smoke}")
    print(f"{datetime.date.today()}, {os.cpu_count()} CPUs, one thread, Python {platform.python_version()}, {versions}\n")
    print(f"{'autoencoder':16}{'by hand, ms':>13}{'ours, ms':>10}{'/ by hand':>11}{'Pyro SVI, ms':>14}{'/ by hand':>11}")
    for size, block in ((128, 3), (16, 12)):
        hand, mine, pyros_own = autoencoder(x, size, 2 if smoke else block, blocks)
        print(f"{f'batch {size}':16}{hand:13.2f}{mine:10.2f}{mine / hand:11.2f}{pyros_own:14.2f}{pyros_own / hand:11.2f}")
        for peer, theirs in (("by hand", hand), ("Pyro SVI", pyros_own)):
            target = 1.0 / {128: 1.05, 16: 1.1}[size] if peer == "by hand" else None
            rows.add("ms a step of SVI", f"autoencoder, batch {size}", mine, theirs=theirs, peer=peer, target=target)
    eight = datasets.load("eight_schools").arrays
    sigma, effects = torch.as_tensor(eight["sigma"]), torch.as_tensor(eight["y"])
    design = torch.randn(100, 5, dtype=torch.float64)
    programs: list[tuple[Any, tuple[Tensor, ...]]] = [(schools, (sigma, effects)), (regression, (design, design[:, 0]))]
    print(f"\n{'AutoNormal':16}{'ours, ms':>10}{'no graph, ms':>14}{'Pyro SVI, ms':>14}{'/ ours':>8}{'5,000 draws, s':>16}")
    for program, data in programs:
        staged, plain, peer, seconds = small(program, data, 5 if smoke else 20, blocks, 50 if smoke else 5000)
        print(f"{program.__name__:16}{staged:10.2f}{plain:14.2f}{peer:14.2f}{peer / staged:8.1f}{seconds:16.2f}")
        rows.add("ms a step of SVI", f"AutoNormal, {program.__name__}", staged, theirs=peer, peer="Pyro SVI")
    rows.show()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    main(parser.parse_args().smoke)
