"""In-painting inside a larger program: digits half of which is hidden, seen through a camera that is not known.

    python examples/diffusion_prior.py

The prior is a diffusion of the first 12 principal components of a digit. Its denoiser is exact, that of ten Gaussians with
the moments of the classes, so that the answer is known. The program adds a gain and a noise level that all pictures share.
HMC infers both and all pictures at once, in the noise that the flow turns into digits. With the camera given, the likelihood
of one picture leads a sampler of its posterior, alone and with weights.
"""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import TransformReparam
from torch import Tensor

from inference import HMC
from pyro_genmodels import datasets, plots
from pyro_genmodels.diffusion import EDM, FlowPrior, Oracle, samplers
from pyro_genmodels.diffusion.posterior import Likelihood, PiGDM, twisted

CAMERA, SCHEDULE = {"gain": torch.tensor(1.7), "noise": torch.tensor(0.4)}, EDM(0.02, 20.0)
SEEN = torch.arange(64) < 32  # the upper half
DIGITS = datasets.digits().arrays
PIXELS = DIGITS["x"] / 8.0 - 1.0
AXES = torch.linalg.svd(PIXELS - PIXELS.mean(0), full_matrices=False).Vh[:12]


def drawn(x: Tensor) -> Tensor:
    """Pixels of principal components."""
    return PIXELS.mean(0) + x @ AXES


def camera(y: Tensor, prior: dist.Distribution) -> None:
    gain = pyro.sample("gain", dist.LogNormal(y.new_zeros(()), 0.5))
    noise = pyro.sample("noise", dist.HalfNormal(y.new_tensor(1.0)))
    with pyro.plate("pictures", len(y)):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(gain * drawn(x), noise).mask(SEEN).to_event(1), obs=y)


def main(smoke: bool = False, folder: str = "runs/diffusion_prior") -> None:
    """Infers, prints a table and saves ``digits.png`` in a folder."""
    torch.manual_seed(0)
    parts = [((PIXELS - PIXELS.mean(0)) @ AXES.mT)[DIGITS["y"] == label] for label in range(10)]
    moments = torch.stack([p.mean(0) for p in parts]), torch.stack([p.T.cov() for p in parts])
    oracle, size, (steps, count) = Oracle(torch.ones(10), *moments, SCHEDULE), 4, (8, 20) if smoke else (60, 400)
    truth = drawn(oracle.distribution().sample((size,)))  # new digits of that law
    y = CAMERA["gain"] * truth + CAMERA["noise"] * torch.randn_like(truth)
    found = {"prior": [oracle.distribution().sample((count,)) for _ in y], "led": [], "led, weighed": [], "exact": []}
    given, plain = poutine.condition(camera, data=CAMERA), dist.Normal(torch.zeros(12).double(), 1.0).to_event(1)
    for row in y:
        likelihood = Likelihood(given, row[None], plain)
        led, start = PiGDM(oracle, likelihood, deviation=1.5), 20.0 * torch.randn(count, 12, dtype=y.dtype)
        found["led"].append(samplers.ancestral(led, start, SCHEDULE.grid(steps)))
        found["led, weighed"].append(twisted(led, likelihood, start, SCHEDULE.grid(steps)).draws(count))
        seen, target, _ = likelihood.measurement()
        found["exact"].append(oracle.condition(seen, target, torch.eye(len(seen)).double()).distribution().sample((count,)))
    hidden = {name: drawn(torch.stack(rows, 1)) for name, rows in found.items()}
    short = {"chains": 16, "warmup": 3, "draws": 2} if smoke else {"chains": 16, "warmup": 60, "draws": 25}
    fit = HMC(**short, start={"x_base": torch.zeros(size, 12), "gain": 1.0, "noise": 1.0}, seed=0, progress=False)
    prior = FlowPrior(oracle, SCHEDULE.grid(4, "karras"), (12,))
    draws = fit.fit(poutine.reparam(camera, config={"x": TransformReparam()}), y, prior()).draws
    hidden["HMC, camera inferred"] = drawn(draws["x"].flatten(0, 1))
    print(f"{'hidden pixels':24}{'RMSE of the mean':>18}{'in 90 % intervals':>20}")
    for name, rows in hidden.items():
        low, high = rows.quantile(torch.tensor([0.05, 0.95], dtype=y.dtype), 0)
        inside = ((low < truth) & (truth < high))[:, ~SEEN].double().mean()
        print(f"{name:24}{(rows.mean(0) - truth)[:, ~SEEN].square().mean().sqrt():18.3f}{inside:20.3f}")
    for name, value in CAMERA.items():
        print(f"{name}: {draws[name].mean():.3f} ± {draws[name].std():.3f}, in truth {value:.3f}")
    shown = {"truth": truth, "seen": torch.where(SEEN, y / CAMERA["gain"], torch.nan)}
    shown |= {name: rows.mean(0) for name, rows in hidden.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    pictures = {name: ((rows + 1.0) / 2.0).reshape(-1, 8, 8) for name, rows in shown.items()}
    plots.images(pictures).savefig(Path(folder) / "digits.png", dpi=150)


if __name__ == "__main__":
    main()
