"""In-painting inside a larger program: digits half of which is hidden, seen through a camera that is not known.

    python examples/diffusion_prior.py

The prior is a diffusion of the first 12 principal components of a digit; its denoiser is that of ten Gaussians, exact. The
program adds a gain and a noise level, and all is inferred at once, in the noise that the flow turns into digits. With the
camera given, the likelihood of one picture leads a sampler of its posterior, alone and with weights.
"""

from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import TransformReparam
from torch import Tensor

from inference import Langevin, MetropolisHastings
from pyro_genmodels import datasets, plots
from pyro_genmodels.diffusion import EDM, FlowPrior, Oracle, samplers
from pyro_genmodels.diffusion.posterior import Likelihood, PiGDM, twisted

CAMERA, SCHEDULE = {"gain": torch.tensor(1.7), "noise": torch.tensor(0.4)}, EDM(0.02, 20.0)
SEEN = torch.arange(64) < 32  # the upper half
PIXELS, LABELS = datasets.digits().arrays["x"] / 8.0 - 1.0, datasets.digits().arrays["y"]
AXES = torch.linalg.svd(PIXELS - PIXELS.mean(0), full_matrices=False).Vh[:12]


def drawn(x: Tensor) -> Tensor:
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
    parts = [((PIXELS - PIXELS.mean(0)) @ AXES.mT)[label == LABELS] for label in range(10)]
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
        exact = oracle.condition(*likelihood.measurement()[:2], torch.eye(12).double())
        found["exact"].append(exact.distribution().sample((count,)))
    hidden = {name: drawn(torch.stack(rows, 1)) for name, rows in found.items()}
    short = {"warmup": 3, "draws": 2} if smoke else {"warmup": 400, "draws": 40, "thin": 10}
    start = {"x_base": torch.zeros(size, 12), "gain": 1.0, "noise": 1.0}
    fit = MetropolisHastings(proposal=Langevin(), chains=32, **short, start=start, seed=0, progress=False)
    prior = FlowPrior(oracle, SCHEDULE.grid(4, "karras"), (12,))
    draws = fit.fit(poutine.reparam(camera, config={"x": TransformReparam()}), y, prior()).draws
    hidden["camera inferred"] = drawn(draws["x"].flatten(0, 1))
    print(f"{'hidden pixels':24}{'RMSE of the mean':>18}{'in 90 % intervals':>20}")
    for name, rows in hidden.items():
        inside = (((rows < truth).double().mean(0) - 0.5).abs() < 0.45)[:, ~SEEN].double().mean()
        print(f"{name:24}{(rows.mean(0) - truth)[:, ~SEEN].square().mean().sqrt():18.3f}{inside:20.3f}")
    print("\n".join(f"{n}: {draws[n].mean():.3f} ± {draws[n].std():.3f}, in truth {v:.3f}" for n, v in CAMERA.items()))
    seen = torch.where(SEEN, y / CAMERA["gain"], torch.nan)
    shown = {"truth": truth, "seen": seen, **{name: rows.mean(0) for name, rows in hidden.items()}}
    Path(folder).mkdir(parents=True, exist_ok=True)
    figure = plots.images({name: ((rows + 1.0) / 2.0).reshape(-1, 8, 8) for name, rows in shown.items()})
    figure.savefig(Path(folder) / "digits.png", dpi=150)


if __name__ == "__main__":
    main()
