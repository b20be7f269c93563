"""Old Faithful as a mixture of two Gaussians, by five back-ends: one model, one result type, one table, one picture.

    python examples/gmm_five_ways.py

The model says how the data came about, and nothing of how to infer it. Components have no names of their own, so every
posterior is matched to one pivot before components are held side by side.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from inference import EM, HMC, SVI, Gibbs, MetropolisHastings, relabel
from pyro_genmodels import GMM, datasets, plots


def main(smoke: bool = False, folder: str = "runs/gmm_five_ways") -> None:
    """Fits, prints a table and saves ``density.png``.

    Args:
        smoke: Whether to take a few steps only, to see that all runs.
        folder: Where the picture goes.
    """
    data = datasets.load("faithful")
    size = 20 if smoke else 500
    backends = {
        "SVI": SVI(seed=0, steps=size, learning_rate=0.05),
        "EM": EM(seed=0),
        "Gibbs": Gibbs(seed=0, draws=size, warmup=size // 5),
        "Metropolis-Hastings": MetropolisHastings(seed=0, chains=16, draws=size, warmup=2 * size, thin=1 if smoke else 20),
        "HMC": HMC(seed=0, chains=8, draws=size, warmup=size // 2),
    }
    posteriors = {name: backend.fit(GMM(components=2), data.x) for name, backend in backends.items()}

    pivot = posteriors["EM"].point()
    pivot = {site: pivot[site] for site in ("weights", "means")}
    posteriors = {
        name: dataclasses.replace(posterior, draws=relabel.match(posterior.draws, posterior.symmetry, pivot))
        for name, posterior in posteriors.items()
    }

    print(f"{'':20}  seconds  weight of longer  its mean: eruption, waiting   findings")
    for name, posterior in posteriors.items():
        point = posterior.point()
        longer = int(pivot["means"][:, 0].argmax())
        eruption, waiting = point["means"][longer]
        findings = " ".join(posterior.diagnose()) or "none"
        print(
            f"{name:20}  {posterior.info['sampling_time']:7.1f}  {point['weights'][longer]:16.3f}  "
            f"{eruption:8.3f} min {waiting:11.2f} min   {findings[:60]}"
        )

    Path(folder).mkdir(parents=True, exist_ok=True)
    picture = Path(folder) / "density.png"
    plots.density_contours(GMM(components=2), data.x, posteriors, data.columns).savefig(picture)
    print(f"\nSaved {picture}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # two threads are slower on tensors this small
    main()
