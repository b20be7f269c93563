"""Several processes as one: rows are split for EM and SVI, chains for the samplers; the same script for any number.

    python examples/distributed.py
    torchrun --nproc-per-node=2 examples/distributed.py

What differs from a script for one process is ``init_process_group`` before the first fit, and that one process alone prints.
EM and SVI find the same with any number of processes; samplers have other random numbers, and agree within their error.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings
from pyro_genmodels import GMM, datasets


def line(x: Tensor, y: Tensor) -> None:
    """The wait for an eruption is linear in how long the last one was."""
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    intercept = pyro.sample("intercept", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.HalfNormal(5.0))
    with pyro.plate("eruptions", len(x)):
        pyro.sample("y", dist.Normal(intercept + slope * x, spread), obs=y)


def main(smoke: bool = False, folder: str = "runs/distributed") -> None:
    """Fits, prints a table and saves ``slopes.png`` in a folder; takes a few steps only if ``smoke``."""
    count = int(os.environ.get("WORLD_SIZE", 1))
    if count > 1:  # started by torchrun; with "nccl", each process has its data on a GPU of its own
        torch.distributed.init_process_group("gloo")
    x, y = datasets.load("faithful")["x"].T
    y = y / 10
    size, chains = 20 if smoke else 500, 4 * count
    mixture = EM(seed=0, progress=False).fit(GMM(2), torch.stack([x, y], 1))  # every process gets all the data
    fits = {
        "EM": EM(seed=0).fit(line, x, y),
        "SVI": SVI(seed=0, steps=4 * size).fit(line, x, y),
        "Gibbs": Gibbs(seed=0, chains=chains, warmup=size // 2, draws=size).fit(line, x, y),
        "Metropolis-Hastings": MetropolisHastings(seed=0, chains=chains, warmup=size, draws=size, thin=5).fit(line, x, y),
        "HMC": HMC(seed=0, chains=chains, warmup=size // 2, draws=size).fit(line, x, y),
    }
    if int(os.environ.get("RANK", 0)) == 0:  # every process has the whole result
        show(fits, x, y, count, Path(folder))
        print("Two kinds of eruptions, by EM: shares", [f"{w:.4f}" for w in mixture.point()["weights"]])
    if count > 1:
        torch.distributed.destroy_process_group()


def show(fits: dict, x: Tensor, y: Tensor, count: int, folder: Path) -> None:
    print(f"{count} processes\n{'':20} chains  seconds           slope       intercept")
    figure = Figure(figsize=(7, 4), dpi=150, layout="constrained")
    axis = figure.subplots()
    axis.plot(x, y, ".", color="#c3c9d2", markersize=4)
    for i, (name, fit) in enumerate(fits.items()):
        slope, intercept = fit.draws["slope"].flatten(), fit.draws["intercept"].flatten()
        cells = [f"{v.mean():.3f} ({v.std(correction=0):.3f})" for v in (slope, intercept)]
        print(f"{name:20} {fit.shape[0]:6}  {fit.info['sampling_time']:7.1f}  {cells[0]:>14}  {cells[1]:>14}")
        axis.plot(x, intercept.mean() + slope.mean() * x, linewidth=7 - 1.5 * i, label=name)
    axis.set(xlabel="minutes of an eruption", ylabel="ten minutes to the next")
    axis.legend(frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "slopes.png")


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--folder", default="runs/distributed")
    main(**vars(parser.parse_args()))
