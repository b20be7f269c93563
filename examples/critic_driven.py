"""A critic corrects its generator: discriminator-driven sampling of a ring of eight Gaussians, free and with something seen.

    python examples/critic_driven.py

The generator puts points between the Gaussians. When it has stopped, its critic goes on alone, until its scores are the log
of the ratio of the densities of data and draws. As a factor of the noise they turn draws of the generator into data, in any
program and by any sampler: here in one with nothing else, and in one where the height of a point, about 0, is seen.
"""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from inference import Adversarial, MetropolisHastings, Minimax, Prior
from pyro_genmodels import GAN
from pyro_genmodels.implicit import Critic, NoiseReparam
from pyro_genmodels.metrics.divergences import modes

ANGLES, SCALE, ZERO = torch.arange(8) * math.pi / 4, 0.05, torch.zeros((), dtype=torch.float64)
CENTRES = torch.stack([ANGLES.cos(), ANGLES.sin()], -1)


def free(gan: GAN) -> None:
    """A point."""
    pyro.sample("x", gan.generator())


def seen(gan: GAN) -> None:
    """A point, and its height."""
    x = pyro.sample("x", gan.generator())
    pyro.sample("height", dist.Normal(x[1], 0.3), obs=ZERO)


def main(smoke: bool = False, folder: str = "runs/critic_driven") -> None:
    """Trains, samples, prints a table and saves ``ring.png`` in a folder."""
    torch.manual_seed(0)
    x = CENTRES[torch.randint(0, 8, (6000,))] + SCALE * torch.randn(6000, 2)
    torch.manual_seed(0)
    gan, critic = GAN((2,), 2, hidden=(64, 64)), Critic((2,), hidden=(64, 64))
    common = {"critic": critic, "batch_size": 256, "seed": 0, "progress": False, "critic_learning_rate": 4e-3}
    steps = 20 if smoke else 1000
    Adversarial(steps=steps, learning_rate=2e-3, zero_penalty=0.02, average=0.99, **common).fit(gan, x)
    Adversarial(steps=2 * steps, learning_rate=None, objective=Minimax(), average=0.995, **common).fit(gan, x)
    gan.double().requires_grad_(False)
    critic.double().requires_grad_(False)
    run = {"chains": 100, "warmup": 20 if smoke else 300, "draws": 20, "thin": 20, "seed": 0, "progress": False}
    sampler = MetropolisHastings(proposal=Prior(), **run)
    weighed = x[(-0.5 * (x[:, 1] / 0.3) ** 2).softmax(0).multinomial(2000, replacement=True)]
    pictures = {"data": x[:2000], "data, height about 0": weighed}
    for program, what in ((free, ""), (seen, ", height about 0")):
        for name, judge in (("generator", None), ("with its critic", critic)):
            fit = sampler.fit(poutine.reparam(program, config={"x": NoiseReparam(judge)}), gan)
            pictures[name + what] = fit.draws["x"].flatten(0, 1).float()
    print("                              near one of eight   height near 0.7")
    for name, points in sorted(pictures.items(), key=lambda row: "," in row[0]):
        share = float(((points[:, 1].abs() - 0.5**0.5).abs() < 3 * SCALE).double().mean())
        print(f"{name:30} {modes(points, CENTRES, SCALE).quality:16.3f} {share:17.3f}")
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.2), sharex=True, sharey=True, layout="constrained")
    for axis, name in zip(axes.T.flat, sorted(pictures, key=lambda name: name.split(",")[0]), strict=True):
        axis.scatter(*pictures[name].T, s=2, alpha=0.3)
        axis.set(title=name, aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(folder) / "ring.png")
    plt.close(figure)


if __name__ == "__main__":
    main()
