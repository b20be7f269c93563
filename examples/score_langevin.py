"""A score is enough to draw by: Langevin dynamics down a ladder of noise levels, and why the ladder is needed.

    python examples/score_langevin.py

The data are a ring of five Gaussians of unequal weights, whose score at every level is known, so that what the network costs
and what the sampler costs can be told apart. The last rows have an energy in place of a score: persistent contrastive
divergence trains it, and since it has a density but for its constant, HMC and Metropolis-adjusted Langevin moves draw from
it without the bias of a step. Moves of one level are slow to find the weights of modes that lie apart; the ladder is not.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import HMC, ContrastiveDivergence, Denoising, Langevin, MetropolisHastings, SimpleLoss
from inference.noising import EDMError, LogNormal
from pyro_genmodels import EnergyModel, ScoreModel
from pyro_genmodels.diffusion import EDM, Network, Oracle
from pyro_genmodels.diffusion.langevin import annealed_langevin, ula
from pyro_genmodels.metrics.divergences import energy_distance
from pyro_genmodels.nets import PointNetwork

LEVELS = EDM(0.05, 8.0)
TRUTH = Oracle.ring(5, LEVELS)  # of deviation 0.3, radius 2 and weights 2/20, …, 6/20


def shares(x: Tensor) -> Tensor:
    """Of the draws that are nearest to each mode, (5,)."""
    return torch.cdist(x.double(), TRUTH.means).argmin(1).bincount(minlength=5) / len(x)


def main(smoke: bool = False, folder: str = "runs/score_langevin") -> None:
    """Trains, prints a table and saves ``langevin.png`` in a folder."""
    torch.manual_seed(0)
    x, test = TRUTH.distribution().sample((20000,)).float(), TRUTH.distribution().sample((2000,))
    how = {"steps": 20 if smoke else 1500, "batch_size": 256, "average": 0.995, "seed": 0, "progress": False}
    network = Network(PointNetwork(2, width=64), LEVELS, "preconditioned", deviation=1.5)
    score = ScoreModel(network, (2,), is_scaled=False)
    Denoising(loss=SimpleLoss(weighting=EDMError(1.5), times=LogNormal(-0.5, 1.3)), **how).fit(score, x)
    energy = EnergyModel((2,), hidden=(64, 64), chains=1000)
    Denoising(loss=ContrastiveDivergence(5), learning_rate=3e-3, **how).fit(energy, x)

    grid, moves = LEVELS.grid(24, "log_snr"), 2 if smoke else 20
    begin = 8.0 * torch.randn(2000, 2)
    drawn = {"data": x[:2000]}
    for name, denoiser in (("exact score", TRUTH), ("score network", network)):
        point = begin.double() if denoiser is TRUTH else begin
        with torch.no_grad():
            drawn[f"{name}, ladder"] = annealed_langevin(denoiser, point, grid, moves, rate=0.3)
            last = partial(denoiser.score, t=grid[-1])
            drawn[f"{name}, one level"] = ula(last, point, 0.3 * 0.3**2, len(grid) * moves)  # of the modes, not of the noise
    drawn["energy, its own chains"] = energy.particles
    short = {"chains": 200, "warmup": 200, "draws": 10, "seed": 0, "progress": False, "start": {"x": begin[:200, None]}}
    for backend in (MetropolisHastings(proposal=Langevin(), **short), HMC(**short)):
        label = f"energy, {'Langevin' if isinstance(backend, MetropolisHastings) else 'HMC'}"
        drawn[label] = backend.fit(energy, None, size=1).draws["x"].reshape(-1, 2)
    print(f"{'':28}weights off by   energy distance   mean log p in truth")
    figure = Figure(figsize=(13.0, 6.6), layout="constrained")
    for axis, (name, points) in zip(figure.subplots(2, 4, sharex=True, sharey=True).flat, drawn.items(), strict=True):
        points = points.double()
        off = 0.5 * float((shares(points) - TRUTH.log_weights.exp()).abs().sum())
        print(
            f"{name:28}{off:14.3f}{energy_distance(points[:2000], test):18.4f}{float(TRUTH.log_prob(points).mean()):22.3f}"
        )
        axis.scatter(*points[:1000].T, s=3, alpha=0.4)
        axis.set(title=name, aspect="equal", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "langevin.png", dpi=120)
    print(f"\nSaved {Path(folder) / 'langevin.png'}")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
