"""How near a score model of some minutes comes to shapes in the plane whose density is known.

    python examples/benchmarks/diffusion_sets.py         about 3 minutes of a core of its own for each shape

Divergence KL(shape ‖ model) from log p of rows that were not trained on, with its standard error; the mass of the model's
density on a grid, which has to be 1 (a grid out of step with the squares of the checkerboard, at whose edges the density
ripples); the energy distance of draws, and what two samples of the shape exceed in 5 of 100. A divergence within two
standard errors of 0 is in its null band, an energy distance below that value in its own. The model's density has the least
noise of its schedule in it, which alone is as far from a checkerboard, whose density jumps, as the column "floor" says:
∫ −log Φ(u) du = 0.48 noises a unit of edge, four of them to a unit square. Shapes of width 0.1 do not feel it.

Three of the shapes are mixtures of Gaussians, whose denoiser is known exactly. On those the estimates of the likelihood of
the same networks are held against one another, in the mean over 500 rows, as differences from the truth:

    errors     by the errors of denoising; their distance from the truth must be the excess, ½ ∫ E‖x̂ − x̂_0‖² dγ (to noise)
    bound      with N steps; must fall to the errors as N grows
    flow       exact divergence; must be at least 0
    probes     flow by one frozen probe a row in place of the exact divergence; must be the flow (to noise)
    signs      flow by both sign vectors of the plane; must be the flow (to rounding)
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time

import torch
from rows import Rows
from torch import Tensor

from inference import Denoising, PowerAverage, SimpleLoss
from inference.noising import EDMError, LogNormal
from pyro_genmodels import ScoreModel
from pyro_genmodels.datasets import PLANAR, planar
from pyro_genmodels.diffusion import EDM, Network, Oracle, likelihood
from pyro_genmodels.metrics.divergences import energy_distance, kullback_leibler, null_band
from pyro_genmodels.nets import PointNetwork

ROWS = Rows()
LEAST, MOST = 0.002, 20.0  # noise, in deviations of the data


def trained(x: Tensor, steps: int, batch: int, width: int) -> ScoreModel:
    """A score model, by the settings that were the best of a few tries on the checkerboard and the spirals."""
    torch.manual_seed(0)
    model = ScoreModel(Network(PointNetwork(2, width=width), EDM(LEAST, MOST), "preconditioned"), (2,), steps=32)
    loss = SimpleLoss(EDMError(), LogNormal(-2.0, 1.8))  # every level that log p is an integral over
    settings = {"steps": steps, "batch_size": batch, "learning_rate": 2e-3, "average": PowerAverage(0.1)}
    Denoising(loss=loss, seed=0, progress=False, **settings).fit(model, x)
    return model


def exact_denoiser(model: ScoreModel, shape: torch.distributions.Distribution) -> Oracle:
    """Of a mixture of Gaussians, on the scale that the model has for its data, in float64."""
    parts = shape.component_distribution.base_dist  # type: ignore[attr-defined]
    means = model.standardised(parts.loc).double()
    covariances = torch.diag_embed((parts.scale / model.deviation).double().square())
    return Oracle(torch.ones(len(means), dtype=torch.float64), means, covariances, model.denoiser.schedule)


@torch.no_grad()
def estimates(name: str, model: ScoreModel, shape: torch.distributions.Distribution, rows: Tensor, draws: int = 2) -> None:
    """Prints how far the estimates of the likelihood are from the truth."""
    oracle, network, schedule = exact_denoiser(model, shape), model.denoiser, model.denoiser.schedule
    x = model.standardised(rows).double()
    truth, grid = oracle.log_prob(x), schedule.grid(64, "log_snr")
    noise = torch.randn(len(grid), draws, *x.shape, dtype=torch.float64)
    known, exact = (likelihood.immse_log_prob(denoiser, x, grid, draws, noise) for denoiser in (network, oracle))
    excess = torch.zeros(len(grid), len(x), dtype=torch.float64)
    for i, t in enumerate(grid):
        for draw in noise[i]:
            apart = network(x + t * draw, t).mean - oracle(x + t * draw, t).mean
            excess[i] += apart.square().sum(1) / t.square() / draws
    excess = 0.5 * torch.trapezoid(excess, -2.0 * grid.log()[:, None], dim=0)
    flow = likelihood.flow_log_prob(network, x, model.grid)
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)[:, None]
    found = {"errors": exact - known, "excess": excess, "flow": truth - flow}  # with the noise that both have had
    found["probes"] = truth - likelihood.flow_log_prob(network, x, model.grid, likelihood.rademacher(1, x))
    for steps in (64, 256):
        chain = torch.cat([schedule.grid(steps, "log_snr"), grid.new_zeros(1)])
        bounds = [likelihood.variational_bound(network, x, chain).total for _ in range(draws)]
        found[f"bound, {steps}"] = truth - torch.stack(bounds).mean(0)
    rounding = float((flow - likelihood.flow_log_prob(network, x, model.grid, signs)).abs().max())
    shown = {key: f"{value.mean():.4f} ({value.std() / len(x) ** 0.5:.4f})" for key, value in found.items()}
    print(f"{name:14}" + "".join(f"{value:>18}" for value in shown.values()) + f"{rounding:10.0e}", flush=True)
    for first, second in (("errors", "excess"), ("probes", "flow")):
        apart = found[first] - found[second]
        ROWS.add(f"|{first} − {second}|, nats a row", f"{name}, trained score model", float(apart.mean().abs()),
                 target=3.0 * float(apart.std()) / len(x) ** 0.5)  # fmt: skip
    ROWS.add("flow's two sign vectors − exact divergence, nats", f"{name}, trained score model", rounding, target=1e-4)
    gaps = [float((found[f"bound, {steps}"] - found["errors"]).mean()) for steps in (64, 256)]
    ROWS.add("gap of the bound to the errors at 256 steps over that at 64", f"{name}, trained score model",
             gaps[1] / gaps[0], target=0.5)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--cell", type=float, default=0.12)
    parser.add_argument("--smoke", action="store_true", help="a few steps")
    given = parser.parse_args()
    if given.smoke:
        given.steps, given.width, given.rows = 20, 16, 100
    torch.set_num_threads(1)
    settings = " ".join(f"--{name} {getattr(given, name)}" for name in ("steps", "batch", "width", "rows", "cell"))
    print(f"python examples/benchmarks/diffusion_sets.py {settings}")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{datetime.date.today()}, {versions}, {os.cpu_count()} cores, shared, one thread; processor time\n")
    head = "KL in nats (se)   in its band   floor    mass   energy distance   95 of 100   in its band   seconds"
    print(f"{'':16}{head}")
    models = {}
    for name in PLANAR:
        torch.manual_seed(0)
        shape = planar(name)
        x, new, other = shape.sample((400_000,)), shape.sample((given.rows,)), shape.sample((given.rows,))
        begun = time.process_time()
        model = trained(x, given.steps, given.batch, given.width)
        seconds = time.process_time() - begun
        models[name] = model, shape, new
        axis = torch.arange(-3.6, 3.6, given.cell) + given.cell / 2
        with torch.no_grad():
            mass = float(model().log_prob(torch.cartesian_prod(axis, axis)).exp().sum()) * given.cell**2
            gap = kullback_leibler(shape.log_prob, model().log_prob, new)
        band = null_band(energy_distance, new, other, 100).quantile()
        apart = energy_distance(new, model.sample(given.rows))
        # 4 units of edge to a square of 1, and ∫ −log Φ(u) du = 0.48 from 0 on
        floor = 4.0 * 0.48 * LEAST * float(model.deviation.mean()) if name == "checkerboard" else 0.0
        ROWS.add("divergence from the truth, nats", f"{name}, score model", gap.value, target=2.0 * gap.se)
        ROWS.add("energy distance", f"{name}, score model", apart, target=band)
        print(
            f"{name:14} {gap.value:8.4f} ({gap.se:.4f}) {'yes' if abs(gap.value) < 2 * gap.se else 'no':>10} {floor:9.4f}"
            f"{mass:9.4f} {apart:13.4f} {band:13.4f} {'yes' if apart < band else 'no':>10} {seconds:11.0f}",
            flush=True,
        )
    names = ("errors", "excess", "flow", "probes", "bound, 64", "bound, 256")
    print("\nE log p of the data less each estimate of the trained networks, nats (se)")
    print(f"{'':14}" + "".join(f"{name:>18}" for name in names) + f"{'signs':>10}")
    for name, (model, shape, new) in models.items():
        if name != "checkerboard":
            estimates(name, model, shape, new[:500])
    ROWS.show()


if __name__ == "__main__":
    main()
