"""A family of autoencoders on handwritten digits of 8x8 pixels, in under a minute.

    python examples/vae_family.py

Each is a Pyro program with a guess at what it hides, fitted by SVI; pixels are black or white, drawn from their grey levels.
The bound is a mean over test pictures in nats, the higher the better; that of the CVAE is given the digit. How well the ten
nearest codes tell the digit shows what codes know of it. That of a CVAE leaves out what the digit says already.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inference import ELBO, IWELBO, SVI
from pyro_genmodels import CVAE, IWAE, VAE, VaDE, datasets, plots
from pyro_genmodels.metrics import density

HIDDEN, FEATURES, TEST = (256, 128), 8, 297


def neighbours(codes: Tensor, known: Tensor, y: Tensor, truth: Tensor, count: int = 10) -> float:
    """Accuracy of a vote of the nearest codes."""
    nearest = torch.cdist(known, codes).topk(count, largest=False).indices
    return float((y[nearest].mode(1).values == truth).double().mean())


def main(smoke: bool = False, folder: str = "runs/vae_family") -> None:
    """Fits, prints a table and saves ``family.png`` and ``codes.png`` in a folder."""
    data = datasets.load("digits")
    x, y = (data.x / 16.0).float().reshape(-1, 8, 8), data.arrays["y"]
    x = torch.bernoulli(x, generator=torch.Generator().manual_seed(0))
    x, new, y, truth = x[:-TEST], x[-TEST:], y[:-TEST], y[-TEST:]
    steps = 30 if smoke else 1000
    svi = SVI(steps=steps, learning_rate=2e-3, batch_size=100, draws=1, seed=0, progress=False)
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "VAE": VAE((8, 8), FEATURES, hidden=HIDDEN),
        "beta-VAE, 2": VAE((8, 8), FEATURES, hidden=HIDDEN, beta=2.0),
        "CVAE": CVAE((8, 8), 10, FEATURES, hidden=HIDDEN),
        "IWAE, 5": IWAE((8, 8), 1, (FEATURES,), hidden=128),
        "VaDE": VaDE((8, 8), 10, FEATURES, hidden=HIDDEN),
    }
    pictures, codes = {"data": new[:10]}, {}
    print(f"{len(x)} digits, {steps} steps; on {TEST} others\n\nmodel        bound of 50 particles   10 neighbours")
    for name, model in models.items():
        if name == "VaDE":
            autoencoder = model.autoencoder()
            svi.fit(autoencoder, x)
            model.start_from(autoencoder.codes(x))
        given = (y,) if name == "CVAE" else ()
        told = (truth,) if name == "CVAE" else ()
        bound = IWELBO(particles=5) if name.startswith("IWAE") else ELBO()
        dataclasses.replace(svi, bound=bound).fit(model, x, *given)
        held = float(density.log_evidence(model, new, *told, samples=50).mean)
        with torch.no_grad():
            codes[name], known = model.encode(x, *given).mean, model.encode(new, *told).mean
            pictures[f"{name}\nreconstructs"] = model.reconstruct(new[:10], *(part[:10] for part in told))
            if name == "VaDE":
                pictures["VaDE\ncluster means"] = model.cluster_means()
            pictures[f"{name}\ndraws"] = model.sample(torch.arange(10) if told else 10)
        score = neighbours(codes[name], known, y, truth)
        print(f"{name:12} {held:21.2f} {score:15.3f}", flush=True)
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images(pictures).savefig(Path(folder) / "family.png")
    plots.latent_scatter(codes, y).savefig(Path(folder) / "codes.png")
    print(f"\nSaved {Path(folder) / 'family.png'} and codes.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
