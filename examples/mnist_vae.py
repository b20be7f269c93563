"""A variational autoencoder of MNIST in under a minute: what it costs to say a digit, and digits that nobody wrote.

    PYRO_GENMODELS_DATA=FOLDER python examples/mnist_vae.py

Pictures are binarised anew at every visit. The bound is what training sees; log p(x) is what a picture is worth to the
model, by importance sampling: an estimate from below, with the share of pictures whose weights say that it is too low. For
Burda et al.'s networks and protocols, and the importance-weighted bound, see ``examples/benchmarks/mnist_vae.py``.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch

from inference import SVI
from pyro_genmodels import VAE, plots
from pyro_genmodels.metrics.codes import active_units
from pyro_genmodels.metrics.density import log_evidence, rate_distortion


def main(smoke: bool = False, folder: str = "runs/mnist_vae") -> None:
    """Fits, prints a table and saves ``digits.png`` in a folder; a few steps if ``smoke``."""
    if "PYRO_GENMODELS_DATA" not in os.environ:
        raise SystemExit("Set PYRO_GENMODELS_DATA to the folder that holds mnist.npz.")
    with np.load(Path(os.environ["PYRO_GENMODELS_DATA"]) / "mnist.npz") as file:
        x, test = (torch.from_numpy(file[name]).float() / 255.0 for name in ("x_train", "x_test"))
    new = test[:: 1000 if smoke else 50].bernoulli(generator=torch.Generator().manual_seed(0))

    torch.manual_seed(0)
    model = VAE((28, 28), features=20, hidden=(400, 200))
    svi = SVI(
        steps=20 if smoke else 2000,
        learning_rate=2e-3,
        batch_size=100,
        transform=torch.bernoulli,
        average=0.99,
        draws=1,
        seed=0,
        progress=False,
    )
    begin = time.perf_counter()
    posterior = svi.fit(model, x)
    print(f"{len(x)} pictures, {svi.steps} steps of {svi.batch_size}: {time.perf_counter() - begin:.0f} seconds")

    parts = rate_distortion(model, new, samples=20)
    found = log_evidence(model, new, samples=20 if smoke else 500)
    units = active_units(model, new)
    print(f"\non {len(new)} others, nats a picture")
    print(f"bound               {float(parts.elbo.mean()):8.2f}")
    print(f"  rate              {float(parts.rate.mean()):8.2f}   what the code costs")
    print(f"  distortion        {float(parts.distortion.mean()):8.2f}   what it leaves to be said")
    print(f"log p(x)            {found.mean:8.2f}   k-hat above 0.7 at {float((found.pareto_k > 0.7).double().mean()):.0%}")
    print(f"active units        {units.active:8} of {units.units}")

    some = new[:12]
    rows = {"data": some, "reconstructed": model.reconstruct(some)}
    rows |= {name: model.decode(torch.randn(12, 20)).mean for name in ("drawn", "drawn again")}
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images(rows).savefig(Path(folder) / "digits.png")
    plots.learning_curve({"VAE": posterior}).savefig(Path(folder) / "bound.png")
    print(f"\nSaved {Path(folder) / 'digits.png'} and bound.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
