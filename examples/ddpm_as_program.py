"""Denoising diffusion is a Pyro program: its bound by Pyro's own estimators, and by a few of its links at a time.

    python examples/ddpm_as_program.py

A chain of 40 links is trained on Old Faithful by SVI, which sees 4 links of each row in a step. The bound of the trained
chain is then estimated by the chain as a program, path by path, with every divergence in closed form, and from a plate of
links: all agree in the mean, and differ in what a run costs and how far it is off.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from inference import SVI
from pyro_genmodels import datasets
from pyro_genmodels.diffusion import DDPM, Betas, Network
from pyro_genmodels.diffusion.plated import PlatedDDPM
from pyro_genmodels.nets import PointNetwork

STEPS = 40


def main(smoke: bool = False, folder: str = "runs/ddpm_as_program") -> None:
    """Trains, prints a table and saves ``chain.png`` in a folder."""
    torch.manual_seed(0)
    x = datasets.old_faithful().arrays["x"].float()
    x = (x - x.mean(0)) / x.std(0)
    schedule = Betas.cosine(STEPS)
    chain = DDPM(Network(PointNetwork(2, width=64), schedule, "velocity"), (2,), STEPS)
    steps, runs = (20, 5) if smoke else (1000, 30)
    SVI(steps=steps, learning_rate=2e-3, draws=1, seed=0, progress=False).fit(PlatedDDPM(chain, 4), x)

    programs = {
        "Trace_ELBO": (chain, Trace_ELBO(), STEPS),
        "TraceMeanField_ELBO": (chain, TraceMeanField_ELBO(), STEPS),
        **{f"plate of {k} links": (PlatedDDPM(chain, k), Trace_ELBO(), k) for k in (1, 4, STEPS)},
    }
    print(f"{'bound, nats a row':24}{'mean':>10}{'± error':>10}{'sd of a run':>14}{'calls a row':>14}")
    for name, (model, bound, calls) in programs.items():
        torch.manual_seed(1)
        with torch.no_grad():
            found = torch.tensor([-bound.loss(model.model, model.guide, x) / len(x) for _ in range(runs)])
        error = found.std() / runs**0.5
        print(f"{name:24}{found.mean():10.3f}{error:10.3f}{found.std():14.3f}{calls:14}", flush=True)

    with torch.no_grad():
        trace = poutine.trace(chain.model).get_trace(size=1000)
    times = [STEPS, 20, 10, 4, 0]
    figure, axes = plt.subplots(1, 6, figsize=(13.0, 2.6), sharex=True, sharey=True, layout="constrained")
    shown = {f"x_{t}" if t else "x": trace.nodes[f"x_{t}" if t else "x"]["value"] for t in times} | {"data": x}
    for axis, (name, points) in zip(axes, shown.items(), strict=True):
        axis.scatter(*points.T, s=3, alpha=0.5, color="C1" if name == "data" else "C0")
        axis.set(title=name, xlim=(-3.0, 3.0), ylim=(-3.0, 3.0), xlabel="eruption")
    axes[0].set_ylabel("waiting")
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "chain.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
