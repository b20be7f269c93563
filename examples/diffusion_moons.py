"""Two moons by diffusion: one score model that is a distribution, trained as EDM, as DDPM and by flow matching.

    python examples/diffusion_moons.py

The density of the moons is known, so that log p of rows that no model has seen tells each one's divergence from the truth,
and the density of a model has to integrate to one. The energy distance of draws stands beside what it is between two samples
of the moons themselves.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from inference import Denoising, PowerAverage, SimpleLoss
from inference.noising import EDMError, FlowError, LogNormal
from pyro_genmodels import ScoreModel
from pyro_genmodels.datasets import planar
from pyro_genmodels.diffusion import EDM, VP, Network, Straight
from pyro_genmodels.metrics.divergences import energy_distance, kullback_leibler, null_band
from pyro_genmodels.nets import PointNetwork

WAYS = {
    "EDM": (EDM(0.01), "preconditioned", SimpleLoss(EDMError(), LogNormal(-0.8, 1.4))),
    "DDPM, noise": (VP(), "noise", SimpleLoss()),
    "flow matching": (Straight(), "flow", SimpleLoss(FlowError(), LogNormal(-0.5, 1.5))),
}


def main(smoke: bool = False, folder: str = "runs/diffusion_moons") -> None:
    """Trains, prints a table and saves ``moons.png`` in a folder."""
    torch.manual_seed(0)
    moons = planar("moons")
    x, new, few = moons.sample((4000,)), moons.sample((100 if smoke else 1000,)), 5 if smoke else 100
    step = 0.5 if smoke else 0.1
    axes = torch.meshgrid(torch.arange(-3.5, 3.5, step), torch.arange(-2.5, 2.5, step), indexing="ij")
    grid = torch.stack(axes, -1).reshape(-1, 2)
    fit = Denoising(steps=20 if smoke else 1200, batch_size=256, learning_rate=2e-3, average=PowerAverage(), seed=0)
    band = null_band(energy_distance, new, moons.sample((len(new),)), few)
    print(f"{fit.steps} steps, one seed     KL in nats (se)    mass   energy distance")
    print(f"{'moons':24} {0.0:7.3f}          {1.0:9.3f} {band.value:12.4f}, below {band.quantile():.4f} in 95 of 100")
    pictures = {"moons": (x[:1000], moons.log_prob(grid))}
    for name, (schedule, prediction, loss) in WAYS.items():
        torch.manual_seed(0)
        model = ScoreModel(Network(PointNetwork(2, width=64), schedule, prediction), (2,), steps=24)
        Denoising(**{**vars(fit), "loss": loss, "progress": False}).fit(model, x)
        drawn = model.sample(len(new))
        with torch.no_grad():
            density = model().log_prob(grid)
        gap = kullback_leibler(moons.log_prob, model().log_prob, new)
        mass = float(density.exp().sum()) * step**2
        print(f"{name:24} {gap.value:7.3f} ({gap.se:.3f}) {mass:11.3f} {energy_distance(new, drawn):12.4f}", flush=True)
        pictures[name] = (drawn, density)

    figure, panels = plt.subplots(2, 4, figsize=(12, 5), sharex=True, sharey=True, layout="constrained")
    for (upper, lower), (name, (points, density)) in zip(panels.T, pictures.items(), strict=True):
        upper.scatter(*points.T, s=2, alpha=0.4)
        lower.pcolormesh(*(a.numpy() for a in axes), density.exp().reshape(axes[0].shape).numpy(), vmin=0.0)
        upper.set(title=name, aspect="equal", xlim=(-3.5, 3.5), ylim=(-2.5, 2.5))
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "moons.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
