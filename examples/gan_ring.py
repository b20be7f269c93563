"""A ring of eight Gaussians by every objective of adversarial training, and a posterior with a generator inside.

    python examples/gan_ring.py

Modes that draws hit and the share that lies within three standard deviations of one are known for this ring; the row of data
is the floor of each number. Then the last generator is the prior of a plain program: the height of a point is seen, HMC and
Metropolis-Hastings infer its noise, and so where it may be; draws of the generator, weighed by the likelihood, say the same.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch import Tensor

from inference import HMC, Adversarial, Hinge, LeastSquares, MetropolisHastings, NonSaturating, Prior, Wasserstein
from pyro_genmodels import GAN
from pyro_genmodels.implicit import Critic
from pyro_genmodels.metrics.divergences import energy_distance, modes

ANGLES, SCALE, HIDDEN = torch.arange(8) * math.pi / 4, 0.05, (64, 64)
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)
GAMES = {
    "Wasserstein, clipped": {"objective": Wasserstein(penalty=None, clip=0.2), "critic_steps": 3},
    "Wasserstein, penalty": {"objective": Wasserstein(penalty=0.1), "critic_steps": 3},
    "hinge, R1": {"objective": Hinge(), "zero_penalty": 0.1},
    "least squares, R1": {"objective": LeastSquares(), "zero_penalty": 0.01, "learning_rate": 2e-3},
    "non-saturating": {"objective": NonSaturating()},
    "non-saturating, R1": {"objective": NonSaturating(), "zero_penalty": 0.02, "learning_rate": 2e-3},
}


def main(smoke: bool = False, folder: str = "runs/gan_ring") -> None:
    """Trains, prints a table and saves ``ring.png`` in a folder."""
    torch.manual_seed(0)
    x = CENTRES[torch.randint(0, 8, (6000,))] + SCALE * torch.randn(6000, 2)
    x, drawn, pictures = x[1000:], x[:1000], {"data": x[:1000]}
    given = {"steps": 20 if smoke else 1200, "learning_rate": 1e-3, "critic_learning_rate": 4e-3, "average": 0.995}
    fit = Adversarial(critic=Critic((2,)), batch_size=256, seed=0, progress=False, **given)
    print(f"{fit.steps} steps, one seed      modes   near one   energy distance")
    for name, settings in {"data": {}, **GAMES}.items():
        if settings:
            torch.manual_seed(0)
            model, critic = GAN((2,), 2, hidden=HIDDEN), Critic((2,), hidden=HIDDEN)
            dataclasses.replace(fit, critic=critic, **settings).fit(model, x)
            pictures[name] = drawn = model.sample(1000)
        found = modes(drawn, CENTRES, SCALE)
        print(f"{name:24} {found.hit:5} {found.quality:10.3f} {energy_distance(x[:1000], drawn):14.4f}", flush=True)
    model.double().requires_grad_(False)

    def seen(height: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        where = pyro.deterministic("where", model.generator.push(z))
        pyro.sample("height", dist.Normal(where[..., 1], 0.05), obs=height)

    short = {"chains": 32, "warmup": 20 if smoke else 300, "draws": 20 if smoke else 100, "seed": 0, "progress": False}
    prior = model.sample(100_000)
    print("\nThe point is on the left, its height 0 seen; in truth with probability 0.5")
    print(f"{'weighed draws':24} {float((-200 * prior[:, 1] ** 2).softmax(0) @ (prior[:, 0] < 0).double()):.3f}")
    for backend in (MetropolisHastings(proposal=Prior(), thin=10, **short), HMC(**short)):
        where = backend.fit(seen, torch.tensor(0.0, dtype=torch.float64)).draws["where"].flatten(0, 1)
        print(f"{type(backend).__name__:24} {float((where[:, 0] < 0).double().mean()):.3f}")
    pictures["HMC: height 0 is seen"] = where
    axes = (figure := Figure((11, 5.8), layout="constrained")).subplots(2, 4, sharex=True, sharey=True)
    for axis, (name, points) in zip(axes.flat, pictures.items(), strict=True):
        axis.scatter(*points.T, s=2, alpha=0.4)
        axis.set(title=name, aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "ring.png")


if __name__ == "__main__":
    main()
