"""How near a score model of a short training comes to shapes in the plane whose density is known.

    python examples/benchmarks/diffusion_sets.py

Divergence KL(shape ‖ model) from log p of rows that were not trained on, with its standard error; the mass of the model's
density on a grid, which has to be 1; the energy distance of draws, and what two samples of the shape exceed in 5 of 100. A
divergence within two standard errors of 0 is in its null band, an energy distance below that value in its own.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time

import torch
from rows import Rows

from inference import Denoising, PowerAverage, SimpleLoss
from inference.noising import EDMError, LogNormal
from pyro_genmodels import ScoreModel
from pyro_genmodels.datasets import PLANAR, planar
from pyro_genmodels.diffusion import EDM, Network
from pyro_genmodels.metrics.divergences import energy_distance, kullback_leibler, null_band
from pyro_genmodels.nets import PointNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--cell", type=float, default=0.1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"python examples/benchmarks/diffusion_sets.py --steps {given.steps} --rows {given.rows} --cell {given.cell}")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{datetime.date.today()}, {versions}, {os.cpu_count()} cores, shared, one thread; processor time\n")
    print("                KL in nats (se)   in its band    mass   energy distance   95 of 100   in its band   seconds")
    rows = Rows()
    for name in PLANAR:
        torch.manual_seed(0)
        shape = planar(name)
        x, new, other = shape.sample((20000,)), shape.sample((given.rows,)), shape.sample((given.rows,))
        model = ScoreModel(Network(PointNetwork(2, width=64), EDM(0.01), "preconditioned"), (2,), steps=32)
        loss, begun = SimpleLoss(EDMError(), LogNormal(-0.8, 1.4)), time.process_time()
        settings = {"steps": given.steps, "batch_size": 256, "learning_rate": 2e-3, "average": PowerAverage(0.1)}
        Denoising(loss=loss, seed=0, progress=False, **settings).fit(model, x)
        seconds = time.process_time() - begun
        axis = torch.arange(-3.6, 3.6, given.cell) + given.cell / 2
        with torch.no_grad():
            mass = float(model().log_prob(torch.cartesian_prod(axis, axis)).exp().sum()) * given.cell**2
        gap = kullback_leibler(shape.log_prob, model().log_prob, new)
        band = null_band(energy_distance, new, other, 100).quantile()
        apart = energy_distance(new, model.sample(given.rows))
        rows.add("divergence from the truth, nats", f"{name}, score model", gap.value, target=2.0 * gap.se)
        rows.add("energy distance", f"{name}, score model", apart, target=band)
        print(
            f"{name:14} {gap.value:8.4f} ({gap.se:.4f}) {'yes' if abs(gap.value) < 2 * gap.se else 'no':>10} {mass:10.4f}"
            f" {apart:13.4f} {band:13.4f} {'yes' if apart < band else 'no':>10} {seconds:11.0f}",
            flush=True,
        )
    rows.show()


if __name__ == "__main__":
    main()
