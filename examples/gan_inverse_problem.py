"""What was there, given what is seen: posteriors with a generator for a prior, in under a minute.

    python examples/gan_inverse_problem.py

A GAN of small digits is the prior of a plain program: x = generator(noise) + what it misses, y = A x + noise is seen, the
upper half of x or x blurred. With A = U S Vᵀ the numbers Uᵀ y are independent given the noise, and what is missed is normal
given all else. By how much the generator misses is inferred, too. The digits to be found were not trained on.

Squared error, the root of its mean, of the mean of the draws and of the mean of all digits; share of the pixels in central
intervals of 90 %: of those that are hidden, or of all that are blurred. R-hat is that of the mean grey of each image.
"""

import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from inference import HMC, Adversarial, arviz
from pyro_genmodels import GAN, datasets, plots
from pyro_genmodels.implicit import Critic, NoiseReparam
from pyro_genmodels.metrics.calibration import coverage
from pyro_genmodels.nets import MLP

ZERO, NOISE, EYE = torch.zeros((), dtype=torch.float64), 0.1, torch.eye(64, dtype=torch.float64)
KERNEL = torch.full((1, 1, 3, 3), 1 / 9, dtype=torch.float64)
MAPS = {"upper half": EYE[:32], "blurred": nn.functional.conv2d(EYE.reshape(64, 1, 8, 8), KERNEL, padding=1).reshape(64, 64)}
FIT = {"learning_rate": 1e-3, "critic_learning_rate": 2e-3, "average": 0.998, "zero_penalty": 1.0, "progress": False}


def seen(gan: GAN, s: Tensor, v: Tensor, y: Tensor) -> None:
    """Images, and the numbers Uᵀ y of each."""
    miss = pyro.sample("miss", dist.HalfNormal(0.3 + ZERO))
    with pyro.plate("rows", len(y)):
        x = pyro.sample("x", gan.generator())
        pyro.sample("y", dist.Normal(s * (x.flatten(-2) @ v), (miss**2 * s**2 + NOISE**2).sqrt()).to_event(1), obs=y)


def images(made: Tensor, miss: Tensor, s: Tensor, v: Tensor, y: Tensor) -> Tensor:
    """Images (chain, draw, row, 64) at draws of what the generator made: a draw of all, moved to what is seen."""
    drawn = made + miss * torch.randn_like(made)
    error = y - s * (drawn @ v) - NOISE * torch.randn(*made.shape[:-1], len(s)).double()
    return drawn + (miss**2 * s / (miss**2 * s**2 + NOISE**2) * error) @ v.T


def main(smoke: bool = False, folder: str = "runs/gan_inverse_problem") -> None:
    """Trains, infers, prints a table and saves ``digits.png`` in a folder."""
    few = {"warmup": 20, "draws": 20} if smoke else {"warmup": 250, "draws": 300}
    sampler = HMC(chains=16, most_steps=96, seed=0, progress=False, **few)
    torch.manual_seed(0)
    x = (datasets.load("digits").x / 16.0).float().reshape(-1, 8, 8)
    x, truth = x[torch.randperm(len(x))].split([len(x) - 6, 6])
    gan = GAN((8, 8), 8, network=nn.Sequential(MLP(8, 64, (128, 128)), nn.Sigmoid()))
    Adversarial(critic=Critic((8, 8)), steps=20 if smoke else 1500, batch_size=128, seed=0, **FIT).fit(gan, x)
    gan.double().requires_grad_(False)
    pictures, truth, mean = {"truth": truth}, truth.double().flatten(1), x.mean(0).double().flatten()
    print("6 digits    worst R-hat   error   of the mean   in 90 %   misses by")
    for name, a in MAPS.items():
        (u, s, vt), y, first = torch.linalg.svd(a, full_matrices=False), truth @ a.T, len(a) % 64
        y = y + NOISE * torch.randn_like(y)
        draws = sampler.fit(poutine.reparam(seen, config={"x": NoiseReparam()}), gan, s, vt.T, y @ u).draws
        found = images(draws["x"].flatten(-2), draws["miss"][..., None, None], s, vt.T, y @ u)
        rhat = arviz.rhat(found[..., first:].mean(-1).numpy()).max()
        errors = [float((guess - truth)[:, first:].square().mean().sqrt()) for guess in (found.mean((0, 1)), mean)]
        share = float(coverage(truth[:, first:].flatten(), found[..., first:].flatten(0, 1).flatten(1)))
        print(f"{name:11} {rhat:11.3f} {errors[0]:7.3f} {errors[1]:13.3f} {share:9.2f} {float(draws['miss'].mean()):11.2f}")
        known = torch.cat([y, y.new_full((6, 64 - len(a)), math.nan)], 1)
        shown = {"seen": known, "mean": found.mean((0, 1)), "a draw": found[0, -1]}
        pictures |= {f"{name}:\n{key}": value.reshape(-1, 8, 8).clamp(0, 1) for key, value in shown.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images(pictures).savefig(Path(folder) / "digits.png")


if __name__ == "__main__":
    torch.set_num_threads(1)  # the same digits on any machine
    main()
