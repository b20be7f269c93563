"""In-painting inside a larger program: digits half of which is hidden, seen through a camera that is not known.

    python examples/diffusion_prior.py

The prior of a digit is a diffusion whose denoiser is exact, ten Gaussians that have the moments of the classes, so that the
answer is known. The program adds a gain and a noise level that all pictures share. HMC infers both and all pictures at once,
in the noise that the flow turns into digits. With the camera given, its likelihood leads samplers of one picture at a time.
"""

from __future__ import annotations

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

GAIN, NOISE, SCHEDULE = 1.7, 0.15, EDM(0.05, 20.0)
KEPT = torch.arange(64) < 32  # the upper half


def camera(y: Tensor, prior: FlowPrior) -> None:
    gain = pyro.sample("gain", dist.LogNormal(y.new_zeros(()), 0.5))
    noise = pyro.sample("noise", dist.HalfNormal(y.new_tensor(0.5)))
    with pyro.plate("pictures", len(y)):
        x = pyro.sample("x", prior())
        pyro.sample("y", dist.Normal(gain * x, noise).mask(KEPT).to_event(1), obs=y)


def picture(y: Tensor, gain: float, noise: float) -> None:
    x = pyro.sample("x", dist.Normal(y.new_zeros(64), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(gain * x, noise).mask(KEPT).to_event(1), obs=y)


def main(smoke: bool = False, folder: str = "runs/diffusion_prior") -> None:
    """Infers, prints a table and saves ``digits.png`` in a folder."""
    torch.manual_seed(0)
    digits = datasets.digits()
    x, labels = digits.arrays["x"] / 8.0 - 1.0, digits.arrays["y"]
    classes = [x[labels == label] for label in range(10)]
    means = torch.stack([part.mean(0) for part in classes])
    oracle = Oracle(torch.ones(10), means, torch.stack([p.T.cov() + 0.01 * torch.eye(64) for p in classes]), SCHEDULE)
    x = oracle.distribution().sample((4 if smoke else 8,))  # new digits of that law
    y, shape = GAIN * x + NOISE * torch.randn_like(x), (-1, 8, 8)
    steps, count, chains = (8, 20, 2) if smoke else (60, 1000, 12)

    found = {"mean of all digits": oracle.distribution().sample((count,))[:, None].expand(-1, len(x), -1)}
    program = poutine.reparam(camera, config={"x": TransformReparam()})
    prior = FlowPrior(oracle, SCHEDULE.grid(4, "karras"), (64,))
    noise = torch.randn(chains, len(x), 64, dtype=x.dtype)
    start = {"x_base": noise, "gain": torch.ones(chains), "noise": torch.full((chains,), 0.5)}
    fit = HMC(chains=chains, warmup=5 if smoke else 60, draws=3 if smoke else 25, start=start, seed=0, progress=False)
    draws = fit.fit(program, y, prior).draws
    grid = SCHEDULE.grid(steps, "log_snr")
    given = {"led": [], "twisted": [], "exact": []}
    for row in y:
        likelihood = Likelihood(picture, row, GAIN, NOISE)
        led, noise = PiGDM(oracle, likelihood, deviation=0.7), 20.0 * torch.randn(count, 64, dtype=x.dtype)
        given["led"].append(samplers.ancestral(led, noise, grid))
        given["twisted"].append(twisted(led, likelihood, noise, grid, "full" if smoke else "upper").draws(count))
        seen = GAIN * torch.eye(64, dtype=x.dtype)[KEPT]
        posterior = oracle.condition(seen, row[KEPT], NOISE**2 * torch.eye(32, dtype=x.dtype))
        given["exact"].append(posterior.distribution().sample((count,)))
    found |= {f"{name}, camera given": torch.stack(parts, 1) for name, parts in given.items()}
    found["HMC, camera inferred"] = draws["x"].flatten(0, 1)
    print(f"{'hidden pixels':24}{'RMSE of the mean':>18}{'in 90 % intervals':>20}")
    for name, one in found.items():
        low, high = one.quantile(torch.tensor([0.05, 0.95], dtype=x.dtype), 0)
        inside = ((low < x) & (x < high))[:, ~KEPT].double().mean()
        print(f"{name:24}{(one.mean(0) - x)[:, ~KEPT].square().mean().sqrt():18.3f}{inside:20.3f}")
    for name, truth in {"gain": GAIN, "noise": NOISE}.items():
        print(f"{name}: {draws[name].mean():.3f} ± {draws[name].std():.3f}, in truth {truth}")
    shown = {"digits": x, "seen": torch.where(KEPT, y / GAIN, -1.0)} | {name: one.mean(0) for name, one in found.items()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    plots.images({name: ((rows + 1.0) / 2.0).clamp(0, 1).reshape(shape) for name, rows in shown.items()}).savefig(
        Path(folder) / "digits.png"
    )


if __name__ == "__main__":
    main()
